import inspect

import pytest

import spectra
from spectra import errors

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]


def test_all_names_every_exception_of_the_module():
    assert errors.__all__ == sorted(kind.__name__ for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_exception_is_a_spectra_error_and_says_when_it_is_raised(kind):
    assert issubclass(kind, spectra.SpectraError)
    assert kind.__doc__


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.ArgumentError, ValueError),
        (errors.ParameterSelectionError, ValueError),
        (errors.ArgumentTypeError, TypeError),
        (errors.NonFiniteError, ArithmeticError),
        (errors.StorageError, OSError),
        (errors.DoubleBackwardError, RuntimeError),
    ],
)
def test_callers_that_know_only_built_in_exceptions_catch_ours(kind, builtin):
    assert issubclass(kind, builtin)


def test_the_errors_are_reachable_from_the_package():
    assert spectra.errors is errors
