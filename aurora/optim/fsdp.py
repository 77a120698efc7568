"""Parameters that torch's fully_shard has split by rows over ranks, and how a matrix comes together for its update.

Every rank keeps its rows of weights, gradients and all state, as torch's own optimizers do under fully_shard: DTensors,
which torch.distributed.checkpoint saves and loads for any number of ranks. Momentum is taken where the rows are. For
its update a matrix is put together on one rank, its owner. Per weight of a matrix, a step sends one number to the owner
(two or three for rules that ask for gradients or weights) and one back; and all of a rule's state but the momentum both
ways: next to nothing for row statistics, much for Gram matrices. No rank holds more whole matrices than it works on.

Rows are shared out as by torch.chunk(): ceil(rows / ranks) for the first ranks, then what is left, then none. With a
mesh of (replicas, shards), each replica does the same work, within its group of shards.
"""

from __future__ import annotations  # a torch without torch.distributed has no dist.ProcessGroup

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .stacks import STACK_BYTES


def is_dtensor(value: Any) -> bool:
    # Where nobody has imported that module, which takes a while, there are none.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def local(tensor: Any) -> Any:
    """The rows that this rank holds; of a plain tensor all. Without autograd."""
    with torch.no_grad():
        return tensor.to_local() if is_dtensor(tensor) else tensor


def is_by_rows(p: Any) -> bool:
    """Whether the last dimension of a DTensor's mesh splits it along dimension 0, and the one before, if any, repeats
    it."""
    *replicated, last = p.placements
    is_split = type(last).__name__ == "Shard" and last.dim == 0  # other classes interleave rows
    return is_split and len(replicated) <= 1 and all(placement.is_replicate() for placement in replicated)


def check_placements(name: str, p: Any) -> None:
    """Raise ValueError for a DTensor that is not split by rows, as fully_shard does it."""
    if is_by_rows(p):
        return
    placements = ", ".join(map(str, p.placements))
    raise ValueError(
        f"{name} of shape {tuple(p.shape)} is a DTensor with placements ({placements}); matrices may be split by "
        "fully_shard along dimension 0 alone, with or without replicas: do without tensor parallelism and "
        'shard_placement_fn here, or give it to a group with algorithm = "adamw"'
    )


def shard_group(p: Any) -> Any:
    """The process group over whose ranks the rows of a DTensor are shared out."""
    return p.device_mesh.get_group(p.device_mesh.ndim - 1)


