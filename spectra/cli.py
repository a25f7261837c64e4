"""What does the command `spectra` do? It loads what it is pointed at, analyses it, and reports."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import math
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from spectra.analysis import storage
from spectra.analysis.analyze import Analysis, analyze
from spectra.analysis.budget import parse_budget
from spectra.analysis.comparison import Comparison, compare
from spectra.analysis.preflight import check
from spectra.analysis.track import track
from spectra.analysis.trajectory import Measurement, Trajectory
from spectra.distributed.launch import EveryNth, launched, processes
from spectra.errors import (
    ArgumentError,
    ArgumentTypeError,
    CheckpointError,
    SpectraError,
    StorageError,
    TargetError,
)
from spectra.installation import namesake_problem
from spectra.names import printable
from spectra.objective.memory import memory_ran_out
from spectra.operators.base import SymmetricOperator
from spectra.operators.hessian import HessianOperator
from spectra.results import load, versions

__all__ = ["main"]

_CONVERGED, _NOT_CONVERGED, _USAGE, _FAILED, _INTERRUPTED, _TERMINATED = 0, 1, 2, 3, 130, 143
# In the directory of a run until it is finished.
_CHECKPOINT = "checkpoint"
_EPILOG = """\
exit status:
  0    done, and everything reached its tolerance
  1    done, but something did not reach its tolerance; the results are written
       and marked (check: done, and something is wrong)
  2    wrong usage: options, TARGET or files cannot be used as given; nothing
       was computed
  3    the analysis failed
  130  interrupted (Ctrl-C), 143 by SIGTERM: what was computed is in DIR, and
       --resume goes on

SPECTRA_DEBUG=1 in the environment adds the traceback to an error.
"""
_TARGET = """\
TARGET is file.py:function or package.module:function. The function is called
without arguments and returns a spectra.HessianOperator, or (model, loss, data)
as HessianOperator takes them:

  def target():
      model = MyNetwork()
      model.load_state_dict(torch.load("weights.pt", weights_only=True))
      loss = spectra.losses.supervised(torch.nn.CrossEntropyLoss())
      return model.eval(), loss, [(inputs, labels), ...]

--hf MODEL_DIR --text FILE takes a Hugging Face model from a local directory
(config.json, *.safetensors and tokenizer; a GGUF file; or a PEFT adapter of
such a model) and its loss on a file:

  --task causal    the mean next-token loss of a text
  --task masked    that of predicting 15 % of the tokens, drawn once
  --task classify  that of a classifier on a table (.csv or .jsonl) with columns
                   text and label; of images, columns pixel_values and label

The directory --out receives run.json (every number with its error), the result
itself (analysis.json, analysis.safetensors: spectra.load reads it), figures,
and report.html. Until it is finished it also holds a checkpoint; a run that was
ended, by whatever, goes on with --resume.

`torchrun --nproc-per-node 4 -m spectra analyze ...` does the same in four
processes, each on every fourth batch; --resume goes on in another number of
processes, too.
"""
_TRACK = """\
Measures the curvature at weights that a training saved, one CHECKPOINT after
the other, in the order of their steps. A CHECKPOINT is a file (.pt, .pth, .bin,
.ckpt: a state_dict, by itself or under "model", "state_dict" or the like;
.safetensors) or a directory of Hugging Face's.

TARGET is file.py:function or package.module:function, as for `spectra analyze`:
the model that the weights are of, a loss, and the data to measure on. Where it
returns (model, loss, data, optimizer), the optimiser's saved state is put into
that, for --preconditioned and the stability threshold. With --hf MODEL_DIR
--text FILE instead of TARGET, every argument is a CHECKPOINT.

The directory --out receives trajectory.json and trajectory.safetensors
(spectra.load reads them), after every measurement, and the figure and
trajectory.html at the end. A run that was ended goes on with --resume, and so
does a finished one, with the CHECKPOINTs that came since.
"""
_COMPARE = """\
Puts two runs of `spectra analyze` side by side: every number that both have,
the change, and what the change may be off by; how much the top eigenvectors
have in common, how far the distributions of eigenvalues are apart, and which
settings differ. Nothing is computed anew.
"""
_COMPLETION = """\
Prints a script that completes commands, options and files, to be written to
where the shell looks for it:

  spectra completion bash > ~/.local/share/bash-completion/completions/spectra
  spectra completion zsh > DIRECTORY/_spectra    with DIRECTORY in $fpath
  spectra completion tcsh > FILE                 with `source FILE` in ~/.tcshrc
