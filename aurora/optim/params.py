"""Parameter roles, and the check that every parameter is updated by exactly one optimizer."""

from collections.abc import Iterable
from typing import Literal, NamedTuple, get_args

import torch

Role = Literal["embed", "head", "matrix", "vector"]
ROLES: tuple[str, ...] = get_args(Role)


class Param(NamedTuple):
    """A parameter with its name in the model and its role.

    The role is given by whoever builds the model, never guessed from the shape: an embedding is a 2-D tensor too.
    """

    name: str
    tensor: torch.nn.Parameter
    role: Role


def check_exact_cover(params: Iterable[Param], optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Raise ValueError naming every parameter that no optimizer, or more than one group, would update."""
    times_covered: dict[int, int] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for tensor in group["params"]:
                times_covered[id(tensor)] = times_covered.get(id(tensor), 0) + 1
    problems = []
    for param in params:
        times = times_covered.pop(id(param.tensor), 0)
        if times != 1:
            problems.append(f"{param.name} is in {times} optimizer groups")
    if times_covered:
        problems.append(f"{len(times_covered)} parameters of the optimizers are not in the model")
    if problems:
        raise ValueError("every parameter must be in exactly one optimizer group: " + "; ".join(problems))
