"""Which random vectors, and how many of them?

Randomness comes from one explicitly seeded generator per call, drawn on the CPU, so that the same
seed gives the same vectors on every device; the global random state is neither read nor written.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spectra.algorithms.moments import (
    KnownPart,
    Moment,
    Moments,
    Nothing,
    Samples,
    Stop,
    check_tolerances,
)
from spectra.algorithms.noise import Noise, most_noise
from spectra.algorithms.progress import progress_bar
from spectra.distributed.collectives import Ranks
from spectra.errors import ArgumentError, ArgumentTypeError
from spectra.journal import Stopped, current, remember
from spectra.objective.vectors import VectorSpace
from spectra.operators.base import SymmetricOperator
from spectra.operators.transforms import refuse_scaled

__all__ = [
    "MIN_PROBES",
    "SMALL",
    "Deflation",
    "Moments",
    "Run",
    "check_tolerances",
    "gaussian",
    "sample_moments",
    "seeded",
    "sphere",
]

# Fewer probes tell nothing about their own spread.
MIN_PROBES = 5
# The spread of squares tells their error less well: they are more skewed, and each by itself tells
# nothing of its variance.
MIN_PROBES_OF_SQUARE = 8
# Probes multiplied together. Where graphs are built anew, four products in one pass over the data
# cost what three cost one by one; more would save little, and take memory and time to stop.
_TOGETHER = 4
# Vectors there has to be room for with each: where memory is short they are multiplied one by one.
_VECTORS_EACH = 8
# Up to this n, products with all unit vectors are cheaper than any estimate.
SMALL = 32


def seeded(seed: int) -> torch.Generator:
    """A generator that starts at `seed`.

    Raises
    ------
    ArgumentError
        The seed is no integer, or negative.
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**64:
        msg = f"seed={seed!r}; expected an integer >= 0 (and below 2**64)"
        raise ArgumentError(msg)
    return torch.Generator("cpu").manual_seed(int(seed))


def gaussian(space: VectorSpace, generator: torch.Generator) -> Tensor:
    """A vector (n,) of independent standard normal entries."""
    # The program's default device may be another one than the generator's.
    return space.drawn(
        lambda count: torch.randn(count, generator=generator, dtype=space.dtype, device="cpu")
    )


def sphere(
    space: VectorSpace, generator: torch.Generator, orthogonal_to: Tensor | None = None
) -> Tensor:
    """A unit vector (n,), uniform on the sphere, or on the part of it orthogonal to given rows.

    Parameters
    ----------
    orthogonal_to
        Orthonormal rows (r, n), r < n.
    """
    vector = gaussian(space, generator)
    if orthogonal_to is None:
        return vector.div_(space.norm(vector))
    return vector.div_(space.remove(vector, orthogonal_to).left)


class Deflation:
    """Known eigenpairs to be taken out of probes.

    Attributes
    ----------
    basis
        (r, n) orthonormal rows: the pairs' own, wherever these are kept.
    values
        (r,) float64 their Rayleigh quotients.
    trace
        The sum of those.
    square
        What they contribute to the squared Frobenius norm, their residuals included.
    most_noise
        The most noise of the products that their residuals leave room for.
    """

    def __init__(self, operator: SymmetricOperator, pairs: Any) -> None:
        if not all(hasattr(pairs, name) for name in ("values", "vectors", "residuals")):
            msg = f"deflate takes the Eigenpairs that eigsh returned, got a {type(pairs).__name__}"
            raise ArgumentTypeError(msg)
        refuse_scaled(pairs, operator)
        vectors, space = pairs.vectors, operator.space
        # Transposed first: the columns of Eigenpairs are rows in memory, and nothing is copied.
        rows = (
            vectors.T if isinstance(vectors, Tensor) else space.own(operator.from_numpy(vectors.T))
        )
        if rows.shape[1] != space.length:
            msg = (
                f"deflate holds eigenvectors of length {rows.shape[1]}, the operator has "
                f"n = {space.length}; pass the result of eigsh on the same operator"
            )
            raise ArgumentError(msg)
        self.basis = space.held(rows)
        if (defect := space.defect(self.basis)) > space.eps**0.5:
            msg = (
                "deflate holds vectors that are not orthonormal: their Gram matrix is off by "
                f"{defect:.2g}"
            )
            raise ArgumentError(msg)
        self._space = space
        self.values = np.asarray(pairs.values, dtype=np.float64)
        self._residuals = np.asarray(pairs.residuals, dtype=np.float64)
        self.trace = float(self.values.sum())
        rounding = space.eps * float(np.abs(self.values).max(initial=0.0))
        self.most_noise = most_noise(self.values, self._residuals, rounding)
        # H q = λ q + r puts r both above and below the diagonal of the deflated block.
        self.square = float((self.values**2).sum() + 2 * (np.asarray(pairs.residuals) ** 2).sum())
        self.noted: list[np.ndarray] = []

    def __len__(self) -> int:
        return len(self.values)

    def take_from(self, vectors: Tensor, products: Tensor) -> None:
        """Take the pairs out of products with vectors that have no part in them, in place."""
        for vector, product in zip(vectors, products, strict=True):
            length = self._space.norm(vector)
            removed = self._space.remove(product, self.basis)
            self.check(removed.parts / length, removed.before / length)

    def check(self, parts: Tensor, size: float) -> None:
        """Refuse pairs of another operator, from one product with a vector beside them all.

        For a random unit vector v in their complement qᵀHv = rᵀv is their residual's share of it;
        pairs that H does not have mix with all of v.

        Parameters
        ----------
        parts
            (r,) inner products qᵀHv.
        size
            ‖Hv‖.

        Raises
        ------
        ArgumentError
            The parts are larger than residuals and noise explain.
        """
        n = self._space.n
        own = 10 * math.sqrt(float((self._residuals**2).sum()) / n)
        noise = 0.5 * size * math.sqrt(len(self) / n)
        found = float(torch.linalg.vector_norm(parts))
        if found > own + noise:
            msg = (
                f"the eigenpairs to deflate are not those of this operator: a product mixes with "
                f"them by {found:.2g}, their residuals explain {own / 10:.2g}; pass the result of "
                "eigsh on the same operator, at the same weights and data"
            )
            raise ArgumentError(msg)


