"""How do nodes become a curve? Gaussians whose width follows the spacing of the nodes.

Arrays of nodes, weights and widths are (probes, steps); a node of weight 0 is padding.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import special

from spectra.errors import ArgumentError

__all__ = ["RELATIVE_WIDTH", "check_width", "curves", "histograms", "node_widths", "spacing"]

# Width of a node's Gaussian in units of its distance to the neighbours. Papyan (2020) takes
# 1 / sqrt(8 ln 3) = 0.34 of the mean distance for all nodes; twice that, and locally, leaves no
# isolated spike between the nodes of a few probes.
RELATIVE_WIDTH = 2 / math.sqrt(8 * math.log(3.0))


def check_width(width: float | None) -> None:
    """Refuse a width that is not positive."""
    if width is not None and not width > 0:
        msg = f"width={width}; expected a positive width, or None to follow the nodes' spacing"
        raise ArgumentError(msg)


def spacing(nodes: np.ndarray) -> np.ndarray:
    """Mean distance of each of some ascending nodes to its neighbours; 0 for a single one."""
    if len(nodes) < 2:
        return np.zeros(len(nodes))
    edges = np.concatenate([[2 * nodes[0] - nodes[1]], nodes, [2 * nodes[-1] - nodes[-2]]])
    distances: np.ndarray = (edges[2:] - edges[:-2]) / 2
    return distances


def node_widths(nodes: np.ndarray, weights: np.ndarray, least: float) -> np.ndarray:
    """0.67 of each node's distance to its neighbours, `least` at least; 0 for padding."""
    result = np.zeros_like(nodes)
    for i, live in enumerate(weights > 0):
        result[i, live] = np.maximum(spacing(nodes[i, live]) * RELATIVE_WIDTH, least)
    return result


def curves(
    nodes: np.ndarray, weights: np.ndarray, widths: np.ndarray, grid: np.ndarray
) -> np.ndarray:
    """(probes, points) the broadened nodes of each probe on a grid."""
    widths = np.where(weights > 0, widths, 1.0)
    scaled = (grid[None, None, :] - nodes[:, :, None]) / widths[:, :, None]
    heights = weights / (widths * math.sqrt(2 * math.pi))
    result: np.ndarray = np.einsum("ps,psg->pg", heights, np.exp(-(scaled**2) / 2))
    return result


def histograms(
    nodes: np.ndarray, weights: np.ndarray, widths: np.ndarray, edges: np.ndarray
) -> np.ndarray:
    """(probes, bins) what the broadened nodes of each probe have between edges, exactly."""
    shares = np.zeros((len(nodes), len(edges) - 1))
    for i, live in enumerate(weights > 0):
        below = special.ndtr((edges - nodes[i, live, None]) / widths[i, live, None])
        shares[i] = weights[i, live] @ np.diff(below, axis=1)
    return shares
