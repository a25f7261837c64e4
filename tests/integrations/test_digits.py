import sys

import pytest
import torch

import spectra
from spectra.errors import ArgumentError, TargetError
from spectra.integrations.digits import trained_digits

pytest.importorskip("sklearn")


def test_the_network_is_trained_and_small():
    model, loss, data = trained_digits()
    value = spectra.HessianOperator(model, loss, data).value()
    right = sum(int((model(x).argmax(dim=1) == y).sum()) for x, y in data)
    assert sum(p.numel() for p in model.parameters()) == 2410
    assert value < 0.2
    assert right / 1797 > 0.95
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


def test_the_data_are_all_images_in_unequal_batches():
    _, loss, data = trained_digits(steps=0)
    assert [len(labels) for _, labels in data] == [500, 500, 500, 297]
    assert sum(loss.weight(batch) for batch in data) == 1797
    assert all(0 <= x.min() and x.max() <= 1 for x, _ in data)


def test_a_seed_settles_the_weights_and_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    first, again, other = (
        torch.nn.utils.parameters_to_vector(trained_digits(steps=3, seed=s)[0].parameters())
        for s in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_everything_is_in_the_dtype_that_was_asked_for():
    model, loss, data = trained_digits(steps=1, hidden=2, dtype=torch.float64)
    H = spectra.HessianOperator(model, loss, data)
    assert H.gradient().dtype == torch.float64
    assert data[0][0].dtype == torch.float64


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(TargetError, match=r"pip install 'hessian-spectra\[demo\]'"):
        trained_digits()


@pytest.mark.parametrize("wrong", [{"hidden": 0}, {"steps": -1}, {"batch_size": 0}])
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(ArgumentError, match="expected at least"):
        trained_digits(**wrong)
