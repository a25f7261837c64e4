"""Is a JSON document what was written? It states its checksum, and reading has limits.

The checksum is the SHA-256 of the document without its member "checksum", written as JSON in ASCII
without spaces, members in their order. So spaces, line ends and spellings (1.0 or 1.00) may change
on the way, by an editor or by git; whatever else changes is damage.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spectra.files import open_file

__all__ = ["check_seal", "is_checksum", "parse", "read_document", "sealed", "to_bytes"]

# Far above what results have. An empty list takes twenty times its text in memory.
_MOST_BYTES = 64 << 20
_MOST_BRACKETS = 4 << 20
# The parser of JSON recurses, and threads may have small stacks.
_MOST_LEVELS = 200


def sealed(document: dict[str, Any]) -> dict[str, Any]:
    """The document with its checksum.

    Raises
    ------
    ValueError, TypeError, RecursionError
        It holds what JSON does not have.
    """
    return {**document, "checksum": _checksum(document)}


def to_bytes(document: dict[str, Any]) -> bytes:
    """The document as a file that people can read, too.

    Raises
    ------
    ValueError
        As `sealed`; or it is larger than what `parse` reads.
    """
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    # A name of the user's may hold half of a surrogate pair. It only occurs within strings, where
    # \udXXX is JSON, too.
    content = text.encode("utf-8", "backslashreplace") + b"\n"
    _check_limits(content)
    return content


def read_document(path: Path) -> Any:
    """What a file of JSON says.

    Raises
    ------
    OSError
        It is missing, cannot be read, or is no file.
    ValueError, RecursionError
        As `parse`.
    """
    with open_file(path) as file:
        return parse(file.read(_MOST_BYTES + 1))


def parse(content: bytes) -> Any:
    """What JSON says.

    Raises
    ------
    ValueError, RecursionError
        It is no strict JSON in UTF-8, names a member twice, or is too large or nested too deeply.
    """
    _check_limits(content)
    return json.loads(
        content.decode("utf-8"), object_pairs_hook=_members, parse_constant=_refuse_constant
    )


def check_seal(document: dict[str, Any]) -> None:
    """Whether a document says what it said when it was sealed.

    Raises
    ------
    ValueError
        It does not, or was never sealed.
    """
    rest = dict(document)
    if rest.pop("checksum", None) != _checksum(rest):
        msg = "its content does not have the checksum that it states"
        raise ValueError(msg)


def is_checksum(value: Any) -> bool:
    """Whether a value from a file can be a SHA-256: parts of file names are made of it."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _checksum(document: dict[str, Any]) -> str:
    canonical = json.dumps(document, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def _members(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        msg = f"its member {twice[:80]!r} occurs twice"
        raise ValueError(msg)
    return members


def _refuse_constant(name: str) -> None:
    msg = f"{name} is no JSON"
    raise ValueError(msg)


def _check_limits(content: bytes) -> None:
    """Refuse what would fill the memory or the stack, before it is parsed."""
    if len(content) > _MOST_BYTES:
        msg = f"it is larger than {_MOST_BYTES >> 20} MiB"
        raise ValueError(msg)
    # Without escapes a quotation mark begins or ends a string. What precedes a mistake in the JSON
    # is counted right, and the parser stops at the mistake.
    unescaped = content.replace(b"\\\\", b"").replace(b'\\"', b"")
    outside = np.frombuffer(b"".join(unescaped.split(b'"')[::2]), dtype=np.uint8)
    opening = (outside == ord("[")) | (outside == ord("{"))
    brackets = opening | (outside == ord("]")) | (outside == ord("}"))
    if np.count_nonzero(brackets) > _MOST_BRACKETS:
        msg = f"it has more than {_MOST_BRACKETS:,} brackets"
        raise ValueError(msg)
    levels = np.cumsum(np.where(opening[brackets], 1, -1))
    if levels.max(initial=0) > _MOST_LEVELS:
        msg = f"it is nested more than {_MOST_LEVELS} levels deep"
        raise ValueError(msg)
