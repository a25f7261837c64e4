"""How does the curvature change while a model is trained? Measured without disturbing that."""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse.linalg import LinearOperator
from torch import Tensor, nn
from torch.optim import Optimizer

from spectra.algorithms.eigen import Which
from spectra.analysis.logs import destinations
from spectra.analysis.measurement import Record, check_record, measure
from spectra.analysis.trajectory import Measurement, Trajectory
from spectra.errors import ArgumentError, ArgumentTypeError
from spectra.objective.batches import reiterable
from spectra.objective.keeping import gradients_on, random_state_kept
from spectra.objective.parameters import Selection
from spectra.operators.hessian import HessianOperator
from spectra.operators.optimizers import acts_on
from spectra.oracle.precision import autocast_off
from spectra.results import load

__all__ = ["CurvatureMonitor", "log_spaced"]

Schedule = Collection[int] | Callable[[int], bool]


def log_spaced(last: int, *, per_decade: int = 10) -> tuple[int, ...]:
    """Steps for a schedule that is dense at first: 0, 1, 2, …, `last`, evenly in the logarithm.

    >>> from spectra import log_spaced
    >>> log_spaced(100, per_decade=3)
    (0, 1, 2, 5, 10, 22, 46, 100)

    Raises
    ------
    ArgumentError
        `last` or `per_decade` is below 1.
    """
    if last < 1 or per_decade < 1:
        msg = f"last={last}, per_decade={per_decade}; expected both to be at least 1"
        raise ArgumentError(msg)
    count = int(np.floor(per_decade * np.log10(last))) + 1
    steps = np.round(10 ** (np.arange(count) / per_decade)).astype(int)
    return (0, *sorted({*steps.tolist(), last}))