class Run:
    """One computation: its operator, its random stream, its stop, and what it has spent."""

    def __init__(self, operator: SymmetricOperator, stop: Stop, seed: int, bar: Any) -> None:
        self.operator = operator
        self.space = operator.space
        self.stop = stop
        self.generator = seeded(seed)
        self.spent = 0
        self.noise = Noise(self.space.n)
        """How unsymmetric the products are, from each probe and the one before."""
        self.loudest = math.nan
        self.basis: dict[str, Any] | None = None
        """How large the largest basis was and where, for the provenance."""
        self._bar = bar

    @property
    def noise_found(self) -> float:
        """Of the products; where several groups compute them, of those of the loudest group."""
        return self.noise.relative if self.space.probe_ranks is None else self.loudest

    @property
    def left(self) -> int:
        """Products that the budget still holds."""
        return self.stop.max_matvecs - self.spent

    @property
    def small(self) -> bool:
        """All unit vectors cost hardly more than the fewest probes."""
        return self.space.n <= min(SMALL, self.stop.max_matvecs)

    @property
    def least(self) -> int:
        """Fewest probes whose error is relied on."""
        fewest = MIN_PROBES_OF_SQUARE if self.stop.want == "square" else MIN_PROBES
        return min(fewest, self.stop.max_matvecs)

    def count(self, products: int = 1) -> None:
        """Products were computed."""
        self.spent += products
        self._bar.update(products)

    def come(self, moments: Moments, products: int = 1) -> float:
        """How many probes are to come after these, of so many products each; the bar shows both."""
        come = self.stop.probes_to_come(moments)
        self._bar.expect(self.spent + products * come)
        value, half = (
            float(moments.traces.mean()),
            moments.half_width("trace", self.stop.confidence),
        )
        if self.stop.want == "square":
            value = math.sqrt(float(moments.squares.mean()))
            half = moments.half_width("square", self.stop.confidence) / (2 * value or math.inf)
        self._bar.tell(f"{value:.4g} ± {half:.2g}")
        return come

    def apply(self, vector: Tensor) -> Tensor:
        """One product, counted."""
        product = self.operator.apply(vector)
        self.count()
        return product

    def probe(self, orthogonal_to: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """A random vector z with ‖z‖² the dimension of where it lies, and Hz."""
        vectors, products = self.probes(1, orthogonal_to)
        return vectors[0], products[0]

    def probes(self, count: int, orthogonal_to: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """So many of them, multiplied in one pass over the data: rows (count, n), and H z."""
        dimension = self.space.n - (0 if orthogonal_to is None else len(orthogonal_to))
        vectors = self.space.empty(count)
        for vector in vectors:
            drawn = sphere(self.space, self.generator, orthogonal_to)
            torch.mul(drawn, math.sqrt(dimension), out=vector)
        products = self.operator.apply(vectors.T).T
        self.count(count)
        for vector, product in zip(vectors, products, strict=True):
            self.noise.watch(self.space, vector, product)
        return vectors, products

    def together(self, come: float) -> int:
        """How many probes are best multiplied together, where so many are to come."""
        return max(1, min(self._room_for_probes, self.left, int(min(come, 2 * _TOGETHER) / 2)))

    @functools.cached_property
    def _room_for_probes(self) -> int:
        return min(_TOGETHER, self.space.affordable() // _VECTORS_EACH)

    def sample(
        self, samples: Samples, known: KnownPart, orthogonal_to: Tensor | None = None
    ) -> Moments:
        """Probe until the tolerance is met, or n unit vectors are cheaper, or nothing is left."""
        try:
            while self.left > 0:
                come = 2.0 * (self.least - len(samples))
                if come <= 0:
                    come = self.come(samples.moments(self.spent, self.noise_found))
                    if come == 0:
                        break
                    if come > self.space.n <= self.left:
                        return self.exactly()
                if self.space.probe_ranks is None:
                    self._add_samples(self.together(come), samples, known, orthogonal_to)
                else:
                    self._add_round(self.space.probe_ranks, samples, known, orthogonal_to)
        except Stopped:
            if len(samples) < 2:
                raise
        return samples.moments(self.spent, self.noise_found)

    def _add_samples(
        self,
        count: int,
        samples: Samples,
        known: KnownPart,
        orthogonal_to: Tensor | None = None,
    ) -> None:
        """More probes, of which a journal keeps the numbers only."""

        def add() -> None:
            samples.add_each(known, *self.probes(count, orthogonal_to))

        if current() is None or not self.noise.settled:
            # The first ones are compared with one another, which takes their vectors.
            add()
            return
        before, noted = len(samples), len(known.noted)

        def added() -> dict[str, Any]:
            add()
            state = self.generator.get_state()
            return {
                "samples": samples.since(before),
                "noted": known.noted[noted:],
                "generator": state,
            }

        value = remember("probes", added)
        if len(samples) == before:
            for sample in value["samples"]:
                samples.append(sample)
            known.noted += value["noted"]
            self.generator.set_state(value["generator"])
            self.count(len(value["samples"]))

    def _add_round(
        self, groups: Ranks, samples: Samples, known: KnownPart, orthogonal_to: Tensor | None
    ) -> None:
        """One more probe of every group, in the order in which one process would draw them."""
        turns, mine = min(groups.size, self.left), Samples(self.space)

        def compute() -> tuple[tuple[Any, ...], tuple[float]]:
            noted: list[Any] = []
            for turn in range(turns):
                if turn != groups.rank:
                    gaussian(self.space, self.generator)
                    continue
                begun = len(known.noted)
                mine.add(known, *self.probe(orthogonal_to))
                noted = known.noted[begun:]
                del known.noted[begun:]
            last = mine.since(len(mine) - 1)[0] if len(mine) else None
            return (last, noted), (self.noise.relative,)

        found, rows = groups.together("a round of probes", (), compute, dict)
        for sample, noted in groups.told(found)[:turns]:
            samples.append(sample)
            known.noted.extend(noted)
        self.count(turns - len(mine))
        noises = [row[0] for row in rows if not math.isnan(row[0])]
        known_before = [] if math.isnan(self.loudest) else [self.loudest]
        self.loudest = max([*known_before, *noises], default=math.nan)

    def exactly(self) -> Moments:
        """Trace and squared Frobenius norm from the n products with unit vectors."""
        space = self.space
        self._bar.expect(self.spent + space.n)
        trace = square = 0.0
        diagonal = np.zeros(space.n)
        block = max(1, self._room_for_probes)
        for start in range(0, space.n, block):
            units = torch.stack([space.unit(i) for i in range(start, min(start + block, space.n))])
            columns = self.operator.apply(units.T).T
            self.count(len(units))
            for i, column in enumerate(columns, start):
                diagonal[i] = space.entry(column, i)
                trace += diagonal[i]
                square += space.norm(column) ** 2
        return replace(self.known(float(trace), square), diagonal=diagonal)

    def known(self, trace: float, square: float) -> Moments:
        """Moments without a sampling error."""
        return Moments(
            np.array([trace]),
            np.array([square]),
            exact=True,
            matvecs=self.spent,
            noise=self.noise.relative,
        )


def sample_moments(
    operator: SymmetricOperator,
    deflation: Deflation | None,
    *,
    want: Moment,
    rtol: float,
    atol: float | None,
    confidence: float,
    max_matvecs: int,
    seed: int,
    progress: bool | None,
    begun: Moments | None = None,
    known: KnownPart | None = None,
    prepare: Callable[[Run], tuple[Moments | None, KnownPart]] | None = None,
) -> Moments:
    """Probe until the moment `want` is known to the tolerance, or the budget is spent.

    With z uniform on the sphere of radius sqrt(n - r) in the complement of r known eigenvectors,
    E zᵀHz is the complement's trace and E ‖Hz‖² its squared Frobenius norm. Not random signs: their
    samples take few values on a matrix with few off-diagonal entries, and five equal ones would
    look like certainty. Where the tolerance would take more probes than the n products that give
    the moments exactly, those are computed instead.

    Parameters
    ----------
    begun
        Samples of earlier, independent probes to go on from; `max_matvecs` counts the new ones.
    known
        What to take out of the probes, if that is more than the deflated pairs.
    prepare
        Finds both, in this run; what it spends is part of `max_matvecs`.
    """
    stop = Stop(want, rtol, atol, confidence, max_matvecs)
    name = "Frobenius norm" if want == "square" else want
    with progress_bar(name, max_matvecs, progress, at_most=True) as bar:
        run = Run(operator, stop, seed, bar)
        if deflation is not None:
            run.noise.limit = deflation.most_noise
        if deflation is not None and len(deflation) == run.space.n:
            return run.known(deflation.trace, deflation.square)
        if deflation is None and begun is None and run.small:
            return run.exactly()
        if prepare is not None:
            begun, known = prepare(run)
        samples = Samples(run.space, begun)
        if deflation is None:
            return run.sample(samples, Nothing())
        return run.sample(samples, known or deflation, deflation.basis)
