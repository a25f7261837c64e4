"""Which weights did a training save, at which step? Read from a file, and put into the model.

Nothing is unpickled but tensors and plain containers (`torch.load(weights_only=True)`), and names
and shapes must be those of the model, every one: a number that stayed at its initial value would
give another Hessian.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from spectra.errors import ArgumentError

__all__ = ["SavedWeights", "optimizer_of", "put_into", "read_weights", "weights_kept"]

_PICKLES = {".pt", ".pth", ".bin", ".ckpt"}
# What people call the weights, the optimiser's state and the step among what they save.
_WEIGHTS = ("model", "state_dict", "model_state_dict", "module", "net", "network", "weights")
_OPTIMIZER = ("optimizer", "optimizer_state_dict", "optimizer_states", "optim", "opt")
_STEPS = ("step", "global_step", "iteration", "iter", "epoch")
# In directories as Hugging Face's libraries write them, the first that is there.
_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclass(frozen=True)
class SavedWeights:
    """What was read from one file or directory.

    Attributes
    ----------
    path
        Where from.
    tensors
        By name, as they were saved, on the CPU; mapped from the file until they are used.
    adapter
        The tensors are those of a PEFT adapter alone.
    optimizer
        The state of the optimiser, as its `state_dict()` gave it; None if it was not saved.
    step, step_from
        At which it was saved, and what says so: an entry that was saved with it ("step", "epoch"),
        or else its "name"; None if unknown.
    """

    path: Path
    tensors: dict[str, Tensor] = field(repr=False)
    adapter: bool = False
    optimizer: dict[str, Any] | None = field(default=None, repr=False)
    step: int | None = None
    step_from: str | None = None


def read_weights(path: str | Path) -> SavedWeights:
    """Read `.pt`, `.pth`, `.bin`, `.ckpt`, `.safetensors`, or a directory of Hugging Face's.

    Raises
    ------
    ArgumentError
        There is no such file, it cannot be read safely, or it holds no weights.
    """
    path = Path(path)
    if path.is_dir():
        return _read_directory(path)
    if not path.is_file():
        msg = f"no file or directory {str(path)!r} with saved weights"
        raise ArgumentError(msg)
    if path.suffix == ".safetensors":
        return SavedWeights(path, _safetensors(path), **_dated(None, path.stem))
    if path.suffix not in _PICKLES:
        known = ", ".join(sorted({*_PICKLES, ".safetensors"}))
        msg = (
            f"{str(path)!r} is no file of weights by its name; expected one of {known}, or a "
            "directory of Hugging Face's"
        )
        raise ArgumentError(msg)
    content = _unpickled(path)
    return SavedWeights(
        path,
        _weights_among(content, path),
        optimizer=_optimizer_among(content),
        **_dated(_step_among(content), path.stem),
    )


def _read_directory(path: Path) -> SavedWeights:
    name = next((name for name in _FILES if (path / name).is_file()), None)
    if name is None:
        msg = f"{str(path)!r} holds no weights; expected one of {', '.join(_FILES)}"
        raise ArgumentError(msg)
    parts = [name] if not name.endswith(".index.json") else _parts(path / name)
    tensors: dict[str, Tensor] = {}
    for part in parts:
        file = path / part
        if not file.is_file():
            msg = f"{str(path / name)!r} names the file {part!r}, which is not beside it"
            raise ArgumentError(msg)
        safe = file.suffix == ".safetensors"
        tensors |= _safetensors(file) if safe else _weights_among(_unpickled(file), file)
    state = path / "optimizer.pt"
    # transformers' Trainer.
    trained = _json(path / "trainer_state.json").get("global_step")
    return SavedWeights(
        path,
        tensors,
        adapter=name.startswith("adapter"),
        optimizer=_as_optimizer(_unpickled(state)) if state.is_file() else None,
        **_dated(("step", trained) if type(trained) is int else None, path.resolve().name),
    )


def _parts(index: Path) -> list[str]:
    names = _json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        msg = f"{str(index)!r} has no weight_map, so that it does not say where the weights are"
        raise ArgumentError(msg)
    parts = sorted(set(names.values()))
    for part in parts:
        if Path(part).name != part:
            msg = f"{str(index)!r} names {part!r}, which is not a file beside it"
            raise ArgumentError(msg)
    return parts


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        msg = f"cannot read {str(path)!r}: {error}"
        raise ArgumentError(msg) from error
    return content if isinstance(content, dict) else {}


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        msg = f"cannot read {str(path)!r}: {error}"
        raise ArgumentError(msg) from error


def _unpickled(path: Path) -> Any:
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:
            # The format before torch 1.6 cannot be mapped.
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        msg = (
            f"cannot read {str(path)!r} without running code from it ({type(error).__name__}: "
            f"{_reason(error)}); save only tensors and plain containers, such as "
            "model.state_dict(), or, of a file that you trust, allow what it holds by "
            "torch.serialization.add_safe_globals"
        )
        raise ArgumentError(msg) from error


def _reason(error: Exception) -> str:
    """What torch.load says, without its advice to trust the file."""
    words = re.sub(r"\x1b\[[0-9;]*m", "", " ".join(str(error).split()))
    if found := re.search(r"[Uu]nsupported (?:global|class):? (?:GLOBAL )?([\w.]+\w)", words):
        return f"it holds a {found[1]}"
    return words.split(". ")[0][:200]


def _is_weights(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and any(isinstance(item, Tensor) for item in value.values())
        and all(isinstance(name, str) for name in value)
        and all(isinstance(v, Tensor) or k.endswith("_extra_state") for k, v in value.items())
    )


def _weights_among(content: Any, path: Path) -> dict[str, Tensor]:
    """The weights themselves, or the entry with them."""
    if _is_weights(content):
        found = content
    else:
        entries = content if isinstance(content, Mapping) else {}
        candidates = {name: value for name, value in entries.items() if _is_weights(value)}
        named = [name for name in _WEIGHTS if name in candidates]
        chosen = named or (list(candidates) if len(candidates) == 1 else [])
        if not chosen:
            what = f"entries {', '.join(map(repr, entries))}" if entries else "no entries"
            msg = (
                f"{str(path)!r} holds no weights, but {what}; expected model.state_dict(), or a "
                "dictionary with it under 'model'"
            )
            raise ArgumentError(msg)
        found = candidates[chosen[0]]
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def _optimizer_among(content: Any) -> dict[str, Any] | None:
    if not isinstance(content, Mapping):
        return None
    found = (_as_optimizer(content[name]) for name in _OPTIMIZER if name in content)
    return next((state for state in found if state is not None), None)


def _as_optimizer(value: Any) -> dict[str, Any] | None:
    """What an optimiser's state_dict() looks like; Lightning saves a list of them."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, Mapping) or not {"state", "param_groups"} <= set(value):
        return None
    return dict(value) if value["param_groups"] else None


