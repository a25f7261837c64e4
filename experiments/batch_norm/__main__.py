"""Does batch normalisation suppress the outliers of the Hessian? As far as digits can tell.

    python -m experiments.batch_norm [--fast] [--out FOLDER]

A small residual network with and without batch norm on handwritten digits: the largest eigenvalues,
how far the first is above the tenth, and the gradient's share in their subspace over training.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import spectra
from experiments.benchmarks.workloads import images_of_digits

EPOCHS = (0, 1, 5, 20)
SEEDS = (0, 1, 2)
# The epoch that the expectations of README.md are about.
JUDGED = 5
CLASSES, WIDTH, BLOCKS, IMAGES = 10, 8, 3, 256
# Network, and which statistics its batch norm uses: running ones, or those of all the images.
SETTINGS = ("without", "running", "batch")


class Residual(nn.Module):
    """A residual network of seven convolutions with rectifiers, at one resolution."""

    def __init__(self, *, norm: bool) -> None:
        super().__init__()
        sizes = [1] + [WIDTH] * (2 * BLOCKS + 1)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1, bias=not norm) for a, b in itertools.pairwise(sizes)
        )
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(WIDTH) if norm else nn.Identity() for _ in self.convolutions
        )
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        layers = list(zip(self.convolutions, self.norms, strict=True))
        (first, norm), rest = layers[0], layers[1:]
        x = functional.relu(norm(first(x)))
        for (a, norm_a), (b, norm_b) in zip(rest[::2], rest[1::2], strict=True):
            inner = functional.relu(norm_a(a(x)))
            x = functional.relu(x + norm_b(b(inner)))
        return self.head(x.mean(dim=(2, 3)))


def operator(model: nn.Module, setting: str, batch: Any) -> spectra.HessianOperator:
    """The Hessian on one batch, so that statistics of the batch are those of all its images."""
    model.train(setting == "batch")
    loss = spectra.losses.supervised(nn.CrossEntropyLoss())
    return spectra.HessianOperator(model, loss, [batch], allow_training_mode=setting == "batch")


def measure(H: spectra.HessianOperator) -> tuple[dict[str, Any], spectra.Eigenpairs]:
    """Top eigenvalues with residuals, their ratio, and the gradient's share."""
    top = spectra.eigsh(H, k=CLASSES + 6, which="LA", progress=False)
    loss, gradient = H.value_and_gradient()
    inside = torch.as_tensor(top.vectors[:, :CLASSES]).T.to(gradient) @ gradient
    values = np.asarray(top.values)
    row = {
        "eigenvalues": values.tolist(),
        "residuals": np.asarray(top.residuals).tolist(),
        "converged": bool(top.converged.all()),
        "ratio": float(values[0] / values[CLASSES - 1]),
        "share": float(inside.norm() ** 2 / gradient.norm() ** 2),
        "loss": loss,
    }
    return row, top


def train(
    seed: int, *, norm: bool, epochs: tuple[int, ...], images: int, judged: int
) -> list[dict[str, Any]]:
    """What is measured at the given epochs; the density at the judged one too."""
    torch.manual_seed(seed)
    x, y = images_of_digits()
    model = Residual(norm=norm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    rows = []
    for epoch in range(max(epochs) + 1):
        for setting in SETTINGS[1:] if norm else SETTINGS[:1]:
            if epoch not in epochs:
                continue
            H = operator(model, setting, (x[:images], y[:images]))
            row, top = measure(H)
            if seed == SEEDS[0] and epoch == judged:
                row["density"] = drawn(H, top)
            rows.append({"setting": setting, "seed": seed, "epoch": epoch, **row})
        model.train()
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return rows


def drawn(H: spectra.HessianOperator, top: spectra.Eigenpairs) -> dict[str, Any]:
    """The share of eigenvalues above each value, in units of the tenth."""
    density = spectra.spectral_density(H, steps=40, probes=4, deflate=top, progress=False)
    scale = float(top.values[CLASSES - 1])
    at = np.geomspace(1e-4, 1.1 * float(top.values[0]) / scale, 400)
    return {"at": at.tolist(), "above": (1 - density.cdf(at * scale)).tolist()}


def run(*, fast: bool) -> dict[str, Any]:
    """All settings and seeds, or one seed as far as the first epoch."""
    torch.set_num_threads(1)
    began, rows = time.perf_counter(), []
    judged = 1 if fast else JUDGED
    for seed in SEEDS[:1] if fast else SEEDS:
        for norm in (False, True):
            epochs, images = ((1,), 12) if fast else (EPOCHS, IMAGES)
            rows += train(seed, norm=norm, epochs=epochs, images=images, judged=judged)
    taken = round(time.perf_counter() - began, 1)
    return {"rows": rows, "summary": summary(rows, judged), "seconds": taken}


def summary(rows: list[dict[str, Any]], epoch: int) -> dict[str, Any]:
    """Numbers with batch norm over those without, for each seed, at one epoch."""
    at = {(row["setting"], row["seed"]): row for row in rows if row["epoch"] == epoch}
    seeds = sorted({seed for _, seed in at})
    found: dict[str, Any] = {"epoch": epoch}
    for setting in SETTINGS[1:]:
        for number in ("ratio", "share"):
            pairs = [(at[setting, seed][number], at["without", seed][number]) for seed in seeds]
            found[f"{number}, {setting} statistics, over that without"] = [a / b for a, b in pairs]
    return found


def plot(found: dict[str, Any], path: Path) -> None:
    """The ratio and the share over training."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    labels = {
        "without": "without batch norm",
        "running": "batch norm, running statistics",
        "batch": "batch norm, statistics of the batch",
    }
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for number, setting in enumerate(SETTINGS):
        for seed in sorted({row["seed"] for row in found["rows"]}):
            rows = [r for r in found["rows"] if (r["setting"], r["seed"]) == (setting, seed)]
            style = {"color": f"C{number}", "label": labels[setting] if seed == 0 else None}
            epochs = [row["epoch"] for row in rows]
            # Of a network without curvature beyond nine directions it is a division by zero.
            ratios = [row["ratio"] if row["ratio"] < 1e6 else np.nan for row in rows]
            axes[0].semilogy(epochs, ratios, "o-", **style)
            axes[1].plot(epochs, [row["share"] for row in rows], "o-", **style)
            for row in rows:
                if "density" in row:
                    above = np.array(row["density"]["above"])
                    above[above < 1e-9] = np.nan
                    axes[2].loglog(row["density"]["at"], above, **style)
    axes[0].set(xlabel="epoch", ylabel="λ₁ / λ₁₀", title="How far the first is above the tenth")
    axes[1].set(xlabel="epoch", ylabel="share", title="The gradient in the top ten")
    axes[1].set_ylim(0, 1.02)
    axes[2].set(
        xlabel="λ / λ₁₀", ylabel="share of eigenvalues above", title=f"Epoch {JUDGED}, seed 0"
    )
    axes[0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Run, print the summary, and write figures and figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("batch-norm-run"))
    arguments = parser.parse_args()
    found = {**run(fast=arguments.fast), "torch": torch.__version__}
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1)
    (arguments.out / "results.json").write_text(text + "\n", encoding="utf-8")
    plot(found, arguments.out / "batch_norm.png")
    print(json.dumps(found["summary"], indent=1))


if __name__ == "__main__":
    main()
