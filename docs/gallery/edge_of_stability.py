"""Sharpness at the edge of stability.

Gradient descent on all of the data with a fixed step η: the largest eigenvalue rises until it meets
2/η, where a quadratic would begin to diverge, and stays about there (Cohen, Kaur, Li, Kolter and
Talwalkar, 2021, "Gradient descent on neural networks typically occurs at the edge of stability").
Left, λ_max and the threshold that the monitor reads from the optimiser; right, the loss at every
step: at the edge it goes on falling, but not at every step. Not every step size shows this so soon:
the experiment of the same name has those that do not.
"""

import matplotlib.pyplot as plt
import torch

import spectra
from spectra.integrations.digits import trained_digits
from spectra.report import plots

images, labels = trained_digits(steps=0, batch_size=300)[2][0]
batch = images, torch.nn.functional.one_hot(labels, 10).float()
torch.manual_seed(0)
model = torch.nn.Sequential(
    *(torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 32), torch.nn.Tanh()),
    torch.nn.Linear(32, 10),
)
loss = spectra.losses.supervised(torch.nn.MSELoss())
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
monitor = spectra.CurvatureMonitor(model, loss, [batch], optimizer, every=25)

losses = []
for step in range(1501):
    monitor.step(step)
    optimizer.zero_grad()
    value = loss(model, batch)
    value.backward()
    optimizer.step()
    losses.append(value.item())

at_the_edge = [m for m in monitor.trajectory.measurements if m.step >= 1000]
ratios = [m.sharpness / m.threshold for m in at_the_edge]
errors = [m.residuals[0] / m.threshold for m in at_the_edge]
print(f"λ_max over its threshold from step 1,000 on: {min(ratios):.3f} to {max(ratios):.3f},")
print(f"each to {max(errors):.1g} (the residual)")

figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
plots.plot(monitor.trajectory, ax=left)
right.semilogy(losses)
right.set(xlabel="step", title="Loss")
