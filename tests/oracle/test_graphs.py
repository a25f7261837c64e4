import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from spectra import HessianOperator, eigsh
from spectra.errors import ArgumentError, ArgumentTypeError, DoubleBackwardError
from spectra.objective.losses import supervised
from tests.cases.networks import tanh_mlp, wine

LOSS = supervised(nn.CrossEntropyLoss())
MIB = 2**20


def batches(size=60):
    x, y = wine(torch.float64)
    return list(zip(x.split(size), y.split(size), strict=True))


def counted(loss_of=LOSS):
    calls = []

    def loss(model, batch):
        calls.append(len(batch[0]))
        return loss_of(model, batch)

    return loss, calls


def ones(operator):
    return torch.ones(operator.shape[0], dtype=operator.space.dtype)


# --- how many are kept ---------------------------------------------------------------------------


def test_graphs_that_fit_are_kept_by_default_and_results_say_so():
    loss, calls = counted()
    operator = HessianOperator(tanh_mlp(), loss, batches())
    assert operator.describe()["graph"] == "auto"
    assert "graphs" not in operator.describe()
    pairs = eigsh(operator, k=2)
    assert calls == [60, 60, 58]
    kept = pairs.provenance["operator"]["graphs"]
    assert (kept["parts"], kept["retained"]) == (3, 3)


def wide(parts, samples=2_000, **options):
    """A network whose graphs are far larger than its weights."""
    torch.manual_seed(0)
    hidden = nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh()
    model = nn.Sequential(*hidden, nn.Linear(32, 1))
    loss, calls = counted(supervised(nn.MSELoss()))
    data = [(torch.randn(samples, 2), torch.randn(samples, 1)) for _ in range(parts)]
    return HessianOperator(model, loss, data, **options), calls