"""
# What stands for files in the usage of a command.
_PATHS = frozenset({"DIR", "FILE", "MODEL_DIR", "TARGET", "TARGET CHECKPOINT"})
_FIGURES = frozenset(
    {
        "eigenvalues",
        "eigenvalues_symlog",
        "density",
        "density_symlog",
        "trace",
        "trace_by_layer",
        "eigenvectors_by_layer",
        "landscape",
    }
)
_FORMATS = ("svg", "png")
# Options of `analyze` that go with --hf, by its tasks.
_LANGUAGE = ("tokens_per_sequence", "sequences_per_batch", "max_tokens", "dtype", "device")
_TASKS = {
    "causal": _LANGUAGE,
    "masked": _LANGUAGE,
    "classify": ("tokens_per_sequence", "rows_per_batch", "dtype", "device"),
}
# What else a report of a bug should name, where it is installed.
_BESIDE = (
    *("matplotlib", "safetensors", "tqdm", "jinja2", "scikit-learn", "transformers", "tokenizers"),
    *("accelerate", "peft", "gguf", "lightning", "tensorboard"),
)
_OPERATOR_OPTIONS = ("graph", "memory_budget", "recompute", "compute_dtype", "microbatch")
_MODEL_OPTIONS = tuple(dict.fromkeys(name for names in _TASKS.values() for name in names))


class _Asked(NamedTuple):
    """What is analysed, what to call it, and where it comes from."""

    operator: SymmetricOperator
    title: str
    source: dict[str, Any]
    optimizer: Optimizer | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Parameters
    ----------
    argv
        The arguments after the program's name; None for those of the process.

    Raises
    ------
    SystemExit
        With status 2 for arguments that cannot be parsed, 0 after `--help` and `--version`.
    """
    if problem := namesake_problem():
        return _fail(SpectraError(problem), _USAGE)
    arguments = _parser().parse_args(argv)
    with contextlib.ExitStack() as stack:
        arguments.rank = 0
        try:
            if processes() > 1:
                _check_shared(arguments)
                arguments.rank = stack.enter_context(launched())
        except ArgumentError as error:
            first = os.environ.get("RANK", "0") == "0"
            return _fail(error, _USAGE) if first else _USAGE
        if arguments.rank:
            # The first process speaks for all of them.
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        return _main(arguments)


def _check_shared(arguments: argparse.Namespace) -> None:
    """Refuse what several processes cannot do together."""
    if arguments.prepare not in {_analyze, _check}:
        msg = (
            "only `analyze` and `check` run in several processes; start the others without torchrun"
        )
        raise ArgumentError(msg)


def _main(arguments: argparse.Namespace) -> int:
    for stream in (sys.stdout, sys.stderr):
        # Where the encoding has no ‖ or ±, a ? is better than an error at the end of a long run.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    status = _USAGE
    try:
        run = arguments.prepare(arguments)
        status = _FAILED
        return int(run())
    except KeyboardInterrupt as error:
        kept = "; the same command with --resume goes on" if "is kept" in str(error) else ""
        print(f"spectra: interrupted{kept}", file=sys.stderr)
        return _TERMINATED if "SIGTERM" in str(error) else _INTERRUPTED
    except CheckpointError as error:
        return _fail(error, _USAGE, "; on the command line, --overwrite does")
    except (ArgumentError, ArgumentTypeError) as error:
        return _fail(error, _USAGE)
    except SpectraError as error:
        return _fail(error, status)
    except Exception as error:
        if memory_ran_out(error):
            advice = (
                "; try --memory-budget, --microbatch, fewer parameters (--params), a smaller basis "
                "(--ncv), or one on disk (--basis disk)"
            )
            return _fail(error, _FAILED, advice)
        traceback.print_exc()
        print("spectra: error: unexpected; this is a bug in spectra or its input", file=sys.stderr)
        return _FAILED


def _demo(arguments: argparse.Namespace) -> Callable[[], int]:
    from spectra.integrations.digits import trained_digits

    out: Path = arguments.out
    # A second run of the demo may replace the first one, but no other run.
    overwrite = arguments.overwrite or _holds_demo(out)
    storage.check_directory(out, overwrite=overwrite)
    # More threads slow so small a network down, and one gives the same numbers on every machine.
    torch.set_num_threads(1)
    _say("Training a small tanh network on scikit-learn's 1,797 images of digits …")
    start = time.perf_counter()
    model, loss, data = trained_digits()
    with torch.no_grad():
        right = sum(int((model(x).argmax(dim=1) == y).sum()) for x, y in data)
    images = sum(len(y) for _, y in data)
    _say(
        f"{time.perf_counter() - start:.1f} s; {right / images:.1%} of the images are recognised\n"
    )
    operator = HessianOperator(model, loss, data)
    return functools.partial(
        _run,
        operator,
        {"landscape": True},
        out=out,
        title="a small network on scikit-learn's digits",
        source={"demo": "digits"},
        overwrite=overwrite,
        say=_say,
    )


def _analyze(arguments: argparse.Namespace) -> Callable[[], int]:
    _check_kind(arguments)
    if arguments.resume and _is_finished(arguments.out):
        return functools.partial(_say_finished, arguments)
    # The files are the first process's.
    checkpoint = arguments.out / _CHECKPOINT if arguments.rank else _checkpoint(arguments)
    say = _silent if arguments.json else _say
    operator, title, source, _ = _asked_about(arguments, say)
    n = operator.space.n
    if arguments.top is not None and arguments.top > n:
        msg = f"--top {arguments.top}, but there are only {n} parameters, so {n} eigenvalues"
        raise ArgumentError(msg)
    both = not (arguments.density or arguments.trace)
    options = {
        "k": arguments.top or min(10, n),
        "which": arguments.which,
        "tol": arguments.tol,
        "rtol": arguments.rtol,
        "steps": arguments.steps,
        "probes": arguments.probes,
        "trace": arguments.trace or both,
        "density": arguments.density or both,
        "landscape": arguments.landscape,
        "ncv": arguments.ncv,
        "basis": arguments.basis,
        "budget": arguments.budget,
        "preflight": arguments.preflight,
        "seed": arguments.seed,
    }
    return functools.partial(
        _run,
        operator,
        options,
        out=arguments.out,
        title=title,
        source=source,
        overwrite=arguments.overwrite or arguments.resume,
        say=say,
        as_json=arguments.json,
        checkpoint=checkpoint,
        writes=arguments.rank == 0,
    )


def _is_finished(directory: Path) -> bool:
    """It holds a whole run, and nothing to go on from."""
    try:
        summary = storage.read_summary(directory)
    except SpectraError:
        return False
    return not (summary.get("partial") or (directory / _CHECKPOINT).exists())


