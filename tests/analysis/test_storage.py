import json
import math
import os

import numpy as np
import pytest
import torch

import spectra
from spectra.analysis.storage import (
    check_directory,
    read_run,
    read_summary,
    summarize,
    write_run,
)
from spectra.errors import StorageError
from tests.cases.matrices import Layered

VALUES = np.concatenate([[9.0, -5.0, 3.0], np.linspace(-0.5, 1, 297)])


@pytest.fixture(scope="module")
def analysis():
    return spectra.analyze(np.diag(VALUES), k=3, steps=10, probes=2, rtol=0.05)


def refuse(constant):
    raise AssertionError(constant)


def test_what_was_written_is_read_back(analysis, tmp_path):
    summary = write_run(analysis, tmp_path / "deep" / "run", title="T", source={"target": "t"})
    again = read_run(tmp_path / "deep" / "run")
    assert str(again) == str(analysis)
    np.testing.assert_array_equal(again.eigenpairs.vectors, analysis.eigenpairs.vectors)
    assert read_summary(tmp_path / "deep" / "run") == summary
    assert (summary["title"], summary["source"]) == ("T", {"target": "t"})


def test_the_summary_holds_the_loss_along_eigenvectors(tmp_path):
    # Beyond zero there is no loss: null, as JSON has no nan.
    weights = torch.tensor([1.0, 2.0]).double()
    H = spectra.HessianOperator.from_function(
        lambda x: -(weights * x.sqrt()).sum(), torch.ones(2).double()
    )
    analysis = spectra.analyze(H, 1, landscape=True, density=False, trace=False)
    summary = write_run(analysis, tmp_path)["landscape"]
    found = read_run(tmp_path).landscape
    assert np.isnan(found.values).any()
    np.testing.assert_array_equal(found.values, analysis.landscape.values)
    assert summary == json.loads((tmp_path / "run.json").read_text())["landscape"]
    assert summary["displacements"] == found.displacements.tolist()
    assert summary["values"] == [[None if math.isnan(v) else v for v in found.values[0]]]
    assert summary["predictions"] == found.predictions.tolist()
    assert summary["directions"][0]["curvature"] == analysis.eigenpairs.values[0]
    assert summary["evaluations"] == found.evaluations == np.isfinite(found.values).sum()
    assert summarize(spectra.analyze(np.diag(VALUES), k=1, trace=False))["landscape"] is None


def test_the_summary_holds_every_number_with_its_error(analysis):
    summary = summarize(analysis)
    pairs = analysis.eigenpairs
    assert summary["eigenpairs"]["values"] == list(pairs.values)
    assert summary["eigenpairs"]["residuals"] == list(pairs.residuals)
    assert summary["eigenpairs"]["converged"] == [True] * 3
    assert summary["eigenpairs"]["no_eigenvalue_above"] == pairs.no_eigenvalue_above
    for name in ("trace", "frobenius_norm"):
        estimate, written = getattr(analysis, name), summary[name]
        assert written["value"] == estimate.value
        assert written["standard_error"] == estimate.standard_error
        assert tuple(written["interval"]) == estimate.interval()
        assert written["converged"] == estimate.converged
        assert written["probes"] == len(estimate.samples)
    norm = summary["spectral_norm"]
    assert norm["interval"] == list(analysis.spectral_norm.bounds)
    assert norm["confidence"] == analysis.spectral_norm.bounds_confidence
    assert norm["standard_error"] is None  # it has bounds instead
    assert summary["density"]["range"] == list(analysis.density.support)
    assert summary["density"]["quantiles"]["0.5"] == analysis.density.quantiles([0.5])[0]
    assert summary["matvecs"]["total"] == analysis.total_matvecs
    assert summary["seconds"]["total"] == pytest.approx(sum(analysis.seconds.values()))
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["operator"]["n"] == 300
    assert summary["seed"] == 0


