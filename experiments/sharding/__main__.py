"""What does a rank hold and send where parameters are spread over N of them?

    python -m experiments.sharding [--quick] [--out results.json]

For each N so many processes are started. Each measures itself: how far its resident memory grows,
and what it hands to the others.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import spectra
from experiments.large_models.gpt import GPT, next_token_loss, random_tokens
from spectra.algorithms.probes import gaussian, seeded
from spectra.distributed import shard
from spectra.objective.memory import Peak, held_bytes, return_freed_memory
from spectra.results import versions

CPU = torch.device("cpu")
# Blocks, width and vectors of a basis: large beside what a process takes by itself.
FULL, QUICK = (12, 512, 10), (2, 64, 3)
LENGTH, BATCHES = 32, 4


def held() -> int:
    """Bytes of resident memory that are in use."""
    return_freed_memory(CPU)
    return held_bytes(CPU)


def measured(size: tuple[int, int, int], *, spread: bool) -> dict[str, Any]:
    """What one rank takes for each of its parts."""
    blocks, width, vectors = size
    rank, count = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    # What PyTorch's modules for it and the first collectives take is none of the model's.
    shard(torch.nn.Linear(1, 1))
    begun = held()
    model: Any = GPT(blocks, width, LENGTH)
    n = sum(p.numel() for p in model.parameters())
    if spread:
        model = shard(model)
    found: dict[str, Any] = {"n": n, "parameters": held() - begun}
    data = list(random_tokens(2 * BATCHES, LENGTH).split(2))[rank::count]
    for graph in ("fresh", "retained"):
        H = spectra.HessianOperator(
            model, next_token_loss, data, graph=graph, recompute="blocks.*", process_group=True
        )
        space = H.space
        before = held()
        basis = space.basis(vectors).normal_()
        found["basis"] = held() - before
        # The same vector whatever N is.
        v = gaussian(space, seeded(0))
        v /= space.norm(v)
        before = held()
        H.apply(v)
        found[f"kept, {graph}"] = (held() - before) // max(1, len(data))
        peak = Peak(CPU)
        calls, sent = H.collective_calls()
        start = time.perf_counter()
        with peak:
            product = H.apply(v)
        seconds = time.perf_counter() - start
        after = H.collective_calls()
        found[graph] = {
            "peak of a product": peak.bytes,
            "calls": after[0] - calls,
            "bytes sent": after[1] - sent,
            "seconds": seconds,
            "norm of the product": space.norm(product),
        }
        H.release()
        del H, basis, v, product
    return found


def run(count: int, size: tuple[int, int, int], *, spread: bool) -> list[dict[str, Any]]:
    """What each of so many processes found."""
    with tempfile.TemporaryDirectory() as folder:
        # Else the C library keeps freed pieces, and what is measured is how badly they fit.
        exact = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        environment = {**os.environ, **exact, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", __spec__.name.removesuffix(".__main__") + ".__main__"]
        arguments = [json.dumps(size), str(int(spread)), str(count), folder]
        processes = [
            subprocess.Popen([*command, "--rank", str(rank), *arguments], env=environment)
            for rank in range(count)
        ]
        codes = [process.wait() for process in processes]
        if any(codes):
            msg = f"processes ended with {codes}"
            raise RuntimeError(msg)
        return [json.loads((Path(folder) / f"{r}.json").read_text("utf-8")) for r in range(count)]


def one_rank(arguments: list[str]) -> None:
    """Measure in one process of several, and write what was found."""
    rank, size, spread, count, folder = arguments
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{Path(folder) / 'meet'}",
        rank=int(rank),
        world_size=int(count),
    )
    try:
        blocks, width, vectors = json.loads(size)
        found = measured((blocks, width, vectors), spread=bool(int(spread)))
        (Path(folder) / f"{rank}.json").write_text(json.dumps(found), "utf-8")
    finally:
        dist.destroy_process_group()


def table(results: dict[str, Any]) -> str:
    """The largest of all ranks, in Markdown."""
    lines = [
        "| MiB | parameters | basis | kept graph | a product, fresh | on kept graphs |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    for record in results["runs"]:
        ranks = record["ranks"]

        def largest(get: Any, ranks: Any = ranks) -> str:
            return f"{max(get(rank) for rank in ranks) / 2**20:.0f}"

        parts = [
            largest(lambda r: r["parameters"]),
            largest(lambda r: r["basis"]),
            largest(lambda r: r["kept, retained"]),
            largest(lambda r: r["fresh"]["peak of a product"]),
            largest(lambda r: r["retained"]["peak of a product"]),
        ]
        name = f"in shards over {record['N']}" if record["spread"] else "one process, no shards"
        lines.append(f"| {name} | {' | '.join(parts)} |")
    lines += ["", "| N | graphs | calls | sent, in units of n | s |"]
    lines.append("| --: | --- | --: | --: | --: |")
    for record in results["runs"]:
        if record["N"] == 1:
            continue
        first = record["ranks"][0]
        for graph in ("fresh", "retained"):
            one = first[graph]
            batches = BATCHES // record["N"]
            share = one["bytes sent"] / (4 * first["n"]) / batches
            lines.append(
                f"| {record['N']} | {graph} | {one['calls'] / batches:.0f} | {share:.2f} | "
                f"{one['seconds'] / batches:.1f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """All of it."""
    if sys.argv[1:2] == ["--rank"]:
        one_rank(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", default="results.json")
    options = parser.parse_args()
    size = QUICK if options.quick else FULL
    runs = [
        {"N": count, "spread": spread, "ranks": run(count, size, spread=spread)}
        for count, spread in ((1, False), (1, True), (2, True), (4, True))
    ]
    results = {"runs": runs, "versions": versions()}
    Path(options.out).write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
