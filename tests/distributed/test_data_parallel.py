"""Data spread over processes give what they give in one; what fails on one, fails on all."""

import os

import numpy as np
import pytest
import torch
import torch.distributed as dist

import spectra
from spectra.distributed.collectives import ranks_of
from spectra.distributed.launch import EveryNth
from spectra.errors import ArgumentError, ArgumentTypeError
from tests.distributed import cases

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and hasattr(os, "fork")), reason="no torch.distributed, or no fork"
)


def alone(name, dtype=torch.float64):
    return spectra.HessianOperator(*cases.problem(name, dtype))


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_products_are_those_of_all_data_and_cost_one_sum(size, tmp_path):
    pytest.importorskip("transformers")
    found = cases.run("products", size, tmp_path)
    for name in cases.PROBLEMS:
        for dtype, tol in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
            H = alone(name, dtype)
            truth = {
                "products": H.apply(cases.directions(H.space.n, dtype)),
                "value": torch.tensor(H.value()),
                "gradient": H.gradient(),
            }
            key = f"{name} {dtype}"
            for rank in range(size):
                for kind, right in truth.items():
                    mine = torch.as_tensor(found[rank][key][kind])
                    scale = float(right.abs().max())
                    assert float((mine - right).abs().max()) <= tol * scale, (key, rank, kind)
                    # Bit for bit, or the ranks would part in a long run.
                    assert torch.equal(mine, torch.as_tensor(found[0][key][kind]))
                # One sum of n numbers, and a few numbers with which the ranks keep in step.
                calls, sent = found[rank][key]["calls"]
                assert calls == 2
                assert sent <= H.space.n * dtype.itemsize + 100


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_every_answer_is_that_of_one_process(size, tmp_path):
    found = cases.run("answers", size, tmp_path)
    truth = cases.asked(alone("mlp"))
    for answers in found:
        for name, right in truth.items():
            np.testing.assert_allclose(answers[name], right, rtol=1e-8, atol=1e-9, err_msg=name)
            np.testing.assert_array_equal(answers[name], found[0][name], err_msg=name)


def test_distributed_data_parallel_is_taken_off(tmp_path):
    H = alone("mlp")
    right = H.apply(cases.directions(H.space.n))
    for answer in cases.run("wrapped", 2, tmp_path):
        torch.testing.assert_close(answer["products"], right, rtol=1e-12, atol=1e-14)
        note = "computed on the module inside of DistributedDataParallel"
        assert answer["notes"] == answer["block notes"] == [note]
        assert "process_group=True" in answer["refused"]


def test_what_one_rank_does_otherwise_ends_it_on_all(tmp_path):
    found = cases.run("failures", 3, tmp_path)
    *others, last = found
    assert last["an exception"].startswith("LossError: the loss raised ValueError on batch 0: out")
    for rank, answer in enumerate(others):
        # Of the kind that it is there, so that all catch it or none.
        assert answer["an exception"] == (
            f"LossError: rank 2 of 3 failed, and rank {rank} ends with it: LossError: the "
            "loss raised ValueError on batch 0: out of luck"
        )
    for answer in found:
        for name, words in {
            "other options": "rank 2 differs from rank 0 in: the option k (2 on rank 0, 3 on rank",
            "another seed": "rank 1 differs from rank 0 in: the option seed (0 on rank 0, 1 on",
            "another question": "(product on rank 0, value and gradient on rank 2)",
            "another vector": "rank 2 differs from rank 0 in: the vectors",
            "other parameters": "rank 2 differs from rank 0 in: the parameters that are analysed",
            "no parameters": "ParameterSelectionError: ",
            "other weights": "rank 2 differs from rank 0 in: the numbers of '0.bias'",
            "no data at all": "DataError: none of the 3 processes holds a batch",
        }.items():
            assert words in answer[name], name
        assert answer["then"] == pytest.approx(alone("mlp").value(), rel=1e-12)


