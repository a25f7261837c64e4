"""Hessians of transformers' architectures beside dense ones of transformers' own losses."""

import functools

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import spectra
from spectra.errors import DoubleBackwardError, LossError
from spectra.objective.modes import discontinuous_modules

transformers = pytest.importorskip("transformers")

VOCABULARY = 13
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "intermediate_size": 10,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
    "pad_token_id": 0,
}
GROUPED = {**SIZES, "num_key_value_heads": 1, "head_dim": 4}
# 12: grouped_mm multiplies rows of 16 bytes only.
EXPERTS = {**GROUPED, "num_experts_per_tok": 2, "intermediate_size": 12}
CAUSAL = {
    "GPT2LMHeadModel": {
        "vocab_size": VOCABULARY,
        "n_embd": 8,
        "n_layer": 1,
        "n_head": 2,
        "n_positions": 8,
        "n_inner": 10,
    },
    "LlamaForCausalLM": GROUPED,
    "Qwen2ForCausalLM": GROUPED,
    "Qwen3ForCausalLM": GROUPED,
    "MistralForCausalLM": GROUPED,
    "GemmaForCausalLM": GROUPED,
    "Gemma2ForCausalLM": GROUPED,
    "Gemma3ForCausalLM": GROUPED,
    "Phi3ForCausalLM": {**SIZES, "num_key_value_heads": 1},
    "GPTNeoXForCausalLM": SIZES,
    "OPTForCausalLM": {**SIZES, "ffn_dim": 10, "word_embed_proj_dim": 8},
    "MambaForCausalLM": {**SIZES, "state_size": 3},
    "MixtralForCausalLM": {**EXPERTS, "num_local_experts": 3},
    "Qwen3MoeForCausalLM": {**EXPERTS, "num_experts": 3, "moe_intermediate_size": 5},
}
MASKED = {
    "BertForMaskedLM": SIZES,
    "RobertaForMaskedLM": {**SIZES, "max_position_embeddings": 12},
    "ModernBertForMaskedLM": SIZES,
}
CLASSIFIERS = {
    "BertForSequenceClassification": {**SIZES, "num_labels": 3},
    "LlamaForSequenceClassification": {**GROUPED, "num_labels": 3},
}
IMAGES = {
    "ViTForImageClassification": {
        "hidden_size": 8,
        "intermediate_size": 10,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "num_channels": 1,
        "num_labels": 3,
    }
}
SEQUENCES = {
    "T5ForConditionalGeneration": {
        "vocab_size": VOCABULARY,
        "d_model": 8,
        "d_kv": 4,
        "d_ff": 10,
        "num_layers": 1,
        "num_heads": 2,
        "decoder_start_token_id": 0,
    }
}
# Others have a ReLU or a choice of experts, which a difference of gradients may step across.
KINKED = {"OPTForCausalLM", "T5ForConditionalGeneration", "MixtralForCausalLM"}


class DoublePrecision(TorchFunctionMode):
    """Within it nothing leaves double precision: many models compute parts of them in single."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64:
            if function is torch.Tensor.float:
                return args[0]
            args = [torch.float64 if a is torch.float32 else a for a in args]
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return function(*args, **kwargs)


def build(kind, options):
    """A model with weights large enough for every part to curve the loss."""
    torch.manual_seed(0)
    head = getattr(transformers, kind)
    model = head(head.config_class(**options)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


def texts():
    """Three texts of unequal length, padded; more than half of all tokens are labelled."""
    g = torch.Generator().manual_seed(3)
    tokens = torch.randint(1, VOCABULARY, (3, 6), generator=g)
    mask = (torch.arange(6) < torch.tensor([6, 3, 5])[:, None]).long()
    return tokens.masked_fill(mask == 0, 0), mask


def causal_batch(_):
    tokens, mask = texts()
    labels = tokens.masked_fill(mask == 0, -100)
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def masked_batch(_):
    tokens, mask = texts()
    labels = tokens.masked_fill(mask == 0, -100)
    labels[:, ::2] = -100
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def classes_batch(_):
    tokens, mask = texts()
    return {"input_ids": tokens, "attention_mask": mask, "labels": torch.tensor([0, 2, 1])}


def image_batch(_):
    g = torch.Generator().manual_seed(3)
    pixels = torch.randn(3, 1, 8, 8, generator=g, dtype=torch.float64)
    return {"pixel_values": pixels, "labels": torch.tensor([0, 2, 1])}


def sequences_batch(model):
    batch = causal_batch(model)
    return {**batch, "decoder_input_ids": model._shift_right(batch["labels"])}


LOSSES = {
    kind: (options, make_batch, loss)
    for kinds, make_batch, loss in (
        (CAUSAL, causal_batch, spectra.losses.causal_lm()),
        (MASKED, masked_batch, spectra.losses.masked_lm()),
        (CLASSIFIERS, classes_batch, spectra.losses.classification()),
        (IMAGES, image_batch, spectra.losses.classification()),
        (SEQUENCES, sequences_batch, spectra.losses.masked_lm()),
    )
    for kind, options in kinds.items()
}


class InDoublePrecision:
    """A loss of which no part is computed in single precision."""

    def __init__(self, loss):
        self.loss, self.weight = loss, loss.weight

    def __call__(self, model, batch):
        with DoublePrecision():
            return self.loss(model, batch)


def own_gradient(model, batch, **options):
    """Of transformers' own loss on the whole batch, flat."""
    parameters = list(model.parameters())
    with DoublePrecision(), sdpa_kernel(SDPBackend.MATH):
        loss = model(**batch).loss
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, **options)
    return loss, torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).reshape(-1)
            for g, p in zip(gradients, parameters, strict=True)
        ]
    )


