"""How does a result look? One figure for each kind, drawn from nothing but the result's numbers.

Figures that are given no Axes are made through pyplot, as pandas, seaborn and scikit-learn do: that
is what notebooks display and `pyplot.show()` opens, and without a screen it draws into memory. No
other state of matplotlib is touched, and the fonts and the background are the user's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    MaxNLocator,
    NullFormatter,
    NullLocator,
    ScalarFormatter,
)
from scipy import stats
from torch import Tensor

from spectra.algorithms.block_spectra import BlockSpectra
from spectra.algorithms.blocks import BlockTraces
from spectra.algorithms.coupling import BlockCoupling
from spectra.algorithms.data_spread import DataSpread
from spectra.algorithms.density import SpectralDensity
from spectra.algorithms.diagonal import DiagonalEstimate
from spectra.algorithms.eigen import Eigenpairs
from spectra.algorithms.estimate import Estimate, check_confidence
from spectra.algorithms.solve import Solution
from spectra.analysis.analyze import Analysis
from spectra.analysis.comparison import Comparison
from spectra.analysis.landscape import Landscape
from spectra.analysis.preflight import Preflight
from spectra.analysis.trajectory import Measurement, Trajectory
from spectra.errors import ArgumentError, ArgumentTypeError
from spectra.names import printable, short_name

if TYPE_CHECKING:
    from spectra.results import Result

__all__ = [
    "ASIDE",
    "FIGURE_SIZE",
    "STEM",
    "DrawnDensity",
    "MassMap",
    "density_drawn",
    "drawable",
    "mass_map",
    "plot",
    "plot_analysis",
    "plot_block_spectra",
    "plot_blocks",
    "plot_both_densities",
    "plot_both_eigenvalues",
    "plot_coupling",
    "plot_data_spread",
    "plot_density",
    "plot_diagonal",
    "plot_eigenpairs",
    "plot_estimate",
    "plot_landscape",
    "plot_measurement",
    "plot_preflight",
    "plot_solution",
    "plot_trajectory",
    "scale_of",
    "shown_sharpness",
]

# Inches: the width of a page's text, at which 9 to 10 point lettering reads well in print.
FIGURE_SIZE = (6.4, 3.8)

# From the palette of Okabe and Ito, which stays distinct for the colour-blind; each colour means
# one thing in all figures.
_EIGENVALUES = "#D55E00"
_DENSITY = "#0072B2"
_MEAN = "#009E73"
_GREY = "#7F7F7F"
# Where two analyses are drawn together.
ASIDE = (-0.1, 0.1)
_TWO = ((_DENSITY, "o", ASIDE[0]), (_EIGENVALUES, "s", ASIDE[1]))

_WHICH = {
    "LM": "largest in magnitude",
    "LA": "largest",
    "SA": "smallest",
    "BE": "from both ends",
}
# Values that differ by more than this factor cannot be told apart on one linear axis.
_MANY_TIMES = 20.0
# Below this share of the axis the bulk of a spectrum is a line, and gets an inset of its own.
_NARROW = 0.35
# Height of an outlier's stem, as a share of the axis, where its mass has no place on that.
STEM = 0.12
# Letters of a name beside its bar.
_LONGEST_NAME = 30
# Eigenvectors in a map of their mass, and those for which there is room to write the numbers, too.
_MOST_COLUMNS = 30
_NUMBERED_COLUMNS = 12


def plot(result: Result, ax: Axes | None = None, **options: Any) -> Axes:
    """Draw a result; what `Result.plot` calls.

    Parameters
    ----------
    result
        Of any kind but a single `Finding` or `Forecast`, which a `Preflight` draws.
    ax
        Where to draw; a new pyplot figure by default.
    options
        Of `plot_eigenpairs`, `plot_density`, `plot_estimate`, `plot_blocks`, `plot_landscape`,
        `plot_trajectory` or `plot_analysis`.

    Returns
    -------
    Axes

    Raises
    ------
    ArgumentTypeError
        There is no figure for this kind of result, or `ax` is no matplotlib Axes.
    """
    draw = _DRAW.get(type(result))
    if draw is None:
        kinds = ", ".join(kind.__name__ for kind in _DRAW)
        msg = f"there is no figure for a {type(result).__name__}; expected one of {kinds}"
        raise ArgumentTypeError(msg)
    return draw(result, ax, **options)


def drawable(result: Result) -> bool:
    """Whether there is a figure for this kind of result, and this one holds what it shows."""
    if isinstance(result, Estimate):
        return len(result.samples) > 1
    return type(result) in _DRAW


def plot_eigenpairs(
    pairs: Eigenpairs,
    ax: Axes | None = None,
    *,
    scale: Literal["linear", "symlog"] | None = None,
) -> Axes:
    """Eigenvalues by index, with residuals as error bars and the bounds on all the others.

    Parameters
    ----------
    pairs
        From `spectra.eigsh`. Those that did not converge are drawn hollow.
    ax
        Where to draw; a new pyplot figure by default.
    scale
        Of the vertical axis: "linear"; or "symlog", logarithmic for both signs and linear only
        below the smallest |λ|. By default the latter where the values differ by more than a factor
        of 20.

    Returns
    -------
    Axes

    Raises
    ------
    ArgumentError
        An unknown scale.
    ArgumentTypeError
        `ax` is no matplotlib Axes.
    """
    _check_scale(scale, None)
    ax = _axes(ax)
    count, missed = len(pairs), int((~pairs.converged).sum())
    index = np.arange(1, count + 1)
    if (scale or scale_of(pairs)) == "symlog":
        ax.set_yscale("symlog", linthresh=_order_of_smallest(pairs.values, pairs.residuals))
    _draw_pairs(ax, pairs, index)
    ax.axhline(0.0, color=_GREY, linewidth=0.8)
    ax.set_xlim(0.4, count + 0.6)
    _draw_certificate(ax, pairs)
    # Each index where all have room: an axis that is labelled 2, 4, … looks incomplete.
    ax.xaxis.set_major_locator(
        FixedLocator(index.tolist()) if count <= 12 else MaxNLocator(integer=True)
    )
    ax.set_xlabel("index, in descending order")
    ax.set_ylabel("eigenvalue λ")
    title = f"{count} {'eigenvalue' if count == 1 else 'eigenvalues'} "
    title += f"({_WHICH.get(pairs.which, pairs.which)}) of n = {pairs.n:,}"
    _finish(ax, f"{title}; {missed} did not converge" if missed else title)
    ax.legend(loc="best", fontsize="small")
    return ax


def plot_density(
    density: SpectralDensity,
    ax: Axes | None = None,
    *,
    scale: Literal["linear", "symlog"] = "linear",
    width: float | None = None,
    confidence: float = 0.95,
) -> Axes:
    """The distribution of the eigenvalues: a broadened curve with its band, and the outliers.

    The curve is the mean of the broadened nodes within narrow bins, computed exactly: its integral
    is the share of the spectrum that was not deflated, and no peak falls between two points.

    Parameters
    ----------
    density
        From `spectra.spectral_density`.
    ax
        Where to draw; a new pyplot figure by default.
    scale
        "linear": density per unit of λ over λ, with the bulk once more in an inset where outliers
        make it narrow. "symlog": density per unit of asinh(λ / x0) on an axis that is linear
        within ±x0, the resolution near zero, and logarithmic beyond.
    width
        Broadening of all nodes; by default each node's follows the spacing of its neighbours.
    confidence
        Of the band over probes (Student's, pointwise), which is drawn where there are two or more.

    Returns
    -------
    Axes

    Raises
    ------
    ArgumentError
        An unknown scale, a width that is not positive, or a confidence outside (0, 1).
    ArgumentTypeError
        `ax` is no matplotlib Axes.
    """
    _check_density_options(scale, width, confidence)
    ax = _axes(ax)
    x0 = _resolution_near_zero(density, width)
    curve = _curve(density, width, x0, scale)
    if scale == "symlog":
        ax.set_xscale("asinh", linear_width=x0)
        ax.set_xlabel(f"eigenvalue λ (linear within ±{x0:g}, logarithmic beyond)")
        ax.set_ylabel(f"density per unit of asinh(λ / {x0:g})")
    else:
        ax.set_xlabel("eigenvalue λ")
        ax.set_ylabel("density per unit of λ")
    ax.set_yscale("log")
    # A tenth of one eigenvalue, per unit of the axis or spread over all of it.
    floor = 0.1 / density.n
    drawn = density.atoms
    if curve is not None:
        floor /= 1.0 if scale == "symlog" else curve.edges[-1] - curve.edges[0]
        _draw_curve(ax, curve, confidence, floor)
        drawn = np.concatenate([drawn, curve.range_above(floor)])
    peak = 1.0 if curve is None else max(curve.mean.max(), 2 * floor)
    # A quarter of the height stays free above the peak, for the legend.
    ax.set_ylim(floor, floor * (peak / floor) ** 1.33)
    _limit(ax, drawn, x0 if scale == "symlog" else None)
    _draw_atoms(ax, density, fixed=scale == "linear")
    _finish(ax, f"Spectral density of n = {density.n:,} ({_effort(density)})")
    place: dict[str, Any] = {"loc": "best"}
    if scale == "symlog":
        _tick_symlog(ax, x0)
    elif curve is not None and _draw_inset(ax, density, curve, confidence):
        place = {"loc": "lower right", "bbox_to_anchor": (1.0, 0.13)}
    ax.legend(fontsize="small", **place)
    return ax


def plot_estimate(
    estimate: Estimate, ax: Axes | None = None, *, confidence: float | None = None
) -> Axes:
    """How an estimate converged, probe by probe, with its interval.

    Parameters
    ----------
    estimate
        From `spectra.trace` or `spectra.norm`. One without samples (exact, or between bounds) is
        drawn as a point with its interval.
    ax
        Where to draw; a new pyplot figure by default.
    confidence
        Of the interval; by default the estimate's own.

    Returns
    -------
    Axes

    Raises
    ------
    ArgumentError
        The confidence is not between 0 and 1, or beyond what the estimate's bounds promise.
    ArgumentTypeError
        `ax` is no matplotlib Axes.
    """
    if confidence is None and estimate.bounds is not None:
        level, interval = estimate.bounds_confidence, estimate.bounds
    else:
        level = estimate.confidence if confidence is None else confidence
        interval = estimate.interval(level)
    ax = _axes(ax)
    label = _described(estimate, interval, level)
    if len(estimate.samples) < 2:
        _draw_point(ax, estimate, interval, label)
    else:
        _draw_running(ax, estimate, level, label)
    quantity = short_name(estimate.quantity)
    title = quantity[:1].upper() + quantity[1:]
    if estimate.method:
        title += f" ({estimate.method})"
    if not estimate.converged:
        title += "; tolerance not reached"
    _finish(ax, title)
    ax.legend(loc="best", fontsize="small")
    return ax


def plot_blocks(
    blocks: BlockTraces,
    ax: Axes | None = None,
    *,
    quantity: Literal["trace", "eigenvectors"] = "trace",
) -> Axes:
    """The traces of layers as bars with their intervals, or the mass of eigenvectors as a map.

    Parameters
    ----------
    blocks
        The `blocks` of an analysis: its layers, or modules where there is but one layer. Of many
        those of largest |trace| are drawn, and the sum of the others is told.
    ax
        Where to draw; a new pyplot figure by default.
    quantity
        "trace", or "eigenvectors": what of the squared length of every eigenvector lies in a layer,
        in percent. Of many layers the map shows those with most of some eigenvector, and the sum
        of the others; of more than 30 eigenvectors those of largest |λ|.

    Returns
    -------
    Axes

    Raises
    ------
    ArgumentError
        Another quantity, or no eigenvectors.
    ArgumentTypeError
        `ax` is no matplotlib Axes.
    """
    if quantity not in {"trace", "eigenvectors"}:
        msg = f"quantity={quantity!r}; expected 'trace' or 'eigenvectors'"
        raise ArgumentError(msg)
    if quantity == "eigenvectors":
        return _plot_masses(blocks, ax)
    ax = _axes(ax)
    rows, others = blocks.table()
    label = "" if blocks.exact else f"{blocks.probes} probes"
    _draw_bars(ax, {row.name: row.trace for row in rows}, blocks.confidence, label)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6))
    label = "trace of the diagonal block"
    if others is not None:
        low, high = others.trace.interval()
        label += f" ({others.name} together: {others.trace.value:.3g} ± {(high - low) / 2:.1g})"
    ax.set_xlabel(label, parse_math=False)
    _finish(ax, f"Trace by {blocks.grouping} ({'exact' if blocks.exact else blocks.method})")
    ax.grid(visible=False, axis="y")
    return ax


def plot_trajectory(
    trajectory: Trajectory,
    ax: Axes | None = None,
    *,
    quantity: Literal["sharpness", "preconditioned"] | None = None,
) -> Axes:
    """The sharpness over the steps, with residuals as error bars, against the threshold.

    Parameters
    ----------
    trajectory
        Of a `CurvatureMonitor`, or of checkpoints. What did not converge is drawn hollow.
    ax
        Where to draw; a new pyplot figure by default.
    quantity
        "sharpness" or "preconditioned"; by default the one that the threshold is of, if it was
        measured. The threshold is drawn beside the one that it is of.

    Returns
    -------
    Axes

    Raises
    ------
    ArgumentError
        Another quantity, or one that was not measured.
    ArgumentTypeError
        `ax` is no matplotlib Axes.
    """
    of_threshold = any(m.threshold_preconditioned for m in trajectory)
    if quantity is None:
        quantity = shown_sharpness(trajectory)
    if quantity not in {"sharpness", "preconditioned"}:
        msg = f"quantity={quantity!r}; expected 'sharpness' or 'preconditioned'"
        raise ArgumentError(msg)
    name = "sharpness" if quantity == "sharpness" else "preconditioned_sharpness"
    error = name.removesuffix("sharpness") + (
        "sharpness_residual" if name == quantity else "residual"
    )
    steps = np.array([m.step for m in trajectory])
    values, errors = (np.array([getattr(m, n) for m in trajectory]) for n in (name, error))
    if np.isnan(values).all():
        msg = f"no measurement of the trajectory has a {name.replace('_', ' ')} to draw"
        raise ArgumentError(msg)
    ax = _axes(ax)
    fine = np.array([getattr(m, f"{quantity}_converged") is not False for m in trajectory])
    label = "λ_max" if quantity == "sharpness" else "λ_max, preconditioned"
    ax.plot(steps, values, color=_EIGENVALUES, linewidth=1.0)
    for chosen, face, words in ((fine, _EIGENVALUES, label), (~fine, "none", "not converged")):
        if chosen.any():
            ax.errorbar(
                steps[chosen],
                values[chosen],
                yerr=errors[chosen],
                fmt="o",
                markersize=4.5,
                color=_EIGENVALUES,
                markerfacecolor=face,
                capsize=3,
                label=f"{words} ± residual",
            )
    batch = np.array([m.batch_sharpness for m in trajectory])
    if quantity == "sharpness" and not np.isnan(batch).all():
        ax.plot(steps, batch, "x", color=_DENSITY, markersize=4.5, label="of the current batch")
    threshold = np.array([m.threshold for m in trajectory])
    if of_threshold == (quantity == "preconditioned") and np.isfinite(threshold).any():
        formula = next(m.threshold_formula for m in trajectory if m.threshold_formula)
        ax.plot(steps, threshold, "--", color=_GREY, linewidth=1.2, label=f"threshold, {formula}")
    ax.set_xlabel("step")
    ax.set_ylabel("sharpness" if quantity == "sharpness" else "preconditioned sharpness")
    _finish(ax, f"{label} over {len(steps)} measurements")
    ax.legend(loc="best", fontsize="small")
    return ax


def shown_sharpness(trajectory: Trajectory) -> Literal["sharpness", "preconditioned"]:
    """What is drawn unless somebody asks: what the threshold is of, if it was measured."""
    of_threshold = any(m.threshold_preconditioned for m in trajectory)
    measured = any(not math.isnan(m.preconditioned_sharpness) for m in trajectory)
    return "preconditioned" if of_threshold and measured else "sharpness"


def plot_block_spectra(spectra: BlockSpectra, ax: Axes | None = None) -> Axes:
    """The eigenvalues of every block on a row of its own, in the order of the model.

    Parameters
    ----------
    spectra
        From `spectra.block_spectra`. Pairs that did not converge are drawn hollow.
    ax
        Where to draw; a new pyplot figure by default.

    Returns
    -------
    Axes
        Its horizontal axis is symmetric-logarithmic where the values differ by more than a factor
        of 20.

    Raises
    ------
    ArgumentTypeError
        `ax` is no matplotlib Axes.
    """
    ax = _axes(ax)
    pairs = [spectra.eigenpairs[name] for name in spectra.names]
    rows = np.repeat(np.arange(len(pairs)), [len(p) for p in pairs])
    values = np.concatenate([p.values for p in pairs])
    residuals = np.concatenate([p.residuals for p in pairs])
    good = np.concatenate([p.converged for p in pairs])
    linear_within = _linear_within(values, residuals)
    if linear_within is not None:
        ax.set_xscale("symlog", linthresh=linear_within)
    ax.axvline(0.0, color=_GREY, linewidth=0.8)
    for chosen, face, label in (
        (good, _EIGENVALUES, "eigenvalue ± residual"),
        (~good, ax.get_facecolor(), f"not converged ({int((~good).sum())} of {len(good)})"),
    ):
        if chosen.any():
            ax.errorbar(
                values[chosen],
                rows[chosen],
                xerr=residuals[chosen],
                fmt="o",
                color=_EIGENVALUES,
                markerfacecolor=face,
                markersize=4.0,
                capsize=2.5,
                label=label,
            )
    # From the top, as the model is read.
    ax.set_ylim(len(pairs) - 0.4, -0.6)
    _name_rows(ax, spectra.names)
    ax.set_xlabel("eigenvalue λ of the diagonal block")
    _finish(ax, f"Extreme eigenvalues of {len(pairs)} blocks ({spectra.passes} passes)")
    ax.legend(loc="best", fontsize="small")
    return ax


def plot_coupling(coupling: BlockCoupling, ax: Axes | None = None) -> Axes:
    """The Frobenius norms of all blocks as a heat map: what is off the diagonal couples them.

    Parameters
    ----------
    coupling
        From `spectra.block_coupling`. Blocks whose square is within two standard errors of zero
        are crossed out.
    ax
        Where to draw; a new pyplot figure by default.

    Returns
    -------
    Axes
        Its colours are logarithmic over four decades at most.

    Raises
    ------
    ArgumentTypeError
        `ax` is no matplotlib Axes.
    """
    ax = _axes(ax)
    norms = np.sqrt(np.maximum(coupling.squares, 0.0))
    largest = float(norms.max())
    if largest > 0.0:
        positive = norms[norms > 0.0]
        smallest = max(float(positive.min()), 1e-4 * largest)
        # One colour needs a range, too.
        lowest = min(smallest, 0.9 * largest)
        # Cividis looks alike to the colour-blind, and gets brighter from one end to the other.
        image = ax.imshow(np.maximum(norms, lowest), norm=LogNorm(lowest, largest), cmap="cividis")
        ax.figure.colorbar(image, ax=ax, label="‖H_ab‖ (Frobenius)")
    else:
        ax.imshow(norms, vmin=0.0, vmax=1.0, cmap="cividis")
    unknown = np.argwhere(coupling.squares <= 2 * coupling.standard_errors)
    if len(unknown):
        ax.plot(
            unknown[:, 1],
            unknown[:, 0],
            linestyle="none",
            marker="x",
            color="white",
            markersize=4.0,
            label="within 2 standard errors of 0",
        )
    _name_rows(ax, coupling.names)
    names = [short_name(name or "(itself)", _LONGEST_NAME) for name in coupling.names]
    size = "small" if len(names) <= 15 else "xx-small"
    ax.set_xticks(np.arange(len(names)), names, parse_math=False, rotation=90, fontsize=size)
    low, high = coupling.outside_interval
    title = f"‖H − D‖/‖H‖ = {coupling.outside:.3g}, "
    _finish(ax, f"{title}{coupling.confidence:.0%} interval [{low:.3g}, {high:.3g}]")
    ax.grid(visible=False)
    return ax


def plot_landscape(surface: Landscape, ax: Axes | None = None) -> Axes:
    """The loss along directions as curves, or over a plane as contours, and its quadratic model.

    Parameters
    ----------
    surface
        What to draw. The quadratic model is dashed; points that could not be evaluated are gaps.
    ax
        Where to draw; a new pyplot figure by default.

    Returns
    -------
    Axes

    Raises
    ------
    ArgumentTypeError
        `ax` is no matplotlib Axes.
    """
    ax = _axes(ax)
    a = surface.displacements
    unit = "‖θ − θ₀‖ along {}"
    if surface.plane:
        # One set of levels, so that the two can be compared.
        levels = np.linspace(np.nanmin(surface.values), np.nanmax(surface.values), 12)[1:]
        if np.isfinite(levels).all() and np.ptp(levels) > 0:
            filled = ax.contourf(a, a, surface.values.T, levels=24, cmap="cividis")
            ax.figure.colorbar(filled, ax=ax, label="loss")
            ax.contour(a, a, surface.values.T, levels=levels, colors="white", linewidths=0.8)
            ax.contour(
                a,
                a,
                surface.predictions.T,
                levels=levels,
                colors="white",
                linestyles="dashed",
                linewidths=0.8,
            )
        ax.plot(0.0, 0.0, marker="+", color=_EIGENVALUES)
        ax.set_aspect("equal")
        ax.set_xlabel(unit.format(surface.labels[0]), parse_math=False)
        ax.set_ylabel(unit.format(surface.labels[1]), parse_math=False)
        _finish(ax, "Loss over a plane (dashed: quadratic model)")
        ax.grid(visible=False)
        return ax
    colours = (_DENSITY, _EIGENVALUES, _MEAN, "#CC79A7", "#E69F00", "#56B4E9")
    for i, (row, model) in enumerate(zip(surface.values, surface.predictions, strict=True)):
        colour = colours[i % len(colours)]
        label = printable(surface.labels[i]).replace("$", r"\$")
        ax.plot(a, row, color=colour, label=label)
        ax.plot(a, model, color=colour, linestyle="dashed", linewidth=1.0)
    ax.plot([], [], color=_GREY, linestyle="dashed", linewidth=1.0, label="quadratic model")
    share = f", {a[-1] / surface.weights_norm:.2g} ‖θ₀‖ at the end" if surface.weights_norm else ""
    ax.set_xlabel(f"displacement ‖θ − θ₀‖{share}", parse_math=False)
    ax.set_ylabel("loss")
    ax.legend(loc="best", fontsize="small")
    _finish(ax, "Loss along directions")
    return ax


def plot_both_eigenvalues(comparison: Comparison, ax: Axes | None = None) -> Axes:
    """The eigenvalues of two analyses by their rank, with residuals as error bars.

    Parameters
    ----------
    comparison
        From `spectra.compare`. Those that did not converge are drawn hollow.
    ax
        Where to draw; a new pyplot figure by default.

    Returns
    -------
    Axes

    Raises
    ------
    ArgumentTypeError
        `ax` is no matplotlib Axes.
    """
    ax = _axes(ax)
    both = [analysis.eigenpairs for analysis in comparison.analyses]
    values, residuals = (
        np.concatenate([getattr(pairs, name) for pairs in both]) for name in ("values", "residuals")
    )
    within = _linear_within(values, residuals)
    if within is not None:
        ax.set_yscale("symlog", linthresh=within)
    ax.axhline(0.0, color=_GREY, linewidth=0.8)
    for pairs, name, (color, marker, aside) in zip(both, comparison.names, _TWO, strict=True):
        index = np.arange(1, len(pairs) + 1) + aside
        for chosen, face in ((pairs.converged, color), (~pairs.converged, "none")):
            words = name if face == color else f"{name}, not converged"
            if chosen.any():
                ax.errorbar(
                    index[chosen],
                    pairs.values[chosen],
                    yerr=pairs.residuals[chosen],
                    fmt=marker,
                    color=color,
                    markerfacecolor=face,
                    markersize=5.0,
                    capsize=2.5,
                    label=printable(words),
                )
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("index, in descending order")
    ax.set_ylabel("eigenvalue λ")
    _finish(ax, "Eigenvalues of both")
    _plain_legend(ax)
    return ax


def plot_both_densities(comparison: Comparison, ax: Axes | None = None) -> Axes:
    """The spectral densities of two analyses on one axis, each with its band and its outliers.

    Parameters
    ----------
    comparison
        From `spectra.compare`, of two analyses with a density.
    ax
        Where to draw; a new pyplot figure by default. Its horizontal axis is linear around zero
        and logarithmic beyond.

    Returns
    -------
    Axes

    Raises
    ------
    ArgumentError
        One of them has no density.
    ArgumentTypeError
        `ax` is no matplotlib Axes.
    """
    densities = [analysis.density for analysis in comparison.analyses]
    both = [density for density in densities if density is not None]
    if len(both) < 2:
        msg = "one of the two analyses has no density; compute it with analyze(density=True)"
        raise ArgumentError(msg)
    ax = _axes(ax)
    x0 = max(_resolution_near_zero(density, None) for density in both)
    floor = min(0.1 / density.n for density in both)
    ax.set_xscale("asinh", linear_width=x0)
    ax.set_yscale("log")
    drawn, peak = [], 1.0
    for density, name, (color, *_) in zip(both, comparison.names, _TWO, strict=True):
        label = printable(name)
        curve = _curve(density, None, x0, "symlog")
        if curve is not None:
            low, high = _band(curve, 0.95, floor)
            ax.fill_between(curve.centres, low, high, color=color, alpha=0.2, linewidth=0)
            ax.plot(curve.centres, curve.mean, color=color, linewidth=1.3, label=label)
            drawn.append(curve.range_above(floor))
            peak = max(peak, float(curve.mean.max()))
        if len(density.atoms):
            ax.vlines(
                density.atoms,
                0.0,
                # Those of the second stand out above those of the first.
                0.05 if density is both[0] else 0.1,
                colors=color,
                linewidth=1.2,
                transform=ax.get_xaxis_transform(),
                label="_" if curve is not None else label,
            )
            drawn.append(density.atoms)
    ax.set_ylim(floor, floor * (peak / floor) ** 1.2)
    _limit(ax, np.concatenate(drawn), x0)
    _tick_symlog(ax, x0)
    ax.set_xlabel(f"eigenvalue λ (linear within ±{x0:g}, logarithmic beyond)")
    ax.set_ylabel(f"density per unit of asinh(λ / {x0:g})")
    _finish(ax, "Spectral densities of both, with 95 % bands; lines at the foot: outliers")
    _plain_legend(ax)
    return ax


def _plain_legend(ax: Axes) -> None:
    """A legend whose names are not read as formulas."""
    for text in ax.legend(loc="best", fontsize="small").get_texts():
        text.set_parse_math(False)


# --- of one number or a few ----------------------------------------------------------------------


def plot_analysis(
    analysis: Analysis, ax: Axes | None = None, *, part: str | None = None, **options: Any
) -> Axes:
    """One part of an analysis; `spectra.report.report.save_figures` writes all of them.

    Parameters
    ----------
    part
        "density" (the default where it was computed), "eigenpairs", "trace", "blocks" or
        "landscape".
    **options
        Of the part's own function.

    Raises
    ------
    ArgumentError
        Another part, or one that was not computed.
    """
    names = ("density", "eigenpairs", "trace", "blocks", "landscape")
    there = [name for name in names if getattr(analysis, name) is not None]
    part = there[0] if part is None else part
    if part not in there:
        msg = f"part={part!r}; this analysis has {', '.join(map(repr, there))}"
        raise ArgumentError(msg)
    return plot(getattr(analysis, part), ax, **options)


def plot_data_spread(spread: DataSpread, ax: Axes | None = None) -> Axes:
    """Eigenvalues of the given data, with intervals for those of the population."""
    ax = _axes(ax)
    index = np.arange(1, len(spread.values) + 1)
    low, high = spread.intervals.T
    ax.errorbar(
        index,
        spread.values,
        yerr=[spread.values - low, high - spread.values],
        fmt="o",
        color=_EIGENVALUES,
        capsize=2.5,
        label=f"{100 * spread.confidence:g}% interval over {spread.batches} batches",
    )
    return _of_eigenvalues(ax, index, "Eigenvalues of the population")


def plot_measurement(measurement: Measurement, ax: Axes | None = None) -> Axes:
    """Eigenvalues at one step of a training, with residuals, beside the stability threshold."""
    ax = _axes(ax)
    index = np.arange(1, len(measurement.eigenvalues) + 1)
    ax.errorbar(
        index,
        measurement.eigenvalues,
        yerr=measurement.residuals or None,
        fmt="o",
        color=_EIGENVALUES,
        capsize=2.5,
        label="± residual",
    )
    if math.isfinite(measurement.threshold) and not measurement.threshold_preconditioned:
        ax.axhline(
            measurement.threshold,
            color=_DENSITY,
            linestyle="--",
            label=f"threshold {measurement.threshold_formula}",
        )
    return _of_eigenvalues(ax, index, f"Eigenvalues at step {measurement.step}")


def _of_eigenvalues(ax: Axes, index: np.ndarray, title: str) -> Axes:
    ax.axhline(0.0, color=_GREY, linewidth=0.8)
    ax.set_xlim(0.4, len(index) + 0.6)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("index")
    ax.set_ylabel("eigenvalue")
    _plain_legend(ax)
    _finish(ax, title)
    return ax


def plot_diagonal(diagonal: DiagonalEstimate, ax: Axes | None = None) -> Axes:
    """The mean of the diagonal over each module, with its interval; of a matrix its entries."""
    ax = _axes(ax)
    how = "exact" if diagonal.exact else f"{diagonal.probes} probes"
    means = diagonal.module_traces("module", mean=True)
    if len(means) < 2:
        values, errors = (
            np.asarray(part.cpu() if isinstance(part, Tensor) else part, dtype=np.float64)
            for part in (diagonal.values, diagonal.standard_errors)
        )
        ax.errorbar(
            np.arange(len(values)),
            values,
            yerr=None if diagonal.exact else errors,
            fmt=".",
            color=_MEAN,
            elinewidth=0.8,
            label="entry" if diagonal.exact else "± standard error",
        )
        ax.set_xlabel("place")
        ax.set_ylabel("entry of the diagonal")
        _plain_legend(ax)
        _finish(ax, f"Diagonal ({how})")
        return ax
    # Of many those of largest mean, in the order of the model.
    order = sorted(means, key=lambda name: -abs(means[name].value))[:_MOST_COLUMNS]
    names = [name for name in means if name in order]
    label = "" if diagonal.exact else f"{diagonal.probes} probes"
    _draw_bars(ax, {name: means[name] for name in names}, diagonal.confidence, label)
    left = len(means) - len(names)
    ax.set_xlabel("mean of the diagonal" + (f" ({left} smaller ones left out)" if left else ""))
    _finish(ax, f"Diagonal by module ({how})")
    ax.grid(visible=False, axis="y")
    return ax


def _draw_bars(ax: Axes, estimates: dict[str, Estimate], confidence: float, probes: str) -> None:
    """A bar for each, with its interval where `probes` says where that is from."""
    places = np.arange(len(estimates))
    values = np.array([estimate.value for estimate in estimates.values()])
    ends = np.array([estimate.interval() for estimate in estimates.values()])
    ax.barh(places, values, height=min(0.7, 0.15 * len(places)), color=_MEAN, alpha=0.6)
    if probes and np.isfinite(ends).all():
        ax.errorbar(
            values,
            places,
            xerr=[values - ends[:, 0], ends[:, 1] - values],
            fmt="none",
            ecolor="#333333",
            elinewidth=1.0,
            capsize=2.5,
            label=f"{100 * confidence:g}% interval, {probes}",
        )
        ax.legend(loc="best", fontsize="small")
    ax.axvline(0.0, color=_GREY, linewidth=0.8)
    # From the top, as the model is read.
    ax.set_ylim(len(places) - 0.4, -0.6)
    _name_rows(ax, list(estimates))


def plot_preflight(preflight: Preflight, ax: Axes | None = None) -> Axes:
    """What each check measured, over the largest value that passes."""
    ax = _axes(ax)
    colours = {"ok": _MEAN, "note": _DENSITY, "warning": "#E69F00", "error": _EIGENVALUES}
    found = [f for f in preflight.findings if f.measured is not None and f.limit]
    tiny = np.finfo(np.float64).tiny
    ratios = [max(f.measured or 0.0, tiny) / (f.limit or 1.0) for f in found]
    shown = [max(ratio, 1e-8) if math.isfinite(ratio) else 1e8 for ratio in ratios]
    places = np.arange(len(found))
    ax.scatter(shown, places, color=[colours[f.level] for f in found], zorder=3)
    ax.axvline(1.0, color=_GREY, linestyle="--", linewidth=1.0)
    ax.set_xscale("log")
    ax.set_ylim(max(len(found), 1) - 0.4, -0.6)
    _name_rows(ax, [f"{f.check} ({f.level})" for f in found])
    ax.set_xlabel("measured, over the limit (dashed)")
    worst = len(preflight.problems)
    _finish(ax, f"Preflight: {'all checks passed' if not worst else f'{worst} problems'}")
    return ax


def plot_solution(solution: Solution, ax: Axes | None = None) -> Axes:
    """How large the entries of the solution are."""
    ax = _axes(ax)
    x = solution.x.cpu() if isinstance(solution.x, Tensor) else solution.x
    sizes = np.abs(np.asarray(x, dtype=np.float64))
    nonzero = sizes[sizes > 0]
    if len(nonzero):
        low, high = math.log10(nonzero.min()), math.log10(nonzero.max())
        edges = np.logspace(low, max(high, low + 1e-3), 41)
        # The largest itself, whatever its logarithm was rounded to.
        edges[0], edges[-1] = min(edges[0], nonzero.min()), max(edges[-1], nonzero.max())
        ax.hist(nonzero, bins=edges.tolist(), color=_DENSITY, alpha=0.7)
        ax.set_xscale("log")
    zeros = len(sizes) - len(nonzero)
    ax.set_xlabel("|entry of x|" + (f" ({zeros:,} are zero)" if zeros else ""))
    ax.set_ylabel("entries")
    verdict = "" if solution.converged else ", not converged"
    _finish(ax, f"Solution, residual {solution.relative_residual:.2g} of ‖b‖{verdict}")
    return ax


_DRAW: dict[type, Callable[..., Axes]] = {
    Eigenpairs: plot_eigenpairs,
    SpectralDensity: plot_density,
    Estimate: plot_estimate,
    BlockTraces: plot_blocks,
    BlockSpectra: plot_block_spectra,
    BlockCoupling: plot_coupling,
    Landscape: plot_landscape,
    Trajectory: plot_trajectory,
    Analysis: plot_analysis,
    DataSpread: plot_data_spread,
    DiagonalEstimate: plot_diagonal,
    Measurement: plot_measurement,
    Preflight: plot_preflight,
    Solution: plot_solution,
}


def _axes(ax: Axes | None) -> Axes:
    if ax is None:
        # Only here: whoever passes Axes needs no backend.
        from matplotlib import pyplot

        figure = pyplot.figure(figsize=FIGURE_SIZE, layout="constrained")
        return figure.add_subplot()
    if not isinstance(ax, Axes):
        msg = (
            f"ax is a {type(ax).__name__}; expected one matplotlib Axes, as figure.add_subplot() "
            "returns it, or None for a new figure"
        )
        raise ArgumentTypeError(msg)
    return ax


def _check_scale(scale: str | None, *others: None) -> None:
    if scale not in {"linear", "symlog", *others}:
        msg = f"scale={scale!r}; expected 'linear' or 'symlog'"
        raise ArgumentError(msg)


def _name_rows(ax: Axes, names: Sequence[str]) -> None:
    """The names of rows 0, 1, …, beside the vertical axis."""
    # A $ in a name is no formula.
    shown = [short_name(name or "(itself)", _LONGEST_NAME) for name in names]
    ax.set_yticks(np.arange(len(names)), shown, parse_math=False)
    ax.tick_params(axis="y", length=0, labelsize="small" if len(names) <= 15 else "xx-small")


def _finish(ax: Axes, title: str) -> None:
    ax.set_title(printable(title), loc="left", fontsize="medium", parse_math=False)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(visible=True, which="major", color=_GREY, alpha=0.2, linewidth=0.6)
    ax.set_axisbelow(True)


# --- blocks --------------------------------------------------------------------------------------


class MassMap(NamedTuple):
    """Names of rows (layers), eigenvalues of columns, and shares (rows, columns) of each."""

    names: list[str]
    eigenvalues: np.ndarray
    shares: np.ndarray


def mass_map(blocks: BlockTraces) -> MassMap:
    """What of the squared length of each eigenvector lies in each layer: columns add up to one."""
    rows, others = blocks.mass_table()
    rows = [*rows, others] if others else rows
    # In their own order, which is the descending one of the eigenvalues.
    order = np.argsort(-np.abs(blocks.eigenvalues), kind="stable")[:_MOST_COLUMNS]
    columns = np.sort(order)
    shares = np.array([row.masses[columns] for row in rows])
    return MassMap([row.name for row in rows], blocks.eigenvalues[columns], shares)


def _plot_masses(blocks: BlockTraces, ax: Axes | None) -> Axes:
    if not len(blocks.eigenvalues):
        msg = "no eigenvectors were computed, so none of their mass can be drawn"
        raise ArgumentError(msg)
    ax = _axes(ax)
    names, values, shares = mass_map(blocks)
    percent = 100 * shares
    image = ax.imshow(percent, vmin=0.0, vmax=percent.max(), cmap="cividis", aspect="auto")
    ax.figure.colorbar(image, ax=ax, label="% of the squared length")
    small = "small" if max(2 * len(names), 3 * len(values)) <= 36 else "xx-small"
    if len(values) <= _NUMBERED_COLUMNS:
        for (row, column), share in np.ndenumerate(percent):
            # Cividis is dark at its lower end.
            dark = share < 0.55 * percent.max()
            colour = "white" if dark else "black"
            ax.text(
                column, row, _percent(share), color=colour, fontsize=small, ha="center", va="center"
            )
    _name_rows(ax, names)
    ax.set_xticks(np.arange(len(values)), [f"{value:.3g}" for value in values])
    ax.tick_params(axis="x", length=0, labelsize=small, labelrotation=0 if len(values) < 7 else 90)
    ax.set_xlabel("eigenvalue λ of the eigenvector")
    found = len(blocks.eigenvalues)
    count = f"{found}" if found == len(values) else f"{len(values)} of {found}"
    noun = "eigenvector" if found == 1 else "eigenvectors"
    _finish(ax, f"In which {blocks.grouping}s {count} {noun} lie")
    ax.grid(visible=False)
    return ax


def _percent(share: float) -> str:
    if share >= 9.95:
        return f"{share:.0f}"
    return f"{share:.1f}" if share >= 0.05 else "0"


# --- eigenpairs ----------------------------------------------------------------------------------


def scale_of(pairs: Eigenpairs) -> Literal["linear", "symlog"]:
    """A symmetric-logarithmic axis where a linear one would flatten the small values."""
    return "linear" if _linear_within(pairs.values, pairs.residuals) is None else "symlog"


def _linear_within(values: np.ndarray, residuals: np.ndarray) -> float | None:
    """Up to where a symmetric-logarithmic axis is linear; None where all of it had better be."""
    smallest = _smallest(values, residuals)
    if float(np.abs(values).max()) <= _MANY_TIMES * smallest:
        return None
    return _order_of_smallest(values, residuals)


def _smallest(values: np.ndarray, residuals: np.ndarray) -> float:
    sizes = np.abs(values)
    # Below its residual, or a millionth of the largest, a value's order of magnitude says nothing.
    return max(float(sizes.min()), float(residuals.max()), 1e-6 * float(sizes.max()))


def _order_of_smallest(values: np.ndarray, residuals: np.ndarray) -> float:
    """The power of ten below all values whose order of magnitude says something."""
    smallest = _smallest(values, residuals)
    # Nothing but zeros has no order of magnitude.
    return 10.0 ** math.floor(math.log10(smallest)) if smallest > 0 else 1.0


def _draw_pairs(ax: Axes, pairs: Eigenpairs, index: np.ndarray) -> None:
    """Stems with residuals as error bars; hollow markers where a pair did not converge."""
    good = pairs.converged
    size = 6.0 if len(pairs) <= 40 else 3.0
    ax.vlines(index, 0.0, pairs.values, colors=_EIGENVALUES, linewidth=size / 4, alpha=0.5)
    for chosen, face, label in (
        (good, _EIGENVALUES, "eigenvalue ± residual"),
        (~good, ax.get_facecolor(), f"not converged ({int((~good).sum())} of {len(pairs)})"),
    ):
        if chosen.any():
            ax.errorbar(
                index[chosen],
                pairs.values[chosen],
                yerr=pairs.residuals[chosen],
                fmt="o",
                color=_EIGENVALUES,
                markerfacecolor=face,
                markersize=size,
                capsize=size / 2,
                label=label,
            )


def _draw_certificate(ax: Axes, pairs: Eigenpairs) -> None:
    """Shade where all the other eigenvalues are, with the stated probability."""
    above, below = pairs.no_eigenvalue_above, pairs.no_eigenvalue_below
    if above is None and below is None:
        return
    bottom, top = ax.get_ylim()
    for bound in (above, below):
        if bound is not None:
            ax.axhline(bound, color=_GREY, linewidth=1.0, linestyle="--")
            bottom, top = min(bottom, 1.3 * bound), max(top, 1.3 * bound)
    ax.axhspan(
        bottom if below is None else below,
        top if above is None else above,
        facecolor=_GREY,
        alpha=0.15,
        edgecolor="none",
        label=f"all other eigenvalues, with {100 * pairs.certificate_confidence:g}% probability",
    )
    ax.set_ylim(bottom, top)


# --- densities -----------------------------------------------------------------------------------


def _check_density_options(scale: str, width: float | None, confidence: float) -> None:
    _check_scale(scale)
    if width is not None and not width > 0:
        msg = f"width={width}; expected a positive width, or None to follow the nodes' spacing"
        raise ArgumentError(msg)
    check_confidence(confidence)


def _effort(density: SpectralDensity) -> str:
    if density.steps == 0:
        return "all eigenvalues known"
    probes = "1 probe" if density.probes == 1 else f"{density.probes} probes"
    return f"{probes} × {density.steps} {'step' if density.steps == 1 else 'steps'}"


def _resolution_near_zero(density: SpectralDensity, width: float | None) -> float:
    """Where an axis turns from linear to logarithmic, to one digit so that it can be named."""
    live = density.weights > 0
    largest = max(map(abs, density.support)) or 1.0
    if live.any():
        places, widths = np.abs(density.nodes[live]), density.widths[live]
        nearest = int(places.argmin())
        # Where nothing is near zero there is nothing to resolve there.
        x0 = max(float(widths[nearest]) if width is None else width, 0.1 * places[nearest])
    else:
        x0 = 0.1 * min(np.abs(density.atoms[density.atoms != 0]), default=largest)
    return float(f"{min(max(x0, 1e-6 * largest), largest):.0e}")


@dataclass(frozen=True)
class _Curve:
    """Mean densities within narrow bins, per unit of the axis.

    Attributes
    ----------
    edges, centres
        (bins + 1,) and (bins,), in λ.
    samples
        (probes, bins).
    widths
        Of the narrowest and of the widest Gaussian.
    """

    edges: np.ndarray
    centres: np.ndarray
    samples: np.ndarray
    widths: tuple[float, float]

    @property
    def mean(self) -> np.ndarray:
        mean: np.ndarray = self.samples.mean(axis=0)
        return mean

    def range_above(self, floor: float) -> np.ndarray:
        """Where the visible part begins and ends."""
        seen = np.flatnonzero(self.mean > min(floor, self.mean.max() / 2))
        ends, whole = self.edges[[seen[0], seen[-1] + 1]], self.edges[[0, -1]]
        # A single peak needs room around it to be one.
        return whole if np.ptp(ends) < 0.02 * np.ptp(whole) else ends


def _curve(density: SpectralDensity, width: float | None, x0: float, scale: str) -> _Curve | None:
    """What each probe's broadened nodes have in narrow bins; None where there are no nodes."""
    if not (density.weights > 0).any():
        return None
    widths = density.widths if width is None else np.full_like(density.nodes, width)
    edges = _bin_edges(density, widths, x0, scale)
    shares = density.histogram(edges, width)
    used = widths[density.weights > 0]
    ends = (float(used.min()), float(used.max()))
    if scale == "linear":
        return _Curve(edges, (edges[1:] + edges[:-1]) / 2, shares / np.diff(edges), ends)
    places = np.arcsinh(edges / x0)
    centres = x0 * np.sinh((places[1:] + places[:-1]) / 2)
    return _Curve(edges, centres, shares / np.diff(places), ends)


class DrawnDensity(NamedTuple):
    """The curve of a figure: edges (bins + 1,) in λ, and (bins,) its mean and 95% band."""

    edges: np.ndarray
    centres: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def density_drawn(
    density: SpectralDensity, scale: Literal["linear", "symlog"] = "linear"
) -> DrawnDensity | None:
    """What `plot_density` draws per unit of its axis; None where there are no nodes."""
    curve = _curve(density, None, _resolution_near_zero(density, None), scale)
    if curve is None:
        return None
    return DrawnDensity(curve.edges, curve.centres, curve.mean, *_band(curve, 0.95, 0.0))


def _bin_edges(density: SpectralDensity, widths: np.ndarray, x0: float, scale: str) -> np.ndarray:
    """Bins over the broadened nodes: even in asinh(λ / x0), or even in λ and finer in the bulk."""
    live = density.weights > 0
    # Beyond five widths a node has less than a millionth of its weight.
    nodes, margin = density.nodes[live], 5 * widths[live]
    low, high = (nodes - margin).min(), (nodes + margin).max()
    if high - low < 1e-6 * max(abs(low), abs(high), x0):
        # All nodes in one place, as for a multiple of the identity.
        room = 0.05 * float(np.abs(nodes).max()) or 1.0
        low, high = low - room, high + room
    if scale == "symlog":
        return x0 * np.sinh(np.linspace(np.arcsinh(low / x0), np.arcsinh(high / x0), 801))
    left, right = np.clip(_bulk(density), low, high)
    if right - left < 1e-6 * (high - low):
        left, right = low, high
    parts = [np.linspace(left, right, 601)]
    for start, stop in ((low, left), (right, high)):
        count = math.ceil(400 * (stop - start) / (high - low))
        parts.append(np.linspace(start, stop, count + 1) if count else np.zeros(0))
    return np.unique(np.concatenate(parts))


def _draw_curve(ax: Axes, curve: _Curve, confidence: float, floor: float) -> None:
    """Mean over probes as a line through the bins' centres, and Student's band around it."""
    mean = curve.mean
    if len(curve.samples) > 1:
        ax.fill_between(
            curve.centres,
            *_band(curve, confidence, floor),
            color=_DENSITY,
            alpha=0.25,
            linewidth=0,
            label=f"{100 * confidence:g}% band over probes",
        )
    narrow, wide = (f"{width:.1g}" for width in curve.widths)
    width = narrow if narrow == wide else f"{narrow} to {wide}"
    label = f"broadened density (width {width})"
    ax.plot(curve.centres, mean, color=_DENSITY, linewidth=1.3, label=label)


def _band(curve: _Curve, confidence: float, floor: float) -> tuple[np.ndarray, np.ndarray]:
    """Student's band around the mean over probes; the mean itself where there is one probe."""
    probes, mean = len(curve.samples), curve.mean
    half = np.zeros_like(mean)
    if probes > 1:
        quantile = stats.t.ppf(0.5 + confidence / 2, probes - 1)
        half = quantile * curve.samples.std(axis=0, ddof=1) / math.sqrt(probes)
    # A logarithmic axis has no place for 0.
    return np.maximum(mean - half, floor / 10), np.maximum(mean + half, floor / 10)


def _draw_atoms(ax: Axes, density: SpectralDensity, *, fixed: bool) -> None:
    """Outliers as lollipops: of height 1/n, or of a fixed one where the axis is per unit of λ."""
    atoms = density.atoms
    if not len(atoms):
        return
    # All have the same mass, so on an axis of another quantity the height has nothing to tell.
    transform = ax.get_xaxis_transform() if fixed else ax.transData
    foot, head = (0.0, STEM) if fixed else (ax.get_ylim()[0], 1 / density.n)
    ax.vlines(atoms, foot, head, colors=_EIGENVALUES, linewidth=1.0, transform=transform)
    noun = "outlier" if density.steps else "eigenvalue"
    noun += ", of mass" if len(atoms) == 1 else "s, each of mass"
    ax.plot(
        atoms,
        np.full(len(atoms), head),
        "o",
        color=_EIGENVALUES,
        markersize=4.5,
        transform=transform,
        label=f"{len(atoms)} {noun} 1/n",
    )


def _limit(ax: Axes, drawn: np.ndarray, x0: float | None) -> None:
    """Limits around all that is drawn, with a margin that is even on the screen."""
    places = drawn if x0 is None else np.arcsinh(drawn / x0)
    low, high = float(places.min()), float(places.max())
    margin = 0.03 * (high - low) or 0.1 * abs(high) or 1.0
    limits = np.array([low - margin, high + margin])
    ax.set_xlim(*(limits if x0 is None else x0 * np.sinh(limits)))


def _tick_symlog(ax: Axes, x0: float) -> None:
    """Ticks at 0 and at powers of ten, as many as there is room for; without decades, even ones."""
    low, high = ax.get_xlim()
    first = math.ceil(math.log10(2 * x0))
    last = math.floor(math.log10(max(abs(low), abs(high))))
    stride = max(1, math.ceil((last - first + 1) / 5))
    powers = 10.0 ** np.arange(last, first - 1.0, -stride)
    ticks = [t for t in [*-powers, 0.0, *powers[::-1]] if low <= t <= high]
    if len(ticks) < 4:
        ax.xaxis.set_major_locator(MaxNLocator(nbins=5))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(ScalarFormatter())
        return
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _power_of_ten(x)))
    between = np.outer(10.0 ** np.arange(first, last + 1.0), np.arange(1, 10)).ravel()
    ax.xaxis.set_minor_locator(FixedLocator([*-between, *between]))
    ax.xaxis.set_minor_formatter(NullFormatter())


