"""DynMuon (https://arxiv.org/abs/2605.17109): Muon whose singular values follow a power that changes in training."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .base import MatrixOptimizer
from .polar import TINY_NORM
from .rule import check_hparam


class DynMuon(MatrixOptimizer):
    """direction ~ U S^p V^T for X / (1 - momentum) = U S V^T, by two terms of a series about S = I.

        Y = X / ||X||_F,  E = Y Y^T - I,  s = ||X||_F / (1 - momentum)
        direction = s^p (I + p/2 E + p/2 (p/2 - 1)/2 E^2) polar(X)                          E on the shorter side
        p = end_power + (start_power - end_power) / (1 + exp((t - turn_step) / turn_width)) after t steps

    p falls at turn_step, within a few turn_width. ||direction||_F <= 1.2 s^p sqrt(min(M, N)) for |p| <= 0.25, and the
    polar factor's bounds. Result 28 of the public benchmark, where t is a share of the run: 128 of 3200 steps.

    Args:
        start_power: p at first, in [-1, 1].
        end_power: p at last, in [-1, 1].
        turn_step: When p is halfway [steps].
        turn_width: How long the turn takes [steps].
        Others: see MatrixOptimizer.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        start_power: float = 0.25,
        end_power: float = -0.25,
        turn_step: float = 128.0,
        turn_width: float = 128.0,
        **matrix_hparams: Any,
    ):
        own = dict(start_power=start_power, end_power=end_power, turn_step=turn_step, turn_width=turn_width)
        super().__init__(params, lr, rule_hparams=own, **matrix_hparams)

    def check_hparams(self, group: dict[str, Any]) -> None:
        super().check_hparams(group)
        for key in ("start_power", "end_power"):
            check_hparam(-1 <= group[key] <= 1, key, "in [-1, 1]", group)
        check_hparam(group["turn_width"] > 0, "turn_width", "positive", group)

    def direction(self, X_KMN: Tensor, states: list[dict[str, Any]], group: dict[str, Any], *, step: Tensor) -> Tensor:
        turn = torch.sigmoid((group["turn_step"] - step) / group["turn_width"])
        power = group["end_power"] + (group["start_power"] - group["end_power"]) * turn
        is_tall = X_KMN.size(-2) > X_KMN.size(-1)
        Y_KMN = X_KMN.mT if is_tall else X_KMN
        norm_K11 = torch.linalg.vector_norm(Y_KMN, dim=(-2, -1), keepdim=True).clamp(min=TINY_NORM)
        Y_KMN = Y_KMN / norm_K11
        E_KMM = Y_KMN @ Y_KMN.mT
        E_KMM.diagonal(dim1=-2, dim2=-1).sub_(1)
        U_KMN = self.polar(Y_KMN, group, overwrite=True).float()
        EU_KMN = E_KMM @ U_KMN
        U_KMN = U_KMN + power / 2 * EU_KMN + power / 4 * (power / 2 - 1) * (E_KMM @ EU_KMN)
        U_KMN = U_KMN * (norm_K11 / (1 - group["momentum"])) ** power
        return U_KMN.mT if is_tall else U_KMN
