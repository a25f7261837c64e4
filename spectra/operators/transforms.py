"""What is the spectrum of H shifted, deflated, preconditioned, or within a subspace?

Each transform is an operator like any other, which every algorithm takes. It costs one product of H
each, holds one vector or one basis beside it, and is the transform of whatever H is at the time:
nothing is computed before it is asked for.
"""

from __future__ import annotations

import contextlib
import math
import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from spectra.errors import ArgumentError, ArgumentTypeError, NonFiniteError
from spectra.objective.identity import digest
from spectra.objective.parameters import ParameterSpace
from spectra.objective.vectors import VectorSpace
from spectra.operators.base import SymmetricOperator, as_operator
from spectra.operators.optimizers import preconditioner

__all__ = [
    "DeflatedOperator",
    "PreconditionedOperator",
    "ProjectedOperator",
    "ShiftedOperator",
    "deflated",
    "preconditioned",
    "projected",
    "refuse_scaled",
    "shifted",
]

_PRECONDITIONED = "preconditioned by"
# Of a basis: how much of a unit column has to be beside the columns before it, in eps.
_INDEPENDENT = 100


def shifted(H: Any, s: Any) -> ShiftedOperator:
    """H + s I, or H + diag(s): eigenvalues moved by a number, as by weight decay.

    Parameters
    ----------
    H
        An operator, a torch or NumPy matrix, a SciPy sparse matrix or LinearOperator.
    s
        A number; a vector (n,), torch or NumPy; or tensors by parameter name.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        Another shape or kind.
    NonFiniteError
        The shift holds nan or inf.
    """
    operator = as_operator(H)
    if isinstance(s, numbers.Real) and not isinstance(s, bool):
        shift = float(s)
        if not math.isfinite(shift):
            msg = f"the shift is {shift}; expected a finite number"
            raise NonFiniteError(msg)
        return ShiftedOperator(operator, shift)
    return ShiftedOperator(operator, _diagonal(operator, s, "the shift"))


def deflated(H: Any, pairs: Any) -> DeflatedOperator:
    """P H P with P = I − X Xᵀ: the operator without what is known of it.

    With eigenvectors as X the other eigenvalues stay as they are, and these become zero.

    Parameters
    ----------
    H
        As for `shifted`.
    pairs
        The Eigenpairs that `eigsh` returned, or an orthonormal basis (n, k) as columns.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        The basis is of another length or dtype, or not orthonormal.
    """
    operator = as_operator(H)
    refuse_scaled(pairs, operator)
    rows = _basis(operator, getattr(pairs, "vectors", pairs)).T
    basis = operator.space.held(rows)
    if not (defect := operator.space.defect(basis)) <= operator.space.eps**0.5:
        msg = (
            f"the basis is not orthonormal: its Gram matrix is off by {defect:.2g}; pass the Q of "
            "its QR decomposition"
        )
        raise ArgumentError(msg)
    return DeflatedOperator(operator, basis)


def projected(H: Any, basis: Any) -> ProjectedOperator:
    """Bᵀ H B: H within the span of the columns of a basis, in their coordinates.

    A product costs one of H, so that the matrix (`to_dense()`) costs k; none is kept, because the
    weights may change.

    Parameters
    ----------
    H
        As for `shifted`.
    basis
        (n, k) columns, torch or NumPy, or Eigenpairs. They are made orthonormal in float64, each
        against the ones before it; orthonormal ones stay what they are.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        Another shape or dtype, or columns that depend on one another.
    """
    operator = as_operator(H)
    columns = _basis(operator, getattr(basis, "vectors", basis))
    return ProjectedOperator(operator, _orthonormalised(operator, columns))


def preconditioned(H: Any, P: Any) -> PreconditionedOperator:
    """P^(−1/2) H P^(−1/2): the curvature in the metric of a diagonal P, such as an optimiser's.

    Its eigenvalues are those of P⁻¹ H, which is what an optimiser that divides by P meets: compare
    them with `stability_threshold`. Eigenvectors y are in the scaled coordinates, in which they are
    orthogonal; `to_original` gives the directions x = P^(−1/2) y of P⁻¹ H, in parameters.

    Parameters
    ----------
    H
        As for `shifted`.
    P
        A torch optimiser (SGD, Adam, AdamW, RMSprop, Adagrad), whose state is read now, see
        `preconditioner`; or a positive diagonal: a vector (n,), or tensors by parameter name.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        Another shape or kind, or not positive; or what `preconditioner` refuses.
    NonFiniteError
        P holds nan or inf.
    """
    operator = as_operator(H)
    if isinstance(P, Optimizer):
        diagonal, words = preconditioner(P, operator), type(P).__name__
    else:
        diagonal, words = _diagonal(operator, P, "the preconditioner"), "a diagonal"
        if (worst := float(diagonal.min())) <= 0:
            msg = f"the preconditioner has entries down to {worst:.3g}; expected positive ones"
            raise ArgumentError(msg)
    return PreconditionedOperator(operator, diagonal, words)


