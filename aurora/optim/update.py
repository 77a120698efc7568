"""From directions to new weights: scale, decay, and modifiers that go with any rule.

U = scale direction(X) is the update, see base.py. Each matrix by itself, with Frobenius norms, in this order:

    update_floor     U <- max(1, update_floor ||W|| / ||U||) U
    hyperball        U <- (||W|| / ||U||) U
                     V  = W - lr (U + weight_decay W)               cautious_decay: decay only where U_ij W_ij >= 0
    hyperball        V <- (||W|| / ||V||) V

cautious_decay is Cautious Weight Decay (Chen et al. 2025, https://arxiv.org/abs/2510.12402). The others are from the
public optimization benchmark (records/track_3_optimization of https://github.com/KellerJordan/modded-nanogpt):
update_floor from its result 9, hyperball from MuonH, NorMuonH, AdamH and SOAP-H, its results 5, 8, 4 and 27.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .fsdp import is_dtensor
from .shapes import to_matrices

# A norm to divide by where there is no direction; what it divides is zero and stays so.
TINY_NORM = 1e-30


def lr_factor(rows: int, columns: int, group: dict[str, Any]) -> float:
    """What lr is multiplied by for matrices (rows, columns)."""
    if group["adjust_lr_fn"] == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns)) if group["aspect_scale"] or group["adjust_lr_fn"] == "original" else 1.0


def check_ball(name: str, p: Tensor, group: dict[str, Any]) -> None:
    """Raise ValueError where hyperball would keep a matrix zero."""
    if group["hyperball"] and not p.is_meta and p.numel():
        whole: Any = p.detach()
        whole = whole.full_tensor() if is_dtensor(p) else whole  # a norm may be of rows elsewhere
        largest = torch.stack([matrix.abs().max() for matrix in to_matrices(whole, group)])
        if not largest.all():
            raise ValueError(
                f"hyperball keeps norms, but {name} of shape {tuple(p.shape)} has one of 0; start it from other values"
            )


def is_modified(group: dict[str, Any]) -> bool:
    """Whether the group's steps depend on the weights by more than plain decay."""
    return bool(group["hyperball"] or group["update_floor"] or (group["cautious_decay"] and group["weight_decay"]))


def lr_of(group: dict[str, Any]) -> float | Tensor:
    """A number, or a 0-dim tensor."""
    return group["lr"].reshape(()) if isinstance(group["lr"], Tensor) else group["lr"]


def modified_step(O_KMN: Tensor, W_KMN: Tensor, group: dict[str, Any]) -> Tensor:
    """(K, M, N) float32: what a step takes off the weights, decay and all.

    Args:
        O_KMN: directions.
        W_KMN: float32 weights.
    """
    U_KMN = O_KMN.float() * lr_factor(O_KMN.size(-2), O_KMN.size(-1), group)
    norm_K11 = norms(W_KMN)
    if group["update_floor"]:
        U_KMN *= (group["update_floor"] * norm_K11 / norms(U_KMN)).clamp(min=1)
    if group["hyperball"]:
        U_KMN *= norm_K11 / norms(U_KMN)
    if group["weight_decay"]:
        decay_KMN = group["weight_decay"] * W_KMN
        U_KMN += decay_KMN.masked_fill_(U_KMN * W_KMN < 0, 0) if group["cautious_decay"] else decay_KMN
    if not group["hyperball"]:
        return lr_of(group) * U_KMN
    V_KMN = W_KMN - lr_of(group) * U_KMN
    return W_KMN - V_KMN * (norm_K11 / norms(V_KMN))


def norms(X_KMN: Tensor) -> Tensor:
    """(K, 1, 1) Frobenius norms, to divide by."""
    return torch.linalg.vector_norm(X_KMN, dim=(-2, -1), keepdim=True).clamp(min=TINY_NORM)


def take_off(stack: list[Tensor], O_K: Tensor | list[Tensor], step_size: float | Tensor, decay: float | Tensor) -> None:
    """stack <- (1 - decay) stack - step_size O_K, in place."""
    if isinstance(O_K, Tensor):
        O_K = list(O_K.to(torch.promote_types(O_K.dtype, stack[0].dtype)).unbind())
    updates = O_K
    if isinstance(decay, Tensor) or decay:
        torch._foreach_mul_(stack, 1 - decay)
    if isinstance(step_size, Tensor):  # which alpha may not be
        dtype = torch.promote_types(torch.float32, stack[0].dtype)
        updates, step_size = [update.to(dtype) * step_size for update in updates], 1
    torch._foreach_sub_(stack, updates, alpha=step_size)  # of one dtype it is one launch on CUDA
