"""A SummaryWriter of torch's, read back by TensorBoard's own reader."""

import pytest
import torch

import spectra

pytest.importorskip("tensorboard")


def test_measurements_are_read_back_from_an_event_file(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))
    data = [(torch.randn(9, 4), torch.randn(9, 2))]
    loss = spectra.losses.supervised(torch.nn.MSELoss())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    writer, rows = SummaryWriter(str(tmp_path)), []
    with writer:
        monitor = spectra.CurvatureMonitor(
            model, loss, data, optimizer, every=5, log=[writer, rows.append]
        )
        for step in range(11):
            monitor.step(step)
            optimizer.zero_grad()
            loss(model, data[0]).backward()
            optimizer.step()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {key for row in rows for key in row} - {"step"}
    for name in ("sharpness", "sharpness_residual", "loss", "threshold", "matvecs"):
        read = events.Scalars(f"curvature/{name}")
        assert [e.step for e in read] == [0, 5, 10]
        assert [e.value for e in read] == pytest.approx(monitor.trajectory.column(name), rel=1e-6)
