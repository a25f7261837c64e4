import dataclasses
import importlib

import numpy as np
import pytest
import torch

import spectra
from spectra.algorithms.progress import progress_bar
from spectra.errors import ArgumentError, ArgumentTypeError
from tests.operators.test_block_diagonal import (
    NETWORKS,
    dense_matrix,
    groups_of,
    nested,
    perceptron,
    transformer,
)

# The name in spectra is the function.
module = importlib.import_module("spectra.algorithms.block_spectra")


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("by", ["layer", "parameter"])
def test_every_number_is_that_of_the_dense_block(network, by):
    H = NETWORKS[network]()
    found = spectra.block_spectra(H, by)
    for name, names in zip(found.names, groups_of(H.blocks(by)), strict=True):
        places = torch.cat([torch.arange(H.space.n)[H.space.slices[n]] for n in names])
        block = dense_matrix(network)[places][:, places]
        exact = np.sort(torch.linalg.eigvalsh(block).numpy())
        pairs, scale = found.eigenpairs[name], np.abs(exact).max()
        assert pairs.converged.all()
        assert pairs.values[0] == pytest.approx(exact[-1], abs=1e-4 * scale)
        assert pairs.values[-1] == pytest.approx(exact[0], abs=1e-4 * scale)
        # Each of these intervals misses the truth once in twenty times, none by its own width.
        for estimate, truth in (
            (found.traces[name], exact.sum()),
            (found.norms[name], np.sqrt((exact**2).sum())),
        ):
            low, high = estimate.interval()
            width = high - low + 1e-9 * scale
            assert low - width <= truth <= high + width


def test_blocks_share_their_passes():
    found = spectra.block_spectra(transformer(), "module", rtol=0.2)
    assert found.passes < found.matvecs / 4


def test_a_bar_that_is_asked_for_counts_passes(capsys, monkeypatch):
    counts = []

    def counting(*args, **options):
        bar = progress_bar(*args, **options)
        update = bar.update
        bar.update = lambda n=1: (counts.append(n), update(n))[1]
        return bar

    monkeypatch.setattr(module, "progress_bar", counting)
    found = spectra.block_spectra(perceptron(), rtol=0.5, progress=True)
    assert sum(counts) == found.passes
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "block spectra" in captured.err
    assert "pass" in captured.err
    spectra.block_spectra(perceptron(), rtol=0.5)
    assert capsys.readouterr().err == ""


def test_it_is_saved_and_printed_within_80_columns(tmp_path):
    found = spectra.block_spectra(nested(), "module", rtol=0.5, tol=1e-2)
    found.save(tmp_path / "spectra")
    again = spectra.load(tmp_path / "spectra")
    assert str(again) == str(found)
    assert max(map(len, str(found).splitlines())) <= 80
    assert str(found).splitlines()[0].startswith(f"spectra of {len(found.names)} blocks:")


def test_wrong_arguments_are_refused():
    with pytest.raises(ArgumentTypeError, match="expected a HessianOperator"):
        spectra.block_spectra(np.eye(3))
    with pytest.raises(ArgumentError, match="k="):
        spectra.block_spectra(perceptron(), k=0)


def test_what_did_not_converge_is_marked():
    found = spectra.block_spectra(perceptron(), "module")
    pairs = found.eigenpairs["0"]
    missed = dataclasses.replace(pairs, converged=np.zeros_like(pairs.converged))
    found = dataclasses.replace(found, eigenpairs={**found.eigenpairs, "0": missed})
    assert str(found).splitlines()[-1] == "  * not converged"
    assert f"{pairs.values[0]:.3g}*" in str(found)