def _say_finished(arguments: argparse.Namespace) -> int:
    """What is in the directory is the answer: for jobs that are started again and again."""
    summary = storage.read_summary(arguments.out)
    if arguments.json:
        _say(json.dumps(summary, indent=1, allow_nan=False))
    else:
        _say(f"The run in {arguments.out} is finished: nothing to resume")
    return _CONVERGED if summary["converged"] else _NOT_CONVERGED


def _checkpoint(arguments: argparse.Namespace) -> Path:
    """Where the run is recorded, once it is clear that it may be."""
    out: Path = arguments.out
    checkpoint, unfinished = out / _CHECKPOINT, (out / _CHECKPOINT).exists()
    if arguments.resume and arguments.overwrite:
        msg = "--resume goes on with the run in DIR, --overwrite replaces it; give one of them"
        raise ArgumentError(msg)
    if unfinished and not (arguments.resume or arguments.overwrite):
        msg = (
            f"{str(out)!r} holds an unfinished run; go on with it by --resume, begin anew by "
            "--overwrite, or name another directory"
        )
        raise ArgumentError(msg)
    # Of a run that was stopped, a partial result may be there.
    storage.check_directory(out, overwrite=arguments.overwrite or unfinished)
    if arguments.overwrite:
        checkpoint.unlink(missing_ok=True)
    return checkpoint


def _check(arguments: argparse.Namespace) -> Callable[[], int]:
    _check_kind(arguments)
    say = _silent if arguments.json else _say
    operator, title, *_ = _asked_about(arguments, say)

    def run() -> int:
        say(f"Checking the Hessian of {title} by some gradients and four products …\n")
        with _stdout_to_stderr(arguments.json):
            found = check(operator, seed=arguments.seed)
        numbers = dataclasses.asdict(found)
        _say(json.dumps(numbers, indent=1, allow_nan=False) if arguments.json else str(found))
        wrong = any(finding.level == "error" for finding in found.findings)
        return _NOT_CONVERGED if wrong else _CONVERGED

    return run


def _track(arguments: argparse.Namespace) -> Callable[[], int]:
    places = arguments.places
    arguments.target = None if arguments.hf else places[0]
    checkpoints = places if arguments.hf else places[1:]
    _check_kind(arguments)
    if not checkpoints:
        msg = f"no CHECKPOINT to measure at; name files or directories after {places[0]}"
        raise TargetError(msg)
    stem = _trajectory(arguments)
    say = _silent if arguments.json else _say
    operator, title, _, optimizer = _asked_about(arguments, say)
    if not isinstance(operator, HessianOperator):
        msg = f"{title} is a {type(operator).__name__}, expected a HessianOperator of a model"
        raise TargetError(msg)
    record = ["gradient", "rotation"]
    record += ["trace"] if arguments.trace else []
    record += ["preconditioned"] if arguments.preconditioned else []
    if arguments.preconditioned and optimizer is None:
        msg = "--preconditioned needs the optimiser: return (model, loss, data, optimizer)"
        raise TargetError(msg)
    return functools.partial(
        _measure_along,
        operator,
        checkpoints,
        {
            "k": arguments.top,
            "which": arguments.which,
            "tol": arguments.tol,
            "record": record,
            "optimizer": None if arguments.lr else optimizer,
            "learning_rate": arguments.lr,
            "seed": arguments.seed,
        },
        stem=stem,
        title=title,
        say=say,
        as_json=arguments.json,
    )


def _trajectory(arguments: argparse.Namespace) -> Path:
    """Where the trajectory is kept, once it is clear that it may be."""
    out: Path = arguments.out
    stem = out / "trajectory"
    kept = [stem.with_suffix(kind) for kind in (".json", ".safetensors", ".part")]
    if arguments.resume and arguments.overwrite:
        msg = "--resume goes on with the trajectory in DIR, --overwrite replaces it; give one"
        raise ArgumentError(msg)
    present = [path.name for path in kept if path.exists()]
    if present and not (arguments.resume or arguments.overwrite):
        msg = (
            f"{str(out)!r} holds a trajectory ({present[0]}); go on with it by --resume, begin "
            "anew by --overwrite, or name another directory"
        )
        raise ArgumentError(msg)
    storage.check_directory(out, overwrite=True)
    if arguments.overwrite:
        for path in kept:
            path.unlink(missing_ok=True)
    return stem


def _measure_along(
    operator: HessianOperator,
    checkpoints: Sequence[str],
    options: dict[str, Any],
    *,
    stem: Path,
    title: str,
    say: Callable[[str], None],
    as_json: bool,
) -> int:
    """Track, draw, and say what came out."""
    n, count = operator.space.n, len(checkpoints)
    at = f"{count} checkpoint{'' if count == 1 else 's'}"
    say(f"Measuring the Hessian of {title} at {at}: n = {n:,}\n")
    stem.parent.mkdir(parents=True, exist_ok=True)
    with _stdout_to_stderr(as_json):
        trajectory = track(operator, checkpoints, checkpoint=stem, **options)
    say(f"{trajectory}\n")
    heading = f"Curvature of {title} over training"
    written = _draw_trajectory(trajectory, stem.parent, heading)
    if as_json:
        document = {
            "title": title,
            "rows": trajectory.rows(),
            "notes": list(trajectory.notes),
            "partial": trajectory.partial,
        }
        _say(json.dumps(storage.finite(document), indent=1, allow_nan=False))
    say(f"Wrote {', '.join(map(str, [stem.with_suffix('.json'), *written]))}")
    if trajectory.partial:
        how = "the same command with --resume goes on from there"
        print(f"spectra: what was computed is in {stem.parent}; {how}", file=sys.stderr)
        return _TERMINATED if trajectory.provenance["stopped_by"] == "SIGTERM" else _INTERRUPTED
    fine = all(_reached(m) for m in trajectory)
    return _CONVERGED if fine else _NOT_CONVERGED


