"""Classifiers of texts and images from a directory, on a table."""

import json

import numpy as np
import pytest
import torch
from torch.nn import functional

import spectra
from spectra.errors import ArgumentError, TargetError
from spectra.integrations.huggingface import classifier, task_of
from tests.cases.checkpoints import SIZES, curved, save, word_tokenizer

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

NAMES = {0: "bad", 1: "fine", 2: "good"}
LABELLED = {"num_labels": 3, "id2label": NAMES, "label2id": {v: k for k, v in NAMES.items()}}
ROWS = [
    {"text": "the quick brown fox jumps over the lazy dog", "label": "fine"},
    {"text": "a good cat", "label": "good"},
    {"text": "the cat sleeps on the mat", "label": 1},
    {"text": "bad dog", "label": 0},
    {"text": "a cat jumps", "label": "2"},
]
CLASSES = [1, 2, 1, 0, 2]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, **LABELLED)
    model = curved(transformers.BertForSequenceClassification(config))
    return save(model, tmp_path_factory.mktemp("bert"), word_tokenizer())


def texts_alone(model):
    """The loss of every text by itself, without padding."""
    terms = []
    for row, label in zip(ROWS, CLASSES, strict=True):
        ids = torch.tensor([word_tokenizer()(row["text"])["input_ids"]])
        logits = model(input_ids=ids).logits
        terms.append(functional.cross_entropy(logits, torch.tensor([label])))
    return torch.stack(terms).detach()


def product(problem):
    H = spectra.HessianOperator(*problem)
    return H @ torch.linspace(-1, 1, H.shape[0], dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 2, 100])
def test_the_loss_is_the_mean_over_all_texts(size, saved):
    model, loss, data = classifier(saved, ROWS, rows_per_batch=size, dtype=torch.float64)
    assert len(data) == {1: 5, 2: 3, 100: 1}[size]
    assert not model.training
    assert sum(map(loss.weight, data)) == 5
    value = spectra.HessianOperator(model, loss, data).value()
    assert value == pytest.approx(float(texts_alone(model).mean()), rel=1e-12)


