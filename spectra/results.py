"""What every answer shares: where it came from, saving, loading and plotting.

A result is a frozen dataclass. Its fields are numbers, strings, tuples, dictionaries of such,
NumPy arrays, torch tensors or other results; `save` writes the arrays to safetensors and the rest
to JSON, and `load` gives the same result back. Nothing is ever pickled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import math
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import scipy
import torch
from torch import Tensor

from spectra.arrays import read_arrays
from spectra.documents import check_seal
from spectra.errors import ArgumentError, StorageError
from spectra.saving import (
    Staged,
    arrays_path,
    document_path,
    find_arrays,
    find_document,
    stage,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "FORMAT_VERSION",
    "Result",
    "decode",
    "dimension",
    "encode",
    "load",
    "load_staged",
    "stage_result",
    "versions",
]

FORMAT_VERSION = 2
# What version 1 wrote is read, too: it had no checksums.
_MEMBERS = {
    1: {"format", "versions", "result"},
    2: {"format", "versions", "result", "arrays_sha256", "checksum"},
}


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

        Returns the path of the JSON file. An existing result of that name is replaced: whoever
        loads it meanwhile, or after the process was killed, finds the old one or the new one.
        Saving under one name from several processes at once may leave parts of both, which `load`
        refuses. The JSON holds its own checksum (see `spectra.documents`) and, as `arrays_sha256`,
        what `sha256sum` prints for the arrays.

        Raises
        ------
        StorageError
            The files cannot be written, or a field cannot be expressed in JSON.
        """
        staged = stage_result(self, path)
        try:
            staged.publish()
        except OSError as error:
            msg = f"could not write the result to {str(staged.stem)!r}: {error}"
            raise StorageError(msg) from error
        return document_path(staged.stem)

    def plot(self, ax: Axes | None = None, **options: Any) -> Axes:
        """Draw the result on `ax` (a new figure by default) and return the Axes.

        The options are those of the function of this result's kind in `spectra.report.plots`.
        """
        # By name, at the time of use: figures stand above results, and matplotlib loads slowly.
        plots = importlib.import_module("spectra.report.plots")
        axes: Axes = plots.plot(self, ax=ax, **options)
        return axes

    def _repr_html_(self) -> str:
        """What a notebook shows: the text of `print`, and the figures."""
        notebook = importlib.import_module("spectra.report.notebook")
        html: str = notebook.html_of(self)
        return html


def dimension(result: Any, length: int) -> int:
    """The n of the operator that a result with vectors of some length is of.

    Of vectors that are spread over processes a result has a part.
    """
    n = (result.provenance.get("operator") or {}).get("n")
    return n if type(n) is int and n > length else length


def _refuse_parts(result: Result) -> None:
    """Refuse vectors that are spread over processes: each would write its part over the others."""
    operator = getattr(result, "provenance", {}).get("operator") or {}
    for field in dataclasses.fields(result):
        value = getattr(result, field.name)
        if isinstance(value, Result):
            _refuse_parts(value)
        elif isinstance(value, Tensor) and "sharded" in operator and len(value) < operator["n"]:
            msg = (
                f"the vectors of this {type(result).__name__} are spread over processes: gather "
                "them with H.collected(result), on all ranks, and save what rank 0 gets; or have "
                "every rank write its part with H.space.save_vectors(result.vectors, directory)"
            )
            raise StorageError(msg)


def stage_result(result: Result, path: str | Path) -> Staged:
    """Bring a result to the disk beside the one that it is to replace.

    Raises
    ------
    StorageError
        As `Result.save`; nothing is left behind.
    """
    _refuse_parts(result)
    stem = _stem(path)
    arrays: dict[str, Tensor] = {}
    try:
        document = {
            "format": FORMAT_VERSION,
            "versions": versions(),
            "result": encode(result, "", arrays),
        }
        return stage(stem, document, arrays)
    except StorageError:
        raise
    except (OSError, ValueError, TypeError, RuntimeError, LookupError) as error:
        msg = f"could not write the result to {str(stem)!r}: {type(error).__name__}: {error}"
        raise StorageError(msg) from error


def load(path: str | Path) -> Result:
    """Read a result that `Result.save` wrote, or that of a directory which `spectra analyze` wrote.

    Arrays come back as they were saved, tensors on the CPU. Files of any origin can be read: no
    code is run, and sizes and depth are limited. Whoever means to deceive can write numbers and
    their checksums, though.

    Raises
    ------
    StorageError
        The files are missing, damaged, do not belong together, are from a newer format, or no
        result of spectra.
    """
    stem = _stem(path)
    if stem.is_dir() and not document_path(stem).exists():
        # A run directory.
        stem = stem / "analysis"
    before = None
    while True:
        document, arrays = _found(stem)
        if arrays is not None:
            return _decoded(stem, document, arrays)
        # It may have been replaced between the two.
        if document["checksum"] == before:
            msg = (
                f"the result at {str(stem)!r} is damaged: the arrays in {stem.name}.safetensors "
                f"are missing or not those that {stem.name}.json was written with (their SHA-256 "
                "differs); restore both files together, or compute it again"
            )
            raise StorageError(msg)
        before = document["checksum"]


