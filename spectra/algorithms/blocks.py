"""How is the trace shared among layers and modules? Sums of the diagonal, each with its error.

Precision policy: sums over entries are float64, whatever the dtype of the vectors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

import numpy as np
from torch import Tensor

from spectra.algorithms.estimate import Estimate
from spectra.names import short_name
from spectra.objective.parameters import By, ParameterSpace, grouped
from spectra.objective.vectors import VectorSpace
from spectra.results import Result

if TYPE_CHECKING:
    from spectra.algorithms.diagonal import DiagonalEstimate

__all__ = [
    "BlockRow",
    "BlockTraces",
    "By",
    "add_diagonal",
    "aligned",
    "block_traces",
    "has_modules",
    "inner_by_parameter",
]

# Rows of a table for people, and eigenvectors in it.
_SHOWN_ROWS = 25
_SHOWN_PAIRS = 2
# Columns of a terminal, and how many of them a name needs at least to be told from others.
_TERMINAL, _LEAST_NAME = 80, 12
# Most numbers of a tile of a basis.
_TILE_ENTRIES = 1 << 24


# --- sums of vectors over parameters --------------------------------------------------------------


def has_modules(space: VectorSpace) -> TypeGuard[ParameterSpace]:
    """The vectors are the parameters of more than one module."""
    return isinstance(space, ParameterSpace) and len(space.modules()) > 1


def inner_by_parameter(space: VectorSpace, x: Tensor, y: Tensor) -> np.ndarray:
    """Inner products (parameters,) of parts of two vectors; (0,) where there are no modules."""
    return space.inner_by_parameter(x, y) if has_modules(space) else np.zeros(0)


def add_diagonal(space: VectorSpace, total: Tensor, rows: Tensor, core: Tensor) -> None:
    """Add the diagonal of Q T Qᵀ to `total` (n,), in place, tile by tile.

    Parameters
    ----------
    rows
        (m, n) Qᵀ.
    core
        (m, m) T.
    """
    core = core.to(total)
    tile = max(1, _TILE_ENTRIES // len(core))
    for columns, part in space.blocks(rows, tile):
        total[columns] += (part * (core @ part)).sum(dim=0)


# --- traces of blocks -----------------------------------------------------------------------------


def block_traces(
    sums: BlockTraces | DiagonalEstimate, by: By, *, mean: bool = False
) -> dict[str, Estimate]:
    """The trace of every block by name, with Student's interval over the probes.

    Raises
    ------
    ArgumentError
        Another `by`.
    """
    return {
        name: _summed(sums, name, columns, mean=mean)
        for name, columns in grouped(sums.parameters, by).items()
    }


def _summed(
    sums: BlockTraces | DiagonalEstimate, name: str, columns: list[int], *, mean: bool = False
) -> Estimate:
    size = sum(sums.sizes[i] for i in columns) if mean else 1
    samples = sums.parameter_traces[:, columns].sum(axis=1) / size
    count = len(samples)
    spread = float(samples.std(ddof=1)) if count > 1 else math.nan
    return Estimate(
        quantity=f"{'mean diagonal' if mean else 'trace'} of {name or 'the whole'}",
        value=float(samples.mean()),
        standard_error=0.0 if sums.exact else spread / math.sqrt(count),
        samples=np.zeros(0) if sums.exact else samples,
        confidence=sums.confidence,
        converged=sums.converged,
        method=sums.method,
        matvecs=sums.matvecs,
        noise=sums.noise,
        floor=sums.floor / size,
        provenance=sums.provenance,
    )


class BlockRow(NamedTuple):
    """One line of a table: a block, or what is left of them; `masses` (k,) as in `BlockTraces`."""

    name: str
    size: int
    trace: Estimate
    masses: np.ndarray


@dataclass(frozen=True, eq=False)
class BlockTraces(Result):
    """The traces of the diagonal blocks of layers, modules and parameters.

    Attributes
    ----------
    parameters, sizes
        Names of the parameters in the order of the flat vector, and their numbers of entries.
    parameter_traces
        (s, parameters) float64 sums of the diagonal over each parameter, as every probe has them;
        one row where exact. Sums over several parameters are to be formed within a row: the entries
        of one probe are correlated.
    exact
        There is no sampling error.
    eigenvalues
        (k,) whose part in every sum is computed, not sampled.
    masses
        (k, parameters) what of the squared length of their eigenvectors lies in each parameter.
    confidence
        Of the intervals.
    converged
        Whether the trace of the whole met its tolerance; that of a block has none.
    method, matvecs
        How, and how many products the trace and the Frobenius norm took for these probes.
    noise, floor
        As of the trace.
    notes
        What to know before believing the numbers, in words.
    """

    parameters: tuple[str, ...]
    sizes: tuple[int, ...]
    parameter_traces: np.ndarray
    exact: bool
    eigenvalues: np.ndarray
    masses: np.ndarray
    confidence: float = 0.95
    converged: bool = True
    method: str = ""
    matvecs: int = 0
    noise: float = math.nan
    floor: float = math.nan
    notes: tuple[str, ...] = ()

    @property
    def probes(self) -> int:
        """Number of probes; 0 where exact."""
        return 0 if self.exact else len(self.parameter_traces)

    def traces(self, by: By = "module", *, mean: bool = False) -> dict[str, Estimate]:
        """The trace of every diagonal block, with Student's interval over the probes.

        Parameters
        ----------
        by
            "layer": the modules whose names agree up to the first number, or in their first two
            parts. "module": the parameters that one module owns together (a weight and its bias).
            "parameter": each parameter by itself.
        mean
            Divide by the number of entries.

        Raises
        ------
        ArgumentError
            Another `by`.
        """
        return block_traces(self, by, mean=mean)

    @property
    def grouping(self) -> By:
        """What a table lists: modules where there is but one layer."""
        return "layer" if len(grouped(self.parameters, "layer")) > 1 else "module"

    @property
    def shown_pairs(self) -> list[int]:
        """Places of the eigenvalues of largest magnitude, whose vectors a table has room for."""
        order = np.argsort(-np.abs(self.eigenvalues), kind="stable")
        return [int(i) for i in order[:_SHOWN_PAIRS]]

    def rows(self, by: By) -> list[BlockRow]:
        """All blocks, in the order of the model; the model itself has the name ""."""
        groups = grouped(self.parameters, by)
        return [self._row(name, columns) for name, columns in groups.items()]

    def table(self) -> tuple[list[BlockRow], BlockRow | None]:
        """The layers of largest |trace| in the model's order, and the others together if any."""
        rows = self.rows(self.grouping)
        return self._largest(rows, [abs(row.trace.value) for row in rows])

    def mass_table(self) -> tuple[list[BlockRow], BlockRow | None]:
        """The same, of the layers in which most of some eigenvector lies."""
        rows = self.rows(self.grouping)
        return self._largest(rows, [float(row.masses.max(initial=0.0)) for row in rows])

    def _largest(
        self, rows: list[BlockRow], sizes: Sequence[float]
    ) -> tuple[list[BlockRow], BlockRow | None]:
        """As many rows as a table has room for, and the sum of the others."""
        rows = [row._replace(name=row.name or "(itself)") for row in rows]
        if len(rows) <= _SHOWN_ROWS:
            return rows, None
        largest = set(np.argsort(-np.array(sizes), kind="stable")[: _SHOWN_ROWS - 1].tolist())
        groups = list(grouped(self.parameters, self.grouping).values())
        rest = [i for k, columns in enumerate(groups) if k not in largest for i in columns]
        others = self._row(f"{len(rows) - len(largest)} others", rest)
        return [row for k, row in enumerate(rows) if k in largest], others

    def _row(self, name: str, columns: list[int]) -> BlockRow:
        size = sum(self.sizes[i] for i in columns)
        masses = self.masses[:, columns].sum(axis=1)
        return BlockRow(name, size, _summed(self, name, columns), masses)

    def __str__(self) -> str:
        shown = self.shown_pairs
        heads = [f"λ {self.eigenvalues[i]:.4g}" for i in shown]
        table = [[self.grouping, "parameters", "trace", "±", "mean", *heads]]
        rows, others = self.table()
        for row in [*rows, others] if others else rows:
            low, high = row.trace.interval()
            table.append(
                [
                    row.name,
                    f"{row.size:,}",
                    f"{row.trace.value:.5g}",
                    f"{(high - low) / 2:.2g}",
                    f"{row.trace.value / max(row.size, 1):.3g}",
                    *(f"{row.masses[i]:.1%}" for i in shown),
                ]
            )
        count = len(grouped(self.parameters, self.grouping))
        how = f"{self.probes} probes, ± for {self.confidence:.0%}"
        how = f"{'exact' if self.exact else how}, {self.method}"
        lines = [f"traces of {count} {self.grouping}s ({how}; no products of their own)"]
        lines.append("mean: the trace per parameter")
        if shown:
            lines.append("below each λ, what of its eigenvector's squared length lies in them")
        lines += aligned(table)
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def aligned(table: list[list[str]]) -> list[str]:
    """Rows as lines of a terminal: names to the left, cut to what room the numbers leave them.

    Where that is next to none, columns are left out from the right.
    """
    while True:
        widths = [max(len(row[i]) for row in table) for i in range(1, len(table[0]))]
        room = _TERMINAL - sum(2 + width for width in (0, *widths))
        if room >= _LEAST_NAME or len(table[0]) == 2:
            break
        table = [row[:-1] for row in table]
    names = [short_name(row[0], room) for row in table]
    table = [[name, *row[1:]] for name, row in zip(names, table, strict=True)]
    widths = [max(map(len, names)), *widths]
    return [
        "  ".join(
            ["", row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        )
        for row in table
    ]
