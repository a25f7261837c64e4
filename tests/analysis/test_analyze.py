"""One run that answers everything: every number within its error, every product accounted for."""

import dataclasses
import math
import re
import time

import numpy as np
import pytest
import torch
from scipy import stats

import spectra
from spectra.errors import ArgumentError, ArgumentTypeError, NonFiniteError
from tests.cases.matrices import (
    Diagonal,
    Poisoned,
    Rotated,
    dense,
    operator,
    s1,
    s1z,
    s2,
    s3,
    s4,
    s5,
    semicircle,
    tanh_network,
)
from tests.cases.networks import tanh_mlp, wine


def distance(density, spectrum):
    """Wasserstein-1 distance between the nodes and the true spectrum."""
    nodes = np.concatenate([density.nodes.ravel(), density.atoms])
    atoms = np.full(len(density.atoms), 1 / density.n)
    masses = np.concatenate([density.weights.ravel() / density.probes, atoms])
    return stats.wasserstein_distance(nodes, spectrum, masses)


def holds(estimate, truth, confidence=None):
    low, high = estimate.interval(confidence)
    rounding = 1e-12 * abs(truth)
    return low - rounding <= truth <= high + rounding


# --- right ------------------------------------------------------------------------------------


def test_every_number_of_a_network_like_spectrum_is_within_its_error():
    values = s1(1000)
    h = operator(Rotated(values))
    held = {"trace": 0, "frobenius": 0, "norm": 0}
    for seed in range(40):
        analysis = spectra.analyze(h, seed=seed)
        assert analysis.converged
        off = np.abs(analysis.eigenpairs.values - values[:10])
        assert (off <= analysis.eigenpairs.residuals + 1e-12).all()
        assert distance(analysis.density, values) < 1e-2
        held["trace"] += holds(analysis.trace, values.sum())
        held["frobenius"] += holds(analysis.frobenius_norm, np.linalg.norm(values))
        held["norm"] += holds(analysis.spectral_norm, 100.0)
        assert analysis.trace.value == pytest.approx(values.sum(), rel=0.05)
        assert analysis.frobenius_norm.value == pytest.approx(np.linalg.norm(values), rel=1e-3)
    assert held["trace"] >= 0.9 * 40
    assert held["frobenius"] >= 0.9 * 40
    assert held["norm"] == 40


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_number_of_a_networks_hessian_is_within_its_error(dtype):
    h, reference = tanh_network(dtype)
    spectrum = np.linalg.eigvalsh(reference)
    slack = 1e-6 if dtype == torch.float32 else 1e-12
    analysis = spectra.analyze(h, k=6)
    off = np.abs(spectrum[:, None] - analysis.eigenpairs.values).min(axis=0)
    assert (off <= analysis.eigenpairs.residuals + slack).all()
    for estimate, truth in (
        (analysis.trace, spectrum.sum()),
        (analysis.frobenius_norm, np.linalg.norm(spectrum)),
        (analysis.spectral_norm, np.abs(spectrum).max()),
    ):
        low, high = estimate.interval()
        assert low - slack <= truth <= high + slack
    assert distance(analysis.density, spectrum) < 0.05
    assert isinstance(analysis.eigenpairs.vectors, torch.Tensor)


def test_the_loss_and_its_gradient_stand_beside_a_hessian():
    h, _ = tanh_network()
    model = h.objective.model
    analysis = spectra.analyze(h, k=3, density=False, trace=False)
    value, gradient = h.value_and_gradient()
    assert analysis.value == pytest.approx(value)
    assert analysis.gradient_norm == pytest.approx(float(gradient.norm()))
    assert f"loss = {value:.6g}, gradient norm" in str(analysis)
    assert all(parameter.grad is None for parameter in model.parameters())
    plain = spectra.analyze(dense(s1(60)), k=3)
    assert plain.value is None
    assert plain.gradient_norm is None
    assert "loss" not in str(plain)