def load_staged(path: str | Path, checksum: str) -> Result | None:
    """As `load`, but only the result whose JSON has this checksum, published or not.

    None where there is another one, or other arrays.
    """
    stem = _stem(path)
    document, arrays = _found(stem, checksum)
    if arrays is None or document.get("checksum") != checksum:
        return None
    return _decoded(stem, document, arrays)


def _found(
    stem: Path, checksum: str | None = None
) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
    """The JSON of a result, not damaged and of a known format, and its arrays if they are there."""
    path = str(document_path(stem))
    with _damage_named(stem, "is damaged or not one of spectra's"):
        try:
            document = find_document(stem, checksum)
        except FileNotFoundError as error:
            msg = f"no result at {path!r}; give the path that was passed to save()"
            raise StorageError(msg) from error
    if not isinstance(document, dict) or "result" not in document:
        msg = f"{path!r} is JSON but holds no result of spectra"
        raise StorageError(msg)
    found = document.get("format")
    if type(found) is not int or found not in _MEMBERS:
        msg = (
            f"{path!r} has format {found!r}, this version of spectra reads format "
            f"{' and '.join(map(str, _MEMBERS))}; update spectra"
        )
        raise StorageError(msg)
    with _damage_named(stem, "is damaged"):
        # A result of version 2 must not pass for one without checksums.
        if odd := set(document) - _MEMBERS[found]:
            msg = f"format {found} has no member {min(odd)[:80]!r}"
            raise ValueError(msg)
        if found == 1:
            published = arrays_path(stem)
            return document, read_arrays(published)[0] if published.exists() else {}
        check_seal(document)
        return document, find_arrays(stem, document)


def _decoded(stem: Path, document: dict[str, Any], arrays: dict[str, Tensor]) -> Result:
    # Of any kind: damaged values also pass through the checks of every result class.
    with _damage_named(stem, "is damaged"):
        result = decode(document["result"], arrays)
    if not isinstance(result, Result):
        msg = f"{str(document_path(stem))!r} is JSON but holds no result of spectra"
        raise StorageError(msg)
    return result


@contextlib.contextmanager
def _damage_named(stem: Path, what: str) -> Iterator[None]:
    """Whatever goes wrong with what a file says is said as a StorageError."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        msg = f"the result at {str(stem)!r} {what}: {type(error).__name__}: {error}"
        raise StorageError(msg) from error


def _stem(path: str | Path) -> Path:
    path = Path(path)
    if not path.name:
        msg = f"cannot save or load a result at {str(path)!r}: name a file in it"
        raise ArgumentError(msg)
    return path.with_suffix("") if path.suffix in {".json", ".safetensors"} else path


def encode(value: Any, where: str, arrays: dict[str, Tensor]) -> Any:
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
    if isinstance(value, Tensor):
        kept = value.detach()
        return {"tensor": _put(lambda: _plain(kept), where, arrays)}
    if isinstance(value, np.ndarray):
        name = _put(lambda: _from_numpy(value), where, arrays)
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


def _put(make: Callable[[], Tensor], where: str, arrays: dict[str, Tensor]) -> str:
    """Add an array under a name that no other has, and return the name."""
    try:
        array = make()
    except (TypeError, ValueError, RuntimeError) as error:
        msg = f"cannot save {where!r}: {error}"
        raise StorageError(msg) from error
    # Readers of other languages take no halves of surrogate pairs.
    where = where.encode("utf-8", "backslashreplace").decode()
    # Places may coincide: {"a.b": x} and {"a": {"b": y}}.
    while where in arrays:
        where += "'"
    arrays[where] = array
    return where


def _plain(tensor: Tensor) -> Tensor:
    """The tensor as it lies in a file."""
    return tensor.cpu().resolve_conj().resolve_neg().contiguous()


def _from_numpy(array: np.ndarray) -> Tensor:
    array = np.ascontiguousarray(array)
    # torch warns of memory that it must not write to.
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def decode(value: Any, arrays: dict[str, Tensor]) -> Any:
    """The value that `encode` wrote; an exception of any kind where it did not."""
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
        array = arrays[value["array"]].numpy().reshape(value["shape"])
        if list(array.shape) != value["shape"]:
            msg = f"an array has the shape {array.shape}, expected {value['shape']}"
            raise ValueError(msg)
        return array
    return float(value["float"])
