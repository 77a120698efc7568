"""SOAP (Vyas et al. 2025, https://arxiv.org/abs/2409.11321) in the form of the public benchmark's SOAP-H."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .base import MatrixOptimizer
from .kronecker import eigenbasis, gathered, grams, keep, new_grams, power_step
from .rule import check_hparam


class SOAP(MatrixOptimizer):
    """Adam, without bias correction, in slowly turning eigenbases of the mean G G^T and G^T G.

        direction = P ((P^T X Q) / (sqrt(v) + eps)) Q^T,  v <- beta2 v + (1 - beta2) (P^T G Q)^2
        L <- beta2 L + (1 - beta2) G G^T,  R <- beta2 R + (1 - beta2) G^T G
        P <- qr(L P),  Q <- qr(R Q), after the direction; at first the eigenvectors of G G^T and G^T G

    With hyperball this is SOAP-H, result 27. Without, nothing bounds the direction: v is a mean over turning bases, and
    small where gradients have a new direction. At first, and in the null spaces of L and R, v is rounding alone, and so
    is the direction there. State: 2 (M^2 + N^2 + M N) numbers a matrix. On a GPU the first step waits for the device.

    Args:
        lr: Norm of a step relative to the weights' with hyperball; else about the RMS change of a weight.
        momentum: Decay of the average of gradients, in [0, 1).
        nesterov: Whether the gradient is mixed into the average once more.
        aspect_scale: Whether tall updates are multiplied by sqrt(M/N).
        beta2: Decay of the averages of squares and of L and R, in [0, 1).
        eps: Added to the root of the average square; it is compared with gradients of the mean loss.
        Others: see MatrixOptimizer. No polar factor is taken.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.95,
        nesterov: bool = False,
        aspect_scale: bool = False,
        beta2: float = 0.9,
        eps: float = 1e-12,
        **matrix_hparams: Any,
    ):
        own: dict[str, Any] = dict(momentum=momentum, nesterov=nesterov, aspect_scale=aspect_scale)
        super().__init__(params, lr, rule_hparams=dict(beta2=beta2, eps=eps), **own, **matrix_hparams)

    def check_hparams(self, group: dict[str, Any]) -> None:
        super().check_hparams(group)
        check_hparam(0 <= group["beta2"] < 1, "beta2", "in [0, 1)", group)
        check_hparam(group["eps"] > 0, "eps", "positive", group)

    def new_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        bases = {f"{key}_basis": value for key, value in new_grams(p).items()}
        squares = torch.zeros_like(p, dtype=torch.float32)
        return {**super().new_state(p, group), **new_grams(p), **bases, "squares": squares}

    def direction(
        self, X_KMN: Tensor, states: list[dict[str, Any]], group: dict[str, Any], *, G_KMN: Tensor, step: Tensor
    ) -> Tensor:
        weight = 1 - group["beta2"]
        left, right, squares = (gathered(states, key) for key in ("left", "right", "squares"))
        P_KMM, Q_KNN = (gathered(states, key) for key in ("left_basis", "right_basis"))
        if step == 0:
            P_KMM, Q_KNN = map(eigenbasis, grams(G_KMN))
        squares.lerp_((P_KMM.mT @ G_KMN @ Q_KNN).square(), weight)
        for gram, new in zip((left, right), grams(G_KMN), strict=True):
            gram.lerp_(new, weight)
        bases = dict(left_basis=power_step(left, P_KMM), right_basis=power_step(right, Q_KNN))
        keep(states, left=left, right=right, squares=squares, **bases)
        return P_KMM @ ((P_KMM.mT @ X_KMN @ Q_KNN) / (squares.sqrt() + group["eps"])) @ Q_KNN.mT