def peaks_with(*budgets):
    """In a process of its own: MiB above the start at the peak, the graphs, the losses computed.

    The peak is that of the whole process: of budgets in ascending order, it is of the last one.
    """
    code = f"""
import json, torch
from spectra.objective.memory import held_bytes, peak_bytes
from tests.oracle.test_graphs import ones, wide
small, _ = wide(1, 10)
small @ ones(small)
measured = []
for budget in {budgets}:
    operator, calls = wide(6, 50_000, memory_budget=budget * {MIB})
    exact, _ = wide(6, 50_000, graph="fresh")
    held = held_bytes(torch.device("cpu"))
    # First, so that what is kept is not decided by it: its work is less than a product's.
    operator.value_and_gradient()
    calls.clear()
    first, second = operator @ ones(operator), operator @ ones(operator)
    peak = peak_bytes(torch.device("cpu"))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, exact @ ones(exact))
    graphs = operator.describe()["graphs"]
    operator @ ones(operator)
    assert operator.describe()["graphs"] == graphs
    measured.append([(peak - held) / {MIB}, graphs, len(calls)])
print(json.dumps(measured))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read in /proc")
def test_a_memory_budget_is_kept_and_used():
    (peak, some, losses), (_, all_of_them, _) = peaks_with(250, 2_500)
    assert peak <= 1.1 * 250
    assert 0 < some["retained"] < some["parts"] == 6
    assert losses == 6 + 2 * (6 - some["retained"])
    assert some["bytes"] <= 250 * MIB
    assert all_of_them["retained"] == 6


def test_a_budget_of_nothing_keeps_nothing():
    operator, calls = wide(parts=3, memory_budget=0)
    operator @ ones(operator)
    operator @ ones(operator)
    assert operator.describe()["graphs"] == {"parts": 3, "retained": 0}
    assert len(calls) == 6


def test_blocks_have_the_budget_of_the_whole():
    operator, _ = wide(parts=3, memory_budget=0)
    block = operator.block("0.*")
    block @ ones(block)
    assert block.describe()["graphs"]["retained"] == 0


def test_released_graphs_are_counted_anew():
    operator, _ = wide(parts=2)
    operator @ ones(operator)
    operator.release()
    assert "graphs" not in operator.describe()
    operator @ ones(operator)
    assert operator.describe()["graphs"]["retained"] == 2


def test_what_was_found_to_fit_is_kept_again_without_a_look_at_the_memory(monkeypatch):
    operator, _ = wide(parts=3)
    first = operator @ ones(operator)
    operator.release(forget=False)
    assert operator.describe()["graphs"]["retained"] == 0

    def look(*_, **__):
        msg = "looked at the memory"
        raise AssertionError(msg)

    monkeypatch.setattr("spectra.oracle.graphs.held_bytes", look)
    monkeypatch.setattr("spectra.oracle.graphs.free_bytes", look)
    torch.testing.assert_close(operator @ ones(operator), first, rtol=0, atol=0)
    assert operator.describe()["graphs"]["retained"] == 3
    operator.release()
    with pytest.raises(AssertionError, match="looked at the memory"):
        operator @ ones(operator)


def test_what_was_found_not_to_fit_is_built_anew_after_a_release():
    operator, loss_calls = wide(parts=3, memory_budget=0)
    operator @ ones(operator)
    operator.release(forget=False)
    for _ in range(2):
        before = len(loss_calls)
        operator @ ones(operator)
        assert len(loss_calls) - before == 3
    assert operator.describe()["graphs"]["retained"] == 0


# --- when they are dropped -----------------------------------------------------------------------


def changed_batch(data):
    data[0][0].mul_(2.0)


def exchanged_batch(data):
    data[0] = (data[0][0] * 2.0, data[0][1])


@pytest.mark.parametrize("change", [changed_batch, exchanged_batch])
def test_a_list_of_batches_that_changed_is_read_again(change):
    x, y = wine(torch.float64)
    data = [(x[:60].clone(), y[:60]), (x[60:], y[60:])]
    model = tanh_mlp()
    operator = HessianOperator(model, LOSS, data)
    before = operator @ ones(operator)
    change(data)
    after = operator @ ones(operator)
    assert (after - before).norm() > 1e-3 * before.norm()
    torch.testing.assert_close(after, HessianOperator(model, LOSS, data) @ ones(operator))


def test_batch_statistics_do_not_drop_the_graphs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    loss, calls = counted()
    operator = HessianOperator(model.train(), loss, batches(), allow_training_mode=True)
    for _ in range(3):
        operator @ ones(operator)
    assert len(calls) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_changes_of_half_precision_weights_through_data_are_noticed(dtype):
    torch.manual_seed(0)
    model = nn.Linear(6, 3).to(dtype)
    loss, calls = counted(lambda model, batch: LOSS(model, batch).float())
    data = [(x.to(dtype), y) for x, y in batches()]
    operator = HessianOperator(model, loss, data)
    operator @ ones(operator)
    model.weight.data[0, 0] += 0.125
    operator @ ones(operator)
    assert len(calls) == 6


# --- when memory or a second derivative is missing -----------------------------------------------


def test_when_memory_runs_out_it_goes_on_without_kept_graphs_and_says_so():
    full = [True]

    def loss(model, batch):
        if full[0] and len(batch[0]) == 58:
            full[0] = False
            msg = "CUDA out of memory"
            raise torch.OutOfMemoryError(msg)
        return LOSS(model, batch)

    model = tanh_mlp()
    operator = HessianOperator(model, loss, batches())
    product = operator @ ones(operator)
    torch.testing.assert_close(product, HessianOperator(model, LOSS, batches()) @ ones(operator))
    assert operator.describe()["graphs"] == {"parts": 3, "retained": 0}
    assert "memory ran out" in operator.describe()["graph_fallback"]


@pytest.mark.parametrize("graph", ["fresh", "retained"])
def test_a_graph_that_was_asked_for_has_no_fallback(graph):
    def loss(model, batch):
        msg = "CUDA out of memory"
        raise torch.OutOfMemoryError(msg)

    operator = HessianOperator(tanh_mlp(), loss, batches(), graph=graph)
    with pytest.raises(torch.OutOfMemoryError):
        operator @ ones(operator)


class _Once(torch.autograd.Function):
    """The square of x, whose derivative goes through NumPy: there is no second one."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return torch.from_numpy(g.numpy() * 2 * x.detach().numpy())


def test_a_gradient_is_had_where_a_product_is_not():
    x = torch.tensor([1.0, 2.0])
    operator = HessianOperator.from_function(lambda x: (_Once.apply(x) ** 2).sum(), x)
    assert operator.gradient().tolist() == [4, 32]
    with pytest.raises(DoubleBackwardError):
        operator @ torch.ones(2)


# --- wrong input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message", "error"),
    [
        ({"graph": "kept"}, "graph='kept'; expected 'auto', 'retained' or 'fresh'", ArgumentError),
        ({"memory_budget": -1}, "memory_budget=-1; expected a number of bytes", ArgumentError),
        (
            {"memory_budget": "4GB"},
            "memory_budget='4GB' is a str; expected bytes",
            ArgumentTypeError,
        ),
        (
            {"memory_budget": 1, "graph": "retained"},
            "graph='retained' has settled that",
            ArgumentError,
        ),
    ],
)
def test_wrong_policies_are_refused(options, message, error):
    with pytest.raises(error, match=message):
        HessianOperator(tanh_mlp(), LOSS, batches(), **options)