def _power_of_ten(x: float) -> str:
    if x == 0:
        return "0"
    return f"${'-' if x < 0 else ''}10^{{{round(math.log10(abs(x)))}}}$"


def _draw_inset(ax: Axes, density: SpectralDensity, curve: _Curve, confidence: float) -> bool:
    """The bulk on linear axes, in the empty part of the figure, if outliers leave it no width."""
    low, high = ax.get_xlim()
    left, right = _bulk(density)
    # Of one or two nodes the inset would show nothing but the kernel.
    most = (density.weights > 0).sum(axis=1).max()
    if most <= 2 or right - left > _NARROW * (high - low):
        return False
    before, after = (left - low) / (high - low), (high - right) / (high - low)
    span = max(before, after) - 0.2
    if span < 0.25:
        return False
    inset = ax.inset_axes((1 - after + 0.17 if after >= before else 0.12, 0.5, span, 0.39))
    _draw_curve(inset, curve, confidence, floor=0.0)
    inset.set_xlim(left, right)
    inside = (curve.edges[1:] > left) & (curve.edges[:-1] < right)
    inset.set_ylim(0.0, 1.15 * curve.mean[inside].max())
    inset.tick_params(labelsize="small")
    _finish(inset, "")
    inset.set_title("the bulk, on linear axes", loc="left", fontsize="small")
    return True


