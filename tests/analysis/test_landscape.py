import copy
import importlib
import math
import os
import signal

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from torch import nn

import spectra
from spectra import HessianOperator
from spectra.errors import ArgumentError, ArgumentTypeError
from spectra.objective.losses import supervised
from tests.cases.networks import tanh_mlp, wine

module = importlib.import_module("spectra.analysis.landscape")

LOSS = supervised(nn.CrossEntropyLoss())


def network():
    torch.manual_seed(0)
    model, (x, y) = tanh_mlp(), wine()
    # Of unequal sizes.
    return model, list(zip(x.split(70), y.split(70), strict=True))


def test_a_quadratic_is_its_own_prediction():
    matrix = torch.tensor([[3.0, 1.0], [1.0, -2.0]]).double()
    point = torch.tensor([0.3, -0.7]).double()
    H = HessianOperator.from_function(lambda x: 0.5 * x @ matrix @ x + x.sum() + 4.0, [point])
    for plane in (False, True):
        found = spectra.landscape(H, k=2, plane=plane, points=9)
        assert found.values == pytest.approx(found.predictions, rel=1e-13, abs=1e-13)
        assert np.diag(found.curvatures) == pytest.approx(
            np.linalg.eigvalsh(matrix)[::-1], rel=1e-7
        )
        assert found.matvecs > 0


def test_a_quartic_leaves_its_prediction_by_the_fourth_order():
    H = HessianOperator.from_function(lambda x: (x**4).sum(), torch.ones(2).double())
    found = spectra.landscape(H, torch.tensor([1.0, 0.0]).double(), span=0.5, points=5)
    a = found.displacements
    assert a.tolist() == [-0.5, -0.25, 0.0, 0.25, 0.5]
    assert found.values[0] == pytest.approx((1 + a) ** 4 + 1, rel=1e-14)
    assert found.predictions[0] == pytest.approx(2 + 4 * a + 6 * a**2, rel=1e-14)
    assert found.weights_norm == pytest.approx(math.sqrt(2), rel=1e-15)


@pytest.mark.parametrize("plane", [False, True])
def test_values_are_those_of_a_model_that_was_moved_and_the_weights_stay(plane):
    model, data = network()
    H = HessianOperator(model, LOSS, data)
    before = copy.deepcopy(model.state_dict())
    pairs = spectra.eigsh(H, k=2)
    found = spectra.landscape(H, pairs, plane=plane, points=3, span=0.4)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert found.matvecs == 2
    steps = pairs.vectors[:, 0] * 0.4 + (-0.4 * pairs.vectors[:, 1] if plane else 0.0)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for p, step in zip(moved.parameters(), H.space.views(steps.contiguous()), strict=True):
            p.add_(step)
    value = found.values[2, 0] if plane else found.values[0, 2]
    assert value == pytest.approx(HessianOperator(moved, LOSS, data).value(), rel=1e-12)


def test_the_default_span_changes_the_quadratic_model_by_half():
    model, data = network()
    found = spectra.landscape(HessianOperator(model, LOSS, data), points=5)
    rise = 0.5 * found.curvatures[0, 0] * found.displacements[-1] ** 2
    assert rise == pytest.approx(0.5 * max(found.value, 1.0), rel=1e-12)


def test_directions_need_not_have_length_one():
    model, data = network()
    H = HessianOperator(model, LOSS, data)
    v = torch.randn(H.space.n, 2, generator=torch.Generator().manual_seed(0)).double()
    one = spectra.landscape(H, 5 * v, points=3, span=0.1)
    two = spectra.landscape(H, (v / v.norm(dim=0)).numpy(), points=3, span=0.1)
    assert one.values == pytest.approx(two.values, rel=1e-13)
    plane = spectra.landscape(H, v, plane=True, points=3, span=0.1)
    assert plane.displacements[2] == 0.1
    assert plane.values[2, 1] == pytest.approx(two.values[0, 2], rel=1e-13)


