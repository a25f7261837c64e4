import functools

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.utils.checkpoint import checkpoint

from spectra import HessianOperator, eigsh
from spectra.errors import ArgumentError, ArgumentTypeError
from spectra.objective.losses import causal_lm, supervised
from spectra.oracle.recompute import UnsuitableSegmentError, recompute
from spectra.oracle.segments import repeated_blocks
from tests.cases.networks import StackedGPT, dense_hessian

LOSS = causal_lm()


def gpt(blocks=3):
    torch.manual_seed(0)
    return StackedGPT(blocks).double().eval()


def tokens():
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 7, (size, 6), generator=generator)} for size in (3, 2)]


def products(operator):
    generator = torch.Generator().manual_seed(2)
    n = operator.shape[0]
    return operator.apply(torch.randn(n, 3, generator=generator, dtype=torch.float64))


def exact_products():
    return products(HessianOperator(gpt(), LOSS, tokens(), recompute="none"))


def close(found, expected):
    assert (found - expected).norm() < 1e-12 * expected.norm()


# --- which modules -------------------------------------------------------------------------------


def test_the_blocks_of_a_model_are_what_it_repeats():
    assert list(repeated_blocks(gpt())) == ["blocks.0", "blocks.1", "blocks.2"]


def test_layers_without_parts_and_single_blocks_are_none():
    assert repeated_blocks(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))) == {}
    assert repeated_blocks(gpt(blocks=1)) == {}


def test_the_outermost_repetition_counts_and_lists_of_lists_are_searched():
    def stage():
        return nn.Sequential(nn.Linear(2, 2), nn.Tanh())

    inner = nn.ModuleList([stage(), stage()])
    model = nn.ModuleDict({"a": nn.ModuleList([inner, nn.ModuleList([stage(), stage()])])})
    assert list(repeated_blocks(model)) == ["a.0.0", "a.0.1", "a.1.0", "a.1.1"]
    nested = nn.Sequential(nn.Linear(2, 2), nn.Sequential(stage(), stage()), nn.Sequential(stage()))
    assert list(repeated_blocks(nested)) == ["1", "2"]


@pytest.mark.parametrize(
    ("recompute", "blocks"),
    [("blocks.*", 3), (["blocks.1", "head"], 2), ("*.norm?", 6), ("blocks", 3), ("b*", 3)],
)
@pytest.mark.parametrize("graph", ["fresh", "retained"])
def test_globs_name_modules_and_the_outermost_are_recomputed(recompute, blocks, graph):
    model = gpt()
    operator = HessianOperator(model, LOSS, tokens(), recompute=recompute, graph=graph)
    close(products(operator), exact_products())
    close(products(operator), exact_products())
    assert operator.describe()["recompute"] == {"blocks": blocks}


@pytest.mark.parametrize(
    ("recompute", "message", "error"),
    [
        ("layers.*", r"no module matches 'layers.\*'. Near matches: 'blocks", ArgumentError),
        ([], "expected 'auto', 'none', or globs", ArgumentTypeError),
        ([3], "expected 'auto', 'none', or globs", ArgumentTypeError),
        (3, "recompute=3; expected 'auto', 'none', or globs", ArgumentTypeError),
        (None, "recompute=NoneType; expected 'auto'", ArgumentTypeError),
        (nn.Linear(2, 2), "recompute=Linear; expected 'auto'", ArgumentTypeError),
    ],
)
def test_wrong_choices_are_refused(recompute, message, error):
    with pytest.raises(error, match=message):
        HessianOperator(gpt(), LOSS, tokens(), recompute=recompute)


def test_results_say_what_was_recomputed():
    pairs = eigsh(HessianOperator(gpt(), LOSS, tokens(), recompute="blocks.*"), k=1)
    assert pairs.provenance["operator"]["recompute"] == {"blocks": 3}


def test_where_nothing_is_recomputed_nothing_is_said():
    operator = HessianOperator(gpt(), LOSS, tokens())
    products(operator)
    assert "recompute" not in operator.describe()


# --- as they were --------------------------------------------------------------------------------


