"""transformers' architectures with everything that saves memory switched on at once."""

import contextlib
import copy
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import spectra
from spectra.errors import DoubleBackwardError
from spectra.oracle import chunks
from spectra.oracle.recompute import UnsuitableSegmentError
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


@pytest.mark.parametrize(
    "kind",
    [
        "GPT2LMHeadModel",
        "LlamaForCausalLM",
        "MixtralForCausalLM",
        "BertForMaskedLM",
        "ViTForImageClassification",
        "T5ForConditionalGeneration",
    ],
)
def test_half_precision_in_storage_computes_in_double(kind):
    model, loss, parts = deep(kind)
    model = model.bfloat16()
    with DoublePrecision():
        expected, _ = products(copy.deepcopy(model).double(), loss, parts, recompute="none")
        with all_in_chunks():
            found, _ = products(model, loss, parts, compute_dtype=torch.float64)
    assert relative(found, expected) < 1e-12


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
        model = model.bfloat16()
        expected, _ = products(copy.deepcopy(model).double(), loss, parts, recompute="none")
        found, _ = products(
            model, loss, parts, recompute="*albert_layers.0", compute_dtype=torch.float64
        )
    assert relative(found, expected) < 1e-12


def own_loss(model, batch):
    """As most people write it: caches of keys and values are filled along the way."""
    return model(**batch).loss


def with_routers(model, batch):
    return model(**batch, output_router_logits=True).loss


def with_attentions(model, batch):
    output = model(**batch, output_attentions=True)
    return output.loss + sum(weights.square().sum() for weights in output.attentions)


def with_hidden_states(model, batch):
    output = model(**batch, output_hidden_states=True)
    return output.loss + sum(states.square().mean() for states in output.hidden_states)


@pytest.mark.parametrize(
    "kind",
    ["GPT2LMHeadModel", "LlamaForCausalLM", "MambaForCausalLM", "T5ForConditionalGeneration"],
)
@pytest.mark.parametrize("loss", [own_loss, with_hidden_states])
def test_caches_are_switched_off_where_blocks_are_computed_again(kind, loss):
    model, _, parts = deep(kind)
    if loss is with_hidden_states and kind in SEQUENCES:
        pytest.skip("has two lists of them, of other names")
    blocks = list(repeated_blocks(model))
    with DoublePrecision():
        expected, _ = products(model, loss, parts, recompute="none")
        for options in ({"recompute": blocks}, {"memory_budget": 0}):
            found, H = products(model, loss, parts, **options)
            assert relative(found, expected) < 1e-12
            assert H.describe()["recompute"]["blocks"] == len(blocks)
    assert model.config.use_cache


@pytest.mark.parametrize(
    ("kind", "loss"),
    [
        ("MixtralForCausalLM", with_routers),
        ("LlamaForCausalLM", with_attentions),
        ("BertForMaskedLM", with_attentions),
    ],
)
def test_what_is_collected_from_within_blocks_is_not_lost(kind, loss):
    model, _, parts = deep(kind)
    # Others return no attention weights.
    model.config._attn_implementation = "eager"
    blocks = list(repeated_blocks(model))
    with DoublePrecision():
        expected, _ = products(model, loss, parts, recompute="none")
        # It has an influence.
        assert relative(products(model, own_loss, parts, recompute="none")[0], expected) > 1e-4
        with pytest.raises(UnsuitableSegmentError, match="such as attention weights or the logits"):
            products(model, loss, parts, recompute=blocks)
        found, H = products(model, loss, parts, memory_budget=0)
    assert relative(found, expected) < 1e-12
    assert "no block is recomputed" in " ".join(H.describe()["recompute"]["because"])


class Flops(TorchDispatchMode):
    """Counts the operations of matrix products, as `FlopCounterMode` does with fewer hooks."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        count = flop_registry.get(function._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


def test_blocks_below_the_first_adapter_are_not_recomputed():
    peft = pytest.importorskip("peft")
    costs = []
    for depth in (1, 4):
        options, make_batch, loss = LOSSES["LlamaForCausalLM"]
        model = build("LlamaForCausalLM", {**options, "num_hidden_layers": depth})
        config = peft.LoraConfig(
            r=2,
            target_modules=["q_proj", "v_proj"],
            layers_to_transform=[depth - 1],
            init_lora_weights=False,
        )
        with warnings.catch_warnings():
            # Of transformers' own, about a name that peft uses.
            warnings.simplefilter("ignore", FutureWarning)
            model = peft.get_peft_model(model, config).double().eval()
        parts = [make_batch(model)]
        blocks = list(repeated_blocks(model)) or ["*layers.0"]
        with DoublePrecision():
            expected, _ = products(model, loss, parts, recompute="none")
            found, _ = products(model, loss, parts, recompute=blocks)
        assert relative(found, expected) < 1e-12
        for choice in ("none", blocks):
            H = spectra.HessianOperator(model, loss, parts, recompute=choice, graph="fresh")
            with Flops() as count:
                H @ probes(H.shape[0], 1)
            costs.append(count.total)
    plain, recomputed, deep_plain, deep_recomputed = costs
    # Three more blocks cost one forward pass each, and the recomputed one what it costs alone.
    assert deep_plain > plain
    assert deep_recomputed - deep_plain == recomputed - plain > 0


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "GPT2LMHeadModel", "BertForMaskedLM"])
def test_hooks_on_blocks_and_in_them_act_as_without_segments(kind):
    def larger(module, args, output):
        return output * 1.1

    model, loss, parts = deep(kind)
    blocks = [model.get_submodule(name) for name in repeated_blocks(model)]
    calls = []
    blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for module in (list(blocks[0].modules())[-1], blocks[1]):
        module.register_forward_hook(larger)
    options = {"graph": "fresh", "recompute": list(repeated_blocks(model))}
    with DoublePrecision():
        expected, _ = products(model, loss, parts, recompute="none")
        calls.clear()
        found, _ = products(model, loss, parts, **options)
        assert relative(found, expected) < 1e-12
        assert len(calls) == len(parts)
        model = model.bfloat16()
        expected, _ = products(copy.deepcopy(model).double(), loss, parts, recompute="none")
        found, _ = products(model, loss, parts, compute_dtype=torch.float64, **options)
    assert relative(found, expected) < 1e-12


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_is_refused_by_name():
    # Of the compiler itself are the warnings.
    model, loss, parts = deep("GPT2LMHeadModel")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with pytest.raises(DoubleBackwardError, match="pass the model before compilation"):
        products(compiled, loss, parts, recompute="*h.[01]")


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
        stored = copy.deepcopy(model).bfloat16()
        expected, _ = products(copy.deepcopy(stored).double(), loss, parts, recompute="none")
        placed = accelerate.dispatch_model(stored, {"": "cpu"}, force_hooks=True)
        found, _ = products(placed, loss, parts, compute_dtype=torch.float64)
    assert relative(found, expected) < 1e-12


def test_there_is_no_kind_without_a_test():
    assert set(LOSSES) == {**CAUSAL, **MASKED, **CLASSIFIERS, **IMAGES, **SEQUENCES}.keys()
