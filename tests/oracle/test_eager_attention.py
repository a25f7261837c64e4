import sys
import types

import pytest
import torch
from torch import nn
from torch.nn import functional

from spectra import HessianOperator
from spectra.errors import ArgumentError
from spectra.oracle import chunks
from spectra.oracle.attention import Attention

transformers = pytest.importorskip("transformers")

LENGTH = 7
SIZES = {
    "vocab_size": 6,
    "hidden_size": 4,
    "intermediate_size": 5,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
GROUPED = {**SIZES, "num_key_value_heads": 1, "head_dim": 2}


def gpt2(how):
    config = transformers.GPT2Config(
        vocab_size=6, n_embd=4, n_head=2, n_layer=1, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel._from_config(config, attn_implementation=how)


def llama(how):
    config = transformers.LlamaConfig(**GROUPED)
    return transformers.LlamaForCausalLM._from_config(config, attn_implementation=how)


def gemma2(how):
    # The caps are low enough to bend.
    config = transformers.Gemma2Config(
        **GROUPED, attn_logit_softcapping=0.1, query_pre_attn_scalar=2, sliding_window=3
    )
    return transformers.Gemma2ForCausalLM._from_config(config, attn_implementation=how)


def gpt_oss(how):
    config = transformers.GptOssConfig(**GROUPED, num_local_experts=2, num_experts_per_tok=2)
    return transformers.GptOssForCausalLM._from_config(
        # The others do not take double precision.
        config,
        attn_implementation=how,
        experts_implementation="eager",
    )


def bert(how):
    config = transformers.BertConfig(**SIZES)
    return transformers.BertForMaskedLM._from_config(config, attn_implementation=how)


def t5(how):
    config = transformers.T5Config(
        vocab_size=6, d_model=4, d_kv=2, d_ff=5, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration._from_config(config, attn_implementation=how)


CASES = [
    *((make, how) for make in (gpt2, llama, bert, t5) for how in ("eager", "sdpa")),
    # The others have no sdpa.
    (gemma2, "eager"),
    (gpt_oss, "eager"),
]


def built(make, how="eager"):
    torch.manual_seed(0)
    model = make(how).double().eval()
    for parameter in model.parameters():
        # Far from the uniform attention of an initialised model.
        nn.init.normal_(parameter, std=0.4)
    return model


def tokens(padded=False):
    ids = torch.randint(2, 6, (2, LENGTH))
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    if padded:
        batch["attention_mask"][0, -2:] = 0
    return batch


def loss(model, batch):
    # Not the models' own loss, which is computed in single precision.
    logits = model(**batch, use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


def in_chunks(patch):
    patch.setattr(chunks, "_BYTES", 0)
    patch.setattr(chunks, "_FEWEST_QUERIES", 3)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("make", "how"), CASES)
def test_chunks_give_the_hessian_of_attention_in_one_piece(make, how, padded, monkeypatch):
    model, batch = built(make, how), tokens(padded)
    operator = HessianOperator(model, loss, [batch], graph="fresh")
    vectors = torch.randn(operator.shape[0], 3, dtype=torch.float64)
    expected = operator.apply(vectors)
    gradient = operator.gradient()
    assert "attention" not in operator.describe()
    in_chunks(monkeypatch)
    # The others have a softmax or norms in single precision whatever the model is in.
    tolerance = 1e-12 if make in (gpt2, bert) else 2e-6
    for graph in ("fresh", "retained"):
        chunked = HessianOperator(model, loss, [batch], graph=graph)
        for _ in range(2):
            torch.testing.assert_close(
                chunked.apply(vectors), expected, rtol=0, atol=tolerance * float(expected.norm())
            )
        torch.testing.assert_close(chunked.gradient(), gradient, rtol=0, atol=tolerance)
        assert chunked.describe()["attention"] == "in chunks of queries"


@pytest.mark.parametrize("how", ["eager", "sdpa"])
def test_in_double_precision_the_hessian_is_the_same_to_rounding(how, monkeypatch):
    model, batch = built(gpt2, how), tokens()
    expected = HessianOperator(model, loss, [batch]).to_dense()
    in_chunks(monkeypatch)
    operator = HessianOperator(model, loss, [batch])
    matrix = operator.to_dense()
    assert operator.describe()["attention"] == "in chunks of queries"
    torch.testing.assert_close(matrix, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-13)


def test_attention_weights_that_are_asked_for_are_kept(monkeypatch):
    in_chunks(monkeypatch)
    model, batch = built(gpt2), tokens()

    def of_weights(model, batch):
        output = model(**batch, output_attentions=True)
        return sum(weights.square().mean() for weights in output.attentions)

    operator = HessianOperator(model, of_weights, [batch])
    assert operator.value() > 0
    assert "attention" not in operator.describe()
    model.config.output_attentions = True
    by_configuration = HessianOperator(
        model, lambda m, b: m(**b).attentions[0].square().mean(), [batch]
    )
    assert by_configuration.value() == operator.value()


class Attending(nn.Module):
    """The shape of a Hugging Face model: its function is looked up in its own file."""

    _supports_sdpa = True

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 12, dtype=torch.float64))
        self.dropout = {}

    def forward(self, x):
        self.scale = self.weight.square().mean()
        q, k, v = (x @ self.weight).unflatten(-1, (2, -1)).transpose(1, 2).chunk(3, dim=-1)
        function = sys.modules[type(self).__module__].eager_attention_forward
        output, self.weights = function(self, q, k, v, None, scaling=0.5, **self.dropout)
        return output.flatten(2)


def plain(module, query, key, value, attention_mask, **options):
    weights = (query @ key.transpose(2, 3) * options["scaling"]).softmax(-1)
    weights = functional.dropout(weights, options.get("dropout", 0.0), module.training)
    return (weights @ value).transpose(1, 2), weights


def with_a_parameter(module, query, *others, **options):
    return plain(module, query * module.weight.sum().tanh(), *others, **options)


def over_queries(module, query, key, value, attention_mask, *, scaling):
    """Every output depends on all queries."""
    weights = (query @ key.transpose(2, 3) * scaling).softmax(-2)
    return (weights @ value).transpose(1, 2), weights


def aligned(module, query, key, value, attention_mask, *, scaling):
    """Causal by the numbers of queries and keys, as transformers' GPT-2 once was."""
    visible = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool)
    scores = query @ key.transpose(2, 3) * scaling
    scores = scores.masked_fill(~visible.tril(key.shape[-2] - query.shape[-2]), -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2), scores


