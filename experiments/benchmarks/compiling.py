"""What does compiling a product gain, what does it cost, and after how many does it pay?"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import spectra
from experiments.benchmarks.peers import gradient
from experiments.benchmarks.timing import quiet, seconds, settle, times_until_readable
from experiments.benchmarks.workloads import Workload

_AGAIN = """
import sys
from pathlib import Path
import torch
from experiments.benchmarks.compiling import compiled
from experiments.benchmarks.workloads import COMPILED
torch.set_num_threads(int(sys.argv[3]))
print(compiled(COMPILED[sys.argv[1]](Path(sys.argv[2])))[1]["seconds"])
"""


def gains(w: Workload, name: str, cache: Path, rounds: int, threads: int) -> dict[str, Any]:
    """Gradients for a product on a kept graph and compiled, in turns, and the seconds it costs.

    Compiled from nothing, and once more in a process that finds the code on disk.
    """
    import torch._inductor.config as inductor

    del inductor  # Imported here, so that it is not a part of what is timed.
    result: dict[str, Any] = {"kept": [], "compiled": []}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        try:
            fast, said = compiled(w)
            again = subprocess.run(
                [sys.executable, "-c", _AGAIN, name, str(cache), str(threads)],
                capture_output=True,
                check=True,
                text=True,
            )
        finally:
            del os.environ["TORCHINDUCTOR_CACHE_DIR"]
    result |= {"said": said, "again": float(again.stdout.split()[-1])}
    kept = operator(w)
    v = w.vector(1)
    for _ in range(3):
        kept @ v
    error = (kept @ v - fast @ v).norm() / (kept @ v).norm()
    result["error"] = float(error)
    repeats = times_until_readable(lambda: gradient(w))
    settle()
    for _ in range(rounds):
        before = seconds(lambda: gradient(w), repeats)
        slow_seconds = seconds(lambda: kept @ v, 3)
        middle = seconds(lambda: gradient(w), repeats)
        fast_seconds = seconds(lambda: fast @ v, 3)
        after = seconds(lambda: gradient(w), repeats)
        result["kept"].append(2 * slow_seconds / (before + middle))
        result["compiled"].append(2 * fast_seconds / (middle + after))
    return result


def compiled(w: Workload) -> tuple[spectra.HessianOperator, dict[str, Any]]:
    """An operator whose product is compiled, and what it says of that."""
    h = operator(w, compile=True)
    v = w.vector(0)
    with quiet():
        # The first builds the graph; compiling begins after half a minute of others.
        h @ v
        h @ v
        while "waits" in h.describe()["compiled"]:
            h @ v
    return h, h.describe()["compiled"]


def operator(w: Workload, **options: Any) -> spectra.HessianOperator:
    """Of one batch."""
    return spectra.HessianOperator(
        w.model, spectra.losses.supervised(w.criterion), w.batches, **options
    )
