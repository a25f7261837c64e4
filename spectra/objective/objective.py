"""What function of the parameters is analysed: the weighted mean of a loss over the data.

    L(θ) = Σ_b w_b ℓ_b(θ) / Σ_b w_b          (reduction "mean")
    L(θ) = Σ_b ℓ_b(θ)                        (reduction "sum")

with w_b the number of terms in the mean of batch b, so that neither the sizes of the batches nor a
further split into microbatches changes L.
"""

from __future__ import annotations

import contextlib
import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from spectra.distributed.collectives import Ranks
from spectra.distributed.sharding import Sharding, is_spread, local, spread_tensors
from spectra.errors import (
    ArgumentError,
    ArgumentTypeError,
    DataError,
    DistributedError,
    LossError,
    NonFiniteError,
    SpectraError,
    StochasticModelError,
)
from spectra.objective.batches import (
    batches_of,
    held_in_memory,
    leading_dimension,
    map_tensors,
    reiterable,
    tensors_of,
    to_device,
)
from spectra.objective.identity import architecture, digest, digest_of
from spectra.objective.keeping import (
    Checksums,
    buffers_kept,
    gradients_on,
    gradients_put_aside,
    hooks_of_engine_off,
    moved,
    parameters_of,
    random_draws_refused,
    random_state_kept,
    requiring_grad,
    seed_generators,
    tensors_and_modes,
    versions,
    without_hooks,
)
from spectra.objective.linearised import linearising
from spectra.objective.losses import number_of_samples
from spectra.objective.memory import memory_ran_out
from spectra.objective.modes import discontinuous_modules, stochastic_modules
from spectra.objective.parameters import (
    NamedTensors,
    ParameterSpace,
    Selection,
    all_parameters,
    select_parameters,
    stand_ins,
)
from spectra.objective.reading import Reader
from spectra.objective.sharded import ShardedSpace

__all__ = ["FunctionObjective", "ModelObjective", "Objective", "Part"]

_EVAL_OR_ALLOW = (
    "Call model.eval() first; or pass allow_training_mode=True to freeze them, one draw for each "
    "batch"
)
_DRAW_ONCE = "Draw them once, outside of the function"
_ELEMENTARY_EXPERTS = (
    "use experts of elementary operations, model.set_experts_implementation('eager')"
)
_READ_ELSEWHERE = (
    "where the loss, or a module, reads parameters of other modules (as weight decay does), take "
    "recompute='none', which gathers all of them at once"
)
# What kernels for training say where they stop short of what an analysis asks of them.
_CURES = (
    # Of parameters in shards.
    ("DTensor", _READ_ELSEWHERE),
    ("Sharding propagation failed", _READ_ELSEWHERE),
    # Of grouped_mm, the default of transformers' mixtures of experts.
    ("Expected mat_a to be", _ELEMENTARY_EXPERTS),
    ("strides should be multiple of 16 bytes", _ELEMENTARY_EXPERTS),
    ("FlexAttention", "use model.set_attn_implementation('sdpa')"),
)


@dataclass(frozen=True)
class Part:
    """A batch, or a microbatch of one, with its weight in the objective."""

    label: str
    batch: Any
    weight: float


