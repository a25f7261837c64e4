"""How much memory and time does a product with a GPT take, beside PyTorch's double backward?

    python -m experiments.large_models.memory_and_time                  # all of it: half an hour
    python -m experiments.large_models.memory_and_time --only blocks    # or one part

writes `results.json`, `tables.md` and `large_models.png` into `large-run`; a part replaces what an
earlier run found there. Peaks are those of fresh processes (Linux), and times are ratios to
PyTorch's product, measured in turn, in one process and on one thread. The process of a peak is

    python -m experiments.large_models.memory_and_time --process CONTESTANT SETTING
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.large_models.gpt import CONTESTANTS, GPT, Product, random_tokens
from spectra.objective.memory import held_bytes, peak_bytes

CPU = torch.device("cpu")
ROUNDS = 3
LENGTHS = [512, 1024, 2048, 4096]
# Larger blocks come from the system and go back there as soon as they are freed, so that the peak
# is what is live; by default glibc raises the threshold and keeps what it cannot put together.
LIVE = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
PLAIN, CHECKPOINTED = "PyTorch", "PyTorch, checkpointing"
RECOMPUTED, KEPT = "spectra, blocks recomputed", "spectra, blocks recomputed, kept"


@dataclass(frozen=True)
class Setting:
    """A GPT and its tokens."""

    blocks: int = 8
    width: int = 256
    length: int = 512
    sequences: int = 2

    def made(self) -> tuple[GPT, torch.Tensor]:
        """The model at its initial weights, and the tokens (B, T)."""
        torch.manual_seed(0)
        model = GPT(self.blocks, self.width, self.length).eval()
        return model, random_tokens(self.sequences, self.length)


# For warming up, and for the test of this program.
TINY = Setting(blocks=2, width=32, length=16, sequences=2)
MAIN = Setting(sequences=4)
# Which contestants, at which settings. PyTorch's would take 7 GiB at T = 4096 with two blocks.
PEAKS: dict[str, list[tuple[list[str], list[Setting]]]] = {
    "peaks": [(list(CONTESTANTS), [MAIN])],
    "blocks": [([PLAIN, CHECKPOINTED, RECOMPUTED, KEPT], [Setting(blocks=b) for b in (4, 8, 16)])],
    "length": [
        ([RECOMPUTED], [Setting(length=t, sequences=4096 // t) for t in LENGTHS]),
        (
            [PLAIN, CHECKPOINTED],
            [Setting(blocks=2, length=t, sequences=4096 // t) for t in LENGTHS[:-1]],
        ),
        ([RECOMPUTED], [Setting(blocks=2, length=t, sequences=4096 // t) for t in LENGTHS]),
    ],
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the results after every part, and draw them up."""
    from experiments.large_models import tables

    options = parser().parse_args(arguments)
    torch.set_num_threads(1)
    if options.process:
        contestant, setting = options.process
        print(json.dumps(measured_peak(contestant, Setting(**json.loads(setting)))))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "results.json"
    results: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.exists() else {}
    results["machine"] = machine()
    for part in options.only or [*PEAKS, "time"]:
        begun = time.perf_counter()
        setting = TINY if options.tiny else Setting()
        results[part] = times(setting) if part == "time" else peaks(part, tiny=options.tiny)
        print(f"{part}: {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
        file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    tables.write(results, options.out)
    return 0


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m experiments.large_models.memory_and_time",
        description=__doc__.split("\n", maxsplit=1)[0],
    )
    result.add_argument("--only", action="append", choices=[*PEAKS, "time"], help="may be repeated")
    result.add_argument("--out", type=Path, default=Path("large-run"), help="folder (large-run)")
    result.add_argument("--process", nargs=2, help=argparse.SUPPRESS)
    # For the test of this program: a network that takes no time.
    result.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    return result


def peaks(part: str, *, tiny: bool = False) -> list[dict[str, Any]]:
    """A record for every contestant and setting of a part: MiB by default, and what is live."""
    records = []
    for contestants, settings in PEAKS[part]:
        for setting in [TINY] if tiny else settings:
            for contestant in contestants:
                found = in_a_process(contestant, setting, {})
                live = in_a_process(contestant, setting, LIVE)["peak"]
                records.append({"contestant": contestant, **asdict(setting), **found, "live": live})
    return records


def in_a_process(contestant: str, setting: Setting, environment: dict[str, str]) -> dict[str, Any]:
    """What `measured_peak` finds in a fresh process."""
    command = [sys.executable, "-W", "ignore", "-m", "experiments.large_models.memory_and_time"]
    command += ["--process", contestant, json.dumps(asdict(setting))]
    done = subprocess.run(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


def measured_peak(contestant: str, setting: Setting) -> dict[str, Any]:
    """In this process: what a product takes beyond what it holds before, in MiB.

    Of graphs that are kept it is the first one, which builds them and works on them.
    """
    # Imports that the first product makes are not its memory.
    warm_model, warm_tokens = TINY.made()
    product_with(contestant, warm_model, warm_tokens)(vector(warm_model))
    model, tokens = setting.made()
    product, v = product_with(contestant, model, tokens), vector(model)
    before = held_bytes(CPU)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the peak so far
    product(v)
    return {"n": len(v), "peak": (peak_bytes(CPU) - before) / 2**20}


def product_with(contestant: str, model: GPT, tokens: torch.Tensor) -> Product:
    """A contestant's product."""
    return CONTESTANTS[contestant](model, tokens)


def vector(model: GPT) -> torch.Tensor:
    """A random one (n,)."""
    n = sum(p.numel() for p in model.parameters())
    return torch.randn(n, generator=torch.Generator().manual_seed(1))


def times(setting: Setting) -> list[dict[str, Any]]:
    """Of every contestant the times of its products in those of PyTorch's, and its error."""
    products = {name: product_with(name, *setting.made()) for name in CONTESTANTS}
    v = vector(setting.made()[0])
    truth = products[PLAIN](v)
    records = []
    for name, product in products.items():
        # The first product of all, which builds what is kept, is not timed.
        error = float((product(v) - truth).norm() / truth.norm())
        records.append({"contestant": name, "error": error, "seconds": [], "ratios": []})
    for _ in range(ROUNDS):
        before = seconds(products[PLAIN], v)
        for record in records:
            taken = seconds(products[record["contestant"]], v)
            after = seconds(products[PLAIN], v)
            record["seconds"].append(taken)
            # A machine's speed drifts: the neighbours in time are what is compared.
            record["ratios"].append(2 * taken / (before + after))
            before = after
    return records


def seconds(product: Product, v: torch.Tensor) -> float:
    """Of one product."""
    start = time.perf_counter()
    product(v)
    return time.perf_counter() - start


def machine() -> dict[str, Any]:
    """Whatever the numbers depend on."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    sys.exit(main())
