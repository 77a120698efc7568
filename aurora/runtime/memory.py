"""How large a part of a batch fits into the memory of every rank."""

import gc
import os
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from aurora.runtime.compiled import agreed
from aurora.runtime.ranks import Ranks, is_out_of_memory
from configs.schema import Exit, HarnessError

SPARE_GIB = 0.5  # for fragments, and what else comes and goes


def available_gib(ranks: Ranks) -> float:
    """Memory that the rank with the least has to give. Collective."""
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()  # what torch keeps for later use counts as taken
        num_bytes = torch.cuda.mem_get_info(ranks.device)[0]
    else:
        num_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks.world_size
    least = torch.tensor([num_bytes / 2**30], dtype=torch.float32, device=ranks.device)
    return ranks.all_reduce(least, dist.ReduceOp.MIN).item()


def first_that_fits(sizes: Sequence[int], attempt: Callable[[int], None], ranks: Ranks, taken_gib: float = 0.0) -> int:
    """The first size whose attempt() no rank runs out of memory with. Collective; attempts themselves may not be.

    Args:
        sizes: from large to small.
        attempt: leaves nothing behind but what attempts with all sizes leave alike.
        taken_gib: that later joins what attempts use, and is held meanwhile.

    Raises:
        HarnessError: CONFIG, when not even the last fits.
        CompileFailed: where an attempt fails for that, on any rank.
    """
    for size in sizes:
        does_fit = agreed(ranks, lambda size=size: fits(size, attempt, ranks, taken_gib))
        has_failed = torch.tensor([not does_fit], device=ranks.device, dtype=torch.int64)
        has_failed = ranks.all_reduce(has_failed, dist.ReduceOp.MAX).item()
        gc.collect()
        if ranks.device.type == "cuda":
            torch.cuda.empty_cache()  # libraries beside torch need some memory, too
        if not has_failed:
            return size
        torch._dynamo.reset()  # graphs of that size, which count against the limit of graphs
    raise HarnessError(Exit.CONFIG, f"out of memory even with a micro-batch of {sizes[-1]}; use a smaller model")


def fits(size: int, attempt: Callable[[int], None], ranks: Ranks, taken_gib: float) -> bool:
    try:
        held = torch.empty(int((taken_gib + SPARE_GIB) * 2**30), dtype=torch.uint8, device=ranks.device)
        attempt(size)
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
        del held
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True
