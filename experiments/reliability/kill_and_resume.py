"""Does a run that is killed, again and again, end with the numbers of one that is not?

    python -m experiments.reliability.kill_and_resume --kills 200 --out results/kills.json

Every question is first answered without interruption. Then the same call runs with a checkpoint in
a process that gets SIGKILL at a random moment of the time the answer takes, in another process that
goes on from the file, and so on; whatever gets to its end is compared with the first answer, every
bit of every number, and begun anew. Products are counted in memory that outlives the processes:
what was computed more than once is what the kills have cost.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import mmap
import os
import random
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import spectra
from spectra.integrations.digits import trained_digits
from spectra.operators.hessian import HessianOperator
from spectra.results import Result

# What tells how long something took, or which program and machine it was.
_NOT_COMPARED = {"provenance", "seconds"}
# Width of the network: its vectors are large enough for kills to meet writes as well.
_HIDDEN = 512


QUESTIONS: dict[str, Callable[..., Result]] = {
    # A small basis, so that restarts are among what is interrupted.
    "eigsh": lambda H, **more: spectra.eigsh(H, k=8, ncv=20, **more),
    "trace": lambda H, **more: spectra.trace(H, rtol=0.02, max_matvecs=80, **more),
    "spectral_density": lambda H, **more: spectra.spectral_density(H, steps=15, probes=4, **more),
    "analyze": lambda H, **more: spectra.analyze(H, k=5, max_matvecs=40, **more),
}


def main() -> int:
    """Kill, resume, compare, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    share = -(-arguments.kills // len(QUESTIONS))
    rows = [
        _question(name, min(share, arguments.kills - i * share), random.Random(arguments.seed + i))
        for i, name in enumerate(QUESTIONS)
    ]
    for row in rows:
        print(row, flush=True)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0 if all(row["different"] == 0 for row in rows) else 1


def _question(name: str, kills: int, chance: random.Random) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="spectra-kills-") as directory:
        return _killed_and_resumed(name, kills, chance, Path(directory))


def _killed_and_resumed(
    name: str, kills: int, chance: random.Random, directory: Path
) -> dict[str, Any]:
    counter = _Counter()
    weights = directory / "weights"
    reference, checkpoint, result = (directory / file for file in ("first", "checkpoint", "result"))
    _train(weights)
    H = counter.counting(_operator(weights))
    ask = functools.partial(_forked, functools.partial(QUESTIONS[name], H))
    start = time.monotonic()
    _ended(ask(reference, None), kill_after=None)
    seconds, products = time.monotonic() - start, counter.value
    done = {"completed": 0, "completed from a torn file": 0, "different": 0}
    killed, most_vectors = 0, 0.0
    counter.value = 0
    while killed < kills or checkpoint.exists():
        delay = chance.uniform(0, 1.2 * seconds) if killed < kills else None
        if _ended(ask(result, checkpoint), kill_after=delay):
            killed += 1
        if checkpoint.exists():
            size = checkpoint.stat().st_size
            most_vectors = max(most_vectors, size / H.space.vector_bytes)
        if result.with_suffix(".json").exists():
            found: Any = spectra.load(result)
            # A kill amid a write is said in the result: the only thing that may be another.
            notes = tuple(note for note in found.notes if "was cut off" not in note)
            done["completed"] += 1
            done["completed from a torn file"] += len(notes) < len(found.notes)
            found = dataclasses.replace(found, notes=notes)
            done["different"] += not identical(spectra.load(reference), found)
            for path in directory.glob("result*"):
                path.unlink()
            checkpoint.unlink()
    return {
        "question": name,
        "kills": killed,
        **done,
        "matvecs": products,
        "largest file in vectors": round(most_vectors, 1),
        # Each life that goes on computes the first product once more, to compare it.
        "products computed more than once, per kill": round(
            (counter.value - done["completed"] * products) / max(killed, 1), 2
        ),
    }


def _forked(ask: Callable[..., Result], result: Path, checkpoint: Path | None) -> int:
    """The number of a new process that answers the question and saves the result."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    # Whatever happens here ends here.
    status = 1
    try:
        ask(checkpoint=checkpoint).save(result)
        status = 0
    finally:
        os._exit(status)


def _ended(child: int, kill_after: float | None) -> bool:
    """Wait for the process, or kill it after so many seconds; whether it was killed."""
    if kill_after is not None:
        deadline = time.monotonic() + kill_after
        while time.monotonic() < deadline:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return _checked(status)
            time.sleep(min(0.001, max(deadline - time.monotonic(), 0)))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return _checked(status)


def _checked(status: int) -> bool:
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    if status:
        msg = f"a run failed with status {status}; its message is above"
        raise RuntimeError(msg)
    return False


class _Counter:
    """A number in memory that processes share."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8)
        self.value = 0

    @property
    def value(self) -> int:
        """How many products were computed."""
        return int(struct.unpack("<q", self._memory[:8])[0])

    @value.setter
    def value(self, number: int) -> None:
        self._memory[:8] = struct.pack("<q", number)

    def counting(self, H: HessianOperator) -> HessianOperator:
        """The operator, whose products are counted when they are computed."""
        compute = H._products

        def counted(rows: torch.Tensor) -> torch.Tensor:
            self.value += len(rows)
            return compute(rows)

        H._products = counted  # type: ignore[method-assign]
        return H


def identical(one: Any, other: Any) -> bool:
    """Whether two results hold the same numbers, bit for bit."""
    if isinstance(one, Result):
        names = [f.name for f in dataclasses.fields(one) if f.name not in _NOT_COMPARED]
        return type(one) is type(other) and all(
            identical(getattr(one, name), getattr(other, name)) for name in names
        )
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return bool(np.array_equal(one, other, equal_nan=one.dtype.kind == "f"))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(identical(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(identical, one, other))
    both_nan = isinstance(one, float) and math.isnan(one) and math.isnan(other)
    return both_nan or bool(one == other)


def _operator(weights: Path) -> HessianOperator:
    """The Hessian of the trained network, over batches of unequal sizes."""
    model, loss, data = trained_digits(hidden=_HIDDEN, steps=0)
    model.load_state_dict(torch.load(weights, weights_only=True))
    return HessianOperator(model, loss, data)


def _train(weights: Path) -> None:
    """In a process of its own: autograd does not work in the children of one that has used it."""
    child = os.fork()
    if child == 0:
        try:
            model, _, _ = trained_digits(hidden=_HIDDEN)
            torch.save(model.state_dict(), weights)
        finally:
            os._exit(0)
    os.waitpid(child, 0)


if __name__ == "__main__":
    sys.exit(main())
