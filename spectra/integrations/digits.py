"""What is a small real problem to try things on? A network trained on scikit-learn's digits."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from spectra.errors import ArgumentError, TargetError
from spectra.objective import losses

__all__ = ["trained_digits"]

_PIXELS, _CLASSES = 64, 10


def trained_digits(
    *,
    hidden: int = 32,
    steps: int = 200,
    batch_size: int = 500,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[nn.Module, losses.Supervised, list[tuple[Tensor, Tensor]]]:
    """A tanh network trained on 1,797 images of digits: model, loss and data to analyse.

    Training takes a second or two. The same arguments give the same weights, and the global random
    state is neither read nor written.

    Parameters
    ----------
    hidden
        Width of the hidden layer; 32 makes 2,410 parameters.
    steps
        Of stochastic gradient descent with momentum, on 128 images each. 0 leaves the network as
        it was initialised.
    batch_size
        Of the data that are returned; the last batch is shorter.
    seed
        Of the initial weights and of the order of training.
    dtype
        Of weights and data.

    Returns
    -------
    tuple
        `(model, loss, data)` as `HessianOperator` takes them: the network in evaluation mode,
        cross-entropy, and all images in batches `(inputs, targets)`.

    Raises
    ------
    TargetError
        scikit-learn is not installed.
    ArgumentError
        A size is impossible.
    """
    if hidden < 1 or steps < 0 or batch_size < 1:
        msg = f"hidden={hidden}, steps={steps}, batch_size={batch_size}; expected at least 1, 0, 1"
        raise ArgumentError(msg)
    images, labels = _digits(dtype)
    generator = torch.Generator().manual_seed(seed)
    model = _network(hidden, dtype, generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        chosen = torch.randint(len(images), (128,), generator=generator)
        loss = functional.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    data = list(zip(images.split(batch_size), labels.split(batch_size), strict=True))
    return model.eval(), losses.supervised(nn.CrossEntropyLoss()), data


def _digits(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Images (1797, 64) with pixels in [0, 1], and labels (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        msg = "the digits need scikit-learn: pip install 'hessian-spectra[demo]'"
        raise TargetError(msg) from error
    digits = load_digits()
    return torch.tensor(digits.data / 16, dtype=dtype), torch.tensor(digits.target)


def _network(hidden: int, dtype: torch.dtype, generator: torch.Generator) -> nn.Sequential:
    # Layers draw their first weights from the global generator, so they are made without any.
    layers = [
        nn.utils.skip_init(nn.Linear, inputs, outputs, dtype=dtype)
        for inputs, outputs in ((_PIXELS, hidden), (hidden, _CLASSES))
    ]
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight, generator=generator)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1])
