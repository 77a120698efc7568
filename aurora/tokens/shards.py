"""Token shards: the file format of llm.c and modded-nanogpt, written, read and checked.

A shard is a header of 256 little-endian int32 (magic 20240520, version 1, number of tokens, zeros) followed by that
many little-endian uint16 tokens. Shards of a data set are numbered without gaps, from 0 or 1.
"""

import contextlib
import hashlib
import os
import re
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4
TOKEN_DTYPE = np.dtype("<u2")
SCAN_TOKENS = 1 << 20  # read once from memory, then hashed and searched in cache
DOCUMENT_START = 50256  # GPT-2's end of text, which begins every document
GPT2_VOCAB_SIZE = 50257
GPT2_PADDED_VOCAB_SIZE = 50432  # the next multiple of 256
TOKENIZE = "make shards with data/fineweb.py tokenize"
CONVERT = "make shards of it with data/fineweb.py convert FILE --out FOLDER"
OTHER_FORMATS = {
    int(np.int32(MAGIC).byteswap()): "its bytes are big-endian",
    20240801: "it is a llama-3 shard of llm.c, with uint32 tokens",
    20240522: "it is an evaluation file of llm.c",
}


class ShardError(ValueError):
    """Data that a run cannot use: which file, what about it was expected and found, and what to do.

    Printed as one line.
    """

    def __init__(self, path: Path | str, field: str, expected: Any, found: Any, fix: str):
        super().__init__(path, field, expected, found, fix)

    def __str__(self) -> str:
        path, field, expected, found, fix = self.args
        return f"{path}: {field}: expected {expected}, found {found}; {fix}"


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
        raise ShardError(
            path, "tokens", "a 1-D array of fewer than 2^31", f"shape {tokens.shape}", "cut it into more shards"
        )
    if tokens.size and (int(tokens.min()) < 0 or int(tokens.max()) > np.iinfo(TOKEN_DTYPE).max):
        raise ShardError(path, "tokens", "0 to 65535", f"{tokens.min()} to {tokens.max()}", "use a smaller vocabulary")
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens.size
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:  # as readable for others as the umask says
            file.write(header.tobytes())
            file.write(np.ascontiguousarray(tokens, dtype=TOKEN_DTYPE).data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def starts_as_shard(head: bytes) -> bool:
    return head.startswith(np.int32(MAGIC).astype("<i4").tobytes())


def shard_bytes(num_tokens: int) -> int:
    """Size of a shard's file."""
    return HEADER_BYTES + num_tokens * TOKEN_DTYPE.itemsize


def open_shard(path: Path) -> np.ndarray:
    """The tokens of a shard as a read-only memory map (num_tokens,) uint16; reads the header alone.

    Raises:
        ShardError: not a shard of this format, or its size does not match its header.
    """
    get_again = "get the file again"
    try:
        with path.open("rb") as file:
            header_bytes = file.read(HEADER_BYTES)
            file_bytes = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ShardError(path, "file", "one that can be read", error.strerror, get_again) from error
    if header_bytes.startswith(b"\x93NUMPY"):
        raise ShardError(path, "format", "a shard", "a .npy file of NumPy", CONVERT)
    if len(header_bytes) < HEADER_BYTES:
        raise ShardError(path, "size", f"at least the header's {HEADER_BYTES:,} bytes", f"{file_bytes:,}", get_again)
    magic, version, num_tokens = np.frombuffer(header_bytes, dtype="<i4")[:3].tolist()
    if magic != MAGIC:
        bare = f"it has no header, like nanoGPT's .bin files, or another format: if it is of uint16, {CONVERT}"
        fix = f"{OTHER_FORMATS[magic]}: {TOKENIZE}" if magic in OTHER_FORMATS else bare
        raise ShardError(path, "magic number", MAGIC, magic, fix)
    if version != VERSION:
        raise ShardError(path, "format version", VERSION, version, TOKENIZE)
    if num_tokens < 1:
        raise ShardError(path, "number of tokens in the header", "at least 1", f"{num_tokens:,}", get_again)
    expected_bytes = shard_bytes(num_tokens)
    if file_bytes != expected_bytes:
        claim = f"{expected_bytes:,} bytes for the {num_tokens:,} uint16 tokens of the header"
        raise ShardError(path, "size", claim, f"{file_bytes:,}", get_again)
    return np.memmap(path, dtype=TOKEN_DTYPE, mode="r", offset=HEADER_BYTES, shape=(num_tokens,))


def verify_shard(path: Path, vocab_size: int) -> ShardInfo:
    """Read the whole shard once: hash it, and refuse tokens outside the vocabulary (ShardError).

    vocab_size is the model's; where it is GPT-2's, padded for speed, the padding is outside too.
    """
    is_gpt2 = is_gpt2_vocab(vocab_size)
    num_known = GPT2_VOCAB_SIZE if is_gpt2 else vocab_size
    tokens = open_shard(path)
    digest, max_token = hashlib.sha256(), 0
    for start in range(0, len(tokens), SCAN_TOKENS):
        block = tokens[start : start + SCAN_TOKENS]
        digest.update(block.data)
        max_token = max(max_token, int(block.max()))
        if max_token >= num_known:
            position = start + int(np.argmax(block >= num_known))
            vocabulary = "GPT-2's tokens" if is_gpt2 else f"model.vocab_size = {vocab_size}"
            raise ShardError(
                path,
                f"token at position {position:,}",
                f"at most {num_known - 1} ({vocabulary})",
                int(tokens[position]),
                "use the data that the config was made for",
            )
    return ShardInfo(path.name, len(tokens), max_token, digest.hexdigest())


def is_gpt2_vocab(vocab_size: int) -> bool:
    """Whether a model of this vocabulary reads GPT-2's tokens; the vocabulary is often padded for speed."""
    return GPT2_VOCAB_SIZE <= vocab_size <= GPT2_PADDED_VOCAB_SIZE


def check_numbering(paths: Iterable[Path]) -> None:
    """Raise ShardError when the files of a data set, by the numbers at the end of their names, have a gap."""
    numbers: dict[str, list[int]] = {}
    for path in paths:
        if match := re.fullmatch(r"(.*_)(\d{6})", path.stem):
            numbers.setdefault(str(path.parent / match[1]), []).append(int(match[2]))
    for prefix, present in numbers.items():
        missing = sorted(set(range(min(1, min(present)), max(present))) - set(present))
        if missing:
            names = f"{prefix}{missing[0]:06d}.bin" + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            span = f"{len(present)} with numbers {min(present)} to {max(present)}"
            raise ShardError(f"{prefix}*", "files", "numbers without a gap from 0 or 1", span, f"get {names}")


def fingerprint(shards: Iterable[ShardInfo]) -> str:
    """One sha256 over the token hashes of several shards, in order: equal exactly when the tokens are."""
    return hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest()
