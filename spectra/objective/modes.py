"""Which modules make a loss random, dependent on how the data are batched, or discontinuous?"""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.spectral_norm import SpectralNorm

from spectra.objective.keeping import modules_of

__all__ = ["discontinuous_modules", "stochastic_modules"]

_DROPOUTS = (nn.modules.dropout._DropoutNd,)
_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)
_INSTANCE_NORMS = (nn.modules.instancenorm._InstanceNorm,)


def stochastic_modules(model: nn.Module) -> list[tuple[str, str, bool]]:
    """Modules in a mode that makes the loss random or batch-dependent: name, why, statistics?"""
    if not any(_why_stochastic(module) for module in modules_of(model)):
        return []
    found = [(name, _why_stochastic(module)) for name, module in model.named_modules()]
    return [(name, *why) for name, why in found if why is not None]


def _why_stochastic(module: nn.Module) -> tuple[str, bool] | None:
    """Why a module makes the loss random or batch-dependent, if it does; by statistics?"""
    kind = type(module).__name__
    if isinstance(module, _BATCH_NORMS):
        if module.training:
            return f"({kind}) is in training mode: batch statistics", True
        if module.running_mean is None:
            return f"({kind}) keeps no running statistics: batch statistics", True
        return None
    if not module.training:
        return None
    if (rate := _drop_rate(module)) > 0:
        return f"({kind}) is in training mode: it drops at random, p={rate}", False
    if isinstance(module, nn.RReLU):
        return f"({kind}) is in training mode: random slopes", False
    if isinstance(module, _INSTANCE_NORMS) and module.track_running_stats:
        return f"({kind}) is in training mode: it changes its statistics", False
    if _iterates_spectral_norm(module):
        return f"({kind}) is in training mode: every call takes a step to its spectral norm", False
    return None


def discontinuous_modules(model: nn.Module) -> list[tuple[str, str]]:
    """Modules that send each token to few of many experts: name, and what they choose.

    Where the choice changes the loss jumps. Derivatives know nothing of that: they are those of the
    present choice. Such modules are told by their kind, a router, or by the numbers they hold.
    """
    found: list[tuple[str, str]] = []
    for name, module in model.named_modules():
        kind = type(module).__name__
        chosen, experts = (getattr(module, a, None) for a in ("top_k", "num_experts"))
        if isinstance(chosen, int) and isinstance(experts, int):
            if chosen >= experts:
                # All experts are used: nothing is chosen.
                continue
            found.append((name, f"({kind}) sends each token to {chosen} of {experts} experts"))
        elif "router" in kind.lower():
            found.append((name, f"({kind}) chooses experts for each token"))
    # A block repeats the numbers of the router inside it.
    return [
        (name, what)
        for name, what in found
        if not any(other.startswith(f"{name}.") for other, _ in found)
    ]


def _iterates_spectral_norm(module: nn.Module) -> bool:
    """Whether a module is PyTorch's spectral norm, or has the older one as a hook."""
    hooks = module._forward_pre_hooks.values()
    return isinstance(module, parametrizations._SpectralNorm) or any(
        isinstance(hook, SpectralNorm) for hook in hooks
    )


def _drop_rate(module: nn.Module) -> float:
    if isinstance(module, _DROPOUTS):
        return float(module.p)
    if isinstance(module, nn.RNNBase):
        return float(module.dropout) if module.num_layers > 1 else 0.0
    if isinstance(module, nn.MultiheadAttention):
        return float(module.dropout)
    # Stochastic depth and its kin exist under many names; what they share is these attributes.
    if "drop" in type(module).__name__.lower():
        for attribute in ("p", "drop_prob", "drop_rate"):
            rate = getattr(module, attribute, None)
            if isinstance(rate, int | float):
                return float(rate)
    return 0.0
