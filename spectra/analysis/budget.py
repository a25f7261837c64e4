"""How many products may a run still spend? A budget in matvecs, or in seconds."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from spectra.errors import ArgumentError
from spectra.journal import clock, remember
from spectra.operators.base import SymmetricOperator

__all__ = ["Budget", "Ledger", "parse_budget"]

Budget = int | str | None
T = TypeVar("T")

# Products that are spent to time them.
_TIMED = 2

_UNITS = {"s": 1.0, "sec": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0}


def parse_budget(budget: Budget) -> tuple[int | None, float | None]:
    """Most matvecs and most seconds, of which at most one is given.

    Raises
    ------
    ArgumentError
        It is neither a positive number of matvecs nor a time such as "90s", "10min" or "1.5h".
    """
    if budget is None:
        return None, None
    if isinstance(budget, int | np.integer) and not isinstance(budget, bool) and budget > 0:
        return int(budget), None
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([a-z]*)\s*", str(budget).lower())
    if found and isinstance(budget, str):
        number, unit = float(found[1]), found[2]
        if not unit and number > 0 and number == int(number):
            return int(number), None
        if unit in _UNITS and number > 0:
            return None, number * _UNITS[unit]
    msg = (
        f"budget={budget!r}; expected a number of matvecs, such as 100, or a time, such as '90s', "
        "'10min' or '1.5h'"
    )
    raise ArgumentError(msg)


class Ledger:
    """What each part of a run has cost, and what the budget still holds.

    A time is turned into products by the measured speed of those before; two are spent to begin.
    """

    def __init__(self, operator: SymmetricOperator, budget: Budget) -> None:
        self._operator = operator
        self._most_matvecs, self._most_seconds = parse_budget(budget)
        self._seconds_per_product = 0.0
        self._begun, self._start = operator.matvecs, clock()
        self.matvecs: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        if self._most_seconds is not None:
            probe = operator.space.unit(0)
            # The first product pays for what later ones find ready.
            for _ in range(_TIMED):
                begun = clock()
                self.timed("timing", lambda: operator.apply(probe))
                self._seconds_per_product = clock() - begun

    def timed(self, name: str, part: Callable[[], T]) -> T:
        """The result of `part`, its cost noted under `name`."""
        matvecs, start = self._operator.matvecs, clock()
        result = part()
        self.matvecs[name] = self.matvecs.get(name, 0) + self._operator.matvecs - matvecs
        self.seconds[name] = self.seconds.get(name, 0.0) + clock() - start
        return result

    def beside(self, name: str, part: Callable[[], T]) -> T:
        """As `timed`, with products that do not count as spent."""
        before = self._operator.matvecs
        result = self.timed(name, part)
        self._begun += self._operator.matvecs - before
        return result

    @property
    def limited(self) -> bool:
        """There is a budget."""
        return self._most_matvecs is not None or self._most_seconds is not None

    def left(self, otherwise: int) -> int:
        """Products that the budget still holds, at most `otherwise`."""
        if self._most_matvecs is not None:
            return max(0, min(otherwise, self._most_matvecs - self._spent))
        if self._most_seconds is None:
            return otherwise
        # A run that is resumed decides as it did, though its clock is not the same to the digit.
        allowed = remember("products that the time holds", self._allowed_by_time)
        return max(0, min(otherwise, allowed))

    def _allowed_by_time(self) -> int:
        assert self._most_seconds is not None
        seconds = self._most_seconds - (clock() - self._start)
        parts = [name for name, count in self.matvecs.items() if count and name != "timing"]
        if parts:
            spent = sum(self.seconds[name] for name in parts)
            self._seconds_per_product = spent / sum(self.matvecs[name] for name in parts)
        allowed = seconds / max(self._seconds_per_product, 1e-9)
        return int(self._operator.space.agreed(allowed))

    def affords(self, products: int) -> bool:
        """Whether there is time for what takes as long as so many products, but is none."""
        return self._most_seconds is None or self.left(products) >= products

    def seconds_for(self, count: int) -> str:
        """How long so many products take, in words, where the budget is a time."""
        if self._most_seconds is None:
            return ""
        seconds = count * self._seconds_per_product
        return f", which take about {seconds:.2g} s at {self._seconds_per_product:.2g} s each"

    @property
    def _spent(self) -> int:
        return self._operator.matvecs - self._begun
