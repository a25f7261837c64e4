"""`spectra track`, as people run it: targets, checkpoints, going on, wrong input."""

import json
from pathlib import Path

import pytest
import torch

import spectra
from spectra.cli import main
from tests.cases.checkpoints import SIZES, curved, save, word_tokenizer

TARGET = """
import os
import signal
import torch
import spectra

count = 0


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))


def target():
    torch.manual_seed(1)
    data = [(torch.randn(20, 4), torch.randint(3, (20,)))]
    return network(), spectra.losses.supervised(torch.nn.CrossEntropyLoss()), data


def with_optimizer():
    model, loss, data = target()
    return model, loss, data, torch.optim.Adam(model.parameters(), lr=0.05)


def ending():
    H = spectra.HessianOperator(*target())
    compute = H._products

    def products(rows):
        global count
        count += 1
        if count == 20 and os.environ["EVENT"]:
            os.kill(os.getpid(), getattr(signal, os.environ["EVENT"]))
        return compute(rows)

    H._products = products
    return H


def matrix():
    return spectra.as_operator(torch.eye(3))
"""


@pytest.fixture
def place(tmp_path, monkeypatch, capsys):
    """A directory with a target and three checkpoints of a training with Adam."""
    monkeypatch.chdir(tmp_path)
    Path("target.py").write_text(TARGET)
    names = {}
    exec(TARGET, names)
    model, loss, data, optimizer = names["with_optimizer"]()
    for step in range(9):
        optimizer.zero_grad()
        loss(model, data[0]).backward()
        optimizer.step()
        if step % 4 == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, f"step-{step}.pt")
    return tmp_path


@pytest.fixture
def track(place, capsys):
    def go(*arguments, target="target.py:target", out="out"):
        given = [target] if target else []
        status = main(["track", *given, *map(str, arguments), "--out", out])
        return status, capsys.readouterr()

    return go


FILES = ("step-8.pt", "step-0.pt", "step-4.pt")


def test_a_table_a_figure_and_a_result_come_out(track):
    status, said = track(*FILES, "--top", "2", "--trace")
    assert status == 0, said.err
    table = [line for line in said.out.splitlines() if not line.startswith("note: ")]
    assert max(map(len, table)) <= 80
    assert "step-4.pt" in said.out
    assert "Wrote out/trajectory.json, out/trajectory.svg, out/trajectory.html" in said.out
    trajectory = spectra.load("out/trajectory")
    assert [m.step for m in trajectory] == [0, 4, 8]
    assert all(len(m.eigenvalues) == 2 and m.trace_converged for m in trajectory)
    # Adam's, from its saved options: 2 (1 + β₁) / ((1 − β₁) lr), after one step.
    assert trajectory[0].threshold == pytest.approx(2 * 1.9 / 0.1 / 0.05 * 0.1)
    assert sorted(path.name for path in Path("out").iterdir()) == [
        *(
            "trajectory.html",
            "trajectory.json",
            "trajectory.png",
            "trajectory.safetensors",
            "trajectory.svg",
        ),
    ]


def test_json_holds_every_row_and_nothing_else(track):
    status, said = track(*FILES, "--json", "--lr", "0.1")
    assert status == 0
    rows = json.loads(said.out)["rows"]
    assert [row["step"] for row in rows] == [0, 4, 8]
    assert rows[0]["threshold"] == pytest.approx(20.0)
    assert rows[0]["overlap"] is None


def test_the_preconditioned_sharpness_needs_the_optimiser_of_the_target(track):
    status, said = track(*FILES, "--preconditioned", target="target.py:with_optimizer")
    assert status == 0, said.err
    trajectory = spectra.load("out/trajectory")
    assert all(m.preconditioned_converged for m in trajectory)
    status, said = track(*FILES, "--preconditioned", out="other")
    assert status == 2
    assert "return (model, loss, data, optimizer)" in said.err


def test_a_target_with_an_optimiser_is_analysed_as_well(place, capsys):
    options = ["--top", "1", "--density", "--steps", "4", "--probes", "2"]
    assert main(["analyze", "target.py:with_optimizer", "--out", "run", *options]) == 0


def test_a_trajectory_goes_on_with_the_checkpoints_that_came_since(track):
    assert track(*FILES[1:])[0] == 0
    first = spectra.load("out/trajectory")
    status, said = track(*FILES)
    assert status == 2
    assert "--resume" in said.err
    assert track(*FILES, "--resume")[0] == 0
    grown = spectra.load("out/trajectory")
    assert [m.eigenvalues for m in grown][:2] == [m.eigenvalues for m in first]
    assert len(grown) == 3
    status, said = track(*FILES, "--resume", "--top", "2")
    assert status == 2
    assert "option k" in said.err
    assert track(*FILES, "--overwrite", "--top", "2")[0] == 0
    assert track(*FILES, "--overwrite", "--resume")[0] == 2


@pytest.mark.parametrize(("event", "expected"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_what_was_stopped_goes_on(track, event, expected, monkeypatch):
    monkeypatch.setenv("EVENT", "")
    assert track(*FILES, target="target.py:ending", out="whole")[0] == 0
    monkeypatch.setenv("EVENT", event)
    status, said = track(*FILES, target="target.py:ending")
    assert status == expected
    assert "--resume goes on" in said.err
    assert 0 < len(spectra.load("out/trajectory")) < 3
    monkeypatch.setenv("EVENT", "")
    assert track(*FILES, "--resume", target="target.py:ending")[0] == 0
    mine, whole = (spectra.load(f"{out}/trajectory") for out in ("out", "whole"))
    assert [m.eigenvalues for m in mine] == [m.eigenvalues for m in whole]
    assert [repr(m.overlap) for m in mine] == [repr(m.overlap) for m in whole]


def test_what_did_not_converge_is_said_by_the_status(track):
    content = torch.load("step-4.pt", weights_only=True)
    content["model"]["0.weight"][0, 0] = float("nan")
    torch.save(content, "step-4.pt")
    status, said = track(*FILES)
    assert status == 1
    assert "step 4 failed" in said.out


@pytest.mark.parametrize(
    ("arguments", "target", "match"),
    [
        ((), "target.py:target", "no CHECKPOINT"),
        (("none.pt",), "target.py:target", "no file or directory 'none.pt'"),
        (("target.py",), "target.py:target", "no file of weights by its name"),
        (FILES, "target.py:matrix", "expected a HessianOperator"),
        (FILES, "target.py:none", "no function 'none'"),
        ((*FILES, "--text", "target.py"), "target.py:target", "goes with --hf"),
        ((*FILES, "--hf", "."), None, "--text"),
    ],
)
def test_wrong_input_is_said_and_nothing_is_left(track, arguments, target, match):
    status, said = track(*arguments, target=target)
    assert status == 2
    assert match in said.err
    assert "Traceback" not in said.err
    assert not list(Path().glob("out/*"))


def test_directories_of_hugging_faces_need_no_target(track):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=SIZES["vocab_size"], n_positions=16, n_embd=8, n_layer=1, n_head=2
    )
    model = transformers.GPT2LMHeadModel(config)
    for step in (9, 10):
        save(curved(model), Path(f"checkpoint-{step}"), word_tokenizer())
    Path("text.txt").write_text("the quick brown fox jumps over the lazy dog " * 3)
    options = ["--hf", "checkpoint-9", "--text", "text.txt", "--tokens-per-sequence", "8"]
    status, said = track("checkpoint-9", "checkpoint-10", *options, target=None)
    assert status == 0, said.err
    assert [m.step for m in spectra.load("out/trajectory")] == [9, 10]
