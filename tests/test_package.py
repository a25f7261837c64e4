"""What is built, what is installed, and what happens where something else is, or is missing."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest

import spectra
from spectra import cli

ROOT = Path(spectra.__file__).parents[1]
# What `import spectra` has no use for, and what it would take long to load.
LEFT_OUT = [
    *("matplotlib", "jinja2", "pandas", "IPython", "shtab", "scipy.stats", "scipy.optimize"),
    *("transformers", "tokenizers", "gguf", "peft", "accelerate", "sklearn"),
    *("lightning", "pytorch_lightning", "tensorboard", "torch.utils.tensorboard"),
    *("torch._dynamo", "torch._inductor"),
]


def python(code, *arguments, cwd):
    """What a new process says."""
    path = [str(ROOT), *filter(None, sys.path)]
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)},
    )


def test_importing_spectra_is_light_and_what_lacks_an_optional_package_names_the_extra(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "text.txt").write_text("a text")
    said = python(
        f"""
        import sys

        class Without:
            def __init__(self, finder):
                self.finder = finder

            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] not in {[name for name in LEFT_OUT if "." not in name]}:
                    return self.finder.find_spec(name, path, target)

        import spectra
        from spectra.cli import main
        print([name for name in {LEFT_OUT} if name in sys.modules])
        sys.meta_path[:] = map(Without, sys.meta_path)
        from spectra.integrations.huggingface.callback import CurvatureCallback as OfTrainer
        from spectra.integrations.lightning import CurvatureCallback as OfLightning
        for make in (lambda: OfTrainer(None, None), lambda: OfLightning(None)):
            try:
                make()
            except spectra.SpectraError as error:
                print(error)
        sys.stderr = sys.stdout
        print(main(["demo"]))
        print(main("analyze --hf . --text text.txt --out run".split()))
        print(main(["completion", "bash"]))
        """,
        cwd=tmp_path,
    )
    assert said.stderr == ""
    assert said.stdout.splitlines() == [
        "[]",
        "the callback of a Trainer needs transformers: pip install 'hessian-spectra[hf]'",
        "Lightning's callback needs lightning: pip install 'hessian-spectra[lightning]'",
        "Training a small tanh network on scikit-learn's 1,797 images of digits …",
        "spectra: error: the digits need scikit-learn: pip install 'hessian-spectra[demo]'",
        "2",
        "Loading . …",
        "spectra: error: a Hugging Face model needs transformers and tokenizers: pip install "
        "'hessian-spectra[hf]'",
        "2",
        "spectra: error: completion needs shtab: pip install 'hessian-spectra[completion]'",
        "2",
    ]


# --- a colour library of the same name ------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """What the command says with the files of both packages in one folder, in three states."""
    site = tmp_path_factory.mktemp("site")
    package = site / "spectra"
    shutil.copytree(ROOT / "spectra", package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "core.py").write_text("class Color:\n    pass\n", encoding="utf-8")
    (package / "grapefruit.py").write_text("", encoding="utf-8")
    # PyTorch takes seconds to import, so that one process goes through all of them.
    said = python(
        """
        import contextlib, io, runpy, sys, warnings
        from pathlib import Path
        import torch

        site = sys.argv[1]
        place = Path(site, "spectra", "__init__.py")
        sys.path[:] = [site, *(p for p in sys.path if not Path(p, "spectra").exists())]

        def started():
            for name in [name for name in sys.modules if name.split(".")[0] == "spectra"]:
                del sys.modules[name]
            said = io.StringIO()
            sys.argv = ["spectra", "--version"]
            status = 0
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
                try:
                    runpy.run_module("spectra", run_name="__main__")
                except SystemExit as left:
                    status = left.code
            print(status, said.getvalue().splitlines()[0])

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            started()
        print(*[warning.message for warning in caught])
        place.write_text("from spectra.core import Color")
        started()
        place.unlink()
        started()
        """,
        site,
        cwd=site,
    )
    assert said.stderr == ""
    return package / "__init__.py", said.stdout.splitlines()


def test_files_of_the_colour_library_beside_ours_are_a_warning(mixed):
    assert mixed[1][0] == f"0 spectra {spectra.__version__}"
    assert mixed[1][1].startswith("the colour library `spectra` is installed in the same folder")
    assert mixed[1][1].endswith("or give each an environment of its own")


def test_the_command_says_that_the_colour_library_took_its_place(mixed):
    place, said = mixed
    assert said[2].startswith(
        f"2 spectra: error: `import spectra` gives {place}, which is not hessian-spectra"
    )
    assert "run `pip uninstall spectra`, then install hessian-spectra again" in said[2]


def test_the_command_says_that_uninstalling_the_colour_library_took_a_file_along(mixed):
    place, said = mixed
    assert said[3].startswith(f"2 spectra: error: {place} is missing, as after")


# --- what is built --------------------------------------------------------------------------------


def build(source, to):
    made = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(to)],
        cwd=source,
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    (wheel,), (sdist,) = to.glob("*.whl"), to.glob("*.tar.gz")
    return wheel, sdist


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    pytest.importorskip("hatchling")
    return build(ROOT, tmp_path_factory.mktemp("dist"))


def test_a_wheel_holds_the_package_and_nothing_else(built):
    name = f"hessian_spectra-{spectra.__version__}"
    assert [path.name for path in built] == [f"{name}-py3-none-any.whl", f"{name}.tar.gz"]
    files = contents(built[0])
    own = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "spectra").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    info = f"{name}.dist-info"
    about = ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")
    assert set(files) == own | {f"{info}/{file}" for file in about}
    assert {"spectra/py.typed", "spectra/report/templates/page.html"} <= own
    assert b"spectra = spectra.cli:main" in files[f"{info}/entry_points.txt"]
    metadata = files[f"{info}/METADATA"].decode()
    core = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", metadata, re.MULTILINE)
    assert sorted(core) == [
        *("jinja2", "matplotlib", "numpy", "safetensors", "scipy", "torch", "tqdm"),
    ]


def test_an_sdist_builds_the_same_wheel(built, tmp_path):
    with tarfile.open(built[1]) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    for file in ("LICENSE", "CHANGELOG.md", "tests/conftest.py", "docs/README.md"):
        assert (source / file).exists()
    again = contents(build(source, tmp_path / "dist")[0])
    assert again == contents(built[0])


@pytest.mark.slow
def test_a_wheel_installs_into_an_empty_environment_and_analyses(built, tmp_path):
    """Core dependencies come from this environment: that they suffice, the blocked import shows."""
    place = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    inside = next(place.glob("lib*/python*/site-packages"), place / "Lib" / "site-packages")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--prefix", str(place), "--ignore-installed", str(built[0])], check=True)
    (inside / "core.pth").write_text(
        "\n".join(path for path in sys.path if "site-packages" in path), encoding="utf-8"
    )
    (tmp_path / "made.py").write_text(
        textwrap.dedent(
            """
            import torch, spectra

            def target():
                return spectra.as_operator(torch.diag(torch.arange(1.0, 9.0)))
            """
        ),
        encoding="utf-8",
    )
    (command,) = [*place.glob("bin/spectra"), *place.glob("Scripts/spectra.exe")]
    interpreter = next(path for path in command.parent.iterdir() if path.stem == "python")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    said = subprocess.run(
        [interpreter, command, "analyze", "made.py:target", "--out", "run", "--top", "2"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert said.returncode == 0, said.stderr
    assert (tmp_path / "run" / "report.html").exists()
    version = subprocess.run(
        [interpreter, command, "--version"],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert f"installed in {inside / 'spectra'}" in version.stdout


# --- completion -----------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_commands_options_choices_and_files(tmp_path, capsys):
    pytest.importorskip("shtab")
    assert cli.main(["completion", "bash"]) == 0
    script = tmp_path / "spectra.bash"
    script.write_text(capsys.readouterr().out, encoding="utf-8")
    (tmp_path / "problem.py").write_text("")

    def completions(*words):
        quoted = " ".join(f"'{word}'" for word in words)
        lines = f"""
        source {script}
        COMP_WORDS=({quoted}) COMP_CWORD={len(words) - 1}
        _shtab_spectra
        printf '%s\\n' "${{COMPREPLY[@]}}"
        """
        said = subprocess.run(
            ["bash", "-c", lines], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return said.stdout.split()

    assert completions("spectra", "an") == ["analyze"]
    assert completions("spectra", "analyze", "--den") == ["--density"]
    assert completions("spectra", "analyze", "--which", "S") == ["SA"]
    assert completions("spectra", "analyze", "prob") == ["problem.py"]
    assert completions("spectra", "completion", "z") == ["zsh"]


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_get_theirs(shell, capsys):
    pytest.importorskip("shtab")
    assert cli.main(["completion", shell]) == 0
    assert "analyze" in capsys.readouterr().out
