"""What the parameter groups of a run must hold, from its hyper-parameters and the constructors in its sources.

Sources are parsed, not executed.
"""

import ast
import functools
from collections.abc import Iterator
from typing import Any

from aurora.config import ALL
from aurora.schedule import PEAKS, pieces_of
from scripts.verification.events import Events
from scripts.verification.external import is_external, rule_of_run, same_lr
from scripts.verification.same import is_same
from scripts.verification.schema import Code

BUILT_IN = (
    *("adamw", "muon", "normuon", "unormuon", "aurora", "riemannian_aurora"),
    *("adam", "soap", "muon2", "pmuon", "dynmuon", "psgd", "shampoo"),
)
NO_SETTINGS = ("self", "params", "process_group", "rule_hparams")
AUX = ("embed", "head", "vector")
# What torch.optim.AdamW holds besides, on every device.
OF_TORCH = {
    **dict.fromkeys(("amsgrad", "maximize", "capturable", "differentiable"), False),
    **{"foreach": None, "decoupled_weight_decay": True},
}


def check_groups(run: Events) -> Iterator[str]:
    start, hparams, groups = run.start, run.start["hparams"], run.start["param_groups"]
    code = Code(start["sources"])
    roles = [group.get("role") for group in groups]
    wanted = ["all"] if start["config"].get("parameters") == ALL else ["matrix", *AUX]
    if is_external(start):  # which may have several groups of matrices
        roles = list(dict.fromkeys(roles))
    # An edited model may have no parameter of a role.
    if not (set(roles) <= set(wanted) if run.is_edited and roles else sorted(map(str, roles)) == sorted(wanted)):
        yield f"param_groups are of {', '.join(map(str, roles)) or 'nothing'}, not of {', '.join(wanted)}"
        return
    own = [group for group in groups if group["role"] not in AUX]
    if is_external(start) and own and not same_lr(own[0].get("peak_lr"), hparams["lr"]):
        yield f"the optimizer held peak_lr {own[0].get('peak_lr')}, lr is {hparams['lr']}"
    for group in groups:
        role = group["role"]
        if is_external(start) and role not in AUX:
            if not same_lr(group.get("lr"), group.get("peak_lr")):
                yield f"the optimizer held lr {group.get('lr')} for {role}, peak_lr is {group.get('peak_lr')}"
            continue
        yield from wrong_settings(group, role, hparams)
        yield from wrong_peaks(group, role, run.config["schedule"])
        constants = constants_of(group, role, start)
        for key, value in constants.items():
            for name in (key, PEAKS.get(key)):
                if name in group and hparam_name(key, role) not in hparams and not is_same(group[name], value):
                    yield f"the optimizer held {name} {str(group[name])[:60]} for {role}, by its code {str(value)[:60]}"
        if rule_of_run(start) in BUILT_IN:
            for key in sorted(constants.keys() - group.keys()):
                yield f"the parameter group of {role} lacks {key}"
        if rule_of_run(start) in BUILT_IN or role in AUX:
            for key in group.keys() - constants.keys():
                if not code.names(key):
                    yield f"the parameter group of {role} has {key}, which its code does not name"


def wrong_settings(group: dict[str, Any], role: str, hparams: dict[str, Any]) -> Iterator[str]:
    """Settings that are not those of the hyper-parameters."""
    for key, value in group.items():
        name = hparam_name(key.removeprefix("peak_"), role)
        if name not in hparams or is_same(hparams[name], value):
            continue
        if hparams[name] != "auto" or value not in ("auto", "float32", "bfloat16"):
            yield f"the optimizer held {key} {str(value)[:60]} for {role}, {name} is {hparams[name]}"
    lacking = {"lr", "peak_lr"} if role == "matrix" else {"lr", "peak_lr", "betas", "eps", "weight_decay"}
    for key in sorted(lacking - group.keys()):
        yield f"the parameter group of {role} lacks {key}"


def wrong_peaks(group: dict[str, Any], role: str, schedule: dict[str, Any]) -> Iterator[str]:
    """Values that a schedule starts from, where there is none, and the other way round."""
    for key, peak in PEAKS.items():
        has_pieces = key in group and bool(pieces_of(schedule, role, key))
        if key != "lr" and has_pieces != (peak in group):
            has, its = ("lacks", "has pieces") if has_pieces else ("has", "has none")
            yield f"the parameter group of {role} {has} {peak}, the schedule of its {key} {its}"


