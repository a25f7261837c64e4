"""The Hessian of a loss over data, or of any function, as an operator."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from spectra.distributed.collectives import Ranks, everywhere, ranks_of
from spectra.distributed.sharding import spread_tensors
from spectra.errors import ArgumentTypeError, NonFiniteError, SpectraError
from spectra.objective.batches import reiterable
from spectra.objective.objective import FunctionObjective, ModelObjective, Objective
from spectra.objective.parameters import By, ParameterSpace, Selection, grouped, matching
from spectra.operators.base import SymmetricOperator
from spectra.operators.block_diagonal import BlockDiagonalOperator
from spectra.oracle.graphs import GraphPolicy
from spectra.oracle.hvp import BlockRequest, HvpOracle, Operation
from spectra.oracle.segments import Recompute

__all__ = ["HessianOperator"]


class HessianOperator(SymmetricOperator):
    """The Hessian of L(θ), the weighted mean of a loss over data, at the model's present weights.

    Products are exact to rounding: the loss is differentiated twice, nothing is stored. One matvec
    costs two gradients over all the data on a retained graph, which the first product builds where
    memory allows it, and three without.

    Parameters
    ----------
    model
        Any module. It is left as it was found: mode, `.grad`, `requires_grad`, buffers. Backward
        hooks do not run during products.
    loss
        `loss(model, batch) -> scalar`, the mean over the terms of a batch (or their sum, see
        `reduction`). See `spectra.losses` for ready ones. Autocast around a call is off: a loss
        that is to be computed under autocast enters it itself.
    data
        Re-iterable batches: a list, a DataLoader. A batch is a tensor or tuples, lists, dicts and
        dataclasses of tensors; tensors are moved to the model's device. Every pass has to give the
        same loss: a loader that draws other samples each time is refused (see `hold_data`).
    params
        Which parameters: None (all that require a gradient), a glob over names or several, or a
        function `(name, parameter) -> bool`. The others are held fixed.
    reduction
        "mean": L = Σ w_b ℓ_b / Σ w_b. "sum": L = Σ ℓ_b, for a loss that sums over its batch. The
        default is the loss's own (`supervised` reads it off the criterion), else "mean".
    weight
        Number of terms in the mean of a batch, as a function of the batch. The default is the
        loss's own, else the number of samples: the first dimension, which all tensors of a batch
        then have to share.
    graph
        "auto": the gradient's graphs of as many batches as `memory_budget` holds are built once and
        kept; the others are built anew for every product, which costs half as much again.
        "retained": all are kept. "fresh": none, memory of one batch. `describe()`, and with it
        every result, says how many were kept. Kept graphs are dropped when a parameter, a buffer, a
        mode or a tensor in a list of batches has changed; after any other change (an attribute
        of the model, the files that a loader reads) call `release()`.
    memory_budget
        Bytes for kept graphs and the work on one batch: decides which graphs are kept, whether
        blocks are recomputed, and whether batches are split. "auto", the default: half of the
        memory free in the first pass.
    recompute
        "auto": where the graph of a batch would not fit, the repeated blocks of the model (layers
        of a transformer, of a residual network) keep only their inputs and are computed again, in
        1.2 to 1.7 times the time. "none": never. A glob over names of modules, or several: those,
        always. Checkpointing that the model does by itself is done in the same way. See
        `spectra.recompute`.
    compute_dtype
        torch.float32 or torch.float64, for a model stored in another dtype: every block computes on
        copies of its parameters, which live only as long. Products are those of the model
        converted as a whole, whose copy need not fit.
    tf32
        Leave TensorFloat-32, and bfloat16 inside of float32 products, as the program has set it;
        by default both are off during products.
    compile
        Compile the products on kept graphs, which takes a minute or more and pays after hundreds of
        products: it begins once they have taken half a minute. Where that fails, is wrong, or is
        no faster, they stay as they are, and `describe()` says why.
    microbatch
        Split batches into this many samples to bound memory. Does not change the Hessian.
    hold_data
        Read `data` once and keep its batches in memory; takes a generator.
    allow_training_mode
        Accept dropout and batch norm in training mode. Dropout masks are then frozen, one per
        batch, and the Hessian depends on how the data are batched.
    dtype
        Of the vectors: torch.float32 or torch.float64. The default is float64 if a selected
        parameter is float64, else float32.
    process_group
        A group of torch.distributed, or True for all processes: every process passes its share of
        the batches as `data` (it may be empty) and makes the same calls, and gets the same answers,
        of all data together. Batches count by their terms, whichever process they are on; one sum
        over the processes per product. DistributedDataParallel is taken off the model.
    probe_group
        Processes that each have all of the data (or, with `process_group`, one of every such group
        that has): `trace`, `norm(ord="fro")` and `spectral_density` then compute different probes
        on them, and combine them into one estimate. The probes are those of one process, of which a
        round of one on every process is the least. What else they stand on (eigenpairs, Krylov
        bases, Hutch++, XTrace) is computed by all.

    Raises
    ------
    ArgumentError, ArgumentTypeError, ParameterSelectionError
        What was passed cannot be analysed.
    StochasticModelError
        Dropout or batch norm is in training mode.
    DataError
        The data can be read only once.
    DoubleBackwardError
        A module's second derivative is known to be wrong.
    DistributedError
        With `process_group`, by any call: another process has failed or ended, or has other
        weights, options or seeds.

    References
    ----------
    Pearlmutter, 1994, "Fast exact multiplication by the Hessian".
    """

    space: ParameterSpace
    # There are other processes, and nobody said whether they have other data.
    _of_one_process = False
    # Processes that compute other probes.
    _probe_ranks: Ranks | None = None
    # The class that was taken off the model.
    _unwrapped: str | None = None
    # Whether the model is linearised, which makes the Hessian the Gauss-Newton matrix.
    _linearised = False

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[nn.Module, Any], Tensor],
        data: Iterable[Any],
        params: Selection = None,
        *,
        reduction: str | None = None,
        weight: Callable[[Any], float] | None = None,
        graph: GraphPolicy = "auto",
        memory_budget: int | Literal["auto"] | None = None,
        recompute: Recompute = "auto",
        compute_dtype: torch.dtype | None = None,
        tf32: bool = False,
        compile: bool = False,
        microbatch: int | None = None,
        hold_data: bool = False,
        allow_training_mode: bool = False,
        dtype: torch.dtype | None = None,
        process_group: dist.ProcessGroup | bool | None = None,
        probe_group: dist.ProcessGroup | bool | None = None,
    ) -> None:
        spread = bool(spread_tensors(model))
        # Parameters in shards are those of all processes.
        ranks = ranks_of(True if spread and process_group is None else process_group)
        model, wrapped = (model, None) if ranks is None else _without_wrapper(model)

        def restricted_to(
            selection: Selection, computing_in: torch.dtype | None = None
        ) -> Objective:
            return ModelObjective(
                model,
                loss,
                batches,
                selection,
                reduction=reduction,
                weight=weight,
                microbatch=microbatch,
                allow_training_mode=allow_training_mode,
                # In another dtype the vectors have that one, too.
                dtype=computing_in or dtype,
                compute_dtype=computing_in or compute_dtype,
                linearised=linearised,
                ranks=ranks,
            )

        # Not through self: a function that holds the operator that holds it is a cycle.
        linearised = self._linearised
        batches = everywhere(
            ranks, "reading the data", lambda: reiterable(data, hold_data=hold_data)
        )
        options: dict[str, Any] = {
            "graph": graph,
            "memory_budget": None if memory_budget == "auto" else memory_budget,
            "recompute": recompute,
            "compute_dtype": compute_dtype,
            "tf32": tf32,
            "compile": compile,
            "ranks": ranks,
        }
        self._unwrapped = wrapped
        unsaid = process_group is None and probe_group is None
        self._of_one_process = unsaid and ranks is None and _several()
        self._probe_ranks = ranks_of(probe_group)
        everywhere(
            ranks,
            "making the operator",
            lambda: self._set_up(restricted_to(params), restricted_to, options),
        )

    @classmethod
    def from_function(
        cls,
        f: Callable[..., Tensor],
        tensors: Tensor | Sequence[Tensor],
        *,
        graph: GraphPolicy = "auto",
        dtype: torch.dtype | None = None,
    ) -> HessianOperator:
        """The Hessian of any scalar function `f(*tensors)`, by all the tensors together.

        The tensors are the point at which to differentiate, taken in order as one flat vector and
        named `tensor0`, `tensor1`, …; they need not require a gradient.

        >>> import torch, spectra
        >>> f = lambda x, y: x**2 + 2*x*y + 3*y**2 + 4*x + 5*y + 6
        >>> H = spectra.HessianOperator.from_function(f, [torch.tensor(1.0), torch.tensor(2.0)])
        >>> H.to_dense()
        tensor([[2., 2.],
                [2., 6.]])
        """
        if not isinstance(tensors, Iterable):
            msg = f"tensors is a {type(tensors).__name__}; expected a tensor or a list of tensors"
            raise ArgumentTypeError(msg)
        points = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        names = [f"tensor{i}" for i in range(len(points))]

        def restricted_to(selection: Selection) -> Objective:
            assert callable(selection)
            free = [i for i, name in enumerate(names) if selection(name, points[i])]

            def partial(*values: Tensor) -> Tensor:
                # Detached: whatever produced the fixed tensors is no part of the function.
                arguments = [point.detach() for point in points]
                for i, value in zip(free, values, strict=True):
                    arguments[i] = value
                return f(*arguments)

            chosen = [points[i] for i in free]
            return FunctionObjective(partial, chosen, dtype, [names[i] for i in free], points)

        operator = cls.__new__(cls)
        operator._set_up(FunctionObjective(f, points, dtype), restricted_to, {"graph": graph})
        return operator

    def _set_up(
        self,
        objective: Objective,
        restricted_to: Callable[..., Objective],
        options: dict[str, Any],
    ) -> None:
        self.objective = objective
        objective.space.ranks = options.get("ranks")
        objective.space.probe_ranks = self._probe_ranks
        self._oracle = HvpOracle(objective, **options)
        self._restricted_to = restricted_to
        self._options = options
        super().__init__(objective.space)

    def value(self) -> float:
        """L(θ). Costs a third of a gradient."""
        return self._oracle.value()

    def gradient(self) -> Tensor:
        """The gradient of L, flat (n,), in the same weighting.

        Costs one gradient; nothing after a product whose graphs were all kept.
        """
        return self._oracle.value_and_gradient()[1]

    def value_and_gradient(self) -> tuple[float, Tensor]:
        """L and its gradient in one pass over the data, or none where all graphs are kept."""
        return self._oracle.value_and_gradient()

    def value_at(self, displacement: Tensor) -> float:
        """L(θ + `displacement`), under the terms of `value_and_gradient_at`."""
        self._check_tensor(displacement)
        return self._oracle.value(displacement)

    def value_and_gradient_at(self, displacement: Tensor | None) -> tuple[float, Tensor]:
        """L and its gradient at θ + `displacement`, flat (n,), which costs one gradient.

        The weights are left as they are, to the last bit. The loss is always evaluated anew, also
        with None, at θ.

        Raises
        ------
        ArgumentError, ArgumentTypeError
            Wrong shape, dtype or device.
        LossError, NonFiniteError
            The loss cannot be evaluated there.
        """
        if displacement is not None:
            self._check_tensor(displacement)
        return self._oracle.value_and_gradient_at(displacement)

    def block(self, params: Selection) -> HessianOperator:
        """The principal submatrix of the parameters that `params` selects among the present ones.

        It is an operator of its own; its products are cheaper where the graph to them is shorter.

        Raises
        ------
        ParameterSelectionError
            Nothing is selected, or a glob matches none of the present parameters.
        """
        present = self.objective.named_parameters()
        chosen = present if params is None else matching(present, params)
        kept = {names[0] for names, _ in chosen}
        operator = type(self).__new__(type(self))
        objective = self._restricted_to(lambda name, _: name in kept)
        operator._unwrapped = self._unwrapped
        operator._probe_ranks = self._probe_ranks
        operator._of_one_process = self._of_one_process
        operator._set_up(objective, self._restricted_to, self._options)
        return operator

    def blocks(self, by: By | Mapping[str, Selection] = "module") -> BlockDiagonalOperator:
        """The principal blocks of all modules: together an operator, and each by itself.

        Parameters
        ----------
        by
            "module": the parameters that one module owns together (a weight and its bias). "layer":
            the modules whose names agree up to the first number, or in their first two parts.
            "parameter": each by itself. Or selections of parameters by the names of the blocks; a
            parameter in none of them has rows of zeros. A tied parameter belongs to the block of
            its first name.

        Raises
        ------
        ArgumentError, ArgumentTypeError, ParameterSelectionError
            Another `by`; a parameter in two blocks; a selection that matches nothing.
        """
        if not isinstance(by, Mapping):
            groups = grouped(self.space.names, by)
            return BlockDiagonalOperator(self, groups)
        place = {name: i for i, name in enumerate(self.space.names)}
        present = self.objective.named_parameters()
        groups = {
            str(block): [
                place[names[0]]
                for names, _ in (present if chosen is None else matching(present, chosen))
            ]
            for block, chosen in by.items()
        }
        return BlockDiagonalOperator(self, groups)

    def block_products(self, requests: Sequence[BlockRequest]) -> list[Tensor]:
        """Products of principal blocks, each with its own vectors, in one pass over the data.

        What `blocks` stands on. Raises what a product does.
        """
        return self._oracle.block_products(requests)

    def culprit(self) -> str:
        """Where a non-finite product comes from, as a clause; looks through all the data."""
        return self._culprit()

    def computing_in(self, dtype: torch.dtype) -> HessianOperator | None:
        """The same Hessian with a model that computes in another dtype, see `compute_dtype`.

        None for an operator without a model.
        """
        if self.objective.model is None:
            return None
        kept = set(self.space.names)
        restricted_to = functools.partial(self._restricted_to, computing_in=dtype)
        objective = restricted_to(lambda name, _: name in kept)
        operator = type(self).__new__(type(self))
        operator._set_up(objective, restricted_to, {**self._options, "compute_dtype": dtype})
        return operator

    def operations(self) -> list[Operation]:
        """What the loss of the first batch is made of."""
        return self._oracle.operations()

    def halves(self) -> tuple[float, float, float] | None:
        """The loss of the first batch, and the mean and the sum of those of its two halves.

        None where it cannot be split, or the data are spread over processes. Costs two forward
        passes over that batch.
        """
        return None if self.space.ranks is not None else self._oracle.halves()

    def quadratic_forms(self, vectors: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """How each batch by itself curves along given directions: the spread of the data.

        Parameters
        ----------
        vectors
            (n, k) directions as columns, of the operator's dtype and on its device.

        Returns
        -------
        weights, forms
            (g,) and (g, k) float64: the weight of every batch (microbatch), and vᵀ H_g v with H_g
            the Hessian of its own loss. Costs k matvecs.

        Raises
        ------
        ArgumentError, ArgumentTypeError
            Wrong shape, dtype or device.
        NonFiniteError
            A form is nan or inf.
        """
        self._check_tensor(vectors)
        rows = vectors.unsqueeze(0) if vectors.dim() == 1 else vectors.T
        weights, forms = self._oracle.quadratic_forms(rows.contiguous())
        self.matvecs += len(rows)
        if not np.isfinite(forms).all():
            msg = f"a product of one batch by itself is not finite; {self._culprit()}"
            raise NonFiniteError(msg)
        return weights, forms

    def release(self, *, forget: bool = True) -> None:
        """Free the kept graphs; the next product builds them again.

        Which ones, is then decided anew by the memory there is; with `forget` false it is not
        looked at, and the same are kept as before: for the same model and batches of the same
        size at other weights, over and over.
        """
        self._oracle.release(forget=forget)

    def undisturbed(self) -> contextlib.AbstractContextManager[None]:
        """Within it weights and buffers are taken to hold the same numbers."""
        # Several processes compare theirs at every product.
        return contextlib.nullcontext() if self.space.ranks else self.objective.undisturbed()

    def identity(self) -> dict[str, Any]:
        """Digests of weights, data and loss; reads all the data once."""
        return {**super().identity(), **self.objective.identity()}

    def describe(self) -> dict[str, Any]:
        """What the operator is, for the provenance of results."""
        objective = self.objective.describe()
        notes = [*objective.get("notes", ())]
        if self._of_one_process:
            notes.append(
                "computed from the data of one process of several; process_group=True takes those "
                "of all"
            )
        if self._unwrapped is not None:
            notes.append(f"computed on the module inside of {self._unwrapped}")
        return {
            **super().describe(),
            **objective,
            **self._oracle.describe(),
            "parameters": len(self.space.names),
            **({} if self._probe_ranks is None else {"probe_groups": self._probe_ranks.size}),
            **({"notes": notes} if notes else {}),
        }

    def collective_calls(self) -> tuple[int, int]:
        """Calls of torch.distributed so far, and the bytes that this process handed over in them.

        Both are zero without `process_group`.
        """
        ranks = self.space.ranks
        return (0, 0) if ranks is None else (ranks.calls, ranks.bytes)

    def _products(self, rows: Tensor) -> Tensor:
        return self._oracle.products(rows)

    def _products_into(self, rows: Tensor, out: Tensor) -> Tensor:
        # A tensor made under inference_mode cannot be written to where autograd records.
        if out.is_inference():
            return super()._products_into(rows, out)
        return self._oracle.products(rows, out)

    def _culprit(self) -> str:
        try:
            label = self._oracle.find_non_finite()
        except SpectraError as error:
            return str(error)
        if label is not None:
            return f"the gradient of {label} is already not finite"
        return (
            "loss and gradient are finite, so the second derivative is singular here (sqrt or norm "
            "at 0, a power below 2) or overflows in half precision; use float64 or smooth the loss"
        )


def _several() -> bool:
    """Whether this is one of several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _without_wrapper(model: nn.Module) -> tuple[nn.Module, str | None]:
    """The module inside of DistributedDataParallel, which sums first derivatives only."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.module, type(model).__name__
    return model, None
