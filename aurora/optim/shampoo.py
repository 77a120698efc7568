"""Shampoo (Gupta et al. 2018, https://arxiv.org/abs/1802.09568) with Adam's norm, as in the benchmark's result 21."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .base import MatrixOptimizer
from .kronecker import corrected, gathered, grams, keep, new_grams, new_share
from .rule import check_hparam


class Shampoo(MatrixOptimizer):
    """direction = L^-1/4 m R^-1/4 with the Frobenius norm of Adam's m / (sqrt(v) + eps).

    m, v, L and R are the means of G, G^2, G G^T and G^T G, corrected for their start from zero. The roots are taken
    anew in every step whose number, from 1, is a multiple of every; before the first of them the direction is Adam's.
    ||direction||_F <= 1.2 sqrt(M N) with the defaults. On a GPU roots wait for the device. State: 2 (M^2 + N^2 + M N)
    numbers a matrix.

    Args:
        lr: About the RMS change of a weight in a step; with hyperball the norm of a step relative to the weights'.
        momentum: Decay of the average of gradients, in [0, 1).
        nesterov: Whether the gradient is mixed into the average once more.
        aspect_scale: Whether tall updates are multiplied by sqrt(M/N).
        beta2: Decay of the averages of G^2, G G^T and G^T G, in [0, 1).
        eps: Added to the root of v; it is compared with gradients of the mean loss.
        gram_eps: Added to the eigenvalues of L and R; it is compared with squares of such gradients.
        every: Steps between new roots [steps].
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
        eps: float = 1e-15,
        gram_eps: float = 1e-24,
        every: int = 5,
        **matrix_hparams: Any,
    ):
        own: dict[str, Any] = dict(momentum=momentum, nesterov=nesterov, aspect_scale=aspect_scale)
        rule_hparams = dict(beta2=beta2, eps=eps, gram_eps=gram_eps, every=every)
        super().__init__(params, lr, rule_hparams=rule_hparams, **own, **matrix_hparams)

    def check_hparams(self, group: dict[str, Any]) -> None:
        super().check_hparams(group)
        check_hparam(0 <= group["beta2"] < 1, "beta2", "in [0, 1)", group)
        check_hparam(group["eps"] > 0, "eps", "positive", group)
        check_hparam(group["gram_eps"] > 0, "gram_eps", "positive", group)
        check_hparam(group["every"] >= 1, "every", "at least 1", group)

    def new_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        roots = {f"{key}_root": value for key, value in new_grams(p).items()}
        squares = torch.zeros_like(p, dtype=torch.float32)
        return {**super().new_state(p, group), **new_share(p), **new_grams(p), **roots, "squares": squares}

    def direction(
        self, X_KMN: Tensor, states: list[dict[str, Any]], group: dict[str, Any], *, G_KMN: Tensor, step: Tensor
    ) -> Tensor:
        left, right, squares = (gathered(states, key) for key in ("left", "right", "squares"))
        for mean, new in zip((left, right, squares), (*grams(G_KMN), G_KMN.square()), strict=True):
            mean.lerp_(new, 1 - group["beta2"])
        keep(states, left=left, right=right, squares=squares)
        correction = 1 - group["beta2"] ** (step + 1)
        m_KMN = corrected(X_KMN, states, group)
        adam_KMN = m_KMN / ((squares / correction).sqrt() + group["eps"])
        if step + 1 < group["every"]:
            return adam_KMN
        if (step + 1) % group["every"] == 0:
            roots = (inverse_fourth_root(gram / correction, group["gram_eps"]) for gram in (left, right))
            keep(states, **dict(zip(("left_root", "right_root"), roots, strict=True)))
        O_KMN = gathered(states, "left_root") @ m_KMN @ gathered(states, "right_root")
        norm_K11, adam_norm_K11 = (
            torch.linalg.vector_norm(V_KMN, dim=(-2, -1), keepdim=True) for V_KMN in (O_KMN, adam_KMN)
        )
        return O_KMN * (adam_norm_K11 / norm_K11.clamp(min=torch.finfo(torch.float32).tiny))


def inverse_fourth_root(C_KNN: Tensor, eps: float) -> Tensor:
    """Of symmetric matrices, their eigenvalues shifted to be at least eps."""
    eigenvalues, Q_KNN = torch.linalg.eigh(C_KNN.nan_to_num(0, 0, 0))
    shifted = eigenvalues - eigenvalues[..., :1].clamp(max=0) + eps
    return (Q_KNN * shifted[..., None, :] ** -0.25) @ Q_KNN.mT
