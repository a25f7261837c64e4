"""What do nodes and weights say about the spectrum? Curves, shares, counts and their errors.

Numbers come from nodes, never from the broadened curve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from scipy import special

from spectra.algorithms import broadening, counting
from spectra.algorithms.counting import Counts
from spectra.algorithms.estimate import Estimate, check_confidence
from spectra.errors import ArgumentError
from spectra.results import Result

__all__ = ["SpectralDensity"]


@dataclass(frozen=True, eq=False)
class SpectralDensity(Result):
    """The distribution of eigenvalues as nodes and weights.

    Attributes
    ----------
    nodes, weights
        (probes, steps) quadrature of each probe; a probe's weights sum to the share of the spectrum
        that was not deflated, (n − r)/n. A run that ended early is padded with weight 0.
    n
        Number of eigenvalues.
    atoms
        (r,) deflated eigenvalues, each of mass 1/n exactly.
    matvecs, notes
        Cost, and what to know before believing it.
    alphas, betas
        (probes, steps) diagonal of each probe's tridiagonal matrix, and what stands beside it; the
        last of betas couples to the next vector. 0 where a run ended, and 0 after that.
    noise
        Relative error of a product, measured from the runs; nan where they were too short.
    floor
        `noise` times the largest |node|: closer to zero, nothing can be told apart.
    parameter_traces
        (probes, parameters) what each probe says of the sum of the diagonal over each parameter,
        the part of the atoms left out; empty where the operator has but one module, and where a run
        spans the whole space.
    """

    nodes: np.ndarray
    weights: np.ndarray
    n: int
    atoms: np.ndarray = field(default_factory=lambda: np.zeros(0))
    matvecs: int = 0
    notes: tuple[str, ...] = ()
    alphas: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)), repr=False)
    betas: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)), repr=False)
    noise: float = math.nan
    floor: float = math.nan
    parameter_traces: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)), repr=False)

    @property
    def probes(self) -> int:
        """Number of independent probes."""
        return len(self.nodes)

    @property
    def steps(self) -> int:
        """Lanczos steps per probe."""
        return self.nodes.shape[1]

    @property
    def remaining(self) -> int:
        """Number of eigenvalues that were not deflated."""
        return self.n - len(self.atoms)

    @property
    def support(self) -> tuple[float, float]:
        """Smallest and largest node or atom: inside the true range, and close to it."""
        live = np.concatenate([self.nodes[self.weights > 0], self.atoms])
        return (float(live.min()), float(live.max()))

    def coefficients(self, probe: int) -> tuple[np.ndarray, np.ndarray]:
        """`alphas` and `betas` of one probe up to its end; the last beta is 0 if it ended early.

        Raises
        ------
        ArgumentError
            The density holds none: it was made from nodes and weights alone.
        """
        if len(self.alphas) == 0:
            msg = (
                "this density holds no tridiagonal coefficients (alphas, betas), only nodes and "
                "weights; compute it again with spectral_density"
            )
            raise ArgumentError(msg)
        ended = np.flatnonzero(self.betas[probe] == 0)
        size = ended[0] + 1 if len(ended) else self.steps
        return self.alphas[probe, :size], self.betas[probe, :size]

    def ended(self, probe: int) -> bool:
        """The run of a probe found an invariant subspace: its measure is known exactly."""
        return len(self.betas) > 0 and bool((self.betas[probe] == 0).any())

    def shifted(self, by: float) -> SpectralDensity:
        """The same measure with all of the spectrum moved; `floor` and traces are left behind."""
        return replace(
            self,
            nodes=self.nodes + by,
            atoms=self.atoms + by,
            alphas=self.alphas + by,
            floor=math.nan,
            parameter_traces=np.zeros((0, 0)),
        )

    @property
    def runs(self) -> tuple[Any, ...]:
        """The Lanczos runs with their bases, where they were kept; empty otherwise."""
        kept: tuple[Any, ...] = getattr(self, "_runs", ())
        return kept

    def keep(self, runs: Sequence[Any]) -> None:
        """Hold the runs in memory. They are no field, and so are never saved."""
        object.__setattr__(self, "_runs", tuple(runs))

    # --- curve ---------------------------------------------------------------------------------

    @property
    def widths(self) -> np.ndarray:
        """(probes, steps) broadening of each node: 0.67 of the mean distance to its neighbours."""
        low, high = self.support
        least = max(1e-6 * (high - low), 1e-9 * max(abs(low), abs(high)), 1e-100)
        return broadening.node_widths(self.nodes, self.weights, least)

    def grid(self, points: int = 1000) -> np.ndarray:
        """Abscissae that cover the broadened nodes (not the atoms)."""
        live = self.weights > 0
        if not live.any():
            return np.linspace(*self.support, points)
        margin = 4 * self.widths[live]
        return np.linspace(
            (self.nodes[live] - margin).min(), (self.nodes[live] + margin).max(), points
        )

    def density(
        self, grid: np.ndarray, width: float | None = None, *, linear_width: float | None = None
    ) -> np.ndarray:
        """The quadrature broadened by Gaussians, on a grid; without the atoms.

        Integrates to (n − r)/n. The default width of each node follows the spacing of its
        neighbours (`widths`); one `width` for all hides structure finer than itself. With
        `linear_width` x0 it is the density per unit of u = asinh(λ / x0), for an axis that is
        linear within ±x0 and logarithmic beyond: times dλ/du = sqrt(λ² + x0²).

        Raises
        ------
        ArgumentError
            A width that is not positive.
        """
        curve: np.ndarray = self._curves(grid, width).mean(axis=0)
        if linear_width is None:
            return curve
        if not linear_width > 0:
            msg = f"linear_width={linear_width}; expected a positive width, or None"
            raise ArgumentError(msg)
        return curve * np.hypot(grid, linear_width)

    def histogram(self, edges: np.ndarray, width: float | None = None) -> np.ndarray:
        """(probes, bins) what the broadened nodes of each probe have between edges, exactly.

        Unlike values of the curve on a grid it loses no peak between two points: over bins that
        cover the grid it sums to (n − r)/n.
        """
        edges = np.asarray(edges, dtype=float)
        if not (np.diff(edges) > 0).all():
            msg = f"edges={edges}; expected edges of bins in ascending order"
            raise ArgumentError(msg)
        return broadening.histograms(self.nodes, self.weights, self._widths(width), edges)

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
        return self._student(self._curves(grid, width), confidence)

    # --- distribution function and quantiles ---------------------------------------------------

    def cdf(self, x: np.ndarray | float) -> np.ndarray:
        """Share of the eigenvalues that are at most x, atoms included."""
        return self.cdf_per_probe(x).mean(axis=0)

    def cdf_per_probe(self, x: np.ndarray | float) -> np.ndarray:
        """(probes, places) what each probe by itself says of `cdf`."""
        if np.isnan(x).any():
            msg = "x holds nan; expected places on the axis of eigenvalues"
            raise ArgumentError(msg)
        x = np.atleast_1d(np.asarray(x, dtype=float))
        below = (self.nodes[:, :, None] <= x) * self.weights[:, :, None]
        atoms = (self.atoms[:, None] <= x).sum(axis=0) / self.n
        result: np.ndarray = below.sum(axis=1) + atoms
        return result

    def cdf_band(
        self,
        x: np.ndarray | float,
        confidence: float = 0.95,
        *,
        kind: Literal["probes", "rigorous"] = "probes",
    ) -> tuple[np.ndarray, np.ndarray]:
        """Interval of the distribution function at each x, within [0, 1].

        Parameters
        ----------
        kind
            "probes": Student's interval over the probes at each x by itself; a quadrature of few
            steps is biased, too. "rigorous": the quadrature's bracket of each probe, and around
            their mean what the probes can be off by: the truth is within it at all x at once, with
            at least the given probability. It takes a small eigenproblem per probe and x.

        Raises
        ------
        ArgumentError
            Another `kind`, or Student's interval of one probe.

        References
        ----------
        Chen, Trogdon and Ubaru, 2021, "Analysis of stochastic Lanczos quadrature for spectrum
        approximation".
        """
        if kind not in {"probes", "rigorous"}:
            msg = f"kind={kind!r}; expected 'probes' or 'rigorous'"
            raise ArgumentError(msg)
        if kind == "probes":
            low, high = self._student(self.cdf_per_probe(x), confidence)
        else:
            check_confidence(confidence)
            self.cdf_per_probe(x)
            x = np.atleast_1d(np.asarray(x, dtype=float))
            known = (self.atoms[:, None] <= x).sum(axis=0) / self.n
            lowers, uppers = counting.brackets(self, x)
            # One inequality for each place where the distribution function steps.
            radius = counting.radius(self, confidence, self.remaining)
            low = known + lowers.mean(axis=0) - radius
            high = known + uppers.mean(axis=0) + radius
        return np.clip(low, 0, 1), np.clip(high, 0, 1)

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
        """(shares, 2) nodes or atoms beside each quantile, the outermost ones over the probes.

        The distribution function of a probe steps at its nodes, and is right in between: a
        quantile lies between its node's neighbours (Chebyshev, Markov and Stieltjes), up to the
        randomness of the probes.
        """
        lows, highs = [], []
        for i in range(self.probes):
            live = self.nodes[i][self.weights[i] > 0]
            own = self._quantiles_of([i], shares)
            live = np.sort(np.concatenate([live, self.atoms])) if len(live) else live
            places = np.searchsorted(live, own, side="left") - 1
            lows.append(live[places.clip(0)] if len(live) else own)
            places = np.searchsorted(live, own, side="right")
            highs.append(live[places.clip(max=len(live) - 1)] if len(live) else own)
        low, high = np.minimum.reduce(lows), np.maximum.reduce(highs)
        return np.stack([low, high], axis=-1)

    # --- shares and counts ---------------------------------------------------------------------

    @property
    def resolution_at_zero(self) -> float:
        """How close to zero eigenvalues cannot be told from it: what `tau` is by default.

        The larger of the noise floor and twice the distance of the nodes at zero, mean over the
        probes; a probe whose run ended early knows its eigenvalues and has no such distance.
        """
        return counting.resolution_at_zero(self)

    def mass(self, low: float, high: float, confidence: float = 0.95) -> Estimate:
        """Share of the eigenvalues in [low, high], atoms included.

        Its bounds hold both errors: the quadrature's bracket of each probe, and Student's interval
        over the probes; of one or two probes, what they can be off by at most (see Notes).

        Raises
        ------
        ArgumentError
            The interval is empty, or the confidence no probability.

        Notes
        -----
        A probe's share of an interval follows a beta distribution, whose deviation exceeds
        sqrt(ln(2/η) / (probes (n − r + 2))) with probability η at most.
        """
        return counting.mass(self, low, high, confidence)

    def counts(self, tau: float | None = None, confidence: float = 0.95) -> Counts:
        """Numbers of eigenvalues below −τ, within ±τ, and above τ, each with bounds as of `mass`.

        There is no number of negative eigenvalues alone: where many are near zero, no number of
        steps tells their signs.

        Parameters
        ----------
        tau
            By default `resolution_at_zero`.

        Raises
        ------
        ArgumentError
            A negative `tau`.
        """
        return counting.counts(self, tau, confidence)

    def mass_at_zero(self, tau: float | None = None, confidence: float = 0.95) -> Estimate:
        """Share of the eigenvalues within ±τ of zero, with bounds as of `mass`.

        Parameters
        ----------
        tau
            By default `resolution_at_zero`; the quantity's name says which.

        Raises
        ------
        ArgumentError
            A negative `tau`.
        """
        return counting.mass_at_zero(self, tau, confidence)

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
        if (live := self.weights > 0).any():
            widths = self.widths[live]
            lines.append(
                f"widths of the curve {widths.min():.2g} to {widths.max():.2g}, median "
                f"{np.median(widths):.2g} ({broadening.RELATIVE_WIDTH:.2f} of the nodes' spacing)"
            )
        shares = [0.05, 0.5, 0.95]
        for share, value, (low, high) in zip(
            shares, self.quantiles(shares), self.quantile_brackets(shares), strict=True
        ):
            bracket = f" (between {low:.4g} and {high:.4g})" if self.steps else ""
            lines.append(f"{share:4.0%} of the eigenvalues are below {value:.4g}{bracket}")
        zero = self.mass_at_zero()
        low, high = zero.interval()
        lines.append(
            f"{zero.value:4.0%} of the eigenvalues are within ±{self.resolution_at_zero:.2g} of "
            f"zero ({low:.0%} to {high:.0%})"
        )
        return "\n".join(lines + [f"note: {note}" for note in self.notes])

    # --- parts ---------------------------------------------------------------------------------

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

    def _widths(self, width: float | None) -> np.ndarray:
        broadening.check_width(width)
        return self.widths if width is None else np.full_like(self.nodes, width)

    def _curves(self, grid: np.ndarray, width: float | None) -> np.ndarray:
        grid = np.asarray(grid, dtype=float)
        return broadening.curves(self.nodes, self.weights, self._widths(width), grid)

    def _student(self, samples: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray]:
        if self.probes < 2:
            msg = "a band needs the spread of at least 2 probes; compute with probes=2 or more"
            raise ArgumentError(msg)
        check_confidence(confidence)
        quantile = special.stdtrit(self.probes - 1, 0.5 + confidence / 2)
        half = quantile * samples.std(axis=0, ddof=1) / math.sqrt(self.probes)
        mean = samples.mean(axis=0)
        return np.maximum(mean - half, 0.0), mean + half
