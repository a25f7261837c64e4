"""What is the Hessian times a vector? The exact answer, by differentiating twice.

    H v = d/dθ ⟨g(θ), v⟩,   g = dL/dθ      (Pearlmutter, 1994, "Fast exact multiplication by the
                                            Hessian")

A gradient costs three forward passes of matrix products. A product costs 3.0 gradients when the
gradient's graph is built anew, and 2.0 when it was kept (`graphs.py`).
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from spectra.distributed.collectives import Ranks
from spectra.distributed.sharding import refuse_other_copies
from spectra.errors import ArgumentError, DataError, LossError, SpectraError
from spectra.journal import check_numbers
from spectra.objective.keeping import gradients_on
from spectra.objective.memory import memory_ran_out
from spectra.objective.nodes import graph_nodes
from spectra.objective.objective import Objective, Part
from spectra.objective.parameters import ParameterSpace
from spectra.oracle import diagnose
from spectra.oracle.attention import Attention
from spectra.oracle.comparing import Terms
from spectra.oracle.compiled import Compiler
from spectra.oracle.graphs import GradientGraph, GraphPolicy, Graphs
from spectra.oracle.passes import Fingerprint, Tally, Values
from spectra.oracle.planning import Plan, PlanChangedError
from spectra.oracle.precision import autocast_off, full_float32
from spectra.oracle.recompute import UnsuitableSegmentError
from spectra.oracle.replaying import runs_python
from spectra.oracle.segments import Recompute
from spectra.oracle.together import Together

__all__ = ["BlockRequest", "HvpOracle", "Operation"]

T = TypeVar("T")

# A pass changes what all threads share, and puts it back: random state, `requires_grad` and modules
# of models, the attention operator.
_ONE_AT_A_TIME = threading.RLock()


class HvpOracle:
    """Products, gradient and value of an objective.

    Parameters
    ----------
    objective
        What is differentiated.
    graph
        "auto" keeps the gradients' graphs of as many parts as `memory_budget` holds, "retained"
        those of all, until a parameter changes; "fresh" builds the graph of each part for every
        call and frees it. A kept graph holds its part of the data as it was first read.
    memory_budget
        Bytes for "auto"; half of the free memory by default.
    compile
        Compile the products on kept graphs, once they have taken half a minute.
    recompute
        Which blocks of the model are computed again instead of being kept, see `planning.py`.
    compute_dtype
        In which the model computes whatever its parameters are stored in, see `casting.py`.
    tf32
        Leave the precision of float32 products as the program has set it, see `precision.py`.
    ranks
        The processes whose shares of the data are one objective together. Every call is then one
        on all of them, and returns the same on all.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        graph: GraphPolicy = "auto",
        memory_budget: int | None = None,
        compile: bool = False,
        recompute: Recompute = "auto",
        compute_dtype: torch.dtype | None = None,
        tf32: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        if compile and graph == "fresh":
            msg = "compile=True compiles products on kept graphs, but graph='fresh' keeps none"
            raise ArgumentError(msg)
        if compile and objective.sharding is not None:
            msg = "compile=True compiles products on one process, but the parameters are in shards"
            raise ArgumentError(msg)
        self._graphs = Graphs(objective, graph, memory_budget)
        diagnose.refuse_bad_modules(objective.model)
        self._plan = Plan(objective, recompute, memory_budget, compute_dtype)
        self.objective = objective
        self._tf32 = tf32
        self._compiler = Compiler() if compile else None
        self._several = Together()
        self._attention = Attention(objective.model)
        self._checked = False
        self._values = Values(objective)
        # Of the objective, as it was found before the pass.
        self._state: Any = None
        self._ranks = ranks
        self._weights = Fingerprint(objective)
        if objective.sharding is not None:
            assert ranks is not None
            refuse_other_copies(ranks, objective.copies())

    def value_and_gradient(self) -> tuple[float, Tensor]:
        """L and its gradient, flat (n,): from kept graphs, or in a pass of ordinary gradients."""
        return self._finished_gradient("value and gradient", None, self._value_and_gradient)

    def _value_and_gradient(self) -> _Sums:
        with self._evaluating():
            kept = self._graphs.all_kept()
            if kept is not None:
                return self._summed(kept)
            # None is kept from here: what the work on it takes only a product shows.
            return self._summed(
                self._gradient_graph(part, create_graph=False) for part in self.objective.parts()
            )

    def value_and_gradient_at(self, displacement: Tensor | None) -> tuple[float, Tensor]:
        """L and its gradient at θ + displacement, or at θ, in a pass of ordinary gradients.

        Kept graphs are neither used nor dropped.
        """

        def evaluate() -> _Sums:
            with self._evaluating(displacement, compared=False):
                return self._summed(
                    self._gradient_graph(part, create_graph=False)
                    for part in self.objective.parts()
                )

        return self._finished_gradient("gradient beside the weights", displacement, evaluate)

    def _finished_gradient(
        self, what: str, given: Tensor | None, compute: Callable[[], _Sums]
    ) -> tuple[float, Tensor]:
        sums, tally = self._on_all_ranks(what, given, lambda: self._in_the_memory_there_is(compute))
        normaliser = self._finish(sums, tally)
        return tally.value / normaliser, sums.outs[0]

    def _summed(self, graphs: Iterable[GradientGraph]) -> _Sums:
        space = self.objective.space
        tally = Tally()
        # In here: a tensor made under inference_mode could not be changed outside of it.
        gradient = space.empty()
        sum_ = _WeightedSum(gradient, space.views(gradient))
        for graph in graphs:
            sum_.add(graph.gradients, self._weight(graph.part))
            tally.add(graph.part, graph.value, depends=graph.depends)
        return _Sums(tally, [gradient], [sum_])

    def value(self, displacement: Tensor | None = None) -> float:
        """L alone, without any derivative, at θ or beside it."""

        def evaluate() -> _Sums:
            tally = Tally()
            with self._evaluating(displacement, compared=displacement is None), torch.no_grad():
                for part in self.objective.parts():
                    # On what it depends only a derivative shows.
                    tally.add(part, float(self.objective.loss(part)), depends=True)
            return _Sums(tally, [], [])

        _, tally = self._on_all_ranks("value", displacement, evaluate)
        return tally.value / self._normaliser(tally)

    def products(self, vectors: Tensor, out: Tensor | None = None) -> Tensor:
        """H times each row of `vectors` (k, n), as rows (k, n): new ones, or those of `out`.

        One pass over the data for all of them: the gradient's graph of a part is built at most
        once and differentiated k times.

        Raises
        ------
        LossError, NonFiniteError
            The loss of a batch is unusable; the message names the batch.
        DoubleBackwardError
            An operation has no second derivative, or a wrong one; the message names the module.
        """
        sums, tally = self._on_all_ranks(
            "product",
            vectors,
            lambda: self._in_the_memory_there_is(lambda: self._multiplied(vectors, out)),
        )
        self._checked = True
        self._finish(sums, tally)
        return sums.outs[0]

    def _in_the_memory_there_is(self, compute: Callable[[], T]) -> T:
        """The result of a pass, in ever cheaper settings until it does not run out of memory."""
        if self.objective.sharding is not None:
            # The others are in the middle of the same pass.
            return compute()
        while True:
            with contextlib.suppress(_TryAgain):
                return self._tried(compute)

    def _tried(self, compute: Callable[[], T]) -> T:
        try:
            return compute()
        except PlanChangedError:
            self._graphs.release()
        except UnsuitableSegmentError as error:
            if not self._plan.do_without(error):
                raise
            self._graphs.release()
        except Exception as error:
            if not memory_ran_out(error):
                raise
            # What the failed pass had computed hangs on its traceback.
            error.__traceback__ = None
            if not self._next_cheaper():
                raise
        raise _TryAgain

    def _next_cheaper(self) -> bool:
        if self._several.give_up("memory ran out together") or self._graphs.give_up():
            return True
        if not self._plan.next_cheaper():
            return False
        self._graphs.release()
        return True

    def _on_all_ranks(
        self, what: str, given: Tensor | None, compute: Callable[[], _Sums]
    ) -> tuple[_Sums, Tally]:
        """The sums over this rank's data, and what the parts of all ranks add up to."""
        if self._ranks is None:
            sums = compute()
            return sums, sums.tally

        def counted() -> tuple[_Sums, list[float]]:
            sums = compute()
            return sums, sums.tally.numbers()

        sums, rows = self._together(what, given, counted)
        return sums, Tally.total(rows)

    def _together(
        self, what: str, given: Tensor | None, compute: Callable[[], tuple[T, Sequence[float]]]
    ) -> tuple[T, list[list[float]]]:
        """As `Ranks.together`, where weights and vectors have to be the same on all ranks."""
        assert self._ranks is not None
        # Of vectors in shards every rank has another part.
        whole = given is not None and self.objective.sharding is None
        vectors = check_numbers(given) if given is not None and whole else [0.0, 0.0]
        return self._ranks.together(
            what,
            [self._weights.number(), *vectors],
            compute,
            lambda: {
                **self._weights.explain(),
                "the vectors (options or seed)": " ".join(map(repr, vectors)),
            },
        )

    def _finish(self, sums: _Sums, tally: Tally) -> float:
        """Turn sums over the data of this rank into means over that of all; their normaliser."""
        normaliser = self._normaliser(tally)
        # Where parameters are in shards each part was summed over the ranks by its derivative.
        if self._ranks is not None and self.objective.sharding is None:
            for sum_ in sums.sums:
                sum_.weigh()
            for out in sums.outs:
                self._ranks.add(out)
        for sum_ in sums.sums:
            sum_.divide(normaliser)
        return normaliser

    def _multiplied(self, vectors: Tensor, out: Tensor | None) -> _Sums:
        space = self.objective.space
        directions = [space.views(row) for row in vectors.unbind()]
        tally = Tally()
        with self._pass() as graphs:
            # In here: a tensor made under inference_mode could not be changed outside of it.
            out = space.empty(len(vectors)) if out is None else out
            sums = [_WeightedSum(row, space.views(row)) for row in out.unbind()]
            for graph, kept in graphs:
                found = self._second_derivatives(graph, directions, kept=kept)
                for sum_, products in zip(sums, found, strict=True):
                    sum_.add(products, self._weight(graph.part))
                tally.add(graph.part, graph.value, depends=graph.depends)
        return _Sums(tally, [out], sums)

    def block_products(self, requests: Sequence[BlockRequest]) -> list[Tensor]:
        """Products of principal blocks, each with its own vectors, in one pass over the data.

        The gradient's graph of a part is built at most once for all of them, and differentiated by
        the parameters of one block at a time.

        Returns
        -------
        list of Tensor
            For every request the products (k, n_b), as rows.

        Raises
        ------
        LossError, NonFiniteError, DoubleBackwardError
            As `products` does.
        """
        given = None
        if self._ranks is not None and requests:
            given = torch.cat([request.rows.reshape(-1) for request in requests])
        sums, tally = self._on_all_ranks(
            "products of blocks",
            given,
            lambda: self._in_the_memory_there_is(lambda: self._multiplied_by_blocks(requests)),
        )
        # Each of them looks at the whole graph, not only at the part of its block.
        self._checked = self._checked or bool(sums.sums)
        self._finish(sums, tally)
        return sums.outs

    def _multiplied_by_blocks(self, requests: Sequence[BlockRequest]) -> _Sums:
        tally = Tally()
        with self._pass() as graphs:
            outs = [request.space.empty(len(request.rows)) for request in requests]
            work = [
                (
                    request.places,
                    request.space.views(row),
                    _WeightedSum(out, request.space.views(out)),
                )
                for request, products in zip(requests, outs, strict=True)
                for row, out in zip(request.rows, products, strict=True)
            ]
            for graph, kept in graphs:
                for i, (places, direction, sum_) in enumerate(work):
                    keep = kept or i + 1 < len(work)
                    terms = self._second_derivative(graph, direction, keep_graph=keep, of=places)
                    sum_.add(terms, self._weight(graph.part))
                tally.add(graph.part, graph.value, depends=graph.depends)
        return _Sums(tally, outs, [sum_ for _, _, sum_ in work])

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
        if self.objective.sharding is not None:
            msg = (
                "the parts of the data curve by themselves only where each process has all "
                "parameters, and these are in shards; compute it on an unsharded model"
            )
            raise ArgumentError(msg)
        weights, forms = np.zeros(0), np.zeros((0, len(vectors)))

        def compute() -> _Sums:
            nonlocal weights, forms
            weights, forms, tally = self._in_the_memory_there_is(lambda: self._forms(vectors))
            return _Sums(tally, [], [])

        _, tally = self._on_all_ranks("quadratic forms", vectors, compute)
        self._normaliser(tally)
        self._checked = True
        if self._ranks is not None:
            told = self._ranks.told((weights, forms))
            weights, forms = (np.concatenate(parts) for parts in zip(*told, strict=True))
        return weights, forms

    def _forms(self, vectors: Tensor) -> tuple[np.ndarray, np.ndarray, Tally]:
        space = self.objective.space
        directions = [space.views(row) for row in vectors]
        weights, forms, tally = [], [], Tally()
        with self._pass() as graphs:
            product = space.empty()
            views = space.views(product)
            for graph, kept in graphs:
                row = []
                for i, direction in enumerate(directions):
                    keep = kept or i + 1 < len(directions)
                    terms = self._second_derivative(graph, direction, keep_graph=keep)
                    _WeightedSum(product, views).add(terms, 1.0)
                    row.append(space.inner(vectors[i], product))
                weights.append(graph.part.weight)
                forms.append(row)
                tally.add(graph.part, graph.value, depends=graph.depends)
        return np.array(weights), np.array(forms).reshape(-1, len(vectors)), tally

    def release(self, *, forget: bool = True) -> None:
        """Free the kept graphs; the next product builds them again."""
        with _ONE_AT_A_TIME:
            self._graphs.release(forget=forget)
            self._values.forget()
            self.objective.release()

    def describe(self) -> dict[str, Any]:
        """What was chosen to be kept and computed again, for the provenance of results."""
        described = {**self._graphs.describe(), **self._plan.describe()}
        if self._attention.chunked:
            described["attention"] = "in chunks of queries"
        if self._ranks is not None:
            described["ranks"] = self._ranks.size
        if (several := self._several.describe()) is not None:
            described["several_vectors"] = several
        if self._compiler is not None:
            described["compiled"] = self._compiler.describe()
        return described

    def find_non_finite(self) -> str | None:
        """Label of the first part whose loss or gradient is not finite, if there is one."""
        if self._ranks is None:
            return self._find_non_finite()
        label, _ = self._together("looking", None, lambda: (self._find_non_finite(), ()))
        found = enumerate(self._ranks.told(label))
        return next((f"{text} of rank {rank}" for rank, text in found if text), None)

    def _find_non_finite(self) -> str | None:
        with self._evaluating():
            for part in self.objective.parts():
                loss = self.objective.loss(part)
                gradients = self._first_derivative(part, loss, create_graph=False)
                if any(g is not None and not bool(torch.isfinite(g).all()) for g in gradients):
                    return part.label
        return None

    def operations(self) -> list[Operation]:
        """What the loss of the first part is made of; a recomputed segment is one operation."""
        if self._ranks is None:
            return self._operations()
        found, _ = self._together("operations", None, lambda: (self._operations(), ()))
        # Those of the first rank that has data.
        return next(filter(None, self._ranks.told(found)), [])

    def _operations(self) -> list[Operation]:
        places = {id(tensor): i for i, tensor in enumerate(self.objective.parameters)}
        with self._evaluating():
            # Only of a rank without data there is none.
            part = next(iter(self.objective.parts()), None)
            nodes = [] if part is None else graph_nodes([self._plan.loss(part)])
            return [_operation(node, places) for node in nodes]

    def halves(self) -> tuple[float, float, float] | None:
        """The loss of the first batch, and the mean and the sum of those of its halves."""
        with self._evaluating(compared=False):
            return self.objective.halves()

    @contextlib.contextmanager
    def _evaluating(
        self, displacement: Tensor | None = None, *, compared: bool = True, products: bool = False
    ) -> Iterator[None]:
        """Within it losses are evaluated and differentiated, at θ or beside it.

        Their sum is compared with that of earlier passes, unless it has to be another, or is itself
        looked at. `products`: graphs that are kept are of use.
        """
        kind = self.objective.space.device.type
        beside: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if displacement is not None:
            beside = self.objective.displaced(displacement)
        with _ONE_AT_A_TIME:
            self._note_state(compared=compared)
            with (
                # A loss that is to be computed under autocast enters it by itself.
                autocast_off(kind),
                contextlib.nullcontext() if self._tf32 else full_float32(kind),
            ):
                if products and self._graphs.silent() and _untouched(self.objective.parameters):
                    with contextlib.nullcontext() if _recording() else gradients_on():
                        yield
                    return
                with (
                    self.objective.evaluating(),
                    beside,
                    # Around the backward too: what is recomputed runs forward passes there.
                    self._attention.differentiable(),
                    self._plan.applied(forward=not (products and self._graphs.all_kept())),
                ):
                    yield

    def _note_state(self, *, compared: bool) -> None:
        state = self.objective.state()
        self._graphs.drop_outdated(state)
        self._state = state if compared else None

    @contextlib.contextmanager
    def _pass(self) -> Iterator[Iterator[tuple[GradientGraph, bool]]]:
        with _ONE_AT_A_TIME:
            with self._evaluating(products=True):
                yield self._graphs.each(self._gradient_graph)
            self._graphs.settle()

    def _normaliser(self, tally: Tally) -> float:
        """What the sums of a pass are divided by, once it is clear that they are good."""
        if tally.parts == 0 and self._ranks is not None:
            msg = (
                f"none of the {self._ranks.size} processes holds a batch whose terms count; give "
                "each its share of the data"
            )
            raise DataError(msg)
        normaliser = self.objective.normaliser(tally.weight)
        self._require_dependence(tally.depends)
        if self._state is not None:
            self._values.compare(self._state, tally)
        return normaliser

    def _gradient_graph(self, part: Part, *, create_graph: bool = True) -> GradientGraph:
        loss = self._plan.loss(part)
        gradients = self._first_derivative(part, loss, create_graph=create_graph)
        return GradientGraph(part, loss if create_graph else loss.detach(), gradients)

    def _first_derivative(
        self, part: Part, loss: Tensor, *, create_graph: bool
    ) -> tuple[Tensor | None, ...]:
        if not loss.requires_grad:
            return (None,) * len(self.objective.parameters)
        with self._differentiating(part):
            return torch.autograd.grad(
                loss, self.objective.parameters, create_graph=create_graph, allow_unused=True
            )

    def _weight(self, part: Part) -> float:
        """With which the derivatives of a part are added up."""
        return part.weight if self.objective.sharding is None else 1.0

    def _second_derivatives(
        self, graph: GradientGraph, directions: list[list[Tensor]], *, kept: bool
    ) -> Iterator[Terms]:
        """The derivative of the gradient along each of several directions."""

        def one(direction: Sequence[Tensor], *, keep: bool = True) -> Terms:
            return self._second_derivative(graph, direction, keep_graph=keep, watch=kept)

        def many(stacked: Sequence[Tensor]) -> Terms:
            live = _live(graph.gradients, stacked)
            if not live:
                return (None,) * len(stacked)
            outputs, vectors = zip(*live, strict=True)
            with autocast_off(self.objective.space.device.type):
                return torch.autograd.grad(
                    outputs,
                    self.objective.parameters,
                    grad_outputs=vectors,
                    retain_graph=True,
                    allow_unused=True,
                    is_grads_batched=True,
                )

        # Python code in the backward pass may compute anything, with one vector's shapes.
        if len(directions) > 1 and graph.silent and graph.product is None:
            yield from self._several.multiply(one, many, directions)
            return
        for i, direction in enumerate(directions):
            yield one(direction, keep=kept or i + 1 < len(directions))

    def _second_derivative(
        self,
        graph: GradientGraph,
        direction: Sequence[Tensor],
        *,
        keep_graph: bool,
        of: Sequence[int] | None = None,
        watch: bool = False,
    ) -> Terms:
        """The derivative of the gradient along a direction; `of` the parameters at some places.

        `watch`: find out whether Python code runs in it.
        """
        gradients: Sequence[Tensor | None] = graph.gradients
        parameters = self.objective.parameters
        if of is not None:
            gradients = [graph.gradients[i] for i in of]
            parameters = [parameters[i] for i in of]
        if not self._checked:
            locate = functools.partial(self._locate, graph.part)
            diagnose.refuse_bad_nodes([graph.loss, *graph.gradients], locate)
        live = _live(gradients, direction)
        if not live:
            return (None,) * len(direction)
        outputs, vectors = zip(*live, strict=True)
        if graph.product is not None and of is None:
            return graph.product(vectors)

        def differentiate(vectors: tuple[Tensor, ...]) -> Terms:
            return torch.autograd.grad(
                outputs,
                parameters,
                grad_outputs=vectors,
                retain_graph=keep_graph,
                allow_unused=True,
            )

        compiler = self._compiler if of is None and graph.kept and not graph.tried else None
        start = time.perf_counter()
        with self._differentiating(graph.part):
            if watch and not graph.silent:
                terms, python = runs_python(lambda: differentiate(vectors))
                graph.silent = not python
            else:
                terms = differentiate(vectors)
        if compiler is not None and compiler.due(time.perf_counter() - start):
            graph.tried = True
            graph.product = compiler.compile(differentiate, vectors)
        return terms

    def _require_dependence(self, depends: bool) -> None:
        if not depends:
            msg = (
                "the loss does not depend on the selected parameters: its gradient by all of "
                f"{len(self.objective.parameters)} of them is absent. Look for .detach(), "
                ".item(), torch.no_grad() or NumPy between parameters and loss, or select others "
                "with params="
            )
            raise LossError(msg)

    @contextlib.contextmanager
    def _differentiating(self, part: Part) -> Iterator[None]:
        """Within it a derivative is taken; PyTorch's errors get the name of the module."""
        if self.objective.sharding is not None:
            # What comes back is the sum over the ranks.
            self.objective.sharding.weight = part.weight
        try:
            with autocast_off(self.objective.space.device.type):
                yield
        except RuntimeError as error:
            if isinstance(error, SpectraError) or memory_ran_out(error):
                raise
            if self.objective.sharding is not None and "DTensor" in str(error):
                msg = (
                    f"{self.objective.function_name}, or a module, reads parameters in shards of "
                    "other modules, as weight decay does; take recompute='none', which gathers all "
                    f"of them at once ({error})"
                )
                raise LossError(msg) from error
            raise diagnose.explain_failure(error, lambda: self._locate(part)) from error

    def _locate(self, part: Part) -> str:
        objective = self.objective
        if objective.sharding is not None:
            # To look for it is to compute, which one rank cannot do without the others.
            return f"an operation of {objective.function_name}"
        return diagnose.locate_culprit(
            objective.model, lambda: objective.loss(part), objective.function_name
        )


