"""How do ranks keep one record of a run? Rank 0 has the file, and all read from it together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from spectra.distributed.collectives import Ranks
from spectra.records import Record, RecordFile

__all__ = ["SharedRecords"]


class SharedRecords:
    """A file of records as `RecordFile`, whose every call is made by all ranks.

    What records say is known on all of them, their arrays are sent when they are read. Whether a
    write succeeded is told to all, so that a full disk ends the recording at one place for all.

    Parameters
    ----------
    open
        Called on rank 0 alone.
    """

    def __init__(self, ranks: Ranks, open: Callable[[], RecordFile]) -> None:
        self._ranks = ranks
        self._file: RecordFile | None = None

        def opened() -> tuple[list[Record], bool]:
            self._file = open()
            return self._file.records, self._file.torn

        known, self.torn = ranks.shared("opening the checkpoint", opened)
        # Of rank 0 the file's own, by which it knows their places.
        self.records: list[Record] = known if self._file is None else self._file.records

    @property
    def writes(self) -> bool:
        """Whether the arrays that are to be recorded are needed here: on the rank with the file."""
        return self._file is not None

    def append(self, meta: dict[str, Any], arrays: Sequence[Tensor] = ()) -> None:
        """Add a record. Raises OSError on all ranks where it cannot be written."""
        self._try(lambda file: file.append(meta, arrays))
        if self._file is None:
            self.records.append(Record(meta, 0, 0))

    def read(self, record: Record) -> Iterator[Tensor]:
        """The arrays of a record, one after the other, on the CPU of all ranks."""
        arrays = iter(()) if self._file is None else self._file.read(record)
        for name, shape in record.meta.get("arrays", ()):
            array = self._ranks.everywhere("reading the checkpoint", lambda: next(arrays, None))
            if array is None:
                array = torch.empty(shape, dtype=getattr(torch, name))
            self._ranks.broadcast(array)
            yield array
        # After the last array its checksum is compared.
        self._ranks.everywhere("reading the checkpoint", lambda: list(arrays))

    def rewrite(self, kept: Sequence[tuple[Record, bool]], meta: Any, arrays: Any) -> None:
        """Replace the file by some of its records and a new one, as `RecordFile.rewrite`."""
        self._try(lambda file: file.rewrite(kept, meta, arrays))
        known = self._ranks.shared(
            "the checkpoint's records", lambda: [] if self._file is None else self._file.records
        )
        self.records = known if self._file is None else self._file.records

    def close(self) -> None:
        """Close the file, and let others have it."""
        if self._file is not None:
            self._file.close()

    def remove(self) -> None:
        """Close and delete the file."""
        if self._file is not None:
            self._file.remove()

    def _try(self, change: Callable[[RecordFile], None]) -> None:
        def outcome() -> tuple[int | None, str] | None:
            assert self._file is not None
            try:
                change(self._file)
            except OSError as error:
                return error.errno, error.strerror or str(error)
            return None

        if (failure := self._ranks.shared("writing the checkpoint", outcome)) is not None:
            raise OSError(*failure)
