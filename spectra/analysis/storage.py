"""Where does a run live? In a directory: a summary for machines, and the result itself.

`run.json` holds every number with its error; `analysis.json` and `analysis.safetensors` hold the
result as `Result.save` writes it, eigenvectors included. `run.json` names the checksum of the
result, and replacing it is what replaces a run: whenever a process is killed, `read_run` finds the
old one or the new one whole.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from spectra.algorithms.blocks import BlockTraces, By
from spectra.algorithms.density import SpectralDensity
from spectra.algorithms.eigen import Eigenpairs
from spectra.algorithms.estimate import Estimate
from spectra.analysis.analyze import Analysis
from spectra.analysis.landscape import Landscape
from spectra.documents import check_seal, is_checksum, read_document, sealed, to_bytes
from spectra.errors import StorageError
from spectra.files import replace_file
from spectra.results import load, load_staged, stage_result

__all__ = ["check_directory", "finite", "read_run", "read_summary", "summarize", "write_run"]

FORMAT_VERSION = 2
_SUMMARY, _RESULT = "run.json", "analysis"
_FILES = (_SUMMARY, f"{_RESULT}.json", f"{_RESULT}.safetensors")
# The quantiles of the density that the summary lists.
_SHARES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


def check_directory(directory: str | Path, *, overwrite: bool = False) -> None:
    """Whether a run can be written to `directory`: to be asked before a long computation.

    Nothing is left behind.

    Raises
    ------
    StorageError
        It holds a run already and `overwrite` is false, or it cannot be made or written to.
    """
    directory = Path(directory)
    present = [name for name in _FILES if (directory / name).exists()]
    if present and not overwrite:
        msg = (
            f"{str(directory)!r} holds a run already ({present[0]}); name another directory, or "
            "allow it to be overwritten (--overwrite, overwrite=True)"
        )
        raise StorageError(msg)
    made = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
        if made:
            directory.rmdir()
    except OSError as error:
        msg = f"cannot write to the directory {str(directory)!r}: {error.strerror}; name another"
        raise StorageError(msg) from error


def write_run(
    analysis: Analysis,
    directory: str | Path,
    *,
    title: str = "",
    source: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    vector_limit: int = 1 << 30,
) -> dict[str, Any]:
    """Write an analysis to a directory, which is made if need be.

    Parameters
    ----------
    title, source
        What was analysed, for people and as JSON, kept in the summary.
    overwrite
        Replace a run that is there already.
    vector_limit
        Eigenvectors of more bytes than this are left out, and the result says so.

    Returns
    -------
    dict
        The summary, as in `run.json`.

    Raises
    ------
    StorageError
        As `check_directory`; or the disk is full.
    """
    directory = Path(directory)
    check_directory(directory, overwrite=overwrite)
    kept = _without_large_vectors(analysis, vector_limit)
    summary = summarize(kept, title=title, source=source)
    staged = stage_result(kept, directory / _RESULT)
    try:
        try:
            summary = sealed({**summary, "analysis_checksum": staged.checksum})
            # From then on it is the new run: `read_run` finds its result, published or not.
            replace_file(directory / _SUMMARY, to_bytes(summary))
        except Exception:
            staged.discard()
            raise
        staged.publish()
    except Exception as error:
        msg = f"could not write the run to {str(directory)!r}: {type(error).__name__}: {error}"
        raise StorageError(msg) from error
    return summary


def read_run(directory: str | Path) -> Analysis:
    """The analysis that `write_run` wrote to a directory.

    Raises
    ------
    StorageError
        There is no run, or its files are damaged or from a newer version of spectra.
    """
    before = None
    while True:
        summary = read_summary(directory)
        result = _result_of(summary, Path(directory))
        if result is not None:
            return result
        # It may have been replaced between the two.
        if summary["checksum"] == before:
            msg = (
                f"the files of the run in {str(directory)!r} do not belong together: {_RESULT}.* "
                f"are missing, or not what {_SUMMARY} was written with; "
                "restore all three together, or analyse again (--overwrite)"
            )
            raise StorageError(msg)
        before = summary["checksum"]


def read_summary(directory: str | Path) -> dict[str, Any]:
    """The summary that `write_run` wrote to a directory.

    Raises
    ------
    StorageError
        As `read_run`.
    """
    path = Path(directory) / _SUMMARY
    try:
        summary = read_document(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        msg = (
            f"{str(directory)!r} holds no run of spectra ({_SUMMARY} is missing); make one with "
            "`spectra analyze TARGET --out DIR`"
        )
        raise StorageError(msg) from error
    except (OSError, ValueError, RecursionError) as error:
        msg = f"{str(path)!r} is damaged: {error}"
        raise StorageError(msg) from error
    found = summary.get("format") if isinstance(summary, dict) else None
    # What version 1 wrote is read, too: it had no checksums.
    if type(found) is not int or not 1 <= found <= FORMAT_VERSION:
        msg = (
            f"{str(path)!r} has format {found!r}, this version of spectra reads format 1 and "
            f"{FORMAT_VERSION}; update spectra, or name a directory that it wrote"
        )
        raise StorageError(msg)
    try:
        _check_summary(summary)
    except (ValueError, RecursionError) as error:
        msg = f"{str(path)!r} is damaged: {error}"
        raise StorageError(msg) from error
    return dict(summary)


def _check_summary(summary: dict[str, Any]) -> None:
    if summary["format"] > 1:
        check_seal(summary)
        if not is_checksum(summary.get("analysis_checksum")):
            msg = "its analysis_checksum is no SHA-256"
            raise ValueError(msg)
    elif "checksum" in summary:
        # What version 2 wrote does not pass for one without checksums.
        msg = "format 1 has no checksum"
        raise ValueError(msg)
    kinds = type(summary.get("title")), type(summary.get("source"))
    if kinds != (str, dict):
        msg = "its title is no text, or its source no object"
        raise ValueError(msg)


def _result_of(summary: dict[str, Any], directory: Path) -> Analysis | None:
    """The analysis that a summary belongs to; None where there is another one."""
    path = directory / _RESULT
    if summary["format"] == 1:
        result = load(path)
    elif (found := load_staged(path, summary["analysis_checksum"])) is None:
        return None
    else:
        result = found
    if not isinstance(result, Analysis):
        msg = (
            f"{str(directory)!r} holds a result of kind {type(result).__name__}, expected Analysis"
        )
        raise StorageError(msg)
    return result


def summarize(
    analysis: Analysis, *, title: str = "", source: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Every number of an analysis with its error, as JSON; null where there is no finite number."""
    provenance = analysis.provenance
    summary = {
        "format": FORMAT_VERSION,
        "title": title,
        "source": dict(source or {}),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "converged": analysis.converged,
        "partial": analysis.partial,
        "operator": provenance.get("operator"),
        "loss": analysis.value,
        "gradient_norm": analysis.gradient_norm,
        "eigenpairs": _eigenpairs(analysis.eigenpairs),
        "spectral_norm": _estimate(analysis.spectral_norm),
        "trace": _estimate(analysis.trace),
        "frobenius_norm": _estimate(analysis.frobenius_norm),
        "density": _density(analysis.density),
        "layer_traces": _block_traces(analysis.blocks, "layer"),
        "module_traces": _block_traces(analysis.blocks, "module"),
        "landscape": _landscape(analysis.landscape),
        "sums": {name: _estimate(estimate) for name, estimate in analysis.sums.items()},
        "notes": list(analysis.notes),
        "matvecs": {"total": analysis.total_matvecs, **analysis.matvecs},
        "seconds": {"total": sum(analysis.seconds.values()), **analysis.seconds},
        "options": provenance.get("options"),
        "seed": provenance.get("seed"),
        "versions": provenance.get("versions"),
    }
    plain: dict[str, Any] = finite(summary)
    return plain


