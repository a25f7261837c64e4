"""What is the curvature of this loss? All questions in one run, sharing what each has found."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from spectra.algorithms import probes as random_probes
from spectra.algorithms.blocks import BlockTraces, By
from spectra.algorithms.density import SpectralDensity, check_counts, spectral_density
from spectra.algorithms.eigen import Basis, Eigenpairs, Which, check_eigsh_arguments, eigsh
from spectra.algorithms.estimate import Estimate
from spectra.algorithms.functions import (
    effective_rank,
    participation_ratio,
    spectral_sum,
)
from spectra.algorithms.moments import check_tolerances
from spectra.algorithms.norms import frobenius_estimate, norm
from spectra.algorithms.resuming import resumable
from spectra.algorithms.summation import spectral_interval
from spectra.algorithms.trace import trace_estimate
from spectra.analysis.budget import Budget, Ledger
from spectra.analysis.gate import Strictness, check_strictness, checked_before
from spectra.analysis.landscape import SLICES, Landscape, along_eigenvectors
from spectra.analysis.sharing import Shared
from spectra.errors import ArgumentError, ArgumentTypeError
from spectra.journal import Stopped, ended, remember, unless_stopped
from spectra.operators.base import SymmetricOperator, as_operator
from spectra.operators.hessian import HessianOperator
from spectra.results import Result, versions

__all__ = ["Analysis", "analyze"]

# Eigenpairs, if nobody says how many.
_DEFAULT_COUNT = 10
# Of a budget: what the eigenpairs may take, single probes that are kept for the trace, and the
# fewest Lanczos steps of a probe that make a density.
_SHARE_OF_EIGENPAIRS = 0.6
_KEPT_FOR_TRACE = 8
_LEAST_STEPS = 4
# What the loss along eigenvectors takes, in products: an evaluation is a third of a gradient, which
# is about what a product is where graphs are kept; where they are not a product is more.
_LANDSCAPE_AS_PRODUCTS = math.ceil(math.prod(SLICES) / 3)


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
    blocks
        How the trace is shared among layers and modules, from the same probes; None without the
        trace, and for an operator that is not of several modules.
    landscape
        The loss along the eigenvectors of largest |λ|, beside its quadratic model; None where it
        was not asked for.
    value, gradient_norm
        L(θ) and ‖∇L(θ)‖, where the operator is a Hessian.
    matvecs, seconds
        Spent on each part, by name.
    notes
        What is to be known of the operator, and what the budget did not allow.
    """

    eigenpairs: Eigenpairs
    spectral_norm: Estimate
    trace: Estimate | None = None
    frobenius_norm: Estimate | None = None
    density: SpectralDensity | None = None
    blocks: BlockTraces | None = None
    landscape: Landscape | None = None
    value: float | None = None
    gradient_norm: float | None = None
    matvecs: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def noise(self) -> float:
        """Relative error of a product, as the eigenpairs' search measured it."""
        return self.eigenpairs.noise

    @property
    def floor(self) -> float:
        """Noise times ‖H‖: digits of eigenvalues below it mean nothing."""
        return self.eigenpairs.floor

    @functools.cached_property
    def sums(self) -> dict[str, Estimate]:
        """Sums over all eigenvalues by name, from the density's nodes: no further product.

        Counts below, within and above the resolution at zero, nuclear norm, effective rank and
        participation ratio; empty without a density of two steps or more.
        """
        if self.density is None or self.density.steps == 1:
            return {}
        counts = self.density.counts()
        nuclear = spectral_sum(self.density, np.abs)
        if not nuclear.exact:
            # What is known for certain is a lower bound.
            known, (low, high) = float(np.abs(self.density.atoms).sum()), nuclear.interval()
            nuclear = replace(
                nuclear, bounds=(max(low, known), high), bounds_confidence=nuclear.confidence
            )
        return {
            "negative eigenvalues": counts[0],
            "eigenvalues near zero": counts[1],
            "positive eigenvalues": counts[2],
            "nuclear norm": replace(nuclear, quantity="nuclear norm"),
            "effective rank": effective_rank(self.density),
            "participation ratio": participation_ratio(self.density),
        }

    def module_traces(self, by: By = "module", *, mean: bool = False) -> dict[str, Estimate]:
        """The trace of every module's diagonal block by name; empty where `blocks` is None.

        Parameters
        ----------
        by, mean
            As of `BlockTraces.traces`: layer, module or parameter; divided by their entries.

        Raises
        ------
        ArgumentError
            Another `by`.
        """
        return {} if self.blocks is None else self.blocks.traces(by, mean=mean)

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
            for part in (
                self.spectral_norm,
                self.trace,
                self.frobenius_norm,
                self.blocks,
                self.density,
                self.landscape,
            )
            if part is not None
        ]
        if self.sums:
            parts.append("\n".join(_brief(estimate) for estimate in self.sums.values()))
        parts += [f"note: {note}" for note in self.notes]
        spent = ", ".join(f"{name} {count}" for name, count in self.matvecs.items())
        parts.append(
            f"{self.total_matvecs} matvecs in {sum(self.seconds.values()):.1f} s ({spent})"
        )
        return "\n\n".join(parts)


