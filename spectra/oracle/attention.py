"""How is attention computed so that it can be differentiated twice, in little memory?

The fused kernels (flash, memory-efficient, cuDNN) have no second derivative. The kernel made of
elementary operations has one, but holds the scores of all T queries and T keys, many times over
under a double backward. Here the queries are cut into chunks, and each chunk is a segment
(`recompute.py`): the scores of one chunk at a time exist, and what is kept grows with T alone.

Reference: Rabe and Staats, 2021, "Self-attention does not need O(n²) memory".
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from spectra.oracle.chunks import chunk_sizes
from spectra.oracle.eager_attention import EagerAttention
from spectra.oracle.recompute import Site, run_segment

__all__ = ["Attention", "chunked_attention"]

# Where autograd meets the operator: what is registered there comes before the choice of a kernel.
_KEYS = ("AutogradCPU", "AutogradCUDA")
_SITE = Site("attention in chunks of queries")


class Attention:
    """How the attention of a model is computed, and whether any of it was in chunks.

    Parameters
    ----------
    model
        Whose Hugging Face "eager" attention is computed in chunks as well.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self._chunked = False
        self._eager = EagerAttention(model)
        # Whether the operator has been called; not known before the first pass is over.
        self._called: bool | None = None

    @property
    def chunked(self) -> bool:
        """Whether any attention has been large enough for chunks."""
        return self._chunked or self._eager.chunked

    @contextlib.contextmanager
    def differentiable(self) -> Iterator[None]:
        """Within it `scaled_dot_product_attention` has second derivatives and little memory.

        Forward passes need the context, those that are repeated in the backward pass among them.
        """
        with contextlib.ExitStack() as stack:
            # By itself this is right everywhere, if not in little memory.
            # A priority list that still contains a fused kernel fails: the math kernel is alone.
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(self._eager.replaced())
            # Registering costs a tenth of a millisecond, too much for networks without attention.
            if self._called is not False:
                stack.enter_context(_registered(self))
            yield
        self._called = bool(self._called)

    def __call__(  # noqa: PLR0917 - as the operator is called
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        """What the operator does while the context is active."""
        self._called = True
        options |= {"dropout_p": dropout_p, "is_causal": is_causal}
        small = len(chunk_sizes(query, key)) == 1
        # A segment cannot be transformed by torch.func.
        if small or dropout_p > 0 or torch._C._are_functorch_transforms_active():
            return _in_one_piece(query, key, value, attn_mask, **options)
        self._chunked = True
        return chunked_attention(query, key, value, attn_mask, **options)


def chunked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, in chunks of queries where it is large.

    Every chunk is a segment that keeps its inputs alone; a causal one leaves out the keys after its
    last query. Small attention and attention with dropout are computed in one piece.
    """
    sizes = chunk_sizes(query, key)
    if len(sizes) == 1 or dropout_p > 0 or (is_causal and attn_mask is not None):
        options |= {"dropout_p": dropout_p, "is_causal": is_causal}
        return _in_one_piece(query, key, value, attn_mask, **options)
    masks: Any = itertools.repeat(attn_mask)
    if attn_mask is not None and attn_mask.dim() > 1 and attn_mask.shape[-2] > 1:
        # The derivative of a split is one concatenation; that of slices adds tensors of full size.
        masks = attn_mask.split(sizes, dim=-2)
    first, outputs = 0, []
    for rows, mask in zip(query.split(sizes, dim=-2), masks, strict=False):
        arguments = (rows, key, value, mask, first if is_causal else None)
        outputs.append(run_segment(_SITE, _chunk, arguments, options))
        first += rows.shape[-2]
    return torch.cat(outputs, dim=-2)


def _chunk(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    first: int | None,
    **options: Any,
) -> Tensor:
    """Attention of consecutive queries, which are causal if the number of the first is given."""
    if first is not None:
        queries = query.shape[-2]
        seen = min(first + queries, key.shape[-2])
        key, value = key[..., :seen, :], value[..., :seen, :]
        mask = torch.ones(queries, seen, dtype=torch.bool, device=query.device).tril(first)
    return _in_one_piece(query, key, value, mask, **options)


def _in_one_piece(*tensors: Tensor | None, **options: Any) -> Tensor:
    """PyTorch's own, by the kernel made of elementary operations."""
    with sdpa_kernel(SDPBackend.MATH):
        # Not by way of the dispatcher, where `Attention` may be registered.
        return torch.ops.aten.scaled_dot_product_attention.default.decompose(*tensors, **options)


_active: list[Attention] = []


@contextlib.contextmanager
def _registered(attention: Attention) -> Iterator[None]:
    """Within it the operator is `attention`, whichever way it is called and on any thread."""
    _active.append(attention)
    try:
        if len(_active) > 1:
            yield
            return
        library = torch.library.Library("aten", "IMPL")
        try:
            for key in _KEYS:
                library.impl("scaled_dot_product_attention", _innermost, key)
            yield
        finally:
            library._destroy()
    finally:
        _active.pop()


def _innermost(*args: Any, **options: Any) -> Tensor:
    return _active[-1](*args, **options)
