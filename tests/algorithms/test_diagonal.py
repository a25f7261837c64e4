"""The diagonal: right on average, off by what it says, and summed over modules with their error."""

import gc
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

import spectra
from spectra.algorithms.diagonal import DiagonalEstimate, diagonal
from spectra.errors import ArgumentError, ArgumentTypeError, NonFiniteError
from tests.cases.matrices import (
    Layered,
    Poisoned,
    Rotated,
    dense,
    operator,
    orthogonal,
    rank_one,
    s1,
    s2,
    s3,
    s4,
    semicircle,
    tanh_network,
)

DOCS = Path(__file__).parents[2] / "docs" / "methods" / "diagonal.md"


def error_of(estimate, matrix):
    truth = np.diag(matrix)
    return np.linalg.norm(np.asarray(estimate.values) - truth) / np.linalg.norm(truth)


def off_diagonal(matrix):
    return matrix - np.diag(np.diag(matrix))


def truncated(values, keep):
    """The largest eigenpairs of dense(values), as `eigsh` would give them without error."""
    return SimpleNamespace(
        values=values[:keep], vectors=orthogonal(len(values))[:, :keep], residuals=np.zeros(keep)
    )


# --- exact where that is cheaper --------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 7, 64])
@pytest.mark.parametrize("method", ["auto", "hutchinson", "xdiag"])
def test_small_matrices_are_exact(n, method):
    matrix = dense(np.linspace(-2, 3, n))
    h = operator(matrix)
    found = diagonal(h, method=method)
    assert found.exact
    assert found.converged
    assert h.matvecs == found.matvecs == n
    assert found.values == pytest.approx(np.diag(matrix), abs=1e-15)
    assert (found.standard_errors == 0).all()
    assert found.relative_error == 0
    trace = found.module_traces()[""]
    assert trace.exact
    assert trace.interval() == (trace.value, trace.value)
    assert trace.value == pytest.approx(np.trace(matrix), abs=1e-13)
    assert "exact, n unit vectors" in str(found)


@pytest.mark.parametrize("method", ["auto", "hutchinson", "xdiag"])
def test_a_tolerance_that_n_products_meet_sooner_is_met_exactly(method):
    matrix = dense(semicircle(130))
    h = operator(matrix)
    found = diagonal(h, rtol=0.01, method=method)
    assert found.exact
    assert found.values == pytest.approx(np.diag(matrix), abs=1e-14)
    # The probes that showed it, half as many products again as n at the most, and n.
    assert 130 < h.matvecs == found.matvecs <= 210


@pytest.mark.parametrize("method", ["auto", "hutchinson", "xdiag"])
def test_the_zero_matrix_takes_few_products(method):
    found = diagonal(np.zeros((300, 300)), method=method)
    assert found.converged
    assert (found.values == 0).all()
    assert found.matvecs == 10


def test_a_diagonal_matrix_needs_ten_probes_and_is_told_from_a_proof():
    values = s1(200)
    found = diagonal(np.diag(values))
    assert found.matvecs == found.probes == 10
    assert found.values == pytest.approx(values, rel=1e-15)
    assert found.converged
    assert not found.exact
    assert "0.002" in next(note for note in found.notes if "equal to rounding" in note)


@pytest.mark.parametrize("rank", [1, 5])
def test_xdiag_is_exact_when_the_sketch_spans_the_range(rank):
    q = orthogonal(120)[:, :rank]
    matrix = (q * np.array([9.0, -4.0, 3.0, 2.0, -1.0])[:rank]) @ q.T
    found = diagonal(matrix, method="xdiag")
    assert found.exact
    assert found.matvecs == 2 * rank + 10
    assert found.values == pytest.approx(np.diag(matrix), abs=1e-14)
    # One vector more than the rank suffices, only then the spread has to say it.
    few = diagonal(matrix, method="xdiag", probes=rank + 2)
    assert few.values == pytest.approx(np.diag(matrix), abs=1e-14)
    assert few.relative_error < 1e-12
    assert not few.converged
    assert "too few probes" in few.notes[-1]


def test_what_the_krylov_basis_holds_of_a_low_rank_needs_no_further_probes():
    found = diagonal(rank_one(400), rtol=1e-8)
    assert found.converged
    assert found.values == pytest.approx(np.diag(rank_one(400)), abs=1e-14)
    assert found.matvecs <= 18


