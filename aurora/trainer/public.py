"""What of a machine a record may publish: no secret, no folder, and nothing that ends a line.

Needs nothing but Python.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from aurora.config import ROOT

SECRET = re.compile("TOKEN|KEY|SECRET|PASS|AUTH|CREDENTIAL|COOKIE|LICENSE|SIGNATURE|URL|URI|USER|MAIL|STATUS")


def is_public(key: str, value: str) -> bool:
    """Whether an environment variable may be published: no secret, path or address by its name or looks."""
    looks_random = any(
        len(word) >= 20 and re.search("[0-9]", word) and re.search("[A-Za-z]", word)
        for word in re.split("[^A-Za-z0-9_-]", value)
    )
    is_plain = len(value) <= 200 and re.fullmatch("[ -~]*", value) and not set(value) & set("/\\@~")
    return bool(is_plain) and not looks_random and not SECRET.search(key.upper())


def plain_line(text: str) -> str:
    """The text on one line, whatever a driver calls its device."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def public_argv(argv: Iterable[str]) -> list[str]:
    """A command line of train_gpt.py without the folders of the machine: paths within the project, or names."""

    def shown(path: str) -> str:
        if not os.path.isabs(path):
            return path
        return Path(path).relative_to(ROOT).as_posix() if Path(path).is_relative_to(ROOT) else Path(path).name

    program, *words = argv
    public, before = [shown(program)], ""
    for word in words:
        option, equals, value = word.partition("=")
        if equals and option in ("--config", "--out"):
            word = f"{option}={shown(value)}"
        public.append(shown(word) if before in ("--config", "--out") else word)
        before = word
    return public
