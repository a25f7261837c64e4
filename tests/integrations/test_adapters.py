"""PEFT adapters: their parameters are the ones that are analysed, and the frozen rest is cheap."""

import importlib.util
import json
import shutil
import warnings

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import spectra
from spectra.errors import LossError, TargetError
from spectra.integrations.huggingface import causal_lm, classifier, task_of
from tests.cases.checkpoints import SIZES, curved, save, word_tokenizer

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
peft = pytest.importorskip("peft")

TEXT = "the quick brown fox jumps over the lazy dog and the cat sleeps on a good mat " * 2
RANK, SCALE = 2, 4.0
# Two batches, of two sequences and of one that is shorter.
CUT = {"tokens_per_sequence": 8, "sequences_per_batch": 2, "max_tokens": 21}
IN_DOUBLE = {**CUT, "dtype": torch.float64}


def save_adapter(base, directory, *, drawn=True, **options):
    """Put a LoRA adapter on a model and write it; with `drawn`, one that was trained."""
    options = {"task_type": "CAUSAL_LM", "target_modules": ["c_attn"], **options}
    with warnings.catch_warnings():
        # Of transformers' own, about a name that peft uses.
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(3)
        model = peft.get_peft_model(base, peft.LoraConfig(r=RANK, lora_alpha=8, **options))
    if drawn:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.5)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """GPT-2, of which nothing is computed in single precision but transformers' own loss."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=SIZES["vocab_size"],
        n_positions=16,
        n_embd=8,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = curved(transformers.GPT2LMHeadModel(config))
    return save(model, tmp_path_factory.mktemp("base"), word_tokenizer())


def loaded(base):
    return transformers.GPT2LMHeadModel.from_pretrained(base)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return save_adapter(loaded(base), tmp_path_factory.mktemp("adapter"), fan_in_fan_out=True)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def dense(model, loss, data, parameters):
    """By double backward of the mean over all batches, with attention written out."""
    model.base_model.model.set_attn_implementation("eager")
    weights = [loss.weight(batch) for batch in data]
    mean = sum(w * loss(model, b) for w, b in zip(weights, data, strict=True)) / sum(weights)
    gradients = torch.autograd.grad(mean, parameters, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradients])
    rows = torch.autograd.grad(
        flat, parameters, torch.eye(len(flat)).to(flat), is_grads_batched=True
    )
    return torch.cat([r.reshape(len(flat), -1) for r in rows], dim=1)


def test_the_adapters_parameters_are_the_default_set(base, adapter, text):
    model, _, _ = causal_lm(adapter, text, **IN_DOUBLE)
    H = spectra.HessianOperator(model, *causal_lm(adapter, text, **IN_DOUBLE)[1:])
    # Two layers, each with A (2, 8) and B (24, 2).
    assert H.shape[0] == 2 * (RANK * 8 + 24 * RANK)
    assert all("lora_" in name for name in H.space.names)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    held = peft.load_peft_weights(str(adapter))
    for name, value in peft.get_peft_model_state_dict(model).items():
        torch.testing.assert_close(value, held[name].double(), rtol=0, atol=0)


def test_the_adapters_hessian_is_its_block_of_the_dense_one(adapter, text):
    model, loss, data = causal_lm(adapter, text, **IN_DOUBLE)
    found = spectra.HessianOperator(model, loss, data).to_dense()
    places, start = [], 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            places += range(start, start + parameter.numel())
        start += parameter.numel()
        parameter.requires_grad_()
    everything = dense(model, loss, data, list(model.parameters()))
    block = everything[places][:, places]
    assert len(block) < len(everything) / 10
    assert block.abs().max() > 0.1
    torch.testing.assert_close(found, block, rtol=1e-9, atol=1e-11)


def test_an_adapter_at_its_start_has_a_block_of_zeros_for_a(base, text, tmp_path):
    """B = 0: the loss does not depend on A there. Its mixed block with B need not vanish."""
    directory = save_adapter(loaded(base), tmp_path, drawn=False, fan_in_fan_out=True)
    H = spectra.HessianOperator(*causal_lm(directory, text, **IN_DOUBLE))
    matrix, gradient = H.to_dense(), H.gradient()
    a = [i for n, s in H.space.slices.items() if "lora_A" in n for i in range(s.start, s.stop)]
    b = [i for i in range(len(matrix)) if i not in set(a)]
    assert torch.equal(matrix[a][:, a], torch.zeros(len(a), len(a), dtype=torch.float64))
    assert torch.equal(gradient[a], torch.zeros(len(a), dtype=torch.float64))
    assert matrix[b][:, b].abs().max() > 0.1
    assert matrix[a][:, b].abs().max() > 0.1
    assert not H.block("*lora_A*").to_dense().any()


def test_merged_into_the_base_the_loss_is_the_same_and_curves_as_the_chain_rule_says(adapter, text):
    """W = W0 + s B A is linear in B, so H_BB is the image of H_WW."""
    model, loss, data = causal_lm(adapter, text, **IN_DOUBLE)
    H = spectra.HessianOperator(model, loss, data)
    value = H.value()
    name = next(n for n in H.space.names if "h.0" in n and "lora_B" in n)
    H_B = H.block(name)
    v = torch.randn(H_B.shape[0], dtype=torch.float64)
    A = dict(model.named_parameters())[name.replace("lora_B", "lora_A")].detach().clone()
    form = float(v @ (H_B @ v))
    merged = model.merge_and_unload()
    H_W = spectra.HessianOperator(merged, loss, data, "*h.0.attn.c_attn.weight")
    # Conv1D holds its weight transposed.
    w = (SCALE * (v.view(24, RANK) @ A).T).reshape(-1)
    assert H_W.value() == pytest.approx(value, rel=1e-12)
    assert float(w @ (H_W @ w)) == pytest.approx(form, rel=1e-9)


def test_merged_but_still_listed_its_parameters_are_named_as_unused(adapter, text):
    model, loss, data = causal_lm(adapter, text, **IN_DOUBLE)
    model.merge_adapter()
    with pytest.raises(LossError, match="does not depend on the selected parameters"):
        spectra.HessianOperator(model, loss, data).to_dense()


def flops(operator):
    v = torch.ones(operator.shape[0], dtype=operator.space.dtype)
    with FlopCounterMode(display=False) as counter:
        operator @ v
    return counter.get_total_flops()


def test_the_frozen_base_costs_less_and_nothing_where_no_adapter_is_below(base, text, tmp_path):
    last = save_adapter(
        loaded(base), tmp_path / "last", fan_in_fan_out=True, layers_to_transform=[1]
    )
    both = save_adapter(loaded(base), tmp_path / "both", fan_in_fan_out=True)
    counts = {}
    for name, place in (("base", base), ("both", both), ("last", last)):
        problem = causal_lm(place, text, **CUT)
        counts[name] = flops(spectra.HessianOperator(*problem, graph="fresh"))
    assert counts["both"] < 0.6 * counts["base"]
    assert counts["last"] < 0.65 * counts["both"]


def test_a_classifier_whose_head_is_the_adapters_own(tmp_path):
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    place = save(curved(llama), tmp_path / "base", word_tokenizer())
    options = {"num_labels": 4, "pad_token_id": 0}
    head = transformers.LlamaForSequenceClassification.from_pretrained(place, **options)
    directory = save_adapter(
        head, tmp_path / "adapter", task_type="SEQ_CLS", target_modules=["q_proj"]
    )
    assert task_of(directory) == "classify"
    rows = [{"text": "the cat jumps", "label": 3}, {"text": "a dog", "label": 0}]
    model, loss, data = classifier(directory, rows, dtype=torch.float64)
    H = spectra.HessianOperator(model, loss, data)
    # A (2, 8), B (8, 2), and the head (4, 8), which counts once.
    assert H.shape[0] == 16 + 16 + 32
    found = H.to_dense()
    expected = dense(model, loss, data, [p for p in model.parameters() if p.requires_grad])
    # Single precision: the model's norms are computed in it.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert expected.abs().max() > 0.1


def test_the_task_of_an_adapter_is_read_off_it_or_its_base(base, adapter, tmp_path):
    assert task_of(adapter) == "causal"
    assert (
        task_of(save_adapter(loaded(base), tmp_path, task_type=None, fan_in_fan_out=True))
        == "causal"
    )


def test_half_precision_is_that_of_the_adapter_too(adapter, text):
    model, _, _ = causal_lm(adapter, text, **CUT, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_base_and_adapter_may_have_been_moved_together(base, adapter, text, tmp_path):
    shutil.copytree(base, tmp_path / "adapter" / "base")
    shutil.copytree(adapter, tmp_path / "adapter", dirs_exist_ok=True)
    edit(tmp_path / "adapter", base_model_name_or_path="base")
    values = [
        spectra.HessianOperator(*causal_lm(place, text, **IN_DOUBLE)).value()
        for place in (adapter, tmp_path / "adapter")
    ]
    assert values[0] == values[1]


def edit(directory, **options):
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, **options}), encoding="utf-8")


def test_an_adapter_whose_base_is_not_here_names_it(adapter, text, tmp_path):
    place = shutil.copytree(adapter, tmp_path / "adapter")
    edit(place, base_model_name_or_path="organisation/model")
    with pytest.raises(TargetError, match=r"'organisation/model', which is no local directory"):
        causal_lm(place, text)


def test_an_adapter_without_safe_weights_is_refused(adapter, text, tmp_path):
    place = shutil.copytree(adapter, tmp_path / "adapter")
    (place / "adapter_model.safetensors").unlink()
    with pytest.raises(TargetError, match=r"no adapter_model.safetensors; save the adapter"):
        causal_lm(place, text)
    torch.save({}, place / "adapter_model.bin")
    with pytest.raises(TargetError, match=r"its adapter only as a pickle, which can run code"):
        causal_lm(place, text)


@pytest.mark.parametrize(
    "options",
    [
        {"megatron_config": {"a": 1}, "megatron_core": "evil"},
        {"tokenizer_kwargs": {"trust_remote_code": True}},
    ],
    ids=min,
)
def test_an_adapter_that_names_code_to_import_is_refused(adapter, text, tmp_path, options):
    place = shutil.copytree(adapter, tmp_path / "adapter")
    edit(place, **options)
    with pytest.raises(TargetError, match=r"import code, and none from a checkpoint is run"):
        causal_lm(place, text)


def test_damaged_weights_of_an_adapter_are_named(adapter, text, tmp_path):
    place = shutil.copytree(adapter, tmp_path / "adapter")
    (place / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(TargetError, match=r"cannot read the adapter .*SafetensorError"):
        causal_lm(place, text)


@pytest.mark.parametrize("layers", [[0], [0, 1]])
def test_an_adapter_of_another_model_is_refused(layers, base, text, tmp_path):
    """Its weights would be left out, or random ones put in their place."""
    place = save_adapter(loaded(base), tmp_path, fan_in_fan_out=True, layers_to_transform=layers)
    edit(place, layers_to_transform=[0, 1] if layers == [0] else [0])
    with pytest.raises(TargetError, match=r"do not belong together: they differ in 2 weights"):
        causal_lm(place, text)


def test_an_adapter_that_peft_does_not_know_is_named(adapter, text, tmp_path):
    place = shutil.copytree(adapter, tmp_path / "adapter")
    edit(place, target_modules=["no_such_layer"])
    with pytest.raises(TargetError, match=r"peft could not load the adapter .*no_such_layer"):
        causal_lm(place, text)


def test_a_missing_package_is_named_with_the_extra(adapter, text, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "peft" else find(name)
    )
    with pytest.raises(TargetError, match=r"a PEFT adapter needs peft: pip install"):
        causal_lm(adapter, text)
