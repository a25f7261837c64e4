"""How curved is each parameter? The diagonal of H, its error, and the trace of every module.

Precision policy: the running means and squares have the dtype of the vectors, because a rounding
error of eps beside a sampling error of 1/√probes is nothing; sums over entries are float64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from scipy import linalg, special
from torch import Tensor

from spectra.algorithms import probes as random_probes
from spectra.algorithms.blocks import By, add_diagonal, block_traces
from spectra.algorithms.estimate import Estimate, check_confidence
from spectra.algorithms.lanczos import Krylov
from spectra.algorithms.noise import Noise, noise_notes
from spectra.algorithms.progress import progress_bar
from spectra.algorithms.resuming import resumable
from spectra.errors import ArgumentError, ArgumentTypeError
from spectra.journal import Snapshots, Stopped, unless_stopped
from spectra.names import short_name
from spectra.objective.parameters import ParameterSpace
from spectra.objective.vectors import VectorSpace
from spectra.operators.base import SymmetricOperator, as_operator
from spectra.results import Result, dimension, versions

if TYPE_CHECKING:
    from spectra.algorithms.eigen import Eigenpairs

__all__ = ["DiagonalEstimate", "diagonal"]

Method = Literal["auto", "hutchinson", "xdiag"]

# Random signs take two values: an entry coupled to one other entry alone shows the same sample in
# all of N probes with probability 2^(1 − N). Ten probes make that 0.2 %, so that fewer promise
# nothing, however equal they look.
_MIN_PROBES = 10
# Up to this n, all unit vectors cost hardly more products than the least that an estimate takes.
_SMALL = 64
# Fewer basis vectors than this deflate nothing worth their products.
_MIN_BASIS = 8
# XDiag's samples share their basis, so that their spread underestimates the error: measured, by a
# factor of 1.0 to 1.3 on rotated spectra and 1.45 on nearly diagonal matrices, and by more with
# fewer vectors than this.
_XDIAG_INFLATION = 1.5
_MIN_SKETCH = 16
# Modules that a printed result shows.
_SHOWN = 10
# Most numbers of a block of unit vectors.
_BLOCK_ENTRIES = 1 << 24


@dataclass(frozen=True, eq=False)
class DiagonalEstimate(Result):
    """The diagonal of an operator with its error.

    Attributes
    ----------
    values
        (n,) the diagonal: a torch tensor on the operator's device, or a NumPy array where a NumPy
        or SciPy matrix was given.
    standard_errors
        (n,) of each entry, of the same kind; nan after one probe, 0 where exact. An entry that is
        coupled to few others can show a spread that is far too small: no stop refers to it.
    relative_error
        What ‖values − diagonal‖ / ‖diagonal‖ of the whole vector does not exceed with probability
        `confidence`; single entries can be much further off.
    converged
        Whether `relative_error` met the tolerance, with at least ten probes.
    confidence
        Of `relative_error`, and of the intervals of `module_traces`.
    exact
        The values come from all n unit vectors, or the sketch spans the range of the operator.
    method, probes, matvecs
        How, with how many random vectors (0 where exact), at which cost.
    parameters
        Names of the parameters in the order of the flat vector; ("matrix",) without names.
    sizes
        Their numbers of entries.
    parameter_traces
        (probes, parameters) float64 sums of the diagonal over each parameter, as every probe has
        them; one row where exact. Sums over several parameters are to be formed within a row:
        the entries of one probe are correlated.
    noise
        Relative error of a product, measured from how unsymmetric the products were; nan where
        exact.
    floor
        noise · ‖H‖_F: what that noise can move the whole vector by, in norm.
    notes
        What to know before believing the numbers, in words.
    """

    values: Any
    standard_errors: Any
    relative_error: float
    converged: bool
    confidence: float
    exact: bool
    method: str
    probes: int
    matvecs: int
    parameters: tuple[str, ...]
    sizes: tuple[int, ...]
    parameter_traces: np.ndarray
    noise: float = math.nan
    floor: float = math.nan
    notes: tuple[str, ...] = ()

    def module_traces(self, by: By = "module", *, mean: bool = False) -> dict[str, Estimate]:
        """The trace of every diagonal block, with Student's interval over the probes.

        Parameters
        ----------
        by
            "module": the parameters that one module owns together (a weight and its bias).
            "layer": the modules whose names agree up to the first number, or in their first two
            parts. "parameter": each parameter by itself.
        mean
            Divide by the number of entries: the average trace that ranks layers for quantisation.

        Returns
        -------
        dict
            By the block's name; "" is the model itself, or a plain matrix.

        Raises
        ------
        ArgumentError
            Another `by`.

        References
        ----------
        Dong et al., 2020, "HAWQ-V2: Hessian aware trace-weighted quantization of neural networks".
        """
        return block_traces(self, by, mean=mean)

    def __str__(self) -> str:
        probes = "" if self.exact else f"; {self.probes} probe{'' if self.probes == 1 else 's'}"
        how = f"{'exact, ' if self.exact else ''}{self.method}{probes}, {self.matvecs} matvecs"
        lines = [f"diagonal of n = {dimension(self, len(self.values)):,} ({how})"]
        if not self.exact:
            lines.append(
                f"relative error of the whole vector at most {self.relative_error:.2g} "
                f"({self.confidence:.0%}), not of single entries"
            )
            if not self.converged:
                lines[-1] += "  tolerance not reached"
        if len(self.parameters) > 1:
            traces = list(self.module_traces().items())
            lines.append(f"traces of {min(len(traces), _SHOWN)} of {len(traces)} modules")
            traces.sort(key=lambda item: -abs(item[1].value))
            lines += [
                f"  {short_name(name or '(itself)', 50)}: {trace.value:.5g} "
                f"± {trace.standard_error:.2g}"
                for name, trace in traces[:_SHOWN]
            ]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


@resumable
def diagonal(
    H: Any,
    *,
    rtol: float = 0.05,
    probes: int | None = None,
    method: Method = "auto",
    deflate: Eigenpairs | None = None,
    confidence: float = 0.95,
    max_matvecs: int = 300,
    seed: int = 0,
    progress: bool | None = None,
    checkpoint: str | Path | None = None,
) -> DiagonalEstimate:
    """The diagonal of a symmetric operator or matrix, and the trace of every module.

    Mean of z ∘ Hz over vectors z of random signs: entry i of one sample has the variance
    Σ h_ij² over j ≠ i. What is known of H, a part M = Q T Qᵀ, is taken out of the products and its
    diagonal added: that removes the variance of the outliers and stays unbiased whatever Q and T.

    Parameters
    ----------
    H
        An operator, a torch or NumPy matrix, a SciPy sparse matrix or LinearOperator.
    rtol
        Stop when the error ‖values − diagonal‖ is below rtol · ‖diagonal‖ with the given
        confidence. That is the whole vector's; nothing is promised of single entries.
    probes
        A fixed number of probes instead of a stop at `rtol` or `max_matvecs`; then no basis is
        built, and `rtol` is only what `converged` refers to.
    method
        "auto": ten probes tell what the rest would take; where that is much, some products go into
        a Krylov basis, and what it holds of H is taken out of all the probes, the first ten
        included. "hutchinson": probes only. "xdiag": every probe is estimated with a basis of all
        the others, which takes 2 products and the memory of 2 vectors and n bytes per probe.
    deflate
        Eigenpairs of the same operator, from `eigsh`, to be taken out ("auto" only). No products
        are spent on them, and pairs that have not converged cost accuracy, not correctness.
    confidence
        Of the stop.
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
    DiagonalEstimate
        Exact where n products are cheaper than the probes that the tolerance asks for.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        Impossible tolerances, an unknown method, eigenpairs of another operator.
    NonFiniteError
        A product holds nan or inf.

    References
    ----------
    Bekas, Kokiopoulou and Saad, 2007, "An estimator for the diagonal of a matrix". Baston and
    Nakatsukasa, 2022, "Stochastic diagonal estimation: probabilistic bounds and an improved
    algorithm" (deflation). Chen and Hallman, 2023, "Krylov-aware stochastic trace estimation".
    Epperly, Tropp and Webber, 2024, "XTrace: making the most of every sample in stochastic trace
    estimation" (XDiag).

    Examples
    --------
    >>> import numpy as np, spectra
    >>> from spectra.algorithms.diagonal import diagonal
    >>> print(diagonal(np.array([[2.0, 1.0], [1.0, 3.0]])).values)
    [2. 3.]
    """
    operator = as_operator(H)
    _check_arguments(rtol, probes, method, deflate, max_matvecs)
    check_confidence(confidence)
    budget = max_matvecs if probes is None else probes * (2 if method == "xdiag" else 1)
    known = [] if deflate is None else [_known_pairs(operator, deflate)]
    generator = random_probes.seeded(seed)
    with progress_bar("diagonal", budget, progress, at_most=probes is None) as bar:
        stop = {"rtol": rtol, "confidence": confidence}
        run = _Run(operator, generator, bar, **stop, budget=budget, adaptive=probes is None)
        if probes is None and operator.space.n <= min(_SMALL, budget):
            trial = run.exactly()
        elif method == "xdiag":
            trial = run.by_xdiag()
        else:
            trial = run.by_probes(known, build=method == "auto")
    options = {"rtol": rtol, "probes": probes, "method": method, "confidence": confidence}
    provenance = {
        "operator": operator.describe(),
        "options": {**options, "max_matvecs": max_matvecs},
        "basis": run.basis,
        "seed": seed,
        "versions": versions(),
    }
    return _result(run, trial, provenance)


def _result(run: _Run, trial: _Trial, provenance: dict[str, Any]) -> DiagonalEstimate:
    samples = trial.samples
    count, values = samples.count, trial.offset + samples.mean
    error = trial.relative_error()
    traces = run.space.sums_by_parameter(trial.offset)[np.newaxis]
    if trial.exact:
        errors = run.space.zeros()
    else:
        # One probe tells nothing of its spread.
        variances = samples.squares / (count * (count - 1) or math.nan)
        errors = variances.sqrt_().mul_(trial.inflation)
        rows = np.stack(samples.sums)
        centre = rows.mean(axis=0)
        traces = traces + centre + trial.inflation * (rows - centre)
    return DiagonalEstimate(
        values=run.operator.native(values),
        standard_errors=run.operator.native(errors),
        relative_error=error,
        converged=trial.met(),
        confidence=run.confidence,
        exact=trial.exact,
        method=trial.method,
        probes=count,
        matvecs=run.spent,
        parameters=run.names,
        sizes=run.sizes,
        parameter_traces=traces,
        noise=run.noise.relative,
        floor=run.floor,
        notes=(*_notes(run, trial, error), *noise_notes(run.noise.relative, run.floor)),
        provenance=provenance,
    )


def _notes(run: _Run, trial: _Trial, error: float) -> list[str]:
    count = trial.samples.count
    if trial.exact:
        return []
    notes = []
    if error <= 8 * run.space.eps:
        notes.append(
            f"all {count} samples are equal to rounding: what is not known of the operator is "
            f"diagonal, or {count} probes missed a coupling, which has probability "
            f"{2.0 ** (1 - count):.1g}"
        )
    if count < trial.least:
        notes.append(
            f"too few probes ({count}) to rely on their spread; use at least {trial.least}"
        )
    elif error == math.inf:
        notes.append("the diagonal is not distinguishable from 0 beside its error")
    elif not trial.met():
        needed = trial.probes_to_come() + count
        number = f"about {needed:,.0f}" if math.isfinite(needed) else "very many"
        notes.append(
            f"the relative error is {error:.2g} after {count} probes, {run.rtol:g} was asked for: "
            f"that takes {number} of this kind"
        )
    return notes


def _check_arguments(
    rtol: float, probes: int | None, method: str, deflate: Any, max_matvecs: int
) -> None:
    if method not in {"auto", "hutchinson", "xdiag"}:
        msg = f"method={method!r}; expected 'auto', 'hutchinson' or 'xdiag'"
        raise ArgumentError(msg)
    if method != "auto" and deflate is not None:
        msg = f"method={method!r} does not deflate; leave deflate out, or use method='auto'"
        raise ArgumentError(msg)
    for name, value in (("probes", probes), ("max_matvecs", max_matvecs)):
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int | np.integer)
        ):
            msg = f"{name}={value!r}; expected a whole number"
            raise ArgumentTypeError(msg)
    if probes is not None and probes < 1:
        msg = f"probes={probes}; expected at least 1, and ten for an error to be relied on"
        raise ArgumentError(msg)
    if max_matvecs < 2:
        msg = f"max_matvecs={max_matvecs}; an error estimate needs at least 2 products"
        raise ArgumentError(msg)
    if not rtol > 0:
        msg = f"rtol={rtol}; expected a positive relative tolerance, such as 0.05"
        raise ArgumentError(msg)


def _known_pairs(operator: SymmetricOperator, pairs: Eigenpairs) -> _Known:
    deflation = random_probes.Deflation(operator, pairs)
    return _Known(operator.space, deflation.basis, np.diag(deflation.values))


def _signs(space: VectorSpace, generator: torch.Generator) -> Tensor:
    """Random signs (n,) as bytes, drawn on the CPU: the same on every device."""
    bits = space.drawn(
        lambda count: torch.randint(
            0, 2, (count,), generator=generator, dtype=torch.int8, device="cpu"
        )
    )
    return bits.mul_(2).sub_(1)


class _Known:
    """A part Q T Qᵀ of the operator whose diagonal can be read off: a control variate.

    It need not hold anything exactly: the diagonal that is added is that of the same Q and T that
    are taken out of the products, so that the estimate has the right mean for any of them.
    """

    def __init__(self, space: VectorSpace, rows: Tensor, core: np.ndarray) -> None:
        self._space = space
        self.rows = rows
        self._core = torch.from_numpy(core.copy()).to(space.device)

    def take_from(self, product: Tensor, vector: Tensor) -> None:
        """Subtract Q T Qᵀ `vector` from `product`, in place."""
        coefficients = self._core @ self._space.project(self.rows, vector).to(self._core)
        self._space.subtract(product, self.rows, coefficients)

    def add_diagonal(self, total: Tensor) -> None:
        """Add the diagonal of Q T Qᵀ to `total`, in place."""
        add_diagonal(self._space, total, self.rows, self._core)


class _Samples:
    """Mean and spread of a stream of vectors, in three vectors of memory.

    The k-th sample differs from the mean of those before it by a contrast. Scaled, the contrasts
    are uncorrelated and each has the covariance of one sample (Helmert), as has √N times the error
    of the mean. So their lengths tell how long that error is, and their overlaps how much its
    length varies.
    """

    _FIELDS = ("_contrast", "_lengths", "_overlaps", "count", "mean", "squares", "sums")

    def __init__(self, space: VectorSpace) -> None:
        self._space = space
        self._contrast: Tensor | None = None
        self._lengths: list[float] = []
        self._overlaps: list[float] = []
        self.count = 0
        self.mean = space.zeros()
        self.squares = space.zeros()
        self.sums: list[np.ndarray] = []

    def add(self, sample: Tensor) -> None:
        """Take in one sample (n,), which is overwritten."""
        space = self._space
        self.sums.append(self._space.sums_by_parameter(sample))
        self.count += 1
        contrast = sample.sub_(self.mean)
        self.mean.add_(contrast, alpha=1 / self.count)
        if self.count == 1:
            return
        contrast.mul_(math.sqrt(1 - 1 / self.count))
        self.squares.addcmul_(contrast, contrast)
        self._lengths.append(space.norm(contrast) ** 2)
        if self._contrast is not None:
            self._overlaps.append(space.inner(contrast, self._contrast) ** 2)
        self._contrast = contrast

    def state(self) -> dict[str, Any]:
        """All that is known of the samples."""
        return {name: getattr(self, name) for name in self._FIELDS}

    def restore(self, known: dict[str, Any]) -> None:
        """Go on from a `state`."""
        for name, value in known.items():
            setattr(self, name, self._space.local(value) if isinstance(value, Tensor) else value)

    def error(self) -> float:
        """Root mean square of the error ‖mean − truth‖."""
        if self.count < 2:
            return math.inf
        return math.sqrt(math.fsum(self._lengths) / (self.count - 1) / self.count)

    def bound(self, confidence: float) -> float:
        """What ‖mean − truth‖ does not exceed with the given probability.

        With the covariance C of one sample, the square of the error behaves like χ² with
        ν = (tr C)² / tr C² degrees of freedom, and so do the lengths of the contrasts: the ratio
        has an F distribution. That is Student's interval where one coupling makes all of the error
        (ν = 1), and little more than the root mean square where many do. ν comes from few overlaps,
        which the two-sided quantile makes up for.
        """
        error = self.error()
        if self.count < 2 or error == 0.0:
            return error
        overlap, lengths = math.fsum(self._overlaps), np.array(self._lengths)
        product = float(lengths[1:] @ lengths[:-1])
        # Without overlaps nothing is known of ν, so the worst is taken.
        degrees = max(product / max(overlap, 1e-9 * product), 1.0) if product > 0 else 1.0
        quantile = special.fdtri(degrees, degrees * (self.count - 1), 0.5 + confidence / 2)
        return error * math.sqrt(float(quantile))


class _Trial:
    """An estimate in the making: the diagonal is `offset` plus the mean of the samples."""

    def __init__(
        self,
        run: _Run,
        method: str,
        known: Sequence[_Known] = (),
        offset: Tensor | None = None,
        *,
        inflation: float = 1.0,
        least: int = _MIN_PROBES,
        exact: bool = False,
    ) -> None:
        self._run = run
        self._known = known
        self.least = least
        self.method = method
        self.offset = run.space.zeros() if offset is None else offset
        self.inflation = inflation
        self.exact = exact
        self.samples = _Samples(run.space)

    def add_probe(self, vector: Tensor, product: Tensor) -> None:
        """Take in z and Hz, which is overwritten."""
        for part in self._known:
            part.take_from(product, vector)
        self.samples.add(product.mul_(vector))

    def relative_error(self) -> float:
        """The bound on the error over the norm of the diagonal, of which it may be a part."""
        bound = 0.0 if self.exact else self.samples.bound(self._run.confidence) * self.inflation
        length = self._run.space.norm(self.offset + self.samples.mean)
        if bound == 0.0:
            return 0.0
        return bound / (length - bound) if bound < length else math.inf

    def met(self) -> bool:
        """Whether the tolerance is reached, by enough probes to say so."""
        if not (self.exact or self.samples.count >= self.least):
            return False
        error = self.relative_error()
        self._run.tell(error)
        return error <= self._run.rtol

    def probes_to_come(self) -> float:
        """How many more the tolerance takes: the error falls with the root of their number."""
        samples, rtol = self.samples, self._run.rtol
        # The estimate is longer than the diagonal by its own error.
        square = self._run.space.norm(self.offset + samples.mean) ** 2 - samples.error() ** 2
        if square <= 0.0:
            return math.inf
        excess = samples.bound(self._run.confidence) * (1 + rtol) / (rtol * math.sqrt(square))
        return samples.count * (excess**2 - 1)


class _Sketch:
    """The range of the operator as random vectors show it, and what XDiag makes of that.

    With Y = HΩ = QR, sample i is the diagonal of what the other vectors' range holds of H, plus
    ω ∘ (Hω − what it holds of Hω) for ω = ω_i. Leaving y_i out takes the direction q = Q s from the
    range, s being row i of R⁻¹ at unit length: the sample is diag(QQᵀH) − q ∘ Hq + ω ∘ q / ‖row i‖.
    """

    def __init__(self, run: _Run, capacity: int) -> None:
        self._run = run
        space = run.space
        self._signs = torch.empty(capacity, space.length, dtype=torch.int8, device=space.device)
        self._basis = run.space.empty(capacity)
        self._products = run.space.empty(capacity)
        self._triangle = np.zeros((capacity, capacity))
        self._inside = run.space.zeros()
        self._repeats: list[np.ndarray] = []
        self._idle = 0
        self._longest = 0.0
        self.size = 0

    @property
    def count(self) -> int:
        """Random vectors so far."""
        return self.size + len(self._repeats)

    @property
    def full(self) -> bool:
        """No further vector fits."""
        return self.size == len(self._basis)

    @property
    def spans(self) -> bool:
        """The basis holds the range: the whole space, or ten more vectors showed nothing new."""
        return self.size == self._run.space.n or self._idle >= _MIN_PROBES

    def grow(self) -> None:
        """One more random vector: two products, or one where the basis holds the first."""
        run, k = self._run, self.size
        signs = _signs(run.space, run.generator)
        y = run.apply(signs.to(run.space.dtype))
        self._longest = max(self._longest, run.space.norm(y))
        coefficients = np.zeros(k)
        for _ in range(2):
            part = run.space.project(self._basis[:k], y)
            run.space.subtract(y, self._basis[:k], part)
            coefficients += part.cpu().numpy()
        rest = run.space.norm(y)
        if rest <= 10 * run.space.eps * self._longest:
            self._repeats.append(coefficients)
            self._idle += 1
            return
        self._idle = 0
        self._signs[k] = signs
        self._basis[k] = y.div_(rest)
        self._products[k] = run.apply(self._basis[k])
        self._inside.addcmul_(self._basis[k], self._products[k])
        self._triangle[:k, k], self._triangle[k, k] = coefficients, rest
        self.size = k + 1

    def trial(self) -> _Trial:
        """XDiag's estimate from the vectors so far."""
        run, k = self._run, self.size
        if self.spans:
            return _Trial(run, "XDiag, the whole range", offset=self._inside, exact=True)
        trial = _Trial(
            run, "XDiag", offset=self._inside, inflation=_XDIAG_INFLATION, least=_MIN_SKETCH
        )
        inverse = linalg.solve_triangular(self._triangle[:k, :k], np.eye(k)) if k else []
        rounding = run.space.eps**0.5 * abs(self._triangle).max()
        for i, row in enumerate(inverse):
            length = float(np.linalg.norm(row))
            if any(abs(row[: len(held)] @ held) > length * rounding for held in self._repeats):
                trial.samples.add(run.space.zeros())
                continue
            direction = torch.from_numpy(row / length).to(run.space.device)
            sample = run.space.combine(self._products[:k], direction).neg_()
            sample.add_(self._signs[i].to(sample), alpha=1 / length)
            trial.samples.add(sample.mul_(run.space.combine(self._basis[:k], direction)))
        for _ in self._repeats:
            # What the others hold of its product is all of it.
            trial.samples.add(run.space.zeros())
        return trial


