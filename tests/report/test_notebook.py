"""A notebook shows the text and the figures of a result, and never markup of the user's."""

import numpy as np
import pytest
import torch

import spectra
from tests.cases.matrices import Diagonal, tanh_network
from tests.report.test_pages import trajectory
from tests.report.test_report import Page


@pytest.fixture(scope="module")
def analysis():
    return spectra.analyze(tanh_network()[0], 4, steps=12, rtol=0.2, progress=False)


def test_every_result_has_text_and_figures(analysis):
    shown = {
        # On one scale each.
        "analysis": (analysis, 5),
        "pairs": (analysis.eigenpairs, 1),
        "density": (analysis.density, 1),
        "trace": (analysis.trace, 1),
        "blocks": (analysis.blocks, 1),
        "trajectory": (trajectory(), 1),
        "a measurement": (trajectory()[0], 1),
        "comparison": (spectra.compare(analysis, analysis), 2),
        "an exact number": (spectra.norm(Diagonal(np.ones(3)), 2, progress=False), 0),
    }
    for name, (result, figures) in shown.items():
        page = Page(result._repr_html_())
        assert str(result).split() == page.text.split(), name
        assert len(page.images) == figures, name
        assert all(address.startswith("data:image/svg+xml") for address in page.images)
        assert "script" not in page.tags


def test_an_operator_is_a_table_of_its_description():
    H = tanh_network()[0]
    page = Page(H._repr_html_())
    assert page.row("n")[1] == str(H.space.n)
    assert page.row("model")[1] == "Sequential"
    assert repr(H) in page.text


def test_names_are_not_markup():
    class Bad(torch.nn.Linear):
        pass

    Bad.__name__ = "<script>alert(1)</script>"
    data = [(torch.randn(4, 2), torch.randn(4, 1))]
    loss = spectra.losses.supervised(torch.nn.MSELoss())
    page = Page(spectra.HessianOperator(Bad(2, 1), loss, data)._repr_html_())
    assert "script" not in page.tags
    assert page.row("model")[1] == "<script>alert(1)</script>"
