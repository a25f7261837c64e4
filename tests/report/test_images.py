"""Figures look as they did: drawn from fixed numbers and compared with images, pixel by pixel.

`python -m tests.report.test_images` draws the images anew; look at them before they are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib.style
import numpy as np
import pytest
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.testing.compare import compare_images
from matplotlib.text import Text
from matplotlib.ticker import NullFormatter

from spectra.algorithms.blocks import BlockTraces
from spectra.algorithms.density import SpectralDensity
from spectra.algorithms.eigen import Eigenpairs
from spectra.algorithms.estimate import Estimate
from spectra.analysis.landscape import Landscape

BASELINE = Path(__file__).parent / "baseline"
# Root mean square over all pixels and colours, of 255: a line that anti-aliasing draws a little
# differently stays below. Without residual bars eigenvalues are 4 to 7 off, the others without
# their bands or bars 10 to 24.
TOLERANCE = 1.5


def pairs() -> Eigenpairs:
    values = np.array([40.0, 22.0, 9.0, 3.0, -2.0, -12.0])
    return Eigenpairs(
        values=values,
        vectors=np.zeros((50, 6)),
        residuals=np.array([6.0, 4.0, 2.5, 1.0, 0.8, 3.0]),
        converged=np.array([True, True, True, False, True, True]),
        which="LM",
        tol=1e-3,
        matvecs=30,
        no_eigenvalue_above=2.8,
        no_eigenvalue_below=-1.9,
    )


def density() -> SpectralDensity:
    nodes = np.array(
        [[-1.0, -0.3, 0.0, 0.4, 1.2], [-0.9, -0.4, 0.1, 0.5, 1.4], [-1.1, 0, 0.2, 1, 2]]
    )
    weights = np.array([[1, 3, 9, 4, 1], [1, 4, 6, 5, 2], [2, 8, 5, 2, 1]], dtype=float)
    weights *= 0.96 / weights.sum(axis=1, keepdims=True)
    return SpectralDensity(nodes, weights, n=50, atoms=np.array([9.0, 14.0]))


def trace() -> Estimate:
    samples = 10 + 3 * np.cos(np.arange(1, 25) ** 1.7)
    return Estimate("trace", float(samples.mean()), float(samples.std(ddof=1)) / 24**0.5, samples)


def blocks() -> BlockTraces:
    names = tuple(f"{layer}.{kind}" for layer in "abcd" for kind in ("weight", "bias"))
    samples = np.array([5.0, 1, 9, 1, 3, 0.5, -2, 0.5]) * (1 + 0.2 * np.cos(np.arange(32))).reshape(
        4, 8
    )
    masses = np.array(
        [[8, 1, 0, 0, 1, 0, 0, 0], [1, 0, 5, 1, 1, 0, 2, 0], [0, 0, 1, 0, 1, 0, 6, 2]]
    )
    return BlockTraces(names, (4,) * 8, samples, False, np.array([5.0, 2.0, -1.0]), masses / 10)


def landscape() -> Landscape:
    at = np.linspace(-1, 1, 21)
    curvatures = np.array([2.0, -1.0])
    values = 1 + 0.3 * at + curvatures[:, None] / 2 * at**2 + 0.5 * at**3
    values[1, :2] = np.nan
    slopes = np.array([0.3, 0.3])
    labels = ("eigenvector of 2", "eigenvector of -1")
    return Landscape(at, values, 1.0, slopes, np.diag(curvatures), False, 4.0, labels=labels)


FIGURES = {
    "eigenvalues": lambda ax: pairs().plot(ax, scale="linear"),
    "eigenvalues_symlog": lambda ax: pairs().plot(ax, scale="symlog"),
    "density": lambda ax: density().plot(ax),
    "density_symlog": lambda ax: density().plot(ax, scale="symlog"),
    "trace": lambda ax: trace().plot(ax),
    "trace_by_layer": lambda ax: blocks().plot(ax),
    "eigenvectors_by_layer": lambda ax: blocks().plot(ax, quantity="eigenvectors"),
    "landscape": lambda ax: landscape().plot(ax),
}


def bands(ax: Axes) -> list[Artist]:
    return [artist for artist in ax.collections if isinstance(artist, PolyCollection)]


def error_bars(ax: Axes) -> list[Artist]:
    bars = [each for each in ax.containers if isinstance(each, ErrorbarContainer)]
    return [artist for _, caps, lines in bars for artist in (*caps, *lines)]


def dashed(ax: Axes) -> list[Artist]:
    return [line for line in ax.lines if line.get_linestyle() == "--"]


def drawn(name: str, path: Path, lost: Callable[[Axes], list[Artist]] = lambda ax: []) -> Path:
    """The figure in the style of spectra, small, and without letters, which FreeType decides on."""
    with matplotlib.style.context(["default", "spectra.report.spectra"]):
        figure = Figure(figsize=(3.2, 2.2), dpi=80)
        FigureCanvasAgg(figure)
        FIGURES[name](figure.add_axes((0.05, 0.05, 0.7, 0.9)))
        for ax in figure.axes:
            if legend := ax.get_legend():
                legend.remove()
            for axis in (ax.xaxis, ax.yaxis):
                axis.set_major_formatter(NullFormatter())
                axis.set_minor_formatter(NullFormatter())
            for artist in lost(ax):
                artist.set_visible(False)
        for text in figure.findobj(Text):
            text.set_visible(False)
        figure.savefig(path, dpi=80, metadata={"Software": None})
    return path


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_looks_as_it_did(name, tmp_path):
    actual = drawn(name, tmp_path / f"{name}.png")
    assert compare_images(BASELINE / f"{name}.png", actual, TOLERANCE) is None


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("eigenvalues", error_bars),
        ("eigenvalues_symlog", error_bars),
        ("density", bands),
        ("density_symlog", bands),
        ("trace", bands),
        ("trace_by_layer", error_bars),
        ("landscape", dashed),
    ],
)
def test_what_is_missing_is_noticed(name, lost, tmp_path):
    actual = drawn(name, tmp_path / f"{name}.png", lost)
    found = compare_images(BASELINE / f"{name}.png", actual, TOLERANCE, in_decorator=True)
    assert found["rms"] > 2 * TOLERANCE


if __name__ == "__main__":
    BASELINE.mkdir(exist_ok=True)
    for each in FIGURES:
        drawn(each, BASELINE / f"{each}.png")
