"""Differences of two spectra that are known exactly, and whether they are beyond the errors."""

import dataclasses

import numpy as np
import pytest
import torch

import spectra
from spectra.errors import ArgumentError, ArgumentTypeError
from tests.cases.matrices import Diagonal, Rotated, s1


def analysis(values, **options):
    options = {"k": 6, "steps": 25, "rtol": 0.05, "progress": False, **options}
    return spectra.analyze(Diagonal(np.asarray(values, dtype=float)), **options)


@pytest.fixture(scope="module")
def spectrum():
    return np.sort(np.concatenate([np.linspace(-0.5, 0.5, 194), [3.0, 4.0, 5.0, 7.0, 8.0, 9.0]]))


@pytest.fixture(scope="module")
def first(spectrum):
    return analysis(spectrum)


def test_a_shift_of_the_largest_is_found_and_nothing_else(spectrum, first):
    moved = spectrum.copy()
    moved[-1] += 0.5
    found = spectra.compare(first, analysis(moved), names=("before", "after"))
    rows = {row.name: row for row in found.rows}
    top = rows["λ1"]
    assert abs(top.change - 0.5) <= top.error
    assert top.beyond_errors
    assert all(not rows[f"λ{i}"].beyond_errors for i in range(2, 7))
    assert rows["spectral norm"].beyond_errors
    # The truth is within the errors of every number whose truth is simple.
    assert abs(rows["trace"].change - 0.5) <= rows["trace"].error
    frobenius = np.linalg.norm(moved) - np.linalg.norm(spectrum)
    assert abs(rows["Frobenius norm"].change - frobenius) <= rows["Frobenius norm"].error
    assert found.overlap == pytest.approx(1.0, abs=1e-6)
    assert found.overlap_size == 6
    assert "before" in str(found)
    assert "after" in str(found)
    assert max(map(len, str(found).splitlines())) <= 100


def test_an_analysis_is_like_itself(first):
    found = spectra.compare(first, first)
    assert not any(row.beyond_errors for row in found.rows)
    assert all(row.change == 0 for row in found.rows)
    assert found.distance == 0
    assert found.settings == ()


def test_the_area_between_distributions_is_that_of_the_moved_mass(spectrum, first):
    # All of the bulk by 0.2: the area between the distribution functions.
    moved = np.where(np.abs(spectrum) <= 0.5, spectrum + 0.2, spectrum)
    found = spectra.compare(first, analysis(moved))
    exact = np.abs(np.sort(moved) - spectrum).mean()
    assert abs(found.distance - exact) < 2 * found.distance_floor + 0.02 * exact
    assert found.distance > 3 * found.distance_floor


def test_both_ends_are_paired_by_rank(spectrum):
    lower = spectrum.copy()
    lower[0] = -2.0
    one, other = (analysis(values, which="BE", k=4) for values in (spectrum, lower))
    rows = {row.name: row for row in spectra.compare(one, other).rows}
    assert rows["λ1"].first == pytest.approx(9.0, abs=1e-2)
    assert rows["λn"].change == pytest.approx(-1.5, abs=rows["λn"].error + 1e-9)
    assert not rows["λ2"].beyond_errors
    # Of the largest in magnitude, the negative ones are the smallest.
    large = analysis(lower * 10, k=7)
    rows = {row.name: row for row in spectra.compare(large, large).rows}
    assert rows["λn"].first == pytest.approx(-20.0, abs=0.1)
    assert "λ7" not in rows


def test_rotated_eigenvectors_have_only_a_share_in_common():
    values = s1(300)
    one, other = (
        spectra.analyze(Rotated(values, seed=seed), k=5, trace=False, density=False, progress=False)
        for seed in (0, 1)
    )
    found = spectra.compare(one, other)
    v1, v2 = (np.asarray(a.eigenpairs.vectors)[:, : found.overlap_size] for a in (one, other))
    cosines = np.linalg.svd(v1.T @ v2, compute_uv=False)
    assert found.overlap == pytest.approx((cosines**2).sum() / found.overlap_size, abs=1e-9)
    assert np.isnan(found.distance)


def test_what_is_doubtful_or_set_otherwise_is_said(spectrum, first):
    doubtful = analysis(spectrum, budget=23, seed=5)
    assert not doubtful.eigenpairs.converged.all()
    found = spectra.compare(first, doubtful, names=("a", "b"))
    assert any(note.startswith("b: ") and "did not converge" in note for note in found.notes)
    assert "b: a missed eigenvalue is not ruled out, so that ranks are not certain" in found.notes
    assert not any(note.startswith("a: ") for note in found.notes)
    assert "seed (0 in the first, 5 in the second)" in found.settings
    assert not all(row.converged for row in found.rows if row.name.startswith("λ"))
    smaller = analysis(np.linspace(1, 2, 50))
    found = spectra.compare(first, smaller)
    assert np.isnan(found.overlap)
    assert any("have 200 and 50 parameters" in note for note in found.notes)
    # Eigenvectors that were not saved.
    none = dataclasses.replace(
        first.eigenpairs, vectors=torch.zeros(200, 0, dtype=torch.float64).numpy()
    )
    found = spectra.compare(first, dataclasses.replace(first, eigenpairs=none))
    assert np.isnan(found.overlap)


def test_what_is_no_analysis_is_refused(first):
    with pytest.raises(ArgumentTypeError, match="the second is a Eigenpairs"):
        spectra.compare(first, first.eigenpairs)
    with pytest.raises(ArgumentError, match="a name for each"):
        spectra.compare(first, first, names="ab")
