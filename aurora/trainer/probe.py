"""What an optimizer of others does with a run's interface, found out on tiny parameters before anything else.

Does it step on a gradient alone, and go by the lr that it is given? Is all that it remembers in its state_dict()?
"""

import contextlib
import inspect
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from aurora.optim.external import described, give, has_eval_weights, two_gradients
from aurora.trainer.ranks import digest

MOST = 8  # rows and columns of a tiny parameter
STEPS_BEFORE, STEPS_AFTER = 3, 2  # the state_dict
LR = 0.01  # whatever the run has: one at which these steps stay finite
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class NotSuited(Exception):
    """Why an optimizer cannot take part in a run."""


def tiny(shape: torch.Size) -> torch.Size:
    return torch.Size(min(size, MOST) for size in shape)


def probe(make: Make, shapes: list[torch.Size], device: torch.device) -> str:
    """Why a run with this optimizer could not go on from a checkpoint; empty where it could. Leaves torch's generator
    as it is.

    Args:
        make: gives a new optimizer of parameters.
        shapes: of the parameters that it will have.

    Raises:
        NotSuited: it needs more than a gradient in each step, or goes by another lr than that of its groups.
    """
    kinds = list(dict.fromkeys(map(tiny, shapes)))
    weights = [torch.linspace(-1, 1, shape.numel(), device=device).view(shape) for shape in kinds]
    with torch.random.fork_rng([device] if device.type == "cuda" else []), force_eager():
        first, params = start(make, weights)
        check_protocol(first)
        try:
            for step in range(STEPS_BEFORE):
                take_step(first, params, step)
        except Exception as error:
            raise NotSuited(f"its step() fails on gradients alone: {described(error)}") from error
        check_zeros(make, weights)
        check_lr(make, weights, first, params)
        try:
            return loss_of_state(make, first, params)
        except Exception as error:
            return f"its state cannot be saved and loaded: {described(error)}"


def start(make: Make, weights: list[Tensor]) -> tuple[Any, list[nn.Parameter]]:
    """A new optimizer of parameters with these weights, always with the same random numbers."""
    torch.manual_seed(0)
    params = [nn.Parameter(weight.clone()) for weight in weights]
    optimizer: Any = make(params)
    if has_eval_weights(optimizer):
        optimizer.train()
    return optimizer, params


def take_step(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], step: int, lr: float = LR) -> None:
    """One step on a gradient that depends on step and weights."""
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.device) + p.detach()
    for group in optimizer.param_groups:
        give(group, {"lr": lr})
    optimizer.step()


def check_protocol(optimizer: torch.optim.Optimizer) -> None:
    if why := two_gradients(optimizer):
        raise NotSuited(why)
    parameters = inspect.signature(optimizer.step).parameters.values()
    optional = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    if needed := [p.name for p in parameters if p.default is p.empty and p.kind not in optional]:
        why = ": it evaluates the loss as often as it likes, while a step here has one gradient of one batch"
        raise NotSuited(f"its step() needs a {needed[0]}{why if needed[0] == 'closure' else ''}")


def check_zeros(make: Make, weights: list[Tensor]) -> None:
    """Raise NotSuited where it cannot begin with gradients of zeros. The model's blocks have such in their first step,
    since its head begins with zeros."""
    optimizer, params = start(make, weights)
    for p in params:
        p.grad = torch.zeros_like(p)
    try:
        optimizer.step()
    except Exception as error:
        text = "its step() fails on gradients of zeros, which blocks have in the first step, below a head of zeros"
        raise NotSuited(f"{text}: {described(error)}") from error


def check_lr(make: Make, weights: list[Tensor], first: torch.optim.Optimizer, params: list[nn.Parameter]) -> None:
    """Raise NotSuited where half the lr changes nothing, or a step leaves another lr in a group."""
    for group in first.param_groups:
        if abs(float(group["lr"]) - LR) > 1e-6 * LR:
            raise NotSuited("its step() changes the lr of its groups, so that the record could not tell which it had")
    slower, slower_params = start(make, weights)
    for step in range(STEPS_BEFORE):
        take_step(slower, slower_params, step, LR / 2)
    if digest(params) == digest(slower_params):
        raise NotSuited("it does not go by the lr of its groups: half of it gives the same weights")


def loss_of_state(make: Make, first: torch.optim.Optimizer, params: list[nn.Parameter]) -> str:
    """What another instance does otherwise after it has loaded the state of the first."""
    file = io.BytesIO()
    torch.save({"optimizer": first.state_dict(), "rng": torch.get_rng_state()}, file)
    saved, loaded = load_again(file), load_again(file)
    second, copies = start(make, [p.detach() for p in params])
    second.load_state_dict(loaded["optimizer"])
    if digest(second.state_dict()) != digest(saved["optimizer"]):
        return "what it loads is not what its state_dict() holds"
    for optimizer, own in ((first, params), (second, copies)):
        torch.set_rng_state(saved["rng"])
        for step in range(STEPS_BEFORE, STEPS_BEFORE + STEPS_AFTER):
            take_step(optimizer, own, step)
    is_same = digest(params) == digest(copies)
    return "" if is_same else "it keeps more than its state_dict() holds, so that other weights come of it"


def load_again(file: io.BytesIO) -> dict[str, Any]:
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)  # as checkpoints are


def force_eager() -> contextlib.AbstractContextManager[None]:
    """A context in which what an optimizer compiles runs as it is written."""
    stance: Any = torch.compiler.set_stance("force_eager")
    return stance
