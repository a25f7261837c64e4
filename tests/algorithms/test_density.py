"""The density: Gauss quadrature of the spectral measure, and views of its nodes and weights."""

import re

import numpy as np
import pytest
import torch
from scipy import integrate, stats

import spectra
from spectra.algorithms.density import probe_generator
from spectra.algorithms.probes import Deflation, sphere
from spectra.errors import ArgumentError, NonFiniteError
from tests.cases.matrices import (
    Diagonal,
    Noisy,
    Poisoned,
    Rotated,
    dense,
    laplacian,
    operator,
    rank_one,
    s1,
    s1z,
    s2,
    s3,
    semicircle,
    tanh_network,
)


def distance(density, spectrum):
    """Wasserstein-1 distance between the nodes and the true spectrum."""
    nodes = np.concatenate([density.nodes.ravel(), density.atoms])
    atoms = np.full(len(density.atoms), 1 / density.n)
    masses = np.concatenate([density.weights.ravel() / density.probes, atoms])
    return stats.wasserstein_distance(nodes, spectrum, masses)


def by_hand(nodes, weights, n=10, atoms=()):
    return spectra.SpectralDensity(
        np.array(nodes, dtype=float),
        np.array(weights, dtype=float),
        n,
        np.array(atoms, dtype=float),
    )


# --- the quadrature ---------------------------------------------------------------------------


@pytest.mark.parametrize("make", [s1, s2, s3, semicircle], ids=lambda make: make.__name__)
@pytest.mark.parametrize("deflated", [0, 4])
def test_weights_are_positive_and_sum_to_the_share_that_was_not_deflated(make, deflated):
    matrix = Rotated(make(200))
    pairs = spectra.eigsh(matrix, deflated) if deflated else None
    density = spectra.spectral_density(matrix, steps=20, probes=3, deflate=pairs)
    assert density.nodes.shape == density.weights.shape == (3, 20)
    assert (density.weights >= 0).all()
    assert density.weights.sum(axis=1) == pytest.approx(np.full(3, (200 - deflated) / 200))
    assert len(density.atoms) == deflated
    assert (np.diff(density.nodes, axis=1) > 0).all()


@pytest.mark.parametrize("steps", [1, 2, 6])
def test_the_quadrature_is_exact_to_degree_two_m_minus_one(steps):
    values = np.linspace(-1, 1.2, 60)
    matrix = dense(values)
    density = spectra.spectral_density(matrix, steps=steps, probes=1, seed=4)
    start = sphere(operator(matrix).space, probe_generator(4, 0)).numpy()
    for power in range(2 * steps + 1):
        quadrature = float((density.weights[0] * density.nodes[0] ** power).sum())
        exact = start @ np.linalg.matrix_power(matrix, power) @ start
        # One degree more is no longer exact: the test can tell.
        assert (abs(quadrature - exact) < 1e-12) == (power < 2 * steps)


def test_the_quadrature_of_a_deflated_operator_is_that_of_its_complement():
    values = np.concatenate([[30.0, -20.0], np.linspace(-1, 1.2, 60)])
    matrix = dense(values)
    pairs = spectra.eigsh(matrix, 2, tol=1e-12)
    density = spectra.spectral_density(matrix, steps=5, probes=1, deflate=pairs, seed=4)
    h = operator(matrix)
    start = sphere(h.space, probe_generator(4, 0), Deflation(h, pairs).basis).numpy()
    inside = np.eye(62) - pairs.vectors @ pairs.vectors.T
    assert density.atoms == pytest.approx([30, -20])
    for power in range(10):
        quadrature = float((density.weights[0] * density.nodes[0] ** power).sum())
        exact = start @ np.linalg.matrix_power(inside @ matrix @ inside, power) @ start * 60 / 62
        assert quadrature == pytest.approx(exact, abs=1e-9)


def test_as_many_steps_as_dimensions_give_the_eigenvalues():
    values = s3(30)
    density = spectra.spectral_density(dense(values), steps=30, probes=2)
    for nodes in density.nodes:
        assert nodes[::-1] == pytest.approx(values, abs=1e-9)