def _read_trajectory(directory: Path) -> Trajectory:
    trajectory = load(directory / "trajectory")
    if not isinstance(trajectory, Trajectory):
        msg = f"{str(directory)!r} holds a {type(trajectory).__name__} under the name trajectory"
        raise StorageError(msg)
    return trajectory


def _report_trajectory(directory: Path, trajectory: Trajectory) -> int:
    for path in _draw_trajectory(trajectory, directory, None):
        _say(f"wrote {path}")
    return _CONVERGED


def _draw_trajectory(trajectory: Trajectory, directory: Path, title: str | None) -> list[Path]:
    # matplotlib takes a second to import.
    from spectra.report.pages import write_figures
    from spectra.report.report import draw_figures
    from spectra.report.trajectory_page import write_trajectory_page

    figures = draw_figures(trajectory)
    paths = write_figures(figures, directory, _FORMATS)
    page = directory / "trajectory.html"
    write_trajectory_page(trajectory, page, title=title, figures=figures)
    return [*paths.values(), page]


def _reached(m: Measurement) -> bool:
    """Everything that was measured there has its tolerance."""
    verdicts = (*m.converged, m.trace_converged, m.preconditioned_converged)
    return not m.error and False not in verdicts


def _compare(arguments: argparse.Namespace) -> Callable[[], int]:
    directories = (arguments.first, arguments.second)
    for directory in directories:
        if (directory / "trajectory.json").exists() and not (directory / "run.json").exists():
            msg = f"{str(directory)!r} holds a trajectory of `spectra track`, not a run to compare"
            raise ArgumentError(msg)
    runs = [storage.read_run(directory) for directory in directories]
    titles = [storage.read_summary(directory)["title"] for directory in directories]
    names = _told_apart(titles, directories)
    if arguments.out is not None:
        storage.check_directory(arguments.out, overwrite=True)

    def run() -> int:
        comparison = compare(runs[0], runs[1], names=names)
        if arguments.json:
            _say(json.dumps(storage.finite(_numbers(comparison)), indent=1, allow_nan=False))
        else:
            _say(str(comparison))
        if arguments.out is not None:
            from spectra.report.comparison_page import write_comparison_page
            from spectra.report.pages import write_figures
            from spectra.report.report import draw_figures

            figures = draw_figures(comparison)
            write_figures(figures, arguments.out, _FORMATS)
            page = arguments.out / "comparison.html"
            write_comparison_page(comparison, page, figures=figures)
            if not arguments.json:
                _say(f"\nWrote {page}")
        return _CONVERGED

    return run


def _told_apart(titles: Sequence[str], directories: Sequence[Path]) -> tuple[str, str]:
    """The titles if they differ, else the directories' names, else their paths."""
    for names in (titles, [path.resolve().name for path in directories]):
        if all(names) and names[0] != names[1]:
            return names[0], names[1]
    return str(directories[0]), str(directories[1])


def _numbers(comparison: Comparison) -> dict[str, Any]:
    return {
        "names": list(comparison.names),
        "differences": [
            {
                **dataclasses.asdict(row),
                "change": row.change,
                "error": row.error,
                "beyond_errors": row.beyond_errors,
            }
            for row in comparison.rows
        ],
        "overlap": comparison.overlap,
        "overlap_size": comparison.overlap_size,
        "distance": comparison.distance,
        "distance_floor": comparison.distance_floor,
        "settings": list(comparison.settings),
        "notes": list(comparison.notes),
    }


def _report(arguments: argparse.Namespace) -> Callable[[], int]:
    directory: Path = arguments.directory
    if (directory / "trajectory.json").exists() and not (directory / "run.json").exists():
        return functools.partial(_report_trajectory, directory, _read_trajectory(directory))
    title = storage.read_summary(directory)["title"]
    analysis = storage.read_run(directory)

    def run() -> int:
        for path in _draw(analysis, directory, title):
            _say(f"wrote {path}")
        return _CONVERGED

    return run


def _run(
    operator: SymmetricOperator,
    options: dict[str, Any],
    *,
    out: Path,
    title: str,
    source: dict[str, Any],
    overwrite: bool,
    say: Callable[[str], None],
    as_json: bool = False,
    checkpoint: Path | None = None,
    writes: bool = True,
) -> int:
    """Analyse, write the run directory, and say what came out."""
    space = operator.space
    dtype = str(space.dtype).removeprefix("torch.")
    say(f"Analysing the Hessian of {title}: n = {space.n:,}, {dtype}, {space.device}\n")
    if checkpoint is not None and checkpoint.exists():
        say(f"Going on from what {checkpoint} holds\n")
    with _stdout_to_stderr(as_json), _telling_how_to_resume(checkpoint):
        analysis = analyze(operator, checkpoint=checkpoint, **options)
    whole = operator.collected(analysis)
    if not writes or whole is None:
        return _CONVERGED if analysis.converged else _NOT_CONVERGED
    analysis = whole
    # Before anything is drawn: a figure that fails costs no result.
    summary = storage.write_run(analysis, out, title=title, source=source, overwrite=overwrite)
    say(f"{analysis}\n")
    if not summary["eigenpairs"]["vectors_saved"]:
        say(f"note: {summary['eigenpairs']['notes'][-1]}")
    if as_json:
        _say(json.dumps(summary, indent=1, allow_nan=False))
    _draw(analysis, out, title)
    if checkpoint is not None and not analysis.partial:
        checkpoint.unlink(missing_ok=True)
    say(f"Wrote {out / 'run.json'}, the result, figures, and {out / 'report.html'}")
    if analysis.partial:
        print(f"spectra: {_how_to_resume(checkpoint)}", file=sys.stderr)
        return _TERMINATED if analysis.provenance["stopped_by"] == "SIGTERM" else _INTERRUPTED
    if not analysis.converged:
        say(
            "Something did not reach its tolerance, see above: ask for less (--tol, --rtol, "
            "--top), allow more (--budget), or hold a larger basis (--ncv)"
        )
    return _CONVERGED if analysis.converged else _NOT_CONVERGED


