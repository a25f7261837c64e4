"""What can be taken away from a page? The numbers behind its figures, as CSV files within it."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from spectra.algorithms.blocks import BlockTraces
from spectra.algorithms.density import SpectralDensity
from spectra.algorithms.eigen import Eigenpairs
from spectra.algorithms.estimate import Estimate
from spectra.analysis.analyze import Analysis
from spectra.analysis.landscape import Landscape
from spectra.names import printable
from spectra.report import plots

__all__ = ["Download", "of_analysis"]

# Of one file: a page is to open at once.
_MOST_BYTES = 1 << 20


class Download(NamedTuple):
    """A file within a page: its address is the file itself, or None where it would be too large."""

    name: str
    content: str
    address: str | None


def of_analysis(analysis: Analysis) -> list[Download]:
    """Everything but the eigenvectors."""
    files = [_file("eigenvalues", "eigenvalues, residuals", _eigenvalues(analysis.eigenpairs))]
    if analysis.density is not None:
        density = analysis.density
        files.append(_file("density_nodes", "nodes and weights of the density", _nodes(density)))
        if (curve := plots.density_drawn(density)) is not None:
            files.append(
                _file("density_curve", "the broadened density, its 95% band", _bins(curve))
            )
    if analysis.trace is not None and len(analysis.trace.samples) > 1:
        content = "samples of the trace, their mean so far"
        files.append(_file("trace_samples", content, _samples(analysis.trace)))
    if analysis.blocks is not None:
        content = "trace and eigenvectors' mass by module"
        files.append(_file("modules", content, _modules(analysis.blocks)))
    if analysis.landscape is not None:
        content = "the loss along eigenvectors, its quadratic model"
        files.append(_file("landscape", content, _landscape(analysis.landscape)))
    return files


def _file(name: str, content: str, rows: Iterable[Sequence[Any]]) -> Download:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    data = text.getvalue().encode("utf-8", "backslashreplace")
    address = f"data:text/csv;charset=utf-8;base64,{base64.b64encode(data).decode('ascii')}"
    return Download(f"{name}.csv", content, address if len(data) <= _MOST_BYTES else None)


def _eigenvalues(pairs: Eigenpairs) -> Iterator[Sequence[Any]]:
    yield "index", "eigenvalue", "residual", "converged"
    columns = (pairs.values.tolist(), pairs.residuals.tolist(), pairs.converged.tolist())
    for i, row in enumerate(zip(*columns, strict=True), start=1):
        yield i, *row


def _nodes(density: SpectralDensity) -> Iterator[Sequence[Any]]:
    """Those of each probe add up to what was not deflated; the atoms are the same for all."""
    yield "probe", "node", "weight"
    for atom in density.atoms.tolist():
        yield "all", atom, 1 / density.n
    for probe, (nodes, weights) in enumerate(zip(density.nodes, density.weights, strict=True), 1):
        for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
            if weight > 0:
                yield probe, node, weight


def _bins(curve: plots.DrawnDensity) -> Iterator[Sequence[Any]]:
    yield "from", "to", "density", "low", "high"
    columns = (curve.edges[:-1], curve.edges[1:], curve.mean, curve.low, curve.high)
    yield from zip(*(column.tolist() for column in columns), strict=True)


def _samples(estimate: Estimate) -> Iterator[Sequence[Any]]:
    yield "probe", "sample", "mean", "low", "high"
    yield 1, float(estimate.samples[0]), "", "", ""
    columns = (estimate.samples[1:], *estimate.running())
    for i, row in enumerate(zip(*(c.tolist() for c in columns), strict=True), start=2):
        yield i, *row


def _modules(blocks: BlockTraces) -> Iterator[Sequence[Any]]:
    values = blocks.eigenvalues.tolist()
    yield "module", "parameters", "trace", "low", "high", *(f"mass of {v!r}" for v in values)
    for row in blocks.rows("module"):
        name, trace = printable(row.name), row.trace
        yield name, row.size, trace.value, *trace.interval(), *row.masses.tolist()


def _landscape(surface: Landscape) -> Iterator[Sequence[Any]]:
    lines = zip(surface.labels, surface.values, surface.predictions, strict=True)
    head, columns = ["displacement"], [surface.displacements.tolist()]
    for label, values, models in lines:
        head += [f"loss, {label}", f"quadratic model, {label}"]
        columns += [values.tolist(), models.tolist()]
    yield head
    yield from zip(*columns, strict=True)
