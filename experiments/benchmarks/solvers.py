"""How many Hessian-vector products do the answers take, beside peers, on spectra known exactly?

Run `python -m experiments.benchmarks.solvers` from the root of the project; it prints the tables of
README.md. Products are counted, not timed; the one table of times is of ratios within the run.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh

import spectra
from spectra.algorithms.lanczos import Krylov
from spectra.algorithms.probes import seeded
from tests.cases.matrices import Diagonal, operator, s1, s1z, s2, s3, s5, semicircle

SPECTRA = {"S1": s1, "S1z": s1z, "S2": s2, "S3": s3, "S5": s5, "semicircle": semicircle}
SEEDS = range(5)


class Counted(LinearOperator):
    """diag(values) that counts its products, for SciPy."""

    def __init__(self, values: np.ndarray) -> None:
        self.values, self.count = values, 0
        super().__init__(np.dtype(np.float64), (len(values), len(values)))

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        self.count += 1
        return self.values * x.reshape(-1)


def start(values: np.ndarray, seed: int) -> np.ndarray:
    """The same start vector for all."""
    return np.random.default_rng(seed).normal(size=len(values))


def unrestarted(values: np.ndarray, k: int, which: str, tol: float, seed: int) -> int:
    """Steps of plain Lanczos with full reorthogonalisation, tested at every step."""
    first = torch.from_numpy(start(values, seed))
    krylov = Krylov(operator(Diagonal(values)), 1000, seeded(seed), first)
    while not krylov.full:
        krylov.step()
        if krylov.size < k:
            continue
        pairs = krylov.ritz()
        chosen = slice(-k, None) if which == "LA" else slice(k)
        if (pairs.residuals[chosen] <= tol * np.abs(pairs.values[chosen])).all():
            break
    return krylov.size


def arpack(  # noqa: PLR0917
    values: np.ndarray, k: int, which: str, tol: float, ncv: int, seed: int
) -> tuple[int, bool]:
    """Products of SciPy's eigsh, whose residuals nobody measured, and whether it was right."""
    matrix = Counted(values)
    first = start(values, seed)
    found = eigsh(matrix, k, which=which, tol=tol, ncv=ncv, v0=first, maxiter=100_000)[0]
    return matrix.count, right(found, values, k, which, tol)


def right(found: np.ndarray, values: np.ndarray, k: int, which: str, tol: float) -> bool:
    """Whether these are the k extreme eigenvalues, each with its copies, to the tolerance."""
    exact = values[:k] if which == "LA" else values[-k:]
    return bool((np.abs(np.sort(found)[::-1] - exact) <= tol * np.abs(exact)).all())


def median(of: list[int]) -> str:
    return f"{np.median(of):.0f}"


def eigenpairs(k: int = 10, tol: float = 1e-3) -> None:
    print(f"\n### Eigenpairs: {k}, residual {tol:g}, medians of {len(SEEDS)} start vectors\n")
    print(
        "| spectrum | end | spectra, with certificate and residuals | right | certified | plain "
        "Lanczos | ARPACK ncv 21 (right) | 40 | 60 | 100 |"
    )
    print("| --- " * 10 + "|")
    for which, names in (("LA", SPECTRA), ("SA", ("S1", "S1z"))):
        for name in names:
            values = SPECTRA[name]()
            runs = [
                spectra.eigsh(
                    Diagonal(values), k, which=which, tol=tol, seed=seed, v0=start(values, seed)
                )
                for seed in SEEDS
            ]
            correct = sum(right(run.values, values, k, which, tol) for run in runs)
            cells = [
                median([run.matvecs for run in runs]),
                f"{correct}/{len(runs)}",
                f"{sum(run.certified for run in runs)}/{len(runs)}",
                median([unrestarted(values, k, which, tol, seed) for seed in SEEDS]),
            ]
            for ncv in (21, 40, 60, 100):
                peers = [arpack(values, k, which, tol, ncv, seed) for seed in SEEDS]
                correct = sum(fine for _, fine in peers)
                cells.append(f"{median([count for count, _ in peers])} ({correct}/{len(peers)})")
            print(f"| {name} | {which} | " + " | ".join(cells) + " |")


