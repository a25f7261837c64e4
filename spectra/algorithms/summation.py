"""What is the sum of a function over all eigenvalues, and how far off can it be?

tr f(H) = Σ f(deflated eigenvalues) + (n − r) · mean over the probes of Σ w f(θ), from the nodes θ
and weights w of a Lanczos quadrature. Every error is that of the probes and that of the quadrature
together: the latter rigorous where the signs of the derivatives of f are known, an estimate
elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from spectra.algorithms import quadrature
from spectra.algorithms.counting import mean_bounds, with_floor
from spectra.algorithms.density import spectral_density
from spectra.algorithms.estimate import Estimate, check_confidence
from spectra.algorithms.lanczos import upper_bound
from spectra.algorithms.measure import SpectralDensity
from spectra.errors import ArgumentError, ArgumentTypeError, SpectraError

if TYPE_CHECKING:
    from spectra.algorithms.eigen import Eigenpairs

__all__ = [
    "EVERYWHERE",
    "FOR_THE_ENDS",
    "Function",
    "ProbeSums",
    "density_of",
    "estimate",
    "jackknife",
    "probe_sums",
    "result",
    "spectral_interval",
    "spectral_sum",
    "tolerance",
]

Function = Callable[[np.ndarray], np.ndarray]

EVERYWHERE = (-math.inf, math.inf)

# Of the probability that an interval misses the truth, this share is left to the ends of the
# spectrum, which are far easier to be sure of than the mean over the probes.
FOR_THE_ENDS = 0.1

# A prescribed node keeps this distance from the outermost Ritz value, relative to the range.
_APART = 1e-9


def spectral_sum(
    H: Any,
    f: Function,
    *,
    derivative_signs: tuple[int, int] | None = None,
    domain: tuple[float, float] = EVERYWHERE,
    steps: int | None = None,
    probes: int | None = None,
    deflate: Eigenpairs | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool | None = None,
) -> Estimate:
    """The sum of f over all eigenvalues, tr f(H).

    Parameters
    ----------
    H
        An operator, a torch or NumPy matrix, a SciPy sparse matrix or LinearOperator; or a finished
        `SpectralDensity`, which gives any number of sums without another product.
    f
        Of a float64 array (k,) of eigenvalues; returns as many numbers, such as `numpy.exp`.
    derivative_signs
        Signs (+1 or −1) of the even and of the odd derivatives of f, from the second on and the
        same for all: (1, 1) for exp, (−1, 1) for log, (1, −1) for 1/x. They turn the error of the
        quadrature from an estimate into rigorous Gauss and Gauss-Radau bounds.
    domain
        Interval that is known to hold all eigenvalues and where f has those derivatives: (0, inf)
        for the logarithm of a positive definite operator. Give it wherever f has a pole: beyond,
        the derivatives have other signs. Within it, the ends of the spectrum are what the
        eigenvalues do not exceed with high probability.
    steps, probes, deflate, seed
        Of the density, as for `spectral_density`; not with a finished one.
    confidence
        Of the bounds.
    progress
        Show a progress bar; None for on a terminal only.

    Returns
    -------
    Estimate
        With one sample per probe. Its `bounds` hold the error of the quadrature and that of the
        probes; of a single probe it has none. `standard_error` is of the probes alone. Exact where
        a run spanned the whole space.

    Raises
    ------
    ArgumentError
        f returns nan, inf or another shape, or an eigenvalue is outside the domain.

    Notes
    -----
    Costs probes · steps matvecs, none with a finished density.

    With derivatives of one sign the Gauss rule errs to one side, and the Gauss-Radau rules with a
    node at an end of the spectrum to known sides. Without them, the difference to the rule of half
    the steps (from the same products) stands for the error of the whole rule, which is usually far
    smaller.

    References
    ----------
    Golub and Meurant, 2010, "Matrices, moments and quadrature with applications". Ubaru, Chen and
    Saad, 2017, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature".
    """
    check_confidence(confidence)
    density, matvecs = density_of(
        H, steps=steps, probes=probes, deflate=deflate, seed=seed, progress=progress
    )
    return estimate(
        "spectral sum",
        density,
        f,
        derivative_signs=derivative_signs,
        domain=domain,
        confidence=confidence,
        matvecs=matvecs,
    )


def spectral_interval(density: SpectralDensity, confidence: float = 0.99) -> tuple[float, float]:
    """What all eigenvalues lie between, with the given probability over the probes.

    References
    ----------
    Van Dorsselaer, Hochstenbach and van der Vorst, 2000, "Computing probabilistic bounds for
    extreme eigenvalues of symmetric matrices with the Lanczos method".
    """
    low, high = density.support
    ends = _undeflated_interval(density, confidence)
    return min(low, ends[0]), max(high, ends[1])


def _undeflated_interval(density: SpectralDensity, confidence: float) -> tuple[float, float]:
    """The same of the eigenvalues that were not deflated; nothing where there are none.

    Every probe's run bounds both ends; the narrowest bounds are taken, and the risk is divided
    among all of them.
    """
    each = 1 - (1 - confidence) / (2 * density.probes)
    lows, highs = [-math.inf], [math.inf]
    for i in range(density.probes if density.steps else 0):
        alphas, betas = density.coefficients(i)
        ritz = quadrature.gauss(alphas, betas)[0]
        highs.append(upper_bound(ritz, betas, density.remaining, each))
        lows.append(-upper_bound(-ritz, betas, density.remaining, each))
    if density.steps == 0:
        return math.inf, -math.inf
    return max(lows), min(highs)


@dataclass(frozen=True)
class ProbeSums:
    """(probes,) estimates of a sum by the whole rule and by that of half the steps.

    The half of a single step is infinite: there is nothing to tell the error by.
    """

    whole: np.ndarray
    half: np.ndarray

    @property
    def differences(self) -> np.ndarray:
        """(probes,) what the half rule is off by: more than the whole one, as a rule."""
        distances: np.ndarray = np.abs(self.whole - self.half)
        return distances


def density_of(
    H: Any,
    *,
    steps: int | None,
    probes: int | None,
    deflate: Eigenpairs | None,
    seed: int,
    progress: bool | None,
) -> tuple[SpectralDensity, int]:
    """The density, and what it cost now."""
    if not isinstance(H, SpectralDensity):
        density = spectral_density(
            H, steps=steps, probes=probes, deflate=deflate, seed=seed, progress=progress
        )
        return density, density.matvecs
    given = {"steps": steps, "probes": probes, "deflate": deflate}
    if set_ := [name for name, value in given.items() if value is not None]:
        msg = (
            f"{', '.join(set_)} given with a finished density; pass the operator with them, or the "
            "density alone (spectral_density(H, begun=density, …) adds to it)"
        )
        raise ArgumentError(msg)
    return H, 0


def tolerance(density: SpectralDensity) -> float:
    """How far rounding and noise may have moved an eigenvalue."""
    largest = max(map(abs, density.support))
    floor = 0.0 if math.isnan(density.floor) else density.floor
    return max(floor, 1e-12 * largest)


def _checked(f: Function, x: np.ndarray) -> np.ndarray:
    """f(x), refused where it is no function of an array or not finite."""
    if not callable(f):
        msg = f"f is a {type(f).__name__}; expected a function of an array, such as numpy.exp"
        raise ArgumentTypeError(msg)
    try:
        with np.errstate(all="ignore"):
            values = np.asarray(f(x))
    except SpectraError:
        raise
    except Exception as error:
        msg = (
            f"f failed on a NumPy array ({type(error).__name__}: {error}); it takes an array (k,) "
            "and returns as many real numbers, such as numpy.exp"
        )
        raise ArgumentTypeError(msg) from error
    if values.shape != x.shape or values.dtype.kind not in "fiu":
        msg = (
            f"f returned {values.dtype} of shape {values.shape} for {len(x)} eigenvalues; it takes "
            "an array (k,) and returns as many real numbers, such as numpy.log"
        )
        raise ArgumentError(msg)
    if not np.isfinite(values).all():
        place = x[~np.isfinite(values)][0]
        msg = (
            f"f is not finite at {place:.6g}, which is an eigenvalue or lies between two; it has "
            f"to be finite on all of [{x.min():.4g}, {x.max():.4g}] and a little beyond"
        )
        raise ArgumentError(msg)
    return values.astype(float)


def probe_sums(
    density: SpectralDensity, f: Function, domain: tuple[float, float] = EVERYWHERE
) -> ProbeSums:
    """Σ f for each probe, atoms included."""
    if not domain[0] < domain[1]:
        msg = f"domain={domain}; expected an interval (low, high) with low < high"
        raise ArgumentError(msg)
    low, high = density.support
    room = tolerance(density)
    if low < domain[0] - room or high > domain[1] + room:
        msg = (
            f"domain={domain}, but eigenvalues were found from {low:.6g} to {high:.6g}; pass an "
            "interval that holds them all"
        )
        raise ArgumentError(msg)

    def total(nodes: np.ndarray, weights: np.ndarray) -> float:
        # Rounding may have moved a node out of the domain.
        return float(weights @ _checked(f, np.clip(nodes, *domain)))

    known = total(density.atoms, np.ones(len(density.atoms)))
    whole, half = np.full(density.probes, known), np.full(density.probes, known)
    for i, kept in enumerate(density.weights > 0):
        whole[i] += total(density.nodes[i, kept], density.n * density.weights[i, kept])
        half[i] = whole[i]
        if density.steps and not density.ended(i):
            alphas, betas = density.coefficients(i)
            fewer = (len(alphas) + 1) // 2
            nodes, weights = quadrature.gauss(alphas[:fewer], betas[:fewer])
            # A single step has no half to tell its error by.
            half[i] = known + total(nodes, density.remaining * weights)
            half[i] = half[i] if fewer < len(alphas) else math.inf
            room = _unseen(f, domain, density.nodes[i, kept], density.n * density.weights[i, kept])
            half[i] = max(half[i], whole[i] + room)
    return ProbeSums(whole, half)


def _unseen(
    f: Function, domain: tuple[float, float], nodes: np.ndarray, weights: np.ndarray
) -> float:
    """What a function with steps may do between the nodes, 0 for one that is no such function.

    The mass of a node may lie anywhere between its neighbours, where a function that has the same
    value at all nodes, or two values, can be another: rules of fewer steps agree then, and lie.
    """
    values = _checked(f, np.clip(nodes, *domain))
    if len(nodes) < 3 or len(np.unique(values)) > 2:
        return 0.0
    ends = np.concatenate([[2 * nodes[0] - nodes[1]], nodes, [2 * nodes[-1] - nodes[-2]]])
    between = ends[:-1, None] + np.diff(ends)[:, None] * np.linspace(0, 1, 9)
    heights = _checked(f, np.clip(between.ravel(), *domain)).reshape(between.shape)
    spread = np.stack([heights[:-1], heights[1:]], axis=1).reshape(len(nodes), -1)
    return float(weights @ np.abs(spread - values[:, None]).max(axis=1))


def _all_known(density: SpectralDensity) -> bool:
    """All eigenvalues are known."""
    return density.steps == density.remaining and (
        density.steps == 0
        or all(
            density.ended(i) and len(density.coefficients(i)[0]) == density.steps
            for i in range(density.probes)
        )
    )


def estimate(quantity: str, density: SpectralDensity, f: Function, **options: Any) -> Estimate:
    """The sum of f with the errors of the probes, of the quadrature, and of noisy products."""
    return with_floor(density, lambda moved: _estimate(quantity, moved, f, **options))


def _estimate(
    quantity: str,
    density: SpectralDensity,
    f: Function,
    *,
    derivative_signs: tuple[int, int] | None,
    domain: tuple[float, float],
    confidence: float,
    matvecs: int,
) -> Estimate:
    """The sum of f with the errors of the probes and of the quadrature."""
    pair = isinstance(derivative_signs, tuple | list) and len(derivative_signs) == 2
    if derivative_signs is not None and not (pair and set(derivative_signs) <= {-1, 1}):
        msg = f"derivative_signs={derivative_signs}; expected two of +1 and −1, such as (−1, 1)"
        raise ArgumentError(msg)
    samples = probe_sums(density, f, domain)
    lowers, uppers = samples.whole - samples.differences, samples.whole + samples.differences
    if derivative_signs is None or _all_known(density):
        return result(
            quantity,
            density,
            samples.whole,
            (lowers, uppers),
            error="the rule of half the steps",
            confidence=confidence,
            matvecs=matvecs,
        )
    risk = FOR_THE_ENDS * (1 - confidence)
    found = _undeflated_interval(density, 1 - risk)
    ends = (max(found[0], domain[0]), min(found[1], domain[1]))
    known = float(_checked(f, np.clip(density.atoms, *domain)).sum())
    least, most = _rigorous(density, f, derivative_signs, ends, domain)
    notes = []
    # Noise in the products makes T a little less than tridiagonal, and its nodes others.
    bottom, top = np.minimum(least + known, samples.whole), np.maximum(most + known, samples.whole)
    for name, bound, side in (("lower", bottom, lowers), ("upper", top, uppers)):
        if np.isfinite(bound).all():
            side[:] = bound
        else:
            notes.append(
                f"the error of the quadrature at the {name} end is an estimate: the eigenvalues "
                f"are known to be from {ends[0]:.4g} to {ends[1]:.4g} only, where f has no finite "
                "bound; more steps narrow that, or pass what is known of them as domain"
            )
    return result(
        quantity,
        density,
        samples.whole,
        (lowers, uppers),
        error="Gauss and Gauss-Radau bounds",
        confidence=confidence,
        risk=risk,
        matvecs=matvecs,
        notes=notes,
    )


def _rigorous(
    density: SpectralDensity,
    f: Function,
    signs: tuple[int, int],
    ends: tuple[float, float],
    domain: tuple[float, float],
) -> tuple[np.ndarray, np.ndarray]:
    """(probes,) least and largest sum over what was not deflated; infinite where f has no bound.

    The error of the Gauss rule has the sign of the even derivatives; with a node at the lower end
    that of the odd ones, with one at the upper end the opposite.
    """
    even, odd = signs
    least, most = np.full(density.probes, -math.inf), np.full(density.probes, math.inf)
    for i in range(density.probes):
        alphas, betas = density.coefficients(i)
        rules = [(even, *quadrature.gauss(alphas, betas))]
        if density.ended(i):
            rules.append((-even, *rules[0][1:]))
        else:
            ritz = rules[0][1]
            apart = _APART * (ritz[-1] - ritz[0] + betas[-1])
            low, high = min(ends[0], ritz[0] - apart), max(ends[1], ritz[-1] + apart)
            rules.append((odd, *quadrature.gauss_radau(alphas, betas, low)))
            rules.append((-odd, *quadrature.gauss_radau(alphas, betas, high)))
        for sign, nodes, weights in rules:
            with np.errstate(all="ignore"):
                total = float(density.remaining * (weights @ f(np.clip(nodes, *domain))))
            if math.isfinite(total) and sign > 0:
                least[i] = max(least[i], total)
            elif math.isfinite(total):
                most[i] = min(most[i], total)
    return least, most


def jackknife(function: Callable[[np.ndarray], float], moments: np.ndarray) -> np.ndarray:
    """(probes,) pseudo-values of a function of mean moments (k, probes).

    Their mean has less bias than the function of the means, and their spread is its error (Tukey,
    1958, "Bias and confidence in not-quite large samples").
    """
    count = moments.shape[1]
    whole, total = function(moments.mean(axis=1)), moments.sum(axis=1)
    if count == 1:
        return np.array([whole])
    without = [function((total - moments[:, i]) / (count - 1)) for i in range(count)]
    return count * whole - (count - 1) * np.array(without)


def result(
    quantity: str,
    density: SpectralDensity,
    samples: np.ndarray,
    brackets: tuple[np.ndarray, np.ndarray],
    *,
    error: str,
    confidence: float,
    matvecs: int,
    risk: float = 0.0,
    notes: Sequence[str] = (),
) -> Estimate:
    """An estimate from one sample per probe, each within its bracket but for a risk."""
    deflated = f", {len(density.atoms)} deflated" if len(density.atoms) else ""
    common: dict[str, Any] = {
        "quantity": quantity,
        "value": float(samples.mean()),
        "confidence": confidence,
        "matvecs": matvecs,
        "notes": (*density.notes, *notes),
        "noise": density.noise,
        "provenance": density.provenance,
    }
    if _all_known(density):
        return Estimate(**common, standard_error=0.0, method="all eigenvalues known")
    method = f"Lanczos quadrature of {density.steps} steps{deflated}; {error}"
    if density.probes == 1:
        return Estimate(**common, standard_error=math.nan, samples=samples, method=method)
    return Estimate(
        **common,
        standard_error=float(samples.std(ddof=1)) / math.sqrt(density.probes),
        samples=samples,
        bounds=mean_bounds(*brackets, confidence + risk),
        bounds_confidence=confidence,
        method=method,
    )
