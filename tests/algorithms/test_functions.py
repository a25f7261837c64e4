"""Spectral sums: right, within their bounds, and refused where they mean nothing."""

import numpy as np
import pytest
import torch

import spectra
from spectra.algorithms.summation import spectral_interval
from spectra.errors import ArgumentError, ArgumentTypeError
from tests.cases.matrices import (
    Noisy,
    Rotated,
    dense,
    laplacian,
    laplacian_spectrum,
    operator,
    rank_one,
    s1,
    s1z,
    s4,
    semicircle,
)


def entropy_rank(values):
    p = np.abs(values) / np.abs(values).sum()
    return np.exp(-(p[p > 0] * np.log(p[p > 0])).sum())


QUANTITIES = {
    "log-determinant": (
        lambda density: spectra.logdet(density, 0.6),
        lambda v: np.log(v + 0.6).sum(),
    ),
    "exp": (
        lambda density: spectra.spectral_sum(
            density, lambda x: np.exp(-x), derivative_signs=(1, -1)
        ),
        lambda v: np.exp(-v).sum(),
    ),
    "absolute": (lambda density: spectra.spectral_sum(density, np.abs), lambda v: np.abs(v).sum()),
    "effective dimension": (
        lambda density: spectra.effective_dimension(density, 0.1, part="abs"),
        lambda v: (np.abs(v) / (np.abs(v) + 0.1)).sum(),
    ),
    "positive part": (
        lambda density: spectra.effective_dimension(density, 0.1, part="positive"),
        lambda v: (v[v > 0] / (v[v > 0] + 0.1)).sum(),
    ),
    "participation ratio": (
        spectra.participation_ratio,
        lambda v: v.sum() ** 2 / (v**2).sum(),
    ),
    "effective rank": (spectra.effective_rank, entropy_rank),
    "stable rank": (
        lambda density: spectra.effective_rank(density, kind="stable"),
        lambda v: (v**2).sum() / (v**2).max(),
    ),
}


@pytest.mark.parametrize("name", QUANTITIES)
@pytest.mark.parametrize("make", [s1, s1z], ids=lambda make: make.__name__)
def test_the_bounds_cover(make, name):
    compute, exact = QUANTITIES[name]
    values = make(400)
    h = operator(Rotated(values))
    pairs = spectra.eigsh(h, 10)
    truth, covered = exact(values), 0
    for seed in range(25):
        density = spectra.spectral_density(h, steps=20, probes=4, deflate=pairs, seed=seed)
        estimate = compute(density)
        low, high = estimate.interval()
        assert low <= estimate.value <= high
        assert abs(estimate.value / truth - 1) < 0.25
        covered += low <= truth <= high
    assert covered >= 23


def test_a_log_determinant_is_that_of_the_laplacian():
    # det = n + 1, while the eigenvalues reach down to 1e-3.
    covered = 0
    for seed in range(20):
        low, high = spectra.logdet(laplacian(100), steps=40, probes=5, seed=seed).interval()
        covered += low <= np.log(101) <= high
    assert covered >= 18
    exact = spectra.logdet(laplacian(40), steps=40)
    assert exact.exact
    assert exact.matvecs == 40
    assert exact.value == pytest.approx(np.log(41))


def test_the_bounds_of_the_quadrature_close_as_steps_are_added():
    values = laplacian_spectrum(300)
    widths = []
    for steps in (4, 8, 16):
        density = spectra.spectral_density(laplacian(300), steps=steps, probes=1)
        # With one probe there is no error of the mean, so compare two copies of it.
        twice = spectra.SpectralDensity(
            np.repeat(density.nodes, 2, 0),
            np.repeat(density.weights, 2, 0),
            300,
            alphas=np.repeat(density.alphas, 2, 0),
            betas=np.repeat(density.betas, 2, 0),
        )
        low, high = spectra.logdet(twice, 0.5).interval()
        widths.append(high - low)
    assert (np.diff(np.log(widths)) < -1).all()
    assert widths[-1] < 1e-4 * abs(np.log(values + 0.5).sum())


@pytest.mark.parametrize("power", [0, 1, 2, 3])
def test_sums_of_polynomials_are_those_of_the_moments(power):
    density = spectra.spectral_density(dense(np.linspace(-1, 2, 60)), steps=4, probes=3)
    estimate = spectra.spectral_sum(density, lambda x: x**power)
    assert estimate.samples == pytest.approx(density.moment_samples(power))
    assert estimate.matvecs == 0


def test_atoms_count_in_full():
    values = s1(200)
    pairs = spectra.eigsh(Rotated(values), 200)
    estimate = spectra.spectral_sum(Rotated(values), lambda x: x**3, deflate=pairs)
    assert estimate.exact
    assert estimate.value == pytest.approx((values**3).sum())
    assert estimate.matvecs == 0


