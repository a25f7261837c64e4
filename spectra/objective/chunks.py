"""How is a cross-entropy differentiated twice without its logits being kept?

With u = W x + b, z = f(u) entry by entry, p = softmax(z) and y the target, a token has

    ℓ = -log p_y,   r = dℓ/dz = p - e_y,   dr along ż = p ∘ (ż - ⟨p, ż⟩)

Logits are made in chunks of tokens, and again for every derivative. The value takes one pass of
matrix products, the gradient three (u, r W, rᵀ x), and its derivative along (ẋ, Ẇ, ḃ) seven, two of
them for u̇ = W ẋ + Ẇ x + ḃ: 11 for a product of the Hessian where autograd, which keeps the logits,
takes 9, and 7 instead of 6 on a kept graph.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from spectra.errors import DoubleBackwardError

__all__ = ["Step", "at_least_single", "is_traced", "sum_in_chunks"]

Step = Callable[[Tensor], Tensor]
"""A function of every entry by itself."""


def sum_in_chunks(
    hidden: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    size: int,
    steps: tuple[Step, ...],
    ignore_index: int,
    linearised: bool = False,
) -> Tensor:
    """Sum of ℓ over tokens (n, d) with targets (n,), the logits of `size` tokens at a time.

    The logits are W x + b with `steps` applied to them one after the other; `linearised`: as if
    they were linear in x, W and b.
    """
    tokens = _Tokens(targets, size, steps, ignore_index, linearised)
    if len(targets) <= size and not linearised:
        return tokens.value(functional.linear(hidden, weight, bias), targets)
    total: Tensor = _Sum.apply(tokens, hidden, weight, bias)
    return total


def at_least_single(logits: Tensor) -> Tensor:
    """Half precision has 3 digits, too few for the logarithm of a probability among thousands."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@dataclass(frozen=True, eq=False)
