"""What every answer shares: where it came from, saving, loading and plotting.

A result is a frozen dataclass. Its fields are numbers, strings, tuples, dictionaries of such,
NumPy arrays, torch tensors or other results; `save` writes the arrays to safetensors and the rest
to JSON, and `load` gives the same result back. Nothing is ever pickled.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import scipy
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from spectra.errors import ArgumentError, StorageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["FORMAT_VERSION", "Result", "decode", "encode", "load", "versions"]

FORMAT_VERSION = 1


def versions() -> dict[str, str]:
    """Versions of everything that a number may depend on."""
    from spectra import __version__

    return {
        "spectra": __version__,
        "torch": str(torch.__version__),
        "scipy": scipy.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """Base of all results.

    Attributes
    ----------
    provenance
        Where the numbers came from: the operator's description, seed, options, versions.
    partial
        The computation was stopped before its end, by Ctrl-C or SIGTERM, and can be resumed.
    """

    provenance: dict[str, Any] = dataclasses.field(default_factory=dict, kw_only=True, repr=False)
    partial: bool = dataclasses.field(default=False, kw_only=True, repr=False)

    _kinds: ClassVar[dict[str, type[Result]]] = {}

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        Result._kinds[cls.__name__] = cls

    def save(self, path: str | Path) -> Path:
        """Write `path.json` and, where the result holds arrays, `path.safetensors`.

        Returns the path of the JSON file. An existing result of that name is replaced.

        Raises
        ------
        StorageError
            The files cannot be written, or a field cannot be expressed in JSON.
        """
        stem = _stem(path)
        arrays: dict[str, torch.Tensor] = {}
        try:
            document = {
                "format": FORMAT_VERSION,
                "versions": versions(),
                "result": encode(self, "", arrays),
            }
            text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
            content = text.encode() + b"\n"
            stem.parent.mkdir(parents=True, exist_ok=True)
            # In this order a reader finds no JSON file without its arrays, or with another's.
            _with(stem, ".json").unlink(missing_ok=True)
            _with(stem, ".safetensors").unlink(missing_ok=True)
            if arrays:
                save_file(arrays, _with(stem, ".safetensors"))
            _with(stem, ".json").write_bytes(content)
            if arrays:
                # safetensors lets the owner alone read its files.
                shutil.copymode(_with(stem, ".json"), _with(stem, ".safetensors"))
        except StorageError:
            raise
        except (OSError, ValueError, LookupError, RecursionError, SafetensorError) as error:
            msg = f"could not write the result to {str(stem)!r}: {type(error).__name__}: {error}"
            raise StorageError(msg) from error
        return _with(stem, ".json")

    def plot(self, ax: Axes | None = None, **options: Any) -> Axes:
        """Draw the result on `ax` (a new figure by default) and return the Axes.

        The options are those of the function of this result's kind in `spectra.report.plots`.
        """
        # By name, at the time of use: figures stand above results, and matplotlib loads slowly.
        plots = importlib.import_module("spectra.report.plots")
        axes: Axes = plots.plot(self, ax=ax, **options)
        return axes


def load(path: str | Path) -> Result:
    """Read a result that `Result.save` wrote.

    Arrays come back as they were saved, tensors on the CPU.

    Raises
    ------
    StorageError
        The files are missing, damaged, from a newer format, or no result of spectra.
    """
    stem = _stem(path)
    document_path, arrays_path = _with(stem, ".json"), _with(stem, ".safetensors")
    try:
        document = json.loads(document_path.read_text(encoding="utf-8"))
        arrays = load_file(arrays_path) if arrays_path.exists() else {}
    except FileNotFoundError as error:
        msg = f"no result at {str(document_path)!r}; give the path that was passed to save()"
        raise StorageError(msg) from error
    except (OSError, ValueError, SafetensorError, RecursionError) as error:
        msg = f"the result at {str(stem)!r} is damaged or not one of spectra's: {error}"
        raise StorageError(msg) from error
    if not isinstance(document, dict) or "result" not in document:
        msg = f"{str(document_path)!r} is JSON but holds no result of spectra"
        raise StorageError(msg)
    found = document.get("format")
    if found != FORMAT_VERSION:
        msg = (
            f"{str(document_path)!r} has format {found!r}, this version of spectra reads "
            f"format {FORMAT_VERSION}; update spectra"
        )
        raise StorageError(msg)
    try:
        result = decode(document["result"], arrays)
    except Exception as error:
        # Of any kind: damaged values also pass through the checks of every result class.
        msg = f"the result at {str(stem)!r} is damaged: {type(error).__name__}: {error}"
        raise StorageError(msg) from error
    if not isinstance(result, Result):
        msg = f"{str(document_path)!r} is JSON but holds no result of spectra"
        raise StorageError(msg)
    return result


def _stem(path: str | Path) -> Path:
    path = Path(path)
    if not path.name:
        msg = f"cannot save or load a result at {str(path)!r}: name a file in it"
        raise ArgumentError(msg)
    return path.with_suffix("") if path.suffix in {".json", ".safetensors"} else path


def _with(stem: Path, suffix: str) -> Path:
    """`stem` with `suffix` behind its whole name (`with_suffix` would cut `top.10` to `top`)."""
    return stem.with_name(stem.name + suffix)


def encode(value: Any, where: str, arrays: dict[str, torch.Tensor]) -> Any:
    """JSON for `value`; arrays go to `arrays` under the name of their place."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        number = float(value)
        # JSON has no nan or inf, and the readers of other languages refuse Python's spelling.
        return number if math.isfinite(number) else {"float": repr(number)}
    if isinstance(value, torch.Tensor):
        # One copy: safetensors takes no tensors that share memory.
        kept = value.detach()
        copy = {"memory_format": torch.contiguous_format}
        return {"tensor": _put(lambda: kept.cpu().clone(**copy), where, arrays)}
    if isinstance(value, np.ndarray):
        name = _put(lambda: torch.from_numpy(np.ascontiguousarray(value).copy()), where, arrays)
        return {"array": name, "shape": list(value.shape)}
    if isinstance(value, Result):
        fields = {
            f.name: encode(getattr(value, f.name), f"{where}.{f.name}".lstrip("."), arrays)
            for f in dataclasses.fields(value)
        }
        return {"kind": type(value).__name__, "fields": fields}
    if isinstance(value, dict):
        if odd := [key for key in value if not isinstance(key, str)]:
            msg = f"cannot save {where!r}: its key {odd[0]!r} is no string, and JSON has no others"
            raise StorageError(msg)
        return {"dict": {k: encode(v, f"{where}.{k}", arrays) for k, v in value.items()}}
    if isinstance(value, tuple | list):
        items = [encode(v, f"{where}.{i}", arrays) for i, v in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    msg = f"cannot save {where!r}: a {type(value).__name__} has no place in JSON or safetensors"
    raise StorageError(msg)


def _put(make: Callable[[], torch.Tensor], where: str, arrays: dict[str, torch.Tensor]) -> str:
    """Add an array under a name that no other has, and return the name."""
    try:
        array = make()
    except (TypeError, ValueError, RuntimeError) as error:
        msg = f"cannot save {where!r}: {error}"
        raise StorageError(msg) from error
    # Places may coincide: {"a.b": x} and {"a": {"b": y}}.
    while where in arrays:
        where += "'"
    arrays[where] = array
    return where


def decode(value: Any, arrays: dict[str, torch.Tensor]) -> Any:
    """The value that `encode` wrote; of any exception where it did not."""
    if isinstance(value, list):
        return [decode(v, arrays) for v in value]
    if not isinstance(value, dict):
        return value
    if "kind" in value:
        kind = Result._kinds[value["kind"]]
        known = {f.name for f in dataclasses.fields(kind)}
        fields = {k: decode(v, arrays) for k, v in value["fields"].items()}
        if unknown := set(fields) - known:
            msg = f"{kind.__name__} has no field {sorted(unknown)[0]!r}"
            raise ValueError(msg)
        return kind(**fields)
    if "dict" in value:
        return {k: decode(v, arrays) for k, v in value["dict"].items()}
    if "tuple" in value:
        return tuple(decode(v, arrays) for v in value["tuple"])
    if "tensor" in value:
        return arrays[value["tensor"]]
    if "array" in value:
        return arrays[value["array"]].numpy().reshape(value["shape"])
    return float(value["float"])