class CurvatureMonitor:
    """Measures the curvature at some steps of a training loop.

    The losses of the training are the same bit for bit with and without it: the model is measured
    in evaluation mode and put back, as are random states, `.grad`, buffers and whatever context
    surrounds the call (autocast, no_grad, inference mode). Nothing but time and memory is taken,
    and no graph outlives a measurement.

    Parameters
    ----------
    model, loss, params
        As for `HessianOperator`. What DistributedDataParallel or `torch.compile` have wrapped is
        taken out of it.
    data
        The batches to measure on, always the same: they are read once, now, and held. Of a loader
        that is also trained on, give one of its own: what its dataset draws from generators of its
        own is not put back. None: each measurement is on the batch that `step` is given.
    optimizer
        Whose learning rate and stability threshold are noted at each measurement.
    every
        Measure at steps that this divides.
    steps
        Measure at these steps, or where this function of the step is true; see `log_spaced`.
        Without either, whenever `step` is called.
    k, which, tol, record, certify, seed
        As for `eigsh`, and `record` what is asked besides: "gradient" (loss, norm and its share in
        the top subspace), "rotation" (overlap of the top subspace with the last one), "trace",
        "preconditioned" (sharpness in the optimiser's metric). Without the certificate, which is
        the default here, half of the products are saved, and `notes` say so.
    warm
        Start each search from the last eigenvectors and a random direction: takes 1.3 to 2 times
        fewer products than the random one alone (`experiments/monitor_cost`).
    operator
        What makes the operator of `(model, loss, data, params)`: `GaussNewtonOperator`, or
        `functools.partial(HessianOperator, microbatch=8)`.
    log
        Where else each measurement goes: a path that ends in .jsonl, a `SummaryWriter`, a function
        of one dict (`wandb.log`), or a list of these.
    live
        Draw the trajectory after each measurement: in a notebook, or in a window; without a screen
        nothing is drawn.
    trajectory
        To be continued: a `Trajectory`, or where one was saved.

    Attributes
    ----------
    trajectory
        All that was measured so far; complete also after an exception or Ctrl-C.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        What was passed cannot be monitored.
    StorageError
        A log or a trajectory cannot be read or written.

    Examples
    --------
    >>> import torch, spectra
    >>> model = torch.nn.Linear(2, 1)
    >>> loss = spectra.losses.supervised(torch.nn.MSELoss())
    >>> data = [(torch.eye(2), torch.ones(2, 1))]
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> monitor = spectra.CurvatureMonitor(model, loss, data, optimizer, every=5)
    >>> for step in range(11):
    ...     measurement = monitor.step(step)
    ...     optimizer.zero_grad()
    ...     loss(model, data[0]).backward()
    ...     optimizer.step()
    >>> [m.step for m in monitor.trajectory]
    [0, 5, 10]
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[nn.Module, Any], Tensor],
        data: Iterable[Any] | None,
        optimizer: Optimizer | None = None,
        *,
        every: int | None = None,
        steps: Schedule | None = None,
        k: int = 1,
        which: Which = "LA",
        record: Collection[Record] = ("gradient", "rotation"),
        params: Selection = None,
        tol: float = 1e-2,
        certify: bool = False,
        warm: bool = True,
        operator: Callable[..., HessianOperator] = HessianOperator,
        log: Any = None,
        live: bool = False,
        trajectory: Any = None,
        seed: int = 0,
    ) -> None:
        self._model, notes = _bare(model)
        self._loss = loss
        self._params = params
        self._make = operator
        self._optimizer = optimizer
        self._due = _schedule(every, steps)
        check_record(record, optimizer)
        if optimizer is not None and not acts_on(optimizer, self._model.parameters()):
            msg = (
                f"the {type(optimizer).__name__} moves no parameter of the "
                f"{type(self._model).__name__}; pass the optimiser that trains this model"
            )
            raise ArgumentError(msg)
        # Operators can be called, too: that is a product.
        if isinstance(operator, LinearOperator) or not callable(operator):
            msg = (
                f"operator is a {type(operator).__name__}; expected what makes one, such as "
                "GaussNewtonOperator"
            )
            raise ArgumentTypeError(msg)
        self._options: dict[str, Any] = {
            "k": k,
            "which": which,
            "tol": tol,
            "record": tuple(record),
            "optimizer": optimizer,
            "certify": certify,
            "warm": warm,
            "seed": seed,
        }
        self.trajectory = _begun(trajectory, notes)
        self._log = destinations(log)
        self._figure = importlib.import_module("spectra.report.live").LiveFigure() if live else None
        # Operators last: their weights change, but not what was found to fit into memory.
        self._of_data: HessianOperator | None = None
        self._of_batch: HessianOperator | None = None
        self._batch: list[Any] = []
        self._worked = self._published = self._warned = False
        # In evaluation mode already here, or its operator would be refused.
        with self._undisturbed():
            if data is not None:
                held = list(reiterable(data, hold_data=True))
                self._of_data = operator(self._model, loss, held, params)

    def step(self, step: int, batch: Any = None) -> Measurement | None:
        """Measure, if the schedule says so; otherwise return None at once.

        Parameters
        ----------
        step
            Of the training. A step that was measured last is not measured again.
        batch
            The current batch, whose own sharpness is measured too.

        Raises
        ------
        ArgumentError, ArgumentTypeError
            The step is before the last one, or no integer; there is neither data nor a batch.

        Notes
        -----
        What goes wrong in the first measurement is raised. In later ones, as where a training
        diverges, it is recorded in the measurement (`error`), and one warning is given.
        """
        if isinstance(step, bool) or not isinstance(step, int | np.integer):
            msg = f"step={step!r}; expected an integer"
            raise ArgumentTypeError(msg)
        if not self._due(int(step)):
            return None
        last = self.trajectory[-1].step if len(self.trajectory) else None
        if step == last:
            return None
        if last is not None and step < last:
            msg = f"step {step} comes after step {last}; expected steps in ascending order"
            raise ArgumentError(msg)
        if batch is None and self._of_data is None:
            msg = "the monitor has no data of its own (data=None); pass the batch, step(i, batch)"
            raise ArgumentError(msg)
        try:
            with self._undisturbed():
                measurement = self._measured(int(step), batch)
        except Exception as error:
            if not self._worked:
                raise
            measurement = Measurement(int(step), error=f"{type(error).__name__}: {error}")
            self._warn(f"the curvature at step {step} could not be measured: {error}")
        self._worked = self._worked or not measurement.error
        self.trajectory = self.trajectory.appended(measurement)
        with self._undisturbed():
            self._publish(measurement)
        return measurement

    def _measured(self, step: int, batch: Any) -> Measurement:
        of_batch = None if batch is None else self._operator_of(batch)
        operator = self._of_data or of_batch
        try:
            return measure(
                operator,
                step,
                batch=of_batch if self._of_data is not None else None,
                previous=self.trajectory.previous,
                **self._options,
            )
        finally:
            # Training needs the memory, and would wait for it to be looked at again.
            for used in (self._of_data, self._of_batch):
                if used is not None:
                    used.release(forget=False)
            self._batch.clear()

    def _operator_of(self, batch: Any) -> HessianOperator:
        """The operator of one batch, always the same one: what it knows of memory is kept."""
        self._batch[:] = [batch]
        if self._of_batch is None:
            self._of_batch = self._make(self._model, self._loss, self._batch, self._params)
        return self._of_batch

    def _publish(self, measurement: Measurement) -> None:
        """Hand a measurement to the logs and the figure, which shall not end a training."""
        try:
            for destination in self._log:
                destination(measurement)
            if self._figure is not None:
                self._figure.update(self.trajectory)
        except Exception as error:
            if not self._published:
                raise
            self._warn(f"step {measurement.step} could not be logged: {error}")
        self._published = True

    def _warn(self, message: str) -> None:
        if not self._warned:
            warnings.warn(f"{message}; training goes on", RuntimeWarning, stacklevel=3)
        self._warned = True

    @contextlib.contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Within it whatever is done leaves no trace in the training."""
        kind = next((p.device.type for p in self._model.parameters()), "cpu")
        with gradients_on(), random_state_kept(), autocast_off(kind), _evaluated(self._model):
            yield


