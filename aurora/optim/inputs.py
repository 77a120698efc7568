"""What a rule's direction() may ask for beside the momentum, by naming it as a keyword-only argument.

    G_KMN   (K, M, N) float32: the gradients
    W_KMN   (K, M, N) float32: the weights before the step
    step    0-dim float32 on the CPU, where it may be read without waiting for a device: how many steps these matrices
            have taken before; it is kept in the state of rules that ask for it

All are to be read only. What a rule does not ask for costs it nothing.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .shapes import to_matrices
from .stacks import gradients_of

INPUTS = ("G_KMN", "W_KMN", "step")


def inputs_of(direction: Callable[..., Any]) -> frozenset[str]:
    """The names of the keyword-only arguments."""
    parameters = inspect.signature(direction).parameters.values()
    return frozenset(parameter.name for parameter in parameters if parameter.kind == parameter.KEYWORD_ONLY)


def check_inputs(rule: str, inputs: frozenset[str]) -> None:
    """Raise TypeError for an input that there is none of."""
    if unknown := sorted(inputs - set(INPUTS)):
        raise TypeError(f"{rule}.direction() asks for {', '.join(unknown)}; there are only {', '.join(INPUTS)}")


def stacked_inputs(
    inputs: frozenset[str],
    stack: list[Tensor],
    group: dict[str, Any],
    states: list[dict[str, Any]],
    chosen: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """The inputs by name, for the matrices that a stack of parameters with gradients holds, or for chosen ones."""
    found = {}
    for name, tensors in (("G_KMN", gradients_of(stack)), ("W_KMN", stack)):
        if name in inputs:
            matrices = [matrix for tensor in tensors for matrix in to_matrices(tensor, group)]
            found[name] = torch.stack([matrices[i].float() for i in chosen or range(len(matrices))])
    return {**found, "step": states[0]["step"]} if "step" in inputs else found


def stacked_weights(stack: list[Tensor], group: dict[str, Any], chosen: Sequence[int] | None = None) -> Tensor:
    """(K, M, N) float32."""
    return stacked_inputs(frozenset({"W_KMN"}), stack, group, [], chosen)["W_KMN"]


def new_step() -> Tensor:
    return torch.zeros((), dtype=torch.float32, device="cpu")
