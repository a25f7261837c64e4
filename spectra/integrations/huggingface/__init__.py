"""What is the loss of a Hugging Face model on a text or a table? Read from local files only.

`causal_lm`, `masked_lm` and `classifier` return `(model, loss, data)` as `HessianOperator` takes
them. Where the directory is that of a PEFT adapter, the base model is loaded with it, and the
adapter's parameters are the ones that are analysed. `CurvatureCallback` measures while a Trainer
trains.
"""

from typing import Any

from spectra.integrations.huggingface.checkpoints import Task, task_of
from spectra.integrations.huggingface.classification import classifier
from spectra.integrations.huggingface.language import causal_lm, masked_lm

__all__ = ["CurvatureCallback", "Task", "causal_lm", "classifier", "masked_lm", "task_of"]


def __getattr__(name: str) -> Any:
    # Only where it is asked for: its base class takes seconds to import.
    if name == "CurvatureCallback":
        from spectra.integrations.huggingface.callback import CurvatureCallback

        return CurvatureCallback
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
