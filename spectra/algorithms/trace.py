"""What is the trace? Random probes of what is not known, an interval, a stop at the tolerance."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from spectra.algorithms import probes
from spectra.algorithms.estimate import Estimate
from spectra.algorithms.moments import Moments, Stop
from spectra.algorithms.noise import noise_notes
from spectra.algorithms.progress import progress_bar
from spectra.algorithms.resuming import resumable
from spectra.algorithms.sketch import by_hutch_pp, by_krylov, by_xtrace
from spectra.errors import ArgumentError
from spectra.operators.base import as_operator
from spectra.results import versions

if TYPE_CHECKING:
    from spectra.algorithms.eigen import Eigenpairs

__all__ = ["trace", "trace_estimate"]

Method = Literal["auto", "hutchinson", "hutch++", "xtrace"]


@resumable
def trace(
    H: Any,
    *,
    rtol: float = 0.05,
    atol: float | None = None,
    confidence: float = 0.95,
    method: Method = "auto",
    deflate: Eigenpairs | None = None,
    max_matvecs: int = 300,
    seed: int = 0,
    progress: bool | None = None,
    checkpoint: str | Path | None = None,
) -> Estimate:
    """The trace of a symmetric operator or matrix, the sum of its eigenvalues.

    Mean of zᵀHz over random probes z, until the half-width of its interval is within the
    tolerance. The standard error falls with the square root of the probes: a tenth of the tolerance
    costs a hundred times the products. What outliers add to it goes when a basis that holds them is
    taken out of the probes: that saves 10 to 1,000 times the products on the spectrum of a network.

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
        "auto": five probes tell what the rest would take; where that is much, some products go
        into a Krylov basis, and what it holds of H is taken out of all the probes, the first five
        included. With `deflate`, probes in the complement of those pairs instead.
        "hutchinson": probes only. "hutch++": a third of the products each for a random sketch of
        the range, for H on it, and for probes of what it leaves. "xtrace": every probe is estimated
        with a sketch of all the others, for 2 products a probe; its interval is widened, because
        its samples are correlated.
    deflate
        Eigenpairs of the same operator, from `eigsh` ("auto" only). No products are spent on them,
        and pairs that have not converged cost accuracy, not correctness.
    max_matvecs
        Stop after this many products, marked as not converged.
    seed
        Of the probes.
    progress
        Show a progress bar; None for on a terminal only.
    checkpoint
        A file for what is computed, from which the same call goes on after a crash or a kill; see
        docs/resuming.md. Ctrl-C and SIGTERM then end the call softly: it returns
        what there is, marked as `partial`.

    Returns
    -------
    Estimate
        With one sample per probe. Exact (standard error 0) where n products are cheaper than the
        probes that the tolerance asks for, and where a sketch holds the whole range of H.

    Raises
    ------
    ArgumentError
        Impossible tolerances, an unknown method, or eigenpairs of another operator.
    NonFiniteError
        A product holds nan or inf.

    References
    ----------
    Hutchinson, 1989, "A stochastic estimator of the trace of the influence matrix for Laplacian
    smoothing splines". Girard, 1989, "A fast Monte-Carlo cross-validation procedure for large least
    squares problems with noisy data".
    Deflation and Hutch++: Meyer, Musco, Musco and Woodruff, 2021, "Hutch++: optimal stochastic
    trace estimation". Krylov bases: Chen and Hallman, 2023, "Krylov-aware stochastic trace
    estimation". Epperly, Tropp and Webber, 2024, "XTrace: making the most of every sample in
    stochastic trace estimation".

    Examples
    --------
    >>> import numpy as np, spectra
    >>> print(spectra.trace(np.array([[2.0, 1.0], [1.0, 3.0]])))
    trace = 5 (exact, n unit vectors; 2 matvecs)
    """
    operator = as_operator(H)
    if method not in get_args(Method):
        msg = f"method={method!r}; expected one of {', '.join(map(repr, get_args(Method)))}"
        raise ArgumentError(msg)
    if method != "auto" and deflate is not None:
        msg = f"method={method!r} does not deflate; leave deflate out, or use method='auto'"
        raise ArgumentError(msg)
    deflation = None if deflate is None else probes.Deflation(operator, deflate)
    how = basis = None
    if deflation is not None or method == "hutchinson":
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
    else:
        stop = Stop("trace", rtol, atol, confidence, max_matvecs)
        estimator = {"auto": by_krylov, "hutch++": by_hutch_pp, "xtrace": by_xtrace}[method]
        with progress_bar("trace", max_matvecs, progress, at_most=True) as bar:
            run = probes.Run(operator, stop, seed, bar)
            moments, how = estimator(run)
            basis = run.basis
    options = {"rtol": rtol, "atol": atol, "confidence": confidence, "method": method}
    provenance = {
        "operator": operator.describe(),
        "options": {**options, "max_matvecs": max_matvecs},
        "basis": basis,
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
        method=how,
    )


def trace_estimate(
    moments: probes.Moments,
    deflation: probes.Deflation | None,
    *,
    rtol: float,
    atol: float | None,
    confidence: float,
    provenance: dict[str, Any],
    method: str | None = None,
) -> Estimate:
    """The trace and its error from samples of probes, which `method` found."""
    value = float(moments.traces.mean())
    half = moments.half_width("trace", confidence)
    target = moments.target("trace", rtol, atol)
    norm = math.sqrt(float(moments.squares.mean()))
    floor = moments.noise * norm
    if method is None and moments.exact:
        method = "sum of all known eigenvalues" if moments.matvecs == 0 else "n unit vectors"
    elif method is None:
        method = "Hutchinson" if deflation is None else f"Hutchinson, {len(deflation)} deflated"
    notes = []
    if not moments.exact:
        n = provenance.get("operator", {}).get("n", math.inf)
        notes = _notes(moments, deflation, atol, (half, target), n)
    notes += noise_notes(moments.noise, floor)
    return Estimate(
        quantity="trace",
        value=value,
        standard_error=moments.trace_error,
        samples=np.zeros(0) if moments.exact else moments.traces,
        variances=moments.variances,
        widening=moments.widening,
        confidence=confidence,
        converged=half <= target,
        method=method,
        matvecs=moments.matvecs,
        notes=tuple(notes),
        noise=moments.noise,
        floor=floor,
        provenance=provenance,
    )


def _notes(
    moments: Moments,
    deflation: probes.Deflation | None,
    atol: float | None,
    interval: tuple[float, float],
    n: float,
) -> list[str]:
    """What to know of a sampled trace; `interval` is its half-width, and that asked for."""
    half, target = interval
    value, count = float(moments.traces.mean()), len(moments.traces)
    norm = math.sqrt(float(moments.squares.mean()))
    notes = []
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
            + (f"; {n:,} products make it exact" if needed > n else "")
        )
    return notes
