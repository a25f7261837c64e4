"""Inputs that are wrong or unusual, and what has to come of each: a clear error, or a right answer.

`python -m tests.cases.bad_inputs` writes what happens into the table of docs/reliability.md.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import signal
import tempfile
import threading
import time
import warnings
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, TensorDataset

import spectra
from spectra import HessianOperator, errors
from spectra.objective.losses import causal_lm, regularised, supervised, weight_decay
from spectra.objective.parameters import ParameterSpace
from spectra.records import RecordFile
from tests.cases.networks import dense_hessian

__all__ = ["CASES", "PAGE", "Asked", "Case", "happened", "table"]

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"


class Asked(NamedTuple):
    """A question, what may not be changed by asking it, and the right answer if there is one."""

    ask: Callable[[], Any]
    watched: tuple[Any, ...] = ()
    truth: Any = None


@dataclass(frozen=True)
class Case:
    """An input.

    Attributes
    ----------
    group, name
        Of the table.
    build
        Makes the input, afresh.
    kind, words
        Of the error, and what its message says; None where the answer has to be right.
    slow
        Takes seconds.
    needs
        A package that the tests can do without.
    """

    group: str
    name: str
    build: Callable[[], Asked]
    kind: type[Exception] | None = None
    words: str = ""
    slow: bool = False
    needs: str | None = None

    def __str__(self) -> str:
        return f"{self.group}: {self.name}"


CASES: list[Case] = []


def refused(
    group: str, name: str, kind: type[Exception], words: str, **options: Any
) -> Callable[[Callable[[], Asked]], None]:
    """The function below builds an input that has to be refused."""
    return lambda build: CASES.append(Case(group, name, build, kind, words, **options))


def answered(group: str, name: str, **options: Any) -> Callable[[Callable[[], Asked]], None]:
    """The function below builds an input that has a right answer."""
    return lambda build: CASES.append(Case(group, name, build, **options))


# --- what most cases vary ------------------------------------------------------------------------

LOSS = supervised(nn.MSELoss())
X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randn(6, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
BATCHES = [(X[:2], Y[:2]), (X[2:], Y[2:])]


def seeded(make: Callable[[], Any]) -> Any:
    """What is made, with the same initial weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def network(middle: nn.Module | None = None, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Two linear layers, with something between them."""
    model: nn.Sequential = seeded(
        lambda: nn.Sequential(nn.Linear(4, 3), middle or nn.Tanh(), nn.Linear(3, 1))
    )
    return model.to(dtype).eval()


@functools.cache
def truth() -> Tensor:
    """The Hessian of the network, dense, by transforms that share no code with spectra."""
    return dense_hessian(network(), lambda call: functional.mse_loss(call(X), Y))


def dense_of(model: nn.Module, inputs: Tensor = X, targets: Tensor = Y) -> Tensor:
    """The same of another model."""
    return dense_hessian(model, lambda call: functional.mse_loss(call(inputs), targets))


def product(
    model: Any, loss: Any = LOSS, data: Any = None, *args: Any, times: int = 1, **options: Any
) -> Asked:
    """Products with an operator that is made in the question."""

    def ask() -> Any:
        hessian = HessianOperator(model, loss, BATCHES if data is None else data, *args, **options)
        for _ in range(times):
            answer = hessian @ probe(hessian)
        return answer

    return Asked(ask, (model, torch.default_generator))


def dense(
    model: nn.Module,
    loss: Any = LOSS,
    data: Any = None,
    *args: Any,
    expected: Any = None,
    watched: tuple[Any, ...] = (),
    **options: Any,
) -> Asked:
    """The whole matrix, twice, from an operator that is made in the question."""

    def ask() -> Any:
        hessian = HessianOperator(model, loss, BATCHES if data is None else data, *args, **options)
        first = hessian.to_dense()
        assert torch.equal(hessian.to_dense(), first)
        return first

    return Asked(ask, (model, *watched), truth if expected is None else expected)


def probe(hessian: HessianOperator) -> Tensor:
    """A vector without zeros."""
    return torch.linspace(-1, 1.3, hessian.shape[0], dtype=torch.float64).to(hessian.space.dtype)


def operator() -> HessianOperator:
    """An operator that is in order."""
    return HessianOperator(network(), LOSS, BATCHES)


# --- data ----------------------------------------------------------------------------------------

DATA = "Data"


@refused(DATA, "no batch", errors.DataError, "the data hold no batch")
def _() -> Asked:
    return product(network(), LOSS, [])


@refused(DATA, "a generator", errors.DataError, "can be read only once.*DataLoader")
def _() -> Asked:
    return product(network(), LOSS, (batch for batch in BATCHES))


@refused(DATA, "a generator that was used up, held", errors.DataError, "hold no batch.*used up")
def _() -> Asked:
    return product(network(), LOSS, iter([]), hold_data=True)


class Once:
    """Gives the same iterator every time."""

    def __init__(self) -> None:
        self.batches = iter(BATCHES)

    def __iter__(self) -> Iterator[Any]:
        return self.batches


@refused(
    DATA, "a loader whose generator is used up after one pass", errors.DataError, "no batch in this"
)
def _() -> Asked:
    return product(network(), LOSS, Once(), times=2, graph="fresh")


@answered(DATA, "a generator, with hold_data=True")
def _() -> Asked:
    model = network()

    def ask() -> Tensor:
        batches = (batch for batch in BATCHES)
        return HessianOperator(model, LOSS, batches, hold_data=True).to_dense()

    return Asked(ask, (model,), truth)


class Changing:
    """As many batches as one likes, fewer or more in every pass."""

    def __init__(self, *lengths: int) -> None:
        self.lengths = itertools.cycle(lengths)

    def __iter__(self) -> Iterator[Any]:
        return iter(BATCHES * next(self.lengths))


@refused(
    DATA, "fewer batches in the second pass", errors.DataError, "4 batches in the first.* 2 in"
)
def _() -> Asked:
    return product(network(), LOSS, Changing(2, 1), times=2, graph="fresh")


@refused(DATA, "more batches in the second pass", errors.DataError, "2 batches in the first.* 4 in")
def _() -> Asked:
    return product(network(), LOSS, Changing(1, 2), times=2, graph="fresh")


@answered(DATA, "a loader that shuffles")
def _() -> Asked:
    loader = DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True)
    return dense(network(), LOSS, loader, graph="fresh")


@answered(DATA, "a loader that shuffles by a generator of its own and drops the rest")
def _() -> Asked:
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(
        TensorDataset(X, Y), batch_size=4, shuffle=True, drop_last=True, generator=generator
    )
    model, seen = network(), []

    def noting(model: nn.Module, batch: Any) -> Tensor:
        seen.append(batch)
        return LOSS(model, batch)

    def ask() -> Tensor:
        hessian = HessianOperator(model, noting, loader, graph="fresh")
        found = hessian.to_dense()
        expected = dense_of(model, *seen[0])
        # Another pass: the same batch, the same matrix.
        torch.testing.assert_close(hessian.to_dense(), expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        return found

    return Asked(ask, (model, generator))


class OwnRandomness:
    """Drops other samples in every pass."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)

    def __iter__(self) -> Iterator[Any]:
        kept = torch.tensor(self.generator.permutation(6)[:4])
        yield X[kept], Y[kept]


@refused(
    DATA,
    "a loader that draws other samples in every pass, by a NumPy generator of its own",
    errors.DataError,
    "in an earlier pass and .* in this one, at the same parameters.*hold_data",
)
def _() -> Asked:
    return product(network(), LOSS, OwnRandomness(), times=2, graph="fresh")


@answered(DATA, "the same loader, with hold_data=True")
def _() -> Asked:
    model, kept = network(), torch.tensor(np.random.default_rng(0).permutation(6)[:4])

    def ask() -> Tensor:
        return HessianOperator(model, LOSS, OwnRandomness(), hold_data=True).to_dense()

    return Asked(ask, (model,), lambda: dense_of(network(), X[kept], Y[kept]))


class Failing:
    """Raises in the middle."""

    def __iter__(self) -> Iterator[Any]:
        yield X, Y
        raise OSError("the disk is gone")


@refused(DATA, "a loader that raises", errors.DataError, "reading batch 1 of the data raised OSE")
def _() -> Asked:
    return product(network(), LOSS, Failing())


@refused(DATA, "samples that do not stack", errors.DataError, "reading batch 0 of the data raised")
def _() -> Asked:
    return product(network(), LOSS, DataLoader([(X[0], Y[0]), (X[0, :2], Y[0])], batch_size=2))


@refused(
    DATA, "a batch in place of a list of one", errors.DataError, r"data=\[\(inputs, targets\)\]"
)
def _() -> Asked:
    return product(network(), LOSS, (X, Y))


@refused(DATA, "a tensor", errors.ArgumentTypeError, r"data is a Tensor.*\[batch\]")
def _() -> Asked:
    return product(network(), LOSS, X)


@refused(DATA, "a dict", errors.ArgumentTypeError, r"data is a dict.*\[batch\]")
def _() -> Asked:
    return product(network(), LOSS, {"x": X})


@refused(DATA, "a dataset without a loader", errors.ArgumentTypeError, "for a dataset a DataLoader")
def _() -> Asked:
    return product(network(), LOSS, TensorDataset(X, Y))


@refused(DATA, "nan in one batch of three", errors.NonFiniteError, "the loss of batch 1 is nan")
def _() -> Asked:
    spoilt = X.clone()
    spoilt[3, 2] = float("nan")
    return product(network(), LOSS, [BATCHES[0], (spoilt, Y), BATCHES[1]])


@refused(DATA, "inf in one microbatch", errors.NonFiniteError, "batch 1, microbatch 1 is inf")
def _() -> Asked:
    spoilt = Y.clone()
    spoilt[3] = float("inf")
    return product(network(), LOSS, [BATCHES[0], (X, spoilt)], microbatch=2)


@answered(DATA, "an empty batch among others")
def _() -> Asked:
    return dense(network(), LOSS, [BATCHES[0], (X[:0], Y[:0]), BATCHES[1]])


@answered(DATA, "an empty batch among others, for a sum")
def _() -> Asked:
    loss = supervised(nn.MSELoss(reduction="sum"))
    data = [BATCHES[0], (X[:0], Y[:0]), BATCHES[1]]
    return dense(network(), loss, data, expected=lambda: 6 * truth())


@refused(DATA, "empty batches only", errors.DataError, "every batch has weight 0")
def _() -> Asked:
    return product(network(), LOSS, [(X[:0], Y[:0])] * 2)


@answered(DATA, "batches of unequal sizes")
def _() -> Asked:
    return dense(network(), LOSS, [(X[i:j], Y[i:j]) for i, j in ((0, 1), (1, 5), (5, 6))])


@refused(DATA, "batches of which only some tensors can be split", errors.DataError, "microbatches")
def _() -> Asked:
    return product(network(), LOSS, [(X, Y[:5])], microbatch=2)


@refused(DATA, "another dtype than the model's", errors.LossError, "raised RuntimeError on batch 0")
def _() -> Asked:
    return product(network(), LOSS, [(X.float(), Y.float())])


@refused(
    DATA, "a tensor on another device (meta)", errors.DataError, "meta device, without numbers"
)
def _() -> Asked:
    return product(network(), LOSS, [(X.to("meta"), Y)])


@refused(DATA, "a batch that was computed by the model", errors.DataError, "Tanh.*no_grad.*detach")
def _() -> Asked:
    model = network()
    return product(model, on_the_last_layer, [(torch.tanh(model[0](X)), Y)])


def on_the_last_layer(model: Any, batch: Any) -> Tensor:
    """The loss of features."""
    return functional.mse_loss(model[2](batch[0]), batch[1])


@answered(DATA, "a batch made under inference_mode")
def _() -> Asked:
    with torch.inference_mode():
        batch = (X + 0, Y + 0)
    return dense(network(), LOSS, [batch])


@answered(DATA, "batches of nested dicts, lists and tuples")
def _() -> Asked:
    def nested(model: nn.Module, batch: Any) -> Tensor:
        return functional.mse_loss(model(batch["in"][0]["x"]), batch["out"][1][0])

    data = [{"in": [{"x": x}], "out": ("y", [y])} for x, y in BATCHES]
    return dense(network(), nested, data, microbatch=None)


Named = namedtuple("Named", "x y")


@dataclass(frozen=True)
class Sample:
    """A batch with names."""

    x: Tensor
    y: Tensor
    note: str = "wine"


def by_attribute(model: nn.Module, batch: Any) -> Tensor:
    """The loss of a batch with names."""
    return functional.mse_loss(model(batch.x), batch.y)


@answered(DATA, "batches of dataclasses, in microbatches")
def _() -> Asked:
    return dense(network(), by_attribute, [Sample(x, y) for x, y in BATCHES], microbatch=3)


@answered(DATA, "batches of named tuples, in microbatches")
def _() -> Asked:
    return dense(network(), by_attribute, [Named(x, y) for x, y in BATCHES], microbatch=3)


@answered(DATA, "BatchEncoding, read by attribute", needs="transformers")
def _() -> Asked:
    from transformers import BatchEncoding

    data = [BatchEncoding({"x": x, "y": y}) for x, y in BATCHES]
    return dense(network(), by_attribute, data, microbatch=3)


@refused(
    DATA, "batches without a tensor", errors.DataError, "how many samples a str holds.*weight="
)
def _() -> Asked:
    return product(network(), lambda model, batch: model(X).mean(), ["one", "two"])


@refused(DATA, "a weight that is negative", errors.DataError, "the weight of batch 0 is -1.0")
def _() -> Asked:
    return product(network(), LOSS, weight=lambda batch: -1)


@refused(DATA, "a weight that raises", errors.DataError, "counting the terms of batch 0 raised Key")
def _() -> Asked:
    return product(network(), LOSS, weight=lambda batch: {}["missing"])


@refused(DATA, "no target that counts", errors.DataError, "every batch has weight 0.*ignore_index")
def _() -> Asked:
    labels = torch.full((6,), -100)
    return product(network(), supervised(nn.CrossEntropyLoss()), [(X, labels)])


@refused(DATA, "text without input_ids", errors.DataError, "takes batches with 'input_ids'")
def _() -> Asked:
    return product(network(), causal_lm(), [{"ids": torch.ones(2, 3, dtype=torch.long)}])


# --- loss ----------------------------------------------------------------------------------------

OF_LOSS = "Loss"


def changed(change: Callable[[Tensor], Any]) -> Callable[[nn.Module, Any], Any]:
    """The loss, with something done to its value."""

    def loss(model: nn.Module, batch: Any) -> Any:
        return change(LOSS(model, batch))

    loss.__qualname__ = "loss"
    return loss


for name, change, kind, words in (
    (
        "one value for each sample",
        lambda v: v.expand(3),
        errors.LossError,
        "shape.*expected a scalar",
    ),
    ("a Python float", lambda v: v.item(), errors.LossError, "is a float, not a tensor.*item"),
    ("nothing (no return)", lambda v: None, errors.LossError, "is None; return it"),
    ("an integer", lambda v: v.long(), errors.LossError, "dtype torch.int64"),
    ("a complex number", lambda v: v * 1j, errors.LossError, "dtype torch.complex128"),
    ("a sparse tensor", lambda v: v.reshape(1).to_sparse(), errors.LossError, "expected a dense"),
    ("a tensor on the meta device", lambda v: v.to("meta"), errors.LossError, "on the meta device"),
    ("nan", lambda v: v * float("nan"), errors.NonFiniteError, "the loss of batch 0 is nan"),
    ("inf", lambda v: v / 0, errors.NonFiniteError, "the loss of batch 0 is inf"),
    (
        "detached",
        lambda v: v.detach(),
        errors.LossError,
        "does not depend on the selected parameter",
    ),
    ("by way of NumPy", lambda v: torch.tensor(v.detach().numpy()), errors.LossError, "NumPy"),
):
    refused(OF_LOSS, name, kind, words)(
        functools.partial(lambda change: product(network(), changed(change)), change)
    )


@answered(OF_LOSS, "a tensor of one entry")
def _() -> Asked:
    return dense(network(), changed(lambda value: value.reshape(1, 1)))


@refused(OF_LOSS, "independent of the selection", errors.LossError, "does not depend.*params=")
def _() -> Asked:
    return product(network(), on_the_last_layer, [(X[:, :3], Y)], "0.*")


def raising(model: nn.Module, batch: Any) -> Tensor:
    """No loss at all."""
    raise KeyError("label")


@refused(OF_LOSS, "raises", errors.LossError, "the loss raised KeyError on batch 0")
def _() -> Asked:
    return product(network(), raising)


def noisy(model: nn.Module, batch: Any) -> Tensor:
    """The loss, with noise on the inputs."""
    return LOSS(model, (batch[0] + torch.randn_like(batch[0]), batch[1]))


@refused(OF_LOSS, "draws random numbers", errors.StochasticModelError, "drew random numbers")
def _() -> Asked:
    return product(network(), noisy)


def overwriting(model: nn.Module, batch: Any) -> Tensor:
    """The loss, on inputs that it scales in place."""
    batch[0].mul_(0.9)
    return LOSS(model, batch)


@refused(
    OF_LOSS, "changes the batch in place", errors.LossError, "changed a tensor of the data in pl"
)
def _() -> Asked:
    return product(network(), overwriting, [(X.clone(), Y)])


class Warming:
    """A loss that is another one at every call."""

    def __init__(self) -> None:
        self.calls = 0

    def __repr__(self) -> str:
        return "Warming()"

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        self.calls += 1
        return LOSS(model, batch) * (1 + 0.1 * self.calls)


@refused(OF_LOSS, "counts its calls", errors.DataError, "at the same parameters.*release")
def _() -> Asked:
    return product(network(), Warming(), times=2, graph="fresh")


@refused(OF_LOSS, "a criterion", errors.ArgumentTypeError, r"wrap it.*supervised\(MSELoss\(\)\)")
def _() -> Asked:
    return product(network(), nn.MSELoss())


@refused(OF_LOSS, "a class", errors.ArgumentTypeError, "expected a function loss.*MSELoss")
def _() -> Asked:
    return product(network(), nn.MSELoss)


@refused(OF_LOSS, "the data, in the wrong place", errors.ArgumentTypeError, "got a list")
def _() -> Asked:
    return product(network(), BATCHES)


@refused(OF_LOSS, "a criterion without a mean or sum", errors.ArgumentError, "reduction='none'")
def _() -> Asked:
    return Asked(lambda: supervised(nn.MSELoss(reduction="none")))


def root(model: nn.Module, batch: Any) -> Tensor:
    """Not smooth at zero."""
    return (model(batch[0]) * 0).abs().sum().sqrt() + LOSS(model, batch)


@refused(
    OF_LOSS, "an infinite derivative (sqrt at 0)", errors.NonFiniteError, "gradient of batch 0"
)
def _() -> Asked:
    return product(network(), root)


def power(x: Tensor) -> Tensor:
    """Has a gradient at zero, and no second derivative."""
    return (x.abs() ** 1.5).sum()


@refused(
    OF_LOSS, "an infinite second derivative", errors.NonFiniteError, "second derivative is sing"
)
def _() -> Asked:
    hessian = HessianOperator.from_function(power, torch.zeros(3))
    return Asked(lambda: hessian @ torch.ones(3))


@answered(OF_LOSS, "linear in the parameters: a Hessian of zeros")
def _() -> Asked:
    loss = lambda model, batch: sum(p.sum() for p in model.parameters())  # noqa: E731
    return dense(network(), loss, expected=lambda: torch.zeros(19, 19, dtype=torch.float64))


# --- parameters ----------------------------------------------------------------------------------

PARAMETERS = "Parameters"


@refused(
    PARAMETERS, "a glob without a match", errors.ParameterSelectionError, "Near matches: '0.wei"
)
def _() -> Asked:
    return product(network(), LOSS, None, "0.wieght")


@refused(
    PARAMETERS, "the name of a module", errors.ParameterSelectionError, r"matches '0'.*'0\.\*'"
)
def _() -> Asked:
    return product(network(), LOSS, None, "0")


@refused(PARAMETERS, "an empty list", errors.ParameterSelectionError, "empty list")
def _() -> Asked:
    return product(network(), LOSS, None, [])


@refused(
    PARAMETERS, "a tensor in place of names", errors.ArgumentTypeError, "params is a Parameter"
)
def _() -> Asked:
    model = network()
    return product(model, LOSS, None, model[0].weight)


@refused(PARAMETERS, "a model without any", errors.ParameterSelectionError, "no parameters at all")
def _() -> Asked:
    return product(nn.Tanh())


@refused(
    PARAMETERS, "all frozen", errors.ParameterSelectionError, r"requires a gradient.*params='\*'"
)
def _() -> Asked:
    return product(network().requires_grad_(False))


@answered(PARAMETERS, "frozen, but selected")
def _() -> Asked:
    return dense(network().requires_grad_(False), LOSS, None, "*")


def with_another(parameter: Any) -> nn.Sequential:
    """The network, and a parameter that it does not use."""
    model = network()
    model.register_parameter("extra", nn.Parameter(parameter, requires_grad=False))
    return model


def quantised_tensor() -> Tensor:
    """Integers that stand for numbers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


for name, make, words in (
    ("integers", lambda: torch.arange(3), "has dtype torch.int64, which has no deriv"),
    ("quantised", quantised_tensor, "has dtype torch.qint8, which has no deriv"),
    ("complex", lambda: torch.ones(3) * 1j, r"is complex \(torch.complex64\)"),
    ("sparse", lambda: torch.eye(3).to_sparse(), "is stored as torch.sparse_coo"),
    ("on the meta device", lambda: torch.ones(3, device="meta"), "is on the meta device, without"),
):
    refused(PARAMETERS, f"{name}, selected", errors.ParameterSelectionError, f"'extra' {words}")(
        functools.partial(lambda make: product(with_another(make()), LOSS, None, "*"), make)
    )
    answered(PARAMETERS, f"{name}, beside the selected ones")(
        functools.partial(lambda make: dense(with_another(make())), make)
    )


@refused(PARAMETERS, "of layers on several devices (meta)", errors.ParameterSelectionError, "meta")
def _() -> Asked:
    model = network()
    model[2].to("meta")
    return product(model)


@refused(PARAMETERS, "of size 0, all of them", errors.ParameterSelectionError, "have no entries")
def _() -> Asked:
    model = with_another(torch.empty(0, 3))
    return product(model, LOSS, None, "extra")


@answered(PARAMETERS, "of size 0, among others")
def _() -> Asked:
    return dense(with_another(torch.empty(0, 3, dtype=torch.float64)), LOSS, None, "*")


@refused(
    PARAMETERS, "lazy, before the first call", errors.ParameterSelectionError, "not initialised"
)
def _() -> Asked:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lazy = nn.LazyLinear(1)
    return Asked(lambda: HessianOperator(lazy, LOSS, BATCHES))


@refused(PARAMETERS, "made under inference_mode", errors.ParameterSelectionError, "inference_mode")
def _() -> Asked:
    with torch.inference_mode():
        model = network()
    return Asked(lambda: HessianOperator(model, LOSS, BATCHES) @ np.ones(19))


@refused(
    PARAMETERS, "with nan", errors.NonFiniteError, "batch 0 is nan. Look for nan in the weights"
)
def _() -> Asked:
    model = network()
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    return product(model)


@answered(PARAMETERS, "not contiguous")
def _() -> Asked:
    model = network()
    model[0].weight = nn.Parameter(model[0].weight.detach().T.contiguous().T)
    assert not model[0].weight.is_contiguous()
    return dense(model)


@answered(PARAMETERS, "expanded: one number in memory for many")
def _() -> Asked:
    model = network()
    model[0].weight = nn.Parameter(torch.full((1, 1), 0.3, dtype=torch.float64).expand(3, 4))
    copy = network()
    with torch.no_grad():
        copy[0].weight.fill_(0.3)
    return dense(model, expected=lambda: dense_of(copy))


class Shared(nn.Module):
    """One matrix, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))).sum(1, keepdim=True)


