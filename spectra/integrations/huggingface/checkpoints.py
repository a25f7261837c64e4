"""What does a directory hold: which model, for which task, and is it safe to read?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from spectra.errors import TargetError

__all__ = ["Checkpoint", "Task", "in_short", "locate", "task_of"]

Task: TypeAlias = Literal["causal", "masked", "classify"]


@dataclass(frozen=True)
class Checkpoint:
    """A model in local files.

    Attributes
    ----------
    directory
        Where the model itself is, the base model of an adapter.
    gguf
        Name of the GGUF file in it, if it is one.
    adapter
        Directory of the PEFT adapter on top of it, if there is one.
    """

    directory: Path
    gguf: str | None = None
    adapter: Path | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What every `from_pretrained` is told."""
        packed = {} if self.gguf is None else {"gguf_file": self.gguf}
        return {**packed, "local_files_only": True, "trust_remote_code": False}

    @property
    def config(self) -> dict[str, Any]:
        """The model's config.json; empty for a GGUF file."""
        return {} if self.gguf else _read_json(self.directory / "config.json")


def task_of(model_dir: str | Path) -> Task:
    """The task that a checkpoint was saved for; "causal" where it does not say.

    Raises
    ------
    TargetError
        There is no checkpoint.
    """
    checkpoint = locate(Path(model_dir))
    if checkpoint.adapter is not None:
        kind = _read_json(checkpoint.adapter / "adapter_config.json").get("task_type")
        if kind in ("CAUSAL_LM", "SEQ_CLS"):
            return "causal" if kind == "CAUSAL_LM" else "classify"
    architectures = str(checkpoint.config.get("architectures"))
    if "ForMaskedLM" in architectures:
        return "masked"
    if "ForSequenceClassification" in architectures or "ForImageClassification" in architectures:
        return "classify"
    return "causal"


def locate(path: Path) -> Checkpoint:
    """The checkpoint that a path names: a directory, a GGUF file, or a PEFT adapter's directory.

    Raises
    ------
    TargetError
        There is none, or one that cannot be read safely.
    """
    if path.is_file() and path.suffix == ".gguf":
        return Checkpoint(path.parent, gguf=path.name)
    if not path.is_dir():
        msg = (
            f"no model directory {str(path)!r}. Nothing is downloaded here; get one first, for "
            "example with: hf download ORGANISATION/MODEL --local-dir DIRECTORY"
        )
        raise TargetError(msg)
    if (path / "adapter_config.json").is_file():
        _refuse_code(path / "adapter_config.json")
        base = _base_of(path)
        _refuse_code(base / "config.json")
        return Checkpoint(base, adapter=path)
    configured = (path / "config.json").is_file()
    if configured and any(path.glob("*.safetensors")):
        _refuse_code(path / "config.json")
        return Checkpoint(path)
    packed = sorted(file.name for file in path.glob("*.gguf"))
    if len(packed) == 1:
        return Checkpoint(path, gguf=packed[0])
    if packed:
        msg = (
            f"{str(path)!r} holds {len(packed)} GGUF files ({', '.join(packed)}); name one of "
            f"them, such as {str(path / packed[0])!r}"
        )
    elif not configured:
        msg = f"{str(path)!r} holds neither a config.json nor a GGUF file, so no model"
    elif _holds_pickle(path):
        msg = (
            f"{str(path)!r} holds its weights only as a pickle, which can run code when it is "
            "read; convert them to safetensors where you trust them, with model.save_pretrained()"
        )
    else:
        msg = f"{str(path)!r} holds a config.json but no weights (*.safetensors or *.gguf)"
    raise TargetError(msg)


def _base_of(adapter: Path) -> Path:
    """The directory of an adapter's base model."""
    if not (adapter / "adapter_model.safetensors").is_file():
        what = "holds its adapter only as a pickle, which can run code when it is read; convert it"
        if not _holds_pickle(adapter):
            what = "holds an adapter_config.json but no adapter_model.safetensors; save the adapter"
        msg = f"{str(adapter)!r} {what} to safetensors with model.save_pretrained()"
        raise TargetError(msg)
    name = _read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
    # As PEFT reads it, from here; or beside the adapter, where both were moved together.
    places = [Path(name), adapter / name] if name and isinstance(name, str) else []
    for place in places:
        if (place / "config.json").is_file() and any(place.glob("*.safetensors")):
            return place
    msg = (
        f"the adapter in {str(adapter)!r} belongs to the base model {name!r}, which is no local "
        "directory with config.json and *.safetensors. Nothing is downloaded here; get it first, "
        "and write its directory into adapter_config.json as base_model_name_or_path"
    )
    raise TargetError(msg)


def _refuse_code(path: Path) -> None:
    """Refuse a configuration that names code to fetch or import.

    `trust_remote_code=False` does not cover these, and not every version of the libraries does.
    """
    for name, value in _settings(_read_json(path)):
        kernel = name.strip("_").startswith("attn_implementation") and "/" in str(value)
        if kernel or (name in {"megatron_config", "trust_remote_code"} and value):
            msg = (
                f"{str(path)!r} sets {name} to {str(value)[:80]!r}, which makes transformers or "
                "peft fetch or import code, and none from a checkpoint is run; remove the setting"
            )
            raise TargetError(msg)


def _settings(config: Any) -> Iterator[tuple[str, Any]]:
    """All names and values of a configuration, nested ones too."""
    nested = [config]
    while nested:
        value = nested.pop()
        if isinstance(value, dict):
            yield from value.items()
            nested += value.values()
        elif isinstance(value, list):
            nested += value


def _holds_pickle(path: Path) -> bool:
    return any(file.suffix in {".bin", ".pt", ".pth"} for file in path.iterdir())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        msg = f"cannot read {str(path)!r}: {in_short(error)}"
        raise TargetError(msg) from error
    return content if isinstance(content, dict) else {}


def in_short(error: Exception) -> str:
    """Kind and first words of an exception, on one line."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:300]}{'…' if len(words) > 300 else ''}"
