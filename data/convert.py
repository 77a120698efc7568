"""Make shards of tokens that others saved: .npy files of NumPy, as build-nanogpt's, or bare uint16, as nanoGPT's."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from aurora.tokens.shards import TOKEN_DTYPE, ShardError, open_shard, starts_as_shard, write_shard

SEEN_TOKENS = 1 << 20  # enough to tell uint32 from uint16


def convert(paths: list[Path], out: Path, shard_tokens: int) -> Iterator[str]:
    """Write the tokens of each file to shards of its name in folder out; yields a line about each.

    Raises:
        ShardError: a file is no row of tokens, or a shard of other tokens has the name.
        OSError: the disk is full or out is not writable; whole shards stay.
    """
    for path in paths:
        tokens = read_tokens(path)
        for number, begin in enumerate(range(0, len(tokens), shard_tokens)):
            is_numbered = re.search(r"_\d{6}$", path.stem) and len(tokens) <= shard_tokens
            target = out / (f"{path.stem}.bin" if is_numbered else f"{path.stem}_{number:06d}.bin")
            part = np.asarray(tokens[begin : begin + shard_tokens])
            if not target.exists():
                write_shard(target, part)
            elif not np.array_equal(open_shard(target), part):
                raise ShardError(target, "file", "none yet", "one of other tokens", "use another --out")
            yield f"{target}: {len(part):,} tokens, the largest {int(part.max())}"


def read_tokens(path: Path) -> np.ndarray:
    """(num_tokens,) integers, mapped."""
    fix = "name .npy files, or .bin files of uint16 without a header"
    try:
        with path.open("rb") as file:
            head = file.read(8)
        if head.startswith(b"\x93NUMPY"):
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        elif starts_as_shard(head):
            raise ShardError(path, "format", "tokens to convert", "a shard, which trains as it is", "leave it out")
        else:
            tokens = np.memmap(path, dtype=TOKEN_DTYPE, mode="r")
    except OSError as error:
        raise ShardError(path, "file", "one that can be read", error.strerror or error, fix) from error
    except ValueError as error:
        if isinstance(error, ShardError):
            raise
        raise ShardError(path, "content", "a row of uint16", " ".join(str(error).split()), fix) from error
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or not tokens.size:
        raise ShardError(path, "content", "a row of tokens", f"{tokens.dtype} of shape {tokens.shape}", fix)
    seen = tokens[:SEEN_TOKENS]
    if tokens.dtype == TOKEN_DTYPE and len(seen) > 8 and not seen[1::2].any():
        raise ShardError(path, "content", "uint16", "every second one 0, as in uint32", "save it as uint16, as .npy")
    return tokens