# --- the statistics of single entries ---------------------------------------------------------

CASES = {
    "hutchinson": {"probes": 12, "method": "hutchinson"},
    "deflated": {"probes": 12, "deflate": truncated(s2(80), 6)},
    "deflated badly": {
        "probes": 12,
        "deflate": SimpleNamespace(
            values=np.linspace(-3, 40, 5), vectors=orthogonal(80, 5)[:, :5], residuals=np.zeros(5)
        ),
    },
    "xdiag": {"probes": 12, "method": "xdiag"},
    "auto": {"rtol": 0.15, "max_matvecs": 60},
}


@pytest.fixture(scope="module")
def runs():
    """400 runs of every kind on one matrix: values, standard errors, and what they claim."""
    h = operator(dense(s2(80)))
    found = {}
    for name, options in CASES.items():
        estimates = [diagonal(h, seed=seed, **options) for seed in range(400)]
        found[name] = SimpleNamespace(
            values=np.array([e.values for e in estimates]),
            errors=np.array([e.standard_errors for e in estimates]),
            claims=np.array([e.relative_error for e in estimates]),
        )
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_mean_over_many_runs_is_the_diagonal(runs, name):
    values, truth = runs[name].values, np.diag(dense(s2(80)))
    scores = (values.mean(axis=0) - truth) / (values.std(axis=0, ddof=1) / len(values) ** 0.5)
    # As 80 standard normal numbers: a bias of a tenth of the spread would make 2.4 of the 1.
    assert np.sqrt((scores**2).mean()) < 1.35
    assert np.abs(scores).max() < 4.5


def test_the_variance_of_an_entry_is_that_of_its_couplings(runs):
    matrix = dense(s2(80))
    expected = (off_diagonal(matrix) ** 2).sum(axis=1) / 12
    ratios = runs["hutchinson"].values.var(axis=0, ddof=1) / expected
    assert ratios.mean() == pytest.approx(1, abs=0.05)
    assert ratios.min() > 0.7
    assert ratios.max() < 1.4
    # And so it is estimated.
    ratios = (runs["hutchinson"].errors ** 2).mean(axis=0) / expected
    assert ratios.mean() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("name", ["deflated", "deflated badly"])
def test_what_is_taken_out_no_longer_varies(runs, name):
    pairs = CASES[name]["deflate"]
    rest = dense(s2(80)) - (pairs.vectors * pairs.values) @ pairs.vectors.T
    expected = (off_diagonal(rest) ** 2).sum(axis=1) / 12
    ratios = runs[name].values.var(axis=0, ddof=1) / expected
    assert ratios.mean() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    # Student's t of 11 degrees has the spread 1.11; XDiag's spread is widened by 1.5 on purpose.
    [("hutchinson", 1.0, 1.2), ("deflated", 1.0, 1.2), ("xdiag", 0.75, 1.1), ("auto", 1.0, 1.2)],
)
def test_single_errors_are_as_large_as_they_say(runs, name, low, high):
    scores = (runs[name].values - np.diag(dense(s2(80)))) / runs[name].errors
    assert abs(scores.mean()) < 0.1
    assert low < scores.std() < high


@pytest.mark.parametrize("name", CASES)
def test_the_error_of_the_whole_is_not_larger_than_claimed(runs, name):
    truth = np.diag(dense(s2(80)))
    errors = np.linalg.norm(runs[name].values - truth, axis=1) / np.linalg.norm(truth)
    assert (errors <= runs[name].claims).mean() >= 0.95


# --- the error of the whole vector ------------------------------------------------------------


def test_the_claim_is_sharp_where_many_couplings_make_the_error():
    matrix = dense(s3(400))
    h = operator(matrix)
    ratios = []
    for seed in range(40):
        found = diagonal(h, probes=60, method="hutchinson", seed=seed)
        ratios.append(found.relative_error / error_of(found, matrix))
    assert 1 < np.median(ratios) < 1.35


def test_one_coupling_widens_the_claim_as_students_interval_does():
    # All of the error is one random number, of which ten probes give a small sample.
    matrix = np.diag(np.linspace(1, 2, 100))
    matrix[0, 1] = matrix[1, 0] = 20.0
    h = operator(matrix)
    covered = certain = 0
    widening = stats.f.ppf(0.975, 1, 9) ** 0.5
    for seed in range(400):
        found = diagonal(h, probes=10, seed=seed)
        bound = np.linalg.norm(found.standard_errors) * widening
        length = np.linalg.norm(found.values)
        expected = bound / (length - bound) if bound < length else np.inf
        assert found.relative_error == pytest.approx(expected, rel=1e-9, abs=1e-12)
        covered += error_of(found, matrix) <= found.relative_error
        certain += found.relative_error < 1e-12
    assert covered >= 0.95 * 400
    # Equal signs in all probes: 2^-9 of the runs.
    assert certain <= 4


