"""What does a notebook show where a result or an operator is the last line of a cell?"""

from __future__ import annotations

from spectra.analysis.analyze import Analysis
from spectra.analysis.comparison import Comparison
from spectra.analysis.trajectory import Trajectory
from spectra.operators.base import SymmetricOperator
from spectra.report import plots
from spectra.report.comparison_page import of_comparison
from spectra.report.pages import Draw, Sketch, drawn, filled, flattened, illustrated
from spectra.report.report import of_analysis, switches
from spectra.report.trajectory_page import of_trajectory
from spectra.results import Result

__all__ = ["html_of", "html_of_operator"]


def html_of(result: Result | Comparison) -> str:
    """What `print` shows, and the figures, as one piece of HTML without addresses or scripts."""
    figures = illustrated(drawn(_figures(result)), {})
    return filled(
        "notebook.html", lines=str(result).split("\n"), title="", rows=[], figures=figures
    )


def html_of_operator(operator: SymmetricOperator) -> str:
    """What `describe()` says, as a table."""
    rows = [(name, value) for name, value in flattened(operator.describe()) if value != "None"]
    return filled("notebook.html", lines=[], title=repr(operator), rows=rows, figures=[])


def _figures(result: Result | Comparison) -> Draw:
    if isinstance(result, Analysis):
        # Of a figure on two scales the one that a page shows first.
        others = {
            name
            for switch in switches(result)
            for label, name in switch.names.items()
            if label != switch.first
        }
        return {name: sketch for name, sketch in of_analysis(result).items() if name not in others}
    if isinstance(result, Trajectory):
        return of_trajectory(result)
    if isinstance(result, Comparison):
        return of_comparison(result)
    return {type(result).__name__: Sketch(result.plot)} if plots.drawable(result) else {}
