"""How is a name of the user's shown? On one line, at a bearable length, as letters and no commands.

A parameter may be called anything: a control character in its name would move a terminal's cursor
or colour its text, a line break would look like another row of a table, and a mark for writing from
right to left would turn the numbers around.
"""

from __future__ import annotations

__all__ = ["printable", "short_name"]

# Letters of a name in a table.
_LONGEST = 100


def printable(text: str) -> str:
    r"""The text with what does not print written out.

    >>> print(printable("a\x1b[31m\nb"))
    a\x1b[31m\nb
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def short_name(name: str, most: int = _LONGEST) -> str:
    """The name as a table shows it: of a long one the end, which tells modules apart."""
    # Cut twice, as what does not print becomes longer, and a very long name should take no time.
    return _end(printable(_end(name, most)), most)


def _end(name: str, most: int) -> str:
    return name if len(name) <= most else "…" + name[len(name) - most + 1 :]
