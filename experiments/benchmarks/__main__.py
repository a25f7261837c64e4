"""How fast is spectra beside the packages that do the same? Run all of it, or a part.

    python -m experiments.benchmarks --quick
    python -m experiments.benchmarks --only "gpt/*"

writes `results.json`, `benchmarks.md` and `figures/benchmarks.png` into `bench-run`. Packages that
are not installed are left out, and named.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

TASKS = [
    "products",
    "top 1",
    "top 10",
    "top 10 of many",
    "trace",
    "density",
    "analysis",
    "profile",
    "memory",
]
HEAVY = "minilm"  # of which a product takes a second
# Seconds for an answer, where a product takes long; elsewhere the limit of a part.
LIMITS = {"cnn": 60.0, "gpt": 120.0, HEAVY: 400.0}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the results after every part, and draw them up."""
    options = parser().parse_args(arguments)
    # Before torch is imported: its thread pool reads this once.
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    # landscaper draws progress bars, and offers no other way to switch them off.
    os.environ["TQDM_DISABLE"] = "1"
    import torch

    from experiments.benchmarks import tables
    from experiments.benchmarks.growth import SIZES
    from experiments.benchmarks.workloads import COMPILED, TINY, WORKLOADS

    torch.set_num_threads(options.threads)
    bound_memory()
    workloads = TINY if options.tiny else WORKLOADS
    results = {"machine": machine(options.threads), "quick": options.quick, "parts": []}
    results["note"] = options.note
    options.out.mkdir(parents=True, exist_ok=True)
    parts = [(name, task) for name in workloads for task in TASKS]
    parts += [(name, "compiling") for name in ([] if options.tiny else COMPILED)]
    parts += [("growth", what) for what in SIZES]
    begun = time.perf_counter()
    for name, task in parts:
        if not wanted(name, task, options):
            continue
        say(f"{time.perf_counter() - begun:6.0f} s  {name}/{task}")
        before = time.perf_counter()
        results["parts"].append(part(name, task, options, results["parts"]))
        results["parts"][-1]["seconds"] = round(time.perf_counter() - before, 1)
        results["seconds"] = round(time.perf_counter() - begun)
        (options.out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    tables.write(results, options.out)
    say(f"Wrote results.json, benchmarks.md and figures/benchmarks.png in {options.out}")
    return 0


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks", description=__doc__.split("\n", maxsplit=1)[0]
    )
    result.add_argument("--quick", action="store_true", help="small workloads, few rounds")
    result.add_argument(
        "--only",
        action="append",
        metavar="WORKLOAD/TASK",
        help='a glob such as "digits/*", "*/products", "growth/n"; may be repeated',
    )
    result.add_argument("--out", type=Path, default=Path("bench-run"), help="folder (bench-run)")
    result.add_argument("--note", default="", help="what else a reader of the page has to know")
    # One: threads that wait for a core that something else uses would be most of what is measured.
    result.add_argument("--threads", type=int, default=1, help="of PyTorch (1)")
    # For the test of this program: a network that takes no time.
    result.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    return result


def wanted(name: str, task: str, options: argparse.Namespace) -> bool:
    """Whether this part is to be run."""
    if options.only:
        return any(fnmatch(f"{name}/{task}", pattern) for pattern in options.only)
    if options.quick:
        return name == "digits" or (name, task) in {("cnn", "products"), ("gpt", "products")}
    return True


