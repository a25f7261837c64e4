"""How long does a product take, in gradients? All contestants in turn, again and again.

A machine's speed drifts, more than packages differ. So every measurement has a plain gradient of
the same workload timed right before and right after it, and only the ratio to these counts; and the
contestants take turns, so that a bad minute falls on all of them alike.
"""

from __future__ import annotations

import contextlib
import gc
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from experiments.benchmarks.peers import Make, Tools, gradient, plain_fresh
from experiments.benchmarks.workloads import Told, Workload

# Below this a clock sees mostly noise: short work is repeated within one measurement.
LEAST_SECONDS = 0.03


def products(
    w: Workload,
    contestants: dict[str, Make],
    rounds: int,
    *,
    checked: bool = True,
    budget: float = float("inf"),
) -> list[dict[str, Any]]:
    """The first product, with all it takes to get there, and the mean of the first twenty.

    Of each contestant a record: ratios to a gradient, round by round, and the relative error of its
    product against plain double backward, both in float64. After `budget` seconds the rounds end
    early, two at the least; without any round only the error is found.
    """
    records = [{"contestant": name} for name in contestants]
    if checked:
        check(w.double(), contestants, records)
    v = w.vector(1)
    alive = [record for record in records if "failure" not in record]
    repeats = times_until_readable(lambda: gradient(w))
    for record in alive if rounds else []:
        # What a process does once, imports above all, is nobody's cost.
        with remembered(record), quiet(), opened(contestants[record["contestant"]], w) as tools:
            tools.hvp(v)
    settle()
    alive = [record for record in alive if "failure" not in record]
    begun = time.perf_counter()
    for number in range(rounds):
        if number > 1 and time.perf_counter() - begun > budget:
            break
        for record in alive:
            make = contestants[record["contestant"]]
            with remembered(record):
                before = seconds(lambda: gradient(w), repeats)
                first, later = first_and_later(w, make, v)
                unit = (before + seconds(lambda: gradient(w), repeats)) / 2
                record.setdefault("gradient_seconds", []).append(unit)
                record.setdefault("first", []).append(first / unit)
                record.setdefault("amortised", []).append((first + 19 * later) / 20 / unit)
        alive = [record for record in alive if "failure" not in record]
    return records


def check(w: Workload, contestants: dict[str, Make], records: list[dict[str, Any]]) -> None:
    """Each one's product beside plain double backward."""
    v = w.vector(0)
    truth = plain_fresh(w).hvp(v)
    for record in records:
        make = contestants[record["contestant"]]
        with remembered(record), quiet(), opened(make, w) as tools:
            difference = tools.hvp(v).reshape(-1) - truth
            record["error"] = (difference.norm() / truth.norm()).item()


def first_and_later(w: Workload, make: Make, v: torch.Tensor) -> tuple[float, float]:
    """Seconds of construction with the first product, and of one product after it."""
    gc.collect()
    with quiet():
        start = time.perf_counter()
        with opened(make, w) as tools:
            tools.hvp(v)
            first = time.perf_counter() - start
            start = time.perf_counter()
            for _ in range(w.products - 1):
                tools.hvp(v)
            later = (time.perf_counter() - start) / (w.products - 1)
    return first, later


@contextlib.contextmanager
def opened(make: Make, w: Workload) -> Iterator[Tools]:
    """A contestant, and the model as it was afterwards."""
    tools = None
    try:
        tools = make(w)
        yield tools
    finally:
        if tools is not None:
            tools.close()
        w.clean()


@contextlib.contextmanager
def remembered(record: dict[str, Any]) -> Iterator[None]:
    """Whatever goes wrong is a result, too."""
    try:
        yield
    except Exception as error:
        record["failure"] = first_line(error)
        record.update(getattr(error, "facts", {}))


def seconds(work: Callable[[], object], repeats: int = 1) -> float:
    """Of one call, the mean of several."""
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - start) / repeats


def times_until_readable(work: Callable[[], object]) -> int:
    """How often to repeat."""
    work()
    return max(1, round(LEAST_SECONDS / seconds(work)))


def settle() -> None:
    """Set the packages' own objects aside: the collections before each timing then take no time."""
    gc.collect()
    gc.freeze()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Warnings are the packages' talk with their users."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def deadline(limit: float) -> Iterator[None]:
    """Raise `TooLong` in the midst of whatever runs; where the system has no alarm, never.

    What runs may turn it into an error of its own, as TorchScript does.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() != threading.main_thread():
        yield
        return

    over: TooLong | None = None

    def stop(*_: object) -> None:
        nonlocal over
        over = TooLong(f"more than {limit:g} s")
        raise over

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    except Exception as error:
        if over is not None and error is not over:
            raise over from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def first_line(error: BaseException) -> str:
    """What went wrong, in a line of a table."""
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, Told):
        return lines[0]
    return f"{type(error).__name__}: {lines[0]}"[:160]


class TooLong(Told):
    """The time limit is over."""