def rows_of_ranks(rows: int, world_size: int) -> list[int]:
    """How many rows each rank holds."""
    size = -(-rows // world_size)
    return [max(0, min(size, rows - rank * size)) for rank in range(world_size)]


def split_like(p: Any, whole: Tensor) -> Tensor:
    """A tensor that all ranks have whole as a DTensor, split as p is. No communication."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    whole = whole.to(p.device)
    if not is_by_rows(p):  # AdamW's parameters may have any placements
        return distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)
    group = shard_group(p)
    rows = whole.split(rows_of_ranks(len(whole), dist.get_world_size(group)))[dist.get_rank(group)]
    stride = torch.empty(whole.shape, device="meta").stride()
    rows = rows.clone(memory_format=torch.contiguous_format)  # lest the whole stays in memory
    whole_shape: dict[str, Any] = {"shape": whole.shape, "stride": stride}
    return DTensor.from_local(rows, p.device_mesh, p.placements, run_check=False, **whole_shape)


def split_as(name: str, p: Any, saved: dict[str, Any]) -> dict[str, Any]:
    """A parameter's saved state, split as it is: what is whole is split here, what is split must be so alike.

    Raises:
        ValueError: state that is split otherwise, or of a parameter that is whole.
    """
    found = {}
    for key, value in saved.items():
        if is_dtensor(value):
            if not is_dtensor(p) or (value.device_mesh, value.placements) != (p.device_mesh, p.placements):
                raise ValueError(
                    f"state {key} of {name} is split over other ranks than its parameter: load it by "
                    "torch.distributed.checkpoint, or make it whole by full_tensor() where it is saved"
                )
            found[key] = value
        else:
            found[key] = split_like(p, value) if is_dtensor(p) and isinstance(value, Tensor) and value.ndim else value
    return found


class Exchange:
    """Tensors that belong to some parameters of one shape, split by rows, on their way to the owners and back.

    Every rank calls the same methods in the same order. What goes is known by its name.
    """

    def __init__(self, owners: Sequence[int], device: torch.device, group: Any):
        """owners: the rank of the group that owns each parameter."""
        self.device = device
        self.group, self.rank, self.world_size = group, dist.get_rank(group), dist.get_world_size(group)
        self.order = sorted(range(len(owners)), key=lambda i: owners[i])
        self.counts = [list(owners).count(rank) for rank in range(self.world_size)]
        self.own = [i for i in self.order if owners[i] == self.rank]
        self.under_way: dict[str, tuple[Tensor, Any, torch.dtype, torch.Size]] = {}

    def _sizes(self, shape: torch.Size) -> tuple[list[int], list[int]]:
        """Of tensors of this shape: numbers in this rank's rows of each owner's, and in each rank's rows of its own."""
        rows, width = rows_of_ranks(shape[0], self.world_size), shape[1:].numel()
        return [count * rows[self.rank] * width for count in self.counts], [len(self.own) * n * width for n in rows]

    def send(self, name: str, shape: torch.Size, rows: list[Tensor], wire_dtype: torch.dtype | None = None) -> None:
        """Begin to send this rank's rows of tensors of this shape, one a parameter, to the owners.

        wire_dtype: what is sent, by default their own dtype.
        """
        flat = torch.cat([rows[i].flatten() for i in self.order])
        sent, received = self._sizes(shape)
        self._begin(name, flat, sent, received, wire_dtype, shape)

    def arrived(self, name: str) -> list[Tensor]:
        """The tensors of own, whole; waits for them."""
        flat, shape = self._end(name)
        parts = flat.split(self._sizes(shape)[1])  # of each rank
        by_rank = [part.view(len(self.own), -1, *shape[1:]) for part in parts if part.numel()]
        return list(torch.cat(by_rank, dim=1).unbind()) if by_rank else []

    def send_back(
        self,
        name: str,
        shape: torch.Size,
        wholes: list[Tensor],
        dtype: torch.dtype,
        wire_dtype: torch.dtype | None = None,
    ) -> None:
        """Begin to send whole tensors of own, of this dtype, back to where their rows belong."""
        flat = torch.empty(0, dtype=dtype, device=self.device)
        if wholes:
            rows = torch.stack(wholes).split(rows_of_ranks(shape[0], self.world_size), dim=1)
            flat = torch.cat([part.flatten() for part in rows])
        received, sent = self._sizes(shape)
        self._begin(name, flat, sent, received, wire_dtype, shape)

    def came_back(self, name: str) -> list[Tensor]:
        """This rank's rows of every parameter's tensor; waits for them."""
        flat, shape = self._end(name)
        rows = rows_of_ranks(shape[0], self.world_size)[self.rank]
        by_owner = flat.view(len(self.order), rows, *shape[1:])
        found = dict(zip(self.order, by_owner.unbind(), strict=True))
        return [found[i] for i in range(len(self.order))]

    def _begin(
        self,
        name: str,
        flat: Tensor,
        sent: list[int],
        received: list[int],
        wire_dtype: torch.dtype | None,
        shape: torch.Size,
    ) -> None:
        dtype, flat = flat.dtype, flat.to(wire_dtype or flat.dtype)
        buffer = flat.new_empty(sum(received))
        work = dist.all_to_all_single(buffer, flat, received, sent, group=self.group, async_op=True)
        # The work keeps what is sent on CUDA, not everywhere.
        self.under_way[name] = buffer, (work, flat), dtype, shape

    def _end(self, name: str) -> tuple[Tensor, torch.Size]:
        buffer, (work, _), dtype, shape = self.under_way.pop(name)
        work.wait()
        return buffer.to(dtype), shape


def rounds(params: Sequence[Tensor], owners: Sequence[int], world_size: int) -> list[list[Tensor]]:
    """Parameters of one shape in rounds, in which every owner has about as many, and none more than a stack of them."""
    most = max(1, STACK_BYTES // (4 * params[0].numel()))
    found: list[list[Tensor]] = []
    counts = [0] * world_size
    for p, owner in zip(params, owners, strict=True):
        number = counts[owner] // most
        counts[owner] += 1
        found += [[] for _ in range(number + 1 - len(found))]
        found[number].append(p)
    return found


def pipeline(tasks: Iterable[Iterator[None]]) -> None:
    """Begin one task after the other; before the next begins, all that are under way go on to their next stop."""
    active: list[Iterator[None]] = []
    for task in tasks:
        next(task)
        active = [*(one for one in active if next(one, _DONE) is not _DONE), task]
    while active:
        active = [one for one in active if next(one, _DONE) is not _DONE]


_DONE = object()
