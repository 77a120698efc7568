"""How likely a model finds tokens."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from scripts.models.load import Trained

# Of one forward pass, for which logits take four bytes a token and entry of the vocabulary, three times over.
MOST_LOGITS, MOST_TOKENS = 2**26, 2**13


class Scores(NamedTuple):
    """Of each scored token: its log-probability in nats, (N,) float64, and whether no other was likelier, (N,)."""

    logprobs: np.ndarray
    is_greedy: np.ndarray


def windows(context: np.ndarray, scored: np.ndarray, seq_len: int) -> Iterator[tuple[np.ndarray, int]]:
    """Pieces of at most seq_len + 1 tokens, and how many at the end of each are scored: each of scored exactly once.

    The first scores as many as fit, behind as much of the context as fits; later ones score those that follow, and the
    last is filled up to seq_len with what came before. So does lm-evaluation-harness, and where the scored are whole
    sequences behind one token, so does the trainer's validation.
    """
    tokens, done = np.concatenate([context, scored]), 0
    while done < len(scored):
        count = min(seq_len, len(scored) - done)
        end = len(context) + done + count
        yield tokens[max(0, end - seq_len - 1) : end], count
        done += count


@torch.inference_mode()
def score(trained: Trained, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[Scores]:
    """The scores of each pair's second tokens behind its first, of which there is at least one."""
    seq_len = trained.config["seq_len"]
    results = [Scores(np.zeros(len(scored)), np.zeros(len(scored), bool)) for _, scored in pairs]
    pieces: list[tuple[int, int, np.ndarray, int]] = []  # pair, first of the scored, tokens, number of the scored
    for index, pair in enumerate(pairs):
        done = 0
        for piece, count in windows(*pair, seq_len):
            pieces.append((index, done, piece, count))
            done += count
    pieces.sort(key=lambda piece: -len(piece[2]))  # so that little is filled up, and memory runs out at once if at all
    room = max(seq_len, min(MOST_TOKENS, MOST_LOGITS // trained.config["vocab_size"]))
    begin = 0
    while begin < len(pieces):
        batch = pieces[begin : begin + max(1, room // len(pieces[begin][2]))]
        begin += len(batch)
        inputs = np.zeros((len(batch), len(batch[0][2]) - 1), np.int64)  # what follows a piece, it does not see
        for row, (_, _, piece, _) in zip(inputs, batch, strict=True):
            row[: len(piece) - 1] = piece[:-1]
        logits_BTV = trained.model.logits(torch.from_numpy(inputs).to(trained.device))
        for logits_TV, (index, first, piece, count) in zip(logits_BTV, batch, strict=True):
            logprobs_TV = logits_TV[len(piece) - 1 - count : len(piece) - 1].float().log_softmax(-1)
            targets = torch.from_numpy(piece[-count:].astype(np.int64)).to(trained.device)
            chosen = logprobs_TV.gather(-1, targets[:, None])[:, 0]
            results[index].logprobs[first : first + count] = chosen.double().cpu().numpy()
            results[index].is_greedy[first : first + count] = (logprobs_TV.argmax(-1) == targets).cpu().numpy()
    return results