class _Transform(SymmetricOperator):
    """An operator made of another one, `of`, whose space and kind of arrays it keeps."""

    # What was done, in words.
    words: str

    def __init__(self, of: SymmetricOperator, space: VectorSpace | None = None) -> None:
        self.of = of
        self._numpy = of._numpy
        if space is not None:
            space.ranks = of.space.ranks
        super().__init__(of.space if space is None else space)

    def _numbers(self) -> list[Tensor]:
        """What the transform depends on besides the operator."""
        raise NotImplementedError

    def undisturbed(self) -> contextlib.AbstractContextManager[None]:
        """As the operator beneath is."""
        return self.of.undisturbed()

    def identity(self) -> dict[str, Any]:
        """Of the operator beneath, with a digest of the transform's numbers."""
        own = {"transform digest": digest(*self._numbers())}
        return {**super().identity(), **own, "of": self.of.identity()}

    def describe(self) -> dict[str, Any]:
        """The operator beneath, and under "transforms" what was done to it, in order."""
        beneath = self.of.describe()
        return {
            **beneath,
            **super().describe(),
            "of": beneath["operator"],
            "transforms": [*beneath.get("transforms", ()), self.words],
        }


class ShiftedOperator(_Transform):
    """See `shifted`."""

    def __init__(self, of: SymmetricOperator, shift: float | Tensor) -> None:
        self.shift = shift
        by = f"{shift:g}" if isinstance(shift, float) else "a diagonal"
        self.words = f"shifted by {by}"
        super().__init__(of)

    def _numbers(self) -> list[Tensor]:
        return [torch.as_tensor(self.shift, dtype=torch.float64)]

    def _products(self, rows: Tensor) -> Tensor:
        return self.of._checked_products(rows) + rows * self.shift


class DeflatedOperator(_Transform):
    """See `deflated`; `basis` holds the vectors as rows (k, n)."""

    def __init__(self, of: SymmetricOperator, basis: Tensor) -> None:
        self.basis = basis
        self.words = f"deflated by {len(basis)} vectors"
        super().__init__(of)

    def _numbers(self) -> list[Tensor]:
        return [self.basis]

    def _products(self, rows: Tensor) -> Tensor:
        return self._without(self.of._checked_products(self._without(rows)))

    def _without(self, rows: Tensor) -> Tensor:
        rows = rows.clone()
        for row in rows:
            self.space.remove(row, self.basis)
        return rows


class ProjectedOperator(_Transform):
    """See `projected`; `basis` holds the orthonormal vectors as rows (k, n)."""

    def __init__(self, of: SymmetricOperator, basis: Tensor) -> None:
        self.basis = basis
        self.words = f"projected on {len(basis)} vectors"
        super().__init__(of, VectorSpace(len(basis), of.space.dtype, of.space.device))

    def to_original(self, vectors: Any) -> Any:
        """The vectors B y of H's space for coordinates y, (k,) or columns (k, m), in their kind."""
        return _mapped(self, vectors, self._lifted)

    def _numbers(self) -> list[Tensor]:
        return [self.basis]

    def _lifted(self, rows: Tensor) -> Tensor:
        return torch.stack([self.of.space.combine(self.basis, row) for row in rows])

    def _products(self, rows: Tensor) -> Tensor:
        products = self.of._checked_products(self._lifted(rows))
        return torch.stack([self.of.space.project(self.basis, row) for row in products]).to(rows)


class PreconditionedOperator(_Transform):
    """See `preconditioned`; `diagonal` is P (n,)."""

    def __init__(self, of: SymmetricOperator, diagonal: Tensor, words: str) -> None:
        self.diagonal = diagonal
        self.words = f"{_PRECONDITIONED} {words}"
        # In float64, where the square root of the least of single precision is still normal.
        self._scale = diagonal.double().rsqrt().to(diagonal)
        super().__init__(of)

    def to_original(self, vectors: Any) -> Any:
        """The directions x = P^(−1/2) y for vectors y, (n,) or columns (n, k), in their kind.

        An eigenvector y becomes one of P⁻¹ H, of the same eigenvalue: a direction in which the
        optimiser's steps oscillate. These are orthogonal in the inner product xᵀ P x only, and not
        of length 1.
        """
        return _mapped(self, vectors, lambda rows: rows * self._scale)

    def _numbers(self) -> list[Tensor]:
        return [self.diagonal]

    def _products(self, rows: Tensor) -> Tensor:
        return self.of._checked_products(rows * self._scale) * self._scale


def _mapped(operator: SymmetricOperator, vectors: Any, apply: Any) -> Any:
    """Rows mapped by `apply`, for vectors as columns and of the kind that came."""
    is_tensor = isinstance(vectors, Tensor)
    columns = vectors if is_tensor else operator.from_numpy(vectors)
    operator._check_tensor(columns)
    rows = columns.unsqueeze(0) if columns.dim() == 1 else columns.T.contiguous()
    mapped = apply(rows)
    mapped = mapped[0] if columns.dim() == 1 else mapped.T
    return mapped if is_tensor else mapped.cpu().numpy()


