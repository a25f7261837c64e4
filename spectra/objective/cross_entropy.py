"""What is the cross-entropy of a wide output layer, without all of its logits at once?

The logits of a language model, (tokens × vocabulary), are its largest tensors, and a double
backward keeps several of them. Here they are made in chunks of tokens. Each chunk is a segment: a
function of its hidden states with a scalar value, of which a product keeps the inputs alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from spectra.errors import ArgumentError
from spectra.objective.segments import segment

__all__ = [
    "chunked_cross_entropy",
    "linear_cross_entropy",
    "mean_cross_entropy",
    "tokens_in_a_chunk",
]

# Logits of a chunk: small enough for the caches. But every chunk adds a gradient as large as the
# output layer's weights to those of the others, which has to be little beside its own work: that
# grows with the tokens, and takes up to this many where the layer is not narrow.
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

    For a loss of your own with a large vocabulary. In products and gradients of a `HessianOperator`
    no logits outlive their chunk of tokens; called elsewhere it is an ordinary function.

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
        with all derivatives. Logits have the dtype of `hidden`; softmax and sums have it too, but
        are in float32 for half precision. A chunk takes 13 products of a forward pass for a product
        of the Hessian, where all logits at once take 9; on a kept graph 9 instead of 6.

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
        functional.linear,
        hidden,
        targets,
        weight,
        bias,
        classes=len(weight),
        ignore_index=ignore_index,
        reduction=reduction,
    )


def chunked_cross_entropy(
    logits_of: Callable[..., Tensor],
    hidden: Tensor,
    targets: Tensor,
    *tensors: Tensor | None,
    classes: int,
    ignore_index: int,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of `logits_of(hidden, *tensors)`, hidden (..., d), targets (...).

    What `logits_of` reads besides its arguments are parameters, and it treats each position by
    itself.
    """
    counted = targets != ignore_index
    hidden, targets = hidden[counted], targets[counted]
    size = tokens_in_a_chunk(classes, hidden)
    pieces = list(zip(hidden.split(size), targets.split(size), strict=True))
    if len(pieces) == 1:
        total = _sum_of_chunk(logits_of, ignore_index, hidden, targets, *tensors)
    else:
        sums = [segment(_sum_of_chunk, logits_of, ignore_index, *p, *tensors) for p in pieces]
        total = torch.stack(sums).sum()
    return total / len(targets) if reduction == "mean" else total


def tokens_in_a_chunk(classes: int, hidden: Tensor) -> int:
    """How many tokens' logits are made at once."""
    bytes_of_one = max(classes, 1) * max(hidden.dtype.itemsize, 4)
    return max(min(hidden.shape[-1], _TOKENS), _BYTES // bytes_of_one, 1)


def mean_cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """Mean cross-entropy of logits (n, V) over the targets that count, in float32 at least."""
    return functional.cross_entropy(_at_least_single(logits), targets, ignore_index=ignore_index)


def _sum_of_chunk(
    logits_of: Callable[..., Tensor],
    ignore_index: int,
    hidden: Tensor,
    targets: Tensor,
    *tensors: Tensor | None,
) -> Tensor:
    logits = _at_least_single(logits_of(hidden, *tensors))
    # No target is ignored any more, but a negative class has to be refused as PyTorch does.
    return functional.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")


def _at_least_single(logits: Tensor) -> Tensor:
    """Half precision has 3 digits, too few for the logarithm of a probability among thousands."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
