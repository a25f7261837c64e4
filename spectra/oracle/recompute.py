"""How does a piece of a model go through a double backward without keeping its activations?

A segment y = f(x, θ) keeps only its inputs, through the forward pass, the backward pass and the
double backward; whatever else is needed is computed again from them. PyTorch's own checkpointing
does that for the first backward pass only: under a double backward it keeps everything.

Each of the two autograd functions below saves inputs and nothing else. The first is f; its backward
is the second, the gradient of f; *its* backward differentiates f twice in one go. With the products
of a forward pass through the segment as the unit, the gradient costs 4 instead of 3, and a product
on it 12 instead of 6.

References: Griewank and Walther, 2000, "Algorithm 799: revolve, an implementation of checkpointing
for the reverse or adjoint mode of computational differentiation"; Chen, Xu, Zhang and Guestrin,
2016, "Training deep nets with sublinear memory cost".
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from spectra.errors import ArgumentTypeError, DoubleBackwardError, SpectraError
from spectra.oracle import diagnose

__all__ = ["Site", "UnsuitableSegmentError", "inside_a_segment", "recompute"]

_INSIDE: ContextVar[bool] = ContextVar("inside a segment", default=False)


class UnsuitableSegmentError(SpectraError, RuntimeError):
    """A function cannot be computed again from its inputs alone."""


class Site:
    """A place in a model at which a segment stands.

    Attributes
    ----------
    name
        For messages, such as "module 'layers.0' (Block)".
    checked
        Its second derivative has been looked through for operations that PyTorch gets wrong.
    saved_bytes
        What one evaluation without recomputation would keep for its backward pass, the largest of
        those measured; 0 until `measure` is set.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.checked = False
        self.measure = False
        self.saved_bytes = 0
        self.input_bytes = 0


