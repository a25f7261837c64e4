"""How does a model compute that is stored in half precision, or spread over processes?

Parameters stay as they are. Each block gets copies of its own, in the wanted dtype and whole,
inside of a segment, so that they live as long as it is computed; what is outside of blocks has
copies for as long as products are computed. What is differentiated by are stand-ins. For another
dtype these are zeros in the shapes of the parameters, which take no memory and are added to the
copies: a gradient by a parameter in bfloat16 would be rounded to bfloat16. For parameters that are
spread they are the shards on this process, of which the copies are gathered.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from spectra.distributed.sharding import Sharding, is_spread, local
from spectra.errors import LossError
from spectra.objective.nodes import graph_nodes
from spectra.oracle.recompute import Site, run_segment
from spectra.oracle.segments import attributes_replaced

__all__ = ["Casting"]


class Casting:
    """Which modules of a model compute on copies of their parameters.

    Parameters
    ----------
    model
        With parameters of any floating dtypes, whole or in shards.
    dtype
        Of the copies; None for that of the parameters.
    sharding
        How the parameters are spread, if they are.
    stand_ins
        What is differentiated by in place of a parameter, for those that are analysed.
    blocks
        Modules that are computed as one segment each.
    """

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype | None,
        stand_ins: dict[Tensor, Tensor],
        blocks: Iterable[nn.Module],
        sharding: Sharding | None = None,
    ) -> None:
        self._model = model
        self.dtype = dtype
        self._sharding = sharding
        self._stand_ins = stand_ins
        self.sites: dict[nn.Module, Site] = {}
        # Outside of the blocks: embeddings, a last norm, the head. Their copies are made once for
        # each pass, so that the model's own code finds them where it looks at a weight.
        self._outer: list[nn.Module] = []
        self._divide("", model, set(blocks))

    def _divide(self, name: str, module: nn.Module, blocks: set[nn.Module]) -> None:
        if module in blocks:
            kind = type(module).__name__
            self.sites[module] = Site(f"module {name!r} ({kind})", module.parameters())
            return
        self._outer.append(module)
        for key, child in module.named_children():
            self._divide(f"{name}.{key}" if name else key, child, blocks)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the model computes on copies."""
        segments = [
            (module, "forward", self._casted(site, module, module.forward))
            for module, site in self.sites.items()
        ]
        copies = self._copies(self._outer, self._stand_ins)
        with _replaced(self._outer, copies), attributes_replaced(segments):
            yield

    def refuse_others(self, loss: Tensor) -> None:
        """Refuse a loss that reads a parameter elsewhere than in the module that holds it.

        Raises
        ------
        LossError
        """
        for node in graph_nodes([loss]):
            variable = getattr(node, "variable", None)
            if variable is not None and variable in self._stand_ins:
                name = next(n for n, p in self._model.named_parameters() if p is variable)
                what, cure = (
                    ("compute_dtype does", "convert the whole model with model.float()")
                    if self._sharding is None
                    else ("the gathering of shards does", "take recompute='none'")
                )
                msg = (
                    f"parameter {name!r} is used outside of the module that holds it, where "
                    f"{what} not reach it; call that module, {cure}, or leave the parameter out "
                    "with params="
                )
                raise LossError(msg)

    def _casted(
        self, site: Site, module: nn.Module, forward: Callable[..., Any]
    ) -> Callable[..., Any]:
        inside = list(module.modules())
        # Arguments of the segment, so that it is differentiated by them.
        names: list[Tensor] = [
            p for m in inside for p in m._parameters.values() if p in self._stand_ins
        ]
        stand_ins = [self._stand_ins[parameter] for parameter in names]

        def on_copies(given: list[Tensor], args: Any, kwargs: Any) -> Any:
            copies = self._copies(inside, dict(zip(names, given, strict=True)))
            for value in tree_flatten((args, kwargs))[0]:
                self._refuse_rounded(value, site)
            with _replaced(inside, copies):
                return forward(*args, **kwargs)

        # Some models look at the signatures of their layers.
        @functools.wraps(forward)
        def segment(*args: Any, **kwargs: Any) -> Any:
            return run_segment(site, on_copies, (stand_ins, args, kwargs), {})

        return segment

    def _copies(
        self, modules: list[nn.Module], stand_ins: dict[Tensor, Tensor]
    ) -> dict[Tensor, Tensor]:
        """Parameters and buffers as they are computed with, by the tensors that they replace."""
        copies: dict[Tensor, Tensor] = {}
        for module in modules:
            for tensor in [*module._parameters.values(), *module._buffers.values()]:
                if tensor is None or tensor in copies:
                    continue
                if self.dtype is not None and tensor.is_floating_point():
                    copy = local(tensor).detach().to(self.dtype)
                    copies[tensor] = copy + stand_ins[tensor] if tensor in stand_ins else copy
                elif self._sharding is not None:
                    copies[tensor] = stand_ins.get(tensor, local(tensor).detach())
        return copies if self._sharding is None else self._gathered(copies, self._sharding)

    def _gathered(self, copies: dict[Tensor, Tensor], sharding: Sharding) -> dict[Tensor, Tensor]:
        """The whole of each, all in one go; those that are no parameters in shards, as they are."""
        chosen = [t for t in copies if is_spread(t) or copies[t].requires_grad]
        layouts = [sharding.layout(tensor) for tensor in chosen]
        wholes = sharding.gather([copies[tensor] for tensor in chosen], layouts)
        return {**copies, **dict(zip(chosen, wholes, strict=True))}

    def _refuse_rounded(self, value: Any, site: Site) -> None:
        """Refuse an activation that has lost the digits on its way between the modules."""
        if self.dtype is None or not (isinstance(value, Tensor) and value.requires_grad):
            return
        if torch.promote_types(value.dtype, self.dtype) != value.dtype:
            msg = (
                f"{site.name} gets an activation in {value.dtype}: the model's own code, or "
                f"autocast, rounds it, so that products would not be those of {self.dtype}; "
                "convert the whole model instead, or leave out compute_dtype"
            )
            raise LossError(msg)


@contextlib.contextmanager
def _replaced(modules: list[nn.Module], copies: dict[Tensor, Tensor]) -> Iterator[None]:
    """Within it the modules hold copies in place of their parameters and buffers."""
    held: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (d, dict(d)) for m in modules for d in (m._parameters, m._buffers)
    ]
    flat = [(m, m._flat_weights) for m in modules if isinstance(m, nn.RNNBase)]
    try:
        for tensors, before in held:
            tensors.update({name: copies.get(t, t) for name, t in before.items() if t is not None})
        for module, weights in flat:
            # Recurrent modules hold their parameters a second time.
            module._flat_weights = [w if w is None else copies.get(w, w) for w in weights]
        yield
    finally:
        for tensors, before in held:
            tensors.update(before)
        for module, weights in flat:
            module._flat_weights = weights
