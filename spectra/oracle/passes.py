"""Does every pass over the data see the same function? Its value says so.

A loader that shuffles by a generator of its own and drops the rest, augmentation, a model that
carries something from one call to the next: each makes every product one of another matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from spectra.errors import DataError
from spectra.objective.identity import fingerprint
from spectra.objective.objective import Objective, Part

__all__ = ["Fingerprint", "Tally", "Values"]

# In units of rounding, by which sums over batches in another order may differ; but not less than
# single precision inside of a model in double would make of it, nor more than any loss would.
_ROUNDING, _LEAST, _MOST = 1e3, 1e-6, 0.1


class Tally:
    """What the parts of one pass add up to.

    Attributes
    ----------
    weight
        Σ w_b.
    value, size
        Σ w_b ℓ_b and Σ w_b |ℓ_b|.
    depends
        Whether the loss of any part depends on the parameters.
    parts
        How many there were.
    """

    def __init__(self) -> None:
        self.parts = 0
        self.weight = self.value = self.size = 0.0
        self.depends = False

    def add(self, part: Part, loss: float, *, depends: bool) -> None:
        """Count one more part."""
        self.parts += 1
        self.weight += part.weight
        self.value += part.weight * loss
        self.size += part.weight * abs(loss)
        self.depends = self.depends or depends

    def numbers(self) -> list[float]:
        """All of it, to be handed to other ranks."""
        return [self.weight, self.value, self.size, float(self.depends), self.parts]

    @classmethod
    def total(cls, rows: Sequence[Sequence[float]]) -> Tally:
        """Of all ranks together, added in the same order on each of them."""
        tally = cls()
        for weight, value, size, depends, parts in rows:
            tally.parts += int(parts)
            tally.weight += weight
            tally.value += value
            tally.size += size
            tally.depends = tally.depends or bool(depends)
        return tally


class Fingerprint:
    """What has to be the same on all ranks, as one number: weights, buffers, and what is analysed.

    It is computed again only where something has changed.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._state: Any = None
        self._number = 0.0

    def number(self) -> float:
        """48 bits of a digest."""
        state = self._objective.state()
        if self._state != state:
            self._state = state
            self._number = fingerprint(self.explain())
        return self._number

    def explain(self) -> dict[str, str]:
        """What goes into it, by name."""
        return self._objective.settings()


class Values:
    """The value of an objective in the first pass, with which those of later ones are compared."""

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._state: Any = None
        self._known: float | None = None
        eps = max((torch.finfo(tensor.dtype).eps for tensor in objective.stored), default=0.0)
        self._allowed = min(max(_ROUNDING * eps, _LEAST), _MOST)

    def forget(self) -> None:
        """Whatever changed, changed on purpose."""
        self._known = None

    def compare(self, state: Any, tally: Tally) -> None:
        """Refuse a pass over another function than the first one's, at the same state.

        Raises
        ------
        DataError
        """
        normaliser = self._objective.normaliser(tally.weight)
        value = tally.value / normaliser
        if self._known is None or self._state != state:
            self._state, self._known = state, value
            return
        allowed = self._allowed * tally.size / normaliser
        if math.isfinite(value) and abs(value - self._known) > allowed:
            msg = (
                f"{self._objective.function_name} was {self._known:.6g} over the data in an "
                f"earlier pass and {value:.6g} in this one, at the same parameters: every product "
                "would be one of another matrix. Look for a loader or augmentation with a random "
                "generator of its own, and for a model that carries something from one call to "
                "the next; hold_data=True reads the data once. After a change on purpose call "
                "release()"
            )
            raise DataError(msg)
