"""Probes spread over groups of processes are those of one, combined into one estimate."""

import numpy as np
import pytest
import torch.distributed as dist

import spectra
from tests.distributed import cases

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch.distributed is not there")


@pytest.mark.parametrize("size", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_probes_of_all_groups_are_those_of_one_process(size, tmp_path):
    alone = spectra.HessianOperator(*cases.problem("mlp"))
    truth = cases.estimated(alone)
    groups = 3 if size == 3 else 2
    for rank, answer in enumerate(cases.run("probe_groups", size, tmp_path)):
        for name in ("trace", "norm"):
            # A round is as many probes as there are groups: up to that many fewer one too much.
            found, right = answer[name], truth[name]
            assert len(right) <= len(found) < len(right) + groups
            np.testing.assert_allclose(found[: len(right)], right, rtol=1e-10)
        for name in ("nodes", "weights"):
            np.testing.assert_allclose(answer[name], truth[name], rtol=1e-8, atol=1e-12)
        low, high = answer["auto"][1:]
        assert low <= float(alone.to_dense().trace()) <= high
        assert answer["converged"] == truth["converged"]
        assert answer["trace, matvecs"] == len(answer["trace"])
        assert answer["density, matvecs"] == truth["density, matvecs"] == 5 * 6
        assert answer["groups"] == groups
        # Each has computed its share.
        assert answer["own"] <= alone.matvecs / groups + 3 + 6
        assert "the option seed" in answer["another seed"] or "failed" in answer["another seed"]
        if size == 3:
            assert ("rank 2 of 3 failed, and rank" in answer["failed"]) == (rank != 2)
            assert answer["failed"].startswith("LossError: ")
