import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator, aslinearoperator, eigsh, lobpcg, minres
from torch import nn

from spectra import HessianOperator, as_operator
from spectra.errors import ArgumentError, ArgumentTypeError, NonFiniteError, NotSymmetricError
from spectra.objective.losses import supervised
from spectra.objective.vectors import VectorSpace
from spectra.operators.base import SymmetricOperator
from tests.cases import regressions
from tests.cases.networks import tanh_mlp, wine


@pytest.fixture(scope="module")
def hessians():
    """A network's Hessian with its dense matrix, in float64 and in float32."""
    torch.manual_seed(0)
    x, y = wine()
    model = tanh_mlp()
    loss = supervised(nn.CrossEntropyLoss())
    double = HessianOperator(model, loss, [(x, y)], graph="retained")
    matrix = double.to_dense().numpy()
    single = tanh_mlp(dtype=torch.float32)
    single.load_state_dict(model.state_dict())
    return {
        np.float64: (double, matrix),
        np.float32: (HessianOperator(single, loss, [(x.float(), y)], graph="retained"), matrix),
    }


@pytest.fixture
def hessian(hessians):
    return hessians[np.float64]


@pytest.fixture
def x(hessian):
    return np.random.default_rng(0).standard_normal(hessian[0].shape[0])


# --- SciPy's contract ----------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-10), (np.float32, 1e-4)])
def test_scipys_eigsh_takes_the_operator_as_it_is(hessians, dtype, tolerance):
    operator, matrix = hessians[dtype]
    exact = np.linalg.eigvalsh(matrix)
    v0 = np.ones(len(exact), dtype=dtype)
    assert operator.dtype == dtype
    for which, expected in (("LA", exact[-4:]), ("SA", exact[:4])):
        values, vectors = eigsh(operator, k=4, which=which, v0=v0)
        np.testing.assert_allclose(values, expected, atol=tolerance * exact[-1])
        assert vectors.dtype == dtype


def test_lobpcg_takes_the_operator_as_it_is(hessian):
    operator, matrix = hessian
    start = np.random.default_rng(0).standard_normal((len(matrix), 3))
    values, _ = lobpcg(operator, start, tol=1e-8, maxiter=200)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(matrix)[:-4:-1], rtol=1e-8)


def test_minres_takes_the_operator_as_it_is():
    case = regressions.linear()
    operator = HessianOperator(case.model, case.loss, case.data)
    b = np.random.default_rng(0).standard_normal(len(case.matrix))
    solution, info = minres(operator, b, rtol=1e-12)
    assert info == 0
    np.testing.assert_allclose(solution, np.linalg.solve(case.matrix, b), rtol=1e-7)


def test_arithmetic_of_linear_operators_works(hessian, x):
    operator, matrix = hessian
    identity = aslinearoperator(np.eye(len(x)))
    for combined, expected in (
        (2 * operator, 2 * matrix),
        (operator * 2, 2 * matrix),
        (-operator, -matrix),
        (operator + operator, 2 * matrix),
        (operator - 0.5 * identity, matrix - 0.5 * np.eye(len(x))),
        (operator @ operator, matrix @ matrix),
        (operator**3, matrix @ matrix @ matrix),
    ):
        assert isinstance(combined, LinearOperator)
        np.testing.assert_allclose(combined @ x, expected @ x, rtol=1e-10, atol=1e-10)


