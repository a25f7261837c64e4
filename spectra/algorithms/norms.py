"""How large is the operator? Its spectral norm by power iteration, its Frobenius norm by probes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy import special
from torch import Tensor

from spectra.algorithms import probes
from spectra.algorithms.estimate import Estimate
from spectra.algorithms.progress import progress_bar
from spectra.errors import ArgumentError
from spectra.operators.base import SymmetricOperator, as_operator
from spectra.results import versions

if TYPE_CHECKING:
    from spectra.algorithms.eigen import Eigenpairs

__all__ = ["frobenius_estimate", "norm"]

_BOUND_CONFIDENCE = 0.99


def norm(
    H: Any,
    ord: Literal[2, "fro"] = 2,
    *,
    rtol: float | None = None,
    confidence: float = 0.95,
    deflate: Eigenpairs | None = None,
    max_matvecs: int = 300,
    seed: int = 0,
    progress: bool | None = None,
) -> Estimate:
    """A norm of a symmetric operator or matrix.

    Parameters
    ----------
    H
        An operator, a torch or NumPy matrix, a SciPy sparse matrix or LinearOperator.
    ord
        2: the spectral norm, the largest |eigenvalue|, by power iteration. "fro": the Frobenius
        norm, the root of the sum of squared eigenvalues, by random probes.
    rtol
        For ord=2, stop when ‖H²x − ρ²x‖ <= rtol · ρ² for the iterate x and its estimate ρ; default
        1e-3. For "fro", stop when the half-width of the interval is rtol times the norm; default
        0.05.
    confidence
        Of the interval, for "fro".
    deflate
        For "fro": eigenpairs of the same operator, whose squares are known.
    max_matvecs
        Stop after this many products, marked as not converged.
    seed
        Of the random vectors.
    progress
        Show a progress bar; None for on a terminal only.

    Returns
    -------
    Estimate
        For ord=2 `value` is a lower bound that grows with every product, and `bounds` holds with
        99 % probability over the random start. For "fro" a mean over probes with its interval.

    Raises
    ------
    ArgumentError
        Another `ord`, or impossible tolerances.

    Notes
    -----
    Power iteration estimates ρ = ‖Hx‖ for the unit iterate x, not the Rayleigh quotient xᵀHx: ρ
    never decreases and converges also where +λ and −λ are both eigenvalues, while the quotient
    oscillates there. A Rayleigh-Ritz step on span{x, Hx} then tells the signs.
    The upper bound: ‖Hᴷx₀‖ >= |c| ‖H‖ᴷ with c the component of x₀ along the dominant eigenvector,
    and |c| is not small with known probability for a start uniform on the sphere.

    References
    ----------
    Von Mises and Pollaczek-Geiringer, 1929, "Praktische Verfahren der Gleichungsauflösung".
    Kuczynski and Wozniakowski, 1992, "Estimating the largest eigenvalue by the power and Lanczos
    algorithms with a random start".
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
    if ord == "fro":
        deflation = None if deflate is None else probes.Deflation(operator, deflate)
        rtol = 0.05 if rtol is None else rtol
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
    if ord != 2:
        msg = f"ord={ord!r}; expected 2 (spectral norm) or 'fro' (Frobenius norm)"
        raise ArgumentError(msg)
    if deflate is not None:
        msg = "deflate is for ord='fro'; the spectral norm is that of the eigenpairs themselves"
        raise ArgumentError(msg)
    if max_matvecs < 2:
        msg = f"max_matvecs={max_matvecs}; power iteration needs at least 2 products"
        raise ArgumentError(msg)
    tol = 1e-3 if rtol is None else rtol
    return _power_iteration(
        operator,
        tol=tol,
        max_matvecs=max_matvecs,
        seed=seed,
        progress=progress,
        provenance=provenance,
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
    return Estimate(
        quantity="Frobenius norm",
        value=value,
        standard_error=error,
        samples=np.zeros(0) if moments.exact else moments.squares,
        power=2,
        confidence=confidence,
        converged=converged,
        method=method,
        matvecs=moments.matvecs,
        provenance=provenance,
    )


def _power_iteration(
    operator: SymmetricOperator,
    *,
    tol: float,
    max_matvecs: int,
    seed: int,
    progress: bool | None,
    provenance: dict[str, Any],
) -> Estimate:
    space = operator.space
    x = probes.sphere(space, probes.seeded(seed))
    rho, log_growth, steps = 0.0, 0.0, 0
    residual = math.inf
    y = space.zeros()
    previous: tuple[Tensor, Tensor, float] | None = None
    with progress_bar("power iteration", max_matvecs, progress) as bar:
        while steps < max_matvecs:
            if previous is not None:
                x = y / rho
            y = operator.apply(x)
            rho = space.norm(y)
            steps += 1
            bar.update()
            if rho == 0.0:
                # A random x lies in the null space with probability 0: the operator is zero.
                residual = 0.0
                break
            log_growth += math.log(rho)
            if previous is not None:
                # x = Hp/ρp with p the previous iterate, so Hy-type products give H²p for nothing.
                p, _, rho_p = previous
                residual = space.norm(y.mul(rho_p).sub_(p, alpha=rho_p**2)) / rho_p**2
                if residual <= tol:
                    break
            previous = (x, y, rho)
    rounding = 4 * space.eps * rho
    signs, note = _signs(operator, x, y, rho, residual)
    upper = rho + rounding
    if rho > 0:
        smallest = math.sqrt(
            special.betaincinv(0.5, (space.n - 1) / 2, 1 - _BOUND_CONFIDENCE)
            if space.n > 1
            else 1.0
        )
        upper = max(upper, math.exp((log_growth - math.log(smallest)) / steps))
    notes = [note] if note else []
    converged = residual <= tol
    if not converged:
        notes.append(
            f"the residual is {residual:.2g} after {steps} products, {tol:g} was asked for; the "
            "value is a lower bound, and eigsh(H, k=1) converges in far fewer products"
        )
    return Estimate(
        quantity="spectral norm",
        value=rho,
        standard_error=math.nan,
        bounds=(rho - rounding, upper),
        bounds_confidence=_BOUND_CONFIDENCE,
        converged=converged,
        method=f"power iteration, relative residual {residual:.2g}, {signs}",
        matvecs=steps,
        notes=tuple(notes),
        provenance=provenance,
    )


def _signs(
    operator: SymmetricOperator, x: Tensor, y: Tensor, rho: float, residual: float
) -> tuple[str, str]:
    """Which of +ρ and −ρ are eigenvalues, from the components of x along y ± ρx."""
    if rho == 0.0:
        return "zero operator", ""
    quotient = operator.space.inner(x, y) / rho
    # x = a u₊ + b u₋ with a² + b² = 1 has the quotient a² − b².
    positive, negative = (1 + quotient) / 2, (1 - quotient) / 2
    minor = min(positive, negative)
    # At most (residual / 0.1)² of x belongs to eigenvalues whose squares are off ρ² by a tenth.
    if minor > (residual / 0.1) ** 2 + 100 * operator.space.eps:
        return "both signs", (
            f"eigenvalues near both +{rho:.4g} and −{rho:.4g}: the iterate is a mixture of their "
            "eigenvectors"
        )
    if minor > 0.1:
        return "sign not settled", ""
    return f"dominant eigenvalue {'positive' if positive > negative else 'negative'}", ""
