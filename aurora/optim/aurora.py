"""Aurora (Tilde Research 2026, https://arxiv.org/abs/2606.27715)."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .base import MatrixOptimizer
from .polar import INTERLUDE_GROWTH, REFINEMENT, SCHEDULES, TINY_NORM, quintic_step, rounding
from .rows import MIN_ROW_NORM, evening_factors, row_norms
from .rule import check_hparam

VARIANTS = ("folded", "warm", "refined", "iterated")
BALANCES = ("both", "tall")

# Bounds of the remembered row weights. A row that alone spans a direction can never be balanced; without bounds its
# weight would fall towards zero, and stay there long after the row has found company.
ROW_WEIGHT_RANGE = (1 / 64, 64.0)

# The most by which a row may grow before the last polynomial, which explodes beyond its range. Inside the polar factor
# all rows shrink by it first, so that singular values hardly grow.
HEADROOM = 1.3


class Aurora(MatrixOptimizer):
    """Steepest descent under U^T U = I and equal row norms: orthogonal updates in which no row starves.

    Tall (M > N). Row weights D are sought such that the rows of U = polar(D X) have equal norms, by the iteration
    D_i <- D_i (r / ||U_i||)^(2 balance_power) with r = sqrt(N/M); with balance_power 0.5 its fixed point is Tyler's
    M-estimator. Wide: the same on the transpose; with balance = "tall" polar(X), as Muon. Square: polar(X), as Muon,
    since an orthogonal square matrix has uniform rows already.

        iterated    D_i = 1 / ||X_i|| anew in every step, then balance_steps polar factors with the iteration in
                    between: the published rule. It leaves rows a few per cent uneven.
        warm        One polar factor. D_i = w_i / ||X_i||, where w (row_weight in the state) does one iteration a step,
                    as it drifts slowly; then rows are scaled: U_i <- r U_i / ||U_i||. That costs some orthogonality.
        refined     warm, then one more quintic polynomial, which gives the orthogonality back, and rows scaled again.
        folded      warm, but rows are also balanced, by up to HEADROOM, twice within the polar factor: early, for
                    gradients that w has not seen the like of, and before its end, which then is a polynomial that
                    suits what the balance leaves. Costs what warm costs.

    ||direction||_F <= s sqrt(min(M, N)), s the largest singular value that polar() states. Balanced rows have at most
    norm s r, those of the iterated variant and of matrices without balance s. Both norms of the refined variant may be
    1.4 times as large, since its last polynomial lets singular values grow that are far above 1.

    M leaves out zero rows. Where the rank is low rows stay below r, see evening_factors(). lr as for Muon.

    Args:
        variant: How the row weights are found: folded, warm, refined or iterated.
        balance_steps: Polar factors a step of the iterated variant; 2 is the paper's (there pp_iterations).
        balance_power: Exponent of the row correction, in (0, 1]; 0.5 is the paper's (there pp_beta).
        balance: Which matrices are balanced: both (tall and wide) or tall; wide ones then get polar(X), as from Muon.
        Others: see MatrixOptimizer.
    """

    optional_state = ("row_weight",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        variant: str = "folded",
        balance_steps: int = 2,
        balance_power: float = 0.5,
        balance: str = "both",
        **matrix_hparams: Any,
    ):
        rule_hparams = dict(variant=variant, balance_steps=balance_steps, balance_power=balance_power, balance=balance)
        super().__init__(params, lr, rule_hparams=rule_hparams, **matrix_hparams)

    def check_hparams(self, group: dict[str, Any]) -> None:
        super().check_hparams(group)
        check_hparam(group["variant"] in VARIANTS, "variant", f"one of {', '.join(VARIANTS)}", group)
        check_hparam(group["balance_steps"] >= 1, "balance_steps", "at least 1", group)
        check_hparam(0 < group["balance_power"] <= 1, "balance_power", "in (0, 1]", group)
        check_hparam(group["balance"] in BALANCES, "balance", f"one of {', '.join(BALANCES)}", group)

    def new_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        row_state = new_row_state(p) if remembers_rows(p, group) else {}
        return {**super().new_state(p, group), **row_state}

    def direction(self, X_KMN: Tensor, states: list[dict[str, Any]], group: dict[str, Any]) -> Tensor:
        # variant and balance may have been changed since the state was made.
        for state in states:
            if not remembers_rows(X_KMN[0], group):
                state.pop("row_weight", None)
            elif "row_weight" not in state:
                state.update(new_row_state(X_KMN[0]))

        if not is_balanced(X_KMN[0], group):
            return self.polar(X_KMN, group, overwrite=True)
        is_wide = X_KMN.size(-2) < X_KMN.size(-1)
        X_KMN = X_KMN.mT if is_wide else X_KMN
        if group["variant"] == "iterated":
            U_KMN = self._iterated(X_KMN, group)
            return U_KMN.mT if is_wide else U_KMN
        weights = [state["row_weight"] for state in states]
        weight_KM1 = torch.stack(weights)
        max_scale_error = SCHEDULES[group["polar_schedule"]].max_error + rounding(self.polar_dtype(X_KMN, group))
        corrections = []

        def correction(V_KMN: Tensor, max_growth: float = math.inf, max_scale_error: float = 0.0) -> Tensor:
            corrections.append(evening_factors(V_KMN, max_scale_error).clamp(max=max_growth))
            return corrections[-1]

        def fold(V_KMN: Tensor) -> Tensor:
            return (correction(V_KMN, HEADROOM * INTERLUDE_GROWTH) / HEADROOM).to(V_KMN.dtype) * V_KMN

        U_KMN = self._polar_of_rows(X_KMN, weight_KM1, group, fold if group["variant"] == "folded" else None)
        del X_KMN
        if group["variant"] == "refined":
            U_KMN = quintic_step(correction(U_KMN, HEADROOM).to(U_KMN.dtype) * U_KMN, REFINEMENT)
        U_KMN = correction(U_KMN, max_scale_error=max_scale_error) * U_KMN

        new_KM1 = weight_KM1 * math.prod(corrections) ** (2 * group["balance_power"])
        new_KM1 = (new_KM1 / new_KM1.log().mean(dim=-2, keepdim=True).exp()).clamp(*ROW_WEIGHT_RANGE)
        torch._foreach_copy_(weights, list(new_KM1.unbind()))
        return U_KMN.mT if is_wide else U_KMN

    def _iterated(self, X_KMN: Tensor, group: dict[str, Any]) -> Tensor:
        weight_KM1 = torch.ones_like(X_KMN[..., :1])
        U_KMN = self._polar_of_rows(X_KMN, weight_KM1, group)
        for _ in range(group["balance_steps"] - 1):
            weight_KM1 = weight_KM1 * evening_factors(U_KMN) ** (2 * group["balance_power"])
            del U_KMN  # before there is the next
            U_KMN = self._polar_of_rows(X_KMN, weight_KM1, group)
        return U_KMN

    def _polar_of_rows(
        self,
        X_KMN: Tensor,
        weight_KM1: Tensor,
        group: dict[str, Any],
        interlude: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """polar(D X) with D_i = weight_i / ||X_i||."""
        norm_KM1 = row_norms(X_KMN)
        scale_KM1 = weight_KM1 / norm_KM1.clamp(min=TINY_NORM)
        total_K11 = torch.linalg.vector_norm(scale_KM1 * norm_KM1, dim=-2, keepdim=True)
        scale_KM1 = scale_KM1 / total_K11.clamp(min=MIN_ROW_NORM)
        is_last = group["variant"] != "iterated"
        return self.polar(X_KMN, group, row_scale_KM1=scale_KM1, interlude=interlude, overwrite=is_last)


def is_balanced(X_MN: Tensor, group: dict[str, Any]) -> bool:
    """Whether the rows of a matrix of this shape (of a wide one, its columns) are to be made even."""
    rows, columns = X_MN.shape
    return rows > columns or (rows < columns and group["balance"] == "both")


def remembers_rows(X_MN: Tensor, group: dict[str, Any]) -> bool:
    """Whether row weights go on from step to step."""
    return is_balanced(X_MN, group) and group["variant"] != "iterated"


def new_row_state(X_MN: Tensor) -> dict[str, Tensor]:
    """The row weights before the first step: (max(M, N), 1) float32."""
    return {"row_weight": torch.ones((max(X_MN.shape), 1), dtype=torch.float32, device=X_MN.device)}
