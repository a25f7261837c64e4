"""How do a JSON document and its arrays replace older ones together? By one renaming.

The document names the checksum of the arrays' file, and states its own. New files first lie beside
the old ones under hidden names, made of their checksums. Then the document is renamed, and then the
arrays: whichever document a reader finds, its arrays are there under one of their two names.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from spectra.arrays import arrays_checksum, arrays_file, read_arrays
from spectra.documents import is_checksum, read_document, sealed, to_bytes
from spectra.files import replace_file, sync_directory

__all__ = ["Staged", "arrays_path", "document_path", "find_arrays", "find_document", "stage"]

# Seconds after which a hidden file counts as left behind, not as one being written.
_ABANDONED = 3600.0


def document_path(stem: Path) -> Path:
    """Where the document of a result lies."""
    return _with(stem, ".json")


def arrays_path(stem: Path) -> Path:
    """Where the arrays of a result lie."""
    return _with(stem, ".safetensors")


@dataclass(frozen=True)
class Staged:
    """A document and its arrays on the disk, where those find them who know the checksum.

    Attributes
    ----------
    stem
        The path without suffix under which they are to be published.
    checksum
        Of the document.
    arrays
        Checksum of the arrays' file, None without any.
    """

    stem: Path
    checksum: str
    arrays: str | None

    @property
    def files(self) -> list[Path]:
        """The hidden files: the document, and the arrays if there are any."""
        document = _hidden(document_path(self.stem), self.checksum)
        if self.arrays is None:
            return [document]
        return [document, _hidden(arrays_path(self.stem), self.arrays)]

    def publish(self) -> None:
        """Give the files their names, in place of older ones.

        Raises
        ------
        OSError
            A name is taken by something else than a file.
        """
        directory, arrays = self.stem.parent, arrays_path(self.stem)
        # From this moment on the arrays of the older document are no longer needed.
        _rename(self.files[0], document_path(self.stem))
        sync_directory(directory)
        if self.arrays is None:
            arrays.unlink(missing_ok=True)
        else:
            _rename(self.files[1], arrays)
        sync_directory(directory)
        _sweep(self.stem)

    def discard(self) -> None:
        """Delete the hidden files."""
        _delete(self.files)


def stage(stem: Path, document: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> Staged:
    """Bring a document and its arrays to the disk, beside those that they will replace.

    Raises
    ------
    OSError, ValueError, TypeError, RecursionError
        They cannot be written, or have no place in the formats; nothing is left behind.
    """
    named = {**document, "arrays_sha256": arrays_checksum(arrays) if arrays else None}
    full = sealed(named)
    staged = Staged(stem, full["checksum"], full["arrays_sha256"])
    contents: list[bytes | Iterator[bytes | memoryview]] = [to_bytes(full)]
    if arrays:
        contents.append(arrays_file(arrays))
    stem.parent.mkdir(parents=True, exist_ok=True)
    written = []
    try:
        for file, content in zip(staged.files, contents, strict=True):
            # One that is there already may be what the document of a killed process needs.
            if not file.exists():
                written.append(file)
            replace_file(file, content)
    except BaseException:
        _delete(written)
        raise
    return staged


def find_document(stem: Path, checksum: str | None = None) -> Any:
    """The published document; or the one with a checksum, published or not, if it is there.

    Raises
    ------
    OSError
        There is none, or it cannot be read.
    ValueError, RecursionError
        It is no JSON, or too large.
    """
    if checksum is not None:
        # In this order: to publish takes the hidden name away and gives the other one.
        with contextlib.suppress(FileNotFoundError):
            return read_document(_hidden(document_path(stem), checksum))
    return read_document(document_path(stem))


def find_arrays(stem: Path, document: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """The arrays that a document names, published or not; None where they are missing.

    Raises
    ------
    OSError
        They cannot be read.
    ValueError
        The file is no whole file of safetensors.
    """
    wanted = document["arrays_sha256"]
    if wanted is None:
        return {}
    if not is_checksum(wanted):
        msg = "its arrays_sha256 is no SHA-256"
        raise ValueError(msg)
    for path in (_hidden(arrays_path(stem), wanted), arrays_path(stem)):
        with contextlib.suppress(FileNotFoundError):
            arrays, found = read_arrays(path)
            if found == wanted:
                return arrays
    return None


def _with(stem: Path, suffix: str) -> Path:
    """`stem` with `suffix` behind its whole name (`with_suffix` would cut `top.10` to `top`)."""
    return stem.with_name(stem.name + suffix)


def _hidden(path: Path, checksum: str) -> Path:
    """Where the file with this checksum waits for its name. In short, as names are limited."""
    return path.with_name(f".{path.name}.{checksum[:16]}")


def _rename(hidden: Path, path: Path) -> None:
    # Where a hidden file is gone, another process that saved the very same has renamed it.
    with contextlib.suppress(FileNotFoundError):
        os.replace(hidden, path)


def _delete(files: Iterable[Path]) -> None:
    for file in files:
        with contextlib.suppress(OSError, ValueError):
            file.unlink()


def _sweep(stem: Path) -> None:
    """Delete what killed processes left under this name."""
    name = (
        rf"\.?\.{re.escape(stem.name)}\.(json|safetensors)\.[0-9a-f]{{16}}(\.[0-9a-f]{{32}}\.tmp)?"
    )
    with contextlib.suppress(OSError):
        found = [file for file in stem.parent.iterdir() if re.fullmatch(name, file.name)]
        _delete(file for file in found if time.time() - file.stat().st_mtime > _ABANDONED)
