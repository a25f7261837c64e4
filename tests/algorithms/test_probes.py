"""Random vectors, deflation, and samples of the moments."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import spectra
from spectra.algorithms.probes import (
    Deflation,
    Moments,
    gaussian,
    sample_moments,
    seeded,
    sphere,
)
from spectra.errors import ArgumentError, ArgumentTypeError
from spectra.objective.vectors import VectorSpace
from tests.cases.matrices import Rotated, dense, operator, orthogonal, s1, s3


def sampled(matrix, deflation=None, **options):
    defaults = {
        "want": "trace",
        "rtol": 1e-9,
        "atol": None,
        "confidence": 0.95,
        "max_matvecs": 20,
        "seed": 0,
        "progress": False,
    }
    return sample_moments(operator(matrix), deflation, **{**defaults, **options})


# --- generators and vectors -------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 7, np.int64(7), np.uint8(7), 2**63, 2**64 - 1])
def test_every_kind_of_integer_is_a_seed(seed):
    first = torch.randn(3, generator=seeded(seed))
    assert torch.equal(first, torch.randn(3, generator=seeded(int(seed))))


@pytest.mark.parametrize("seed", [-1, 1.0, True, "0", None, 2**64])
def test_what_is_no_seed_is_refused(seed):
    with pytest.raises(ArgumentError, match=r"seed=.*expected an integer >= 0"):
        seeded(seed)


def test_neighbouring_seeds_give_unrelated_vectors():
    space = VectorSpace(10_000)
    x, y = gaussian(space, seeded(0)), gaussian(space, seeded(1))
    assert abs(space.inner(x, y)) / space.n < 0.04


def test_the_global_random_state_is_neither_read_nor_written():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = sphere(VectorSpace(50), seeded(3))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    assert torch.equal(first, sphere(VectorSpace(50), seeded(3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sphere_probe_has_unit_norm_and_the_dtype_of_the_space(dtype):
    space = VectorSpace(1000, dtype)
    vector = sphere(space, seeded(0))
    assert vector.dtype == dtype
    assert abs(space.norm(vector) - 1) < 4 * space.eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_probe_beside_known_vectors_is_orthogonal_to_them(dtype):
    space = VectorSpace(40, dtype)
    rows = torch.from_numpy(orthogonal(40)[:39]).to(dtype)
    # All but one dimension are taken: whatever is drawn, one direction remains.
    vector = sphere(space, seeded(0), rows)
    assert float(space.project(rows, vector).abs().max()) < 100 * space.eps
    assert abs(space.norm(vector) - 1) < 4 * space.eps


def test_the_sphere_is_covered_evenly():
    space, generator = VectorSpace(6), seeded(0)
    draws = torch.stack([sphere(space, generator) for _ in range(4000)]).numpy()
    # Moments of a coordinate of the unit sphere: E x² = 1/n, E x⁴ = 3 / (n (n + 2)).
    assert np.abs(draws.mean(axis=0)).max() < 0.03
    assert np.abs(draws.T @ draws / 4000 - np.eye(6) / 6).max() < 0.015
    assert np.abs((draws**4).mean(axis=0) - 3 / 48).max() < 0.01


def test_removing_rows_leaves_nothing_of_them():
    space = VectorSpace(30)
    rows = torch.from_numpy(orthogonal(30)[:4])
    vector = 1e8 * rows[0] + torch.ones(30, dtype=torch.float64)
    space.remove(vector, rows)
    assert float((rows @ vector).abs().max()) < 1e-12


# --- deflation --------------------------------------------------------------------------------


def test_eigenvectors_of_another_operator_are_refused():
    pairs = spectra.eigsh(dense(np.arange(8.0)), k=2)
    with pytest.raises(ArgumentError, match=r"length 8, the operator has n = 9"):
        Deflation(operator(dense(np.arange(9.0))), pairs)


def test_vectors_that_are_not_orthonormal_are_refused():
    pairs = spectra.eigsh(dense(np.arange(8.0)), k=2)
    skewed = SimpleNamespace(
        values=pairs.values, vectors=pairs.vectors @ [[1, 0.1], [0, 1]], residuals=pairs.residuals
    )
    with pytest.raises(ArgumentError, match=r"not orthonormal: .* off by 0\.1"):
        Deflation(operator(dense(np.arange(8.0))), skewed)


def test_what_is_no_eigenpairs_is_refused():
    with pytest.raises(ArgumentTypeError, match="Eigenpairs that eigsh returned, got a tuple"):
        Deflation(operator(np.eye(4)), (np.ones(1), np.eye(4)[:, :1]))


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_eigenpairs_deflate_whatever_kind_of_array_they_are(kind, dtype):
    matrix = dense(np.arange(8.0))
    pairs = spectra.eigsh(torch.from_numpy(matrix) if kind == "torch" else matrix, k=2)
    target = operator(matrix.astype(dtype))
    deflation = Deflation(target, pairs)
    assert len(deflation) == 2
    assert deflation.basis.dtype == target.space.dtype
    assert deflation.values == pytest.approx([7, 6])


def test_what_deflated_pairs_hold_of_the_squared_norm_counts_their_residuals():
    values = s3(60)
    matrix = dense(values)
    # Four products cannot make the pairs converge, so their residuals are large.
    pairs = spectra.eigsh(matrix, k=3, max_matvecs=10, tol=1e-8)
    assert pairs.residuals.max() > 0.1
    q = pairs.vectors
    outside = np.eye(60) - q @ q.T
    rest = np.linalg.norm(outside @ matrix @ outside) ** 2
    deflation = Deflation(operator(matrix), pairs)
    assert deflation.square + rest == pytest.approx((values**2).sum(), rel=1e-10)


# --- moments ----------------------------------------------------------------------------------


def test_the_spread_of_sphere_probes_is_the_one_that_the_formula_states():
    # 2n / (n + 2) (‖A‖_F² - tr² / n), for probes uniform on the sphere of radius sqrt n.
    values = np.concatenate([np.linspace(-1, 4, 39), [12.0]])
    n, space, generator = 40, VectorSpace(40), seeded(11)
    matrix = torch.from_numpy(dense(values))
    probes = torch.stack([sphere(space, generator) for _ in range(20_000)]) * n**0.5
    samples = ((probes @ matrix) * probes).sum(dim=1)
    expected = 2 * n / (n + 2) * ((values**2).sum() - values.sum() ** 2 / n)
    assert float(samples.var()) == pytest.approx(expected, rel=0.05)
    assert float(samples.mean()) == pytest.approx(values.sum(), abs=3 * (expected / 20_000) ** 0.5)


@pytest.mark.parametrize("deflate", [False, True])
def test_samples_have_the_mean_and_the_spread_of_their_moment(deflate):
    values = s1(400)
    matrix = Rotated(values)
    deflation = Deflation(operator(matrix), spectra.eigsh(matrix, k=10)) if deflate else None
    moments = sampled(matrix, deflation, max_matvecs=399)
    assert not moments.exact
    assert len(moments.traces) == moments.matvecs == 399
    known = 10 if deflate else 0
    rest, m = values[known:], 400 - known
    variance = 2 * m / (m + 2) * ((rest**2).sum() - rest.sum() ** 2 / m)
    error = (variance / 399) ** 0.5
    assert abs(moments.traces.mean() - values.sum()) < 3 * error
    # The sample variance of skewed samples is itself uncertain.
    assert moments.traces.var() == pytest.approx(variance, rel=0.35)
    square_error = moments.squares.std() / 399**0.5
    assert abs(moments.squares.mean() - (values**2).sum()) < 3 * square_error + 1e-6


def test_a_deflated_sample_is_that_of_the_projected_operator():
    # Unconverged pairs: the product of a probe outside their span has components inside it, whose
    # squares are counted with the residuals already.
    matrix = dense(s3(60))
    pairs = spectra.eigsh(matrix, k=3, max_matvecs=6, tol=1e-8)
    h = operator(matrix)
    deflation = Deflation(h, pairs)
    moments = sampled(matrix, deflation, max_matvecs=6, seed=8)
    probe = 57**0.5 * sphere(h.space, seeded(8), deflation.basis).numpy()
    q = pairs.vectors
    inside = matrix @ probe
    outside = inside - q @ (q.T @ inside)
    assert np.linalg.norm(outside) < 0.99 * np.linalg.norm(inside)
    assert moments.traces[0] == pytest.approx(pairs.values.sum() + probe @ matrix @ probe)
    assert moments.squares[0] == pytest.approx(deflation.square + outside @ outside)


def test_going_on_from_earlier_samples_keeps_them_and_counts_only_new_products():
    matrix = Rotated(s1(400))
    first = sampled(matrix, max_matvecs=7)
    more = sampled(matrix, max_matvecs=5, seed=1, begun=first)
    assert len(more.traces) == 12
    assert more.matvecs == 5
    assert np.array_equal(more.traces[:7], first.traces)
    assert np.array_equal(more.squares[:7], first.squares)


def test_samples_that_meet_the_tolerance_cost_no_product():
    h = operator(Rotated(s1(400)))
    begun = Moments(np.full(6, 3.0), np.full(6, 2.0), exact=False, matvecs=0)
    moments = sampled(h, begun=begun)
    assert h.matvecs == moments.matvecs == 0
    assert np.array_equal(moments.traces, begun.traces)


@pytest.mark.parametrize("n", [1, 2, 31, 32])
def test_small_matrices_are_multiplied_with_unit_vectors(n):
    values = np.linspace(-3, 4, n)
    moments = sampled(dense(values), max_matvecs=40)
    assert moments.exact
    assert moments.matvecs == n
    assert moments.traces == pytest.approx([values.sum()], abs=1e-12)
    assert moments.squares == pytest.approx([(values**2).sum()])
    assert moments.half_width("trace", 0.95) == 0.0


def test_a_budget_below_n_leaves_probes_even_where_n_is_small():
    moments = sampled(dense(np.linspace(-3, 4, 20)), max_matvecs=10)
    assert not moments.exact
    assert moments.matvecs == 10


def test_unit_vectors_are_used_where_probes_would_cost_more():
    values = s1(100)
    moments = sampled(dense(values), max_matvecs=300, rtol=0.001)
    assert moments.exact
    assert moments.matvecs == 5 + 100
    assert moments.traces == pytest.approx([values.sum()], rel=1e-12)


def test_deflating_everything_leaves_nothing_to_sample():
    values = np.array([5.0, 2.0, -1.0])
    matrix = dense(values)
    moments = sampled(matrix, Deflation(operator(matrix), spectra.eigsh(matrix, k=3)))
    assert moments.exact
    assert moments.matvecs == 0
    assert moments.traces == pytest.approx([6.0])
    assert moments.squares == pytest.approx([30.0])


def test_two_samples_are_the_least_that_tell_an_error():
    single = Moments(np.ones(1), np.ones(1), exact=False, matvecs=1)
    assert single.half_width("trace", 0.95) == float("inf")
    pair = Moments(np.array([1.0, 3.0]), np.ones(2), exact=False, matvecs=2)
    # t(0.975, 1 degree of freedom) = 12.7062, standard error 1, widened by 1 + 1.5 / 2.
    assert pair.half_width("trace", 0.95) == pytest.approx(1.75 * 12.7062, abs=1e-4)
    assert pair.half_width("square", 0.95) == 0.0


def test_the_scale_of_a_tolerance_is_the_moment_or_the_norm():
    moments = Moments(np.array([-2.0, -4.0]), np.array([100.0]), exact=False, matvecs=2)
    assert moments.target("trace", 0.1, None) == pytest.approx(1.0)
    assert moments.target("trace", 0.1, 0.0) == pytest.approx(0.3)
    assert moments.target("trace", 0.1, 2.0) == pytest.approx(2.0)
    # 10 ± 1 is 100 ± 20 to first order.
    assert moments.target("square", 0.1, None) == pytest.approx(20.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rtol": -1.0}, "tolerances >= 0"),
        ({"rtol": float("nan")}, "tolerances >= 0"),
        ({"rtol": 0.0}, "at least one of them > 0"),
        ({"rtol": 0.0, "atol": 0.0}, "at least one of them > 0"),
        ({"atol": -0.1}, "tolerances >= 0"),
        ({"confidence": 0.0}, "a probability between 0 and 1"),
        ({"confidence": 1.0}, "a probability between 0 and 1"),
        ({"confidence": 95}, "a probability between 0 and 1"),
        ({"max_matvecs": 1}, "at least 2 probes"),
        ({"seed": -3}, "expected an integer >= 0"),
    ],
)
def test_impossible_requests_cost_no_product(options, message):
    h = operator(np.eye(40))
    with pytest.raises(ArgumentError, match=message):
        sampled(h, **options)
    assert h.matvecs == 0