def test_a_point_without_a_loss_is_a_gap_and_says_why():
    H = HessianOperator.from_function(lambda x: x.log().sum(), torch.ones(1).double())
    found = spectra.landscape(H, torch.ones(1).double(), span=2.0, points=5)
    assert np.isnan(found.values[0]).tolist() == [True, True, False, False, False]
    assert found.evaluations == 3
    assert any("nan" in failure for failure in found.failures)
    assert "nan" in str(found)


def test_it_is_saved_and_drawn(tmp_path):
    model, data = network()
    H = HessianOperator(model, LOSS, data)
    for plane in (False, True):
        found = spectra.landscape(H, k=2, plane=plane, points=5)
        found.save(tmp_path / "landscape")
        again = spectra.load(tmp_path / "landscape")
        assert np.array_equal(again.values, found.values)
        assert str(again) == str(found)
        assert max(map(len, str(found).splitlines())) <= 110
        axes = found.plot()
        assert "‖θ − θ₀‖" in axes.get_xlabel()
        pyplot.close(axes.figure)


def test_a_checkpoint_holds_every_point(tmp_path, monkeypatch):
    model, data = network()
    H = HessianOperator(model, LOSS, data)
    pairs = spectra.eigsh(H, k=1)
    expected = spectra.landscape(H, pairs, points=9)
    evaluate, calls = module._loss_at, []

    def failing(operator, displacement):
        calls.append(displacement)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return evaluate(operator, displacement)

    monkeypatch.setattr(module, "_loss_at", failing)
    with pytest.raises(KeyboardInterrupt):
        spectra.landscape(H, pairs, points=9, checkpoint=tmp_path / "run")
    found = spectra.landscape(H, pairs, points=9, checkpoint=tmp_path / "run")
    assert np.array_equal(found.values, expected.values)
    assert len(calls) == 6 + 9 - 5


@pytest.mark.parametrize("plane", [False, True])
def test_what_was_evaluated_before_ctrl_c_is_kept(plane):
    model, data = network()
    left = math.inf

    def loss(model, batch):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return LOSS(model, batch)

    H = HessianOperator(model, loss, data, weight=lambda batch: len(batch[1]))
    pairs = spectra.eigsh(H, k=2)
    before = copy.deepcopy(model.state_dict())
    H.release()
    left = calls = 10_000
    expected = spectra.landscape(H, pairs, points=5, plane=plane)
    points = expected.values.size
    H.release()
    # Amid the last batch of the eighth point.
    calls -= left
    left = calls - (points - 8) * len(data) - 1
    with pytest.raises(KeyboardInterrupt) as caught:
        spectra.landscape(H, pairs, points=5, plane=plane)
    found = caught.value.partial
    assert np.array_equal(found.values.ravel()[:7], expected.values.ravel()[:7])
    assert np.isnan(found.values.ravel()[7:]).all()
    assert found.evaluations == 7
    assert np.array_equal(found.curvatures, expected.curvatures)
    assert "interrupted: points that were not evaluated are nan" in str(found)
    pyplot.close(found.plot().figure)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_an_analysis_has_the_loss_along_its_first_eigenvectors_without_a_product(tmp_path):
    model, data = network()
    H = HessianOperator(model, LOSS, data)
    options = {"k": 4, "which": "BE", "density": False, "trace": False}
    before = copy.deepcopy(model.state_dict())
    analysis = spectra.analyze(H, landscape=True, **options)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    found, pairs = analysis.landscape, analysis.eigenpairs
    assert analysis.matvecs == spectra.analyze(H, **options).matvecs
    assert found.matvecs == 0
    assert found.evaluations == found.values.size == 3 * 21
    assert analysis.seconds["landscape"] > 0
    order = np.argsort(-np.abs(pairs.values))[:3]
    assert found.labels == tuple(f"eigenvector of {value:.4g}" for value in pairs.values[order])
    # What `landscape` computes by products of its own.
    vectors = pairs.vectors[:, order.tolist()]
    expected = spectra.landscape(H, vectors, points=21, span=found.displacements[-1])
    assert found.values == pytest.approx(expected.values, rel=1e-12)
    assert found.slopes == pytest.approx(expected.slopes, abs=1e-12)
    assert found.curvatures == pytest.approx(expected.curvatures, abs=pairs.residuals.max())
    assert str(found) in str(analysis)
    loaded = spectra.load(analysis.save(tmp_path / "run"))
    assert np.array_equal(loaded.landscape.values, found.values)
    assert str(loaded) == str(analysis)


