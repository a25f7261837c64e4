"""Files of arrays are those of safetensors; what is none takes neither memory nor time."""

import hashlib
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from spectra.arrays import arrays_checksum, arrays_file, read_arrays

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint64,
    torch.uint32,
    torch.uint16,
    torch.uint8,
    torch.bool,
]


def bits(array):
    return array.dtype, array.shape, array.reshape(-1).view(torch.uint8).tolist()


@pytest.fixture
def arrays():
    generator = torch.Generator().manual_seed(0)
    found = {}
    for i, dtype in enumerate(DTYPES):
        raw = torch.randint(0, 2, (3, 4, dtype.itemsize), generator=generator, dtype=torch.uint8)
        found[f"{i}.λ"] = raw.view(dtype).reshape(3, 4)
    return {
        **found,
        "scalar": torch.tensor(math.nan),
        "empty": torch.zeros(0, 3),
        "expanded": torch.ones(1, 1, 1).expand(1, 1, 1),
    }


def written(path, arrays):
    path.write_bytes(b"".join(arrays_file(arrays)))
    return path


def test_arrays_of_all_kinds_are_read_back_and_by_safetensors_too(arrays, tmp_path):
    path = written(tmp_path / "a", arrays)
    found, checksum = read_arrays(path)
    assert checksum == arrays_checksum(arrays) == hashlib.sha256(path.read_bytes()).hexdigest()
    other = load_file(path)
    assert set(found) == set(arrays) == set(other)
    for name, array in arrays.items():
        assert bits(found[name]) == bits(array) == bits(other[name])


def test_what_safetensors_writes_is_read(arrays, tmp_path):
    save_file(arrays, tmp_path / "a", metadata={"format": "pt"})
    found, _ = read_arrays(tmp_path / "a")
    assert {name: bits(array) for name, array in found.items()} == {
        name: bits(array) for name, array in arrays.items()
    }


def test_arrays_begin_where_their_numbers_are_aligned(arrays, tmp_path):
    content = written(tmp_path / "a", arrays).read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    for name, entry in json.loads(content[8 : 8 + length]).items():
        assert entry["data_offsets"][0] % arrays[name].element_size() == 0


def test_what_is_read_does_not_change_with_the_file(tmp_path):
    path = written(tmp_path / "a", {"x": torch.ones(1000)})
    array = read_arrays(path)[0]["x"]
    with path.open("r+b") as file:
        file.truncate(50)
    assert torch.equal(array, torch.ones(1000))


def test_a_dtype_that_the_format_lacks_is_named():
    with pytest.raises(TypeError, match=r"'x' is of torch.complex128, which safetensors does not"):
        arrays_checksum({"x": torch.ones(1, dtype=torch.complex128)})


def header(entries, rest=b"", length=None):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + rest


def entry(dtype="F64", shape=(1,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HUGE = 2**62


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "too few for the header"),
        (b"\x00" * 7, "too few for the header"),
        (header({}, length=2**63), "too few for the header"),
        (header({}, length=3), "too few for the header"),
        (header(b"[]"), "no object"),
        (header(b"\xff"), "invalid start byte"),
        (header(b"[" * 1000), "200 levels"),
        (header(b'{"a": {}, "a": {}}'), "occurs twice"),
        (header({}, b"x"), "describes 0 bytes of arrays, and it holds 1"),
        (header({"x": entry()}, b"1234567"), "describes 8 bytes of arrays, and it holds 7"),
        (header({"x": None}), "no dtype, shape and data_offsets"),
        (header({"x": {**entry(), "more": 1}}, b"8" * 8), "no dtype, shape and data_offsets"),
        (header({"x": entry("F4")}, b"8" * 8), "unknown dtype"),
        (header({"x": entry([])}, b"8" * 8), "unknown dtype"),
        (header({"x": entry(shape=(-1,))}, b"8" * 8), "no lists of counts"),
        (header({"x": entry(shape=(True,))}, b"8" * 8), "no lists of counts"),
        (header({"x": entry(shape=(1.0,))}, b"8" * 8), "no lists of counts"),
        (header({"x": entry(shape=(2**63,))}, b"8" * 8), "no lists of counts"),
        (header({"x": entry(shape=(1,) * 65)}, b"8" * 8), "no lists of counts"),
        (header({"x": entry(offsets=(0, 8, 8))}, b"8" * 8), "no lists of counts"),
        (header({"x": entry(shape=(2,))}, b"8" * 8), "takes 16 bytes"),
        (header({"x": entry(offsets=(8, 0))}, b"8" * 8), "takes 8 bytes"),
        (header({"x": entry(shape=(HUGE, 4))}, b"8" * 8), "takes "),
        (header({"x": entry(offsets=(1, 9))}, b"8" * 9), "begins at byte 1, expected 0"),
        (header({"x": entry(), "y": entry()}, b"8" * 8), "begins at byte 0, expected 8"),
        (header({"x": entry(shape=(HUGE // 8,), offsets=(0, HUGE))}), "describes"),
        (header({"x": entry(shape=(0, HUGE, HUGE), offsets=(0, 0))}), "cannot be held"),
    ],
)
def test_a_file_that_is_no_whole_file_of_arrays_is_refused(content, message, tmp_path):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_arrays(tmp_path / "a")
