"""The weights of a finished run, in a safetensors file beside its record. Reading them executes nothing.

A file is the length of its header as 8 bytes, the header in JSON, then the tensors' bytes one after the other, in the
order of the header (https://github.com/huggingface/safetensors#format). Needs nothing but Python.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from aurora.trainer.events import no_number, unique_keys

SUFFIX = ".safetensors"
# The format's name of a dtype, what torch calls it, and the bytes of an element.
DTYPES = {
    "F64": ("torch.float64", 8), "F32": ("torch.float32", 4), "F16": ("torch.float16", 2),
    "BF16": ("torch.bfloat16", 2), "F8_E4M3": ("torch.float8_e4m3fn", 1), "F8_E5M2": ("torch.float8_e5m2", 1),
    "I64": ("torch.int64", 8), "I32": ("torch.int32", 4), "I16": ("torch.int16", 2), "I8": ("torch.int8", 1),
    "U8": ("torch.uint8", 1), "BOOL": ("torch.bool", 1),
}  # fmt: skip
NAME_OF = {of_torch: name for name, (of_torch, _) in DTYPES.items()}
MAX_HEADER_BYTES = 2**22
BLOCK_BYTES = 2**22


class WeightsError(ValueError):
    """A file that does not hold the weights of its run; the message names it and the finding."""


class Stored(NamedTuple):
    """One tensor of a file, row by row from the byte begin to the byte end."""

    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]
    begin: int
    end: int


def weights_of(record: Path) -> Path:
    """Where the weights of the run with this record are, if there are any."""
    return record.with_suffix(SUFFIX)


def header_of(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """A file up to its first tensor. tensors: dtype, as torch calls it, and shape, by name, in order.

    Raises:
        WeightsError: a dtype that the format does not have.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    begin = 0
    for name, (dtype, shape) in tensors.items():
        if dtype not in NAME_OF:
            raise WeightsError(f"{name} is of {dtype}, which a safetensors file cannot hold")
        end = begin + math.prod(shape) * DTYPES[NAME_OF[dtype]][1]
        entries[name] = {"dtype": NAME_OF[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # tensors then begin where processors like it
    return len(text).to_bytes(8, "little") + text


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a file by name, in order. The file's metadata is not looked at.

    Raises:
        WeightsError: no file, no safetensors, or tensors that do not fill the file one after the other.
    """
    try:
        if not path.is_file():  # a pipe would be waited for
            raise WeightsError(f"weights {path}: there is no such file")
        num_bytes = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(MAX_HEADER_BYTES, num_bytes - 8):
                raise WeightsError(f"weights {path} are no safetensors file, or cut: {num_bytes:,} bytes")
            text = file.read(length)
    except OSError as error:
        raise WeightsError(f"weights {path} cannot be read: {error.strerror}") from error
    try:
        entries = json.loads(text, object_pairs_hook=unique_keys, parse_constant=no_number)
        found, place = {}, 8 + length
        for name, entry in entries.items():
            if name == "__metadata__":
                continue
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            if any(type(size) is not int or not 0 <= size < 2**48 for size in (*shape, begin, end)) or len(shape) > 8:
                raise ValueError("a size is none")
            size = math.prod(shape) * DTYPES[dtype][1]
            if (8 + length + begin, end - begin) != (place, size):
                raise ValueError(f"{ascii(name)[:80]} is not where it should be")
            found[name] = Stored(dtype, shape, place, place + size)
            place += size
        if place != num_bytes:
            raise ValueError(f"its tensors take {place:,} bytes, it has {num_bytes:,}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"weights {path} are damaged: {type(error).__name__}: {ascii(str(error))[1:121]}") from error
    return found


def digest_of(path: Path) -> str:
    """What a record calls weights_sha256, of a file. Raises WeightsError."""
    sha = hashlib.sha256()
    tensors = read_header(path)
    try:
        with open(path, "rb") as file:
            for name, (dtype, shape, begin, end) in tensors.items():
                sha.update(f"{name}:{DTYPES[dtype][0]}{shape}".encode("utf-8", "surrogatepass"))
                file.seek(begin)
                for size in block_sizes(end - begin):
                    sha.update(file.read(size))
    except OSError as error:
        raise WeightsError(f"weights {path} cannot be read: {error.strerror}") from error
    return sha.hexdigest()


def block_sizes(num_bytes: int) -> Iterable[int]:
    """Of the blocks in which so many bytes are read: a tensor may be larger than what one wants to hold twice."""
    return (min(BLOCK_BYTES, num_bytes - begin) for begin in range(0, num_bytes, BLOCK_BYTES))


def check_weights(record: Path, sha256: str) -> Path:
    """The file of the weights beside a record, which are those that the record ended with. Raises WeightsError."""
    path = weights_of(record)
    if not os.path.lexists(path):
        fix = "the run was told train.save_model = false, or is of an earlier version; train again"
        raise WeightsError(f"{record} has no weights beside it, {path.name}: {fix}")
    if digest_of(path) != sha256:
        raise WeightsError(f"weights {path} are not those of the record, by its weights_sha256; get the file again")
    return path
