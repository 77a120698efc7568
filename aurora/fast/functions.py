"""Parts of a model's step that autograd alone would do with more memory or more passes over it."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class ReluSquared(torch.autograd.Function):
    """max(x, 0)^2. Its derivative 2 max(x, 0) needs no look at the sign of x, which autograd would take."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        root = x.relu()
        ctx.save_for_backward(root)
        return root * root

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (root,) = ctx.saved_tensors
        return torch.addcmul(grad.new_zeros(()), grad, root, value=2)  # one pass


def inverse_rms(x: Tensor) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dimension, which is kept."""
    mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.size(-1))
    return mean_square.add_(torch.finfo(x.dtype).eps).rsqrt_()


class FewPassRMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) over the last dimension, times a gain (D,); in float32 at least.

    torch has one kernel for it on CUDA, but on a CPU a chain of operations, each with a backward of its own.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rstd = inverse_rms(wide)
        ctx.save_for_backward(x, rstd, gain)
        return (wide * rstd).mul_(gain).type_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, rstd, gain = ctx.saved_tensors
        wide = x.to(rstd.dtype)
        products = grad * wide
        along_x = (products @ gain.to(products.dtype)).unsqueeze(-1).mul_(rstd.square()).div_(-x.size(-1))
        grad_gain = rstd.flatten() @ products.flatten(0, -2)
        return (grad * gain).addcmul_(wide, along_x).mul_(rstd).type_as(x), grad_gain


def rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    """Over the last dimension, with a gain (D,) in float32: F.rms_norm where torch has a kernel for it.

    That one rounds the gain to the dtype of x, this one on a CPU does not.
    """
    if x.is_cpu:
        return FewPassRMSNorm.apply(x, gain)
    return F.rms_norm(x, x.shape[-1:], gain.type_as(x))


class RotatedRMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) over the last dimension K, then pairs (i, i + K/2) turned by angles; in float32.

    cos (.., K) holds each cosine twice, sin the sines and then the sines with a minus. A rotation changes neither
    lengths nor dot products, so the norm's gradient needs the result alone, which attention keeps anyway.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        wide = x.to(cos.dtype)
        rstd = inverse_rms(wide)
        y = (wide * cos).addcmul_(partners(wide), sin).mul_(rstd).type_as(x)
        ctx.save_for_backward(y, rstd, cos, sin)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        y, rstd, cos, sin = ctx.saved_tensors
        wide_grad, wide = grad.to(cos.dtype), y.to(cos.dtype)
        along_y = (wide_grad * wide).sum(-1, keepdim=True).div_(-y.size(-1))
        across = torch.addcmul(wide_grad, wide, along_y)
        turned_back = (across * cos).addcmul_(partners(across), sin, value=-1)
        return turned_back.mul_(rstd).type_as(y), None, None


def partners(x: Tensor) -> Tensor:
    """The other of each pair (i, i + K/2) of the last dimension K."""
    return x.roll(x.size(-1) // 2, -1)


class BlockedAttention(torch.autograd.Function):
    """Causal attention of queries, keys and values (B, H, T, K), a block of queries at a time, with its probabilities.

    A block sees no key behind its last query: of four blocks' products five eighths are left. Logits and softmax are
    float32, products with probabilities in the dtype of the input. Keeps B H T^2 5/8 probabilities, so it is for short
    sequences; on a CPU torch's own kernel computes them anew in its backward pass, slowly so in bfloat16.
    """

    BLOCKS = 4

    @staticmethod
    def forward(ctx: Any, q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, scale: float) -> Tensor:
        q, k, v = (x.reshape(-1, *x.shape[-2:]) for x in (q_BHTK, k_BHTK, v_BHTK))
        wide = torch.promote_types(q.dtype, torch.float32)
        scaled_q, wide_k = q.to(wide) * scale, k.to(wide)
        y, probabilities, size = torch.empty_like(q), [], -(-q.size(1) // BlockedAttention.BLOCKS)
        later = torch.full((size, size), -torch.inf, dtype=wide, device=q.device).triu_(1)
        for begin in range(0, q.size(1), size):
            end = min(begin + size, q.size(1))
            logits = scaled_q[:, begin:end] @ wide_k[:, :end].mT
            logits[:, :, begin:] += later[: end - begin, : end - begin]
            probabilities.append(logits.softmax(-1).type_as(q))
            y[:, begin:end] = probabilities[-1] @ v[:, :end]
        ctx.save_for_backward(q, k, v, *probabilities)
        ctx.scale, ctx.shape = scale, q_BHTK.shape
        return y.view(ctx.shape)

    @staticmethod
    def backward(ctx: Any, grad_BHTK: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, *probabilities = ctx.saved_tensors
        grad, end = grad_BHTK.reshape(q.shape), q.size(1)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for p in reversed(probabilities):
            begin = end - p.size(1)
            of_block = grad[:, begin:end]
            grad_v[:, :end] += p.mT @ of_block
            of_p = of_block @ v[:, :end].mT
            of_logits = torch.ops.aten._softmax_backward_data(of_p, p, -1, p.dtype).mul_(ctx.scale)
            grad_q[:, begin:end] = of_logits @ k[:, :end]
            grad_k[:, :end] += of_logits.mT @ q[:, begin:end]
            end = begin
        return grad_q.view(ctx.shape), grad_k.view(ctx.shape), grad_v.view(ctx.shape), None


def soft_cap(z: Tensor, cap: float) -> Tensor:
    """cap z / sqrt(z^2 + cap^2), within (-cap, cap)."""
    return cap * z * (z.square() + cap**2).rsqrt()


LOG2_E = math.log2(math.e)


class SoftCapCrossEntropy(torch.autograd.Function):
    """Cross-entropy of soft-capped logits (N, V) with targets (N,), summed, in float32.

    Keeps the logits as they came and overwrites them with their gradient, so there is one backward pass. float32
    copies of all of them would be most of a step's memory: eagerly they exist in parts, compiled not at all. Capped
    logits (at most 64, see aurora/bounds.py) have exponentials that float32 holds, so a row's sum needs no maximum
    first, which would be one more pass; powers of two, with logits in bits, are what devices compute fastest.
    """

    @staticmethod
    def forward(ctx: Any, z_NV: Tensor, targets_N: Tensor, cap: float) -> Tensor:
        log_sums, losses = [], []
        for z, targets in parts_of(z_NV, targets_N):
            wide = z.float()
            slope = wide.square().add_(cap**2).rsqrt_().mul_(cap * LOG2_E)
            log_sums.append(slope.mul_(wide).exp2_().sum(1).log2())
            of_targets = soft_cap(z.gather(1, targets[:, None])[:, 0].float(), cap)
            losses.append((log_sums[-1] / LOG2_E - of_targets).sum())
        ctx.save_for_backward(z_NV, targets_N, torch.cat(log_sums))
        ctx.cap = cap
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        z_NV, targets_N, log_sums_N = ctx.saved_tensors
        for z, targets, log_sums in parts_of(z_NV, targets_N, log_sums_N):
            wide = z.float()
            slope = wide.square().add_(ctx.cap**2).rsqrt_().mul_(ctx.cap)
            error = torch.addcmul(-log_sums[:, None], slope, wide, value=LOG2_E).exp2_()
            if torch.compiler.is_compiling():  # a scatter does not fuse
                error.add_(torch.arange(z.size(1), device=z.device) == targets[:, None], alpha=-1)
            else:
                error.scatter_add_(1, targets[:, None], error.new_full((1, 1), -1.0).expand(len(error), 1))
            z.copy_(error.mul_(slope.pow_(3)).mul_(grad))  # slope^3 is the soft-cap's derivative
        return z_NV, None, None


PART_ELEMENTS = 2**25


def parts_of(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Tensors of N rows, the first (N, V), in the same parts. Compiled code makes no copies and takes them whole."""
    rows = max(1, PART_ELEMENTS // tensors[0].size(1))
    return [tensors] if torch.compiler.is_compiling() else list(zip(*(t.split(rows) for t in tensors), strict=True))
