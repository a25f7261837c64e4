"""How far is a long computation, and how wrong is what it has? A line on a terminal, else silence.

Every question draws with `progress_bar` and nothing else. What is drawn was computed for the search
itself: showing it costs no product, and no waiting for a device.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.distributed as dist
from tqdm import tqdm
from tqdm.utils import disp_len, disp_trim

from spectra.names import printable

__all__ = ["ProgressBar", "progress_bar"]

# Columns of the bar itself, and of a terminal that does not tell its width.
_LEAST_BAR, _MOST_BAR, _USUAL_WIDTH = 8, 20, 80
# Where the terminal's encoding has no more than ASCII.
_ASCII = str.maketrans(
    {"λ": "Ritz", "±": "+-", "≤": "<=", "✓": "*", "…": "...", "█": "#", "░": "."}
)


def progress_bar(
    name: str,
    total: int | None,
    show: bool | None,
    unit: str = "matvec",
    *,
    at_most: bool = False,
) -> ProgressBar:
    """A bar that counts matvecs, or what else `unit` says, beside the time that they take.

    Parameters
    ----------
    name
        Of what is computed.
    total
        How many there will be; None where nobody knows.
    show
        True, False, or None for «if stderr is a terminal»; of several processes that run together,
        the first one's.
    at_most
        `total` is only where the search is given up: how long it takes depends on the spectrum.
    """
    if show is None and dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
        show = False
    return ProgressBar(name, total, show, unit, at_most=at_most)


class ProgressBar(tqdm):
    """One line, no longer than the terminal is wide; on a terminal another with Ritz values.

    The line drops from its end what has no room: rate, time, status.
    """

    def __init__(
        self, name: str, total: int | None, show: bool | None, unit: str, *, at_most: bool
    ) -> None:
        self._limit, self._sign = (total if at_most else None), "≤" if at_most else ""
        self._status = ""
        self._below: _Below | None = None
        super().__init__(
            total=total,
            desc=name,
            unit=unit,
            disable=None if show is None else not show,
            leave=False,
            dynamic_ncols=True,
        )

    def expect(self, total: float) -> None:
        """How many it will be, as far as can be told from what there is; may be infinite."""
        if self._limit is not None and total >= self._limit:
            self.total, self._sign = self._limit, "≤"
        else:
            self.total, self._sign = max(round(total), self.n), "~"

    def tell(self, status: str) -> None:
        """How far off what is computed still is, in a few words; shown with the next count."""
        if self.disable:
            return
        self._status = printable(status)
        self._draw_again()

    def tell_pairs(self, values: np.ndarray, residuals: np.ndarray, fine: np.ndarray) -> None:
        """The wanted Ritz values (k,) as they stand, their residuals, and which have converged."""
        if self.disable or len(values) == 0:
            return
        self._status = f"{int(fine.sum())} of {len(values)} converged"
        if not fine.all():
            self._status += f", residual {residuals[~fine].max():.0e}"
        if self._below is None and _moves_its_cursor(self.fp):
            self._below = _Below()
        if self._below is not None:
            order = np.argsort(-values, kind="stable")
            self._below.rows = [(values[i], residuals[i], fine[i]) for i in order]
        self._draw_again()

    def _draw_again(self) -> None:
        # Counts are drawn before what they brought is known, and at most ten times a second: where
        # the last one was drawn, the next may be minutes away.
        if self.last_print_n == self.n:
            self.refresh()

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        """Draw both lines; tqdm's hook."""
        if self._below is not None and msg is None:
            self._below.display()
        return super().display(msg, pos)

    def close(self) -> None:
        """Take both lines away."""
        # tqdm closes what was not made whole, too, when it is collected.
        below = getattr(self, "_below", None)
        if below is not None:
            below.close()
        super().close()

    def __str__(self) -> str:
        known = self.format_dict
        of = "" if self.total is None else f"/{self._sign}{self.total}"
        count = f"{self.n}{of} {self.unit}s"
        elapsed, rate = known["elapsed"], known["rate"]
        time = tqdm.format_interval(elapsed)
        if rate is None and elapsed > 0:
            rate = (self.n - self.initial) / elapsed
        if rate and self.total is not None:
            left = tqdm.format_interval(max(self.total - self.n, 0) / rate)
            time += f" ({self._sign}{left} left)"
        speed = "" if not rate else f"{rate:.3g}/s" if rate >= 1 else f"{1 / rate:.3g} s each"
        return self._fitting([f"{self.desc}: {count}", self._status, time, speed])

    def _fitting(self, parts: list[str]) -> str:
        """The parts that have room, and a bar where the number of products is known."""
        width = self.ncols or _USUAL_WIDTH
        plain = [part.translate(_ASCII) if self.ascii else part for part in parts if part]
        while len(plain) > 1 and disp_len(", ".join(plain)) > width:
            plain.pop()
        line = disp_trim(", ".join(plain), width)
        room = min(width - disp_len(line) - 2, _MOST_BAR)
        if self.total and self._sign != "≤" and room >= _LEAST_BAR:
            full = min(round(room * self.n / self.total), room)
            bar = "█" * full + "░" * (room - full)
            line += "  " + (bar.translate(_ASCII) if self.ascii else bar)
        return line


class _Below(tqdm):
    """The line below the bar: Ritz values in descending order, marked, or with their residuals."""

    def __init__(self) -> None:
        self.rows: Sequence[tuple[float, float, bool]] = ()
        super().__init__(leave=False, dynamic_ncols=True)

    def __str__(self) -> str:
        # Asking for it measures the terminal.
        width = self.format_dict["ncols"] or _USUAL_WIDTH
        line = "λ" if self.rows else ""
        for value, residual, fine in self.rows:
            more = f"{value:.4g} ✓" if fine else f"{value:.4g} ±{residual:.0e}"
            longer = f"{line}  {more}"
            if disp_len(longer) > width - 2:
                line += " …"
                break
            line = longer
        return disp_trim(line.translate(_ASCII) if self.ascii else line, width)


def _moves_its_cursor(file: Any) -> bool:
    """Whether a second line can be drawn: not in notebooks, logs and the plainest terminals."""
    return bool(file.isatty()) and os.environ.get("TERM") != "dumb" and sys.platform != "win32"
