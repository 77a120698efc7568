"""Whether and how the model is compiled."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from aurora.runtime.ranks import Ranks
from configs.schema import Exit, HarnessError

# What takes inputs and targets (B, T) to the summed loss.
Model = Callable[[Tensor, Tensor], Tensor]
Result = TypeVar("Result")


class CompileFailed(Exception):
    """A compiler failed on some rank; raised by all."""


def agreed(ranks: Ranks, task: Callable[[], Result]) -> Result:
    """The result of a task that compiles and has no collectives of its own. Collective.

    Raises:
        CompileFailed: on all ranks alike, so that none waits for another in a collective that the other never begins.
    """
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    result, reason = None, None
    try:
        result = task()
    except (TorchDynamoException, InductorError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
    for rank, theirs in enumerate(ranks.all_gather_object(reason)):
        if theirs:
            raise CompileFailed(f"torch.compile failed{f' on rank {rank}' * (ranks.world_size > 1)}: {theirs}")
    return result


def compiled_where_possible(model: nn.Module, mode: str, ranks: Ranks, prepare: Callable[[Model], str]) -> Model:
    """The model to call, prepared: compiled where train.compile says so and the compiler can; rank 0 says what it is.

    prepare() runs everything once, since only then a compiler may fail, and raises CompileFailed where one does; it
    returns what else to say.
    """
    if mode == "off" or (mode == "auto" and ranks.device.type != "cuda"):
        ranks.say(f"model: eager (train.compile = {mode!r} on {ranks.device.type}); {prepare(model)}")
        return model
    try:
        compiled = torch.compile(model, dynamic=False) if ranks.world_size == 1 else compiled_parts(model)
        ranks.say(f"model: compiled{' block by block' * (ranks.world_size > 1)}; {prepare(compiled)}")
        return compiled
    except CompileFailed as error:
        if mode == "on":
            raise HarnessError(Exit.CONFIG, f"train.compile = 'on', but {error}; set it to 'off'") from error
        torch._dynamo.reset()
        reason = str(error)
    ranks.say(f"model: eager, for {reason}; {prepare(model)}")
    return model


def compiled_parts(model: nn.Module) -> Model:
    """The model with one graph for all blocks: gradients arrive block by block, and their sum over ranks can begin.

    A graph of the whole model hands them over at its end, all at once.
    """
    embedded, loss = (torch.compile(part, dynamic=False) for part in (model.embedded, model.loss))
    blocks = [torch.compile(block, dynamic=False) for block in model.blocks]

    def call(inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        x_BTD = embedded(inputs_BT)
        for block in blocks:
            x_BTD = block(x_BTD)
        return loss(x_BTD, targets_BT)

    return call
