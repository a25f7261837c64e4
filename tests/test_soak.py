"""Nothing is left behind: no cycle of references, and no memory after a thousand calls."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import spectra
from spectra import HessianOperator, losses
from tests.cases.networks import StackedGPT

ROOT = Path(__file__).parent.parent
QUESTIONS = {
    "construction": lambda H: None,
    "product": lambda H: H @ np.ones(H.shape[0]),
    "value": HessianOperator.value,
    "gradient": HessianOperator.gradient,
    "block": lambda H: H.block("*.0.norm1.*").to_dense(),
    "eigsh": lambda H: spectra.eigsh(H, k=2),
    "trace": spectra.trace,
    "density": spectra.spectral_density,
    "diagonal": lambda H: spectra.diagonal(H, probes=4),
    "norm": spectra.norm,
    "analyze": lambda H: spectra.analyze(H, k=2),
    "check": spectra.check,
    "landscape": lambda H: spectra.landscape(H, points=3),
    "all blocks": lambda H: H.blocks().each(spectra.eigsh, k=1),
    "coupling": lambda H: spectra.block_coupling(H, "module", probes=2),
}
MODES = {
    "retained": {"graph": "retained"},
    "fresh": {"graph": "fresh"},
    "recomputed": {"recompute": "blocks.*"},
    "in another dtype": {"compute_dtype": torch.float64},
    "microbatches": {"microbatch": 1},
}


def cyclic_garbage(life):
    """What only the collector of cycles finds after a life, of tensors and of spectra's objects."""
    life()
    gc.collect()
    gc.disable()
    try:
        gc.set_debug(gc.DEBUG_SAVEALL)
        life()
        gc.collect()
        return [kind for thing in gc.garbage if (kind := kind_of(thing))]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def kind_of(thing):
    # SciPy's brentq wraps its function in a cycle: functions do not count, what they hold does.
    if isinstance(thing, Tensor | np.ndarray | nn.Module):
        return type(thing).__name__
    return type(thing).__name__ if type(thing).__module__.startswith("spectra") else None


def life_of(question, options, kind=HessianOperator):
    def life():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = StackedGPT(2, width=4).double().eval()
        tokens = torch.arange(10).view(2, 5) % 7
        question(kind(model, losses.causal_lm(), [{"input_ids": tokens}], "blocks.*", **options))

    return life


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_leaves_no_cycle_of_references(question):
    assert cyclic_garbage(life_of(QUESTIONS[question], {})) == []


@pytest.mark.parametrize("mode", ["retained", "fresh", "recomputed"])
def test_a_linearised_model_leaves_no_cycle_of_references(mode):
    life = life_of(QUESTIONS["eigsh"], MODES[mode], spectra.GaussNewtonOperator)
    assert cyclic_garbage(life) == []


@pytest.mark.parametrize("mode", MODES)
def test_a_product_leaves_no_cycle_of_references_in_any_mode(mode):
    assert cyclic_garbage(life_of(QUESTIONS["product"], MODES[mode])) == []


def test_a_product_that_is_refused_leaves_no_cycle_of_references():
    def life():
        operator = HessianOperator(
            nn.Linear(2, 1), losses.supervised(nn.MSELoss()), [(torch.ones(1, 3), torch.ones(1))]
        )
        with pytest.raises(spectra.errors.LossError):
            operator @ np.ones(3)

    assert cyclic_garbage(life) == []


@pytest.mark.slow
def test_a_thousand_calls_leave_the_process_as_large_as_it_was():
    command = [sys.executable, "-m", "experiments.reliability.soak", "1000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert found["growth"] < 0.01, found["resident_bytes"]


def test_the_committed_figures_are_flat():
    path = ROOT / "experiments" / "reliability" / "results" / "soak.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["calls"] == 1000
    assert found["growth"] < 0.01
