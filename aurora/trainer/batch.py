"""Batches: how ranks and micro-steps share one, and its way to the device."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from aurora.config import Config
from aurora.errors import Exit, HarnessError

AUTO_MICRO_BATCH_TOKENS = 2**17  # more at once makes no device faster


class BatchPlan(NamedTuple):
    """How one rank works off its share of a batch: micro_steps forward passes of micro_batch sequences."""

    micro_steps: int
    micro_batch: int
    val_sequences: int

    def micro_batches(self, inputs_BT: Tensor, targets_BT: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's batch in micro-batches."""
        yield from zip(inputs_BT.split(self.micro_batch), targets_BT.split(self.micro_batch), strict=True)

    @property
    def val_batch(self) -> int:
        """Sequences of a forward pass without backward, which needs less memory."""
        return min(2 * self.micro_batch, self.val_sequences)

    @property
    def val_batches(self) -> set[int]:
        """The sizes of these passes: the last may be smaller."""
        return {self.val_batch, self.val_sequences % self.val_batch} - {0}


def plan_batch(config: Config, world_size: int, micro_batch: int | None = None) -> BatchPlan:
    """Split batch and validation set over ranks, so that the global batch never depends on their number.

    micro_batch: in place of the config's, whose "auto" means the most that is tried.
    """
    seq_len = config.model.seq_len
    sequences, val_sequences = config.train.batch_tokens // seq_len, config.eval.tokens // seq_len
    for key, count in (("train.batch_tokens", sequences), ("eval.tokens", val_sequences)):
        if count % world_size:
            raise HarnessError(
                Exit.CONFIG,
                f"{world_size} ranks do not divide the {count} sequences of {key}; "
                f"use a number of ranks that divides {math.gcd(sequences, val_sequences)}",
            )
    own_sequences = sequences // world_size
    size = micro_batch or config.train.micro_batch
    if isinstance(size, str):  # "auto"
        most = max(1, AUTO_MICRO_BATCH_TOKENS // seq_len)
        size = max(size for size in range(1, most + 1) if own_sequences % size == 0)
    size = min(size, own_sequences)
    if own_sequences % size:
        raise HarnessError(
            Exit.CONFIG,
            f"train.micro_batch = {size} does not divide the {own_sequences} sequences "
            f"of a rank; set it to a divisor of {own_sequences}",
        )
    return BatchPlan(own_sequences // size, size, val_sequences // world_size)


def halvings(plan: BatchPlan) -> list[int]:
    """The plan's micro-batch and smaller ones that divide a rank's share, each at most half of the one before."""
    own_sequences, sizes = plan.micro_steps * plan.micro_batch, [plan.micro_batch]
    while sizes[-1] > 1:
        sizes.append(max(size for size in range(1, sizes[-1] // 2 + 1) if own_sequences % size == 0))
    return sizes


def stage(window: np.ndarray, device: torch.device) -> Tensor:
    """(B*T + 1,) uint16 tokens as int64, in memory that the device can copy from while the host goes on."""
    tokens = torch.from_numpy(window.astype(np.int64))
    return tokens.pin_memory() if device.type == "cuda" else tokens


def to_device(staged: Tensor, seq_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Staged (B*T + 1,) tokens to inputs and targets (B, T), copied without waiting where the device can."""
    tokens = staged.to(device, non_blocking=device.type == "cuda")
    return tokens[:-1].view(-1, seq_len), tokens[1:].view(-1, seq_len)
