"""Blocks by layer, module and parameter: what belongs together, and the table of it."""

import math

import numpy as np
import pytest
import torch

from spectra.algorithms.blocks import BlockTraces, add_diagonal, inner_by_parameter
from spectra.objective.parameters import ParameterSpace
from spectra.objective.vectors import VectorSpace


def blocks(sizes, samples=None, **more):
    """Traces 1, 2, … of as many parameters as there are sizes, or samples of them."""
    count = len(sizes)
    return BlockTraces(
        parameters=tuple(sizes),
        sizes=tuple(sizes.values()),
        parameter_traces=np.arange(1.0, count + 1)[None] if samples is None else samples,
        exact=samples is None,
        eigenvalues=np.array([3.0, -9.0, 1.0]),
        masses=np.full((3, count), 1 / count),
        **more,
    )


def test_samples_are_summed_within_a_probe_not_their_variances():
    # Two parameters whose errors cancel: their sum is known.
    samples = np.array([[1.0, 5.0], [3.0, 3.0], [2.0, 4.0]])
    found = blocks({"a.weight": 4, "a.bias": 2}, samples)
    whole = found.traces("module")["a"]
    assert whole.value == 6.0
    assert whole.standard_error == 0.0
    assert found.traces("parameter")["a.weight"].standard_error == pytest.approx(1 / 3**0.5)
    assert found.traces(mean=True)["a"].value == 1.0


def test_one_probe_has_no_error():
    found = blocks({"a.weight": 4, "b.weight": 2}, np.ones((1, 2)))
    assert math.isnan(found.traces()["a"].standard_error)
    assert found.traces()["a"].interval() == (-math.inf, math.inf)
    assert "inf" in str(found)


def test_the_noise_of_the_products_is_in_the_interval_of_what_is_exact():
    found = blocks({"a.weight": 4, "b.weight": 2}, noise=0.01, floor=0.5)
    assert found.traces()["a"].interval() == (0.5, 1.5)
    assert found.traces(mean=True)["a"].interval() == (0.125, 0.375)


def test_layers_are_listed_and_modules_where_there_is_one_layer():
    assert blocks({"h.0.q.weight": 4, "h.0.k.weight": 2, "h.1.q.weight": 3}).grouping == "layer"
    assert blocks({"h.0.q.weight": 4, "h.0.k.weight": 2}).grouping == "module"


def test_the_table_has_a_row_for_each_layer_in_the_models_order():
    lines = str(blocks({"embed.weight": 1000, "h.0.q.weight": 4, "h.0.k.weight": 6, "w": 2}))
    title, mean, caption, head, *rows = lines.splitlines()
    assert title.startswith("traces of 3 layers (exact")
    assert mean == "mean: the trace per parameter"
    assert "λ" in caption
    # The eigenvalues of largest magnitude.
    assert head.split()[-4:] == ["λ", "-9", "λ", "3"]
    assert [row.split()[0] for row in rows] == ["embed", "h.0", "(itself)"]
    assert rows[0].split() == ["embed", "1,000", "1", "0", "0.001", "25.0%", "25.0%"]
    assert rows[1].split() == ["h.0", "10", "5", "0", "0.5", "50.0%", "50.0%"]
    assert len({len(row) for row in (head, *rows)}) == 1


def test_a_long_table_keeps_the_largest_and_sums_the_others():
    found = blocks({f"h.{i}.weight": 2 for i in range(40)})
    rows, others = found.table()
    assert [row.name for row in rows] == [f"h.{i}" for i in range(16, 40)]
    assert others.name == "16 others"
    assert others.trace.value == sum(range(1, 17))
    assert others.size == 32
    assert others.masses == pytest.approx(np.full(3, 16 / 40))
    assert len(str(found).splitlines()) == 29
    assert len(found.rows("layer")) == 40


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_inner_products_by_parameter_are_those_of_the_parts(dtype):
    sizes = {"a.weight": 200_000, "a.bias": 3, "b.weight": 1}
    space = ParameterSpace({name: torch.zeros(size, dtype=dtype) for name, size in sizes.items()})
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, space.n, generator=generator, dtype=dtype)
    found = inner_by_parameter(space, x, y)
    products = x.double() * y.double()
    expected = [float(products[place].sum()) for place in space.slices.values()]
    assert found.dtype == np.float64
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-9)
    assert found.sum() == pytest.approx(space.inner(x, y), rel=1e-12, abs=1e-9)


def test_vectors_of_one_module_have_no_parts():
    x = torch.ones(5, dtype=torch.float64)
    for space in (VectorSpace(5), ParameterSpace({"weight": x[:3], "bias": x[3:]})):
        assert inner_by_parameter(space, x, x).shape == (0,)


def test_the_diagonal_of_a_part_is_added_to_what_is_there():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, 30, generator=generator, dtype=torch.float64)
    core = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    core = core + core.T
    total = torch.arange(30, dtype=torch.float64)
    add_diagonal(VectorSpace(len(total), total.dtype), total, rows, core)
    expected = torch.arange(30) + (rows.T @ core @ rows).diagonal()
    assert total.numpy() == pytest.approx(expected.numpy())
