"""What is the loss of one batch, and over how many terms does its mean run?

A loss is any function `loss(model, batch) -> scalar tensor`. Two attributes make it exact on
batches of unequal size: `weight(batch)`, the number of terms its mean runs over, and `reduction`,
"mean" or "sum". The losses here carry both; for a plain function the weight is the number of
samples. A third one, `separable = True`, says that the loss compares no sample with another, so
that batches may be split where memory is short. `regularised` adds a penalty on the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from spectra.errors import ArgumentError, ArgumentTypeError, DataError, LossError
from spectra.objective.batches import tensors_of
from spectra.objective.cross_entropy import linear_cross_entropy
from spectra.objective.heads import token_cross_entropy
from spectra.objective.parameters import Selection, all_parameters, matching

__all__ = [
    "CausalLM",
    "LabelledCrossEntropy",
    "Regularised",
    "Supervised",
    "causal_lm",
    "classification",
    "linear_cross_entropy",
    "masked_lm",
    "number_of_samples",
    "regularised",
    "supervised",
    "weight_decay",
]

# Label that PyTorch and Hugging Face give to tokens that do not count.
_IGNORED = -100
# Criteria whose mean runs over samples (rows of the target), not over entries of the target.
_PER_SAMPLE = (
    nn.MultiLabelMarginLoss,
    nn.MultiLabelSoftMarginLoss,
    nn.MultiMarginLoss,
    nn.CosineEmbeddingLoss,
)
# Functions whose mean runs over entries of the target, or over those that count.
_PER_ENTRY = {
    functional.mse_loss,
    functional.l1_loss,
    functional.smooth_l1_loss,
    functional.huber_loss,
    functional.binary_cross_entropy,
    functional.binary_cross_entropy_with_logits,
}
# These accept tensors of different shapes.
_BROADCASTING = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)
_BROADCASTING_FUNCTIONS = {
    functional.mse_loss,
    functional.l1_loss,
    functional.smooth_l1_loss,
    functional.huber_loss,
}
_PER_TARGET = {functional.cross_entropy, functional.nll_loss}


def supervised(criterion: Callable[[Tensor, Tensor], Tensor]) -> Supervised:
    """Loss of `(inputs, targets)` batches: `criterion(model(inputs), targets)`.

    Parameters
    ----------
    criterion
        A loss module such as `torch.nn.CrossEntropyLoss()`, or a function of predictions and
        targets. The weight of a batch is the number of terms in the criterion's mean: target
        entries, or for cross-entropy the targets that are not `ignore_index`, counted with their
        class weights. For a function other than those of `torch.nn.functional` that correspond to
        such modules with their defaults, it is the number of samples.

    Raises
    ------
    ArgumentError
        The criterion does not reduce to a scalar (`reduction="none"`).
    """
    return Supervised(criterion)


def causal_lm(ignore_index: int = _IGNORED) -> CausalLM:
    """Next-token cross-entropy of Hugging Face style batches; every target token counts once.

    Batches are mappings with `input_ids` (B, T), optionally `attention_mask` and `labels` (B, T);
    without labels the inputs are their own, padding left out. The weight of a batch is the number
    of target tokens that count. The logits come from the model's `logits`, or from its output if
    that is a tensor; the loss is computed in their dtype, so that a float64 model has a float64
    Hessian (Hugging Face's own loss computes in float32), and in float32 for half precision.

    Large logits are made in chunks of tokens where they come from an `nn.Linear`, as those of
    nearly all models do, up to a scale or a soft cap; a trial on 8 tokens finds it. The size of the
    chunks, or why there are none, is in `loss_head` of the loss and of the operator's `describe()`.
    """
    return CausalLM(ignore_index)


def masked_lm(ignore_index: int = _IGNORED) -> LabelledCrossEntropy:
    """Cross-entropy of the labelled tokens of Hugging Face style batches; each counts once.

    Batches are mappings with `labels` (B, T), and all else that the model takes: `input_ids` with
    the masks in place, `attention_mask`. Nothing is shifted, so this is the loss of token
    classification too, and of an encoder-decoder whose batches hold `decoder_input_ids`. The weight
    of a batch is the number of labels that are not `ignore_index`. Logits as for `causal_lm`.
    """
    return LabelledCrossEntropy("masked_lm", ignore_index)


def classification(ignore_index: int = _IGNORED) -> LabelledCrossEntropy:
    """Cross-entropy of Hugging Face style batches with a class for every sample.

    Batches are mappings with `labels` (B,), and all else that the model takes: `input_ids` and
    `attention_mask`, or `pixel_values`. The weight of a batch is the number of labels that are not
    `ignore_index`. Logits as for `causal_lm`.
    """
    return LabelledCrossEntropy("classification", ignore_index)


def regularised(
    loss: Callable[[nn.Module, Any], Tensor], penalty: Callable[[nn.Module], Tensor]
) -> Regularised:
    """A loss and a penalty on the weights together, ℓ_b(θ) + r(θ): the full objective.

    Every batch has the whole penalty, so that it is once in their weighted mean, however they are
    split.

    Parameters
    ----------
    loss
        Any `loss(model, batch) -> scalar` that is a mean; its weights stay.
    penalty
        `penalty(model) -> scalar`, such as `weight_decay(5e-4)`.

    Raises
    ------
    ArgumentError
        The loss is a sum over its batch.
    """
    return Regularised(loss, penalty)


def weight_decay(strength: float, params: Selection = None) -> WeightDecay:
    """The penalty strength/2 · ‖θ‖², whose Hessian is strength · I: what L2 weight decay descends.

    SGD's, Adam's and RMSprop's `weight_decay=strength` adds its gradient to that of the loss;
    AdamW's is no part of any loss.

    Parameters
    ----------
    strength
        Of the decay, >= 0.
    params
        Which parameters decay, as for `HessianOperator`: globs over names, or a function `(name,
        parameter) -> bool`. None for all of the model's, tied ones once; those held fixed add a
        constant to the value.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        No number, or one below zero.
    """
    return WeightDecay(strength, params)


class Supervised:
    """See `supervised`."""

    def __init__(self, criterion: Callable[[Tensor, Tensor], Tensor]) -> None:
        if not callable(criterion):
            msg = f"expected a criterion such as nn.CrossEntropyLoss(), got {criterion!r}"
            raise ArgumentTypeError(msg)
        if isinstance(criterion, type):
            msg = f"{criterion.__name__} is a class; pass an instance, {criterion.__name__}()"
            raise ArgumentTypeError(msg)
        self.criterion = criterion
        self.reduction: str = getattr(criterion, "reduction", "mean")
        if self.reduction not in {"mean", "sum", "batchmean"}:
            msg = (
                f"{type(criterion).__name__} has reduction={self.reduction!r}, which gives no "
                "scalar; use reduction='mean' or 'sum'"
            )
            raise ArgumentError(msg)
        self._per_sample = self.reduction == "batchmean" or isinstance(criterion, _PER_SAMPLE)
        # PyTorch's own compare no sample with another; what others do is not known.
        own = type(criterion).__module__ == nn.modules.loss.__name__
        self.separable = own or criterion in _PER_ENTRY | _PER_TARGET
        if self.reduction == "batchmean":
            self.reduction = "mean"

    def __repr__(self) -> str:
        name = getattr(self.criterion, "__name__", repr(self.criterion))
        return f"supervised({name})"

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of one batch."""
        inputs, targets = self._split(batch)
        if isinstance(inputs, Mapping):
            predictions = model(**inputs)
        elif isinstance(inputs, list | tuple):
            predictions = model(*inputs)
        else:
            predictions = model(inputs)
        self._refuse_broadcasting(predictions, targets)
        return self.criterion(predictions, targets)

    def _refuse_broadcasting(self, predictions: Any, targets: Any) -> None:
        """(B, 1) beside (B,) would be compared as (B, B): every prediction with every target."""
        criterion = self.criterion
        if not (isinstance(criterion, _BROADCASTING) or criterion in _BROADCASTING_FUNCTIONS):
            return
        if not (isinstance(predictions, Tensor) and isinstance(targets, Tensor)):
            return
        if predictions.shape != targets.shape:
            msg = (
                f"the model's predictions have the shape {tuple(predictions.shape)} and the "
                f"targets {tuple(targets.shape)}: {self!r} would compare each of one with several "
                "of the other; give them one shape (targets.unsqueeze(1), model(x).squeeze(1))"
            )
            raise LossError(msg)

    def weight(self, batch: Any) -> float:
        """Number of terms in the mean of this batch."""
        _, targets = self._split(batch)
        criterion = self.criterion
        if not isinstance(targets, Tensor):
            return number_of_samples(batch)
        if isinstance(criterion, nn.CrossEntropyLoss | nn.NLLLoss):
            return _class_weight(targets, criterion.ignore_index, criterion.weight)
        if criterion in _PER_TARGET:
            return _class_weight(targets, _IGNORED, None)
        if self._per_sample:
            return float(len(targets)) if targets.dim() else 1.0
        if isinstance(criterion, nn.Module) or criterion in _PER_ENTRY:
            return float(targets.numel())
        return number_of_samples(batch)

    @staticmethod
    def _split(batch: Any) -> tuple[Any, Any]:
        if isinstance(batch, list | tuple) and len(batch) == 2:
            return batch[0], batch[1]
        shape = f" of {len(batch)}" if isinstance(batch, Sequence | Mapping) else ""
        msg = (
            f"supervised() takes batches (inputs, targets), got a {type(batch).__name__}{shape}; "
            "for a single batch pass data=[(inputs, targets)], for other batches your own "
            "loss(model, batch)"
        )
        raise DataError(msg)


class CausalLM:
    """See `causal_lm`."""

    reduction = "mean"
    separable = True

    def __init__(self, ignore_index: int) -> None:
        self.ignore_index = ignore_index
        self.loss_head: str | None = None
        """Of the last batch: how large logits were made. None where they are small."""

    def __repr__(self) -> str:
        return "causal_lm()"

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of one batch."""
        # The last place of a sequence predicts nothing.
        targets = functional.pad(self._targets(batch), (0, 1), value=self.ignore_index)
        loss, self.loss_head = token_cross_entropy(
            model, _inputs(model, batch), targets, self.ignore_index
        )
        return loss

    def weight(self, batch: Any) -> float:
        """Number of target tokens that count."""
        return float((self._targets(batch) != self.ignore_index).sum())

    def _targets(self, batch: Any) -> Tensor:
        """Labels (B, T - 1) of the tokens to predict."""
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            what = f"keys {list(batch)}" if isinstance(batch, Mapping) else type(batch).__name__
            msg = (
                f"causal_lm() takes batches with 'input_ids' (and 'attention_mask', 'labels'), "
                f"got {what}"
            )
            raise DataError(msg)
        labels = batch.get("labels")
        if labels is None:
            labels = batch["input_ids"]
            mask = batch.get("attention_mask")
            if mask is not None:
                labels = labels.masked_fill(mask == 0, self.ignore_index)
        targets: Tensor = labels[:, 1:]
        return targets


class LabelledCrossEntropy:
    """See `masked_lm` and `classification`."""

    reduction = "mean"
    separable = True

    def __init__(self, name: str, ignore_index: int) -> None:
        self.name = name
        self.ignore_index = ignore_index
        # How the logits of the last batch were made, where they are large.
        self.loss_head: str | None = None

    def __repr__(self) -> str:
        return f"{self.name}()"

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of one batch."""
        loss, self.loss_head = token_cross_entropy(
            model, _inputs(model, batch), self._labels(batch), self.ignore_index
        )
        return loss

    def weight(self, batch: Any) -> float:
        """Number of labels that count."""
        return float((self._labels(batch) != self.ignore_index).sum())

    def _labels(self, batch: Any) -> Tensor:
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if not isinstance(labels, Tensor):
            what = f"keys {list(batch)}" if isinstance(batch, Mapping) else type(batch).__name__
            msg = f"{self.name}() takes batches with 'labels' and the model's inputs, got {what}"
            raise DataError(msg)
        if labels.is_floating_point():
            msg = (
                f"{self.name}() takes classes as integers, got labels of {labels.dtype}; for "
                "regression or several classes at once write your own loss(model, batch)"
            )
            raise DataError(msg)
        return labels


class Regularised:
    """See `regularised`."""

    reduction = "mean"

    def __init__(
        self, loss: Callable[[nn.Module, Any], Tensor], penalty: Callable[[nn.Module], Tensor]
    ) -> None:
        for name, given in (("loss", loss), ("penalty", penalty)):
            if isinstance(given, type) or not callable(given):
                what = f"the class {given.__name__}" if isinstance(given, type) else repr(given)
                msg = f"{name} is {what}; expected a function of the model"
                raise ArgumentTypeError(msg)
        if isinstance(loss, nn.modules.loss._Loss):
            msg = (
                f"loss is the criterion {type(loss).__name__}; wrap it: "
                f"spectra.losses.supervised({type(loss).__name__}())"
            )
            raise ArgumentTypeError(msg)
        if isinstance(loss, WeightDecay):
            msg = (
                "loss is a penalty, a weight_decay; pass the loss first: regularised(loss, penalty)"
            )
            raise ArgumentTypeError(msg)
        if getattr(loss, "reduction", "mean") != "mean":
            msg = (
                f"{loss!r} is a sum over its batch, so that a sum over batches would count the "
                "penalty once for each; use reduction='mean' and divide the penalty by the number "
                "of terms"
            )
            raise ArgumentError(msg)
        self.loss = loss
        self.penalty = penalty
        self.separable: bool = getattr(loss, "separable", False)

    def __repr__(self) -> str:
        names = (getattr(f, "__qualname__", repr(f)) for f in (self.loss, self.penalty))
        return f"regularised({', '.join(names)})"

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of one batch and the penalty."""
        value, penalty = self.loss(model, batch), self.penalty(model)
        if not isinstance(penalty, Tensor) or penalty.numel() != 1:
            what = (
                f"of shape {tuple(penalty.shape)}"
                if isinstance(penalty, Tensor)
                else f"a {type(penalty).__name__}"
            )
            msg = f"the penalty is {what}; expected a scalar tensor"
            raise LossError(msg)
        # In the dtype of the loss, whatever the penalty was summed in; what is no tensor is
        # refused as that of any loss.
        return value + penalty.reshape(()).to(value) if isinstance(value, Tensor) else value

    def weight(self, batch: Any) -> float:
        """That of the loss."""
        counted: Callable[[Any], float] = getattr(self.loss, "weight", number_of_samples)
        return counted(batch)

    @property
    def loss_head(self) -> str | None:
        """That of the loss."""
        head: str | None = getattr(self.loss, "loss_head", None)
        return head


class WeightDecay:
    """See `weight_decay`."""

    def __init__(self, strength: float, params: Selection) -> None:
        if isinstance(strength, bool) or not isinstance(strength, int | float | np.number):
            msg = f"strength is a {type(strength).__name__}; expected a number"
            raise ArgumentTypeError(msg)
        if not 0 <= strength < math.inf:
            msg = f"strength={strength}; expected a finite number >= 0"
            raise ArgumentError(msg)
        self.strength = float(strength)
        self.params = params

    def __repr__(self) -> str:
        which = "" if self.params is None else f", {self.params!r}"
        return f"weight_decay({self.strength:g}{which})"

    def __call__(self, model: nn.Module) -> Tensor:
        """The penalty of a model."""
        chosen = matching(all_parameters(model), "*" if self.params is None else self.params)
        squares = [
            # Not rounded to half precision; summed in float64, as single precision is off by 1e-3
            # for a large model.
            parameter.to(torch.promote_types(parameter.dtype, torch.float32))
            .square()
            .sum(dtype=torch.float64)
            for _, parameter in chosen
            if parameter.is_floating_point()
        ]
        first = chosen[0][1]
        total = torch.zeros((), dtype=torch.float64, device=first.device)
        for square in squares:
            total = total + square.to(first.device)
        return total * (self.strength / 2)


def _inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """What the model gets of a batch: all but its labels."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    # A cache of keys and values would only hold memory: no token is generated here.
    if hasattr(getattr(model, "config", None), "use_cache"):
        inputs["use_cache"] = False
    return inputs


def number_of_samples(batch: Any) -> float:
    """Length of the first dimension, which the tensors of a batch share: the default weight.

    A batch that is None (a loss that brings its own data) has weight 1.

    Raises
    ------
    DataError
        The batch holds no tensor to count samples in, or tensors of several lengths.
    """
    if batch is None:
        return 1.0
    lengths = {tensor.shape[0] if tensor.dim() else None for tensor in tensors_of(batch)}
    if not lengths:
        msg = (
            f"cannot tell how many samples a {type(batch).__name__} holds, because there is no "
            "tensor in it; pass weight=, a function of the batch"
        )
        raise DataError(msg)
    if len(lengths) > 1:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_of(batch)[:6])
        msg = (
            f"cannot tell how many samples a batch has whose tensors have the shapes {shapes}: "
            "their first dimensions differ. Pass weight=, a function of the batch that counts the "
            "terms in its mean, such as lambda batch: len(batch[1])"
        )
        raise DataError(msg)
    length = lengths.pop()
    return 1.0 if length is None else float(length)


def _class_weight(targets: Tensor, ignore_index: int, class_weights: Tensor | None) -> float:
    if targets.is_floating_point():
        # Class probabilities: PyTorch divides by the number of distributions, (N, C, ...) -> N...
        classes = targets.shape[1] if targets.dim() > 1 else targets.shape[0]
        return targets.numel() / max(classes, 1)
    counts = targets != ignore_index
    if class_weights is None:
        return float(torch.count_nonzero(counts))
    return float(class_weights.to(targets.device)[targets[counts]].sum(dtype=torch.float64))
