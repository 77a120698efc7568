"""Make shards of GPT-2 tokens from text. The bytes are the same on any number of cores and after any interruption.

Each document begins with token 50256; the tokens of tiktoken's encode_ordinary follow. Documents run on across shards
of equal size. Shard 0 is for validation, the others are for training. The manifest is written after each shard and says
where the next one begins.
"""

import collections
import contextlib
import gzip
import itertools
import json
import multiprocessing
import os
import re
import signal
import threading
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aurora.tokens.manifest import read_manifest, write_manifest
from aurora.tokens.shards import DOCUMENT_START, ShardError, open_shard, write_shard
from data.hub import alone_in, file_sha256, is_present, shard_entry, with_retries

PIECE_CHARS = 1 << 18  # longer documents are encoded in pieces
BATCH_CHARS = 1 << 20  # of text sent to a worker at once
# GPT-2's words hold no newline, and the last of some whitespace before a letter is a word of its own unless it is a
# space: before a newline that something visible follows, a cut changes no token.
SAFE_CUT = re.compile(r"\n(?=\S)")


class Piece(NamedTuple):
    text: str
    begins_document: bool


class LocalFiles:
    """Documents in .txt (one a file), .jsonl or .jsonl.gz (one a line) and .parquet files, the latter under "text"."""

    def __init__(self, paths: list[Path]):
        self.paths = paths
        for path in paths:
            if not path.name.endswith((".txt", ".jsonl", ".jsonl.gz", ".parquet")):
                raise ShardError(
                    path, "file name", ".txt, .jsonl, .jsonl.gz or .parquet", path.name, "convert the file"
                )
            if not path.is_file():
                raise ShardError(path, "file", "one that can be read", "none", "check its name")

    def describe(self) -> dict[str, Any]:
        try:
            return {"files": [{"name": path.name, "sha256": file_sha256(path)} for path in self.paths]}
        except OSError as error:
            raise ShardError(
                error.filename, "file", "one that can be read", error.strerror, "mend or leave it out"
            ) from error

    def documents(self, num_skipped: int) -> Iterator[str]:
        """Texts in order, without the first num_skipped. Raises ShardError for text that cannot be read."""
        return itertools.islice(itertools.chain.from_iterable(map(self._read, self.paths)), num_skipped, None)

    def _read(self, path: Path) -> Iterator[str]:
        line_number = 0
        try:
            if path.suffix == ".parquet":
                import pyarrow.parquet

                for batch in pyarrow.parquet.ParquetFile(path).iter_batches(columns=["text"], batch_size=1024):
                    yield from map(as_text, batch.column("text").to_pylist())
                return
            open_text = gzip.open if path.suffix == ".gz" else open
            with open_text(path, "rb") as file:
                if path.suffix == ".txt":
                    yield file.read().decode("utf-8")
                    return
                for line in file:
                    line_number += 1
                    yield as_text(json.loads(line)["text"])
        except (ValueError, KeyError, TypeError, EOFError, OSError, RecursionError, zlib.error) as error:
            where = f"line {line_number}" if line_number else "content"
            expected = 'UTF-8 text; one object with "text" a line or row'
            raise ShardError(
                path, where, expected, " ".join(str(error).split()), "mend or leave out the file"
            ) from error


def as_text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"text is {value!r}")
    return value


class HubText:
    """Documents of a dataset on the hub, streamed: nothing but the text in flight is kept here."""

    def __init__(self, repo: str, sample: str, revision: str):
        import huggingface_hub

        self.repo, self.sample = repo, sample
        api = huggingface_hub.HfApi()
        self.revision = with_retries(lambda: api.dataset_info(repo, revision=revision), repo).sha

    def describe(self) -> dict[str, Any]:
        return {"repo": self.repo, "sample": self.sample, "revision": self.revision}

    def documents(self, num_skipped: int) -> Iterator[str]:
        """Texts in order, without the first num_skipped. Raises ShardError when the hub stops giving them."""
        import datasets

        try:
            rows = datasets.load_dataset(self.repo, self.sample, split="train", streaming=True, revision=self.revision)
            for row in rows.select_columns(["text"]).skip(num_skipped):
                yield as_text(row["text"])
        except Exception as error:  # of datasets, fsspec, pyarrow or the network
            reason = " ".join(str(error).split()) or type(error).__name__
            fix = "check names and network, then run the same command again"
            raise ShardError(f"{self.repo} {self.sample}", "documents", "text", reason, fix) from error


