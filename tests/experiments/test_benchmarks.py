"""The benchmark runs, says which packages are absent, and judges answers by what they are."""

import importlib
import json
import os
import sys
import warnings

import numpy as np
import pytest
import torch

from experiments.benchmarks import __main__ as program
from experiments.benchmarks import answers, compiling, peers, profile, tables, timing
from experiments.benchmarks.workloads import TINY

PEERS = {"curvlinops", "hessian-eigenthings", "PyHessian", "landscaper", "BackPACK"}


@pytest.fixture
def _without_peers(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)


@pytest.fixture
def _as_it_was(monkeypatch):
    # The program sets these for its whole process, which here is that of other tests.
    resource = pytest.importorskip("resource", reason="limits of a process are a matter of Unix")
    threads = torch.get_num_threads()
    for name in ("OMP_NUM_THREADS", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "1")
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    yield
    resource.setrlimit(resource.RLIMIT_DATA, limits)
    torch.set_num_threads(threads)


@pytest.fixture
def workload(tmp_path):
    return TINY["tiny"](tmp_path, many=True)


@pytest.mark.usefixtures("_without_peers", "_as_it_was")
def test_the_quick_run_names_the_packages_that_are_absent(tmp_path):
    only = ["--only", "tiny/products", "--only", "tiny/top 1", "--only", "tiny/density"]
    arguments = ["--quick", "--tiny", "--threads", "1", "--out", str(tmp_path)]
    assert program.main([*arguments, *only]) == 0
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [part["task"] for part in results["parts"]] == ["products", "top 1", "density"]
    for record in results["parts"][0]["many"]:
        if record["contestant"].split(",")[0] in PEERS:
            assert record["failure"].endswith("is not installed")
        else:
            assert record["error"] < tables.WRONG
            assert all(np.isfinite(record["first"] + record["amortised"]))
    page = (tmp_path / "benchmarks.md").read_text(encoding="utf-8")
    assert "times are ratios within one run" in page
    assert "| spectra, retained |" in page


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="others do not tell it in /proc")
@pytest.mark.usefixtures("_as_it_was")
def test_who_asks_for_more_memory_than_there_is_fails_alone(workload):
    program.bound_memory()
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def greedy(w):
        sketch = torch.empty(free, dtype=torch.uint8, device="cpu")
        return peers.Tools(lambda v: sketch)

    records = timing.products(workload, {"greedy": greedy}, 1)
    assert "alloc" in records[0]["failure"]


def test_a_wrong_product_is_said_to_be_wrong(workload):
    def without_weights(w):
        product = peers.plain_fresh(w).hvp
        return peers.Tools(lambda v: 1.5 * product(v))

    records = timing.products(workload, {"wrong": without_weights}, 1)
    assert records[0]["error"] == pytest.approx(0.5)
    assert "wrong: 50 % off" in tables.wrong(records[0])


def test_a_failure_is_its_first_line(workload):
    def broken(w):
        raise RuntimeError("no such kernel\nand much more")

    assert timing.products(workload, {"broken": broken}, 1)[0]["failure"] == (
        "RuntimeError: no such kernel"
    )


def test_residuals_are_measured_not_believed(workload):
    def claims(w):
        return peers.Tools(
            peers.plain_fresh(w).hvp,
            top=lambda k, setting, seed: (np.ones(k), torch.eye(w.n)[:, :k]),
            tolerances=[1e-3],
        )

    contestants = {"claims": claims, "spectra": peers.CONTESTANTS["spectra"]}
    false, true = answers.largest(workload, contestants, 2, rounds=1, limit=60)
    assert false["failure"].startswith("residual")
    assert true["residual"] <= answers.RESIDUAL


def test_distance_of_two_measures():
    exact = np.array([0.0, 0.0, 0.0, 4.0])
    assert answers.distance((np.array([0.0, 4.0]), np.array([0.75, 0.25])), exact) == 0
    assert answers.distance((np.array([1.0]), np.array([1.0])), exact) == pytest.approx(1.5)


def test_a_profile_adds_up_and_leaves_everything_as_it_was(workload):
    before = peers.spectra.HessianOperator._checked_products
    records = profile.answers(workload, rounds=1)
    assert [record["what"] for record in records] == ["top 10", "analysis"]
    for record in records:
        shares = [record[key][0] for key in ("autograd", "around", "outside")]
        assert sum(shares) == pytest.approx(1)
        assert all(share > 0 for share in shares)
        assert record["products"][0] > 10
    assert peers.spectra.HessianOperator._checked_products is before
    text = tables.profiles({"parts": [part("tiny", "profile", records)]})
    assert "| top 10, tiny |" in text


