"""How much memory does a product take? The peak of a fresh process, contestant by contestant.

The peak resident set counts what the kernel gave the process: weights, graphs, and what importing
the package took. Linux's `ru_maxrss` would be the parent's where that was larger, because it
outlives `exec`; so there the peak is read from `/proc`. One such process is

    python -m experiments.benchmarks.memory WORKLOAD CONTESTANT OPTIONS FOLDER_OF_WEIGHTS
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

GRADIENT = "gradient"  # what the others are compared with

# One row for each way to hold the graphs; a process each takes seconds.
MEASURED = [
    "spectra",
    "spectra, fresh",
    "plain, graph rebuilt",
    "plain, graph retained",
    "curvlinops",
    "hessian-eigenthings",
    "PyHessian",
    "landscaper, cached",
    "BackPACK",
]


def peaks(
    workload: str, contestants: Iterable[str], options: dict[str, Any], cache: Path, limit: float
) -> list[dict[str, Any]]:
    """MiB of three products of each contestant, and of a gradient; failures as their first line."""
    records = []
    for name in [GRADIENT, *contestants]:
        command = [sys.executable, "-W", "ignore", "-m", __name__, workload, name]
        command += [json.dumps(options), str(cache)]
        record: dict[str, Any] = {"contestant": name}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=limit, check=False
            )
            record.update(json.loads(done.stdout.strip().splitlines()[-1]))
        except subprocess.TimeoutExpired:
            record["failure"] = f"more than {limit:g} s"
        except (IndexError, json.JSONDecodeError):
            record["failure"] = (done.stderr.strip().splitlines() or ["no answer"])[-1][:160]
        records.append(record)
    return records


def measure(workload: str, contestant: str, options: dict[str, Any], cache: Path) -> dict[str, Any]:
    """In this process: its peak before anything was differentiated, and after three products."""
    import torch

    from experiments.benchmarks import growth, peers, timing, workloads

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    w = {**workloads.WORKLOADS, **workloads.TINY, **growth.WORKLOADS}[workload](cache, **options)
    make = {**peers.CONTESTANTS, GRADIENT: peers.plain_gradient}[contestant]
    before = resident()
    v = w.vector(0)
    try:
        with timing.quiet(), timing.opened(make, w) as tools:
            for _ in range(3):
                tools.hvp(v)
            return {"before": before, "peak": resident()}
    except Exception as error:
        return {"failure": timing.first_line(error)}


def resident() -> float:
    """Peak resident set so far, MiB."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:3], json.loads(sys.argv[3]), Path(sys.argv[4]))))
