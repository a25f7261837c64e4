"""The experiment on blocks runs, and its measures are right on spectra that are known."""

import json
import subprocess
import sys

import numpy as np
import pytest

from experiments.block_heterogeneity import __main__ as program


@pytest.mark.slow
def test_a_small_run_is_written_down(tmp_path):
    pytest.importorskip("sklearn")
    command = [sys.executable, "-m", "experiments.block_heterogeneity", "--fast", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    assert [(r["network"], r["state"], len(r["blocks"])) for r in found["runs"]] == [
        (network, state, blocks)
        for network, blocks in (("transformer", 9), ("CNN", 12))
        for state in ("at initialisation", "trained")
    ]
    for r in found["runs"]:
        # As many passes as one block takes, not one for each.
        assert r["passes"] <= 2 * (8 + 1)
        assert all(0 < r[name] < 1 for name in ("distance", "distance of shapes", "floor"))
    assert len(found["summary"]) == 2 * len(program.MEASURES)
    assert (tmp_path / "block_heterogeneity.png").stat().st_size > 0


def test_the_weights_of_queries_keys_and_values_are_blocks_of_their_own_and_the_same_network():
    import torch

    torch.manual_seed(0)
    apart = program.transformer(fast=True)
    whole = program.GPT(width=16, layers=1, heads=4, length=program.LENGTH)
    weights = dict(apart.named_parameters())
    parts = [weights.pop(f"blocks.0.qkv.parametrizations.weight.original{i}") for i in range(3)]
    whole.load_state_dict({**weights, "blocks.0.qkv.weight": torch.cat(parts)})
    tokens = torch.arange(20).reshape(2, 10)
    assert torch.equal(apart(tokens), whole(tokens))


def spectrum(*values):
    nodes = np.tile(np.array(values, dtype=float), (4, 1))
    return nodes, np.full_like(nodes, 1 / len(values))


def test_spectra_that_share_nothing_are_at_distance_one_and_equal_ones_at_zero():
    nodes, weights = zip(spectrum(1.0), spectrum(1.0), spectrum(1e-3), strict=True)
    found = program.measures(list(nodes), list(weights))
    distances = np.array(found["distances"])
    assert distances[0, 1] == 0
    assert distances[0, 2] == pytest.approx(1, abs=1e-6)
    # In units of their own they are the same.
    assert np.array(found["shapes"]).max() == 0
    assert found["scales"] == pytest.approx([1, 1, 1e-3], rel=1e-12)
    assert found["spread of scales"] == pytest.approx(np.std([0, 0, -3], ddof=1), rel=1e-12)
    assert found["distance"] == pytest.approx(2 / 3, abs=1e-4)
    assert program.floor(list(nodes), list(weights)) == 0


def test_half_of_a_spectrum_elsewhere_is_the_distance_of_its_formula():
    # p = (1/2, 1/2, 0), q = (1/2, 0, 1/2): divergence 1/2 in base 2, and its root is the distance.
    nodes, weights = zip(spectrum(1.0, 2e-3), spectrum(1.0, -2e-3), strict=True)
    [[_, found], _] = program.apart(list(nodes), list(weights), np.ones(2))
    assert found == pytest.approx(0.5**0.5, abs=1e-6)
