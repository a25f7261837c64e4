"""Curvature at saved weights, beside the measurements that a loop of one's own would make."""

import os
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import spectra
from spectra.analysis.measurement import measure
from spectra.errors import (
    ArgumentError,
    ArgumentTypeError,
    CheckpointError,
    NonFiniteError,
)


def problem():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Tanh(), torch.nn.Linear(6, 3)
    ).double()
    data = [
        (torch.randn(20, 4, dtype=torch.float64), torch.randint(0, 3, (20,))),
        (torch.randn(7, 4, dtype=torch.float64), torch.randint(0, 3, (7,))),
    ]
    return model, spectra.losses.supervised(torch.nn.CrossEntropyLoss()), data


KINDS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.5),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.99)),
}


def train(folder, kind="sgd", steps=(0, 5, 12), with_optimizer=True):
    """A short training whose weights are saved at some steps; files, and dense eigenvalues."""
    model, loss, data = problem()
    optimizer = KINDS[kind](model.parameters())
    files, truth = [], []
    for step in range(max(steps) + 1):
        if step in steps:
            model.eval()
            H = spectra.HessianOperator(model, loss, data)
            truth.append(np.linalg.eigvalsh(H.to_dense().numpy())[::-1])
            content = {"model": model.state_dict(), "step": step}
            if with_optimizer:
                content["optimizer"] = optimizer.state_dict()
            torch.save(content, folder / f"w{step}.pt")
            files.append(folder / f"w{step}.pt")
            model.train()
        optimizer.zero_grad()
        for batch in data:
            loss(model, batch).backward()
        optimizer.step()
    return files, truth


def operator():
    model, loss, data = problem()
    return spectra.HessianOperator(model.eval(), loss, data)


def numbers(trajectory):
    """Everything that was measured, but the time it took."""
    return [{k: v for k, v in m.row().items() if k != "seconds"} for m in trajectory]


def check_equal(a, b):
    """Bit for bit."""
    assert list(map(repr, numbers(a))) == list(map(repr, numbers(b)))


def test_every_checkpoint_is_measured_and_the_model_is_as_before(tmp_path):
    files, truth = train(tmp_path)
    H = operator()
    before = {k: v.clone() for k, v in H.objective.model.state_dict().items()}
    # In the order of the steps, whatever that of the list.
    trajectory = spectra.track(H, [files[2], files[0], files[1]], k=2, tol=1e-6)
    assert [m.step for m in trajectory] == [0, 5, 12]
    assert [m.label for m in trajectory] == ["w0.pt", "w5.pt", "w12.pt"]
    for m, values in zip(trajectory, truth, strict=True):
        assert all(m.converged)
        assert m.certified
        np.testing.assert_allclose(m.eigenvalues, values[:2], atol=max(m.residuals) + 1e-12)
        # Momentum 0.5 and a rate of 0.2, as saved.
        assert m.threshold == pytest.approx((2 + 2 * 0.5) / 0.2)
        assert not m.threshold_preconditioned
    assert np.isnan(trajectory.column("overlap")[0])
    assert 0 <= trajectory.column("overlap")[1] <= 1
    after = H.objective.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not H.objective.model.training


def test_measurements_are_those_of_a_loop_of_ones_own(tmp_path):
    files, _ = train(tmp_path)
    trajectory = spectra.track(operator(), files, k=2, record=("gradient", "rotation", "trace"))
    previous = None
    for file, m in zip(files, trajectory, strict=True):
        H = operator()
        content = torch.load(file, weights_only=True)
        H.objective.model.load_state_dict(content["model"])
        own = measure(
            H,
            m.step,
            k=2,
            tol=1e-3,
            record=("gradient", "rotation", "trace"),
            previous=previous,
        )
        previous = own
        for name in ("eigenvalues", "loss", "gradient_norm", "trace", "alignment", "overlap"):
            assert repr(getattr(m, name)) == repr(getattr(own, name))


