"""Where do measurements go besides memory? To a JSON Lines file, TensorBoard, or any function."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from spectra.analysis.trajectory import Measurement
from spectra.errors import ArgumentError, ArgumentTypeError, StorageError

__all__ = ["Destination", "destinations", "metrics"]

Destination: TypeAlias = Callable[[Measurement], None]


def destinations(log: Any) -> list[Destination]:
    """What `log=` names: None, one of these or a list of them.

    A path that ends in .jsonl; something with `add_scalar(name, value, step)`, as TensorBoard's
    SummaryWriter; a function of one dict, as `wandb.log` or `mlflow.log_metrics`.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        Anything else.
    StorageError
        The file is there and holds something else, or cannot be written.
    """
    if log is None:
        return []
    if isinstance(log, list | tuple):
        return [one for each in log for one in destinations(each)]
    if isinstance(log, str | Path):
        if Path(log).suffix != ".jsonl":
            msg = f"log={str(log)!r}; expected a path that ends in .jsonl"
            raise ArgumentError(msg)
        return [_JsonLines(Path(log))]
    if callable(getattr(log, "add_scalar", None)):
        return [lambda m: _to_tensorboard(log, m)]
    if callable(log):
        return [lambda m: log({"step": m.step, **metrics(m)})]
    msg = (
        f"log is a {type(log).__name__}; expected a function of a dict, a path that ends in "
        ".jsonl, a SummaryWriter, or a list of these"
    )
    raise ArgumentTypeError(msg)


def metrics(measurement: Measurement) -> dict[str, float]:
    """The numbers that were measured, with their errors, under names that start with curvature/."""
    return {
        f"curvature/{name}": float(value)
        for name, value in measurement.row().items()
        if isinstance(value, int | float) and name != "step" and math.isfinite(value)
    }


def _to_tensorboard(writer: Any, measurement: Measurement) -> None:
    for name, value in metrics(measurement).items():
        writer.add_scalar(name, value, measurement.step)
    writer.flush()


class _JsonLines:
    """A file with one measurement a line; those that are there already are not written again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            content = path.read_bytes() if path.exists() else b""
            # What follows the last newline was cut off when its process was killed.
            whole = content[: content.rfind(b"\n") + 1]
            self._steps = {_step_of(line, path) for line in whole.splitlines()}
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                file.truncate(len(whole))
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            msg = f"cannot write measurements to {str(path)!r}: {error}"
            raise StorageError(msg) from error

    def __call__(self, measurement: Measurement) -> None:
        if measurement.step in self._steps:
            return
        row = {name: _in_json(value) for name, value in measurement.row().items()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        self._steps.add(measurement.step)


def _step_of(line: bytes, path: Path) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError) as error:
        msg = f"{str(path)!r} holds something else than measurements, one a line; give another path"
        raise StorageError(msg) from error


def _in_json(value: Any) -> Any:
    """A number that JSON has; infinity as a word, what was not measured as null."""
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return None if math.isnan(value) else str(value)
