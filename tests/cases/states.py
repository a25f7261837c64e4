"""What must be as it was found after a call: models, generators, and settings of PyTorch."""

from __future__ import annotations

import random
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import _get_current_function_mode_stack
from torch.utils import checkpoint

from spectra.oracle import attention, precision, recompute

__all__ = ["State", "state_of"]

State = dict[str, Any]

_MODULE_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def state_of(*watched: Any) -> State:
    """Everything that a call could leave changed, in a form that can be compared with `==`.

    Parameters
    ----------
    *watched
        Models, generators, and tensors such as those of batches.
    """
    state = {**_settings(), **_patched()}
    for place, thing in enumerate(watched):
        if isinstance(thing, nn.Module):
            state |= {f"{place}, {key}": value for key, value in _model(thing).items()}
        elif isinstance(thing, torch.Generator):
            state[f"{place}, generator"] = _bits(thing.get_state())
        elif isinstance(thing, Tensor):
            state[f"{place}, tensor"] = (*_tensor(thing), id(thing.grad))
    return state


def _settings() -> State:
    kinds = ("cpu", "cuda")
    return {
        "torch's generator": _bits(torch.get_rng_state()),
        "numpy's generator": [
            part.tobytes() if isinstance(part, np.ndarray) else part
            for part in np.random.get_state()  # noqa: NPY002 - the global one
        ],
        "python's generator": random.getstate(),
        "autocast": [(torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds],
        "autocast cache": torch.is_autocast_cache_enabled(),
        "attention kernels": [
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cuda.cudnn_sdp_enabled(),
        ],
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.cudnn.deterministic,
            torch.backends.cudnn.benchmark,
        ),
        "precision": [
            torch.get_float32_matmul_precision(),
            torch.backends.cudnn.allow_tf32,
            *(s.fp32_precision for kind in kinds for s in precision._recent_settings(kind)),
        ],
        "default dtype": torch.get_default_dtype(),
        "modes": list(map(id, _get_current_function_mode_stack())),
        "threads": torch.get_num_threads(),
    }


def _patched() -> State:
    return {
        "attention function": functional.scaled_dot_product_attention,
        "attention operator": [
            torch._C._dispatch_has_kernel_for_dispatch_key("aten::scaled_dot_product_attention", k)
            for k in ("AutogradCPU", "AutogradCUDA")
        ],
        "active attention": list(attention._active),
        "checkpoint": [
            checkpoint.checkpoint,
            *(vars(scope).get("checkpoint") for scope in map(sys.modules.get, _OWN) if scope),
        ],
        "inside a segment": recompute.inside_a_segment(),
        "hooks of all modules": [
            list(getattr(nn.modules.module, f"_global{name}")) for name in _MODULE_HOOKS
        ],
    }


# Where tests hold a name of PyTorch's checkpoint.
_OWN = ("tests.oracle.test_diagnose", "tests.test_restored_state", "tests.cases.bad_inputs")


def _model(model: nn.Module) -> State:
    modules = list(model.modules())
    parameters = list(model.parameters())
    files = sorted({type(module).__module__ for module in modules})
    configs = [config for m in modules for config in [getattr(m, "config", None)] if config]
    return {
        "modes": [module.training for module in modules],
        "objects": [
            (name, id(tensor))
            for module in modules
            for held in (module._parameters, module._buffers)
            for name, tensor in held.items()
        ],
        "parameters": list(map(_tensor, parameters)),
        "requires_grad": [p.requires_grad for p in parameters],
        "grad": [None if p.grad is None else (id(p.grad), *_tensor(p.grad)) for p in parameters],
        "buffers": list(map(_tensor, model.buffers())),
        "hooks": [list(vars(module).get(name, {})) for module in modules for name in _MODULE_HOOKS],
        "hooks of parameters": [list(p._backward_hooks or ()) for p in parameters],
        "forward": [vars(module).get("forward") for module in modules],
        "attention in files": [
            getattr(sys.modules.get(file), "eager_attention_forward", None) for file in files
        ],
        "caches": [getattr(config, "use_cache", None) for config in configs],
    }


def _tensor(tensor: Tensor) -> tuple[Any, ...]:
    kind = (tensor.dtype, tuple(tensor.shape), tensor.layout, str(tensor.device))
    # What is expanded to billions of entries would not fit as bytes.
    if tensor.device.type == "meta" or tensor.layout != torch.strided or tensor.numel() > 1 << 26:
        return kind
    return (*kind, _bits(tensor.detach().int_repr() if tensor.is_quantized else tensor))


def _bits(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().reshape(-1).clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().tobytes()
