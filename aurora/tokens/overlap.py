"""Validation tokens that also stand in train shards: found wherever they begin, in well under a second a shard.

A position is a probe when a hash of its first four tokens says so, which is the same in any copy of it; probes with
equal hashes of 128 tokens are then compared token by token. About one position in 64 is a probe, so that a copy of
1024 tokens holds 14 of them on average and has a chance of one in a million to hold none.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from aurora.tokens.shards import DOCUMENT_START, ShardError, is_gpt2_vocab

COPY_TOKENS = 1024  # shorter runs are quotations, licences and the like
PROBE_TOKENS = 128
PROBE_HASH_LIMIT = 1 << 10  # of 2^16
PROBE_MULTIPLIERS = (40503, 30011, 22189, 51749)
HASH_WEIGHTS = np.random.default_rng(0).integers(0, 2**64, PROBE_TOKENS // 4, dtype=np.uint64) | np.uint64(1)
MAX_COPIED_SHARE = 0.01  # of the validation tokens; a web corpus does repeat some documents
BLOCK_TOKENS = 1 << 18  # fits in a core's cache


class Copy(NamedTuple):
    """A run of tokens that both hold."""

    val_start: int
    train_start: int
    num_tokens: int


class ProbeIndex:
    """The probes of some validation tokens (num_tokens,) uint16, ready to be looked for in train shards."""

    def __init__(self, val: np.ndarray):
        self.val = val
        positions, hashes = probes(val)
        self.hashes, first = np.unique(hashes, return_index=True)
        self.positions = positions[first]

    def copies_in(self, train: np.ndarray) -> list[Copy]:
        """Runs of at least COPY_TOKENS tokens that stand in train (num_tokens,) uint16 too, ordered by train_start."""
        if not len(self.hashes):
            return []
        positions, hashes = probes(train)
        order = np.argsort(hashes)  # a search for sorted hashes stays in cache
        slots = np.empty(len(hashes), dtype=np.int64)
        slots[order] = np.searchsorted(self.hashes, hashes[order]).clip(max=len(self.hashes) - 1)
        hits = np.flatnonzero(self.hashes[slots] == hashes)
        copies: list[Copy] = []
        copied_until = run_until = run_diagonal = last_val = last_train = -1
        for train_position, val_position in zip(
            positions[hits].tolist(), self.positions[slots[hits]].tolist(), strict=True
        ):
            is_in_run = train_position < run_until and train_position - val_position == run_diagonal
            is_periodic = val_position == last_val and train_position < last_train + PROBE_TOKENS
            last_val, last_train = val_position, train_position
            if train_position < copied_until or is_in_run or is_periodic:
                continue
            before = common_prefix(self.val[:val_position][::-1], train[:train_position][::-1])
            after = common_prefix(self.val[val_position:], train[train_position:])
            run_until, run_diagonal = train_position + after, train_position - val_position
            if before + after >= COPY_TOKENS:
                copied_until = run_until
                copies.append(Copy(val_position - before, train_position - before, before + after))
        return copies


def probes(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions (P,) int64 of the probes in tokens and the hashes (P,) uint64 of the PROBE_TOKENS that begin there."""
    positions, hashes = [np.empty(0, np.int64)], [np.empty(0, np.uint64)]
    num_starts = len(tokens) - PROBE_TOKENS + 1
    for begin in range(0, num_starts, BLOCK_TOKENS):
        end = min(begin + BLOCK_TOKENS, num_starts)
        block = np.asarray(tokens[begin : end + PROBE_TOKENS - 1], dtype=np.uint16)
        code = np.full(end - begin, 1, dtype=np.uint16)
        for offset, multiplier in enumerate(PROBE_MULTIPLIERS):
            code += block[offset : offset + len(code)] * np.uint16(multiplier)
        chosen = code < PROBE_HASH_LIMIT
        chosen[1:] &= ~chosen[:-1]  # where one token repeats, all positions would be probes or none
        found = np.flatnonzero(chosen)
        windows = np.lib.stride_tricks.sliding_window_view(block, PROBE_TOKENS)[found]
        positions.append(found + begin)
        hashes.append((windows.view(np.uint64) * HASH_WEIGHTS).sum(axis=1, dtype=np.uint64))
    return np.concatenate(positions), np.concatenate(hashes)


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many leading elements are equal."""
    limit, done, block = min(len(a), len(b)), 0, 1024
    while done < limit:
        size = min(block, limit - done)
        unequal = a[done : done + size] != b[done : done + size]
        if unequal.any():
            return done + int(unequal.argmax())
        done, block = done + size, 2 * block
    return limit


def covered_tokens(copies: list[Copy]) -> int:
    """How many validation tokens stand in at least one of the copies."""
    covered, reached = 0, 0
    for start, num_tokens in sorted((copy.val_start, copy.num_tokens) for copy in copies):
        covered += max(0, start + num_tokens - max(start, reached))
        reached = max(reached, start + num_tokens)
    return covered


def check_val_is_unseen(
    val_path: Path, val: np.ndarray, train: Iterable[tuple[Path, np.ndarray]], vocab_size: int
) -> float:
    """The share of the validation tokens (num_tokens,) that stand in train shards, in runs of at least COPY_TOKENS.

    Shorter documents in another order are not found.

    Raises:
        ShardError: the share is above MAX_COPIED_SHARE, or a run crosses from one document into the next, which
            documents that the web merely repeats do not.
    """
    index = ProbeIndex(val)
    copies = {path: index.copies_in(shard) for path, shard in train}
    share = covered_tokens([copy for found in copies.values() for copy in found]) / len(val)
    for path, found in copies.items():
        for val_start, train_start, num_tokens in found:
            inside = val[val_start + PROBE_TOKENS : val_start + num_tokens - PROBE_TOKENS]
            if share > MAX_COPIED_SHARE or (is_gpt2_vocab(vocab_size) and np.any(inside == DOCUMENT_START)):
                where = (
                    f"{num_tokens:,} from position {val_start:,} at {train_start:,} of {path.name} ({share:.2%} in all)"
                )
                fix = "split the documents again, each into train or validation"
                raise ShardError(val_path, "tokens", "none in the train shards", where, fix)
    return share
