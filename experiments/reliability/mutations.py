"""How can files go wrong? Disks, editors, interrupted copies and people who mean it.

A mutation is a function of the files of one result (contents by name), those of another result of
the same kind, and a generator; it returns other files, or the same where it does not apply.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any, TypeAlias

Files: TypeAlias = dict[str, bytes]
Mutation: TypeAlias = Callable[[Files, Files, random.Random], Files]

_TOKENS = (
    b"{}", b"[]", b"null", b"true", b"-1", b"0", b"9" * 25, b"1e999", b"NaN", b"-0.0", b'"', b"\\",
    b",", b":", b"[" * 300, b'{"a":' * 300, b"\x00", b"\xff", b"\xed\xa0\x80", b" ", b"\n", b"\r\n",
    b'"kind"', b'"format": 1', b'"checksum"', b'"arrays_sha256": null', b"\xef\xbb\xbf",
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 10**30, -(10**400), 1e300, -0.0, "", "x", "nan", "../../x",
    "\x00", [], {}, [[]], [0] * 100, {"float": "nan"}, {"array": "values"}, {"tensor": "x"},
    {"tuple": []}, {"dict": {}}, {"kind": "Estimate", "fields": {}}, {"kind": "Result"},
    {"kind": "object", "fields": {}}, {"float": "1" * 5000}, {"array": "x", "shape": [-1]},
)  # fmt: skip
_DTYPES = ("F64", "F32", "BF16", "I64", "U8", "BOOL", "C64", "F4", "f64", "")


def mutate(files: Files, other: Files, generator: random.Random) -> tuple[str, Files]:
    """One to three mutations, and their names."""
    names, changed = [], files
    for _ in range(generator.choice((1, 1, 1, 2, 3))):
        mutation = generator.choice(MUTATIONS)
        names.append(mutation.__name__)
        changed = mutation(changed, other, generator)
    return "+".join(names), changed


# --- bytes ----------------------------------------------------------------------------------------


def flip_bits(files: Files, _: Files, generator: random.Random) -> Files:
    """Some bits of a file are the opposite."""

    def change(content: bytearray) -> None:
        for _ in range(generator.choice((1, 1, 1, 2, 8))):
            content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)

    return _edited(files, generator, change)


def overwrite(files: Files, _: Files, generator: random.Random) -> Files:
    """A stretch of a file holds something else, of the same length."""

    def change(content: bytearray) -> None:
        start = generator.randrange(len(content))
        count = min(generator.choice((1, 2, 8, 64, 512)), len(content) - start)
        content[start : start + count] = generator.choice((bytes, generator.randbytes))(count)

    return _edited(files, generator, change)


def truncate(files: Files, _: Files, generator: random.Random) -> Files:
    """A file ends too early."""

    def change(content: bytearray) -> None:
        del content[_place(content, generator) :]

    return _edited(files, generator, change)


def insert(files: Files, _: Files, generator: random.Random) -> Files:
    """A file holds something more."""

    def change(content: bytearray) -> None:
        place = _place(content, generator)
        content[place:place] = generator.choice(
            (*_TOKENS, generator.randbytes(generator.choice((1, 4, 100))))
        )

    return _edited(files, generator, change)


def replace_token(files: Files, _: Files, generator: random.Random) -> Files:
    """A few bytes are replaced by something that JSON knows."""

    def change(content: bytearray) -> None:
        place = _place(content, generator)
        content[place : place + generator.randrange(9)] = generator.choice(_TOKENS)

    return _edited(files, generator, change)


def delete(files: Files, _: Files, generator: random.Random) -> Files:
    """A stretch of a file is missing."""

    def change(content: bytearray) -> None:
        place = _place(content, generator)
        del content[place : place + generator.choice((1, 2, 16, 512, 4096))]

    return _edited(files, generator, change)


def repeat(files: Files, _: Files, generator: random.Random) -> Files:
    """A stretch of a file occurs twice, or elsewhere."""

    def change(content: bytearray) -> None:
        start, place = _place(content, generator), _place(content, generator)
        stretch = content[start : start + generator.choice((1, 16, 512))]
        if generator.random() < 0.5:
            content[place : place + len(stretch)] = stretch
        else:
            content[place:place] = stretch

    return _edited(files, generator, change)


# --- files ----------------------------------------------------------------------------------------


def take_from_another(files: Files, other: Files, generator: random.Random) -> Files:
    """One of several files belongs to another result."""
    common = sorted(set(files) & set(other))
    if len(common) < 2:
        return files
    name = generator.choice(common)
    return {**files, name: other[name]}


def splice_with_another(files: Files, other: Files, generator: random.Random) -> Files:
    """A file begins as it should and goes on as that of another result."""
    name = generator.choice(sorted(files))
    if name not in other:
        return files
    place = generator.randrange(min(len(files[name]), len(other[name])) + 1)
    return {**files, name: files[name][:place] + other[name][place:]}


def exchange(files: Files, _: Files, generator: random.Random) -> Files:
    """Two files have each other's names."""
    first, second = generator.choice(sorted(files)), generator.choice(sorted(files))
    return {**files, first: files[second], second: files[first]}


def remove(files: Files, _: Files, generator: random.Random) -> Files:
    """A file is missing."""
    name = generator.choice(sorted(files))
    return {other: content for other, content in files.items() if other != name} or files


