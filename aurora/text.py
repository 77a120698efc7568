"""Which encoding the text files of others are in, and words for messages. Needs nothing but Python."""

import codecs
import difflib
from collections.abc import Iterable
from typing import Any

MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16's mark, which begins alike
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def encoding_of(head: bytes) -> str:
    """The encoding that the first bytes of a text show: by a byte order mark, or UTF-16's zero bytes; else UTF-8."""
    for mark, encoding in MARKS.items():
        if head.startswith(mark):
            return encoding
    visible = bytes(range(32, 127)) + b"\t\r\n"
    if head[1:2] == b"\0" and head[:1] in visible:
        return "utf-16-le"
    return "utf-16-be" if head[:1] == b"\0" and head[1:2] and head[1:2] in visible else "utf-8"


def shown(value: Any) -> str:
    """A value in an error message, of at most a line."""
    if isinstance(value, int) and abs(value) >= 10**40:
        return "a number of more than 40 digits"
    try:
        text = repr(value)
    except ValueError:  # a list with a number of more digits than Python writes
        return f"a {type(value).__name__} of huge numbers"
    return text if len(text) <= 100 else f"{text[:80]}..."


def suggest(word: str, known: Iterable[str]) -> str:
    """The text ", did you mean 'x'?" for the closest known word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""
