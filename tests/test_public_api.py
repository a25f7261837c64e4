"""What `import spectra` promises: its names, that it changes nothing, and examples that run."""

import ast
import dataclasses
import doctest
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import spectra
from spectra.results import Result

ROOT = Path(spectra.__file__).parent

# Promised for good; more may be added.
PROMISED = [
    "Analysis",
    "CurvatureMonitor",
    "Eigenpairs",
    "Estimate",
    "GaussNewtonOperator",
    "HessianOperator",
    "Measurement",
    "ParameterSpace",
    "SpectraError",
    "SpectralDensity",
    "Trajectory",
    "analyze",
    "as_operator",
    "block_coupling",
    "block_spectra",
    "compare",
    "deflated",
    "eigsh",
    "errors",
    "load",
    "losses",
    "norm",
    "preconditioned",
    "preconditioner",
    "projected",
    "shifted",
    "spectral_density",
    "stability_threshold",
    "trace",
    "track",
]
FUNCTIONS = [
    spectra.eigsh,
    spectra.trace,
    spectra.norm,
    spectra.spectral_density,
    spectra.analyze,
    spectra.spectral_sum,
    spectra.logdet,
    spectra.effective_dimension,
    spectra.participation_ratio,
    spectra.effective_rank,
    spectra.block_spectra,
    spectra.block_coupling,
    spectra.track,
]


def modules():
    """Names of all modules of the package, without importing any."""
    found = [info.name for info in pkgutil.walk_packages([str(ROOT)], "spectra.")]
    return ["spectra", *(name for name in found if name != "spectra.__main__")]


def source_of(name):
    path = ROOT.joinpath(*name.split(".")[1:])
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text("utf-8")


def test_the_promised_names_are_there():
    assert set(PROMISED) <= set(spectra.__all__)


def test_all_names_are_importable_listed_once_and_in_order():
    assert all(hasattr(spectra, name) for name in spectra.__all__)
    # Capitals first, as linters sort them.
    assert spectra.__all__ == sorted(set(spectra.__all__))


def test_nothing_public_is_left_out_of_the_list():
    public = {
        name
        for name, value in vars(spectra).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public <= set(spectra.__all__)


def test_the_version_is_that_of_the_project_file():
    project = ROOT.parent / "pyproject.toml"
    if not project.exists():
        pytest.skip("installed without the project's files")
    declared = re.search(r'^version = "(.*)"', project.read_text("utf-8"), re.MULTILINE)
    assert declared is None or spectra.__version__ == declared[1]


@pytest.mark.parametrize("name", modules())
def test_every_module_says_first_what_it_answers(name):
    docstring = ast.get_docstring(ast.parse(source_of(name)))
    assert docstring, name
    # A question, a title before more, or a statement.
    assert docstring.split("\n\n")[0].rstrip()[-1] in ".?:", name


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_the_operator_comes_first_and_options_have_names(function):
    parameters = list(inspect.signature(function).parameters.values())
    assert parameters[0].name == "H"
    positional = [p.name for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    known = ("k", "ord", "f", "shift", "c", "by", "weights")
    assert positional in (["H"], *(["H", name] for name in known))
    assert inspect.signature(function).parameters["seed"].default == 0
    assert inspect.signature(function).parameters["progress"].default is None


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_every_option_is_described(function):
    documented = inspect.getdoc(function).split("Returns\n")[0]
    for name in inspect.signature(function).parameters:
        assert re.search(rf"^(.*, )?{name}\b", documented, re.MULTILINE), name


@pytest.mark.parametrize(
    "name", sorted(n for n, kind in Result._kinds.items() if kind.__module__.startswith("spectra."))
)
def test_results_are_frozen(name):
    kind = Result._kinds[name]
    assert dataclasses.is_dataclass(kind)
    assert kind.__dataclass_params__.frozen
    # Equality of arrays is no bool.
    assert not kind.__dataclass_params__.eq


def test_every_error_is_of_the_family():
    for name in spectra.errors.__all__:
        assert issubclass(getattr(spectra.errors, name), spectra.SpectraError)
    assert issubclass(spectra.errors.ArgumentError, ValueError)
    assert issubclass(spectra.errors.ArgumentTypeError, TypeError)


def run_python(code):
    path = [str(ROOT.parent), *filter(None, sys.path)]
    return subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
    ).stdout


def test_importing_spectra_leaves_the_process_as_it_was():
    code = """
import random, numpy, torch
before = torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads()
numbers = numpy.random.get_state()[1].copy()
import spectra
after = torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads()
assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
assert (numbers == numpy.random.get_state()[1]).all()
assert torch.is_grad_enabled()
print("unchanged")
"""
    assert run_python(code).strip() == "unchanged"


@pytest.mark.parametrize("name", [name for name in modules() if ">>>" in source_of(name)])
def test_the_examples_in_docstrings_run(name):
    module = importlib.import_module(name)
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    outcome = doctest.testmod(module, optionflags=flags, raise_on_error=False)
    assert outcome.attempted > 0
    assert outcome.failed == 0
