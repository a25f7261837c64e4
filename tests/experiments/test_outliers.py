"""The experiment on outliers runs, and counts a gap where there is one."""

import json
import subprocess
import sys

import numpy as np
import pytest

from experiments.outliers.__main__ import gap


@pytest.mark.slow
def test_four_classes_make_three_outliers_in_both_matrices(tmp_path):
    pytest.importorskip("sklearn")
    program = [sys.executable, "-m", "experiments.outliers", "--fast", "--out", tmp_path]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    [row] = found["summary"]
    assert row["gaps of H"] == row["gaps of G"] == [3]
    assert 0 <= row["shares"][0] <= 1
    assert row["norm of H - G over the last outlier"][0] < 1
    assert (tmp_path / "outliers.png").stat().st_size > 0


def test_a_gap_is_counted_from_the_largest_eigenvalue_on():
    values = np.array([100.0, 5.0, 4.0, 3.0, 0.1, 0.09, 0.08, 0.07, 0.06, 0.05])
    assert gap(values, 4) == 4
    assert gap(np.delete(values, 1), 4) == 3
