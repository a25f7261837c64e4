"""Does a damaged file ever crash a loader, or load as something else?

    python -m experiments.reliability.fuzz_loaders                    # 100,000 files
    python -m experiments.reliability.fuzz_loaders --files 2000 --out /tmp/fuzz.json

writes `experiments/reliability/results/fuzz.json`. Each mutated file must be refused with a
StorageError, or load as exactly what was saved. Where no checksum can tell (format 1 has none, and
a forger computes it anew) other values may load, but nothing else may be raised. The files lie in
memory (/dev/shm). Loaders run in processes of their own, which say at which seed they are: where
one dies, that seed is a crash, and the next process goes on behind it.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import hashlib
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import spectra
from experiments.reliability import mutations
from experiments.reliability.mutations import Files
from spectra.analysis.storage import read_run, read_summary, write_run
from spectra.documents import sealed, to_bytes
from spectra.errors import StorageError
from spectra.operators.base import MatrixOperator
from spectra.results import Result

RESULTS = Path(__file__).parent / "results" / "fuzz.json"
# Files that one process loads: after this many it is replaced, which takes three seconds.
CHUNK = 20_000
# Seconds after which a load counts as hanging.
PATIENCE = 20.0


class Target(NamedTuple):
    """A loader: `make` writes the files of one of several results, `load` reads them.

    `checked`: the files hold checksums. `seal`: computes them anew after a mutation.
    """

    name: str
    make: Callable[[Path, int], Any]
    load: Callable[[Path], Any]
    checked: bool = True
    seal: Callable[[Files], Files] | None = None


# --- targets --------------------------------------------------------------------------------------


def save_result(directory: Path, which: int) -> None:
    """A result with arrays of several kinds, nested results, and odd numbers."""
    generator = np.random.default_rng(which)
    pairs = spectra.Eigenpairs(
        values=generator.normal(size=3),
        vectors=torch.from_numpy(generator.normal(size=(7, 3))).bfloat16(),
        residuals=np.array([0.0, np.nan, np.inf]),
        converged=np.array([True, False, True]),
        matvecs=which,
        which="LM",
        tol=1e-3,
        provenance={"λ «»": (1, 2.5, None, float("nan")), "seed": which, "kind": "Estimate"},
    )
    spectra.Analysis(
        eigenpairs=pairs,
        spectral_norm=spectra.Estimate("spectral norm", 2.0 + which, 0.0, bounds=(1.0, np.inf)),
        trace=spectra.Estimate("trace", 0.1 + which, -0.0, samples=generator.normal(size=5)),
        notes=("\x1b[31m", "\ud800"),
    ).save(directory / "r")


def save_scalar(directory: Path, which: int) -> None:
    """A result whose arrays are empty: two small files."""
    spectra.Estimate("norm", 1.5 + which, 0.25).save(directory / "r")


def save_run(directory: Path, which: int) -> None:
    """A run directory."""
    analysis = spectra.analyze(
        np.diag(np.arange(1.0, 8.0) + which), k=2, steps=4, probes=2, progress=False
    )
    write_run(analysis, directory, title=f"run {which}", source={"which": which})


def save_format_1(directory: Path, which: int) -> None:
    """As version 0.1 wrote it."""
    save_result(directory, which)
    path = directory / "r.json"
    document = json.loads(path.read_bytes())
    for name in ("checksum", "arrays_sha256"):
        del document[name]
    path.write_bytes(json.dumps({**document, "format": 1}).encode())


def forged(files: Files) -> Files:
    """The files with the checksums of what they say now."""
    found = dict(files)
    for document, member, named in (
        ("r.json", "arrays_sha256", "r.safetensors"),
        ("analysis.json", "arrays_sha256", "analysis.safetensors"),
        # Last, as it names the checksum of the one before.
        ("run.json", "analysis_checksum", "analysis.json"),
    ):
        with contextlib.suppress(ValueError, TypeError, LookupError, RecursionError):
            content = json.loads(found[document])
            del content["checksum"]
            if member == "arrays_sha256":
                content[member] = hashlib.sha256(found[named]).hexdigest()
            else:
                content[member] = json.loads(found[named])["checksum"]
            found[document] = to_bytes(sealed(content))
    return found


def load_result(directory: Path) -> Any:
    """The result."""
    return spectra.load(directory / "r")


def load_run(directory: Path) -> Any:
    """Summary and analysis."""
    return read_summary(directory), read_run(directory)


class Mortal(MatrixOperator):
    """A matrix of which few products can be had."""

    def __init__(self, products: int) -> None:
        super().__init__(torch.diag(torch.arange(1.0, 10.0, dtype=torch.float64) ** 2))
        self._left = products

    def _products(self, rows: torch.Tensor) -> torch.Tensor:
        self._left -= len(rows)
        if self._left < 0:
            raise KeyboardInterrupt
        return super()._products(rows)


def question(products: int, checkpoint: Path) -> Result:
    """A search whose basis is restarted."""
    H = Mortal(products)
    return spectra.eigsh(H, k=2, ncv=5, tol=1e-9, progress=False, checkpoint=checkpoint)


def save_checkpoint(directory: Path, which: int) -> None:
    """The checkpoint of a run that died soon, or later."""
    with contextlib.suppress(KeyboardInterrupt):
        question(9 + 7 * which, directory / "checkpoint")


def go_on(directory: Path) -> Result:
    """The result of the run that goes on, whatever it finds: all of it, or what is not torn off."""
    found: Any = question(10**6, directory / "checkpoint")
    return replace(found, notes=tuple(note for note in found.notes if "cut off" not in note))


# A further loader is one more line here.
TARGETS = (
    Target("result", save_result, load_result),
    Target("result, empty arrays", save_scalar, load_result),
    Target("run directory", save_run, load_run),
    Target("result of format 1", save_format_1, load_result, checked=False),
    Target("result, forged", save_result, load_result, checked=False, seal=forged),
    Target("checkpoint", save_checkpoint, go_on),
    Target("run directory, forged", save_run, load_run, checked=False, seal=forged),
)


# --- one file -------------------------------------------------------------------------------------

ALLOWED = frozenset({"refused", "the same", "the other, whole", "other values"})


class Case:
    """A target with the files of two of its results."""

    def __init__(self, target: Target, directory: Path) -> None:
        self.target, self.directory = target, directory
        self.files, self.other = (self._made(which) for which in (0, 1))
        self.place = directory / "mutated"
        self.place.mkdir()
        self.expected, self.foreign = (self._loaded(files) for files in (self.files, self.other))

    def _made(self, which: int) -> Files:
        place = self.directory / str(which)
        place.mkdir()
        self.target.make(place, which)
        return {path.name: path.read_bytes() for path in sorted(place.iterdir())}

    def _loaded(self, files: Files) -> Any:
        self.write(files)
        return fingerprint(self.target.load(self.place))

    def write(self, files: Files) -> None:
        """The files, and no others, in the directory of the loader."""
        for path in self.place.iterdir():
            path.unlink()
        for name, content in files.items():
            (self.place / name).write_bytes(content)

    def mutated(self, generator: random.Random) -> tuple[str, Files]:
        """The names of mutations, and files that are neither of the two results'."""
        while True:
            name, files = mutations.mutate(self.files, self.other, generator)
            if self.target.seal is not None:
                files = self.target.seal(files)
            if files != self.files and any(
                self.other.get(key) != value for key, value in files.items()
            ):
                return name, files

    def verdict(self, seed: int) -> tuple[str, str]:
        """What comes of a mutation, and which it was."""
        name, files = self.mutated(random.Random(f"{self.target.name} {seed}"))
        return self.judged(files), name

    def judged(self, files: Files) -> str:
        """What the loader makes of files."""
        try:
            found = self._loaded(files)
        except StorageError:
            return "refused"
        except Exception as error:
            return f"raised {type(error).__name__}"
        if found == self.expected:
            return "the same"
        # Where all that differs between the two results was taken from the other one.
        if found == self.foreign:
            return "the other, whole"
        return "WRONG" if self.target.checked else "other values"


