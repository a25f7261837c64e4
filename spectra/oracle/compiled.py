"""How is a product on a kept graph compiled? What depends on the vector, as one flat function.

`torch.compile` does not support double backward. But on a gradient's graph that is kept, the second
backward pass is a fixed sequence of tensor operations, linear in the vector. It is traced once;
whatever does not depend on the vector is computed once; the rest is compiled by inductor, which
keeps its code on disk. Compiling takes a minute or more, so it pays after hundreds of products, or
thousands: it begins once products have taken half a minute, so that a short run does without it,
and a long one loses little.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from spectra.errors import SpectraError
from spectra.oracle.comparing import Terms, difference, timed

__all__ = ["CompiledProduct", "Compiler"]

# Runs that are timed, after one that is not.
_TIMED = 3
# Of products on kept graphs, before anything is compiled: a small transformer takes 26 to 99 to be
# compiled, and a run that ends before it has taken as long would not have gained.
_PATIENCE = 30.0

_Eager = Callable[[tuple[Tensor, ...]], Terms]


class _Refusal(Exception):
    """Why a product stays as it is."""


class CompiledProduct:
    """The second backward pass of one part as compiled code."""

    def __init__(self, run: Any, constants: list[Tensor], outputs: list[int], count: int) -> None:
        self._run = run
        self._constants = constants
        self._outputs = outputs
        self._count = count

    def __call__(self, vectors: tuple[Tensor, ...]) -> Terms:
        """The terms of all parameters, None where there is none."""
        with torch.no_grad():
            computed = self._run(*vectors, *self._constants)
        terms: list[Tensor | None] = [None] * self._count
        for place, term in zip(self._outputs, computed, strict=True):
            terms[place] = term
        return tuple(terms)


class Compiler:
    """Compiles the products of parts; those of equal structure share their code.

    Attributes
    ----------
    seconds
        Spent on tracing and compiling.
    refusals
        Why parts were left as they were, each reason once.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.refusals: list[str] = []
        self.compiled = 0
        # What all compiled parts together save in each product.
        self._saved = 0.0
        self._waited = 0.0
        self._known: dict[Any, Any] = {}

    def due(self, seconds: float) -> bool:
        """Whether to compile, now that another product has taken some seconds."""
        self._waited += seconds
        return self._waited >= _PATIENCE

    def compile(self, eager: _Eager, vectors: tuple[Tensor, ...]) -> CompiledProduct | None:
        """Compiled code for `eager`, a linear function, unless it fails or is not faster.

        Parameters
        ----------
        eager
            Maps the vectors to one tensor or None for each parameter.
        vectors
            Examples of what it gets; only their shapes, dtypes and devices count.
        """
        start = time.perf_counter()
        generator = torch.Generator("cpu").manual_seed(0)
        vectors = tuple(
            torch.randn(v.shape, generator=generator, dtype=v.dtype, device="cpu").to(v.device)
            for v in vectors
        )
        try:
            with warnings.catch_warnings():
                # PyTorch's compiler warns of itself.
                warnings.simplefilter("ignore")
                product = self._compiled(eager, vectors)
            saved = _saved_seconds(eager, product, vectors)
        except (_Refusal, SpectraError) as reason:
            self._refuse(str(reason))
            return None
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # Tracer, inductor and the C++ compiler fail in more ways than anyone lists.
            first = next(iter(str(error).strip().splitlines()), "")
            self._refuse(f"{type(error).__name__}: {first}"[:200])
            return None
        finally:
            self.seconds += time.perf_counter() - start
        self.compiled += 1
        self._saved += saved
        return product

    def describe(self) -> dict[str, Any]:
        """What was compiled, for the provenance of results."""
        if 0 < self._waited < _PATIENCE:
            why = (
                f"products have taken {self._waited:.2g} s; compiling begins after {_PATIENCE:g} s "
                "of them, about what it takes itself"
            )
            return {"parts": 0, "seconds": 0.0, "waits": why}
        return {
            "parts": self.compiled,
            "seconds": round(self.seconds, 1),
            **(
                {"pays_after_products": math.ceil(self.seconds / self._saved)}
                if self._saved
                else {}
            ),
            **({"refused": self.refusals} if self.refusals else {}),
        }

    def _refuse(self, reason: str) -> None:
        if reason not in self.refusals:
            self.refusals.append(reason)

    def _compiled(self, eager: _Eager, vectors: tuple[Tensor, ...]) -> CompiledProduct:
        from torch._inductor.compile_fx import compile_fx
        from torch.fx.experimental.proxy_tensor import make_fx

        live: list[int] = []
        count = 0

        def function(*arguments: Tensor) -> list[Tensor]:
            nonlocal live, count
            terms = eager(arguments)
            live = [i for i, term in enumerate(terms) if term is not None]
            count = len(terms)
            return [terms[i] for i in live]  # type: ignore[misc]

        traced = make_fx(function)(*vectors)
        with torch.no_grad():
            flat, constants = _lifted(traced, len(vectors))
            inputs = [*vectors, *constants]
            key = (flat.code, tuple((t.shape, t.stride(), t.dtype, t.device) for t in inputs))
            if key not in self._known:
                self._known[key] = compile_fx(flat, inputs)
        return CompiledProduct(self._known[key], constants, live, count)


def _lifted(traced: fx.GraphModule, count: int) -> tuple[fx.GraphModule, list[Tensor]]:
    """The part of a graph that depends on its first `count` inputs, with the rest as inputs.

    Nodes that depend on none of them are computed here, once.
    """
    graph = traced.graph
    graph.eliminate_dead_code()
    dependent: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(n in dependent for n in node.all_input_nodes):
            dependent.add(node)
    values = _Values(traced, dependent)
    values.run()
    flat = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    constants: list[Tensor] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            copies[node] = flat.placeholder(node.name)
    frontier = [
        node
        for node in graph.nodes
        if node not in dependent and any(user in dependent for user in node.users)
    ]
    for i, node in enumerate(frontier):
        copies[node] = flat.placeholder(f"constant_{i}")
        constants.append(values.known[node])
    for node in graph.nodes:
        if node.op == "output":
            flat.output(fx.map_arg(node.args[0], copies.__getitem__))
        elif node in dependent and node.op != "placeholder":
            copies[node] = flat.node_copy(node, copies.__getitem__)
    return fx.GraphModule({}, flat), constants


class _Values(fx.Interpreter):
    """Computes the nodes that depend on no input."""

    def __init__(self, module: fx.GraphModule, dependent: set[fx.Node]) -> None:
        super().__init__(module, garbage_collect_values=False)
        self._dependent = dependent
        self.known: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "output" or n in self._dependent:
            return None
        value = super().run_node(n)
        self.known[n] = value.detach() if isinstance(value, Tensor) else value
        return value


def _saved_seconds(eager: _Eager, product: CompiledProduct, vectors: tuple[Tensor, ...]) -> float:
    """How much faster compiled code is; it is refused if it is wrong, or no faster."""
    if (off := difference(eager(vectors), product(vectors))) is not None:
        msg = f"the compiled product is {off:.2g} off"
        raise _Refusal(msg)
    slow, fast = _seconds(eager, vectors), _seconds(product, vectors)
    if fast >= slow:
        msg = f"the compiled product takes {fast / slow:.2f} times as long"
        raise _Refusal(msg)
    return slow - fast


def _seconds(function: _Eager, vectors: tuple[Tensor, ...]) -> float:
    return min(timed(vectors[0].device, lambda: function(vectors))[0] for _ in range(_TIMED))
