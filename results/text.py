"""Text of others, made fit to print."""


def plain(value: object, limit: int = 400) -> str:
    """One line without control characters (terminal escapes, direction marks), cut to limit characters."""
    text = str(value)
    text = "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
    return text if len(text) <= limit else text[: limit - 3] + "..."