class Objective(Protocol):
    """A scalar function of `parameters`, as a weighted sum of the losses of its parts."""

    # What is differentiated by, and the tensors that hold its values: mostly the same ones.
    parameters: list[Tensor]
    stored: list[Tensor]
    space: ParameterSpace
    # The function as a message names it, such as "the loss supervised(MSELoss())".
    function_name: str
    # Samples in a part; None for those of a batch.
    microbatch: int | None
    # How parameters are spread over processes, where they are: each has a part of them.
    sharding: Sharding | None

    @property
    def model(self) -> nn.Module | None:
        """The model, where there is one."""
        ...

    @property
    def separable(self) -> bool:
        """Whether parts can be split further without changing the function."""
        ...

    def parts(self) -> Iterator[Part]:
        """The parts, in order; their losses enter with `part.weight`."""
        ...

    def normaliser(self, total_weight: float) -> float:
        """What the weighted sum over the parts is divided by."""
        ...

    def loss(self, part: Part) -> Tensor:
        """The loss of one part, a differentiable scalar."""
        ...

    def evaluating(self) -> contextlib.AbstractContextManager[None]:
        """Within it losses may be evaluated and differentiated; nothing is left changed."""
        ...

    def displaced(self, displacement: Tensor) -> contextlib.AbstractContextManager[None]:
        """Within it the parameters are those and a flat vector (n,) together."""
        ...

    def in_reverse(self) -> contextlib.AbstractContextManager[None]:
        """Within it the parts come in the opposite order."""
        ...

    def copies(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Of parameters in shards: which part this process has of each, and a digest of it."""
        ...

    def named_parameters(self) -> NamedTensors:
        """The parameters, each with all of its names, first the one it has in `space`."""
        ...

    def undisturbed(self) -> contextlib.AbstractContextManager[None]:
        """Within it `state` takes the numbers in memory to be as at its beginning."""
        ...

    def state(self) -> tuple[Any, ...]:
        """Equal as long as no parameter, buffer or batch was changed since."""
        ...

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to be resumed, as text by name; reads all the data."""
        ...

    def settings(self) -> dict[str, str]:
        """What has to be the same on all ranks whatever their data, by name."""
        ...

    def halves(self) -> tuple[float, float, float] | None:
        """The loss of the first batch, and the mean and the sum of those of its halves."""
        ...

    def release(self) -> None:
        """Give back memory that only saves time."""
        ...

    def describe(self) -> dict[str, Any]:
        """Where the objective comes from, for the provenance of results."""
        ...


class FunctionObjective:
    """A scalar function of tensors, without a model."""

    model: nn.Module | None = None
    microbatch: int | None = None
    sharding: Sharding | None = None
    separable = False

    def __init__(
        self,
        function: Callable[..., Tensor],
        tensors: Tensor | Sequence[Tensor],
        dtype: torch.dtype | None = None,
        names: Sequence[str] | None = None,
        watched: Sequence[Tensor] = (),
    ) -> None:
        if isinstance(tensors, Tensor):
            tensors = [tensors]
        if not callable(function):
            msg = f"expected a function of the tensors, got a {type(function).__name__}"
            raise ArgumentTypeError(msg)
        if not tensors:
            msg = "no tensors to differentiate by; give at least one"
            raise ArgumentError(msg)
        for i, tensor in enumerate(tensors):
            if not isinstance(tensor, Tensor):
                msg = f"tensor {i} is a {type(tensor).__name__}; wrap it in torch.tensor(...)"
                raise ArgumentTypeError(msg)
            if not tensor.is_floating_point():
                msg = f"tensor {i} has dtype {tensor.dtype}; derivatives need a real floating dtype"
                raise ArgumentTypeError(msg)
            if tensor.is_inference():
                msg = f"tensor {i} was made under torch.inference_mode(); pass a clone made outside"
                raise ArgumentError(msg)
        self._function = function
        self._name = getattr(function, "__qualname__", type(function).__name__)
        self.function_name = f"the function {self._name}"
        if not any(tensor.numel() for tensor in tensors):
            msg = "the tensors to differentiate by have no entries: all are of size 0"
            raise ArgumentError(msg)
        # Tensors that the function reads besides its arguments: their changes count as changes.
        self._watched = list(watched)
        self._checksums = Checksums()
        # Fresh leaves on the caller's memory: later in-place changes are seen, and the caller's own
        # tensors, their grad and their graph stay out of it.
        self.parameters = self.stored = [tensor.detach().requires_grad_() for tensor in tensors]
        names = names or [f"tensor{i}" for i in range(len(tensors))]
        self.space = ParameterSpace(dict(zip(names, self.parameters, strict=True)), dtype)

    def parts(self) -> Iterator[Part]:
        """The function as a single part."""
        seed_generators(self.space.device, (0, 0))
        yield Part("the function", None, 1.0)

    def normaliser(self, total_weight: float) -> float:
        """One: there is a single part."""
        return 1.0

    def loss(self, part: Part) -> Tensor:
        """The function's value, checked."""
        with random_draws_refused(
            self.space.device, f"evaluating {self.function_name}", _DRAW_ONCE
        ):
            return _checked_loss(lambda: self._function(*self.parameters), part)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Gradients on, the global random state kept."""
        with gradients_on(), random_state_kept():
            yield

    @contextlib.contextmanager
    def displaced(self, displacement: Tensor) -> Iterator[None]:
        """The function's arguments moved; the caller's memory is not written to."""
        with moved(self.parameters, self.space.views(displacement)):
            yield

    @contextlib.contextmanager
    def in_reverse(self) -> Iterator[None]:
        """Nothing changes: there is a single part."""
        yield

    def named_parameters(self) -> NamedTensors:
        """The tensors, one name each."""
        return [([n], t) for n, t in zip(self.space.names, self.parameters, strict=True)]

    def undisturbed(self) -> contextlib.AbstractContextManager[None]:
        """Within it the tensors are taken to hold the same numbers."""
        return self._checksums.held(self._tensors, "the tensors of the function")

    def _tensors(self) -> list[Tensor]:
        return [*self.parameters, *self._watched]

    def state(self) -> tuple[Any, ...]:
        """Versions and checksums of the tensors."""
        tensors = self._tensors()
        return versions(tensors), self._checksums.of(tensors)

    def identity(self) -> dict[str, Any]:
        """Digests of the function and of the tensors, by name."""
        return {
            "function": f"{self._name} {digest_of(self._function)}",
            "weights": {
                name: digest(tensor)
                for name, tensor in zip(self.space.names, self.parameters, strict=True)
            },
            "other tensors digest": digest(*self._watched),
        }

    def halves(self) -> None:
        """There is one part, which cannot be split."""

    def release(self) -> None:
        """There are no data."""

    def copies(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """None: every process has all of the tensors."""
        return {}

    def settings(self) -> dict[str, str]:
        """Digests of the tensors, and the function's name."""
        return {
            "the function": self._name,
            **{f"the numbers of tensor {i}": digest(t) for i, t in enumerate(self.stored)},
        }

    def describe(self) -> dict[str, Any]:
        """The function's name."""
        return {"objective": "function", "function": self._name}


class ModelObjective:
    """The loss of a model over data, as a function of selected parameters."""

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[nn.Module, Any], Tensor],
        data: Iterable[Any],
        params: Selection = None,
        *,
        reduction: str | None = None,
        weight: Callable[[Any], float] | None = None,
        microbatch: int | None = None,
        hold_data: bool = False,
        allow_training_mode: bool = False,
        dtype: torch.dtype | None = None,
        compute_dtype: torch.dtype | None = None,
        linearised: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            msg = (
                f"expected a torch.nn.Module, got a {type(model).__name__}; for a plain function "
                "of tensors use HessianOperator.from_function(f, tensors)"
            )
            raise ArgumentTypeError(msg)
        if isinstance(loss, type) or not callable(loss):
            what = repr(loss) if isinstance(loss, str | type) else f"a {type(loss).__name__}"
            msg = f"expected a function loss(model, batch) -> scalar, got {what}"
            raise ArgumentTypeError(msg)
        if isinstance(loss, nn.modules.loss._Loss):
            msg = (
                f"{type(loss).__name__} takes predictions and targets, but a loss here takes the "
                f"model and a batch; wrap it: spectra.losses.supervised({type(loss).__name__}())"
            )
            raise ArgumentTypeError(msg)
        if microbatch is not None:
            if not isinstance(microbatch, int):
                msg = f"microbatch={microbatch!r}; expected a whole number of samples"
                raise ArgumentTypeError(msg)
            if microbatch < 1:
                msg = f"microbatch={microbatch}; expected a number of samples of at least 1"
                raise ArgumentError(msg)
        self.model: nn.Module = model
        self._ranks = ranks
        self.reduction = _reduction(reduction, loss)
        self._loss = loss
        self._loss_name = getattr(loss, "__qualname__", repr(loss))
        self.function_name = f"the loss {self._loss_name}"
        self._weight: Callable[[Any], float] = (
            getattr(loss, "weight", number_of_samples) if weight is None else weight
        )
        self.microbatch = microbatch
        self._data = reiterable(data, hold_data=hold_data)
        self._reader = Reader(self._data)
        self._num_batches: int | None = None
        # What a rank computes on in step with others that have more parts.
        self._repeated: Part | None = None
        self._reversed = False
        self._loss_head: str | None = None
        self._allow_training_mode = allow_training_mode
        # A loss that says of itself that it can be split is believed; masks differ between parts.
        self._split_checked = self.separable or allow_training_mode
        # What one rank computes beside the others would find none of them.
        self._split_checked = self._split_checked or bool(spread_tensors(model))
        self._compute_dtype = compute_dtype
        self._linearised = linearised
        spread = spread_tensors(model)
        self.sharding = Sharding(spread, _required(ranks)) if spread else None
        selected = select_parameters(model, params)
        self.parameters = self.stored = list(selected.values())
        if compute_dtype is not None or self.sharding is not None:
            here = {name: local(p) for name, p in selected.items()}
            leaves = (
                {name: part.detach().requires_grad_() for name, part in here.items()}
                if compute_dtype is None
                else stand_ins(here, compute_dtype)
            )
            self.parameters = list(leaves.values())
            dtype = dtype or compute_dtype
        if self.sharding is None:
            self.space = ParameterSpace(selected, dtype)
        else:
            self.space = ShardedSpace(selected, self.sharding, _required(ranks), dtype)
        self._check_mode()

    @functools.cached_property
    def _checksums(self) -> Checksums:
        return Checksums()

    @property
    def separable(self) -> bool:
        """The loss says of itself that it is a mean or sum over samples, and no module mixes them.

        Of an unknown loss that is not taken for granted: one that compares the samples of a batch
        with each other is another function on parts of it.
        """
        return getattr(self._loss, "separable", False) and not self._allow_training_mode

    def parts(self) -> Iterator[Part]:
        """Batches, or the microbatches they are split into, on the model's device.

        Where a forward pass gathers parameters all ranks come to the same number of parts: those
        that have fewer batches repeat one, with weight zero.
        """
        parts = self._own_parts()
        return parts if self.sharding is None else self._in_step(parts, _required(self._ranks))

    def _in_step(self, parts: Iterator[Part], ranks: Ranks) -> Iterator[Part]:
        part = next(parts, None)
        while True:
            here = ranks.meet("the next part", [float(part is not None)])
            if not any(row[0] for row in here):
                return
            if part is not None:
                self._repeated = replace(part, weight=0.0)
            self._borrow(ranks)
            assert self._repeated is not None
            yield part or self._repeated
            part = None if part is None else next(parts, None)

    def _borrow(self, ranks: Ranks) -> None:
        """A batch of another rank, where one has none of its own."""
        if all(row[0] for row in ranks.meet("having a part", [float(self._repeated is not None)])):
            return
        lent = self._repeated
        if lent is not None:
            lent = replace(lent, batch=map_tensors(lent.batch, lambda t: t.cpu()))
        lent = next(part for part in ranks.told(lent) if part is not None)
        if self._repeated is None:
            batch = to_device(lent.batch, lent.label, self.space.device, self._compute_dtype)
            self._repeated = replace(lent, batch=batch)

    def _own_parts(self) -> Iterator[Part]:
        count = 0
        for index, batch in self._numbered_batches():
            count += 1
            label = f"batch {index}"
            copies = self._reader.moved
            moved = to_device(batch, label, self.space.device, self._compute_dtype, copies)
            if self.microbatch is not None and not self._split_checked:
                self._check_split(moved, label)
            for place, piece in enumerate(self._split(moved, label)):
                name = label if self.microbatch is None else f"{label}, microbatch {place}"
                weight = self._weight_of(piece, name)
                # A mean over no terms is nan in PyTorch, and counts for nothing here.
                if weight > 0:
                    # One fixed seed for each part: dropout draws the same mask in every product.
                    seed_generators(self.space.device, (index, place))
                    yield Part(name, piece, weight)
        if count == 0 and self._ranks is None:
            known = self._num_batches
            again = "" if known is None else f" in this pass, {known} before"
            msg = (
                f"the data hold no batch{again}. If they are a generator that was used up, pass "
                "list(data) or a DataLoader, which can be read once per product"
            )
            raise DataError(msg)
        if self._num_batches not in {None, count}:
            msg = (
                f"the data held {self._num_batches} batches in the first pass and {count} in this "
                "one; a Hessian needs the same data in every pass (pass list(data), or "
                "hold_data=True)"
            )
            raise DataError(msg)
        self._num_batches = count

    def normaliser(self, total_weight: float) -> float:
        """The total weight for a mean, one for a sum."""
        if self.reduction == "sum":
            return 1.0
        if total_weight <= 0:
            msg = (
                "every batch has weight 0: no target counts (all of them ignored or padding); "
                "check ignore_index, labels and attention_mask"
            )
            raise DataError(msg)
        return total_weight

    def loss(self, part: Part) -> Tensor:
        """The loss of one part, checked."""
        refused: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if not self._allow_training_mode:
            what = f"evaluating {self.function_name} on {part.label}"
            refused = random_draws_refused(self.space.device, what, _EVAL_OR_ALLOW)
        linear: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if self._linearised:
            linear = linearising(self.model, self.function_name)
        with refused, linear:
            value = _checked_loss(lambda: self._loss(self.model, part.batch), part)
        # Of the losses that make logits in chunks: what they did on the last batch that was large.
        head = getattr(self._loss, "loss_head", None)
        if isinstance(head, str):
            self._loss_head = head
        return value

    def _put_apart(self) -> None:
        """Have the parameters of FSDP in shards, and what stands for them on the same memory."""
        for module in self.model.modules():
            # Of FSDP's modules: what a forward pass of the caller's has put together.
            if any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__):
                module.reshard()  # type: ignore[operator]
        if self._compute_dtype is None:
            for leaf, stored in zip(self.parameters, self.stored, strict=True):
                part = local(stored)
                if leaf.data_ptr() != part.data_ptr():
                    leaf.data = part.detach()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Exactly the selected parameters require a gradient; everything is put back after."""
        self._check_mode()
        if self.sharding is not None:
            self._put_apart()
        parameters = parameters_of(self.model)
        before = _counted(parameters)
        batches = _counted(self._batches_at_hand())
        with (
            gradients_on(),
            random_state_kept(self._data),
            buffers_kept(self.model),
            requiring_grad(self.model, self.stored),
            gradients_put_aside(self.model, self.function_name),
            without_hooks(self.stored, self.model),
            # FSDP and the like would gather the parameters that are gathered here.
            contextlib.nullcontext() if self.sharding is None else hooks_of_engine_off(self.model),
        ):
            # A loader that shuffles, and perhaps drops the rest, gives every pass the same batches.
            seed_generators(self.space.device, ())
            yield
        if _counted(self._batches_at_hand()) != batches:
            msg = (
                f"evaluating {self.function_name} changed a tensor of the data in place, so that "
                "the next pass would read other numbers; let it work on a copy"
            )
            raise LossError(msg)
        for parameter, was, now in zip(parameters, before, _counted(parameters), strict=True):
            if now != was:
                name = next(n for n, p in self.model.named_parameters() if p is parameter)
                msg = (
                    f"evaluating {self.function_name} changed parameter {name!r} in place (as a "
                    "clamp in forward() does, or an embedding with max_norm), so its derivatives "
                    "are not those of a function; change the parameter once, before the analysis"
                )
                raise LossError(msg)

    @contextlib.contextmanager
    def displaced(self, displacement: Tensor) -> Iterator[None]:
        """The selected parameters moved, or what stands in for them; none is written to."""
        with moved(self.parameters, self.space.views(displacement)):
            yield

    @contextlib.contextmanager
    def in_reverse(self) -> Iterator[None]:
        """Within it the batches come in the opposite order; they are all in memory then."""
        self._reversed = True
        try:
            yield
        finally:
            self._reversed = False

    def named_parameters(self) -> NamedTensors:
        """The selected parameters; tied ones have several names."""
        chosen = {id(parameter) for parameter in self.stored}
        return [(names, p) for names, p in all_parameters(self.model) if id(p) in chosen]

    def undisturbed(self) -> contextlib.AbstractContextManager[None]:
        """Within it parameters and buffers are taken to hold the same numbers."""
        whose = f"parameters or buffers of the {type(self.model).__name__}"
        return self._checksums.held(lambda: tensors_and_modes(self.model)[0], whose)

    def state(self) -> tuple[Any, ...]:
        """Versions and checksums of parameters and buffers, modes of modules, a list's batches."""
        tensors, modes = tensors_and_modes(self.model)
        sums = self._checksums.of(tensors)
        return versions(tensors), sums, modes, versions(self._batches_at_hand())

    def identity(self) -> dict[str, Any]:
        """Digests of every parameter and buffer, of every batch, of the loss and the options."""
        with self.evaluating():
            data = {
                part.label: f"{digest_of(part.batch)}, weight {part.weight:g}"
                for part in self._own_parts()
            }
        if (ranks := self.space.ranks) is not None:
            everyone = ranks.told(data)
            data = {
                f"rank {rank}, {label}": text
                for rank, found in enumerate(everyone)
                for label, text in found.items()
            }
        tensors = [*self.model.named_parameters(), *self.model.named_buffers()]
        modes = {name: module.training for name, module in self.model.named_modules()}
        return {
            "model": f"{type(self.model).__name__}, digest {architecture(self.model)}",
            "code of": {
                kind.__qualname__: digest_of(kind.forward)
                for kind in {type(module): None for module in self.model.modules()}
            },
            "weights": {name: digest(self._whole(tensor)) for name, tensor in tensors},
            "analysed parameters": list(self.space.names),
            "training modes digest": digest_of(modes),
            "loss": f"{self._loss_name} {digest_of(self._loss)}",
            "data": data,
            "reduction": self.reduction,
            "microbatch": self.microbatch,
            "compute_dtype": str(self._compute_dtype),
            "linearised": self._linearised,
        }

    def settings(self) -> dict[str, str]:
        """Digests of every parameter and buffer, and the options, without the data."""
        tensors = [*self.model.named_parameters(), *self.model.named_buffers()]
        return {
            "the model": f"{type(self.model).__name__}, digest {architecture(self.model)}",
            "the parameters that are analysed": ", ".join(self.space.names),
            **{
                f"the numbers of {name!r}": digest(tensor)
                for name, tensor in tensors
                # Of which each rank has another part.
                if not is_spread(tensor)
            },
            "the loss": self._loss_name,
            "reduction": self.reduction,
            "compute_dtype": str(self._compute_dtype),
            "linearised": str(self._linearised),
        }

    def release(self) -> None:
        """Give back the copies of data on another device."""
        if self._reader.moved is not None:
            self._reader.moved.release()

    def describe(self) -> dict[str, Any]:
        """The model, loss and data by name and size; under "notes" what is to be known of them."""
        head = {} if self._loss_head is None else {"loss_head": self._loss_head}
        description: dict[str, Any] = {
            "objective": "model",
            "model": type(self.model).__name__,
            "model_parameters": sum(p.numel() for p in self.model.parameters()),
            "loss": self._loss_name,
            **head,
            "reduction": self.reduction,
            "batches": self._num_batches,
            "microbatch": self.microbatch,
            "training_mode": self._allow_training_mode,
            **({"data_read": "ahead, in a thread"} if self._reader.ahead else {}),
        }
        if routers := discontinuous_modules(self.model):
            description["notes"] = [_routing_note(routers)]
        return description

    def copies(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Of parameters in shards: which part this process has of each, and a digest of it."""
        if self.sharding is None:
            return {}
        return {
            name: (self.sharding.same_part(self.sharding.layout(p)), digest(local(p)))
            for name, p in self.model.named_parameters()
            if is_spread(p)
        }

    def _whole(self, tensor: Tensor) -> Tensor:
        if self.sharding is None or not is_spread(tensor):
            return tensor
        (whole,) = self.sharding.gather([local(tensor).detach()], [self.sharding.layout(tensor)])
        return whole

    def _batches_at_hand(self) -> list[Tensor]:
        """The tensors of a list of batches, which can be changed in place.

        Other iterables would have to be read.
        """
        return tensors_of(self._data) if isinstance(self._data, list | tuple) else []

    def _check_mode(self) -> None:
        problems = stochastic_modules(self.model)
        if not problems:
            return
        name, problem, _ = problems[0]
        if not self._allow_training_mode:
            more = f" (and {len(problems) - 1} more such modules)" if len(problems) > 1 else ""
            training = self.model.get_submodule(name).training
            cure = "Call model.eval() first" if training else "Give it track_running_stats=True"
            msg = (
                f"module {name!r} {problem}{more}. {cure}; or pass "
                "allow_training_mode=True for the Hessian with frozen dropout masks and with the "
                "statistics of each batch, which then depends on how the data are batched"
            )
            raise StochasticModelError(msg)
        batch_norm = next((n for n, _, statistics in problems if statistics), None)
        if self.microbatch is not None and batch_norm is not None:
            msg = (
                f"module {batch_norm!r} computes statistics over the batch, so microbatches would "
                "change the objective; use model.eval() or leave microbatch out"
            )
            raise ArgumentError(msg)

    def _numbered_batches(self) -> Iterable[tuple[int, Any]]:
        """Each with the number that it has in the data, whatever their order."""
        if not self._reversed:
            return enumerate(self._reader.batches())
        return reversed(list(enumerate(held_in_memory(self._data))))

    def _weight_of(self, batch: Any, label: str) -> float:
        if self.reduction == "sum":
            return 1.0
        try:
            weight = float(self._weight(batch))
        except SpectraError:
            raise
        except Exception as error:
            msg = f"counting the terms of {label} raised {type(error).__name__}: {error}"
            raise DataError(msg) from error
        if not (math.isfinite(weight) and weight >= 0):
            msg = f"the weight of {label} is {weight}; expected a finite number of terms >= 0"
            raise DataError(msg)
        return weight

    def _check_split(self, batch: Any, label: str) -> None:
        """Refuse microbatches of a loss that is another function on parts of a batch."""
        pieces = list(self._split(batch, label))
        if len(pieces) < 2:
            return
        weights = [self._weight_of(piece, label) for piece in pieces]
        counted = [(w, piece) for w, piece in zip(weights, pieces, strict=True) if w > 0]
        try:
            with torch.no_grad():
                whole = float(self._loss(self.model, batch))
                parts = [float(self._loss(self.model, piece)) for _, piece in counted]
        except DistributedError:
            raise
        except Exception:
            # The memory may not be there for a whole batch; what else is wrong is told in its turn.
            self._split_checked = True
            return
        self._split_checked = True
        total = math.fsum(w * part for (w, _), part in zip(counted, parts, strict=True))
        split = total if self.reduction == "sum" else total / math.fsum(w for w, _ in counted)
        largest = max([abs(whole), *map(abs, parts)])
        eps = max((torch.finfo(p.dtype).eps for p in self.stored), default=0.0)
        if abs(whole - split) > math.sqrt(eps) * largest:
            msg = (
                f"{self.function_name} of {label} is {whole:.6g}, and {split:.6g} when it is put "
                f"together from microbatches of {self.microbatch}: it is no weighted mean over "
                "samples. Leave microbatch out; or if it is a sum, pass reduction='sum'; or tell "
                "how many terms a batch has with weight="
            )
            raise LossError(msg)

    def halves(self) -> tuple[float, float, float] | None:
        """The loss of the first batch, and the mean and the sum of those of its halves.

        None where it has no halves that the loss takes. Three forward passes at most.
        """
        index, batch = next(iter(enumerate(batches_of(self._data))), (0, None))
        label = f"batch {index}"
        try:
            moved = to_device(batch, label, self.space.device, self._compute_dtype)
            middle = leading_dimension(moved, label) // 2
            pieces = [
                map_tensors(moved, operator.itemgetter(places))
                for places in (slice(0, middle), slice(middle, None))
            ]
            # Those of a sum are all one; a mean would be over samples.
            weight_of = leading_dimension if self.reduction == "sum" else self._weight_of
            weights = [float(weight_of(piece, label)) for piece in pieces]
            if middle == 0 or min(weights) <= 0:
                return None
            with torch.no_grad():
                whole, *parts = (float(self._loss(self.model, b)) for b in (moved, *pieces))
        except Exception:
            # Whatever is wrong with whole batches is told elsewhere; halves need not be right.
            return None
        total = math.fsum(w * part for w, part in zip(weights, parts, strict=True))
        return whole, total / math.fsum(weights), math.fsum(parts)

    def _split(self, batch: Any, label: str) -> Iterator[Any]:
        size = self.microbatch
        if size is None:
            yield batch
            return
        samples = leading_dimension(batch, label)
        for start in range(0, samples, size):
            places = slice(start, start + size)
            yield map_tensors(batch, operator.itemgetter(places))


def _checked_loss(evaluate: Callable[[], Any], part: Part) -> Tensor:
    try:
        value = evaluate()
    except SpectraError:
        raise
    except Exception as error:
        if memory_ran_out(error):
            raise
        msg = f"the loss raised {type(error).__name__} on {part.label}: {error}"
        raise LossError(msg + _cure(str(error))) from error
    if value is None:
        msg = f"the loss of {part.label} is None; return it"
        raise LossError(msg)
    if not isinstance(value, Tensor):
        msg = (
            f"the loss of {part.label} is a {type(value).__name__}, not a tensor; leave out "
            ".item() or float(), which cut it off from the parameters"
        )
        raise LossError(msg)
    if value.numel() != 1:
        msg = (
            f"the loss of {part.label} has shape {tuple(value.shape)}, expected a scalar; reduce "
            "it with .mean() or .sum()"
        )
        raise LossError(msg)
    if not value.is_floating_point():
        msg = f"the loss of {part.label} has dtype {value.dtype}, expected a real floating dtype"
        raise LossError(msg)
    if value.device.type == "meta":
        msg = f"the loss of {part.label} is on the meta device, without a number"
        raise LossError(msg)
    if value.layout != torch.strided:
        msg = f"the loss of {part.label} is stored as {value.layout}, expected a dense scalar"
        raise LossError(msg)
    if not bool(torch.isfinite(value)):
        msg = (
            f"the loss of {part.label} is {float(value.detach())}. Look for nan in the weights or "
            "the batch, log(0), or an overflow in half precision"
        )
        raise NonFiniteError(msg)
    return value.reshape(())


def _required(ranks: Ranks | None) -> Ranks:
    if ranks is None:
        msg = (
            "the model's parameters are spread over processes (DTensor): pass process_group=True, "
            "and make the same calls on every rank"
        )
        raise ArgumentError(msg)
    return ranks


def _counted(tensors: Iterable[Tensor]) -> list[int]:
    """How often each tensor was changed, as autograd counts."""
    return [version for version, _ in versions(tensors)]


def _cure(message: str) -> str:
    """What helps against an error of a forward pass, where that is known and not obvious."""
    cures = (cure for sign, cure in _CURES if sign in message)
    return f". Fix: {cure}" if (cure := next(cures, None)) else ""


def _routing_note(routers: list[tuple[str, str]]) -> str:
    name, what = routers[0]
    more = f" (and {len(routers) - 1} more such modules)" if len(routers) > 1 else ""
    return (
        f"module {name!r} {what}{more}: the loss jumps where a choice changes, and the Hessian is "
        "that of the smooth piece with the present choices"
    )


def _reduction(asked: str | None, loss: Any) -> str:
    own: str | None = getattr(loss, "reduction", None)
    if asked not in {None, "mean", "sum"}:
        msg = f"reduction={asked!r}; expected 'mean' or 'sum'"
        raise ArgumentError(msg)
    if asked is not None and own in {"mean", "sum"} and asked != own:
        msg = (
            f"reduction={asked!r}, but the loss reduces each batch by {own!r}; give the criterion "
            f"reduction={asked!r}, or leave reduction out"
        )
        raise ArgumentError(msg)
    return asked or own or "mean"
