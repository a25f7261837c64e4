"""Are several vectors multiplied faster together, or one after the other?

On a kept graph a batched backward pass multiplies many vectors at once. It pays where products are
small beside the time it takes to start their operations: on accelerators, and for tiny networks
with many batches (0.4 to 0.8 times as long for each vector). On CPUs it takes networks 1.2 to 1.4
times as long, and its first use in a process seconds. So it is tried only after some seconds of
products one by one, and kept if it is clearly faster.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from spectra.objective.memory import memory_ran_out
from spectra.oracle.comparing import Terms, difference, timed

__all__ = ["Together"]

# Of one vector, and of rows of vectors: lists with one tensor for each parameter.
_One = Callable[[Sequence[Tensor]], Terms]

# Vectors in one batched pass: each takes as much memory for intermediate results as a product.
_MOST = 8
# Spent on several vectors one by one before the other way is tried.
_SECONDS = 3.0
# By which share of the time: less may be noise, and the other way needs less memory.
_GAIN = 0.9


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
        seconds, terms = timed(row[0].device, lambda: one(row))
        self._spent += seconds
        return terms

    def _tried(self, one: _One, many: _One, rows: Sequence[Sequence[Tensor]]) -> list[Terms]:
        device = rows[0][0].device
        apart, terms = timed(device, lambda: [one(row) for row in rows])
        stacked = _stacked(rows)
        try:
            with warnings.catch_warnings():
                # Of operations without a batched form, which run one by one inside: time tells.
                warnings.simplefilter("ignore")
                many(stacked)
                together, batched = timed(device, lambda: many(stacked))
        except Exception as error:
            # Operations refuse in more ways than anyone lists; what is wrong in both ways of
            # multiplying was raised above.
            self.give_up("memory ran out together" if memory_ran_out(error) else _first(error))
            return terms
        rows_of = _unstacked(batched, len(rows))
        off = difference([t for row in terms for t in row], [t for row in rows_of for t in row])
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


def _first(error: Exception) -> str:
    line = next(iter(str(error).strip().splitlines()), "")
    return f"together {type(error).__name__}: {line}"[:120]
