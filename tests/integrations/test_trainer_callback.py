"""transformers' own Trainer, with and without the callback."""

import numpy as np
import pytest
import torch

import spectra
from spectra.errors import TargetError
from spectra.integrations.huggingface import CurvatureCallback

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

STEPS = 8


class Tokens(torch.utils.data.Dataset):
    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        self.tokens = torch.randint(0, 23, (24, 9), generator=generator)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, i):
        return {"input_ids": self.tokens[i], "labels": self.tokens[i]}


def probe():
    return [{"input_ids": Tokens().tokens[:6], "labels": Tokens().tokens[:6]}]


def gpt():
    torch.manual_seed(0)
    # With dropout, as it is trained.
    config = transformers.GPT2Config(
        vocab_size=23, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def trained(directory, callback=None, *, log_to_trainer=False, reports="none", **options):
    """The Trainer after some steps."""
    arguments = transformers.TrainingArguments(
        str(directory),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        logging_steps=1,
        save_strategy="no",
        report_to=reports,
        use_cpu=True,
        disable_tqdm=True,
        seed=5,
        **options,
    )
    trainer = transformers.Trainer(model=gpt(), args=arguments, train_dataset=Tokens())
    trainer.remove_callback(transformers.PrinterCallback)
    if callback is not None:
        if log_to_trainer:
            callback._options["log"] = trainer.log
        trainer.add_callback(callback)
    trainer.train()
    return trainer


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_trainer_logs_the_same_losses_and_ends_in_the_same_weights(tmp_path, accumulated):
    options = {"gradient_accumulation_steps": accumulated}
    plain = trained(tmp_path, **options)
    callback = CurvatureCallback(
        spectra.losses.causal_lm(), probe(), every=2, record=("gradient", "rotation", "trace")
    )
    monitored = trained(tmp_path, callback, **options)
    assert losses(monitored) == losses(plain)
    assert len(losses(plain)) == STEPS
    for a, b in zip(plain.model.parameters(), monitored.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [m.step for m in callback.trajectory] == [0, 2, 4, 6, 8]
    assert not any(m.error for m in callback.trajectory)


def test_the_last_measurement_is_of_the_trained_model_and_its_optimiser(tmp_path):
    callback = CurvatureCallback(
        spectra.losses.causal_lm(),
        probe(),
        every=STEPS,
        record=("gradient", "preconditioned"),
        tol=1e-3,
    )
    trainer = trained(tmp_path, callback)
    model = trainer.model.eval()
    H = spectra.HessianOperator(model, spectra.losses.causal_lm(), probe())
    m = callback.trajectory[-1]
    assert m.step == STEPS
    A = H.to_dense().double().numpy()
    assert m.sharpness == pytest.approx(np.linalg.eigvalsh(A)[-1], rel=1e-4)
    # Trainer's AdamW decays weights and biases differently: two groups.
    scale = spectra.preconditioner(trainer.optimizer, H).double().numpy() ** -0.5
    top = np.linalg.eigvalsh(scale[:, None] * A * scale)[-1]
    assert m.preconditioned_sharpness == pytest.approx(top, rel=1e-3)
    assert m.threshold_preconditioned


def test_measurements_are_in_the_log_that_the_trainer_saves(tmp_path):
    callback = CurvatureCallback(spectra.losses.causal_lm(), probe(), steps=(0, 3, 8))
    trainer = trained(tmp_path, callback)
    rows = [r for r in trainer.state.log_history if "curvature/sharpness" in r]
    assert [r["step"] for r in rows] == [0, 3, 8]
    found = [m.sharpness for m in callback.trajectory]
    assert [r["curvature/sharpness"] for r in rows] == found
    trainer.state.save_to_json(str(tmp_path / "state.json"))


def test_with_the_trainers_own_log_they_reach_what_it_reports_to(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    callback = CurvatureCallback(spectra.losses.causal_lm(), probe(), every=4)
    trainer = trained(tmp_path, callback, log_to_trainer=True, reports="tensorboard")
    rows = [r for r in trainer.state.log_history if "curvature/sharpness" in r]
    assert [r["step"] for r in rows] == [0, 4, 8]
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    name = next(tag for tag in events.Tags()["scalars"] if tag.endswith("curvature/sharpness"))
    read = events.Scalars(name)
    assert [e.step for e in read] == [0, 4, 8]
    found = [m.sharpness for m in callback.trajectory]
    assert [e.value for e in read] == pytest.approx(found, rel=1e-6)


def test_a_second_training_has_a_trajectory_of_its_own(tmp_path):
    callback = CurvatureCallback(spectra.losses.causal_lm(), probe(), every=8, record=())
    trained(tmp_path, callback)
    trained(tmp_path, callback)
    assert [m.step for m in callback.trajectory] == [0, 8]


def test_without_transformers_the_extra_is_named(monkeypatch):
    from spectra.integrations.huggingface import callback

    monkeypatch.setattr(callback, "TrainerCallback", object)
    with pytest.raises(TargetError, match=r"pip install 'hessian-spectra\[hf\]'"):
        CurvatureCallback(spectra.losses.causal_lm(), probe())