def hparam_name(key: str, role: str) -> str:
    """Which hyper-parameter a setting of a parameter group comes from, where there is one."""
    return key if role == "matrix" else f"{role}_lr" if key == "lr" else f"aux_{key}"


def constants_of(group: dict[str, Any], role: str, start: dict[str, Any]) -> dict[str, Any]:
    """The settings that no hyper-parameter gives: defaults of constructors, the schedule's numbers, torch's."""
    is_fused = start["device"] in ("cuda", "cpu")
    found: dict[str, Any] = {}
    if role != "matrix" and "algorithm" in group:
        return {"optimizer": "AdamW", "algorithm": "adamw"}
    if role != "matrix" or rule_of_run(start) == "adamw":
        return OF_TORCH | {"optimizer": "AdamW", "fused": is_fused}
    optim = {
        name: text
        for name, text in start["sources"].items()
        if name.endswith(".py") and name.startswith("aurora/") and isinstance(text, str)
    }
    rule, bases, defaults = rule_of(rule_of_run(start), tuple(optim.items()))
    if rule is None:  # defined in an unusual way
        return {}
    if "MatrixOptimizer" in bases and "algorithm" in group:
        found["algorithm"] = rule
    found |= {"optimizer": rule} | defaults
    name = start["hparams"].get("polar_schedule", defaults.get("polar_schedule"))
    if "polar_coefficients" in group and (schedule := schedules(tuple(optim.items())).get(name)):
        found |= {f"polar_{key}": schedule[key] for key in ("coefficients", "norm_margin") if key in schedule}
    if found.get("polar_dtype") == "auto" and group.get("polar_dtype") in ("float32", "bfloat16"):
        found["polar_dtype"] = group["polar_dtype"]  # which the machine decides
    return found


@functools.lru_cache(maxsize=64)  # hundreds of records share their code
def parsed(text: str) -> ast.Module | None:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


@functools.lru_cache(maxsize=64)
def rule_of(name: str, sources: tuple[tuple[str, str], ...]) -> tuple[str | None, list[str], dict[str, Any]]:
    """The one class that the rule's file defines, its bases, and the constants among their constructors' defaults."""
    classes: dict[str, ast.ClassDef] = {}
    rule = None
    for file, text in sources:
        module = parsed(text)
        own = [node for node in module.body if isinstance(node, ast.ClassDef)] if module else []
        classes |= {node.name: node for node in own}
        if file.rpartition("/")[2] == f"{name}.py" and len(own) == 1:
            rule = own[0].name
    if rule is None:
        return None, [], {}
    chain, todo = [], [rule]
    while todo:
        found = todo.pop(0)
        if found in classes and found not in chain:
            chain.append(found)
            bases = classes[found].bases
            todo += [base.id for base in bases if isinstance(base, ast.Name)]
    defaults: dict[str, Any] = {}
    for ancestor in chain:
        for node in classes[ancestor].body:
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                defaults = defaults_of(node.args) | defaults
    return rule, chain[1:], {key: value for key, value in defaults.items() if key not in NO_SETTINGS}


def defaults_of(arguments: ast.arguments) -> dict[str, Any]:
    named = [*arguments.posonlyargs, *arguments.args]
    pairs = list(zip(named[len(named) - len(arguments.defaults) :], arguments.defaults, strict=True))
    pairs += [(key, value) for key, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if value]
    found = {}
    for argument, value in pairs:
        try:
            found[argument.arg] = ast.literal_eval(value)
        except ValueError:  # computed
            continue
    return found


@functools.lru_cache(maxsize=64)
def schedules(sources: tuple[tuple[str, str], ...]) -> dict[str, dict[str, Any]]:
    """The keyword arguments of every PolarSchedule that the sources make, by its name."""
    found = {}
    for _, text in sources:
        module = parsed(text) if "PolarSchedule(" in text else None
        for node in ast.walk(module) if module else ():
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "PolarSchedule":
                values = {str(keyword.arg): literal(keyword.value) for keyword in node.keywords}
                found[str(values.get("name"))] = {key: value for key, value in values.items() if value is not None}
    return found


def literal(node: ast.expr) -> Any:
    """The value of a literal, or of a short tuple times a number; None for what is computed."""
    times = 1
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult) and isinstance(node.right, ast.Constant):
        times = node.right.value if isinstance(node.right.value, int) else 1
        node = node.left
    try:
        value = ast.literal_eval(node)
    except ValueError:
        return None
    return value * min(times, 100) if times != 1 else value