@contextlib.contextmanager
def _telling_how_to_resume(checkpoint: Path | None) -> Iterator[None]:
    """Whatever ends the analysis, what it had computed is not lost: say so."""
    try:
        yield
    except BaseException as error:
        refused = isinstance(error, CheckpointError)
        if checkpoint is not None and checkpoint.exists() and not refused:
            print(f"spectra: {_how_to_resume(checkpoint)}", file=sys.stderr)
        raise


def _how_to_resume(checkpoint: Path | None) -> str:
    return f"what was computed is in {checkpoint}; the same command with --resume goes on from it"


def _draw(analysis: Analysis, directory: Path, title: str) -> list[Path]:
    # matplotlib takes a second to import.
    from spectra.report.pages import write_figures
    from spectra.report.report import draw_figures, write_report

    figures = draw_figures(analysis)
    paths = write_figures(figures, directory, _FORMATS)
    # A run that was overwritten may have had figures that this one has not.
    for name in _FIGURES.difference(figures):
        for kind in _FORMATS:
            (directory / f"{name}.{kind}").unlink(missing_ok=True)
    page = directory / "report.html"
    write_report(analysis, page, title=f"Hessian of {title}", figures=figures)
    return [*paths.values(), page]


def _check_kind(arguments: argparse.Namespace) -> None:
    """Either TARGET or --hf with --text, and the options that go with it."""
    if arguments.target and arguments.hf:
        msg = "give either TARGET or --hf MODEL_DIR, not both"
        raise TargetError(msg)
    if not (arguments.target or arguments.hf):
        msg = "nothing to analyse: give TARGET (file.py:function), or --hf MODEL_DIR --text FILE"
        if arguments.params and ":" in arguments.params[-1]:
            msg = f"--params took {arguments.params[-1]!r} for a glob; put TARGET before --params"
        raise TargetError(msg)
    if arguments.hf and not arguments.text:
        msg = "--hf needs a text or a table to compute the loss on: --text FILE"
        raise TargetError(msg)
    for name in () if arguments.hf else ("text", "task", *_MODEL_OPTIONS):
        if getattr(arguments, name) is not None:
            option = "--" + name.replace("_", "-")
            msg = f"{option} goes with --hf; a TARGET brings its own data and model"
            raise TargetError(msg)


def _asked_about(arguments: argparse.Namespace, say: Callable[[str], None]) -> _Asked:
    """What the arguments name."""
    with _stdout_to_stderr(arguments.json):
        return _from_text(arguments, say) if arguments.hf else _from_target(arguments)


def _from_text(arguments: argparse.Namespace, say: Callable[[str], None]) -> _Asked:
    from spectra.integrations import huggingface

    task = arguments.task or huggingface.task_of(arguments.hf)
    options = _task_options(arguments, task)
    say(f"Loading {arguments.hf} …")
    loaders: dict[str, Callable[..., Any]] = {
        "causal": huggingface.causal_lm,
        "masked": huggingface.masked_lm,
        "classify": huggingface.classifier,
    }
    model, loss, data = loaders[task](arguments.hf, arguments.text, **options)
    terms = int(sum(loss.weight(batch) for batch in data))
    source = {"hf": str(arguments.hf), "text": str(arguments.text), "task": task}
    if task == "classify":
        source["rows"] = terms
        say(f"{terms:,} rows of {arguments.text} are classified\n")
    else:
        source["sequences"] = sum(len(batch["input_ids"]) for batch in data)
        source["predicted_tokens"] = terms
        say(
            f"{terms:,} tokens of {arguments.text} are predicted, in {source['sequences']} "
            "sequences\n"
        )
    data, group = _share(data, arguments)
    operator = HessianOperator(
        model, loss, data, arguments.params, process_group=group, **_means(arguments)
    )
    return _Asked(operator, f"{arguments.hf.resolve().name} on {arguments.text.name}", source)


def _task_options(arguments: argparse.Namespace, task: str) -> dict[str, Any]:
    """The options given for the model, as keywords of the function that loads it."""
    chosen = {name: getattr(arguments, name) for name in _MODEL_OPTIONS}
    options = {name: value for name, value in chosen.items() if value is not None}
    if foreign := set(options).difference(_TASKS[task]):
        option = "--" + min(foreign).replace("_", "-")
        msg = f"{option} does not go with --task {task}; its options are --" + ", --".join(
            name.replace("_", "-") for name in _TASKS[task]
        )
        raise TargetError(msg)
    if "dtype" in options:
        options["dtype"] = getattr(torch, options["dtype"])
    return options