# Medians over trials of the distance to the true spectrum; at most twice these.
TABLE = [
    (s1, 20, 5, 4.9e-2, 7.4e-3),
    (s1, 40, 5, 4.4e-2, 3.9e-3),
    (s1, 40, 1, 5.8e-2, 5.5e-3),
    (s1, 100, 1, 5.8e-2, 3.3e-3),
    (s1z, 40, 5, 4.2e-2, 2.2e-3),
    (s2, 40, 5, 5.3e-2, 2.2e-2),
]


@pytest.mark.parametrize(
    ("make", "steps", "probes", "plain", "deflated"),
    TABLE,
    ids=[f"{row[0].__name__}-{row[1]}x{row[2]}" for row in TABLE],
)
def test_the_distance_to_the_spectrum_is_what_the_study_measured(
    make, steps, probes, plain, deflated
):
    values = make(2000)
    h = operator(Diagonal(values))
    pairs = spectra.eigsh(h, 10, which="LA")
    for deflate, expected in ((None, plain), (pairs, deflated)):
        distances = [
            distance(
                spectra.spectral_density(h, steps=steps, probes=probes, deflate=deflate, seed=seed),
                values,
            )
            for seed in range(5)
        ]
        assert np.median(distances) <= 2 * expected


@pytest.mark.parametrize("make", [s1, s1z], ids=lambda make: make.__name__)
def test_deflation_brings_the_density_closer_at_equal_cost(make):
    values = make(1000)
    h = operator(Rotated(values))
    pairs = spectra.eigsh(h, 10)
    for seed in range(5):
        plain = spectra.spectral_density(h, steps=30, probes=5, seed=seed)
        deflated = spectra.spectral_density(h, steps=30, probes=3, deflate=pairs, seed=seed)
        assert pairs.matvecs + deflated.matvecs <= plain.matvecs
        assert distance(deflated, values) < distance(plain, values) / 3


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("deflated", [0, 10])
def test_moments_are_unbiased_samples_of_trace_and_squared_norm(power, deflated):
    values = s1(300)
    h = operator(Rotated(values))
    pairs = spectra.eigsh(h, deflated, tol=1e-9) if deflated else None
    density = spectra.spectral_density(h, steps=4, probes=300, deflate=pairs)
    samples = density.moment_samples(power)
    assert samples.shape == (300,)
    error = samples.std(ddof=1) / 300**0.5
    assert abs(samples.mean() - (values**power).sum()) < 3 * error
    if power == 1:
        # The same as Hutchinson's samples of the same probes.
        basis = Deflation(h, pairs).basis if deflated else None
        probe = sphere(h.space, probe_generator(0, 0), basis)
        known = pairs.values.sum() if deflated else 0.0
        sample = known + (300 - deflated) * float(probe @ h.apply(probe))
        assert samples[0] == pytest.approx(sample)


def test_the_semicircle_is_recovered():
    density = spectra.spectral_density(Rotated(semicircle(1000)), steps=40, probes=5)
    x = np.linspace(-1.8, 1.8, 50)
    truth = np.sqrt(4 - x**2) / (2 * np.pi)
    assert np.abs(density.density(x) - truth).max() < 0.05
    exact = 0.5 + x * np.sqrt(4 - x**2) / (4 * np.pi) + np.arcsin(x / 2) / np.pi
    assert np.abs(density.cdf(x) - exact).max() < 0.05


def test_the_laplacian_follows_the_arcsine_law():
    density = spectra.spectral_density(laplacian(800), steps=50, probes=4)
    x = np.linspace(0.1, 3.9, 40)
    assert np.abs(density.cdf(x) - np.arccos(1 - x / 2) / np.pi).max() < 0.05


# --- curve, distribution function, quantiles --------------------------------------------------


@pytest.mark.parametrize("width", [None, 0.05])
@pytest.mark.parametrize("deflated", [0, 10])
def test_the_curve_integrates_to_the_share_that_was_not_deflated(width, deflated):
    matrix = Rotated(s3(300))
    pairs = spectra.eigsh(matrix, deflated) if deflated else None
    density = spectra.spectral_density(matrix, steps=20, probes=3, deflate=pairs)
    # The node of the lone outlier is as wide as its distance to the next.
    grid = np.linspace(density.support[0] - 40, density.support[1] + 40, 40_000)
    mass = integrate.trapezoid(density.density(grid, width), grid)
    assert mass == pytest.approx((300 - deflated) / 300, abs=1e-4)


