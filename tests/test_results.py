import dataclasses
import json
import math
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from spectra import load
from spectra.analysis.analyze import analyze
from spectra.documents import sealed
from spectra.errors import ArgumentError, StorageError
from spectra.results import FORMAT_VERSION, Result, versions


@dataclasses.dataclass(frozen=True, eq=False)
class Sample(Result):
    value: Any = None
    other: Any = None


@dataclasses.dataclass(frozen=True, eq=False)
class Strict(Result):
    """A result that examines what it is given, as a damaged file may not survive."""

    values: np.ndarray

    def __post_init__(self):
        if self.values.ndim != 1:
            raise IndexError


def same(a, b):
    """Equal in type, dtype and every digit; nan equals nan."""
    if isinstance(a, Result):
        fields = [f.name for f in dataclasses.fields(a)]
        return type(a) is type(b) and all(same(getattr(a, f), getattr(b, f)) for f in fields)
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and math.isnan(a):
        return math.isnan(b)
    return a == b


def resealed(document):
    """The document with the checksum of what it says now."""
    return sealed({name: value for name, value in document.items() if name != "checksum"})


def round_trip(path, value):
    return load(Sample(value).save(path / "result")).value


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        -3,
        10**40,
        0.1,
        math.nan,
        math.inf,
        -math.inf,
        "λ – «größe»\n\0",
        # Half of a surrogate pair: a name of the user's costs no result.
        {"\ud800": torch.ones(1), "\\ud800": "\udfff\\ud800"},
        (1, (2.0, "x"), ()),
        [1, [2, (3,)]],
        {"kind": "Sample", "dict": {"tuple": (1,)}, "array": "a", "": None},
        np.arange(6.0).reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(5)[::-1],
        np.array(3.5, dtype=np.float32),
        np.zeros((0, 3)),
        np.array([math.nan, math.inf, -0.0]),
        np.array([True, False]),
        np.array([1 + 2j], dtype=np.complex64),
        torch.arange(4).reshape(2, 2).T,
        torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        torch.tensor(1.0, dtype=torch.float64),
        {"a.b": np.ones(2), "a": {"b": np.zeros(3)}, "a.b'": torch.ones(1)},
        Sample((Sample(np.ones(2)), Sample(torch.ones(1)))),
    ],
    ids=lambda value: f"{type(value).__name__}",
)
def test_what_was_saved_is_what_is_loaded(tmp_path, value):
    assert same(round_trip(tmp_path, value), value)


def test_numpy_scalars_come_back_as_python_numbers(tmp_path):
    value = (np.float32(0.1), np.int64(7), np.bool_(True), np.str_("x"))
    assert round_trip(tmp_path, value) == (float(np.float32(0.1)), 7, True, "x")


def test_tensors_in_a_graph_or_sharing_memory_are_saved_as_plain_numbers(tmp_path):
    whole = torch.ones(4, requires_grad=True)
    part = whole[:2]
    loaded = round_trip(tmp_path, (whole, part))
    assert same(loaded, (torch.ones(4), torch.ones(2)))


def test_the_provenance_travels_with_the_result(tmp_path):
    result = Sample(1.0, provenance={"seed": 0, "operator": {"n": 3}, "options": ("a", None)})
    assert same(load(result.save(tmp_path / "r")), result)


def test_the_file_records_the_versions_that_wrote_it(tmp_path):
    document = json.loads(Sample(1).save(tmp_path / "r").read_text(encoding="utf-8"))
    assert document["versions"] == versions()
    assert document["format"] == FORMAT_VERSION
    assert set(versions()) >= {"spectra", "torch", "numpy", "scipy", "python"}


def test_the_json_is_strict(tmp_path):
    def refuse(constant):
        raise AssertionError(constant)

    path = Sample((math.nan, math.inf, -math.inf)).save(tmp_path / "r")
    json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def test_a_dot_in_the_name_is_part_of_it(tmp_path):
    first, second = Sample(1).save(tmp_path / "top.10"), Sample(2).save(tmp_path / "top.20")
    assert (first.name, second.name) == ("top.10.json", "top.20.json")
    assert load(tmp_path / "top.10").value == 1


