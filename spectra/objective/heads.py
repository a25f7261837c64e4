"""Which module makes a model's logits, and what is the loss without all of them at once?

The output head of a language model is a linear layer. It is found by a trial on a few tokens, so
that no list of architectures is needed: the graph behind the logits tells which layer they come
from, and what was done to them since (a scale, a soft cap). Everything else is left as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional

from spectra.errors import DataError, SpectraError
from spectra.objective.batches import tensors_of
from spectra.objective.chunks import Step
from spectra.objective.cross_entropy import (
    chunked_cross_entropy,
    mean_cross_entropy,
    tokens_in_a_chunk,
)
from spectra.objective.keeping import buffers_kept, gradients_on, random_state_kept
from spectra.objective.linearised import as_it_is, is_linearising, linearise

__all__ = ["token_cross_entropy"]

# Bytes of logits that are made at once without further ado.
_SMALL = 64 << 20
# Tokens of the trial.
_FEW = 8


class _NoHeadError(Exception):
    """The logits cannot be made in chunks, for the reason that the message gives."""


class _ReachedError(Exception):
    """The forward pass has come to the head."""


@dataclass(frozen=True, eq=False)
class _Call:
    """What a linear layer was given, with the weights that it had then."""

    layer: nn.Linear
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def token_cross_entropy(
    model: nn.Module, inputs: Mapping[str, Any], targets: Tensor, ignore_index: int
) -> tuple[Tensor, str | None]:
    """Mean cross-entropy of the model's logits (B, T, V) with targets (B, T) at the same places.

    Or of logits (B, V) with one target for each row.

    The logits are the `logits` of the model's output, or the output if it is a tensor. Where they
    are large they are made in chunks of tokens, and no logits at all for targets that do not count.

    Returns
    -------
    loss, how
        The scalar, in the dtype of the logits but at least float32; and for large logits in how
        large chunks they were made, or why they were not.
    """
    why_not = "no nn.Linear module without hooks is as wide as they are"
    candidates = [m for m in model.modules() if _is_linear(m) and _is_large(targets, m)]
    if candidates:
        try:
            layer, steps = _find_head(model, inputs, targets.shape, candidates)
            call = _call_of(model, layer, inputs, targets.shape)
        except _NoHeadError as reason:
            why_not = str(reason)
        else:
            loss = chunked_cross_entropy(
                linearise(call.hidden),
                targets,
                call.weight,
                call.bias,
                steps=steps,
                ignore_index=ignore_index,
                linearised=is_linearising(),
            )
            size = tokens_in_a_chunk(len(call.weight), call.hidden)
            return loss, f"in chunks of {size} tokens"
    logits = _logits(model, inputs)
    if logits.shape[:-1] != targets.shape:
        msg = (
            "cross-entropy needs one label for each row of logits, but the labels have shape "
            f"{tuple(targets.shape)} and the logits {tuple(logits.shape)}; for another loss write "
            "your own loss(model, batch)"
        )
        raise DataError(msg)
    loss = mean_cross_entropy(
        logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), ignore_index
    )
    large = _bytes(logits.numel(), logits.dtype) > _SMALL
    return loss, f"all logits at once: {why_not}" if large else None


def _logits(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    output = model(**inputs)
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits


def _is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether calling a module is nothing else than W x + b."""
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        return False
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" not in vars(module) and not any(getattr(module, name) for name in hooks)


def _is_large(targets: Tensor, layer: nn.Linear) -> bool:
    return _bytes(targets.numel() * layer.out_features, layer.weight.dtype) > _SMALL


def _bytes(entries: int, dtype: torch.dtype) -> int:
    return entries * max(dtype.itemsize, 4)


