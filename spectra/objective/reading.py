"""Is the next batch read while the present one is worked on?

Where reading is slow, and draws no random numbers: the first pass over the data shows both. Global
random generators are shared by threads, so that a loader which draws from one for every batch
(augmentation) is read in its turn, and draws what it did.
"""

from __future__ import annotations

import contextlib
import contextvars
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from spectra.objective.batches import Moved, batches_of
from spectra.objective.keeping import (
    global_random_states,
    random_states,
    set_random_states,
)

__all__ = ["Reader", "is_slow"]

_END = object()
# Reading that takes less, of a pass or for each batch, is not worth a thread.
_SHARE, _SECONDS = 0.02, 1e-3


def is_slow(reading: float, whole: float, count: int) -> bool:
    """Whether seconds of reading so many batches matter in a pass of `whole` seconds."""
    return reading > _SHARE * whole and reading > _SECONDS * count


class Reader:
    """Reads data, pass after pass.

    Attributes
    ----------
    ahead
        Whether the next batch is read in a thread of its own; None while no pass was read to its
        end.
    moved
        Copies on another device, of data that stay at hand; None for others, whose tensors are new
        ones in every pass.
    """

    def __init__(self, data: Iterable[Any]) -> None:
        self._data = data
        at_hand = isinstance(data, list | tuple)
        # Processes of a loader's own are ahead already.
        with_workers = bool(getattr(data, "num_workers", 0))
        self.moved = Moved() if at_hand else None
        self.ahead: bool | None = False if at_hand or with_workers else None

    def batches(self) -> Iterator[Any]:
        """The batches of one pass, in order.

        Raises
        ------
        DataError
            Reading one of them raised something; its number is named.
        """
        if self.ahead is None:
            return self._watched()
        return self._read_ahead() if self.ahead else batches_of(self._data)

    def _watched(self) -> Iterator[Any]:
        begun, reading, count, drawn = time.perf_counter(), 0.0, 0, False
        batches = batches_of(self._data)
        while True:
            states, start = global_random_states(), time.perf_counter()
            batch = next(batches, _END)
            reading += time.perf_counter() - start
            # Samplers draw the order of all batches with the first one, which is read in its turn.
            drawn = drawn or (count > 0 and global_random_states() != states)
            if batch is _END:
                break
            count += 1
            yield batch
        whole = time.perf_counter() - begun
        self.ahead = not drawn and is_slow(reading, whole, count)

    def _read_ahead(self) -> Iterator[Any]:
        begun, read = random_states(self._data), 0
        batches = batches_of(self._data)
        batch = next(batches, _END)
        # At its end, an early one too, it waits for the batch that is being read.
        with ThreadPoolExecutor(1, "spectra-reading") as pool:
            while batch is not _END:
                # A context of one's own can be entered by one thread at a time.
                context, device = contextvars.copy_context(), torch.get_default_device()
                coming = pool.submit(context.run, _next, batches, device)
                read += 1
                yield batch
                try:
                    batch = coming.result()
                except Exception:
                    # What cannot be used from two threads, a connection to a database perhaps, is
                    # read in this one; and what is wrong otherwise is told by the same error again.
                    self.ahead = False
                    break
            else:
                return
        batches = self._read_again(read, begun)
        yield from batches

    def _read_again(self, read: int, begun: Any) -> Iterator[Any]:
        """The batches after the first ones, of a pass that began at some random states."""
        now = random_states(self._data)
        set_random_states(begun)
        batches = batches_of(self._data)
        for _ in range(read):
            next(batches, None)
        set_random_states(now)
        return batches


def _next(batches: Iterator[Any], device: torch.device) -> Any:
    """The next batch, made on the default device of the thread that asks for it."""
    elsewhere = device if device.type != "cpu" else contextlib.nullcontext()
    with elsewhere:
        return next(batches, _END)