def test_the_grid_covers_the_curve():
    density = spectra.spectral_density(Rotated(semicircle(300)), steps=20, probes=3)
    grid = density.grid(4000)
    assert len(grid) == 4000
    assert integrate.trapezoid(density.density(grid), grid) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("width", [None, 0.1])
def test_the_band_contains_the_curve_and_is_students(width):
    density = spectra.spectral_density(Rotated(s3(200)), steps=15, probes=4)
    grid = density.grid(300)
    low, high = density.band(grid, width)
    middle = density.density(grid, width)
    assert (low <= middle).all()
    assert (middle <= high).all()
    assert (low >= 0).all()
    curves = (
        np.stack(
            [
                by_hand([nodes], [weights], n=200).density(grid, width)
                for nodes, weights in zip(density.nodes, density.weights, strict=True)
            ]
        )
        if width
        else None
    )
    if curves is not None:
        half = stats.t.ppf(0.975, 3) * stats.sem(curves, axis=0)
        assert high == pytest.approx(middle + half)
    narrow = density.band(grid, width, confidence=0.5)
    assert (narrow[1] <= high + 1e-12).all()


def test_the_distribution_function_rises_from_zero_to_one():
    matrix = Rotated(s1(200))
    density = spectra.spectral_density(matrix, steps=15, deflate=spectra.eigsh(matrix, 5))
    x = np.linspace(-1, 101, 3000)
    cdf = density.cdf(x)
    assert cdf[0] == 0.0
    assert cdf[-1] == pytest.approx(1)
    assert (np.diff(cdf) >= -1e-15).all()
    low, high = density.cdf_band(x)
    assert (low <= cdf).all()
    assert (cdf <= high + 1e-15).all()
    assert low.min() >= 0
    assert high.max() <= 1


def test_the_distribution_function_counts_atoms_at_their_place():
    density = by_hand([[0.0, 1.0]], [[0.5, 0.3]], n=10, atoms=[5.0, 3.0])
    assert density.cdf([-1, 0, 0.5, 1, 3, 4.9, 5]) == pytest.approx(
        [0, 0.5, 0.5, 0.8, 0.9, 0.9, 1.0]
    )
    assert density.cdf(0.2) == pytest.approx([0.5])


def test_the_band_of_the_distribution_function_covers_the_truth():
    # It is the spread of the probes alone: at a step between nodes the quadrature is biased, too.
    values = semicircle(400)
    x = np.array([-1.0, 0.0, 1.0])
    truth = (values[:, None] <= x).mean(axis=0)
    covered = np.zeros(3)
    for seed in range(60):
        density = spectra.spectral_density(Rotated(values), steps=60, probes=5, seed=seed)
        low, high = density.cdf_band(x)
        covered += (low - 0.01 <= truth) & (truth <= high + 0.01)
    assert (covered >= 0.9 * 60).all()


def test_quantiles_are_those_of_the_spectrum():
    values = semicircle(1000)
    density = spectra.spectral_density(Rotated(values), steps=60, probes=5)
    shares = [0.05, 0.25, 0.5, 0.75, 0.95]
    assert density.quantiles(shares) == pytest.approx(np.quantile(values, shares), abs=0.1)


def test_quantiles_fall_on_nodes_and_atoms():
    density = by_hand([[0.0, 1.0]], [[0.5, 0.3]], n=10, atoms=[5.0, 3.0])
    assert density.quantiles([0, 0.4, 0.6, 0.85, 0.95, 1]) == pytest.approx([0, 0, 1, 3, 5, 5])


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_quantile_of_no_share_is_refused(share):
    with pytest.raises(ArgumentError, match="expected shares of the spectrum between 0 and 1"):
        by_hand([[0.0, 1.0]], [[0.5, 0.5]]).quantiles([0.5, share])


def test_every_node_has_the_width_of_its_own_spacing():
    density = by_hand([[0.0, 1.0, 3.0, 7.0]], [[0.25, 0.25, 0.25, 0.25]])
    spacing = np.array([1.0, 1.5, 3.0, 4.0])
    assert density.widths[0] / spacing == pytest.approx(np.full(4, density.widths[0, 0]))
    # Two neighbours at distance d overlap at a third of their height: one hump, not two.
    assert density.widths[0, 0] == pytest.approx(2 / np.sqrt(8 * np.log(3)))


