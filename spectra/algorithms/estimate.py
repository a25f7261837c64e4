"""What is one number, and how far off can it be?"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from scipy import special

from spectra.algorithms.noise import LOUD
from spectra.errors import ArgumentError
from spectra.names import short_name
from spectra.results import Result

__all__ = ["Estimate", "check_confidence", "half_width", "samples_needed"]

# The spread of few samples of a skewed distribution is itself uncertain and correlated with their
# mean. Measured: 1 + 1.5 / N brings 95 % intervals of N samples from 90 to 93 % and more.
_SKEW = 1.5

# Nobody waits for so many samples, 10¹² and more, and their number would overflow somewhere.
_OUT_OF_REACH = 1e6


def check_confidence(confidence: float) -> None:
    """Refuse what is no probability strictly between 0 and 1."""
    if not 0 < confidence < 1:
        msg = f"confidence={confidence}; expected a probability between 0 and 1, such as 0.95"
        raise ArgumentError(msg)


def half_width(
    samples: np.ndarray, variances: np.ndarray, confidence: float, widening: float = 1.0
) -> float:
    """Half-width of an interval for the mean of samples, by Student's quantile.

    Parameters
    ----------
    samples
        (s,) estimates of one number.
    variances
        (s,) unbiased estimates of the variance of one sample, or empty where it has to come from
        the spread of the samples: then the interval is 1 + 1.5 / s times as wide.
    confidence
        That the interval contains the number.
    widening
        Factor for samples that are not independent.
    """
    count = len(samples)
    if count < 2:
        return math.inf
    known = len(variances) == count
    deviation = math.sqrt(float(variances.mean())) if known else float(samples.std(ddof=1))
    factor = widening * _student(count, confidence, known=known)
    return factor * deviation / math.sqrt(count)


def samples_needed(count: int, excess: float, confidence: float, *, known: bool) -> float:
    """How many samples make an interval of `count` of them `excess` > 1 times narrower, to 0.1 %.

    More than by the root of their number: the fewer there are, the less they tell of their own
    spread, and the wider is Student's interval. Five of them would make 1.7 times too many of the
    samples to come.

    Parameters
    ----------
    known
        Each tells its variance, see `half_width`.
    """
    if not excess < _OUT_OF_REACH:
        return math.inf
    now = _student(count, confidence, known=known)
    # Too few, and enough: the distance between them halves, on a logarithmic scale.
    few, enough = float(count), count * excess**2
    while enough > 1.001 * few:
        between = math.sqrt(few * enough)
        width = excess * _student(between, confidence, known=known) / now
        if between < count * width**2:
            few = between
        else:
            enough = between
    return enough


def _student(count: float, confidence: float, *, known: bool) -> float:
    """Half-width of an interval in standard errors."""
    quantile = float(special.stdtrit(count - 1, 0.5 + confidence / 2))
    return quantile if known else quantile * (1 + _SKEW / count)


@dataclass(frozen=True, eq=False)
class Estimate(Result):
    """A number with its error.

    Either the number is a mean over random probes (`samples`), with a standard error and an
    interval; or it lies between `bounds`, which hold with a stated probability; or it is exact.

    Attributes
    ----------
    quantity
        What it is, for people: "trace", "Frobenius norm", "spectral norm".
    value
        The estimate.
    standard_error
        Of `value`; nan where the method has none (bounds instead), 0 where it is exact.
    samples
        (s,) unbiased estimates of value ** power, one per probe.
    power
        1, or 2 where the samples estimate the square.
    variances
        (s,) unbiased estimates of the variance of one sample, one per probe, where the probes tell
        more about it than the spread of their samples does; otherwise empty.
    widening
        Factor of the intervals beyond that of independent samples; 1 where they are independent.
    bounds
        Interval that holds with probability `bounds_confidence`, of methods without samples.
    converged
        Whether the requested tolerance was met.
    method, matvecs, notes
        How, at which cost, and what to know before believing it.
    noise
        Relative error of a product, measured; nan where it was not.
    floor
        Accuracy of `value` below which digits mean nothing because of that noise.
    """

    quantity: str
    value: float
    standard_error: float
    samples: np.ndarray = field(default_factory=lambda: np.zeros(0), repr=False)
    power: int = 1
    bounds: tuple[float, float] | None = None
    bounds_confidence: float = 1.0
    confidence: float = 0.95
    converged: bool = True
    method: str = ""
    matvecs: int = 0
    notes: tuple[str, ...] = ()
    variances: np.ndarray = field(default_factory=lambda: np.zeros(0), repr=False)
    widening: float = 1.0
    noise: float = math.nan
    floor: float = math.nan

    @property
    def exact(self) -> bool:
        """The value has no sampling error."""
        return self.standard_error == 0.0 and self.bounds is None

    def interval(self, confidence: float | None = None) -> tuple[float, float]:
        """Interval that contains the truth with the given probability.

        Student's quantile times the standard error. That comes from `variances` where they are
        known; otherwise from the spread of the s samples, times 1 + 1.5 / s because the samples
        of a spectrum with outliers are skewed. See docs/methods/trace.md for measured coverage.

        Raises
        ------
        ArgumentError
            The confidence is not between 0 and 1, or beyond what `bounds` promise.
        """
        confidence = self.confidence if confidence is None else confidence
        check_confidence(confidence)
        if self.bounds is not None:
            if confidence > self.bounds_confidence:
                msg = f"the bounds of this estimate hold with {self.bounds_confidence:.0%}, no more"
                raise ArgumentError(msg)
            return self.bounds
        if self.exact:
            # Without a sampling error; but what noisy products add up to is noisy.
            room = self.floor if self.noise > LOUD else 0.0
            return (self.value - room, self.value + room)
        return self._interval(len(self.samples), confidence)

    def running(self, confidence: float | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Value, lower and upper end of the interval after 2, 3, … probes."""
        confidence = self.confidence if confidence is None else confidence
        check_confidence(confidence)
        count = range(2, len(self.samples) + 1)
        mean = np.array([self.samples[:c].mean() for c in count])
        ends = np.array([self._interval(c, confidence) for c in count]).reshape(-1, 2)
        return mean if self.power == 1 else np.sqrt(mean), ends[:, 0], ends[:, 1]

    def _interval(self, count: int, confidence: float) -> tuple[float, float]:
        """Interval from the first probes."""
        samples = self.samples[:count]
        half = half_width(samples, self.variances[:count], confidence, self.widening)
        if half == math.inf:
            return (0.0 if self.power == 2 else -math.inf, math.inf)
        mean = float(samples.mean())
        if self.power == 1:
            return (mean - half, mean + half)
        return (math.sqrt(max(mean - half, 0.0)), math.sqrt(mean + half))

    def __str__(self) -> str:
        lines = [f"{short_name(self.quantity)} = {self.value:.6g}"]
        if self.exact:
            exact = f"exact to ±{self.floor:.2g}" if self.noise > LOUD else "exact"
            lines[0] += f" ({exact}, {self.method}; {self.matvecs} matvecs)"
        else:
            low, high = self.interval(min(self.confidence, self.bounds_confidence))
            level = self.bounds_confidence if self.bounds is not None else self.confidence
            probes = f"{len(self.samples)} probes, " if len(self.samples) else ""
            lines[0] += (
                f"  ({level:.0%} interval [{low:.6g}, {high:.6g}], {self.method}; {probes}"
                f"{self.matvecs} matvecs)"
            )
        if not self.converged:
            lines[0] += "  tolerance not reached"
        return "\n".join(lines + [f"note: {note}" for note in self.notes])
