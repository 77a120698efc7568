"""The memory that a run needs, and how large a part of a batch fits into that of every rank."""

import contextlib
import functools
import gc
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

import aurora
from aurora.config import Config
from aurora.errors import Exit, HarnessError, is_out_of_memory
from aurora.fast.functions import PART_ELEMENTS
from aurora.trainer.attempt import attempt
from aurora.trainer.batch import BatchPlan, halvings, plan_batch
from aurora.trainer.ranks import Ranks
from aurora.trainer.state import Run

SPARE_GIB = 0.5  # for fragments, and what else comes and goes


def available_gib(ranks: Ranks) -> float:
    """Memory that the rank with the least may use. Collective."""
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()  # what torch keeps for later use counts as taken
        num_bytes: float = torch.cuda.mem_get_info(ranks.device)[0]
    else:
        num_bytes = host_bytes() / ranks.world_size
    least = torch.tensor([num_bytes / 2**30], dtype=torch.float32, device=ranks.device)
    return ranks.all_reduce(least, dist.ReduceOp.MIN).item()


def host_bytes(control_group: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory of this machine, or what its container may use of it."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # version 2 and 1 of control groups
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            limits.append(int((control_group / name).read_text()))
    return min(limits)


def first_that_fits(sizes: Sequence[int], try_size: Callable[[int], None], ranks: Ranks, taken_gib: float = 0.0) -> int:
    """The first size whose try_size() no rank runs out of memory with. Collective; attempts themselves may not be.

    Args:
        sizes: from large to small.
        try_size: leaves nothing behind but what attempts with all sizes leave alike.
        taken_gib: that later joins what attempts use, and is held meanwhile.

    Raises:
        HarnessError: CONFIG, when not even the last fits.
        Unusable: where an attempt fails for that, on any rank.
    """
    for size in sizes:
        does_fit = attempt(ranks, functools.partial(fits, size, try_size, ranks, taken_gib))
        failure = torch.tensor([not does_fit], device=ranks.device, dtype=torch.int64)
        has_failed = ranks.all_reduce(failure, dist.ReduceOp.MAX).item()
        gc.collect()
        if ranks.device.type == "cuda":
            torch.cuda.empty_cache()  # libraries beside torch need some memory, too
        if not has_failed:
            return size
        torch._dynamo.reset()  # graphs of that size, which count against the limit of graphs
    raise HarnessError(Exit.CONFIG, f"out of memory even with a micro-batch of {sizes[-1]}; use a smaller model")


def fits(size: int, try_size: Callable[[int], None], ranks: Ranks, taken_gib: float) -> bool:
    try:
        held = torch.empty(int((taken_gib + SPARE_GIB) * 2**30), dtype=torch.uint8, device=ranks.device)
        try_size(size)
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
        del held
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def fit_micro_batch(run: Run, try_plan: Callable[[BatchPlan], None], keeps_little: bool) -> BatchPlan:
    """Halve the micro-batch of a run until try_plan() fits into the memory of every rank. Collective.

    keeps_little: whether the forward pass is the fast one or compiled.
    """
    ranks, params = run.ranks, run.model.roles()

    def try_size(size: int) -> None:
        try_plan(plan_batch(run.config, ranks.world_size, size))

    sizes = halvings(run.plan)
    what = run.config, params, run.optimizers, ranks.world_size
    gib = {size: memory_estimate_gib(*what, size, keeps_little) for size in sizes}
    # The estimate is for eager mode, and compiled code keeps less: what it puts far too high is not worth compiling.
    # Where the host's memory is used, no attempt fails: the kernel would kill this process, or others.
    limit_gib = (2 if ranks.device.type == "cuda" else 0.5) * available_gib(ranks)
    sizes = [size for size in sizes if sum(gib[size].values()) < limit_gib] or sizes[-1:]
    if run.is_split:  # its passes are collective: a rank that failed alone would keep the others waiting
        limit_gib = available_gib(ranks)
        sizes = [size for size in sizes if sum(gib[size].values()) < limit_gib] or sizes[-1:]
        return plan_batch(run.config, ranks.world_size, sizes[0])
    # Warm-up keeps a copy of the weights, and gradients on their way to other ranks are copies, too.
    later_gib = gib[1]["optimizer state"] + gib[1]["weights"] * (2 if ranks.world_size > 1 else 1)
    return plan_batch(run.config, ranks.world_size, first_that_fits(sizes, try_size, ranks, later_gib))


def params_by_role(params: list[aurora.Param]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for param in params:
        counts[param.role] = counts.get(param.role, 0) + param.tensor.numel()
    return counts


def memory_estimate_gib(
    config: Config,
    params: list[aurora.Param],
    optimizers: list[torch.optim.Optimizer],
    world_size: int,
    micro_batch: int,
    keeps_little: bool = True,
) -> dict[str, float]:
    """Weights, gradients and optimizer state by count; activations as what autograd keeps of one micro-step.

    Of the unedited model, eager: by the fast forward, or by the model itself, whose loss keeps float32 logits.
    """
    counts, model = params_by_role(params), config.model
    num_params, is_sharded_rule = sum(counts.values()), isinstance(optimizers[0], aurora.MatrixOptimizer)
    # AdamW keeps two floats a weight, a matrix rule one, on its owner.
    state: float = 2 * (num_params - counts["matrix"])
    state += counts["matrix"] / world_size if is_sharded_rule else 2 * counts["matrix"]
    rows = 1.0
    if config.train.shard == "fsdp2":  # matrices that are together at a time, some blocks, come with activations
        rows, state = 1 / world_size, (2 * num_params - counts["matrix"] * is_sharded_rule) / world_size
    width = 4 if model.activation_dtype == "float32" else 2
    kept_by_mlp = (4 if model.mlp == "swiglu" else 2) * model.mlp_expansion
    per_block = (12 + kept_by_mlp) * model.model_dim * width
    is_kept = not config.train.recompute  # else of all blocks their input alone, and one block is at work
    per_token = model.num_layers * per_block if is_kept else model.num_layers * 4 * model.model_dim + per_block
    # Logits, which their gradient overwrites, and what a head in float8 makes of it.
    per_token += model.vocab_size * (width + (model.head_dtype == "float8"))
    logits = micro_batch * model.seq_len * model.vocab_size
    sizes = {
        "weights": 4 * num_params * rows + (width * (counts["matrix"] + counts["head"]) if width < 4 else 0) * rows,
        "gradients": 4 * num_params * rows,
        "optimizer state": 4 * state,
        "activations": micro_batch * model.seq_len * per_token,
        # float32 copies of a part of the logits, or of all, with their gradients.
        "loss": 5 * 4 * min(logits, PART_ELEMENTS) if keeps_little else 8 * 4 * logits,
    }
    return {name: size / 2**30 for name, size in sizes.items()}
