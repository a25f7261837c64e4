"""How does a page come about? Figures are drawn, embedded, and put with text into a template."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from spectra.errors import ArgumentError, StorageError
from spectra.files import replace_file
from spectra.names import printable
from spectra.report import plots

__all__ = [
    "Draw",
    "Illustration",
    "Table",
    "filled",
    "flattened",
    "illustrated",
    "write_figures",
    "write_page",
]

# Figures by name, each as what draws it on given Axes.
Draw = Mapping[str, Callable[[Axes], Axes]]

_TYPES = {".svg": "image/svg+xml", ".png": "image/png"}
_STYLE = {
    "font.size": 10.0,
    "axes.titlesize": 10.0,
    # Letters as outlines look the same everywhere, whatever fonts a reader has.
    "svg.fonttype": "path",
    # Without it every run gives other identifiers, and the same result other files.
    "svg.hashsalt": "spectra",
}


class Illustration(NamedTuple):
    """A figure in a page: its address is the figure itself."""

    title: str
    caption: str
    source: str


class Table(NamedTuple):
    """A table of texts in a page, whose first column has the names."""

    title: str
    caption: str
    head: list[str]
    rows: list[list[str]]


_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("spectra.report"),
    # Model, parameter and function names are the user's: they must never become markup. Nor do
    # control characters or marks for writing from right to left reach the page.
    autoescape=True,
    finalize=lambda value: printable(value) if type(value) is str else value,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_page(path: str | Path, template: str, **content: Any) -> Path:
    """Fill a template and write it.

    Raises
    ------
    StorageError
        It cannot be written.
    """
    path, page = Path(path), filled(template, **content)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, page.encode("utf-8"))
    except OSError as error:
        msg = f"could not write the report to {str(path)!r}: {error}"
        raise StorageError(msg) from error
    return path


def filled(template: str, **content: Any) -> str:
    """A template with its content, none of which becomes markup."""
    return _TEMPLATES.get_template(template).render(**content)


def write_figures(draw: Draw, directory: str | Path, formats: Sequence[str]) -> dict[str, Path]:
    """Draw and write figures, and return their paths in the first of the formats.

    Raises
    ------
    ArgumentError
        No format, or one that matplotlib cannot write.
    StorageError
        The files cannot be written.
    """
    known = Figure().canvas.get_supported_filetypes()
    if isinstance(formats, str) or not formats or not set(formats) <= set(known):
        msg = f"formats={formats!r}; expected a sequence of {', '.join(sorted(known))}"
        raise ArgumentError(msg)
    directory = Path(directory)
    paths = {}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, figure in _drawn(draw):
            for kind in formats:
                replace_file(directory / f"{name}.{kind}", _rendered(figure, kind))
            paths[name] = directory / f"{name}.{formats[0]}"
    except OSError as error:
        msg = f"could not write figures into {str(directory)!r}: {error}"
        raise StorageError(msg) from error
    return paths


def illustrated(
    draw: Draw,
    captions: Mapping[str, tuple[str, str]],
    files: Mapping[str, str | Path] | None = None,
) -> list[Illustration]:
    """Figures to embed: those in files, or drawn.

    Parameters
    ----------
    captions
        Title and text by name.
    files
        SVG or PNG by name, instead of drawing.

    Raises
    ------
    ArgumentError
        A file that is neither.
    StorageError
        One that cannot be read.
    """
    if files is None:
        images = {name: (_rendered(figure, "svg"), ".svg") for name, figure in _drawn(draw)}
    else:
        images = {name: _read_image(Path(file)) for name, file in files.items()}
    return [
        Illustration(*captions.get(name, (name, "")), _address(*image))
        for name, image in images.items()
    ]


def flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested provenance as rows of a table."""
    for name, value in values.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from flattened(value, f"{path} · ")
        else:
            yield path, str(value)


def _drawn(draw: Draw) -> Iterator[tuple[str, Figure]]:
    """Each figure with its name, in order, in a style that does not depend on the session's."""
    for name, function in draw.items():
        with matplotlib.style.context(["default", _STYLE]):
            figure = Figure(figsize=plots.FIGURE_SIZE, layout="constrained")
            function(figure.add_subplot())
            # Once, not again for every format.
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
        yield name, figure


def _rendered(figure: Figure, kind: str) -> bytes:
    buffer = BytesIO()
    # No date in vector files, so that the same result gives the same file.
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    with matplotlib.style.context(["default", _STYLE]):
        figure.savefig(buffer, format=kind, dpi=200, metadata=metadata)
    return buffer.getvalue()


def _read_image(path: Path) -> tuple[bytes, str]:
    if path.suffix.lower() not in _TYPES:
        msg = f"cannot embed {str(path)!r}: expected a figure in SVG or PNG"
        raise ArgumentError(msg)
    try:
        return path.read_bytes(), path.suffix.lower()
    except OSError as error:
        msg = f"could not read the figure {str(path)!r}: {error}"
        raise StorageError(msg) from error


def _address(image: bytes, suffix: str) -> str:
    # As an image, not inline: the identifiers of several SVGs would collide, and scripts in a
    # figure that came from elsewhere stay dead.
    return f"data:{_TYPES[suffix]};base64,{base64.b64encode(image).decode('ascii')}"
