"""Norms: a lower bound that grows, an upper bound that holds, and samples of the square."""

import numpy as np
import pytest
import torch

import spectra
from spectra.errors import ArgumentError, NonFiniteError
from tests.cases.matrices import (
    Noisy,
    Poisoned,
    Rotated,
    dense,
    operator,
    rank_one,
    s1,
    s2,
    s3,
    s4,
    semicircle,
    tanh_network,
)

# +100 and −99.9 among small ones: the Rayleigh quotient of power iteration oscillates here.
NEARLY_PAIRED = np.concatenate([[100.0, -99.9], np.linspace(-1, 1, 100)])


# --- spectral norm ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [s1(300), -s1(300), s2(300), s4(300), semicircle(300), NEARLY_PAIRED],
    ids=["s1", "minus s1", "s2", "s4", "semicircle", "nearly paired"],
)
def test_the_norm_lies_between_the_bounds(values):
    h = operator(Rotated(values))
    truth = np.abs(values).max()
    below = above = 0
    # The slow one takes more than a hundred products a run.
    seeds = range(60 if truth == np.abs(semicircle(300)).max() else 200)
    for seed in seeds:
        estimate = spectra.norm(h, seed=seed)
        low, high = estimate.interval(0.99)
        assert low <= estimate.value <= high
        below += low <= truth
        above += truth <= high
        # ‖H²x − ρ²x‖ <= tol ρ² puts ρ within tol of some |eigenvalue|.
        assert np.abs(np.abs(values) / estimate.value - 1).min() < 1e-3
        assert estimate.converged
    assert below == len(seeds)
    assert above >= 0.97 * len(seeds)


def test_the_upper_bound_comes_down_as_products_are_spent():
    h = operator(Rotated(semicircle(300)))
    bounds = [spectra.norm(h, max_matvecs=m, rtol=1e-9).bounds[1] for m in (5, 20, 80, 320)]
    assert (np.diff(bounds) < 0).all()
    assert bounds[-1] < 1.02 * 2


@pytest.mark.parametrize("values", [s1(200), s4(200), semicircle(200), NEARLY_PAIRED])
def test_the_estimate_grows_with_every_product_and_stays_below_the_norm(values):
    h = operator(Rotated(values))
    estimates = [spectra.norm(h, max_matvecs=m, rtol=1e-12).value for m in range(2, 40)]
    assert (np.diff(estimates) >= -1e-12 * max(estimates)).all()
    assert max(estimates) <= np.abs(values).max() * (1 + 1e-12)


@pytest.mark.parametrize("values", [[3.0, -3.0], [5.0, -5.0, 1.0, 0.0]])
def test_a_pair_of_both_signs_is_found_and_named(values):
    for seed in range(20):
        estimate = spectra.norm(dense(values), seed=seed)
        assert estimate.value == pytest.approx(values[0], rel=1e-3)
        assert estimate.converged
    estimate = spectra.norm(dense(values))
    assert "both signs" in estimate.method
    assert any("eigenvalues near both +" in note for note in estimate.notes)


def test_nearly_opposite_eigenvalues_do_not_defeat_it():
    h = operator(Rotated(NEARLY_PAIRED))
    for seed in range(20):
        estimate = spectra.norm(h, seed=seed)
        assert estimate.converged
        assert 99.8 <= estimate.value <= 100 + 1e-9
        assert estimate.matvecs <= 10


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("max_matvecs", [2, 3, 5, 300])
def test_the_sign_of_the_dominant_eigenvalue_is_told_also_when_the_budget_ends(sign, max_matvecs):
    values = sign * np.linspace(1, 2, 60)
    estimate = spectra.norm(Rotated(values), max_matvecs=max_matvecs)
    word = "positive" if sign > 0 else "negative"
    assert f"dominant eigenvalue {word}" in estimate.method
    assert not estimate.notes or "both" not in estimate.notes[0]


