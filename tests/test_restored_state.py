"""Whatever interrupts a call: everything is as it was found, and the operator still works."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import spectra
from spectra import HessianOperator, losses
from spectra.oracle import chunks
from tests.cases.networks import Block
from tests.cases.states import state_of

TOKENS = torch.randint(7, (5, 6), generator=torch.Generator().manual_seed(1))
CLASSES = torch.randint(3, (5,), generator=torch.Generator().manual_seed(2))


class Interrupted(Exception):
    """What is injected."""


class Fuse:
    """Raises when it has been asked so many times."""

    def __init__(self):
        self.left = None
        self.kind = Interrupted

    def burn(self):
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                raise self.kind


class Backward(torch.autograd.Function):
    """The identity, whose backward pass asks the fuse."""

    @staticmethod
    def forward(ctx, x, fuse):
        ctx.fuse = fuse
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.fuse.burn()
        return Backward.apply(grad, ctx.fuse), None


class Model(nn.Module):
    """What spectra touches: attention, blocks, a checkpoint, dropout, batch norm, frozen parts."""

    def __init__(self, fuse, place):
        super().__init__()
        self.fuse, self.place = fuse, place
        self.embedding = nn.Embedding(7, 4)
        self.blocks = nn.ModuleList([Block(4, 2) for _ in range(2)])
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 3)
        self.double()

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        if self.place == "forward":
            self.fuse.burn()
        if self.place == "backward":
            x = Backward.apply(x, self.fuse)
        return self.head(self.norm(self.drop(x.mean(1))))


def make(place, *, training=False):
    """A model in a state of its own, the loss, the data, and what triggers an interruption."""
    fuse = Fuse()
    model = Model(fuse, place)
    model.train(training)
    model.drop.train(not training)
    model.blocks[1].norm1.weight.requires_grad_(False)
    model.head.bias.grad = torch.full_like(model.head.bias, 7.0)
    model.head.register_forward_hook(lambda *_: None)
    model.head.register_full_backward_hook(lambda *_: None)
    model.head.weight.register_hook(lambda grad: 2 * grad)
    supervised = losses.supervised(nn.CrossEntropyLoss())

    def loss(model, batch):
        if place == "loss":
            fuse.burn()
        value = supervised(model, batch)
        if place == "after the loss":
            fuse.burn()
        return value

    loss.weight = supervised.weight
    loss.separable = True
    if place == "hook":
        model.blocks[1].up.register_forward_hook(lambda *_: fuse.burn())
    generator = torch.Generator().manual_seed(5)
    dataset = TensorDataset(TOKENS, CLASSES)
    if place == "data":
        dataset = Reading(dataset, fuse)
    loader = DataLoader(dataset, batch_size=3, shuffle=True, generator=generator)
    return model, loss, loader, generator, fuse


class Reading(torch.utils.data.Dataset):
    """Asks the fuse for every sample."""

    def __init__(self, dataset, fuse):
        self.dataset, self.fuse = dataset, fuse

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        self.fuse.burn()
        return self.dataset[index]


COUNTS = (1, 2, 4, 9, 20, 45)
MODES = {
    "automatic": {},
    "fresh graphs": {"graph": "fresh"},
    "retained graphs": {"graph": "retained"},
    "recomputed blocks": {"recompute": "blocks.*"},
    "recomputed, fresh": {"recompute": "blocks.*", "graph": "fresh"},
    "microbatches": {"microbatch": 1},
    "no memory": {"memory_budget": 0},
    "computed in double": {"compute_dtype": torch.float64, "recompute": "blocks.*"},
    "training mode": {"allow_training_mode": True},
}
PARAMS = ["head.*", "blocks.1.*"]


def operator_of(place, options):
    model, loss, loader, generator, fuse = make(place, training="allow_training_mode" in options)
    # One dropout module is in training mode.
    options = {"allow_training_mode": True} | options
    return HessianOperator(model, loss, loader, PARAMS, **options), model, generator, fuse


def interrupted(place, options, question, *, kind=Interrupted, counts=COUNTS):
    """Interrupt a question at its first, second, … moment; how often that was possible."""
    expected, times = None, 0
    for count in counts:
        torch.manual_seed(0)
        operator, model, generator, fuse = operator_of(place, options)
        before = state_of(model, generator)
        fuse.left, fuse.kind = count, kind
        try:
            question(operator)
        except (spectra.SpectraError, kind):
            times += 1
        finally:
            whole, fuse.left = fuse.left, None
        assert changes(before, model, generator) == set()
        if whole > 0:
            break
        assert whole == 0
        product = multiplied(operator)
        if expected is None:
            with torch.random.fork_rng():
                clean, *_ = operator_of(place, options)
            clean.objective.model.load_state_dict(model.state_dict())
            expected = multiplied(clean)
        torch.testing.assert_close(product, expected, rtol=1e-10, atol=1e-12)
        assert changes(before, model, generator) == set()
    return times


def changes(before, *watched):
    after = state_of(*watched)
    return {key for key in before if before[key] != after[key]}


def multiplied(operator):
    return operator @ torch.linspace(-1, 1.3, operator.shape[0], dtype=torch.float64)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("place", ["hook", "backward", "data"])
def test_a_product_that_is_interrupted_anywhere_leaves_everything_as_it_was(place, mode):
    assert interrupted(place, MODES[mode], multiplied) > 1


@pytest.mark.parametrize("mode", ["automatic", "recomputed, fresh"])
@pytest.mark.parametrize("place", ["loss", "after the loss", "forward"])
def test_a_loss_that_raises_at_any_call_leaves_everything_as_it_was(place, mode):
    assert interrupted(place, MODES[mode], multiplied) > 1


@pytest.mark.parametrize("mode", ["automatic", "recomputed, fresh", "computed in double"])
@pytest.mark.parametrize("place", ["loss", "hook", "backward"])
def test_control_c_at_any_moment_leaves_everything_as_it_was(place, mode):
    assert interrupted(place, MODES[mode], multiplied, kind=KeyboardInterrupt) > 1


@pytest.mark.parametrize("place", ["loss", "hook", "backward"])
@pytest.mark.parametrize("mode", ["automatic", "recomputed, fresh"])
def test_attention_in_chunks_that_is_interrupted_leaves_everything_as_it_was(
    place, mode, monkeypatch
):
    monkeypatch.setattr(chunks, "_BYTES", 1)
    monkeypatch.setattr(chunks, "_FEWEST_QUERIES", 2)
    assert interrupted(place, MODES[mode], multiplied) > 1
    operator, *_ = operator_of(place, MODES[mode])
    multiplied(operator)
    assert operator.describe()["attention"] == "in chunks of queries"


QUESTIONS = {
    "value": HessianOperator.value,
    "gradient": HessianOperator.gradient,
    "value and gradient": HessianOperator.value_and_gradient,
    "several products": lambda H: H @ torch.ones(H.shape[0], 3, dtype=torch.float64),
    "quadratic forms": lambda H: H.quadratic_forms(torch.ones(H.shape[0], 1, dtype=torch.float64)),
    "a block": lambda H: H.block("head.*").to_dense(),
    "eigsh": lambda H: spectra.eigsh(H, k=1),
    "trace": spectra.trace,
    "spectral_density": spectra.spectral_density,
    "norm": spectra.norm,
    "diagonal": spectra.diagonal,
    "solve": lambda H: spectra.solve(H, H.gradient(), damping=1.0),
    "data_spread": lambda H: spectra.data_spread(H, spectra.eigsh(H, k=1)),
    "analyze": lambda H: spectra.analyze(H, k=1),
    "check": spectra.check,
}


@pytest.mark.parametrize(
    "kind", [Interrupted, pytest.param(KeyboardInterrupt, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_that_is_interrupted_leaves_everything_as_it_was(question, kind):
    options = {"graph": "fresh", "recompute": "blocks.*"}
    ask = QUESTIONS[question]
    # The first moment, one in the first pass, one in a later pass where there is any.
    assert interrupted("hook", options, ask, kind=kind, counts=(1, 2, 14)) >= 2


@pytest.mark.parametrize("kind", [Interrupted, KeyboardInterrupt])
def test_a_function_that_is_interrupted_leaves_everything_as_it_was(kind):
    fuse, points = Fuse(), [torch.ones(3, dtype=torch.float64), torch.ones(2, requires_grad=True)]

    def function(x, y):
        fuse.burn()
        return (Backward.apply(x, fuse) ** 3).sum() + (y**2).sum()

    for count in range(1, 4):
        operator = HessianOperator.from_function(function, points)
        before = state_of(*points)
        fuse.left, fuse.kind = count, kind
        with pytest.raises((spectra.SpectraError, kind)):
            operator.to_dense()
        assert changes(before, *points) == set()
        assert operator.to_dense().diagonal().tolist() == [6, 6, 6, 2, 2]


def test_the_eager_attention_of_a_language_model_is_put_back(monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(chunks, "_BYTES", 1)
    monkeypatch.setattr(chunks, "_FEWEST_QUERIES", 2)
    config = transformers.GPT2Config(
        vocab_size=7, n_positions=8, n_embd=4, n_layer=2, n_head=2, attn_implementation="eager"
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    assert model.config.use_cache
    fuse = Fuse()
    model.transformer.h[1].mlp.register_forward_hook(lambda *_: fuse.burn())
    operator = HessianOperator(
        model, losses.causal_lm(), [{"input_ids": TOKENS}], recompute="transformer.h"
    )
    vector = torch.ones(operator.shape[0])
    for count in (1, 2, 3):
        before = state_of(model)
        fuse.left = count
        with pytest.raises((Interrupted, spectra.SpectraError)):
            operator @ vector
        assert changes(before, model) == set()
    operator @ vector
    assert changes(before, model) == set()
