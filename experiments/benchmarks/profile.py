"""Where does the time of an answer go: differentiating, what is around it, or the algorithm?"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch

from experiments.benchmarks.peers import CONTESTANTS, gradient, plain_retained
from experiments.benchmarks.timing import opened, quiet, seconds, settle, times_until_readable
from experiments.benchmarks.workloads import Workload
from spectra.operators.base import SymmetricOperator
from spectra.oracle.planning import Plan

# Of a heavy workload's analysis, whose trace to 1 % takes more than anyone waits for.
FEW_PROBES = 60
# Forward and backward passes, and the doors through which all products go.
_AUTOGRAD: list[tuple[Any, str]] = [(Plan, "loss"), (torch.autograd, "grad")]
_PRODUCTS: list[tuple[Any, str]] = [
    (SymmetricOperator, "_checked_products"),
    (SymmetricOperator, "apply_into"),
]


def answers(w: Workload, rounds: int) -> list[dict[str, Any]]:
    """Shares of the time of ten eigenpairs, and of an analysis (cut short where it is heavy).

    Of each answer a record: gradients that it took, products, and what a hand-written product on a
    kept graph takes; the shares, round by round, of autograd, of what is around it in a product,
    and of everything outside of products.
    """
    asked: dict[str, Callable[[Any, int], Any]] = {
        "top 10": lambda tools, seed: tools.top(10, 1e-3, seed)
    }
    if w.heavy:
        what = f"analysis with {FEW_PROBES} probes for its trace"
        asked[what] = lambda tools, seed: tools.analysis(seed, FEW_PROBES)
    else:
        asked["analysis"] = lambda tools, seed: tools.analysis(seed)
    repeats = times_until_readable(lambda: gradient(w))
    records = []
    for what, ask in asked.items():
        record: dict[str, Any] = {"what": what}
        settle()
        for seed in range(rounds):
            before = seconds(lambda: gradient(w), repeats)
            with quiet(), clocks(_AUTOGRAD) as autograd, clocks(_PRODUCTS) as products:
                start = time.perf_counter()
                with opened(CONTESTANTS["spectra"], w) as tools:
                    ask(tools, seed)
                    took = time.perf_counter() - start
                    count = tools.count() if tools.count else 0
            unit = (before + seconds(lambda: gradient(w), repeats)) / 2
            record.setdefault("gradients", []).append(took / unit)
            record.setdefault("products", []).append(count)
            record.setdefault("autograd", []).append(sum(autograd) / took)
            around = (sum(products) - sum(autograd)) / took
            record.setdefault("around", []).append(around)
            record.setdefault("outside", []).append(1 - sum(products) / took)
        record["plain"] = plain_product(w, repeats)
        records.append(record)
    return records


def plain_product(w: Workload, repeats: int) -> float:
    """Gradients for a product written by hand, on kept graphs."""
    v, ratios = w.vector(1), []
    with opened(plain_retained, w) as tools:
        tools.hvp(v)
        for _ in range(5):
            before = seconds(lambda: gradient(w), repeats)
            took = seconds(lambda: tools.hvp(v), repeats)
            ratios.append(2 * took / (before + seconds(lambda: gradient(w), repeats)))
    return median(ratios)


@contextlib.contextmanager
def clocks(functions: list[tuple[Any, str]]) -> Iterator[list[float]]:
    """Within it the seconds of every call of some functions are noted."""
    noted: list[float] = []
    originals = [(place, name, getattr(place, name)) for place, name in functions]

    def clocked(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                noted.append(time.perf_counter() - start)

        return call

    try:
        for place, name, function in originals:
            setattr(place, name, clocked(function))
        yield noted
    finally:
        for place, name, function in originals:
            setattr(place, name, function)
