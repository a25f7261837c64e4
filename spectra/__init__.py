"""Matrix-free spectral analysis of Hessians: exact products, stated errors.

>>> import torch, spectra
>>> H = spectra.HessianOperator.from_function(lambda x: (x**4).sum(), torch.ones(3))
>>> print(spectra.eigsh(H, k=1).values.round(4))
[12.]
"""

from spectra import errors
from spectra.algorithms.block_spectra import BlockSpectra, block_spectra
from spectra.algorithms.blocks import BlockTraces
from spectra.algorithms.coupling import BlockCoupling, block_coupling
from spectra.algorithms.data_spread import DataSpread, data_spread
from spectra.algorithms.density import SpectralDensity, spectral_density
from spectra.algorithms.diagonal import DiagonalEstimate, diagonal
from spectra.algorithms.eigen import Eigenpairs, eigsh
from spectra.algorithms.estimate import Estimate
from spectra.algorithms.functions import (
    effective_dimension,
    effective_rank,
    logdet,
    participation_ratio,
    spectral_sum,
)
from spectra.algorithms.norms import norm
from spectra.algorithms.solve import Solution, solve
from spectra.algorithms.trace import trace
from spectra.analysis.analyze import Analysis, analyze
from spectra.analysis.comparison import Comparison, compare
from spectra.analysis.landscape import Landscape, landscape
from spectra.analysis.monitor import CurvatureMonitor, log_spaced
from spectra.analysis.preflight import Preflight, check
from spectra.analysis.track import track
from spectra.analysis.trajectory import Measurement, Trajectory
from spectra.errors import SpectraError
from spectra.installation import warn_of_namesake as _warn_of_namesake
from spectra.objective import losses
from spectra.objective.parameters import ParameterSpace
from spectra.operators.base import as_operator
from spectra.operators.gauss_newton import GaussNewtonOperator
from spectra.operators.hessian import HessianOperator
from spectra.operators.optimizers import StabilityThreshold, preconditioner, stability_threshold
from spectra.operators.transforms import deflated, preconditioned, projected, shifted
from spectra.oracle.recompute import recompute
from spectra.results import load

__version__ = "0.1.0"

_warn_of_namesake()

__all__ = [
    "Analysis",
    "BlockCoupling",
    "BlockSpectra",
    "BlockTraces",
    "Comparison",
    "CurvatureMonitor",
    "DataSpread",
    "DiagonalEstimate",
    "Eigenpairs",
    "Estimate",
    "GaussNewtonOperator",
    "HessianOperator",
    "Landscape",
    "Measurement",
    "ParameterSpace",
    "Preflight",
    "Solution",
    "SpectraError",
    "SpectralDensity",
    "StabilityThreshold",
    "Trajectory",
    "analyze",
    "as_operator",
    "block_coupling",
    "block_spectra",
    "check",
    "compare",
    "data_spread",
    "deflated",
    "diagonal",
    "effective_dimension",
    "effective_rank",
    "eigsh",
    "errors",
    "landscape",
    "load",
    "log_spaced",
    "logdet",
    "losses",
    "norm",
    "participation_ratio",
    "preconditioned",
    "preconditioner",
    "projected",
    "recompute",
    "shifted",
    "solve",
    "spectral_density",
    "spectral_sum",
    "stability_threshold",
    "trace",
    "track",
]
