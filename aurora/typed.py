"""Values of a track (TOML) and of --set as the types that they must have. Errors name the key, and a near one."""

import dataclasses
import tomllib
from collections.abc import Iterable
from typing import Any

from aurora.errors import Exit, HarnessError
from aurora.hints import Misfit, fit, words
from aurora.text import shown, suggest


def with_default(cls: type) -> set[str]:
    """The fields of a dataclass that may be left out."""
    return {field.name for field in dataclasses.fields(cls) if field.default is not dataclasses.MISSING}


def apply_override(tables: dict[str, Any], override: str) -> None:
    """Set one value in nested tables from "a.b=v"; v is read as TOML, else as a string."""
    dotted, equals, text = override.partition("=")
    *parents, key = dotted.strip().split(".")
    if not equals or not parents:
        raise HarnessError(Exit.CONFIG, f"--set {override!r} must look like train.steps=100")
    table = tables
    for depth, parent in enumerate(parents):
        if depth >= 2 and parents[0] == "optimizer":
            table.setdefault(parent, {})  # its schedule, which a track need not have
        if not isinstance(table.get(parent), dict):
            raise HarnessError(Exit.CONFIG, f"--set {override!r}: there is no table {parent!r}{suggest(parent, table)}")
        table = table[parent]
    try:
        table[key] = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # as above
        table[key] = text


def typed_table(table: Any, types: dict[str, Any], label: str, optional: Iterable[str] = ()) -> dict[str, Any]:
    """The table with every value as its type; keys that are unknown or missing are errors."""
    check_keys(table, types, label, optional)
    return {key: coerce(f"{label}.{key}", value, types[key]) for key, value in table.items()}


def check_keys(table: Any, known: Iterable[str], label: str, optional: Iterable[str] = ()) -> None:
    known = list(known)
    if not isinstance(table, dict):
        raise HarnessError(Exit.CONFIG, f"{label} must be a table, got {shown(table)}")
    for key in table:
        if key not in known:
            raise HarnessError(
                Exit.CONFIG, f"{label} has an unknown key {shown(key)}{suggest(key, known)}; known: {', '.join(known)}"
            )
    missing = [repr(key) for key in known if key not in table and key not in optional]
    if missing:
        raise HarnessError(Exit.CONFIG, f"{label} lacks the key{'s' * (len(missing) > 1)} {', '.join(missing)}")


def coerce(label: str, value: Any, expected: Any) -> Any:
    """value as the expected type: whole numbers pass as floats, lists as tuples."""
    if expected == int | str:
        if value == "auto" or type(value) is int:
            return value
        wanted = 'a whole number or "auto"'
    else:
        try:
            return fit(value, expected)
        except Misfit:
            wanted = words(expected)
    raise HarnessError(Exit.CONFIG, f"{label} must be {wanted}, got {shown(value)}")


def check_bound(key: str, value: Any, is_valid: bool, wanted: str) -> None:
    if not is_valid:
        raise HarnessError(Exit.CONFIG, f"{key} must be {wanted}, got {shown(value)}")
