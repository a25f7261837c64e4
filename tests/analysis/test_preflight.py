import numpy as np
import pytest
import torch

import spectra
from spectra.analysis.preflight import check
from spectra.objective.losses import causal_lm
from tests.cases.networks import StackedGPT


def operator(dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = StackedGPT(3).to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    data = [{"input_ids": torch.randint(0, 7, (2, 6), generator=generator)} for _ in range(2)]
    return spectra.HessianOperator(model, causal_lm(), data, **options)


def test_it_costs_what_it_says_and_leaves_the_operator_warm(monkeypatch):
    H = operator()
    gradients = []
    evaluate = H._oracle._gradient_graph

    def counted(part, *, create_graph=True):
        gradients.append(create_graph)
        return evaluate(part, create_graph=create_graph)

    monkeypatch.setattr(H._oracle, "_gradient_graph", counted)
    found = check(H)
    assert H.matvecs == found.matvecs == 4
    # Of two batches each.
    assert gradients.count(False) == 2 * found.gradients
    assert found.gradients == 6
    assert f"{found.matvecs} matvecs and {found.gradients} gradients" in str(found)
    assert found.n == H.shape[0]
    assert min(found.first_seconds, found.seconds, found.gradient_seconds) > 0
    assert found.peak_bytes is None or found.peak_bytes >= 0
    assert found.provenance["operator"]["graphs"] == H.describe()["graphs"]
    assert check(H).gradient_seconds is None


def test_forecasts_are_the_measured_seconds_times_the_products():
    found = check(operator())
    questions = [forecast.question for forecast in found.forecasts]
    assert questions[:2] == ["eigsh(H, k=1)", "eigsh(H, k=10)"]
    for forecast in found.forecasts:
        assert forecast.matvecs[0] <= forecast.matvecs[1]
        assert forecast.seconds == pytest.approx([found.seconds * m for m in forecast.matvecs])
        assert forecast.basis_bytes == forecast.basis_vectors * 8 * found.n


def test_what_it_forecasts_is_what_happens():
    H = operator()
    forecasts = {f.question: f for f in check(H).forecasts}
    pairs = spectra.eigsh(H, k=10)
    few, many = forecasts["eigsh(H, k=10)"].matvecs
    assert few <= pairs.matvecs <= many
    held = pairs.provenance["basis"]
    assert held["place"] == forecasts["eigsh(H, k=10)"].basis_place


def test_small_and_foreign_operators_can_be_asked_about():
    found = check(np.diag([1.0, 2.0, 3.0]))
    assert found.gradient_seconds is None
    assert found.symmetry_defect < 1e-15
    assert all(forecast.matvecs[1] <= 3 + 2 for forecast in found.forecasts)
    assert "eigsh(H, k=10)" not in str(found)


def test_findings_come_as_a_table_with_place_and_remedy():
    from scipy.sparse.linalg import LinearOperator

    matrix = np.random.default_rng(0).standard_normal((50, 50))
    found = check(LinearOperator((50, 50), matvec=lambda x: matrix @ x, dtype=np.float64))
    lines = str(found).splitlines()
    assert lines[0].startswith("error   symmetry")
    assert [line[30:38] for line in lines].index("remedy: ") < lines.index(
        next(line for line in lines if line.startswith("ok      linearity"))
    )
    assert max(map(len, lines)) <= 80
    assert not found.ok
    assert [f.check for f in found.problems] == ["symmetry"]


def test_half_precision_computed_in_another_is_said():
    casted = check(operator(torch.bfloat16, compute_dtype=torch.float32))
    assert casted.ok
    assert "compute dtype: float32" in str(casted)


@pytest.mark.slow
def test_what_memory_decided_is_said():
    # Large enough for the process to be seen to grow.
    data = [{"input_ids": torch.zeros(1000, 8, dtype=torch.long)}] * 2
    model = StackedGPT(3).eval()
    H = spectra.HessianOperator(model, causal_lm(), data, memory_budget=5_000_000)
    found = check(H)
    text = str(found)
    assert "3 blocks are recomputed" in text
    assert (
        "because without recomputing, the work on a batch would take more than the 4.77 MiB" in text
    )
    assert "batches are split into parts of" in text
    assert f"microbatch: {H.describe()['microbatch']}" in text
    assert any("with more memory" in advice for advice in found.advice)


def test_a_basis_on_disk_is_said(monkeypatch):
    monkeypatch.setattr(
        "spectra.objective.vectors.VectorSpace.affordable",
        lambda _, place="device": 1000 if place == "disk" else 12,
    )
    found = check(operator())
    places = {forecast.question: forecast.basis_place for forecast in found.forecasts}
    assert places["eigsh(H, k=10)"] == "disk"
    assert any("TMPDIR" in advice for advice in found.advice)


def test_it_is_saved_and_loaded(tmp_path):
    found = check(operator())
    again = spectra.load(found.save(tmp_path / "preflight"))
    assert str(again) == str(found)
    assert [f.measured for f in again.findings] == [f.measured for f in found.findings]


def test_an_operator_that_cannot_be_multiplied_raises_what_a_product_raises():
    model = torch.nn.Linear(2, 1)
    data = [torch.ones(3, 2)]
    H = spectra.HessianOperator(model, lambda m, x: m(x).sum() * float("nan"), data)
    with pytest.raises(spectra.SpectraError, match="nan"):
        check(H)
