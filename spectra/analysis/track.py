"""How did the curvature change over a training that was saved? One measurement per checkpoint."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from spectra.algorithms.eigen import Which, check_eigsh_arguments
from spectra.algorithms.progress import progress_bar
from spectra.analysis.measurement import Record, check_record, measure
from spectra.analysis.trajectory import Measurement, Trajectory
from spectra.analysis.weights import (
    SavedWeights,
    optimizer_of,
    put_into,
    read_weights,
    weights_kept,
)
from spectra.errors import (
    ArgumentError,
    ArgumentTypeError,
    CheckpointError,
    LossError,
    NonFiniteError,
)
from spectra.journal import differences
from spectra.objective.identity import digest, digest_of
from spectra.operators.base import as_operator
from spectra.operators.hessian import HessianOperator
from spectra.results import load, versions

__all__ = ["track"]

_OVERRIDDEN = "the threshold is that of learning_rate=, not of the optimiser that was saved"


def track(
    H: HessianOperator,
    weights: Sequence[str | Path],
    *,
    k: int = 1,
    which: Which = "LA",
    tol: float = 1e-3,
    record: Collection[Record] = ("gradient", "rotation"),
    optimizer: Optimizer | None = None,
    learning_rate: float | None = None,
    warm: bool = True,
    certify: bool = True,
    seed: int = 0,
    progress: bool | None = None,
    checkpoint: str | Path | None = None,
) -> Trajectory:
    """Measure the curvature at saved weights, one after the other in the order of their steps.

    Parameters
    ----------
    H
        A `HessianOperator` of the model that was trained, with the data to measure on. Its weights
        are put back afterwards, to the last bit.
    weights
        Files (`.pt`, `.pth`, `.bin`, `.ckpt`: a `state_dict()`, by itself or under "model",
        "state_dict" or the like; `.safetensors`) or directories as Hugging Face's libraries write
        them (whole models, also in several files, and adapters). Nothing but tensors and plain
        containers is unpickled. Every parameter and buffer must be there, and nothing else.
        The step is what was saved with the weights (`step`, `global_step`, `epoch`,
        `trainer_state.json`) or is in the name (`step=500`, `checkpoint-500`, `model_0500`); if one
        has none, or two have the same, steps are places in the list.
    k, which, tol, record, certify, seed
        As for `CurvatureMonitor`, but with the certificate.
    optimizer
        Over the model's parameters, as in the training: each saved state is put into it, and its
        own put back afterwards. Needed to record "preconditioned". Without it, the stability
        threshold is that of the options that were saved with each state, where they tell the class.
    learning_rate
        Of plain gradient descent, where neither says: the threshold is 2 / learning_rate.
    warm
        Start each search from the last eigenvectors and a random direction.
    progress
        Show a progress bar; None for on a terminal only.
    checkpoint
        Where the trajectory is saved after each measurement (`checkpoint.json` and
        `checkpoint.safetensors`, which `spectra.load` reads), and products of the one under way
        (`checkpoint.part`). The same call goes on from there; `weights` of later steps may have
        been added. After Ctrl-C or SIGTERM what there is is returned, as `partial`.

    Returns
    -------
    Trajectory
        A measurement of weights at which the loss is not finite holds the `error`. Each costs, for
        k = 1, 10 to 30 matvecs and a gradient.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        Weights that cannot be read or are not those of the model, before anything is computed; an
        impossible argument; no Hessian of a model.
    NonFiniteError, LossError
        At the first weights.
    CheckpointError
        What is at `checkpoint` is of other weights, data, options or versions.
    StorageError
        It cannot be read or written.

    Notes
    -----
    Whatever exception ends it, Ctrl-C included, has an attribute `partial`: the trajectory so far.
    """
    operator, model = _checked(H)
    check_eigsh_arguments(operator.space.n, k, which, None, tol)
    fixed = _fixed_optimizer(optimizer, learning_rate, record)
    files, notes = _in_order(weights)
    for saved, _ in files:
        put_into(model, saved, only_check=True)
    options: dict[str, Any] = {
        "k": k,
        "which": which,
        "tol": tol,
        "record": tuple(record),
        "warm": warm,
        "certify": certify,
        "seed": seed,
    }
    groups = None if optimizer is None else optimizer.state_dict()["param_groups"]
    told = {"learning_rate": str(learning_rate), "optimizer digest": digest_of(groups)}
    run = _Run(operator, options, told, notes, checkpoint)
    with (
        weights_kept(model),
        _state_kept(optimizer),
        progress_bar("track", len(files), progress, unit="checkpoint") as bar,
    ):
        try:
            for saved, step in files:
                bar.tell(saved.path.name)
                remarks = put_into(model, saved)
                if not run.knows(step, saved.path, _digest_of(model)):
                    then = fixed or _optimizer_for(saved, optimizer)
                    if fixed is not None and saved.optimizer is not None:
                        remarks = (*remarks, _OVERRIDDEN)
                    if not run.measured(step, saved.path, then, remarks):
                        break
                bar.update()
        except BaseException as error:
            with contextlib.suppress(AttributeError):
                error.partial = run.trajectory  # type: ignore[attr-defined]
            raise
    operator.release()
    return run.trajectory


class _Run:
    """A trajectory that grows, and what of it is on disk."""

    def __init__(
        self,
        operator: HessianOperator,
        options: dict[str, Any],
        told: dict[str, str],
        notes: tuple[str, ...],
        checkpoint: str | Path | None,
    ) -> None:
        self._operator = operator
        self._options = options
        self._identity: dict[str, Any] | None = None
        self._told = told
        self._path = None if checkpoint is None else Path(checkpoint).absolute()
        self._known = _saved_at(self._path)
        self.trajectory = Trajectory(notes=notes)

    def knows(self, step: int, path: Path, found: str) -> bool:
        """Whether that was measured already; it is then taken over."""
        place = len(self.trajectory)
        self._weights = {"step": step, "name": path.name, "digest": found}
        if self._known is None or place >= len(self._known):
            return False
        self._compare(self._known)
        before = self._known.provenance["weights"][place]
        if before != self._weights:
            msg = (
                f"measurement {place + 1} at {str(self._path)!r} is that of {before['name']!r} "
                f"(step {before['step']}), and now it would be that of {path.name!r} (step {step})"
                f"{'' if before['digest'] == found else ', whose weights are others'}. List the "
                "weights that were measured before those that were added, which have to be of "
                "later steps; or name another path, to begin anew"
            )
            raise CheckpointError(msg)
        self._append(self._known[place])
        return True

    def measured(
        self, step: int, path: Path, optimizer: Optimizer | str | None, remarks: tuple[str, ...]
    ) -> bool:
        """Measure; false if the run was asked to stop meanwhile."""
        if isinstance(optimizer, str):
            remarks, optimizer = (*remarks, optimizer), None
        part = None if self._path is None else self._path.with_name(f"{self._path.name}.part")
        try:
            found = measure(
                self._operator,
                step,
                label=path.name,
                optimizer=optimizer,
                previous=self.trajectory.previous,
                checkpoint=part,
                **self._options,
            )
        except (NonFiniteError, LossError) as error:
            if all(m.error for m in self.trajectory):
                # Nothing was right so far: more likely the loss or the data than these weights.
                msg = f"with the weights in {path.name!r}: {error}"
                raise type(error)(msg) from error
            found = Measurement(step, path.name, error=f"{type(error).__name__}: {error}")
        except KeyboardInterrupt as error:
            if self._path is None or not len(self.trajectory):
                raise
            self._stop("SIGTERM" if "SIGTERM" in str(error) else "SIGINT")
            return False
        self._append(dataclasses.replace(found, notes=(*remarks, *found.notes)))
        if self._path is not None and part is not None:
            self.trajectory.save(self._path)
            part.unlink(missing_ok=True)
        return True

    def _append(self, measurement: Measurement) -> None:
        before = self.trajectory.provenance
        grown = self.trajectory.appended(measurement)
        provenance = {
            **grown.provenance,
            "weights": [*before.get("weights", []), self._weights],
        }
        if self._path is not None:
            provenance["identity"] = self._identity_now()
        self.trajectory = dataclasses.replace(grown, provenance=provenance)

    def _identity_now(self) -> dict[str, Any]:
        """What must be the same for all measurements; reads all the data, once."""
        if self._identity is None:
            whole = self._operator.identity()
            options = {name: str(value) for name, value in self._options.items()}
            self._identity = {
                **{name: value for name, value in whole.items() if name != "weights"},
                "option": {**options, **self._told},
                "version": {
                    name: versions()[name] for name in ("spectra", "torch", "numpy", "scipy")
                },
            }
        return self._identity

    def _compare(self, known: Trajectory) -> None:
        if different := list(differences(known.provenance["identity"], self._identity_now())):
            msg = (
                f"the trajectory at {str(self._path)!r} is of another run. What differs: "
                f"{'; '.join(different[:5])}. Put it back as it was, or name another path, to "
                "begin anew"
            )
            raise CheckpointError(msg)

    def _stop(self, by: str) -> None:
        note = (
            f"partial: stopped by {by} before the end; what was computed is kept: go on with the "
            f"same call and checkpoint={str(self._path)!r}"
        )
        self.trajectory = dataclasses.replace(
            self.trajectory,
            partial=True,
            notes=(note, *self.trajectory.notes),
            provenance={**self.trajectory.provenance, "stopped_by": by},
        )


def _checked(H: Any) -> tuple[HessianOperator, nn.Module]:
    operator = as_operator(H)
    model = operator.objective.model if isinstance(operator, HessianOperator) else None
    if not isinstance(operator, HessianOperator) or model is None:
        kind = "HessianOperator of a function"
        kind = kind if isinstance(operator, HessianOperator) else type(operator).__name__
        msg = (
            f"a {kind} has no model to put weights into; make it with "
            "HessianOperator(model, loss, data)"
        )
        raise ArgumentTypeError(msg)
    if operator.space.ranks is not None:
        msg = "track runs in one process: make the operator without process_group, on all the data"
        raise ArgumentError(msg)
    return operator, model


def _in_order(
    weights: Sequence[str | Path],
) -> tuple[list[tuple[SavedWeights, int]], tuple[str, ...]]:
    """What was saved with its step, ascending, and what is to be known of the steps."""
    if isinstance(weights, str | Path) or not isinstance(weights, Iterable):
        msg = f"weights is a {type(weights).__name__}; expected a list of files"
        raise ArgumentTypeError(msg)
    found = [read_weights(path) for path in weights]
    if not found:
        msg = "no weights to measure at; give at least one file or directory"
        raise ArgumentError(msg)
    steps = [saved.step for saved in found]
    known = [step for step in steps if step is not None]
    epochs = [saved for saved in found if saved.step_from == "epoch"]
    if len(set(known)) == len(found) and len(epochs) in {0, len(found)}:
        notes = ("steps are the epochs that were saved with the weights",) if epochs else ()
        return sorted(zip(found, known, strict=True), key=lambda pair: pair[1]), notes
    if len(set(known)) == len(found):
        note = (
            "steps are places in the list: of some weights the step is known, of others the epoch, "
            f"such as {epochs[0].path.name!r}"
        )
        return [(saved, place) for place, saved in enumerate(found)], (note,)
    why = "have no step" if len(known) < len(found) else "have the same step as others"
    odd = next(s for s in found if s.step is None or steps.count(s.step) > 1)
    note = f"steps are places in the list: some weights {why}, such as {odd.path.name!r}"
    return [(saved, place) for place, saved in enumerate(found)], (note,)


def _digest_of(model: nn.Module) -> str:
    tensors = (*model.parameters(), *model.buffers())
    return digest(*tensors)


def _saved_at(path: Path | None) -> Trajectory | None:
    if path is None or not path.with_name(f"{path.name}.json").exists():
        return None
    found = load(path)
    if not isinstance(found, Trajectory) or not {"weights", "identity"} <= set(found.provenance):
        msg = f"what is at {str(path)!r} was not made by track; name another path"
        raise CheckpointError(msg)
    return found


# --- the optimiser --------------------------------------------------------------------------------


def _fixed_optimizer(
    optimizer: Optimizer | None, learning_rate: float | None, record: Collection[str]
) -> Optimizer | None:
    """Plain gradient descent, where a learning rate was given for it."""
    check_record(record, optimizer)
    if learning_rate is None:
        return None
    if optimizer is not None:
        msg = "optimizer= has learning rates of its own; leave out learning_rate="
        raise ArgumentError(msg)
    number = isinstance(learning_rate, int | float) and not isinstance(learning_rate, bool)
    if not number or not (math.isfinite(learning_rate) and learning_rate > 0):
        msg = f"learning_rate={learning_rate!r}; expected a positive number"
        raise ArgumentError(msg)
    return SGD([torch.zeros(1)], lr=learning_rate)


def _optimizer_for(saved: SavedWeights, optimizer: Optimizer | None) -> Optimizer | str | None:
    """An optimiser as it was when these weights were saved, as far as that is known."""
    if saved.optimizer is None:
        return optimizer
    if optimizer is None:
        return optimizer_of(saved.optimizer)
    then = optimizer_of(saved.optimizer)
    mine = optimizer_of(optimizer.state_dict())
    if type(then) is not type(mine):
        name = then if isinstance(then, str) else f"it is that of {type(then).__name__}"
        msg = (
            f"the optimiser's state in {str(saved.path)!r} does not go into the "
            f"{type(optimizer).__name__}: {name}"
        )
        raise ArgumentError(msg)
    try:
        optimizer.load_state_dict(copy.deepcopy(saved.optimizer))
    except (ValueError, KeyError, RuntimeError) as error:
        msg = (
            f"the optimiser's state in {str(saved.path)!r} does not go into the "
            f"{type(optimizer).__name__}: {error}"
        )
        raise ArgumentError(msg) from error
    return optimizer


@contextlib.contextmanager
def _state_kept(optimizer: Optimizer | None) -> Iterator[None]:
    state = None if optimizer is None else copy.deepcopy(optimizer.state_dict())
    try:
        yield
    finally:
        if optimizer is not None and state is not None:
            optimizer.load_state_dict(state)
