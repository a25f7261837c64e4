"""Which modules of a model are recomputed as segments, and how are they made to be?"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from spectra.errors import ArgumentError, ArgumentTypeError
from spectra.oracle.recompute import Site, UnsuitableSegmentError, inside_a_segment, run_segment

__all__ = [
    "Recompute",
    "attributes_replaced",
    "caches_switched_off",
    "chosen_modules",
    "layers_in_lists",
    "recomputing",
    "repeated_blocks",
    "routed_checkpoints",
]

Recompute = str | Sequence[str]
"""`"auto"`, `"none"`, or one or several globs over names of modules."""

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def chosen_modules(model: nn.Module | None, recompute: Recompute) -> dict[str, nn.Module]:
    """The modules that `recompute` names, or those that "auto" may choose.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        A glob matches no module, or something else than a string was given.
    """
    if recompute == "none" or (model is None and recompute == "auto"):
        return {}
    globs = [recompute] if isinstance(recompute, str) else recompute
    listed = isinstance(globs, list | tuple | set) and len(globs) > 0
    if model is None or not listed or not all(isinstance(glob, str) for glob in globs):
        what = (
            repr(recompute) if isinstance(recompute, int | str | list) else type(recompute).__name__
        )
        msg = (
            f"recompute={what}; expected 'auto', 'none', or globs over the names of a model's "
            "modules, such as 'layers.*'"
        )
        raise ArgumentTypeError(msg)
    if recompute == "auto":
        return repeated_blocks(model)
    names = [name for name, _ in model.named_modules() if name]
    for glob in globs:
        if not any(fnmatch.fnmatchcase(name, glob) for name in names):
            near = difflib.get_close_matches(glob, names, n=3, cutoff=0.3) or names[:3]
            msg = (
                f"recompute: no module matches {glob!r}. Near matches: "
                f"{', '.join(map(repr, near)) or 'there are no modules in the model'}; see "
                "model.named_modules()"
            )
            raise ArgumentError(msg)
    chosen: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inner = any(name.startswith(f"{outer}.") for outer in chosen)
        # A list of modules is never called: those in it are, and have names that come later.
        names = [name, *_lists_around(model, name)]
        if not inner and any(fnmatch.fnmatchcase(n, glob) for n in names for glob in globs):
            if not isinstance(module, nn.ModuleList | nn.ModuleDict):
                chosen[name] = module
    return chosen


def _lists_around(model: nn.Module, name: str) -> list[str]:
    """The lists and dicts of modules that hold a module directly, from the inside out."""
    holders = []
    outer = name.rpartition(".")[0]
    while outer and isinstance(model.get_submodule(outer), nn.ModuleList | nn.ModuleDict):
        holders.append(outer)
        outer = outer.rpartition(".")[0]
    return holders


def repeated_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks that a model repeats, by name: such as the layers of a transformer.

    They are the composite members of a ModuleList, ModuleDict or Sequential of which two or more
    are of one class; the outermost such containers count.
    """
    return dict(_search_blocks("", model))


