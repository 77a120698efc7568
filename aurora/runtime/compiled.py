"""Whether and how the model is compiled."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from aurora.runtime import fused
from aurora.runtime.fused import KernelFailed
from aurora.runtime.ranks import Ranks
from configs.schema import Exit, HarnessError

# What takes inputs and targets (B, T) to the summed loss.
Model = Callable[[Tensor, Tensor], Tensor]
Result = TypeVar("Result")


class CompileFailed(Exception):
    """A compiler failed on some rank; raised by all."""


class WrongGradient(Exception):
    """Compiled code gives another gradient than what was compiled."""


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
    except (TorchDynamoException, InductorError, KernelFailed, WrongGradient) as error:
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
        how = " block by block" * (ranks.world_size > 1) + ", Triton kernels of ours in it" * fused.is_on
        ranks.say(f"model: compiled{how}; {prepare(compiled)}")
        return compiled
    except CompileFailed as error:
        torch._dynamo.reset()
        reason = str(error)
    if fused.is_on:
        ranks.say(f"kernels: torch's alone, for {reason}")
        fused.is_on = False
        return compiled_where_possible(model, mode, ranks, prepare)
    if mode == "on":
        raise HarnessError(Exit.CONFIG, f"train.compile = 'on', but {reason}; set it to 'off'")
    ranks.say(f"model: eager, for {reason}; {prepare(model)}")
    return model


# The largest relative difference between a parameter's two gradients that rounding may make, by the activations' dtype.
MAX_GRADIENT_ERROR = {torch.float32: 0.01, torch.bfloat16: 0.25}


def check_gradients(compiled: Model, model: nn.Module, batch: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    """Raise WrongGradient where compiled code gives other gradients of a batch than the model in torch's own kernels.

    torch 2.11 lost, without a word, the gradient of queries and keys. Weights must be such that all parameters have
    one. The model takes the batch in eighths, since uncompiled it keeps more for its backward pass.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    compiled(*batch).backward()
    norms = torch.stack(torch._foreach_norm([p.grad for p in params]))
    with fused.turned_off():
        for part in zip(*(tokens.split(max(1, len(tokens) // 8)) for tokens in batch), strict=True):
            (-model(*part)).backward()
    errors = torch.stack(torch._foreach_norm([p.grad for p in params])) / norms.clamp(min=torch.finfo(norms.dtype).tiny)
    worst = errors.nan_to_num(nan=torch.inf).argmax().item()
    if not errors[worst] <= MAX_GRADIENT_ERROR[dtype]:
        name = [name for name, p in model.named_parameters() if p.requires_grad][worst]
        raise WrongGradient(f"compiled code gives another gradient of {name} than the model itself")


def compiled_parts(model: nn.Module) -> Model:
    """The model with one graph for all blocks: gradients arrive block by block, and their sum over ranks can begin.

    A graph of the whole model hands them over at its end, all at once.
    """
    embedded, loss = (torch.compile(part, dynamic=False) for part in (model.embedded, model.loss))
    blocks = [torch.compile(block, dynamic=False) for block in model.blocks]

    def call(inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        x_BTD, branch_BTD = embedded(inputs_BT), None
        for block in blocks:
            x_BTD, branch_BTD = block(x_BTD, branch_BTD)
        return loss(x_BTD, branch_BTD, targets_BT)

    return call