def recompute(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)`, keeping only the inputs for first and second derivatives.

    Parameters
    ----------
    function
        A module or function. It has to compute the same thing when it is called again: tensors that
        require a gradient come in as arguments (in lists, tuples and dicts as well) or are
        parameters. Random numbers repeat, and so does autocast. Where nothing requires a gradient
        it is simply called.
    *args, **kwargs
        Its arguments.

    Returns
    -------
    Any
        What `function` returns. A product of the Hessian with a vector takes 16 times the products
        of a forward pass of the segment, 12 on a kept graph, instead of 9 and 6.

    Raises
    ------
    UnsuitableSegmentError
        The function uses a tensor with a history that is not among its arguments, or overwrites an
        argument in place.
    DoubleBackwardError
        In the backward pass: an operation has no second derivative, or a wrong one.

    Examples
    --------
    >>> import torch, spectra
    >>> cube = lambda x: spectra.recompute(lambda y: y**3, x).sum()
    >>> H = spectra.HessianOperator.from_function(cube, [torch.tensor([1.0, 2.0])])
    >>> H.to_dense()
    tensor([[ 6.,  0.],
            [ 0., 12.]])
    """
    name = getattr(function, "__qualname__", type(function).__name__)
    return run_segment(Site(f"the segment {name}"), function, args, kwargs)


def run_segment(
    site: Site, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """`recompute` at a known place."""
    if not callable(function):
        msg = f"expected a module or a function, got a {type(function).__name__}"
        raise ArgumentTypeError(msg)
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    # What a partial holds are arguments, too.
    while isinstance(function, functools.partial):
        args, kwargs = (*function.args, *args), {**function.keywords, **kwargs}
        function = function.func
    return _Segment(site, function, args, kwargs).run()


def inside_a_segment() -> bool:
    """Whether the caller is being evaluated as part of a segment."""
    return _INSIDE.get()


class _Segment:
    """One evaluation of a function, and what it takes to repeat it."""

    def __init__(
        self,
        site: Site,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self.site = site
        self._function = function
        self._arguments, self._structure = tree_flatten((args, kwargs))
        self._places = [i for i, a in enumerate(self._arguments) if isinstance(a, Tensor)]
        self._parameters: list[Tensor] = []
        self._circumstances = _Circumstances([self._arguments[i].device for i in self._places])
        # The tensors of the output, between the first evaluation and its place in the graph.
        self.pending: list[Tensor] | None = None

    def run(self) -> Any:
        """The function's output, with the segment as its history where it has one."""
        given = [self._arguments[place] for place in self._places]
        # Autograd keeps the tensors, watches them for changes, and lets go of them when it is done.
        for place in self._places:
            self._arguments[place] = None
        versions = [tensor._version for tensor in given]
        begun = _next_node_number()
        with self._circumstances.first_time(), self._measured(given):
            leaves, output = self._evaluate(given, [tensor.requires_grad for tensor in given])
        for tensor, version in zip(given, versions, strict=True):
            if tensor._version != version:
                msg = (
                    f"{self.site.name} overwrites one of its arguments, of shape "
                    f"{tuple(tensor.shape)}, in place, so that it cannot be computed again from "
                    "them; let it work on a copy, or leave it out of the recomputation"
                )
                raise UnsuitableSegmentError(msg)
        results, structure = tree_flatten(output)
        tensors = [result for result in results if isinstance(result, Tensor)]
        if not any(tensor.requires_grad for tensor in tensors):
            return output
        self._parameters = self._used_parameters(tensors, leaves, begun)
        self.pending = [t.detach().requires_grad_(t.requires_grad) for t in tensors]
        # The graph of this evaluation has served.
        del output, tensors
        rest = iter(_Forward.apply(self, *given, *self._parameters))
        results = [next(rest) if isinstance(result, Tensor) else result for result in results]
        return tree_unflatten(results, structure)

    def again(self, inputs: list[Tensor], needed: list[bool]) -> tuple[list[Tensor], list[Tensor]]:
        """The inputs as fresh leaves, and the tensors of the output as functions of them.

        Parameters are leaves already, and stand for themselves.
        """
        count = len(self._places)
        with torch.enable_grad(), self._circumstances.repeated():
            leaves, output = self._evaluate(inputs[:count], needed[:count])
        tensors = [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor)]
        return [*leaves, *self._parameters], tensors

    def _evaluate(self, given: list[Tensor], needed: list[bool]) -> tuple[list[Tensor], Any]:
        leaves = [t.detach().requires_grad_(n) for t, n in zip(given, needed, strict=True)]
        arguments = list(self._arguments)
        for place, leaf in zip(self._places, leaves, strict=True):
            arguments[place] = leaf
        args, kwargs = tree_unflatten(arguments, self._structure)
        token = _INSIDE.set(True)
        try:
            return leaves, self._function(*args, **kwargs)
        finally:
            _INSIDE.reset(token)

    def _used_parameters(
        self, outputs: list[Tensor], leaves: list[Tensor], begun: int
    ) -> list[Tensor]:
        """Leaves of the graph that are no arguments; it has to end at those."""
        own = {id(leaf) for leaf in leaves}
        found: dict[int, Tensor] = {}
        for node in diagnose.graph_nodes(outputs):
            variable = getattr(node, "variable", None)
            if variable is not None:
                if id(variable) not in own:
                    found[id(variable)] = variable
            elif node._sequence_nr() < begun:
                msg = (
                    f"{self.site.name} uses a tensor with a history ({node.name()}) that is not "
                    "among its arguments, so that it cannot be computed again from them; pass "
                    "that tensor as an argument, or leave it out of the recomputation"
                )
                raise UnsuitableSegmentError(msg)
        return list(found.values())

    @contextlib.contextmanager
    def _measured(self, given: list[Tensor]) -> Iterator[None]:
        """Note how much an ordinary evaluation would save, if the site is to be measured."""
        if not self.site.measure:
            yield
            return
        own = {tensor.untyped_storage().data_ptr() for tensor in given}
        saved: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            # Parameters stay in memory anyway.
            if not (tensor.is_leaf and tensor.requires_grad) and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in own:
                    saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            yield
        self.site.saved_bytes = max(self.site.saved_bytes, sum(saved.values()))
        self.site.input_bytes = sum(t.untyped_storage().nbytes() for t in given if t.requires_grad)


class _Forward(torch.autograd.Function):
    """The segment's function, of which the first evaluation has been made already."""

    @staticmethod
    def forward(ctx: Any, segment: _Segment, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.segment = segment
        ctx.save_for_backward(*inputs)
        # An absent gradient is not the same as one of zeros, which would have to be multiplied.
        ctx.set_materialize_grads(False)
        outputs, segment.pending = segment.pending, None
        assert outputs is not None
        constant = [tensor for tensor in outputs if not tensor.requires_grad]
        ctx.mark_non_differentiable(*constant)
        return tuple(tensor.detach() if tensor.requires_grad else tensor for tensor in outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        inputs = ctx.saved_tensors
        needed = list(ctx.needs_input_grad[1:])
        return None, *_Gradient.apply(ctx.segment, needed, len(inputs), *inputs, *cotangents)


class _Gradient(torch.autograd.Function):
    """The gradient of a segment's function, a function of its inputs and of the cotangents."""

    @staticmethod
    def forward(
        ctx: Any, segment: _Segment, needed: list[bool], count: int, *given: Any
    ) -> tuple[Tensor | None, ...]:
        ctx.segment, ctx.needed, ctx.count = segment, needed, count
        ctx.save_for_backward(*given)
        ctx.set_materialize_grads(False)
        leaves, outputs = segment.again(list(given[:count]), needed)
        gradients = _gradients(leaves, outputs, given[count:], needed, create_graph=False)
        # Distinct tensors: two inputs may get the very same one.
        return tuple(None if g is None else g.detach() for g in gradients)

    @staticmethod
    def backward(ctx: Any, *vectors: Tensor | None) -> Any:
        segment, needed, count = ctx.segment, ctx.needed, ctx.count
        if torch.is_grad_enabled():
            msg = f"{segment.site.name} is recomputed, and can be differentiated twice but no more"
            raise DoubleBackwardError(msg)
        given = ctx.saved_tensors
        leaves, outputs = segment.again(list(given[:count]), needed)
        with torch.enable_grad():
            cotangents = [
                None if c is None else c.detach().requires_grad_(wanted)
                for c, wanted in zip(given[count:], ctx.needs_input_grad[3 + count :], strict=True)
            ]
            gradients = _gradients(leaves, outputs, cotangents, needed, create_graph=True)
        if not segment.site.checked:
            live = [tensor for tensor in outputs if tensor.requires_grad]
            diagnose.refuse_bad_nodes([*live, *gradients], lambda: segment.site.name)
            segment.site.checked = True
        pairs = [
            (g, v)
            for g, v in zip(gradients, vectors, strict=True)
            if g is not None and v is not None and g.requires_grad
        ]
        variables = [*leaves, *cotangents]
        wanted = [t for t in variables if t is not None and t.requires_grad]
        terms: dict[int, Tensor | None] = {}
        if pairs:
            sources, directions = zip(*pairs, strict=True)
            found = torch.autograd.grad(sources, wanted, directions, allow_unused=True)
            terms = {id(t): term for t, term in zip(wanted, found, strict=True)}
        return None, None, None, *(terms.get(id(t)) for t in variables)


def _gradients(
    leaves: list[Tensor],
    outputs: list[Tensor],
    cotangents: Any,
    needed: list[bool],
    *,
    create_graph: bool,
) -> list[Tensor | None]:
    """One gradient for each leaf, None where it is not needed or nothing depends on it."""
    pairs = [
        (y, c)
        for y, c in zip(outputs, cotangents, strict=True)
        if c is not None and y.requires_grad
    ]
    wanted = [leaf for leaf, need in zip(leaves, needed, strict=True) if need]
    if not pairs or not wanted:
        return [None] * len(leaves)
    sources, directions = zip(*pairs, strict=True)
    found = iter(
        torch.autograd.grad(
            sources, wanted, directions, create_graph=create_graph, allow_unused=True
        )
    )
    return [next(found) if need else None for need in needed]


class _Circumstances:
    """Autocast and random state under which a function was evaluated, to evaluate it again."""

    def __init__(self, devices: list[torch.device]) -> None:
        self._kinds = sorted({"cpu", *(device.type for device in devices)} - {"meta"})
        self._autocast = [_autocast(kind) for kind in self._kinds]
        self._generators = [torch.default_generator]
        for index in sorted({d.index or 0 for d in devices if d.type == "cuda"}):
            self._generators.append(torch.cuda.default_generators[index])
        # None where the function drew no random number.
        self._random: list[Tensor] | None = None

    @contextlib.contextmanager
    def first_time(self) -> Iterator[None]:
        """Within it the function is evaluated for the first time."""
        before = [generator.get_state() for generator in self._generators]
        with self._autocasting():
            yield
        after = [generator.get_state() for generator in self._generators]
        if not all(map(torch.equal, before, after)):
            self._random = before

    @contextlib.contextmanager
    def repeated(self) -> Iterator[None]:
        """Within it the function gives what it gave the first time."""
        if self._random is None:
            with self._autocasting():
                yield
            return
        before = [generator.get_state() for generator in self._generators]
        try:
            for generator, state in zip(self._generators, self._random, strict=True):
                generator.set_state(state)
            with self._autocasting():
                yield
        finally:
            for generator, state in zip(self._generators, before, strict=True):
                generator.set_state(state)

    @contextlib.contextmanager
    def _autocasting(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for kind, (enabled, dtype) in zip(self._kinds, self._autocast, strict=True):
                if enabled or _autocast(kind)[0]:
                    # Without the cache: it would keep the casts of parameters for another pass.
                    stack.enter_context(
                        torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False)
                    )
            yield


def _autocast(kind: str) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)


def _next_node_number() -> int:
    """What autograd numbers the next operation of this thread with, at least."""
    with torch.enable_grad():
        node = torch.zeros((), requires_grad=True).view(()).grad_fn
    assert node is not None
    return int(node._sequence_nr())
