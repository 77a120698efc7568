"""Whole matrices shared out over ranks: who owns which, and the two collectives that go with it.

Every matrix has one owner, which alone holds its optimizer state and computes its update. Gradients are summed into
the owner, new weights go back to everyone while the next matrices are worked on. With S weights and W ranks, a rank
sends S (W-1)/W numbers in the gradients' wire dtype and as many in the weights' dtype a step; an all-reduce of
gradients and an all-gather of weights would send three times S (W-1)/W. For gpt2_small on 8 ranks, bfloat16 on the
wire: 149 + 297 MB for the matrices, and 271 MB for the all-reduce of embedding, head and vectors.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed both; the old names warn there and the new ones do not exist in 2.9.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def polar_cost(tensor: Tensor) -> int:
    """FLOPs of two polynomials of polar() on this matrix, the weight by which matrices are shared out."""
    short, long = sorted(tensor.shape)
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


def reduce_to_owners(tensors: Sequence[Tensor], owners: Sequence[int], wire_dtype: torch.dtype | None = None) -> None:
    """Sum each tensor over ranks, in place, on its owner; elsewhere the content is left as it was. Collective.

    In a wire_dtype other than the tensors' own, parts are sent to their owner as they are and summed there in
    float32: a reduce-scatter would round every partial sum.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for dtype, chunks in _chunks_by_dtype(tensors, owners, world_size).items():
        send = _new_buffer(chunks, wire_dtype or dtype)
        for owner, chunk in enumerate(chunks):
            _copy(_views(send[owner], chunk), chunk)
        if send.dtype == dtype:
            received = torch.empty_like(send[rank])
            _reduce_scatter(received, send.flatten())
        else:
            received = sum_of_parts(send)
        _copy(chunks[rank], _views(received, chunks[rank]))


def all_reduce(flat: Tensor, wire_dtype: torch.dtype | None = None) -> None:
    """Sum a vector over ranks, in place. Collective.

    In a wire_dtype other than its own, terms and sum are rounded to it, once each.
    """
    world_size = dist.get_world_size()
    if wire_dtype in (None, flat.dtype):
        dist.all_reduce(flat)
        return
    padding = -flat.numel() % world_size
    send = torch.nn.functional.pad(flat.to(wire_dtype), (0, padding)).view(world_size, -1)
    total = torch.empty_like(send)
    _all_gather(total.view(-1), sum_of_parts(send).to(wire_dtype))
    flat.copy_(total.view(-1)[: flat.numel()])


def sum_of_parts(send: Tensor) -> Tensor:
    """(ranks, n) on every rank to the float32 sum, over ranks, of the row that is this rank's. Collective."""
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send)
    return received.float().sum(dim=0)


def gather_from_owners(tensors: Sequence[Tensor], owners: Sequence[int]) -> Callable[[], None]:
    """Begin to overwrite tensors of one dtype with their owners' content; call the result to wait. Collective."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    ((dtype, chunks),) = _chunks_by_dtype(tensors, owners, world_size).items()
    received = _new_buffer(chunks, dtype)
    send = torch.zeros_like(received[rank])
    _copy(_views(send, chunks[rank]), chunks[rank])
    work = _all_gather(received.view(-1), send, async_op=True)

    def wait() -> None:
        work.wait()
        for owner, chunk in enumerate(chunks):
            if owner != rank:
                _copy(chunk, _views(received[owner], chunk))

    return wait


def _chunks_by_dtype(
    tensors: Sequence[Tensor], owners: Sequence[int], world_size: int
) -> dict[torch.dtype, list[list[Tensor]]]:
    """For each dtype, the tensors of each rank: one buffer and one collective a dtype."""
    by_dtype: dict[torch.dtype, list[list[Tensor]]] = {}
    for tensor, owner in zip(tensors, owners, strict=True):
        by_dtype.setdefault(tensor.dtype, [[] for _ in range(world_size)])[owner].append(tensor)
    return by_dtype


def _new_buffer(chunks: list[list[Tensor]], dtype: torch.dtype) -> Tensor:
    """Zeros of shape (ranks, elements of the largest chunk)."""
    size = max(sum(tensor.numel() for tensor in chunk) for chunk in chunks)
    like = next(tensor for chunk in chunks for tensor in chunk)
    return like.new_zeros((len(chunks), size), dtype=dtype)


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:  # a rank may own nothing, and foreach refuses empty lists
        torch._foreach_copy_(targets, sources)


def _views(flat: Tensor, chunk: list[Tensor]) -> list[Tensor]:
    """Views of consecutive parts of flat, shaped like the tensors of the chunk."""
    sizes = [tensor.numel() for tensor in chunk]
    parts = flat[: sum(sizes)].split(sizes) if sizes else []
    return [part.view(tensor.shape) for part, tensor in zip(parts, chunk, strict=True)]