@answered(PARAMETERS, "shared")
def _() -> Asked:
    model = seeded(Shared).double()
    return dense(model, LOSS, None, "second.*", expected=lambda: dense_of(model))


@answered(PARAMETERS, "of mixed dtypes")
def _() -> Asked:
    model, copy = network(), network()
    model[2].float()
    # What was rounded stays so.
    copy[2].float().double()
    asked = dense(model, in_double)
    # Gradients by what is stored in single precision are rounded to it.
    return Asked(lambda: asked.ask().float(), (model,), lambda: dense_of(copy).float())


def in_double(model: Any, batch: Any) -> Tensor:
    """The loss in double precision, whatever the last layer is stored in."""
    x, y = batch
    last = model[2]
    outputs = functional.linear(model[1](model[0](x)), last.weight.double(), last.bias.double())
    return functional.mse_loss(outputs, y)


@answered(PARAMETERS, "with sparse gradients")
def _() -> Asked:
    tokens = torch.tensor([[0, 2], [2, 1]])

    def make(sparse: bool) -> nn.Module:
        layers = nn.Embedding(4, 3, sparse=sparse), nn.Flatten(), nn.Tanh(), nn.Linear(6, 1)
        return seeded(lambda: nn.Sequential(*layers)).double()

    model = make(sparse=True)
    copy = make(sparse=False)
    copy.load_state_dict(model.state_dict())
    return dense(model, LOSS, [(tokens, Y[:2])], expected=lambda: dense_of(copy, tokens, Y[:2]))