def test_a_node_without_weight_between_others_takes_no_width_from_them():
    # The first components of eigenvectors underflow at times, inside the range and not only at its
    # end; the widths of the others must stay with their own nodes.
    density = by_hand([[0.0, 1.0, 2.0, 3.0]], [[0.5, 0.0, 0.3, 0.2]])
    without = by_hand([[0.0, 2.0, 3.0]], [[0.5, 0.3, 0.2]])
    assert density.widths[0, [0, 2, 3]] == pytest.approx(without.widths[0])
    grid = np.linspace(-2, 6, 200)
    assert density.density(grid) == pytest.approx(without.density(grid))
    assert density.grid(50) == pytest.approx(without.grid(50))


@pytest.mark.parametrize("width", [0, -0.1, float("nan")])
def test_a_width_that_is_not_positive_is_refused(width):
    density = by_hand([[0.0, 1.0]], [[0.5, 0.5]])
    with pytest.raises(ArgumentError, match="expected a positive width"):
        density.density(np.zeros(3), width)


@pytest.mark.parametrize("confidence", [0, 1, 95, float("nan")])
def test_a_band_of_no_probability_is_refused(confidence):
    density = by_hand([[0.0, 1.0]] * 2, [[0.5, 0.5]] * 2)
    with pytest.raises(ArgumentError, match="expected a probability between 0 and 1"):
        density.cdf_band(0.5, confidence)
    with pytest.raises(ArgumentError, match="expected a probability between 0 and 1"):
        density.band(np.zeros(3), confidence=confidence)


@pytest.mark.parametrize("linear_width", [1e-3, 1.0])
def test_the_density_on_a_symmetric_log_axis_has_the_same_mass(linear_width):
    density = spectra.spectral_density(Rotated(s1(300)), steps=20, probes=2)
    low, high = density.grid()[[0, -1]]
    u = np.linspace(np.arcsinh(low / linear_width), np.arcsinh(high / linear_width), 100_001)
    curve = density.density(linear_width * np.sinh(u), linear_width=linear_width)
    assert integrate.trapezoid(curve, u) == pytest.approx(1, abs=1e-3)
    with pytest.raises(ArgumentError, match="linear_width=0; expected a positive width"):
        density.density(u, linear_width=0)


@pytest.mark.parametrize("width", [None, 0.05])
def test_the_histogram_is_the_integral_of_the_curve(width):
    density = spectra.spectral_density(Rotated(s3(300)), steps=20, probes=3)
    # However coarse or fine the bins, nothing falls between them.
    for bins in (3, 50, 5000):
        edges = np.linspace(-60, 80, bins + 1)
        shares = density.histogram(edges, width)
        assert shares.shape == (3, bins)
        assert shares.sum(axis=1) == pytest.approx(np.ones(3), abs=1e-6)
    centres = (edges[1:] + edges[:-1]) / 2
    curve = shares.mean(axis=0) / np.diff(edges)
    assert curve == pytest.approx(density.density(centres, width), abs=0.02)


# --- equivariance and reproducibility ---------------------------------------------------------


@pytest.mark.parametrize(("factor", "shift"), [(1.0, 7.5), (1e6, 0.0), (-2.0, 1.0), (1e-12, 0.0)])
def test_shift_and_scale_move_the_nodes_and_nothing_else(factor, shift):
    matrix = dense(s3(80))
    plain = spectra.spectral_density(matrix, steps=12, probes=2)
    moved = spectra.spectral_density(factor * matrix + shift * np.eye(80), steps=12, probes=2)
    nodes, weights = factor * plain.nodes + shift, plain.weights
    if factor < 0:
        nodes, weights = nodes[:, ::-1], weights[:, ::-1]
    assert moved.nodes == pytest.approx(nodes, abs=1e-9 * abs(factor))
    assert moved.weights == pytest.approx(weights, abs=1e-9)
    assert moved.widths == pytest.approx(
        abs(factor) * (plain.widths if factor > 0 else plain.widths[:, ::-1]), rel=1e-6
    )


