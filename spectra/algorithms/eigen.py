"""Which are the extreme eigenvalues and eigenvectors, and how wrong can they be?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from spectra.algorithms import probes
from spectra.algorithms.lanczos import Krylov, RitzPairs, upper_bound
from spectra.algorithms.progress import progress_bar
from spectra.errors import ArgumentError, ArgumentTypeError
from spectra.objective.vectors import VectorSpace
from spectra.operators.base import SymmetricOperator, as_operator
from spectra.results import Result, versions

__all__ = ["Eigenpairs", "Which", "eigsh"]

Which = Literal["LM", "LA", "SA", "BE"]

_NAMES = {
    "LM": "largest in magnitude",
    "LA": "largest",
    "SA": "smallest",
    "BE": "both ends",
}
# Steps of the search for missed eigenvalues. Three found every missing copy in the study behind
# this; five bring the probabilistic bound within 13 % of the largest remaining eigenvalue.
_CERTIFICATE_STEPS = 5
_CERTIFICATE_CONFIDENCE = 0.99


@dataclass(frozen=True, eq=False)
class Eigenpairs(Result):
    """Extreme eigenpairs with measured residuals. Unpacks as `values, vectors = pairs`.

    Attributes
    ----------
    values
        (k,) float64 eigenvalues, in descending order whatever `which` was.
    vectors
        (n, k) unit eigenvectors as columns, in the same order: a torch tensor on the operator's
        device, or a NumPy array where a NumPy or SciPy matrix was given.
    residuals
        (k,) ‖Hx − λx‖, measured by one more product each. There is an eigenvalue within
        λ ± residual; that none was missed is another question, see `no_eigenvalue_above`.
    converged
        (k,) whether the residual is within `tol`: residual <= tol · max(|λ|, tol · ‖H‖), but not
        less than rounding allows, 4 eps ‖H‖.
    which, tol
        As asked.
    matvecs
        Products spent, certificate and residuals included.
    no_eigenvalue_above, no_eigenvalue_below
        With probability `certificate_confidence` no other eigenvalue lies beyond; None where the
        end was not searched. Found by a few steps from a random direction in the complement.
    basis_size
        Most vectors held at a time.
    notes
        What to know before believing the numbers, in words.
    """

    values: np.ndarray
    vectors: Any
    residuals: np.ndarray
    converged: np.ndarray
    which: str
    tol: float
    matvecs: int
    no_eigenvalue_above: float | None = None
    no_eigenvalue_below: float | None = None
    certificate_confidence: float = _CERTIFICATE_CONFIDENCE
    basis_size: int = 0
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter((self.values, self.vectors))

    def __getitem__(self, place: int) -> Any:
        """`pairs[0]` are the values, `pairs[1]` the vectors, as in SciPy's tuple."""
        return (self.values, self.vectors)[place]

    def __len__(self) -> int:
        return len(self.values)

    @property
    def intervals(self) -> np.ndarray:
        """(k, 2): λ − residual and λ + residual; each holds an eigenvalue."""
        return np.stack([self.values - self.residuals, self.values + self.residuals], axis=1)

    def __str__(self) -> str:
        n = len(self.vectors)
        good = int(self.converged.sum())
        lines = [
            f"{len(self)} eigenpairs ({_NAMES[self.which]}) of n = {n:,}: {good} converged to "
            f"tol = {self.tol:g}, {self.matvecs} matvecs",
            "        eigenvalue    ± residual",
        ]
        for i, (value, residual, fine) in enumerate(
            zip(self.values, self.residuals, self.converged, strict=True), start=1
        ):
            mark = "" if fine else "  not converged"
            lines.append(f"{i:4d}  {value:12.6g}  {residual:12.2g}{mark}")
        percent = f"with {self.certificate_confidence:.0%} probability no other eigenvalue"
        if self.no_eigenvalue_above is not None:
            lines.append(f"{percent} exceeds {self.no_eigenvalue_above:.4g}")
        if self.no_eigenvalue_below is not None:
            lines.append(f"{percent} is below {self.no_eigenvalue_below:.4g}")
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def eigsh(
    H: Any,
    k: int = 6,
    *,
    which: Which = "LM",
    tol: float = 1e-3,
    max_matvecs: int | None = None,
    ncv: int | None = None,
    v0: Any = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Eigenpairs:
    """The k extreme eigenpairs of a symmetric operator or matrix.

    Thick-restart Lanczos with full reorthogonalisation. Convergence is tested after every product,
    the residuals of what is returned are measured, and a few steps from a fresh random direction
    look for eigenvalues that one Krylov space cannot see (copies of a multiple one, above all).

    Parameters
    ----------
    H
        An operator, a torch or NumPy matrix, a SciPy sparse matrix or LinearOperator.
    k
        How many, 1 <= k <= n.
    which
        "LM" largest in magnitude, "LA" largest, "SA" smallest (most negative), "BE" half from each
        end (one more from the upper for odd k).
    tol
        A pair has converged when ‖Hx − λx‖ <= tol · max(|λ|, tol · ‖H‖). The eigenvalue itself is
        then usually right to about tol².
    max_matvecs
        Stop after this many products and return what there is, marked. Default 20 k + 200.
    ncv
        Most basis vectors to hold; memory is (ncv + 1) n numbers. Default max(8 k, 80), or what
        fits into half of the free memory.
    v0
        Start vector (n,).
    seed
        Of the random directions.
    progress
        Show a progress bar; None for on a terminal only.

    Returns
    -------
    Eigenpairs
        Pairs that did not converge are returned too, and marked.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        k < 1, k > n, an unknown `which`, a start vector of another shape.
    NonFiniteError
        A product holds nan or inf.

    Notes
    -----
    Costs the Krylov steps (17 to 35 for ten outliers of a typical network), 5 for the certificate
    and k for the residuals.

    References
    ----------
    Wu and Simon, 2000, "Thick-restart Lanczos method for large symmetric eigenvalue problems".
    Parlett, 1980, "The Symmetric Eigenvalue Problem" (residual bounds). Van Dorsselaer,
    Hochstenbach and van der Vorst, 2000, "Computing probabilistic bounds for extreme eigenvalues of
    symmetric matrices with the Lanczos method" (certificate).

    Examples
    --------
    >>> import numpy as np, spectra
    >>> values, vectors = spectra.eigsh(np.diag([4.0, -7.0, 1.0, 0.5]), k=2)
    >>> print(values.round(6))
    [ 4. -7.]
    """
    operator = as_operator(H)
    space = operator.space
    _check_arguments(space.n, k, which, tol, ncv)
    budget = 20 * k + 200 if max_matvecs is None else max_matvecs
    if budget < 2 * k:
        msg = f"max_matvecs={budget} is too few: k steps and k residuals need at least {2 * k}"
        raise ArgumentError(msg)
    generator = probes.seeded(seed)
    capacity = _capacity(space, k, ncv)
    start = None if v0 is None else _start_vector(operator, v0)
    before = operator.matvecs
    krylov = Krylov(operator, capacity, generator, start)
    search = _Search(krylov, k, which, tol, last_step=budget - k)

    with progress_bar("eigsh", budget, progress) as bar:
        search.bar = bar
        search.run()
        search.certify()
        claimed = search.claimed_residuals()
        values, rows, residuals = search.measured(operator)

    limits = search.thresholds(values)
    converged = residuals <= limits
    order = np.argsort(-values, kind="stable")
    notes = [*search.notes]
    if not search.converged:
        notes.append(
            f"{int(converged.sum())} of {k} pairs converged within {operator.matvecs - before} "
            "matvecs; allow more with max_matvecs, a larger basis with ncv, or a larger tol"
        )
    # The recurrence is right up to the noise of the products; 2 leaves room for its rounding.
    surprising = ~converged & (search.converged | (residuals > 2 * np.maximum(claimed, limits)))
    if surprising.any():
        worst = int(np.argmax(surprising * residuals / np.maximum(limits, np.finfo(float).tiny)))
        notes.append(
            f"the recurrence put the residual of {values[worst]:.4g} at {claimed[worst]:.2g}, but "
            f"it measures {residuals[worst]:.2g}: the products are less exact than tol asks for "
            "(half or single precision, or not deterministic)"
        )
    return Eigenpairs(
        values=values[order],
        vectors=operator.native(rows[torch.from_numpy(order)].T),
        residuals=residuals[order],
        converged=converged[order],
        which=which,
        tol=tol,
        matvecs=operator.matvecs - before,
        no_eigenvalue_above=search.above,
        no_eigenvalue_below=search.below,
        basis_size=krylov.capacity,
        notes=tuple(notes),
        provenance={
            "operator": operator.describe(),
            "options": {"k": k, "which": which, "tol": tol, "max_matvecs": budget, "ncv": ncv},
            "seed": seed,
            "versions": versions(),
        },
    )


class _Search:
    """One search for k extreme Ritz pairs; remembers what the last Ritz decomposition was."""

    def __init__(self, krylov: Krylov, k: int, which: Which, tol: float, last_step: int) -> None:
        self.krylov = krylov
        self.k = k
        self.which: Which = which
        self.tol = tol
        self.steps_left = last_step
        self.pairs: RitzPairs | None = None
        self.converged = False
        self.above: float | None = None
        self.below: float | None = None
        self.notes: list[str] = []
        self.bar: Any = None
        self._norm = 0.0

    def thresholds(self, values: np.ndarray) -> np.ndarray:
        """The residual at which each value counts as converged, relative to it and to ‖H‖."""
        scale = np.maximum(np.abs(values), self.tol * self._norm)
        rounding = 4 * self.krylov._space.eps * self._norm
        return np.maximum(self.tol * scale, rounding)

    def run(self) -> None:
        """Step until the wanted pairs have converged, the space is complete, or the budget ends."""
        krylov = self.krylov
        # A complete basis leaves nothing to converge: its Ritz pairs are all the eigenpairs.
        self.converged = krylov.complete
        while self.steps_left > 0 and not krylov.complete:
            if krylov.full:
                assert self.pairs is not None
                krylov.restart(self.pairs, _wanted(self.pairs.values, self._kept(), self.which))
            self._step()
            if krylov.size < self.k:
                continue
            pairs = self.pairs = krylov.ritz()
            self._norm = max(self._norm, float(np.abs(pairs.values).max()))
            self.converged = krylov.complete or self._within_limits(pairs)
            if self.converged:
                return

    def certify(self) -> None:
        """Look for missed eigenvalues in the complement; take them in until none turns up."""
        krylov = self.krylov
        found = 0
        while self.converged and not krylov.complete:
            assert self.pairs is not None
            known = self._values_of(self.pairs)
            if self.steps_left < _CERTIFICATE_STEPS:
                self.notes.append(
                    "the budget left no products to look for missed eigenvalues: a multiple "
                    "eigenvalue may be missing copies"
                )
                break
            self._probe_the_complement()
            if not self._moved_from(known) and (krylov.complete or self._within_limits(self.pairs)):
                break
            # Something in the complement is close to the wanted pairs, or beyond them.
            self.run()
            if not self._moved_from(known):
                break
            found += 1
            self.above = self.below = None
        if self.converged and krylov.complete:
            self._bound_exactly()
        if found:
            self.notes.append(
                "eigenvalues that the first Krylov space could not see were found in its "
                "complement and taken in: repeated or clustered eigenvalues"
            )

    def claimed_residuals(self) -> np.ndarray:
        """Residuals (k,) of the wanted pairs as the recurrence has them."""
        assert self.pairs is not None
        return self.pairs.residuals[_wanted(self.pairs.values, self.k, self.which)]

    def measured(self, operator: SymmetricOperator) -> tuple[np.ndarray, Tensor, np.ndarray]:
        """Rayleigh quotients, vectors as rows (k, n), and true residuals: k products."""
        krylov, space = self.krylov, self.krylov._space
        assert self.pairs is not None
        krylov.restart(self.pairs, _wanted(self.pairs.values, self.k, self.which))
        rows = krylov.basis.clone()
        values, residuals = np.zeros(self.k), np.zeros(self.k)
        for row in rows:
            row.div_(space.norm(row))
        chunk = max(1, krylov.capacity // 4)
        for start in range(0, self.k, chunk):
            products = operator.apply(rows[start : start + chunk].T).T
            for i, product in enumerate(products, start=start):
                values[i] = space.inner(rows[i], product)
                residuals[i] = space.norm(product - values[i] * rows[i])
                self.bar.update()
        return values, rows, residuals

    def _step(self) -> None:
        self.krylov.step()
        self.steps_left -= 1
        self.bar.update()

    def _values_of(self, pairs: RitzPairs) -> np.ndarray:
        return pairs.values[_wanted(pairs.values, self.k, self.which)]

    def _within_limits(self, pairs: RitzPairs) -> bool:
        chosen = _wanted(pairs.values, self.k, self.which)
        limits = self.thresholds(pairs.values[chosen])
        return bool((pairs.residuals[chosen] <= limits).all())

    def _moved_from(self, known: np.ndarray) -> bool:
        assert self.pairs is not None
        moves = np.abs(self._values_of(self.pairs) - known)
        return bool((moves > self.thresholds(known)).any())

    def _probe_the_complement(self) -> None:
        """A few steps from a fresh random direction beside the wanted Ritz vectors, and a bound."""
        krylov = self.krylov
        assert self.pairs is not None
        krylov.restart_fresh(self.pairs, _wanted(self.pairs.values, self.k, self.which))
        bounded = False
        for _ in range(min(_CERTIFICATE_STEPS, krylov.dimension - self.k)):
            if krylov.full:
                # A small basis: the bound stands on the steps so far, the search goes on.
                bounded = bounded or self._bound_the_rest()
                pairs = krylov.ritz()
                krylov.restart(pairs, _wanted(pairs.values, self._kept(), self.which))
            self._step()
        bounded = bounded or self._bound_the_rest()
        self.pairs = krylov.ritz()

    def _kept(self) -> int:
        """How many Ritz vectors a restart keeps: 40 % of the basis did best in the study."""
        capacity = self.krylov.capacity
        return min(max(self.k + 3, round(0.4 * capacity)), capacity - 1)

    def _bound_the_rest(self) -> bool:
        krylov = self.krylov
        inner = krylov.projection[self.k : krylov.size, self.k : krylov.size]
        betas = np.append(np.abs(np.diag(inner, -1)), krylov.beta)
        remaining = krylov.dimension - self.k
        if self.which != "SA":
            self.above = upper_bound(
                np.linalg.eigvalsh(inner), betas, remaining, _CERTIFICATE_CONFIDENCE
            )
        if self.which != "LA":
            self.below = -upper_bound(
                np.linalg.eigvalsh(-inner), betas, remaining, _CERTIFICATE_CONFIDENCE
            )
        return True

    def _bound_exactly(self) -> None:
        """The basis spans the space: what was not wanted is known, too."""
        assert self.pairs is not None
        values = self.pairs.values
        others = np.delete(values, _wanted(values, self.k, self.which))
        self.above = float(others.max()) if len(others) and self.which != "SA" else None
        self.below = float(others.min()) if len(others) and self.which != "LA" else None


def _wanted(values: np.ndarray, k: int, which: Which) -> np.ndarray:
    """Indices of the k wanted among ascending values."""
    count = len(values)
    k = min(k, count)
    if which == "LA":
        return np.arange(count - k, count)
    if which == "SA":
        return np.arange(k)
    if which == "BE":
        return np.concatenate([np.arange(k // 2), np.arange(count - (k - k // 2), count)])
    return np.sort(np.argsort(-np.abs(values), kind="stable")[:k])


def _capacity(space: VectorSpace, k: int, ncv: int | None) -> int:
    if ncv is not None:
        return min(ncv, space.n)
    rows = space.affordable()
    # What is below k + 2 cannot work at all: then let the allocation fail and say how much it was.
    return min(space.n, max(min(max(8 * k, 80), rows - 3), k + 2 + _CERTIFICATE_STEPS))


def _check_arguments(n: int, k: int, which: str, tol: float, ncv: int | None) -> None:
    if isinstance(k, bool) or not isinstance(k, int | np.integer):
        msg = f"k={k!r}; expected an integer number of eigenpairs"
        raise ArgumentTypeError(msg)
    if not 1 <= k <= n:
        msg = f"k={k}, but the operator is {n:,} x {n:,}; expected 1 <= k <= {n:,}"
        raise ArgumentError(msg)
    if which == "SM":
        msg = (
            "which='SM' asks for eigenvalues inside the spectrum, where a Hessian has most of its "
            "mass and products alone do not lead; use spectral_density to see them, or 'SA' for "
            "the most negative"
        )
        raise ArgumentError(msg)
    if which not in _NAMES:
        msg = f"which={which!r}; expected one of {', '.join(_NAMES)}"
        raise ArgumentError(msg)
    if not (isinstance(tol, int | float | np.floating) and tol > 0):
        msg = f"tol={tol!r}; expected a positive relative residual, such as 1e-3"
        raise ArgumentError(msg)
    if ncv is not None and not isinstance(ncv, int | np.integer):
        msg = f"ncv={ncv!r}; expected an integer number of basis vectors"
        raise ArgumentTypeError(msg)
    if ncv is not None and ncv < min(k + 2, n):
        msg = f"ncv={ncv} is too small for k={k}; expected at least k + 2"
        raise ArgumentError(msg)


def _start_vector(operator: SymmetricOperator, v0: Any) -> Tensor:
    space = operator.space
    vector = v0.detach() if isinstance(v0, Tensor) else operator.from_numpy(v0)
    if vector.shape != (space.n,):
        msg = f"v0 has shape {tuple(vector.shape)}, expected ({space.n},)"
        raise ArgumentError(msg)
    vector = vector.to(device=space.device, dtype=space.dtype)
    norm = space.norm(vector)
    if not (math.isfinite(norm) and norm > 0):
        msg = f"v0 has norm {norm}; expected a finite vector other than zero"
        raise ArgumentError(msg)
    return vector