def _eigenpairs(pairs: Eigenpairs) -> dict[str, Any]:
    return {
        "values": pairs.values.tolist(),
        "residuals": pairs.residuals.tolist(),
        "converged": pairs.converged.tolist(),
        "which": pairs.which,
        "tol": pairs.tol,
        "no_eigenvalue_above": pairs.no_eigenvalue_above,
        "no_eigenvalue_below": pairs.no_eigenvalue_below,
        "certificate_confidence": pairs.certificate_confidence,
        "certified": pairs.certified,
        "noise": pairs.noise,
        "floor": pairs.floor,
        "vectors_saved": pairs.vectors.shape[1] == len(pairs),
        "matvecs": pairs.matvecs,
        "notes": list(pairs.notes),
    }


def _estimate(estimate: Estimate | None) -> dict[str, Any] | None:
    if estimate is None:
        return None
    bounded = estimate.bounds is not None
    return {
        "value": estimate.value,
        "standard_error": estimate.standard_error,
        "interval": list(estimate.bounds or estimate.interval()),
        "confidence": estimate.bounds_confidence if bounded else estimate.confidence,
        "exact": estimate.exact,
        "converged": estimate.converged,
        "method": estimate.method,
        "probes": len(estimate.samples),
        "matvecs": estimate.matvecs,
        "noise": estimate.noise,
        "floor": estimate.floor,
        "notes": list(estimate.notes),
    }


