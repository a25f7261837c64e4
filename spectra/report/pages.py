"""How does a page come about? Figures are drawn, embedded, and put with text into a template."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import resources
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
from spectra.report.readings import Reading

__all__ = [
    "Draw",
    "Drawing",
    "Illustration",
    "Sketch",
    "Switch",
    "Table",
    "Version",
    "check_formats",
    "drawn",
    "filled",
    "flattened",
    "illustrated",
    "write_figures",
    "write_page",
]

_TYPES = {".svg": "image/svg+xml", ".png": "image/png"}
_STYLE = (
    "default",
    "spectra.report.spectra",
    # Without it every run gives other identifiers, and the same result other files.
    {"svg.hashsalt": "spectra"},
)


class Sketch(NamedTuple):
    """A figure that is not drawn yet: what draws it on given Axes, and what is read in it."""

    draw: Callable[[Axes], Axes]
    readings: Iterable[Reading] = ()


# Figures by name.
Draw = Mapping[str, Sketch]


class Drawing:
    """A figure that is drawn, as an image of any kind, and places in it with what they say.

    Attributes
    ----------
    readings
        (x, y, text): from the left and from the top, as shares of the width and of the height.
    """

    def __init__(self, sketch: Sketch) -> None:
        # A style that does not depend on the session's.
        with matplotlib.style.context(_STYLE):
            self._figure = Figure(figsize=plots.FIGURE_SIZE, layout="constrained")
            ax = sketch.draw(self._figure.add_subplot())
            # Once, not again for every format.
            self._figure.draw_without_rendering()
            self._figure.set_layout_engine("none")
        self._images: dict[str, bytes] = {}
        self.readings = [place for r in sketch.readings if (place := self._place(ax, r))]

    def image(self, kind: str) -> bytes:
        """The figure as a file of a kind that matplotlib can write."""
        if kind not in self._images:
            buffer = BytesIO()
            # No date in vector files, so that the same result gives the same file.
            metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
            with matplotlib.style.context(_STYLE):
                self._figure.savefig(buffer, format=kind, metadata=metadata)
            self._images[kind] = buffer.getvalue()
        return self._images[kind]

    def _place(self, ax: Axes, reading: Reading) -> tuple[float, float, str] | None:
        """Where on the image it is; None outside of the frame."""
        if reading.y is None:
            pixel = ax.get_xaxis_transform().transform((reading.x, plots.STEM))
        else:
            pixel = ax.transData.transform((reading.x, reading.y))
        inside = ax.transAxes.inverted().transform(pixel)
        # The centres of outermost markers may lie on the frame.
        if not ((inside >= -0.01) & (inside <= 1.01)).all():
            return None
        x, y = self._figure.transFigure.inverted().transform(pixel)
        return round(float(x), 4), round(1 - float(y), 4), printable(reading.text)


class Switch(NamedTuple):
    """Figures that show the same on different scales: names by label, and the one shown first."""

    names: Mapping[str, str]
    first: str


class Version(NamedTuple):
    """One image of an illustration; its address is the image itself, `readings` are JSON."""

    label: str
    caption: str
    source: str
    readings: str
    shown: bool


class Illustration(NamedTuple):
    """A figure in a page, in one version or in several to switch between."""

    title: str
    versions: list[Version]


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
_SCRIPT = (resources.files("spectra.report") / "templates" / "page.js").read_text("utf-8")
# The checksum lets a browser run this script and no other, whatever gets into a page.
_TEMPLATES.globals["script"] = _SCRIPT
_TEMPLATES.globals["script_checksum"] = base64.b64encode(
    hashlib.sha256(_SCRIPT.encode()).digest()
).decode()


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


def drawn(draw: Draw) -> dict[str, Drawing]:
    """Every figure by name."""
    return {name: Drawing(sketch) for name, sketch in draw.items()}


def check_formats(formats: Sequence[str]) -> None:
    """Refuse what is no sequence of formats that matplotlib can write, before anything is drawn.

    Raises
    ------
    ArgumentError
    """
    known = Figure().canvas.get_supported_filetypes()
    if isinstance(formats, str) or not formats or not set(formats) <= set(known):
        msg = f"formats={formats!r}; expected a sequence of {', '.join(sorted(known))}"
        raise ArgumentError(msg)


def write_figures(
    drawings: Mapping[str, Drawing], directory: str | Path, formats: Sequence[str]
) -> dict[str, Path]:
    """Write figures, and return their paths in the first of the formats.

    Raises
    ------
    ArgumentError
        No format, or one that matplotlib cannot write.
    StorageError
        The files cannot be written.
    """
    check_formats(formats)
    directory = Path(directory)
    paths = {}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, drawing in drawings.items():
            for kind in formats:
                replace_file(directory / f"{name}.{kind}", drawing.image(kind))
            paths[name] = directory / f"{name}.{formats[0]}"
    except OSError as error:
        msg = f"could not write figures into {str(directory)!r}: {error}"
        raise StorageError(msg) from error
    return paths


def illustrated(
    figures: Mapping[str, str | Path | Drawing],
    captions: Mapping[str, tuple[str, str]],
    switches: Sequence[Switch] = (),
) -> list[Illustration]:
    """Figures to embed.

    Parameters
    ----------
    figures
        Drawings, or SVG or PNG files, by name.
    captions
        Title and text by name.
    switches
        Which of the figures are versions of one another.

    Raises
    ------
    ArgumentError
        A file that is neither.
    StorageError
        One that cannot be read.
    """
    found: list[Illustration] = []
    done: set[str] = set()
    for name in figures:
        if name in done:
            continue
        switch = next((s for s in switches if name in s.names.values()), Switch({"": name}, ""))
        names = {label: each for label, each in switch.names.items() if each in figures}
        done.update(names.values())
        first = switch.first if switch.first in names else next(iter(names))
        versions = [
            _version(figures[each], captions.get(each, (each, ""))[1], label, shown=label == first)
            for label, each in names.items()
        ]
        found.append(Illustration(captions.get(name, (name, ""))[0], versions))
    return found


def flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested provenance as rows of a table."""
    for name, value in values.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from flattened(value, f"{path} · ")
        else:
            yield path, str(value)


def _version(figure: str | Path | Drawing, caption: str, label: str, *, shown: bool) -> Version:
    if isinstance(figure, Drawing):
        readings = json.dumps(figure.readings, ensure_ascii=False, separators=(",", ":"))
        return Version(label, caption, _address(figure.image("svg"), ".svg"), readings, shown)
    return Version(label, caption, _address(*_read_image(Path(figure))), "[]", shown)


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
