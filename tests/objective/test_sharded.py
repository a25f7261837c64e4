"""Vectors of which every process has a part, here with one process that has all of them."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh

from spectra.algorithms import probes
from spectra.distributed import shard
from spectra.distributed.collectives import Ranks
from spectra.distributed.sharding import Sharding
from spectra.errors import ArgumentError
from spectra.objective import sharded
from spectra.objective.parameters import ParameterSpace
from spectra.objective.sharded import ShardedSpace
from tests.cases.networks import tanh_mlp


@given(
    sizes=st.lists(st.integers(0, 90), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_numbers_are_the_same_however_many_are_drawn_at_a_time(sizes, dtype):
    generator, count = torch.Generator().manual_seed(7), sum(sizes)
    whole = torch.randn(count, generator=generator, dtype=dtype)
    generator.manual_seed(7)

    def draw(number):
        assert number in {32, number if number < 48 else -1}
        return torch.randn(number, generator=generator, dtype=dtype)

    before, sharded._DRAWN = sharded._DRAWN, 32
    try:
        stream = sharded._Stream(draw, count)
        parts = [stream.take(size) for size in sizes]
    finally:
        sharded._DRAWN = before
    assert torch.equal(torch.cat(parts), whole)


@pytest.fixture(scope="module")
def spaces(tmp_path_factory):
    meeting = f"file://{tmp_path_factory.mktemp('meet') / 'ing'}"
    dist.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    try:
        plain, model = tanh_mlp(), shard(tanh_mlp(), init_device_mesh("cpu", (1,)))
        ranks, tensors = Ranks(dist.group.WORLD), dict(model.named_parameters())
        sharding = Sharding(list(tensors.values()), ranks)
        yield ParameterSpace(dict(plain.named_parameters())), ShardedSpace(tensors, sharding, ranks)
    finally:
        dist.destroy_process_group()


def test_one_process_has_the_layout_of_unsharded_parameters(spaces):
    plain, spread = spaces
    assert spread.n == spread.length == plain.n
    assert spread.slices == plain.slices
    assert spread.sizes == plain.sizes
    assert repr(spread) == f"{repr(plain)[:-1]}, 74 of them on rank 0)"
    x, y = (probes.gaussian(space, probes.seeded(3)) for space in spaces)
    assert torch.equal(x, y)
    assert torch.equal(spread.own(x), x)
    assert torch.equal(spread.whole(torch.stack([x, 2 * x])), torch.stack([x, 2 * x]))
    assert spread.norm(y) == pytest.approx(plain.norm(x), rel=1e-15)
    assert spread.inner_by_parameter(y, y) == pytest.approx(plain.inner_by_parameter(x, x))
    for place in (0, 7, 73):
        assert torch.equal(spread.unit(place), plain.unit(place))
        assert spread.entry(y, place) == float(x[place])
    tensors = spread.unflatten(y)
    assert torch.equal(spread.flatten(tensors), y)
    assert torch.equal(plain.flatten(tensors), y)
    assert set(spread.unflatten(y, "2.*")) == {"2.weight", "2.bias"}
    part = spread.subspace([2, 3])
    assert part.n == 24
    assert part.names == ("2.weight", "2.bias")


def test_tensors_that_do_not_fit_are_refused(spaces):
    spread = spaces[1]
    tensors = spread.unflatten(spread.zeros())
    with pytest.raises(ArgumentError, match=r"'0\.bias' has shape"):
        spread.flatten({**tensors, "0.bias": torch.zeros(3)})
    with pytest.raises(ArgumentError, match=r"check '0\.bias'"):
        spread.flatten({name: t for name, t in tensors.items() if name != "0.bias"})
    with pytest.raises(ArgumentError, match=r"expected whole vectors \(\.\.\., 74\)"):
        spread.own(torch.zeros(2, 73))
    with pytest.raises(ArgumentError, match=r"shape \(74,\)"):
        spread.unflatten(torch.zeros(3, dtype=torch.float64))
