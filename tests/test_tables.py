"""Every table that the command line prints fits into 80 columns, whatever names and numbers are."""

import re
from pathlib import Path

import pytest
import torch

from spectra.algorithms.blocks import aligned
from spectra.cli import main

# Modules of a model that somebody generated, and a loss in no natural unit.
TARGET = """
import torch, spectra

def target(scale=-1.23456e12):
    torch.manual_seed(0)
    model = torch.nn.ModuleDict()
    for i in range(8):
        name = f"backbone_encoder_stage_number_{i}_with_residual_attention_and_a_very_long_name"
        model[name] = torch.nn.ModuleDict({"projection_of_values": torch.nn.Linear(2, 2)})
    data = [(torch.randn(20, 2), torch.randn(20, 2)) for _ in range(2)]

    def loss(model, batch):
        x, y = batch
        for module in model.values():
            x = x + torch.tanh(module["projection_of_values"](x)) / 5
        return scale * (x - y).square().mean()

    loss.weight = lambda batch: 20.0
    return model.double(), loss, [(x.double(), y.double()) for x, y in data]
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("spectra.cli._draw", lambda *_: [])
    Path("made.py").write_text(TARGET, encoding="utf-8")

    def go(*arguments):
        assert main(arguments) in {0, 1}
        return capsys.readouterr().out

    return go


def rows(text):
    """The lines that have columns: what is prose may be longer."""
    return [line for line in text.splitlines() if re.search(r"\S {2,}[^ (\[]", line)]


def test_tables_of_long_names_and_large_numbers_fit_into_80_columns(run):
    place = "made.py:target"
    printed = [
        run("check", place),
        run("analyze", place, "--out", "a", "--top", "30", "--steps", "5", "--rtol", "0.5"),
        run("analyze", place, "--out", "another_directory_with_a_long_name", "--top", "2"),
        run("compare", "a", "another_directory_with_a_long_name"),
    ]
    widths = [[len(line) for line in rows(text)] for text in printed]
    # Findings and forecasts; 40 pairs and 25 layers; as many numbers as both runs have.
    least = (11, 39, 11, 6)
    assert all(len(found) >= few for found, few in zip(widths, least, strict=True)), widths
    assert not [line for text in printed for line in rows(text) if len(line) > 80]


def test_a_trajectory_of_large_numbers_fits_into_80_columns(run):
    names = {}
    exec(TARGET, names)
    model, *_ = names["target"]()
    files = [f"a_checkpoint_whose_name_is_long_at_step-{10**9 + i}.pt" for i in range(2)]
    for file in files:
        torch.save(model.state_dict(), file)
    text = run("track", "made.py:target", *files, "--out", "out", "--top", "3", "--trace")
    assert len(rows(text)) >= 3
    assert not [line for line in rows(text) if len(line) > 80]


def test_names_are_cut_first_and_then_columns_left_out():
    numbers = ["-1.2345e+100"] * 5
    name = "an.encoder.of.a.very.long.name.indeed"
    (line,) = aligned([[name, *numbers[:3]]])
    assert line.split() == ["….encoder.of.a.very.long.name.indeed", *numbers[:3]]
    assert len(line) == 80
    (line,) = aligned([[name, *numbers]])
    assert line.split() == ["…very.long.name.indeed", *numbers[:4]]
    assert len(line) == 80
