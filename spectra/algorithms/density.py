"""How are the eigenvalues distributed? Nodes and weights of a Lanczos quadrature.

The spectral density is the measure (1/n) Σ δ(λ − λ_i). Each probe's Lanczos run gives a Gauss
quadrature of it; nodes and weights are kept, and curve, distribution function, counts and moments
are views of them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from spectra.algorithms import probes as random_probes
from spectra.algorithms.blocks import has_modules
from spectra.algorithms.lanczos import Krylov
from spectra.algorithms.measure import SpectralDensity
from spectra.algorithms.noise import noise_notes
from spectra.algorithms.progress import progress_bar
from spectra.algorithms.resuming import resumable
from spectra.distributed.collectives import Ranks
from spectra.errors import ArgumentError
from spectra.journal import Stopped, condensed
from spectra.operators.base import SymmetricOperator, as_operator
from spectra.results import versions

if TYPE_CHECKING:
    from spectra.algorithms.eigen import Eigenpairs

__all__ = ["SpectralDensity", "check_counts", "probe_generator", "spectral_density"]

_STEPS = 60
_PROBES = 5
_NONE = np.zeros(0)


class _Rule(NamedTuple):
    """The quadrature of one probe: arrays (size,), and the run if its basis is kept."""

    nodes: np.ndarray
    weights: np.ndarray
    alphas: np.ndarray
    betas: np.ndarray
    noise: float
    complete: bool
    parameter_traces: np.ndarray
    basis: dict[str, Any] | None
    run: _Run | None


class _Run(Krylov):
    """A Lanczos run from one probe."""

    def rule(self, betas: np.ndarray, keep: bool, bar: Any) -> _Rule:
        """Take the steps that are left, after those with the given betas."""
        taken = list(betas)
        while not (self.full or self.exhausted):
            self.step()
            taken.append(self.beta)
            bar.update()
        ritz = self.ritz()
        # The whole space knows all the eigenvalues, not only what the probe has of them.
        weights = np.full(self.size, 1 / self.size) if self.complete else ritz.coefficients[0] ** 2
        return _Rule(
            nodes=ritz.values,
            weights=weights * self.dimension / self.space.n,
            alphas=self.projection.diagonal()[: self.size],
            betas=np.array(taken),
            noise=self.noise.relative,
            complete=self.complete,
            parameter_traces=self._parameter_traces(taken[0]),
            basis=self.space.describe_basis(self.rows),
            run=self if keep else None,
        )

    def _parameter_traces(self, beta: float) -> np.ndarray:
        """What the probe says of the sum over each parameter of the diagonal without the atoms.

        With P = I − QQᵀ for eigenvectors Q that have H Q = Q Θ + R, H − Q Θ Qᵀ is PHP + RQᵀ + QRᵀ.
        A probe z in the complement of Q tells the diagonal of each: z ∘ PHz and 2 z ∘ QQᵀHz.
        """
        if not has_modules(self.space):
            return _NONE
        first = self.space.local(self.rows[0])
        product = first * self.projection[0, 0]
        if beta > 0:
            product.add_(self.space.local(self.rows[1]), alpha=beta)
        if self._outside is not None and self.mixed is not None:
            product.add_(self.space.combine(self._outside, self.mixed[0]), alpha=2)
        return self.dimension * self.space.inner_by_parameter(first, product)


def check_counts(steps: int, probes: int) -> None:
    """Refuse counts that are no positive integers."""
    for name, count in (("steps", steps), ("probes", probes)):
        if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 1:
            msg = f"{name}={count!r}; expected an integer >= 1"
            raise ArgumentError(msg)


def probe_generator(seed: int, index: int) -> torch.Generator:
    """The random numbers of probe number `index`: the same however many probes there are.

    Raises
    ------
    ArgumentError
        The seed is no integer, or negative.
    """
    random_probes.seeded(seed)
    stream = np.random.SeedSequence(int(seed), spawn_key=(index,))
    return random_probes.seeded(int(stream.generate_state(1, np.uint64)[0]))


@resumable
def spectral_density(
    H: Any,
    *,
    steps: int | None = None,
    probes: int | None = None,
    deflate: Eigenpairs | None = None,
    begun: SpectralDensity | None = None,
    keep_basis: bool = False,
    seed: int = 0,
    progress: bool | None = None,
    checkpoint: str | Path | None = None,
) -> SpectralDensity:
    """The distribution of the eigenvalues of a symmetric operator or matrix.

    Stochastic Lanczos quadrature: from each random unit vector `steps` Lanczos steps with full
    reorthogonalisation, whose Ritz values and squared first components are the nodes and weights of
    a Gauss quadrature, exact for polynomials up to degree 2 · steps − 1.

    Parameters
    ----------
    H
        An operator, a torch or NumPy matrix, a SciPy sparse matrix or LinearOperator.
    steps
        Nodes per probe, the resolution; by default 60, or those of `begun`.
    probes
        Random vectors: their spread is the band. By default 5, or those of `begun`. Two suffice
        above a million parameters.
    deflate
        Eigenpairs of the same operator, from `eigsh`: they become atoms of exact mass 1/n, and the
        quadrature is spent on the rest. Reduces the error 7 to 17 times where there are outliers.
    begun
        A density of the same operator, with the same `deflate` and `seed`, to go on from: only what
        is new is computed, and the result is that of asking for all at once. More steps need the
        bases of `begun`.
    keep_basis
        Keep the bases of all probes with the result, in memory (they are not saved), so that steps
        can be added later.
    seed
        Of the probes. Each has its own stream: a probe does not depend on how many there are.
    progress
        Show a progress bar; None for on a terminal only.
    checkpoint
        A file for what is computed, from which the same call goes on after a crash or a kill; see
        docs/resuming.md. Ctrl-C and SIGTERM then end the call softly: it returns
        what there is, marked as `partial`.

    Returns
    -------
    SpectralDensity

    Raises
    ------
    ArgumentError
        `steps` or `probes` below 1, eigenpairs of another operator, or a `begun` that the request
        does not continue.

    Notes
    -----
    Costs probes · steps matvecs and steps + 1 vectors of memory, with `keep_basis` that for each
    probe. A basis that does not fit into half of the free memory is held by the host of an
    accelerator, or on disk; the `provenance` says where. A run that spans the whole space knows
    all the eigenvalues: its weights are 1/n, and it stands for all the probes after it.

    References
    ----------
    Golub and Welsch, 1969, "Calculation of Gauss quadrature rules". Lin, Saad and Yang, 2016,
    "Approximating spectral densities of large matrices". Ubaru, Chen and Saad, 2017, "Fast
    estimation of tr(f(A)) via stochastic Lanczos quadrature". Ghorbani, Krishnan and Xiao, 2019,
    "An investigation into neural net optimization via Hessian eigenvalue density".
    """
    operator = as_operator(H)
    if steps is None:
        steps = _STEPS if begun is None else max(begun.steps, 1)
    if probes is None:
        probes = _PROBES if begun is None else begun.probes
    check_counts(steps, probes)
    random_probes.seeded(seed)
    deflation = None if deflate is None else random_probes.Deflation(operator, deflate)
    atoms = np.zeros(0) if deflation is None else np.sort(deflation.values)[::-1].copy()
    n = operator.space.n
    remaining = n - len(atoms)
    steps = min(steps, remaining)
    before = operator.matvecs
    if begun is not None:
        _check_begun(begun, operator, atoms=atoms, steps=steps, probes=probes, seed=seed)
    rules: list[_Rule] = []

    def next_rule(i: int, bar: Any) -> _Rule:
        if rules and rules[0].complete:
            # Another run would find the same eigenvalues.
            return rules[0]
        if begun is None or i >= begun.probes:
            generator = probe_generator(seed, i)
            return _new_rule(operator, steps, generator, deflation, keep=keep_basis, bar=bar)
        if begun.steps == steps or begun.ended(i):
            return _begun_rule(begun, i, keep_basis)
        extended = begun.runs[i].extended(operator, steps)
        rule: _Rule = extended.rule(begun.betas[i], keep_basis, bar)
        return rule

    groups = operator.space.probe_ranks
    # Bases stay where they were made, and other groups cannot go on with them.
    apart = groups is not None and not keep_basis and begun is None
    with progress_bar("density", probes * steps, progress) as bar:
        # One whole run at least: what is left of another says nothing by itself.
        with _stopping_after(rules):
            for i in range(probes if steps > 0 and not apart else 0):
                bar.tell(f"probe {i + 1} of {probes}")
                rules.append(next_rule(i, bar))
            if groups is not None and steps > 0 and apart:
                _rules_of_groups(groups, probes, lambda i: next_rule(i, bar), rules)
    spent = operator.matvecs - before
    if groups is not None and apart:
        spent = sum(int(row[0]) for row in groups.gathered([float(spent)]))
    probes = len(rules) if steps > 0 else probes
    nodes, weights, alphas, betas = _side_by_side(rules, probes, steps)
    sums = [rule.parameter_traces for rule in rules if not rule.complete]
    # Not what `begun` lacks, and not the same run once more for each probe.
    known = len(sums) == probes and all(map(len, sums))
    noise = _root_mean_square([rule.noise for rule in rules])
    # Relative to products in the complement, so atoms have no part in it.
    floor = noise * float(np.abs(nodes).max(initial=0.0))
    notes = noise_notes(noise, floor)
    if groups is not None and not apart:
        notes.append("every group computed all of the probes: their bases are used further")
    if steps > 0 and probes == 1:
        notes.append("one probe gives no error estimate; use at least two")
    density = SpectralDensity(
        nodes=nodes,
        weights=weights,
        n=n,
        atoms=atoms,
        matvecs=spent + (0 if begun is None else begun.matvecs),
        notes=tuple(notes),
        alphas=alphas,
        betas=betas,
        noise=noise,
        floor=floor,
        parameter_traces=np.stack(sums) if known else np.zeros((0, 0)),
        provenance={
            "operator": operator.describe(),
            "options": {"steps": steps, "probes": probes, "deflated": remaining < n},
            # That of each probe; the last is the largest.
            "basis": rules[-1].basis if rules else None,
            "seed": seed,
            "versions": versions(),
        },
    )
    if keep_basis:
        density.keep([rule.run for rule in rules])
    return density


@contextlib.contextmanager
def _stopping_after(found: Sequence[Any]) -> Iterator[None]:
    """A run that is asked to stop ends within, if anything was found until then."""
    try:
        yield
    except Stopped:
        if not found:
            raise


def _side_by_side(rules: Sequence[_Rule], probes: int, steps: int) -> list[np.ndarray]:
    """Nodes, weights, alphas and betas (probes, steps); a run that ended early has zero weights."""
    nodes, weights, alphas, betas = found = [np.zeros((probes, steps)) for _ in range(4)]
    for i, rule in enumerate(rules):
        live = len(rule.nodes)
        nodes[i, :live], nodes[i, live:] = rule.nodes, rule.nodes[-1]
        weights[i, :live] = rule.weights
        alphas[i, :live], betas[i, :live] = rule.alphas, rule.betas
    return found


def _rules_of_groups(
    groups: Ranks, probes: int, rule: Callable[[int], _Rule], rules: list[_Rule]
) -> None:
    """One probe of every group at a time; what each has found is known to all."""
    for start in range(0, probes, groups.size):
        mine = start + groups.rank

        def compute(mine: int = mine) -> tuple[_Rule | None, tuple[()]]:
            return (rule(mine) if mine < probes else None), ()

        found, _ = groups.together("a round of probes", (), compute, dict)
        told = groups.told(None if found is None else found._replace(run=None))
        rules.extend(one for one in told if one is not None)


def _new_rule(
    operator: SymmetricOperator,
    steps: int,
    generator: torch.Generator,
    deflation: random_probes.Deflation | None,
    *,
    keep: bool,
    bar: Any,
) -> _Rule:
    """The rule of a new probe. The basis goes with the return, before there is another one."""

    def computed() -> dict[str, Any]:
        outside = None if deflation is None else deflation.basis
        run = _Run(operator, steps, generator, complement_of=outside)
        if deflation is not None:
            run.noise.limit = deflation.most_noise
        rule = run.rule(np.zeros(0), keep, bar)
        if deflation is not None and run.mixed is not None:
            deflation.check(*run.mixed)
        return rule._asdict()

    # Where the basis is kept, a run that is resumed has to make it again.
    return _Rule(**(computed() if keep else condensed("density probe", computed)))


def _check_begun(
    begun: SpectralDensity,
    operator: SymmetricOperator,
    *,
    atoms: np.ndarray,
    steps: int,
    probes: int,
    seed: int,
) -> None:
    """Refuse to go on from a density that the request does not contain."""
    if begun.n != operator.space.n:
        msg = (
            f"begun is the density of n = {begun.n} eigenvalues, the operator has n = "
            f"{operator.space.n}; pass the density of the same operator"
        )
        raise ArgumentError(msg)
    dtype = operator.describe()["dtype"]
    if (before := begun.provenance.get("operator", {}).get("dtype", dtype)) != dtype:
        msg = f"begun was computed in {before}, the operator is in {dtype}: its probes are others"
        raise ArgumentError(msg)
    if not np.array_equal(begun.atoms, atoms):
        msg = (
            f"begun has {len(begun.atoms)} deflated eigenvalues, and deflate= {len(atoms)} that "
            "are not the same; pass the eigenpairs that begun was computed with"
        )
        raise ArgumentError(msg)
    if begun.provenance.get("seed", seed) != seed:
        msg = f"begun has the seed {begun.provenance['seed']}, got seed={seed}; pass the same seed"
        raise ArgumentError(msg)
    if len(begun.alphas) == 0 and begun.steps > 0:
        msg = "begun holds no tridiagonal coefficients (alphas, betas); compute it again"
        raise ArgumentError(msg)
    if steps < begun.steps or probes < begun.probes:
        msg = (
            f"begun has {begun.probes} probes x {begun.steps} steps, asked for are {probes} x "
            f"{steps}; ask for at least as many of both"
        )
        raise ArgumentError(msg)
    bases = begun.runs or [None] * begun.probes
    if steps > begun.steps and any(
        run is None and not begun.ended(i) for i, run in enumerate(bases)
    ):
        msg = (
            f"begun has {begun.steps} steps and no bases to add more to; compute it with "
            f"keep_basis=True, or ask for steps={begun.steps} and more probes"
        )
        raise ArgumentError(msg)


def _begun_rule(begun: SpectralDensity, probe: int, keep: bool) -> _Rule:
    """The rule of a probe that needs no further step."""
    alphas, betas = begun.coefficients(probe)
    size = len(alphas)
    return _Rule(
        nodes=begun.nodes[probe, :size],
        weights=begun.weights[probe, :size],
        alphas=alphas,
        betas=betas,
        noise=begun.noise,
        complete=begun.ended(probe) and size == begun.remaining,
        parameter_traces=begun.parameter_traces[probe] if len(begun.parameter_traces) else _NONE,
        basis=begun.provenance.get("basis"),
        run=begun.runs[probe] if keep and begun.runs else None,
    )


def _root_mean_square(values: list[float]) -> float:
    """Over those that are no nan; nan where there are none."""
    known = [value for value in values if not math.isnan(value)]
    return math.sqrt(sum(value**2 for value in known) / len(known)) if known else math.nan
