"""What is the loss of a Hugging Face model on a text or a table? Read from local files only.

`causal_lm`, `masked_lm` and `classifier` return `(model, loss, data)` as `HessianOperator` takes
them. Where the directory is that of a PEFT adapter, the base model is loaded with it, and the
adapter's parameters are the ones that are analysed.
"""

from spectra.integrations.huggingface.checkpoints import Task, task_of
from spectra.integrations.huggingface.classification import classifier
from spectra.integrations.huggingface.language import causal_lm, masked_lm

__all__ = ["Task", "causal_lm", "classifier", "masked_lm", "task_of"]