class _Run:
    """One computation: its operator, its random stream, its stop, and what it has spent."""

    def __init__(
        self,
        operator: SymmetricOperator,
        generator: torch.Generator,
        bar: Any,
        *,
        rtol: float,
        confidence: float,
        budget: int,
        adaptive: bool,
    ) -> None:
        self.operator = operator
        self.space = space = operator.space
        self.generator = generator
        self.rtol = rtol
        self.confidence = confidence
        self.names: tuple[str, ...] = ("matrix",)
        self.sizes: tuple[int, ...] = (space.n,)
        if isinstance(space, ParameterSpace):
            self.names, self.sizes = space.names, space.sizes
        self.spent = 0
        self.noise = Noise(space.n)
        self.basis: dict[str, Any] | None = None
        """How large the Krylov basis was and where, for the provenance."""
        self._squares: list[float] = []
        self._bar = bar
        self._budget = budget
        self._adaptive = adaptive

    @property
    def left(self) -> int:
        """Products that the budget still holds."""
        return self._budget - self.spent

    @property
    def floor(self) -> float:
        """What the noise can move the diagonal by: its share of ‖H‖_F as the probes have it."""
        if not self._squares:
            return math.nan
        return self.noise.relative * math.sqrt(float(np.mean(self._squares)))

    def apply(self, vector: Tensor) -> Tensor:
        """One product, counted."""
        product = self.operator.apply(vector)
        self._count(1)
        self.noise.watch(self.space, vector, product)
        if len(self._squares) < _MIN_BASIS:
            share = self.space.norm(product) / self.space.norm(vector)
            self._squares.append(self.space.n * share**2)
        return product

    def tell(self, error: float) -> None:
        """Show how large the relative error is."""
        self._bar.tell(f"relative error {error:.1g}")

    def exactly(self) -> _Trial:
        """All entries, from products with blocks of the n unit vectors."""
        n = self.space.n
        self._bar.expect(self.spent + n)
        found = self.space.zeros()
        block = max(1, min(64, _BLOCK_ENTRIES // n))
        for start in range(0, n, block):
            stop = min(start + block, n)
            units = torch.stack([self.space.unit(i) for i in range(start, stop)])
            # Of each product the one entry that is on the diagonal.
            found += (units * self.operator.apply(units.T).T).sum(dim=0)
            self._count(stop - start)
        return _Trial(self, "n unit vectors", offset=found, exact=True)

    def by_xdiag(self) -> _Trial:
        """Random vectors for the sketch until the tolerance is met."""
        # A byte for the sign of each entry beside two vectors.
        fit = self.space.affordable() * 4 // 9
        sketch = _Sketch(self, max(2, min(self.left // 2, self.space.n, fit)))
        check = _MIN_SKETCH if self._adaptive else self.left // 2
        while True:
            try:
                sketch.grow()
            except Stopped:
                if sketch.count < 2:
                    raise
                return sketch.trial()
            finished = sketch.full or sketch.spans or self.left < 2
            if sketch.count < check and not finished:
                continue
            trial = sketch.trial()
            if finished or (self._adaptive and trial.met()):
                return trial
            if self._adaptive and self.space.n / 2 <= self.spent <= self.left - self.space.n:
                return unless_stopped(self.exactly) or trial
            check = sketch.count * 5 // 4

    def by_probes(self, known: list[_Known], *, build: bool) -> _Trial:
        """Random signs until the tolerance is met; a Krylov basis on the way where that pays."""
        trial = self._taking_out(known, f"{len(known[0].rows)} eigenpairs" if known else "")
        first: list[tuple[Tensor, Tensor]] = []
        build = build and self._adaptive
        snapshots: Snapshots | None = None
        while self.left > 0:
            if self._adaptive and trial.samples.count >= _MIN_PROBES:
                if trial.met():
                    break
                if build:
                    trial, build = self._with_basis(trial, known, first), False
                    first.clear()
                    continue
                come = trial.probes_to_come()
                self._bar.expect(self.spent + come)
                if come > self.space.n <= self.left:
                    return unless_stopped(self.exactly) or trial
            if snapshots is None and not build and self.noise.settled:
                state = functools.partial(self._state, trial.samples)
                restore = functools.partial(self._restore, trial.samples)
                snapshots = Snapshots("diagonal probes", state, restore)
                continue
            signs = _signs(self.space, self.generator)
            vector = signs.to(self.space.dtype)
            try:
                product = self.apply(vector)
            except Stopped:
                if trial.samples.count < 2:
                    raise
                break
            if build:
                first.append((signs, product.clone()))
            trial.add_probe(vector, product)
            if snapshots is not None:
                snapshots.round()
        return trial

    def _state(self, samples: _Samples) -> dict[str, Any]:
        """What goes on from here: the samples, the random numbers and what has been spent."""
        return {
            "samples": samples.state(),
            "generator": self.generator.get_state(),
            "spent": self.spent,
            "noise": self.noise.state,
            "squares": self._squares,
        }

    def _restore(self, samples: _Samples, known: dict[str, Any]) -> None:
        samples.restore(known["samples"])
        self.generator.set_state(known["generator"])
        self._count(known["spent"] - self.spent)
        self.noise.state = known["noise"]
        self._squares = known["squares"]

    def _with_basis(
        self, trial: _Trial, known: list[_Known], first: list[tuple[Tensor, Tensor]]
    ) -> _Trial:
        """The first probes with a Krylov space taken out of their products, if that is better.

        The basis has paid when it has as many vectors as there are probes to come. It takes at most
        half of what the plain probes would, and half of the budget: where it is no help, as on a
        matrix that is nearly diagonal, not much is lost.
        """
        n = self.space.n
        capacity = min(trial.probes_to_come() / 2, self.left // 2)
        if n <= self.left:
            # The n unit vectors would do, and must remain possible.
            capacity = min(capacity, n // 2, self.left - n)
        capacity = min(capacity, n - sum(len(part.rows) for part in known))
        place, fitting = self.space.place(int(capacity), int(capacity) // 2, spare=2 * len(first))
        if fitting < _MIN_BASIS:
            return trial
        # From a random direction of its own, so that it is independent of the first probes.
        outside = known[0].rows if known else None
        krylov = Krylov(self.operator, fitting, self.generator, complement_of=outside, place=place)
        self.basis = self.space.describe_basis(krylov.rows)
        best, check = trial, _MIN_BASIS
        while not krylov.full:
            try:
                krylov.step()
            except Stopped:
                break
            self._count(1)
            if krylov.size < check and not krylov.full:
                continue
            check = max(krylov.size + 5, krylov.size * 5 // 4)
            core = krylov.projection[: krylov.size, : krylov.size]
            part = _Known(self.space, krylov.basis, core)
            attempt = self._taking_out([*known, part], f"{krylov.size} Krylov vectors")
            for signs, product in first:
                attempt.add_probe(signs.to(self.space.dtype), product.clone())
            if attempt.samples.error() < best.samples.error():
                best = attempt
            if krylov.size >= attempt.probes_to_come():
                break
        return best

    def _taking_out(self, known: list[_Known], name: str) -> _Trial:
        offset = self.space.zeros()
        for part in known:
            part.add_diagonal(offset)
        method = f"Hutchinson, {name} taken out" if known else "Hutchinson"
        return _Trial(self, method, known, offset)

    def _count(self, products: int) -> None:
        self.spent += products
        self._bar.update(products)
