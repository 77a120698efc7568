"""Whole matrices shared out over ranks: who owns which, and the collectives that go with it.

Every matrix has one owner, which alone holds its optimizer state and computes its update. Gradients are summed into
the owner, new weights go back to everyone while the next matrices are worked on. With S weights and W ranks, a rank
receives (W-1) times what it owns in the gradients' wire dtype, on the mean S (W-1)/W, and S without what it owns in the
weights' dtype. An all-reduce of gradients and an all-gather of weights would send three times S (W-1)/W. For gpt2_small
on 8 ranks, bfloat16 on the wire: 149 + 297 MB for the matrices, and 271 MB for the all-reduce of embedding, head and
vectors. `python scripts/benchmark.py scale` tells of other sizes.

Gradients arrive from all ranks before they are summed: an owner holds W times its largest matrix. With more ranks than
matrices of a size, few ranks do all the work of that size. fully_shard has no such limits: see fsdp.py.
"""

from __future__ import annotations  # a torch without torch.distributed has no dist.Work

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# The most that all-gathers hold beside the weights: enough that a collective's latency does not count.
GATHER_BYTES = 2**28


def _all_gather(output: Tensor, input: Tensor, group: Any) -> dist.Work:
    # torch 2.13 renamed it; the old name warns there and the new one does not exist in 2.9.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return all_gather(output, input, group=group, async_op=True)


def polar_cost(shape: Sequence[int]) -> int:
    """FLOPs of two polynomials of polar() on a matrix of this shape, the weight by which matrices are shared out."""
    short, long = sorted(shape)
    return min(8 * long * short**2 + 4 * short**3, 4 * long * short**2 + 10 * short**3)


def assign_owners(costs: Sequence[int], rank_loads: list[int]) -> list[int]:
    """Owner of each matrix: largest cost first, each to the least loaded rank (ties to the lowest rank).

    Args:
        costs: one cost a matrix.
        rank_loads: load of each rank so far; updated in place.

    Returns:
        One rank a matrix, in the order of costs. Equal input gives equal output on every rank.
    """
    owners = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min(range(len(rank_loads)), key=lambda r: (rank_loads[r], r))
        owners[index] = rank
        rank_loads[rank] += costs[index]
    return owners


def sum_to_owners(
    tensors: Sequence[Tensor], owners: Sequence[int], wire_dtype: torch.dtype | None = None, group: Any = None
) -> Iterator[None]:
    """Sum each tensor over ranks, in place, on its owner; elsewhere the content is left as it was. Collective.

    Parts are sent to their owner as they are, in wire_dtype (by default the tensors' own), and summed there in
    float32 in the order of ranks: a reduce-scatter would round every partial sum. See complete() for how to call it.
    """
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    exchanges = []
    for dtype, chunks in _chunks_by_dtype(tensors, owners, world_size).items():
        own = chunks[rank]
        sizes, own_size = [_size(chunk) for chunk in chunks], _size(own)
        send = tensors[0].new_empty(sum(sizes), dtype=wire_dtype or dtype)
        for part, chunk in zip(send.split(sizes), chunks, strict=True):
            _copy(_views(part, chunk), chunk)
        exchanges.append((own, *_exchange(send, [own_size] * world_size, sizes, group)))
    yield
    for own, received, work in exchanges:
        work.wait()
        _copy(own, _views(_sum_of_rows(received.view(world_size, _size(own))), own))