@resumable
def analyze(
    H: Any,
    k: int | None = None,
    *,
    which: Which = "LM",
    tol: float = 1e-3,
    rtol: float = 0.01,
    steps: int = 20,
    probes: int = 3,
    trace: bool = True,
    density: bool = True,
    landscape: bool = False,
    budget: Budget = None,
    preflight: Strictness = "warn",
    ncv: int | None = None,
    basis: Basis = "auto",
    max_matvecs: int = 200,
    seed: int = 0,
    progress: bool | None = None,
    checkpoint: str | Path | None = None,
) -> Analysis:
    """Eigenpairs, norms, traces, density and spectral sums of a symmetric operator or matrix.

    One run in which nothing is multiplied twice. The eigenpairs come first. They are deflated from
    the quadrature, whose nodes give the density, counts and spectral sums, and the first samples of
    the trace and the Frobenius norm; single probes follow until those are within `rtol`. Each of
    these probes also tells how the trace is shared among the modules of a model. It stops when
    every tolerance is met, or when the budget is spent.

    Parameters
    ----------
    H
        An operator, a torch or NumPy matrix, a SciPy sparse matrix or LinearOperator.
    k, which, tol, ncv, basis
        As for `eigsh`; k is 10 by default, or n where that is less.
    rtol
        Of trace and Frobenius norm, as for `trace`.
    steps, probes
        Of the density, as for `spectral_density`.
    trace, density
        Whether to compute these (the Frobenius norm comes with the trace).
    landscape
        Whether the loss of a Hessian is evaluated along up to three eigenvectors, those of largest
        |λ|, at 21 points each: evaluations without a derivative and one gradient. They take as long
        as 10 to 20 products (of a transformer, with graphs built anew and kept), and count as none
        in a budget of products.
    budget
        Most matvecs (100), or a time ("90s", "10min", "2h"), of the whole run. The eigenpairs take
        at most 60 % of it, the density gets fewer steps where it is short. A time is turned into
        products by their measured speed, and kept to within a few of them.
    preflight
        Whether the operator is checked first, as `check` does. "warn": a Hessian, where the run
        will take more than a minute and four products are a small part of it; what is wrong is in
        the notes. "strict": always, and it ends the run. "off": never. Beside a budget of
        products, not out of it.
    max_matvecs
        Most products for trace and Frobenius norm together: single probes, and a Krylov space that
        is taken out of them where that takes fewer.
    seed
        Of all random vectors.
    progress
        Show progress bars; None for on a terminal only.
    checkpoint
        A file for what is computed, from which the same call goes on after a crash or a kill; see
        docs/resuming.md. Ctrl-C and SIGTERM then end the call softly: it returns
        what there is, marked as `partial`.

    Returns
    -------
    Analysis
        `matvecs` and `seconds` say what each part took, `notes` what is to be known of the result.

    Raises
    ------
    ArgumentError
        As `eigsh`, `spectral_density` and `trace` do; a budget too small for k eigenpairs.
    ArgumentTypeError
        A landscape of what is no Hessian of a loss.
    PreflightError
        With preflight="strict": a check ended in a warning or an error.

    Notes
    -----
    An exception that ends the run after the eigenpairs, Ctrl-C included, has them as its attribute
    `partial`; one that ends their search has what `eigsh` says.
    """
    operator = as_operator(H)
    k = min(_DEFAULT_COUNT, operator.space.n) if k is None else k
    # All that later parts would refuse is refused now, before a product; eigsh comes first.
    random_probes.seeded(seed)
    check_tolerances(rtol, None, 0.95, max_matvecs)
    check_counts(steps, probes)
    check_strictness(preflight)
    if landscape and not isinstance(operator, HessianOperator):
        msg = (
            f"a {type(operator).__name__} has no loss to evaluate; leave landscape=True out, or "
            "pass the HessianOperator that it was made from"
        )
        raise ArgumentTypeError(msg)
    # Independent streams for the parts: probes must not repeat the start vector's numbers.
    streams = np.random.SeedSequence(int(seed)).generate_state(3)
    ledger = Ledger(operator, budget)
    provenance = {
        "operator": operator.describe(),
        "options": {
            "k": k,
            "which": which,
            "tol": tol,
            "rtol": rtol,
            "steps": steps,
            "probes": probes,
            "budget": budget,
            "preflight": preflight,
        },
        "seed": seed,
        "versions": versions(),
    }
    check_eigsh_arguments(operator.space.n, k, which, None, tol)
    concerns = checked_before(ledger, operator, preflight, seed)
    pairs, value, gradient_norm = _eigenpairs(
        ledger,
        operator,
        k,
        which=which,
        tol=tol,
        ncv=ncv,
        basis=basis,
        seed=seed,
        progress=progress,
    )
    # By now the number of batches is known, too.
    provenance["operator"] = operator.describe()
    notes = [*concerns, *operator.describe().get("notes", ())]
    notes += _graph_notes(operator.describe())
    measure = trace_result = frobenius = blocks = slices = None
    with _kept(pairs):
        if landscape and not ended():
            slices = _landscape(ledger, operator, pairs, progress)
            notes += [] if slices is not None else ["the budget left no time for the landscape"]
        if density:
            measure = _density(
                ledger,
                operator,
                pairs,
                steps=steps,
                probes=probes,
                kept=_KEPT_FOR_TRACE if trace else 0,
                seed=int(streams[0]),
                progress=progress,
            )
            notes += [] if ended() else _density_notes(measure, steps, probes)
        spectral = ledger.timed(
            "spectral norm",
            lambda: _spectral_norm(ledger, operator, pairs, measure, seed=seed, progress=progress),
        )
        if trace:
            sampled = functools.partial(
                _trace_and_frobenius,
                ledger,
                operator,
                pairs,
                measure,
                rtol=rtol,
                max_matvecs=max_matvecs,
                seeds=(int(streams[1]), int(streams[2])),
                progress=progress,
                provenance=provenance,
            )
            trace_result, frobenius, blocks = unless_stopped(sampled) or (None, None, None)
            if frobenius is not None:
                frobenius = _not_below_the_norm(frobenius, spectral)
            if measure is not None:
                # The runs have served; their bases would stay in memory with the result.
                measure.keep(())
            if trace_result is None and not ended():
                notes.append("the budget left no products for trace and Frobenius norm")
    return Analysis(
        eigenpairs=pairs,
        spectral_norm=spectral,
        trace=trace_result,
        frobenius_norm=frobenius,
        density=measure,
        blocks=blocks,
        landscape=slices,
        value=value,
        gradient_norm=gradient_norm,
        matvecs={name: count for name, count in ledger.matvecs.items() if count},
        seconds=ledger.seconds,
        notes=tuple(notes),
        provenance=provenance,
    )


