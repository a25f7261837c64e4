"""One number with its error: intervals, exactness, and a text that never hides the error."""

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats

import spectra
from spectra.algorithms.estimate import Estimate, samples_needed
from spectra.errors import ArgumentError

SAMPLES = np.array([3.0, 5.0, 4.0, 8.0, 1.0, 6.0])


def mean_of(samples, power=1, **options):
    value = samples.mean() ** (1 / power)
    error = samples.std(ddof=1) / math.sqrt(len(samples))
    return Estimate("trace", value, error, samples=samples, power=power, **options)


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.999])
def test_the_interval_is_students_and_wider_the_fewer_the_samples(confidence):
    scale = (1 + 1.5 / 6) * stats.sem(SAMPLES)
    expected = stats.t.interval(confidence, df=5, loc=SAMPLES.mean(), scale=scale)
    assert mean_of(SAMPLES).interval(confidence) == pytest.approx(expected)


@pytest.mark.parametrize("confidence", [0.5, 0.95])
def test_variances_that_are_known_take_the_place_of_the_spread(confidence):
    variances = np.array([1.0, 4.0, 2.0, 9.0, 1.0, 1.0])
    expected = stats.t.interval(confidence, df=5, loc=SAMPLES.mean(), scale=(3 / 6) ** 0.5)
    estimate = mean_of(SAMPLES, variances=variances)
    assert estimate.interval(confidence) == pytest.approx(expected)


@given(st.integers(2, 200), st.floats(1.01, 9e5), st.booleans(), st.floats(0.5, 0.999))
@example(2, 1.5, True, 0.95)
@example(5, 9.9e5, False, 0.95)
def test_as_many_samples_as_are_foreseen_make_the_interval_that_narrow(count, excess, known, level):
    def width(number):
        skew = 1 if known else 1 + 1.5 / number
        return skew * stats.t.ppf(0.5 + level / 2, number - 1) / number**0.5

    needed = samples_needed(count, excess, level, known=known)
    assert width(needed) <= width(count) / excess * (1 + 1e-9)
    assert width(max(needed / 1.002, count)) > width(count) / excess


@pytest.mark.parametrize("excess", [1e9, 1e200, math.inf, math.nan])
def test_what_is_out_of_reach_takes_infinitely_many_samples(excess):
    assert samples_needed(5, excess, 0.95, known=True) == math.inf


def test_samples_that_are_not_independent_widen_the_interval():
    low, high = mean_of(SAMPLES).interval()
    wider = mean_of(SAMPLES, widening=1.3).interval()
    assert wider[1] - wider[0] == pytest.approx(1.3 * (high - low))
    assert sum(wider) == pytest.approx(low + high)


def test_the_interval_of_a_root_is_the_root_of_the_interval():
    low, high = mean_of(SAMPLES).interval()
    assert mean_of(SAMPLES, power=2).interval() == pytest.approx((low**0.5, high**0.5))


def test_the_interval_of_a_root_does_not_go_below_zero():
    low, high = mean_of(np.array([0.1, 9.0, 0.2]), power=2).interval()
    assert low == 0.0
    assert high > 2


def test_the_confidence_is_the_estimates_own_unless_given():
    estimate = mean_of(SAMPLES, confidence=0.8)
    assert estimate.interval() == estimate.interval(0.8)
    assert estimate.interval()[0] > estimate.interval(0.95)[0]


@pytest.mark.parametrize(("power", "low"), [(1, -math.inf), (2, 0.0)])
def test_one_sample_tells_nothing(power, low):
    estimate = Estimate("trace", 4.0, math.inf, samples=np.array([4.0]), power=power)
    assert estimate.interval() == (low, math.inf)


def test_an_exact_number_is_its_own_interval():
    estimate = Estimate("trace", 4.0, 0.0)
    assert estimate.exact
    assert estimate.interval(0.999) == (4.0, 4.0)
    assert not mean_of(SAMPLES).exact


def test_bounds_hold_with_their_own_probability_and_no_more():
    estimate = Estimate("norm", 4.0, math.nan, bounds=(4.0, 4.5), bounds_confidence=0.99)
    assert not estimate.exact
    assert estimate.interval(0.95) == (4.0, 4.5)
    assert estimate.interval(0.99) == (4.0, 4.5)
    with pytest.raises(ArgumentError, match="bounds of this estimate hold with 99%, no more"):
        estimate.interval(0.999)


@pytest.mark.parametrize("confidence", [0, 1, -0.5, 95, math.nan])
def test_a_confidence_that_is_no_probability_is_refused(confidence):
    with pytest.raises(ArgumentError, match="expected a probability between 0 and 1"):
        mean_of(SAMPLES).interval(confidence)
    with pytest.raises(ArgumentError, match="expected a probability between 0 and 1"):
        mean_of(SAMPLES).running(confidence)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("variances", [np.zeros(0), np.arange(6.0)])
def test_the_convergence_curve_is_the_estimate_after_every_probe(power, variances):
    values, low, high = mean_of(SAMPLES, power=power, variances=variances).running(0.9)
    assert len(values) == len(low) == len(high) == len(SAMPLES) - 1
    for i, count in enumerate(range(2, len(SAMPLES) + 1)):
        early = mean_of(SAMPLES[:count], power=power, variances=variances[:count])
        assert values[i] == pytest.approx(early.value)
        assert (low[i], high[i]) == pytest.approx(early.interval(0.9))


def test_the_convergence_curve_of_an_exact_number_is_empty():
    assert all(len(part) == 0 for part in Estimate("trace", 4.0, 0.0).running())


@pytest.mark.parametrize(
    ("estimate", "shown"),
    [
        (mean_of(SAMPLES, method="Hutchinson", matvecs=6), "95% interval ["),
        (mean_of(SAMPLES, method="Hutchinson", matvecs=6), "6 probes, 6 matvecs"),
        (mean_of(SAMPLES, confidence=0.8), "80% interval ["),
        (Estimate("trace", 3.0, math.inf, samples=SAMPLES[:1]), "interval [-inf, inf]"),
        (Estimate("trace", 4.0, 0.0, method="unit vectors", matvecs=9), "(exact, unit vectors; 9 "),
        (Estimate("norm", 4.0, math.nan, bounds=(4, 5), bounds_confidence=0.99), "99% interval [4"),
        (Estimate("norm", 4.0, math.nan, bounds=(4, 5), bounds_confidence=0.5), "50% interval [4"),
        (mean_of(SAMPLES, converged=False), "tolerance not reached"),
        (mean_of(SAMPLES, notes=("beware",)), "note: beware"),
    ],
)
def test_the_text_shows_an_error_next_to_the_value(estimate, shown):
    assert shown in str(estimate)
    assert str(estimate).startswith(f"{estimate.quantity} = {estimate.value:.6g}")


@pytest.mark.parametrize(
    "ask",
    [
        spectra.trace,
        lambda h: spectra.trace(h, max_matvecs=3),
        spectra.norm,
        lambda h: spectra.norm(h, max_matvecs=2),
        lambda h: spectra.norm(h, "fro"),
    ],
)
@pytest.mark.parametrize("n", [1, 5, 50])
def test_every_estimate_shows_its_error(ask, n):
    first = str(ask(np.diag(np.linspace(-1, 3, n)))).splitlines()[0]
    assert "interval [" in first or "(exact, " in first
