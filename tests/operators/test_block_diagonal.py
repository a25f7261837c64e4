import functools
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable

import spectra
from spectra import GaussNewtonOperator, HessianOperator
from spectra.errors import (
    ArgumentError,
    ArgumentTypeError,
    DoubleBackwardError,
    NonFiniteError,
    ParameterSelectionError,
)
from spectra.objective.losses import causal_lm, supervised
from spectra.oracle import diagnose
from tests.cases.networks import StackedGPT, TinyGPT, dense_hessian, tanh_mlp, wine

CROSS_ENTROPY = supervised(nn.CrossEntropyLoss())


class Bad(nn.Module):
    def forward(self, x):
        return Exponential.apply(x)


class Exponential(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        context.save_for_backward(x.exp())
        return x.exp()

    @staticmethod
    @once_differentiable
    def backward(context, gradient):
        return gradient * context.saved_tensors[0]


def perceptron(kind=HessianOperator, **options):
    torch.manual_seed(0)
    model, (x, y) = tanh_mlp(), wine()
    # Of unequal sizes.
    return kind(model, CROSS_ENTROPY, list(zip(x.split(70), y.split(70), strict=True)), **options)


def transformer(kind=HessianOperator, **options):
    """Its head is its embedding."""
    torch.manual_seed(0)
    tokens = torch.randint(0, 7, (5, 6), generator=torch.Generator().manual_seed(1))
    batches = [{"input_ids": part} for part in tokens.split(3)]
    return kind(TinyGPT(width=4), causal_lm(), batches, **options)


def nested(**options):
    """Two transformer blocks, with long names."""
    torch.manual_seed(0)
    batches = [{"input_ids": part} for part in torch.randint(0, 7, (5, 6)).split(3)]
    return HessianOperator(StackedGPT(2, width=4).double(), causal_lm(), batches, **options)


def convolution(kind=HessianOperator, **options):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Softplus(), nn.Flatten(), nn.Linear(8, 3)
    )
    batches = [(torch.randn(n, 1, 4, 4).double(), torch.randint(0, 3, (n,))) for n in (5, 2)]
    return kind(model.double().eval(), CROSS_ENTROPY, batches, **options)


def of_a_function(kind=HessianOperator):
    def f(x, y, z):
        return (x.sin() * y).sum() + (y**3).sum() * z + (x * z).exp().sum()

    generator = torch.Generator().manual_seed(0)
    points = [torch.randn(shape, generator=generator).double() for shape in ((3,), (3,), ())]
    return kind.from_function(f, points)


NETWORKS = {"perceptron": perceptron, "transformer": transformer, "convolution": convolution}


@functools.cache
def dense_matrix(network):
    H = NETWORKS[network]()
    return dense_hessian(H.objective.model, lambda call: mean_loss(H.objective._data, call))


def mean_loss(batches, call):
    """The objective, written out, of a model that is called by `call`."""
    total, count = 0.0, 0
    for batch in batches:
        if isinstance(batch, dict):
            x, logits = batch["input_ids"], call(batch["input_ids"])
            logits, y = logits[:, :-1].flatten(0, 1), x[:, 1:].flatten()
        else:
            (x, y), logits = batch, call(batch[0])
        total = total + nn.functional.cross_entropy(logits, y, reduction="sum")
        count += len(y)
    return total / count


def block_diagonal(matrix, space, groups):
    """The dense matrix with everything outside of the blocks set to zero."""
    kept = torch.zeros(matrix.shape, dtype=torch.bool)
    for names in groups:
        places = torch.cat([torch.arange(space.n)[space.slices[name]] for name in names])
        kept[places[:, None], places[None, :]] = True
    return torch.where(kept, matrix, 0.0)


def groups_of(blocks):
    return [blocks[block].space.names for block in blocks]


