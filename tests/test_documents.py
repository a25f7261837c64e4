"""Documents say what was written or are refused, whatever they hold."""

import hashlib
import json
import os
import sys
import threading

import pytest

from spectra.documents import check_seal, is_checksum, parse, read_document, sealed, to_bytes

DOCUMENT = {"a": [1, 2.5, -0.0, None, True, "λ\x00\ud800\\"], "b": {"c": {}, "d": 10**30}}


def test_a_sealed_document_is_read_back(tmp_path):
    path = tmp_path / "d.json"
    path.write_bytes(to_bytes(sealed(DOCUMENT)))
    found = read_document(path)
    check_seal(found)
    checksum = found.pop("checksum")
    assert is_checksum(checksum)
    assert json.dumps(found) == json.dumps(DOCUMENT)


def test_the_checksum_is_the_documented_one():
    """Anybody can compute it: SHA-256 of ASCII JSON without spaces and without the checksum."""
    text = b'{"x":[1.5,"\\u03bb"],"y":null}'
    assert sealed({"x": [1.5, "λ"], "y": None})["checksum"] == hashlib.sha256(text).hexdigest()


def test_spaces_and_spellings_say_nothing():
    document = sealed({"x": 1.0, "y": "λ"})
    text = json.dumps(document, indent=7).replace("\n", "\r\n").replace("1.0", "1.000e0")
    check_seal(parse(text.encode()))


@pytest.mark.parametrize(
    "change",
    [
        {"a": 1},
        {"a": DOCUMENT["a"], "b": {"d": 10**30, "c": {}}},
        {"a": [1.0, *DOCUMENT["a"][1:]]},
        {"a": [1, 2.5, 0.0, *DOCUMENT["a"][3:]]},
        {"more": None},
        {"checksum": None},
        {"checksum": "0" * 64},
        {"checksum": []},
    ],
)
def test_whatever_else_changes_is_damage(change):
    with pytest.raises(ValueError, match="does not have the checksum"):
        check_seal({**sealed(DOCUMENT), **change})


def test_a_document_that_was_never_sealed_is_damage():
    with pytest.raises(ValueError, match="does not have the checksum"):
        check_seal(DOCUMENT)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"NaN", "NaN is no JSON"),
        (b"[-Infinity]", "-Infinity is no JSON"),
        (b'{"a": 1, "b": 2, "a": 3}', "'a' occurs twice"),
        (b'"\xff"', "invalid start byte"),
        (b'"\xed\xa0\x80"', "invalid continuation byte"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b"1" * 5000, "integer string conversion"),
        (b"[" * 201 + b"]" * 201, "more than 200 levels"),
        (b'{"a":' * 150 + b"[" * 100, "more than 200 levels"),
        (b" " * (64 << 20) + b"1", "larger than 64 MiB"),
        (b"[" + b"[]," * (2 << 20) + b"0]", "more than 4,194,304 brackets"),
    ],
    ids=lambda value: value[:12] if isinstance(value, bytes) else "",
)
def test_what_is_no_document_or_too_much_is_refused(content, message):
    with pytest.raises(ValueError, match=message):
        parse(content)


def test_brackets_in_strings_are_no_levels():
    for text in ("[" * 1000, "\\" * 7 + '"[[' * 500, '"' + "[" * 500, '\\"' * 301 + "{" * 300):
        assert parse(json.dumps([text]).encode()) == [text]
    assert parse(b"[" * 200 + b"]" * 200)


def test_escapes_and_mistakes_hide_no_levels():
    for start in (b'["\\\\",', b'["\\"",', b'["[",', b'{"\\\\\\"": '):
        with pytest.raises(ValueError, match="more than 200 levels"):
            parse(start + b"[" * 100_000)
    # Behind a mistake nothing is parsed.
    with pytest.raises(ValueError, match="Expecting value"):
        parse(b"\\\\" + b'"' + b"[" * 100_000)


def test_depth_and_repeated_names_take_no_long_time_or_stack():
    def work():
        for content in (b"[" * (32 << 20), b'{"a":' * (8 << 20), b'"' * (8 << 20)):
            with pytest.raises(ValueError, match=r"brackets|Expecting|Extra"):
                parse(content)
        names = ",".join(f'"{i}":0' for i in [*range(200_000), 5])
        with pytest.raises(ValueError, match="'5' occurs twice"):
            parse(f"{{{names}}}".encode())

    before = threading.stack_size(256 << 10)
    try:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    finally:
        threading.stack_size(before)


def test_what_could_not_be_read_back_is_not_written():
    deep = []
    for _ in range(250):
        deep = [deep]
    with pytest.raises(ValueError, match="more than 200 levels"):
        to_bytes(sealed({"deep": deep}))
    with pytest.raises(ValueError, match="not JSON compliant"):
        sealed({"x": float("nan")})


@pytest.mark.parametrize(
    "value", ["0" * 63, "G" * 64, "A" * 64, "../" + "0" * 61, 0, None, [], b""]
)
def test_only_a_checksum_becomes_part_of_a_file_name(value):
    assert not is_checksum(value)


@pytest.mark.skipif(sys.platform == "win32", reason="has no such files")
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("pipe", "link", "loop", ""):
        with pytest.raises(OSError, match=r"regular file|directory|symbolic links"):
            read_document(tmp_path / name)