def test_the_hessian_of_a_block_is_that_of_the_block():
    blocks = [
        HessianOperator(gpt(), LOSS, tokens(), recompute=recompute).block("blocks.1.norm?.*")
        for recompute in ("blocks.*", "none")
    ]
    close(blocks[0].to_dense(), blocks[1].to_dense())


def test_hooks_see_every_pass_once_and_forwards_are_put_back():
    model = gpt()
    calls = []
    model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    before = [dict(vars(module)) for module in model.modules()]
    operator = HessianOperator(model, LOSS, tokens(), recompute="blocks.*", graph="fresh")
    operator @ torch.ones(operator.shape[0], dtype=torch.float64)
    assert len(calls) == 2
    assert all("forward" not in vars(module) for module in model.modules())
    assert [vars(module).keys() for module in model.modules()] == [b.keys() for b in before]


def test_forwards_are_put_back_after_an_error():
    model = gpt()
    own = model.blocks[1].forward
    model.blocks[1].forward = own

    def loss(model, batch):
        LOSS(model, batch)
        raise KeyError("my own mistake")

    operator = HessianOperator(model, loss, tokens(), recompute="blocks.*")
    with pytest.raises(Exception, match="my own mistake"):
        operator.gradient()
    assert "forward" not in vars(model.blocks[0])
    assert vars(model.blocks[1])["forward"] == own


# --- blocks that cannot be recomputed ------------------------------------------------------------


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(torch.relu_(x))


def in_place():
    torch.manual_seed(0)
    blocks = [InPlace(), InPlace()]
    return nn.Sequential(nn.Linear(3, 4), *blocks, nn.Linear(4, 1)).double()


def regression():
    return [(torch.linspace(-1, 1, 12).double().view(4, 3), torch.ones(4, 1).double())]


def test_blocks_that_overwrite_their_inputs_are_left_alone_and_results_say_so():
    loss = supervised(nn.MSELoss())
    exact = HessianOperator(in_place(), loss, regression(), recompute="none").to_dense()
    operator = HessianOperator(in_place(), loss, regression(), memory_budget=0)
    close(operator.to_dense(), exact)
    reasons = " ".join(operator.describe()["recompute"]["because"])
    assert "no block is recomputed: module '1' (InPlace) overwrites" in reasons
    assert operator.describe()["recompute"]["blocks"] == 0


def test_blocks_that_overwrite_their_inputs_cannot_be_asked_for():
    operator = HessianOperator(in_place(), supervised(nn.MSELoss()), regression(), recompute="1")
    with pytest.raises(UnsuitableSegmentError, match=r"module '1' \(InPlace\) overwrites"):
        operator.to_dense()


class Stateful(nn.Module):
    """Its blocks read what the model sets: a mask per batch, the place of the block."""

    def __init__(self, what):
        super().__init__()
        self.blocks = nn.ModuleList(Reader(what) for _ in range(3))
        self.what = what

    def forward(self, x):
        state = self.blocks[0].state
        for i, block in enumerate(self.blocks):
            block.state = state
            if self.what == "mask":
                state["mask"] = (x[:, :1] > 0).to(x.dtype)
            else:
                state["place"] = i + 1
            x = block(x)
        return x


