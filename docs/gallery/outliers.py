"""The spectrum of a trained network: a few outliers and a bulk.

A tanh network with 2,410 parameters after 200 steps on scikit-learn's digits. About as many
eigenvalues as there are classes stand apart from the others (Sagun, Evci, Güney, Dauphin and
Bottou, 2017, "Empirical analysis of the Hessian of over-parametrized neural networks"), and most
are close to zero. Left, the twenty largest with their residuals; right, the logarithm of the ratio
of each to the next: behind the ninth and the tenth the gaps end, where there are ten classes.
"""

import matplotlib.pyplot as plt
import numpy as np

import spectra
from spectra.integrations.digits import trained_digits
from spectra.report import plots

H = spectra.HessianOperator(*trained_digits())
pairs = spectra.eigsh(H, k=20, which="LA")
print(pairs)

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
plots.plot(pairs, ax=left)
right.bar(np.arange(1, 20), np.log(pairs.values[:-1] / pairs.values[1:]))
right.set(xlabel="i", ylabel="log(λᵢ / λᵢ₊₁)", title="Gaps", xticks=range(1, 20, 2))