def test_what_compiling_says_is_taken_over(monkeypatch, workload):
    with warnings.catch_warnings():
        # Importing it warns of PyTorch's own deprecations.
        warnings.simplefilter("ignore")
        importlib.import_module("torch._inductor.compile_fx")
    # Without the half minute that it waits, and a compiler.
    monkeypatch.setattr("spectra.oracle.compiled._PATIENCE", 0.0)
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda module, inputs: module)
    h, said = compiling.compiled(workload)
    assert said["parts"] + len(said.get("refused", [])) >= 1
    v = workload.vector(0)
    torch.testing.assert_close(h @ v, peers.plain_fresh(workload).hvp(v))


def part(workload, task, records):
    return {"workload": workload, "task": task, "records": records}


def test_the_fastest_other_package_is_an_accurate_one():
    records = [
        {"contestant": "spectra", "gradients": [4.0, 5.0, 6.0]},
        {"contestant": "wrong", "gradients": [1.0], "failure": "residual 1e-1"},
        {"contestant": "slow", "gradients": [20.0]},
        {"contestant": "quick", "gradients": [10.0]},
    ]
    text = tables.fastest({"parts": [part("cnn", "top 10 of many", records)]})
    assert "| Top 10, many batches | CNN | quick | 0.50 |" in text
    assert tables.fastest({"parts": [part("cnn", "top 10", records[:2])]}) == ""


def test_an_aim_is_held_against_the_sum_of_the_fastest_others():
    def found(task, ours, other, **facts):
        records = [
            {"contestant": "spectra", "gradients": [ours], "seconds": [ours / 10]},
            {"contestant": "other", "gradients": [other]},
            {"contestant": "slower", "gradients": [2 * other]},
        ]
        return {**part("cnn", task, records), "limit": 30.0, **facts}

    parts = [found("top 10", 20.0, 100.0), found("trace", 20.0, 300.0), found("density", 9.0, 50.0)]
    parts.append(found("analysis", 90.0, 800.0))
    text = tables.aims({"parts": parts})
    assert "| analysis | CNN | 0.20 | **0.20** | other, other, other |" in text
    # Nobody was accurate in thirty seconds, of which a gradient takes a tenth.
    for record in parts[1]["records"][1:]:
        record["failure"] = "more than 30 s"
    text = tables.aims({"parts": parts})
    assert "| **less than 0.20** | other, nobody, other |" in text
    # Or cannot be at all: then there is no sum.
    for record in parts[1]["records"][1:]:
        record["failure"] = "7 % off"
    assert tables.aims({"parts": parts}) == ""


def test_an_aim_of_products_is_reached_or_not():
    times = {"spectra": 2.0, "spectra, fresh": 3.5, "PyHessian": 1.9, "BackPACK": 4.0}
    times |= {"plain, graph retained": 1.8, "plain, graph rebuilt": 3.4, "curvlinops": 2.1}
    records = [
        {"contestant": name, "amortised": [time], "error": 0.1 if name == "curvlinops" else 0.0}
        for name, time in times.items()
    ]
    text = tables.aims({"parts": [part("cnn", "products", records)]})
    assert "| a product, gradients | CNN | 2.50 | **2.00** | 1.80 |" in text
    assert "| without kept graphs | CNN | 3.40 | 3.50 | 3.40 |" in text
    # One that is wrong is no match.
    assert "| CNN | 0.71 | **0.50** | BackPACK; by hand 0.45 |" in text
    assert "| beside the fastest | CNN | 1.00 | 1.05 | PyHessian; by hand 0.95 |" in text


def test_results_of_several_processes_are_one_page():
    first = {"machine": 1, "seconds": 5, "parts": [part("cnn", "top 1", [])]}
    second = {"machine": 1, "seconds": 9, "parts": [part("gpt", "top 1", [])]}
    joined = tables.joined([first, second])
    assert [p["workload"] for p in joined["parts"]] == ["cnn", "gpt"]
    assert joined["seconds"] == 9


def test_a_time_limit_that_was_turned_into_another_error_is_one():
    def turned():
        try:
            while True:
                pass
        except timing.TooLong as error:
            raise RuntimeError("the interpreter failed") from error

    with pytest.raises(timing.TooLong, match=r"more than 0\.01 s"), timing.deadline(0.01):
        turned()
    with pytest.raises(RuntimeError, match="its own"), timing.deadline(60.0):
        raise RuntimeError("its own")