def test_an_unfinished_mixture_of_signs_is_not_called_a_pair():
    # Neither +2 nor −2 is an eigenvalue that the iterate has come near to.
    values = np.linspace(-1.9, 2, 60)
    for seed in range(10):
        estimate = spectra.norm(Rotated(values), max_matvecs=4, seed=seed)
        assert not estimate.converged
        assert "both signs" not in estimate.method
        assert not any("near both" in note for note in estimate.notes)


def test_slow_convergence_is_said():
    h = operator(Rotated(semicircle(1000)))
    estimate = spectra.norm(h, max_matvecs=20)
    assert h.matvecs == estimate.matvecs == 20
    assert not estimate.converged
    assert estimate.value < 2 < estimate.bounds[1]
    assert any("after 20 products, 0.001 was asked for" in note for note in estimate.notes)
    assert "tolerance not reached" in str(estimate)


@pytest.mark.parametrize("n", [1, 2, 50])
def test_the_zero_matrix_has_norm_zero(n):
    estimate = spectra.norm(np.zeros((n, n)))
    assert estimate.value == 0.0
    assert estimate.interval() == (0.0, 0.0)
    assert estimate.converged
    assert estimate.matvecs == 1


@pytest.mark.parametrize("value", [4.0, -4.0])
def test_one_by_one_is_its_absolute_value(value):
    estimate = spectra.norm(np.array([[value]]))
    assert estimate.value == 4.0
    assert estimate.interval() == pytest.approx((4, 4))
    assert estimate.converged


def test_a_multiple_of_the_identity_and_rank_one_are_right():
    assert spectra.norm(-2.5 * np.eye(30)).value == pytest.approx(2.5)
    assert spectra.norm(rank_one(30, -3.0)).value == pytest.approx(3)


def test_the_norm_of_a_networks_hessian_lies_between_the_bounds():
    h, reference = tanh_network()
    estimate = spectra.norm(h)
    assert estimate.bounds[0] <= np.linalg.norm(reference, 2) <= estimate.bounds[1]
    single, _ = tanh_network(torch.float32)
    assert spectra.norm(single).value == pytest.approx(estimate.value, rel=1e-3)


@pytest.mark.parametrize("factor", [1e-20, 1e-3, 1e15])
@pytest.mark.parametrize("ord", [2, "fro"])
def test_scaling_the_matrix_scales_the_norm(factor, ord):
    plain = spectra.norm(dense(s1(60)), ord, max_matvecs=10)
    scaled = spectra.norm(factor * dense(s1(60)), ord, max_matvecs=10)
    assert scaled.value == pytest.approx(factor * plain.value)
    assert scaled.interval() == pytest.approx(tuple(factor * end for end in plain.interval()))
    assert scaled.matvecs == plain.matvecs


@pytest.mark.parametrize("ord", [2, "fro"])
def test_the_same_seed_gives_the_same_norm_to_the_last_bit(ord):
    h = operator(Rotated(s1(100)))
    state = torch.get_rng_state()
    first, second = (spectra.norm(h, ord, max_matvecs=9, seed=2) for _ in range(2))
    assert first.value == second.value
    assert first.interval() == second.interval()
    assert torch.equal(state, torch.get_rng_state())
    assert spectra.norm(h, ord, max_matvecs=9, seed=3).value != first.value


# --- spectral norm by Lanczos -----------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [s1(300), -s1(300), s2(300), s4(300), semicircle(300), NEARLY_PAIRED],
    ids=["s1", "minus s1", "s2", "s4", "semicircle", "nearly paired"],
)
def test_lanczos_puts_the_norm_between_close_bounds(values):
    h = operator(Rotated(values))
    truth = np.abs(values).max()
    above = 0
    for seed in range(100):
        estimate = spectra.norm(h, method="lanczos", rtol=0.02, seed=seed)
        low, high = estimate.bounds
        assert estimate.converged
        assert low <= estimate.value <= high <= 1.021 * estimate.value
        assert estimate.value <= truth * (1 + 1e-12)
        above += truth <= high
    assert above >= 97


