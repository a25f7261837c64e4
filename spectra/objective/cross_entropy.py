"""What is the cross-entropy of a wide output layer, without all of its logits at once?

The logits of a language model, (tokens × vocabulary), are its largest tensors, and a double
backward keeps several of them. Here they are made in chunks of tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from spectra.errors import ArgumentError
from spectra.objective.chunks import Step, at_least_single, sum_in_chunks

__all__ = [
    "chunked_cross_entropy",
    "linear_cross_entropy",
    "mean_cross_entropy",
    "tokens_in_a_chunk",
]

# Logits of a chunk: small enough for the caches. But every chunk reads and writes a gradient as
# large as the layer's weights, which has to be little beside its own work: that grows with the
# tokens, and takes up to this many where the layer is not narrow.
_BYTES = 16 << 20
_TOKENS = 256


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of `hidden @ weight.T + bias` without a tensor of (tokens × classes) entries.

    For a loss of your own with a large vocabulary: no logits outlive their chunk of tokens, not
    those of the gradient and of its derivative either.

    Parameters
    ----------
    hidden
        (..., d) inputs of the output layer.
    weight
        (V, d), such as the weight of an `nn.Linear` or of a tied embedding.
    targets
        (...) classes.
    bias
        (V,)
    ignore_index
        Target of positions that do not count. No logits are computed for them.
    reduction
        "mean" over the positions that count, or "sum".

    Returns
    -------
    Tensor
        A scalar that equals `F.cross_entropy(F.linear(hidden, weight, bias), targets)` to rounding,
        with first and second derivatives. Logits have the dtype of `hidden`; softmax and sums have
        it too, but are in float32 for half precision. A product of the Hessian takes 11 times the
        matrix products of a forward pass of the layer, 7 on a kept graph, where all logits at
        once take 9 and 6.

    Raises
    ------
    ArgumentError
        The shapes do not fit, or the reduction is another.

    Examples
    --------
    >>> import torch, spectra
    >>> hidden, weight = torch.zeros(2, 3, 4), torch.ones(5, 4)
    >>> targets = torch.tensor([[0, 1, -100], [2, 3, 4]])
    >>> spectra.losses.linear_cross_entropy(hidden, weight, targets)  # log(5)
    tensor(1.6094)
    """
    if hidden.dim() == 0 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        msg = (
            f"hidden has shape {tuple(hidden.shape)} and weight {tuple(weight.shape)}; expected "
            "(..., d) and (classes, d)"
        )
        raise ArgumentError(msg)
    if targets.shape != hidden.shape[:-1]:
        msg = (
            f"targets have shape {tuple(targets.shape)}, expected one class for each position of "
            f"hidden: {tuple(hidden.shape[:-1])}"
        )
        raise ArgumentError(msg)
    if reduction not in {"mean", "sum"}:
        msg = f"reduction={reduction!r}; expected 'mean' or 'sum'"
        raise ArgumentError(msg)
    return chunked_cross_entropy(
        hidden, targets, weight, bias, ignore_index=ignore_index, reduction=reduction
    )


def chunked_cross_entropy(
    hidden: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    steps: tuple[Step, ...] = (),
    ignore_index: int,
    reduction: str = "mean",
    linearised: bool = False,
) -> Tensor:
    """`linear_cross_entropy` of logits to which some steps are applied first, unchecked."""
    targets = targets.reshape(-1)
    # Places, because a mask would be turned into them anew in every derivative.
    counted = (targets != ignore_index).nonzero().squeeze(-1)
    hidden = hidden.reshape(-1, hidden.shape[-1]).index_select(0, counted)
    targets = targets.index_select(0, counted)
    hidden, weight, bias = _autocast(hidden), _autocast(weight), _autocast(bias)
    total = sum_in_chunks(
        hidden,
        targets,
        weight,
        bias,
        size=tokens_in_a_chunk(len(weight), hidden),
        steps=steps,
        ignore_index=ignore_index,
        linearised=linearised,
    )
    return total / len(targets) if reduction == "mean" else total


def tokens_in_a_chunk(classes: int, hidden: Tensor) -> int:
    """How many tokens' logits are made at once."""
    bytes_of_one = max(classes, 1) * max(hidden.dtype.itemsize, 4)
    return max(min(hidden.shape[-1], _TOKENS), _BYTES // bytes_of_one, 1)


def mean_cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """Mean cross-entropy of logits (n, V) over the targets that count, in float32 at least."""
    return functional.cross_entropy(at_least_single(logits), targets, ignore_index=ignore_index)


def _autocast(tensor: Tensor | None) -> Any:
    """What autocast would make of an argument of `linear`: a backward pass is outside of it."""
    if tensor is None or not torch.is_autocast_enabled(tensor.device.type):
        return tensor
    if tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))
