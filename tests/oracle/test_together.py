import pytest
import torch
from torch import nn

from spectra import HessianOperator
from spectra.objective.losses import supervised
from spectra.oracle.together import Together
from tests.cases.networks import tanh_mlp, wine

LOSS = supervised(nn.CrossEntropyLoss())


def data(parts=2):
    x, y = wine(torch.float64)
    return list(zip(x.chunk(parts), y.chunk(parts), strict=True))


def operator(model, *, faster, parts=2, loss=LOSS):
    """One that has decided, with kept graphs that are known to run no Python code."""
    H = HessianOperator(model, loss, data(parts))
    for _ in range(2):
        H.apply(vectors(H, 1))
    assert H._oracle._graphs.silent()
    H._oracle._several = Together(patience=0.0)
    H._oracle._several.faster = faster
    return H


def vectors(H, count):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(H.shape[0], count, generator=generator, dtype=torch.float64)


class Sometimes(nn.Module):
    """With a parameter that is not used, one that enters linearly, and others."""

    def __init__(self):
        super().__init__()
        self.net = tanh_mlp()
        self.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("count", [1, 2, 7, 8, 19])
def test_vectors_multiplied_together_give_their_products(count):
    model = Sometimes()
    apart, together = operator(model, faster=False), operator(model, faster=True)
    V = vectors(apart, count)
    for _ in range(3):
        torch.testing.assert_close(together.apply(V), apart.apply(V), rtol=1e-12, atol=1e-12)
    assert together.matvecs == 3 * count + 2


def test_linear_parameters_have_rows_of_zeros_together_too():
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(3, dtype=torch.float64))
            self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))

        def forward(self, x):
            return x[:, :3] * self.scale**2 + self.shift

    def loss(model, batch):
        return model(batch[0]).sum(dim=1).mean()

    H = operator(Linear(), faster=True, loss=loss)
    product = H.apply(vectors(H, 3))
    assert torch.equal(product[:3], torch.zeros(3, 3, dtype=torch.float64))
    assert bool((product[3:] != 0).all())


def test_both_ways_are_tried_once_and_the_faster_one_is_said():
    H = operator(tanh_mlp(), faster=None)
    assert "several_vectors" not in H.describe()
    V = vectors(H, 6)
    expected = torch.stack([H.apply(v) for v in V.T], dim=1)
    assert "several_vectors" not in H.describe()
    torch.testing.assert_close(H.apply(V), expected, rtol=1e-12, atol=1e-12)
    said = H.describe()["several_vectors"]
    assert said.endswith("times as long")
    # What is faster depends on the machine; what it is called does not.
    assert said.startswith("together" if H._oracle._several.faster else "one by one")
    torch.testing.assert_close(H.apply(V), expected, rtol=1e-12, atol=1e-12)
    assert H.describe()["several_vectors"] == said


def test_nothing_is_tried_before_it_can_pay():
    H = HessianOperator(tanh_mlp(), LOSS, data())
    for _ in range(3):
        H.apply(vectors(H, 4))
    assert H._oracle._several.faster is None
    assert 0 < H._oracle._several._spent < 3.0


def test_operations_without_a_batched_form_are_multiplied_one_by_one():
    """The trial needs an operation whose backward pass cannot be batched: item() in it."""
    rows = [[torch.ones(2, dtype=torch.float64) * i] for i in range(3)]
    several = Together(patience=0.0)

    def one(row):
        return (2 * row[0], None)

    def many(stacked):
        return torch.func.vmap(lambda x: 2 * x * float(x[0] >= 0))(stacked[0]), None

    found = list(several.multiply(one, many, rows))
    assert [float(terms[0][0]) for terms in found] == [0.0, 2.0, 4.0]
    assert several.faster is False
    assert "together RuntimeError" in several.describe()


def test_the_faster_way_is_the_one_that_is_taken():
    rows = [[torch.ones(2, dtype=torch.float64) * i] for i in range(11)]
    taken = []
    several = Together()

    def one(row):
        taken.append(1)
        return (2 * row[0],)

    def many(stacked):
        taken.append(len(stacked[0]))
        return (2 * stacked[0],)

    for faster in (True, False):
        several.faster = faster
        found = list(several.multiply(one, many, rows))
        assert [float(terms[0][0]) for terms in found] == [2.0 * i for i in range(11)]
    assert taken == [8, 3, *[1] * 11]


def test_a_wrong_batched_product_is_not_used():
    rows = [[torch.ones(2, dtype=torch.float64) * i] for i in range(3)]
    several = Together(patience=0.0)
    found = list(several.multiply(lambda r: (2 * r[0],), lambda s: (2.1 * s[0],), rows))
    assert [float(terms[0][0]) for terms in found] == [0.0, 2.0, 4.0]
    assert several.describe() == "one by one: 3 together were 0.05 off"


def test_without_memory_for_it_vectors_are_multiplied_one_by_one():
    H = operator(tanh_mlp(), faster=True)
    oracle, V = H._oracle, vectors(H, 3)
    expected = operator(oracle.objective.model, faster=False).apply(V)
    multiply = oracle._several.multiply

    def short(one, many, rows):
        if oracle._several.faster:
            raise torch.OutOfMemoryError
        return multiply(one, many, rows)

    oracle._several.multiply = short
    torch.testing.assert_close(H.apply(V), expected, rtol=1e-12, atol=1e-12)
    assert H.describe()["several_vectors"] == "one by one: memory ran out together"
    assert H.describe()["graphs"]["retained"] == 2
