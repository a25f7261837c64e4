"""Which x solves (H + damping·I) x = b? MINRES, stopped on the residual that a product confirms.

Precision policy: vectors have the operator's dtype, the scalars of the recurrence are float64,
inner products and norms accumulate in float64, thresholds are relative to ‖A‖ and the vectors' eps.

References: Paige and Saunders, 1975, "Solution of sparse indefinite systems of linear equations",
in the notation of Choi, Paige and Saunders, 2011, "MINRES-QLP: a Krylov subspace method for
indefinite or singular symmetric systems"; Liu and Roosta, 2022, "MINRES: from negative curvature
detection to monotonicity properties"; Liu, Milzarek and Roosta, 2023, "Obtaining pseudo-inverse
solutions with MINRES".
"""

from __future__ import annotations

import contextlib
import math
import numbers
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from spectra.algorithms import probes
from spectra.algorithms.noise import Noise, noise_notes
from spectra.algorithms.progress import progress_bar
from spectra.algorithms.resuming import resumable
from spectra.errors import ArgumentError, ArgumentTypeError
from spectra.journal import Snapshots, Stopped
from spectra.operators.base import SymmetricOperator, as_operator
from spectra.results import Result, dimension, versions

if TYPE_CHECKING:
    from spectra.algorithms.eigen import Eigenpairs

__all__ = ["Solution", "solve"]

_DEFAULT_BUDGET = 300
# The recurrence stops a little below what was asked, so that rounding between its residual and the
# measured one does not cost a restart; most steps gain more than this.
_MARGIN = 0.99
# A restart has to gain this much; otherwise the products' rounding or noise is the limit.
_WORTH_A_RESTART = 0.5
# A residual that falls by less than this share in so many steps has stopped falling. Far from
# singular, but hard, spectra of networks have plateaus of 2e-3.
_FLAT, _FLAT_STEPS = 1e-4, 10
# ‖A r‖ / (‖A‖ ‖r‖) of a null vector is at most rtol, but never more than this for a large rtol.
_NULL = 1e-3
# The minimum-length correction may make the least residual larger by this share.
_SHORTER_AT_MOST = 1e-3


@dataclass(frozen=True, eq=False)
class Solution(Result):
    """The solution of (H + damping·I) x = b with its measured residual.

    Attributes
    ----------
    x
        (n,) a torch tensor on the operator's device where operator and b are torch, else a NumPy
        array.
    residual, relative_residual
        ‖(H + damping·I) x − b‖, measured by a product, and the same divided by ‖b‖. The distance
        to the exact solution is at most residual / min|λ + damping|.
    converged
        Whether relative_residual <= rtol.
    matvecs
        Products spent, the measuring ones included.
    rtol, damping
        As asked.
    method
        "MINRES", and how many eigenpairs preconditioned it.
    least_squares
        The residual r stopped falling above rtol and is a null vector of A = H + damping·I:
        ‖A r‖ / (‖A‖ ‖r‖) is measured to be at most rtol (or 1e-3 if that is less, or 10 √eps if
        that is more). No other vector has a residual that is noticeably smaller.
    negative_curvature
        vᵀ(H + damping·I) v of the unit vector v = `direction`, the most negative value met on the
        way: the smallest eigenvalue of H + damping·I is at most that. None where none was met,
        which is no proof that there is none.
    direction
        (n,) as x; None without negative curvature.
    noise
        Relative error of a product, measured from how unsymmetric the products were.
    floor
        noise · ‖b‖: no residual below it can be relied on.
    notes
        What to know before believing the numbers, in words.
    """

    x: Any
    residual: float
    relative_residual: float
    converged: bool
    matvecs: int
    rtol: float
    damping: float = 0.0
    method: str = "MINRES"
    least_squares: bool = False
    negative_curvature: float | None = None
    direction: Any = None
    noise: float = math.nan
    floor: float = math.nan
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        matrix = "H"
        if self.damping:
            matrix = f"(H {'-' if self.damping < 0 else '+'} {abs(self.damping):g} I)"
        measured = "not measured" if self.partial else "measured"
        verdict = "converged to" if self.converged else "not converged to"
        lines = [
            f"x of {matrix} x = b, n = {dimension(self, len(self.x)):,}: "
            f"‖{matrix} x − b‖ = {self.residual:.3g}, {self.relative_residual:.2g} of ‖b‖ "
            f"({measured}), {verdict} rtol = {self.rtol:g} ({self.method}; {self.matvecs} matvecs)"
        ]
        if self.negative_curvature is not None:
            lines.append(
                f"negative curvature: vᵀ{matrix}v = {self.negative_curvature:.4g} for the unit "
                "vector v = direction; the smallest eigenvalue is at most that"
            )
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


