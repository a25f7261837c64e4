"""Masked language models from a directory, on a text or a table."""

import json

import numpy as np
import pytest
import torch
from torch.nn import functional

import spectra
from spectra.errors import ArgumentError, ArgumentTypeError, TargetError
from spectra.integrations.huggingface import causal_lm, masked_lm
from tests.cases.checkpoints import SIZES, SPECIAL, curved, save, word_tokenizer

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

TEXT = "the quick brown fox jumps over the lazy dog and the cat sleeps on a good mat " * 5
MASK, IGNORED = SPECIAL.index("[MASK]"), -100


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))
    return save(curved(model), tmp_path_factory.mktemp("bert"), word_tokenizer())


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def sequences(data):
    """The tokens of each sequence before any was hidden, without padding."""
    return [
        torch.where(labels == IGNORED, row, labels)[seen == 1]
        for batch in data
        for row, seen, labels in zip(*batch.values(), strict=True)
    ]


def test_the_loss_is_the_mean_over_all_hidden_tokens(saved, text):
    model, loss, data = masked_lm(
        saved, text, tokens_per_sequence=12, max_tokens=75, dtype=torch.float64
    )
    terms = []
    for batch in data:
        for ids, mask, labels in zip(*batch.values(), strict=True):
            # Every sequence alone, without padding.
            logits = model(input_ids=ids[mask == 1][None]).logits[0]
            terms.append(functional.cross_entropy(logits, labels[mask == 1], reduction="none"))
    terms = torch.cat(terms).detach()
    count = sum(loss.weight(batch) for batch in data)
    assert count == int((terms != 0).sum()) == 7 * 2 + 1
    H = spectra.HessianOperator(model, loss, data)
    assert H.value() == pytest.approx(float(terms.sum()) / count, rel=1e-12)


def test_each_sequence_is_a_piece_of_the_text_between_special_tokens(saved, text):
    _, _, data = masked_lm(saved, text, tokens_per_sequence=12, max_tokens=75)
    words = word_tokenizer()(TEXT, add_special_tokens=False)["input_ids"][:75]
    rows = sequences(data)
    assert [len(row) for row in rows] == [12] * 7 + [7]
    assert all(row[0] == 1 and row[-1] == 2 for row in rows)
    assert torch.cat([row[1:-1] for row in rows]).tolist() == words


def test_of_ten_hidden_tokens_eight_are_masked_one_replaced_and_one_left():
    generator = torch.Generator().manual_seed(1)
    sequence, vocabulary = list(range(1000)), 10**6
    fates = np.zeros(3)
    for _ in range(20):
        shown, labels = language_masked(sequence, slice(1, -1), 999_999, vocabulary, generator)
        hidden = [i for i, label in enumerate(labels) if label != IGNORED]
        assert len(hidden) == 150
        assert all(labels[i] == i for i in hidden)
        assert 0 < hidden[0] < hidden[-1] < 999
        assert all(shown[i] == i for i in set(range(1000)).difference(hidden))
        masked = sum(shown[i] == 999_999 for i in hidden)
        left = sum(shown[i] == i for i in hidden)
        fates += [masked, left, len(hidden) - masked - left]
    # Three standard deviations of a binomial.
    np.testing.assert_allclose(fates / 3000, [0.8, 0.1, 0.1], atol=3 * (0.16 / 3000) ** 0.5)


def language_masked(*arguments):
    from spectra.integrations.huggingface import language

    return language._masked(*arguments)


def test_hidden_tokens_are_drawn_once_from_the_seed_and_not_from_the_global_state(saved, text):
    def drawn(size, **options):
        _, _, data = masked_lm(
            saved, text, tokens_per_sequence=12, sequences_per_batch=size, **options
        )
        return [
            (row[seen == 1].tolist(), labels[seen == 1].tolist())
            for batch in data
            for row, seen, labels in zip(*batch.values(), strict=True)
        ]

    before = torch.get_rng_state()
    first = drawn(4)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(5)
    assert drawn(4) == drawn(3) == first
    assert drawn(4, seed=1) != first


