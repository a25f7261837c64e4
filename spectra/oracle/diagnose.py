"""Which operation cannot be differentiated twice, and which module does it belong to?

Some operations raise in the second backward, some are silently pruned from it, and some have a
second derivative that PyTorch gets wrong. The autograd graph of the gradient names them all before
any product is computed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel

from spectra.errors import DoubleBackwardError
from spectra.objective.nodes import graph_nodes

__all__ = [
    "explain_failure",
    "locate_culprit",
    "refuse_bad_modules",
    "refuse_bad_nodes",
]

# Graph nodes that make a second derivative fail, vanish or be wrong: (name, what is the matter).
# Each entry was seen to do so with torch 2.13 (gradgradcheck, or comparison with a dense Hessian).
_BAD_NODES = (
    ("NotImplemented", "has no second derivative in PyTorch"),
    ("torch::autograd::Error", "is a function marked once_differentiable"),
    (
        "WeightNormInterface",
        "is weight_norm, whose second derivative PyTorch gets wrong for dim 0 and 1",
    ),
    (
        "CheckpointFunctionBackward",
        "is reentrant activation checkpointing, which loses the gradient of its parameters",
    ),
)
# The code that all functions decorated with once_differentiable share.
_ONCE_DIFFERENTIABLE = once_differentiable(lambda context: None).__code__
_REMEDIES = (
    ("WeightNorm", "use weight_norm with dim=None, or compute g * v / v.norm() yourself"),
    ("weight_norm", "use weight_norm with dim=None, or compute g * v / v.norm() yourself"),
    ("heckpoint", "use checkpointing with use_reentrant=False, or switch it off"),
    ("once_differentiable", "remove the decorator and make the backward differentiable"),
    ("scaled_dot_product", "use an attention implementation of elementary operations ('eager')"),
    ("grouped_mm", "use experts of elementary operations (experts_implementation='eager')"),
    ("cudnn_rnn", "wrap the loss in torch.backends.cudnn.flags(enabled=False)"),
    ("inplace operation", "do not overwrite what a derivative needs (inplace=False)"),
    ("was compiled with", "pass the model before compilation (model._orig_mod)"),
    ("torch.compile", "pass the model before compilation (model._orig_mod)"),
    ("aot_autograd", "pass the model before compilation (model._orig_mod)"),
    (
        "a second time",
        "compute anew in every call what an earlier one left behind (a state of the model, "
        "parametrize.cached()), or detach it",
    ),
)
_DEFAULT_REMEDY = (
    "replace the operation by differentiable ones, or leave its parameters out with params="
)


def refuse_bad_modules(model: nn.Module | None) -> None:
    """Refuse modules whose second derivative is silently wrong and that leave no trace in a graph.

    Raises
    ------
    DoubleBackwardError
    """
    if model is None:
        return
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if isinstance(attention, str) and "flash" in attention:
        msg = (
            f"the attention of {type(model).__name__} is {attention!r}, a kernel without a second "
            "derivative; use model.set_attn_implementation('sdpa')"
        )
        raise DoubleBackwardError(msg)
    for name, module in model.named_modules():
        if isinstance(module, DistributedDataParallel) and module.process_group.size() > 1:
            msg = (
                f"{'the model' if not name else f'module {name!r}'} is a DistributedDataParallel "
                f"over {module.process_group.size()} processes, whose second derivatives are not "
                "averaged: products would be those of this process's data alone. Pass "
                "process_group=True, where every process has its share of the data; or its .module "
                "and all of the data"
            )
            raise DoubleBackwardError(msg)
        if not isinstance(module, nn.Embedding):
            continue
        if module.max_norm is not None:
            msg = (
                f"module {name!r} (Embedding with max_norm) rescales its weights in place during "
                "the forward pass, so products would be wrong; rescale once and set "
                "max_norm = None"
            )
            raise DoubleBackwardError(msg)
        if module.scale_grad_by_freq:
            msg = (
                f"module {name!r} (Embedding with scale_grad_by_freq) returns something else than "
                "the gradient of the loss, so products would be wrong; set scale_grad_by_freq = "
                "False"
            )
            raise DoubleBackwardError(msg)


def refuse_bad_nodes(tensors: Iterable[Tensor | None], locate: Callable[[], str]) -> None:
    """Refuse a gradient whose graph holds an operation without a right second derivative.

    Parameters
    ----------
    tensors
        The loss and its gradients, computed with `create_graph=True`.
    locate
        Called only on failure: which module the operation belongs to.

    Raises
    ------
    DoubleBackwardError
    """
    for node in graph_nodes(t for t in tensors if t is not None):
        name = node.name()
        if _is_once_differentiable(node):
            name = f"torch::autograd::Error, {name}"
        for bad, reason in _BAD_NODES:
            if bad in name:
                raise DoubleBackwardError(_message(locate(), f"({name}) {reason}", name + reason))


def _is_once_differentiable(node: Any) -> bool:
    """Whether a node of the graph is a custom function that carries the decorator.

    Its derivative is an Error node only where the incoming gradient depends on the parameters;
    where that is constant, at the end of a loss, the function vanishes from the graph.
    """
    backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
    return getattr(backward, "__code__", None) is _ONCE_DIFFERENTIABLE


def explain_failure(error: Exception, locate: Callable[[], str]) -> DoubleBackwardError:
    """The exception to raise in place of PyTorch's own, with the module and the remedy."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    # What follows the first sentence is advice for other uses.
    text = text.split(". ")[0].rstrip(".")
    return DoubleBackwardError(_message(locate(), f"cannot be differentiated twice: {text}", text))


