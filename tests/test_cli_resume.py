"""`spectra analyze` that is ended, by whatever, goes on with --resume."""

import json
import os
import signal
from pathlib import Path

import pytest

import spectra
from experiments.reliability.kill_and_resume import identical
from spectra.cli import main

TARGET = """
import os
import signal
import torch
import spectra

count = 0


def target():
    model, loss, data = spectra.integrations.digits.trained_digits(hidden=4, steps=20)
    H = spectra.HessianOperator(model, loss, data)
    compute = H._products

    def products(rows):
        global count
        count += 1
        event = os.environ.get("EVENT", "")
        if event and count == 20:
            if event == "ValueError":
                raise ValueError("a cosmic ray")
            os.kill(os.getpid(), getattr(signal, event))
        return compute(rows)

    H._products = products
    return H
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    Path("target.py").write_text("import spectra.integrations.digits" + TARGET)

    def go(*more, event="", out="out"):
        monkeypatch.setenv("EVENT", event)
        options = ["--top", "3", "--steps", "8", "--probes", "2", "--rtol", "0.3", *more]
        status = main(["analyze", "target.py:target", "--out", out, *options])
        return status, capsys.readouterr()

    return go


def summary(out="out"):
    return json.loads((Path(out) / "run.json").read_text())


@pytest.mark.parametrize(
    ("event", "status"), [("SIGINT", 130), pytest.param("SIGTERM", 143, marks=pytest.mark.slow)]
)
def test_a_run_that_is_stopped_is_written_as_partial_and_goes_on(run, event, status):
    whole = run(out="whole")[0]
    stopped, said = run(event=event)
    assert stopped == status
    assert "--resume" in said.err
    assert f"partial: stopped by {event}" in said.out
    assert summary()["partial"]
    assert spectra.load("out/analysis").partial
    assert Path("out/checkpoint").exists()
    resumed, said = run("--resume")
    assert resumed == whole
    assert "Going on from what out/checkpoint holds" in said.out
    assert not Path("out/checkpoint").exists()
    assert not summary()["partial"]
    assert identical(spectra.load("out/analysis"), spectra.load("whole/analysis"))


def test_a_run_that_fails_goes_on(run):
    whole = run(out="whole")[0]
    status, said = run(event="ValueError")
    assert status == 3
    assert "what was computed is in out/checkpoint" in said.err
    assert not Path("out/run.json").exists()
    assert run("--resume")[0] == whole
    assert identical(spectra.load("out/analysis"), spectra.load("whole/analysis"))


def test_an_unfinished_run_is_not_overwritten_by_accident(run):
    run(event="ValueError")
    status, said = run()
    assert status == 2
    assert "go on with it by --resume" in said.err
    status, said = run("--resume", "--overwrite")
    assert status == 2
    assert "give one of them" in said.err
    assert run("--overwrite")[0] in {0, 1}


def test_other_options_do_not_go_on(run):
    run(event="ValueError")
    status, said = run("--resume", "--seed", "5")
    assert status == 2
    assert "option seed (0 before, 5 now)" in said.err
    assert "--overwrite" in said.err
    # Not both at once.
    assert "goes on from it" not in said.err


def test_resume_begins_where_there_is_nothing_and_ends_where_all_is_done(run):
    first = run("--resume")[0]
    before = summary()
    again, said = run("--resume")
    assert again == first
    assert "nothing to resume" in said.out
    assert summary() == before
    assert json.loads(run("--resume", "--json")[1].out) == before


def test_handlers_of_signals_are_as_before(run):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    run(event="SIGTERM")
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert os.environ["EVENT"] == "SIGTERM"
