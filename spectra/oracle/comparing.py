"""Is another way of computing a product right, and how long does it take?"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["Terms", "difference", "timed"]

T = TypeVar("T")
# The derivative by each parameter, None where there is none.
Terms = tuple[Tensor | None, ...]

# Of a dtype's precision, as a multiple of its eps: another way adds in another order.
_TOLERANCE = 1e3


def difference(exact: Sequence[Tensor | None], found: Sequence[Tensor | None]) -> float | None:
    """The relative difference of two products, None where it is no more than rounding."""
    square = apart = eps = 0.0
    for a, b in zip(exact, found, strict=True):
        if a is None:
            continue
        eps = max(eps, torch.finfo(a.dtype).eps)
        own = a.detach().to_dense().double()
        other = torch.zeros_like(own) if b is None else b.detach().double()
        square += float(own.square().sum())
        apart += float((own - other).square().sum())
    off = (apart / square) ** 0.5 if square > 0 else apart**0.5
    return off if not off <= _TOLERANCE * eps else None


def timed(device: torch.device, work: Callable[[], T]) -> tuple[float, T]:
    """Seconds that some work on a device takes, and its result."""
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result
