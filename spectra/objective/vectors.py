"""Which vectors does an operator act on: their length, dtype, device and inner product.

Precision policy: norms and inner products are taken in float64 whatever the dtype of the vectors;
projections on a basis block by block, whose sums are added in float64. Native float32 reductions on
the CPU are off by 1e-5 at a million entries and by 1e-3 at 25 million, which ruins a Lanczos run.
A native product adds the terms of a block one after the other, and one large term swallows
thousands of small ones: on the CPU entries that stand out are taken apart, in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spectra.objective.memory import free_bytes

__all__ = ["VectorSpace", "dot"]

# Entries summed in the vectors' own dtype before a float64 accumulator takes over. On the CPU small
# enough that a block of fifty rows stays in the cache, large enough that the loop costs nothing; an
# accelerator sums in many threads at once, and a loop over small blocks would keep it waiting.
_BLOCK = 1 << 16
_BLOCK_ON_ACCELERATOR = 1 << 22
# In root mean squares of the block; a block of random numbers has no such entry.
_LARGE = 6.0


class VectorSpace:
    """Real vectors of length `n`, flat, on one device.

    A basis of `m` vectors is stored as the rows of an (m, n) tensor: rows are contiguous, so both
    the projection and the combination are one matrix-vector product.
    """

    def __init__(
        self, n: int, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
    ) -> None:
        self.n = n
        self.dtype = dtype
        self.device = torch.device(device)

    @property
    def eps(self) -> float:
        """Machine epsilon of the vectors."""
        return torch.finfo(self.dtype).eps

    def affordable(self) -> int:
        """How many vectors fit into half of the memory that is free now."""
        return free_bytes(self.device) // 2 // max(1, self.n * torch.finfo(self.dtype).bits // 8)

    def zeros(self, *count: int) -> Tensor:
        """The zero vector (n,), or `count` of them as rows."""
        return torch.zeros(*count, self.n, dtype=self.dtype, device=self.device)

    def empty(self, *count: int) -> Tensor:
        """Uninitialised memory for one vector, or for `count` rows."""
        return torch.empty(*count, self.n, dtype=self.dtype, device=self.device)

    def inner(self, x: Tensor, y: Tensor) -> float:
        """Inner product of two vectors, multiplied and accumulated in float64."""
        return float(dot(x, y))

    def norm(self, x: Tensor) -> float:
        """Euclidean norm, accumulated in float64."""
        if x.dtype == torch.float64:
            return float(torch.linalg.vector_norm(x))
        # Squares of numbers in single precision neither overflow nor underflow in double, and
        # this is three times as fast as `vector_norm` with a dtype.
        return math.sqrt(self.inner(x, x))

    def project(self, basis: Tensor, x: Tensor) -> Tensor:
        """Inner products (m,) float64 of the rows of `basis` (m, n) with `x` (n,)."""
        if x.dtype == torch.float64:
            return torch.mv(basis, x)
        on_cpu = x.device.type == "cpu"
        block = _BLOCK if on_cpu else _BLOCK_ON_ACCELERATOR
        total = torch.zeros(basis.shape[0], dtype=torch.float64, device=x.device)
        for start in range(0, self.n, block):
            rows, part = basis[:, start : start + block], x[start : start + block]
            if on_cpu and (large := _large_entries(part)) is not None:
                total += rows[:, large].double() @ part[large].double()
                part = part.index_fill(0, large, 0.0)
            total += torch.mv(rows, part)
        return total

    def combine(self, basis: Tensor, coefficients: Tensor) -> Tensor:
        """Linear combination (n,) of the rows of `basis` (m, n) with `coefficients` (m,)."""
        return torch.mv(basis.T, coefficients.to(basis))

    def subtract(self, x: Tensor, basis: Tensor, coefficients: Tensor) -> None:
        """Take the linear combination of the rows of `basis` away from `x`, in place."""
        x.addmv_(basis.T, coefficients.to(basis), alpha=-1.0)

    def rotate(self, basis: Tensor, rotation: Tensor) -> None:
        """Replace the first p rows of `basis` (m, n) by `rotation` (m, p) applied to its rows.

        In place, tile by tile, so that no second basis is ever held.
        """
        m, p = rotation.shape
        matrix = rotation.T.to(basis)
        tile = max(_BLOCK, (1 << 22) // max(m, 1))
        for start in range(0, self.n, tile):
            columns = slice(start, start + tile)
            basis[:p, columns] = matrix @ basis[:m, columns]


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Sum of the products of two vectors' entries, in float64: still on their device."""
    if x.dtype == torch.float64:
        return torch.dot(x, y)
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    block = _BLOCK if x.device.type == "cpu" else _BLOCK_ON_ACCELERATOR
    for start in range(0, len(x), block):
        part = x[start : start + block].double()
        other = part if y is x else y[start : start + block].double()
        total += torch.dot(part, other)
    return total


def _large_entries(part: Tensor) -> Tensor | None:
    """Places of the entries that stand out of a block, None where none does."""
    limit = _LARGE * math.sqrt(float(torch.dot(part, part)) / len(part))
    smallest, largest = torch.aminmax(part)
    if float(largest) <= limit and float(smallest) >= -limit:
        return None
    return (part.abs() > limit).nonzero().squeeze(1)
