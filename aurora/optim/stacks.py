"""Stacks of parameters of one shape: how they are formed, how large they may be, and the momentum that rules see."""

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# The largest stack of float32 matrices, unless one alone is larger. More gains nothing, and a CPU's caches hold less.
STACK_BYTES, CPU_STACK_BYTES = 2**28, 2**23
# A stack and what is made of it are up to 4.1 times its size. These shares keep a step below 2.5 STACK_BYTES; that of
# parts is smaller, since the parameter that they are parts of is there, too.
STACK_SHARE, PARTS_SHARE = 0.6, 0.3


def gradients_of(params: Iterable[Tensor]) -> list[Tensor]:
    """The gradients of the parameters that have one."""
    return [p.grad for p in params if p.grad is not None]


def group_by(params: Iterable[Tensor], key: Callable[[Tensor], Any]) -> list[list[Tensor]]:
    """The parameters in groups of equal key, both in order of appearance."""
    groups: dict[Any, list[Tensor]] = {}
    for p in params:
        groups.setdefault(key(p), []).append(p)
    return list(groups.values())


def split_for_memory(members: list[Any], num_elements: int, is_cpu: bool, share: float) -> list[list[Any]]:
    """Members of a stack, with num_elements each, in parts of at most this share of the largest stack."""
    size = max(1, int(share * (CPU_STACK_BYTES if is_cpu else STACK_BYTES)) // (4 * num_elements))
    return [members[first : first + size] for first in range(0, len(members), size)]


def update_momentum(grads: list[Tensor], buffers: list[Tensor], group: dict[str, Any]) -> None:
    """The buffers take in these gradients, in place."""
    torch._foreach_lerp_(buffers, [grad.float() for grad in grads], _weights(1 - group["momentum"], buffers))


def lookahead(grads: list[Tensor], buffers: list[Tensor], group: dict[str, Any]) -> Tensor:
    """(K, *shape) float32: what rules see of K parameters' momentum."""
    if not group["nesterov"]:
        return torch.stack(buffers)
    X_K = torch.stack([grad.float() for grad in grads])
    torch._foreach_lerp_(list(X_K.unbind()), buffers, _weights(group["momentum"], buffers))
    return X_K


def _weights(weight: float | Tensor, buffers: list[Tensor]) -> float | list[Tensor]:
    """The weight as foreach_lerp takes it for these buffers."""
    return [weight] * len(buffers) if isinstance(weight, Tensor) else weight


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Matmuls in the dtype that they are given, also where a step is taken within torch.autocast."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