@resumable
def solve(
    H: Any,
    b: Any,
    *,
    damping: float = 0.0,
    rtol: float = 1e-3,
    deflate: Eigenpairs | None = None,
    max_matvecs: int | None = None,
    ncv: int = 20,
    progress: bool | None = None,
    checkpoint: str | Path | None = None,
) -> Solution:
    """The solution of (H + damping·I) x = b for a symmetric operator or matrix.

    MINRES: of all vectors in the Krylov space of b, the one with the smallest residual; for
    positive definite and indefinite operators alike. Nothing in it is random.

    Parameters
    ----------
    H
        An operator, a torch or NumPy matrix, a SciPy sparse matrix or LinearOperator.
    b
        Right-hand side (n,): a torch tensor of the operator's dtype on its device, or NumPy.
    damping
        Multiple of the identity to add. It decides about the cost: the number of products grows
        with ‖H + damping·I‖ / min|λ + damping|.
    rtol
        Stop when ‖(H + damping·I) x − b‖ <= rtol · ‖b‖.
    deflate
        Eigenpairs of the same operator, from `eigsh`. They precondition, so that outlying
        eigenvalues cost no steps. Inexact ones help less; the solution stays right.
    max_matvecs
        Stop after this many products, marked as not converged. Default 300.
    ncv
        How many of the first Lanczos vectors to hold and keep the later ones orthogonal to. 0 is
        the textbook's MINRES.
    progress
        Show a progress bar; None for on a terminal only.
    checkpoint
        A file for what is computed, from which the same call goes on after a crash or a kill; see
        docs/resuming.md. Ctrl-C and SIGTERM then end the call softly: it returns
        what there is, marked as `partial`.

    Returns
    -------
    Solution
        With a measured residual. What did not converge is returned too, and marked. b = 0 gives
        x = 0 without a product.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        b has another shape or dtype or holds nan or inf; impossible options; eigenpairs of another
        operator.
    NonFiniteError
        A product holds nan or inf.

    Notes
    -----
    Costs one product a step and one that measures the residual. Where rounding or noise has spoiled
    the recurrence, MINRES starts again from the measured residual, as long as that helps. On the
    spectrum of a typical network (ten outliers up to 100, bulk below 0.3, smallest −0.3) a residual
    of 1e-3 takes, all counted, 16 products with damping 0.5 and 23 with 0.31; 7 and 13 with the ten
    outliers in `deflate`; 450 to 1,000 without damping.

    Memory is about ncv + 14 vectors of length n, temporary ones included, however many steps;
    `deflate` adds a copy of its vectors and one more. What the held vectors are for: outlying
    eigenvectors converge within the first few steps and would come back again and again by
    rounding, but lie in the span of the first Lanczos vectors, so that orthogonality to those is
    enough to keep them away. It saves 10 to 60 % of the products in float64, a third to four fifths
    in float32.

    A singular system that has a solution gets the one of minimum length (with `deflate`, to the
    accuracy of its pairs). One that has none gets the least-squares solution, of minimum length
    where rounding allows, and says so; `converged` is False.

    Negative curvature costs no products: the residuals of MINRES show it as soon as the Krylov
    space holds a direction of it.

    References
    ----------
    Paige and Saunders, 1975, "Solution of sparse indefinite systems of linear equations". Liu and
    Roosta, 2022, "MINRES: from negative curvature detection to monotonicity properties". Liu,
    Milzarek and Roosta, 2023, "Obtaining pseudo-inverse solutions with MINRES". Paige, 1980,
    "Accuracy and effectiveness of the Lanczos algorithm for the symmetric eigenproblem" (what
    comes back).

    Examples
    --------
    >>> import numpy as np, spectra
    >>> solution = spectra.solve(np.diag([4.0, -2.0]), np.array([1.0, 1.0]))
    >>> print(solution.x.round(6), solution.converged)
    [ 0.25 -0.5 ] True
    """
    operator = as_operator(H)
    budget = _DEFAULT_BUDGET if max_matvecs is None else max_matvecs
    _check_options(damping, rtol, budget, ncv)
    target = _right_hand_side(operator, b)
    shifted = _Shifted(operator, float(damping))
    preconditioner = None if deflate is None else _Preconditioner(shifted, deflate)
    refinement = _Refinement(shifted, target, preconditioner, rtol=rtol, budget=budget, ncv=ncv)
    with progress_bar("solve", budget, progress, at_most=True) as bar:
        shifted.bar = bar
        # Stopped with nothing found yet, x = 0 has the residual b.
        with contextlib.suppress(Stopped):
            refinement.run()
    pairs = 0 if deflate is None else len(deflate.values)
    noise = shifted.noise.relative
    floor = noise * operator.space.norm(target)
    curvature, direction = refinement.curvature, refinement.direction
    return Solution(
        x=_handed_back(operator, refinement.x, b),
        residual=refinement.norm,
        relative_residual=refinement.relative,
        converged=refinement.converged,
        matvecs=shifted.spent,
        rtol=rtol,
        damping=float(damping),
        method=f"MINRES, preconditioned by {pairs} eigenpairs" if pairs else "MINRES",
        least_squares=refinement.least_squares,
        negative_curvature=None if direction is None else curvature,
        direction=None if direction is None else _handed_back(operator, direction, b),
        noise=noise,
        floor=floor,
        notes=(*refinement.notes, *noise_notes(noise, floor)),
        provenance={
            "operator": operator.describe(),
            "options": {
                "damping": float(damping),
                "rtol": rtol,
                "deflate": pairs,
                "max_matvecs": budget,
                "ncv": ncv,
            },
            "versions": versions(),
        },
    )