def test_the_same_seed_gives_the_same_nodes_to_the_last_bit():
    h = operator(Rotated(s1(100)))
    state = torch.get_rng_state()
    first, second = (spectra.spectral_density(h, steps=10, seed=2) for _ in range(2))
    assert np.array_equal(first.nodes, second.nodes)
    assert np.array_equal(first.weights, second.weights)
    assert torch.equal(state, torch.get_rng_state())
    other = spectra.spectral_density(h, steps=10, seed=3)
    assert not np.isin(other.weights, first.weights).any()


def test_more_probes_begin_with_the_same_ones():
    h = operator(Rotated(s1(100)))
    few = spectra.spectral_density(h, steps=10, probes=2)
    many = spectra.spectral_density(h, steps=10, probes=4)
    assert np.array_equal(few.nodes, many.nodes[:2])


# --- going on ---------------------------------------------------------------------------------

FIELDS = ("nodes", "weights", "alphas", "betas", "atoms")


@pytest.mark.parametrize("deflated", [0, 5])
def test_probes_added_later_are_those_of_asking_at_once(deflated):
    h = operator(Rotated(s1(100)))
    pairs = spectra.eigsh(h, deflated) if deflated else None
    few = spectra.spectral_density(h, steps=10, probes=2, deflate=pairs)
    before = h.matvecs
    more = spectra.spectral_density(h, begun=few, probes=4, deflate=pairs)
    assert h.matvecs - before == 20
    assert more.matvecs == 40
    at_once = spectra.spectral_density(h, steps=10, probes=4, deflate=pairs)
    for name in FIELDS:
        assert np.array_equal(getattr(more, name), getattr(at_once, name)), name


@pytest.mark.parametrize("deflated", [0, 5])
def test_steps_added_later_are_those_of_asking_at_once(deflated):
    h = operator(Rotated(s1(100)))
    pairs = spectra.eigsh(h, deflated) if deflated else None
    few = spectra.spectral_density(h, steps=10, probes=2, deflate=pairs, keep_basis=True)
    at_once = spectra.spectral_density(h, steps=25, probes=3, deflate=pairs)
    # Twice from the same beginning, which stays as it is.
    for _ in range(2):
        before = h.matvecs
        more = spectra.spectral_density(h, begun=few, steps=25, probes=3, deflate=pairs)
        assert h.matvecs - before == 2 * 15 + 25
        assert more.matvecs == at_once.matvecs == 75
        for name in FIELDS:
            assert getattr(more, name) == pytest.approx(getattr(at_once, name), abs=1e-9), name
    assert few.steps == 10
    again = spectra.spectral_density(
        h,
        begun=spectra.spectral_density(h, begun=few, steps=20, deflate=pairs, keep_basis=True),
        steps=25,
        probes=3,
        deflate=pairs,
    )
    assert again.nodes == pytest.approx(at_once.nodes, abs=1e-9)
    assert again.matvecs == 75


def test_runs_that_ended_early_need_no_basis_to_go_on():
    h = operator(np.diag(np.repeat([1.0, 2.0, 4.0], 10)))
    few = spectra.spectral_density(h, steps=5, probes=2)
    more = spectra.spectral_density(h, begun=few, steps=9, probes=3)
    at_once = spectra.spectral_density(h, steps=9, probes=3)
    assert more.matvecs == at_once.matvecs == 9
    for name in FIELDS:
        assert np.array_equal(getattr(more, name), getattr(at_once, name)), name


def test_asking_for_nothing_new_costs_nothing(tmp_path):
    h = operator(Rotated(s1(100)))
    density = spectra.spectral_density(h, steps=10, probes=2, seed=3)
    loaded = spectra.load(density.save(tmp_path / "density"))
    before = h.matvecs
    same = spectra.spectral_density(h, begun=loaded, seed=3)
    assert h.matvecs == before
    assert same.matvecs == 20
    assert np.array_equal(same.nodes, density.nodes)
    more = spectra.spectral_density(h, begun=loaded, probes=3, seed=3)
    assert more.matvecs == 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 12}, "no bases to add more to; compute it with keep_basis=True"),
        ({"steps": 9}, "begun has 2 probes x 10 steps, asked for are 2 x 9"),
        ({"probes": 1}, "begun has 2 probes x 10 steps, asked for are 1 x 10"),
        ({"seed": 1}, "begun has the seed 0, got seed=1"),
        ({"deflate": 3}, "begun has 0 deflated eigenvalues"),
        ({"n": 90}, "begun is the density of n = 100 eigenvalues, the operator has n = 90"),
    ],
)
def test_what_does_not_continue_is_refused(options, message):
    begun = spectra.spectral_density(Rotated(s1(100)), steps=10, probes=2)
    h = operator(Rotated(s1(options.pop("n", 100))))
    if "deflate" in options:
        options["deflate"] = spectra.eigsh(h, options["deflate"])
    before = h.matvecs
    with pytest.raises(ArgumentError, match=message):
        spectra.spectral_density(h, begun=begun, **options)
    assert h.matvecs == before


