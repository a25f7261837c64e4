"""How far is a long computation? A bar on a terminal, silence in a pipe."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

__all__ = ["progress_bar"]


def progress_bar(
    name: str, total: int | None, show: bool | None, unit: str = "matvec"
) -> tqdm[Any]:
    """A bar that counts matvecs, or what else `unit` says.

    `show`: True, False, or None for «if stderr is a terminal».
    """
    return tqdm(
        total=total,
        desc=name,
        unit=unit,
        disable=None if show is None else not show,
        leave=False,
        dynamic_ncols=True,
    )