def test_graphs_that_were_not_kept_are_said():
    criterion = spectra.losses.supervised(torch.nn.CrossEntropyLoss())
    model, data = tanh_mlp(), [wine()]

    def loss(model, batch):
        return criterion(model, batch)

    small = {"k": 2, "steps": 5, "probes": 2}
    kept = spectra.analyze(spectra.HessianOperator(model, loss, data), **small)
    assert not any("graphs" in note for note in kept.notes)
    poor = spectra.HessianOperator(model, loss, data, memory_budget=0)
    assert any(
        "graphs of 0 of 1 batches were kept" in n for n in spectra.analyze(poor, **small).notes
    )
    asked = spectra.HessianOperator(model, loss, data, graph="fresh")
    assert not any("graphs" in note for note in spectra.analyze(asked, **small).notes)


def test_repeated_eigenvalues_are_deflated_with_all_their_copies():
    values = s5(600)
    analysis = spectra.analyze(Rotated(values), k=12)
    assert analysis.eigenpairs.values == pytest.approx(values[:12], rel=1e-5)
    assert analysis.density.atoms == pytest.approx(values[:12], rel=1e-5)
    assert analysis.trace.value == pytest.approx(values.sum(), rel=0.05)


def test_a_saddle_is_told_from_zero_by_neither_its_trace_nor_a_crash():
    analysis = spectra.analyze(Rotated(s4(600)), k=20)
    assert analysis.trace.interval()[0] < 0 < analysis.trace.interval()[1]
    assert any("not distinguishable from 0" in note for note in analysis.trace.notes)
    assert analysis.converged


# --- what it costs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"which": "LA"},
        {"which": "SA"},
        {"which": "BE"},
        {"density": False},
        {"trace": False},
        {"density": False, "trace": False},
        {"steps": 1},
        {"probes": 1},
        {"rtol": 1e-4, "max_matvecs": 60},
        {"ncv": 8},
    ],
    ids=str,
)
def test_every_product_is_accounted_for(options):
    h = operator(Rotated(s3(300)))
    analysis = spectra.analyze(h, k=4, **options)
    assert analysis.total_matvecs == sum(analysis.matvecs.values()) == h.matvecs
    assert all(analysis.matvecs.values())
    assert analysis.matvecs["eigenpairs"] == analysis.eigenpairs.matvecs
    assert ("density" in analysis.matvecs) == options.get("density", True)
    if analysis.density:
        assert analysis.matvecs["density"] == analysis.density.matvecs
    single = analysis.matvecs.get("trace", 0) + analysis.matvecs.get("Frobenius norm", 0)
    assert single <= options.get("max_matvecs", 200)
    if analysis.trace:
        assert analysis.matvecs.get("trace", 0) == analysis.trace.matvecs
        assert single == analysis.frobenius_norm.matvecs
    assert all(seconds >= 0 for seconds in analysis.seconds.values())
    assert str(analysis.total_matvecs) in str(analysis).splitlines()[-1]


@pytest.mark.parametrize("seed", range(5))
def test_the_defaults_answer_everything_within_a_hundred_products(seed):
    values = s1(2000)
    h = operator(Diagonal(values))
    analysis = spectra.analyze(h, seed=seed)
    assert h.matvecs <= 100
    assert analysis.converged
    assert analysis.eigenpairs.values == pytest.approx(values[:10], rel=1e-5)
    low, high = analysis.trace.interval()
    assert (high - low) / 2 <= 0.01 * analysis.trace.value
    low, high = analysis.frobenius_norm.interval()
    assert (high - low) / 2 <= 0.02 * analysis.frobenius_norm.value
    assert distance(analysis.density, values) <= 1e-4 * 100


@pytest.mark.parametrize("make", [s1, s1z])
def test_the_density_is_three_times_as_good_as_plain_quadrature_at_equal_cost(make):
    values = make(2000)
    analysis = spectra.analyze(Diagonal(values))
    plain = spectra.spectral_density(Diagonal(values), steps=33, probes=3)
    assert distance(analysis.density, values) < distance(plain, values) / 3


# --- budget -----------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [40, 60, 100, "75"])
def test_a_budget_of_products_is_kept(budget):
    h = operator(Diagonal(s2(2000)))
    analysis = spectra.analyze(h, k=5, budget=budget)
    assert h.matvecs <= int(budget)
    assert analysis.total_matvecs == h.matvecs
    assert analysis.matvecs["eigenpairs"] <= 0.6 * int(budget)
    short = analysis.density is None or analysis.density.steps < 20
    assert any("density" in note for note in analysis.notes) == short