def fingerprint(value: Any) -> Any:
    """Tuples that are equal for values that are equal in type, dtype, order and every bit."""
    kind = type(value).__name__
    if isinstance(value, Result):
        return kind, [(f.name, fingerprint(getattr(value, f.name))) for f in fields(value)]
    if isinstance(value, torch.Tensor):
        content = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return kind, str(value.dtype), tuple(value.shape), content
    if isinstance(value, np.ndarray):
        return kind, str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, dict):
        return kind, [(key, fingerprint(item)) for key, item in value.items()]
    if isinstance(value, tuple | list):
        return kind, [fingerprint(item) for item in value]
    # nan is nan, and -0.0 is not 0.0.
    return kind, repr(value)


# --- many files -----------------------------------------------------------------------------------


def work(target: Target, first: int, count: int, progress: Path) -> dict[str, Any]:
    """Verdicts on the seeds from `first` on; the seed in hand is always in the file `progress`."""
    faulthandler.enable()
    verdicts: Counter[str] = Counter()
    by_mutation: Counter[str] = Counter()
    failures, slowest = [], 0.0
    with tempfile.TemporaryDirectory(dir=_memory()) as directory, progress.open("wb") as file:
        case = Case(target, Path(directory))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for seed in range(first, first + count):
            os.pwrite(file.fileno(), f"{seed:12d}".encode(), 0)
            # Kills the process and says where, if the loader waits for something.
            faulthandler.dump_traceback_later(PATIENCE, exit=True)
            start = time.perf_counter()
            verdict, name = case.verdict(seed)
            slowest = max(slowest, time.perf_counter() - start)
            verdicts[verdict] += 1
            for part in set(name.split("+")):
                by_mutation[part] += 1
            if verdict not in ALLOWED:
                failures.append({"seed": seed, "mutations": name, "verdict": verdict})
        faulthandler.cancel_dump_traceback_later()
    return {
        "verdicts": dict(verdicts),
        "mutations": dict(by_mutation),
        "failures": failures,
        "slowest_ms": 1e3 * slowest,
        "memory_growth_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
    }


