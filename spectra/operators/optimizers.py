"""How does a running optimiser rescale the curvature, and how much of it can it bear?

A step is θ ← θ − η P⁻¹ m, with m a running mean of gradients and P a positive diagonal that
adaptive methods keep. On a quadratic a direction of curvature h oscillates and grows as soon as
z = −1 is a root of its characteristic polynomial: where the eigenvalues of P^(−1/2) H P^(−1/2)
reach a threshold that follows from η and the momentum alone. All of it is read from the
optimiser's own groups and state, neither of which is changed.

References: Cohen et al., 2021, "Gradient descent on neural networks typically occurs at the edge of
stability"; Cohen et al., 2022, "Adaptive gradient methods at the edge of stability".
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from spectra.errors import ArgumentError, ArgumentTypeError, NonFiniteError
from spectra.objective.parameters import ParameterSpace
from spectra.operators.base import SymmetricOperator

__all__ = [
    "StabilityThreshold",
    "acts_on",
    "has_metric",
    "preconditioner",
    "stability_threshold",
]

# Options of a group of parameters, and what an optimiser notes of one parameter.
Group: TypeAlias = Mapping[str, Any]
State: TypeAlias = Mapping[str, Any]

# Below, the first steps of Adam are larger than its learning rate says, by more than this shows.
_SETTLED = 0.99


@dataclass(frozen=True)
class StabilityThreshold:
    """The curvature at which the steps of an optimiser begin to overshoot.

    Attributes
    ----------
    value
        What the largest eigenvalue of the (preconditioned) Hessian is to be compared with; inf
        where the learning rate is 0.
    formula
        How it follows from the options, in their names.
    optimizer
        Its class.
    preconditioned
        Whether it is for `preconditioned(H, optimizer)`, not for H itself.
    notes
        What else is to be known before the two are compared.
    """

    value: float
    formula: str
    optimizer: str
    preconditioned: bool
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        of = "preconditioned Hessian" if self.preconditioned else "Hessian"
        line = f"{self.optimizer} is stable below {self.value:.6g} = {self.formula}, of the {of}"
        return "\n".join([line, *(f"note: {note}" for note in self.notes)])


@dataclass(frozen=True)
class _Rule:
    """What spectra knows of one class of optimisers.

    Attributes
    ----------
    ratio
        The threshold times the learning rate, and its formula, of a group.
    denominator
        P of one parameter, after its last step; None where the class has none.
    """

    ratio: Callable[[Group], tuple[float, str]]
    denominator: Callable[[Group, State], Tensor] | None = None


def preconditioner(optimizer: Optimizer, operator: SymmetricOperator) -> Tensor:
    """The diagonal P that the optimiser divides its steps by, for the parameters of an operator.

    That of its last step θ ← θ − η P⁻¹ m̂: √v̂ + eps for Adam and AdamW, with the bias correction
    of its step count (and the maximum of amsgrad), √v + eps for RMSprop, less the squared mean
    where it is centred, √(sum) + eps for Adagrad; 1 for SGD. In the next step P differs by the next
    gradient's share, 1 − β₂. Cohen et al. (2022) multiply Adam's by 1 − β₁ᵗ, which soon is 1.

    Where groups have different learning rates, P is divided by each one's share in the largest, so
    that all of the step is −η P⁻¹ m̂ with the largest learning rate η.

    Parameters
    ----------
    optimizer
        `torch.optim` SGD, Adam, AdamW, RMSprop or Adagrad, or what Accelerate or Lightning wrap
        around one.
    operator
        A HessianOperator of the model that is trained, or a transform of one.

    Returns
    -------
    Tensor
        (n,), of the operator's dtype, computed in float64.

    Raises
    ------
    ArgumentError
        A parameter is not in the optimiser, was not stepped yet or does not move; P has a zero; the
        operator has no parameters.
    ArgumentTypeError
        No optimiser, or one of another class.
    NonFiniteError
        The optimiser's state holds nan or inf.
    """
    optimizer, rule = _known(optimizer)
    space, tensors = _parameters_of(operator)
    largest = _largest_rate(optimizer)
    groups = {_memory(p): (group, p) for group in optimizer.param_groups for p in group["params"]}
    parts: dict[str, Tensor] = {}
    for name, tensor in zip(space.names, tensors, strict=True):
        if tensor.numel() == 0:
            parts[name] = torch.ones_like(tensor, dtype=torch.float64)
            continue
        if _memory(tensor) not in groups:
            msg = (
                f"parameter {name!r} is not in the {type(optimizer).__name__}; make the operator "
                "of the very model that is trained, and leave out with params= what is not"
            )
            raise ArgumentError(msg)
        group, parameter = groups[_memory(tensor)]
        part = _denominator(rule, optimizer, group, parameter, name)
        parts[name] = part / _share(group, largest, name)
        _check_positive(parts[name], name)
    return space.flatten(parts)


def has_metric(optimizer: Optimizer) -> bool:
    """Whether there is a preconditioner already: of most classes only after a step.

    Raises
    ------
    ArgumentTypeError
        No optimiser, or one of another class.
    """
    optimizer, rule = _known(optimizer)
    return rule.denominator is None or bool(optimizer.state)


def acts_on(optimizer: Optimizer, tensors: Iterable[Tensor]) -> bool:
    """Whether any of the tensors is among those that the optimiser moves."""
    optimizer, _ = _known(optimizer)
    own = {_memory(p) for group in optimizer.param_groups for p in group["params"]}
    return any(_memory(tensor) in own for tensor in tensors)


def stability_threshold(optimizer: Optimizer) -> StabilityThreshold:
    """The largest curvature at which the optimiser's steps do not diverge on a quadratic.

    2/η for gradient descent, (2 + 2β)/η with momentum β, (2 + 2β)/((1 + 2β)η) for Nesterov's; for
    Adam (2 + 2β₁)/((1 − β₁)η), for RMSprop 2/η (with momentum (2 + 2β)/η), both of the
    preconditioned Hessian. Decay that is decoupled, as AdamW's λ, gives 2 − ηλ in place of 2. One
    that is added to the gradient is a part of the objective, and so of its Hessian.

    Where groups differ, the smallest of their thresholds, for the largest learning rate and the
    Hessian preconditioned by `preconditioner`, which takes up the differences of the rates.

    Parameters
    ----------
    optimizer
        As for `preconditioner`. Before its first step, too.

    Raises
    ------
    ArgumentTypeError
        No optimiser, or one of another class.

    Notes
    -----
    With z an eigenvalue of the step on θ²h/2 (after scaling by P), heavy-ball momentum has
    z² − z(1 + β − ηh) + β = 0, Adam z² − z[(1 − ηλ) + β₁ − η(1 − β₁)h] + β₁(1 − ηλ) = 0; z = −1
    gives the threshold. P is taken as fixed: it changes slowly beside the oscillation. Adam's bias
    correction makes its first steps larger, so the threshold after t of them is lower by 1 − β₁ᵗ.
    """
    optimizer, rule = _known(optimizer)
    groups = [group for group in optimizer.param_groups if group["params"]]
    largest = _largest_rate(optimizer)
    rates = {float(group["lr"]) for group in groups}
    moving = [group for group in groups if float(group["lr"]) > 0] or groups
    ratios = [rule.ratio(group) for group in moving]
    ratio, formula = min(ratios)
    notes = list(_notes(optimizer, groups))
    if len(rates) > 1:
        notes.insert(0, f"lr is the largest of {len(rates)}; preconditioned() takes up the others")
    if len({value for value, _ in ratios}) > 1:
        most = max(ratios)[0] / largest
        notes.insert(0, f"the smallest of the groups' thresholds, which reach up to {most:.6g}")
    return StabilityThreshold(
        value=_first_step_correction(optimizer, groups) * ratio / largest if largest else math.inf,
        formula=formula,
        optimizer=type(optimizer).__name__,
        preconditioned=rule.denominator is not None or len(rates) > 1,
        notes=tuple(notes),
    )


# --- what the classes of torch.optim do ----------------------------------------------------------


def _sgd_ratio(group: Group) -> tuple[float, str]:
    beta, dampening = float(group["momentum"]), float(group["dampening"])
    if not beta:
        # Dampening is a part of momentum: without, torch has none.
        return 2.0, "2 / lr"
    if group["nesterov"]:
        return 2 * (1 + beta) / (1 + 2 * beta), "2 (1 + momentum) / ((1 + 2 momentum) lr)"
    if dampening:
        ratio = 2 * (1 + beta) / (1 - dampening) if dampening < 1 else math.inf
        return ratio, "2 (1 + momentum) / ((1 - dampening) lr)"
    return 2 * (1 + beta), "2 (1 + momentum) / lr"


def _adam_ratio(group: Group) -> tuple[float, str]:
    beta = float(group["betas"][0])
    decay = float(group["lr"]) * _decoupled_decay(group)
    two = "(2 - lr weight_decay)" if decay else "2"
    return (2 - decay) * (1 + beta) / (1 - beta), f"{two} (1 + beta1) / ((1 - beta1) lr)"


def _adamw_ratio(group: Group) -> tuple[float, str]:
    # Before 2.7 the groups of torch's AdamW do not say that its decay is decoupled.
    return _adam_ratio({"decoupled_weight_decay": True, **group})


def _rmsprop_ratio(group: Group) -> tuple[float, str]:
    beta = float(group["momentum"])
    return 2 * (1 + beta), "2 (1 + momentum) / lr" if beta else "2 / lr"


def _adagrad_ratio(_group: Group) -> tuple[float, str]:
    return 2.0, "2 / lr"


def _adam_denominator(group: Group, state: State) -> Tensor:
    square = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"].double()
    correction = 1 - float(group["betas"][1]) ** float(state["step"])
    return (square / correction).sqrt() + group["eps"]


def _rmsprop_denominator(group: Group, state: State) -> Tensor:
    square = state["square_avg"].double()
    if group["centered"]:
        square = square - state["grad_avg"].double().square()
    return square.sqrt() + group["eps"]


def _adagrad_denominator(group: Group, state: State) -> Tensor:
    decay = 1 + (float(state["step"]) - 1) * group["lr_decay"]
    return (state["sum"].double().sqrt() + group["eps"]) * decay


_RULES: dict[type[Optimizer], _Rule] = {
    SGD: _Rule(_sgd_ratio),
    AdamW: _Rule(_adamw_ratio, _adam_denominator),
    Adam: _Rule(_adam_ratio, _adam_denominator),
    RMSprop: _Rule(_rmsprop_ratio, _rmsprop_denominator),
    Adagrad: _Rule(_adagrad_ratio, _adagrad_denominator),
}


def _decoupled_decay(group: Group) -> float:
    return float(group["weight_decay"]) if group.get("decoupled_weight_decay") else 0.0


def _notes(optimizer: Optimizer, groups: list[dict[str, Any]]) -> Iterator[str]:
    """What has to be done to the Hessian before it is compared, or is not in the formula."""
    coupled = {
        float(group["weight_decay"])
        for group in groups
        if not (isinstance(optimizer, AdamW) or group.get("decoupled_weight_decay"))
    } - {0.0}
    if coupled:
        values = ", ".join(f"{value:g}" for value in sorted(coupled))
        yield (
            f"weight_decay={values} is added to the gradient, so that it is a part of the Hessian: "
            "put it into the loss with losses.weight_decay, or use shifted()"
        )
    if any(group.get("maximize") for group in groups):
        yield "maximize=True: the steps go uphill, and the Hessian to compare with is -H"
    if not any(float(group["lr"]) for group in groups):
        yield "the learning rate is 0: nothing moves"
    if _first_step_correction(optimizer, groups) < _SETTLED:
        yield (
            "in these first steps Adam's are larger than lr says, so that the threshold is lower "
            "than the formula by the factor 1 - beta1^t after t of them"
        )


def _first_step_correction(optimizer: Optimizer, groups: list[dict[str, Any]]) -> float:
    """1 − β₁ᵗ, the smallest of all parameters'; 1 where there is none."""
    corrections = [
        1 - float(group["betas"][0]) ** float(state["step"])
        for group in groups
        if "betas" in group
        for p in group["params"]
        if (state := optimizer.state.get(p)) and float(state["step"]) > 0
    ]
    return min(corrections, default=1.0)


