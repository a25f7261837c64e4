"""How does a Krylov space grow? Lanczos steps with full reorthogonalisation, kept in one basis.

    H V = V T + β v eᵀ          (V orthonormal, v the next basis vector)

Precision policy: the basis has the operator's dtype, T and everything computed from it is float64,
projections accumulate in float64, thresholds are relative to ‖T‖ and the basis' eps.

References: Lanczos, 1950, "An iteration method for the solution of the eigenvalue problem"; Daniel,
Gragg, Kaufman and Stewart, 1976, "Reorthogonalization and stable algorithms for updating the
Gram-Schmidt QR factorization"; Wu and Simon, 2000, "Thick-restart Lanczos method for large
symmetric eigenvalue problems".
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
    ) -> None:
        self._operator = operator
        self.space = operator.space
        self._generator = generator
        self._outside = complement_of
        self.dimension = self.space.n - (0 if complement_of is None else len(complement_of))
        self.capacity = min(capacity, self.dimension)
        # One row more than the capacity: the next basis vector waits there.
        self._rows = self.space.basis(min(self.capacity + 1, self.dimension), place)
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
        # The last two vectors of the basis are neighbours: β couples them, and nothing else.
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
        return self.size == self.capacity

    @property
    def complete(self) -> bool:
        """The basis spans the whole space: its Ritz pairs are all the eigenpairs."""
        return self.size == self.dimension

    def step(self) -> None:
        """Add the waiting vector to the basis: one product."""
        j, vector = self.size, None
        if (known := self._log.step(self)) is not None:
            coefficients, norm = known
            self.size = j + 1
        else:
            vector = self._product(j)
            self.size = j + 1
            coefficients, norm = self._orthogonalise(vector)
            self._log.add(coefficients, norm, self.noise)
        self.projection[: j + 1, j] = self.projection[j, : j + 1] = coefficients
        scale = float(np.abs(self.projection[: j + 1, : j + 1]).max(initial=0.0))
        self.exhausted = norm <= max(10 * self.space.eps, _ROUNDING) * scale
        self.beta = 0.0 if self.exhausted else norm
        self._neighbours = not self.exhausted
        if self.complete:
            self.beta, self.exhausted = 0.0, True
        elif vector is None:
            # A resumed run finds the vectors themselves at its last restart.
            return
        elif self.exhausted:
            self._rows[self.size] = self._fresh_direction()
        else:
            vector.div_(norm)
            if vector.data_ptr() != self._rows[self.size].data_ptr():
                self._rows[self.size] = vector

    @property
    def hollow(self) -> bool:
        """The vectors are not there: those of a run that is being resumed, before its end."""
        return self._log.replaying

    def _product(self, j: int) -> Tensor:
        """H times basis vector number `j`: where the next one is to be, if that is at hand."""
        last = self.space.local(self._rows[j])
        if j + 1 < len(self._rows) and self.space.place_of(self._rows) == "device":
            following = self._rows[j + 1]
            self._operator.apply_into(last, following)
            return following
        return self._operator.apply(last)

    def extended(self, operator: SymmetricOperator, capacity: int) -> Self:
        """A copy with room for `capacity` vectors that goes on with `operator`."""
        copied = copy.copy(self)
        copied.noise = copy.copy(self.noise)
        copied._operator = operator
        copied.capacity = min(capacity, self.dimension)
        copied._rows = self.space.basis(min(copied.capacity + 1, self.dimension))
        copied._rows[: len(self._rows)] = self._rows
        copied._log = _Log(operator, copied._outside)
        copied.projection = np.zeros((copied.capacity, copied.capacity))
        known = slice(self.size)
        copied.projection[known, known] = self.projection[known, known]
        return copied

    def ritz(self) -> RitzPairs:
        """Eigenpairs of the projection, at the cost of a small dense eigenproblem."""
        values, coefficients = np.linalg.eigh(self.projection[: self.size, : self.size])
        residuals = self.beta * np.abs(coefficients[-1])
        return RitzPairs(values, coefficients, np.hypot(residuals, self._inherited(coefficients)))

    def restart(self, pairs: RitzPairs, keep: np.ndarray) -> RitzPairs:
        """Shrink the basis to the chosen Ritz vectors and go on from the same next vector.

        Returns the pairs that are left, in terms of the new basis.
        """
        self._log.look(self._rows)
        beta, exhausted = self.beta, self.exhausted
        following = None
        if not self.hollow and self.size < len(self._rows):
            following = self._rows[self.size].clone()
        left = self._shrink(pairs, keep)
        # What couples the kept vectors to the next one comes out of its own projection.
        self.beta, self.exhausted = beta, exhausted
        if following is not None:
            self._rows[self.size] = following
        self._log.restarted(self._rows[: self.size + 1], self._generator)
        return left

    def restart_fresh(self, pairs: RitzPairs, keep: np.ndarray) -> RitzPairs:
        """Shrink the basis to the chosen Ritz vectors and go on in a fresh random direction.

        Returns the pairs that are left, in terms of the new basis.
        """
        self._log.look(self._rows)
        left = self._shrink(pairs, keep)
        self._dropped = left.residuals
        self.beta, self.exhausted = 0.0, True
        if not self.hollow:
            self._rows[self.size] = self._fresh_direction()
        self._log.restarted(self._rows[: self.size + 1], self._generator)
        return left

    def _shrink(self, pairs: RitzPairs, keep: np.ndarray) -> RitzPairs:
        if not self.hollow:
            rotation = torch.from_numpy(np.ascontiguousarray(pairs.coefficients[:, keep]))
            self.space.rotate(self.basis, rotation)
        self._dropped = self._inherited(pairs.coefficients[:, keep])
        self.size = len(keep)
        self._neighbours = False
        self.projection[:] = 0.0
        self.projection[range(self.size), range(self.size)] = pairs.values[keep]
        return RitzPairs(pairs.values[keep], np.eye(self.size), pairs.residuals[keep])

    def _inherited(self, coefficients: np.ndarray) -> np.ndarray:
        """What of the dropped residuals is in each combination of basis vectors (columns)."""
        inherited: np.ndarray = np.linalg.norm(
            self._dropped[:, None] * coefficients[: len(self._dropped)], axis=0
        )
        return inherited

    def _orthogonalise(self, vector: Tensor) -> tuple[np.ndarray, float]:
        """Take the basis out of a product in place: coefficients, and the norm that is left.

        What goes on is decided by one block of numbers in each pass, for which an accelerator has
        to be waited for; nearly always there is one pass.
        """
        space, basis = self.space, self.basis
        held = [basis] if self._outside is None else [basis, self._outside]
        # The two components that three-term recurrence knows of, so that the projection on the
        # whole basis finds next to nothing and one pass of it is usually enough.
        near = basis[-2:] if self._neighbours else basis[-1:]
        along_last = space.dot(space.local(basis[-1]), vector).reshape(1)
        along_first = along_last.new_full((len(near) - 1,), self.beta)
        space.subtract(vector, near, torch.cat([along_first, along_last]))
        coefficients = np.zeros(self.size)
        for i in range(3):
            corrections = [space.project(rows, vector) for rows in held]
            for rows, correction in zip(held, corrections, strict=True):
                space.subtract(vector, rows, correction)
            left = space.length_of(vector).reshape(1)
            block = torch.cat([*corrections, left, along_last]).cpu().numpy()
            if not np.isfinite(block).all():
                self.size -= 1
                self._operator.refuse_non_finite(space.local(basis[-1]))
            coefficients += block[: self.size]
            norm, before = float(block[-2]), math.hypot(*block[:-1])
            if i == 0:
                coefficients[-1] += block[-1]
                self._learn(coefficients, math.hypot(before, block[-1]), corrections)
            if norm >= _CANCELLATION * before:
                return coefficients, norm
        # What the passes left was their own rounding: the vector lies in the span.
        return coefficients, 0.0

    def _learn(self, coefficients: np.ndarray, size: float, corrections: list[Tensor]) -> None:
        """What else a product tells: of its noise, and of the complement where it has strayed."""
        if self._neighbours:
            coefficients[-2] += self.beta
            size = math.hypot(size, self.beta)
            # Of one symmetric matrix: vᵀ(Hu) was the β that led to v, and uᵀ(Hv) is a coefficient.
            if not self.noise.settled:
                defect = coefficients[-2] - self.beta
                sizes = (self._size, size)
                self.noise.add(defect, sizes, self.space.eps, across=self.beta)
        if self.size == 1 and self._outside is not None:
            self.mixed = (corrections[1], size)
        self._size = size

    def _fresh_direction(self) -> Tensor:
        """A random unit vector orthogonal to everything held so far."""
        space = self.space
        held = [rows for rows in (self._outside, self.basis) if rows is not None]
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

    def step(self, krylov: Krylov) -> tuple[np.ndarray, float] | None:
        """Coefficients and norm of the next step if they are known."""
        self.look(krylov.rows)
        if self._known is None:
            return None
        coefficients, norm, noise = self._known["steps"][len(self._steps)]
        self._steps.append(None)
        krylov.noise.state = tuple(noise)
        return np.array(coefficients), norm

    def add(self, coefficients: np.ndarray, norm: float, noise: Noise) -> None:
        """Note a step that was computed."""
        if self._journal is not None:
            self._steps.append((coefficients.tolist(), norm, list(noise.state)))

    def restarted(self, rows: Tensor, generator: torch.Generator) -> None:
        """The basis was shrunk to `rows`, the last of which is the next vector."""
        journal = self._journal
        if journal is None:
            return
        if self._known is not None:
            generator.set_state(_generator_state(self._known["generator"]))
        else:
            state = bytes(generator.get_state().numpy()).hex()
            value = {"steps": self._steps, "generator": state}
            count = len(self._steps)
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
