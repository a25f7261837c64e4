"""What does `checkpoint=` do? It gives a function a journal, and an end that loses nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np

from spectra.errors import ArgumentError, ArgumentTypeError, DataError, SpectraError
from spectra.journal import Journal, Stopped
from spectra.objective.identity import digest_of, fingerprint
from spectra.objective.vectors import VectorSpace
from spectra.operators.base import SymmetricOperator, as_operator
from spectra.results import Result

__all__ = ["resumable"]

P = ParamSpec("P")
R = TypeVar("R", bound=Result)

# Options that do not change the answer.
_WITHOUT_EFFECT = ("progress", "checkpoint")


def resumable(question: Callable[P, R]) -> Callable[P, R]:
    """A function of an operator `H`, with `checkpoint=`, that can go on where it was ended."""
    signature, question = inspect.signature(question), _undisturbed(question)

    @functools.wraps(question)
    def asked(*args: P.args, **options: P.kwargs) -> R:
        H: Any = args[0] if args else options.get("H")
        alone = not isinstance(H, SymmetricOperator) or not _together(H)
        if options.get("checkpoint") is None and alone:
            return question(*args, **options)
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        if not alone:
            _agree(question.__name__, H.space, bound.arguments)
            if bound.arguments["checkpoint"] is None:
                return question(*args, **options)
        path = _path(bound.arguments["checkpoint"])
        operator = bound.arguments["H"] = as_operator(bound.arguments["H"])
        bound.arguments["checkpoint"] = None
        journal = Journal(path, question.__name__, _identity(operator, bound.arguments), operator)
        with contextlib.closing(journal):
            result = _answered(journal, functools.partial(question, *bound.args, **bound.kwargs))
        # A density that keeps its runs loses them in a copy.
        return result if not journal.notes else _with_notes(result, journal.notes)

    return asked


def _undisturbed(question: Callable[P, R]) -> Callable[P, R]:
    """The same, where nobody changes the weights meanwhile."""

    @functools.wraps(question)
    def asked(*args: P.args, **options: P.kwargs) -> R:
        H: Any = args[0] if args else options.get("H")
        if not isinstance(H, SymmetricOperator):
            return question(*args, **options)
        result = None
        try:
            with H.undisturbed():
                result = question(*args, **options)
        except DataError as error:
            if result is not None:
                error.partial = result
            raise
        return result

    return asked


def _together(H: SymmetricOperator) -> bool:
    """Whether several processes ask a question together."""
    return H.space.ranks is not None or H.space.probe_ranks is not None


def _agree(question: str, space: VectorSpace, arguments: dict[str, Any]) -> None:
    """Ask all ranks whether they begin the same question with the same options.

    First those of a group that has the data together, then those that compute other probes: what
    fails in one group fails in the others.
    """
    told = {
        f"the option {name}": text if len(text := _in_words(value)) < 40 else digest_of(text)
        for name, value in arguments.items()
        if name != "H" and name not in _WITHOUT_EFFECT
        # Of what is spread over the ranks (vectors, an optimiser's tensors) each has another part.
        if not space.spread or _is_plain(value)
    }
    given, failure = [fingerprint(told)], None
    try:
        if space.ranks is not None:
            space.ranks.together(question, given, lambda: (None, ()), lambda: told)
        if space.probe_ranks is not None and arguments["checkpoint"] is not None:
            msg = "checkpoint= records one course, and with probe_group= there are several"
            raise ArgumentError(msg)
    except SpectraError as error:
        failure = error

    def agreed() -> tuple[None, tuple[()]]:
        if failure is not None:
            raise failure
        return None, ()

    if space.probe_ranks is None:
        agreed()
    else:
        space.probe_ranks.together(question, given, agreed, lambda: told)


def _answered(journal: Journal, question: Callable[[], R]) -> R:
    stopped = None
    try:
        with journal.active():
            result = question()
            stopped = journal.signal if journal.sealed else None
    except Stopped as error:
        result, stopped = error.partial, journal.signal
    except BaseException as error:
        _say_where(error, journal)
        if journal.empty:
            journal.remove()
        raise
    if not stopped:
        journal.finish()
        return result
    how = f"go on with the same call and checkpoint={str(journal.path)!r}"
    if result is None:
        msg = f"{stopped} before there was anything to return; what was computed is kept: {how}"
        raise KeyboardInterrupt(msg)
    note = f"partial: stopped by {stopped} before the end; what was computed is kept: {how}"
    provenance = {**result.provenance, "stopped_by": stopped}
    return dataclasses.replace(_with_notes(result, [note]), partial=True, provenance=provenance)


def _with_notes(result: R, notes: list[str]) -> R:
    # Every result of a long computation has them.
    known: tuple[str, ...] = getattr(result, "notes", ())
    changed = dataclasses.replace(result, notes=(*notes, *known))  # type: ignore[call-arg]
    if runs := getattr(result, "runs", None):
        changed.keep(runs)  # type: ignore[attr-defined]
    return changed


def _say_where(error: BaseException, journal: Journal) -> None:
    if not journal.empty and hasattr(error, "add_note"):
        error.add_note(
            f"What was computed is kept in {str(journal.path)!r}; the same call goes on from there."
        )


def _path(checkpoint: Any) -> Path:
    if not isinstance(checkpoint, str | Path) or not str(checkpoint):
        msg = f"checkpoint={checkpoint!r}; expected the path of a file"
        raise ArgumentTypeError(msg)
    # Whatever the run does to the working directory.
    path = Path(checkpoint).absolute()
    if path.is_dir():
        msg = f"checkpoint={str(checkpoint)!r} is a directory; name a file in it"
        raise ArgumentError(msg)
    return path


def _identity(operator: SymmetricOperator, arguments: dict[str, Any]) -> dict[str, Any]:
    """Operator and options, as far as the answer depends on them."""
    options = {
        name: _in_words(value)
        for name, value in arguments.items()
        if name != "H" and name not in _WITHOUT_EFFECT
    }
    return {**operator.identity(), "option": options}


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | np.generic)


def _in_words(value: Any) -> str:
    if _is_plain(value):
        return repr(value)
    # Eigenpairs to deflate: their provenance has the dates and versions of another run.
    if isinstance(value, Result):
        numbers = [getattr(value, name, None) for name in ("values", "vectors", "alphas", "betas")]
        return f"{type(value).__name__} {digest_of(numbers)}"
    return f"{type(value).__name__} {digest_of(value)}"
