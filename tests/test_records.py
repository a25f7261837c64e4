"""A file of records gives back what was written, loses no more than its torn end, or says so."""

import contextlib
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spectra.errors import StorageError
from spectra.records import RecordFile


def content(file):
    """All that a file says."""
    return [(record.meta, [a.clone() for a in file.read(record)]) for record in file.records]


def same(one, other):
    return len(one) == len(other) and all(
        a == b and len(x) == len(y) and all(map(torch.equal, x, y))
        for (a, x), (b, y) in zip(one, other, strict=True)
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file"


@pytest.fixture(autouse=True)
def _closed(monkeypatch):
    """A file that was opened and not closed would warn."""
    opened, original = [], RecordFile.__init__

    def noted(self, path):
        original(self, path)
        opened.append(self)

    monkeypatch.setattr(RecordFile, "__init__", noted)
    yield
    for file in opened:
        file.close()


@pytest.fixture
def written(path):
    file = RecordFile.create(path, {"kind": "header"})
    file.append({"kind": "a", "n": 1}, [torch.arange(5.0), torch.tensor(7), torch.empty(0)])
    file.append({"kind": "b"})
    file.append({"kind": "c"}, [torch.randn(3, 4, dtype=torch.float64)])
    before = content(file)
    file.close()
    return before


def test_what_was_written_is_read(path, written):
    file = RecordFile(path)
    assert not file.torn
    assert same(content(file), written)
    assert torch.equal(written[1][1][0], torch.arange(5.0))


def test_what_is_cut_off_anywhere_loses_the_records_behind_and_no_other(path, written):
    whole = path.read_bytes()
    found = set()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        try:
            file = RecordFile(path)
        except StorageError:
            # Not even the header is there.
            assert not found
            continue
        kept = content(file)
        assert same(kept, written[: len(kept)])
        assert file.torn == (end not in {record.start + record.size for record in file.records})
        found.add(len(kept))
        file.close()
    assert found == {1, 2, 3}


def test_records_are_appended_where_a_torn_one_began(path, written):
    path.write_bytes(path.read_bytes()[:-1])
    file = RecordFile(path)
    assert file.torn
    file.append({"kind": "d"}, [torch.ones(2)])
    file.close()
    file = RecordFile(path)
    assert not file.torn
    assert [record.meta["kind"] for record in file.records] == ["header", "a", "b", "d"]
    assert torch.equal(next(file.read(file.records[-1])), torch.ones(2))


def test_every_changed_byte_is_found(path, written):
    whole = path.read_bytes()
    with contextlib.closing(RecordFile(path)) as file:
        before_last = file.records[-2].start + file.records[-2].size
    spoiled = 0
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << (place % 8)
        path.write_bytes(changed)
        try:
            with contextlib.closing(RecordFile(path)) as file:
                found = content(file)
        except StorageError:
            continue
        # Of the last record what else is spoiled than its length is as good as cut off.
        assert place >= before_last
        assert file.torn
        assert same(found, written[:-1])
        spoiled += 1
    assert spoiled > 96


def test_blocks_that_the_disk_never_got_are_a_record_that_was_cut_off(path, written):
    whole = path.read_bytes()
    with contextlib.closing(RecordFile(path)) as file:
        ends = [record.start + record.size for record in file.records]
    for zeros in range(1, len(whole) - ends[0]):
        path.write_bytes(whole[:-zeros] + bytes(zeros))
        try:
            with contextlib.closing(RecordFile(path)) as file:
                found = content(file)
        except StorageError:
            # Zeros in the middle of a head that ends in other bytes by chance, or across records.
            assert zeros > len(whole) - ends[-2]
            continue
        assert same(found, written[: len(found)])


def test_a_record_that_was_taken_out_is_missed(path, written):
    file = RecordFile(path)
    a, b = file.records[1:3]
    end_of_a, end_of_b = a.start + a.size, b.start + b.size
    file.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:end_of_a] + whole[end_of_b:])
    with pytest.raises(StorageError, match="not what was written"):
        RecordFile(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_bytes_of_any_kind_are_refused(tmp_path_factory, noise):
    path = tmp_path_factory.mktemp("noise") / "file"
    path.write_bytes(noise)
    with pytest.raises(StorageError):
        RecordFile(path)


def test_lengths_that_no_file_has_are_refused_without_taking_memory(path, written):
    whole = path.read_bytes()
    start = len(b"spectra checkpoint, format 1\n")
    path.write_bytes(whole[:start] + b"\xff" * 16 + whole[start + 16 :])
    with pytest.raises(StorageError, match="not what was written"):
        RecordFile(path)


def test_a_rewritten_file_has_what_was_kept(path, written):
    file = RecordFile(path)
    header, a, _, c = file.records
    file.rewrite([(header, True), (a, False), (c, True)], {"kind": "d"}, [torch.ones(1)])
    kinds = [(record.meta["kind"], record.size > 0) for record in file.records]
    assert kinds == [("header", False), ("a", False), ("c", True), ("d", True)]
    assert torch.equal(next(file.read(file.records[2])), written[3][1][0])
    file.append({"kind": "e"})
    file.close()
    assert [record.meta["kind"] for record in RecordFile(path).records][-1] == "e"


def test_another_process_is_kept_out(path, written):
    file = RecordFile(path)
    child = os.fork()
    if child == 0:
        try:
            RecordFile(path)
        except StorageError as error:
            os._exit(0 if "another run" in str(error) else 2)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    file.close()
    RecordFile(path).close()


def test_what_is_no_ordinary_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.raises(StorageError, match="ordinary file"):
            RecordFile(tmp_path / name)


def test_a_directory_that_cannot_be_written_to_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write the checkpoint"):
        RecordFile.create(tmp_path / "file" / "beneath", {"kind": "header"})
