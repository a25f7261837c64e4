"""Solving: the least residual of the Krylov space, confirmed by a product."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import minres as scipy_minres

import spectra
from spectra.algorithms.solve import Solution, solve
from spectra.errors import ArgumentError, ArgumentTypeError, NonFiniteError
from spectra.objective.vectors import VectorSpace
from spectra.operators.base import SymmetricOperator
from tests.cases.matrices import (
    Diagonal,
    Noisy,
    Poisoned,
    Rotated,
    dense,
    operator,
    orthogonal,
    rank_one,
    s1,
    s1z,
    s2,
    s3,
    s4,
    s5,
    semicircle,
    tanh_network,
    torch_operator,
    wilkinson,
)

DOCS = Path(__file__).parents[2] / "docs" / "methods" / "solve.md"

POSITIVE = np.geomspace(0.1, 10, 80)
INDEFINITE = np.concatenate([-np.geomspace(0.1, 5, 30), np.geomspace(0.1, 10, 50)])
NEARLY_SINGULAR = np.append(np.linspace(1, 10, 79), 1e-3)
PAIRED = np.concatenate([-np.linspace(1, 5, 40), np.linspace(1, 5, 40)])
SINGULAR = np.concatenate([-np.linspace(1, 4, 20), np.zeros(20), np.linspace(1, 10, 40)])
SEMIDEFINITE = np.concatenate([np.zeros(30), np.linspace(0.5, 10, 50)])


def right_hand_side(n, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).normal(size=n).astype(dtype)


def relative_residual(matrix, solution, b, damping=0.0):
    """In float64 whatever the solution's precision, by plain NumPy."""
    x = np.asarray(solution.x, dtype=np.float64)
    product = np.asarray(matrix, dtype=np.float64) @ x
    return np.linalg.norm(product + damping * x - b) / np.linalg.norm(b)


def conjugate_gradient_steps(apply, b, rtol, precondition=lambda r: r):
    """Products that conjugate gradients take until the residual of their recurrence is rtol."""
    x, r = np.zeros_like(b), b.copy()
    z = precondition(r)
    p, square, steps = z.copy(), r @ z, 0
    while np.linalg.norm(r) > rtol * np.linalg.norm(b):
        q = apply(p)
        steps += 1
        length = square / (p @ q)
        x += length * p
        r -= length * q
        z = precondition(r)
        before, square = square, r @ z
        p = z + square / before * p
    return steps


class Identity(SymmetricOperator):
    """The identity, which hands back the very memory it was given."""

    def __init__(self, n):
        super().__init__(VectorSpace(n))

    def _products(self, rows):
        return rows


class Lying(Diagonal):
    """diag(values), whose first products are off: the recurrence never learns what is true."""

    def __init__(self, values, lies, relative):
        super().__init__(values)
        self.lies, self.relative = lies, relative
        self.generator = np.random.default_rng(0)

    def _matvec(self, x):
        product = super()._matvec(x)
        self.lies -= 1
        if self.lies < 0:
            return product
        error = self.generator.normal(size=len(x))
        return product + self.relative * np.linalg.norm(product) / np.linalg.norm(error) * error


# --- the solution -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("damping", [0.0, 0.05])
@pytest.mark.parametrize(
    "values",
    [POSITIVE, INDEFINITE, NEARLY_SINGULAR, PAIRED, -POSITIVE],
    ids=["positive", "indefinite", "nearly singular", "paired", "negative"],
)
def test_the_solution_is_that_of_a_dense_solve(values, damping, dtype):
    matrix = dense(values).astype(dtype)
    b = right_hand_side(80, dtype=dtype)
    rtol = 1e-10 if dtype == np.float64 else 1e-4
    found = solve(matrix, b, damping=damping, rtol=rtol)
    assert found.converged
    assert found.x.dtype == dtype
    assert relative_residual(matrix, found, b, damping) <= rtol * 1.01
    exact = np.linalg.solve(matrix.astype(float) + damping * np.eye(80), b)
    nearest = np.abs(values + damping).min()
    assert np.linalg.norm(found.x - exact) <= 1.1 * found.residual / nearest


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("make", [wilkinson, lambda: dense(s2(60)), lambda: dense(semicircle(60))])
def test_the_solution_is_that_of_a_dense_solve_after_as_many_steps_as_it_takes(make, deflate):
    matrix = make()
    b = right_hand_side(len(matrix))
    pairs = spectra.eigsh(matrix, 5) if deflate else None
    found = solve(matrix, b, rtol=1e-9, deflate=pairs)
    assert found.converged
    exact = np.linalg.solve(matrix, b)
    smallest = np.abs(np.linalg.eigvalsh(matrix)).min()
    assert np.linalg.norm(found.x - exact) <= found.residual / smallest * 1.01


