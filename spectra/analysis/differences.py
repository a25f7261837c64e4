"""Is a product the derivative of the gradient? Compared with differences, for every parameter.

    H v ≈ (g(θ + hv) - g(θ - hv)) / 2h

Differences are a check and never a result: they lose half of the digits. Too large a step meets
the third derivative and the kinks of the loss, too small a one its rounding, eps ‖g‖ / h, so that
several are tried, and the best one counts for each parameter by itself. What no step agrees with in
single precision is tried again in double, where steps are small enough to meet no kink.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from spectra.errors import NonFiniteError, SpectraError
from spectra.objective.memory import memory_ran_out
from spectra.operators.hessian import HessianOperator

__all__ = ["Differences", "Product", "compare", "dtypes", "rounding_of", "size"]

# Lengths of the steps, relative to the norm of the weights. In double the second one is for models
# that compute some parts in single, and the last one for kinks.
_STEPS = {torch.float32: (1e-2, 1e-3, 1e-4), torch.float64: (1e-3, 1e-4, 1e-8)}
# Relative difference that passes, by the precision in which products are computed.
_LIMITS = {"float64": 1e-3, "float32": 1e-2, "float16": 0.1, "bfloat16": 0.3}
_HALF = frozenset({"bfloat16", "float16"})
# In units of eps ‖g‖ / h; networks of 74 to 3000 parameters had 1.2.
_ROUNDING = 10.0
# A step whose rounding is more than this share of the product tells nothing.
_USELESS = 0.3
# Of single precision: what the comparison in double takes at most.
_VECTORS = 16


@dataclass(frozen=True, eq=False)
class Product:
    """A product, and how exact it and a gradient are.

    Attributes
    ----------
    vector, product
        v of norm one, and H v.
    large
        Size of a gradient, of which rounding takes its share.
    noise
        Relative error of the product by rounding.
    """

    vector: Tensor
    product: Tensor
    large: float
    noise: float


@dataclass
class Differences:
    """How far a product is from differences of the gradient.

    Attributes
    ----------
    limit
        Relative difference that passes.
    relative, step
        The least one of the whole vector, and the step that it came at, relative to the weights.
    worst
        The least one over the steps, by parameter; empty where no step could tell.
    gradients
        Spent.
    in_double
        They were taken in double precision.
    """

    limit: float
    relative: float = math.inf
    step: float = math.nan
    worst: dict[str, float] = field(default_factory=dict)
    gradients: int = 0
    in_double: bool = False

    @property
    def disagreeing(self) -> list[str]:
        """Parameters in whose part of the product no step agrees."""
        return [name for name, difference in self.worst.items() if difference > self.limit]


def compare(operator: HessianOperator, known: Product) -> Differences:
    """A product against differences of the gradient along its vector.

    Costs 2 to 6 gradients; and as many in double precision where those disagree, or the model is in
    half precision, if it can be evaluated so.
    """
    used = dtypes(operator)
    # Products with few digits are compared in those.
    limit = max(*(_LIMITS[dtype] for dtype in used), min(10 * known.noise, _LIMITS["bfloat16"]))
    found = Differences(limit)
    if not used & _HALF:
        found = _compared(operator, known, limit)
    if "float64" in used or (found.worst and not found.disagreeing):
        return found
    if operator.space.affordable() < _VECTORS:
        return found
    try:
        precise = operator.computing_in(torch.float64)
        if precise is None:
            return found
        again = _compared(precise, known, limit)
    except Exception as error:
        # Some models insist on their precision, and the memory may not be there.
        if not (isinstance(error, SpectraError) or memory_ran_out(error)):
            raise
        return found
    if not again.worst:
        return found
    return replace(again, gradients=found.gradients + again.gradients, in_double=True)


def dtypes(operator: HessianOperator) -> set[str]:
    """In which products are computed, as far as the parameters tell."""
    return {str(t.dtype).removeprefix("torch.") for t in operator.objective.parameters}


def rounding_of(operator: HessianOperator) -> float:
    """Machine epsilon of the loss, as far as the parameters tell."""
    return max(torch.finfo(tensor.dtype).eps for tensor in operator.objective.parameters)


def size(operator: HessianOperator) -> float:
    """Norm of the weights, as the unit of a step."""
    space = operator.space
    # Weights that are all zero have no size.
    return space.norm(space.flatten(operator.objective.stored)) or math.sqrt(space.n)


def _compared(operator: HessianOperator, known: Product, limit: float) -> Differences:
    """At several steps, until all parameters agree."""
    space, found = operator.space, Differences(limit)
    v, product = known.vector.to(space.dtype), known.product.to(space.dtype)
    length, unit = space.norm(product), size(operator)
    for step in _STEPS[space.dtype]:
        h = step * unit
        rounding = _ROUNDING * space.eps * known.large / h
        if length and rounding > _USELESS * length:
            continue
        found.gradients += 2
        try:
            difference = operator.value_and_gradient_at(h * v)[1]
            difference -= operator.value_and_gradient_at(-h * v)[1]
        except NonFiniteError:
            continue
        difference /= 2 * h
        relative = space.norm(difference - product) / (length or rounding or 1.0)
        if relative < found.relative:
            found.relative, found.step = relative, step
        allowed = rounding + known.noise * length
        off = difference - product
        squares = [space.inner_by_parameter(x, x) for x in (product, difference, off)]
        for name, expected, measured, apart in zip(
            space.names, *map(np.sqrt, squares), strict=True
        ):
            # Relative to the parameter's own part, beyond what rounding explains.
            largest = max(expected, measured)
            own = max(0.0, apart - allowed) / largest if largest else 0.0
            found.worst[name] = min(float(own), found.worst.get(name, math.inf))
        if not found.disagreeing:
            break
    return found
