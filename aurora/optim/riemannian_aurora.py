"""Riemannian Aurora (Tilde Research 2026, https://arxiv.org/abs/2606.27715)."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .base import MatrixOptimizer
from .polar import REFINEMENT, quintic_step
from .rows import MIN_ROW_NORM, evening_factors
from .rule import check_hparam

TINY = 1e-30
# Where conjugate gradients in float32 end: the share of the residual that is left.
CG_TOLERANCE = 1e-5


class RiemannianAurora(MatrixOptimizer):
    """Gradient ascent of <X, U> over {U^T U = I, all rows of equal norm}: what Aurora approximates, at many times the
    price. A yardstick, not a rule to train with: on momentum of low rank its polar factors, one after the other, make
    directions of rounding noise.

    Tall (M > N), from U = polar(X), with X scaled to ||X||_F = sqrt(N), repeat ascent_steps times:

        Z = X - U S - diag(l) U         tangent: S symmetric and l in R^M such that U^T Z + Z^T U = 0 and <U_i, Z_i> = 0
        U <- U + ascent_lr Z            then retraction_steps times: rows to equal norm, U <- polar(U)

    l solves (diag(P o P 1) - P o P) l = q with P = U U^T and q_i = <U_i, X_i> - <U_i, (U sym(U^T X))_i>, a graph
    Laplacian, by cg_steps conjugate gradients. Wide: on the transpose. Square: polar(X). lr as for Muon,
    and so are the bounds of direction. On oblong matrices every polar factor is refined, see orthogonal().

    Differs from https://github.com/tilde-research/aurora-release (src/riemannian_aurora.py at 3d79a5c) in the scale of
    X, without which ascent_lr would depend on the size of the gradient, in the Laplacian's diagonal, there (N/M) I and
    regularised, and in having no host sync.

    Args:
        ascent_steps: Ascent steps, each with retraction_steps polar factors (in the authors' code outer_steps).
        ascent_lr: Length of an ascent step (in the authors' code riemannian_eta).
        cg_steps: Conjugate gradient steps for the multipliers l.
        retraction_steps: How often rows are scaled and the polar factor is taken after an ascent step.
        Others: see MatrixOptimizer.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        ascent_steps: int = 3,
        ascent_lr: float = 0.1,
        cg_steps: int = 20,
        retraction_steps: int = 2,
        **matrix_hparams: Any,
    ):
        rule_hparams = dict(
            ascent_steps=ascent_steps, ascent_lr=ascent_lr, cg_steps=cg_steps, retraction_steps=retraction_steps
        )
        super().__init__(params, lr, rule_hparams=rule_hparams, **matrix_hparams)

    def check_hparams(self, group: dict[str, Any]) -> None:
        super().check_hparams(group)
        for key in ("ascent_steps", "cg_steps", "retraction_steps"):
            check_hparam(group[key] >= 1, key, "at least 1", group)
        check_hparam(group["ascent_lr"] > 0, "ascent_lr", "positive", group)

    def direction(self, X_KMN: Tensor, states: list[dict[str, Any]], group: dict[str, Any]) -> Tensor:
        rows, columns = X_KMN.shape[-2:]
        if rows == columns:
            return self.polar(X_KMN, group)
        if rows < columns:
            return self._ascended(X_KMN.mT, group).mT
        return self._ascended(X_KMN, group)

    def _ascended(self, X_KMN: Tensor, group: dict[str, Any]) -> Tensor:
        U_KMN = self.orthogonal(X_KMN, group)
        norm_K11 = torch.linalg.vector_norm(X_KMN, dim=(-2, -1), keepdim=True)
        X_KMN = X_KMN * (math.sqrt(X_KMN.size(-1)) / norm_K11.clamp(min=TINY))
        for _ in range(group["ascent_steps"]):
            U_KMN = U_KMN + group["ascent_lr"] * tangent_projection(X_KMN, U_KMN, group["cg_steps"])
            for _ in range(group["retraction_steps"]):
                U_KMN = self.orthogonal(evening_factors(U_KMN) * U_KMN, group)
        return U_KMN

    def orthogonal(self, X_KMN: Tensor, group: dict[str, Any]) -> Tensor:
        """The polar factor in float32: by the group's schedule, then two steps that each make 5/2 e^3 of an error e.

        A schedule alone maps singular values that differ a little to ones that differ more, and seven polar factors in
        a row multiply that, so that rounding grows until runs on other numbers of ranks part.
        """
        U_KMN = self.polar(X_KMN, group).float()
        for _ in range(2):
            U_KMN = quintic_step(U_KMN, REFINEMENT)
        return U_KMN


def tangent_projection(X_KMN: Tensor, U_KMN: Tensor, cg_steps: int) -> Tensor:
    """X without the part that would turn U off {U^T U = I, fixed row norms}, to first order."""
    cross_KNN = torch.bmm(U_KMN.mT, X_KMN)
    cross_KNN = (cross_KNN + cross_KNN.mT) / 2
    gap_KM1 = (U_KMN * (X_KMN - torch.bmm(U_KMN, cross_KNN))).sum(dim=-1, keepdim=True)
    multipliers_KM1 = solve_multipliers(U_KMN, gap_KM1, cg_steps)
    weighted_KMN = multipliers_KM1 * U_KMN
    return X_KMN - torch.bmm(U_KMN, cross_KNN - torch.bmm(U_KMN.mT, weighted_KMN)) - weighted_KMN


def solve_multipliers(U_KMN: Tensor, gap_KM1: Tensor, cg_steps: int) -> Tensor:
    """The smallest solution of (diag(P o P 1) - P o P) l = gap with P = U U^T, by conjugate gradients.

    The Laplacian's null space, constants over the rows that are not zero and anything on those that are, is kept out.
    """

    def squared_gram_times(v_KM1: Tensor) -> Tensor:  # (P o P) v without the M x M matrix
        return (torch.bmm(U_KMN, torch.bmm(U_KMN.mT, v_KM1 * U_KMN)) * U_KMN).sum(dim=-1, keepdim=True)

    def dot(a_KM1: Tensor, b_KM1: Tensor) -> Tensor:
        return (a_KM1 * b_KM1).sum(dim=-2, keepdim=True)

    degree_KM1 = squared_gram_times(torch.ones_like(gap_KM1))
    is_live_KM1 = degree_KM1 > MIN_ROW_NORM**2
    num_live_K11 = is_live_KM1.sum(dim=-2, keepdim=True).clamp(min=1)
    residual = torch.where(is_live_KM1, gap_KM1 - gap_KM1.sum(dim=-2, keepdim=True) / num_live_K11, 0.0)
    solution, search, norm_sq = torch.zeros_like(residual), residual, dot(residual, residual)
    first_norm_sq = norm_sq
    for _ in range(cg_steps):
        product = degree_KM1 * search - squared_gram_times(search)
        curvature = dot(search, product)
        # Rounding would lead on into the null space, where the curvature is zero but for rounding.
        is_open = norm_sq > CG_TOLERANCE**2 * first_norm_sq
        is_open &= curvature > CG_TOLERANCE * dot(search, degree_KM1 * search)
        step = torch.where(is_open, norm_sq / curvature.clamp(min=TINY), 0.0)
        solution, residual = solution + step * search, residual - step * product
        previous, norm_sq = norm_sq, dot(residual, residual)
        search = residual + norm_sq / previous.clamp(min=TINY) * search
    return solution
