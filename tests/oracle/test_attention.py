import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from spectra import HessianOperator
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