@contextlib.contextmanager
def _kept(pairs: Eigenpairs) -> Iterator[None]:
    """Whatever exception ends what comes after the eigenpairs has them as `partial`."""
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(AttributeError):
            error.partial = pairs  # type: ignore[attr-defined]
        raise


def _brief(estimate: Estimate) -> str:
    """An estimate in one line."""
    low, high = estimate.interval()
    return f"{estimate.quantity} = {estimate.value:.4g}  [{low:.4g}, {high:.4g}]"


def _eigenpairs(
    ledger: Ledger, operator: SymmetricOperator, k: int, **options: Any
) -> tuple[Eigenpairs, float | None, float | None]:
    """The eigenpairs, within their share of the budget, with loss and gradient norm."""
    first = functools.partial(ledger.timed, "gradient", lambda: _value_and_gradient_norm(operator))
    if not ledger.limited:
        # Products have checks that a gradient has not: they come first.
        pairs = ledger.timed("eigenpairs", lambda: _found_pairs(operator, k, **options))
        return (pairs, None, None) if ended() else (pairs, *first())
    value, gradient_norm = first()
    allowed = ledger.left(10**9)
    share = int(_SHARE_OF_EIGENPAIRS * allowed)
    if share < 2 * k + 1:
        time = ledger.seconds_for(math.ceil((2 * k + 1) / _SHARE_OF_EIGENPAIRS))
        msg = (
            f"the budget holds {allowed} matvecs, of which {k} eigenpairs may take {share}; they "
            f"need at least {2 * k + 1}: ask for fewer, or allow "
            f"{math.ceil((2 * k + 1) / _SHARE_OF_EIGENPAIRS)} matvecs{time}"
        )
        raise ArgumentError(msg)
    most = min(20 * k + 200, share)
    options["max_matvecs"] = most
    pairs = ledger.timed("eigenpairs", lambda: _found_pairs(operator, k, **options))
    return pairs, value, gradient_norm


