"""What is the curvature at one step of a training run? The questions that are asked there."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from spectra.algorithms.eigen import Eigenpairs, Which, check_eigsh_arguments, eigsh
from spectra.algorithms.resuming import resumable
from spectra.algorithms.trace import trace
from spectra.analysis.trajectory import Measurement
from spectra.errors import ArgumentError, ArgumentTypeError
from spectra.journal import Stopped, stopped
from spectra.objective.vectors import VectorSpace
from spectra.operators.base import SymmetricOperator, as_operator
from spectra.operators.hessian import HessianOperator
from spectra.operators.optimizers import has_metric, stability_threshold
from spectra.operators.transforms import preconditioned
from spectra.results import Result, versions

__all__ = ["Record", "check_record", "measure"]

Record = Literal["gradient", "rotation", "trace", "preconditioned"]

# Of the trace: at training time its trend matters, and 5 % would cost four times as much.
_TRACE_RTOL, _TRACE_MATVECS = 0.1, 100


@resumable
def measure(
    H: Any,
    step: int,
    *,
    k: int = 1,
    which: Which = "LA",
    tol: float = 1e-2,
    record: Collection[Record] = ("gradient", "rotation"),
    optimizer: Optimizer | None = None,
    batch: SymmetricOperator | None = None,
    previous: Measurement | None = None,
    warm: bool = True,
    certify: bool = True,
    label: str = "",
    seed: int = 0,
    checkpoint: str | Path | None = None,
) -> Measurement:
    """Measure the curvature once, as one row of a `Trajectory`.

    Parameters
    ----------
    H
        The operator at the present weights.
    step, label
        Where in the training run this is.
    k, which, tol
        Which eigenvalues, as for `eigsh`.
    record
        What else: "gradient" (loss, norm, share in the top subspace: one gradient, nothing where
        graphs are kept), "rotation" (overlap with `previous`: no product), "trace" (to 10 %, at
        most 100 products, the eigenpairs deflated), "preconditioned" (the sharpness in the
        optimiser's metric: another search).
    optimizer
        Whose learning rate and stability threshold are noted.
    batch
        The operator of the current batch, whose sharpness is measured too.
    previous
        The measurement before, with its vectors.
    warm
        Start the search from the vectors of `previous` and a random direction, instead of that
        alone. The random one sees to it that an eigenvalue is found that has overtaken the others.
    certify
        Search for missed eigenvalues, see `eigsh`. Takes 5 to 12 products.
    seed
        Of the random directions.
    checkpoint
        See docs/resuming.md.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        An impossible argument; a preconditioned sharpness without an optimiser.
    NonFiniteError, LossError
        As the products raise them.
    """
    try:
        return _measured(
            as_operator(H),
            step,
            k=k,
            which=which,
            tol=tol,
            record=record,
            optimizer=optimizer,
            batch=batch,
            previous=previous,
            warm=warm,
            certify=certify,
            label=label,
            seed=seed,
        )
    except Stopped as error:
        # Half a measurement is none: what eigenpairs there were are not one.
        error.partial = None
        raise


def _measured(
    operator: SymmetricOperator,
    step: int,
    *,
    k: int,
    which: Which,
    tol: float,
    record: Collection[Record],
    optimizer: Optimizer | None,
    batch: SymmetricOperator | None,
    previous: Measurement | None,
    warm: bool,
    certify: bool,
    label: str,
    seed: int,
) -> Measurement:
    started = time.perf_counter()
    check_eigsh_arguments(operator.space.n, k, which, None, tol)
    check_record(record, optimizer)
    spent: dict[str, int] = {}
    found: dict[str, Any] = {}
    notes: list[str] = []
    start = None
    if warm and previous is not None:
        start = _start(previous.vectors, operator, seed, step)
    with _counted(operator, spent, "eigenpairs"):
        pairs = eigsh(
            operator,
            k,
            which=which,
            tol=tol,
            v0=start,
            certify=certify,
            seed=seed,
            progress=False,
        )
    _go_on(pairs)
    notes += pairs.notes
    top, angle = _top(pairs)
    if "gradient" in record:
        found |= _gradient(operator, top, angle)
    if "rotation" in record and previous is not None:
        found |= _rotation(operator.space, previous, top, angle)
    if "trace" in record:
        with _counted(operator, spent, "trace"):
            estimate = trace(
                operator,
                rtol=_TRACE_RTOL,
                deflate=pairs,
                max_matvecs=_TRACE_MATVECS,
                seed=seed,
                progress=False,
            )
        _go_on(estimate)
        found |= {
            "trace": estimate.value,
            "trace_error": estimate.standard_error,
            "trace_converged": estimate.converged,
        }
        notes += [f"trace: {note}" for note in estimate.notes]
    if optimizer is not None:
        found |= _threshold(optimizer, notes)
    options: dict[str, Any] = {"tol": tol, "certify": certify, "seed": seed}
    if "preconditioned" in record:
        assert optimizer is not None
        if has_metric(optimizer):
            rescaled = preconditioned(operator, optimizer)
            found |= _sharpness(rescaled, "preconditioned", spent, notes, options)
        else:
            notes.append("the optimiser has taken no step, so that there is no preconditioner yet")
    if batch is not None:
        options["v0"] = _start(top, batch, seed, step) if warm else None
        found |= _sharpness(batch, "batch", spent, notes, options)
    return Measurement(
        step=step,
        label=label,
        which=which,
        eigenvalues=tuple(pairs.values.tolist()),
        residuals=tuple(pairs.residuals.tolist()),
        converged=tuple(pairs.converged.tolist()),
        certified=pairs.certified,
        subspace_error=angle,
        vectors=top,
        matvecs=spent,
        seconds=time.perf_counter() - started,
        notes=tuple(dict.fromkeys(notes)),
        provenance={
            "operator": operator.describe(),
            "options": {
                "k": k,
                "which": which,
                "tol": tol,
                "record": sorted(record),
                "certify": certify,
                "warm": warm,
            },
            "seed": seed,
            "versions": versions(),
        },
        **found,
    )


def check_record(record: Collection[str], optimizer: Optimizer | None) -> None:
    """Refuse to record what there is not, before any product.

    Raises
    ------
    ArgumentError
    """
    known = get_args(Record)
    expected = f"expected a list with any of {', '.join(map(repr, known))}"
    if isinstance(record, str):
        msg = f"record={record!r} is a string; {expected}"
        raise ArgumentError(msg)
    names = list(record)
    if odd := [name for name in names if name not in known]:
        msg = f"record has {odd[0]!r}; {expected}"
        raise ArgumentError(msg)
    if "preconditioned" in names and optimizer is None:
        msg = "the preconditioned sharpness is that of an optimiser; pass optimizer="
        raise ArgumentError(msg)


def _start(
    vectors: Tensor | None, operator: SymmetricOperator, seed: int, step: int
) -> Tensor | None:
    """Earlier vectors and a random one as columns, whose sum is where a search starts."""
    space = operator.space
    if vectors is None or not vectors.shape[1] or len(vectors) != space.length:
        return None
    state = np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(state[0]) >> 1)
    random = space.drawn(lambda count: torch.randn(count, generator=generator, dtype=vectors.dtype))
    return torch.cat([vectors, random.to(vectors)[:, None]], dim=1)


def _go_on(result: Result) -> None:
    """Where the run was asked to stop, it ends here: a trace of fewer probes is none."""
    if result.partial or stopped():
        raise Stopped


@contextmanager
def _counted(operator: SymmetricOperator, spent: dict[str, int], name: str) -> Iterator[None]:
    before = operator.matvecs
    yield
    spent[name] = operator.matvecs - before


def _top(pairs: Eigenpairs) -> tuple[Tensor, float]:
    """The eigenvectors of the upper end (of both, for "LM"), and the sine of their angle."""
    count = {"SA": 0, "BE": len(pairs) - len(pairs) // 2}.get(pairs.which, len(pairs))
    # A copy: of a search's basis nothing else shall stay. Laid out as one that was saved and loaded
    # is, or sums over it would be rounded in another order.
    found = torch.as_tensor(pairs.vectors)[:, :count]
    vectors = found.clone(memory_format=torch.contiguous_format)
    if not count or count == len(vectors):
        return vectors, 0.0 if count else math.nan
    inner, bounds = float(pairs.values[count - 1]), [pairs.no_eigenvalue_above]
    if pairs.which == "LM":
        inner = float(np.abs(pairs.values).min())
        below = pairs.no_eigenvalue_below
        bounds.append(None if below is None else -below)
    known = [bound for bound in bounds if bound is not None]
    if len(known) < len(bounds):
        return vectors, math.nan
    gap, residual = inner - max(known), float(np.linalg.norm(pairs.residuals[:count]))
    return vectors, min(residual / gap, 1.0) if gap > 0 else 1.0


def _gradient(operator: SymmetricOperator, top: Tensor, angle: float) -> dict[str, float]:
    """Loss, norm of the gradient, and its share in the top subspace."""
    if not isinstance(operator, HessianOperator):
        msg = (
            f"a {type(operator).__name__} has no gradient; leave 'gradient' out of record, or pass "
            "a HessianOperator"
        )
        raise ArgumentTypeError(msg)
    loss, gradient = operator.value_and_gradient()
    norm = operator.space.norm(gradient)
    found = {"loss": loss, "gradient_norm": norm}
    if norm > 0 and top.shape[1]:
        inside = sum(operator.space.inner(column, gradient) ** 2 for column in top.T)
        found |= {"alignment": inside / norm**2, "alignment_error": angle}
    return found


def _rotation(
    space: VectorSpace, previous: Measurement, top: Tensor, angle: float
) -> dict[str, float]:
    """The share of the top subspace that is in the previous one."""
    if previous.vectors is None or not top.shape[1]:
        return {}
    before = previous.vectors.to(top)
    if before.shape != top.shape:
        msg = (
            f"the top subspace before has shape {tuple(before.shape)}, this one "
            f"{tuple(top.shape)}; compare measurements of the same parameters, k and which"
        )
        raise ArgumentError(msg)
    inside = sum(space.inner(a, b) ** 2 for a in before.T for b in top.T)
    return {
        "overlap": inside / top.shape[1],
        "overlap_error": min(angle + previous.subspace_error, 1.0),
    }


def _threshold(optimizer: Optimizer, notes: list[str]) -> dict[str, Any]:
    threshold = stability_threshold(optimizer)
    notes += [f"threshold: {note}" for note in threshold.notes]
    return {
        "learning_rate": max(float(group["lr"]) for group in optimizer.param_groups),
        "threshold": threshold.value,
        "threshold_formula": threshold.formula,
        "threshold_preconditioned": threshold.preconditioned,
    }


def _sharpness(
    operator: SymmetricOperator,
    name: str,
    spent: dict[str, int],
    notes: list[str],
    options: dict[str, Any],
) -> dict[str, Any]:
    """The largest eigenvalue of another operator, under its name."""
    with _counted(operator, spent, name):
        pairs = eigsh(operator, 1, which="LA", progress=False, **options)
    _go_on(pairs)
    notes += [f"{name}: {note}" for note in pairs.notes if note not in notes]
    return {
        f"{name}_sharpness": float(pairs.values[0]),
        f"{name}_residual": float(pairs.residuals[0]),
        f"{name}_converged": bool(pairs.converged[0]),
    }
