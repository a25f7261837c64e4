"""What can go wrong, as one family of exceptions whose messages name the culprit and the fix.

Wrong arguments are `ArgumentError` (a `ValueError`) or `ArgumentTypeError` (a `TypeError`) and are
raised before any product is computed. Broken promises of the outside world (the data, the loss, the
model) are the other kinds. Everything derives from `SpectraError`.
"""

from __future__ import annotations

import typing

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "CheckpointError",
    "DataError",
    "DistributedError",
    "DoubleBackwardError",
    "LossError",
    "NonFiniteError",
    "NotSymmetricError",
    "ParameterSelectionError",
    "PreflightError",
    "SpectraError",
    "StochasticModelError",
    "StorageError",
    "TargetError",
]


class SpectraError(Exception):
    """Base of every exception that spectra raises on purpose.

    Attributes
    ----------
    partial
        What a long computation had found when it was interrupted, or None.
    """

    partial: typing.Any = None


class ArgumentError(SpectraError, ValueError):
    """An argument has the right type but an impossible value."""


class ArgumentTypeError(SpectraError, TypeError):
    """An argument has the wrong type or dtype."""


class ParameterSelectionError(ArgumentError):
    """The selection of parameters is empty or cannot be differentiated."""


class DataError(SpectraError, ValueError):
    """The data are empty, used up, or changed between two passes."""


class DistributedError(SpectraError, RuntimeError):
    """Another process of the group failed, has ended, or computes something else."""


class LossError(SpectraError, ValueError):
    """The loss is no differentiable scalar function of the selected parameters."""


class NonFiniteError(SpectraError, ArithmeticError):
    """A loss or a product holds nan or inf."""


class DoubleBackwardError(SpectraError, RuntimeError):
    """Some operation has no second derivative, or one that PyTorch is known to get wrong."""


class StochasticModelError(SpectraError, RuntimeError):
    """The model is in a mode in which its loss is random or depends on the batch split."""


class NotSymmetricError(SpectraError, ValueError):
    """A matrix or operator is not symmetric, so its spectrum is not what spectra computes."""


class PreflightError(SpectraError, RuntimeError):
    """The checks before a run have found something, and the run was to be strict about it.

    Attributes
    ----------
    preflight
        All that they have found.
    """

    preflight: typing.Any = None


class StorageError(SpectraError, OSError):
    """A result could not be written or read."""


class CheckpointError(StorageError):
    """A checkpoint is that of another run: other weights, data, options or versions."""


class TargetError(SpectraError, ValueError):
    """What the command line was pointed at is not something to analyse."""
