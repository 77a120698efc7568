"""Prints, for every output of every kernel run by Triton's interpreter, its error against its formula in float64.

A process of its own, since Triton reads TRITON_INTERPRET when it is imported. Its matmuls know no bfloat16.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

from aurora.fast import hopper, kernels

T, H, K, D, C = 128, 2, 32, 128, 384


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


def check(name: str, *inputs: object) -> None:
    wide = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs]
    found, expected = getattr(kernels, name)(*inputs), getattr(hopper, name)(*wide)
    if isinstance(found, torch.Tensor):
        found, expected = (found,), (expected,)
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape and a.isfinite().all()
        limit = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[inputs[0].dtype]
        error = ((a.double() - b).norm() / b.norm()).item()
        print(f"{name} {inputs[0].dtype} output {number}: {error:.1e}, {'ok' if error < limit else 'WRONG'}")


generator = torch.Generator().manual_seed(0)
half = torch.float16
M = 2 * T
check("up_relu_squared", random(M, D, dtype=half), random(C, D, dtype=half) / 8, random(C, dtype=half))
check("up_gradient", random(M, D, dtype=half), random(D, C, dtype=half) / 8, random(M, C, dtype=half).square())
angles = torch.outer(torch.arange(T, dtype=torch.float32), random(K // 2))[:, None]
tables = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin(), -angles.sin()], -1)
for dtype, B in ((torch.float32, 2), (torch.bfloat16, 1)):  # the latter for rounding: it has one block of rows alone
    check("rotated_norm", random(B, T, 3, H, K, dtype=dtype), random(3 * H * K, dtype=dtype), *tables)
    grads = [random(B, T, H, K, dtype=dtype) for _ in range(3)]
    check("rotated_norm_gradient", *grads, random(3, B, T, H, K, dtype=dtype), random(B, T, 2, H), *tables)
