"""Preconditioners beside the real steps of real optimisers, thresholds beside their divergence."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import spectra
from spectra import HessianOperator, preconditioner, stability_threshold
from spectra.errors import ArgumentError, ArgumentTypeError, NonFiniteError
from tests.cases.networks import tanh_mlp, wine

LOSS = spectra.losses.supervised(nn.CrossEntropyLoss())

ADAPTIVE = {
    "Adam": (torch.optim.Adam, {}),
    "Adam, amsgrad": (torch.optim.Adam, {"amsgrad": True, "eps": 1e-3}),
    "Adam, L2": (torch.optim.Adam, {"weight_decay": 0.1}),
    "Adam, foreach": (torch.optim.Adam, {"foreach": True}),
    "Adam, fused": (torch.optim.Adam, {"fused": True}),
    "Adam, decoupled": (torch.optim.Adam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "Adam, uphill": (torch.optim.Adam, {"maximize": True}),
    "AdamW": (torch.optim.AdamW, {"betas": (0.5, 0.9)}),
    "AdamW, lr a tensor": (
        torch.optim.AdamW,
        {"lr": torch.tensor(1e-3).double(), "foreach": False},
    ),
    "RMSprop": (torch.optim.RMSprop, {}),
    "RMSprop, centred": (torch.optim.RMSprop, {"centered": True, "alpha": 0.9}),
    "Adagrad": (torch.optim.Adagrad, {"eps": 1e-4}),
    "Adagrad, lr_decay": (torch.optim.Adagrad, {"lr_decay": 0.3}),
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tanh_mlp()


def train(model, optimizer, steps, batch=None):
    for _ in range(steps):
        optimizer.zero_grad()
        LOSS(model, batch or wine()).backward()
        optimizer.step()


def hessian(model, params=None):
    return HessianOperator(model, LOSS, [wine()], params)


def mean_gradient(optimizer, group, parameter):
    """What the last step divided by P: m̂ of Adam, the gradient of the others."""
    state = optimizer.state[parameter]
    if "betas" in group:
        return state["exp_avg"] / (1 - group["betas"][0] ** float(state["step"]))
    return parameter.grad


@pytest.mark.parametrize("name", ADAPTIVE)
def test_a_step_is_the_learning_rate_times_the_mean_gradient_over_the_preconditioner(model, name):
    kind, options = ADAPTIVE[name]
    optimizer = kind(model.parameters(), **{"lr": 1e-3, **options})
    train(model, optimizer, 4)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, optimizer, 1)
    group = optimizer.param_groups[0]
    operator = hessian(model)
    P = operator.space.unflatten(preconditioner(optimizer, operator))
    decoupled = group.get("decoupled_weight_decay", False) * group["weight_decay"]
    for n, parameter in model.named_parameters():
        step = before[n] * (1 - float(group["lr"]) * decoupled) - parameter.detach()
        expected = float(group["lr"]) * mean_gradient(optimizer, group, parameter) / P[n]
        # A subtraction of weights of size 1 that differ by 1e-3.
        torch.testing.assert_close(step, expected, rtol=1e-10, atol=1e-14)


def test_the_preconditioner_of_adam_is_that_of_its_formula(model):
    optimizer = torch.optim.Adam(model.parameters(), eps=1e-2, betas=(0.8, 0.9))
    squares = [torch.zeros_like(p) for p in model.parameters()]
    for _ in range(3):
        train(model, optimizer, 1)
        squares = [
            0.9 * s + 0.1 * p.grad**2 for s, p in zip(squares, model.parameters(), strict=True)
        ]
    expected = torch.cat([(s / (1 - 0.9**3)).sqrt().reshape(-1) + 1e-2 for s in squares])
    torch.testing.assert_close(
        preconditioner(optimizer, hessian(model)), expected, rtol=1e-12, atol=0
    )


def test_amsgrad_keeps_the_largest_mean_of_squares(model):
    optimizer = torch.optim.Adam(model.parameters(), amsgrad=True, betas=(0.9, 0.5))
    train(model, optimizer, 1)
    first = [p.grad**2 / 2 for p in model.parameters()]
    for _ in range(3):
        for p in model.parameters():
            p.grad.mul_(1e-3)
        optimizer.step()
    expected = torch.cat([(s / (1 - 0.5**4)).sqrt().reshape(-1) + 1e-8 for s in first])
    torch.testing.assert_close(
        preconditioner(optimizer, hessian(model)), expected, rtol=1e-12, atol=0
    )


def test_plain_gradient_descent_has_no_preconditioner(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    operator = hessian(model)
    assert torch.equal(preconditioner(optimizer, operator), torch.ones(operator.space.n).double())


def test_nothing_of_the_optimiser_is_changed(model):
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(ArgumentError):
        preconditioner(optimizer, hessian(model))
    assert not optimizer.state
    train(model, optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict())
    preconditioner(optimizer, hessian(model))
    stability_threshold(optimizer)
    after = optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    for place, state in before["state"].items():
        assert all(torch.equal(state[key], after["state"][place][key]) for key in state)


def test_selected_parameters_are_found_in_another_order_and_in_other_groups(model):
    groups = [{"params": [model[2].weight]}, {"params": [model[0].bias, model[0].weight]}]
    optimizer = torch.optim.Adam(groups)
    train(model, optimizer, 2)
    operator = hessian(model, ["0.*", "2.weight"])
    found = operator.space.unflatten(preconditioner(optimizer, operator))
    for name in ("0.weight", "0.bias", "2.weight"):
        square = optimizer.state[model.get_parameter(name)]["exp_avg_sq"]
        torch.testing.assert_close(found[name], (square / (1 - 0.999**2)).sqrt() + 1e-8)


def test_a_tied_parameter_is_one(model):
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double()
    model[2].weight = model[0].weight
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, 2)
    operator = hessian(model)
    assert operator.space.names == ("0.weight", "0.bias", "2.bias")
    P = operator.space.unflatten(preconditioner(optimizer, operator))
    square = optimizer.state[model[0].weight]["exp_avg_sq"]
    torch.testing.assert_close(P["0.weight"], (square / (1 - 0.999**2)).sqrt() + 1e-8)


def test_half_precision_parameters_have_a_preconditioner_in_the_operators_dtype(model):
    model = model.to(torch.bfloat16)
    x, y = wine(torch.bfloat16)
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, 3, (x, y))
    operator = HessianOperator(model, LOSS, [(x, y)])
    P = preconditioner(optimizer, operator)
    assert P.dtype == operator.space.dtype == torch.float32
    squares = [optimizer.state[p]["exp_avg_sq"].double().reshape(-1) for p in model.parameters()]
    expected = (torch.cat(squares) / (1 - 0.999**3)).sqrt() + 1e-8
    torch.testing.assert_close(P, expected.float(), rtol=1e-6, atol=0)


def test_tensors_of_a_plain_function_are_found():
    x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.RMSprop([x], alpha=0.5, eps=0.25)
    (x**4).sum().backward()
    optimizer.step()
    operator = HessianOperator.from_function(lambda x: (x**4).sum(), x)
    expected = torch.tensor([4.0, 32.0]).double() * math.sqrt(0.5) + 0.25
    torch.testing.assert_close(preconditioner(optimizer, operator), expected)


def test_the_optimiser_is_found_within_a_wrapper_and_a_subclass(model):
    class Wrapper(torch.optim.Optimizer):
        """As Accelerate wraps optimisers."""

        def __init__(self, optimizer):
            self.optimizer = optimizer

    class Named(torch.optim.Adam):
        pass

    optimizer = Named(model.parameters())
    train(model, optimizer, 2)
    expected = preconditioner(optimizer, hessian(model))
    assert torch.equal(preconditioner(Wrapper(optimizer), hessian(model)), expected)
    # After two steps.
    assert stability_threshold(Wrapper(optimizer)).value == pytest.approx(38_000 * (1 - 0.9**2))


@pytest.mark.parametrize("wrapper", ["accelerate", "lightning"])
def test_the_optimiser_is_found_within_what_trainers_wrap_around_it(model, wrapper):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optimizer, 2)
    if wrapper == "accelerate":
        accelerate = pytest.importorskip("accelerate")
        wrapped = accelerate.Accelerator(cpu=True).prepare(optimizer)
        # What it keeps for the process would bind other tests.
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    else:
        module = pytest.importorskip("lightning.pytorch.core.optimizer")
        wrapped = module.LightningOptimizer(optimizer)
    assert type(wrapped) is not torch.optim.AdamW
    expected = preconditioner(optimizer, hessian(model))
    assert torch.equal(preconditioner(wrapped, hessian(model)), expected)
    assert stability_threshold(wrapped) == stability_threshold(optimizer)


# --- refused -------------------------------------------------------------------------------------


def test_an_optimiser_that_has_not_stepped_is_refused(model):
    for kind in (torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad):
        optimizer = kind(model.parameters(), lr=0.1)
        with pytest.raises(
            ArgumentError, match=r"'0\.weight' has not been stepped by the " + kind.__name__
        ):
            preconditioner(optimizer, hessian(model))


def test_parameters_elsewhere_are_named(model):
    optimizer = torch.optim.Adam(model[0].parameters())
    train(model, optimizer, 1)
    with pytest.raises(ArgumentError, match=r"'2\.weight' is not in the Adam"):
        preconditioner(optimizer, hessian(model))
    with pytest.raises(ArgumentError, match=r"'0\.weight' is not in the Adam"):
        preconditioner(optimizer, hessian(copy.deepcopy(model)))


def test_other_classes_and_steps_of_ones_own_are_refused(model):
    class Own(torch.optim.SGD):
        def step(self, closure=None):
            pass

    for optimizer in (torch.optim.NAdam(model.parameters()), Own(model.parameters(), lr=0.1)):
        for question in (lambda o: preconditioner(o, hessian(model)), stability_threshold):
            with pytest.raises(ArgumentTypeError, match="not among the optimisers whose steps"):
                question(optimizer)
    with pytest.raises(ArgumentTypeError, match="expected a torch optimiser"):
        stability_threshold("Adam")


def test_a_preconditioner_with_zeros_or_nan_is_refused(model):
    optimizer = torch.optim.Adam(model.parameters(), eps=0.0)
    train(model, optimizer, 1)
    square = optimizer.state[model[2].bias]["exp_avg_sq"]
    square[1] = 0.0
    with pytest.raises(ArgumentError, match=r"'2\.bias' has zeros"):
        preconditioner(optimizer, hessian(model))
    square[1] = math.nan
    with pytest.raises(NonFiniteError, match=r"'2\.bias' holds nan"):
        preconditioner(optimizer, hessian(model))


def test_an_operator_without_parameters_is_refused(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ArgumentError, match="does not act on parameters"):
        preconditioner(optimizer, spectra.as_operator(torch.eye(3)))
    projected = spectra.projected(hessian(model), torch.eye(hessian(model).space.n, 2).double())
    with pytest.raises(ArgumentError, match="does not act on parameters"):
        preconditioner(optimizer, projected)


# --- thresholds ----------------------------------------------------------------------------------

STEADY = {
    "gradient descent": (torch.optim.SGD, {"lr": 0.1}, 20),
    "L2": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.5}, 20),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, 38),
    "dampened": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}, 76),
    "dampening alone": (torch.optim.SGD, {"lr": 0.1, "dampening": 0.5}, 20),
    "Nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, 38 / 2.8),
    "Adam": (torch.optim.Adam, {"lr": 0.1}, 380),
    "Adam, L2": (torch.optim.Adam, {"lr": 0.1, "weight_decay": 0.3}, 380),
    "Adam, beta1": (torch.optim.Adam, {"lr": 0.1, "betas": (0.5, 0.999)}, 60),
    "AdamW": (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.3}, 1.97 * 190),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.1}, 20),
    "RMSprop, momentum": (torch.optim.RMSprop, {"lr": 0.1, "momentum": 0.9}, 38),
}


def frozen(optimizer, parameter):
    """The state after so many steps that nothing of the denominator changes: P about 1."""
    parameter.grad = torch.ones_like(parameter)
    if "betas" in (group := optimizer.param_groups[0]):
        group["betas"] = (group["betas"][0], 1 - 1e-15)
    if "alpha" in group:
        group["alpha"] = 1 - 1e-15
    before = parameter.detach().clone()
    optimizer.step()
    for key, value in optimizer.state[parameter].items():
        value.fill_({"step": 1e17, "exp_avg_sq": 1.0, "square_avg": 1.0}.get(key, 0.0))
    with torch.no_grad():
        parameter.copy_(before)


@pytest.mark.parametrize("name", STEADY)
def test_just_below_the_threshold_steps_converge_and_just_above_they_diverge(name):
    kind, options, expected = STEADY[name]
    for side, grows in ((0.99, False), (1.01, True)):
        x = nn.Parameter(torch.full((1,), 1e-3, dtype=torch.float64))
        optimizer = kind([x], **options)
        if kind is not torch.optim.SGD:
            frozen(optimizer, x)
        threshold = stability_threshold(optimizer)
        assert threshold.value == pytest.approx(expected, rel=1e-12)
        assert threshold.preconditioned == (kind is not torch.optim.SGD)

        operator = HessianOperator.from_function(lambda x: (x**2 / 2).sum(), x)
        P = float(preconditioner(optimizer, operator))
        decoupled = optimizer.param_groups[0].get("decoupled_weight_decay")
        l2 = 0.0 if decoupled else options.get("weight_decay", 0.0)
        curvature = side * threshold.value * P - l2
        largest = []
        for _ in range(600):
            optimizer.zero_grad()
            (curvature * x**2 / 2).sum().backward()
            optimizer.step()
            largest.append(abs(float(x.detach())))
            if largest[-1] > 1e3:
                break
        assert (max(largest[-2:]) > 1e-2) == grows
        assert (max(largest[-2:]) < 1e-4) != grows


@pytest.mark.parametrize("side", [0.99, 1.01])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_groups_of_different_learning_rates_have_one_threshold(side, momentum):
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    matrix = root @ root.T
    x, y = (nn.Parameter(torch.full((3,), 1e-3, dtype=torch.float64)) for _ in range(2))
    groups = [{"params": [x], "lr": 0.1}, {"params": [y], "lr": 0.003}]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=momentum)
    threshold = stability_threshold(optimizer)
    assert threshold.preconditioned
    assert threshold.value == pytest.approx(2 * (1 + momentum) / 0.1)

    def function(x, y):
        both = torch.cat([x, y])
        return both @ matrix @ both / 2

    sharpness = spectra.preconditioned(HessianOperator.from_function(function, [x, y]), optimizer)
    exact = np.linalg.eigvalsh(sharpness.to_dense())[-1]
    matrix = matrix * (side * threshold.value / exact)
    size = []
    for _ in range(1500):
        optimizer.zero_grad()
        function(x, y).backward()
        optimizer.step()
        size.append(float(torch.cat([x, y]).detach().norm()))
        if size[-1] > 1e3:
            break
    before = size[len(size) // 2]
    assert (size[-1] > before) == (side > 1)


def test_groups_of_different_momenta_have_the_smallest_threshold_and_a_note(model):
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "momentum": 0.5}]
    threshold = stability_threshold(torch.optim.SGD(groups, lr=0.1))
    assert threshold.value == pytest.approx(20)
    assert threshold.formula == "2 / lr"
    assert any("reach up to 30" in note for note in threshold.notes)


def test_a_learning_rate_of_zero_bears_any_curvature_and_says_so(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    threshold = stability_threshold(optimizer)
    assert threshold.value == math.inf
    assert "nothing moves" in str(threshold)
    assert float(preconditioner(optimizer, hessian(model)).max()) == 1.0


def test_a_group_that_does_not_move_is_refused_by_name(model):
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    with pytest.raises(ArgumentError, match=r"'0\.weight' has lr=0"):
        preconditioner(optimizer, hessian(model, ["0.*", "2.*"]))
    assert preconditioner(optimizer, hessian(model, "2.*")).min() == 1.0
    assert stability_threshold(optimizer).value == pytest.approx(20)


def test_what_the_formula_leaves_open_is_noted(model):
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=0.25, maximize=True)
    train(model, optimizer, 1)
    words = str(stability_threshold(optimizer))
    assert "weight_decay=0.25 is added to the gradient" in words
    assert "the Hessian to compare with is -H" in words
    assert "lower than the formula by the factor 1 - beta1^t" in words
    assert stability_threshold(optimizer).value == pytest.approx(0.1 * 38 / 1e-3)
    assert "of the preconditioned Hessian" in words


def test_the_first_steps_of_adam_diverge_at_a_lower_threshold():
    # Three steps for ever: m̂ is m / (1 - beta1³). The mean of squares is that of gradients of one.
    for side, grows in ((0.99, False), (1.01, True)):
        # So small that no gradient is noticed beside those.
        x = nn.Parameter(torch.full((1,), 1e-9, dtype=torch.float64))
        optimizer = torch.optim.Adam([x], lr=0.01)
        frozen(optimizer, x)
        state = optimizer.state[x]
        state["step"].fill_(3.0)
        threshold = stability_threshold(optimizer)
        assert threshold.value == pytest.approx(38 / 0.01 * (1 - 0.9**3))
        assert "1 - beta1^t" in str(threshold)
        curvature = side * threshold.value
        for _ in range(600):
            state["step"].fill_(2.0)
            state["exp_avg_sq"].fill_(1 - (1 - 1e-15) ** 3)
            optimizer.zero_grad()
            (curvature * x**2 / 2).sum().backward()
            optimizer.step()
            if abs(float(x.detach())) > 1e-5:
                break
        assert (abs(float(x.detach())) > 1e-7) == grows


def test_the_preconditioned_hessian_is_that_of_the_quadratic_model(model):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    train(model, optimizer, 5)
    operator = hessian(model)
    root = preconditioner(optimizer, operator).sqrt()
    expected = operator.to_dense() / torch.outer(root, root)
    found = spectra.preconditioned(operator, optimizer).to_dense()
    torch.testing.assert_close(
        found, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max())
    )


def test_l2_decay_of_the_optimiser_is_that_of_the_penalty(model):
    x, y = wine()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.3)
    before = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    loss = spectra.losses.regularised(LOSS, spectra.losses.weight_decay(0.3))
    gradient = HessianOperator(model, loss, [(x[:50], y[:50]), (x[50:], y[50:])]).gradient()
    functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    after = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    torch.testing.assert_close((before - after) / 0.5, gradient, rtol=1e-12, atol=1e-12)
