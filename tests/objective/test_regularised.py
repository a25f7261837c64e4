"""Penalties on the weights as a part of the objective."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import spectra
from spectra import HessianOperator
from spectra.errors import ArgumentError, ArgumentTypeError, LossError, ParameterSelectionError
from spectra.objective.losses import causal_lm, regularised, supervised, weight_decay
from tests.cases.networks import TinyGPT, dense_hessian, tanh_mlp, wine

LOSS = supervised(nn.CrossEntropyLoss())


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tanh_mlp()


def batches():
    x, y = wine()
    return [(x[:10], y[:10]), (x[10:100], y[10:100]), (x[100:], y[100:])]


@pytest.mark.parametrize("options", [{}, {"microbatch": 7}, {"graph": "fresh"}])
@pytest.mark.parametrize("params", [None, "0.*", ["0.bias", "2.weight"]])
def test_weight_decay_adds_its_strength_to_the_diagonal_of_what_it_selects(model, params, options):
    plain = HessianOperator(model, LOSS, batches(), **options)
    loss = regularised(LOSS, weight_decay(0.25, params))
    decayed = HessianOperator(model, loss, batches(), **options)
    chosen = [n for n in plain.space.names if params is None or n in params or n.startswith("0.")]
    chosen = [n for n in chosen if params != ["0.bias", "2.weight"] or n in params]
    on = torch.zeros(plain.space.n, dtype=torch.float64)
    for name in chosen:
        on[plain.space.slices[name]] = 0.25
    exact = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(decayed.to_dense() - plain.to_dense(), on.diag(), **exact)
    theta = plain.space.flatten(dict(model.named_parameters()))
    torch.testing.assert_close(decayed.gradient() - plain.gradient(), on * theta, **exact)
    assert decayed.value() - plain.value() == pytest.approx(float(on @ theta**2) / 2, rel=1e-12)


def test_any_penalty_has_its_hessian_once_whatever_the_batches(model):
    def penalty(model):
        return sum((p**4).sum() for p in model.parameters())

    loss = regularised(LOSS, penalty)
    x, y = wine()

    def whole(call):
        return functional.cross_entropy(call(x), y)

    theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    expected = dense_hessian(model, whole) + (12 * theta**2).diag()
    found = HessianOperator(model, loss, batches()).to_dense()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_tokens_are_weighted_as_in_the_loss_without_a_penalty():
    torch.manual_seed(0)
    model = TinyGPT().double().eval()
    tokens = torch.randint(0, 5, (5, 6))
    labels = tokens.clone()
    labels[0, 2:] = -100
    data = [
        {"input_ids": tokens[places], "labels": labels[places]}
        for places in (slice(2), slice(2, 5))
    ]
    expected = HessianOperator(model, causal_lm(), data).to_dense()
    loss = regularised(causal_lm(), weight_decay(0.5))
    found = HessianOperator(model, loss, data).to_dense() - expected
    torch.testing.assert_close(found, 0.5 * torch.eye(len(found)).double(), rtol=0, atol=1e-10)


def test_the_wrapped_losss_own_weights_and_splitting_are_kept():
    loss = regularised(LOSS, weight_decay(1e-3))
    assert loss.separable
    assert loss.weight((torch.zeros(3), torch.tensor([0, -100, 1]))) == 2
    assert repr(loss) == "regularised(supervised(CrossEntropyLoss()), weight_decay(0.001))"
    own = regularised(lambda model, batch: model(batch).mean(), weight_decay(1e-3))
    assert not own.separable
    assert own.weight(torch.zeros(4, 2)) == 4
    assert own.loss_head is None


def test_tied_parameters_decay_once():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)).double()
    model[1].weight = model[0].weight
    value = float(weight_decay(2.0)(model).detach())
    assert value == pytest.approx(float((model[0].weight.detach() ** 2).sum()))


def test_frozen_parameters_add_a_constant_only(model):
    model[0].requires_grad_(False)
    plain = HessianOperator(model, LOSS, batches())
    decayed = HessianOperator(model, regularised(LOSS, weight_decay(0.5)), batches())
    difference = decayed.to_dense() - plain.to_dense()
    torch.testing.assert_close(difference, 0.5 * torch.eye(plain.space.n).double())
    total = sum(float((p.detach() ** 2).sum()) for p in model.parameters())
    assert decayed.value() - plain.value() == pytest.approx(total / 4)


def test_the_norm_of_many_half_precision_weights_is_not_rounded():
    layer = nn.Linear(1000, 1000, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1 + 2**-7)
    exact = 10**6 * (1 + 2**-7) ** 2 / 2
    for dtype in (torch.float32, torch.bfloat16):
        assert float(weight_decay(1.0)(layer.to(dtype)).detach()) == pytest.approx(exact, rel=1e-14)


def test_recomputed_blocks_give_the_same_hessian(model):
    loss = regularised(LOSS, weight_decay(0.25))
    kept = HessianOperator(model, loss, batches(), recompute="none").to_dense()
    again = HessianOperator(model, loss, batches(), recompute="0").to_dense()
    torch.testing.assert_close(again, kept, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("recompute", ["none", "0"])
def test_another_computing_dtype_reaches_the_penalty_or_says_that_it_does_not(model, recompute):
    model = model.float()
    data = [tuple(t.float() if t.is_floating_point() else t for t in b) for b in batches()]
    loss = regularised(LOSS, weight_decay(0.25))
    options = {"compute_dtype": torch.float64, "recompute": recompute}
    plain = HessianOperator(model, LOSS, data, **options)
    decayed = HessianOperator(model, loss, data, **options)
    if recompute == "0":
        # What the penalty sees of a block is not what the block computes on.
        with pytest.raises(LossError, match="outside of the module that holds it"):
            decayed.to_dense()
        return
    difference = decayed.to_dense() - plain.to_dense()
    torch.testing.assert_close(difference, 0.25 * torch.eye(len(difference)).double())


def test_checkpoints_of_another_strength_are_refused(model, tmp_path):
    path = tmp_path / "run"

    def ask(strength):
        H = HessianOperator(model, regularised(LOSS, weight_decay(strength)), batches())
        return spectra.eigsh(H, k=1, checkpoint=path)

    ask(0.1)
    assert ask(0.1).converged.all()
    with pytest.raises(spectra.errors.CheckpointError, match="differs: loss"):
        ask(0.2)


def test_a_loss_that_is_a_sum_is_refused():
    with pytest.raises(ArgumentError, match="count the penalty once for each"):
        regularised(supervised(nn.CrossEntropyLoss(reduction="sum")), weight_decay(0.1))


def test_a_sum_over_batches_is_refused_for_a_plain_loss_too(model):
    loss = regularised(lambda m, b: functional.cross_entropy(m(b[0]), b[1]), weight_decay(0.1))
    with pytest.raises(ArgumentError, match="reduction='sum'"):
        HessianOperator(model, loss, batches(), reduction="sum")


@pytest.mark.parametrize("strength", [-0.1, math.nan, math.inf])
def test_impossible_strengths_are_refused(strength):
    with pytest.raises(ArgumentError, match="strength="):
        weight_decay(strength)


def test_what_is_no_function_is_refused():
    with pytest.raises(ArgumentTypeError, match="strength is a str"):
        weight_decay("0.1")
    with pytest.raises(ArgumentTypeError, match=r"penalty is 0\.1"):
        regularised(LOSS, 0.1)
    with pytest.raises(ArgumentTypeError, match="wrap it"):
        regularised(nn.MSELoss(), weight_decay(0.1))
    with pytest.raises(ArgumentTypeError, match="the class MSELoss"):
        regularised(nn.MSELoss, weight_decay(0.1))


def test_what_is_no_scalar_penalty_is_refused(model):
    for penalty, words in (
        (lambda m: m[0].weight, r"of shape \(5, 6\)"),
        (lambda m: 0.1, "a float"),
    ):
        H = HessianOperator(model, regularised(LOSS, penalty), batches())
        with pytest.raises(LossError, match=f"the penalty is {words}"):
            H.value()


def test_names_that_match_nothing_are_refused(model):
    H = HessianOperator(model, regularised(LOSS, weight_decay(0.1, "1.weight")), batches())
    with pytest.raises(ParameterSelectionError, match=r"no parameter matches '1\.weight'"):
        H.value()
