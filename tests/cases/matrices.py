"""Matrices whose spectrum is known exactly.

Spectra come as arrays in descending order, matrices and operators are made from them. The synthetic
spectra imitate that of a network: a few outliers, a bulk near zero, a negative tail.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import scipy.sparse
import torch
from scipy.sparse.linalg import LinearOperator

import spectra
from spectra.objective.parameters import ParameterSpace
from spectra.operators.base import MatrixOperator, SymmetricOperator

WILKINSON_TOP = (10.746194182903322, 10.746194182903393, 9.210678647304919, 9.210678647361332)


# --- spectra ----------------------------------------------------------------------------------


def marchenko_pastur(count: int, scale: float, ratio: float = 0.5) -> np.ndarray:
    """Quantiles of the law of Marchenko and Pastur, whose upper edge is scale (1 + sqrt ratio)²."""
    low, high = scale * (1 - ratio**0.5) ** 2, scale * (1 + ratio**0.5) ** 2
    x = np.linspace(low, high, 100_001)
    mass = np.cumsum(np.sqrt((high - x) * (x - low)) / x)
    return np.interp((np.arange(count) + 0.5) / count, mass / mass[-1], x)


def semicircle(n: int = 2000) -> np.ndarray:
    """Quantiles of the semicircle law on [-2, 2]: no outliers, the edge of a continuum."""
    x = np.linspace(-2, 2, 100_001)
    mass = np.cumsum(np.sqrt(4 - x**2))
    return np.interp((np.arange(n) + 0.5) / n, mass / mass[-1], x)[::-1].copy()


def negative_tail(count: int) -> np.ndarray:
    """Small negative eigenvalues, exponentially rarer towards -0.3."""
    shares = (np.arange(count) + 0.5) / count
    return -np.minimum(-0.05 * np.log1p(-shares), 0.3)


def _descending(*parts: Any) -> np.ndarray:
    return np.sort(np.concatenate([np.atleast_1d(part) for part in parts]))[::-1].copy()


def s1(n: int = 2000) -> np.ndarray:
    """Ten outliers 1 to 100 spaced evenly in the logarithm, a bulk up to 0.29, a tenth negative."""
    tail = n // 10
    bulk = marchenko_pastur(n - 10 - tail, scale=0.1)
    return _descending(np.logspace(0, 2, 10), bulk, negative_tail(tail))


def s1z(n: int = 2000) -> np.ndarray:
    """As `s1`, but seven tenths of the eigenvalues are near zero: more parameters than data."""
    tail, zeros = n // 10, 7 * n // 10
    nearly = np.random.default_rng(7).normal(scale=1e-3, size=zeros)
    bulk = marchenko_pastur(n - 10 - tail - zeros, scale=0.1)
    return _descending(np.logspace(0, 2, 10), bulk, nearly, negative_tail(tail))


def s2(n: int = 2000) -> np.ndarray:
    """The power law 100 / i without any gap, a tenth negative."""
    tail = n // 10
    return _descending(100 / np.arange(1, n - tail + 1), negative_tail(tail))


def s3(n: int = 2000) -> np.ndarray:
    """An outlier at 20, nine in 10 ± 10 %, a wide bulk up to 5.8, a tenth negative."""
    tail = n // 10
    bulk = marchenko_pastur(n - 10 - tail, scale=2.0)
    return _descending(20.0, np.linspace(9, 11, 9), bulk, negative_tail(tail))


def s4(n: int = 2000) -> np.ndarray:
    """A saddle: every eigenvalue occurs with both signs, up to ±100, so that the trace is zero."""
    half = np.concatenate([np.logspace(0, 2, 10), marchenko_pastur(n // 2 - 10, scale=0.1)])
    return _descending(half, -half)


def s5(n: int = 2000) -> np.ndarray:
    """50, 20, 10 and 5, three times each, above a bulk."""
    tail = n // 10
    bulk = marchenko_pastur(n - 12 - tail, scale=0.1)
    return _descending(np.repeat([50.0, 20.0, 10.0, 5.0], 3), bulk, negative_tail(tail))


def laplacian_spectrum(n: int) -> np.ndarray:
    """Of `laplacian(n)`: 2 - 2 cos(kπ / (n + 1))."""
    return _descending(2 - 2 * np.cos(np.arange(1, n + 1) * np.pi / (n + 1)))


# --- matrices ---------------------------------------------------------------------------------


def laplacian(n: int) -> scipy.sparse.csr_array:
    """The second difference with Dirichlet ends."""
    diagonals = [np.full(n - 1, -1.0), np.full(n, 2.0), np.full(n - 1, -1.0)]
    return scipy.sparse.csr_array(scipy.sparse.diags(diagonals, offsets=[-1, 0, 1]))


def wilkinson() -> np.ndarray:
    """W21+: simple eigenvalues in pairs, the topmost pair 7e-14 apart."""
    ones = np.ones(20)
    return np.diag(np.abs(np.arange(-10.0, 11.0))) + np.diag(ones, 1) + np.diag(ones, -1)


def rank_one(n: int, eigenvalue: float = 3.0, seed: int = 0) -> np.ndarray:
    """One eigenvalue, and n - 1 times zero."""
    direction = np.random.default_rng(seed).normal(size=n)
    direction /= np.linalg.norm(direction)
    return eigenvalue * np.outer(direction, direction)


def orthogonal(n: int, seed: int = 0) -> np.ndarray:
    """A random orthogonal matrix."""
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]


def dense(values: Any, seed: int = 0) -> np.ndarray:
    """Q diag(values) Qᵀ with a random orthogonal Q, symmetric to the last bit."""
    values = np.asarray(values, dtype=float)
    q = orthogonal(len(values), seed)
    matrix = (q * values) @ q.T
    return (matrix + matrix.T) / 2


# --- operators --------------------------------------------------------------------------------


class Diagonal(LinearOperator):
    """diag(values), written as users write it: for one vector (n,) at a time."""

    def __init__(self, values: Any, dtype: Any = np.float64) -> None:
        self.values = np.asarray(values, dtype=dtype)
        super().__init__(np.dtype(dtype), (len(self.values), len(self.values)))

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        return self.values * x


class Rotated(LinearOperator):
    """(I - 2uuᵀ) diag(values) (I - 2uuᵀ): dense, any n, any spectrum, products in O(n)."""

    def __init__(self, values: Any, seed: int = 0, dtype: Any = np.float64) -> None:
        self.values = np.asarray(values, dtype=dtype)
        n = len(self.values)
        normal = np.random.default_rng(seed).normal(size=n)
        self.normal = (normal / np.linalg.norm(normal)).astype(dtype)
        super().__init__(np.dtype(dtype), (n, n))

    def reflect(self, x: np.ndarray) -> np.ndarray:
        """(I - 2uuᵀ) x; column i of this reflection is the eigenvector of values[i]."""
        return x - 2 * self.normal * (self.normal @ x)

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        return self.reflect(self.values * self.reflect(x))


class Noisy(LinearOperator):
    """diag(values) whose every product is off by a fresh error of relative norm `relative`."""

    def __init__(self, values: Any, relative: float, seed: int = 0) -> None:
        self.values = np.asarray(values, dtype=float)
        self.relative = relative
        self.generator = np.random.default_rng(seed)
        super().__init__(np.dtype(np.float64), (len(self.values), len(self.values)))

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        product = self.values * x
        error = self.generator.normal(size=len(x))
        return product + self.relative * np.linalg.norm(product) / np.linalg.norm(error) * error


class Poisoned(LinearOperator):
    """diag(values) until product number `at`, from which on they hold a nan."""

    def __init__(self, values: Any, at: int) -> None:
        self.values = np.asarray(values, dtype=float)
        self.at = at
        self.count = 0
        super().__init__(np.dtype(np.float64), (len(self.values), len(self.values)))

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        self.count += 1
        product = self.values * x
        if self.count >= self.at:
            product[0] = np.nan
        return product


class Layered(SymmetricOperator):
    """A matrix whose rows belong to named parameters, as a network's do."""

    def __init__(
        self, matrix: Any, sizes: dict[str, int], dtype: torch.dtype = torch.float64
    ) -> None:
        self.matrix = torch.from_numpy(np.array(matrix)).to(dtype)
        tensors = {name: torch.zeros(size, dtype=dtype) for name, size in sizes.items()}
        super().__init__(ParameterSpace(tensors))

    def _products(self, rows: torch.Tensor) -> torch.Tensor:
        return rows @ self.matrix


