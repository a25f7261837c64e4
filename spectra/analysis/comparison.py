"""How do two spectra differ, and is the difference larger than the errors of both?"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from spectra.algorithms.density import SpectralDensity
from spectra.algorithms.eigen import Eigenpairs
from spectra.algorithms.estimate import Estimate
from spectra.analysis.analyze import Analysis
from spectra.errors import ArgumentError, ArgumentTypeError
from spectra.journal import differences
from spectra.names import short_name
from spectra.objective.vectors import dot

__all__ = ["Comparison", "Difference", "compare"]

# What may differ without a word: what it took.
_NOT_SETTINGS = {"seconds", "matvecs", "stopped_by", "graphs"}


@dataclass(frozen=True)
class Difference:
    """One number of two analyses.

    Attributes
    ----------
    name
        Of the number.
    first, second
        Its values.
    first_error, second_error
        How far each may be off: the residual of an eigenvalue, half the interval of an estimate,
        and rounding for what is exact but for it.
    converged
        Whether both reached their tolerance.
    """

    name: str
    first: float
    second: float
    first_error: float
    second_error: float
    converged: bool = True

    @property
    def change(self) -> float:
        """The second less the first."""
        return self.second - self.first

    @property
    def error(self) -> float:
        """How far the change may be off: the errors of both, added up."""
        return self.first_error + self.second_error

    @property
    def beyond_errors(self) -> bool:
        """The change is larger than what both may be off by."""
        return abs(self.change) > self.error


@dataclass(frozen=True)
class Comparison:
    """Two analyses, number by number.

    Attributes
    ----------
    names
        What the two are called.
    analyses
        The two.
    rows
        Each number that both have. Eigenvalues are paired by their rank from either end.
    overlap
        Share of the first top subspace that is in the second: ‖V₁ᵀV₂‖²_F / k; nan where they have
        no eigenvectors of the same parameters.
    overlap_size
        How many eigenvectors that is.
    distance
        Area between the two distribution functions of the eigenvalues (Wasserstein-1), in units of
        the eigenvalues; nan where one has no density.
    distance_floor
        The same between the halves of one's own probes, the larger of both: what is not above it is
        the probes' noise. nan where there are fewer than two.
    settings
        What else differs, in words: options, seeds, versions, and what was analysed.
    notes
        What to know before believing it.
    """

    names: tuple[str, str]
    analyses: tuple[Analysis, Analysis]
    rows: tuple[Difference, ...]
    overlap: float
    overlap_size: int
    distance: float
    distance_floor: float
    settings: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        first, second = (short_name(name, 17) for name in self.names)
        lines = [f"{'':<22}{first:>18}{second:>18}{'change':>13}  ±"]
        for row in self.rows:
            mark = " " if row.beyond_errors else "="
            doubt = "" if row.converged else " *"
            lines.append(
                f"{short_name(row.name, 21):<22}{row.first:>18.6g}{row.second:>18.6g}"
                f"{row.change:>+13.4g}{mark} {row.error:.1g}{doubt}"
            )
        if any(not row.beyond_errors for row in self.rows):
            lines.append("= within the errors of both")
        if any(not row.converged for row in self.rows):
            lines.append("* one of the two did not reach its tolerance")
        if not math.isnan(self.overlap):
            lines.append(
                f"top subspaces of {self.overlap_size}: {self.overlap:.1%} of the first is in the "
                "second"
            )
        if not math.isnan(self.distance):
            floor = self.distance_floor
            noise = "" if math.isnan(floor) else f" (noise of the probes: {floor:.2g})"
            lines.append(f"area between the distributions: {self.distance:.3g}{noise}")
        lines += [f"other setting: {text}" for text in self.settings]
        lines += [f"note: {text}" for text in self.notes]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """What a notebook shows: the text of `print`, and both drawn together."""
        # By name: figures stand above, and matplotlib loads slowly.
        notebook = importlib.import_module("spectra.report.notebook")
        html: str = notebook.html_of(self)
        return html


def compare(
    first: Analysis, second: Analysis, *, names: tuple[str, str] = ("first", "second")
) -> Comparison:
    """Put two analyses side by side: each number that both have, with the error of its change.

    No product is computed.

    Parameters
    ----------
    first, second
        From `spectra.analyze`, of one model at two times, with two settings, or of two models.
    names
        What to call them.

    Raises
    ------
    ArgumentTypeError
        One of them is no Analysis.
    ArgumentError
        Other than two names.
    """
    for place, one in (("first", first), ("second", second)):
        if not isinstance(one, Analysis):
            msg = f"the {place} is a {type(one).__name__}; expected an Analysis"
            raise ArgumentTypeError(msg)
    if isinstance(names, str) or len(names) != 2:
        msg = f"names={names!r}; expected a name for each of the two"
        raise ArgumentError(msg)
    overlap, size, remarks = _overlap(first.eigenpairs, second.eigenpairs)
    distance, floor = _distance(first.density, second.density)
    own = (
        f"{name}: {note}"
        for name, one in zip(names, (first, second), strict=True)
        for note in _doubts(one)
    )
    return Comparison(
        names=(str(names[0]), str(names[1])),
        analyses=(first, second),
        rows=tuple(_rows(first, second)),
        overlap=overlap,
        overlap_size=size,
        distance=distance,
        distance_floor=floor,
        settings=tuple(_settings(first, second)),
        notes=(*remarks, *own),
    )


def _doubts(analysis: Analysis) -> Iterator[str]:
    if analysis.partial:
        yield "partial, the run was stopped"
    missed = int((~analysis.eigenpairs.converged).sum())
    if missed:
        yield f"{missed} of {len(analysis.eigenpairs)} eigenpairs did not converge"
    if not analysis.eigenpairs.certified:
        yield "a missed eigenvalue is not ruled out, so that ranks are not certain"


# --- numbers -------------------------------------------------------------------------------------


def _rows(first: Analysis, second: Analysis) -> Iterator[Difference]:
    for name, a, b in (
        ("loss", first.value, second.value),
        ("gradient norm", first.gradient_norm, second.gradient_norm),
    ):
        if a is not None and b is not None:
            yield Difference(name, a, b, _rounding(first) * abs(a), _rounding(second) * abs(b))
    yield from _eigenvalues(first.eigenpairs, second.eigenpairs)
    for name in ("spectral_norm", "trace", "frobenius_norm"):
        yield from _estimates(getattr(first, name), getattr(second, name))
    for name, estimate in first.sums.items():
        yield from _estimates(estimate, second.sums.get(name), name)


def _rounding(analysis: Analysis) -> float:
    """A bound on the relative rounding of a sum over the data."""
    double = "float64" in str(analysis.provenance.get("operator", {}).get("dtype"))
    return 16 * float(np.finfo(np.float64 if double else np.float32).eps)


def _eigenvalues(first: Eigenpairs, second: Eigenpairs) -> Iterator[Difference]:
    """Those of the same rank, from the largest down and from the smallest up."""
    tops, ends = zip(_ends(first), _ends(second), strict=True)
    for i in range(min(tops)):
        yield _eigenvalue(f"λ{i + 1}", i, i, first, second)
    for i in range(min(ends)):
        a, b = len(first) - 1 - i, len(second) - 1 - i
        yield _eigenvalue(f"λn{f'-{i}' if i else ''}", a, b, first, second)


def _ends(pairs: Eigenpairs) -> tuple[int, int]:
    """How many of the values are the largest of all, and how many the smallest."""
    k = len(pairs)
    if k == pairs.n:
        return k, 0
    if pairs.which == "LM":
        # A positive one among the largest in magnitude is among the largest; so for negative ones.
        positive = int((pairs.values > 0).sum())
        return positive, int((pairs.values < 0).sum())
    lower = {"LA": 0, "SA": k, "BE": k // 2}[pairs.which]
    return k - lower, lower


def _eigenvalue(name: str, a: int, b: int, first: Eigenpairs, second: Eigenpairs) -> Difference:
    return Difference(
        name,
        float(first.values[a]),
        float(second.values[b]),
        float(first.residuals[a]),
        float(second.residuals[b]),
        bool(first.converged[a] and second.converged[b]),
    )


def _estimates(a: Estimate | None, b: Estimate | None, name: str = "") -> Iterator[Difference]:
    if a is not None and b is not None:
        yield Difference(
            name or a.quantity,
            a.value,
            b.value,
            _half(a),
            _half(b),
            bool(a.converged and b.converged),
        )


def _half(estimate: Estimate) -> float:
    """How far the truth is at most, with the probability of the interval."""
    low, high = estimate.bounds if estimate.bounds is not None else estimate.interval()
    return max(estimate.value - low, high - estimate.value)


# --- vectors and distributions -------------------------------------------------------------------


def _overlap(first: Eigenpairs, second: Eigenpairs) -> tuple[float, int, list[str]]:
    size = min(_ends(first)[0], _ends(second)[0])
    tops = [torch.as_tensor(one.vectors)[:, :size].to("cpu") for one in (first, second)]
    if size == 0 or any(top.shape[1] < size for top in tops):
        # Large eigenvectors are not saved.
        return math.nan, 0, []
    if len(tops[0]) != len(tops[1]):
        n = " and ".join(f"{len(top):,}" for top in tops)
        return math.nan, 0, [f"no common subspace: the two have {n} parameters"]
    inside = sum(float(dot(a, b)) ** 2 for a in tops[0].T for b in tops[1].to(tops[0]).T)
    return inside / size, size, []


def _distance(first: SpectralDensity | None, second: SpectralDensity | None) -> tuple[float, float]:
    if first is None or second is None:
        return math.nan, math.nan
    at = np.unique(
        np.concatenate([part.ravel() for d in (first, second) for part in (d.nodes, d.atoms)])
    )
    widths = np.diff(at)

    def area(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.abs(a - b)[:-1] @ widths)

    functions = [density.cdf_per_probe(at) for density in (first, second)]
    floors = [
        area(one[::2].mean(axis=0), one[1::2].mean(axis=0)) if len(one) > 1 else math.nan
        for one in functions
    ]
    floor = math.nan if any(map(math.isnan, floors)) else max(floors)
    return area(*(one.mean(axis=0) for one in functions)), floor


def _settings(first: Analysis, second: Analysis) -> Iterator[str]:
    for text in differences(_set(first.provenance), _set(second.provenance)):
        yield text.replace(" before, ", " in the first, ").replace(" now)", " in the second)")


def _set(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What somebody chose, or what it was run on."""
    return {
        name: _set(value) if isinstance(value, Mapping) else value
        for name, value in provenance.items()
        if name not in _NOT_SETTINGS
    }
