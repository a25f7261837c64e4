"""How precisely does PyTorch multiply while products are computed? As the dtypes say.

A product of the Hessian in float32 is right to 1e-6. With TensorFloat-32, or bfloat16 inside of
float32 matrix products, which a program may have switched on for training, it is right to 1e-3.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["autocast_off", "full_float32"]

# Where recent versions of PyTorch keep one setting for each library and kind of operation.
_SETTINGS = {
    "cuda": (("cuda", "matmul"), ("cudnn", "conv"), ("cudnn", "rnn")),
    "cpu": (("mkldnn", "matmul"), ("mkldnn", "conv"), ("mkldnn", "rnn")),
}


# Of a setting: where nothing was chosen, for it or for all of its kind, nothing is reduced.
_FULL = {"ieee", "none"}


@contextlib.contextmanager
def full_float32(kind: str) -> Iterator[None]:
    """Within it products of float32 matrices are computed in float32 on a kind of device."""
    settings = _recent_settings(kind)
    if settings:
        # To ask and to set take longer than all else in here, and few programs have set anything.
        before = [(s, value) for s in settings if (value := s.fp32_precision) not in _FULL]
        try:
            for setting, _ in before:
                setting.fp32_precision = "ieee"
            yield
        finally:
            for setting, value in before:
                setting.fp32_precision = value
        return
    matmul, conv = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = conv


@functools.cache
def _recent_settings(kind: str) -> tuple[Any, ...]:
    found = []
    for library, operation in _SETTINGS.get(kind, ()):
        setting = getattr(getattr(torch.backends, library, None), operation, None)
        if hasattr(setting, "fp32_precision"):
            found.append(setting)
    return tuple(found)


def autocast_off(kind: str) -> contextlib.AbstractContextManager[Any]:
    """Within it nothing is cast on a kind of device: backward passes run in the dtypes at hand."""
    if torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()
