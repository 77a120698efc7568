"""AdamW: torch's, fused where it can be. It updates embeddings, head and vectors in every run, and can be the rule."""

from collections.abc import Iterable
from typing import Any

import torch


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW, fused on CUDA and CPU.

    Args:
        params: as for any torch optimizer.
        lr: Step size: about the RMS change of a weight in a step.
        weight_decay: Decoupled decay: a step multiplies W by 1 - lr * weight_decay.
        betas: Decays of the averages of gradients and of their squares, both in [0, 1).
        eps: Added to the root of the average of squares. It depends on the loss: for a mean over T tokens take 1/T of
            the value that suits a sum.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ):
        params = list(params)
        tensors = [p for entry in params for p in (entry["params"] if isinstance(entry, dict) else [entry])]
        tensors = [entry[1] if isinstance(entry, tuple) else entry for entry in tensors]
        is_fused = all(p.device.type in ("cuda", "cpu") and p.is_floating_point() for p in tensors)
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=is_fused)
