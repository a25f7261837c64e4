import functools

import numpy as np
import pytest
import torch

import spectra
from spectra.errors import ArgumentError, ArgumentTypeError
from tests.operators.test_block_diagonal import NETWORKS, dense_matrix, nested, perceptron


def squares(network, blocks):
    matrix, space = dense_matrix(network), blocks.space
    places = [
        torch.cat([torch.arange(space.n)[space.slices[n]] for n in blocks[name].space.names])
        for name in blocks
    ]
    return np.array([[float(matrix[a][:, b].square().sum()) for b in places] for a in places])


def share_outside(exact):
    return np.sqrt(1 - np.trace(exact) / exact.sum())


@functools.cache
def many_runs():
    H = perceptron()
    return [spectra.block_coupling(H, "module", probes=12, seed=seed) for seed in range(60)]


@pytest.mark.parametrize("network", ["perceptron", "transformer"])
def test_the_norms_of_all_blocks_are_within_their_errors(network):
    H = NETWORKS[network]()
    exact = squares(network, H.blocks("module"))
    found = spectra.block_coupling(H, "module", probes=60)
    assert found.matvecs == 60 * len(exact)
    deviations = (found.squares - exact) / np.maximum(found.standard_errors, 1e-12 * exact.max())
    # Standard normal, nearly: of dozens of numbers none is far out.
    assert np.abs(deviations).max() < 5
    low, high = found.outside_interval
    assert low <= share_outside(exact) <= high
    assert np.array_equal(found.squares, found.squares.T)


def test_the_squares_are_exact_in_expectation():
    exact = squares("perceptron", perceptron().blocks("module"))
    samples = np.concatenate([run.samples for run in many_runs()])
    errors = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
    assert len(samples) == 720
    assert (np.abs(samples.mean(axis=0) - exact) < 4 * errors).all()
    # And to a few percent, so that this is no statement about large errors.
    assert (errors < 0.1 * exact).all()


def test_standard_errors_are_as_large_as_the_deviations():
    exact = squares("perceptron", perceptron().blocks("module"))
    deviations = np.array([run.squares - exact for run in many_runs()])
    claimed = np.array([run.standard_errors for run in many_runs()])
    ratio = np.sqrt((deviations**2).mean(axis=0) / (claimed**2).mean(axis=0))
    # Over 60 runs each is known to a tenth or so.
    assert ((ratio > 0.7) & (ratio < 1.4)).all()


def test_errors_of_single_blocks_are_as_large_as_the_deviations():
    exact = squares("perceptron", perceptron().blocks("module"))
    truth = np.sqrt(1 - np.diag(exact) / exact.sum(axis=1))
    deviations = np.array([run.outside_by_block - truth for run in many_runs()])
    claimed = np.array([run.outside_by_block_errors for run in many_runs()])
    ratio = np.sqrt((deviations**2).mean(axis=0) / (claimed**2).mean(axis=0))
    assert ((ratio > 0.7) & (ratio < 1.5)).all(), ratio


def test_intervals_cover_the_truth_as_often_as_they_say():
    truth = share_outside(squares("perceptron", perceptron().blocks("module")))
    intervals = [run.outside_interval for run in many_runs()]
    # 57 expected; fewer than 50 would happen once in a thousand times.
    assert sum(low <= truth <= high for low, high in intervals) >= 50


def test_a_block_diagonal_hessian_has_nothing_outside():
    H = spectra.HessianOperator.from_function(
        lambda x, y: (x.sum() ** 4) + (y**2).sum(), [torch.ones(3).double(), torch.ones(2).double()]
    )
    found = spectra.block_coupling(H, "parameter", probes=3)
    assert found.outside == 0.0
    assert found.outside_by_block.tolist() == [0.0, 0.0]
    assert found.outside_by_block_errors.tolist() == [0.0, 0.0]


def test_it_is_saved_and_printed_within_80_columns(tmp_path):
    found = spectra.block_coupling(nested(), "parameter", probes=3)
    found.save(tmp_path / "coupling")
    again = spectra.load(tmp_path / "coupling")
    assert str(again) == str(found)
    assert max(map(len, str(found).splitlines())) <= 80


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probes": 1}, "at least 2"),
        ({"by": {"a": "0.*", "b": "2.*"}}, "hold 59 of 74 parameters"),
        ({"by": {"all": "*"}}, "nothing outside"),
        ({"by": "head"}, "expected 'layer'"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        spectra.block_coupling(perceptron(), **options)


def test_a_matrix_without_parameters_is_refused():
    with pytest.raises(ArgumentTypeError, match="expected a HessianOperator"):
        spectra.block_coupling(np.eye(3))
