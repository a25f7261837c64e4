import copy
import itertools
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from spectra import HessianOperator
from spectra.errors import LossError, NonFiniteError
from spectra.objective.losses import supervised
from tests.cases.networks import dense_hessian, tanh_mlp, wine

LOSS = supervised(nn.CrossEntropyLoss())


def batches(dtype=torch.float64, size=60):
    x, y = wine(dtype)
    return list(zip(x.split(size), y.split(size), strict=True))


def reference(model):
    x, y = wine()
    return dense_hessian(model, lambda call: functional.cross_entropy(call(x), y))


def directions(n, count=3, dtype=torch.float64, seed=4):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, count, generator=g, dtype=torch.float64).to(dtype)


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


# --- right ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("graph", ["fresh", "retained"])
def test_a_tanh_network_has_the_hessian_of_the_functional_transforms(graph):
    model = tanh_mlp()
    matrix = HessianOperator(model, LOSS, batches(), graph=graph).to_dense()
    torch.testing.assert_close(matrix, reference(model), rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-14)


def test_float32_products_are_within_1e_5_of_float64_ones():
    model = tanh_mlp()
    exact = reference(model)
    single = copy.deepcopy(model).float()
    v = directions(len(exact))
    operator = HessianOperator(single, LOSS, batches(torch.float32))
    products = operator.apply(v.float())
    assert products.dtype == torch.float32
    assert relative(products, exact @ v) < 1e-5


def test_a_float32_model_may_have_float64_vectors():
    model = tanh_mlp()
    exact = reference(model)
    single = copy.deepcopy(model).float()
    operator = HessianOperator(single, LOSS, batches(torch.float32), dtype=torch.float64)
    products = operator.apply(directions(len(exact)))
    assert products.dtype == torch.float64
    assert relative(products, exact @ directions(len(exact))) < 1e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_half_precision_models_have_float32_vectors(dtype, tolerance):
    model = tanh_mlp()
    exact = reference(model)
    half = copy.deepcopy(model).to(dtype)
    operator = HessianOperator(half, LOSS, batches(dtype))
    assert operator.dtype == np.float32
    v = directions(len(exact), dtype=torch.float32)
    assert relative(operator.apply(v), exact @ v.double()) < tolerance
    assert operator.gradient().dtype == torch.float32


def test_parameters_of_several_dtypes_share_one_vector():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(6, 4, dtype=torch.float32)
            self.last = nn.Linear(4, 3, dtype=torch.float64)

        def forward(self, x):
            return self.last(torch.tanh(self.first(x.float())).double())

    model = Mixed()
    plain = nn.Sequential(model.first, nn.Tanh(), model.last)
    exact = reference(copy.deepcopy(plain).double())
    operator = HessianOperator(model, LOSS, batches())
    assert operator.dtype == np.float64
    assert relative(operator.to_dense(), exact) < 1e-5


def smooth(*layers, shape):
    """A network of such layers on 12 inputs, and its mean squared activation as a loss."""
    return nn.Sequential(nn.Linear(12, int(np.prod(shape))), nn.Unflatten(1, shape), *layers)