def test_a_function_of_an_operator_costs_what_its_density_costs():
    h = operator(Rotated(s1(200)))
    estimate = spectra.spectral_sum(h, np.abs, steps=7, probes=3)
    assert estimate.matvecs == h.matvecs == 21
    assert spectra.participation_ratio(h).matvecs == 20


def test_one_step_tells_nothing_of_the_quadratures_error():
    density = spectra.spectral_density(Rotated(s1(200)), steps=1)
    for estimate in (
        spectra.spectral_sum(density, np.abs),
        spectra.effective_rank(density),
        spectra.logdet(density, 400.0, domain=(-1, np.inf)),
    ):
        low, high = estimate.interval()
        assert np.isfinite(estimate.value)
        if "rank" in estimate.quantity:
            assert (low, high) == (1, 200)
        else:
            # Gauss and Gauss-Radau bounds of one step are wide, but bounds.
            assert np.isfinite(high - low) == ("log" in estimate.quantity)


def test_one_probe_has_a_value_and_no_bounds():
    estimate = spectra.spectral_sum(Rotated(s1(200)), np.abs, steps=7, probes=1)
    assert estimate.interval() == (-np.inf, np.inf)
    assert np.isfinite(estimate.value)
    # Only what holds for any matrix.
    rank = spectra.effective_rank(Rotated(s1(200)), steps=7, probes=1)
    assert rank.interval() == (1, 200)


@pytest.mark.parametrize("factor", [1e-8, 1e6])
def test_ranks_do_not_depend_on_the_scale(factor):
    values = s4(100)
    for kind in ("entropy", "stable"):
        plain = spectra.effective_rank(dense(values), kind=kind, steps=15)
        scaled = spectra.effective_rank(factor * dense(values), kind=kind, steps=15)
        assert scaled.value == pytest.approx(plain.value)
        assert scaled.interval() == pytest.approx(plain.interval())
    plain = spectra.participation_ratio(dense(s1(100)))
    assert spectra.participation_ratio(factor * dense(s1(100))).value == pytest.approx(plain.value)


def test_ranks_of_simple_matrices_are_what_they_should_be():
    assert spectra.effective_rank(np.eye(100), steps=5).value == pytest.approx(100)
    assert spectra.participation_ratio(-2 * np.eye(100)).value == pytest.approx(100)
    one = rank_one(100, -3.0)
    pairs = spectra.eigsh(one, 1)
    assert spectra.effective_rank(one, deflate=pairs).value == pytest.approx(1)
    assert spectra.effective_rank(one, kind="stable", deflate=pairs).value == pytest.approx(1)
    zero = np.zeros((50, 50))
    for kind in ("entropy", "stable"):
        assert spectra.effective_rank(zero, kind=kind).value == 0
    assert spectra.participation_ratio(zero).value == 0


@pytest.mark.parametrize("n", [1, 2])
def test_the_smallest_matrices_are_exact(n):
    values = np.array([3.0, 0.5])[:n]
    matrix = dense(values)
    assert spectra.logdet(matrix).value == pytest.approx(np.log(values).sum())
    assert spectra.logdet(matrix).exact
    assert spectra.effective_rank(matrix).value == pytest.approx(entropy_rank(values))
    assert spectra.participation_ratio(matrix).value == pytest.approx(
        values.sum() ** 2 / (values**2).sum()
    )


def test_all_eigenvalues_lie_in_the_interval():
    for make in (s1, semicircle):
        values, inside = make(300), 0
        h = operator(Rotated(values))
        for seed in range(50):
            density = spectra.spectral_density(h, steps=12, probes=2, seed=seed)
            low, high = spectral_interval(density, 0.9)
            inside += low <= values.min() <= values.max() <= high
        assert inside >= 45


def test_noise_is_said():
    density = spectra.spectral_density(Noisy(s1(200), 1e-2), steps=10)
    for estimate in (
        spectra.spectral_sum(density, np.abs),
        spectra.logdet(density, 5.0),
        density.counts(0.1).above,
    ):
        assert any("differ from those of one symmetric matrix" in note for note in estimate.notes)
        low, high = estimate.interval()
        assert low <= estimate.value <= high


def test_a_positive_semidefinite_operator_may_be_said_to_be_one():
    matrix = dense(np.concatenate([np.zeros(30), np.linspace(0, 2, 70)]))
    bounds = [
        spectra.logdet(matrix, 1e-3, steps=8, domain=domain)
        for domain in ((-np.inf, np.inf), (0, np.inf))
    ]
    assert any("end is an estimate" in note for note in bounds[0].notes)
    assert bounds[1].notes == ()
    truth = 30 * np.log(1e-3) + np.log(np.linspace(0, 2, 70) + 1e-3).sum()
    low, high = bounds[1].interval()
    assert low <= truth <= high


# --- refusals ---------------------------------------------------------------------------------


