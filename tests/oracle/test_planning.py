import contextlib
import resource
import subprocess
import sys

import pytest
import torch
from torch import nn

from spectra import HessianOperator, analyze
from spectra.objective.losses import causal_lm, supervised
from tests.cases.chunks import chunks_of
from tests.cases.networks import StackedGPT

LOSS = causal_lm()


def gpt():
    torch.manual_seed(0)
    return StackedGPT(3).double().eval()


def tokens(sequences=4):
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 7, (sequences, 6), generator=generator)}]


def products(operator):
    generator = torch.Generator().manual_seed(2)
    return operator.apply(torch.randn(operator.shape[0], 2, generator=generator).double())


def exact():
    return products(HessianOperator(gpt(), LOSS, tokens(), recompute="none"))


def close(found, expected):
    assert (found - expected).norm() < 1e-12 * expected.norm()


# --- what a budget decides -----------------------------------------------------------------------

PEAK = """
import sys, json, torch
import spectra
from spectra.objective.memory import held_bytes, peak_bytes
from tests.cases.chunks import chunks_of
from tests.cases.networks import StackedGPT
torch.set_num_threads(1)
torch.manual_seed(0)
cpu = torch.device("cpu")
model = StackedGPT(12, width=64, heads=4, vocabulary=32, length=128).eval()
data = [{{"input_ids": torch.randint(0, 32, (16, 128))}}]
# What the first product of a process imports is no part of it.
spectra.HessianOperator.from_function(lambda x: (x**3).sum(), torch.ones(2)).to_dense()
measured = []
for budget in {budgets}:
    H = spectra.HessianOperator(model, spectra.losses.causal_lm(), data, memory_budget=budget)
    v = torch.ones(H.shape[0])
    before = held_bytes(cpu)
    open("/proc/self/clear_refs", "w").write("5")
    product = H @ v
    peak = peak_bytes(cpu) - before
    H @ v
    measured.append([peak, float(product.norm()), H.describe()])
    H.release()
print(json.dumps(measured))
"""


def run(code):
    # Without it the C library keeps freed memory in pieces, and the peak tells of those too.
    environment = {"PYTHONPATH": ":".join(sys.path), "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment
    )
    return eval(done.stdout, {"null": None, "true": True, "false": False})


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is reset by a file of Linux")
def test_a_budget_decides_what_is_recomputed_and_split_and_is_kept():
    norms = []
    cases = [(80, True, True), (250, True, False), (4000, False, False)]
    # The smallest first: what the C library keeps of a large one would hide that of a small one.
    measured = run(PEAK.format(budgets=[budget << 20 for budget, *_ in cases]))
    for (budget, recomputes, splits), (peak, norm, described) in zip(cases, measured, strict=True):
        chosen = described.get("recompute", {"blocks": 0})
        assert chosen["blocks"] == (12 if recomputes else 0)
        assert (described["microbatch"] is not None) == splits
        assert ("split into parts" in " ".join(chosen.get("because", []))) == splits
        assert peak <= 1.1 * (budget << 20)
        norms.append(norm)
    assert max(norms) - min(norms) < 1e-4 * max(norms)


def test_where_there_is_room_nothing_changes():
    operator = HessianOperator(gpt(), LOSS, tokens(), memory_budget="auto")
    close(products(operator), exact())
    assert operator.describe()["microbatch"] is None
    assert "recompute" not in operator.describe()


def test_the_smallest_budget_takes_the_cheapest_way_and_stays_exact():
    operator = HessianOperator(gpt(), LOSS, tokens(), memory_budget=0)
    for _ in range(2):
        close(products(operator), exact())
    assert operator.value() == pytest.approx(HessianOperator(gpt(), LOSS, tokens()).value())


def entries_of_the_last_block(loss):
    """How often it is computed in the first pass, where not even one sample fits."""
    model, entered = gpt(), []
    model.blocks[2].up.register_forward_hook(lambda *_: entered.append(1))
    operator = HessianOperator(model, loss, tokens(1), memory_budget=0)
    found = operator.apply(torch.ones(operator.shape[0], dtype=torch.float64))
    plain = HessianOperator(gpt(), LOSS, tokens(1), recompute="none")
    close(found, plain.apply(torch.ones(operator.shape[0], dtype=torch.float64)))
    assert operator.describe()["recompute"]["blocks"] == 3
    return len(entered), operator.describe()


def test_a_new_plan_is_followed_where_the_loss_catches_what_announces_it():
    def cautious(model, batch):
        with contextlib.suppress(Exception):
            model(**batch)
        return LOSS(model, batch)

    # The given-up pass, twice forwards, and again in three backward passes.
    assert entries_of_the_last_block(cautious)[0] == 6


def test_the_trial_for_the_head_does_not_swallow_a_new_plan():
    with chunks_of(2):
        count, described = entries_of_the_last_block(LOSS)
    # The trial, forwards, and again in three backward passes: the given-up pass ends before.
    assert count == 5
    assert described["loss_head"] == "in chunks of 2 tokens"


