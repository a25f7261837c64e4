"""Which random vectors, and what do products with them say about the trace and the norm?

Randomness comes from one explicitly seeded generator per call, drawn on the CPU, so that the same
seed gives the same vectors on every device; the global random state is neither read nor written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from scipy import special
from torch import Tensor

from spectra.algorithms.estimate import check_confidence
from spectra.algorithms.progress import progress_bar
from spectra.errors import ArgumentError, ArgumentTypeError
from spectra.objective.vectors import VectorSpace
from spectra.operators.base import SymmetricOperator

__all__ = [
    "Deflation",
    "Moments",
    "check_tolerances",
    "gaussian",
    "remove",
    "sample_moments",
    "seeded",
    "sphere",
]

Moment = Literal["trace", "square"]

# Fewer probes tell nothing about their own spread.
_MIN_PROBES = 5
# Up to this n, products with all unit vectors are cheaper than any estimate.
_SMALL = 32


def seeded(seed: int) -> torch.Generator:
    """A generator that starts at `seed`.

    Raises
    ------
    ArgumentError
        The seed is no integer, or negative.
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**64:
        msg = f"seed={seed!r}; expected an integer >= 0 (and below 2**64)"
        raise ArgumentError(msg)
    return torch.Generator().manual_seed(int(seed))


def gaussian(space: VectorSpace, generator: torch.Generator) -> Tensor:
    """A vector (n,) of independent standard normal entries."""
    return torch.randn(space.n, generator=generator, dtype=space.dtype).to(space.device)


def sphere(
    space: VectorSpace, generator: torch.Generator, orthogonal_to: Tensor | None = None
) -> Tensor:
    """A unit vector (n,), uniform on the sphere, or on the part of it orthogonal to given rows.

    Parameters
    ----------
    orthogonal_to
        Orthonormal rows (r, n), r < n.
    """
    vector = gaussian(space, generator)
    if orthogonal_to is not None:
        remove(space, vector, orthogonal_to)
    return vector.div_(space.norm(vector))


def remove(space: VectorSpace, vector: Tensor, rows: Tensor) -> None:
    """Take the components along orthonormal rows away from `vector`, in place, twice."""
    for _ in range(2):
        space.subtract(vector, rows, space.project(rows, vector))


class Deflation:
    """Known eigenpairs to be taken out of probes.

    Attributes
    ----------
    basis
        (r, n) orthonormal rows.
    values
        (r,) float64 their Rayleigh quotients.
    square
        What they contribute to the squared Frobenius norm, their residuals included.
    """

    def __init__(self, operator: SymmetricOperator, pairs: Any) -> None:
        if not all(hasattr(pairs, name) for name in ("values", "vectors", "residuals")):
            msg = f"deflate takes the Eigenpairs that eigsh returned, got a {type(pairs).__name__}"
            raise ArgumentTypeError(msg)
        vectors, space = pairs.vectors, operator.space
        columns = vectors if isinstance(vectors, Tensor) else operator.from_numpy(vectors)
        if columns.shape[0] != space.n:
            msg = (
                f"deflate holds eigenvectors of length {columns.shape[0]}, the operator has "
                f"n = {space.n}; pass the result of eigsh on the same operator"
            )
            raise ArgumentError(msg)
        self.basis = columns.to(device=space.device, dtype=space.dtype).T.contiguous()
        gram = torch.stack([space.project(self.basis, row) for row in self.basis])
        defect = float((gram - torch.eye(len(gram), device=gram.device)).abs().max())
        if defect > space.eps**0.5:
            msg = (
                "deflate holds vectors that are not orthonormal: their Gram matrix is off by "
                f"{defect:.2g}"
            )
            raise ArgumentError(msg)
        self.values = np.asarray(pairs.values, dtype=np.float64)
        # H q = λ q + r puts r both above and below the diagonal of the deflated block.
        self.square = float((self.values**2).sum() + 2 * (np.asarray(pairs.residuals) ** 2).sum())

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True, eq=False)
class Moments:
    """Unbiased estimates of the trace and of the squared Frobenius norm, one of each per probe.

    Attributes
    ----------
    traces, squares
        (s,) per probe, what is known of deflated eigenpairs included.
    exact
        The samples are not random: they are the exact moments.
    matvecs
        Products spent.
    """

    traces: np.ndarray
    squares: np.ndarray
    exact: bool
    matvecs: int

    def half_width(self, want: Moment, confidence: float) -> float:
        """Half-width of Student's interval for the mean of the samples."""
        samples = self.traces if want == "trace" else self.squares
        if self.exact:
            return 0.0
        if len(samples) < 2:
            return math.inf
        quantile = float(special.stdtrit(len(samples) - 1, 0.5 + confidence / 2))
        return quantile * float(samples.std(ddof=1)) / math.sqrt(len(samples))

    def target(self, want: Moment, rtol: float, atol: float | None) -> float:
        """The half-width that the tolerances ask for.

        Without `atol`, the scale of the relative tolerance of a trace is at least ‖H‖_F, or one
        that is zero by cancellation could never be reached.
        """
        square = float(self.squares.mean())
        if want == "square":
            # A relative error of the norm is half that of its square.
            return max(2 * rtol * square, 2 * math.sqrt(square) * (atol or 0.0))
        trace = abs(float(self.traces.mean()))
        if atol is None:
            return rtol * max(trace, math.sqrt(square))
        return max(rtol * trace, atol)


