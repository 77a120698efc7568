"""Which encoding the text files of others are in. Needs nothing but Python."""

import codecs

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
    first, second = (head + b"..")[:2]
    return "utf-16-le" if first and not second else "utf-16-be" if second and not first else "utf-8"
