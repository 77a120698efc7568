"""Optimizers of other packages, and of files of your own: found by module:Class, built, and described by their
constructor's signature.

Anything will do that takes parameters and a keyword lr and gives a torch.optim.Optimizer: a class, or a function.
"""

import difflib
import functools
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_type_hints

import torch

from aurora.config import FOLDER_VARIABLE

Rule = Callable[..., torch.optim.Optimizer]


def find(path: str) -> Rule:
    """What module:Class names: a class of optimizers, or a function that returns one.

    A module may also be in the current folder, or in the one that the environment variable SPEEDRUN_FOLDER names.

    Raises:
        ValueError: there is no such module or name, it cannot be imported, or it is neither.
    """
    module_name, _, name = path.partition(":")
    if not re.fullmatch(r"\w+(\.\w+)*", module_name) or not name.isidentifier():
        raise ValueError(f"{path!r} must look like module:Class, as torch.optim:SGD does")
    module = import_module(module_name)
    if not hasattr(module, name):
        close = difflib.get_close_matches(name, dir(module), n=1)
        raise ValueError(f"the module {module_name} has no {name}{f', did you mean {close[0]}?' if close else ''}")
    rule = getattr(module, name)
    if not callable(rule) or (isinstance(rule, type) and not issubclass(rule, torch.optim.Optimizer)):
        kind = "class that is no torch.optim.Optimizer" if isinstance(rule, type) else type(rule).__name__
        raise ValueError(f"{path} is a {kind}; name a class of optimizers, or a function that returns one")
    return rule


def import_module(name: str) -> Any:
    folders = [folder for folder in (os.environ.get(FOLDER_VARIABLE), os.getcwd()) if folder]
    sys.path += [folder for folder in folders if folder not in sys.path]  # last, so that they hide no package
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            fix = "install its package, or start in the folder where it is"
            raise ValueError(f"there is no module {error.name} in this environment or folder; {fix}") from error
        raise ValueError(f"the module {name} cannot be imported: it needs {error.name}; install it") from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"the module {name} cannot be imported: {described(error)}") from error


def described(error: BaseException) -> str:
    """An exception on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


class Argument(NamedTuple):
    """hint: its type, or Parameter.empty; default: likewise."""

    hint: Any
    default: Any


# What constructors are given by the trainer, and what base classes take of their heirs.
NO_HPARAMS = ("self", "params", "process_group", "rule_hparams")
OF_BASE_CLASSES = "defaults"


def arguments_of(rule: Rule) -> dict[str, Argument]:
    """The arguments by which a rule may be set up, by name: all but the first, which is the parameters.

    Those of a base class follow where the constructor passes keywords on.
    """
    constructors: list[Any] = [rule]
    if isinstance(rule, type):
        constructors = [vars(cls)["__init__"] for cls in rule.__mro__ if "__init__" in vars(cls)]
    found: dict[str, Argument] = {}
    for constructor in constructors:
        parameters = list(inspect.signature(constructor).parameters.values())[isinstance(rule, type) :]
        if any(parameter.name == OF_BASE_CLASSES for parameter in parameters):
            break
        hints = hints_of(constructor)
        for parameter in parameters[1:]:
            if parameter.name not in NO_HPARAMS and parameter.kind not in (
                parameter.VAR_KEYWORD,
                parameter.VAR_POSITIONAL,
                parameter.POSITIONAL_ONLY,
            ):
                hint = hints.get(parameter.name, parameter.empty)
                found.setdefault(parameter.name, Argument(hint, parameter.default))
        if all(parameter.kind != parameter.VAR_KEYWORD or parameter.name == "unknown" for parameter in parameters):
            break
    return found


def hint_of(argument: Argument) -> Any:
    """An argument's type: as it is annotated, or as its default is, with numbers of both kinds and lists of any length;
    Any where neither tells."""
    if argument.hint is not inspect.Parameter.empty:
        return argument.hint
    if isinstance(argument.default, bool | str):
        return type(argument.default)
    if isinstance(argument.default, int | float):
        return int | float
    return tuple[Any, ...] if isinstance(argument.default, tuple) else Any


def hints_of(function: Any) -> dict[str, Any]:
    """Its type hints, none where one of them names what cannot be found."""
    while isinstance(function, functools.partial):
        function = function.func
    try:
        return get_type_hints(function)
    except Exception:  # names that are there for type checkers alone, and hints that are no types
        return {}


def make(rule: Rule, params: Sequence[torch.nn.Parameter], hparams: dict[str, Any], role: str) -> torch.optim.Optimizer:
    """The optimizer of these parameters. Each group carries role, and its lr at full scale under "peak_lr".

    Raises:
        ValueError: the constructor fails, or what it gives is no optimizer with an lr.
    """
    given: list[Any] = list(params)
    if role == "matrix" and "use_muon" in source_of(rule):
        given = [{"params": given, "use_muon": True}]  # as Muons want it that have an AdamW of their own
    try:
        optimizer = rule(given, **hparams)
    except Exception as error:
        raise ValueError(f"its constructor fails: {described(error)}") from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"it gives a {type(optimizer).__name__}, which is no torch.optim.Optimizer")
    for group in optimizer.param_groups:
        if "lr" not in group:
            raise ValueError("its groups have no lr, which the schedule sets")
        group |= {"role": role, "peak_lr": float(group["lr"])}
    return optimizer


def two_gradients(rule: Any) -> str:
    """Why an optimizer like SAM is none for a run, and empty for others."""
    is_double = all(callable(getattr(rule, name, None)) for name in ("first_step", "second_step"))
    return "it takes two gradients a step, by first_step() and second_step(); a step here has one" if is_double else ""


@functools.lru_cache(maxsize=16)
def source_of(rule: Rule) -> str:
    try:
        return inspect.getsource(rule)
    except (OSError, TypeError):  # made at run time, or of another language
        return ""


def give(group: dict[str, Any], settings: dict[str, float]) -> None:
    """Give a group these settings; a tensor, to which compiled steps may refer, is filled."""
    for key, value in settings.items():
        if isinstance(group[key], torch.Tensor):
            group[key].fill_(value)
        else:
            group[key] = value


def has_eval_weights(optimizer: Any) -> bool:
    """Whether its train() and eval() change the weights: a schedule-free one is judged by others than it trains."""
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))
