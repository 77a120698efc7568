"""Tasks that may fail on some rank alone, because a compiler or a kernel does."""

import sys
from collections.abc import Callable
from typing import Any, TypeVar

from aurora.fast.hopper import KernelFailed
from aurora.trainer.process import first_line
from aurora.trainer.ranks import Ranks

Result = TypeVar("Result")


class Unusable(Exception):
    """A way of computing the model that does not work here; raised by all ranks."""


class WrongNumbers(Exception):
    """A way of computing the model that gives other numbers than the model."""


def attempt(ranks: Ranks, task: Callable[[], Result]) -> Result:
    """The result of a task that has no collectives of its own. Collective.

    Raises:
        Unusable: on all ranks alike, so that none waits for another in a collective that the other never begins.
    """
    result: Any = None
    reason = None
    try:
        result = task()
    except (KernelFailed, WrongNumbers) as error:
        reason = first_line(error)
    except compiler_errors() as error:
        reason = f"torch.compile failed: {first_line(error)}"
    for rank, theirs in enumerate(ranks.all_gather_object(reason)):
        if theirs:
            raise Unusable(f"{theirs}{f' (rank {rank})' * (ranks.world_size > 1)}")
    return result


def compiler_errors() -> tuple[type[Exception], ...]:
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and importing it takes a second
        return ()
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    return TorchDynamoException, InductorError
