import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.utils import parametrize

from spectra import HessianOperator
from spectra.errors import LossError
from spectra.objective import heads
from spectra.objective.losses import causal_lm
from tests.cases.chunks import chunks_of, questions
from tests.cases.networks import TinyGPT, WithLogits, dense_hessian

VOCABULARY = 7


class Tiny(nn.Module):
    """Embedding, a curved layer, a head; what comes after it is for subclasses."""

    def __init__(self, head=None):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 4)
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, VOCABULARY) if head is None else head
        self.double()

    def hidden(self, input_ids):
        x = torch.tanh(self.inner(self.embedding(input_ids)))
        # Something that looks back, so that places in a sequence differ.
        return x.cumsum(dim=1)

    def forward(self, input_ids, attention_mask=None):
        return self.after(self.head(self.hidden(input_ids)))

    def after(self, logits):
        return logits


def batch(rows=3, length=6, **others):
    g = torch.Generator().manual_seed(9)
    return {"input_ids": torch.randint(0, VOCABULARY, (rows, length), generator=g), **others}


def padded():
    """Batches of unequal counts; places and a whole sequence that do not count."""
    first, second = batch(4, 6), batch(2, 3)
    first["attention_mask"] = (torch.arange(6) < torch.tensor([6, 2, 1, 5])[:, None]).long()
    first["labels"] = first["input_ids"].masked_fill(first["attention_mask"] == 0, -100)
    first["labels"][0, 2:4] = -100
    second["attention_mask"] = torch.ones(2, 3, dtype=torch.long)
    second["labels"] = second["input_ids"].clone()
    nothing = {**second, "labels": torch.full((2, 3), -100)}
    return [first, nothing, second]


def assert_chunked(model, data, **options):
    expected, how = questions(model, data, **options)
    assert how is None
    with chunks_of(3):
        found, how = questions(model, data, **options)
    assert how == "in chunks of 3 tokens"
    assert float((found - expected).norm()) <= 1e-12 * float(expected.norm())


def assert_at_once(model, data, why):
    expected, _ = questions(model, data)
    with chunks_of(3):
        found, how = questions(model, data)
    assert how.startswith("all logits at once: ")
    assert why in how
    assert torch.equal(found, expected)


@pytest.mark.parametrize("options", [{"graph": "fresh"}, {"graph": "retained"}, {"microbatch": 1}])
@pytest.mark.parametrize("wrap", [lambda model: model, WithLogits])
def test_chunks_give_what_all_logits_at_once_give(wrap, options):
    assert_chunked(wrap(TinyGPT()), padded(), **options)


