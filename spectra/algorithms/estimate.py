"""What is one number, and how far off can it be?"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from scipy import stats

from spectra.errors import ArgumentError
from spectra.results import Result

__all__ = ["Estimate", "check_confidence"]


def check_confidence(confidence: float) -> None:
    """Refuse what is no probability strictly between 0 and 1."""
    if not 0 < confidence < 1:
        msg = f"confidence={confidence}; expected a probability between 0 and 1, such as 0.95"
        raise ArgumentError(msg)


@dataclass(frozen=True, eq=False)
class Estimate(Result):
    """A number with its error.

    Either the number is a mean over random probes (`samples`), with a standard error and Student's
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
        (s,) independent unbiased estimates of value ** power, one per probe.
    power
        1, or 2 where the samples estimate the square.
    bounds
        Interval that holds with probability `bounds_confidence`, of methods without samples.
    converged
        Whether the requested tolerance was met.
    method, matvecs, notes
        How, at which cost, and what to know before believing it.
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

    @property
    def exact(self) -> bool:
        """The value has no sampling error."""
        return self.standard_error == 0.0 and self.bounds is None

    def interval(self, confidence: float | None = None) -> tuple[float, float]:
        """Interval that contains the truth with the given probability.

        Student's interval over the probes: it treats their spread as normal, which the few probes
        of a skewed spectrum are not, so a nominal 95 % covers somewhat less (90 to 94 % with 3 to
        20 probes of an undeflated network spectrum).

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
            return (self.value, self.value)
        count = len(self.samples)
        if count < 2:
            return (0.0 if self.power == 2 else -math.inf, math.inf)
        quantile = float(stats.t.ppf(0.5 + confidence / 2, count - 1))
        mean = float(self.samples.mean())
        half = quantile * float(self.samples.std(ddof=1)) / math.sqrt(count)
        if self.power == 1:
            return (mean - half, mean + half)
        return (math.sqrt(max(mean - half, 0.0)), math.sqrt(mean + half))

    def running(self, confidence: float | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Value, lower and upper end of the interval after 2, 3, … probes."""
        confidence = self.confidence if confidence is None else confidence
        check_confidence(confidence)
        count = np.arange(1, len(self.samples) + 1)
        mean = np.cumsum(self.samples) / count
        variance = np.array([self.samples[:c].var(ddof=1) for c in count[1:]])
        count, mean = count[1:], mean[1:]
        half = stats.t.ppf(0.5 + confidence / 2, count - 1) * np.sqrt(variance / count)
        low, high = mean - half, mean + half
        if self.power == 2:
            return np.sqrt(mean), np.sqrt(np.maximum(low, 0.0)), np.sqrt(high)
        return mean, low, high

    def __str__(self) -> str:
        lines = [f"{self.quantity} = {self.value:.6g}"]
        if self.exact:
            lines[0] += f" (exact, {self.method}; {self.matvecs} matvecs)"
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
