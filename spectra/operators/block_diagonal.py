"""What are the principal blocks of a Hessian, all of them in one pass over the data?"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from spectra.errors import ArgumentError, ArgumentTypeError
from spectra.objective.parameters import ParameterSpace
from spectra.operators.base import SymmetricOperator
from spectra.operators.lockstep import Ask, in_lockstep
from spectra.oracle.hvp import BlockRequest

if TYPE_CHECKING:
    from spectra.operators.hessian import HessianOperator

__all__ = ["BlockDiagonalOperator"]

T = TypeVar("T")


class BlockDiagonalOperator(SymmetricOperator):
    """The block-diagonal part of a Hessian, see `HessianOperator.blocks`.

    It has the vectors of the whole. The gradient's graph of a batch is built at most once for all
    blocks, and differentiated by the parameters of one at a time, from there up to the loss. In
    networks of two to eight layers all of them took 1.1 to 2.8 products with the whole Hessian, up
    to 28 modules 7.8, and 0.2 to 0.8 of the products with every block's vector, padded with zeros.

    Attributes
    ----------
    names
        Of the blocks, in the order of the parameters.
    passes
        Over the data, so far.
    """

    space: ParameterSpace

    def __init__(self, hessian: HessianOperator, groups: Mapping[str, Sequence[int]]) -> None:
        _check(hessian.space.names, groups)
        self._hessian = hessian
        self._places = {block: tuple(places) for block, places in groups.items()}
        self.names = tuple(self._places)
        self.passes = 0
        space = hessian.space
        self._spaces: dict[str, ParameterSpace] = {
            block: space.subspace(places) for block, places in self._places.items()
        }
        super().__init__(space)

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, block: str) -> HessianOperator:
        """One block as an operator of its own, with its own passes over the data.

        Raises
        ------
        ArgumentError
            There is no such block.
        """
        if block not in self._places:
            some = ", ".join(repr(name) for name in self.names[:6])
            msg = f"there is no block {block!r} among {len(self)}: {some}, ..."
            raise ArgumentError(msg)
        names = {self.space.names[i] for i in self._places[block]}
        return self._hessian.block(lambda name, _: name in names)

    def each(
        self,
        question: Callable[..., T],
        *,
        after_pass: Callable[[], object] | None = None,
        **options: Any,
    ) -> dict[str, T]:
        """The same question of every block, in as few passes over the data as the longest takes.

        Parameters
        ----------
        question
            Any function of an operator: `spectra.eigsh`, `trace`, `norm`, `spectral_density`, or
            one of your own that asks several of them.
        after_pass
            Called after each pass over the data, in the calling thread.
        **options
            Of the question. `k` is no more than the size of a block. A progress bar is not shown.

        Returns
        -------
        dict
            The results by block; each counts its own matvecs, `passes` those of all together.

        Raises
        ------
        ArgumentError
            `checkpoint=` is for one operator; ask `blocks[name]`.
        SpectraError
            What the question raises, with the block's name in front.
        """
        if options.get("checkpoint") is not None:
            msg = (
                "checkpoint= cannot be shared among blocks; ask one at a time, blocks[name], each "
                "with a file of its own"
            )
            raise ArgumentError(msg)
        options.pop("checkpoint", None)
        if "progress" in _parameters(question):
            options["progress"] = False

        def task(block: str, ask: Ask) -> T:
            own = _Block(self, block, self._spaces[block], ask)
            fitting = dict(options)
            if isinstance(fitting.get("k"), int):
                fitting["k"] = min(fitting["k"], own.space.n)
            return question(own, **fitting)

        def compute(questions: dict[int, Tensor]) -> dict[int, Tensor]:
            asked = {self.names[number]: rows for number, rows in questions.items()}
            products = self._block_products(asked)
            if after_pass is not None:
                after_pass()
            return dict(zip(questions, products, strict=True))

        def explain(number: int, error: BaseException) -> None:
            if error.args and isinstance(error.args[0], str):
                error.args = (f"block {self.names[number]!r}: {error.args[0]}", *error.args[1:])

        tasks = [functools.partial(task, block) for block in self.names]
        if self.space.spread:
            # Their inner products are sums over processes, which threads would mix up.
            found = [self._alone(i, task, compute, explain) for i, task in enumerate(tasks)]
        else:
            found = in_lockstep(tasks, compute, explain)
        return dict(zip(self.names, found, strict=True))

    def _alone(
        self,
        number: int,
        task: Callable[[Ask], T],
        compute: Callable[[dict[int, Tensor]], dict[int, Tensor]],
        explain: Callable[[int, BaseException], None],
    ) -> T:
        """One question by itself, with passes over the data of its own."""
        try:
            return task(lambda rows: compute({number: rows})[number])
        except BaseException as error:
            explain(number, error)
            raise

    def undisturbed(self) -> contextlib.AbstractContextManager[None]:
        """As the Hessian is."""
        return self._hessian.undisturbed()

    def identity(self) -> dict[str, Any]:
        """That of the Hessian, with the parameters of every block."""
        blocks = {b: [self.space.names[i] for i in places] for b, places in self._places.items()}
        return {**self._hessian.identity(), **super().identity(), "blocks": blocks}

    def describe(self) -> dict[str, Any]:
        """The Hessian's description, and how many blocks there are."""
        return {**self._hessian.describe(), **super().describe(), "blocks": len(self)}

    def size(self, block: str) -> int:
        """Number of entries of the parameters of a block."""
        return self._spaces[block].n

    def restricted(self, vector: Tensor, block: str) -> Tensor:
        """The part of a vector (n,) that belongs to a block, (n_b,)."""
        slices, own = list(self.space.slices.values()), self._spaces[block]
        part = own.empty().to(vector)
        for i, place in zip(self._places[block], own.slices.values(), strict=True):
            part[place] = vector[slices[i]]
        return part

    def extended(self, part: Tensor, block: str) -> Tensor:
        """A vector (n,) that is `part` (n_b,) in a block, and zero elsewhere."""
        vector, slices = self.space.zeros(), list(self.space.slices.values())
        for i, place in zip(self._places[block], self._spaces[block].slices.values(), strict=True):
            vector[slices[i]] = part[place]
        return vector

    def norm(self, part: Tensor, block: str) -> float:
        """Euclidean norm of a vector (n_b,) of a block."""
        return self._spaces[block].norm(part)

    def _products(self, rows: Tensor) -> Tensor:
        # Rows that are zero in a block are not multiplied by it: those of a dense matrix mostly.
        asked: dict[str, Tensor] = {}
        chosen: dict[str, Tensor] = {}
        for block in self.names:
            own = torch.stack([self.restricted(row, block) for row in rows])
            nonzero = self._spaces[block].summed(own.any(dim=1).double())
            there = nonzero.nonzero().squeeze(1)
            if len(there):
                asked[block], chosen[block] = own[there], there
        out = self.space.zeros(len(rows))
        slices = list(self.space.slices.values())
        for block, products in zip(asked, self._block_products(asked), strict=True):
            views = self._spaces[block].slices.values()
            for i, view in zip(self._places[block], views, strict=True):
                out[chosen[block], slices[i]] = products[:, view]
        return out

    def _block_products(self, asked: dict[str, Tensor]) -> list[Tensor]:
        if not asked:
            return []
        self.passes += 1
        return self._hessian.block_products(
            [
                BlockRequest(self._places[block], self._spaces[block], rows)
                for block, rows in asked.items()
            ]
        )

    def _culprit(self) -> str:
        return self._hessian.culprit()


