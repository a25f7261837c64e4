"""How large is the operator? Spectral, Frobenius, nuclear, Schatten norms, with their errors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from spectra.algorithms import probes
from spectra.algorithms.counting import with_floor
from spectra.algorithms.density import SpectralDensity, check_counts, spectral_density
from spectra.algorithms.estimate import Estimate, check_confidence
from spectra.algorithms.moments import SQUARE_WIDENING
from spectra.algorithms.noise import noise_notes
from spectra.algorithms.resuming import resumable
from spectra.algorithms.spectral_norm import lanczos, power_iteration
from spectra.algorithms.summation import probe_sums, result
from spectra.errors import ArgumentError
from spectra.journal import Stopped
from spectra.operators.base import SymmetricOperator, as_operator
from spectra.results import versions

if TYPE_CHECKING:
    from spectra.algorithms.eigen import Eigenpairs

__all__ = ["frobenius_estimate", "norm"]

# Fewer probes tell nothing about their own spread.
_MIN_PROBES = 5
# Nodes of the quadrature where |λ|ᵖ is no polynomial. More bring little: measured on ten spectra.
_STEPS = 20


@resumable
def norm(
    H: Any,
    ord: Literal[2, "fro", "nuc", "schatten"] = 2,
    *,
    p: float | None = None,
    method: Literal["power", "lanczos"] = "power",
    rtol: float | None = None,
    confidence: float = 0.95,
    deflate: Eigenpairs | None = None,
    steps: int | None = None,
    max_matvecs: int = 300,
    seed: int = 0,
    progress: bool | None = None,
    checkpoint: str | Path | None = None,
) -> Estimate:
    """A norm of a symmetric operator or matrix.

    Parameters
    ----------
    H
        An operator, a torch or NumPy matrix, a SciPy sparse matrix or LinearOperator.
    ord
        2: the spectral norm, the largest |eigenvalue|. "fro": the Frobenius norm, the root of the
        sum of squared eigenvalues, by random probes. "nuc": the nuclear norm, the sum of
        |eigenvalues|, and "schatten": (Σ |λ|ᵖ)^(1/p), both by Lanczos quadrature.
    p
        Of ord="schatten": a number >= 1.
    method
        For ord=2, "power": power iteration. "lanczos": fewer products, at a vector of memory each.
    rtol
        For ord=2, stop when ‖H²x − ρ²x‖ <= rtol · ρ² for the iterate x and its estimate ρ (power),
        or when the bounds are rtol apart (lanczos); default 1e-3. For the others, stop when the
        half-width of the interval is rtol times the norm; default 0.05.
    confidence
        Of the interval, but for ord=2.
    deflate
        Eigenpairs of the same operator, whose part is known; not for ord=2.
    steps
        For "nuc" and "schatten": products per probe. By default 20, or p / 2 + 1 for an even p,
        which makes the quadrature exact.
    max_matvecs
        Stop after this many products, marked as not converged.
    seed
        Of the random vectors.
    progress
        Show a progress bar; None for on a terminal only.
    checkpoint
        A file for what is computed, from which the same call goes on after a crash or a kill; see
        docs/resuming.md. Ctrl-C and SIGTERM then end the call softly: it returns
        what there is, marked as `partial`.

    Returns
    -------
    Estimate
        For ord=2 `value` is a lower bound that grows with every product, and `bounds` holds with
        99 % probability over the random start. For "fro" a mean over probes with its interval; for
        "nuc" and "schatten" `bounds` as of `spectral_sum`.

    Raises
    ------
    ArgumentError
        Another `ord`, options that it does not have, or impossible tolerances.

    Notes
    -----
    Power iteration estimates ρ = ‖Hx‖ for the unit iterate x, not the Rayleigh quotient xᵀHx: ρ
    never decreases and converges also where +λ and −λ are both eigenvalues, while the quotient
    oscillates there. A Rayleigh-Ritz step on span{x, Hx} then tells the signs.
    The upper bound: ‖Hᴷx₀‖ >= |c| ‖H‖ᴷ with c the component of x₀ along the dominant eigenvector,
    and |c| is not small with known probability for a start uniform on the sphere. That of Lanczos
    has the Lanczos polynomial in the place of the power.

    References
    ----------
    Von Mises and Pollaczek-Geiringer, 1929, "Praktische Verfahren der Gleichungsauflösung".
    Kuczynski and Wozniakowski, 1992, "Estimating the largest eigenvalue by the power and Lanczos
    algorithms with a random start". Hochstenbach, 2013, "Probabilistic upper bounds for the matrix
    two-norm". Ubaru, Chen and Saad, 2017, "Fast estimation of tr(f(A)) via stochastic Lanczos
    quadrature".
    """
    operator = as_operator(H)
    provenance = {
        "operator": operator.describe(),
        "options": {"ord": ord, "rtol": rtol, "max_matvecs": max_matvecs},
        "seed": seed,
        "versions": versions(),
    }
    if rtol is not None and not rtol > 0:
        msg = f"rtol={rtol}; expected a positive relative tolerance"
        raise ArgumentError(msg)
    _check_options(ord, p=p, method=method, deflate=deflate, steps=steps)
    if ord == 2:
        if max_matvecs < 2:
            name = "power iteration" if method == "power" else "Lanczos"
            msg = f"max_matvecs={max_matvecs}; {name} needs at least 2 products"
            raise ArgumentError(msg)
        search = power_iteration if method == "power" else lanczos
        return search(
            operator,
            tol=1e-3 if rtol is None else rtol,
            max_matvecs=max_matvecs,
            seed=seed,
            progress=progress,
            provenance=provenance,
        )
    rtol = 0.05 if rtol is None else rtol
    if ord != "fro":
        return _schatten(
            operator,
            1.0 if p is None else float(p),
            rtol=rtol,
            confidence=confidence,
            deflate=deflate,
            steps=steps,
            max_matvecs=max_matvecs,
            seed=seed,
            progress=progress,
            provenance=provenance,
        )
    deflation = None if deflate is None else probes.Deflation(operator, deflate)
    moments = probes.sample_moments(
        operator,
        deflation,
        want="square",
        rtol=rtol,
        atol=None,
        confidence=confidence,
        max_matvecs=max_matvecs,
        seed=seed,
        progress=progress,
    )
    return frobenius_estimate(
        moments, deflation, rtol=rtol, confidence=confidence, provenance=provenance
    )


def _check_options(
    ord: Any, *, p: float | None, method: str, deflate: Any, steps: int | None
) -> None:
    """Refuse what is no norm, and options of another norm."""
    if ord not in {2, "fro", "nuc", "schatten"}:
        msg = (
            f"ord={ord!r}; expected 2 (spectral norm), 'fro' (Frobenius norm), 'nuc' (nuclear "
            "norm) or 'schatten' with p="
        )
        raise ArgumentError(msg)
    if method not in {"power", "lanczos"}:
        msg = f"method={method!r}; expected 'power' or 'lanczos', for ord=2"
        raise ArgumentError(msg)
    if method == "lanczos" and ord != 2:
        msg = f"method='lanczos' is for ord=2 only; leave it out for ord={ord!r}"
        raise ArgumentError(msg)
    if ord == 2 and deflate is not None:
        msg = "deflate is for the other norms; the spectral norm is that of the eigenpairs"
        raise ArgumentError(msg)
    if steps is not None and ord not in {"nuc", "schatten"}:
        msg = f"steps={steps} for ord={ord!r}; only 'nuc' and 'schatten' have steps"
        raise ArgumentError(msg)
    if (ord == "schatten") != (p is not None) or (p is not None and not 1 <= p < math.inf):
        msg = f"p={p} for ord={ord!r}; ord='schatten' takes a number p >= 1, and only that"
        raise ArgumentError(msg)


def _schatten(
    operator: SymmetricOperator,
    p: float,
    *,
    rtol: float,
    confidence: float,
    deflate: Eigenpairs | None,
    steps: int | None,
    max_matvecs: int,
    seed: int,
    progress: bool | None,
    provenance: dict[str, Any],
) -> Estimate:
    """(Σ |λ|ᵖ)^(1/p) by quadrature, with as many probes as the tolerance needs."""
    polynomial = p % 2 == 0
    if steps is None:
        steps = int(p) // 2 + 1 if polynomial else _STEPS
    check_counts(steps, 1)
    check_confidence(confidence)
    affordable = max_matvecs // min(steps, operator.space.n)
    if affordable < 2:
        msg = f"max_matvecs={max_matvecs}; two probes of {steps} steps take {2 * steps} products"
        raise ArgumentError(msg)
    count, density = min(_MIN_PROBES, affordable), None
    while True:
        try:
            density = spectral_density(
                operator,
                steps=steps,
                probes=count,
                deflate=deflate,
                begun=density,
                seed=seed,
                progress=progress,
            )
        except Stopped:
            if density is None:
                raise
            count = affordable
        scale = max(map(abs, density.support)) or 1.0
        power = _sum_of_powers(density, p, scale, confidence)
        low, high = (scale * max(end, 0.0) ** (1 / p) for end in power.interval())
        value = scale * max(power.value, 0.0) ** (1 / p)
        converged = (high - low) / 2 <= rtol * value
        # Twice as many make the interval of the probes 0.7 times as wide; that of the quadrature
        # stays.
        if converged or count == affordable:
            break
        count = min(2 * count, affordable)
    notes = list(power.notes)
    if not converged:
        cure = "more eigenpairs" if deflate is not None else "deflate=spectra.eigsh(H, …)"
        notes.append(
            f"half-width {(high - low) / 2:.2g} after {density.matvecs} products, "
            f"{rtol * value:.2g} was asked for: raise max_matvecs or steps, or use {cure}"
        )
    name = "nuclear norm" if p == 1 else f"Schatten norm of p = {p:g}"
    slope = value / (p * power.value) if power.value > 0 else 0.0
    return Estimate(
        quantity=name,
        value=value,
        standard_error=power.standard_error * slope,
        samples=scale * power.samples if p == 1 else np.zeros(0),
        bounds=None if power.exact else (low, high),
        bounds_confidence=confidence,
        confidence=confidence,
        converged=converged,
        method=power.method,
        matvecs=density.matvecs,
        notes=tuple(notes),
        noise=power.noise,
        floor=power.floor * slope,
        provenance=provenance,
    )


def _sum_of_powers(density: SpectralDensity, p: float, scale: float, confidence: float) -> Estimate:
    """Σ |λ / scale|ᵖ, without an error of the quadrature where that is exact."""
    return with_floor(density, lambda moved: _power(moved, p, scale, confidence))


def _power(density: SpectralDensity, p: float, scale: float, confidence: float) -> Estimate:
    sums = probe_sums(density, lambda x: (np.abs(x) / scale) ** p)
    exact = p % 2 == 0 and p < 2 * density.steps
    differences = 0.0 * sums.differences if exact else sums.differences
    return result(
        "sum of powers",
        density,
        sums.whole,
        (sums.whole - differences, sums.whole + differences),
        error="exact to that power" if exact else "the rule of half the steps",
        confidence=confidence,
        matvecs=density.matvecs,
    )


def frobenius_estimate(
    moments: probes.Moments,
    deflation: probes.Deflation | None,
    *,
    rtol: float,
    confidence: float,
    provenance: dict[str, Any],
) -> Estimate:
    """The Frobenius norm and its error from samples of its square."""
    value = math.sqrt(float(moments.squares.mean()))
    if moments.exact:
        method = "all known eigenvalues" if moments.matvecs == 0 else "n unit vectors"
        error, converged = 0.0, True
    else:
        method = "Hutchinson" if deflation is None else f"Hutchinson, {len(deflation)} deflated"
        spread = float(moments.squares.std(ddof=1)) / math.sqrt(len(moments.squares))
        error = spread / (2 * value) if value > 0 else 0.0
        half = moments.half_width("square", confidence)
        converged = half <= moments.target("square", rtol, None)
    floor = moments.noise * value
    return Estimate(
        quantity="Frobenius norm",
        value=value,
        standard_error=error,
        samples=np.zeros(0) if moments.exact else moments.squares,
        power=2,
        widening=SQUARE_WIDENING,
        confidence=confidence,
        converged=converged,
        method=method,
        matvecs=moments.matvecs,
        notes=tuple(noise_notes(moments.noise, floor)),
        noise=moments.noise,
        floor=floor,
        provenance=provenance,
    )
