"""The page says all that the analysis holds, with its errors, and runs nothing that it quotes."""

from __future__ import annotations

import base64
import csv
import dataclasses
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from importlib import resources

import matplotlib
import numpy as np
import pytest
import torch

import spectra
from spectra.errors import ArgumentError, ArgumentTypeError, StorageError
from spectra.report import downloads
from spectra.report.pages import illustrated
from spectra.report.report import draw_figures, save_figures, switches, write_report
from tests.cases.matrices import Diagonal, s1, semicircle, tanh_network

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYAAAAAYAAjCB0C8AAAAASUVORK5CYII="
)
SCRIPT = (resources.files("spectra.report") / "templates" / "page.js").read_text("utf-8")


class Page(HTMLParser):
    """A page as text, tables and addresses; fails on tags that do not close one another."""

    VOID = frozenset({"meta", "img", "br", "hr", "link", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.images: list[str] = []
        self.links: dict[str, str] = {}
        self.readings: list[list] = []
        self.scripts: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        given = dict(attrs)
        assert not [name for name in given if name == "srcset" or name.startswith("on")]
        if "src" in given:
            self.images.append(given["src"])
        if "href" in given:
            self.links[given["download"]] = given["href"]
        if "data-readings" in given:
            self.readings.append(json.loads(given["data-readings"]))
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"}:
            self.rows[-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in {"td", "th"}:
            self.rows[-1][-1] += data
        if "script" in self.open:
            self.scripts.append(data)
        elif "style" not in self.open:
            self.text += data

    def row(self, name: str) -> list[str]:
        return next(row for row in self.rows if row and row[0] == name)


@pytest.fixture(scope="module")
def analysis():
    H = tanh_network()[0]
    return spectra.analyze(H, 6, steps=15, rtol=0.2, landscape=True, progress=False)


@pytest.fixture(scope="module")
def doubtful():
    """An analysis in which every part has something to say against it."""
    analysis = spectra.analyze(
        Diagonal(semicircle(300)), 4, steps=15, probes=1, max_matvecs=5, progress=False
    )
    pairs = spectra.eigsh(Diagonal(semicircle(300)), 6, max_matvecs=40, progress=False)
    norm = spectra.norm(Diagonal(semicircle(300)), 2, max_matvecs=5, progress=False)
    return dataclasses.replace(analysis, eigenpairs=pairs, spectral_norm=norm)


@pytest.fixture(scope="module")
def page(analysis, tmp_path_factory):
    path = write_report(analysis, tmp_path_factory.mktemp("report") / "report.html")
    return Page(path.read_text(encoding="utf-8"))


def written(analysis, directory, figures=(), **options) -> Page:
    """The page, without figures unless they are asked for: to draw takes longer than all else."""
    figures = figures if figures is None else dict(figures)
    path = write_report(analysis, directory / "r.html", figures=figures, **options)
    return Page(path.read_text("utf-8"))


def test_every_eigenvalue_stands_beside_its_residual(analysis, page):
    rows = [row for row in page.rows if row[0].isdigit() and len(row) == 4]
    assert len(rows) == 6
    for i, (index, value, residual, converged) in enumerate(rows):
        assert int(index) == i + 1
        assert float(value) == pytest.approx(analysis.eigenpairs.values[i], rel=1e-7)
        assert float(residual) == pytest.approx(analysis.eigenpairs.residuals[i], rel=0.06)
        assert converged == "yes"


@pytest.mark.parametrize("name", ["trace", "Frobenius norm", "spectral norm"])
def test_every_estimate_stands_beside_its_interval(analysis, page, name):
    part = getattr(analysis, name.replace(" ", "_").lower())
    _, value, error, method, _, converged = page.row(name)
    assert float(value) == pytest.approx(part.value, rel=1e-2)
    assert "interval" in error or "within" in error or "exact" in error
    assert part.method in method
    assert converged == "yes"


def test_an_interval_is_printed_with_the_digits_that_it_has(tmp_path):
    analysis = spectra.analyze(Diagonal(semicircle(300)), 4, steps=15, progress=False)
    low, high = analysis.trace.interval()
    error = written(analysis, tmp_path).row("trace")[2]
    printed = re.fullmatch(r"95% interval (\S+) to (\S+)", error)
    assert [float(end) for end in printed.groups()] == pytest.approx([low, high], rel=1e-2)
    assert all(len(end.strip("-").replace(".", "")) <= 4 for end in printed.groups())


def test_every_layer_stands_beside_its_error_and_its_share_of_the_eigenvectors(analysis, page):
    head = page.row("layer")
    assert head[1:5] == ["parameters", "trace", "error", "per parameter"]
    assert head[5:] == [f"λ = {value:.4g}" for value in analysis.eigenpairs.values[:2]]
    vectors = analysis.eigenpairs.vectors
    for name, place in {"0": slice(0, 25), "2": slice(25, 43)}.items():
        found = next(row for row in page.rows if row[0] == name and len(row) == len(head))
        trace = analysis.module_traces()[name]
        low, high = trace.interval()
        assert int(found[1]) == place.stop - place.start
        assert float(found[2]) == pytest.approx(trace.value, rel=0.01)
        assert float(found[3].removeprefix("± ")) == pytest.approx((high - low) / 2, rel=0.06)
        share = float((vectors[place, 0] ** 2).sum())
        assert float(found[5].removesuffix("%")) == pytest.approx(100 * share, abs=0.06)
    assert f"from {analysis.blocks.probes} probes" in page.text


def test_the_table_of_layers_is_left_out_where_there_are_none(doubtful, tmp_path):
    assert not [row for row in written(doubtful, tmp_path).rows if row[0] == "layer"]


def test_the_summary_is_a_sentence_with_errors(analysis, page):
    value, residual = analysis.eigenpairs.values[0], analysis.eigenpairs.residuals[0]
    assert f"Largest eigenvalue {value:.6g} (residual {residual:.1g}); " in page.text
    assert "; trace " in page.text
    assert "6 of 6 eigenpairs converged" in page.text
    assert f"cost {analysis.total_matvecs} products in " in page.text


def test_the_summary_counts_outliers_and_negative_eigenvalues(tmp_path):
    values = s1(500)
    text = written(spectra.analyze(Diagonal(values), 10, steps=30, progress=False), tmp_path).text
    count, edge = re.search(r"; (\d+) eigenvalues stand above ([\d.]+), beyond", text).groups()
    assert int(count) == (values > float(edge)).sum() == 10
    found = re.search(r"are below (\S+) \(95% interval (\S+) to (\S+)%\)", text)
    limit, low, high = map(float, found.groups())
    assert low <= 100 * (values < limit).mean() <= high


@pytest.mark.parametrize(
    ("values", "which", "words"),
    [
        ([5.0, 1.0, 0.0, -7.0], "LM", "Eigenvalue of largest magnitude -7 "),
        ([9.0, 1.0, 0.0, -7.0], "LM", "Largest eigenvalue 9 "),
        ([9.0, 1.0, 0.0, -7.0], "LA", "Largest eigenvalue 9 "),
        ([9.0, 1.0, 0.0, -7.0], "SA", "Smallest eigenvalue -7 "),
        ([9.0, 1.0, 0.0, -7.0], "BE", "Largest eigenvalue 9 "),
        ([9.0, 1.0, 0.0, -7.0], "BE", "; smallest eigenvalue -7 "),
    ],
)
def test_the_summary_calls_an_eigenvalue_only_what_it_is(tmp_path, values, which, words):
    analysis = spectra.analyze(np.diag(values), 2, which=which, progress=False)
    assert words in written(analysis, tmp_path).text


def test_an_eigenvalue_is_rounded_to_its_residual(tmp_path):
    analysis = spectra.analyze(np.diag([9.0, 1.0, 0.0]), 1, progress=False)
    rough = dataclasses.replace(
        analysis.eigenpairs, values=np.array([41.3172]), residuals=np.array([0.02])
    )
    page = written(dataclasses.replace(analysis, eigenpairs=rough), tmp_path)
    assert "Largest eigenvalue 41.317 ± 0.02;" in page.text


def test_every_note_of_every_part_is_shown(doubtful, tmp_path):
    page = written(doubtful, tmp_path)
    parts = [doubtful.eigenpairs, doubtful.spectral_norm, doubtful.trace, doubtful.density]
    assert all(part.notes for part in parts)
    for part in parts:
        for note in part.notes:
            assert note in page.text
    assert not {"details", "summary"} & set(page.tags)


def test_what_is_to_be_known_of_the_whole_analysis_is_shown(tmp_path):
    analysis = spectra.analyze(np.diag([9.0, 1.0, 0.0]), 1, progress=False)
    noted = dataclasses.replace(analysis, notes=("the loss jumps here and there",))
    assert "the loss jumps here and there" in written(noted, tmp_path).text


def test_what_did_not_converge_is_said_first(doubtful, tmp_path):
    page = written(doubtful, tmp_path)
    missed = int((~doubtful.eigenpairs.converged).sum())
    assert f"tolerance: {missed} of 6 eigenpairs, spectral norm, trace" in page.text
    assert "; tolerance not reached)" in page.text
    assert [row[3] for row in page.rows if row[0].isdigit()].count("no") == missed
    assert page.row("trace")[-1] == "no"


def test_where_all_is_well_nothing_is_said_of_it(page):
    assert "tolerance" not in page.text
    assert "before believing" not in page.text


def test_the_certificate_is_a_sentence(analysis, page):
    above = analysis.eigenpairs.no_eigenvalue_above
    assert f"With 99% probability there is no other eigenvalue above {above:.4g}" in page.text


def test_loss_and_gradient_are_there_for_a_hessian_only(analysis, page, tmp_path):
    assert float(page.row("loss")[1]) == pytest.approx(analysis.value, rel=1e-5)
    assert float(page.row("gradient norm")[1]) == pytest.approx(analysis.gradient_norm, rel=1e-5)
    matrix = spectra.analyze(np.diag(np.arange(9.0)), 2, progress=False)
    assert not [row for row in written(matrix, tmp_path).rows if row[0] == "loss"]


def test_the_cost_of_every_part_adds_up(analysis, page):
    for name, count in analysis.matvecs.items():
        assert page.row(name)[1] == str(count) or name in {
            "trace",
            "spectral norm",
            "Frobenius norm",
        }
    assert page.row("total")[1] == str(analysis.total_matvecs)


def test_the_provenance_is_complete(page):
    assert page.row("operator · model")[1] == "Sequential"
    assert page.row("operator · dtype")[1] == "float64"
    assert page.row("options · k")[1] == "6"
    assert page.row("seed")[1] == "0"
    assert page.row("versions · torch")[1] == torch.__version__


def test_names_of_the_user_never_become_markup(tmp_path):
    hostile = "<script>alert(1)</script>"
    network = type(hostile, (torch.nn.Linear,), {})(2, 2)
    data = [(torch.ones(3, 2), torch.tensor([0, 1, 0]))]
    loss = spectra.losses.supervised(torch.nn.CrossEntropyLoss())
    analysis = spectra.analyze(spectra.HessianOperator(network, loss, data), 2, progress=False)
    noted = dataclasses.replace(analysis.eigenpairs, notes=(hostile,))
    page = written(dataclasses.replace(analysis, eigenpairs=noted), tmp_path)
    assert page.scripts == [SCRIPT]
    assert page.text.count(hostile) >= 4
    own = tmp_path / "own.png"
    own.write_bytes(PNG)
    page = written(analysis, tmp_path, title=f'"><img src=x>{hostile}', figures={hostile: own})
    assert page.scripts == [SCRIPT]
    assert page.tags.count("img") == 1


def test_a_page_needs_neither_network_nor_files(page):
    assert page.images
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.images)
    assert page.links
    assert all(address.startswith("data:text/csv;") for address in page.links.values())
    assert not {"link", "iframe", "object"} & set(page.tags)


def test_no_script_but_its_own_runs_in_a_page(page, analysis, tmp_path):
    html = write_report(analysis, tmp_path / "r.html", figures={}).read_text("utf-8")
    assert page.scripts == [SCRIPT]
    checksum = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1]
    assert policy.split("; ") == [
        "default-src 'none'",
        "img-src data:",
        "style-src 'unsafe-inline'",
        f"script-src 'sha256-{checksum}'",
    ]


def test_the_page_follows_the_readers_colours_and_paper(analysis, tmp_path):
    html = write_report(analysis, tmp_path / "r.html", figures={}).read_text("utf-8")
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html
    assert "@import" not in html
    assert "url(" not in html


def test_parts_that_were_not_asked_for_are_left_out(tmp_path):
    analysis = spectra.analyze(Diagonal(s1(200)), 3, trace=False, density=False, progress=False)
    page = written(analysis, tmp_path, figures=None)
    assert page.tags.count("img") == 2
    assert "trace" not in page.text
    assert set(save_figures(analysis, tmp_path)) == {"eigenvalues", "eigenvalues_symlog"}
    assert set(page.links) == {"eigenvalues.csv"}


def test_an_analysis_that_knows_every_eigenvalue_is_reported(tmp_path):
    analysis = spectra.analyze(np.diag([3.0, 1.0, -2.0]), 3, progress=False)
    assert analysis.density.steps == 0
    page = written(analysis, tmp_path, figures=None)
    assert page.row("trace")[1:3] == ["2", "exact, to rounding"]
    # One exact number has no convergence to show: eigenvalues and density, on two scales each.
    assert page.tags.count("img") == 4


def test_the_same_analysis_gives_the_same_page_also_when_loaded(analysis, tmp_path):
    analysis = dataclasses.replace(analysis, density=None)
    loaded = spectra.load(analysis.save(tmp_path / "analysis"))
    original = write_report(analysis, tmp_path / "a.html").read_bytes()
    assert write_report(loaded, tmp_path / "b.html").read_bytes() == original


def test_figures_are_saved_in_every_format_and_can_be_embedded(analysis, tmp_path):
    figures = save_figures(analysis, tmp_path / "new" / "figures")
    assert list(figures) == [
        "eigenvalues",
        "eigenvalues_symlog",
        "density",
        "density_symlog",
        "trace",
        "trace_by_layer",
        "eigenvectors_by_layer",
        "landscape",
    ]
    for name, path in figures.items():
        assert path == tmp_path / "new" / "figures" / f"{name}.svg"
        assert path.read_bytes().startswith(b"<?xml")
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    page = written(analysis, tmp_path, figures=figures)
    images = [base64.b64encode(path.read_bytes()).decode() for path in figures.values()]
    assert page.images == [f"data:image/svg+xml;base64,{image}" for image in images]
    # A file does not tell where in it the numbers are.
    assert page.readings == [[]] * 8


def test_other_formats_can_be_asked_for(analysis, tmp_path):
    analysis = dataclasses.replace(analysis, density=None, blocks=None, landscape=None)
    figures = save_figures(analysis, tmp_path, formats=["pdf"])
    assert figures["trace"].read_bytes().startswith(b"%PDF")
    assert not list(tmp_path.glob("*.svg"))


def test_a_users_style_does_not_reach_saved_figures(analysis, tmp_path):
    analysis = dataclasses.replace(analysis, density=None, trace=None, blocks=None, landscape=None)
    plain = save_figures(analysis, tmp_path / "plain", formats=["svg"])
    with matplotlib.rc_context({"font.size": 30.0, "axes.facecolor": "red"}):
        before = dict(matplotlib.rcParams.items())
        styled = save_figures(analysis, tmp_path / "styled", formats=["svg"])
        assert dict(matplotlib.rcParams.items()) == before
    for name, path in plain.items():
        assert styled[name].read_bytes() == path.read_bytes()


def test_a_figure_of_ones_own_is_embedded_under_its_name(analysis, tmp_path):
    own = tmp_path / "landscape.png"
    own.write_bytes(PNG)
    page = written(analysis, tmp_path, figures={"Loss landscape": own})
    assert page.images == [f"data:image/png;base64,{base64.b64encode(PNG).decode()}"]
    assert "Loss landscape" in page.text


def table_of(page, name):
    """A file of the page, by columns."""
    text = base64.b64decode(page.links[name].partition("base64,")[2]).decode("utf-8")
    head, *rows = csv.reader(io.StringIO(text))
    return dict(zip(head, zip(*rows, strict=True), strict=True))


def numbers(column):
    return [float(cell) for cell in column if cell]


def test_the_arrays_can_be_taken_away_to_the_last_digit(analysis, page):
    assert list(page.links) == [
        "eigenvalues.csv",
        "density_nodes.csv",
        "density_curve.csv",
        "trace_samples.csv",
        "modules.csv",
        "landscape.csv",
    ]
    pairs, density, blocks = analysis.eigenpairs, analysis.density, analysis.blocks
    table = table_of(page, "eigenvalues.csv")
    assert numbers(table["eigenvalue"]) == pairs.values.tolist()
    assert numbers(table["residual"]) == pairs.residuals.tolist()
    table = table_of(page, "density_nodes.csv")
    own = [float(w) for p, w in zip(table["probe"], table["weight"], strict=True) if p == "2"]
    assert own == density.weights[1][density.weights[1] > 0].tolist()
    assert numbers(table["node"])[: len(density.atoms)] == density.atoms.tolist()
    # Each probe has all the mass that the atoms have not.
    assert sum(own) == pytest.approx(1 - len(density.atoms) / density.n)
    table = table_of(page, "density_curve.csv")
    start, end, height = (np.array(numbers(table[name])) for name in ("from", "to", "density"))
    assert ((end - start) * height).sum() == pytest.approx(1 - len(density.atoms) / density.n)
    table = table_of(page, "trace_samples.csv")
    assert numbers(table["sample"]) == analysis.trace.samples.tolist()
    assert numbers(table["mean"])[-1] == pytest.approx(analysis.trace.value)
    low, high = analysis.trace.interval()
    assert (float(table["low"][-1]), float(table["high"][-1])) == pytest.approx((low, high))
    table = table_of(page, "modules.csv")
    assert table["module"] == ("0", "2")
    assert numbers(table["trace"]) == [t.value for t in analysis.module_traces().values()]
    first = numbers(table[f"mass of {float(pairs.values[0])!r}"])
    assert first == [row.masses[0] for row in blocks.rows("module")]
    table = table_of(page, "landscape.csv")
    label = analysis.landscape.labels[1]
    assert numbers(table["displacement"]) == analysis.landscape.displacements.tolist()
    assert numbers(table[f"loss, {label}"]) == analysis.landscape.values[1].tolist()


def test_a_table_that_is_too_large_is_not_in_the_page(analysis, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "_MOST_BYTES", 1000)
    page = written(analysis, tmp_path)
    assert "eigenvalues.csv" in page.links
    assert "density_curve.csv" not in page.links
    assert "density_curve.csv (too large for a page, see run.json)" in page.text


def test_every_mark_is_read_with_its_error(analysis, page):
    pairs, trace = analysis.eigenpairs, analysis.trace
    linear, symlog, density, _, running, layers, masses, slices = page.readings
    assert [text for *_, text in linear] == [text for *_, text in symlog]
    for i, (*_, text) in enumerate(linear):
        assert text == f"λ{i + 1} = {pairs.values[i]:.6g} ± {pairs.residuals[i]:.1g}"
    # From the left to the right, and from the top to the bottom.
    assert [x for x, *_ in linear] == sorted(x for x, *_ in linear)
    assert [y for _, y, _ in linear] == sorted(y for _, y, _ in linear)
    outliers = [text for *_, text in density if text.startswith("outlier")]
    assert len(outliers) == 6
    assert outliers[0].startswith(f"outlier λ = {pairs.values[0]:.6g} ± {pairs.residuals[0]:.1g}")
    nodes = [text for *_, text in density if text.startswith("node")]
    assert nodes
    assert all(re.search(r"weight \S+, probe [123]; density \S+ \(95% band ", t) for t in nodes)
    low, high = trace.interval()
    assert f"{trace.value:.5g}, 95% interval {low:.5g} to {high:.5g}" in running[-1][2]
    assert [text.partition(":")[0] for *_, text in layers] == ["0", "2"]
    assert len(masses) == 2 * 6
    share = analysis.blocks.rows("layer")[1].masses[0]
    assert f"2: {share:.2%} of the eigenvector of λ = {pairs.values[0]:.4g}" in [
        text for *_, text in masses
    ]
    assert len(slices) == analysis.landscape.evaluations
    for x, y, _ in [r for readings in page.readings for r in readings]:
        assert 0 < x < 1
        assert 0 < y < 1


def test_the_scale_that_shows_all_values_is_seen_first(tmp_path):
    for values, first in (([3.0, 2.0, 1.0], "linear"), ([300.0, -20.0, 1.0], "logarithmic")):
        analysis = spectra.analyze(np.diag(values), 3, density=False, trace=False, progress=False)
        (switch, _) = switches(analysis)
        assert switch.first == first
        (figure,) = illustrated(draw_figures(analysis), {}, switches(analysis))
        assert [v.label for v in figure.versions if v.shown] == [first]
    one = spectra.analyze(np.diag(values), 1, density=False, trace=False, progress=False)
    assert set(draw_figures(one)) == {"eigenvalues"}


@pytest.mark.parametrize("formats", [(), "svg", ("svg", "docx")])
def test_formats_that_cannot_be_written_are_refused(analysis, tmp_path, formats):
    with pytest.raises(ArgumentError, match=r"expected a sequence of .*svg"):
        save_figures(analysis, tmp_path, formats=formats)
    assert not list(tmp_path.iterdir())


def test_what_is_no_analysis_is_refused(analysis, tmp_path):
    message = "expected an Analysis, as spectra.analyze returns it, got a Eigenpairs"
    with pytest.raises(ArgumentTypeError, match=message):
        write_report(analysis.eigenpairs, tmp_path / "r.html")
    with pytest.raises(ArgumentTypeError, match=message):
        save_figures(analysis.eigenpairs, tmp_path)


def test_figures_that_cannot_be_embedded_are_refused(analysis, tmp_path):
    with pytest.raises(ArgumentError, match=r"expected a figure in SVG or PNG"):
        write_report(analysis, tmp_path / "r.html", figures={"trace": tmp_path / "trace.pdf"})
    with pytest.raises(StorageError, match="could not read the figure"):
        write_report(analysis, tmp_path / "r.html", figures={"trace": tmp_path / "gone.svg"})


def test_places_that_cannot_be_written_are_named(analysis, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="could not write the report to"):
        write_report(analysis, tmp_path / "file" / "r.html", figures={})
    with pytest.raises(StorageError, match="could not write figures into"):
        save_figures(analysis, tmp_path / "file")
