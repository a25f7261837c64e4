"""What do gradients tell of a Hessian? Wrong and swallowed derivatives, parameters without any."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from spectra.analysis.differences import Differences, Product, compare, rounding_of, size
from spectra.analysis.findings import Finding, compressed
from spectra.errors import NonFiniteError
from spectra.objective.modes import discontinuous_modules
from spectra.operators.hessian import HessianOperator

__all__ = ["agreement", "gradient_of_the_loss", "parameters"]

# How the names of operations begin, as autograd calls them, whose derivative jumps somewhere.
_KINKS = (
    *("Relu", "Leaky", "Prelu", "Threshold", "Hardtanh", "Hardsw", "Hardsig", "Hardsh", "Softsh"),
    *("Abs", "Clamp", "Max", "Min", "Median", "Sort", "Topk", "Round", "Sign", "Floor"),
)
_BCE = "BinaryCrossEntropyBackward"
# Steps for differences of the loss, relative to the weights, and the relative error that passes.
_STEPS, _LIMIT = (1e-3, 1e-4), 0.05
# Of rounding in a loss: a change beyond it is a change.
_CHANGE = 100.0


def agreement(
    operator: HessianOperator, known: Product, gradient: Tensor
) -> tuple[Differences, Finding]:
    """Does a product agree with differences of the gradient? For the cost see `compare`.

    Parameters that neither have a gradient nor a part in the product stay where they are: how the
    others depend on them is none of the derivative's.
    """
    space, check = operator.space, "gradient differences"
    v = known.vector.clone()
    moving = space.any_by_parameter(known.product) | space.any_by_parameter(gradient)
    for place, moves in zip(space.slices.values(), moving, strict=True):
        if not moves:
            v[place] = 0.0
    found = compare(operator, Product(v, known.product, known.large, known.noise))
    if not found.worst:
        return found, Finding(
            check,
            "note",
            "not compared: at no step are they finite and above their own rounding",
            remedy="compare in float64, or with compute_dtype=torch.float32 for half precision",
        )
    message = (
        f"Hv and differences of the gradient{' in float64' if found.in_double else ''} differ by "
        f"{found.relative:.1g}, at a step of {found.step:.0e} of the weights"
    )
    if not found.disagreeing:
        return found, Finding(check, "ok", message, measured=found.relative, limit=found.limit)
    return found, _disagreement(operator, known, found, message)


def _disagreement(
    operator: HessianOperator, known: Product, found: Differences, message: str
) -> Finding:
    """An error where a derivative was swallowed, else a warning: H may be right all the same."""
    space, bad = operator.space, found.disagreeing
    curved = dict(zip(space.names, space.any_by_parameter(known.product), strict=True))
    swallowed = [name for name in bad if not curved[name]]
    kinks = [*_kinks(operator), *(f"module {name!r}" for name in _routers(operator))]
    # In single precision a gradient that is constant between kinks seems to move.
    certain = swallowed and (space.dtype == torch.float64 or found.in_double or not kinks)
    worst = max(found.worst[name] for name in bad)
    if certain:
        level, where = "error", swallowed
        message = (
            f"{len(swallowed)} of {len(space.names)} parameters have rows of zeros in H, but a "
            "gradient that is not constant: a derivative was swallowed"
        )
        remedy = "remove what swallows it: a checkpoint, .detach(), .data or NumPy in a backward"
    else:
        level, where = "warning", bad
        message += f"; in {len(bad)} of {len(space.names)} parameters by up to {worst:.1g}"
        remedy = (
            "a second derivative is wrong (a custom backward with NumPy or .data, a hook on a "
            "tensor, a probability that saturates), or a value is detached, which moves in a "
            "difference and not in a derivative; H is right where steps only meet kinks (ReLU, "
            "max), choices (routing, rounding) or parts in lower precision"
        )
    remedy += _look_first([*_suspects(operator), *kinks])
    return Finding(
        "gradient differences",
        level,
        message,
        where=compressed(where, space.names),
        remedy=remedy,
        measured=worst,
        limit=found.limit,
    )


def gradient_of_the_loss(operator: HessianOperator, gradient: Tensor, value: float) -> Finding:
    """Is the gradient the derivative of the loss, along itself?

    Costs two thirds of a gradient for each of at most two steps.
    """
    space, check = operator.space, "gradient of the loss"
    length, best = space.norm(gradient), math.inf
    for step in _STEPS if length else ():
        h = step * size(operator)
        if 10 * rounding_of(operator) * abs(value) / (h * length) > _LIMIT / 2:
            # The loss has not the digits.
            continue
        direction = gradient * (h / length)
        try:
            rise = operator.value_at(direction) - operator.value_at(-direction)
        except NonFiniteError:
            continue
        best = min(best, abs(rise / (2 * h * length) - 1))
        if best <= _LIMIT:
            message = f"it agrees with differences of the loss along it, to {best:.1g}"
            return Finding(check, "ok", message, measured=best, limit=_LIMIT)
    if math.isinf(best):
        return Finding(check, "ok", "too small for differences of the loss to tell")
    return Finding(
        check,
        "warning",
        f"it differs from the derivative of the loss, along it, by {best:.1g}; H is the derivative "
        "of this gradient",
        remedy="that is meant with a straight-through estimator or a target that is held fixed; "
        "else look for .detach(), hooks on tensors and custom backward functions"
        + _look_first(_suspects(operator)),
        measured=best,
        limit=_LIMIT,
    )


def parameters(
    operator: HessianOperator,
    product: Tensor,
    gradient: Tensor,
    value: float,
    found: Differences,
) -> list[Finding]:
    """Which parameters have rows of zeros in H, and is that an answer?

    Costs a third of a gradient, where some have no gradient.
    """
    space = operator.space
    # Rows of zeros whose gradient moves are a case of `agreement`.
    curved = dict(zip(space.names, space.any_by_parameter(product), strict=True))
    moved = dict(zip(space.names, space.any_by_parameter(gradient), strict=True))
    flat = [name for name in space.names if not curved[name] and name not in found.disagreeing]
    unused = [name for name in flat if not moved[name]]
    linear = [name for name in flat if name not in unused]
    # A gradient that is zero where there is a path from the loss is an answer.
    cut = _without_path(operator, unused) if unused else []
    findings = []
    if cut and _depends(operator, cut, value):
        unused = [name for name in unused if name not in cut]
        findings.append(
            Finding(
                "parameters",
                "error",
                f"the loss depends on {len(cut)} of them, or some of these, and they get no "
                "gradient: their rows of H are zero, and should not be",
                where=compressed(cut, space.names),
                remedy="remove .detach(), torch.no_grad(), .data, NumPy or a reentrant checkpoint "
                "between them and the loss, or leave them out with params=",
            )
        )
    for names, meaning in (
        (unused, "have no influence on the loss here: their gradient is zero, and so are"),
        (linear, "enter the loss linearly: their gradient is constant, and zero are"),
    ):
        if names:
            message = f"{len(names)} {meaning} their rows of H"
            where = compressed(names, space.names)
            findings.append(Finding("parameters", "note", message, where=where))
    return findings or [Finding("parameters", "ok", "all of them have a gradient and curvature")]


def _without_path(operator: HessianOperator, names: list[str]) -> list[str]:
    """Those of some parameters to which no path leads back from the loss of the first batch."""
    reached = {operation.parameter for operation in operator.operations()}
    places = enumerate(operator.space.names)
    return [name for place, name in places if name in names and place not in reached]


def _depends(operator: HessianOperator, names: list[str], value: float) -> bool:
    """Whether the loss changes when these parameters do."""
    space = operator.space
    displacement = space.zeros()
    generator = torch.Generator().manual_seed(0)
    for name in names:
        place = space.slices[name]
        entries = torch.randn(place.stop - place.start, generator=generator)
        displacement[place] = entries.to(displacement)
    displacement *= _STEPS[0] * size(operator) / math.sqrt(space.n)
    try:
        change = abs(operator.value_at(displacement) - value)
    except NonFiniteError:
        return True
    return change > _CHANGE * rounding_of(operator) * abs(value)


def _kinks(operator: HessianOperator) -> list[str]:
    """Operations of the loss whose derivative jumps somewhere, and modules that are one."""
    names = {operation.name for operation in operator.operations()}
    found = {name for name in names if name.startswith(_KINKS)}
    model = operator.objective.model
    # Of blocks that are recomputed the graph does not tell.
    kinds = {type(module).__name__ for module in model.modules()} if model is not None else set()
    return sorted(found | {kind for kind in kinds if kind.startswith(("ReLU", "LeakyReLU"))})


def _routers(operator: HessianOperator) -> list[str]:
    model = operator.objective.model
    return [] if model is None else [name for name, _ in discontinuous_modules(model)]


def _suspects(operator: HessianOperator) -> list[str]:
    """What could get a derivative wrong: custom functions, a loss of probabilities."""
    return list(dict.fromkeys(_custom_functions(operator)))


def _custom_functions(operator: HessianOperator) -> Iterator[str]:
    for operation in operator.operations():
        own = operation.module.startswith(("spectra.", "torch."))
        if operation.function is not None and not own:
            yield f"the custom function {operation.function}"
        elif operation.name.startswith(_BCE):
            yield "binary_cross_entropy (use binary_cross_entropy_with_logits)"


def _look_first(suspects: list[str]) -> str:
    return f". Look first at {', '.join(suspects[:4])}" if suspects else ""
