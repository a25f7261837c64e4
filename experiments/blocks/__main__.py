"""What do products of all principal blocks cost, beside products of the whole Hessian?

    python -m experiments.blocks                   # four minutes on two cores
    python -m experiments.blocks --tiny --out DIR  # seconds, for the test of this program

Within a round all contestants take turns, and only ratios of the same round count; medians over the
rounds are written into results.json, with all rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import spectra
from experiments.benchmarks.workloads import TINY, Workload, cnn, digits, gpt
from spectra import HessianOperator

HERE = Path(__file__).parent
# Below this a clock sees mostly noise: short work is repeated within one measurement.
LEAST_SECONDS = 0.03


def chain(layers: int) -> Workload:
    """Equal tanh layers of 256 units, of which the work of a block can be counted."""
    torch.manual_seed(0)
    parts = [part for _ in range(layers) for part in (nn.Linear(256, 256, bias=False), nn.Tanh())]
    batch = (torch.randn(512, 256), torch.randint(0, 256, (512,)))
    return Workload(f"chain of {layers}", nn.Sequential(*parts).eval(), [batch])


def workloads(cache: Path, *, tiny: bool) -> list[Workload]:
    """Those of the benchmarks, and chains of equal layers."""
    if tiny:
        return [TINY["tiny"](cache, many=True)]
    chains = [chain(layers) for layers in (2, 4, 8, 16)]
    return [*chains, digits(cache), cnn(cache), gpt(cache)]


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Of one execution."""
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - start) / repeats


def contestants(w: Workload, by: str, graph: str) -> dict[str, Callable[[], object]]:
    """The whole with one vector; all blocks in one pass; and two other ways to the same numbers."""
    loss = spectra.losses.supervised(w.criterion)

    def hessian() -> HessianOperator:
        return HessianOperator(w.model, loss, w.batches, graph=graph)

    H, v = hessian(), w.vector(1)
    blocks = H.blocks(by)
    parts = {name: blocks.restricted(v, name) for name in blocks}
    padded = torch.stack([blocks.extended(part, name) for name, part in parts.items()], dim=1)
    alone = {name: blocks[name] for name in blocks}

    def separately() -> None:
        for name, operator in alone.items():
            operator @ parts[name]

    return {
        "full": lambda: H @ v,
        "one pass": lambda: blocks @ v,
        "padded": lambda: H.apply(padded),
        "separate": separately,
    }


def profile(w: Workload, by: str) -> dict[str, float]:
    """One block's part of a pass over kept graphs, in products of the whole, for each block."""
    H = HessianOperator(
        w.model, spectra.losses.supervised(w.criterion), w.batches, graph="retained"
    )
    v, shares = w.vector(1), {}
    H @ v
    repeats = 1 + int(LEAST_SECONDS / seconds(lambda: H @ v, 1))
    for name in H.blocks(by):
        one = H.blocks({name: list(H.blocks(by)[name].space.names)})
        one @ v
        ratios = [
            seconds(lambda one=one: one @ v, repeats) / seconds(lambda: H @ v, repeats)
            for _ in range(3)
        ]
        shares[name] = round(statistics.median(ratios), 3)
    return shares


def measure(w: Workload, by: str, graph: str, rounds: int) -> dict[str, Any]:
    """Ratios to one product of the whole with one vector, and of one pass to the other ways."""
    ways = contestants(w, by, graph)
    repeats = {}
    for name, work in ways.items():
        # The first builds the kept graphs, where they are kept.
        work()
        repeats[name] = 1 + int(LEAST_SECONDS / seconds(work, 1))
    taken = [
        {name: seconds(work, repeats[name]) for name, work in ways.items()} for _ in range(rounds)
    ]

    def ratio(other: str) -> float:
        ratios = [row["one pass"] / row[other] for row in taken]
        return round(statistics.median(ratios), 3)

    H = HessianOperator(w.model, spectra.losses.supervised(w.criterion), w.batches)
    return {
        "workload": w.name,
        "n": w.n,
        "by": by,
        "blocks": len(H.blocks(by)),
        "graph": graph,
        "to one full product": ratio("full"),
        "to padded products": ratio("padded"),
        "to separate blocks": ratio("separate"),
        "range": [round(f(row["one pass"] / row["full"] for row in taken), 3) for f in (min, max)],
        "rounds": [{name: round(value, 6) for name, value in row.items()} for row in taken],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Of the README."""
    lines = [
        "| network | by | blocks | graphs | (a) to one full product | at most 1.5 "
        "| (b) to padded | (c) to separate |",
        "| --- | --- | --: | --- | --: | --- | --: | --: |",
    ]
    for row in rows:
        low, high = row["range"]
        kept = {"retained": "kept", "fresh": "fresh"}[row["graph"]]
        held = "yes" if row["to one full product"] <= 1.5 else "no"
        lines.append(
            f"| {row['workload']} | {row['by']} | {row['blocks']} | {kept} "
            f"| {row['to one full product']:.2f} ({low:.2f}–{high:.2f}) | {held} "
            f"| {row['to padded products']:.2f} | {row['to separate blocks']:.2f} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="experiments.blocks", description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args(arguments)
    rows, shares = [], []
    with tempfile.TemporaryDirectory() as cache:
        for w in workloads(Path(cache), tiny=options.tiny):
            # Of a chain without biases, layers and modules are the same.
            for by in ("layer",) if w.name.startswith("chain") else ("layer", "module"):
                for graph in ("retained", "fresh"):
                    rows.append(measure(w, by, graph, options.rounds))
                    print(table(rows[-1:]).splitlines()[-1], flush=True)
                shares.append({"workload": w.name, "by": by, "shares": profile(w, by)})
    options.out.mkdir(parents=True, exist_ok=True)
    record = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rows": rows,
        "profiles": shares,
    }
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    (options.out / "results.json").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
