"""What is the loss of a language model on a text: of predicting what follows, or what is masked?"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spectra.errors import ArgumentError, TargetError
from spectra.integrations.huggingface.batching import IGNORED, batched, padded
from spectra.integrations.huggingface.checkpoints import Checkpoint, locate
from spectra.integrations.huggingface.loading import (
    OWN_LOSS,
    Head,
    check_fits,
    load_model,
    load_tokenizer,
    moved,
    require_packages,
    tokenized,
)
from spectra.integrations.huggingface.tables import Source, texts_of
from spectra.objective import losses

__all__ = ["causal_lm", "masked_lm"]

# Characters read for every token that is wanted. English has about four to a token; text of which
# 64 characters make less than one token is not language.
_CHARACTERS_PER_TOKEN = 64
_CAUSAL = Head("AutoModelForCausalLM", "causal language-modelling", "language-modelling")
_MASKED = Head("AutoModelForMaskedLM", "masked language-modelling", "masked language-modelling")
# Devlin et al., 2018: of the tokens 15 % are to be predicted. Of these, 80 % are masked, 10 %
# replaced by a random token, and 10 % left as they are.
_PREDICTED, _MASK, _RANDOM = 0.15, 0.8, 0.1


def causal_lm(
    model_dir: str | Path,
    source: Source,
    *,
    text: str = "text",
    tokens_per_sequence: int = 128,
    sequences_per_batch: int = 4,
    max_tokens: int = 2048,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> tuple[nn.Module, losses.CausalLM, list[dict[str, Tensor]]]:
    """A causal language model and a text: model, loss and data to analyse.

    Nothing is downloaded, no pickle is read and no code from the checkpoint is run.

    Parameters
    ----------
    model_dir
        A directory with `config.json`, `*.safetensors` and the tokenizer's files, as
        `save_pretrained` writes it; or with one GGUF file; or that file itself; or that of a PEFT
        adapter whose base model is such a directory.
    source
        Plain text in UTF-8, as one text; or a table of texts: a `datasets.Dataset`, a list of
        dicts, a CSV or JSONL file (`.csv`, `.jsonl`).
    text
        The table's column of texts.
    tokens_per_sequence
        Each text is cut into sequences of this length, without overlap. Each begins with the
        beginning-of-sequence token where the tokenizer puts one before a text. Shorter sequences
        are padded, and the padding does not count.
    sequences_per_batch
        Sequences in a batch: memory, not the result, depends on it.
    max_tokens
        Most tokens to use, from the beginning.
    dtype, device
        Of the model.

    Returns
    -------
    tuple
        `(model, loss, data)` as `HessianOperator` takes them: the model in evaluation mode,
        `losses.causal_lm()`, and batches with `input_ids` and `attention_mask`.

    Raises
    ------
    TargetError
        A file or package is missing, or the checkpoint is not one of a causal language model.
    ArgumentError
        A length is impossible for this model.
    """
    _check_lengths(tokens_per_sequence, sequences_per_batch, max_tokens, least=2)
    checkpoint, tokenizer, texts = _read_tokens(model_dir, source, text, max_tokens)
    start, _ = _special_tokens(tokenizer)
    # Others than this one, such as the end of a text, are no part of a text that goes on.
    start = start[:1] if start[:1] == [tokenizer.bos_token_id] else []
    sequences = _cut(texts, tokens_per_sequence, start, [])
    # One token alone predicts nothing.
    sequences = [sequence for sequence in sequences if len(sequence) > 1]
    if not sequences:
        msg = f"{_name(source)} holds {sum(map(len, texts))} tokens; a prediction takes at least 2"
        raise TargetError(msg)
    model = load_model(checkpoint, _CAUSAL, dtype)
    check_fits(model, checkpoint, sequences)
    _check_causal(model, checkpoint, sequences[0])
    data = [_batch(some) for some in batched(sequences, sequences_per_batch)]
    return moved(model, device), losses.causal_lm(), data


def masked_lm(
    model_dir: str | Path,
    source: Source,
    *,
    text: str = "text",
    tokens_per_sequence: int = 128,
    sequences_per_batch: int = 4,
    max_tokens: int = 2048,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> tuple[nn.Module, losses.LabelledCrossEntropy, list[dict[str, Tensor]]]:
    """A masked language model and a text: model, loss and data to analyse.

    In each sequence 15 % of the tokens are predicted, at least one: 80 % of them are masked, 10 %
    replaced by a random token, 10 % left as they are. They are drawn once, here, so the loss is a
    function. Nothing is downloaded, no pickle is read and no code from the checkpoint is run.

    Parameters
    ----------
    model_dir, source, text, sequences_per_batch, max_tokens, dtype, device
        As for `causal_lm`.
    tokens_per_sequence
        As for `causal_lm`, with the tokens that the tokenizer puts around a text.
    seed
        Of the tokens to predict. They do not depend on `sequences_per_batch`.

    Returns
    -------
    tuple
        `(model, loss, data)` as `HessianOperator` takes them: the model in evaluation mode,
        `losses.masked_lm()`, and batches with `input_ids`, `attention_mask` and `labels`.

    Raises
    ------
    TargetError
        A file or package is missing, or the checkpoint is not one of a masked language model.
    ArgumentError
        A length is impossible for this model.

    References
    ----------
    Devlin, Chang, Lee and Toutanova, 2018, "BERT: pre-training of deep bidirectional transformers
    for language understanding".
    """
    _check_lengths(tokens_per_sequence, sequences_per_batch, max_tokens, least=1)
    checkpoint, tokenizer, texts = _read_tokens(model_dir, source, text, max_tokens)
    if tokenizer.mask_token_id is None:
        msg = (
            f"the tokenizer of {str(model_dir)!r} has no mask token, so its model is no masked "
            f"language model. {OWN_LOSS}"
        )
        raise TargetError(msg)
    start, end = _special_tokens(tokenizer)
    if tokens_per_sequence <= len(start) + len(end):
        msg = (
            f"tokens_per_sequence={tokens_per_sequence} leaves no place for the text between the "
            f"{len(start) + len(end)} tokens that this tokenizer puts around it"
        )
        raise ArgumentError(msg)
    sequences = _cut(texts, tokens_per_sequence, start, end)
    model = load_model(checkpoint, _MASKED, dtype)
    check_fits(model, checkpoint, sequences)
    generator = torch.Generator().manual_seed(seed)
    inner = slice(len(start), -len(end) or None)
    masked = [
        _masked(sequence, inner, tokenizer.mask_token_id, len(tokenizer), generator)
        for sequence in sequences
    ]
    data = [
        {**_batch([s for s, _ in some]), "labels": padded([t for _, t in some], IGNORED)}
        for some in batched(masked, sequences_per_batch)
    ]
    return moved(model, device), losses.masked_lm(), data


def _check_lengths(per_sequence: int, per_batch: int, most: int, *, least: int) -> None:
    if per_sequence < least or per_batch < 1 or most < least:
        msg = (
            f"tokens_per_sequence={per_sequence}, sequences_per_batch={per_batch}, "
            f"max_tokens={most}; expected at least {least}, 1 and {least}"
        )
        raise ArgumentError(msg)


def _read_tokens(
    model_dir: str | Path, source: Source, column: str, most: int
) -> tuple[Checkpoint, Any, list[list[int]]]:
    """The checkpoint, its tokenizer, and the tokens of each text, up to `most` of all together."""
    checkpoint = locate(Path(model_dir))
    texts = texts_of(source, column, _CHARACTERS_PER_TOKEN * most)
    # Read before anything slow is loaded.
    first = next(texts, None)
    require_packages(checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    tokens_of_texts: list[list[int]] = []
    left = most
    for text in itertools.chain([] if first is None else [first], texts):
        if left == 0:
            break
        # What one text is too long for is cut up here, not a thing to warn of.
        tokens = tokenized(tokenizer, text, add_special_tokens=False, verbose=False)["input_ids"]
        tokens_of_texts.append(tokens[:left])
        left -= len(tokens_of_texts[-1])
    if left == most:
        # Where no file of a tokenizer is found, transformers makes one that knows nothing.
        msg = (
            f"the tokenizer in {str(checkpoint.directory)!r} makes no tokens of the text; its "
            "files, such as tokenizer.json, are probably missing"
        )
        raise TargetError(msg)
    return checkpoint, tokenizer, tokens_of_texts


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text."""
    bare = tokenized(tokenizer, "a", add_special_tokens=False)["input_ids"]
    whole = tokenized(tokenizer, "a")["input_ids"]
    for place in range(len(whole) - len(bare) + 1):
        if whole[place : place + len(bare)] == bare:
            return whole[:place], whole[place + len(bare) :]
    return [], []