@pytest.mark.parametrize("deflate", [False, True])
def test_the_residual_is_measured(deflate):
    matrix = dense(s1(200))
    b = right_hand_side(200)
    pairs = spectra.eigsh(matrix, 10) if deflate else None
    found = solve(matrix, b, damping=0.5, deflate=pairs)
    truth = relative_residual(matrix, found, b, 0.5)
    assert found.relative_residual == pytest.approx(truth, rel=1e-9)
    assert found.residual == pytest.approx(truth * np.linalg.norm(b), rel=1e-9)


def test_every_product_is_counted():
    h = operator(dense(s1(100)))
    pairs = spectra.eigsh(h, 5)
    before = h.matvecs
    found = solve(h, right_hand_side(100), damping=0.4, deflate=pairs)
    assert found.matvecs == h.matvecs - before


def test_one_and_two_dimensions():
    assert solve(np.array([[4.0]]), [8.0]).x == pytest.approx([2.0])
    assert solve(np.array([[-4.0]]), [8.0], damping=2.0).x == pytest.approx([-4.0])
    found = solve(np.diag([1.0, -1.0]), [1.0, 1.0])
    assert found.x == pytest.approx([1.0, -1.0])
    assert found.converged


def test_a_multiple_of_the_identity_takes_one_step():
    b = right_hand_side(50)
    for found in (solve(0.5 * np.eye(50), b), solve(Identity(50), b, damping=-0.5)):
        assert found.x == pytest.approx(2 * b)
        assert found.matvecs == 2


def test_the_number_of_steps_is_that_of_distinct_eigenvalues():
    found = solve(dense(np.repeat([-3.0, 0.5, 7.0], 20)), right_hand_side(60), rtol=1e-10)
    assert found.converged
    assert found.matvecs == 3 + 1


@pytest.mark.parametrize("ncv", [0, 20])
def test_each_step_gives_the_least_residual_of_its_krylov_space(ncv):
    matrix = dense(INDEFINITE)
    b = right_hand_side(80)
    space = b[:, None]
    residuals = []
    for steps in range(1, 15):
        found = solve(matrix, b, rtol=1e-12, max_matvecs=steps + 1, ncv=ncv)
        images = matrix @ space
        least = b - images @ np.linalg.lstsq(images, b, rcond=None)[0]
        assert found.residual == pytest.approx(np.linalg.norm(least), rel=1e-7)
        residuals.append(found.residual)
        following = matrix @ space[:, -1]
        for _ in range(2):
            basis = np.linalg.qr(space)[0]
            following -= basis @ (basis.T @ following)
        space = np.column_stack([space, following / np.linalg.norm(following)])
    assert (np.diff(residuals) < 1e-12).all()


def test_the_residual_never_grows_with_the_budget():
    h = operator(Rotated(s4(400)))
    b = right_hand_side(400)
    residuals = [solve(h, b, rtol=1e-8, max_matvecs=m).residual for m in range(2, 60)]
    assert (np.diff(residuals) <= 1e-10 * residuals[0]).all()


def test_nothing_is_random():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second = (solve(dense(s1(100)), right_hand_side(100), damping=0.5) for _ in range(2))
    assert (first.x == second.x).all()
    assert torch.equal(torch.get_rng_state(), state)


def test_b_and_the_matrix_are_left_as_they_were():
    matrix = torch.from_numpy(dense(INDEFINITE))
    b = torch.from_numpy(right_hand_side(80))
    before = matrix.clone(), b.clone()
    solve(matrix, b, deflate=spectra.eigsh(matrix, 4))
    assert torch.equal(matrix, before[0])
    assert torch.equal(b, before[1])


def test_b_equal_to_zero_costs_nothing():
    h = operator(dense(POSITIVE))
    found = solve(h, np.zeros(80))
    assert found.x.tolist() == [0.0] * 80
    assert (found.matvecs, h.matvecs) == (0, 0)
    assert found.converged
    assert found.residual == found.relative_residual == 0.0


