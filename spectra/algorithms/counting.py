"""How many eigenvalues are where, and how sure is that?

Two errors: that of the quadrature, within a rigorous bracket for each probe, and the randomness of
the probes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from spectra.algorithms import broadening, quadrature
from spectra.algorithms.estimate import Estimate, check_confidence, half_width
from spectra.algorithms.noise import noise_notes
from spectra.errors import ArgumentError

if TYPE_CHECKING:
    from spectra.algorithms.measure import SpectralDensity

__all__ = [
    "Counts",
    "brackets",
    "counts",
    "mass",
    "mass_at_zero",
    "mean_bounds",
    "radius",
    "resolution_at_zero",
]

# Below this share of the largest eigenvalue, places in float64 cannot be told apart.
_ROUNDING = 1e-12

# Fewer probes say next to nothing about their own spread.
_FEW = 3


class Counts(NamedTuple):
    """Numbers of eigenvalues below −τ, from −τ to τ, and above τ."""

    below: Estimate
    within: Estimate
    above: Estimate


def with_floor(
    density: SpectralDensity, compute: Callable[[SpectralDensity], Estimate]
) -> Estimate:
    """What is computed, and by how much it moves when the noise moves all of the spectrum."""
    found = compute(density)
    if not density.floor > 0:
        return found
    moves = [math.nan]
    with contextlib.suppress(ArgumentError):
        values = [compute(density.shifted(by)).value for by in (-density.floor, density.floor)]
        moves = [abs(value - found.value) for value in values]
    told = noise_notes(density.noise, density.floor)
    notes = [note for note in found.notes if note not in told]
    floor = max(moves)
    return replace(
        found, floor=floor, notes=(*notes, *noise_notes(density.noise, floor, found.quantity))
    )


def mass(density: SpectralDensity, low: float, high: float, confidence: float) -> Estimate:
    """What `SpectralDensity.mass` says."""
    check_confidence(confidence)
    if not low <= high:
        msg = f"low={low}, high={high}; expected an interval with low <= high"
        raise ArgumentError(msg)
    return with_floor(density, lambda moved: _mass(moved, low, high, confidence))


def _mass(density: SpectralDensity, low: float, high: float, confidence: float) -> Estimate:
    inside = (density.nodes >= low) & (density.nodes <= high)
    known = float(((density.atoms >= low) & (density.atoms <= high)).sum()) / density.n
    samples = known + (density.weights * inside).sum(axis=1)
    quantity = f"share of eigenvalues from {low:.4g} to {high:.4g}"
    if density.steps == 0:
        return Estimate(quantity, float(samples.mean()), 0.0, method="all eigenvalues known")
    lowers, uppers = brackets(density, np.array([low, high], dtype=float))
    least = known + np.maximum(lowers[:, 1] - uppers[:, 0], 0)
    most = known + np.minimum(uppers[:, 1] - lowers[:, 0], density.remaining / density.n)
    # Noise in the products makes T a little less than tridiagonal, and its nodes others.
    least, most = np.minimum(least, samples), np.maximum(most, samples)
    if density.probes < _FEW:
        room = radius(density, confidence, 1)
        bounds = (float(least.mean()) - room, float(most.mean()) + room)
    else:
        bounds = mean_bounds(least, most, confidence)
    spread = float(samples.std(ddof=1)) if density.probes > 1 else math.nan
    return Estimate(
        quantity=quantity,
        value=float(samples.mean()),
        standard_error=spread / math.sqrt(density.probes),
        samples=samples,
        bounds=(max(bounds[0], known, 0.0), min(bounds[1], known + density.remaining / density.n)),
        bounds_confidence=confidence,
        confidence=confidence,
        method=_method(density),
        matvecs=density.matvecs,
        notes=density.notes,
        noise=density.noise,
        provenance=density.provenance,
    )


def counts(density: SpectralDensity, tau: float | None, confidence: float) -> Counts:
    """What `SpectralDensity.counts` says."""
    tau = _checked(density, tau)
    # The next numbers outside, so that the three intervals share no end.
    beyond = float(np.nextafter(tau, math.inf))
    parts = [
        density.mass(-math.inf, -beyond, confidence),
        density.mass(-tau, tau, confidence),
        density.mass(beyond, math.inf, confidence),
    ]
    names = [f"below {-tau:.4g}", f"within ±{tau:.4g}", f"above {tau:.4g}"]
    return Counts(
        *(
            _scaled(part, density.n, f"number of eigenvalues {name}")
            for part, name in zip(parts, names, strict=True)
        )
    )


def mass_at_zero(density: SpectralDensity, tau: float | None, confidence: float) -> Estimate:
    """What `SpectralDensity.mass_at_zero` says."""
    tau = _checked(density, tau)
    return _scaled(
        density.mass(-tau, tau, confidence), 1, f"share of eigenvalues within ±{tau:.4g}"
    )


def resolution_at_zero(density: SpectralDensity) -> float:
    """What `SpectralDensity.resolution_at_zero` says."""
    distances = []
    for i, kept in enumerate(density.weights > 0):
        nodes = density.nodes[i, kept]
        if len(nodes) and not density.ended(i):
            distances.append(float(broadening.spacing(nodes)[np.abs(nodes).argmin()]))
    scale = max(map(abs, density.support))
    floor = 0.0 if math.isnan(density.floor) else density.floor
    gap = float(np.sum(distances)) / max(density.probes, 1)
    return max(2 * gap, floor, _ROUNDING * scale, 1e-100)


def brackets(density: SpectralDensity, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(probes, points) least and largest share of each probe's measure to the left of x."""
    lowers, uppers = np.zeros((density.probes, len(x))), np.zeros((density.probes, len(x)))
    share = density.remaining / density.n
    for i, kept in enumerate(density.weights > 0):
        nodes = density.nodes[i, kept]
        cumulative = np.concatenate([[0.0], np.cumsum(density.weights[i, kept])])
        if len(density.alphas) and not density.ended(i):
            least, most = quadrature.cdf_bracket(*density.coefficients(i), x)
            lowers[i], uppers[i] = share * least, share * most
        elif len(density.alphas):
            # Well below the resolution at zero, so that an eigenvalue there is within it.
            room = 0.1 * _ROUNDING * np.abs(nodes).max(initial=0.0)
            lowers[i] = cumulative[np.searchsorted(nodes, x - room, side="left")]
            uppers[i] = cumulative[np.searchsorted(nodes, x + room, side="right")]
        else:
            # Without the coefficients, the inequalities at the nodes on either side.
            below = np.searchsorted(nodes, x, side="right")
            lowers[i] = cumulative[(below - 1).clip(0)]
            uppers[i] = cumulative[(below + 1).clip(max=len(nodes))]
    beyond = ~np.isfinite(x)
    lowers[:, beyond] = uppers[:, beyond] = share * (x[beyond] > 0)
    return lowers, uppers


