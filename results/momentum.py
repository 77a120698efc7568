"""Momentum of chosen matrices at chosen steps, recorded from a run, for scripts/benchmark.py to replay."""

import fnmatch
from pathlib import Path

import torch

import aurora
from configs.schema import Exit, HarnessError


def record_momentum(
    optimizer: torch.optim.Optimizer, pattern: str, first_step: str, last_step: str, step: int, folder: Path
) -> None:
    """Have the optimizer write FOLDER/stepNNNNNN.rankN.pt after each of its steps from first_step to last_step.

    A file holds {"step", "momentum": {name: (M, N) float32, what direction() saw}} of the matrices that this rank owns
    and whose names match the pattern (as of a shell). Steps count from 1. Writing takes time that the clock sees, so
    such a run is not one to compare seconds with.

    Args:
        optimizer: the run's matrix optimizer.
        step: steps that it has taken already.

    Raises:
        HarnessError: CONFIG, when the optimizer has no momentum, nothing matches or the steps are none.
    """
    if not isinstance(optimizer, aurora.MatrixOptimizer):
        raise HarnessError(Exit.CONFIG, f"--dump-momentum needs a matrix optimizer, not {type(optimizer).__name__}")
    (group,) = optimizer.param_groups
    named = dict(zip(group["param_names"], group["params"], strict=True))
    names = fnmatch.filter(named, pattern)
    if not names:
        raise HarnessError(Exit.CONFIG, f"--dump-momentum: no matrix matches {pattern!r}; there are {', '.join(named)}")
    if not (first_step.isdecimal() and last_step.isdecimal() and 1 <= int(first_step) <= int(last_step)):
        raise HarnessError(Exit.CONFIG, f"--dump-momentum: no steps from {first_step} to {last_step}; they begin at 1")
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    folder.mkdir(parents=True, exist_ok=True)

    def write(optimizer: aurora.MatrixOptimizer, args: tuple, kwargs: dict) -> None:
        nonlocal step
        step += 1
        if int(first_step) <= step <= int(last_step):
            own = [name for name in names if optimizer.owner_of(named[name]) == rank]
            momentum = optimizer.lookahead([named[name] for name in own], group) if own else []
            by_name = {name: X_MN.cpu() for name, X_MN in zip(own, momentum, strict=True)}
            torch.save({"step": step, "momentum": by_name}, folder / f"step{step:06d}.rank{rank}.pt")

    optimizer.register_step_post_hook(write)
