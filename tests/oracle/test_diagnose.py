import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from spectra import HessianOperator
from spectra.errors import DoubleBackwardError, LossError
from spectra.objective.losses import supervised
from tests.cases.networks import dense_hessian

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randn(6, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
LOSS = supervised(nn.MSELoss())


def network(middle, width=4):
    """The module under suspicion, two levels deep between innocent ones that work in place."""
    block = nn.Sequential(nn.ELU(inplace=True), middle, nn.Tanh())
    return nn.Sequential(
        nn.Linear(4, 4), nn.Hardtanh(inplace=True), block, nn.Linear(width, 1)
    ).double()


def refused(model, match, data=None, loss=LOSS, **options):
    operator = HessianOperator(model, loss, data or [(X, Y)], **options)
    with pytest.raises(DoubleBackwardError, match=match):
        operator.apply(torch.ones(operator.shape[0], dtype=torch.float64))
    assert operator.gradient().norm() > 0


def product_is_right(model, written):
    operator = HessianOperator(model, LOSS, [(X, Y)])
    expected = dense_hessian(written, lambda call: functional.mse_loss(call(X), Y))
    torch.testing.assert_close(operator.to_dense(), expected, rtol=1e-9, atol=1e-12)


def rewritten(model, middle):
    """The same network, sharing its parameters, with another middle and nothing in place."""
    return nn.Sequential(
        model[0], nn.Hardtanh(), nn.Sequential(nn.ELU(), middle, nn.Tanh()), model[3]
    )


# --- weight normalisation ------------------------------------------------------------------------


def old_weight_norm(dim):
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(nn.Linear(4, 4), dim=dim)


def new_weight_norm(dim):
    return parametrizations.weight_norm(nn.Linear(4, 4), dim=dim)


class WrittenWeightNorm(nn.Module):
    """g v / ‖v‖, written out, with parameters in the order of the original."""

    def __init__(self, g, v):
        super().__init__()
        self.g, self.v = g, v

    def forward(self, x):
        return x @ (self.g * self.v / self.v.norm()).T


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("graph", ["fresh", "retained"])
@pytest.mark.parametrize(
    ("make", "module"),
    [
        (old_weight_norm, r"module '2\.1' \(Linear\)"),
        (new_weight_norm, r"module '2\.1\.parametrizations\.weight\.0' \(_WeightNorm\)"),
    ],
)
def test_weight_norm_is_refused_with_its_module_and_remedy(make, module, graph, dim):
    refused(network(make(dim)), f"{module}.*weight_norm.*PyTorch gets wrong.*dim=None", graph=graph)


@pytest.mark.parametrize("make", [old_weight_norm, new_weight_norm])
def test_weight_norm_over_the_whole_weight_is_right(make):
    layer = make(None)
    layer.bias = None
    model = network(layer)
    if make is old_weight_norm:
        g, v = layer.weight_g, layer.weight_v
    else:
        g, v = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
    product_is_right(model, rewritten(model, WrittenWeightNorm(g, v)))


@pytest.mark.parametrize("make", [old_weight_norm, new_weight_norm])
def test_weight_norm_that_is_held_fixed_is_welcome(make):
    operator = HessianOperator(network(make(0)), LOSS, [(X, Y)], ["0.*", "3.*"])
    matrix = operator.to_dense()
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-13)
    assert matrix.norm() > 1e-3


# --- functions that break the chain --------------------------------------------------------------


class OnceFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return 3 * ctx.saved_tensors[0] ** 2 * grad


class TwiceFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        return 3 * ctx.saved_tensors[0] ** 2 * grad


