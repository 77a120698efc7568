"""PMuon: Muon between powers of the gradients' row and column covariances; result 18 of the public benchmark.

https://github.com/KellerJordan/modded-nanogpt/tree/master/records/track_3_optimization/results/20260507_pmuon
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .base import MatrixOptimizer
from .kronecker import gathered, grams, keep, new_grams, power_step
from .rule import check_hparam


class PMuon(MatrixOptimizer):
    """direction = polar(A^-power X C^-power), A and C the decaying sums of X X^T and X^T X, looked ahead.

        left <- beta2 left + X X^T,  A = X X^T + beta2 left + eps I
        P <- qr(A P);  A^-power = P diag(P^T A P)^-power P^T                    and so on the right, with X^T X

    This is the published code, which overwrites G by X before; its text has the covariances of G. The bases P start
    from I; there they are drawn. The bounds of the direction and the meaning of lr are
    Muon's. State: 2 (M^2 + N^2) + M N numbers a matrix.

    Args:
        power: Exponent of the covariances, at least 0; 0 is Muon.
        beta2: Decay of their sums, in [0, 1).
        eps: Least eigenvalue that counts; it is compared with squares of gradients of the mean loss.
        Others: see MatrixOptimizer.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        power: float = 0.3,
        beta2: float = 0.95,
        eps: float = 1e-18,
        **matrix_hparams: Any,
    ):
        super().__init__(params, lr, rule_hparams=dict(power=power, beta2=beta2, eps=eps), **matrix_hparams)

    def check_hparams(self, group: dict[str, Any]) -> None:
        super().check_hparams(group)
        check_hparam(group["power"] >= 0, "power", "at least 0", group)
        check_hparam(0 <= group["beta2"] < 1, "beta2", "in [0, 1)", group)
        check_hparam(group["eps"] > 0, "eps", "positive", group)

    def new_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        bases = {f"{key}_basis": torch.zeros_like(value) for key, value in new_grams(p).items()}
        for basis in bases.values():
            basis.fill_diagonal_(1)
        return {**super().new_state(p, group), **new_grams(p), **bases}

    def direction(self, X_KMN: Tensor, states: list[dict[str, Any]], group: dict[str, Any]) -> Tensor:
        powers = []
        for side, new in zip(("left", "right"), grams(X_KMN), strict=True):
            total = group["beta2"] * gathered(states, side) + new
            seen = new + group["beta2"] * total
            seen.diagonal(dim1=-2, dim2=-1).add_(group["eps"])
            basis = power_step(seen, gathered(states, f"{side}_basis"))
            eigenvalues = (basis * (seen @ basis)).sum(dim=-2, keepdim=True).clamp(min=group["eps"])
            # Of one size whatever the gradients', as polar() takes no matrix that is too small or too large.
            scaled = (eigenvalues / eigenvalues.amax(dim=-1, keepdim=True)) ** -group["power"]
            powers.append((basis * scaled) @ basis.mT)
            keep(states, **{side: total, f"{side}_basis": basis})
        return self.polar(powers[0] @ X_KMN @ powers[1], group, overwrite=True)
