"""`spectra compare` and the pages of `spectra report`, as people run them."""

import json

import numpy as np
import pytest
import torch

import spectra
from spectra.analysis.storage import write_run
from spectra.analysis.trajectory import Measurement, Trajectory
from spectra.cli import main
from tests.cases.matrices import Diagonal


@pytest.fixture
def runs(tmp_path):
    """Two runs of one title that differ in their largest eigenvalue."""
    bulk = np.linspace(-0.5, 0.5, 97)
    for name, top in (("one", 5.0), ("other", 6.0)):
        found = spectra.analyze(
            Diagonal(np.append(bulk, [3.0, 4.0, top])), 3, steps=20, rtol=0.05, progress=False
        )
        write_run(found, tmp_path / name, title="a matrix")
    return tmp_path


def test_two_runs_are_compared(runs, capsys):
    assert main(["compare", str(runs / "one"), str(runs / "other")]) == 0
    told = capsys.readouterr().out
    top = next(line for line in told.splitlines() if line.startswith("λ1 "))
    assert [float(word) for word in top.split()[1:4]] == pytest.approx([5, 6, 1], abs=1e-2)
    # Of one title, the directories tell them apart.
    assert told.splitlines()[0].split()[:2] == ["one", "other"]
    out = runs / "out"
    assert main(["compare", str(runs / "one"), str(runs / "other"), "--out", str(out)]) == 0
    assert "comparison.html" in capsys.readouterr().out
    assert {path.suffix for path in out.iterdir()} == {".html", ".svg", ".png"}


def test_json_is_all_that_is_printed(runs, capsys):
    assert main(["compare", str(runs / "one"), str(runs / "one"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert not any(row["beyond_errors"] for row in found["differences"])
    assert found["distance"] == 0
    assert found["names"] == [str(runs / "one")] * 2


def test_what_is_no_run_is_refused(runs, capsys):
    assert main(["compare", str(runs / "one"), str(runs / "none")]) == 2
    assert "holds no run of spectra" in capsys.readouterr().err
    Trajectory((Measurement(0),)).save(runs / "trajectory")
    assert main(["compare", str(runs / "one"), str(runs)]) == 2
    assert "holds a trajectory of `spectra track`" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["compare", str(runs / "one")])


def test_the_page_of_a_trajectory_is_made_again(tmp_path, capsys):
    steps = tuple(
        Measurement(i, eigenvalues=(1.0 + i,), residuals=(1e-3,), converged=(True,))
        for i in range(2)
    )
    Trajectory(steps).save(tmp_path / "trajectory")
    assert main(["report", str(tmp_path)]) == 0
    assert "trajectory.html" in capsys.readouterr().out
    assert "sharpness from 1" in (tmp_path / "trajectory.html").read_text(encoding="utf-8")
    # Another result under that name.
    spectra.eigsh(torch.eye(3), 1, progress=False).save(tmp_path / "trajectory")
    assert main(["report", str(tmp_path)]) == 2
    assert "holds a Eigenpairs under the name trajectory" in capsys.readouterr().err
