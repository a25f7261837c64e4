"""What is read at the cursor? Places in a figure, each with the numbers that stand there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

from spectra.algorithms.blocks import BlockTraces
from spectra.algorithms.density import SpectralDensity
from spectra.algorithms.eigen import Eigenpairs
from spectra.algorithms.estimate import Estimate
from spectra.analysis.comparison import Comparison
from spectra.analysis.landscape import Landscape
from spectra.analysis.trajectory import Trajectory
from spectra.names import printable, short_name
from spectra.report import plots

__all__ = [
    "Reading",
    "of_blocks",
    "of_both_eigenvalues",
    "of_density",
    "of_eigenpairs",
    "of_estimate",
    "of_landscape",
    "of_masses",
    "of_trajectory",
]

# Nodes of a density that are read: those of largest weight.
_MOST_NODES = 300


class Reading(NamedTuple):
    """A place on a figure's first Axes, in its own units, and what it says; y None: on a stem."""

    x: float
    y: float | None
    text: str


def of_eigenpairs(pairs: Eigenpairs) -> Iterator[Reading]:
    """Every eigenvalue with its residual."""
    for i, value in enumerate(pairs.values):
        yield Reading(i + 1, float(value), f"λ{i + 1} = {_pair(pairs, i)}")


def of_density(
    density: SpectralDensity, scale: Literal["linear", "symlog"], pairs: Eigenpairs
) -> Iterator[Reading]:
    """The nodes with their weights and what the curve is there, and the outliers."""
    drawn = plots.density_drawn(density, scale)
    if drawn is not None:
        yield from _of_nodes(density, drawn)
    known = {float(value): i for i, value in enumerate(pairs.values)}
    for atom in density.atoms.tolist():
        text = _pair(pairs, known[atom]) if atom in known else f"{atom:.6g}"
        height = None if scale == "linear" else 1 / density.n
        yield Reading(atom, height, f"outlier λ = {text}, of mass 1/{density.n:,}")


def _of_nodes(density: SpectralDensity, drawn: plots.DrawnDensity) -> Iterator[Reading]:
    nodes, weights = density.nodes.ravel(), density.weights.ravel()
    steps = density.nodes.shape[1]
    heaviest = np.argsort(-weights, kind="stable")[:_MOST_NODES]
    for i in np.sort(heaviest[weights[heaviest] > 0]).tolist():
        mean, low, high = (
            float(np.interp(nodes[i], drawn.centres, curve))
            for curve in (drawn.mean, drawn.low, drawn.high)
        )
        text = f"node λ = {nodes[i]:.5g} of weight {weights[i]:.3g}, probe {i // steps + 1}"
        text += f"; density {mean:.3g}"
        band = f" (95% band {low:.3g} to {high:.3g})" if density.probes > 1 else ""
        yield Reading(float(nodes[i]), mean, text + band)


def of_estimate(estimate: Estimate) -> Iterator[Reading]:
    """The mean after every probe with its interval, and that probe's own sample."""
    if len(estimate.samples) < 2:
        return
    own = estimate.samples if estimate.power == 1 else np.sqrt(estimate.samples)
    running = zip(*estimate.running(), own[1:], strict=True)
    for count, (mean, low, high, sample) in enumerate(running, start=2):
        yield Reading(
            count,
            float(mean),
            f"after {count} probes: {mean:.5g}, {100 * estimate.confidence:g}% interval {low:.5g} "
            f"to {high:.5g}; this probe alone {sample:.5g}",
        )


def of_blocks(blocks: BlockTraces) -> Iterator[Reading]:
    """The trace of every layer that is drawn."""
    for place, row in enumerate(blocks.table()[0]):
        low, high = row.trace.interval()
        error = "exact" if blocks.exact else f"± {(high - low) / 2:.2g}"
        text = f"{short_name(row.name)}: trace {row.trace.value:.5g} ({error})"
        yield Reading(row.trace.value, place, f"{text}, {row.size:,} parameters")


def of_masses(blocks: BlockTraces) -> Iterator[Reading]:
    """Every share of an eigenvector that is drawn."""
    names, values, shares = plots.mass_map(blocks)
    for (row, column), share in np.ndenumerate(shares):
        text = f"{share:.2%} of the eigenvector of λ = {values[column]:.4g}"
        yield Reading(column, row, f"{short_name(names[row])}: {text}")


def of_landscape(surface: Landscape) -> Iterator[Reading]:
    """Every evaluated point of curves, beside the quadratic model."""
    if surface.plane:
        return
    lines = zip(surface.labels, surface.values, surface.predictions, strict=True)
    for label, values, models in lines:
        for at, value, model in zip(surface.displacements, values, models, strict=True):
            if not math.isnan(value):
                yield Reading(
                    float(at),
                    float(value),
                    f"{printable(label)}, at {at:.3g}: loss {value:.5g}, "
                    f"quadratic model {model:.5g}",
                )


def of_trajectory(trajectory: Trajectory) -> Iterator[Reading]:
    """Every measurement of what the figure shows by default."""
    name = plots.shown_sharpness(trajectory)
    for m in trajectory:
        value = m.sharpness if name == "sharpness" else m.preconditioned_sharpness
        error = m.sharpness_residual if name == "sharpness" else m.preconditioned_residual
        if not math.isnan(value):
            yield Reading(m.step, value, f"step {m.step}: {value:.5g} ± {error:.1g}")


def of_both_eigenvalues(comparison: Comparison) -> Iterator[Reading]:
    """Every eigenvalue of both with its residual."""
    sides = zip(comparison.analyses, comparison.names, plots.ASIDE, strict=True)
    for analysis, name, aside in sides:
        pairs = analysis.eigenpairs
        for i, value in enumerate(pairs.values):
            text = f"{short_name(name)}: λ{i + 1} = {_pair(pairs, i)}"
            yield Reading(i + 1 + aside, float(value), text)


def _pair(pairs: Eigenpairs, i: int) -> str:
    text = f"{pairs.values[i]:.6g} ± {pairs.residuals[i]:.1g}"
    return text if pairs.converged[i] else f"{text} (not converged)"
