"""Aurora (Tilde Research 2026, https://arxiv.org/abs/2606.27715)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from aurora.base import MatrixOptimizer, check_hparam
from aurora.polar import TINY_NORM

# A zero row has no direction: its row of the polar factor is zero too, and its weight is left as it is.
MIN_ROW_SQ = 1e-14


class Aurora(MatrixOptimizer):
    """Steepest descent under U^T U = I and equal row norms: orthogonal updates in which no row starves.

    Tall (M > N), with D diagonal and D_i = 1 / ||X_i|| at first:

        repeat balance_steps times:   U = polar(D X);   D_i <- D_i ((N/M) / ||U_i||^2)^balance_power

    where the last D is not used. Wide: the same on the transpose. Square: polar(X), as Muon, since an orthogonal square
    matrix has uniform rows already. lr as for Muon.

    Args:
        balance_steps: polar factors a step; 2 is the paper's (there pp_iterations).
        balance_power: exponent of the row correction, in (0, 1]; 0.5 is the paper's (there pp_beta) and makes the
            iteration the fixed point of Tyler's M-estimator.
        Others: see MatrixOptimizer.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        balance_steps: int = 2,
        balance_power: float = 0.5,
        **matrix_hparams: Any,
    ):
        rule_hparams = dict(balance_steps=balance_steps, balance_power=balance_power)
        super().__init__(params, lr, rule_hparams=rule_hparams, **matrix_hparams)

    def check_hparams(self, group: dict[str, Any]) -> None:
        super().check_hparams(group)
        check_hparam(group["balance_steps"] >= 1, "balance_steps", "at least 1", group)
        check_hparam(0 < group["balance_power"] <= 1, "balance_power", "in (0, 1]", group)

    def direction(self, X_KMN: Tensor, states: list[dict[str, Any]], group: dict[str, Any]) -> Tensor:
        rows, columns = X_KMN.shape[-2:]
        if rows == columns:
            return self.polar(X_KMN, group)
        if rows < columns:
            return self._balanced_polar(X_KMN.mT, group).mT
        return self._balanced_polar(X_KMN, group)

    def _balanced_polar(self, X_KMN: Tensor, group: dict[str, Any]) -> Tensor:
        uniform_row_sq = X_KMN.size(-1) / X_KMN.size(-2)
        D_KM1 = 1 / torch.linalg.vector_norm(X_KMN, dim=-1, keepdim=True).clamp(min=TINY_NORM)
        U_KMN = self.polar(D_KM1 * X_KMN, group)
        for _ in range(group["balance_steps"] - 1):
            row_sq_KM1 = U_KMN.square().sum(dim=-1, keepdim=True)
            correction_KM1 = torch.where(row_sq_KM1 > MIN_ROW_SQ, uniform_row_sq / row_sq_KM1, 1.0)
            D_KM1 = D_KM1 * correction_KM1 ** group["balance_power"]
            U_KMN = self.polar(D_KM1 * X_KMN, group)
        return U_KMN