# --- scale and shift --------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [2.0**-60, 2.0**60])
@pytest.mark.parametrize("deflate", [False, True])
def test_scaling_the_matrix_scales_the_solution(scale, deflate):
    values, b = s1(150), right_hand_side(150)
    pairs = spectra.eigsh(Rotated(values), 6) if deflate else None
    larger = None
    if pairs is not None:
        fields = ("values", "residuals", "no_eigenvalue_above", "no_eigenvalue_below")
        larger = dataclasses.replace(pairs, **{f: getattr(pairs, f) * scale for f in fields})
    one = solve(Rotated(values), b, damping=0.1, deflate=pairs)
    other = solve(Rotated(values * scale), b, damping=0.1 * scale, deflate=larger)
    assert other.x * scale == pytest.approx(one.x, rel=1e-6, abs=1e-9)
    assert other.matvecs == one.matvecs
    assert other.relative_residual == pytest.approx(one.relative_residual, rel=1e-6)
    assert other.negative_curvature == pytest.approx(one.negative_curvature * scale, rel=1e-6)


@pytest.mark.parametrize("scale", [2.0**-60, 2.0**60])
def test_scaling_b_scales_the_solution(scale):
    matrix, b = dense(INDEFINITE).astype(np.float32), right_hand_side(80, dtype=np.float32)
    one, other = solve(matrix, b), solve(matrix, b * np.float32(scale))
    assert other.x / scale == pytest.approx(one.x, rel=1e-5)
    assert other.residual == pytest.approx(one.residual * scale, rel=1e-5)
    assert other.matvecs == one.matvecs


def test_damping_is_a_shift():
    matrix, b = dense(INDEFINITE), right_hand_side(80)
    for damping in (0.7, -0.7):
        found = solve(matrix, b, damping=damping, rtol=1e-10)
        other = solve(matrix + damping * np.eye(80), b, rtol=1e-10)
        assert found.x == pytest.approx(other.x, abs=1e-8)
        assert found.damping == damping


# --- cost -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damping", "rtol", "deflate", "ceiling"),
    [
        # The study's conjugate gradients, which do not measure their residual; γ = 0.31 is nearly
        # singular (0.01 to 100).
        (0.5, 1e-3, False, 17),
        (0.5, 1e-6, False, 28),
        (0.5, 1e-3, True, 7),
        (0.5, 1e-6, True, 13),
        (0.31, 1e-3, False, 29),
        (0.31, 1e-6, False, 46),
        # Their smallest eigenvalue is another draw in the study: 13 and 22 there.
        (0.31, 1e-3, True, 15),
        (0.31, 1e-6, True, 23),
    ],
)
@pytest.mark.parametrize("seed", range(5))
def test_the_cost_on_the_spectrum_of_a_network(damping, rtol, deflate, ceiling, seed):
    h = operator(Rotated(s1()))
    pairs = spectra.eigsh(h, 10) if deflate else None
    b = right_hand_side(2000, seed)
    found = solve(h, b, damping=damping, rtol=rtol, deflate=pairs)
    assert found.converged
    assert found.matvecs <= ceiling
    if damping > 0.3:
        assert found.negative_curvature is None


@pytest.mark.parametrize("make", [s1, s1z, s2, s3, s5])
@pytest.mark.parametrize("damping", [0.31, 0.5])
def test_no_more_products_than_conjugate_gradients_and_the_measuring_one(make, damping):
    matrix = Rotated(make(1000))
    b = right_hand_side(1000)
    steps = conjugate_gradient_steps(lambda x: matrix @ x + damping * x, b, 1e-5)
    assert solve(matrix, b, damping=damping, rtol=1e-5).matvecs <= steps + 1


def test_no_more_products_than_preconditioned_conjugate_gradients():
    matrix, damping = Rotated(s1()), 0.31
    pairs = spectra.eigsh(matrix, 10)
    q, known = pairs.vectors, pairs.values + damping
    weights = np.abs(pairs.values).min() + damping
    for seed in range(5):
        b = right_hand_side(2000, seed)
        for rtol in (1e-3, 1e-6):
            steps = conjugate_gradient_steps(
                lambda x: matrix @ x + damping * x,
                b,
                rtol,
                lambda r: r + q @ ((weights / known - 1) * (q.T @ r)),
            )
            found = solve(matrix, b, damping=damping, rtol=rtol, deflate=pairs)
            assert found.matvecs <= steps + 1


