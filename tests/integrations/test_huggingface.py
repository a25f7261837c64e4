import importlib.util
import json
import shutil
import socket

import numpy as np
import pytest
import torch

import spectra
from spectra.errors import ArgumentError, TargetError
from spectra.integrations.huggingface import causal_lm

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

TEXT = "the quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 6
SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("something wants to use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def trained_tokenizer(begins=False):
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(set(tokenizers.pre_tokenizers.ByteLevel().pre_tokenize_str(TEXT)[0][0]))
    core.train_from_iterator(
        [TEXT],
        tokenizers.trainers.BpeTrainer(
            vocab_size=60,
            special_tokens=["<s>"],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    if begins:
        core.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>")


def save(model, directory, *, tokenizer=True, begins=False):
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    model.save_pretrained(directory)
    if tokenizer:
        trained_tokenizer(begins).save_pretrained(directory)
    return directory


def gpt2(vocab_size=60):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=vocab_size,
        n_positions=32,
        n_embd=8,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


def llama_config(**options):
    return transformers.LlamaConfig(
        vocab_size=60, intermediate_size=12, max_position_embeddings=32, **SIZES, **options
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny GPT-2 with a tokenizer, as a directory."""
    return save(gpt2(), tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_the_loss_is_the_mean_over_all_predicted_tokens(saved, text):
    model, loss, data = causal_lm(
        saved, text, tokens_per_sequence=20, max_tokens=90, dtype=torch.float64
    )
    tokens = trained_tokenizer()(TEXT)["input_ids"][:90]
    # The same by hand: every piece alone, without padding.
    losses = []
    for start in range(0, 90, 20):
        piece = torch.tensor([tokens[start : start + 20]])
        logits = model(piece).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, piece[0, 1:], reduction="none"))
    expected = torch.cat(losses)
    assert [tuple(batch["input_ids"].shape) for batch in data] == [(4, 20), (1, 10)]
    assert sum(loss.weight(batch) for batch in data) == len(expected) == 4 * 19 + 9
    value = spectra.HessianOperator(model, loss, data).value()
    assert value == pytest.approx(float(expected.mean().detach()), rel=1e-12)


def test_how_sequences_are_batched_does_not_change_the_hessian(saved, text):
    matrices = []
    for size in (1, 3, 100):
        model, loss, data = causal_lm(
            saved,
            text,
            tokens_per_sequence=15,
            sequences_per_batch=size,
            max_tokens=70,
            dtype=torch.float64,
        )
        assert len(data) == {1: 5, 3: 2, 100: 1}[size]
        H = spectra.HessianOperator(model, loss, data, "transformer.ln_f.*")
        matrices.append(H.to_dense().numpy())
    np.testing.assert_allclose(matrices[1], matrices[0], atol=1e-12)
    np.testing.assert_allclose(matrices[2], matrices[0], atol=1e-12)
    assert np.abs(matrices[0]).max() > 1e-4


def test_the_last_sequence_is_padded_and_the_padding_masked(saved, text):
    _, _, data = causal_lm(
        saved, text, tokens_per_sequence=20, sequences_per_batch=3, max_tokens=50
    )
    assert data[0]["attention_mask"].sum(dim=1).tolist() == [20, 20, 10]
    assert data[0]["input_ids"].shape == (3, 20)


def test_a_single_token_left_over_is_dropped(saved, text):
    _, loss, data = causal_lm(saved, text, tokens_per_sequence=20, max_tokens=41)
    assert sum(loss.weight(batch) for batch in data) == 2 * 19


def test_sequences_begin_as_the_tokenizer_begins_a_text(tmp_path, text):
    directory = save(
        transformers.LlamaForCausalLM(llama_config(bos_token_id=0)), tmp_path, begins=True
    )
    _, _, data = causal_lm(directory, text, tokens_per_sequence=10, max_tokens=27)
    tokens = trained_tokenizer()(TEXT)["input_ids"]
    assert data[0]["input_ids"][:, 0].tolist() == [0, 0, 0]
    assert data[0]["input_ids"][:, 1:].flatten().tolist() == tokens[:27]


def test_the_model_is_float32_in_evaluation_mode_unless_asked_otherwise(saved, text):
    model, _, _ = causal_lm(saved, text, tokens_per_sequence=20)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    model, _, _ = causal_lm(saved, text, tokens_per_sequence=20, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_nothing_is_printed(saved, text, capfd):
    causal_lm(saved, text, tokens_per_sequence=20)
    assert capfd.readouterr() == ("", "")


def test_a_mixture_of_experts_is_loaded_with_products_in_double_precision(tmp_path, text):
    config = transformers.MixtralConfig(
        vocab_size=60,
        intermediate_size=12,
        max_position_embeddings=32,
        num_key_value_heads=1,
        num_local_experts=3,
        num_experts_per_tok=2,
        **SIZES,
    )
    directory = save(transformers.MixtralForCausalLM(config), tmp_path)
    problem = causal_lm(directory, text, tokens_per_sequence=20, dtype=torch.float64)
    H = spectra.HessianOperator(*problem)
    assert (H @ torch.ones(H.shape[0], dtype=torch.float64)).norm() > 1e-3
    assert "sends each token to 2 of 3 experts" in H.describe()["notes"][0]


def write_gguf(path, model, tokenizer):
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    config, weights = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = tokenizer.get_vocab()
    words = sorted(vocabulary, key=vocabulary.get)
    merges = [" ".join(pair) for pair in _merges(tokenizer)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3 if word == "<s>" else 1 for word in words])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers.0.input_layernorm": "blk.0.attn_norm",
        "model.layers.0.post_attention_layernorm": "blk.0.ffn_norm",
        **{f"model.layers.0.self_attn.{x}_proj": f"blk.0.attn_{x}" for x in "qkv"},
        "model.layers.0.self_attn.o_proj": "blk.0.attn_output",
        **{f"model.layers.0.mlp.{x}_proj": f"blk.0.ffn_{x}" for x in ("gate", "up", "down")},
    }
    for name, short in names.items():
        writer.add_tensor(f"{short}.weight", weights[f"{name}.weight"].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _merges(tokenizer):
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]


def test_a_gguf_file_is_read_by_its_directory_or_by_its_name(tmp_path, text):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(llama_config(bos_token_id=0))
    write_gguf(tmp_path / "model.gguf", model, trained_tokenizer())
    for place in (tmp_path, tmp_path / "model.gguf"):
        read, loss, data = causal_lm(place, text, tokens_per_sequence=20, max_tokens=60)
        assert torch.equal(read.lm_head.weight, model.lm_head.weight)
        assert 2 < spectra.HessianOperator(read, loss, data).value() < 6


def test_of_several_gguf_files_one_must_be_named(tmp_path, text):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(TargetError, match=r"2 GGUF files \(a.gguf, b.gguf\); name one"):
        causal_lm(tmp_path, text)


def test_a_missing_directory_is_named_and_nothing_downloaded(tmp_path, text):
    with pytest.raises(TargetError, match=r"no model directory .*Nothing is downloaded"):
        causal_lm("organisation/model", text)


def test_a_directory_without_a_model_says_what_is_missing(saved, tmp_path, text):
    with pytest.raises(TargetError, match=r"neither a config.json nor a GGUF file"):
        causal_lm(tmp_path, text)
    shutil.copy(saved / "config.json", tmp_path)
    with pytest.raises(TargetError, match=r"a config.json but no weights"):
        causal_lm(tmp_path, text)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(TargetError, match=r"only as a pickle, .*convert them to safetensors"):
        causal_lm(tmp_path, text)


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_configuration_that_names_code_to_fetch_is_refused(saved, tmp_path, text, name, nested):
    place = shutil.copytree(saved, tmp_path / "model")
    setting = {name: "organisation/kernel"}
    config = json.loads((place / "config.json").read_text(encoding="utf-8"))
    config.update({"text_config": [setting]} if nested else setting)
    (place / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(TargetError, match=rf"sets {name} to 'organisation/kernel'.*remove the"):
        causal_lm(place, text)


def test_a_configuration_that_is_no_configuration_is_refused(saved, tmp_path, text):
    place = shutil.copytree(saved, tmp_path / "model")
    (place / "config.json").write_text("[" * 100_000)
    with pytest.raises(TargetError, match=r"cannot read .*config.json"):
        causal_lm(place, text)


def test_a_missing_tokenizer_is_named(saved, tmp_path, text):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(saved / name, tmp_path)
    with pytest.raises(TargetError, match=r"its files, such as tokenizer.json, are probably"):
        causal_lm(tmp_path, text)


def test_damaged_weights_are_named(saved, tmp_path, text):
    shutil.copytree(saved, tmp_path / "damaged")
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(TargetError, match=r"transformers could not load .*damaged"):
        causal_lm(tmp_path / "damaged", text, tokens_per_sequence=20)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        ("été".encode("latin-1"), "is not text in UTF-8"),
        (b"t", "holds 1 tokens; a prediction takes at least 2"),
        (None, "cannot read the text .*: No such file"),
    ],
)
def test_a_text_that_cannot_be_used_is_named(content, message, saved, tmp_path):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TargetError, match=message):
        causal_lm(saved, path)


def bert(kind):
    config = transformers.BertConfig(vocab_size=60, intermediate_size=12, **SIZES)
    return getattr(transformers, kind)(config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bert("BertModel"), "has no language-modelling head"),
        (lambda: transformers.LlamaModel(llama_config()), "such as lm_head.weight"),
        (lambda: bert("BertForMaskedLM"), "is not causal"),
        (
            lambda: transformers.T5ForConditionalGeneration(
                transformers.T5Config(
                    vocab_size=60, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2
                )
            ),
            "without a causal language-modelling loss",
        ),
    ],
)
def test_a_checkpoint_without_a_causal_head_is_refused(make, message, tmp_path, text):
    with pytest.raises(TargetError, match=rf"{message}.*give a TARGET: a function that returns"):
        causal_lm(save(make(), tmp_path), text, tokens_per_sequence=20)


def test_a_tokenizer_of_another_model_is_refused(tmp_path, text):
    with pytest.raises(TargetError, match="but the model has only 10: they do not belong"):
        causal_lm(save(gpt2(vocab_size=10), tmp_path), text, tokens_per_sequence=20)


def test_sequences_beyond_the_context_are_refused(saved, text):
    with pytest.raises(ArgumentError, match=r"sequences of 33 .* longer than the 32"):
        causal_lm(saved, text, tokens_per_sequence=33)


@pytest.mark.parametrize(
    "wrong", [{"tokens_per_sequence": 1}, {"sequences_per_batch": 0}, {"max_tokens": 1}]
)
def test_impossible_lengths_are_refused(wrong, saved, text):
    with pytest.raises(ArgumentError, match="expected at least 2, 1 and 2"):
        causal_lm(saved, text, **wrong)


def test_an_unknown_device_is_named(saved, text):
    with pytest.raises(TargetError, match="cannot be moved to device 'nowhere'"):
        causal_lm(saved, text, tokens_per_sequence=20, device="nowhere")


@pytest.mark.parametrize("missing", ["transformers", "gguf"])
def test_a_missing_package_is_named_with_the_extra(missing, saved, tmp_path, text, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == missing else find(name)
    )
    (tmp_path / "model.gguf").write_bytes(b"")
    place = tmp_path if missing == "gguf" else saved
    with pytest.raises(TargetError, match=rf"{missing}: pip install 'hessian-spectra\[hf\]'"):
        causal_lm(place, text)
