"""How is everything left as it was found: random states, buffers, requires_grad, hooks, weights?"""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from spectra.distributed.sharding import local
from spectra.errors import DataError, LossError, StochasticModelError

__all__ = [
    "Checksums",
    "buffers_kept",
    "checksums",
    "global_random_states",
    "gradients_on",
    "gradients_put_aside",
    "hooks_of_engine_off",
    "modules_of",
    "moved",
    "parameters_of",
    "random_draws_refused",
    "random_state_kept",
    "random_states",
    "requiring_grad",
    "seed_generators",
    "set_random_states",
    "tensors_and_modes",
    "versions",
    "without_hooks",
]

_STATISTICAL = nn.modules.batchnorm._NormBase
# Entries in one sum: few enough that single precision shows any change that matters. Their weights
# differ, so that entries that change places show too.
_PIECE = 1 << 12
# Entries converted at a time.
_SLICE = 1 << 24


def _generators(device: torch.device) -> list[torch.Generator]:
    """The global generators that operations on a device draw from."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index or 0])
    return generators


def seed_generators(device: torch.device, place: tuple[int, ...]) -> None:
    """Seed the global generators with a number that belongs to a place in the data."""
    seed = int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0]) >> 1
    for generator in _generators(device):
        generator.manual_seed(seed)


@contextlib.contextmanager
def random_draws_refused(device: torch.device, what: str, cure: str) -> Iterator[None]:
    """Refuse draws from the global generators, unless they were seeded anew: then they repeat."""
    generators = _generators(device)
    before = [(g.initial_seed(), g.get_state()) for g in generators]
    others = _states_beside_torch()
    yield
    if _states_beside_torch() != others:
        msg = (
            f"{what} drew random numbers from NumPy's or Python's generator, so that it is another "
            f"function every time. {cure}"
        )
        raise StochasticModelError(msg)
    for generator, (seed, state) in zip(generators, before, strict=True):
        if generator.initial_seed() == seed and not torch.equal(generator.get_state(), state):
            msg = (
                f"{what} drew random numbers (dropout called as a function, noise, a sample), so "
                f"that it is another function every time. {cure}"
            )
            raise StochasticModelError(msg)


def _states_beside_torch() -> tuple[Any, ...]:
    kind, key, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 - that is what may be drawn from
    return kind, np.asarray(key).tobytes(), *rest, random.getstate()


def versions(tensors: Iterable[Tensor]) -> tuple[tuple[int, int], ...]:
    """Equal as long as no tensor was changed by an operation that autograd counts."""
    # Memory may be exchanged without a new version, by .data; sparse tensors tell no address.
    return tuple(
        (
            0 if tensor.is_inference() else tensor._version,
            tensor.data_ptr() if tensor.layout == torch.strided else 0,
        )
        for tensor in map(local, tensors)
    )


def modules_of(model: nn.Module) -> list[nn.Module]:
    """A model and all modules inside of it, each once, in no order that means anything.

    `modules()` and `parameters()` take ten times as long, which is felt in every pass.
    """
    modules, waiting = {id(model): model}, [model]
    while waiting:
        for child in waiting.pop()._modules.values():
            if child is not None and id(child) not in modules:
                modules[id(child)] = child
                waiting.append(child)
    return list(modules.values())


def parameters_of(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of a model, each once, in no order that means anything."""
    found = (p for module in modules_of(model) for p in module._parameters.values())
    return list({id(p): p for p in found if p is not None}.values())


def tensors_and_modes(model: nn.Module) -> tuple[list[Tensor], tuple[bool, ...]]:
    """The parameters and buffers of a model, each once, and the modes of its modules."""
    modules, tensors = modules_of(model), {}
    for module in modules:
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                tensors[id(tensor)] = tensor
    return list(tensors.values()), tuple(module.training for module in modules)


