"""What is drawn is what the result holds: values, bands, masses, and what did not converge."""

from __future__ import annotations

import dataclasses
import io
import re

import matplotlib
import matplotlib.style
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from torch import nn

import spectra
from spectra.errors import ArgumentError, ArgumentTypeError
from spectra.report import plots
from spectra.results import Result
from tests.cases.matrices import Diagonal, Layered, dense, s1, s4, semicircle
from tests.cases.networks import tanh_mlp, wine


@pytest.fixture(autouse=True)
def _matplotlib_is_left_as_it_was():
    before = settings()
    yield
    assert settings() == before


@pytest.fixture
def ax():
    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    yield axes
    # Locators, formatters and log scales raise when something is drawn, not before.
    figure.canvas.draw()


@pytest.fixture(scope="module")
def pairs():
    return spectra.eigsh(Diagonal(s1(400)), 10, progress=False)


@pytest.fixture(scope="module")
def density(pairs):
    return spectra.spectral_density(
        Diagonal(s1(400)), steps=30, probes=3, deflate=pairs, progress=False
    )


@pytest.fixture(scope="module")
def trace(pairs):
    return spectra.trace(Diagonal(s1(400)), deflate=pairs, rtol=0.01, progress=False)


@pytest.fixture(scope="module")
def blocks():
    sizes = {f"layers.{i}.{name}": 2 for i in range(40) for name in ("weight", "bias")}
    h = Layered(dense(s1(160)), sizes)
    return spectra.analyze(h, 3, steps=10, rtol=0.3, progress=False).blocks


@pytest.fixture(scope="module")
def block_spectra():
    return spectra.block_spectra(perceptron(), rtol=0.3)


@pytest.fixture(scope="module")
def coupling():
    return spectra.block_coupling(perceptron())


@pytest.fixture(scope="module")
def unconverged():
    pairs = spectra.eigsh(Diagonal(semicircle(400)), 8, max_matvecs=50, progress=False)
    assert 0 < pairs.converged.sum() < 8
    return pairs


def perceptron() -> spectra.HessianOperator:
    loss = spectra.losses.supervised(nn.CrossEntropyLoss())
    torch.manual_seed(0)
    return spectra.HessianOperator(tanh_mlp(), loss, [wine()])


def settings() -> dict:
    # Which backend draws is decided on the first use of pyplot, whoever that is.
    return {name: value for name, value in matplotlib.rcParams.items() if name != "backend"}


def integral(y: np.ndarray, x: np.ndarray) -> float:
    return float((np.diff(x) * (y[1:] + y[:-1]) / 2).sum())


def stems(ax: Axes) -> LineCollection:
    """The stems: the first collection of lines that was drawn."""
    return next(c for c in ax.collections if isinstance(c, LineCollection))


def segments(lines: LineCollection) -> np.ndarray:
    return np.array([path.vertices for path in lines.get_paths()])


def labelled(ax: Axes, text: str):
    handles, labels = ax.get_legend_handles_labels()
    matches = [handle for handle, label in zip(handles, labels, strict=True) if text in label]
    assert len(matches) == 1, f"{text!r} in {labels}"
    return matches[0]


def legend(ax: Axes) -> str:
    return " | ".join(text.get_text() for text in ax.get_legend().get_texts())


def title(ax: Axes) -> str:
    return ax.get_title(loc="left")


def heights(ax: Axes, text: str) -> tuple[float, float]:
    """Lower and upper end of a shaded range."""
    span = labelled(ax, text)
    corners = span.get_patch_transform().transform(span.get_path().vertices)
    return corners[:, 1].min(), corners[:, 1].max()


def curve_of(ax: Axes) -> tuple[np.ndarray, np.ndarray]:
    line = labelled(ax, "broadened density")
    return np.asarray(line.get_xdata()), np.asarray(line.get_ydata())


