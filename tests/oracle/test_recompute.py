import functools
import gc
import itertools
import math
import subprocess
import sys
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

import spectra
from spectra.errors import ArgumentTypeError, DoubleBackwardError
from spectra.oracle.recompute import UnsuitableSegmentError, recompute

X = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def net(*layers):
    torch.manual_seed(0)
    return nn.Sequential(*(layers or (nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)))).double()


def squares(y):
    return (y**3).mean() + y.square().sum(-1).sqrt().mean()


def hessian(model, of, **options):
    """The dense Hessian of a function of the model and the data."""
    options.setdefault("recompute", "none")
    return spectra.HessianOperator(model, of, [X], **options).to_dense()


def same(model, recomputed, plain, **options):
    expected = hessian(model, plain)
    found = hessian(model, recomputed, **options)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


# --- exact ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("graph", ["fresh", "retained"])
def test_a_segment_changes_nothing(graph):
    same(
        net(),
        lambda m, x: squares(recompute(m, x)),
        lambda m, x: squares(m(x)),
        graph=graph,
    )


@functools.cache
def layered(seed):
    """A model of six layers, and its Hessian."""
    torch.manual_seed(seed)
    layers = [nn.Linear(3, 3), nn.Tanh(), nn.LayerNorm(3), nn.Linear(3, 2), nn.GELU()]
    model = nn.Sequential(*layers, nn.Linear(2, 3)).double()
    return model, hessian(model, lambda m, x: squares(m(x)))


@settings(max_examples=25)
@given(cuts=st.lists(st.integers(0, 6), max_size=3), seed=st.integers(0, 3))
def test_segments_may_be_cut_and_nested_anywhere(cuts, seed):
    model, expected = layered(seed)
    bounds = [0, *sorted(cuts), len(model)]
    pieces = [model[a:b] for a, b in itertools.pairwise(bounds) if a < b]

    def cut(_, x):
        def run(x):
            for piece in pieces:
                x = recompute(piece, x)
            return x

        return squares(recompute(run, x) if seed % 2 else run(x))

    torch.testing.assert_close(hessian(model, cut), expected, rtol=1e-12, atol=1e-13)


def test_value_and_gradient_are_those_of_the_function():
    model = net()
    plain = spectra.HessianOperator(model, lambda m, x: squares(m(x)), [X])
    segments = spectra.HessianOperator(model, lambda m, x: squares(recompute(m, x)), [X])
    assert plain.value() == segments.value()
    torch.testing.assert_close(plain.gradient(), segments.gradient(), rtol=1e-13, atol=0)


