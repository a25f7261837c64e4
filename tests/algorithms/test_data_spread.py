"""Sampling error of the data: right in simulation, and apart from the solver's."""

import numpy as np
import pytest
import torch

import spectra
from spectra.errors import ArgumentError, ArgumentTypeError, NonFiniteError

SPIKES = np.array([30.0, 10.0, 4.0, *np.ones(17)])


class Quadratic(torch.nn.Module):
    """½ (w·x)² averaged over samples: its Hessian is the covariance of x, whatever w is."""

    def __init__(self, n):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(n, dtype=torch.float64))


def half_square(model, batch):
    return 0.5 * (batch @ model.w).square().mean()


def samples(count, seed):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.from_numpy(np.sqrt(SPIKES))
    return torch.randn(count, len(SPIKES), dtype=torch.float64, generator=generator) * scale


def hessian(x, sizes, **options):
    return spectra.HessianOperator(
        Quadratic(x.shape[1]), half_square, list(x.split(sizes)), weight=len, **options
    )


def test_forms_of_unequal_batches_add_up_to_the_whole():
    x = samples(100, 0)
    h = hessian(x, [50, 30, 15, 5])
    vectors = torch.linalg.qr(torch.randn(20, 3, dtype=torch.float64))[0]
    weights, forms = h.quadratic_forms(vectors)
    assert weights.tolist() == [50, 30, 15, 5]
    for block, row in zip(x.split([50, 30, 15, 5]), forms, strict=True):
        exact = ((block @ vectors) ** 2).mean(dim=0).numpy()
        assert row == pytest.approx(exact, rel=1e-12)
    whole = (vectors * h.apply(vectors)).sum(dim=0).numpy()
    assert weights @ forms / weights.sum() == pytest.approx(whole, rel=1e-12)
    assert h.matvecs == 6


def test_standard_errors_of_equal_batches_are_those_of_a_mean():
    x = samples(400, 1)
    h = hessian(x, 20)
    pairs = spectra.eigsh(h, 3, tol=1e-6)
    found = spectra.data_spread(h, pairs)
    forms = np.array([((b.numpy() @ pairs.vectors.numpy()) ** 2).mean(axis=0) for b in x.split(20)])
    assert found.standard_errors == pytest.approx(forms.std(axis=0, ddof=1) / np.sqrt(20))
    assert found.values == pytest.approx(pairs.values)
    assert found.batches == 20
    assert found.matvecs == 3
    assert np.isnan(found.trace)


@pytest.fixture(scope="module")
def spreads():
    """Of 100 data sets of one population."""
    found = []
    for seed in range(100):
        h = hessian(samples(1000, seed), 50, graph="retained")
        pairs = spectra.eigsh(h, 3, tol=1e-4)
        found.append(spectra.data_spread(h, pairs, probes=10, seed=seed))
    return found


@pytest.mark.slow
def test_intervals_cover_the_population(spreads):
    low, high = np.array([found.intervals for found in spreads]).transpose(2, 0, 1)
    covered = (low <= SPIKES[:3]) & (SPIKES[:3] <= high)
    assert (covered.sum(axis=0) >= 85).all()


@pytest.mark.slow
def test_the_trace_of_the_population_is_covered(spreads):
    low, high = np.array([found.trace_interval for found in spreads]).T
    assert ((low <= SPIKES.sum()) & (SPIKES.sum() <= high)).sum() >= 88


def test_sums_are_scaled_means():
    x = samples(200, 3)

    def summed(model, batch):
        return 0.5 * (batch @ model.w).square().sum()

    mean = hessian(x, 10)
    total = spectra.HessianOperator(Quadratic(20), summed, list(x.split(10)), reduction="sum")
    pairs = spectra.eigsh(mean, 2), spectra.eigsh(total, 2)
    one, other = spectra.data_spread(mean, pairs[0]), spectra.data_spread(total, pairs[1])
    assert other.values == pytest.approx(200 * one.values)
    assert other.standard_errors == pytest.approx(200 * one.standard_errors, rel=1e-6)


def test_equal_batches_have_no_spread():
    x = samples(10, 4).repeat(3, 1)
    found = spectra.data_spread(h := hessian(x, 10), spectra.eigsh(h, 2), probes=4)
    assert found.standard_errors == pytest.approx(np.zeros(2), abs=1e-12)
    assert found.trace_standard_error == pytest.approx(0, abs=1e-12)
    assert "3 batches tell little" in found.notes[0]


def test_it_is_printed_and_saved(tmp_path):
    h = hessian(samples(200, 5), 10)
    found = spectra.data_spread(h, spectra.eigsh(h, 2), probes=5)
    assert "eigenvalues of the population" in str(found)
    assert "95% interval" in str(found)
    found.save(tmp_path / "spread")
    assert str(spectra.load(tmp_path / "spread")) == str(found)


def test_what_has_no_batches_is_refused():
    h = hessian(samples(50, 6), 50)
    pairs = spectra.eigsh(h, 1)
    with pytest.raises(ArgumentError, match="the data are one batch"):
        spectra.data_spread(h, pairs)
    with pytest.raises(ArgumentTypeError, match="got a ndarray: a matrix has no batches"):
        spectra.data_spread(np.eye(3), pairs)
    with pytest.raises(ArgumentError, match="nothing to find the error of"):
        spectra.data_spread(h)
    with pytest.raises(ArgumentError, match="probes=-1"):
        spectra.data_spread(h, pairs, probes=-1)
    with pytest.raises(ArgumentError, match="length 3, the operator has"):
        spectra.data_spread(h, spectra.eigsh(np.eye(3), 1))


def test_a_batch_that_is_not_finite_is_named():
    x = samples(40, 7)
    pairs = spectra.eigsh(hessian(x, 10), 1)
    x[25, 3] = np.inf
    with pytest.raises((NonFiniteError, spectra.errors.LossError), match="batch 2"):
        spectra.data_spread(hessian(x, 10), pairs)
