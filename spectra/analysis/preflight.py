"""What will a run take, and is the operator what it should be? Asked before hours are spent."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from spectra.algorithms import probes
from spectra.algorithms.eigen import placed_basis
from spectra.analysis import findings, gradients
from spectra.analysis.differences import Product, dtypes, size
from spectra.analysis.findings import Finding
from spectra.errors import DataError
from spectra.objective.keeping import checksums
from spectra.objective.memory import Peak, free_bytes, in_words
from spectra.operators.base import SymmetricOperator, as_operator
from spectra.operators.gauss_newton import GaussNewtonOperator
from spectra.operators.hessian import HessianOperator
from spectra.oracle.comparing import timed
from spectra.results import Result, versions

__all__ = ["Forecast", "Preflight", "check"]

# Products that the questions took on networks and on spectra that imitate them, with defaults and
# everything included (docs/benchmarks.md, docs/real_models.md, experiments/benchmarks/README.md).
_PRODUCTS = {
    "eigsh(H, k=1)": (1, 13, 30),
    "eigsh(H, k=10)": (10, 32, 100),
    "trace(H, deflate=pairs)": (0, 20, 110),
    "spectral_density(H, deflate=pairs)": (10, 60, 60),
    "analyze(H)": (10, 97, 280),
}
_SPREAD = "not compared: the data are spread over several processes"
_LINEARISED = (
    "not compared: products are of the linearised model, whose gradient elsewhere is not that of "
    "the loss; check the HessianOperator of the same loss for wrong derivatives"
)
_SLOW = 1.0


@dataclass(frozen=True, eq=False)
class Forecast(Result):
    """What one question will take.

    Attributes
    ----------
    question
        As it is called.
    matvecs, seconds
        (least, most) of what networks took; the seconds are the matvecs at the measured speed.
    basis_vectors, basis_bytes, basis_place
        The largest basis that it will hold, and where: "device", "host" or "disk".
    """

    question: str
    matvecs: tuple[int, int]
    seconds: tuple[float, float]
    basis_vectors: int
    basis_bytes: int
    basis_place: str


@dataclass(frozen=True, eq=False)
class Preflight(Result):
    """Whether the products can be relied on, what they take, and what runs will take.

    Attributes
    ----------
    n
        Length of the vectors.
    gradient_seconds
        Of loss and gradient in one pass; None for an operator that is no Hessian, and for one that
        has products behind it, whose graphs give it away.
    first_seconds, seconds
        Of the first product, which builds what is kept, and of the next one.
    peak_bytes
        The most memory that these took above what was held before; None where the system does not
        tell. Vectors that the caller holds are not in it.
    kept_bytes
        Held between products: graphs. None where it is not known.
    free_bytes
        Of memory, on the operator's device, before the first product.
    symmetry_defect
        |uᵀHv − vᵀHu| / (‖Hu‖ ‖v‖) for random u and v: what the noise of the products does to it.
    forecasts
        What the questions will take.
    advice
        What to change, if anything.
    findings
        What was checked, and what came out.
    matvecs, gradients
        Spent on all of that; gradients in double precision cost twice as much and more.
    """

    n: int
    gradient_seconds: float | None
    first_seconds: float
    seconds: float
    peak_bytes: int | None
    kept_bytes: int | None
    free_bytes: int
    symmetry_defect: float
    forecasts: tuple[Forecast, ...]
    advice: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    matvecs: int = 0
    gradients: int = 0

    @property
    def ok(self) -> bool:
        """Nothing of what was checked makes numbers wrong: no error, no warning."""
        return not self.problems

    @property
    def problems(self) -> tuple[Finding, ...]:
        """The findings that are warnings or errors."""
        return tuple(f for f in self.findings if f.level in {"warning", "error"})

    def __str__(self) -> str:
        lines = [str(finding) for finding in self.findings]
        if lines:
            lines.append(f"(from {self.matvecs} matvecs and {self.gradients} gradients)\n")
        lines.append(self._costs())
        return "\n".join(lines)

    def _costs(self) -> str:
        lines = [
            f"a product of n = {self.n:,} takes {_time(self.seconds)}"
            f" (the first one {_time(self.first_seconds)})"
        ]
        if self.gradient_seconds is not None:
            ratio = self.seconds / max(self.gradient_seconds, 1e-9)
            lines[0] += f", {ratio:.2g} times loss and gradient"
        memory = []
        if self.peak_bytes is not None:
            memory.append(f"{in_words(self.peak_bytes)} at its peak")
        if self.kept_bytes is not None:
            memory.append(f"{in_words(self.kept_bytes)} kept between products")
        memory.append(f"{in_words(self.free_bytes)} were free")
        lines.append(f"memory: {', '.join(memory)}")
        lines += _choices(self.provenance.get("operator", {}))
        lines.append("")
        width = max(len(forecast.question) for forecast in self.forecasts)
        lines.append(f"{'':{width}}  {'matvecs':>7}  {'time':>17}  largest basis")
        for f in self.forecasts:
            matvecs = f"{f.matvecs[0]}-{f.matvecs[1]}"
            place = "" if f.basis_place == "device" else f" on {f.basis_place}"
            basis = f"{in_words(f.basis_bytes)}{place}" if f.basis_vectors else "-"
            if f.matvecs[0] == f.matvecs[1]:
                matvecs = str(f.matvecs[0])
            span = _span(*f.seconds)
            lines.append(f"{f.question:{width}}  {matvecs:>7}  {span:>17}  {basis}")
        lines += [f"advice: {advice}" for advice in self.advice]
        return "\n".join(lines)


def check(H: Any, *, seed: int = 0) -> Preflight:
    """Whether an operator is what it should be, what a product takes, and what the questions will.

    Costs four matvecs, of a Hessian also four to ten gradients: fewer where the first differences
    of gradients agree with a product, and up to six more in double precision where none does. The
    operator is warm afterwards: what was decided and kept serves the run that follows. The model is
    left as it was found; its weights are not written to.

    Parameters
    ----------
    H
        An operator, a torch or NumPy matrix, a SciPy sparse matrix or LinearOperator. The latter
        are checked for symmetry, linearity and determinism.
    seed
        Of the two random vectors.

    Returns
    -------
    Preflight
        Findings, each with the parameters or modules that it is about and the remedy: symmetry,
        linearity, determinism, precision, products against differences of the gradient, the
        gradient against differences of the loss, parameters without gradient or curvature, the
        order of the batches, dropout and batch norm. Measured time and memory of a product; for
        every question the products that networks took with default options, their time at the
        measured speed, and where its basis will be. The number of products depends on the spectrum,
        which is not known yet.

    Raises
    ------
    SpectraError
        What a product raises, such as an operation without a second derivative: see
        `HessianOperator`.
    """
    operator = as_operator(H)
    begun, free = operator.matvecs, free_bytes(operator.space.device)
    first = _FirstGradient(operator) if isinstance(operator, HessianOperator) else None
    products = _FourProducts(operator, seed)
    described = operator.describe()
    found, spent = products.findings(() if first is None else dtypes(first.operator)), 0
    if first is None:
        found.append(findings.determinism(operator.space.eps, products.again))
        found.append(findings.finite_values(None, None))
    else:
        more, spent = _of_a_hessian(first, products)
        # Last: where a call leaves something behind, these calls would hide it.
        reduced = operator.describe().get("reduction", "mean")
        found += [*more, findings.reduction(reduced, first.operator.halves())]
    forecasts = tuple(
        _forecast(operator, question, k, (low, high), products.seconds)
        for question, (k, low, high) in _PRODUCTS.items()
        if k <= operator.space.n
    )
    return Preflight(
        n=operator.space.n,
        gradient_seconds=None if first is None else first.seconds,
        first_seconds=products.first_seconds,
        seconds=products.seconds,
        peak_bytes=products.peak_bytes,
        kept_bytes=described.get("graphs", {}).get("bytes"),
        free_bytes=free,
        symmetry_defect=products.defect,
        forecasts=forecasts,
        advice=tuple(_advice(described, forecasts, products.seconds)),
        findings=tuple(found),
        matvecs=operator.matvecs - begun,
        gradients=spent,
        provenance={"operator": described, "seed": seed, "versions": versions()},
    )


class _FirstGradient:
    """Loss and gradient as they came first, and how long that took."""

    def __init__(self, operator: HessianOperator) -> None:
        self.operator = operator
        self.checksums = _checksums(operator)
        # Kept graphs give it away for nothing.
        warm = operator.matvecs > 0
        seconds, found = timed(operator.space.device, operator.value_and_gradient)
        seconds = operator.space.agreed(seconds)
        self.value, self.gradient = found
        self.gradients = 0 if warm else 1
        if not warm and seconds < _SLOW:
            # What a process does for the first time is not counted where it is most of it.
            seconds, _ = timed(operator.space.device, operator.value_and_gradient)
            self.gradients += 1
        self.seconds = None if warm else seconds


class _FourProducts:
    """H u, H v, H v once more, and that of a combination: their costs, and how they fit together.

    Long vectors go as soon as they have served; v and H v stay.
    """

    def __init__(self, operator: SymmetricOperator, seed: int) -> None:
        space, device = operator.space, operator.space.device
        generator = probes.seeded(seed)
        u, v = probes.sphere(space, generator), probes.sphere(space, generator)
        peak = Peak(device)
        with peak:
            self.first_seconds, hu = timed(device, lambda: operator.apply(u))
            self.seconds, hv = timed(device, lambda: operator.apply(v))
        self.peak_bytes = peak.bytes
        self.v, self.hv = v, hv
        scale = max(space.norm(hu), space.norm(hv)) or 1.0
        self.defect = abs(space.inner(u, hv) - space.inner(v, hu)) / scale
        # Between random vectors noise of a product shows divided by √n.
        self.unsymmetric = self.defect * math.sqrt(space.n)
        self.again = space.norm(operator.apply(v) - hv) / (space.norm(hv) or 1.0)
        combined = hu.mul_(0.6).add_(hv, alpha=0.8)
        difference = operator.apply(0.6 * u + 0.8 * v) - combined
        self.nonlinear = space.norm(difference) / (space.norm(combined) or 1.0)

    def findings(self, used: Iterable[str]) -> list[Finding]:
        """What the products tell without a gradient; `used` are the model's dtypes."""
        return [
            findings.symmetry(self.unsymmetric),
            findings.linearity(self.nonlinear),
            findings.precision(max(self.unsymmetric, self.nonlinear), used),
        ]


