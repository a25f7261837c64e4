"""One density, two axes.

The same nodes and weights, drawn twice: on a linear axis most of the mass is one spike at zero, on
an axis that is logarithmic away from zero the bulk has a shape. Ten eigenpairs were found first and
are drawn as lines of mass 1/n; the shaded band is the spread of the probes. Numbers come from the
nodes, never from the curve.
"""

import matplotlib.pyplot as plt

import spectra
from spectra.integrations.digits import trained_digits
from spectra.report import plots

H = spectra.HessianOperator(*trained_digits())
pairs = spectra.eigsh(H, k=10)
density = spectra.spectral_density(H, steps=40, probes=5, deflate=pairs)
print(density)
for count in density.counts():
    print(count)

figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
plots.plot(density, ax=left, scale="linear")
plots.plot(density, ax=right, scale="symlog")
