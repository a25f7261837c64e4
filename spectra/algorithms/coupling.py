"""How wrong is it to take a Hessian for block-diagonal?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy import special

from spectra.algorithms import probes as random_probes
from spectra.algorithms.blocks import aligned
from spectra.algorithms.estimate import check_confidence
from spectra.algorithms.progress import progress_bar
from spectra.errors import ArgumentError, ArgumentTypeError
from spectra.names import short_name
from spectra.objective.parameters import By, Selection
from spectra.operators.hessian import HessianOperator
from spectra.results import Result, versions

__all__ = ["BlockCoupling", "block_coupling"]

# Vectors that are multiplied in one pass over the data.
_TOGETHER = 8
# Rows of a table for people.
_SHOWN_ROWS = 25


@dataclass(frozen=True, eq=False)
class BlockCoupling(Result):
    """How much of a matrix lies in which of its blocks: ‖H_ab‖² in the Frobenius norm.

    Attributes
    ----------
    names, sizes
        Of the blocks, in order, and their numbers of parameters.
    samples
        (s, blocks, blocks) float64 unbiased estimates of ‖H_ab‖², symmetric, one for each probe.
    confidence
        Of the intervals.
    matvecs
        Products with the whole Hessian.
    notes
        What to know before believing the numbers, in words.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    samples: np.ndarray
    confidence: float = 0.95
    matvecs: int = 0
    notes: tuple[str, ...] = ()

    @property
    def squares(self) -> np.ndarray:
        """(blocks, blocks) estimates of ‖H_ab‖²."""
        mean: np.ndarray = self.samples.mean(axis=0)
        return mean

    @property
    def standard_errors(self) -> np.ndarray:
        """(blocks, blocks) of `squares`."""
        count = len(self.samples)
        errors: np.ndarray = self.samples.std(axis=0, ddof=1) / math.sqrt(count)
        return errors

    @property
    def outside(self) -> float:
        """‖H − D‖ / ‖H‖ with D the block-diagonal part: 0 where H is block-diagonal."""
        return math.sqrt(self._shares(self.squares))

    @property
    def outside_interval(self) -> tuple[float, float]:
        """Student's interval of `outside`, by the delta method for the ratio of the squares."""
        totals = self.samples.sum(axis=(1, 2))
        off = totals - np.trace(self.samples, axis1=1, axis2=2)
        share = self._shares(self.squares)
        deviations = (off - share * totals) / max(float(totals.mean()), np.finfo(float).tiny)
        count = len(totals)
        error = float(deviations.std(ddof=1)) / math.sqrt(count)
        half = float(special.stdtrit(count - 1, 0.5 + self.confidence / 2)) * error
        return math.sqrt(max(share - half, 0.0)), math.sqrt(min(share + half, 1.0))

    @property
    def outside_by_block(self) -> np.ndarray:
        """(blocks,) of the rows of each block: ‖H_a,rest‖ / ‖H_a‖."""
        squares = self.squares
        rows = squares.sum(axis=1)
        off = rows - np.diag(squares)
        shares: np.ndarray = np.sqrt(np.divide(off, rows, out=np.zeros_like(off), where=rows > 0))
        return shares

    @property
    def outside_by_block_errors(self) -> np.ndarray:
        """(blocks,) standard errors of `outside_by_block`, by the delta method."""
        rows = self.samples.sum(axis=2)
        off = rows - np.diagonal(self.samples, axis1=1, axis2=2)
        outside = self.outside_by_block
        deviations = (off - outside**2 * rows).std(axis=0, ddof=1) / math.sqrt(len(rows))
        # Of the square; half of that, relative to the root. Where nothing is outside, nothing is.
        twice = 2 * outside * rows.mean(axis=0)
        errors: np.ndarray = np.divide(deviations, twice, out=np.zeros_like(twice), where=twice > 0)
        return errors

    @staticmethod
    def _shares(squares: np.ndarray) -> float:
        total = float(squares.sum())
        return 0.0 if total == 0.0 else float((total - np.trace(squares)) / total)

    def __str__(self) -> str:
        low, high = self.outside_interval
        lines = [
            f"outside of the {len(self.names)} diagonal blocks lies "
            f"‖H − D‖/‖H‖ = {self.outside:.3g} of the Frobenius norm",
            f"({self.confidence:.0%} interval [{low:.3g}, {high:.3g}], {len(self.samples)} probes; "
            f"{self.matvecs} matvecs; ± standard errors)",
        ]
        table = [["block", "parameters", "‖H_aa‖", "±", "outside", "±", "most with"]]
        squares, errors = self.squares, self.standard_errors
        outside, outside_errors = self.outside_by_block, self.outside_by_block_errors
        others = squares - np.diag(np.diag(squares))
        for a in range(min(len(self.names), _SHOWN_ROWS)):
            strongest = int(others[a].argmax())
            size = math.sqrt(squares[a, a])
            table.append(
                [
                    self.names[a] or "(itself)",
                    f"{self.sizes[a]:,}",
                    f"{size:.4g}",
                    f"{errors[a, a] / (2 * size) if size else 0.0:.0e}",
                    f"{outside[a]:.1%}",
                    f"{outside_errors[a]:.1%}",
                    short_name(self.names[strongest] or "(itself)", 14)
                    if others[a, strongest] > 0
                    else "-",
                ]
            )
        lines += aligned(table)
        if len(self.names) > _SHOWN_ROWS:
            lines.append(f"  and {len(self.names) - _SHOWN_ROWS} more blocks")
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def block_coupling(
    H: HessianOperator,
    by: By | Mapping[str, Selection] = "layer",
    *,
    probes: int = 8,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool | None = None,
) -> BlockCoupling:
    """The Frobenius norms of all blocks of a Hessian, those off the diagonal above all.

    A random vector z that is zero outside of block b gives E ‖(H z)_a‖² = ‖H_ab‖² for every a.

    Parameters
    ----------
    H
        A `HessianOperator` or `GaussNewtonOperator`.
    by
        As of `HessianOperator.blocks`. Selections have to cover all parameters.
    probes
        Random vectors for each block, at least 2.
    confidence
        Of the intervals.
    seed
        Of the random vectors.
    progress
        Show a progress bar; None for on a terminal only.

    Returns
    -------
    BlockCoupling
        Costs `probes` times the number of blocks in matvecs, eight of them in one pass over the
        data.

    Raises
    ------
    ArgumentError, ArgumentTypeError, ParameterSelectionError
        No Hessian, fewer than two probes or blocks, blocks that overlap or leave something out.
    NonFiniteError
        A product holds nan or inf.

    References
    ----------
    Hutchinson, 1990, "A stochastic estimator of the trace of the influence matrix" (of H_abᵀ H_ab).
    """
    if not isinstance(H, HessianOperator):
        msg = f"expected a HessianOperator, whose parameters have names, got a {type(H).__name__}"
        raise ArgumentTypeError(msg)
    if isinstance(probes, bool) or not isinstance(probes, int) or probes < 2:
        msg = f"probes={probes!r}; expected at least 2, which a standard error takes"
        raise ArgumentError(msg)
    check_confidence(confidence)
    blocks = H.blocks(by)
    sizes = tuple(blocks.size(name) for name in blocks)
    if sum(sizes) != H.space.n:
        msg = (
            f"the blocks hold {sum(sizes):,} of {H.space.n:,} parameters, and what lies outside of "
            "them would not be seen; give the others a block, too, or take H.block(...) of those"
        )
        raise ArgumentError(msg)
    if len(blocks) < 2:
        msg = "there is one block, which has nothing outside; use by='module' or 'parameter'"
        raise ArgumentError(msg)
    generator, begun = random_probes.seeded(seed), H.matvecs
    samples = np.empty((probes, len(blocks), len(blocks)))
    with progress_bar("coupling", probes * len(blocks), progress) as bar:
        for sample in samples:
            z = random_probes.gaussian(H.space, generator)
            for start in range(0, len(blocks), _TOGETHER):
                some = blocks.names[start : start + _TOGETHER]
                columns = [blocks.extended(blocks.restricted(z, name), name) for name in some]
                products = H.apply(torch.stack(columns, dim=1)).T
                bar.update(len(products))
                for b, product in enumerate(products, start):
                    for a, other in enumerate(blocks):
                        part = blocks.restricted(product, other)
                        sample[a, b] = blocks.norm(part, other) ** 2
    # Both orders estimate the same number.
    samples = (samples + samples.transpose(0, 2, 1)) / 2
    return BlockCoupling(
        names=blocks.names,
        sizes=sizes,
        samples=samples,
        confidence=confidence,
        matvecs=H.matvecs - begun,
        provenance={
            "operator": H.describe(),
            "by": by if isinstance(by, str) else "selections",
            "probes": probes,
            "seed": seed,
            "versions": versions(),
        },
    )
