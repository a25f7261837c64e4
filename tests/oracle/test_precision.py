import pytest
import torch

from spectra import HessianOperator

A = torch.randn(128, 128, generator=torch.Generator().manual_seed(0)) / 10


def product(x, **options):
    # The Hessian of x ↦ |A x|² / 2 for a block of vectors is AᵀA, times that block.
    def loss(model, batch):
        return (A @ model.weight).square().sum() / 2

    model = torch.nn.Linear(128, 128, bias=False)
    operator = HessianOperator(model, loss, [None], **options)
    return (operator @ x.reshape(-1)).reshape(128, 128)


@pytest.fixture
def low_precision():
    """What programs switch on for training; on this machine it may or may not have an effect."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


def error(**options):
    x = torch.randn(128, 128, generator=torch.Generator().manual_seed(1))
    exact = A.double().T @ (A.double() @ x.double())
    return float((product(x, **options) - exact).norm() / exact.norm())


def test_float32_means_float32_whatever_the_program_has_switched_on(low_precision):
    assert error() < 1e-6


def test_low_precision_is_left_on_where_it_is_asked_for(low_precision):
    plain = float((A @ A - (A.double() @ A.double())).norm() / (A @ A).norm())
    if plain < 1e-5:
        pytest.skip("this processor computes float32 products in float32 all the same")
    assert error(tf32=True) > 1e-4


def test_the_programs_settings_are_put_back(low_precision):
    conv = torch.backends.cudnn.allow_tf32
    error()
    assert torch.get_float32_matmul_precision() == "medium"
    assert torch.backends.cudnn.allow_tf32 == conv


def test_backward_passes_run_outside_of_the_callers_autocast():
    with torch.autocast("cpu", torch.bfloat16, enabled=True):
        found = error()
        assert torch.is_autocast_enabled("cpu")
    # The forward pass is the caller's, in bfloat16; nothing raises and nothing is cast twice.
    assert found < 0.02
