"""What other programs were seen to get wrong, as far as no other test is named after it.

docs/reliability.md lists every failure with its test.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import spectra
from spectra import HessianOperator, losses
from spectra.operators.base import MatrixOperator
from tests.cases.matrices import dense, s1
from tests.cases.networks import TinyGPT, dense_hessian, tanh_mlp, wine

ROOT = Path(__file__).parent.parent
LOSS = losses.supervised(nn.CrossEntropyLoss())


def test_half_precision_products_on_rademacher_probes_are_right():
    # Finite differences in bfloat16: a relative error of 12.
    x, y = wine(torch.bfloat16)
    model = tanh_mlp(dtype=torch.bfloat16)
    exact = dense_hessian(
        tanh_mlp_like(model), lambda call: functional.cross_entropy(call(x.double()), y)
    )
    generator = torch.Generator().manual_seed(0)
    probes = torch.randint(0, 2, (len(exact), 8), generator=generator) * 2.0 - 1
    found = HessianOperator(model, LOSS, [(x, y)]) @ probes
    expected = exact @ probes.double()
    assert (found.double() - expected).norm() / expected.norm() < 0.05
    # With float32 copies of the blocks no digit of single precision is lost.
    copies = HessianOperator(model, LOSS, [(x, y)], compute_dtype=torch.float32) @ probes
    assert (copies.double() - expected).norm() / expected.norm() < 1e-5


def tanh_mlp_like(model):
    """The same network in double precision."""
    copy = tanh_mlp()
    copy.load_state_dict(model.state_dict())
    return copy


def test_a_run_in_half_precision_finishes_with_finite_answers():
    # The tridiagonal matrix took the model's dtype, for which eigh does not exist.
    x, y = wine(torch.bfloat16)
    model = tanh_mlp(dtype=torch.bfloat16)
    analysis = spectra.analyze(HessianOperator(model, LOSS, [(x, y)]), k=2)
    assert np.isfinite(analysis.eigenpairs.values).all()
    assert np.isfinite(analysis.trace.value)
    assert np.isfinite(analysis.density.nodes).all()
    exact = torch.linalg.eigvalsh(
        dense_hessian(
            tanh_mlp_like(model), lambda call: functional.cross_entropy(call(x.double()), y)
        )
    )
    assert analysis.eigenpairs.values[0] == pytest.approx(float(exact[-1]), rel=0.05)


@pytest.mark.parametrize("graph", ["fresh", "retained"])
def test_models_with_an_affine_layer_norm_are_right_and_symmetric(graph):
    # Forward-over-reverse products: 0.2 to 4.8 % off, and not symmetric.
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)).double()
    nn.init.normal_(model[1].weight)
    x, y = wine()
    found = HessianOperator(model, LOSS, [(x, y)], graph=graph).to_dense()
    exact = dense_hessian(model, lambda call: functional.cross_entropy(call(x), y))
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found, found.T, rtol=1e-10, atol=1e-12)


def test_batches_with_unequal_numbers_of_valid_tokens_are_weighted_by_tokens():
    # A mean of the batches' means: an error of 0.71.
    tokens = torch.randint(7, (4, 6), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(tokens)
    mask[:2, 3:] = 0
    model = TinyGPT()
    batch = {"input_ids": tokens, "attention_mask": mask}
    halves = [{k: v[rows] for k, v in batch.items()} for rows in (slice(0, 2), slice(2, 4))]
    whole = HessianOperator(model, losses.causal_lm(), [batch], "norm1.*").to_dense()
    split = HessianOperator(model, losses.causal_lm(), halves, "norm1.*").to_dense()
    torch.testing.assert_close(split, whole, rtol=1e-10, atol=1e-13)

    def every_valid_token_once(call):
        logits = call(**batch)[:, :-1]
        valid = mask[:, 1:].bool()
        return functional.cross_entropy(logits[valid], tokens[:, 1:][valid])

    exact = dense_hessian(model, every_valid_token_once)
    place = HessianOperator(model, losses.causal_lm(), [batch]).space.slices
    rows = slice(place["norm1.weight"].start, place["norm1.bias"].stop)
    torch.testing.assert_close(whole, exact[rows, rows], rtol=1e-9, atol=1e-12)


class Counted(MatrixOperator):
    """Notes how many vectors come at a time."""

    def __init__(self, values):
        super().__init__(torch.from_numpy(dense(values)))
        self.most = 0

    def _products(self, rows):
        self.most = max(self.most, len(rows))
        return super()._products(rows)


@pytest.mark.parametrize(
    "question",
    [
        lambda H: spectra.trace(H, rtol=1e-3, max_matvecs=400, method="hutchinson"),
        lambda H: spectra.spectral_density(H, steps=10, probes=20),
        lambda H: spectra.diagonal(H, rtol=1e-3, max_matvecs=180),
        lambda H: spectra.norm(H, "fro", max_matvecs=200),
    ],
    ids=["trace", "density", "diagonal", "norm"],
)
def test_memory_does_not_grow_with_the_number_of_probes(question):
    # All probes went through one vmap.
    counted = Counted(s1(200))
    question(counted)
    assert counted.matvecs >= 100
    assert counted.most <= 32


def test_a_density_runs_on_this_version_of_pytorch():
    # torch.eig is gone, and with it the density of an old package.
    x, y = wine()
    model = tanh_mlp()
    exact = torch.linalg.eigvalsh(
        dense_hessian(model, lambda call: functional.cross_entropy(call(x), y))
    ).numpy()
    density = spectra.spectral_density(
        HessianOperator(model, LOSS, [(x, y)]), steps=len(exact), probes=2
    )
    nodes = density.nodes[density.weights > 1e-6]
    assert nodes.min() == pytest.approx(exact[0], rel=1e-6)
    assert nodes.max() == pytest.approx(exact[-1], rel=1e-6)


def test_the_hessian_is_that_at_the_weights_not_at_the_vector():
    # The loss was differentiated at the vector.
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    H = HessianOperator.from_function(lambda x: (x**4).sum(), weights)
    for vector in (torch.tensor([5.0, -1.0, 0.5]).double(), 1e-8 * torch.ones(3).double()):
        torch.testing.assert_close(H @ vector, 12 * weights**2 * vector, rtol=1e-14, atol=0)


def test_forty_batches_are_averaged_and_not_added():
    # A spectrum of GPT-2 came out 40 times too large.
    x, y = wine()
    model = tanh_mlp()
    one, forty = (HessianOperator(model, LOSS, [(x, y)] * count).to_dense() for count in (1, 40))
    torch.testing.assert_close(forty, one, rtol=1e-12, atol=1e-14)


def test_every_failure_of_the_documentation_has_a_test_that_exists():
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = re.findall(r"\[`(test_\w+)`\]\(\.\./(tests/[\w/]+\.py)\)", page)
    assert len(rows) >= 20
    for name, file in rows:
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), name