def test_lanczos_takes_far_fewer_products_than_power_iteration():
    h = operator(Rotated(semicircle(1000)))
    lanczos = spectra.norm(h, method="lanczos")
    before = h.matvecs
    power = spectra.norm(h)
    assert power.matvecs == h.matvecs - before
    assert lanczos.matvecs < power.matvecs / 2
    # And its bounds are closer.
    assert np.ptp(lanczos.bounds) < np.ptp(power.bounds) / 10


def test_the_bounds_of_lanczos_close_in_and_say_so_when_the_budget_ends():
    h = operator(Rotated(semicircle(300)))
    estimates = [
        spectra.norm(h, method="lanczos", max_matvecs=m, rtol=1e-9) for m in (2, 10, 30, 90)
    ]
    assert (np.diff([e.value for e in estimates]) >= -1e-12).all()
    assert (np.diff([e.bounds[1] for e in estimates]) <= 1e-12).all()
    assert not estimates[0].converged
    assert any("after 2 products, 1e-09 was asked for" in note for note in estimates[0].notes)


@pytest.mark.parametrize("n", [1, 2, 50])
@pytest.mark.parametrize("value", [0.0, -2.5])
def test_one_lanczos_step_knows_a_multiple_of_the_identity(n, value):
    estimate = spectra.norm(value * np.eye(n), method="lanczos")
    assert estimate.value == pytest.approx(abs(value))
    assert estimate.interval() == pytest.approx((abs(value), abs(value)))
    assert estimate.converged
    assert estimate.matvecs == 1


def test_lanczos_tells_the_noise_of_the_products():
    estimate = spectra.norm(Noisy(s1(300), 1e-2), method="lanczos")
    assert any("differ from those of one symmetric matrix" in note for note in estimate.notes)
    assert estimate.value == pytest.approx(100, rel=0.02)


# --- nuclear and Schatten norms ---------------------------------------------------------------

SUMS = [("nuc", None), ("schatten", 1.5), ("schatten", 3), ("schatten", 4)]


def schatten(values, p):
    return (np.abs(values) ** (p or 1)).sum() ** (1 / (p or 1))


@pytest.mark.parametrize(("ord", "p"), SUMS)
@pytest.mark.parametrize("make", [s1, s4, semicircle], ids=lambda make: make.__name__)
def test_the_bounds_of_a_schatten_norm_cover(make, ord, p):
    values = make(400)
    h = operator(Rotated(values))
    pairs = None if make is semicircle else spectra.eigsh(h, 20, which="LM")
    truth, covered = schatten(values, p), 0
    for seed in range(20):
        estimate = spectra.norm(h, ord, p=p, deflate=pairs, seed=seed)
        low, high = estimate.interval()
        assert low <= estimate.value <= high
        assert estimate.value == pytest.approx(truth, rel=0.1)
        if estimate.converged:
            assert (high - low) / 2 <= 0.05 * estimate.value
        covered += low <= truth <= high
    assert covered >= 18


def test_the_nuclear_norm_of_a_saddle_is_not_its_trace():
    values = s4(1000)
    h = operator(Rotated(values))
    pairs = spectra.eigsh(h, 20, which="LM")
    before = h.matvecs
    estimate = spectra.norm(h, "nuc", deflate=pairs)
    assert estimate.value == pytest.approx(np.abs(values).sum(), rel=0.02)
    assert estimate.matvecs == h.matvecs - before == 100
    assert "nuclear norm = " in str(estimate)


def test_even_powers_take_few_steps_and_have_no_error_of_quadrature():
    values = s1(500)
    h = operator(Rotated(values))
    pairs = spectra.eigsh(h, 10)
    estimate = spectra.norm(h, "schatten", p=4, deflate=pairs)
    assert estimate.matvecs == 15
    assert "exact to that power" in estimate.method
    assert estimate.value == pytest.approx(schatten(values, 4), rel=1e-4)
    # Schatten-2 is the Frobenius norm.
    two = spectra.norm(h, "schatten", p=2, deflate=pairs)
    assert two.value == pytest.approx(np.linalg.norm(values), rel=1e-3)


