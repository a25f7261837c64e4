"""How do rows of unequal length become batches?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["IGNORED", "batched", "padded"]

Item = TypeVar("Item")
# Label that PyTorch and Hugging Face give to tokens that do not count.
IGNORED = -100


def batched(items: Sequence[Item], size: int) -> Iterable[Sequence[Item]]:
    """The items in order, `size` at a time."""
    return (items[start : start + size] for start in range(0, len(items), size))


def padded(rows: Sequence[Sequence[int]], filler: int) -> Tensor:
    """Rows of integers as a matrix, filled up on the right."""
    matrix = torch.full((len(rows), max(map(len, rows))), filler)
    for row, numbers in zip(matrix, rows, strict=True):
        row[: len(numbers)] = torch.tensor(numbers)
    return matrix