def test_a_shift_that_is_too_small_is_refused_with_one_that_works():
    h = operator(Rotated(s1(300)))
    with pytest.raises(ArgumentError, match="not positive definite") as caught:
        spectra.logdet(h, 0.1, steps=30)
    shift = float(str(caught.value).split("a shift above ")[1].split()[0])
    assert 0.2 < shift < 0.5
    estimate = spectra.logdet(h, shift + 1e-3, steps=30)
    assert np.isfinite(estimate.interval()).all()
    with pytest.raises(ArgumentError, match="not positive definite"):
        spectra.logdet(np.zeros((5, 5)))


def test_negative_eigenvalues_have_no_effective_dimension_unless_told_how():
    density = spectra.spectral_density(Rotated(s1(300)), steps=20)
    with pytest.raises(ArgumentError, match="choose part='positive' or part='abs'"):
        spectra.effective_dimension(density, 1.0)
    # Zero up to rounding is not negative.
    assert spectra.effective_dimension(rank_one(50), 1.0, steps=5).value > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: spectra.spectral_sum(d, np.log), "f is not finite at -"),
        (lambda d: spectra.spectral_sum(d, lambda x: x.sum()), r"of shape \(\) for"),
        (lambda d: spectra.spectral_sum(d, lambda x: x + 1j), "complex128"),
        (lambda d: spectra.spectral_sum(d, lambda x: None), "object"),
        (lambda d: spectra.spectral_sum(d, np.abs, domain=(0, 1)), "eigenvalues were found from"),
        (lambda d: spectra.spectral_sum(d, np.abs, derivative_signs=(0, 1)), "expected two of"),
        (lambda d: spectra.spectral_sum(d, np.abs, confidence=95), "expected a probability"),
        (lambda d: spectra.spectral_sum(d, np.abs, steps=3), "steps given with a finished density"),
        (lambda d: spectra.effective_dimension(d, 0), "c=0; expected a positive number"),
        (lambda d: spectra.effective_dimension(d, -1.0), "c=-1.0; expected a positive number"),
        (lambda d: spectra.effective_dimension(d, 1, part="x"), "part='x'; expected 'error'"),
        (lambda d: spectra.effective_rank(d, kind="x"), "kind='x'; expected 'entropy'"),
        (lambda d: spectra.participation_ratio(np.diag([1.0, 2, 3]), steps=1), "take two steps"),
        (
            lambda d: spectra.spectral_sum(
                spectra.SpectralDensity(np.array([[0.0, 1.0]]), np.array([[0.5, 0.5]]), 10), np.abs
            ),
            "holds no tridiagonal coefficients",
        ),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    density = spectra.spectral_density(dense(np.linspace(-1, 2, 30)), steps=5, probes=2)
    with pytest.raises(ArgumentError, match=message):
        call(density)


# --- what a first user found ------------------------------------------------------------------


def test_a_step_between_the_nodes_is_not_taken_for_a_constant():
    values = np.concatenate([np.linspace(100, 1, 10), np.linspace(-0.05, 0.29, 290)])
    truth = (values > 0.05).sum()
    for seed in range(20):
        found = spectra.spectral_sum(
            Rotated(values), lambda x: (x > 0.05) * 1.0, steps=10, probes=3, seed=seed
        )
        low, high = found.interval()
        assert low < truth < high


@pytest.mark.parametrize(
    ("f", "message"),
    [
        ("exp", "f is a str; expected a function"),
        (torch.exp, "f failed on a NumPy array"),
        (lambda x, y: x, "f failed on a NumPy array"),
    ],
)
def test_what_is_no_function_of_an_array_is_refused(f, message):
    density = spectra.spectral_density(dense(s1(50)), steps=5, probes=2)
    with pytest.raises(ArgumentTypeError, match=message):
        spectra.spectral_sum(density, f)


def test_options_that_mean_nothing_are_refused():
    density = spectra.spectral_density(dense(s1(50)), steps=5, probes=2)
    with pytest.raises(ArgumentError, match="expected two of"):
        spectra.spectral_sum(density, np.exp, derivative_signs=1)
    with pytest.raises(ArgumentError, match="low < high"):
        spectra.spectral_sum(density, np.exp, domain=(1, 0))
    with pytest.raises(ArgumentError, match="shift=nan; expected a finite"):
        spectra.logdet(density, np.nan)


@pytest.mark.parametrize("seed", range(10))
def test_ranks_stay_within_what_is_possible(seed):
    values = np.concatenate([[30, -29, 10, -10], np.random.default_rng(4).normal(0, 0.2, 196)])
    density = spectra.spectral_density(Rotated(values), steps=8, probes=2, seed=seed)
    for kind in ("entropy", "stable"):
        rank = spectra.effective_rank(density, kind=kind)
        low, high = rank.interval()
        assert 1 <= low <= rank.value <= high <= 200
    low, high = spectra.participation_ratio(density).interval()
    assert 0 <= low <= high <= 200
