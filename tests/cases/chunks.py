"""Losses whose logits are made in chunks, at sizes at which they would not be."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectra import HessianOperator
from spectra.objective import cross_entropy, heads
from spectra.objective.losses import causal_lm


@contextlib.contextmanager
def chunks_of(tokens: int) -> Iterator[None]:
    """All logits count as large, and are made for that many tokens at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heads, "_SMALL", 0)
        for module in (heads, cross_entropy):
            patch.setattr(module, "tokens_in_a_chunk", lambda *_: tokens)
        yield


def questions(model: nn.Module, data: Any, **options: Any) -> tuple[Tensor, str | None]:
    """A product, the gradient and the value of a language model, and how its logits were made."""
    hessian = HessianOperator(model, causal_lm(), data, **options)
    probe = torch.linspace(-1, 1, hessian.shape[0]).to(hessian.space.dtype)
    product = hessian @ probe
    answers = torch.cat([product, hessian.gradient(), product.new_tensor([hessian.value()])])
    return answers, hessian.describe().get("loss_head")