def tokenize(
    source: LocalFiles | HubText,
    out: Path,
    shard_tokens: int,
    num_train_shards: int | None,
    num_workers: int,
) -> None:
    """Write the shards of a source to folder out, going on after the last one that the manifest there knows.

    Args:
        shard_tokens: of every shard but the last.
        num_train_shards: where to stop; None: at the end of the source.

    Raises:
        ShardError: unreadable text, or a folder that holds shards of something else.
        OSError: the disk is full or out is not writable; whole shards stay.
    """
    from tqdm import tqdm

    gpt2()  # fails before any work when its files cannot be had
    out.mkdir(parents=True, exist_ok=True)
    with alone_in(out):
        for unfinished in out.glob(".fineweb_*.bin.*"):  # of a killed process
            unfinished.unlink()
        made_of = source.describe() | {"encoding": "gpt2", "shard_tokens": shard_tokens}
        manifest = read_manifest(out) or {"source": made_of, "shards": {}, "next": {"document": 0, "token": 0}}
        for key in sorted(made_of | manifest["source"]):
            ours, theirs = made_of.get(key), manifest["source"].get(key)
            if ours != theirs:
                raise ShardError(out, f"{key} of the shards", shown(ours), shown(theirs), "use another --out")
        for name in manifest["shards"]:
            if not is_present(out / name, manifest):
                raise ShardError(
                    out / name, "file", "whole, as the manifest says", "missing or cut", "begin in another --out"
                )
        num_done, position = len(manifest["shards"]), manifest["next"]
        limit = None if num_train_shards is None else 1 + num_train_shards
        if position is None or (limit and num_done >= limit):
            print(f"{out}: {num_done} shards finished before")
            return
        if num_done:
            print(f"{out}: going on after {num_done} shards, in document {position['document']:,}")
        total = limit and (limit - num_done) * shard_tokens
        with (
            tqdm(total=total, unit=" tokens", unit_scale=True, disable=None) as bar,
            worker_pool(num_workers) as pool,
        ):
            batches = encoded(pieces(source.documents(position["document"])), pool, num_workers)
            for tokens, next_position in cut_into_shards(batches, position, shard_tokens):
                number = len(manifest["shards"])
                path = out / f"fineweb_{'train' if number else 'val'}_{number:06d}.bin"
                if path.exists() and not np.array_equal(
                    open_shard(path), tokens
                ):  # equal ones: killed before the manifest
                    raise ShardError(
                        path, "file", "none yet", "one of other tokens", "move it away or use another --out"
                    )
                write_shard(path, tokens)
                manifest["shards"][path.name] = shard_entry(path, file_sha256(path))
                manifest["next"] = next_position
                write_manifest(out, manifest)
                bar.update(len(tokens))
                bar.write(f"{path}: {len(tokens):,} tokens")
                if number + 1 == limit:
                    return
        if not manifest["shards"]:
            raise ShardError(out, "text", "at least one document", "none", "check the source")
        manifest["next"] = None
        write_manifest(out, manifest)


def shown(value: Any) -> str:
    """A setting in an error message, not longer than a line."""
    text = str(value)
    return text if len(text) <= 100 else f"{text[:80]}..."


def pieces(documents: Iterable[str]) -> Iterator[Piece]:
    """The documents, long ones cut where that changes no token."""
    for text in documents:
        begin = 0
        while len(text) - begin > PIECE_CHARS:
            cut = SAFE_CUT.search(text, begin + PIECE_CHARS)
            if not cut:
                break
            yield Piece(text[begin : cut.start()], begin == 0)
            begin = cut.start()
        yield Piece(text[begin:], begin == 0)


