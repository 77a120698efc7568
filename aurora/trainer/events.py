"""The events of a record as they are read, from anybody's file: lines, types, limits, and the store of sources.

Events: run, train, val, neurons (of neurons.py), resume, end. A run writes its sources into the run event. Records in
results/ have source_hashes in their place and share a store of the texts. Readers see no difference.

Needs nothing but Python.
"""

import collections
import functools
import hashlib
import json
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from aurora.config import ROOT
from aurora.text import encoding_of


class RecordError(ValueError):
    """A file that is not a run record; the message names file, line and finding."""


MAX_RECORD_BYTES = 2**24  # a record's longest line holds the sources, 150 kB
MAX_LINE_BYTES = 2**22
MAX_EVENTS = 100_000
MAX_TABLES = 200_000  # and lists: of a few bytes each, they take far more memory than their text; runs have thousands
NUMBER = (int, float)
FIELD_TYPES: dict[str, dict[str, Any]] = {
    "run": {
        **dict.fromkeys(("run_id", "utc", "task_hash", "optimizer", "code_hash", "device"), str),
        **dict.fromkeys(("config", "hparams", "sources", "data", "env"), dict),
        **dict.fromkeys(("seed", "world_size"), int),
    },
    "val": {"step": int, "tokens": int, "val_loss": NUMBER, "train_time_s": NUMBER},
    "train": {"step": int, **dict.fromkeys(("train_loss", "lr", "step_ms", "optimizer_ms"), NUMBER)},
    "end": {
        **{"status": str, "step": int, "train_time_s": NUMBER, "wall_s": NUMBER, "untimed": dict, "segments": int},
    },
    "neurons": {
        **dict.fromkeys(("step", "tokens", "width"), int),
        **dict.fromkeys(("dead", "silent", "starved", "low_leverage", "starved_momentum"), NUMBER),
        "layers": list,
        "matrices": dict,
    },
    "resume": {"step": int, "segment": int, "world_size": int, "env": dict},
}
REQUIRED_FIELDS = {
    "val": ("step", "val_loss", "train_time_s"),
    "train": ("step",),
    "neurons": ("step", "width", "layers", "matrices"),
    "resume": ("step",),
    "end": ("status",),
}


def read_events(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and event of each line, with fields of the types of FIELD_TYPES and finite numbers.

    A last line without its end, as a crash leaves it, is dropped.

    Raises:
        RecordError: the file cannot be read, is no regular file, is too large, a line is not an event, or the first
            event is not "run".
    """
    try:
        if not path.exists() and not path.is_symlink():
            raise RecordError(f"{path}: no such file")
        if path.is_symlink() or not path.is_file():
            raise RecordError(f"{path} is no regular file (links are not followed)")
        if path.stat().st_size > MAX_RECORD_BYTES:
            raise RecordError(f"{path} is larger than {MAX_RECORD_BYTES:,} bytes")
        num_tables = 0
        with open(path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), start=1):
                if len(line) > MAX_LINE_BYTES:
                    raise RecordError(f"{path}, line {number}: longer than {MAX_LINE_BYTES:,} bytes")
                if number > MAX_EVENTS:
                    raise RecordError(f"{path} has more than {MAX_EVENTS:,} lines")
                num_tables += line.count(b"{") + line.count(b"[")
                if num_tables > MAX_TABLES:
                    raise RecordError(f"{path} has more than {MAX_TABLES:,} tables and lists; no run writes so many")
                if number == 1 and not (encoding := encoding_of(line[:4])).startswith("utf-8"):
                    raise RecordError(f"{path} is in {encoding}; save it as UTF-8")
                if line.endswith(b"\n"):
                    event = read_event(line, f"{path}, line {number}", is_first=number == 1)
                    yield number, with_sources(event, path) if number == 1 else event
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror}") from error


def read_event(line: bytes, where: str, is_first: bool) -> dict[str, Any]:
    try:
        event = json.loads(line, object_pairs_hook=unique_keys, parse_constant=no_number)
        kind = event["event"]
        if is_first and kind != "run":
            raise RecordError(f"{where}: a record begins with a run event, not {str(kind)[:40]!r}")
        types = FIELD_TYPES.get(kind, {})  # TypeError for a kind that is a list or table
        for key in REQUIRED_FIELDS.get(kind, ()):
            event[key]
    except RecordError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:  # ValueError: no JSON, no UTF-8, too many digits
        message = f"{where}: not an event of a run record ({type(error).__name__}: {str(error)[:100]})"
        raise RecordError(message) from error
    for key, expected in types.items():
        value = event.get(key)
        if key in event and (not isinstance(value, expected) or isinstance(value, bool)):
            raise RecordError(f"{where}: {key} is of the wrong type, {type(value).__name__}")
        if isinstance(value, NUMBER) and not is_sane(value):
            raise RecordError(f"{where}: {key} is no finite number")
    return event


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A table. Of a key that it has twice other readers may take the other value."""
    table = dict(pairs)
    if len(table) != len(pairs):
        (key, _), *_ = collections.Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"a table has the key {key!r} more than once")
    return table