class _Shifted:
    """A = H + damping·I, how many products with it were made, and what is known of its norm."""

    def __init__(self, operator: SymmetricOperator, damping: float) -> None:
        self.operator = operator
        self.space = operator.space
        self.damping = damping
        self.spent = 0
        self.bar: Any = None
        # A lower bound of ‖A‖, from the columns of the tridiagonal matrix and from known values.
        self.norm = 0.0
        self.noise = Noise(self.space.n)

    def apply(self, vector: Tensor) -> Tensor:
        product = self.operator.apply(vector)
        self.spent += 1
        self.bar.update()
        self.noise.watch(self.space, vector, product, successive=True)
        # Never in place: an operator may hand out memory that is not the caller's.
        return torch.add(product, vector, alpha=self.damping)


class _Preconditioner:
    """M = I + Q (W − I) Qᵀ, positive definite, under which known eigenvalues t of A become ±μ.

    Chosen by measurement. With residuals of 1e-3 in the pairs it takes no more products than with
    exact ones, with 0.1 one more; the known components as initial guess take twice as many then,
    and exact projection up to ten times as many.
    """

    def __init__(self, shifted: _Shifted, pairs: Eigenpairs) -> None:
        deflation = probes.Deflation(shifted.operator, pairs)
        self.space = shifted.space
        self.basis = deflation.basis
        self.values = deflation.values + shifted.damping
        sizes = np.abs(self.values)
        shifted.norm = max(shifted.norm, float(sizes.max()))
        nonzero = sizes > 10 * self.space.eps * shifted.norm
        weights = np.ones(len(sizes))
        if nonzero.any():
            aim = _middle_of_the_rest(pairs, shifted.damping, sizes[nonzero])
            # Not smaller: rows that are orthonormal to rounding would make M indefinite.
            weights[nonzero] = np.maximum(aim / sizes[nonzero], self.space.eps**0.5)
        self._change = torch.from_numpy(weights - 1.0).to(self.space.device)

    def apply(self, vector: Tensor) -> Tensor:
        """M times a vector; no product with A."""
        space = self.space
        return vector + space.combine(self.basis, self._change * space.project(self.basis, vector))


def _middle_of_the_rest(pairs: Eigenpairs, damping: float, sizes: np.ndarray) -> float:
    """Where known eigenvalues of A cost no steps of their own: amid those that are not known.

    The certificate of the pairs says how far the rest reaches; at its edge, known values cost half
    a step more (measured).
    """
    ends = (pairs.no_eigenvalue_above, pairs.no_eigenvalue_below)
    edges = [abs(end + damping) for end in ends if end is not None]
    edge = max(edges, default=0.0) or float(sizes.min())
    return min(edge, float(sizes.max())) / 2


