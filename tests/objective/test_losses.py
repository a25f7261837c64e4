import functools
from collections import OrderedDict, UserDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from spectra import HessianOperator
from spectra.errors import ArgumentError, ArgumentTypeError, DataError, LossError
from spectra.objective.losses import (
    causal_lm,
    classification,
    masked_lm,
    number_of_samples,
    supervised,
)
from tests.cases.networks import TinyGPT, WithLogits, dense_hessian, tanh_mlp

N, CLASSES, LENGTH = 12, 3, 4


class Sequences(nn.Module):
    """Logits (B, C, T): one per class and place."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, CLASSES * LENGTH)

    def forward(self, x):
        return torch.tanh(self.layer(x)).unflatten(-1, (CLASSES, LENGTH))


def inputs():
    return torch.randn(N, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def targets(kind):
    g = torch.Generator().manual_seed(6)
    classes = torch.randint(0, CLASSES, (N,), generator=g)
    tokens = torch.randint(0, CLASSES, (N, LENGTH), generator=g)
    tokens[torch.rand(N, LENGTH, generator=g) < 0.4] = -100
    some_ignored = classes.clone()
    some_ignored[3:7] = -100
    real = torch.randn(N, CLASSES, generator=g, dtype=torch.float64)
    return {
        "real": real,
        "binary": (real > 0).double(),
        "classes": classes,
        "some ignored": some_ignored,
        "class 1 ignored": classes,
        "tokens": tokens,
        "probabilities": real.softmax(-1),
        "log probabilities": real.log_softmax(-1),
        "counts": real.abs().round(),
        "token probabilities": torch.randn(
            N, CLASSES, LENGTH, generator=g, dtype=torch.float64
        ).softmax(1),
    }[kind]


def model_of(kind):
    torch.manual_seed(2)
    if kind.startswith("token"):
        return Sequences().double()
    return tanh_mlp((4, 5, CLASSES))


WEIGHTS = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
ENDING = {
    nn.NLLLoss: functools.partial(torch.log_softmax, dim=1),
    nn.KLDivLoss: functools.partial(torch.log_softmax, dim=1),
    nn.BCELoss: torch.sigmoid,
}


class Ended(nn.Module):
    """A network with the last step that its criterion asks for."""

    def __init__(self, model, ending):
        super().__init__()
        self.model = model
        self.ending = ending

    def forward(self, x):
        return self.ending(self.model(x))


CRITERIA = [
    (nn.MSELoss(), "real"),
    (nn.MSELoss(reduction="sum"), "real"),
    (nn.HuberLoss(delta=0.7), "real"),
    (nn.SmoothL1Loss(reduction="sum"), "real"),
    (nn.PoissonNLLLoss(), "counts"),
    (nn.MultiLabelSoftMarginLoss(weight=WEIGHTS), "binary"),
    (nn.BCELoss(), "binary"),
    (nn.BCEWithLogitsLoss(), "binary"),
    (nn.BCEWithLogitsLoss(reduction="sum"), "binary"),
    (nn.BCEWithLogitsLoss(weight=WEIGHTS, pos_weight=2 * WEIGHTS), "binary"),
    (nn.KLDivLoss(reduction="batchmean"), "probabilities"),
    (nn.KLDivLoss(), "probabilities"),
    (nn.KLDivLoss(log_target=True, reduction="sum"), "log probabilities"),
    (nn.CrossEntropyLoss(), "classes"),
    (nn.CrossEntropyLoss(reduction="sum"), "some ignored"),
    (nn.CrossEntropyLoss(), "some ignored"),
    (nn.CrossEntropyLoss(weight=WEIGHTS), "classes"),
    (nn.CrossEntropyLoss(ignore_index=1), "class 1 ignored"),
    (nn.CrossEntropyLoss(weight=WEIGHTS, ignore_index=1, label_smoothing=0.2), "class 1 ignored"),
    (nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.1), "some ignored"),
    (nn.CrossEntropyLoss(), "tokens"),
    (nn.CrossEntropyLoss(weight=WEIGHTS), "tokens"),
    (nn.CrossEntropyLoss(), "probabilities"),
    (nn.CrossEntropyLoss(weight=WEIGHTS), "probabilities"),
    (nn.CrossEntropyLoss(), "token probabilities"),
    (nn.NLLLoss(), "some ignored"),
    (nn.NLLLoss(weight=WEIGHTS, reduction="mean"), "tokens"),
    (functional.cross_entropy, "some ignored"),
    (functional.mse_loss, "real"),
    (functional.binary_cross_entropy_with_logits, "binary"),
    (lambda predictions, y: ((predictions - y) ** 2).sum(1).mean(), "real"),
]


def name(value):
    if isinstance(value, str | int):
        return str(value)
    return repr(value) if isinstance(value, nn.Module) else value.__name__


@functools.cache
def problem(index):
    """Model, loss, data, directions, and the products from an independent dense Hessian."""
    criterion, kind = CRITERIA[index]
    model = model_of(kind)
    if type(criterion) in ENDING:
        model = Ended(model, ENDING[type(criterion)])
    x, y = inputs(), targets(kind)
    matrix = dense_hessian(model, lambda call: criterion(call(x), y))
    vectors = torch.randn(
        len(matrix), 2, generator=torch.Generator().manual_seed(7), dtype=torch.float64
    )
    assert matrix.norm() > 1e-3
    return model, supervised(criterion), x, y, vectors, matrix @ vectors


@st.composite
def splits(draw):
    """Sizes of batches that make up all N samples, in any proportion."""
    cuts = sorted(draw(st.sets(st.integers(1, N - 1), max_size=5)))
    return [b - a for a, b in zip([0, *cuts], [*cuts, N], strict=True)]


@pytest.mark.parametrize("index", range(len(CRITERIA)), ids=[f"{name(c)}-{k}" for c, k in CRITERIA])
@pytest.mark.filterwarnings("ignore:reduction. .mean. divides")
@given(sizes=splits(), microbatch=st.none() | st.integers(1, N + 1))
@settings(max_examples=12)
def test_the_hessian_does_not_depend_on_how_the_data_are_batched(index, sizes, microbatch):
    model, loss, x, y, vectors, expected = problem(index)
    data = list(zip(x.split(sizes), y.split(sizes), strict=True))
    products = HessianOperator(model, loss, data, microbatch=microbatch).apply(vectors)
    torch.testing.assert_close(products, expected, rtol=1e-10, atol=1e-12 * float(expected.norm()))


@pytest.mark.parametrize(
    ("criterion", "kind", "terms"),
    [
        (nn.MSELoss(), "real", N * CLASSES),
        (nn.BCEWithLogitsLoss(), "binary", N * CLASSES),
        (nn.KLDivLoss(reduction="batchmean"), "probabilities", N),
        (nn.KLDivLoss(), "probabilities", N * CLASSES),
        (nn.MultiLabelSoftMarginLoss(), "binary", N),
        (nn.CrossEntropyLoss(), "classes", N),
        (nn.CrossEntropyLoss(), "some ignored", N - 4),
        (nn.CrossEntropyLoss(), "probabilities", N),
        (nn.CrossEntropyLoss(weight=WEIGHTS), "probabilities", N),
        (nn.CrossEntropyLoss(), "token probabilities", N * LENGTH),
        (functional.nll_loss, "some ignored", N - 4),
        (functional.l1_loss, "real", N * CLASSES),
        (lambda predictions, y: (predictions - y).square().mean(), "real", N),
    ],
    ids=name,
)
def test_the_weight_is_the_number_of_terms_in_the_criterions_mean(criterion, kind, terms):
    assert supervised(criterion).weight((inputs(), targets(kind))) == terms


def test_one_distribution_alone_is_one_term():
    batch = (torch.ones(4), torch.tensor([0.2, 0.3, 0.5]))
    assert supervised(nn.CrossEntropyLoss()).weight(batch) == 1
    assert supervised(nn.MultiLabelSoftMarginLoss()).weight((batch[0], torch.tensor(1.0))) == 1
    assert supervised(nn.MSELoss()).weight((torch.ones(5, 2), None)) == 5


@pytest.mark.parametrize("sizes", [[12], [8, 4], [1, 2, 9], [1] * 12])
def test_the_value_and_the_gradient_have_the_same_weighting(sizes):
    criterion, kind = nn.CrossEntropyLoss(weight=WEIGHTS), "some ignored"
    model, x, y = model_of(kind), inputs(), targets(kind)
    data = list(zip(x.split(sizes), y.split(sizes), strict=True))
    hessian = HessianOperator(model, supervised(criterion), data)
    loss = criterion(model(x), y)
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    assert hessian.value() == pytest.approx(float(loss.detach()), rel=1e-12)
    expected = hessian.space.flatten(gradient)
    torch.testing.assert_close(hessian.gradient(), expected)
    value, both = hessian.value_and_gradient()
    assert value == pytest.approx(float(loss.detach()), rel=1e-12)
    torch.testing.assert_close(both, expected)


def test_a_batch_in_which_every_target_is_ignored_counts_for_nothing():
    model, x, y = model_of("classes"), inputs(), targets("classes")
    ignored = (torch.full_like(x, 1e3), torch.full_like(y, -100))
    loss = supervised(nn.CrossEntropyLoss())
    vector = torch.ones(43, dtype=torch.float64)
    alone = HessianOperator(model, loss, [(x, y)])
    among = HessianOperator(model, loss, [ignored, (x[:5], y[:5]), ignored, (x[5:], y[5:])])
    torch.testing.assert_close(among @ vector, alone @ vector)
    assert among.value() == pytest.approx(alone.value(), rel=1e-12)


def test_data_in_which_every_target_is_ignored_are_refused():
    model, x = model_of("classes"), inputs()
    data = [(x, torch.full((N,), -100))] * 2
    hessian = HessianOperator(model, supervised(nn.CrossEntropyLoss()), data)
    for question in (hessian.to_dense, hessian.value, hessian.gradient):
        with pytest.raises(DataError, match=r"every batch has weight 0.*ignore_index"):
            question()


def test_a_sum_over_the_data_is_a_mean_times_the_number_of_terms():
    model, x, y = model_of("classes"), inputs(), targets("some ignored")
    data = [(x[:5], y[:5]), (x[5:], y[5:])]
    mean = HessianOperator(model, supervised(nn.CrossEntropyLoss()), data)
    total = HessianOperator(model, supervised(nn.CrossEntropyLoss(reduction="sum")), data)
    torch.testing.assert_close(total.to_dense(), mean.to_dense() * int((y != -100).sum()))
    assert total.value() == pytest.approx(8 * mean.value(), rel=1e-12)


def test_a_plain_loss_is_weighted_by_the_number_of_samples():
    model, x, y = model_of("real"), inputs(), targets("real")

    def loss(model, batch):
        return functional.mse_loss(model(batch["x"]), batch["y"])

    batches = [{"x": x[s], "y": y[s]} for s in (slice(0, 1), slice(1, 12))]
    expected = dense_hessian(model, lambda call: functional.mse_loss(call(x), y))
    torch.testing.assert_close(HessianOperator(model, loss, batches).to_dense(), expected)
    total = HessianOperator(model, loss, batches, reduction="sum").to_dense()
    parts = [HessianOperator(model, loss, [batch]).to_dense() for batch in batches]
    torch.testing.assert_close(total, sum(parts))


def test_a_weight_of_ones_own_replaces_the_default():
    model, x, y = model_of("real"), inputs(), targets("real")
    data = [(x[:2], y[:2]), (x[2:], y[2:])]
    loss = supervised(nn.MSELoss())
    first, second = (HessianOperator(model, loss, [batch]).to_dense() for batch in data)
    weighted = HessianOperator(model, loss, data, weight=lambda b: 3.0 if len(b[0]) == 2 else 1)
    torch.testing.assert_close(weighted.to_dense(), (3 * first + second) / 4)


def test_several_or_named_inputs_are_passed_on():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 1, dtype=torch.float64)

        def forward(self, a, b):
            return torch.tanh(self.layer(a)) * b

    model, x, y = Two(), inputs(), targets("real")[:, :1]
    loss = supervised(nn.MSELoss())
    matrices = [
        HessianOperator(model, loss, [(given, y)]).to_dense()
        for given in ((x, y), [x, y], {"b": y, "a": x})
    ]
    expected = dense_hessian(model, lambda call: functional.mse_loss(call(x, y), y))
    for matrix in matrices:
        torch.testing.assert_close(matrix, expected)


# --- causal language models ----------------------------------------------------------------------


def tokens(batch=5, length=6):
    g = torch.Generator().manual_seed(8)
    ids = torch.randint(0, 7, (batch, length), generator=g)
    mask = (torch.arange(length) < torch.tensor([6, 2, 4, 1, 5])[:batch, None]).long()
    return ids, mask


def per_token_mean(call, ids, mask, labels):
    """Every counted next token once, in a loop."""
    terms = []
    logits = call(ids, attention_mask=mask)
    for row in range(len(ids)):
        for place in range(1, ids.shape[1]):
            if labels[row, place] != -100:
                distribution = logits[row, place - 1].log_softmax(-1)
                terms.append(-distribution[labels[row, place]])
    return torch.stack(terms).mean()


@functools.cache
def gpt():
    model = TinyGPT()
    ids, mask = tokens()
    labels = ids.masked_fill(mask == 0, -100)
    matrix = dense_hessian(model, lambda call: per_token_mean(call, ids, mask, labels))
    return model, ids, mask, labels, matrix


def products(model, batches, **options):
    hessian = HessianOperator(model, causal_lm(), batches, **options)
    probe = torch.linspace(-1, 1, hessian.shape[0], dtype=torch.float64)
    return hessian @ probe, probe


@pytest.mark.parametrize("mapping", [dict, OrderedDict, UserDict])
@pytest.mark.parametrize("sizes", [[5], [1, 4], [3, 2], [1, 1, 1, 1, 1]])
def test_every_target_token_counts_once(mapping, sizes):
    model, ids, mask, labels, matrix = gpt()
    implicit = [
        mapping(input_ids=i, attention_mask=m)
        for i, m in zip(ids.split(sizes), mask.split(sizes), strict=True)
    ]
    explicit = [
        mapping(input_ids=i, attention_mask=m, labels=t)
        for i, m, t in zip(ids.split(sizes), mask.split(sizes), labels.split(sizes), strict=True)
    ]
    for batches in (implicit, explicit):
        found, probe = products(model, batches)
        torch.testing.assert_close(found, matrix @ probe, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("microbatch", [1, 2, 3, 7])
def test_microbatches_of_padded_text_leave_the_hessian_as_it_is(microbatch):
    model, ids, mask, _, matrix = gpt()
    batches = [{"input_ids": ids, "attention_mask": mask}]
    found, probe = products(model, batches, microbatch=microbatch)
    torch.testing.assert_close(found, matrix @ probe, rtol=1e-9, atol=1e-11)


def test_without_a_mask_every_token_but_the_first_is_a_target():
    model, ids, *_ = gpt()
    loss, everything = causal_lm(), torch.ones_like(ids)
    assert loss.weight({"input_ids": ids}) == 5 * 5
    expected = per_token_mean(model, ids, everything, ids)
    torch.testing.assert_close(loss(model, {"input_ids": ids}), expected)


def test_labels_decide_which_tokens_count():
    model, ids, mask, labels, _ = gpt()
    labels = labels.clone()
    labels[:, :4] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    loss = causal_lm()
    assert loss.weight(batch) == int((labels[:, 1:] != -100).sum()) == 3
    torch.testing.assert_close(loss(model, batch), per_token_mean(model, ids, mask, labels))
    assert loss.weight({**batch, "labels": None}) == loss.weight({**batch, "labels": gpt()[3]})


def test_another_ignore_index_is_respected():
    model, ids, _, labels, _ = gpt()
    batch = {"input_ids": ids, "labels": labels.masked_fill(labels == -100, -1)}
    loss = causal_lm(ignore_index=-1)
    assert loss.weight(batch) == int((labels[:, 1:] != -100).sum())
    everything = torch.ones_like(ids)
    torch.testing.assert_close(loss(model, batch), per_token_mean(model, ids, everything, labels))


def test_logits_are_found_in_the_models_output_and_nothing_is_cached():
    model, ids, mask, _, matrix = gpt()
    wrapped = WithLogits(model)
    found, probe = products(wrapped, [{"input_ids": ids, "attention_mask": mask}])
    torch.testing.assert_close(found, matrix @ probe, rtol=1e-9, atol=1e-11)
    assert wrapped.cached
    assert not any(wrapped.cached)


def test_the_loss_is_computed_in_the_dtype_of_the_logits():
    model, ids, *_ = gpt()
    assert causal_lm()(model, {"input_ids": ids}).dtype == torch.float64


def test_texts_of_one_token_have_nothing_to_predict():
    model, ids, *_ = gpt()
    hessian = HessianOperator(model, causal_lm(), [{"input_ids": ids[:, :1]}])
    with pytest.raises(DataError, match=r"every batch has weight 0.*attention_mask"):
        hessian.value()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.ones(2, 3), torch.ones(2)), "got tuple"),
        ({"ids": torch.ones(2, 3)}, r"got keys \['ids'\]"),
        (torch.ones(2, 3), "got Tensor"),
    ],
)
def test_batches_that_are_no_text_are_refused(batch, message):
    hessian = HessianOperator(gpt()[0], causal_lm(), [batch])
    with pytest.raises(DataError, match=f"causal_lm.*'input_ids'.*{message}"):
        hessian.value()


# --- labelled tokens and samples -----------------------------------------------------------------


class Classifier(nn.Module):
    """Logits (B, C) of inputs that have a name."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()

    def forward(self, features):
        return self.network(features)


