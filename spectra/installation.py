"""Is this package what `import spectra` gives? A colour library on PyPI has the same import name.

Both put their files into one folder. Of `__init__.py` there can be but one: that of the package
which was installed last, and none once either of them is uninstalled.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

__all__ = ["namesake_problem", "warn_of_namesake"]

# A file of the colour library's, and of nobody else.
_THEIRS = "grapefruit.py"
_REMEDY = (
    "run `pip uninstall spectra`, then install hessian-spectra again with `pip install "
    "--force-reinstall --no-deps`, or give each an environment of its own"
)


def warn_of_namesake() -> None:
    """Say so where the colour library lies in the same folder, below this package."""
    if Path(__file__).with_name(_THEIRS).exists():
        warnings.warn(
            "the colour library `spectra` is installed in the same folder as hessian-spectra: its "
            "own `import spectra` gives this package instead, and uninstalling it breaks this one; "
            f"{_REMEDY}",
            stacklevel=3,
        )


def namesake_problem() -> str | None:
    """What is wrong where `import spectra` gives something else than this package."""
    package = sys.modules["spectra"]
    if hasattr(package, "HessianOperator"):
        return None
    place = getattr(package, "__file__", None)
    if place is None:
        return (
            f"{Path(__file__).with_name('__init__.py')} is missing, as after the colour library "
            f"`spectra` was uninstalled; {_REMEDY}"
        )
    return (
        f"`import spectra` gives {place}, which is not hessian-spectra but, it seems, the colour "
        f"library of the same name; {_REMEDY}"
    )
