"""How does a file come to be whole or not at all? Written beside its place, then renamed.

And how is one opened whose path may lead anywhere? Only if it is a file.
"""

from __future__ import annotations

import contextlib
import os
import stat
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

__all__ = ["open_file", "replace_file", "sync_directory"]


def open_file(path: Path) -> BinaryIO:
    """Open a file to read; what is none (a pipe, a device) is refused and never waited for.

    Raises
    ------
    OSError
        It is missing, cannot be read, or is no file.
    """
    file = open(path, "rb", opener=_open_without_waiting)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        msg = f"{path.name} is no regular file"
        raise OSError(msg)
    return file


def _open_without_waiting(path: str, flags: int) -> int:
    # Windows has no such flag, and no pipes among its files.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def replace_file(path: Path, content: bytes | Iterable[bytes | memoryview]) -> None:
    """Write a file so that whoever looks, at whatever moment, finds the old one or the new one.

    A temporary file in the same directory is written, brought to the disk (`fsync`) and renamed;
    nothing of it is left where that fails.

    Raises
    ------
    OSError
        The directory does not exist or cannot be written to, or the disk is full.
    """
    parts: Iterable[bytes | memoryview] = [content] if isinstance(content, bytes) else content
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Bring the names in a directory to the disk, where the system can."""
    # Windows opens no directories, and some network file systems do not sync them.
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
