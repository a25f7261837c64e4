import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from spectra import HessianOperator
from spectra.oracle import chunks
from spectra.oracle.attention import Attention, chunked_attention
from tests.cases.networks import attention, dense_hessian

WIDTH, HEADS, LENGTH = 8, 2, 5


def split(x):
    return x.view(*x.shape[:2], HEADS, -1).transpose(1, 2)


def joined(x):
    return x.transpose(1, 2).flatten(2)


class Fused(nn.Module):
    """Causal attention by PyTorch's own function."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x):
        q, k, v = (split(part) for part in self.qkv(x).chunk(3, dim=-1))
        return joined(functional.scaled_dot_product_attention(q, k, v, is_causal=True))


class Checkpointed(Fused):
    """The same, computed a second time in the backward pass."""

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


class WrittenCausal(nn.Module):
    def __init__(self, original):
        super().__init__()
        self.original = original

    def forward(self, x):
        q, k, v = (split(part) for part in self.original.qkv(x).chunk(3, dim=-1))
        return joined(attention(q, k, v, torch.ones(LENGTH, LENGTH).tril().bool()))


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


def written_self_attention(layer, x):
    projected = functional.linear(x, layer.in_proj_weight, layer.in_proj_bias)
    q, k, v = (split(part) for part in projected.chunk(3, dim=-1))
    everything = torch.ones(LENGTH, LENGTH).bool()
    return layer.out_proj(joined(attention(q, k, v, everything)))


class WrittenSelfAttention(nn.Module):
    def __init__(self, original):
        super().__init__()
        self.original = original

    def forward(self, x):
        return written_self_attention(self.original.attention, x)


class WrittenEncoderLayer(nn.Module):
    def __init__(self, original):
        super().__init__()
        self.original = original

    def forward(self, x):
        layer = self.original
        x = layer.norm1(x + written_self_attention(layer.self_attn, x))
        return layer.norm2(x + layer.linear2(functional.gelu(layer.linear1(x))))


def encoder_layer():
    return nn.TransformerEncoderLayer(
        WIDTH, HEADS, dim_feedforward=6, dropout=0.1, activation="gelu", batch_first=True
    ).eval()


WRITTEN_OUT = {
    Fused: WrittenCausal,
    Checkpointed: WrittenCausal,
    SelfAttention: WrittenSelfAttention,
    encoder_layer: WrittenEncoderLayer,
}


def loss(model, batch):
    return model(batch).pow(3).mean()


@pytest.fixture
def batch():
    return torch.randn(3, LENGTH, WIDTH, dtype=torch.float64)


@pytest.mark.parametrize("make", WRITTEN_OUT)
def test_without_steering_the_second_derivative_does_not_exist(make, batch):
    model = make().double()
    parameters = list(model.parameters())

    def differentiate_twice():
        gradients = torch.autograd.grad(loss(model, batch), parameters, create_graph=True)
        torch.autograd.grad(sum(g.square().sum() for g in gradients), parameters)

    with pytest.raises(RuntimeError, match=r"flash_attention.* is not implemented"):
        differentiate_twice()


@pytest.mark.parametrize("graph", ["fresh", "retained"])
@pytest.mark.parametrize("make", WRITTEN_OUT)
def test_attention_is_differentiated_twice_without_the_users_doing(make, graph, batch):
    model = make().double()
    operator = HessianOperator(model, loss, [batch[:1], batch[1:]], graph=graph)
    expected = dense_hessian(WRITTEN_OUT[make](model), lambda call: call(batch).pow(3).mean())
    for _ in range(2):
        vectors = torch.randn(len(expected), 3, dtype=torch.float64)
        torch.testing.assert_close(
            operator.apply(vectors), expected @ vectors, rtol=1e-9, atol=1e-12
        )
    assert operator.value() == pytest.approx(operator.value_and_gradient()[0], rel=1e-10)


def test_the_choice_of_kernels_is_put_back(batch):
    before = (
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
    )
    model = Fused().double()
    HessianOperator(model, loss, [batch]).gradient()

    def fail(model, batch):
        raise KeyError

    with pytest.raises(ValueError, match="KeyError"):
        HessianOperator(model, fail, [batch]).to_dense()
    assert before == (
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
    )


def test_masked_and_grouped_attention_work(batch):
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Linear(WIDTH, WIDTH)
            self.kv = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            k, v = self.kv(x).unflatten(-1, (2, 1, -1)).permute(2, 0, 3, 1, 4)
            mask = torch.rand(LENGTH, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.7
            return joined(
                functional.scaled_dot_product_attention(
                    split(self.q(x)), k, v, mask | torch.eye(LENGTH).bool(), enable_gqa=True
                )
            )

    model = Grouped().double()
    matrix = HessianOperator(model, loss, [batch]).to_dense()
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-14)
    assert matrix.norm() > 1e-3


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of three queries, whatever the size."""
    monkeypatch.setattr(chunks, "_BYTES", 0)
    monkeypatch.setattr(chunks, "_FEWEST_QUERIES", 3)