# --- which optimiser, which parameters -----------------------------------------------------------


def _known(optimizer: Any) -> tuple[Optimizer, _Rule]:
    """An optimiser by itself, out of what may be wrapped around it, and the rule for it."""
    given = optimizer
    while isinstance(optimizer, Optimizer):
        for kind, rule in _RULES.items():
            # A subclass that steps in its own way is another optimiser.
            if isinstance(optimizer, kind) and _step_of(type(optimizer)) is _step_of(kind):
                return optimizer, rule
        optimizer = getattr(optimizer, "optimizer", None)
    names = ", ".join(kind.__name__ for kind in _RULES)
    if isinstance(given, Optimizer):
        msg = (
            f"{type(given).__name__} is not among the optimisers whose steps are known ({names}); "
            "give preconditioned() its diagonal, as a tensor (n,) or by parameter name"
        )
        raise ArgumentTypeError(msg)
    msg = f"expected a torch optimiser ({names}), got a {type(given).__name__}"
    raise ArgumentTypeError(msg)


def _step_of(kind: type[Optimizer]) -> Any:
    # Torch wraps the method of a class in a profiler's hook.
    return inspect.unwrap(kind.step)


def _parameters_of(operator: Any) -> tuple[ParameterSpace, list[Tensor]]:
    """The parameters that an operator, or what it is made of, acts on."""
    inner = operator
    while (deeper := getattr(inner, "of", None)) is not None:
        inner = deeper
    objective, space = getattr(inner, "objective", None), getattr(operator, "space", None)
    if objective is None or not isinstance(space, ParameterSpace):
        msg = (
            f"a {type(operator).__name__} does not act on parameters, so that none can be looked "
            "up in the optimiser; use a HessianOperator of the model"
        )
        raise ArgumentError(msg)
    return space, objective.stored