@pytest.mark.parametrize("name", ["r", "r.json", "r.safetensors"])
def test_a_result_is_found_under_any_of_its_names(tmp_path, name):
    Sample(np.ones(2)).save(tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.json", "r.safetensors"]
    assert same(load(str(tmp_path / name)).value, np.ones(2))


def test_missing_folders_are_made(tmp_path):
    assert load(Sample(1).save(tmp_path / "a" / "b" / "c")).value == 1


def test_a_result_replaces_an_older_one_with_all_its_files(tmp_path):
    Sample(np.ones(3)).save(tmp_path / "r")
    Sample("no arrays").save(tmp_path / "r")
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]
    assert load(tmp_path / "r").value == "no arrays"


@pytest.mark.parametrize(
    "value",
    [
        {1, 2},
        object(),
        1j,
        b"bytes",
        torch.float32,
        {1: "one"},
        {"a": [object()]},
        np.array(["text"]),
        np.array([None]),
        np.array([1.0], dtype=np.longdouble),
        np.array([1.0], dtype=">f8"),
        np.array([1j], dtype=np.complex128),
        torch.eye(2).to_sparse(),
        torch.ones(2, device="meta"),
    ],
    # Not repr: an address in a name would differ between test processes.
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_saved_is_refused_and_leaves_no_file(tmp_path, value):
    with pytest.raises(StorageError, match=r"cannot save|could not write"):
        Sample(value).save(tmp_path / "r")
    assert not (tmp_path / "r.json").exists()


def test_the_field_that_cannot_be_saved_is_named(tmp_path):
    with pytest.raises(StorageError, match=r"'value\.inner\.1'.*set has no place"):
        Sample({"inner": [1, {2}]}).save(tmp_path / "r")


def test_a_result_inside_itself_is_refused(tmp_path):
    endless = []
    endless.append(endless)
    with pytest.raises(StorageError, match="RecursionError"):
        Sample(endless).save(tmp_path / "r")


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="could not write"):
        Sample(1).save(tmp_path / "file" / "r")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(StorageError, match="could not write"):
        Sample(1).save(tmp_path / "folder")
    with pytest.raises(StorageError, match="could not write"):
        Sample(1).save(tmp_path / "a\0b")


@pytest.mark.parametrize("path", ["", ".", "/"])
def test_a_path_without_a_name_is_refused(path):
    with pytest.raises(ArgumentError, match="name a file"):
        Sample(1).save(path)
    with pytest.raises(ArgumentError, match="name a file"):
        load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(StorageError, match=r"no result at .*absent\.json.*passed to save"):
        load(tmp_path / "absent")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "damaged or not one of spectra's"),
        ("{", "damaged or not one of spectra's"),
        ("[" * 100_000, "damaged or not one of spectra's"),
        ("null", "holds no result"),
        ("[1, 2]", "holds no result"),
        ('{"result": 1}', "format None"),
        ('{"format": 999, "result": 1}', "format 999.*update spectra"),
        ('{"format": 1, "result": 1}', "holds no result"),
        ('{"format": 1, "result": {}}', "damaged: KeyError"),
        ('{"format": 1, "result": {"kind": "Nonsense", "fields": {}}}', "damaged: KeyError"),
        ('{"format": 1, "result": {"kind": [], "fields": {}}}', "damaged: TypeError"),
        ('{"format": 1, "result": {"kind": "Sample", "fields": 3}}', "damaged: AttributeError"),
        (
            '{"format": 1, "result": {"kind": "Sample", "fields": {"odd": 1}}}',
            "Sample has no field 'odd'",
        ),
        ('{"format": 1, "result": {"kind": "Strict", "fields": {}}}', "damaged: TypeError"),
        (
            '{"format": 1, "result": {"kind": "Sample", "fields": {"value": {"array": "x"}}}}',
            "damaged: KeyError",
        ),
        (
            '{"format": 1, "result": {"kind": "Sample", "fields": {"value": {"float": 1'
            + "0" * 400
            + "}}}}",
            "damaged: OverflowError",
        ),
    ],
)
def test_a_damaged_document_is_refused(tmp_path, content, message):
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(StorageError, match=message):
        load(tmp_path / "r")


