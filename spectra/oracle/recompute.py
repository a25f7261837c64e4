"""How does a piece of a model go through a double backward without keeping its activations?

A segment y = f(x, θ) keeps only its inputs, through the forward pass, the backward pass and the
double backward; whatever else is needed is computed again from them. PyTorch's own checkpointing
does that for the first backward pass only: under a double backward it keeps everything.

In the graph of autograd a segment is a node that saves its inputs and nothing else. The backward of
it is another such node, which computes the gradient of f when it is reached; the backward of that
one differentiates f twice in one go, and so on. With the products of a forward pass through the
segment as the unit, the gradient costs 4 instead of 3, and a product on it 12 instead of 6.

References: Griewank and Walther, 2000, "Algorithm 799: revolve, an implementation of checkpointing
for the reverse or adjoint mode of computational differentiation"; Chen, Xu, Zhang and Guestrin,
2016, "Training deep nets with sublinear memory cost".
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, overrides
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

from spectra.distributed.sharding import values_not_wanted
from spectra.errors import ArgumentTypeError, DoubleBackwardError, SpectraError
from spectra.objective.chunks import is_traced
from spectra.objective.memory import SavedBytes, memory_ran_out
from spectra.objective.nodes import graph_nodes
from spectra.oracle import diagnose

__all__ = ["Site", "UnsuitableSegmentError", "inside_a_segment", "recompute", "refuse_escaped"]

# Units of rounding by which norm and sum of an output, relative to its norm, may differ.
_REPEATED = 8

_INSIDE: ContextVar[bool] = ContextVar("inside a segment", default=False)
# Leaves of first evaluations, with their sites. They live on only in a tensor that has left its
# segment in another way than by the output.
_LEAVES = WeakTensorKeyDictionary()


class UnsuitableSegmentError(SpectraError, RuntimeError):
    """A function cannot be computed again from its inputs alone.

    Attributes
    ----------
    overwrites
        Because it changes one of them in place.
    """

    def __init__(self, message: str, *, overwrites: bool = False) -> None:
        super().__init__(message)
        self.overwrites = overwrites


class Site:
    """A place in a model at which a segment stands.

    Attributes
    ----------
    name
        For messages, such as "module 'layers.0' (Block)".
    parameters
        What is in memory whether it is saved or not.
    checked
        Its second derivative has been looked through for operations that PyTorch gets wrong.
    measured
        (bytes saved, bytes of inputs) for every evaluation: what an ordinary one would keep for its
        backward pass, and what the segment keeps instead. Only where it is set to a list.
    """

    def __init__(self, name: str, parameters: Iterable[Tensor] = ()) -> None:
        self.name = name
        self.parameters = list(parameters)
        self.checked = False
        self.measured: list[tuple[int, int]] | None = None


def recompute(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)`, keeping only the inputs for first and second derivatives.

    Parameters
    ----------
    function
        A module or function. It has to compute the same thing when it is called again, whatever
        happens in between (in a loop, pass the module rather than a lambda that looks it up);
        tensors that require a gradient come in as arguments (in lists, tuples and dicts as well)
        or are parameters, and go out in what it returns. Random numbers repeat, and so does
        autocast. Where nothing requires a gradient it is simply called.
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
        The function uses a tensor with a history that is not among its arguments, overwrites an
        argument in place, or (in the backward pass) does not give the same output again. In an
        operator also where the loss depends on a tensor in it that it does not return.
    DoubleBackwardError
        In the backward pass: an operation is known to have a wrong second derivative.

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


def refuse_escaped(loss: Tensor) -> None:
    """Refuse a loss that depends on a tensor in a segment which is none of its outputs.

    The history of such a tensor ends at the segment, so that a part of the derivative would be
    missing.

    Raises
    ------
    UnsuitableSegmentError
    """
    if not _LEAVES:
        return
    for node in graph_nodes([loss]):
        _refuse_leaf(getattr(node, "variable", None))


def _refuse_leaf(variable: Tensor | None) -> None:
    if variable is not None and variable in _LEAVES:
        msg = (
            f"the loss depends on a tensor in {_LEAVES[variable].name} that is not among its "
            "outputs but was collected on the way, such as attention weights or the logits of a "
            "router, or kept by a hook; return it from there, leave it out of the loss, or do not "
            "recompute what it comes from (recompute='none', checkpointing switched off)"
        )
        raise UnsuitableSegmentError(msg)


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
        self._first: list[Tensor] = []
        # What they were, to see whether they are the same again.
        self._fingerprints: list[tuple[float, ...]] = []

    def run(self) -> Any:
        """The function's output, with the segment as its history where it has one."""
        given = [self._arguments[place] for place in self._places]
        # Autograd keeps the tensors, watches them for changes, and lets go of them when it is done.
        for place in self._places:
            self._arguments[place] = None
        versions = [tensor._version for tensor in given]
        leaves = _fresh(given, [tensor.requires_grad for tensor in given])
        _LEAVES.update({leaf: self.site for leaf in leaves if leaf.requires_grad})
        begun = _next_node_number()
        try:
            with self._circumstances.first_time(), self._measured(given):
                output = self._call(leaves)
        except RuntimeError as error:
            # Autograd's own words for the same thing, where the argument requires a gradient.
            if "leaf Variable that requires grad" not in str(error):
                raise
            raise self._overwriting() from error
        if any(t._version != version for t, version in zip(given, versions, strict=True)):
            raise self._overwriting()
        results, structure = tree_flatten(output)
        tensors = [result for result in results if isinstance(result, Tensor)]
        if not any(tensor.requires_grad for tensor in tensors):
            return output
        self._parameters = self._used_parameters(tensors, leaves, begun)
        self._first = [t.detach().requires_grad_(t.requires_grad) for t in tensors]
        self._fingerprints = [_fingerprint(tensor) for tensor in tensors]
        # The graph of this evaluation has served.
        del output, tensors
        rest = iter(_Node.apply(self, *given, *self._parameters))
        results = [next(rest) if isinstance(result, Tensor) else result for result in results]
        return tree_unflatten(results, structure)

    def taken(self) -> list[Tensor]:
        """The tensors of the first output, once."""
        outputs, self._first = self._first, []
        return outputs

    def _overwriting(self) -> UnsuitableSegmentError:
        msg = (
            f"{self.site.name} overwrites one of its arguments in place, so that it cannot be "
            "computed again from them; let it work on a copy (inplace=False), or leave it out of "
            "the recomputation"
        )
        return UnsuitableSegmentError(msg, overwrites=True)

    def fresh(self, inputs: Sequence[Tensor | None], wanted: list[bool]) -> list[Tensor | None]:
        """Leaves on the memory of the inputs; parameters are leaves, and stand for themselves."""
        count = len(self._places)
        return [*_fresh(inputs[:count], wanted[:count]), *self._parameters]

    def evaluate(self, leaves: list[Tensor], *, create_graph: bool) -> list[Tensor | None]:
        """The tensors of the output, as functions of the leaves, the same as the first time."""
        assert create_graph
        try:
            with self._circumstances.repeated():
                output = self._call(leaves[: len(self._places)])
        except RuntimeError as error:
            if isinstance(error, SpectraError) or memory_ran_out(error):
                raise
            raise self._changed(f"raised an error ({error})") from error
        tensors = [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor)]
        if not _same(self._fingerprints, tensors):
            raise self._changed("gave another output")
        return [*tensors]

    def _changed(self, what: str) -> UnsuitableSegmentError:
        msg = (
            f"{self.site.name} {what} when it was computed again: it reads something that changes "
            "between calls, such as an attribute that the model sets, a cache, or the variable of "
            "a loop; pass that as an argument, or leave it out of the recomputation"
        )
        return UnsuitableSegmentError(msg)

    def _call(self, tensors: list[Tensor]) -> Any:
        arguments = list(self._arguments)
        for place, tensor in zip(self._places, tensors, strict=True):
            arguments[place] = tensor
        args, kwargs = tree_unflatten(arguments, self._structure)
        token = _INSIDE.set(True)
        try:
            return self._function(*args, **kwargs)
        finally:
            _INSIDE.reset(token)

    def _used_parameters(
        self, outputs: list[Tensor], leaves: list[Tensor], begun: int
    ) -> list[Tensor]:
        """Leaves of the graph that are no arguments; it has to end at those."""
        own = {id(leaf) for leaf in leaves}
        found: dict[int, Tensor] = {}
        for node in graph_nodes(outputs):
            variable = getattr(node, "variable", None)
            if variable is not None:
                if id(variable) not in own:
                    _refuse_leaf(variable)
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
        if self.site.measured is None:
            yield
            return
        saved = SavedBytes([*given, *self.site.parameters])
        with saved.counting():
            yield
        inputs = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in given}
        self.site.measured.append((saved.total, sum(inputs.values())))


