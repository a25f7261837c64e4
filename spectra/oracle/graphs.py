"""Which gradients' graphs are kept in memory between products, and which are built again?

A product on a kept graph costs 2.0 gradients, one that builds the graph 3.0. Kept graphs hold what
the forward and the backward pass of a part saved, so that memory decides how many there can be.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from spectra.errors import ArgumentError, ArgumentTypeError
from spectra.objective.memory import (
    NEGLIGIBLE,
    allocated_bytes,
    free_bytes,
    held_bytes,
    peak_bytes,
    return_freed_memory,
)
from spectra.objective.objective import Objective, Part
from spectra.oracle.compiled import CompiledProduct

__all__ = ["GradientGraph", "GraphPolicy", "Graphs"]

GraphPolicy = Literal["auto", "retained", "fresh"]


class GradientGraph:
    """The loss of one part and its gradient, with the graph that produced them.

    Parameters without influence on the loss have no gradient.
    """

    def __init__(self, part: Part, loss: Tensor, gradients: tuple[Tensor | None, ...]) -> None:
        self.part = part
        self.loss = loss
        self.value = float(loss.detach())
        self.gradients = gradients
        self.kept = False
        """Whether it outlives the pass in which it was built."""
        self.product: CompiledProduct | None = None
        """Its second derivative as compiled code."""
        self.tried = False
        """Whether compiling it was tried."""
        self.silent = False
        """Whether a whole product on it was seen to run no Python code."""

    @property
    def depends(self) -> bool:
        """Whether the loss depends on any of the parameters."""
        return any(gradient is not None for gradient in self.gradients)

    def free(self) -> None:
        """Let go of the graph, whoever still holds this object."""
        self.loss, self.gradients, self.product = self.loss.detach(), (), None


class Graphs:
    """The gradients' graphs of all parts, those of them kept for which there is memory.

    Parameters
    ----------
    objective
        Whose parts they are.
    policy
        "retained" keeps all, "fresh" none, "auto" the first ones up to `memory_budget`.
    memory_budget
        Bytes for kept graphs and the work on one more part. The default is half of the memory
        that is free in the first pass.

    Kept graphs are dropped when parameters, buffers, modes, or the batches of a list have changed.
    """

    def __init__(
        self,
        objective: Objective,
        policy: GraphPolicy,
        memory_budget: int | None,
    ) -> None:
        _check(policy, memory_budget)
        self.policy = policy
        self.memory_budget = memory_budget
        self._objective = objective
        self._fallback: str | None = None
        self._parts: int | None = None
        self._kept: dict[int, GradientGraph] = {}
        # Which graphs were found to fit, also while none is there.
        self._fitting: frozenset[int] = frozenset()
        self._bytes = 0
        self._state: Any = None

    def drop_outdated(self, state: Any) -> None:
        """Free the kept graphs if anything has changed since. Where nothing stands in for it."""
        if self._kept and self._state != state:
            self.release()

    def all_kept(self) -> list[GradientGraph] | None:
        """The graphs of all parts in order, if they are kept."""
        if not self._kept or len(self._kept) < (self._parts or 0):
            return None
        return list(self._kept.values())

    def silent(self) -> bool:
        """Whether products on the graphs of all parts are known to run no Python code."""
        kept = self.all_kept()
        return kept is not None and all(graph.silent for graph in kept)

    def each(self, build: Callable[[Part], GradientGraph]) -> Iterator[tuple[GradientGraph, bool]]:
        """The graph of every part in order, built if need be, and whether it outlives its turn."""
        complete = self.all_kept()
        if complete is not None:
            for graph in complete:
                yield graph, True
            return
        # What was found to fit is not tried again in every pass.
        decided = self._parts is not None
        # Looking at the memory returns what was freed to the system, and the next use is slower.
        room = None if decided else _Room(self._objective.space.device, self.memory_budget)
        kept: dict[int, GradientGraph] = {}
        place = -1
        for place, part in enumerate(self._objective.parts()):
            keep = place in self._kept
            if keep:
                graph = self._kept[place]
            else:
                if room is not None:
                    room.start_one()
                elif self.memory_budget is not None:
                    # Else later passes take up to a quarter more than the first one showed.
                    return_freed_memory(self._objective.space.device)
                graph = build(part)
                # Undecided until it is seen what the work on it takes.
                keep = place in self._fitting if decided else self.policy != "fresh"
            yield graph, keep
            if keep and room is not None:
                keep = self._agreed(fits=room.takes_one()) or self.policy == "retained"
            if keep:
                kept[place] = graph
            else:
                graph.free()
        # Only now: a pass that failed half way must not pass for the whole data.
        self._kept, self._parts, self._fitting = kept, place + 1, frozenset(kept)
        for graph in kept.values():
            graph.kept = True
        if room is not None:
            self._bytes = room.used if self.policy == "auto" else room.growth()
        self._state = None

    def _agreed(self, *, fits: bool) -> bool:
        """Whether it fits on all processes, where these compute in step."""
        ranks = self._objective.space.ranks
        if self._objective.sharding is None or ranks is None:
            return fits
        return all(row[0] for row in ranks.meet("whether a graph fits", [float(fits)]))

    def settle(self) -> None:
        """Note the state that the graphs belong to, once everything is back as it was found."""
        if self._kept and self._state is None:
            self._state = self._objective.state()

    def release(self, *, forget: bool = True) -> None:
        """Free the kept graphs; the next pass decides anew, or builds the same ones again."""
        self._kept, self._state = {}, None
        if forget:
            self._parts, self._fitting, self._bytes = None, frozenset(), 0

    def give_up(self) -> bool:
        """After memory ran out: keep none from now on; whether that can help."""
        if self.policy != "auto" or self._fallback is not None:
            return False
        self.release()
        self._fallback = "memory ran out with graphs retained; built anew for every product since"
        self.policy = "fresh"
        if self._objective.space.device.type == "cuda":
            torch.cuda.empty_cache()
        return True

    def describe(self) -> dict[str, Any]:
        """What was chosen, for the provenance of results."""
        chosen: dict[str, Any] = {"graph": "auto" if self._fallback else self.policy}
        if self._parts is not None:
            chosen["graphs"] = {"parts": self._parts, "retained": len(self._kept)}
            if self._kept:
                chosen["graphs"]["bytes"] = self._bytes
        if self._fallback:
            chosen["graph_fallback"] = self._fallback
        return chosen


class _Room:
    """How much of the budget the graphs of a pass have taken, measured on the process itself."""

    def __init__(self, device: torch.device, budget: int | None) -> None:
        self._device = device
        self._given = budget
        # A budget that was given is for what the process takes of the system. Without one, memory
        # that it has and does not use is as good as free.
        self._exactly = budget is not None
        self._start = self._taken()
        self._held = self._peak = self._before = 0
        # What the largest graph and the work on it took at most.
        self._most = 0
        self.used = 0

    def start_one(self) -> None:
        """Another graph is about to be built."""
        self._held = held_bytes(self._device, exactly=self._exactly)
        self._peak, self._before = peak_bytes(self._device), self._taken()

    def takes_one(self) -> bool:
        """Whether the graph just used fits, with room for another one and the work on it."""
        taken, peak = self._taken(), peak_bytes(self._device)
        # Without a new peak of the process it is not known; this is what networks take.
        work = peak - self._held if peak > self._peak else 3 * (taken - self._before)
        self._most = max(self._most, work)
        used = max(0, taken - self._start)
        needed = used + self._most
        if (self._exactly or needed >= NEGLIGIBLE) and needed >= self._budget:
            return False
        self.used = used
        return True

    def growth(self) -> int:
        """By how much the process has grown since the pass began."""
        return max(0, self._taken() - self._start)

    @functools.cached_property
    def _budget(self) -> int:
        if self._given is not None:
            return self._given
        return (free_bytes(self._device) + self.growth()) // 2

    def _taken(self) -> int:
        return held_bytes(self._device) if self._exactly else allocated_bytes(self._device)


def _check(policy: Any, memory_budget: Any) -> None:
    if policy not in {"auto", "retained", "fresh"}:
        msg = f"graph={policy!r}; expected 'auto', 'retained' or 'fresh'"
        raise ArgumentError(msg)
    if memory_budget is None:
        return
    if isinstance(memory_budget, bool) or not isinstance(memory_budget, int):
        msg = f"memory_budget={memory_budget!r} is a {type(memory_budget).__name__}; expected bytes"
        raise ArgumentTypeError(msg)
    if memory_budget < 0:
        msg = f"memory_budget={memory_budget:,}; expected a number of bytes of at least 0"
        raise ArgumentError(msg)
    if policy == "retained":
        msg = (
            "memory_budget decides which graphs are kept, but graph='retained' has settled that; "
            "give one of the two"
        )
        raise ArgumentError(msg)
