"""Which numbers are sums over all eigenvalues? Log-determinant, effective dimension, ranks.

Each takes an operator, or a finished density and then no further product.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from spectra.algorithms.counting import with_floor
from spectra.algorithms.estimate import Estimate, check_confidence
from spectra.algorithms.measure import SpectralDensity
from spectra.algorithms.summation import (
    EVERYWHERE,
    FOR_THE_ENDS,
    Function,
    density_of,
    estimate,
    jackknife,
    probe_sums,
    result,
    spectral_interval,
    spectral_sum,
    tolerance,
)
from spectra.errors import ArgumentError

if TYPE_CHECKING:
    from spectra.algorithms.eigen import Eigenpairs

__all__ = [
    "effective_dimension",
    "effective_rank",
    "logdet",
    "participation_ratio",
    "spectral_sum",
]


def logdet(
    H: Any,
    shift: float = 0.0,
    *,
    domain: tuple[float, float] = EVERYWHERE,
    steps: int | None = None,
    probes: int | None = None,
    deflate: Eigenpairs | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool | None = None,
) -> Estimate:
    """The logarithm of the determinant of H + shift, which has to be positive definite.

    The options and the result are those of `spectral_sum`, the bounds are rigorous.

    Parameters
    ----------
    H
        An operator or matrix, or a finished `SpectralDensity`.
    shift
        Added to all eigenvalues.
    domain
        Interval known to hold all eigenvalues of H: (0, inf) for a positive semidefinite one.
    steps, probes, deflate, confidence, seed, progress
        As for `spectral_sum`.

    Raises
    ------
    ArgumentError
        An eigenvalue λ <= −shift was found; the message names it, and a shift that works.

    References
    ----------
    Ubaru, Chen and Saad, 2017, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature".
    Bai and Golub, 1996, "Bounds for the trace of the inverse and the determinant of symmetric
    positive definite matrices".
    """
    check_confidence(confidence)
    density, matvecs = density_of(
        H, steps=steps, probes=probes, deflate=deflate, seed=seed, progress=progress
    )
    if not math.isfinite(shift):
        msg = f"shift={shift}; expected a finite number"
        raise ArgumentError(msg)
    smallest = density.support[0]
    if not smallest + shift > 0:
        low = spectral_interval(density, 0.99)[0]
        room = 1e-3 * max(map(abs, density.support))
        msg = (
            f"shift={shift:g}, but {smallest:.6g} is an eigenvalue or above the smallest one: "
            f"H + shift is not positive definite; a shift above {room - low:.4g} works (all "
            "eigenvalues are above its opposite with 99 % probability)"
        )
        raise ArgumentError(msg)
    return estimate(
        f"log-determinant of H + {shift:g}" if shift else "log-determinant",
        density,
        lambda x: np.log(x + shift),
        derivative_signs=(-1, 1),
        domain=(max(domain[0], -shift), domain[1]),
        confidence=confidence,
        matvecs=matvecs,
    )


def effective_dimension(
    H: Any,
    c: float,
    *,
    part: Literal["error", "positive", "abs"] = "error",
    domain: tuple[float, float] = EVERYWHERE,
    steps: int | None = None,
    probes: int | None = None,
    deflate: Eigenpairs | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool | None = None,
) -> Estimate:
    """The effective dimension Σ λ / (λ + c): how many eigenvalues are large beside c.

    The options and the result are those of `spectral_sum`.

    Parameters
    ----------
    H
        An operator or matrix, or a finished `SpectralDensity`.
    c
        Positive: the precision of the prior, or the regularisation.
    part
        What to do where an eigenvalue is negative, beyond the noise of the products: "error"
        refuses, "positive" counts only the positive ones, "abs" takes |λ|. With "error" the bounds
        are rigorous; the other two have a kink at zero, and an estimate of the quadrature's error.
    domain
        Interval known to hold all eigenvalues of H: (0, inf) for a positive semidefinite one.
    steps, probes, deflate, confidence, seed, progress
        As for `spectral_sum`.

    Raises
    ------
    ArgumentError
        `c` is not positive, or there are negative eigenvalues and `part` is "error".

    References
    ----------
    MacKay, 1992, "Bayesian interpolation" (number of well-determined parameters). Maddox, Benton
    and Wilson, 2020, "Rethinking parameter counting in deep models".
    """
    check_confidence(confidence)
    if not 0 < c < math.inf:
        msg = f"c={c}; expected a positive number"
        raise ArgumentError(msg)
    if part not in {"error", "positive", "abs"}:
        msg = f"part={part!r}; expected 'error', 'positive' or 'abs'"
        raise ArgumentError(msg)
    density, matvecs = density_of(
        H, steps=steps, probes=probes, deflate=deflate, seed=seed, progress=progress
    )
    smallest = density.support[0]
    if part == "error" and smallest < -tolerance(density):
        msg = (
            f"{smallest:.4g} is an eigenvalue or above the smallest one, and the effective "
            "dimension is defined for eigenvalues >= 0; choose part='positive' or part='abs', or "
            "take the Gauss-Newton operator, which has no negative ones"
        )
        raise ArgumentError(msg)

    def smooth(x: np.ndarray) -> np.ndarray:
        return np.asarray(x / (x + c))

    functions: dict[str, Function] = {
        "error": smooth,
        "positive": lambda x: smooth(np.maximum(x, 0)),
        "abs": lambda x: smooth(np.abs(x)),
    }
    kind = {"error": "", "positive": " of the positive part", "abs": " of |H|"}[part]
    return estimate(
        f"effective dimension{kind} at {c:g}",
        density,
        functions[part],
        derivative_signs=(-1, 1) if part == "error" else None,
        domain=(max(domain[0], -c), domain[1]) if part == "error" else domain,
        confidence=confidence,
        matvecs=matvecs,
    )


def participation_ratio(
    H: Any,
    *,
    steps: int | None = None,
    probes: int | None = None,
    deflate: Eigenpairs | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool | None = None,
) -> Estimate:
    """The participation ratio tr(H)² / tr(H²): how many equal eigenvalues would give both.

    Both moments are exact for each probe from two steps on, the default; the error is the probes'
    alone, by the jackknife. Where eigenvalues of both signs cancel it is small: see
    `effective_rank` for |λ|.

    Parameters
    ----------
    H
        An operator or matrix, or a finished `SpectralDensity` of two steps or more.
    steps, probes, deflate, confidence, seed, progress
        As for `spectral_sum`; two steps and ten probes by default.

    Raises
    ------
    ArgumentError
        Fewer than two steps, where the space has more dimensions.

    References
    ----------
    Litwin-Kumar, Harris, Axel, Sompolinsky and Abbott, 2017, "Optimal degrees of synaptic
    connectivity" (as the dimension of a covariance). Tukey, 1958, "Bias and confidence in not-quite
    large samples" (jackknife).
    """
    check_confidence(confidence)
    if not isinstance(H, SpectralDensity):
        steps, probes = 2 if steps is None else steps, 10 if probes is None else probes
    density, matvecs = density_of(
        H, steps=steps, probes=probes, deflate=deflate, seed=seed, progress=progress
    )
    if density.steps < min(2, density.remaining):
        msg = "steps=1 tells no square of the eigenvalues; take two steps or more"
        raise ArgumentError(msg)

    def compute(density: SpectralDensity) -> Estimate:
        moments = np.stack([density.moment_samples(1), density.moment_samples(2)])
        values = jackknife(lambda mean: _ratio(float(mean[0]) ** 2, float(mean[1])), moments)
        return result(
            "participation ratio",
            density,
            values,
            (values, values),
            error="jackknife",
            confidence=confidence,
            matvecs=matvecs,
        )

    return _counted(with_floor(density, compute), density.n)


def effective_rank(
    H: Any,
    *,
    kind: Literal["entropy", "stable"] = "entropy",
    steps: int | None = None,
    probes: int | None = None,
    deflate: Eigenpairs | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool | None = None,
) -> Estimate:
    """How many directions the operator acts in, counted by the size of its eigenvalues.

    Parameters
    ----------
    H
        An operator or matrix, or a finished `SpectralDensity`.
    kind
        "entropy": exp(−Σ p ln p) with p = |λ| / Σ|λ| (Roy and Vetterli). "stable": the stable rank
        ‖H‖_F² / ‖H‖₂², which never exceeds the rank (Rudelson and Vershynin).
    steps, probes, deflate, confidence, seed, progress
        As for `spectral_sum`.

    Notes
    -----
    The errors of a ratio are those of the jackknife over the probes; "entropy" adds the difference
    to the rule of half the steps, "stable" what the largest |eigenvalue| may exceed the largest
    one found by. For the participation ratio of |λ|, square `norm(H, "nuc")` over
    `norm(H, "fro")`.

    References
    ----------
    Roy and Vetterli, 2007, "The effective rank: a measure of effective dimensionality". Rudelson
    and Vershynin, 2007, "Sampling from large matrices: an approach through geometric functional
    analysis".
    """
    check_confidence(confidence)
    if kind not in {"entropy", "stable"}:
        msg = f"kind={kind!r}; expected 'entropy' or 'stable'"
        raise ArgumentError(msg)
    density, matvecs = density_of(
        H, steps=steps, probes=probes, deflate=deflate, seed=seed, progress=progress
    )
    found = with_floor(density, lambda moved: _effective_rank(moved, kind, confidence, matvecs))
    # Only the zero operator has none.
    return _counted(found, density.n, least=1.0 if any(density.support) else 0.0)


def _effective_rank(
    density: SpectralDensity, kind: str, confidence: float, matvecs: int
) -> Estimate:
    # Relative to the largest one the numbers under the logarithm lose no digits.
    largest = max(map(abs, density.support)) or 1.0

    def size(x: np.ndarray) -> np.ndarray:
        return np.abs(x) / largest

    def entropy(x: np.ndarray) -> np.ndarray:
        return np.asarray(-np.log(np.where(x == 0, largest, np.abs(x)) / largest) * size(x))

    if kind == "entropy":
        sizes, entropies = probe_sums(density, size), probe_sums(density, entropy)

        def rank(mean: np.ndarray) -> float:
            return float(mean[0]) * math.exp(_ratio(float(mean[1]), float(mean[0])))

        values = jackknife(rank, np.stack([sizes.whole, entropies.whole]))
        room = math.inf
        if np.isfinite(sizes.half).all():
            half = rank(np.array([sizes.half.mean(), entropies.half.mean()]))
            room = abs(half - rank(np.array([sizes.whole.mean(), entropies.whole.mean()])))
        return result(
            "effective rank (entropy)",
            density,
            values,
            (values - room, values + room),
            error="jackknife, and the rule of half the steps",
            confidence=confidence,
            matvecs=matvecs,
        )
    risk = FOR_THE_ENDS * (1 - confidence)
    norm = max(map(abs, spectral_interval(density, 1 - risk)))
    squares = probe_sums(density, lambda x: size(x) ** 2).whole
    return result(
        "stable rank",
        density,
        squares,
        # The larger the norm, the smaller the ratio.
        (squares * _ratio(largest, norm) ** 2, squares),
        error="the largest eigenvalue within its bounds",
        confidence=confidence,
        risk=risk,
        matvecs=matvecs,
    )


def _counted(estimate: Estimate, n: int, least: float = 0.0) -> Estimate:
    """A number of directions is neither below the least nor above n."""
    if estimate.exact:
        return estimate
    low, high = estimate.interval()
    return replace(
        estimate,
        value=min(max(estimate.value, least), float(n)),
        bounds=(min(max(low, least), float(n)), max(min(high, float(n)), least)),
        bounds_confidence=estimate.confidence,
    )


def _ratio(over: float, under: float) -> float:
    """0 for the zero operator."""
    return over / under if under > 0 else 0.0
