import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import spectra
from spectra import HessianOperator
from spectra.algorithms.lanczos import Krylov
from spectra.errors import (
    ArgumentError,
    ArgumentTypeError,
    DataError,
    LossError,
    ParameterSelectionError,
)
from spectra.objective import keeping
from spectra.objective.losses import causal_lm, supervised
from tests.cases import regressions
from tests.cases.networks import TinyGPT, dense_hessian, tanh_mlp, wine

LOSS = supervised(nn.CrossEntropyLoss())


def batches():
    x, y = wine()
    return list(zip(x.split(60), y.split(60), strict=True))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    operator = HessianOperator(tanh_mlp(), LOSS, batches())
    return operator, operator.to_dense()


# --- exact problems ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("graph", ["fresh", "retained"])
def test_the_hessian_of_a_quadratic_of_two_scalars_is_exact(dtype, graph):
    x, y = torch.tensor(1.0, dtype=dtype), torch.tensor(2.0, dtype=dtype)
    operator = HessianOperator.from_function(
        lambda x, y: x**2 + 2 * x * y + 3 * y**2 + 4 * x + 5 * y + 6, [x, y], graph=graph
    )
    assert operator.to_dense().tolist() == [[2, 2], [2, 6]]
    assert operator.gradient().tolist() == [2 + 4 + 4, 2 + 12 + 5]
    assert operator.value() == 1 + 4 + 12 + 4 + 10 + 6
    assert operator.value_and_gradient()[0] == operator.value()
    assert operator.space.names == ("tensor0", "tensor1")


REGRESSIONS = {
    "linear": regressions.linear,
    "diabetes": regressions.diabetes,
    "logistic": lambda: regressions.logistic(at_zero=False),
    "logistic at zero": lambda: regressions.logistic(at_zero=True),
    "softmax": lambda: regressions.softmax(at_zero=False),
    "softmax at zero": lambda: regressions.softmax(at_zero=True),
    "softmax on digits": lambda: regressions.softmax(at_zero=True, name="digits"),
}


