"""Make shards of GPT-2 tokens from text. The bytes are the same on any number of cores and after any interruption.

Each document begins with token 50256; the tokens of tiktoken's encode_ordinary follow. Documents run on across shards
of equal size. Shard 0 is for validation, the others are for training. The manifest is written after each shard and says
where the next one begins, and the hash of the text up to there: what follows may be mended meanwhile.
"""

import collections
import contextlib
import gzip
import hashlib
import io
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

from aurora.text import encoding_of
from aurora.tokens.manifest import read_manifest, write_manifest
from aurora.tokens.shards import DOCUMENT_START, ShardError, open_shard, write_shard
from data.gpt2 import check_tokens, describe_tokenizer, gigatoken_gpt2, gpt2, tokens_of
from data.hub import alone_in, file_sha256, is_present, shard_entry, with_retries

PIECE_CHARS = 1 << 18  # longer documents are encoded in pieces
BATCH_CHARS = 1 << 20  # of text sent to a worker at once
# GPT-2's words hold no newline, and the last of some whitespace before a letter is a word of its own unless it is a
# space: before a newline that something visible follows, a cut changes no token.
SAFE_CUT = re.compile(r"\n(?=\S)")
SEPARATOR = "<|endoftext|>"  # between the documents of a .txt file, as that of TinyStories


class Document(NamedTuple):
    text: str
    sha256: str  # over this and all documents before it; empty where the source cannot change


class Piece(NamedTuple):
    text: str
    begins_document: bool
    sha256: str = ""  # that of its document


class LocalFiles:
    """Documents in .txt (one a file, or several with <|endoftext|> between), .jsonl or .jsonl.gz (one a line) and
    .parquet files, the latter under "text". Text is UTF-8, or UTF-16 where that shows."""

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

    def documents(self, position: dict[str, Any]) -> Iterator[Document]:
        """Documents in order, from position["document"] on.

        Raises:
            ShardError: text that cannot be read, or that is not what it was up to the position.
        """
        digest, number = hashlib.sha256(), 0
        for path in self.paths:
            for text in self._read(path):
                content = text.encode("utf-8", "surrogatepass")
                digest.update(b"%d:" % len(content))
                digest.update(content)
                if number == position["document"] and position.get("sha256", digest.hexdigest()) != digest.hexdigest():
                    raise changed_before(path, number)
                if number >= position["document"]:
                    yield Document(text, digest.hexdigest())
                number += 1
        if number <= position["document"] and "sha256" in position:
            raise changed_before(self.paths[-1], number)

    def _read(self, path: Path) -> Iterator[str]:
        line_number = 0
        try:
            if path.suffix == ".parquet":
                import pyarrow.parquet

                for batch in pyarrow.parquet.ParquetFile(path).iter_batches(columns=["text"], batch_size=1024):
                    yield from map(as_text, batch.column("text").to_pylist())
                return
            with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
                encoding = encoding_of(file.peek(4)[:4])
                if path.suffix == ".txt":
                    texts = file.read().decode(encoding).split(SEPARATOR)
                    yield from texts if len(texts) == 1 else filter(None, (text.strip("\r\n") for text in texts))
                    return
                # Bytes where that works: json reads them faster, and line numbers of errors are right.
                lines: Iterable[bytes | str] = file
                if not encoding.startswith("utf-8"):
                    lines = io.TextIOWrapper(file, encoding, newline="\n")
                for line in lines:
                    line_number += 1
                    if line.strip():
                        yield as_text(json.loads(line)["text"])
        except (ValueError, KeyError, TypeError, EOFError, OSError, RecursionError, zlib.error) as error:
            where = f"line {line_number}" if line_number else "content"
            expected = 'UTF-8 text; one object with "text" a line or row'
            raise ShardError(
                path,
                where,
                expected,
                shown(" ".join(str(error).split())),
                "mend or leave out what is broken, then run the same command again",
            ) from error


def changed_before(path: Path, number: int) -> ShardError:
    return ShardError(
        path, f"text up to document {number:,}", "what the shards were made of", "another", "use another --out"
    )


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

    def documents(self, position: dict[str, Any]) -> Iterator[Document]:
        """Documents in order, from position["document"] on. Raises ShardError when the hub stops giving them."""
        import datasets

        try:
            rows = datasets.load_dataset(self.repo, self.sample, split="train", streaming=True, revision=self.revision)
            for row in rows.select_columns(["text"]).skip(position["document"]):
                yield Document(as_text(row["text"]), "")
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
        num_done, position = len(manifest["shards"]), manifest["next"]
        limit = None if num_train_shards is None else 1 + num_train_shards
        is_finished = position is None or bool(limit and num_done >= limit)
        if not is_finished and position.get("sha256") and "files" in made_of:
            manifest["source"]["files"] = made_of["files"]  # documents() compares the text up to there
        for key in sorted(made_of | manifest["source"]):
            ours, theirs = made_of.get(key), manifest["source"].get(key)
            if ours != theirs:
                raise ShardError(out, f"{key} of the shards", shown(ours), shown(theirs), "use another --out")
        for name in manifest["shards"]:
            if not is_present(out / name, manifest):
                raise ShardError(
                    out / name, "file", "whole, as the manifest says", "missing or cut", "begin in another --out"
                )
        if is_finished:
            print(f"{out}: {num_done} shards finished before")
            return
        if num_done:
            print(f"{out}: going on after {num_done} shards, in document {position['document']:,}")
        print(describe_tokenizer())
        total = limit and (limit - num_done) * shard_tokens
        with (
            tqdm(total=total, unit=" tokens", unit_scale=True, disable=None) as bar,
            worker_pool(num_workers) as pool,
        ):
            batches = encoded(pieces(source.documents(position)), pool, num_workers)
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


