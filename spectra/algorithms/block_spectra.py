"""How sharp is every layer by itself? Extreme eigenvalues, trace and norm of each block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spectra.algorithms.blocks import aligned
from spectra.algorithms.eigen import Eigenpairs, check_eigsh_arguments, eigsh
from spectra.algorithms.estimate import Estimate, check_confidence
from spectra.algorithms.norms import norm
from spectra.algorithms.progress import progress_bar
from spectra.algorithms.trace import trace
from spectra.errors import ArgumentTypeError
from spectra.objective.parameters import By, Selection
from spectra.operators.base import SymmetricOperator
from spectra.operators.hessian import HessianOperator
from spectra.results import Result, versions

__all__ = ["BlockSpectra", "block_spectra"]

# Rows of a table for people.
_SHOWN_ROWS = 40


@dataclass(frozen=True, eq=False)
class BlockSpectra(Result):
    """The spectra of all principal blocks, block by block.

    Attributes
    ----------
    names, sizes
        Of the blocks, in order, and their numbers of parameters.
    eigenpairs
        Of each block, by name: the largest and the smallest eigenvalues, with residuals.
    traces, norms
        Trace and Frobenius norm of each block, by name, with their errors.
    passes
        Over the data, for all of that.
    matvecs
        Products of all blocks with vectors of their own length.
    notes
        What to know before believing the numbers, in words.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    eigenpairs: dict[str, Eigenpairs]
    traces: dict[str, Estimate]
    norms: dict[str, Estimate]
    passes: int
    matvecs: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"spectra of {len(self.names)} blocks: ± the larger residual, or half of an interval",
            f"({self.passes} passes over the data, {self.matvecs} products of blocks)",
        ]
        table = [["block", "size", "λ_max", "λ_min", "±", "trace", "±", "‖·‖_F", "±"]]
        for name, size in list(zip(self.names, self.sizes, strict=True))[:_SHOWN_ROWS]:
            pairs, total = self.eigenpairs[name], self.traces[name]
            size_of = self.norms[name]
            errors = [(high - low) / 2 for low, high in (total.interval(), size_of.interval())]
            marks = ["" if pairs.converged[i] else "*" for i in (0, -1)]
            table.append(
                [
                    name or "(itself)",
                    f"{size:,}",
                    f"{pairs.values[0]:.3g}{marks[0]}",
                    f"{pairs.values[-1]:.3g}{marks[1]}",
                    f"{max(pairs.residuals[0], pairs.residuals[-1]):.0e}",
                    f"{total.value:.3g}",
                    f"{errors[0]:.0e}",
                    f"{size_of.value:.3g}",
                    f"{errors[1]:.0e}",
                ]
            )
        lines += aligned(table)
        if len(self.names) > _SHOWN_ROWS:
            lines.append(f"  and {len(self.names) - _SHOWN_ROWS} more blocks")
        if any(not pairs.converged.all() for pairs in self.eigenpairs.values()):
            lines.append("  * not converged")
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def block_spectra(
    H: HessianOperator,
    by: By | Mapping[str, Selection] = "layer",
    *,
    k: int = 2,
    tol: float = 1e-3,
    rtol: float = 0.05,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool | None = None,
) -> BlockSpectra:
    """Eigenvalues of both ends, trace and Frobenius norm of every principal block.

    All blocks are asked together: see `HessianOperator.blocks`.

    Parameters
    ----------
    H
        A `HessianOperator` or `GaussNewtonOperator`.
    by
        As of `HessianOperator.blocks`.
    k
        Eigenvalues of each block, half of them from either end; 2 for the largest and the smallest.
        At most the block's size.
    tol
        Of the eigenpairs, as of `eigsh`.
    rtol
        Of trace and norm.
    confidence
        Of the intervals.
    seed
        Of the random vectors.
    progress
        Show a progress bar, which counts passes over the data; None for on a terminal only.

    Returns
    -------
    BlockSpectra
        What did not converge is marked. Costs as many passes over the data as the block that takes
        most products; in a pass every block that still runs is multiplied with one vector.

    Raises
    ------
    ArgumentError, ArgumentTypeError, ParameterSelectionError
        No Hessian; blocks that overlap.
    NonFiniteError
        A product holds nan or inf; the message names the block.
    """
    if not isinstance(H, HessianOperator):
        msg = f"expected a HessianOperator, whose parameters have names, got a {type(H).__name__}"
        raise ArgumentTypeError(msg)
    check_eigsh_arguments(H.space.n, min(k, H.space.n), "BE", None, tol)
    check_confidence(confidence)
    blocks = H.blocks(by)

    def everything(block: SymmetricOperator) -> tuple[Eigenpairs, Estimate, Estimate]:
        pairs = eigsh(block, min(k, block.space.n), which="BE", tol=tol, seed=seed, progress=False)
        options: Any = {
            "rtol": rtol,
            "confidence": confidence,
            "seed": seed,
            "progress": False,
        }
        # What did not converge is no eigenvector, and would not be exact.
        known = pairs if pairs.converged.all() else None
        total = trace(block, deflate=known, **options)
        return pairs, total, norm(block, "fro", deflate=known, **options)

    with progress_bar("block spectra", None, progress, unit="pass") as bar:
        found = blocks.each(everything, after_pass=bar.update)
    return BlockSpectra(
        names=blocks.names,
        sizes=tuple(blocks.size(name) for name in blocks),
        eigenpairs={name: pairs for name, (pairs, _, _) in found.items()},
        traces={name: total for name, (_, total, _) in found.items()},
        norms={name: size for name, (_, _, size) in found.items()},
        passes=blocks.passes,
        matvecs=sum(sum(part.matvecs for part in parts) for parts in found.values()),
        provenance={
            "operator": blocks.describe(),
            "k": k,
            "tol": tol,
            "rtol": rtol,
            "seed": seed,
            "versions": versions(),
        },
    )