class Checksums:
    """Weighted sums of tensors' entries: changes behind autograd's back show in them.

    Optimisers that write through `.data` count no version. Costs one reading of the tensors. How
    they lie in memory is looked at once, as long as they are the same.
    """

    def __init__(self) -> None:
        self._held: bytes | None = None
        self._places: list[Any] = []
        self._small: dict[torch.device, _Small] = {}
        self._large: list[Tensor] = []

    def of(self, tensors: Iterable[Tensor]) -> bytes:
        """Those of some tensors, in an order of their own."""
        if self._held is not None:
            return self._held
        here = [t for t in map(local, tensors) if t.layout == torch.strided]
        places = [(id(t), t.data_ptr(), t.shape, t.stride()) for t in here]
        if places != self._places:
            self._look(here)
            self._places = places
        sums: dict[torch.device, list[Tensor]] = {}
        for tensor in self._large:
            flat = _flat(tensor)
            for start in range(0, flat.numel(), _SLICE):
                # No copy of what is in single precision already.
                sums.setdefault(flat.device, []).extend(_sums(flat[start : start + _SLICE].float()))
        for device, small in self._small.items():
            # Together: a call for each of hundreds of tensors would take longer than their sums.
            entries = [*small.views, *(_flat(tensor).float() for tensor in small.others)]
            sums.setdefault(device, []).extend(_sums(torch.cat(entries)))
        # One transfer for each device: an accelerator has to be waited for.
        return b"".join(
            (torch.cat(totals) if len(totals) > 1 else totals[0]).cpu().numpy().tobytes()
            for totals in sums.values()
        )

    @contextlib.contextmanager
    def held(self, tensors: Callable[[], Iterable[Tensor]], what: str) -> Iterator[None]:
        """Within it all is taken to be as it was at its beginning, and looked at again at its end.

        Raises
        ------
        DataError
            It has changed.
        """
        if self._held is not None:
            yield
            return
        before = self._held = self.of(tensors())
        try:
            yield
        finally:
            self._held = None
        if self.of(tensors()) != before:
            msg = (
                f"{what} changed while they were analysed, so that the products may be those of "
                "several matrices; stop what changes them, or analyse a copy (copy.deepcopy), and "
                "ask again"
            )
            raise DataError(msg)

    def _look(self, tensors: list[Tensor]) -> None:
        self._small, self._large = {}, []
        for tensor in tensors:
            if tensor.device.type == "meta":
                continue
            if tensor.numel() > _PIECE:
                self._large.append(tensor)
                continue
            small = self._small.setdefault(tensor.device, _Small([], []))
            if tensor.dtype == torch.float32 and tensor.is_contiguous():
                # On the same memory, of which a few kilobytes may outlive the model's use of it.
                small.views.append(_flat(tensor))
            else:
                small.others.append(tensor)


class _Small(NamedTuple):
    """Tensors of few entries: views of what is in single precision, and what is not."""

    views: list[Tensor]
    others: list[Tensor]


def _flat(tensor: Tensor) -> Tensor:
    """The entries of a tensor as real numbers, one after the other."""
    tensor = tensor.detach()
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    tensor = tensor.int_repr() if tensor.is_quantized else tensor
    return tensor.reshape(-1)


def checksums(tensors: Iterable[Tensor]) -> bytes:
    """The `Checksums` of some tensors, once."""
    return Checksums().of(tensors)


def _sums(entries: Tensor) -> list[Tensor]:
    if entries.numel() <= _PIECE:
        # So few are faster kept than added up, and tell more.
        return [entries]
    whole = entries.numel() // _PIECE * _PIECE
    rest, weights = entries[whole:], _weights(entries.dtype, entries.device)
    last = torch.dot(rest, weights[: rest.numel()]).reshape(1)
    return [torch.mv(entries[:whole].view(-1, _PIECE), weights), last] if whole else [last]


@functools.cache
def _weights(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.arange(1.0, 1.0 + _PIECE, dtype=dtype, device=device)


@contextlib.contextmanager
def gradients_on() -> Iterator[None]:
    """Within it autograd records, whatever surrounds it."""
    # Callers may sit in no_grad or inference_mode: validation loops do.
    with torch.inference_mode(mode=False), torch.enable_grad():
        yield


def random_states(data: Any = None) -> tuple[Any, ...]:
    """The global random states of the CPU, and those of a loader's own generators."""
    holders = [data, getattr(data, "sampler", None)]
    generators = [
        g for h in holders if isinstance(g := getattr(h, "generator", None), torch.Generator)
    ]
    own = [(generator, generator.get_state()) for generator in generators]
    # Augmentations of loaders still draw from NumPy's legacy state.
    return own, torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002


def set_random_states(states: tuple[Any, ...]) -> None:
    """Put back what `random_states` found."""
    own, torchs, pythons, numpys = states
    torch.set_rng_state(torchs)
    random.setstate(pythons)
    np.random.set_state(numpys)  # noqa: NPY002
    for generator, state in own:
        generator.set_state(state)


def global_random_states() -> tuple[Any, ...]:
    """The states of the generators that all threads share, to be compared."""
    generators = (torch.default_generator, *torch.cuda.default_generators)
    states = (generator.get_state().numpy().tobytes() for generator in generators)
    return *states, *_states_beside_torch()


@contextlib.contextmanager
def random_state_kept(data: Any = None) -> Iterator[None]:
    """Put the random state back, the global one and that of a loader's own generators.

    Shuffling loaders and dropout draw from it.
    """
    states = random_states(data)
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices, enabled=bool(devices)):
            yield
    finally:
        set_random_states(states)