class Many(nn.Module):
    """A model of single numbers."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.numbers = nn.ParameterList(
            nn.Parameter(torch.tensor(1.0 + i % 7, dtype=torch.float64)) for i in range(count)
        )


def cubes(model: Any, batch: Any) -> Tensor:
    """Has the Hessian diag(6 x)."""
    return (torch.stack(list(model.numbers)) ** 3).sum()


@answered(PARAMETERS, "a hundred thousand of one entry each", slow=True)
def _() -> Asked:
    model = Many(100_000)
    hessian = HessianOperator(model, cubes, [None])
    numbers = torch.stack([p.detach() for p in model.numbers])
    return Asked(lambda: hessian @ probe(hessian), (), lambda: 6 * numbers * probe(hessian))


@answered(PARAMETERS, "one number alone: all questions")
def _() -> Asked:
    def ask() -> Tensor:
        point = torch.tensor(2.0, dtype=torch.float64)
        hessian = HessianOperator.from_function(lambda x: x**4, point)
        spectra.check(hessian)
        analysis = spectra.analyze(hessian, k=1)
        density = spectra.spectral_density(hessian)
        found = [
            spectra.eigsh(hessian, k=1).values[0],
            analysis.eigenpairs.values[0],
            spectra.trace(hessian).value,
            spectra.norm(hessian).value,
            spectra.diagonal(hessian).values[0],
            np.max(density.nodes),
            float(spectra.solve(hessian, np.ones(1)).x[0]) ** -1,
        ]
        return torch.tensor([float(value) for value in found], dtype=torch.float64)

    return Asked(ask, (), lambda: torch.full((7,), 48.0, dtype=torch.float64))


def large() -> HessianOperator:
    """More than 2³¹ parameters, which are one number in memory."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.full((), 0.5).expand(2**31 + 7))
    return HessianOperator(model, lambda model, batch: (model.weight[-3:] ** 2).sum(), [None])


@answered(PARAMETERS, "more than 2³¹: the value, and the places in the vector", slow=True)
def _() -> Asked:
    def ask() -> Tensor:
        hessian = large()
        assert hessian.shape == (2**31 + 7,) * 2
        space = ParameterSpace(
            {"a": torch.empty(2**31, device="meta"), "b": torch.empty(7, 1, device="meta")}
        )
        assert space.slices["b"] == slice(2**31, 2**31 + 7)
        assert [v.shape for v in space.views(torch.ones(()).expand(2**31 + 7))][1] == (7, 1)
        return torch.tensor(hessian.value(), dtype=torch.float64)

    return Asked(ask, (), lambda: torch.tensor(0.75, dtype=torch.float64))


@refused(PARAMETERS, "more than 2³¹: the dense matrix", errors.ArgumentError, "GiB.*above limit")
def _() -> Asked:
    return Asked(lambda: large().to_dense())


# --- vectors and questions -----------------------------------------------------------------------

VECTORS = "Vectors"
NOT_A_NUMBER = torch.tensor([float("nan")] * 19, dtype=torch.float64)

for name, vector, kind, words in (
    (
        "of the wrong length",
        torch.ones(20).double(),
        errors.ArgumentError,
        r"shape \(19,\).*\(20,\)",
    ),
    (
        "of the wrong dtype",
        torch.ones(19),
        errors.ArgumentTypeError,
        "expected torch.float64.*v.to",
    ),
    (
        "on another device",
        torch.ones(19).double().to("meta"),
        errors.ArgumentError,
        "on meta; move",
    ),
    ("with nan", NOT_A_NUMBER, errors.NonFiniteError, "the vector to multiply holds nan or inf"),
    ("complex, of NumPy", np.ones(19) * 1j, errors.ArgumentTypeError, "expected real numbers"),
    ("of NumPy and the wrong length", np.ones(18), errors.ArgumentError, r"\(19,\), got \(18,\)"),
    (
        "of three dimensions",
        torch.ones(19, 1, 1).double(),
        errors.ArgumentError,
        "columns of shape",
    ),
):
    refused(VECTORS, name, kind, words)(
        functools.partial(lambda vector: Asked(lambda: operator() @ vector), vector)
    )