class Odd(nn.Module):
    """Keyword arguments, nested inputs and outputs, some of them constant or absent."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.1, 1, 9, dtype=torch.float64).view(3, 3))
        self.register_buffer("scale", torch.tensor(0.7, dtype=torch.float64))

    def forward(self, inputs, *, extra, count=2):
        x, (mask, nothing) = inputs
        assert nothing is None
        hidden = torch.tanh(x @ self.weight) * mask * self.scale
        return {"hidden": hidden, "more": (extra * hidden.sum(), count, mask, x, None)}


def odd(run):
    def loss(model, x):
        mask = (x > 0).double()
        first = run(model, (x, (mask, None)), extra=x.mean())
        second = run(model, (first["hidden"], (mask, None)), extra=first["more"][0])
        assert second["more"][1] == 2
        assert torch.equal(second["more"][2], mask)
        assert second["more"][4] is None
        return squares(second["hidden"]) + second["more"][0] + second["more"][3].square().sum()

    return loss


def test_arguments_and_results_may_be_nested_and_of_any_kind():
    same(Odd(), odd(recompute), odd(lambda m, *args, **kwargs: m(*args, **kwargs)))


def test_what_a_partial_holds_are_arguments():
    def through(m, x):
        hidden = m[0](x)
        add = functools.partial(lambda a, b: torch.tanh(a) * b, b=hidden.square())
        return squares(m[2](recompute(add, hidden)))

    same(net(), through, lambda m, x: squares(m[2](torch.tanh(m[0](x)) * m[0](x).square())))


def test_shared_weights_are_one_parameter():
    model = net(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    same(
        model,
        lambda m, x: squares(recompute(m[2], recompute(m[0], recompute(m[0], x)))),
        lambda m, x: squares(m[2](m[0](m[0](x)))),
    )


def test_an_output_that_is_not_used_and_an_input_that_has_no_influence():
    def fork(a, b):
        return a.tanh(), a.square(), b

    same(
        net(),
        lambda m, x: squares(recompute(fork, m[0](x), m[0](x).exp())[0]),
        lambda m, x: squares(m[0](x).tanh()),
    )


def test_functions_linear_in_everything_have_no_second_derivative_of_their_own():
    same(
        net(),
        lambda m, x: squares(recompute(lambda a: 3 * a, m(x))),
        lambda m, x: squares(3 * m(x)),
    )


def test_frozen_parts_are_simply_called():
    model = net()
    model[0].requires_grad_(False)
    calls = []

    def first(x):
        calls.append(None)
        return model[0](x)

    same(
        model, lambda m, x: squares(m[2](recompute(first, x))), lambda m, x: squares(m[2](m[0](x)))
    )
    # One for the graph of each of the fifteen parameters' products, kept; none in a backward pass.
    assert len(calls) == 1


def test_without_gradients_it_is_a_call():
    with torch.no_grad():
        assert torch.equal(recompute(net(), X), net()(X))


def test_a_loss_may_contain_a_gradient():
    def penalised(run):
        def loss(m, x):
            x = x.clone().requires_grad_()
            y = squares(run(m, x))
            (g,) = torch.autograd.grad(y, x, create_graph=True)
            return y + g.square().sum()

        return loss

    for options in ({}, {"graph": "fresh"}):
        same(net(), penalised(recompute), penalised(lambda m, x: m(x)), **options)


def test_any_number_of_derivatives_is_right():
    x = torch.tensor([2.0, 3.0], dtype=torch.float64, requires_grad=True)
    y = recompute(lambda a: recompute(torch.square, a) ** 2, x)
    for power in (4, 3, 2, 1):
        torch.testing.assert_close(y, math.factorial(4) / math.factorial(power) * x**power)
        (y,) = torch.autograd.grad(y.sum(), x, create_graph=True)


# --- the same again ------------------------------------------------------------------------------


def test_random_numbers_repeat_and_the_generator_goes_on():
    model = net(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 3), nn.Dropout(0.3))
    options = {"allow_training_mode": True}

    def plain(m, x):
        return m[3](m[2](m[1](m[0](x)))).exp().mean()

    def recomputed(m, x):
        return recompute(m[3], m[2](recompute(nn.Sequential(m[0], m[1]), x))).exp().mean()

    expected = hessian(model, plain, **options)
    for graph in ("fresh", "retained"):
        found = hessian(model, recomputed, graph=graph, **options)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_autocast_is_that_of_the_first_time():
    model = net(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 3)).float()
    dtypes = []

    def noted(x):
        y = model(x)
        dtypes.append(y.dtype)
        return y

    def loss(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            y = recompute(noted, x)
        return squares(y.float())

    found = spectra.HessianOperator(model, loss, [X.float()], recompute="none").to_dense()
    assert set(dtypes) == {torch.bfloat16}
    assert len(dtypes) > len(found)
    exact = spectra.HessianOperator(model, lambda m, x: squares(m(x)), [X.float()]).to_dense()
    # Two decimal digits are what bfloat16 has.
    assert (found - exact).norm() < 0.03 * exact.norm()


class Doubling(TorchFunctionMode):
    """Makes every hyperbolic tangent twice as large."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return 2 * result if function is torch.tanh else result


def test_function_modes_are_those_of_the_first_time():
    # A default device is one; `autograd.grad` runs without them.
    model = net()
    with Doubling():
        expected = hessian(model, lambda m, x: squares(m(x)))
        found = hessian(model, lambda m, x: squares(recompute(m, x)))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    assert (expected - hessian(model, lambda m, x: squares(m(x)))).abs().max() > 0.1


def test_batch_statistics_are_computed_again():
    model = net(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    before = {name: b.clone() for name, b in model.named_buffers()}
    options = {"allow_training_mode": True}
    expected = hessian(model, lambda m, x: squares(m(x)), **options)
    found = hessian(model, lambda m, x: squares(recompute(m, x)), **options)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())


# --- what cannot be recomputed -------------------------------------------------------------------


def test_a_tensor_with_a_history_has_to_be_an_argument():
    def loss(m, x):
        hidden = m[0](x)
        return squares(recompute(lambda a: a * hidden, m[2](hidden.tanh())[:, :1]))

    with pytest.raises(
        UnsuitableSegmentError, match=r"segment .*lambda.* with a history .*argument"
    ):
        hessian(net(), loss)


class Collecting(nn.Module):
    """Keeps what it computes on the way, as models do with attention weights."""

    def __init__(self, what):
        super().__init__()
        self.inner = net()
        self.what = what
        self.kept = []

    def forward(self, x):
        hidden = self.inner(x)
        self.kept.append(
            self.inner[0].weight.square().sum() if self.what == "parameters" else hidden.sum() ** 2
        )
        return torch.tanh(hidden)


