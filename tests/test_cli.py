"""The command as people run it: in a process of its own, or through main() where that is enough."""

import json
import os
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import spectra
from spectra import cli
from spectra.analysis.storage import read_run
from tests.cases.checkpoints import SIZES, curved, save, word_tokenizer

ROOT = Path(spectra.__file__).parent.parent
TARGETS = '''
import signal, time
import torch, spectra

print("imported")

def problem(dtype=torch.float64):
    """39 parameters, two batches of unequal size."""
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)
    ).to(dtype)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=dtype)
    inputs = torch.randn(50, 5, generator=generator, dtype=dtype)
    labels = torch.randint(3, (50,), generator=generator)
    loss = spectra.losses.supervised(torch.nn.CrossEntropyLoss())
    print("called")
    return model, loss, [(inputs[:30], labels[:30]), (inputs[30:], labels[30:])]

def operator():
    return spectra.HessianOperator(*problem())

def wide():
    return spectra.HessianOperator.from_function(lambda x: (x**4).sum(), torch.rand(300))

def matrix():
    return spectra.as_operator(torch.diag(torch.arange(1.0, 5.0)))

def slow():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    model, loss, data = problem()
    def waiting(model, batch):
        print("waiting", flush=True)
        time.sleep(60)
        return loss(model, batch)
    return model, waiting, data

def infinite():
    model, loss, data = problem()
    return model, lambda model, batch: loss(model, batch) / 0.0, data

def generator():
    model, loss, data = problem()
    return model, loss, iter(data)

def training():
    model, loss, data = problem()
    return torch.nn.Sequential(model, torch.nn.Dropout(0.5)), loss, data

def detached():
    model, loss, data = problem()
    return model, lambda m, batch: loss(lambda x: m[1:](m[0](x).detach()), batch), data

def raises():
    raise KeyError("weights\\nof two lines")

def needs(model, data, seed=0):
    return None

def nothing():
    problem()

def pair():
    return problem()[:2]

value = 3.5
'''


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A new user's directory, with targets in it; the present one."""
    (tmp_path / "targets.py").write_text(TARGETS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    return tmp_path


@pytest.fixture
def undrawn(monkeypatch):
    """Figures left out, which take longer than these small analyses."""
    monkeypatch.setattr(cli, "_draw", lambda *_: [])


def environment(**more):
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(filter(None, paths))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **more}


def spectra_command(*arguments, cwd, **more):
    return subprocess.run(
        [sys.executable, "-m", "spectra", *arguments],
        cwd=cwd,
        env=environment(**more),
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=240,
        check=False,
    )


def dense_eigenvalues(place, params=None):
    """Of the same target, by way of the dense matrix."""
    names = {}
    exec(TARGETS, names)
    H = spectra.HessianOperator(*names["problem"](), params)
    return np.linalg.eigvalsh(H.to_dense().numpy())


def largest(values, count):
    return np.sort(values[np.argsort(-np.abs(values))[:count]])[::-1]


def summary_of(directory):
    return json.loads((directory / "run.json").read_text(encoding="utf-8"))


# --- the demo -------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """What the demo printed, and the directory that it wrote."""
    pytest.importorskip("sklearn")
    place = tmp_path_factory.mktemp("demo with a space")
    return spectra_command("demo", cwd=place), place / "demo-run"


def test_the_demo_succeeds_says_what_it_does_and_is_silent_on_stderr(demo):
    done, directory = demo
    assert (done.returncode, done.stderr) == (0, "")
    for text in ("Training", "Analysing", "n = 2,410", "10 converged", "trace = ", "report.html"):
        assert text in done.stdout
    assert summary_of(directory)["converged"] is True


def test_the_demo_writes_figures_and_a_report_that_holds_them(demo):
    _, directory = demo
    names = {"eigenvalues", "density", "trace", "trace_by_layer", "eigenvectors_by_layer"}
    names |= {"eigenvalues_symlog", "density_symlog", "landscape"}
    assert names <= {path.stem for path in directory.glob("*.svg")}
    assert names <= {path.stem for path in directory.glob("*.png")}
    page = (directory / "report.html").read_text(encoding="utf-8")
    assert page.count("<img") + page.count("<svg") >= 4
    assert "digits" in page