def test_how_rows_are_batched_does_not_change_the_hessian(saved):
    products = [
        product(classifier(saved, ROWS, rows_per_batch=size, dtype=torch.float64))
        for size in (1, 2, 100)
    ]
    torch.testing.assert_close(products[1], products[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(products[2], products[0], rtol=1e-10, atol=1e-12)
    assert products[0].abs().max() > 0.1


@pytest.mark.parametrize("padding", [0, 4, None])
def test_a_decoder_finds_the_end_of_each_text_whatever_it_pads_with(padding, tmp_path):
    """It classifies by the last token that is not its own padding."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SIZES, "pad_token_id": padding}, **LABELLED)
    model = curved(transformers.LlamaForSequenceClassification(config))
    directory = save(model, tmp_path, word_tokenizer())
    model, loss, data = classifier(directory, ROWS, dtype=torch.float64)
    assert len(data) == (5 if padding is None else 1)
    value = spectra.HessianOperator(model, loss, data).value()
    # Beyond single precision: the model's norms are computed in it.
    assert value == pytest.approx(float(texts_alone(model).mean()), rel=1e-6)


def test_longer_texts_are_cut(saved):
    _, _, data = classifier(saved, ROWS, tokens_per_sequence=5)
    assert data[0]["attention_mask"].sum(dim=1).tolist() == [5, 5, 5, 4, 5]
    assert data[0]["input_ids"][:, 0].tolist() == [1] * 5
    assert data[0]["input_ids"][0, -1] == 2


def test_other_columns_can_be_named(saved):
    renamed = [{"review": row["text"], "stars": row["label"], "text": 7} for row in ROWS]
    _, _, data = classifier(saved, renamed, text="review", label="stars")
    assert data[0]["labels"].tolist() == CLASSES


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_file_of_rows_is_read(kind, saved, tmp_path):
    path = tmp_path / f"rows.{kind}"
    lines = [json.dumps(row) for row in ROWS]
    if kind == "csv":
        lines = ["label,text", *(f'{row["label"]},"{row["text"]}"' for row in ROWS)]
    path.write_text("\n".join(lines), encoding="utf-8")
    _, _, data = classifier(saved, path)
    _, _, expected = classifier(saved, ROWS)
    assert data[0]["labels"].tolist() == CLASSES
    assert torch.equal(data[0]["input_ids"], expected[0]["input_ids"])


# --- images ---------------------------------------------------------------------------------------


def vit(directory, **options):
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=8,
        intermediate_size=10,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        **{**LABELLED, **options},
    )
    return save(curved(transformers.ViTForImageClassification(config)), directory)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return vit(tmp_path_factory.mktemp("vit"))


def pixels(count=5):
    g = torch.Generator().manual_seed(2)
    return torch.randn(count, 3, 8, 8, generator=g, dtype=torch.float64)


def as_tensor(x):
    return x


def as_array(x):
    return x.numpy()


def as_lists(x):
    return x.tolist()


@pytest.mark.parametrize("form", [as_tensor, as_array, as_lists])
def test_pixels_are_taken_as_they_are_in_the_models_precision(form, images):
    rows = [{"pixel_values": form(x), "label": c} for x, c in zip(pixels(), CLASSES, strict=True)]
    model, loss, data = classifier(images, rows, rows_per_batch=2, dtype=torch.float64)
    assert [len(batch["labels"]) for batch in data] == [2, 2, 1]
    expected = functional.cross_entropy(model(pixels()).logits, torch.tensor(CLASSES))
    value = spectra.HessianOperator(model, loss, data).value()
    assert value == pytest.approx(float(expected.detach()), rel=1e-12)
    assert classifier(images, rows)[2][0]["pixel_values"].dtype == torch.float32


@pytest.mark.parametrize("grey", [False, True])
def test_images_are_prepared_by_the_checkpoints_own_processor(grey, images, tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    processors = pytest.importorskip("transformers.models.vit.image_processing_pil_vit")
    processor = processors.ViTImageProcessorPil(size={"height": 8, "width": 8})
    directory = save(
        transformers.ViTForImageClassification.from_pretrained(images), tmp_path, processor
    )
    rng = np.random.default_rng(0)
    shape = (20, 12) if grey else (20, 12, 3)
    pictures = [
        image_module.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)) for _ in range(3)
    ]
    rows = [{"picture": p, "label": 0} for p in pictures]
    _, _, [batch] = classifier(directory, rows, image="picture")
    expected = processor([p.convert("RGB") for p in pictures], return_tensors="pt")
    torch.testing.assert_close(batch["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"image": np.zeros((8, 8, 3), dtype=np.uint8), "label": 0}], "image processor in .*vit"),
        ([{"pixel_values": np.zeros((8, 8)), "label": 0}], r"shapes \[\(8, 8\)\], expected one"),
        (
            [{"pixel_values": np.zeros((3, s, 8)), "label": 0} for s in (8, 9)],
            r"shapes \[\(3, 8, 8\), \(3, 9, 8\)\]",
        ),
        ([{"picture": 0, "label": 0}], "row 0 has no column 'image'; it has 'picture', 'label'"),
    ],
)
def test_images_that_cannot_be_used_are_named(rows, message, images):
    with pytest.raises(TargetError, match=message):
        classifier(images, rows)


# --- wrong input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [3, -1, "superb", 1.0, None, "-1"])
def test_a_label_that_is_no_class_is_named(label, saved):
    rows = [*ROWS[:1], {"text": "a cat", "label": label}]
    with pytest.raises(TargetError, match=rf"row 1 has the label {label!r}; the model's 3 classes"):
        classifier(saved, rows)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "the table has no rows"),
        ([{"text": "a cat"}], "row 0 has no column 'label'; it has 'text'"),
        ([{"label": 0}], "row 0 has no column 'text'"),
    ],
)
def test_a_table_without_rows_or_columns_is_refused(rows, message, saved):
    with pytest.raises(TargetError, match=message):
        classifier(saved, rows)


@pytest.mark.parametrize(
    "options",
    [
        {"num_labels": 1},
        {"num_labels": 3, "problem_type": "multi_label_classification"},
        {"num_labels": 3, "problem_type": "regression"},
    ],
)
def test_what_does_not_choose_one_class_of_several_is_refused(options, tmp_path):
    config = transformers.BertConfig(**SIZES, **options)
    model = transformers.BertForSequenceClassification(config)
    directory = save(model, tmp_path, word_tokenizer())
    with pytest.raises(TargetError, match=r"does not choose one class of several.*give a TARGET"):
        classifier(directory, [{"text": "a cat", "label": 0}])


def test_a_checkpoint_without_a_classifier_is_refused(tmp_path):
    model = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))
    directory = save(model, tmp_path, word_tokenizer())
    with pytest.raises(TargetError, match=r"has no classification head.*give a TARGET"):
        classifier(directory, ROWS)


@pytest.mark.parametrize("wrong", [{"tokens_per_sequence": 0}, {"rows_per_batch": 0}])
def test_impossible_sizes_are_refused(wrong, saved):
    with pytest.raises(ArgumentError, match="expected at least 1"):
        classifier(saved, ROWS, **wrong)


def test_texts_beyond_the_context_are_refused(saved):
    with pytest.raises(ArgumentError, match="sequences of 17 tokens are longer than the 16"):
        classifier(saved, [{"text": "cat " * 15, "label": 0}])


def test_the_task_is_read_off_the_checkpoint(saved, images, tmp_path):
    assert task_of(saved) == task_of(images) == "classify"
    for kind, task in (("BertForMaskedLM", "masked"), ("BertModel", "causal")):
        model = getattr(transformers, kind)(transformers.BertConfig(**SIZES))
        assert task_of(save(model, tmp_path / kind)) == task
    (tmp_path / "BertModel" / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(TargetError, match=r"cannot read .*config.json': JSONDecodeError"):
        task_of(tmp_path / "BertModel")