def _dated(saved: tuple[str, int] | None, name: str) -> dict[str, Any]:
    """The step, and what says so."""
    if saved is not None:
        return {"step": saved[1], "step_from": saved[0]}
    step = _step_in(name)
    return {"step": step, "step_from": None if step is None else "name"}


def _step_among(content: Any) -> tuple[str, int] | None:
    if not isinstance(content, Mapping) or _is_weights(content):
        return None
    for name in _STEPS:
        step = content.get(name)
        if isinstance(step, Tensor) and step.numel() == 1:
            step = step.item()
        if type(step) is int:
            return ("epoch" if name == "epoch" else "step"), step
    return None


def _step_in(name: str) -> int | None:
    """The number of a name: of `step=500`, `checkpoint-500`, `model_0500`; not of `resnet18`."""
    named = re.findall(r"(?:step|iter|iteration|checkpoint|ckpt)[-_=]?(\d{1,15})", name.lower())
    last = named or re.findall(r"(?:^|[-_=.])(\d{1,15})$", name)
    return int(last[-1]) if last else None


# --- into the model -------------------------------------------------------------------------------


def put_into(model: nn.Module, saved: SavedWeights, *, only_check: bool = False) -> tuple[str, ...]:
    """Give the model the saved weights, all of them, and return what is to be known of that.

    Parameters
    ----------
    model
        Whose parameters and buffers are overwritten in place.
    saved
        Of the same model, as it is or wrapped in others whose names come before.
    only_check
        Change nothing.

    Raises
    ------
    ArgumentError
        Names or shapes are not those of the model.
    """
    held = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    names = _names_in_adapter(model) if saved.adapter else {name: name for name in held}
    tensors = _unwrapped(saved.tensors, names)
    missing = set(names).difference(tensors)
    # Of tied parameters one may be left out, as safetensors does.
    there = {_place(held[names[name]]) for name in set(names).intersection(tensors)}
    missing = {name for name in missing if _place(held[names[name]]) not in there}
    odd = set(tensors).difference(names)
    if missing or odd:
        told = [_some("lack", missing), _some("have besides", odd)]
        msg = (
            f"the weights in {str(saved.path)!r} are not those of the {type(model).__name__}: they "
            f"{' and '.join(filter(None, told))}. Give the model that was trained"
        )
        raise ArgumentError(msg)
    for name, tensor in tensors.items():
        if tensor.shape != held[names[name]].shape:
            msg = (
                f"{name!r} in {str(saved.path)!r} has the shape {tuple(tensor.shape)}, in the "
                f"{type(model).__name__} {tuple(held[names[name]].shape)}"
            )
            raise ArgumentError(msg)
    if not only_check:
        model.load_state_dict({names[name]: t for name, t in tensors.items()}, strict=False)
    rounded = {
        (str(tensor.dtype), str(to.dtype))
        for tensor, to in ((t, held[names[name]]) for name, t in tensors.items())
        if torch.promote_types(tensor.dtype, to.dtype) != to.dtype
    }
    return tuple(
        f"weights saved in {a.removeprefix('torch.')} were rounded to {b.removeprefix('torch.')}"
        for a, b in sorted(rounded)
    )