def test_the_operator_is_its_own_transpose_and_adjoint(hessian, x):
    operator, matrix = hessian
    assert operator.T is operator
    assert operator.H is operator
    assert operator.adjoint() is operator
    np.testing.assert_allclose(operator.rmatvec(x), matrix @ x, rtol=1e-10, atol=1e-12)
    both = np.stack([x, 2 * x], axis=1)
    np.testing.assert_allclose(operator.rmatmat(both), matrix @ both, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(x @ operator, matrix @ x, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose((2 * operator).T @ x, 2 * matrix @ x, rtol=1e-10, atol=1e-12)


def test_results_have_the_shape_and_kind_of_what_came(hessian, x):
    operator, matrix = hessian
    expected = matrix @ x
    for given_, shape in ((x, x.shape), (x[:, None], (len(x), 1))):
        for product in (operator @ given_, operator.matvec(given_), operator.dot(given_)):
            assert isinstance(product, np.ndarray)
            assert product.shape == shape
            np.testing.assert_allclose(product.ravel(), expected, rtol=1e-10, atol=1e-12)
    columns = np.stack([x, -x, 3 * x], axis=1)
    for product in (operator @ columns, operator.matmat(columns)):
        np.testing.assert_allclose(product, matrix @ columns, rtol=1e-10, atol=1e-12)
    assert (operator @ columns[:, :0]).shape == (len(x), 0)
    tensor = torch.from_numpy(columns)
    for product in (operator @ tensor, operator.apply(tensor)):
        assert isinstance(product, torch.Tensor)
        np.testing.assert_allclose(product, matrix @ columns, rtol=1e-10, atol=1e-12)
    assert (operator @ tensor[:, 0]).shape == (len(x),)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.astype(np.float64),
        lambda x: x.astype(np.float32),
        lambda x: x.astype(np.float16),
        lambda x: (10 * x).astype(np.int64),
        lambda x: (10 * x).astype(np.int8),
        lambda x: x.astype(np.longdouble),
        lambda x: x.astype(">f8"),
        lambda x: np.repeat(x, 2)[::2],
        lambda x: x[::-1],
        lambda x: np.broadcast_to(np.float64(1.5), x.shape),
        list,
    ],
)
def test_any_real_array_is_taken(hessians, dtype, change, x):
    operator, matrix = hessians[dtype]
    vector = change(x)
    before = np.array(vector, copy=True)
    product = operator.matvec(vector)
    assert product.dtype == dtype
    tolerance = 1e-10 if dtype == np.float64 else 1e-4
    expected = matrix @ np.asarray(vector, dtype=np.float64)
    np.testing.assert_allclose(product, expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(vector, before)


def test_read_only_and_transposed_arrays_are_taken(hessian, x):
    operator, matrix = hessian
    frozen = x.copy()
    frozen.flags.writeable = False
    np.testing.assert_allclose(operator @ frozen, matrix @ x, rtol=1e-10, atol=1e-12)
    wide = np.stack([x, 2 * x])
    np.testing.assert_allclose(operator @ wide.T, matrix @ wide.T, rtol=1e-10, atol=1e-12)
    strided = torch.from_numpy(wide).T
    torch.testing.assert_close(operator @ strided, torch.from_numpy(matrix @ wide.T))


def test_products_share_no_memory_with_what_came():
    eye = as_operator(np.eye(3))
    for vector in (np.ones(3), torch.ones(3, dtype=torch.float64)):
        product = eye @ vector
        product[0] = 7.0
        assert vector[0] == 1


# --- bad vectors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "kind", "match"),
    [
        (lambda h: h.matvec(np.ones(73)), ArgumentError, r"shape \(74,\), got \(73,\)"),
        (lambda h: h @ np.ones((74, 1, 1)), ValueError, "expected"),
        (lambda h: h.matvec(np.ones((1, 74))), ArgumentError, r"got \(1, 74\)"),
        (lambda h: h @ np.ones(73), ValueError, "73"),
        (lambda h: h.matmat(np.ones((73, 2))), ArgumentError, r"shape \(74, k\), got \(73, 2\)"),
        (lambda h: h.matmat(np.ones(74)), ArgumentError, r"shape \(74, k\), got \(74,\)"),
        (lambda h: h @ (1j * np.ones(74)), ArgumentTypeError, "real numbers.*complex128"),
        (lambda h: h @ np.array(["a"] * 74), ArgumentTypeError, "real numbers.*dtype <U1"),
        (lambda h: h @ np.array([None] * 74), ArgumentTypeError, "real numbers.*object"),
        (lambda h: h @ torch.ones(73), ArgumentError, r"shape \(74,\) or columns.*got \(73,\)"),
        (lambda h: h @ torch.ones(1, 74), ArgumentError, r"got \(1, 74\)"),
        (lambda h: h @ torch.ones(74, 2, 2), ArgumentError, r"got \(74, 2, 2\)"),
        (lambda h: h @ torch.tensor(1.0), ArgumentError, r"got \(\)"),
        (
            lambda h: h @ torch.ones(74),
            ArgumentTypeError,
            r"expected torch\.float64, got .*32.*to\(",
        ),
        (lambda h: h @ torch.ones(74).long(), ArgumentTypeError, r"got torch\.int64"),
        (lambda h: h @ (1j * torch.ones(74)), ArgumentTypeError, r"got torch\.complex64"),
        (
            lambda h: h @ torch.ones(74, dtype=torch.float64, device="meta"),
            ArgumentError,
            "operator is on cpu, the vector on meta; move it",
        ),
        (lambda h: h.apply(np.ones(74)), ArgumentTypeError, "got a ndarray; use H @ x"),
        (lambda h: h.apply([1.0] * 74), ArgumentTypeError, "got a list"),
        (lambda h: h @ np.full(74, np.nan), NonFiniteError, "the vector to multiply holds nan"),
        (
            lambda h: h @ torch.full((74,), torch.inf, dtype=torch.float64),
            NonFiniteError,
            "the vector to multiply holds nan or inf",
        ),
    ],
)
def test_vectors_that_do_not_fit_are_refused(hessian, call, kind, match):
    with pytest.raises(kind, match=match):
        call(hessian[0])


