"""How does the curvature change while Lightning's Trainer trains?"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from spectra.analysis.logs import metrics
from spectra.analysis.monitor import CurvatureMonitor
from spectra.analysis.trajectory import Measurement, Trajectory
from spectra.errors import TargetError

# Modules are also imported where nobody asks for a callback.
try:
    from lightning.pytorch import Callback
except ImportError:
    Callback = object

__all__ = ["CurvatureCallback"]


class CurvatureCallback(Callback):
    """A `CurvatureMonitor` of the module that a Lightning `Trainer` trains.

    It measures where its schedule meets `trainer.global_step`, before the first step and after
    each, on the process of rank 0. The numbers go to the Trainer's loggers, and after a step into
    `callback_metrics`, where `ModelCheckpoint(monitor="curvature/sharpness")` finds them.

    Parameters
    ----------
    loss, data, options
        As of `CurvatureMonitor`, with the LightningModule as the model. Where `data` is None each
        measurement is on the current batch. The optimiser is the Trainer's, if it has one only.
    current_batch
        Measure the sharpness of the current batch, too.

    Raises
    ------
    TargetError
        lightning is not installed.
    """

    def __init__(
        self,
        loss: Callable[[nn.Module, Any], Tensor],
        data: Iterable[Any] | None = None,
        *,
        current_batch: bool = False,
        **options: Any,
    ) -> None:
        if Callback is object:
            msg = "Lightning's callback needs lightning: pip install 'hessian-spectra[lightning]'"
            raise TargetError(msg)
        self._loss, self._data, self._options = loss, data, options
        self._batch_too = current_batch or data is None
        self.monitor: CurvatureMonitor | None = None

    @property
    def trajectory(self) -> Trajectory:
        """All that was measured so far."""
        return Trajectory() if self.monitor is None else self.monitor.trajectory

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Look at the module and the optimiser, and measure before the first step."""
        if not trainer.is_global_zero:
            return
        options, optimizers = dict(self._options), trainer.optimizers
        before = self.trajectory
        # A training that goes on goes on with its trajectory; one from the start has its own.
        if len(before) and before[-1].step <= trainer.global_step:
            options["trajectory"] = before
        optimizer = optimizers[0] if len(optimizers) == 1 else None
        self.monitor = CurvatureMonitor(pl_module, self._loss, self._data, optimizer, **options)
        if self._data is not None:
            self._log(trainer, self.monitor.step(trainer.global_step))

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure, if the schedule says so."""
        if self.monitor is None:
            return
        measurement = self.monitor.step(trainer.global_step, batch if self._batch_too else None)
        self._log(trainer, measurement)
        if measurement is not None:
            pl_module.log_dict(metrics(measurement), logger=False, rank_zero_only=True)

    def _log(self, trainer: Any, measurement: Measurement | None) -> None:
        if measurement is not None:
            for logger in trainer.loggers:
                logger.log_metrics(metrics(measurement), step=measurement.step)
