"""The pages of comparisons and trajectories say what these hold, and run nothing."""

import dataclasses
import math

import numpy as np
import pytest

import spectra
from spectra.analysis.trajectory import Measurement, Trajectory
from spectra.errors import ArgumentTypeError
from spectra.report.comparison_page import write_comparison_page
from spectra.report.report import save_figures
from spectra.report.trajectory_page import write_trajectory_page
from tests.cases.matrices import Diagonal
from tests.report.test_report import SCRIPT, Page

HOSTILE = "<script>alert(1)</script>$x"


@pytest.fixture(scope="module")
def comparison():
    bulk = np.linspace(-0.5, 0.5, 97)
    both = (
        spectra.analyze(Diagonal(np.append(bulk, tops)), 3, steps=20, rtol=0.05, progress=False)
        for tops in ([3.0, 4.0, 5.0], [3.0, 4.0, 6.0])
    )
    return spectra.compare(*both, names=("before", HOSTILE))


def trajectory():
    steps = [
        Measurement(
            step,
            label=f"w{step}.pt",
            eigenvalues=(value,),
            residuals=(1e-4,),
            converged=(step != 10,),
            threshold=20.0,
            threshold_formula="2 / lr",
            threshold_preconditioned=False,
            matvecs={"eigenvalues": 7},
            seconds=0.5,
            notes=("not certified",),
        )
        for step, value in ((0, 3.0), (10, 12.0), (20, 21.0))
    ]
    failed = Measurement(30, label=HOSTILE, error="NonFiniteError: the loss is nan")
    return Trajectory((*steps, failed), notes=("of a training set",))


def test_a_comparison_says_every_difference_with_its_error(comparison, tmp_path):
    path = write_comparison_page(comparison, tmp_path / "comparison.html")
    page = Page(path.read_text(encoding="utf-8"))
    assert page.scripts == [SCRIPT]
    assert all(address.startswith("data:image/svg+xml") for address in page.images)
    assert len(page.images) == 2
    values = [text for *_, text in page.readings[0]]
    assert len(values) == 2 * 3
    assert values[0].startswith("before: λ1 = 5 ± ")
    assert values[3].startswith(f"{HOSTILE}: λ1 = 6 ± ")
    top = page.row("λ1")
    assert [float(cell) for cell in top[1:4]] == pytest.approx([5.0, 6.0, 1.0], abs=1e-2)
    assert top[5:] == ["yes", "yes"]
    assert page.row("λ2")[5] == "no"
    assert HOSTILE in page.row("quantity")
    beyond = sum(row.beyond_errors for row in comparison.rows)
    assert f"{beyond} of {len(comparison.rows)} numbers differ" in page.text


def test_figures_of_a_comparison_are_those_that_both_have(comparison, tmp_path):
    assert set(save_figures(comparison, tmp_path)) == {"both_eigenvalues", "both_densities"}
    first = comparison.analyses[0]
    without = spectra.compare(first, dataclasses.replace(first, density=None))
    assert set(save_figures(without, tmp_path)) == {"both_eigenvalues"}


def test_a_trajectory_is_told_against_its_threshold(tmp_path):
    path = write_trajectory_page(trajectory(), tmp_path / "trajectory.html", title="over training")
    page = Page(path.read_text(encoding="utf-8"))
    assert page.scripts == [SCRIPT]
    assert len(page.images) == 1
    assert [text for *_, text in page.readings[0]] == [
        "step 0: 3 ± 0.0001",
        "step 10: 12 ± 0.0001",
        "step 20: 21 ± 0.0001",
    ]
    assert "sharpness from 3 ± 0.0001 at step 0 to 21 ± 0.0001 at step 20" in page.text
    assert "1.05 times the threshold 2 / lr = 20, above it in 1 of 3" in page.text
    assert "cost 21 products in 1.5 s" in page.text
    assert "Step 30 failed: NonFiniteError: the loss is nan" in page.text
    assert "not certified" in page.text
    assert "of a training set" in page.text
    assert page.row("10")[1:3] == ["w10.pt", "12 ± 0.0001*"]
    assert page.row("30")[1] == HOSTILE


def test_a_trajectory_without_a_sharpness_has_a_page(tmp_path):
    for one in (Trajectory(), Trajectory((Measurement(3, trace=1.5, trace_error=0.1),))):
        page = Page(write_trajectory_page(one, tmp_path / "p.html").read_text(encoding="utf-8"))
        assert page.images == []
        assert f"{len(one)} measurement" in page.text
    assert math.isnan(one[0].sharpness)


def test_pages_of_other_things_are_refused(comparison, tmp_path):
    with pytest.raises(ArgumentTypeError, match="got a Trajectory"):
        write_comparison_page(trajectory(), tmp_path / "p.html")
    with pytest.raises(ArgumentTypeError, match="got a Comparison"):
        write_trajectory_page(comparison, tmp_path / "p.html")
    assert not list(tmp_path.iterdir())
