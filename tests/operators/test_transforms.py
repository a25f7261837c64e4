"""Transforms, sums and multiples of operators, beside the same of dense matrices."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from torch import nn

import spectra
from spectra import HessianOperator, as_operator
from spectra.errors import ArgumentError, ArgumentTypeError, CheckpointError, NonFiniteError
from spectra.operators.base import SumOperator, SymmetricOperator
from tests.cases.networks import tanh_mlp, wine

LOSS = spectra.losses.supervised(nn.CrossEntropyLoss())
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def symmetric(n, seed=0):
    root = random(n, n, seed=seed)
    return (root + root.T) / 2


def basis_of(n, k, seed=1):
    return torch.linalg.qr(random(n, k, seed=seed))[0]


@pytest.fixture(scope="module")
def hessian():
    torch.manual_seed(0)
    x, y = wine()
    return HessianOperator(tanh_mlp(), LOSS, [(x[:50], y[:50]), (x[50:], y[50:])])


@pytest.fixture(scope="module")
def dense(hessian):
    return hessian.to_dense()


def all_of(H, A):
    """Every transform of an operator by name, with what it is as a matrix."""
    n = len(A)
    positive, X = random(n).abs() + 0.5, basis_of(n, 3)
    P = torch.eye(n).double() - X @ X.T
    root = positive.sqrt()
    return {
        "shifted": (spectra.shifted(H, 0.3), A + 0.3 * torch.eye(n).double()),
        "shifted by a diagonal": (spectra.shifted(H, positive), A + positive.diag()),
        "deflated": (spectra.deflated(H, X), P @ A @ P),
        "projected": (spectra.projected(H, X), X.T @ A @ X),
        "preconditioned": (spectra.preconditioned(H, positive), A / torch.outer(root, root)),
        "difference": (H - spectra.deflated(H, X), A - P @ A @ P),
        "multiple": (-2.5 * H, -2.5 * A),
    }


NAMES = list(all_of(as_operator(symmetric(6)), symmetric(6)))


@pytest.mark.parametrize("name", NAMES)
def test_transforms_are_those_of_the_matrix(hessian, dense, name):
    operator, expected = all_of(hessian, dense)[name]
    torch.testing.assert_close(operator.to_dense(), expected, **EXACT)
    x = random(operator.space.n, 2)
    torch.testing.assert_close(operator @ x, expected @ x, **EXACT)
    np.testing.assert_allclose(operator @ x[:, 0].numpy(), (expected @ x[:, 0]).numpy(), **EXACT)


@pytest.mark.parametrize("name", NAMES)
def test_every_question_is_answered_of_every_transform(hessian, dense, name):
    operator, matrix = all_of(hessian, dense)[name]
    exact, n = np.linalg.eigvalsh(matrix.numpy())[::-1], len(matrix)
    k = min(2, n)
    size = np.abs(exact).max()

    pairs = spectra.eigsh(operator, k, which="LA", tol=1e-8)
    np.testing.assert_allclose(pairs.values, exact[:k], atol=1e-8 * size)
    assert isinstance(pairs.vectors, torch.Tensor)
    trace = spectra.trace(operator)
    assert trace.interval()[0] - 1e-9 * size <= exact.sum() <= trace.interval()[1] + 1e-9 * size
    assert spectra.norm(operator).value == pytest.approx(size, rel=1e-2)
    density = spectra.spectral_density(operator, steps=min(5, n), probes=2)
    assert density.support[1] <= exact[0] + 1e-9 * size
    b = random(n)
    solution = spectra.solve(spectra.shifted(operator, 2 * float(size)), b, rtol=1e-8)
    expected = torch.linalg.solve(matrix + 2 * float(size) * torch.eye(n).double(), b)
    torch.testing.assert_close(solution.x, expected, rtol=1e-6, atol=1e-6 * float(expected.norm()))
    analysis = spectra.analyze(operator, k)
    low, high = analysis.trace.interval()
    assert low - 1e-9 * size <= exact.sum() <= high + 1e-9 * size
    assert analysis.value is None
    # Layers stay layers, except in the coordinates of a basis.
    assert bool(analysis.module_traces("layer")) == (name != "projected")


def test_the_traces_of_layers_are_those_of_the_transform(hessian, dense):
    positive = random(len(dense)).abs() + 0.5
    analysis = spectra.analyze(spectra.preconditioned(hessian, positive), k=2)
    for name, estimate in analysis.module_traces("module").items():
        places = hessian.space.modules()[name]
        exact = sum(float((dense.diagonal() / positive)[place].sum()) for place in places)
        assert estimate.value == pytest.approx(exact, rel=1e-9)


def test_eigenvectors_of_the_preconditioned_map_back_to_those_of_the_inverse_times_h(
    hessian, dense
):
    positive = random(len(dense)).abs() + 0.5
    operator = spectra.preconditioned(hessian, positive)
    pairs = spectra.eigsh(operator, k=2, tol=1e-10)
    x = operator.to_original(pairs.vectors)
    expected = x * torch.from_numpy(pairs.values)
    torch.testing.assert_close(dense @ x / positive[:, None], expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(operator.to_original(pairs.vectors[:, 0]), x[:, 0])


def test_coordinates_of_a_basis_map_back_to_its_vectors(hessian):
    # Orthonormal columns are their own coordinates, whatever signs a QR decomposition gives.
    X = basis_of(hessian.space.n, 3) * torch.tensor([1.0, -1.0, 1.0])
    operator = spectra.projected(hessian, X)
    y = random(3, 2)
    torch.testing.assert_close(operator.to_original(y), X @ y, **EXACT)
    torch.testing.assert_close(operator.to_original(y[:, 0]), X @ y[:, 0], **EXACT)


def test_a_basis_is_made_orthonormal_one_column_after_the_other(hessian, dense):
    B = random(hessian.space.n, 3) * torch.tensor([1.0, 1e-6, 1e6])
    operator = spectra.projected(hessian, B)
    Q, R = torch.linalg.qr(B)
    Q = Q * R.diagonal().sign()
    torch.testing.assert_close(operator.to_dense(), Q.T @ dense @ Q, rtol=1e-8, atol=1e-8)


def test_deflated_by_its_own_eigenpairs_the_others_are_left(hessian, dense):
    pairs = spectra.eigsh(hessian, k=3, which="LA", tol=1e-10)
    values = np.linalg.eigvalsh(spectra.deflated(hessian, pairs).to_dense().numpy())[::-1]
    exact = np.linalg.eigvalsh(dense.numpy())[::-1]
    expected = np.sort([*exact[3:], 0.0, 0.0, 0.0])[::-1]
    np.testing.assert_allclose(values, expected, atol=1e-8)
    on_the_span = spectra.projected(hessian, pairs).to_dense().numpy()
    np.testing.assert_allclose(on_the_span, np.diag(exact[:3]), atol=1e-8)


def test_tensors_by_name_are_a_diagonal(hessian, dense):
    parts = {
        n: torch.full(p.shape, float(i + 1))
        for i, (n, p) in enumerate(hessian.objective.model.named_parameters())
    }
    flat = hessian.space.flatten(parts)
    for found, expected in (
        (spectra.shifted(hessian, parts), dense + flat.diag()),
        (spectra.preconditioned(hessian, parts), dense / torch.outer(flat.sqrt(), flat.sqrt())),
    ):
        torch.testing.assert_close(found.to_dense(), expected, **EXACT)


def test_numpy_matrices_have_numpy_eigenvectors_whatever_is_done_to_them():
    A = symmetric(8).numpy()
    P = np.arange(1.0, 9.0)
    basis = basis_of(8, 4).numpy()
    for made in (
        spectra.shifted(A, 1),
        spectra.shifted(csr_array(A), P),
        spectra.preconditioned(A, P),
        spectra.deflated(aslinearoperator(A), basis),
        spectra.projected(A, basis),
        2 * as_operator(A) - spectra.shifted(A, 1),
    ):
        assert isinstance(spectra.eigsh(made, k=1).vectors, np.ndarray)
    scaled = spectra.preconditioned(A, P)
    y = np.ones(8)
    np.testing.assert_allclose(scaled.to_original(y), P**-0.5)
    np.testing.assert_allclose(spectra.projected(A, basis).to_original(np.eye(4)), basis)


def test_products_and_memory_are_those_of_the_operator_beneath(hessian):
    before = hessian.matvecs
    n = hessian.space.n
    x = random(n, 3)
    for made in (spectra.shifted(hessian, 1.0), spectra.deflated(hessian, basis_of(n, 2))):
        made @ x
        assert made.matvecs == 3
    assert hessian.matvecs == before + 6
    given = x.clone()
    (-hessian) @ given
    assert torch.equal(given, x)


def test_the_operator_follows_the_weights_of_the_model():
    torch.manual_seed(0)
    x, y = wine()
    model = tanh_mlp()
    H = HessianOperator(model, LOSS, [(x, y)])
    made = spectra.projected(H, basis_of(H.space.n, 2))
    before = made.to_dense()
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    B = basis_of(H.space.n, 2)
    torch.testing.assert_close(made.to_dense(), B.T @ H.to_dense() @ B, **EXACT)
    assert float((made.to_dense() - before).abs().max()) > 1e-3


# --- sums ----------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(a=st.floats(-1e3, 1e3), b=st.floats(-1e3, 1e3), n=st.integers(1, 6), seed=st.integers(0, 99))
def test_combinations_are_linear_and_symmetric(a, b, n, seed):
    A, B = symmetric(n, seed), symmetric(n, seed + 100)
    H, G = as_operator(A), as_operator(B)
    for made, expected in (
        (a * H + b * G, a * A + b * B),
        (H * a - G / 2.0, a * A - B / 2),
        (-(H - G) + a * (G - b * H), -(A - B) + a * (B - b * A)),
        (spectra.shifted(a * H, b), a * A + b * torch.eye(n).double()),
    ):
        assert isinstance(made, SymmetricOperator)
        matrix = made.to_dense()
        scale = float(1 + expected.abs().max()) * (1 + abs(a)) * (1 + abs(b))
        torch.testing.assert_close(matrix, expected, rtol=0, atol=1e-14 * scale)
        torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-14 * scale)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 6), seed=st.integers(0, 99))
def test_an_operator_less_itself_is_zero_and_preconditioned_by_ones_itself(n, seed):
    H = as_operator(symmetric(n, seed))
    assert not (H - H).to_dense().any()
    assert torch.equal(spectra.preconditioned(H, torch.ones(n)).to_dense(), H.to_dense())
    x, y = random(n, seed=seed), random(n, seed=seed + 1)
    for made in (
        spectra.preconditioned(H, random(n).abs() + 0.1),
        spectra.deflated(H, basis_of(n, max(1, n // 2))),
        spectra.deflated(H, torch.zeros(n, 0).double()),
        spectra.shifted(H, y),
    ):
        assert float(x @ (made @ y)) == pytest.approx(float(y @ (made @ x)), rel=1e-9, abs=1e-12)


def test_a_hessian_less_another_keeps_layers_and_says_what_it_is(hessian, dense):
    other = HessianOperator(
        hessian.objective.model, spectra.losses.regularised(LOSS, spectra.losses.weight_decay(0.5)),
        [wine()],
    )  # fmt: skip
    difference = other - hessian
    torch.testing.assert_close(difference.to_dense(), 0.5 * torch.eye(len(dense)).double(), **EXACT)
    assert difference.space.names == hessian.space.names
    described = difference.describe()
    assert [term["coefficient"] for term in described["terms"]] == [1.0, -1.0]
    assert described["terms"][1]["loss"] == "supervised(CrossEntropyLoss())"
    flat = 2 * (other - hessian) - other
    assert [coefficient for coefficient, _ in flat.terms] == [2.0, -2.0, -1.0]


def test_sums_with_scipys_own_are_scipys(hessian, dense):
    own = aslinearoperator(np.eye(len(dense)))
    for made in (hessian + own, hessian - own, own + hessian, hessian * own):
        assert isinstance(made, LinearOperator)
        assert not isinstance(made, SumOperator)
    x = np.ones(len(dense))
    np.testing.assert_allclose((hessian - own) @ x, dense.numpy() @ x - x, **EXACT)
    np.testing.assert_allclose(hessian * x, dense.numpy() @ x, **EXACT)


def test_a_plain_matrix_may_be_added_to_a_hessian(hessian, dense):
    made = as_operator(np.eye(len(dense))) + hessian
    torch.testing.assert_close(made.to_dense(), dense + torch.eye(len(dense)).double(), **EXACT)
    assert made.space is hessian.space
    assert isinstance(spectra.eigsh(made, k=1).vectors, torch.Tensor)


# --- identities and descriptions -----------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_was_recorded_is_taken_up_again(hessian, dense, name, tmp_path):
    first = spectra.eigsh(all_of(hessian, dense)[name][0], k=1, checkpoint=tmp_path / "run")
    operator = all_of(hessian, dense)[name][0]
    again = spectra.eigsh(operator, k=1, checkpoint=tmp_path / "run")
    assert (again.values == first.values).all()
    assert operator.matvecs == first.matvecs


def test_a_run_of_another_transform_is_not_taken_up(hessian, dense, tmp_path):
    X, P = basis_of(len(dense), 3), torch.ones(len(dense))
    for i, (old, new) in enumerate(
        (
            (spectra.shifted(hessian, 0.3), spectra.shifted(hessian, 0.4)),
            (spectra.deflated(hessian, X), spectra.deflated(hessian, X[:, :2])),
            (spectra.projected(hessian, X), spectra.projected(hessian, X.flip(1))),
            (spectra.preconditioned(hessian, P), spectra.preconditioned(hessian, 2 * P)),
            (2.0 * hessian, 3.0 * hessian),
            (hessian + hessian, hessian - hessian),
            (spectra.shifted(hessian, 0.3), hessian),
        )
    ):
        spectra.eigsh(old, k=1, checkpoint=tmp_path / f"{i}")
        with pytest.raises(CheckpointError, match="differs"):
            spectra.eigsh(new, k=1, checkpoint=tmp_path / f"{i}")


def test_a_description_has_the_hessian_and_what_was_done_to_it(hessian):
    made = spectra.shifted(spectra.preconditioned(hessian, torch.ones(hessian.space.n)), 0.5)
    described = made.describe()
    assert described["operator"] == "ShiftedOperator"
    assert described["of"] == "PreconditionedOperator"
    assert described["transforms"] == ["preconditioned by a diagonal", "shifted by 0.5"]
    assert described["loss"] == "supervised(CrossEntropyLoss())"


def test_errors_of_the_products_are_those_of_the_operator_beneath():
    H = HessianOperator.from_function(lambda x: x.sqrt().sum(), torch.zeros(2).double())
    for made in (spectra.shifted(H, 1.0), -H, spectra.preconditioned(H, torch.ones(2))):
        with pytest.raises(NonFiniteError, match=r"gradient of|singular"):
            made @ torch.ones(2).double()


def test_single_precision_keeps_its_digits():
    n = 1_000_000
    H = as_operator(aslinearoperator(csr_array((n, n), dtype=np.float32)))
    assert H.space.dtype == torch.float32
    X = torch.linalg.qr(torch.randn(n, 2, generator=torch.Generator().manual_seed(0)).double())[0]
    made = spectra.projected(spectra.shifted(H, 3.0), X.float())
    error = (made.to_dense() - 3 * torch.eye(2)).abs().max() / 3
    # How many partial sums a processor's kernel keeps of a block decides its last digits: 1 to 9
    # epsilons were seen. Whole vectors summed in single precision are off by 70 to 600.
    assert float(error) < 16 * torch.finfo(torch.float32).eps


def test_eigenvectors_in_scaled_coordinates_are_not_taken_for_others(hessian):
    P = torch.linspace(0.5, 2, hessian.space.n, dtype=torch.float64)
    scaled = spectra.preconditioned(hessian, P)
    pairs = spectra.eigsh(scaled, 2, progress=False)
    for take in (
        spectra.deflated,
        spectra.landscape,
        lambda H, pairs: spectra.trace(H, deflate=pairs, progress=False),
    ):
        with pytest.raises(ArgumentError, match=r"by a diagonal, whose.*to_original"):
            take(hessian, pairs)
    own = spectra.eigsh(hessian, 2, progress=False)
    with pytest.raises(ArgumentError, match="those of an operator as it is, whose"):
        spectra.deflated(scaled, own)
    left = np.linalg.eigvalsh(spectra.deflated(scaled, pairs).to_dense())
    assert np.abs(left).max() < np.abs(pairs.values).min() + 1e-9
    spectra.landscape(hessian, scaled.to_original(pairs.vectors))
    with pytest.raises(ArgumentTypeError, match=r"entry 'state' of kind dict.*not its state_dict"):
        spectra.preconditioned(hessian, torch.optim.Adam([torch.ones(1)]).state_dict())


# --- refused -------------------------------------------------------------------------------------


def test_wrong_diagonals_are_refused(hessian):
    n = hessian.space.n
    good = torch.ones(n)
    for P, kind, words in (
        (torch.ones(n + 1), ArgumentError, "has shape"),
        (torch.ones(n, 1), ArgumentError, "has shape"),
        (torch.ones(n, dtype=torch.complex64), ArgumentTypeError, "complex64"),
        (np.ones(n, dtype=complex), ArgumentTypeError, "complex128"),
        (-good, ArgumentError, "entries down to -1"),
        (good.index_fill(0, torch.tensor([3]), 0.0), ArgumentError, "entries down to 0"),
        (good * float("nan"), NonFiniteError, "nan"),
        ("Adam", ArgumentTypeError, "a str"),
        ({"0.weight": torch.ones(5, 6)}, ArgumentError, "check '0.bias'"),
    ):
        with pytest.raises(kind, match=words):
            spectra.preconditioned(hessian, P)
    for s, kind, words in (
        (float("inf"), NonFiniteError, "shift is inf"),
        (None, ArgumentTypeError, "a NoneType"),
        (True, ArgumentTypeError, "a bool"),
        (torch.ones(3), ArgumentError, "has shape"),
    ):
        with pytest.raises(kind, match=words):
            spectra.shifted(hessian, s)
    with pytest.raises(ArgumentTypeError, match="no parameters"):
        spectra.shifted(np.eye(2), {"a": torch.ones(2)})


def test_wrong_bases_are_refused(hessian):
    n = hessian.space.n
    X = basis_of(n, 2)
    for make in (spectra.deflated, spectra.projected):
        for basis, kind, words in (
            (X[:-1], ArgumentError, "expected columns"),
            (X[:, 0], ArgumentError, "expected columns"),
            (random(n, n + 1), ArgumentError, "k <= "),
            (X.float(), ArgumentTypeError, "the basis is of torch.float32"),
            (X * float("nan"), NonFiniteError, "nan"),
            ([1.0], ArgumentTypeError, "a list"),
        ):
            with pytest.raises(kind, match=words):
                make(hessian, basis)
    with pytest.raises(ArgumentError, match="Gram matrix is off by 1"):
        spectra.deflated(hessian, torch.cat([X, X], dim=1)[:, [0, 2]])
    with pytest.raises(ArgumentError, match="column 2 of the basis"):
        spectra.projected(hessian, torch.cat([X, X[:, :1] + X[:, 1:]], dim=1))
    with pytest.raises(ArgumentError, match="column 0 of the basis"):
        spectra.projected(hessian, torch.zeros(n, 1).double())
    with pytest.raises(ArgumentError, match="no columns"):
        spectra.projected(hessian, X[:, :0])


def test_operators_that_do_not_fit_are_not_added(hessian):
    model = hessian.objective.model
    n = hessian.space.n
    with pytest.raises(ArgumentError, match=f"n = {n} and n = 3 cannot be added"):
        hessian + as_operator(np.eye(3))
    with pytest.raises(ArgumentTypeError, match=r"float64 and of torch\.float32"):
        hessian - as_operator(torch.eye(n))
    biases = [HessianOperator(model, LOSS, [wine()], name) for name in ("2.bias", "0.bias")]
    same = HessianOperator.from_function(lambda x: (x**2).sum(), torch.ones(4).double())
    with pytest.raises(ArgumentError, match="of other parameters"):
        same - biases[0]
    with pytest.raises(ArgumentError, match="multiplied by nan"):
        float("nan") * hessian
