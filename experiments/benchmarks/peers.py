"""How is each package used, by its own documentation? One small adapter per contestant.

An adapter is a function of a workload that returns `Tools`: a product, and where the package has
them the largest eigenpairs, the trace and the density. What only a caller can set (a tolerance, a
number of products) is a list of settings, from the package's default upwards: the benchmark takes
the first that gets the answer right, which favours the package, whose user could not know it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

import spectra
from experiments.benchmarks.workloads import Batch, Missing, Told, Workload

Pairs = tuple[np.ndarray, Tensor]  # values (k,), vectors (n, k)
Measure = tuple[np.ndarray, np.ndarray]  # nodes and their masses, or a curve's points and steps
Make = Callable[[Workload], "Tools"]


def spectra_with(**options: Any) -> Make:
    """`HessianOperator` with these options."""

    def make(w: Workload) -> Tools:
        loss = spectra.losses.supervised(w.criterion)
        h = spectra.HessianOperator(w.model, loss, w.batches, **options)

        def top(k: int, tol: float, seed: int) -> Pairs:
            found = spectra.eigsh(h, k, tol=tol, seed=seed, progress=False)
            return found.values, torch.as_tensor(found.vectors)

        def trace(rtol: float, seed: int) -> float:
            return spectra.trace(h, rtol=rtol, max_matvecs=5000, seed=seed, progress=False).value

        def density(products: int, seed: int) -> Measure:
            pairs = spectra.eigsh(h, 10, seed=seed, progress=False)
            steps = max(2, (products - pairs.matvecs) // 2)
            found = spectra.spectral_density(
                h, steps=steps, probes=2, deflate=pairs, seed=seed, progress=False
            )
            masses = (found.weights / found.probes).ravel()
            atoms = np.full(len(found.atoms), 1 / found.n)
            nodes = np.concatenate([found.nodes.ravel(), found.atoms])
            return nodes, np.concatenate([masses, atoms])

        def analysis(seed: int, probes: int = 5000) -> Any:
            return spectra.analyze(h, 10, rtol=0.01, max_matvecs=probes, seed=seed, progress=False)

        return Tools(
            lambda v: h @ v,
            top=top,
            tolerances=[1e-3],
            trace=trace,
            # A tolerance holds in 95 of 100 runs; asked for is three of three, beside an estimate.
            trace_settings=[0.01, 0.008, 0.006],
            density=density,
            analysis=analysis,
            count=lambda: h.matvecs,
        )

    return make


def plain_fresh(w: Workload) -> Tools:
    """What one writes by hand: the gradient's graph is built anew for every product."""

    def product(v: Tensor) -> Tensor:
        pieces, total = w.split(v), None
        for batch, share in zip(w.batches, w.shares, strict=True):
            grads = torch.autograd.grad(share * w.loss(batch), w.params, create_graph=True)
            total = added(total, torch.autograd.grad(grads, w.params, pieces))
        return flat(total)

    return Tools(product)


def plain_retained(w: Workload) -> Tools:
    """What one writes by hand, keeping the graphs of the gradients of all batches."""
    grads = [
        torch.autograd.grad(share * w.loss(batch), w.params, create_graph=True)
        for batch, share in zip(w.batches, w.shares, strict=True)
    ]

    def product(v: Tensor) -> Tensor:
        pieces, total = w.split(v), None
        for some in grads:
            total = added(total, torch.autograd.grad(some, w.params, pieces, retain_graph=True))
        return flat(total)

    return Tools(product)


def plain_gradient(w: Workload) -> Tools:
    """One plain gradient, which is what everything is measured in. No product, for `memory`."""
    return Tools(lambda _: gradient(w))


def gradient(w: Workload) -> Tensor:
    """Of the mean over all samples, as an optimizer's step has it."""
    total = None
    for batch, share in zip(w.batches, w.shares, strict=True):
        total = added(total, torch.autograd.grad(share * w.loss(batch), w.params))
    return flat(total)


def curvlinops(w: Workload) -> Tools:
    """Without its check of determinism, which would cost two products and four gradients more."""
    need("curvlinops")
    from curvlinops import HessianLinearOperator, hutchpp_trace, lanczos_approximate_spectrum
    from scipy.sparse.linalg import eigsh

    h = HessianLinearOperator(w.model, w.criterion, w.params, w.batches, check_deterministic=False)
    counter = Counter()
    h._matmat = counter.of(h._matmat, lambda matrix: matrix[0].shape[-1])

    def top(k: int, tol: float, seed: int) -> Pairs:
        start = np.random.default_rng(seed).normal(size=w.n)
        values, vectors = eigsh(h.to_scipy(), k=k, tol=tol, v0=start)
        return values, torch.from_numpy(vectors)

    def trace(products: int, seed: int) -> float:
        torch.manual_seed(seed)
        return float(hutchpp_trace(h, num_matvecs=products))

    def density(products: int, seed: int) -> Measure:
        torch.manual_seed(seed)
        # It finds the ends of the spectrum first, by ARPACK; about thirty products.
        grid, curve = lanczos_approximate_spectrum(h, ncv=max(2, products - 30))
        return grid.numpy(), (curve * (grid[1] - grid[0])).numpy()

    return Tools(
        lambda v: h @ v,
        top=top,
        tolerances=[1e-3, 1e-4, 1e-5],
        trace=trace,
        trace_settings=[15, 30, 60, 120, 240, 480, 960],
        density=density,
        count=counter.get,
    )