def test_probes_are_added_until_the_tolerance_or_the_budget():
    h = operator(Rotated(semicircle(400)))
    loose = spectra.norm(h, "nuc", rtol=0.2)
    tight = spectra.norm(h, "nuc", rtol=0.05)
    assert loose.matvecs == 100 < tight.matvecs <= 300
    assert tight.converged
    spent = spectra.norm(h, "nuc", rtol=1e-4, max_matvecs=130)
    assert spent.matvecs == 120
    assert not spent.converged
    assert any("after 120 products" in note for note in spent.notes)


@pytest.mark.parametrize("n", [1, 2])
def test_the_smallest_schatten_norms_are_exact(n):
    values = np.array([-3.0, 0.5])[:n]
    for ord, p in SUMS:
        assert spectra.norm(dense(values), ord, p=p).value == pytest.approx(schatten(values, p))
    assert spectra.norm(np.zeros((n, n)), "nuc").value == 0.0


@pytest.mark.parametrize("factor", [1e-20, 1e15])
def test_scaling_the_matrix_scales_schatten_norms(factor):
    for ord, p in SUMS:
        plain = spectra.norm(dense(s1(60)), ord, p=p)
        scaled = spectra.norm(factor * dense(s1(60)), ord, p=p)
        assert scaled.value == pytest.approx(factor * plain.value)
        assert scaled.interval() == pytest.approx(tuple(factor * end for end in plain.interval()))


# --- Frobenius norm ---------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 32])
def test_small_matrices_have_an_exact_frobenius_norm(n):
    values = np.linspace(-2, 3, n)
    estimate = spectra.norm(dense(values), "fro")
    assert estimate.exact
    assert estimate.matvecs == n
    assert estimate.value == pytest.approx(np.linalg.norm(values))


@pytest.mark.parametrize(
    ("make", "deflated", "probes", "least"),
    [(s1, 0, 30, 0.86), (s4, 0, 30, 0.86), (s3, 0, 30, 0.9), (s1, 10, 10, 0.9), (s2, 10, 10, 0.9)],
)
def test_the_frobenius_interval_covers(make, deflated, probes, least):
    values = make(500)
    h = operator(Rotated(values))
    pairs = spectra.eigsh(h, deflated) if deflated else None
    covered = 0
    for seed in range(200):
        low, high = spectra.norm(
            h, "fro", rtol=1e-9, deflate=pairs, max_matvecs=probes, seed=seed
        ).interval()
        covered += low <= np.linalg.norm(values) <= high
    assert covered >= least * 200


def test_the_mean_square_over_many_runs_is_that_of_the_matrix():
    values = s3(200)
    h = operator(Rotated(values))
    squares = np.concatenate(
        [
            spectra.norm(h, "fro", rtol=1e-9, max_matvecs=10, seed=seed).samples
            for seed in range(200)
        ]
    )
    error = squares.std() / len(squares) ** 0.5
    assert abs(squares.mean() - (values**2).sum()) < 3 * error


def test_the_frobenius_norm_stops_at_its_tolerance():
    h = operator(Rotated(s3(800)))
    for seed in range(10):
        estimate = spectra.norm(h, "fro", rtol=0.05, seed=seed)
        low, high = estimate.interval()
        assert estimate.converged
        # The tolerance is on the square to first order.
        assert (high - low) / 2 <= 0.06 * estimate.value
    tight = spectra.norm(h, "fro", rtol=0.001, max_matvecs=20)
    assert not tight.converged
    assert "tolerance not reached" in str(tight)


def test_deflation_leaves_little_of_the_frobenius_norm_to_chance():
    values = s1(1000)
    h = operator(Rotated(values))
    estimate = spectra.norm(h, "fro", deflate=spectra.eigsh(h, 10))
    assert estimate.value == pytest.approx(np.linalg.norm(values), rel=1e-3)
    assert estimate.matvecs == 8
    assert estimate.standard_error < 0.02
    assert "10 deflated" in estimate.method