def _found_pairs(operator: SymmetricOperator, k: int, **options: Any) -> Eigenpairs:
    """The eigenpairs, or what there is of them when the run is asked to stop."""
    try:
        return eigsh(operator, k, **options)
    except Stopped as stopped:
        if not isinstance(stopped.partial, Eigenpairs):
            raise
        return stopped.partial


def _landscape(
    ledger: Ledger, operator: Any, pairs: Eigenpairs, progress: bool | None
) -> Landscape | None:
    """The loss along the first eigenvectors; None where there is no time for it."""
    if not ledger.affords(_LANDSCAPE_AS_PRODUCTS):
        return None
    compute = functools.partial(along_eigenvectors, operator, pairs, progress=progress)
    return ledger.timed("landscape", compute)


def _density(
    ledger: Ledger,
    operator: SymmetricOperator,
    pairs: Eigenpairs,
    *,
    steps: int,
    probes: int,
    kept: int,
    seed: int,
    progress: bool | None,
) -> SpectralDensity | None:
    """The quadrature, with fewer steps or probes where the budget is short; None if too short."""
    steps = min(steps, max(operator.space.n - len(pairs), 1))
    allowed = ledger.left(steps * probes + kept) - kept
    if allowed < steps * probes:
        # Fewer steps first; their loss is resolution, that of a probe is the error estimate.
        for count in range(probes, 0, -1):
            if allowed // count >= min(_LEAST_STEPS, steps):
                probes, steps = count, allowed // count
                break
        else:
            return None
    compute = functools.partial(
        spectral_density,
        operator,
        steps=steps,
        probes=probes,
        deflate=pairs,
        # For the trace; with room to spare for what comes with it.
        keep_basis=kept > 0 and operator.space.affordable() > 2 * probes * (steps + 1),
        seed=seed,
        progress=progress,
    )
    return ledger.timed("density", lambda: unless_stopped(compute))


def _graph_notes(operator: dict[str, Any]) -> list[str]:
    """A slower path than the usual one is said."""
    notes = [f"memory: {reason}" for reason in operator.get("recompute", {}).get("because", ())]
    blocks = operator.get("recompute", {}).get("blocks")
    if blocks:
        notes.append(
            f"{blocks} blocks of the model were recomputed instead of kept: a product takes about "
            "1.8 times the forward passes"
        )
    graphs = operator.get("graphs")
    if operator.get("graph") != "auto" or graphs is None or graphs["retained"] == graphs["parts"]:
        return notes
    why = operator.get("graph_fallback", "the others did not fit into the memory for them")
    return [
        *notes,
        f"the gradient's graphs of {graphs['retained']} of {graphs['parts']} batches were kept "
        f"between products ({why}); with all of them a product takes a third less",
    ]


def _density_notes(measure: SpectralDensity | None, steps: int, probes: int) -> list[str]:
    if measure is None:
        return ["the budget left no products for the density"]
    if (measure.steps, measure.probes) != (min(steps, measure.remaining), probes):
        return [
            f"the budget left {measure.probes} x {measure.steps} steps for the density, "
            f"{probes} x {steps} were asked for"
        ]
    return []


def _value_and_gradient_norm(operator: SymmetricOperator) -> tuple[float | None, float | None]:
    if not isinstance(operator, HessianOperator):
        return None, None

    def found() -> tuple[float, float]:
        value, gradient = operator.value_and_gradient()
        return value, operator.space.norm(gradient)

    return remember("value and gradient", found)


def _spectral_norm(
    ledger: Ledger,
    operator: SymmetricOperator,
    pairs: Eigenpairs,
    measure: SpectralDensity | None,
    *,
    seed: int,
    progress: bool | None,
) -> Estimate:
    """‖H‖ from what is known of both ends, by Lanczos where only one was searched."""
    ends = [pairs.no_eigenvalue_above, pairs.no_eigenvalue_below]
    complete = len(pairs) == operator.space.n
    if pairs.which in {"LA", "SA"} and not complete:
        allowed = ledger.left(300)
        if measure is None and allowed >= 2:
            compute = functools.partial(norm, operator, 2, method="lanczos", max_matvecs=allowed)
            found = unless_stopped(lambda: compute(seed=seed, progress=progress))
            if found is not None:
                return found
        if measure is not None:
            return _norm_from_density(pairs, measure)
    place = int(np.argmax(np.abs(pairs.values)))
    value, residual = float(np.abs(pairs.values[place])), float(pairs.residuals[place])
    residual += 4 * operator.space.eps * value + (0.0 if np.isnan(pairs.floor) else pairs.floor)
    certified = complete or None not in ends
    upper = max([value + residual, *(abs(end) for end in ends if end is not None)])
    if not certified:
        upper = np.inf
    return Estimate(
        quantity="spectral norm",
        value=value,
        standard_error=float("nan"),
        bounds=(value - residual, upper),
        bounds_confidence=pairs.certificate_confidence,
        converged=bool(pairs.converged[place]),
        method="Lanczos, with the eigenpairs",
        notes=() if certified else ("no search for missed eigenvalues bounds it from above",),
        noise=pairs.noise,
        floor=pairs.floor,
        provenance=pairs.provenance,
    )