def operator(matrix: Any) -> Any:
    """An operator of spectra that counts its products."""
    return spectra.as_operator(matrix)


def torch_operator(values: Any, dtype: torch.dtype = torch.float64) -> MatrixOperator:
    """Q diag(values) Qᵀ as a dense torch matrix."""
    return MatrixOperator(torch.from_numpy(dense(values)).to(dtype))


# --- the Hessian of a small network -----------------------------------------------------------


def tanh_network(dtype: torch.dtype = torch.float64) -> tuple[spectra.HessianOperator, np.ndarray]:
    """A tanh network's Hessian as an operator, and as torch.func sees it, in float64 (43 x 43)."""
    generator = torch.Generator().manual_seed(3)
    sizes = [(5, 4), (5,), (3, 5), (3,)]
    tensors = [torch.randn(*size, generator=generator, dtype=torch.float64) for size in sizes]
    inputs = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (50,), generator=generator)

    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    model = model.to(torch.float64)
    with torch.no_grad():
        for parameter, tensor in zip(model.parameters(), tensors, strict=True):
            parameter.copy_(tensor)

    def loss_of(flat: torch.Tensor) -> torch.Tensor:
        parts = flat.split([tensor.numel() for tensor in tensors])
        w1, b1, w2, b2 = (part.reshape(size) for part, size in zip(parts, sizes, strict=True))
        logits = torch.tanh(inputs @ w1.T + b1) @ w2.T + b2
        return torch.nn.functional.cross_entropy(logits, labels)

    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    with warnings.catch_warnings():
        # PyTorch's own first use of forward mode calls what PyTorch deprecates.
        warnings.simplefilter("ignore", DeprecationWarning)
        reference = torch.func.hessian(loss_of)(flat).numpy()

    model = model.to(dtype)
    data = [(inputs[:20].to(dtype), labels[:20]), (inputs[20:].to(dtype), labels[20:])]
    loss = spectra.losses.supervised(torch.nn.CrossEntropyLoss())
    return spectra.HessianOperator(model, loss, data), reference