class _Tokens:
    """What is known of the tokens besides the tensors that are differentiated by."""

    targets: Tensor
    size: int
    steps: tuple[Step, ...]
    ignore_index: int
    linearised: bool

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Places of the tokens of each chunk, and their targets."""
        for start in range(0, len(self.targets), self.size):
            place = slice(start, start + self.size)
            yield place, self.targets[place]

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Sum of ℓ over some tokens, from the outputs u of the layer."""
        for step in self.steps:
            outputs = step(outputs)
        # None is ignored any more, but a negative class has to be refused as PyTorch does.
        return functional.cross_entropy(
            at_least_single(outputs), targets, ignore_index=self.ignore_index, reduction="sum"
        )

    def first(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """dℓ/du."""
        logits, slopes, _ = self._logits(outputs)
        residuals = _without_targets(logits.softmax(-1), targets)
        return residuals if slopes is None else residuals.mul_(slopes)

    def second(self, outputs: Tensor, targets: Tensor, along: Tensor) -> tuple[Tensor, Tensor]:
        """dℓ/du, and its derivative along u̇."""
        logits, slopes, bends = self._logits(outputs)
        change = along if slopes is None else along * slopes
        probabilities = logits.softmax(-1)
        mean = (probabilities * change).sum(-1, keepdim=True)
        change = (change - mean).mul_(probabilities)
        residuals = _without_targets(probabilities, targets)
        if slopes is None:
            return residuals, change
        change.mul_(slopes)
        if bends is not None and not self.linearised:
            change.addcmul_(bends.mul_(along), residuals)
        return residuals.mul_(slopes), change

    def _logits(self, outputs: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The logits f(u), f'(u) and f''(u); None where these are one and zero everywhere."""
        if not self.steps:
            return at_least_single(outputs), None, None
        bends = None
        with torch.enable_grad():
            leaf = logits = outputs.detach().requires_grad_()
            for step in self.steps:
                logits = step(logits)
            (slopes,) = torch.autograd.grad(logits.sum(), leaf, create_graph=True)
            if slopes.requires_grad:
                (bends,) = torch.autograd.grad(slopes.sum(), leaf)
                bends = at_least_single(bends)
        return at_least_single(logits.detach()), at_least_single(slopes.detach()), bends


def _without_targets(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Leaves p - e_y in the place of p."""
    places = targets.unsqueeze(-1)
    return probabilities.scatter_add_(
        -1, places, -torch.ones_like(places, dtype=probabilities.dtype)
    )


class _Sum(torch.autograd.Function):
    """Sum of ℓ over all tokens."""

    @staticmethod
    def forward(
        ctx: Any, tokens: _Tokens, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.tokens = tokens
        ctx.save_for_backward(hidden, weight, bias)
        sums = [
            tokens.value(functional.linear(hidden[place], weight, bias), targets)
            for place, targets in tokens.chunks()
        ]
        return torch.stack(sums).sum()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        needed = ctx.needs_input_grad[1:]
        return None, *_Gradient.apply(ctx.tokens, needed, cotangent, *ctx.saved_tensors)


class _Gradient(torch.autograd.Function):
    """The gradient of that sum by x, W and b, times the number that comes back to it."""

    @staticmethod
    def forward(
        ctx: Any, tokens: _Tokens, needed: Sequence[bool], *given: Any
    ) -> tuple[Tensor | None, ...]:
        ctx.tokens = tokens
        ctx.save_for_backward(*given)
        # An absent vector is not the same as one of zeros, which would have to be multiplied.
        ctx.set_materialize_grads(False)
        cotangent, hidden, weight, bias = given
        sums = _GradientSums(needed, hidden, weight, bias)
        for place, targets in tokens.chunks():
            x = hidden[place]
            residuals = tokens.first(functional.linear(x, weight, bias), targets)
            residuals = residuals.mul_(cotangent).to(x.dtype)
            sums.add(place, residuals, x, weight)
            sums.add_to_bias(residuals)
        return sums.finished()

    @staticmethod
    def backward(
        ctx: Any, along_x: Tensor | None, along_weight: Tensor | None, along_bias: Tensor | None
    ) -> Any:
        if torch.is_grad_enabled():
            msg = "a cross-entropy in chunks can be differentiated twice but no more"
            raise DoubleBackwardError(msg)
        if is_traced():
            msg = (
                "a cross-entropy in chunks is not compiled, because logits that do not depend on "
                "the vector would be kept for all tokens"
            )
            raise DoubleBackwardError(msg)
        if along_x is None and along_weight is None and along_bias is None:
            return (None,) * 6
        cotangent, hidden, weight, bias = ctx.saved_tensors
        sums = _GradientSums(ctx.needs_input_grad[3:], hidden, weight, bias)
        by_cotangent = torch.zeros_like(cotangent)
        for place, targets in ctx.tokens.chunks():
            x = hidden[place]
            vectors = None if along_x is None else along_x[place]
            along = _along(x, weight, vectors, along_weight, along_bias)
            outputs = functional.linear(x, weight, bias)
            residuals, change = ctx.tokens.second(outputs, targets, along)
            by_cotangent += (residuals * along).sum()
            change = change.mul_(cotangent).to(x.dtype)
            residuals = residuals.mul_(cotangent).to(x.dtype)
            sums.add(place, change, x, weight)
            if not ctx.tokens.linearised:
                # What the product W x adds to the curvature, being no linear function.
                sums.add(place, residuals, vectors, along_weight)
            sums.add_to_bias(change)
        return None, None, by_cotangent, *sums.finished()


def is_traced() -> bool:
    """Whether operations are being recorded for a compiler, rather than only carried out."""
    # Who traces has imported it; others need not wait for that.
    tracer = sys.modules.get("torch.fx.experimental.proxy_tensor")
    return tracer is not None and tracer.get_proxy_mode() is not None


def _along(
    x: Tensor,
    weight: Tensor,
    along_x: Tensor | None,
    along_weight: Tensor | None,
    along_bias: Tensor | None,
) -> Tensor:
    """u̇ = W ẋ + Ẇ x + ḃ."""
    terms: list[Tensor] = []
    if along_x is not None:
        terms.append(functional.linear(along_x, weight, along_bias))
    elif along_bias is not None:
        terms.append(along_bias.expand(len(x), -1))
    if along_weight is not None:
        terms.append(functional.linear(x, along_weight))
    return at_least_single(terms[0] if len(terms) == 1 else terms[0] + terms[1])


class _GradientSums:
    """Gradients by x, W and b of terms ⟨r, W x + b⟩, as far as they are needed."""

    def __init__(
        self, needed: Sequence[bool], hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> None:
        self._tensors = (hidden, weight, bias)
        # Sums over many chunks do not fit into the digits of half precision.
        wide = torch.promote_types(weight.dtype, torch.float32)
        self._sums = [
            torch.zeros_like(tensor, dtype=dtype) if need and tensor is not None else None
            for need, tensor, dtype in zip(
                needed, self._tensors, (hidden.dtype, wide, wide), strict=True
            )
        ]

    def add(self, place: slice, residuals: Tensor, x: Tensor | None, weight: Tensor | None) -> None:
        """The terms of some tokens, as functions of x given W and of W given x."""
        by_x, by_weight, _ = self._sums
        if by_x is not None and weight is not None:
            by_x[place].addmm_(residuals, weight)
        if by_weight is not None and x is not None:
            if by_weight.dtype == x.dtype:
                by_weight.addmm_(residuals.T, x)
            else:
                by_weight.add_(residuals.T @ x)

    def add_to_bias(self, residuals: Tensor) -> None:
        """The terms of some tokens, as functions of b."""
        by_bias = self._sums[2]
        if by_bias is not None:
            by_bias.add_(residuals.sum(0))

    def finished(self) -> tuple[Tensor | None, ...]:
        """The three gradients, None where none was needed."""
        return tuple(
            None if sum_ is None or t is None else sum_.to(t.dtype)
            for sum_, t in zip(self._sums, self._tensors, strict=True)
        )
