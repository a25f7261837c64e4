"""How far is a long computation? A bar on a terminal, silence in a pipe."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from tqdm import tqdm

__all__ = ["progress_bar"]


def progress_bar(
    name: str, total: int | None, show: bool | None, unit: str = "matvec"
) -> tqdm[Any]:
    """A bar that counts matvecs, or what else `unit` says.

    `show`: True, False, or None for «if stderr is a terminal»; of several processes that run
    together, the first one's.
    """
    if show is None and dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
        show = False
    return tqdm(
        total=total,
        desc=name,
        unit=unit,
        disable=None if show is None else not show,
        leave=False,
        dynamic_ncols=True,
    )