class First(nn.Module):
    """A recurrent network without its final state."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x)[0]


@pytest.mark.parametrize(
    "model",
    [
        smooth(nn.Conv1d(2, 3, 2), nn.GELU(), nn.Conv1d(3, 1, 2), shape=(2, 5)),
        smooth(nn.Conv2d(1, 2, 2), nn.SiLU(), nn.AvgPool2d(2), shape=(1, 4, 4)),
        smooth(nn.ConvTranspose1d(2, 2, 2), nn.Softplus(), shape=(2, 4)),
        smooth(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.MaxPool2d(2), shape=(1, 5, 5)),
        smooth(nn.LayerNorm(5), nn.Sigmoid(), shape=(2, 5)),
        smooth(nn.GroupNorm(2, 4), nn.Tanh(), shape=(4, 3)),
        smooth(nn.InstanceNorm1d(4, affine=True), nn.Tanh(), shape=(4, 3)),
        smooth(nn.RMSNorm(5), nn.Mish(), shape=(2, 5)),
        smooth(nn.LocalResponseNorm(2), shape=(4, 3)),
        smooth(First(nn.LSTM(3, 2, batch_first=True)), shape=(4, 3)),
        smooth(First(nn.GRU(3, 2, batch_first=True, bidirectional=True)), shape=(4, 3)),
        smooth(First(nn.RNN(3, 2, num_layers=2, batch_first=True)), shape=(4, 3)),
        smooth(nn.Softmax(-1), nn.PReLU(), shape=(4, 3)),
        smooth(nn.Upsample(scale_factor=2, mode="bicubic"), nn.Tanh(), shape=(1, 3, 3)),
        smooth(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)), shape=(2, 3)).eval(),
    ],
    ids=lambda model: "-".join(type(m).__name__ for m in list(model)[2:]),
)
def test_products_agree_with_differences_of_gradients(model):
    """An independent channel: it shares the first derivative, and no second one."""
    model = copy.deepcopy(model).double()
    x = torch.randn(5, 12, dtype=torch.float64)

    def loss(model, batch):
        return model(batch).pow(3).mean()

    operator = HessianOperator(model, loss, [x])
    v = directions(operator.shape[0], 1)[:, 0]
    v /= v.norm()
    parameters = list(model.parameters())
    weights = operator.space.flatten(parameters)
    products = operator.apply(v)

    def gradient_at(shift):
        with torch.no_grad():
            for parameter, value in zip(
                parameters, operator.space.views(weights + shift * v), strict=True
            ):
                parameter.copy_(value)
        return operator.gradient()

    step = 1e-5
    difference = (gradient_at(step) - gradient_at(-step)) / (2 * step)
    assert float(products.norm()) > 1e-6
    assert relative(products, difference) < 1e-6


def test_an_ill_conditioned_quadratic_defeats_differences_and_not_the_products():
    """f(x) = ½‖B(x − c)‖² with cond(BᵀB) = 1e10, in float32 on both sides."""
    n = 20
    rng = np.random.default_rng(0)
    q, r = (np.linalg.qr(rng.standard_normal((n, n)))[0] for _ in range(2))
    curvatures = np.logspace(0, -10, n)
    root = q * np.sqrt(curvatures) @ r.T
    flattest = torch.tensor(r[:, -1])
    centre, point = torch.tensor(rng.standard_normal((2, n)))

    def operator(dtype, at=point):
        b, c = torch.tensor(root, dtype=dtype), centre.to(dtype)
        return HessianOperator.from_function(
            lambda x: 0.5 * (b @ (x - c)).square().sum(), at.to(dtype)
        )

    def error(products):
        return abs(float(flattest @ products.double()) - 1e-10) / 1e-10

    single = flattest.float()
    by_differences = min(
        error(
            (
                operator(torch.float32, point + step * flattest).gradient()
                - operator(torch.float32, point - step * flattest).gradient()
            )
            / (2 * step)
        )
        for step in np.logspace(-6, 0, 25)
    )
    assert by_differences > 10
    assert error(operator(torch.float32).apply(single)) < 0.1

    eigenvalues = torch.linalg.eigvalsh(operator(torch.float64).to_dense()).numpy()
    np.testing.assert_allclose(eigenvalues[::-1], curvatures, rtol=1e-4)


# --- linear, symmetric, and the same in every way of computing it --------------------------------

coefficients = st.floats(-1e3, 1e3, allow_subnormal=False)


@pytest.fixture(scope="module")
def operators():
    torch.manual_seed(0)
    model = tanh_mlp()
    return [HessianOperator(model, LOSS, batches(), graph=g) for g in ("fresh", "retained")]


@given(seeds=st.tuples(st.integers(0, 99), st.integers(0, 99)), a=coefficients, b=coefficients)
@settings(max_examples=25)
def test_products_are_linear_and_symmetric(operators, seeds, a, b):
    for operator in operators:
        u, v = (directions(operator.shape[0], 1, seed=s)[:, 0] for s in seeds)
        hu, hv = operator.apply(u), operator.apply(v)
        scale = max(abs(a), abs(b), 1.0) * float(hu.norm() + hv.norm())
        torch.testing.assert_close(
            operator.apply(a * u + b * v), a * hu + b * hv, rtol=0, atol=1e-12 * scale
        )
        assert float(u @ hv) == pytest.approx(float(hu @ v), abs=1e-12 * scale)


@pytest.mark.parametrize("graph", ["fresh", "retained"])
def test_many_vectors_at_once_are_the_same_as_one_by_one(graph):
    operator = HessianOperator(tanh_mlp(), LOSS, batches(), graph=graph)
    v = directions(operator.shape[0], 5)
    together = operator.apply(v)
    singly = torch.stack([operator.apply(column) for column in v.T], dim=1)
    torch.testing.assert_close(together, singly, rtol=0, atol=1e-15)
    assert operator.apply(v[:, :0]).shape == (operator.shape[0], 0)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_order_of_the_batches_does_not_matter(order):
    model, data = tanh_mlp(), batches()
    permuted = HessianOperator(model, LOSS, [data[i] for i in order]).to_dense()
    torch.testing.assert_close(permuted, HessianOperator(model, LOSS, data).to_dense())


class Counting:
    """Data that count how often they are read."""

    def __init__(self):
        self.data = batches()
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        return iter(self.data)


def test_one_pass_serves_any_number_of_vectors():
    data = Counting()
    operator = HessianOperator(tanh_mlp(), LOSS, data, graph="fresh")
    assert data.passes == 0
    operator.apply(directions(operator.shape[0], 7))
    assert data.passes == 1
    operator.value_and_gradient()
    assert data.passes == 2
    assert operator.matvecs == 7


def test_retained_graphs_serve_the_gradient_too():
    data, model = Counting(), tanh_mlp()
    operator = HessianOperator(model, LOSS, data)
    operator.apply(directions(operator.shape[0], 7))
    value, gradient = operator.value_and_gradient()
    again, gradient_again = operator.value_and_gradient()
    assert data.passes == 1
    plain = HessianOperator(model, LOSS, batches(), graph="fresh").value_and_gradient()
    assert value == again == pytest.approx(plain[0], rel=1e-14)
    torch.testing.assert_close(gradient, plain[1])
    assert torch.equal(gradient, gradient_again)


class Held:
    """A tensor that a graph keeps for its backward pass."""

    def __init__(self, tensor):
        self.tensor = tensor


@pytest.mark.parametrize(("graph", "freed"), [("fresh", True), ("retained", False)])
def test_a_fresh_graph_is_freed_before_the_next_one_is_built(graph, freed):
    held, counts = weakref.WeakSet(), []

    def pack(tensor):
        holder = Held(tensor)
        held.add(holder)
        return holder

    def loss(model, batch):
        counts.append(len(held))
        return LOSS(model, batch)

    operator = HessianOperator(tanh_mlp(), loss, batches(), graph=graph)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        operator.apply(directions(operator.shape[0]))
    assert [count == 0 for count in counts] == [True, freed, freed]
    kept = len(held)
    operator.release()
    # Not quite all: the hooks of this test tie tensors to the graphs that hold them.
    assert len(held) <= kept / 2


# --- retained graphs -----------------------------------------------------------------------------


def counted(loss_of=LOSS):
    calls = []

    def loss(model, batch):
        calls.append(len(batch[0]))
        return loss_of(model, batch)

    return loss, calls


def test_a_retained_graph_is_built_once():
    loss, calls = counted()
    data = Counting()
    operator = HessianOperator(tanh_mlp(), loss, data, graph="retained", microbatch=50)
    v = directions(operator.shape[0])
    for _ in range(3):
        operator.apply(v)
    assert data.passes == 1
    # The first batch, whole and in parts, shows that the loss can be split.
    assert calls == [60, 50, 10, 50, 10, 50, 10, 50, 8]
    operator.release()
    operator.apply(v)
    assert len(calls) == 3 + 12


def test_a_fresh_graph_is_built_for_every_product():
    loss, calls = counted()
    operator = HessianOperator(tanh_mlp(), loss, batches(), graph="fresh")
    operator.apply(directions(operator.shape[0]))
    operator.apply(directions(operator.shape[0]))
    assert len(calls) == 6


def optimiser_step(model):
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
    LOSS(model, batches()[0]).backward()
    optimiser.step()


def loaded_weights(model):
    model.load_state_dict({k: v + 0.5 for k, v in model.state_dict().items()})


def exchanged_memory(model):
    model[0].weight.data = model[0].weight.data + 0.5


def changed_in_place(model):
    with torch.no_grad():
        model[2].bias.add_(0.5)


def written_through_data(model):
    model[2].bias.data.add_(0.5)


def permuted_through_data(model):
    model[0].weight.data.copy_(model[0].weight.data.flip(0))


@pytest.mark.parametrize(
    "change",
    [
        optimiser_step,
        loaded_weights,
        exchanged_memory,
        changed_in_place,
        written_through_data,
        permuted_through_data,
    ],
)
@pytest.mark.parametrize("params", [None, "4.*"])
def test_a_retained_graph_is_rebuilt_after_the_weights_change(change, params):
    model = tanh_mlp()
    retained = HessianOperator(model, LOSS, batches(), params, graph="retained")
    before = retained.to_dense()
    change(model)
    after = retained.to_dense()
    fresh = HessianOperator(model, LOSS, batches(), params).to_dense()
    torch.testing.assert_close(after, fresh, rtol=1e-12, atol=1e-14)
    assert relative(before, after) > 1e-3


def test_a_retained_graph_is_rebuilt_after_a_buffer_changes():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    retained = HessianOperator(model.eval(), LOSS, batches(), graph="retained")
    before = retained.to_dense()
    model[1].running_mean += 1
    after = retained.to_dense()
    torch.testing.assert_close(after, HessianOperator(model, LOSS, batches()).to_dense())
    assert relative(before, after) > 1e-3


def test_a_retained_graph_is_rebuilt_after_the_mode_changes():
    class Moody(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return y if self.training else 2 * y

    model = Moody(6, 3).double()
    retained = HessianOperator(model, LOSS, batches(), graph="retained")
    before = retained.to_dense()
    model.eval()
    assert relative(before, retained.to_dense()) > 0.1


def test_a_retained_block_of_a_function_sees_changes_of_the_other_tensors():
    x, y = torch.tensor([1.0]), torch.tensor([2.0])
    whole = HessianOperator.from_function(lambda a, b: (a**2 * b).sum(), [x, y], graph="retained")
    block = whole.block("tensor0")
    assert block.to_dense().item() == 4
    y += 1
    assert block.to_dense().item() == 6
    assert whole.to_dense()[0, 0].item() == 6
    x += 1
    assert whole.to_dense()[0, 1].item() == 4


def test_a_pass_that_failed_half_way_is_not_retained():
    fail = [True]

    def loss(model, batch):
        if fail[0] and len(batch[0]) < 60:
            raise ValueError
        return LOSS(model, batch)

    model = tanh_mlp()
    operator = HessianOperator(model, loss, batches(), graph="retained")
    v = directions(operator.shape[0])
    with pytest.raises(LossError):
        operator.apply(v)
    fail[0] = False
    torch.testing.assert_close(operator.apply(v), reference(model) @ v)


# --- zeros and infinities ------------------------------------------------------------------------


@pytest.mark.parametrize("graph", ["fresh", "retained"])
def test_variables_that_do_not_appear_or_appear_linearly_have_zero_rows(graph):
    operator = HessianOperator.from_function(
        lambda x, unused, linear, y: (x**2 * y).sum() + 3 * linear.sum(),
        [torch.tensor([1.0, 2.0]), torch.ones(2), torch.ones(1), torch.tensor([3.0, 4.0])],
        graph=graph,
    )
    expected = torch.zeros(7, 7)
    expected[[0, 1], [0, 1]] = torch.tensor([6.0, 8.0])
    expected[[0, 1, 5, 6], [5, 6, 0, 1]] = torch.tensor([2.0, 4.0, 2.0, 4.0])
    assert torch.equal(operator.to_dense(), expected)
    assert operator.gradient().tolist() == [6, 16, 0, 0, 3, 1, 4]


@pytest.mark.parametrize("graph", ["fresh", "retained"])
def test_a_linear_function_has_the_hessian_zero(graph):
    operator = HessianOperator.from_function(lambda x: 3 * x.sum(), torch.ones(3), graph=graph)
    assert torch.equal(operator.to_dense(), torch.zeros(3, 3))
    assert torch.equal(operator.to_dense(), torch.zeros(3, 3))


def test_parameters_used_in_some_batches_only_count_there():
    model = nn.ModuleList([nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)]).double()
    x = torch.ones(3, 2, dtype=torch.float64)

    def loss(model, batch):
        return model[batch["head"]](batch["x"]).square().mean()

    operator = HessianOperator(model, loss, [{"x": x, "head": 0}, {"x": x[:1], "head": 1}])
    block = torch.ones(2, 2, dtype=torch.float64) * 2
    expected = torch.block_diag(0.75 * block, 0.25 * block)
    torch.testing.assert_close(operator.to_dense(), expected)


@pytest.mark.parametrize(
    ("function", "point", "match"),
    [
        (torch.norm, [0.0, 0.0], "matvec 1 returned 2 non-finite of 2.*second derivative is sing"),
        (lambda x: (x.abs() ** 1.5).sum(), [0.0, 1.0], "returned 1 non-finite of 2.*power below 2"),
        (lambda x: x.sqrt().sum(), [0.0], "the gradient of the function is already not finite"),
    ],
)
def test_a_second_derivative_that_is_not_finite_is_explained(function, point, match):
    operator = HessianOperator.from_function(function, torch.tensor(point))
    with pytest.raises(NonFiniteError, match=match):
        operator.apply(torch.ones(len(point)))


def test_the_batch_whose_gradient_is_not_finite_is_named():
    def loss(model, batch):
        return (model(batch[0]).square().sum() * batch[0][0, 0]).sqrt()

    data = [(x.clone(), y) for x, y in batches()]
    for i, (x, _) in enumerate(data):
        x[0, 0] = 0.0 if i == 1 else 1.0
    operator = HessianOperator(tanh_mlp(), loss, data)
    with pytest.raises(NonFiniteError, match="the gradient of batch 1 is already not finite"):
        operator.apply(directions(operator.shape[0]))


def test_overflow_in_half_precision_is_explained():
    point = torch.tensor([1e-3], dtype=torch.float16)
    operator = HessianOperator.from_function(lambda x: x.log().sum(), point)
    with pytest.raises(NonFiniteError, match="overflows in half precision; use float64"):
        operator.apply(torch.ones(1))


def test_running_out_of_memory_is_passed_on_as_it_is():
    for where in ("loss", "backward"):

        class Full(torch.autograd.Function):
            @staticmethod
            def forward(_, x):
                return x.clone()

            @staticmethod
            def backward(_, grad):
                raise torch.OutOfMemoryError

        def loss(model, batch, where=where, function=Full):
            if where == "loss":
                raise torch.OutOfMemoryError
            return function.apply(LOSS(model, batch))

        operator = HessianOperator(tanh_mlp(), loss, batches())
        with pytest.raises(torch.OutOfMemoryError):
            operator.apply(directions(operator.shape[0]))
