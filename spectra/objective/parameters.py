"""Which parameters are analysed, and where does each sit in the flat vector?"""

from __future__ import annotations

import difflib
import fnmatch
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from spectra.distributed.collectives import agreed
from spectra.errors import ArgumentError, ArgumentTypeError, ParameterSelectionError
from spectra.objective.stored_vectors import Box, read_parts, write_part
from spectra.objective.vectors import VectorSpace, dot

__all__ = [
    "By",
    "NamedTensors",
    "ParameterSpace",
    "Selection",
    "all_parameters",
    "grouped",
    "layer_of",
    "matching",
    "select_parameters",
    "stand_ins",
]

Selection: TypeAlias = str | Sequence[str] | Callable[[str, Tensor], bool] | None
By = Literal["layer", "module", "parameter"]
# Tensors, each with all of its names: a tied tensor has several.
NamedTensors: TypeAlias = Sequence[tuple[Sequence[str], Tensor]]


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
    sizes
        How many entries each tensor has, in order.
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
        self.sizes = tuple(tensor.numel() for tensor in tensors.values())
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
        flat, given = self.empty(), self._in_order(tensors)
        for name, shape, tensor in zip(self.names, self.shapes, given, strict=True):
            if tensor.shape != shape:
                msg = f"{name!r} has shape {tuple(shape)}, got a tensor of {tuple(tensor.shape)}"
                raise ArgumentError(msg)
            flat[self.slices[name]] = tensor.detach().reshape(-1).to(flat)
        return flat

    def _in_order(self, tensors: Mapping[str, Tensor] | Sequence[Tensor]) -> Sequence[Tensor]:
        if isinstance(tensors, Mapping):
            if set(tensors) != set(self.names):
                odd = sorted(set(tensors) ^ set(self.names))
                msg = f"expected one tensor for each of {len(self.names)} names; check {odd[0]!r}"
                raise ArgumentError(msg)
            tensors = [tensors[name] for name in self.names]
        if len(tensors) != len(self.names):
            msg = f"expected {len(self.names)} tensors, one per parameter, got {len(tensors)}"
            raise ArgumentError(msg)
        return tensors

    def subspace(self, places: Sequence[int]) -> ParameterSpace:
        """That of some of the parameters, by their places."""
        shapes = {self.names[i]: torch.empty(self.shapes[i], device="meta") for i in places}
        space = ParameterSpace(shapes, self.dtype)
        space.device = self.device
        return space

    def views(self, flat: Tensor) -> list[Tensor]:
        """The parts of a flat vector in the parameters' shapes, without copying."""
        parts = flat.split_with_sizes(self.sizes)
        return [
            part if len(shape) == 1 else part.view(shape)
            for part, shape in zip(parts, self.shapes, strict=True)
        ]

    def unflatten(self, flat: Tensor, params: Selection = None) -> dict[str, Tensor]:
        """The parts of a flat vector (n,) by parameter name, as views in the parameters' shapes.

        Parameters
        ----------
        params
            Globs over names, or a function `(name, part) -> bool`: only those.

        Raises
        ------
        ArgumentError, ParameterSelectionError
            A vector of another shape; nothing is selected.
        """
        if flat.shape != (self.length,):
            msg = f"expected a flat vector of shape ({self.length},), got {tuple(flat.shape)}"
            raise ArgumentError(msg)
        parts = dict(zip(self.names, self.views(flat), strict=True))
        if params is None:
            return parts
        chosen = matching([([name], part) for name, part in parts.items()], params)
        return {names[0]: part for names, part in chosen}

    def save_vectors(self, vectors: Tensor, directory: str | Path) -> None:
        """Store vectors (n, k), such as eigenvectors, by parameter in files of safetensors.

        Where parameters are spread over processes each of them calls this, and writes its part.

        Raises
        ------
        ArgumentError
            They are not of this space.
        StorageError
            The files cannot be written.
        """
        if vectors.dim() != 2 or len(vectors) != self.length:
            msg = f"expected vectors ({self.length}, k) as columns, got {tuple(vectors.shape)}"
            raise ArgumentError(msg)
        parts = {
            name: (box, vectors[self.slices[name]].T.reshape(-1, *box[1]))
            for name, box in self._boxes(written=True).items()
        }
        writing = agreed(self.ranks, "storing vectors", lambda: uuid.uuid4().hex)
        write_part(Path(directory), self._place, parts, self._whole_shapes(), writing)

    def load_vectors(self, directory: str | Path) -> Tensor:
        """Vectors (n, k) that `save_vectors` stored, from any number of processes.

        Raises
        ------
        StorageError
            They are of other parameters, damaged or incomplete.
        """
        parts = read_parts(Path(directory), self._boxes(), self._whole_shapes())
        count = max((len(part) for part in parts.values()), default=0)
        vectors = self.empty(count).T
        for name, part in parts.items():
            vectors[self.slices[name]] = part.reshape(count, -1).T.to(vectors)
        return vectors

    @property
    def _place(self) -> tuple[int, int]:
        """The number of this process, and of how many."""
        return 0, 1

    def _boxes(self, *, written: bool = False) -> dict[str, Box]:
        """Where what is here of every parameter is in it, if it is not empty."""
        shapes = zip(self.names, self.shapes, strict=True)
        return {name: ((0,) * len(s), tuple(s)) for name, s in shapes if s.numel()}

    def _whole_shapes(self) -> dict[str, torch.Size]:
        return dict(zip(self.names, self.shapes, strict=True))

    def modules(self) -> dict[str, tuple[slice, ...]]:
        """The places of each module's own parameters, by its name; adjacent ones joined."""
        places: dict[str, list[slice]] = {}
        for name, place in self.slices.items():
            own = places.setdefault(name.rpartition(".")[0], [])
            if own and own[-1].stop == place.start:
                own[-1] = slice(own[-1].start, place.stop)
            else:
                own.append(place)
        return {module: tuple(own) for module, own in places.items()}

    def inner_by_parameter(self, x: Tensor, y: Tensor) -> np.ndarray:
        """(parameters,) float64 inner products of the parts of two vectors, in one transfer."""
        return self._by_parameter(lambda place: dot(x[place], y[place]))

    def sums_by_parameter(self, vector: Tensor) -> np.ndarray:
        """(parameters,) float64 sums over the entries of each parameter."""
        return self._by_parameter(lambda place: vector[place].sum(dtype=torch.float64))

    def any_by_parameter(self, vector: Tensor) -> np.ndarray:
        """(parameters,) whether the part of a vector that belongs to each is not all zero."""
        return self._by_parameter(lambda place: vector[place].any().double()) > 0

    def _by_parameter(self, value: Callable[[slice], Tensor]) -> np.ndarray:
        found: np.ndarray = torch.stack([value(p) for p in self.slices.values()]).cpu().numpy()
        return found


