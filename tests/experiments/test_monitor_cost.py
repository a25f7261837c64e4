"""The program that measures what monitoring costs, with fewer steps."""

import json
from pathlib import Path

import pytest
import torch

from experiments.monitor_cost import __main__ as program
from experiments.monitor_cost import workloads

ROOT = Path(program.__file__).parent


@pytest.mark.parametrize("make", [workloads.digits, workloads.byte_gpt])
def test_every_measurement_is_within_the_tolerance_and_its_products_are_counted(make, monkeypatch):
    pytest.importorskip("sklearn" if make is workloads.digits else "transformers")
    monkeypatch.setattr(program, "EVERY", 4)
    row = program.cost(make, {"record": ()}, 2)
    assert row["converged"]
    assert row["largest relative residual"] <= program.TOL
    assert len(row["matvecs"]) == 2
    # The search, and the product that measures the residual.
    assert min(row["matvecs"]) >= 2


def test_starts_are_compared_at_the_same_weights(monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(program, "EVERY", 4)
    found = program.starts(workloads.digits, 3)
    counts = {name: len(row["matvecs"]) for name, row in found.items()}
    assert counts == {
        "random": 3,
        "gradient": 3,
        "last eigenvector": 2,
        "last eigenvector + random": 2,
    }
    assert max(max(row["relative error"]) for row in found.values()) < 0.01


def test_the_published_numbers_say_that_the_claim_held():
    results = json.loads((ROOT / "results.json").read_text("utf-8"))
    assert results["held"]
    for name in ("digits MLP, full batch", "byte-level GPT-2"):
        row = results[name]["cost"]["λ_max"]
        assert row["cost"] <= results["claimed"]
        assert row["largest relative residual"] <= results["tol"]
    assert f"{results['digits MLP, full batch']['cost']['λ_max']['cost']:.0%}" == "26%"


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
