"""How long do whole answers take, at equal accuracy: eigenpairs, trace, density, all together?

Accuracy is measured here, afterwards and identically for everyone, never taken from a package's own
word. A contestant gets the first of its settings that is accurate enough; looking for it costs it
nothing.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import spectra
from experiments.benchmarks.peers import (
    Make,
    Measure,
    Pairs,
    Tools,
    Wrong,
    gradient,
    plain_retained,
)
from experiments.benchmarks.timing import (
    TooLong,
    deadline,
    opened,
    quiet,
    remembered,
    seconds,
    settle,
    times_until_readable,
)
from experiments.benchmarks.workloads import Missing, Told, Workload

RESIDUAL = 1e-3  # ‖Hx − λx‖ / |λ| that every eigenpair has to reach
TRACE = 0.01  # relative error that three runs out of three have to reach
DENSITY_PRODUCTS = 100
PRODUCTS, HEAVY_PRODUCTS = 3000, 400  # for the reference of a trace
SMALL = 3000  # parameters up to which the matrix itself is affordable
Task = Callable[[Tools, Any, int], Any]


def largest(
    w: Workload, contestants: dict[str, Make], k: int, rounds: int, limit: float
) -> list[dict[str, Any]]:
    """The k eigenvalues that are largest in magnitude."""
    truth = plain_retained(w).hvp

    def accept(pairs: Pairs) -> dict[str, Any]:
        residual = worst_residual(truth, pairs)
        facts = {"residual": residual, "values": sorted(np.abs(pairs[0]).tolist(), reverse=True)}
        if not residual <= RESIDUAL:
            raise Inaccurate(f"residual {residual:.1e}", facts)
        if overlapping(pairs):
            raise Inaccurate("the same eigenvector twice", facts)
        return facts

    records = race(
        w,
        contestants,
        settings=lambda tools: tools.tolerances if tools.top else None,
        run=lambda tools, setting, seed: tools.top(k, setting, seed),
        accept=accept,
        rounds=rounds,
        limit=limit,
    )
    mark_missed(records)
    return records


def trace(w: Workload, contestants: dict[str, Make], rounds: int, limit: float) -> dict[str, Any]:
    """The trace to 1 %: records, and the reference they were held against, if it is that good."""
    reference, error = reference_trace(w)
    found: dict[str, Any] = {"reference": {"value": reference, "half_width": error}}
    if error > TRACE * abs(reference):
        products = HEAVY_PRODUCTS if w.heavy else PRODUCTS
        failure = f"{products} products tell no more than {reference:.3g} ± {error:.2g}"
        return {**found, "failure": f"{failure}, to which nobody can be held within 1 %"}

    def accept(value: float) -> dict[str, Any]:
        off = abs(value / reference - 1)
        if not off <= TRACE:
            raise Inaccurate(f"{off:.1%} off", {"off": off})
        return {"off": off}

    records = race(
        w,
        contestants,
        settings=lambda tools: tools.trace_settings if tools.trace else None,
        run=lambda tools, setting, seed: tools.trace(setting, seed),
        accept=accept,
        rounds=rounds,
        limit=limit,
        trials=3,
    )
    return {**found, "records": records}


def density(
    w: Workload, contestants: dict[str, Make], rounds: int, limit: float, eigenvalues: Any = None
) -> list[dict[str, Any]]:
    """The density with about a hundred products, and its Wasserstein-1 distance to the truth."""

    def accept(measure: Measure) -> dict[str, Any]:
        if eigenvalues is None:
            return {}
        return {"distance": distance(measure, eigenvalues) / np.abs(eigenvalues).max()}

    return race(
        w,
        contestants,
        settings=lambda tools: [DENSITY_PRODUCTS] if tools.density else None,
        run=lambda tools, products, seed: tools.density(products, seed),
        accept=accept,
        rounds=rounds,
        limit=limit,
    )


def analysis(
    w: Workload,
    contestants: dict[str, Make],
    found: dict[str, dict[str, Any]],
    reference: float | None,
    *,
    rounds: int,
    limit: float,
) -> list[dict[str, Any]]:
    """Ten eigenpairs, the trace to 1 % and the density: as one run, or one call after the other.

    `found` holds the settings that reached the accuracy, by contestant; who has none for a part is
    left out, and that is said. What does it in one run is judged by the trace that comes out.
    """

    def accept(answer: spectra.Analysis | None) -> dict[str, Any]:
        if answer is None:
            return {}
        facts = {"trace": answer.trace.value}
        off = 0.0 if reference is None else abs(answer.trace.value / reference - 1)
        if not (off <= TRACE and answer.eigenpairs.converged.all()):
            raise Inaccurate(f"trace {off:.1%} off", {**facts, "off": off})
        return facts if reference is None else {**facts, "off": off}

    def settings(tools: Tools) -> list[Any] | None:
        return [None] if tools.analysis else tools.tolerances

    def run(name: str) -> Task:
        def all_parts(tools: Tools, _: Any, seed: int) -> Any:
            if tools.analysis is not None:
                return tools.analysis(seed)
            chosen = found[name]
            tools.top(10, chosen["top 10"], seed)
            tools.trace(chosen["trace"], seed)
            tools.density(DENSITY_PRODUCTS, seed)
            return None

        return all_parts

    records = []
    for name, make in contestants.items():
        missing = [part for part, setting in found.get(name, {}).items() if setting is None]
        if missing and not name.startswith("spectra"):
            failure = "no " + ", no ".join(missing) + " within accuracy and time"
            records.append({"contestant": name, "failure": failure})
            continue
        records += race(
            w,
            {name: make},
            settings=settings,
            run=run(name),
            accept=accept,
            rounds=rounds,
            limit=3 * limit,  # there are three parts
        )
    return records


def race(
    w: Workload,
    contestants: dict[str, Make],
    *,
    settings: Callable[[Tools], list[Any] | None],
    run: Task,
    accept: Callable[[Any], dict[str, Any]],
    rounds: int,
    limit: float,
    trials: int = 1,
) -> list[dict[str, Any]]:
    """Find each one's setting, then let them take turns."""
    records = [{"contestant": name} for name in contestants]
    for record in records:
        make = contestants[record["contestant"]]
        with remembered(record), opened(make, w) as tools:
            ladder = settings(tools)
            if ladder is None:
                raise Missing("does not offer it")
        if "failure" in record:
            continue

        def attempt(setting: Any, seed: int, make: Make = make) -> tuple[float, int | None, Any]:
            return timed(w, make, lambda tools: run(tools, setting, seed), limit)

        with remembered(record):
            record.update(first_accurate(ladder, attempt, accept, trials))
    alive = [record for record in records if "failure" not in record]
    repeats = times_until_readable(lambda: gradient(w))
    settle()
    begun = time.perf_counter()
    for number in range(rounds):
        if number > 0 and time.perf_counter() - begun > 2 * limit:
            break
        for record in alive:
            make, setting = contestants[record["contestant"]], record["setting"]
            with remembered(record):
                before = seconds(lambda: gradient(w), repeats)

                def work(tools: Tools, setting: Any = setting, number: int = number) -> Any:
                    return run(tools, setting, number)

                took, count, _ = timed(w, make, work, limit)
                unit = (before + seconds(lambda: gradient(w), repeats)) / 2
                record.setdefault("seconds", []).append(took)
                record.setdefault("gradients", []).append(took / unit)
                record.setdefault("products", []).append(count)
        alive = [record for record in alive if "failure" not in record]
    return records


