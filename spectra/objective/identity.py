"""By what is a computation known again, so that another one is not taken for it?

Digests of all numbers that products depend on, and of the code that combines them, as far as both
can be seen. What cannot, such as a module-level variable that a loss reads, is the reason why a
run that is resumed also computes its first product once more.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spectra.distributed.sharding import local

__all__ = ["architecture", "digest", "digest_of", "fingerprint"]

_PIECE = 1 << 22
# Objects within objects: a loss holds a criterion that holds weights.
_DEPTH = 6
_PLAIN = (bool, int, float, complex, str, bytes, np.generic, torch.dtype, torch.device, slice)
_CODE = (types.CodeType, types.FunctionType, types.MethodType, functools.partial)


def digest(*tensors: Tensor) -> str:
    """A digest of the entries of tensors, their dtypes and shapes; the same on every device."""
    total = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        for piece in _pieces(tensor):
            total.update(piece)
    return total.hexdigest()


def _encoded(text: str) -> bytes:
    # Names may hold halves of surrogate pairs.
    return text.encode("utf-8", "surrogatepass")


def architecture(model: nn.Module) -> str:
    """A digest of what a model says of its modules."""
    return hashlib.blake2b(_without_addresses(repr(model)), digest_size=8).hexdigest()


def _without_addresses(text: str) -> bytes:
    """As it is in every process: `<function f at 0x7f…>` is the same function."""
    return _encoded(re.sub(r"0x[0-9a-f]{6,}", "0x", text))


def digest_of(value: Any) -> str:
    """A digest of whatever can be seen of a value: numbers, text, tensors, code, containers."""
    total = hashlib.blake2b(digest_size=8)
    for piece in _walk(value, _DEPTH):
        total.update(piece)
    return total.hexdigest()


def fingerprint(value: Any) -> float:
    """The first 48 bits of `digest_of`, as a number that processes can compare."""
    return float(int(digest_of(value)[:12], 16))


def _pieces(tensor: Tensor) -> Iterator[bytes]:
    tensor = local(tensor).detach()
    yield f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_quantized:
        tensor = tensor.int_repr()
    flat = tensor.reshape(-1)
    for start in range(0, len(flat), _PIECE):
        piece = flat[start : start + _PIECE].cpu().contiguous()
        yield piece.view(torch.uint8).numpy().tobytes() if len(piece) else b""


def _walk(value: Any, depth: int) -> Iterator[bytes]:
    """What is seen of a value, as bytes; of objects that are too deep, their type."""
    yield _encoded(type(value).__qualname__)
    if value is None or isinstance(value, _PLAIN):
        yield _encoded(repr(value))
    elif isinstance(value, Tensor):
        yield from _pieces(value)
    elif isinstance(value, np.ndarray):
        yield f"{value.dtype}{value.shape}".encode()
        yield value.tobytes() if value.dtype != object else _without_addresses(repr(value))
    elif depth == 0:
        return
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk(key, depth - 1)
            yield from _walk(item, depth - 1)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _walk(item, depth - 1)
    elif isinstance(value, set | frozenset):
        yield from sorted(map(_without_addresses, map(repr, value)))
    elif isinstance(value, _CODE):
        yield from _walk_code(value, depth - 1)
    else:
        yield from _walk_object(value, depth - 1)


def _walk_code(value: Any, depth: int) -> Iterator[bytes]:
    """What a function computes, and with what."""
    if isinstance(value, types.CodeType):
        yield value.co_code
        yield _encoded(repr(value.co_names))
        parts: Any = value.co_consts
    elif isinstance(value, types.MethodType):
        parts = (value.__func__, value.__self__)
    elif isinstance(value, functools.partial):
        parts = (value.func, value.args, value.keywords)
    else:
        yield _encoded(value.__qualname__)
        # A cell may be empty still: that of a function which refers to itself.
        cells = [getattr(cell, "cell_contents", None) for cell in value.__closure__ or ()]
        parts = (value.__code__, value.__defaults__, value.__kwdefaults__, *cells)
    for part in parts:
        yield from _walk(part, depth)


def _walk_object(value: Any, depth: int) -> Iterator[bytes]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _walk({f.name: getattr(value, f.name) for f in dataclasses.fields(value)}, depth)
        return
    if isinstance(value, type | types.ModuleType | types.BuiltinFunctionType):
        yield _encoded(value.__name__)
        return
    # Neither what is private, a cache perhaps, nor what a loss notes of its last batch.
    public = {
        name: item
        for name, item in getattr(value, "__dict__", {}).items()
        if not name.startswith("_") and name != "loss_head"
    }
    if isinstance(value, nn.Module):
        # The numbers of a criterion; those of the model are told by name elsewhere.
        yield _without_addresses(repr(value))
        if not any(True for _ in value.parameters()):
            public |= dict(value.named_buffers())
    yield from _walk(public, depth)
