"""`torchrun … -m spectra`, as people start it: one directory, the numbers of one process."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import spectra
from spectra.cli import main

TARGET = """
import os
from tests.distributed import cases


def target():
    return cases.problem("mlp")


def in_shards():
    from spectra.distributed import shard
    model, loss, data = target()
    return shard(model), loss, data[:3]


def three_batches():
    model, loss, data = target()
    return model, loss, data[:3]


def broken():
    if os.environ.get("RANK") == "1":
        raise ValueError("not here")
    return target()
"""


def torchrun(place, *arguments):
    """Two processes on this machine."""
    program = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    return subprocess.run(
        [*program, "-m", "spectra", *arguments],
        cwd=place,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(["", *sys.path])},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


@pytest.fixture
def place(tmp_path):
    (tmp_path / "target.py").write_text(TARGET)
    return tmp_path


@pytest.mark.slow
def test_a_model_in_shards_is_written_whole(place, monkeypatch, capsys):
    options = ("--top", "2", "--density", "--steps", "4", "--preflight", "off", "--out")
    done = torchrun(place, "analyze", "target.py:in_shards", *options, "two")
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))
    assert main(["analyze", "target.py:three_batches", *options, "one"]) == 0
    capsys.readouterr()
    two, one = spectra.load("two").eigenpairs, spectra.load("one").eigenpairs
    assert two.vectors.shape == one.vectors.shape == (74, 2)
    np.testing.assert_allclose(two.values, one.values, rtol=1e-6)
    np.testing.assert_allclose(abs(two.vectors), abs(one.vectors), atol=1e-3)


OPTIONS = ("--landscape", "--top", "3", "--steps", "10", "--rtol", "0.2", "--seed", "1", "--out")


def test_two_processes_write_one_run_with_the_numbers_of_one(place, monkeypatch, capsys):
    done = torchrun(place, "analyze", "target.py:target", *OPTIONS, "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Wrote two") == 1
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))
    assert main(["analyze", "target.py:target", *OPTIONS, "one"]) == 0
    capsys.readouterr()
    two, one = (json.loads((place / name / "run.json").read_text()) for name in ("two", "one"))
    assert two["operator"]["ranks"] == 2
    np.testing.assert_allclose(two["eigenpairs"]["values"], one["eigenpairs"]["values"], rtol=1e-9)
    for name in ("loss", "gradient_norm"):
        assert two[name] == pytest.approx(one[name], rel=1e-12)
    for name in ("trace", "frobenius_norm"):
        assert two[name]["value"] == pytest.approx(one[name]["value"], rel=1e-9)
    # Which way along an eigenvector is positive is arbitrary.
    for here, there in zip(two["landscape"]["values"], one["landscape"]["values"], strict=True):
        assert sorted(here) == pytest.approx(sorted(there), rel=1e-6)
    assert not (place / "two" / "checkpoint").exists()


@pytest.mark.slow
def test_one_process_that_fails_ends_both_with_its_words(place):
    done = torchrun(place, "analyze", "target.py:broken", *OPTIONS, "run")
    assert done.returncode != 0
    assert not (place / "run").exists()
    refused = torchrun(place, "track", "target.py:target", "w.pt", "--out", "run")
    assert refused.returncode != 0
    assert refused.stderr.count("spectra: error: only `analyze` and `check` run in several") == 1