for name, change in (
    ("integers of NumPy", lambda v: (100 * v).round().int().numpy()),
    ("float32 of NumPy, read only", lambda v: np.broadcast_to(v.float().numpy(), (19,))),
    ("that require a gradient", lambda v: v.clone().requires_grad_()),
    ("that are not contiguous", lambda v: torch.stack([v, v], 1)[:, 0]),
):

    def build(change: Callable[[Tensor], Any]) -> Asked:
        """The product with a changed vector, which is compared with the dense one."""
        given = change(torch.linspace(-1, 1, 19, dtype=torch.float64))
        exact = torch.as_tensor(
            np.array(given) if isinstance(given, np.ndarray) else given.detach()
        )
        return Asked(
            lambda: torch.as_tensor(operator() @ given), (), lambda: truth() @ exact.double()
        )

    answered(VECTORS, name)(functools.partial(build, change))


QUESTIONS = "Questions"

for name, ask, kind, words in (
    (
        "k larger than n",
        lambda: spectra.eigsh(operator(), k=20),
        errors.ArgumentError,
        "1 <= k <= 19",
    ),
    ("k = 0", lambda: spectra.eigsh(operator(), k=0), errors.ArgumentError, "1 <= k <= 19"),
    ("k = -1", lambda: spectra.eigsh(operator(), k=-1), errors.ArgumentError, "1 <= k <= 19"),
    (
        "k = 2.5",
        lambda: spectra.eigsh(operator(), k=2.5),
        errors.ArgumentTypeError,
        "an integer num",
    ),
    (
        "analyze with k larger than n",
        lambda: spectra.analyze(operator(), k=50),
        errors.ArgumentError,
        "1 <= k <= 19",
    ),
    (
        "an unknown end of the spectrum",
        lambda: spectra.eigsh(operator(), k=1, which="top"),
        errors.ArgumentError,
        "which='top'; expected one of LM",
    ),
    (
        "eigenvalues inside of the spectrum",
        lambda: spectra.eigsh(operator(), k=1, which="SM"),
        errors.ArgumentError,
        "use spectral_density to see them",
    ),
    (
        "a negative tolerance",
        lambda: spectra.eigsh(operator(), k=1, tol=-1.0),
        errors.ArgumentError,
        "tol=-1.0; expected",
    ),
    (
        "a negative seed",
        lambda: spectra.trace(operator(), seed=-1),
        errors.ArgumentError,
        "seed=-1; expected an integer",
    ),
    (
        "a start vector of zeros",
        lambda: spectra.eigsh(operator(), k=1, v0=np.zeros(19)),
        errors.ArgumentError,
        "v0 has norm 0.0",
    ),
    (
        "a block of products wider than the operator",
        lambda: spectra.eigsh(operator(), k=1, block_size=20),
        errors.ArgumentError,
        "block_size=20, but the operator is 19 x 19",
    ),
    (
        "too few products",
        lambda: spectra.eigsh(operator(), k=3, max_matvecs=2),
        errors.ArgumentError,
        "max_matvecs=2 is too few",
    ),
    (
        "deflation by something else than eigenpairs",
        lambda: spectra.trace(operator(), deflate=np.ones(19)),
        errors.ArgumentTypeError,
        "takes the Eigenpairs that eigsh returned",
    ),
    (
        "a matrix that is not square",
        lambda: spectra.eigsh(np.ones((3, 4)), k=1),
        errors.ArgumentError,
        r"square matrix, got shape \(3, 4\)",
    ),
    (
        "an empty matrix",
        lambda: spectra.trace(np.ones((0, 0))),
        errors.ArgumentError,
        r"square matrix, got shape \(0, 0\)",
    ),
    (
        "a complex matrix",
        lambda: spectra.eigsh(np.eye(3) * 1j, k=1),
        errors.ArgumentTypeError,
        "real symmetric",
    ),
    (
        "a matrix that is not symmetric",
        lambda: spectra.eigsh(np.triu(np.ones((3, 3))), k=1),
        errors.NotSymmetricError,
        "not symmetric",
    ),
    (
        "a matrix with nan",
        lambda: spectra.eigsh(np.full((3, 3), np.nan), k=1),
        errors.NonFiniteError,
        "holds nan or inf",
    ),
    ("no operator", lambda: spectra.trace(network()), errors.ArgumentTypeError, "got a Sequential"),
):
    refused(QUESTIONS, name, kind, words)(functools.partial(Asked, ask))


# --- models --------------------------------------------------------------------------------------

MODELS = "Models"


def training(model: nn.Module) -> nn.Module:
    """The model, as it is trained."""
    return model.train()


@refused(
    MODELS, "dropout in training mode", errors.StochasticModelError, "'1'.*drops at random.*eval"
)
def _() -> Asked:
    return product(training(network(nn.Dropout(0.5))))


@refused(
    MODELS, "batch norm in training mode", errors.StochasticModelError, "batch statistics.*eval"
)
def _() -> Asked:
    return product(training(network(nn.BatchNorm1d(3))))


@refused(
    MODELS, "batch norm without statistics", errors.StochasticModelError, "track_running_stats"
)
def _() -> Asked:
    return product(network(nn.BatchNorm1d(3, track_running_stats=False)))


@answered(MODELS, "batch norm in training mode, allowed")
def _() -> Asked:
    model = training(network(nn.BatchNorm1d(3)))

    def written(call: Any) -> Tensor:
        return functional.mse_loss(call(X), Y)

    class Written(nn.Module):
        """Batch norm by its formula: the functional transforms refuse what changes in place."""

        def __init__(self, norm: nn.BatchNorm1d) -> None:
            super().__init__()
            self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

        def forward(self, x: Tensor) -> Tensor:
            spread = x.var(0, unbiased=False) + self.eps
            return (x - x.mean(0)) / spread.sqrt() * self.weight + self.bias

    copy = nn.Sequential(model[0], Written(model[1]), model[2])
    return dense(
        model,
        LOSS,
        [(X, Y)],
        allow_training_mode=True,
        expected=lambda: dense_hessian(copy, written),
    )


@answered(MODELS, "batch norm in eval mode")
def _() -> Asked:
    model = network(nn.BatchNorm1d(3))
    return dense(model, expected=lambda: dense_of(model))


@refused(
    MODELS,
    "spectral norm in training mode",
    errors.StochasticModelError,
    "every call takes a step.*eval",
)
def _() -> Asked:
    model = network()
    parametrizations.spectral_norm(model[0])
    return product(training(model))


@refused(
    MODELS,
    "spectral norm of the older kind, in training mode",
    errors.StochasticModelError,
    r"'0' \(Linear\).*every call takes a step",
)
def _() -> Asked:
    model = network()
    nn.utils.spectral_norm(model[0])
    return product(training(model))


@answered(MODELS, "spectral norm in eval mode")
def _() -> Asked:
    model = network()
    parametrizations.spectral_norm(model[0])
    return dense(model.eval(), expected=lambda: dense_of(model))


@refused(MODELS, "weight norm", errors.DoubleBackwardError, "module '0.*gets wrong for dim 0.*Fix")
def _() -> Asked:
    model = network()
    parametrizations.weight_norm(model[0])
    return product(model)


class Square(nn.Module):
    """A parametrisation."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight + 0.3 * weight**2


@answered(MODELS, "a parametrisation")
def _() -> Asked:
    model = network()
    nn.utils.parametrize.register_parametrization(model[0], "weight", Square())
    return dense(model, expected=lambda: dense_of(model))


@refused(MODELS, "within parametrize.cached()", errors.DoubleBackwardError, "a second time.*cached")
def _() -> Asked:
    model = network()
    nn.utils.parametrize.register_parametrization(model[0], "weight", Square())

    def ask() -> None:
        hessian = HessianOperator(model, LOSS, BATCHES, graph="fresh")
        with nn.utils.parametrize.cached():
            for _ in range(2):
                hessian @ probe(hessian)

    return Asked(ask)


@answered(MODELS, "forward hooks that change outputs: they are part of the model")
def _() -> Asked:
    model = network()
    model[2].register_forward_hook(lambda module, args, output: 2 * output)
    return dense(model, expected=lambda: dense_hessian(network(), twice))


def twice(call: Any) -> Tensor:
    """The loss of doubled outputs."""
    return functional.mse_loss(2 * call(X), Y)


@answered(MODELS, "backward hooks that change gradients: they are not run")
def _() -> Asked:
    model = network()
    for module in model:
        module.register_full_backward_hook(lambda module, grad_input, _: tuple(grad_input[:0]))
        module.register_full_backward_pre_hook(lambda module, grads: tuple(0.5 * g for g in grads))
    for parameter in model.parameters():
        parameter.register_hook(lambda grad: 0.5 * grad)
    return dense(model)


@answered(MODELS, "torch.compile, backend eager", slow=True)
def _() -> Asked:
    return dense(torch.compile(network(), backend="eager"))


@refused(
    MODELS,
    "torch.compile, backend aot_eager",
    errors.DoubleBackwardError,
    "Fix: pass the model before compilation",
    slow=True,
)
def _() -> Asked:
    return product(torch.compile(network(), backend="aot_eager"))


@answered(MODELS, "DataParallel")
def _() -> Asked:
    return dense(nn.DataParallel(network()))


def distributed(size: int, ask: Callable[[nn.Module], Any]) -> Any:
    """An answer of one of several processes, of which the others only seem to be there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        return ask(nn.parallel.DistributedDataParallel(network()))
    finally:
        torch.distributed.destroy_process_group()


@answered(MODELS, "DistributedDataParallel, one process")
def _() -> Asked:
    return Asked(
        lambda: distributed(1, lambda m: HessianOperator(m, LOSS, BATCHES).to_dense()), (), truth
    )


@refused(
    MODELS,
    "DistributedDataParallel, two processes",
    errors.DoubleBackwardError,
    "this process's data alone. Pass process_group=True",
)
def _() -> Asked:
    return Asked(lambda: distributed(2, lambda m: HessianOperator(m, LOSS, BATCHES)))


