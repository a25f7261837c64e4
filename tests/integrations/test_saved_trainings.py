"""What real trainers save, tracked: transformers' Trainer, Lightning's, and PEFT's adapters."""

import math
import warnings

import numpy as np
import pytest
import torch

import spectra
from tests.cases.checkpoints import SIZES, curved, save, word_tokenizer
from tests.integrations.test_trainer_callback import Tokens, gpt, probe


def test_checkpoints_of_transformers_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        weight_decay=0.1,
        save_steps=3,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=5,
    )
    trainer = transformers.Trainer(model=gpt(), args=arguments, train_dataset=Tokens())
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    # `spectra.track` puts them into a model that was not trained.
    H = spectra.HessianOperator(gpt().eval(), spectra.losses.causal_lm(), probe())
    folders = [tmp_path / "checkpoint-6", tmp_path / "checkpoint-3"]
    trajectory = spectra.track(H, folders, record=("gradient",), tol=1e-4)
    assert [(m.step, m.label) for m in trajectory] == [(3, "checkpoint-3"), (6, "checkpoint-6")]
    # The output layer is tied to the embedding, and in the file once.
    last = spectra.HessianOperator(
        trainer.model.eval(), spectra.losses.causal_lm(), probe(), dtype=torch.float64
    )
    assert trajectory[1].loss == pytest.approx(last.value(), rel=1e-6)
    assert trajectory[1].sharpness == pytest.approx(
        spectra.eigsh(last, 1, which="LA", tol=1e-6).values[0], rel=2e-3
    )
    # AdamW, β₁ = 0.9, in two groups: with weight decay and without.
    assert trajectory[1].threshold == pytest.approx(
        spectra.stability_threshold(trainer.optimizer.optimizer).value
    )
    # After six steps.
    corrected = (2 - 0.001) * 1.9 / 0.1 / 0.01 * (1 - 0.9**6)
    assert trajectory[1].threshold == pytest.approx(corrected)


def test_checkpoints_of_lightnings_trainer(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = torch.nn.Sequential(
                torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)
            )

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, _):
            return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9, nesterov=True)

    torch.manual_seed(1)
    data = [(torch.randn(12, 4), torch.randint(3, (12,))) for _ in range(3)]
    saving = lightning.pytorch.callbacks.ModelCheckpoint(
        tmp_path, every_n_train_steps=2, save_top_k=-1
    )
    module = Module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            max_epochs=2,
            callbacks=[saving],
            logger=False,
            accelerator="cpu",
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))
    files = sorted(tmp_path.glob("*.ckpt"))
    loss = spectra.losses.supervised(torch.nn.CrossEntropyLoss())
    # Into the module, and into the network inside of it.
    for model in (Module(), Module().net):
        H = spectra.HessianOperator(model.eval(), loss, data)
        trajectory = spectra.track(H, files, tol=1e-5)
        assert [m.step for m in trajectory] == [2, 4, 6]
        own = spectra.HessianOperator(
            module.net.eval().double(), loss, [(x.double(), y) for x, y in data]
        )
        top = np.linalg.eigvalsh(own.to_dense().numpy())[-1]
        assert trajectory[2].sharpness == pytest.approx(top, rel=1e-4)
        assert trajectory[2].threshold == pytest.approx(2 * 1.9 / 2.8 / 0.2)


def test_adapters_that_peft_saved(tmp_path):
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    from spectra.integrations.huggingface import causal_lm
    from tests.integrations.test_adapters import save_adapter

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=SIZES["vocab_size"],
        n_positions=16,
        n_embd=8,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    base = save(curved(transformers.GPT2LMHeadModel(config)), tmp_path / "base", word_tokenizer())
    folders = [tmp_path / f"checkpoint-{step}" for step in (10, 20)]
    for drawn, folder in zip((False, True), folders, strict=True):
        model = transformers.GPT2LMHeadModel.from_pretrained(base)
        save_adapter(model, folder, drawn=drawn, fan_in_fan_out=True)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 3)
    H = spectra.HessianOperator(*causal_lm(folders[0], text, tokens_per_sequence=8))
    trajectory = spectra.track(H, folders, tol=1e-5)
    assert [m.step for m in trajectory] == [10, 20]
    for folder, m in zip(folders, trajectory, strict=True):
        own = spectra.HessianOperator(*causal_lm(folder, text, tokens_per_sequence=8))
        top = np.linalg.eigvalsh(own.to_dense().double().numpy())[-1]
        assert m.sharpness == pytest.approx(top, rel=1e-3)
        assert math.isnan(m.threshold)
    assert isinstance(H.objective.model, peft.PeftModel)
    # A whole model is no adapter.
    with pytest.raises(spectra.errors.ArgumentError, match="are not those of the PeftModel"):
        spectra.track(H, [base])
