"""Over random models, splits of the data, selections, dtypes and options: what holds for all."""

import copy
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import spectra
from spectra import HessianOperator, losses
from tests.cases.networks import dense_hessian

ACTIVATIONS = {
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "sigmoid": nn.Sigmoid,
}
NORMS = {
    "none": lambda width: nn.Identity(),
    "layer": nn.LayerNorm,
    "batch": nn.BatchNorm1d,
    "group": lambda width: nn.GroupNorm(1, width),
}
CLASSES, FEATURES, SAMPLES = 3, 4, 7
CRITERIA = {
    "cross-entropy": (nn.CrossEntropyLoss(), functional.cross_entropy),
    "smoothed": (
        nn.CrossEntropyLoss(label_smoothing=0.2),
        lambda z, y: functional.cross_entropy(z, y, label_smoothing=0.2),
    ),
}


class Block(nn.Module):
    """A residual block, of which there may be several alike."""

    def __init__(self, width, activation, norm):
        super().__init__()
        self.norm = NORMS[norm](width)
        self.linear = nn.Linear(width, width)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x):
        return x + self.activation(self.linear(self.norm(x)))


class Network(nn.Module):
    """Blocks behind an embedding or a linear layer; the head may be the embedding."""

    def __init__(self, recipe):
        super().__init__()
        width = recipe.width
        self.first = (
            nn.Embedding(CLASSES, width) if recipe.embedding else nn.Linear(FEATURES, width)
        )
        self.blocks = nn.ModuleList(
            Block(width, recipe.activation, recipe.norm) for _ in range(recipe.depth)
        )
        self.head = nn.Linear(width, CLASSES, bias=not recipe.tied)
        if recipe.tied:
            self.head.weight = self.first.weight

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@dataclass(frozen=True)
class Recipe:
    """A model, what is analysed of it, and how."""

    seed: int
    depth: int
    width: int
    activation: str
    norm: str
    embedding: bool
    tied: bool
    criterion: str
    sizes: tuple[int, ...]
    params: str | None
    graph: str
    microbatch: int | None
    recompute: str
    stored: torch.dtype


@st.composite
def recipes(draw):
    cuts = sorted(draw(st.sets(st.integers(1, SAMPLES - 1), max_size=3)))
    embedding = draw(st.booleans())
    depth = draw(st.integers(1, 3))
    params = [None, "blocks.*", "head.*", "first.*", "*weight", f"blocks.{depth - 1}.*"]
    return Recipe(
        seed=draw(st.integers(0, 2**16)),
        depth=depth,
        width=draw(st.integers(2, 4)),
        activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
        norm=draw(st.sampled_from(sorted(NORMS))),
        embedding=embedding,
        tied=embedding and draw(st.booleans()),
        criterion=draw(st.sampled_from(sorted(CRITERIA))),
        sizes=tuple(b - a for a, b in zip([0, *cuts], [*cuts, SAMPLES], strict=True)),
        params=draw(st.sampled_from(params)),
        graph=draw(st.sampled_from(["auto", "fresh", "retained"])),
        microbatch=draw(st.none() | st.integers(1, 4)),
        recompute=draw(st.sampled_from(["auto", "none", "blocks.*"])),
        stored=draw(st.sampled_from([torch.float64, torch.float32])),
    )


def made(recipe):
    """The operator, and the dense Hessian of one big batch in float64, of the selected entries."""
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        model = Network(recipe).eval()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                # Norms are not left at one and zero; variances stay positive.
                nn.init.normal_(tensor, std=0.6)
                if "var" in name:
                    tensor.data.abs_().add_(0.5)
        x = (
            torch.randint(CLASSES, (SAMPLES,))
            if recipe.embedding
            else torch.randn(SAMPLES, FEATURES).double()
        )
        y = torch.randint(CLASSES, (SAMPLES,))
    # Every parameter is a float32 number, whatever it is stored in.
    model = model.to(recipe.stored)
    options = {"graph": recipe.graph, "microbatch": recipe.microbatch}
    if recipe.stored != torch.float64:
        options["compute_dtype"] = torch.float64
    module, function = CRITERIA[recipe.criterion]
    data = list(zip(x.split(recipe.sizes), y.split(recipe.sizes), strict=True))
    operator = HessianOperator(
        model,
        losses.supervised(module),
        data,
        recipe.params,
        recompute=recipe.recompute,
        **options,
    )
    exact = dense_hessian(copy.deepcopy(model).double(), lambda call: function(call(x), y))
    whole = dict(model.named_parameters())
    start, places = 0, []
    for name, parameter in whole.items():
        if name in operator.space.slices:
            places += range(start, start + parameter.numel())
        start += parameter.numel()
    return operator, exact[places][:, places]


def holds_for_all(recipe):
    operator, exact = made(recipe)
    n = len(exact)
    assert operator.shape == (n, n)
    generator = torch.Generator().manual_seed(recipe.seed)
    u, v = torch.randn(2, n, generator=generator, dtype=torch.float64)
    scale = float(exact.norm()) or 1.0
    hu, hv = operator @ u, operator @ v
    assert float((hv - exact @ v).norm()) <= 1e-10 * scale * float(v.norm())
    # Symmetric and linear.
    room = 1e-12 * scale * float(u.norm() * v.norm())
    assert abs(float(u @ hv - v @ hu)) <= room
    assert float((operator @ (2 * u - 3 * v) - (2 * hu - 3 * hv)).norm()) <= 10 * room
    # The operator's own numbers do not depend on how many vectors come at a time.
    torch.testing.assert_close(
        operator @ torch.stack([u, v], 1), torch.stack([hu, hv], 1), rtol=0, atol=room
    )


def seeds_repeat(recipe):
    (operator, exact), (other, _) = made(recipe), made(recipe)
    k = min(2, len(exact))
    pairs, again = (spectra.eigsh(H, k=k, seed=recipe.seed) for H in (operator, other))
    assert (pairs.values == again.values).all()
    assert torch.equal(pairs.vectors, again.vectors)
    trace, same = (spectra.trace(H, seed=recipe.seed) for H in (operator, other))
    assert trace.value == same.value
    assert trace.standard_error == same.standard_error
    values = torch.linalg.eigvalsh(exact)
    scale = float(values.abs().max())
    for value, residual in zip(pairs.values, pairs.residuals, strict=True):
        assert float((values - value).abs().min()) <= residual + 1e-10 * scale
    low, high = trace.interval(0.999999)
    assert low - 1e-10 * scale <= float(exact.trace()) <= high + 1e-10 * scale


QUICK = settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
LONG = settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow])


@given(recipe=recipes())
@QUICK
def test_products_are_those_of_the_dense_hessian_symmetric_and_linear(recipe):
    holds_for_all(recipe)


@given(recipe=recipes())
@settings(QUICK, max_examples=8)
def test_the_same_seed_gives_the_same_answers_and_these_hold(recipe):
    seeds_repeat(recipe)


@pytest.mark.slow
@given(recipe=recipes())
@LONG
def test_products_of_many_models_are_those_of_the_dense_hessian(recipe):
    holds_for_all(recipe)


@pytest.mark.slow
@given(recipe=recipes())
@settings(LONG, max_examples=100)
def test_the_same_seed_gives_the_same_answers_of_many_models(recipe):
    seeds_repeat(recipe)
