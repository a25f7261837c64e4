"""How does a trajectory look while it grows? A figure in a notebook or a window, drawn anew."""

from __future__ import annotations

import math
import sys
from typing import Any

from matplotlib.figure import Figure

from spectra.analysis.trajectory import Trajectory
from spectra.report.plots import FIGURE_SIZE, plot_trajectory

__all__ = ["LiveFigure"]


class LiveFigure:
    """Draws a trajectory whenever it has grown; where there is nowhere to draw, nothing."""

    def __init__(self) -> None:
        self.figure: Any = None
        self._notebook = _in_notebook()
        # In a notebook: where in its page the figure stands.
        self._place: Any = None
        if self._notebook:
            # Not pyplot's: a notebook would show that once more at the end of the cell.
            self.figure = Figure(figsize=FIGURE_SIZE, layout="constrained")

    def update(self, trajectory: Trajectory) -> None:
        """Draw a trajectory in place of the one before."""
        drawn = (v for m in trajectory for v in (m.sharpness, m.preconditioned_sharpness))
        if all(map(math.isnan, drawn)):
            return
        if self.figure is None:
            self.figure = _window()
        if self.figure is False:
            return
        self.figure.clear()
        plot_trajectory(trajectory, self.figure.add_subplot())
        if self._notebook:
            self._show_in_page()
        else:
            self.figure.canvas.draw_idle()
            self.figure.canvas.flush_events()

    def _show_in_page(self) -> None:
        if self._place is None:
            from IPython.display import display

            self._place = display(self.figure, display_id=True)
        else:
            self._place.update(self.figure)


def _window() -> Any:
    """A figure in a window of its own; False where the backend has none."""
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=FIGURE_SIZE, layout="constrained")
    if getattr(type(figure.canvas), "required_interactive_framework", None) is None:
        pyplot.close(figure)
        return False
    figure.show()
    return figure


def _in_notebook() -> bool:
    shell = sys.modules.get("IPython")
    running = None if shell is None else shell.get_ipython()
    return running is not None and type(running).__name__ == "ZMQInteractiveShell"