def first_accurate(
    ladder: list[Any],
    attempt: Callable[[Any, int], tuple[float, int | None, Any]],
    accept: Callable[[Any], dict[str, Any]],
    trials: int,
) -> dict[str, Any]:
    """The first setting that is accurate enough in every trial."""
    problem: Inaccurate | None = None
    for setting in ladder:
        facts: dict[str, Any] = {}
        try:
            for trial in range(trials):
                facts = accept(attempt(setting, trial)[2])
        except Inaccurate as error:
            problem = error
        except TooLong as error:
            if problem is None:
                raise
            text = f"{error}; with a looser setting {problem}"
            raise Inaccurate(text, problem.facts) from error
        else:
            return {"setting": setting, **facts}
    assert problem is not None
    raise problem


def timed(
    w: Workload, make: Make, work: Callable[[Tools], Any], limit: float
) -> tuple[float, int | None, Any]:
    """Seconds from nothing to the answer, the products it took, and the answer."""
    gc.collect()
    with quiet(), deadline(limit):
        start = time.perf_counter()
        with opened(make, w) as tools:
            answer = work(tools)
            count = tools.count() if tools.count else None
            took = time.perf_counter() - start
    return took, count, answer


def worst_residual(truth: Callable[[torch.Tensor], torch.Tensor], pairs: Pairs) -> float:
    """‖Hx − λx‖ / |λ| of the worst pair, with x of length one."""
    values, vectors = pairs
    worst = 0.0
    for value, x in zip(values, vectors.T, strict=True):
        unit = x.double() / x.double().norm()
        difference = truth(unit.to(x.dtype)).double() - float(value) * unit
        worst = max(worst, (difference.norm() / abs(float(value))).item())
    return worst