def test_a_process_that_is_killed_ends_the_others(tmp_path):
    first, _, last = cases.run("killed", 3, tmp_path, lost=(1,))
    for rank, answer in ((0, first), (2, last)):
        assert f"rank {rank} of 3 could not reach the others" in answer["said"]
        assert answer["seconds"] < cases.TIMEOUT.total_seconds()


def test_a_run_goes_on_where_it_was_ended_on_any_number_of_ranks(tmp_path):
    first, second = cases.run("checkpoints", 2, tmp_path)
    whole = first["whole"]
    assert whole["products"] > 40
    for answer in (first, second):
        assert answer["stopped"]["partial"]
        assert "stopped by SIGTERM" in answer["stopped"]["notes"]
        again = answer["again"]
        np.testing.assert_array_equal(again["numbers"], whole["numbers"])
        assert not again["partial"]
        # What was on record, and the first product once more.
        spent = 29 + answer["stopped"]["products"] + again["products"]
        assert whole["products"] <= spent <= whole["products"] + 4
    assert first["refused"] == second["refused"] == "CheckpointError"
    recorded = (tmp_path / "recorded").read_bytes()
    meet = tmp_path / "meet"
    meet.unlink(missing_ok=True)
    for answer in cases.run("going_on", 3, tmp_path):
        np.testing.assert_allclose(answer["numbers"], whole["numbers"], rtol=1e-9)
        assert answer["products"] <= whole["products"] - 29 + 2
    (tmp_path / "recorded").write_bytes(recorded)
    alone_again = cases.resumed(alone("mlp"), tmp_path / "recorded")
    np.testing.assert_allclose(alone_again["numbers"], whole["numbers"], rtol=1e-9)
    assert alone_again["products"] <= whole["products"] - 29 + 2


def test_a_group_has_to_be_one(tmp_path):
    assert ranks_of(None) is None
    assert ranks_of(False) is None
    with pytest.raises(ArgumentError, match="is not initialised"):
        ranks_of(True)
    meeting = f"file://{tmp_path / 'meet'}"
    dist.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    try:
        with pytest.raises(ArgumentTypeError, match="process_group is a str"):
            ranks_of("world")
        with pytest.raises(ArgumentError, match="not in process_group"):
            ranks_of(dist.GroupMember.NON_GROUP_MEMBER)
        # One process by itself.
        model, loss, data = cases.problem("mlp")
        H = spectra.HessianOperator(model, loss, data, process_group=True)
        V = cases.directions(H.space.n)
        torch.testing.assert_close(H.apply(V), alone("mlp").apply(V), rtol=1e-13, atol=1e-15)
        assert H.collective_calls()[0] > 0
        # What is made of it is asked on the same ranks, in coordinates of its own, too.
        assert spectra.projected(H, V).space.ranks is H.space.ranks
        with pytest.raises(ArgumentError, match="track runs in one process"):
            spectra.track(H, ["weights.pt"])
        assert alone("mlp").collective_calls() == (0, 0)
    finally:
        dist.destroy_process_group()


def test_every_nth_batch_of_a_loader_that_shuffles_is_the_same_in_every_pass():
    model, loss, data = cases.problem("mlp")
    x, y = (torch.cat([batch[i] for batch in data]) for i in (0, 1))
    generator = torch.Generator().manual_seed(3)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, y), batch_size=4, shuffle=True, generator=generator
    )
    halves = [
        spectra.HessianOperator(model, loss, EveryNth(loader, rank, 2), graph="fresh")
        for rank in (0, 1)
    ]
    V = cases.directions(halves[0].space.n)
    weights = [sum(len(b[1]) for b in EveryNth(loader, rank, 2)) for rank in (0, 1)]
    for H in halves:
        torch.testing.assert_close(H.apply(V), H.apply(V), rtol=0, atol=0)
    together = sum(w * H.apply(V) for w, H in zip(weights, halves, strict=True)) / len(y)
    torch.testing.assert_close(together, alone("mlp").apply(V), rtol=1e-12, atol=1e-14)
