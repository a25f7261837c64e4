"""What is the Hessian times a vector? The exact answer, by differentiating twice.

    H v = d/dθ ⟨g(θ), v⟩,   g = dL/dθ      (Pearlmutter, 1994, "Fast exact multiplication by the
                                            Hessian")

A gradient costs three forward passes of matrix products. A product costs 3.0 gradients when the
gradient's graph is built anew ("fresh"), and 2.0 when it is kept ("retained").
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from spectra.errors import ArgumentError, LossError
from spectra.objective.objective import Objective, Part
from spectra.oracle import diagnose
from spectra.oracle.attention import differentiable_attention

__all__ = ["Graph", "HvpOracle"]

Graph = Literal["fresh", "retained"]


class HvpOracle:
    """Products, gradient and value of an objective.

    Parameters
    ----------
    objective
        What is differentiated.
    graph
        "fresh" builds the gradient's graph of each batch for every call and frees it: memory of one
        batch. "retained" keeps the graphs of all batches between calls until a parameter changes:
        a third less time, memory of all batches. The retained graph holds the batches as they were
        first read; parameters changed behind autograd's back (through `.data`) go unnoticed.
    """

    def __init__(self, objective: Objective, graph: Graph = "fresh") -> None:
        if graph not in {"fresh", "retained"}:
            msg = f"graph={graph!r}; expected 'fresh' or 'retained'"
            raise ArgumentError(msg)
        diagnose.refuse_bad_modules(objective.model)
        self.objective = objective
        self.graph = graph
        self._retained: list[_GradientGraph] = []
        self._retained_state: Any = None
        self._checked = False

    def value_and_gradient(self) -> tuple[float, Tensor]:
        """L and its gradient, flat (n,), in one pass of ordinary gradients over the data."""
        space = self.objective.space
        value, total, depends = 0.0, 0.0, False
        with self.objective.evaluating(), differentiable_attention():
            # In here: a tensor made under inference_mode could not be changed outside of it.
            gradient = space.zeros()
            views = space.views(gradient)
            for part in self.objective.parts():
                loss = self.objective.loss(part)
                gradients = self._first_derivative(part, loss, create_graph=False)
                _accumulate(views, gradients, part.weight)
                value += part.weight * float(loss.detach())
                total += part.weight
                depends = depends or any(g is not None for g in gradients)
        normaliser = self.objective.normaliser(total)
        self._require_dependence(depends)
        return value / normaliser, gradient.div_(normaliser)

    def value(self) -> float:
        """L alone, without any derivative."""
        value, total = 0.0, 0.0
        with self.objective.evaluating(), differentiable_attention(), torch.no_grad():
            for part in self.objective.parts():
                value += part.weight * float(self.objective.loss(part))
                total += part.weight
        return value / self.objective.normaliser(total)

    def products(self, vectors: Tensor) -> Tensor:
        """H times each row of `vectors` (k, n), as rows (k, n).

        One pass over the data for all of them: the gradient's graph of a batch is built once and
        differentiated k times.

        Raises
        ------
        LossError, NonFiniteError
            The loss of a batch is unusable; the message names the batch.
        DoubleBackwardError
            An operation has no second derivative, or a wrong one; the message names the module.
        """
        space = self.objective.space
        directions = [space.views(row) for row in vectors]
        total, depends = 0.0, False
        # Around the backward too: activation checkpointing runs the forward pass again there.
        with self.objective.evaluating(), differentiable_attention():
            # In here: a tensor made under inference_mode could not be changed outside of it.
            out = space.zeros(len(vectors))
            targets = [space.views(row) for row in out]
            for graph in self._graphs():
                for i, (target, direction) in enumerate(zip(targets, directions, strict=True)):
                    keep = self.graph == "retained" or i + 1 < len(directions)
                    products = self._second_derivative(graph, direction, keep_graph=keep)
                    _accumulate(target, products, graph.part.weight)
                total += graph.part.weight
                depends = depends or graph.depends
        normaliser = self.objective.normaliser(total)
        self._require_dependence(depends)
        if self.graph == "retained":
            self._retained_state = self.objective.state()
        self._checked = True
        return out.div_(normaliser)

    def quadratic_forms(self, vectors: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """How every part of the data by itself curves along each row of `vectors` (k, n).

        Returns
        -------
        weights, forms
            (g,) the parts' weights, and (g, k) vᵀ H_g v with H_g the Hessian of the part's own
            loss, float64. Costs one product of each vector with the whole Hessian.

        Raises
        ------
        LossError, NonFiniteError, DoubleBackwardError
            As `products` does.
        """
        space = self.objective.space
        directions = [space.views(row) for row in vectors]
        weights, forms, depends = [], [], False
        with self.objective.evaluating(), differentiable_attention():
            product = space.zeros()
            views = space.views(product)
            for graph in self._graphs():
                row = []
                for i, direction in enumerate(directions):
                    keep = self.graph == "retained" or i + 1 < len(directions)
                    product.zero_()
                    terms = self._second_derivative(graph, direction, keep_graph=keep)
                    _accumulate(views, terms, 1.0)
                    row.append(space.inner(vectors[i], product))
                weights.append(graph.part.weight)
                forms.append(row)
                depends = depends or graph.depends
        self._require_dependence(depends)
        if self.graph == "retained":
            self._retained_state = self.objective.state()
        self._checked = True
        return np.array(weights), np.array(forms)

    def release(self) -> None:
        """Free retained graphs; the next product builds them again."""
        self._retained = []
        self._retained_state = None

    def find_non_finite(self) -> str | None:
        """Label of the first part whose loss or gradient is not finite, if there is one."""
        with self.objective.evaluating(), differentiable_attention():
            for part in self.objective.parts():
                loss = self.objective.loss(part)
                gradients = self._first_derivative(part, loss, create_graph=False)
                if any(g is not None and not bool(torch.isfinite(g).all()) for g in gradients):
                    return part.label
        return None

    def _graphs(self) -> Iterator[_GradientGraph]:
        if self._retained and self._retained_state == self.objective.state():
            yield from self._retained
            return
        self.release()
        graphs = []
        for part in self.objective.parts():
            graph = self._gradient_graph(part)
            yield graph
            if self.graph == "retained":
                graphs.append(graph)
        # Only now: a pass that failed half way must not pass for the whole data.
        self._retained = graphs

    def _gradient_graph(self, part: Part) -> _GradientGraph:
        loss = self.objective.loss(part)
        gradients = self._first_derivative(part, loss, create_graph=True)
        if not self._checked:
            diagnose.refuse_bad_nodes(loss, gradients, lambda: self._locate(part))
        return _GradientGraph(part, gradients)

    def _first_derivative(
        self, part: Part, loss: Tensor, *, create_graph: bool
    ) -> tuple[Tensor | None, ...]:
        if not loss.requires_grad:
            return (None,) * len(self.objective.parameters)
        try:
            return torch.autograd.grad(
                loss, self.objective.parameters, create_graph=create_graph, allow_unused=True
            )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise self._explained(error, part) from error

    def _second_derivative(
        self, graph: _GradientGraph, direction: list[Tensor], *, keep_graph: bool
    ) -> tuple[Tensor | None, ...]:
        live = [
            (g, v.to(g))
            for g, v in zip(graph.gradients, direction, strict=True)
            # Unused parameters have no gradient, linearly entering ones a constant one: both are
            # rows of zeros.
            if g is not None and g.requires_grad
        ]
        if not live:
            return (None,) * len(direction)
        outputs, vectors = zip(*live, strict=True)
        try:
            return torch.autograd.grad(
                outputs,
                self.objective.parameters,
                grad_outputs=vectors,
                retain_graph=keep_graph,
                allow_unused=True,
            )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise self._explained(error, graph.part) from error

    def _require_dependence(self, depends: bool) -> None:
        if not depends:
            msg = (
                "the loss does not depend on the selected parameters: its gradient by all of "
                f"{len(self.objective.parameters)} of them is absent. Look for .detach(), "
                ".item(), torch.no_grad() or NumPy between parameters and loss, or select others "
                "with params="
            )
            raise LossError(msg)

    def _explained(self, error: RuntimeError, part: Part) -> Exception:
        return diagnose.explain_failure(error, lambda: self._locate(part))

    def _locate(self, part: Part) -> str:
        objective = self.objective
        return diagnose.locate_culprit(
            objective.model, lambda: objective.loss(part), objective.function_name
        )


class _GradientGraph:
    """The gradient of one part with the graph that produced it."""

    def __init__(self, part: Part, gradients: tuple[Tensor | None, ...]) -> None:
        self.part = part
        self.gradients = gradients

    @property
    def depends(self) -> bool:
        return any(gradient is not None for gradient in self.gradients)


def _accumulate(views: list[Tensor], terms: tuple[Tensor | None, ...], weight: float) -> None:
    """Add weighted terms into the views of a flat vector, in place."""
    for view, term in zip(views, terms, strict=True):
        if term is not None:
            view.add_(term.detach().to(view.device), alpha=weight)
