import random
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset

from spectra import HessianOperator
from spectra.errors import (
    ArgumentError,
    ArgumentTypeError,
    DataError,
    LossError,
    NonFiniteError,
    ParameterSelectionError,
    StochasticModelError,
)
from spectra.objective import batches as reading_batches
from spectra.objective.losses import supervised
from spectra.objective.objective import ModelObjective
from tests.cases.networks import dense_hessian, tanh_mlp, wine

LOSS = supervised(nn.CrossEntropyLoss())


class Normalised(nn.Module):
    """A network with batch norm and dropout."""

    def __init__(self, rate=0.5):
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.norm = nn.BatchNorm1d(5)
        self.drop = nn.Dropout(rate)
        self.last = nn.Linear(5, 3)
        self.double()

    def forward(self, x):
        return self.last(self.drop(torch.tanh(self.norm(self.first(x)))))


def batches(size=60):
    x, y = wine()
    return list(zip(x.split(size), y.split(size), strict=True))


def vector(operator):
    return np.linspace(-1, 1, operator.shape[0])


# --- the model and the world are left as they were found -----------------------------------------


def snapshot(model):
    return {
        "modes": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "grad_objects": [id(p.grad) for p in model.parameters() if p.grad is not None],
        "parameters": [p.detach().clone() for p in model.parameters()],
        "parameter_objects": [id(p) for p in model.parameters()],
        "buffers": [b.clone() for b in model.buffers()],
        "buffer_objects": [id(b) for b in model.buffers()],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
        "numpy_place": np.random.get_state()[2],  # noqa: NPY002
        "python": random.getstate(),
        "grad_enabled": torch.is_grad_enabled(),
    }


