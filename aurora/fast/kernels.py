"""Triton kernels behind aurora/fast/hopper.py, which says what each computes.

Compilers have no matmul that ends in a squared ReLU, and make several kernels of the norm and rotation of queries and
keys, with float32 between them. Rows (tokens) count in multiples of SUM_ROWS. Offsets are 64 bits wide.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .hopper import EPS, SUM_ROWS

DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def in_blocks(rows: int, size: int) -> int:
    """How many blocks of so many rows there are."""
    assert rows % SUM_ROWS == 0, f"{rows} rows are no multiple of {SUM_ROWS}"
    return rows // size


# ---- matmuls of the squared-ReLU MLP ----

# Rows and columns of a tile of the output, and how much of the inner dimension is loaded at once: so that two programs
# share a multiprocessor, and one multiplies while the other finishes its tile.
TILE_M, TILE_N, TILE_K = SUM_ROWS, 128, 64
BAND = 8  # tiles below each other that are worked off side by side, for what they share in the cache


@triton.jit
def corner(M, N, TILE_M: tl.constexpr, TILE_N: tl.constexpr, BAND: tl.constexpr):
    """First row and column of this program's tile: down a band of rows, then on to the next column of it."""
    tile, tiles_in_band = tl.program_id(0), BAND * (N // TILE_N)
    first = tile // tiles_in_band * BAND
    rows = min(M // TILE_M - first, BAND)
    return (first + tile % tiles_in_band % rows) * TILE_M, tile % tiles_in_band // rows * TILE_N


@triton.jit
def up_kernel(
    x, weight, bias, y, M, N, K,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, BAND: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    m, n = corner(M, N, TILE_M, TILE_N, BAND)
    product = tl.zeros((TILE_M, TILE_N), tl.float32)
    for k in range(0, K, TILE_K):
        product = tl.dot(x.load([m, k]), weight.load([n, k]).T, product)
    product += tl.load(bias + n + tl.arange(0, TILE_N)).to(tl.float32)[None, :]
    root = tl.where(product < 0, 0.0, product)  # keeps a NaN, which a maximum would not
    y.store([m, n], (root * root).to(DTYPE))


@triton.jit
def up_gradient_kernel(
    grad, weight, y, out, sums, M, N, K,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, BAND: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    m, n = corner(M, N, TILE_M, TILE_N, BAND)
    product = tl.zeros((TILE_M, TILE_N), tl.float32)
    for k in range(0, K, TILE_K):
        product = tl.dot(grad.load([m, k]), weight.load([k, n]), product)
    product *= 2 * tl.sqrt(y.load([m, n]).to(tl.float32))
    out.store([m, n], product.to(DTYPE))
    tl.store(sums + m // TILE_M * N + n + tl.arange(0, TILE_N), tl.sum(product, 0))


def matmul_options(M: int, N: int, dtype: torch.dtype) -> tuple[tuple[int], dict]:
    tile = dict(TILE_M=TILE_M, TILE_N=TILE_N, TILE_K=TILE_K, BAND=BAND)
    return (in_blocks(M, TILE_M) * (N // TILE_N),), dict(DTYPE=DTYPES[dtype], num_warps=4, num_stages=3, **tile)


def up_relu_squared(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor) -> Tensor:
    (M, K), N, tiles = x_MK.shape, weight_NK.size(0), TensorDescriptor.from_tensor
    y_MN = x_MK.new_empty(M, N)
    programs, options = matmul_options(M, N, x_MK.dtype)
    inputs = tiles(x_MK, [TILE_M, TILE_K]), tiles(weight_NK, [TILE_N, TILE_K]), bias_N
    up_kernel[programs](*inputs, tiles(y_MN, [TILE_M, TILE_N]), M, N, K, **options)
    return y_MN


def up_gradient(grad_MK: Tensor, weight_KN: Tensor, y_MN: Tensor) -> tuple[Tensor, Tensor]:
    (M, K), N, tiles = grad_MK.shape, weight_KN.size(1), TensorDescriptor.from_tensor
    out_MN, sums = torch.empty_like(y_MN), y_MN.new_empty(M // SUM_ROWS, N, dtype=torch.float32)
    programs, options = matmul_options(M, N, grad_MK.dtype)
    inputs = tiles(grad_MK, [TILE_M, TILE_K]), tiles(weight_KN, [TILE_K, TILE_N]), tiles(y_MN, [TILE_M, TILE_N])
    up_gradient_kernel[programs](*inputs, tiles(out_MN, [TILE_M, TILE_N]), sums, M, N, K, **options)
    return out_MN, sums


# ---- norm and rotation of queries and keys ----

HEAD_ROWS = 32  # rows of one head at a time


@triton.jit
def half_of_head(rows, width, first, HALF: tl.constexpr):
    """Offsets of half a head's dimensions, from `first` of `width` on, for a column of rows."""
    return rows.to(tl.int64) * width + first + tl.arange(0, HALF)[None, :]


@triton.jit
def rotated_norm_kernel(
    qkv, bias, cos, sin, y, rstd, M, T, EPS, H: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, DTYPE: tl.constexpr
):
    head = tl.program_id(0) % (3 * H)
    rows = tl.program_id(0) // (3 * H) * ROWS + tl.arange(0, ROWS)[:, None]
    source = qkv + half_of_head(rows, 3 * H * K, head * K, K // 2)
    bias_of_head = bias + head * K + tl.arange(0, K // 2)[None, :]
    left = tl.load(source).to(tl.float32) + tl.load(bias_of_head).to(tl.float32)
    right = tl.load(source + K // 2).to(tl.float32) + tl.load(bias_of_head + K // 2).to(tl.float32)
    if head < 2 * H:
        scale = tl.rsqrt((tl.sum(left * left, 1) + tl.sum(right * right, 1)) / K + EPS)[:, None]
        tl.store(rstd + rows.to(tl.int64) * (2 * H) + head, scale)
        left, right = left * scale, right * scale
        angles = half_of_head(rows % T, K, 0, K // 2)
        c, s = tl.load(cos + angles), tl.load(sin + angles)
        left, right = left * c + right * s, right * c - left * s
    target = y + head // H * M.to(tl.int64) * H * K + half_of_head(rows, H * K, head % H * K, K // 2)
    tl.store(target, left.to(DTYPE))
    tl.store(target + K // 2, right.to(DTYPE))


@triton.jit
def rotated_norm_gradient_kernel(
    dq, dk, dv, y, rstd, cos, sin, out, sums, M, T,
    H: tl.constexpr, K: tl.constexpr, SUM_ROWS: tl.constexpr, ROWS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    head, block = tl.program_id(0) % (3 * H), tl.program_id(0) // (3 * H)
    left_sum, right_sum = tl.zeros((ROWS, K // 2), tl.float32), tl.zeros((ROWS, K // 2), tl.float32)
    for first in range(0, SUM_ROWS, ROWS):
        rows = block * SUM_ROWS + first + tl.arange(0, ROWS)[:, None]
        source = half_of_head(rows, H * K, head % H * K, K // 2)
        if head < 2 * H:
            if head < H:
                left, right = tl.load(dq + source).to(tl.float32), tl.load(dq + source + K // 2).to(tl.float32)
            else:
                left, right = tl.load(dk + source).to(tl.float32), tl.load(dk + source + K // 2).to(tl.float32)
            y_of_head = y + head // H * M.to(tl.int64) * H * K + source
            y_left, y_right = tl.load(y_of_head).to(tl.float32), tl.load(y_of_head + K // 2).to(tl.float32)
            along = ((tl.sum(left * y_left, 1) + tl.sum(right * y_right, 1)) / K)[:, None]
            left, right = left - y_left * along, right - y_right * along
            angles = half_of_head(rows % T, K, 0, K // 2)
            c, s = tl.load(cos + angles), tl.load(sin + angles)
            scale = tl.load(rstd + rows.to(tl.int64) * (2 * H) + head)
            left, right = (left * c - right * s) * scale, (right * c + left * s) * scale
        else:
            left, right = tl.load(dv + source).to(tl.float32), tl.load(dv + source + K // 2).to(tl.float32)
        target = out + half_of_head(rows, 3 * H * K, head * K, K // 2)
        tl.store(target, left.to(DTYPE))
        tl.store(target + K // 2, right.to(DTYPE))
        left_sum += left
        right_sum += right
    sums_of_block = sums + block * (3 * H * K) + head * K + tl.arange(0, K // 2)
    tl.store(sums_of_block, tl.sum(left_sum, 0))
    tl.store(sums_of_block + K // 2, tl.sum(right_sum, 0))


def rotated_norm(qkv_BT3HK: Tensor, bias: Tensor, cos_T1K: Tensor, sin_T1K: Tensor) -> tuple[Tensor, Tensor]:
    B, T, _, H, K = qkv_BT3HK.shape
    y, rstd = qkv_BT3HK.new_empty(3, B, T, H, K), qkv_BT3HK.new_empty(B, T, 2, H, dtype=torch.float32)
    rotated_norm_kernel[(in_blocks(B * T, HEAD_ROWS) * 3 * H,)](
        qkv_BT3HK, bias, cos_T1K, sin_T1K, y, rstd, B * T, T, EPS, H, K, HEAD_ROWS, DTYPES[y.dtype], num_warps=4
    )
    return y, rstd


def rotated_norm_gradient(
    dq_BTHK: Tensor, dk_BTHK: Tensor, dv_BTHK: Tensor, y: Tensor, rstd: Tensor, cos_T1K: Tensor, sin_T1K: Tensor
) -> tuple[Tensor, Tensor]:
    B, T, H, K = dq_BTHK.shape
    out = dq_BTHK.new_empty(B, T, 3, H, K)
    sums = dq_BTHK.new_empty(B * T // SUM_ROWS, 3 * H * K, dtype=torch.float32)
    rotated_norm_gradient_kernel[(in_blocks(B * T, SUM_ROWS) * 3 * H,)](
        dq_BTHK, dk_BTHK, dv_BTHK, y, rstd, cos_T1K, sin_T1K, out, sums, B * T, T, H, K, SUM_ROWS, HEAD_ROWS,
        DTYPES[y.dtype], num_warps=4,
    )  # fmt: skip
    return out, sums
