"""Does a process that asks for eigenvalues a thousand times keep its size?

    python -m experiments.reliability.soak [calls]

Every call has an operator of its own, on kept graphs, as a training script that looks at its model
now and then has. Resident memory is read every 50 calls; the figures go to results/soak.json.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import spectra
from spectra import HessianOperator, losses
from spectra.objective.memory import held_bytes

WARM_UP, STEP = 100, 50
RESULTS = Path(__file__).parent / "results" / "soak.json"


def soak(calls: int) -> dict[str, Any]:
    """Resident bytes before and after, and in between."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 10)).eval()
    data = [(torch.randn(256, 32), torch.randint(10, (256,))) for _ in range(2)]
    loss = losses.supervised(nn.CrossEntropyLoss())
    resident, first, start = [], None, time.perf_counter()
    for call in range(calls):
        operator = HessianOperator(model, loss, data, graph="retained")
        pairs = spectra.eigsh(operator, k=1, seed=0)
        first = pairs.values if first is None else first
        assert (pairs.values == first).all(), "the same call gave another answer"
        if (call >= WARM_UP and call % STEP == 0) or call == calls - 1:
            resident.append(held_bytes(torch.device("cpu")))
    return {
        "calls": calls,
        "warm_up": WARM_UP,
        "parameters": operator.shape[0],
        "matvecs_each": pairs.matvecs,
        "seconds": round(time.perf_counter() - start, 1),
        "resident_bytes": resident,
        "growth": max(resident) / resident[0] - 1,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    """Run, print, and write the figures of a whole run."""
    calls = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    found = soak(calls)
    print(json.dumps(found))
    if len(sys.argv) == 1:
        RESULTS.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
