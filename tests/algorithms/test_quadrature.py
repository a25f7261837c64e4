"""Rules from a tridiagonal matrix: their moments, and the sides on which they err."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import spectra
from spectra.algorithms import quadrature
from spectra.algorithms.counting import brackets
from spectra.algorithms.density import probe_generator
from spectra.algorithms.probes import sphere
from tests.cases.matrices import dense, operator

SPECTRA = st.lists(st.floats(-3, 3), min_size=6, max_size=40)


def measured(values, steps, seed=0):
    """A density of one probe of diag(values), and the probe's true weights."""
    h = operator(np.diag(values))
    density = spectra.spectral_density(h, steps=steps, probes=1, seed=seed)
    start = sphere(h.space, probe_generator(seed, 0)).numpy()
    return density, start**2


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("prescribed", [-1.5, 0.123, 2.0])
def test_a_rule_with_a_prescribed_node_is_exact_to_degree_two_m(steps, prescribed):
    values = np.linspace(-1, 1.2, 40)
    density, masses = measured(values, steps)
    nodes, weights = quadrature.gauss_radau(*density.coefficients(0), prescribed)
    assert np.abs(nodes - prescribed).min() < 1e-12
    for power in range(2 * steps + 2):
        error = abs(weights @ nodes**power - masses @ values**power)
        assert (error < 1e-10) == (power <= 2 * steps)


def test_the_gauss_rule_from_coefficients_is_that_of_the_nodes():
    density = spectra.spectral_density(dense(np.linspace(-1, 2, 50)), steps=12, probes=2)
    for i in range(2):
        nodes, weights = quadrature.gauss(*density.coefficients(i))
        assert nodes == pytest.approx(density.nodes[i], abs=1e-12)
        assert weights == pytest.approx(density.weights[i], abs=1e-12)


@settings(max_examples=60)
@given(values=SPECTRA, steps=st.integers(1, 8), seed=st.integers(0, 5))
@example(values=[0.0, 1.0, 2.0, 1.5, -1.0, -2.0], steps=6, seed=0)
@example(values=[0.0, 1.0, 2.0, 1.5, -1.0, -1.5], steps=6, seed=1)
def test_the_bracket_holds_the_measure_of_every_probe(values, steps, seed):
    values = np.sort(np.array(values))
    density, masses = measured(values, steps, seed)
    if (density.weights[0] > 0).sum() == len(values):
        # A run through the whole space knows all eigenvalues, not only what its probe has of them.
        masses = np.full(len(values), 1 / len(values))
    x = np.concatenate([values, np.linspace(-3.5, 3.5, 15), density.nodes[0]])
    scale = np.abs(values).max()
    # Rounding moves eigenvalues and places by about this much.
    nudge = 1e-9 * scale
    least, most = brackets(density, x)
    with_x = np.array([masses[values <= place - nudge].sum() for place in x])
    assert (least[0] <= np.array([masses[values <= p + nudge].sum() for p in x]) + 1e-8).all()
    assert (most[0] >= with_x - 1e-8).all()
    if density.ended(0):
        return
    # The cdf of the nodes is within it, too.
    cdf = density.cdf(x)
    off = np.abs(density.nodes[0][:, None] - x).min(axis=0) > nudge
    assert (least[0] <= cdf + 1e-8)[off].all()
    assert (cdf[off] <= most[0][off] + 1e-8).all()


def test_the_bracket_is_narrower_than_that_of_the_neighbouring_nodes():
    density, _ = measured(np.linspace(-1, 1, 200), 20)
    x = (density.nodes[0, 1:] + density.nodes[0, :-1]) / 2
    least, most = brackets(density, x)
    naive = density.weights[0, 1:] + density.weights[0, :-1]
    assert ((most - least)[0] < 0.75 * naive).all()


def test_nothing_is_left_of_minus_infinity_and_everything_left_of_infinity():
    density, _ = measured(np.linspace(-1, 1, 50), 9)
    least, most = brackets(density, np.array([-np.inf, np.inf]))
    assert least.tolist() == most.tolist() == [[0.0, 1.0]]


FUNCTIONS = {
    "log": (lambda x: np.log(x + 1), (-1, 1)),
    "inverse": (lambda x: 1 / (x + 1), (1, -1)),
    "exp": (np.exp, (1, 1)),
    "saturating": (lambda x: x / (x + 1), (-1, 1)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("steps", [1, 3, 6])
def test_gauss_and_radau_err_to_the_known_sides(name, steps):
    f, (even, odd) = FUNCTIONS[name]
    values = np.concatenate([np.linspace(-0.5, 1, 30), [4.0, 9.0]])
    for seed in range(5):
        density, masses = measured(values, steps, seed)
        truth = masses @ f(values)
        alphas, betas = density.coefficients(0)
        room = 1e-10 * np.abs(f(values)).max()
        for sign, (nodes, weights) in (
            (even, quadrature.gauss(alphas, betas)),
            (odd, quadrature.gauss_radau(alphas, betas, -0.6)),
            (-odd, quadrature.gauss_radau(alphas, betas, 9.5)),
        ):
            assert sign * (truth - weights @ f(nodes)) >= -room