# --- JSON -----------------------------------------------------------------------------------------


def change_value(files: Files, _: Files, generator: random.Random) -> Files:
    """A value of a document is another one."""

    def change(holder: Any, key: Any) -> None:
        value = holder[key]
        if isinstance(value, float | int) and generator.random() < 0.5:
            holder[key] = generator.choice((-value, value + 1, value * 2, float(value), str(value)))
        else:
            holder[key] = generator.choice(_VALUES)

    return _restructured(files, generator, change)


def drop_member(files: Files, _: Files, generator: random.Random) -> Files:
    """A member of a document is missing."""

    def change(holder: Any, key: Any) -> None:
        del holder[key]

    return _restructured(files, generator, change)


def wrap_value(files: Files, _: Files, generator: random.Random) -> Files:
    """A value lies deeper."""

    def change(holder: Any, key: Any) -> None:
        for _ in range(generator.choice((1, 2, 150))):
            holder[key] = generator.choice(([holder[key]], {"dict": holder[key]}))

    return _restructured(files, generator, change)


def rename_member(files: Files, _: Files, generator: random.Random) -> Files:
    """A member has another name, and comes last."""

    def change(holder: Any, key: Any) -> None:
        if isinstance(holder, dict):
            name = generator.choice(("kind", "dict", "tuple", "array", "float", "x", key.upper()))
            holder[name] = holder.pop(key)

    return _restructured(files, generator, change)


def swap_members(files: Files, _: Files, generator: random.Random) -> Files:
    """Two values of one object or list have each other's places."""

    def change(holder: Any, key: Any) -> None:
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        second = generator.choice(keys)
        holder[key], holder[second] = holder[second], holder[key]

    return _restructured(files, generator, change)


def reformat(files: Files, _: Files, generator: random.Random) -> Files:
    """Only spaces and escapes are others: harmless."""
    return _restructured(files, generator, lambda holder, key: None)


def name_twice(files: Files, _: Files, generator: random.Random) -> Files:
    """An object of JSON has a member twice."""
    name = generator.choice(sorted(files))
    if not name.endswith(".json"):
        return files
    places = [i for i, byte in enumerate(files[name]) if byte == ord("{")]
    if not places:
        return files
    place = generator.choice(places) + 1
    more = generator.choice((b'"format": 2,', b'"kind": "Estimate",', b'"value": 1,', b'"x": 1,'))
    return {**files, name: files[name][:place] + more + files[name][place:]}


# --- safetensors ----------------------------------------------------------------------------------


def edit_header(files: Files, _: Files, generator: random.Random) -> Files:
    """The header of a file of arrays says something else, and its length fits."""
    name = generator.choice(sorted(files))
    content = files[name]
    try:
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        entry = header[generator.choice(list(header))]
        part = generator.choice(("dtype", "shape", "data_offsets", "more", "fewer", "bytes"))
        if part == "dtype":
            entry["dtype"] = generator.choice(_DTYPES)
        elif part in {"shape", "data_offsets"}:
            values = entry[part]
            change = generator.choice((-1, 1, 8, 2**40, 2**62, -(2**70)))
            if values and generator.random() < 0.7:
                values[generator.randrange(len(values))] += change
            else:
                values.append(generator.choice((0, 1, 2**33)))
        elif part == "more":
            header[generator.choice(("x", "__metadata__", ""))] = entry
        elif part == "fewer":
            header.popitem()
        text = json.dumps(header).encode()
    except (ValueError, LookupError, TypeError, AttributeError):
        return files
    length = len(text) + (generator.choice((-1, 1, 2**20, 2**63)) if part == "bytes" else 0)
    start = max(length, 0).to_bytes(8, "little")
    return {**files, name: start + text + content[8 + int.from_bytes(content[:8], "little") :]}


MUTATIONS: tuple[Mutation, ...] = (
    flip_bits,
    overwrite,
    truncate,
    insert,
    replace_token,
    delete,
    repeat,
    take_from_another,
    splice_with_another,
    exchange,
    remove,
    change_value,
    drop_member,
    wrap_value,
    rename_member,
    swap_members,
    reformat,
    name_twice,
    edit_header,
)


def _place(content: bytearray, generator: random.Random) -> int:
    return generator.randrange(len(content) + 1)


def _edited(files: Files, generator: random.Random, change: Callable[[bytearray], None]) -> Files:
    name = generator.choice(sorted(files))
    content = bytearray(files[name])
    if content:
        change(content)
    return {**files, name: bytes(content)}


def _restructured(
    files: Files, generator: random.Random, change: Callable[[Any, Any], None]
) -> Files:
    """A document of JSON after a change to one place of it, in another layout."""
    documents = sorted(name for name in files if name.endswith(".json"))
    if not documents:
        return files
    name = generator.choice(documents)
    try:
        document = json.loads(files[name])
        places = list(_places(document))
        change(*generator.choice(places))
        text = json.dumps(
            document,
            indent=generator.choice((None, 0, 3)),
            ensure_ascii=generator.choice((True, False)),
        )
        return {**files, name: text.encode("utf-8", "backslashreplace")}
    except (ValueError, LookupError, TypeError, RecursionError):
        return files


def _places(value: Any) -> Any:
    """All places of a document, as what holds it and the key there."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])
