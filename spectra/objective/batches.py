"""How are the data read: again and again, on the right device, in parts?"""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spectra.errors import ArgumentTypeError, DataError, SpectraError
from spectra.objective.keeping import random_state_kept, versions
from spectra.objective.memory import free_bytes, memory_ran_out

__all__ = [
    "Moved",
    "batches_of",
    "held_in_memory",
    "leading_dimension",
    "map_tensors",
    "reiterable",
    "tensors_of",
    "to_device",
]


def reiterable(data: Any, *, hold_data: bool = False) -> Iterable[Any]:
    """The data, once it is clear that they can be read again and again; or a list of them.

    Raises
    ------
    ArgumentTypeError
        The data are no iterable of batches.
    DataError
        They can be read only once, and `hold_data` is not asked for.
    """
    if isinstance(data, Tensor | str | Mapping) or not isinstance(data, Iterable):
        msg = (
            f"data is a {type(data).__name__}, expected an iterable of batches; for a single "
            "batch pass a list of one, [batch], for a dataset a DataLoader"
        )
        raise ArgumentTypeError(msg)
    if hold_data:
        with random_state_kept(data):
            return list(batches_of(data))
    # Asking for iter(data) instead would start a DataLoader, which draws from the global generator.
    if isinstance(data, Iterator):
        msg = (
            f"data is a {type(data).__name__}, which can be read only once, but every product "
            "reads the data again; pass list(data) or a DataLoader, or hold_data=True to keep the "
            "batches in memory"
        )
        raise DataError(msg)
    return data


def held_in_memory(data: Iterable[Any]) -> Sequence[Any]:
    """All batches at once.

    Raises
    ------
    DataError
        They take more than half of the free memory.
    """
    if isinstance(data, list | tuple):
        return data
    room, batches = free_bytes(torch.device("cpu")) // 2, []
    for batch in batches_of(data):
        batches.append(batch)
        room -= sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(batch))
        if room < 0:
            msg = (
                f"the first {len(batches)} batches take more than half of the free memory; "
                "expected all of them to fit there, use fewer or smaller ones"
            )
            raise DataError(msg)
    return batches


def batches_of(data: Iterable[Any]) -> Iterator[Any]:
    """The batches of one pass.

    Raises
    ------
    DataError
        Reading one of them raised something; its number is named.
    """
    batches, read = None, 0
    while True:
        try:
            batches = iter(data) if batches is None else batches
            batch = next(batches)
        except StopIteration:
            return
        except SpectraError:
            raise
        except Exception as error:
            if memory_ran_out(error):
                raise
            msg = f"reading batch {read} of the data raised {type(error).__name__}: {error}"
            raise DataError(msg) from error
        read += 1
        yield batch


def map_tensors(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The batch with `change` applied to every tensor in it."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(item, change) for item in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(map_tensors(item, change) for item in batch)
    if isinstance(batch, dict | UserDict):
        # Of its own kind: what a tokenizer returns is read by attributes, too.
        changed = copy.copy(batch)
        for key, value in batch.items():
            changed[key] = map_tensors(value, change)
        return changed
    if isinstance(batch, Mapping):
        return {key: map_tensors(value, change) for key, value in batch.items()}
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return _with_fields(batch, lambda value: map_tensors(value, change))
    return batch


def _with_fields(batch: Any, change: Callable[[Any], Any]) -> Any:
    """A dataclass with its fields changed; also a frozen one."""
    changed = copy.copy(batch)
    for field in dataclasses.fields(batch):
        if hasattr(batch, field.name):
            object.__setattr__(changed, field.name, change(getattr(batch, field.name)))
    return changed


def tensors_of(batch: Any) -> list[Tensor]:
    """All tensors of a batch, in order."""
    tensors: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    map_tensors(batch, note)
    return tensors


class Moved:
    """Copies of tensors on a device, kept from pass to pass, an eighth of the free memory at most.

    For data that stay at hand. A copy serves as long as neither it nor its original changes.
    """

    def __init__(self) -> None:
        self._copies: dict[int, tuple[Tensor, Tensor, Any]] = {}
        self._room: int | None = None

    def take(self, tensor: Tensor, move: Callable[[Tensor], Tensor]) -> Tensor:
        """What `move` makes of a tensor, now or before."""
        original, copy, state = self._copies.get(id(tensor), (None, tensor, None))
        if original is tensor and versions([tensor, copy]) == state:
            return copy
        copy = move(tensor)
        if copy is tensor:
            return copy
        if self._room is None:
            self._room = free_bytes(copy.device) // 8
        size = copy.numel() * copy.element_size()
        if original is tensor:
            # It takes the place of one of the same size.
            size = 0
        if size <= self._room:
            self._room -= size
            self._copies[id(tensor)] = (tensor, copy, versions([tensor, copy]))
        return copy

    def release(self) -> None:
        """Give the memory back."""
        self._copies, self._room = {}, None


def to_device(
    batch: Any,
    label: str,
    device: torch.device,
    dtype: torch.dtype | None = None,
    known: Moved | None = None,
) -> Any:
    """The batch with its tensors on a device, ready to be differentiated through.

    Floating ones in `dtype` at least, if it is given. Copies that are `known` are used again.

    Raises
    ------
    DataError
        A tensor has no numbers, or a history.
    """

    def checked(tensor: Tensor) -> Tensor:
        if tensor.device.type == "meta" and device.type != "meta":
            msg = f"{label} holds a tensor on the meta device, without numbers; load the data first"
            raise DataError(msg)
        if tensor.grad_fn is not None:
            # It may lead to the parameters, and there is no telling whether it is meant to.
            msg = (
                f"{label} holds a tensor that was computed with gradients on "
                f"({tensor.grad_fn.name()}): derivatives would go on into how it came about. "
                "Compute the data under torch.no_grad(), or .detach() them; what depends on the "
                "parameters belongs into the loss"
            )
            raise DataError(msg)
        return move(tensor) if known is None else known.take(tensor, move)

    def move(tensor: Tensor) -> Tensor:
        # A tensor made under inference_mode cannot enter a graph; its clone can.
        tensor = (tensor.clone() if tensor.is_inference() else tensor).to(device)
        if dtype is None or not tensor.is_floating_point():
            return tensor
        return tensor.to(torch.promote_types(tensor.dtype, dtype))

    return map_tensors(batch, checked)


def leading_dimension(batch: Any, label: str) -> int:
    """The number of samples of a batch: the first dimension that all its tensors share.

    Raises
    ------
    DataError
        They do not share one.
    """
    sizes = {tensor.shape[0] if tensor.dim() else -1 for tensor in tensors_of(batch)}
    if len(sizes) != 1 or -1 in sizes:
        msg = (
            f"{label} cannot be split into microbatches: its tensors have first dimensions "
            f"{sorted(sizes)}, expected one number of samples"
        )
        raise DataError(msg)
    return sizes.pop()