@pytest.mark.parametrize(
    ("dtype", "saved"), [(np.float64, 0.3), (np.float32, 0.5)], ids=["float64", "float32"]
)
def test_holding_a_few_vectors_keeps_outliers_from_coming_back(dtype, saved):
    matrix, b = Rotated(s4(), dtype=dtype), right_hand_side(2000, dtype=dtype)
    plain = solve(matrix, b, damping=0.5, ncv=0)
    held = solve(matrix, b, damping=0.5)
    assert held.converged
    assert held.matvecs <= (1 - saved) * plain.matvecs


def test_scipy_says_success_where_it_has_none():
    matrix, b = Rotated(s1()), right_hand_side(2000)
    x, info = scipy_minres(matrix, b, rtol=1e-4)
    assert info == 0
    assert np.linalg.norm(matrix @ x - b) > 0.2 * np.linalg.norm(b)
    found = solve(matrix, b, rtol=1e-4)
    truth = np.linalg.norm(matrix @ found.x - b) / np.linalg.norm(b)
    assert found.relative_residual == pytest.approx(truth, rel=1e-6)
    assert found.converged == (truth <= 1e-4)
    enough = solve(matrix, b, rtol=1e-3, max_matvecs=2000)
    assert enough.converged
    assert np.linalg.norm(matrix @ enough.x - b) <= 1.001e-3 * np.linalg.norm(b)


# --- eigenpairs as preconditioner -------------------------------------------------------------


@pytest.mark.parametrize("tol", [1e-6, 1e-3, 1e-1])
@pytest.mark.parametrize("which", ["LM", "LA", "SA", "BE"])
def test_inexact_eigenpairs_never_make_the_solution_wrong(tol, which):
    matrix, b = dense(s1(120)), right_hand_side(120)
    pairs = spectra.eigsh(matrix, 10, which=which, tol=tol)
    for damping in (0.0, 0.2, 0.31):
        found = solve(matrix, b, damping=damping, rtol=1e-5, deflate=pairs)
        assert found.converged
        assert relative_residual(matrix, found, b, damping) <= 1.001e-5


def test_inexact_eigenpairs_cost_hardly_more_than_exact_ones():
    matrix, b = Rotated(s1()), right_hand_side(2000)
    counts = {
        tol: solve(
            matrix, b, damping=0.31, rtol=1e-6, deflate=spectra.eigsh(matrix, 10, tol=tol)
        ).matvecs
        for tol in (1e-8, 1e-3, 1e-1)
    }
    assert counts[1e-3] <= counts[1e-8] + 1
    assert counts[1e-1] <= counts[1e-8] + 3


def test_a_known_eigenvalue_next_to_the_shift_is_taken_out():
    values = np.append(s1(200), -1.0)
    matrix, b = dense(values), right_hand_side(201)
    low = spectra.eigsh(matrix, 2, which="SA", tol=1e-6)
    options = {"damping": 1.0001, "rtol": 1e-6}
    plain, deflated = solve(matrix, b, **options), solve(matrix, b, deflate=low, **options)
    assert deflated.converged
    assert deflated.matvecs < plain.matvecs


@pytest.mark.parametrize("damping", [0.0, -2.0])
def test_a_known_null_vector_does_no_harm(damping):
    matrix = dense([0.0, 0.0, 2.0, 2.0, *np.linspace(3, 5, 26)])
    pairs = spectra.eigsh(matrix, 4, which="SA", tol=1e-10)
    b = matrix @ right_hand_side(30) + damping * right_hand_side(30)
    found = solve(matrix, b, damping=damping, rtol=1e-8, deflate=pairs)
    assert found.converged
    assert relative_residual(matrix, found, b, damping) <= 1e-8


def test_an_eigenvalue_known_to_be_zero_is_left_alone():
    matrix, b = np.diag([0.0, 9.0, *np.linspace(1, 5, 30)]), right_hand_side(32)
    pairs = spectra.eigsh(matrix, 1)
    null = dataclasses.replace(pairs, vectors=np.eye(32)[:, :1], values=np.zeros(1))
    found = solve(matrix, b, rtol=1e-6, deflate=null)
    assert found.least_squares
    assert found.x[0] == pytest.approx(0.0, abs=1e-6)
    assert found.x[1:] == pytest.approx(b[1:] / np.diag(matrix)[1:], rel=1e-4)


