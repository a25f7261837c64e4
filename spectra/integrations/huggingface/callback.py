"""How does the curvature change while transformers' Trainer trains?"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from spectra.analysis.logs import metrics
from spectra.analysis.monitor import CurvatureMonitor
from spectra.analysis.trajectory import Trajectory
from spectra.errors import TargetError

# Modules are also imported where nobody asks for a callback.
try:
    from transformers import TrainerCallback
except ImportError:
    TrainerCallback = object

__all__ = ["CurvatureCallback"]


class CurvatureCallback(TrainerCallback):
    """A `CurvatureMonitor` of the model that a `transformers.Trainer` trains.

    It measures where its schedule meets `state.global_step`, before the first step and after each,
    on the main process. The numbers go into `state.log_history`, which the Trainer saves with its
    checkpoints; with `log=trainer.log` also to whatever the Trainer reports to.

    Parameters
    ----------
    loss, data, options
        As of `CurvatureMonitor`: `spectra.losses.causal_lm()`, batches as the collator makes them,
        and `every=`, `k=`, `log=` and so on. Model and optimiser are the Trainer's.

    Raises
    ------
    TargetError
        transformers is not installed.
    """

    def __init__(
        self, loss: Callable[[nn.Module, Any], Tensor], data: Iterable[Any], **options: Any
    ) -> None:
        if TrainerCallback is object:
            msg = "the callback of a Trainer needs transformers: pip install 'hessian-spectra[hf]'"
            raise TargetError(msg)
        self._loss, self._data, self._options = loss, data, options
        self.monitor: CurvatureMonitor | None = None

    @property
    def trajectory(self) -> Trajectory:
        """All that was measured so far."""
        return Trajectory() if self.monitor is None else self.monitor.trajectory

    def on_train_begin(self, args: Any, state: Any, control: Any, **trained: Any) -> None:
        """Look at the model and the optimiser, and measure before the first step."""
        if not state.is_world_process_zero:
            return
        options = dict(self._options)
        before = self.trajectory
        # A training that goes on goes on with its trajectory; one from the start has its own.
        if len(before) and before[-1].step <= state.global_step:
            options["trajectory"] = before
        self.monitor = CurvatureMonitor(
            trained["model"], self._loss, self._data, trained["optimizer"], **options
        )
        self._measure(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **trained: Any) -> None:
        """Measure, if the schedule says so."""
        self._measure(state)

    def _measure(self, state: Any) -> None:
        if self.monitor is None:
            return
        logged = len(state.log_history)
        measurement = self.monitor.step(state.global_step)
        # With log=trainer.log they are there already.
        if measurement is not None and len(state.log_history) == logged:
            place = {"step": state.global_step, "epoch": state.epoch}
            state.log_history.append({**metrics(measurement), **place})
