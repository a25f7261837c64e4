"""How does a Krylov space grow? Lanczos steps with full reorthogonalisation, kept in one basis.

    H V = V T + W R Eᵀ          (V orthonormal, the rows of W are the next basis vectors)

W is one vector and R a number β, or W is a block: then the products are computed together, E has
the last columns of the identity, and T is a band.

Precision policy: the basis has the operator's dtype, T and everything computed from it is float64,
projections accumulate in float64, thresholds are relative to ‖T‖ and the basis' eps.

References: Lanczos, 1950, "An iteration method for the solution of the eigenvalue problem"; Daniel,
Gragg, Kaufman and Stewart, 1976, "Reorthogonalization and stable algorithms for updating the
Gram-Schmidt QR factorization"; Wu and Simon, 2000, "Thick-restart Lanczos method for large
symmetric eigenvalue problems"; Golub and Underwood, 1977, "The block Lanczos method for computing
eigenvalues".
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from scipy import special
from torch import Tensor

from spectra.algorithms import probes
from spectra.algorithms.noise import Noise
from spectra.journal import current
from spectra.objective.places import Place
from spectra.operators.base import SymmetricOperator

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Krylov", "RitzPairs", "upper_bound"]

# The name of what a journal holds of the steps between two restarts.
_RESTARTED = "Lanczos steps"

# Another orthogonalisation pass is needed when the last one took away more than this share of the
# norm (Daniel et al. 1976: «twice is enough»).
_CANCELLATION = 0.7071

# What is left of a vector in the span is a few eps ‖H‖, divided by whatever β came before. Single
# precision has no digits to spare for that: ten million parameters reach β = 1e-5 ‖H‖ in earnest.
_ROUNDING = 1e-13


@dataclass(frozen=True, eq=False)
class RitzPairs:
    """Eigenpairs of T.

    Attributes
    ----------
    values
        (j,) ascending.
    coefficients
        (j, j), columns: the Ritz vectors in terms of the basis.
    residuals
        (j,) norms ‖Hx − λx‖ as the recurrence has them: right up to the noise of the products.
    """

    values: np.ndarray
    coefficients: np.ndarray
    residuals: np.ndarray


class Krylov:
    """An orthonormal basis that grows by one vector per product, and the projection of H on it.

    Some vectors wait: a step multiplies them, they join the basis, and what is left of their
    products waits in their place.

    Parameters
    ----------
    operator
        What to multiply with.
    capacity
        Most vectors the basis may hold; memory (capacity + 1) n.
    generator
        For directions when the space is exhausted.
    start
        First direction (n,), not zero; random by default.
    complement_of
        Orthonormal rows (r, n); the Krylov space is that of H restricted to their complement.
    place
        Where the basis lives; by default where all of it fits best, see `VectorSpace.place`.
    block_size
        Vectors that are multiplied together. `start` is the first of them, the others are random.
        Memory is (capacity + 2 block_size) n, where there is more than one.
    """

    def __init__(
        self,
        operator: SymmetricOperator,
        capacity: int,
        generator: torch.Generator,
        start: Tensor | None = None,
        complement_of: Tensor | None = None,
        *,
        place: Place | None = None,
        block_size: int = 1,
    ) -> None:
        self._operator = operator
        self.space = operator.space
        self._generator = generator
        self._outside = complement_of
        self.dimension = self.space.n - (0 if complement_of is None else len(complement_of))
        self.capacity = min(capacity, self.dimension)
        # More rows than the capacity: the next basis vectors wait there.
        self._rows = self.space.basis(min(self.capacity + block_size, self.dimension), place)
        self.projection = np.zeros((self.capacity, self.capacity))
        self.size = 0
        self.beta = 0.0
        self.exhausted = False
        """The span of the basis was invariant under H when the last vector was added."""
        self.mixed: tuple[Tensor, float] | None = None
        """What the first product had of `complement_of`, and its norm."""
        self.noise = Noise(self.space.n)
        """How unsymmetric the first products were."""
        # Residuals of the first basis vectors towards directions that a fresh start has dropped.
        self._dropped = np.zeros(0)
        # R: of the vectors that wait (rows) with the products of the last step (columns).
        self._coupling = np.zeros((0, 0))
        # R couples the last step to those that wait, and nothing else does.
        self._neighbours = False
        # Norm of the last product.
        self._size = 0.0
        self._log = _Log(operator, complement_of)
        if start is None:
            self._rows[0] = probes.sphere(self.space, generator, complement_of)
        else:
            start = start.clone()
            if complement_of is not None:
                self.space.remove(start, complement_of)
            self._rows[0] = start.div_(self.space.norm(start))
        self.waiting = 1
        """How many vectors the next step multiplies; 0 if the basis is complete."""
        while self.waiting < min(block_size, self.capacity):
            self._rows[self.waiting] = self._fresh_direction()
            self.waiting += 1

    @property
    def basis(self) -> Tensor:
        """The orthonormal basis, as rows (size, n); a view that later steps change."""
        return self._rows[: self.size]

    @property
    def rows(self) -> Tensor:
        """All the memory of the basis (capacity + 1, n), for those who use it up."""
        return self._rows

    @property
    def full(self) -> bool:
        """No further step fits."""
        return self.size + max(1, self.waiting) > self.capacity

    @property
    def complete(self) -> bool:
        """The basis spans the whole space: its Ritz pairs are all the eigenpairs."""
        return self.size == self.dimension

    def step(self) -> None:
        """Add the waiting vectors to the basis: one product each."""
        first, count = self.size, self.waiting
        known = self._log.step(self)
        products: list[Tensor | None] = [None] * count
        if known is None:
            products[:] = self._products()
        self.size += count
        before = _Step(first, self._coupling if self._neighbours else None, self._size)
        self.waiting, self._coupling = 0, np.zeros((count, count))
        taken: list[tuple[np.ndarray, float]] = []
        for i, vector in enumerate(products):
            if vector is not None:
                taken.append(self._orthogonalise(vector, first + i, before))
            coefficients, norm = taken[i] if known is None else known[i]
            self._project(first + i, coefficients[: self.size])
            self._coupling[: self.waiting, i] = coefficients[self.size :]
            if self.size + self.waiting < self.dimension and not self._negligible(norm):
                self._coupling[self.waiting, i] = norm
                self._wait(vector, norm)
        if known is None:
            self._log.add(taken, self.noise)
        self._coupling = self._coupling[: self.waiting]
        self.beta = float(np.linalg.norm(self._coupling))
        self.exhausted = self.waiting == 0
        self._neighbours = not self.exhausted
        if self.exhausted and not self.complete:
            self._start_afresh()

    def _products(self) -> list[Tensor]:
        """H times the vectors that wait: one goes where the next one is to be, if that can be."""
        place, space = slice(self.size, self.size + self.waiting), self.space
        if self.waiting > 1:
            return list(self._operator.apply(space.local(self._rows[place]).T).T)
        last, following = space.local(self._rows[self.size]), self._rows[self.size + 1 :]
        if len(following) and space.place_of(self._rows) == "device":
            self._operator.apply_into(last, following[0])
            return [following[0]]
        return [self._operator.apply(last)]

    def _project(self, j: int, coefficients: np.ndarray) -> None:
        """What the product with basis vector number `j` says of T."""
        known = slice(len(coefficients))
        self.projection[known, j] = self.projection[j, known] = coefficients

    def _negligible(self, norm: float) -> bool:
        """What is left of a product is rounding: it lies in the span."""
        scale = float(np.abs(self.projection[: self.size, : self.size]).max(initial=0.0))
        return norm <= max(10 * self.space.eps, _ROUNDING) * scale

    def _wait(self, vector: Tensor | None, norm: float) -> None:
        """What is left of a product is the next vector."""
        following = self.size + self.waiting
        self.waiting += 1
        if vector is None:
            # A resumed run finds the vectors themselves at its last restart.
            return
        vector.div_(norm)
        if vector.data_ptr() != self._rows[following].data_ptr():
            self._rows[following] = vector

    def _start_afresh(self) -> None:
        """Nothing led out of the span: a random direction does."""
        self.waiting = 0
        if not self.hollow:
            self._rows[self.size] = self._fresh_direction()
        self.waiting = 1

    @property
    def hollow(self) -> bool:
        """The vectors are not there: those of a run that is being resumed, before its end."""
        return self._log.replaying

    def extended(
        self, operator: SymmetricOperator, capacity: int, place: Place | None = None
    ) -> Self:
        """A copy with room for `capacity` vectors that goes on with `operator`."""
        copied = copy.copy(self)
        copied.noise = copy.copy(self.noise)
        copied._operator = operator
        copied.capacity = min(capacity, self.dimension)
        copied._rows = self.space.basis(min(copied.capacity + 1, self.dimension), place)
        copied._rows[: len(self._rows)] = self._rows
        copied._log = _Log(operator, copied._outside)
        copied.projection = np.zeros((copied.capacity, copied.capacity))
        known = slice(self.size)
        copied.projection[known, known] = self.projection[known, known]
        return copied

    def ritz(self) -> RitzPairs:
        """Eigenpairs of the projection, at the cost of a small dense eigenproblem."""
        values, coefficients = np.linalg.eigh(self.projection[: self.size, : self.size])
        last = coefficients[self.size - self._coupling.shape[1] :]
        residuals = np.linalg.norm(self._coupling @ last, axis=0)
        return RitzPairs(values, coefficients, np.hypot(residuals, self._inherited(coefficients)))

    def restart(self, pairs: RitzPairs, keep: np.ndarray) -> RitzPairs:
        """Shrink the basis to the chosen Ritz vectors and go on from the same next vectors.

        Returns the pairs that are left, in terms of the new basis.
        """
        self._log.look(self._rows)
        beta, exhausted = self.beta, self.exhausted
        following = None
        if not self.hollow:
            following = self._rows[self.size : self.size + self.waiting].clone()
        left = self._shrink(pairs, keep)
        # What couples the kept vectors to the next ones comes out of their own projection.
        self.beta, self.exhausted = beta, exhausted
        if following is not None:
            self._rows[self.size : self.size + self.waiting] = following
        self._log.restarted(self._rows[: self.size + self.waiting], self._generator)
        return left

    def restart_fresh(self, pairs: RitzPairs, keep: np.ndarray) -> RitzPairs:
        """Shrink the basis to the chosen Ritz vectors and go on in a fresh random direction.

        Returns the pairs that are left, in terms of the new basis.
        """
        self._log.look(self._rows)
        left = self._shrink(pairs, keep)
        self._dropped = left.residuals
        self.beta, self.exhausted = 0.0, True
        self._start_afresh()
        self._log.restarted(self._rows[: self.size + 1], self._generator)
        return left

    def _shrink(self, pairs: RitzPairs, keep: np.ndarray) -> RitzPairs:
        if not self.hollow:
            rotation = torch.from_numpy(np.ascontiguousarray(pairs.coefficients[:, keep]))
            self.space.rotate(self.basis, rotation)
        self._dropped = self._inherited(pairs.coefficients[:, keep])
        self.size = len(keep)
        self._neighbours = False
        self._coupling = np.zeros((0, 0))
        self.projection[:] = 0.0
        self.projection[range(self.size), range(self.size)] = pairs.values[keep]
        return RitzPairs(pairs.values[keep], np.eye(self.size), pairs.residuals[keep])

    def _inherited(self, coefficients: np.ndarray) -> np.ndarray:
        """What of the dropped residuals is in each combination of basis vectors (columns)."""
        inherited: np.ndarray = np.linalg.norm(
            self._dropped[:, None] * coefficients[: len(self._dropped)], axis=0
        )
        return inherited

    def _orthogonalise(self, vector: Tensor, j: int, before: _Step) -> tuple[np.ndarray, float]:
        """Take the basis, and what waits, out of the product with vector number `j`, in place.

        Returns its coefficients and the norm that is left. What goes on is decided by one block of
        numbers in each pass, for which an accelerator has to be waited for; nearly always there is
        one pass.
        """
        space, basis = self.space, self._rows[: self.size + self.waiting]
        held = [basis] if self._outside is None else [basis, self._outside]
        # The components that the recurrence knows of, so that the projection on the whole basis
        # finds next to nothing and one pass of it is usually enough.
        couplings = () if before.coupling is None else before.coupling[j - before.size]
        step, earlier = slice(before.size, self.size), before.size - len(couplings)
        along = [space.dot(space.local(row), vector).reshape(1) for row in self._rows[step]]
        known = [along[0].new_full((1,), float(coupling)) for coupling in couplings]
        space.subtract(vector, self._rows[earlier : self.size], torch.cat([*known, *along]))
        coefficients = np.zeros(len(basis))
        for i in range(3):
            corrections = [space.project(rows, vector) for rows in held]
            for rows, correction in zip(held, corrections, strict=True):
                space.subtract(vector, rows, correction)
            left = space.length_of(vector).reshape(1)
            block = torch.cat([*along, *corrections, left]).cpu().numpy()
            if not np.isfinite(block).all():
                self.size, self.waiting = before.size, self.size - before.size
                self._operator.refuse_non_finite(space.local(self._rows[j]))
            found = block[len(along) :]
            coefficients += found[: len(basis)]
            norm, length = float(found[-1]), math.hypot(*found)
            if i == 0:
                coefficients[step] += block[: len(along)]
                coefficients[earlier : before.size] += couplings
                size = math.hypot(length, *block[: len(along)], *couplings)
                if j == self.size - 1:
                    self._learn(coefficients, size, before)
                if self.size == 1 and self._outside is not None:
                    self.mixed = (corrections[1], size)
            if norm >= _CANCELLATION * length:
                return coefficients, norm
        # What the passes left was their own rounding: the vector lies in the span.
        return coefficients, 0.0

    def _learn(self, coefficients: np.ndarray, size: float, before: _Step) -> None:
        """What the last product of a step tells of the noise, beside the last one before it."""
        self._size = size
        if before.coupling is None or self.noise.settled:
            return
        # Of one symmetric matrix: vᵀ(Hu) led to v, and uᵀ(Hv) is a coefficient. Where the last of
        # both steps do not belong together, v has none of the error of Hu.
        coupling = float(before.coupling[-1, -1])
        defect = float(coefficients[before.size - 1]) - coupling
        self.noise.add(defect, (before.length, size), self.space.eps, across=coupling)

    def _fresh_direction(self) -> Tensor:
        """A random unit vector orthogonal to everything held so far."""
        space = self.space
        basis = self._rows[: self.size + self.waiting]
        held = [rows for rows in (self._outside, basis) if rows is not None]
        while True:
            vector = probes.sphere(space, self._generator)
            for _ in range(2):
                for rows in held:
                    space.subtract(vector, rows, space.project(rows, vector))
            norm = space.norm(vector)
            # With few dimensions left a draw may lose all its digits in the projection.
            if norm > 1e3 * space.eps:
                vector.div_(norm)
                for rows in held:
                    space.subtract(vector, rows, space.project(rows, vector))
                return vector.div_(space.norm(vector))


class _Step(NamedTuple):
    """What the step before left behind.

    Attributes
    ----------
    size
        Of the basis.
    coupling
        R, None where it says nothing of what comes next.
    length
        Of its last product.
    """

    size: int
    coupling: np.ndarray | None
    length: float


class _Log:
    """What a journal keeps of the steps since the last restart: all numbers, and no product.

    When the basis is restarted, the numbers of the steps before and the few vectors that are left
    take the place of the products in the journal, so that it never holds more vectors than the
    basis. A run that is resumed takes those steps by their numbers alone.
    """

    def __init__(self, operator: SymmetricOperator, outside: Tensor | None) -> None:
        # Only where the whole course is that of one basis: the others have no restart.
        self._journal = current(operator) if outside is None else None
        self._begin = 0 if self._journal is None else self._journal.position
        self._steps: list[Any] = []
        self._known: dict[str, Any] | None = None

    @property
    def replaying(self) -> bool:
        """The steps are known, their vectors are not there."""
        return self._known is not None

    def look(self, rows: Tensor) -> None:
        """Find out whether what comes up to the next restart is known, and with which `rows`."""
        if self._journal is not None and self._known is None and not self._steps:
            self._known = self._journal.recall(_RESTARTED, into=rows)

    def step(self, krylov: Krylov) -> list[tuple[np.ndarray, float]] | None:
        """Coefficients and norm of every product of the next step if they are known."""
        self.look(krylov.rows)
        if self._known is None:
            return None
        products, noise = self._known["steps"][len(self._steps)]
        self._steps.append(None)
        krylov.noise.state = tuple(noise)
        return [(np.array(coefficients), norm) for coefficients, norm in products]

    def add(self, products: list[tuple[np.ndarray, float]], noise: Noise) -> None:
        """Note a step that was computed."""
        if self._journal is not None:
            numbers = [(coefficients.tolist(), norm) for coefficients, norm in products]
            self._steps.append((numbers, list(noise.state)))

    def restarted(self, rows: Tensor, generator: torch.Generator) -> None:
        """The basis was shrunk to `rows`, the last of which are the next vectors."""
        journal = self._journal
        if journal is None:
            return
        if self._known is not None:
            generator.set_state(_generator_state(self._known["generator"]))
        else:
            state = bytes(generator.get_state().numpy()).hex()
            value = {"steps": self._steps, "generator": state}
            count = sum(len(products) for products, _ in self._steps)
            journal.condense(self._begin, _RESTARTED, value, matvecs=count, rows=rows)
        self._known, self._steps, self._begin = None, [], journal.position


def _generator_state(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def upper_bound(
    ritz_values: np.ndarray, betas: np.ndarray, n: int, confidence: float = 0.99
) -> float:
    """What the largest eigenvalue does not exceed, with the given probability.

    A unit start vector, uniform on the sphere, has a component of at least δ along the eigenvector
    with that probability, and the Lanczos polynomial Π (t − θ_i) / Π β_i is at most 1/δ there.

    Parameters
    ----------
    ritz_values
        (p,) Ritz values of p Lanczos steps. For a lower bound of the smallest eigenvalue pass them
        with the opposite sign, and take the opposite of the result.
    betas
        (p,) off-diagonal entries of T, the last one couples to the next vector.
    n
        Dimension of the space that the start vector was drawn from.

    References
    ----------
    Van Dorsselaer, Hochstenbach and van der Vorst, 2000, "Computing probabilistic bounds for
    extreme eigenvalues of symmetric matrices with the Lanczos method".
    """
    top = float(np.max(ritz_values))
    if n <= 1 or (betas <= 0).any():
        return top
    smallest = math.sqrt(special.betaincinv(0.5, (n - 1) / 2, 1 - confidence))
    target = float(np.log(betas).sum()) - math.log(smallest)

    # The distance to the largest Ritz value, in units of the spread: the same at every scale.
    spread = top - float(np.min(ritz_values)) + float(betas.max())
    below = top - ritz_values

    def excess(distance: float) -> float:
        return float(np.log(distance * spread + below).sum()) - target

    low = 1e-12 * max(abs(top) / spread, 1.0)
    if excess(low) > 0:
        return top + low * spread
    high = 1.0
    while excess(high) < 0:
        high *= 2
    # Slow to import, as `import spectra` does not need it.
    from scipy.optimize import brentq

    return top + spread * float(brentq(excess, low, high))
