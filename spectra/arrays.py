"""How do arrays lie in a file? As safetensors, read and written in one go, with the checksum.

The package `safetensors` maps files into memory: what it returns may change or vanish with the file
after a checksum was taken of it. Here each byte is read once, into the tensor that is returned, and
nothing is held twice. Any reader of safetensors reads the files.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from spectra.documents import parse
from spectra.files import open_file

__all__ = ["arrays_checksum", "arrays_file", "bytes_of", "read_arrays"]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# The package's own limit for the header is above it; a header of ours names a few dozen arrays.
_MOST_HEADER = 64 << 20
# NumPy has no more, before its version 2 half of it.
_MOST_DIMENSIONS = 64


class _Entry(NamedTuple):
    name: str
    dtype: torch.dtype
    shape: list[int]
    start: int
    stop: int


def arrays_file(arrays: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The parts of a file of arrays, which lie contiguously on the CPU.

    Raises
    ------
    TypeError
        The format has no such dtype.
    """
    # The widest first, so that all are aligned, as the format wants it.
    order = sorted(arrays, key=lambda name: -arrays[name].element_size())
    header, place = {}, 0
    for name in order:
        array = arrays[name]
        if array.dtype not in _NAMES:
            msg = f"{name!r} is of {array.dtype}, which safetensors does not have"
            raise TypeError(msg)
        start, place = place, place + array.numel() * array.element_size()
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [start, place],
        }
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        yield bytes_of(arrays[name])


def arrays_checksum(arrays: Mapping[str, Tensor]) -> str:
    """The SHA-256 of the file, as `sha256sum` prints it."""
    digest = hashlib.sha256()
    for part in arrays_file(arrays):
        digest.update(part)
    return digest.hexdigest()


def read_arrays(path: Path) -> tuple[dict[str, Tensor], str]:
    """The arrays of a file, and its SHA-256.

    Raises
    ------
    OSError
        It is missing, cannot be read, or is no file.
    ValueError
        It is no whole file of safetensors.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, _MOST_HEADER):
            msg = f"{path.name} has {size} bytes, too few for the header that it states"
            raise ValueError(msg)
        text = file.read(length)
        digest = hashlib.sha256(start + text)
        # Before any memory is taken, so that it is never more than the file has.
        entries = _entries(parse(text), size - 8 - length)
        return {entry.name: _read(file, entry, digest) for entry in entries}, digest.hexdigest()


def _entries(header: Any, size: int) -> list[_Entry]:
    """What the header says of each array, in the order of the file, which they fill."""
    if not isinstance(header, dict):
        msg = "the header of the arrays is no object of JSON"
        raise ValueError(msg)  # noqa: TRY004 - a damaged file, not a wrong argument
    header.pop("__metadata__", None)
    entries = sorted(
        (_entry(name, found) for name, found in header.items()), key=lambda e: (e.start, e.stop)
    )
    place = 0
    for entry in entries:
        if entry.start != place:
            msg = f"array {entry.name[:80]!r} begins at byte {entry.start}, expected {place}"
            raise ValueError(msg)
        place = entry.stop
    if place != size:
        msg = f"its header describes {place} bytes of arrays, and it holds {size}"
        raise ValueError(msg)
    return entries


def _entry(name: str, found: Any) -> _Entry:
    if not isinstance(found, dict) or set(found) != {"dtype", "shape", "data_offsets"}:
        msg = f"array {name[:80]!r} has no dtype, shape and data_offsets"
        raise ValueError(msg)
    dtype, shape, offsets = found["dtype"], found["shape"], found["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        msg = f"array {name[:80]!r} is of an unknown dtype"
        raise ValueError(msg)
    if not (_are_counts(shape) and _are_counts(offsets) and len(offsets) == 2):
        msg = f"the shape or data_offsets of array {name[:80]!r} are no lists of counts"
        raise ValueError(msg)
    expected = math.prod(shape) * _DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != expected:
        msg = f"array {name[:80]!r} takes {expected} bytes, and its data_offsets say otherwise"
        raise ValueError(msg)
    return _Entry(name, _DTYPES[dtype], shape, *offsets)


def _are_counts(values: Any) -> bool:
    """Whether these can be sizes: integers that are neither negative nor beyond the machine's."""
    if not isinstance(values, list) or len(values) > _MOST_DIMENSIONS:
        return False
    return all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _read(file: BinaryIO, entry: _Entry, digest: Any) -> Tensor:
    try:
        array = torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
    except (RuntimeError, MemoryError) as error:
        msg = f"array {entry.name[:80]!r} of shape {entry.shape[:8]} cannot be held: {error}"
        raise ValueError(msg) from error
    rest = bytes_of(array)
    while rest:
        count = file.readinto(rest)  # type: ignore[attr-defined]
        if not count:
            msg = "the file of arrays became shorter while it was read"
            raise ValueError(msg)
        digest.update(rest[:count])
        rest = rest[count:]
    return array


def bytes_of(array: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, to be read or written."""
    # One number may have any stride, and is viewed as bytes only with the stride 1.
    flat = array.detach().reshape(-1).as_strided((array.numel(),), (1,))
    return flat.view(torch.uint8).numpy().data
