"""How far are the products from those of one symmetric matrix?

Half precision, nondeterministic kernels or a wrong second derivative make uᵀ(Hv) and vᵀ(Hu)
differ. An error of relative norm η in every product, in a random direction, moves each by about
η ‖Hv‖ / √n only, so the defect is scaled by √n: without that it would tell almost nothing.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from spectra.objective.vectors import VectorSpace

__all__ = ["LOUD", "Noise", "most_noise", "noise_notes"]

# As many pairs tell the noise to a third; then the two vectors they take are given back.
_WATCHED = 8
# A defect of so many eps is what single precision leaves in a large network's products.
_ROUNDING = 8.0
# Below this, noise is no concern of a reader who looks at three or four digits.
LOUD = 1e-4
# Above this no rounding explains it.
_NOT_SYMMETRIC = 0.3


class Noise:
    """Collects symmetry defects uᵀ(Hv) − vᵀ(Hu) from pairs of products that were computed anyway.

    Parameters
    ----------
    n
        Length of the vectors.
    """

    def __init__(self, n: int) -> None:
        self._n = n
        self._defects = 0.0
        self._sizes = 0.0
        self._count = 0
        self._last: tuple[Tensor, Tensor] | None = None
        self.limit = math.nan
        """The most that measured residuals leave room for; nan where there are none."""

    def compare(
        self,
        space: VectorSpace,
        u: Tensor,
        hu: Tensor,
        v: Tensor,
        hv: Tensor,
        *,
        successive: bool = False,
    ) -> None:
        """One pair of vectors (n,) of any length with their products.

        Parameters
        ----------
        successive
            v is the Krylov vector that was made from hu.
        """
        length_u, length_v = space.norm(u), space.norm(v)
        if length_u == 0 or length_v == 0:
            return
        size_u, size_v = space.norm(hu) / length_u, space.norm(hv) / length_v
        across = space.inner(v, hu) / (length_u * length_v)
        defect = space.inner(u, hv) / (length_u * length_v) - across
        self.add(defect, (size_u, size_v), space.eps, across=across if successive else 0.0)

    def add(
        self, defect: float, sizes: tuple[float, float], eps: float, *, across: float = 0.0
    ) -> None:
        """One pair of products, known by their numbers.

        Parameters
        ----------
        defect
            uᵀ(Hv) − vᵀ(Hu) of unit vectors u and v.
        sizes
            ‖Hu‖ and ‖Hv‖.
        eps
            Machine epsilon of the vectors.
        across
            vᵀ(Hu), where v is the Krylov vector that was made from Hu. It contains the error of Hu,
            and the defect has then not only a random part η ‖Hv‖ / √n, but also the mean
            η² ‖Hu‖² / vᵀHu.
        """
        size = sizes[0] ** 2 + sizes[1] ** 2
        if size == 0:
            return
        square = self._n * defect**2
        if abs(defect) <= _ROUNDING * eps * math.sqrt(size):
            # Rounding has no random direction that √n could be a measure of.
            square = size * eps**2
        elif across != 0:
            # η² from n defect² = η² size + n (η² ‖Hu‖² / vᵀHu)², as η² size.
            mean = self._n * (sizes[0] ** 2 / (across * size)) ** 2
            square = 2 * square / (1 + math.sqrt(1 + 4 * mean * square))
        self._defects += square
        self._sizes += size
        self._count += 1

    def watch(self, space: VectorSpace, v: Tensor, hv: Tensor, *, successive: bool = False) -> None:
        """Consecutive products: each is compared with the one before, the first eight of them."""
        if self._count >= _WATCHED:
            self._last = None
            return
        if self._last is not None:
            self.compare(space, *self._last, v, hv, successive=successive)
            # Not four long vectors at a time.
            self._last = None
        self._last = (v.clone(), hv.clone())

    @property
    def state(self) -> tuple[float, float, int]:
        """What the pairs so far have told: all but the last product, which is not kept for long."""
        return self._defects, self._sizes, self._count

    @state.setter
    def state(self, known: tuple[float, float, int]) -> None:
        self._defects, self._sizes, self._count = known

    @property
    def settled(self) -> bool:
        """No further product is compared."""
        return self._count >= _WATCHED and self._last is None

    def forget(self) -> None:
        """The next product has nothing to do with the last one."""
        self._last = None

    @property
    def relative(self) -> float:
        """Relative error η of a product, in the root mean square; nan without any pair.

        Not less than eps; and what is below 8 √n eps may pass for rounding.

        For a matrix M that is not symmetric it estimates ‖M − Mᵀ‖_F / (√2 ‖M‖_F).
        """
        if not self._count:
            return math.nan
        return float(np.fmin(math.sqrt(self._defects / self._sizes), self.limit))


def most_noise(values: np.ndarray, residuals: np.ndarray, rounding: float) -> float:
    """The most noise that eigenpairs with measured residuals leave room for; nan if none tells.

    A measured residual contains all of the error of its product, ‖Hx‖ being |λ|.

    Parameters
    ----------
    values, residuals
        (k,) of the pairs.
    rounding
        Values up to this size may be zero.
    """
    sizes = np.abs(values)
    known = sizes > rounding
    return float((residuals[known] / sizes[known]).min()) if known.any() else math.nan


def noise_notes(noise: float, floor: float, quantity: str = "") -> list[str]:
    """What a reader has to know about the noise: nothing where it is below 1e-4."""
    if not noise > LOUD:
        return []
    whose = f" of the {quantity}" if quantity else ""
    below = f"below {floor:.1g}" if math.isfinite(floor) else "of that size"
    if noise > _NOT_SYMMETRIC:
        return [
            f"the operator is not symmetric, or its products are random: they differ from those of "
            f"one symmetric matrix by {noise:.1g} (measured). No digit of this can be relied on"
        ]
    return [
        f"the products differ from those of one symmetric matrix by {noise:.1g} (measured; half "
        "precision, not deterministic, or not quite symmetric): digits"
        f"{whose} {below} mean nothing"
    ]