def test_a_budget_that_is_large_enough_changes_nothing():
    values = s1(300)
    free, limited = (spectra.analyze(Rotated(values), k=4, budget=b) for b in (None, 10_000))
    assert limited.total_matvecs == free.total_matvecs
    assert limited.trace.value == free.trace.value
    assert limited.notes == ()


def test_what_the_budget_left_out_is_said():
    analysis = spectra.analyze(Rotated(s3(400)), k=3, budget=25)
    assert analysis.density is None or analysis.density.steps < 20
    assert any("the budget left" in note for note in analysis.notes)
    assert "note: the budget left" in str(analysis)


def test_a_budget_of_seconds_ends_the_run():
    class Slow(Diagonal):
        def _matvec(self, x):
            time.sleep(0.01)
            return super()._matvec(x)

    values = semicircle(1000)
    # Without a budget this takes hundreds of products.
    analysis = spectra.analyze(Slow(values), k=3, rtol=1e-6, budget="0.6s")
    assert analysis.matvecs["timing"] == 2
    assert 10 <= analysis.total_matvecs <= 62
    assert not analysis.converged


@pytest.mark.parametrize("budget", [0, -5, 1.5, "soon", "5 apples", "0s", True, ""])
def test_a_budget_is_products_or_a_time(budget):
    with pytest.raises(ArgumentError, match=r"budget=.*; expected a number of matvecs"):
        spectra.analyze(np.eye(5), k=1, budget=budget)


def test_a_budget_too_small_for_the_eigenpairs_is_refused():
    with pytest.raises(ArgumentError, match="holds 20 matvecs, of which 10 eigenpairs may take 12"):
        spectra.analyze(Rotated(s1(300)), budget=20)


# --- spectral sums ----------------------------------------------------------------------------


def test_sums_over_all_eigenvalues_come_with_the_density():
    values = s1(2000)
    analysis = spectra.analyze(Diagonal(values))
    exact = {
        "nuclear norm": np.abs(values).sum(),
        "participation ratio": values.sum() ** 2 / (values**2).sum(),
    }
    for name, truth in exact.items():
        assert analysis.sums[name].value == pytest.approx(truth, rel=0.02), name
        assert f"{name} = " in str(analysis)
    counts = [analysis.sums[f"{kind} eigenvalues"] for kind in ("negative", "positive")]
    assert counts[0].interval()[0] <= (values < 0).sum()
    assert sum(c.value for c in counts) + analysis.sums["eigenvalues near zero"].value == (
        pytest.approx(2000)
    )
    assert spectra.analyze(Diagonal(values), density=False).sums == {}


# --- sharing ----------------------------------------------------------------------------------


def test_the_samples_of_the_density_begin_those_of_trace_and_norm():
    analysis = spectra.analyze(Rotated(s1(2000)), probes=4)
    assert np.array_equal(analysis.trace.samples[:4], analysis.density.moment_samples(1))
    assert analysis.frobenius_norm.samples[:4] == pytest.approx(analysis.density.moment_samples(2))
    # Those that follow are of other probes.
    assert len(np.unique(analysis.trace.samples)) == len(analysis.trace.samples)


def test_sharing_the_samples_leaves_the_trace_unbiased_and_its_error_true():
    values = s3(300)
    h = operator(Rotated(values))
    runs = {"shared": [], "independent": []}
    scores = []
    for seed in range(150):
        analysis = spectra.analyze(h, k=2, steps=3, probes=8, rtol=1e-9, max_matvecs=8, seed=seed)
        runs["shared"].append(analysis.trace.value)
        scores.append((analysis.trace.value - values.sum()) / analysis.trace.standard_error)
        pairs = analysis.eigenpairs
        runs["independent"].append(
            spectra.trace(h, deflate=pairs, rtol=1e-9, max_matvecs=16, seed=seed).value
        )
    for means in runs.values():
        assert abs(np.mean(means) - values.sum()) < 3 * np.std(means) / 150**0.5
    assert np.std(runs["shared"]) == pytest.approx(np.std(runs["independent"]), rel=0.25)
    # Student's with 15 degrees of freedom.
    assert abs(np.mean(scores)) < 3 * 1.08 / 150**0.5
    assert 0.88 < np.std(scores) < 1.3
    assert abs(np.corrcoef(runs["shared"], runs["independent"])[0, 1]) < 0.25


