"""The loss along eigenvectors.

The loss of a trained network along three eigenvectors of its Hessian: the sharpest, one further
down, and the one of the most negative eigenvalue found. Dashed, the quadratic model with the exact
slope and curvature: where the two part, the Hessian says no more about the loss. Distances are
those of the parameters themselves, nothing is rescaled.
"""

import matplotlib.pyplot as plt

import spectra
from spectra.integrations.digits import trained_digits

H = spectra.HessianOperator(*trained_digits(hidden=16, steps=100))
largest = spectra.eigsh(H, k=5, which="LA")
smallest = spectra.eigsh(H, k=1, which="SA")
print(largest, smallest, sep="\n")

chosen = {
    "the sharpest": largest.vectors[:, 0],
    "the fifth": largest.vectors[:, 4],
    "the most negative": smallest.vectors[:, -1],
}
figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
for ax, (name, direction) in zip(axes, chosen.items(), strict=True):
    line = spectra.landscape(H, direction, points=31)
    ax.plot(line.displacements, line.values[0], label="loss")
    ax.plot(line.displacements, line.predictions[0], "--", label="quadratic model")
    ax.set(xlabel="‖θ − θ₀‖", title=f"{name}: vᵀHv = {line.curvatures[0, 0]:.3g}")
axes[0].legend()
