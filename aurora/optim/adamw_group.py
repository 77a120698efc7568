"""Groups with algorithm = "adamw" in the other rules' optimizers: torch's functional AdamW, with torch's state."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from .fsdp import is_dtensor
from .stacks import group_by

ADAMW_DEFAULTS: dict[str, Any] = {"weight_decay": 0.0, "betas": (0.9, 0.95), "eps": 1e-8}


def check_adamw_group(group: dict[str, Any]) -> None:
    """Raise ValueError for a group without lr, or with a value out of range."""
    if "lr" not in group:
        raise ValueError(
            'a group with algorithm = "adamw" needs an lr of its own, e.g. 3e-4: other rules\' have other units'
        )
    values: dict[str, Any] = ADAMW_DEFAULTS | group
    betas = tuple(values["betas"])
    if not (values["lr"] >= 0 and values["weight_decay"] >= 0 and values["eps"] >= 0):
        raise ValueError(f"lr, weight_decay and eps of an adamw group must be at least 0; got {group}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas of an adamw group must be two numbers in [0, 1), got {values['betas']}")


def adamw_step(params: Sequence[Tensor], states: dict[Tensor, dict[str, Tensor]], group: dict[str, Any]) -> None:
    """One step of parameters that have gradients."""
    if len(by_kind := group_by(params, lambda p: getattr(p, "device_mesh", None) if is_dtensor(p) else None)) != 1:
        for same_kind in by_kind:  # torch's AdamW takes no DTensors beside plain tensors
            adamw_step(same_kind, states, group)
        return
    if any(p.grad is not None and p.grad.layout != torch.strided for p in params):
        raise RuntimeError("AdamW does not take sparse gradients; give these parameters to torch.optim.SparseAdam")
    # Fused on CUDA and CPU, as torch requires it: all of one device there, floating-point.
    is_fused = all(p.device.type in ("cuda", "cpu") and p.is_floating_point() for p in params)
    for p in params:
        if not states[p]:
            step_device = p.device if is_fused and p.is_cuda else torch.device("cpu")
            averages = {
                key: torch.zeros_like(p, memory_format=torch.preserve_format) for key in ("exp_avg", "exp_avg_sq")
            }
            states[p].update(step=torch.zeros((), dtype=torch.float32, device=step_device), **averages)
    own = [states[p] for p in params]
    beta1, beta2 = group["betas"]
    adamw(
        list(params),
        [p.grad for p in params if p.grad is not None],
        [state["exp_avg"] for state in own],
        [state["exp_avg_sq"] for state in own],
        [],
        [state["step"] for state in own],
        fused=is_fused,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
