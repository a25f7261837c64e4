"""Parameters spread over processes give what they give in one; what fails on one, fails on all."""

import json

import numpy as np
import pytest
import torch
import torch.distributed as dist

import spectra
from spectra.documents import sealed, to_bytes
from tests.distributed import cases

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch.distributed is not there")


def alone(name, dtype=torch.float64, **options):
    return spectra.HessianOperator(*cases.problem(name, dtype), **options)


def nearly(found, right, tol):
    right = torch.as_tensor(right)
    return float((torch.as_tensor(found) - right).abs().max()) <= tol * float(right.abs().max())


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_products_are_those_of_all_data_and_all_parameters(size, tmp_path):
    pytest.importorskip("transformers")
    found = cases.run("sharded_products", size, tmp_path)
    # The model's own norms are in single precision, and round as segments do.
    options = {"llama": {"recompute": "model.layers.*"}}
    for name in cases.PROBLEMS:
        for dtype, tol in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
            H = alone(name, dtype, **options.get(name, {}))
            n = H.space.n
            product = H.apply(cases.directions(n, dtype)[:, 0].contiguous())
            truth = {"value": H.value(), "gradient": H.gradient()}
            truth |= {"product": product, "again": product}
            for graph in ("fresh", "retained"):
                key = f"{name} {dtype} {graph}"
                if key not in found[0]:
                    continue
                answers = [answer[key] for answer in found]
                # Every rank has its part: no more than the largest pieces of all parameters.
                assert sum(answer["length"] for answer in answers) == n
                pieces = [-(-p.shape[0] // size) * p[0].numel() for p in H.objective.parameters]
                assert max(answer["length"] for answer in answers) <= sum(pieces)
                for rank, answer in enumerate(answers):
                    for kind, right in truth.items():
                        assert nearly(answer[kind], right, tol), (name, dtype, graph, rank, kind)
                        assert np.array_equal(answer[kind], answers[0][kind])


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_every_answer_is_that_of_one_process(size, tmp_path):
    model, loss, data = cases.problem("mlp")
    truth = cases.asked(spectra.HessianOperator(model, loss, data[:2]))
    for answers in cases.run("sharded_answers", size, tmp_path):
        assert set(truth) - set(answers) == {"weights", "forms"}
        for name, found in answers.items():
            np.testing.assert_allclose(found, truth[name], rtol=1e-8, atol=1e-9, err_msg=name)


def test_shards_are_used_as_they_are_whoever_cut_them(tmp_path):
    model, loss, data = cases.problem("mlp")
    H, G = (
        kind(model, loss, data[:2])
        for kind in (spectra.HessianOperator, spectra.GaussNewtonOperator)
    )
    truth = {type(A).__name__: A.apply(cases.directions(74)) for A in (H, G)}
    truth["block"] = G.block("2.*").apply(cases.directions(24)[:, 0].contiguous())
    truth["trace"] = spectra.trace(G, max_matvecs=6, progress=False).value
    truth["loss"] = float(model(data[0][0]).sum().detach())
    model, loss, data = cases.problem("mlp", torch.float32)
    half = spectra.HessianOperator(model.bfloat16(), loss, data[:2], compute_dtype=torch.float32)
    truth["stored in half precision"] = half @ cases.directions(74).numpy()
    for answers in cases.run("kinds", 4, tmp_path):
        assert len(answers) == 5 * 4 + 2 + 1
        for name, found in answers.items():
            # The caller's own pass computes under FSDP as PyTorch does.
            tol = 1e-6 if name.endswith(("loss", "half precision")) else 1e-12
            assert nearly(found, truth[name.split(", ")[-1]], tol), name


@pytest.mark.slow
def test_a_training_under_fsdp_is_monitored(tmp_path):
    model, loss, data = cases.problem("mlp")
    right = cases.trained(model, loss, data[0], data[:2])
    assert len(right) == 3
    for answer in cases.run("monitored", 2, tmp_path):
        for found, known in zip(answer, right, strict=True):
            # Under FSDP the training itself computes in single precision here and there.
            assert found[:2] == known[:2]
            assert found[2:] == pytest.approx(known[2:], rel=1e-5)


@pytest.mark.slow
def test_a_run_goes_on_in_other_shards_or_in_none(tmp_path):
    first, second = cases.run("sharded_checkpoints", 2, tmp_path)
    whole = first["whole"]
    for answer in (first, second):
        assert answer["stopped"]["partial"]
        np.testing.assert_array_equal(answer["again"]["numbers"], whole["numbers"])
        spent = 29 + answer["stopped"]["products"] + answer["again"]["products"]
        assert whole["products"] <= spent <= whole["products"] + 4
    recorded = (tmp_path / "recorded").read_bytes()
    (tmp_path / "meet").unlink(missing_ok=True)
    for answer in cases.run("going_on_in_shards", 3, tmp_path):
        np.testing.assert_allclose(answer["numbers"], whole["numbers"], rtol=1e-9)
        assert answer["products"] <= whole["products"] - 29 + 2
    (tmp_path / "recorded").write_bytes(recorded)
    model, loss, data = cases.problem("mlp")
    H = spectra.HessianOperator(model, loss, data[:3])
    unsharded = cases.resumed(H, tmp_path / "recorded")
    np.testing.assert_allclose(unsharded["numbers"], whole["numbers"], rtol=1e-9)
    assert unsharded["products"] <= whole["products"] - 29 + 2


def test_a_process_that_is_killed_ends_the_others(tmp_path):
    first, _, last = cases.run("killed_in_shards", 3, tmp_path, lost=(1,))
    for rank, answer in ((0, first), (2, last)):
        assert f"rank {rank} of 3 could not reach the others" in answer["said"]
        assert answer["seconds"] < cases.TIMEOUT.total_seconds()


def test_eigenvectors_are_gathered_and_stored(tmp_path):
    model, loss, data = cases.problem("mlp")
    H = spectra.HessianOperator(model, loss, data[:2])
    right = spectra.eigsh(H, 2, tol=1e-8, progress=False)
    found = cases.run("sharded_results", 3, tmp_path)
    whole = spectra.load(tmp_path / "whole")
    torch.testing.assert_close(whole.vectors, right.vectors, rtol=0, atol=1e-7)
    assert "2 eigenpairs (largest in magnitude) of n = 74" in str(whole)
    loaded = H.space.load_vectors(tmp_path / "vectors")
    assert torch.equal(loaded, whole.vectors)
    first = H.space.unflatten(loaded[:, 0].contiguous(), "2.*")
    assert set(first) == {"2.weight", "2.bias"}
    for rank, answer in enumerate(found):
        assert answer["text"] == str(whole)
        assert "spread over processes: gather them with H.collected(result)" in answer["refused"]
        assert answer["here"] == (rank == 0)
        assert answer["again"]
        assert torch.equal(answer["in other shards"].T, whole.vectors)
        assert all(torch.equal(answer["by module"][name], part) for name, part in first.items())
    assert not list(tmp_path.glob("refused*"))
    second = tmp_path / "vectors" / "vectors-00002-of-00003.json"
    other = {**json.loads(second.read_text("utf-8")), "writing": "an earlier one"}
    other.pop("checksum")
    second.write_bytes(to_bytes(sealed(other)))
    with pytest.raises(spectra.errors.StorageError, match="of another writing than the first"):
        H.space.load_vectors(tmp_path / "vectors")
    second.unlink()
    with pytest.raises(spectra.errors.StorageError, match="could not read vectors"):
        H.space.load_vectors(tmp_path / "vectors")
    with pytest.raises(spectra.errors.StorageError, match="not of these parameters"):
        H.block("2.*").space.load_vectors(tmp_path / "vectors")
    with pytest.raises(spectra.errors.StorageError, match="there are no vectors in"):
        H.space.load_vectors(tmp_path)
    with pytest.raises(spectra.errors.ArgumentError, match=r"expected vectors \(74, k\)"):
        H.space.save_vectors(loaded.T, tmp_path / "other")


def test_what_one_rank_does_otherwise_ends_it_on_all(tmp_path):
    found = cases.run("sharded_failures", 3, tmp_path)
    # Of the weights by themselves the Hessian is 0.2.
    V = cases.directions(74)
    decayed = alone("mlp").apply(V) + 0.2 * V
    for rank, answer in enumerate(found):
        for name, words in {
            "an exception": "LossError: the loss raised ValueError on batch 1: out of luck",
            "in a derivative": "cannot be differentiated twice: no derivative today",
            "a loss of nan": "the loss of batch 0 is nan",
            "other options": "rank 2 differs from rank 0 in: the option k (2 on rank 0, 3 on rank",
            "another seed": "rank 1 differs from rank 0 in: the option seed (0 on rank 0, 1 on",
            "another question": "rank 2 differs from rank 0 in: question",
            "a whole vector": f"expected a vector of shape ({(31, 31, 12)[rank]},)",
            "a vector of a wrong length": "ArgumentError: ",
            "weight decay": "take recompute='none', or leave the parameter out",
            "weights in one vector": "take recompute='none', which gathers all",
            "parts of the data": "only where each process has all parameters",
            "other weights": "rank 2 differs from rank 0 in: the numbers of a parameter 'bias'",
            "other copies": "rank 2 differs from rank 0 in: the numbers of '0.bias', of which both",
            "not all": "spread over processes (DTensor): pass process_group=True",
        }.items():
            assert words in answer[name], (rank, name, answer[name])
        assert "the data of one process of several" in answer["note"]
        assert nearly(answer["decayed"], decayed, 1e-12)
        for name in (
            "an exception",
            "in a derivative",
            "a loss of nan",
            "a vector of a wrong length",
        ):
            assert ("rank 2 of 3 failed, and rank" in answer[name]) == (rank != 2), name
        # Still in step.
        assert answer["then"] == pytest.approx(alone("mlp").value(), rel=1e-12)
