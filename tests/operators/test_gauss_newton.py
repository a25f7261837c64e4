import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import spectra
from spectra import GaussNewtonOperator, HessianOperator
from spectra.errors import ArgumentTypeError, LossError
from spectra.objective import heads
from spectra.objective.losses import causal_lm, supervised
from tests.cases.networks import TinyGPT, tanh_mlp, wine

CROSS_ENTROPY = supervised(nn.CrossEntropyLoss())


def batches():
    x, y = wine()
    return list(zip(x.split(70), y.split(70), strict=True))


def derivatives(values, parameters):
    """(values, n): the gradient of every entry by itself."""
    rows = []
    for value in values.reshape(-1):
        found = torch.autograd.grad(
            value, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        rows.append(torch.cat([g.reshape(-1) for g in found]))
    return torch.stack(rows)


def jacobian(model, inputs):
    """(..., outputs of one, n)."""
    outputs = model(inputs)
    return derivatives(outputs, list(model.parameters())).view(*outputs.shape, -1)


def of_softmax(outputs):
    """(b, k, k) second derivatives of the cross-entropy: diag(p) - p pᵀ."""
    p = outputs.detach().softmax(-1)
    return torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)


def gauss_newton(model, data):
    """Σ Jᵀ H_ℓ J over the samples, divided by their number, by explicit Jacobians."""
    total, samples = 0.0, 0
    for inputs, _ in data:
        j = jacobian(model, inputs)
        total = total + torch.einsum("bip,bij,bjq->pq", j, of_softmax(model(inputs)), j)
        samples += len(inputs)
    return total / samples


def whole_hessian(model):
    return HessianOperator(model, CROSS_ENTROPY, batches()).to_dense()


@pytest.mark.parametrize("graph", ["fresh", "retained"])
def test_it_is_the_jacobian_around_the_curvature_of_the_loss(graph):
    model = tanh_mlp()
    matrix = GaussNewtonOperator(model, CROSS_ENTROPY, batches(), graph=graph).to_dense()
    expected = gauss_newton(model, batches())
    torch.testing.assert_close(matrix, expected, rtol=1e-12, atol=1e-14)
    # It is not the Hessian, which sees the curvature of the network as well.
    assert (whole_hessian(model) - expected).abs().max() > 1e-3


def test_value_and_gradient_are_those_of_the_loss():
    model = tanh_mlp()
    linear = GaussNewtonOperator(model, CROSS_ENTROPY, batches())
    whole = HessianOperator(model, CROSS_ENTROPY, batches())
    assert linear.value() == whole.value()
    assert torch.equal(linear.gradient(), whole.gradient())
    v = torch.randn(whole.space.n, dtype=torch.float64)
    assert linear.value_at(v) == whole.value_at(v)
    linear.apply(v)
    torch.testing.assert_close(linear.gradient(), whole.gradient(), rtol=1e-14, atol=1e-16)


def test_it_is_the_fisher_matrix_of_a_classifier():
    model = tanh_mlp()
    matrix = GaussNewtonOperator(model, CROSS_ENTROPY, batches()).to_dense()
    inputs = torch.cat([x for x, _ in batches()])
    probabilities = model(inputs).softmax(-1).detach()
    fisher = torch.zeros_like(matrix)
    # Expected over labels drawn from the model, by summing over all of them.
    j = jacobian(model, inputs)
    for label, unit in enumerate(torch.eye(probabilities.shape[1]).double()):
        scores = torch.einsum("bi,bip->bp", probabilities - unit, j)
        fisher += torch.einsum("b,bp,bq->pq", probabilities[:, label], scores, scores)
    torch.testing.assert_close(matrix, fisher / len(inputs), rtol=1e-12, atol=1e-14)


def test_it_is_the_fisher_matrix_of_a_regression():
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    inputs, _ = wine()
    # The negative logarithm of a Gaussian of unit variance, up to a constant.
    matrix = GaussNewtonOperator(
        model,
        lambda model, x: 0.5 * (model(x) - 3.0).square().sum(-1).mean(),
        [inputs],
    ).to_dense()
    j = jacobian(model, inputs)
    expected = torch.einsum("bip,biq->pq", j, j) / len(inputs)
    torch.testing.assert_close(matrix, expected, rtol=1e-12, atol=1e-14)


def test_of_a_linear_model_it_is_the_hessian():
    model = nn.Linear(6, 3).double()
    linear = GaussNewtonOperator(model, CROSS_ENTROPY, batches()).to_dense()
    whole = HessianOperator(model, CROSS_ENTROPY, batches()).to_dense()
    torch.testing.assert_close(linear, whole, rtol=1e-12, atol=1e-15)


