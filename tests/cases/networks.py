"""Small networks, and their dense Hessians by PyTorch's functional transforms.

The reference shares no code with spectra: parameters are one flat argument of a pure function.
"""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable
from types import SimpleNamespace

import torch
from sklearn import datasets
from torch import Tensor, nn
from torch.func import functional_call, hessian
from torch.nn import functional


def wine(dtype: torch.dtype = torch.float64, features: int = 6) -> tuple[Tensor, Tensor]:
    """Standardised inputs and classes of the wine set."""
    x, y = datasets.load_wine(return_X_y=True)
    x = ((x - x.mean(axis=0)) / x.std(axis=0))[:, :features]
    return torch.tensor(x, dtype=dtype), torch.tensor(y)


def tanh_mlp(
    widths: tuple[int, ...] = (6, 5, 4, 3), dtype: torch.dtype = torch.float64
) -> nn.Sequential:
    """Linear layers with tanh between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs, dtype=dtype), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def dense_hessian(model: nn.Module, loss_of: Callable[[Callable[..., Tensor]], Tensor]) -> Tensor:
    """The Hessian of `loss_of(call)`, where `call` is the model with its weights as an argument.

    Tied weights count once. The transforms get the weights of LayerNorm wrong (by 10 %, as torch
    2.13 does in forward and in reverse mode), so that it is written out here.
    """
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.LayerNorm):
                setattr(module, name, _LayerNorm(child))
    parameters = dict(model.named_parameters())
    sizes = [p.numel() for p in parameters.values()]

    def function(flat: Tensor) -> Tensor:
        parts = {
            name: part.view_as(p)
            for (name, p), part in zip(parameters.items(), flat.split(sizes), strict=True)
        }
        return loss_of(lambda *args, **kwargs: functional_call(model, parts, args, kwargs))

    flat = torch.cat([p.detach().reshape(-1) for p in parameters.values()])
    with warnings.catch_warnings():
        # Of PyTorch's own: deprecated functions in forward mode, missing batching rules.
        warnings.simplefilter("ignore")
        matrix: Tensor = hessian(function)(flat)
    return matrix.detach()


class _LayerNorm(nn.Module):
    def __init__(self, original: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = original.weight, original.bias, original.eps

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return centred * scale * self.weight + self.bias


class TinyGPT(nn.Module):
    """One pre-norm transformer block whose head is the embedding; attention written out."""

    def __init__(self, vocabulary: int = 7, width: int = 6, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(8, width)
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        self.double()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        batch, length = input_ids.shape
        x = self.embedding(input_ids) + self.position(torch.arange(length))
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        visible = torch.ones(length, length).tril().bool()
        if attention_mask is not None:
            # Every token sees at least itself, so that no row is empty.
            visible = (visible & attention_mask.bool()[:, None, None, :]) | torch.eye(length).bool()
        x = x + self.out(attention(q, k, v, visible).transpose(1, 2).reshape(batch, length, -1))
        x = x + self.down(functional.gelu(self.up(self.norm2(x))))
        return self.head(x)


class Block(nn.Module):
    """A pre-norm transformer block on PyTorch's own attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class StackedGPT(nn.Module):
    """A GPT of several blocks whose head is the embedding."""

    def __init__(
        self, blocks: int, width: int = 8, heads: int = 2, vocabulary: int = 7, length: int = 8
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(blocks)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.embedding(input_ids) + self.position(positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class WithLogits(nn.Module):
    """A model whose output carries its logits as an attribute, as Hugging Face's do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.config = SimpleNamespace(use_cache=True)
        self.cached: list[bool] = []

    def forward(self, use_cache: bool = True, **inputs: Tensor) -> SimpleNamespace:
        self.cached.append(use_cache)
        return SimpleNamespace(logits=self.model(**inputs), past_key_values=object())


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Softmax attention, written out."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~visible, -math.inf).softmax(-1) @ v
