"""When do finite differences of gradients fail as Hessian-vector products, and by how much?

    python -m experiments.finite_differences [--fast] [--out FOLDER]

Every product is compared with that of the same network and data in float64. Data and weights are
rounded to bf16 once, so that all dtypes are asked about the same Hessian.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import spectra

HERE = Path(__file__).parent
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
# Lengths of the displacement along a unit vector.
STEPS = np.logspace(-9, 1, 41)
RESOLVED = 0.1
# Written before the first run: [least, most] of what is expected. See README.md.
EXPECTED = {
    "cnn float32 differences": [0.1, 1.0],
    "cnn float32 exact": [0.0, 1e-4],
    "cnn bf16 differences": [0.1, np.inf],
    "cnn bf16 exact": [0.0, 0.04],
    "logistic float32 differences": [1.5e-5, 1.5e-3],
    "logistic float32 exact": [6e-8, 6e-6],
    "logistic bf16 differences": [0.025, 1.0],
    "logistic bf16 exact": [0.004, 0.4],
}


def logistic() -> tuple[nn.Module, Any, list[Any]]:
    """Logistic regression on 30 raw features, whose scales run from 1e-3 to 1e3."""
    from sklearn.datasets import load_breast_cancer

    features, labels = load_breast_cancer(return_X_y=True)
    x, y = torch.tensor(features), torch.tensor(labels).double()[:, None]
    model = nn.Sequential(nn.Linear(x.shape[1], 1)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(1, x.shape[1]) / x.std(dim=0) / x.shape[1] ** 0.5)
        model[0].bias.copy_(-(model[0].weight @ x.mean(dim=0)))
    return model, nn.BCEWithLogitsLoss(), [rounded(x), y]


def cnn(epochs: int) -> tuple[nn.Module, Any, list[Any]]:
    """Two convolutions with ReLU on handwritten digits, trained for a while; a batch of 256."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images).float().view(-1, 1, 8, 8) / 16, torch.tensor(labels)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )
    optimizer, criterion = torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss()
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            criterion(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return model, criterion, [rounded(x[:256].double()), y[:256]]


def rounded(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).to(x.dtype)


class Problem:
    """A network, its loss and one batch in some dtype, and both ways to a product."""

    def __init__(self, model: nn.Module, criterion: Any, data: list[Any], dtype: Any) -> None:
        self.model = copy.deepcopy(model).to(torch.bfloat16).to(dtype).eval()
        self.criterion = criterion
        self.data = [t.to(dtype) if t.is_floating_point() else t for t in data]
        loss = spectra.losses.supervised(criterion)
        self.hessian = spectra.HessianOperator(self.model, loss, [tuple(self.data)])
        self.parameters = list(self.model.parameters())
        self.start = [p.detach().clone() for p in self.parameters]

    def exact(self, v: Tensor) -> Tensor:
        """Hv by double backward."""
        return self.hessian.apply(v.to(self.hessian.space.dtype)).double()

    def difference(self, v: Tensor, step: float) -> Tensor:
        """(g(θ + hv) − g(θ − hv)) / 2h: computed in the dtype, subtracted in float64."""
        return (self.gradient(v, step) - self.gradient(v, -step)) / (2 * step)

    def gradient(self, v: Tensor, step: float) -> Tensor:
        pieces = v.split([p.numel() for p in self.parameters])
        with torch.no_grad():
            for p, start, piece in zip(self.parameters, self.start, pieces, strict=True):
                p.copy_(start + (step * piece).view_as(p).to(p.dtype))
        x, y = self.data
        found = torch.autograd.grad(self.criterion(self.model(x), y), self.parameters)
        with torch.no_grad():
            for p, start in zip(self.parameters, self.start, strict=True):
                p.copy_(start)
        return torch.cat([g.double().flatten() for g in found])


def errors(problem: Problem, v: Tensor, truth: Tensor, steps: Iterable[float]) -> dict[str, Any]:
    """Relative errors of the exact product, and of differences at every step."""
    size = truth.norm()
    differences = [float((problem.difference(v, h) - truth).norm() / size) for h in steps]
    # An overflow at a long step is the worst of errors, and no number in JSON.
    differences = [e if np.isfinite(e) else 1e30 for e in differences]
    exact = float((problem.exact(v) - truth).norm() / size)
    return {"exact": exact, "differences": differences, "best": min(differences)}


def resolved(rows: list[dict[str, Any]], key: str) -> float:
    """The least |λ| / max |λ| down to which every direction is right to a tenth; 1 if none is."""
    reached = 1.0
    for row in sorted(rows, key=lambda row: -row["ratio"]):
        if row[key] > RESOLVED:
            break
        reached = row["ratio"]
    return reached


def run(*, fast: bool) -> dict[str, Any]:
    """All figures."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    began, steps = time.perf_counter(), STEPS[::4] if fast else STEPS
    parts = logistic()
    dense = Problem(*parts, torch.float64).hessian.to_dense()
    values, vectors = torch.linalg.eigh(dense)
    order = values.abs().argsort(descending=True)
    found: dict[str, Any] = {"steps": list(steps), "logistic": {}, "cnn": {}, "summary": {}}
    for name, dtype in DTYPES.items():
        problem, rows = Problem(*parts, dtype), []
        for i in order.tolist():
            v, ratio = vectors[:, i], float(values[i].abs() / values.abs().max())
            rows.append({"ratio": ratio, **errors(problem, v, values[i] * v, steps)})
        found["logistic"][name] = rows
        found["summary"][f"logistic {name} differences"] = resolved(rows, "best")
        found["summary"][f"logistic {name} exact"] = resolved(rows, "exact")
    parts = cnn(2 if fast else 20)
    reference = Problem(*parts, torch.float64)
    directions = torch.randn(1 if fast else 5, reference.hessian.shape[0], dtype=torch.float64)
    directions /= directions.norm(dim=1, keepdim=True)
    for name, dtype in DTYPES.items():
        problem = Problem(*parts, dtype)
        rows = [errors(problem, v, reference.exact(v), steps) for v in directions]
        found["cnn"][name] = rows
        for key, way in (("best", "differences"), ("exact", "exact")):
            found["summary"][f"cnn {name} {way}"] = float(np.median([row[key] for row in rows]))
    found["expected"] = EXPECTED
    found["held"] = {
        key: bool(least <= found["summary"][key] <= most) for key, (least, most) in EXPECTED.items()
    }
    found["seconds"], found["torch"] = round(time.perf_counter() - began, 1), torch.__version__
    return found


def plot(found: dict[str, Any], path: Path) -> None:
    """Errors over the step on the CNN, and at the best step over the eigenvalue."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for color, name in zip(("C0", "C1"), DTYPES, strict=True):
        rows = found["cnn"][name]
        middle = np.median([row["differences"] for row in rows], axis=0)
        left.loglog(found["steps"], middle, color=color, label=f"{name}, differences")
        exact = float(np.median([row["exact"] for row in rows]))
        left.axhline(exact, color=color, linestyle="--", label=f"{name}, exact")
        rows = found["logistic"][name]
        ratios = [row["ratio"] for row in rows]
        best, exacts = [row["best"] for row in rows], [row["exact"] for row in rows]
        right.loglog(ratios, best, "o", color=color, label=f"{name}, differences, best step")
        right.loglog(ratios, exacts, "x", color=color, label=f"{name}, exact")
    left.set(xlabel="length of the step", ylabel="relative error", title="ReLU CNN")
    left.set_ylim(1e-7, 1e4)
    right.axhline(RESOLVED, color="grey", linewidth=0.5)
    right.set(xlabel="|λ| / max |λ|", title="Eigenvectors of logistic regression")
    left.legend()
    right.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Run, print the summary, and write figures and figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("finite-differences-run"))
    arguments = parser.parse_args()
    found = run(fast=arguments.fast)
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1).replace("Infinity", "1e30")
    (arguments.out / "results.json").write_text(text + "\n", encoding="utf-8")
    plot(found, arguments.out / "finite_differences.png")
    for key, value in found["summary"].items():
        print(f"{key}: {value:.2e} (expected {EXPECTED[key]}; held: {found['held'][key]})")


if __name__ == "__main__":
    main()
