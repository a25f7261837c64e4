"""What does the loss look like along eigenvectors? True values beside the quadratic model."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spectra.algorithms.eigen import Eigenpairs, eigsh
from spectra.algorithms.progress import progress_bar
from spectra.algorithms.resuming import resumable
from spectra.analysis.differences import size
from spectra.errors import ArgumentError, ArgumentTypeError, LossError, NonFiniteError
from spectra.journal import remember, stop_if_asked, unless_stopped
from spectra.operators.base import as_operator
from spectra.operators.hessian import HessianOperator
from spectra.operators.transforms import refuse_scaled
from spectra.results import Result, versions

__all__ = ["SLICES", "Landscape", "along_eigenvectors", "landscape"]

# By how much of itself, and at least of one, the loss changes at the end of the default span.
_RISE = 0.5
# Points along one direction, and on each side of a plane.
_LINE, _SIDE = 41, 21
# Of an analysis: eigenvectors at most, and points along each.
SLICES = (3, 21)


@dataclass(frozen=True, eq=False)
class Landscape(Result):
    """The loss along directions, or over the plane of two of them.

    Attributes
    ----------
    displacements
        (points,) ‖θ − θ₀‖ with its sign along each direction, in the parameters' own metric. For a
        plane along both.
    values
        (directions, points) the loss; for a plane (points, points), first direction first. nan
        where it cannot be evaluated, or was not.
    value
        L(θ₀).
    slopes, curvatures
        (directions,) gᵀv and (directions, directions) vᵀHw, exact to rounding; in an analysis the
        curvatures are the eigenvalues, exact to their residuals.
    plane
        The values are those over a plane.
    weights_norm
        ‖θ₀‖, of the analysed parameters.
    failures
        What was wrong at points without a value, in words, each once.
    labels
        What the directions are.
    evaluations, matvecs
        Passes over the data without a derivative, and products.
    """

    displacements: np.ndarray
    values: np.ndarray
    value: float
    slopes: np.ndarray
    curvatures: np.ndarray
    plane: bool
    weights_norm: float
    failures: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    evaluations: int = 0
    matvecs: int = 0
    notes: tuple[str, ...] = ()

    @property
    def predictions(self) -> np.ndarray:
        """Of the shape of `values`: L(θ₀) + α gᵀv + ½ α² vᵀHv, the quadratic model."""
        a = self.displacements
        if not self.plane:
            h = np.diag(self.curvatures)[:, None]
            lines: np.ndarray = self.value + self.slopes[:, None] * a + 0.5 * h * a**2
            return lines
        x, y = np.meshgrid(a, a, indexing="ij")
        h = self.curvatures
        bent = 0.5 * (h[0, 0] * x**2 + 2 * h[0, 1] * x * y + h[1, 1] * y**2)
        surface: np.ndarray = self.value + self.slopes[0] * x + self.slopes[1] * y + bent
        return surface

    def __str__(self) -> str:
        span = (float(self.displacements[0]), float(self.displacements[-1]))
        kind = "over a plane" if self.plane else f"along {len(self.slopes)} directions"
        share = f", {span[1] / self.weights_norm:.2g} of ‖θ‖" if self.weights_norm else ""
        lines = [
            f"loss {kind}: {self.value:.6g} at θ, displacements {span[0]:.3g} to {span[1]:.3g}"
            f"{share} ({self.evaluations} evaluations, {self.matvecs} matvecs)",
            "      slope     curvature   lowest        at   largest deviation from the quadratic",
        ]
        for i, label in enumerate(self.labels):
            row = self.values if self.plane else self.values[i]
            gap = np.abs(row - (self.predictions if self.plane else self.predictions[i]))
            known = np.isfinite(row)
            numbers = "  nothing could be evaluated"
            if known.any():
                place = np.unravel_index(np.nanargmin(row), row.shape)
                at = float(self.displacements[place[min(i, len(place) - 1)]])
                numbers = f"  {np.nanmin(row):9.4g}  {at:8.3g}   {np.nanmax(gap):.3g}"
            lines.append(f"{self.slopes[i]:11.3g}  {self.curvatures[i, i]:12.4g}{numbers}  {label}")
        lines += [f"note: {failure}" for failure in self.failures]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


@resumable
def landscape(
    H: HessianOperator,
    directions: Eigenpairs | Tensor | np.ndarray | None = None,
    *,
    k: int = 1,
    plane: bool = False,
    span: float | None = None,
    points: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
    checkpoint: str | Path | None = None,
) -> Landscape:
    """The loss along directions, or over the plane of two, beside its quadratic model.

    Displacements are Euclidean lengths ‖θ − θ₀‖, and directions have length one. They are not
    rescaled filter by filter (Li et al., 2018, "Visualizing the loss landscape of neural nets"):
    that makes networks of different scales comparable, but the curvature along a rescaled direction
    is no longer the eigenvalue, which is what the picture is to show. The weights are not written
    to, and are as they were to the last bit.

    Parameters
    ----------
    H
        A `HessianOperator`, which knows the loss beside θ.
    directions
        Eigenpairs of H; or (n, k) vectors as columns, made orthonormal for a plane, and of length
        one otherwise. None: the eigenvectors of the k largest eigenvalues in magnitude.
    k
        How many eigenvectors are computed where no directions are given. 2 for a plane.
    plane
        The loss over the plane of the first two directions, instead of along each.
    span
        The largest displacement. By default that at which the quadratic model along the first
        direction has changed the loss by half of itself, or by one half where the loss is below
        one; the slope is left out of that.
    points
        Along a direction, the middle one is θ₀: odd, at least 3. Default 41; 21 for a plane, which
        has so many squared.
    seed
        Of the eigenvectors' search.
    progress
        Show a progress bar; None for on a terminal only.
    checkpoint
        See docs/resuming.md. Every point is recorded.

    Returns
    -------
    Landscape
        A point at which the loss is nan or cannot be evaluated is nan, and `failures` say why.
        Costs one evaluation of the loss (a third of a gradient) per point, one matvec per
        direction, and a gradient; and the search where no directions are given.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        No Hessian of a loss; directions of another shape, or of length zero; an even number of
        points.

    Notes
    -----
    Whatever exception ends the evaluation of the points, Ctrl-C included, has an attribute
    `partial`: the Landscape as it stood, nan where no point was evaluated yet.
    """
    operator = as_operator(H)
    if not isinstance(operator, HessianOperator):
        msg = (
            f"a {type(operator).__name__} has no loss to evaluate beside θ; pass the "
            "HessianOperator that it was made from, and directions= for other vectors"
        )
        raise ArgumentTypeError(msg)
    points = (_SIDE if plane else _LINE) if points is None else points
    _check(points, span, k)
    begun = operator.matvecs
    if directions is None:
        count = max(k, 2) if plane else k
        directions = eigsh(operator, min(count, operator.space.n), seed=seed, progress=progress)
    rows, labels = _rows(operator, directions, plane=plane)
    value, gradient = operator.value_and_gradient()
    space = operator.space
    products = operator.apply(rows.T).T
    slopes = np.array([space.inner(gradient, row) for row in rows])
    curvatures = np.array([[space.inner(v, hw) for hw in products] for v in rows])
    return _evaluated(
        operator,
        rows,
        labels,
        value=value,
        slopes=slopes,
        curvatures=(curvatures + curvatures.T) / 2,
        plane=plane,
        span=span,
        points=points,
        begun=begun,
        progress=progress,
        provenance={"seed": seed},
    )


def along_eigenvectors(
    operator: HessianOperator, pairs: Eigenpairs, *, progress: bool | None = None
) -> Landscape:
    """The loss along the eigenvectors of largest |λ|, of which vᵀHv is known to be λ.

    Costs `SLICES` evaluations, one gradient, and no product.
    """
    count, points = SLICES
    shown = np.argsort(-np.abs(pairs.values), kind="stable")[:count]
    # Only these: all vectors may be as many as the memory holds.
    few = dataclasses.replace(
        pairs, values=pairs.values[shown], vectors=pairs.vectors[:, shown.tolist()]
    )
    rows, labels = _rows(operator, few, plane=False)

    def found() -> tuple[float, np.ndarray]:
        value, gradient = operator.value_and_gradient()
        return value, np.array([operator.space.inner(gradient, row) for row in rows])

    value, slopes = remember("slopes", found)
    return _evaluated(
        operator,
        rows,
        labels,
        value=value,
        slopes=slopes,
        curvatures=np.diag(few.values),
        plane=False,
        span=None,
        points=points,
        begun=operator.matvecs,
        progress=progress,
        provenance={},
    )


def _evaluated(
    operator: HessianOperator,
    rows: Tensor,
    labels: tuple[str, ...],
    *,
    value: float,
    slopes: np.ndarray,
    curvatures: np.ndarray,
    plane: bool,
    span: float | None,
    points: int,
    begun: int,
    progress: bool | None,
    provenance: dict[str, Any],
) -> Landscape:
    """The loss at all points, or at those that there was time for."""
    notes: list[str] = []
    if span is None:
        span = _default_span(value, float(curvatures[0, 0]), notes)
    steps = np.linspace(-span, span, points)
    # Exactly θ₀, whatever linspace rounds to.
    steps[points // 2] = 0.0
    grid = [(i, j) for i in range(points if plane else len(rows)) for j in range(points)]
    values = np.full((points if plane else len(rows), points), math.nan)
    failures: list[str] = []

    def evaluate() -> None:
        with progress_bar("landscape", len(grid), progress, unit="point") as bar:
            for i, j in grid:
                if plane:
                    displacement = float(steps[i]) * rows[0] + float(steps[j]) * rows[1]
                else:
                    displacement = float(steps[j]) * rows[i]
                point = functools.partial(_loss_at, operator, displacement)
                stop_if_asked()
                values[i, j], failure = remember("point", point)
                if failure and failure not in failures:
                    failures.append(failure)
                bar.update()

    def result(*more: str) -> Landscape:
        return Landscape(
            displacements=steps,
            values=values,
            value=value,
            slopes=slopes,
            curvatures=curvatures,
            plane=plane,
            weights_norm=size(operator),
            failures=tuple(failures),
            labels=labels,
            evaluations=int(np.isfinite(values).sum()),
            matvecs=operator.matvecs - begun,
            notes=(*notes, *more),
            provenance={
                "operator": operator.describe(),
                "span": span,
                "points": points,
                **provenance,
                "versions": versions(),
            },
        )

    try:
        unless_stopped(evaluate)
    except BaseException as error:
        with contextlib.suppress(AttributeError):
            note = "interrupted: points that were not evaluated are nan"
            error.partial = result(note)  # type: ignore[attr-defined]
        raise
    return result()


def _loss_at(operator: HessianOperator, displacement: Tensor) -> tuple[float, str]:
    """The loss beside θ, or nan and the reason why there is none."""
    try:
        return operator.value_at(displacement), ""
    except (LossError, NonFiniteError) as error:
        return math.nan, str(error)


def _rows(
    operator: HessianOperator, directions: Any, *, plane: bool
) -> tuple[Tensor, tuple[str, ...]]:
    """Directions as rows of length one, and what they are."""
    space, values = operator.space, None
    if isinstance(directions, Eigenpairs):
        refuse_scaled(directions, operator)
        values, directions = directions.values, directions.vectors
    given, directions = directions, _real_numbers(directions)
    n = space.length if isinstance(given, Tensor) else space.n
    columns = directions.unsqueeze(1) if directions.dim() == 1 else directions
    if columns.dim() != 2 or columns.shape[0] != n or columns.shape[1] < 1 + plane:
        msg = (
            f"directions have the shape {tuple(directions.shape)}; expected columns ({n}, "
            f"{'at least 2' if plane else 'k'}), or eigenpairs of this operator"
        )
        raise ArgumentError(msg)
    rows = columns.T[:2] if plane else columns.T
    rows = rows.to(operator.space.zeros()).clone()
    rows = rows if isinstance(given, Tensor) else space.own(rows)
    for i, row in enumerate(rows):
        _normalise(operator, row, f"direction {i} is of length zero, or not finite; give others")
    if plane:
        rows[1] -= operator.space.inner(rows[0], rows[1]) * rows[0]
        if operator.space.norm(rows[1]) < math.sqrt(operator.space.eps):
            msg = "direction 1 is that of the first, which makes no plane; give others"
            raise ArgumentError(msg)
        _normalise(operator, rows[1], "")
    if values is None:
        return rows, tuple(f"direction {i}" for i in range(len(rows)))
    return rows, tuple(f"eigenvector of {value:.4g}" for value in values[: len(rows)])


def _real_numbers(directions: Any) -> Tensor:
    """What is converted silently, or by an error of another library, is refused."""
    if isinstance(directions, Tensor):
        kind = f"{directions.dtype} on {directions.device}"
        if not (directions.is_complex() or directions.is_meta):
            return directions
    else:
        array = np.asarray(directions)
        kind = f"{type(directions).__name__} of {array.dtype}"
        if array.dtype.kind in "fiu":
            return torch.from_numpy(array.astype(np.float64))
    msg = f"directions is a {kind}; expected Eigenpairs, or a tensor or array of real numbers"
    raise ArgumentTypeError(msg)


def _normalise(operator: HessianOperator, row: Tensor, otherwise: str) -> None:
    length = operator.space.norm(row)
    if not (math.isfinite(length) and length > 0):
        raise ArgumentError(otherwise)
    row.div_(length)


def _default_span(value: float, curvature: float, notes: list[str]) -> float:
    rise = _RISE * max(abs(value), 1.0)
    if curvature == 0.0:
        notes.append("no curvature along the first direction: displacements up to 1; set span=")
        return 1.0
    return math.sqrt(2 * rise / abs(curvature))


def _check(points: Any, span: Any, k: Any) -> None:
    for name, number, least in (("points", points, 3), ("k", k, 1)):
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            msg = f"{name}={number!r}; expected a whole number of at least {least}"
            raise ArgumentError(msg)
    if points % 2 == 0:
        msg = f"points={points} is even; with an odd number the middle one is θ itself"
        raise ArgumentError(msg)
    if span is not None and not (
        isinstance(span, int | float)
        and not isinstance(span, bool)
        and math.isfinite(span)
        and span > 0
    ):
        msg = f"span={span!r}; expected the largest displacement, a positive number"
        raise ArgumentError(msg)
