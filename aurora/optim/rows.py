"""Row norms of stacks of matrices, and the factors that make them even."""

import torch
from torch import Tensor

# A zero row has no direction: its row of the polar factor is zero too, and its weight is left as it is.
MIN_ROW_NORM = 1e-7


def row_norms(X_KMN: Tensor) -> Tensor:
    """(K, M, 1) float32."""
    if X_KMN.is_cuda:
        return torch.linalg.vector_norm(X_KMN, dim=-1, keepdim=True, dtype=torch.float32)
    # On a CPU ten times as fast where X is the transpose of a wide matrix.
    squares = X_KMN.square() if X_KMN.dtype == torch.float32 else X_KMN.float().square_()
    return squares.sum(dim=-1, keepdim=True).sqrt()


def evening_factors(U_KMN: Tensor, max_scale_error: float = 0.0) -> Tensor:
    """Factors that give the rows of almost orthogonal matrices, M >= N, one norm; a zero row gets 1.

    That norm is sqrt(N/M), M without the zero rows, as far as max_scale_error lets it. If the root mean square of the
    rows is further off than that, the reason is not the error of the polar factor but a rank below N. Scaling up would
    then stretch what directions there are.

    Args:
        U_KMN: the matrices.
        max_scale_error: the relative error that singular values may have.

    Returns:
        (K, M, 1) float32.
    """
    norm_KM1 = row_norms(U_KMN)
    is_zero_KM1 = norm_KM1 <= MIN_ROW_NORM
    num_rows_K11 = (~is_zero_KM1).sum(dim=-2, keepdim=True).clamp(min=1)
    total_K11 = torch.linalg.vector_norm(norm_KM1, dim=-2, keepdim=True).clamp(min=MIN_ROW_NORM)
    if max_scale_error:
        full_rank_K11 = num_rows_K11.clamp(max=U_KMN.size(-1))
        total_K11 = total_K11 * (full_rank_K11.sqrt() / total_K11).clamp(1 - max_scale_error, 1 + max_scale_error)
    return torch.where(is_zero_KM1, 1.0, total_K11 / num_rows_K11.sqrt() / norm_KM1)
