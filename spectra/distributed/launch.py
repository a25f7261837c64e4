"""Was this program started once for each share of the data? torchrun says so in the environment."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from spectra.errors import ArgumentError

__all__ = ["EveryNth", "launched", "processes"]


def processes() -> int:
    """How many processes torchrun has started; 1 without it.

    Raises
    ------
    ArgumentError
        The environment is not as torchrun sets it.
    """
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal():
        msg = (
            f"WORLD_SIZE={text!r} in the environment is no number; start the program with torchrun"
        )
        raise ArgumentError(msg)
    return int(text)


@contextlib.contextmanager
def launched() -> Iterator[int]:
    """Within it the processes that torchrun started know one another; the rank of this one.

    By NCCL where there are GPUs, each process on its own; by Gloo otherwise.
    """
    if processes() == 1:
        yield 0
        return
    if "RANK" not in os.environ or "MASTER_ADDR" not in os.environ:
        msg = "WORLD_SIZE is set, but not RANK and MASTER_ADDR; start the program with torchrun"
        raise ArgumentError(msg)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl")
    else:
        dist.init_process_group("gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


class EveryNth:
    """Every n-th batch of the data, from one on: the share of one process.

    Each process reads all of the data and keeps its own.
    """

    def __init__(self, data: Any, rank: int, size: int) -> None:
        self._data, self._rank, self._size = data, rank, size
        # Where the generators of a loader that shuffles are looked for.
        self.generator = getattr(data, "generator", None)
        self.sampler = getattr(data, "sampler", None)

    def __iter__(self) -> Iterator[Any]:
        for place, batch in enumerate(self._data):
            if place % self._size == self._rank:
                yield batch
