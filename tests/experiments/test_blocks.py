"""The program that measures products of blocks runs, and its table says what was found."""

import json

import pytest

from experiments.blocks import __main__ as program


def test_a_small_run_is_written_down(tmp_path, capsys):
    assert program.main(["--tiny", "--rounds", "3", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    asked = [(row["by"], row["graph"], row["blocks"]) for row in record["rows"]]
    assert asked == [
        (by, graph, 2) for by in ("layer", "module") for graph in ("retained", "fresh")
    ]
    for row in record["rows"]:
        low, high = row["range"]
        assert 0 < low <= row["to one full product"] <= high
        assert len(row["rounds"]) == 3
    assert all(set(profile["shares"]) == {"0", "2"} for profile in record["profiles"])
    assert len(capsys.readouterr().out.splitlines()) == 4


@pytest.mark.slow
def test_answers_of_all_blocks_are_measured_end_to_end(tmp_path, capsys):
    asked = ["--tiny", "--answers", "--rounds", "2", "--out", str(tmp_path)]
    assert program.main(asked) == 0
    record = json.loads((tmp_path / "answers.json").read_text(encoding="utf-8"))
    assert [(row["by"], row["blocks"]) for row in record["rows"]] == [("layer", 2), ("module", 2)]
    for row in record["rows"]:
        # Both blocks together, and up to four probes of each: fewer passes than products.
        assert row["passes"] <= row["products"] <= 2 * 4 * row["passes"]
        for name in ("to as many full products", "to padded products", "to separate blocks"):
            median, low, high = row[name]
            assert 0 < low <= median <= high
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_the_table_says_where_the_bound_holds():
    row = {
        "workload": "net",
        "by": "layer",
        "blocks": 9,
        "graph": "fresh",
        "to one full product": 1.51,
        "to padded products": 0.4,
        "to separate blocks": 0.3,
        "range": [1.4, 1.6],
    }
    lines = program.table([row, {**row, "to one full product": 1.5}]).splitlines()
    assert lines[2] == "| net | layer | 9 | fresh | 1.51 (1.40–1.60) | no | 0.40 | 0.30 |"
    assert "| yes |" in lines[3]
