"""The programs on large models run on small ones, and what they print is true of those."""

import json

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch.nn import functional

import spectra
from experiments.large_models import memory_and_time, tables

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def one_gpu():
    pytest.importorskip("transformers")
    from experiments.large_models import one_gpu

    return one_gpu


@pytest.fixture(scope="module")
def found(one_gpu):
    return one_gpu.measured(one_gpu.TINY, CPU, 60.0)


@pytest.fixture(scope="module")
def in_double(one_gpu):
    """The product of the same model in float64, by two calls of `torch.autograd.grad`."""
    model = one_gpu.llama(one_gpu.TINY, CPU).double()
    # The kernels of PyTorch's attention that are chosen by default have no second derivative.
    model.set_attn_implementation("eager")
    parameters = list(model.parameters())
    tokens = one_gpu.batch(one_gpu.TINY, CPU)["input_ids"]
    logits = model(input_ids=tokens).logits[:, :-1]
    loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradients])

    def product(v):
        terms = torch.autograd.grad(flat @ v, parameters, retain_graph=True)
        return torch.cat([term.reshape(-1) for term in terms])

    return product


def test_products_in_single_precision_are_those_of_plain_double_backward(one_gpu, in_double):
    model = one_gpu.llama(one_gpu.TINY, CPU)
    data = [one_gpu.batch(one_gpu.TINY, CPU)]
    loss = spectra.losses.causal_lm()
    H = spectra.HessianOperator(model, loss, data, compute_dtype=torch.float32)
    v = torch.randn(H.shape[0])
    truth = in_double(v.double())
    assert (H @ v - truth).norm() <= 1e-5 * truth.norm()
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_the_largest_eigenvalues_are_those_that_arpack_finds_in_double_precision(found, in_double):
    n = found["n"]

    def matvec(x):
        return in_double(torch.from_numpy(x.reshape(-1).copy())).numpy()

    operator = LinearOperator((n, n), matvec=matvec, dtype=np.float64)
    truth = eigsh(operator, k=3, which="LA", return_eigenvectors=False, tol=1e-8)[::-1]
    pairs = found["eigenpairs"]
    rounding = 1e-5 * abs(truth[0])
    assert (abs(pairs.values - truth) <= pairs.residuals + rounding).all()
    assert pairs.values[0] == pytest.approx(truth[0], rel=1e-5)
    assert found["density"].nodes.max() <= truth[0] + rounding


def test_the_table_says_what_was_measured(one_gpu, found):
    text = one_gpu.table(found)
    assert found["defect"] <= 1e-6
    assert f"| parameters | {found['n']:,}, " in text
    assert "stored in bfloat16, computed in float32" in text
    assert f"{found['eigenpairs'].values[0]:.6g} ± " in text
    assert "11 vectors" in text
    assert f"{found['later'] / found['gradient']:.2f} gradients" in text


def test_without_time_there_is_a_table_of_what_was_found(one_gpu):
    text = one_gpu.table(one_gpu.measured(one_gpu.TINY, CPU, 0.0))
    assert "| density | left out: no time |" in text
    assert "| eigenvalues | left out: no time |" in text
    assert "| later product | " in text


def test_the_large_model_has_a_billion_parameters(one_gpu):
    with torch.device("meta"):
        model = one_gpu.llama(one_gpu.LARGE, torch.device("meta"))
    assert sum(p.numel() for p in model.parameters()) >= 1e9


@pytest.mark.slow
def test_recomputed_blocks_take_less_than_half_of_the_memory_of_pytorch():
    setting = memory_and_time.Setting(blocks=8, width=256, length=512, sequences=1)
    plain, ours = (
        memory_and_time.in_a_process(name, setting, memory_and_time.LIVE)["peak"]
        for name in (memory_and_time.PLAIN, memory_and_time.RECOMPUTED)
    )
    assert ours <= 0.5 * plain


def test_all_contestants_have_the_same_product(tmp_path):
    threads = torch.get_num_threads()
    assert memory_and_time.main(["--tiny", "--only", "time", "--out", str(tmp_path)]) == 0
    torch.set_num_threads(threads)
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert {r["contestant"] for r in results["time"]} == set(memory_and_time.CONTESTANTS)
    assert all(record["error"] <= 1e-6 for record in results["time"])


def test_tables_and_figure_of_peaks(tmp_path):
    def record(contestant, peak, **more):
        return {"contestant": contestant, "peak": peak, "live": peak / 2, **more}

    results = {"peaks": [record("PyTorch", 100.0, blocks=8), record("spectra", 40.0, blocks=8)]}
    results["blocks"] = [record("spectra", 10.0 + 3 * b, blocks=b) for b in (4, 8, 16)]
    results["length"] = [record("spectra", 30.0, blocks=8, length=t) for t in (512, 1024)]
    tables.write(results, tmp_path)
    page = (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert "| spectra | 40 (0.40) | 20 (0.40) |" in page
    assert "| 3.0; 1.5 |" in page
    assert (tmp_path / "large_models.png").stat().st_size > 10_000