def penalised(run):
    def loss(model, x):
        model.kept = []
        # Twice, so that the input of the second call has a history.
        return squares(run(model, run(model, x))) + sum(model.kept)

    return loss


def test_a_loss_of_what_a_segment_does_not_return_is_refused():
    operator = spectra.HessianOperator(Collecting("activations"), penalised(recompute), [X])
    match = r"a tensor in the segment Collecting that is not among its outputs but was collected"
    with pytest.raises(UnsuitableSegmentError, match=match):
        operator.gradient()


def test_so_is_a_segment_around_it():
    model = Collecting("activations")

    def outer(x):
        return penalised(recompute)(model, x)

    with pytest.raises(UnsuitableSegmentError, match="not among its outputs but was collected"):
        recompute(outer, X)


def test_what_is_kept_but_not_used_or_depends_on_parameters_alone_does_no_harm():
    same(Collecting("parameters"), penalised(recompute), penalised(lambda m, x: m(x)))
    model = Collecting("activations")
    expected = hessian(model, lambda m, x: squares(m(x)))
    torch.testing.assert_close(hessian(model, lambda m, x: squares(recompute(m, x))), expected)
    assert model.kept


@pytest.mark.parametrize("change", [lambda a: a.mul_(2), lambda a: nn.functional.relu_(a.detach())])
def test_arguments_must_not_be_overwritten(change):
    def loss(m, x):
        return squares(recompute(lambda a: (change(a), a * a)[1], m[0](x)))

    with pytest.raises(UnsuitableSegmentError, match=r"overwrites one of its arguments in place"):
        hessian(net(), loss)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


def test_wrong_second_derivatives_inside_are_refused_with_the_segments_name():
    def cubes(y):
        return Once.apply(y)

    with pytest.raises(DoubleBackwardError, match=r"segment .*cubes.* once_differentiable"):
        hessian(net(), lambda m, x: squares(recompute(cubes, m(x))))


def test_errors_inside_are_those_of_the_operation():
    def attention(q):
        return nn.functional.embedding_bag(torch.tensor([[0, 1]]), q, mode="max")

    with pytest.raises(DoubleBackwardError, match="cannot be differentiated twice"):
        hessian(net(), lambda m, x: squares(recompute(attention, m(x))))


def test_only_functions_are_segments():
    with pytest.raises(ArgumentTypeError, match="expected a module or a function, got a Tensor"):
        recompute(X, X)


# --- memory --------------------------------------------------------------------------------------


def test_nothing_is_left_behind():
    kept = []

    def block(a):
        y = a.exp()
        kept.append(weakref.ref(y))
        return y * y

    x = torch.ones(3, requires_grad=True)
    y = recompute(block, x).sum()
    assert kept[0]() is None
    (g,) = torch.autograd.grad(y, x, create_graph=True)
    torch.autograd.grad(g.sum(), x)
    del y, g
    assert gc.collect() >= 0
    # For the value, for the gradient, and for what was differentiated twice.
    assert [r() for r in kept] == [None] * 3


PEAK = """
import sys, torch
from torch import nn
import spectra
from spectra.objective.memory import held_bytes, peak_bytes
from tests.cases.networks import StackedGPT
torch.set_num_threads(1)
torch.manual_seed(0)
cpu = torch.device("cpu")
# What the first product of a process imports is no part of it.
spectra.HessianOperator.from_function(lambda x: (x**3).sum(), torch.ones(2)).to_dense()
# The smaller first: what the C library keeps of a large one would hide the peak of a small one.
for recompute in ("blocks.*", "none"):
    for blocks in (2, 10):
        model = StackedGPT(blocks, width=64, heads=4, vocabulary=32, length=128).eval()
        data = [{"input_ids": torch.randint(0, 32, (16, 128))}]
        H = spectra.HessianOperator(
            model, spectra.losses.causal_lm(), data, graph="fresh", recompute=recompute
        )
        v = torch.ones(H.shape[0])
        before = held_bytes(cpu)
        open("/proc/self/clear_refs", "w").write("5")
        H @ v
        print(peak_bytes(cpu) - before)
"""


def peaks():
    """Of two and of ten blocks, computed again and kept."""
    # Without it the C library keeps freed memory in pieces, and the peak tells of those too.
    environment = {"PYTHONPATH": ":".join(sys.path), "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", PEAK], check=True, capture_output=True, text=True, env=environment
    )
    found = [int(line) for line in done.stdout.split()]
    return found[:2], found[2:]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is reset by a file of Linux")
def test_memory_hardly_grows_with_the_number_of_blocks():
    ours, plain = peaks()
    assert ours[1] < 0.5 * plain[1]
    assert ours[1] - ours[0] < 0.25 * (plain[1] - plain[0])