def test_eigenpairs_of_another_matrix_are_given_up():
    wrong = spectra.eigsh(dense(np.geomspace(1, 1e4, 60), seed=1), 20)
    matrix, b = dense(np.linspace(1, 2, 60)), right_hand_side(60)
    found = solve(matrix, b, rtol=1e-8, deflate=wrong)
    assert found.converged
    assert relative_residual(matrix, found, b) <= 1e-8


def test_all_eigenpairs_leave_two_steps():
    matrix = dense(INDEFINITE)
    pairs = spectra.eigsh(matrix, 80, tol=1e-12)
    found = solve(matrix, right_hand_side(80), rtol=1e-9, deflate=pairs)
    assert found.converged
    assert found.matvecs <= 4


# --- singular systems -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("values", [SINGULAR, SEMIDEFINITE], ids=["indefinite", "semidefinite"])
def test_a_compatible_singular_system_gets_the_solution_of_minimum_length(values, dtype):
    matrix = dense(values).astype(dtype)
    b = (dense(values) @ right_hand_side(80)).astype(dtype)
    rtol = 1e-9 if dtype == np.float64 else 1e-4
    found = solve(matrix, b, rtol=rtol)
    assert found.converged
    assert not found.least_squares
    shortest = np.linalg.pinv(dense(values), rcond=1e-10) @ b
    assert np.linalg.norm(found.x - shortest) <= 30 * rtol * np.linalg.norm(shortest)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("tol", [None, 1e-3, 1e-1])
@pytest.mark.parametrize("values", [SINGULAR, SEMIDEFINITE], ids=["indefinite", "semidefinite"])
def test_a_system_without_solution_gets_the_shortest_least_squares_solution(values, tol, dtype):
    matrix = dense(values).astype(dtype)
    b = right_hand_side(80, dtype=dtype)
    pairs = None if tol is None else spectra.eigsh(matrix, 6, tol=tol)
    found = solve(matrix, b, rtol=1e-6, deflate=pairs)
    shortest = np.linalg.pinv(dense(values), rcond=1e-10) @ b
    least = np.linalg.norm(dense(values) @ shortest - b) / np.linalg.norm(b)
    assert found.least_squares
    assert not found.converged
    assert found.relative_residual == pytest.approx(least, rel=2e-3)
    assert relative_residual(matrix, found, b) == pytest.approx(found.relative_residual, rel=1e-4)
    assert found.matvecs < 150
    [note] = found.notes
    assert re.match(r"the residual stopped falling at 0\.\d+ of ‖b‖ and is a null vector", note)
    if dtype == np.float32 and "not the shortest" in note:
        return
    assert "least-squares solution, of minimum length" in note
    off = 2e-2 if dtype == np.float32 or tol == 1e-1 else 1e-3
    assert np.linalg.norm(found.x - shortest) <= off * np.linalg.norm(shortest)


def test_small_systems_without_solution():
    found = solve(np.diag([2.0, 0.0]), [2.0, 5.0])
    assert found.x == pytest.approx([1.0, 0.0])
    assert found.least_squares
    found = solve(np.zeros((4, 4)), np.ones(4))
    assert found.x.tolist() == [0.0] * 4
    assert (found.least_squares, found.relative_residual) == (True, 1.0)
    found = solve(rank_one(30), right_hand_side(30))
    assert found.x == pytest.approx(rank_one(30) @ right_hand_side(30) / 9)


def test_damping_makes_a_system_solvable():
    matrix, b = dense(SEMIDEFINITE), right_hand_side(80)
    assert not solve(matrix, b).converged
    assert solve(matrix, b, damping=0.01).converged


@pytest.mark.parametrize("make", [s1, s1z, s2, s3])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_plateau_is_not_taken_for_a_missing_solution(make, dtype):
    b = right_hand_side(2000, dtype=dtype)
    found = solve(Rotated(make(), dtype=dtype), b, damping=0.1, max_matvecs=250)
    assert not found.least_squares


# --- negative curvature -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("make", [s1, s4])
def test_negative_curvature_is_what_its_direction_has(make, deflate, dtype):
    values = make(300)
    matrix = Rotated(values, dtype=dtype)
    pairs = spectra.eigsh(matrix, 8, which="LA") if deflate else None
    found = solve(matrix, right_hand_side(300, dtype=dtype), damping=0.02, deflate=pairs)
    v = np.asarray(found.direction, dtype=np.float64)
    assert np.linalg.norm(v) == pytest.approx(1.0, rel=1e-5)
    exact = v @ (Rotated(values) @ v) + 0.02
    assert found.negative_curvature < 0
    assert found.negative_curvature == pytest.approx(exact, rel=1e-3)
    assert found.negative_curvature >= values.min() + 0.02


