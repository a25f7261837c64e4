"""How do two runs differ? One page: both drawn together, and every difference with its error."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from spectra.analysis.comparison import Comparison, Difference
from spectra.errors import ArgumentTypeError
from spectra.report import plots, readings
from spectra.report.pages import Draw, Drawing, Sketch, Table, drawn, illustrated, write_page

__all__ = ["of_comparison", "write_comparison_page"]

_CAPTIONS = {
    "both_eigenvalues": (
        "Eigenvalues",
        "By their rank, with measured residuals as error bars (mostly smaller than the markers); "
        "hollow markers did not converge.",
    ),
    "both_densities": (
        "Spectral densities",
        "On an axis that is linear around zero and logarithmic beyond. The curves are broadened; "
        "the bands are those over the random probes. Computed outliers are lines at the foot.",
    ),
}
_TABLE = (
    "The change is the second less the first. ± is what it may be off by: the errors of both, "
    "added up (residuals of eigenvalues, half intervals of estimates, rounding of sums). "
    "Eigenvalues are paired by rank, λ1 the largest, λn the smallest."
)


def write_comparison_page(
    comparison: Comparison,
    path: str | Path,
    *,
    title: str | None = None,
    figures: Mapping[str, str | Path | Drawing] | None = None,
) -> Path:
    """Write a comparison as one HTML page that needs no other file and no network.

    Parameters
    ----------
    comparison
        From `spectra.compare`.
    path
        Of the page.
    title
        Heading; by default the names of the two.
    figures
        As of `write_report`.

    Returns
    -------
    Path
        Of the page.

    Raises
    ------
    ArgumentTypeError
        Not a Comparison.
    ArgumentError
        A figure that is neither SVG nor PNG.
    StorageError
        A figure cannot be read, or the page not written.
    """
    if not isinstance(comparison, Comparison):
        kind = type(comparison).__name__
        msg = f"expected a Comparison, as spectra.compare returns it, got a {kind}"
        raise ArgumentTypeError(msg)
    first, second = comparison.names
    head = ["quantity", first, second, "change", "±", "beyond the errors", "converged"]
    rows = [_row(row) for row in comparison.rows]
    return write_page(
        path,
        "comparison.html",
        title=title or f"{first} and {second}",
        summary=_summary(comparison),
        notes=[("comparison", note) for note in comparison.notes],
        figures=illustrated(
            drawn(of_comparison(comparison)) if figures is None else figures, _CAPTIONS
        ),
        differences=Table("Differences", _TABLE, head, rows),
        settings=[("other setting", text) for text in comparison.settings],
    )


def of_comparison(comparison: Comparison) -> Draw:
    """What its figures are drawn with; the densities where both have one."""
    draw = {
        "both_eigenvalues": Sketch(
            lambda ax: plots.plot_both_eigenvalues(comparison, ax),
            readings.of_both_eigenvalues(comparison),
        )
    }
    if all(analysis.density is not None for analysis in comparison.analyses):
        draw["both_densities"] = Sketch(lambda ax: plots.plot_both_densities(comparison, ax))
    return draw


def _row(row: Difference) -> list[str]:
    return [
        row.name,
        f"{row.first:.6g}",
        f"{row.second:.6g}",
        f"{row.change:+.4g}",
        f"{row.error:.1g}",
        "yes" if row.beyond_errors else "no",
        "yes" if row.converged else "no",
    ]


def _summary(comparison: Comparison) -> str:
    beyond = sum(row.beyond_errors for row in comparison.rows)
    parts = [f"{beyond} of {len(comparison.rows)} numbers differ by more than their errors"]
    parts += _shares(comparison)
    return "; ".join(parts) + "."


def _shares(comparison: Comparison) -> Iterator[str]:
    if not math.isnan(comparison.overlap):
        size = comparison.overlap_size
        yield f"{comparison.overlap:.1%} of the first's top {size} eigenvectors are in the second's"
    if not math.isnan(comparison.distance):
        floor = comparison.distance_floor
        noise = "" if math.isnan(floor) else f" (noise of the probes {floor:.2g})"
        yield f"area between the distributions of eigenvalues {comparison.distance:.3g}{noise}"