def layers_in_lists(model: nn.Module | None) -> dict[str, nn.Module]:
    """The members of lists of modules that have parameters: those of a perceptron, say."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules() if model is not None else ():
        for key, child in module.named_children():
            if isinstance(module, _CONTAINERS) and not isinstance(child, _CONTAINERS):
                place = f"{name}.{key}" if name else key
                inner = any(place.startswith(f"{outer}.") for outer in found)
                if not inner and next(child.parameters(), None) is not None:
                    found[place] = child
    return found


def _search_blocks(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    children = [(f"{name}.{key}" if name else key, m) for key, m in module.named_children()]
    composite = [(key, child) for key, child in children if _is_block(child)]
    kinds = [type(child) for _, child in composite]
    if isinstance(module, _CONTAINERS) and len(kinds) > len(set(kinds)):
        yield from composite
        return
    for key, child in children:
        yield from _search_blocks(key, child)


def _is_block(module: nn.Module) -> bool:
    # A list or dict of modules is not called itself, and has children that are.
    return (
        not isinstance(module, nn.ModuleList | nn.ModuleDict | torch.jit.ScriptModule)
        and next(module.children(), None) is not None
    )


@contextlib.contextmanager
def recomputing(sites: dict[nn.Module, Site]) -> Iterator[None]:
    """Within it these modules run as segments; their hooks stay outside of them."""

    def as_segment(site: Site, forward: Callable[..., Any]) -> Callable[..., Any]:
        # Some models look at the signatures of their layers.
        @functools.wraps(forward)
        def segment(*args: Any, **kwargs: Any) -> Any:
            # What is inside of a checkpoint of the model's own is recomputed already.
            if inside_a_segment():
                return forward(*args, **kwargs)
            return run_segment(site, forward, args, kwargs)

        return segment

    with attributes_replaced(
        [(module, "forward", as_segment(site, module.forward)) for module, site in sites.items()]
    ):
        yield


@contextlib.contextmanager
def attributes_replaced(replacements: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """Set attributes of objects, in their own dictionaries, and put back what was there."""
    missing = object()
    before = [(owner, name, vars(owner).get(name, missing)) for owner, name, _ in replacements]
    try:
        for owner, name, value in replacements:
            vars(owner)[name] = value
        yield
    finally:
        for owner, name, value in reversed(before):
            if value is missing:
                vars(owner).pop(name, None)
            else:
                vars(owner)[name] = value


def caches_switched_off(model: nn.Module | None) -> list[tuple[Any, str, Any]]:
    """What to replace so that a Hugging Face model fills no cache of keys and values.

    A cache serves the generation of texts. A block that is computed again would find itself in it.
    """
    modules = model.modules() if model is not None else ()
    configs = {id(config): config for m in modules for config in [getattr(m, "config", None)]}
    return [
        (config, "use_cache", False)
        for config in configs.values()
        if getattr(config, "__dict__", {}).get("use_cache") is True
    ]


def routed_checkpoints(model: nn.Module | None) -> list[tuple[Any, str, Any]]:
    """What to replace so that a model's own activation checkpointing makes segments.

    PyTorch's saves no memory under a double backward, and its reentrant kind loses gradients. It is
    to be replaced under all names by which modules, and the files that define their classes, hold
    its function.
    """
    replacements: list[tuple[Any, str, Any]] = [
        (torch.utils.checkpoint, "checkpoint", _routed_checkpoint)
    ]
    files: set[str] = set()
    for module in model.modules() if model is not None else ():
        files.update(kind.__module__ for kind in type(module).__mro__)
        for name, value in vars(module).items():
            if value is checkpoint:
                replacements.append((module, name, _routed_checkpoint))
            elif isinstance(value, functools.partial) and value.func is checkpoint:
                partial = functools.partial(_routed_checkpoint, *value.args, **value.keywords)
                replacements.append((module, name, partial))
    for file in sorted(files):
        # Not those of PyTorch itself, nor of what never imported it.
        scope = sys.modules.get(file)
        if scope is not None and not file.startswith("torch."):
            names = [name for name, value in vars(scope).items() if value is checkpoint]
            replacements += [(scope, name, _routed_checkpoint) for name in names]
    return replacements


# How `checkpoint` recomputes, which has no bearing on a segment.
_OPTIONS = (
    "use_reentrant",
    "context_fn",
    "determinism_check",
    "debug",
    "early_stop",
    "preserve_rng_state",
)


def _routed_checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """In place of `torch.utils.checkpoint.checkpoint`: a segment, or nothing inside of one."""
    kwargs = {name: value for name, value in kwargs.items() if name not in _OPTIONS}
    if inside_a_segment():
        return function(*args, **kwargs)
    name = getattr(function, "__qualname__", type(function).__name__)
    try:
        return run_segment(Site(f"the checkpoint of {name}"), function, args, kwargs)
    except UnsuitableSegmentError as error:
        if error.overwrites:
            raise
        # A closure over intermediate results: right without recomputation, at the price of memory.
        return function(*args, **kwargs)