def test_a_krylov_space_of_the_density_is_taken_out_of_the_trace_where_that_pays():
    values = s2(2000)
    h = operator(Rotated(values))
    analysis = spectra.analyze(h)
    assert "20 Krylov vectors of the density" in analysis.trace.method
    assert "20 Krylov vectors of the density" in analysis.frobenius_norm.method
    plain = spectra.trace(h, deflate=analysis.eigenpairs, rtol=0.01)
    assert analysis.trace.matvecs < 0.7 * plain.matvecs
    # Two of the density's probes; some products went into a larger space instead.
    more = int(re.search(r"of the density and (\d+) more", analysis.trace.method)[1])
    assert len(analysis.trace.samples) == analysis.trace.matvecs - more + 2
    # The bases do not stay in memory with the result.
    assert analysis.density.runs == ()
    assert "Krylov" not in spectra.analyze(Rotated(s1(2000))).trace.method


@pytest.mark.parametrize(("rtol", "space"), [(0.03, "of the density"), (0.01, "more")])
def test_what_is_taken_out_of_the_trace_leaves_it_unbiased_and_its_interval_true(rtol, space):
    values = s2(400)
    h = operator(Rotated(values))
    runs = [spectra.analyze(h, k=3, steps=12, rtol=rtol, seed=seed) for seed in range(80)]
    shared = [run for run in runs if space in run.trace.method]
    assert len(shared) > 40
    norm = np.linalg.norm(values)
    assert sum(holds(run.trace, values.sum()) for run in shared) >= 0.9 * len(shared)
    assert sum(holds(run.frobenius_norm, norm) for run in shared) >= 0.88 * len(shared)
    errors = [(run.trace.value - values.sum()) / run.trace.standard_error for run in shared]
    assert abs(np.mean(errors)) < 4 / len(shared) ** 0.5


def test_a_quadrature_of_one_node_is_no_sample_of_the_squared_norm():
    # One Lanczos step gives θ = vᵀHv, and θ² is not ‖Hv‖²: it would put the norm far too low.
    values = np.concatenate([np.full(200, 3.0), np.full(200, -1.0)])
    h = operator(Rotated(values))
    squares = [
        spectra.analyze(h, k=1, steps=1, probes=5, rtol=0.05, seed=seed).frobenius_norm.value ** 2
        for seed in range(30)
    ]
    assert np.mean(squares) == pytest.approx((values**2).sum(), rel=0.03)


def test_the_frobenius_norm_goes_on_where_the_trace_is_already_known():
    # Equal eigenvalues and a few large of both signs: the trace is known at once, its norm is not.
    values = np.concatenate([np.full(900, 1.0), np.linspace(3, 12, 20), -np.linspace(3, 12, 20)])
    h = operator(Rotated(values))
    went_on = 0
    for seed in range(10):
        analysis = spectra.analyze(h, k=1, steps=10, rtol=0.05, seed=seed)
        assert analysis.trace.converged
        assert analysis.frobenius_norm.converged
        low, high = analysis.frobenius_norm.interval()
        assert (high - low) / 2 <= 0.06 * analysis.frobenius_norm.value
        went_on += analysis.matvecs.get("Frobenius norm", 0) > 0
        assert len(analysis.frobenius_norm.samples) >= len(analysis.trace.samples)
    assert went_on >= 3


# --- options ----------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [True, False])
def test_one_end_alone_leaves_the_norm_to_the_other_parts(density):
    values = np.concatenate([[-50.0, 20.0, 10.0, 5.0], np.linspace(-1, 1, 196)])
    analysis = spectra.analyze(Rotated(values), k=3, which="LA", density=density)
    assert analysis.eigenpairs.values == pytest.approx([20, 10, 5], rel=1e-5)
    assert analysis.matvecs.get("spectral norm", 0) == analysis.spectral_norm.matvecs
    assert ("with the density" in analysis.spectral_norm.method) == density
    assert (analysis.spectral_norm.matvecs == 0) == density
    assert analysis.spectral_norm.value == pytest.approx(50, rel=1e-3)
    assert holds(analysis.spectral_norm, 50.0, 0.99)
    assert analysis.spectral_norm.converged