def assert_unchanged(before, after):
    for key, value in before.items():
        values, others = (v if isinstance(v, list) else [v] for v in (value, after[key]))
        for a, b in zip(values, others, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, key


class Noisy(Dataset):
    """Samples that draw from every global generator."""

    def __init__(self):
        self.x, self.y = wine()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        random.random()
        np.random.rand()  # noqa: NPY002
        torch.rand(1)
        return self.x[index], self.y[index]


@pytest.mark.parametrize("graph", ["fresh", "retained"])
@pytest.mark.parametrize("hold_data", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_everything_is_left_as_it_was_found(training, hold_data, graph):
    model = Normalised().train(training)
    model.drop.train(not training)
    model.first.bias.requires_grad_(False)
    model.last.weight.grad = torch.full_like(model.last.weight, 7.0)
    loader = DataLoader(Noisy(), batch_size=50, shuffle=True)
    before = snapshot(model)
    operator = HessianOperator(
        model,
        LOSS,
        loader,
        ["first.*", "last.*"],
        graph=graph,
        hold_data=hold_data,
        allow_training_mode=True,
    )
    assert_unchanged(before, snapshot(model))
    for question in (
        lambda: operator @ vector(operator),
        lambda: operator @ vector(operator),
        operator.value,
        operator.gradient,
        lambda: operator.block("last.bias").to_dense(),
        operator.release,
    ):
        question()
        assert_unchanged(before, snapshot(model))


@pytest.mark.parametrize("fails_at", [1, 2, 4])
def test_everything_is_left_as_it_was_found_when_the_loss_raises_half_way(fails_at):
    model = Normalised().train()
    model.first.weight.requires_grad_(False)
    model.last.bias.grad = torch.ones_like(model.last.bias)
    calls = 0

    def loss(model, batch):
        nonlocal calls
        calls += 1
        value = LOSS(model, batch)
        if calls == fails_at:
            raise KeyError
        return value

    operator = HessianOperator(
        model,
        loss,
        DataLoader(Noisy(), batch_size=50, shuffle=True),
        "first.*",
        allow_training_mode=True,
    )
    before = snapshot(model)
    with pytest.raises(LossError, match=f"KeyError on batch {fails_at - 1}"):
        operator @ vector(operator)
    assert_unchanged(before, snapshot(model))


class Replacing(nn.Linear):
    def __init__(self):
        super().__init__(6, 3, dtype=torch.float64)
        self.register_buffer("mean", torch.zeros(3, dtype=torch.float64))

    def forward(self, x):
        y = super().forward(x)
        self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
        return y


class Updating(Replacing):
    def forward(self, x):
        y = nn.Linear.forward(self, x)
        self.mean.mul_(0.9).add_(0.1 * y.detach().mean(0))
        return y


@pytest.mark.parametrize("make", [Replacing, Updating])
@pytest.mark.parametrize("training", [True, False])
def test_a_buffer_that_the_model_replaces_or_updates_is_put_back(make, training):
    model = make().train(training)
    before = snapshot(model)
    HessianOperator(model, LOSS, batches()).to_dense()
    assert_unchanged(before, snapshot(model))


@pytest.mark.parametrize("graph", ["fresh", "retained"])
def test_hooks_on_parameters_neither_run_nor_get_lost(graph):
    model, calls = tanh_mlp(), []
    expected = HessianOperator(model, LOSS, batches()).to_dense()

    def doubled(grad):
        calls.append(grad)
        return 2 * grad

    handle = model[0].weight.register_hook(doubled)
    model[2].bias.register_post_accumulate_grad_hook(calls.append)
    operator = HessianOperator(model, LOSS, batches(), graph=graph)
    for _ in range(2):
        torch.testing.assert_close(operator.to_dense(), expected)
        operator.gradient()
    assert not calls
    LOSS(model, batches()[0]).backward()
    assert len(calls) == 2
    handle.remove()
    LOSS(model, batches()[0]).backward()
    assert len(calls) == 3


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_products_are_the_same_whatever_mode_the_caller_is_in(mode):
    model = tanh_mlp()
    outside = HessianOperator(model, LOSS, batches())
    expected = outside.to_dense()
    with mode():
        for operator in (
            outside,
            HessianOperator(model, LOSS, batches()),
            HessianOperator(model, LOSS, DataLoader(TensorDataset(*wine()), batch_size=60)),
            HessianOperator(model, LOSS, batches(), graph="retained"),
        ):
            torch.testing.assert_close(operator.to_dense(), expected)
            torch.testing.assert_close(operator.gradient(), outside.gradient())
            assert operator.value() == pytest.approx(outside.value(), rel=1e-14)
            v = torch.ones(len(expected), dtype=torch.float64)
            torch.testing.assert_close(operator @ v, expected.sum(1))


def test_operators_outlive_the_inference_mode_in_which_they_were_made():
    point, model = torch.ones(2), tanh_mlp()
    with torch.inference_mode():
        cube = HessianOperator.from_function(lambda x: (x**3).sum(), point)
        operator = HessianOperator(model, LOSS, [tuple(t.clone() for t in b) for b in batches()])
    assert cube.to_dense().tolist() == [[6, 0], [0, 6]]
    expected = HessianOperator(model, LOSS, batches()).to_dense()
    torch.testing.assert_close(operator.to_dense(), expected)


def test_tensors_made_in_inference_mode_are_refused_as_the_point():
    with torch.inference_mode():
        point = torch.ones(2)
    with pytest.raises(ArgumentError, match=r"tensor 0 was made under torch\.inference_mode"):
        HessianOperator.from_function(lambda x: (x**3).sum(), point)


# --- modes that make the loss random or dependent on the batches ---------------------------------


def refused(model, match, **options):
    with pytest.raises(StochasticModelError, match=match):
        HessianOperator(model, LOSS, batches(), **options)


class DropPath(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.drop_prob = 0.1

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Dropout(0.5), r"\(Dropout\) is in training mode: it drops at random, p=0\.5"),
        (nn.Dropout2d(0.1), "drops at random"),
        (nn.AlphaDropout(0.1), "drops at random"),
        (nn.FeatureAlphaDropout(0.1), "drops at random"),
        (DropPath(), r"\(DropPath\).*p=0\.1"),
        (nn.LSTM(3, 3, num_layers=2, dropout=0.2), r"\(LSTM\).*p=0\.2"),
        (nn.MultiheadAttention(4, 2, dropout=0.3), r"\(MultiheadAttention\).*p=0\.3"),
        (nn.RReLU(), r"\(RReLU\).*random slopes"),
        (nn.BatchNorm1d(3), r"\(BatchNorm1d\) is in training mode: batch statistics"),
        (nn.SyncBatchNorm(3), "batch statistics"),
        (nn.InstanceNorm1d(3, track_running_stats=True), "changes its statistics"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_training_mode_is_refused_with_the_module_named(module, reason):
    model = nn.Sequential(nn.Linear(6, 3), nn.Sequential(nn.Tanh(), module))
    match = rf"module '1\.1' .*{reason}.*model\.eval\(\).*allow_training_mode=True"
    refused(model.train(), match)
    HessianOperator(model.eval(), LOSS, batches())
    HessianOperator(model.train(), LOSS, batches(), allow_training_mode=True)


class Functional(nn.Module):
    """Dropout as a function: no module tells of it."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.double()

    def forward(self, x):
        return self.last(functional.dropout(torch.tanh(self.first(x)), 0.5, self.training))


@pytest.mark.parametrize("graph", ["fresh", "retained"])
def test_dropout_as_a_function_is_refused_or_frozen_too(graph):
    model = Functional().train()
    operator = HessianOperator(model, LOSS, batches(), graph=graph)
    match = r"supervised.* on batch 0 drew random numbers.*model\.eval\(\).*allow_training_mode"
    for question in (lambda: operator @ vector(operator), operator.value, operator.gradient):
        with pytest.raises(StochasticModelError, match=match):
            question()
    frozen = HessianOperator(model, LOSS, batches(), graph=graph, allow_training_mode=True)
    matrix = frozen.to_dense()
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-13)
    torch.rand(3)
    torch.testing.assert_close(frozen.to_dense(), matrix)
    still = HessianOperator(model.eval(), LOSS, batches(), graph=graph).to_dense()
    assert (matrix - still).norm() > 0.1 * still.norm()


def test_a_function_that_draws_is_refused_unless_it_seeds_itself():
    def noisy(x):
        return (x**2 * torch.rand(2)).sum()

    def seeded(x):
        torch.manual_seed(0)
        return noisy(x)

    with pytest.raises(StochasticModelError, match=r"function .*noisy drew random.*Draw them once"):
        HessianOperator.from_function(noisy, torch.ones(2)).to_dense()
    torch.manual_seed(0)
    expected = torch.diag(2 * torch.rand(2))
    for seed in (0, 1):
        torch.manual_seed(seed)
        matrix = HessianOperator.from_function(seeded, torch.ones(2)).to_dense()
        torch.testing.assert_close(matrix, expected)


def test_the_number_of_further_modules_is_told():
    model = nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.5), nn.Dropout(0.1))
    refused(model.train(), r"'1'.*\(and 1 more such modules\)")


@pytest.mark.parametrize(
    "module",
    [
        nn.Dropout(0.0),
        nn.LSTM(3, 3, dropout=0.0),
        nn.LSTM(3, 3),
        nn.MultiheadAttention(4, 2),
        nn.InstanceNorm1d(3),
        nn.LayerNorm(3),
        nn.GroupNorm(1, 3),
    ],
    ids=repr,
)
def test_modules_that_do_the_same_in_training_mode_are_welcome(module):
    model = nn.Sequential(nn.Linear(6, 3), module)
    HessianOperator(model.train(), LOSS, batches())


def test_batch_norm_without_running_statistics_is_refused_in_eval_mode_too():
    model = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3, track_running_stats=False)).double()
    refused(model.eval(), r"'1' \(BatchNorm1d\) keeps no running statistics.*track_running_stats")


def test_a_model_switched_to_training_mode_later_is_refused_at_the_next_product():
    model = Normalised().eval()
    operator = HessianOperator(model, LOSS, batches(), graph="retained")
    operator @ vector(operator)
    model.train()
    with pytest.raises(StochasticModelError, match="'norm'"):
        operator @ vector(operator)


def test_eval_batch_norm_is_an_affine_layer():
    model = Normalised().eval()
    model.norm.running_mean.uniform_(-1, 1)
    model.norm.running_var.uniform_(0.5, 2)
    x, y = wine()
    operator = HessianOperator(model, LOSS, batches(50))
    expected = dense_hessian(model, lambda call: functional.cross_entropy(call(x), y))
    torch.testing.assert_close(operator.to_dense(), expected, rtol=1e-9, atol=1e-12)


def test_training_batch_norm_is_differentiated_through_the_batch_statistics():
    model = Normalised(rate=0.0).train()
    data = batches(60)
    operator = HessianOperator(model, LOSS, data, allow_training_mode=True)

    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = model.first, model.norm, model.last

        def forward(self, x):
            h = self.first(x)
            centred = h - h.mean(0)
            h = centred / (centred.square().mean(0) + self.norm.eps).sqrt()
            return self.last(torch.tanh(h * self.norm.weight + self.norm.bias))

    def loss(call):
        sums = [functional.cross_entropy(call(x), y, reduction="sum") for x, y in data]
        return sum(sums) / sum(len(y) for _, y in data)

    expected = dense_hessian(Written(), loss)
    torch.testing.assert_close(operator.to_dense(), expected, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("graph", ["fresh", "retained"])
@pytest.mark.parametrize("microbatch", [None, 25])
def test_dropout_in_training_mode_gives_one_symmetric_operator(graph, microbatch):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    operator = HessianOperator(
        model.train(),
        LOSS,
        batches(),
        graph=graph,
        microbatch=microbatch,
        allow_training_mode=True,
    )
    matrix = operator.to_dense()
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-13)
    torch.rand(3)
    v = torch.ones(len(matrix), dtype=torch.float64)
    torch.testing.assert_close(operator @ v, matrix.sum(1))
    torch.testing.assert_close(operator @ v, matrix.sum(1))
    still = HessianOperator(model.eval(), LOSS, batches()).to_dense()
    assert (matrix - still).norm() > 0.1 * still.norm()


def test_dropout_masks_belong_to_their_batch():
    seen = []

    class Recording(nn.Dropout):
        def forward(self, x):
            y = super().forward(x)
            seen.append((y != 0).detach())
            return y

    model = nn.Sequential(Recording(0.5), nn.Linear(6, 3)).double().train()
    x, y = torch.ones(4, 6, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    operator = HessianOperator(
        model, LOSS, [(x, y), (x, y)], allow_training_mode=True, graph="fresh"
    )
    operator @ vector(operator)
    operator @ vector(operator)
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    assert not torch.equal(seen[0], seen[1])
    other = HessianOperator(model, LOSS, [(x[:2], y[:2]), (x, y)], allow_training_mode=True)
    other @ vector(other)
    assert torch.equal(seen[5], seen[1])


def test_microbatches_under_batch_statistics_are_refused():
    with pytest.raises(
        ArgumentError, match=r"'norm' computes statistics.*microbatches would change"
    ):
        HessianOperator(
            Normalised().train(), LOSS, batches(), microbatch=10, allow_training_mode=True
        )


# --- data ----------------------------------------------------------------------------------------


def generator():
    yield from batches()


def test_a_generator_is_refused_and_the_way_out_is_named():
    for once in (generator(), map(tuple, batches()), iter(batches())):
        with pytest.raises(DataError, match=r"only once.*list\(data\).*hold_data=True"):
            HessianOperator(tanh_mlp(), LOSS, once)


def test_a_generator_is_held_in_memory_when_asked_to():
    model = tanh_mlp()
    held = HessianOperator(model, LOSS, generator(), hold_data=True)
    expected = HessianOperator(model, LOSS, batches()).to_dense()
    torch.testing.assert_close(held.to_dense(), expected)
    torch.testing.assert_close(held.to_dense(), expected)
    torch.testing.assert_close(held.block("4.*").to_dense(), expected[-15:, -15:])


@pytest.mark.parametrize("data", [[], (), DataLoader(TensorDataset(torch.ones(0, 6)))])
def test_data_without_a_batch_are_refused(data):
    operator = HessianOperator(tanh_mlp(), LOSS, data)
    for question in (operator.value, operator.gradient, operator.to_dense):
        with pytest.raises(DataError, match=r"hold no batch\. .*generator that was used up.*list"):
            question()


def test_an_exhausted_generator_that_is_held_is_refused():
    used = generator()
    list(used)
    operator = HessianOperator(tanh_mlp(), LOSS, used, hold_data=True)
    with pytest.raises(DataError, match="hold no batch"):
        operator.value()


def test_data_that_run_dry_are_refused_in_the_second_pass():
    class Once:
        def __init__(self):
            self.source = generator()

        def __iter__(self):
            return self.source

    operator = HessianOperator(tanh_mlp(), LOSS, Once(), graph="fresh")
    operator @ vector(operator)
    with pytest.raises(DataError, match=r"no batch in this pass, 3 before"):
        operator @ vector(operator)


@pytest.mark.parametrize("change", [list.pop, lambda data: data.append(data[0])])
def test_data_that_change_their_length_are_refused(change):
    data = batches()
    operator = HessianOperator(tanh_mlp(), LOSS, data)
    operator.value()
    change(data)
    with pytest.raises(DataError, match=r"held 3 batches in the first pass and [24].*hold_data"):
        operator @ vector(operator)


def test_held_data_do_not_follow_the_callers_list():
    data = batches()
    operator = HessianOperator(tanh_mlp(), LOSS, data, hold_data=True)
    value = operator.value()
    data.pop()
    assert operator.value() == value


@pytest.mark.parametrize("hold_data", [True, False])
@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (torch.ones(3, 6), "Tensor"),
        ({"x": torch.ones(3, 6)}, "dict"),
        ("data.csv", "str"),
        (5, "int"),
        (None, "NoneType"),
    ],
)
def test_what_is_no_collection_of_batches_is_refused(data, kind, hold_data):
    with pytest.raises(ArgumentTypeError, match=rf"data is a {kind}, .*\[batch\]"):
        HessianOperator(tanh_mlp(), LOSS, data, hold_data=hold_data)


def test_one_batch_without_its_list_is_refused():
    operator = HessianOperator(tanh_mlp(), LOSS, wine())
    with pytest.raises(DataError, match=r"takes batches \(inputs, targets\), got a Tensor"):
        operator.value()


@pytest.mark.parametrize("own", [None, 3])
def test_a_loader_that_shuffles_and_drops_the_rest_gives_the_same_data_in_every_pass(own):
    generator = own and torch.Generator().manual_seed(own)
    loader = DataLoader(
        TensorDataset(*wine()), batch_size=100, shuffle=True, drop_last=True, generator=generator
    )
    state = generator and generator.get_state()
    operator = HessianOperator(tanh_mlp(), LOSS, loader)
    first = operator.value()
    torch.rand(5)
    assert operator.value() == first
    v = torch.from_numpy(vector(operator))
    product = operator @ v
    torch.manual_seed(99)
    assert torch.equal(operator @ v, product)
    if generator:
        assert torch.equal(generator.get_state(), state)


def test_tensors_are_found_in_any_nesting():
    Pair = namedtuple("Pair", "x extra")
    seen = []

    def loss(model, batch):
        seen.append(batch)
        return functional.cross_entropy(model(batch.x["in"]), batch.extra[0][1])

    x, y = wine()
    batch = Pair({"in": x, "name": "wine"}, [(None, y), 3])
    operator = HessianOperator(tanh_mlp(), loss, [batch], microbatch=100)
    operator.value()
    assert {type(b) for b in seen} == {Pair}
    # Before, the whole and its parts: is the loss a mean over samples?
    assert [len(b.x["in"]) for b in seen] == [178, 100, 78, 100, 78]
    assert seen[0].x["name"] == "wine"
    assert seen[0].extra[1] == 3


@pytest.mark.parametrize("microbatch", [0, -3])
def test_microbatches_hold_at_least_one_sample(microbatch):
    with pytest.raises(ArgumentError, match=f"microbatch={microbatch}.*at least 1"):
        HessianOperator(tanh_mlp(), LOSS, batches(), microbatch=microbatch)


@pytest.mark.parametrize("microbatch", [2.0, "8"])
def test_microbatches_are_counted_in_whole_numbers(microbatch):
    with pytest.raises(ArgumentTypeError, match="expected a whole number"):
        HessianOperator(tanh_mlp(), LOSS, batches(), microbatch=microbatch)


@pytest.mark.parametrize(
    ("batch", "sizes"),
    [
        ((torch.ones(4, 6), torch.ones(3)), r"\[3, 4\]"),
        ((torch.ones(4, 6), torch.tensor(1)), r"\[-1, 4\]"),
        (("a", "b"), r"\[\]"),
    ],
)
def test_batches_that_cannot_be_split_are_refused(batch, sizes):
    operator = HessianOperator(tanh_mlp(), LOSS, [batch], microbatch=2)
    with pytest.raises(DataError, match=f"batch 0 cannot be split.*{sizes}"):
        operator.value()


# --- losses --------------------------------------------------------------------------------------


def question_of(loss, match, kind=LossError, *, data=None, model=None, **options):
    operator = HessianOperator(model or tanh_mlp(), loss, data or batches(), **options)
    for question in (lambda: operator @ vector(operator), operator.gradient):
        with pytest.raises(kind, match=match):
            question()


@pytest.mark.parametrize(
    ("broken", "match"),
    [
        (lambda value: value.item(), r"loss of batch 0 is a float.*leave out \.item\(\)"),
        (lambda _: None, "loss of batch 0 is None; return it"),
        (lambda value: value.detach().numpy(), "is a ndarray"),
        (lambda value: torch.stack([value, value]), r"has shape \(2,\).*\.mean\(\) or \.sum\(\)"),
        (lambda value: value.new_zeros(0), r"has shape \(0,\)"),
        (lambda value: value * 1j, "has dtype torch.complex128"),
        (lambda value: value.long(), "has dtype torch.int64"),
        (lambda value: value.detach(), r"does not depend on the selected parameters.*\.detach\(\)"),
        (lambda value: value.new_ones(()), "does not depend on the selected parameters"),
    ],
)
def test_what_is_no_differentiable_scalar_is_refused(broken, match):
    question_of(lambda model, batch: broken(LOSS(model, batch)), match)


def test_a_loss_of_one_entry_is_a_scalar():
    model = tanh_mlp()
    operator = HessianOperator(model, lambda m, b: LOSS(m, b).reshape(1, 1), batches())
    torch.testing.assert_close(
        operator.to_dense(), HessianOperator(model, LOSS, batches()).to_dense()
    )


def test_a_loss_that_does_not_depend_on_the_selection_is_refused():
    model = nn.ModuleDict({"used": nn.Linear(6, 3), "other": nn.Linear(2, 2)}).double()
    question_of(
        lambda m, b: LOSS(m["used"], b),
        "does not depend.*all of 2.*params=",
        model=model,
        params="other.*",
    )


def test_a_loss_that_raises_is_reported_with_the_batch_and_its_own_error():
    def loss(model, batch):
        if float(batch[1][0]) == 2:
            raise ZeroDivisionError("own words")
        return LOSS(model, batch)

    operator = HessianOperator(tanh_mlp(), loss, batches(45))
    with pytest.raises(LossError, match="ZeroDivisionError on batch 3: own words") as caught:
        operator @ vector(operator)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("graph", ["fresh", "retained"])
def test_a_loss_that_is_not_finite_names_its_batch(bad, graph):
    data = batches(30)
    data[4][0][3, 2] = bad

    def loss(model, batch):
        return (model(batch[0]).square().mean(1) + batch[0].sum(1)).mean()

    match = rf"loss of batch 4 is (nan|{bad}).*log\(0\)"
    question_of(loss, match, NonFiniteError, data=data, graph=graph)
    question_of(
        loss, "loss of batch 4, microbatch 1", NonFiniteError, data=data, microbatch=2, graph=graph
    )


def test_a_microbatch_that_is_not_finite_is_named():
    data = batches(30)
    data[1][0][25, 0] = float("nan")
    question_of(
        LOSS, "loss of batch 1, microbatch 2 is nan", NonFiniteError, data=data, microbatch=10
    )


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (nn.CrossEntropyLoss(), r"takes the model and a batch.*supervised\(CrossEntropyLoss\(\)\)"),
        (nn.CrossEntropyLoss, r"expected a function loss\(model, batch\)"),
        ("mse", r"expected a function loss\(model, batch\) -> scalar, got 'mse'"),
        (None, "expected a function"),
    ],
)
def test_what_is_no_loss_of_model_and_batch_is_refused(loss, match):
    with pytest.raises(ArgumentTypeError, match=match):
        HessianOperator(tanh_mlp(), loss, batches())


@pytest.mark.parametrize("model", [nn.Linear, lambda x: x, None, {"weight": torch.ones(2)}])
def test_what_is_no_module_is_refused(model):
    with pytest.raises(ArgumentTypeError, match=r"expected a torch\.nn\.Module.*from_function"):
        HessianOperator(model, LOSS, batches())


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ArgumentError, match="reduction='none'; expected 'mean' or 'sum'"):
        HessianOperator(tanh_mlp(), LOSS, batches(), reduction="none")


def test_a_reduction_that_contradicts_the_criterion_is_refused():
    with pytest.raises(ArgumentError, match="reduces each batch by 'mean'; give the criterion"):
        HessianOperator(tanh_mlp(), LOSS, batches(), reduction="sum")
    HessianOperator(tanh_mlp(), LOSS, batches(), reduction="mean")


def test_parameters_without_derivatives_are_named():
    model = tanh_mlp()
    model.count = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)
    HessianOperator(model, LOSS, batches())
    with pytest.raises(ParameterSelectionError, match=r"'count' has dtype torch\.int64"):
        HessianOperator(model, LOSS, batches(), "*")


# --- functions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "tensors", "kind", "match"),
    [
        ("f", [torch.ones(1)], ArgumentTypeError, "expected a function of the tensors, got a str"),
        (torch.sum, [], ArgumentError, "no tensors to differentiate by"),
        (torch.sum, 3.0, ArgumentTypeError, "tensors is a float"),
        (torch.sum, [1.0], ArgumentTypeError, r"tensor 0 is a float; wrap it in torch\.tensor"),
        (torch.sum, [torch.ones(1), torch.ones(1).long()], ArgumentTypeError, "tensor 1 has dtype"),
        (torch.sum, [torch.ones(1) * 1j], ArgumentTypeError, "tensor 0 has dtype torch.complex64"),
    ],
)
def test_what_is_no_function_of_tensors_is_refused(function, tensors, kind, match):
    with pytest.raises(kind, match=match):
        HessianOperator.from_function(function, tensors)


def test_the_callers_tensors_stay_out_of_the_graph():
    root = torch.ones(2, requires_grad=True)
    grown = (root * 3).exp()
    operator = HessianOperator.from_function(lambda a, b: (a**3 * b).sum(), [root, grown])
    operator.to_dense()
    operator.block("tensor0").to_dense()
    assert root.grad is None
    assert root.requires_grad
    grown.sum().backward()


def test_failures_of_a_function_are_told_as_such():
    def fail(_):
        raise KeyError

    with pytest.raises(LossError, match="the loss raised KeyError on the function"):
        HessianOperator.from_function(fail, torch.ones(1)).value()
    operator = HessianOperator.from_function(lambda x: x.log().sum(), torch.tensor([-1.0]))
    with pytest.raises(NonFiniteError, match="loss of the function is nan"):
        operator.value()


# --- what an objective says of itself ------------------------------------------------------------


def test_the_description_names_model_loss_and_data():
    objective = ModelObjective(tanh_mlp(), LOSS, batches(), microbatch=7)
    assert list(objective.parts())[-1].label == "batch 2, microbatch 8"
    assert objective.describe() == {
        "objective": "model",
        "model": "Sequential",
        "model_parameters": 74,
        "loss": "supervised(CrossEntropyLoss())",
        "reduction": "mean",
        "batches": 3,
        "microbatch": 7,
        "training_mode": False,
    }


class Routed(nn.Module):
    """Each sample goes to the best of a few experts."""

    def __init__(self, top_k):
        super().__init__()
        self.top_k, self.num_experts = top_k, 3
        self.router = nn.Linear(6, 3)
        self.experts = nn.ModuleList(nn.Linear(6, 3) for _ in range(3))
        self.double()

    def forward(self, x):
        scores, chosen = self.router(x).softmax(-1).topk(self.top_k)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=1)
        used = outputs.gather(1, chosen[..., None].expand(-1, -1, 3))
        return (scores[..., None] * used).sum(1)


@pytest.mark.parametrize(("top_k", "noted"), [(1, True), (2, True), (3, False)])
def test_a_choice_of_experts_is_noted_as_long_as_it_is_one(top_k, noted):
    objective = ModelObjective(nn.Sequential(Routed(top_k), Routed(top_k)), LOSS, batches())
    notes = objective.describe().get("notes", [])
    assert len(notes) == noted
    if noted:
        assert (
            f"module '0' (Routed) sends each token to {top_k} of 3 experts (and 1 more" in notes[0]
        )


@pytest.mark.parametrize(
    "loss",
    [
        lambda model, batch: functional.cross_entropy(model(batch[0]), batch[1], reduction="sum"),
        lambda model, batch: (model(batch[0]) @ model(batch[0]).T).square().mean(),
    ],
    ids=["a sum", "samples compared with one another"],
)
def test_microbatches_of_a_loss_that_is_no_mean_over_samples_are_refused(loss):
    operator = HessianOperator(tanh_mlp(), loss, batches(), microbatch=7)
    with pytest.raises(LossError, match="put together from microbatches of 7"):
        operator.gradient()


def test_microbatches_of_a_sum_that_is_called_one_are_right():
    def loss(model, batch):
        return functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    model = tanh_mlp()
    whole, split = (
        HessianOperator(model, loss, batches(), reduction="sum", microbatch=size).gradient()
        for size in (None, 7)
    )
    torch.testing.assert_close(whole, split, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("draw", [np.random.rand, random.random])
def test_numbers_of_other_generators_than_pytorch_s_are_refused(draw):
    def loss(model, batch):
        return functional.cross_entropy(model(batch[0]), batch[1]) * (1 + draw())

    with pytest.raises(StochasticModelError, match="NumPy's or Python's generator"):
        HessianOperator(tanh_mlp(), loss, batches()).value()


def test_a_loss_that_goes_into_training_mode_for_a_while_is_refused_and_changes_nothing():
    x, y = wine()
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def loss(model, batch):
        model.train()
        value = functional.cross_entropy(model(batch[0]), batch[1])
        model.eval()
        return value

    with pytest.raises(StochasticModelError, match="module '1' into training mode for a while"):
        HessianOperator(model, loss, [(x, y)]).gradient()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_loss_that_calls_backward_is_refused_and_changes_no_gradient():
    model = tanh_mlp()
    kept = torch.ones_like(model[0].weight)
    model[0].weight.grad = kept

    def loss(model, batch):
        value = functional.cross_entropy(model(batch[0]), batch[1])
        value.backward(retain_graph=True)
        return value

    with pytest.raises(LossError, match=r"called backward\(\)"):
        HessianOperator(model, loss, batches()).gradient()
    assert model[0].weight.grad is kept
    assert bool((kept == 1).all())
    assert model[2].weight.grad is None


def test_two_parameters_on_one_memory_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(model[0].weight.data)
    with pytest.raises(ParameterSelectionError, match=r"'0\.weight' and '1\.weight' are two"):
        HessianOperator(model, LOSS, batches())


# --- data on another device, or in another dtype -------------------------------------------------


def addresses(data, **options):
    """Where the inputs of each batch are, pass by pass; the operator; its products."""
    places = []

    def loss(model, batch):
        places.append(batch[0].data_ptr())
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

    model = tanh_mlp(dtype=torch.float32)
    H = HessianOperator(model, loss, data, graph="fresh", compute_dtype=torch.float64, **options)
    return places, H


def test_batches_at_hand_are_converted_once():
    x, y = wine(torch.float32)
    places, H = addresses([(x[:90], y[:90]), (x[90:], y[90:])])
    v = torch.ones(H.shape[0], dtype=H.space.dtype)
    first, second = H.apply(v), H.apply(v)
    assert len(set(places)) == 2
    assert torch.equal(first, second)
    H.release()
    assert torch.equal(H.apply(v), first)


def test_copies_of_batches_that_change_are_made_again():
    x, y = (t.clone() for t in wine(torch.float32))
    data = [(x, y)]
    _, H = addresses(data)
    v = torch.ones(H.shape[0], dtype=H.space.dtype)
    before = H.apply(v)
    x.mul_(2.0)
    after = H.apply(v)
    assert not torch.allclose(after, before)
    data[0] = (x.clone(), y)
    assert torch.equal(H.apply(v), after)
    _, other = addresses(data)
    other.objective.model.load_state_dict(H.objective.model.state_dict())
    assert torch.equal(other.apply(v), after)


def test_a_copy_that_the_loss_changes_is_not_used_again():
    x, y = wine(torch.float32)

    def loss(model, batch):
        inputs = batch[0]
        output = torch.nn.functional.cross_entropy(model(inputs.clone()), batch[1])
        inputs.mul_(2.0)
        return output

    model = tanh_mlp(dtype=torch.float32)
    H = HessianOperator(model, loss, [(x, y)], graph="fresh", compute_dtype=torch.float64)
    v = torch.ones(H.shape[0], dtype=H.space.dtype)
    assert torch.equal(H.apply(v), H.apply(v))


def test_copies_take_an_eighth_of_the_free_memory_at_most(monkeypatch):
    x, y = wine(torch.float32)
    # Room for the first of two batches.
    monkeypatch.setattr(reading_batches, "free_bytes", lambda device: 8 * 90 * x.shape[1] * 8)
    places, H = addresses([(x[:90], y[:90]), (x[:90].clone(), y[:90])])
    v = torch.ones(H.shape[0], dtype=H.space.dtype)
    results = [H.apply(v) for _ in range(3)]
    assert places[0] == places[2] == places[4]
    assert len(H.objective._reader.moved._copies) == 1
    assert all(torch.equal(results[0], other) for other in results)
