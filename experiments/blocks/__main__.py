"""What do products of all principal blocks cost, beside products of the whole Hessian?

    python -m experiments.blocks                   # four minutes on two cores
    python -m experiments.blocks --answers         # of all answers about blocks, ten minutes
    python -m experiments.blocks --tiny --out DIR  # seconds, for the test of this program

Within a round all contestants take turns, and only ratios of the same round count; medians over the
rounds are written into results.json, with all rounds; those of the answers into answers.json.
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
# Of the traces and norms of blocks.
RTOL = 0.1


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


def answers(w: Workload, by: str, rounds: int) -> dict[str, Any]:
    """All blocks' eigenvalues, traces and norms end to end, beside products and other ways."""
    H = HessianOperator(w.model, spectra.losses.supervised(w.criterion), w.batches)
    blocks, v = H.blocks(by), w.vector(1)
    parts = {name: blocks.restricted(v, name) for name in blocks}
    padded = torch.stack([blocks.extended(part, name) for name, part in parts.items()], dim=1)
    alone = [blocks[name] for name in blocks]
    options: dict[str, Any] = {"rtol": RTOL, "progress": False}
    found = spectra.block_spectra(H, by, **options)
    whole = spectra.block_spectra(H, {"all": "*"}, **options)
    ways: dict[str, Callable[[], object]] = {
        "blocks": lambda: spectra.block_spectra(H, by, **options),
        "whole": lambda: spectra.block_spectra(H, {"all": "*"}, **options),
        "alone": lambda: [spectra.block_spectra(one, {"all": "*"}, **options) for one in alone],
    }
    ways["alone"]()
    repeats = 1 + int(10 * LEAST_SECONDS / seconds(lambda: H @ v, 1))
    taken = []
    for _ in range(rounds):
        # Products before and after: what else the machine does changes within a round this long.
        before = [seconds(lambda: H @ v, repeats), seconds(lambda: H.apply(padded), repeats)]
        row = {name: seconds(work, 1) for name, work in ways.items()}
        after = [seconds(lambda: H @ v, repeats), seconds(lambda: H.apply(padded), repeats)]
        row["full product"] = (before[0] + after[0]) / 2
        row["padded product"] = (before[1] + after[1]) / 2 / len(blocks)
        taken.append(row)

    def ratio(other: Callable[[dict[str, float]], float]) -> list[float]:
        ratios = [row["blocks"] / other(row) for row in taken]
        return [round(f(ratios), 3) for f in (statistics.median, min, max)]

    return {
        "workload": w.name,
        "n": w.n,
        "by": by,
        "blocks": len(blocks),
        "passes": found.passes,
        "products": found.matvecs,
        "products of the whole": whole.matvecs,
        "to as many full products": ratio(lambda row: found.passes * row["full product"]),
        "to padded products": ratio(lambda row: found.matvecs * row["padded product"]),
        "to separate blocks": ratio(lambda row: row["alone"]),
        "to the whole": ratio(lambda row: row["whole"]),
        "rounds": [{name: round(value, 6) for name, value in row.items()} for row in taken],
    }


def table_of_answers(rows: list[dict[str, Any]]) -> str:
    """Of the README."""
    lines = [
        "| network | by | blocks | passes | products | (d) to as many full products | at most 1.5 "
        "| (e) to padded | (f) to separate | (g) to the whole, its products |",
        "| --- | --- | --: | --: | --: | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        d, e, f, g = (
            f"{row[name][0]:.2f} ({row[name][1]:.2f}–{row[name][2]:.2f})"
            for name in (
                "to as many full products",
                "to padded products",
                "to separate blocks",
                "to the whole",
            )
        )
        held = "yes" if row["to as many full products"][0] <= 1.5 else "no"
        lines.append(
            f"| {row['workload']} | {row['by']} | {row['blocks']} | {row['passes']} "
            f"| {row['products']} | {d} | {held} | {e} | {f} | {g}, "
            f"{row['products of the whole']} |"
        )
    return "\n".join(lines)


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
    parser.add_argument("--answers", action="store_true")
    parser.add_argument("--rounds", type=int, default=None, help="7 of products, 3 of answers")
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args(arguments)
    if options.answers:
        return _answers(tiny=options.tiny, rounds=options.rounds or 3, out=options.out)
    rounds = options.rounds or 7
    rows, shares = [], []
    with tempfile.TemporaryDirectory() as cache:
        for w in workloads(Path(cache), tiny=options.tiny):
            # Of a chain without biases, layers and modules are the same.
            for by in ("layer",) if w.name.startswith("chain") else ("layer", "module"):
                for graph in ("retained", "fresh"):
                    rows.append(measure(w, by, graph, rounds))
                    print(table(rows[-1:]).splitlines()[-1], flush=True)
                shares.append({"workload": w.name, "by": by, "shares": profile(w, by)})
    _write(options.out / "results.json", {"rows": rows, "profiles": shares})
    return 0


def _answers(*, tiny: bool, rounds: int, out: Path) -> int:
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for w in workloads(Path(cache), tiny=tiny):
            if w.name.startswith("chain"):
                continue
            # The digits network has the same modules and layers; with its 28 modules the GPT would
            # take half an hour.
            for by in ("layer",) if w.name in {"digits MLP", "GPT"} else ("layer", "module"):
                rows.append(answers(w, by, rounds))
                print(table_of_answers(rows[-1:]).splitlines()[-1], flush=True)
    _write(out / "answers.json", {"rtol": RTOL, "rows": rows})
    return 0


def _write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"torch": torch.__version__, "threads": torch.get_num_threads(), **record}
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
