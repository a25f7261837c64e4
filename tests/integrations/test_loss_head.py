"""Chunks of logits of Hugging Face models, against all logits at once."""

import pytest
import torch
from torch.nn import functional

from spectra import HessianOperator
from spectra.objective.losses import causal_lm
from tests.cases.chunks import chunks_of, questions

transformers = pytest.importorskip("transformers")

VOCABULARY = 50
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"head_dim": 4, "num_key_value_heads": 2}
MODELS = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=32,
            n_embd=8,
            n_layer=1,
            n_head=2,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    # The soft caps are low enough to bend the logits of random weights.
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            **SIZES, **GROUPED, final_logit_softcapping=0.02, attn_implementation="eager"
        )
    ),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**SIZES, **GROUPED, final_logit_softcapping=0.03)
    ),
    "cohere": lambda: transformers.CohereForCausalLM(
        transformers.CohereConfig(**SIZES, logit_scale=0.3)
    ),
    "granite": lambda: transformers.GraniteForCausalLM(
        transformers.GraniteConfig(**SIZES, logits_scaling=3.0)
    ),
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)),
}


def model_of(name):
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    return MODELS[name]().double().eval()


def data():
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (3, 12), generator=g)
    mask = (torch.arange(12) < torch.tensor([12, 7, 1])[:, None]).long()
    return [
        {"input_ids": ids, "attention_mask": mask},
        {"input_ids": ids[:1, :5], "attention_mask": mask[:1, :5]},
    ]


@pytest.mark.parametrize("graph", ["fresh", "retained"])
@pytest.mark.parametrize("name", MODELS)
def test_chunks_give_what_all_logits_at_once_give(name, graph):
    model = model_of(name)
    expected, how = questions(model, data(), graph=graph)
    assert how is None
    with chunks_of(4):
        found, how = questions(model, data(), graph=graph)
    assert how == "in chunks of 4 tokens"
    assert float((found - expected).norm()) <= 1e-12 * float(expected.norm())


@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
def test_products_are_those_of_plain_differentiation(name):
    model, (batch, _) = model_of(name), data()
    parameters = list(model.parameters())
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        logits = model(**batch, use_cache=False).logits
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    vectors = [torch.linspace(-1, 1, p.numel()).double().view_as(p) for p in parameters]
    products = torch.autograd.grad(gradients, parameters, vectors)
    with chunks_of(4):
        hessian = HessianOperator(model, causal_lm(), [batch])
        found = hessian @ hessian.space.flatten(vectors)
    expected = hessian.space.flatten(products)
    assert float((found - expected).norm()) <= 1e-12 * float(expected.norm())


def test_a_model_in_half_precision_is_summed_in_single():
    model = model_of("llama").bfloat16()
    expected, _ = questions(model, data())
    with chunks_of(4):
        found, how = questions(model, data())
    assert how == "in chunks of 4 tokens"
    assert float((found - expected).norm()) <= 1e-2 * float(expected.norm())
