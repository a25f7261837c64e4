"""What fits into memory: whole graphs, recomputed segments, or smaller parts of the data as well?

Decided on the first part of the data, by what the process has come to hold after its forward pass;
where that gets too much on the way, the pass is given up. Over networks from perceptrons to
transformers a product took 3.8 to 6.8 times what the forward pass saves, and five vectors of the
length of the parameters.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from spectra.errors import DataError, SpectraError
from spectra.objective.batches import leading_dimension
from spectra.objective.memory import NEGLIGIBLE, allocated_bytes, free_bytes, in_words
from spectra.objective.objective import Objective, Part
from spectra.oracle.casting import Casting
from spectra.oracle.recompute import Site, UnsuitableSegmentError, refuse_escaped
from spectra.oracle.segments import (
    Recompute,
    attributes_replaced,
    caches_switched_off,
    chosen_modules,
    layers_in_lists,
    recomputing,
    routed_checkpoints,
)

__all__ = ["Plan", "PlanChangedError"]

# What a product takes, in units of what a forward pass saves, and of vectors.
_WORK, _VECTORS = 6, 5
# In units of the inputs of segments: they, their gradients, and what a product adds to both.
_INPUTS = 4


class PlanChangedError(SpectraError):
    """The pass that was begun takes too much memory: there is a new plan."""


class Plan:
    """Which blocks are recomputed, and how small the parts of the data are.

    Parameters
    ----------
    objective
        Whose products are to be computed; its `microbatch` is set where it has to be.
    recompute
        "auto", "none", or globs over modules, which are then recomputed in any case.
    memory_budget
        Bytes for the work on one part; half of the free memory by default.
    compute_dtype
        In which the blocks compute, on copies of their parameters; they are then recomputed in any
        case.

    Attributes
    ----------
    recomputes
        Blocks are recomputed.
    """

    def __init__(
        self,
        objective: Objective,
        recompute: Recompute,
        memory_budget: int | None,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        self._objective = objective
        self._budget = memory_budget
        modules = chosen_modules(objective.model, recompute)
        sharding = objective.sharding
        if sharding is not None and recompute == "auto" and not modules:
            modules = layers_in_lists(objective.model)
        self._casting: Casting | None = None
        if compute_dtype is not None or sharding is not None:
            assert objective.model is not None
            stand_ins = dict(zip(objective.stored, objective.parameters, strict=True))
            blocks = list(modules.values())
            self._casting = Casting(objective.model, compute_dtype, stand_ins, blocks, sharding)
        self._automatic = recompute == "auto" and self._casting is None
        self._sites: dict[nn.Module, Site] = (
            self._casting.sites
            if self._casting is not None
            else {
                module: Site(f"module {name!r} ({type(module).__name__})", module.parameters())
                for name, module in modules.items()
            }
        )
        self.recomputes = bool(self._sites) and not self._automatic
        # Looked for once: to search a large model in every pass takes as long as a small product.
        self._checkpoints: list[tuple[Any, str, Any]] | None = None
        self._caches: list[tuple[Any, str, Any]] = []
        # What fits on one process may not on another one, and all compute in step.
        self._decided = sharding is not None
        # Of the part that was looked at last: how many pieces it can be split into.
        self._samples = 0
        self._reasons: list[str] = []

    @contextlib.contextmanager
    def applied(self, *, forward: bool = True) -> Iterator[None]:
        """Within it the blocks are recomputed, if that is the plan.

        Without `forward` passes, which kept graphs need none of, only what is in the blocks runs.
        """
        if self._checkpoints is None:
            self._checkpoints = routed_checkpoints(self._objective.model)
            self._caches = caches_switched_off(self._objective.model)
        with attributes_replaced(self._checkpoints):
            if self.recomputes or self._casting is not None:
                with attributes_replaced(self._caches), self._as_segments(forward=forward):
                    yield
            else:
                yield

    def loss(self, part: Part) -> Tensor:
        """The loss of a part; that of the first one settles the plan.

        Raises
        ------
        PlanChangedError
            The part takes more than there is: begin again.
        UnsuitableSegmentError, LossError
            The loss depends on something that would get no gradient.
        """
        self._samples = self._pieces(part)
        loss = self._objective.loss(part) if self._decided else self._first_loss(part)
        refuse_escaped(loss)
        if self._casting is not None:
            self._casting.refuse_others(loss)
        return loss

    def next_cheaper(self) -> bool:
        """After memory ran out: recompute, or else halve the parts; whether there was a way."""
        self._decided = True
        if self._automatic and self._sites and not self.recomputes:
            self.recomputes = True
            self._reasons.append("memory ran out with whole graphs")
            return True
        if self._samples < 2:
            return False
        self._split(self._samples // 2, "memory ran out")
        return True

    def do_without(self, error: UnsuitableSegmentError) -> bool:
        """A block cannot be recomputed: leave them all as they are, if nobody asked for it."""
        if not self._automatic or not self._sites:
            return False
        self._sites, self.recomputes = {}, False
        self._reasons.append(f"no block is recomputed: {error}")
        return True

    def describe(self) -> dict[str, Any]:
        """What was chosen and why, for the provenance of results."""
        chosen: dict[str, Any] = {}
        if self._casting is not None and self._casting.dtype is not None:
            chosen["compute_dtype"] = str(self._casting.dtype).removeprefix("torch.")
        if self._objective.sharding is not None:
            chosen["sharded"] = {
                "over": self._objective.sharding.mesh,
                "gathered by itself": f"{len(self._sites)} blocks",
            }
        if self.recomputes or self._reasons:
            chosen["recompute"] = {"blocks": len(self._sites) if self.recomputes else 0}
        if self._reasons:
            chosen["recompute"]["because"] = list(self._reasons)
        return chosen

    def _first_loss(self, part: Part) -> Tensor:
        device = self._objective.space.device
        fixed = self._bytes_of_vectors()
        begun, recomputed = allocated_bytes(device), self.recomputes

        def needed() -> int:
            grown = max(0, allocated_bytes(device) - begun)
            if not self.recomputes:
                return fixed + _WORK * grown
            measured = [pair for site in self._sites.values() for pair in site.measured or ()]
            inputs = sum(taken for _, taken in measured)
            work = max(0, grown - inputs) + max((saved for saved, _ in measured), default=0)
            return fixed + _INPUTS * inputs + _WORK * work

        @functools.cache
        def budget() -> int:
            return free_bytes(device) // 2 if self._budget is None else self._budget

        def too_much(taken: int) -> bool:
            return (self._budget is not None or taken > NEGLIGIBLE) and taken > budget()

        def recompute_instead(taken: int) -> None:
            if not self.recomputes and self._automatic and self._sites and too_much(taken):
                self.recomputes = True
                self._reasons.append(
                    "without recomputing, the work on a batch would take more than the "
                    f"{in_words(budget())} for it"
                )
                raise PlanChangedError

        with self._watched(lambda: recompute_instead(needed())):
            loss = self._objective.loss(part)
        if self.recomputes != recomputed:
            # The exception that said so was caught on its way, by the model or the loss.
            raise PlanChangedError
        taken = needed()
        recompute_instead(taken)
        if self._samples > 1 and too_much(taken):
            # Work below what the vectors take anyway would save nothing worth its time.
            size = int(self._samples * max(fixed, budget() - fixed) / max(taken - fixed, 1))
            if size < self._samples:
                self._split(max(1, size), f"a batch would take about {in_words(taken)}")
                raise PlanChangedError
        for site in self._sites.values():
            site.measured = None
        self._decided = True
        return loss

    @contextlib.contextmanager
    def _watched(self, after_each: Callable[[], None]) -> Iterator[None]:
        """Within it a function is called after every block, or the segments are measured."""
        if self.recomputes:
            for site in self._sites.values():
                site.measured = []
            yield
            return
        hooks = [block.register_forward_hook(lambda *_: after_each()) for block in self._sites]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _as_segments(self, *, forward: bool) -> contextlib.AbstractContextManager[None]:
        if self._casting is None:
            return recomputing(self._sites)
        return self._casting.applied() if forward else contextlib.nullcontext()

    def _bytes_of_vectors(self) -> int:
        space = self._objective.space
        return _VECTORS * space.n * torch.finfo(space.dtype).bits // 8

    def _pieces(self, part: Part) -> int:
        """Into how many pieces a part can be split without changing the objective, 0 if not."""
        if not self._objective.separable:
            return 0
        try:
            return leading_dimension(part.batch, part.label)
        except DataError:
            return 0

    def _split(self, size: int, reason: str) -> None:
        self._objective.microbatch = size
        samples = "1 sample" if size == 1 else f"{size} samples"
        self._reasons.append(f"{reason}: batches are split into parts of {samples}")
