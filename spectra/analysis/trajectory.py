"""How did the curvature change over the steps of a training run, and how sure is each number?"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from spectra.errors import ArgumentError
from spectra.results import Result

__all__ = ["Measurement", "Trajectory", "shared_notes"]

_WIDTH = 80


@dataclass(frozen=True, eq=False)
class Measurement(Result):
    """What was measured at one step; nan, None or empty where it was not.

    Attributes
    ----------
    step
        Of the training run.
    label
        Whatever else tells where: a checkpoint's name.
    which, eigenvalues, residuals, converged
        As of `Eigenpairs`: extreme eigenvalues in descending order, their measured residuals
        ‖Hx − λx‖, and whether these are within the tolerance.
    certified
        Whether a search for missed eigenvalues left no room for one; false where there was none.
    loss, gradient_norm
        Of the objective that the operator is of, right to rounding.
    alignment
        Share of ‖gradient‖² in the top subspace: the eigenvectors of the upper end, for "LM" all.
    overlap
        Share of the top subspace that is in that of the measurement before: ‖V′ᵀV‖²_F / k. One less
        it is how much rotated out.
    subspace_error
        Bound on the sine of the angle between the top subspace and the one that was found: its
        residual over the gap to all other eigenvalues (Davis and Kahan, 1970, "The rotation of
        eigenvectors by a perturbation"). nan where no gap is known, which takes a certificate.
    alignment_error, overlap_error
        What follows for these two; nan where `subspace_error` is.
    trace, trace_error, trace_converged
        Estimate, standard error, and whether the tolerance was met.
    preconditioned_sharpness, preconditioned_residual, preconditioned_converged
        Largest eigenvalue of the Hessian in the optimiser's metric, with its residual.
    batch_sharpness, batch_residual, batch_converged
        Largest eigenvalue of the Hessian on the current batch alone, with its residual.
    learning_rate
        The largest of the optimiser's groups, at this step.
    threshold, threshold_formula, threshold_preconditioned
        See `stability_threshold`; whether it is for the preconditioned sharpness.
    matvecs
        Products of each question, by its name; those with the batch's Hessian are under "batch".
    seconds
        Taken by all of it.
    error
        Why there is nothing else: the measurement failed.
    notes
        What to know before believing the numbers.
    vectors
        (n, k) the top subspace as columns. A trajectory keeps those of its last measurement.
    """

    step: int
    label: str = ""
    which: str = "LA"
    eigenvalues: tuple[float, ...] = ()
    residuals: tuple[float, ...] = ()
    converged: tuple[bool, ...] = ()
    certified: bool = False
    loss: float = math.nan
    gradient_norm: float = math.nan
    alignment: float = math.nan
    alignment_error: float = math.nan
    overlap: float = math.nan
    overlap_error: float = math.nan
    subspace_error: float = math.nan
    trace: float = math.nan
    trace_error: float = math.nan
    trace_converged: bool | None = None
    preconditioned_sharpness: float = math.nan
    preconditioned_residual: float = math.nan
    preconditioned_converged: bool | None = None
    batch_sharpness: float = math.nan
    batch_residual: float = math.nan
    batch_converged: bool | None = None
    learning_rate: float = math.nan
    threshold: float = math.nan
    threshold_formula: str = ""
    threshold_preconditioned: bool | None = None
    matvecs: dict[str, int] = field(default_factory=dict)
    seconds: float = math.nan
    error: str = ""
    notes: tuple[str, ...] = ()
    vectors: Tensor | None = field(default=None, repr=False)

    @property
    def sharpness(self) -> float:
        """λ_max; nan where the end was not asked for, or "LM" found nothing positive."""
        return self._of_the_top(self.eigenvalues)

    @property
    def sharpness_residual(self) -> float:
        """There is an eigenvalue within sharpness ± this."""
        return self._of_the_top(self.residuals)

    @property
    def sharpness_converged(self) -> bool | None:
        """Whether the residual is within the tolerance; None where there is no sharpness."""
        return None if math.isnan(self.sharpness) else self.converged[0]

    def _of_the_top(self, numbers: tuple[float, ...]) -> float:
        known = self.which in {"LA", "BE"} or (
            self.which == "LM" and bool(self.eigenvalues) and self.eigenvalues[0] > 0
        )
        return numbers[0] if known and numbers else math.nan

    def row(self) -> dict[str, Any]:
        """Everything but the vectors as plain numbers and strings, for a line of a table or log."""
        plain = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in _NOT_IN_ROWS
        }
        tops = {
            name: getattr(self, name)
            for name in ("sharpness", "sharpness_residual", "sharpness_converged")
        }
        each = {
            f"{name}_{i}": value
            for name, values in (
                ("eigenvalue", self.eigenvalues),
                ("residual", self.residuals),
                ("converged", self.converged),
            )
            for i, value in enumerate(values, start=1)
        }
        spent = {f"matvecs_{name}": count for name, count in self.matvecs.items()}
        total = {"matvecs": sum(self.matvecs.values()), "notes": "; ".join(self.notes)}
        return {**plain, **tops, **each, **spent, **total}

    def __str__(self) -> str:
        return str(Trajectory((self,)))


_NOT_IN_ROWS = {
    *("eigenvalues", "residuals", "converged", "matvecs", "notes", "vectors"),
    *("provenance", "partial"),
}


@dataclass(frozen=True, eq=False)
class Trajectory(Result):
    """Measurements by step, in the order of the steps.

    It is a sequence of `Measurement`, and is never changed: `appended` returns a longer one.

    Attributes
    ----------
    measurements
        In strictly ascending order of `step`.
    notes
        What is to be known of all of them.
    """

    measurements: tuple[Measurement, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        steps = [m.step for m in self.measurements]
        for before, after in itertools.pairwise(steps):
            if after <= before:
                msg = (
                    f"step {after} was to follow step {before}; expected steps in ascending order, "
                    "each once"
                )
                raise ArgumentError(msg)

    def __len__(self) -> int:
        return len(self.measurements)

    def __iter__(self) -> Iterator[Measurement]:
        return iter(self.measurements)

    def __getitem__(self, place: int) -> Measurement:
        return self.measurements[place]

    def appended(self, measurement: Measurement) -> Trajectory:
        """A trajectory with one more measurement, of a later step.

        Only the last measurement keeps its vectors, and the first one's provenance stands
        for all.

        Raises
        ------
        ArgumentError
            The step is not later than the last one.
        """
        earlier = self.measurements
        if measurement.vectors is not None:
            earlier = tuple(
                m if m.vectors is None else dataclasses.replace(m, vectors=None) for m in earlier
            )
        return dataclasses.replace(
            self,
            measurements=(*earlier, dataclasses.replace(measurement, provenance={})),
            provenance=self.provenance or measurement.provenance,
        )

    @property
    def previous(self) -> Measurement | None:
        """The last measurement that found a top subspace, for the next one to be compared with."""
        found = (m for m in reversed(self.measurements) if m.vectors is not None)
        return next(found, None)

    def column(self, name: str) -> np.ndarray:
        """One number over the steps, as a float array: `trajectory.column("sharpness")`.

        nan where it was not measured.

        Raises
        ------
        ArgumentError
            There is no such number in any row.
        """
        rows = self.rows()
        known = {key for row in rows for key, value in row.items() if not isinstance(value, str)}
        if rows and name not in known:
            msg = f"no column {name!r}; expected one of {', '.join(sorted(known))}"
            raise ArgumentError(msg)
        cells = (row.get(name) for row in rows)
        return np.array([math.nan if cell is None else float(cell) for cell in cells])

    def rows(self) -> list[dict[str, Any]]:
        """A dict of plain numbers and strings for each measurement: `pandas.DataFrame(rows)`."""
        return [m.row() for m in self.measurements]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Heads and rows of the table that people read: numbers with their errors, as text.

        A column that no measurement has is left out; * is what did not converge.
        """
        columns = {"step": lambda m: str(m.step), "": lambda m: m.label, **_columns(self)}
        cells = {title: [cell(m) for m in self] for title, cell in columns.items()}
        full = {title: column for title, column in cells.items() if any(column)}
        return [*full], [list(row) for row in zip(*full.values(), strict=True)]

    def __str__(self) -> str:
        if not self.measurements:
            return "trajectory without a measurement"
        products = sum(sum(m.matvecs.values()) for m in self)
        seconds = sum(m.seconds for m in self if not math.isnan(m.seconds))
        first, last = self[0].step, self[-1].step
        count = "1 measurement" if len(self) == 1 else f"{len(self)} measurements"
        lines = [f"{count}, steps {first} to {last}: {products} matvecs, {seconds:.3g} s"]
        for block in _blocks(self):
            lines += ["", *block]
        if any(False in _verdicts(m) for m in self):
            lines.append("* not converged")
        lines += [f"step {m.step} failed: {m.error}" for m in self if m.error]
        if formulas := {m.threshold_formula for m in self if m.threshold_formula}:
            of = "preconditioned " if self._threshold_preconditioned else ""
            lines.append(f"threshold of the {of}sharpness: {' or '.join(sorted(formulas))}")
        lines += [f"note: {note}" for note in (*self.notes, *shared_notes(self))]
        return "\n".join(lines)

    @property
    def _threshold_preconditioned(self) -> bool:
        return any(m.threshold_preconditioned for m in self)


def _verdicts(m: Measurement) -> tuple[bool | None, ...]:
    return (
        *m.converged,
        m.trace_converged,
        m.preconditioned_converged,
        m.batch_converged,
    )


def shared_notes(trajectory: Trajectory) -> list[str]:
    """Each note once, with the steps it is of."""
    steps: dict[str, list[int]] = {}
    for m in trajectory:
        for note in m.notes:
            steps.setdefault(note, []).append(m.step)
    notes = []
    for note, where in steps.items():
        some = ", ".join(map(str, where[:3])) + (", …" if len(where) > 3 else "")
        of_all = len(where) == len(trajectory) > 1
        place = "" if of_all else f"step{'s' if len(where) > 1 else ''} {some}: "
        notes.append(place + note)
    return notes


# --- the table ------------------------------------------------------------------------------------


def _with_error(value: float, error: float, *, converged: bool | None) -> str:
    """A number with its error; the error unknown is a question mark."""
    if math.isnan(value):
        return ""
    doubt = "?" if math.isnan(error) else f"{error:.1g}"
    return f"{value:.5g} ± {doubt}{'*' if converged is False else ''}"


def _plain(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.5g}"


_COLUMNS: dict[str, Callable[[Measurement], str]] = {
    "loss": lambda m: _plain(m.loss),
    "sharpness": lambda m: _with_error(
        m.sharpness, m.sharpness_residual, converged=m.sharpness_converged
    ),
    "preconditioned": lambda m: _with_error(
        m.preconditioned_sharpness,
        m.preconditioned_residual,
        converged=m.preconditioned_converged,
    ),
    "threshold": lambda m: _plain(m.threshold),
    "matvecs": lambda m: str(sum(m.matvecs.values())) if m.matvecs else "",
    "learning rate": lambda m: _plain(m.learning_rate),
    "of the batch": lambda m: _with_error(
        m.batch_sharpness, m.batch_residual, converged=m.batch_converged
    ),
    "trace": lambda m: _with_error(m.trace, m.trace_error, converged=m.trace_converged),
    "|gradient|": lambda m: _plain(m.gradient_norm),
    "alignment": lambda m: _with_error(m.alignment, m.alignment_error, converged=None),
    "overlap": lambda m: _with_error(m.overlap, m.overlap_error, converged=None),
    "seconds": lambda m: "" if math.isnan(m.seconds) else f"{m.seconds:.2g}",
}


def _eigenvalue(place: int) -> Callable[[Measurement], str]:
    """The cell of one of several eigenvalues, counted from the top."""

    def cell(m: Measurement) -> str:
        if place >= len(m.eigenvalues):
            return ""
        value, residual = m.eigenvalues[place], m.residuals[place]
        return _with_error(value, residual, converged=m.converged[place])

    return cell


def _columns(trajectory: Trajectory) -> Mapping[str, Callable[[Measurement], str]]:
    """The known columns, and the eigenvalues that are not the sharpness."""
    columns = dict(_COLUMNS)
    most = max(len(m.eigenvalues) for m in trajectory)
    # The sharpness is the first one where there is one.
    first = 0 if all(math.isnan(m.sharpness) for m in trajectory) else 1
    columns |= {f"λ{place + 1}": _eigenvalue(place) for place in range(first, most)}
    return columns


def _blocks(trajectory: Trajectory) -> Iterator[list[str]]:
    """The table, in as many blocks beneath each other as 80 columns ask for."""
    steps = ["step", *(str(m.step) for m in trajectory)]
    if any(m.label for m in trajectory):
        names = ["", *(m.label for m in trajectory)]
        steps = [f"{a}  {_shortened(b)}".rstrip() for a, b in zip(steps, names, strict=True)]
    first = _justified(steps, left=any(m.label for m in trajectory))
    block, width = first, len(first[0])
    heads, rows = trajectory.table()
    for title, cells in zip(heads, zip(*rows, strict=True), strict=True):
        if title in {"step", ""}:
            continue
        column = _justified([title, *(text or "-" for text in cells)])
        if width + 2 + len(column[0]) > _WIDTH:
            yield block
            block, width = first, len(first[0])
        block = list(map("  ".join, zip(block, column, strict=True)))
        width += 2 + len(column[0])
    yield block


def _justified(cells: list[str], *, left: bool = False) -> list[str]:
    width = max(map(len, cells))
    pad = operator.methodcaller("ljust" if left else "rjust", width)
    return list(map(pad, cells))


def _shortened(label: str, most: int = 24) -> str:
    return label if len(label) <= most else "…" + label[-most + 1 :]
