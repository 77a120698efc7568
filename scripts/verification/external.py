"""What a record must say of an optimizer of another package, of which the project knows nothing.

Its hyper-parameters' types and bounds are its own, so values are compared with track, command line and parameter
groups alone. Nothing of it is imported or run.
"""

import ast
import math
import re
from collections.abc import Iterator
from typing import Any

from aurora.config import is_path
from aurora.trainer.identity import EXTERNAL
from scripts.verification.events import Events

LR_TOLERANCE = 1e-6  # of a tensor, which has single precision


def rule_of_run(start: dict[str, Any]) -> str:
    """Of which rule a run is; the first records do not tell it from the optimizer's name."""
    return start["config"].get("rule", start["optimizer"])


def is_external(start: dict[str, Any]) -> bool:
    return is_path(rule_of_run(start))


def check_rule(run: Events) -> Iterator[str]:
    start, path = run.start, rule_of_run(run.start)
    if "resumable" in start and not start["resumable"]:
        if run.of("resume"):
            yield "it was resumed, though it says that it is not resumable"
        if run.config["train"]["checkpoint_every"]:
            yield "it writes checkpoints, though it says that it is not resumable"
    if not is_path(path):
        return
    for key in ("rule", "resumable"):
        if key not in start:
            yield f"run event lacks {key}, of its optimizer {path}"
            return
    cls, packages = start["rule"]["class"], start["rule"]["packages"]
    tops = {part.partition(".")[0] for part in (path.partition(":")[0], cls)}
    if packages.keys() != tops:
        yield f"rule.packages tells of {', '.join(packages) or 'none'}, but {path} and {cls} are of {sorted(tops)}"
        return
    if "torch" in tops and packages["torch"] != f"torch {start['env']['torch']}":
        yield f"rule.packages has {packages['torch']}, env.torch is {start['env']['torch']}"
    module, _, name = path.partition(":")
    is_own_file = not packages[module.partition(".")[0]]
    if is_own_file and text_of(start, module) is None:
        yield f"{path} is of no package, and its source is not embedded"
    defined = [cls.rpartition(".")[::2]] + [(module, name)] * is_own_file
    for where, wanted in defined:  # what a package imports from its parts, its text need not name
        text = text_of(start, where)
        if text is not None and not re.search(rf"\b{re.escape(wanted)}\b", text):
            yield f"the embedded source of {where} has no {wanted}"
    held = [group["optimizer"] for group in start["param_groups"] if group.get("role") in ("matrix", "all")]
    if wrong := [shown for shown in held if shown != cls.rpartition(".")[2]]:
        yield f"the optimizer was a {wrong[0]}, by rule.class it is {cls}"


def text_of(start: dict[str, Any], module: str) -> str | None:
    """The embedded source of a module, None where there is none."""
    stem = module.replace(".", "/")
    names = [f"{folder}{stem}{end}" for folder in (f"{EXTERNAL}/", "") for end in (".py", "/__init__.py")]
    return next((start["sources"][name] for name in names if name in start["sources"]), None)


def default_lr(start: dict[str, Any]) -> Any:
    """The lr that the embedded source gives where nothing else does; None where it does not tell."""
    module, _, name = rule_of_run(start).partition(":")
    for where, wanted in ((module, name), start["rule"]["class"].rpartition(".")[::2]):
        try:
            tree = ast.parse(text_of(start, where) or "")
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        for node in tree.body:
            if getattr(node, "name", None) != wanted:
                continue
            parts = node.body if isinstance(node, ast.ClassDef) else [node]
            for part in parts:
                if isinstance(part, ast.FunctionDef) and part.name in ("__init__", wanted):
                    return constant_default(part.args, "lr")
    return None


def constant_default(arguments: ast.arguments, name: str) -> Any:
    named = [*arguments.posonlyargs, *arguments.args]
    pairs = [*zip(reversed(named), reversed(arguments.defaults), strict=False)]
    pairs += [(key, value) for key, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if value]
    return next((node.value for key, node in pairs if key.arg == name and isinstance(node, ast.Constant)), None)


def same_value(one: Any, other: Any) -> bool:
    """Equality of a value that a constructor was given and the one that a track has: 1 is 1.0, but not true."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same_value, one, other))
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def same_lr(one: Any, other: Any) -> bool:
    are_numbers = isinstance(one, int | float) and isinstance(other, int | float)
    return are_numbers and math.isclose(one, other, rel_tol=LR_TOLERANCE)


def notes_on_rule(run: Events) -> Iterator[str]:
    """What could not be checked."""
    start, path = run.start, rule_of_run(run.start)
    if start.get("resumable") is False:
        yield "its optimizer is not resumable: what it keeps is not all in its state_dict()"
    if not is_path(path):
        return
    packages = ", ".join(filter(None, start["rule"]["packages"].values()))
    yield f"{path} of {packages or 'a file that is embedded'}: not checked are its code and the bounds of its settings"
    hparams = start["hparams"]
    if text_of(start, path.partition(":")[0]) is None and "lr" not in given(start):
        yield f"lr {hparams['lr']} is said to be the default of its constructor, which is not embedded"
    for group in start["param_groups"]:
        for key in sorted(group.keys() & hparams.keys() - {"lr"}):
            if group["role"] in ("matrix", "all") and not same_value(group[key], hparams[key]):
                yield f"{path} was given {key} {str(hparams[key])[:40]}, and held {str(group[key])[:40]}"


def given(start: dict[str, Any]) -> set[str]:
    """Hyper-parameters that the command line names."""
    prefix = f"optimizer.{start['optimizer']}."
    words = [word.removeprefix("--set=") for word in start["argv"]]
    return {word.removeprefix(prefix).partition("=")[0].strip() for word in words if word.startswith(prefix)}
