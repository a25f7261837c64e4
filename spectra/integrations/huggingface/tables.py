"""What texts and rows does a file or a table hold?

A table is a `datasets.Dataset`, or anything else with a length that yields its rows as mappings,
such as a list of dicts; or a CSV file with a header, or a JSONL file.
"""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from spectra.errors import ArgumentTypeError, TargetError

__all__ = ["Row", "Source", "Table", "cell", "rows_of", "text_of", "texts_of"]

Row: TypeAlias = Mapping[str, Any]


class Table(Protocol):
    """Rows with a length."""

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def __iter__(self) -> Iterator[Any]:
        """The rows, as mappings."""
        ...


Source: TypeAlias = str | Path | Table
_TABLES = (".csv", ".jsonl")


def texts_of(source: Source, column: str, characters: int) -> Iterator[str]:
    """The texts of a table's rows, or of a plain text file as a whole, each up to a length.

    Raises
    ------
    TargetError
        A file cannot be read, or there is no such column.
    ArgumentTypeError
        The source is neither a path nor a table.
    """
    if isinstance(source, str | Path) and Path(source).suffix not in _TABLES:
        yield _read(Path(source), characters)
        return
    for number, row in enumerate(rows_of(source)):
        yield text_of(row, column, number)[:characters]


def rows_of(source: Source) -> Iterator[Row]:
    """The rows of a table, in order.

    Raises
    ------
    TargetError
        The file cannot be read.
    ArgumentTypeError
        The source is no table.
    """
    if isinstance(source, str | Path):
        yield from _file_rows(Path(source))
        return
    if isinstance(source, Mapping) or not (
        isinstance(source, Iterable) and hasattr(source, "__len__")
    ):
        msg = (
            f"expected a path, or a table whose rows are dicts (a datasets.Dataset, a list of "
            f"dicts), got a {type(source).__name__}"
        )
        if isinstance(source, Mapping):
            msg += f"; choose one of {', '.join(map(repr, list(source)[:5]))}, or give its rows"
        raise ArgumentTypeError(msg)
    for number, row in enumerate(source):
        if not isinstance(row, Mapping):
            msg = f"row {number} of the table is a {type(row).__name__}, expected a dict of columns"
            raise ArgumentTypeError(msg)
        yield row


def cell(row: Row, column: str, number: int) -> Any:
    """What a row holds in a column.

    Raises
    ------
    TargetError
        There is no such column.
    """
    if column not in row:
        msg = f"row {number} has no column {column!r}; it has {', '.join(map(repr, row))}"
        raise TargetError(msg)
    return row[column]


def text_of(row: Row, column: str, number: int) -> str:
    """The text that a row holds in a column.

    Raises
    ------
    TargetError
        There is no such column, or no text in it.
    """
    text = cell(row, column, number)
    if not isinstance(text, str):
        msg = f"row {number} has a {type(text).__name__} in column {column!r}, expected a text"
        raise TargetError(msg)
    return text


def _read(path: Path, characters: int) -> str:
    with _reading(path), path.open(encoding="utf-8") as file:
        text = file.read(characters)
    if not text.strip():
        msg = f"the text {str(path)!r} is empty; give one with at least a sentence"
        raise TargetError(msg)
    return text


def _file_rows(path: Path) -> Iterator[Row]:
    if path.suffix not in _TABLES:
        msg = f"{str(path)!r} is no table; give a .csv file with a header, or a .jsonl file"
        raise TargetError(msg)
    # newline="": as the csv module asks for.
    with _reading(path), path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file) if path.suffix == ".csv" else _json_lines(file))
    if not rows:
        msg = f"the table {str(path)!r} has no rows"
        raise TargetError(msg)
    yield from rows


def _json_lines(lines: Iterable[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                msg = f"line {number} is a JSON {type(row).__name__}, expected an object"
                raise ValueError(msg)
            yield row


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Translate what can go wrong with a file."""
    try:
        yield
    except UnicodeDecodeError as error:
        msg = f"{str(path)!r} is not text in UTF-8: {error}"
        raise TargetError(msg) from error
    except OSError as error:
        msg = f"cannot read the text {str(path)!r}: {error.strerror}"
        raise TargetError(msg) from error
    except (ValueError, csv.Error) as error:
        msg = f"{str(path)!r} is no table of the kind {path.suffix}: {error}"
        raise TargetError(msg) from error