class Encoded(NamedTuple):
    tokens: np.ndarray  # (num_tokens,) uint16
    document_starts: np.ndarray  # (num_documents,) int64: where in tokens documents begin


def encoded(stream: Iterator[Piece], pool: Executor | None, num_workers: int) -> Iterator[Encoded]:
    """Encode batches of pieces, in order; a few batches are under way at a time."""
    if pool is None:
        yield from map(encode, batched(stream))
        return
    under_way: collections.deque[Future[Encoded]] = collections.deque()
    for batch in batched(stream):
        under_way.append(pool.submit(encode, batch))
        if len(under_way) > 2 * num_workers:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()


def batched(stream: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Lists of pieces with at least BATCH_CHARS characters together."""
    batch, num_chars = [], 0
    for piece in stream:
        batch.append(piece)
        num_chars += len(piece.text) + 1
        if num_chars >= BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


def gpt2() -> Any:
    """tiktoken's gpt2 encoding. Raises ShardError when its files are neither cached nor to be downloaded."""
    import tiktoken

    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # ValueError: what a server sent has the wrong hash
        raise ShardError(
            "tiktoken",
            "GPT-2's vocabulary",
            "a download or a copy in the folder TIKTOKEN_CACHE_DIR",
            " ".join(str(error).split()),
            "fill that folder where there is a network, see README.md",
        ) from error


def encode(batch: list[Piece]) -> Encoded:
    """The tokens of some pieces."""
    encoding = gpt2()
    parts, starts, num_tokens = [], [], 0
    for text, begins_document in batch:
        if begins_document:
            starts.append(num_tokens)
            parts.append(np.array([DOCUMENT_START], dtype=np.uint16))
        try:
            tokens = encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # half of a surrogate pair, which encode_ordinary replaces
            tokens = np.array(encoding.encode_ordinary(text), dtype=np.uint32)
        parts.append(tokens.astype(np.uint16))
        num_tokens += len(tokens) + begins_document
    return Encoded(np.concatenate(parts), np.array(starts, dtype=np.int64))


def cut_into_shards(
    batches: Iterator[Encoded], position: dict[str, int], shard_tokens: int
) -> Iterator[tuple[np.ndarray, dict[str, int]]]:
    """Cut the stream that begins with document position["document"] into shards, without its first tokens.

    Yields each shard's tokens and the position of the token that follows them: which document, which token in it.
    """
    num_skipped, document = position["token"], position["document"]
    buffer, filled = np.empty(shard_tokens, dtype=np.uint16), 0
    # The last document that began, and how far before the coming batch; before the first batch none has.
    last_start = np.empty(0, dtype=np.int64)
    for tokens, document_starts in batches:
        starts = np.concatenate([last_start, document_starts])
        begin = min(num_skipped, len(tokens))
        num_skipped -= begin
        while begin < len(tokens):
            taken = min(shard_tokens - filled, len(tokens) - begin)
            buffer[filled : filled + taken] = tokens[begin : begin + taken]
            filled, begin = filled + taken, begin + taken
            if filled == shard_tokens:
                index = int(np.searchsorted(starts, begin, side="right")) - 1
                yield buffer, {"document": document + index, "token": begin - int(starts[index])}
                filled = 0
        document, last_start = document + len(starts) - 1, starts[-1:] - len(tokens)
    if filled:
        yield buffer[:filled], {"document": document, "token": -int(last_start[0])}


@contextlib.contextmanager
def worker_pool(num_workers: int) -> Iterator[Executor | None]:
    """Processes that encode; None for one worker, which is this process."""
    if num_workers == 1:
        yield None
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=context, initializer=end_with_parent) as pool:
        resource_tracker.ensure_running()  # which unblocks signals when it starts
        # Inherited: Ctrl-C is for the main process to handle, to which one that comes now is delivered later.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for _ in range(num_workers):
                pool.submit(gpt2)  # each starts a worker
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        yield pool


def end_with_parent() -> None:
    """Leave no worker behind when the main process is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # for this is a worker

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
