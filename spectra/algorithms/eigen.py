"""Which are the extreme eigenvalues and eigenvectors, and how wrong can they be?"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from spectra.algorithms import probes
from spectra.algorithms.lanczos import Krylov
from spectra.algorithms.noise import LOUD, noise_notes
from spectra.algorithms.progress import progress_bar
from spectra.algorithms.resuming import resumable
from spectra.algorithms.search import (
    CERTIFICATE_CONFIDENCE,
    CERTIFICATE_STEPS,
    Search,
    Target,
    Which,
)
from spectra.errors import ArgumentError, ArgumentTypeError
from spectra.journal import seal
from spectra.objective.places import Place
from spectra.objective.vectors import VectorSpace
from spectra.operators.base import SymmetricOperator, as_operator
from spectra.results import Result, dimension, versions

__all__ = ["Basis", "Eigenpairs", "Which", "check_eigsh_arguments", "eigsh"]

Basis = Literal["auto", "device", "host", "disk"]

_NAMES = {
    "LM": "largest in magnitude",
    "LA": "largest",
    "SA": "smallest",
    "BE": "both ends",
}
_DEFAULT_COUNT = 6
_UNCERTIFIED = (
    "certify=False: nobody looked for missed eigenvalues, copies of a multiple one may be missing"
)
# A basis of this many bytes, or vectors, is allowed to grow before the first restart.
_FREE_BYTES, _FREE_VECTORS = 1 << 28, 300
# Vectors of memory beside the basis: the next one, the product, and what the algorithm works in.
_SPARE = 3
# More of them where the basis is on disk: what the operator holds meanwhile.
_WITHOUT_BASIS = 5


@dataclass(frozen=True, eq=False)
class Eigenpairs(Result):
    """Extreme eigenpairs with measured residuals. Unpacks as `values, vectors = pairs`.

    Attributes
    ----------
    values
        (k,) float64 eigenvalues, in descending order whatever `which` was.
    vectors
        (n, k) unit eigenvectors as columns, in the same order: a torch tensor on the operator's
        device, or a NumPy array where a NumPy or SciPy matrix was given. Where the basis was in
        the host's memory or on disk, so are they: a tensor on the CPU, mapped from a file that
        is gone with the last reference to it.
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
    certified
        Those bounds leave no room for a missed eigenvalue among the returned ones: all copies and
        members of clusters are there. Where it is false, `notes` say what cannot be excluded.
    above
        The threshold, if one was asked for.
    basis_size
        Most vectors held at a time.
    noise
        Relative error of a product, measured from how unsymmetric the products were.
    floor
        noise · ‖H‖: digits below it mean nothing, nor does the sign of an eigenvalue below it.
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
    certificate_confidence: float = CERTIFICATE_CONFIDENCE
    certified: bool = False
    above: float | None = None
    basis_size: int = 0
    noise: float = math.nan
    floor: float = math.nan
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

    @property
    def gaps(self) -> np.ndarray:
        """(k,) distance of each value to the nearest other eigenvalue, as far as it is known.

        Beyond the returned ones that is the bound `no_eigenvalue_above` or `_below`; 0 where there
        is none.
        """
        others = [bound for bound in (self.no_eigenvalue_above, self.no_eigenvalue_below) if bound]
        searched = {"LA": 1, "SA": 1}.get(self.which, 2)
        gaps = np.full(len(self), math.inf if len(others) == searched else 0.0)
        for i, value in enumerate(self.values):
            known = [*np.delete(self.values, i), *others]
            if known:
                gaps[i] = min(gaps[i], float(np.abs(value - np.array(known)).min()))
        return gaps

    @property
    def value_errors(self) -> np.ndarray:
        """(k,) order of magnitude of each value's error: residual² / gap, at most the residual.

        An estimate, not a bound; in clusters errors exceed it up to threefold. The gap stands on
        the eigenvalues that are known (Kato, 1949, "On the upper and lower bounds of
        eigenvalues").
        """
        gaps = np.maximum(self.gaps - self.residuals, 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            errors = np.where(gaps > 0, self.residuals**2 / gaps, math.inf)
        return np.minimum(np.nan_to_num(errors, nan=0.0, posinf=math.inf), self.residuals)

    @property
    def n(self) -> int:
        """How many eigenvalues the operator has."""
        return dimension(self, len(self.vectors))

    @property
    def within_noise(self) -> np.ndarray:
        """(k,) whether the value is no larger than the operator noise: not even its sign is known.

        Rounding of single and double precision does not count.
        """
        return (np.abs(self.values) <= self.floor) & (self.noise > LOUD)

    def __str__(self) -> str:
        n = self.n
        good = int(self.converged.sum())
        wanted = _NAMES[self.which] if self.above is None else _beyond(self.which, self.above)
        lines = [
            f"{len(self)} eigenpairs ({wanted}) of n = {n:,}: {good} converged to "
            f"tol = {self.tol:g}, {self.matvecs} matvecs",
            "        eigenvalue    ± residual",
        ]
        for i, (value, residual, fine, lost) in enumerate(
            zip(self.values, self.residuals, self.converged, self.within_noise, strict=True),
            start=1,
        ):
            mark = "  within the noise, sign unknown" if lost else ""
            mark = mark or ("" if fine else "  not converged")
            lines.append(f"{i:4d}  {value:12.6g}  {residual:12.2g}{mark}")
        percent = f"with {self.certificate_confidence:.0%} probability no other eigenvalue"
        if self.no_eigenvalue_above is not None:
            lines.append(f"{percent} exceeds {self.no_eigenvalue_above:.4g}")
        if self.no_eigenvalue_below is not None:
            lines.append(f"{percent} is below {self.no_eigenvalue_below:.4g}")
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


@resumable
def eigsh(
    H: Any,
    k: int | None = None,
    *,
    which: Which = "LM",
    above: float | None = None,
    tol: float = 1e-3,
    max_matvecs: int | None = None,
    ncv: int | None = None,
    memory_budget: int | None = None,
    basis: Basis = "auto",
    block_size: int = 1,
    v0: Any = None,
    certify: bool = True,
    seed: int = 0,
    progress: bool | None = None,
    checkpoint: str | Path | None = None,
) -> Eigenpairs:
    """The extreme eigenpairs of a symmetric operator or matrix: k of them, or all beyond a value.

    Thick-restart Lanczos with full reorthogonalisation. Convergence is tested after every product,
    the residuals of what is returned are measured, and a few steps from a fresh random direction
    look for eigenvalues that one Krylov space cannot see (copies of a multiple one, above all).

    Parameters
    ----------
    H
        An operator, a torch or NumPy matrix, a SciPy sparse matrix or LinearOperator.
    k
        How many, 1 <= k <= n. Default 6; with `above` at most so many, by default all.
    which
        "LM" largest in magnitude, "LA" largest, "SA" smallest (most negative), "BE" half from each
        end (one more from the upper for odd k).
    above
        All eigenvalues beyond this threshold τ: λ > τ for "LA", λ < −τ for "SA", |λ| > τ for "LM"
        and "BE". There may be none.
    tol
        A pair has converged when ‖Hx − λx‖ <= tol · max(|λ|, tol · ‖H‖). The eigenvalue itself is
        then usually right to about tol².
    max_matvecs
        Stop after this many products and return what there is, marked. Default 20 k + 200.
    ncv
        Most basis vectors to hold; memory is (ncv + 3) n numbers. Default max(8 k, 80), more where
        that takes less than 256 MiB, and no more than fits into half of the free memory.
    memory_budget
        The same in bytes, instead of `ncv`. Where that is less than a search for k pairs takes, the
        basis is held elsewhere.
    basis
        Where it is held: on the "device" of the operator, in the memory of the "host", or on
        "disk", in a temporary file (TMPDIR names the directory) of which nothing is left when its
        last vector is freed. Memory is then about 8 vectors, and a step reads the basis twice. The
        numbers are the same. "auto": on the device if a basis of the usual size fits; else on the
        host, if that is another memory and has the room; else a smaller one on the device, down to
        max(2 k, k + 8) vectors; else on disk. `notes` say what is slower than usual.
    block_size
        Products computed together in a step, in one pass over the data. Ten outliers take 32
        products in 23 passes with 1, 37 in 17 with 2 and 47 in 14 with 4: for data that take long
        to read, and for eigenvalues of which there are up to so many copies. Takes 2 (block_size -
        1) vectors of memory more.
    v0
        Start vector (n,), or several as columns (n, p), such as the eigenvectors of an earlier
        checkpoint: their sum is where the search starts. Saves a few products at best.
    certify
        Look for missed eigenvalues, and bound what else there is. Without, copies of a multiple
        eigenvalue may be missing, and 5 to 12 products are saved.
    seed
        Of the random directions.
    progress
        Show a progress bar; None for on a terminal only.
    checkpoint
        A file for what is computed, from which the same call goes on after a crash or a kill; see
        docs/resuming.md. Ctrl-C and SIGTERM then end the call softly: it returns
        what there is, marked as `partial`.

    Returns
    -------
    Eigenpairs
        Pairs that did not converge are returned too, and marked.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        k < 1, k > n, an unknown `which`, a start vector of another shape, too little memory.
    NonFiniteError
        A product holds nan or inf.
    StorageError
        There is no room on disk for the basis.

    Notes
    -----
    Whatever exception ends the search, Ctrl-C included, has an attribute `partial`: the Eigenpairs
    as they stood, their residuals not measured but as the recurrence has them, or None.

    Costs the Krylov steps (17 to 35 for ten outliers of a typical network), 5 to 12 for the
    certificate and one per pair for the residuals.

    References
    ----------
    Wu and Simon, 2000, "Thick-restart Lanczos method for large symmetric eigenvalue problems".
    Golub and Underwood, 1977, "The block Lanczos method for computing eigenvalues". Parlett, 1980,
    "The Symmetric Eigenvalue Problem" (residual bounds). Van Dorsselaer, Hochstenbach and van der
    Vorst, 2000, "Computing probabilistic bounds for extreme eigenvalues of symmetric matrices with
    the Lanczos method" (certificate).

    Examples
    --------
    >>> import numpy as np, spectra
    >>> values, vectors = spectra.eigsh(np.diag([4.0, -7.0, 1.0, 0.5]), k=2)
    >>> print(values.round(6))
    [ 4. -7.]
    >>> print(spectra.eigsh(np.diag([4.0, -7.0, 1.0, 0.5]), above=0.8).values.round(6))
    [ 4.  1. -7.]
    """
    operator = as_operator(H)
    space = operator.space
    check_eigsh_arguments(space.n, k, which, above, tol)
    count = min(_DEFAULT_COUNT, space.n) if k is None and above is None else k
    target = Target(which, count, above)
    _check_block_size(space.n, block_size)
    budget = 20 * target.expected + 200 if max_matvecs is None else max_matvecs
    least = min(-(-target.least // block_size) * block_size, space.n) + target.least
    if budget < least:
        msg = f"max_matvecs={budget} is too few: k steps and k residuals need at least {least}"
        raise ArgumentError(msg)
    generator = probes.seeded(seed)
    place, capacity = placed_basis(
        space, target.expected, ncv, memory_budget, basis, block_size=block_size
    )
    start = None if v0 is None else _start_vector(operator, v0)
    before = operator.matvecs
    krylov = Krylov(operator, capacity, generator, start, place=place, block_size=block_size)
    held = space.describe_basis(krylov.rows)
    search = Search(krylov, target, tol, budget)
    options = {
        "k": k,
        "which": which,
        "above": above,
        "tol": tol,
        "max_matvecs": budget,
        "ncv": capacity,
        "block_size": block_size,
        "certify": certify,
    }

    def result(rows: Tensor, values: np.ndarray, residuals: np.ndarray, **more: Any) -> Eigenpairs:
        order = np.argsort(-values, kind="stable")
        converged = residuals <= search.thresholds(values)
        return Eigenpairs(
            values=values[order],
            vectors=operator.native(space.reordered(rows, torch.from_numpy(order)).T),
            residuals=residuals[order],
            converged=converged[order],
            which=which,
            tol=tol,
            matvecs=operator.matvecs - before,
            above=above,
            basis_size=krylov.capacity,
            noise=search.noise,
            floor=search.floor,
            provenance={
                "operator": operator.describe(),
                "options": options,
                "basis": held,
                "seed": seed,
                "versions": versions(),
            },
            **more,
        )

    with progress_bar("eigsh", budget, progress, at_most=True) as bar:
        search.bar = bar
        try:
            search.run()
            if certify or krylov.complete:
                search.certify()
            elif search.converged:
                search.notes.append(_UNCERTIFIED)
            claimed = search.claimed_residuals()
            rows, values, residuals = search.measured(operator)
        except BaseException as error:
            # A run that is resumed ends where the products do, and so does its record.
            seal()
            if search.pairs is not None and not krylov.hollow:
                note = "interrupted: the residuals are the recurrence's own, not measured"
                partial = result(*search.unmeasured(), notes=(note,))
                with contextlib.suppress(AttributeError):
                    error.partial = partial  # type: ignore[attr-defined]
            raise
    notes = [
        *search.notes,
        *_more_notes(search, values, residuals, claimed),
        *_basis_notes(
            search, held, capacity if ncv else _usual_size(space, target.expected, block_size)
        ),
    ]
    return result(
        rows,
        values,
        residuals,
        no_eigenvalue_above=search.above,
        no_eigenvalue_below=search.below,
        certified=search.certified,
        notes=tuple(notes),
    )


def _more_notes(
    search: Search, values: np.ndarray, residuals: np.ndarray, claimed: np.ndarray
) -> list[str]:
    """What the measured residuals tell beyond the recurrence."""
    limits = search.thresholds(values)
    converged = residuals <= limits
    search.take_residuals(values, residuals)
    floor = search.floor
    notes = noise_notes(search.noise, floor)
    if not search.converged and not converged.all():
        notes.append(
            f"{int(converged.sum())} of {len(values)} pairs converged within "
            f"{search.steps + len(values)} matvecs; allow more with max_matvecs, a larger basis "
            "with ncv, or a larger tol"
        )
    elif not search.converged:
        notes.append(
            f"the budget of {search.steps + len(values)} matvecs ended before the search was sure: "
            "the residuals are within tol, but nobody looked for missed eigenvalues; allow more "
            "with max_matvecs"
        )
    # The recurrence is right up to the noise of the products; 2 leaves room for its rounding.
    lost = np.abs(values) <= floor
    surprising = ~converged & ~lost
    surprising &= search.converged | (residuals > 2 * np.maximum(claimed, limits))
    if surprising.any():
        worst = int(np.argmax(surprising * residuals / np.maximum(limits, np.finfo(float).tiny)))
        notes.append(
            f"the recurrence put the residual of {values[worst]:.4g} at {claimed[worst]:.2g}, but "
            f"it measures {residuals[worst]:.2g}: the products are less exact than tol asks for "
            "(half or single precision, or not deterministic)"
        )
    return notes


def _beyond(which: str, above: float) -> str:
    """The condition of a threshold, for people."""
    return {"LA": f"λ > {above:g}", "SA": f"λ < {-above:g}"}.get(which, f"|λ| > {above:g}")


def _basis_notes(search: Search, held: dict[str, Any], usual: int) -> list[str]:
    """A slower way to hold the basis than the usual one is said."""
    place, count = held["place"], search.krylov.capacity
    size = f"{held['vectors']} vectors, {held['bytes'] / 2**30:.2g} GiB"
    if place == "disk":
        return [f"the basis ({size}) was held on disk: every step reads it twice"]
    if place == "host":
        return [
            f"the basis ({size}) was held by the host: every step copies it to the device twice"
        ]
    if count < usual and search.steps > count:
        return [
            f"memory had room for a basis of {count} vectors, {usual} are usual: the search took "
            "more products than with more memory, or basis='disk'"
        ]
    return []


def _usual_size(space: VectorSpace, k: int, block_size: int) -> int:
    """How many basis vectors to hold where memory is no matter."""
    # By what a whole vector takes: of parts that are not equally long processes make others.
    free = min(_FREE_BYTES // space.whole_vector_bytes, _FREE_VECTORS)
    return min(space.n, max(8 * k, 8 * block_size, 80, free))


def placed_basis(
    space: VectorSpace,
    k: int,
    ncv: int | None,
    memory_budget: int | None,
    basis: Basis,
    *,
    block_size: int = 1,
) -> tuple[Place, int]:
    """Where to hold how many basis vectors."""
    n = space.n
    # Of a block more vectors wait, and have their products beside them.
    fewest, spare = min(k + 1 + block_size, n), _SPARE + 2 * (block_size - 1)
    if basis not in get_args(Basis):
        msg = f"basis={basis!r}; expected one of {', '.join(map(repr, get_args(Basis)))}"
        raise ArgumentError(msg)
    if ncv is not None and memory_budget is not None:
        msg = "ncv and memory_budget say the same in vectors and in bytes; give one of them"
        raise ArgumentError(msg)
    usual = _usual_size(space, k, block_size)
    sensible = min(max(2 * k, k + 8, 2 * block_size, fewest), n)
    room = None
    if memory_budget is not None:
        room = _vectors_in(memory_budget, space, k, basis, least=fewest + spare, spare=spare)
        if basis in {"device", "host"} or (basis == "auto" and room - spare >= sensible):
            return "device" if basis == "auto" else basis, min(room - spare, n)
    if ncv is not None:
        if not isinstance(ncv, int | np.integer):
            msg = f"ncv={ncv!r}; expected an integer number of basis vectors"
            raise ArgumentTypeError(msg)
        if ncv < fewest:
            least = "k + 2" if block_size == 1 else f"{fewest} with block_size={block_size}"
            msg = f"ncv={ncv} is too small for k={k}; expected at least {least}"
            raise ArgumentError(msg)
        usual = sensible = min(int(ncv), n)
    if basis == "auto":
        place, fitting = space.place(usual, sensible, spare=spare, room=room)
        if fitting >= sensible:
            return place, fitting
        return "disk" if room is not None else space.place_for(sensible, spare=spare), sensible
    if ncv is not None:
        return basis, usual
    # What is below that cannot work at all: then let the allocation fail and say how much it was.
    fitting = max(space.affordable(basis) - spare, fewest + CERTIFICATE_STEPS)
    return basis, min(usual, fitting)


def _vectors_in(
    memory_budget: int, space: VectorSpace, k: int, basis: Basis, *, least: int, spare: int
) -> int:
    """How many vectors a budget of memory holds, if that is enough."""
    size = max(1, space.vector_bytes)
    room = int(space.agreed(memory_budget // size))
    elsewhere, without_basis = basis in {"auto", "disk"}, spare + _WITHOUT_BASIS
    if room < (min(least, without_basis) if elsewhere else least):
        msg = (
            f"memory_budget={memory_budget:,} bytes holds {max(room - spare, 0)} vectors of "
            f"{size:,} bytes; {k} eigenpairs take at least {least * size:,}"
        )
        if elsewhere and without_basis < least:
            msg += f", or {without_basis * size:,} with their basis on disk"
        raise ArgumentError(msg)
    return room


def check_eigsh_arguments(
    n: int, k: int | None, which: str, above: float | None, tol: float
) -> None:
    """Refuse what `eigsh` cannot answer, before any product."""
    if k is not None:
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
    if above is None:
        return
    if not (isinstance(above, int | float | np.floating) and math.isfinite(above)):
        msg = f"above={above!r}; expected a finite threshold for the eigenvalues"
        raise ArgumentError(msg)
    if above < 0 and which != "LA":
        msg = (
            f"above={above} with which={which!r}; the threshold is a distance from zero there, and "
            "not negative"
        )
        raise ArgumentError(msg)


def _check_block_size(n: int, block_size: int) -> None:
    if isinstance(block_size, bool) or not isinstance(block_size, int | np.integer):
        msg = f"block_size={block_size!r}; expected an integer number of products"
        raise ArgumentTypeError(msg)
    if not 1 <= block_size <= n:
        msg = f"block_size={block_size}, but the operator is {n:,} x {n:,}; expected 1 to {n:,}"
        raise ArgumentError(msg)


def _start_vector(operator: SymmetricOperator, v0: Any) -> Tensor:
    """A start vector (n,), the sum of the unit vectors along the columns of `v0` if it has many."""
    space = operator.space
    given = v0.detach() if isinstance(v0, Tensor) else operator.from_numpy(v0)
    n = space.length if isinstance(v0, Tensor) else space.n
    if given.dim() not in {1, 2} or given.shape[0] != n or 0 in given.shape[1:] or not space.n:
        msg = f"v0 has shape {tuple(given.shape)}, expected ({n},) or ({n}, p)"
        raise ArgumentError(msg)
    columns = given.to(device=space.device, dtype=space.dtype).reshape(n, -1)
    if not isinstance(v0, Tensor):
        columns = space.own(columns.T).T
    vector = space.zeros()
    for column in columns.T:
        norm = space.norm(column)
        if not (math.isfinite(norm) and norm > 0):
            msg = f"v0 has norm {norm}; expected a finite vector other than zero"
            raise ArgumentError(msg)
        vector.add_(column, alpha=1 / norm)
    if not space.norm(vector) > 0:
        msg = "the columns of v0 add up to zero; pass linearly independent ones"
        raise ArgumentError(msg)
    return vector