@functools.cache
def truth(kind):
    """Model, batch, and the loss, gradient and dense Hessian of transformers' own loss."""
    options, make_batch, _ = LOSSES[kind]
    model = build(kind, options)
    model.config._attn_implementation = "eager"
    batch = make_batch(model)
    loss, gradient = own_gradient(model, batch, create_graph=True)
    columns = torch.autograd.grad(
        gradient,
        list(model.parameters()),
        torch.eye(len(gradient), dtype=torch.float64),
        is_grads_batched=True,
        allow_unused=True,
    )
    matrix = torch.cat(
        [
            (torch.zeros(len(gradient), p.numel(), dtype=torch.float64) if c is None else c)
            .reshape(len(gradient), -1)
            .double()
            for c, p in zip(columns, model.parameters(), strict=True)
        ],
        dim=1,
    )
    return model, batch, loss.detach(), gradient.detach(), matrix


def operator_of(kind, model, batch, change=lambda loss: loss):
    """On two batches, of two samples and one."""
    parts = [{key: value[rows] for key, value in batch.items()} for rows in ([0, 1], [2])]
    if "attention_mask" in batch and "decoder_input_ids" not in batch:
        # The padding of the longest text of another batch is not there in practice.
        length = int(parts[1]["attention_mask"].sum())
        parts[1] = {k: v[:, :length] if v.dim() == 2 else v for k, v in parts[1].items()}
    return spectra.HessianOperator(model, change(LOSSES[kind][2]), parts)


def probes(n, count=3):
    g = torch.Generator().manual_seed(5)
    return torch.randn(n, count, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", list(LOSSES))
def test_products_are_those_of_the_dense_hessian(kind, attention):
    model, batch, loss, gradient, matrix = truth(kind)
    if attention == "sdpa" and not model._supports_sdpa:
        pytest.skip("has no such attention")
    model.config._attn_implementation = attention
    H = operator_of(kind, model, batch, InDoublePrecision)
    V = probes(len(matrix))
    value, found = H.value_and_gradient()
    products = H @ V
    scale = float(matrix.abs().max())
    assert scale > 0.1
    assert value == pytest.approx(float(loss), rel=1e-12)
    torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(products, matrix @ V, rtol=1e-10, atol=1e-11 * scale)
    # As the model computes it, in part in single precision.
    products = operator_of(kind, model, batch) @ V
    assert (products - matrix @ V).norm() / (matrix @ V).norm() < 1e-5


@pytest.mark.parametrize("kind", [kind for kind in LOSSES if kind not in KINKED])
def test_the_dense_hessian_is_the_difference_of_gradients(kind):
    model, batch, _, _, matrix = truth(kind)
    V = probes(len(matrix), 1)
    step = 1e-5
    vector = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    gradients = []
    for sign in (1, -1, 0):
        moved = vector + sign * step * V[:, 0]
        torch.nn.utils.vector_to_parameters(moved, model.parameters())
        gradients.append(own_gradient(model, batch)[1])
    difference = (gradients[0] - gradients[1]) / (2 * step)
    torch.testing.assert_close(difference, (matrix @ V)[:, 0], rtol=1e-5, atol=1e-5)


def test_the_kernel_of_experts_that_training_uses_gives_the_same_in_single_precision():
    _, batch, _, _, matrix = truth("MixtralForCausalLM")
    model = build("MixtralForCausalLM", CAUSAL["MixtralForCausalLM"]).float()
    model.set_experts_implementation("grouped_mm")
    H = operator_of("MixtralForCausalLM", model, batch)
    V = probes(len(matrix))
    products = (H @ V.float()).double()
    assert (products - matrix @ V).norm() / (matrix @ V).norm() < 1e-5


def test_the_choice_of_experts_is_named_as_what_it_is():
    model, batch, *_ = truth("MixtralForCausalLM")
    H = operator_of("MixtralForCausalLM", model, batch)
    [note] = H.describe()["notes"]
    assert (
        "'model.layers.0.mlp.gate' (MixtralTopKRouter) sends each token to 2 of 3 experts" in note
    )
    assert "the loss jumps where a choice changes" in note
    assert H.block("lm_head.*").describe()["notes"] == [note]
    analysis = spectra.analyze(H, k=1, density=False, trace=False)
    assert analysis.notes == (note,)
    assert f"note: {note}" in str(analysis)


@pytest.mark.parametrize("chosen", [1, 2])
def test_the_loss_jumps_where_the_choice_of_experts_changes(chosen):
    """The note's claim: along a line of router weights, between two values of one probability."""
    options = {**CAUSAL["MixtralForCausalLM"], "num_experts_per_tok": chosen}
    model = build("MixtralForCausalLM", options)
    batch = causal_batch(model)
    router = dict(model.named_parameters())["model.layers.0.mlp.gate.weight"]
    start, direction = router.detach().clone(), torch.ones_like(router)
    direction[1:] = 0
    losses = []
    for t in torch.linspace(-2, 2, 201, dtype=torch.float64):
        with torch.no_grad():
            router.copy_(start + t * direction)
            losses.append(float(model(**batch).loss))
    steps = torch.tensor(losses).diff().abs()
    # A continuous function would have steps of the same order everywhere.
    assert steps.max() > 10 * steps.median()


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("Qwen3MoeForCausalLM", [("model.layers.0.mlp.gate", 2, 3)]),
        ("LlamaForCausalLM", []),
        ("BertForMaskedLM", []),
        ("ViTForImageClassification", []),
    ],
)
def test_routers_are_found_and_nothing_else_is_taken_for_one(kind, found):
    named = discontinuous_modules(truth(kind)[0])
    assert [name for name, _ in named] == [name for name, _, _ in found]
    for (_, what), (_, chosen, of) in zip(named, found, strict=True):
        assert f"sends each token to {chosen} of {of} experts" in what


