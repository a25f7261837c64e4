"""Draw demo.png, the figure of the README: `python docs/figures/demo.py`."""

from pathlib import Path

from matplotlib.figure import Figure

import spectra
from spectra.integrations.digits import trained_digits
from spectra.report import plots

model, loss, data = trained_digits()
analysis = spectra.analyze(spectra.HessianOperator(model, loss, data, graph="retained"))
figure = Figure(figsize=(12, 4), layout="constrained")
left, right = figure.subplots(1, 2)
plots.plot(analysis.eigenpairs, ax=left)
plots.plot(analysis.density, ax=right, scale="symlog")
figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)