@pytest.mark.parametrize("make", [s1, s2, s3, s4], ids=lambda make: make.__name__)
def test_what_converged_is_within_its_tolerance(make):
    matrix = dense(make(400))
    h = operator(matrix)
    for seed in range(12):
        found = diagonal(h, rtol=0.2, seed=seed)
        assert found.converged
        assert found.relative_error <= 0.2
        assert error_of(found, matrix) <= 0.2


def test_fewer_than_ten_probes_promise_nothing():
    found = diagonal(np.eye(200), max_matvecs=9)
    assert found.relative_error == 0
    assert not found.converged
    assert "too few probes (9)" in found.notes[-1]


def test_a_budget_that_ends_first_is_said_with_what_it_would_take():
    matrix = dense(s3(600))
    h = operator(matrix)
    found = diagonal(h, rtol=0.05, method="hutchinson", max_matvecs=40)
    assert h.matvecs == found.matvecs == 40
    assert not found.converged
    note = next(note for note in found.notes if "was asked for" in note)
    needed = int(re.search(r"about ([\d,]+)", note)[1].replace(",", ""))
    truth = np.linalg.norm(np.diag(matrix))
    exact = (np.linalg.norm(off_diagonal(matrix)) / truth / 0.05) ** 2
    assert exact < needed < 2 * exact
    assert "tolerance not reached" in str(found)


def test_a_diagonal_that_is_nearly_zero_beside_its_error_is_not_claimed():
    found = diagonal(dense(s4(600)), max_matvecs=12)
    assert found.relative_error == np.inf
    assert any("not distinguishable from 0" in note for note in found.notes)


def test_the_confidence_is_that_of_the_stop():
    h = operator(dense(s3(400)))
    sure = diagonal(h, rtol=0.15, confidence=0.99)
    unsure = diagonal(h, rtol=0.15, confidence=0.5)
    assert sure.matvecs > unsure.matvecs
    assert "(99%)" in str(sure)
    assert sure.module_traces()[""].confidence == 0.99


# --- deflation --------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [s1, s2, s3], ids=lambda make: make.__name__)
def test_eigenpairs_save_what_their_couplings_cost(make):
    values = make(500)
    h = operator(dense(values))
    pairs = spectra.eigsh(h, 10)
    plain = diagonal(h, probes=30)
    deflated = diagonal(h, probes=30, deflate=pairs)
    rest = dense(np.where(np.arange(500) < 10, 0.0, values))
    expected = np.linalg.norm(off_diagonal(dense(values))) / np.linalg.norm(off_diagonal(rest))
    saved = np.linalg.norm(plain.standard_errors) / np.linalg.norm(deflated.standard_errors)
    assert saved == pytest.approx(expected, rel=0.35)
    assert deflated.matvecs == 30
    assert "10 eigenpairs taken out" in str(deflated)


def test_the_default_builds_the_basis_that_plain_probes_lack():
    matrix = dense(s1(1000))
    found = diagonal(matrix, rtol=0.05)
    assert found.converged
    assert error_of(found, matrix) <= 0.05
    # Plain probes would take about 45,000 products, XDiag takes about 100.
    assert found.matvecs <= 50
    assert "Krylov vectors taken out" in found.method
    assert not diagonal(matrix, rtol=0.05, method="hutchinson").converged
    assert diagonal(matrix, rtol=0.05, method="xdiag").matvecs > 50


def test_a_basis_that_does_not_help_is_not_used():
    # Nearly diagonal with a smooth spectrum: what Krylov vectors hold is what signs do for nothing.
    found = diagonal(Rotated(semicircle(800)), rtol=0.012, max_matvecs=400)
    assert found.converged
    assert found.method == "Hutchinson"


def test_more_is_taken_out_where_the_eigenpairs_do_not_suffice():
    matrix = dense(s2(600))
    h = operator(matrix)
    pairs = spectra.eigsh(h, 5)
    found = diagonal(h, rtol=0.05, deflate=pairs)
    assert found.converged
    assert error_of(found, matrix) <= 0.05
    assert "Krylov" in found.method


