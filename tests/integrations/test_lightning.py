"""Lightning's own Trainer, with and without the callback."""

import warnings

import numpy as np
import pytest
import torch
from torch.nn import functional

import spectra
from spectra.errors import TargetError

pl = pytest.importorskip("lightning.pytorch")

from spectra.integrations import lightning as integration  # noqa: E402

CurvatureCallback = integration.CurvatureCallback


def samples(count=40):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 6, generator=generator)
    return x, torch.randint(0, 3, (count,), generator=generator)


class Network(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(6, 8),
            torch.nn.BatchNorm1d(8),
            torch.nn.Tanh(),
            torch.nn.Dropout(0.2),
            torch.nn.Linear(8, 3),
        )
        self.losses = []

    def forward(self, x):
        return self.layers(x)

    def training_step(self, batch, _):
        loss = functional.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


LOSS = spectra.losses.supervised(torch.nn.CrossEntropyLoss())


def trained(directory, *callbacks, logger=False, **options):
    """The module after two epochs of five batches, and its Trainer."""
    torch.manual_seed(0)
    module = Network()
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*samples()), batch_size=8, shuffle=True
    )
    with warnings.catch_warnings():
        # Lightning's own use of torch.
        warnings.filterwarnings(
            "ignore",
            message=r"`isinstance\(treespec, LeafSpec\)` is deprecated, use `isinstance\(treespec",
            category=FutureWarning,
        )
        trainer = pl.Trainer(
            max_epochs=2,
            accelerator="cpu",
            default_root_dir=str(directory),
            logger=logger,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=list(callbacks),
            log_every_n_steps=1,
            **options,
        )
        trainer.fit(module, loader)
    return module, trainer


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("data", [None, [samples(16)]])
def test_the_losses_and_weights_are_the_same_bit_for_bit(tmp_path, accumulated, data):
    options = {"accumulate_grad_batches": accumulated}
    plain, _ = trained(tmp_path, **options)
    callback = CurvatureCallback(LOSS, data, every=2, current_batch=True)
    monitored, trainer = trained(tmp_path, callback, **options)
    assert monitored.losses == plain.losses
    assert len(plain.losses) == 10
    for name, value in plain.state_dict().items():
        assert torch.equal(value, monitored.state_dict()[name])
    steps = [m.step for m in callback.trajectory]
    last = 10 if accumulated == 1 else 6
    # Without data of its own the first measurement waits for the first batch.
    expected = range(0 if data or accumulated == 2 else 2, last + 1, 2)
    assert steps == list(expected)
    assert not any(m.error for m in callback.trajectory)
    assert trainer.callback_metrics["curvature/sharpness"] == pytest.approx(
        callback.trajectory[-1].sharpness, rel=1e-6
    )


def test_the_last_measurement_is_of_the_trained_module_and_its_optimiser(tmp_path):
    callback = CurvatureCallback(LOSS, [samples(16)], every=5, tol=1e-4)
    module, _ = trained(tmp_path, callback)
    m = callback.trajectory[-1]
    H = spectra.HessianOperator(module.eval(), LOSS, [samples(16)])
    top = np.linalg.eigvalsh(H.to_dense().double().numpy())[-1]
    assert (m.step, m.learning_rate) == (10, 0.1)
    assert m.threshold == pytest.approx(38.0)
    assert m.sharpness == pytest.approx(top, rel=1e-4)


def test_the_numbers_reach_lightnings_tensorboard_logger(tmp_path):
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(str(tmp_path), name="run", version="one")
    callback = CurvatureCallback(LOSS, [samples(16)], every=5)
    trained(tmp_path, callback, logger=logger)
    events = EventAccumulator(str(tmp_path / "run" / "one"))
    events.Reload()
    read = events.Scalars("curvature/sharpness")
    assert [e.step for e in read] == [0, 5, 10]
    found = [m.sharpness for m in callback.trajectory]
    assert [e.value for e in read] == pytest.approx(found, rel=1e-6)


def test_without_lightning_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(integration, "Callback", object)
    with pytest.raises(TargetError, match=r"pip install 'hessian-spectra\[lightning\]'"):
        CurvatureCallback(LOSS)
