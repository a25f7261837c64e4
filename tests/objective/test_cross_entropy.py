import functools
import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from spectra import HessianOperator
from spectra.errors import ArgumentError, DoubleBackwardError
from spectra.objective import cross_entropy
from spectra.objective.losses import linear_cross_entropy
from spectra.objective.nodes import graph_nodes
from tests.cases.chunks import chunks_of
from tests.cases.networks import dense_hessian


def plain(hidden, weight, targets, bias=None, **options):
    logits = functional.linear(hidden, weight, bias)
    return functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), **options
    )


class Tied(nn.Module):
    """Embeddings that are the output layer as well, with something curved between them."""

    def __init__(self, classes, width, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, width, dtype=torch.float64))
        self.inner = nn.Parameter(torch.randn(width, width, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(classes, dtype=torch.float64)) if bias else None

    def forward(self, tokens, targets, cross_entropy, **options):
        hidden = torch.tanh(functional.embedding(tokens, self.weight) @ self.inner)
        return cross_entropy(hidden, self.weight, targets, self.bias, **options)


def tied(classes=5, width=3, shape=(4, 6), *, bias=True, ignored=0.3):
    g = torch.Generator().manual_seed(3)
    model = Tied(classes, width, bias)
    tokens = torch.randint(0, classes, shape, generator=g)
    targets = torch.randint(0, classes, shape, generator=g)
    targets[torch.rand(shape, generator=g) < ignored] = -100
    return model, (tokens, targets)


def operator(model, data, loss, **options):
    def of_batch(model, batch):
        return model(*batch, loss)

    return HessianOperator(
        model, of_batch, data, weight=lambda batch: float((batch[1] != -100).sum()), **options
    )


def assert_equal(found, expected):
    assert float((found - expected).norm()) <= 1e-12 * float(expected.norm())


@given(
    chunk=st.integers(1, 30),
    sizes=st.tuples(st.integers(2, 6), st.integers(1, 4)),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple),
    bias=st.booleans(),
    reduction=st.sampled_from(["mean", "sum"]),
)
@settings(max_examples=60)
def test_every_size_of_chunks_gives_the_derivatives_of_all_logits_at_once(
    chunk, sizes, shape, bias, reduction
):
    model, batch = tied(*sizes, shape, bias=bias)
    batch[1].reshape(-1)[0] = 0
    loss = functools.partial(linear_cross_entropy, reduction=reduction)
    expected = operator(model, [batch], functools.partial(plain, reduction=reduction))
    with chunks_of(chunk):
        found = operator(model, [batch], loss)
        vector = torch.randn(found.shape[0], dtype=torch.float64)
        assert found.value() == pytest.approx(expected.value(), rel=1e-13)
        assert_equal(found.gradient(), expected.gradient())
        product = expected @ vector
        assert float((found @ vector - product).norm()) <= 1e-12 * float(vector.norm())


@pytest.mark.parametrize("graph", ["fresh", "retained"])
@pytest.mark.parametrize("chunk", [1, 4, 7, 100])
def test_products_are_those_of_the_dense_hessian(chunk, graph):
    model, (tokens, targets) = tied()
    # The second of three chunks of 4 positions, of which none counts; a batch of which none does.
    targets[0, 4:], targets[1, :2] = -100, -100
    nothing = (tokens[3:], torch.full_like(targets[3:], -100))
    data = [(tokens[:1], targets[:1]), nothing, (tokens[1:], targets[1:])]
    matrix = dense_hessian(model, lambda call: call(tokens, targets, plain))
    with chunks_of(chunk):
        hessian = operator(model, data, linear_cross_entropy, graph=graph)
        assert_equal(hessian.to_dense(), matrix)


def test_parameters_of_one_side_alone_have_their_block():
    model, batch = tied()
    matrix = operator(model, [batch], plain).to_dense()
    with chunks_of(3):
        for chosen, places in (("weight", slice(0, 15)), ("inner", slice(15, 24))):
            hessian = operator(model, [batch], linear_cross_entropy, params=chosen)
            assert_equal(hessian.to_dense(), matrix[places, places])


def test_a_weight_that_was_computed_has_its_derivatives():
    g = torch.Generator().manual_seed(4)
    hidden = torch.randn(9, 3, generator=g, dtype=torch.float64)
    targets = torch.randint(0, 4, (9,), generator=g)
    factor = torch.randn(4, 3, generator=g, dtype=torch.float64)

    def of(loss):
        return HessianOperator.from_function(
            lambda w: loss(hidden, torch.tanh(w), targets), [factor]
        )

    with chunks_of(2):
        assert_equal(of(linear_cross_entropy).to_dense(), of(plain).to_dense())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_single(dtype):
    g = torch.Generator().manual_seed(5)
    hidden, weight = (torch.randn(n, 8, generator=g).to(dtype) for n in (300, 40))
    targets = torch.randint(0, 40, (300,), generator=g)
    with chunks_of(7):
        loss = linear_cross_entropy(hidden, weight, targets)
    logits = functional.linear(hidden, weight)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss.double(), functional.cross_entropy(logits.double(), targets), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("ignore_index", [-1, 2])
