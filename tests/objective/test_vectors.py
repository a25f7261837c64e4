import numpy as np
import pytest
import torch

from spectra.objective.vectors import VectorSpace

LONG = 5_000_000


@pytest.fixture(scope="module")
def long():
    """Two float32 vectors of five million entries, and the same in float64."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, LONG, generator=generator)
    return x, x + 0.5 * y


def test_norms_of_long_float32_vectors_are_accumulated_in_float64(long):
    x, _ = long
    exact = float(torch.linalg.vector_norm(x.double()))
    assert VectorSpace(LONG, torch.float32).norm(x) == pytest.approx(exact, rel=1e-12)


def test_inner_products_of_long_float32_vectors_keep_float32_accuracy(long):
    x, y = long
    exact = float(torch.dot(x.double(), y.double()))
    assert VectorSpace(LONG, torch.float32).inner(x, y) == pytest.approx(exact, rel=2e-7)


def test_projections_of_long_float32_vectors_keep_float32_accuracy(long):
    basis = torch.stack(long)
    space = VectorSpace(LONG, torch.float32)
    products = space.project(basis, long[0])
    assert products.dtype == torch.float64
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(products, basis.double() @ long[0].double(), rtol=4 * eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 100, (1 << 14) + 1, 50_000])
def test_basis_operations_are_those_of_the_matrix(dtype, n, generator):
    space = VectorSpace(n, dtype)
    basis = torch.randn(4, n, generator=generator).to(dtype)
    x = torch.randn(n, generator=generator).to(dtype)
    coefficients = torch.randn(4, generator=generator, dtype=torch.float64)
    rows, vector, c = basis.double().numpy(), x.double().clone().numpy(), coefficients.numpy()
    tolerance = {"rtol": 100 * space.eps, "atol": 100 * space.eps * np.sqrt(n)}

    np.testing.assert_allclose(space.project(basis, x).numpy(), rows @ vector, **tolerance)
    np.testing.assert_allclose(space.combine(basis, coefficients).numpy(), c @ rows, **tolerance)
    assert space.combine(basis, coefficients).dtype == dtype
    space.subtract(x, basis, coefficients)
    np.testing.assert_allclose(x.numpy(), vector - c @ rows, **tolerance)


# The last basis does not fit into one tile.
@pytest.mark.parametrize(("m", "n"), [(1, 1), (5, 1000), (300, 40_001)])
def test_rotate_replaces_the_first_rows_by_their_rotation(m, n, generator):
    basis = torch.randn(m, n, generator=generator, dtype=torch.float64)
    rotation = torch.randn(m, (m + 1) // 2, generator=generator, dtype=torch.float64)
    expected = rotation.T @ basis
    untouched = basis[len(expected) :].clone()
    VectorSpace(n).rotate(basis, rotation)
    torch.testing.assert_close(basis[: len(expected)], expected)
    assert torch.equal(basis[len(expected) :], untouched)


def test_vectors_have_the_dtype_of_the_space():
    space = VectorSpace(3, torch.float32)
    assert space.zeros().shape == (3,)
    assert space.zeros(2).tolist() == [[0.0] * 3] * 2
    assert space.empty(2).shape == (2, 3)
    assert {space.zeros().dtype, space.empty(1).dtype} == {torch.float32}
    assert space.eps == np.finfo(np.float32).eps
    assert VectorSpace(3).eps == np.finfo(np.float64).eps


def test_half_of_the_free_memory_is_affordable():
    small, large = VectorSpace(1000, torch.float32), VectorSpace(2000, torch.float64)
    assert small.affordable() > 0
    # Memory comes and goes between the two calls.
    assert small.affordable() == pytest.approx(4 * large.affordable(), rel=0.2)
    assert VectorSpace(1 << 60, torch.float64).affordable() == 0
