"""The experiment on batch norm runs, and its networks are what they are said to be."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from experiments.batch_norm.__main__ import Residual, operator


@pytest.mark.slow
def test_both_networks_are_measured_in_every_setting(tmp_path):
    pytest.importorskip("sklearn")
    program = [sys.executable, "-m", "experiments.batch_norm", "--fast", "--out", tmp_path]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    assert [row["setting"] for row in found["rows"]] == ["without", "running", "batch"]
    assert all(row["converged"] for row in found["rows"])
    assert all(0 <= row["share"] <= 1 and row["ratio"] >= 1 for row in found["rows"])
    assert (tmp_path / "batch_norm.png").stat().st_size > 0


@pytest.mark.parametrize("setting", ["running", "batch"])
def test_statistics_of_the_batch_are_differentiated_and_running_ones_are_not(setting):
    torch.manual_seed(0)
    model = Residual(norm=True).double()
    batch = torch.randn(9, 1, 3, 3, dtype=torch.float64), torch.randint(10, (9,))
    model(batch[0])
    H = operator(model, setting, batch)
    parameters = dict(model.named_parameters())

    def loss(values):
        names = [*parameters]
        outputs = torch.func.functional_call(model, dict(zip(names, values, strict=True)), batch[0])
        return torch.nn.functional.cross_entropy(outputs, batch[1])

    buffers = {name: b.clone() for name, b in model.named_buffers()}
    flat = torch.cat([p.detach().flatten() for p in parameters.values()])
    sizes = [p.numel() for p in parameters.values()]

    def of_flat(v):
        parts = v.split(sizes)
        return loss([a.view_as(p) for a, p in zip(parts, parameters.values(), strict=True)])

    chosen = torch.randn(len(flat), dtype=torch.float64)
    product = torch.autograd.functional.hvp(of_flat, flat, chosen)[1]
    for name, b in model.named_buffers():
        b.copy_(buffers[name])
    np.testing.assert_allclose(H @ chosen, product, rtol=1e-9, atol=1e-12)
    # A scale of the weights before batch norm changes nothing where it takes its own statistics.
    weight = H.space.unflatten(torch.zeros_like(flat))
    weight["convolutions.0.weight"] = parameters["convolutions.0.weight"].detach()
    slope = abs(float(H.space.flatten(weight) @ H.gradient()))
    scale_free = slope < 1e-4 * float(H.gradient().norm())
    assert scale_free == (setting == "batch")
