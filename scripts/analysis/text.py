"""Text of strangers, made harmless for terminals, Markdown and HTML; and Markdown's tables."""

import re
from collections.abc import Iterable, Sequence

# Control characters (ANSI escapes begin with one) and those that change the direction or hide text.
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")
_MARKUP = re.compile(r"([\\`*_{}\[\]()#+!|~$@-])")


def plain(text: object, limit: int = 200) -> str:
    """One line for a terminal: unseen characters shown as U+FFFD, cut to limit characters."""
    text = _UNSEEN.sub("\ufffd", str(text).encode("utf-8", "replace").decode())
    return text if len(text) <= limit else text[: limit - 1] + "\u2026"


def printable(text: str) -> str:
    """Text of several lines for a terminal: unseen characters but line ends and tabs shown as U+FFFD."""
    return re.sub(r"[^\n\t]", lambda found: _UNSEEN.sub("\ufffd", found[0]), text)


def cell(text: object, limit: int = 200) -> str:
    """plain(), with all that Markdown or HTML could read as markup escaped, and no bare address that becomes a link."""
    text = plain(text, limit).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKUP.sub(r"\\\1", text).replace("://", ":&#47;&#47;").replace("www.", "www&#46;")


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Aligned, so that it reads as text too."""
    rows = [header, *rows]
    widths = [max(len(cells[i]) for cells in rows) for i in range(len(header))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) for cells in rows]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)