def radius(density: SpectralDensity, confidence: float, places: int) -> float:
    """What the mean over the probes can be off by at any of some places, with probability."""
    if density.remaining == 0 or all(
        density.ended(i) and len(density.coefficients(i)[0]) == density.remaining
        for i in range(density.probes)
    ):
        return 0.0
    share = density.remaining / density.n
    exponent = math.log(2 * places / (1 - confidence))
    return share * math.sqrt(exponent / (density.probes * (density.remaining + 2)))


def mean_bounds(lowers: np.ndarray, uppers: np.ndarray, confidence: float) -> tuple[float, float]:
    """What holds the mean that independent probes estimate, each within its own bracket.

    Student's lower end of the lower ends, and upper end of the upper ends: it holds the error of
    the quadrature and the randomness of the probes. Takes two probes or more.
    """
    none, low, high = np.zeros(0), -math.inf, math.inf
    if np.isfinite(lowers).all():
        low = float(lowers.mean()) - half_width(lowers, none, confidence)
    if np.isfinite(uppers).all():
        high = float(uppers.mean()) + half_width(uppers, none, confidence)
    return low, high


def _scaled(estimate: Estimate, factor: float, quantity: str) -> Estimate:
    """The same estimate in another unit, under another name."""
    bounds = estimate.bounds
    return replace(
        estimate,
        quantity=quantity,
        value=factor * estimate.value,
        standard_error=factor * estimate.standard_error,
        samples=factor * estimate.samples,
        floor=factor * estimate.floor,
        bounds=None if bounds is None else (factor * bounds[0], factor * bounds[1]),
    )


def _method(density: SpectralDensity) -> str:
    deflated = f", {len(density.atoms)} deflated" if len(density.atoms) else ""
    return f"Lanczos quadrature of {density.steps} steps{deflated}"


def _checked(density: SpectralDensity, tau: float | None) -> float:
    if tau is None:
        return density.resolution_at_zero
    if not tau >= 0:
        msg = f"tau={tau}; expected a distance from zero >= 0, or None"
        raise ArgumentError(msg)
    return float(tau)