def test_the_demo_tells_how_the_trace_is_shared_among_its_layers(demo):
    done, directory = demo
    assert re.search(r"^traces of 2 layers \(\d+ probes, ± for 95%", done.stdout, re.MULTILINE)
    summary = summary_of(directory)
    layers = summary["layer_traces"]
    assert [block["name"] for block in layers["blocks"]] == ["0", "2"]
    assert sum(block["value"] for block in layers["blocks"]) == pytest.approx(
        summary["trace"]["value"], rel=0.02
    )
    assert "Trace by layer" in (directory / "report.html").read_text(encoding="utf-8")


def test_the_demos_eigenpairs_are_those_of_the_network(demo):
    from spectra.integrations.digits import trained_digits

    H = spectra.HessianOperator(*trained_digits())
    pairs = read_run(demo[1]).eigenpairs
    vectors = pairs.vectors.numpy()
    # Training is repeated here, and rounds otherwise with another number of threads.
    np.testing.assert_allclose(H @ vectors, vectors * pairs.values, atol=2e-3)


def test_the_demo_replaces_its_own_run_but_no_other(place, undrawn, monkeypatch, capsys):
    digits = pytest.importorskip("spectra.integrations.digits")
    pytest.importorskip("sklearn")
    small = digits.trained_digits(hidden=2, steps=1)
    monkeypatch.setattr(digits, "trained_digits", lambda: small)
    assert cli.main(["demo", "--out", "d"]) in {0, 1}
    first = summary_of(place / "d")["created"]
    assert cli.main(["demo", "--out", "d"]) in {0, 1}
    assert summary_of(place / "d")["created"] >= first
    assert cli.main(["analyze", "targets.py:problem", "--out", "own", "--top", "1"]) == 0
    assert cli.main(["demo", "--out", "own"]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert summary_of(place / "own")["title"] == "targets.py:problem"


# --- analyze, as a command ------------------------------------------------------------------------


def test_analyze_prints_the_eigenvalues_of_the_dense_hessian(place):
    done = spectra_command("analyze", "targets.py:problem", "--out", "run", cwd=place)
    assert (done.returncode, done.stderr) == (0, "")
    printed = re.findall(r"^ *\d+ +(-?[\d.e+-]+) +[\d.e+-]+$", done.stdout, re.MULTILINE)
    exact = dense_eigenvalues(place)
    np.testing.assert_allclose([float(x) for x in printed], largest(exact, 10), rtol=1e-4)
    result = read_run(place / "run")
    assert result.trace.value == pytest.approx(exact.sum(), rel=0.02)
    assert result.frobenius_norm.value == pytest.approx(np.linalg.norm(exact), rel=0.02)
    assert {"run.json", "analysis.json", "report.html", "density.svg"} <= set(os.listdir("run"))


def test_json_is_one_document_with_the_numbers_of_the_result(place):
    done = spectra_command(
        "analyze", "targets:operator", "--out", "run", "--json", "--top", "3", cwd=place
    )
    assert done.returncode == 0
    # What the target prints must not come between.
    assert done.stderr.split() == ["imported", "called"]
    document, result = json.loads(done.stdout), read_run(place / "run")
    assert document == summary_of(place / "run")
    assert document["eigenpairs"]["values"] == list(result.eigenpairs.values)
    assert document["eigenpairs"]["residuals"] == list(result.eigenpairs.residuals)
    assert document["trace"]["value"] == result.trace.value
    assert document["trace"]["interval"] == list(result.trace.interval())
    assert document["matvecs"]["total"] == result.total_matvecs


def test_what_did_not_converge_is_written_marked_and_exits_with_1(place):
    # No 200 probes know a trace to nine digits.
    options = ["--rtol", "1e-9", "--top", "2", "--trace"]
    done = spectra_command("analyze", "targets.py:wide", "--out", "run", *options, cwd=place)
    assert (done.returncode, done.stderr) == (1, "")
    assert "tolerance not reached" in done.stdout
    assert "Something did not reach its tolerance" in done.stdout
    summary = summary_of(place / "run")
    assert summary["converged"] is summary["trace"]["converged"] is False


def test_a_failed_analysis_exits_with_3_in_one_line(place):
    done = spectra_command("analyze", "targets.py:infinite", "--out", "run", cwd=place)
    assert done.returncode == 3
    assert re.fullmatch(r"spectra: error: the loss of batch 0 is inf\..*\n", done.stderr)
    assert not (place / "run" / "run.json").exists()


def test_a_wrong_target_exits_with_2_in_one_line(place):
    done = spectra_command("analyze", "targets.py:probem", "--out", "run", cwd=place)
    assert done.returncode == 2
    assert re.fullmatch(r"spectra: error: .* no function 'probem'; .*problem.*\n", done.stderr)


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_an_interrupt_exits_with_130_and_leaves_no_run(place):
    process = subprocess.Popen(
        [sys.executable, "-m", "spectra", "analyze", "targets.py:slow", "--out", "run"],
        cwd=place,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if "waiting" in line:
            break
    process.send_signal(signal.SIGINT)
    # A product that takes long is waited for, unless somebody insists.
    said = process.stderr.readline()
    assert said == (
        "spectra: SIGINT: stopping after the product under way; once more to stop at once\n"
    )
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "spectra: interrupted\n")
    # Nothing had been computed.
    assert not (place / "run").exists()


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
def test_a_reader_that_leaves_does_not_end_the_run(place):
    (place / "quiet.py").write_text(
        "import torch, spectra\n"
        "def target():\n"
        "    f = lambda x: (x**4).sum()\n"
        "    return spectra.HessianOperator.from_function(f, torch.ones(3))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "spectra", "analyze", "quiet.py:target", "--out", "run"],
        cwd=place,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert (process.wait(timeout=60), errors) == (0, "")
    assert summary_of(place / "run")["converged"] is True


def test_progress_is_shown_on_a_terminal(place):
    pty, fcntl, termios = (pytest.importorskip(name) for name in ("pty", "fcntl", "termios"))
    terminal, end = pty.openpty()
    # A new one has no width, and shows nothing.
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "spectra", "analyze", "targets.py:problem", "--out", "run"],
        cwd=place,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=end,
    )
    os.close(end)
    shown = b""
    while True:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # the other end is closed: how Linux says that all was read
            break
        if not piece:
            break
        shown += piece
    os.close(terminal)
    assert process.wait(timeout=60) == 0
    assert b"matvec" in shown


