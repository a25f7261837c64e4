"""How is attention computed so that it can be differentiated twice?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["differentiable_attention"]


@contextlib.contextmanager
def differentiable_attention() -> Iterator[None]:
    """Within it, `scaled_dot_product_attention` uses the kernel made of elementary operations.

    The fused kernels (flash, memory-efficient, cuDNN) compute the same function but have no second
    derivative. Forward passes need the context, those that activation checkpointing repeats in the
    backward among them.
    """
    # A priority list that still contains a fused kernel fails: the math kernel has to be alone.
    with sdpa_kernel(SDPBackend.MATH):
        yield