def _diagonal(operator: SymmetricOperator, given: Any, what: str) -> Tensor:
    """A diagonal (n,) of finite numbers on the operator's device, a copy."""
    space = operator.space
    if isinstance(given, Mapping):
        if not isinstance(space, ParameterSpace):
            msg = f"{what} is given by name, but the operator has no parameters; pass a vector (n,)"
            raise ArgumentTypeError(msg)
        if odd := [name for name, value in given.items() if isinstance(value, Mapping | list)]:
            msg = (
                f"{what} has an entry {odd[0]!r} of kind {type(given[odd[0]]).__name__}; expected "
                "a tensor for each parameter, or an optimiser itself, not its state_dict()"
            )
            raise ArgumentTypeError(msg)
        flat = space.flatten({name: torch.as_tensor(value) for name, value in given.items()})
    elif isinstance(given, Tensor):
        if given.dtype.is_complex or given.dtype == torch.bool:
            msg = f"{what} has dtype {given.dtype}; expected real numbers"
            raise ArgumentTypeError(msg)
        flat = given.detach().to(device=space.device, dtype=space.dtype, copy=True)
    elif isinstance(given, np.ndarray | list | tuple):
        flat = operator.from_numpy(given).clone()
        if flat.shape == (space.n,):
            flat = space.own(flat)
    else:
        msg = f"{what} is a {type(given).__name__}; expected a vector (n,), torch or NumPy"
        raise ArgumentTypeError(msg)
    n = space.length
    if flat.shape != (n,):
        msg = f"{what} has shape {tuple(flat.shape)}; expected ({n},), one for each dimension"
        raise ArgumentError(msg)
    if bool(space.summed((~torch.isfinite(flat)).sum())):
        msg = f"{what} holds nan or inf"
        raise NonFiniteError(msg)
    return flat


def refuse_scaled(pairs: Any, operator: SymmetricOperator) -> None:
    """Eigenpairs of a preconditioned operator are in coordinates of their own.

    Raises
    ------
    ArgumentError
        Where they are taken for vectors of an operator that is not preconditioned in that way.
    """
    described = getattr(pairs, "provenance", {}).get("operator") or {}
    theirs, own = (
        [words for words in known.get("transforms", ()) if words.startswith(_PRECONDITIONED)]
        for known in (described, operator.describe())
    )
    if theirs != own:
        msg = (
            f"the eigenpairs are those of an operator {' and '.join(theirs) or 'as it is'}, whose "
            f"coordinates are scaled, and this one is {' and '.join(own) or 'not preconditioned'}; "
            "pass the directions preconditioned(...).to_original(pairs.vectors), or eigenpairs of "
            "this operator"
        )
        raise ArgumentError(msg)


def _basis(operator: SymmetricOperator, given: Any) -> Tensor:
    """Columns (n, k) as a tensor of the operator's dtype."""
    if isinstance(given, Tensor):
        columns = given.detach()
        if columns.dtype != operator.space.dtype:
            dtype = operator.space.dtype
            msg = f"the basis is of {columns.dtype}, the operator of {dtype}; convert one of them"
            raise ArgumentTypeError(msg)
    elif isinstance(given, np.ndarray):
        columns = operator.from_numpy(given)
    else:
        msg = f"expected Eigenpairs or a basis (n, k), torch or NumPy, got a {type(given).__name__}"
        raise ArgumentTypeError(msg)
    n = operator.space.n
    if columns.dim() != 2 or len(columns) != n or columns.shape[1] > n:
        msg = f"the basis has shape {tuple(columns.shape)}; expected columns ({n}, k), k <= {n}"
        raise ArgumentError(msg)
    if not bool(torch.isfinite(columns).all()):
        msg = "the basis holds nan or inf"
        raise NonFiniteError(msg)
    return columns


def _orthonormalised(operator: SymmetricOperator, columns: Tensor) -> Tensor:
    """Orthonormal rows (k, n) that span the columns one after the other."""
    space = operator.space
    if space.spread:
        msg = (
            "a basis is made orthonormal on one process, and the vectors of this operator are "
            "spread over several; eigenvectors of it are orthonormal: pass the Eigenpairs"
        )
        raise ArgumentError(msg)
    if not columns.shape[1]:
        msg = "the basis has no columns; give at least one"
        raise ArgumentError(msg)
    exact = columns.to(space.device, torch.float64)
    lengths = torch.linalg.vector_norm(exact, dim=0)
    orthonormal, triangle = torch.linalg.qr(
        exact / lengths.clamp(min=torch.finfo(exact.dtype).tiny)
    )
    beside = triangle.diagonal()
    if bool((beside.abs() < _INDEPENDENT * space.eps).any()):
        place = int((beside.abs() < _INDEPENDENT * space.eps).nonzero()[0])
        msg = (
            f"column {place} of the basis is zero, or depends on the columns before it; leave it "
            "out"
        )
        raise ArgumentError(msg)
    # QR leaves the signs open: orthonormal columns are to be their own coordinates.
    return space.held((orthonormal * beside.sign()).T.to(space.dtype).contiguous())