def math_kernel(*args, **options):
    with sdpa_kernel(SDPBackend.MATH):
        return functional.scaled_dot_product_attention(*args, **options)


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def derivatives(function, tensors):
    """The value, gradients, and the product of the Hessian with one vector, of a curved readout."""
    leaves = [t for t in tensors if t is not None and t.requires_grad]
    output = function(*tensors)
    readout = (output * output.detach().cos()).pow(2).sum()
    first = torch.autograd.grad(readout, leaves, create_graph=True)
    generator = torch.Generator().manual_seed(2)
    vectors = [torch.randn(g.shape, generator=generator, dtype=g.dtype) for g in first]
    products = torch.autograd.grad(first, leaves, vectors)
    return [output.detach(), *(g.detach() for g in first), *products]


def assert_same_derivatives(tensors, rtol=1e-12, **options):
    expected = derivatives(lambda *t: math_kernel(*t, **options), tensors)
    computed = derivatives(lambda *t: chunked_attention(*t, **options), tensors)
    for ours, theirs in zip(computed, expected, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).abs().max() <= rtol * theirs.abs().max().clamp(min=1)


QKV = ((2, 2, 8, 4), (2, 2, 7, 4), (2, 2, 7, 4))
SHAPES = {
    "self": ((2, 2, 8, 4), (2, 2, 8, 4), (2, 2, 8, 4)),
    "cross": QKV,
    "more keys": ((2, 2, 7, 4), (2, 2, 11, 4), (2, 2, 11, 4)),
    "wide values": ((2, 2, 8, 4), (2, 2, 7, 4), (2, 2, 7, 6)),
    "three dimensions": ((2, 8, 4), (2, 7, 4), (2, 7, 4)),
    "two dimensions": ((8, 4), (7, 4), (7, 4)),
    "five dimensions": ((2, 1, 2, 8, 4), (2, 1, 2, 7, 4), (2, 1, 2, 7, 4)),
    "a broadcast batch": ((2, 2, 8, 4), (1, 2, 7, 4), (1, 2, 7, 4)),
}


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}, {"scale": -0.3}])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_attention_in_chunks_is_that_of_the_math_kernel(shapes, options):
    assert_same_derivatives([randn(*shape) for shape in shapes], **options)


MASKS = {
    "boolean": lambda: torch.rand(2, 2, 8, 7) < 0.6,
    "padding": lambda: torch.rand(2, 1, 1, 7) < 0.6,
    "of keys": lambda: torch.rand(7) < 0.6,
    "rows and keys": lambda: torch.rand(8, 7) < 0.6,
    "of queries": lambda: torch.rand(8, 1) < 0.6,
    "additive": lambda: torch.randn(1, 2, 8, 7, dtype=torch.float64),
    "learned": lambda: randn(1, 2, 8, 7),
    "learned for every key": lambda: randn(2, 1, 7),
    "of single entries": lambda: randn(2, 2, 8, 7),
    "minus infinity": lambda: torch.full((8, 7), -torch.inf, dtype=torch.float64).triu(1),
}


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_every_kind_of_mask_works_in_chunks(mask):
    assert_same_derivatives([*(randn(*shape) for shape in QKV), mask()])


@pytest.mark.usefixtures("small_chunks")
def test_queries_that_see_no_key_get_what_the_math_kernel_gives_them():
    mask = torch.ones(8, 7, dtype=torch.bool)
    mask[[0, 4, 5]] = False
    tensors = [*(randn(*shape) for shape in QKV), mask]
    assert chunked_attention(*tensors)[..., 4, :].abs().max() == 0
    assert_same_derivatives(tensors)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("causal", [True, False])