class Free(spectra.operators.base.SymmetricOperator):
    """diag(values): a product costs next to nothing. Counts its passes, however many products."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values, self.passes = values, 0
        super().__init__(spectra.objective.vectors.VectorSpace(len(values), values.dtype))

    def _products(self, rows: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return rows * self.values


def blocks(k: int = 10, tol: float = 1e-3) -> None:
    """What a block of products computed together costs in products, and saves in passes."""
    print(f"\n### Blocks: {k} largest, residual {tol:g}, products and passes over the data\n")
    sizes = (1, 2, 4, 8)
    print("| spectrum | " + " | ".join(f"block_size={size}" for size in sizes) + " |")
    print("| --- " * (1 + len(sizes)) + "|")
    for name, make in SPECTRA.items():
        values, cells = make(), []
        for size in sizes:
            runs = []
            for seed in SEEDS:
                h = Free(torch.from_numpy(values))
                found = spectra.eigsh(h, k, which="LA", tol=tol, block_size=size, seed=seed)
                if not right(found.values, values, k, "LA", tol):
                    msg = f"{name}: wrong with block_size={size}"
                    raise AssertionError(msg)
                runs.append((found.matvecs, h.passes))
            products, passes = np.median(runs, axis=0)
            cells.append(f"{products:.0f} in {passes:.0f}")
        print(f"| {name} | " + " | ".join(cells) + " |")


def distance(density: spectra.SpectralDensity, values: np.ndarray) -> float:
    """Wasserstein-1 distance of the quadrature, atoms included, to the true spectrum."""
    nodes = np.concatenate([density.nodes.ravel(), density.atoms])
    masses = [
        (density.weights / density.probes).ravel(),
        np.full(len(density.atoms), 1 / density.n),
    ]
    order, values = np.argsort(nodes), np.sort(values)
    nodes, mass = nodes[order], np.concatenate([[0], np.cumsum(np.concatenate(masses)[order])])
    x = np.sort(np.concatenate([nodes, values]))
    found = mass[np.searchsorted(nodes, x[:-1], side="right")]
    exact = np.searchsorted(values, x[:-1], side="right") / len(values)
    return float((np.abs(found - exact) * np.diff(x)).sum())


def analyses() -> None:
    print(f"\n### analyze with defaults, median of {len(SEEDS)} seeds\n")
    print(
        "| spectrum | products | half-width of the trace / max(abs(trace), ‖H‖_F) | its error | "
        "error of ‖H‖_F | W1 / ‖H‖ | W1 of plain quadrature at the same products |"
    )
    print("| --- " * 7 + "|")
    for name, make in SPECTRA.items():
        values = make()
        rows = []
        for seed in SEEDS:
            found = spectra.analyze(Diagonal(values), seed=seed)
            norm, frobenius = np.abs(values).max(), np.linalg.norm(values)
            scale = max(abs(values.sum()), frobenius)
            low, high = found.trace.interval()
            plain = spectra.spectral_density(
                Diagonal(values), steps=found.total_matvecs // 3, probes=3, seed=seed
            )
            rows.append(
                [
                    found.total_matvecs,
                    (high - low) / 2 / scale,
                    abs(found.trace.value - values.sum()) / scale,
                    abs(found.frobenius_norm.value / frobenius - 1),
                    distance(found.density, values) / norm,
                    distance(plain, values) / norm,
                ]
            )
        count, *rest = np.median(rows, axis=0)
        print(f"| {name} | {count:.0f} | " + " | ".join(f"{x:.1e}" for x in rest) + " |")


def reorthogonalisation(n: int = 10_000_000, m: int = 50) -> None:
    threads = torch.get_num_threads()
    print(f"\n### Time outside of products, n = {n:,}, float32, {threads} threads\n")
    h = Free(torch.linspace(-1, 1, n))
    krylov = Krylov(h, m, seeded(0))
    while krylov.size < m - 15:
        krylov.step()
    vector, times = torch.randn(n), []
    while not krylov.full:
        # In turn, so that other work of the machine weighs on all alike.
        basis, row = krylov.basis, []
        for part in (
            krylov.step,
            lambda: h.apply(vector),
            lambda basis=basis: vector.addmv_(basis.T, torch.mv(basis, vector), alpha=-1e-9),
        ):
            start = time.perf_counter()
            part()
            row.append(time.perf_counter() - start)
        times.append(row)
    step, product, pair = np.median(times, axis=0)
    print(f"A step beside its product takes {(step - product) / pair:.2f} times a pair of")
    print(f"matrix-vector products with the basis ({m} vectors), as torch.mv and addmv_ do them.")


def partial_reorthogonalisation(n: int = 200_000, m: int = 80) -> None:
    """Where Simon's recurrence allows a step without it: the estimates stay below √eps.

    Simon, 1984, "The Lanczos algorithm with partial reorthogonalization".
    """
    print(f"\n### Partial reorthogonalisation, S1 at n = {n:,}, {m} steps\n")
    print("| dtype | error of a product | reorthogonalised steps | largest inner product |")
    print("| --- " * 4 + "|")
    for dtype in (torch.float64, torch.float32):
        for rounding in (0.5, 3.0):
            count, level = tracked(torch.from_numpy(s1(n)).to(dtype), m, rounding)
            print(f"| {str(dtype)[6:]} | {rounding:g} eps ‖H‖ | {count} of {m} | {level:.0e} |")


def tracked(values: torch.Tensor, m: int, rounding: float) -> tuple[int, float]:
    """Steps that were reorthogonalised, and what the basis was orthogonal to at worst.

    Parameters
    ----------
    values
        Of a diagonal matrix, whose basis is not the Krylov vectors'.
    rounding
        What each product is taken to be off by, in eps ‖T‖.
    """
    space = spectra.objective.vectors.VectorSpace(len(values), values.dtype)
    rows, t, inner = space.basis(m + 1), np.zeros((m + 1, m + 1)), np.eye(m + 1)
    rows[0] = spectra.algorithms.probes.sphere(space, seeded(0))
    reorthogonalised, again = 0, False
    for j in range(m):
        vector, known = rows[j] * values, slice(0, j + 1)
        if j:
            vector.add_(rows[j - 1], alpha=-t[j, j - 1])
        t[j, j] = space.inner(rows[j], vector)
        vector.add_(rows[j], alpha=-t[j, j])
        beta = space.norm(vector)
        # β vᵀq_k of the next vector, from the inner products of those before.
        next_ = t[known, known] @ inner[known, j] - inner[known, known] @ t[known, j]
        noise = rounding * space.eps * np.abs(t).max()
        next_ = (np.abs(next_) + noise) / beta
        next_[j] = noise / beta
        # Two vectors in a row, or the next one brings back what was taken away.
        begun = next_.max() > space.eps**0.5
        if begun or again:
            space.remove(vector, rows[known])
            beta, next_, reorthogonalised = (
                space.norm(vector),
                rounding * space.eps,
                reorthogonalised + 1,
            )
        again = begun and not again
        inner[known, j + 1] = inner[j + 1, known] = next_
        t[j + 1, j] = t[j, j + 1] = beta
        rows[j + 1] = vector.div_(beta)
    return reorthogonalised, space.defect(rows[:m])


if __name__ == "__main__":
    eigenpairs()
    blocks()
    analyses()
    reorthogonalisation()
    partial_reorthogonalisation()