class _Minres:
    """MINRES for A e = r from e = 0: one product a step, a fixed number of vectors.

    Lanczos vectors z and the residual live in the space of products; M maps them to the space of
    solutions, where the images y = M z and the directions live. Without M the two are one. Letters
    are those of Choi, Paige and Saunders (2011), table 2.

    Parameters
    ----------
    residual
        r, not zero.
    ncv
        How many Lanczos vectors to hold.
    small
        Share of ‖A‖ below which ‖A r‖ / ‖r‖ may be taken for zero once the residual stops falling.
    """

    # What a step reads and leaves as it is.
    _OUTSIDE = ("_shifted", "_space", "_preconditioner")

    def __init__(
        self,
        shifted: _Shifted,
        residual: Tensor,
        preconditioner: _Preconditioner | None,
        ncv: int,
        small: float,
    ) -> None:
        space = shifted.space
        self._shifted, self._space = shifted, space
        self._preconditioner = preconditioner
        self._small = small
        self.residual = residual.clone()
        self.norm = space.norm(residual)
        self.correction = space.zeros()
        self.singular = False
        """The residual is a null vector of A: no step can make it smaller."""
        self.slope = math.inf
        """‖A r‖ / ‖r‖ (in the norms of M) of the residual before the last step."""
        self.least: Tensor | None = None
        """The correction whose residual is the nearest to a null vector, if any comes near."""
        self._least_slope = self._least_phi = math.inf
        self.curvature = 0.0
        """vᵀAv of the unit vector v = `direction`, the most negative so far, or 0."""
        self.direction: Tensor | None = None
        self._lowest = 0.0
        self._z, self._y, self._phi = self._normalised(residual.clone())
        self._z_before = space.zeros()
        self._held, self._num_held = space.basis(ncv), 0
        self._directions = (space.zeros(), space.zeros())
        self._beta, self._cosine, self._sine = 0.0, -1.0, 0.0
        self._delta, self._epsilon = 0.0, 0.0
        self._falls: deque[float] = deque([self._phi], maxlen=_FLAT_STEPS + 1)

    def step(self) -> None:
        """One product, and the iterate with the least residual in the larger Krylov space."""
        c, s = self._cosine, self._sine
        alpha, beta, z, y = self._lanczos()
        rounding = 10 * self._space.eps * self._shifted.norm
        gamma = s * self._delta - c * alpha
        self._look_for_curvature(-c * gamma, rounding)
        self.slope = math.hypot(gamma, c * beta)
        self._shortlist()
        if self.slope <= rounding:
            self.singular = True
            return
        self._advance(c * self._delta + s * alpha, gamma, beta)
        self._delta, self._epsilon = -c * beta, s * beta
        self._z_before, self._z, self._y, self._beta = self._z, z, y, beta
        c, s = self._cosine, self._sine
        self.residual.mul_(s * s).add_(z, alpha=-self._phi * c)
        self.norm = self._space.norm(self.residual)
        self._falls.append(self._phi)
        flat = len(self._falls) > _FLAT_STEPS and self._phi > (1 - _FLAT) * self._falls[0]
        self.singular = flat and self.least is not None and self._phi > 0.99 * self._least_phi

    def state(self) -> dict[str, Any]:
        """All that the next step goes on from."""
        own = {name: value for name, value in vars(self).items() if name not in self._OUTSIDE}
        shifted = self._shifted
        return {
            "own": {**own, "_falls": list(self._falls)},
            "shifted": (shifted.spent, shifted.norm, shifted.noise.state),
        }

    def restore(self, known: dict[str, Any]) -> None:
        """Go on from a `state`."""
        falls, held = known["own"].pop("_falls"), known["own"].pop("_held")
        self._falls.extend(falls)
        self._held.copy_(held)
        for name, value in known["own"].items():
            setattr(self, name, self._on_device(value))
        shifted = self._shifted
        spent, shifted.norm, shifted.noise.state = known["shifted"]
        shifted.bar.update(spent - shifted.spent)
        shifted.spent = spent

    def _on_device(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(self._on_device, value))
        return self._space.local(value) if isinstance(value, Tensor) else value

    def _shortlist(self) -> None:
        """Keep the iterate before this step if its residual is the nearest to a null vector."""
        if self.slope > self._small * self._shifted.norm:
            return
        if self.slope < self._least_slope or self._phi < 0.99 * self._least_phi:
            self._least_slope, self._least_phi = self.slope, self._phi
            self.least = self.correction.clone()

    def _lanczos(self) -> tuple[float, float, Tensor, Tensor]:
        """One column α, β of T, and the next Lanczos vector with its image."""
        space, z = self._space, self._shifted.apply(self._y)
        z.add_(self._z_before, alpha=-self._beta)
        alpha = space.inner(self._y, z)
        z.add_(self._z, alpha=-alpha)
        if self._num_held < len(self._held):
            self._held[self._num_held] = self._z
            self._num_held += 1
        if self._num_held:
            held = self._held[: self._num_held]
            space.subtract(z, held, space.project(held, self._mapped(z)))
        z, y, beta = self._normalised(z)
        self._shifted.norm = max(self._shifted.norm, math.hypot(self._beta, alpha, beta))
        return alpha, beta, z, y

    def _normalised(self, z: Tensor) -> tuple[Tensor, Tensor, float]:
        """`z`, in place, of unit length in the norm of M; its image; its length before."""
        length = self._space.norm(z)
        if length == 0.0:
            return z, z, 0.0
        # In two steps: squares of small numbers underflow in single precision.
        z.div_(length)
        if self._preconditioner is None:
            return z, z, length
        y = self._preconditioner.apply(z)
        root = math.sqrt(max(self._space.inner(z, y), self._space.eps))
        return z.div_(root), y.div_(root), length * root

    def _advance(self, delta: float, gamma: float, beta: float) -> None:
        """The next direction, in the memory of the last but one, and the step along it."""
        last, oldest = self._directions
        pivot = math.hypot(gamma, beta)
        self._cosine, self._sine = gamma / pivot, beta / pivot
        oldest.mul_(-self._epsilon).add_(last, alpha=-delta).add_(self._y).div_(pivot)
        self._directions = (oldest, last)
        self.correction.add_(oldest, alpha=self._cosine * self._phi)
        self._phi *= self._sine

    def _look_for_curvature(self, quotient: float, rounding: float) -> None:
        """The residual before this step has the Rayleigh quotient −c γ (Liu and Roosta, 2022)."""
        if quotient >= min(self._lowest, -rounding):
            return
        self._lowest = quotient
        direction = self._mapped(self.residual)
        length = self._space.norm(direction)
        self.direction = direction / length
        self.curvature = quotient * (self._phi / length) ** 2

    def _mapped(self, z: Tensor) -> Tensor:
        return z if self._preconditioner is None else self._preconditioner.apply(z)


