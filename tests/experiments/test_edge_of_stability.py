"""The experiment on the edge of stability runs, and gradient descent gets there."""

import json
import subprocess
import sys

import numpy as np
import pytest
from torch.optim import SGD

from experiments.edge_of_stability.__main__ import Setting, row_of, train


@pytest.mark.slow
def test_gradient_descent_gets_to_the_edge(tmp_path):
    pytest.importorskip("sklearn")
    program = [sys.executable, "-m", "experiments.edge_of_stability", "--fast", "--out", tmp_path]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    [row] = found["rows"]
    assert row["threshold"] == 2.0
    # It begins below, crosses, and stays near; what falls below 2 / η again has not diverged.
    assert row["values"][0] < 2.0
    assert row["reached"] is not None
    assert abs(row["over the threshold"] - 1) < 0.15
    assert max(np.divide(row["residuals"], row["values"])) < 0.011
    assert row["losses"][-1] < row["losses"][0]
    assert (tmp_path / "edge_of_stability.png").stat().st_size > 0


def test_the_same_seed_gives_the_same_numbers():
    pytest.importorskip("sklearn")
    setting = Setting("momentum", lambda p: SGD(p, lr=0.2, momentum=0.5), 40)
    first, second = (row_of(setting, 1, train(setting, 1, measurements=8)) for _ in range(2))
    assert first == second
    assert first["threshold"] == pytest.approx((2 + 2 * 0.5) / 0.2)
    assert first["steps"] == [5, 10, 15, 20, 25, 30, 35, 40]
