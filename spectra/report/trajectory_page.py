"""How did the curvature change over a training? One page, against the threshold of stability."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from spectra.analysis.trajectory import Measurement, Trajectory, shared_notes
from spectra.errors import ArgumentTypeError
from spectra.report import readings
from spectra.report.pages import (
    Draw,
    Drawing,
    Sketch,
    Table,
    drawn,
    flattened,
    illustrated,
    write_page,
)

__all__ = ["of_trajectory", "write_trajectory_page"]

_CAPTIONS = {
    "trajectory": (
        "Sharpness",
        "The largest eigenvalue over the steps, with its residual as error bar (mostly smaller "
        "than the markers); hollow markers did not converge. Above the dashed threshold plain "
        "steps of this optimiser along that eigenvector grow, on a quadratic.",
    ),
}
_TABLE = (
    "A number stands beside its error: eigenvalues beside measured residuals, traces beside "
    "standard errors, ? where the error is not known; * did not reach its tolerance."
)


def write_trajectory_page(
    trajectory: Trajectory,
    path: str | Path,
    *,
    title: str | None = None,
    figures: Mapping[str, str | Path | Drawing] | None = None,
) -> Path:
    """Write a trajectory as one HTML page that needs no other file and no network.

    Parameters
    ----------
    trajectory
        From `spectra.track` or a `CurvatureMonitor`.
    path
        Of the page.
    title
        Heading; by default which model it is of.
    figures
        As of `write_report`.

    Returns
    -------
    Path
        Of the page.

    Raises
    ------
    ArgumentTypeError
        Not a Trajectory.
    ArgumentError
        A figure that is neither SVG nor PNG.
    StorageError
        A figure cannot be read, or the page not written.
    """
    if not isinstance(trajectory, Trajectory):
        kind = type(trajectory).__name__
        msg = f"expected a Trajectory, as spectra.track returns it, got a {kind}"
        raise ArgumentTypeError(msg)
    model = trajectory.provenance.get("operator", {}).get("model")
    return write_page(
        path,
        "trajectory.html",
        title=title or f"Curvature of {model or 'a model'} over training",
        summary=_summary(trajectory),
        failures=[f"Step {m.step} failed: {m.error}." for m in trajectory if m.error],
        notes=[
            *(("trajectory", note) for note in trajectory.notes),
            *(("measurements", note) for note in shared_notes(trajectory)),
        ],
        figures=illustrated(
            drawn(of_trajectory(trajectory)) if figures is None else figures, _CAPTIONS
        ),
        tables=[Table("Measurements", _TABLE, *trajectory.table())] if len(trajectory) else [],
        provenance=list(flattened(trajectory.provenance)),
    )


def of_trajectory(trajectory: Trajectory) -> Draw:
    """What its figures are drawn with; none where no sharpness was measured."""
    known = any(not math.isnan(m.sharpness) for m in trajectory)
    sketch = Sketch(trajectory.plot, readings.of_trajectory(trajectory))
    return {"trajectory": sketch} if known else {}


def _summary(trajectory: Trajectory) -> str:
    """The first and the last sharpness, and how they stand to the threshold, in words."""
    count = "1 measurement" if len(trajectory) == 1 else f"{len(trajectory)} measurements"
    parts = [count, *_course([m for m in trajectory if not math.isnan(m.sharpness)])]
    products = sum(sum(m.matvecs.values()) for m in trajectory)
    seconds = sum(m.seconds for m in trajectory if not math.isnan(m.seconds))
    parts.append(f"cost {products:,} products in {seconds:.1f} s")
    return "; ".join(parts) + "."


def _course(known: list[Measurement]) -> Iterator[str]:
    if not known:
        return
    first, last = known[0], known[-1]
    start = f"{first.sharpness:.4g} ± {first.sharpness_residual:.1g} at step {first.step}"
    if first is last:
        yield f"sharpness {start}"
    else:
        end = f"{last.sharpness:.4g} ± {last.sharpness_residual:.1g} at step {last.step}"
        yield f"sharpness from {start} to {end}"
    thresholds = [(m, *_against(m)) for m in known]
    compared = [(m, value, limit) for m, value, limit in thresholds if math.isfinite(limit)]
    if compared:
        m, value, limit = compared[-1]
        of = "the preconditioned sharpness" if m.threshold_preconditioned else "it"
        over = sum(value > limit for _, value, limit in compared)
        yield (
            f"at the end {of} is {value / limit:.3g} times the threshold {m.threshold_formula} = "
            f"{limit:.4g}, above it in {over} of {len(compared)}"
        )


def _against(m: Measurement) -> tuple[float, float]:
    """The number that the threshold is of, and the threshold; nan unless both are known."""
    value = m.preconditioned_sharpness if m.threshold_preconditioned else m.sharpness
    return value, math.nan if math.isnan(value) else m.threshold