def test_positions_that_do_not_count_get_no_logits(ignore_index):
    hidden = torch.full((6, 2), torch.nan)
    hidden[1], hidden[4] = 1, 2
    targets = torch.full((6,), ignore_index)
    targets[1], targets[4] = 0, 1
    weight = torch.tensor([[1.0, 2.0], [0.5, 0.0], [1.0, 1.0]])
    found = linear_cross_entropy(hidden, weight, targets, ignore_index=ignore_index)
    torch.testing.assert_close(found, plain(hidden[[1, 4]], weight, targets[[1, 4]]))


def test_a_mean_over_no_position_is_nan_and_a_sum_zero():
    hidden, weight, targets = torch.ones(3, 2), torch.ones(4, 2), torch.full((3,), -100)
    assert linear_cross_entropy(hidden, weight, targets).isnan()
    assert linear_cross_entropy(hidden, weight, targets, reduction="sum") == 0


@pytest.mark.parametrize("target", [-1, 4])
def test_a_class_that_does_not_exist_is_refused(target):
    with pytest.raises(IndexError, match=f"Target {target} is out of bounds"):
        linear_cross_entropy(torch.ones(1, 2), torch.ones(4, 2), torch.tensor([target]))


@pytest.mark.parametrize(
    ("hidden", "weight", "targets", "message"),
    [
        ((3, 2), (4, 3), (3,), r"hidden has shape \(3, 2\) and weight \(4, 3\); expected"),
        ((3, 2), (2,), (3,), r"weight \(2,\); expected \(\.\.\., d\) and \(classes, d\)"),
        ((3, 5, 2), (4, 2), (15,), r"targets have shape \(15,\).*each position.*\(3, 5\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(hidden, weight, targets, message):
    with pytest.raises(ArgumentError, match=message):
        linear_cross_entropy(
            torch.ones(hidden), torch.ones(weight), torch.zeros(targets, dtype=torch.long)
        )


def test_a_reduction_to_no_scalar_is_refused():
    with pytest.raises(ArgumentError, match="reduction='none'; expected 'mean' or 'sum'"):
        linear_cross_entropy(
            torch.ones(1, 2), torch.ones(4, 2), torch.tensor([0]), reduction="none"
        )


@pytest.mark.parametrize(
    ("classes", "width", "dtype", "tokens"),
    [
        # 16 MiB of float32, whatever half precision was given; of float64.
        (32000, 64, torch.float32, 131),
        (32000, 64, torch.bfloat16, 131),
        (32000, 32, torch.float64, 65),
        # Wide layers make larger chunks, so that adding up gradients is little of the work.
        (32000, 200, torch.float32, 200),
        (128000, 2048, torch.bfloat16, 256),
        (10**8, 0, torch.float32, 1),
    ],
)
def test_a_chunk_is_small_but_not_beside_the_weights(classes, width, dtype, tokens):
    hidden = torch.empty(1, width, dtype=dtype)
    assert cross_entropy.tokens_in_a_chunk(classes, hidden) == tokens


def test_few_logits_are_left_to_autograd():
    hidden = torch.ones(257, 2, requires_grad=True)

    def nodes(tokens):
        loss = linear_cross_entropy(hidden[:tokens], torch.ones(4, 2), torch.zeros(tokens).long())
        return {node.name() for node in graph_nodes([loss])}

    assert "NllLossBackward0" in nodes(257)
    with chunks_of(256):
        assert "NllLossBackward0" in nodes(256)
        assert "_SumBackward" in nodes(257)


@pytest.mark.parametrize("steps", [(), (lambda x: x * 0.5,), (lambda x: x * 2, torch.tanh)])
@pytest.mark.parametrize("chosen", [(0, 1, 2), (0, 1), (1, 2), (0,), (1,), (2,)])
def test_differences_of_values_and_gradients_agree_with_the_derivatives(steps, chosen):
    g = torch.Generator().manual_seed(6)
    tensors = [torch.randn(*s, generator=g, dtype=torch.float64) for s in ((5, 2), (3, 2), (3,))]
    targets = torch.tensor([0, 2, -100, 1, 1])
    for place in chosen:
        tensors[place].requires_grad_()

    def loss(hidden, weight, bias):
        return cross_entropy.chunked_cross_entropy(
            hidden, targets, weight, bias, steps=steps, ignore_index=-100
        )

    with chunks_of(2):
        assert torch.autograd.gradcheck(loss, tensors)
        assert torch.autograd.gradgradcheck(loss, tensors)


def test_a_function_of_the_loss_has_its_derivatives():
    model, batch = tied()

    def of(loss):
        return operator(model, [batch], lambda *args: torch.exp(-(loss(*args) ** 2)))

    with chunks_of(3):
        assert_equal(of(linear_cross_entropy).to_dense(), of(plain).to_dense())


def test_a_third_derivative_is_refused():
    weight = torch.ones(4, 2, requires_grad=True)
    with chunks_of(1):
        loss = linear_cross_entropy(torch.ones(3, 2), weight, torch.arange(3))
        (first,) = torch.autograd.grad(loss, weight, create_graph=True)
        with pytest.raises(DoubleBackwardError, match=r"in chunks.*twice but no more"):
            torch.autograd.grad(first.sum(), weight, create_graph=True)


def test_under_autocast_chunks_are_as_far_off_as_all_logits_at_once():
    model, batch = tied()
    model.float()

    def of(loss):
        def under_autocast(model, batch):
            with torch.autocast("cpu", torch.bfloat16):
                return model(*batch, loss)

        return HessianOperator(model, under_autocast, [batch]).to_dense()

    exact = operator(model, [batch], plain).to_dense()
    off = float((of(plain) - exact).norm())
    assert off > 1e-3 * float(exact.norm())
    with chunks_of(3):
        assert float((of(linear_cross_entropy) - exact).norm()) < 1.5 * off


def test_gradients_of_many_chunks_in_half_precision_lose_no_more_than_their_rounding():
    g = torch.Generator().manual_seed(7)
    hidden = (1 + torch.rand(1000, 4, generator=g)).bfloat16()
    weight = torch.zeros(3, 4, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.zeros(3, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(1000, dtype=torch.long)
    with chunks_of(1):
        loss = linear_cross_entropy(hidden, weight, targets, bias, reduction="sum")
        found = torch.autograd.grad(loss, (weight, bias))
    residuals = torch.full((1000, 3), 1 / 3).double()
    residuals[:, 0] -= 1
    torch.testing.assert_close(found[0].double(), residuals.T @ hidden.double(), rtol=5e-3, atol=0)
    torch.testing.assert_close(found[1].double(), residuals.sum(0), rtol=5e-3, atol=0)


# The peak that a product adds to what the process held before, in MB.
_MEASURE = """
import json, sys
import torch
from torch.nn import functional
import spectra
from spectra.objective.memory import held_bytes, peak_bytes

torch.set_num_threads(1)
torch.manual_seed(0)
tokens, classes, width = 2048, 32000, 64
g = torch.Generator().manual_seed(0)
ids = torch.randint(0, classes, (1, tokens), generator=g)
cpu = torch.device("cpu")

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(classes, width)
        self.inner = torch.nn.Linear(width, width)
        self.head = torch.nn.Linear(width, classes, bias=False)
    def hidden(self, input_ids):
        return torch.tanh(self.inner(self.embedding(input_ids)))
    def forward(self, input_ids):
        return self.head(self.hidden(input_ids))

def linear(model, batch):
    hidden = model.hidden(batch["input_ids"])[:, :-1]
    return spectra.losses.linear_cross_entropy(
        hidden, model.head.weight, batch["input_ids"][:, 1:])

def plain(model, batch):
    logits = model(**batch)
    return functional.cross_entropy(logits[0, :-1], batch["input_ids"][0, 1:])

loss = {"linear": linear, "causal": spectra.losses.causal_lm(), "plain": plain}[sys.argv[1]]
model = Model()
data = [{"input_ids": ids}]
# What libraries take up at their first use is not the product's.
spectra.HessianOperator(model, loss, [{"input_ids": ids[:, :4]}], graph="fresh").apply(
    torch.ones(2 * classes * width + width * (width + 1)))
hessian = spectra.HessianOperator(model, loss, data, graph=sys.argv[2])
vector = torch.ones(hessian.shape[0])
before = held_bytes(cpu)
open("/proc/self/clear_refs", "w").write("5")
product = hessian @ vector
peak, held = peak_bytes(cpu) - before, held_bytes(cpu) - before
print(json.dumps([peak / 1e6, held / 1e6, float(product.norm())]))
"""


@functools.cache
def measured(loss, graph):
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, loss, graph],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads and resets the peak in /proc")
@pytest.mark.parametrize("loss", ["linear", "causal"])
def test_no_tensor_of_tokens_by_vocabulary_outlives_its_chunk(loss):
    logits = 4e-6 * 2048 * 32000
    peak, held, norm = measured(loss, "retained")
    plain_peak, plain_held, plain_norm = measured("plain", "retained")
    # Chunks of 131 tokens are a sixteenth of all, and weights and vectors are as small.
    assert peak < 2 * logits
    assert held < logits / 4
    assert plain_peak > 6 * logits
    assert plain_held > 2 * logits
    assert norm == pytest.approx(plain_norm, rel=1e-5)