def pieces(documents: Iterable[Document]) -> Iterator[Piece]:
    """The documents, long ones cut where that changes no token."""
    for text, sha256 in documents:
        begin = 0
        while len(text) - begin > PIECE_CHARS:
            cut = SAFE_CUT.search(text, begin + PIECE_CHARS)
            if not cut:
                break
            yield Piece(text[begin : cut.start()], begin == 0, sha256)
            begin = cut.start()
        yield Piece(text[begin:], begin == 0, sha256)


class Encoded(NamedTuple):
    tokens: np.ndarray  # (num_tokens,) uint16
    document_starts: np.ndarray  # (num_documents,) int64: where in tokens documents begin
    sha256s: list[str]  # of these documents


def encoded(stream: Iterator[Piece], pool: Executor | None, num_workers: int) -> Iterator[Encoded]:
    """Encode batches of pieces, in order; a few batches are under way at a time."""
    if pool is None:
        yield from map(encode, batched(stream))
        return
    under_way: collections.deque[Future[Encoded]] = collections.deque()
    batches = batched(stream)
    while True:
        try:
            under_way.append(pool.submit(encode, next(batches)))
        except (StopIteration, ShardError) as error:
            while under_way:  # what came before text that cannot be read is kept
                yield under_way.popleft().result()
            if isinstance(error, ShardError):
                raise
            return
        if len(under_way) > 2 * num_workers:
            yield under_way.popleft().result()


def batched(stream: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Lists of pieces with at least BATCH_CHARS characters together, the last of fewer: at the end, or an error."""
    batch: list[Piece] = []
    num_chars = 0
    try:
        for piece in stream:
            batch.append(piece)
            num_chars += len(piece.text) + 1
            if num_chars >= BATCH_CHARS:
                yield batch
                batch, num_chars = [], 0
    except ShardError:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


def encode(batch: list[Piece]) -> Encoded:
    """The tokens of some pieces."""
    check_tokens(batch[0].text)
    parts, starts, sha256s, num_tokens = [], [], [], 0
    for text, begins_document, sha256 in batch:
        if begins_document:
            starts.append(num_tokens)
            sha256s.append(sha256)
            parts.append(np.array([DOCUMENT_START], dtype=np.uint16))
        tokens = tokens_of(text)
        parts.append(tokens.astype(np.uint16))
        num_tokens += len(tokens) + begins_document
    return Encoded(np.concatenate(parts), np.array(starts, dtype=np.int64), sha256s)


def cut_into_shards(
    batches: Iterator[Encoded], position: dict[str, Any], shard_tokens: int
) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    """Cut the stream that begins with document position["document"] into shards, without its first tokens.

    Yields each shard's tokens and the position of the token that follows them: which document, the hash of the text up
    to its end, which token in it.
    """
    num_skipped, document = position["token"], position["document"]
    buffer, filled = np.empty(shard_tokens, dtype=np.uint16), 0
    # The last document that began, and how far before the coming batch; before the first batch none has.
    last_start, last_sha256 = np.empty(0, dtype=np.int64), list[str]()
    for tokens, document_starts, sha256s in batches:
        starts, sha256s = np.concatenate([last_start, document_starts]), last_sha256 + sha256s
        begin = min(num_skipped, len(tokens))
        num_skipped -= begin
        while begin < len(tokens):
            taken = min(shard_tokens - filled, len(tokens) - begin)
            buffer[filled : filled + taken] = tokens[begin : begin + taken]
            filled, begin = filled + taken, begin + taken
            if filled == shard_tokens:
                index = int(np.searchsorted(starts, begin, side="right")) - 1
                token = begin - int(starts[index])
                yield buffer, {"document": document + index, "token": token, "sha256": sha256s[index]}
                filled = 0
        document, last_start, last_sha256 = document + len(starts) - 1, starts[-1:] - len(tokens), sha256s[-1:]
    if filled:
        yield buffer[:filled], {"document": document, "token": -int(last_start[0]), "sha256": last_sha256[0]}


@contextlib.contextmanager
def worker_pool(num_workers: int) -> Iterator[Executor | None]:
    """Processes that encode; None for one worker, which is this process.

    With gigatoken there are none either: handing text to another process takes longer than encoding it.
    """
    if num_workers == 1 or gigatoken_gpt2() is not None:
        yield None
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=context, initializer=end_with_parent) as pool:
        resource_tracker.ensure_running()  # which unblocks signals when it starts
        # Inherited: Ctrl-C is for the main process to handle, to which one that comes now is delivered later.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for _ in range(num_workers):
                pool.submit(describe_tokenizer)  # each starts a worker
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
