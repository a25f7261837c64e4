"""Which vectors does an operator act on: their length, dtype, device and inner product.

Precision policy: norms and inner products are taken in float64 whatever the dtype of the vectors;
projections on a basis block by block, whose sums are added in float64. Native float32 reductions on
the CPU are off by 1e-5 at a million entries and by 1e-3 at 25 million, which ruins a Lanczos run.
A native product adds the terms of a block one after the other, and one large term swallows
thousands of small ones: on the CPU entries that stand out are taken apart, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from spectra.distributed.collectives import Ranks
from spectra.errors import StorageError
from spectra.journal import remember
from spectra.objective import places
from spectra.objective.memory import free_bytes
from spectra.objective.places import Place

__all__ = ["Removed", "VectorSpace", "dot"]

# Entries summed in the vectors' own dtype before a float64 accumulator takes over. On the CPU small
# enough that a block of fifty rows stays in the cache, large enough that the loop costs nothing; an
# accelerator sums in many threads at once, and a loop over small blocks would keep it waiting.
_BLOCK = 1 << 16
_BLOCK_ON_ACCELERATOR = 1 << 22
# Most entries of a block that is copied to an accelerator: a quarter of a gigabyte.
_COPIED = 1 << 26
# In root mean squares of the block. What is smaller costs a sum no more than twice its rounding,
# and a block of random numbers, or of products of them, has no such entry: taking entries apart
# takes as long as a dozen rows.
_LARGE = 24.0
# So few terms have no rounding to speak of.
_FEW = 1 << 12


class Removed(NamedTuple):
    """What was taken away from a vector.

    Attributes
    ----------
    parts
        (m,) float64 its components.
    before, left
        Its norm, before and now.
    """

    parts: Tensor
    before: float
    left: float


class VectorSpace:
    """Real vectors of length `n`, flat, on one device.

    A basis of `m` vectors is stored as the rows of an (m, n) tensor: rows are contiguous, so both
    the projection and the combination are matrix-vector products, block by block. The rows may be
    elsewhere than the vectors: in the host's memory, or in a file that is mapped into it. Blocks
    are then fetched one at a time, and the arithmetic is the same.
    """

    spread = False
    """Whether each of several processes has a part of every vector."""

    def __init__(
        self, n: int, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
    ) -> None:
        self.n = n
        self.length = n
        """How many entries of a vector are here: all, but for vectors spread over processes."""
        self.dtype = dtype
        self.device = torch.device(device)
        self.ranks: Ranks | None = None
        """The processes that compute with the same vectors, each on its share of the data."""
        self.probe_ranks: Ranks | None = None
        """Processes of other groups that have the same data, and draw other probes."""

    def agreed(self, number: float) -> float:
        """What can be different on every rank, such as a time: the smallest of all."""
        return number if self.ranks is None else self.ranks.least(number)

    @property
    def eps(self) -> float:
        """Machine epsilon of the vectors."""
        return torch.finfo(self.dtype).eps

    @property
    def vector_bytes(self) -> int:
        """What one vector takes here."""
        return self.length * torch.finfo(self.dtype).bits // 8

    @property
    def whole_vector_bytes(self) -> int:
        """What a vector takes with all of its parts: the same on every process."""
        return self.n * torch.finfo(self.dtype).bits // 8

    def affordable(self, place: Place = "device") -> int:
        """How many vectors fit into half of what is free now, of memory or of the disk.

        In a run that is resumed, what was found the first time: its course depends on it.
        """

        def found() -> int:
            if place == "disk":
                free = places.free_disk_bytes()
            else:
                free = free_bytes(self.device if place == "device" else torch.device("cpu"))
            return int(self.agreed(free // 2 // max(1, self.vector_bytes)))

        return remember(f"room on {place}", found)

    def place(
        self, wanted: int, least: int | None = None, *, spare: int = 3, room: int | None = None
    ) -> tuple[Place, int]:
        """Where a basis is best held, and how many vectors of it.

        On the device if it fits; else in the host's memory, if that is another one and it fits
        there; else a shorter one on the device; else on disk.

        Parameters
        ----------
        wanted, least
            Vectors, and how few of them are still of use; by default no fewer. Where nothing has
            room for those either, what has the most is returned.
        spare
            Vectors of memory that the computation takes beside the basis.
        room
            Vectors that the device may hold, `spare` included; by default what is affordable.
        """
        least = wanted if least is None else min(least, wanted)
        fitting = (self.affordable() if room is None else room) - spare
        if wanted <= fitting:
            return "device", wanted
        if self.device.type != "cpu" and wanted <= self.affordable("host"):
            return "host", wanted
        if least <= fitting:
            return "device", fitting
        disk = self.affordable("disk")
        if disk < least and disk < fitting:
            return "device", fitting
        return "disk", min(wanted, disk)

    def place_for(self, count: int, *, spare: int = 3) -> Place:
        """Where a basis of just so many vectors is held, though it may fit nowhere."""
        place, fitting = self.place(count, spare=spare)
        if fitting >= count:
            return place
        # In all of the free memory, if that is enough; else the disk's error says what is missing.
        return "device" if count + spare <= 2 * self.affordable() else "disk"

    def place_of(self, basis: Tensor) -> Place:
        """Where a basis is."""
        if places.is_on_disk(basis):
            return "disk"
        return "host" if _elsewhere(basis, self.device) else "device"

    def describe_basis(self, basis: Tensor) -> dict[str, Any]:
        """How large a basis is and where, for the provenance of results."""
        count = len(basis)
        return {
            "vectors": count,
            "bytes": count * self.vector_bytes,
            "place": self.place_of(basis),
        }

    def zeros(self, *count: int) -> Tensor:
        """The zero vector (n,), or `count` of them as rows."""
        return torch.zeros(*count, self.length, dtype=self.dtype, device=self.device)

    def empty(self, *count: int) -> Tensor:
        """Uninitialised memory for one vector, or for `count` rows."""
        return torch.empty(*count, self.length, dtype=self.dtype, device=self.device)

    def basis(self, count: int, place: Place | None = None) -> Tensor:
        """Memory for `count` rows at a place, by default where they fit.

        Raises
        ------
        StorageError
            The disk has no room for them.
        """
        place = place or self.place_for(count)
        if place == "disk":
            return places.rows_on_disk(count, self.length, self.dtype)
        if place == "host" and self.device.type != "cpu":
            # Pinned: only from there does the device fetch at full speed.
            pinned = self.device.type == "cuda"
            return torch.empty(
                count, self.length, dtype=self.dtype, device="cpu", pin_memory=pinned
            )
        return self.empty(count)

    def local(self, row: Tensor) -> Tensor:
        """A row of a basis where the vectors are; itself, if it is there."""
        return row.to(self.device) if _elsewhere(row, self.device) else row

    def held(self, rows: Tensor) -> Tensor:
        """Rows of any kind as a basis: themselves if they are one, or a copy where it fits best."""
        if rows.dtype == self.dtype and rows.is_contiguous():
            # What is on the host stays there where the device has no room.
            if not _elsewhere(rows, self.device) or self.place(len(rows))[0] != "device":
                return rows
        basis = self.basis(len(rows))
        for start in range(0, self.length, self._width):
            columns = slice(start, start + self._width)
            basis[:, columns].copy_(rows[:, columns])
        return basis

    def reordered(self, basis: Tensor, order: Tensor) -> Tensor:
        """The first rows of a basis by themselves, in the given order.

        The basis is used up: the memory of its other rows is given back before the copy is made.
        """
        count = len(order)
        places.give_back(basis[count:])
        try:
            rows = self.basis(count, self.place_of(basis))
        except StorageError:
            # Others filled the disk. Better a file that is too large than a result lost.
            self.rotate(basis, torch.eye(count, dtype=torch.float64, device="cpu")[:, order.cpu()])
            return basis[:count]
        return torch.index_select(basis[:count], 0, order.to(basis.device), out=rows)

    def counted(self, rows: Tensor) -> Tensor:
        """Those columns of rows (..., length) over which sums are taken here: all."""
        return rows

    def summed(self, partial: Tensor) -> Tensor:
        """The sum over all processes that hold a part of a vector: here there is one."""
        return partial

    def own(self, whole: Tensor) -> Tensor:
        """What is here (..., length) of whole vectors (..., n)."""
        return whole

    def whole(self, part: Tensor) -> Tensor:
        """Whole vectors (..., n), from what is here of them (..., length)."""
        return part

    def collected(self, part: Tensor) -> Tensor:
        """Whole vectors (..., n) in the memory of the process that writes files."""
        return part.cpu()

    def drawn(self, draw: Callable[[int], Tensor]) -> Tensor:
        """What is here of n numbers that `draw` makes one after the other, so many at a call."""
        return draw(self.n).to(self.device)

    def unit(self, place: int) -> Tensor:
        """The unit vector of one of the n entries."""
        vector = self.zeros()
        vector[place] = 1.0
        return vector

    def entry(self, vector: Tensor, place: int) -> float:
        """One of the n entries of a vector."""
        return float(vector[place])

    def sums_by_parameter(self, vector: Tensor) -> np.ndarray:
        """(1,) float64: the sum over all entries, where these belong to no parameters."""
        total = self.counted(vector).sum(dtype=torch.float64)
        found: np.ndarray = self.summed(total.reshape(1)).cpu().numpy()
        return found

    def dot(self, x: Tensor, y: Tensor) -> Tensor:
        """Inner product () of two vectors in float64: still on their device."""
        return self.summed(dot(self.counted(x), self.counted(y)))

    def inner(self, x: Tensor, y: Tensor) -> float:
        """Inner product of two vectors, multiplied and accumulated in float64."""
        return float(self.dot(x, y))

    def length_of(self, x: Tensor) -> Tensor:
        """Euclidean norm () in float64: still on the device."""
        if x.dtype == torch.float64 and not self.spread:
            return torch.linalg.vector_norm(x)
        # Squares of numbers in single precision neither overflow nor underflow in double, and
        # this is three times as fast as `vector_norm` with a dtype.
        return self.dot(x, x).sqrt()

    def norm(self, x: Tensor) -> float:
        """Euclidean norm, accumulated in float64."""
        return float(self.length_of(x))

    def project(self, basis: Tensor, x: Tensor) -> Tensor:
        """Inner products (m,) float64 of the rows of `basis` (m, n) with `x` (n,)."""
        exact, on_cpu = x.dtype == torch.float64, x.device.type == "cpu"
        total = torch.zeros(basis.shape[0], dtype=torch.float64, device=x.device)
        for columns, rows in self.blocks(self.counted(basis)):
            part = x[columns]
            if on_cpu and not exact and (large := _large_entries(part)) is not None:
                total += rows[:, large].double() @ part[large].double()
                part = part.index_fill(0, large, 0.0)
            total += torch.mv(rows, part)
        return self.summed(total)

    def projections(self, basis: Tensor, vectors: Tensor) -> Tensor:
        """As `project` of several vectors, rows (k, n), as rows (k, m): the basis is read once."""
        exact, on_cpu = vectors.dtype == torch.float64, vectors.device.type == "cpu"
        total = torch.zeros(len(vectors), len(basis), dtype=torch.float64, device=vectors.device)
        for columns, rows in self.blocks(self.counted(basis)):
            parts = vectors[:, columns]
            apart = [None if exact or not on_cpu else _large_entries(part) for part in parts]
            if any(large is not None for large in apart):
                parts = parts.clone()
                for i, large in enumerate(apart):
                    if large is not None:
                        total[i] += rows[:, large].double() @ parts[i, large].double()
                        parts[i].index_fill_(0, large, 0.0)
            total += parts @ rows.T
        return self.summed(total)

    def gram(self, basis: Tensor) -> Tensor:
        """Inner products (m, m) float64 of the rows of `basis` with one another."""
        total = torch.zeros(len(basis), len(basis), dtype=torch.float64, device=self.device)
        for _, rows in self.blocks(self.counted(basis)):
            exact = rows.double()
            total.addmm_(exact, exact.T)
        return self.summed(total)

    def combine(self, basis: Tensor, coefficients: Tensor) -> Tensor:
        """Linear combination (n,) of the rows of `basis` (m, n) with `coefficients` (m,)."""
        vector = self.empty()
        coefficients = coefficients.to(vector)
        for columns, rows in self.blocks(basis):
            torch.mv(rows.T, coefficients, out=vector[columns])
        return vector

    def subtract(self, x: Tensor, basis: Tensor, coefficients: Tensor) -> None:
        """Take the linear combination of the rows of `basis` away from `x`, in place."""
        coefficients = coefficients.to(x)
        for columns, rows in self.blocks(basis):
            x[columns].addmv_(rows.T, coefficients, alpha=-1.0)

    def subtract_each(self, vectors: Tensor, basis: Tensor, coefficients: Tensor) -> None:
        """As `subtract` from several vectors, rows (k, n), by rows of coefficients (k, m)."""
        coefficients = coefficients.to(vectors)
        for columns, rows in self.blocks(basis):
            vectors[:, columns].addmm_(coefficients, rows, alpha=-1.0)

    def remove(self, x: Tensor, basis: Tensor) -> Removed:
        """Take the components along orthonormal rows away from `x`, in place.

        Twice, where the first time took most of `x` away: what is left then has its rounding.
        """
        parts = self.project(basis, x)
        self.subtract(x, basis, parts)
        left, along = self.norm(x), float(torch.linalg.vector_norm(parts))
        before = math.hypot(left, along)
        if along > left:
            self.subtract(x, basis, self.project(basis, x))
            left = self.norm(x)
        return Removed(parts, before, left)

    def defect(self, basis: Tensor) -> float:
        """How far rows are from orthonormal: the largest entry of their Gram matrix less I."""
        gram = self.gram(basis)
        off = gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        return float(off.abs().max()) if len(gram) else 0.0

    def rotate(self, basis: Tensor, rotation: Tensor) -> None:
        """Replace the first p rows of `basis` (m, n) by `rotation` (m, p) applied to its rows.

        In place, tile by tile, so that no second basis is ever held.
        """
        m, p = rotation.shape
        matrix = rotation.T.to(device=self.device, dtype=self.dtype)
        tile = max(_BLOCK, (1 << 22) // max(m, 1))
        for columns, rows in self.blocks(basis[:m], tile):
            _copy(basis[:p, columns], matrix @ rows)

    def blocks(self, basis: Tensor, width: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        """The columns of a basis where the vectors are, block by block, with their places.

        To be read only: they may be copies.
        """
        width, length = width or self._width, basis.shape[1]
        elsewhere = _elsewhere(basis, self.device)
        if length <= width and not elsewhere:
            yield slice(0, length), basis
            return
        on_disk = places.is_on_disk(basis)
        if elsewhere:
            width = min(width, max(_BLOCK, _COPIED // max(len(basis), 1)))
        if on_disk:
            places.read_ahead(basis[:, :width])
        for start in range(0, length, width):
            columns = slice(start, min(start + width, length))
            rows = basis[:, columns]
            if on_disk and start + width < length:
                places.read_ahead(basis[:, start + width : start + 2 * width])
            if elsewhere:
                rows = torch.empty(rows.shape, dtype=rows.dtype, device=self.device)
                _copy(rows, basis[:, columns])
            yield columns, rows

    @property
    def _width(self) -> int:
        return _BLOCK if self.device.type == "cpu" else _BLOCK_ON_ACCELERATOR


def _elsewhere(rows: Tensor, device: torch.device) -> bool:
    """Whether rows have to be copied to where the vectors are."""
    return rows.device.type != device.type


def _copy(target: Tensor, source: Tensor) -> None:
    """Copy a block of columns, between devices row by row: each is one piece of memory."""
    if not _elsewhere(source, target.device):
        target.copy_(source)
        return
    for mine, row in zip(target, source, strict=True):
        # Queued, but for those that go to the host: they are read without asking the device.
        mine.copy_(row, non_blocking=target.device.type != "cpu")


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Sum of the products of two vectors' entries, in float64: still on their device."""
    if x.dtype == torch.float64:
        return torch.dot(x, y)
    block = _BLOCK if x.device.type == "cpu" else _BLOCK_ON_ACCELERATOR
    if x.numel() <= block:
        exact = x.double()
        return torch.dot(exact, exact if y is x else y.double())
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for start in range(0, len(x), block):
        part = x[start : start + block].double()
        other = part if y is x else y[start : start + block].double()
        total += torch.dot(part, other)
    return total


def _large_entries(part: Tensor) -> Tensor | None:
    """Places of the entries that stand out of a block, None where none does."""
    if part.numel() <= _FEW:
        return None
    limit = _LARGE * math.sqrt(float(torch.dot(part, part)) / len(part))
    smallest, largest = torch.aminmax(part)
    if float(largest) <= limit and float(smallest) >= -limit:
        return None
    return (part.abs() > limit).nonzero().squeeze(1)
