"""Does differentiating a kept graph run nothing but PyTorch's own code?

Almost always: then it changes neither random states nor buffers, calls no module, and needs none of
the protection of a forward pass, which takes longer than the product of a small network does.
Checkpoints that compute a block again, functions of `torch.autograd.Function` and hooks of tensors
are Python code, which may do anything.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["runs_python"]

T = TypeVar("T")

_ENGINE = "run_backward"


def runs_python(differentiate: Callable[[], T]) -> tuple[T, bool]:
    """A result of autograd's, and whether Python code ran to compute it.

    It did, too, where that cannot be seen: while something else profiles the program.
    """
    if sys.getprofile() is not None:
        return differentiate(), True
    watch = _Watch()
    # On this thread alone, or what runs on those of an accelerator would not be seen.
    with torch.autograd.set_multithreading_enabled(False):
        sys.setprofile(watch)
        try:
            result = differentiate()
        finally:
            sys.setprofile(None)
    return result, watch.seen or not watch.entered


class _Watch:
    """A profiler that looks for calls from within autograd's engine.

    Attributes
    ----------
    entered
        The engine has run.
    seen
        Something was called while it did.
    """

    def __init__(self) -> None:
        self.entered = self.seen = self._inside = False

    def __call__(self, frame: Any, event: str, function: Any) -> None:
        of_engine = event.startswith("c_") and getattr(function, "__name__", "") == _ENGINE
        if of_engine and not self._inside:
            self.entered = self._inside = True
        elif of_engine and event != "c_call":
            self._inside = False
        elif self._inside:
            self.seen = True