# --- matvecs, dense matrices ---------------------------------------------------------------------


def test_every_column_counts_as_a_matvec():
    operator = as_operator(np.eye(5))
    assert operator.matvecs == 0
    operator @ np.ones(5)
    operator @ np.ones((5, 3))
    operator @ torch.ones(5, 2, dtype=torch.float64)
    operator.to_dense()
    assert operator.matvecs == 1 + 3 + 2 + 5


def test_to_dense_shows_an_asymmetry_as_it_is():
    skewed = LinearOperator((2, 2), matvec=lambda x: np.array([x[1], 0.0]), dtype=float)
    assert as_operator(skewed).to_dense().tolist() == [[0, 1], [0, 0]]


class Diagonal(SymmetricOperator):
    """1, 2, …, n, and how many vectors came at a time."""

    def __init__(self, n):
        super().__init__(VectorSpace(n, torch.float32))
        self.diagonal = torch.arange(1.0, n + 1)
        self.seen = []

    def _products(self, rows):
        self.seen.append(len(rows))
        return rows * self.diagonal


def test_to_dense_works_in_chunks():
    operator = Diagonal(5000)
    assert torch.equal(operator.to_dense().diagonal(), operator.diagonal)
    assert len(operator.seen) > 1
    assert sum(operator.seen) == 5000


def test_an_operator_without_products_is_unfinished():
    with pytest.raises(NotImplementedError):
        SymmetricOperator(VectorSpace(2)) @ np.ones(2)


def test_a_product_that_is_not_finite_is_counted_and_explained():
    infinite = LinearOperator((3, 3), matvec=lambda x: x * np.inf, dtype=float)
    match = r"matvec 1 returned 3 non-finite of 3 entries; the _CustomLinearOperator given to"
    with pytest.raises(NonFiniteError, match=match):
        as_operator(infinite) @ np.ones(3)


# --- as_operator ---------------------------------------------------------------------------------

SYMMETRIC = np.array([[2.0, -1.0, 0.0], [-1.0, 3.0, 0.5], [0.0, 0.5, -1.0]])


@pytest.mark.parametrize(
    "make",
    [
        np.asarray,
        lambda a: a.astype(np.float32),
        np.asfortranarray,
        np.matrix,
        torch.from_numpy,
        lambda a: torch.from_numpy(a).float(),
        lambda a: torch.from_numpy(a).bfloat16(),
        lambda a: torch.from_numpy(a).requires_grad_(),
        scipy.sparse.csr_array,
        scipy.sparse.csc_matrix,
        scipy.sparse.coo_array,
        scipy.sparse.dia_array,
        scipy.sparse.lil_matrix,
        scipy.sparse.dok_array,
        scipy.sparse.bsr_array,
        lambda a: scipy.sparse.csr_array(a.astype(np.float32)),
        aslinearoperator,
        lambda a: LinearOperator((3, 3), matvec=lambda x: a @ x, dtype=np.float64),
        lambda a: LinearOperator((3, 3), matvec=lambda x: (a @ x).reshape(-1, 1), dtype=None),
        as_operator,
    ],
)
@pytest.mark.filterwarnings("ignore:the matrix subclass")
def test_whatever_is_symmetric_becomes_an_operator(make):
    operator = as_operator(make(SYMMETRIC))
    x = np.array([1.0, 2.0, -4.0])
    np.testing.assert_allclose(operator @ x, SYMMETRIC @ x, rtol=1e-6)
    assert operator.to_dense().tolist() == SYMMETRIC.tolist()
    assert as_operator(operator) is operator


@pytest.mark.parametrize(
    ("matrix", "dtype"),
    [
        (np.eye(2, dtype=np.float32), np.float32),
        (np.eye(2, dtype=np.float16), np.float64),
        (np.eye(2, dtype=int), np.float64),
        (np.eye(2, dtype=bool), np.float64),
        (torch.eye(2), np.float32),
        (torch.eye(2).half(), np.float64),
        (torch.eye(2, dtype=torch.int32), np.float64),
        (scipy.sparse.csr_array(np.eye(2, dtype=np.float32)), np.float32),
        (scipy.sparse.csr_array(np.eye(2, dtype=np.int8)), np.float64),
        (scipy.sparse.csr_array(np.eye(2, dtype=bool)), np.float64),
        (aslinearoperator(np.eye(2, dtype=np.float32)), np.float32),
    ],
)
def test_float32_stays_and_all_else_becomes_float64(matrix, dtype):
    operator = as_operator(matrix)
    assert operator.dtype == dtype
    product = operator @ np.array([1.0, 2.0])
    assert product.dtype == dtype
    assert product.tolist() == [1, 2]


