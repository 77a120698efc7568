"""What a saved state must have to be taken over, and which settings of other optimizers would be ignored."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .shapes import SHAPE_OPTIONS

# Arguments of other Muons, and what to use here.
FOREIGN_ARGUMENTS = {
    "ns_steps": "polar_schedule, which fixes the number of steps",
    "ns_coefficients": "polar_schedule, e.g. 'ns5_jordan' for (3.4445, -4.775, 2.0315)",
    "betas": 'betas of a group with algorithm = "adamw"',
    "adamw_betas": 'betas of a group with algorithm = "adamw"',
    "adamw_params": 'a group with algorithm = "adamw"',
    "muon_params": "params",
    "maximize": "the negative of the loss",
    "eps": "none: without one a zero matrix gives zeros, too",
}
# Settings of torch's optimizers that change numbers, with the values that change none.
FOREIGN_SETTINGS = {
    "maximize": False, "amsgrad": False, "decoupled_weight_decay": True, "dampening": None,
    "ns_steps": 5, "ns_coefficients": (3.4445, -4.775, 2.0315),
}  # fmt: skip
# Those that constructors take, with these values, for code that was written for torch's.
HARMLESS_ARGUMENTS = ("maximize", "amsgrad", "decoupled_weight_decay")


def check_arguments(rule: str, unknown: dict[str, Any]) -> None:
    """Raise TypeError for an argument that a rule's constructor has not, and that would mean something elsewhere."""
    for name, value in unknown.items():
        if name in HARMLESS_ARGUMENTS and value == FOREIGN_SETTINGS[name]:
            continue
        remedy = f"; use {FOREIGN_ARGUMENTS[name]}" if name in FOREIGN_ARGUMENTS else ""
        raise TypeError(f"{rule} has no argument {name!r}{remedy}")


def check_foreign_settings(group: dict[str, Any]) -> None:
    """Raise ValueError for a setting of other optimizers that would be ignored, and would mean something there."""
    for key in group.keys() & FOREIGN_SETTINGS.keys():
        value = tuple(group[key]) if isinstance(group[key], list) else group[key]  # as JSON gives it back
        if value != FOREIGN_SETTINGS[key]:
            remedy = f"; use {FOREIGN_ARGUMENTS[key]}" if key in FOREIGN_ARGUMENTS else ""
            raise ValueError(f"a group has {key} = {group[key]!r}, which is not supported{remedy}")


def names_of(group: dict[str, Any]) -> list[str]:
    """The names of a group's parameters, or their positions."""
    return group.get("param_names") or [f"parameter {i}" for i in range(len(group["params"]))]


def plain_name(name: str) -> str:
    """A parameter's name without what torch.compile and DDP put before it."""
    return ".".join(part for part in name.split(".") if part not in ("_orig_mod", "module"))


def loaded_groups(
    saved_groups: list[dict[str, Any]],
    own_groups: list[dict[str, Any]],
    check_hparams: Callable[[dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """Our parameters with the settings of saved groups.

    Raises:
        ValueError: another number or other names of parameters, another rule, or a setting that the rule has not.
    """
    lengths = [[len(group["params"]) for group in groups] for groups in (saved_groups, own_groups)]
    if lengths[0] != lengths[1]:
        raise ValueError(f"the state has groups of {lengths[0]} parameters, this optimizer of {lengths[1]}")
    groups = []
    for saved, own in zip(saved_groups, own_groups, strict=True):
        check_foreign_settings(saved)
        if own["algorithm"] != "adamw" and saved.get("adjust_lr_fn", "") is None:
            saved["adjust_lr_fn"] = "original"  # what torch.optim.Muon means by None
        if saved.get("algorithm", own["algorithm"]) != own["algorithm"]:
            raise ValueError(f"state of {saved['algorithm']} cannot be loaded into {own['algorithm']}")
        if "param_names" in saved and "param_names" in own:
            names = [[plain_name(name) for name in group["param_names"]] for group in (saved, own)]
            if names[0] != names[1]:
                raise ValueError(f"state belongs to parameters {names[0]}, this optimizer has {names[1]}")
        # How parameters lie is the model's, not the state's.
        fixed = {key: own[key] for key in ("params", "param_names", *SHAPE_OPTIONS) if key in own}
        groups.append(own | {key: saved[key] for key in saved if key not in SHAPE_OPTIONS} | fixed)
        if own["algorithm"] != "adamw":
            check_hparams(groups[-1])
    return groups


def checked_state(
    name: str,
    p: Tensor,
    saved: dict[str, Any],
    group: dict[str, Any],
    new_state: dict[str, Tensor] | None,
    optional: tuple[str, ...],
) -> dict[str, Any]:
    """What is kept of a parameter's saved state; of AdamW's in the weights' dtype, as torch's loader has it.

    What others have added to it is kept as it is.

    Args:
        new_state: of a matrix, what its rule keeps for it, for shapes and dtypes; None in AdamW's groups.
        optional: keys that are left out where new_state has them not: a setting was changed since.

    Raises:
        ValueError: what is kept would have other keys, shapes or dtypes.
    """
    if new_state is None:
        if "step" in saved:
            saved = saved | {"step": torch.as_tensor(float(saved["step"]), dtype=torch.float32)}
        wanted: dict[str, Any] = {"step": ()} | dict.fromkeys(("exp_avg", "exp_avg_sq"), tuple(p.shape))
        kept = {key: value.to(p.dtype) if key in ("exp_avg", "exp_avg_sq") else value for key, value in saved.items()}
        found = {key: tuple(value.shape) for key, value in saved.items() if key in wanted}
    else:
        wanted = {key: (tuple(value.shape), value.dtype) for key, value in new_state.items()}
        kept = {key: value for key, value in saved.items() if key in wanted or key not in optional}
        found = {key: (tuple(value.shape), value.dtype) for key, value in kept.items() if key in wanted}
    if found != wanted:
        raise ValueError(f"state of {name} is {found or list(saved)}, but {group['algorithm']} keeps {wanted} for it")
    return kept


def device_of_state(key: str, p: Tensor, is_adamw: bool) -> torch.device:
    """The count of steps is on the CPU, but for that of AdamW where it is fused on a GPU, as torch has it."""
    return torch.device("cpu") if key == "step" and not (is_adamw and p.is_cuda) else p.device


def copied_to(device: torch.device, value: Any) -> Any:
    return value.to(device, copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)


def in_order(state_dict: dict[str, Any]) -> dict[str, Any]:
    """With the states in order of the parameters, not of their first steps."""
    if "state" not in state_dict:  # a hook has given it another form
        return state_dict
    states = sorted(state_dict["state"].items(), key=lambda item: (isinstance(item[0], str), item[0]))
    return {**state_dict, "state": dict(states)}
