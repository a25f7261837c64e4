"""The progress bar: on when asked for, silent in a pipe, and it counts products."""

import io
import sys

import numpy as np
import pytest
import torch

import spectra
from spectra import HessianOperator
from spectra.algorithms.progress import progress_bar
from tests.cases.matrices import s1


def of_two_blocks():
    points = [torch.ones(3).double(), torch.ones(2).double()]
    return HessianOperator.from_function(lambda x, y: (x**2).sum() * (y**3).sum(), points)


CALLS = {
    "eigsh": lambda **options: spectra.eigsh(np.diag(s1(60)), 3, **options),
    "trace": lambda **options: spectra.trace(np.diag(s1(60)), **options),
    "power iteration": lambda **options: spectra.norm(np.diag(s1(60)), **options),
    "square": lambda **options: spectra.norm(np.diag(s1(60)), "fro", **options),
    "density": lambda **options: spectra.spectral_density(np.diag(s1(60)), steps=5, **options),
    "coupling": lambda **options: spectra.block_coupling(of_two_blocks(), "parameter", **options),
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_printed_where_stderr_is_no_terminal(name, capsys):
    CALLS[name]()
    CALLS[name](progress=False)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize("name", CALLS)
def test_a_bar_that_is_asked_for_is_named_and_counts_matvecs(name, capsys):
    CALLS[name](progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert name in captured.err
    assert "matvec" in captured.err


def test_a_terminal_shows_the_bar_unless_told_not_to(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    CALLS["trace"]()
    assert "trace" in sys.stderr.getvalue()
    monkeypatch.setattr(sys, "stderr", Terminal())
    CALLS["trace"](progress=False)
    assert sys.stderr.getvalue() == ""


def test_the_bar_counts_every_product(monkeypatch):
    counts = []

    def counting(name, total, show):
        bar = progress_bar(name, total, True)
        bar.display = lambda *_, **__: None
        update = bar.update
        bar.update = lambda n=1: (counts.append(n), update(n))[1]
        return bar

    for module in ("eigen", "probes", "spectral_norm", "trace", "density", "coupling"):
        monkeypatch.setattr(f"spectra.algorithms.{module}.progress_bar", counting)
    for call in CALLS.values():
        counts.clear()
        assert call(progress=True).matvecs == sum(counts)


def test_showing_progress_changes_no_answer(capsys):
    loud, quiet = CALLS["eigsh"](progress=True), CALLS["eigsh"](progress=False)
    assert np.array_equal(loud.values, quiet.values)
    capsys.readouterr()