def test_deflating_every_eigenvalue_leaves_ten_probes_that_agree():
    matrix = dense(s3(80))
    found = diagonal(matrix, deflate=spectra.eigsh(matrix, 80))
    assert found.matvecs == 10
    assert found.values == pytest.approx(np.diag(matrix), abs=1e-12)


def test_wrong_values_of_a_complete_basis_leave_no_room_for_another():
    matrix = dense(s3(80))
    pairs = truncated(s3(80), 80)
    pairs.values = pairs.values + np.linspace(-3, 3, 80)
    found = diagonal(matrix, rtol=0.01, max_matvecs=79, deflate=pairs)
    assert found.method == "Hutchinson, 80 eigenpairs taken out"
    assert error_of(found, matrix) <= found.relative_error < 0.2


def test_a_basis_takes_no_more_than_half_of_the_budget():
    found = diagonal(dense(semicircle(600)), max_matvecs=100)
    assert not found.converged
    assert found.matvecs == 100
    assert found.probes >= 55


# --- XDiag ------------------------------------------------------------------------------------


def test_xdiag_is_what_its_definition_says():
    matrix, k = dense(s1(90)), 7
    generator = torch.Generator().manual_seed(3)
    signs = [
        torch.randint(0, 2, (90,), generator=generator, dtype=torch.int8).double().numpy() * 2 - 1
        for _ in range(k)
    ]
    samples = []
    for i in range(k):
        others = np.stack([matrix @ s for j, s in enumerate(signs) if j != i], axis=1)
        q = np.linalg.qr(others)[0]
        known = q @ (q.T @ matrix)
        samples.append(np.diag(known) + signs[i] * ((matrix - known) @ signs[i]))
    found = diagonal(matrix, method="xdiag", probes=k, seed=3)
    assert found.values == pytest.approx(np.mean(samples, axis=0), abs=1e-10)
    spread = np.std(samples, axis=0, ddof=1) * 1.5 / k**0.5
    assert found.standard_errors == pytest.approx(spread, abs=1e-10)
    assert found.matvecs == 2 * k
    trace = found.module_traces()[""]
    assert trace.value == pytest.approx(np.sum(np.mean(samples, axis=0)))
    assert trace.standard_error == pytest.approx(
        np.std(np.sum(samples, axis=1), ddof=1) * 1.5 / k**0.5
    )


def test_one_coupled_pair_does_not_fool_xdiag():
    # Two vectors of signs show the same product up to sign in every second run.
    matrix = np.zeros((100, 100))
    matrix[0, 1] = matrix[1, 0] = 1.0
    for seed in range(40):
        found = diagonal(matrix, method="xdiag", seed=seed)
        assert found.values == pytest.approx(np.zeros(100), abs=1e-14)


# --- sums over modules ------------------------------------------------------------------------

SIZES = {"first.weight": 30, "first.bias": 5, "second.weight": 20, "scale": 5}
PLACES = {"first": slice(0, 35), "second": slice(35, 55), "": slice(55, 60)}


def test_module_traces_are_those_of_the_blocks_of_a_network():
    h, reference = tanh_network()
    exact = diagonal(h)
    assert exact.exact
    assert isinstance(exact.values, torch.Tensor)
    assert exact.values.numpy() == pytest.approx(np.diag(reference), abs=1e-12)
    sampled = diagonal(h, probes=100)
    for name, trace in exact.module_traces().items():
        block = h.block(f"{name}.*").to_dense()
        assert trace.value == pytest.approx(float(block.trace()), abs=1e-12)
        close = sampled.module_traces()[name]
        assert abs(close.value - trace.value) < 4 * close.standard_error
    for name, trace in exact.module_traces(by="parameter").items():
        assert trace.value == pytest.approx(float(h.block(name).to_dense().trace()), abs=1e-12)
    assert list(exact.module_traces()) == ["0", "2"]
    assert list(exact.module_traces("parameter")) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert "  2: 1.49" in str(exact)