def _from_target(arguments: argparse.Namespace) -> _Asked:
    target, params = arguments.target, arguments.params
    made = _call_target(target)
    source = {"target": target}
    if isinstance(made, SymmetricOperator):
        if settled := [f"--{name.replace('_', '-')}" for name in _means(arguments)]:
            msg = (
                f"{target} returned an operator, which has {' and '.join(settled)} settled; "
                "return (model, loss, data), or set it there"
            )
            raise TargetError(msg)
        if params is None:
            return _Asked(made, target, source)
        if not isinstance(made, HessianOperator):
            msg = f"{target} returned a {type(made).__name__}, which has no parameters to select"
            raise TargetError(msg)
        return _Asked(made.block(params), target, source)
    optimizer = None
    if isinstance(made, tuple | list) and len(made) == 4 and isinstance(made[3], Optimizer):
        *made, optimizer = made
    if not (isinstance(made, tuple | list) and len(made) == 3):
        what = f"a {type(made).__name__}"
        if made is None:
            what = "None (is a return missing?)"
        elif isinstance(made, tuple | list):
            what += f" of {len(made)}"
        msg = f"{target} returned {what}, expected a HessianOperator or (model, loss, data)"
        raise TargetError(msg)
    model, loss, data = made
    data, group = _share(data, arguments)
    operator = HessianOperator(model, loss, data, params, process_group=group, **_means(arguments))
    return _Asked(operator, target, source, optimizer)


def _share(data: Any, arguments: argparse.Namespace) -> tuple[Any, bool]:
    """The batches of this process, and whether there are others."""
    size = processes()
    if size == 1:
        return data, False
    # Of a list the operator sees when a batch is changed.
    held = isinstance(data, list | tuple)
    return data[arguments.rank :: size] if held else EveryNth(data, arguments.rank, size), True


