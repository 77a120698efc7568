"""Statistics of gradients by rows and columns, which several rules keep: Gram matrices and their bases."""

from typing import Any

import torch
from torch import Tensor


def gathered(states: list[dict[str, Any]], key: str) -> Tensor:
    """(K, ...): one entry of the state of K matrices; a copy."""
    return torch.stack([state[key] for state in states])


def keep(states: list[dict[str, Any]], **values: Tensor) -> None:
    """Write stacks (K, ...) back into the states, in place."""
    for key, value in values.items():
        torch._foreach_copy_([state[key] for state in states], list(value.unbind()))


def new_share(p: Tensor) -> dict[str, Tensor]:
    """unseen (1,): the share of the momentum that is still its start from zero, the product of all its decays."""
    return {"unseen": torch.ones(1, dtype=torch.float32, device=p.device)}


def corrected(X_KMN: Tensor, states: list[dict[str, Any]], group: dict[str, Any]) -> Tensor:
    """The momentum without its start from zero, also where a schedule changes its decay. Counts one step."""
    unseen_K1 = gathered(states, "unseen") * group["momentum"]
    keep(states, unseen=unseen_K1)
    return X_KMN / (1 - unseen_K1[:, :, None])


def new_grams(p: Tensor) -> dict[str, Tensor]:
    """left (M, M) and right (N, N): zeros."""
    sizes = zip(("left", "right"), p.shape, strict=True)
    return {key: torch.zeros((size, size), dtype=torch.float32, device=p.device) for key, size in sizes}


def grams(G_KMN: Tensor) -> tuple[Tensor, Tensor]:
    """G G^T and G^T G."""
    return G_KMN @ G_KMN.mT, G_KMN.mT @ G_KMN


def eigenbasis(C_KNN: Tensor) -> Tensor:
    """Eigenvectors of symmetric matrices as columns, largest first. On a GPU this waits for the device."""
    # What is not finite ends up in the weights in any case, and would make eigh() raise.
    return torch.linalg.eigh(C_KNN.nan_to_num(0, 0, 0))[1].flip(-1)


def power_step(C_KNN: Tensor, Q_KNN: Tensor) -> Tensor:
    """The bases Q, turned by one orthogonal iteration towards the eigenvectors of C."""
    return torch.linalg.qr(C_KNN @ Q_KNN)[0]
