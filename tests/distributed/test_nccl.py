"""On a GPU the same is asked of NCCL, with one process, shards included."""

import pytest
import torch
import torch.distributed as dist

import spectra
from spectra.distributed import shard
from tests.distributed import cases

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and dist.is_nccl_available()), reason="there is no GPU"
)


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    meeting = f"file://{tmp_path_factory.mktemp('meet') / 'ing'}"
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", init_method=meeting, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def on_gpu(name):
    model, loss, data = cases.problem(name)
    return model.cuda(), loss, data


@pytest.mark.parametrize("name", ["mlp", "gpt"])
@pytest.mark.parametrize("way", ["copies", "shards", "FSDP"])
def test_answers_are_those_without_a_group(name, way, group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    H = spectra.HessianOperator(*on_gpu(name), process_group=False)
    v = cases.directions(H.space.n)[:, 0].contiguous().cuda()
    right = H.apply(v)
    pairs = spectra.eigsh(H, 3, progress=False)
    model, loss, data = on_gpu(name)
    if way == "shards":
        model = shard(model)
    elif way == "FSDP":
        # As a whole: embedding and head are one parameter, and have to stay one.
        model = fully_shard(model, mesh=init_device_mesh("cuda", (1,)))
    G = spectra.HessianOperator(model, loss, data, process_group=True)
    found = G.space.whole(G.apply(G.space.own(v)))
    torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-13)
    again = spectra.eigsh(G, 3, progress=False)
    assert again.values == pytest.approx(pairs.values, rel=1e-8)
    trace, there = (spectra.trace(A, max_matvecs=8, progress=False).value for A in (G, H))
    assert trace == pytest.approx(there, rel=1e-9)
    assert G.collective_calls()[0] > 0
