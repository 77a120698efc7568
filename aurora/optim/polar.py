"""Polar factors: for X = U S V^T (thin SVD), polar(X) = U V^T, by odd matrix polynomials.

Each step maps every singular value s to a s + b s^3 + c s^5 and leaves U and V alone, so a schedule is a list of
(a, b, c). All rules share this one function; the record names the schedule and prints its numbers.
"""

import functools
import math
import time
from collections.abc import Callable, Sequence
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
        max_singular_value: largest s after the last step over all of [0, 1]; recomputed likewise.
        source: where the numbers come from.
        bfloat16_singles: how many of the first steps bfloat16 takes one at a time, see _apply().
    """

    name: str
    coefficients: tuple[tuple[float, float, float], ...]
    norm_margin: float
    max_error: float
    max_singular_value: float
    min_singular_value: float
    source: str
    bfloat16_singles: int = 0


SCHEDULES = {
    schedule.name: schedule
    for schedule in (
        PolarSchedule(
            name="ns5_jordan",
            coefficients=((3.4445, -4.7750, 2.0315),) * 5,
            norm_margin=1.0,
            max_error=0.3182,
            max_singular_value=1.2024,
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
            max_singular_value=1.1412,
            min_singular_value=1e-3,
            source="https://arxiv.org/abs/2505.16932, five steps with safety 0.02 and cushion 2, as in "
            "https://github.com/KellerJordan/modded-nanogpt/blob/f411b3d/train_gpt.py",
            bfloat16_singles=3,
        ),
        PolarSchedule(
            name="quintic12",
            coefficients=((2.0, -1.5, 0.5),) * 12,
            norm_margin=1.0,
            max_error=5e-6,
            max_singular_value=1.0018,
            min_singular_value=1e-3,
            source="https://github.com/KellerJordan/modded-nanogpt/blob/f411b3d/records/track_3_optimization/"
            "train_gpt_simple.py",
        ),
        PolarSchedule(
            name="svd",
            coefficients=(),
            norm_margin=1.0,
            max_error=1e-12,
            max_singular_value=1.0,
            min_singular_value=1e-6,  # below lies the rounding of float32 input
            source="exact: torch.linalg.svd in float64",
        ),
    )
}


COMPUTE_DTYPES = ("auto", "float32", "bfloat16")
# "auto" takes bfloat16 on a CPU only where it wins by this much: less would let noise decide, see compute_dtype().
MIN_BFLOAT16_SPEEDUP = 1.2


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype in which the polynomials run; see polar() for what it does to the result.

    "auto" is bfloat16 on CUDA. CPUs differ: with hardware for it bfloat16 is two to five times as fast as float32,
    without it up to a hundred times slower. So the first call measures, once a process; it takes about 20 ms, 0.2 s on
    a CPU without. The outcome stands in a run's record; name a dtype where equal bytes on unlike CPUs matter more.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu":
        return _faster_cpu_dtype()
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@torch.compiler.assume_constant_result
def _faster_cpu_dtype() -> torch.dtype:
    return _measured_cpu_dtype()


@functools.cache
def _measured_cpu_dtype(size: int = 256, rounds: int = 5) -> torch.dtype:
    best_s = dict.fromkeys((torch.float32, torch.bfloat16), math.inf)
    for _ in range(rounds):
        for dtype in best_s:
            X_KNN = torch.ones(1, size, size, dtype=dtype, device="cpu")
            begin_s = time.perf_counter()
            torch.bmm(X_KNN, X_KNN.mT)
            best_s[dtype] = min(best_s[dtype], time.perf_counter() - begin_s)
    is_worth_it = best_s[torch.bfloat16] * MIN_BFLOAT16_SPEEDUP < best_s[torch.float32]
    return torch.bfloat16 if is_worth_it else torch.float32


def rounding(dtype: torch.dtype) -> float:
    """What rounding to dtype adds to the error of typical singular values; bfloat16's unit is 2^-7."""
    return 4 * torch.finfo(dtype).eps


# From this aspect ratio n/m on, two steps cost less on the Gram matrix: 4 n/m + 10 < 2 (4 n/m + 2).
MIN_GRAM_ASPECT = 1.5


# Newton's iteration for the polar factor, (15 s - 10 s^3 + 3 s^5) / 8: error e near 1 becomes -5/2 e^3.
REFINEMENT = (15 / 8, -10 / 8, 3 / 8)
# The odd polynomial of degree nine (coefficients of s, s^3, ..., s^9) closest to 1 on [0.35, 1.66], found by linear
# programming; tests/test_polar.py recomputes its error.
FINISH = (3.3072, -5.9616, 5.4791, -2.2070, 0.3181)
FINISH_ERROR = 0.072
# How much an interlude may let singular values grow: past 1.02 the third step of polar_express5 would explode.
INTERLUDE_GROWTH = 1.01


