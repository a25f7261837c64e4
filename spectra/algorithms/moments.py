"""What do probes say about the trace and the Frobenius norm, and when are they enough?"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from torch import Tensor

from spectra.algorithms.estimate import check_confidence, half_width, samples_needed
from spectra.errors import ArgumentError
from spectra.objective.vectors import VectorSpace

__all__ = [
    "SQUARE_WIDENING",
    "KnownPart",
    "Moment",
    "Moments",
    "Nothing",
    "Samples",
    "Stop",
    "check_tolerances",
]

Moment = Literal["trace", "square"]

# Squares are more skewed than the quadratic forms of a trace: with one outlier left undeflated,
# intervals of ten of them covered 90 % at nominal 95 %, and 93 % at this width.
SQUARE_WIDENING = 1.2


@dataclass(frozen=True, eq=False)
class Moments:
    """Unbiased estimates of the trace and of the squared Frobenius norm, one of each per probe.

    Attributes
    ----------
    traces, squares
        (s,) per probe, what is known of the operator included.
    exact
        The samples are not random: they are the exact moments.
    matvecs
        Products spent.
    variances
        (s,) per probe, an unbiased estimate of the variance of a sample of the trace; empty where
        the spread of the samples has to do.
    widening
        Factor of the half-width for samples of the trace that are not independent.
    noise
        Relative error of a product, measured on pairs of probes; nan where there was no pair.
    diagonal
        (n,) all entries of the diagonal, where the moments come from products with the n unit
        vectors; otherwise empty.
    """

    traces: np.ndarray
    squares: np.ndarray
    exact: bool
    matvecs: int
    variances: np.ndarray = field(default_factory=lambda: np.zeros(0))
    widening: float = 1.0
    noise: float = math.nan
    diagonal: np.ndarray = field(default_factory=lambda: np.zeros(0))

    @property
    def trace_error(self) -> float:
        """Standard error of the mean of `traces`."""
        count = len(self.traces)
        if self.exact:
            return 0.0
        if len(self.variances) == count:
            return self.widening * math.sqrt(float(self.variances.mean()) / count)
        return self.widening * float(self.traces.std(ddof=1)) / math.sqrt(count)

    def half_width(self, want: Moment, confidence: float) -> float:
        """Half-width of the interval for the mean of the samples."""
        if self.exact:
            return 0.0
        if want == "square":
            return half_width(self.squares, np.zeros(0), confidence, SQUARE_WIDENING)
        return half_width(self.traces, self.variances, confidence, self.widening)

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


class KnownPart(Protocol):
    """A part M of the operator, orthogonal to the rest H − M, that need not be sampled.

    Attributes
    ----------
    trace, square
        Trace of M, and its squared Frobenius norm.
    noted
        What else it keeps of the probes, at most one array of each.
    """

    trace: float
    square: float
    noted: list[np.ndarray]

    def take_from(self, vectors: Tensor, products: Tensor) -> None:
        """Turn products H z with some vectors, both as rows (k, n), into (H − M) z, in place."""


class Nothing:
    """No part is known."""

    trace = 0.0
    square = 0.0

    def __init__(self) -> None:
        self.noted: list[np.ndarray] = []

    def take_from(self, vectors: Tensor, products: Tensor) -> None:
        """Leave the products as they are."""


class Samples:
    """What probes say about the moments, collected one by one.

    Parameters
    ----------
    space
        Of the probes.
    begun
        Samples of earlier, independent probes.
    """

    def __init__(self, space: VectorSpace, begun: Moments | None = None) -> None:
        self._space = space
        self._traces: list[float] = [] if begun is None else list(begun.traces)
        self._squares: list[float] = [] if begun is None else list(begun.squares)
        self._variances: list[float] = [] if begun is None else list(begun.variances)

    def __len__(self) -> int:
        return len(self._traces)

    def add(self, known: KnownPart, vector: Tensor, product: Tensor) -> None:
        """Take in a probe z, uniform on a sphere of radius √n, and Hz, which is overwritten."""
        self.add_each(known, vector.unsqueeze(0), product.unsqueeze(0))

    def add_each(self, known: KnownPart, vectors: Tensor, products: Tensor) -> None:
        """Take in several probes and their products, both as rows (k, n).

        The variance of zᵀAz on the sphere is 2n / (n + 2) (‖A‖_F² − tr(A)² / n), and that is twice
        the mean of ‖Az − (zᵀAz / n) z‖²: every probe tells the variance without a second one. That
        is far less uncertain than the spread of skewed samples, and no difference of large numbers.
        """
        space = self._space
        known.take_from(vectors, products)
        for vector, product in zip(vectors, products, strict=True):
            inner = space.inner(vector, product)
            self._traces.append(known.trace + inner)
            self._squares.append(known.square + space.norm(product) ** 2)
            product.add_(vector, alpha=-inner / space.norm(vector) ** 2)
            self._variances.append(2 * space.norm(product) ** 2)

    def since(self, count: int) -> list[tuple[float, float, float]]:
        """The samples after so many: of the trace, of the square, and the variance of each."""
        values = (self._traces[count:], self._squares[count:], self._variances[count:])
        return list(zip(*values, strict=True))

    def append(self, sample: tuple[float, float, float]) -> None:
        """Take in a sample of another run."""
        for values, value in zip(
            (self._traces, self._squares, self._variances), sample, strict=True
        ):
            values.append(value)

    def moments(self, matvecs: int, noise: float) -> Moments:
        """The samples so far, with what they cost and how noisy the products were."""
        complete = len(self._variances) == len(self._traces)
        return Moments(
            np.array(self._traces),
            np.array(self._squares),
            exact=False,
            matvecs=matvecs,
            variances=np.array(self._variances if complete else []),
            noise=noise,
        )


@dataclass(frozen=True)
class Stop:
    """When the samples are enough.

    Raises
    ------
    ArgumentError
        Tolerances that mean nothing, or a budget that tells no error.
    """

    want: Moment
    rtol: float
    atol: float | None
    confidence: float
    max_matvecs: int

    def __post_init__(self) -> None:
        check_tolerances(self.rtol, self.atol, self.confidence, self.max_matvecs)

    def met(self, moments: Moments) -> bool:
        """Whether the half-width is within the tolerance."""
        target = moments.target(self.want, self.rtol, self.atol)
        return moments.half_width(self.want, self.confidence) <= target

    def probes_to_come(self, moments: Moments) -> float:
        """How many more the tolerance takes."""
        if self.met(moments):
            return 0.0
        target, count = moments.target(self.want, self.rtol, self.atol), len(moments.traces)
        if target == 0.0:
            return math.inf
        excess = moments.half_width(self.want, self.confidence) / target
        known = self.want == "trace" and len(moments.variances) == count
        return samples_needed(count, excess, self.confidence, known=known) - count


def check_tolerances(rtol: float, atol: float | None, confidence: float, max_matvecs: int) -> None:
    """Refuse tolerances that mean nothing and budgets that tell no error."""
    if not (rtol >= 0 and (atol is None or atol >= 0)) or (rtol == 0 and not atol):
        msg = f"rtol={rtol}, atol={atol}; expected tolerances >= 0, at least one of them > 0"
        raise ArgumentError(msg)
    check_confidence(confidence)
    if max_matvecs < 2:
        msg = f"max_matvecs={max_matvecs}; an error estimate needs at least 2 probes"
        raise ArgumentError(msg)
