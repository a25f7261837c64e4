"""Independent references, and what other programs were seen to get wrong."""

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import spectra
from tests.cases.matrices import (
    Diagonal,
    Rotated,
    dense,
    operator,
    s1,
    s4,
    s5,
    semicircle,
    tanh_network,
)


def symmetric(n, seed):
    matrix = np.random.default_rng(seed).normal(size=(n, n))
    return (matrix + matrix.T) / 2


# --- NumPy and SciPy --------------------------------------------------------------------------


@settings(max_examples=30, derandomize=True, deadline=None)
@given(
    n=st.integers(1, 60),
    seed=st.integers(0, 10**6),
    which=st.sampled_from(["LA", "SA", "LM", "BE"]),
)
def test_eigenpairs_are_those_of_numpy(n, seed, which):
    matrix, k = symmetric(n, seed), max(1, n // 4)
    exact = np.linalg.eigvalsh(matrix)
    chosen = {
        "LA": exact[n - k :],
        "SA": exact[:k],
        "LM": exact[np.argsort(-np.abs(exact), kind="stable")[:k]],
        "BE": np.concatenate([exact[: k // 2], exact[n - (k - k // 2) :]]),
    }[which]
    pairs = spectra.eigsh(matrix, k, which=which, tol=1e-8, seed=seed, max_matvecs=4000)
    assert pairs.values == pytest.approx(np.sort(chosen)[::-1], abs=1e-7)
    assert pairs.vectors.T @ pairs.vectors == pytest.approx(np.eye(k), abs=1e-9)


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_eigenvalues_of_a_sparse_matrix_are_those_of_scipy(which):
    random = scipy.sparse.random_array((800, 800), density=0.01, rng=np.random.default_rng(0))
    matrix = (random + random.T).tocsr()
    start = np.random.default_rng(1).normal(size=800)
    theirs = scipy.sparse.linalg.eigsh(matrix, 6, which=which, v0=start)[0]
    ours = spectra.eigsh(matrix, 6, which=which, tol=1e-7).values
    assert ours == pytest.approx(np.sort(theirs)[::-1], abs=1e-9)


def test_spectra_operators_go_into_scipys_solvers():
    h, exact = tanh_network()
    start = np.ones(h.shape[0])
    theirs = scipy.sparse.linalg.eigsh(h, 3, which="LA", v0=start)[0]
    assert theirs == pytest.approx(np.linalg.eigvalsh(exact)[-3:], rel=1e-9)
    b = np.linspace(-1, 1, h.shape[0])
    shifted = h + 2 * scipy.sparse.linalg.aslinearoperator(np.eye(h.shape[0]))
    theirs, info = scipy.sparse.linalg.minres(shifted, b, rtol=1e-12)
    assert info == 0
    ours = spectra.solve(h, torch.from_numpy(b), damping=2.0, rtol=1e-10)
    assert ours.x.numpy() == pytest.approx(theirs, abs=1e-7)


@settings(max_examples=20, derandomize=True, deadline=None)
@given(n=st.integers(2, 40), seed=st.integers(0, 10**6))
def test_sums_norms_and_densities_are_those_of_numpy(n, seed):
    matrix = symmetric(n, seed)
    exact = np.linalg.eigvalsh(matrix)
    pairs = spectra.eigsh(matrix, n)
    assert spectra.trace(matrix, deflate=pairs).value == pytest.approx(exact.sum(), abs=1e-9)
    nuclear = spectra.norm(matrix, "nuc", deflate=pairs)
    assert nuclear.value == pytest.approx(np.linalg.norm(matrix, "nuc"))
    shift = 1 - exact[0]
    shifted = matrix + shift * np.eye(n)
    found = spectra.logdet(shifted, deflate=spectra.eigsh(shifted, n))
    assert found.value == pytest.approx(np.linalg.slogdet(shifted)[1], rel=1e-9, abs=1e-9)


# --- what peers get wrong ---------------------------------------------------------------------


def test_no_eigenvalue_is_returned_as_copies_that_are_none():
    # Lanczos without reorthogonalisation returned one eigenvalue six times after fifty steps.
    values = np.concatenate([[1000.0, 500.0], np.linspace(0, 1, 498)])
    pairs = spectra.eigsh(Rotated(values), 8, which="LA", ncv=200, tol=1e-6, max_matvecs=2000)
    assert pairs.values == pytest.approx(values[[0, 1, *range(499, 493, -1)]], abs=1e-4)


def test_batches_of_unequal_size_are_weighted_by_their_terms():
    # Averaging batches of 8 and 2 unweighted was seen to give a matrix error of 0.83.
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(10, 4, generator=generator), torch.randint(3, (10,), generator=generator)
    model = torch.nn.Linear(4, 3).double()
    loss = spectra.losses.supervised(torch.nn.CrossEntropyLoss())
    whole, split = (
        spectra.HessianOperator(
            model, loss, list(zip(x.double().split(sizes), y.split(sizes), strict=True))
        ).to_dense()
        for sizes in (10, [8, 2])
    )
    torch.testing.assert_close(split, whole, rtol=0, atol=1e-15)


def test_power_iteration_is_not_shifted():
    # Momentum moved the eigenvalue by the momentum, and said converged.
    found = spectra.norm(Rotated(s1(500)), 2)
    low, high = found.interval(0.99)
    assert low <= 100 <= high
    assert found.value == pytest.approx(100, rel=1e-3)


@pytest.mark.parametrize("c", [0.5, -3.0, 0.0, 1e-20])
def test_the_breakdown_of_lanczos_on_a_multiple_of_the_identity_is_no_nan(c):
    matrix = c * np.eye(30)
    density = spectra.spectral_density(matrix, steps=10, probes=2)
    assert density.support == pytest.approx((c, c))
    assert density.weights.sum(axis=1) == pytest.approx(np.ones(2))
    assert spectra.eigsh(matrix, 4).values == pytest.approx(np.full(4, c))
    assert spectra.trace(matrix).value == pytest.approx(30 * c)


@pytest.mark.parametrize("seed", range(10))
def test_the_trace_of_a_saddle_does_not_stop_before_it_is_known(seed):
    # A rule on the change of a running mean stopped after two probes, anywhere.
    values = s4(500)
    found = spectra.trace(Rotated(values), rtol=0.1, method="hutchinson", seed=seed)
    low, high = found.interval()
    assert (high - low) / 2 <= 0.1 * np.linalg.norm(values) or not found.converged
    assert low - 0.1 * np.linalg.norm(values) <= 0 <= high + 0.1 * np.linalg.norm(values)


def test_the_weights_of_the_quadrature_reproduce_the_moments_of_its_probe():
    values = s1(300)
    density = spectra.spectral_density(Diagonal(values), steps=12, probes=400)
    for power in (1, 2, 3):
        samples = density.moment_samples(power)
        error = samples.std(ddof=1) / 20
        assert abs(samples.mean() - (values**power).sum()) < 4 * error


@pytest.mark.parametrize("seed", range(20))
def test_an_eigenvalue_near_zero_is_not_skipped(seed):
    # Convergence relative to each value skipped it in 100 of 100 runs of ARPACK's.
    values = np.array([9.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0, -3.0, -10.0])
    pairs = spectra.eigsh(dense(values, seed), 4, which="SA", seed=seed)
    assert pairs.values == pytest.approx([1, 0, -3, -10], abs=1e-6)


@pytest.mark.parametrize("which", ["SA", "BE"])
def test_the_smallest_of_a_singular_matrix_is_zero(which):
    # SciPy's eigsh returned the smallest eigenvalue that is not zero, as converged.
    generator = np.random.default_rng(0)
    factor = generator.normal(size=(100, 30))
    pairs = spectra.eigsh(factor @ factor.T, 4, which=which)
    lowest = pairs.values[-2:] if which == "BE" else pairs.values
    assert lowest == pytest.approx(np.zeros(len(lowest)), abs=1e-3 * pairs.values[0] + 1e-3)


@pytest.mark.parametrize("seed", range(10))
def test_members_of_a_cluster_are_not_left_out(seed):
    # ARPACK was right about this spectrum in one of five runs.
    pairs = spectra.eigsh(Rotated(s5(600)), 10, which="LA", seed=seed)
    assert pairs.values == pytest.approx(s5(600)[:10], rel=1e-3)


def test_pairs_at_the_edge_of_a_continuum_are_not_skipped():
    # Davidson's method returned values up to one percent off, every residual in order.
    values = semicircle(800)
    pairs = spectra.eigsh(Rotated(values), 8, which="LA", max_matvecs=2000)
    assert pairs.values == pytest.approx(values[:8], rel=1e-4)


def test_a_linear_solve_is_as_exact_as_it_says():
    # SciPy's minres compares with ‖A‖‖x‖, and called a relative residual of 0.35 a success.
    values, b = s1(400), np.random.default_rng(0).normal(size=400)
    found = spectra.solve(operator(Diagonal(values)), b, rtol=1e-3, max_matvecs=2000)
    assert np.linalg.norm(values * found.x - b) == pytest.approx(found.residual)
    assert found.converged == (found.relative_residual <= 1e-3)