def test_a_router_without_numbers_is_known_by_its_kind():
    config = transformers.SwitchTransformersConfig(
        vocab_size=VOCABULARY,
        d_model=8,
        d_kv=4,
        d_ff=10,
        num_layers=1,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=0,
        num_heads=2,
        num_experts=2,
    )
    model = transformers.SwitchTransformersForConditionalGeneration(config)
    name, what = discontinuous_modules(model)[0]
    assert name == "encoder.block.0.layer.1.mlp.router"
    assert what == "(SwitchTransformersTop1Router) chooses experts for each token"


def test_where_all_experts_are_used_nothing_is_chosen():
    options = {**CAUSAL["MixtralForCausalLM"], "num_experts_per_tok": 3}
    assert discontinuous_modules(build("MixtralForCausalLM", options)) == []


def test_the_kernel_of_experts_that_refuses_double_precision_is_named_with_the_remedy():
    model = build("MixtralForCausalLM", CAUSAL["MixtralForCausalLM"])
    model.set_experts_implementation("grouped_mm")
    H = operator_of("MixtralForCausalLM", model, causal_batch(model))
    remedy = r"Fix: .*model.set_experts_implementation\('eager'\)"
    with pytest.raises(LossError, match=f"Expected mat_a to be Float32.*{remedy}"):
        H @ probes(H.shape[0], 1)


def test_an_architecture_that_cannot_be_differentiated_twice_is_named_with_the_remedy(monkeypatch):
    # What transformers takes where PyTorch has no grouped_mm of its own.
    monkeypatch.setattr(transformers.integrations.moe, "_can_use_grouped_mm", lambda *_: False)
    model = build("MixtralForCausalLM", CAUSAL["MixtralForCausalLM"])
    model.set_experts_implementation("grouped_mm")
    H = operator_of("MixtralForCausalLM", model, causal_batch(model))
    where = r"module 'model.layers.0.mlp.experts' \(MixtralExperts\) cannot be differentiated twice"
    with pytest.raises(DoubleBackwardError, match=f"{where}.*experts_implementation='eager'"):
        H @ probes(H.shape[0], 1)


@pytest.mark.parametrize("name", ["flash_attention_2", "kernels-community/flash-attn3"])
def test_attention_without_a_second_derivative_is_refused_before_any_product(name):
    model = build("LlamaForCausalLM", GROUPED)
    model.config._attn_implementation_internal = name
    with pytest.raises(DoubleBackwardError, match=rf"{name}.*set_attn_implementation\('sdpa'\)"):
        operator_of("LlamaForCausalLM", model, causal_batch(model))