def _memory(tensor: Tensor) -> tuple[torch.device, int, int]:
    # Not `id`: of a plain function's tensors the operator has views of its own.
    return tensor.device, tensor.data_ptr(), tensor.numel()


def _largest_rate(optimizer: Optimizer) -> float:
    return max((float(group["lr"]) for group in optimizer.param_groups), default=0.0)


def _share(group: Group, largest: float, name: str) -> float:
    """The learning rate of a group, in that of the fastest one."""
    rate = float(group["lr"])
    if rate == largest:
        return 1.0
    if rate == 0:
        msg = f"parameter {name!r} has lr=0, so that it does not move; leave it out with params="
        raise ArgumentError(msg)
    return rate / largest


def _denominator(
    rule: _Rule, optimizer: Optimizer, group: Group, parameter: Tensor, name: str
) -> Tensor:
    if rule.denominator is None:
        return torch.ones_like(parameter, dtype=torch.float64)
    # Not state[parameter], which would make an entry.
    state = optimizer.state.get(parameter)
    if not state or float(state["step"]) == 0:
        msg = (
            f"parameter {name!r} has not been stepped by the {type(optimizer).__name__} yet, so "
            "that there is no preconditioner; take a step first, and leave out with params= what "
            "gets no gradient"
        )
        raise ArgumentError(msg)
    return rule.denominator(group, state)


def _check_positive(part: Tensor, name: str) -> None:
    if not bool(torch.isfinite(part).all()):
        msg = f"the optimiser's state of parameter {name!r} holds nan or inf; the training diverged"
        raise NonFiniteError(msg)
    if float(part.min()) <= 0:
        msg = (
            f"the preconditioner of parameter {name!r} has zeros: entries without a gradient so "
            "far, and eps=0; give the optimiser an eps"
        )
        raise ArgumentError(msg)