def _of_a_hessian(first: _FirstGradient, products: _FourProducts) -> tuple[list[Finding], int]:
    """What can be checked with gradients, and how many of them it took."""
    operator, space = first.operator, first.operator.space
    value, gradient, hv = first.value, first.gradient, products.hv
    # A gradient counts as zero beside what it becomes when the weights move by their own size.
    large = max(space.norm(gradient), size(operator) * space.norm(hv)) or 1.0
    anew = operator.value_and_gradient_at(None)[1]
    moved = space.norm(anew - gradient) / large
    now = _checksums(operator)
    changed = [name for name, before in first.checksums.items() if now[name] != before]
    repeated = findings.determinism(space.eps, products.again, moved)
    found = [
        repeated,
        findings.finite_values(value, space.norm(gradient)),
        findings.modes(operator),
        findings.unchanged(changed, space.names),
    ]
    spent = first.gradients + 1
    # Of what differs from call to call nothing else can be told.
    if repeated.level in {"warning", "error"}:
        return found, spent
    if space.ranks is not None:
        found.append(Finding("batch order", "note", _SPREAD))
    elif (operator.describe().get("batches") or 1) > 1:
        found.append(_batch_order(operator, anew, large))
        spent += 1
    del anew
    if isinstance(operator, GaussNewtonOperator):
        # The linearised model is another function away from θ, where its gradient is not known.
        return [
            *found,
            Finding("gradient differences", "note", _LINEARISED),
            gradients.gradient_of_the_loss(operator, gradient, value),
        ], spent
    known = Product(products.v, hv, large, products.nonlinear)
    compared, agreement = gradients.agreement(operator, known, gradient)
    found += [
        agreement,
        gradients.gradient_of_the_loss(operator, gradient, value),
        *gradients.parameters(operator, hv, gradient, value, compared),
    ]
    return found, spent + compared.gradients


