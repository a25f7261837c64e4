"""How do many algorithms ask for their products together? Each waits until all have asked.

Every algorithm runs in a thread of its own and gets an operator that only passes its vectors on.
The calling thread alone computes: it waits until each of the others has asked or is done, computes
all products in one go, and lets them go on. So which thread runs when changes nothing.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor

__all__ = ["in_lockstep"]

T = TypeVar("T")

Ask = Callable[[Tensor], Tensor]


class _Abandoned(BaseException):
    """The run has ended; nobody answers any more."""


class _Desk:
    """What was asked and not yet answered, by the number of who asked."""

    def __init__(self, count: int) -> None:
        self.changed = threading.Condition()
        self.asked: dict[int, Tensor] = {}
        self.answers: dict[int, Tensor] = {}
        self.running = set(range(count))
        self.results: dict[int, Any] = {}
        self.errors: dict[int, BaseException] = {}
        self.closed = False

    def ask(self, number: int, rows: Tensor) -> Tensor:
        """Wait for the products of rows."""
        with self.changed:
            self.asked[number] = rows
            self.changed.notify_all()
            self.changed.wait_for(lambda: number in self.answers or self.closed)
            if self.closed:
                raise _Abandoned
            return self.answers.pop(number)

    def run(self, number: int, task: Callable[[Ask], Any]) -> None:
        """One algorithm, from its beginning to its end."""
        try:
            result = task(lambda rows: self.ask(number, rows))
        except BaseException as error:
            with self.changed:
                self.errors[number] = error
        else:
            with self.changed:
                self.results[number] = result
        with self.changed:
            self.running.discard(number)
            self.changed.notify_all()

    def next_questions(self) -> dict[int, Tensor]:
        """Wait until everyone who still runs has asked; empty when all are done or one failed."""
        with self.changed:
            self.changed.wait_for(lambda: bool(self.errors) or self.running <= set(self.asked))
            if self.errors:
                return {}
            # In the order of the numbers, whoever asked first.
            return {number: self.asked.pop(number) for number in sorted(self.asked)}

    def answer(self, answers: dict[int, Tensor]) -> None:
        """Let those who asked go on."""
        with self.changed:
            self.answers.update(answers)
            self.changed.notify_all()

    def close(self) -> None:
        """End those who still wait."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()


def in_lockstep(
    tasks: Sequence[Callable[[Ask], T]],
    compute: Callable[[dict[int, Tensor]], dict[int, Tensor]],
    explain: Callable[[int, BaseException], None],
) -> list[T]:
    """The results of all tasks, whose questions are answered together.

    Parameters
    ----------
    tasks
        Each gets a function that it asks for the products of rows.
    compute
        All products at once, by the number of the task. Called in this thread only.
    explain
        Called with a failed task's number and its exception, before that is raised.

    Any exception, of a task, of `compute`, or from outside (Ctrl-C), ends all tasks.
    """
    desk = _Desk(len(tasks))
    threads = [
        threading.Thread(
            # Without the caller's context: what records a run is asked in the caller's thread.
            target=contextvars.Context().run,
            args=(desk.run, number, task),
            name=f"spectra block {number}",
            daemon=True,
        )
        for number, task in enumerate(tasks)
    ]
    try:
        for thread in threads:
            thread.start()
        while questions := desk.next_questions():
            desk.answer(compute(questions))
    finally:
        desk.close()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    for number in sorted(desk.errors):
        error = desk.errors[number]
        # The others were only told to end.
        if not isinstance(error, _Abandoned):
            explain(number, error)
            raise error
    return [desk.results[number] for number in range(len(tasks))]
