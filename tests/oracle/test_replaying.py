import random
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from spectra import HessianOperator
from spectra.objective.losses import supervised
from spectra.oracle.replaying import runs_python
from tests.cases.networks import tanh_mlp, wine

LOSS = supervised(nn.CrossEntropyLoss())


def data():
    x, y = wine(torch.float64)
    return [(x[:100], y[:100]), (x[100:], y[100:])]


class Around(nn.Module):
    """A network whose output goes through a function in Python."""

    def __init__(self, function):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6).double(), tanh_mlp()
        self.function = function
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.last(self.function(self, torch.tanh(self.first(x))))


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


def hooked(model, hidden):
    hidden.register_hook(lambda gradient: 1.0 * gradient)
    return hidden


def again(model, hidden):
    return checkpoint(torch.tanh, hidden, use_reentrant=False)


def drawing_again(model, hidden):
    """A checkpoint that draws in the backward pass, too, and tells its neighbours of it."""

    def block(x):
        model.calls += 1
        torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002
        return torch.tanh(x)

    return checkpoint(block, hidden, use_reentrant=False, preserve_rng_state=False)


def states():
    numpy = np.random.get_state(legacy=False)["state"]  # noqa: NPY002
    return torch.get_rng_state().tolist(), random.getstate(), numpy["key"].tolist(), numpy["pos"]


def silent(operator):
    return operator._oracle._graphs.silent()


def products(operator, count=4):
    torch.manual_seed(1)
    v = torch.randn(operator.shape[0], dtype=operator.space.dtype)
    return [operator.apply(v) for _ in range(count)]


def test_products_on_kept_graphs_of_an_ordinary_network_run_no_python_code():
    model = tanh_mlp()
    operator = HessianOperator(model, LOSS, data())
    (first,) = products(operator, 1)
    assert silent(operator)
    others = products(operator)
    assert silent(operator)
    fresh = HessianOperator(model, LOSS, data(), graph="fresh")
    for other in others:
        assert torch.equal(other, first)
    torch.testing.assert_close(first, products(fresh, 1)[0], rtol=1e-12, atol=1e-12)
    assert not silent(fresh)


def test_silent_products_do_without_what_forward_passes_need(monkeypatch):
    model = tanh_mlp()
    operator = HessianOperator(model, LOSS, data())
    first, *_ = products(operator)

    def protect():
        raise AssertionError("protected as a forward pass")

    monkeypatch.setattr(operator.objective, "evaluating", protect)
    assert torch.equal(products(operator, 1)[0], first)
    # A hook of a parameter would act in the backward pass.
    next(model.parameters()).register_hook(lambda gradient: gradient)
    with pytest.raises(AssertionError, match="protected as a forward pass"):
        products(operator, 1)


@pytest.mark.parametrize("function", [lambda m, x: Cube.apply(x), hooked, again])
def test_python_code_in_the_backward_pass_is_seen(function):
    model = Around(function)
    operator = HessianOperator(model, LOSS, data())
    first, *others = products(operator)
    assert not silent(operator)
    assert all(torch.equal(other, first) for other in others)


def test_random_states_are_kept_where_the_backward_pass_computes_a_block_again():
    model = Around(drawing_again)
    operator = HessianOperator(model, LOSS, data(), allow_training_mode=True)
    v = products(operator, 2)[0]
    before, calls = states(), model.calls
    operator.apply(v)
    assert model.calls > calls
    assert states() == before
    assert not silent(operator)


def test_hooks_and_requires_grad_of_parameters_do_not_matter_in_silent_products():
    model = tanh_mlp()
    operator = HessianOperator(model, LOSS, data())
    first, *_ = products(operator)
    weight = next(model.parameters())
    called = []
    handle = weight.register_hook(lambda gradient: called.append(1) or 2 * gradient)
    assert torch.equal(products(operator, 1)[0], first)
    handle.remove()
    weight.requires_grad_(False)
    assert torch.equal(products(operator, 1)[0], first)
    assert not called
    assert not weight.requires_grad
    assert silent(operator)


@pytest.mark.parametrize("surrounding", [torch.no_grad, torch.inference_mode])
def test_silent_products_under_no_grad_are_ordinary_tensors(surrounding):
    operator = HessianOperator(tanh_mlp(), LOSS, data())
    products(operator)
    v = torch.randn(operator.shape[0], dtype=torch.float64)
    with surrounding():
        product = operator.apply(v)
    assert not product.is_inference()
    assert torch.equal(product, operator.apply(v))


def test_changed_weights_modes_and_buffers_end_silent_products():
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
    model = model.double().eval()
    operator = HessianOperator(model, LOSS, data())
    for change in (
        lambda: model[0].weight.data.mul_(1.5),
        lambda: model[1].running_var.mul_(2.0),
        lambda: setattr(model[0], "weight", model[0].weight),
    ):
        products(operator, 3)
        assert silent(operator)
        change()
        fresh = HessianOperator(model, LOSS, data(), graph="fresh")
        torch.testing.assert_close(
            products(operator, 1), products(fresh, 1), rtol=1e-12, atol=1e-12
        )


def test_a_profiler_at_work_is_left_alone_and_takes_the_answer():
    events = []
    sys.setprofile(lambda *event: events.append(event[1]))
    profiler = sys.getprofile()
    try:
        result, python = runs_python(lambda: 3)
        assert sys.getprofile() is profiler
    finally:
        sys.setprofile(None)
    assert (result, python) == (3, True)
    assert events


def test_the_watch_ends_with_an_exception():
    def fail():
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 - its own
        runs_python(fail)
    assert sys.getprofile() is None