def _live(
    gradients: Sequence[Tensor | None], vectors: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """The gradients that depend on parameters, each with its part of a vector.

    Unused parameters have no gradient, linearly entering ones a constant one: both are rows of
    zeros.
    """
    return [
        (g, v.to(g))
        for g, v in zip(gradients, vectors, strict=True)
        if g is not None and g.requires_grad
    ]


def _recording() -> bool:
    """Whether autograd records here, without anything being done for it."""
    return torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def _untouched(parameters: Iterable[Tensor]) -> bool:
    """Whether parameters are as a product needs them, without anything that it would set off."""
    return all(p.requires_grad and not p._backward_hooks for p in parameters)


@dataclass(frozen=True)
class Operation:
    """A node of autograd's graph, as far as it tells what a loss is made of.

    Attributes
    ----------
    name
        Of the node.
    parameter
        The place, among those of the objective, of the parameter whose gradient ends there.
    function, module
        Names of a `torch.autograd.Function`, and of the module that defines it.
    """

    name: str
    parameter: int | None = None
    function: str | None = None
    module: str = ""


def _operation(node: Any, places: dict[int, int]) -> Operation:
    function = getattr(node, "_forward_cls", None)
    return Operation(
        node.name(),
        places.get(id(getattr(node, "variable", None))),
        None if function is None else function.__name__,
        "" if function is None else function.__module__,
    )


@dataclass(frozen=True, eq=False)
class BlockRequest:
    """Vectors to be multiplied by a principal block.

    Attributes
    ----------
    places
        Which of the objective's parameters the block consists of, in order.
    space
        Of the block: the layout of its vectors.
    rows
        (k, n_b)
    """

    places: Sequence[int]
    space: ParameterSpace
    rows: Tensor


@dataclass(frozen=True, eq=False)
class _Sums:
    """What a pass over the data of one rank adds up to, not yet divided by the weights.

    Attributes
    ----------
    tally
        Of the parts.
    outs
        What the sums are in, as whole tensors.
    sums
        The sums.
    """

    tally: Tally
    outs: list[Tensor]
    sums: list[_WeightedSum]


class _TryAgain(Exception):
    """Another setting was found after a pass failed."""


class _WeightedSum:
    """Σ w_b x_b in a flat vector, in as few passes over it as possible.

    At the size of a model each pass is slow, and the weight of a single batch cancels.
    """

    def __init__(self, flat: Tensor, views: list[Tensor]) -> None:
        self._flat = flat
        self._views = views
        # The weight of the first term, until there is a second one.
        self._only: float | None = None
        self._empty = True

    def add(self, terms: tuple[Tensor | None, ...], weight: float) -> None:
        if self._empty:
            into: list[Tensor] = []
            dense: list[Tensor] = []
            for view, term in zip(self._views, terms, strict=True):
                if term is not None and term.layout == torch.strided:
                    into.append(view)
                    dense.append(term.detach() if term.requires_grad else term)
                    continue
                view.zero_()
                if term is not None:
                    view.add_(term.detach())
            if dense:
                torch._foreach_copy_(into, dense)
            self._empty, self._only = False, weight
            return
        if self._only is not None:
            self._flat.mul_(self._only)
            self._only = None
        for view, term in zip(self._views, terms, strict=True):
            if term is not None:
                view.add_(term.detach().to(view.device), alpha=weight)

    def weigh(self) -> None:
        """Apply the weight of a single term too, and be zero without any."""
        if self._empty:
            self._flat.zero_()
        elif self._only is not None:
            self._flat.mul_(self._only)
        self._empty, self._only = False, None

    def divide(self, normaliser: float) -> None:
        if self._only is None:
            self._flat.div_(normaliser)
        elif self._only != normaliser:
            self._flat.mul_(self._only / normaliser)
