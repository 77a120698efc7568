"""Muon^2 (https://arxiv.org/abs/2604.09967): Muon after Adam's second moment."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .base import MatrixOptimizer
from .rule import check_hparam


class Muon2(MatrixOptimizer):
    """direction = polar(X / (sqrt(v) + eps)),  v <- beta2 v + (1 - beta2) G^2.

    The bounds of the direction and the meaning of lr are Muon's. Result 7 of the public benchmark.

    Args:
        beta2: Decay of the average of squares, in [0, 1).
        eps: Added to the root of that average; it is compared with gradients of the mean loss.
        Others: see MatrixOptimizer.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, beta2: float = 0.95, eps: float = 1e-15, **matrix_hparams: Any
    ):
        super().__init__(params, lr, rule_hparams=dict(beta2=beta2, eps=eps), **matrix_hparams)

    def check_hparams(self, group: dict[str, Any]) -> None:
        super().check_hparams(group)
        check_hparam(0 <= group["beta2"] < 1, "beta2", "in [0, 1)", group)
        check_hparam(group["eps"] > 0, "eps", "positive", group)

    def new_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {**super().new_state(p, group), "squares": torch.zeros_like(p, dtype=torch.float32)}

    def direction(self, X_KMN: Tensor, states: list[dict[str, Any]], group: dict[str, Any], *, G_KMN: Tensor) -> Tensor:
        squares = [state["squares"] for state in states]
        torch._foreach_lerp_(squares, list(G_KMN.square().unbind()), 1 - group["beta2"])
        return self.polar(X_KMN / (torch.stack(squares).sqrt() + group["eps"]), group, overwrite=True)
