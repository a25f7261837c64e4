"""The training loss of a sentence encoder, MiniLM-L6, on sentences of Python's own documentation.

    MINILM=<directory of the weights> spectra analyze experiments/minilm/target.py:minilm --out run

The model maps a sentence to a unit vector; the loss asks that a sentence's vector be nearer to that
of the sentence that follows it than to those of the other sentences in the batch (cross-entropy
over cosine similarities times 20), which is the objective the published weights were trained with.
"""

import os
import pydoc_data.topics
import re

import torch
from torch import Tensor, nn
from torch.nn import functional

NUM_PAIRS = 48
BATCH = 16
MAX_TOKENS = 32
SCALE = 20.0  # of the cosine similarities, from the model's card

Sentences = dict[str, Tensor]  # input_ids and attention_mask, (B, T)


def minilm() -> tuple[nn.Module, object, list[dict[str, Sentences]]]:
    """The model, its loss, and batches of sentence pairs."""
    from transformers import AutoModel, AutoTokenizer

    directory = os.environ["MINILM"]
    model = AutoModel.from_pretrained(directory, local_files_only=True, add_pooling_layer=False)
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    pairs = consecutive_sentences()[:NUM_PAIRS]

    def tokens(sentences: list[str]) -> Sentences:
        encoded = tokenizer(
            sentences, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}

    batches = [
        {"first": tokens([a for a, _ in some]), "second": tokens([b for _, b in some])}
        for some in (pairs[i : i + BATCH] for i in range(0, len(pairs), BATCH))
    ]
    return model.eval(), contrastive, batches


def contrastive(model: nn.Module, batch: dict[str, Sentences]) -> Tensor:
    """Mean cross-entropy of finding each sentence's successor among those of the batch."""
    first, second = embed(model, batch["first"]), embed(model, batch["second"])  # (B, d)
    similarity = SCALE * first @ second.T  # (B, B)
    return functional.cross_entropy(similarity, torch.arange(len(similarity)))


def embed(model: nn.Module, sentences: Sentences) -> Tensor:
    """Unit vectors (B, d): the mean of the token vectors, padding left out."""
    hidden = model(**sentences).last_hidden_state  # (B, T, d)
    mask = sentences["attention_mask"].unsqueeze(-1)  # (B, T, 1)
    return functional.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)


def consecutive_sentences() -> list[tuple[str, str]]:
    """Pairs of neighbouring sentences, in the order of the documentation."""
    found = []
    for _, text in sorted(pydoc_data.topics.topics.items()):
        prose = re.sub(r"\s+", " ", text)
        sentences = [s for s in re.split(r"(?<=\.) (?=[A-Z])", prose) if 40 <= len(s) <= 160]
        found += list(zip(sentences[::2], sentences[1::2], strict=False))
    return found