def _batch_order(operator: HessianOperator, gradient: Tensor, large: float) -> Finding:
    space = operator.space
    try:
        with operator.objective.in_reverse():
            backward = operator.value_and_gradient_at(None)[1]
    except DataError as error:
        return Finding("batch order", "note", f"not compared: {error}")
    return findings.batch_order(space.eps, space.norm(backward - gradient) / large)


def _checksums(operator: HessianOperator) -> dict[str, bytes]:
    tensors = zip(operator.space.names, operator.objective.stored, strict=True)
    return {name: checksums([tensor]) for name, tensor in tensors}


def _forecast(
    operator: SymmetricOperator,
    question: str,
    k: int,
    matvecs: tuple[int, int],
    seconds: float,
) -> Forecast:
    space = operator.space
    place, count = ("device", 0) if k == 0 else placed_basis(space, k, None, None, "auto")
    low, high = (min(number, space.n + k + 1) for number in matvecs)
    return Forecast(
        question=question,
        matvecs=(low, high),
        seconds=(low * seconds, high * seconds),
        basis_vectors=count,
        basis_bytes=count * space.vector_bytes,
        basis_place=place,
    )


def _choices(described: dict[str, Any]) -> list[str]:
    """What the first product has decided, in words."""
    lines = []
    graphs = described.get("graphs")
    if graphs is not None:
        lines.append(f"graphs of {graphs['retained']} of {graphs['parts']} batches are kept")
    recompute = described.get("recompute", {})
    if recompute.get("blocks"):
        lines.append(f"{recompute['blocks']} blocks are recomputed")
    lines += [f"because {reason}" for reason in recompute.get("because", ())]
    for key in ("attention", "loss_head", "compute_dtype", "microbatch"):
        if described.get(key) is not None:
            lines.append(f"{key.replace('_', ' ')}: {described[key]}")
    return lines


def _advice(
    described: dict[str, Any], forecasts: tuple[Forecast, ...], seconds: float
) -> list[str]:
    advice = []
    graphs = described.get("graphs", {})
    if described.get("graph") == "auto" and graphs.get("retained", 0) < graphs.get("parts", 0):
        advice.append(
            "with more memory for them (memory_budget=, by default half of what is free) all "
            "graphs would be kept, and a product take less time"
        )
    if any(forecast.basis_place == "disk" for forecast in forecasts):
        advice.append(
            "the basis will be on disk, which every step reads twice: TMPDIR should be a fast one "
            "with room for it; fewer pairs (k) or parameters (params=) need less"
        )
    if forecasts and forecasts[-1].seconds[1] > 600 and seconds > _SLOW:
        advice.append(
            f"analyze(H, budget='30min') keeps to a time: about {int(1800 / seconds)} products"
        )
    return advice


def _span(least: float, most: float) -> str:
    """From one time to another, with one unit where they share it."""
    low, high = _time(least), _time(most)
    if low == high:
        return low
    number, unit = low.split()
    return f"{number if high.endswith(f' {unit}') else low} to {high}"


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