def sum_to_all(tensors: Sequence[Tensor], wire_dtype: torch.dtype | None = None, group: Any = None) -> Iterator[None]:
    """Sum tensors of one dtype over ranks, in place, on every rank. Collective.

    In a wire_dtype other than their own, terms and sums are rounded to it, once each. For calling it see complete().
    """
    world_size = dist.get_world_size(group)
    size = _size(tensors)
    share = -(-size // world_size)
    send = tensors[0].new_zeros(world_size * share, dtype=wire_dtype)
    _copy(_views(send, tensors), tensors)
    received, work = _exchange(send, [share] * world_size, [share] * world_size, group)
    yield
    work.wait()
    work = _all_gather(send, _sum_of_rows(received.view(world_size, share)).to(send.dtype), group)
    yield
    work.wait()
    _copy(tensors, _views(send, tensors))


def complete(sums: Iterable[Iterator[None]]) -> None:
    """Take sums that have begun, by next(), or not, to their end: all of them one collective further in each round."""
    sums = list(sums)
    while sums:
        sums = [one for one in sums if next(one, done) is not done]


done = object()


def _exchange(send: Tensor, received_sizes: list[int], sent_sizes: list[int], group: Any) -> tuple[Tensor, dist.Work]:
    received = send.new_empty(sum(received_sizes))
    return received, dist.all_to_all_single(received, send, received_sizes, sent_sizes, group=group, async_op=True)


def _sum_of_rows(rows: Tensor) -> Tensor:
    """(ranks, n) to (n,), in float32 at least, one row after the other: the same however tensors are bundled."""
    total = rows[0].to(torch.promote_types(rows.dtype, torch.float32), copy=True)
    for row in rows[1:]:
        total += row
    return total


class Gather(NamedTuple):
    """Tensors of one size on their way from their owners to all."""

    wait: Callable[[], None]  # until they are there
    num_bytes: int  # that are held until then


def begin_gathers(tensors: Sequence[Tensor], owners: Sequence[int], group: Any = None) -> Iterator[Gather]:
    """Begin, one after the other, to overwrite tensors of one size and dtype with their owners' content. Collective.

    Nothing is padded: see gather_plan().
    """
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    rounds, single = gather_plan(owners, world_size, tensors[0].numel() * tensors[0].element_size())
    for members in rounds:
        chunks = [[tensors[i] for i in members if owners[i] == owner] for owner in range(world_size)]
        yield _all_gather_of(chunks, rank, group)
    for i in single:
        yield _broadcast(tensors[i], owners[i], rank, group)


def gather_plan(owners: Sequence[int], world_size: int, num_bytes: int) -> tuple[list[list[int]], list[int]]:
    """How tensors of num_bytes each, by their numbers, go from their owners to all.

    Returns:
        What goes by one all-gather each, as many tensors of every rank and at most GATHER_BYTES; and what is broadcast,
        in place: what is left where owners have more than others, and all where one of each would be more.
    """
    by_owner: list[list[int]] = [[] for _ in range(world_size)]
    for i, owner in enumerate(owners):
        by_owner[owner].append(i)
    each = GATHER_BYTES // (world_size * num_bytes)
    num_even = min(map(len, by_owner)) if each else 0
    rounds = [
        [i for own in by_owner for i in own[first : min(first + each, num_even)]]
        for first in range(0, num_even, each or 1)
    ]
    return rounds, sorted(i for own in by_owner for i in own[num_even:])


def _all_gather_of(chunks: list[list[Tensor]], rank: int, group: Any) -> Gather:
    """Of as many numbers of each rank."""
    send = chunks[rank][0].new_empty(_size(chunks[rank]))
    _copy(_views(send, chunks[rank]), chunks[rank])
    received = send.new_empty((len(chunks), send.numel()))
    work = _all_gather(received.view(-1), send, group)

    def wait() -> None:
        work.wait()
        for owner, chunk in enumerate(chunks):
            if owner != rank:
                _copy(chunk, _views(received[owner], chunk))

    return Gather(wait, received.numel() * received.element_size())


def _broadcast(tensor: Tensor, owner: int, rank: int, group: Any) -> Gather:
    content = tensor.detach().contiguous()  # memory is sent, whatever its order
    is_copy = content.data_ptr() != tensor.data_ptr()
    work = dist.broadcast(content, group_src=owner, group=group, async_op=True)

    def wait() -> None:
        work.wait()
        if is_copy and owner != rank:
            tensor.copy_(content)

    return Gather(wait, content.numel() * content.element_size() if is_copy else 0)


class GathersUnderWay:
    """Gathers that have begun; they are awaited in order, so that what they hold stays below GATHER_BYTES, or is one
    alone."""

    def __init__(self) -> None:
        self.begun: collections.deque[Gather] = collections.deque()

    def add(self, gathers: Iterable[Gather]) -> None:
        for gather in gathers:
            self.begun.append(gather)
            while sum(one.num_bytes for one in self.begun) > GATHER_BYTES and len(self.begun) > 1:
                self.begun.popleft().wait()

    def wait(self) -> None:
        while self.begun:
            self.begun.popleft().wait()


def gather_states(
    params: Sequence[Tensor],
    owners: Sequence[int],
    states: Mapping[Tensor, dict[str, Tensor]],
    group: Any = None,
    to: int | None = None,
) -> dict[Tensor, dict[str, Tensor]]:
    """The states of parameters, which their owners hold, on rank `to` or on all; elsewhere nothing. Collective."""
    rank = dist.get_rank(group)
    layout = {i: {key: (value.shape, value.dtype) for key, value in states[p].items()}
              for i, p in enumerate(params) if states.get(p)}  # fmt: skip
    layouts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(layouts, layout, group=group)
    gathered: dict[Tensor, dict[str, Tensor]] = {}
    for index, (p, owner) in enumerate(zip(params, owners, strict=True)):
        for key, (shape, dtype) in layouts[owner].get(index, {}).items():
            # A broadcast sends memory, whatever its order, and on the device of the ranks' weights.
            own = states[p][key].to(p.device).contiguous() if owner == rank else None
            value = torch.empty(shape, dtype=dtype, device=p.device) if own is None else own
            dist.broadcast(value, group_src=owner, group=group)
            if to in (None, rank):
                as_it_lies = torch.empty_like(p, dtype=dtype) if shape == p.shape else torch.empty_like(value)
                gathered.setdefault(p, {})[key] = as_it_lies.copy_(value)
    return gathered


def _chunks_by_dtype(
    tensors: Sequence[Tensor], owners: Sequence[int], world_size: int
) -> dict[torch.dtype, list[list[Tensor]]]:
    """For each dtype, the tensors of each rank: one buffer and one collective a dtype."""
    by_dtype: dict[torch.dtype, list[list[Tensor]]] = {}
    for tensor, owner in zip(tensors, owners, strict=True):
        by_dtype.setdefault(tensor.dtype, [[] for _ in range(world_size)])[owner].append(tensor)
    return by_dtype


def _size(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    if targets:  # a rank may own nothing, and foreach refuses empty lists
        torch._foreach_copy_(list(targets), list(sources))


def _views(flat: Tensor, chunk: Sequence[Tensor]) -> list[Tensor]:
    """Views of consecutive parts of flat, shaped like the tensors of the chunk."""
    sizes = [tensor.numel() for tensor in chunk]
    parts = flat[: sum(sizes)].split(sizes) if sizes else []
    return [part.view(tensor.shape) for part, tensor in zip(parts, chunk, strict=True)]
