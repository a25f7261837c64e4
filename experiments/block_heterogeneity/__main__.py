"""Do the blocks of a transformer differ more in their spectra than those of a CNN?

    python -m experiments.block_heterogeneity [--fast] [--out FOLDER]

A byte-level GPT on text and a residual network on images, at initialisation and after a training;
the spectra of the blocks of all weight matrices, and how far they are apart.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.spatial.distance import jensenshannon
from torch import Tensor, nn

import spectra
from experiments.benchmarks.workloads import (
    GPT,
    Batch,
    ResidualNetwork,
    documentation,
    images_of_digits,
    sample,
    sample_text,
    train,
)
from spectra.algorithms.broadening import histograms

SEEDS = (0, 1, 2)
STATES = {"at initialisation": 0, "trained": 300}  # steps of Adam
STEPS, PROBES = 32, 6
LENGTH = 32  # of passages of text
# The axis is u = asinh(λ / x0): linear within ±x0, logarithmic beyond. x0 in units of the largest
# magnitude of an eigenvalue, the width of Gaussians in u: 0.5 is a factor of 1.65.
LINEAR, WIDTH = 1e-4, 0.5
MEASURES = ("distance", "distance of shapes", "spread of scales")


class Stacked(nn.Module):
    """The weights of queries, keys and values as one matrix, which they are kept in otherwise."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.cat([query, key, value])

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.clone() for part in weight.chunk(3))


