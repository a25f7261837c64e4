"""What of the density's Lanczos runs serves the trace and the Frobenius norm, and these the layers?

Trace and norm come from random probes, and each of them also tells how the trace is shared among
the parameters.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from spectra.algorithms.blocks import BlockTraces, has_modules, inner_by_parameter
from spectra.algorithms.density import SpectralDensity
from spectra.algorithms.estimate import Estimate
from spectra.algorithms.lanczos import Krylov
from spectra.algorithms.moments import KnownPart, Moments, Samples
from spectra.algorithms.probes import Deflation, Run
from spectra.algorithms.sketch import MIN_BASIS, KeptProbes, KrylovPart, grow, pays
from spectra.objective.vectors import VectorSpace

__all__ = ["Shared"]

# Fewer probes tell nothing about their own spread.
_MIN_PROBES = 5


class _Known:
    """Q Θ Qᵀ + V T Vᵀ: known eigenpairs, and perhaps a Krylov space in their complement.

    Every probe that they are taken out of also tells the diagonal. With H Q = Q Θ + R and
    P = I − QQᵀ, H = Q Θ Qᵀ + QRᵀ + RQᵀ + PHP. For a probe z in the complement of Q, z ∘ PHz has the
    mean diag(PHP) and z ∘ QQᵀHz that of QRᵀ: without the latter, twice, pairs that have not
    converged would bias every block, if not the trace. V T Vᵀ is taken out of z ∘ PHz and its own
    diagonal added, which is right for any T.
    """

    def __init__(
        self, space: VectorSpace, deflation: Deflation, part: KrylovPart | None = None
    ) -> None:
        self._space, self._deflation, self._part = space, deflation, part
        self.trace, self.square = deflation.trace, deflation.square
        rows = [inner_by_parameter(space, row, row) for row in deflation.basis]
        self.masses = np.array(rows)
        self.parameter_traces = deflation.values @ self.masses
        if part is not None:
            self.trace, self.square = self.trace + part.trace, self.square + part.square
            if has_modules(space):
                self.parameter_traces += space.sums_by_parameter(part.diagonal())
        self.noted: list[np.ndarray] = []

    def take_from(self, vectors: Tensor, products: Tensor) -> None:
        """Turn products with vectors that have no part in the pairs into those of the rest."""
        whole = self._by_parameter(vectors, products)
        self._deflation.take_from(vectors, products)
        outside = rest = self._by_parameter(vectors, products)
        if self._part is not None:
            self._part.take_from(vectors, products)
            rest = self._by_parameter(vectors, products)
        self.noted.extend(self.parameter_traces + 2 * (whole - outside) + rest)

    def _by_parameter(self, vectors: Tensor, products: Tensor) -> np.ndarray:
        """(k, parameters): how each zᵀHz is shared among them."""
        pairs = zip(vectors, products, strict=True)
        return np.array([inner_by_parameter(self._space, *pair) for pair in pairs])


class Shared:
    """What is known of the operator before the first single probe, and the samples at hand.

    The first moments of every run are a sample. Where the runs were kept, the space of the first
    one may also be taken out of all other probes, which are independent of it: then its own sample
    is lost, and the others vary less. The better one is what leaves fewer probes to come. Where
    that space saves more probes than it has vectors, more of them may still pay: it grows.

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
        self._space, self._deflation = space, deflation
        self.known = _Known(space, deflation)
        self.begun: Moments | None = None
        self.krylov_vectors = 0
        self._density, self._runs = density, () if density is None else density.runs
        # Probes, by the Krylov vectors at hand.
        self._saved = 0.0
        if density is None:
            return
        self.known.noted += [self.known.parameter_traces + s for s in density.parameter_traces]
        if density.steps < 2:
            # A rule of one node is exact to degree 1: it knows the trace, but not the square.
            return
        self.begun = _moments_of(density, deflation)
        if len(self._runs) < 2 or any(run.size < 2 or run.complete for run in self._runs):
            return
        part, sharper = self._taking_out(self._runs[0])
        # Student's interval of N probes has a half-width of about 2 sqrt(variance / N).
        target = self.begun.target("trace", rtol, None)
        gain = 4 * float(self.begun.variances.mean() - sharper.variances.mean())
        if gain > target**2:
            self._use(self._runs[0], part, sharper)
            self._saved = gain / target**2

    def prepare(self, run: Run) -> tuple[Moments | None, KnownPart]:
        """Samples to begin with, and what is known: more of a Krylov space where that pays."""
        if self.krylov_vectors:
            assert self.begun is not None
            come = run.come(self.begun)
            if pays(run, self.krylov_vectors, come + self._saved, come):
                self._grow(run, come)
        return self.begun, self.known

    def _grow(self, run: Run, come: float) -> None:
        size, others = self.krylov_vectors, self._runs[1:]
        # A space of more than half the dimension is hardly cheaper than n unit vectors, which tell
        # the blocks exactly, too.
        wanted = min(size + int(min(come, run.left) / 2), self._space.n // 2)
        place, capacity = self._space.place(wanted, size + MIN_BASIS, spare=2 * len(others))
        if capacity < size + MIN_BASIS:
            return
        rows = self._space.basis(2 * len(others)).unflatten(0, (2, -1))
        for i, other in enumerate(others):
            rows[0, i], rows[1, i] = self._probe(other)
        probes = KeptProbes(run, rows, self._deflation)
        krylov = self._runs[0].extended(run.operator, capacity, place)
        probes.samples(krylov)
        grow(run, krylov, probes, come)
        self._use(krylov, *self._taking_out(krylov))

    def _use(self, krylov: Krylov, known: _Known, samples: Moments) -> None:
        self.known, self.begun, self.krylov_vectors = known, samples, krylov.size

    def _taking_out(self, krylov: Krylov) -> tuple[_Known, Moments]:
        """What is known with a Krylov space of the first run, and the other runs' samples."""
        space, density = self._space, self._density
        assert density is not None
        part = _Known(space, self._deflation, KrylovPart(space, krylov))
        samples = Samples(space)
        for i, run in enumerate(self._runs[1:], start=1):
            vector, product = self._probe(run)
            outside = inner_by_parameter(space, vector, product)
            samples.add(part, vector, product)
            if has_modules(space):
                # What the run took out of the product before, as the density has it.
                part.noted[-1] += density.parameter_traces[i] - outside
        return part, samples.moments(0, density.noise)

    def _probe(self, run: Krylov) -> tuple[Tensor, Tensor]:
        """The probe that a run began with, and its product in the complement of the pairs."""
        length = math.sqrt(self._space.n - len(self._deflation))
        first, second = map(self._space.local, run.basis[:2])
        # The first column of H V = V T.
        product = first * (length * run.projection[0, 0])
        product.add_(second, alpha=length * run.projection[1, 0])
        return length * first, product

    def block_traces(self, moments: Moments, trace: Estimate) -> BlockTraces | None:
        """How the trace is shared among parameters; `moments` are the last ones.

        None where the operator has but one module, and where the nodes of a density that spans the
        whole space told the trace without a probe.
        """
        space, known = self._space, self.known
        if not has_modules(space):
            return None
        samples, method = known.noted, trace.method
        if moments.exact:
            method = "n unit vectors" if len(moments.diagonal) else "all known eigenpairs"
            samples = [known.parameter_traces]
            if len(moments.diagonal):
                whole = torch.from_numpy(moments.diagonal).to(space.device)
                samples = [space.sums_by_parameter(space.own(whole))]
        if not samples:
            return None
        notes = []
        if not moments.exact and len(samples) < _MIN_PROBES:
            notes = [f"{len(samples)} probes are too few to rely on their spread"]
        return BlockTraces(
            parameters=space.names,
            sizes=space.sizes,
            parameter_traces=np.stack(samples),
            exact=moments.exact,
            eigenvalues=self._deflation.values,
            masses=known.masses,
            confidence=trace.confidence,
            converged=trace.converged,
            method=method,
            matvecs=moments.matvecs,
            noise=trace.noise,
            floor=trace.floor,
            notes=tuple(notes),
            provenance=trace.provenance,
        )


def _moments_of(density: SpectralDensity, deflation: Deflation) -> Moments:
    """Samples of trace and square that the quadrature contains: its first two moments."""
    nodes, weights = density.nodes, density.n * density.weights
    squares = (weights * nodes**2).sum(axis=1) + deflation.square
    # Twice ‖Hz − (zᵀHz / ‖z‖²) z‖², as every probe tells the variance of its own sample.
    centres = (weights * nodes).sum(axis=1, keepdims=True) / weights.sum(axis=1, keepdims=True)
    variances = 2 * (weights * (nodes - centres) ** 2).sum(axis=1)
    return Moments(density.moment_samples(1), squares, exact=False, matvecs=0, variances=variances)
