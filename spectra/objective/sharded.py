"""Which vectors belong to parameters that are spread over processes? Each has its part of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from spectra.distributed.collectives import Ranks
from spectra.distributed.sharding import Sharding, is_spread, local
from spectra.errors import ArgumentError
from spectra.objective.parameters import ParameterSpace, Selection
from spectra.objective.stored_vectors import Box

__all__ = ["ShardedSpace"]

# Random numbers that are drawn at a time. A multiple of 16, by which PyTorch makes normal ones, so
# that pieces are what one draw gives; a last piece of fewer would be made in another way.
_DRAWN, _TOGETHER = 1 << 20, 16


class ShardedSpace(ParameterSpace):
    """Vectors of which every process holds the entries of its shards, one after the other.

    `n` counts all entries, `length` those that are here; `slices` and `shapes` are of what is here.
    Sums over entries are sums over all processes. Of processes with copies of the same entries one
    counts them; those that are counted here come first.
    """

    spread = True

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        sharding: Sharding,
        ranks: Ranks,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(tensors, dtype)
        self.ranks = ranks
        self.sharding = sharding
        self._tensors = dict(tensors)
        self.sizes = tuple(tensor.numel() for tensor in tensors.values())
        self._layouts = [sharding.layout(tensor) for tensor in tensors.values()]
        self._owned = [sharding.owns(layout) for layout in self._layouts]
        self.shapes = tuple(layout.shard for layout in self._layouts)
        lengths = [math.prod(shape) for shape in self.shapes]
        here = sorted(range(len(lengths)), key=lambda i: not self._owned[i])
        starts, start = [0] * len(lengths), 0
        for i in here:
            starts[i] = start
            start += lengths[i]
        self.slices = {
            name: slice(starts[i], starts[i] + lengths[i]) for i, name in enumerate(self.names)
        }
        self.length = start
        self._num_counted = sum(
            length for length, owned in zip(lengths, self._owned, strict=True) if owned
        )
        self.device = local(next(iter(tensors.values()))).device

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, {self.length:,} of them on rank {self._ranks.rank})"

    @property
    def _ranks(self) -> Ranks:
        assert self.ranks is not None
        return self.ranks

    def flatten(self, tensors: Mapping[str, Tensor] | Sequence[Tensor]) -> Tensor:
        """The part (length,) that is here of the vector of one tensor per parameter.

        Each is whole, or a DTensor that is spread as its parameter is.
        """
        given = self._in_order(tensors)
        flat = self.empty()
        for name, layout, tensor in zip(self.names, self._layouts, given, strict=True):
            if tensor.shape != layout.shape:
                msg = (
                    f"{name!r} has shape {tuple(layout.shape)}, got a tensor of "
                    f"{tuple(tensor.shape)}"
                )
                raise ArgumentError(msg)
            if is_spread(tensor) and self.sharding.layout(tensor) != layout:
                msg = f"the tensor for {name!r} is not spread over the processes as that is"
                raise ArgumentError(msg)
            part = local(tensor) if is_spread(tensor) else layout.part(tensor)
            flat[self.slices[name]] = part.detach().reshape(-1).to(flat)
        return flat

    def views(self, flat: Tensor) -> list[Tensor]:
        """The shards in a flat vector, without copying."""
        places = self.slices.values()
        return [flat[s].view(shape) for s, shape in zip(places, self.shapes, strict=True)]

    def unflatten(self, flat: Tensor, params: Selection = None) -> dict[str, Tensor]:
        """Whole tensors by parameter name, on every process, from the part (length,) of a vector.

        Parameters
        ----------
        params
            Globs over names: only those, such as of one module.
        """
        parts = super().unflatten(flat, params)
        layouts = dict(zip(self.names, self._layouts, strict=True))
        wholes = self.sharding.gather(list(parts.values()), [layouts[name] for name in parts])
        return dict(zip(parts, wholes, strict=True))

    def subspace(self, places: Sequence[int]) -> ShardedSpace:
        """That of some of the parameters, on the same processes."""
        some = {self.names[i]: self._tensors[self.names[i]] for i in places}
        return ShardedSpace(some, self.sharding, self._ranks, self.dtype)

    def own(self, whole: Tensor) -> Tensor:
        """What is here (..., length) of whole vectors (..., n)."""
        if whole.shape[-1:] != (self.n,):
            msg = f"expected whole vectors (..., {self.n}), got {tuple(whole.shape)}"
            raise ArgumentError(msg)
        part = whole.new_empty(*whole.shape[:-1], self.length)
        start = 0
        for name, layout, size in zip(self.names, self._layouts, self.sizes, strict=True):
            entries = whole[..., start : start + size].unflatten(-1, layout.shape or (1,))
            for i, (begin, length) in enumerate(zip(layout.starts, layout.shard, strict=True)):
                entries = entries.narrow(whole.dim() - 1 + i, begin, length)
            part[..., self.slices[name]] = entries.reshape(*whole.shape[:-1], -1)
            start += size
        return part

    def whole(self, part: Tensor) -> Tensor:
        """Whole vectors (..., n) on every process, from the parts (..., length) that they hold."""
        rows = part.reshape(-1, self.length)
        whole = part.new_empty(len(rows), self.n)
        start = 0
        for name, layout, size in zip(self.names, self._layouts, self.sizes, strict=True):
            shards = [row[self.slices[name]].view(layout.shard) for row in rows]
            # One parameter at a time: beside the whole there is never more than that.
            found = self.sharding.gather(shards, [layout] * len(shards)) if len(rows) else []
            for row, tensor in zip(whole, found, strict=True):
                row[start : start + size] = tensor.reshape(-1)
            start += size
        return whole.view(*part.shape[:-1], self.n)

    def collected(self, part: Tensor) -> Tensor:
        """Whole vectors (..., n) in the memory of rank 0; on the others nothing."""
        first = self._ranks.rank == 0
        rows = part.reshape(-1, self.length)
        whole = torch.empty(len(rows) if first else 0, self.n, dtype=part.dtype, device="cpu")
        for i, row in enumerate(rows):
            start = 0
            for name, layout, size in zip(self.names, self._layouts, self.sizes, strict=True):
                shard = row[self.slices[name]].view(layout.shard)
                (tensor,) = self.sharding.gather([shard], [layout])
                if first:
                    whole[i, start : start + size] = tensor.reshape(-1)
                start += size
        return whole.view(*part.shape[:-1], self.n) if first else whole

    def drawn(self, draw: Callable[[int], Tensor]) -> Tensor:
        """What is here of n numbers that are drawn one after the other, few at a time."""
        # The stream is the one of a single process, whatever the number of them.
        stream = _Stream(draw, self.n)
        part: Tensor | None = None
        for name, layout, size in zip(self.names, self._layouts, self.sizes, strict=True):
            entries = layout.part(stream.take(size).view(layout.shape)).reshape(-1)
            if part is None:
                part = torch.empty(self.length, dtype=entries.dtype, device=self.device)
            part[self.slices[name]] = entries.to(self.device)
        assert part is not None
        return part

    def unit(self, place: int) -> Tensor:
        """The unit vector of one of the n entries, in the order of the whole vector."""
        vector = self.zeros()
        if (here := self._here(place)) is not None:
            vector[here] = 1.0
        return vector

    def entry(self, vector: Tensor, place: int) -> float:
        """One of the n entries, on every process."""
        here = self._here(place)
        counted = here is not None and here < self._num_counted
        value = float(vector[here]) if counted and here is not None else 0.0
        return float(self.summed(torch.tensor(value, dtype=torch.float64, device=self.device)))

    def counted(self, rows: Tensor) -> Tensor:
        """Those columns of rows (..., length) over which sums are taken here."""
        return rows[..., : self._num_counted]

    def summed(self, partial: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        self._ranks.add(partial)
        return partial

    @property
    def _place(self) -> tuple[int, int]:
        return self._ranks.rank, self._ranks.size

    def _boxes(self, *, written: bool = False) -> dict[str, Box]:
        # Of copies one is written.
        return {
            name: (layout.starts, tuple(layout.shard))
            for name, layout, owned in zip(self.names, self._layouts, self._owned, strict=True)
            if layout.shard.numel() and (owned or not written)
        }

    def _whole_shapes(self) -> dict[str, torch.Size]:
        return {n: layout.shape for n, layout in zip(self.names, self._layouts, strict=True)}

    def _by_parameter(self, value: Callable[[slice], Tensor]) -> np.ndarray:
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        parts = [
            value(place) if owned else zero
            for place, owned in zip(self.slices.values(), self._owned, strict=True)
        ]
        found: np.ndarray = self.summed(torch.stack(parts)).cpu().numpy()
        return found

    def _here(self, place: int) -> int | None:
        """Where an entry of the whole vector is in the part of this process, if it is."""
        for name, layout, size in zip(self.names, self._layouts, self.sizes, strict=True):
            if place < size:
                where = []
                for index, start, length in zip(
                    np.unravel_index(place, layout.shape), layout.starts, layout.shard, strict=True
                ):
                    if not start <= index < start + length:
                        return None
                    where.append(int(index) - start)
                offset = int(np.ravel_multi_index(where, layout.shard)) if where else 0
                return self.slices[name].start + offset
            place -= size
        raise IndexError(place)


class _Stream:
    """Numbers that are drawn in large pieces and taken in others."""

    def __init__(self, draw: Callable[[int], Tensor], count: int) -> None:
        self._draw = draw
        self._left = count
        self._held: list[Tensor] = []
        self._num_held = 0

    def take(self, count: int) -> Tensor:
        """The next ones."""
        while self._num_held < count:
            size = _DRAWN if self._left - _DRAWN >= _TOGETHER else self._left
            self._held.append(self._draw(size))
            self._left -= size
            self._num_held += size
        if not count:
            return torch.empty(0)
        held = torch.cat(self._held) if len(self._held) > 1 else self._held[0]
        # Not a view, or what was taken would keep all of what was drawn.
        self._held, self._num_held = [held[count:].clone()], len(held) - count
        return held[:count]