def _means(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options given for the operator, as keywords of `HessianOperator`."""
    chosen = {name: getattr(arguments, name) for name in _OPERATOR_OPTIONS}
    options = {name: value for name, value in chosen.items() if value is not None}
    if "compute_dtype" in options:
        options["compute_dtype"] = getattr(torch, options["compute_dtype"])
    return options


def _call_target(target: str) -> Any:
    """What the function that `target` names returns."""
    place, _, name = target.rpartition(":")
    if not place or not name.isidentifier():
        msg = f"{target!r} names no function; write file.py:function or package.module:function"
        raise TargetError(msg)
    module = _import(place)
    function = getattr(module, name, None)
    if function is None:
        own = [
            other
            for other, value in vars(module).items()
            if callable(value) and getattr(value, "__module__", None) == module.__name__
        ]
        near = difflib.get_close_matches(name, own, cutoff=0.5) or own[:5]
        hint = f"; it has {', '.join(near)}" if near else "; it defines no function at all"
        msg = f"{place!r} has no function {name!r}{hint}"
        raise TargetError(msg)
    if not callable(function):
        msg = f"{target} is a {type(function).__name__}, expected a function that returns it"
        raise TargetError(msg)
    if needed := _required_arguments(function):
        msg = (
            f"{target} needs arguments ({', '.join(needed)}), but is called without any; give them "
            "defaults, or name a function without arguments that calls it"
        )
        raise TargetError(msg)
    with _blaming(target, getattr(module, "__file__", None)):
        return function()


def _import(place: str) -> ModuleType:
    """The module of a file or dotted name, with its own directory importable."""
    path = Path(place)
    if path.suffix != ".py" and path.name == place and not path.exists():
        sys.path.insert(0, os.getcwd())
        with _blaming(f"importing {place!r}", None):
            try:
                return importlib.import_module(place)
            except ModuleNotFoundError as error:
                if not f"{place}.".startswith(f"{error.name}."):
                    raise
                msg = (
                    f"no module {error.name!r}, neither installed nor in {os.getcwd()!r}; for a "
                    f"file write its name, such as {place}.py:function"
                )
                raise TargetError(msg) from error
    if not path.is_file() or path.suffix != ".py":
        beside = [file.name for file in path.parent.glob("*.py")]
        near = difflib.get_close_matches(path.name, beside, cutoff=0.5)
        hint = f"; did you mean {str(path.parent / near[0])!r}?" if near else ""
        msg = f"no Python file {place!r}{hint}"
        raise TargetError(msg)
    sys.path.insert(0, str(path.resolve().parent))
    # The file's own name, so that worker processes find it too, unless another module has it.
    name = "spectra_target" if path.stem in sys.modules else path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with _blaming(f"importing {place!r}", str(path)):
        spec.loader.exec_module(module)
    return module


def _required_arguments(function: Callable[..., Any]) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        return []
    variadic = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    return [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]


@contextlib.contextmanager
def _blaming(what: str, file: str | None) -> Iterator[None]:
    """Turn whatever foreign code raises into a TargetError that says where it was raised."""
    try:
        yield
    except TargetError:
        raise
    # A script that ends with sys.exit() exits when it is imported.
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if frame.filename == file]
        frame = (own or frames)[-1]
        msg = (
            f"{what} raised {type(error).__name__} ({Path(frame.filename).name}, line "
            f"{frame.lineno}): {error}"
        )
        raise TargetError(msg) from error


def _complete(arguments: argparse.Namespace) -> Callable[[], int]:
    try:
        import shtab
    except ImportError as error:
        msg = "completion needs shtab: pip install 'hessian-spectra[completion]'"
        raise ArgumentError(msg) from error

    def run() -> int:
        parser = _parser()
        for command in _subcommands(parser).values():
            for action in command._actions:
                if action.metavar in _PATHS:
                    action.complete = shtab.FILE  # type: ignore[attr-defined]
        print(shtab.complete(parser, arguments.shell))
        return _CONVERGED

    return run


def _subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (action,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    commands: dict[str, argparse.ArgumentParser] = action.choices
    return commands


def _say(text: str) -> None:
    # Names of files, models and parameters are anybody's: a terminal must not obey them.
    text = "\n".join(map(printable, text.split("\n")))
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # The reader has left (`| head`). The run goes on: its results go to the directory.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _silent(text: str) -> None:
    """Nothing: in place of `_say`."""


def _stdout_to_stderr(wanted: bool) -> contextlib.AbstractContextManager[Any]:
    """Foreign code may print; with --json stdout holds one document and nothing else."""
    return contextlib.redirect_stdout(sys.stderr) if wanted else contextlib.nullcontext()


def _fail(error: Exception, status: int, advice: str = "") -> int:
    if os.environ.get("SPECTRA_DEBUG"):
        traceback.print_exception(error)
    # Messages of other libraries may have many lines.
    message = printable(" ".join(str(error).split())) or type(error).__name__
    print(f"spectra: error: {message}{advice}", file=sys.stderr)
    return status


def _holds_demo(directory: Path) -> bool:
    try:
        return "demo" in storage.read_summary(directory)["source"]
    except SpectraError:
        return False


def _parser() -> argparse.ArgumentParser:
    parser = _command_line(
        argparse.ArgumentParser,
        prog="spectra",
        description="Eigenvalues, trace, norms and spectral density of the Hessian of a PyTorch\n"
        "model, from exact Hessian-vector products, each with its error.",
    )
    parser.add_argument(
        "--version",
        action=_PrintVersions,
        nargs=0,
        help="print the versions that a report of a bug should name",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add = functools.partial(_command_line, commands.add_parser)

    demo = add("demo", help="train a small network on digits and analyse it; takes a minute")
    demo.add_argument(
        "--out", type=Path, default=Path("demo-run"), metavar="DIR", help="default: demo-run"
    )
    demo.add_argument("--overwrite", action="store_true", help="replace a run that is not a demo's")
    demo.set_defaults(prepare=_demo)

    analysis = add("analyze", help="analyse a model of yours", description=_TARGET)
    _add_analyze_options(analysis)
    analysis.set_defaults(prepare=_analyze)

    preflight = add(
        "check",
        help="whether the products of a model of yours are right, and what an analysis will take",
        description=_TARGET,
    )
    _add_check_options(preflight)
    preflight.set_defaults(prepare=_check)

    tracked = add(
        "track",
        help="the curvature over a training, at the weights that it saved",
        description=_TRACK,
    )
    _add_track_options(tracked)
    tracked.set_defaults(prepare=_track)

    compared = add(
        "compare",
        help="two saved runs side by side: what differs by more than its error",
        description=_COMPARE,
    )
    compared.add_argument("first", type=Path, metavar="DIR", help="what --out was")
    compared.add_argument("second", type=Path, metavar="DIR", help="of another run")
    compared.add_argument("--out", type=Path, metavar="DIR", help="write comparison.html there")
    compared.add_argument("--json", action="store_true", help="print the numbers as JSON instead")
    compared.set_defaults(prepare=_compare)

    report = add("report", help="make the figures and page of a saved run again")
    report.add_argument("directory", type=Path, metavar="DIR", help="what --out was")
    report.set_defaults(prepare=_report)

    completion = add(
        "completion",
        help="print what a shell needs to complete these commands and options",
        description=_COMPLETION,
    )
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    completion.set_defaults(prepare=_complete)
    return parser


def _command_line(make: Callable[..., argparse.ArgumentParser], *args: Any, **options: Any) -> Any:
    # Abbreviations would change their meaning when options are added.
    return make(
        *args,
        epilog=_EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **options,
    )


def _add_analyze_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("target", nargs="?", metavar="TARGET", help="file.py:function or package.module:function")
    add("--out", type=Path, required=True, metavar="DIR", help="directory for the results")
    add("--overwrite", action="store_true", help="replace a run that is in DIR already")
    add(
        "--resume",
        action="store_true",
        help="go on with the unfinished run in DIR, if there is one: the same command once more",
    )
    add("--json", action="store_true", help="print run.json, and nothing else, on stdout")
    _add_questions(parser.add_argument_group("what is computed"))
    _add_means(parser.add_argument_group("how"))
    _add_model(parser.add_argument_group("a model of Hugging Face's instead of TARGET"))


def _add_track_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "places",
        nargs="+",
        metavar="TARGET CHECKPOINT",
        help="file.py:function or package.module:function, then the saved weights",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="directory for the results")
    add("--overwrite", action="store_true", help="replace a trajectory that is in DIR already")
    add("--resume", action="store_true", help="go on with the trajectory in DIR, if there is one")
    add("--json", action="store_true", help="print the rows, and nothing else, on stdout")
    defaults = inspect.signature(track).parameters
    group = parser.add_argument_group("what is computed")
    add = group.add_argument
    add("--top", type=_positive, metavar="K", default=1, help="number of eigenvalues (default: 1)")
    add(
        "--which",
        choices=("LM", "LA", "SA", "BE"),
        default=defaults["which"].default,
        help="largest in magnitude, largest, smallest, both ends (default: %(default)s)",
    )
    add("--trace", action="store_true", help="the trace, to 10 %%, in at most 100 products")
    add(
        "--preconditioned",
        action="store_true",
        help="the sharpness in the metric of the optimiser that TARGET returns",
    )
    add(
        "--lr",
        type=_tolerance,
        metavar="RATE",
        help="of plain gradient descent: draws the threshold 2 / RATE; by default the threshold "
        "is that of the optimiser's saved options",
    )
    for name, kind, text in (
        ("tol", _tolerance, "residual of an eigenpair, relative to its eigenvalue"),
        ("seed", _natural, "of all random vectors"),
    ):
        add(
            f"--{name}",
            type=kind,
            default=defaults[name].default,
            help=f"{text} (default: %(default)s)",
        )
    _add_operator(parser.add_argument_group("how"))
    _add_model(parser.add_argument_group("a model of Hugging Face's instead of TARGET"))


def _add_check_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("target", nargs="?", metavar="TARGET", help="file.py:function or package.module:function")
    add("--json", action="store_true", help="print the numbers, and nothing else, on stdout")
    add("--seed", type=_natural, default=0, help="of two random vectors (default: 0)")
    _add_operator(parser.add_argument_group("how"))
    _add_model(parser.add_argument_group("a model of Hugging Face's instead of TARGET"))


def _add_questions(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    defaults = inspect.signature(analyze).parameters
    add("--top", type=_positive, metavar="K", help="number of eigenvalues (default: 10)")
    add(
        "--which",
        choices=("LM", "LA", "SA", "BE"),
        default=defaults["which"].default,
        help="largest in magnitude, largest, smallest, both ends (default: %(default)s)",
    )
    add(
        "--budget",
        type=_budget,
        metavar="B",
        help="most matvecs (100), or a time (90s, 10min, 2h), of the whole run",
    )
    add(
        "--preflight",
        choices=("strict", "warn", "off"),
        default=defaults["preflight"].default,
        help="check the products first: always, and stop at a warning; before long runs; never "
        "(default: %(default)s)",
    )
    add("--trace", action="store_true", help="trace, by layer too, and Frobenius norm")
    add("--density", action="store_true", help="spectral density; without either option, both")
    add(
        "--landscape",
        action="store_true",
        help="besides, the loss along up to three eigenvectors: the time of 10 to 20 products",
    )
    for name, kind, text in (
        ("tol", _tolerance, "residual of an eigenpair, relative to its eigenvalue"),
        ("rtol", _tolerance, "half-width of the 95 %% interval of the trace, relative"),
        ("steps", _positive, "Lanczos steps per probe of the density: its resolution"),
        ("probes", _positive, "probes of the density: their spread is its error"),
        ("seed", _natural, "of all random vectors"),
    ):
        add(
            f"--{name}",
            type=kind,
            default=defaults[name].default,
            help=f"{text} (default: %(default)s)",
        )


def _add_means(group: argparse._ArgumentGroup) -> None:
    _add_operator(group)
    add = group.add_argument
    add("--ncv", type=_positive, metavar="N", help="most vectors to hold (default: by free memory)")
    add(
        "--basis",
        choices=("auto", "device", "host", "disk"),
        default="auto",
        help="where they are held: on the device, in the host's memory, or in a temporary file on "
        "disk (default: auto, where there is room)",
    )


def _add_operator(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--params",
        nargs="+",
        metavar="GLOB",
        help="only the parameters whose names match, such as 'layers.3.*'; the others are fixed",
    )
    add(
        "--graph",
        choices=("auto", "retained", "fresh"),
        help="retained: a third faster, memory of all batches; fresh: memory of one (default: "
        "auto, as many batches as half of the free memory holds)",
    )
    add(
        "--memory-budget",
        type=_bytes,
        metavar="SIZE",
        help="for graphs and the work on a batch, such as 4GB (default: half of the free memory)",
    )
    add(
        "--recompute",
        metavar="GLOB",
        help="modules to compute again instead of keeping them, such as 'layers.*'; or none "
        "(default: auto, the repeated blocks where memory is short)",
    )
    add(
        "--compute-dtype",
        choices=("float32", "float64"),
        help="in which a model stored in another dtype computes, block by block",
    )
    add("--microbatch", type=_positive, metavar="N", help="samples at a time, to bound memory")


def _add_model(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--hf", type=Path, metavar="MODEL_DIR", help="local directory, or GGUF file")
    add("--text", type=Path, metavar="FILE", help="plain text, or a table: .csv, .jsonl")
    add("--task", choices=tuple(_TASKS), help="default: what the model was saved for")
    add("--tokens-per-sequence", type=_positive, metavar="N", help="default: 128")
    add("--sequences-per-batch", type=_positive, metavar="N", help="default: 4")
    add("--rows-per-batch", type=_positive, metavar="N", help="of a table, default: 8")
    add("--max-tokens", type=_positive, metavar="N", help="of the text, default: 2048")
    add("--dtype", choices=("float32", "float64", "bfloat16"), help="default: float32")
    add("--device", help="such as cuda, default: cpu")


def _positive(text: str) -> int:
    return _natural(text, least=1)


def _natural(text: str, least: int = 0) -> int:
    with contextlib.suppress(ValueError):
        if (number := int(text)) >= least:
            return number
    msg = f"{text!r} is not an integer of at least {least}"
    raise argparse.ArgumentTypeError(msg)


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?", text.strip().lower())
    if found is None:
        msg = f"{text!r} is no size in bytes, such as 500MB or 4GB"
        raise argparse.ArgumentTypeError(msg)
    return int(float(found[1]) * 1024 ** " kmgt".index(found[2] or " "))


def _budget(text: str) -> str:
    try:
        parse_budget(text)
    except ArgumentError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _tolerance(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (number := float(text)) < math.inf:
            return number
    msg = f"{text!r} is not a positive number"
    raise argparse.ArgumentTypeError(msg)


class _PrintVersions(argparse.Action):
    """`--version`: what a report of a bug should name, looked up only when asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(_versions())
        parser.exit()


def _versions() -> str:
    found = versions()
    for name in _BESIDE:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    cuda = torch.cuda.is_available()
    found["accelerator"] = torch.cuda.get_device_name() if cuda else "none"
    found["threads"] = str(torch.get_num_threads())
    found["installed in"] = str(Path(__file__).parent)
    return "\n".join(f"{name} {number}" for name, number in found.items())
