"""How is a loss differentiated twice as if its model were linear in the parameters?

With z(θ) the outputs of the model and J their Jacobian, the loss of the linearised model,
ℓ(z(θ₀) + J (θ − θ₀)), has at θ₀ the value and the gradient of the loss itself, Jᵀ ∇ℓ, and the
Hessian Jᵀ H_ℓ J: the generalised Gauss-Newton matrix (Schraudolph, 2002, "Fast curvature
matrix-vector products for second-order gradient descent").

So the outputs are replaced by equal ones whose derivative is a function that is linear by
construction: the first backward pass applies Jᵀ, and the backward pass of that one applies J, which
is the derivative of Jᵀu by u along a vector. The graph of z(θ) is kept for both. In units of the
forward pass a product takes 2 for J v and 2 for Jᵀ, beside those of the loss, where the Hessian
takes 6.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from spectra.errors import LossError
from spectra.objective.batches import map_tensors, tensors_of
from spectra.objective.nodes import leaves_behind

__all__ = ["as_it_is", "is_linearising", "linearise", "linearising"]

# How many outputs of the model have been linearised in the loss that is being evaluated; None where
# models are differentiated as they are.
_LINEARISED: ContextVar[list[int] | None] = ContextVar("linearised", default=None)


@contextlib.contextmanager
def linearising(model: nn.Module, function: str) -> Iterator[None]:
    """Within it the outputs of a model are linear functions of its parameters.

    Raises
    ------
    LossError
        At the end: the model was not called in between, so that nothing was linearised. `function`
        is what should have called it.
    """
    count = [0]
    token = _LINEARISED.set(count)
    handle = model.register_forward_hook(lambda _, __, output: linearise(output))
    try:
        yield
    finally:
        handle.remove()
        _LINEARISED.reset(token)
    if torch.is_grad_enabled() and not count[0]:
        msg = (
            f"{function} did not use the outputs of a call of the model, model(...), that depend "
            "on the selected parameters (tensors, or tuples, lists, dicts and dataclasses of "
            "them), and the Gauss-Newton matrix is that of a model linearised there: call the "
            "model itself rather than its parts or its methods, or wrap what is called in a "
            "module whose forward() it is"
        )
        raise LossError(msg)


@contextlib.contextmanager
def as_it_is() -> Iterator[None]:
    """Within it nothing is linearised: for a look at how a model works."""
    token = _LINEARISED.set(None)
    try:
        yield
    finally:
        _LINEARISED.reset(token)


def is_linearising() -> bool:
    """Whether losses are those of a linearised model."""
    return _LINEARISED.get() is not None


def linearise(outputs: Any) -> Any:
    """The same outputs, as linear functions of the leaves that they depend on.

    Tensors without a history stay as they are, and everything does outside of `linearising`.
    """
    count = _LINEARISED.get()
    if count is None:
        return outputs
    tensors = [t for t in tensors_of(outputs) if t.grad_fn is not None and t.is_floating_point()]
    if not tensors:
        # A parameter that is an output is linear in itself.
        count[0] += any(t.requires_grad for t in tensors_of(outputs))
        return outputs
    count[0] += 1
    jacobian = _Jacobian(tensors)
    linear = dict(
        zip(map(id, tensors), _Outputs.apply(jacobian, *jacobian.parameters), strict=True)
    )
    return map_tensors(outputs, lambda tensor: linear.get(id(tensor), tensor))


class _Jacobian:
    """Outputs with their graph, and the leaves that they are differentiated by."""

    def __init__(self, outputs: list[Tensor]) -> None:
        self.outputs = outputs
        self.parameters = leaves_behind(outputs)

    def transposed(
        self, cotangents: Sequence[Tensor | None], wanted: Sequence[bool], *, create_graph: bool
    ) -> list[Tensor | None]:
        """Jᵀu by parameter; None for those that are not wanted, and where there is no influence."""
        pairs = [(z, u) for z, u in zip(self.outputs, cotangents, strict=True) if u is not None]
        leaves = [p for p, want in zip(self.parameters, wanted, strict=True) if want]
        if not pairs or not leaves:
            return [None] * len(self.parameters)
        outputs, given = zip(*pairs, strict=True)
        found = iter(
            torch.autograd.grad(
                outputs,
                leaves,
                given,
                retain_graph=True,
                create_graph=create_graph,
                allow_unused=True,
            )
        )
        return [next(found) if want else None for want in wanted]


class _Outputs(torch.autograd.Function):
    """z(θ₀) + J (θ − θ₀)."""

    @staticmethod
    def forward(ctx: Any, jacobian: _Jacobian, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.jacobian = jacobian
        ctx.behind = jacobian.outputs
        ctx.set_materialize_grads(False)
        return tuple(output.detach() for output in jacobian.outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        wanted = ctx.needs_input_grad[1:]
        if not torch.is_grad_enabled():
            return None, *ctx.jacobian.transposed(cotangents, wanted, create_graph=False)
        _refuse_own_loss(ctx.jacobian.outputs, cotangents)
        return None, *_Transposed.apply(ctx.jacobian, wanted, *cotangents)


class _Transposed(torch.autograd.Function):
    """Jᵀu, which is linear in u and depends on nothing else."""

    @staticmethod
    def forward(
        ctx: Any, jacobian: _Jacobian, wanted: Sequence[bool], *cotangents: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        # Where u is constant there is nothing to be differentiated.
        needed = ctx.needs_input_grad[2:]
        with torch.enable_grad():
            leaves = [
                None if u is None else u.detach().requires_grad_(need)
                for u, need in zip(cotangents, needed, strict=True)
            ]
            found = jacobian.transposed(leaves, wanted, create_graph=any(needed))
        ctx.leaves = leaves
        ctx.found = found
        ctx.behind = [g for g in found if g is not None]
        return tuple(None if g is None else g.detach() for g in found)

    @staticmethod
    def backward(ctx: Any, *vectors: Tensor | None) -> Any:
        # J v, which the graph of Jᵀu gives: it is the derivative of ⟨Jᵀu, v⟩ by u.
        pairs = [
            (g, v)
            for g, v in zip(ctx.found, vectors, strict=True)
            if g is not None and v is not None and g.requires_grad
        ]
        wanted = [leaf for leaf in ctx.leaves if leaf is not None and leaf.requires_grad]
        if not pairs or not wanted:
            return (None,) * (2 + len(ctx.leaves))
        gradients, along = zip(*pairs, strict=True)
        found = iter(
            torch.autograd.grad(gradients, wanted, along, retain_graph=True, allow_unused=True)
        )
        by_cotangent = [
            next(found) if leaf is not None and leaf.requires_grad else None for leaf in ctx.leaves
        ]
        return None, None, *by_cotangent


def _refuse_own_loss(outputs: Sequence[Tensor], cotangents: Sequence[Tensor | None]) -> None:
    """Refuse a model that computes the loss by itself: there is no curvature but its own."""
    used = [(z, u) for z, u in zip(outputs, cotangents, strict=True) if u is not None]
    if any(u.requires_grad for _, u in used) or not any(z.dim() == 0 for z, _ in used):
        return
    msg = (
        "the loss is linear in a scalar that the model returns, as if the model computed the loss "
        "by itself: with the model linearised no curvature is left. Let the model return its "
        "predictions, and compute the loss from them: spectra.losses.supervised(criterion), or "
        "causal_lm(), masked_lm() and classification() for Hugging Face models"
    )
    raise LossError(msg)