def part(
    name: str, task: str, options: argparse.Namespace, earlier: list[dict[str, Any]]
) -> dict[str, Any]:
    """One workload and task, with all contestants."""
    from experiments.benchmarks import answers, compiling, growth, memory, profile, timing
    from experiments.benchmarks.peers import CONTESTANTS, SOLVERS
    from experiments.benchmarks.workloads import COMPILED, TINY, WORKLOADS, Missing

    cache, workloads = options.out / "weights", {**COMPILED, **WORKLOADS, **TINY}
    heavy = name == HEAVY
    rounds, limit = (2, 8.0) if options.quick else (2, 60.0) if heavy else (5, 12.0)
    result: dict[str, Any] = {"workload": name, "task": task}
    if name == "growth":
        limit = max(limit, 60.0)
        result["points"] = growth.curve(
            task, list(CONTESTANTS), cache, min(rounds, 3), limit, few=options.quick
        )
        return result
    try:
        w = workloads[name](cache, many=task.endswith("of many"))
    except (Missing, ImportError) as error:
        return {**result, "failure": timing.first_line(error)}
    result["description"] = w.describe()
    solvers = {key: CONTESTANTS[key] for key in SOLVERS}
    if task not in {"products", "memory"}:
        rounds = min(rounds, 1 if heavy else 3)
        limit = limit if options.quick else LIMITS.get(name, limit)
        result["limit"] = limit
    if task == "products":
        many = workloads[name](cache, many=True)
        result["records"] = timing.products(w, CONTESTANTS, rounds, budget=limit)
        # To see who is right; or once.
        few = 0 if options.quick and name in {"cnn", "gpt"} else 1 if heavy else rounds
        result["many"] = timing.products(many, CONTESTANTS, few, budget=limit)
        result["many_description"] = many.describe()
    elif task == "memory":
        chosen = growth.GROWING if options.quick or heavy else memory.MEASURED
        result["records"] = memory.peaks(name, chosen, {}, cache, 120.0)
        if not (options.quick or heavy):
            result["many"] = memory.peaks(name, chosen, {"many": True}, cache, 120.0)
    elif task.startswith("top"):
        count = int(task.split()[1])
        result["records"] = answers.largest(w, solvers, count, rounds, limit)
    elif task == "trace":
        result |= answers.trace(w, solvers, rounds, limit)
    elif task == "density":
        w = w.double() if w.n <= answers.SMALL else w
        exact = answers.eigenvalues(w) if w.n <= answers.SMALL else None
        result["records"] = answers.density(w, solvers, rounds, limit, exact)
    elif task == "profile":
        result["records"] = profile.answers(w, rounds)
    elif task == "compiling":
        result["record"] = compiling.gains(w, name, cache, rounds, options.threads)
    else:
        settings = settings_found(earlier, name, list(solvers))
        reference = reference_found(earlier, name)
        result["records"] = answers.analysis(
            w, solvers, settings, reference, rounds=rounds, limit=limit
        )
    return result


def settings_found(
    earlier: list[dict[str, Any]], name: str, contestants: list[str]
) -> dict[str, dict[str, Any]]:
    """What reached the accuracy in the earlier parts of this run, None where nothing did."""
    needed = ("top 10", "trace", "density")
    found = {key: dict.fromkeys(needed) for key in contestants}
    for part in earlier:
        if part["workload"] == name and part["task"] in needed:
            for record in part.get("records", []):
                if "failure" not in record:
                    found[record["contestant"]][part["task"]] = record["setting"]
    return found


def reference_found(earlier: list[dict[str, Any]], name: str) -> float | None:
    """The trace that the earlier part held its answers against."""
    mine = (part for part in earlier if part["workload"] == name and "failure" not in part)
    found = [part["reference"]["value"] for part in mine if "reference" in part]
    return found[-1] if found else None


def machine(threads: int) -> dict[str, Any]:
    """Whatever the times depend on."""
    from experiments.benchmarks.peers import DISTRIBUTIONS

    versions = {name: installed(name) for name in DISTRIBUTIONS}
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "system": platform.system(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions,
    }


def installed(distribution: str) -> str | None:
    """Its version."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def processor() -> str:
    """The model of the CPU, as the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def bound_memory() -> None:
    """Whoever asks for more memory than most of what is free is told so, and fails alone.

    Else the system ends the run. Sketches of the parameters' length may take that much.
    """
    try:
        import resource

        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (int(0.8 * 1024 * kilobytes), most))
    except (ImportError, OSError, StopIteration, ValueError):
        say("The memory of this run is not bounded here.")


def say(text: str) -> None:
    """Progress, for whoever waits."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