def sharded(**options: Any) -> Any:
    """The matrix of a model whose parameters are DTensors, on a single process."""
    from spectra.distributed import shard

    torch.distributed.init_process_group(
        "gloo", rank=0, world_size=1, store=torch.distributed.HashStore()
    )
    try:
        return HessianOperator(shard(network()), LOSS, BATCHES, **options).to_dense()
    finally:
        torch.distributed.destroy_process_group()


@answered(MODELS, "parameters sharded over processes (DTensor)")
def _() -> Asked:
    return Asked(sharded, (), truth)


@refused(
    MODELS,
    "parameters sharded over processes (DTensor), process_group=False",
    errors.ArgumentError,
    r"spread over processes \(DTensor\): pass process_group=True",
)
def _() -> Asked:
    return Asked(lambda: sharded(process_group=False))


def quantised(layer: nn.Module) -> Any:
    """A layer in eight bits."""
    with warnings.catch_warnings():
        # Both are going to be replaced, says PyTorch.
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {nn.Linear})[0]


@refused(
    MODELS, "a quantised layer", errors.DoubleBackwardError, "module '2'.*no second derivative"
)
def _() -> Asked:
    first = network(dtype=torch.float32)
    model = nn.Sequential(first[0], first[1], quantised(nn.Linear(3, 3)), nn.Linear(3, 1)).eval()

    def ask() -> None:
        with warnings.catch_warnings():
            # That backpropagation may be wrong.
            warnings.simplefilter("ignore")
            product(model, LOSS, [(X.float(), Y.float())]).ask()

    return Asked(ask)


@refused(MODELS, "quantised as a whole", errors.ParameterSelectionError, "no parameters at all")
def _() -> Asked:
    model = nn.Sequential(quantised(nn.Linear(4, 1)))
    return Asked(product(model, LOSS, [(X.float(), Y.float())]).ask)


class Once_(torch.autograd.Function):
    """A cube that can be differentiated once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * grad


class Cube(nn.Module):
    """A module that uses it."""

    def forward(self, x: Tensor) -> Tensor:
        return Once_.apply(x)


@refused(
    MODELS, "once_differentiable", errors.DoubleBackwardError, r"'1' \(Cube\).*remove the decor"
)
def _() -> Asked:
    return product(network(Cube()))


class Distances(nn.Module):
    """Has no second derivative."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(x, x.detach() + 1)[:, :1].expand(-1, 3)


@refused(MODELS, "no second derivative", errors.DoubleBackwardError, r"module '1' \(Distances\)")
def _() -> Asked:
    return product(network(Distances()))


@refused(MODELS, "an embedding with max_norm", errors.DoubleBackwardError, "'0'.*max_norm = None")
def _() -> Asked:
    model = nn.Sequential(nn.Embedding(5, 4, max_norm=1.0), nn.Linear(4, 1)).eval()
    return Asked(product(model, LOSS, [(torch.tensor([0, 1]), Y[:2])]).ask)


class Clamped(nn.Module):
    """Changes its parameter at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.scale.clamp_(max=1.0)
        return torch.tanh(x) * self.scale


@refused(
    MODELS, "parameters that forward() changes", errors.LossError, "changed parameter '1.scale'"
)
def _() -> Asked:
    return Asked(product(network(Clamped())).ask)


class Remembering(nn.Module):
    """Adds what it gave at its last call."""

    def __init__(self, *, detached: bool) -> None:
        super().__init__()
        self.detached = detached
        self.last: Tensor | float = 0.0

    def forward(self, x: Tensor) -> Tensor:
        out = torch.tanh(x) + 0.5 * self.last
        self.last = out.detach() if self.detached else out
        return out


@refused(MODELS, "a state that is carried on", errors.DataError, "carries something from one call")
def _() -> Asked:
    return product(network(Remembering(detached=True)), LOSS, [(X, Y)], times=2, graph="fresh")


@refused(
    MODELS,
    "a state that is carried on with its history",
    errors.DoubleBackwardError,
    "a second time.*or detach it",
)
def _() -> Asked:
    return product(network(Remembering(detached=False)), LOSS, [(X, Y)], times=2, graph="fresh")


@refused(
    MODELS, "a function", errors.ArgumentTypeError, "torch.nn.Module, got a builtin.*from_func"
)
def _() -> Asked:
    return product(torch.tanh)


# --- what surrounds the call ---------------------------------------------------------------------

AROUND = "Around the call"

for name, surroundings in (
    ("no_grad", torch.no_grad),
    ("inference_mode", torch.inference_mode),
    ("autocast", lambda: torch.autocast("cpu", torch.bfloat16)),
    ("another default device", lambda: torch.device("meta")),
):

    def ask_within(surroundings: Callable[[], Any]) -> Asked:
        """Products and eigenvalues, within a context and in single precision where it matters."""
        model = network(dtype=torch.float32)
        data = [(x.float(), y.float()) for x, y in BATCHES]
        outside = HessianOperator(model, LOSS, data)
        vector = probe(outside)

        def ask() -> Tensor:
            with surroundings():
                inside = HessianOperator(model, LOSS, data, graph="fresh")
                product, again = inside @ vector, outside @ vector
                values = spectra.eigsh(inside, k=2, tol=1e-5).values
            return torch.cat([product, again, torch.from_numpy(values).float()])

        def expected() -> Tensor:
            vector, values = probe(outside).double(), torch.linalg.eigvalsh(truth())
            largest = values[values.abs().argsort(descending=True)[:2]].sort(descending=True)[0]
            return torch.cat([truth() @ vector, truth() @ vector, largest]).float()

        return Asked(ask, (model,), expected)

    answered(AROUND, name)(functools.partial(ask_within, surroundings))


@answered(AROUND, "another default dtype")
def _() -> Asked:
    hessian = operator()

    def ask() -> Tensor:
        torch.set_default_dtype(torch.float16)
        try:
            spectra.eigsh(hessian, k=2)
            spectra.trace(hessian)
            return hessian.to_dense()
        finally:
            torch.set_default_dtype(torch.float32)

    return Asked(ask, (), truth)


@answered(AROUND, "other threads that ask about blocks of the same model")
def _() -> Asked:
    model = network()
    blocks = {
        "0.*": slice(0, 15),
        "2.*": slice(15, 19),
        "*": slice(0, 19),
        "0.weight": slice(0, 12),
    }

    def ask() -> Tensor:
        found: dict[str, Any] = {}

        def work(params: str) -> None:
            hessian = HessianOperator(model, LOSS, BATCHES, params, graph="fresh")
            try:
                found[params] = [hessian.to_dense() for _ in range(4)]
            except Exception as error:
                found[params] = error

        threads = [threading.Thread(target=work, args=(params,)) for params in blocks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for params, place in blocks.items():
            for matrix in found[params]:
                torch.testing.assert_close(matrix, truth()[place, place], rtol=0, atol=1e-12)
        return found["*"][0]

    return Asked(ask, (model,), truth)


@answered(AROUND, "a loss that asks spectra itself")
def _() -> Asked:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        inner = HessianOperator(model, LOSS, [batch], "0.*")
        return LOSS(model, batch) + 0 * inner.value()

    return dense(network(), loss)


# --- checkpoints ----------------------------------------------------------------------------------

SAVED = "Checkpoints"


@functools.cache
def folder() -> tempfile.TemporaryDirectory[str]:
    """What is gone with the process."""
    return tempfile.TemporaryDirectory()


def begun(change: Callable[[Path], None] = lambda path: None) -> tuple[Path, nn.Sequential]:
    """The checkpoint of a run that was killed, `change`d since, and its model."""
    path = Path(tempfile.mkdtemp(dir=folder().name)) / "checkpoint"
    model = network()
    hessian = HessianOperator(model, LOSS, BATCHES)
    compute, left = hessian._products, iter(range(10, -1, -1))

    def mortal(rows: Tensor) -> Tensor:
        if not next(left):
            raise KeyboardInterrupt
        return compute(rows)

    hessian._products = mortal  # type: ignore[method-assign]
    with contextlib.suppress(KeyboardInterrupt):
        resumed(path, model)(hessian)
    change(path)
    return path, model


def resumed(path: Path, model: nn.Module, **options: Any) -> Callable[..., Any]:
    """A question that goes on from the checkpoint."""

    def ask(hessian: HessianOperator | None = None) -> Any:
        hessian = hessian or HessianOperator(model, LOSS, BATCHES)
        pairs = spectra.eigsh(
            hessian, **{"k": 3, "ncv": 12, "tol": 1e-8, **options}, checkpoint=path
        )
        return torch.from_numpy(pairs.values)

    return ask


def extremes() -> Tensor:
    """The three eigenvalues of largest magnitude, the largest first."""
    values = torch.linalg.eigvalsh(truth())
    return values[values.abs().argsort(descending=True)[:3]].sort(descending=True).values


def flipped(place: int) -> Callable[[Path], None]:
    """One bit of a file."""

    def change(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[place] ^= 1
        path.write_bytes(content)

    return change


@answered(SAVED, "of a run that was killed")
def _() -> Asked:
    path, model = begun()
    return Asked(resumed(path, model), (model,), extremes)


@answered(SAVED, "cut off amid a record")
def _() -> Asked:
    path, model = begun(lambda path: path.write_bytes(path.read_bytes()[:-9]))
    return Asked(resumed(path, model), (model,), extremes)


@answered(SAVED, "with a clock that was set back")
def _() -> Asked:
    path, model = begun(lambda path: os.utime(path, (0, 0)))

    def ask() -> Any:
        now, time.time = time.time, lambda: -1e9
        try:
            return resumed(path, model)()
        finally:
            time.time = now

    return Asked(ask, (model,), extremes)


@answered(
    SAVED, "on a disk that becomes full: the run goes on without, and says so", needs="resource"
)
def _() -> Asked:
    path, model = begun()

    def ask() -> Any:
        import resource

        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 100, limits[1]))
            return resumed(path, model)()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)

    return Asked(ask, (model,), extremes)


@refused(SAVED, "of other weights", errors.CheckpointError, r"differs: weights 2\.bias")
def _() -> Asked:
    path, model = begun()
    with torch.no_grad():
        model[2].bias += 1e-9
    return Asked(resumed(path, model), (model,))


@refused(SAVED, "of other data", errors.CheckpointError, "differs: data batch 1")
def _() -> Asked:
    path, model = begun()
    data = [BATCHES[0], (X[2:], Y[2:] + 1e-9)]
    hessian = HessianOperator(model, LOSS, data)
    return Asked(lambda: resumed(path, model)(hessian), (model,))


@refused(SAVED, "of another loss", errors.CheckpointError, "differs: loss")
def _() -> Asked:
    path, model = begun()
    hessian = HessianOperator(model, supervised(nn.L1Loss()), BATCHES)
    return Asked(lambda: resumed(path, model)(hessian), (model,))


@refused(SAVED, "of other options", errors.CheckpointError, r"option seed \(0 before, 1 now\)")
def _() -> Asked:
    path, model = begun()
    return Asked(resumed(path, model, seed=1), (model,))


@refused(SAVED, "of another question", errors.CheckpointError, "one of eigsh, not of trace")
def _() -> Asked:
    path, model = begun()
    hessian = HessianOperator(model, LOSS, BATCHES)
    return Asked(lambda: spectra.trace(hessian, checkpoint=path), (model,))


@refused(SAVED, "with one bit changed", errors.StorageError, "is damaged")
def _() -> Asked:
    path, model = begun(flipped(2000))
    return Asked(resumed(path, model), (model,))


@refused(SAVED, "that is another file", errors.StorageError, "is no checkpoint")
def _() -> Asked:
    path, model = begun(lambda path: path.write_text("import spectra"))
    return Asked(resumed(path, model), (model,))


@refused(SAVED, "that is a directory", errors.ArgumentError, "name a file in it")
def _() -> Asked:
    path, model = begun()
    return Asked(resumed(path.parent, model), (model,))


@refused(SAVED, "where nothing can be written", errors.StorageError, "cannot write the checkpoint")
def _() -> Asked:
    path, model = begun()
    return Asked(resumed(path / "beneath", model), (model,))


@refused(SAVED, "of a run that is under way", errors.StorageError, "another run is writing")
def _() -> Asked:
    path, model = begun()

    def ask() -> Any:
        with contextlib.closing(RecordFile(path)):
            return resumed(path, model)()

    return Asked(ask, (model,))


# --- transforms, optimisers, penalties -----------------------------------------------------------

TRANSFORMS = "transforms, optimisers and penalties"


def transformed(make: Callable[[HessianOperator, nn.Module], Any]) -> Asked:
    """A transform of the network's Hessian, made in the question, and a product with it."""
    model = network()

    def ask() -> Any:
        made = make(HessianOperator(model, LOSS, BATCHES), model)
        return made @ probe(made)

    return Asked(ask, (model,))


