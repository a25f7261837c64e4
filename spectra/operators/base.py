"""What is an operator? Something symmetric that multiplies vectors: torch inside, SciPy outside.

Every algorithm sees only a `SymmetricOperator`: its shape, its vector space and its products. The
border between NumPy and torch is in this file and nowhere else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import scipy.sparse
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from spectra.errors import (
    ArgumentError,
    ArgumentTypeError,
    NonFiniteError,
    NotSymmetricError,
    SpectraError,
)
from spectra.journal import current
from spectra.objective.identity import digest
from spectra.objective.parameters import ParameterSpace
from spectra.objective.vectors import VectorSpace
from spectra.results import Result

__all__ = ["MatrixOperator", "SumOperator", "SymmetricOperator", "as_operator"]

R = TypeVar("R", bound=Result)

_NUMPY_DTYPES = {torch.float32: np.dtype(np.float32), torch.float64: np.dtype(np.float64)}


class SymmetricOperator(LinearOperator):
    """A real symmetric linear operator on a `VectorSpace`.

    Subclasses implement `_products`. NumPy arrays go in and come out through SciPy's contract
    (`H @ x`, `matvec`, `matmat`); torch tensors through `H @ v` or `apply`. Sums, differences and
    multiples (`H - G`, `2.0 * H`, `-H`) are such operators too; with a LinearOperator of SciPy's
    they are SciPy's.

    Attributes
    ----------
    shape
        (n, n).
    dtype
        NumPy dtype of the vectors, float32 or float64.
    space
        The vector space: torch dtype, device, inner product.
    matvecs
        Products computed so far; a block of k vectors counts k.
    """

    space: VectorSpace
    # Whether eigenvectors of this operator are handed back as NumPy arrays.
    _numpy = False

    def __init__(self, space: VectorSpace) -> None:
        self.space = space
        self.matvecs = 0
        super().__init__(_NUMPY_DTYPES[space.dtype], (space.n, space.n))

    def _products(self, rows: Tensor) -> Tensor:
        """The operator applied to each row of a (k, n) tensor, as rows."""
        raise NotImplementedError

    def _products_into(self, rows: Tensor, out: Tensor) -> Tensor:
        """The same, put into `out` (k, n)."""
        return out.copy_(self._products(rows))

    def _culprit(self) -> str:
        """Where a non-finite product comes from, as a clause; called only on failure."""
        return "the matrix or the vector is at fault"

    def describe(self) -> dict[str, Any]:
        """What the operator is, for the provenance of results."""
        return {
            "operator": type(self).__name__,
            "n": self.space.n,
            "dtype": str(self.space.dtype).removeprefix("torch."),
            "device": str(self.space.device),
        }

    def apply(self, vectors: Tensor) -> Tensor:
        """Products with torch tensors.

        Parameters
        ----------
        vectors
            One vector (n,) or k of them as columns (n, k), of the operator's dtype and on its
            device. Where parameters are spread over processes, this one's part of each.

        Returns
        -------
        Tensor
            Of the same shape. Costs k matvecs.

        Raises
        ------
        ArgumentError, ArgumentTypeError
            Wrong shape, dtype or device.
        NonFiniteError
            The vectors or the products hold nan or inf.
        """
        self._check_on_all(vectors)
        rows = vectors.unsqueeze(0) if vectors.dim() == 1 else vectors.T
        journal, rows = current(self), rows.contiguous()
        if journal is None:
            products = self._checked_products(rows)
        else:
            products = journal.product(rows, self._checked_products)
        return products[0] if vectors.dim() == 1 else products.T

    def apply_into(self, vector: Tensor, out: Tensor) -> None:
        """The product with one vector (n,), put into memory that is there already.

        New memory for a long vector takes longer to get than to fill. Whether the product is finite
        is left to the caller, who has to look at numbers made of it anyway.

        Parameters
        ----------
        out
            (n,), contiguous, and another one than `vector`.

        Raises
        ------
        ArgumentError, ArgumentTypeError
            As `apply` does.
        """
        if current(self) is not None:
            out.copy_(self.apply(vector))
            return
        self._check_on_all(vector)
        self._products_into(vector.unsqueeze(0), out.unsqueeze(0))
        self.matvecs += 1

    def refuse_non_finite(self, vector: Tensor) -> None:
        """Say where a product of `apply_into` is not finite, by computing it again.

        Raises
        ------
        NonFiniteError
        """
        self.matvecs -= 1
        self.apply(vector)
        msg = (
            f"matvec {self.matvecs} was not finite, and is when it is computed again: the products "
            f"are random, or the machine is at fault ({self._culprit()})"
        )
        raise NonFiniteError(msg)

    def undisturbed(self) -> contextlib.AbstractContextManager[None]:
        """Within it what the operator is made of is taken to stay as it is.

        It is looked at once before and once after, instead of at every product.

        Raises
        ------
        DataError
            At the end, where it has changed.
        """
        return contextlib.nullcontext()

    def collected(self, result: R) -> R | None:
        """A result whose vectors are whole, to be saved: on rank 0, and None on the others.

        Called on all ranks, where parameters are spread over them; elsewhere the result itself. On
        rank 0 the vectors then take n numbers each, in the host's memory.
        """
        if not self.space.spread:
            return result
        changed: dict[str, Any] = {}
        for field in dataclasses.fields(result):
            value = getattr(result, field.name)
            if isinstance(value, Result):
                changed[field.name] = self.collected(value)
            elif isinstance(value, Tensor):
                changed[field.name] = self.space.collected(value.T if value.dim() > 1 else value).T
        first = self.space.ranks is None or self.space.ranks.rank == 0
        return dataclasses.replace(result, **changed) if first else None

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to be resumed, as text by name.

        A SciPy LinearOperator can say nothing of its numbers.
        """
        return {"operator": type(self).__name__, "n": self.space.n, "dtype": str(self.space.dtype)}

    def to_dense(self, limit: int = 20_000) -> Tensor:
        """The full matrix (n, n), by n products: for verification of small cases only.

        The products stand in the columns as they came; the matrix is not made symmetric by force.

        Raises
        ------
        ArgumentError
            n is larger than `limit`.
        """
        n = self.space.n
        if n > limit:
            size = n * n * self.dtype.itemsize / 2**30
            msg = (
                f"the dense matrix is {n:,} x {n:,} ({size:,.1f} GiB), above limit={limit:,}; use "
                "eigsh, trace or spectral_density, which need no matrix, or a block of it"
            )
            raise ArgumentError(msg)
        columns = self.space.empty(n)
        chunk = max(1, min(n, (1 << 24) // max(n, 1)))
        for start in range(0, n, chunk):
            stop = min(start + chunk, n)
            units = torch.stack([self.space.unit(i) for i in range(start, stop)])
            columns[start:stop] = self._checked_products(units)
        return self.space.whole(columns).T

    # --- SciPy's contract --------------------------------------------------------------------

    def __matmul__(self, other: Any) -> Any:
        if isinstance(other, Tensor):
            return self.apply(other)
        return super().__matmul__(other)

    def __add__(self, other: Any) -> Any:
        if isinstance(other, SymmetricOperator):
            return SumOperator([(1.0, self), (1.0, other)])
        return super().__add__(other)

    def __sub__(self, other: Any) -> Any:
        if isinstance(other, SymmetricOperator):
            return SumOperator([(1.0, self), (-1.0, other)])
        return super().__sub__(other)

    def __neg__(self) -> SumOperator:
        return SumOperator([(-1.0, self)])

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, numbers.Real):
            return SumOperator([(float(other), self)])
        return super().__mul__(other)

    def __rmul__(self, other: Any) -> Any:
        if isinstance(other, numbers.Real):
            return SumOperator([(float(other), self)])
        return super().__rmul__(other)

    def __truediv__(self, other: Any) -> Any:
        if isinstance(other, numbers.Real):
            return SumOperator([(1.0 / float(other), self)])
        return super().__truediv__(other)

    def _repr_html_(self) -> str:
        """What a notebook shows: the table of `describe()`."""
        # By name: pages stand above operators.
        notebook = importlib.import_module("spectra.report.notebook")
        html: str = notebook.html_of_operator(self)
        return html

    def __repr__(self) -> str:
        n = self.space.n
        return f"<{n:,} x {n:,} {type(self).__name__}, {self.dtype}, {self.space.device}>"

    def matvec(self, x: Any) -> Any:
        """Product with one NumPy vector (n,) or column (n, 1), in the shape that came."""
        x = np.asarray(x)
        n = self.space.n
        if x.shape not in {(n,), (n, 1)}:
            msg = f"expected a vector of shape ({n},), got {x.shape}"
            raise ArgumentError(msg)
        return self._matvec(x).reshape(x.shape)

    def matmat(self, X: Any) -> Any:
        """Products with the columns of a NumPy array (n, k), as columns."""
        X = np.asarray(X)
        n = self.space.n
        if X.ndim != 2 or X.shape[0] != n:
            msg = f"expected an array of shape ({n}, k), got {X.shape}"
            raise ArgumentError(msg)
        return self._matmat(X)

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        return self._matmat(np.asarray(x).reshape(-1, 1)).reshape(-1)

    def _matmat(self, X: np.ndarray) -> np.ndarray:
        rows = self.space.own(self.from_numpy(X.T))
        products: np.ndarray = self.space.whole(self._checked_products(rows)).cpu().numpy().T
        return products

    def _adjoint(self) -> SymmetricOperator:
        return self

    def _transpose(self) -> SymmetricOperator:
        return self

    def from_numpy(self, array: Any) -> Tensor:
        """A NumPy array as a contiguous tensor of the operator's dtype, on its device."""
        array = np.asarray(array)
        if array.dtype.kind not in "fiu":
            msg = f"expected real numbers, got an array of dtype {array.dtype}"
            raise ArgumentTypeError(msg)
        array = np.ascontiguousarray(array, dtype=self.dtype)
        if not array.flags.writeable:
            array = array.copy()
        return torch.from_numpy(array).to(self.space.device)

    def native(self, tensor: Tensor) -> Any:
        """A tensor in the kind of array that the operator was made from."""
        return tensor.cpu().numpy() if self._numpy else tensor

    # --- checks ------------------------------------------------------------------------------

    def _check_on_all(self, vectors: Tensor) -> None:
        """As `_check_tensor`; what is wrong on one of several processes is told to the others."""
        try:
            self._check_tensor(vectors)
        except SpectraError as error:
            if self.space.ranks is not None:
                self.space.ranks.together("checking vectors", (), _raising(error), dict)
            raise

    def _check_tensor(self, vectors: Tensor) -> None:
        space = self.space
        if not isinstance(vectors, Tensor):
            msg = f"apply() takes torch tensors, got a {type(vectors).__name__}; use H @ x"
            raise ArgumentTypeError(msg)
        if vectors.dim() not in {1, 2} or vectors.shape[0] != space.length:
            spread = ""
            if space.spread:
                spread = f", this rank's part of n = {space.n} (H.space.own(whole) takes it)"
            msg = (
                f"expected a vector of shape ({space.length},) or columns of shape "
                f"({space.length}, k){spread}, got {tuple(vectors.shape)}"
            )
            raise ArgumentError(msg)
        if vectors.dtype != space.dtype:
            msg = f"expected {space.dtype}, got {vectors.dtype}; convert with v.to({space.dtype})"
            raise ArgumentTypeError(msg)
        if vectors.device != space.device:
            msg = f"the operator is on {space.device}, the vector on {vectors.device}; move it"
            raise ArgumentError(msg)

    def _checked_products(self, rows: Tensor) -> Tensor:
        products = self._products(rows)
        self.matvecs += len(rows)
        # One pass: a sum of numbers is finite only if all of them are, or so large that the sum
        # overflows, which the closer look clears.
        space = self.space
        if math.isfinite(space.summed(products.sum())):
            return products
        bad = space.summed((~torch.isfinite(products)).sum(dim=1))
        if bool(bad.any()):
            if bool(space.summed((~torch.isfinite(rows)).sum())):
                msg = "the vector to multiply holds nan or inf"
                raise NonFiniteError(msg)
            first = int(bad.nonzero()[0])
            msg = (
                f"matvec {self.matvecs - len(rows) + first + 1} returned {int(bad[first])} "
                f"non-finite of {self.space.n} entries; {self._culprit()}"
            )
            raise NonFiniteError(msg)
        return products


def _raising(error: BaseException) -> Callable[[], Any]:
    def compute() -> Any:
        raise error

    return compute


class MatrixOperator(SymmetricOperator):
    """A dense symmetric matrix as an operator."""

    def __init__(self, matrix: Tensor, *, numpy: bool = False) -> None:
        self.matrix = matrix
        self._numpy = numpy
        super().__init__(VectorSpace(len(matrix), matrix.dtype, matrix.device))

    def identity(self) -> dict[str, Any]:
        """With a digest of the matrix."""
        return {**super().identity(), "matrix digest": digest(self.matrix)}

    def _products(self, rows: Tensor) -> Tensor:
        # Symmetric, so that rows times the matrix are the products in rows.
        return rows @ self.matrix


class ForeignOperator(SymmetricOperator):
    """A LinearOperator or sparse matrix of SciPy's as an operator; symmetry is taken on trust."""

    _numpy = True

    def __init__(self, operator: Any) -> None:
        self.operator = operator
        single = operator.dtype == np.float32
        super().__init__(VectorSpace(operator.shape[0], torch.float32 if single else torch.float64))

    def identity(self) -> dict[str, Any]:
        """With a digest of a sparse matrix."""
        if isinstance(self.operator, LinearOperator):
            return {**super().identity(), "of": type(self.operator).__name__}
        entries = self.operator.tocoo()
        parts = [torch.from_numpy(np.asarray(a)) for a in (entries.row, entries.col, entries.data)]
        return {**super().identity(), "matrix digest": digest(*parts)}

    def _products(self, rows: Tensor) -> Tensor:
        if isinstance(self.operator, LinearOperator):
            # One vector at a time: SciPy's `@` hands (n, 1) columns to a matvec, which broadcasting
            # as in `diagonal * x` turns into an n x n matrix. `stack` copies what may be x itself.
            products = np.stack([self.operator.matvec(row) for row in rows.numpy()])
        else:
            products = (self.operator @ rows.numpy().T).T
        return torch.from_numpy(np.ascontiguousarray(products, dtype=self.dtype))

    def _culprit(self) -> str:
        return f"the {type(self.operator).__name__} given to spectra returned it"


class SumOperator(SymmetricOperator):
    """A linear combination of operators: what `H - G` and `2.0 * H` are.

    A product costs one of each term. A sum of sums is a sum of all their terms.
    """

    def __init__(self, terms: Sequence[tuple[float, SymmetricOperator]]) -> None:
        self.terms: list[tuple[float, SymmetricOperator]] = [
            (coefficient * factor, term)
            for coefficient, operator in terms
            for factor, term in (
                operator.terms if isinstance(operator, SumOperator) else [(1.0, operator)]
            )
        ]
        for coefficient, _ in self.terms:
            if not np.isfinite(coefficient):
                msg = f"an operator was multiplied by {coefficient}; expected a finite number"
                raise ArgumentError(msg)
        operators = [operator for _, operator in self.terms]
        self._numpy = all(operator._numpy for operator in operators)
        super().__init__(_common_space(operators))

    @property
    def of(self) -> SymmetricOperator:
        """The term whose parameters the sum is over."""
        return next(term for _, term in self.terms if term.space is self.space)

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """As all terms are."""
        with contextlib.ExitStack() as stack:
            for _, term in self.terms:
                stack.enter_context(term.undisturbed())
            yield

    def identity(self) -> dict[str, Any]:
        """Of all terms, with their coefficients."""
        terms = {
            f"term {i}": {"coefficient": coefficient, **term.identity()}
            for i, (coefficient, term) in enumerate(self.terms)
        }
        return {**super().identity(), **terms}

    def describe(self) -> dict[str, Any]:
        """With all terms, and what is to be known of any of them."""
        terms = [(coefficient, term.describe()) for coefficient, term in self.terms]
        notes = list(dict.fromkeys(note for _, term in terms for note in term.get("notes", ())))
        return {
            **super().describe(),
            "terms": [{"coefficient": coefficient, **term} for coefficient, term in terms],
            **({"notes": notes} if notes else {}),
        }

    def _products(self, rows: Tensor) -> Tensor:
        (first, operator), *others = self.terms
        # A new tensor: a product may share its memory with what an operator keeps.
        total = operator._checked_products(rows) * first
        for coefficient, operator in others:
            total.add_(operator._checked_products(rows), alpha=coefficient)
        return total


def _common_space(operators: Sequence[SymmetricOperator]) -> VectorSpace:
    """The space of all operators, with the layout of the parameters if one of them has it."""
    spaces = [operator.space for operator in operators]
    layouts = [space for space in spaces if isinstance(space, ParameterSpace)]
    first = layouts[0] if layouts else spaces[0]
    for space in spaces:
        if space.n != first.n:
            msg = f"operators of n = {first.n} and n = {space.n} cannot be added"
            raise ArgumentError(msg)
        if isinstance(space, ParameterSpace) and space.slices != layouts[0].slices:
            odd = next(iter(sorted(set(space.names) ^ set(layouts[0].names))), space.names[0])
            msg = f"the operators are of other parameters; check {odd!r}, and give both one params="
            raise ArgumentError(msg)
        if space.dtype != first.dtype:
            msg = f"the operators are of {first.dtype} and of {space.dtype}; give both one dtype="
            raise ArgumentTypeError(msg)
        if space.device != first.device:
            msg = f"the operators are on {first.device} and on {space.device}; move one"
            raise ArgumentError(msg)
    return first


def as_operator(matrix: Any) -> SymmetricOperator:
    """An operator from whatever is symmetric, so that every algorithm takes plain matrices too.

    Parameters
    ----------
    matrix
        A spectra operator (returned as it is), a torch tensor or NumPy array (n, n), a SciPy sparse
        matrix or LinearOperator. float32 stays float32, everything else becomes float64. For a
        LinearOperator the symmetry cannot be read off and is taken on trust.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        Not square, complex, empty, or no matrix at all.
    NonFiniteError
        The matrix holds nan or inf.
    NotSymmetricError
        The matrix is not symmetric to rounding.
    """
    if isinstance(matrix, SymmetricOperator):
        return matrix
    shape = getattr(matrix, "shape", None)
    if shape is None:
        msg = (
            f"expected an operator, a matrix or a SciPy LinearOperator, got a "
            f"{type(matrix).__name__}"
        )
        raise ArgumentTypeError(msg)
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
        msg = f"expected a square matrix, got shape {tuple(shape)}"
        raise ArgumentError(msg)
    if isinstance(matrix, Tensor):
        if matrix.dtype.is_complex:
            msg = f"the matrix is complex ({matrix.dtype}); spectra takes real symmetric ones"
            raise ArgumentTypeError(msg)
        if matrix.layout != torch.strided:
            msg = f"the matrix is {matrix.layout}; pass a SciPy sparse matrix, or its .to_dense()"
            raise ArgumentTypeError(msg)
        dense = matrix.detach()
        dense = dense if dense.dtype in _NUMPY_DTYPES else dense.double()
        _check_matrix(dense)
        return MatrixOperator(dense)
    dtype = np.dtype(getattr(matrix, "dtype", None) or np.float64)
    if dtype.kind not in "fiub":
        msg = f"the matrix has dtype {dtype}; spectra takes real symmetric ones"
        raise ArgumentTypeError(msg)
    if isinstance(matrix, LinearOperator):
        return ForeignOperator(matrix)
    if scipy.sparse.issparse(matrix):
        # In the one format that has all of the operations below; numbers that can be subtracted.
        matrix = matrix.tocsr().astype(dtype if dtype == np.float32 else np.float64)
        largest = abs(matrix).max()
        if not np.isfinite(largest):
            msg = "the sparse matrix holds nan or inf"
            raise NonFiniteError(msg)
        _check_symmetry(float(abs(matrix - matrix.T).max()), float(largest), dtype)
        return ForeignOperator(matrix)
    array = np.asarray(matrix, dtype=dtype if dtype == np.float32 else np.float64)
    dense = torch.from_numpy(np.array(array, copy=True))
    _check_matrix(dense)
    return MatrixOperator(dense, numpy=True)


def _check_matrix(matrix: Tensor) -> None:
    if not bool(torch.isfinite(matrix).all()):
        msg = "the matrix holds nan or inf"
        raise NonFiniteError(msg)
    defect = float((matrix - matrix.T).abs().max())
    _check_symmetry(defect, float(matrix.abs().max()), _NUMPY_DTYPES[matrix.dtype])


def _check_symmetry(defect: float, largest: float, dtype: Any) -> None:
    # Rounding in whatever produced the matrix is welcome; anything that moves an eigenvalue is not.
    rounding = np.finfo(dtype if dtype.kind == "f" else np.float64).eps ** 0.75
    if defect > rounding * largest:
        msg = (
            f"the matrix is not symmetric: |A - A^T| reaches {defect:.3g} where |A| reaches "
            f"{largest:.3g}. If the difference is rounding, pass (A + A.T) / 2"
        )
        raise NotSymmetricError(msg)