@pytest.mark.parametrize("name", REGRESSIONS)
def test_regressions_on_real_data_have_their_closed_forms(name):
    case = REGRESSIONS[name]()
    matrix = HessianOperator(case.model, case.loss, case.data).to_dense().numpy()
    largest = np.abs(case.matrix).max()
    np.testing.assert_allclose(matrix, case.matrix, rtol=1e-10, atol=1e-12 * largest)
    assert np.trace(matrix) == pytest.approx(case.trace, rel=1e-10)
    assert np.linalg.norm(matrix) == pytest.approx(case.frobenius, rel=1e-10)
    if case.eigenvalues is not None:
        eigenvalues = np.linalg.eigvalsh(matrix)
        np.testing.assert_allclose(eigenvalues, case.eigenvalues, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("split", [[100, 1, 77], [89, 89]])
def test_unequal_batches_have_the_closed_form_too(split):
    case = regressions.softmax(at_zero=True)
    data = list(zip(case.inputs.split(split), case.targets.split(split), strict=True))
    matrix = HessianOperator(case.model, case.loss, data, microbatch=33).to_dense().numpy()
    np.testing.assert_allclose(matrix, case.matrix, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("hidden", [3, 6])
def test_a_deep_linear_network_has_its_known_spectrum(balanced, hidden):
    function, weights, expected = regressions.deep_linear(balanced=balanced, hidden=hidden)
    operator = HessianOperator.from_function(function, weights)
    eigenvalues = np.linalg.eigvalsh(operator.to_dense().numpy())
    np.testing.assert_allclose(eigenvalues, expected, atol=1e-10)
    if balanced:
        assert operator.gradient().norm() < 1e-12
    else:
        assert abs(np.trace(operator.to_dense().numpy())) < 1e-12


@pytest.mark.parametrize(
    ("function", "point", "expected"),
    [
        (lambda w: 0.5 * (w.prod() - 3) ** 2, torch.ones(4), [-2, 2, 2, 2]),
        (lambda w: w.logsumexp(0), torch.zeros(4), [0, 0.25, 0.25, 0.25]),
        (lambda w: w.square().sum() ** 2 / 4, torch.tensor([3.0, 4.0, 0.0]), [25, 25, 75]),
        (lambda w: 0.5 * w.sum() ** 2, torch.zeros(3), [0, 0, 3]),
        (lambda w: w[0] * w[1], torch.zeros(2), [-1, 1]),
        (
            lambda w: 100 * (w[1] - w[0] ** 2) ** 2 + (1 - w[0]) ** 2,
            torch.ones(2),
            [501 - 250601**0.5, 501 + 250601**0.5],
        ),
    ],
)
def test_functions_with_known_spectra_have_them(function, point, expected):
    matrix = HessianOperator.from_function(function, point.double()).to_dense()
    eigenvalues = torch.linalg.eigvalsh(matrix).numpy()
    np.testing.assert_allclose(eigenvalues, expected, rtol=1e-12, atol=1e-12)


def test_weight_decay_shifts_the_spectrum(network):
    operator, matrix = network

    def loss(model, batch):
        return LOSS(model, batch) + 0.05 * sum(p.square().sum() for p in model.parameters())

    shifted = HessianOperator(operator.objective.model, loss, batches()).to_dense()
    torch.testing.assert_close(shifted, matrix + 0.1 * torch.eye(len(matrix)))


# --- blocks --------------------------------------------------------------------------------------


def rows(operator, names):
    return torch.cat([torch.arange(operator.shape[0])[operator.space.slices[n]] for n in names])


@pytest.mark.parametrize(
    ("params", "names"),
    [
        ("2.*", ["2.weight", "2.bias"]),
        (["*.bias"], ["0.bias", "2.bias", "4.bias"]),
        (["4.weight", "0.weight"], ["0.weight", "4.weight"]),
        (lambda _, p: p.dim() == 1, ["0.bias", "2.bias", "4.bias"]),
        (None, ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]),
    ],
)
@pytest.mark.parametrize("graph", ["fresh", "retained"])
def test_a_block_is_the_principal_submatrix(network, params, names, graph):
    whole, matrix = network
    operator = HessianOperator(whole.objective.model, LOSS, batches(), graph=graph)
    block = operator.block(params)
    assert isinstance(block, HessianOperator)
    assert list(block.space.names) == names
    index = rows(whole, names)
    torch.testing.assert_close(block.to_dense(), matrix[index][:, index])
    torch.testing.assert_close(block.gradient(), whole.gradient()[index])
    assert block.describe()["graph"] == graph


def test_a_selection_at_construction_is_the_same_block(network):
    whole, matrix = network
    selected = HessianOperator(whole.objective.model, LOSS, batches(), "2.*")
    index = rows(whole, ["2.weight", "2.bias"])
    torch.testing.assert_close(selected.to_dense(), matrix[index][:, index])


def test_a_block_of_a_block_is_a_block(network):
    whole, matrix = network
    block = whole.block(["0.*", "2.*"]).block("*.bias").block("2.*")
    index = rows(whole, ["2.bias"])
    torch.testing.assert_close(block.to_dense(), matrix[index][:, index])
    with pytest.raises(ParameterSelectionError, match=r"no parameter matches '4\.\*'"):
        whole.block("0.*").block("4.*")


def test_blocks_of_a_function_are_submatrices():
    tensors = [torch.tensor([1.0, 2.0]), torch.tensor(3.0), torch.tensor([[4.0]])]
    operator = HessianOperator.from_function(
        lambda x, y, z: (x**2).sum() * y**2 * z.sum() + y**3 * z.sum() ** 2, tensors
    )
    matrix = operator.to_dense()
    block = operator.block(["tensor0", "tensor2"])
    index = torch.tensor([0, 1, 3])
    torch.testing.assert_close(block.to_dense(), matrix[index][:, index])
    assert block.block("tensor2").to_dense().item() == matrix[3, 3]
    assert operator.block(lambda name, t: name == "tensor1" and t == 3).shape == (1, 1)


@pytest.mark.parametrize("name", ["embedding.weight", "head.weight"])
def test_the_block_of_a_tied_tensor_is_found_under_either_name(name):
    ids = torch.tensor([[1, 2, 3, 4], [2, 5, 6, 0]])
    operator = HessianOperator(TinyGPT(), causal_lm(), [{"input_ids": ids}])
    block = operator.block(name)
    place = operator.space.slices["embedding.weight"]
    torch.testing.assert_close(block.to_dense(), operator.to_dense()[place, place])


def test_a_block_of_frozen_parameters_stays_a_block():
    model = tanh_mlp().requires_grad_(False)
    operator = HessianOperator(model, LOSS, batches(), ["0.*", "2.*"])
    assert operator.block("2.*").shape == (24, 24)
    assert operator.block(None).shape == operator.shape


@pytest.mark.parametrize(
    ("params", "kind", "match"),
    [
        ("3.*", ParameterSelectionError, r"no parameter matches '3\.\*'. Near matches"),
        ("2", ParameterSelectionError, r"Near matches: '2\.\*'"),
        (["2.*", "typo"], ParameterSelectionError, "no parameter matches 'typo'"),
        ([], ParameterSelectionError, "empty list"),
        (lambda *_: False, ParameterSelectionError, "selected none of 6"),
        (3, ArgumentTypeError, "params is a int"),
    ],
)
def test_a_block_of_nothing_is_refused(network, params, kind, match):
    with pytest.raises(kind, match=match):
        network[0].block(params)


def test_a_block_that_the_function_does_not_use_is_refused():
    operator = HessianOperator.from_function(lambda x, _: (x**2).sum(), [torch.ones(1)] * 2)
    with pytest.raises(LossError, match="does not depend on the selected parameters"):
        operator.block("tensor1").to_dense()


# --- selections ----------------------------------------------------------------------------------


def test_tied_weights_are_differentiated_through_every_use():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.embedding.weight
            self.double()

        def forward(self, ids):
            return self.head(torch.tanh(self.embedding(ids)))

    ids, y = torch.tensor([0, 1, 2, 3, 4, 4]), torch.tensor([1, 2, 3, 4, 0, 1])
    model = Tied()
    expected = dense_hessian(model, lambda call: functional.cross_entropy(call(ids), y))
    assert expected.shape == (15, 15)
    for params in (None, "embedding.weight", "head.weight"):
        operator = HessianOperator(model, LOSS, [(ids, y)], params)
        torch.testing.assert_close(operator.to_dense(), expected)


def test_frozen_parameters_selected_explicitly_are_analysed_and_stay_frozen(network):
    _, matrix = network
    model = network[0].objective.model
    try:
        model.requires_grad_(False)
        torch.testing.assert_close(HessianOperator(model, LOSS, batches(), "*").to_dense(), matrix)
        assert not any(p.requires_grad for p in model.parameters())
    finally:
        model.requires_grad_(True)


def test_the_model_may_be_used_and_trained_between_products():
    model = tanh_mlp()
    operator = HessianOperator(model, LOSS, batches())
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = wine()
    for _ in range(3):
        optimiser.zero_grad()
        LOSS(model, batches()[0]).backward()
        optimiser.step()
        expected = dense_hessian(model, lambda call: functional.cross_entropy(call(x), y))
        torch.testing.assert_close(operator.to_dense(), expected)


# --- what an operator says of itself -------------------------------------------------------------


def test_the_operator_says_what_it_is(network):
    operator = HessianOperator(network[0].objective.model, LOSS, batches(), graph="fresh")
    operator.value()
    assert repr(operator) == "<74 x 74 HessianOperator, float64, cpu>"
    assert operator.describe() == {
        "operator": "HessianOperator",
        "n": 74,
        "dtype": "float64",
        "device": "cpu",
        "objective": "model",
        "model": "Sequential",
        "model_parameters": 74,
        "loss": "supervised(CrossEntropyLoss())",
        "reduction": "mean",
        "batches": 3,
        "microbatch": None,
        "training_mode": False,
        "graph": "fresh",
        "parameters": 6,
    }


def test_an_operator_of_a_function_says_its_name():
    def cube(x):
        return (x**3).sum()

    description = HessianOperator.from_function(cube, torch.ones(2)).describe()
    assert description["objective"] == "function"
    assert description["function"].endswith("cube")
    assert description["n"] == 2


def test_a_dense_matrix_above_the_limit_is_refused_with_the_ways_around_it(network):
    with pytest.raises(ArgumentError, match=r"74 x 74 .*limit=10.*trace or spectral_density"):
        network[0].to_dense(limit=10)


def test_half_precision_vectors_are_refused():
    with pytest.raises(ArgumentTypeError, match=r"float32 or float64, not torch\.bfloat16"):
        HessianOperator(tanh_mlp(), LOSS, batches(), dtype=torch.bfloat16)


def test_nothing_is_computed_before_the_first_product():
    def loss(model, batch):
        raise AssertionError

    operator = HessianOperator(tanh_mlp(), loss, batches())
    operator.block("0.*")
    assert operator.matvecs == 0


def test_a_product_is_put_into_memory_that_is_there():
    operator = HessianOperator(tanh_mlp(), LOSS, batches())
    vector = torch.randn(operator.space.n, dtype=torch.float64)
    out = torch.full_like(vector, torch.nan)
    asked = []
    original = operator._oracle.products
    operator._oracle.products = lambda rows, into=None: asked.append(into) or original(rows, into)
    operator.apply_into(vector, out)
    assert asked[0].data_ptr() == out.data_ptr()
    assert torch.equal(out, operator.apply(vector))
    assert operator.matvecs == 2


def test_a_product_is_put_into_memory_made_under_inference_mode():
    operator = HessianOperator(tanh_mlp(), LOSS, batches())
    vector = torch.randn(operator.space.n, dtype=torch.float64)
    with torch.inference_mode():
        out = torch.empty_like(vector)
        operator.apply_into(vector, out)
        assert torch.equal(out, operator.apply(vector))


def changing(model, when):
    """A function that scales weights behind autograd's back, the so manieth time it is called."""
    count = iter(range(when, -1, -1))

    def change():
        if next(count, -1) == 0:
            next(model.parameters()).data.mul_(1.5)

    return change


@pytest.mark.parametrize("of", ["hessian", "sum", "shifted", "blocks", "function"])
def test_weights_that_change_during_a_question_are_noticed(of, monkeypatch):
    model = tanh_mlp()
    plain = HessianOperator(model, LOSS, batches())
    operator = {
        "hessian": lambda: plain,
        "sum": lambda: 2.0 * plain + plain,
        "shifted": lambda: spectra.shifted(plain, 1.0),
        "blocks": plain.blocks,
        "function": lambda: HessianOperator.from_function(
            lambda x: (x**4).sum() + x.prod(), next(model.parameters())
        ),
    }[of]()
    change, step = changing(model, 5), Krylov.step
    monkeypatch.setattr(Krylov, "step", lambda krylov: (change(), step(krylov))[1])
    with pytest.raises(DataError, match="changed while they were analysed") as caught:
        spectra.eigsh(operator, 3)
    assert len(caught.value.partial) == 3
    # And not when it is asked again.
    assert spectra.eigsh(operator, 3).converged.all()


def test_weights_are_looked_at_once_for_all_products_of_a_question(monkeypatch):
    operator, looked = HessianOperator(tanh_mlp(), LOSS, batches()), []
    sums = keeping._sums
    monkeypatch.setattr(keeping, "_sums", lambda entries: looked.append(1) or sums(entries))
    found = spectra.eigsh(operator, 3)
    assert found.matvecs > 10
    assert len(looked) == 2


def test_the_package_hands_out_the_operator():
    assert spectra.HessianOperator is HessianOperator