def test_how_sequences_are_batched_does_not_change_the_hessian(saved, text):
    products = []
    for size in (1, 3, 100):
        problem = masked_lm(
            saved,
            text,
            tokens_per_sequence=11,
            sequences_per_batch=size,
            max_tokens=60,
            dtype=torch.float64,
        )
        H = spectra.HessianOperator(*problem)
        products.append(H @ torch.linspace(-1, 1, H.shape[0], dtype=torch.float64))
    torch.testing.assert_close(products[1], products[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(products[2], products[0], rtol=1e-10, atol=1e-12)
    assert products[0].abs().max() > 0.1


# --- tables ---------------------------------------------------------------------------------------

ROWS = ["the quick brown fox", "a cat", "the lazy dog sleeps on a mat and jumps"]


class Dataset:
    """What of a `datasets.Dataset` is used."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __iter__(self):
        return iter(self.rows)


def write_csv(path):
    path.write_text("id,sentence\n" + "".join(f'{i},"{r}"\n' for i, r in enumerate(ROWS)))
    return path


def write_jsonl(path):
    path.write_text("\n".join(json.dumps({"sentence": row}) for row in ROWS) + "\n\n")
    return path


@pytest.mark.parametrize(
    "make",
    [
        lambda _: [{"sentence": row} for row in ROWS],
        lambda _: Dataset([{"sentence": row, "label": 0} for row in ROWS]),
        lambda place: write_csv(place / "rows.csv"),
        lambda place: str(write_jsonl(place / "rows.jsonl")),
    ],
    ids=["list", "dataset", "csv", "jsonl"],
)
def test_each_row_of_a_table_is_a_text_of_its_own(make, saved, tmp_path):
    _, _, data = masked_lm(saved, make(tmp_path), text="sentence", tokens_per_sequence=7)
    rows = sequences(data)
    words = [word_tokenizer()(row, add_special_tokens=False)["input_ids"] for row in ROWS]
    # The third has nine words, in pieces of five and four.
    assert [row[1:-1].tolist() for row in rows] == [*words[:2], words[2][:5], words[2][5:]]


def test_a_causal_model_reads_tables_too_and_predicts_within_each_row(tmp_path):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    directory = save(curved(model), tmp_path, word_tokenizer())
    model, loss, data = causal_lm(
        directory, [{"text": row} for row in ROWS], sequences_per_batch=2, dtype=torch.float64
    )
    assert [batch["attention_mask"].sum(dim=1).tolist() for batch in data] == [[4, 2], [9]]
    assert sum(map(loss.weight, data)) == 3 + 1 + 8


def test_no_more_tokens_than_asked_for_are_read(saved):
    _, _, data = masked_lm(saved, [{"text": row} for row in ROWS], max_tokens=5)
    assert [b["attention_mask"].sum(dim=1).tolist() for b in data] == [[6, 3]]


@pytest.mark.parametrize(
    ("table", "error", "message"),
    [
        ([{"sentence": "the cat"}], TargetError, "row 0 has no column 'text'; it has 'sentence'"),
        ([{"text": 3}], TargetError, "row 0 has a int in column 'text', expected a text"),
        (["the cat"], ArgumentTypeError, "row 0 of the table is a str, expected a dict"),
        ({"train": [], "test": []}, ArgumentTypeError, "a dict; choose one of 'train', 'test'"),
        (iter([{"text": "a"}]), ArgumentTypeError, "got a list_iterator"),
        (3, ArgumentTypeError, "expected a path, or a table whose rows are dicts"),
        ([], TargetError, "makes no tokens of the text"),
    ],
)
def test_what_is_no_table_of_texts_is_refused(table, error, message, saved):
    with pytest.raises(error, match=message):
        masked_lm(saved, table)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", "", "has no rows"),
        ("t.jsonl", '{"text": "a"}\n[1]\n', "no table of the kind .jsonl: line 2 is a JSON list"),
        ("t.jsonl", "the cat\n", "no table of the kind .jsonl: Expecting value"),
        ("t.csv", "text\n", "has no rows"),
        ("t.csv", "label\n1\n", "row 0 has no column 'text'; it has 'label'"),
        ("t.csv", None, "cannot read the text .*t.csv': No such file"),
    ],
)
def test_a_file_that_is_no_table_is_named(name, content, message, saved, tmp_path):
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(TargetError, match=message):
        masked_lm(saved, tmp_path / name)


# --- wrong input ----------------------------------------------------------------------------------


def test_a_model_without_a_masked_head_is_refused(tmp_path, text):
    torch.manual_seed(0)
    for name, model, message in (
        ("bert", transformers.BertModel(transformers.BertConfig(**SIZES)), "has no masked"),
        (
            "llama",
            transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
            "without a masked language-modelling loss",
        ),
    ):
        directory = save(model, tmp_path / name, word_tokenizer())
        with pytest.raises(TargetError, match=rf"{message}.*give a TARGET"):
            masked_lm(directory, text, tokens_per_sequence=12)


def test_a_tokenizer_without_a_mask_is_refused(saved, tmp_path, text):
    model = transformers.BertForMaskedLM.from_pretrained(saved)
    save(model, tmp_path, word_tokenizer(mask_token=None))
    with pytest.raises(TargetError, match="has no mask token"):
        masked_lm(tmp_path, text)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tokens_per_sequence": 2}, "leaves no place for the text between the 2 tokens"),
        ({"tokens_per_sequence": 17}, "sequences of 17 tokens are longer than the 16"),
        ({"tokens_per_sequence": 0}, "expected at least 1, 1 and 1"),
    ],
)
def test_impossible_lengths_are_refused(wrong, message, saved, text):
    with pytest.raises(ArgumentError, match=message):
        masked_lm(saved, text, **wrong)