@pytest.mark.parametrize("which", ["LM", "BE"])
def test_both_ends_give_the_norm_for_nothing(which):
    values = np.concatenate([[-50.0, 20.0, 10.0, 5.0], np.linspace(-1, 1, 196)])
    analysis = spectra.analyze(Rotated(values), k=4, which=which)
    assert "spectral norm" not in analysis.matvecs
    assert analysis.spectral_norm.value == pytest.approx(50, rel=1e-6)
    assert analysis.spectral_norm.notes == ()
    low, high = analysis.spectral_norm.interval(0.99)
    assert low <= 50 <= high < 51


@pytest.mark.parametrize("which", ["LM", "LA", "SA", "BE"])
def test_all_eigenvalues_leave_nothing_to_chance(which):
    values = s3(25)
    h = operator(dense(values))
    analysis = spectra.analyze(h, k=25, which=which)
    assert analysis.eigenpairs.values == pytest.approx(values)
    assert analysis.trace.exact
    assert analysis.frobenius_norm.exact
    assert analysis.trace.value == pytest.approx(values.sum())
    assert analysis.frobenius_norm.value == pytest.approx(np.linalg.norm(values))
    assert holds(analysis.spectral_norm, 20.0)
    assert analysis.density.atoms == pytest.approx(values)
    assert list(analysis.matvecs) == ["eigenpairs"]
    assert h.matvecs == 50
    assert analysis.converged


def test_a_small_matrix_is_certain_of_its_norm():
    # The basis holds the whole space: there is nothing that was not searched.
    analysis = spectra.analyze(dense(s3(25)), k=3, tol=1e-9)
    assert analysis.spectral_norm.notes == ()
    assert holds(analysis.spectral_norm, 20.0)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_smallest_matrices_are_analysed(n):
    values = np.array([4.0, -2.0, 1.0])[:n]
    for k in range(1, n + 1):
        analysis = spectra.analyze(dense(values), k=k)
        assert analysis.converged
        assert holds(analysis.trace, values.sum())
        assert holds(analysis.frobenius_norm, np.linalg.norm(values))
        assert holds(analysis.spectral_norm, 4.0)
        assert str(analysis)


def test_the_zero_matrix_and_the_identity_are_analysed():
    for value in (0.0, 2.0):
        analysis = spectra.analyze(value * np.eye(60), k=3)
        assert analysis.converged
        assert analysis.trace.value == pytest.approx(60 * value)
        assert analysis.frobenius_norm.value == pytest.approx(60**0.5 * value)
        assert holds(analysis.spectral_norm, value)
        assert analysis.density.cdf([value - 1e-6, value + 1e-6]) == pytest.approx([0, 1])


def test_parts_that_were_not_asked_for_are_absent():
    h = operator(Rotated(s1(200)))
    analysis = spectra.analyze(h, k=4, trace=False, density=False)
    assert analysis.trace is analysis.frobenius_norm is analysis.density is None
    assert h.matvecs == analysis.eigenpairs.matvecs
    assert analysis.converged
    assert "trace" not in str(analysis)
    alone = spectra.analyze(h, k=4, density=False)
    assert alone.trace is not None
    assert alone.frobenius_norm is not None
    assert alone.density is None


def test_what_is_not_converged_is_said():
    analysis = spectra.analyze(Rotated(s3(400)), k=2, rtol=1e-5, max_matvecs=10)
    assert not analysis.converged
    assert not analysis.trace.converged
    assert "tolerance not reached" in str(analysis)


def test_the_text_has_every_part_with_its_error():
    text = str(spectra.analyze(Rotated(s1(300)), k=4))
    assert "4 eigenpairs (largest in magnitude)" in text
    assert "spectral norm = 100  (99% interval [" in text
    for name in ("trace = ", "Frobenius norm = "):
        line = next(line for line in text.splitlines() if line.startswith(name))
        assert "95% interval [" in line
    assert "spectral density of n = 300" in text