def by_heads(module, query, key, value, attention_mask, *, scaling):
    """(batch, heads, queries, features) comes out."""
    return (query @ key.transpose(2, 3) * scaling).softmax(-1) @ value, None


def with_history(module, query, *others, **options):
    """It uses a tensor of the module that is no parameter, and was computed before."""
    return plain(module, query * module.scale, *others, **options)


@pytest.fixture
def attending(monkeypatch):
    """A model of a given eager function."""

    def make(function):
        file = types.ModuleType("modeling_attending")
        file.eager_attention_forward = function
        monkeypatch.setitem(sys.modules, file.__name__, file)
        monkeypatch.setattr(Attending, "__module__", file.__name__)
        return Attending()

    return make


def mean_cube(model, x):
    return model(x).pow(3).mean()


@pytest.mark.parametrize(
    ("function", "separable"),
    [
        (plain, True),
        (with_a_parameter, True),
        (over_queries, False),
        (aligned, False),
        (by_heads, False),
        (with_history, False),
    ],
)
def test_only_what_treats_every_query_by_itself_is_cut(function, separable, attending, monkeypatch):
    model, x = attending(function), torch.randn(2, LENGTH, 4, dtype=torch.float64)
    expected = HessianOperator(model, mean_cube, [x]).to_dense()
    in_chunks(monkeypatch)
    operator = HessianOperator(model, mean_cube, [x])
    torch.testing.assert_close(operator.to_dense(), expected, rtol=1e-11, atol=1e-13)
    assert ("attention" in operator.describe()) == separable


def test_the_models_own_function_is_put_back(attending, monkeypatch):
    in_chunks(monkeypatch)
    model, x = attending(plain), torch.randn(2, LENGTH, 4, dtype=torch.float64)
    file = sys.modules["modeling_attending"]
    attention = Attention(model)
    with attention.differentiable():
        with attention.differentiable():
            model(x)
        assert file.eager_attention_forward is not plain
    assert file.eager_attention_forward is plain
    with pytest.raises(KeyError), attention.differentiable():
        raise KeyError
    assert file.eager_attention_forward is plain
    assert attention.chunked


def test_weights_that_were_never_computed_cannot_be_used(attending, monkeypatch):
    in_chunks(monkeypatch)
    model, x = attending(plain), torch.randn(2, LENGTH, 4, dtype=torch.float64)
    with Attention(model).differentiable():
        model(x)
    with pytest.raises(ArgumentError, match=r"'mean' is asked of attention weights.*set model"):
        model.weights.mean()


@pytest.mark.parametrize("training", [False, True])
def test_dropout_leaves_attention_in_one_piece(training, attending, monkeypatch):
    in_chunks(monkeypatch)
    model, x = attending(plain).train(training), torch.randn(2, LENGTH, 4, dtype=torch.float64)
    model.dropout = {"dropout": 0.5}
    attention = Attention(model)
    with attention.differentiable():
        model(x)
    assert attention.chunked != training


def test_a_model_that_may_need_its_weights_is_left_alone(attending, monkeypatch):
    in_chunks(monkeypatch)
    monkeypatch.setattr(Attending, "_supports_sdpa", False)
    model, x = attending(plain), torch.randn(2, LENGTH, 4, dtype=torch.float64)
    attention = Attention(model)
    with attention.differentiable():
        model(x)
    assert model.weights.shape == (2, 2, LENGTH, LENGTH)
    assert not attention.chunked