def layer_of(module: str) -> str:
    """The layer that a module belongs to, by the modules' dotted names.

    That is the name up to the first number in it, or its first two parts where there is none.

    >>> layer_of("model.layers.3.self_attn.q_proj"), layer_of("encoder.pooler.dense")
    ('model.layers.3', 'encoder.pooler')
    """
    parts = module.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), 1)
    return ".".join(parts[: number + 1])


def grouped(parameters: Sequence[str], by: By) -> dict[str, list[int]]:
    """The places of the parameters that every block has, by the block's name, in their order.

    Raises
    ------
    ArgumentError
        Another `by`.
    """
    if by not in get_args(By):
        msg = f"by={by!r}; expected 'layer', 'module' or 'parameter'"
        raise ArgumentError(msg)
    places: dict[str, list[int]] = {}
    for i, name in enumerate(parameters):
        module = name.rpartition(".")[0]
        block = {"parameter": name, "module": module, "layer": layer_of(module)}[by]
        places.setdefault(block, []).append(i)
    return places


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
    aliases = all_parameters(model)
    if not aliases:
        msg = f"{type(model).__name__} has no parameters at all"
        raise ParameterSelectionError(msg)
    for names, parameter in aliases:
        # Selected or not: the first forward pass would change the model.
        if isinstance(parameter, UninitializedParameter):
            msg = f"parameter {names[0]!r} is not initialised yet; run the model once on a batch"
            raise ParameterSelectionError(msg)
    if params is None:
        chosen: NamedTensors = [(names, p) for names, p in aliases if p.requires_grad]
        if not chosen:
            msg = (
                f"none of the {len(aliases)} parameters of {type(model).__name__} requires a "
                "gradient; unfreeze some, or select frozen ones with params='*'"
            )
            raise ParameterSelectionError(msg)
    else:
        chosen = matching(aliases, params)
    selected = {names[0]: p for names, p in chosen}
    for name, parameter in selected.items():
        if problem := _cannot_differentiate(parameter):
            msg = f"parameter {name!r} {problem}; leave it out with params="
            raise ParameterSelectionError(msg)
    if not any(parameter.numel() for parameter in selected.values()):
        msg = f"the {len(selected)} selected parameters have no entries: all are of size 0"
        raise ParameterSelectionError(msg)
    _refuse_shared_memory(selected)
    return selected