def test_the_preconditioned_sharpness_takes_the_saved_state_of_the_optimiser(tmp_path):
    files, _ = train(tmp_path, "adam", steps=(5, 12))
    H = operator()
    optimizer = KINDS["adam"](H.objective.model.parameters())
    record = ("preconditioned",)
    trajectory = spectra.track(H, files, record=record, optimizer=optimizer, tol=1e-6)
    for file, m in zip(files, trajectory, strict=True):
        model, loss, data = problem()
        content = torch.load(file, weights_only=True)
        model.load_state_dict(content["model"])
        mine = KINDS["adam"](model.parameters())
        mine.load_state_dict(content["optimizer"])
        dense = spectra.HessianOperator(model.eval(), loss, data)
        rescaled = spectra.preconditioned(dense, mine).to_dense().numpy()
        top = np.linalg.eigvalsh(rescaled)[-1]
        assert m.preconditioned_sharpness == pytest.approx(
            top, abs=m.preconditioned_residual + 1e-9
        )
        # After as many steps of Adam.
        assert m.threshold == pytest.approx(2 * 1.8 / (0.2 * 0.01) * (1 - 0.8**m.step))
    # Its own state is back: there was none.
    assert not optimizer.state


def test_without_a_saved_optimiser_the_threshold_is_the_given_one_or_unknown(tmp_path):
    files, _ = train(tmp_path, with_optimizer=False, steps=(0,))
    assert np.isnan(spectra.track(operator(), files)[0].threshold)
    assert spectra.track(operator(), files, learning_rate=0.4)[0].threshold == pytest.approx(5.0)
    (tmp_path / "more").mkdir()
    saved, _ = train(tmp_path / "more", steps=(0,))
    told = spectra.track(operator(), saved, learning_rate=0.4)
    assert told[0].threshold == pytest.approx(5.0)
    assert "learning_rate=, not of the optimiser that was saved" in str(told)
    H = operator()
    optimizer = torch.optim.SGD(H.objective.model.parameters(), lr=0.1)
    assert spectra.track(H, files, optimizer=optimizer)[0].threshold == pytest.approx(20.0)


def test_steps_that_are_not_known_are_places_and_this_is_said(tmp_path):
    model, _, _ = problem()
    for name in ("first", "second"):
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
    names = [tmp_path / "second.safetensors", tmp_path / "first.safetensors"]
    trajectory = spectra.track(operator(), names)
    assert [(m.step, m.label) for m in trajectory] == [
        (0, "second.safetensors"),
        (1, "first.safetensors"),
    ]
    assert "steps are places in the list" in str(trajectory)


def test_a_trajectory_grows_and_nothing_is_measured_twice(tmp_path):
    files, _ = train(tmp_path)
    whole = spectra.track(operator(), files, k=2)
    H = operator()
    spectra.track(H, files[:2], k=2, checkpoint=tmp_path / "run")
    check_equal(spectra.load(tmp_path / "run"), spectra.track(operator(), files[:2], k=2))
    before = H.matvecs
    grown = spectra.track(H, files, k=2, checkpoint=tmp_path / "run")
    assert H.matvecs - before == sum(grown[2].matvecs.values())
    # The search at the new weights starts from the last vectors, so all is as in one run.
    check_equal(grown, whole)
    before = H.matvecs
    check_equal(spectra.track(H, files, k=2, checkpoint=tmp_path / "run"), whole)
    assert H.matvecs == before
    assert not (tmp_path / "run.part").exists()


def test_what_was_measured_before_an_exception_is_its_partial(tmp_path):
    files, _ = train(tmp_path)
    whole = spectra.track(operator(), files)
    H, count = operator(), 0
    compute = H._products

    def products(rows):
        nonlocal count
        count += 1
        if count == sum(sum(m.matvecs.values()) for m in whole) - 1:
            raise KeyboardInterrupt
        return compute(rows)

    H._products = products
    H._products_into = lambda rows, out: out.copy_(products(rows))
    with pytest.raises(KeyboardInterrupt) as caught:
        spectra.track(H, files)
    check_equal(caught.value.partial, tuple(whole)[:2])
    assert all(map(torch.equal, H.objective.model.parameters(), problem()[0].parameters()))


