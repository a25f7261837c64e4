"""Which part of the trace can be computed, so that only the rest has to be sampled?

Three ways to find a basis Q that holds what is large in H: Lanczos steps, one product for each
vector of the basis; the range of H as random vectors show it, two products (Hutch++); the same with
each random vector used for the basis and as a probe of what the others' basis leaves (XTrace).

Precision policy: basis vectors have the operator's dtype and are orthogonalised twice, everything
projected is float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from scipy import linalg
from torch import Tensor

from spectra.algorithms.blocks import add_diagonal
from spectra.algorithms.lanczos import Krylov
from spectra.algorithms.moments import KnownPart, Moments, Nothing, Samples
from spectra.algorithms.probes import MIN_PROBES, Run, gaussian
from spectra.errors import ArgumentError
from spectra.journal import Stopped, unless_stopped
from spectra.objective.places import Place
from spectra.objective.vectors import VectorSpace

__all__ = [
    "MIN_BASIS",
    "KeptProbes",
    "KrylovPart",
    "by_hutch_pp",
    "by_krylov",
    "by_xtrace",
    "grow",
    "pays",
]

# Fewer basis vectors than this hold nothing worth their products.
MIN_BASIS = 8
# Orthogonalising all n vectors takes n³ operations: up to here, less than the products do.
_COMPLETE = 2048
# XTrace's samples share their basis, so that their spread underestimates the error: measured, by a
# factor of up to 1.26, and by up to 1.7 with fewer vectors than _MIN_SKETCH, which can miss copies
# of a multiple eigenvalue together.
_XTRACE_WIDENING = 1.3
_FEW_WIDENING = 2.0
_MIN_SKETCH = 16


class KrylovPart:
    """M = Q T Qᵀ with T = QᵀHQ: the trace of the rest is sampled without bias for any Q and T.

    Parameters
    ----------
    since
        What is to be taken from products that have M of so many Krylov vectors taken from them.
        Those have nothing to do with later ones, but for the last of them.
    """

    def __init__(self, space: VectorSpace, krylov: Krylov, since: int = 0) -> None:
        core = krylov.projection[: krylov.size, : krylov.size].copy()
        self.trace = float(np.trace(core))
        self.square = float((core**2).sum())
        first = max(since - 1, 0)
        core[:since, :since] = 0.0
        self._space = space
        self._rows = krylov.basis[first:]
        self._core = torch.from_numpy(core[first:, first:]).to(space.device)
        self.noted: list[np.ndarray] = []

    def take_from(self, vectors: Tensor, products: Tensor) -> None:
        """Turn products H z with some vectors, as rows (k, n), into (H − M) z, in place."""
        projections = self._space.projections(self._rows, vectors)
        self._space.subtract_each(products, self._rows, projections.to(self._core) @ self._core)

    def diagonal(self) -> Tensor:
        """The diagonal of M (n,)."""
        total = self._space.zeros()
        add_diagonal(self._space, total, self._rows, self._core)
        return total


def by_krylov(run: Run) -> tuple[Moments, str]:
    """Probes, with a Krylov space taken out of all of them where that is cheaper.

    The first probes tell how many the tolerance takes. Where that is many, a Krylov basis grows
    from a random direction of its own, and the first probes, kept for that, tell what it leaves.

    Returns
    -------
    tuple
        The moments, and how they were found.
    """
    if run.small:
        return run.exactly(), "n unit vectors"
    probes = _first_probes(run)
    samples = probes.samples(None)
    krylov = _basis(run, probes, run.come(_moments(run, samples)))
    known: KnownPart = Nothing()
    label = "Hutchinson"
    if krylov is not None:
        known, label = KrylovPart(run.space, krylov), f"Hutchinson, {krylov.size} Krylov vectors"
        if krylov.complete:
            return run.known(known.trace, known.square), "Lanczos basis of the whole space"
        samples = probes.samples(krylov)
    del probes
    moments = run.sample(samples, known)
    return moments, "n unit vectors" if moments.exact else label


class KeptProbes:
    """Probes with what a Krylov space that grows leaves of their products.

    Parameters
    ----------
    rows
        (2, s, n) the probes and their products, in memory of theirs: the products are changed.
    beside
        What has been taken from the products before.
    """

    def __init__(self, run: Run, rows: Tensor, beside: KnownPart | None = None) -> None:
        self._run, self._rows, self._taken = run, rows, 0
        self._beside = beside or Nothing()

    def __len__(self) -> int:
        return self._rows.shape[1]

    def samples(self, krylov: Krylov | None) -> Samples:
        """What they say, the Krylov space taken out as far as it has grown."""
        space, samples = self._run.space, Samples(self._run.space)
        new: KnownPart = Nothing()
        if krylov is not None:
            new, self._taken = KrylovPart(space, krylov, self._taken), krylov.size
        taken = _Taken(new, self._beside)
        for some in _blocks(self._run, len(self)):
            vectors, products = map(space.local, self._rows[:, some])
            new.take_from(vectors, products)
            if products.data_ptr() != self._rows[1, some].data_ptr():
                self._rows[1, some] = products
            samples.add_each(taken, vectors, products.clone())
        return samples


class _Taken(Nothing):
    """Parts that have been taken from the products already."""

    def __init__(self, *parts: KnownPart) -> None:
        super().__init__()
        self.trace = sum(part.trace for part in parts)
        self.square = sum(part.square for part in parts)


def _first_probes(run: Run) -> KeptProbes:
    """As many as an error takes, where there is room for them all."""
    rows = run.space.basis(2 * run.least).unflatten(0, (2, -1))
    for some in _blocks(run, run.least):
        rows[0, some], rows[1, some] = run.probes(some.stop - some.start)
    return KeptProbes(run, rows)


def _blocks(run: Run, count: int) -> Iterator[slice]:
    step = run.together(2 * count)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def _basis(run: Run, probes: KeptProbes, come: float) -> Krylov | None:
    """A basis from a random direction; None where there is room for none.

    Where n products are cheaper than the probes to come, it may grow to the whole space.
    """
    n, space = run.space.n, run.space
    whole = come > n <= min(run.left, _COMPLETE)
    wanted = n if whole else int(min(come / 2, run.left // 2))
    # From the disk a basis takes longer to be read than a product to be computed, and every probe
    # reads it: a shorter one then.
    place, capacity = space.place(wanted, MIN_BASIS, spare=2 * len(probes))
    if capacity < MIN_BASIS:
        return None
    krylov = Krylov(run.operator, capacity, run.generator, place=place)
    run.noise.forget()
    krylov.noise = run.noise
    grow(run, krylov, probes, come, whole=whole)
    return krylov if krylov.size else None


def grow(run: Run, krylov: Krylov, probes: KeptProbes, come: float, *, whole: bool = False) -> None:
    """Let a basis grow: no more is spent on it than on the probes that it leaves to come.

    At most half of the budget, and half of what the tolerance takes without it. A basis that does
    not pay is given up after a quarter of the products to come: not at once, because the second
    copy of a multiple eigenvalue takes many steps to appear.

    Parameters
    ----------
    come
        How many probes the tolerance takes with the basis as it is.
    whole
        It may grow to the whole space.
    """
    n = run.space.n
    run.basis = run.space.describe_basis(krylov.rows)
    paid, before = krylov.size, come
    check = max(MIN_BASIS, _next_check(krylov.size))
    while not krylov.full:
        try:
            krylov.step()
        except Stopped:
            break
        run.count()
        # An exhausted space may hold all of H already.
        if krylov.size < check and not krylov.exhausted:
            continue
        check = _next_check(krylov.size)
        come = run.come(_moments(run, probes.samples(krylov)))
        if come <= krylov.size:
            break
        if pays(run, krylov.size - paid, before, come):
            paid, before = krylov.size, come
            continue
        in_vain = krylov.size - paid > min(come, run.left) / 4
        if in_vain and not (whole and come > n - krylov.size):
            break


def pays(run: Run, vectors: int, before: float, come: float) -> bool:
    """Whether so many vectors of a basis saved more probes than they took products.

    Those at hand are redone with every basis, and so count for nothing in the comparison.
    """
    return come < before * (1 - vectors / max(min(come, run.left), 1))


def _next_check(size: int) -> int:
    return size + max(2, size // 8)


def by_hutch_pp(run: Run) -> tuple[Moments, str]:
    """A third of the products for the range of H, a third for H on it, a third for probes.

    All three grow together, a quarter at a time.

    Returns
    -------
    tuple
        The moments, and how they were found.
    """
    if run.small:
        return run.exactly(), "n unit vectors"
    n, budget = run.space.n, run.stop.max_matvecs
    # Two probes at least, or nothing would tell the error.
    wanted = min(budget // 3, (budget - 2) // 2, n)
    # As much again for what is made of the basis, and twice for the probes.
    place, fitting = run.space.place(4 * wanted, 2 * wanted)
    capacity = fitting // 4
    basis = _Range(run, capacity, place)
    block = min(MIN_PROBES, capacity)
    while True:
        if not basis.grow(block):
            moments = run.known(basis.trace, basis.square)
            return moments, f"Hutch++, whole range of rank {basis.size}"
        basis.probe(min(block or 1, run.left))
        samples = basis.samples()
        come = run.come(_moments(run, samples))
        if len(samples) >= run.least and come == 0:
            break
        if come > n / 2 and n / 2 <= run.spent <= budget - n:
            return run.exactly(), "n unit vectors"
        block = min(max(2, basis.size // 4), run.left // 3, capacity - basis.size)
        if block < 1:
            break
    moments = run.sample(samples, basis, basis.rows)
    return moments, "n unit vectors" if moments.exact else f"Hutch++, {basis.size} sketch vectors"


class _Range:
    """An orthonormal basis Q of the range of H as random vectors show it, and probes beside it.

    What is known is QQᵀH + HQQᵀ − QQᵀHQQᵀ, what is left is H in the complement of Q. The probes are
    kept there: when Q grows by q, H(I − qqᵀ)z = Hz − (Hq) qᵀz takes no product beyond Hq.
    """

    def __init__(self, run: Run, capacity: int, place: Place | None = None) -> None:
        self._run = run
        self._space = run.space
        self._place = place
        self._rows = run.space.basis(capacity, place)
        self._probes: list[Tensor] = []
        run.basis = run.space.describe_basis(self._rows)
        self.size = 0
        self.trace = 0.0
        self.square = 0.0
        self.noted: list[np.ndarray] = []

    @property
    def rows(self) -> Tensor:
        """Q as orthonormal rows (size, n)."""
        return self._rows[: self.size]

    def grow(self, count: int) -> bool:
        """More basis vectors, two products each: False if Q holds the whole range without them."""
        run, space, first = self._run, self._space, self.size
        images = space.basis(count, self._place)
        for image in images:
            # Gaussian: its product lies in the span of Q only if all products do.
            _, rest = _outside(run, self.rows, run.apply(gaussian(space, run.generator)))
            if rest is None:
                return False
            self._rows[self.size] = rest
            self.size += 1
            product = run.apply(rest)
            column = space.project(self.rows, product).cpu().numpy()
            inside = 2 * float((column**2).sum()) - float(column[-1]) ** 2
            self.trace += float(column[-1])
            self.square += 2 * space.norm(product) ** 2 - inside
            image.copy_(product)
        for image in images:
            product = space.local(image)
            space.remove(product, self.rows)
            image.copy_(product)
        fresh = self.rows[first:]
        for kept in self._probes:
            vector, product = map(space.local, kept)
            space.subtract(product, images, space.project(fresh, vector))
            for row, each in zip(kept, (vector, product), strict=True):
                space.remove(each, fresh)
                row.copy_(each)
        return True

    def probe(self, count: int) -> None:
        """More probes in the complement of Q, kept with their products."""
        for _ in range(count):
            vectors, products = self._run.probes(1, self.rows)
            self.take_from(vectors, products)
            kept = self._space.basis(2, self._place)
            kept[0], kept[1] = vectors[0], products[0]
            self._probes.append(kept)

    def take_from(self, vectors: Tensor, products: Tensor) -> None:
        """Take Q out of products with vectors in its complement, in place."""
        del vectors
        for product in products:
            self._space.remove(product, self.rows)

    def samples(self) -> Samples:
        """What the probes kept so far say, at the length of those drawn anew."""
        samples = Samples(self._space)
        for kept in self._probes:
            vector, product = map(self._space.local, kept)
            scale = math.sqrt(self._space.n - self.size) / self._space.norm(vector)
            samples.add(self, vector * scale, product * scale)
        return samples


def by_xtrace(run: Run) -> tuple[Moments, str]:
    """XTrace, resphered: two products for every random vector.

    Returns
    -------
    tuple
        The moments, and how they were found.

    Raises
    ------
    ArgumentError
        The budget is for one random vector only.
    """
    if run.stop.max_matvecs < 4:
        msg = f"max_matvecs={run.stop.max_matvecs}; XTrace needs 2 products for each of 2 vectors"
        raise ArgumentError(msg)
    if run.small:
        return run.exactly(), "n unit vectors"
    n = run.space.n
    wanted = min(run.stop.max_matvecs // 2, n)
    place, fitting = run.space.place(2 * wanted, wanted)
    sketch = _Sketch(run, fitting // 2, place)
    check = _MIN_SKETCH
    while True:
        try:
            grown = sketch.grow()
        except Stopped:
            if sketch.size < 2:
                raise
            return sketch.moments(), "XTrace"
        if not grown or sketch.size == n:
            core = sketch.core
            moments = run.known(float(np.trace(core)), float((core**2).sum()))
            return moments, f"XTrace, whole range of rank {len(core)}"
        finished = sketch.full or run.left < 2
        if sketch.size < check and not finished:
            continue
        moments = sketch.moments()
        if run.come(moments, products=2) == 0 or finished:
            return moments, "XTrace"
        if n / 2 <= run.spent <= run.stop.max_matvecs - n:
            exact = unless_stopped(run.exactly)
            return (moments, "XTrace") if exact is None else (exact, "n unit vectors")
        check = sketch.size + max(2, sketch.size // 8)


class _Sketch:
    """Y = HΩ = QR as it grows, and the leave-one-out samples of the trace that it contains.

    Nothing of HQ is kept but QᵀHQ: what else XTrace needs, ΩᵀHQ, is Rᵀ for a symmetric H.
    """

    def __init__(self, run: Run, capacity: int, place: Place | None = None) -> None:
        self._run = run
        self._vectors = run.space.basis(capacity, place)
        self._basis = run.space.basis(capacity, place)
        run.basis = run.space.describe_basis(self._basis)
        self._triangle = np.zeros((capacity, capacity))
        self._core = np.zeros((capacity, capacity))
        self._overlaps = np.zeros((capacity, capacity))
        self.size = 0

    @property
    def full(self) -> bool:
        """No further vector fits."""
        return self.size == len(self._basis)

    @property
    def core(self) -> np.ndarray:
        """QᵀHQ."""
        return self._core[: self.size, : self.size]

    def grow(self) -> bool:
        """One more random vector: False, and one product only, if Q holds the whole range."""
        run, k = self._run, self.size
        vector, product = run.probe()
        coefficients, rest = _outside(run, self._basis[:k], product)
        if rest is None:
            return False
        self._vectors[k], self._basis[k] = vector, rest
        vectors, basis = self._vectors[: k + 1], self._basis[: k + 1]
        self._triangle[: k + 1, k] = coefficients
        column = run.space.project(basis, run.apply(rest)).cpu().numpy()
        self._core[: k + 1, k] = self._core[k, : k + 1] = column
        self._overlaps[: k + 1, k] = run.space.project(basis, vector).cpu().numpy()
        self._overlaps[k, : k + 1] = run.space.project(vectors, rest).cpu().numpy()
        self.size = k + 1
        return True

    def moments(self) -> Moments:
        """One sample of the trace for each random vector.

        Leaving ω out takes the direction Q s from the basis, s being a row of R⁻¹ at unit length.
        With x = (I − s sᵀ) Qᵀω the sample is the trace of H on what is left of the basis, and
        ωᵀHω − 2 ωᵀHQx + xᵀQᵀHQx in its complement, scaled to what a probe uniform on the sphere
        there would have.
        """
        k, n = self.size, self._run.space.n
        triangle, core, w = self._triangle[:k, :k], self.core, self._overlaps[:k, :k]
        inverse = linalg.solve_triangular(triangle, np.eye(k))
        s = (inverse / np.linalg.norm(inverse, axis=1, keepdims=True)).T
        along = (s * w).sum(axis=0)
        x = w - s * along
        outside = (x * (core @ x)).sum(axis=0) + (triangle * (w - 2 * x)).sum(axis=0)
        scale = (n - k + 1) / (n - (x * x).sum(axis=0))
        traces = np.trace(core) - (s * (core @ s)).sum(axis=0) + scale * outside
        return Moments(
            traces,
            (triangle**2).sum(axis=0),
            exact=False,
            matvecs=self._run.spent,
            widening=_XTRACE_WIDENING if k >= _MIN_SKETCH else _FEW_WIDENING,
            noise=self._run.noise.relative,
        )


def _outside(run: Run, rows: Tensor, product: Tensor) -> tuple[np.ndarray, Tensor | None]:
    """What of a product no row holds, at unit length: None if that is but rounding.

    The product is overwritten. Also its coefficients in terms of the rows and the new one.
    """
    space, length = run.space, run.space.norm(product)
    coefficients = np.zeros(len(rows) + 1)
    for _ in range(2):
        part = space.project(rows, product)
        space.subtract(product, rows, part)
        coefficients[:-1] += part.cpu().numpy()
    coefficients[-1] = rest = space.norm(product)
    if rest <= 10 * space.eps * length or len(rows) == space.n:
        return coefficients, None
    return coefficients, product.div_(rest)


def _moments(run: Run, samples: Samples) -> Moments:
    return samples.moments(run.spent, run.noise.relative)
