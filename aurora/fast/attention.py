"""Which kernel computes attention."""

import contextlib
import importlib.util
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import config as compiler_config
from torch.nn import attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from aurora.config import ModelConfig

from .functions import BlockedAttention

# Fastest first: by published timings of heads of 128 at 1024 positions, cuDNN's leads on Hopper and later alone.
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
HOPPER = (9, 0)


def choose_attention(model: ModelConfig, device: torch.device) -> str:
    """Have torch use the first backend that computes this model's attention here, and its gradient; returns its name.

    A fixed order and not a race, which could end otherwise in the next run. FlashAttention 3 takes the place of torch's
    own flash kernels where its package is installed.
    """
    names = list(BACKENDS)
    is_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == HOPPER[0]
    if is_hopper and importlib.util.find_spec("flash_attn_interface"):
        with contextlib.suppress(AttributeError, ImportError, RuntimeError, ValueError):  # before torch 2.11, or broken
            attention.activate_flash_attention_impl("FA3")
            if runs("flash", model, device):
                return use("flash") + " (FA3)"
            attention.restore_flash_attention_impl()
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < HOPPER:
        names = ["flash", "cudnn", "efficient", "math"]
    return use(next(name for name in names if name == "math" or runs(name, model, device)))


def runs(name: str, model: ModelConfig, device: torch.device) -> bool:
    shape = 1, model.num_heads, model.seq_len, model.model_dim // model.num_heads
    x = torch.ones(shape, device=device, dtype=getattr(torch, model.activation_dtype), requires_grad=True)
    try:
        with sdpa_kernel(BACKENDS[name]):
            F.scaled_dot_product_attention(x, x, x, is_causal=True, scale=model.attention_scale).sum().backward()
    except RuntimeError:
        return False
    return True


def use(name: str) -> str:
    """Leave this backend alone: torch's plain one, where it is allowed, comes before cuDNN's."""
    torch.backends.cuda.enable_cudnn_sdp(name == "cudnn")
    torch.backends.cuda.enable_flash_sdp(name == "flash")
    torch.backends.cuda.enable_mem_efficient_sdp(name == "efficient")
    torch.backends.cuda.enable_math_sdp(name == "math")
    compiler_config.cache_key_tag = f"attention {name}"  # compiled code has the kernel in it, torch's key does not
    return name


# In bfloat16 blocked attention is about twice as fast as torch's where the CPU has instructions for it, else slower.
# The margin keeps two runs on one machine from choosing differently.
BLOCKED_GAIN, TIMINGS = 1.4, 5
MEASURED_TOKENS, SLOWEST_S = 1024, 1.0
# Positions, since it keeps probabilities of all pairs of them: up to half as much again as all else of a block, which
# memory.py leaves room for.
LONGEST_BLOCKED = 1024


def blocked_pays(model: ModelConfig) -> bool:
    """Whether BlockedAttention and its gradient clearly beat torch's kernel on this CPU, by a short measurement.

    It takes some 50 ms on the quick track. In float32 it is not tried: a step would gain 4 % there.
    """
    if model.activation_dtype != "bfloat16" or model.seq_len > LONGEST_BLOCKED:
        return False
    sequences = max(1, MEASURED_TOKENS // model.seq_len)
    shape = sequences, model.num_heads, model.seq_len, model.model_dim // model.num_heads
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()

    def torchs() -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, is_causal=True, scale=model.attention_scale)

    def blocked() -> Tensor:
        return BlockedAttention.apply(x, x, x, model.attention_scale)

    if time_s(blocked) > SLOWEST_S:  # the first call, which prepares much; without instructions it takes seconds
        return False
    time_s(torchs)
    times = [(time_s(torchs), time_s(blocked)) for _ in range(TIMINGS)]
    torchs_s, blocked_s = map(min, zip(*times, strict=True))
    return torchs_s > BLOCKED_GAIN * blocked_s


def time_s(attend: Callable[[], Tensor]) -> float:
    begin_s = time.perf_counter()
    attend().sum().backward()
    return time.perf_counter() - begin_s
