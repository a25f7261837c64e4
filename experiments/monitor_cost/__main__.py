"""What does it cost to monitor the sharpness, and what does a warm start save?

    python -m experiments.monitor_cost [--quick] [--out results.json]

Stretches of 50 training steps without and with a measurement at their end take turns in one
process, on one thread; the cost is the median of those with over the median of those without.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import spectra
from experiments.monitor_cost.workloads import Workload, byte_gpt, digits
from spectra.analysis.measurement import measure
from spectra.results import versions

EVERY = 50
CLAIMED = 0.30
TOL = 1e-2

# What is measured: alone the top eigenvalue, with what comes with it by default, certified, cold.
SETTINGS: dict[str, dict[str, Any]] = {
    "λ_max": {"record": ()},
    "λ_max, loss, gradient, rotation (the default)": {},
    "λ_max, certified": {"record": (), "certify": True},
    "λ_max, cold start": {"record": (), "warm": False},
}


def stretch(work: Workload, monitor: spectra.CurvatureMonitor | None, step: int) -> float:
    """Seconds of 50 training steps, and of a measurement on the last batch with a monitor."""
    start = time.perf_counter()
    for _ in range(EVERY):
        batch = work.step()
    if monitor is not None:
        monitor.step(step, batch)
    return time.perf_counter() - start


def cost(make: Callable[[], Workload], settings: dict[str, Any], stretches: int) -> dict[str, Any]:
    """The share of the training time that a measurement every 50 steps adds."""
    work = make()
    work.model.train()
    monitor = spectra.CurvatureMonitor(
        work.model, work.loss, None, work.optimizer, tol=TOL, **settings
    )
    # The first one looks at the memory, and starts cold.
    stretch(work, monitor, 0)
    without, measured = [], []
    for i in range(stretches):
        without.append(stretch(work, None, 0))
        measured.append(stretch(work, monitor, 1 + i))
    found = list(monitor.trajectory)[1:]
    return {
        "seconds of 50 steps": statistics.median(without),
        "cost": statistics.median(measured) / statistics.median(without) - 1,
        "cost in total": sum(measured) / sum(without) - 1,
        "matvecs": [sum(m.matvecs.values()) for m in found],
        "matvecs of the first": sum(monitor.trajectory[0].matvecs.values()),
        "largest relative residual": max(m.sharpness_residual / m.sharpness for m in found),
        "converged": all(m.sharpness_converged for m in found),
    }


def starts(make: Callable[[], Workload], measurements: int) -> dict[str, Any]:
    """Products that a search takes from each start, at the same weights, and its error."""
    work = make()
    found: dict[str, dict[str, list[float]]] = {}
    before = None
    for i in range(measurements):
        for _ in range(EVERY):
            batch = work.step()
        work.model.eval()
        H = spectra.HessianOperator(work.model, work.loss, [batch])
        exact = spectra.eigsh(H, 1, which="LA", tol=1e-5, seed=i, progress=False)
        search = functools.partial(
            spectra.eigsh, H, 1, which="LA", tol=TOL, seed=i, certify=False, progress=False
        )
        answers = {"random": search(), "gradient": search(v0=H.gradient())}
        if before is not None:
            warm = measure(H, i, record=(), tol=TOL, certify=False, seed=i, previous=before)
            pairs = search(v0=before.vectors)
            answers["last eigenvector"] = pairs
            _note(
                found,
                "last eigenvector + random",
                warm.matvecs["eigenpairs"],
                warm.sharpness,
                exact,
            )
        for name, pairs in answers.items():
            _note(found, name, pairs.matvecs, pairs.values[0], exact)
        before = measure(H, i, record=(), tol=TOL, seed=i)
        H.release()
        work.model.train()
    return found


def _note(found: dict[str, Any], name: str, matvecs: int, value: float, exact: Any) -> None:
    row = found.setdefault(name, {"matvecs": [], "relative error": []})
    row["matvecs"].append(matvecs)
    row["relative error"].append(float(abs(value / exact.values[0] - 1)))


def main() -> None:
    """Measure, print a table, write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few stretches: a minute")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"every": EVERY, "tol": TOL, "claimed": CLAIMED}
    for make, most in ((digits, 20), (byte_gpt, 6)):
        count = 3 if options.quick else most
        name = make().name
        results[name] = {"cost": {}, "starts": starts(make, count)}
        print(name)
        for setting, chosen in SETTINGS.items():
            row = results[name]["cost"][setting] = cost(make, chosen, count)
            print(
                f"  {setting:48} {row['cost']:6.1%} ({row['cost in total']:.1%} in total), "
                f"{statistics.median(row['matvecs']):g} matvecs ({min(row['matvecs'])} to "
                f"{max(row['matvecs'])}), residual <= {row['largest relative residual']:.1e}"
            )
        for start, row in results[name]["starts"].items():
            print(
                f"  from {start:43} {np.mean(row['matvecs']):6.2f} matvecs on average, "
                f"largest error {max(row['relative error']):.1e}"
            )
    results["held"] = all(
        results[name]["cost"]["λ_max"]["cost"] <= CLAIMED
        and results[name]["cost"]["λ_max"]["largest relative residual"] <= TOL
        for name in (digits().name, byte_gpt().name)
    )
    results["versions"] = versions()
    print("held" if results["held"] else "did not hold")
    options.out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