class _Derivative:
    """The gradient of a segment, or of such a gradient, as a function of inputs and cotangents.

    Parameters
    ----------
    of
        What is differentiated.
    needed
        For every input of it, whether the gradient by it is wanted.
    """

    def __init__(self, of: _Segment | _Derivative, needed: list[bool]) -> None:
        self.of = of
        self.site: Site = of.site
        self._needed = needed

    def fresh(self, inputs: Sequence[Tensor | None], wanted: list[bool]) -> list[Tensor | None]:
        """Leaves on the memory of the inputs, and of the cotangents that follow."""
        count = len(self._needed)
        either = [a or b for a, b in zip(self._needed, wanted[:count], strict=True)]
        return [*self.of.fresh(inputs[:count], either), *_fresh(inputs[count:], wanted[count:])]

    def evaluate(self, leaves: list[Any], *, create_graph: bool) -> list[Tensor | None]:
        """The gradients by the inputs, None where there is none, as functions of the leaves."""
        if is_traced():
            msg = f"{self.site.name} is not compiled, because what it computes again would be kept"
            raise DoubleBackwardError(msg)
        count = len(self._needed)
        with values_not_wanted():
            outputs = self.of.evaluate(leaves[:count], create_graph=True)
        pairs = [
            (output, cotangent)
            for output, cotangent in zip(outputs, leaves[count:], strict=True)
            if output is not None and cotangent is not None and output.requires_grad
        ]
        wanted = [leaf for leaf, need in zip(leaves, self._needed, strict=False) if need]
        if not pairs or not wanted:
            return [None] * count
        sources, cotangents = zip(*pairs, strict=True)
        found = torch.autograd.grad(
            sources, wanted, cotangents, create_graph=create_graph, allow_unused=True
        )
        if create_graph and not self.site.checked:
            diagnose.refuse_bad_nodes([*sources, *found], lambda: self.site.name)
            self.site.checked = True
        rest = iter(found)
        return [next(rest) if need else None for need in self._needed]


