"""From the name of a rule to its class, and to the optimizers of a run: the rule, with AdamW for all but the matrices.

A rule is one file of this folder that defines one optimizer, or module:Class, an optimizer of another package. It is
imported when it is named, not before.
"""

import ast
import difflib
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import torch

from .params import ROLES, Param, check_exact_cover


def find_rule(name: str) -> Any:
    """The optimizer class that NAME.py of this folder defines, or what module:Class names: a class, or a function.

    Raises:
        ValueError: there is no such file, or it does not define exactly one torch.optim.Optimizer. Abstract classes,
            as MatrixOptimizer is one, do not count. Or module:Class cannot be imported.
    """
    if ":" in name:
        from .external import find

        return find(name)
    file = f"{__package__.replace('.', '/')}/{name}.py"
    names = [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)])]
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]}?" if close else "a rule is a file there that defines one torch.optim.Optimizer"
        raise ValueError(f"there is no {file}; {hint}")
    rules = rules_in(importlib.import_module(f".{name}", __package__))
    if len(rules) != 1:
        found = ", ".join(rule.__name__ for rule in rules) or "none"
        raise ValueError(f"{file} must define one torch.optim.Optimizer, but defines {found}")
    return rules[0]


def rules_in(module: ModuleType) -> list[type[torch.optim.Optimizer]]:
    """The optimizer classes that a module defines itself."""
    return [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, torch.optim.Optimizer)
        and value.__module__ == module.__name__
        and not inspect.isabstract(value)
    ]


def modules_of_other_rules(optimizers: Sequence[torch.optim.Optimizer]) -> set[str]:
    """Names of the imported modules that define other rules, which none of these optimizers' files import."""
    package = {name: module for name, module in sys.modules.items() if name.startswith(f"{__package__}.")}
    rules = {name for name, module in package.items() if rules_in(module)}
    todo, own = {type(optimizer).__module__ for optimizer in optimizers} & rules, set()
    while todo:
        own.add(name := todo.pop())
        nodes = [
            node for node in ast.walk(ast.parse(inspect.getsource(package[name]))) if isinstance(node, ast.ImportFrom)
        ]
        todo |= {f"{__package__}.{node.module}" for node in nodes if node.level} & rules - own
    return rules - own


@dataclass(frozen=True)
class AuxHparams:
    """AdamW's settings for what is not a matrix; the same names for every rule.

    Attributes:
        embed_lr: Learning rate of the token embedding.
        head_lr: Learning rate of the output head's matrix.
        vector_lr: Learning rate of biases and norm gains.
        aux_betas: AdamW's betas for these parameters.
        aux_eps: AdamW's eps for these parameters.
        aux_weight_decay: AdamW's weight decay for these parameters.
    """

    embed_lr: float
    head_lr: float
    vector_lr: float
    aux_betas: tuple[float, float]
    aux_eps: float
    aux_weight_decay: float


REQUIRED_HPARAMS = (*(field.name for field in fields(AuxHparams)), "lr")


