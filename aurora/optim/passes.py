"""What a step is made of besides full matmuls: by Triton's kernels where they work (aurora/optim/kernels.py), else by torch.

Each function says what it computes by its torch formula; a kernel takes fewer passes over memory, and of a symmetric
product, in bfloat16, computes one half. They are for Hopper and later, outside torch.compile and CUDA graphs.
"""

import contextlib
import functools
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

TILE = 128  # the sides of what a kernel multiplies are multiples of this
MAX_ROWS = 2**14  # that a kernel takes at once
# A zero row has no direction: its row of the polar factor is zero too, and its weight is left as it is.
MIN_ROW_NORM = 1e-7
is_on = True

# ---- symmetric matmuls ----


def gram(X_KMN: Tensor) -> Tensor:
    """The Gram matrices of the short side."""
    X = X_KMN.mT if X_KMN.size(-2) > X_KMN.size(-1) else X_KMN
    kernels = can_multiply(X) and kernels_for(X)
    return kernels.gram(X) if kernels else torch.bmm(X, X.mT)


def symmetric_product(
    A: Tensor, B: Tensor, alpha: float = 1.0, plus: Tensor | None = None, beta: float = 1.0, diagonal: float = 0.0
) -> Tensor:
    """alpha A B + beta plus + diagonal I of (K, N, N), where A B and plus are symmetric.

    Polynomials of one matrix commute, but once they are rounded their product is symmetric only as far as they are
    exact: what is lost by taking one half for both is for the caller to judge, see _two_steps() in aurora/optim/polar.py.
    """
    kernels = can_multiply(A) and kernels_for(A)
    if kernels:
        return kernels.symmetric_product(A, B, alpha, plus, beta, diagonal)
    if diagonal:
        plus, beta = torch.zeros_like(A) if plus is None else beta * plus, 1.0
        plus.diagonal(dim1=-2, dim2=-1).add_(diagonal)
    if plus is None:
        return torch.bmm(A, B) if alpha == 1 else alpha * torch.bmm(A, B)
    return torch.baddbmm(plus, A, B, beta=beta, alpha=alpha)


def can_multiply(X: Tensor) -> bool:
    return X.dtype == torch.bfloat16 and all(size > 0 and size % TILE == 0 for size in X.shape[-2:])


# ---- passes over a stack of matrices ----


def advance(buffers: list[Tensor], grads: list[Tensor], momentum: float | Tensor, nesterov: bool) -> Tensor:
    """Gradients into float32 momentum buffers, in place; with nesterov lookahead(), else the buffers, (K, M, N)."""
    kernels = isinstance(momentum, float) and kernels_for(buffers[0])
    if kernels and are_whole(buffers, grads):
        return kernels.advance(buffers, grads, momentum, nesterov)
    grads = [grad.float() for grad in grads]
    torch._foreach_lerp_(buffers, grads, foreach_weight(1 - momentum, len(grads)))
    return torch.stack(lookahead(buffers, grads, momentum) if nesterov else buffers)


def lookahead(buffers: list[Tensor], grads: list[Tensor], momentum: float | Tensor) -> list[Tensor]:
    """(1 - momentum) grad + momentum buffer, float32."""
    return torch._foreach_lerp([grad.float() for grad in grads], buffers, foreach_weight(momentum, len(grads)))


def foreach_weight(weight: float | Tensor, count: int) -> float | list[Tensor]:
    """The weight as foreach_lerp takes it."""
    return [weight] * count if isinstance(weight, Tensor) else weight


def subtract(params: list[Tensor], O_KMN: Tensor, step_size: float | Tensor, decay: float | Tensor) -> None:
    """p <- (1 - decay) p - step_size O, in place."""
    kernels = isinstance(step_size, float) and isinstance(decay, float) and kernels_for(O_KMN)
    if kernels and are_whole(params, [O_KMN]):
        kernels.subtract(params, O_KMN, step_size, decay)
        return
    if isinstance(decay, Tensor) or decay:
        torch._foreach_mul_(params, 1 - decay)
    if isinstance(step_size, Tensor):  # which alpha may not be
        O_KMN, step_size = O_KMN.float() * step_size, 1
    O_KMN = O_KMN.to(torch.promote_types(O_KMN.dtype, params[0].dtype))  # of one dtype it is one launch on CUDA
    torch._foreach_sub_(params, list(O_KMN.unbind()), alpha=step_size)


def row_norms(X_KMN: Tensor) -> Tensor:
    """(K, M, 1) float32."""
    if X_KMN.is_cuda:
        return torch.linalg.vector_norm(X_KMN, dim=-1, keepdim=True, dtype=torch.float32)
    # On a CPU ten times as fast where X is the transpose of a wide matrix.
    return X_KMN.square().sum(dim=-1, keepdim=True, dtype=torch.float32).sqrt()


