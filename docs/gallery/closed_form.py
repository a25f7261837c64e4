"""A function whose Hessian is known.

Balls on a line, each tied to the next by a spring: at rest the Hessian of the energy is a matrix
with 2 on the diagonal and −1 beside it, and its eigenvalues are 2 − 2 cos(jπ / (n + 1)). The
quartic terms of the springs vanish there, but not at other positions. Left, the distance of every
eigenvalue found to the exact one, and the residual that `eigsh` measured, which bounds it; right,
the distribution function from 4 probes of 20 products each, beside the exact one.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch

import spectra


def energy(x):
    stretched = torch.diff(x, prepend=x.new_zeros(1), append=x.new_zeros(1))
    return (stretched**2 / 2 + stretched**4).sum()


n = 100
H = spectra.HessianOperator.from_function(energy, [torch.zeros(n, dtype=torch.float64)])
exact = 2 - 2 * np.cos(np.arange(1, n + 1) * np.pi / (n + 1))

pairs = spectra.eigsh(H, k=12, which="LA", tol=1e-6)
density = spectra.spectral_density(H, steps=20, probes=4)
print(pairs)
print(spectra.trace(H), f"(exactly {exact.sum():.6g})", sep="\n")

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
numbers = np.arange(1, 13)
left.semilogy(numbers, np.abs(pairs.values - exact[::-1][:12]), "o", label="|λ found − λ exact|")
left.semilogy(numbers, pairs.residuals, "_", markersize=14, label="measured residual: a bound")
left.set(xlabel="number of the eigenvalue, from the largest", title="Twelve largest eigenvalues")
left.legend()

grid = np.linspace(-0.2, 4.2, 400)
low, high = density.cdf_band(grid, kind="rigorous")
right.fill_between(grid, low, high, alpha=0.3, label="95 % band")
right.plot(grid, np.searchsorted(exact, grid) / n, "k", linewidth=1, label="exact")
right.set(xlabel="λ", title="Share of eigenvalues below λ")
right.legend()