def test_a_density_in_another_precision_is_not_gone_on_with():
    begun = spectra.spectral_density(Rotated(s1(100), dtype=np.float32), steps=10, probes=2)
    with pytest.raises(ArgumentError, match="computed in float32, the operator is in float64"):
        spectra.spectral_density(Rotated(s1(100)), begun=begun, probes=3)


# --- breakdown and small problems -------------------------------------------------------------


@pytest.mark.parametrize("value", [-2.5, 0.0, 1e-15])
def test_a_multiple_of_the_identity_is_one_node(value):
    h = operator(value * np.eye(40))
    density = spectra.spectral_density(h, steps=10, probes=3)
    assert h.matvecs == density.matvecs == 3
    assert density.nodes == pytest.approx(np.full((3, 10), value))
    assert density.weights[:, 0] == pytest.approx(np.ones(3))
    assert (density.weights[:, 1:] == 0).all()
    below, above = density.cdf([value - 1e-9, value + 1e-9])
    assert (below, above) == pytest.approx((0, 1))
    assert np.isfinite(density.density(np.linspace(-5, 5, 50))).all()
    grid = density.grid(200)
    assert integrate.trapezoid(density.density(grid), grid) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("distinct", [2, 3])
def test_few_distinct_eigenvalues_end_the_run_and_pad_it(distinct):
    levels = np.linspace(-2, 3, distinct)
    density = spectra.spectral_density(np.diag(np.repeat(levels, 20)), steps=15, probes=4)
    assert density.matvecs == 4 * distinct
    assert density.nodes[:, :distinct] == pytest.approx(np.tile(levels, (4, 1)), abs=1e-10)
    assert (density.nodes[:, distinct:] == density.nodes[:, [distinct - 1]]).all()
    assert (density.weights[:, distinct:] == 0).all()


@pytest.mark.parametrize("distinct", [2, 3, 7, 10])
def test_few_distinct_eigenvalues_have_all_the_mass(distinct):
    # Whether or not rounding let the run go on beyond the invariant subspace.
    levels = np.linspace(-2, 3, distinct)
    density = spectra.spectral_density(np.diag(np.repeat(levels, 20)), steps=15, probes=10)
    nearest = np.abs(density.nodes[:, :, None] - levels).min(axis=2)
    assert nearest[density.weights > 1e-12].max() < 1e-10
    assert density.weights.sum(axis=1) == pytest.approx(np.ones(10))
    between = (levels[1:] + levels[:-1]) / 2
    assert density.cdf(between) == pytest.approx(np.arange(1, distinct) / distinct, abs=0.1)
    assert density.cdf([-3, 4]) == pytest.approx([0, 1])
    low, high = density.band(np.linspace(-3, 4, 100))
    assert np.isfinite(low).all()
    assert np.isfinite(high).all()


def test_rank_one_has_nearly_all_of_its_mass_at_zero():
    density = spectra.spectral_density(rank_one(100), steps=20, probes=5)
    assert density.matvecs == 10
    assert density.cdf(1.0)[0] == pytest.approx(0.99, abs=0.02)
    exact = spectra.spectral_density(rank_one(100), deflate=spectra.eigsh(rank_one(100), 1))
    assert exact.atoms == pytest.approx([3])
    assert exact.cdf([-1e-9, 1e-9, 2.9, 3.1]) == pytest.approx([0, 0.99, 0.99, 1])


