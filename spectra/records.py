"""How is a long run's progress kept in one file? As records that are appended, each with checksums.

    file   = magic record*
    record = length of meta (8) | bytes of arrays (8) | check of these (8) | check of meta (16)
             | meta (JSON) | arrays (raw, little-endian)

A checksum covers the one of the record before, so that none can be lost from the middle, and meta
holds the checksum of the arrays, which is compared when they are read. Nothing is ever executed or
unpickled. What a killed process or a lost power leaves is a file whose last record is cut off, or
not whole: it is dropped. Anything else that is not as it was written is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from spectra.arrays import bytes_of
from spectra.errors import StorageError
from spectra.files import replace_file, sync_directory

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["Record", "RecordFile"]

Buffer = bytes | memoryview

_MAGIC = b"spectra checkpoint, format 1\n"
_HEAD = struct.Struct("<QQ8s16s")
# Nothing that is written comes near: ten thousand parameters have less than a megabyte of names.
_MOST_META = 1 << 28
_PIECE = 1 << 24
_DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "uint8": torch.uint8,
    "int64": torch.int64,
    "bool": torch.bool,
}


@dataclass(frozen=True, eq=False)
class Record:
    """One record of a file: what it says, and where its arrays are."""

    meta: dict[str, Any]
    start: int
    size: int


class RecordFile:
    """An open file of records, locked against other processes.

    Raises
    ------
    StorageError
        On opening: it is no such file, it is damaged, or another process has it open.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[Record] = []
        self.torn = False
        """The last record was cut off, and dropped."""
        self.writes = True
        """It needs the arrays that are to be recorded."""
        self._made_directory = False
        self._file = self._opened()
        try:
            self._end, self._check = self._scan()
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(cls, path: Path, meta: dict[str, Any]) -> RecordFile:
        """A new file with one record, in place of whatever is there.

        Raises
        ------
        StorageError
            The directory cannot be written to, or the disk is full.
        """
        made = not path.parent.exists()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, [_MAGIC, *_record(meta, [], b"")[0]])
        except OSError as error:
            msg = f"cannot write the checkpoint {str(path)!r}: {error.strerror}; name another path"
            raise StorageError(msg) from error
        file = cls(path)
        file._made_directory = made
        return file

    def append(self, meta: dict[str, Any], arrays: Sequence[Tensor] = ()) -> None:
        """Add a record and bring it to the disk.

        Raises
        ------
        OSError
            The disk is full or gone. The file is then as it was before.
        """
        meta = _with_arrays(meta, arrays)
        parts, check = _record(meta, arrays, self._check)
        try:
            # What was torn off before may be longer than what is written now.
            self._file.truncate(self._end)
            self._file.seek(self._end)
            for part in parts:
                self._file.write(part)
            self._file.flush()
            os.fsync(self._file.fileno())
        except BaseException:
            # KeyboardInterrupt, too: the next record must not follow half of this one. What could
            # not be written is in a buffer still, and goes with the file object.
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = self._opened()
            self._file.truncate(self._end)
            raise
        size = sum(array.nbytes for array in arrays)
        self._end = self._file.tell()
        self._check = check
        self.records.append(Record(meta, self._end - size, size))

    def read(self, record: Record) -> Iterator[Tensor]:
        """The arrays of a record, one after the other, on the CPU.

        Raises
        ------
        StorageError
            They are not what was written: known only after the last one.
        """
        digest = hashlib.blake2b(digest_size=16)
        try:
            self._file.seek(record.start)
            for name, shape in record.meta.get("arrays", ()):
                array = torch.empty(shape, dtype=_DTYPES[name])
                buffer = bytes_of(array)
                if self._file.readinto(buffer) != len(buffer):  # type: ignore[attr-defined]
                    raise _damaged(self.path, "it ends within a record")
                digest.update(buffer)
                yield array
        except OSError as error:
            msg = f"cannot read the checkpoint {str(self.path)!r}: {error.strerror}"
            raise StorageError(msg) from error
        if record.size and record.meta.get("digest") != digest.hexdigest():
            raise _damaged(self.path, "the numbers of a record are not those that were written")

    def rewrite(self, kept: Sequence[tuple[Record, bool]], meta: Any, arrays: Any) -> None:
        """Replace the whole file by some of its records and a new one, at once.

        Parameters
        ----------
        kept
            Records, and whether with their arrays; those without are marked as `stripped`.
        meta, arrays
            Of the new record.

        Raises
        ------
        OSError
            The disk is full or gone. The file is then as it was before.
        """
        replace_file(self.path, self._pieces(kept, meta, arrays))
        self.close()
        self.records, self._file = [], self._opened()
        self._end, self._check = self._scan()

    def close(self) -> None:
        """Close the file, and let others have it."""
        self._file.close()

    def remove(self) -> None:
        """Close and delete the file, and the directory if it was made for it and is empty."""
        self.close()
        with contextlib.suppress(OSError):
            self.path.unlink()
            sync_directory(self.path.parent)
            if self._made_directory:
                self.path.parent.rmdir()

    def _pieces(
        self, kept: Sequence[tuple[Record, bool]], meta: dict[str, Any], arrays: Sequence[Tensor]
    ) -> Iterator[Buffer]:
        yield _MAGIC
        check = b""
        for record, whole in kept:
            if not whole:
                left_over = {k: v for k, v in record.meta.items() if k not in _OF_ARRAYS}
                parts, check = _record({**left_over, "stripped": True}, [], check)
                yield from parts
                continue
            head, check = _head(record.meta, record.size, check)
            yield from head
            self._file.seek(record.start)
            left = record.size
            while left:
                piece = self._file.read(min(left, _PIECE))
                if not piece:
                    raise _damaged(self.path, "it ends within a record")
                left -= len(piece)
                yield piece
        parts, _ = _record(_with_arrays(meta, arrays), arrays, check)
        yield from parts

    def _only_zeros_follow(self, head: bytes, end: int) -> bool:
        """Where the power was lost, the last blocks of a file may be there without content."""
        if not head.endswith(b"\0"):
            return False
        self._file.seek(end + _HEAD.size)
        while piece := self._file.read(_PIECE):
            if piece.strip(b"\0"):
                self._file.seek(end + _HEAD.size)
                return False
        self._file.seek(end + _HEAD.size)
        return True

    def _is_whole(self, record: Record) -> bool:
        """Whether the arrays are what was written; of the last record, before it is relied on."""
        try:
            for _ in self.read(record):
                pass
        except StorageError:
            return False
        return True

    def _opened(self) -> BinaryIO:
        path = self.path
        # A pipe would wait for a writer, a device may not end.
        if path.exists() and not path.is_file():
            msg = f"{str(path)!r} is no ordinary file; name another path for the checkpoint"
            raise StorageError(msg)
        try:
            file = open(path, "r+b")
        except OSError as error:
            msg = f"cannot open the checkpoint {str(path)!r} for writing: {error.strerror}"
            raise StorageError(msg) from error
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.close()
                msg = (
                    f"another run is writing to the checkpoint {str(path)!r}; name another path, "
                    "or wait for its end"
                )
                raise StorageError(msg) from error
            except OSError:
                # Some network file systems have no locks.
                pass
        return file

    def _scan(self) -> tuple[int, bytes]:
        """Take in what each record says: where the last whole one ends, and its checksum."""
        file, path = self._file, self.path
        length = os.fstat(file.fileno()).st_size
        file.seek(0)
        if file.read(len(_MAGIC)) != _MAGIC:
            msg = (
                f"{str(path)!r} is no checkpoint of this version of spectra; name another path, or "
                "delete it"
            )
            raise StorageError(msg)
        end, check = len(_MAGIC), b""
        self.torn = False
        while end < length:
            head = file.read(_HEAD.size)
            if len(head) < _HEAD.size or self._only_zeros_follow(head, end):
                self.torn = True
                break
            meta_length, size, head_check, meta_check = _HEAD.unpack(head)
            if head_check != _digest(head[:16], check)[:8] or meta_length > _MOST_META:
                raise _damaged(path, f"the record at byte {end} is not what was written")
            start = end + _HEAD.size + meta_length
            if start + size > length:
                self.torn = True
                break
            content = file.read(meta_length)
            if meta_check != _digest(head[:16] + content, check):
                if start + size == length:
                    self.torn = True
                    break
                raise _damaged(path, f"the record at byte {end} is not what was written")
            record = Record(_checked_meta(path, content, size), start, size)
            if start + size == length and not self._is_whole(record):
                self.torn = True
                break
            self.records.append(record)
            end, check = start + size, meta_check
            file.seek(end)
        if not self.records:
            raise _damaged(path, "it holds no whole record")
        return end, check