def test_losses_that_may_compare_samples_are_not_split():
    def contrastive(model, batch):
        logits = model(batch["input_ids"]).mean(1)
        return nn.functional.cross_entropy(logits @ logits.T, torch.arange(len(logits)))

    operator = HessianOperator(gpt(), contrastive, tokens(), memory_budget=0)
    close(
        products(operator),
        products(HessianOperator(gpt(), contrastive, tokens(), recompute="none")),
    )
    assert operator.describe()["microbatch"] is None


def test_losses_say_whether_they_can_be_split():
    assert supervised(nn.CrossEntropyLoss()).separable
    assert supervised(nn.functional.mse_loss).separable
    assert not supervised(lambda y, t: (y - t).square().mean()).separable

    class Mine(nn.MSELoss):
        pass

    assert not supervised(Mine()).separable


def test_training_mode_is_not_split():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    data = [(torch.randn(6, 3).double(), torch.randn(6, 1).double())]
    loss = supervised(nn.MSELoss())
    options = {"allow_training_mode": True, "memory_budget": 0}
    operator = HessianOperator(model, loss, data, **options)
    operator.to_dense()
    assert operator.describe()["microbatch"] is None


# --- when memory runs out all the same -----------------------------------------------------------


class Greedy(nn.Module):
    """A block that finds no memory for more than some tokens, or outside of a segment."""

    def __init__(self, inner, most):
        super().__init__()
        self.inner = inner
        self.most = most

    def forward(self, x):
        if len(x) > self.most:
            msg = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
            raise RuntimeError(msg)
        return self.inner(x)


def greedy(most):
    model = gpt()
    model.blocks[2] = Greedy(model.blocks[2], most)
    return model


@pytest.mark.parametrize("graph", ["auto", "fresh", "retained"])
def test_ever_cheaper_settings_are_tried_until_one_fits(graph):
    operator = HessianOperator(greedy(1), LOSS, tokens(), graph=graph)
    close(products(operator), exact())
    described = operator.describe()
    assert described["microbatch"] == 1
    assert described["recompute"]["blocks"] == 3
    assert described["recompute"]["because"] == [
        "memory ran out with whole graphs",
        "memory ran out: batches are split into parts of 2 samples",
        "memory ran out: batches are split into parts of 1 sample",
    ]
    assert ("memory ran out" in described.get("graph_fallback", "")) == (graph == "auto")


def test_gradients_have_the_same_ways_out():
    operator = HessianOperator(greedy(2), LOSS, tokens())
    close(operator.gradient(), HessianOperator(gpt(), LOSS, tokens()).gradient())


def test_where_no_way_is_left_the_error_is_passed_on():
    operator = HessianOperator(greedy(0), LOSS, tokens())
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        products(operator)


def test_no_finished_product_is_lost():
    class RunsOut(Greedy):
        def forward(self, x):
            self.calls = getattr(self, "calls", 0) + 1
            self.most = 4 if self.calls < 9 else 1
            return super().forward(x)

    model = gpt()
    model.blocks[2] = RunsOut(model.blocks[2], 4)
    operator = HessianOperator(model, LOSS, tokens(), graph="fresh")
    found = analyze(operator, k=2, steps=4, probes=2, max_matvecs=4, trace=False)
    assert operator.describe()["microbatch"] == 1
    assert found.total_matvecs == operator.matvecs
    expected = analyze(
        HessianOperator(gpt(), LOSS, tokens()), k=2, steps=4, probes=2, max_matvecs=4, trace=False
    )
    assert found.total_matvecs == expected.total_matvecs
    assert found.eigenpairs.values == pytest.approx(expected.eigenpairs.values, rel=1e-9)
    assert any("recomputed" in note or "split" in note for note in found.notes)


REAL = """
import resource, torch
import spectra
from tests.cases.chunks import chunks_of
from tests.cases.networks import StackedGPT
torch.set_num_threads(1)
torch.manual_seed(0)
model = StackedGPT(12, width=64, heads=4, vocabulary=32, length=128).eval()
data = [{{"input_ids": torch.randint(0, 32, (16, 128))}}]
H = spectra.HessianOperator(model, spectra.losses.causal_lm(), data)
spectra.HessianOperator.from_function(lambda x: (x**3).sum(), torch.ones(2)).to_dense()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + ({room} << 20),) * 2)
product = H @ torch.ones(H.shape[0])
print([float(product.norm()), H.describe()])
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_AS"), reason="no limit on memory to set")
def test_a_process_that_really_runs_out_of_memory_goes_on():
    plenty, _ = run(REAL.format(room=8000))
    norm, described = run(REAL.format(room=125))
    assert "memory ran out" in described["recompute"]["because"][0]
    assert norm == pytest.approx(plenty, rel=1e-4)
