"""The forward pass for Hopper and later, in bfloat16, compiled: two parts of a block are kernels of ours.

Compilers have no matmul that ends in a squared ReLU, and take two passes for the norm and rotation of queries and keys.
Measured on an H200, of 929 ms a step: squared ReLU and all matmuls 616 -> 598 ms, queries and keys 60 -> 31 ms
(results/benchmarks/h200.md, with caveats). The formulas here are what the Triton kernels (kernels.py) compute. They
serve tests and train nothing.

Shapes: M rows, of which B sequences have T each; D model, C hidden width, H heads, K head dim. Weights and biases come
in the dtype of x. Gradients of biases come as float32 sums over blocks of SUM_ROWS rows, (M / SUM_ROWS, ..).
"""

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aurora.config import Config
from aurora.errors import is_out_of_memory

from .forward import FastForward, packed

if TYPE_CHECKING:
    from train_gpt import MLP, Attention

SUM_ROWS = 128
EPS = torch.finfo(torch.float32).eps


class HopperForward(FastForward):
    """FastForward with kernels for queries, keys and values, and for the squared-ReLU MLP."""

    def heads(self, x_BTD: Tensor, attention: "Attention", rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        weight, bias = packed(x_BTD, attention.q, attention.k, attention.v)
        return RotatedHeads.apply(x_BTD, weight, zeros_if_none(bias, weight), *rotation)

    def mlp(self, x_BTD: Tensor, mlp: "MLP") -> Tensor:
        if mlp.gate is not None:
            return super().mlp(x_BTD, mlp)
        (up, up_bias), (down, down_bias) = packed(x_BTD, mlp.up), packed(x_BTD, mlp.down)
        y_BTD = SquaredReluMLP.apply(x_BTD, up, zeros_if_none(up_bias, up), down)
        return y_BTD if down_bias is None else y_BTD + down_bias


def zeros_if_none(bias: Tensor | None, weight: Tensor) -> Tensor:
    """What the kernels, which always add a bias, add for a layer without one."""
    return weight.new_zeros(weight.size(0)) if bias is None else bias


def suits(config: Config, device: torch.device) -> bool:
    """Whether the kernels can be used: in bfloat16, on a device that copies whole tiles, where all tiles are whole."""
    model = config.model
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (9, 0)
        and model.activation_dtype == "bfloat16"
        and all(size % 128 == 0 for size in (model.seq_len, model.model_dim, model.model_dim // model.num_heads))
    )


def shorten_compiler_errors() -> None:
    """torch 2.11 prints all that an operation new to its compiler depends on: with twelve blocks that never ends."""
    with contextlib.suppress(ImportError, AttributeError):
        from torch._inductor import exc

        short = staticmethod(lambda target, args, kwargs: f"  target: {target}")
        exc.OperatorIssue.operator_str = short  # type: ignore[method-assign]  # a patch of torch


# ----------------------------------------------------------------------------------------------------------------------
# Operations


def block_sums(x: Tensor) -> Tensor:
    """(.., N) to (M / SUM_ROWS, N), in float32 at least."""
    rows = x.to(torch.promote_types(x.dtype, torch.float32)).view(-1, SUM_ROWS, x.size(-1))
    return rows.sum(1)


@torch.library.custom_op("aurora::up_relu_squared", mutates_args=())
def up_relu_squared(x_MD: Tensor, weight_CD: Tensor, bias_C: Tensor) -> Tensor:
    """max(x W^T + b, 0)^2, (M, C)."""
    return F.linear(x_MD, weight_CD, bias_C).relu().square()


@torch.library.custom_op("aurora::up_gradient", mutates_args=())
def up_gradient(grad_MD: Tensor, weight_DC: Tensor, y_MC: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient (grad W) 2 sqrt(y), (M, C), of what y is the squared ReLU of; and its sums.

    The derivative of the square, 2 max(z, 0), is 2 sqrt(y): rounded y has half the relative error of rounded roots.
    """
    out_MC = (grad_MD @ weight_DC).mul_(y_MC.sqrt()).mul_(2)
    return out_MC, block_sums(out_MC)


@torch.library.custom_op("aurora::rotated_norm", mutates_args=())
def rotated_norm(qkv_BT3HK: Tensor, bias: Tensor, cos_T1K: Tensor, sin_T1K: Tensor) -> tuple[Tensor, Tensor]:
    """q, k, v (3, B, T, H, K) with their bias (3 H K,), q and k over their RMS and turned; and 1 / RMS, (B, T, 2, H).

    Attention gets three tensors of their own, not parts of one.
    """
    wide, v = (qkv_BT3HK.to(cos_T1K.dtype) + bias.view(qkv_BT3HK.shape[2:])).split([2, 1], 2)
    rstd = (wide.square().mean(-1) + EPS).rsqrt()
    normed = wide * rstd[..., None]
    turned = normed * cos_T1K[:, None] + normed.roll(normed.size(-1) // 2, -1) * sin_T1K[:, None]
    return torch.cat([turned, v], 2).type_as(qkv_BT3HK).movedim(2, 0).contiguous(), rstd


@torch.library.custom_op("aurora::rotated_norm_gradient", mutates_args=())
def rotated_norm_gradient(
    dq_BTHK: Tensor, dk_BTHK: Tensor, dv_BTHK: Tensor, y_3BTHK: Tensor, rstd: Tensor, cos_T1K: Tensor, sin_T1K: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient of qkv, (B, T, 3, H, K), given those of q, k and v; and its sums, of (3 H K).

    A rotation changes neither lengths nor dot products, so the norm's gradient needs the result y alone.
    """
    y = y_3BTHK[:2].movedim(0, 2).to(cos_T1K.dtype)
    grad = torch.stack([dq_BTHK, dk_BTHK], 2).to(cos_T1K.dtype)
    across = grad - y * (grad * y).mean(-1, keepdim=True)
    turned_back = across * cos_T1K[:, None] - across.roll(y.size(-1) // 2, -1) * sin_T1K[:, None]
    out = torch.cat([(turned_back * rstd[..., None]).type_as(dv_BTHK), dv_BTHK[:, :, None]], 2)
    return out, block_sums(out.flatten(2))


@up_relu_squared.register_fake
def _(x_MD: Tensor, weight_CD: Tensor, bias_C: Tensor) -> Tensor:
    return x_MD.new_empty(x_MD.size(0), weight_CD.size(0))


@up_gradient.register_fake
def _(grad_MD: Tensor, weight_DC: Tensor, y_MC: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(y_MC), y_MC.new_empty(y_MC.size(0) // SUM_ROWS, y_MC.size(1), dtype=torch.float32)


@rotated_norm.register_fake
def _(qkv_BT3HK: Tensor, bias: Tensor, cos_T1K: Tensor, sin_T1K: Tensor) -> tuple[Tensor, Tensor]:
    B, T, _, H, K = qkv_BT3HK.shape
    return qkv_BT3HK.new_empty(3, B, T, H, K), cos_T1K.new_empty(B, T, 2, H)


@rotated_norm_gradient.register_fake
def _(dq_BTHK: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    B, T, H, K = dq_BTHK.shape
    return dq_BTHK.new_empty(B, T, 3, H, K), dq_BTHK.new_empty(B * T // SUM_ROWS, 3 * H * K, dtype=torch.float32)


def import_kernels() -> None:
    """Now, where the first call would. Triton may be missing; the first call says so."""
    with contextlib.suppress(Exception):
        from . import kernels  # noqa: F401


class KernelFailed(Exception):
    """A kernel could not be compiled or started."""


def on_cuda(name: str) -> Callable[..., Any]:
    def call(*inputs: Any) -> Any:
        try:
            from . import kernels  # Triton comes with torch for CUDA alone

            return getattr(kernels, name)(*inputs)
        except Exception as error:  # of any kind: Triton may be missing, or not know this device
            if is_out_of_memory(error):
                raise
            raise KernelFailed(f"the kernel of {name}: {type(error).__name__}: {error}") from error

    return call


OPERATIONS = (up_relu_squared, up_gradient, rotated_norm, rotated_norm_gradient)
for operation in OPERATIONS:
    operation.register_kernel("cuda")(on_cuda(operation._name))


# ----------------------------------------------------------------------------------------------------------------------
# Their place in autograd


class SquaredReluMLP(torch.autograd.Function):
    """max(up(x), 0)^2 W^T of x (B, T, D), W (D, C). Keeps x and the squares, not what they are squares of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, up_CD: Tensor, up_bias: Tensor, down_DC: Tensor) -> Tensor:
        x_MD = x.flatten(0, 1)
        y_MC = up_relu_squared(x_MD, up_CD, up_bias)
        ctx.save_for_backward(x_MD, y_MC, up_CD, down_DC)
        return (y_MC @ down_DC.t()).view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x_MD, y_MC, up_CD, down_DC = ctx.saved_tensors
        grad_MD = grad.flatten(0, 1)
        grad_MC, sums = up_gradient(grad_MD, down_DC, y_MC)
        return (grad_MC @ up_CD).view_as(grad), grad_MC.t() @ x_MD, sums.sum(0).type_as(grad), grad_MD.t() @ y_MC


class RotatedHeads(torch.autograd.Function):
    """q, k and v (B, T, H, K) of x (B, T, D), q and k over their RMS and turned, by one matmul (3 H K, D)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, cos_T1K: Tensor, sin_T1K: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        qkv = (x @ weight.t()).unflatten(-1, (3, -1, cos_T1K.size(-1)))
        y, rstd = rotated_norm(qkv, bias, cos_T1K, sin_T1K)
        ctx.save_for_backward(x, weight, y, rstd, cos_T1K, sin_T1K)
        return y[0], y[1], y[2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *saved = ctx.saved_tensors
        grad, sums = rotated_norm_gradient(*(grad.contiguous() for grad in grads), *saved)
        grad = grad.flatten(2)
        grad_weight = grad.flatten(0, 1).t() @ x.flatten(0, 1)
        return grad @ weight, grad_weight, sums.sum(0).type_as(grad), None, None
