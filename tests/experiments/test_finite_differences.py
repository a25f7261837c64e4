"""The experiment on finite differences runs, and its figures mean what they say."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from experiments.finite_differences.__main__ import EXPECTED, Problem, resolved


def test_on_a_relu_network_differences_are_far_worse_than_exact_products(tmp_path):
    pytest.importorskip("sklearn")
    program = [sys.executable, "-m", "experiments.finite_differences", "--fast", "--out", tmp_path]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["summary"].keys() == found["held"].keys() == EXPECTED.keys()
    assert found["summary"]["cnn float32 exact"] < 1e-5
    assert found["summary"]["cnn float32 differences"] > 0.01
    assert found["summary"]["cnn bf16 exact"] < 0.04
    assert (tmp_path / "finite_differences.png").stat().st_size > 0


def test_a_difference_is_the_product_where_the_loss_is_smooth_and_weights_come_back():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    data = [torch.randn(8, 3), torch.randn(8, 1)]
    problem = Problem(model, nn.MSELoss(), data, torch.float64)
    v = torch.randn(problem.hessian.shape[0], dtype=torch.float64)
    before = [p.detach().clone() for p in problem.parameters]
    difference = problem.difference(v, 1e-5)
    assert torch.allclose(difference, problem.exact(v), rtol=1e-6, atol=1e-8)
    assert all(map(torch.equal, before, problem.parameters))


def test_what_is_resolved_ends_at_the_first_direction_that_is_not():
    rows = [{"ratio": ratio, "e": e} for ratio, e in ((0.01, 0.0), (1.0, 0.05), (0.1, 0.2))]
    assert resolved(rows, "e") == 1.0
    rows[2]["e"] = 0.1
    assert resolved(rows, "e") == 0.01