def transformer(*, fast: bool) -> nn.Module:
    """The GPT of the benchmarks, with GPT-2's initialisation and queries, keys, values apart."""
    layers = 1 if fast else 3
    model = GPT(width=16 if fast else 64, layers=layers, heads=4, length=LENGTH)
    for name, p in model.named_parameters():
        if p.dim() > 1:
            into_the_stream = name.endswith(("out.weight", "mlp.2.weight"))
            nn.init.normal_(p, std=0.02 / (2 * layers) ** 0.5 if into_the_stream else 0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(p)
    for block in model.blocks:
        nn.utils.parametrize.register_parametrization(block.qkv, "weight", Stacked())
    return model


def networks(*, fast: bool) -> dict[str, tuple[nn.Module, Callable[[int], Batch], Batch]]:
    """Of each: the network, batches to train with, and the batch whose Hessian is asked for."""
    text, (images, labels) = documentation(), images_of_digits()
    size = 16 if fast else 128
    return {
        "transformer": (
            transformer(fast=fast),
            lambda step: sample_text(text, 16, LENGTH, step),
            sample_text(text, 2 if fast else 16, LENGTH, seed=10**6),
        ),
        "CNN": (
            ResidualNetwork(4 if fast else 16),
            lambda step: sample(images, labels, 64, step),
            sample(images, labels, size, seed=10**6),
        ),
    }


def apart(nodes: list[np.ndarray], weights: list[np.ndarray], scales: np.ndarray) -> np.ndarray:
    """(blocks, blocks) Jensen-Shannon distances, from 0 to 1, of spectra in units of scales."""
    places = [np.arcsinh(x / (LINEAR * scale)) for x, scale in zip(nodes, scales, strict=True)]
    reach = max(np.abs(u).max() for u in places) + 5 * WIDTH
    edges = np.arange(-reach, reach + WIDTH / 8, WIDTH / 4)
    shares = [
        histograms(u, w, np.full_like(u, WIDTH), edges).mean(axis=0)
        for u, w in zip(places, weights, strict=True)
    ]
    return np.array([[jensenshannon(a, b, base=2) for b in shares] for a in shares])


def measures(nodes: list[np.ndarray], weights: list[np.ndarray]) -> dict[str, Any]:
    """The three measures of README.md, with what they are made of."""
    largest = np.array([np.abs(x).max() for x in nodes])
    scales = np.sqrt([(w * x**2).sum(axis=1).mean() for x, w in zip(nodes, weights, strict=True)])
    distances = apart(nodes, weights, np.full(len(nodes), largest.max()))
    shapes = apart(nodes, weights, largest)
    pairs = np.triu_indices(len(nodes), 1)
    return {
        "distance": float(distances[pairs].mean()),
        "distance of shapes": float(shapes[pairs].mean()),
        "spread of scales": float(np.log10(scales).std(ddof=1)),
        "scales": scales.tolist(),
        "distances": distances.round(4).tolist(),
        "shapes": shapes.round(4).tolist(),
    }


def floor(nodes: list[np.ndarray], weights: list[np.ndarray]) -> float:
    """The mean distance between two estimates of one spectrum, from either half of the probes."""
    half, largest = len(nodes[0]) // 2, max(np.abs(x).max() for x in nodes)
    own = []
    for x, w in zip(nodes, weights, strict=True):
        both = apart([x[:half], x[half:]], [w[:half], w[half:]], np.full(2, largest))
        own.append(both[0, 1])
    return float(np.mean(own))


def measure(model: nn.Module, batch: Batch, seed: int, *, fast: bool) -> dict[str, Any]:
    """The spectra of all blocks in as many passes as one takes, and how far they are apart."""
    loss = spectra.losses.supervised(nn.CrossEntropyLoss())
    hessian = spectra.HessianOperator(model.eval(), loss, [batch])
    matrices = {name: [name] for name, p in model.named_parameters() if p.dim() > 1}
    blocks = hessian.blocks(matrices)
    probes = 2 if fast else PROBES
    found = blocks.each(
        spectra.spectral_density, steps=8 if fast else STEPS, probes=probes, seed=seed
    )
    densities = list(found.values())
    nodes, weights = [d.nodes for d in densities], [d.weights for d in densities]
    halves = [
        measures([x[part] for x in nodes], [w[part] for w in weights])
        for part in (slice(None, probes // 2), slice(probes // 2, None))
    ]
    whole = measures(nodes, weights)
    return {
        **whole,
        # The standard error of the mean of two halves.
        "errors": {name: abs(halves[0][name] - halves[1][name]) / 2 for name in MEASURES},
        "floor": floor(nodes, weights),
        # Rounding in the products, over the root mean square of the eigenvalues.
        "noise": max(d.floor / s for d, s in zip(densities, whole["scales"], strict=True)),
        "blocks": list(found),
        "sizes": [blocks.size(name) for name in blocks],
        "passes": blocks.passes,
        "loss": hessian.value(),
    }


def run(*, fast: bool) -> dict[str, Any]:
    """Both networks in both states for all seeds, or one seed of small ones."""
    torch.set_num_threads(1)
    began, runs = time.perf_counter(), []
    for seed in SEEDS[:1] if fast else SEEDS:
        torch.manual_seed(seed)
        for name, (model, batches, batch) in networks(fast=fast).items():
            for state, steps in STATES.items():
                if steps:
                    with tempfile.TemporaryDirectory() as folder:
                        train(model, batches, 3 if fast else steps, Path(folder) / "weights.pt")
                row = {"network": name, "state": state, "seed": seed}
                runs.append({**row, **measure(model, batch, seed, fast=fast)})
    taken = round(time.perf_counter() - began, 1)
    return {"runs": runs, "summary": summary(runs), "seconds": taken, "torch": torch.__version__}


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each measure by state and seed: of both networks, and their ratio, with errors."""
    rows = []
    for state in STATES:
        for seed in sorted({r["seed"] for r in runs}):
            of = {r["network"]: r for r in runs if (r["state"], r["seed"]) == (state, seed)}
            for name in MEASURES:
                row: dict[str, Any] = {"state": state, "seed": seed, "measure": name}
                relative = 0.0
                for network, r in of.items():
                    value, error = r[name], r["errors"][name]
                    row[network] = [round(value, 4), round(error, 4)]
                    relative += (error / value) ** 2
                ratio = of["transformer"][name] / of["CNN"][name]
                row["ratio"] = [round(ratio, 3), round(ratio * relative**0.5, 3)]
                rows.append(row)
    return rows


def plot(found: dict[str, Any], path: Path) -> None:
    """The distances of all pairs and the scales of all blocks, at initialisation."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    chosen = [r for r in found["runs"] if r["seed"] == 0 and r["state"] == "at initialisation"]
    for number, r in enumerate(chosen):
        axis, count = axes[number], len(r["blocks"])
        image = axis.imshow(r["distances"], vmin=0, vmax=1)
        axis.set(title=f"{r['network']}: mean {r['distance']:.2f}", xlabel="block", ylabel="block")
        scales = np.array(r["scales"])
        label = f"{r['network']}: {r['spread of scales']:.2f} decades"
        axes[2].semilogy(np.arange(count) / (count - 1), scales, "o-", markersize=3, label=label)
    figure.colorbar(image, ax=axes[:2], label="Jensen-Shannon distance")
    axes[2].set(xlabel="depth of the block", title="Root mean square of the eigenvalues")
    # Room for the legend.
    axes[2].set_ylim(bottom=min(min(r["scales"]) for r in chosen) / 30)
    axes[2].legend(loc="lower left")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Run, print the summary, and write figures and figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("block-heterogeneity-run"))
    arguments = parser.parse_args()
    found = run(fast=arguments.fast)
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1)
    (arguments.out / "results.json").write_text(text + "\n", encoding="utf-8")
    plot(found, arguments.out / "block_heterogeneity.png")
    for row in found["summary"]:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
