import time

import numpy as np
import pytest
import torch
from torch import nn

import spectra
from spectra.analysis import gate
from spectra.errors import ArgumentError, PreflightError
from spectra.objective.losses import supervised
from tests.cases.networks import tanh_mlp, wine


def operator(model=None):
    x, y = wine()
    model = tanh_mlp() if model is None else model
    return spectra.HessianOperator(model, supervised(nn.CrossEntropyLoss()), [(x, y)])


class Halving(nn.Tanh):
    """With the derivative of something else."""

    def forward(self, x):
        return super().forward(x) * 0.5 + 0.5 * super().forward(x).detach()


def wrong():
    model = tanh_mlp()
    model[1] = Halving()
    return operator(model)


@pytest.fixture
def slow(monkeypatch):
    """Every run counts as one of more than a minute."""
    monkeypatch.setattr(gate, "_LONG", 0.0)


def test_a_short_run_is_not_checked():
    H = operator()
    analysis = spectra.analyze(H, k=2, density=False, max_matvecs=10)
    assert "preflight" not in analysis.matvecs
    assert not any("preflight" in note for note in analysis.notes)
    unchecked = spectra.analyze(H, k=2, density=False, max_matvecs=10, preflight="off")
    np.testing.assert_array_equal(analysis.eigenpairs.values, unchecked.eigenpairs.values)


def test_a_long_run_is_checked_and_what_is_wrong_is_noted(slow):
    analysis = spectra.analyze(wrong(), k=2, density=False, max_matvecs=10)
    assert analysis.matvecs["preflight"] == 4
    (note, *_) = [note for note in analysis.notes if "gradient differences" in note]
    assert note.startswith("preflight: gradient differences: ")
    assert "*.weight" in note
    right = spectra.analyze(operator(), k=2, density=False, max_matvecs=10)
    assert right.matvecs["preflight"] == 4
    assert not any("preflight" in note for note in right.notes)


def test_a_slow_first_gradient_does_not_make_a_run_long():
    class SlowAtFirst(nn.Tanh):
        calls = 0

        def forward(self, x):
            self.calls += 1
            time.sleep(0.5 if self.calls == 1 else 0.0)
            return super().forward(x)

    model = tanh_mlp()
    model[1] = SlowAtFirst()
    analysis = spectra.analyze(operator(model), k=2, density=False, max_matvecs=10)
    assert "preflight" not in analysis.matvecs


def test_within_a_small_budget_nothing_is_checked_and_the_checks_come_on_top(slow):
    small = spectra.analyze(operator(), k=2, budget=40)
    assert "preflight" not in small.matvecs
    large = spectra.analyze(operator(), k=2, budget=90)
    assert large.matvecs["preflight"] == 4
    assert large.total_matvecs - 4 <= 90


def test_matrices_are_checked_on_request_only(slow):
    matrix = np.diag(np.arange(1.0, 31.0))
    assert "preflight" not in spectra.analyze(matrix, k=2).matvecs
    assert spectra.analyze(matrix, k=2, preflight="strict").matvecs["preflight"] == 4


def test_strict_ends_the_run_with_all_that_was_found():
    H = wrong()
    with pytest.raises(PreflightError, match=r"gradient differences.*\*\.weight.*'warn'") as caught:
        spectra.analyze(H, k=2, preflight="strict")
    assert H.matvecs == 4
    assert not caught.value.preflight.ok
    analysis = spectra.analyze(operator(), k=2, density=False, preflight="strict")
    assert analysis.matvecs["preflight"] == 4
    assert analysis.provenance["options"]["preflight"] == "strict"


def test_another_word_is_refused_before_anything_is_computed():
    H = operator()
    with pytest.raises(ArgumentError, match="preflight='loud'; expected 'strict', 'warn' or 'off'"):
        spectra.analyze(H, preflight="loud")
    assert H.matvecs == 0


def test_a_gradient_of_a_warm_operator_is_timed_anew():
    H = operator()
    H @ torch.ones(H.shape[0], dtype=torch.float64)
    evaluated = []
    H.objective.model[0].register_forward_hook(lambda *_: evaluated.append(1))
    assert gate._gradient_seconds(H) > 0
    assert evaluated