def test_negative_curvature_shows_as_soon_as_the_krylov_space_holds_it():
    matrix, b = dense(INDEFINITE), right_hand_side(80)
    for steps in range(1, 12):
        powers = [np.linalg.matrix_power(matrix, i) @ b for i in range(steps)]
        space = np.linalg.qr(np.stack(powers, axis=1))[0]
        lowest = np.linalg.eigvalsh(space.T @ matrix @ space).min()
        found = solve(matrix, b, rtol=1e-12, max_matvecs=steps + 1)
        assert (found.negative_curvature is not None) == (lowest < 0)


def test_a_known_negative_eigenvalue_is_negative_curvature():
    matrix = dense([-7.0, *np.linspace(1, 2, 40)])
    pairs = spectra.eigsh(matrix, 1, tol=1e-8)
    found = solve(matrix, right_hand_side(41), damping=1.0, deflate=pairs)
    assert found.negative_curvature == pytest.approx(-6.0)
    assert abs(found.direction @ orthogonal(41)[:, 0]) == pytest.approx(1.0)


@pytest.mark.parametrize("values", [POSITIVE, SEMIDEFINITE], ids=["positive", "semidefinite"])
def test_no_negative_curvature_where_there_is_none(values):
    for dtype in (np.float64, np.float32):
        found = solve(dense(values).astype(dtype), right_hand_side(80, dtype=dtype), rtol=1e-6)
        assert found.negative_curvature is None
        assert found.direction is None


# --- what did not converge --------------------------------------------------------------------


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("budget", [2, 3, 10, 50])
def test_a_spent_budget_is_said(budget, deflate):
    h = operator(Rotated(s1(500)))
    b = right_hand_side(500)
    pairs = spectra.eigsh(h, 10) if deflate else None
    before = h.matvecs
    found = solve(h, b, rtol=1e-8, deflate=pairs, max_matvecs=budget)
    assert not found.converged
    assert found.matvecs == h.matvecs - before == budget
    assert found.residual <= np.linalg.norm(b)
    [note] = found.notes
    assert f"after {budget} matvecs, 1e-08 was asked for; allow more with max_matvecs" in note


def test_the_note_says_which_eigenvalue_makes_it_slow():
    values = s1(500)
    found = solve(Rotated(values), right_hand_side(500), damping=0.02, max_matvecs=100)
    near = float(re.search(r"within ([\d.e-]+) of -0\.02", found.notes[0])[1])
    assert np.abs(values + 0.02).min() <= near < 0.05


@pytest.mark.parametrize("lies", [3, 8])
def test_a_recurrence_that_lied_is_continued_from_the_measured_residual(lies):
    values = np.linspace(1, 10, 60)
    found = solve(Lying(values, lies, 0.02), right_hand_side(60), rtol=1e-8)
    assert found.converged
    assert np.linalg.norm(values * found.x - right_hand_side(60)) <= 1e-7
    straight = solve(Lying(values, 0, 0.02), right_hand_side(60), rtol=1e-8)
    assert straight.matvecs < found.matvecs < 3 * straight.matvecs


def test_noise_above_the_tolerance_is_said():
    values = np.linspace(1, 10, 200)
    found = solve(Noisy(values, relative=1e-2), right_hand_side(200), rtol=1e-6)
    assert not found.converged
    assert found.relative_residual < 0.1
    [note, noise] = found.notes
    assert "a product measured" in note
    assert "less exact than rtol asks for" in note
    assert f"digits below {found.floor:.1g} mean nothing" in noise


@pytest.mark.parametrize("seed", range(5))
def test_what_makes_the_residual_larger_is_not_taken(seed):
    b = right_hand_side(50)
    found = solve(Noisy(np.linspace(1, 10, 50), relative=3.0, seed=seed), b, max_matvecs=12)
    assert found.residual <= np.linalg.norm(b)
    assert not found.converged


def test_what_single_precision_cannot_reach_is_said():
    matrix = dense(np.geomspace(1e-3, 100, 100)).astype(np.float32)
    b = right_hand_side(100, dtype=np.float32)
    found = solve(matrix, b, rtol=1e-9, max_matvecs=2000)
    assert not found.converged
    assert not found.least_squares
    assert "half or single precision" in found.notes[0]
    truth = relative_residual(matrix, found, b)
    assert found.relative_residual == pytest.approx(truth, rel=0.5)


