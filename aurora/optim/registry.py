"""The one place where an optimizer's name is resolved: rule for the matrices, AdamW for everything else."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

import torch

from aurora.optim.adamw import adamw
from aurora.optim.aurora import Aurora
from aurora.optim.muon import Muon
from aurora.optim.normuon import NorMuon
from aurora.optim.params import ROLES, Param, check_exact_cover
from aurora.optim.riemannian_aurora import RiemannianAurora
from aurora.optim.unormuon import UNorMuon

RULES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": adamw,
    "muon": Muon,
    "normuon": NorMuon,
    "unormuon": UNorMuon,
    "aurora": Aurora,
    "riemannian_aurora": RiemannianAurora,
}


@dataclass(frozen=True)
class AuxHparams:
    """AdamW's settings for what is not a matrix; the same names for every rule."""

    embed_lr: float
    head_lr: float
    vector_lr: float
    aux_betas: tuple[float, float]
    aux_eps: float
    aux_weight_decay: float


REQUIRED_HPARAMS = (*(field.name for field in fields(AuxHparams)), "lr")


def build(name: str, params: Sequence[Param], hparams: dict[str, Any]) -> list[torch.optim.Optimizer]:
    """The optimizers of a run: AdamW over embed, head and vector, and the named rule over the matrices.

    Args:
        name: a key of RULES.
        params: every trainable parameter of the model, once, with its role.
        hparams: the fields of AuxHparams, all of them, and arguments of the rule's constructor; see hparam_types().

    Returns:
        [AdamW, rule]. Each group carries its role under "role" and its lr at full scale under "peak_lr".

    Raises:
        ValueError: unknown name, value out of range, or a parameter not covered exactly once.
        KeyError, TypeError: a hyper-parameter that is missing or unknown.
    """
    if name not in RULES:
        raise ValueError(f"unknown optimizer {name!r}; known: {', '.join(RULES)}")
    rule_hparams = dict(hparams)
    aux = AuxHparams(**{field.name: rule_hparams.pop(field.name) for field in fields(AuxHparams)})
    by_role: dict[str, list[tuple[str, torch.nn.Parameter]]] = {role: [] for role in ROLES}
    for param in params:
        if param.role not in by_role:
            raise ValueError(f"{param.name} has role {param.role!r}; an optimizer covers only {', '.join(ROLES)}")
        by_role[param.role].append((param.name, param.tensor))

    aux_lr = {"embed": aux.embed_lr, "head": aux.head_lr, "vector": aux.vector_lr}
    for role, lr in aux_lr.items():
        if not lr >= 0:
            raise ValueError(f"{role}_lr must be at least 0, got {lr!r}")
    aux_groups = [dict(params=by_role[role], lr=lr, role=role) for role, lr in aux_lr.items() if by_role[role]]
    optimizers = []
    if aux_groups:
        optimizers.append(
            adamw(aux_groups, lr=0.0, weight_decay=aux.aux_weight_decay, betas=aux.aux_betas, eps=aux.aux_eps)
        )
    if by_role["matrix"]:
        optimizers.append(RULES[name]([dict(params=by_role["matrix"], role="matrix")], **rule_hparams))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    check_exact_cover(params, optimizers)
    return optimizers


def hparam_types(name: str) -> dict[str, Any]:
    """Name and type of every hyper-parameter that build() takes for this rule: AuxHparams' first, all of them needed,
    then the rule's own, of which only lr is."""
    rule = RULES[name]
    constructors = [c.__init__ for c in rule.__mro__ if "__init__" in vars(c)] if inspect.isclass(rule) else [rule]
    types: dict[str, Any] = get_type_hints(AuxHparams)
    for constructor in constructors:
        parameters = inspect.signature(constructor).parameters.values()
        hints = get_type_hints(constructor)
        for parameter in parameters:
            if parameter.name not in ("self", "params", "rule_hparams") and parameter.kind != parameter.VAR_KEYWORD:
                types.setdefault(parameter.name, hints[parameter.name])
        if all(parameter.kind != parameter.VAR_KEYWORD for parameter in parameters):
            break
    return types
