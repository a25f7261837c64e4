"""What is the trace? Hutchinson's estimator, with an interval and a stop at the tolerance."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from spectra.algorithms import probes
from spectra.algorithms.estimate import Estimate
from spectra.errors import ArgumentError
from spectra.operators.base import as_operator
from spectra.results import versions

if TYPE_CHECKING:
    from spectra.algorithms.eigen import Eigenpairs

__all__ = ["trace", "trace_estimate"]


def trace(
    H: Any,
    *,
    rtol: float = 0.05,
    atol: float | None = None,
    confidence: float = 0.95,
    method: Literal["auto", "hutchinson"] = "auto",
    deflate: Eigenpairs | None = None,
    max_matvecs: int = 300,
    seed: int = 0,
    progress: bool | None = None,
) -> Estimate:
    """The trace of a symmetric operator or matrix, the sum of its eigenvalues.

    Mean of zᵀHz over random probes z, until the half-width of its interval is within the
    tolerance. The standard error falls with the square root of the probes: a tenth of the tolerance
    costs a hundred times the products. Deflation by known eigenpairs, whose sum is known exactly,
    makes that 10 to 1,000 times less on the spectrum of a network.

    Parameters
    ----------
    H
        An operator, a torch or NumPy matrix, a SciPy sparse matrix or LinearOperator.
    rtol, atol
        Stop when the half-width is below max(rtol · |trace|, atol). Without `atol` the scale of
        `rtol` is max(|trace|, ‖H‖_F), so that a trace near zero ends too.
    confidence
        Of the interval that the tolerance refers to.
    method
        "hutchinson": undeflated probes. "auto": deflated by `deflate` if given.
    deflate
        Eigenpairs of the same operator, from `eigsh`.
    max_matvecs
        Stop after this many products, marked as not converged.
    seed
        Of the probes.
    progress
        Show a progress bar; None for on a terminal only.

    Returns
    -------
    Estimate
        With one sample per probe. Exact (standard error 0) where n products are cheaper than the
        probes that the tolerance asks for.

    Raises
    ------
    ArgumentError
        Impossible tolerances, or eigenpairs of another operator.

    References
    ----------
    Hutchinson, 1989, "A stochastic estimator of the trace of the influence matrix for Laplacian
    smoothing splines". Girard, 1989, "A fast Monte-Carlo cross-validation procedure for large least
    squares problems with noisy data".
    Deflation: Meyer, Musco, Musco and Woodruff, 2021, "Hutch++: optimal stochastic trace
    estimation".
    """
    operator = as_operator(H)
    if method not in {"auto", "hutchinson"}:
        msg = f"method={method!r}; expected 'auto' or 'hutchinson'"
        raise ArgumentError(msg)
    if method == "hutchinson" and deflate is not None:
        msg = "method='hutchinson' does not deflate; leave deflate out, or use method='auto'"
        raise ArgumentError(msg)
    deflation = None if deflate is None else probes.Deflation(operator, deflate)
    moments = probes.sample_moments(
        operator,
        deflation,
        want="trace",
        rtol=rtol,
        atol=atol,
        confidence=confidence,
        max_matvecs=max_matvecs,
        seed=seed,
        progress=progress,
    )
    options = {"rtol": rtol, "atol": atol, "confidence": confidence, "max_matvecs": max_matvecs}
    provenance = {
        "operator": operator.describe(),
        "options": options,
        "seed": seed,
        "versions": versions(),
    }
    return trace_estimate(
        moments,
        deflation,
        rtol=rtol,
        atol=atol,
        confidence=confidence,
        provenance=provenance,
    )


def trace_estimate(
    moments: probes.Moments,
    deflation: probes.Deflation | None,
    *,
    rtol: float,
    atol: float | None,
    confidence: float,
    provenance: dict[str, Any],
) -> Estimate:
    """The trace and its error from samples of probes."""
    value = float(moments.traces.mean())
    half = moments.half_width("trace", confidence)
    target = moments.target("trace", rtol, atol)
    norm = math.sqrt(float(moments.squares.mean()))
    notes = []
    if moments.exact:
        method = "sum of all known eigenvalues" if moments.matvecs == 0 else "n unit vectors"
        error = 0.0
    else:
        count = len(moments.traces)
        method = "Hutchinson" if deflation is None else f"Hutchinson, {len(deflation)} deflated"
        error = float(moments.traces.std(ddof=1)) / math.sqrt(count)
        if half >= abs(value) and half > 0:
            notes.append(
                f"the trace is {value:.3g} ± {half:.2g}: not distinguishable from 0, beside "
                f"‖H‖_F = {norm:.3g}"
            )
        elif atol is None and abs(value) < norm:
            notes.append(
                f"|trace| is below ‖H‖_F = {norm:.3g} (positive and negative eigenvalues cancel), "
                "so rtol was taken relative to that"
            )
        if half > target:
            needed = math.inf if target == 0 else math.ceil(count * (half / target) ** 2)
            cure = "deflate=spectra.eigsh(H, …)" if deflation is None else "more eigenpairs"
            notes.append(
                f"half-width {half:.2g} after {count} probes, {target:.2g} was asked for: that "
                f"takes about {needed:,} probes, or fewer with {cure}"
            )
    return Estimate(
        quantity="trace",
        value=value,
        standard_error=error,
        samples=np.zeros(0) if moments.exact else moments.traces,
        confidence=confidence,
        converged=half <= target,
        method=method,
        matvecs=moments.matvecs,
        notes=tuple(notes),
        provenance=provenance,
    )
