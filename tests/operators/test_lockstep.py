"""Whoever runs first, the same questions are answered together, and nobody is left behind."""

import os
import signal
import threading
import time

import pytest
import torch

from spectra.operators.lockstep import in_lockstep


def running():
    return [t for t in threading.enumerate() if t.name.startswith("spectra block")]


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    assert not running()


def doubled(rounds):
    """A `compute` that notes who asked in each round."""

    def compute(questions):
        rounds.append(list(questions))
        return {number: 2 * rows for number, rows in questions.items()}

    return compute


def unexplained(number, error):
    del number, error


def counting(times, delay=0.0):
    def task(ask):
        total = torch.zeros(())
        for i in range(times):
            time.sleep(delay)
            total = total + ask(torch.tensor(float(i)))
        return float(total)

    return task


def test_questions_of_a_round_are_answered_together_in_the_order_of_the_tasks():
    rounds = []
    # The first is the slowest; whoever has nothing to ask is done at once.
    tasks = [counting(2, delay=0.02), counting(3), counting(0), counting(1)]
    assert in_lockstep(tasks, doubled(rounds), unexplained) == [2.0, 6.0, 0.0, 0.0]
    assert rounds == [[0, 1, 3], [0, 1], [1]]


def test_no_task_has_no_result():
    assert in_lockstep([], doubled([]), unexplained) == []


def test_products_are_computed_in_the_calling_thread():
    threads = set()

    def compute(questions):
        threads.add(threading.current_thread())
        return questions

    in_lockstep([counting(2), counting(2)], compute, unexplained)
    assert threads == {threading.current_thread()}


def test_an_error_of_one_ends_those_who_wait():
    explained = []

    def fails(ask):
        ask(torch.ones(1))
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        in_lockstep(
            [counting(10**6), fails, counting(10**6)],
            doubled([]),
            lambda number, error: explained.append((number, str(error))),
        )
    assert explained == [(1, "no")]


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_an_error_of_the_products_ends_all(kind):
    rounds = []

    def compute(questions):
        rounds.append(list(questions))
        if len(rounds) == 3:
            raise kind
        return questions

    with pytest.raises(kind):
        in_lockstep([counting(10**6), counting(10**6)], compute, unexplained)
    assert rounds == [[0, 1]] * 3


def test_ctrl_c_while_all_are_at_work_ends_all():
    def slow(ask):
        while True:
            time.sleep(0.1)
            ask(torch.ones(1))

    timer = threading.Timer(0.25, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        in_lockstep([slow, slow], doubled([]), unexplained)
    timer.join()


def test_a_task_that_holds_on_to_its_waiting_ends_too():
    ended = []

    def tidies(ask):
        try:
            while True:
                ask(torch.ones(1))
        finally:
            ended.append(True)

    def fails(ask):
        ask(torch.ones(1))
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        in_lockstep([tidies, fails], doubled([]), unexplained)
    assert ended == [True]