class Applied(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_once_differentiable_functions_are_refused_with_their_module():
    refused(
        network(Applied(OnceFunction.apply)),
        r"module '2\.1' \(Applied\).*once_differentiable\. Fix: remove the decorator",
    )


def test_a_custom_function_with_a_differentiable_backward_is_right():
    model = network(Applied(TwiceFunction.apply))
    product_is_right(model, rewritten(model, Applied(lambda x: x**3)))


@pytest.mark.parametrize("graph", ["fresh", "retained"])
def test_once_differentiable_functions_at_the_end_of_a_loss_are_refused(graph):
    # The gradient that comes into them is constant: PyTorch keeps no trace of them.
    def loss(model, batch):
        return OnceFunction.apply(model(batch[0])).mean()

    match = "operation of the loss .*loss .*OnceFunction.*once_differentiable"
    refused(nn.Linear(4, 1).double(), match, loss=loss, graph=graph)


def test_once_differentiable_functions_in_a_plain_function_are_refused():
    operator = HessianOperator.from_function(lambda x: OnceFunction.apply(x).sum(), torch.ones(2))
    with pytest.raises(DoubleBackwardError, match=r"operation of the function .*once_diff"):
        operator.to_dense()


def test_how_the_fixed_tensors_of_a_block_came_about_does_not_matter():
    root = torch.ones(2, requires_grad=True)
    tensors = [torch.ones(2), OnceFunction.apply(2 * root)]
    operator = HessianOperator.from_function(lambda x, y: (x**2 * y).sum(), tensors)
    assert operator.block("tensor0").to_dense().tolist() == [[16, 0], [0, 16]]


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.reentrant = reentrant

    def forward(self, x):
        return checkpoint(lambda x: torch.tanh(self.layer(x)), x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("graph", ["fresh", "retained"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_of_the_models_own_is_right(graph, reentrant):
    model = network(Checkpointed(reentrant=reentrant))
    plain = rewritten(model, nn.Sequential(model[2][1].layer, nn.Tanh()))
    operator = HessianOperator(model, LOSS, [(X[:2], Y[:2]), (X[2:], Y[2:])], graph=graph)
    expected = dense_hessian(plain, lambda call: functional.mse_loss(call(X), Y))
    for _ in range(2):
        torch.testing.assert_close(operator.to_dense(), expected, rtol=1e-9, atol=1e-12)


class SecretlyCheckpointed(Checkpointed):
    """Holds the function where nobody looks."""

    def forward(self, x, _hidden=(checkpoint,)):
        return _hidden[0](lambda x: torch.tanh(self.layer(x)), x, use_reentrant=self.reentrant)


def test_reentrant_checkpointing_that_cannot_be_replaced_is_refused_with_its_module():
    operator = HessianOperator(network(SecretlyCheckpointed(reentrant=True)), LOSS, [(X, Y)])
    match = r"module '2\.1' \(Secret.*use_reentrant=True.*Fix: .*use_reentrant=False"
    for question in (operator.to_dense, operator.gradient):
        with pytest.raises(DoubleBackwardError, match=match):
            question()


# --- operations without a second derivative ------------------------------------------------------


class Distances(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.centres = nn.Parameter(torch.randn(3, 4))
        self.p = p

    def forward(self, x):
        return torch.cdist(x, self.centres, p=self.p)


class PairDistances(nn.Module):
    def forward(self, x):
        return functional.pdist(x).mean() * x


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_cdist_is_refused_with_its_module(p):
    refused(network(Distances(p), width=3), r"module '2\.1' \(Distances\).*cdist.*params=")


def test_pdist_is_refused_with_its_module():
    refused(network(PairDistances()), r"module '2\.1' \(PairDistances\).*pdist")


class Tokens(nn.Module):
    def __init__(self, embedding):
        super().__init__()
        self.body = nn.Sequential(embedding)
        self.head = nn.Linear(3, 1)
        self.double()

    def forward(self, ids):
        h = torch.tanh(self.body(ids))
        return self.head(h if h.dim() == 2 else h.mean(1))


IDS = torch.tensor([[0, 1, 2], [1, 1, 3], [4, 0, 0], [2, 3, 4], [1, 4, 4], [0, 2, 0]])


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embedding_bags_are_refused_with_their_module(mode):
    model = Tokens(nn.EmbeddingBag(5, 3, mode=mode))
    refused(model, r"module 'body\.0' \(EmbeddingBag\).*embedding_bag", [(IDS, Y)])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_norm": 1.0}, r"'body\.0' \(Embedding with max_norm\) rescales.*max_norm = None"),
        ({"scale_grad_by_freq": True}, r"'body\.0' \(Embedding with scale_grad_by_freq\)"),
    ],
)
def test_embeddings_that_do_more_than_look_up_are_refused(options, match):
    with pytest.raises(DoubleBackwardError, match=match):
        HessianOperator(Tokens(nn.Embedding(5, 3, **options)), LOSS, [(IDS, Y)])


def test_plain_and_sparse_embeddings_are_right():
    plain = Tokens(nn.Embedding(5, 3))
    sparse = Tokens(nn.Embedding(5, 3, sparse=True))
    sparse.load_state_dict(plain.state_dict())
    expected = dense_hessian(plain, lambda call: functional.mse_loss(call(IDS), Y))
    for model in (plain, sparse):
        operator = HessianOperator(model, LOSS, [(IDS, Y)])
        torch.testing.assert_close(operator.to_dense(), expected, rtol=1e-9, atol=1e-12)
    one, other = (HessianOperator(m, LOSS, [(IDS, Y)]).gradient() for m in (plain, sparse))
    torch.testing.assert_close(one, other)


def test_the_padding_row_of_an_embedding_is_held_fixed():
    padded, plain = Tokens(nn.Embedding(5, 3, padding_idx=0)), Tokens(nn.Embedding(5, 3))
    plain.load_state_dict(padded.state_dict())
    expected = HessianOperator(plain, LOSS, [(IDS, Y)]).to_dense()
    expected[:3] = expected[:, :3] = 0
    torch.testing.assert_close(HessianOperator(padded, LOSS, [(IDS, Y)]).to_dense(), expected)


@pytest.mark.parametrize(
    ("criterion", "targets"),
    [
        (nn.MultiMarginLoss(), torch.tensor([0, 1, 2, 0, 1, 2])),
        (nn.MultiMarginLoss(p=2), torch.tensor([0, 1, 2, 0, 1, 2])),
        (nn.MultiLabelMarginLoss(), torch.tensor([[0, 1, -1]] * 6)),
    ],
)
def test_losses_without_a_second_derivative_are_named(criterion, targets):
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    match = rf"operation of the loss supervised\({type(criterion).__name__}.*no second derivative"
    refused(model, match, [(X, targets)], supervised(criterion))


def ctc(model, batch):
    scores = model(batch[0]).log_softmax(-1).unsqueeze(1)
    return functional.ctc_loss(scores, torch.tensor([[1, 2]]), torch.tensor([6]), torch.tensor([2]))


def test_ctc_loss_is_named():
    model = nn.Linear(4, 3).double()
    refused(model, "operation of the loss ctc .*has no second derivative in PyTorch", loss=ctc)


# --- parameters that the forward pass changes ----------------------------------------------------


class Clamped(nn.Linear):
    def forward(self, x):
        with torch.no_grad():
            self.weight.clamp_(-0.1, 0.1)
        return super().forward(x)


@pytest.mark.parametrize("graph", ["fresh", "retained"])
def test_parameters_that_the_forward_pass_changes_are_named(graph):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Clamped(4, 1)).double()
    operator = HessianOperator(model, LOSS, [(X, Y)], graph=graph)
    for question in (operator.value, operator.gradient, operator.to_dense):
        with pytest.raises(LossError, match=r"changed parameter '2\.weight' in place"):
            question()


def test_an_embedding_that_is_rescaled_by_the_loss_is_named():
    def loss(model, batch):
        return functional.embedding(batch, model.weight, max_norm=0.1).square().sum()

    with pytest.raises(LossError, match=r"'weight' in place.*max_norm"):
        HessianOperator(nn.Embedding(5, 3), loss, [IDS]).value()
