"""Where do vectors live that do not fit beside the operator? In a file that the system maps.

The file is unlinked as soon as it is mapped: whatever ends the process, nothing is left of it, and
its blocks are free when the last tensor that refers to it is. All of them are allocated at once,
because a write to a mapped file on a full disk ends the process (SIGBUS).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import mmap
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from spectra.errors import StorageError

__all__ = ["Place", "free_disk_bytes", "give_back", "is_on_disk", "read_ahead", "rows_on_disk"]

Place = Literal["device", "host", "disk"]

# Linux reads no more at one request than its own read-ahead, by default this many bytes.
_REQUEST = 128 << 10
# Of <sys/mman.h>; those that Python's mmap has are not defined on every system.
_WILL_NEED, _DO_NOT_NEED, _REMOVE = 3, 4, 9


def rows_on_disk(count: int, n: int, dtype: torch.dtype) -> Tensor:
    """Zeros (count, n) in a temporary file, in the directory that TMPDIR names.

    Raises
    ------
    StorageError
        The file does not fit, cannot be made, or would be in memory after all.
    """
    size = count * n * torch.finfo(dtype).bits // 8
    if size == 0:
        return torch.empty(count, n, dtype=dtype, device="cpu")
    directory = tempfile.gettempdir()
    try:
        _check_room(directory, size)
        handle, path = tempfile.mkstemp(prefix="spectra-", dir=directory)
        try:
            # Elsewhere the check above has to do.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle, 0, size)
            options: dict[str, Any] = {"dtype": dtype, "device": "cpu"}
            return torch.from_file(path, shared=True, size=count * n, **options).view(count, n)
        finally:
            os.close(handle)
            os.unlink(path)
    except (OSError, RuntimeError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        msg = (
            f"a basis of {count} vectors takes {size / 2**30:.3g} GiB on disk, and no such file "
            f"can be made in {directory!r}: {why}; set TMPDIR to a directory with that much room, "
            "or hold fewer vectors (ncv)"
        )
        raise StorageError(msg) from error


def _check_room(directory: str, size: int) -> None:
    if _is_in_memory(directory):
        raise OSError(errno.EINVAL, "its file system is in memory (tmpfs)")
    # Before any block is taken: a disk that is filled to the brim hurts others.
    free = shutil.disk_usage(directory).free
    if size > free:
        raise OSError(errno.ENOSPC, f"it has {free / 2**30:.3g} GiB free")


def free_disk_bytes() -> int:
    """Bytes free for temporary files; none where their directory is in memory or unusable."""
    try:
        directory = tempfile.gettempdir()
        return 0 if _is_in_memory(directory) else shutil.disk_usage(directory).free
    except OSError:
        return 0


def is_on_disk(rows: Tensor) -> bool:
    """Whether a tensor, or what it is a view of, is a mapped file."""
    return rows.device.type == "cpu" and rows.untyped_storage().filename is not None


def read_ahead(rows: Tensor) -> None:
    """Have the disk fetch some rows (m, c) of a mapped file while something else is computed.

    Without it, blocks of columns are read page by page where the system's own read-ahead, made for
    one stream, is short.
    """
    count, columns = rows.shape
    stride = rows.stride(0) * rows.element_size()
    for i in range(count):
        _advise(rows.data_ptr() + i * stride, columns * rows.element_size(), _WILL_NEED, _REQUEST)


def give_back(rows: Tensor) -> None:
    """Let the system have the memory, or the blocks of the file, of rows that nobody reads again.

    Of the pages that are theirs alone, where the system knows how; their content is lost.
    """
    # Pages that a device may write to must stay.
    if rows.device.type != "cpu" or rows.is_pinned() or not rows.is_contiguous():
        return
    page = mmap.PAGESIZE
    start = -(-rows.data_ptr() // page) * page
    end = (rows.data_ptr() + rows.nbytes) // page * page
    if end > start:
        _advise(start, end - start, _REMOVE if is_on_disk(rows) else _DO_NOT_NEED)


def _advise(start: int, length: int, advice: int, request: int | None = None) -> None:
    """Tell the system about pages, so many bytes at a time; a hint, whose failure is no matter."""
    if not sys.platform.startswith("linux"):
        return
    end = start + length
    start = start // mmap.PAGESIZE * mmap.PAGESIZE
    step = request or max(end - start, 1)
    for piece in range(start, end, step):
        _libc().madvise(piece, min(step, end - piece), advice)


@functools.cache
def _libc() -> Any:
    library = ctypes.CDLL(None)
    library.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return library


def _is_in_memory(directory: str) -> bool:
    """Whether a directory's file system takes the machine's memory, as /tmp does on some."""
    directory, found, kind = os.path.realpath(directory), "", ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines():
            mount, system = line.split()[1:3]
            beneath = directory == mount or directory.startswith(mount.rstrip("/") + "/")
            # The last one mounted at a place is what is seen there.
            if beneath and len(mount) >= len(found):
                found, kind = mount, system
    return kind in {"tmpfs", "ramfs"}
