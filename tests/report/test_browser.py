"""A page in a browser: it is read, switched and taken from, and asks the network for nothing."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest
import torch

import spectra
from spectra.report.report import write_report
from tests.cases.networks import tanh_mlp, wine

sync_api = pytest.importorskip("playwright.sync_api")

BROWSER = shutil.which("chromium")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no chromium on PATH")
OPTIONS = ["--disable-gpu", "--disable-quic", "--disable-background-networking", "--no-first-run"]


@pytest.fixture(scope="module")
def analysis():
    torch.manual_seed(0)
    loss = spectra.losses.supervised(torch.nn.CrossEntropyLoss())
    H = spectra.HessianOperator(tanh_mlp(), loss, [wine()])
    return spectra.analyze(H, 6, steps=10, rtol=0.2, landscape=True, progress=False)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        # Without its sandbox it starts for root, too; it opens nothing but files of these tests.
        opened = playwright.chromium.launch(
            executable_path=BROWSER, chromium_sandbox=False, args=OPTIONS
        )
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def address(analysis, tmp_path_factory):
    return write_report(analysis, tmp_path_factory.mktemp("page") / "report.html").as_uri()


@pytest.fixture
def page(browser, address):
    """The page, light and wide; what it says on the console or asks the network for is an error."""
    opened = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme="light")
    said, asked = [], []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(address)
    yield opened
    opened.close()
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [address]


def figure(page, title):
    return page.locator("figure").filter(has=page.get_by_text(title, exact=True))


def point_at(page, sheet, share_of_width, share_of_height):
    sheet.scroll_into_view_if_needed()
    box = sheet.bounding_box()
    x, y = share_of_width * box["width"], share_of_height * box["height"]
    page.mouse.move(box["x"] + x, box["y"] + y)


def test_the_figures_are_drawn(page):
    widths = page.eval_on_selector_all("img", "images => images.map(i => i.naturalWidth)")
    assert len(widths) == 8
    assert all(widths)


def test_the_cursor_reads_an_eigenvalue_with_its_residual(page, analysis):
    pairs = analysis.eigenpairs
    sheet = figure(page, "Eigenvalues").locator(".sheet:visible")
    tip = sheet.locator(".tip")
    assert not tip.is_visible()
    readings = sheet.evaluate("sheet => JSON.parse(sheet.dataset.readings)")
    for i, (x, _, _) in enumerate(readings):
        # At the foot of its stem, where the marks of others are nearer.
        point_at(page, sheet, x + 0.01, 0.8)
        assert tip.inner_text() == f"λ{i + 1} = {pairs.values[i]:.6g} ± {pairs.residuals[i]:.1g}"
    inside = sheet.evaluate(
        "s => { const a = s.getBoundingClientRect(), b = s.querySelector('.tip')"
        ".getBoundingClientRect(); return a.left <= b.left && b.right <= a.right + 1; }"
    )
    assert inside
    page.mouse.move(0, 0)
    assert not tip.is_visible()


def test_a_mark_lies_where_the_figure_has_drawn_its_value(page, analysis):
    """Under the mark of the largest eigenvalue the image has the colour of eigenvalues."""
    sheet = figure(page, "Eigenvalues").locator(".sheet:visible")
    for place in (0, 1):
        x, y, _ = sheet.evaluate("s => JSON.parse(s.dataset.readings)")[place]
        colour = sheet.locator("img").evaluate(
            """(image, [x, y]) => {
              const canvas = document.createElement("canvas");
              [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
              const context = canvas.getContext("2d");
              context.drawImage(image, 0, 0, canvas.width, canvas.height);
              return [...context.getImageData(x * canvas.width, y * canvas.height, 1, 1).data];
            }""",
            [x, y],
        )
        assert colour == pytest.approx([0xD5, 0x5E, 0x00, 255], abs=3)


def test_the_arrow_keys_read_one_value_after_the_other(page, analysis):
    values = analysis.eigenpairs.values
    sheet = figure(page, "Eigenvalues").locator(".sheet:visible")
    tip = sheet.locator(".tip")
    sheet.focus()
    for key, place in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("ArrowLeft", 6)):
        page.keyboard.press(key)
        assert tip.inner_text().startswith(f"λ{place} = {values[place - 1]:.6g} ±")
    page.keyboard.press("Escape")
    assert not tip.is_visible()


def test_every_figure_is_read_at_the_cursor(page):
    for title, words in (
        ("Spectral density", "λ = "),
        ("Convergence of the trace", "95% interval"),
        ("Trace by layer", "trace "),
        ("Eigenvector mass by layer", "% of the eigenvector of λ = "),
        ("Loss along eigenvectors", "quadratic model"),
    ):
        sheet = figure(page, title).locator(".sheet:visible")
        point_at(page, sheet, 0.5, 0.5)
        assert words in sheet.locator(".tip").inner_text()


def test_a_button_shows_the_other_scale(page):
    for title in ("Eigenvalues", "Spectral density"):
        one = figure(page, title)
        images = [one.locator("img").nth(i) for i in (0, 1)]
        for label, seen in (
            ("logarithmic", [False, True]),
            ("linear", [True, False]),
            ("logarithmic", [False, True]),
        ):
            button = one.get_by_role("button", name=label)
            button.focus()
            page.keyboard.press("Enter")
            assert [image.is_visible() for image in images] == seen
            assert button.get_attribute("aria-pressed") == "true"
            assert one.locator("button[aria-pressed=true]").count() == 1


def test_the_arrays_are_downloaded(page, analysis):
    with page.expect_download() as download:
        page.get_by_role("link", name="eigenvalues.csv").click()
    assert download.value.suggested_filename == "eigenvalues.csv"
    text = Path(download.value.path()).read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    assert [float(row["eigenvalue"]) for row in rows] == analysis.eigenpairs.values.tolist()
    assert [float(row["residual"]) for row in rows] == analysis.eigenpairs.residuals.tolist()


def test_the_page_is_dark_for_those_who_want_it_dark_and_white_on_paper(page):
    def brightness(of):
        colour = page.evaluate(f"getComputedStyle(document.body).{of}")
        return sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(","))) / 3

    button = page.get_by_role("button", name="linear").first
    assert brightness("backgroundColor") == 255
    page.emulate_media(color_scheme="dark")
    assert brightness("backgroundColor") < 40
    assert brightness("color") > 200
    page.emulate_media(color_scheme="dark", media="print")
    assert brightness("backgroundColor") == 255
    assert brightness("color") == 0
    # On paper there is nothing to press, and both scales are there.
    assert not button.is_visible()
    assert not page.get_by_role("link", name="eigenvalues.csv").is_visible()
    assert all(image.is_visible() for image in page.locator("img").all())


def test_nothing_is_wider_than_the_window(page):
    for width in (400, 700, 1200):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_without_scripts_everything_is_visible(browser, address):
    with browser.new_context(java_script_enabled=False) as context:
        page = context.new_page()
        page.goto(address)
        assert all(image.is_visible() for image in page.locator("img").all())
        assert not page.locator("button").first.is_visible()
        assert page.locator(".tip").count() == 0
