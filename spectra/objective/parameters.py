"""Which parameters are analysed, and where does each sit in the flat vector?"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from spectra.errors import ArgumentError, ArgumentTypeError, ParameterSelectionError
from spectra.objective.vectors import VectorSpace

__all__ = ["ParameterSpace", "Selection", "select_parameters"]

Selection: TypeAlias = str | Sequence[str] | Callable[[str, Tensor], bool] | None


class ParameterSpace(VectorSpace):
    """The flat layout of a set of named tensors.

    Attributes
    ----------
    n
        Number of entries of all tensors together; the length of a flat vector.
    dtype, device
        Of flat vectors: float64 if any tensor is float64, else float32 (also for half precision,
        because Krylov vectors need more digits than the model); the first tensor's device.
    names
        The tensors' names, in the order of the flat vector.
    slices
        The place of each tensor in the flat vector, by name.
    """

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
        if dtype is None:
            wide = any(tensor.dtype == torch.float64 for tensor in tensors.values())
            dtype = torch.float64 if wide else torch.float32
        if dtype not in {torch.float32, torch.float64}:
            msg = f"vectors are float32 or float64, not {dtype}; the model's own dtype may differ"
            raise ArgumentTypeError(msg)
        self.names = tuple(tensors)
        self.shapes = tuple(tensor.shape for tensor in tensors.values())
        self.slices: dict[str, slice] = {}
        start = 0
        for name, tensor in tensors.items():
            self.slices[name] = slice(start, start + tensor.numel())
            start += tensor.numel()
        device = next(iter(tensors.values())).device if tensors else torch.device("cpu")
        super().__init__(start, dtype, device)

    def __repr__(self) -> str:
        tensors = "1 tensor" if len(self.names) == 1 else f"{len(self.names)} tensors"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"ParameterSpace(n={self.n:,} in {tensors}, {dtype}, {self.device})"

    def flatten(self, tensors: Mapping[str, Tensor] | Sequence[Tensor]) -> Tensor:
        """Flat vector (n,) of one tensor per parameter, given by name or in order.

        Raises
        ------
        ArgumentError
            A tensor is missing, superfluous, or has another shape than its parameter.
        """
        if isinstance(tensors, Mapping):
            if set(tensors) != set(self.names):
                odd = sorted(set(tensors) ^ set(self.names))
                msg = f"expected one tensor for each of {len(self.names)} names; check {odd[0]!r}"
                raise ArgumentError(msg)
            tensors = [tensors[name] for name in self.names]
        if len(tensors) != len(self.names):
            msg = f"expected {len(self.names)} tensors, one per parameter, got {len(tensors)}"
            raise ArgumentError(msg)
        flat = self.empty()
        for name, shape, tensor in zip(self.names, self.shapes, tensors, strict=True):
            if tensor.shape != shape:
                msg = f"{name!r} has shape {tuple(shape)}, got a tensor of {tuple(tensor.shape)}"
                raise ArgumentError(msg)
            flat[self.slices[name]] = tensor.detach().reshape(-1).to(flat)
        return flat

    def views(self, flat: Tensor) -> list[Tensor]:
        """The parts of a flat vector in the parameters' shapes, without copying."""
        places = self.slices.values()
        return [flat[s].view(shape) for s, shape in zip(places, self.shapes, strict=True)]

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """The parts of a flat vector (n,) by parameter name, as views in the parameters' shapes."""
        if flat.shape != (self.n,):
            msg = f"expected a flat vector of shape ({self.n},), got {tuple(flat.shape)}"
            raise ArgumentError(msg)
        return dict(zip(self.names, self.views(flat), strict=True))

    def modules(self) -> dict[str, tuple[str, ...]]:
        """Parameter names by the module that owns them (the name without its last part)."""
        owners: dict[str, list[str]] = {}
        for name in self.names:
            owners.setdefault(name.rpartition(".")[0], []).append(name)
        return {module: tuple(names) for module, names in owners.items()}


def select_parameters(model: nn.Module, params: Selection = None) -> dict[str, Tensor]:
    """The parameters that `params` selects, by name, each tied tensor once.

    Parameters
    ----------
    params
        None: all that require a gradient. A glob or several: those whose name matches one of them
        (`*` also matches dots); a tied tensor matches under each of its names. A function
        `(name, parameter) -> bool`: those for which it is true.

    Raises
    ------
    ParameterSelectionError
        Nothing is selected, a glob matches nothing, or a selected parameter cannot be
        differentiated (integer, complex, sparse, not initialised, or without memory).
    """
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        tensors[id(parameter)] = parameter
    aliases = [(names[key], tensors[key]) for key in names]
    if not aliases:
        msg = f"{type(model).__name__} has no parameters at all"
        raise ParameterSelectionError(msg)

    if params is None:
        chosen = [(n, p) for n, p in aliases if p.requires_grad]
        if not chosen:
            msg = (
                f"none of the {len(aliases)} parameters of {type(model).__name__} requires a "
                "gradient; unfreeze some, or select frozen ones with params='*'"
            )
            raise ParameterSelectionError(msg)
    elif callable(params):
        chosen = [(n, p) for n, p in aliases if any(params(name, p) for name in n)]
        if not chosen:
            msg = f"the function given as params selected none of {len(aliases)} parameters"
            raise ParameterSelectionError(msg)
    else:
        globs = [params] if isinstance(params, str) else list(params)
        for glob in globs:
            if not isinstance(glob, str):
                msg = f"params holds a {type(glob).__name__}; expected globs over parameter names"
                raise ArgumentTypeError(msg)
            if not any(fnmatch.fnmatchcase(name, glob) for n, _ in aliases for name in n):
                known = [name for n, _ in aliases for name in n]
                raise ParameterSelectionError(_no_match(glob, known))
        chosen = [
            (n, p)
            for n, p in aliases
            if any(fnmatch.fnmatchcase(name, glob) for name in n for glob in globs)
        ]
        if not chosen:
            msg = "params is an empty list; give at least one glob, or None for all"
            raise ParameterSelectionError(msg)

    selected = {n[0]: p for n, p in chosen}
    for name, tensor in selected.items():
        if problem := _cannot_differentiate(tensor):
            msg = f"parameter {name!r} {problem}; leave it out with params="
            raise ParameterSelectionError(msg)
    return selected


def _no_match(glob: str, names: list[str]) -> str:
    if any(name.startswith(glob + ".") for name in names):
        near = [glob + ".*"]
    else:
        near = difflib.get_close_matches(glob, names, n=3, cutoff=0.3) or names[:3]
    return (
        f"no parameter matches {glob!r}. Near matches: {', '.join(repr(name) for name in near)}; "
        f"the model has {len(names)} parameter names, see model.named_parameters()"
    )


def _cannot_differentiate(parameter: Tensor) -> str | None:
    if isinstance(parameter, UninitializedParameter):
        return "is not initialised yet (run the lazy module once on a batch)"
    if parameter.dtype.is_complex:
        return f"is complex ({parameter.dtype}), and spectra analyses real parameters"
    if not parameter.dtype.is_floating_point:
        return f"has dtype {parameter.dtype}, which has no derivatives"
    if parameter.layout != torch.strided:
        return f"is stored as {parameter.layout}, and flat vectors need dense parameters"
    if parameter.device.type == "meta":
        return "is on the meta device, without numbers (load the weights first)"
    return None
