"""How the trace is shared among layers: right on average, off by what it says, and for nothing."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import spectra
from spectra.algorithms.density import probe_generator
from spectra.algorithms.lanczos import Krylov
from spectra.algorithms.moments import Stop
from spectra.algorithms.probes import Deflation, Run, seeded, sphere
from spectra.algorithms.progress import progress_bar
from spectra.algorithms.sketch import KrylovPart
from spectra.analysis.sharing import Shared, _Known
from spectra.errors import ArgumentError
from spectra.operators.base import MatrixOperator, as_operator
from tests.cases.matrices import (
    Layered,
    Rotated,
    dense,
    orthogonal,
    s1,
    s2,
    s3,
    tanh_network,
)
from tests.cases.networks import tanh_mlp, wine

SIZES = {
    "embed.weight": 20,
    "layers.0.attn.weight": 40,
    "layers.0.attn.bias": 5,
    "layers.0.mlp.weight": 25,
    "layers.1.attn.weight": 20,
    "scale": 10,
}
MODULES = {
    "embed": slice(0, 20),
    "layers.0.attn": slice(20, 65),
    "layers.0.mlp": slice(65, 90),
    "layers.1.attn": slice(90, 110),
    "": slice(110, 120),
}
LAYERS = {
    "embed": slice(0, 20),
    "layers.0": slice(20, 90),
    "layers.1": slice(90, 110),
    "": slice(110, 120),
}


def network():
    """Two batches of unequal size; its dense Hessian, and where its two linear layers are."""
    h, reference = tanh_network()
    return h, reference, {"0": slice(0, 25), "2": slice(25, 43)}


# --- statistics -------------------------------------------------------------------------------

CASES = {
    # A Krylov space of the density is taken out, beside pairs that are far from converged.
    "rough pairs, Krylov": (
        s2(120),
        {"k": 4, "tol": 0.5, "steps": 8, "rtol": 1e-9, "max_matvecs": 20},
    ),
    "no density": (
        s3(120),
        {"k": 2, "density": False, "rtol": 1e-9, "max_matvecs": 16},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_block_traces_are_unbiased_and_as_far_off_as_they_say(case):
    values, options = CASES[case]
    matrix = dense(values)
    h = Layered(matrix, SIZES)
    truth = {name: np.diag(matrix)[place].sum() for name, place in MODULES.items()}
    errors = {name: [] for name in MODULES}
    scores, covered = [], []
    for seed in range(200):
        analysis = spectra.analyze(h, seed=seed, progress=False, **options)
        assert analysis.blocks.probes >= 16
        for name, trace in analysis.module_traces().items():
            low, high = trace.interval()
            errors[name].append(trace.value - truth[name])
            scores.append(errors[name][-1] / trace.standard_error)
            covered.append(low <= truth[name] <= high)
    for each in errors.values():
        assert abs(np.mean(each)) < 3.5 * np.std(each) / 200**0.5
    assert abs(np.mean(scores)) < 0.15
    assert 0.95 < np.std(scores) < 1.2
    assert np.mean(covered) > 0.93


def test_few_probes_still_cover():
    matrix = dense(s1(120))
    h = Layered(matrix, SIZES)
    covered = []
    for seed in range(60):
        options = {"k": 3, "steps": 8, "rtol": 1e-9, "max_matvecs": 4, "seed": seed}
        analysis = spectra.analyze(h, progress=False, **options)
        assert analysis.blocks.probes <= 7
        for name, trace in analysis.module_traces().items():
            low, high = trace.interval()
            covered.append(low <= np.diag(matrix)[MODULES[name]].sum() <= high)
    assert np.mean(covered) > 0.93


def rough_pairs(matrix, count=6):
    """Ritz pairs of a random subspace: what couples them to the rest is as large as themselves."""
    basis = orthogonal(len(matrix), seed=5)[:, :count]
    values, rotation = np.linalg.eigh(basis.T @ matrix @ basis)
    basis = basis @ rotation
    residuals = matrix @ basis - basis * values
    return SimpleNamespace(
        values=values,
        vectors=torch.from_numpy(basis),
        residuals=np.linalg.norm(residuals, axis=0),
        couplings=2 * (basis * residuals).sum(axis=1),
    )


def a_run(h, rtol):
    with progress_bar("trace", 200, False) as bar:
        return Run(h, Stop("trace", rtol, None, 0.95, 200), 0, bar)


def sums(vector):
    return np.add.reduceat(vector, [0, 20, 60, 65, 90, 110])


@pytest.mark.parametrize("krylov", [False, True])
def test_pairs_that_are_no_eigenpairs_bias_no_block(krylov):
    matrix = dense(s3(120))
    h = Layered(matrix, SIZES)
    pairs = rough_pairs(matrix)
    deflation = Deflation(h, pairs)
    part = None
    if krylov:
        run = Krylov(h, 9, seeded(1), complement_of=deflation.basis)
        for _ in range(9):
            run.step()
        part = KrylovPart(h.space, run)
    known = _Known(h.space, deflation, part)
    # The mean over the sphere of a quadratic form is that over any orthonormal basis.
    q = pairs.vectors.numpy()
    complement = np.linalg.svd(np.eye(120) - q @ q.T)[0][:, :114] @ orthogonal(114)
    for column in complement.T:
        z = 114**0.5 * torch.from_numpy(column.copy())
        known.take_from(z[None], h.apply(z)[None])
    mean = np.array(known.noted).mean(axis=0)
    assert mean == pytest.approx(sums(np.diag(matrix)), abs=1e-10)
    assert np.abs(sums(pairs.couplings)).max() > 0.5


def test_a_probe_of_the_density_says_what_its_product_does():
    matrix = dense(s3(120))
    h = Layered(matrix, SIZES)
    pairs = rough_pairs(matrix)
    density = spectra.spectral_density(h, steps=1, probes=3, deflate=pairs, seed=4)
    q = pairs.vectors.numpy()
    for i, found in enumerate(density.parameter_traces):
        z = 114**0.5 * sphere(h.space, probe_generator(4, i), pairs.vectors.T).numpy()
        product = matrix @ z
        inside = q @ (q.T @ product)
        assert found == pytest.approx(sums(z * (product + inside)), rel=1e-10)


def kept_density(matrix):
    h, pairs = Layered(matrix, SIZES), rough_pairs(matrix)
    options = {"steps": 8, "probes": 3, "deflate": pairs, "keep_basis": True}
    return h, pairs, spectra.spectral_density(h, **options)


def test_a_krylov_space_is_taken_out_of_the_densitys_own_probes():
    matrix = dense(s2(120))
    h, pairs, density = kept_density(matrix)
    shared = Shared(h.space, density, Deflation(h, pairs), rtol=1e-3)
    assert shared.krylov_vectors == 8
    v, core = density.runs[0].basis.numpy(), density.runs[0].projection
    taken = v.T @ core @ v
    known = np.diag((q := pairs.vectors.numpy()) * pairs.values @ q.T + taken)
    assert len(shared.known.noted) == 2
    for i in (1, 2):
        z = 114**0.5 * density.runs[i].basis[0].numpy()
        expected = density.parameter_traces[i] + sums(known - z * (taken @ z))
        assert shared.known.noted[i - 1] == pytest.approx(expected, rel=1e-9)


def test_a_krylov_space_that_pays_grows_and_what_it_takes_out_is_known():
    matrix = dense(s2(120))
    h, pairs, density = kept_density(matrix)
    deflation = Deflation(h, pairs)
    shared = Shared(h.space, density, deflation, rtol=0.03)
    few = shared.begun
    before = h.matvecs
    run = a_run(h, 0.03)
    begun, known = shared.prepare(run)
    assert run.spent == h.matvecs - before == shared.krylov_vectors - 8 >= 8
    assert begun is shared.begun
    assert begun.variances.mean() < few.variances.mean()
    v = known._part._rows.numpy()
    assert v[:8] == pytest.approx(density.runs[0].basis.numpy(), abs=0)
    assert v @ v.T == pytest.approx(np.eye(len(v)), abs=1e-12)
    assert v @ pairs.vectors.numpy() == pytest.approx(0, abs=1e-12)
    taken = v.T @ (v @ matrix @ v.T) @ v
    assert known.trace == pytest.approx(deflation.trace + np.trace(taken))
    q = pairs.vectors.numpy()
    outside = np.eye(120) - q @ q.T
    for i in (1, 2):
        z = 114**0.5 * density.runs[i].basis[0].numpy()
        sample = known.trace + z @ (outside @ matrix @ outside - taken) @ z
        assert begun.traces[i - 1] == pytest.approx(sample, rel=1e-9)
        expected = np.diag(q * pairs.values @ q.T + taken) - z * (taken @ z)
        assert known.noted[i - 1] == pytest.approx(density.parameter_traces[i] + sums(expected))


@pytest.mark.parametrize(("rtol", "grows"), [(0.015, False), (0.005, True)])
def test_a_krylov_space_that_saves_fewer_probes_than_it_has_vectors_takes_no_product(rtol, grows):
    h = as_operator(Rotated(s2(1000)))
    pairs = spectra.eigsh(h, 10, tol=0.5)
    density = spectra.spectral_density(h, steps=20, probes=3, deflate=pairs, keep_basis=True)
    shared = Shared(h.space, density, Deflation(h, pairs), rtol=rtol)
    assert shared.krylov_vectors == 20
    before = h.matvecs
    shared.prepare(a_run(h, rtol))
    assert (h.matvecs > before) == grows == (shared.krylov_vectors > 20)


def test_the_blocks_of_a_network_are_those_of_its_dense_hessian():
    h, reference, _ = network()
    matrix = Layered(reference, {"0.weight": 20, "0.bias": 5, "2.weight": 15, "2.bias": 3})
    options = {"k": 3, "steps": 6, "probes": 6, "rtol": 1e-9, "max_matvecs": 14, "progress": False}
    found, expected = (spectra.analyze(each, **options).blocks for each in (h, matrix))
    assert found.parameters == expected.parameters
    assert found.probes == expected.probes >= 19
    # The same seed, so the same probes.
    assert found.parameter_traces == pytest.approx(expected.parameter_traces, rel=1e-6)
    assert found.masses == pytest.approx(expected.masses, rel=1e-6)


# --- for nothing ------------------------------------------------------------------------------

RUNS = [
    {},
    {"tol": 0.3},
    {"density": False},
    {"steps": 1},
    {"probes": 1},
    {"rtol": 1e-4, "max_matvecs": 60},
    {"budget": 60},
]


@pytest.mark.parametrize("options", RUNS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_blocks_take_no_product_and_change_no_number(options, dtype):
    matrix = dense(s2(120))
    plain = MatrixOperator(torch.from_numpy(matrix).to(dtype))
    named = Layered(matrix, SIZES, dtype)
    without = spectra.analyze(plain, k=4, progress=False, **options)
    analysis = spectra.analyze(named, k=4, progress=False, **options)
    assert without.blocks is None
    assert without.module_traces() == {}
    assert named.matvecs == plain.matvecs
    assert analysis.matvecs == without.matvecs
    for one, other in (
        (analysis.trace, without.trace),
        (analysis.frobenius_norm, without.frobenius_norm),
    ):
        assert np.array_equal(one.samples, other.samples)
        assert np.array_equal(one.variances, other.variances)
        assert one.value == other.value
        assert one.method == other.method
    if analysis.density:
        assert np.array_equal(analysis.density.nodes, without.density.nodes)


@pytest.mark.parametrize("options", [{}, {"density": False}, {"tol": 0.5}, {"k": 2, "steps": 12}])
def test_the_blocks_of_every_probe_sum_to_its_sample_of_the_trace(options):
    h = Layered(dense(s2(120)), SIZES)
    analysis = spectra.analyze(h, **{"k": 4, "rtol": 0.1, "progress": False, **options})
    samples = analysis.blocks.parameter_traces.sum(axis=1)
    trace = analysis.trace.samples
    assert samples[: len(trace)] == pytest.approx(trace, rel=1e-10)
    # Those of the Frobenius norm's own probes come after.
    assert len(samples) == len(analysis.frobenius_norm.samples)
    assert sum(len(analysis.module_traces(by)) for by in ("layer", "parameter")) == 4 + 6


def test_a_density_whose_bases_were_not_kept_still_gives_its_samples(monkeypatch):
    h = Layered(dense(s3(120)), SIZES)
    # One probe: with more, a Krylov space that was kept would be taken out.
    kept = spectra.analyze(h, k=4, probes=1, rtol=0.1, progress=False)
    assert kept.matvecs["density"] == 20
    monkeypatch.setattr(h.space, "affordable", lambda: 40)
    lean = spectra.analyze(h, k=4, probes=1, rtol=0.1, progress=False)
    assert np.array_equal(lean.blocks.parameter_traces, kept.blocks.parameter_traces)


def test_a_density_goes_on_with_the_samples_that_it_has():
    h = Layered(dense(s3(120)), SIZES)
    pairs = spectra.eigsh(h, 3)
    options = {"deflate": pairs, "progress": False}
    whole = spectra.spectral_density(h, steps=6, probes=4, **options)
    begun = spectra.spectral_density(h, steps=4, probes=2, keep_basis=True, **options)
    longer = spectra.spectral_density(h, steps=6, begun=begun, **options)
    more = spectra.spectral_density(h, probes=4, begun=longer, **options)
    assert more.parameter_traces == pytest.approx(whole.parameter_traces, rel=1e-12)
    assert whole.shifted(1.0).parameter_traces.size == 0
    assert spectra.spectral_density(Rotated(s3(120)), steps=3).parameter_traces.size == 0


# --- exact ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "method"), [(5, "n unit vectors"), (43, "all known eigenpairs")], ids=["probes", "pairs"]
)
def test_where_the_trace_is_exact_its_blocks_are(k, method):
    h, reference, places = network()
    analysis = spectra.analyze(h, k=k, tol=1e-9, rtol=1e-4, progress=False)
    assert analysis.trace.exact
    assert analysis.blocks.method == method
    assert analysis.blocks.probes == 0
    for name, trace in analysis.module_traces().items():
        assert trace.exact
        assert trace.value == pytest.approx(np.diag(reference)[places[name]].sum(), abs=1e-10)
    for name, trace in analysis.module_traces("parameter").items():
        dense_block = h.block(name).to_dense()
        assert trace.value == pytest.approx(float(dense_block.trace()), abs=1e-10)
    assert "exact" in str(analysis.blocks)


def test_layers_and_means_are_sums_of_the_parameters():
    matrix = dense(s3(120))
    analysis = spectra.analyze(Layered(matrix, SIZES), k=120, progress=False)
    layers = analysis.module_traces("layer")
    assert list(layers) == list(LAYERS)
    for name, place in LAYERS.items():
        assert layers[name].value == pytest.approx(np.diag(matrix)[place].sum())
    means = analysis.module_traces("layer", mean=True)
    assert means["layers.0"].value == pytest.approx(np.diag(matrix)[20:90].mean())


def test_the_shares_of_the_eigenvectors_are_their_squared_lengths():
    matrix = dense(s3(120))
    analysis = spectra.analyze(Layered(matrix, SIZES), k=3, progress=False)
    vectors = analysis.eigenpairs.vectors.numpy()
    rows = {row.name: row for row in analysis.blocks.rows("layer")}
    for name, place in LAYERS.items():
        assert rows[name].masses == pytest.approx((vectors[place] ** 2).sum(axis=0))
    assert sum(row.masses for row in rows.values()) == pytest.approx(np.ones(3))


# --- where there is nothing to share ------------------------------------------------------------


def test_one_module_has_no_blocks():
    data, loss = [wine()], spectra.losses.supervised(torch.nn.CrossEntropyLoss())
    one = spectra.HessianOperator(torch.nn.Linear(6, 3).double(), loss, data)
    function = spectra.HessianOperator.from_function(lambda x: (x**4).sum(), torch.ones(40))
    for h in (one, function, spectra.HessianOperator(tanh_mlp(), loss, data).block("0.*")):
        analysis = spectra.analyze(h, k=2, steps=4, progress=False)
        assert analysis.blocks is None
        assert analysis.module_traces() == {}
    some = spectra.HessianOperator(tanh_mlp(), loss, data).block(["0.*", "4.*"])
    assert list(spectra.analyze(some, k=2, steps=4).module_traces()) == ["0", "4"]


def test_without_the_trace_there_are_none():
    h = Layered(dense(s3(120)), SIZES)
    assert spectra.analyze(h, k=2, trace=False, progress=False).blocks is None


def test_too_few_probes_are_said():
    h = Layered(dense(s3(120)), SIZES)
    analysis = spectra.analyze(h, k=2, density=False, max_matvecs=3, progress=False)
    assert analysis.blocks.notes == ("3 probes are too few to rely on their spread",)
    assert "note: 3 probes are too few" in str(analysis)


def test_traces_by_something_else_are_refused():
    analysis = spectra.analyze(Layered(dense(s3(120)), SIZES), k=2, progress=False)
    with pytest.raises(ArgumentError, match="by='row'; expected 'layer', 'module' or 'parameter'"):
        analysis.module_traces("row")