class Reader(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.what = what
        self.state = {}

    def forward(self, x):
        return x + torch.tanh(self.linear(x)) * self.state[self.what]


def stateful(what, **options):
    torch.manual_seed(0)
    model = Stateful(what).double()
    generator = torch.Generator().manual_seed(3)
    inputs = [torch.randn(n, 3, generator=generator).double() for n in (5, 5, 8)]
    data = [(x, torch.ones_like(x)) for x in inputs]
    return HessianOperator(model, supervised(nn.MSELoss()), data, **options)


@pytest.mark.parametrize("what", ["mask", "place"])
@pytest.mark.parametrize("options", [{"recompute": "blocks.*"}, {"compute_dtype": torch.float64}])
def test_blocks_that_read_what_changes_between_calls_are_refused(what, options):
    operator = stateful(what, **options)
    match = r"module 'blocks.\d' \(Reader\) .*changes"
    with pytest.raises(UnsuitableSegmentError, match=match):
        # With graphs that are kept the first product is right.
        [products(operator) for _ in range(3)]


@pytest.mark.parametrize("what", ["mask", "place"])
def test_blocks_that_read_what_changes_are_left_alone_by_auto_and_results_say_so(what):
    operator = stateful(what, memory_budget=0)
    for _ in range(3):
        close(products(operator), products(stateful(what, recompute="none")))
    assert "no block is recomputed" in " ".join(operator.describe()["recompute"]["because"])


def test_the_variable_of_a_loop_in_a_segment_by_hand_is_noticed():
    def loss(model, batch):
        x = model.embedding(batch["input_ids"])
        for block in model.blocks:
            x = recompute(lambda z: block(z) + 0, x)  # noqa: B023
        return x.square().mean()

    operator = HessianOperator(gpt(), loss, tokens(), recompute="none")
    with pytest.raises(UnsuitableSegmentError, match=r"gave another output .* variable of a loop"):
        products(operator)


# --- checkpointing of the model's own ------------------------------------------------------------


def over_a_closure(block, held, x):
    return block(x) + 0 * held[0]


class Checkpointing(nn.Module):
    """A model that checkpoints its blocks in one of the ways that models do."""

    def __init__(self, way, reentrant):
        super().__init__()
        self.model = gpt()
        self.way = way
        self.function = functools.partial(checkpoint, use_reentrant=reentrant)
        self.reentrant = reentrant

    def forward(self, input_ids):
        m = self.model
        x = m.embedding(input_ids) + m.position(torch.arange(input_ids.shape[1]))
        for block in m.blocks:
            if self.way == "imported":
                x = checkpoint(block, x, use_reentrant=self.reentrant)
            elif self.way == "module":
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=self.reentrant)
            elif self.way == "partial":
                x = self.function(block, x)
            else:
                run = functools.partial(over_a_closure, block, [2 * x])
                x = checkpoint(lambda x, run=run: run(x), x, use_reentrant=False)
        return m.head(m.norm(x))


@pytest.mark.parametrize("way", ["imported", "module", "partial"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("recompute", ["none", "model.blocks.*"])
def test_checkpointing_of_a_models_own_is_recomputed_for_both_derivatives(
    way, reentrant, recompute
):
    model = Checkpointing(way, reentrant).eval()
    runs = []
    model.model.blocks[0].up.register_forward_hook(lambda *_: runs.append(1))
    operator = HessianOperator(model, LOSS, tokens(), recompute=recompute, graph="fresh")
    operator @ torch.ones(operator.shape[0], dtype=torch.float64)
    # Per batch: the forward pass, the gradient, the product, and the gradient that follows on it.
    assert len(runs) == 2 * 4
    close(products(operator), exact_products())
    assert torch.utils.checkpoint.checkpoint is checkpoint
    assert model.function.func is checkpoint


def test_checkpoints_over_intermediate_results_are_right_too():
    model = Checkpointing("closure", reentrant=False).eval()
    operator = HessianOperator(model, LOSS, tokens(), recompute="none")
    close(products(operator), exact_products())


def test_it_is_the_hessian_of_the_written_out_model():
    model = StackedGPT(2, width=4, vocabulary=5).double().eval()
    batches = [{"input_ids": batch["input_ids"] % 5} for batch in tokens()]

    def loss_of(call):
        # One mean over the target tokens of both batches.
        logits = [call(**batch)[:, :-1].reshape(-1, 5) for batch in batches]
        targets = [batch["input_ids"][:, 1:].reshape(-1) for batch in batches]
        return nn.functional.cross_entropy(torch.cat(logits), torch.cat(targets))

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = dense_hessian(model, loss_of)
    operator = HessianOperator(model, LOSS, batches, recompute="blocks.*")
    # No wrong matrix agrees on random vectors, and all 548 columns take much longer.
    vectors = torch.randn(len(expected), 20, dtype=torch.float64)
    difference = operator.apply(vectors) - expected @ vectors
    assert difference.norm() < 1e-9 * (expected @ vectors).norm()