@functools.cache
def labelled_tokens():
    """Some tokens of padded texts are to be predicted where they stand."""
    model = TinyGPT()
    ids, mask = tokens()
    chosen = torch.rand(ids.shape, generator=torch.Generator().manual_seed(9)) < 0.5
    labels = ids.masked_fill(~(chosen & (mask == 1)), -100)

    def loss(call):
        logits = call(ids, attention_mask=mask)
        terms = [
            -logits[row, place].log_softmax(-1)[labels[row, place]]
            for row, place in (labels != -100).nonzero().tolist()
        ]
        return torch.stack(terms).mean()

    return model, ids, mask, labels, dense_hessian(model, loss)


@pytest.mark.parametrize("sizes", [[5], [1, 4], [3, 2], [1, 1, 1, 1, 1]])
def test_every_labelled_token_counts_once_where_it_stands(sizes):
    model, ids, mask, labels, matrix = labelled_tokens()
    batches = [
        {"input_ids": i, "attention_mask": m, "labels": t}
        for i, m, t in zip(ids.split(sizes), mask.split(sizes), labels.split(sizes), strict=True)
    ]
    loss = masked_lm()
    assert sum(map(loss.weight, batches)) == int((labels != -100).sum()) > len(ids)
    hessian = HessianOperator(WithLogits(model), loss, batches)
    probe = torch.linspace(-1, 1, hessian.shape[0], dtype=torch.float64)
    torch.testing.assert_close(hessian @ probe, matrix @ probe, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("sizes", [[12], [5, 7], [1, 11]])
def test_every_labelled_sample_counts_once(sizes):
    model, x, y = Classifier(), inputs(), targets("some ignored")
    batches = [
        {"features": a, "labels": b} for a, b in zip(x.split(sizes), y.split(sizes), strict=True)
    ]
    loss = classification()
    assert sum(map(loss.weight, batches)) == int((y != -100).sum()) < len(y)
    expected = dense_hessian(model, lambda call: functional.cross_entropy(call(x), y))
    torch.testing.assert_close(HessianOperator(model, loss, batches).to_dense(), expected)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"features": inputs()}, r"masked_lm\(\) takes batches with 'labels'.*\['features'\]"),
        ((inputs(), targets("some ignored")), "takes batches with 'labels'.*got tuple"),
        (
            {"features": inputs(), "labels": torch.ones(N, CLASSES)},
            "takes classes as integers, got labels of torch.float32; for regression",
        ),
        (
            {"features": inputs(), "labels": torch.ones(N, 1, dtype=torch.long)},
            r"labels have shape \(12, 1\) and the logits \(12, 3\)",
        ),
    ],
)
def test_batches_without_a_label_for_each_row_of_logits_are_refused(batch, message):
    hessian = HessianOperator(Classifier(), masked_lm(), [batch])
    with pytest.raises(DataError, match=message):
        hessian.value()


