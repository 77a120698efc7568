"""A linear layer whose matmuls read 8-bit floats, and whether they can be computed here.

Of the three matmuls of a step two are in float8: the output, x and W in e4m3, and the gradient of x, whose factor from
above is in e5m2, since gradients need range more than digits. The gradient of W is in x's dtype: float8 matmuls sum
along rows, so it would take a transposed copy of the output's gradient, a head's largest tensor; and it is what the
optimizer gets, rounded once and not twice. Each tensor has one scale, from its absolute maximum, found on the device.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from aurora.errors import Exit, HarnessError
from aurora.fast.functions import parts_of

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LOWEST_CAPABILITY = (8, 9)  # of a CUDA GPU: Ada, Hopper and later


def quantised(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(N, D) as float8 and the float32 scale that takes it back; zeros stay zeros, an infinity makes all of it NaN."""
    largest = torch.linalg.vector_norm(x, math.inf).float()
    scale = (largest / torch.finfo(dtype).max).clamp_min(torch.finfo(torch.float32).tiny)
    x8 = torch.empty(x.shape, dtype=dtype, device=x.device)
    for part, room in parts_of(x, x8):
        room.copy_(part.float() / scale)
    return x8, scale


class Float8Matmul(torch.autograd.Function):
    """x W^T + b of x (N, D), W (V, D) and b (V,) or None, all in the dtype of the result (N, V)."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
        x8, x_scale = quantised(x_ND, E4M3)
        weight8, weight_scale = quantised(weight_VD, E4M3)
        ctx.save_for_backward(x_ND, weight8, weight_scale)
        ctx.has_bias = bias_V is not None
        is_float32 = x_ND.dtype == torch.float32  # for which CUDA's matmul takes no bias
        z_NV = torch._scaled_mm(
            *(x8, weight8.t(), x_scale, weight_scale), bias=None if is_float32 else bias_V, out_dtype=x_ND.dtype
        )
        return z_NV.add_(bias_V) if is_float32 and bias_V is not None else z_NV

    @staticmethod
    def backward(ctx: Any, grad_NV: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x_ND, weight8, weight_scale = ctx.saved_tensors
        grad8, grad_scale = quantised(grad_NV, E5M2)
        columns = weight8.t().contiguous().t()  # which the matmul wants one after the other in memory
        grad_x_ND = torch._scaled_mm(grad8, columns, grad_scale, weight_scale, out_dtype=x_ND.dtype)
        return grad_x_ND, grad_NV.t() @ x_ND, grad_NV.sum(0) if ctx.has_bias else None


def float8_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As F.linear: x (..., D), weight (V, D), bias (V,) to (..., V). D and V are multiples of 16."""
    return Float8Matmul.apply(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])


class Float8Linear(nn.Linear):
    """Weights are float32; input and weight are rounded to float8 for the matmul, the output has the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return float8_linear(x, self.weight.type_as(x), None if self.bias is None else self.bias.type_as(x))


def check_float8(device: torch.device) -> None:
    """Have the device compute a small layer and its gradients.

    Raises:
        HarnessError: CONFIG, where it cannot.
    """
    reason, name = "", str(device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        capability = torch.cuda.get_device_capability(device)
        if capability < LOWEST_CAPABILITY:
            reason = "it has CUDA capability {}.{}, float8 takes {}.{}".format(*capability, *LOWEST_CAPABILITY)
    elif device.type == "mps":
        reason = "Apple GPUs have no float8"
    if not reason:
        try:
            x = torch.ones(16, 16, device=device, dtype=torch.bfloat16, requires_grad=True)
            float8_linear(x, x, x[0]).sum().backward()
            return
        except (AttributeError, RuntimeError, TypeError) as error:
            reason = f"torch {torch.__version__} fails: {(str(error) or type(error).__name__).splitlines()[0]}"
    message = f'model.head_dtype = "float8" cannot be computed on {name}: {reason}; set it to "activation"'
    raise HarnessError(Exit.CONFIG, message)