@pytest.mark.parametrize("event", ["SIGINT", "SIGTERM", "ValueError"])
@pytest.mark.parametrize("at", [3, 30])
def test_a_run_that_was_ended_goes_on_to_the_same_numbers(event, at, tmp_path):
    files, _ = train(tmp_path)
    whole = spectra.track(operator(), files, k=2)
    H, count = operator(), 0
    compute = H._products

    def products(rows):
        nonlocal count
        count += 1
        if count == at:
            if event == "ValueError":
                raise ValueError("a cosmic ray")
            os.kill(os.getpid(), getattr(signal, event))
        return compute(rows)

    H._products = products
    if event == "ValueError" or at == 3:
        with pytest.raises(ValueError if event == "ValueError" else KeyboardInterrupt):
            spectra.track(H, files, k=2, checkpoint=tmp_path / "run")
    else:
        partial = spectra.track(H, files, k=2, checkpoint=tmp_path / "run")
        assert partial.partial
        assert 0 < len(partial) < 3
        assert f"stopped by {event}" in str(partial)
    assert all(map(torch.equal, H.objective.model.parameters(), problem()[0].parameters()))
    spent = count
    H, count = operator(), 0
    compute, at = H._products, -1
    H._products = products
    again = spectra.track(H, files, k=2, checkpoint=tmp_path / "run")
    check_equal(again, whole)
    assert not again.partial
    # The first product once more, to see that it is the same.
    assert count + spent <= sum(sum(m.matvecs.values()) for m in whole) + 2


@pytest.mark.parametrize("at", range(16, 40, 4))
def test_ctrl_c_in_a_trace_leaves_no_trace_of_fewer_probes(at, tmp_path):
    files, _ = train(tmp_path)
    options = {"k": 2, "record": ("trace",)}
    whole = spectra.track(operator(), files, **options)
    H, count = operator(), 0
    compute = H._products

    def products(rows):
        nonlocal count
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGINT)
        return compute(rows)

    H._products = products
    try:
        partial = spectra.track(H, files, checkpoint=tmp_path / "run", **options)
    except KeyboardInterrupt as error:
        partial = error.partial
    else:
        assert partial.partial
    # What is there is as without the interruption, and so is what follows.
    assert len(partial) < len(whole)
    check_equal(partial, tuple(whole)[: len(partial)])
    check_equal(spectra.track(operator(), files, checkpoint=tmp_path / "run", **options), whole)


def test_epochs_are_no_steps(tmp_path):
    model = problem()[0]
    for name, entry in (("a", {"epoch": 1}), ("b", {"epoch": 2}), ("c_0010", {})):
        torch.save({"model": model.state_dict(), **entry}, tmp_path / f"{name}.pt")
    a, b, c = (tmp_path / f"{name}.pt" for name in ("a", "b", "c_0010"))
    only = spectra.track(operator(), [b, a], record=())
    assert [(m.step, m.label) for m in only] == [(1, "a.pt"), (2, "b.pt")]
    assert "steps are the epochs that were saved" in str(only)
    mixed = spectra.track(operator(), [c, b], record=())
    assert [(m.step, m.label) for m in mixed] == [(0, "c_0010.pt"), (1, "b.pt")]
    assert "of others the epoch, such as 'b.pt'" in str(mixed)


