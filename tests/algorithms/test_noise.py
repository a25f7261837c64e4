"""Noise of the products: measured right, whatever result it comes with."""

import math

import numpy as np
import pytest
import scipy.sparse.linalg
import torch

import spectra
from spectra.algorithms.lanczos import Krylov
from spectra.algorithms.noise import Noise, noise_notes
from spectra.algorithms.probes import seeded
from spectra.objective.vectors import VectorSpace
from tests.cases.matrices import Diagonal, Noisy, Rotated, operator, s1

# Every question that multiplies with random vectors, at a small cost.
QUESTIONS = {
    "eigsh": lambda h: spectra.eigsh(h, 5),
    "diagonal": lambda h: spectra.diagonal(h, probes=12),
    "solve": lambda h: spectra.solve(h, np.ones(1000), damping=1.0, rtol=1e-6, max_matvecs=40),
    "trace": lambda h: spectra.trace(h, max_matvecs=20),
    "frobenius": lambda h: spectra.norm(h, "fro", max_matvecs=20),
    "hutch++": lambda h: spectra.trace(h, method="hutch++", max_matvecs=40),
    "xtrace": lambda h: spectra.trace(h, method="xtrace", max_matvecs=40),
    "density": lambda h: spectra.spectral_density(h, steps=15, probes=2),
    "power iteration": lambda h: spectra.norm(h, 2, max_matvecs=12),
    "lanczos": lambda h: spectra.norm(h, 2, method="lanczos"),
    "nuclear": lambda h: spectra.norm(h, "nuc", steps=15, max_matvecs=30),
    "sum": lambda h: spectra.spectral_sum(h, np.cos, steps=15, probes=2),
    "effective dimension": lambda h: spectra.effective_dimension(
        h, 1.0, part="abs", steps=15, probes=2
    ),
    "logdet": lambda h: spectra.logdet(h, 20.0, steps=15, probes=2),
    "participation": lambda h: spectra.participation_ratio(h, steps=15, probes=2),
    "rank": lambda h: spectra.effective_rank(h, steps=15, probes=2),
    "stable rank": lambda h: spectra.effective_rank(h, kind="stable", steps=15, probes=2),
    "mass": lambda h: spectra.spectral_density(h, steps=15, probes=2).mass(0.05, 0.2),
    "counts": lambda h: spectra.spectral_density(h, steps=15, probes=2).counts(0.05).within,
}


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("relative", [1e-4, 1e-2, 1e-1])
def test_every_result_measures_the_noise_of_the_products(question, relative):
    found = QUESTIONS[question](Noisy(s1(1000), relative))
    assert relative / 3 < found.noise < 3 * relative
    assert found.floor >= 0


@pytest.mark.parametrize("question", QUESTIONS)
def test_exact_products_have_no_noise_but_rounding(question):
    found = QUESTIONS[question](Rotated(s1(1000)))
    assert found.noise < 1e-12
    assert not any("mean nothing" in note for note in found.notes)


@pytest.mark.parametrize("question", QUESTIONS)
def test_loud_noise_is_told(question):
    found = QUESTIONS[question](Noisy(s1(1000), 1e-1))
    assert any("digits" in note and "mean nothing" in note for note in found.notes)


def test_a_matrix_that_is_not_symmetric_is_told_by_its_defect():
    generator = np.random.default_rng(0)
    matrix = np.diag(s1(400)) + 1e-2 * generator.normal(size=(400, 400))
    exact = np.linalg.norm(matrix - matrix.T) / (math.sqrt(2) * np.linalg.norm(matrix))
    noise, space = Noise(400), VectorSpace(400)
    torch_matrix, seed = torch.from_numpy(matrix), seeded(0)
    for _ in range(400):
        u, v = torch.randn(2, 400, dtype=torch.float64, generator=seed)
        noise.compare(space, u, torch_matrix @ u, 3 * v, 3 * (torch_matrix @ v))
    assert noise.relative == pytest.approx(exact, rel=0.15)


def test_single_precision_is_read_to_its_rounding_at_a_million_entries():
    values = np.concatenate([[100.0, 50.0, 20.0], np.linspace(-0.3, 0.3, 10**6 - 3)])
    krylov = Krylov(operator(Diagonal(values, np.float32)), 8, seeded(0))
    while not krylov.full:
        krylov.step()
    assert krylov.noise.relative < 1e-6


def test_nothing_was_measured_without_a_pair():
    assert math.isnan(Noise(5).relative)
    assert noise_notes(math.nan, math.nan) == []
    assert noise_notes(1e-6, 1e-4) == []


class Rounded(Diagonal):
    """diag(values) whose products are rounded to half precision."""

    def _matvec(self, x):
        return super()._matvec(x).astype(np.float16).astype(float)


@pytest.mark.parametrize("method", ["power", "lanczos"])
@pytest.mark.parametrize("seed", range(6))
def test_bounds_of_the_spectral_norm_contain_the_noise(method, seed):
    values = np.concatenate([np.linspace(100, 1, 10), np.linspace(-0.05, 0.29, 90)])
    found = spectra.norm(Rounded(values), method=method, seed=seed)
    low, high = found.interval(0.99)
    assert low <= 100 <= high


def test_what_noisy_products_add_up_to_is_not_exact():
    values = np.concatenate([np.linspace(100, 1, 10), np.linspace(-0.05, 0.29, 90)])
    found = spectra.trace(Noisy(values, 1e-2), rtol=1e-6)
    low, high = found.interval()
    assert low < values.sum() < high


def test_an_operator_that_is_not_symmetric_is_called_that():
    matrix = np.random.default_rng(0).normal(size=(100, 100))
    h = scipy.sparse.linalg.aslinearoperator(matrix)
    for found in (spectra.norm(h), spectra.norm(h, method="lanczos"), spectra.eigsh(h, 3)):
        assert any("not symmetric" in note for note in found.notes)


def test_a_measured_residual_bounds_the_noise():
    # In single precision symmetry can tell the noise of long vectors only to 8 √n eps.
    pairs = spectra.eigsh(Rotated(s1(100_000), dtype=np.float32), 3)
    assert pairs.noise < 1e-5
    assert pairs.notes == ()


def test_residuals_of_deflated_pairs_bound_the_noise_of_what_follows():
    h = Noisy(s1(1000), 1e-3)
    pairs = spectra.eigsh(h, 3, tol=1e-1)
    bound = float((pairs.residuals / np.abs(pairs.values)).min())
    for found in (
        spectra.spectral_density(h, steps=15, probes=2, deflate=pairs),
        spectra.trace(h, max_matvecs=20, deflate=pairs),
    ):
        assert 1e-3 / 3 < found.noise <= bound
