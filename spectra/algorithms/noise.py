"""How far are the products from those of one symmetric matrix?

Half precision, nondeterministic kernels or a wrong second derivative make uᵀ(Hv) and vᵀ(Hu)
differ. An error of relative norm η in every product, in a random direction, moves each by about
η ‖Hv‖ / √n only, so the defect is scaled by √n: without that it would tell almost nothing.
"""

from __future__ import annotations

import math

from torch import Tensor

from spectra.objective.vectors import VectorSpace

__all__ = ["LOUD", "Noise", "noise_notes"]

# Below this, noise is no concern of a reader who looks at three or four digits.
LOUD = 1e-4


class Noise:
    """Collects symmetry defects from pairs of products that were computed anyway.

    Parameters
    ----------
    n
        Length of the vectors.
    """

    def __init__(self, n: int) -> None:
        self._n = n
        self._sum = 0.0
        self._count = 0

    def add(self, defect: float, size: float) -> None:
        """One pair of unit vectors: uᵀ(Hv) − vᵀ(Hu), and sqrt(‖Hu‖² + ‖Hv‖²)."""
        if size > 0:
            self._sum += self._n * (defect / size) ** 2
            self._count += 1

    def compare(self, space: VectorSpace, u: Tensor, hu: Tensor, v: Tensor, hv: Tensor) -> None:
        """One pair of vectors (n,) of any length with their products: four passes over vectors."""
        length_u, length_v = space.norm(u), space.norm(v)
        defect = (space.inner(u, hv) - space.inner(v, hu)) / (length_u * length_v)
        self.add(defect, math.hypot(space.norm(hu) / length_u, space.norm(hv) / length_v))

    @property
    def relative(self) -> float:
        """Relative error η of a product: root mean square over the pairs, nan without any.

        For a matrix M that is not symmetric it estimates ‖M − Mᵀ‖_F / (√2 ‖M‖_F).
        """
        return math.sqrt(self._sum / self._count) if self._count else math.nan


def noise_notes(noise: float, floor: float) -> list[str]:
    """What a reader has to know about the noise: nothing where it is below 1e-4."""
    if not noise > LOUD:
        return []
    return [
        f"the products differ from those of one symmetric matrix by {noise:.1g} (measured; half "
        f"precision, or not deterministic): digits below {floor:.1g} mean nothing"
    ]
