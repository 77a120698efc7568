"""Adam (Kingma and Ba 2015, https://arxiv.org/abs/1412.6980) for matrices; with hyperball it is AdamH."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .base import MatrixOptimizer
from .kronecker import corrected, new_share
from .rule import check_hparam


class Adam(MatrixOptimizer):
    """The mean gradient over the root of its mean square, both corrected for their start from zero.

        direction = (X / (1 - momentum^t)) / (sqrt(v / (1 - beta2^t)) + eps),  v <- beta2 v + (1 - beta2) G^2

    Where adamw updates the matrices with torch's AdamW, this goes with the modifiers of all rules. With hyperball it is
    AdamH, result 4 of the public benchmark. |direction_ij| <= 1.2 with the defaults of momentum and beta2.

    Args:
        lr: About the RMS change of a weight in a step; with hyperball the norm of a step relative to the weights'.
        momentum: Decay of the average of gradients, in [0, 1); beta1 elsewhere.
        nesterov: Whether the gradient is mixed into the average once more.
        aspect_scale: Whether tall updates are multiplied by sqrt(M/N).
        beta2: Decay of the average of squares, in [0, 1).
        eps: Added to the root of that average; it is compared with gradients of the mean loss.
        Others: see MatrixOptimizer. No polar factor is taken.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        nesterov: bool = False,
        aspect_scale: bool = False,
        beta2: float = 0.95,
        eps: float = 1e-10,
        **matrix_hparams: Any,
    ):
        own: dict[str, Any] = dict(momentum=momentum, nesterov=nesterov, aspect_scale=aspect_scale)
        super().__init__(params, lr, rule_hparams=dict(beta2=beta2, eps=eps), **own, **matrix_hparams)

    def check_hparams(self, group: dict[str, Any]) -> None:
        super().check_hparams(group)
        check_hparam(0 <= group["beta2"] < 1, "beta2", "in [0, 1)", group)
        check_hparam(group["eps"] > 0, "eps", "positive", group)

    def new_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {**super().new_state(p, group), **new_share(p), "squares": torch.zeros_like(p, dtype=torch.float32)}

    def direction(
        self, X_KMN: Tensor, states: list[dict[str, Any]], group: dict[str, Any], *, G_KMN: Tensor, step: Tensor
    ) -> Tensor:
        squares = [state["squares"] for state in states]
        torch._foreach_lerp_(squares, list(G_KMN.square().unbind()), 1 - group["beta2"])
        rms_KMN = (torch.stack(squares) / (1 - group["beta2"] ** (step + 1))).sqrt()
        return corrected(X_KMN, states, group) / (rms_KMN + group["eps"])