def test_the_same_seed_gives_the_same_analysis_to_the_last_bit():
    state = torch.get_rng_state()
    first, second = (spectra.analyze(Rotated(s1(200)), k=4, seed=3) for _ in range(2))
    assert np.array_equal(first.eigenpairs.vectors, second.eigenpairs.vectors)
    assert np.array_equal(first.trace.samples, second.trace.samples)
    assert np.array_equal(first.density.nodes, second.density.nodes)
    assert torch.equal(state, torch.get_rng_state())
    other = spectra.analyze(Rotated(s1(200)), k=4, seed=4)
    assert not np.array_equal(first.density.nodes, other.density.nodes)


def test_neighbouring_seeds_share_no_probe():
    # Streams made as seed, seed + 1, … would give one run's trace the next run's density probes.
    samples = [spectra.analyze(Rotated(s3(200)), k=2, seed=seed).trace.samples for seed in range(6)]
    every = np.concatenate(samples).round(9)
    assert len(np.unique(every)) == len(every)


# --- saving -----------------------------------------------------------------------------------


MATRIX = Rotated(s1(120))
RESULTS = {
    "eigenpairs": lambda: spectra.eigsh(MATRIX, 4),
    "unconverged eigenpairs": lambda: spectra.eigsh(MATRIX, 4, max_matvecs=9),
    "eigenpairs of torch": lambda: spectra.eigsh(tanh_network()[0], 3),
    "exact trace": lambda: spectra.trace(np.eye(5)),
    "sampled trace": lambda: spectra.trace(MATRIX, max_matvecs=20),
    "spectral norm": lambda: spectra.norm(MATRIX),
    "frobenius norm": lambda: spectra.norm(MATRIX, "fro", deflate=spectra.eigsh(MATRIX, 4)),
    "density": lambda: spectra.spectral_density(MATRIX, deflate=spectra.eigsh(MATRIX, 4)),
    "atoms": lambda: spectra.spectral_density(np.eye(4), deflate=spectra.eigsh(np.eye(4), 4)),
    "analysis": lambda: spectra.analyze(tanh_network()[0], k=4),
    "analysis of a part": lambda: spectra.analyze(MATRIX, k=3, density=False, trace=False),
}


def assert_same(first, second):
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype
        assert torch.equal(first, second)
    elif isinstance(first, np.ndarray):
        assert first.dtype == second.dtype
        assert np.array_equal(first, second)
    elif dataclasses.is_dataclass(first):
        for f in dataclasses.fields(first):
            assert_same(getattr(first, f.name), getattr(second, f.name))
    elif isinstance(first, dict):
        assert list(first) == list(second)
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, tuple | list):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    else:
        # nan is the standard error of what has bounds instead.
        assert first == second or (math.isnan(first) and math.isnan(second))


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_is_loaded_as_it_was_saved(name, tmp_path):
    result = RESULTS[name]()
    result.save(tmp_path / "result")
    loaded = spectra.load(tmp_path / "result")
    assert str(loaded) == str(result)
    assert_same(result, loaded)


def test_loaded_eigenpairs_go_on_to_deflate(tmp_path):
    matrix = Rotated(s1(120))
    spectra.eigsh(matrix, 4).save(tmp_path / "pairs")
    loaded = spectra.load(tmp_path / "pairs")
    fresh = spectra.trace(matrix, deflate=spectra.eigsh(matrix, 4))
    assert spectra.trace(matrix, deflate=loaded).value == fresh.value


def test_results_say_where_they_come_from():
    analysis = spectra.analyze(Rotated(s1(120)), k=3, seed=5)
    parts = (
        analysis,
        analysis.eigenpairs,
        analysis.trace,
        analysis.spectral_norm,
        analysis.density,
    )
    for part in parts:
        assert part.provenance["versions"]["spectra"] == spectra.__version__
        assert part.provenance["operator"]["n"] == 120
        assert "seed" in part.provenance
        assert "options" in part.provenance
    assert analysis.provenance["seed"] == 5


# --- failures and wrong arguments -------------------------------------------------------------


