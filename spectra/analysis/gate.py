"""Is an operator checked before a run, and what becomes of what is found?"""

from __future__ import annotations

import functools
import time
from typing import Literal, get_args

from spectra.analysis.budget import Ledger
from spectra.analysis.preflight import Preflight, check
from spectra.errors import ArgumentError, PreflightError
from spectra.journal import remember
from spectra.operators.base import SymmetricOperator
from spectra.operators.hessian import HessianOperator

__all__ = ["Strictness", "check_strictness", "checked_before"]

Strictness = Literal["strict", "warn", "off"]

# A run of so many seconds is long; of so many products the checks take a small part.
_LONG, _MANY = 60.0, 80
# What an analysis takes at least, and what a product takes, in gradients.
_PRODUCTS, _GRADIENTS = 97, 2.0


def check_strictness(preflight: str) -> None:
    """Refuse another word than those there are.

    Raises
    ------
    ArgumentError
    """
    if preflight not in get_args(Strictness):
        msg = f"preflight={preflight!r}; expected 'strict', 'warn' or 'off'"
        raise ArgumentError(msg)


def checked_before(
    ledger: Ledger, operator: SymmetricOperator, preflight: Strictness, seed: int
) -> list[str]:
    """What a reader of the results has to know, from the checks; nothing where there were none.

    Costs one gradient or two where it is only seen that the run is short, nothing with "off".

    Raises
    ------
    PreflightError
        With "strict", for any warning or error.
    """
    if preflight == "off":
        return []
    # A run that is resumed has been checked, and its clock would tell another length.
    decide = functools.partial(_concerns, ledger, operator, preflight, seed)
    # Nor may the speed of a machine decide what a budget of products is spent on.
    return ledger.beside("preflight", lambda: remember("preflight", decide))


def _concerns(
    ledger: Ledger, operator: SymmetricOperator, preflight: Strictness, seed: int
) -> list[str]:
    if preflight == "warn" and not _long(ledger, operator):
        return []
    found = check(operator, seed=seed)
    if preflight == "strict" and not found.ok:
        raise _refusal(found)
    return [f"preflight: {finding.in_words()}" for finding in found.problems]


def _refusal(found: Preflight) -> PreflightError:
    problems = "; ".join(finding.in_words() for finding in found.problems)
    msg = (
        f"the checks before the run found {len(found.problems)} of {len(found.findings)} wrong: "
        f"{problems}. preflight='warn' runs all the same"
    )
    error = PreflightError(msg)
    error.preflight = found
    return error


def _long(ledger: Ledger, operator: SymmetricOperator) -> bool:
    products = ledger.left(_PRODUCTS)
    if products < _MANY or not isinstance(operator, HessianOperator):
        return False
    # What a process does for the first time is not counted: a second gradient decides.
    return all(products * _GRADIENTS * _gradient_seconds(operator) > _LONG for _ in range(2))


def _gradient_seconds(operator: HessianOperator) -> float:
    start = time.perf_counter()
    # Evaluated anew: kept graphs would give it away for nothing.
    operator.value_and_gradient_at(None)
    return operator.space.agreed(time.perf_counter() - start)