def _cut(texts: list[list[int]], length: int, start: list[int], end: list[int]) -> list[list[int]]:
    step = length - len(start) - len(end)
    return [
        start + tokens[i : i + step] + end for tokens in texts for i in range(0, len(tokens), step)
    ]


def _masked(
    sequence: list[int], inner: slice, mask: int, vocabulary: int, generator: torch.Generator
) -> tuple[list[int], list[int]]:
    """A sequence with some of its inner tokens hidden, and the labels of those to predict."""
    shown, labels = list(sequence), [IGNORED] * len(sequence)
    places = range(len(sequence))[inner]
    count = max(1, round(_PREDICTED * len(places)))
    chosen = torch.randperm(len(places), generator=generator)[:count].tolist()
    fates = torch.rand(count, generator=generator).tolist()
    others = torch.randint(vocabulary, (count,), generator=generator).tolist()
    for chance, fate, other in zip(chosen, fates, others, strict=True):
        place = places[chance]
        labels[place] = sequence[place]
        if fate < _MASK:
            shown[place] = mask
        elif fate < _MASK + _RANDOM:
            shown[place] = other
    return shown, labels


def _check_causal(model: Any, checkpoint: Checkpoint, sequence: list[int]) -> None:
    """A masked language model loads as well, but sees the tokens that it is to predict."""
    tokens = torch.tensor([sequence[:8]])
    changed = tokens.clone()
    changed[0, 1:] = (changed[0, 1:] + 1) % len(model.get_input_embeddings().weight)
    with torch.no_grad():
        before, after = (model(input_ids=t).logits[0, 0] for t in (tokens, changed))
    # Rounding may depend on the other tokens, in a mixture of experts for one.
    rounding = 32 * torch.finfo(before.dtype).eps * before.abs().max()
    if bool((after - before).abs().max() > rounding):
        msg = (
            f"the model in {str(checkpoint.directory)!r} is not causal: what it predicts depends "
            f"on later tokens, as in a masked language model; for its own loss use masked_lm, or "
            f"--task masked. {OWN_LOSS}"
        )
        raise TargetError(msg)


def _batch(sequences: Sequence[list[int]]) -> dict[str, Tensor]:
    ones = [[1] * len(sequence) for sequence in sequences]
    return {"input_ids": padded(sequences, 0), "attention_mask": padded(ones, 0)}


def _name(source: Source) -> str:
    return repr(str(source)) if isinstance(source, str | Path) else "the table"