def no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


STORE = "sources"  # the folder, beside a record or above it, of the texts to which the record refers by their sha256


def with_sources(start: dict[str, Any], path: Path) -> dict[str, Any]:
    """The run event of the record at path, with sources in the place of source_hashes; equal texts are kept once.

    Raises:
        RecordError: a text is not in the store, or not what its hash says, or the event has both keys.
    """
    if "source_hashes" not in start:
        sources = start.get("sources")
        if not isinstance(sources, dict):
            return start
        once = {name: sys.intern(text) if isinstance(text, str) else text for name, text in sources.items()}
        return start | {"sources": once}
    if "sources" in start or not isinstance(start["source_hashes"], dict):
        raise RecordError(f"{path}: source_hashes is no table, or stands beside sources")
    folder, texts, num_characters = path.absolute().parent, {}, 0
    for name, digest in start["source_hashes"].items():
        texts[name] = stored_source(folder, digest)
        num_characters += len(texts[name] or "")
        if num_characters > MAX_LINE_BYTES:
            raise RecordError(f"{path} refers to more than {MAX_LINE_BYTES:,} bytes of sources")
    if missing := sorted(name for name, text in texts.items() if text is None):
        names = f"{ascii(missing[0])[:80]} and {len(missing) - 1} more" if missing[1:] else ascii(missing[0])[:80]
        raise RecordError(f"{path} refers to texts that no folder {STORE}/ beside or above it holds whole: {names}")
    whole = start | {"source_hashes": texts}
    return {"sources" if key == "source_hashes" else key: value for key, value in whole.items()}


def stored_source(folder: Path, digest: Any) -> str | None:
    """A text by the sha256 of its UTF-8, for records in a folder; None where no store holds it."""
    if not isinstance(digest, str) or len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        return None
    try:
        return _stored_source(folder, digest)
    except (OSError, UnicodeDecodeError):
        return None


@functools.lru_cache(maxsize=10_000)  # hundreds of records share their texts; what is not found is looked for again
def _stored_source(folder: Path, digest: str) -> str:
    for place in (*(parent / STORE for parent in (folder, *folder.parents)), ROOT / "results" / STORE):
        path = place / digest
        if path.is_file() and not path.is_symlink() and path.stat().st_size <= MAX_LINE_BYTES:
            text = path.read_bytes()
            if hashlib.sha256(text).hexdigest() == digest:
                return sys.intern(text.decode("utf-8", "surrogatepass"))  # as JSON can have it
    raise FileNotFoundError(digest)


def is_sane(value: int | float) -> bool:
    return abs(value) < 2**64 if isinstance(value, int) else math.isfinite(value)


def without_undone(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """What counts of the events after the first: a resume undoes an end, and all that came after its step."""
    kept: list[dict[str, Any]] = []
    for event in events:
        if event["event"] == "resume":
            while kept and (kept[-1]["event"] == "end" or kept[-1]["step"] > event["step"]):
                kept.pop()
        if event["event"] in REQUIRED_FIELDS:
            kept.append(event)
    return kept
