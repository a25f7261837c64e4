"""What is the curvature of this loss? All questions in one run, sharing what each has found."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from spectra.algorithms import probes as random_probes
from spectra.algorithms.density import SpectralDensity, check_counts, spectral_density
from spectra.algorithms.eigen import Eigenpairs, Which, eigsh
from spectra.algorithms.estimate import Estimate
from spectra.algorithms.norms import frobenius_estimate, norm
from spectra.algorithms.trace import trace_estimate
from spectra.operators.base import SymmetricOperator, as_operator
from spectra.operators.hessian import HessianOperator
from spectra.results import Result, versions

__all__ = ["Analysis", "analyze"]


@dataclass(frozen=True, eq=False)
class Analysis(Result):
    """Everything about one operator.

    Attributes
    ----------
    eigenpairs
        The extreme eigenpairs with residuals.
    spectral_norm, frobenius_norm, trace
        Each with its error; None where it was not asked for.
    density
        Quadrature with the eigenpairs as exact atoms; None where it was not asked for.
    value, gradient_norm
        L(θ) and ‖∇L(θ)‖, where the operator is a Hessian.
    matvecs, seconds
        Spent on each part, by name.
    """

    eigenpairs: Eigenpairs
    spectral_norm: Estimate
    trace: Estimate | None = None
    frobenius_norm: Estimate | None = None
    density: SpectralDensity | None = None
    value: float | None = None
    gradient_norm: float | None = None
    matvecs: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def total_matvecs(self) -> int:
        """Matvecs of all parts together."""
        return sum(self.matvecs.values())

    @property
    def converged(self) -> bool:
        """Every part met its tolerance."""
        estimates = [e for e in (self.spectral_norm, self.trace, self.frobenius_norm) if e]
        return bool(self.eigenpairs.converged.all()) and all(e.converged for e in estimates)

    def __str__(self) -> str:
        parts: list[str] = []
        if self.value is not None:
            parts.append(f"loss = {self.value:.6g}, gradient norm = {self.gradient_norm:.6g}")
        parts.append(str(self.eigenpairs))
        parts += [
            str(part)
            for part in (self.spectral_norm, self.trace, self.frobenius_norm, self.density)
            if part is not None
        ]
        spent = ", ".join(f"{name} {count}" for name, count in self.matvecs.items())
        parts.append(
            f"{self.total_matvecs} matvecs in {sum(self.seconds.values()):.1f} s ({spent})"
        )
        return "\n\n".join(parts)


def analyze(
    H: Any,
    k: int = 10,
    *,
    which: Which = "LM",
    tol: float = 1e-3,
    rtol: float = 0.02,
    steps: int = 40,
    probes: int = 3,
    trace: bool = True,
    density: bool = True,
    ncv: int | None = None,
    max_matvecs: int = 200,
    seed: int = 0,
    progress: bool | None = None,
) -> Analysis:
    """Eigenpairs, norms, trace and density of a symmetric operator or matrix.

    The eigenpairs come first. They are deflated from the quadrature, whose nodes give the density
    and the first samples of the trace and the Frobenius norm; single probes follow until those are
    within `rtol`.

    Parameters
    ----------
    H
        An operator, a torch or NumPy matrix, a SciPy sparse matrix or LinearOperator.
    k, which, tol, ncv
        As for `eigsh`.
    rtol
        Of trace and Frobenius norm, as for `trace`.
    steps, probes
        Of the density, as for `spectral_density`.
    trace, density
        Whether to compute these (the Frobenius norm comes with the trace).
    max_matvecs
        Most single probes for trace and Frobenius norm together.
    seed
        Of all random vectors.
    progress
        Show progress bars; None for on a terminal only.

    Returns
    -------
    Analysis

    Raises
    ------
    ArgumentError
        As `eigsh`, `spectral_density` and `trace` do.
    """
    operator = as_operator(H)
    # All that later parts would refuse is refused now, before a product; eigsh comes first.
    random_probes.seeded(seed)
    random_probes.check_tolerances(rtol, None, 0.95, max_matvecs)
    check_counts(steps, probes)
    # Independent streams for the parts: probes must not repeat the start vector's numbers.
    streams = np.random.SeedSequence(int(seed)).generate_state(3)
    run = _Run(operator)
    pairs = run.timed(
        "eigenpairs",
        lambda: eigsh(operator, k, which=which, tol=tol, ncv=ncv, seed=seed, progress=progress),
    )
    value, gradient_norm = run.timed("gradient", lambda: _value_and_gradient_norm(operator))
    spectral = run.timed(
        "spectral norm", lambda: _spectral_norm(operator, pairs, seed=seed, progress=progress)
    )
    measure = None
    if density:
        measure = run.timed(
            "density",
            lambda: spectral_density(
                operator,
                steps=steps,
                probes=probes,
                deflate=pairs,
                seed=int(streams[0]),
                progress=progress,
            ),
        )
    trace_result = frobenius = None
    provenance = {
        "operator": operator.describe(),
        "options": {
            "k": k,
            "which": which,
            "tol": tol,
            "rtol": rtol,
            "steps": steps,
            "probes": probes,
        },
        "seed": seed,
        "versions": versions(),
    }
    if trace:
        trace_result, frobenius = _trace_and_frobenius(
            run,
            operator,
            pairs,
            measure,
            rtol=rtol,
            max_matvecs=max_matvecs,
            seeds=(int(streams[1]), int(streams[2])),
            progress=progress,
            provenance=provenance,
        )
    return Analysis(
        eigenpairs=pairs,
        spectral_norm=spectral,
        trace=trace_result,
        frobenius_norm=frobenius,
        density=measure,
        value=value,
        gradient_norm=gradient_norm,
        matvecs={name: count for name, count in run.matvecs.items() if count},
        seconds=run.seconds,
        provenance=provenance,
    )


class _Run:
    """What each part of a run cost."""

    def __init__(self, operator: SymmetricOperator) -> None:
        self._operator = operator
        self.matvecs: dict[str, int] = {}
        self.seconds: dict[str, float] = {}

    def timed(self, name: str, part: Any) -> Any:
        matvecs, start = self._operator.matvecs, time.perf_counter()
        result = part()
        self.matvecs[name] = self._operator.matvecs - matvecs
        self.seconds[name] = time.perf_counter() - start
        return result


def _value_and_gradient_norm(operator: SymmetricOperator) -> tuple[float | None, float | None]:
    if not isinstance(operator, HessianOperator):
        return None, None
    value, gradient = operator.value_and_gradient()
    return value, operator.space.norm(gradient)


def _spectral_norm(
    operator: SymmetricOperator, pairs: Eigenpairs, *, seed: int, progress: bool | None
) -> Estimate:
    """‖H‖ from the eigenpairs where both ends were searched, by power iteration otherwise."""
    ends = (pairs.no_eigenvalue_above, pairs.no_eigenvalue_below)
    complete = len(pairs) == operator.space.n
    if pairs.which in {"LA", "SA"} and not complete:
        return norm(operator, 2, seed=seed, progress=progress)
    place = int(np.argmax(np.abs(pairs.values)))
    value, residual = float(np.abs(pairs.values[place])), float(pairs.residuals[place])
    residual += 4 * operator.space.eps * value
    upper = max([value + residual, *(abs(end) for end in ends if end is not None)])
    certified = complete or None not in ends
    return Estimate(
        quantity="spectral norm",
        value=value,
        standard_error=float("nan"),
        bounds=(value - residual, upper),
        bounds_confidence=pairs.certificate_confidence,
        converged=bool(pairs.converged[place]),
        method="Lanczos, with the eigenpairs",
        notes=() if certified else ("no search for missed eigenvalues stands behind this bound",),
        provenance=pairs.provenance,
    )


def _trace_and_frobenius(
    run: _Run,
    operator: SymmetricOperator,
    pairs: Eigenpairs,
    density: SpectralDensity | None,
    *,
    rtol: float,
    max_matvecs: int,
    seeds: tuple[int, int],
    progress: bool | None,
    provenance: dict[str, Any],
) -> tuple[Estimate, Estimate]:
    """Both from the same probes, as many as the trace needs and then as the norm still needs."""
    deflation = random_probes.Deflation(operator, pairs)
    sample = functools.partial(
        random_probes.sample_moments,
        operator,
        deflation,
        rtol=rtol,
        atol=None,
        confidence=0.95,
        progress=progress,
    )
    moments = run.timed(
        "trace",
        lambda: sample(
            want="trace",
            max_matvecs=max_matvecs,
            seed=seeds[0],
            begun=_begun(density, deflation),
        ),
    )
    trace = trace_estimate(
        moments, deflation, rtol=rtol, atol=None, confidence=0.95, provenance=provenance
    )
    left = max_matvecs - moments.matvecs
    if not moments.exact and left >= 2:
        begun = moments
        more = run.timed(
            "Frobenius norm",
            lambda: sample(want="square", max_matvecs=left, seed=seeds[1], begun=begun),
        )
        moments = replace(more, matvecs=begun.matvecs + more.matvecs)
    frobenius = frobenius_estimate(
        moments, deflation, rtol=rtol, confidence=0.95, provenance=provenance
    )
    if trace.matvecs:
        shared = f"{frobenius.method}, {trace.matvecs} matvecs shared with the trace"
        frobenius = replace(frobenius, method=shared)
    return trace, frobenius


def _begun(
    density: SpectralDensity | None, deflation: random_probes.Deflation
) -> random_probes.Moments | None:
    """Samples of trace and square that the quadrature contains: its first two moments."""
    if density is None or density.steps < 2:
        # A rule of one node is exact to degree 1: it knows the trace, but not the square.
        return None
    squares = density.n * (density.weights * density.nodes**2).sum(axis=1) + deflation.square
    traces = density.moment_samples(1)
    return random_probes.Moments(traces, squares, exact=False, matvecs=0)