@pytest.mark.parametrize("graph", ["fresh", "retained"])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("by", ["module", "layer", "parameter"])
def test_all_blocks_are_those_of_the_dense_hessian(network, by, graph):
    H = NETWORKS[network](graph=graph)
    blocks = H.blocks(by)
    assert sorted(sum(groups_of(blocks), ())) == sorted(H.space.names)
    expected = block_diagonal(dense_matrix(network), H.space, groups_of(blocks))
    torch.testing.assert_close(blocks.to_dense(), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("network", NETWORKS)
def test_all_blocks_are_those_of_the_gauss_newton_matrix(network):
    G = NETWORKS[network](GaussNewtonOperator)
    expected = block_diagonal(G.to_dense(), G.space, groups_of(G.blocks()))
    torch.testing.assert_close(G.blocks().to_dense(), expected, rtol=1e-11, atol=1e-13)


def test_blocks_of_recomputed_layers():
    H = nested(recompute="blocks.*")
    blocks = H.blocks("layer")
    assert {"blocks.0", "blocks.1"} < set(blocks)
    rows = torch.randn(H.space.n, 2).double()
    expected = torch.zeros_like(rows)
    for block in blocks:
        # Zero outside of the block, and only the block's part of the product.
        for i, row in enumerate(rows.T):
            part = blocks.restricted(row, block)
            product = H @ blocks.extended(part, block)
            expected[:, i] += blocks.extended(blocks.restricted(product, block), block)
    torch.testing.assert_close(blocks.apply(rows), expected, rtol=1e-11, atol=1e-13)
    assert H.describe()["recompute"]["blocks"] == 2


def test_blocks_of_a_function():
    H = of_a_function()
    names = [["tensor0"], ["tensor1"], ["tensor2"]]
    expected = block_diagonal(H.to_dense(), H.space, names)
    torch.testing.assert_close(H.blocks("parameter").to_dense(), expected, rtol=1e-13, atol=1e-15)
    chosen = H.blocks({"a": ["tensor0", "tensor2"], "b": "tensor1"})
    expected = block_diagonal(H.to_dense(), H.space, [["tensor0", "tensor2"], ["tensor1"]])
    torch.testing.assert_close(chosen.to_dense(), expected, rtol=1e-13, atol=1e-15)


def test_what_is_in_no_block_has_rows_of_zeros():
    H = perceptron()
    blocks = H.blocks({"first": "0.*"})
    expected = block_diagonal(H.to_dense(), H.space, [["0.weight", "0.bias"]])
    torch.testing.assert_close(blocks.to_dense(), expected, rtol=1e-12, atol=1e-15)
    assert (blocks.size("first"), len(blocks), list(blocks)) == (35, 1, ["first"])


QUESTIONS = {
    "eigsh": (spectra.eigsh, {"k": 3}, lambda r: (r.values, r.residuals)),
    "trace": (spectra.trace, {"rtol": 0.3}, lambda r: (r.value, r.standard_error)),
    "norm": (spectra.norm, {}, lambda r: (r.value, r.bounds)),
    "density": (spectra.spectral_density, {"steps": 8}, lambda r: (r.nodes, r.weights)),
}


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_block_gives_the_same_numbers_alone_and_in_company(network, question):
    ask, options, numbers = QUESTIONS[question]
    H = NETWORKS[network]()
    blocks = H.blocks("module")
    together = blocks.each(ask, **options)
    assert list(together) == list(blocks)
    # Several vectors of a block may share a pass.
    assert blocks.passes <= max(result.matvecs for result in together.values())
    for name, result in together.items():
        alone = ask(blocks[name], **options)
        assert result.matvecs == alone.matvecs
        for one, other in zip(numbers(result), numbers(alone), strict=True):
            assert np.allclose(one, other, rtol=1e-9, atol=1e-12)
    # To the last bit in other company, or in none, whichever thread is first.
    names = list(blocks)
    for company in (names[::2], names[:1]):
        fewer = H.blocks({name: list(blocks[name].space.names) for name in company})
        for name, result in fewer.each(ask, **options).items():
            for one, other in zip(numbers(result), numbers(together[name]), strict=True):
                assert np.array_equal(one, other)


def test_graphs_are_searched_for_bad_operations_in_the_first_pass_only(monkeypatch):
    searched, search = [], diagnose.refuse_bad_nodes
    monkeypatch.setattr(
        diagnose, "refuse_bad_nodes", lambda *args: (searched.append(1), search(*args))
    )
    blocks = perceptron().blocks()
    v = torch.ones(blocks.space.n).double()
    blocks @ v
    assert searched
    searched.clear()
    blocks @ v
    assert not searched


def test_a_bad_operation_is_found_by_the_products_of_blocks_alone():
    model = nn.Sequential(nn.Linear(6, 4), Bad(), nn.Linear(4, 3)).double()
    H = HessianOperator(model, CROSS_ENTROPY, [wine()])
    with pytest.raises(DoubleBackwardError, match="'1'"):
        H.blocks() @ torch.ones(H.space.n).double()


def test_rows_of_zeros_are_not_multiplied():
    H = perceptron()
    blocks, asked = H.blocks(), []
    H.block_products, multiply = (
        lambda requests: (
            asked.append([len(request.rows) for request in requests]),
            multiply(requests),
        )[1],
        H.block_products,
    )
    expected = blocks.to_dense()
    asked.clear()
    torch.testing.assert_close(blocks.apply(torch.eye(H.space.n).double()), expected)
    assert sum(map(sum, asked)) == H.space.n


def test_more_pairs_than_a_block_has_parameters():
    blocks = perceptron().blocks("parameter")
    found = blocks.each(spectra.eigsh, k=4)
    assert len(found["4.bias"].values) == 3
    assert len(found["0.weight"].values) == 4


def test_a_question_of_ones_own():
    blocks = perceptron().blocks()

    def sharpness_and_trace(H):
        pairs = spectra.eigsh(H, k=1, which="LA")
        return pairs.values[0], spectra.trace(H, deflate=pairs).value

    for name, (sharpness, _) in blocks.each(sharpness_and_trace).items():
        values = torch.linalg.eigvalsh(blocks[name].to_dense())
        assert sharpness == pytest.approx(float(values[-1]), rel=1e-5)


def running():
    return [t for t in threading.enumerate() if t.name.startswith("spectra block")]


def test_an_error_in_one_block_ends_all_and_names_it():
    blocks = perceptron().blocks()

    def question(H):
        spectra.eigsh(H, k=1)
        if H.space.n == blocks.size("2"):
            raise ValueError("no")
        return spectra.trace(H, rtol=1e-9)

    with pytest.raises(ValueError, match="block '2': no"):
        blocks.each(question)
    assert not running()


def test_an_error_of_a_product_ends_all():
    H = HessianOperator.from_function(
        lambda x, y: (x**2).sum() + y.sqrt().sum(), [torch.ones(3), torch.zeros(2)]
    )
    with pytest.raises(NonFiniteError, match=r"^block 'tensor1'.*blocks\['tensor1'\]"):
        H.blocks("parameter").each(spectra.eigsh, k=1)
    # The advice helps.
    with pytest.raises(NonFiniteError, match="gradient of the function is already not"):
        H.blocks("parameter")["tensor1"] @ torch.ones(2)
    assert not running()


def test_ctrl_c_ends_all(monkeypatch):
    H = perceptron()
    blocks, serve, calls = H.blocks(), H.block_products, []

    def interrupted(requests):
        calls.append(len(requests))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return serve(requests)

    monkeypatch.setattr(H, "block_products", interrupted)
    with pytest.raises(KeyboardInterrupt):
        blocks.each(spectra.eigsh, k=2)
    assert not running()
    assert calls == [3] * 5


def test_a_run_on_the_block_diagonal_matrix_resumes(tmp_path):
    H = perceptron()
    blocks = H.blocks()
    whole = spectra.eigsh(blocks, k=2)
    with pytest.raises(ArgumentError, match="checkpoint= cannot be shared"):
        blocks.each(spectra.eigsh, checkpoint=tmp_path / "file")
    again = spectra.eigsh(perceptron().blocks(), k=2, checkpoint=tmp_path / "run")
    assert np.array_equal(again.values, whole.values)
    assert np.array_equal(
        spectra.eigsh(blocks, k=2, checkpoint=tmp_path / "run").values, again.values
    )


def test_the_difference_to_the_whole_is_an_operator():
    H = perceptron()
    outside = H - H.blocks()
    expected = float(torch.linalg.matrix_norm(H.to_dense() - H.blocks().to_dense(), 2))
    found = spectra.norm(outside, method="lanczos")
    low, high = found.interval(found.bounds_confidence)
    assert low <= expected <= high


@pytest.mark.parametrize(
    ("by", "error", "message"),
    [
        ("head", ArgumentError, "expected 'layer', 'module' or 'parameter'"),
        ({}, ArgumentError, "names no block"),
        ({"a": "0.*", "b": "*.bias"}, ArgumentError, "'0.bias' is in the blocks 'a' and 'b'"),
        ({"a": "nowhere.*"}, ParameterSelectionError, "nowhere"),
    ],
)
def test_blocks_that_make_no_sense_are_refused(by, error, message):
    with pytest.raises(error, match=message):
        perceptron().blocks(by)


def test_what_is_no_block_and_no_question_is_refused():
    blocks = perceptron().blocks()
    with pytest.raises(ArgumentError, match="no block '1'"):
        blocks["1"]
    with pytest.raises(ArgumentTypeError, match=r"such as spectra\.eigsh"):
        blocks.each("eigsh")
