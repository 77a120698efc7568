"""From shards to batches: what a run will read, checked before it starts, and the loader that hands it out.

The stream is the public benchmark's: consecutive windows of batch_tokens within a shard, which is left when fewer than
batch_tokens + 2 tokens remain, so a shard of 100M tokens gives 190 steps of 524,288. It does not depend on the number
of ranks: each takes its part of the same global batch.
"""

import glob
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.shards import ShardError, ShardInfo, fingerprint, open_shard, verify_shard

ROOT = Path(__file__).resolve().parent.parent


def steps_in_shard(num_tokens: int, batch_tokens: int) -> int:
    """Whole batches that the loader takes from a shard."""
    return max(0, (num_tokens - 2) // batch_tokens)


class RunData(NamedTuple):
    """What a run reads: train shards in order, each (num_tokens,) uint16, and validation tokens (eval tokens + 1,)."""

    train_shards: list[np.ndarray]
    train_infos: list[ShardInfo]
    val_tokens: np.ndarray

    def describe(self) -> dict[str, Any]:
        """For the record. stream_id tells tasks apart without depending on how many shards a run needs."""
        val_sha256 = hashlib.sha256(self.val_tokens.data).hexdigest()
        return {
            "shards": [info._asdict() for info in self.train_infos],
            "fingerprint": fingerprint(self.train_infos),
            "val_sha256": val_sha256,
            "stream_id": hashlib.sha256((self.train_infos[0].sha256 + val_sha256).encode()).hexdigest(),
        }


def open_run_data(
    train_pattern: str, val_pattern: str, steps: int, batch_tokens: int, val_tokens: int, vocab_size: int
) -> RunData:
    """Open the shards of a run, check that they last, then read and hash all that it will use.

    Patterns are globs relative to the project's folder.

    Raises:
        ShardError: no shard, a broken one, a token outside the vocabulary, or too few tokens.
    """
    paths = find_shards(train_pattern)
    shards = [open_shard(path) for path in paths]
    available_steps = np.cumsum([steps_in_shard(len(shard), batch_tokens) for shard in shards])
    if available_steps[-1] < steps:
        raise ShardError(
            f"{steps} steps of {batch_tokens:,} tokens need {steps * batch_tokens:,} tokens, but the {len(shards)} "
            f"shards of {train_pattern!r} last for {available_steps[-1]} steps; lower train.steps or add shards"
        )
    num_needed = int(np.searchsorted(available_steps, steps)) + 1
    val_path = find_shards(val_pattern)[0]
    val_shard = open_shard(val_path)
    if len(val_shard) < val_tokens + 1:
        raise ShardError(
            f"validation on {val_tokens:,} tokens needs one more, but shard {val_path} holds {len(val_shard):,}; "
            f"lower eval.tokens"
        )
    verify_shard(val_path, vocab_size)
    infos = [verify_shard(path, vocab_size) for path in paths[:num_needed]]
    return RunData(shards[:num_needed], infos, np.ascontiguousarray(val_shard[: val_tokens + 1]))


def find_shards(pattern: str) -> list[Path]:
    """Sorted paths that match. Raises ShardError when there are none."""
    paths = sorted(Path(name) for name in glob.glob(str(ROOT / pattern)))
    if not paths:
        raise ShardError(
            f"no shard matches {pattern!r} in {ROOT}; the offline corpus comes from: python data/local.py, "
            f"other data: see README.md"
        )
    return paths


class TokenLoader:
    """Hands out this rank's part of each global batch."""

    def __init__(self, shards: list[np.ndarray], batch_tokens: int, rank: int, world_size: int):
        self.shards, self.batch_tokens = shards, batch_tokens
        self.own_tokens = batch_tokens // world_size
        self.own_start = rank * self.own_tokens
        self.shard_index, self.position = 0, 0

    def next_window(self) -> np.ndarray:
        """The next (batch_tokens / world_size + 1,) uint16 tokens, a view of the shard.

        Raises:
            ShardError: the shards are used up; open_run_data() checks that beforehand.
        """
        while len(self.shards[self.shard_index]) - self.position < self.batch_tokens + 2:
            if self.shard_index + 1 == len(self.shards):
                raise ShardError("the train shards are used up")
            self.shard_index, self.position = self.shard_index + 1, 0
        start = self.position + self.own_start
        self.position += self.batch_tokens
        return self.shards[self.shard_index][start : start + self.own_tokens + 1]

    def state_dict(self) -> dict[str, int]:
        return {"shard_index": self.shard_index, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.shard_index, self.position = state["shard_index"], state["position"]
