"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/)."""

from typing import Any

from torch import Tensor

from .base import MatrixOptimizer


class Muon(MatrixOptimizer):
    """direction = polar(X): steepest descent under the spectral norm.

    ||direction||_F <= s sqrt(min(M, N)) and ||direction_i|| <= s, s the largest singular value that polar() states.

    lr is the spectral norm of a step, times sqrt(M/N) on tall matrices. Arguments: see MatrixOptimizer.
    """

    def direction(self, X_KMN: Tensor, states: list[dict[str, Any]], group: dict[str, Any]) -> Tensor:
        return self.polar(X_KMN, group, overwrite=True)