def test_it_has_no_negative_eigenvalues_for_a_convex_loss():
    model = tanh_mlp()
    values = torch.linalg.eigvalsh(GaussNewtonOperator(model, CROSS_ENTROPY, batches()).to_dense())
    assert values.min() > -1e-14 * values.max()
    whole = torch.linalg.eigvalsh(HessianOperator(model, CROSS_ENTROPY, batches()).to_dense())
    assert whole.min() < -1e-4


def test_blocks_and_microbatches_are_those_of_the_whole():
    model = tanh_mlp()
    whole = GaussNewtonOperator(model, CROSS_ENTROPY, batches())
    matrix = whole.to_dense()
    block = whole.block("2.*")
    assert isinstance(block, GaussNewtonOperator)
    places = [whole.space.slices[name] for name in block.space.names]
    expected = torch.cat([torch.cat([matrix[a, b] for b in places], 1) for a in places])
    torch.testing.assert_close(block.to_dense(), expected, rtol=1e-12, atol=1e-15)
    parts = GaussNewtonOperator(model, CROSS_ENTROPY, batches(), microbatch=16)
    torch.testing.assert_close(parts.to_dense(), matrix, rtol=1e-12, atol=1e-15)


class Branched(nn.Module):
    """Several outputs, one of them unused and one a parameter, in a dictionary."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 4)
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        return {"a": hidden[:, :2], "b": (hidden[:, 2:] ** 2, hidden.exp()), "scale": self.scale}


def branched_loss(model, x):
    found = model(x)
    return ((found["a"] * found["b"][0]).sin().sum(-1) * found["scale"] ** 3).mean()


def test_all_outputs_of_a_model_are_linearised_together():
    torch.manual_seed(0)
    model, (inputs, _) = Branched().double(), wine()
    parameters = list(model.parameters())
    found = model(inputs)
    ends = [found["a"], found["b"][0], found["scale"]]
    j = derivatives(torch.cat([end.reshape(-1) for end in ends]), parameters)
    leaves = torch.cat([end.detach().reshape(-1) for end in ends]).requires_grad_()

    def of_outputs(_):
        a, b, scale = leaves.split([end.numel() for end in ends])
        return {"a": a.view_as(ends[0]), "b": (b.view_as(ends[1]), None), "scale": scale.squeeze()}

    slopes = torch.autograd.grad(branched_loss(of_outputs, inputs), leaves, create_graph=True)[0]
    expected = j.T @ derivatives(slopes, [leaves]) @ j
    operator = GaussNewtonOperator(model, branched_loss, [inputs])
    assert operator.space.names == tuple(name for name, _ in model.named_parameters())
    torch.testing.assert_close(operator.to_dense(), expected, rtol=1e-11, atol=1e-13)


def test_a_model_that_is_called_twice_is_linearised_in_both_calls():
    model, (inputs, _) = tanh_mlp(), wine()

    def agreement(model, x):
        return (model(x) * model(2 * x)).sum(-1).mean()

    matrix = GaussNewtonOperator(model, agreement, [inputs]).to_dense()
    one, two = jacobian(model, inputs), jacobian(model, 2 * inputs)
    expected = torch.einsum("bip,biq->pq", one, two) / len(inputs)
    torch.testing.assert_close(matrix, expected + expected.T, rtol=1e-12, atol=1e-14)


def test_what_the_loss_computes_from_parameters_is_not_linearised():
    model, (inputs, targets) = tanh_mlp(), wine()

    def decayed(model, batch):
        penalty = sum((p**4).sum() for p in model.parameters())
        return CROSS_ENTROPY(model, batch) + penalty

    plain = GaussNewtonOperator(model, CROSS_ENTROPY, [(inputs, targets)])
    matrix = GaussNewtonOperator(model, decayed, [(inputs, targets)]).to_dense()
    weights = plain.space.flatten([p for _, p in model.named_parameters()])
    expected = plain.to_dense() + torch.diag(12 * weights**2)
    torch.testing.assert_close(matrix, expected, rtol=1e-12, atol=1e-13)


# --- language models ------------------------------------------------------------------------------


def tokens():
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, 7, (2, 6), generator=generator) for _ in range(2)]
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, 3:] = 0
    return [{"input_ids": texts[0]}, {"input_ids": texts[1], "attention_mask": mask}]


def tied_gpt():
    torch.manual_seed(0)
    return TinyGPT()


def of_tokens(model):
    """The Gauss-Newton matrix over all tokens that count, by explicit Jacobians."""
    total, count = 0.0, 0
    for batch in tokens():
        ids = batch["input_ids"]
        mask = batch.get("attention_mask", torch.ones_like(ids))[:, 1:].bool()
        logits = model(ids)[:, :-1][mask]
        j = derivatives(logits, list(model.parameters())).view(*logits.shape, -1)
        total = total + torch.einsum("bip,bij,bjq->pq", j, of_softmax(logits), j)
        count += int(mask.sum())
    return total / count


@pytest.mark.parametrize("options", [{}, {"recompute": "down"}, {"graph": "fresh"}])
def test_tied_embeddings_and_recomputed_blocks(options):
    model = tied_gpt()
    operator = GaussNewtonOperator(model, causal_lm(), tokens(), **options)
    torch.testing.assert_close(operator.to_dense(), of_tokens(model), rtol=1e-10, atol=1e-12)


def test_logits_in_chunks_are_linearised_with_their_head(monkeypatch):
    model = tied_gpt()
    expected = of_tokens(model)
    monkeypatch.setattr(heads, "_SMALL", 8)
    operator = GaussNewtonOperator(model, causal_lm(), tokens())
    torch.testing.assert_close(operator.to_dense(), expected, rtol=1e-10, atol=1e-12)
    assert "in chunks" in operator.describe()["loss_head"]


def test_a_model_kept_in_half_precision_computes_on_copies():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).bfloat16()
    operator = GaussNewtonOperator(model, CROSS_ENTROPY, batches(), compute_dtype=torch.float64)
    expected = gauss_newton(model.double(), batches())
    torch.testing.assert_close(operator.to_dense().double(), expected, rtol=1e-5, atol=1e-7)


# --- every question -------------------------------------------------------------------------------


def test_every_question_takes_it():
    model = tanh_mlp()
    operator = GaussNewtonOperator(model, CROSS_ENTROPY, batches())
    values = torch.linalg.eigvalsh(operator.to_dense()).flip(0)
    analysis = spectra.analyze(operator, k=3, preflight="strict")
    assert analysis.eigenpairs.values == pytest.approx(values[:3].numpy(), rel=1e-4)
    low, high = analysis.trace.interval()
    assert low <= float(values.sum()) <= high
    assert analysis.provenance["operator"]["operator"] == "GaussNewtonOperator"


def test_the_preflight_says_what_it_does_not_compare():
    report = spectra.check(GaussNewtonOperator(tanh_mlp(), CROSS_ENTROPY, batches()))
    assert report.ok
    (finding,) = [f for f in report.findings if f.check == "gradient differences"]
    assert finding.level == "note"
    assert "linearised" in finding.message


# --- what has no Gauss-Newton matrix --------------------------------------------------------------


class WithItsOwnLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 3)

    def forward(self, x, y):
        return functional.cross_entropy(self.inner(x), y)


def test_a_model_that_computes_its_own_loss_is_refused():
    operator = GaussNewtonOperator(
        WithItsOwnLoss().double(), lambda model, batch: model(*batch), batches()
    )
    with pytest.raises(LossError, match=r"linear in a scalar that the model returns.*predictions"):
        operator.apply(torch.zeros(operator.space.n, dtype=torch.float64))


def test_a_loss_that_goes_around_the_model_is_refused():
    model = nn.Sequential(nn.Linear(6, 3)).double()
    operator = GaussNewtonOperator(
        model, lambda model, batch: CROSS_ENTROPY(model[0], batch), batches()
    )
    with pytest.raises(LossError, match="did not use the outputs of a call of the model"):
        operator.apply(torch.zeros(operator.space.n, dtype=torch.float64))


def test_a_plain_function_is_refused():
    with pytest.raises(ArgumentTypeError, match="does not tell which part of it is the model"):
        GaussNewtonOperator.from_function(lambda x: (x**2).sum(), torch.ones(2))


def test_the_model_is_left_as_it_was_also_by_an_error():
    model = tanh_mlp()

    def broken(model, batch):
        model(batch[0])
        raise ValueError("no")

    operator = GaussNewtonOperator(model, broken, batches())
    with pytest.raises(LossError, match="raised ValueError"):
        operator.apply(torch.zeros(operator.space.n, dtype=torch.float64))
    assert not model._forward_hooks
    plain = HessianOperator(model, CROSS_ENTROPY, batches())
    expected = whole_hessian(model)
    torch.testing.assert_close(plain.to_dense(), expected, rtol=1e-12, atol=1e-14)


def test_a_loss_without_curvature_has_a_matrix_of_zeros():
    model = tanh_mlp()
    operator = GaussNewtonOperator(model, lambda model, batch: model(batch[0]).mean(), batches())
    assert math.isclose(operator.apply(torch.ones(operator.space.n).double()).abs().max(), 0.0)
