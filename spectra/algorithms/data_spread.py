"""How much would other data of the same kind change the answer?

The Hessian of a finite set of data is itself an estimate, of the Hessian of the population the data
were drawn from. Each batch is one draw: the spread over the batches of vᵀ H_g v along a fixed
eigenvector v tells, to first order, the sampling error of its eigenvalue. That has nothing to do
with the error of the solver, which knows the Hessian of the given data as well as one likes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy import special

from spectra.algorithms import probes as random_probes
from spectra.algorithms.eigen import Eigenpairs
from spectra.algorithms.estimate import check_confidence
from spectra.errors import ArgumentError, ArgumentTypeError
from spectra.operators.hessian import HessianOperator
from spectra.results import Result, versions

__all__ = ["DataSpread", "data_spread"]

# With fewer batches Student's interval is wide, and its normality is taken on trust.
_FEW = 10


@dataclass(frozen=True, eq=False)
class DataSpread(Result):
    """Sampling error of eigenvalues and trace: how far those of the population may be.

    Attributes
    ----------
    values
        (k,) eigenvalues of the given data, as they were passed.
    standard_errors
        (k,) of each as an estimate of the population's eigenvalue.
    trace, trace_standard_error
        The trace of the given data over the same probes for all batches, and its standard error as
        an estimate of the population's; nan without probes.
    batches
        Number of independent parts of the data.
    confidence
        Of `intervals`.
    matvecs, notes
        Cost, and what to know before believing it.
    """

    values: np.ndarray
    standard_errors: np.ndarray
    trace: float
    trace_standard_error: float
    batches: int
    confidence: float = 0.95
    matvecs: int = 0
    notes: tuple[str, ...] = ()

    @property
    def intervals(self) -> np.ndarray:
        """(k, 2) Student's intervals for the eigenvalues of the population."""
        half = self._quantile() * self.standard_errors
        return np.stack([self.values - half, self.values + half], axis=1)

    @property
    def trace_interval(self) -> tuple[float, float]:
        """Student's interval for the trace of the population; (nan, nan) without probes."""
        half = self._quantile() * self.trace_standard_error
        return (self.trace - half, self.trace + half)

    def _quantile(self) -> float:
        return float(special.stdtrit(self.batches - 1, 0.5 + self.confidence / 2))

    def __str__(self) -> str:
        lines = [
            f"sampling error over {self.batches} batches ({self.matvecs} matvecs): eigenvalues of "
            "the population",
            f"        eigenvalue    {self.confidence:.0%} interval",
        ]
        for i, (value, (low, high)) in enumerate(
            zip(self.values, self.intervals, strict=True), start=1
        ):
            lines.append(f"{i:4d}  {value:12.6g}    [{low:.5g}, {high:.5g}]")
        if not math.isnan(self.trace):
            low, high = self.trace_interval
            lines.append(f"trace {self.trace:12.6g}    [{low:.5g}, {high:.5g}]")
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def data_spread(
    H: HessianOperator,
    pairs: Eigenpairs | None = None,
    *,
    probes: int = 0,
    confidence: float = 0.95,
    seed: int = 0,
) -> DataSpread:
    """The sampling error of eigenvalues and trace, from their spread over the batches.

    Parameters
    ----------
    H
        The Hessian of a model over data in at least two batches, drawn independently (shuffled):
        smaller batches tell more.
    pairs
        Eigenpairs of H, from `eigsh`.
    probes
        Random vectors for the trace, beside the eigenvectors; 0 leaves it out.
    confidence
        Of the intervals.
    seed
        Of the probes.

    Returns
    -------
    DataSpread

    Raises
    ------
    ArgumentError, ArgumentTypeError
        Neither pairs nor probes, eigenpairs of another operator, no Hessian over batches, or only
        one of them.

    Notes
    -----
    Costs one matvec per eigenpair and probe. To first order an eigenvalue of the population is that
    of the data plus vᵀ(H_population − H_data)v, a mean over independent batches (delta method).
    In simulations with 20 batches nominal 95 % intervals covered 88 to 100 %. What the first order
    leaves out is a bias: the largest eigenvalue of few data lies above that of the population. The
    trace has none; but its spread contains a little of the probes' randomness.

    References
    ----------
    Granziol, Zohren and Roberts, 2022, "Learning rates as a function of batch size: a random matrix
    theory approach to neural network training" (few data inflate the extremes).
    """
    if not isinstance(H, HessianOperator):
        msg = (
            f"data_spread takes a HessianOperator over batches of data, got a {type(H).__name__}: "
            "a matrix has no batches"
        )
        raise ArgumentTypeError(msg)
    check_confidence(confidence)
    if isinstance(probes, bool) or not isinstance(probes, int | np.integer) or probes < 0:
        msg = f"probes={probes!r}; expected a number of random vectors, 0 for none"
        raise ArgumentError(msg)
    if pairs is None and probes == 0:
        msg = "nothing to find the error of: pass pairs=spectra.eigsh(H), or probes for the trace"
        raise ArgumentError(msg)
    space, before = H.space, H.matvecs
    rows = space.empty(0)
    values = np.zeros(0)
    if pairs is not None:
        deflation = random_probes.Deflation(H, pairs)
        rows, values = deflation.basis, deflation.values
    generator = random_probes.seeded(seed)
    known, remaining = len(rows), space.n - len(rows)
    random = [
        random_probes.sphere(space, generator, rows if known else None).mul_(math.sqrt(remaining))
        for _ in range(probes if remaining else 0)
    ]
    directions = torch.cat([space.local(rows), *(vector.unsqueeze(0) for vector in random)])
    weights, forms = H.quadratic_forms(directions.T)
    if len(weights) < 2:
        msg = (
            "the data are one batch, which has no spread; pass them in smaller ones, at least 2 "
            f"and better {_FEW} or more (microbatch=, or the loader's batch_size)"
        )
        raise ArgumentError(msg)
    trace = trace_error = math.nan
    if probes:
        sums = forms[:, :known].sum(axis=1)
        sums += forms[:, known:].mean(axis=1) if remaining else 0.0
        trace, trace_error = _mean_and_error(H, weights, sums)
    errors = [_mean_and_error(H, weights, forms[:, i])[1] for i in range(known)]
    notes = []
    if len(weights) < _FEW:
        notes.append(
            f"{len(weights)} batches tell little about their own spread; smaller batches tell more"
        )
    return DataSpread(
        values=values,
        standard_errors=np.array(errors),
        trace=trace,
        trace_standard_error=trace_error,
        batches=len(weights),
        confidence=confidence,
        matvecs=H.matvecs - before,
        notes=tuple(notes),
        provenance={
            "operator": H.describe(),
            "options": {"probes": probes, "confidence": confidence},
            "seed": seed,
            "versions": versions(),
        },
    )


def _mean_and_error(
    H: HessianOperator, weights: np.ndarray, forms: np.ndarray
) -> tuple[float, float]:
    """The form of the whole objective, and its standard error over the batches (g,)."""
    count = len(weights)
    normaliser = H.objective.normaliser(float(weights.sum()))
    shares = weights * forms / normaliser
    value = float(shares.sum())
    # Of a weighted mean what spreads is the deviation of each batch from it, weights being random
    # themselves; of a sum it is the terms.
    mean = H.objective.describe().get("reduction") != "sum"
    deviations = weights * (forms - value) / normaliser if mean else shares - shares.mean()
    return value, math.sqrt(count / (count - 1) * float((deviations**2).sum()))
