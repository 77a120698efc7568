"""From shards to batches: what a run will read, checked before it starts, and the loader that hands it out.

The stream is the public benchmark's: consecutive windows of batch_tokens within a shard, which is left when fewer than
batch_tokens + 2 tokens remain, so a shard of 100M tokens gives 190 steps of 524,288. It does not depend on the number
of ranks: each takes its part of the same global batch.
"""

import glob
import hashlib
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aurora.config import ROOT
from aurora.tokens.manifest import check_against_manifest, read_manifest
from aurora.tokens.overlap import check_val_is_unseen
from aurora.tokens.shards import ShardError, ShardInfo, check_numbering, fingerprint, open_shard, verify_shard

PUBLIC_SHARD_TOKENS = 100_000_000


def steps_in_shard(num_tokens: int, batch_tokens: int) -> int:
    """Whole batches that the loader takes from a shard."""
    return max(0, (num_tokens - 2) // batch_tokens)


class RunData(NamedTuple):
    """What a run reads: train shards in order, each (num_tokens,) uint16, and validation tokens (eval tokens + 1,)."""

    train_shards: list[np.ndarray]
    train_infos: list[ShardInfo]
    val_tokens: np.ndarray
    epochs: float  # passes over the train shards that the run makes, above 1 only with data.allow_epochs

    def describe(self) -> dict[str, Any]:
        """For the record. stream_id tells tasks apart without depending on how many shards a run needs."""
        val_sha256 = hashlib.sha256(self.val_tokens.data).hexdigest()
        train_sha256 = fingerprint(self.train_infos)
        # Where the stream begins again depends on all of the shards.
        stream = train_sha256 if self.epochs > 1 else self.train_infos[0].sha256
        return {
            "shards": [info._asdict() for info in self.train_infos],
            "fingerprint": train_sha256,
            "val_sha256": val_sha256,
            "stream_id": hashlib.sha256((stream + val_sha256).encode()).hexdigest(),
            "epochs": self.epochs,
        }


def open_run_data(
    train_pattern: str,
    val_pattern: str,
    steps: int,
    batch_tokens: int,
    val_tokens: int,
    vocab_size: int,
    allow_epochs: bool = False,
) -> RunData:
    """Open the shards of a run, check that they last, then read, hash and check all that it will use.

    Patterns are globs relative to the project's folder.

    Raises:
        ShardError: no shard, one missing or broken, a token outside the vocabulary, validation tokens among the
            training tokens, or too few tokens.
    """
    paths = find_shards(train_pattern)
    val_path = find_shards(val_pattern)[0]
    if val_path.resolve() in {path.resolve() for path in paths}:
        raise ShardError(val_path, "use", "validation alone", "training too", "change data.train or data.val")
    shards = [open_shard(path) for path in paths]
    available_steps = np.cumsum([steps_in_shard(len(shard), batch_tokens) for shard in shards]).tolist()
    if available_steps[-1] < steps and not (allow_epochs and available_steps[-1]):
        raise too_few_tokens(train_pattern, shards, available_steps[-1], steps, batch_tokens)
    num_needed = int(np.searchsorted(available_steps, min(steps, available_steps[-1]))) + 1
    val_shard = open_shard(val_path)
    if len(val_shard) < val_tokens + 1:
        expected = f"{val_tokens + 1:,} (eval.tokens and one more)"
        raise ShardError(val_path, "number of tokens", expected, f"{len(val_shard):,}", "lower eval.tokens")
    manifests = {folder: read_manifest(folder) for folder in {path.parent for path in (val_path, *paths)}}
    infos = []
    for path in (val_path, *paths[:num_needed]):
        infos.append(verify_shard(path, vocab_size))
        check_against_manifest(path, infos[-1], manifests[path.parent])
    check_are_unlike(infos[1:], paths)
    used_val = np.ascontiguousarray(val_shard[: val_tokens + 1])
    check_val_is_unseen(val_path, used_val, zip(paths, shards[:num_needed], strict=False), vocab_size)
    return RunData(shards[:num_needed], infos[1:], used_val, steps / available_steps[num_needed - 1])


def check_are_unlike(infos: list[ShardInfo], paths: list[Path]) -> None:
    """Raise ShardError where a shard is there under two names: a run would read it twice without a word."""
    places: dict[str, Path] = {}
    for info, path in zip(infos, paths, strict=False):
        first = places.setdefault(info.sha256, path)
        if first is not path:
            fix = "remove one of the two, or set data.allow_epochs = true to read all shards more than once"
            raise ShardError(path, "tokens", "tokens of its own", f"those of {first.name}", fix)


def find_shards(pattern: str) -> list[Path]:
    """Sorted paths that match. Raises ShardError when there are none, or when one of their numbers is missing."""
    literal = pattern.replace("[", "[[]")  # a folder may have brackets in its name, too
    paths = sorted(ROOT / name for name in glob.glob(literal, root_dir=ROOT) or glob.glob(pattern, root_dir=ROOT))
    if not paths:
        fix = (
            "python data/local.py makes the quick track's, python data/fineweb.py download --for CONFIG gets FineWeb's"
        )
        raise ShardError(ROOT / pattern, "files", "at least one shard", "none", fix)
    check_numbering(paths)
    return paths


def too_few_tokens(
    pattern: str, shards: list[np.ndarray], available_steps: int, steps: int, batch_tokens: int
) -> ShardError:
    """The error that says how many shards of this size a run needs."""
    shard_tokens = max(len(shard) for shard in shards)
    steps_each = steps_in_shard(shard_tokens, batch_tokens)
    needed = f"{steps:,} steps of {batch_tokens:,} tokens"
    found = f"{available_steps:,} steps in {len(shards)} shard{'s' * (len(shards) != 1)}"
    fix = f"a batch needs shards of at least {batch_tokens + 2:,} tokens, the largest has {shard_tokens:,}"
    if steps_each:
        num_shards = len(shards) + -(-(steps - available_steps) // steps_each)
        fix = f"get {num_shards} shards of {shard_tokens:,} tokens, lower train.steps, or set data.allow_epochs = true"
    return ShardError(pattern, "tokens", f"enough for {needed}", found, fix)


class TokenLoader:
    """Hands out this rank's part of each global batch; the next one is prepared on a thread while the caller works.

    prepare() turns a window, a (batch_tokens / world_size + 1,) uint16 view of a shard, into what next_batch() gives.
    """

    def __init__(
        self,
        shards: list[np.ndarray],
        batch_tokens: int,
        rank: int,
        world_size: int,
        prepare: Callable[[np.ndarray], Any] = np.array,
        allow_epochs: bool = False,
    ):
        self.shards, self.batch_tokens, self.prepare, self.allow_epochs = shards, batch_tokens, prepare, allow_epochs
        self.own_tokens = batch_tokens // world_size
        self.own_start = rank * self.own_tokens
        self.ends = np.cumsum([steps_in_shard(len(shard), batch_tokens) for shard in shards]).tolist()
        self.step = 0
        self.wait_s = 0.0  # that next_batch() had to wait for its batch
        self.reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="token-reader")
        self.ahead: tuple[int, Future] | None = None

    def window(self, step: int) -> np.ndarray:
        """This rank's tokens of a step (from 0), with the one that follows them.

        Raises:
            IndexError: the shards are used up and may not be read again; open_run_data() checks that beforehand.
        """
        if step >= self.ends[-1] and not self.allow_epochs:
            raise IndexError(f"the shards last for {self.ends[-1]} steps, so there is no step {step}")
        step %= self.ends[-1]
        shard_index = int(np.searchsorted(self.ends, step, side="right"))
        first_step = self.ends[shard_index - 1] if shard_index else 0
        start = (step - first_step) * self.batch_tokens + self.own_start
        return self.shards[shard_index][start : start + self.own_tokens + 1]

    def next_batch(self) -> Any:
        """The batch of self.step, which moves on by one."""
        begin_s = time.perf_counter()
        ahead = self.ahead if self.ahead and self.ahead[0] == self.step else self._read_ahead()
        batch = ahead[1].result()
        self.wait_s += time.perf_counter() - begin_s
        self.step += 1
        self._read_ahead()
        return batch

    def _read_ahead(self) -> tuple[int, Future]:
        step = self.step
        self.ahead = step, self.reader.submit(lambda: self.prepare(self.window(step)))
        return self.ahead

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]