def test_module_sums_are_those_of_the_values():
    h = Layered(dense(s1(60)), SIZES)
    for options in ({"probes": 9}, {"probes": 9, "method": "xdiag"}, {}):
        found = diagonal(h, **options)
        traces = found.module_traces()
        assert set(traces) == set(PLACES)
        for name, place in PLACES.items():
            assert traces[name].value == pytest.approx(float(found.values[place].sum()))
        means = found.module_traces(mean=True)
        assert means["first"].value == pytest.approx(traces["first"].value / 35)
        parts = found.module_traces("parameter")
        total = parts["first.weight"].value + parts["first.bias"].value
        assert traces["first"].value == pytest.approx(total)


def test_the_error_of_a_sum_counts_that_its_entries_move_together():
    # Every entry of z ∘ 11ᵀz moves with the same sum: added variances would say 4.2, not 33.
    h = Layered(np.ones((60, 60)), SIZES)
    found = diagonal(h, probes=400)
    place = PLACES["first"]
    expected = (2 * 35 * 34 + 35 * 25) ** 0.5 / 20
    assert found.module_traces()["first"].standard_error == pytest.approx(expected, rel=0.2)
    added = float(found.standard_errors[place].norm())
    assert added < expected / 1.1


@pytest.mark.parametrize(
    ("options", "least"),
    [
        ({"probes": 20}, 0.93),
        ({"probes": 12, "deflate": truncated(s2(60), 6)}, 0.93),
        ({"probes": 16, "method": "xdiag"}, 0.93),
    ],
    ids=["hutchinson", "deflated", "xdiag"],
)
def test_intervals_of_module_traces_cover(options, least):
    matrix = dense(s2(60))
    h = Layered(matrix, SIZES)
    covered = dict.fromkeys(PLACES, 0)
    for seed in range(500):
        traces = diagonal(h, seed=seed, **options).module_traces()
        for name, place in PLACES.items():
            low, high = traces[name].interval()
            covered[name] += low <= np.diag(matrix)[place].sum() <= high
    assert min(covered.values()) >= least * 500


def test_module_errors_are_as_large_as_they_say():
    matrix = dense(s3(60))
    h = Layered(matrix, SIZES)
    scores = []
    for seed in range(250):
        traces = diagonal(h, probes=20, seed=seed).module_traces()
        scores += [
            (traces[name].value - np.diag(matrix)[place].sum()) / traces[name].standard_error
            for name, place in PLACES.items()
        ]
    assert abs(np.mean(scores)) < 0.15
    assert 0.95 < np.std(scores) < 1.2


# --- symmetries, kinds, storage ---------------------------------------------------------------


def test_scaling_scales_everything():
    matrix = dense(s2(100))
    for options in ({"probes": 12}, {"method": "xdiag", "probes": 12}, {"rtol": 0.2}):
        one, other = diagonal(matrix, **options), diagonal(-1e-6 * matrix, **options)
        assert other.values == pytest.approx(-1e-6 * one.values, rel=1e-6)
        assert other.standard_errors == pytest.approx(1e-6 * one.standard_errors, rel=1e-6)
        assert other.relative_error == pytest.approx(one.relative_error, rel=1e-6)
        assert other.matvecs == one.matvecs


def test_a_shift_adds_to_the_diagonal_and_to_nothing_else():
    matrix = dense(s2(100))
    plain, shifted = diagonal(matrix, probes=12), diagonal(matrix + 5 * np.eye(100), probes=12)
    assert shifted.values == pytest.approx(plain.values + 5, rel=1e-12)
    assert shifted.standard_errors == pytest.approx(plain.standard_errors, rel=1e-10)


