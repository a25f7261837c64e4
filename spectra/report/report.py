"""What did the run find, and can it be believed? One page, self-contained, that says it in words.

Every number stands beside its error, and every note of every part is shown.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from spectra.algorithms.blocks import BlockTraces
from spectra.algorithms.eigen import Eigenpairs
from spectra.algorithms.estimate import Estimate
from spectra.analysis.analyze import Analysis
from spectra.analysis.comparison import Comparison
from spectra.analysis.trajectory import Trajectory
from spectra.errors import ArgumentTypeError
from spectra.names import short_name
from spectra.report import downloads, readings
from spectra.report.comparison_page import of_comparison
from spectra.report.pages import (
    Draw,
    Drawing,
    Sketch,
    Switch,
    Table,
    check_formats,
    drawn,
    flattened,
    illustrated,
    write_figures,
    write_page,
)
from spectra.report.plots import scale_of
from spectra.report.trajectory_page import of_trajectory

__all__ = ["draw_figures", "of_analysis", "save_figures", "switches", "write_report"]

_CAPTIONS = {
    "eigenvalues": (
        "Eigenvalues",
        "The computed eigenvalues in descending order. Error bars are measured residuals (mostly "
        "smaller than the markers); hollow markers did not converge. Where a range is shaded, all "
        "other eigenvalues lie in it with the stated probability.",
    ),
    "eigenvalues_symlog": (
        "Eigenvalues, symmetric-logarithmic",
        "The same eigenvalues on an axis that is logarithmic for both signs, and linear only below "
        "the smallest of them.",
    ),
    "density": (
        "Spectral density",
        "How the eigenvalues are distributed. The computed eigenvalues are drawn as outliers; the "
        "curve is the rest, broadened, with its band over the random probes. Where outliers leave "
        "the bulk no width, the inset shows it.",
    ),
    "density_symlog": (
        "Spectral density, symmetric-logarithmic",
        "The same distribution on an axis that is linear around zero and logarithmic beyond, which "
        "shows small and large eigenvalues of both signs at once.",
    ),
    "trace": (
        "Convergence of the trace",
        "The mean over the random probes so far, with its interval; the last point is the answer.",
    ),
    "trace_by_layer": (
        "Trace by layer",
        "How the trace is shared among the layers: the sums of the diagonal over the parameters of "
        "each, from the probes of the trace. The layers' errors move together: they are those of "
        "the same probes.",
    ),
    "eigenvectors_by_layer": (
        "Eigenvector mass by layer",
        "What of the squared length of each eigenvector lies in each layer, in percent; columns "
        "add up to 100. Where eigenvalues are no further apart than their residuals, only the sum "
        "over their columns means something.",
    ),
    "landscape": (
        "Loss along eigenvectors",
        "The loss itself at displacements along the eigenvectors of largest |λ|, and dashed the "
        "quadratic model: the loss here, its slope, and λ/2 times the displacement squared. Where "
        "the two part, the Hessian says no more about the loss. Which way along an eigenvector "
        "counts as positive is arbitrary.",
    ),
}


class _Scalar(NamedTuple):
    name: str
    value: str
    error: str
    method: str
    matvecs: str
    converged: bool


def draw_figures(result: Analysis | Trajectory | Comparison) -> dict[str, Drawing]:
    """The figures of an analysis, a trajectory or a comparison, to be written and embedded.

    Parameters
    ----------
    result
        From `spectra.analyze`, `spectra.track` or `spectra.compare`.

    Returns
    -------
    dict
        By name: "eigenvalues" and "eigenvalues_symlog" (but of a single one); "density" and
        "density_symlog" where the density was computed; "trace" where it was estimated from probes;
        "trace_by_layer" and "eigenvectors_by_layer" where the model has several modules;
        "landscape" where it was asked for. Of a trajectory "trajectory", if it has a sharpness; of
        a comparison "both_eigenvalues" and, where both have one, "both_densities". Drawn in the
        style "spectra.report.spectra", whatever the session's own is.

    Raises
    ------
    ArgumentTypeError
        None of them.
    """
    if isinstance(result, Trajectory):
        return drawn(of_trajectory(result))
    if isinstance(result, Comparison):
        return drawn(of_comparison(result))
    _check_analysis(result)
    return drawn(of_analysis(result))


def save_figures(
    result: Analysis | Trajectory | Comparison,
    directory: str | Path,
    *,
    formats: Sequence[str] = ("svg", "png"),
) -> dict[str, Path]:
    """Write the figures of an analysis, a trajectory or a comparison as files.

    Parameters
    ----------
    result
        From `spectra.analyze`, `spectra.track` or `spectra.compare`.
    directory
        Where to write; made if needed. Existing figures of the same names are replaced.
    formats
        File types that matplotlib can write: "svg", "png", "pdf".

    Returns
    -------
    dict
        Path in the first of the formats by name, as `draw_figures` has them.

    Raises
    ------
    ArgumentTypeError
        None of them.
    ArgumentError
        No format, or one that matplotlib cannot write.
    StorageError
        The files cannot be written.
    """
    check_formats(formats)
    return write_figures(draw_figures(result), directory, formats)


def write_report(
    analysis: Analysis,
    path: str | Path,
    *,
    title: str | None = None,
    figures: Mapping[str, str | Path | Drawing] | None = None,
) -> Path:
    """Write an analysis as one HTML page that needs no other file and no network.

    Parameters
    ----------
    analysis
        From `spectra.analyze`.
    path
        Of the page.
    title
        Heading; by default what was analysed.
    figures
        What to embed, by name: SVG or PNG files, as `save_figures` returns them; or what
        `draw_figures` returns, in which numbers can be read at the cursor. By default the latter.

    Returns
    -------
    Path
        Of the page.

    Raises
    ------
    ArgumentTypeError
        Not an Analysis.
    ArgumentError
        A figure that is neither SVG nor PNG.
    StorageError
        A figure cannot be read, or the page not written.
    """
    _check_analysis(analysis)
    return write_page(
        path,
        "report.html",
        title=title or _heading(analysis),
        summary=_summary(analysis),
        failures=list(_failures(analysis)),
        notes=list(_notes(analysis)),
        figures=illustrated(
            draw_figures(analysis) if figures is None else figures, _CAPTIONS, switches(analysis)
        ),
        pairs=_pair_rows(analysis.eigenpairs),
        certificate=_certificate(analysis.eigenpairs),
        scalars=list(_scalars(analysis)),
        blocks=_block_table(analysis.blocks),
        costs=_costs(analysis),
        downloads=downloads.of_analysis(analysis),
        # What was not asked for says nothing of where the numbers come from.
        provenance=[row for row in flattened(analysis.provenance) if row[1] != "None"],
    )


def _check_analysis(analysis: Any) -> None:
    if not isinstance(analysis, Analysis):
        msg = (
            f"expected an Analysis, as spectra.analyze returns it, got a {type(analysis).__name__}"
        )
        raise ArgumentTypeError(msg)


# --- figures -------------------------------------------------------------------------------------


def of_analysis(analysis: Analysis) -> Draw:
    """What its figures are drawn with, in the order of the page."""
    pairs, density, blocks = analysis.eigenpairs, analysis.density, analysis.blocks
    values = list(readings.of_eigenpairs(pairs))
    draw = {"eigenvalues": Sketch(lambda ax: pairs.plot(ax, scale="linear"), values)}
    if len(pairs) > 1:
        draw["eigenvalues_symlog"] = Sketch(lambda ax: pairs.plot(ax, scale="symlog"), values)
    if density is not None:
        draw["density"] = Sketch(density.plot, readings.of_density(density, "linear", pairs))
        draw["density_symlog"] = Sketch(
            lambda ax: density.plot(ax, scale="symlog"),
            readings.of_density(density, "symlog", pairs),
        )
    if analysis.trace is not None and len(analysis.trace.samples) > 1:
        draw["trace"] = Sketch(analysis.trace.plot, readings.of_estimate(analysis.trace))
    if blocks is not None:
        draw["trace_by_layer"] = Sketch(blocks.plot, readings.of_blocks(blocks))
        draw["eigenvectors_by_layer"] = Sketch(
            lambda ax: blocks.plot(ax, quantity="eigenvectors"), readings.of_masses(blocks)
        )
    if analysis.landscape is not None:
        surface = analysis.landscape
        draw["landscape"] = Sketch(surface.plot, readings.of_landscape(surface))
    return draw


def switches(analysis: Analysis) -> list[Switch]:
    """Which of its figures show the same on two scales, and on which it is seen first."""
    scale = scale_of(analysis.eigenpairs)
    first = "linear" if scale == "linear" else "logarithmic"
    return [
        Switch({"linear": name, "logarithmic": f"{name}_symlog"}, first)
        for name, first in (("eigenvalues", first), ("density", "linear"))
    ]


# --- words and numbers ---------------------------------------------------------------------------


def _heading(analysis: Analysis) -> str:
    """What was analysed, and its size."""
    operator = analysis.provenance.get("operator", {})
    name = operator.get("model") or operator.get("function")
    subject = f"Curvature of {name}" if name else "Spectrum of a symmetric operator"
    return f"{subject} (n = {analysis.eigenpairs.n:,})"


def _summary(analysis: Analysis) -> str:
    pairs = analysis.eigenpairs
    parts = [_extremes(pairs), *_outliers(pairs)]
    if analysis.trace is not None:
        parts.append(f"trace {_estimated(analysis.trace)}")
    parts += _negative(analysis)
    parts.append(f"{int(pairs.converged.sum())} of {len(pairs)} eigenpairs converged")
    seconds = sum(analysis.seconds.values())
    parts.append(f"cost {_counted(analysis.total_matvecs, 'product')} in {seconds:.1f} s")
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}."


def _outliers(pairs: Eigenpairs) -> Iterator[str]:
    """How many eigenvalues stand out, where it is known that there are no others."""
    edge = pairs.no_eigenvalue_above
    count = 0 if edge is None else int((pairs.values > edge).sum())
    if edge is not None and count:
        noun = "eigenvalue stands" if count == 1 else "eigenvalues stand"
        probability = f"{100 * pairs.certificate_confidence:g}% probability"
        yield f"{count} {noun} above {edge:.3g}, beyond which there is no other ({probability})"


def _negative(analysis: Analysis) -> Iterator[str]:
    """What share of the eigenvalues is negative, further from zero than can be resolved."""
    count = analysis.sums.get("negative eigenvalues")
    if count is None or analysis.density is None:
        return
    n, limit = analysis.density.n, analysis.density.resolution_at_zero
    level = count.confidence if count.bounds is None else count.bounds_confidence
    value, low, high = (
        100 * max(0.0, min(1.0, end / n)) for end in (count.value, *_interval(count))
    )
    yield (
        f"{value:.2g}% of all eigenvalues are below {-limit:.2g} "
        f"({100 * level:g}% interval {low:.2g} to {high:.2g}%)"
    )


def _extremes(pairs: Eigenpairs) -> str:
    """The most extreme eigenvalues of those searched for, by the name that is true of them."""
    values = pairs.values
    if pairs.which == "BE" and len(pairs) > 1:
        chosen = [("largest eigenvalue", 0), ("smallest eigenvalue", len(pairs) - 1)]
    elif pairs.which == "SA":
        chosen = [("smallest eigenvalue", len(pairs) - 1)]
    elif pairs.which == "LM" and -values[-1] > values[0]:
        chosen = [("eigenvalue of largest magnitude", len(pairs) - 1)]
    else:
        chosen = [("largest eigenvalue", 0)]
    return "; ".join(
        f"{name} {_with_error(values[i], pairs.residuals[i])}"
        + ("" if pairs.converged[i] else " (not converged)")
        for name, i in chosen
    )


def _estimated(estimate: Estimate) -> str:
    text = f"{_value(estimate)} ({_error(estimate)}"
    return text + ("" if estimate.converged else "; tolerance not reached") + ")"


def _value(estimate: Estimate) -> str:
    low, high = _interval(estimate)
    return _rounded(estimate.value, max(estimate.value - low, high - estimate.value))


def _error(estimate: Estimate) -> str:
    low, high = _interval(estimate)
    if estimate.exact:
        return "exact, to rounding"
    if math.isinf(high):
        return "no interval from fewer than two probes"
    bounded = estimate.bounds is not None
    level = estimate.bounds_confidence if bounded else estimate.confidence
    half = (high - low) / 2
    ends = _rounded(low, half), _rounded(high, half)
    if ends[0] == ends[1]:
        error = max(estimate.value - low, high - estimate.value)
        return f"within {error:.1g} with {100 * level:g}% probability"
    return f"{100 * level:g}% interval {ends[0]} to {ends[1]}"


def _interval(estimate: Estimate) -> tuple[float, float]:
    return estimate.bounds if estimate.bounds is not None else estimate.interval()


def _with_error(value: float, error: float) -> str:
    text = _rounded(value, error)
    # "2.76225 ± 3e-15" would claim digits that are not there.
    if error < abs(float(text) - value):
        return f"{text} (residual {error:.1g})"
    return f"{text} ± {error:.1g}"


def _rounded(value: float, error: float) -> str:
    """`value` to the second digit of its error, but at least three and at most six digits."""
    digits = 6
    if value != 0 and math.isfinite(error) and error > 0:
        digits = math.floor(math.log10(abs(value))) - math.floor(math.log10(error)) + 2
    return f"{value:.{min(max(digits, 3), 6)}g}"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _pair_rows(pairs: Eigenpairs) -> list[tuple[int, str, str, bool]]:
    return [
        (i, f"{value:.8g}", f"{residual:.2g}", bool(good))
        for i, (value, residual, good) in enumerate(
            zip(pairs.values, pairs.residuals, pairs.converged, strict=True), start=1
        )
    ]


def _certificate(pairs: Eigenpairs) -> str:
    above, below = pairs.no_eigenvalue_above, pairs.no_eigenvalue_below
    claims = []
    if above is not None:
        claims.append(f"above {above:.4g}")
    if below is not None:
        claims.append(f"below {below:.4g}")
    if not claims:
        return ""
    return (
        f"With {100 * pairs.certificate_confidence:g}% probability there is no other eigenvalue "
        f"{' or '.join(claims)}."
    )


def _scalars(analysis: Analysis) -> Iterator[_Scalar]:
    """Rows of single numbers, each with its error."""
    for name, number in (
        ("loss", analysis.value),
        ("gradient norm", analysis.gradient_norm),
    ):
        if number is not None:
            error = "exact over the data, to rounding"
            yield _Scalar(name, f"{number:.6g}", error, "one pass over the data", "0", True)
    for estimate in (analysis.spectral_norm, analysis.trace, analysis.frobenius_norm):
        if estimate is not None:
            method = estimate.method
            if len(estimate.samples):
                method += f"; {_counted(len(estimate.samples), 'probe')}"
            yield _Scalar(
                estimate.quantity,
                _value(estimate),
                _error(estimate),
                method,
                f"{estimate.matvecs:,}",
                estimate.converged,
            )


def _block_table(blocks: BlockTraces | None) -> Table | None:
    """The traces of layers, their errors, and what of the first eigenvectors lies in them."""
    if blocks is None:
        return None
    shown = blocks.shown_pairs
    head = [blocks.grouping, "parameters", "trace", "error", "per parameter"]
    rows = []
    largest, others = blocks.table()
    for row in [*largest, others] if others else largest:
        low, high = row.trace.interval()
        half = max(row.trace.value - low, high - row.trace.value)
        mean = row.trace.value / max(row.size, 1)
        shares = [f"{row.masses[i]:.1%}" for i in shown]
        value = _rounded(row.trace.value, half)
        error = f"± {half:.2g}" if half > 0 else "exact"
        rows.append([short_name(row.name), f"{row.size:,}", value, error, f"{mean:.3g}", *shares])
    source = f"from {_counted(blocks.probes, 'probe')} that the trace and the Frobenius norm had"
    caption = (
        f"Sums of the diagonal, {'exact' if blocks.exact else source}, ± for "
        f"{100 * blocks.confidence:g}%. Under an eigenvalue λ: what of the squared length of its "
        "eigenvector lies there. run.json lists every module."
    )
    heads = [*head, *(f"λ = {blocks.eigenvalues[i]:.4g}" for i in shown)]
    return Table(f"Trace by {blocks.grouping}", caption, heads, rows)


def _failures(analysis: Analysis) -> Iterator[str]:
    """The parts that did not reach their tolerance."""
    missed = int((~analysis.eigenpairs.converged).sum())
    if missed:
        yield f"{missed} of {_counted(len(analysis.eigenpairs), 'eigenpair')}"
    for estimate in (analysis.spectral_norm, analysis.trace, analysis.frobenius_norm):
        if estimate is not None and not estimate.converged:
            yield estimate.quantity


def _notes(analysis: Analysis) -> Iterator[tuple[str, str]]:
    """What the analysis and every part say should be known before believing it."""
    yield from (("analysis", note) for note in analysis.notes)
    parts = {
        "eigenpairs": analysis.eigenpairs,
        "spectral norm": analysis.spectral_norm,
        "trace": analysis.trace,
        "Frobenius norm": analysis.frobenius_norm,
        "traces of layers": analysis.blocks,
        "density": analysis.density,
        "landscape": analysis.landscape,
    }
    for name, part in parts.items():
        if part is not None:
            yield from ((name, note) for note in part.notes)
    if analysis.landscape is not None:
        yield from (("landscape", failure) for failure in analysis.landscape.failures)


def _costs(analysis: Analysis) -> list[tuple[str, str, str]]:
    rows = [
        (name, f"{analysis.matvecs.get(name, 0):,}", f"{seconds:.2f}")
        for name, seconds in analysis.seconds.items()
    ]
    total = sum(analysis.seconds.values())
    return [*rows, ("total", f"{analysis.total_matvecs:,}", f"{total:.2f}")]
