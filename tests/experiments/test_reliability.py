"""The programs that kill runs and damage files do what their figures say."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import spectra
from experiments.reliability.kill_and_resume import identical


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked")
def test_runs_that_are_killed_end_with_the_same_bits(tmp_path):
    pytest.importorskip("sklearn")
    out = tmp_path / "kills.json"
    program = [sys.executable, "-m", "experiments.reliability.kill_and_resume"]
    done = subprocess.run(
        [*program, "--kills", "8", "--out", str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())
    assert sum(row["kills"] for row in rows) == 8
    assert all(row["completed"] >= 1 and row["different"] == 0 for row in rows)


def test_results_that_differ_in_a_bit_are_told_apart():
    one = spectra.Estimate("trace", 1.0, 0.1, samples=np.array([0.5, np.nan]))
    other = spectra.Estimate("trace", 1.0, 0.1, samples=np.array([0.5, np.nan]))
    assert identical(one, other)
    other.samples[0] = np.nextafter(0.5, 1)
    assert not identical(one, other)
    assert not identical(one, spectra.Estimate("trace", 1.0, float("nan")))
    assert identical(float("nan"), float("nan"))
    assert not identical(torch.ones(2), torch.ones(2) + 1e-7)