@pytest.mark.parametrize("method", ["auto", "hutchinson", "xdiag"])
def test_the_seed_decides_everything_and_nothing_global_does(method):
    matrix = dense(s2(120))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = diagonal(matrix, rtol=0.3, max_matvecs=60, method=method, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    same = diagonal(matrix, rtol=0.3, max_matvecs=60, method=method, seed=4)
    other = diagonal(matrix, rtol=0.3, max_matvecs=60, method=method, seed=5)
    assert np.array_equal(one.values, same.values)
    assert np.array_equal(one.standard_errors, same.standard_errors)
    assert not np.array_equal(one.values, other.values)


@pytest.mark.parametrize("method", ["auto", "hutchinson", "xdiag"])
def test_single_precision_agrees_with_double(method):
    matrix = dense(s1(150))
    double = diagonal(torch.from_numpy(matrix), probes=12, method=method)
    single = diagonal(torch.from_numpy(matrix).float(), probes=12, method=method)
    assert single.values.dtype == torch.float32
    scale = float(double.standard_errors.max())
    assert float((single.values - double.values).abs().max()) < 1e-3 * scale
    whole = diagonal(torch.from_numpy(matrix).float(), rtol=0.05)
    assert whole.converged
    assert error_of(whole, matrix) <= 0.05


def test_the_diagonal_comes_in_the_kind_that_the_operator_came_in():
    matrix = dense(s2(100))
    for given, kind in ((matrix, np.ndarray), (torch.from_numpy(matrix), torch.Tensor)):
        for options in ({"probes": 5}, {"rtol": 0.3}):
            found = diagonal(given, **options)
            assert isinstance(found.values, kind)
            assert isinstance(found.standard_errors, kind)
            assert found.values.shape == found.standard_errors.shape == (100,)


@pytest.mark.parametrize(
    "options", [{}, {"probes": 1}, {"probes": 15}, {"probes": 15, "method": "xdiag"}]
)
def test_a_saved_result_comes_back(tmp_path, options):
    h, _ = tanh_network()
    found = diagonal(h, **options)
    back = spectra.load(found.save(tmp_path / "diagonal"))
    assert isinstance(back, DiagonalEstimate)
    assert torch.equal(back.values, found.values)
    assert torch.equal(back.standard_errors.isnan(), found.standard_errors.isnan())
    assert np.array_equal(back.parameter_traces, found.parameter_traces)
    assert back.parameters == found.parameters == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert str(back) == str(found)
    for name, trace in found.module_traces().items():
        assert back.module_traces()[name].interval() == trace.interval()
    assert back.provenance == found.provenance
    assert back.provenance["options"]["probes"] == options.get("probes")


def test_probes_leave_no_vectors_behind():
    held = []

    class Counting(Layered):
        def _products(self, rows):
            # The first ten tell the noise of the products, and are kept for that.
            if self.matvecs in {14, 28}:
                gc.collect()
                tensors = [o for o in gc.get_objects() if type(o) is torch.Tensor]
                held.append(sum(t.numel() for t in tensors if t.shape[-1:] == (60,)))
            return super()._products(rows)

    diagonal(Counting(dense(s2(60)), SIZES), probes=30, method="hutchinson")
    assert held[0] == held[1]


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "diag++"}, ArgumentError, "expected 'auto', 'hutchinson' or 'xdiag'"),
        ({"rtol": 0.0}, ArgumentError, "rtol=0.0; expected a positive"),
        ({"rtol": float("nan")}, ArgumentError, "rtol=nan"),
        ({"confidence": 95}, ArgumentError, "confidence=95"),
        ({"probes": 0}, ArgumentError, "probes=0; expected at least 1"),
        ({"probes": 2.5}, ArgumentTypeError, r"probes=2\.5; expected a whole number"),
        ({"probes": True}, ArgumentTypeError, "probes=True"),
        ({"max_matvecs": 1}, ArgumentError, "max_matvecs=1; an error estimate needs"),
        ({"max_matvecs": 1e3}, ArgumentTypeError, "max_matvecs=1000"),
        ({"seed": -1}, ArgumentError, "seed=-1"),
        ({"deflate": np.eye(100)}, ArgumentTypeError, "deflate takes the Eigenpairs"),
        ({"deflate": truncated(s2(60), 3)}, ArgumentError, "length 60.* n = 100"),
        (
            {"deflate": truncated(s2(100), 3), "method": "xdiag"},
            ArgumentError,
            "method='xdiag' does not deflate",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_before_any_product(options, error, message):
    h = operator(dense(s2(100)))
    with pytest.raises(error, match=message):
        diagonal(h, **options)
    assert h.matvecs == 0


def test_module_traces_by_something_else_are_refused():
    found = diagonal(np.eye(3))
    with pytest.raises(ArgumentError, match="expected 'layer', 'module' or 'parameter'"):
        found.module_traces("block")


@pytest.mark.parametrize("method", ["auto", "hutchinson", "xdiag"])
def test_a_product_that_is_not_finite_stops_the_run(method):
    with pytest.raises(NonFiniteError, match="matvec 3"):
        diagonal(Poisoned(s1(100), at=3), method=method)


# --- the page ---------------------------------------------------------------------------------


def test_the_page_shows_code_that_runs():
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    namespace = {}
    for block in blocks:
        exec(compile(block, str(DOCS), "exec"), namespace)
