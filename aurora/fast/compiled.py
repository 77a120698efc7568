"""Whether and how the model is compiled."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from aurora.errors import Exit, HarnessError
from aurora.fast import fused
from aurora.fast.fused import KernelFailed
from aurora.trainer.ranks import Ranks, is_out_of_memory

# What takes inputs and targets (B, T) to the summed loss.
Model = Callable[[Tensor, Tensor], Tensor]
Result = TypeVar("Result")


class CompileFailed(Exception):
    """A compiler failed on some rank; raised by all."""


class WrongNumbers(Exception):
    """Compiled code computes something else than what was compiled."""


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
    except (TorchDynamoException, InductorError, KernelFailed, WrongNumbers) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
    for rank, theirs in enumerate(ranks.all_gather_object(reason)):
        if theirs:
            raise CompileFailed(f"torch.compile failed{f' on rank {rank}' * (ranks.world_size > 1)}: {theirs}")
    return result


def compiled_where_possible(model: nn.Module, mode: str, ranks: Ranks, prepare: Callable[[Model], str]) -> Model:
    """The model to call, prepared: compiled where train.compile says so and the compiler can; rank 0 says what it is.

    prepare() runs everything once, since only then a compiler may fail, and raises CompileFailed where one does; it
    returns what else to say. Where the kernels of aurora/fast/fused.py fail, the compiler's own take their place.
    """
    if mode == "off" or (mode == "auto" and ranks.device.type != "cuda"):
        ranks.say(f"model: eager (train.compile = {mode!r} on {ranks.device.type}); {prepare(model)}")
        return model
    for with_kernels in (True, False) if fused.is_on else (False,):
        fused.is_on = with_kernels
        try:
            compiled = torch.compile(model, dynamic=False) if ranks.world_size == 1 else compiled_parts(model)
            how = " block by block" * (ranks.world_size > 1) + ", with Triton kernels" * with_kernels
            ranks.say(f"model: compiled{how}; {prepare(compiled)}")
            return compiled
        except CompileFailed as error:
            torch._dynamo.reset()
            reason = str(error)
        if with_kernels:
            ranks.say(f"no Triton kernels, for {reason}")
    if mode == "on":
        raise HarnessError(Exit.CONFIG, f"train.compile = 'on', but {reason}; set it to 'off'")
    ranks.say(f"model: eager, for {reason}; {prepare(model)}")
    return model


# By how much, relatively, rounding may make a parameter's two gradients differ, and the two losses; by the activations'
# dtype. In bfloat16 rounding makes some per cent at random weights, and more where these or attention logits are large.
MAX_GRADIENT_ERROR = {torch.float32: 0.01, torch.bfloat16: 0.25}
MAX_LOSS_ERROR = {torch.float32: 1e-4, torch.bfloat16: 0.01}
# What is added to weights for it. Biases are zero before training, and small ones could be forgotten unnoticed.
RANDOM_STD, RANDOM_STD_OF_VECTORS = 0.01, 0.5


def check_compiled(
    compiled: Model, model: nn.Module, batch: tuple[Tensor, Tensor], val_batches: list[tuple[Tensor, Tensor]]
) -> None:
    """Raise WrongNumbers where compiled code gives other losses or gradients than the model itself.

    torch 2.11, for one, lost the gradient of queries and keys without a word. Makes all weights random, for those that
    are zero would hide the gradients of others, and leaves them so. The model itself takes a batch in eighths, since
    uncompiled it keeps more for its backward pass; where even so it runs out of memory, nothing is checked.
    """
    generator = torch.Generator(batch[0].device).manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            std = RANDOM_STD if p.ndim > 1 else RANDOM_STD_OF_VECTORS
            p.add_(torch.randn(p.shape, generator=generator, device=p.device), alpha=std)
    with model.weights_at_rest():
        compare_with_model(compiled, model, batch, val_batches)
    model.zero_grad()


def compare_with_model(
    compiled: Model, model: nn.Module, batch: tuple[Tensor, Tensor], val_batches: list[tuple[Tensor, Tensor]]
) -> None:
    """check_compiled() at the weights that the model has. Leaves gradients behind."""
    params, dtype = dict(model.named_parameters()), model.activation_dtype
    part = max(1, len(batch[0]) // 8)
    loss = compiled(*batch)
    loss.backward()
    for p in params.values():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    norms = torch.stack(torch._foreach_norm([p.grad for p in params.values()]))
    with torch.no_grad():
        pairs = [[compiled(*looked_at), torch.zeros_like(loss)] for looked_at in val_batches]
    pairs.append([loss.detach(), torch.zeros_like(loss)])
    try:
        with fused.turned_off():
            for tokens, pair in zip([*val_batches, batch], pairs, strict=True):
                for inputs, targets in zip(*(side.split(part) for side in tokens), strict=True):
                    with torch.set_grad_enabled(pair is pairs[-1]):
                        loss = model(inputs, targets)
                    pair[1] += loss.detach()
                    if pair is pairs[-1]:
                        (-loss).backward()  # what is left is the difference
    except RuntimeError as error:
        if is_out_of_memory(error):
            return
        raise
    for found, expected in pairs:
        if not (found - expected).abs() <= MAX_LOSS_ERROR[dtype] * expected.abs():
            raise WrongNumbers(f"compiled code has a loss of {found.item():g}, the model itself of {expected.item():g}")
    differences = torch.stack(torch._foreach_norm([p.grad for p in params.values()]))
    errors = (differences / norms.clamp(min=torch.finfo(norms.dtype).tiny)).nan_to_num(nan=torch.inf)
    worst = errors.argmax().item()
    if not errors[worst] <= MAX_GRADIENT_ERROR[dtype]:
        name = list(params)[worst]
        raise WrongNumbers(f"compiled code gives another gradient of {name} than the model itself")


def compiled_parts(model: nn.Module) -> Model:
    """The model with one graph for all blocks: gradients arrive block by block, and their sum over ranks can begin.

    A graph of the whole model hands them over at its end, all at once.
    """
    embedded, loss = (torch.compile(part, dynamic=False) for part in (model.embedded, model.loss))
    blocks = [torch.compile(block, dynamic=False) for block in model.blocks]

    def call(inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        x_BTD, normed_BTD = embedded(inputs_BT)
        for block, gain_D in zip(blocks, model.next_gains(), strict=True):
            x_BTD, normed_BTD = block(x_BTD, normed_BTD, gain_D)
        return loss(normed_BTD, targets_BT)

    return call
