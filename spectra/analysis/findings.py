"""What is wrong with an operator, if anything? One small function for each thing to be checked.

Differences are relative, and measured on random vectors of norm one. What is called noise is the
relative error of a product: in a random direction it shows in uᵀHv divided by √n only.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass

from spectra.objective.modes import stochastic_modules
from spectra.operators.hessian import HessianOperator
from spectra.results import Result

__all__ = [
    "Finding",
    "batch_order",
    "compressed",
    "determinism",
    "finite_values",
    "linearity",
    "modes",
    "precision",
    "reduction",
    "symmetry",
    "unchanged",
]

# What is said of a finding stands in a column of its own, within the 80 of a terminal.
_INDENT = 30
_FOLDED = textwrap.TextWrapper(80 - _INDENT, break_on_hyphens=False)
# In units of rounding: what the order of summation may change.
_ROUNDING = 1e3
# Digits that a reader looks at; beyond the second one none is left.
_NOISY, _NO_DIGITS = 1e-3, 0.3
# What rounding may make of a loss that is put together from those of halves.
_SPLIT = 1e-3
# A repetition that differs by more is another function, and no noise of kernels.
_ANOTHER = 0.1


@dataclass(frozen=True, eq=False)
class Finding(Result):
    """What one check has found.

    Attributes
    ----------
    check
        Its name.
    level
        "ok"; "note": an answer that a reader may not expect; "warning": numbers may be wrong;
        "error": they are.
    message
        What was measured, and what it means.
    where
        Names of the parameters or modules that it is about; a `*` stands for all numbers there are.
    remedy
        What to do; empty where there is nothing.
    measured, limit
        The number that was judged and the largest that passes; None where it is no number.
    """

    check: str
    level: str
    message: str
    where: tuple[str, ...] = ()
    remedy: str = ""
    measured: float | None = None
    limit: float | None = None

    def __str__(self) -> str:
        words = [self.message]
        words += [f"where: {_listed(self.where)}"] if self.where else []
        words += [f"remedy: {self.remedy}"] if self.remedy else []
        lines = [line for text in words for line in _FOLDED.wrap(text) or [""]]
        heads = [f"{self.level:8}{self.check:22}", *[" " * _INDENT] * (len(lines) - 1)]
        return "\n".join(map(str.__add__, heads, lines))

    def in_words(self) -> str:
        """As one sentence, for the notes of a result."""
        where = f" ({_listed(self.where)})" if self.where else ""
        remedy = f". {self.remedy[:1].upper()}{self.remedy[1:]}" if self.remedy else ""
        return f"{self.check}: {self.message}{where}{remedy}"


def finite_values(value: float | None, gradient_norm: float | None) -> Finding:
    """Were loss, gradient and products finite? They raise where they are not."""
    if value is None:
        return Finding("finite values", "ok", "all products are finite")
    message = f"loss {value:.4g}, gradient norm {gradient_norm:.3g}; all products are finite"
    return Finding("finite values", "ok", message)


def symmetry(noise: float) -> Finding:
    """Is uᵀHv = vᵀHu?"""
    message = f"uᵀHv and vᵀHu differ as if products had a relative error of {noise:.1g}"
    if noise <= _NO_DIGITS:
        return Finding("symmetry", "ok", message, measured=noise, limit=_NO_DIGITS)
    return Finding(
        "symmetry",
        "error",
        f"{message}: the operator is unsymmetric or random, and its spectrum is not a Hessian's",
        remedy="a second derivative is wrong or cut off (a custom backward, .detach(), a hook on a "
        "tensor, a straight-through estimator), or the operator is no Hessian",
        measured=noise,
        limit=_NO_DIGITS,
    )


def precision(noise: float, dtypes: Iterable[str]) -> Finding:
    """How many digits do the products have?"""
    half = sorted(set(dtypes) & {"bfloat16", "float16"})
    message = f"products have a relative error of {noise:.1g}"
    # Beyond the other limit it is no question of digits.
    level = "warning" if _NOISY < noise <= _NO_DIGITS else "ok"
    if level == "ok":
        return Finding("precision", level, message, measured=noise, limit=_NOISY)
    remedy = (
        f"the model is in {half[0]}: use compute_dtype=torch.float32"
        if half
        else "use float64, or deterministic kernels; autocast in the model or the loss, .detach() "
        "and custom backward functions do this, too"
    )
    message += ": smaller eigenvalues, relative to the norm, mean nothing"
    return Finding("precision", level, message, remedy=remedy, measured=noise, limit=_NOISY)


def linearity(difference: float) -> Finding:
    """Is H(au + bv) = a Hu + b Hv? What little differs is rounding, and a case of `precision`."""
    message, limit = f"H(au + bv) and a Hu + b Hv differ by {difference:.1g}", _NO_DIGITS
    if difference <= limit:
        return Finding("linearity", "ok", message, measured=difference, limit=limit)
    return Finding(
        "linearity",
        "error",
        message,
        remedy="the operator depends on the vector (a finite difference, a normalisation, a state "
        "that changes): products of a Hessian do not",
        measured=difference,
        limit=limit,
    )


def determinism(eps: float, again: float, anew: float | None = None) -> Finding:
    """Is a product the same when it is computed again, and the gradient when evaluated anew?

    Parameters
    ----------
    eps
        Machine epsilon of the vectors.
    again, anew
        By what share a product and a gradient change; None for an operator without gradients.
    """
    message, difference = f"a product computed again differs by {again:.1g}", again
    if anew is not None:
        message += f", the gradient evaluated anew by {anew:.1g}"
        difference = max(again, anew)
    limit = _ROUNDING * eps
    if difference <= limit:
        return Finding("determinism", "ok", message, measured=difference, limit=limit)
    level = "error" if difference > _ANOTHER else "warning" if difference > _NOISY else "note"
    return Finding(
        "determinism",
        level,
        message,
        remedy="let neither model, loss nor data change between calls (a counter, a cache, an "
        "attribute), or call release() after a change; against kernels that add in any order call "
        "torch.use_deterministic_algorithms(True)",
        measured=difference,
        limit=limit,
    )


def reduction(declared: str, halves: tuple[float, float, float] | None) -> Finding:
    """Is the loss of a batch the mean over its samples, or their sum, as it is taken for?"""
    if halves is None:
        return Finding("reduction", "ok", "a batch is not split by the loss, so nothing is told")
    whole, mean, total = halves
    limit = _SPLIT * max(map(abs, halves))
    is_mean, is_sum = abs(whole - mean) <= limit, abs(whole - total) <= limit
    found = "mean" if is_mean else "sum" if is_sum else None
    if found is None or found == declared or (is_mean and is_sum):
        what = f"the {found} of those" if found else "neither the mean nor the sum of those"
        return Finding("reduction", "ok", f"the loss of a batch is {what} of its halves")
    cures = {
        "sum": "reduce by the mean in the loss, or pass reduction='sum' (without a mean over "
        "batches)",
        "mean": "leave reduction='sum' out, or sum in the loss",
    }
    return Finding(
        "reduction",
        "warning",
        f"the loss of a batch is {whole:.4g}, the {found} of those of its halves, and is taken for "
        f"a {declared}: batches count by the wrong weights, and H has another scale",
        remedy=cures[found],
        measured=abs(whole - (mean if declared == "mean" else total)) / max(abs(whole), 1e-300),
        limit=_SPLIT,
    )


def batch_order(eps: float, difference: float) -> Finding:
    """Is the gradient the same when the batches come in the opposite order?"""
    limit = math.sqrt(eps)
    message = f"with the batches in the opposite order the gradient differs by {difference:.1g}"
    if difference <= limit:
        return Finding("batch order", "ok", message, measured=difference, limit=limit)
    return Finding(
        "batch order",
        "warning",
        f"{message}: the loss is no sum over batches",
        remedy="let nothing pass from one batch to the next (a hidden state, running statistics, a "
        "memory bank), or make one batch of what belongs together",
        measured=difference,
        limit=limit,
    )


def modes(operator: HessianOperator) -> Finding:
    """Are dropout and batch norm in a state in which the loss is one function of the data?"""
    model = operator.objective.model
    found = [] if model is None else stochastic_modules(model)
    if not found:
        return Finding("dropout, batch norm", "ok", "none is in training mode")
    name, problem, _ = found[0]
    meaning = []
    if any(not statistics for _, _, statistics in found):
        meaning.append("masks are frozen, one draw for each batch, and H is that of this draw")
    if any(statistics for _, _, statistics in found):
        meaning.append("H contains the statistics of each batch, and depends on the batches")
    more = f" (and {len(found) - 1} more such modules)" if len(found) > 1 else ""
    return Finding(
        "dropout, batch norm",
        "note",
        f"module {name!r} {problem}{more}, as allowed: {'; '.join(meaning)}",
        where=compressed([name for name, *_ in found], [n for n, _ in model.named_modules()])
        if model is not None
        else (),
        remedy="call model.eval() for the loss that the model has in use",
    )


def unchanged(changed: list[str], names: Iterable[str]) -> Finding:
    """Does an evaluation leave the parameters as they are?

    Parameters
    ----------
    changed
        Parameters that it has changed, of all `names`.
    """
    if not changed:
        return Finding("weights", "ok", "an evaluation leaves them as they are")
    return Finding(
        "weights",
        "error",
        f"an evaluation of the loss changes {len(changed)} parameters through .data, so that its "
        "derivatives are not those of a function",
        where=compressed(changed, names),
        remedy="change them once, before the analysis, and not in forward()",
    )


def compressed(chosen: Iterable[str], names: Iterable[str]) -> tuple[str, ...]:
    """Those of some dotted names that are chosen; one glob where all that it matches are.

    >>> names = ["layers.0.bias", "layers.1.bias", "layers.0.weight", "layers.1.weight"]
    >>> compressed(["layers.0.bias", "layers.1.bias", "layers.1.weight"], names)
    ('layers.*.bias', 'layers.1.weight')
    """
    chosen = list(chosen)
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"(?:(?<=\.)|^)\d+(?=\.|$)", "*", name), []).append(name)
    glob_of = {name: _glob(group) for group in groups.values() for name in group}
    complete = {name for group in groups.values() if set(group) <= set(chosen) for name in group}
    return tuple(dict.fromkeys(glob_of[name] if name in complete else name for name in chosen))


def _glob(group: list[str]) -> str:
    """Dotted names of equal length, with a `*` where they are not the same."""
    parts = zip(*(name.split(".") for name in group), strict=True)
    return ".".join(own[0] if len(set(own)) == 1 else "*" for own in parts)


def _listed(names: tuple[str, ...]) -> str:
    shown = ", ".join(name or "the model itself" for name in names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
