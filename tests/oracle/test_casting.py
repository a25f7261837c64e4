import copy

import pytest
import torch
from torch import nn

from spectra import HessianOperator, eigsh
from spectra.errors import ArgumentTypeError, LossError
from spectra.objective.losses import causal_lm, supervised
from spectra.objective.memory import held_bytes
from tests.cases.networks import StackedGPT

LOSS = causal_lm()


def gpt(dtype=torch.bfloat16):
    torch.manual_seed(0)
    return StackedGPT(3, width=16).to(dtype).eval()


def tokens():
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 7, (size, 6), generator=generator)} for size in (3, 2)]


def vector(operator):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(operator.shape[0], 2, generator=generator, dtype=operator.space.dtype)


def products(model, loss=LOSS, data=None, **options):
    operator = HessianOperator(model, loss, tokens() if data is None else data, **options)
    return operator.apply(vector(operator))


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("graph", ["fresh", "retained"])
@pytest.mark.parametrize("recompute", ["auto", "none", "blocks.1"])
def test_half_precision_in_storage_is_single_precision_in_products(stored, graph, recompute):
    model = gpt(stored)
    expected = products(copy.deepcopy(model).float(), recompute="none")
    found = products(model, compute_dtype=torch.float32, graph=graph, recompute=recompute)
    assert found.dtype == torch.float32
    assert relative(found, expected) < 1e-5
    assert {p.dtype for p in model.parameters()} == {stored}
    # In its own dtype it is another Hessian, as near as those digits allow.
    assert 1e-4 < relative(products(model), expected) < 0.1


def test_double_precision_is_exact():
    model = gpt()
    expected = products(copy.deepcopy(model).double(), recompute="none")
    assert relative(products(model, compute_dtype=torch.float64), expected) < 1e-13


def test_value_and_gradient_are_in_the_wanted_dtype_too():
    model = gpt()
    wide = HessianOperator(copy.deepcopy(model).double(), LOSS, tokens())
    found = HessianOperator(model, LOSS, tokens(), compute_dtype=torch.float64)
    assert abs(found.value() - wide.value()) < 1e-14 * wide.value()
    assert relative(found.gradient(), wide.gradient()) < 1e-13


def test_some_parameters_only():
    model = gpt()
    wide = copy.deepcopy(model).double()
    options = {"params": ["blocks.1.*", "norm.*"]}
    found = products(model, compute_dtype=torch.float64, **options)
    assert relative(found, products(wide, **options)) < 1e-13
    block = HessianOperator(model, LOSS, tokens(), compute_dtype=torch.float64).block("norm.*")
    expected = HessianOperator(wide, LOSS, tokens()).block("norm.*").to_dense()
    assert relative(block.to_dense(), expected) < 1e-13


def test_mixed_dtypes():
    model = gpt()
    model.blocks[1].float()
    wide = copy.deepcopy(model).double()
    assert relative(products(model, compute_dtype=torch.float64), products(wide)) < 1e-13


class Own(nn.Module):
    """Parameters at the top, a buffer, and inputs in half precision."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.tensor([0.3, -0.2]))
        self.register_buffer("scale", torch.tensor([0.77, 1.31]))
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.Tanh()) for _ in range(2)))
        self.norm = nn.BatchNorm1d(2)
        self.recurrent = nn.GRU(2, 2, batch_first=True)

    def forward(self, x):
        y = self.norm(self.blocks(x) * self.scale + self.bias)
        return self.recurrent(y.unsqueeze(1))[0].squeeze(1)


@pytest.mark.parametrize("recompute", ["auto", "none"])
def test_parameters_buffers_and_inputs_of_every_kind_of_module(recompute):
    torch.manual_seed(0)
    model = Own().bfloat16().eval()
    data = [(torch.randn(5, 2).bfloat16(), torch.randn(5, 2))]
    loss = supervised(nn.MSELoss())
    wide = [(data[0][0].double(), data[0][1].double())]
    expected = products(copy.deepcopy(model).double(), loss, wide, recompute="none")
    found = products(
        model, loss, [(data[0][0], wide[0][1])], compute_dtype=torch.float64, recompute=recompute
    )
    assert relative(found, expected) < 1e-13
    assert model.recurrent._flat_weights[0] is model.recurrent.weight_ih_l0


def test_copies_live_as_long_as_their_block():
    model = StackedGPT(8, width=512).bfloat16().eval()
    operator = HessianOperator(model, LOSS, tokens(), compute_dtype=torch.float32)
    cpu = torch.device("cpu")
    copies = 4 * sum(p.numel() for p in model.parameters())
    with operator._oracle._evaluating():
        before = held_bytes(cpu)
        loss = LOSS(model, tokens()[0])
        kept = held_bytes(cpu) - before
    assert loss.dtype == torch.float32
    assert loss.requires_grad
    assert kept < copies / 3


def test_a_parameter_that_is_used_outside_of_its_module_is_refused():
    model = gpt()

    def loss(model, batch):
        return LOSS(model, batch) + model.blocks[0].up.weight.float().square().sum()

    operator = HessianOperator(model, loss, tokens(), compute_dtype=torch.float32)
    with pytest.raises(LossError, match=r"'blocks.0.up.weight' is used outside of the module"):
        operator.gradient()


def test_only_single_and_double_precision():
    with pytest.raises(ArgumentTypeError, match=r"compute_dtype=torch\.bfloat16; expected"):
        HessianOperator(gpt(), LOSS, tokens(), compute_dtype=torch.bfloat16)


def test_results_say_in_what_they_were_computed():
    operator = HessianOperator(gpt(), LOSS, tokens(), compute_dtype=torch.float32)
    pairs = eigsh(operator, k=1)
    assert pairs.provenance["operator"]["compute_dtype"] == "float32"


class Rounding(nn.Module):
    """A model whose own code rounds what goes from one block to the next."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.Tanh()) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x.to(torch.bfloat16) if x.requires_grad else x)
        return x


def test_activations_that_the_models_own_code_rounds_are_refused():
    loss = supervised(nn.MSELoss())
    data = [(torch.randn(5, 2), torch.randn(5, 2))]
    operator = HessianOperator(Rounding().bfloat16(), loss, data, compute_dtype=torch.float32)
    with pytest.raises(
        LossError, match=r"module 'blocks.1' .*gets an activation in torch.bfloat16"
    ):
        operator.gradient()


def test_the_models_own_code_sees_the_dtype_it_computes_in():
    # Mamba's casts activations to the dtype of its head's weight, which is stored in half.
    class Casts(StackedGPT):
        def forward(self, input_ids):
            x = self.embedding(input_ids)
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x).to(self.head.weight.dtype))

    torch.manual_seed(0)
    model = Casts(2, width=16).bfloat16().eval()
    expected = products(copy.deepcopy(model).double())
    assert relative(products(model, compute_dtype=torch.float64), expected) < 1e-13


def test_graphs_are_kept_until_the_stored_parameters_change():
    model, calls = gpt(), []
    operator = HessianOperator(model, LOSS, tokens(), compute_dtype=torch.float32)
    model.embedding.register_forward_hook(lambda *_: calls.append(1))
    v = vector(operator)
    first = operator.apply(v)
    assert torch.equal(operator.apply(v), first)
    assert len(calls) == 2
    model.norm.weight.data.mul_(2)
    assert not torch.equal(operator.apply(v), first)
    assert len(calls) == 4
    found, expected = operator.apply(v), products(copy.deepcopy(model).float(), recompute="none")
    assert relative(found, expected) < 1e-5
