"""Are there as many outliers as classes, and does the gradient live in their subspace?

    python -m experiments.outliers [--fast] [--out FOLDER]

A tanh network on handwritten digits, plain stochastic gradient descent; the top eigenvalues of H, G
and H − G and the gradient's share in the top subspace over training.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import spectra

EPOCHS = (0, 1, 5, 20)
SEEDS = (0, 1, 2)
# Number of classes and loss.
SETTINGS = ((10, "cross-entropy"), (4, "cross-entropy"), (10, "squared error"))
# The epoch that the expectations of README.md are about.
JUDGED = 5


class SquaredError(nn.Module):
    """Against one-hot labels, summed over classes, the mean over samples."""

    reduction = "mean"

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        targets = functional.one_hot(labels, outputs.shape[1]).to(outputs)
        return ((outputs - targets) ** 2).sum(dim=1).mean()


def digits(classes: int) -> tuple[Tensor, Tensor]:
    """The images of the first so many digits."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    chosen = labels < classes
    return torch.tensor(images[chosen]).float() / 16, torch.tensor(labels[chosen])


def gap(values: np.ndarray, classes: int) -> int:
    """After how many eigenvalues the ratio to the next is largest; the first alone is no count.

    The first is left out: one eigenvalue far above all is common, and says nothing of classes.
    """
    ratios = values[1 : classes + 4] / np.maximum(values[2 : classes + 5], 1e-12)
    return int(np.argmax(ratios)) + 2


def measure(model: nn.Module, criterion: Any, data: Any, classes: int) -> dict[str, Any]:
    """Top eigenvalues of the three operators, and the gradient's share."""
    loss = spectra.losses.supervised(criterion)
    hessian = spectra.HessianOperator(model, loss, [data])
    gauss_newton = spectra.GaussNewtonOperator(model, loss, [data])
    top = spectra.eigsh(hessian, k=classes + 6, which="LA")
    top_g = spectra.eigsh(gauss_newton, k=classes + 6, which="LA")
    rest = spectra.eigsh(hessian - gauss_newton, k=1, which="LM")
    values, values_g = np.asarray(top.values), np.asarray(top_g.values)
    gradient = hessian.gradient()
    inside = torch.as_tensor(top.vectors[:, :classes]).T.to(gradient) @ gradient
    return {
        "H": values.tolist(),
        "G": values_g.tolist(),
        "norm of H - G": float(abs(rest.values[0])),
        "gap of H": gap(values, classes),
        "gap of G": gap(values_g, classes),
        "share": float(inside.norm() ** 2 / gradient.norm() ** 2),
        "loss": hessian.value(),
    }


def train(classes: int, kind: str, seed: int, epochs: tuple[int, ...]) -> list[dict[str, Any]]:
    """What is measured at the given epochs."""
    torch.manual_seed(seed)
    x, y = digits(classes)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, classes))
    criterion = nn.CrossEntropyLoss() if kind == "cross-entropy" else SquaredError()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    rows = []
    for epoch in range(max(epochs) + 1):
        if epoch in epochs:
            rows.append({"epoch": epoch, **measure(model, criterion, (x, y), classes)})
        for batch in torch.randperm(len(x)).split(32):
            optimizer.zero_grad()
            criterion(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return rows


def run(*, fast: bool) -> dict[str, Any]:
    """All settings and seeds, or one of each as far as the epoch that is judged."""
    torch.set_num_threads(1)
    began, runs = time.perf_counter(), []
    settings = SETTINGS[1:2] if fast else SETTINGS
    for classes, kind in settings:
        for seed in SEEDS[:1] if fast else SEEDS:
            rows = train(classes, kind, seed, (JUDGED,) if fast else EPOCHS)
            runs.append({"classes": classes, "loss": kind, "seed": seed, "epochs": rows})
    taken = round(time.perf_counter() - began, 1)
    return {"runs": runs, "summary": summary(runs), "seconds": taken, "torch": torch.__version__}


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every setting at the epoch that is judged: gaps, shares, and how large H − G is."""
    rows = []
    for classes, kind in SETTINGS:
        chosen = [r for r in runs if (r["classes"], r["loss"]) == (classes, kind)]
        at = [row for r in chosen for row in r["epochs"] if row["epoch"] == JUDGED]
        if not at:
            continue
        rows.append(
            {
                "classes": classes,
                "loss": kind,
                "gaps of H": [row["gap of H"] for row in at],
                "gaps of G": [row["gap of G"] for row in at],
                "shares": [row["share"] for row in at],
                "norm of H - G over the last outlier": [
                    row["norm of H - G"] / row["H"][classes - 2] for row in at
                ],
            }
        )
    return rows


def plot(found: dict[str, Any], path: Path) -> None:
    """Eigenvalues at the judged epoch, and the share over training."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for number, (classes, kind) in enumerate(SETTINGS):
        for r in found["runs"]:
            if (r["classes"], r["loss"]) != (classes, kind):
                continue
            label = f"K = {classes}, {kind}" if r["seed"] == 0 else None
            style = {"color": f"C{number}", "label": label}
            row = next(row for row in r["epochs"] if row["epoch"] == JUDGED)
            left.semilogy(np.arange(1, len(row["H"]) + 1), row["H"], "o-", markersize=3, **style)
            right.plot(
                [e["epoch"] for e in r["epochs"]], [e["share"] for e in r["epochs"]], **style
            )
    left.set(xlabel="number", ylabel="eigenvalue of H", title=f"After {JUDGED} epochs")
    right.set(xlabel="epoch", ylabel="share of the gradient", title="In the top K subspace")
    right.set_ylim(0, 1.02)
    left.legend()
    right.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Run, print the summary, and write figures and figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("outliers-run"))
    arguments = parser.parse_args()
    found = run(fast=arguments.fast)
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1)
    (arguments.out / "results.json").write_text(text + "\n", encoding="utf-8")
    plot(found, arguments.out / "outliers.png")
    for row in found["summary"]:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
