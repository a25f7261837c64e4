"""Which few-point measures share the moments of a Lanczos run, and what do they bound?

From the tridiagonal matrix T of m Lanczos steps with the start vector v: alphas (m,) its diagonal,
betas (m,) beside it, the last of which couples to the next vector. The measure is vᵀ δ(x − H) v, of
mass 1.

References: Golub and Welsch, 1969, "Calculation of Gauss quadrature rules"; Golub, 1973, "Some
modified matrix eigenvalue problems"; Golub and Meurant, 2010, "Matrices, moments and quadrature
with applications"; Akhiezer, 1965, "The classical moment problem" (Chebyshev, Markov, Stieltjes).
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import eigh_tridiagonal

__all__ = ["cdf_bracket", "gauss", "gauss_radau"]

# A prescribed node this close to a Ritz value, relative to the range, moves the last entry of T so
# far away that rounding spoils the others.
_NEAR = 1e-9


def gauss(alphas: np.ndarray, betas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights (m,), exact for polynomials up to degree 2m − 1."""
    nodes, vectors = eigh_tridiagonal(alphas, betas[: len(alphas) - 1])
    return nodes, vectors[0] ** 2


def gauss_radau(
    alphas: np.ndarray, betas: np.ndarray, prescribed: float
) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights (m + 1,) with one node prescribed, exact up to degree 2m.

    The prescribed node must be no Ritz value.
    """
    nodes, vectors = eigh_tridiagonal(alphas, betas[: len(alphas) - 1])
    last = prescribed + betas[-1] ** 2 * float((vectors[-1] ** 2 / (nodes - prescribed)).sum())
    return gauss(np.append(alphas, last), betas)


def cdf_bracket(
    alphas: np.ndarray, betas: np.ndarray, x: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What the measure has at least and at most to the left of each x (points,).

    Both hold with x itself counted or not. The rule with a node at x has the measure's moments to
    degree 2m, and no measure with those moments has less than its weights below x, or more than
    those and the one at x together (Chebyshev, Markov, Stieltjes). Costs a small eigenproblem per
    point.
    """
    lower, upper = np.zeros(len(x)), np.ones(len(x))
    ritz, weights = gauss(alphas, betas)
    cumulative = np.concatenate([[0.0], np.cumsum(weights)])
    near = _NEAR * (np.ptp(ritz) + betas[-1])
    for i, place in enumerate(x):
        if not np.isfinite(place):
            lower[i] = upper[i] = float(place > 0)
            continue
        k = int(np.abs(ritz - place).argmin())
        if ritz[k] == place:
            lower[i], upper[i] = cumulative[k], cumulative[k + 1]
        elif abs(ritz[k] - place) <= near:
            # The inequalities at the nodes on either side.
            lower[i], upper[i] = cumulative[max(k - 1, 0)], cumulative[min(k + 2, len(ritz))]
        else:
            nodes, masses = gauss_radau(alphas, betas, float(place))
            own = int(np.abs(nodes - place).argmin())
            lower[i], upper[i] = masses[:own].sum(), masses[: own + 1].sum()
    return lower.clip(0, 1), upper.clip(0, 1)