@pytest.mark.parametrize("tokens", [1, 2, 5, 100])
def test_the_hessian_is_the_dense_one(tokens):
    model, data = TinyGPT(), batch()
    ids = data["input_ids"]
    matrix = dense_hessian(
        model,
        lambda call: functional.cross_entropy(
            call(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        ),
    )
    with chunks_of(tokens):
        found = HessianOperator(model, causal_lm(), [data]).to_dense()
    assert float((found - matrix).norm()) <= 1e-12 * float(matrix.norm())


@pytest.mark.parametrize("params", ["head.*", "inner.*", ["embedding.*", "head.bias"]])
def test_selected_parameters_have_their_block(params):
    assert_chunked(Tiny(), padded(), params=params)


# --- what a model does to its logits --------------------------------------------------------------


class Scaled(Tiny):
    def after(self, logits):
        return logits * 0.3 / torch.tensor(2.0)


class SoftCapped(Tiny):
    def after(self, logits):
        return torch.tanh(logits / 0.4) * 0.4


class InPlace(Tiny):
    def after(self, logits):
        return logits.div_(0.4).tanh_() * 0.4


class Cast(Tiny):
    def __init__(self):
        super().__init__()
        self.float()

    def after(self, logits):
        return logits[..., :].double() * 0.5


@pytest.mark.parametrize("kind", [Scaled, SoftCapped, InPlace, Cast])
def test_steps_after_the_head_that_treat_all_logits_alike_are_repeated(kind):
    model = kind()
    expected, _ = questions(model, padded())
    with chunks_of(3):
        found, how = questions(model, padded())
    assert how == "in chunks of 3 tokens"
    rounding = 1e-6 if kind is Cast else 1e-12
    assert float((found - expected).norm()) <= rounding * float(expected.norm())


class Clamped(Tiny):
    def after(self, logits):
        # Beyond all of them here: the trial alone could not tell.
        return logits.clamp(-1e6, 1e6)


class Biased(Tiny):
    def after(self, logits):
        return logits + torch.arange(VOCABULARY)


class LearntScale(Tiny):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def after(self, logits):
        return logits * self.scale


class ScaledByClass(Tiny):
    def after(self, logits):
        return logits * torch.ones(VOCABULARY)


class Normalised(Tiny):
    def after(self, logits):
        return logits.log_softmax(-1)


@pytest.mark.parametrize(
    ("kind", "node"),
    [
        (Clamped, "ClampBackward"),
        (Biased, "AddBackward0"),
        (LearntScale, "MulBackward0"),
        (ScaledByClass, "MulBackward0"),
        (Normalised, "LogSoftmaxBackward0"),
    ],
)
def test_other_steps_after_the_head_leave_the_logits_whole(kind, node):
    assert_at_once(kind(), padded(), f"no output of an nn.Linear module but come from {node}")


# --- heads ----------------------------------------------------------------------------------------


class Functional(Tiny):
    def forward(self, input_ids, attention_mask=None):
        return self.hidden(input_ids) @ self.embedding.weight.T


class Adapter(Tiny):
    """A low-rank update beside the head."""

    def __init__(self):
        super().__init__()
        self.low = nn.Sequential(nn.Linear(4, 1), nn.Linear(1, VOCABULARY)).double()

    def forward(self, input_ids, attention_mask=None):
        hidden = self.hidden(input_ids)
        return self.head(hidden) + self.low(hidden)


class Twice(Tiny):
    def forward(self, input_ids, attention_mask=None):
        hidden = self.hidden(input_ids)
        return self.head(hidden + self.head(hidden)[..., :4])


class Constant(Tiny):
    def forward(self, input_ids, attention_mask=None):
        self.head(self.hidden(input_ids))
        return functional.one_hot(input_ids, VOCABULARY) * self.embedding.weight[0, 0]


class Own(nn.Linear):
    """A linear layer that looks at all tokens together."""

    def forward(self, x):
        return super().forward(x - x.mean(dim=1, keepdim=True))


class OnlyLong(Tiny):
    def forward(self, input_ids, attention_mask=None):
        if len(input_ids) < 2:
            raise ValueError("two sequences at least")
        return super().forward(input_ids)


class Flattened(Tiny):
    def forward(self, input_ids, attention_mask=None):
        return self.head(self.hidden(input_ids).flatten(0, 1)).unflatten(0, input_ids.shape)


class OtherWay(Tiny):
    """Another layer for few tokens than for many."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(4, VOCABULARY).double()

    def forward(self, input_ids, attention_mask=None):
        head = self.other if len(input_ids) == 1 else self.head
        return head(self.hidden(input_ids))


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Functional(), "they are no output of an nn.Linear module but come from UnsafeView"),
        (Adapter(), "they are no output of an nn.Linear module but come from AddBackward0"),
        (Twice(), "the layer that makes them is called more than once"),
        (Constant(), "they are no output of an nn.Linear module but come from MulBackward0"),
        (Tiny(Own(4, VOCABULARY)), "they are no output of an nn.Linear module"),
        (OnlyLong(), "a trial on 8 tokens raised ValueError: two sequences at least"),
        (Flattened(), "come from ViewBackward0"),
        (OtherWay(), "the layer that makes them got [], expected (*(4, 6), width) once"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_where_no_linear_layer_makes_the_logits_they_stay_whole(model, why):
    assert_at_once(model, padded()[:1], why)


def test_without_any_wide_linear_layer_there_is_no_trial():
    model = Functional()
    model.inner, model.head = nn.Identity(), None
    assert_at_once(model, padded(), "no nn.Linear module without hooks is as wide as they are")


@pytest.mark.parametrize(
    ("others", "why"),
    [
        (
            {"mask": torch.ones(3, 1, 6, 6)},
            "the input 'mask', of shape (3, 1, 6, 6), cannot be cut to a few tokens for a trial; "
            "expected (3, 6)",
        ),
        ({"cache": [torch.ones(3)]}, "the input 'cache', not a tensor, cannot be cut"),
    ],
)
def test_inputs_that_cannot_be_cut_leave_the_logits_whole(others, why):
    class More(Tiny):
        def forward(self, input_ids, **_):
            return super().forward(input_ids)

    assert_at_once(More(), [batch(**others)], why)


def test_weights_that_stand_in_for_a_call_have_their_derivatives():
    class Generated(nn.Module):
        def __init__(self):
            super().__init__()
            self.tiny = Tiny()
            self.weight = nn.Parameter(torch.ones(VOCABULARY, 4, dtype=torch.float64))

        def forward(self, input_ids, attention_mask=None):
            weights = {"head.weight": torch.sin(self.weight) * self.tiny.embedding.weight}
            return functional_call(self.tiny, weights, (input_ids,))

    assert_chunked(Generated(), padded())


def test_a_parametrised_head_has_the_derivatives_of_its_parameters():
    class Sine(nn.Module):
        def forward(self, weight):
            return torch.sin(weight)

    model = Tiny()
    parametrize.register_parametrization(model.head, "weight", Sine())
    assert_chunked(model, padded())


@pytest.mark.parametrize(
    "change",
    [
        lambda head: head.register_forward_pre_hook(lambda _, args: (args[0] * 2,)),
        lambda head: head.register_forward_hook(lambda _module, _args, output: output**2),
        lambda head: setattr(head, "forward", lambda x: nn.Linear.forward(head, x) ** 2),
    ],
)
def test_a_head_with_hooks_or_a_forward_pass_of_its_own_leaves_the_logits_whole(change):
    model = Tiny()
    model.inner = nn.Identity()
    change(model.head)
    assert_at_once(model, padded(), "no nn.Linear module without hooks is as wide as they are")


def test_a_head_that_is_exchanged_is_found_again():
    model, loss, data = Tiny(), causal_lm(), batch()
    with chunks_of(3):
        before = loss(model, data)
        model.head = nn.Linear(4, VOCABULARY).double()
        after = loss(model, data)
        assert loss.loss_head == "in chunks of 3 tokens"
    assert before != after
    torch.testing.assert_close(after, loss(model, data), rtol=1e-13, atol=0)


def test_half_precision_is_summed_in_single():
    model, data = TinyGPT().bfloat16(), padded()
    expected, _ = questions(model, data)
    with chunks_of(3):
        found, how = questions(model, data)
    assert how == "in chunks of 3 tokens"
    assert float((found - expected).norm()) <= 1e-2 * float(expected.norm())
    assert causal_lm()(model, data[0]).dtype == torch.float32


def test_a_class_that_does_not_exist_is_refused():
    data = batch()
    data["labels"] = data["input_ids"] + 1
    hessian = HessianOperator(Tiny(), causal_lm(), [data])
    with chunks_of(3), pytest.raises(LossError, match="batch 0: Target 7 is out of bounds"):
        hessian.value()


# --- the trial ------------------------------------------------------------------------------------


class Restless(Tiny):
    """Draws random numbers, counts its calls in a buffer, and notes what it was given."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.dropout = nn.Dropout(0.5)
        self.seen = []

    def forward(self, input_ids, attention_mask=None):
        self.seen.append(tuple(input_ids.shape))
        self.calls += 1
        return self.head(self.dropout(self.hidden(input_ids)))


def hooks(model):
    return [
        len(kind)
        for module in model.modules()
        for kind in (module._forward_hooks, module._forward_pre_hooks)
    ]


def test_the_trial_leaves_everything_as_it_was():
    model, loss, data = Restless(), causal_lm(), batch(3, 20)
    before = hooks(model)
    torch.manual_seed(1)
    expected = loss(model, data)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    with chunks_of(3):
        found = loss(model, data)
    assert loss.loss_head == "in chunks of 3 tokens"
    assert model.seen == [(3, 20), (1, 8), (3, 20)]
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.calls == 2
    assert model.training
    assert hooks(model) == before == [0] * len(before)
    assert all(p.grad is None for p in model.parameters())


def test_small_logits_take_no_trial():
    model, loss = Restless(), causal_lm()
    loss(model, batch(3, 20))
    assert model.seen == [(3, 20)]
    assert loss.loss_head is None


def test_a_failure_in_the_model_is_raised_and_leaves_no_hook():
    class Fails(Tiny):
        def hidden(self, input_ids):
            raise ValueError("no such thing")

    model = Fails()
    with chunks_of(3), pytest.raises(ValueError, match="no such thing"):
        causal_lm()(model, batch())
    assert sum(hooks(model)) == 0


@pytest.mark.parametrize("surroundings", [torch.no_grad, torch.inference_mode])
def test_the_head_is_found_without_gradients_too(surroundings):
    model, loss, data = SoftCapped(), causal_lm(), batch()
    expected = loss(model, data).detach()
    with chunks_of(3), surroundings():
        found = loss(model, data)
        assert loss.loss_head == "in chunks of 3 tokens"
        assert not found.requires_grad
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


def test_an_operator_tells_what_became_of_large_logits_and_only_of_those():
    data = [batch(3, 8), batch(1, 2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heads, "_SMALL", 8 * VOCABULARY * 10)
        hessian = HessianOperator(Tiny(), causal_lm(), data)
        assert "loss_head" not in hessian.describe()
        hessian.value()
        assert hessian.describe()["loss_head"].startswith("in chunks of ")
        small = HessianOperator(Tiny(), causal_lm(), data[1:])
        small.value()
        assert "loss_head" not in small.describe()