@contextlib.contextmanager
def moved(parameters: list[Tensor], by: list[Tensor]) -> Iterator[None]:
    """Let parameters hold themselves and something else together, on other memory.

    Their own memory is not written to, so that they come back as they were to the last bit.
    """
    held = [parameter.data for parameter in parameters]
    try:
        for parameter, own, step in zip(parameters, held, by, strict=True):
            # Through .data, which counts as no version: retained graphs stay valid.
            parameter.data = own + step.to(own)
        yield
    finally:
        for parameter, own in zip(parameters, held, strict=True):
            parameter.data = own


@contextlib.contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Put buffers back as they were (running statistics, counters), replaced ones included.

    Raises
    ------
    StochasticModelError
        Statistics were changed of a module that is not in training mode, but was for a while.
    """
    toggled = ""
    kept = [
        (module, name, buffer, buffer._version, buffer.detach().clone())
        for module in modules_of(model)
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.device.type != "meta"
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, version, copy in kept:
                # Batch norm changes its statistics without counting it as a new version.
                norm = isinstance(module, _STATISTICAL)
                changed = (module.training or norm) and not torch.equal(buffer, copy)
                if changed and not module.training:
                    toggled = next(n for n, m in model.named_modules() if m is module)
                if changed or buffer._version != version:
                    # Through .data, which counts as no version: retained graphs stay valid.
                    buffer.data.copy_(copy)
                module._buffers[name] = buffer
    if toggled:
        msg = (
            f"the loss puts module {toggled!r} into training mode for a while: its statistics, and "
            "the loss with them, depend on the batch. Leave the mode to the caller; training mode "
            "takes model.train() before, and allow_training_mode=True"
        )
        raise StochasticModelError(msg)


@contextlib.contextmanager
def gradients_put_aside(model: nn.Module, what: str) -> Iterator[None]:
    """Keep the `.grad` of parameters from a loss that calls backward() by itself.

    Raises
    ------
    LossError
        It did.
    """
    before = [(parameter, parameter.grad) for parameter in parameters_of(model)]
    called = False
    try:
        for parameter, gradient in before:
            if gradient is not None:
                parameter.grad = None
        yield
    finally:
        for parameter, gradient in before:
            called = called or parameter.grad is not None
            if parameter.grad is not gradient:
                parameter.grad = gradient
    if called:
        msg = (
            f"evaluating {what} called backward(), which adds to .grad; return the loss, without "
            "its gradient"
        )
        raise LossError(msg)


@contextlib.contextmanager
def requiring_grad(model: nn.Module, chosen: list[Tensor]) -> Iterator[None]:
    """Let exactly the chosen parameters require a gradient: no graph is kept for the others."""
    wanted = {id(parameter) for parameter in chosen}
    before = [(parameter, parameter.requires_grad) for parameter in parameters_of(model)]
    try:
        for parameter, required in before:
            if required != (id(parameter) in wanted):
                parameter.requires_grad_(id(parameter) in wanted)
        yield
    finally:
        for parameter, required in before:
            if parameter.requires_grad != required:
                parameter.requires_grad_(required)


@contextlib.contextmanager
def without_hooks(parameters: list[Tensor], model: nn.Module) -> Iterator[None]:
    """Take off what hooks into backward passes: it logs gradients, or changes them silently."""
    hooks = [p._backward_hooks for p in parameters if p._backward_hooks]
    hooks += [registered for registered in _module_hooks(model) if registered]
    kept = [dict(registered) for registered in hooks]
    try:
        for registered in hooks:
            registered.clear()
        yield
    finally:
        for registered, functions in zip(hooks, kept, strict=True):
            registered.update(functions)


@contextlib.contextmanager
def hooks_of_engine_off(model: nn.Module) -> Iterator[None]:
    """Take off the forward hooks of torch.distributed, which put parameters together and apart."""
    registries = [r for m in modules_of(model) for r in (m._forward_pre_hooks, m._forward_hooks)]
    kept = [(registered, dict(registered)) for registered in registries if registered]
    try:
        for registered, functions in kept:
            for key, function in functions.items():
                if getattr(function, "__module__", "").startswith("torch.distributed."):
                    del registered[key]
        yield
    finally:
        for registered, functions in kept:
            registered.clear()
            registered.update(functions)


def _module_hooks(model: nn.Module) -> Iterator[dict[int, Any]]:
    """The backward hooks of a model's modules, and those registered for all modules."""
    everywhere = nn.modules.module
    yield everywhere._global_backward_hooks
    yield everywhere._global_backward_pre_hooks
    for module in modules_of(model):
        yield module._backward_hooks
        yield module._backward_pre_hooks
