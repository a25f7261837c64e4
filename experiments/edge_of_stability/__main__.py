"""Does the sharpness rise to the threshold of stability, and stay there?

    python -m experiments.edge_of_stability [--fast] [--out FOLDER]

A tanh network on handwritten digits with squared error, trained on all the data at once by gradient
descent, with heavy-ball momentum, and by Adam; the sharpness over the steps against the threshold
that the optimiser's own options give.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam, Optimizer

import spectra

SEEDS = (0, 1, 2)
# How many measurements a training has; what is judged is the mean over the last quarter of them.
MEASUREMENTS = 80


class Setting(NamedTuple):
    """An optimiser, and how many steps it takes."""

    name: str
    make: Callable[[Any], Optimizer]
    steps: int
    preconditioned: bool = False


SETTINGS = (
    Setting("gradient descent, 0.4", lambda p: SGD(p, lr=0.4), 8_000),
    Setting("gradient descent, 0.25", lambda p: SGD(p, lr=0.25), 12_000),
    Setting("gradient descent, 0.15", lambda p: SGD(p, lr=0.15), 20_000),
    Setting("momentum 0.5, 0.4", lambda p: SGD(p, lr=0.4, momentum=0.5), 8_000),
    Setting("momentum 0.9, 0.4", lambda p: SGD(p, lr=0.4, momentum=0.9), 8_000),
    Setting("Adam, 0.001", lambda p: Adam(p, lr=1e-3), 10_000, preconditioned=True),
    Setting("Adam, 0.002", lambda p: Adam(p, lr=2e-3), 10_000, preconditioned=True),
)
# Chosen after the first seven had been run: thresholds that the sharpness gets to before the
# network has learnt all there is.
SECOND = (
    Setting("gradient descent, 0.6", lambda p: SGD(p, lr=0.6), 8_000),
    Setting("momentum 0.5, 0.6", lambda p: SGD(p, lr=0.6, momentum=0.5), 8_000),
    Setting("momentum 0.9, 1.0", lambda p: SGD(p, lr=1.0, momentum=0.9), 8_000),
)
# Reaches its threshold within seconds.
FAST = Setting("gradient descent, 1.0", lambda p: SGD(p, lr=1.0), 600)


class SquaredError(nn.Module):
    """Against one-hot labels, the mean over samples and classes."""

    reduction = "mean"

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        targets = functional.one_hot(labels, outputs.shape[1]).to(outputs)
        return functional.mse_loss(outputs, targets)


def network() -> nn.Sequential:
    """Two hidden layers of 32."""
    return nn.Sequential(
        nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10)
    )


def digits() -> tuple[Tensor, Tensor]:
    """All images, and their labels."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images).float() / 16, torch.tensor(labels)


def train(setting: Setting, seed: int, measurements: int = MEASUREMENTS) -> spectra.Trajectory:
    """The curvature over one training."""
    torch.manual_seed(seed)
    x, y = digits()
    model, criterion = network(), SquaredError()
    optimizer = setting.make(model.parameters())
    loss = spectra.losses.supervised(criterion)
    every = setting.steps // measurements
    record = ("gradient", "preconditioned") if setting.preconditioned else ("gradient",)
    monitor = spectra.CurvatureMonitor(
        # Not at the start: before its first step Adam has no metric.
        model,
        loss,
        [(x, y)],
        optimizer,
        steps=range(every, setting.steps + 1, every),
        record=record,
    )
    for step in range(setting.steps + 1):
        monitor.step(step)
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
    return monitor.trajectory


def row_of(setting: Setting, seed: int, trajectory: spectra.Trajectory) -> dict[str, Any]:
    """The course of one training, and where it ended."""
    name = "preconditioned_sharpness" if setting.preconditioned else "sharpness"
    residual = "preconditioned_residual" if setting.preconditioned else "sharpness_residual"
    values = trajectory.column(name)
    threshold = trajectory[-1].threshold
    last = values[-len(values) // 4 :] / threshold
    return {
        "setting": setting.name,
        "seed": seed,
        "threshold": threshold,
        "formula": trajectory[-1].threshold_formula,
        "steps": [m.step for m in trajectory],
        "values": values.tolist(),
        "residuals": trajectory.column(residual).tolist(),
        "losses": trajectory.column("loss").tolist(),
        "matvecs": int(sum(sum(m.matvecs.values()) for m in trajectory)),
        "over the threshold": float(last.mean()),
        "spread": float(last.std(ddof=1)),
        "reached": int(np.argmax(values >= threshold)) if (values >= threshold).any() else None,
    }


def run(*, fast: bool) -> dict[str, Any]:
    """Every setting and seed, or one that takes seconds."""
    torch.set_num_threads(1)
    began, rows = time.perf_counter(), []
    for setting in (FAST,) if fast else SETTINGS + SECOND:
        for seed in SEEDS[:1] if fast else SEEDS:
            trajectory = train(setting, seed, 20 if fast else MEASUREMENTS)
            rows.append(row_of(setting, seed, trajectory))
    summary = {
        name: {
            "threshold": of_it[0]["threshold"],
            "over the threshold": [row["over the threshold"] for row in of_it],
            "spread": [row["spread"] for row in of_it],
            "losses": [row["losses"][-1] for row in of_it],
            "largest relative residual": max(
                max(np.divide(row["residuals"], row["values"])) for row in of_it
            ),
        }
        for name in dict.fromkeys(row["setting"] for row in rows)
        for of_it in [[row for row in rows if row["setting"] == name]]
    }
    taken = round(time.perf_counter() - began, 1)
    return {"summary": summary, "rows": rows, "seconds": taken}


def plot(found: dict[str, Any], path: Path) -> None:
    """The sharpness over its threshold, for every kind of optimiser."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    kinds = ("gradient descent", "momentum", "Adam")
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained", sharey=True)
    for ax, kind in zip(axes, kinds, strict=True):
        names = [name for name in found["summary"] if name.startswith(kind)]
        for number, name in enumerate(names):
            rows = [row for row in found["rows"] if row["setting"] == name]
            for i, row in enumerate(rows):
                ratio = np.array(row["values"]) / row["threshold"]
                label = f"{name}: {row['formula']} = {row['threshold']:.4g}" if i == 0 else None
                ax.plot(row["steps"], ratio, color=f"C{number}", linewidth=1.0, label=label)
        ax.axhline(1.0, color="black", linestyle="--", linewidth=0.8)
        ax.set(xlabel="step", title=kind, ylim=(0, 1.6))
        if names:
            ax.legend(fontsize="small", loc="lower right")
    axes[0].set_ylabel("sharpness / threshold")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Run, print the summary, and write figures and figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("edge-of-stability-run"))
    arguments = parser.parse_args()
    found = {**run(fast=arguments.fast), "torch": torch.__version__}
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1)
    (arguments.out / "results.json").write_text(text + "\n", encoding="utf-8")
    plot(found, arguments.out / "edge_of_stability.png")
    print(json.dumps(found["summary"], indent=1))


if __name__ == "__main__":
    main()