# --- what a loss is made of ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("criterion", "kind", "message"),
    [
        (nn.CrossEntropyLoss, ArgumentTypeError, r"is a class; pass an instance"),
        ("mse", ArgumentTypeError, "expected a criterion such as"),
        (None, ArgumentTypeError, "expected a criterion such as"),
        (nn.MSELoss(reduction="none"), ArgumentError, "MSELoss has reduction='none'.*'mean'"),
    ],
)
def test_what_is_no_scalar_criterion_is_refused(criterion, kind, message):
    with pytest.raises(kind, match=message):
        supervised(criterion)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.ones(3, 4), r"got a Tensor"),
        ((torch.ones(3, 4),), "got a tuple of 1"),
        ((torch.ones(1), torch.ones(1), torch.ones(1)), "got a tuple of 3"),
        ({"x": torch.ones(3), "y": torch.ones(3)}, "got a dict of 2"),
    ],
)
def test_batches_that_are_no_pair_are_refused(batch, message):
    hessian = HessianOperator(nn.Linear(4, 1), supervised(nn.MSELoss()), [batch])
    with pytest.raises(DataError, match=rf"supervised.*\(inputs, targets\), {message}"):
        hessian.value()


def test_a_class_that_does_not_exist_is_refused_with_the_batch():
    loss = supervised(nn.CrossEntropyLoss(weight=torch.ones(3)))
    x = torch.ones(2, 4)
    data = [(x, torch.tensor([0, 1])), (x, torch.tensor([0, 7]))]
    hessian = HessianOperator(nn.Linear(4, 3), loss, data)
    with pytest.raises(DataError, match=r"terms of batch 1 raised IndexError.*index 7") as caught:
        hessian.to_dense()
    assert isinstance(caught.value.__cause__, IndexError)


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        (None, 1),
        (torch.ones(5, 2), 5),
        (torch.tensor(3.0), 1),
        ((["a", "b"], torch.ones(4)), 4),
        ({"name": "x", "ids": torch.ones(3, 9)}, 3),
        ([{"a": (torch.ones(2), torch.ones(2, 7))}], 2),
    ],
)
def test_samples_are_counted_in_the_first_dimension(batch, count):
    assert number_of_samples(batch) == count


