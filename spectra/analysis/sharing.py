"""What of the density's Lanczos runs serves the trace and the Frobenius norm?"""

from __future__ import annotations

import math

from torch import Tensor

from spectra.algorithms.density import SpectralDensity
from spectra.algorithms.moments import KnownPart, Moments, Samples
from spectra.algorithms.probes import Deflation
from spectra.algorithms.sketch import KrylovPart
from spectra.objective.vectors import VectorSpace

__all__ = ["Shared"]


class _PairsAndKrylov:
    """Q Θ Qᵀ + V T Vᵀ: known eigenpairs, and a Krylov space in their complement."""

    def __init__(self, deflation: Deflation, part: KrylovPart) -> None:
        self._deflation, self._part = deflation, part
        self.trace = deflation.trace + part.trace
        self.square = deflation.square + part.square

    def take_from(self, vector: Tensor, product: Tensor) -> None:
        """Turn the product with a `vector` that has no part in the pairs into that of the rest."""
        self._deflation.take_from(vector, product)
        self._part.take_from(vector, product)


class Shared:
    """What is known of the operator before the first single probe, and the samples at hand.

    The first moments of every run are a sample. Where the runs were kept, the space of the first
    one may also be taken out of all other probes, which are independent of it: then its own sample
    is lost, and the others vary less. The better one is what leaves fewer probes to come.

    Parameters
    ----------
    space
        Of the operator.
    density
        With its runs, where they were kept; None where there is none.
    deflation
        The eigenpairs that the density was deflated by.
    rtol
        Of the trace.

    Attributes
    ----------
    known
        What is taken out of every probe.
    begun
        Samples of the density's probes; None where it has none.
    krylov_vectors
        How many vectors of a Krylov space `known` holds beside the pairs.
    """

    def __init__(
        self,
        space: VectorSpace,
        density: SpectralDensity | None,
        deflation: Deflation,
        rtol: float,
    ) -> None:
        self.known: KnownPart = deflation
        self.begun: Moments | None = None
        self.krylov_vectors = 0
        if density is None or density.steps < 2:
            # A rule of one node is exact to degree 1: it knows the trace, but not the square.
            return
        self.begun = _moments_of(density, deflation)
        runs = density.runs
        if len(runs) < 2 or any(run.size < 2 or run.complete for run in runs):
            return
        part = _PairsAndKrylov(deflation, KrylovPart(space, runs[0]))
        samples = Samples(space)
        for run in runs[1:]:
            length = math.sqrt(density.remaining)
            first, second = map(space.local, run.basis[:2])
            vector = length * first
            # The first column of H V = V T, in the complement of the pairs.
            product = first * (length * run.projection[0, 0])
            product.add_(second, alpha=length * run.projection[1, 0])
            samples.add(part, vector, product)
        sharper = samples.moments(0, density.noise)
        # Student's interval of N probes has a half-width of about 2 sqrt(variance / N).
        target = self.begun.target("trace", rtol, None)
        gain = 4 * float(self.begun.variances.mean() - sharper.variances.mean())
        if gain > target**2:
            self.known, self.begun, self.krylov_vectors = part, sharper, runs[0].size


def _moments_of(density: SpectralDensity, deflation: Deflation) -> Moments:
    """Samples of trace and square that the quadrature contains: its first two moments."""
    nodes, weights = density.nodes, density.n * density.weights
    squares = (weights * nodes**2).sum(axis=1) + deflation.square
    # Twice ‖Hz − (zᵀHz / ‖z‖²) z‖², as every probe tells the variance of its own sample.
    centres = (weights * nodes).sum(axis=1, keepdims=True) / weights.sum(axis=1, keepdims=True)
    variances = 2 * (weights * (nodes - centres) ** 2).sum(axis=1)
    return Moments(density.moment_samples(1), squares, exact=False, matvecs=0, variances=variances)
