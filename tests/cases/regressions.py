"""Regressions on real data, and a linear network, whose Hessians have closed forms.

No derivative is computed here: with design rows x̃ = (x, 1) and logits Wx̃, the Hessian of a loss
whose second derivative by the logits of sample i is A_i is Σ_i A_i ⊗ x̃_i x̃_iᵀ / N.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn import datasets
from torch import Tensor, nn

from spectra import losses


@dataclass(frozen=True, eq=False)
class Regression:
    """A one-layer model on data, and what its Hessian is."""

    model: nn.Module
    loss: losses.Supervised
    inputs: Tensor
    targets: Tensor
    matrix: np.ndarray
    # In ascending order; None where the spectrum has no simpler form than the matrix.
    eigenvalues: np.ndarray | None
    trace: float
    frobenius: float

    @property
    def data(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.inputs, self.targets)]


def linear() -> Regression:
    """Three outputs by mean squared error on the Linnerud set: 2μ/3, each three times."""
    x, y = _standardised(datasets.load_linnerud())
    y = (y - y.mean(axis=0)) / y.std(axis=0)
    gram = _gram(x)
    outputs = y.shape[1]
    second = np.broadcast_to(2 / outputs * np.eye(outputs), (len(x), outputs, outputs))
    return Regression(
        _layer(x.shape[1], outputs),
        losses.supervised(nn.MSELoss()),
        torch.tensor(x),
        torch.tensor(y),
        _matrix(x, second),
        np.repeat(2 / outputs * np.linalg.eigvalsh(gram), outputs),
        2 * np.trace(gram),
        2 / outputs * np.sqrt(outputs) * np.linalg.norm(gram),
    )


def diabetes() -> Regression:
    """One output by mean squared error on the diabetes set: 2μ."""
    x, y = _standardised(datasets.load_diabetes())
    gram = _gram(x)
    return Regression(
        _layer(x.shape[1], 1),
        losses.supervised(nn.MSELoss()),
        torch.tensor(x),
        torch.tensor(y).unsqueeze(1),
        2 * gram,
        2 * np.linalg.eigvalsh(gram),
        2 * np.trace(gram),
        2 * np.linalg.norm(gram),
    )


def logistic(*, at_zero: bool) -> Regression:
    """Breast cancer by binary cross-entropy: X̃ᵀ diag(s(1 − s)) X̃ / N, and μ/4 at W = 0."""
    x, y = _standardised(datasets.load_breast_cancer())
    model = _layer(x.shape[1], 1, at_zero=at_zero)
    slope = 1 / (1 + np.exp(-_logits(model, x)[:, 0]))
    matrix = _matrix(x, (slope * (1 - slope))[:, None, None])
    gram = _gram(x)
    return Regression(
        model,
        losses.supervised(nn.BCEWithLogitsLoss()),
        torch.tensor(x),
        torch.tensor(y, dtype=torch.float64).unsqueeze(1),
        matrix,
        np.linalg.eigvalsh(gram) / 4 if at_zero else None,
        np.trace(gram) / 4 if at_zero else np.trace(matrix),
        np.linalg.norm(gram) / 4 if at_zero else np.linalg.norm(matrix),
    )


def softmax(*, at_zero: bool, name: str = "wine") -> Regression:
    """C classes by cross-entropy; at W = 0: μ/C, each C − 1 times, and zeros."""
    x, y = _standardised(getattr(datasets, f"load_{name}")())
    classes = int(y.max()) + 1
    model = _layer(x.shape[1], classes, at_zero=at_zero)
    logits = _logits(model, x)
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    matrix = _matrix(x, p[:, :, None] * np.eye(classes) - p[:, :, None] * p[:, None, :])
    gram = _gram(x)
    several = np.repeat(np.linalg.eigvalsh(gram) / classes, classes - 1)
    return Regression(
        model,
        losses.supervised(nn.CrossEntropyLoss()),
        torch.tensor(x),
        torch.tensor(y),
        matrix,
        np.sort(np.concatenate([np.zeros(len(gram)), several])) if at_zero else None,
        (classes - 1) / classes * np.trace(gram) if at_zero else np.trace(matrix),
        np.sqrt(classes - 1) / classes * np.linalg.norm(gram)
        if at_zero
        else np.linalg.norm(matrix),
    )


def deep_linear(
    *, balanced: bool, hidden: int = 3
) -> tuple[Callable[[Tensor, Tensor], Tensor], list[Tensor], np.ndarray]:
    """½‖W₂W₁ − M‖² with singular values σ of M: function, weights, eigenvalues in ascending order.

    At zero: ±σ, each `hidden` times, and zeros. At the balanced minimum: σᵢ + σⱼ over all outputs i
    and inputs j (σ continued by zeros), and zeros.
    """
    rng = np.random.default_rng(3)
    outputs, inputs, rank = 4, 5, 3
    sigma = np.array([3.0, 2.0, 0.5])
    u = np.linalg.qr(rng.standard_normal((outputs, rank)))[0]
    v = np.linalg.qr(rng.standard_normal((inputs, rank)))[0]
    r = np.linalg.qr(rng.standard_normal((hidden, rank)))[0]
    target = torch.tensor(u * sigma @ v.T)
    n = hidden * (inputs + outputs)
    if balanced:
        first, second = r * np.sqrt(sigma) @ v.T, u * np.sqrt(sigma) @ r.T
        by_output = np.concatenate([sigma, np.zeros(outputs - rank)])
        by_input = np.concatenate([sigma, np.zeros(inputs - rank)])
        pairs = np.add.outer(by_output, by_input).ravel()
        nonzero = pairs[pairs > 0]
    else:
        first, second = np.zeros((hidden, inputs)), np.zeros((outputs, hidden))
        nonzero = np.repeat(np.concatenate([sigma, -sigma]), hidden)
    eigenvalues = np.sort(np.concatenate([nonzero, np.zeros(n - len(nonzero))]))
    return (
        lambda w1, w2: 0.5 * ((w2 @ w1 - target) ** 2).sum(),
        [torch.tensor(first), torch.tensor(second)],
        eigenvalues,
    )


def _standardised(bunch: Any) -> tuple[np.ndarray, np.ndarray]:
    x = bunch.data[:, bunch.data.std(axis=0) > 0]
    return (x - x.mean(axis=0)) / x.std(axis=0), bunch.target


def _layer(inputs: int, outputs: int, *, at_zero: bool = False) -> nn.Linear:
    layer = nn.Linear(inputs, outputs).double()
    if at_zero:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return layer


def _logits(model: nn.Linear, x: np.ndarray) -> np.ndarray:
    return x @ model.weight.detach().numpy().T + model.bias.detach().numpy()


def _design(x: np.ndarray) -> np.ndarray:
    return np.hstack([x, np.ones((len(x), 1))])


def _gram(x: np.ndarray) -> np.ndarray:
    return _design(x).T @ _design(x) / len(x)


def _matrix(x: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Σ A_i ⊗ x̃_i x̃_iᵀ / N in the layout of a linear layer: all weights, then all biases."""
    design = _design(x)
    outputs, width = second.shape[1], design.shape[1]
    blocks = np.einsum("nkl,ni,nj->kilj", second, design, design, optimize=True) / len(x)
    places = np.arange(outputs * width).reshape(outputs, width)
    order = np.concatenate([places[:, :-1].ravel(), places[:, -1]])
    return blocks.reshape(outputs * width, outputs * width)[np.ix_(order, order)]