def _norm_from_density(pairs: Eigenpairs, measure: SpectralDensity) -> Estimate:
    """‖H‖ between the largest node and the bounds that the quadrature's runs contain."""
    value = max(map(abs, measure.support))
    low, high = spectral_interval(measure, pairs.certificate_confidence)
    room = 1e-12 * value + (0.0 if np.isnan(measure.floor) else measure.floor)
    return Estimate(
        quantity="spectral norm",
        value=value,
        standard_error=float("nan"),
        bounds=(value - room, max(abs(low), abs(high), value) + room),
        bounds_confidence=pairs.certificate_confidence,
        converged=max(abs(low), abs(high)) <= (1 + pairs.tol) * value,
        method="Lanczos, with the density",
        noise=measure.noise,
        floor=measure.floor,
        provenance=pairs.provenance,
    )


def _trace_and_frobenius(
    ledger: Ledger,
    operator: SymmetricOperator,
    pairs: Eigenpairs,
    density: SpectralDensity | None,
    *,
    rtol: float,
    max_matvecs: int,
    seeds: tuple[int, int],
    progress: bool | None,
    provenance: dict[str, Any],
) -> tuple[Estimate | None, Estimate | None, BlockTraces | None]:
    """All from the same probes, as many as the trace needs and then as the norm still needs."""
    allowed = ledger.left(max_matvecs)
    deflation = random_probes.Deflation(operator, pairs)
    shared = Shared(operator.space, density, deflation, rtol)
    if allowed < 2 and shared.begun is None:
        return None, None, None
    sample = functools.partial(
        random_probes.sample_moments,
        operator,
        deflation,
        rtol=rtol,
        atol=None,
        confidence=0.95,
        progress=progress,
    )
    of_density, moments = shared.krylov_vectors, shared.begun
    if allowed >= 2:
        moments = ledger.timed(
            "trace",
            lambda: sample(
                want="trace", max_matvecs=allowed, seed=seeds[0], prepare=shared.prepare
            ),
        )
    assert moments is not None
    method = None
    if shared.krylov_vectors and not moments.exact:
        method = (
            f"Hutchinson, {len(deflation)} deflated, {of_density} Krylov vectors of the density"
        )
        if shared.krylov_vectors > of_density:
            method += f" and {shared.krylov_vectors - of_density} more"
    trace = trace_estimate(
        moments,
        deflation,
        rtol=rtol,
        atol=None,
        confidence=0.95,
        provenance=provenance,
        method=method,
    )
    left = allowed - moments.matvecs
    if not moments.exact and left >= 2:
        before = moments
        more = ledger.timed(
            "Frobenius norm",
            lambda: sample(
                want="square",
                max_matvecs=left,
                seed=seeds[1],
                begun=before,
                known=shared.known,
            ),
        )
        moments = replace(more, matvecs=before.matvecs + more.matvecs)
    frobenius = frobenius_estimate(
        moments, deflation, rtol=rtol, confidence=0.95, provenance=provenance
    )
    method = frobenius.method if method is None or moments.exact else method
    if trace.matvecs:
        method += f", {trace.matvecs} matvecs shared with the trace"
    return trace, replace(frobenius, method=method), shared.block_traces(moments, trace)


def _not_below_the_norm(frobenius: Estimate, spectral: Estimate) -> Estimate:
    """‖H‖_F is no less than ‖H‖₂: where few probes missed what the Lanczos runs found, say so."""
    least = spectral.value
    if frobenius.value >= least or frobenius.exact:
        return frobenius
    note = (
        f"the probes put this at {frobenius.value:.4g}, below the spectral norm: they missed large "
        "eigenvalues that are known; deflate both ends (which='LM' or 'BE')"
    )
    return replace(
        frobenius,
        value=least,
        bounds=(least, np.inf),
        bounds_confidence=frobenius.confidence,
        converged=False,
        notes=(*frobenius.notes, note),
    )
