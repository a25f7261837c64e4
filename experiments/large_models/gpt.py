"""On which model is measured, and in which ways can its Hessian be multiplied with a vector?

Each way is a function of a model and its tokens that returns a product: PyTorch's own double
backward as anyone would write it, and spectra in its settings.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import spectra

__all__ = ["CONTESTANTS", "GPT", "Product", "next_token_loss", "random_tokens"]

VOCABULARY = 256
HEAD_WIDTH = 32

Product = Callable[[Tensor], Tensor]


class GPT(nn.Module):
    """Pre-norm blocks on bytes, with PyTorch's attention and shared embeddings.

    Attributes
    ----------
    checkpoints
        Whether blocks run in PyTorch's activation checkpointing.
    """

    def __init__(self, blocks: int, width: int, length: int) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, width)
        self.place = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.token.weight
        self.checkpoints = False

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, 256)."""
        x = self.token(tokens) + self.place.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpoints else block(x)
        return self.head(self.norm(x))


class Block(nn.Module):
    """Attention and a network of two layers, each added to its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, -1, HEAD_WIDTH)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, T, 32) each
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm2(x))


def random_tokens(sequences: int, length: int) -> Tensor:
    """(B, T), always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, VOCABULARY, (sequences, length), generator=generator)


def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """The mean cross-entropy of every token but the first."""
    logits = model(tokens)[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def plain(model: GPT, tokens: Tensor, *, keep: bool = False) -> Product:
    """Two calls of `torch.autograd.grad`, the graph built anew for every product or kept."""
    parameters = list(model.parameters())

    def gradient() -> tuple[Tensor, ...]:
        # The only one of its kernels that has a second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            loss = next_token_loss(model, tokens)
            return torch.autograd.grad(loss, parameters, create_graph=True)

    kept: list[tuple[Tensor, ...]] = []

    def product(v: Tensor) -> Tensor:
        pieces = v.split([p.numel() for p in parameters])
        vectors = [piece.view_as(p) for piece, p in zip(pieces, parameters, strict=True)]
        if keep and not kept:
            kept.append(gradient())
        with sdpa_kernel(SDPBackend.MATH):
            terms = torch.autograd.grad(
                kept[0] if keep else gradient(), parameters, vectors, retain_graph=keep
            )
        return torch.cat([term.reshape(-1) for term in terms])

    return product


def checkpointed(model: GPT, tokens: Tensor) -> Product:
    """The same with PyTorch's activation checkpointing of every block."""
    model.checkpoints = True
    return plain(model, tokens)


def ours(**options: Any) -> Callable[[GPT, Tensor], Product]:
    """A `HessianOperator` with these options."""

    def make(model: GPT, tokens: Tensor) -> Product:
        operator = spectra.HessianOperator(model, next_token_loss, [tokens], **options)
        return operator.apply

    return make


CONTESTANTS: dict[str, Callable[[GPT, Tensor], Product]] = {
    "PyTorch": plain,
    "PyTorch, checkpointing": checkpointed,
    "PyTorch, graph kept": functools.partial(plain, keep=True),
    "spectra, whole graph": ours(graph="fresh", recompute="none"),
    "spectra, blocks recomputed": ours(graph="fresh", recompute="blocks.*"),
    "spectra, blocks recomputed, kept": ours(graph="retained", recompute="blocks.*"),
    "spectra, auto in 1 GiB": ours(memory_budget=1 << 30),
}