def _block_traces(blocks: BlockTraces | None, by: By) -> dict[str, Any] | None:
    if blocks is None:
        return None
    return {
        "confidence": blocks.confidence,
        "exact": blocks.exact,
        "method": blocks.method,
        "probes": blocks.probes,
        "notes": list(blocks.notes),
        "blocks": [
            {
                "name": row.name,
                "parameters": row.size,
                "value": row.trace.value,
                "standard_error": row.trace.standard_error,
                "interval": list(row.trace.interval()),
                # In the order of the eigenpairs.
                "eigenvector_shares": row.masses.tolist(),
            }
            for row in blocks.rows(by)
        ],
    }


def _density(density: SpectralDensity | None) -> dict[str, Any] | None:
    if density is None:
        return None
    values = density.quantiles(_SHARES).tolist()
    return {
        "n": density.n,
        "range": list(density.support),
        "quantiles": {str(share): value for share, value in zip(_SHARES, values, strict=True)},
        "probes": density.probes,
        "steps": density.steps,
        "atoms": len(density.atoms),
        "matvecs": density.matvecs,
        "noise": density.noise,
        "floor": density.floor,
        "notes": list(density.notes),
    }


def _landscape(surface: Landscape | None) -> dict[str, Any] | None:
    if surface is None:
        return None
    return {
        "loss": surface.value,
        "displacements": surface.displacements.tolist(),
        "directions": [
            {"of": label, "slope": float(slope), "curvature": float(curvature)}
            for label, slope, curvature in zip(
                surface.labels, surface.slopes, np.diag(surface.curvatures), strict=True
            )
        ],
        "values": surface.values.tolist(),
        "predictions": surface.predictions.tolist(),
        "weights_norm": surface.weights_norm,
        "evaluations": surface.evaluations,
        "failures": list(surface.failures),
        "notes": list(surface.notes),
    }


def finite(value: Any) -> Any:
    """The same with null for nan and inf, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _without_large_vectors(analysis: Analysis, limit: int) -> Analysis:
    pairs = analysis.eigenpairs
    vectors = pairs.vectors
    item = vectors.element_size() if isinstance(vectors, Tensor) else vectors.itemsize
    size = item * math.prod(vectors.shape)
    if size <= limit:
        return analysis
    note = (
        f"the eigenvectors ({size / 2**30:.2g} GiB) are not saved: they are above the limit of "
        f"{limit / 2**30:.2g} GiB"
    )
    # No columns, but still n rows, from which a result reads n.
    pairs = dataclasses.replace(pairs, vectors=vectors[:, :0], notes=(*pairs.notes, note))
    return dataclasses.replace(analysis, eigenpairs=pairs)
