"""NorMuon (Li et al. 2025, https://arxiv.org/abs/2510.05491)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .base import MatrixOptimizer
from .rows import row_norms
from .rule import check_hparam

AXES = ("rows", "long")


class NorMuon(MatrixOptimizer):
    """Muon with every row divided by its running RMS, regrafted to the norm of the polar factor.

        O   = polar(X)
        v_i <- beta2 v_i + (1 - beta2) mean_j O_ij^2
        O'  = O / (sqrt(v) + eps), rescaled so that ||O'||_F = ||O||_F

    ||direction||_F <= s sqrt(min(M, N)), s the largest singular value that polar() states. A single row may have all
    of that: the first after many steps without. lr as for Muon, in the mean over directions.

    Args:
        beta2: Decay of the average of each row's mean square, in [0, 1).
        axis: Whose mean squares count: rows, as published, or long: of a wide matrix the columns', as in the public
            benchmark's results 8 to 10.
        eps: Added to the root of that average; it guards rows that never moved.
        Others: see MatrixOptimizer.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        beta2: float = 0.95,
        eps: float = 1e-10,
        axis: str = "rows",
        **matrix_hparams: Any,
    ):
        super().__init__(params, lr, rule_hparams=dict(beta2=beta2, eps=eps, axis=axis), **matrix_hparams)

    def check_hparams(self, group: dict[str, Any]) -> None:
        super().check_hparams(group)
        check_hparam(0 <= group["beta2"] < 1, "beta2", "in [0, 1)", group)
        check_hparam(group["eps"] > 0, "eps", "positive", group)
        check_hparam(group["axis"] in AXES, "axis", f"one of {', '.join(AXES)}", group)

    def new_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        rows = max(p.shape) if group["axis"] == "long" else p.size(0)
        row_second_moment = torch.zeros((rows, 1), dtype=torch.float32, device=p.device)
        return {**super().new_state(p, group), "row_second_moment": row_second_moment}

    def direction(self, X_KMN: Tensor, states: list[dict[str, Any]], group: dict[str, Any]) -> Tensor:
        is_turned = group["axis"] == "long" and X_KMN.size(-2) < X_KMN.size(-1)
        O_KMN = self.polar(X_KMN, group, overwrite=True)
        del X_KMN
        O_KMN = O_KMN.mT if is_turned else O_KMN
        norm_KM1 = row_norms(O_KMN)
        moments = [state["row_second_moment"] for state in states]
        torch._foreach_lerp_(moments, list((norm_KM1.square() / O_KMN.size(-1)).unbind()), 1 - group["beta2"])

        scale_KM1 = 1 / (torch.stack(moments).sqrt() + group["eps"])
        norm_K11, normalised_norm_K11 = (
            torch.linalg.vector_norm(norms, dim=-2, keepdim=True) for norms in (norm_KM1, norm_KM1 * scale_KM1)
        )
        # A zero matrix stays zero: 0 * (0 / tiny).
        O_KMN = scale_KM1 * (norm_K11 / normalised_norm_K11.clamp(min=torch.finfo(torch.float32).tiny)) * O_KMN
        return O_KMN.mT if is_turned else O_KMN
