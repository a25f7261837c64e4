"""How are parameters that are spread over processes put together inside of a derivative?

    gather     a shard on every rank  →  the whole tensor on every rank
    scatter    a whole tensor on every rank  →  of the sum of them, the shard on every rank

Both are linear, and each is the other's adjoint where the ranks count by the weights of their data,
Σ_r w_r ⟨x_r, y_r⟩. So autograd goes through them any number of times: a gradient by the shards is
the weighted sum of those that all ranks have by the whole, scattered, and a product with the
Hessian gathers its vector and scatters what comes out.

What is spread how is said by DTensor; the collectives are torch.distributed's.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spectra.distributed.collectives import Ranks, ranks_of
from spectra.errors import ArgumentError, ArgumentTypeError, DistributedError

__all__ = [
    "Layout",
    "Sharding",
    "is_spread",
    "local",
    "refuse_other_copies",
    "shard",
    "spread_tensors",
    "values_not_wanted",
]


_wanted: contextvars.ContextVar[bool] = contextvars.ContextVar("scatter", default=True)


def is_spread(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which this process holds a part or a copy."""
    return hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, on the same memory."""
    if not is_spread(tensor):
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def spread_tensors(model: Any) -> list[Tensor]:
    """The parameters and buffers of a model that are DTensors."""
    if not isinstance(model, nn.Module):
        return []
    return [t for t in [*model.parameters(), *model.buffers()] if is_spread(t)]


def shard(model: nn.Module, mesh: Any = None) -> nn.Module:
    """Spread the parameters of a model over processes, in place.

    Parameters
    ----------
    model
        The same on every rank; it may be on the CPU, and its parts are then moved to the device of
        the mesh one parameter at a time.
    mesh
        A `DeviceMesh` of all processes: of one dimension, along which each parameter is cut in its
        first dimension; or of two, of which the first one holds copies ("replicate") and the
        second one cuts ("shard"). By default one dimension of all processes.

    Returns
    -------
    nn.Module
        The model, whose parameters are DTensors. Operators compute with it; called by itself it
        takes DTensors only.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        No model, another kind of mesh, or torch.distributed is not initialised.
    DistributedError
        The ranks have different weights.

    Notes
    -----
    A model under PyTorch's `fully_shard` is taken as it is, and runs by itself as well.
    """
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    if not isinstance(model, nn.Module):
        msg = f"expected a torch.nn.Module, got a {type(model).__name__}"
        raise ArgumentTypeError(msg)
    if not dist.is_available() or not dist.is_initialized():
        msg = (
            "torch.distributed is not initialised: call torch.distributed.init_process_group() "
            "first, and run the program with torchrun"
        )
        raise ArgumentError(msg)
    if mesh is None:
        kind = "cuda" if "nccl" in str(dist.get_backend()) else "cpu"
        mesh = init_device_mesh(kind, (dist.get_world_size(),))
    if not isinstance(mesh, DeviceMesh):
        msg = f"mesh is a {type(mesh).__name__}; expected what init_device_mesh returns"
        raise ArgumentTypeError(msg)
    if mesh.ndim not in {1, 2}:
        msg = f"mesh has {mesh.ndim} dimensions; expected one (shard) or two (replicate, shard)"
        raise ArgumentError(msg)
    if spread_tensors(model):
        msg = "the model's parameters are spread over processes already; pass it as it is"
        raise ArgumentError(msg)
    ranks, other = ranks_of(process_group=True), ""
    assert ranks is not None
    spread: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in spread:
                copies = [Replicate()] * (mesh.ndim - 1)
                # What has no dimension cannot be cut.
                cut = [Shard(0)] if parameter.dim() else [Replicate()]
                whole = parameter.detach().to(mesh.device_type)
                part = distribute_tensor(whole, mesh, [*copies, *cut])
                mine = Sharding([part], ranks).layout(part).part(whole)
                if not torch.equal(mine.nan_to_num(), local(part).nan_to_num()):
                    other = other or name
                spread[id(parameter)] = nn.Parameter(part, requires_grad=parameter.requires_grad)
            module._parameters[name] = spread[id(parameter)]
    model.to(mesh.device_type)
    for rank, found in enumerate(ranks.told(other)):
        if found:
            msg = (
                f"rank {rank} differs from rank 0 in: the numbers of a parameter {found!r}; load "
                "the same weights on all ranks before they are spread"
            )
            raise DistributedError(msg)
    return model


@dataclass(frozen=True)
class Layout:
    """How one tensor is spread over the grid of processes.

    Attributes
    ----------
    shape
        Of the whole.
    cuts
        For every dimension of the grid the dimension of the tensor that is cut along it, or None
        where each process has a copy.
    shapes
        What this process holds before any cut, after the first one, and so on: at last the shard.
    starts
        Where in the whole the shard begins, by dimension of the tensor.
    """

    shape: torch.Size
    cuts: tuple[int | None, ...]
    shapes: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]

    @property
    def shard(self) -> torch.Size:
        """The shape of what this process holds."""
        return torch.Size(self.shapes[-1])

    def part(self, whole: Tensor) -> Tensor:
        """The part that this process has of a whole tensor, as a view."""
        for dim, (start, length) in enumerate(zip(self.starts, self.shard, strict=True)):
            whole = whole.narrow(dim, start, length)
        return whole


class Sharding:
    """How the tensors of a model are spread, and the gathering and scattering of them.

    Parameters
    ----------
    tensors
        All that are DTensors.
    ranks
        The processes: all of the grid.

    Raises
    ------
    ArgumentError
        They are on different grids, or on one of other processes, or spread in another way than by
        cutting and copying.
    """

    def __init__(self, tensors: Sequence[Any], ranks: Ranks) -> None:
        mesh = tensors[0].device_mesh
        if any(tensor.device_mesh != mesh for tensor in tensors):
            msg = (
                "the parameters are DTensors on different meshes of devices; spread all of them "
                "over one, as a single fully_shard or spectra.distributed.shard does"
            )
            raise ArgumentError(msg)
        if mesh.size() != ranks.size:
            msg = (
                f"the parameters are spread over {mesh.size()} processes, and process_group has "
                f"{ranks.size}; give the operator the processes of the mesh"
            )
            raise ArgumentError(msg)
        self._ranks = ranks
        self._groups: list[Any] = [mesh.get_group(dim) for dim in range(mesh.ndim)]
        self._sizes: tuple[int, ...] = tuple(mesh.size(dim) for dim in range(mesh.ndim))
        self._place: tuple[int, ...] = tuple(mesh.get_coordinate())
        self.weight = 1.0
        """Of this rank in the sums that derivatives are: that of its part of the data."""
        self.mesh = f"{'x'.join(map(str, self._sizes))} processes"
        """How many there are along each dimension of the grid, in words."""

    def layout(self, tensor: Tensor) -> Layout:
        """How a tensor is spread; one that is no DTensor is a copy on every rank."""
        placements = getattr(tensor, "placements", None)
        cuts = [None] * len(self._sizes) if placements is None else list(map(_cut, placements))
        shape, starts = list(tensor.shape), [0] * tensor.dim()
        shapes = [tuple(shape)]
        for cut, size, place in zip(cuts, self._sizes, self._place, strict=True):
            if cut is not None:
                # As DTensor and torch.chunk cut: pieces of one size, the last ones less or nothing.
                piece = math.ceil(shape[cut] / size)
                start = min(place * piece, shape[cut])
                shape[cut] = min(piece, shape[cut] - start)
                starts[cut] += start
            shapes.append(tuple(shape))
        return Layout(torch.Size(tensor.shape), tuple(cuts), tuple(shapes), tuple(starts))

    def owns(self, layout: Layout) -> bool:
        """Whether this process, of those with a copy of the same part, is the one that counts."""
        pairs = zip(layout.cuts, self._place, strict=True)
        return all(cut is not None or place == 0 for cut, place in pairs)

    def same_part(self, layout: Layout) -> tuple[int, ...]:
        """What processes with copies of the same part have in common."""
        pairs = zip(layout.cuts, self._place, strict=True)
        return tuple(place for cut, place in pairs if cut is not None)

    def gather(self, shards: Sequence[Tensor], layouts: Sequence[Layout]) -> list[Tensor]:
        """The whole of each tensor, as a function of the shards that can be differentiated."""
        return _each_dtype(shards, layouts, lambda part, own: _Gather.apply(self, own, *part))

    def gathered(self, shards: Sequence[Tensor], layouts: Sequence[Layout]) -> list[Tensor]:
        """The whole of each tensor of one dtype."""
        found = list(shards)
        # The last cut was made last, and is undone first.
        for dim in reversed(range(len(self._sizes))):
            cut = [i for i, layout in enumerate(layouts) if layout.cuts[dim] is not None]
            if cut:
                pieces = [_Piece(layouts[i], dim, self._sizes[dim]) for i in cut]
                wholes = self._gathered_along(dim, [found[i] for i in cut], pieces)
                for i, whole in zip(cut, wholes, strict=True):
                    found[i] = whole
        # A copy, or autograd would take an input for an output.
        return [x.clone() if x is y else x for x, y in zip(found, shards, strict=True)]

    def scattered(self, wholes: Sequence[Tensor], layouts: Sequence[Layout]) -> list[Tensor]:
        """The shards of the weighted sum over all ranks of each tensor of one dtype."""
        if not _wanted.get():
            return [whole.new_zeros(own.shard) for whole, own in zip(wholes, layouts, strict=True)]
        found = [whole * self.weight for whole in wholes]
        for dim in range(len(self._sizes)):
            cut = [i for i, layout in enumerate(layouts) if layout.cuts[dim] is not None]
            copied = [i for i, layout in enumerate(layouts) if layout.cuts[dim] is None]
            if cut:
                pieces = [_Piece(layouts[i], dim, self._sizes[dim]) for i in cut]
                shards = self._scattered_along(dim, [found[i] for i in cut], pieces)
                for i, part in zip(cut, shards, strict=True):
                    found[i] = part
            if copied:
                sums = self._summed_along(dim, [found[i] for i in copied])
                for i, total in zip(copied, sums, strict=True):
                    found[i] = total
        return found

    def _gathered_along(self, dim: int, shards: list[Tensor], pieces: list[_Piece]) -> list[Tensor]:
        count = self._sizes[dim]
        flat = shards[0].new_zeros(sum(piece.entries for piece in pieces))
        start = 0
        for part, piece in zip(shards, pieces, strict=True):
            rows = part.movedim(piece.cut, 0)
            flat[start : start + rows.numel()] = rows.reshape(-1)
            start += piece.entries
        out = flat.new_empty(count * len(flat))
        self._ranks.all_gather(out, flat, self._groups[dim])
        table, wholes, start = out.view(count, -1), [], 0
        for piece in pieces:
            rows = table[:, start : start + piece.entries].reshape(-1, *piece.rest)
            wholes.append(rows[: piece.length].movedim(0, piece.cut).contiguous())
            start += piece.entries
        return wholes

    def _scattered_along(
        self, dim: int, wholes: list[Tensor], pieces: list[_Piece]
    ) -> list[Tensor]:
        count, place = self._sizes[dim], self._place[dim]
        entries = sum(piece.entries for piece in pieces)
        table, start = wholes[0].new_zeros(count, entries), 0
        for whole, piece in zip(wholes, pieces, strict=True):
            padded = whole.new_zeros(count * piece.rows, *piece.rest)
            padded[: piece.length] = whole.movedim(piece.cut, 0)
            table[:, start : start + piece.entries] = padded.view(count, -1)
            start += piece.entries
        out = table.new_empty(entries)
        self._ranks.reduce_scatter(out, table.view(-1), self._groups[dim])
        shards, start = [], 0
        for piece in pieces:
            rows = out[start : start + piece.entries].view(-1, *piece.rest)
            length = max(0, min(piece.rows, piece.length - place * piece.rows))
            shards.append(rows[:length].movedim(0, piece.cut).contiguous())
            start += piece.entries
        return shards

    def _summed_along(self, dim: int, tensors: list[Tensor]) -> list[Tensor]:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        self._ranks.all_reduce(flat, self._groups[dim])
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]


class _Piece:
    """One tensor, cut along one dimension of the grid into pieces of equal size, padded."""

    def __init__(self, layout: Layout, dim: int, count: int) -> None:
        cut = layout.cuts[dim]
        assert cut is not None
        shape = list(layout.shapes[dim])
        self.cut: int = cut
        self.length = shape.pop(cut)
        self.rest = shape
        self.rows = math.ceil(self.length / count)
        self.entries = self.rows * math.prod(shape)


@contextlib.contextmanager
def values_not_wanted() -> Iterator[None]:
    """Within it nothing is scattered but zeros, of which the history alone is of use."""
    token = _wanted.set(False)
    try:
        yield
    finally:
        _wanted.reset(token)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sharding: Sharding, layouts: Any, *shards: Tensor) -> Any:
        ctx.sharding, ctx.layouts = sharding, layouts
        return tuple(sharding.gathered(shards, layouts))

    @staticmethod
    def backward(ctx: Any, *wholes: Tensor) -> Any:
        return None, None, *_Scatter.apply(ctx.sharding, ctx.layouts, *wholes)


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sharding: Sharding, layouts: Any, *wholes: Tensor) -> Any:
        ctx.sharding, ctx.layouts = sharding, layouts
        return tuple(sharding.scattered(wholes, layouts))

    @staticmethod
    def backward(ctx: Any, *shards: Tensor) -> Any:
        return None, None, *_Gather.apply(ctx.sharding, ctx.layouts, *shards)


def _each_dtype(
    tensors: Sequence[Tensor],
    layouts: Sequence[Layout],
    apply: Callable[[list[Tensor], list[Layout]], Iterable[Tensor]],
) -> list[Tensor]:
    """What is sent together has one dtype."""
    found: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        places = [i for i, tensor in enumerate(tensors) if tensor.dtype == dtype]
        results = apply([tensors[i] for i in places], [layouts[i] for i in places])
        found.update(zip(places, results, strict=True))
    return [found[i] for i in range(len(tensors))]


def _cut(placement: Any) -> int | None:
    if placement.is_replicate():
        return None
    if type(placement).__name__ != "Shard":
        msg = (
            f"a parameter is a DTensor placed as {placement}; expected Shard or Replicate along "
            "each dimension of the mesh"
        )
        raise ArgumentError(msg)
    cut: int = placement.dim
    return cut


def refuse_other_copies(ranks: Ranks, found: dict[str, tuple[tuple[int, ...], str]]) -> None:
    """Refuse copies of one part of a tensor that differ between processes.

    Parameters
    ----------
    found
        By name of the tensor: which part this process has, and a digest of it.

    Raises
    ------
    DistributedError
    """
    seen: dict[tuple[str, tuple[int, ...]], tuple[int, str]] = {}
    for rank, told in enumerate(ranks.told(found)):
        for name, (part, text) in told.items():
            first, known = seen.setdefault((name, part), (rank, text))
            if known != text:
                msg = (
                    f"rank {rank} differs from rank {first} in: the numbers of {name!r}, of which "
                    "both hold a copy of the same part. Load the same weights on all ranks"
                )
                raise DistributedError(msg)
