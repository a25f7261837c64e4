"""Modules, classes and files may be called anything: no page, figure or terminal obeys a name."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser

import pytest
import torch

import spectra
from spectra.analysis.storage import read_run, read_summary, write_run
from spectra.cli import main
from spectra.names import printable, short_name
from spectra.report.pages import write_figures
from spectra.report.report import draw_figures, write_report

NAMES = {
    "markup": "</td></script><script>alert(1)</script>",
    "attribute": "\" onload='alert(1)' x=\"<img src=x onerror=alert(1)>",
    "template": "{{ 7 * 7 }}{% raw %}&lt;b&gt;",
    "formula": "$\\frac{$x_1^$\\undefined$",
    "terminal": "\x1b[2J\x1b]0;owned\x07\x9b31m\x08\r",
    "lines": "a\nnote: everything converged\u2028b\vc",
    "controls": "\x00\x01\x7f\ufffe\x85",
    "surrogate": "\ud800x\udfff",
    "direction": "\u202eabc\u2066\u200f\ufeff",
    "long": "x" * 100_000,
    "json": '"],"value":1e999}\\u0000\\',
}
# What no terminal and no page may receive: all that is neither a letter nor a line break.
FORBIDDEN = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufffe]"
)


def is_harmless(text: str) -> bool:
    return FORBIDDEN.search(text) is None and all(not 0xD800 <= ord(c) < 0xE000 for c in text)


def network():
    """A model of many modules with such names, in the names of parameters and of its class, too."""
    model = type(NAMES["markup"] + NAMES["terminal"], (torch.nn.Module,), {})()
    for name in NAMES.values():
        module = torch.nn.Module()
        module.register_parameter(name.replace(".", ""), torch.nn.Parameter(torch.ones(2)))
        model.add_module(name.replace(".", ""), module)
    return model.double()


def loss(model, batch):
    x = torch.cat(list(model.parameters()))
    return (torch.arange(1, len(x) + 1, dtype=x.dtype) * x**4).mean()


loss.__qualname__ = loss.__name__ = "loss<b>\x1b[31m"
loss.weight = lambda batch: 1.0


def target():
    return network(), loss, [torch.ones(1)]


@pytest.fixture(scope="module")
def analysis():
    operator = spectra.HessianOperator(*target())
    return spectra.analyze(operator, 3, steps=5, probes=2, progress=False)


class Tags(HTMLParser):
    """The tags and attributes of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.attributes: set[str] = set()
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.add(tag)
        self.attributes.update(name for name, _ in attrs)


def test_a_run_of_such_a_model_is_saved_and_read_back(analysis, tmp_path):
    title = "".join(NAMES.values())
    summary = write_run(analysis, tmp_path, title=title, source=NAMES)
    assert read_summary(tmp_path) == summary
    assert summary["source"] == NAMES
    again = read_run(tmp_path)
    assert again.blocks.parameters == analysis.blocks.parameters
    assert str(again) == str(analysis)
    assert json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["title"] == title


@pytest.mark.filterwarnings("ignore:Glyph")
def test_the_page_and_the_figures_show_such_names_and_do_not_obey_them(analysis, tmp_path):
    title = "".join(NAMES.values())
    drawings = draw_figures(analysis)
    figures = write_figures(drawings, tmp_path, ["svg"])
    assert {"trace_by_layer", "eigenvectors_by_layer"} <= set(figures)
    path = write_report(analysis, tmp_path / "report.html", title=title, figures=drawings)
    page = path.read_text(encoding="utf-8")
    tags = Tags(page)
    assert tags.found <= set(
        "html head meta title style body main h1 h2 p section ul li strong div figure img "
        "figcaption span button table thead tbody tr th td a code script".split()
    )
    assert page.count("<script") == page.count("</script>") == 1
    assert tags.attributes <= set(
        "lang charset name content http-equiv class src alt data-readings data-shown hidden role "
        "aria-label aria-pressed type download href".split()
    )
    assert is_harmless(page)
    assert "7 * 7" in page
    for name in NAMES.values():
        assert html.escape(printable(name)).replace("&#x27;", "&#39;").replace(
            "&quot;", "&#34;"
        ) in page.replace("&quot;", "&#34;")
    for figure in figures.values():
        assert is_harmless(figure.read_text(encoding="utf-8"))


def test_what_is_printed_holds_such_names_as_letters(analysis):
    trace = analysis.module_traces()[NAMES["controls"]]
    for text in map(str, (analysis, analysis.blocks, trace)):
        assert is_harmless(text)
        assert max(map(len, text.splitlines())) < 250
    # No name makes a line of its own.
    assert not [
        line for line in str(analysis.blocks).splitlines() if line.startswith("note: every")
    ]


@pytest.mark.filterwarnings("ignore:Glyph")
def test_the_command_line_prints_such_names_as_letters(tmp_path, capsys):
    out = tmp_path / "run\x1b[31m\u202e"
    place = "tests.test_hostile_names:target"
    assert main(["analyze", place, "--out", str(out), "--top", "2", "--steps", "4"]) in {0, 1}
    assert main(["report", str(out)]) == 0
    assert main(["report", str(tmp_path / "missing\x1b[31m")]) == 2
    printed = capsys.readouterr()
    assert "\\x9b31m\\x08\\r" in printed.out
    assert "missing\\x1b[31m" in printed.err
    assert is_harmless(printed.out)
    assert is_harmless(printed.err.replace("\r", ""))


def test_a_long_name_is_shown_by_its_end():
    assert short_name("a" * 100) == "a" * 100
    assert short_name("b" + "a" * 100) == "…" + "a" * 99
    assert len(short_name("\x00" * 10**6)) == 100
    assert short_name("λ – الطبقة") == "λ – الطبقة"