def test_a_numpy_matrix_is_copied():
    matrix = SYMMETRIC.copy()
    operator = as_operator(matrix)
    matrix[:] = 0
    assert operator.to_dense().tolist() == SYMMETRIC.tolist()


def test_eigenvectors_go_back_as_the_kind_of_array_that_came():
    tensor = torch.ones(3)
    assert isinstance(as_operator(SYMMETRIC).native(tensor), np.ndarray)
    assert isinstance(as_operator(scipy.sparse.csr_array(SYMMETRIC)).native(tensor), np.ndarray)
    assert isinstance(as_operator(torch.from_numpy(SYMMETRIC)).native(tensor), torch.Tensor)


@pytest.mark.parametrize(
    ("matrix", "kind", "match"),
    [
        (np.ones((2, 3)), ArgumentError, r"square matrix, got shape \(2, 3\)"),
        (np.ones(4), ArgumentError, r"square matrix, got shape \(4,\)"),
        (np.ones((0, 0)), ArgumentError, r"got shape \(0, 0\)"),
        (torch.ones(2, 2, 2), ArgumentError, r"got shape \(2, 2, 2\)"),
        (scipy.sparse.csr_array(np.eye(2, 3)), ArgumentError, r"got shape \(2, 3\)"),
        (
            LinearOperator((2, 3), matvec=lambda x: x[:2], dtype=float),
            ArgumentError,
            r"got shape \(2, 3\)",
        ),
        (np.eye(2) * 1j, ArgumentTypeError, "dtype complex128; spectra takes real symmetric"),
        (torch.eye(2) * 1j, ArgumentTypeError, r"complex \(torch\.complex64\)"),
        (aslinearoperator(np.eye(2) * 1j), ArgumentTypeError, "dtype complex128"),
        (np.array([["a", "b"], ["b", "a"]]), ArgumentTypeError, "dtype <U1"),
        (np.array([[None] * 2] * 2), ArgumentTypeError, "dtype object"),
        (torch.eye(2).to_sparse(), ArgumentTypeError, r"torch\.sparse_coo; pass a SciPy sparse"),
        ([[1.0, 0.0], [0.0, 1.0]], ArgumentTypeError, "got a list"),
        (nn.Linear(2, 2), ArgumentTypeError, "got a Linear"),
        (None, ArgumentTypeError, "expected an operator, a matrix .* got a NoneType"),
        (np.array([[1.0, np.nan], [np.nan, 1.0]]), NonFiniteError, "matrix holds nan or inf"),
        (torch.full((2, 2), torch.inf), NonFiniteError, "matrix holds nan or inf"),
        (scipy.sparse.csr_array([[np.nan, 0], [0, 1]]), NonFiniteError, "sparse matrix holds nan"),
        (scipy.sparse.csr_array([[-np.inf, 0], [0, 1]]), NonFiniteError, "sparse matrix holds nan"),
        (np.array([[0.0, 1.0], [2.0, 0.0]]), NotSymmetricError, r"\|A - A\^T\| reaches 1 .* 2\."),
        (torch.triu(torch.ones(3, 3)), NotSymmetricError, "not symmetric"),
        (scipy.sparse.csr_array([[0.0, 1.0], [0.0, 0.0]]), NotSymmetricError, "not symmetric"),
        (scipy.sparse.csr_array([[0, 3], [5, 0]], dtype=np.uint8), NotSymmetricError, "reaches 2 "),
    ],
)
def test_what_is_no_real_symmetric_matrix_is_refused(matrix, kind, match):
    with pytest.raises(kind, match=match):
        as_operator(matrix)


@given(st.floats(1e-30, 1e30), st.sampled_from([np.float32, np.float64]))
@settings(max_examples=30)
def test_symmetry_is_judged_relative_to_the_matrix(scale, dtype):
    rng = np.random.default_rng(0)
    half = rng.standard_normal((6, 6))
    exact = (half + half.T) * scale
    rounded = (exact * (1 + np.finfo(dtype).eps * rng.uniform(-4, 4, (6, 6)))).astype(dtype)
    assert as_operator(rounded).dtype == dtype
    skewed = (exact + 1e-3 * scale * np.triu(np.ones((6, 6)), 1)).astype(dtype)
    with pytest.raises(NotSymmetricError):
        as_operator(skewed)


def test_the_zero_matrix_is_symmetric():
    for zero in (np.zeros((3, 3)), scipy.sparse.csr_array((3, 3)), torch.zeros(3, 3)):
        assert not (as_operator(zero) @ np.ones(3)).any()


def test_a_plain_matrix_says_what_it_is():
    operator = as_operator(np.eye(3))
    assert operator.describe() == {
        "operator": "MatrixOperator",
        "n": 3,
        "dtype": "float64",
        "device": "cpu",
    }
    assert repr(operator) == "<3 x 3 MatrixOperator, float64, cpu>"
