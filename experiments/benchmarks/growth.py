"""How do time and memory grow: with parameters, batches, the length of sequences, eigenpairs?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.benchmarks import answers, memory, timing
from experiments.benchmarks.peers import CONTESTANTS, SOLVERS
from experiments.benchmarks.workloads import Workload, cnn, digits, gpt

# One row of each package, its default.
GROWING = ["spectra", "plain, graph retained", "curvlinops", "hessian-eigenthings", "PyHessian"]
SIZES = {
    "n": [32, 512, 8192],
    "batches": [1, 4, 16],
    "length": [32, 96, 256],
    "k": [1, 5, 20, 40],
}


def by_n(cache: Path, *, size: int) -> Workload:
    """The digits MLP with a hidden layer of this width."""
    return digits(cache, hidden=size)


def by_batches(cache: Path, *, size: int) -> Workload:
    """The CNN with so many batches of 64."""
    return cnn(cache, samples=64 * size)


def by_length(cache: Path, *, size: int) -> Workload:
    """The GPT with sequences of this length, at its initial weights, which take as long."""
    return gpt(cache, length=size, steps=0)


WORKLOADS = {"growth n": by_n, "growth batches": by_batches, "growth length": by_length}


def curve(
    what: str, contestants: list[str], cache: Path, rounds: int, limit: float, *, few: bool
) -> list[dict[str, Any]]:
    """A product's time and a process's peak for each size; for "k", the time of k eigenpairs."""
    chosen = {name: CONTESTANTS[name] for name in GROWING if name in contestants}
    sizes = SIZES[what][:2] if few else SIZES[what]
    points = []
    for size in sizes:
        if what == "k":
            w = digits(cache)
            solvers = {name: make for name, make in chosen.items() if name in SOLVERS}
            found = answers.largest(w, solvers, size, rounds, limit)
        else:
            name = f"growth {what}"
            w = WORKLOADS[name](cache, size=size)
            w.products = 6
            found = timing.products(w, chosen, rounds, checked=False)
            peaks = memory.peaks(name, chosen, {"size": size}, cache, limit)
            points.append({"size": size, "n": w.n, "memory": peaks, "records": found})
            continue
        points.append({"size": size, "n": w.n, "records": found})
    return points