def test_an_analysis_does_not_evaluate_the_loss_elsewhere_unless_asked_to():
    model, data = network()
    H = HessianOperator(model, LOSS, data)
    assert spectra.analyze(H, 2, density=False, trace=False).landscape is None
    with pytest.raises(ArgumentTypeError, match="has no loss to evaluate; leave landscape=True"):
        spectra.analyze(np.eye(3), landscape=True)


def test_a_budget_without_time_for_a_landscape_says_so(monkeypatch):
    model, data = network()
    H = HessianOperator(model, LOSS, data)
    options = {"k": 2, "landscape": True, "density": False, "trace": False}
    assert spectra.analyze(H, **options, budget="1h").landscape is not None
    # As if an hour did not hold it.
    analyses = importlib.import_module("spectra.analysis.analyze")
    monkeypatch.setattr(analyses, "_LANDSCAPE_AS_PRODUCTS", 10**15)
    analysis = spectra.analyze(H, **options, budget="1h")
    assert analysis.landscape is None
    assert "the budget left no time for the landscape" in analysis.notes
    # Evaluations are no products: a budget of those has nothing against them.
    assert spectra.analyze(H, **options, budget=50).landscape is not None


def test_an_analysis_that_is_stopped_between_points_goes_on_with_the_next(tmp_path, monkeypatch):
    model, data = network()
    H = HessianOperator(model, LOSS, data)
    options = {"k": 2, "steps": 4, "probes": 2, "rtol": 0.5, "landscape": True}
    expected = spectra.analyze(H, **options)
    evaluate, calls = module._loss_at, []

    def signalled(operator, displacement):
        calls.append(displacement)
        if len(calls) == 9:
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate(operator, displacement)

    monkeypatch.setattr(module, "_loss_at", signalled)
    stopped = spectra.analyze(H, **options, checkpoint=tmp_path / "run")
    assert stopped.partial
    assert len(calls) == stopped.landscape.evaluations == 9
    assert np.isnan(stopped.landscape.values.ravel()[9:]).all()
    assert stopped.density is None
    found = spectra.analyze(H, **options, checkpoint=tmp_path / "run")
    assert len(calls) == expected.landscape.values.size
    assert not found.partial
    assert np.array_equal(found.landscape.values, expected.landscape.values)
    assert np.array_equal(found.landscape.slopes, expected.landscape.slopes)
    assert np.array_equal(found.density.nodes, expected.density.nodes)


def test_what_has_no_loss_is_refused():
    with pytest.raises(ArgumentTypeError, match="has no loss to evaluate beside θ"):
        spectra.landscape(np.eye(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": 4}, "even"),
        ({"points": 1}, "at least 3"),
        ({"span": -1.0}, "positive"),
        ({"k": 0}, "at least 1"),
        ({"directions": torch.ones(2).double()}, r"shape \(2,\)"),
        ({"directions": torch.zeros(3).double()}, "length zero"),
        ({"directions": torch.ones(3, 2).double(), "plane": True}, "that of the first"),
        ({"directions": torch.ones(3).double(), "plane": True}, "at least 2"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    H = HessianOperator.from_function(lambda x: (x**2).sum(), torch.ones(3).double())
    with pytest.raises(ArgumentError, match=message):
        spectra.landscape(H, **options)
