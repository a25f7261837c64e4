"""How do processes that each hold a share of the data act as one?

Every pass over the data is one on all of them: they exchange a few numbers, and sum what they
computed. By the numbers each of them sees at the same place whether one has failed, asks another
question, or holds other weights: all of them then end, instead of waiting for one another.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from spectra import errors
from spectra.errors import ArgumentError, ArgumentTypeError, DistributedError

__all__ = ["NUMBERS", "Ranks", "agreed", "everywhere", "leads", "ranks_of"]

T = TypeVar("T")

NUMBERS = 5
"""How many numbers a pass hands to the others."""
_GIVEN = 3
_FAILED, _FINE = 1.0, 0.0


# As they are called since PyTorch 2.13, or before; both are missing where it was built without.
_all_gather: Any = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))
_reduce_scatter: Any = getattr(
    dist, "reduce_scatter_single", getattr(dist, "reduce_scatter_tensor", None)
)


class Ranks:
    """The processes of a group, as seen from one of them.

    Attributes
    ----------
    rank, size
        Of this process, from 0 on; and how many there are.
    calls, bytes
        Collective calls so far, and what this process handed over in them.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank: int = dist.get_rank(group)
        self.size: int = dist.get_world_size(group)
        self.calls = self.bytes = 0
        # What all ranks have raised together: none has to be told of it again.
        self._known: BaseException | None = None
        nccl = "nccl" in str(dist.get_backend(group))
        self._device = torch.device("cuda", torch.cuda.current_device()) if nccl else "cpu"

    def add(self, tensor: Tensor) -> None:
        """The sum over all ranks of a tensor, in place: the same on all of them to the last bit."""
        self._count(tensor)
        self._reached(lambda: dist.all_reduce(tensor, group=self._group))

    def gathered(self, numbers: Sequence[float]) -> list[list[float]]:
        """A few numbers of every rank, in order of the ranks."""
        mine = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        self._count(mine)
        self._reached(lambda: dist.all_gather(rows, mine, group=self._group))
        return [row.tolist() for row in rows]

    def all_gather(self, out: Tensor, mine: Tensor, group: dist.ProcessGroup) -> None:
        """The tensors of all ranks of a part of the group, one after the other in `out`."""
        self.meet(f"gathering {mine.numel()} numbers")
        self._count(mine, times=len(out) // max(len(mine), 1) - 1)
        self._reached(lambda: _all_gather(out, mine, group=group))

    def reduce_scatter(self, out: Tensor, whole: Tensor, group: dist.ProcessGroup) -> None:
        """Of the sum over a part of the group, the part of this rank."""
        self.meet(f"scattering {whole.numel()} numbers")
        self._count(out, times=len(whole) // max(len(out), 1) - 1)
        self._reached(lambda: _reduce_scatter(out, whole, group=group))

    def all_reduce(self, tensor: Tensor, group: dist.ProcessGroup) -> None:
        """The sum over a part of the group, in place."""
        self.meet(f"summing {tensor.numel()} numbers")
        self._count(tensor)
        self._reached(lambda: dist.all_reduce(tensor, group=group))

    def meet(self, what: str, numbers: Sequence[float] = ()) -> list[list[float]]:
        """The numbers of all ranks, in the middle of what they `compute` together.

        Raises
        ------
        DistributedError
            As `together`: a rank that failed since, or is elsewhere, is here in its stead.
        """
        rows = self.gathered(self._row(_FINE, what, (), numbers))
        return self._settled(rows, what, None, dict)

    def told(self, value: T) -> list[T]:
        """A small object of every rank, in order of the ranks."""
        values: list[Any] = [None] * self.size
        self.calls += 1
        self._reached(lambda: dist.all_gather_object(values, value, group=self._group))
        return values

    def everywhere(self, what: str, make: Callable[[], T]) -> T:
        """What `make` returns on this rank; an exception on one rank is one on all."""
        value, _ = self.together(what, (), lambda: (make(), ()), dict)
        return value

    def shared(self, what: str, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, which alone calls it: on all ranks, a copy."""
        mine = self.everywhere(what, lambda: make() if self.rank == 0 else None)
        there: Any = self.told(mine)[0]
        return there if self.rank else mine  # type: ignore[return-value]

    def broadcast(self, tensor: Tensor) -> None:
        """Replace a tensor by that of rank 0."""
        there = tensor.to(self._device)
        self._count(tensor)
        source = dist.get_global_rank(self._group, 0)
        self._reached(lambda: dist.broadcast(there, source, group=self._group))
        if there is not tensor:
            tensor.copy_(there)

    def least(self, number: float) -> float:
        """The smallest of what the ranks say: what all of them can afford."""
        return min(row[0] for row in self.gathered([number]))

    def together(
        self,
        what: str,
        given: Sequence[float],
        compute: Callable[[], tuple[T, Sequence[float]]],
        explain: Callable[[], dict[str, str]],
    ) -> tuple[T, list[list[float]]]:
        """Compute on every rank; what fails on one fails on all.

        Parameters
        ----------
        what
            Which computation, for people; the same on all ranks.
        given
            At most three numbers that it starts from, which have to be the same on all ranks.
        compute
            This rank's share, and at most `NUMBERS` numbers for the others. It calls nothing here
            but what meets first (`meet`, `all_gather`, `reduce_scatter`, `all_reduce`).
        explain
            What `given` was made from, by name, to find out what differs.

        Returns
        -------
        tuple
            This rank's share, and the numbers of all ranks.

        Raises
        ------
        DistributedError
            Another rank has ended, is at another computation, or failed with an exception that is
            not of spectra; with one that is, the same kind.
        """
        numbers: Sequence[float] = ()
        failure: BaseException | None = None
        self._known = None
        try:
            value, numbers = compute()
        except BaseException as error:
            if error is self._known:
                raise
            failure = error
        status = _FINE if failure is None else _FAILED
        try:
            rows = self.gathered(self._row(status, what, given, numbers))
        except DistributedError:
            if failure is not None:
                raise failure from None
            raise
        told = self._settled(rows, what, failure, explain)
        return value, told

    def _row(
        self, status: float, what: str, given: Sequence[float], numbers: Sequence[float]
    ) -> list[float]:
        # Of one length wherever a rank is, so that those that are apart can tell.
        return [
            status,
            float(zlib.crc32(what.encode())),
            *given,
            *[0.0] * (_GIVEN - len(given)),
            *numbers,
            *[0.0] * (NUMBERS - len(numbers)),
        ]

    def _settled(
        self,
        rows: list[list[float]],
        what: str,
        failure: BaseException | None,
        explain: Callable[[], dict[str, str]],
    ) -> list[list[float]]:
        """What the ranks hand to one another, once it is clear that all are fine and together."""
        end = 2 + _GIVEN
        try:
            if any(row[0] == _FAILED for row in rows):
                self._fail(failure)
            if any(not _equal(row[1:end], rows[0][1:end]) for row in rows):
                self._disagree(what, explain())
        except BaseException as error:
            self._known = error
            raise
        return [row[end:] for row in rows]

    def _fail(self, failure: BaseException | None) -> None:
        told = self.told(None if failure is None else (type(failure).__name__, str(failure)))
        if failure is not None:
            raise failure
        rank, (name, text) = next((i, found) for i, found in enumerate(told) if found is not None)
        msg = (
            f"rank {rank} of {self.size} failed, and rank {self.rank} ends with it: {name}: {text}"
        )
        # Of the same kind, so that who catches it there catches it here, and all stay in step.
        kind = getattr(errors, name, None) if name in errors.__all__ else None
        raise (kind or DistributedError)(msg)

    def _disagree(self, what: str, mine: dict[str, str]) -> None:
        told = self.told({"question": what, **mine})
        for rank, other in enumerate(told):
            for name in {**told[0], **other}:
                ours, theirs = told[0].get(name), other.get(name)
                if ours != theirs:
                    short = all(len(str(text)) <= 60 for text in (ours, theirs))
                    how = f" ({ours} on rank 0, {theirs} on rank {rank})" if short else ""
                    msg = (
                        f"rank {rank} differs from rank 0 in: {name}{how}. All ranks have to make "
                        "the same calls, with the same weights, options and seeds, each with its "
                        "share of the data"
                    )
                    raise DistributedError(msg)
        msg = (
            f"the ranks differ in what they compute ({what}), though not in anything that can be "
            "named: look for options or seeds that depend on the rank"
        )
        raise DistributedError(msg)

    def _count(self, tensor: Tensor, times: int = 1) -> None:
        self.calls += 1
        self.bytes += times * tensor.numel() * tensor.element_size()

    def _reached(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except RuntimeError as error:
            words = " ".join(str(error).split())[:200]
            msg = (
                f"rank {self.rank} of {self.size} could not reach the others: one of them has "
                f"ended, or did not answer in time ({words})"
            )
            raise DistributedError(msg) from error


def ranks_of(process_group: Any) -> Ranks | None:
    """The processes that a group consists of; None without a group.

    Raises
    ------
    ArgumentError
        There is no group, or this process is not in it.
    ArgumentTypeError
        It is no group.
    """
    if process_group is None or process_group is False:
        return None
    if not dist.is_available() or not dist.is_initialized():
        msg = (
            "process_group is given, but torch.distributed is not initialised: call "
            "torch.distributed.init_process_group() first, and run the program with torchrun"
        )
        raise ArgumentError(msg)
    group = dist.group.WORLD if process_group is True else process_group
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        msg = "this process is not in process_group; make the operator only where it is"
        raise ArgumentError(msg)
    if not isinstance(group, dist.ProcessGroup):
        msg = (
            f"process_group is a {type(process_group).__name__}; expected True, or what "
            "torch.distributed.new_group() returns"
        )
        raise ArgumentTypeError(msg)
    return Ranks(group)


def everywhere(ranks: Ranks | None, what: str, make: Callable[[], T]) -> T:
    """What `make` returns here; what fails on one of the ranks fails on all."""
    return make() if ranks is None else ranks.everywhere(what, make)


def agreed(ranks: Ranks | None, what: str, make: Callable[[], T]) -> T:
    """What `make` returns on rank 0, which alone calls it; or here, where there is one process."""
    return make() if ranks is None else ranks.shared(what, make)


def leads(ranks: Ranks | None) -> bool:
    """Whether this process decides and writes files: rank 0, or the only one."""
    return ranks is None or ranks.rank == 0


def _equal(one: Sequence[float], other: Sequence[float]) -> bool:
    """The same numbers, nan like nan."""
    return all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(one, other, strict=True))