def stepped(model: nn.Module, kind: Any = torch.optim.Adam, **options: Any) -> Any:
    """An optimiser of the model after one step, which leaves the weights as they were."""
    optimizer = kind(model.parameters(), lr=0.0, **options)
    functional.mse_loss(model(X), Y).backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


@refused(TRANSFORMS, "an Adam that has not stepped yet", errors.ArgumentError, "take a step first")
def _() -> Asked:
    return transformed(
        lambda H, model: spectra.preconditioned(H, torch.optim.Adam(model.parameters()))
    )


@refused(
    TRANSFORMS,
    "the optimiser of another copy of the model",
    errors.ArgumentError,
    r"'0\.weight' is not in the Adam",
)
def _() -> Asked:
    return transformed(lambda H, model: spectra.preconditioned(H, stepped(network())))


@refused(TRANSFORMS, "an optimiser of another kind", errors.ArgumentTypeError, "NAdam is not among")
def _() -> Asked:
    return transformed(
        lambda H, model: spectra.preconditioned(H, stepped(model, torch.optim.NAdam))
    )


@refused(
    TRANSFORMS,
    "the threshold of an optimiser of another kind",
    errors.ArgumentTypeError,
    "Rprop is not among",
)
def _() -> Asked:
    model = network()
    optimizer = torch.optim.Rprop(model.parameters())
    return Asked(lambda: spectra.stability_threshold(optimizer), (model,))


@refused(
    TRANSFORMS, "an optimiser whose training diverged", errors.NonFiniteError, "holds nan or inf"
)
def _() -> Asked:
    def make(H: HessianOperator, model: nn.Module) -> Any:
        optimizer = stepped(model)
        next(iter(optimizer.state.values()))["exp_avg_sq"].fill_(torch.nan)
        return spectra.preconditioned(H, optimizer)

    return transformed(make)


@refused(
    TRANSFORMS,
    "a preconditioner that is negative somewhere",
    errors.ArgumentError,
    "expected positive ones",
)
def _() -> Asked:
    return transformed(lambda H, model: spectra.preconditioned(H, torch.linspace(-1, 1, H.space.n)))


@refused(TRANSFORMS, "a diagonal that is too short", errors.ArgumentError, r"expected \(19,\)")
def _() -> Asked:
    return transformed(lambda H, model: spectra.shifted(H, torch.ones(3)))


@refused(TRANSFORMS, "a shift of nan", errors.NonFiniteError, "shift is nan")
def _() -> Asked:
    return transformed(lambda H, model: spectra.shifted(H, float("nan")))


@refused(
    TRANSFORMS, "a deflated basis that is not orthonormal", errors.ArgumentError, "not orthonormal"
)
def _() -> Asked:
    return transformed(lambda H, model: spectra.deflated(H, torch.ones(H.space.n, 2).double()))


@refused(
    TRANSFORMS,
    "a projection on columns that depend on one another",
    errors.ArgumentError,
    "column 1 of the basis",
)
def _() -> Asked:
    return transformed(lambda H, model: spectra.projected(H, torch.ones(H.space.n, 2).double()))


@refused(
    TRANSFORMS, "a sum of Hessians of other parameters", errors.ArgumentError, "of other parameters"
)
def _() -> Asked:
    def make(H: HessianOperator, model: nn.Module) -> Any:
        function = HessianOperator.from_function(lambda x: (x**2).sum(), torch.ones(19).double())
        return H - function

    return transformed(make)


@refused(
    TRANSFORMS,
    "a penalty beside a loss that is a sum",
    errors.ArgumentError,
    "count the penalty once for each",
)
def _() -> Asked:
    total = supervised(nn.MSELoss(reduction="sum"))
    return Asked(lambda: regularised(total, weight_decay(0.1)))


@refused(TRANSFORMS, "a penalty that is no scalar", errors.LossError, r"of shape \(3, 4\)")
def _() -> Asked:
    return product(network(), regularised(LOSS, lambda model: model[0].weight))


@refused(TRANSFORMS, "a weight decay below zero", errors.ArgumentError, "strength=-1")
def _() -> Asked:
    return Asked(lambda: weight_decay(-1.0))


@answered(TRANSFORMS, "a fused AdamW")
def _() -> Asked:
    model = network()
    optimizer = stepped(model, torch.optim.AdamW, fused=True)
    hessian = HessianOperator(model, LOSS, BATCHES)
    P = torch.cat([optimizer.state[p]["exp_avg_sq"].sqrt().reshape(-1) for p in model.parameters()])
    root = (P / 0.001**0.5 + 1e-8).sqrt()

    def ask() -> Any:
        made = spectra.preconditioned(hessian, optimizer)
        return made @ probe(made)

    return Asked(ask, (model,), lambda: truth() / torch.outer(root, root) @ probe(hessian))


# --- principal blocks ----------------------------------------------------------------------------

BLOCKS = "principal blocks"


def of_blocks(ask: Callable[[HessianOperator], Any]) -> Asked:
    """A question about the blocks of the network's Hessian."""
    model = network()
    return Asked(lambda: ask(HessianOperator(model, LOSS, BATCHES)), (model,))


@refused(BLOCKS, "an unknown grouping", errors.ArgumentError, "expected 'layer', 'module'")
def _() -> Asked:
    return of_blocks(lambda H: H.blocks("head"))


@refused(BLOCKS, "no block", errors.ArgumentError, "names no block")
def _() -> Asked:
    return of_blocks(lambda H: H.blocks({}))


@refused(BLOCKS, "blocks that overlap", errors.ArgumentError, r"'0\.bias' is in the blocks 'a' and")
def _() -> Asked:
    return of_blocks(lambda H: H.blocks({"a": "0.*", "b": "*.bias"}))


@refused(BLOCKS, "a block of nothing", errors.ParameterSelectionError, "nowhere")
def _() -> Asked:
    return of_blocks(lambda H: H.blocks({"a": "nowhere.*"}))


@refused(BLOCKS, "a block that is not there", errors.ArgumentError, "no block '1'")
def _() -> Asked:
    return of_blocks(lambda H: H.blocks()["1"])


@refused(BLOCKS, "one checkpoint for all", errors.ArgumentError, "cannot be shared among blocks")
def _() -> Asked:
    return of_blocks(lambda H: H.blocks().each(spectra.trace, checkpoint="run"))


@refused(BLOCKS, "a question that is no function", errors.ArgumentTypeError, "question is a str")
def _() -> Asked:
    return of_blocks(lambda H: H.blocks().each("trace"))


@refused(
    BLOCKS,
    "a coupling that leaves parameters out",
    errors.ArgumentError,
    "hold 15 of 19 parameters",
)
def _() -> Asked:
    return of_blocks(lambda H: spectra.block_coupling(H, {"first": "0.*"}))


@refused(BLOCKS, "a coupling of one block", errors.ArgumentError, "has nothing outside")
def _() -> Asked:
    return of_blocks(lambda H: spectra.block_coupling(H, {"all": "*"}))


