"""How are the eigenvalues distributed? Nodes and weights of a Lanczos quadrature.

The spectral density is the measure (1/n) Σ δ(λ − λ_i). Each probe's Lanczos run gives a Gauss
quadrature of it; nodes and weights are kept, and curve, distribution function and moments are views
of them. Numbers come from nodes, never from the broadened curve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from spectra.algorithms import probes as random_probes
from spectra.algorithms.estimate import check_confidence
from spectra.algorithms.lanczos import Krylov
from spectra.algorithms.progress import progress_bar
from spectra.errors import ArgumentError
from spectra.operators.base import as_operator
from spectra.results import Result, versions

if TYPE_CHECKING:
    from spectra.algorithms.eigen import Eigenpairs

__all__ = ["SpectralDensity", "check_counts", "spectral_density"]

# Width of a node's Gaussian in units of its distance to the neighbours. Papyan (2020) takes
# 1 / sqrt(8 ln 3) = 0.34 of the mean distance for all nodes; twice that, and locally, leaves no
# isolated spike between the nodes of a few probes.
_RELATIVE_WIDTH = 2 / math.sqrt(8 * math.log(3.0))


@dataclass(frozen=True, eq=False)
class SpectralDensity(Result):
    """The distribution of eigenvalues as nodes and weights.

    Attributes
    ----------
    nodes, weights
        (probes, steps) quadrature of each probe; a probe's weights sum to the share of the spectrum
        that was not deflated, (n − r)/n. A run that ended early is padded with weight 0.
    atoms
        (r,) deflated eigenvalues, each of mass 1/n exactly.
    n
        Number of eigenvalues.
    matvecs, notes
        Cost, and what to know before believing it.
    """

    nodes: np.ndarray
    weights: np.ndarray
    n: int
    atoms: np.ndarray = field(default_factory=lambda: np.zeros(0))
    matvecs: int = 0
    notes: tuple[str, ...] = ()

    @property
    def probes(self) -> int:
        """Number of independent probes."""
        return len(self.nodes)

    @property
    def steps(self) -> int:
        """Lanczos steps per probe."""
        return self.nodes.shape[1]

    @property
    def support(self) -> tuple[float, float]:
        """Smallest and largest node or atom: inside the true range, and close to it."""
        live = np.concatenate([self.nodes[self.weights > 0], self.atoms])
        return (float(live.min()), float(live.max()))

    @property
    def widths(self) -> np.ndarray:
        """(probes, steps) broadening of each node: 0.67 of the mean distance to its neighbours."""
        result = np.zeros_like(self.nodes)
        low, high = self.support
        least = max(1e-6 * (high - low), 1e-9 * max(abs(low), abs(high)), 1e-100)
        for i, (nodes, weights) in enumerate(zip(self.nodes, self.weights, strict=True)):
            kept = weights > 0
            live = nodes[kept]
            if len(live) > 1:
                edges = np.concatenate([[2 * live[0] - live[1]], live, [2 * live[-1] - live[-2]]])
                spacing = (edges[2:] - edges[:-2]) / 2
            else:
                spacing = np.zeros(len(live))
            result[i, kept] = np.maximum(spacing * _RELATIVE_WIDTH, least)
        return result

    def grid(self, points: int = 1000) -> np.ndarray:
        """Abscissae that cover the broadened nodes (not the atoms)."""
        live = self.weights > 0
        if not live.any():
            return np.linspace(*self.support, points)
        margin = 4 * self.widths[live]
        return np.linspace(
            (self.nodes[live] - margin).min(), (self.nodes[live] + margin).max(), points
        )

    def density(self, grid: np.ndarray, width: float | None = None) -> np.ndarray:
        """The quadrature broadened by Gaussians, on a grid; without the atoms.

        Integrates to (n − r)/n. The default width of each node follows the spacing of its
        neighbours (`widths`); one `width` for all hides structure finer than itself.
        """
        return self._per_probe(np.asarray(grid, dtype=float), width).mean(axis=0)

    def band(
        self, grid: np.ndarray, width: float | None = None, confidence: float = 0.95
    ) -> tuple[np.ndarray, np.ndarray]:
        """Pointwise interval of the broadened density over probes (Student's).

        It shows the randomness of the probes, not the bias of broadening or of few steps.

        Raises
        ------
        ArgumentError
            There is only one probe.
        """
        return self._student(self._per_probe(np.asarray(grid, dtype=float), width), confidence)

    def cdf(self, x: np.ndarray | float) -> np.ndarray:
        """Share of the eigenvalues that are at most x, atoms included."""
        return self._cdf_per_probe(x).mean(axis=0)

    def cdf_band(
        self, x: np.ndarray | float, confidence: float = 0.95
    ) -> tuple[np.ndarray, np.ndarray]:
        """Pointwise interval of the distribution function over probes, within [0, 1]."""
        low, high = self._student(self._cdf_per_probe(x), confidence)
        return np.clip(low, 0, 1), np.clip(high, 0, 1)

    def moment_samples(self, power: int) -> np.ndarray:
        """(probes,) unbiased estimates of tr(H^power), for power below 2 · steps."""
        known = float((self.atoms**power).sum())
        return self.n * (self.weights * self.nodes**power).sum(axis=1) + known

    def __str__(self) -> str:
        low, high = self.support
        lines = [
            f"spectral density of n = {self.n:,} eigenvalues: {self.probes} probes x "
            f"{self.steps} Lanczos steps, {self.matvecs} matvecs",
            f"range of the nodes [{low:.4g}, {high:.4g}]",
        ]
        if len(self.atoms):
            lines.append(f"{len(self.atoms)} deflated eigenvalues as exact atoms of mass 1/n")
        shares = [0.05, 0.5, 0.95]
        for share, value, (low, high) in zip(
            shares, self.quantiles(shares), self.quantile_brackets(shares), strict=True
        ):
            bracket = f" (between {low:.4g} and {high:.4g})" if self.steps else ""
            lines.append(f"{share:4.0%} of the eigenvalues are below {value:.4g}{bracket}")
        return "\n".join(lines + [f"note: {note}" for note in self.notes])

    def quantiles(self, shares: Any) -> np.ndarray:
        """Eigenvalues below which the given shares of the spectrum lie; resolved to a node.

        Raises
        ------
        ArgumentError
            A share is not between 0 and 1.
        """
        shares = np.asarray(shares, dtype=float)
        if not ((shares >= 0) & (shares <= 1)).all():
            msg = f"shares={shares}; expected shares of the spectrum between 0 and 1, such as 0.5"
            raise ArgumentError(msg)
        return self._quantiles_of(range(self.probes), shares)

    def quantile_brackets(self, shares: Any) -> np.ndarray:
        """(shares, 2) the nodes on either side of each quantile, the outermost over the probes.

        The distribution function of a probe steps at its nodes, and is right in between: a
        quantile lies between its node's neighbours (Chebyshev, Markov and Stieltjes), up to the
        randomness of the probes.
        """
        lows, highs = [], []
        for i in range(self.probes):
            live = self.nodes[i][self.weights[i] > 0]
            own = self._quantiles_of([i], shares)
            places = np.searchsorted(live, own, side="left") - 1
            lows.append(live[places.clip(0)] if len(live) else own)
            places = np.searchsorted(live, own, side="right")
            highs.append(live[places.clip(max=len(live) - 1)] if len(live) else own)
        low, high = np.minimum.reduce(lows), np.maximum.reduce(highs)
        return np.stack([low, high], axis=-1)

    def _quantiles_of(self, chosen: Sequence[int], shares: Any) -> np.ndarray:
        """Quantiles from some of the probes."""
        nodes = np.concatenate([*self.nodes[list(chosen)], self.atoms])
        masses = np.concatenate(
            [*self.weights[list(chosen)] / len(chosen), np.full(len(self.atoms), 1 / self.n)]
        )
        order = np.argsort(nodes, kind="stable")
        cumulative = np.cumsum(masses[order])
        places = np.searchsorted(cumulative, np.asarray(shares) * cumulative[-1])
        return np.asarray(nodes[order][np.minimum(places, len(nodes) - 1)])

    def _per_probe(self, grid: np.ndarray, width: float | None) -> np.ndarray:
        if width is not None and not width > 0:
            msg = f"width={width}; expected a positive width, or None to follow the nodes' spacing"
            raise ArgumentError(msg)
        widths = self.widths if width is None else np.full_like(self.nodes, width)
        widths = np.where(self.weights > 0, widths, 1.0)
        scaled = (grid[None, None, :] - self.nodes[:, :, None]) / widths[:, :, None]
        heights = self.weights / (widths * math.sqrt(2 * math.pi))
        curve: np.ndarray = np.einsum("ps,psg->pg", heights, np.exp(-(scaled**2) / 2))
        return curve

    def _cdf_per_probe(self, x: np.ndarray | float) -> np.ndarray:
        x = np.atleast_1d(np.asarray(x, dtype=float))
        below = (self.nodes[:, :, None] <= x) * self.weights[:, :, None]
        atoms = (self.atoms[:, None] <= x).sum(axis=0) / self.n
        result: np.ndarray = below.sum(axis=1) + atoms
        return result

    def _student(self, samples: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray]:
        if self.probes < 2:
            msg = "a band needs the spread of at least 2 probes; compute with probes=2 or more"
            raise ArgumentError(msg)
        check_confidence(confidence)
        quantile = stats.t.ppf(0.5 + confidence / 2, self.probes - 1)
        half = quantile * samples.std(axis=0, ddof=1) / math.sqrt(self.probes)
        mean = samples.mean(axis=0)
        return np.maximum(mean - half, 0.0), mean + half


def check_counts(steps: int, probes: int) -> None:
    """Refuse counts that are no positive integers."""
    for name, count in (("steps", steps), ("probes", probes)):
        if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 1:
            msg = f"{name}={count!r}; expected an integer >= 1"
            raise ArgumentError(msg)


def spectral_density(
    H: Any,
    *,
    steps: int = 60,
    probes: int = 5,
    deflate: Eigenpairs | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> SpectralDensity:
    """The distribution of the eigenvalues of a symmetric operator or matrix.

    Stochastic Lanczos quadrature: from each random unit vector `steps` Lanczos steps with full
    reorthogonalisation, whose Ritz values and squared first components are the nodes and weights of
    a Gauss quadrature, exact for polynomials up to degree 2 · steps − 1.

    Parameters
    ----------
    H
        An operator, a torch or NumPy matrix, a SciPy sparse matrix or LinearOperator.
    steps
        Nodes per probe: the resolution.
    probes
        Random vectors: their spread is the band. Two suffice above a million parameters.
    deflate
        Eigenpairs of the same operator, from `eigsh`: they become atoms of exact mass 1/n, and the
        quadrature is spent on the rest. Reduces the error 7 to 17 times where there are outliers.
    seed
        Of the probes.
    progress
        Show a progress bar; None for on a terminal only.

    Returns
    -------
    SpectralDensity

    Raises
    ------
    ArgumentError
        `steps` or `probes` below 1, or eigenpairs of another operator.

    Notes
    -----
    Costs probes · steps matvecs and steps + 1 vectors of memory.

    References
    ----------
    Golub and Welsch, 1969, "Calculation of Gauss quadrature rules". Lin, Saad and Yang, 2016,
    "Approximating spectral densities of large matrices". Ubaru, Chen and Saad, 2017, "Fast
    estimation of tr(f(A)) via stochastic Lanczos quadrature". Ghorbani, Krishnan and Xiao, 2019,
    "An investigation into neural net optimization via Hessian eigenvalue density".
    """
    operator = as_operator(H)
    check_counts(steps, probes)
    generator = random_probes.seeded(seed)
    deflation = None if deflate is None else random_probes.Deflation(operator, deflate)
    outside = None if deflation is None else deflation.basis
    n = operator.space.n
    remaining = n - (0 if deflation is None else len(deflation))
    steps = min(steps, remaining)
    nodes, weights = np.zeros((probes, steps)), np.zeros((probes, steps))
    before = operator.matvecs
    if steps > 0:
        with progress_bar("density", probes * steps, progress) as bar:
            for i in range(probes):
                krylov = Krylov(operator, steps, generator, complement_of=outside)
                while not krylov.full:
                    krylov.step()
                    bar.update()
                    if krylov.exhausted:
                        break
                ritz = krylov.ritz()
                live = krylov.size
                nodes[i, :live] = ritz.values
                nodes[i, live:] = ritz.values[-1]
                weights[i, :live] = ritz.coefficients[0] ** 2 * remaining / n
    notes = []
    if steps > 0 and probes == 1:
        notes.append("one probe gives no error estimate; use at least two")
    return SpectralDensity(
        nodes=nodes,
        weights=weights,
        n=n,
        atoms=np.zeros(0) if deflation is None else np.sort(deflation.values)[::-1].copy(),
        matvecs=operator.matvecs - before,
        notes=tuple(notes),
        provenance={
            "operator": operator.describe(),
            "options": {"steps": steps, "probes": probes, "deflated": remaining < n},
            "seed": seed,
            "versions": versions(),
        },
    )