class _Node(torch.autograd.Function):
    """A segment or a derivative of one in the graph of autograd, with nothing but its inputs."""

    @staticmethod
    def forward(ctx: Any, of: _Segment | _Derivative, *inputs: Tensor | None) -> Any:
        ctx.of = of
        ctx.save_for_backward(*inputs)
        # An absent gradient is not the same as one of zeros, which would have to be multiplied.
        ctx.set_materialize_grads(False)
        if isinstance(of, _Segment):
            outputs = of.taken()
            ctx.mark_non_differentiable(*(t for t in outputs if not t.requires_grad))
            return tuple(t.detach() if t.requires_grad else t for t in outputs)
        with torch.enable_grad():
            leaves = of.fresh(inputs, [False] * len(inputs))
            found = of.evaluate(leaves, create_graph=False)
        # Distinct tensors: two inputs may get the very same one.
        return tuple(None if tensor is None else tensor.detach() for tensor in found)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        derivative = _Derivative(ctx.of, list(ctx.needs_input_grad[1:]))
        return None, *_Node.apply(derivative, *ctx.saved_tensors, *cotangents)


def _fresh(tensors: Sequence[Tensor | None], wanted: list[bool]) -> list[Any]:
    return [
        None if tensor is None else tensor.detach().requires_grad_(want)
        for tensor, want in zip(tensors, wanted, strict=True)
    ]


def _fingerprint(tensor: Tensor) -> tuple[float, ...]:
    """A few numbers that change with a tensor's entries."""
    values = tensor.detach()
    if values.numel() == 0 or values.is_complex():
        return (float(values.numel()),)
    total = values.sum(dtype=torch.float64)
    reals = values if values.is_floating_point() else values.double()
    size = torch.linalg.vector_norm(reals, dtype=torch.float64)
    return (float(values.numel()), *torch.stack([size, total]).tolist())


def _same(before: list[tuple[float, ...]], tensors: list[Tensor]) -> bool:
    """Whether tensors are what they were, up to the rounding of kernels that add in any order."""
    if len(before) != len(tensors):
        return False
    for known, tensor in zip(before, tensors, strict=True):
        found = _fingerprint(tensor)
        eps = torch.finfo(tensor.dtype if tensor.is_floating_point() else torch.float64).eps
        if known[0] != found[0]:
            return False
        if len(known) > 1 and math.isfinite(known[1]):
            room = _REPEATED * eps * known[1]
            if not all(abs(a - b) <= room for a, b in zip(known[1:], found[1:], strict=True)):
                return False
    return True


class _Circumstances:
    """Autocast, function modes and random state of an evaluation, to evaluate again under them."""

    def __init__(self, devices: list[torch.device]) -> None:
        self._kinds = sorted({"cpu", *(device.type for device in devices)} - {"meta"})
        self._autocast = [_autocast(kind) for kind in self._kinds]
        self._generators = [torch.default_generator]
        for index in sorted({d.index or 0 for d in devices if d.type == "cuda"}):
            self._generators.append(torch.cuda.default_generators[index])
        # Such as a default device: PyTorch takes them off around a call of `autograd.grad`.
        self._modes = overrides._get_current_function_mode_stack()
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
            with self._autocasting(), self._overridden():
                yield
            return
        before = [generator.get_state() for generator in self._generators]
        try:
            for generator, state in zip(self._generators, self._random, strict=True):
                generator.set_state(state)
            with self._autocasting(), self._overridden():
                yield
        finally:
            for generator, state in zip(self._generators, before, strict=True):
                generator.set_state(state)

    @contextlib.contextmanager
    def _overridden(self) -> Iterator[None]:
        present = {id(mode) for mode in overrides._get_current_function_mode_stack()}
        missing = [mode for mode in self._modes if id(mode) not in present]
        for mode in missing:
            overrides._push_mode(mode)
        try:
            yield
        finally:
            for _ in missing:
                overrides._pop_mode()

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
        node = torch.zeros((), device="cpu", requires_grad=True).view(()).grad_fn
    assert node is not None
    return int(node._sequence_nr())
