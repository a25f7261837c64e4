"""Losses whose Hessian's spectrum is known in closed form, from the function to its eigenvalues."""

import numpy as np
import pytest
import torch

import spectra
from spectra import HessianOperator


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def zeros(*shape):
    return torch.zeros(*shape, dtype=torch.float64)


def ones(*shape):
    return torch.ones(*shape, dtype=torch.float64)


def linear_network(target):
    return lambda w2, w1: 0.5 * (w2 @ w1 - target).square().sum()


def saddle_of_a_linear_network():
    """At zero ±σ, each as often as there are hidden units; the trace is zero."""
    target = random(4, 3)
    singular = np.linalg.svd(target.numpy(), compute_uv=False)
    values = np.concatenate([np.repeat(singular, 2), np.repeat(-singular, 2), np.zeros(2)])
    return linear_network(target), [zeros(4, 2), zeros(2, 3)], values


def balanced_minimum_of_a_linear_network():
    """σ_i + σ_j over all pairs of outputs and inputs, σ padded by zeros; the rest is zero."""
    target, hidden = random(4, 3), 3
    u, s, v = torch.linalg.svd(target, full_matrices=False)
    padded_out, padded_in = np.append(s.numpy(), 0.0), s.numpy()
    values = np.add.outer(padded_out, padded_in).ravel()
    values = np.concatenate([values, np.zeros(hidden * 7 - len(values))])
    return linear_network(target), [u * s.sqrt(), s.sqrt()[:, None] * v], values


def product_of_scalars():
    """½ (Π w − y)² at ones: one large eigenvalue, and a multiple one of the other sign."""
    count, y = 5, 3.0
    values = [count + (1 - y) * (count - 1), *[-(1 - y)] * (count - 1)]
    return lambda w: 0.5 * (w.prod() - y) ** 2, [ones(count)], values


def chain():
    """½ a Σ w² + b Σ w_i w_{i+1}: a + 2 b cos(kπ / (n + 1))."""
    n, a, b = 30, 0.5, 1.0
    values = a + 2 * b * np.cos(np.arange(1, n + 1) * np.pi / (n + 1))
    return lambda w: 0.5 * a * w.square().sum() + b * (w[1:] * w[:-1]).sum(), [random(n)], values


def square_of_a_projection():
    a = random(12)
    values = [float(a @ a), *[0.0] * 11]
    return lambda w: 0.5 * (a @ w) ** 2, [random(12)], values


def log_sum_exp():
    return lambda w: w.logsumexp(0), [zeros(8)], [0.0, *[1 / 8] * 7]


def quartic():
    """¼ ‖w‖⁴ at ‖w‖ = r: r², and 3 r² along w."""
    w = random(9)
    r2 = float(w @ w)
    return lambda w: 0.25 * (w @ w) ** 2, [w], [3 * r2, *[r2] * 8]


def two_variables():
    return lambda x, y: x * y, [ones(1), ones(1)], [1.0, -1.0]


def rosenbrock():
    root = np.sqrt(250601.0)
    return (
        lambda w: (1 - w[0]) ** 2 + 100 * (w[1] - w[0] ** 2) ** 2,
        [ones(2)],
        [501 + root, 501 - root],
    )


def weight_decay():
    function, point, values = product_of_scalars()
    return (
        lambda w: function(w) + 0.5 * 0.7 * w.square().sum(),
        point,
        np.asarray(values) + 0.7,
    )


def circular_convolution():
    """½ ‖k ⊛ w‖²: |FFT(k)|², in pairs."""
    kernel, n = random(3), 16

    def function(w):
        return 0.5 * sum(k * w.roll(i) for i, k in enumerate(kernel)).square().sum()

    return function, [random(n)], np.abs(np.fft.fft(kernel.numpy(), n)) ** 2


CASES = [
    saddle_of_a_linear_network,
    balanced_minimum_of_a_linear_network,
    product_of_scalars,
    chain,
    square_of_a_projection,
    log_sum_exp,
    quartic,
    two_variables,
    rosenbrock,
    weight_decay,
    circular_convolution,
]


@pytest.mark.parametrize("case", CASES)
def test_the_spectrum_is_that_of_the_closed_form(case):
    function, point, values = case()
    values = np.sort(np.asarray(values))
    operator = HessianOperator.from_function(lambda *w: function(*w).sum(), point)
    size = np.abs(values).max()
    dense = np.linalg.eigvalsh(operator.to_dense().numpy())
    np.testing.assert_allclose(dense, values, rtol=0, atol=1e-12 * size)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("which", ["LA", "SA"])
def test_the_solvers_find_it_with_all_copies(case, which):
    function, point, values = case()
    values = np.sort(np.asarray(values))[::-1]
    operator = HessianOperator.from_function(lambda *w: function(*w).sum(), point)
    size = np.abs(values).max()
    k = min(3, len(values))
    pairs = spectra.eigsh(operator, k, which=which, tol=1e-8)
    wanted = values[:k] if which == "LA" else values[-k:]
    np.testing.assert_allclose(pairs.values, wanted, rtol=0, atol=1e-7 * size)
    # Exact where unit vectors are no dearer than probes, an interval elsewhere.
    low, high = spectra.trace(operator, deflate=pairs).interval(0.999)
    rounding = 1e-10 * size * len(values)
    assert low - rounding <= values.sum() <= high + rounding