class _Block(SymmetricOperator):
    """One block, as an algorithm sees it that runs together with those of the others."""

    space: ParameterSpace

    def __init__(
        self, whole: BlockDiagonalOperator, block: str, space: ParameterSpace, ask: Ask
    ) -> None:
        self._whole = whole
        self._block = block
        self._ask = ask
        super().__init__(space)

    def describe(self) -> dict[str, Any]:
        return {**self._whole.describe(), **super().describe(), "block": self._block}

    def _products(self, rows: Tensor) -> Tensor:
        return self._ask(rows)

    def _culprit(self) -> str:
        return f"a product with the block by itself, blocks[{self._block!r}], says where from"


def _check(names: Sequence[str], groups: Mapping[str, Sequence[int]]) -> None:
    if not groups:
        msg = "by= names no block; give at least one selection of parameters"
        raise ArgumentError(msg)
    seen: dict[int, str] = {}
    for block, places in groups.items():
        for place in places:
            if place in seen:
                msg = (
                    f"parameter {names[place]!r} is in the blocks {seen[place]!r} and {block!r}; "
                    "principal blocks of a block-diagonal matrix do not overlap"
                )
                raise ArgumentError(msg)
            seen[place] = block


def _parameters(question: Any) -> Sequence[str]:
    if not callable(question):
        msg = f"question is a {type(question).__name__}; expected a function such as spectra.eigsh"
        raise ArgumentTypeError(msg)
    try:
        return list(inspect.signature(question).parameters)
    except (TypeError, ValueError):
        return []
