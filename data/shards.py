"""Token shards: the file format of llm.c and modded-nanogpt, written, read and checked.

A shard is a header of 256 little-endian int32 (magic 20240520, version 1, number of tokens, zeros) followed by that
many little-endian uint16 tokens.
"""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4
TOKEN_DTYPE = np.dtype("<u2")
SCAN_TOKENS = 1 << 24


class ShardError(ValueError):
    """A shard that is missing, cut, foreign or holds tokens it may not; the message names file and finding."""


class ShardInfo(NamedTuple):
    """What a full read of a shard found. sha256 is over the token bytes, without the header."""

    file: str
    num_tokens: int
    max_token: int
    sha256: str


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Write tokens (1-D, integers in [0, 65535]) to path; the name appears only once the file is whole.

    Raises:
        ShardError: tokens that do not fit in uint16, or too many for the header.
        OSError: the disk is full or path is not writable; nothing is left behind.
    """
    if tokens.ndim != 1 or tokens.size >= 2**31:
        raise ShardError(f"{path}: a shard holds a 1-D array of fewer than 2^31 tokens, got shape {tokens.shape}")
    if tokens.size and (int(tokens.min()) < 0 or int(tokens.max()) > np.iinfo(TOKEN_DTYPE).max):
        raise ShardError(f"{path}: tokens must lie in [0, 65535], got {tokens.min()} to {tokens.max()}")
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens.size
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(header.tobytes())
            file.write(tokens.astype(TOKEN_DTYPE, copy=False).tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp gives 0600; shards are shared
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def open_shard(path: Path) -> np.ndarray:
    """The tokens of a shard as a read-only memory map (num_tokens,) uint16; reads the header alone.

    Raises:
        ShardError: not a shard of this format, or its size does not match its header.
    """
    try:
        with path.open("rb") as file:
            header_bytes = file.read(HEADER_BYTES)
            file_bytes = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ShardError(f"shard {path} cannot be read: {error.strerror}") from error
    if len(header_bytes) < HEADER_BYTES:
        raise ShardError(f"shard {path} has {file_bytes} bytes, less than its {HEADER_BYTES}-byte header; get it again")
    magic, version, num_tokens = np.frombuffer(header_bytes, dtype="<i4")[:3].tolist()
    if magic != MAGIC:
        raise ShardError(f"shard {path} begins with magic number {magic}, expected {MAGIC}; it is in another format")
    if version != VERSION:
        raise ShardError(f"shard {path} has format version {version}, expected {VERSION}")
    expected_bytes = HEADER_BYTES + num_tokens * TOKEN_DTYPE.itemsize
    if num_tokens < 1 or file_bytes != expected_bytes:
        raise ShardError(
            f"shard {path} claims {num_tokens} tokens, so {expected_bytes} bytes, but has {file_bytes}; get it again"
        )
    return np.memmap(path, dtype=TOKEN_DTYPE, mode="r", offset=HEADER_BYTES, shape=(num_tokens,))


def verify_shard(path: Path, vocab_size: int) -> ShardInfo:
    """Read the whole shard once: hash it, and refuse tokens outside the vocabulary (ShardError)."""
    tokens = open_shard(path)
    digest, max_token = hashlib.sha256(), 0
    for start in range(0, len(tokens), SCAN_TOKENS):
        block = tokens[start : start + SCAN_TOKENS]
        digest.update(block.data)
        max_token = max(max_token, int(block.max()))
        if max_token >= vocab_size:
            position = start + int(np.argmax(block >= vocab_size))
            raise ShardError(
                f"shard {path} holds token {int(tokens[position])} at position {position}, "
                f"but the model's vocab_size is {vocab_size}; use the data that the config was made for"
            )
    return ShardInfo(path.name, len(tokens), max_token, digest.hexdigest())


def fingerprint(shards: Iterable[ShardInfo]) -> str:
    """One sha256 over the token hashes of several shards, in order: equal exactly when the tokens are."""
    return hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest()
