"""The Krylov basis: H V = V T + β v eᵀ, with V orthonormal, whatever happens on the way."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from spectra.algorithms.lanczos import Krylov
from spectra.algorithms.probes import seeded
from spectra.errors import NonFiniteError
from spectra.operators.base import MatrixOperator
from tests.cases.matrices import (
    Diagonal,
    dense,
    laplacian,
    operator,
    orthogonal,
    rank_one,
    s1,
    s2,
    tanh_network,
    torch_operator,
    wilkinson,
)

MATRICES = {
    "outliers": dense(s1(120)),
    "power law": dense(s2(120)),
    "laplacian": laplacian(120).toarray(),
    "wilkinson": wilkinson(),
}


def krylov_of(matrix, capacity, steps=None, **options):
    krylov = Krylov(operator(matrix), capacity, seeded(0), **options)
    for _ in range(capacity if steps is None else steps):
        krylov.step()
    return krylov


def parts_of(krylov):
    """Basis as columns (n, j), T (j, j)."""
    j = krylov.size
    return krylov.basis.double().numpy().T, krylov.projection[:j, :j]


def assert_is_projection(krylov, matrix):
    v, t = parts_of(krylov)
    assert np.abs(v.T @ v - np.eye(krylov.size)).max() < 1e-12
    assert np.abs(v.T @ matrix @ v - t).max() < 1e-12 * np.abs(t).max()


def pairs_with_true_residuals(krylov, matrix):
    ritz = krylov.ritz()
    x = parts_of(krylov)[0] @ ritz.coefficients
    measured = np.linalg.norm(matrix @ x - x * ritz.values, axis=0)
    assert ritz.residuals == pytest.approx(measured, abs=1e-12 * np.abs(ritz.values).max())
    return ritz


def assert_is_krylov_relation(krylov, matrix, tolerance=1e-12):
    v, t = parts_of(krylov)
    scale = max(np.abs(t).max(), 1e-300)
    assert np.abs(v.T @ v - np.eye(krylov.size)).max() < tolerance
    assert np.abs(v.T @ matrix @ v - t).max() < tolerance * scale
    rest = matrix @ v - v @ t
    # All columns but the last vanish; the last is β times a unit vector outside the basis.
    assert np.abs(rest[:, :-1]).max(initial=0.0) < tolerance * scale
    assert np.linalg.norm(rest[:, -1]) == pytest.approx(krylov.beta, abs=tolerance * scale)
    assert np.abs(v.T @ rest[:, -1]).max() < tolerance * scale


@pytest.mark.parametrize("name", MATRICES)
def test_the_recurrence_holds_and_the_basis_is_orthonormal(name):
    matrix = MATRICES[name]
    krylov = krylov_of(matrix, 15)
    assert_is_krylov_relation(krylov, matrix)
    _, t = parts_of(krylov)
    assert np.abs(np.triu(t, 2)).max() < 1e-13 * np.abs(t).max()
    assert np.array_equal(t, t.T)


@pytest.mark.parametrize("name", MATRICES)
def test_the_residuals_of_the_recurrence_are_those_of_the_ritz_vectors(name):
    matrix = MATRICES[name]
    krylov = krylov_of(matrix, 15)
    pairs_with_true_residuals(krylov, matrix)


@pytest.mark.parametrize("name", MATRICES)
def test_the_recurrence_holds_after_restarts(name):
    matrix = MATRICES[name]
    krylov = krylov_of(matrix, 12)
    for keep in (np.arange(7, 12), np.array([0, 1, 10, 11]), np.arange(11)):
        krylov.restart(krylov.ritz(), keep)
        assert krylov.size == len(keep)
        krylov.step()
        assert_is_krylov_relation(krylov, matrix)
        while not krylov.full:
            krylov.step()
        assert_is_krylov_relation(krylov, matrix)


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("width", [2, 3, 5])
def test_a_block_has_the_same_relation_in_a_band(name, width):
    matrix = MATRICES[name]
    krylov = krylov_of(matrix, 20, steps=20 // width, block_size=width)
    assert krylov.size == 20 // width * width
    v, t = parts_of(krylov)
    scale = np.abs(t).max()
    assert np.abs(v.T @ v - np.eye(krylov.size)).max() < 1e-12
    assert np.abs(v.T @ matrix @ v - t).max() < 1e-12 * scale
    assert np.abs(np.triu(t, width + 1)).max() < 1e-12 * scale
    # All but the last columns vanish; those lead to the vectors that wait.
    rest = matrix @ v - v @ t
    assert np.abs(rest[:, :-width]).max() < 1e-12 * scale
    assert np.linalg.norm(rest) == pytest.approx(krylov.beta, abs=1e-12 * scale)
    waiting = krylov.rows[krylov.size : krylov.size + krylov.waiting].numpy().T
    assert np.abs(v.T @ waiting).max() < 1e-12
    assert np.abs(rest - waiting @ (waiting.T @ rest)).max() < 1e-12 * scale


@pytest.mark.parametrize("name", MATRICES)
def test_the_residuals_of_a_block_are_those_of_its_ritz_vectors_after_restarts_too(name):
    matrix = MATRICES[name]
    krylov = krylov_of(matrix, 18, steps=6, block_size=3)
    for kept in (slice(-10, None), slice(None, None, 4), slice(13)):
        keep = np.arange(krylov.size)[kept]
        ritz = pairs_with_true_residuals(krylov, matrix)
        krylov.restart(ritz, keep)
        while not krylov.full:
            krylov.step()
        assert_is_projection(krylov, matrix)


def test_a_block_shrinks_where_a_direction_leads_nowhere():
    # Rank one: of three products two are combinations of what is there.
    matrix = rank_one(20)
    krylov = Krylov(operator(matrix), 12, seeded(0), block_size=3)
    krylov.step()
    assert krylov.size == 3
    assert krylov.waiting == 1
    while not krylov.full:
        krylov.step()
    assert_is_projection(krylov, matrix)


def test_a_block_ends_where_the_space_is_complete():
    matrix = laplacian(11).toarray()
    krylov = Krylov(operator(matrix), 11, seeded(0), block_size=4)
    while not krylov.complete:
        krylov.step()
    assert krylov.waiting == 0
    assert krylov.ritz().values == pytest.approx(np.linalg.eigvalsh(matrix), abs=1e-12)
    assert krylov.ritz().residuals.max() == 0


def test_many_restarts_leave_the_basis_orthonormal():
    matrix = dense(s1(120))
    krylov = krylov_of(matrix, 8)
    for _ in range(200):
        krylov.restart(krylov.ritz(), np.arange(4, 8))
        while not krylov.full:
            krylov.step()
    v, t = parts_of(krylov)
    assert np.abs(v.T @ v - np.eye(8)).max() < 1e-12
    assert np.abs(v.T @ matrix @ v - t).max() < 1e-11


def test_a_fresh_direction_keeps_the_projection_true():
    # The relation to what was dropped is given up; V orthonormal and T = VᵀHV are not.
    matrix = dense(s2(120))
    krylov = krylov_of(matrix, 12)
    krylov.restart_fresh(krylov.ritz(), np.arange(8, 12))
    for _ in range(6):
        krylov.step()
    v, t = parts_of(krylov)
    assert np.abs(v.T @ v - np.eye(10)).max() < 1e-13
    assert np.abs(v.T @ matrix @ v - t).max() < 1e-11


def test_ritz_values_interlace_and_the_largest_never_falls():
    matrix = dense(s2(100))
    krylov = krylov_of(matrix, 40, steps=1)
    before = krylov.ritz().values
    while not krylov.full:
        krylov.step()
        after = krylov.ritz().values
        slack = 1e-12 * np.abs(after).max()
        assert (after[:-1] <= before + slack).all()
        assert (after[1:] >= before - slack).all()
        before = after
    spectrum = np.sort(s2(100))
    assert spectrum[0] - 1e-10 <= before[0]
    assert before[-1] <= spectrum[-1] + 1e-10


def test_as_many_steps_as_dimensions_give_the_whole_spectrum():
    values = s1(60)
    krylov = krylov_of(dense(values), 60)
    assert krylov.complete
    assert krylov.full
    assert krylov.exhausted
    assert krylov.ritz().values[::-1] == pytest.approx(values, abs=1e-12)
    assert (krylov.ritz().residuals == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_long_runs_stay_orthonormal_where_plain_lanczos_does_not(dtype):
    h = torch_operator(s1(500), dtype)
    krylov = Krylov(h, 150, seeded(0))
    plain = [krylov._rows[0].clone()]
    previous, beta = torch.zeros_like(plain[0]), 0.0
    for _ in range(150):
        krylov.step()
        w = h.apply(plain[-1]) - beta * previous
        w -= (w @ plain[-1]) * plain[-1]
        beta = float(w.norm())
        previous = plain[-1]
        plain.append(w / beta)

    def defect(rows):
        return float((rows @ rows.T - torch.eye(len(rows), dtype=dtype)).abs().max())

    assert defect(krylov.basis) < 50 * h.space.eps
    assert defect(torch.stack(plain)) > 0.5


def test_float32_at_a_million_entries_is_not_taken_for_exhausted():
    # A threshold of n eps ‖H‖ would stop here after four steps.
    n = 1_000_000
    values = np.concatenate([[100.0, 50.0, 20.0], np.linspace(-0.3, 0.3, n - 3)])
    h = operator(Diagonal(values, np.float32))
    krylov = Krylov(h, 12, seeded(0))
    while not krylov.full:
        krylov.step()
        assert not krylov.exhausted
    rows = krylov.basis.double()
    assert float((rows @ rows.T - torch.eye(12)).abs().max()) < 1e-5
    assert krylov.ritz().values[-3:] == pytest.approx([20, 50, 100], rel=3e-6)


# --- exhaustion -------------------------------------------------------------------------------


def test_a_multiple_of_the_identity_is_exhausted_at_every_step():
    krylov = krylov_of(2.5 * np.eye(30), 6, steps=0)
    while not krylov.full:
        krylov.step()
        assert krylov.exhausted
        assert krylov.beta == 0.0
    v, t = parts_of(krylov)
    assert np.abs(v.T @ v - np.eye(6)).max() < 1e-14
    assert np.abs(t - 2.5 * np.eye(6)).max() < 1e-14


def test_the_zero_matrix_is_exhausted_at_every_step():
    krylov = krylov_of(np.zeros((9, 9)), 4)
    assert krylov.exhausted
    assert np.array_equal(krylov.projection, np.zeros((4, 4)))


def test_rank_one_is_exhausted_after_two_steps_and_goes_on_in_its_null_space():
    matrix = rank_one(40)
    krylov = krylov_of(matrix, 6, steps=2)
    assert krylov.exhausted
    assert krylov.ritz().values == pytest.approx([0, 3], abs=1e-14)
    for _ in range(3):
        krylov.step()
    assert krylov.ritz().values == pytest.approx([0, 0, 0, 0, 3], abs=1e-14)
    v, _ = parts_of(krylov)
    assert np.abs(v.T @ v - np.eye(5)).max() < 1e-14


@pytest.mark.parametrize("distinct", [2, 3, 7])
def test_the_space_is_as_large_as_the_number_of_distinct_eigenvalues(distinct):
    levels = np.linspace(-2, 3, distinct)
    krylov = krylov_of(np.diag(np.repeat(levels, 10)), 10, steps=0)
    while not krylov.exhausted:
        krylov.step()
    assert krylov.size == distinct
    assert krylov.ritz().values == pytest.approx(levels, abs=1e-13)


def test_a_small_scale_is_not_taken_for_exhaustion():
    matrix = 1e-30 * dense(s1(60))
    krylov = krylov_of(matrix, 10)
    assert not krylov.exhausted
    assert krylov.ritz().values[-1] == pytest.approx(1e-28, rel=1e-3)


def test_one_dimension_is_complete_after_one_step():
    krylov = krylov_of(np.array([[4.0]]), 5, steps=1)
    assert krylov.capacity == 1
    assert krylov.complete
    assert krylov.ritz().values == pytest.approx([4.0])


# --- starts and complements -------------------------------------------------------------------


def test_the_start_vector_is_the_first_of_the_basis():
    start = torch.arange(1.0, 31.0, dtype=torch.float64)
    kept = start.clone()
    krylov = krylov_of(dense(np.arange(30.0)), 4, start=start)
    assert torch.allclose(krylov.basis[0], start / start.norm(), atol=1e-15, rtol=0)
    assert torch.equal(start, kept)


@pytest.mark.parametrize("start", [None, torch.ones(50, dtype=torch.float64)])
def test_a_complement_is_never_left(start):
    values = s2(50)
    matrix = dense(values)
    outside = torch.from_numpy(np.linalg.eigh(matrix)[1][:, -4:].T.copy())
    krylov = krylov_of(matrix, 20, start=start, complement_of=outside)
    v, t = parts_of(krylov)
    assert np.abs(outside.numpy() @ v).max() < 1e-13
    assert np.abs(v.T @ v - np.eye(20)).max() < 1e-13
    assert np.abs(v.T @ matrix @ v - t).max() < 1e-11
    assert krylov.ritz().values[-1] <= values[4] + 1e-10


def test_a_complement_of_anything_orthonormal_projects_the_operator():
    # Not only of eigenvectors: the space is then that of the projected operator P H P.
    matrix, outside = dense(s2(50)), orthogonal(50)[:3]
    inside = np.eye(50) - outside.T @ outside
    krylov = krylov_of(matrix, 47, complement_of=torch.from_numpy(outside))
    assert krylov.complete
    expected = np.linalg.eigvalsh(inside @ matrix @ inside)
    nearest = np.abs(expected[:, None] - krylov.ritz().values).min(axis=0)
    assert nearest.max() < 1e-10


def test_a_complement_is_exhausted_when_its_dimensions_are_used_up():
    krylov = krylov_of(np.eye(6), 10, steps=0, complement_of=torch.eye(6, dtype=torch.float64)[:4])
    assert krylov.capacity == 2
    krylov.step()
    krylov.step()
    assert krylov.complete
    assert krylov.exhausted


def test_the_same_seed_gives_the_same_basis_to_the_last_bit():
    first, second = (krylov_of(dense(s1(80)), 20) for _ in range(2))
    assert torch.equal(first.basis, second.basis)
    assert np.array_equal(first.projection, second.projection)


# --- a basis on disk --------------------------------------------------------------------------


def test_a_basis_on_disk_is_that_in_memory_to_the_last_bit():
    h, runs = operator(Diagonal(s1(70_001), np.float32)), []
    for place in ("device", "disk"):
        krylov = Krylov(h, 9, seeded(0), place=place)
        while not krylov.full:
            krylov.step()
        krylov.restart(krylov.ritz(), np.arange(4, 9))
        krylov.step()
        krylov.restart_fresh(krylov.ritz(), np.arange(2, 6))
        for _ in range(3):
            krylov.step()
        assert krylov.space.place_of(krylov.rows) == place
        runs.append(krylov)
    assert torch.equal(runs[0].basis, runs[1].basis)
    assert np.array_equal(runs[0].projection, runs[1].projection)


def test_a_longer_copy_goes_on_from_a_basis_on_disk():
    h = operator(Diagonal(s2(500)))
    whole, part = Krylov(h, 12, seeded(0)), Krylov(h, 5, seeded(0), place="disk")
    while not part.full:
        part.step()
    extended = part.extended(h, 12)
    for krylov in (whole, extended):
        while not krylov.full:
            krylov.step()
    assert torch.equal(whole.basis, extended.basis)
    assert extended.space.place_of(extended.rows) == "device"


class Watched(MatrixOperator):
    """Notes where its products are put."""

    def _products_into(self, rows, out):
        self.places = [*getattr(self, "places", []), out.data_ptr()]
        return super()._products_into(rows, out)


def test_a_product_is_put_where_the_next_vector_is_to_be():
    watched = Watched(torch.from_numpy(dense(s1(60))))
    krylov = Krylov(watched, 10, seeded(0))
    while not krylov.full:
        krylov.step()
    assert watched.places == [row.data_ptr() for row in krylov.rows[1:]]
    assert_is_krylov_relation(krylov, watched.matrix.numpy())


class Reads(TorchDispatchMode):
    """Counts how often a program waits for a number: `float`, `bool`, and copies to the host."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.count, read = 0, torch.Tensor.cpu

        def cpu(tensor, *args, **options):
            self.count += 1
            return read(tensor, *args, **options)

        monkeypatch.setattr(torch.Tensor, "cpu", cpu)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("beside", [0, 4])
