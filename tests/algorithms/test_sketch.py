"""The parts of H that are computed: their numbers, and that the rest is sampled without bias."""

import math

import numpy as np
import pytest
import torch

import spectra
from spectra.algorithms.lanczos import Krylov
from spectra.algorithms.moments import Moments, Nothing, Samples, Stop
from spectra.algorithms.probes import Run, seeded, sphere
from spectra.algorithms.progress import progress_bar
from spectra.algorithms.sketch import KrylovPart, _Range, _Sketch
from tests.cases.matrices import dense, operator, s1, s3


def a_run(matrix, seed=0, max_matvecs=300):
    stop = Stop("trace", 0.01, None, 0.95, max_matvecs)
    with progress_bar("trace", max_matvecs, False) as bar:
        return Run(operator(matrix), stop, seed, bar)


def test_as_many_probes_as_are_foreseen_meet_the_tolerance_and_hardly_fewer():
    def alike(count):
        traces, squares, variances = (np.full(count, value) for value in (10.0, 1.0, 4.0))
        return Moments(traces, squares, exact=False, matvecs=count, variances=variances)

    stop = Stop("trace", 0.01, None, 0.95, 5000)
    needed = 5 + stop.probes_to_come(alike(5))
    assert stop.met(alike(math.ceil(needed)))
    assert not stop.met(alike(int(0.995 * needed)))


def krylov_part(h):
    krylov = Krylov(h, 7, seeded(3))
    for _ in range(7):
        krylov.step()
    q, core = krylov.basis.numpy(), krylov.projection[:7, :7]
    return KrylovPart(h.space, krylov), q.T @ core @ q


def range_part(h):
    part = _Range(a_run(h), 7)
    assert part.grow(4)
    assert part.grow(3)
    q, matrix = part.rows.numpy(), h.to_dense().numpy()
    outside = np.eye(h.space.n) - q.T @ q
    return part, matrix - outside @ matrix @ outside


@pytest.mark.parametrize("make", [krylov_part, range_part])
def test_a_known_part_has_the_trace_and_the_norm_of_its_matrix(make):
    part, matrix = make(operator(dense(s3(40))))
    assert part.trace == pytest.approx(np.trace(matrix))
    assert part.square == pytest.approx((matrix**2).sum())


@pytest.mark.parametrize("make", [krylov_part, range_part])
def test_what_is_left_is_orthogonal_to_the_known_part(make):
    matrix = dense(s3(40))
    _, known = make(operator(matrix))
    assert ((matrix - known) * known).sum() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("make", [krylov_part, range_part])
def test_a_product_is_left_with_what_is_not_known(make):
    matrix = dense(s3(40))
    h = operator(matrix)
    part, known = make(h)
    # In the complement, where Hutch++ draws its probes.
    z = 33**0.5 * sphere(h.space, seeded(1), part.rows if make is range_part else None)
    product = h.apply(z)
    part.take_from(z[None], product[None])
    assert product.numpy() == pytest.approx((matrix - known) @ z.numpy(), abs=1e-10)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("matrix", [dense(s3(40)), np.diag([3.0, 2.0, 2.0, *[0.0] * 37])])
def test_what_a_basis_has_grown_by_is_all_that_is_left_to_take(matrix, steps):
    # The second matrix exhausts its Krylov space, and goes on in random directions.
    h = operator(matrix)
    krylov, known = Krylov(h, 12, seeded(3)), 0
    vectors = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 40)))
    products = h.apply(vectors.T).T.clone()
    while not krylov.full:
        for _ in range(steps):
            krylov.step()
        part, known = KrylovPart(h.space, krylov, known), krylov.size
        part.take_from(vectors, products)
        whole, expected = KrylovPart(h.space, krylov), h.apply(vectors.T).T.clone()
        whole.take_from(vectors, expected)
        assert products.numpy() == pytest.approx(expected.numpy(), abs=1e-10)
        assert (part.trace, part.square) == (whole.trace, whole.square)


@pytest.mark.parametrize("make", [krylov_part, range_part, None])
def test_samples_of_the_rest_have_its_mean_and_the_variance_that_they_tell(make):
    values = s1(60)
    h = operator(dense(values))
    part = Nothing() if make is None else make(h)[0]
    samples = Samples(h.space)
    generator = seeded(2)
    inside = part.rows if make is range_part else None
    for _ in range(3000):
        z = (60 if inside is None else 53) ** 0.5 * sphere(h.space, generator, inside)
        samples.add(part, z, h.apply(z))
    moments = samples.moments(3000, 0.0)
    for estimates, truth in (
        (moments.traces, values.sum()),
        (moments.squares, (values**2).sum()),
        (moments.variances, moments.traces.var()),
    ):
        error = estimates.std() / 3000**0.5
        assert (
            abs(estimates.mean() - truth)
            < 3 * error + 0.12 * (estimates is moments.variances) * truth
        )


def test_xtrace_is_the_mean_of_what_leaving_out_each_vector_gives():
    matrix = dense(s3(50))
    sketch = _Sketch(a_run(matrix), 6)
    generator = seeded(0)
    for _ in range(6):
        assert sketch.grow()
    omega = np.stack(
        [50**0.5 * sphere(operator(matrix).space, generator).numpy() for _ in range(6)]
    )
    naive = []
    for i, vector in enumerate(omega):
        others = np.delete(omega, i, axis=0)
        q = np.linalg.qr((others @ matrix).T)[0]
        left = vector - q @ (q.T @ vector)
        left *= (45 / (left @ left)) ** 0.5
        naive.append(np.trace(q.T @ matrix @ q) + left @ matrix @ left)
    moments = sketch.moments()
    assert moments.traces == pytest.approx(np.array(naive), rel=1e-10)
    assert moments.squares == pytest.approx(((omega @ matrix) ** 2).sum(axis=1))
    assert moments.matvecs == 12


def test_probes_that_are_kept_while_the_basis_grows_are_those_of_the_larger_basis():
    matrix = dense(s1(90))
    part = _Range(a_run(matrix), 9)
    for _ in range(3):
        assert part.grow(3)
        part.probe(2)
    q = part.rows.numpy()
    assert q @ q.T == pytest.approx(np.eye(9), abs=1e-13)
    outside = np.eye(90) - q.T @ q
    for vector, product in part._probes:
        z = vector.numpy()
        assert q @ z == pytest.approx(np.zeros(9), abs=1e-12)
        assert product.numpy() == pytest.approx(outside @ matrix @ z, abs=1e-10)
    rest = outside @ matrix @ outside
    z = part._probes[0][0].numpy()
    expected = np.trace(matrix) - np.trace(rest) + 81 * (z @ rest @ z) / (z @ z)
    assert part.samples().moments(0, 0.0).traces[0] == pytest.approx(expected)


def test_hutch_pp_projects_the_probes_it_has_instead_of_drawing_new_ones():
    h = operator(dense(s1(90)))
    estimate = spectra.trace(h, method="hutch++", rtol=1e-9, max_matvecs=60)
    assert h.matvecs == 60
    assert estimate.method == "Hutch++, 20 sketch vectors"
    assert len(estimate.samples) == 20
