"""PSGD (Li 2018, https://arxiv.org/abs/1512.04202) with Kronecker whitening, as in the public benchmark's result 33."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .base import MatrixOptimizer
from .kronecker import corrected, gathered, keep, new_grams, new_share
from .rule import check_hparam


class PSGD(MatrixOptimizer):
    """direction = P^T P m Q^T Q with triangular P and Q that learn to whiten m, the mean gradient.

        m = X / (1 - momentum^t),  A = P (m + noise) Q^T,  B = P^-T v Q^-1 for a random v
        P <- P - precond_lr triu(A A^T - B B^T) P / ||A A^T + B B^T||,  and Q with A^T A and B^T B

    P and Q start as multiples of I. The noise is float32's rounding, the norm an estimate of the spectral one. Random
    numbers come from the step's number, so that runs repeat whatever the number of ranks. Made for hyperball; without
    it nothing bounds the direction. State: M^2 + N^2 + M N numbers a matrix.

    Args:
        lr: Norm of a step relative to the weights' with hyperball; else of no unit.
        momentum: Decay of the average of gradients, in [0, 1).
        nesterov: Whether the gradient is mixed into the average once more.
        aspect_scale: Whether tall updates are multiplied by sqrt(M/N).
        precond_lr: Step size of P and Q, in (0, 1].
        Others: see MatrixOptimizer. No polar factor is taken.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        nesterov: bool = False,
        aspect_scale: bool = False,
        precond_lr: float = 1.0,
        **matrix_hparams: Any,
    ):
        own: dict[str, Any] = dict(nesterov=nesterov, aspect_scale=aspect_scale)
        super().__init__(params, lr, rule_hparams=dict(precond_lr=precond_lr), **own, **matrix_hparams)

    def check_hparams(self, group: dict[str, Any]) -> None:
        super().check_hparams(group)
        check_hparam(0 < group["precond_lr"] <= 1, "precond_lr", "in (0, 1]", group)

    def new_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {**super().new_state(p, group), **new_share(p), **new_grams(p)}

    def direction(
        self,
        X_KMN: Tensor,
        states: list[dict[str, Any]],
        group: dict[str, Any],
        *,
        G_KMN: Tensor,
        step: Tensor,
    ) -> Tensor:
        P_KMM, Q_KNN = gathered(states, "left"), gathered(states, "right")
        if step == 0:
            size_K11 = G_KMN.pow(4).mean(dim=(-2, -1), keepdim=True).clamp(min=1e-24) ** (-1 / 32)
            P_KMM, Q_KNN = (torch.eye(T.size(-1), device=T.device) * size_K11 for T in (P_KMM, Q_KNN))
        m_KMN = corrected(X_KMN, states, group)
        generator = torch.Generator(X_KMN.device).manual_seed(int(step))
        v_MN, noise_MN = torch.randn(2, *X_KMN.shape[1:], generator=generator, device=X_KMN.device)
        balance_K11 = (Q_KNN.abs().amax((-2, -1), keepdim=True) / P_KMM.abs().amax((-2, -1), keepdim=True)).sqrt()
        P_KMM, Q_KNN = P_KMM * balance_K11, Q_KNN / balance_K11
        A_KMN = P_KMM @ (m_KMN + torch.finfo(torch.float32).eps * m_KMN.abs() * noise_MN) @ Q_KNN.mT
        B_KMN = torch.linalg.solve_triangular(P_KMM.mT, v_MN.expand_as(A_KMN), upper=False)
        B_KMN = torch.linalg.solve_triangular(Q_KNN, B_KMN, upper=True, left=False)
        P_KMM = whitened(P_KMM, A_KMN @ A_KMN.mT, B_KMN @ B_KMN.mT, group["precond_lr"])
        Q_KNN = whitened(Q_KNN, A_KMN.mT @ A_KMN, B_KMN.mT @ B_KMN, group["precond_lr"])
        keep(states, left=P_KMM, right=Q_KNN)
        return P_KMM.mT @ P_KMM @ m_KMN @ (Q_KNN.mT @ Q_KNN)


def whitened(Q_KNN: Tensor, AA_KNN: Tensor, BB_KNN: Tensor, precond_lr: float) -> Tensor:
    """Triangular Q after a step towards A A^T = B B^T."""
    return Q_KNN - precond_lr / spectral_norm(AA_KNN + BB_KNN) * torch.triu(AA_KNN - BB_KNN) @ Q_KNN


def spectral_norm(C_KNN: Tensor) -> Tensor:
    """(K, 1, 1): an estimate from below for symmetric positive semidefinite matrices, by power iteration from the
    largest column."""
    scale_K11 = C_KNN.abs().sum(dim=-1).amax(dim=-1).clamp(min=1e-30)[:, None, None]
    C_KNN = C_KNN / scale_K11
    largest_K11 = C_KNN.square().sum(dim=-2, keepdim=True).argmax(dim=-1, keepdim=True)
    x_KN1 = C_KNN @ C_KNN.gather(-1, largest_K11.expand(-1, C_KNN.size(-1), 1))
    x_KN1 = x_KN1 / torch.linalg.vector_norm(x_KN1, dim=-2, keepdim=True).clamp(min=1e-30)
    return scale_K11 * torch.linalg.vector_norm(C_KNN @ x_KN1, dim=-2, keepdim=True)
