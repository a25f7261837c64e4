"""The monitor measures what it should, and the training never notices."""

import contextlib
import functools
import json
import math
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import spectra
from spectra.analysis.logs import metrics
from spectra.errors import ArgumentError, ArgumentTypeError, LossError, StorageError

LOSS = spectra.losses.supervised(nn.CrossEntropyLoss())


def network():
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 3)
    )


def samples(count=48):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 6, generator=generator)
    return x, torch.randint(0, 3, (count,), generator=generator)


class Noisy(TensorDataset):
    """Augments with what loaders draw from: Python's and NumPy's global generators."""

    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x + 0.01 * random.random() + 0.01 * float(np.random.normal()), y  # noqa: NPY002


def everything(model, optimizer):
    """All that a training run is: weights, buffers, momenta, gradients, random states, modes."""
    tensors = [*model.state_dict().values(), *(p.grad for p in model.parameters())]
    tensors += [v for s in optimizer.state.values() for v in s.values()]
    held = [None if t is None else torch.as_tensor(t).clone() for t in tensors]
    return held, torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002


def same(a, b):
    assert len(a[0]) == len(b[0])
    assert all(x is y or torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True))
    assert torch.equal(a[1], b[1])
    assert a[2:] == b[2:]


def train(monitored, *, make=None, accumulate=1, around=contextlib.nullcontext, amp=False):
    """A run with everything random in play; its losses, and the state that it ends in."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    model = network()
    loader = DataLoader(Noisy(*samples()), batch_size=8, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.5)
    scaler = torch.amp.GradScaler("cpu", enabled=amp)
    monitor = make(model, optimizer, loader) if monitored else None
    losses, step = [], 0
    for _ in range(2):
        for batch in loader:
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                loss = LOSS(model, batch)
                # In the midst of it: between forward and backward, within autocast.
                if monitor is not None:
                    with around():
                        monitor.step(step, batch)
            scaler.scale(loss / accumulate).backward()
            losses.append(loss.item())
            step += 1
            if step % accumulate == 0:
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                scheduler.step()
    losses += [p.grad.sum().item() for p in model.parameters() if p.grad is not None]
    return losses, everything(model, optimizer), model, monitor


def probing(model, optimizer, loader, **options):
    options = {"every": 2, "record": ("gradient", "rotation", "trace"), **options}
    return spectra.CurvatureMonitor(model, LOSS, loader, optimizer, **options)


def late(model, optimizer, loader):
    """With the preconditioned sharpness, which is there after the first step."""
    record = ("gradient", "preconditioned")
    return probing(model, optimizer, loader, record=record, steps=(3, 4, 7, 11), every=None)


SURROUNDINGS = {
    "plainly": {},
    "with the preconditioner of Adam": {"make": late},
    "with gradients accumulated half-way": {"accumulate": 4},
    "under no_grad": {"around": torch.no_grad},
    "under inference_mode": {"around": torch.inference_mode},
    "in autocast with a GradScaler": {"amp": True},
}


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
def test_losses_and_all_state_are_the_same_bit_for_bit_with_and_without_it(surroundings):
    options = {"make": probing, **SURROUNDINGS[surroundings]}
    losses, state, _, _ = train(False, **options)
    monitored, after, model, monitor = train(True, **options)
    assert monitored == losses
    same(after, state)
    assert all(module.training for module in model.modules())
    assert len(monitor.trajectory) >= 4
    assert not any(m.error for m in monitor.trajectory)


def test_surroundings_do_not_change_what_is_measured():
    make = functools.partial(probing, every=5, record=("gradient",))
    plain = train(True, make=make)[3].trajectory
    for around in (torch.no_grad, torch.inference_mode):
        again = train(True, make=make, around=around)[3].trajectory
        assert again[1].eigenvalues == plain[1].eigenvalues
        assert again[1].batch_sharpness == plain[1].batch_sharpness
        # Or it could not be used outside.
        assert not again.previous.vectors.is_inference()


def test_autocast_around_does_not_reach_into_a_measurement():
    torch.manual_seed(0)
    model = network()
    data = [samples()]
    plain = spectra.CurvatureMonitor(model, LOSS, data, tol=1e-6).step(0)
    with torch.autocast("cpu", torch.bfloat16):
        within = spectra.CurvatureMonitor(model, LOSS, data, tol=1e-6).step(0)
    assert within.eigenvalues == plain.eigenvalues


def test_a_measurement_is_that_of_the_model_in_evaluation_mode_at_these_weights():
    losses, _, model, _ = train(False)
    assert losses
    data = [samples(32), samples(7)]
    monitor = spectra.CurvatureMonitor(model, LOSS, data, k=2, tol=1e-5)
    first = monitor.step(0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.3)
    second = monitor.step(1, samples(9))
    assert model.training
    model.eval()
    H, part = (spectra.HessianOperator(model, LOSS, d) for d in (data, [samples(9)]))
    values = np.linalg.eigvalsh(H.to_dense().double().numpy())
    tolerance = 1e-4 * values[-1]
    assert second.eigenvalues == pytest.approx(values[:-3:-1].tolist(), abs=tolerance)
    top = np.linalg.eigvalsh(part.to_dense().double().numpy())[-1]
    assert second.batch_sharpness == pytest.approx(top, abs=2 * second.batch_residual + 1e-5 * top)
    assert first.eigenvalues != second.eigenvalues
    assert second.loss == pytest.approx(H.value(), rel=1e-6)
    assert second.overlap > 0


def test_an_eigenvalue_that_overtakes_is_found_from_the_last_vectors():
    """From the old eigenvector alone it would not be: that one still is an exact eigenvector."""
    x = nn.Parameter(torch.zeros(30, dtype=torch.float64))
    model = nn.ParameterList([x])
    curvatures = torch.linspace(0.0, 1.0, 30, dtype=torch.float64)
    curvatures[0] = 5.0

    def loss(model, batch):
        return 0.5 * (curvatures * model[0] ** 2).sum() + batch.sum()

    data = [torch.zeros(1, dtype=torch.float64)]
    record = ("rotation",)
    monitor = spectra.CurvatureMonitor(model, loss, data, record=record, tol=1e-4)
    assert monitor.step(0).sharpness == pytest.approx(5.0, rel=1e-6)
    curvatures[1] = 9.0
    m = monitor.step(1)
    assert m.sharpness == pytest.approx(9.0, rel=1e-6)
    assert m.overlap < 1e-3


def test_a_warm_start_takes_fewer_products_where_little_has_changed():
    torch.manual_seed(0)
    model = network()
    matvecs = {}
    for warm in (True, False):
        monitor = spectra.CurvatureMonitor(model, LOSS, [samples()], warm=warm, record=())
        matvecs[warm] = [monitor.step(i).matvecs["eigenpairs"] for i in range(3)]
    assert matvecs[True][0] == matvecs[False][0]
    assert max(matvecs[True][1:]) < min(matvecs[False][1:])


def test_no_graph_outlives_a_measurement_and_the_next_one_keeps_the_same():
    torch.manual_seed(0)
    model = network().eval()
    H = spectra.HessianOperator(model, LOSS, [samples()])
    monitor = spectra.CurvatureMonitor(model, LOSS, [samples()], operator=lambda *_: H)
    monitor.step(0)
    graphs = H._oracle._graphs
    assert graphs.all_kept() is None
    H @ torch.ones(H.shape[0])
    assert len(graphs.all_kept()) == 1


# --- when --------------------------------------------------------------------------------------


def quiet(**options):
    torch.manual_seed(0)
    return spectra.CurvatureMonitor(network(), LOSS, [samples()], record=(), **options)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"every": 4}, [0, 4, 8]),
        ({"steps": (1, 5, 50)}, [1, 5]),
        ({"steps": lambda step: step in {2, 3}}, [2, 3]),
        ({"steps": spectra.log_spaced(8, per_decade=2)}, [0, 1, 3, 8]),
        ({}, list(range(10))),
    ],
)
def test_schedules(schedule, expected):
    monitor = quiet(**schedule)
    returned = [monitor.step(step) for step in range(10)]
    assert [m.step for m in returned if m is not None] == expected
    assert [m.step for m in monitor.trajectory] == expected


def test_logarithmic_steps_have_even_ratios_and_end_where_asked():
    steps = spectra.log_spaced(1000, per_decade=3)
    assert steps[:3] == (0, 1, 2)
    assert steps[-1] == 1000
    ratios = np.diff(np.log10(steps[4:]))
    assert ratios == pytest.approx([1 / 3] * len(ratios), abs=0.03)
    with pytest.raises(ArgumentError, match="last=0"):
        spectra.log_spaced(0)


def test_a_step_is_measured_once_and_none_before_the_last_one():
    monitor = quiet()
    assert monitor.step(5) is not None
    assert monitor.step(5) is None
    with pytest.raises(ArgumentError, match="step 4 comes after step 5"):
        monitor.step(4)
    with pytest.raises(ArgumentTypeError, match=r"step=1.5; expected an integer"):
        monitor.step(1.5)


def test_schedules_that_contradict_are_refused():
    with pytest.raises(ArgumentError, match="give one of them"):
        quiet(every=2, steps=[1])
    with pytest.raises(ArgumentError, match="every=0"):
        quiet(every=0)
    with pytest.raises(ArgumentTypeError, match="steps is a int"):
        quiet(steps=3)


# --- what --------------------------------------------------------------------------------------


def test_without_data_each_measurement_is_on_its_batch():
    torch.manual_seed(0)
    model = network()
    monitor = spectra.CurvatureMonitor(model, LOSS, None, tol=1e-5)
    with pytest.raises(ArgumentError, match=r"pass the batch, step\(i, batch\)"):
        monitor.step(0)
    found = [monitor.step(i, samples(size)).sharpness for i, size in enumerate((40, 11))]
    model.eval()
    for sharpness, size in zip(found, (40, 11), strict=True):
        H = spectra.HessianOperator(model, LOSS, [samples(size)])
        top = np.linalg.eigvalsh(H.to_dense().double().numpy())[-1]
        assert sharpness == pytest.approx(top, rel=1e-4)


def test_the_threshold_is_read_from_the_optimiser_at_each_step():
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    monitor = spectra.CurvatureMonitor(model, LOSS, [samples()], optimizer, record=())
    first = monitor.step(0)
    optimizer.param_groups[0]["lr"] = 0.25
    second = monitor.step(1)
    assert (first.learning_rate, second.learning_rate) == (0.5, 0.25)
    assert (first.threshold, second.threshold) == pytest.approx((6.0, 12.0))


def test_operators_of_ones_own_are_measured():
    torch.manual_seed(0)
    model = network()
    split = functools.partial(spectra.HessianOperator, microbatch=5)
    options = {"record": (), "tol": 1e-5}
    whole = spectra.CurvatureMonitor(model, LOSS, [samples()], **options).step(0)
    parts = spectra.CurvatureMonitor(model, LOSS, [samples()], operator=split, **options).step(0)
    assert parts.sharpness == pytest.approx(whole.sharpness, rel=1e-4)


def test_a_subset_of_the_parameters():
    torch.manual_seed(0)
    model = network()
    monitor = spectra.CurvatureMonitor(model, LOSS, [samples()], params="4.*", tol=1e-5)
    m = monitor.step(0)
    H = spectra.HessianOperator(model.eval(), LOSS, [samples()], "4.*")
    assert H.shape[0] == 51
    top = np.linalg.eigvalsh(H.to_dense().double().numpy())[-1]
    assert m.sharpness == pytest.approx(top, rel=1e-4)
    assert all(p.requires_grad for p in model.parameters())


def test_compiled_and_data_parallel_models_are_unwrapped_and_it_is_said():
    torch.manual_seed(0)
    model = network()
    plain = spectra.CurvatureMonitor(model, LOSS, [samples()], record=()).step(0)
    for wrapped, words in (
        (torch.compile(model, backend="eager"), "not compiled"),
        (nn.DataParallel(model), "inside of DataParallel"),
    ):
        monitor = spectra.CurvatureMonitor(wrapped, LOSS, [samples()], record=())
        assert monitor.step(0).eigenvalues == plain.eigenvalues
        assert words in str(monitor.trajectory)


def test_a_distributed_model_is_unwrapped_and_it_is_said(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    plain = spectra.CurvatureMonitor(model, LOSS, [samples()], record=()).step(0)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        monitor = spectra.CurvatureMonitor(wrapped, LOSS, [samples()], record=())
        assert monitor.step(0).eigenvalues == plain.eigenvalues
        assert "on the data of this process" in str(monitor.trajectory)
    finally:
        torch.distributed.destroy_process_group()


def test_a_model_that_is_compiled_in_place_is_measured_and_stays_compiled():
    torch.manual_seed(0)
    model = network()
    plain = spectra.CurvatureMonitor(model, LOSS, [samples()], record=()).step(0)
    model.compile(backend="eager")
    compiled = model._compiled_call_impl
    m = spectra.CurvatureMonitor(model, LOSS, [samples()], record=()).step(0)
    assert m.eigenvalues == plain.eigenvalues
    assert model._compiled_call_impl is compiled


def test_models_in_pieces_are_refused():
    wrapper = type("FullyShardedDataParallel", (nn.Module,), {})()
    with pytest.raises(ArgumentError, match="keeps its parameters in pieces"):
        spectra.CurvatureMonitor(wrapper, LOSS, [samples()])


def test_modes_that_differ_between_modules_are_put_back():
    torch.manual_seed(0)
    model = network()
    model[1].eval()
    before = [m.training for m in model.modules()]
    spectra.CurvatureMonitor(model, LOSS, [samples()], record=()).step(0)
    assert [m.training for m in model.modules()] == before


# --- when it goes wrong --------------------------------------------------------------------------


def test_what_is_wrong_at_the_first_measurement_is_raised():
    torch.manual_seed(0)
    monitor = spectra.CurvatureMonitor(network(), lambda m, b: m(b[0]), [samples()])
    with pytest.raises(LossError):
        monitor.step(0)
    assert len(monitor.trajectory) == 0
    with pytest.raises(ArgumentError, match="pass optimizer="):
        quiet_with_record("preconditioned")


def quiet_with_record(*record):
    return spectra.CurvatureMonitor(network(), LOSS, [samples()], record=record)


def test_a_training_that_diverges_is_recorded_and_warned_of_once():
    torch.manual_seed(0)
    model = network()
    monitor = spectra.CurvatureMonitor(model, LOSS, [samples()])
    monitor.step(0)
    with torch.no_grad():
        model[0].weight.fill_(math.nan)
    with pytest.warns(RuntimeWarning, match="step 1 could not be measured.*training goes on"):
        failed = monitor.step(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor.step(2)
    assert "NonFiniteError" in failed.error
    assert math.isnan(failed.sharpness)
    assert [bool(m.error) for m in monitor.trajectory] == [False, True, True]
    assert "step 2 failed: " in str(monitor.trajectory)
    assert model.training
    with torch.no_grad():
        model[0].weight.fill_(0.1)
    assert not monitor.step(3).error


def test_an_interruption_leaves_the_trajectory_and_the_model_as_they_were():
    torch.manual_seed(0)
    model = network()
    interrupted = []

    def loss(model, batch):
        if interrupted:
            raise KeyboardInterrupt
        return LOSS(model, batch)

    monitor = spectra.CurvatureMonitor(model, loss, [samples()], every=1)
    monitor.step(0)
    interrupted.append(True)
    state = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        monitor.step(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.step for m in monitor.trajectory] == [0]
    assert all(module.training for module in model.modules())
    interrupted.clear()
    assert monitor.step(1).sharpness > 0


def test_a_trajectory_is_continued_from_where_it_was_saved(tmp_path):
    monitor = quiet()
    for step in range(3):
        monitor.step(step)
    monitor.trajectory.save(tmp_path / "run")
    again = quiet(trajectory=tmp_path / "run")
    m = again.step(3)
    assert [m.step for m in again.trajectory] == [0, 1, 2, 3]
    # From the vectors that were saved.
    assert sum(m.matvecs.values()) < sum(monitor.trajectory[0].matvecs.values())
    spectra.Estimate("x", 1.0, 0.0).save(tmp_path / "other")
    with pytest.raises(ArgumentTypeError, match="a Trajectory to continue, got a Estimate"):
        quiet(trajectory=tmp_path / "other")


# --- where to ------------------------------------------------------------------------------------


def test_a_function_of_a_dict_gets_the_finite_numbers():
    rows = []
    monitor = quiet(log=rows.append)
    m = monitor.step(3)
    assert rows == [{"step": 3, **metrics(m)}]
    assert rows[0]["curvature/sharpness"] == m.sharpness
    assert rows[0]["curvature/sharpness_residual"] == m.sharpness_residual
    assert all(math.isfinite(v) for v in rows[0].values())
    assert "curvature/trace" not in rows[0]


def test_lines_are_written_at_once_and_steps_never_twice(tmp_path):
    path = tmp_path / "logs" / "run.jsonl"
    monitor = quiet(log=path)
    for step in range(2):
        monitor.step(step)
        assert len(path.read_text().splitlines()) == step + 1
    # Killed while it wrote the third line, and resumed from a checkpoint before the second.
    with path.open("a") as file:
        file.write('{"step": 2, "sha')
    again = quiet(log=path)
    for step in range(1, 4):
        again.step(step)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert rows[3]["sharpness"] == again.trajectory[-1].sharpness
    assert rows[3]["trace"] is None


def test_a_file_of_something_else_is_not_written_to(tmp_path):
    path = tmp_path / "notes.jsonl"
    path.write_text("my notes\n")
    with pytest.raises(StorageError, match="something else than measurements"):
        quiet(log=path)
    assert path.read_text() == "my notes\n"
    with pytest.raises(ArgumentError, match=r"ends in \.jsonl"):
        quiet(log=tmp_path / "run.csv")
    with pytest.raises(ArgumentTypeError, match="log is a int"):
        quiet(log=3)


def test_a_log_that_fails_later_does_not_end_the_training():
    def log(row):
        if row["step"]:
            msg = "no network"
            raise ConnectionError(msg)

    monitor = quiet(log=log)
    monitor.step(0)
    with pytest.warns(RuntimeWarning, match="step 1 could not be logged: no network"):
        monitor.step(1)
    assert len(monitor.trajectory) == 2

    def broken(row):
        msg = "no such project"
        raise ConnectionError(msg)

    monitor = quiet(log=broken)
    with pytest.raises(ConnectionError, match="no such project"):
        monitor.step(0)
    assert len(monitor.trajectory) == 1


def test_a_log_that_draws_random_numbers_does_not_move_the_training():
    monitor = quiet(log=lambda row: torch.randn(3))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    monitor.step(0)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_live_figure_draws_nothing_without_a_screen():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    # Other tests may have left some open.
    before = pyplot.get_fignums()
    monitor = quiet(live=True)
    monitor.step(0)
    monitor.step(1)
    assert monitor._figure.figure is False
    assert pyplot.get_fignums() == before


def test_a_live_figure_in_a_notebook_is_drawn_anew_in_its_place():
    from matplotlib.figure import Figure

    shown = []

    class Place:
        def update(self, figure):
            shown.append(figure)

    monitor = quiet(live=True)
    live = type(monitor._figure)()
    live._notebook, live._place = True, Place()
    live.figure = Figure()
    monitor._figure = live
    for step in range(3):
        monitor.step(step)
    assert len(shown) == 3
    assert len(shown[-1].axes) == 1
    steps = shown[-1].axes[0].get_lines()[0].get_xdata()
    assert list(steps) == [0, 1, 2]


def test_learning_rates_by_group_give_a_metric_before_any_state():
    model = network().double()
    x, y = samples()
    data = [(x.double(), y)]
    rates = {name: 0.1 if name.startswith("0") else 0.01 for name, _ in model.named_parameters()}
    groups = [{"params": [p], "lr": rates[name]} for name, p in model.named_parameters()]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    monitor = spectra.CurvatureMonitor(
        model, LOSS, data, optimizer, record=("preconditioned",), tol=1e-6
    )
    found = monitor.step(0)
    assert found.threshold_preconditioned
    H = spectra.HessianOperator(model.eval(), LOSS, data)
    dense = spectra.preconditioned(H, optimizer).to_dense().numpy()
    assert found.preconditioned_sharpness == pytest.approx(np.linalg.eigvalsh(dense)[-1], rel=1e-5)


def test_an_optimiser_of_another_model_is_refused():
    other = torch.optim.SGD(network().parameters(), lr=0.1)
    with pytest.raises(ArgumentError, match="the SGD moves no parameter of the"):
        spectra.CurvatureMonitor(network(), LOSS, [samples()], other)