def test_a_product_with_nan_is_named():
    with pytest.raises(NonFiniteError, match="matvec 7 returned 1 non-finite of 100 entries"):
        spectra.analyze(Poisoned(s1(100), at=7), k=3)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"k": 0}, ArgumentError, "k=0, but the operator is 43 x 43"),
        ({"k": 44}, ArgumentError, "expected 1 <= k <= 43"),
        ({"k": 2.0}, ArgumentTypeError, "k=2.0; expected an integer"),
        ({"which": "SM"}, ArgumentError, "which='SM' asks for eigenvalues inside the spectrum"),
        ({"tol": 0}, ArgumentError, "tol=0; expected a positive"),
        ({"ncv": 4}, ArgumentError, "ncv=4 is too small for k=3"),
        ({"rtol": 0}, ArgumentError, "rtol=0, atol=None; expected tolerances >= 0"),
        ({"rtol": -0.1}, ArgumentError, "rtol=-0.1, atol=None; expected tolerances >= 0"),
        ({"steps": 0}, ArgumentError, "steps=0; expected an integer >= 1"),
        ({"probes": 0}, ArgumentError, "probes=0; expected an integer >= 1"),
        ({"probes": 2.0}, ArgumentError, "probes=2.0; expected an integer >= 1"),
        ({"max_matvecs": 1}, ArgumentError, "max_matvecs=1; an error estimate needs at least 2"),
        ({"seed": -1}, ArgumentError, "seed=-1; expected an integer >= 0"),
        ({"seed": 1.5}, ArgumentError, "seed=1.5; expected an integer >= 0"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(options, kind, message, monkeypatch):
    # Also those of later parts: nobody should wait an hour for the message about the last.
    h, _ = tanh_network()
    monkeypatch.setattr(h, "value_and_gradient", lambda: pytest.fail("a gradient was computed"))
    with pytest.raises(kind, match=message):
        spectra.analyze(h, **{"k": 3, **options})
    assert h.matvecs == 0


# --- what a first user found ------------------------------------------------------------------


def test_the_frobenius_norm_is_never_below_the_spectral_norm():
    values = np.concatenate([[80.0, -10.0, -8.0], np.random.default_rng(0).normal(0, 0.3, 200)])
    for seed in range(5):
        analysis = spectra.analyze(Rotated(values), k=2, which="SA", budget=25, seed=seed)
        frobenius = analysis.frobenius_norm
        assert frobenius.value >= analysis.spectral_norm.value
        low, high = frobenius.interval()
        assert low <= np.linalg.norm(values) <= high


def test_a_slow_first_product_does_not_use_up_a_budget_of_seconds():
    class Cold(Diagonal):
        def _matvec(self, x):
            time.sleep(0.3 if self.shape[0] not in seen else 0.0)
            seen.add(self.shape[0])
            return super()._matvec(x)

    seen = set()
    analysis = spectra.analyze(Cold(s1(300)), k=4, budget="5s")
    assert analysis.converged
    assert analysis.notes == ()


def test_a_time_too_short_is_told_in_seconds():
    class Slow(Diagonal):
        def _matvec(self, x):
            time.sleep(0.01)
            return super()._matvec(x)

    with pytest.raises(ArgumentError, match=r"matvecs, which take about 0\.\d+ s at 0\.01\d* s"):
        spectra.analyze(Slow(s1(300)), budget="0.2s")


def test_the_number_of_batches_is_in_the_provenance():
    h, _ = tanh_network()
    analysis = spectra.analyze(h, k=2)
    assert analysis.provenance["operator"]["batches"] == 2
    assert analysis.eigenpairs.provenance["operator"]["batches"] == 2


@pytest.mark.parametrize("at", [40, 60, 95])
def test_eigenpairs_survive_what_fails_after_them(at):
    values = s1(1000)
    with pytest.raises(NonFiniteError, match=f"matvec {at}") as caught:
        spectra.analyze(Poisoned(values, at))
    pairs = caught.value.partial
    assert pairs.values == pytest.approx(values[:10], rel=1e-5)
    assert pairs.certified


def test_of_few_eigenvalues_all_are_computed_by_default():
    analysis = spectra.analyze(np.diag([3.0, -1.0, 2.0]))
    assert np.allclose(analysis.eigenpairs.values, [3, 2, -1])
