"""Momentum of chosen matrices at chosen steps, recorded from a run, for scripts/benchmark.py to replay."""

import fnmatch
from pathlib import Path
from typing import NamedTuple

import torch

import aurora
from aurora.errors import Exit, HarnessError


class Dump(NamedTuple):
    """What --dump-momentum asks for: matrices by name, steps from 1."""

    names: list[str]
    first_step: int
    last_step: int


def checked_dump(
    optimizer: torch.optim.Optimizer, num_steps: int, pattern: str, first_step: str, last_step: str
) -> Dump:
    """The arguments of --dump-momentum as numbers and names. The pattern is as of a shell.

    Args:
        optimizer: the run's matrix optimizer.

    Raises:
        HarnessError: CONFIG, when the optimizer has no momentum, nothing matches or the run has no such steps.
    """
    if not isinstance(optimizer, aurora.MatrixOptimizer):
        raise HarnessError(Exit.CONFIG, f"--dump-momentum needs a matrix optimizer, not {type(optimizer).__name__}")
    group = optimizer.param_groups[0]
    names = fnmatch.filter(group["param_names"], pattern)
    if not names:
        known = ", ".join(group["param_names"])
        raise HarnessError(Exit.CONFIG, f"--dump-momentum: no matrix matches {pattern!r}; there are {known}")
    is_range = first_step.isdecimal() and last_step.isdecimal()
    if not (is_range and 1 <= int(first_step) <= int(last_step) <= num_steps):
        message = f"--dump-momentum: no steps from {first_step} to {last_step}; they go from 1 to {num_steps}"
        raise HarnessError(Exit.CONFIG, message)
    return Dump(names, int(first_step), int(last_step))


def record_momentum(optimizer: torch.optim.Optimizer, dump: Dump, step: int, folder: Path) -> None:
    """Have the optimizer write FOLDER/stepNNNNNN.rankN.pt after each of the dump's steps.

    A file holds {"step", "momentum": {name: (M, N) float32, what direction() saw}} of the matrices that this rank owns
    and that the dump names. Writing takes time that the clock sees, so such a run is not one to compare seconds with.

    Args:
        step: steps that the optimizer has taken already.
    """
    group = optimizer.param_groups[0]
    named = dict(zip(group["param_names"], group["params"], strict=True))
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    folder.mkdir(parents=True, exist_ok=True)

    def write(optimizer: aurora.MatrixOptimizer, args: tuple, kwargs: dict) -> None:
        nonlocal step
        step += 1
        if dump.first_step <= step <= dump.last_step:
            own = [name for name in dump.names if optimizer.owner_of(named[name]) == rank]
            by_name = {name: optimizer.lookahead([named[name]], group)[0].cpu() for name in own}
            torch.save({"step": step, "momentum": by_name}, folder / f"step{step:06d}.rank{rank}.pt")

    optimizer.register_step_post_hook(write)
