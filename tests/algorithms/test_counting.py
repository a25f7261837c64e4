"""Shares and counts: both errors are in their bounds, and zero is no number of steps away."""

import numpy as np
import pytest

import spectra
from spectra.errors import ArgumentError
from tests.cases.matrices import Rotated, dense, operator, rank_one, s1, s1z, s3, semicircle


def counted(values, tau):
    return [(values < -tau).sum(), (np.abs(values) <= tau).sum(), (values > tau).sum()]


@pytest.mark.parametrize("make", [s1, s1z, semicircle], ids=lambda make: make.__name__)
@pytest.mark.parametrize("probes", [2, 5])
def test_the_bounds_of_counts_cover(make, probes):
    values, tau = make(400), 0.01
    h = operator(Rotated(values))
    pairs = spectra.eigsh(h, 10) if make is not semicircle else None
    covered = np.zeros(3)
    for seed in range(25):
        density = spectra.spectral_density(h, steps=20, probes=probes, deflate=pairs, seed=seed)
        parts = density.counts(tau)
        assert sum(part.value for part in parts) == pytest.approx(400)
        for i, part in enumerate(parts):
            low, high = part.interval()
            assert 0 <= low <= part.value <= high <= 400
            covered[i] += low <= counted(values, tau)[i] <= high
    assert (covered >= 23).all()


def test_more_steps_tell_the_sign_of_more_eigenvalues():
    values = s1(1000)
    h = operator(Rotated(values))
    pairs = spectra.eigsh(h, 10)
    widths = []
    for steps in (10, 30, 90):
        low, high = (
            spectra.spectral_density(h, steps=steps, probes=5, deflate=pairs)
            .counts(0.02)
            .below.interval()
        )
        assert low <= (values < -0.02).sum() <= high
        widths.append(high - low)
    assert widths[2] < widths[1] < widths[0]


def test_the_mass_at_zero_is_a_number_with_its_resolution():
    values = s1z(1000)
    h = operator(Rotated(values))
    density = spectra.spectral_density(h, deflate=spectra.eigsh(h, 10))
    zero, tau = density.mass_at_zero(), density.resolution_at_zero
    assert 1e-3 < tau < 0.1
    assert f"within ±{tau:.4g}" in zero.quantity
    low, high = zero.interval()
    assert low <= (np.abs(values) <= tau).mean() <= high
    assert high - low < 0.25
    # Within a distance that nodes cannot resolve nearly nothing is known: the bounds say so.
    low, high = density.mass_at_zero(1e-5).interval()
    assert low < 0.1
    assert high > 0.5
    assert "of zero (" in str(density)


def test_the_rigorous_band_holds_everywhere_at_once():
    for make in (s1z, semicircle):
        values, violated = make(300), 0
        h = operator(Rotated(values))
        x = np.concatenate([np.linspace(-2.5, 2.5, 60), values[::40]])
        truth = (values[:, None] <= x + 1e-9).mean(axis=0)
        for seed in range(10):
            density = spectra.spectral_density(h, steps=15, probes=2, seed=seed)
            low, high = density.cdf_band(x, kind="rigorous")
            assert (low <= density.cdf(x) + 1e-9).all()
            assert (density.cdf(x) <= high + 1e-9).all()
            violated += not ((low <= truth + 1e-9) & (truth <= high + 1e-9)).all()
        assert violated <= 1
    with pytest.raises(ArgumentError, match="kind='x'; expected 'probes' or 'rigorous'"):
        density.cdf_band(x, kind="x")


def test_atoms_are_counted_exactly():
    values = s3(40)
    density = spectra.spectral_density(dense(values), deflate=spectra.eigsh(dense(values), 40))
    parts = density.counts(0.2)
    assert [part.value for part in parts] == pytest.approx(counted(values, 0.2))
    assert all(part.exact for part in parts)
    assert density.mass(4, 100).value == pytest.approx((values >= 4).mean())


def test_runs_through_the_whole_space_count_exactly():
    values = s3(40)
    for probes in (1, 3):
        density = spectra.spectral_density(dense(values), steps=40, probes=probes)
        for part, truth in zip(density.counts(0.2), counted(values, 0.2), strict=True):
            assert part.interval() == pytest.approx((truth, truth))


@pytest.mark.parametrize("value", [-2.5, 0.0, 3.0])
def test_a_multiple_of_the_identity_has_all_its_mass_in_one_place(value):
    density = spectra.spectral_density(value * np.eye(40), probes=3)
    for part, truth in zip(
        density.counts(), counted(np.full(40, value), density.resolution_at_zero), strict=True
    ):
        assert part.value == pytest.approx(truth)
        assert part.interval() == pytest.approx((truth, truth))


def test_rank_one_is_known_up_to_the_randomness_of_the_probes():
    density = spectra.spectral_density(rank_one(100), steps=20, probes=5)
    # The runs ended: they know both eigenvalues, and nothing is left to resolve.
    assert density.resolution_at_zero < 1e-9
    low, high = density.mass_at_zero().interval()
    assert 0.9 < low <= 0.99 <= high <= 1


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_counts_scale_with_the_matrix(factor):
    plain = spectra.spectral_density(dense(s1(80)), steps=12, probes=3)
    scaled = spectra.spectral_density(factor * dense(s1(80)), steps=12, probes=3)
    assert scaled.resolution_at_zero == pytest.approx(factor * plain.resolution_at_zero)
    for one, other in zip(plain.counts(0.05), scaled.counts(0.05 * factor), strict=True):
        assert one.value == pytest.approx(other.value)
        assert one.interval() == pytest.approx(other.interval())


def test_a_shift_moves_the_interval_along():
    plain = spectra.spectral_density(dense(s1(80)), steps=12, probes=3)
    moved = spectra.spectral_density(dense(s1(80)) + 2 * np.eye(80), steps=12, probes=3)
    assert moved.mass(2.1, 4).interval() == pytest.approx(plain.mass(0.1, 2).interval(), abs=1e-6)


def test_without_coefficients_the_neighbouring_nodes_are_the_bracket():
    density = spectra.SpectralDensity(
        np.array([[0.0, 1.0, 2.0, 3.0]] * 3), np.array([[0.1, 0.2, 0.3, 0.4]] * 3), 10
    )
    assert density.mass(-np.inf, 1.5).interval() == pytest.approx((0.1, 0.6))


def test_counts_can_be_saved_and_printed(tmp_path):
    density = spectra.spectral_density(Rotated(s1(100)), steps=10, probes=3)
    below = density.counts(0.05).below
    assert "number of eigenvalues below -0.05 = " in str(below)
    loaded = spectra.load(below.save(tmp_path / "below"))
    assert loaded.interval() == below.interval()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: d.counts(-1), "tau=-1; expected a distance from zero >= 0"),
        (lambda d: d.mass_at_zero(float("nan")), "tau=nan; expected a distance"),
        (lambda d: d.mass(1, 0), "low=1, high=0; expected an interval"),
        (lambda d: d.mass(0, 1, confidence=2), "expected a probability between 0 and 1"),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    density = spectra.spectral_density(dense(s1(50)), steps=5, probes=2)
    with pytest.raises(ArgumentError, match=message):
        call(density)
