"""Bits per byte and perplexity of a run's model on text, document by document."""

import hashlib
import math
from pathlib import Path

import numpy as np

from aurora.errors import Exit, HarnessError
from aurora.tokens.loader import find_shards
from aurora.tokens.shards import ShardError
from scripts.analysis.evaluation import Evaluation
from scripts.models.likelihood import score
from scripts.models.load import Trained
from scripts.models.vocabulary import Vocabulary, is_shard, name_of, read_documents, read_shard

FIGURE = "bits_per_byte"


def evaluate_text(trained: Trained, path: Path, num_tokens: int | None = None) -> Evaluation:
    """Of a text file each document by itself, behind the token that begins documents. Of a shard its first num_tokens,
    or all, as the trainer's validation reads them: in sequences that do not overlap, whichever documents they hold.

    Raises:
        HarnessError: CONFIG, a model without text; DATA, what cannot be read.
    """
    vocabulary = Vocabulary(trained.config["vocab_size"])
    if is_shard(path):
        return evaluate_tokens(trained, read_shard(path, num_tokens, vocabulary), name_of(path))
    if num_tokens:
        raise HarnessError(Exit.CONFIG, f"--tokens is for shards, and {path} is none; leave it out")
    documents = read_documents(path, vocabulary)
    start = np.array([vocabulary.document_start])
    nats = np.array([-found.logprobs.sum() for found in score(trained, [(start, d.tokens) for d in documents])])
    counts = np.array([len(document.tokens) for document in documents])
    sizes = np.array([document.num_bytes for document in documents])
    return as_evaluation(name_of(path), hashlib.sha256(path.read_bytes()).hexdigest(), nats, counts, sizes)


def evaluate_validation(trained: Trained) -> Evaluation:
    """On the tokens with which the run was validated. Raises HarnessError: DATA, they are not here."""
    start = trained.run.start
    try:
        pattern, num_tokens = str(start["config"]["data"]["val"]), int(start["config"]["eval"]["tokens"])
        sha256 = start["data"]["val_sha256"]
    except (KeyError, TypeError, ValueError) as error:
        message = f"{trained.run.path} does not tell its validation ({error!r})"
        raise HarnessError(Exit.CHECKPOINT, f"{message}; name a text or shard with --text") from error
    try:
        path = find_shards(pattern)[0]
    except ShardError as error:
        raise HarnessError(Exit.DATA, str(error)) from error
    tokens = read_shard(path, num_tokens, Vocabulary(trained.config["vocab_size"]))
    if hashlib.sha256(tokens.data).hexdigest() != sha256:
        message = f"{path} does not hold the tokens with which {trained.name} was validated"
        raise HarnessError(Exit.DATA, f"{message}; name a text or shard with --text")
    return evaluate_tokens(trained, tokens, name_of(path))


def evaluate_tokens(trained: Trained, tokens: np.ndarray, name: str) -> Evaluation:
    """Of a stream (N + 1,) uint16. A document goes to the next token that begins one."""
    vocabulary = Vocabulary(trained.config["vocab_size"])
    (found,) = score(trained, [(tokens[:1].astype(np.int64), tokens[1:].astype(np.int64))])
    scored = tokens[1:]
    document = np.cumsum(scored == vocabulary.document_start)
    document -= document[0]
    nats = np.bincount(document, -found.logprobs)
    sizes = np.bincount(document, vocabulary.num_bytes()[scored])
    return as_evaluation(name, hashlib.sha256(tokens.data).hexdigest(), nats, np.bincount(document), sizes)


def as_evaluation(name: str, sha256: str, nats: np.ndarray, counts: np.ndarray, sizes: np.ndarray) -> Evaluation:
    """Args: nats, tokens and bytes of each document, (D,)."""
    per_token = float(nats.sum() / counts.sum())
    details = {
        "perplexity": math.exp(per_token),
        "nats_per_token": per_token,
        "tokens": int(counts.sum()),
        "bytes": int(sizes.sum()),
        "sha256": sha256,
        "shown": ["perplexity", "nats_per_token"],
    }
    return Evaluation("text", name, FIGURE, nats / math.log(2), sizes, details)