def test_deflating_everything_leaves_atoms_alone():
    values = s3(30)
    h = operator(dense(values))
    pairs = spectra.eigsh(h, 30)
    before = h.matvecs
    density = spectra.spectral_density(h, deflate=pairs, probes=2)
    assert h.matvecs == before
    assert density.matvecs == 0
    assert density.steps == 0
    assert density.atoms == pytest.approx(values)
    assert density.support == pytest.approx((values.min(), values.max()))
    between = (values[1:] + values[:-1]) / 2
    assert density.cdf(between) == pytest.approx((between[:, None] >= values).mean(axis=1))
    assert density.quantiles([0.5])[0] in density.atoms
    assert (density.density(density.grid(10)) == 0).all()
    assert "30 deflated eigenvalues" in str(density)


def test_all_but_one_dimension_may_be_deflated():
    values = s3(30)
    density = spectra.spectral_density(
        dense(values), deflate=spectra.eigsh(dense(values), 29, which="LA"), probes=2
    )
    assert density.steps == 1
    assert density.nodes == pytest.approx(np.full((2, 1), values.min()), abs=1e-9)
    assert density.weights == pytest.approx(np.full((2, 1), 1 / 30))


@pytest.mark.parametrize("n", [1, 2])
def test_the_smallest_matrices_have_a_density(n):
    values = np.array([3.0, -1.0])[:n]
    density = spectra.spectral_density(dense(values), probes=3)
    assert density.steps == n
    assert np.sort(density.nodes[0])[::-1] == pytest.approx(values)


def test_single_precision_finds_the_same_density():
    values = s1(500)
    double = spectra.spectral_density(Rotated(values), steps=40, probes=3)
    single = spectra.spectral_density(Rotated(values, dtype=np.float32), steps=40, probes=3)
    assert single.nodes.dtype == np.float64
    # Their probes differ: float32 numbers are drawn otherwise. Both are as close to the truth.
    assert distance(single, values) < 3 * distance(double, values) + 0.05
    assert single.weights.sum(axis=1) == pytest.approx(np.ones(3))


def test_the_density_of_a_networks_hessian_has_its_spectrum():
    h, reference = tanh_network()
    spectrum = np.linalg.eigvalsh(reference)
    density = spectra.spectral_density(h, steps=20, probes=20, deflate=spectra.eigsh(h, 5))
    assert distance(density, spectrum) < 0.02
    assert density.support == pytest.approx((spectrum[0], spectrum[-1]), abs=1e-6)


def test_one_run_through_the_whole_space_is_enough():
    values = s3(30)
    h = operator(dense(values))
    density = spectra.spectral_density(h, steps=40, probes=4)
    assert h.matvecs == density.matvecs == 30
    assert density.weights == pytest.approx(np.full((4, 30), 1 / 30))
    assert density.moment_samples(3) == pytest.approx(np.full(4, (values**3).sum()))


def test_noise_is_measured_and_said():
    noisy = spectra.spectral_density(Noisy(s1(500), 1e-2), steps=20, probes=4)
    assert 0.3e-2 < noisy.noise < 3e-2
    assert noisy.floor == pytest.approx(noisy.noise * noisy.support[1])
    assert any("differ from those of one symmetric matrix" in note for note in noisy.notes)
    assert noisy.resolution_at_zero >= noisy.floor
    # Noise of products in the complement is relative to those, not to the outliers.
    h = operator(Noisy(s1(500), 1e-2))
    deflated = spectra.spectral_density(h, steps=20, deflate=spectra.eigsh(h, 10, tol=0.05))
    assert deflated.floor < noisy.floor / 20
    clean = spectra.spectral_density(Rotated(s1(500)), steps=20, probes=4)
    assert clean.noise < 1e-12
    assert clean.notes == ()
    assert np.isnan(spectra.spectral_density(Rotated(s1(500)), steps=1).noise)


# --- text, failures, wrong arguments ----------------------------------------------------------


def test_the_text_says_what_it_rests_on():
    matrix = Rotated(s1(100))
    text = str(
        spectra.spectral_density(matrix, steps=9, probes=2, deflate=spectra.eigsh(matrix, 3))
    )
    assert "n = 100 eigenvalues: 2 probes x 9 Lanczos steps, 18 matvecs" in text
    assert "3 deflated eigenvalues as exact atoms" in text
    # A number with the spread of the probes beside it.
    assert re.search(r"50% of the eigenvalues are below \S+ \(between \S+ and \S+\)", text)


