"""The sum of gradients over ranks, under way while the backward pass still runs."""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from aurora.optim.base import MatrixOptimizer
from aurora.optim.sharding import complete, sum_to_all, sum_to_owners
from aurora.optim.stacks import gradients_of

BUCKET_ELEMENTS = 2**23  # enough that a collective's latency does not count
SMALL_ELEMENTS = 2**16  # of vectors: they wait for the last bucket


class GradientSum:
    """Sums gradients over ranks: a matrix's into its owner, where other ranks drop theirs, all others into everyone.

    Each rank's are rounded to wire_dtype, travel so, and are summed in float32. Parameters lie in buckets in the order
    in which a backward pass comes to them. After overlap() a bucket is sent as soon as its last gradient is there, and
    never before the one ahead of it, so that all ranks begin collectives in one order; finish() sends the rest and
    waits. Until then p.grad is what this rank alone has found. With or without overlap() sums are equal bit for bit.
    With one rank there is nothing to sum.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        optimizers: Iterable[torch.optim.Optimizer],
        wire_dtype: torch.dtype,
        world_size: int,
    ):
        """params: in the order of the backward pass."""
        self.wire_dtype = wire_dtype
        params = sorted(params, key=lambda p: p.numel() < SMALL_ELEMENTS) if world_size > 1 else []
        self.owners: dict[Tensor, int] = {}
        for optimizer in optimizers:
            if isinstance(optimizer, MatrixOptimizer) and world_size > 1:
                self.owners |= optimizer.owners
        self.buckets: list[list[Tensor]] = [[]]
        for p in params:
            if sum(other.numel() for other in self.buckets[-1]) >= BUCKET_ELEMENTS and p.numel() >= SMALL_ELEMENTS:
                self.buckets.append([])
            self.buckets[-1].append(p)
        self.bucket_of = {p: index for index, bucket in enumerate(self.buckets) for p in bucket}
        self.is_overlapping = False
        self.sums: list[Iterator[None]] = []
        self.reset()
        for p in params:
            p.register_post_accumulate_grad_hook(self.arrived)

    def reset(self) -> None:
        self.is_overlapping, self.next_bucket, self.sums = False, 0, []
        self.missing = [len(bucket) for bucket in self.buckets]

    def overlap(self) -> None:
        """Call before the last backward pass of a step."""
        self.reset()
        self.is_overlapping = True

    def arrived(self, p: Tensor) -> None:
        if not self.is_overlapping:
            return
        self.missing[self.bucket_of[p]] -= 1
        while self.next_bucket < len(self.buckets) and self.missing[self.next_bucket] == 0:
            self.send()

    @torch.no_grad()
    def send(self) -> None:
        """Begin the sums of the next bucket."""
        bucket = self.buckets[self.next_bucket]
        self.next_bucket += 1
        for p in bucket:
            if p.grad is None:  # an edited model may leave a parameter out
                p.grad = torch.zeros_like(p)
        owned, shared = ([p for p in bucket if (p in self.owners) == is_owned] for is_owned in (True, False))
        if owned:
            owners = [self.owners[p] for p in owned]
            self.sums.append(sum_to_owners(gradients_of(owned), owners, self.wire_dtype))
            next(self.sums[-1])
        if shared:
            self.sums.append(sum_to_all(gradients_of(shared), self.wire_dtype))
            next(self.sums[-1])

    @torch.no_grad()
    def finish(self) -> None:
        """Leave the sums in p.grad. Collective."""
        while self.next_bucket < len(self.buckets):
            self.send()
        complete(self.sums)
        self.reset()
        for p, owner in self.owners.items():
            if owner != dist.get_rank():
                p.grad = None