def test_arrays_that_a_result_class_refuses_are_damage(tmp_path):
    path = Strict(np.ones(3)).save(tmp_path / "r")
    text = path.read_text(encoding="utf-8")
    assert '"shape": [\n' in text
    document = json.loads(text)
    document["result"]["fields"]["values"]["shape"] = [3, 1]
    path.write_text(json.dumps(resealed(document)))
    with pytest.raises(StorageError, match="IndexError"):
        load(path)


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_truncated_arrays_are_refused(tmp_path, keep):
    Sample(np.arange(10.0)).save(tmp_path / "r")
    arrays = tmp_path / "r.safetensors"
    arrays.write_bytes(arrays.read_bytes()[:keep])
    with pytest.raises(StorageError, match="damaged"):
        load(tmp_path / "r")


def test_missing_arrays_are_refused(tmp_path):
    Sample(np.arange(10.0)).save(tmp_path / "r")
    (tmp_path / "r.safetensors").unlink()
    with pytest.raises(StorageError, match="damaged"):
        load(tmp_path / "r")


def test_arrays_of_another_kind_are_refused(tmp_path):
    Sample(np.arange(10.0)).save(tmp_path / "r")
    save_file({"value": torch.ones(10, dtype=torch.bfloat16)}, tmp_path / "r.safetensors")
    with pytest.raises(StorageError, match="damaged"):
        load(tmp_path / "r")


def test_nothing_is_pickled(tmp_path):
    Sample((np.ones(2), torch.ones(2), "x")).save(tmp_path / "r")
    assert set(load_file(tmp_path / "r.safetensors")) == {"value.0", "value.1"}
    json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved result, with its two files as bytes."""
    path = tmp_path_factory.mktemp("results")
    value = {"numbers": (1, 2.5, math.nan), "text": "λ", "inner": Strict(np.ones(2))}
    Sample(value, torch.ones(2, 2, dtype=torch.bfloat16)).save(path / "r")
    files = {suffix: (path / f"r{suffix}").read_bytes() for suffix in (".json", ".safetensors")}
    return path, files


@given(data=st.data())
@hypothesis_settings(max_examples=300)
def test_no_change_to_a_file_raises_anything_but_a_storage_error(folder, data):
    path, files = folder
    suffix = data.draw(st.sampled_from(sorted(files)))
    content = bytearray(files[suffix])
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(content) - 1))
        stop = data.draw(st.integers(start, min(start + 8, len(content))))
        content[start:stop] = data.draw(
            st.binary(max_size=4) | st.sampled_from([b"{}", b"null", b'"kind"', b"-1", b"[", b"9"])
        )
    for other, original in files.items():
        (path / f"r{other}").write_bytes(bytes(content) if other == suffix else original)
    try:
        result = load(path / "r")
    except StorageError:
        return
    assert isinstance(result, Result)


# --- replaced while it is read --------------------------------------------------------------------

WRITER = """
import sys
import numpy as np
from tests.test_results import Sample
for i in range(100_000):
    # Every third one has no arrays: then a file has to go.
    Sample(i, np.full(4096, i) if i % 3 else None).save(sys.argv[1])
"""


def is_whole(found):
    return found.other is None if found.value % 3 == 0 else set(found.other) == {found.value}


def read_for_a_while(path, seen):
    """Until two results were seen, and half a second."""
    latest = time.monotonic() + 60
    while not path.with_suffix(".json").exists():
        assert time.monotonic() < latest
    end = time.monotonic() + 0.5
    while time.monotonic() < end or (len(seen) < 2 and time.monotonic() < latest):
        found = load(path)
        assert is_whole(found)
        seen.add(found.value)
    assert len(seen) > 1


def test_whoever_reads_while_a_result_is_replaced_finds_one_whole_and_so_after_a_kill(tmp_path):
    path = tmp_path / "r"
    command = [sys.executable, "-c", WRITER, str(path)]
    seen = set()
    for _ in range(3):
        with subprocess.Popen(command) as writer:
            try:
                read_for_a_while(path, seen)
            finally:
                writer.kill()
        assert is_whole(load(path))


def test_a_run_directory_is_loaded_by_its_own_name(tmp_path):
    (tmp_path / "run").mkdir()
    analysis = analyze(np.diag(np.arange(1.0, 9.0)), 2, trace=False, progress=False)
    analysis.save(tmp_path / "run" / "analysis")
    loaded = load(tmp_path / "run")
    np.testing.assert_array_equal(loaded.eigenpairs.values, analysis.eigenpairs.values)
    # A result that was saved under the name of the directory comes first.
    analysis.eigenpairs.save(tmp_path / "run")
    assert type(load(tmp_path / "run")) is type(analysis.eigenpairs)
