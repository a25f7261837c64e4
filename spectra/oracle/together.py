"""Are several vectors multiplied faster together, or one after the other?

On a kept graph a batched backward pass multiplies many vectors at once. It pays where products are
small beside the time it takes to start their operations: on accelerators, and for tiny networks
with many batches (0.4 to 0.8 times as long for each vector). On CPUs it takes networks 1.2 to 1.4
times as long, and its first use in a process seconds. So it is tried only after some seconds of
products one by one, and kept if it is clearly faster.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from spectra.objective.memory import memory_ran_out

__all__ = ["Terms", "Together"]

T = TypeVar("T")
Terms = tuple[Tensor | None, ...]
# Of one vector, and of rows of vectors: lists with one tensor for each parameter.
_One = Callable[[Sequence[Tensor]], Terms]

# Vectors in one batched pass: each takes as much memory for intermediate results as a product.
_MOST = 8
# Spent on several vectors one by one before the other way is tried.
_SECONDS = 3.0
# By which share of the time: less may be noise, and the other way needs less memory.
_GAIN = 0.9
# Of single precision, as a multiple of its eps: both ways add in another order.
_TOLERANCE = 1e3


class Together:
    """Chooses, by trying both ways on one part of the data, and remembers.

    Attributes
    ----------
    faster
        Whether several vectors are multiplied together; None while that has not been tried.
    """

    def __init__(self, patience: float = _SECONDS) -> None:
        self.faster: bool | None = None
        self._patience = patience
        self._spent = 0.0
        self._because = ""

    def describe(self) -> str | None:
        """What was chosen and why, None as long as nothing was."""
        if self.faster is None:
            return None
        return f"{'together' if self.faster else 'one by one'}: {self._because}"

    def give_up(self, because: str) -> bool:
        """One by one from now on; whether that is a change."""
        changed = bool(self.faster)
        self.faster, self._because = False, because
        return changed

    def multiply(self, one: _One, many: _One, rows: Sequence[Sequence[Tensor]]) -> Iterator[Terms]:
        """The terms of each of several vectors, in order.

        Parameters
        ----------
        one, many
            The derivative along a vector, and along several that are stacked in the first
            dimension.
        rows
            The vectors, each with one tensor for each parameter.
        """
        for start in range(0, len(rows), _MOST):
            some = rows[start : start + _MOST]
            if self.faster is None and len(some) > 1 and self._spent >= self._patience:
                yield from self._tried(one, many, some)
            elif self.faster and len(some) > 1:
                yield from _unstacked(many(_stacked(some)), len(some))
            else:
                for row in some:
                    yield self._counted(one, row)

    def _counted(self, one: _One, row: Sequence[Tensor]) -> Terms:
        if self.faster is not None:
            return one(row)
        seconds, terms = _timed(row[0].device, lambda: one(row))
        self._spent += seconds
        return terms

    def _tried(self, one: _One, many: _One, rows: Sequence[Sequence[Tensor]]) -> list[Terms]:
        device = rows[0][0].device
        apart, terms = _timed(device, lambda: [one(row) for row in rows])
        stacked = _stacked(rows)
        try:
            with warnings.catch_warnings():
                # Of operations without a batched form, which run one by one inside: time tells.
                warnings.simplefilter("ignore")
                many(stacked)
                together, batched = _timed(device, lambda: many(stacked))
        except Exception as error:
            # Operations refuse in more ways than anyone lists; what is wrong in both ways of
            # multiplying was raised above.
            self.give_up("memory ran out together" if memory_ran_out(error) else _first(error))
            return terms
        off = _difference(terms, _unstacked(batched, len(rows)))
        took = f"{len(rows)} together took {together / apart:.2f} times as long"
        self._because = took if off is None else f"{len(rows)} together were {off:.2g} off"
        self.faster = off is None and together < _GAIN * apart
        return terms


def _stacked(rows: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.stack(list(tensors)) for tensors in zip(*rows, strict=True)]


def _unstacked(terms: Terms, count: int) -> list[Terms]:
    parts: list[Sequence[Tensor | None]] = [
        [None] * count if t is None else t.unbind() for t in terms
    ]
    return list(zip(*parts, strict=True))


def _difference(apart: list[Terms], together: list[Terms]) -> float | None:
    """By how much two ways differ, where that is more than rounding."""
    square = difference = 0.0
    eps = 0.0
    for row, other in zip(apart, together, strict=True):
        for a, b in zip(row, other, strict=True):
            if a is None:
                continue
            eps = max(eps, torch.finfo(a.dtype).eps)
            exact = a.detach().to_dense().double()
            square += float(exact.square().sum())
            if b is not None:
                exact = exact - b.detach().double()
            difference += float(exact.square().sum())
    off = (difference / square) ** 0.5 if square > 0 else difference**0.5
    return off if not off <= _TOLERANCE * eps else None


def _first(error: Exception) -> str:
    line = next(iter(str(error).strip().splitlines()), "")
    return f"together {type(error).__name__}: {line}"[:120]


def _timed(device: torch.device, work: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result
