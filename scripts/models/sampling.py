"""Drawing what follows a text, token by token."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from scripts.models.load import Trained
from scripts.models.vocabulary import Vocabulary


class Sampling(NamedTuple):
    """How tokens are drawn.

    temperature: what logits are divided by; 0 takes the likeliest. top_k: among how many of the likeliest. top_p: among
    the fewest that together have this probability. None: among all.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    max_tokens: int = 256


@torch.inference_mode()
def sample(
    trained: Trained, prompt: Sequence[int], sampling: Sampling, generator: torch.Generator | None = None
) -> Iterator[int]:
    """The tokens that follow a prompt of at least one, up to max_tokens or the start of another document.

    The whole context of at most seq_len tokens is computed anew for each: these models are small. Draws are made on the
    CPU, so that a seed gives the same on any device as far as logits do. generator: of the CPU.
    """
    vocabulary, tokens = Vocabulary(trained.config["vocab_size"]), list(prompt)
    for _ in range(sampling.max_tokens):
        context = torch.tensor([tokens[-trained.config["seq_len"] :]], device=trained.device)
        logits_V = trained.model.logits(context)[0, -1].float().cpu()[: vocabulary.size]  # the rest is no token
        token = draw(logits_V, sampling, generator)
        if token == vocabulary.document_start:
            return
        tokens.append(token)
        yield token


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(logits_V: torch.Tensor, sampling: Sampling, generator: torch.Generator | None) -> int:
    """One of V tokens."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    sorted_V, order_V = (logits_V / sampling.temperature).sort(descending=True, stable=True)
    if sampling.top_k is not None:
        sorted_V, order_V = sorted_V[: sampling.top_k], order_V[: sampling.top_k]
    shares_V = sorted_V.softmax(-1)
    if sampling.top_p is not None:
        shares_V = shares_V * (shares_V.cumsum(-1) - shares_V < sampling.top_p)  # the first is always among them
    return int(order_V[torch.multinomial(shares_V, 1, generator=generator)])