def locate_culprit(model: nn.Module | None, evaluate: Callable[[], Tensor], function: str) -> str:
    """Name the innermost module that cannot be differentiated twice on its own.

    Each module is run again by itself on the inputs it gets in `evaluate()`. If none is to blame,
    it is the `function` around them: the loss.
    """
    if model is None:
        return f"an operation of {function}"
    calls: list[tuple[str, nn.Module, tuple[Any, ...], dict[str, Any]]] = []
    handles = [
        module.register_forward_hook(
            # The output hook comes after the children's, so inner modules stand first in the list.
            lambda module, args, kwargs, _output, name=name: calls.append(
                (name, module, args, kwargs)
            ),
            with_kwargs=True,
        )
        for name, module in model.named_modules()
    ]
    try:
        evaluate()
    except Exception:
        pass
    finally:
        for handle in handles:
            handle.remove()
    for name, module, args, kwargs in calls:
        if not _twice_differentiable(module, args, kwargs):
            return f"module {name!r} ({type(module).__name__})" if name else "the model itself"
    return f"an operation of {function}"


def _twice_differentiable(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    inputs: list[Tensor] = []

    def detached(value: Any) -> Any:
        if isinstance(value, Tensor):
            leaf = value.detach()
            if leaf.is_floating_point():
                leaf.requires_grad_()
                inputs.append(leaf)
                # A module may work in place, which autograd allows on a clone but not on a leaf.
                return leaf.clone()
            return leaf
        if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
            return type(value)(detached(item) for item in value)
        return value

    try:
        output = module(
            *(detached(value) for value in args),
            **{key: detached(value) for key, value in kwargs.items()},
        )
        outputs = [t for t in _tensors(output) if t.requires_grad]
        sources = inputs + [p for p in module.parameters() if p.requires_grad]
        if not outputs or not sources:
            return True
        # A quadratic readout, so that no second derivative vanishes for want of curvature.
        readout = torch.stack([(t.double() ** 2).sum() for t in outputs]).sum()
        first = torch.autograd.grad(readout, sources, create_graph=True, allow_unused=True)
        refuse_bad_nodes([readout, *first], lambda: "")
        live = [g for g in first if g is not None and g.requires_grad]
        if live:
            torch.autograd.grad([(g.double() ** 2).sum() for g in live], sources, allow_unused=True)
    except (RuntimeError, DoubleBackwardError):
        return False
    return True


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _message(where: str, what: str, evidence: str) -> str:
    remedy = next((fix for sign, fix in _REMEDIES if sign in evidence), _DEFAULT_REMEDY)
    return re.sub(r"\s+", " ", f"{where} {what}. Fix: {remedy}")
