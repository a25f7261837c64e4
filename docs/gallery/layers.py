"""Which layers the curvature is in.

Left, the trace of every layer, from the probes that estimate the trace of the whole; the whiskers
are 95 % intervals. Right, where the eigenvectors live: each column is one eigenvector, each
row the share of its squared length that lies in one tensor. The shares of a column add up to one.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch

import spectra
from spectra.integrations.digits import trained_digits
from spectra.report import plots

images, labels = trained_digits(steps=0, batch_size=600)[2][0]
torch.manual_seed(0)
model = torch.nn.Sequential(
    *(torch.nn.Linear(64, 24), torch.nn.Tanh(), torch.nn.Linear(24, 24), torch.nn.Tanh()),
    torch.nn.Linear(24, 10),
)
loss = spectra.losses.supervised(torch.nn.CrossEntropyLoss())
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for _ in range(100):
    optimizer.zero_grad()
    loss(model, (images, labels)).backward()
    optimizer.step()

H = spectra.HessianOperator(model, loss, [(images, labels)])
analysis = spectra.analyze(H, k=10, density=False, rtol=0.02)
print(analysis.eigenpairs)
for name, trace in analysis.module_traces("parameter").items():
    low, high = trace.interval()
    print(f"{name:9} trace {trace.value:8.3f}  [{low:.3f}, {high:.3f}]")

tensors = [H.space.unflatten(vector) for vector in analysis.eigenpairs.vectors.T]
shares = np.array([[float((t**2).sum()) for t in each.values()] for each in tensors]).T

figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
plots.plot(analysis.blocks, ax=left)
image = right.imshow(shares, aspect="auto", cmap="Blues", vmin=0)
right.set_yticks(range(len(shares)), list(tensors[0]))
right.set_xticks(range(10), [f"{value:.3g}" for value in analysis.eigenpairs.values])
right.set(xlabel="λ", title="Share of each eigenvector in each tensor")
figure.colorbar(image, ax=right)