def _bulk(density: SpectralDensity) -> tuple[float, float]:
    """Where all but a hundredth of the nodes' weight lies, with a margin."""
    live = density.weights > 0
    nodes, weights, widths = density.nodes[live], density.weights[live], density.widths[live]
    order = np.argsort(nodes)
    cumulative = np.cumsum(weights[order]) / weights.sum()
    low, high = order[np.searchsorted(cumulative, [0.005, 0.995])]
    return (float(nodes[low] - 2 * widths[low]), float(nodes[high] + 2 * widths[high]))


# --- estimates -----------------------------------------------------------------------------------


def _described(estimate: Estimate, interval: tuple[float, float], level: float) -> str:
    """The final value with its error, in words."""
    low, high = (f"{end:.6g}" for end in interval)
    if estimate.exact:
        error = "exact"
    elif not all(map(math.isfinite, interval)):
        error = "no interval from fewer than two probes"
    elif low == high:
        error = f"within {max(estimate.value - interval[0], interval[1] - estimate.value):.1g}"
    else:
        error = f"{100 * level:g}% interval {low} to {high}"
    return f"{estimate.value:.6g} ({error})"


def _draw_running(ax: Axes, estimate: Estimate, level: float, label: str) -> None:
    value, low, high = estimate.running(level)
    count = np.arange(2, len(estimate.samples) + 1)
    ax.fill_between(
        count, low, high, color=_MEAN, alpha=0.25, linewidth=0, label=f"{100 * level:g}% interval"
    )
    ax.plot(count, value, color=_MEAN, label="mean over the probes so far")
    ax.errorbar(
        count[-1:],
        value[-1:],
        yerr=[value[-1:] - low[-1:], high[-1:] - value[-1:]],
        fmt="o",
        color=_MEAN,
        capsize=4,
        label=label,
    )
    ax.axhline(estimate.value, color=_GREY, linewidth=0.8, linestyle=":")
    # With one degree of freedom the band is 13 standard errors wide: it would flatten the rest.
    settled = min(2 + len(count) // 10, len(count) - 1)
    bottom, top = min(value.min(), low[settled:].min()), max(value.max(), high[settled:].max())
    margin = 0.08 * (top - bottom) or 0.1 * abs(top) or 1.0
    ax.set_ylim(bottom - margin, top + margin)
    ax.ticklabel_format(axis="y", useOffset=False)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("number of random probes")
    ax.set_ylabel(short_name(estimate.quantity), parse_math=False)


def _draw_point(ax: Axes, estimate: Estimate, interval: tuple[float, float], label: str) -> None:
    """One value on a number line, with its interval if it has a finite one."""
    low, high = interval if all(map(math.isfinite, interval)) else (estimate.value,) * 2
    # Rounding may put an exact value outside its interval by one unit in the last place.
    error = [[max(estimate.value - low, 0.0)], [max(high - estimate.value, 0.0)]]
    ax.errorbar([estimate.value], [0.0], xerr=error, fmt="o", color=_MEAN, capsize=4, label=label)
    ax.set_ylim(-1.0, 1.0)
    ax.yaxis.set_major_locator(NullLocator())
    # At least a thousandth to each side: an interval of rounding errors has no ticks to read.
    margin = max(0.25 * (high - low), 1e-3 * abs(estimate.value)) or 1.0
    ax.set_xlim(low - margin, high + margin)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5))
    ax.ticklabel_format(axis="x", useOffset=False)
    ax.set_xlabel(short_name(estimate.quantity), parse_math=False)