@pytest.mark.parametrize(
    "batch",
    [
        [{"a": (torch.ones(2), torch.ones(7))}],
        {"step": torch.tensor(3), "x": torch.ones(5, 2), "y": torch.ones(5)},
        {"class_weight": torch.ones(3), "x": torch.ones(5, 2), "y": torch.ones(5)},
    ],
)
def test_a_batch_of_tensors_of_several_lengths_needs_a_weight(batch):
    with pytest.raises(DataError, match=r"first dimensions differ\. Pass weight="):
        number_of_samples(batch)


@pytest.mark.parametrize("criterion", [nn.MSELoss(), nn.HuberLoss(), functional.l1_loss])
def test_predictions_are_not_compared_with_targets_of_another_shape(criterion):
    hessian = HessianOperator(
        nn.Linear(3, 1), supervised(criterion), [(torch.ones(5, 3), torch.ones(5))]
    )
    with pytest.raises(LossError, match=r"\(5, 1\) and the targets \(5,\).*unsqueeze"):
        hessian.value()


@pytest.mark.parametrize("batch", ["text", [1, 2], {"a": "b"}, ()])
def test_a_batch_without_a_tensor_needs_a_weight(batch):
    with pytest.raises(DataError, match=r"cannot tell how many samples.*pass weight="):
        number_of_samples(batch)
    model = nn.Linear(2, 1)

    def loss(model, _batch):
        return (model.weight**2).sum()

    with pytest.raises(DataError, match="cannot tell how many samples"):
        HessianOperator(model, loss, [batch], "weight").to_dense()
    known = HessianOperator(model, loss, [batch], "weight", weight=lambda _: 2)
    assert known.to_dense().tolist() == [[2, 0], [0, 2]]


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf")])
def test_an_impossible_weight_is_refused_with_the_batch(weight):
    data = [(torch.ones(2, 4), torch.ones(2, 1))]
    hessian = HessianOperator(
        nn.Linear(4, 1), supervised(nn.MSELoss()), data, weight=lambda _: weight
    )
    with pytest.raises(DataError, match="weight of batch 0 is"):
        hessian.value()


def test_a_weight_function_that_fails_is_reported_with_the_batch():
    data = [(torch.ones(2, 4), torch.ones(2, 1))]
    hessian = HessianOperator(
        nn.Linear(4, 1), supervised(nn.MSELoss()), data, weight=lambda batch: batch["mask"]
    )
    with pytest.raises(DataError, match="counting the terms of batch 0 raised TypeError"):
        hessian.value()


def test_losses_say_what_they_are():
    assert repr(supervised(nn.MSELoss())) == "supervised(MSELoss())"
    assert repr(supervised(functional.mse_loss)) == "supervised(mse_loss)"
    assert repr(causal_lm()) == "causal_lm()"
    assert repr(masked_lm()) == "masked_lm()"
    assert repr(classification()) == "classification()"