def test_the_summary_lists_every_layer_and_module_with_its_error(analysis, tmp_path):
    h = Layered(np.diag(VALUES), {"h.0.q.weight": 100, "h.0.k.weight": 150, "head.weight": 50})
    named = spectra.analyze(h, k=2, steps=10, probes=2, rtol=0.05, progress=False)
    summary = write_run(named, tmp_path / "run")
    assert read_summary(tmp_path / "run") == summary
    for by, names in {"module": ["h.0.q", "h.0.k", "head"], "layer": ["h.0", "head"]}.items():
        written = summary[f"{by}_traces"]
        assert written["probes"] == named.blocks.probes
        assert [block["name"] for block in written["blocks"]] == names
        for block, trace in zip(written["blocks"], named.module_traces(by).values(), strict=True):
            assert block["value"] == trace.value
            assert block["standard_error"] == trace.standard_error
            assert tuple(block["interval"]) == trace.interval()
        shares = np.array([block["eigenvector_shares"] for block in written["blocks"]])
        assert shares.sum(axis=0) == pytest.approx(np.ones(2))
        assert sum(block["parameters"] for block in written["blocks"]) == 300
    again = read_run(tmp_path / "run")
    assert str(again.blocks) == str(named.blocks)
    assert again.module_traces()["head"].interval() == named.module_traces()["head"].interval()
    plain = summarize(analysis)
    assert plain["layer_traces"] is plain["module_traces"] is None