def _schedule(every: int | None, steps: Schedule | None) -> Callable[[int], bool]:
    """Whether to measure at a step."""
    if every is not None and steps is not None:
        msg = "every and steps both say when to measure; give one of them"
        raise ArgumentError(msg)
    if every is not None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            msg = f"every={every!r}; expected a number of steps of at least 1"
            raise ArgumentError(msg)
        return lambda step: step % every == 0
    if steps is None:
        return lambda step: True
    if callable(steps):
        return lambda step: bool(steps(step))
    if isinstance(steps, str) or not isinstance(steps, Iterable):
        msg = f"steps is a {type(steps).__name__}; expected steps, or a function of a step"
        raise ArgumentTypeError(msg)
    try:
        return frozenset(map(index, steps)).__contains__
    except TypeError as error:
        msg = f"steps holds something else than whole numbers: {error}"
        raise ArgumentTypeError(msg) from error


def _begun(trajectory: Any, notes: tuple[str, ...]) -> Trajectory:
    """The trajectory to continue, with what is to be said of all of it."""
    if trajectory is None:
        return Trajectory(notes=notes)
    begun = load(trajectory) if isinstance(trajectory, str | Path) else trajectory
    if not isinstance(begun, Trajectory):
        msg = f"expected a Trajectory to continue, got a {type(begun).__name__}"
        raise ArgumentTypeError(msg)
    return begun


def _bare(model: Any) -> tuple[nn.Module, tuple[str, ...]]:
    """The module that others have been wrapped around, and what that means for the numbers.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        Its parameters are not its own, or it is none.
    """
    notes = []
    while True:
        kind = type(model).__name__
        if kind in {"FullyShardedDataParallel", "DeepSpeedEngine"}:
            msg = (
                f"the model is wrapped in {kind}, which keeps its parameters in pieces, and the "
                "Hessian is of whole ones; save checkpoints and measure those"
            )
            raise ArgumentError(msg)
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
            notes.append(f"measured on the module inside of {kind}, on the data of this process")
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
            notes.append("measured on the module that torch.compile was given, not compiled")
        else:
            break
    if not isinstance(model, nn.Module):
        msg = f"expected a torch.nn.Module, got a {type(model).__name__}"
        raise ArgumentTypeError(msg)
    return model, tuple(notes)


@contextlib.contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode and not compiled in place, and put back afterwards."""
    modules = list(model.modules())
    # Not by eval(), which some models override to do more.
    before = [(module.training, module._compiled_call_impl) for module in modules]
    try:
        for module in modules:
            module.training, module._compiled_call_impl = False, None
        yield
    finally:
        for module, (training, compiled) in zip(modules, before, strict=True):
            module.training, module._compiled_call_impl = training, compiled
