"""The documentation runs: its Python blocks, its command lines, and what it says of the code.

Links to headings and the scripts of the gallery are checked by the build of the site, `make docs`.
"""

import re
import shlex
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import spectra
from spectra.cli import _parser

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
SCRIPTS = sorted((DOCS / "gallery").glob("*.py"))
# Without what a build of the site has left there.
BUILT = {script.with_suffix(".md") for script in SCRIPTS}
PAGES = sorted(
    page for page in DOCS.rglob("*.md") if DOCS / "_build" not in page.parents and page not in BUILT
)
EXPERIMENTS = sorted((ROOT / "experiments").rglob("README.md"))
ALL = [ROOT / "README.md", ROOT / "CHANGELOG.md", *PAGES, *EXPERIMENTS]


def name_of(page):
    return page.relative_to(ROOT).with_suffix("").as_posix()


def text_of(page):
    return page.read_text(encoding="utf-8")


def blocks(page, languages=("python",)):
    found = re.findall(r"^```(.*)\n((?:.*\n)*?)```$", text_of(page), re.MULTILINE)
    return [block for language, block in found if language in languages]


def prose(page):
    """A page without its blocks of code."""
    return re.sub(r"^```.*\n(?:.*\n)*?```$", "", text_of(page), flags=re.MULTILINE)


def commands(page):
    """The command lines of a page, in words, with continued lines joined and comments left out."""
    lines = "\n".join(blocks(page, ("sh", "bash", "console"))).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for number, block in enumerate(blocks(page)):
        exec(compile(block, f"{page.name}, block {number}", "exec"), namespace)


def test_there_are_pages_with_code():
    assert sum(bool(blocks(page)) for page in PAGES) >= 20


@pytest.mark.parametrize("page", ALL, ids=name_of)
def test_the_command_lines_of_a_page_can_be_parsed(page):
    for words in commands(page):
        if "spectra" in words:
            _parser().parse_args(words[words.index("spectra") + 1 :])


def test_there_are_command_lines():
    parsed = [words for page in ALL for words in commands(page) if "spectra" in words]
    assert len(parsed) >= 10


def test_an_option_that_does_not_exist_is_seen(capsys):
    with pytest.raises(SystemExit):
        _parser().parse_args(["analyze", "target.py:target", "--out", "run", "--topp", "3"])
    assert "--topp" in capsys.readouterr().err


def test_targets_of_make_in_pages_exist():
    targets = set(re.findall(r"^([a-z-]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    asked = {words[1] for page in ALL for words in commands(page) if words[:1] == ["make"]}
    assert {"test", "lint", "docs"} <= asked <= targets


@pytest.mark.parametrize("page", ALL, ids=name_of)
def test_links_between_files_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", prose(page))
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", ALL, ids=name_of)
def test_addresses_are_complete(page):
    # Whether anything is there, `make docs-links` asks.
    for address in re.findall(r"\]\((\w+:[^)]*)\)", prose(page)):
        parts = urlsplit(address)
        assert parts.scheme == "https", address
        assert re.fullmatch(r"(\w[\w-]*\.)+[a-z]{2,}", parts.netloc), address
        assert not re.search(r"\s", address), address


def test_the_list_of_pages_has_all_of_them():
    listed = re.findall(r"\]\(([^)#:]+)\)", text_of(DOCS / "README.md"))
    reached = {(DOCS / link).resolve() for link in listed}
    unlisted = {DOCS / "README.md", DOCS / "index.md", *(DOCS / "reference").iterdir()}
    assert set(PAGES) - unlisted <= reached


def documented():
    """What the pages of the reference describe, as often as they do."""
    text = "".join(text_of(page) for page in (DOCS / "reference").glob("*.md"))
    kinds = "autofunction|autoclass|autoexception|automodule|module"
    return re.findall(rf"^\.\. (?:{kinds}):: (\S+)$", text, re.MULTILINE)


def test_every_public_name_is_in_the_reference_once():
    found = [name.removeprefix("spectra.") for name in documented()]
    assert sorted(name for name in found if "." not in name) == sorted(spectra.__all__)
    assert len(set(found)) == len(found)


def test_every_loss_is_in_the_reference():
    assert {f"spectra.losses.{name}" for name in spectra.losses.__all__} <= set(documented())


def test_the_floors_are_those_that_the_linter_enforces():
    declared = re.search(r"^layers = \[\n(.*?)^\]", text_of(ROOT / "pyproject.toml"), re.M | re.S)
    floors = [re.findall(r"\w+", line) for line in declared[1].splitlines()]
    rows = re.findall(r"^\| (`.*?) \|", text_of(DOCS / "design.md"), re.MULTILINE)
    assert [re.findall(r"\w+", row) for row in rows] == floors


def test_the_gallery_lists_its_scripts():
    listed = re.findall(r"\[script\]\((\w+)\.py\)", text_of(DOCS / "gallery" / "README.md"))
    assert sorted(listed) == [script.stem for script in SCRIPTS]