def test_the_summary_is_strict_json(analysis, tmp_path):
    write_run(analysis, tmp_path)
    text = (tmp_path / "run.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=refuse)["converged"] is True


def test_infinite_intervals_become_null():
    endless = spectra.Estimate("trace", 1.0, math.nan, samples=np.ones(1))
    analysis = spectra.Analysis(eigenpairs=spectra.eigsh(np.eye(2), k=1), spectral_norm=endless)
    summary = summarize(analysis)
    assert summary["spectral_norm"]["interval"] == [None, None]
    assert summary["trace"] is None


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_large_eigenvectors_are_left_out_and_that_is_said(kind, tmp_path):
    analysis = spectra.analyze(kind(np.diag(VALUES)), k=2, density=False, trace=False)
    summary = write_run(analysis, tmp_path, vector_limit=2 * 300 * 8 - 1)
    again = read_run(tmp_path)
    assert summary["eigenpairs"]["vectors_saved"] is False
    assert "are not saved" in summary["eigenpairs"]["notes"][-1]
    assert tuple(again.eigenpairs.vectors.shape) == (300, 0)
    assert "of n = 300" in str(again)
    assert "are not saved" in str(again)
    summary = write_run(analysis, tmp_path, vector_limit=2 * 300 * 8, overwrite=True)
    assert summary["eigenpairs"]["vectors_saved"] is True


def test_another_run_is_replaced_only_when_asked(analysis, tmp_path):
    write_run(analysis, tmp_path, title="first")
    with pytest.raises(StorageError, match=r"holds a run already \(run.json\).*--overwrite"):
        write_run(analysis, tmp_path, title="second")
    with pytest.raises(StorageError, match="holds a run already"):
        check_directory(tmp_path)
    assert read_summary(tmp_path)["title"] == "first"
    check_directory(tmp_path, overwrite=True)
    write_run(analysis, tmp_path, title="second", overwrite=True)
    assert read_summary(tmp_path)["title"] == "second"


def test_a_saved_result_of_that_name_is_not_replaced_either(analysis, tmp_path):
    analysis.save(tmp_path / "analysis")
    with pytest.raises(StorageError, match=r"analysis.json"):
        check_directory(tmp_path)


def test_asking_leaves_nothing_behind(tmp_path):
    check_directory(tmp_path / "new" / "run")
    assert not (tmp_path / "new" / "run").exists()
    check_directory(tmp_path)
    assert not list((tmp_path / "new").iterdir())


def test_a_directory_that_cannot_be_made_is_named(analysis, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StorageError, match=r"cannot write to the directory .*name another"):
            write_run(analysis, path)


def test_a_directory_without_a_run_is_named_with_the_fix(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(StorageError, match=r"holds no run of spectra .*spectra analyze TARGET"):
            read_run(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged"),
        ("[]", "has format None"),
        ('{"format": 99}', "has format 99, .* update spectra"),
    ],
)
def test_a_damaged_summary_is_refused(text, message, analysis, tmp_path):
    write_run(analysis, tmp_path)
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(StorageError, match=message):
        read_run(tmp_path)


def test_a_run_must_hold_an_analysis(analysis, tmp_path):
    (tmp_path / "run.json").write_text('{"format": 1, "title": "", "source": {}}')
    analysis.trace.save(tmp_path / "analysis")
    with pytest.raises(StorageError, match="kind Estimate, expected Analysis"):
        read_run(tmp_path)


def test_a_run_whose_result_is_another_one_is_refused(analysis, tmp_path):
    write_run(analysis, tmp_path)
    analysis.trace.save(tmp_path / "analysis")
    with pytest.raises(StorageError, match=r"do not belong together.*analyse again"):
        read_run(tmp_path)


def test_a_run_of_the_first_format_is_read(analysis, tmp_path):
    summary = write_run(analysis, tmp_path)
    for name in ("analysis_checksum", "checksum"):
        del summary[name]
    (tmp_path / "run.json").write_text(json.dumps({**summary, "format": 1}))
    document = json.loads((tmp_path / "analysis.json").read_text(encoding="utf-8"))
    for name in ("arrays_sha256", "checksum"):
        del document[name]
    (tmp_path / "analysis.json").write_text(json.dumps({**document, "format": 1}))
    assert str(read_run(tmp_path)) == str(analysis)
    assert read_summary(tmp_path)["title"] == summary["title"]


def test_a_changed_number_of_the_summary_is_damage(analysis, tmp_path):
    summary = write_run(analysis, tmp_path, title="T")
    path = tmp_path / "run.json"
    # Spaces and the order of an editor's line ends say nothing; every number does.
    path.write_text(json.dumps(summary, indent=3))
    assert read_summary(tmp_path) == summary
    path.write_text(json.dumps({**summary, "seed": 1}))
    with pytest.raises(StorageError, match="damaged: its content does not have the checksum"):
        read_summary(tmp_path)
    path.write_text(json.dumps({**summary, "format": 1}))
    with pytest.raises(StorageError, match="damaged: format 1 has no checksum"):
        read_summary(tmp_path)


@pytest.mark.parametrize("step", range(15))
def test_a_run_is_replaced_whole_or_not_at_all_wherever_the_process_ends(
    analysis, tmp_path, monkeypatch, step
):
    """Every call that changes the directory is, in turn, the last one before the end."""
    other = spectra.analyze(np.diag(2 * VALUES), k=2, density=False, trace=False)
    write_run(analysis, tmp_path, title="old")
    calls = 0

    class End(BaseException):
        pass

    def counted(function):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls > step:
                raise End
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for name in ("replace", "fsync", "unlink"):
            patch.setattr(os, name, counted(getattr(os, name)))
        try:
            write_run(other, tmp_path, title="new", overwrite=True)
        except End:
            ended = True
        else:
            ended = False
    title, found = read_summary(tmp_path)["title"], read_run(tmp_path)
    expected = {"old": analysis, "new": other}[title]
    assert str(found) == str(expected)
    np.testing.assert_array_equal(found.eigenpairs.vectors, expected.eigenpairs.vectors)
    # The result by itself is whole, too.
    assert str(spectra.load(tmp_path / "analysis")) in {str(analysis), str(other)}
    assert ended or title == "new"
    write_run(other, tmp_path, title="newer", overwrite=True)
    assert read_summary(tmp_path)["title"] == "newer"
    assert str(read_run(tmp_path)) == str(other)


def test_both_files_of_a_result_can_be_read_by_the_same_people(tmp_path):
    path = spectra.eigsh(torch.eye(3), k=1).save(tmp_path / "pairs")
    assert path.with_suffix(".safetensors").stat().st_mode == path.stat().st_mode