def test_queries_can_share_keys_in_groups(causal):
    tensors = [randn(2, 6, 8, 4), randn(2, 2, 7, 4), randn(2, 2, 7, 4)]
    assert_same_derivatives(tensors, enable_gqa=True, is_causal=causal)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_lower_precision_is_computed_as_the_math_kernel_does(dtype, rtol):
    tensors = [randn(*shape, dtype=dtype) for shape in QKV]
    assert (
        torch.equal(chunked_attention(*tensors).detach(), math_kernel(*tensors).detach())
        or dtype is torch.float32
    )
    assert_same_derivatives(tensors, rtol=rtol)


@pytest.mark.usefixtures("small_chunks")
@settings(max_examples=60)
@given(
    batch=st.lists(st.integers(1, 2), max_size=2),
    heads=st.integers(1, 2),
    group=st.integers(1, 2),
    queries=st.integers(1, 11),
    keys=st.integers(1, 11),
    features=st.integers(1, 3),
    how=st.sampled_from(["plain", "causal", "boolean", "learned"]),
)
def test_no_shape_makes_a_difference(  # noqa: PLR0917 - hypothesis draws them all
    batch, heads, group, queries, keys, features, how
):
    q = randn(*batch, heads * group, queries, features)
    k, v = (randn(*batch, heads, keys, features) for _ in range(2))
    mask = {"boolean": torch.rand(queries, keys) < 0.7, "learned": randn(1, queries, keys)}.get(how)
    assert_same_derivatives([q, k, v, mask], is_causal=how == "causal", enable_gqa=group > 1)


@pytest.mark.usefixtures("small_chunks")
def test_nothing_to_attend_from_or_to_is_no_special_case():
    for shapes in [((2, 0, 4), (2, 7, 4)), ((2, 8, 4), (2, 0, 4)), ((0, 8, 4), (0, 7, 4))]:
        q, k = (randn(*shape) for shape in shapes)
        torch.testing.assert_close(chunked_attention(q, k, k), math_kernel(q, k, k))


@pytest.mark.usefixtures("small_chunks")
def test_dropout_draws_what_it_draws_in_one_piece():
    tensors = [randn(*shape) for shape in QKV]
    torch.manual_seed(3)
    expected = math_kernel(*tensors, dropout_p=0.5)
    torch.manual_seed(3)
    assert torch.equal(chunked_attention(*tensors, dropout_p=0.5), expected)
    attention = Attention()
    with attention.differentiable():
        functional.scaled_dot_product_attention(*tensors, dropout_p=0.5)
    assert not attention.chunked


@pytest.mark.usefixtures("small_chunks")
def test_a_mask_beside_causal_is_refused_as_pytorch_does():
    q, k, v = (randn(*shape) for shape in QKV)
    mask = torch.ones(8, 7, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="is_causal"):
        chunked_attention(q, k, v, mask, is_causal=True)


def test_chunks_hold_a_number_of_bytes_and_cover_all_queries():
    def sizes(queries, keys, heads=1, dtype=torch.float32):
        # Nothing but shapes is needed.
        q, k = (torch.empty(1, 1, 1, dtype=dtype).expand(heads, n, 1) for n in (queries, keys))
        return chunks.chunk_sizes(q, k)

    assert sizes(2048, 2048) == [2048]
    assert sizes(4096, 4096) == [1024] * 4
    assert sizes(4096, 4096, dtype=torch.bfloat16) == [1024] * 4
    assert sizes(4096, 4096, dtype=torch.float64) == [512] * 8
    assert sizes(1000, 4096, heads=16) == [64] * 15 + [40]
    assert sizes(40, 1 << 20, heads=16) == [16, 16, 8]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("graph", ["fresh", "retained"])
@pytest.mark.parametrize("make", WRITTEN_OUT)
def test_models_get_chunks_without_the_users_doing(make, graph, batch):
    model = make().double()
    operator = HessianOperator(model, loss, [batch[:1], batch[1:]], graph=graph)
    expected = dense_hessian(WRITTEN_OUT[make](model), lambda call: call(batch).pow(3).mean())
    for _ in range(2):
        vectors = torch.randn(len(expected), 3, dtype=torch.float64)
        torch.testing.assert_close(
            operator.apply(vectors), expected @ vectors, rtol=1e-9, atol=1e-12
        )
    assert operator.describe()["attention"] == "in chunks of queries"
    assert operator.value() == pytest.approx(operator.value_and_gradient()[0], rel=1e-12)


