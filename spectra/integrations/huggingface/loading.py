"""How are a model with its head, and a tokenizer, loaded from a checkpoint?

Nothing is downloaded, no pickle is read and no code from a checkpoint is run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from spectra.errors import ArgumentError, TargetError
from spectra.integrations.huggingface.checkpoints import Checkpoint, in_short

__all__ = [
    "OWN_LOSS",
    "Head",
    "check_fits",
    "load_model",
    "load_tokenizer",
    "moved",
    "quiet",
    "require_packages",
    "tokenized",
]

OWN_LOSS = (
    "To analyse it with a loss of your own, give a TARGET: a function that returns "
    "(model, loss, data)"
)


@dataclass(frozen=True)
class Head:
    """What a model must have on top, by transformers' class and in words."""

    auto_class: str
    loss: str
    name: str


def require_packages(checkpoint: Checkpoint) -> None:
    """Refuse, with the extra to install, where an optional package is missing.

    Raises
    ------
    TargetError
    """
    needed, what = ["transformers", "tokenizers"], "a Hugging Face model"
    if checkpoint.gguf is not None:
        needed, what = [*needed, "gguf", "accelerate"], "a GGUF file"
    if checkpoint.adapter is not None:
        needed, what = [*needed, "peft"], "a PEFT adapter"
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        msg = f"{what} needs {' and '.join(missing)}: pip install 'hessian-spectra[hf]'"
        raise TargetError(msg)


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The tokenizer; that saved with an adapter where there is one.

    Raises
    ------
    TargetError
        It cannot be loaded.
    """
    import transformers

    directory = checkpoint.directory
    if checkpoint.adapter and (checkpoint.adapter / "tokenizer_config.json").is_file():
        directory = checkpoint.adapter
    try:
        with quiet():
            return transformers.AutoTokenizer.from_pretrained(str(directory), **checkpoint.options)
    except Exception as error:
        msg = f"no tokenizer could be loaded from {str(directory)!r}: {in_short(error)}"
        raise TargetError(msg) from error


def tokenized(tokenizer: Any, text: str, **options: Any) -> dict[str, list[int]]:
    """What a tokenizer makes of a text: `input_ids`, and what else goes with them.

    Raises
    ------
    TargetError
        It fails.
    """
    try:
        with quiet():
            return dict(tokenizer(text, **options))
    except Exception as error:
        msg = f"the tokenizer could not read the text: {in_short(error)}"
        raise TargetError(msg) from error


def load_model(checkpoint: Checkpoint, head: Head, dtype: torch.dtype) -> Any:
    """The model with its head, in evaluation mode; of an adapted one only the adapter is trainable.

    Raises
    ------
    TargetError
        It cannot be loaded, or has no such head.
    """
    import transformers

    directory = str(checkpoint.directory)
    adapted = _adapter_shapes(checkpoint)
    classes = _classes_of(adapted)
    options = {} if classes is None else {"num_labels": classes}
    try:
        with quiet():
            model, info = getattr(transformers, head.auto_class).from_pretrained(
                directory,
                **checkpoint.options,
                **options,
                use_safetensors=True,
                dtype=dtype,
                output_loading_info=True,
            )
    except Exception as error:
        if "Unrecognized configuration class" in str(error):
            msg = f"{directory!r} holds a model without a {head.loss} loss. {OWN_LOSS}"
            raise TargetError(msg) from error
        msg = f"transformers could not load {directory!r}: {in_short(error)}"
        raise TargetError(msg) from error
    # An adapter may bring the head of a model that had none.
    if missing := sorted(set(info["missing_keys"]).difference(adapted)):
        # transformers fills the gaps with random numbers, whose Hessian nobody asked for.
        msg = (
            f"the checkpoint in {directory!r} has no {head.name} head, so no loss (or is not "
            f"whole): {type(model).__name__} has {len(missing)} weights that are not in it, "
            f"such as {missing[0]}. {OWN_LOSS}"
        )
        raise TargetError(msg)
    if hasattr(model, "set_experts_implementation"):
        # The default of mixtures of experts is a kernel that refuses double precision.
        model.set_experts_implementation("eager")
    return _adapted(model, checkpoint).eval()


def _adapter_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Shapes of the adapter's tensors by the name that each has in the model."""
    if checkpoint.adapter is None:
        return {}
    from safetensors import SafetensorError, safe_open

    path = checkpoint.adapter / "adapter_model.safetensors"
    try:
        with safe_open(path, "pt") as file:
            return {
                name.removeprefix("base_model.model."): tuple(file.get_slice(name).get_shape())
                for name in file.keys()
            }
    except (OSError, SafetensorError) as error:
        msg = f"cannot read the adapter {str(path)!r}: {in_short(error)}"
        raise TargetError(msg) from error


def _classes_of(shapes: dict[str, tuple[int, ...]]) -> int | None:
    """The number of classes of an adapter that brings a classifier; its base model has its own."""
    heads = ("score.weight", "classifier.weight", "classifier.out_proj.weight")
    return next((shape[0] for name, shape in shapes.items() if name in heads), None)


def _adapted(model: Any, checkpoint: Checkpoint) -> Any:
    if checkpoint.adapter is None:
        return model
    import peft

    place = str(checkpoint.adapter)
    try:
        with quiet():
            # Trainable: what requires a gradient is what an operator analyses by default.
            model = peft.PeftModel.from_pretrained(
                model, place, is_trainable=True, autocast_adapter_dtype=False
            )
            expected = set(peft.get_peft_model_state_dict(model))
    except Exception as error:
        msg = f"peft could not load the adapter {place!r}: {in_short(error)}"
        raise TargetError(msg) from error
    held = {f"base_model.model.{name}" for name in _adapter_shapes(checkpoint)}
    if odd := sorted(expected ^ held):
        msg = (
            f"the adapter in {place!r} and its base model {str(checkpoint.directory)!r} do not "
            f"belong together: they differ in {len(odd)} weights, such as {odd[0]}"
        )
        raise TargetError(msg)
    return model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within it transformers says nothing."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        # Its progress bars appear in pipes too. What matters comes as exceptions and loading info.
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)


def check_fits(model: Any, checkpoint: Checkpoint, sequences: list[list[int]]) -> None:
    """Refuse sequences that the model cannot take.

    Raises
    ------
    ArgumentError
        They are longer than its context.
    TargetError
        They hold tokens that it does not have.
    """
    directory = str(checkpoint.directory)
    longest = max(map(len, sequences))
    context = getattr(model.config, "max_position_embeddings", None)
    if isinstance(context, int) and longest > context:
        msg = (
            f"sequences of {longest} tokens are longer than the {context} that the model in "
            f"{directory!r} takes; cut the text into shorter ones"
        )
        raise ArgumentError(msg)
    vocabulary = len(model.get_input_embeddings().weight)
    largest = max(map(max, sequences))
    if largest >= vocabulary:
        msg = (
            f"the tokenizer in {directory!r} made token {largest}, but the model has only "
            f"{vocabulary}: they do not belong together"
        )
        raise TargetError(msg)


def moved(model: nn.Module, device: str | torch.device) -> nn.Module:
    """The model on a device.

    Raises
    ------
    TargetError
        There is no such device.
    """
    try:
        return model.to(device)
    # PyTorch built without a back end raises AssertionError.
    except (RuntimeError, AssertionError) as error:
        msg = f"the model cannot be moved to device {str(device)!r}: {in_short(error)}"
        raise TargetError(msg) from error
