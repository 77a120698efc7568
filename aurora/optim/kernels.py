"""Triton kernels behind aurora/optim/passes.py, which says what each computes."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from aurora.optim.passes import MIN_ROW_NORM, TILE

DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}

# ---- symmetric matmuls ----

TILE_K = 64  # how much of the inner dimension is loaded at once


@triton.jit
def symmetric_kernel(
    a, b, plus, out, N, K, alpha, beta, diagonal,
    COLUMNS: tl.constexpr, HAS_PLUS: tl.constexpr, TILE: tl.constexpr, TILE_K: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One tile on or below the diagonal of a b^T, by columns of a^T b, and its mirror image above."""
    tiles = N // TILE
    matrix = tl.program_id(0) // (tiles * tiles)
    first = matrix * N  # row of this matrix in the stack
    m, n = tl.program_id(0) // tiles % tiles * TILE, tl.program_id(0) % tiles * TILE
    if n > m:
        return
    product = tl.zeros((TILE, TILE), tl.float32)
    for k in range(0, K, TILE_K):
        if COLUMNS:
            product = tl.dot(a.load([matrix * K + k, m]).T, b.load([matrix * K + k, n]), product)
        else:
            product = tl.dot(a.load([first + m, k]), b.load([first + n, k]).T, product)
    product *= alpha
    if HAS_PLUS:
        product += beta * plus.load([first + m, n]).to(tl.float32)
    offsets = tl.arange(0, TILE)
    product += tl.where(m + offsets[:, None] == n + offsets[None, :], diagonal, 0.0)
    rounded = product.to(DTYPE)
    out.store([first + m, n], rounded)
    if n < m:
        out.store([first + n, m], rounded.T)


