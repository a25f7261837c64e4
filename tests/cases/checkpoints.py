"""Tiny checkpoints of transformers with a tokenizer of words, saved to a directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WORDS = "the quick brown fox jumps over lazy dog and cat sleeps on a mat good bad fine".split()
SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"]
SIZES = {
    "vocab_size": len(SPECIAL) + len(WORDS),
    "hidden_size": 8,
    "intermediate_size": 10,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
}


def word_tokenizer(**without: None) -> Any:
    """[CLS] words [SEP]; a special token given as None is left out."""
    import tokenizers
    import transformers

    core = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(
            {word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"
        )
    )
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    special = {
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
        "unk_token": "[UNK]",
    }
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, **{**special, **without})


def curved(model: Any) -> Any:
    """The model with weights large enough for every part to curve the loss."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=g))
    return model


def save(model: Any, directory: Path, tokenizer: Any = None) -> Path:
    """Write a model, and a tokenizer, as their users do."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    return directory