def test_deflating_everything_gives_the_frobenius_norm_for_nothing():
    h = operator(dense(s3(40)))
    pairs = spectra.eigsh(h, 40)
    before = h.matvecs
    estimate = spectra.norm(h, "fro", deflate=pairs)
    assert estimate.exact
    assert h.matvecs == before
    assert estimate.value == pytest.approx(np.linalg.norm(s3(40)))


@pytest.mark.parametrize("n", [3, 50])
def test_the_zero_matrix_has_frobenius_norm_zero(n):
    estimate = spectra.norm(np.zeros((n, n)), "fro")
    assert estimate.value == 0.0
    assert estimate.converged


# --- failures and wrong arguments -------------------------------------------------------------


@pytest.mark.parametrize("ord", [2, "fro"])
def test_a_product_with_nan_is_named(ord):
    with pytest.raises(NonFiniteError, match="matvec 3 returned 1 non-finite of 100 entries"):
        spectra.norm(Poisoned(s1(100), at=3), ord)


@pytest.mark.parametrize(
    ("ord", "options", "message"),
    [
        (1, {}, r"ord=1; expected 2 \(spectral norm\), 'fro'"),
        ("nuc", {"p": 3}, "p=3 for ord='nuc'; ord='schatten' takes a number p >= 1"),
        ("schatten", {}, "p=None for ord='schatten'; ord='schatten' takes a number p >= 1"),
        ("schatten", {"p": 0.5}, "p=0.5 for ord='schatten'; ord='schatten' takes a number"),
        ("schatten", {"p": float("inf")}, "p=inf for ord='schatten'"),
        ("nuc", {"max_matvecs": 30}, "max_matvecs=30; two probes of 20 steps take 40 products"),
        ("nuc", {"steps": 0}, "steps=0; expected an integer >= 1"),
        ("nuc", {"confidence": 2}, "confidence=2; expected a probability between 0 and 1"),
        ("nuc", {"rtol": 0}, "rtol=0; expected a positive relative tolerance"),
        ("nuc", {"method": "lanczos"}, "method='lanczos' is for ord=2 only"),
        (2, {"method": "arnoldi"}, "method='arnoldi'; expected 'power' or 'lanczos'"),
        (2, {"steps": 3}, "steps=3 for ord=2; only 'nuc' and 'schatten' have steps"),
        (2, {"method": "lanczos", "max_matvecs": 1}, "max_matvecs=1; Lanczos needs at least 2"),
        (None, {}, r"ord=None; expected 2"),
        (2, {"rtol": 0}, "rtol=0; expected a positive relative tolerance"),
        (2, {"rtol": -1}, "rtol=-1; expected a positive relative tolerance"),
        ("fro", {"rtol": 0}, "rtol=0; expected a positive relative tolerance"),
        ("fro", {"rtol": float("nan")}, "rtol=nan; expected a positive relative tolerance"),
        ("fro", {"confidence": 2}, "confidence=2; expected a probability between 0 and 1"),
        ("fro", {"max_matvecs": 1}, "max_matvecs=1; an error estimate needs at least 2"),
        (2, {"max_matvecs": 1}, "max_matvecs=1; power iteration needs at least 2 products"),
        (2, {"seed": -1}, "seed=-1; expected an integer >= 0"),
        ("fro", {"seed": 0.5}, "seed=0.5; expected an integer >= 0"),
    ],
)
def test_wrong_arguments_are_refused_before_any_product(ord, options, message):
    h = operator(np.eye(50))
    with pytest.raises(ArgumentError, match=message):
        spectra.norm(h, ord, **options)
    assert h.matvecs == 0


def test_deflating_the_spectral_norm_is_refused():
    with pytest.raises(ArgumentError, match="deflate is for the other norms"):
        spectra.norm(np.eye(50), 2, deflate=spectra.eigsh(np.eye(50), 1))


def test_eigenpairs_of_another_operator_are_refused():
    with pytest.raises(ArgumentError, match="length 49, the operator has n = 50"):
        spectra.norm(np.eye(50), "fro", deflate=spectra.eigsh(np.eye(49), 1))
