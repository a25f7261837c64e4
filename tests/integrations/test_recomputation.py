"""transformers' architectures with everything that saves memory switched on at once."""

import contextlib
import copy

import pytest
import torch

import spectra
from spectra.oracle import chunks
from spectra.oracle.segments import repeated_blocks
from tests.cases.chunks import chunks_of
from tests.integrations.test_architectures import (
    CAUSAL,
    CLASSIFIERS,
    IMAGES,
    LOSSES,
    MASKED,
    SEQUENCES,
    DoublePrecision,
    build,
    probes,
)

transformers = pytest.importorskip("transformers")

DEPTHS = ("n_layer", "num_layers")


def deep(kind):
    """A model of two layers, with its loss and two batches of unequal size."""
    options, make_batch, loss = LOSSES[kind]
    depth = next((name for name in DEPTHS if name in options), "num_hidden_layers")
    model = build(kind, {**options, depth: 2})
    batch = make_batch(model)
    parts = [{key: value[rows] for key, value in batch.items()} for rows in ([0, 1], [2])]
    return model, loss, parts


def products(model, loss, parts, **options):
    H = spectra.HessianOperator(model, loss, parts, **options)
    return H @ probes(H.shape[0], 2).to(H.space.dtype), H


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@contextlib.contextmanager
def all_in_chunks():
    with pytest.MonkeyPatch.context() as patch, chunks_of(2):
        patch.setattr(chunks, "_BYTES", 0)
        patch.setattr(chunks, "_FEWEST_QUERIES", 2)
        yield


@pytest.mark.parametrize("graph", ["fresh", "retained"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", list(LOSSES))
def test_recomputed_layers_attention_and_logits_in_chunks_change_nothing(kind, attention, graph):
    model, loss, parts = deep(kind)
    if attention == "sdpa" and not model._supports_sdpa:
        pytest.skip("transformers has no sdpa for it")
    model.config._attn_implementation = attention
    blocks = list(repeated_blocks(model))
    assert len(blocks) == (4 if kind in SEQUENCES else 2)
    with DoublePrecision():
        expected, _ = products(model, loss, parts, recompute="none")
        found, H = products(model, loss, parts, recompute=blocks, graph=graph)
        assert relative(found, expected) < 1e-12
        with all_in_chunks():
            found, H = products(model, loss, parts, recompute=blocks, graph=graph)
            assert relative(found, expected) < 1e-12
    described = H.describe()
    assert described["recompute"] == {"blocks": len(blocks)}
    if "Mamba" not in kind:
        assert described["attention"] == "in chunks of queries"
    if kind in {**CAUSAL, **MASKED}:
        assert described["loss_head"] == "in chunks of 2 tokens"


@pytest.mark.parametrize("kind", list(LOSSES))
def test_half_precision_in_storage_computes_in_single(kind):
    model, loss, parts = deep(kind)
    model = model.bfloat16()
    # What the data have, both models get.
    parts = [
        {k: v.float() if v.is_floating_point() else v for k, v in part.items()} for part in parts
    ]
    expected, _ = products(copy.deepcopy(model).float(), loss, parts, recompute="none")
    found, _ = products(model, loss, parts, compute_dtype=torch.float32)
    assert relative(found, expected) < 1e-5
    with all_in_chunks():
        found, H = products(model, loss, parts, compute_dtype=torch.float32)
    assert relative(found, expected) < 1e-5
    if kind in {**CAUSAL, **MASKED}:
        assert H.describe()["loss_head"] == "in chunks of 2 tokens"


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("recompute", ["none", "auto", "layers"])
@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "LlamaForCausalLM", "BertForMaskedLM"])
def test_checkpointing_of_hugging_faces_own_is_right_with_dropout(kind, recompute, reentrant):
    model, loss, parts = deep(kind)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    model.train()
    blocks = list(repeated_blocks(model))
    options = {"allow_training_mode": True}
    with DoublePrecision():
        expected, _ = products(model, loss, parts, recompute="none", **options)
        # The name changed in version 5.23.
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": reentrant})
        chosen = blocks if recompute == "layers" else recompute
        found, _ = products(model, loss, parts, recompute=chosen, **options)
    assert relative(found, expected) < 1e-12
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_one_block_called_many_times_is_recomputed_each_time():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 10, "num_attention_heads": 2}
    config = transformers.AlbertConfig(
        vocab_size=13, embedding_size=6, num_hidden_layers=3, pad_token_id=0, **sizes
    )
    model = transformers.AlbertForMaskedLM(config).double().eval()
    _, make_batch, loss = LOSSES["BertForMaskedLM"]
    parts = [make_batch(model)]
    with DoublePrecision():
        expected, _ = products(model, loss, parts, recompute="none")
        found, _ = products(model, loss, parts, recompute="*albert_layers.0")
    assert relative(found, expected) < 1e-12


def test_hooks_that_place_a_model_on_devices_are_kept():
    accelerate = pytest.importorskip("accelerate")
    model, loss, parts = deep("LlamaForCausalLM")
    with DoublePrecision():
        expected, _ = products(model, loss, parts, recompute="none")
        placed = accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
        hooked = placed.model.layers[0].forward
        found, _ = products(placed, loss, parts, recompute="model.layers.*")
    assert relative(found, expected) < 1e-12
    assert placed.model.layers[0].forward == hooked


def test_there_is_no_kind_without_a_test():
    assert set(LOSSES) == {**CAUSAL, **MASKED, **CLASSIFIERS, **IMAGES, **SEQUENCES}.keys()