class _Outcome(NamedTuple):
    """How a run of MINRES ended: what is left of it when its vectors are gone."""

    finished: bool  # the budget did not end it
    singular: bool
    claimed: float  # ‖r‖ as the recurrence has it
    slope: float


class _Refinement:
    """Runs of MINRES, each from the residual that a product measured, until it is small enough."""

    def __init__(
        self,
        shifted: _Shifted,
        b: Tensor,
        preconditioner: _Preconditioner | None,
        *,
        rtol: float,
        budget: int,
        ncv: int,
    ) -> None:
        self._shifted, self._space = shifted, shifted.space
        self._b = b
        self._preconditioner = preconditioner
        self._rtol = rtol
        self._budget = budget
        self._ncv = min(ncv, self._space.n)
        # A change of r by √eps ‖r‖ does not show in ‖r‖: ‖A r‖ / ‖r‖ gets no smaller than that.
        self._null = max(min(rtol, _NULL), 10 * self._space.eps**0.5)
        self._residual = self._image = b
        self._slope = math.inf
        self.x = self._space.zeros()
        self.norm = self._norm_of_b = self._space.norm(b)
        self.least_squares = False
        self.curvature = 0.0
        self.direction: Tensor | None = None
        self.notes: list[str] = []

    @property
    def converged(self) -> bool:
        """Whether the measured residual is what was asked for."""
        return self.norm <= self._rtol * self._norm_of_b

    @property
    def relative(self) -> float:
        """The measured residual over ‖b‖."""
        return self.norm / self._norm_of_b if self._norm_of_b > 0 else 0.0

    def run(self) -> None:
        """Restart until the measured residual is small enough, or nothing more can be gained."""
        if self._preconditioner is not None:
            self._look_for_known_curvature(self._preconditioner)
        while not self.converged:
            norm, slope = self.norm, self._slope
            outcome = self._attempt()
            if self.converged:
                return
            if outcome.singular and self._is_null_vector():
                self._say_least_squares(shortest=self._shorten())
                return
            if not outcome.finished or self._left() < 2:
                self._say_that_the_budget_ended(outcome)
                return
            if outcome.singular:
                gained = self._slope <= _WORTH_A_RESTART * slope
            else:
                gained = self.norm <= _WORTH_A_RESTART * norm
            if self._preconditioner is not None and (outcome.singular or not gained):
                # The least residual in the norm of M is another one; and pairs that are none of
                # this operator's may be in the way.
                self._preconditioner = None
            elif not gained:
                self._say_that_products_limit(outcome)
                return

    def _left(self) -> int:
        return self._budget - self._shifted.spent

    def _attempt(self) -> _Outcome:
        """One run of MINRES, and the product that measures what it gained."""
        ncv = min(self._ncv, self._left())
        minres = _Minres(
            self._shifted, self._residual, self._preconditioner, ncv, small=0.1 * self._null
        )
        enough = _MARGIN * self._rtol * self._norm_of_b
        snapshots: Snapshots | None = None
        try:
            while minres.norm > enough and not minres.singular and self._left() > 1:
                minres.step()
                self._shifted.bar.tell(f"residual {minres.norm / self._norm_of_b:.0e}")
                if snapshots is not None:
                    snapshots.round()
                elif self._shifted.noise.settled:
                    snapshots = Snapshots("MINRES", minres.state, minres.restore)
        except Stopped:
            self._take_unmeasured(minres)
            raise
        if minres.curvature < self.curvature:
            self.curvature, self.direction = minres.curvature, minres.direction
        claimed, singular = minres.norm, minres.singular
        nearest = minres.least
        x, residual, norm = self._measured(
            nearest if singular and nearest is not None else minres.correction
        )
        # Where A is singular the recurrence may go on beyond the least-squares solution and lie.
        lied = norm > 2 * claimed and norm > _WORTH_A_RESTART * self.norm
        if lied and not singular and nearest is not None and self._left() > 0:
            x, residual, norm = self._measured(nearest)
            singular = True
        if norm <= self.norm:
            self.x, self._residual, self.norm = x, residual, norm
        finished = claimed <= enough or singular
        return _Outcome(finished, singular, claimed, minres.slope)

    def _take_unmeasured(self, minres: _Minres) -> None:
        """The solution as it stands where no product can be made any more."""
        if minres.norm <= self.norm:
            self.x, self._residual, self.norm = (
                self.x + minres.correction,
                minres.residual,
                minres.norm,
            )
            self.notes.append("the residual is the recurrence's own, not measured")
        if minres.curvature < self.curvature:
            self.curvature, self.direction = minres.curvature, minres.direction

    def _measured(self, correction: Tensor) -> tuple[Tensor, Tensor, float]:
        """The corrected solution, its residual and the norm of that: one product."""
        x = self.x + correction
        residual = self._b - self._shifted.apply(x)
        return x, residual, self._space.norm(residual)

    def _is_null_vector(self) -> bool:
        """Whether a product confirms that the residual is a null vector of A."""
        if self._left() < 1:
            return False
        self._image = self._shifted.apply(self._residual)
        self._slope = self._space.norm(self._image) / self.norm
        self.least_squares = self._slope <= self._null * self._shifted.norm
        return self.least_squares

    def _shorten(self) -> bool:
        """Take the null vector out of x unless that makes the residual larger; no product.

        All that any iterate has of the null space lies along its residual (Liu, Milzarek and
        Roosta, 2023), whose product was just measured.
        """
        share = self._space.inner(self._residual, self.x) / self.norm**2
        residual = torch.add(self._residual, self._image, alpha=share)
        norm = self._space.norm(residual)
        if norm > (1 + _SHORTER_AT_MOST) * self.norm:
            return False
        self.x.add_(self._residual, alpha=-share)
        self._residual, self.norm = residual, norm
        return True

    def _look_for_known_curvature(self, preconditioner: _Preconditioner) -> None:
        """A known eigenvalue below zero is negative curvature for nothing."""
        place = int(np.argmin(preconditioner.values))
        value = float(preconditioner.values[place])
        if value < -10 * self._space.eps * self._shifted.norm:
            self.curvature = value
            self.direction = self._space.local(preconditioner.basis[place]).clone()

    def _say_that_the_budget_ended(self, outcome: _Outcome) -> None:
        nearest = ""
        if self._preconditioner is None and math.isfinite(outcome.slope):
            nearest = (
                f". What makes it slow: H has an eigenvalue within {outcome.slope:.2g} of "
                f"{0.0 - self._shifted.damping:g}"
            )
        self.notes.append(
            f"relative residual {self.relative:.2g} after {self._shifted.spent} matvecs, "
            f"{self._rtol:g} was asked for; allow more with max_matvecs, add damping, or pass "
            f"deflate=spectra.eigsh(H, …){nearest}"
        )

    def _say_least_squares(self, *, shortest: bool) -> None:
        length = ", of minimum length" if shortest else ", not the shortest, because of rounding"
        self.notes.append(
            f"the residual stopped falling at {self.relative:.2g} of ‖b‖ and is a null vector of "
            f"the matrix, ‖A r‖ = {self._slope:.2g} ‖r‖ (measured): b is not in its range. x is "
            f"the least-squares solution{length}; damping well above {self._slope:.2g} makes the "
            "system solvable"
        )

    def _say_that_products_limit(self, outcome: _Outcome) -> None:
        claimed = outcome.claimed / self._norm_of_b
        self.notes.append(
            f"the recurrence took the relative residual for {claimed:.2g}, a product measured "
            f"{self.relative:.2g}, and starting again from there gains nothing: the products are "
            "less exact than rtol asks for (half or single precision, not deterministic, or not "
            "symmetric)"
        )