def test_a_hugging_face_model_is_analysed_on_a_text(place):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    text = "to be, or not to be, that is the question; " * 8
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.train_from_iterator(
        [text], tokenizers.trainers.BpeTrainer(vocab_size=40, show_progress=False)
    )
    config = transformers.GPT2Config(
        vocab_size=40, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    transformers.GPT2LMHeadModel(config).save_pretrained("model")
    transformers.PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained("model")
    Path("text.txt").write_text(text, encoding="utf-8")
    options = ["--tokens-per-sequence", "12", "--sequences-per-batch", "3", "--max-tokens", "100"]
    done = spectra_command(
        *("analyze", "--hf", "model", "--text", "text.txt", "--out", "run", *options),
        *("--dtype", "float64", "--top", "4", "--params", "*.attn.*", "--density"),
        cwd=place,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "91 tokens of text.txt are predicted, in 9 sequences" in done.stdout

    from spectra.integrations.huggingface import causal_lm

    problem = causal_lm(
        "model", "text.txt", tokens_per_sequence=12, max_tokens=100, dtype=torch.float64
    )
    H = spectra.HessianOperator(*problem, "*.attn.*")
    exact = np.linalg.eigvalsh(H.to_dense().numpy())
    summary = summary_of(place / "run")
    assert summary["operator"]["n"] == len(exact) == 288
    np.testing.assert_allclose(summary["eigenpairs"]["values"], largest(exact, 4), rtol=1e-4)
    assert summary["loss"] == pytest.approx(H.value())


@pytest.fixture
def bert(place):
    """Directories of a masked language model and of a classifier, and files for both."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("tokenizers")
    for kind, name in (("MaskedLM", "masked"), ("SequenceClassification", "classifier")):
        config = transformers.BertConfig(**SIZES, num_labels=2)
        model = curved(getattr(transformers, f"BertFor{kind}")(config))
        save(model, Path(name), word_tokenizer())
    Path("text.txt").write_text("the quick brown fox jumps over the lazy dog " * 4)
    rows = [{"text": "a good cat", "label": 1}, {"text": "the dog", "label": 0}]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return place


MASKED_RUN = (
    "masked --text text.txt",
    "5 tokens of text.txt are predicted, in 3 sequences",
    {"text": "text.txt", "task": "masked", "sequences": 3, "predicted_tokens": 5},
)
CLASSIFIED_RUN = (
    "classifier --text rows.jsonl",
    "2 rows of rows.jsonl are classified",
    {"text": "rows.jsonl", "task": "classify", "rows": 2},
)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("run", [MASKED_RUN, CLASSIFIED_RUN], ids=["masked", "classify"])
def test_the_task_of_a_hugging_face_model_is_chosen_or_named(run, named, bert, undrawn, capsys):
    from spectra.integrations import huggingface

    arguments, said, source = run
    options = ["--task", source["task"]] if named else []
    options += ["--top", "2", "--density", "--dtype", "float64", "--params", "*.query.*"]
    options += ["--out", "run", "--tokens-per-sequence", "16"]
    assert cli.main(["analyze", "--hf", *arguments.split(), *options]) == 0
    assert said in capsys.readouterr().out
    model = arguments.split()[0]
    assert summary_of(Path("run"))["source"] == {"hf": model, **source}
    load = huggingface.masked_lm if model == "masked" else huggingface.classifier
    problem = load(model, source["text"], tokens_per_sequence=16, dtype=torch.float64)
    exact = np.linalg.eigvalsh(spectra.HessianOperator(*problem, "*.query.*").to_dense().numpy())
    found = read_run("run").eigenpairs.values
    np.testing.assert_allclose(found, largest(exact, 2), rtol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--hf classifier --text text.txt", "'text.txt' is no table; give a .csv file"),
        (
            "--hf classifier --text rows.jsonl --max-tokens 9",
            "--max-tokens does not go with --task classify; its options are --tokens-per-sequence",
        ),
        ("--hf masked --text text.txt --rows-per-batch 2", "--rows-per-batch does not go with"),
        ("--hf masked --text rows.jsonl --task classify", "has no classification head"),
        ("--hf masked --text text.txt --task causal --tokens-per-sequence 8", "is not causal"),
    ],
)
def test_what_does_not_go_with_a_task_is_named(arguments, message, bert, capsys):
    assert cli.main(["analyze", "--out", "run", *arguments.split()]) == 2
    assert message in capsys.readouterr().err


def test_the_versions_that_a_bug_report_needs_are_printed(place, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["--version"])
    assert left.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"spectra {spectra.__version__}"
    assert {"torch", "scipy", "python", "platform"} <= {line.split()[0] for line in lines}


@pytest.mark.parametrize("command", [[], ["analyze"], ["demo"], ["report"]])
def test_help_explains_the_exit_status(command, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main([*command, "--help"])
    assert left.value.code == 0
    assert "exit status:" in capsys.readouterr().out


# --- analyze, its options -------------------------------------------------------------------------


def analyzed(*arguments, out="run", status=0):
    assert cli.main(["analyze", *arguments, "--out", out]) == status
    return summary_of(Path(out))


def test_parameters_are_selected_in_both_kinds_of_target(place, undrawn):
    exact = largest(dense_eigenvalues(place, "2.*"), 3)
    for i, target in enumerate(("problem", "operator")):
        options = ["--top", "3", "--params", "2.*"]
        summary = analyzed(f"targets.py:{target}", *options, out=f"run{i}")
        assert summary["operator"]["n"] == 15
        np.testing.assert_allclose(summary["eigenpairs"]["values"], exact, rtol=1e-5)


def test_several_globs_select_what_any_of_them_matches(place, undrawn):
    summary = analyzed("targets.py:problem", "--top", "1", "--params", "*.bias", "2.*")
    assert summary["operator"]["n"] == 4 + 15


def test_how_products_are_computed_does_not_change_the_answer(place, undrawn):
    plain = analyzed("targets.py:problem", "--top", "4", out="plain")
    other = analyzed(
        *("targets.py:problem", "--top", "4", "--graph", "retained", "--microbatch", "7"),
        out="other",
    )
    assert other["operator"]["graph"] == "retained"
    assert other["operator"]["microbatch"] == 7
    np.testing.assert_allclose(
        other["eigenpairs"]["values"], plain["eigenpairs"]["values"], rtol=1e-8
    )


def test_check_says_what_an_analysis_will_take(place, capsys):
    assert cli.main(["check", "targets.py:problem"]) == 0
    shown = capsys.readouterr().out
    assert "a product of n = 39 takes" in shown
    assert "analyze(H)" in shown
    assert cli.main(["check", "targets.py:problem", "--json", "--microbatch", "7"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["n"] == 39
    assert found["provenance"]["operator"]["microbatch"] == 7
    assert {finding["level"] for finding in found["findings"]} == {"ok"}


def test_check_fails_where_something_is_wrong_and_a_strict_analysis_does_not_begin(place, capsys):
    assert cli.main(["check", "targets.py:detached"]) == 1
    assert "error   parameters" in capsys.readouterr().out
    out = ["--out", str(place / "run")]
    assert cli.main(["analyze", "targets.py:detached", *out, "--preflight", "strict"]) == 3
    error = capsys.readouterr().err
    assert "spectra: error: the checks before the run found 1 of" in error
    assert "0.weight" in error
    assert not (place / "run").exists()


def test_the_means_of_the_operator_arrive(place, undrawn):
    out = place / "run"
    arguments = ["--compute-dtype", "float64", "--memory-budget", "2 GiB", "--recompute", "none"]
    assert cli.main(["analyze", "targets.py:problem", "--out", str(out), *arguments]) == 0
    described = summary_of(out)["operator"]
    assert described["compute_dtype"] == "float64"
    assert described["dtype"] == "float64"


def test_the_smallest_eigenvalues_can_be_asked_for(place, undrawn):
    summary = analyzed("targets.py:problem", "--top", "2", "--which", "SA", "--ncv", "20")
    exact = dense_eigenvalues(place)[:2][::-1]
    np.testing.assert_allclose(summary["eigenpairs"]["values"], exact, rtol=1e-5)


def test_the_basis_can_be_on_disk(place, undrawn):
    plain = analyzed("targets.py:problem", "--top", "2")
    summary = analyzed("targets.py:problem", "--top", "2", "--basis", "disk", out="other")
    assert summary["eigenpairs"]["values"] == plain["eigenpairs"]["values"]
    assert "held on disk" in " ".join(summary["eigenpairs"]["notes"])


def test_a_budget_is_kept_and_what_it_left_out_is_said(place, undrawn):
    summary = analyzed("targets.py:problem", "--top", "3", "--budget", "30", status=1)
    assert summary["matvecs"]["total"] <= 30
    assert summary["notes"]
    assert "participation ratio" in summary["sums"]


@pytest.mark.parametrize(
    ("options", "trace", "density"),
    [
        ([], True, True),
        (["--trace"], True, False),
        (["--density"], False, True),
        (["--trace", "--density"], True, True),
    ],
)
def test_without_a_choice_both_trace_and_density_are_computed(
    options, trace, density, place, undrawn
):
    summary = analyzed("targets.py:problem", "--top", "1", *options)
    assert (summary["trace"] is not None) is trace
    assert (summary["density"] is not None) is density


def test_the_loss_along_eigenvectors_comes_beside_what_else_is_asked(place, undrawn):
    summary = analyzed("targets.py:problem", "--landscape", "--trace", "--rtol", "0.5")
    assert len(summary["landscape"]["directions"]) == 3
    assert summary["seconds"]["landscape"] > 0
    assert summary["trace"] is not None
    assert summary["density"] is None


def test_the_options_of_the_algorithms_arrive(place, undrawn):
    summary = analyzed(
        *("targets.py:operator", "--top", "2", "--tol", "0.01", "--rtol", "0.5"),
        *("--steps", "6", "--probes", "4", "--seed", "5"),
    )
    assert summary["seed"] == 5
    assert summary["eigenpairs"]["tol"] == 0.01
    assert (summary["density"]["steps"], summary["density"]["probes"]) == (6, 4)
    assert summary["options"]["rtol"] == 0.5


def test_of_fewer_parameters_than_ten_all_eigenvalues_are_computed(place, undrawn):
    summary = analyzed("targets.py:matrix")
    np.testing.assert_allclose(summary["eigenpairs"]["values"], [4, 3, 2, 1], rtol=1e-5)


# --- the run directory ----------------------------------------------------------------------------


def test_a_run_is_replaced_only_when_asked_and_no_old_figure_stays(place, capsys):
    analyzed("targets.py:problem", "--top", "1")
    assert (place / "run" / "density.svg").exists()
    assert cli.main(["analyze", "targets.py:problem", "--out", "run"]) == 2
    assert "holds a run already" in capsys.readouterr().err
    summary = analyzed("targets.py:problem", "--top", "2", "--trace", "--overwrite")
    assert len(summary["eigenpairs"]["values"]) == 2
    assert not list((place / "run").glob("density*"))


def test_the_directory_is_tried_before_the_target_is_loaded(place, capsys):
    (place / "file").write_text("in the way")
    assert cli.main(["analyze", "targets.py:problem", "--out", "file/run"]) == 2
    output = capsys.readouterr()
    assert "cannot write to the directory 'file/run'" in output.err
    assert "imported" not in output.out


def test_figures_and_report_are_made_again_from_a_saved_run(place, capsys):
    analyzed("targets.py:problem", "--top", "2")
    before = (place / "run" / "report.html").read_text(encoding="utf-8")
    for path in [*(place / "run").glob("*.svg"), place / "run" / "report.html"]:
        path.unlink()
    assert cli.main(["report", "run"]) == 0
    assert (place / "run" / "report.html").read_text(encoding="utf-8") == before
    assert "wrote run/eigenvalues.svg" in capsys.readouterr().out.replace(os.sep, "/")


def test_a_report_needs_a_run(place, capsys):
    assert cli.main(["report", "nowhere"]) == 2
    assert "holds no run of spectra" in capsys.readouterr().err


def test_a_figure_that_fails_costs_no_result(place, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no ink")

    monkeypatch.setattr(cli, "_draw", fail)
    assert cli.main(["analyze", "targets.py:problem", "--top", "1", "--out", "run"]) == 3
    assert len(read_run("run").eigenpairs) == 1
    output = capsys.readouterr()
    assert "1 eigenpairs" in output.out
    assert "RuntimeError: no ink" in output.err


# --- wrong input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("targets.py", "names no function; write file.py:function"),
        ("targets.py:", "names no function"),
        ("target.py:problem", "no Python file 'target.py'; did you mean 'targets.py'?"),
        ("nowhere/else.py:problem", "no Python file 'nowhere/else.py'"),
        ("no_such_module:problem", "no module 'no_such_module', neither installed nor in"),
        ("no_such.module:problem", "no module 'no_such', neither installed nor in"),
        ("targets.py:oparator", "has no function 'oparator'; it has operator"),
        ("targets.py:value", "is a float, expected a function"),
        ("targets.py:needs", "needs arguments (model, data), but is called without any"),
        ("targets.py:raises", "raised KeyError (targets.py, line "),
        ("targets.py:nothing", "returned None (is a return missing?), expected a HessianOperator"),
        ("targets.py:pair", "returned a tuple of 2, expected a HessianOperator or (model, loss"),
        ("targets.py:training", "Call model.eval() first"),
        ("targets.py:generator", "which can be read only once"),
        ("targets.py:problem --params 2.wieght", "no parameter matches '2.wieght'. Near matches"),
        ("targets.py:matrix --params *", "which has no parameters to select"),
        ("targets.py:operator --graph retained", "which has --graph settled; return"),
        ("targets.py:operator --microbatch 3", "which has --microbatch settled; return"),
        ("targets.py:problem --top 40", "--top 40, but there are only 39 parameters"),
        ("targets.py:problem --top 5 --budget 12", "the budget holds 12 matvecs, of which 5"),
        ("targets.py:problem --top 5 --ncv 5", "ncv=5 is too small for k=5"),
        ("--params 2.* targets.py:problem", "put TARGET before --params"),
        ("", "nothing to analyse: give TARGET"),
        ("targets.py:problem --hf m", "give either TARGET or --hf MODEL_DIR, not both"),
        ("targets.py:problem --text t", "--text goes with --hf"),
        ("targets.py:problem --max-tokens 9", "--max-tokens goes with --hf"),
        ("targets.py:problem --task masked", "--task goes with --hf"),
        ("--hf m", "--hf needs a text"),
        ("--hf m --text t", "no model directory 'm'"),
    ],
)
def test_wrong_input_is_named_in_one_line_with_the_fix(arguments, message, place, capsys):
    assert cli.main(["analyze", "--out", "run", *arguments.split()]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("spectra: error: ")
    assert errors.count("\n") == 1
    assert message in errors
    assert not (place / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "arguments are required: COMMAND"),
        ("analyse", "invalid choice: 'analyse'"),
        ("analyze targets.py:problem", "required: --out"),
        ("analyze targets.py:problem --out run --top 0", "'0' is not an integer of at least 1"),
        ("analyze targets.py:problem --out run --top ten", "'ten' is not an integer"),
        ("analyze targets.py:problem --out run --tol 0", "'0' is not a positive number"),
        ("analyze targets.py:problem --out run --rtol nan", "'nan' is not a positive number"),
        ("analyze targets.py:problem --out run --budget soon", "budget='soon'; expected a number"),
        ("analyze targets.py:problem --out run --seed -1", "'-1' is not an integer of at least 0"),
        ("analyze targets.py:problem --out run --which SM", "invalid choice: 'SM'"),
        ("analyze targets.py:problem --out run --prob 3", "unrecognized arguments: --prob"),
    ],
)
def test_arguments_that_cannot_be_parsed_exit_with_2(arguments, message, place, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(arguments.split())
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_a_file_that_cannot_be_imported_is_named_with_the_line(place, capsys):
    for name, content, message in (
        ("syntax.py", "def target(:\n", "raised SyntaxError"),
        (
            "missing.py",
            "import os\nimport not_installed\n",
            "(missing.py, line 2): No module named",
        ),
        ("script.py", "import sys\nsys.exit(3)\n", "raised SystemExit (script.py, line 2): 3"),
    ):
        (place / name).write_text(content)
        assert cli.main(["analyze", f"{name}:target", "--out", "run"]) == 2
        errors = capsys.readouterr().err
        assert f"importing '{name}'" in errors
        assert message in errors


def test_a_module_that_fails_on_import_is_not_taken_for_a_missing_one(place, capsys):
    (place / "half_a_module.py").write_text("import not_installed\n")
    assert cli.main(["analyze", "half_a_module:target", "--out", "run"]) == 2
    assert "raised ModuleNotFoundError" in capsys.readouterr().err


def test_modules_beside_the_target_can_be_imported(place, undrawn, monkeypatch):
    (place / "below").mkdir()
    (place / "below" / "beside.py").write_text("size = 3\n")
    (place / "below" / "own.py").write_text(
        "import torch, spectra\nfrom beside import size\n"
        "def target():\n"
        "    f = lambda x: (x**4).sum()\n"
        "    return spectra.HessianOperator.from_function(f, torch.ones(size))\n"
    )
    assert analyzed("below/own.py:target")["eigenpairs"]["values"] == pytest.approx([12] * 3)


def test_a_traceback_is_added_when_debugging(place, monkeypatch, capsys):
    arguments = ["analyze", "targets.py:raises", "--out", "run"]
    assert cli.main(arguments) == 2
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setenv("SPECTRA_DEBUG", "1")
    assert cli.main(arguments) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("error", [MemoryError("full"), RuntimeError("can't allocate memory")])
def test_when_memory_runs_out_the_ways_to_save_it_are_named(error, place, monkeypatch, capsys):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(cli, "_run", fail)
    assert cli.main(["analyze", "targets.py:problem", "--out", "run"]) == 3
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert "--microbatch" in errors