def test_one_probe_has_no_band_and_says_so():
    density = spectra.spectral_density(Rotated(s1(100)), steps=9, probes=1)
    assert any("one probe gives no error estimate" in note for note in density.notes)
    with pytest.raises(ArgumentError, match="spread of at least 2 probes"):
        density.band(density.grid(10))
    with pytest.raises(ArgumentError, match="spread of at least 2 probes"):
        density.cdf_band(0.0)


def test_a_product_with_nan_is_named():
    with pytest.raises(NonFiniteError, match="matvec 12 returned 1 non-finite of 100 entries"):
        spectra.spectral_density(Poisoned(s1(100), at=12), steps=9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0; expected an integer >= 1"),
        ({"steps": -2}, "steps=-2; expected an integer >= 1"),
        ({"steps": 2.0}, "steps=2.0; expected an integer >= 1"),
        ({"steps": True}, "steps=True; expected an integer >= 1"),
        ({"probes": 0}, "probes=0; expected an integer >= 1"),
        ({"probes": 1.5}, "probes=1.5; expected an integer >= 1"),
        ({"seed": -1}, "seed=-1; expected an integer >= 0"),
        ({"seed": "a"}, "seed='a'; expected an integer >= 0"),
    ],
)
def test_wrong_arguments_are_refused_before_any_product(options, message):
    h = operator(np.eye(50))
    with pytest.raises(ArgumentError, match=message):
        spectra.spectral_density(h, **options)
    assert h.matvecs == 0


def test_eigenpairs_of_another_operator_are_refused():
    with pytest.raises(ArgumentError, match="length 49, the operator has n = 50"):
        spectra.spectral_density(np.eye(50), deflate=spectra.eigsh(np.eye(49), 1))


def test_a_quantile_lies_between_the_nodes_beside_its_own():
    # Most of the spectrum sits in one spike at zero, where a node stands for very many eigenvalues.
    spectrum = np.sort(np.concatenate([np.linspace(-1, 3, 100), np.linspace(-1e-6, 1e-6, 400)]))
    shares = [0.05, 0.3, 0.5, 0.9, 0.95]
    exact = spectrum[[int(share * 500) - 1 for share in shares]]
    held = []
    for seed in range(40):
        density = spectra.spectral_density(np.diag(spectrum), steps=12, probes=2, seed=seed)
        brackets = density.quantile_brackets(shares)
        held.append((brackets[:, 0] <= exact) & (exact <= brackets[:, 1]))
        own = density.quantiles(shares)
        assert (brackets[:, 0] <= own).all()
        assert (own <= brackets[:, 1]).all()
    # What is left is the randomness of the probes.
    assert np.mean(held) >= 0.95


def test_the_bracket_of_a_quantile_is_exact_where_all_eigenvalues_are_known():
    matrix = np.diag([1.0, 2.0, 3.0, 4.0])
    density = spectra.spectral_density(matrix, deflate=spectra.eigsh(matrix, 4))
    assert density.quantile_brackets([0.5]).tolist() == [[2.0, 2.0]]


# --- what a first user found ------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_quantiles_are_within_their_brackets_beside_atoms(seed):
    values = np.concatenate([np.linspace(0.2, 1, 10), np.linspace(-0.1, 0.19, 60)])
    matrix = dense(values, seed)
    density = spectra.spectral_density(matrix, steps=8, probes=3, deflate=spectra.eigsh(matrix, 10))
    shares = np.linspace(0, 1, 41)
    low, high = density.quantile_brackets(shares).T
    found = density.quantiles(shares)
    assert (low <= found).all()
    assert (found <= high).all()


def test_places_that_are_none_are_refused():
    density = spectra.spectral_density(dense(s1(50)), steps=5, probes=3)
    for ask in (density.cdf, density.cdf_band, lambda x: density.cdf_band(x, kind="rigorous")):
        with pytest.raises(ArgumentError, match="x holds nan"):
            ask(np.array([0.0, np.nan]))
    with pytest.raises(ArgumentError, match="ascending order"):
        density.histogram(np.array([3.0, 2.0, 1.0]))
