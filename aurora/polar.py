"""Polar factors: for X = U S V^T (thin SVD), polar(X) = U V^T, by odd matrix polynomials.

Each step maps every singular value s to a s + b s^3 + c s^5 and leaves U and V alone, so a schedule is a list of
(a, b, c). All rules share this one function; the record names the schedule and prints its numbers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Below this Frobenius norm a matrix counts as zero: its polar factor fades to zero instead of dividing by nothing.
TINY_NORM = 1e-20


@dataclass(frozen=True)
class PolarSchedule:
    """A named list of quintic steps.

    Attributes:
        coefficients: one (a, b, c) a step; empty means an exact float64 SVD (the test oracle).
        norm_margin: the input is divided by norm_margin * its Frobenius norm, so that its singular values stay inside
            the interval for which the polynomials were made.
        max_error: largest |s - 1| after the last step, over singular values in [min_singular_value, 1] of the
            normalised input. Recomputed from the coefficients by tests/test_polar.py.
        source: where the numbers come from.
    """

    name: str
    coefficients: tuple[tuple[float, float, float], ...]
    norm_margin: float
    max_error: float
    min_singular_value: float
    source: str


SCHEDULES = {
    schedule.name: schedule
    for schedule in (
        PolarSchedule(
            name="ns5_jordan",
            coefficients=((3.4445, -4.7750, 2.0315),) * 5,
            norm_margin=1.0,
            max_error=0.3182,
            min_singular_value=2e-3,
            source="https://kellerjordan.github.io/posts/muon/",
        ),
        PolarSchedule(
            name="polar_express5",
            coefficients=(
                (8.156554524902461, -22.48329292557795, 15.878769915207462),
                (4.042929935166739, -2.808917465908714, 0.5000178451051316),
                (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
                (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
                (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
            ),
            norm_margin=1.02,
            max_error=0.1534,
            min_singular_value=1e-3,
            source="https://arxiv.org/abs/2505.16932, five steps with safety 0.02 and cushion 2, as in "
            "https://github.com/KellerJordan/modded-nanogpt/blob/f411b3d/train_gpt.py",
        ),
        PolarSchedule(
            name="quintic12",
            coefficients=((2.0, -1.5, 0.5),) * 12,
            norm_margin=1.0,
            max_error=5e-6,
            min_singular_value=1e-3,
            source="https://github.com/KellerJordan/modded-nanogpt/blob/f411b3d/records/track_3_optimization/"
            "train_gpt_simple.py",
        ),
        PolarSchedule(
            name="svd",
            coefficients=(),
            norm_margin=1.0,
            max_error=1e-12,
            min_singular_value=1e-6,  # below lies the rounding of float32 input
            source="exact: torch.linalg.svd in float64",
        ),
    )
}


COMPUTE_DTYPES = ("auto", "float32", "bfloat16")


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype in which the polynomials run. "auto" is bfloat16 on CUDA and float32 elsewhere.

    CPUs differ a hundredfold in bfloat16 matmul speed, and a dtype chosen by a stopwatch would make equal seeds give
    unequal bytes; so float32 is the rule there and bfloat16 must be asked for.
    """
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def polar(X_KMN: Tensor, schedule: PolarSchedule, dtype: torch.dtype = torch.float32) -> Tensor:
    """Approximate polar factor of every matrix in the stack.

    Args:
        X_KMN: (K, M, N), any float dtype; not changed.
        schedule: one of SCHEDULES.
        dtype: dtype of the matmuls; the normalisation is always float32.

    Returns:
        (K, M, N) float32. Singular values s >= schedule.min_singular_value * ||X||_F come out within
        schedule.max_error of 1, smaller ones below 1, zero ones at 0: a zero matrix gives zeros, a rank-1 matrix
        u v^T. Rounding adds up to 1e-4 in float32 and 0.1 in bfloat16. Scale does not matter down to
        ||X||_F = 1e-19. NaN and Inf give NaN.

    Cost: with m = min(M, N), n = max(M, N), (4 n/m + 2) m^3 FLOPs a step and matrix. No host sync.
    """
    if not schedule.coefficients:
        return _polar_svd(X_KMN, schedule.min_singular_value)
    is_tall = X_KMN.size(-2) > X_KMN.size(-1)
    # The Gram matrix is taken on the short side: always work on wide matrices.
    X = (X_KMN.mT if is_tall else X_KMN).float()
    norm_K11 = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True)
    X = (X / (schedule.norm_margin * norm_K11).clamp(min=TINY_NORM)).to(dtype).contiguous()
    for a, b, c in schedule.coefficients:
        gram = torch.bmm(X, X.mT)
        quartic = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        X = torch.baddbmm(X, quartic, X, beta=a)
    X = X.float()
    return X.mT if is_tall else X


def _polar_svd(X_KMN: Tensor, min_singular_value: float) -> Tensor:
    """Exact polar factor in float64; directions with s <= min_singular_value * ||X||_F are dropped."""
    U, S, Vh = torch.linalg.svd(X_KMN.double(), full_matrices=False)
    norm_K1 = torch.linalg.vector_norm(S, dim=-1, keepdim=True)
    kept = (min_singular_value * norm_K1 < S).to(S.dtype)
    return ((U * kept.unsqueeze(-2)) @ Vh).to(X_KMN.dtype if X_KMN.dtype == torch.float64 else torch.float32)
