"""The trace: unbiased, with intervals that cover, and a stop at the requested tolerance."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import spectra
from spectra.algorithms import probes
from spectra.errors import ArgumentError, ArgumentTypeError, NonFiniteError
from spectra.objective import vectors
from spectra.objective.vectors import VectorSpace
from tests.cases.matrices import (
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
)
from tests.cases.networks import tanh_mlp, wine


def half_width(estimate):
    low, high = estimate.interval()
    return (high - low) / 2


# --- exact where that is cheaper --------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 7, 32])
def test_small_matrices_are_exact(n):
    values = np.linspace(-2, 3, n)
    h = operator(dense(values))
    estimate = spectra.trace(h)
    assert estimate.exact
    assert estimate.converged
    assert estimate.value == pytest.approx(values.sum(), abs=1e-12)
    assert h.matvecs == estimate.matvecs == n
    assert "exact, n unit vectors" in str(estimate)


def test_a_tolerance_that_n_products_meet_sooner_is_met_exactly():
    values = s1(100)
    h = operator(dense(values))
    estimate = spectra.trace(h, rtol=1e-4)
    assert estimate.exact
    assert estimate.value == pytest.approx(values.sum(), rel=1e-12)
    assert h.matvecs == estimate.matvecs <= 100 + 5


def test_deflating_every_eigenvalue_costs_nothing_more():
    values = s3(40)
    h = operator(dense(values))
    pairs = spectra.eigsh(h, 40)
    before = h.matvecs
    estimate = spectra.trace(h, deflate=pairs)
    assert estimate.exact
    assert h.matvecs == before
    assert estimate.value == pytest.approx(values.sum())
    assert "sum of all known eigenvalues" in str(estimate)


def test_the_zero_matrix_has_trace_zero_after_few_products():
    h = operator(np.zeros((100, 100)))
    estimate = spectra.trace(h)
    assert estimate.value == 0.0
    assert estimate.interval() == (0.0, 0.0)
    assert estimate.converged
    assert h.matvecs == 5


def test_a_multiple_of_the_identity_is_certain_after_few_products():
    # zᵀ c z = c n for every z on the sphere.
    estimate = spectra.trace(2.5 * np.eye(200), rtol=1e-12)
    assert estimate.value == pytest.approx(500, rel=1e-14)
    assert estimate.matvecs == 5


# --- the statistics ---------------------------------------------------------------------------


@pytest.mark.parametrize("deflate", [False, True])
def test_the_mean_over_many_runs_is_the_trace(deflate):
    values = s1(200)
    h = operator(Rotated(values))
    pairs = spectra.eigsh(h, 10) if deflate else None
    runs = np.array(
        [
            spectra.trace(h, rtol=1e-9, deflate=pairs, max_matvecs=5, seed=seed).value
            for seed in range(600)
        ]
    )
    error = runs.std(ddof=1) / len(runs) ** 0.5
    assert abs(runs.mean() - values.sum()) < 3 * error
    m, rest = (190, values[10:]) if deflate else (200, values)
    expected = 2 * m / (m + 2) * ((rest**2).sum() - rest.sum() ** 2 / m) / 5
    assert runs.var() == pytest.approx(expected, rel=0.25)


@pytest.mark.parametrize("method", ["auto", "hutchinson", "hutch++"])
def test_the_errors_are_as_large_as_they_say(method):
    # On a symmetric spectrum the samples have no skew: z-scores are nearly Student's.
    h = operator(Rotated(s4(400)))
    scores = []
    for seed in range(300):
        estimate = spectra.trace(h, rtol=1e-9, method=method, max_matvecs=30, seed=seed)
        scores.append(estimate.value / estimate.standard_error)
    assert abs(np.mean(scores)) < 3 / 300**0.5
    # 300 scores tell their spread to within 4 %.
    assert 0.88 < np.std(scores) < 1.16


@pytest.mark.parametrize("make", [s1, s2, s4], ids=lambda make: make.__name__)
def test_intervals_of_95_percent_cover_beside_eigenpairs(make):
    # Without eigenpairs, every method and spectrum: test_trace_coverage.
    values = make(1000)
    h = operator(Rotated(values))
    pairs = spectra.eigsh(h, 10)
    covered = 0
    for seed in range(300):
        low, high = spectra.trace(h, rtol=1e-9, deflate=pairs, max_matvecs=10, seed=seed).interval()
        covered += low <= values.sum() <= high
    assert covered >= 0.93 * 300


def test_stopping_at_the_tolerance_spoils_the_interval_only_little():
    values = s1(1000)
    h = operator(Rotated(values))
    pairs = spectra.eigsh(h, 10)
    covered = within = 0
    for seed in range(300):
        estimate = spectra.trace(h, rtol=0.01, deflate=pairs, seed=seed)
        low, high = estimate.interval()
        covered += low <= values.sum() <= high
        within += abs(estimate.value / values.sum() - 1) <= 0.01
    assert covered >= 0.93 * 300
    assert within >= 0.93 * 300


def test_a_matrix_with_few_off_diagonal_entries_does_not_look_certain():
    # Random signs would give ±6 here, and the same sign five times in every sixteenth run: an
    # error of zero. Probes on the sphere never repeat a value.
    matrix = np.zeros((60, 60))
    matrix[0, 1] = matrix[1, 0] = 3.0
    covered = 0
    for seed in range(100):
        estimate = spectra.trace(matrix, max_matvecs=6, seed=seed)
        assert estimate.standard_error > 0
        assert len(np.unique(estimate.samples)) == 6
        low, high = estimate.interval()
        covered += low <= 0 <= high
    assert covered >= 90


def test_a_diagonal_matrix_has_an_error_as_any_other():
    # Random signs would be exact here, and here alone: the error would say nothing of a rotation.
    values = s1(500)
    spreads = [
        np.std([spectra.trace(h, rtol=1e-9, max_matvecs=20, seed=s).value for s in range(40)])
        for h in (np.diag(values), Rotated(values))
    ]
    assert spreads[0] == pytest.approx(spreads[1], rel=0.5)


# --- the stop ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["auto", "hutchinson", "hutch++", "xtrace"])
@pytest.mark.parametrize("rtol", [0.5, 0.2, 0.1])
@pytest.mark.parametrize("make", [s1, s2, s3], ids=lambda make: make.__name__)
def test_what_converged_is_within_its_tolerance(make, rtol, method):
    h = operator(Rotated(make(800)))
    for seed in range(5):
        estimate = spectra.trace(h, rtol=rtol, method=method, seed=seed)
        scale = max(abs(estimate.value), (make(800) ** 2).sum() ** 0.5)
        assert estimate.converged
        assert half_width(estimate) <= 1.2 * rtol * scale
        assert 5 <= len(estimate.samples) <= estimate.matvecs
        assert (len(estimate.samples) == estimate.matvecs) == (estimate.method == "Hutchinson")


def test_an_absolute_tolerance_stands_for_itself():
    estimate = spectra.trace(Rotated(s3(800)), rtol=0.0, atol=30.0)
    assert estimate.converged
    assert half_width(estimate) <= 30
    looser = spectra.trace(Rotated(s3(800)), rtol=0.0, atol=200.0)
    assert looser.matvecs <= estimate.matvecs


def test_the_confidence_is_that_of_the_tolerance():
    h = operator(Rotated(s1(800)))
    sure = spectra.trace(h, rtol=0.2, confidence=0.99)
    unsure = spectra.trace(h, rtol=0.2, confidence=0.5)
    assert sure.matvecs > unsure.matvecs
    assert sure.confidence == 0.99
    assert "99% interval" in str(sure)


def test_a_budget_that_ends_first_is_said_with_what_it_would_take():
    h = operator(Rotated(s1(2000)))
    estimate = spectra.trace(h, rtol=0.05, max_matvecs=20)
    assert h.matvecs == estimate.matvecs == 20
    assert not estimate.converged
    assert half_width(estimate) > 0.05 * 417
    note = next(note for note in estimate.notes if "was asked for" in note)
    assert "after 20 probes" in note
    needed = int(note.split("takes about ")[1].split(" probes")[0].replace(",", ""))
    # 276 were measured for 5 %; twenty probes know the spread to within a factor of two or so.
    assert 70 < needed < 1200
    # The trace is above the norm here, and so the scale of the tolerance.
    assert needed == pytest.approx(
        20 * (half_width(estimate) / (0.05 * estimate.value)) ** 2, abs=1
    )
    assert "deflate=spectra.eigsh" in note
    assert "tolerance not reached" in str(estimate)


def test_a_trace_that_cancels_ends_and_says_that_it_is_not_told_from_zero():
    h = operator(Rotated(s4(1000)))
    estimate = spectra.trace(h, rtol=0.2)
    assert estimate.converged
    assert estimate.matvecs < 300
    low, high = estimate.interval()
    assert low < 0 < high
    norm = (s4(1000) ** 2).sum() ** 0.5
    note = next(note for note in estimate.notes if "not distinguishable from 0" in note)
    assert float(note.split("‖H‖_F = ")[1]) == pytest.approx(norm, rel=0.3)


def test_a_trace_below_the_norm_says_what_the_tolerance_was_relative_to():
    values = np.concatenate([np.full(30, 10.0), np.full(28, -10.0), np.full(40, 0.5)])
    estimate = spectra.trace(Rotated(values), rtol=0.1, max_matvecs=2000)
    if not estimate.exact and half_width(estimate) < abs(estimate.value):
        assert any("rtol was taken relative to that" in note for note in estimate.notes)
    # Deflated to the part that is known well, the same trace is told from zero.
    pairs = spectra.eigsh(Rotated(values), 58)
    sharp = spectra.trace(Rotated(values), deflate=pairs, rtol=0.01)
    assert sharp.value == pytest.approx(40, rel=1e-6)
    assert any("positive and negative eigenvalues cancel" in note for note in sharp.notes)


# --- the methods ------------------------------------------------------------------------------

METHODS = ["auto", "hutchinson", "hutch++", "xtrace"]


@pytest.mark.parametrize(
    ("make", "method", "rtol", "most"),
    [
        (s1, "auto", 0.01, 26),
        (s1z, "auto", 0.01, 26),
        (s2, "auto", 0.05, 26),
        (s2, "auto", 0.01, 96),
        (s3, "auto", 0.05, 8),
        (s5, "auto", 0.01, 60),
        (s1, "hutch++", 0.01, 51),
        (s1, "xtrace", 0.01, 48),
        (s2, "xtrace", 0.01, 140),
    ],
)
def test_a_tolerance_costs_as_many_products_as_documented(make, method, rtol, most):
    h, truth = operator(Rotated(make(2000))), make(2000).sum()
    for seed in range(5):
        before = h.matvecs
        estimate = spectra.trace(h, rtol=rtol, method=method, seed=seed)
        assert estimate.converged
        assert estimate.matvecs == h.matvecs - before <= most
        assert abs(estimate.value / truth - 1) <= 1.5 * rtol


def test_one_percent_on_outliers_costs_at_most_forty_products_in_all():
    h = operator(Rotated(s1(2000)))
    good = 0
    for seed in range(100):
        before = h.matvecs
        estimate = spectra.trace(h, rtol=0.01, seed=seed)
        good += abs(estimate.value / s1(2000).sum() - 1) <= 0.01
        assert h.matvecs - before <= 40
    assert good >= 95


@pytest.mark.parametrize(
    "method", [m if m != "hutch++" else pytest.param(m, marks=pytest.mark.slow) for m in METHODS]
)
def test_every_method_is_unbiased(method):
    values = s2(150)
    h = operator(Rotated(values))
    runs = [
        spectra.trace(h, rtol=1e-9, method=method, max_matvecs=26, seed=seed).value
        for seed in range(400)
    ]
    assert abs(np.mean(runs) - values.sum()) < 3 * np.std(runs) / 20


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [2, 3, 4, 5, 7, 12, 31])
def test_no_budget_is_exceeded_and_every_error_is_finite(method, budget):
    if method == "xtrace" and budget < 4:
        pytest.skip("refused")
    h = operator(Rotated(s1(300)))
    estimate = spectra.trace(h, rtol=1e-9, method=method, max_matvecs=budget)
    assert budget - 1 <= h.matvecs == estimate.matvecs <= budget
    assert np.isfinite(estimate.interval()).all()
    assert not estimate.converged


@pytest.mark.parametrize("method", METHODS)
def test_a_multiple_of_the_identity_is_certain_whatever_the_method(method):
    estimate = spectra.trace(-2.5 * np.eye(200), method=method, rtol=1e-10)
    assert estimate.value == pytest.approx(-500, rel=1e-12)
    assert estimate.matvecs <= 32


@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
@pytest.mark.parametrize("rank", [0, 1, 4])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_range_that_fits_in_the_sketch_makes_the_trace_exact(method, rank, dtype):
    # Rounding of a rotated matrix to single precision would give it full rank.
    q = (orthogonal(80) if dtype == np.float64 else np.eye(80))[:, :rank]
    values = np.array([7.0, -5.0, 3.0, 2.0])[:rank]
    h = operator(((q * values) @ q.T).astype(dtype))
    estimate = spectra.trace(h, method=method, rtol=1e-6)
    assert estimate.exact
    assert estimate.converged
    assert estimate.value == pytest.approx(values.sum(), abs=100 * h.space.eps)
    assert h.matvecs == estimate.matvecs == 2 * rank + 1
    assert f"whole range of rank {rank}" in str(estimate)


@pytest.mark.parametrize("rank", [1, 4])
def test_a_krylov_space_that_is_exhausted_goes_on(rank):
    values = np.concatenate([np.full(rank, 3.0), np.zeros(80 - rank)])
    estimate = spectra.trace(dense(values), rtol=1e-6)
    # Copies of one eigenvalue are in no Krylov space together: each takes a fresh direction.
    assert estimate.value == pytest.approx(3 * rank, rel=1e-9)
    assert estimate.matvecs <= 5 + 3 * rank + 8


def test_a_basis_of_the_whole_space_is_exact():
    values = s4(60)
    estimate = spectra.trace(Rotated(values), rtol=1e-8)
    assert estimate.exact
    assert estimate.value == pytest.approx(0, abs=1e-10)
    assert estimate.matvecs == 65
    assert "exact, Lanczos basis of the whole space" in str(estimate)


@pytest.mark.parametrize("method", METHODS)
def test_little_memory_costs_products_only(method, monkeypatch):
    # Neither in memory nor on disk is there room for more.
    monkeypatch.setattr(VectorSpace, "affordable", lambda self, place="device": 48)
    values = s1(400)
    estimate = spectra.trace(Rotated(values), method=method, rtol=1e-9, max_matvecs=120)
    low, high = estimate.interval(0.999)
    assert low <= values.sum() <= high
    assert estimate.matvecs == (48 if method == "xtrace" else 120)


def test_what_no_basis_can_hold_costs_a_quarter_of_the_budget_at_most():
    estimate = spectra.trace(Rotated(semicircle(1000)), rtol=1e-3, max_matvecs=200)
    assert len(estimate.samples) >= 145


@pytest.mark.parametrize("method", METHODS)
def test_the_noise_of_the_products_is_measured(method):
    clean = spectra.trace(Rotated(s1(500)), method=method, max_matvecs=40)
    assert clean.noise < 1e-10
    assert not any("products differ" in note for note in clean.notes)
    noises = []
    for seed in range(5):
        h = operator(Noisy(s1(500), 1e-2, seed=seed))
        estimate = spectra.trace(h, method=method, max_matvecs=40, seed=seed)
        noises.append(estimate.noise)
        assert any("products differ from those" in note for note in estimate.notes)
        norm = (s1(500) ** 2).sum() ** 0.5
        assert estimate.floor == pytest.approx(estimate.noise * norm, rel=0.7)
    assert 0.005 < np.median(noises) < 0.02


# --- deflation --------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 4])
def test_a_matrix_of_the_deflated_rank_is_exact(rank):
    q = orthogonal(80)[:, :rank]
    values = np.array([7.0, -5.0, 3.0, 2.0])[:rank]
    matrix = (q * values) @ q.T
    estimate = spectra.trace(matrix, deflate=spectra.eigsh(matrix, rank, tol=1e-12), rtol=1e-6)
    assert estimate.value == pytest.approx(values.sum(), rel=1e-12)
    assert estimate.standard_error < 1e-12
    assert estimate.matvecs == 5


def test_deflation_is_unbiased_even_by_vectors_that_are_no_eigenvectors():
    # Rayleigh quotients of any orthonormal vectors will do: their part of the trace is exact.
    values = s2(150)
    matrix = dense(values)
    q = orthogonal(150, 9)[:, :6]
    quotients = np.einsum("ni,nm,mi->i", q, matrix, q)
    residuals = np.linalg.norm(matrix @ q - q * quotients, axis=0)
    given = SimpleNamespace(values=quotients, vectors=q, residuals=residuals)
    runs = np.array(
        [
            spectra.trace(matrix, deflate=given, rtol=1e-9, max_matvecs=6, seed=seed).value
            for seed in range(400)
        ]
    )
    assert abs(runs.mean() - values.sum()) < 3 * runs.std() / 20


@pytest.mark.parametrize(
    "question",
    [
        lambda h, pairs: spectra.trace(h, deflate=pairs),
        lambda h, pairs: spectra.norm(h, "fro", deflate=pairs),
        lambda h, pairs: spectra.norm(h, "nuc", deflate=pairs),
        lambda h, pairs: spectra.spectral_density(h, deflate=pairs, steps=10),
    ],
    ids=["trace", "frobenius", "nuclear", "density"],
)
def test_eigenpairs_of_another_operator_are_refused_by_the_first_product(question):
    # Those of an earlier checkpoint, say.
    pairs = spectra.eigsh(dense(s1(300), seed=0), 5)
    h = operator(dense(s3(300), seed=1))
    with pytest.raises(ArgumentError, match="not those of this operator"):
        question(h, pairs)
    assert h.matvecs <= 20
    # A fifth away is another operator, too.
    near = dense(s1(300), seed=0) + 0.2 * dense(s1(300), seed=2)
    with pytest.raises(ArgumentError, match="not those of this operator"):
        question(near, pairs)


@pytest.mark.parametrize("make", [s1, s2, s3], ids=lambda make: make.__name__)
def test_deflation_shrinks_the_spread_as_the_formula_says(make):
    def variance(values):
        n = len(values)
        return 2 * n / (n + 2) * ((values**2).sum() - values.sum() ** 2 / n)

    h = operator(Rotated(make(2000)))
    pairs = spectra.eigsh(h, 10)
    plain = spectra.trace(h, rtol=1e-9, method="hutchinson", max_matvecs=30)
    deflated = spectra.trace(h, rtol=1e-9, max_matvecs=30, deflate=pairs)
    # The products saved go with the square of the error: 1,150 times, 20 times, 1.2 times.
    saved = (plain.standard_error / deflated.standard_error) ** 2
    expected = variance(make(2000)) / variance(make(2000)[10:])
    assert expected / 4 < saved < 4 * expected
    assert "Hutchinson, 10 deflated" in str(deflated)


def test_one_percent_on_outliers_costs_at_most_forty_products_with_the_pairs():
    h = operator(Rotated(s1(2000)))
    good = 0
    for seed in range(40):
        before = h.matvecs
        pairs = spectra.eigsh(h, 10, seed=seed)
        estimate = spectra.trace(h, rtol=0.01, deflate=pairs, max_matvecs=12, seed=seed)
        good += abs(estimate.value / s1(2000).sum() - 1) <= 0.01
        assert h.matvecs - before <= 33 + 12
    assert good >= 38


def test_eigenpairs_of_another_operator_are_refused():
    pairs = spectra.eigsh(dense(np.arange(60.0)), 2)
    h = operator(dense(np.arange(61.0)))
    with pytest.raises(ArgumentError, match=r"length 60, the operator has n = 61"):
        spectra.trace(h, deflate=pairs)
    assert h.matvecs == 0


def test_a_tuple_of_values_and_vectors_is_not_taken_for_eigenpairs():
    with pytest.raises(ArgumentTypeError, match="Eigenpairs that eigsh returned, got a tuple"):
        spectra.trace(np.eye(50), deflate=tuple(spectra.eigsh(np.eye(50), 2)))


# --- inputs, equivariance, reproducibility ----------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_trace_of_a_networks_hessian_is_within_its_interval(dtype):
    h, reference = tanh_network(dtype)
    truth = np.trace(reference)
    estimate = spectra.trace(h, rtol=0.05)
    low, high = estimate.interval()
    assert low - 1e-5 <= truth <= high + 1e-5
    deflated = spectra.trace(h, deflate=spectra.eigsh(h, 10), rtol=0.2)
    low, high = deflated.interval()
    assert low <= truth <= high


def test_rank_one_is_covered():
    covered = 0
    for seed in range(60):
        low, high = spectra.trace(rank_one(100), max_matvecs=20, seed=seed).interval()
        covered += low <= 3 <= high
    assert covered >= 50


def test_a_shift_moves_every_sample_by_n_times_itself():
    plain = spectra.trace(dense(s1(60)), max_matvecs=10)
    shifted = spectra.trace(dense(s1(60) + 7), max_matvecs=10)
    assert shifted.samples == pytest.approx(plain.samples + 60 * 7)
    assert shifted.standard_error == pytest.approx(plain.standard_error)


@pytest.mark.parametrize("factor", [1e-20, -3.0, 1e15])
def test_scaling_the_matrix_scales_everything(factor):
    plain = spectra.trace(dense(s1(60)), max_matvecs=10)
    scaled = spectra.trace(factor * dense(s1(60)), max_matvecs=10)
    assert scaled.samples == pytest.approx(factor * plain.samples, rel=1e-9)
    assert scaled.standard_error == pytest.approx(abs(factor) * plain.standard_error)
    assert scaled.converged == plain.converged


def test_the_same_seed_gives_the_same_samples_to_the_last_bit():
    h = operator(Rotated(s1(100)))
    state = torch.get_rng_state()
    first, second = (spectra.trace(h, max_matvecs=12, seed=5) for _ in range(2))
    assert np.array_equal(first.samples, second.samples)
    assert torch.equal(state, torch.get_rng_state())
    other = spectra.trace(h, max_matvecs=12, seed=6)
    assert not np.isin(first.samples, other.samples).any()


def test_more_probes_begin_with_the_same_ones():
    h = operator(Rotated(s1(400)))
    few = spectra.trace(h, rtol=1e-9, method="hutchinson", max_matvecs=8)
    many = spectra.trace(h, rtol=1e-9, method="hutchinson", max_matvecs=16)
    assert np.array_equal(few.samples, many.samples[:8])


def test_a_product_with_nan_is_named():
    with pytest.raises(NonFiniteError, match="matvec 3 returned 1 non-finite of 100 entries"):
        spectra.trace(Poisoned(s1(100), at=3))


# --- wrong arguments --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rtol": -0.1}, "rtol=-0.1, atol=None; expected tolerances >= 0"),
        ({"rtol": 0}, "at least one of them > 0"),
        ({"atol": -1.0}, "atol=-1.0; expected tolerances >= 0"),
        ({"confidence": 1.5}, "confidence=1.5; expected a probability between 0 and 1"),
        ({"confidence": 0}, "confidence=0; expected a probability between 0 and 1"),
        ({"max_matvecs": 1}, "max_matvecs=1; an error estimate needs at least 2 probes"),
        ({"seed": -1}, "seed=-1; expected an integer >= 0"),
        ({"seed": 1.5}, "seed=1.5; expected an integer >= 0"),
        (
            {"method": "hutch"},
            "method='hutch'; expected one of 'auto', 'hutchinson', 'hutch\\+\\+', 'xtrace'",
        ),
        ({"method": "xtrace", "max_matvecs": 3}, "XTrace needs 2 products for each of 2 vectors"),
    ],
)
def test_wrong_arguments_are_refused_before_any_product(options, message):
    h = operator(np.eye(50))
    with pytest.raises(ArgumentError, match=message):
        spectra.trace(h, **options)
    assert h.matvecs == 0


@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace"])
def test_undeflated_and_deflated_at_once_is_refused(method):
    h = operator(np.eye(50))
    with pytest.raises(ArgumentError, match=f"method='{re.escape(method)}' does not deflate"):
        spectra.trace(h, method=method, deflate=spectra.eigsh(np.eye(50), 2))
    assert h.matvecs == 0
    assert spectra.trace(h, method=method).value == pytest.approx(50)


# --- where the basis is -----------------------------------------------------------------------


def test_memory_for_few_vectors_makes_a_krylov_basis_short_but_does_not_put_it_on_disk(monkeypatch):
    h = operator(Rotated(s1(2000), dtype=np.float32))
    whole = spectra.trace(h)
    assert whole.provenance["basis"]["vectors"] > 30
    # Of 36 vectors in half of the memory the first probes take 10, with their products.
    monkeypatch.setattr(vectors, "free_bytes", lambda device: 2 * 8000 * 36)
    short = spectra.trace(h)
    assert short.provenance["basis"]["place"] == "device"
    assert short.provenance["basis"]["vectors"] == 26 + 1
    assert short.converged
    low, high = short.interval()
    assert low < s1(2000).sum() < high


@pytest.mark.parametrize("method", ["auto", "hutch++", "xtrace"])
def test_a_basis_on_disk_gives_the_same_trace_to_the_last_bit(method, monkeypatch):
    h = operator(Rotated(s1(2000), dtype=np.float32))
    # Probes at a time, which memory decides, and which decides how their projections are summed.
    monkeypatch.setattr(probes, "_TOGETHER", 1)
    options = {"method": method, "rtol": 1e-9, "max_matvecs": 60}
    here = spectra.trace(h, **options)
    # Memory for less than is of use.
    monkeypatch.setattr(vectors, "free_bytes", lambda device: 2 * 8000 * 12)
    there = spectra.trace(h, **options)
    assert np.array_equal(here.samples, there.samples)
    assert np.array_equal(here.variances, there.variances)
    assert here.provenance["basis"]["place"] == "device"
    assert there.provenance["basis"] == {**here.provenance["basis"], "place": "disk"}


# --- probes together -----------------------------------------------------------------------------


def test_probes_are_multiplied_together_in_few_passes_over_the_data():
    model, batch = tanh_mlp((6, 20, 3)), wine(torch.float64)
    passes = []

    def loss(model, batch):
        passes.append(1)
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    operator = spectra.HessianOperator(model, loss, [batch], graph="fresh")
    found = spectra.trace(operator, method="hutchinson", rtol=0.2, seed=1)
    assert found.matvecs > 8
    assert len(passes) <= found.matvecs / 2
    kept = spectra.HessianOperator(model, loss, [batch], graph="retained")
    same = spectra.trace(kept, method="hutchinson", rtol=0.2, seed=1)
    assert found.matvecs == same.matvecs
    np.testing.assert_allclose(found.samples, same.samples, rtol=1e-10)
