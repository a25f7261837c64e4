"""The progress bar: on when asked for, silent in a pipe, and it counts products."""

import contextlib
import io
import os
import re
import struct
import sys
import threading
import time

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator

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
    "Frobenius norm": lambda **options: spectra.norm(np.diag(s1(60)), "fro", **options),
    "density": lambda **options: spectra.spectral_density(np.diag(s1(60)), steps=5, **options),
    "diagonal": lambda **options: spectra.diagonal(np.diag(s1(60)), **options),
    "Lanczos": lambda **options: spectra.norm(np.diag(s1(60)), method="lanczos", **options),
    "solve": lambda **options: spectra.solve(np.diag(s1(60)), np.ones(60), damping=9.0, **options),
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

    def counting(name, total, show, **options):
        bar = progress_bar(name, total, True, **options)
        bar.display = lambda *_, **__: None
        update = bar.update
        bar.update = lambda n=1: (counts.append(n), update(n))[1]
        return bar

    searches = ("eigen", "spectral_norm", "density", "diagonal", "solve")
    for module in (*searches, "probes", "trace", "coupling"):
        monkeypatch.setattr(f"spectra.algorithms.{module}.progress_bar", counting)
    for call in CALLS.values():
        counts.clear()
        assert call(progress=True).matvecs == sum(counts)


def test_showing_progress_changes_no_answer(capsys):
    loud, quiet = CALLS["eigsh"](progress=True), CALLS["eigsh"](progress=False)
    assert np.array_equal(loud.values, quiet.values)
    capsys.readouterr()


class Screen:
    """What a terminal of a certain width shows: every line that it ever had, and those it has."""

    def __init__(self, width):
        self.width, self.lines, self.seen = width, [""], []
        self.row = self.column = 0

    def feed(self, text):
        for piece in re.findall(r"\x1b\[A|[\r\n]|[^\r\n\x1b]+|\x1b", text):
            if piece == "\x1b[A":
                self.row -= 1
            elif piece == "\r":
                self.column = 0
            elif piece == "\n":
                self.row += 1
                self.lines += [""] * (self.row + 1 - len(self.lines))
            else:
                assert "\x1b" not in piece
                line = self.lines[self.row].ljust(self.column)
                line = line[: self.column] + piece + line[self.column + len(piece) :]
                self.lines[self.row] = line
                self.column += len(piece)
                self.seen.append(line.rstrip())


@contextlib.contextmanager
def terminal(monkeypatch, width, encoding="utf-8"):
    """A real pseudo-terminal as stderr."""
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    import fcntl

    monkeypatch.setenv("TERM", "xterm")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, width, 0, 0))
    chunks, screen = [], Screen(width)

    def read():
        # Linux says EIO where the other end is closed.
        with contextlib.suppress(OSError):
            while chunk := os.read(ours, 4096):
                chunks.append(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with open(theirs, "w", encoding=encoding) as stream, monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", stream)
            yield screen
    finally:
        reader.join()
        os.close(ours)
    # A terminal turns a line feed into a carriage return and a line feed.
    screen.feed(b"".join(chunks).decode(encoding).replace("\r\n", "\n"))


def slow(values, seconds=0.02):
    """An operator that takes its time: a bar is drawn ten times a second."""

    def product(x):
        time.sleep(seconds)
        return values * x.ravel()

    return LinearOperator((len(values), len(values)), matvec=product, dtype=float)


@pytest.mark.parametrize("width", [80, 40, 12])
def test_on_a_terminal_ritz_values_converge_below_the_bar_within_its_width(monkeypatch, width):
    with terminal(monkeypatch, width) as screen:
        pairs = spectra.eigsh(slow(s1(400)), 5)
    assert max(map(len, screen.seen)) <= width
    assert "".join(screen.lines).strip() == ""
    bars = [line for line in screen.seen if line.startswith("eigsh: ")]
    values = [line for line in screen.seen if line.startswith("λ")]
    assert bars
    assert values
    if width == 80:
        assert any(re.search(r"[0-4] of 5 converged, residual \de-\d\d", line) for line in bars)
        assert any("looking for missed ones" in line for line in bars)
        assert any(re.search(r"\d ✓ .*±\de-\d\d", line) for line in values)
        assert values[-1] == "λ  " + "  ".join(f"{value:.4g} ✓" for value in pairs.values)


def test_the_time_that_is_left_is_said_as_well_as_it_is_known(monkeypatch):
    with terminal(monkeypatch, 80) as screen:
        spectra.spectral_density(slow(s1(100)), steps=10, probes=2)
        spectra.eigsh(slow(s1(100)), 3)
        spectra.trace(slow(s1(100)), rtol=0.2, method="hutchinson", max_matvecs=40)
    text = "\n".join(screen.seen)
    assert re.search(r"density: \d+/20 matvecs, probe 2 of 2, \d\d:\d\d \(\d\d:\d\d left\)", text)
    assert re.search(r"eigsh: \d+/≤260 matvecs, .*\(≤\d\d:\d\d left\)", text)
    assert re.search(r"trace: \d+/[~≤]\d+ matvecs, \d+(\.\d+)? ± \d+", text)


def test_a_terminal_without_letters_beyond_ascii_gets_none(monkeypatch):
    with terminal(monkeypatch, 80, encoding="ascii") as screen:
        spectra.eigsh(slow(s1(400)), 3)
    assert any(line.startswith("Ritz  100 *") for line in screen.seen)


def test_what_cannot_move_its_cursor_gets_one_line(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "dumb")
    spectra.eigsh(slow(s1(400)), 3)
    assert "of 3 converged" in sys.stderr.getvalue()
    assert "\n" not in sys.stderr.getvalue()
    assert "\x1b" not in sys.stderr.getvalue()


def test_an_interrupted_search_leaves_no_line_behind(monkeypatch):
    spent = []

    def product(x):
        spent.append(1)
        time.sleep(0.02)
        if len(spent) == 20:
            raise KeyboardInterrupt
        return s1(400) * x.ravel()

    operator = LinearOperator((400, 400), matvec=product, dtype=float)
    with terminal(monkeypatch, 80) as screen, pytest.raises(KeyboardInterrupt):
        spectra.eigsh(operator, 10)
    assert any(line.startswith("λ") for line in screen.seen)
    assert "".join(screen.lines).strip() == ""


def test_a_total_beyond_the_budget_is_not_expected():
    with progress_bar("trace", 300, True, at_most=True) as bar:
        assert str(bar).startswith("trace: 0/≤300 matvecs")
        bar.expect(48.2)
        assert str(bar).startswith("trace: 0/~48 matvecs")
        bar.expect(float("inf"))
        assert str(bar).startswith("trace: 0/≤300 matvecs")


def test_a_status_cannot_command_a_terminal():
    with progress_bar("track", 2, True, "checkpoint") as bar:
        bar.tell("step\x1b[31m\n.pt")
        assert r"0/2 checkpoints, step\x1b[31m\n.pt" in str(bar)