@pytest.mark.parametrize("kind", ["matrix", "network"])
def test_a_step_waits_once_for_one_block_of_numbers(kind, beside, monkeypatch):
    h = torch_operator(s1(200)) if kind == "matrix" else tanh_network()[0]
    outside = torch.from_numpy(orthogonal(h.space.n)[:beside]) if beside else None
    krylov = Krylov(h, 20, seeded(0), complement_of=outside)
    # With the weights looked at beforehand, and the graphs of the network there.
    with h.undisturbed():
        for _ in range(4):
            krylov.step()
        with Reads(monkeypatch) as reads:
            krylov.step()
            count = reads.count
    assert count == 1


@pytest.mark.parametrize("place", ["device", "disk"])
def test_a_product_that_is_not_finite_ends_a_step_with_its_words(place):
    matrix = torch.from_numpy(dense(s1(60)))
    krylov = Krylov(MatrixOperator(matrix), 10, seeded(0), place=place)
    for _ in range(3):
        krylov.step()
    matrix[4, 7] = torch.nan
    with pytest.raises(NonFiniteError, match=r"matvec 4 returned .* non-finite of 60 entries"):
        krylov.step()
    assert krylov.size == 3
    matrix[4, 7] = matrix[7, 4]
    krylov.step()
    assert_is_krylov_relation(krylov, matrix.numpy())


def test_a_product_that_is_not_finite_once_is_refused_all_the_same():
    class Once(MatrixOperator):
        def _products_into(self, rows, out):
            return super()._products_into(rows, out).fill_(torch.inf)

    krylov = Krylov(Once(torch.eye(30, dtype=torch.float64)), 10, seeded(0))
    with pytest.raises(NonFiniteError, match="and is when it is computed again"):
        krylov.step()


@pytest.mark.parametrize("scale", [1e-120, 1e120])
def test_very_small_and_large_numbers_do_no_harm(scale):
    values = s1(60)
    krylov = krylov_of(dense(values) * scale, 30)
    exact = krylov_of(dense(values), 30)
    np.testing.assert_allclose(krylov.ritz().values / scale, exact.ritz().values, atol=1e-10)
