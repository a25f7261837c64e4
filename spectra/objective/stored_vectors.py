"""How are vectors stored by parameter, each process its own part, and read into other parts?

A directory holds a safetensors file of every process, with its part of every parameter under the
parameter's name, and a document that says where in the whole each part belongs. So they can be read
by any number of processes, and by other programs one parameter at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from spectra.arrays import arrays_file
from spectra.documents import check_seal, read_document, sealed, to_bytes
from spectra.errors import StorageError
from spectra.files import replace_file

__all__ = ["Box", "read_parts", "write_part"]

FORMAT = "spectra vectors by parameter, 1"
_DTYPES = {"F32": torch.float32, "F64": torch.float64}
# Where a part of a parameter begins, and how many entries it has, in every dimension.
Box = tuple[tuple[int, ...], tuple[int, ...]]


def write_part(
    directory: Path,
    place: tuple[int, int],
    parts: Mapping[str, tuple[Box, Tensor]],
    shapes: Mapping[str, Sequence[int]],
    writing: str,
) -> None:
    """Write the part of one process.

    Parameters
    ----------
    directory
        Made if needed; earlier files in it are replaced.
    place
        The number of the process, and of how many.
    parts
        By parameter the box that its part fills, and the part of k vectors (k, *box).
    shapes
        Of the whole parameters.
    writing
        The same on all processes, and another one each time: parts of two writings are refused.

    Raises
    ------
    StorageError
        A file cannot be written.
    """
    stem = _stem(directory, *place)
    arrays = {name: part.detach().cpu().contiguous() for name, (_, part) in parts.items()}
    document = {
        "format": FORMAT,
        "processes": place[1],
        "writing": writing,
        "shapes": {name: list(shape) for name, shape in shapes.items()},
        "boxes": {name: [list(start), list(size)] for name, ((start, size), _) in parts.items()},
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        replace_file(stem.with_suffix(".safetensors"), arrays_file(arrays))
        replace_file(stem.with_suffix(".json"), to_bytes(sealed(document)))
    except OSError as error:
        msg = f"could not write vectors into {str(directory)!r}: {error}"
        raise StorageError(msg) from error


def read_parts(
    directory: Path, wanted: Mapping[str, Box], shapes: Mapping[str, Sequence[int]]
) -> dict[str, Tensor]:
    """The parts (k, *box) of vectors that boxes of parameters ask for, whoever wrote them.

    Raises
    ------
    StorageError
        Files are missing or damaged, or hold vectors of other parameters.
    """
    try:
        return _read(directory, wanted, shapes)
    except StorageError:
        raise
    # safetensors has an exception of its own, which derives from Exception alone.
    except Exception as error:
        msg = f"could not read vectors from {str(directory)!r}: {type(error).__name__}: {error}"
        raise StorageError(msg) from error


def _read(
    directory: Path, wanted: Mapping[str, Box], shapes: Mapping[str, Sequence[int]]
) -> dict[str, Tensor]:
    first = _document(_stem_of_first(directory))
    if first["shapes"] != {name: list(shape) for name, shape in shapes.items()}:
        msg = f"the vectors in {str(directory)!r} are not of these parameters"
        raise StorageError(msg)
    found: dict[str, Tensor] = {}
    covered = dict.fromkeys(wanted, 0)
    for rank in range(first["processes"]):
        stem = _stem(directory, rank, first["processes"])
        document = _document(stem)
        if document["writing"] != first["writing"]:
            msg = f"{stem.name} in {str(directory)!r} is of another writing than the first part"
            raise StorageError(msg)
        boxes = document["boxes"]
        with safe_open(stem.with_suffix(".safetensors"), framework="pt") as file:
            for name, (start, size) in wanted.items():
                if name in boxes:
                    covered[name] += _copy(file, name, boxes[name], (start, size), found)
    for name, (_, size) in wanted.items():
        if covered[name] != math.prod(size):
            msg = f"the vectors in {str(directory)!r} lack a part of {name!r}"
            raise StorageError(msg)
    return found


def _copy(file: Any, name: str, stored: Any, wanted: Box, found: dict[str, Tensor]) -> int:
    """Copy what a stored box and a wanted one have in common, and count its entries."""
    piece = file.get_slice(name)
    vectors, (start, size) = piece.get_shape()[0], wanted
    if name not in found:
        found[name] = torch.empty(vectors, *size, dtype=_DTYPES[piece.get_dtype()], device="cpu")
    theirs: list[slice] = [slice(None)]
    mine: list[slice] = [slice(None)]
    for begin, length, other, extent in zip(start, size, *stored, strict=True):
        low, high = max(begin, other), min(begin + length, other + extent)
        if low >= high:
            return 0
        theirs.append(slice(low - other, high - other))
        mine.append(slice(low - begin, high - begin))
    part = piece[tuple(theirs)] if len(theirs) > 1 else file.get_tensor(name)
    found[name][tuple(mine)] = part
    return math.prod(part.shape[1:])


def _document(stem: Path) -> dict[str, Any]:
    document: dict[str, Any] = read_document(stem.with_suffix(".json"))
    check_seal(document)
    if document.get("format") != FORMAT:
        msg = f"{stem.name}.json does not describe vectors"
        raise StorageError(msg)
    return document


def _stem(directory: Path, rank: int, count: int) -> Path:
    return directory / f"vectors-{rank + 1:05d}-of-{count:05d}"


def _stem_of_first(directory: Path) -> Path:
    # Of the latest writing, where an earlier one was by another number of processes.
    firsts = sorted(directory.glob("vectors-00001-of-*.json"), key=lambda p: p.stat().st_mtime)
    if not firsts:
        msg = f"there are no vectors in {str(directory)!r}"
        raise StorageError(msg)
    return firsts[-1].with_suffix("")
