"""What is the loss of a classifier of texts or images on a table of them?"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spectra.errors import ArgumentError, TargetError
from spectra.integrations.huggingface.batching import batched, padded
from spectra.integrations.huggingface.checkpoints import Checkpoint, in_short, locate
from spectra.integrations.huggingface.loading import (
    OWN_LOSS,
    Head,
    check_fits,
    load_model,
    load_tokenizer,
    moved,
    quiet,
    require_packages,
    tokenized,
)
from spectra.integrations.huggingface.tables import Row, Source, cell, rows_of, text_of
from spectra.objective import losses

__all__ = ["classifier"]

_TEXTS = Head("AutoModelForSequenceClassification", "classification", "classification")
_IMAGES = Head("AutoModelForImageClassification", "classification", "classification")


def classifier(
    model_dir: str | Path,
    table: Source,
    *,
    text: str = "text",
    image: str = "image",
    label: str = "label",
    tokens_per_sequence: int = 128,
    rows_per_batch: int = 8,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> tuple[nn.Module, losses.LabelledCrossEntropy, list[dict[str, Tensor]]]:
    """A classifier of texts or images and a table of them: model, loss and data to analyse.

    Nothing is downloaded, no pickle is read and no code from the checkpoint is run.

    Parameters
    ----------
    model_dir
        A directory with `config.json` and `*.safetensors`, and with the files of the tokenizer or
        image processor; or that of a PEFT adapter whose base model is such a directory.
    table
        A `datasets.Dataset`, a list of dicts, or a CSV or JSONL file. All its rows are used.
    text, image
        The column of texts, or of images (PIL images or arrays, which the checkpoint's image
        processor prepares). A column `pixel_values` in place of images holds what the model takes.
    label
        The column of classes: integers, or names that the model's configuration knows.
    tokens_per_sequence
        Longer texts are cut to this many tokens, those that the tokenizer adds included.
    rows_per_batch
        Texts or images in a batch: memory, not the result, depends on it.
    dtype, device
        Of the model.

    Returns
    -------
    tuple
        `(model, loss, data)` as `HessianOperator` takes them: the model in evaluation mode,
        `losses.classification()`, and batches with the model's inputs and `labels`.

    Raises
    ------
    TargetError
        A file, package or column is missing, the checkpoint is not one of a classifier into one
        class of several, or a label is none of its classes.
    ArgumentError
        A length is impossible for this model.
    """
    if tokens_per_sequence < 1 or rows_per_batch < 1:
        msg = (
            f"tokens_per_sequence={tokens_per_sequence}, rows_per_batch={rows_per_batch}; expected "
            "at least 1"
        )
        raise ArgumentError(msg)
    checkpoint = locate(Path(model_dir))
    rows = list(rows_of(table))
    if not rows:
        msg = "the table has no rows"
        raise TargetError(msg)
    named = [cell(row, label, number) for number, row in enumerate(rows)]
    require_packages(checkpoint)
    if any("ForImage" in name for name in checkpoint.config.get("architectures") or []):
        pixels = _pixels(checkpoint, rows, image)
        model = _loaded(checkpoint, _IMAGES, dtype)
        inputs = [{"pixel_values": some.to(dtype)} for some in pixels.split(rows_per_batch)]
    else:
        encoded = _encoded(checkpoint, rows, text, tokens_per_sequence)
        model = _loaded(checkpoint, _TEXTS, dtype)
        check_fits(model, checkpoint, [row["input_ids"] for row in encoded])
        filler = model.config.pad_token_id
        # Without one, such a model cannot tell where a text of a batch ends.
        size = 1 if filler is None else rows_per_batch
        inputs = [_text_batch(some, filler or 0) for some in batched(encoded, size)]
    labels = torch.tensor([_class_of(name, model.config, i) for i, name in enumerate(named)])
    sizes = [len(next(iter(batch.values()))) for batch in inputs]
    data = [
        {**batch, "labels": some} for batch, some in zip(inputs, labels.split(sizes), strict=True)
    ]
    return moved(model, device), losses.classification(), data


def _loaded(checkpoint: Checkpoint, head: Head, dtype: torch.dtype) -> Any:
    model = load_model(checkpoint, head, dtype)
    kind, classes = getattr(model.config, "problem_type", None), model.config.num_labels
    # As transformers decides it: a single output without a kind is regression.
    if kind not in {None, "single_label_classification"} or classes < 2:
        msg = (
            f"the model in {str(checkpoint.directory)!r} (problem_type={kind!r}, {classes} "
            f"outputs) does not choose one class of several. {OWN_LOSS}"
        )
        raise TargetError(msg)
    return model


def _encoded(
    checkpoint: Checkpoint, rows: list[Row], column: str, most: int
) -> list[dict[str, list[int]]]:
    """The tokenizer's rows of integers for each text: input_ids and what goes with them."""
    tokenizer = load_tokenizer(checkpoint)
    encoded = []
    for number, row in enumerate(rows):
        tokens = tokenized(
            tokenizer, text_of(row, column, number), truncation=True, max_length=most
        )
        if not tokens["input_ids"]:
            msg = f"the tokenizer makes no tokens of the text in row {number}"
            raise TargetError(msg)
        encoded.append(tokens)
    return encoded


def _text_batch(rows: Sequence[dict[str, list[int]]], filler: int) -> dict[str, Tensor]:
    return {
        name: padded([row[name] for row in rows], filler if name == "input_ids" else 0)
        for name in rows[0]
    }


def _pixels(checkpoint: Checkpoint, rows: list[Row], column: str) -> Tensor:
    """The images (N, C, H, W) as the model takes them."""
    if "pixel_values" in rows[0]:
        arrays = [cell(row, "pixel_values", number) for number, row in enumerate(rows)]
        pixels = [torch.as_tensor(np.asarray(array, dtype=np.float64)) for array in arrays]
    else:
        pixels = _prepared(checkpoint, [cell(row, column, i) for i, row in enumerate(rows)])
    shapes = {tuple(image.shape) for image in pixels}
    if len(shapes) != 1 or len(next(iter(shapes))) != 3:
        msg = (
            f"the images have shapes {sorted(shapes)}, expected one shape (channels, height, width)"
        )
        raise TargetError(msg)
    return torch.stack(pixels)


def _prepared(checkpoint: Checkpoint, images: list[Any]) -> list[Tensor]:
    import transformers

    directory = str(checkpoint.directory)
    try:
        with quiet():
            processor = transformers.AutoImageProcessor.from_pretrained(
                directory, **checkpoint.options
            )
            return [
                # A PIL image may be grey or hold a palette.
                processor(
                    image.convert("RGB") if hasattr(image, "convert") else image,
                    return_tensors="pt",
                )["pixel_values"][0]
                for image in images
            ]
    except Exception as error:
        msg = (
            f"the image processor in {directory!r} could not prepare the images: "
            f"{in_short(error)}. A column 'pixel_values' needs none"
        )
        raise TargetError(msg) from error


def _class_of(label: Any, config: Any, number: int) -> int:
    """The index of a label that is given as an index or a name."""
    known = config.label2id or {}
    index = known.get(label, label) if isinstance(label, str) else label
    if isinstance(index, str) and index.strip().isdecimal():
        # A CSV file holds nothing but text.
        index = int(index)
    if not isinstance(index, Integral) or not 0 <= int(index) < config.num_labels:
        msg = (
            f"row {number} has the label {label!r}; the model's {config.num_labels} classes are "
            f"numbered from 0 and named {', '.join(map(repr, list(known)[:5]))}"
        )
        raise TargetError(msg)
    return int(index)
