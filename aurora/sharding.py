"""Whole matrices shared out over ranks: who owns which, and the two collectives that go with it.

Every matrix has one owner, which alone holds its optimizer state and computes its update. Gradients are summed into
the owner (reduce-scatter), new weights go back to everyone (all-gather). Per step and rank, S bytes of matrices cost
2 S (W-1)/W sent, against 3 S (W-1)/W for an all-reduce of gradients followed by the all-gather.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed both; the old names warn there and the new ones do not exist in 2.9.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def polar_cost(tensor: Tensor) -> int:
    """FLOPs of one quintic step on this matrix, the weight by which matrices are shared out."""
    short, long = sorted(tensor.shape)
    return 4 * long * short**2 + 2 * short**3


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


def reduce_to_owners(tensors: Sequence[Tensor], owners: Sequence[int]) -> None:
    """Sum each tensor over ranks, in place, on its owner; elsewhere the content is left as it was. Collective."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for chunks in _chunks_by_dtype(tensors, owners, world_size):
        send = _new_buffer(chunks)
        for owner, chunk in enumerate(chunks):
            _copy(_views(send[owner], chunk), chunk)
        received = torch.empty_like(send[rank])
        _reduce_scatter(received, send.flatten())
        _copy(chunks[rank], _views(received, chunks[rank]))


def gather_from_owners(tensors: Sequence[Tensor], owners: Sequence[int]) -> None:
    """Overwrite each tensor, in place, with its owner's content. Collective."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for chunks in _chunks_by_dtype(tensors, owners, world_size):
        received = _new_buffer(chunks)
        send = torch.zeros_like(received[rank])
        _copy(_views(send, chunks[rank]), chunks[rank])
        _all_gather(received.view(-1), send)
        for owner, chunk in enumerate(chunks):
            if owner != rank:
                _copy(chunk, _views(received[owner], chunk))


def _chunks_by_dtype(tensors: Sequence[Tensor], owners: Sequence[int], world_size: int) -> list[list[list[Tensor]]]:
    """For each dtype, the tensors of each rank: one buffer and one collective a dtype."""
    by_dtype: dict[torch.dtype, list[list[Tensor]]] = {}
    for tensor, owner in zip(tensors, owners, strict=True):
        by_dtype.setdefault(tensor.dtype, [[] for _ in range(world_size)])[owner].append(tensor)
    return list(by_dtype.values())


def _new_buffer(chunks: list[list[Tensor]]) -> Tensor:
    """Zeros of shape (ranks, elements of the largest chunk)."""
    size = max(sum(tensor.numel() for tensor in chunk) for chunk in chunks)
    like = next(tensor for chunk in chunks for tensor in chunk)
    return like.new_zeros((len(chunks), size))


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:  # a rank may own nothing, and foreach refuses empty lists
        torch._foreach_copy_(targets, sources)


def _views(flat: Tensor, chunk: list[Tensor]) -> list[Tensor]:
    """Views of consecutive parts of flat, shaped like the tensors of the chunk."""
    sizes = [tensor.numel() for tensor in chunk]
    parts = flat[: sum(sizes)].split(sizes) if sizes else []
    return [part.view(tensor.shape) for part, tensor in zip(parts, chunk, strict=True)]