@refused(BLOCKS, "a coupling from one probe", errors.ArgumentError, "expected at least 2")
def _() -> Asked:
    return of_blocks(lambda H: spectra.block_coupling(H, probes=1))


@refused(BLOCKS, "a matrix without parameters", errors.ArgumentTypeError, "got a ndarray")
def _() -> Asked:
    return Asked(lambda: spectra.block_spectra(np.eye(3)))


@answered(BLOCKS, "a block of one entry")
def _() -> Asked:
    model = network()
    hessian = HessianOperator(model, LOSS, BATCHES)

    def ask() -> Any:
        found = hessian.blocks("parameter").each(spectra.eigsh, k=4)
        return torch.from_numpy(found["2.bias"].values)

    return Asked(ask, (model,), lambda: truth()[-1:, -1])


# --- Gauss-Newton matrices -----------------------------------------------------------------------

LINEARISED = "Gauss–Newton matrices"


def linearised(loss: Any, model: nn.Module | None = None) -> Asked:
    """A product with a Gauss-Newton matrix."""
    model = model or network()

    def ask() -> Any:
        made = spectra.GaussNewtonOperator(model, loss, BATCHES)
        return made @ probe(made)

    return Asked(ask, (model,))


class OwnLoss(nn.Module):
    """Returns the loss instead of predictions."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return functional.mse_loss(self.inner(x), y)


@refused(LINEARISED, "a model that computes its own loss", errors.LossError, "linear in a scalar")
def _() -> Asked:
    return linearised(lambda model, batch: model(*batch), OwnLoss())


@refused(
    LINEARISED,
    "a loss that calls parts of the model, not the model",
    errors.LossError,
    "did not use the outputs of a call of the model",
)
def _() -> Asked:
    return linearised(
        lambda model, batch: on_the_last_layer(model, (model[:2](batch[0]), batch[1]))
    )


@refused(LINEARISED, "a loss that raises", errors.LossError, "raised ValueError on batch 0")
def _() -> Asked:
    def broken(model: Any, batch: Any) -> Tensor:
        model(batch[0])
        raise ValueError("no")

    return linearised(broken)


@refused(LINEARISED, "a plain function", errors.ArgumentTypeError, "which part of it is the model")
def _() -> Asked:
    return Asked(
        lambda: spectra.GaussNewtonOperator.from_function(lambda x: (x**2).sum(), torch.ones(2))
    )


@answered(LINEARISED, "a linear model: the Hessian itself")
def _() -> Asked:
    model = seeded(lambda: nn.Linear(4, 1)).double()
    made = spectra.GaussNewtonOperator(model, LOSS, BATCHES)
    return Asked(made.to_dense, (model,), lambda: dense_of(model))


@answered(LINEARISED, "a penalty, which is no part of the model, is differentiated as it is")
def _() -> Asked:
    model = network()
    plain = spectra.GaussNewtonOperator(model, LOSS, BATCHES)
    loss = regularised(LOSS, weight_decay(0.5))
    made = spectra.GaussNewtonOperator(model, loss, BATCHES)
    return Asked(made.to_dense, (model,), lambda: plain.to_dense() + 0.5 * torch.eye(19).double())


# --- losses along directions ---------------------------------------------------------------------

ALONG = "losses along directions"


def along(*args: Any, **options: Any) -> Asked:
    """The loss of the network along directions."""
    model = network()
    hessian = HessianOperator(model, LOSS, BATCHES)
    return Asked(lambda: spectra.landscape(hessian, *args, **options), (model,))


@refused(ALONG, "a matrix", errors.ArgumentTypeError, "a MatrixOperator has no loss to evaluate")
def _() -> Asked:
    return Asked(lambda: spectra.landscape(np.eye(3)))


@refused(ALONG, "a transformed Hessian", errors.ArgumentTypeError, "a ShiftedOperator has no loss")
def _() -> Asked:
    return transformed(lambda H, _: spectra.landscape(spectra.shifted(H, 1.0)))


for name, directions, options, kind, words in (
    ("an even number of points", None, {"points": 4}, errors.ArgumentError, "points=4 is even"),
    ("one point", None, {"points": 1}, errors.ArgumentError, "points=1; .*at least 3"),
    ("no direction", None, {"k": 0}, errors.ArgumentError, "k=0; .*at least 1"),
    ("a negative span", None, {"span": -1.0}, errors.ArgumentError, "span=-1.0; expected the larg"),
    ("a span of nan", None, {"span": np.nan}, errors.ArgumentError, "span=nan; expected the large"),
    (
        "directions of another length",
        np.ones(4),
        {},
        errors.ArgumentError,
        r"shape \(4,\); expected columns \(19, k\)",
    ),
    ("a direction of zeros", np.zeros(19), {}, errors.ArgumentError, "direction 0 is of length ze"),
    (
        "a direction with nan",
        np.full(19, np.nan),
        {},
        errors.ArgumentError,
        "direction 0 is of length zero, or not finite",
    ),
    ("words as directions", "top", {}, errors.ArgumentTypeError, "directions is a str of <U3"),
    (
        "complex directions",
        np.ones(19) * 1j,
        {},
        errors.ArgumentTypeError,
        "directions is a ndarray of complex128",
    ),
    (
        "directions on the meta device",
        torch.ones(19, device="meta"),
        {},
        errors.ArgumentTypeError,
        "float32 on meta",
    ),
    (
        "the plane of one direction",
        np.ones(19),
        {"plane": True},
        errors.ArgumentError,
        "at least 2",
    ),
    (
        "the plane of one direction twice",
        np.ones((19, 2)),
        {"plane": True},
        errors.ArgumentError,
        "direction 1 is that of the first",
    ),
):
    refused(ALONG, name, kind, words)(functools.partial(along, directions, **options))


@answered(ALONG, "a direction of another length than one")
def _() -> Asked:
    hessian = HessianOperator.from_function(lambda x: (x**4).sum(), torch.ones(2).double())

    def ask() -> Tensor:
        found = spectra.landscape(hessian, torch.tensor([7.0, 0.0]), span=0.5, points=3)
        return torch.from_numpy(found.values)

    return Asked(ask, (), lambda: torch.tensor([[0.5**4 + 1, 2, 1.5**4 + 1]]).double())


@answered(ALONG, "points at which the loss is nan are gaps")
def _() -> Asked:
    hessian = HessianOperator.from_function(lambda x: x.log().sum(), torch.ones(1).double())

    def ask() -> Tensor:
        found = spectra.landscape(hessian, torch.ones(1), span=2.0, points=5)
        assert any("nan" in failure for failure in found.failures)
        return torch.from_numpy(found.values).nan_to_num(-9)

    gaps = torch.tensor([[-9.0, -9.0]]).double()
    known = torch.tensor([[1.0, 2.0, 3.0]]).double().log()
    return Asked(ask, (), lambda: torch.cat([gaps, known], dim=1))


# --- curvature over training ---------------------------------------------------------------------

TRAINING = "curvature over training"


def monitored(*steps: Any, **options: Any) -> Asked:
    """Measurements at steps, by a monitor that is made in the question."""
    model = options.pop("model", None) or network().train()
    arguments = {"loss": LOSS, "data": BATCHES, **options}

    def ask() -> Any:
        monitor = spectra.CurvatureMonitor(model, **arguments)
        for step in steps or (0,):
            monitor.step(step)
        return monitor.trajectory

    return Asked(ask, (model,) if isinstance(model, nn.Module) else ())


for name, steps, options, kind, words in (
    ("no model", (), {"model": "resnet"}, errors.ArgumentTypeError, "torch.nn.Module, got a str"),
    (
        "a model in pieces",
        (),
        {"model": type("FullyShardedDataParallel", (nn.Module,), {})()},
        errors.ArgumentError,
        "keeps its parameters in pieces",
    ),
    (
        "no data and no batch",
        (),
        {"data": None},
        errors.ArgumentError,
        r"pass the batch, step\(i, b",
    ),
    (
        "a loss that is wrong from the first measurement on",
        (),
        {"loss": lambda model, batch: model(batch[0])},
        errors.LossError,
        "expected a scalar",
    ),
    (
        "two schedules",
        (),
        {"every": 2, "steps": [1]},
        errors.ArgumentError,
        "every and steps both say when",
    ),
    ("every = 0", (), {"every": 0}, errors.ArgumentError, "every=0; expected a number of steps"),
    (
        "a number as steps",
        (),
        {"steps": 3},
        errors.ArgumentTypeError,
        "steps is a int; expected st",
    ),
    ("fractions as steps", (), {"steps": [1.5]}, errors.ArgumentTypeError, "than whole numbers"),
    ("a fraction of a step", (1.5,), {}, errors.ArgumentTypeError, "step=1.5; expected an integer"),
    ("a step back", (5, 4), {}, errors.ArgumentError, "step 4 comes after step 5"),
    (
        "something unknown to record",
        (),
        {"record": ["hessian"]},
        errors.ArgumentError,
        "record has 'hessian'; expected a list with any of 'gradient'",
    ),
    (
        "a string to record",
        (),
        {"record": "gradient"},
        errors.ArgumentError,
        "record='gradient' is a string; expected a list",
    ),
    (
        "the preconditioned sharpness without an optimiser",
        (),
        {"record": ["preconditioned"]},
        errors.ArgumentError,
        "pass optimizer=",
    ),
    (
        "something else than an optimiser",
        (),
        {"optimizer": "Adam"},
        errors.ArgumentTypeError,
        "expected a torch optimiser",
    ),
    (
        "more eigenvalues than parameters",
        (),
        {"k": 50},
        errors.ArgumentError,
        "k=50.* 1 <= k <= 19",
    ),
    (
        "an operator, where what makes one is expected",
        (),
        {"operator": operator()},
        errors.ArgumentTypeError,
        "operator is a HessianOperator; expected what makes one",
    ),
    (
        "a trajectory that is none",
        (),
        {"trajectory": 3},
        errors.ArgumentTypeError,
        "expected a Trajectory to continue, got a int",
    ),
    (
        "a trajectory that was not saved",
        (),
        {"trajectory": "nowhere"},
        errors.StorageError,
        "no result at 'nowhere.json'",
    ),
    (
        "a log that is none",
        (),
        {"log": 3},
        errors.ArgumentTypeError,
        "log is a int; expected a fun",
    ),
    ("a log of unknown kind", (), {"log": "run.csv"}, errors.ArgumentError, "ends in .jsonl"),
):
    refused(TRAINING, name, kind, words)(functools.partial(monitored, *steps, **options))


@answered(TRAINING, "data that can be read only once: they are held")
def _() -> Asked:
    model = network().train()

    def ask() -> Tensor:
        batches = (batch for batch in BATCHES)
        monitor = spectra.CurvatureMonitor(model, LOSS, batches, k=1, tol=1e-7, record=())
        found = [monitor.step(step).eigenvalues[0] for step in (0, 1)]
        return torch.tensor(found, dtype=torch.float64)

    return Asked(ask, (model,), lambda: torch.linalg.eigvalsh(truth())[-1].repeat(2))


@answered(TRAINING, "a loss that is nan at a later step is recorded, and training goes on")
def _() -> Asked:
    def ask() -> Tensor:
        model = network().train()
        monitor = spectra.CurvatureMonitor(model, LOSS, BATCHES, tol=1e-7, record=())
        monitor.step(0)
        with torch.no_grad():
            model[0].weight.fill_(float("nan"))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            failed = monitor.step(1)
        assert "training goes on" in str(caught[0].message)
        assert failed.error.startswith("NonFiniteError: the loss of batch 0 is nan")
        sharpness = [m.sharpness for m in monitor.trajectory]
        return torch.tensor(sharpness, dtype=torch.float64).nan_to_num(-9)

    top = torch.linalg.eigvalsh(truth())[-1]
    return Asked(ask, (), lambda: torch.stack([top, torch.tensor(-9.0).double()]))


# --- curvature at saved weights ------------------------------------------------------------------

SAVED = "curvature at saved weights"


def saved(content: Any, name: str = "weights.pt") -> Path:
    """What a training might have saved, in a file; bytes and text as they are."""
    path = Path(tempfile.mkdtemp(dir=folder().name)) / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    return path


def tracked(*contents: Any, name: str = "weights.pt", **options: Any) -> Asked:
    """Measurements at what was saved."""
    hessian = options.pop("hessian", None) or operator()
    files = [c if isinstance(c, str) else saved(c, name) for c in contents]
    watched = (hessian.objective.model,) if isinstance(hessian, HessianOperator) else ()
    return Asked(lambda: spectra.track(hessian, files, **options), watched)


def weights(**changes: Any) -> dict[str, Any]:
    """The network's, with some replaced, or left out where None."""
    state = {name.replace(".", "_"): value for name, value in network().state_dict().items()}
    state.update(changes)
    return {k.replace("_", ".", 1): v for k, v in state.items() if v is not None}