def run(target: Target, count: int) -> dict[str, Any]:
    """Verdicts on `count` files, in processes that may die."""
    start = time.perf_counter()
    todo = [(first, min(first + CHUNK, count)) for first in range(0, count, CHUNK)]
    total: dict[str, Any] = {"verdicts": Counter(), "mutations": Counter(), "failures": []}
    slowest = growth = 0.0
    with tempfile.TemporaryDirectory(dir=_memory()) as directory:
        progress = Path(directory) / "seed"
        while todo:
            first, end = todo.pop()
            command = [sys.executable, "-m", __spec__.name, "--work", target.name]
            command += [str(first), str(end - first), str(progress)]
            progress.unlink(missing_ok=True)
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                # Where it died at once there is no seed, and something else is wrong.
                last = int(progress.read_text())
                failure = f"the process ended with status {done.returncode}"
                total["failures"].append({"seed": last, "mutations": "", "verdict": failure})
                todo += [part for part in ((first, last), (last + 1, end)) if part[0] < part[1]]
                continue
            found = json.loads(done.stdout)
            total["verdicts"].update(found["verdicts"])
            total["mutations"].update(found["mutations"])
            total["failures"] += found["failures"]
            slowest = max(slowest, found["slowest_ms"])
            growth = max(growth, found["memory_growth_mib"])
    return {
        "target": target.name,
        "checksums": target.checked,
        "files": count,
        **total,
        "slowest_ms": round(slowest, 1),
        "memory_growth_mib": round(growth, 1),
        "seconds": round(time.perf_counter() - start, 1),
    }


def _memory() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def main() -> int:
    """Run all targets, print a line for each, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        name, first, count, progress = arguments.work
        target = next(target for target in TARGETS if target.name == name)
        print(json.dumps(work(target, int(first), int(count), Path(progress))))
        return 0
    found = []
    for i, target in enumerate(TARGETS):
        share = arguments.files * (i + 1) // len(TARGETS) - arguments.files * i // len(TARGETS)
        found.append(run(target, share))
        line = ", ".join(f"{count} {name}" for name, count in found[-1]["verdicts"].most_common())
        print(f"{target.name}: {line}; {len(found[-1]['failures'])} failures", flush=True)
    failures = sum(len(target["failures"]) for target in found)
    document = {
        "files": arguments.files,
        "failures": failures,
        "seconds": round(sum(target["seconds"] for target in found), 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "targets": found,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