def _check_options(damping: float, rtol: float, max_matvecs: int, ncv: int) -> None:
    if not isinstance(damping, numbers.Real) or not math.isfinite(damping):
        msg = f"damping={damping!r}; expected a finite number, such as 0.1"
        raise ArgumentError(msg)
    if not isinstance(rtol, numbers.Real) or not 0 < rtol < 1:
        msg = f"rtol={rtol!r}; expected a relative residual between 0 and 1, such as 1e-3"
        raise ArgumentError(msg)
    for name, value, least in (("max_matvecs", max_matvecs, 2), ("ncv", ncv, 0)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            msg = f"{name}={value!r}; expected an integer >= {least}"
            if name == "max_matvecs":
                msg += ", for one step and the product that measures its residual"
            raise ArgumentError(msg)


def _right_hand_side(operator: SymmetricOperator, b: Any) -> Tensor:
    space = operator.space
    parts = isinstance(b, list | tuple) and any(isinstance(part, Tensor) for part in b)
    if isinstance(b, Mapping) or parts:
        msg = f"b is a {type(b).__name__} of tensors; pass the flat vector H.space.flatten(b)"
        raise ArgumentTypeError(msg)
    vector = b.detach() if isinstance(b, Tensor) else operator.from_numpy(b)
    n = space.length if isinstance(b, Tensor) else space.n
    if vector.shape != (n,):
        hint = "; pass b.reshape(-1)" if vector.numel() == n else ""
        msg = f"b has shape {tuple(vector.shape)}, expected ({n},){hint}"
        raise ArgumentError(msg)
    if not isinstance(b, Tensor):
        vector = space.own(vector)
    if vector.dtype != space.dtype:
        msg = f"b is {vector.dtype}, the operator {space.dtype}; pass b.to({space.dtype})"
        raise ArgumentTypeError(msg)
    if vector.device != space.device:
        msg = f"b is on {vector.device}, the operator on {space.device}; pass b.to(H.space.device)"
        raise ArgumentError(msg)
    bad = int(space.summed((~torch.isfinite(space.counted(vector))).sum()))
    if bad:
        msg = (
            f"b holds {bad} non-finite of {space.n} entries; if it is a gradient, the loss is "
            "probably nan or inf at these parameters, or overflows in its precision"
        )
        raise ArgumentError(msg)
    return vector


def _handed_back(operator: SymmetricOperator, vector: Tensor, b: Any) -> Any:
    """A tensor where operator and b are torch, else NumPy, as `H @ b` would give it."""
    if isinstance(b, Tensor):
        return operator.native(vector)
    return operator.space.whole(vector).cpu().numpy()
