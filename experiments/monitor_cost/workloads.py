"""What is trained: an MLP on the digits by full-batch descent, and a byte-level GPT-2 on text."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import spectra
from spectra.integrations.digits import trained_digits


@dataclass
class Workload:
    """A training run, at its first step."""

    name: str
    model: nn.Module
    loss: Callable[[nn.Module, Any], Tensor]
    optimizer: torch.optim.Optimizer
    # The training batches, one for each step, for ever.
    batches: Iterator[Any]

    def step(self) -> Any:
        """Train for one step and return its batch."""
        batch = next(self.batches)
        self.optimizer.zero_grad()
        self.loss(self.model, batch).backward()
        self.optimizer.step()
        return batch


def digits() -> Workload:
    """A 64-64-64-10 tanh network, gradient descent on all 1,797 images: the edge of stability."""
    _, _, data = trained_digits(steps=0, batch_size=10_000)
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    )
    loss = spectra.losses.supervised(nn.CrossEntropyLoss())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    return Workload("digits MLP, full batch", model, loss, optimizer, iter(lambda: data[0], None))


def byte_gpt() -> Workload:
    """GPT-2 over bytes, 120k parameters, AdamW, 16 sequences of 64 bytes of the Python library."""
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=256,
        n_positions=64,
        n_embd=64,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.1,
        embd_pdrop=0.1,
        attn_pdrop=0.1,
        bos_token_id=0,
        eos_token_id=0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.GPT2LMHeadModel(config)
    source = b"".join(sorted(p.read_bytes() for p in Path(os.__file__).parent.glob("*.py")))
    text = torch.frombuffer(bytearray(source[:1_000_000]), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(0)

    def batches() -> Iterator[dict[str, Tensor]]:
        while True:
            starts = torch.randint(len(text) - 64, (16,), generator=generator)
            tokens = torch.stack([text[s : s + 64] for s in starts])
            yield {"input_ids": tokens, "labels": tokens}

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    return Workload("byte-level GPT-2", model, spectra.losses.causal_lm(), optimizer, batches())