def tiles(stack: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """The stack, one matrix below the other, in tiles of so many rows and columns."""
    return TensorDescriptor.from_tensor(stack.view(-1, stack.size(-1)), [rows, columns])


def gram(X_KMN: Tensor) -> Tensor:
    out = X_KMN.new_empty(*X_KMN.shape[:-1], X_KMN.size(-2))
    if X_KMN.mT.is_contiguous() and not X_KMN.is_contiguous():
        return multiply(X_KMN.mT, X_KMN.mT, out, by_columns=True)
    X = X_KMN.contiguous()
    return multiply(X, X, out)


def symmetric_product(
    A: Tensor, B: Tensor, alpha: float = 1.0, plus: Tensor | None = None, beta: float = 1.0, diagonal: float = 0.0
) -> Tensor:
    plus = plus if plus is None else plus.contiguous()
    return multiply(A.contiguous(), B.contiguous(), A.new_empty(A.shape), alpha, plus, beta, diagonal)


def multiply(
    A: Tensor, B: Tensor, out: Tensor, alpha: float = 1.0, plus: Tensor | None = None, beta: float = 1.0,
    diagonal: float = 0.0, by_columns: bool = False,
) -> Tensor:  # fmt: skip
    """alpha A B^T + beta plus + diagonal I into out; by columns A^T B. Two programs share a multiprocessor."""
    N, inner = out.size(-1), A.size(-2 if by_columns else -1)
    block = (TILE_K, TILE) if by_columns else (TILE, TILE_K)
    symmetric_kernel[(out.size(0) * (N // TILE) ** 2,)](
        tiles(A, *block), tiles(B, *block), tiles(out if plus is None else plus, TILE, TILE), tiles(out, TILE, TILE),
        N, inner, float(alpha), float(beta), float(diagonal), by_columns, plus is not None, TILE, TILE_K,
        DTYPES[out.dtype], num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


# ---- passes over a stack, whose parameters are anywhere in memory ----

BLOCK = 2048  # elements of a program


@triton.jit
def start_of(addresses, matrix, DTYPE: tl.constexpr):
    return tl.multiple_of(tl.load(addresses + matrix).to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def advance_kernel(buffers, grads, X, size, momentum, NESTEROV: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    matrix = tl.program_id(1)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    grad = tl.load(start_of(grads, matrix, DTYPE) + place, inside).to(tl.float32)
    of_buffer = start_of(buffers, matrix, tl.float32) + place
    buffer = tl.load(of_buffer, inside)
    buffer = momentum * buffer + (1 - momentum) * grad
    tl.store(of_buffer, buffer, inside)
    if NESTEROV:
        buffer = momentum * buffer + (1 - momentum) * grad
    tl.store(X + matrix.to(tl.int64) * size + place, buffer, inside)


@triton.jit
def subtract_kernel(params, updates, size, step_size, kept, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    matrix = tl.program_id(1)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    of_param = start_of(params, matrix, DTYPE) + place
    update = tl.load(updates + matrix.to(tl.int64) * size + place, inside).to(tl.float32)
    param = tl.load(of_param, inside).to(tl.float32)
    tl.store(of_param, (kept * param - step_size * update).to(DTYPE), inside)


@functools.lru_cache(maxsize=1024)
def on_device(device: torch.device, addresses: tuple[int, ...]) -> Tensor:
    """The addresses where a kernel can read them; sent without waiting, and again only when they have changed."""
    return torch.tensor(addresses, dtype=torch.int64, device="cpu").pin_memory().to(device, non_blocking=True)


def addresses(tensors: list[Tensor]) -> Tensor:
    return on_device(tensors[0].device, tuple(t.data_ptr() for t in tensors))


def advance(buffers: list[Tensor], grads: list[Tensor], momentum: float, nesterov: bool) -> Tensor:
    size = buffers[0].numel()
    X_KMN = buffers[0].new_empty(len(buffers), *buffers[0].shape)
    advance_kernel[(triton.cdiv(size, BLOCK), len(buffers))](
        addresses(buffers), addresses(grads), X_KMN, size, momentum, nesterov, BLOCK, DTYPES[grads[0].dtype]
    )
    return X_KMN


def subtract(params: list[Tensor], O_KMN: Tensor, step_size: float, decay: float) -> None:
    size = params[0].numel()
    subtract_kernel[(triton.cdiv(size, BLOCK), len(params))](
        addresses(params), O_KMN, size, step_size, 1.0 - decay, BLOCK, DTYPES[params[0].dtype]
    )


# ---- rows ----


@triton.jit
def evening_kernel(
    norms, factors, M, rank, max_scale_error, MIN_ROW_NORM: tl.constexpr, HAS_LIMIT: tl.constexpr, BLOCK_M: tl.constexpr
):
    place = tl.program_id(0) * M + tl.arange(0, BLOCK_M)
    inside = tl.arange(0, BLOCK_M) < M
    norm = tl.load(norms + place, inside, other=0.0)
    is_zero = norm <= MIN_ROW_NORM
    num_rows = tl.maximum(M - tl.sum((is_zero & inside).to(tl.int32), 0), 1)
    total = tl.sqrt(tl.sum(norm * norm, 0))
    total = tl.where(total < MIN_ROW_NORM, MIN_ROW_NORM, total)  # keeps a NaN, which a maximum would not
    if HAS_LIMIT:
        growth = tl.sqrt(tl.minimum(num_rows, rank).to(tl.float32)) / total
        growth = tl.where(growth < 1 - max_scale_error, 1 - max_scale_error, growth)
        total *= tl.where(growth > 1 + max_scale_error, 1 + max_scale_error, growth)
    even = total / tl.sqrt(num_rows.to(tl.float32)) / norm
    tl.store(factors + place, tl.where(is_zero, 1.0, even), inside)


def evening_factors(norm_KM1: Tensor, rank: int, max_scale_error: float = 0.0) -> Tensor:
    K, M, _ = norm_KM1.shape
    norm_KM1 = norm_KM1.contiguous()
    factors = torch.empty_like(norm_KM1)
    evening_kernel[(K,)](
        norm_KM1, factors, M, rank, max_scale_error, MIN_ROW_NORM, max_scale_error > 0, triton.next_power_of_2(M)
    )
    return factors