def evening_factors(norm_KM1: Tensor, rank: int, max_scale_error: float = 0.0) -> Tensor:
    """Factors that give the rows of almost orthogonal matrices of that rank one norm; a zero row gets 1.

    That norm is sqrt(rank/M), M without the zero rows, as far as max_scale_error lets it: where the root mean square of
    the rows is further off than that, the reason is not the error of the polar factor but a lower rank, and scaling up
    would stretch what directions there are.

    Args:
        norm_KM1: float32 norms of the rows.
        rank: the number of columns, or less.
        max_scale_error: the relative error that singular values may have.

    Returns:
        (K, M, 1) float32.
    """
    kernels = norm_KM1.dtype == torch.float32 and norm_KM1.size(-2) <= MAX_ROWS and kernels_for(norm_KM1)
    if kernels:
        return kernels.evening_factors(norm_KM1, rank, max_scale_error)
    is_zero_KM1 = norm_KM1 <= MIN_ROW_NORM
    num_rows_K11 = (~is_zero_KM1).sum(dim=-2, keepdim=True).clamp(min=1)
    total_K11 = torch.linalg.vector_norm(norm_KM1, dim=-2, keepdim=True).clamp(min=MIN_ROW_NORM)
    if max_scale_error:
        full_rank_K11 = num_rows_K11.clamp(max=rank)
        total_K11 = total_K11 * (full_rank_K11.sqrt() / total_K11).clamp(1 - max_scale_error, 1 + max_scale_error)
    return torch.where(is_zero_KM1, 1.0, total_K11 / num_rows_K11.sqrt() / norm_KM1)


def are_whole(*stacks: list[Tensor]) -> bool:
    """Whether each tensor is one aligned piece of memory, all of a stack in one dtype, which the kernels know."""
    return all(
        t.is_contiguous() and t.data_ptr() % 16 == 0 and t.dtype == stack[0].dtype and t.device == stack[0].device
        for stack in stacks
        for t in stack
    ) and all(stack[0].dtype in (torch.float32, torch.bfloat16, torch.float16) for stack in stacks)


# ---- whether ----


def kernels_for(tensor: Tensor) -> ModuleType | None:
    """aurora/optim/kernels.py where it is to be used; Triton launches on the current device, whatever its inputs are on."""
    if not (is_on and tensor.is_cuda) or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return None
    return working_kernels(tensor.device) if tensor.device.index == torch.cuda.current_device() else None


def kernels_of(device: torch.device) -> str:
    """Whose kernels steps on this device have, for the record."""
    return "triton" if kernels_for(torch.empty(0, device=device)) else "torch"


@contextlib.contextmanager
def turned_off(module: ModuleType = sys.modules[__name__]) -> Iterator[None]:
    """Torch alone in place of a module's kernels, in all threads."""
    before, module.is_on = module.is_on, False
    try:
        yield
    finally:
        module.is_on = before


@functools.cache
def working_kernels(device: torch.device) -> ModuleType | None:
    """The kernels, if they work on this device: tried at the first step, the only one that waits for the device."""
    if torch.version.hip or torch.cuda.get_device_capability(device) < (9, 0):
        return None
    try:
        from aurora.optim import kernels  # Triton comes with torch for CUDA alone

        check(kernels, device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of any kind: Triton may be missing, or not know this device
        reason = (str(error) or type(error).__name__).splitlines()[0]
        warnings.warn(f"optimizer steps without Triton kernels, for {reason}", stacklevel=1)
        return None
    return kernels


def check(kernels: ModuleType, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
    """Raise ArithmeticError where a kernel does not give what its formula gives; dtype is that of the matmuls."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32) / 8

    X, A = random(2, 2 * TILE, 3 * TILE).to(dtype), random(2, 2 * TILE, 2 * TILE)
    A = (A + A.mT).to(dtype)
    norm_KM1 = random(3, 200, 1).abs()
    norm_KM1[0, :5] = MIN_ROW_NORM / 2

    def stepped(of: ModuleType, nesterov: bool, grad_dtype: torch.dtype, update_dtype: torch.dtype) -> list[Tensor]:
        generator.manual_seed(1)
        params, buffers, grads = ([random(48, 100) for _ in range(3)] for _ in range(3))
        O_KMN = of.advance(buffers, [grad.to(grad_dtype) for grad in grads], 0.9, nesterov)
        of.subtract(params, O_KMN.to(update_dtype), 0.1, 0.01)
        return [O_KMN, *params, *buffers]

    modes = (True, torch.float32, dtype), (False, torch.float32, torch.float32), (True, dtype, dtype)
    rows = (1, 0.0), (1, 0.1), (4, 0.5), (10, 0.1)
    tasks = {
        "Gram matrix": lambda of: [of.gram(X), of.gram(X.mT.contiguous().mT)],
        "symmetric product": lambda of: [
            of.symmetric_product(A, A, *rest) for rest in ((), (2.0,), (-0.5, A, 3.0, 2.0))
        ],
        "even rows": lambda of: [of.evening_factors(size * norm_KM1, 100, limit) for size, limit in rows],
        "update": lambda of: [t for mode in modes for t in stepped(of, *mode)],
    }
    for name, task in tasks.items():
        with turned_off():
            expected = task(sys.modules[__name__])
        for found, wanted in zip(task(kernels), expected, strict=True):
            limit = 1e-5 if found.dtype == torch.float32 else torch.finfo(dtype).eps
            if not (found - wanted).float().norm() <= limit * wanted.float().norm():
                raise ArithmeticError(f"the kernel of the {name} is wrong")