@pytest.mark.usefixtures("small_chunks")
def test_chunks_are_chosen_however_attention_is_called():
    held = functional.scaled_dot_product_attention

    def function(x):
        q = x.unflatten(-1, (2, -1)).transpose(1, 2)
        return held(q, q, q).pow(3).mean()

    x = torch.randn(1, 8, 4, dtype=torch.float64)
    operator = HessianOperator.from_function(function, [x])
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.autograd.functional.hessian(function, x).view(32, 32)
    torch.testing.assert_close(operator.to_dense(), expected, rtol=1e-12, atol=1e-14)
    assert operator.describe()["attention"] == "in chunks of queries"


@pytest.mark.usefixtures("small_chunks")
def test_chunks_repeat_autocast(batch):
    class Autocast(Fused):
        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(x).float()

    model = Autocast()
    vector = torch.randn(sum(p.numel() for p in model.parameters()), 1)
    product = HessianOperator(model, loss, [batch.float()]).apply(vector)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "_FEWEST_QUERIES", 1000)
        expected = HessianOperator(model, loss, [batch.float()]).apply(vector)
    assert (product - expected).norm() < 0.03 * expected.norm()


@pytest.mark.usefixtures("small_chunks")
def test_attention_within_a_functional_transform_is_left_in_one_piece():
    def function(x):
        def inner(y):
            q = y.view(2, 8, 2)
            return functional.scaled_dot_product_attention(q, q, q).pow(3).sum()

        return torch.func.grad(inner)(x).square().sum()

    x = torch.randn(32, dtype=torch.float64)
    operator = HessianOperator.from_function(function, [x])
    matrix = operator.to_dense()
    torch.testing.assert_close(matrix, matrix.T, rtol=1e-10, atol=1e-10)
    assert "attention" not in operator.describe()


def test_a_network_that_never_attends_pays_for_no_choice():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    attention = Attention(model)
    with attention.differentiable():
        model(torch.randn(2, 3))
    q = torch.randn(1, 8, 4)
    with attention.differentiable():
        functional.scaled_dot_product_attention(q, q, q)
    assert not attention.chunked


@pytest.mark.usefixtures("small_chunks")
def test_contexts_can_be_nested_and_leave_pytorchs_own_choice():
    q = torch.randn(1, 2, 8, 4, requires_grad=True)
    inner, outer = Attention(), Attention()
    with outer.differentiable():
        with inner.differentiable():
            functional.scaled_dot_product_attention(q, q, q)
        assert inner.chunked
        assert not outer.chunked
        functional.scaled_dot_product_attention(q, q, q)
        assert outer.chunked
    with pytest.raises(KeyError), inner.differentiable():
        raise KeyError
    output = functional.scaled_dot_product_attention(q, q, q)
    assert "Flash" in output.grad_fn.name()


_PEAKS = """
import torch
from pathlib import Path
from torch.nn import functional
from spectra import HessianOperator
from spectra.objective.memory import held_bytes, peak_bytes
from spectra.oracle import chunks

torch.set_num_threads(1)
device = torch.device("cpu")

def peak(length, chunk_bytes):
    chunks._BYTES = chunk_bytes
    x = torch.randn(2048 // length, length, 32)

    def loss(w):
        q, k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in (x @ w).chunk(3, -1))
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True).pow(2).mean()

    operator = HessianOperator.from_function(loss, [torch.randn(32, 96) / 6], graph="fresh")
    before = held_bytes(device)
    Path("/proc/self/clear_refs").write_text("5")
    operator.apply(torch.randn(32 * 96, 1))
    return peak_bytes(device) - before

peak(64, 1 << 40)
print(peak(1024, 1 << 20), peak(2048, 1 << 20), peak(2048, 1 << 40))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is measured with /proc")
def test_memory_does_not_grow_with_the_length_of_sequences():
    done = subprocess.run(
        [sys.executable, "-c", _PEAKS],
        check=True,
        capture_output=True,
        text=True,
        # Freed blocks go back to the system at once, so that only what is in use counts.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    # Twice the length at the same number of tokens: the scores are twice as many.
    short, long, whole = map(int, done.stdout.split())
    assert long < 1.2 * short
    # The scores alone are 32 MiB, and the math kernel has several of them.
    assert whole > 100 << 20
    assert long < whole / 4