def test_a_restart_reaches_what_one_run_in_single_precision_does_not():
    matrix = Rotated(s1(), dtype=np.float32)
    b = right_hand_side(2000, dtype=np.float32)
    found = solve(matrix, b, damping=0.5, rtol=1e-6)
    assert found.converged
    x = found.x.astype(np.float64)
    assert np.linalg.norm(Rotated(s1()) @ x + 0.5 * x - b) <= 1.2e-6 * np.linalg.norm(b)


def test_a_product_that_holds_nan_is_an_error():
    with pytest.raises(NonFiniteError, match="matvec 4 returned 1 non-finite"):
        solve(Poisoned(np.linspace(1, 2, 20), at=4), right_hand_side(20), rtol=1e-10)


# --- Hessians ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_influence_of_a_sample_on_a_network(dtype):
    h, reference = tanh_network(dtype)
    gradient = h.gradient()
    rtol = 1e-8 if dtype == torch.float64 else 1e-4
    found = solve(h, gradient, damping=0.05, rtol=rtol)
    assert found.converged
    assert isinstance(found.x, torch.Tensor)
    assert (found.x.dtype, found.x.shape) == (dtype, (43,))
    exact = np.linalg.solve(reference + 0.05 * np.eye(43), gradient.double().numpy())
    nearest = np.abs(np.linalg.eigvalsh(reference) + 0.05).min()
    off = np.linalg.norm(found.x.double().numpy() - exact)
    assert off <= 1.5 * rtol * float(gradient.norm()) / nearest
    assert set(h.space.unflatten(found.x)) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    # Outliers are known from eigsh, in torch.
    deflated = solve(h, gradient, damping=0.05, rtol=rtol, deflate=spectra.eigsh(h, 5))
    assert deflated.converged
    assert found.negative_curvature < 0
    assert isinstance(found.direction, torch.Tensor)


def test_the_newton_step_of_a_quadratic_ends_at_its_minimum():
    start = torch.tensor([3.0, -2.0], dtype=torch.float64)

    def function(w):
        return 2 * w[0] ** 2 + w[0] * w[1] + w[1] ** 2 - w[0]

    h = spectra.HessianOperator.from_function(function, start)
    end = start - solve(h, h.gradient(), rtol=1e-12).x
    h = spectra.HessianOperator.from_function(function, end)
    assert h.gradient().norm() < 1e-11


# --- kinds of vectors, and what is refused ----------------------------------------------------


def test_the_solution_comes_in_the_kind_of_the_operands():
    matrix, b = dense(POSITIVE), right_hand_side(80)
    exact = np.linalg.solve(matrix, b)
    torch_matrix, torch_b = torch.from_numpy(matrix), torch.from_numpy(b)
    for found in (
        solve(matrix, b, rtol=1e-9),
        solve(matrix, torch_b, rtol=1e-9),
        solve(torch_matrix, b, rtol=1e-9),
        solve(Diagonal(POSITIVE), list(orthogonal(80).T @ b), rtol=1e-9),
    ):
        assert isinstance(found.x, np.ndarray)
    assert solve(torch_matrix, b, rtol=1e-9).x == pytest.approx(exact, abs=1e-6)
    found = solve(torch_matrix, torch_b.requires_grad_(), rtol=1e-9)
    assert isinstance(found.x, torch.Tensor)
    assert not found.x.requires_grad
    assert found.x.numpy() == pytest.approx(exact, abs=1e-6)
    single = solve(torch_operator(POSITIVE, torch.float32), torch_b.detach().float())
    assert single.x.dtype == torch.float32