def test_the_trajectory_of_another_run_is_not_gone_on_with(tmp_path):
    files, _ = train(tmp_path)
    spectra.track(operator(), files[:2], checkpoint=tmp_path / "run")

    def refused(match, H, weights, **options):
        before = (tmp_path / "run.json").read_bytes()
        with pytest.raises(CheckpointError, match=match):
            spectra.track(H, weights, checkpoint=tmp_path / "run", **options)
        assert (tmp_path / "run.json").read_bytes() == before

    refused("option k", operator(), files, k=2)
    refused("learning_rate", operator(), files, learning_rate=0.1)
    model, loss, data = problem()
    other = [(data[0][0] + 1, data[0][1]), data[1]]
    refused("data", spectra.HessianOperator(model.eval(), loss, other), files)
    refused("is that of 'w0.pt'", operator(), files[1:])
    content = torch.load(files[1], weights_only=True)
    content["model"]["0.weight"] += 1e-9
    torch.save(content, files[1])
    refused("whose weights are others", operator(), files)
    spectra.trace(operator(), rtol=0.5).save(tmp_path / "run")
    refused("was not made by track", operator(), files)


def test_weights_that_diverged_are_noted_and_the_others_measured(tmp_path):
    files, _ = train(tmp_path)
    content = torch.load(files[1], weights_only=True)
    content["model"]["0.weight"][0, 0] = float("nan")
    torch.save(content, files[1])
    trajectory = spectra.track(operator(), files)
    assert len(trajectory) == 3
    assert "NonFiniteError" in trajectory[1].error
    assert trajectory[2].sharpness > 0
    assert "step 5 failed" in str(trajectory)
    # Compared with the last that was measured.
    assert 0 <= trajectory[2].overlap <= 1
    with pytest.raises(NonFiniteError):
        spectra.track(operator(), files[1:])


def test_what_cannot_be_tracked_is_refused_before_any_product(tmp_path):
    files, _ = train(tmp_path)
    H = operator()

    def refused(kind, match, *arguments, **options):
        with pytest.raises(kind, match=match):
            spectra.track(*arguments, **options)
        assert H.matvecs == 0

    refused(ArgumentError, "no weights to measure at", H, [])
    refused(ArgumentTypeError, "expected a list of files", H, str(files[0]))
    refused(ArgumentError, "no file or directory", H, [*files, tmp_path / "none.pt"])
    torch.save({"model": torch.nn.Linear(2, 2).state_dict()}, tmp_path / "other.pt")
    refused(ArgumentError, "are not those of the Sequential", H, [*files, tmp_path / "other.pt"])
    refused(ArgumentTypeError, "has no model", np.eye(3), files)
    function = spectra.HessianOperator.from_function(lambda x: (x**4).sum(), torch.ones(3))
    refused(ArgumentTypeError, "has no model", function, files)
    refused(ArgumentError, "k=0", H, files, k=0)
    refused(ArgumentError, "optimizer=", H, files, record=("preconditioned",))
    refused(ArgumentError, "learning_rate=0", H, files, learning_rate=0)
    adam = torch.optim.Adam(H.objective.model.parameters())
    refused(ArgumentError, "leave out learning_rate", H, files, learning_rate=1, optimizer=adam)
    refused(ArgumentError, "does not go into the Adam: it is that of SGD", H, files, optimizer=adam)


def test_gauss_newton_and_parts_of_the_model_are_tracked(tmp_path):
    files, _ = train(tmp_path)
    model, loss, data = problem()
    G = spectra.GaussNewtonOperator(model.eval(), loss, data, "3.*")
    trajectory = spectra.track(G, files, tol=1e-6)
    for file, m in zip(files, trajectory, strict=True):
        model.load_state_dict(torch.load(file, weights_only=True)["model"])
        dense = spectra.GaussNewtonOperator(model, loss, data, "3.*").to_dense().numpy()
        assert m.sharpness == pytest.approx(np.linalg.eigvalsh(dense)[-1], rel=1e-5)


def test_a_figure_is_drawn(tmp_path):
    files, _ = train(tmp_path)
    axes = spectra.track(operator(), files).plot()
    assert "threshold" in " ".join(text.get_text() for text in axes.get_legend().get_texts())