# What of a record is said of its arrays.
_OF_ARRAYS = ("arrays", "digest", "rows")


def _record(
    meta: dict[str, Any], arrays: Sequence[Tensor], before: bytes
) -> tuple[list[Buffer], bytes]:
    """A record's bytes, and its checksum."""
    buffers = [bytes_of(array) for array in arrays]
    head, check = _head(meta, sum(map(len, buffers)), before)
    return [*head, *buffers], check


def _head(meta: dict[str, Any], size: int, before: bytes) -> tuple[list[bytes], bytes]:
    content = json.dumps(meta, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode()
    lengths = struct.pack("<QQ", len(content), size)
    check = _digest(lengths + content, before)
    return [lengths, _digest(lengths, before)[:8], check, content], check


def _with_arrays(meta: dict[str, Any], arrays: Sequence[Tensor]) -> dict[str, Any]:
    if not arrays:
        return meta
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(bytes_of(array))
    shapes = [[str(a.dtype).removeprefix("torch."), list(a.shape)] for a in arrays]
    return {**meta, "arrays": shapes, "digest": digest.hexdigest()}


def _checked_meta(path: Path, content: bytes, size: int) -> dict[str, Any]:
    """What a record says, once it is clear that its arrays are as large as they are said to be."""
    try:
        meta = json.loads(content)
        expected = sum(
            torch.empty(0, dtype=_DTYPES[name]).element_size() * _product(shape)
            for name, shape in meta.get("arrays", ())
        )
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"a record is not readable ({type(error).__name__})") from error
    if not isinstance(meta, dict) or not isinstance(meta.get("kind"), str):
        raise _damaged(path, "a record does not say of which kind it is")
    if expected != size:
        raise _damaged(path, f"a record says {expected} bytes and has {size}")
    return dict(meta)


def _product(shape: list[int]) -> int:
    total = 1
    for length in shape:
        if not isinstance(length, int) or length < 0:
            raise ValueError(length)
        total *= length
    return total


def _digest(content: bytes, before: bytes) -> bytes:
    return hashlib.blake2b(before + content, digest_size=16).digest()


def _damaged(path: Path, why: str) -> StorageError:
    return StorageError(
        f"the checkpoint {str(path)!r} is damaged: {why}. Delete it, or name another path, to "
        "begin anew"
    )