def _find_head(
    model: nn.Module, inputs: Mapping[str, Any], shape: torch.Size, candidates: list[nn.Linear]
) -> tuple[nn.Linear, tuple[Step, ...]]:
    """The layer that the logits come from and the steps to them, by a trial without a trace."""
    with gradients_on(), random_state_kept(), buffers_kept(model), as_it_is():
        few = {key: _cut(key, value, shape) for key, value in inputs.items()}
        try:
            logits, calls = _marked_logits(model, few, candidates)
        except SpectraError:
            # Such as: the memory is short, begin again. That is not about the head.
            raise
        except Exception as error:
            msg = f"a trial on {_FEW} tokens raised {type(error).__name__}: {error}"
            raise _NoHeadError(msg) from error
        mark, steps = _steps_behind(logits, set(calls))
        call = calls[mark]
        with torch.no_grad():
            again = functional.linear(call.hidden, call.weight, call.bias)
            for step in steps:
                again = step(again)
    if sum(other.layer is call.layer for other in calls.values()) > 1:
        msg = "the layer that makes them is called more than once"
        raise _NoHeadError(msg)
    if again.shape != logits.shape or not torch.allclose(
        again, logits, rtol=0, atol=0, equal_nan=True
    ):
        msg = f"the layer that makes them, and {len(steps)} steps, gave others in a trial"
        raise _NoHeadError(msg)
    return call.layer, steps


def _marked_logits(
    model: nn.Module, inputs: Mapping[str, Any], candidates: list[nn.Linear]
) -> tuple[Tensor, dict[Any, _Call]]:
    """Logits whose graph begins at outputs of candidates, and the calls by that node."""
    calls: dict[Any, _Call] = {}

    def mark(layer: nn.Linear, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        # A copy, because what follows may work in place.
        marked = output.detach().requires_grad_().clone()
        calls[marked.grad_fn] = _as_called(layer, args, kwargs)
        return marked

    handles = [layer.register_forward_hook(mark, with_kwargs=True) for layer in candidates]
    try:
        return _logits(model, inputs), calls
    finally:
        for handle in handles:
            handle.remove()


def _as_called(layer: nn.Linear, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
    return _Call(layer, [*args, *kwargs.values()][0], layer.weight, layer.bias)


def _cut(key: str, value: Any, shape: torch.Size) -> Any:
    """The first tokens of the first sequence."""
    if isinstance(value, Tensor) and value.shape == shape:
        return value[:1, :_FEW].clone()
    if tensors_of(value):
        what = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else "not a tensor"
        msg = (
            f"the input {key!r}, {what}, cannot be cut to a few tokens for a trial; expected "
            f"{tuple(shape)}"
        )
        raise _NoHeadError(msg)
    return value


def _steps_behind(logits: Tensor, marks: set[Any]) -> tuple[Any, tuple[Step, ...]]:
    """The mark that the logits come from, and the steps from there to them."""
    steps: list[Step] = []
    node: Any = logits.grad_fn
    while node not in marks:
        if node is None:
            msg = "they are the output of no nn.Linear module"
            raise _NoHeadError(msg)
        step = _step(node, logits.dtype)
        before = [following for following, _ in node.next_functions if following is not None]
        if step is None or len(before) != 1:
            msg = f"they are no output of an nn.Linear module but come from {node.name()}"
            raise _NoHeadError(msg)
        steps.append(step)
        node = before[0]
    return node, tuple(reversed(steps))


def _step(node: Any, dtype: torch.dtype) -> Step | None:
    """What a node of the graph computes, if it treats all entries of its input alike."""
    name = node.name()
    if name == "AliasBackward0":
        return lambda x: x
    if name == "ToCopyBackward0":
        return lambda x: x.to(dtype)
    if name == "TanhBackward0":
        return torch.tanh
    if name in {"MulBackward0", "DivBackward0"}:
        number = node._saved_other
        if isinstance(number, Tensor) and number.dim() == 0:
            other = number.item()
            apply = operator.mul if name == "MulBackward0" else operator.truediv
            return lambda x: apply(x, other)
    return None


def _call_of(
    model: nn.Module, layer: nn.Linear, inputs: Mapping[str, Any], shape: torch.Size
) -> _Call:
    """What the head is given on all of the data: the forward pass ends there."""
    calls: list[_Call] = []

    def stop(_: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append(_as_called(layer, args, kwargs))
        raise _ReachedError

    handle = layer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(**inputs)
    except _ReachedError:
        pass
    finally:
        handle.remove()
    if len(calls) != 1 or calls[0].hidden.shape[:-1] != shape:
        got = [tuple(call.hidden.shape) for call in calls]
        msg = f"the layer that makes them got {got}, expected (*{tuple(shape)}, width) once"
        raise _NoHeadError(msg)
    return calls[0]