@pytest.mark.parametrize(
    ("b", "error", "message"),
    [
        (np.ones(3), ArgumentError, r"b has shape \(3,\), expected \(4,\)"),
        (np.ones((4, 1)), ArgumentError, r"b has shape \(4, 1\), .*; pass b.reshape\(-1\)"),
        (np.ones((4, 2)), ArgumentError, r"b has shape \(4, 2\)"),
        (1.0, ArgumentError, r"b has shape \(1,\)"),
        (np.array([1, np.nan, np.inf, 0]), ArgumentError, "b holds 2 non-finite of 4 entries"),
        (np.ones(4) * 1j, ArgumentTypeError, "expected real numbers"),
        (None, ArgumentTypeError, "expected real numbers"),
        (torch.ones(4), ArgumentTypeError, r"pass b.to\(torch.float64\)"),
        (torch.ones(4, dtype=torch.int64), ArgumentTypeError, r"b is torch.int64, the operator"),
        (torch.full((4,), torch.nan).double(), ArgumentError, "b holds 4 non-finite"),
        ({"w": torch.ones(4)}, ArgumentTypeError, r"b is a dict of tensors; .*space.flatten\(b\)"),
        ([torch.ones(2), torch.ones(2)], ArgumentTypeError, r"list of tensors; .*space.flatten"),
        (torch.ones(4, device="meta").double(), ArgumentError, r"pass b.to\(H.space.device\)"),
    ],
)
def test_impossible_right_hand_sides_are_refused_before_any_product(b, error, message):
    h = operator(np.diag([1.0, 2.0, 3.0, 4.0]))
    with pytest.raises(error, match=message):
        solve(h, b)
    assert h.matvecs == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": float("nan")}, "damping=nan; expected a finite number"),
        ({"damping": "large"}, "damping='large'"),
        ({"rtol": 0.0}, "rtol=0.0; expected a relative residual between 0 and 1"),
        ({"rtol": 1}, "rtol=1"),
        ({"rtol": -1e-3}, "rtol=-0.001"),
        ({"max_matvecs": 1}, "max_matvecs=1; expected an integer >= 2, for one step and"),
        ({"max_matvecs": 10.5}, "max_matvecs=10.5"),
        ({"ncv": -1}, "ncv=-1; expected an integer >= 0"),
        ({"ncv": True}, "ncv=True"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        solve(np.eye(4), np.ones(4), **options)


def test_what_is_no_set_of_eigenpairs_is_refused():
    with pytest.raises(ArgumentTypeError, match="Eigenpairs that eigsh returned, got a tuple"):
        solve(np.eye(4), np.ones(4), deflate=(np.ones(1), np.ones((4, 1))))
    with pytest.raises(ArgumentError, match="eigenvectors of length 5, the operator has n = 4"):
        solve(np.eye(4), np.ones(4), deflate=spectra.eigsh(np.diag([1.0, 2, 3, 4, 5]), 2))


# --- the result -------------------------------------------------------------------------------


def test_the_result_prints_its_error():
    found = solve(dense(INDEFINITE), right_hand_side(80), damping=0.02, rtol=1e-4)
    text = str(found)
    assert f"‖(H + 0.02 I) x − b‖ = {found.residual:.3g}" in text
    assert f"{found.relative_residual:.2g} of ‖b‖ (measured)" in text
    assert f"converged to rtol = 0.0001 (MINRES; {found.matvecs} matvecs)" in text
    assert f"vᵀ(H + 0.02 I)v = {found.negative_curvature:.4g}" in text
    assert "(H - 1 I)" in str(solve(dense(POSITIVE), right_hand_side(80), damping=-1))
    poor = solve(dense(INDEFINITE), right_hand_side(80), max_matvecs=4)
    assert "not converged to" in str(poor)
    assert "note: relative residual" in str(poor)
    pairs = spectra.eigsh(dense(POSITIVE), 3)
    found = solve(dense(POSITIVE), right_hand_side(80), deflate=pairs)
    assert "H x = b" in str(found)
    assert "preconditioned by 3 eigenpairs" in str(found)


def test_the_result_is_saved_and_loaded(tmp_path):
    h, _ = tanh_network()
    found = solve(h, h.gradient(), damping=0.01)
    again = spectra.load(found.save(tmp_path / "solution"))
    assert isinstance(again, Solution)
    assert torch.equal(again.x, found.x)
    assert torch.equal(again.direction, found.direction)
    assert str(again) == str(found)
    assert again.provenance["options"]["damping"] == 0.01
    assert again.provenance["operator"]["n"] == 43


def test_progress_goes_to_a_bar_on_demand(capsys):
    solve(dense(POSITIVE), right_hand_side(80), progress=True)
    assert "solve" in capsys.readouterr().err
    solve(dense(POSITIVE), right_hand_side(80))
    assert capsys.readouterr().err == ""


def test_the_blocks_of_the_documentation_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    namespace = {}
    for block in blocks:
        exec(compile(block, "solve.md", "exec"), namespace)
    assert namespace["step"].converged
    assert "measured" in capsys.readouterr().out