def hessian_eigenthings(w: Workload) -> Tools:
    """With the autograd product, which is its default."""
    need("hessian_eigenthings")
    import hessian_eigenthings as het

    h = het.HessianOperator(w.model, w.batches, het.supervised_loss(w.criterion))
    counter = Counter()
    h.matvec = counter.of(h.matvec)

    def top(k: int, steps: int, seed: int) -> Pairs:
        found = het.lanczos(h, k=k, max_iter=min(steps * k, w.n - 1), seed=seed)
        return found.eigenvalues.numpy().astype(float), found.eigenvectors.T

    def trace(products: int, seed: int) -> float:
        return het.trace(h, num_matvecs=products, seed=seed).estimate

    def density(products: int, seed: int) -> Measure:
        found = het.spectral_density(h, num_runs=2, lanczos_steps=products // 2, seed=seed)
        return found.raw_eigenvalues.numpy().ravel(), found.raw_weights.numpy().ravel() / 2

    return Tools(
        h.matvec,
        top=top,
        tolerances=[2, 4, 8, 16, 32],
        trace=trace,
        trace_settings=[15, 30, 60, 120, 240, 480, 960],
        density=density,
        count=counter.get,
    )


def pyhessian(w: Workload) -> Tools:
    """One batch as `data`, whose graph it keeps; several as `dataloader`."""
    need("pyhessian")
    # The package has a class of the module's name, which hides the module.
    module = import_module("pyhessian.hessian")
    w.clean()  # It adds to what is in `.grad`.
    data = {"dataloader": w.batches} if w.many else {"data": w.batches[0]}
    h = module.hessian(w.model, w.criterion, cuda=False, **data)
    counter = Counter()
    h.dataloader_hv_product = counter.of(h.dataloader_hv_product)

    def one_batch(v: list[Tensor]) -> Sequence[Tensor]:
        return module.hessian_vector_product(h.gradsH, h.params, v)

    def product(v: Tensor) -> Tensor:
        pieces = w.split(v)
        return flat(h.dataloader_hv_product(pieces)[1] if w.many else one_batch(pieces))

    def top(k: int, setting: tuple[float, int], seed: int) -> Pairs:
        torch.manual_seed(seed)
        values, vectors = h.eigenvalues(tol=setting[0], maxIter=setting[1], top_n=k)
        return np.array(values), torch.stack([flat(v) for v in vectors], dim=1)

    def trace(setting: tuple[float, int], seed: int) -> float:
        torch.manual_seed(seed)
        return float(np.mean(h.trace(tol=setting[0], maxIter=setting[1])))

    def density(products: int, seed: int) -> Measure:
        torch.manual_seed(seed)
        nodes, weights = h.density(iter=products // 2, n_v=2)
        return np.ravel(nodes), np.ravel(weights) / 2

    return Tools(
        product,
        top=top,
        tolerances=POWER_ITERATIONS,
        trace=trace,
        trace_settings=STOPPING_RULES,
        density=density,
        close=w.clean,
        count=counter.get if w.many else None,
    )


def landscaper_with(*, cached: bool) -> Make:
    """Its copy of PyHessian; `try_cache` keeps the graphs of all batches."""

    def make(w: Workload) -> Tools:
        need("landscaper")
        from landscaper import PyHessian

        h = PyHessian(w.model, w.criterion, w.batches, device="cpu", try_cache=cached)
        counter = Counter()
        h.hv_product = counter.of(h.hv_product)

        def top(k: int, setting: tuple[float, int], seed: int) -> Pairs:
            torch.manual_seed(seed)
            values, vectors = h.eigenvalues(tol=setting[0], maxIter=setting[1], top_n=k)
            return np.array(values), torch.stack([flat(v) for v in vectors], dim=1)

        def trace(setting: tuple[float, int], seed: int) -> float:
            torch.manual_seed(seed)
            return float(h.trace(tol=setting[0], maxIter=setting[1]))

        def density(products: int, seed: int) -> Measure:
            torch.manual_seed(seed)
            nodes, weights = (np.asarray(x) for x in h.density(iter=products // 2, n_v=2))
            if nodes.shape != weights.shape:
                raise Wrong(f"weights {weights.shape} for nodes {nodes.shape}: none per node")
            return nodes.real.ravel(), weights.real.ravel() / 2

        return Tools(
            lambda v: flat(h.hv_product(w.split(v))[1]),
            top=top,
            tolerances=POWER_ITERATIONS,
            trace=trace,
            trace_settings=STOPPING_RULES,
            density=density,
            count=counter.get,
        )

    return make


def backpack_with(*, retained: bool) -> Make:
    """`hessian_vector_product` of one loss; the sum over batches is the caller's."""

    def make(w: Workload) -> Tools:
        need("backpack")
        from backpack.hessianfree.hvp import hessian_vector_product

        def with_gradients(batch: Batch) -> tuple[Tensor, tuple[Tensor, ...]]:
            loss = w.loss(batch)
            return loss, torch.autograd.grad(loss, w.params, create_graph=True)

        kept = [with_gradients(batch) for batch in w.batches] if retained else None

        def product(v: Tensor) -> Tensor:
            pieces, total = w.split(v), None
            for i, (batch, share) in enumerate(zip(w.batches, w.shares, strict=True)):
                loss, grads = kept[i] if kept else (w.loss(batch), None)
                part = hessian_vector_product(loss, w.params, pieces, grad_params=grads)
                total = added(total, [share * p for p in part])
            return flat(total)

        return Tools(product)

    return make


# (tolerance, most iterations per eigenvalue); the first is the default.
POWER_ITERATIONS = [(1e-3, 100), (1e-5, 1000), (1e-7, 10_000)]
# (change of the mean that counts as convergence, most probes); the first is the default.
STOPPING_RULES = [(1e-3, 100), (1e-4, 1000), (1e-5, 10_000)]

CONTESTANTS: dict[str, Make] = {
    "spectra": spectra_with(),
    "spectra, fresh": spectra_with(graph="fresh"),
    "spectra, retained": spectra_with(graph="retained"),
    "plain, graph rebuilt": plain_fresh,
    "plain, graph retained": plain_retained,
    "curvlinops": curvlinops,
    "hessian-eigenthings": hessian_eigenthings,
    "PyHessian": pyhessian,
    "landscaper": landscaper_with(cached=False),
    "landscaper, cached": landscaper_with(cached=True),
    "BackPACK": backpack_with(retained=False),
    "BackPACK, graph retained": backpack_with(retained=True),
}
# Of a package with several rows, the one that answers the longer questions.
SOLVERS = ["spectra", "curvlinops", "hessian-eigenthings", "PyHessian", "landscaper, cached"]

# Distributions, for the record of versions.
DISTRIBUTIONS = [
    "hessian-spectra",
    "torch",
    "numpy",
    "scipy",
    "curvlinops-for-pytorch",
    "hessian-eigenthings",
    "pyhessian",
    "landscaper",
    "backpack-for-pytorch",
    "transformers",
]


def need(module: str) -> None:
    """Raise if a package is not there."""
    if find_spec(module) is None:
        raise Missing(f"{module} is not installed")


def added(total: list[Tensor] | None, parts: Sequence[Tensor]) -> list[Tensor]:
    """Sum over batches, in place after the first."""
    if total is None:
        return list(parts)
    for one, other in zip(total, parts, strict=True):
        one.add_(other)
    return total


def flat(pieces: Sequence[Tensor] | None) -> Tensor:
    """One vector (n,)."""
    assert pieces is not None
    return torch.cat([piece.detach().reshape(-1) for piece in pieces])


@dataclass
class Tools:
    """What a contestant offers; None for what it does not."""

    hvp: Callable[[Tensor], Tensor]
    top: Callable[[int, Any, int], Pairs] | None = None  # (k, setting, seed)
    tolerances: list[Any] = field(default_factory=list)
    trace: Callable[[Any, int], float] | None = None  # (setting, seed)
    trace_settings: list[Any] = field(default_factory=list)
    density: Callable[[int, int], Measure] | None = None  # (products, seed)
    analysis: Callable[..., Any] | None = None  # of a seed, and the most probes for the trace
    count: Callable[[], int] | None = None  # products so far, where they can be counted
    close: Callable[[], None] = lambda: None


class Wrong(Told):
    """The answer is of no use."""


class Counter:
    """Counts the products of a method."""

    def __init__(self) -> None:
        self.total = 0

    def get(self) -> int:
        return self.total

    def of(
        self, method: Callable[..., Any], columns: Callable[[Any], int] = lambda _: 1
    ) -> Callable[..., Any]:
        def counted(v: Any) -> Any:
            self.total += columns(v)
            return method(v)

        return counted
