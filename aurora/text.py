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
    visible = bytes(range(32, 127)) + b"\t\r\n"
    if head[1:2] == b"\0" and head[:1] in visible:
        return "utf-16-le"
    return "utf-16-be" if head[:1] == b"\0" and head[1:2] and head[1:2] in visible else "utf-8"