def _place(tensor: Tensor) -> Any:
    # Empty tensors have no memory, and are not tied.
    return (tensor.data_ptr(), tensor.shape) if tensor.numel() else id(tensor)


def _some(verb: str, names: set[str]) -> str:
    if not names:
        return ""
    shown = ", ".join(map(repr, sorted(names)[:3]))
    return f"{verb} {shown}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _unwrapped(tensors: dict[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Without what DistributedDataParallel, torch.compile or Lightning put before every name."""
    first = next(iter(tensors), "")
    parts = first.split(".")
    for count in range(len(parts)):
        prefix = "".join(f"{part}." for part in parts[:count])
        if first[len(prefix) :] in names:
            if all(name.startswith(prefix) for name in tensors):
                return {name[len(prefix) :]: tensor for name, tensor in tensors.items()}
            break
    return tensors


def _names_in_adapter(model: nn.Module) -> dict[str, str]:
    """Names of an adapter's parameters in the model by those in its file."""
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    plain = (name.replace(".modules_to_save.", ".").replace(".default.", ".") for name in trained)
    return dict(zip(plain, trained, strict=True))


@contextlib.contextmanager
def weights_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards parameters and buffers are as they were, to the last bit. Holds a copy of them."""
    held = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    copies = {name: tensor.clone() for name, tensor in held.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, tensor in held.items():
                tensor.copy_(copies[name])


# --- the optimiser --------------------------------------------------------------------------------


def optimizer_of(state: Mapping[str, Any]) -> Optimizer | str:
    """An optimiser with the saved options, for its stability threshold; or why there is none.

    It has no parameters of the model: the state alone does not say which of its entries belongs to
    which of them.
    """
    groups = state["param_groups"]
    kind = _kind_of(groups[0])
    if isinstance(kind, str):
        return kind
    known = kind([torch.zeros(1)]).defaults
    own = [
        {**{k: v for k, v in group.items() if k in known}, "params": [torch.zeros(1)]}
        for group in groups
    ]
    optimizer = kind(own)
    counts = [float(each["step"]) for each in state["state"].values() if "step" in each]
    if counts:
        for group in optimizer.param_groups:
            optimizer.state[group["params"][0]] = {"step": torch.tensor(min(counts))}
    return optimizer


def _kind_of(group: Mapping[str, Any]) -> Callable[..., Optimizer] | str:
    """The class of optimiser that has a group's options; they are all that was saved of it."""
    if "nesterov" in group:
        return SGD
    if "amsgrad" in group:
        decoupled = group.get("decoupled_weight_decay", None if group["weight_decay"] else False)
        if decoupled is None:
            return (
                "the saved optimiser is Adam or AdamW, which differ in what weight_decay means; "
                "pass optimizer="
            )
        return AdamW if decoupled else Adam
    if "centered" in group:
        return RMSprop
    if "initial_accumulator_value" in group:
        return Adagrad
    return "the saved optimiser is not among those whose threshold is known; pass optimizer="
