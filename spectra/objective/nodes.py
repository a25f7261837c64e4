"""Which operations is a tensor made of? The nodes of autograd's graph behind it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

__all__ = ["graph_nodes", "leaves_behind"]


def graph_nodes(tensors: Iterable[Tensor]) -> Iterator[Any]:
    """All nodes of the autograd graph behind some tensors, each once.

    A custom function that computes with a graph of its own names the ends of that graph in an
    attribute `behind` of its node; they are followed, too.
    """
    stack = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        yield node
        ends = (tensor.grad_fn for tensor in getattr(node, "behind", ()))
        for following in [*(before for before, _ in node.next_functions), *ends]:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)


def leaves_behind(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The leaves that some tensors depend on, each once."""
    leaves = (getattr(node, "variable", None) for node in graph_nodes(tensors))
    return [leaf for leaf in leaves if leaf is not None]
