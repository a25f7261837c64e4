"""How is the "eager" attention of Hugging Face models computed in chunks of queries?

Each model's file has its own function `eager_attention_forward`: with a cap on the scores, sinks, a
learned bias. All of them treat every query by itself, so that any can be called for some queries at
a time, as a segment (`recompute.py`). That it does so is tried out before it is relied upon.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from spectra.errors import ArgumentError
from spectra.oracle.chunks import chunk_sizes
from spectra.oracle.recompute import Site, UnsuitableSegmentError, run_segment

__all__ = ["EagerAttention"]

_NAME = "eager_attention_forward"
# A model with one of them does without the attention weights, which only eager functions return.
_WITHOUT_WEIGHTS = ("_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn")
# How many queries a function is tried out on, in one call and in two.
_TRIED = 16


class EagerAttention:
    """The eager functions in the files of a model's modules; none where there is no such model."""

    def __init__(self, model: nn.Module | None) -> None:
        self._in_chunks: dict[str, _InChunks] = {}
        modules = list(model.modules()) if model is not None else []
        if not any(getattr(m, flag, False) for m in modules for flag in _WITHOUT_WEIGHTS):
            return
        for file in {type(module).__module__ for module in modules}:
            function = getattr(sys.modules.get(file), _NAME, None)
            if function is not None:
                self._in_chunks[file] = _InChunks(function)

    @property
    def chunked(self) -> bool:
        """Whether any attention has been large enough for chunks."""
        return any(function.used for function in self._in_chunks.values())

    @contextlib.contextmanager
    def replaced(self) -> Iterator[None]:
        """Within it the models' own functions give way to those in chunks."""
        before = {file: getattr(sys.modules[file], _NAME) for file in self._in_chunks}
        try:
            for file, function in self._in_chunks.items():
                setattr(sys.modules[file], _NAME, function)
            yield
        finally:
            for file, function in before.items():
                setattr(sys.modules[file], _NAME, function)


class _InChunks:
    """An eager function that computes large attention in chunks of queries."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.used = False
        self._function = function
        self._site = Site(f"{function.__module__}.{_NAME}, in chunks of queries,")
        # Whether chunks give what the whole gives; not known until it has been tried.
        self._separable: bool | None = None

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, Any]:
        sizes = chunk_sizes(query, key)
        drops = module.training and options.get("dropout", 0.0) > 0
        if self._separable is False or len(sizes) == 1 or drops or _weights_wanted(module, options):
            return self._function(module, query, key, value, attention_mask, **options)

        def chunks(sizes: list[int]) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
            columns = [_split(x, sizes) for x in (query, attention_mask, *options.values())]
            for rows, mask, *others in zip(*columns, strict=True):
                yield (module, rows, key, value, mask), dict(zip(options, others, strict=True))

        if self._separable is None:
            self._separable = self._try_out(chunks, query.shape[-2])
        if self._separable:
            try:
                outputs = [
                    run_segment(self._site, self._attend, args, kwargs)
                    for args, kwargs in chunks(sizes)
                ]
            except UnsuitableSegmentError:
                self._separable = False
            else:
                self.used = True
                return torch.cat(outputs, dim=1), _NotKept()
        return self._function(module, query, key, value, attention_mask, **options)

    def _attend(self, *args: Any, **options: Any) -> Tensor:
        """What comes out for some of the queries, (batch, queries, heads, features)."""
        return self._function(*args, **options)[0]

    @torch.no_grad()
    def _try_out(self, chunks: Callable[[list[int]], Iterator[Any]], queries: int) -> bool:
        """Whether the first queries in two calls give what they give in one."""
        half = min(_TRIED, queries) // 2
        rest = queries - 2 * half
        together, apart = chunks([2 * half, rest]), chunks([half, half, rest])

        def outcome(chunk: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
            args, options = chunk
            return self._attend(*args, **options)

        try:
            whole = outcome(next(together))
            parts = torch.cat([outcome(next(apart)), outcome(next(apart))], dim=1)
        except Exception:
            # Whatever is the matter: in one piece it may work.
            return False
        if whole.shape != parts.shape:
            return False
        tolerance = torch.finfo(whole.dtype).eps ** 0.5 * float(whole.abs().max())
        return torch.allclose(whole, parts, rtol=0.0, atol=tolerance, equal_nan=True)


class _NotKept:
    """Stands where attention weights would be, so that their use is an error."""

    def __getattr__(self, name: str) -> NoReturn:
        msg = (
            f"{name!r} is asked of attention weights, which are never in memory as a whole where "
            "attention is computed in chunks; set model.config.output_attentions = True to have "
            "them"
        )
        raise ArgumentError(msg)


def _split(argument: Any, sizes: list[int]) -> Any:
    """An argument for each chunk: its rows, where it has one for every query."""
    if isinstance(argument, Tensor) and argument.dim() == 4 and argument.shape[-2] == sum(sizes):
        return argument.split(sizes, dim=-2)
    return [argument] * len(sizes)


def _weights_wanted(module: nn.Module, options: dict[str, Any]) -> bool:
    config = getattr(module, "config", None)
    if options.get("output_attentions") or getattr(config, "output_attentions", False):
        return True
    # Asked for in a model's call, which does not hand the question on to its layers.
    capturing = sys.modules.get("transformers.utils.output_capturing")
    collector = getattr(capturing, "_active_collector", None)
    wanted = collector.get() if collector is not None else None
    return any("attentions" in name for name in wanted or ())
