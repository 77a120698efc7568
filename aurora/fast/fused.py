"""Parts of the model as single operations, in Triton on CUDA (aurora/fast/kernels.py).

The formulas here are what the kernels compute; they serve tests, and run nowhere else. Without these operations the
model is made of torch's and aurora/fast/functions.py.

Shapes: M rows, of which B sequences have T each; D model, C hidden width, H heads, K head dim. Weights and biases come
in the dtype of x. Gradients of biases and gains come as float32 sums over blocks of SUM_ROWS rows, (M / SUM_ROWS, ..).
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aurora.config import Config
from aurora.fast.functions import LOG2_E, soft_cap
from aurora.trainer.ranks import is_out_of_memory

is_on = False  # for all models of this process; see choose_kernels()
SUM_ROWS = 128
EPS = torch.finfo(torch.float32).eps

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


@torch.library.custom_op("aurora::add_norm", mutates_args=())
def add_norm(x_MD: Tensor, branch_MD: Tensor, bias_D: Tensor, gain_D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x + branch + bias; that over its RMS, times a gain; and one over that RMS, (M,)."""
    out = (x_MD.to(gain_D.dtype) + branch_MD + bias_D).type_as(x_MD)
    wide = out.to(gain_D.dtype)
    rstd_M = (wide.square().mean(-1) + EPS).rsqrt()
    return out, (wide * rstd_M[:, None] * gain_D).type_as(out), rstd_M