def overlapping(pairs: Pairs) -> bool:
    """Whether one eigenvector was returned twice."""
    vectors = pairs[1].double()
    vectors = vectors / vectors.norm(dim=0)
    products = vectors.T @ vectors
    return bool((products - torch.eye(len(products))).abs().max() > 0.1)


def mark_missed(records: list[dict[str, Any]]) -> None:
    """Small residuals do not say that the pairs are the largest: compare with the best found."""
    good = [record for record in records if "failure" not in record]
    if not good:
        return
    best = np.max([record["values"] for record in good], axis=0)
    for record in good:
        if (np.array(record["values"]) < 0.99 * best).any():
            record["failure"] = "missed an eigenvalue that another contestant found"


def reference_trace(w: Workload) -> tuple[float, float]:
    """Exact where the matrix is small, else an estimate with the half-width of its interval."""
    h = spectra.HessianOperator(w.model, spectra.losses.supervised(w.criterion), w.batches)
    if w.n <= SMALL:
        return float(h.to_dense().diagonal().sum(dtype=torch.float64)), 0.0
    most = HEAVY_PRODUCTS if w.heavy else PRODUCTS
    found = spectra.trace(h, rtol=0.003, max_matvecs=most, seed=10**6, progress=False)
    low, high = found.interval()
    return found.value, (high - low) / 2


def eigenvalues(w: Workload) -> np.ndarray:
    """All of them, from the matrix itself."""
    h = spectra.HessianOperator(w.model, spectra.losses.supervised(w.criterion), w.batches)
    matrix = h.to_dense()
    return torch.linalg.eigvalsh((matrix + matrix.T) / 2).numpy()


def distance(measure: Measure, exact: np.ndarray) -> float:
    """Wasserstein-1 between masses at nodes and the eigenvalues themselves."""
    nodes, masses = (np.asarray(x, dtype=float) for x in measure)
    order = np.argsort(nodes)
    nodes, heights = nodes[order], np.concatenate([[0], np.cumsum(masses[order])])
    if not 0.5 < heights[-1] < 2:
        raise Wrong(f"the masses add up to {heights[-1]:.2g}")
    heights /= heights[-1]
    exact = np.sort(exact)
    x = np.sort(np.concatenate([nodes, exact]))
    found = heights[np.searchsorted(nodes, x[:-1], side="right")]
    true = np.searchsorted(exact, x[:-1], side="right") / len(exact)
    return float((np.abs(found - true) * np.diff(x)).sum())


class Inaccurate(Told):
    """An answer that is not good enough, with what was measured of it."""

    def __init__(self, message: str, facts: dict[str, Any]) -> None:
        super().__init__(message)
        self.facts = facts