def build(
    name: str,
    params: Sequence[Param],
    hparams: dict[str, Any],
    process_group: Any = None,
    parameters: str = "matrices",
) -> list[torch.optim.Optimizer]:
    """The optimizers of a run: the named rule over the matrices, and AdamW over embed, head and vector.

    Args:
        name: of the rule, see find_rule().
        params: every trainable parameter of the model, once, with its role.
        hparams: the fields of AuxHparams, all of them, and arguments of the rule's constructor; see hparam_types().
        process_group: whose ranks share the matrices, by a rule that can; see MatrixOptimizer.
        parameters: matrices, or all: then the rule, neither a MatrixOptimizer nor AdamW, updates all parameters in one
            group of the role "all", and hparams are its arguments alone.

    Returns:
        [rule], its first group the matrices; AdamW's groups are in it, too. Of a rule that is neither a MatrixOptimizer
        nor AdamW: [rule, AdamW]. Each group carries its role under "role" and its lr at full scale under "peak_lr".

    Raises:
        ValueError: no such rule, one that cannot be built, a value out of range, or a parameter not covered once.
        KeyError, TypeError: a hyper-parameter that is missing or unknown.
    """
    from .base import MatrixOptimizer

    rule, rule_hparams = find_rule(name), dict(hparams)
    if parameters == "all":
        if is_ours(rule):
            raise ValueError('parameters = "all" is for optimizers of others; this one has AdamW update the rest')
        from .external import make

        optimizers = [make(rule, [param.tensor for param in params], rule_hparams, "all")]
        check_exact_cover(params, optimizers)
        return optimizers
    aux = AuxHparams(**{field.name: rule_hparams.pop(field.name) for field in fields(AuxHparams)})
    by_role: dict[str, list[tuple[str, torch.nn.Parameter]]] = {role: [] for role in ROLES}
    for param in params:
        if param.role not in by_role:
            raise ValueError(f"{param.name} has role {param.role!r}; an optimizer covers only {', '.join(ROLES)}")
        by_role[param.role].append((param.name, param.tensor))

    aux_lr = {"embed": aux.embed_lr, "head": aux.head_lr, "vector": aux.vector_lr}
    at_least_0 = {f"{role}_lr": lr for role, lr in aux_lr.items()}
    for key, value in (at_least_0 | dict(aux_eps=aux.aux_eps, aux_weight_decay=aux.aux_weight_decay)).items():
        if not value >= 0:
            raise ValueError(f"{key} must be at least 0, got {value!r}")
    if len(aux.aux_betas) != 2 or not all(0 <= beta < 1 for beta in aux.aux_betas):
        raise ValueError(f"aux_betas must be two numbers in [0, 1), got {aux.aux_betas!r}")
    groups: list[dict[str, Any]] = [dict(params=by_role["matrix"], role="matrix")] if by_role["matrix"] else []
    adamw = dict(weight_decay=aux.aux_weight_decay, betas=aux.aux_betas, eps=aux.aux_eps)
    others = [dict(params=by_role[role], role=role, lr=lr, **adamw) for role, lr in aux_lr.items() if by_role[role]]
    if is_ours(rule) and issubclass(rule, MatrixOptimizer):
        others = [dict(algorithm="adamw", **group) for group in others]
        optimizers = [rule(groups + others, process_group=process_group, **rule_hparams)]
    else:
        from .adamw import AdamW  # a rule, too: imported when it is used, not before

        if is_ours(rule):
            optimizers = [rule(groups + others, **rule_hparams)]
        else:
            from .external import make

            matrices = [param.tensor for param in params if param.role == "matrix"]
            optimizers = [make(rule, matrices, rule_hparams, "matrix")] if matrices else []
            optimizers += [AdamW(others, lr=0.0)] if others else []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("peak_lr", group["lr"])
    check_exact_cover(params, optimizers)
    return optimizers


def is_ours(rule: Any) -> bool:
    """Whether this class, or the class of this optimizer, shares its parameters' groups with AdamW, and is tested for
    all that a run relies on."""
    from .base import MatrixOptimizer

    adamw = sys.modules.get(f"{__package__}.adamw")  # not there, so not the rule either
    kinds = (MatrixOptimizer, adamw.AdamW) if adamw else (MatrixOptimizer,)
    return issubclass(rule, kinds) if isinstance(rule, type) else isinstance(rule, kinds)


def hparam_types(name: str) -> dict[str, Any]:
    """Name and type of every hyper-parameter that build() takes for this rule: AuxHparams' first, all of them needed,
    then the rule's own. An argument without a type has that of its default: see hint_of().

    Raises:
        ValueError: no such rule.
    """
    from .external import arguments_of, hint_of

    types: dict[str, Any] = get_type_hints(AuxHparams)
    return types | {key: hint_of(argument) for key, argument in arguments_of(find_rule(name)).items()}


def hparam_defaults(name: str) -> dict[str, Any]:
    """The defaults of those of the rule's own hyper-parameters that have one."""
    from .external import arguments_of

    arguments = arguments_of(find_rule(name)).items()
    return {key: argument.default for key, argument in arguments if argument.default is not inspect.Parameter.empty}
