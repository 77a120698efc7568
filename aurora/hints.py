"""Values of TOML as the types that a constructor asks for. Needs nothing but Python."""

import collections.abc
import sys
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

WORDS = {
    int: "a whole number",
    float: "a finite number",
    str: "a string",
    bool: "true or false",
    int | float: "a finite number",
    tuple[float, float]: "two numbers",
}
LISTS = (list, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection)
TABLES = (dict, collections.abc.Mapping)


class Misfit(ValueError):
    """A value that is not of the type."""


def fit(value: Any, hint: Any) -> Any:
    """The value as the type that a hint names.

    Whole numbers pass as floats, lists as tuples, and numbers where a tensor may stand.

    Raises:
        Misfit: it is of another type, or of one that TOML cannot write.
    """
    origin, members = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is Annotated:
        return fit(value, members[0])
    if origin in (Union, types.UnionType):
        return fit_one_of(value, hint)
    if origin is Literal:
        if any(type(value) is type(member) and value == member for member in members):
            return value
    elif hint is float or getattr(hint, "__name__", "") == "Tensor":
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
            return float(value)
    elif (origin or hint) is tuple:
        if isinstance(value, list | tuple):
            return fit_tuple(value, members)
    elif (origin or hint) in LISTS:
        if isinstance(value, list | tuple):
            return [fit(item, members[0] if members else Any) for item in value]
    elif (origin or hint) in TABLES:
        if isinstance(value, dict):
            return value
    elif type(value) is hint:
        return value
    raise Misfit(words(hint))


def fit_one_of(value: Any, hint: Any) -> Any:
    members = get_args(hint)
    for member in members:
        if type(value) is member and member is not float:  # else 1 might become 1.0 where both may stand
            return value
    for member in members:
        try:
            return fit(value, member)
        except Misfit:
            continue
    raise Misfit(words(hint))


def fit_tuple(value: list[Any] | tuple[Any, ...], members: tuple[Any, ...]) -> tuple[Any, ...]:
    if not members or members[-1] is Ellipsis:
        members = (members[0] if members else Any,) * len(value)
    if len(value) != len(members):
        raise Misfit(f"a list of {len(members)}")
    return tuple(fit(item, member) for item, member in zip(value, members, strict=True))


def words(hint: Any) -> str:
    """What to say of a type in an error message."""
    if hint in WORDS:
        return WORDS[hint]
    members = get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        texts = [words(member) for member in members if member is not type(None)]
        return " or ".join(dict.fromkeys(text for text in texts if text != "a tensor"))
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, members))
    if get_origin(hint) is tuple and members and members[-1] is not Ellipsis:
        return f"a list of {len(members)}"
    name = getattr(hint, "__name__", str(hint))
    return {"Tensor": "a tensor", "tuple": "a list", "list": "a list"}.get(name, f"of the type {name}")
