"""Records refer by hash to a store of sources that they share: the same files stand in hundreds of records.

A packed record has {name: sha256} as source_hashes in the place of {name: text} as sources; all else is the same, byte
for byte. aurora/trainer/events.py reads both forms.
"""

import hashlib
import json
from pathlib import Path

from aurora.trainer.events import MAX_RECORD_BYTES, RecordError, read_event, with_sources


def pack(content: bytes) -> tuple[bytes, dict[str, bytes]]:
    """The content of a record, packed, and the texts that it needs by hash.

    A record whose first line is not as a run writes it would not be restored byte for byte. It is left as it is.
    """
    first, newline, rest = content.partition(b"\n")
    start = json.loads(first)
    if "sources" not in start or _line(start) != first:
        return content, {}
    texts = {name: text.encode("utf-8", "surrogatepass") for name, text in start["sources"].items()}
    hashes = {name: hashlib.sha256(text).hexdigest() for name, text in texts.items()}
    whole = start | {"sources": hashes}
    packed = {"source_hashes" if key == "sources" else key: value for key, value in whole.items()}
    return _line(packed) + newline + rest, {hashes[name]: text for name, text in texts.items()}


def unpack(path: Path) -> bytes:
    """The content of a record as its run wrote it.

    Raises:
        RecordError: it is no record, or the store lacks a text.
        OSError: it cannot be read.
    """
    if path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_RECORD_BYTES:
        raise RecordError(f"{path} is no regular file of at most {MAX_RECORD_BYTES:,} bytes (links are not followed)")
    content = path.read_bytes()
    first, newline, rest = content.partition(b"\n")
    start = read_event(first, f"{path}, line 1", is_first=True)
    return _line(with_sources(start, path)) + newline + rest if "source_hashes" in start else content


def packed_files(records: dict[Path, Path], store: Path) -> dict[Path, bytes]:
    """What to write to have these records there too, by their new paths: packed, and what the store lacks.

    Raises:
        RecordError: the store holds another text under one of the hashes, or a record cannot be unpacked.
    """
    files = {}
    for target, path in records.items():
        files[target], texts = pack(unpack(path))
        for digest, text in texts.items():
            place = store / digest
            if not place.exists():
                files[place] = text
            elif place not in files and place.read_bytes() != text:
                raise RecordError(f"{place} is damaged: its sha256 is not its name; restore it from git")
    return files


def _line(event: dict) -> bytes:
    """As aurora/trainer/writer.py writes it."""
    return json.dumps(event).encode()