def band_of(ax: Axes, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper end of the band at the places x that it was drawn at."""
    (band,) = [c for c in ax.collections if isinstance(c, PolyCollection)]
    vertices = band.get_paths()[0].vertices
    ends = [vertices[np.isclose(vertices[:, 0], place, rtol=1e-12, atol=0), 1] for place in x]
    return np.array([e.min() for e in ends]), np.array([e.max() for e in ends])


# --- eigenpairs ----------------------------------------------------------------------------------


def test_stems_end_at_the_eigenvalues(ax, pairs):
    assert plots.plot_eigenpairs(pairs, ax) is ax
    drawn = segments(stems(ax))
    np.testing.assert_array_equal(drawn[:, 1, 0], np.arange(1, 11))
    np.testing.assert_array_equal(drawn[:, 0, 1], 0.0)
    np.testing.assert_array_equal(drawn[:, 1, 1], pairs.values)


def test_error_bars_are_the_residuals(ax, unconverged):
    plots.plot_eigenpairs(unconverged, ax)
    for text, chosen in (
        ("± residual", unconverged.converged),
        ("not converged", ~unconverged.converged),
    ):
        bars = segments(labelled(ax, text).lines[2][0])
        np.testing.assert_allclose(bars[:, :, 1], unconverged.intervals[chosen])


def test_unconverged_pairs_are_hollow_and_said(ax, unconverged):
    plots.plot_eigenpairs(unconverged, ax)
    missed = int((~unconverged.converged).sum())
    hollow = labelled(ax, f"not converged ({missed} of 8)").lines[0]
    filled = labelled(ax, "± residual").lines[0]
    np.testing.assert_array_equal(hollow.get_ydata(), unconverged.values[~unconverged.converged])
    np.testing.assert_array_equal(filled.get_ydata(), unconverged.values[unconverged.converged])
    assert to_rgba(hollow.get_markerfacecolor()) == to_rgba(ax.get_facecolor())
    assert to_rgba(filled.get_markerfacecolor()) != to_rgba(ax.get_facecolor())
    assert title(ax).endswith(f"{missed} did not converge")


def test_where_all_converged_nothing_is_said_of_it(ax, pairs):
    plots.plot_eigenpairs(pairs, ax)
    assert "converge" not in title(ax) + legend(ax)
    assert title(ax) == "10 eigenvalues (largest in magnitude) of n = 400"


def test_the_certificate_is_shaded_between_its_bounds(ax, pairs):
    plots.plot_eigenpairs(pairs, ax)
    low, high = pairs.no_eigenvalue_below, pairs.no_eigenvalue_above
    drawn = heights(ax, "all other eigenvalues, with 99% probability")
    assert drawn == pytest.approx((low, high))
    assert ax.get_ylim()[0] < low
    assert high < ax.get_ylim()[1]


@pytest.mark.parametrize("which", ["LA", "SA"])
def test_a_certificate_for_one_end_shades_to_the_frame(ax, which):
    pairs = spectra.eigsh(Diagonal(s4(200)), 4, which=which, progress=False)
    plots.plot_eigenpairs(pairs, ax)
    bottom, top = ax.get_ylim()
    ends = {"LA": (bottom, pairs.no_eigenvalue_above), "SA": (pairs.no_eigenvalue_below, top)}
    assert heights(ax, "all other eigenvalues") == pytest.approx(ends[which])


def test_without_other_eigenvalues_nothing_is_shaded(ax):
    plots.plot_eigenpairs(spectra.eigsh(np.diag([3.0, 1.0, -2.0]), 3, progress=False), ax)
    assert legend(ax) == "eigenvalue ± residual"


@pytest.mark.parametrize(
    ("values", "scale"),
    [([3.0, 2.0, 1.0], "linear"), ([3.0, -2.0, 1.0], "linear"), ([300.0, -20.0, 1.0], "symlog")],
)
def test_the_axis_is_logarithmic_where_values_span_decades(ax, values, scale):
    pairs = spectra.eigsh(np.diag([*values, *[0.0] * 5]), 3, progress=False)
    plots.plot_eigenpairs(pairs, ax)
    assert ax.get_yscale() == scale


@pytest.mark.parametrize("values", [[3.0, 2.0, 1.0], [300.0, -20.0, 1.0], [0.0, 0.0, 0.0]])
@pytest.mark.parametrize("scale", ["linear", "symlog"])
def test_another_scale_can_be_asked_for(ax, values, scale):
    pairs = spectra.eigsh(np.diag([*values, *[0.0] * 5]), 3, progress=False)
    assert pairs.plot(ax, scale=scale).get_yscale() == scale
    assert segments(stems(ax))[:, 1, 1] == pytest.approx(pairs.values)
    with pytest.raises(ArgumentError, match="expected 'linear' or 'symlog'"):
        pairs.plot(ax, scale="log")


# --- densities -----------------------------------------------------------------------------------


def test_the_linear_curve_integrates_to_what_was_not_deflated(ax, density):
    assert plots.plot_density(density, ax) is ax
    assert integral(*curve_of(ax)[::-1]) == pytest.approx(1 - 10 / 400, rel=1e-4)


def test_the_symlog_curve_has_the_same_mass_per_unit_of_its_axis(ax, density):
    plots.plot_density(density, ax, scale="symlog")
    assert ax.get_xscale() == "asinh"
    x0 = ax.xaxis.get_transform().linear_width
    x, y = curve_of(ax)
    assert integral(y, np.arcsinh(x / x0)) == pytest.approx(1 - 10 / 400, rel=1e-4)
    # Without the Jacobian, sqrt(x² + x0²), it is the density per unit of λ.
    expected = density.density(x) * np.hypot(x, x0)
    np.testing.assert_allclose(y, expected, atol=0.03 * y.max())


def test_the_linear_curve_is_the_broadened_density(ax, density):
    plots.plot_density(density, ax)
    x, y = curve_of(ax)
    np.testing.assert_allclose(y, density.density(x), atol=0.01 * y.max())


@pytest.mark.parametrize("scale", ["linear", "symlog"])
def test_the_band_holds_the_curve_and_is_students(ax, density, scale):
    plots.plot_density(density, ax, scale=scale, confidence=0.9)
    x, y = curve_of(ax)
    assert "90% band over probes" in legend(ax)
    low, high = band_of(ax, x)
    visible = y > ax.get_ylim()[0]
    assert (low[visible] <= y[visible]).all()
    assert (y[visible] <= high[visible]).all()
    if scale == "linear":
        expected = density.band(x, confidence=0.9)[1]
        np.testing.assert_allclose(high[visible], expected[visible], atol=0.02 * y.max())


def test_one_probe_has_no_band(ax):
    density = spectra.spectral_density(dense(semicircle(50)), steps=10, probes=1, progress=False)
    plots.plot_density(density, ax)
    assert re.fullmatch(r"broadened density \(width \S+ to \S+\)", legend(ax))
    assert not any(isinstance(c, PolyCollection) for c in ax.collections)
    assert "1 probe × 10 steps" in title(ax)


@pytest.mark.parametrize("scale", ["linear", "symlog"])
def test_outliers_stand_at_the_deflated_eigenvalues(ax, density, scale):
    plots.plot_density(density, ax, scale=scale)
    markers = labelled(ax, "10 outliers, each of mass 1/n")
    np.testing.assert_array_equal(markers.get_xdata(), density.atoms)
    np.testing.assert_array_equal(segments(stems(ax))[:, 0, 0], density.atoms)
    low, high = ax.get_xlim()
    assert low < density.atoms.min()
    assert density.atoms.max() < high
    if scale == "symlog":
        np.testing.assert_allclose(markers.get_ydata(), 1 / 400)


def test_a_width_is_used_as_it_is_given(ax, density):
    plots.plot_density(density, ax, width=0.1)
    x, y = curve_of(ax)
    np.testing.assert_allclose(y, density.density(x, width=0.1), atol=1e-3 * y.max())


@pytest.mark.parametrize("scale", ["linear", "symlog"])
def test_peaks_much_narrower_than_the_axis_keep_their_mass(ax, density, scale):
    plots.plot_density(density, ax, scale=scale, width=1e-7)
    x, y = curve_of(ax)
    if scale == "symlog":
        x = np.arcsinh(x / ax.xaxis.get_transform().linear_width)
    assert integral(y, x) == pytest.approx(1 - 10 / 400, rel=1e-2)


def test_outliers_leave_the_bulk_an_inset_of_its_own(ax, density):
    plots.plot_density(density, ax)
    (inset,) = ax.child_axes
    low, high = inset.get_xlim()
    assert low < 0
    assert 0.2 < high < 1
    assert inset.get_yscale() == "linear"


def test_a_bulk_that_fills_the_axis_needs_no_inset(ax):
    density = spectra.spectral_density(dense(semicircle(100)), steps=20, probes=2, progress=False)
    plots.plot_density(density, ax)
    assert not ax.child_axes


@pytest.mark.parametrize("scale", ["linear", "symlog"])
def test_scaling_the_matrix_scales_the_picture(scale):
    # A power of two, so that rounding is the same.
    factor = 2.0**-20
    axes = []
    for scaled in (1.0, factor):
        density = spectra.spectral_density(
            Diagonal(scaled * s1(200)), steps=20, probes=2, progress=False
        )
        axes.append(plots.plot_density(density, Figure().add_subplot(), scale=scale))
    (x, y), (x_scaled, y_scaled) = map(curve_of, axes)
    if scale == "symlog":
        # x0 has one digit, so the bins are others; the densities are pure numbers.
        at = np.linspace(0.1, 90, 50)
        y, y_scaled = np.interp(at, x, y), np.interp(at, x_scaled / factor, y_scaled)
        np.testing.assert_allclose(y_scaled, y, atol=0.05 * y.max())
    else:
        np.testing.assert_allclose(x_scaled, factor * x, rtol=1e-9, atol=1e-12 * factor)
        np.testing.assert_allclose(factor * y_scaled, y, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("scale", ["linear", "symlog"])
@pytest.mark.parametrize("k", [0, 1])
@pytest.mark.parametrize(
    "matrix",
    [
        np.zeros((40, 40)),
        2e-7 * np.eye(40),
        np.diag([5.0, *[0.0] * 39]),
        100.0 * np.eye(40) + dense(semicircle(40)),
        np.array([[3.0]]),
        np.diag([3.0, 1.0, -2.0]),
    ],
    ids=["zero", "identity", "rank one", "far from zero", "one", "three"],
)
def test_degenerate_spectra_can_be_drawn(ax, matrix, k, scale):
    pairs = spectra.eigsh(matrix, k, progress=False) if k else None
    density = spectra.spectral_density(matrix, steps=10, probes=2, deflate=pairs, progress=False)
    plots.plot_density(density, ax, scale=scale)
    assert np.isfinite([*ax.get_xlim(), *ax.get_ylim()]).all()
    low, high = density.support
    assert ax.get_xlim()[0] <= low <= high <= ax.get_xlim()[1]


@pytest.mark.parametrize("scale", ["linear", "symlog"])
def test_with_everything_deflated_only_the_eigenvalues_are_drawn(ax, scale):
    matrix = np.diag([3.0, 1.0, -2.0])
    pairs = spectra.eigsh(matrix, 3, progress=False)
    density = spectra.spectral_density(matrix, deflate=pairs, progress=False)
    assert density.steps == 0
    plots.plot_density(density, ax, scale=scale)
    assert legend(ax) == "3 eigenvalues, each of mass 1/n"
    assert "all eigenvalues known" in title(ax)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": "log"}, "scale='log'; expected 'linear' or 'symlog'"),
        ({"width": 0.0}, "expected a positive width"),
        ({"width": float("nan")}, "expected a positive width"),
        ({"confidence": 1.0}, "confidence=1.0; expected a probability"),
    ],
)
def test_impossible_options_of_a_density_are_refused(ax, density, options, message):
    with pytest.raises(ArgumentError, match=message):
        plots.plot_density(density, ax, **options)


# --- estimates -----------------------------------------------------------------------------------


def test_the_running_mean_and_its_band_are_drawn(ax, trace):
    assert plots.plot_estimate(trace, ax) is ax
    value, low, high = trace.running()
    count = np.arange(2, len(trace.samples) + 1)
    line = labelled(ax, "mean over the probes")
    np.testing.assert_array_equal(line.get_xdata(), count)
    np.testing.assert_array_equal(line.get_ydata(), value)
    np.testing.assert_allclose(band_of(ax, count), (low, high))


def test_the_last_point_is_the_estimate_with_its_interval(ax, trace):
    plots.plot_estimate(trace, ax)
    low, high = trace.interval()
    point = labelled(ax, f"{trace.value:.6g} (95% interval {low:.6g} to {high:.6g})")
    assert point.lines[0].get_ydata()[0] == pytest.approx(trace.value)
    np.testing.assert_allclose(segments(point.lines[2][0])[0, :, 1], (low, high))
    bottom, top = ax.get_ylim()
    assert bottom < low < high < top


def test_another_confidence_widens_the_interval(ax, trace):
    plots.plot_estimate(trace, ax, confidence=0.99)
    assert "99% interval" in legend(ax)
    point = labelled(ax, f"{trace.value:.6g} (")
    np.testing.assert_allclose(segments(point.lines[2][0])[0, :, 1], trace.interval(0.99))


def test_a_root_of_a_mean_converges_on_its_own_scale(ax):
    norm = spectra.norm(Diagonal(semicircle(300)), "fro", rtol=0.2, progress=False)
    plots.plot_estimate(norm, ax)
    np.testing.assert_array_equal(
        labelled(ax, "mean over the probes").get_ydata(), norm.running()[0]
    )
    assert ax.get_ylabel() == "Frobenius norm"


def test_a_missed_tolerance_is_said(ax):
    trace = spectra.trace(Diagonal(semicircle(300)), rtol=1e-6, max_matvecs=10, progress=False)
    assert not trace.converged
    plots.plot_estimate(trace, ax)
    assert title(ax).endswith("tolerance not reached")


def test_counts_and_spectral_sums_show_their_bounds(ax, density):
    for estimate in (density.counts(0.1).above, spectra.effective_rank(density)):
        ax.clear()
        plots.plot_estimate(estimate, ax)
        low, high = (f"{end:.6g}" for end in estimate.bounds)
        assert f"95% interval {low} to {high}" in legend(ax)
        assert ax.get_ylabel() == estimate.quantity


@pytest.mark.parametrize("width", [None, 0.05])
def test_the_width_of_the_curve_is_in_the_legend(ax, density, width):
    plots.plot_density(density, ax, width=width)
    used = density.widths[density.weights > 0]
    wanted = "0.05" if width else f"{used.min():.1g} to {used.max():.1g}"
    assert f"broadened density (width {wanted})" in legend(ax)


def test_an_exact_value_is_one_point(ax):
    trace = spectra.trace(np.diag([3.0, 1.0, -2.0]), progress=False)
    plots.plot_estimate(trace, ax)
    assert legend(ax) == "2 (exact)"
    assert labelled(ax, "exact").lines[0].get_xdata() == [trace.value]
    assert ax.get_xlabel() == "trace"


def test_bounds_are_drawn_around_their_value(ax):
    norm = spectra.norm(Diagonal(semicircle(300)), 2, progress=False)
    plots.plot_estimate(norm, ax)
    assert "99% interval" in legend(ax)
    point = labelled(ax, "99% interval")
    np.testing.assert_allclose(segments(point.lines[2][0])[0, :, 0], norm.bounds)


def test_more_confidence_than_bounds_promise_is_refused(ax):
    norm = spectra.norm(Diagonal(semicircle(300)), 2, progress=False)
    with pytest.raises(ArgumentError, match="hold with 99%, no more"):
        plots.plot_estimate(norm, ax, confidence=0.999)


def test_bounds_narrower_than_their_digits_are_given_as_a_width(ax):
    norm = spectra.norm(np.diag([2.0, 0.0, 0.0]), 2, progress=False)
    close = dataclasses.replace(norm, bounds=(2.0 - 1e-12, 2.0 + 3e-12), value=2.0)
    plots.plot_estimate(close, ax)
    assert legend(ax) == "2 (within 3e-12)"


def test_a_single_probe_has_no_interval(ax, trace):
    single = dataclasses.replace(trace, samples=trace.samples[:1], value=float(trace.samples[0]))
    plots.plot_estimate(single, ax)
    assert "no interval from fewer than two probes" in legend(ax)


# --- blocks --------------------------------------------------------------------------------------


def test_layers_are_bars_from_the_top_with_their_intervals(ax, blocks):
    plots.plot_blocks(blocks, ax)
    rows, others = blocks.table()
    assert [bar.get_width() for bar in ax.patches] == [row.trace.value for row in rows]
    assert [label.get_text() for label in ax.get_yticklabels()] == [row.name for row in rows]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]
    ends = [segment[:, 0] for segment in ax.collections[0].get_segments()]
    assert np.array(ends) == pytest.approx(np.array([row.trace.interval() for row in rows]))
    assert f"95% interval, {blocks.probes} probes" in legend(ax)
    assert f"16 others together: {others.trace.value:.3g} ±" in ax.get_xlabel()
    assert title(ax).startswith("Trace by layer (Hutchinson, 3 deflated")


def test_exact_traces_and_those_of_one_probe_have_no_interval(ax, blocks):
    for few in (
        dataclasses.replace(blocks, exact=True, parameter_traces=blocks.parameter_traces[:1]),
        dataclasses.replace(blocks, parameter_traces=blocks.parameter_traces[:1]),
    ):
        ax.clear()
        plots.plot_blocks(few, ax)
        assert len(ax.patches) == 24
        assert ax.get_legend() is None


def test_long_names_are_cut_at_the_front(ax):
    sizes = {"a" * 40 + ".b.weight": 60, "c.weight": 60}
    blocks = spectra.analyze(Layered(dense(s1(120)), sizes), 2, rtol=0.3, progress=False).blocks
    plots.plot_blocks(blocks, ax)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["…" + "a" * 27 + ".b", "c"]


@pytest.mark.parametrize("count", [3, 14])
def test_the_map_shows_how_much_of_each_eigenvector_lies_in_each_layer(ax, blocks, count):
    masses = np.random.default_rng(0).dirichlet(np.ones(80), size=count)
    values = np.linspace(2.0, -5.0, count)
    blocks = dataclasses.replace(blocks, eigenvalues=values, masses=masses)
    assert blocks.plot(ax, quantity="eigenvectors") is ax
    (image,) = ax.get_images()
    percent = np.asarray(image.get_array())
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert percent.shape == (25, count)
    assert percent.sum(axis=0) == pytest.approx(np.full(count, 100))
    assert [label.get_text() for label in ax.get_xticklabels()] == [f"{v:.3g}" for v in values]
    # A weight and a bias for each layer.
    layers = masses.reshape(count, 40, 2).sum(axis=2)
    kept = sorted(np.argsort(-layers.max(axis=0))[:24].tolist())
    assert names == [*(f"layers.{i}" for i in kept), "16 others"]
    assert percent[:24] == pytest.approx(100 * layers[:, kept].T)
    # For more there is no room.
    written = [plots._percent(share) for share in percent.ravel()] if count == 3 else []
    assert [text.get_text() for text in ax.texts] == written


def test_of_many_eigenvectors_the_map_shows_the_largest(ax, blocks):
    values = np.sort(np.random.default_rng(0).normal(size=50))[::-1]
    many = dataclasses.replace(blocks, eigenvalues=values, masses=np.full((50, 80), 1 / 80))
    found = plots.mass_map(many)
    largest = np.sort(np.abs(values))[-30:]
    assert found.eigenvalues.tolist() == [value for value in values if abs(value) >= largest[0]]
    plots.plot_blocks(many, ax, quantity="eigenvectors")
    assert title(ax) == "In which layers 30 of 50 eigenvectors lie"


def test_impossible_maps_are_refused(ax, blocks):
    with pytest.raises(ArgumentError, match="expected 'trace' or 'eigenvectors'"):
        plots.plot_blocks(blocks, ax, quantity="masses")
    none = dataclasses.replace(blocks, eigenvalues=np.zeros(0), masses=np.zeros((0, 80)))
    with pytest.raises(ArgumentError, match="no eigenvectors were computed"):
        plots.plot_blocks(none, ax, quantity="eigenvectors")


# --- principal blocks ----------------------------------------------------------------------------


def test_every_block_has_a_row_with_its_eigenvalues_from_the_top(ax, block_spectra):
    plots.plot_block_spectra(block_spectra, ax)
    drawn = labelled(ax, "eigenvalue ± residual").lines[0]
    pairs = [block_spectra.eigenpairs[name] for name in block_spectra.names]
    np.testing.assert_array_equal(drawn.get_xdata(), np.concatenate([p.values for p in pairs]))
    np.testing.assert_array_equal(drawn.get_ydata(), np.repeat(range(len(pairs)), 2))
    assert [label.get_text() for label in ax.get_yticklabels()] == list(block_spectra.names)
    assert ax.get_ylim()[0] > ax.get_ylim()[1]
    assert title(ax).startswith(f"Extreme eigenvalues of 3 blocks ({block_spectra.passes} passes")


def test_pairs_of_a_block_that_did_not_converge_are_hollow_and_said(ax, block_spectra):
    pairs = block_spectra.eigenpairs["2"]
    missed = dataclasses.replace(pairs, converged=np.array([True, False]))
    found = dataclasses.replace(block_spectra, eigenpairs={**block_spectra.eigenpairs, "2": missed})
    plots.plot_block_spectra(found, ax)
    hollow = labelled(ax, "not converged (1 of 6)").lines[0]
    assert hollow.get_xdata().tolist() == [pairs.values[1]]
    assert to_rgba(hollow.get_markerfacecolor()) == to_rgba(ax.get_facecolor())


def test_the_colours_are_the_norms_of_the_blocks(ax, coupling):
    plots.plot_coupling(coupling, ax)
    (image,) = ax.get_images()
    assert np.asarray(image.get_array()) == pytest.approx(np.sqrt(coupling.squares))
    assert image.norm.vmax == np.sqrt(coupling.squares.max())
    for labels in (ax.get_xticklabels(), ax.get_yticklabels()):
        assert [label.get_text() for label in labels] == list(coupling.names)
    low, high = coupling.outside_interval
    assert f"‖H − D‖/‖H‖ = {coupling.outside:.3g}, 95% interval [{low:.3g}, {high:.3g}]" in title(
        ax
    )


def test_blocks_that_may_be_zero_are_crossed_out(ax, coupling):
    samples = coupling.samples.copy()
    samples[:, 0, 2] = samples[:, 2, 0] = 0.0
    plots.plot_coupling(dataclasses.replace(coupling, samples=samples), ax)
    (crosses,) = ax.get_lines()
    crossed = {tuple(place) for place in crosses.get_xydata().astype(int).tolist()}
    assert {(0, 2), (2, 0)} <= crossed
    (image,) = ax.get_images()
    # Off the scale, and finite.
    assert image.get_array()[0, 2] == image.norm.vmin > 0


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_blocks_that_are_all_alike_can_be_drawn(ax, coupling, value):
    samples = np.full_like(coupling.samples, value)
    plots.plot_coupling(dataclasses.replace(coupling, samples=samples), ax)
    assert len(ax.get_images()) == 1


# --- all kinds -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pairs", "density", "trace", "blocks", "block_spectra"])
def test_every_result_plots_itself_also_when_loaded(ax, kind, request, tmp_path):
    result = request.getfixturevalue(kind)
    loaded = spectra.load(result.save(tmp_path / kind))
    assert result.plot(ax) is ax
    again = loaded.plot(Figure().add_subplot())
    assert title(again) == title(ax)
    assert legend(again) == legend(ax)
    np.testing.assert_array_equal(again.get_lines()[0].get_xydata(), ax.get_lines()[0].get_xydata())


def test_a_coupling_plots_itself_also_when_loaded(ax, coupling, tmp_path):
    loaded = spectra.load(coupling.save(tmp_path / "coupling"))
    assert coupling.plot(ax) is ax
    again = loaded.plot(Figure().add_subplot())
    assert title(again) == title(ax)
    np.testing.assert_array_equal(again.get_images()[0].get_array(), ax.get_images()[0].get_array())


def test_options_reach_the_figure_of_the_kind(ax, density):
    assert density.plot(ax, scale="symlog").get_xscale() == "asinh"


def test_an_unknown_option_is_a_type_error(ax, pairs):
    with pytest.raises(TypeError, match="width"):
        pairs.plot(ax, width=0.1)


@pytest.fixture(scope="module")
def network():
    return spectra.HessianOperator(*digits_like())


def digits_like():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    batches = [(torch.randn(6, 4), torch.randint(3, (6,))) for _ in range(4)]
    return model, spectra.losses.supervised(torch.nn.CrossEntropyLoss()), batches


def test_an_analysis_draws_the_part_that_is_asked_for(ax):
    analysis = spectra.analyze(np.diag(np.arange(1.0, 9.0)), 2, trace=False, progress=False)
    assert analysis.plot(ax) is ax
    assert title(ax) == title(analysis.density.plot(Figure().add_subplot()))
    pairs = analysis.plot(Figure().add_subplot(), part="eigenpairs", scale="linear")
    assert title(pairs) == title(analysis.eigenpairs.plot(Figure().add_subplot()))
    with pytest.raises(ArgumentError, match="part='trace'; this analysis has 'density', 'eigenp"):
        analysis.plot(ax, part="trace")


def test_the_spread_of_the_data_is_drawn_with_its_intervals(ax, network):
    pairs = spectra.eigsh(network, 2, progress=False)
    spread = spectra.data_spread(network, pairs)
    assert spread.plot(ax) is ax
    segments = ax.containers[0].lines[2][0].get_segments()
    np.testing.assert_allclose([s[:, 1] for s in segments], spread.intervals, rtol=1e-6)
    assert legend(ax) == "95% interval over 4 batches"


def test_a_diagonal_is_drawn_by_module_or_by_entry(ax, network):
    estimate = spectra.diagonal(network, probes=12, method="hutchinson", progress=False)
    assert estimate.plot(ax) is ax
    means = estimate.module_traces(mean=True)
    assert [text.get_text() for text in ax.get_yticklabels()] == list(means) == ["0", "2"]
    widths = [bar.get_width() for bar in ax.patches]
    assert widths == pytest.approx([mean.value for mean in means.values()])
    ends = [segment[:, 0] for segment in ax.containers[-1].lines[2][0].get_segments()]
    np.testing.assert_allclose(ends, [mean.interval() for mean in means.values()], rtol=1e-6)
    exact = spectra.diagonal(np.diag([3.0, 1.0, 2.0]), progress=False)
    entries = exact.plot(Figure().add_subplot())
    np.testing.assert_allclose(entries.get_lines()[0].get_ydata(), [3.0, 1.0, 2.0])


def test_a_preflight_is_drawn_as_measured_over_limit(ax, network):
    preflight = spectra.check(network)
    assert preflight.plot(ax) is ax
    found = [f for f in preflight.findings if f.measured is not None and f.limit]
    ratios = ax.collections[0].get_offsets()[:, 0]
    right = [min(max(f.measured / f.limit, 1e-8), 1e8) for f in found]
    np.testing.assert_allclose(ratios, right, rtol=1e-6)
    assert len(found) >= 3


def test_a_solution_is_drawn_by_the_sizes_of_its_entries(ax):
    b = np.array([1.0, -2.0, 0.0, 30.0])
    solution = spectra.solve(np.diag([1.0, 2.0, 4.0, 3.0]), b, progress=False)
    assert solution.plot(ax) is ax
    # One, one and ten; the fourth is zero, or of the size of rounding.
    counts = sum(int(bar.get_height()) for bar in ax.patches)
    assert counts == int((np.asarray(solution.x) != 0).sum())
    assert title(ax).startswith("Solution, residual ")


def test_one_measurement_of_a_training_is_drawn(ax):
    model, loss, data = digits_like()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = spectra.CurvatureMonitor(model, loss, data, optimizer, k=2)
    monitor.step(3)
    (measurement,) = monitor.trajectory.measurements
    assert measurement.plot(ax) is ax
    drawn = ax.containers[0].lines[0].get_ydata()
    assert list(map(float, drawn)) == pytest.approx(list(measurement.eigenvalues))
    assert title(ax) == "Eigenvalues at step 3"
    assert "threshold 2" in legend(ax)


def test_a_result_without_a_figure_is_refused(ax):
    with pytest.raises(ArgumentTypeError, match="no figure for a Result; expected one of Eigenp"):
        plots.plot(Result(), ax)


@pytest.mark.parametrize(
    "kind", ["pairs", "density", "trace", "blocks", "block_spectra", "coupling"]
)
def test_what_is_no_axes_is_refused(kind, request):
    with pytest.raises(ArgumentTypeError, match="ax is a Figure; expected one matplotlib Axes"):
        request.getfixturevalue(kind).plot(Figure())


def test_the_style_sheet_is_for_papers_and_for_all_eyes(pairs):
    with matplotlib.style.context("spectra.report.spectra"):
        rc = matplotlib.rcParams
        # TrueType in PDF, outlines in SVG: never bitmaps or Type 3.
        assert (rc["pdf.fonttype"], rc["ps.fonttype"], rc["svg.fonttype"]) == (42, 42, "path")
        colours = {f"#{c.lstrip('#')}" for c in rc["axes.prop_cycle"].by_key()["color"]}
        figure = Figure()
        pairs.plot(figure.add_subplot())
        pdf = io.BytesIO()
        figure.savefig(pdf, format="pdf")
    okabe_ito = {"#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"}
    assert {plots._DENSITY, plots._EIGENVALUES, plots._MEAN} <= colours <= okabe_ito
    assert b"/Subtype /Type0" in pdf.getvalue() or b"/CIDFontType2" in pdf.getvalue()
    assert b"/Subtype /Type3" not in pdf.getvalue()


def test_without_axes_the_figure_is_pyplots(density):
    from matplotlib import pyplot

    pyplot.switch_backend("Agg")
    before = settings()
    ax = density.plot()
    try:
        # What a notebook displays, and what pyplot.show() opens.
        assert pyplot.fignum_exists(ax.figure.number)
        ax.figure.canvas.draw()
        assert settings() == before
    finally:
        pyplot.close(ax.figure)
