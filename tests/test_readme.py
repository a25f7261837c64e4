"""The README's Python blocks run as they stand, one after the other."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_the_readme_shows_code():
    assert len(BLOCKS) >= 3


def test_every_block_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"README block {number}", "exec"), namespace)
    residuals = namespace["analysis"].eigenpairs.residuals
    assert len(namespace["pairs"]) == 5
    assert namespace["H"].to_dense().tolist() == [[2, 2], [2, 6]]
    assert residuals == pytest.approx([0, 0], abs=1e-5)
    assert (tmp_path / "my-analysis.json").exists()
