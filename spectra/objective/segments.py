"""How is a part of a loss evaluated whose intermediate results are too large to be kept?

A loss names such parts by calling them through `segment`. Whoever differentiates the loss says how
they are evaluated; without a say they are simply called.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

__all__ = ["segment", "segments_evaluated_by"]

Evaluate = Callable[..., Any]
"""`evaluate(function, *args)` returns what `function(*args)` does."""


def _called(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


_EVALUATE: ContextVar[Evaluate] = ContextVar("how segments are evaluated", default=_called)


def segment(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, whose intermediate results need not outlive the call.

    Tensors that require a gradient are among the arguments or are parameters.
    """
    return _EVALUATE.get()(function, *args)


@contextlib.contextmanager
def segments_evaluated_by(evaluate: Evaluate) -> Iterator[None]:
    """Within it `segment(function, *args)` is `evaluate(function, *args)`."""
    token = _EVALUATE.set(evaluate)
    try:
        yield
    finally:
        _EVALUATE.reset(token)