def _refuse_shared_memory(selected: Mapping[str, Tensor]) -> None:
    """Two parameters on one memory are one parameter to a loss, and two to a derivative."""
    places: dict[tuple[torch.device, int], str] = {}
    for name, parameter in selected.items():
        if parameter.numel() == 0 or parameter.data_ptr() == 0:
            continue
        place = (parameter.device, parameter.data_ptr())
        if place in places:
            msg = (
                f"parameters {places[place]!r} and {name!r} are two on the same memory, so that a "
                "change of one changes the other; tie them by making them one parameter "
                "(module.b = module.a), or give one its own memory"
            )
            raise ParameterSelectionError(msg)
        places[place] = name


def stand_ins(parameters: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Zeros in the parameters' shapes, to be added to copies of them in `dtype`.

    Derivatives by them are those by the parameters, and not rounded to the parameters' own dtype.

    Raises
    ------
    ArgumentTypeError
        Another dtype than float32 or float64.
    """
    if dtype not in {torch.float32, torch.float64}:
        msg = f"compute_dtype={dtype}; expected torch.float32 or torch.float64"
        raise ArgumentTypeError(msg)
    return {
        # A single zero, expanded: however large the parameter, it takes no memory.
        name: torch.zeros((), dtype=dtype, device=p.device).expand(p.shape).requires_grad_()
        for name, p in parameters.items()
    }


def all_parameters(model: nn.Module) -> list[tuple[list[str], Tensor]]:
    """Every parameter of a model once, with all of its names."""
    found: dict[int, tuple[list[str], Tensor]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), ([], parameter))[0].append(name)
    return list(found.values())


def matching(
    tensors: NamedTensors, params: str | Sequence[str] | Callable[[str, Tensor], bool]
) -> list[tuple[Sequence[str], Tensor]]:
    """Those of some named tensors that globs or a function select, in their own order.

    Raises
    ------
    ArgumentTypeError
        `params` is neither globs nor a function.
    ParameterSelectionError
        Nothing is selected, or a glob matches nothing.
    """
    if callable(params) and not isinstance(params, nn.Module):
        chosen = [(names, p) for names, p in tensors if any(params(name, p) for name in names)]
        if not chosen:
            msg = f"the function given as params selected none of {len(tensors)} parameters"
            raise ParameterSelectionError(msg)
        return chosen
    if isinstance(params, Tensor | nn.Module) or not isinstance(params, Iterable):
        msg = (
            f"params is a {type(params).__name__}; expected a glob over parameter names such as "
            "'layers.0.*', a list of globs, or a function (name, parameter) -> bool"
        )
        raise ArgumentTypeError(msg)
    globs = [params] if isinstance(params, str) else list(params)
    for glob in globs:
        if not isinstance(glob, str):
            msg = f"params holds a {type(glob).__name__}; expected globs over parameter names"
            raise ArgumentTypeError(msg)
        if not any(fnmatch.fnmatchcase(name, glob) for names, _ in tensors for name in names):
            raise ParameterSelectionError(
                _no_match(glob, [n for names, _ in tensors for n in names])
            )
    chosen = [
        (names, p)
        for names, p in tensors
        if any(fnmatch.fnmatchcase(name, glob) for name in names for glob in globs)
    ]
    if not chosen:
        msg = "params is an empty list; give at least one glob, or None for all"
        raise ParameterSelectionError(msg)
    return chosen


def _no_match(glob: str, names: list[str]) -> str:
    if any(name.startswith(glob + ".") for name in names):
        near = [glob + ".*"]
    else:
        near = difflib.get_close_matches(glob, names, n=3, cutoff=0.3) or names[:3]
    return (
        f"no parameter matches {glob!r}. Near matches: {', '.join(repr(name) for name in near)}; "
        f"there are {len(names)} parameter names, see model.named_parameters()"
    )


def _cannot_differentiate(parameter: Tensor) -> str | None:
    if parameter.dtype.is_complex:
        return f"is complex ({parameter.dtype}), and spectra analyses real parameters"
    if not parameter.dtype.is_floating_point:
        return f"has dtype {parameter.dtype}, which has no derivatives"
    if parameter.layout != torch.strided:
        return f"is stored as {parameter.layout}, and flat vectors need dense parameters"
    if parameter.device.type == "meta":
        return "is on the meta device, without numbers (load the weights first)"
    if parameter.is_inference():
        # Autograd does not record such a tensor, without a word.
        return "was created under torch.inference_mode() (build or load the model outside of it)"
    return None