def adam_state() -> dict[str, Any]:
    """Of an optimiser that has not taken a step."""
    return torch.optim.Adam(network().parameters()).state_dict()


for name, contents, options, kind, words in (
    ("no weights", (), {}, errors.ArgumentError, "no weights to measure at"),
    ("a file that is not there", ("nowhere.pt",), {}, errors.ArgumentError, "no file or direct"),
    (
        "a file of another kind by its name",
        (b"1,2\n",),
        {"name": "weights.csv"},
        errors.ArgumentError,
        "is no file of weights by its name",
    ),
    ("a file cut off", (b"PK\x03\x04",), {}, errors.ArgumentError, "cannot read"),
    (
        "a safetensors file that is none",
        (b"not one",),
        {"name": "weights.safetensors"},
        errors.ArgumentError,
        "cannot read",
    ),
    (
        "a whole pickled model, which could run code",
        (nn.Linear(2, 1),),
        {},
        errors.ArgumentError,
        r"it holds a torch.nn.modules.linear.Linear\); save only tensors",
    ),
    (
        "a checkpoint without weights",
        ({"epoch": 3, "accuracy": 0.9},),
        {},
        errors.ArgumentError,
        "holds no weights, but entries 'epoch', 'accuracy'",
    ),
    (
        "weights of a smaller model",
        (weights(**{"2_bias": None}),),
        {},
        errors.ArgumentError,
        "are not those of the Sequential: they lack '2.bias'",
    ),
    (
        "weights of a larger model",
        (weights(**{"3_bias": torch.ones(1)}),),
        {},
        errors.ArgumentError,
        "have besides '3.bias'",
    ),
    (
        "weights of another shape",
        (weights(**{"2_bias": torch.ones(2)}),),
        {},
        errors.ArgumentError,
        r"'2.bias' in .* has the shape \(2,\), in the Sequential \(1,\)",
    ),
    (
        "weights that are nan, and no others",
        (weights(**{"2_bias": torch.full((1,), float("nan"))}),),
        {},
        errors.NonFiniteError,
        "with the weights in 'weights.pt': the loss of batch 0 is nan",
    ),
    (
        "one file, where a list is expected",
        (),
        {"weights": "weights.pt"},
        errors.ArgumentTypeError,
        "weights is a str; expected a list of files",
    ),
    (
        "an operator without a model",
        (weights(),),
        {"hessian": spectra.as_operator(np.eye(2))},
        errors.ArgumentTypeError,
        "a MatrixOperator has no model to put weights into",
    ),
    (
        "a learning rate below zero",
        (weights(),),
        {"learning_rate": -0.1},
        errors.ArgumentError,
        "learning_rate=-0.1; expected a positive number",
    ),
    (
        "a learning rate twice",
        (weights(),),
        {"learning_rate": 0.1, "optimizer": torch.optim.SGD([torch.zeros(1)], lr=0.1)},
        errors.ArgumentError,
        "has learning rates of its own",
    ),
    (
        "the state of another optimiser than was given",
        ({"model": weights(), "optimizer": adam_state()},),
        {"optimizer": torch.optim.SGD(network().parameters(), lr=0.1)},
        errors.ArgumentError,
        "does not go into the SGD: it is that of Adam",
    ),
):

    def build(contents: tuple[Any, ...] = contents, options: dict[str, Any] = options) -> Asked:
        if "weights" in options:
            return Asked(lambda: spectra.track(operator(), options["weights"]))
        return tracked(*contents, **options)

    refused(SAVED, name, kind, words)(build)


@refused(SAVED, "other weights than a checkpoint holds", errors.CheckpointError, "are others")
def _() -> Asked:
    path, files = saved(b"", "run"), [saved(weights(), f"w-{step}.pt") for step in (1, 2)]

    def ask() -> None:
        spectra.track(operator(), files[:1], checkpoint=path)
        torch.save(weights(**{"2_bias": torch.ones(1)}), files[0])
        spectra.track(operator(), files, checkpoint=path)

    return Asked(ask)


@answered(SAVED, "files in another order than their steps")
def _() -> Asked:
    def ask() -> Tensor:
        files = [
            saved({"model": weights(**{"2_bias": torch.full((1,), b)}), "step": step})
            for b, step in ((5.0, 7), (0.0, 3))
        ]
        found = spectra.track(operator(), files, k=1, tol=1e-7, record=())
        assert [m.step for m in found] == [3, 7]
        return torch.tensor([m.eigenvalues[0] for m in found], dtype=torch.float64)

    def right() -> Tensor:
        tops = []
        for b in (0.0, 5.0):
            model = network()
            with torch.no_grad():
                model[2].bias.fill_(b)
            tops.append(torch.linalg.eigvalsh(dense_of(model))[-1])
        return torch.stack(tops)

    return Asked(ask, (), right)


@answered(SAVED, "one file among others that is nan: its row says so")
def _() -> Asked:
    def ask() -> Tensor:
        bad = weights(**{"2_bias": torch.full((1,), float("nan"))})
        files = [saved(c, f"w-{i}.pt") for i, c in enumerate([weights(), bad])]
        first, second = spectra.track(operator(), files, k=1, tol=1e-7, record=())
        assert second.error.startswith("NonFiniteError")
        return torch.tensor(first.eigenvalues[:1], dtype=torch.float64)

    return Asked(ask, (), lambda: torch.linalg.eigvalsh(truth())[-1:])


# --- the table -----------------------------------------------------------------------------------


def happened(case: Case) -> str:
    """What comes of a case, in the words of the table."""
    if case.kind is None:
        return "right"
    try:
        case.build().ask()
    except case.kind as error:
        return f"`{type(error).__name__}`: {_normalised(str(error))}"
    return "no error"


def _normalised(message: str) -> str:
    """A message without what differs between versions of PyTorch, and without many digits."""
    # What other programs say is theirs.
    message = re.sub(r"(raised \w+)( on batch \d+)?: .*", r"\1\2: …", message)
    message = re.sub(r"(differentiated twice: ).*?(\. Fix: )", r"\1…\2", message)
    message = re.sub(r"\d+\.\d{3,}(e[+-]?\d+)?", "…", message)
    message = re.sub(r"byte \d+", "byte …", message)
    message = re.sub(r"'/[^']*/(checkpoint[^']*)'", r"'…/\1'", message)
    message = re.sub(r"'/[^']*'", "'…'", message)
    return message.replace("|", r"\|").replace("\n", " ").replace("*", r"\*").replace("<", r"\<")


def table() -> str:
    """The table of docs/reliability.md, by running all cases that are to be refused."""
    lines = []
    for group, cases in itertools.groupby(CASES, key=lambda case: case.group):
        lines += [f"### {group}", "", "| input | what happens |", "| --- | --- |"]
        lines += [f"| {case.name} | {happened(case)} |" for case in cases]
        lines.append("")
    return "\n".join(lines)


START, END = "<!-- generated: bad inputs -->\n", "<!-- end -->"


def main() -> None:
    """Write the table into the page."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{START}\n{table()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