def polar(
    X_KMN: Tensor,
    schedule: PolarSchedule,
    dtype: torch.dtype = torch.float32,
    row_scale_KM1: Tensor | None = None,
    overwrite: bool = False,
    interlude: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Approximate polar factor of every matrix in the stack.

    Args:
        X_KMN: (K, M, N), any float dtype; not changed unless overwrite is true.
        schedule: one of SCHEDULES.
        dtype: dtype of the matmuls; the normalisation is always float32.
        row_scale_KM1: (K, M, 1) float32, for the polar factor of row_scale * X, whose Frobenius norm must then be 1.
        overwrite: whether X_KMN may be used as working memory.
        interlude: changes the almost orthogonal matrices ((K, M, N) in dtype) shortly before the end, and two steps
            before that; what follows makes them orthogonal again: further polar factors for almost nothing. It may let
            a singular value grow by INTERLUDE_GROWTH at most. After it come the last two steps of the schedule, or,
            where the schedule's own max_error is larger than FINISH_ERROR, FINISH instead of its last step.

    Returns:
        (K, M, N) in dtype (svd: in X's). Singular values s >= schedule.min_singular_value * ||X||_F come out within
        schedule.max_error of 1, all of them below schedule.max_singular_value (with an interlude 1 + FINISH_ERROR,
        where FINISH is), zero ones at 0: a zero matrix gives zeros, in float32 a rank-1 matrix u v^T. Rounding adds up
        to 2e-4 in float32 and 0.1 in bfloat16, FINISH 0.2 there. Singular values below 8 units of the rounding of dtype
        (in bfloat16 2^-4 of the largest) are noise and come out as such, anywhere below that bound. Scale does not
        matter between norms of 1e-19 and 1e19; NaN, Inf and larger norms give NaN.

    Cost: with m = min(M, N), n = max(M, N), (4 n/m + 2) m^3 FLOPs a step and matrix; from n = 1.5 m on
    (4 n/m + 10) m^3 for two steps, in bfloat16 after the schedule's bfloat16_singles. No host sync.
    """
    scale = row_scale_KM1
    if scale is None:
        norm_K11 = torch.linalg.vector_norm(X_KMN, dim=(-2, -1), keepdim=True, dtype=torch.float32)
        # A norm beyond float32 would scale the matrix to zero, which nobody would notice.
        scale = torch.where(norm_K11.isinf(), torch.nan, 1 / norm_K11.clamp(min=TINY_NORM))
    if not schedule.coefficients:
        X = _polar_svd(scale * X_KMN, schedule.min_singular_value)
        if interlude is not None:
            for _ in range(2):
                X = _polar_svd(interlude(X), schedule.min_singular_value)
        return X
    steps = schedule.coefficients
    num_singles = schedule.bfloat16_singles if dtype == torch.bfloat16 else 0
    # Calls within calls: a name would keep its stack alive, and large ones are most of a step's memory.
    if interlude is None:
        return _apply(_scaled(X_KMN, scale / schedule.norm_margin, dtype, overwrite), steps, num_singles)
    body = steps[:-1] if schedule.max_error > FINISH_ERROR else steps[:-2]
    begin, end = body[:-2], body[-2:]
    X = interlude(
        _apply(
            interlude(_apply(_scaled(X_KMN, scale / schedule.norm_margin, dtype, overwrite), begin, num_singles)),
            end,
            num_singles - len(begin),
        )
    )
    return _finish(X) if schedule.max_error > FINISH_ERROR else _apply(X, steps[-2:])


def is_turned(X: Tensor) -> bool:
    """Whether X lies in memory as its transpose; results of matmuls lie as they are, so these take the transpose."""
    return X.mT.is_contiguous() and not X.is_contiguous()


def _scaled(X: Tensor, scale: Tensor, dtype: torch.dtype, overwrite: bool) -> Tensor:
    if is_turned(X):
        return _scaled(X.mT, scale.mT, dtype, overwrite).mT
    out = X if overwrite and X.dtype == dtype else X.new_empty(X.shape, dtype=dtype)
    return torch.mul(X, scale, out=out)  # one pass


def _gram(X: Tensor) -> Tensor:
    """The Gram matrices of the short side."""
    X = X.mT if X.size(-2) > X.size(-1) else X
    return torch.bmm(X, X.mT)


def _apply(X: Tensor, steps: Sequence[tuple[float, float, float]], num_singles: int = 0) -> Tensor:
    """All steps, two at a time where that is cheaper, but for the first num_singles.

    In bfloat16 two steps at once err by some per cent where few rows or columns hold the large singular values: the
    product of their factors is rounded, and is large next to what the steps make of a large singular value. So not
    before a step that lacks the room. The first four of polar_express5 give singular values up to 2, and from 2.2 %
    beyond that the next ones let them explode: 64 x 2 matrices came out with 1e13, and so did one in a hundred of
    128 x 256 with four large rows. The other schedules have room for 5 % and more.
    """
    is_oblong = max(X.shape[-2:]) >= MIN_GRAM_ASPECT * min(X.shape[-2:])
    num_singles = min(max(num_singles, 0), len(steps)) if is_oblong else len(steps)
    end = num_singles + (len(steps) - num_singles) // 2 * 2
    for coefficients in steps[:num_singles]:
        X = quintic_step(X, coefficients)
    for first in range(num_singles, end, 2):
        X = _two_steps(X, *steps[first : first + 2])
    for coefficients in steps[end:]:
        X = quintic_step(X, coefficients)
    return X


def quintic_step(X: Tensor, coefficients: tuple[float, float, float]) -> Tensor:
    """a X + (b R + c R^2) X, with R the Gram matrix of X on its short side: one polynomial of a schedule."""
    if is_turned(X):
        return quintic_step(X.mT, coefficients).mT
    a, b, c = coefficients
    R = _gram(X)
    R = torch.baddbmm(R, R, R, beta=b, alpha=c)  # one name, so that the Gram matrix is freed
    return torch.baddbmm(X, X, R, beta=a) if X.size(-2) > X.size(-1) else torch.baddbmm(X, R, X, beta=a)


def _two_steps(X: Tensor, first: tuple[float, float, float], second: tuple[float, float, float]) -> Tensor:
    """quintic_step() twice, by way of small square matrices: the Gram matrix after a step with factor P is P R P.

    The idea of https://dao-lab.ai/blog/2026/gram-newton-schulz, which goes on so for up to three steps. After two the
    Gram matrix is taken anew, since in bfloat16 small singular values drown in its rounding: with three steps
    heavy-tailed spectra came out with singular values up to 2, with four far above.
    """
    return _times(X, _two_factors(_gram(X), first, second))


def _two_factors(R: Tensor, first: tuple[float, float, float], second: tuple[float, float, float]) -> Tensor:
    P = _factor(R, first)
    R = torch.bmm(torch.bmm(P, R), P)
    return torch.bmm(_factor(R, second), P)


def _factor(R: Tensor, coefficients: tuple[float, float, float]) -> Tensor:
    """a I + b R + c R^2, by which a step multiplies X."""
    a, b, c = coefficients
    return _add_to_diagonal(b * R, a).baddbmm_(R, R, alpha=c)


def _add_to_diagonal(R: Tensor, value: float) -> Tensor:
    """R + value I, in place."""
    R.diagonal(dim1=-2, dim2=-1).add_(value)
    return R


def _times(X: Tensor, factor: Tensor) -> Tensor:
    """factor times X, a polynomial of its Gram matrix on the short side; for a tall X on its transpose.

    Rounded, a product of polynomials is not quite symmetric, and the last one is to stand farthest from X.
    """
    if is_turned(X):
        return _times(X.mT, factor).mT
    return torch.bmm(X, factor.mT) if X.size(-2) > X.size(-1) else torch.bmm(factor, X)


def _finish(X: Tensor) -> Tensor:
    """The polynomial FINISH: X (c1 I + c3 R + R^2 (c5 I + c7 R + c9 R^2)) with R the Gram matrix of X."""
    return _times(X, _finishing_factor(_gram(X)))


def _finishing_factor(R: Tensor) -> Tensor:
    c1, c3, c5, c7, c9 = FINISH
    R_sq = torch.bmm(R, R)
    inner = _add_to_diagonal((c7 * R).add_(R_sq, alpha=c9), c5)
    return _add_to_diagonal(c3 * R, c1).baddbmm_(R_sq, inner)


def _polar_svd(X_KMN: Tensor, min_singular_value: float) -> Tensor:
    """Exact polar factor, by float64; directions with s <= min_singular_value * ||X||_F are dropped."""
    U, S, Vh = torch.linalg.svd(X_KMN.double(), full_matrices=False)
    norm_K1 = torch.linalg.vector_norm(S, dim=-1, keepdim=True)
    kept = (min_singular_value * norm_K1 < S).to(S.dtype)
    return ((U * kept.unsqueeze(-2)) @ Vh).to(X_KMN.dtype)
