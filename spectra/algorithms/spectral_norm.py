"""What is the largest |eigenvalue|? Power iteration and Lanczos, between bounds that hold."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy import special
from torch import Tensor

from spectra.algorithms import probes
from spectra.algorithms.estimate import Estimate
from spectra.algorithms.lanczos import Krylov, upper_bound
from spectra.algorithms.noise import Noise, noise_notes
from spectra.algorithms.progress import progress_bar
from spectra.journal import Snapshots, Stopped
from spectra.operators.base import SymmetricOperator

__all__ = ["lanczos", "power_iteration"]

_CONFIDENCE = 0.99
# A basis of so many vectors in memory is preferred to a larger one on disk.
_ENOUGH = 50


def power_iteration(
    operator: SymmetricOperator,
    *,
    tol: float,
    max_matvecs: int,
    seed: int,
    progress: bool | None,
    provenance: dict[str, Any],
) -> Estimate:
    """ρ = ‖Hx‖ for the iterate x, until ‖H²x − ρ²x‖ <= tol ρ²; see `norm`."""
    space = operator.space
    iteration = _Iteration(operator, probes.sphere(space, probes.seeded(seed)))
    with progress_bar("power iteration", max_matvecs, progress, at_most=True) as bar:
        iteration.run(tol, max_matvecs, bar)
    x, y, rho = iteration.x, iteration.y, iteration.rho
    steps, residual, noise = iteration.steps, iteration.residual, iteration.noise
    rounding = 4 * space.eps * rho
    signs, note = _signs(operator, x, y, rho, residual)
    upper = rho + rounding
    if rho > 0:
        smallest = math.sqrt(
            special.betaincinv(0.5, (space.n - 1) / 2, 1 - _CONFIDENCE) if space.n > 1 else 1.0
        )
        upper = max(upper, math.exp((iteration.log_growth - math.log(smallest)) / steps))
    notes = [note] if note else []
    # What the noise may have added to the norm of a product, or to that of all.
    moved = 0.0 if math.isnan(noise.relative) else noise.relative * rho
    converged = residual <= tol
    if not converged:
        notes.append(
            f"the residual is {residual:.2g} after {steps} products, {tol:g} was asked for; the "
            "value is a lower bound, and method='lanczos' converges in far fewer products"
        )
    return Estimate(
        quantity="spectral norm",
        value=rho,
        standard_error=math.nan,
        bounds=(rho - rounding - moved, upper + moved),
        bounds_confidence=_CONFIDENCE,
        converged=converged,
        method=f"power iteration, relative residual {residual:.2g}, {signs}",
        matvecs=steps,
        notes=(*notes, *noise_notes(noise.relative, noise.relative * rho)),
        noise=noise.relative,
        floor=noise.relative * rho,
        provenance=provenance,
    )


class _Iteration:
    """Power iteration from a unit vector x: y = Hx and ρ = ‖y‖ of the last one."""

    _FIELDS = ("x", "y", "rho", "log_growth", "steps", "residual")

    def __init__(self, operator: SymmetricOperator, x: Tensor) -> None:
        self._operator = operator
        self.x, self.y = x, operator.space.zeros()
        self.rho = self.log_growth = 0.0
        self.steps = 0
        self.residual = math.inf
        self.noise = Noise(operator.space.n)

    def run(self, tol: float, max_matvecs: int, bar: Any) -> None:
        """Iterate until the residual of H² is small enough."""
        snapshots: Snapshots | None = None
        while self.steps < max_matvecs:
            try:
                self._step()
            except Stopped:
                if self.steps == 0:
                    raise
                return
            bar.update()
            bar.tell(f"ρ = {self.rho:.4g}, residual {self.residual:.0e}")
            # A random x lies in the null space with probability 0: then the operator is zero.
            if self.rho == 0.0 or self.residual <= tol:
                return
            if snapshots is not None:
                snapshots.round()
            elif self.noise.settled:
                before = self.steps
                snapshots = Snapshots("power iteration", self._state, self._restore)
                bar.update(self.steps - before)

    def _step(self) -> None:
        space = self._operator.space
        p, rho_p = self.x, self.rho
        x = p if self.steps == 0 else self.y / rho_p
        y = self._operator.apply(x)
        self.noise.watch(space, x, y, successive=True)
        rho = space.norm(y)
        if rho == 0.0:
            self.residual = 0.0
        else:
            self.log_growth += math.log(rho)
            if self.steps > 0:
                # x = Hp/ρp with p the iterate before, so Hy-type products give H²p for nothing.
                self.residual = space.norm(y.mul(rho_p).sub_(p, alpha=rho_p**2)) / rho_p**2
        self.x, self.y, self.rho = x, y, rho
        self.steps += 1

    def _state(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._FIELDS} | {"noise": self.noise.state}

    def _restore(self, known: dict[str, Any]) -> None:
        self.noise.state = known.pop("noise")
        for name, value in known.items():
            setattr(self, name, value)
        self.x, self.y = map(self._operator.space.local, (self.x, self.y))


def lanczos(
    operator: SymmetricOperator,
    *,
    tol: float,
    max_matvecs: int,
    seed: int,
    progress: bool | None,
    provenance: dict[str, Any],
) -> Estimate:
    """Largest |Ritz value| L, until the upper bound U of both ends has (U − L) / L <= tol.

    The bound is about the start vector, and so holds at all steps or at none: looking at it after
    every step costs no confidence.
    """
    space = operator.space
    place, fitting = space.place(max_matvecs, _ENOUGH)
    capacity = max(2, fitting)
    krylov = Krylov(operator, capacity, probes.seeded(seed), place=place)
    provenance = {**provenance, "basis": space.describe_basis(krylov.rows)}
    betas: list[float] = []
    # Half of the risk for either end.
    confidence = (1 + _CONFIDENCE) / 2
    largest = upper = gap = math.inf
    ritz = np.zeros(1)
    with progress_bar("Lanczos", capacity, progress, at_most=True) as bar:
        while not (krylov.full or krylov.exhausted or gap <= tol):
            try:
                krylov.step()
            except Stopped:
                if not betas:
                    raise
                break
            betas.append(krylov.beta)
            bar.update()
            ritz = krylov.ritz().values
            largest = float(np.abs(ritz).max())
            beside = np.array(betas)
            above = upper_bound(ritz, beside, space.n, confidence)
            below = upper_bound(-ritz, beside, space.n, confidence)
            upper = max(largest, above, below)
            gap = (upper - largest) / largest if largest > 0 else 0.0
            bar.tell(f"between {largest:.4g} and {upper:.4g}")
    rounding = 4 * space.eps * largest
    noise = krylov.noise.relative
    floor = noise * largest
    notes = noise_notes(noise, floor)
    moved = 0.0 if math.isnan(floor) else floor
    converged = gap <= tol
    if not converged:
        notes.append(
            f"the bounds are {gap:.2g} apart, relative, after {krylov.size} products, {tol:g} was "
            "asked for; the value is a lower bound: raise max_matvecs"
        )
    sign = "positive" if ritz[-1] >= -ritz[0] else "negative"
    method = f"Lanczos, the largest found is {sign}" if largest > 0 else "Lanczos, zero operator"
    return Estimate(
        quantity="spectral norm",
        value=largest,
        standard_error=math.nan,
        bounds=(largest - rounding - moved, upper + rounding + moved),
        bounds_confidence=_CONFIDENCE,
        converged=converged,
        method=method,
        matvecs=krylov.size,
        notes=tuple(notes),
        noise=noise,
        floor=floor,
        provenance=provenance,
    )


def _signs(
    operator: SymmetricOperator, x: Tensor, y: Tensor, rho: float, residual: float
) -> tuple[str, str]:
    """Which of +ρ and −ρ are eigenvalues, from the components of x along y ± ρx."""
    if rho == 0.0:
        return "zero operator", ""
    quotient = operator.space.inner(x, y) / rho
    # x = a u₊ + b u₋ with a² + b² = 1 has the quotient a² − b².
    positive, negative = (1 + quotient) / 2, (1 - quotient) / 2
    minor = min(positive, negative)
    # At most (residual / 0.1)² of x belongs to eigenvalues whose squares are off ρ² by a tenth.
    if minor > (residual / 0.1) ** 2 + 100 * operator.space.eps:
        return "both signs", (
            f"eigenvalues near both +{rho:.4g} and −{rho:.4g}: the iterate is a mixture of their "
            "eigenvectors"
        )
    if minor > 0.1:
        return "sign not settled", ""
    return f"dominant eigenvalue {'positive' if positive > negative else 'negative'}", ""