@torch.library.custom_op("aurora::norm_gradient", mutates_args=())
def norm_gradient(
    grad_x_MD: Tensor, grad_y_MD: Tensor, x_MD: Tensor, rstd_M: Tensor, gain_D: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient of x, which went on itself and of which y = x rstd gain was made; and (2, M / SUM_ROWS, D) sums, of
    it, which are the bias's gradient, and for the gain's.
    """
    normed, grad = x_MD.to(rstd_M.dtype) * rstd_M[:, None], grad_y_MD.to(rstd_M.dtype)
    along = (grad * gain_D * normed).mean(-1, keepdim=True)
    out = grad_x_MD + (grad * gain_D - normed * along) * rstd_M[:, None]
    return out.type_as(x_MD), torch.stack([block_sums(out), block_sums(grad * normed)])


@torch.library.custom_op("aurora::log_sums", mutates_args=())
def log_sums(z_MV: Tensor, bias_V: Tensor, cap: float) -> Tensor:
    """Binary logarithm of each row's sum of exponentials of soft-capped z + b, (M,).

    Capped logits (at most 64, see aurora/config.py) need no maximum: float32 holds their exponentials.
    """
    wide = z_MV.to(torch.promote_types(z_MV.dtype, torch.float32)) + bias_V
    capped = soft_cap(wide, cap)
    return torch.exp2(capped * LOG2_E).sum(1).log2()


@torch.library.custom_op("aurora::loss_gradient", mutates_args=())
def loss_gradient(
    z_MV: Tensor, bias_V: Tensor, targets_M: Tensor, log_sums_M: Tensor, scale: Tensor, cap: float
) -> tuple[Tensor, Tensor]:
    """The gradient of z, given that of the sum of cross-entropies of soft-capped z + b with targets; and its sums."""
    wide = z_MV.to(log_sums_M.dtype) + bias_V
    slope = cap * (wide.square() + cap**2).rsqrt()
    error = torch.exp2(slope * wide * LOG2_E - log_sums_M[:, None])
    error.scatter_add_(1, targets_M[:, None], -torch.ones_like(error[:, :1]))
    grad = error * slope**3 * scale
    return grad.type_as(z_MV), block_sums(grad)


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


@add_norm.register_fake
def _(x_MD: Tensor, branch_MD: Tensor, bias_D: Tensor, gain_D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x_MD), torch.empty_like(x_MD), gain_D.new_empty(x_MD.size(0))


@norm_gradient.register_fake
def _(grad_x_MD: Tensor, grad_y_MD: Tensor, x_MD: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_MD), x_MD.new_empty(2, x_MD.size(0) // SUM_ROWS, x_MD.size(1), dtype=torch.float32)


@log_sums.register_fake
def _(z_MV: Tensor, *_: Any) -> Tensor:
    return z_MV.new_empty(z_MV.size(0), dtype=torch.promote_types(z_MV.dtype, torch.float32))


@loss_gradient.register_fake
def _(z_MV: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(z_MV), z_MV.new_empty(z_MV.size(0) // SUM_ROWS, z_MV.size(1), dtype=torch.float32)


OPERATIONS = (
    up_relu_squared,
    up_gradient,
    rotated_norm,
    rotated_norm_gradient,
    add_norm,
    norm_gradient,
    log_sums,
    loss_gradient,
)


class KernelFailed(Exception):
    """A kernel could not be compiled or started."""


def on_cuda(name: str) -> Callable[..., Any]:
    def call(*inputs: Any) -> Any:
        try:
            from aurora.fast import kernels  # Triton comes with torch for CUDA alone

            return getattr(kernels, name)(*inputs)
        except Exception as error:  # of any kind: Triton may be missing, or not know this device
            if is_out_of_memory(error):
                raise
            raise KernelFailed(f"the kernel of {name}: {type(error).__name__}: {error}") from error

    return call


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


class AddNorm(torch.autograd.Function):
    """x + branch + bias (B, T, D), and its RMS norm with a gain (D,), whose gradients are taken in one pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, bias: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
        out_MD, y_MD, rstd_M = add_norm(x.flatten(0, 1), branch.flatten(0, 1), bias, gain)
        ctx.save_for_backward(out_MD, rstd_M, gain)
        return out_MD.view_as(x), y_MD.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        grad_MD, sums = norm_gradient(*(grad.contiguous().flatten(0, 1) for grad in grads), *ctx.saved_tensors)
        grad, (grad_bias, grad_gain) = grad_MD.view_as(grads[0]), sums.sum(1)
        return grad, grad, grad_bias.type_as(grad), grad_gain


class HeadLoss(torch.autograd.Function):
    """Cross-entropy of soft_cap(x W^T + b) with targets (B, T), summed. x (B, T, D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, targets_BT: Tensor, cap: float) -> Tensor:
        z_MV, targets_M = x.flatten(0, 1) @ weight.t(), targets_BT.flatten()
        log_sums_M = log_sums(z_MV, bias, cap)
        z_of_targets = z_MV.gather(1, targets_M[:, None])[:, 0].to(log_sums_M.dtype) + bias[targets_M]
        ctx.save_for_backward(x, weight, z_MV, bias, targets_M, log_sums_M)
        ctx.cap = cap
        return (log_sums_M / LOG2_E - soft_cap(z_of_targets, cap)).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *saved = ctx.saved_tensors
        grad_MV, sums = loss_gradient(*saved, grad, ctx.cap)
        grad_weight = grad_MV.t() @ x.flatten(0, 1)
        return (grad_MV @ weight).view_as(x), grad_weight, sums.sum(0).type_as(weight), None, None


# ----------------------------------------------------------------------------------------------------------------------
# Whether


def choose_kernels(config: Config, device: torch.device) -> None:
    """Use these operations in all models of this process, or not: where the model is compiled, in bfloat16, on a device
    that copies whole tiles (Hopper and later), and whole tiles are what it has.
    """
    global is_on
    model = config.model
    is_on = (
        device.type == "cuda"
        and config.train.compile != "off"
        and torch.cuda.get_device_capability(device) >= (9, 0)
        and model.activation_dtype == "bfloat16"
        and all(size % 128 == 0 for size in (model.seq_len, model.model_dim, model.model_dim // model.num_heads))
    )
    if is_on:
        # torch 2.11 prints all that an operation new to its compiler depends on: with twelve blocks that never ends.
        with contextlib.suppress(ImportError, AttributeError):
            from torch._inductor import exc

            exc.OperatorIssue.operator_str = staticmethod(lambda target, args, kwargs: f"  target: {target}")


def takes(x_BTD: Tensor) -> bool:
    """Whether these operations are used, and their kernels, which take whole blocks of rows, can take x."""
    return is_on and x_BTD.shape[:-1].numel() % SUM_ROWS == 0


@contextlib.contextmanager
def turned_off() -> Iterator[None]:
    """The model of torch alone, in all threads."""
    global is_on
    before, is_on = is_on, False
    try:
        yield
    finally:
        is_on = before


def kernels_of(device: torch.device) -> str:
    """Whose kernels the model has, for the record."""
    return "triton" if is_on else "torch"
