"""Parts of a model's step that autograd alone would do with more memory or more passes over it."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Held(torch.autograd.Function):
    """A copy that holds parameters one below the other, in another dtype, in their place; gradients go to them."""

    @staticmethod
    def forward(ctx: Any, copy: Tensor, *parts: Tensor) -> Tensor:
        ctx.rows, ctx.dtype = [part.size(0) for part in parts], parts[0].dtype
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *grad.to(ctx.dtype).split(ctx.rows)


class HeldWeights:
    """Copies, in one dtype, of weights and biases: those of layers that share their input lie one below the other."""

    def __init__(self, packs: Sequence[Sequence[nn.Linear]], dtype: torch.dtype):
        self.packs = packs
        self.copies: list[tuple[Tensor, Tensor]] = []
        self.rooms: list[Tensor] = []  # the copy's part for each of the sources
        self.sources: list[nn.Parameter] = []
        for pack in packs:
            parts = [layer.weight for layer in pack], [layer.bias for layer in pack]
            self.copies.append(tuple(torch.cat(tensors).detach().to(dtype) for tensors in parts))
            for copy, tensors in zip(self.copies[-1], parts, strict=True):
                self.rooms += copy.split([tensor.size(0) for tensor in tensors])
                self.sources += tensors

    @contextlib.contextmanager
    def at_rest(self) -> Iterator[None]:
        """Copy once and leave the copies in `held` of each pack's first layer, as long as no weight changes."""
        with torch.no_grad():
            torch._foreach_copy_(self.rooms, self.sources)
        for (first, *_), copy in zip(self.packs, self.copies, strict=True):
            first.held = copy
        try:
            yield
        finally:
            for first, *_ in self.packs:
                first.held = None


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
        return (grad * root).mul_(2)


class FewPassRMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) over the last dimension, times a gain (D,) if there is one; in float32 at least.

    torch has one kernel for it on CUDA, but on a CPU a chain of operations, each with a backward of its own.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor | None) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rstd = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.size(-1))
        rstd.add_(torch.finfo(wide.dtype).eps).rsqrt_()
        ctx.save_for_backward(x, rstd, gain)
        y = wide * rstd
        return (y if gain is None else y.mul_(gain)).type_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        x, rstd, gain = ctx.saved_tensors
        wide = x.to(rstd.dtype)
        products = grad * wide
        if gain is None:
            sums, grad_y, grad_gain = products.sum(-1, keepdim=True), grad, None
        else:
            sums, grad_y = (products @ gain.to(products.dtype)).unsqueeze(-1), grad * gain
            grad_gain = rstd.flatten() @ products.flatten(0, -2)
        along_x = sums.mul_(rstd.square()).div_(-x.size(-1))
        return torch.addcmul(grad_y, wide, along_x).mul_(rstd).type_as(x), grad_gain


def rms_norm(x: Tensor, gain: Tensor | None = None) -> Tensor:
    """Over the last dimension, with a gain (D,) in float32: F.rms_norm where torch has a kernel for it.

    That one rounds the gain to the dtype of x, this one on a CPU does not.
    """
    if x.is_cpu and not torch.compiler.is_compiling():
        return FewPassRMSNorm.apply(x, gain)
    return F.rms_norm(x, x.shape[-1:], None if gain is None else gain.type_as(x))


class Rotation(torch.autograd.Function):
    """Pairs (i, i + K/2) along the last dimension K turned by angles, given by cos and sin; gradients turned back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return turned(grad, cos, -sin), None, None


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat([torch.addcmul(x1 * cos, x2, sin), torch.addcmul(x2 * cos, x1, sin, value=-1)], dim=-1).type_as(x)


def soft_cap(z: Tensor, cap: float) -> Tensor:
    """cap z / sqrt(z^2 + cap^2), within (-cap, cap)."""
    return cap * z * (z.square() + cap**2).rsqrt()


class SoftCapCrossEntropy(torch.autograd.Function):
    """Cross-entropy of soft-capped logits (N, V) with targets (N,), summed, in float32.

    Keeps the logits as they came and overwrites them with their gradient, so there is one backward pass. float32
    copies of all of them would be most of a step's memory: eagerly they exist in parts, compiled not at all.
    """

    @staticmethod
    def forward(ctx: Any, z_NV: Tensor, targets_N: Tensor, cap: float) -> Tensor:
        log_sums, losses = [], []
        for z, targets in parts_of(z_NV, targets_N):
            logits = soft_cap(z.float(), cap)
            log_sums.append(logits.logsumexp(dim=1))
            losses.append((log_sums[-1] - logits.gather(1, targets[:, None])[:, 0]).sum())
        ctx.save_for_backward(z_NV, targets_N, torch.cat(log_sums))
        ctx.cap = cap
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        z_NV, targets_N, log_sums_N = ctx.saved_tensors
        columns = torch.arange(z_NV.size(1), device=z_NV.device)
        for z, targets, log_sums in parts_of(z_NV, targets_N, log_sums_N):
            wide = z.float()
            slope = wide.square().add_(ctx.cap**2).rsqrt_().mul_(ctx.cap)
            error = (slope * wide).sub_(log_sums[:, None]).exp_().add_(columns == targets[:, None], alpha=-1)
            z.copy_(error.mul_(slope).mul_(slope).mul_(slope).mul_(grad))  # slope^3 is the soft-cap's derivative
        return z_NV, None, None


PART_ELEMENTS = 2**25


def parts_of(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Tensors of N rows, the first (N, V), in the same parts."""
    rows = max(1, PART_ELEMENTS // tensors[0].size(1))
    return [tensors] if torch.compiler.is_compiling() else list(zip(*(t.split(rows) for t in tensors), strict=True))