def sample_moments(
    operator: SymmetricOperator,
    deflation: Deflation | None,
    *,
    want: Moment,
    rtol: float,
    atol: float | None,
    confidence: float,
    max_matvecs: int,
    seed: int,
    progress: bool | None,
    begun: Moments | None = None,
) -> Moments:
    """Probe until the moment `want` is known to the tolerance, or the budget is spent.

    With z uniform on the sphere of radius sqrt(n - r) in the complement of r known eigenvectors,
    E zᵀHz is the complement's trace and E ‖Hz‖² its squared Frobenius norm. Not random signs: their
    samples take few values on a matrix with few off-diagonal entries, and five equal ones would
    look like certainty. Where the tolerance would take more probes than the n products that give
    the moments exactly, those are computed instead.

    Parameters
    ----------
    begun
        Samples of earlier, independent probes to go on from; `max_matvecs` counts the new ones.
    """
    check_tolerances(rtol, atol, confidence, max_matvecs)
    space = operator.space
    generator = seeded(seed)
    known_trace = 0.0 if deflation is None else float(deflation.values.sum())
    known_square = 0.0 if deflation is None else deflation.square
    dimension = space.n - (0 if deflation is None else len(deflation))
    if dimension == 0:
        return Moments(np.array([known_trace]), np.array([known_square]), exact=True, matvecs=0)
    traces: list[float] = [] if begun is None else list(begun.traces)
    squares: list[float] = [] if begun is None else list(begun.squares)
    spent = 0
    with progress_bar(want, max_matvecs, progress) as bar:
        if deflation is None and begun is None and space.n <= min(_SMALL, max_matvecs):
            return _exact_moments(operator, spent, bar)
        while spent < max_matvecs:
            moments = Moments(np.array(traces), np.array(squares), exact=False, matvecs=spent)
            if len(traces) >= min(_MIN_PROBES, max_matvecs):
                reached = moments.half_width(want, confidence)
                target = moments.target(want, rtol, atol)
                if reached <= target:
                    return moments
                # The half-width falls with the square root of the number of probes.
                needed = len(traces) * (reached / target) ** 2 if target > 0 else math.inf
                if needed - len(traces) > space.n <= max_matvecs - spent:
                    return _exact_moments(operator, spent, bar)
            basis = None if deflation is None else deflation.basis
            probe = sphere(space, generator, basis).mul_(math.sqrt(dimension))
            product = operator.apply(probe)
            spent += 1
            if basis is not None:
                remove(space, product, basis)
            traces.append(known_trace + space.inner(probe, product))
            squares.append(known_square + space.norm(product) ** 2)
            bar.update()
    return Moments(np.array(traces), np.array(squares), exact=False, matvecs=spent)


def _exact_moments(operator: SymmetricOperator, spent: int, bar: Any) -> Moments:
    """Trace and squared Frobenius norm from the n products with unit vectors."""
    space = operator.space
    trace = square = 0.0
    for i in range(space.n):
        unit = space.zeros()
        unit[i] = 1.0
        column = operator.apply(unit)
        trace += float(column[i])
        square += space.norm(column) ** 2
        bar.update()
    return Moments(np.array([trace]), np.array([square]), exact=True, matvecs=spent + space.n)


def check_tolerances(rtol: float, atol: float | None, confidence: float, max_matvecs: int) -> None:
    """Refuse tolerances that mean nothing and budgets that tell no error."""
    if not (rtol >= 0 and (atol is None or atol >= 0)) or (rtol == 0 and not atol):
        msg = f"rtol={rtol}, atol={atol}; expected tolerances >= 0, at least one of them > 0"
        raise ArgumentError(msg)
    check_confidence(confidence)
    if max_matvecs < 2:
        msg = f"max_matvecs={max_matvecs}; an error estimate needs at least 2 probes"
        raise ArgumentError(msg)
