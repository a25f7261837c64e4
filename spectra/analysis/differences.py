"""Is a product the derivative of the gradient, parameter by parameter, and that the loss's?

    H v ≈ (g(θ + hv) - g(θ - hv)) / 2h         ⟨g, d⟩ ≈ (L(θ + hd) - L(θ - hd)) / 2h

Differences are a check and never a result: they lose half of the digits. Too large a step meets the
third derivative and the kinks of the loss, too small a one its rounding, so that several are tried
and the best one counts, for each parameter by itself. With noise eps ‖g‖ / h a step tells nothing
below it. What no step agrees with in single precision is tried again in double.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spectra.analysis.findings import Finding, compressed
from spectra.errors import NonFiniteError, SpectraError
from spectra.objective.memory import memory_ran_out
from spectra.objective.modes import discontinuous_modules
from spectra.operators.hessian import HessianOperator

__all__ = [
    "Differences",
    "agreement",
    "dtypes",
    "gradient_of_the_loss",
    "parameters",
    "size",
]

# Lengths of the steps, relative to the norm of the weights.
_STEPS = {torch.float32: (1e-2, 1e-3, 1e-4), torch.float64: (1e-3, 1e-5, 1e-8)}
# Relative difference that passes, by the precision in which products are computed.
_LIMITS = {"float64": 1e-3, "float32": 1e-2, "bfloat16": 0.3, "float16": 0.1}
# In units of eps ‖g‖ / h; networks of 74 to 3000 parameters had 1.2.
_NOISE = 10.0
# A step whose noise is more than this share of the product tells nothing.
_USELESS = 0.3
# How the names of operations begin, as autograd calls them, whose derivative jumps somewhere.
_KINKS = ("Relu", "Leaky", "Prelu", "Threshold", "Hardtanh", "Hardsw", "Hardsig", "Hardsh") + (
    ("Softsh", "Abs", "Clamp", "Max", "Min", "Median", "Sort", "Topk", "Round", "Sign", "Floor")
)
_BCE = "BinaryCrossEntropyBackward"


@dataclass
class Differences:
    """A product against differences of the gradient.

    Attributes
    ----------
    limit
        Relative difference that passes.
    relative
        Of the whole vector, at the best step; nan where no step could be taken.
    step
        That step, relative to the weights.
    worst
        The least relative difference over the steps, by parameter.
    gradients
        Spent.
    precise
        They were taken in double precision.
    """

    limit: float
    relative: float = math.nan
    step: float = math.nan
    worst: dict[str, float] = field(default_factory=dict)
    gradients: int = 0
    precise: bool = False

    @property
    def told(self) -> bool:
        """There was a step that could tell."""
        return bool(self.worst)

    @property
    def disagreeing(self) -> list[str]:
        """Parameters in whose part of the product no step agrees."""
        return [name for name, difference in self.worst.items() if difference > self.limit]


def agreement(
    operator: HessianOperator,
    v: Tensor,
    product: Tensor,
    gradient: Tensor,
    *,
    large: float,
    noise: float,
) -> tuple[Differences, Finding]:
    """Does Hv agree with differences of the gradient along v?

    Parameters
    ----------
    v, product
        A vector of norm one, and H times it.
    gradient
        The gradient. Parameters of which neither it nor the product has anything stay where they
        are: what the others have to do with them is none of the derivative's.
    large
        Size of a gradient, of which rounding takes its share.
    noise
        Relative error of a product by rounding.

    Returns
    -------
    Differences, Finding
        Costs 2 to 6 gradients; and as many in double precision where that did not agree, or where
        the model is in half precision.
    """
    used, names = dtypes(operator), operator.space.names
    limit = max(*(_LIMITS[dtype] for dtype in used), min(10 * noise, _LIMITS["bfloat16"]))
    found = Differences(limit)
    v = v.clone()
    for place in operator.space.slices.values():
        if not product[place].any() and not gradient[place].any():
            v[place] = 0.0
    if not used & {"bfloat16", "float16"}:
        found = _compared(operator, v, product, large, limit)
    if (not found.told or found.disagreeing) and "float64" not in used:
        found = _in_double(operator, v, product, large, found)
    if not found.told:
        return found, Finding(
            "gradient differences",
            "note",
            "not compared: at no step are they finite and above their own rounding",
            remedy="compare in float64, or with compute_dtype=torch.float32 for half precision",
        )
    bad, dtype = found.disagreeing, " in float64" if found.precise else ""
    message = (
        f"Hv and differences of the gradient{dtype} differ by {found.relative:.1g}, at a step of "
        f"{found.step:.0e} of the weights"
    )
    if not bad:
        return found, Finding(
            "gradient differences", "ok", message, measured=found.relative, limit=limit
        )
    swallowed = [name for name in bad if not product[operator.space.slices[name]].any()]
    kinks = [*_kinks(operator), *(f"module {n!r}" for n, _ in _routers(operator))]
    # Where only large steps could be taken, a gradient that is constant but for kinks seems to move.
    certain = bool(swallowed) and (found.precise or "float64" in used or not kinks)
    worst = max(found.worst[name] for name in bad)
    if certain:
        text = (
            f"{len(swallowed)} of {len(names)} parameters have rows of zeros in H, but their "
            "gradient is not constant: a derivative was swallowed"
        )
        remedy = "remove what swallows it: a checkpoint, .detach(), .data or NumPy in a backward"
    else:
        text = f"{message}; in {len(bad)} of {len(names)} parameters by up to {worst:.1g}"
        remedy = (
            "a second derivative is wrong (a custom backward with NumPy or .data, a hook on a "
            "module, a probability that saturates), or a value is detached, which moves in a "
            "difference and not in a derivative; H is right where steps only meet kinks (ReLU, "
            "max), choices (routing, rounding) or parts in lower precision"
        )
    if suspects := [*_suspects(operator), *kinks]:
        remedy += f". Look first at {', '.join(suspects[:4])}"
    finding = Finding(
        "gradient differences",
        "error" if certain else "warning",
        text,
        where=compressed(swallowed if certain else bad, names),
        remedy=remedy,
        measured=worst,
        limit=limit,
    )
    return found, finding


def parameters(
    operator: HessianOperator, product: Tensor, gradient: Tensor, value: float, found: Differences
) -> list[Finding]:
    """Which parameters have rows of zeros in H, and is that an answer?

    Costs a third of a gradient, where some have no gradient.
    """
    space = operator.space
    # Rows of zeros whose gradient moves are a case of `agreement`.
    flat = [
        name
        for name, place in space.slices.items()
        if not product[place].any() and name not in found.disagreeing
    ]
    unused = [name for name in flat if not gradient[space.slices[name]].any()]
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
    if unused:
        findings.append(
            Finding(
                "parameters",
                "note",
                f"{len(unused)} have no influence on the loss here: their gradient is zero, and so "
                "are their rows of H",
                where=compressed(unused, space.names),
                remedy="none is needed; params= leaves them out",
            )
        )
    if linear:
        findings.append(
            Finding(
                "parameters",
                "note",
                f"{len(linear)} enter the loss linearly: their gradient is constant, and their "
                "rows of H are zero",
                where=compressed(linear, space.names),
                remedy="none is needed; params= leaves them out",
            )
        )
    return findings or [Finding("parameters", "ok", "all of them have a gradient and curvature")]


def gradient_of_the_loss(operator: HessianOperator, gradient: Tensor, value: float) -> Finding:
    """Is the gradient the derivative of the loss, along itself?

    Costs two thirds of a gradient for each of at most two steps.
    """
    space, check = operator.space, "gradient of the loss"
    length, limit = space.norm(gradient), 0.05
    best = math.inf
    for step in (1e-3, 1e-4) if length else ():
        h = step * size(operator)
        # Half of what can be told is rounding of the loss.
        rounding = _NOISE * _eps(operator) * abs(value) / (h * length)
        if rounding > limit / 2:
            continue
        direction = gradient * (h / length)
        try:
            rise = operator.value_at(direction) - operator.value_at(-direction)
        except NonFiniteError:
            continue
        best = min(best, abs(rise / (2 * h * length) - 1))
        if best <= limit:
            message = f"it agrees with differences of the loss along it, to {best:.1g}"
            return Finding(check, "ok", message, measured=best, limit=limit)
    if math.isinf(best):
        return Finding(check, "ok", "too small for differences of the loss to tell")
    remedy = (
        "what is computed is the derivative of this gradient: wanted with a straight-through "
        "estimator or a target that is held fixed, else look for .detach(), hooks on modules and "
        "custom backward functions"
    )
    if suspects := _suspects(operator):
        remedy += f". Look first at {', '.join(suspects[:4])}"
    return Finding(
        check,
        "warning",
        f"it differs from the derivative of the loss, along it, by {best:.1g}",
        remedy=remedy,
        measured=best,
        limit=limit,
    )


def _compared(
    operator: HessianOperator, v: Tensor, product: Tensor, large: float, limit: float
) -> Differences:
    """The product against differences at several steps, until all parameters agree."""
    space, found = operator.space, Differences(limit)
    v, product = v.to(space.dtype), product.to(space.dtype)
    length = space.norm(product)
    for step in _STEPS[space.dtype]:
        h = step * size(operator)
        noise = _NOISE * space.eps * large / h
        if length and noise > _USELESS * length:
            continue
        found.gradients += 2
        try:
            difference = operator.value_and_gradient_at(h * v)[1]
            difference -= operator.value_and_gradient_at(-h * v)[1]
        except NonFiniteError:
            continue
        difference /= 2 * h
        _judge(found, operator, difference, product, noise, step)
        if not found.disagreeing:
            break
    return found


def _judge(
    found: Differences,
    operator: HessianOperator,
    difference: Tensor,
    product: Tensor,
    noise: float,
    step: float,
) -> None:
    space = operator.space
    relative = space.norm(difference - product) / (space.norm(product) or noise or 1.0)
    if not relative >= found.relative:
        found.relative, found.step = relative, step
    for name, place in space.slices.items():
        expected, measured = product[place], difference[place]
        size = max(space.norm(expected), space.norm(measured))
        off = max(0.0, space.norm(measured - expected) - noise) / size if size else 0.0
        found.worst[name] = min(off, found.worst.get(name, math.inf))


def _in_double(
    operator: HessianOperator, v: Tensor, product: Tensor, large: float, before: Differences
) -> Differences:
    """The same with gradients in double precision, where the model can be evaluated in it."""
    try:
        precise = operator.computing_in(torch.float64)
        if precise is None:
            return before
        found = _compared(precise, v, product, large, before.limit)
    except Exception as error:
        if not (isinstance(error, SpectraError) or memory_ran_out(error)):
            raise
        return before
    if not found.told:
        return before
    found.gradients += before.gradients
    found.precise = True
    return found


def size(operator: HessianOperator) -> float:
    """Norm of the weights, as the unit of a step."""
    stored = operator.objective.stored
    norms = [torch.linalg.vector_norm(p.detach(), dtype=torch.float64) for p in stored]
    # Weights that are all zero have no size.
    return float(torch.stack(norms).norm()) or math.sqrt(operator.space.n)


def dtypes(operator: HessianOperator) -> set[str]:
    """In which products are computed, as far as the parameters tell."""
    tensors = operator.objective.parameters
    return {str(tensor.dtype).removeprefix("torch.") for tensor in tensors}


def _eps(operator: HessianOperator) -> float:
    return max(torch.finfo(tensor.dtype).eps for tensor in operator.objective.parameters)


def _without_path(operator: HessianOperator, names: list[str]) -> list[str]:
    """Those of some parameters to which no path leads back from the loss of the first batch."""
    reached = {id(getattr(node, "variable", None)) for node in operator.operations()}
    tensors = zip(operator.space.names, operator.objective.parameters, strict=True)
    return [name for name, tensor in tensors if name in names and id(tensor) not in reached]


def _depends(operator: HessianOperator, names: list[str], value: float) -> bool:
    """Whether the loss changes when these parameters do."""
    space = operator.space
    displacement = space.zeros()
    generator = torch.Generator().manual_seed(0)
    for name in names:
        place = space.slices[name]
        noise = torch.randn(place.stop - place.start, generator=generator)
        displacement[place] = noise.to(displacement)
    displacement *= 1e-3 * size(operator) / math.sqrt(space.n)
    try:
        change = abs(operator.value_at(displacement) - value)
    except NonFiniteError:
        return True
    return change > 100 * _eps(operator) * abs(value)


def _kinks(operator: HessianOperator) -> list[str]:
    """Operations of the loss, by their names in autograd, whose derivative jumps somewhere."""
    names = {node.name() for node in operator.operations()}
    model = operator.objective.model
    # Of blocks that are recomputed the graph does not tell.
    kinds = {type(m).__name__ for m in model.modules()} if model is not None else set()
    found = {n for n in names if any(n.startswith(kink) for kink in _KINKS)}
    return sorted(found | {k for k in kinds if k.lower().startswith(("relu", "leakyrelu"))})


def _suspects(operator: HessianOperator) -> list[str]:
    """What could get a derivative wrong: custom functions, hooks, a loss of probabilities."""
    found = list(dict.fromkeys(_custom(operator.operations())))
    model = operator.objective.model
    if model is not None:
        found += [
            f"the backward hook on module {name!r}"
            for name, module in model.named_modules()
            if module._backward_hooks or module._backward_pre_hooks
        ]
    return found


def _custom(nodes: Iterable[Any]) -> Iterable[str]:
    for node in nodes:
        kind = getattr(node, "_forward_cls", None)
        if kind is not None and not kind.__module__.startswith(("spectra.", "torch.")):
            yield f"the custom function {kind.__name__}"
        elif node.name().startswith(_BCE):
            yield "binary_cross_entropy (use binary_cross_entropy_with_logits)"


def _routers(operator: HessianOperator) -> list[tuple[str, str]]:
    model = operator.objective.model
    return [] if model is None else discontinuous_modules(model)
