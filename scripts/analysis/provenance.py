"""Where each run comes from: all that its record says of config, code, machine and end, and whether that fits."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

from aurora.trainer.record import Run
from scripts.analysis.text import plain

# Said elsewhere in the record, or too long to read.
LEFT_OUT = ("event", "hparams", "param_groups", "sources", "source_hashes")
LONGEST = 300


def facts_of(run: Run) -> dict[str, str]:
    """Keys joined by dots and their values as text; of each source file the beginning of its sha256."""
    found = dict(flat({key: value for key, value in run.start.items() if key not in LEFT_OUT}))
    found["argv"] = plain(" ".join(map(str, run.start["argv"])), LONGEST)
    found |= flat({key: value for key, value in (run.end or {}).items() if key != "event"}, "end.")
    return found | {f"sources.{plain(name)}": digest(text) for name, text in run.start["sources"].items()}


def flat(table: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in table.items():
        name = f"{prefix}{plain(key)}"
        if isinstance(value, dict):
            yield from flat(value, f"{name}.")
        else:
            yield name, plain(value if isinstance(value, str) else json.dumps(value), LONGEST)


_DIGESTS: dict[str, str] = {}  # hundreds of runs share their texts


def digest(text: Any) -> str:
    if str(text) not in _DIGESTS:
        _DIGESTS[str(text)] = hashlib.sha256(str(text).encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return _DIGESTS[str(text)]


def provenance(runs: Sequence[Run]) -> dict[str, Any]:
    """The facts of many runs in little room.

    common: what all say alike. differing: by key the values that occur, and of each run the index of its own, or null.
    """
    facts = [facts_of(run) for run in runs]
    common, differing = {}, {}
    for key in sorted({key for own in facts for key in own}):
        values = [own.get(key) for own in facts]
        distinct = list(dict.fromkeys(value for value in values if value is not None))
        if len(set(values)) == 1:
            common[key] = distinct[0]
        else:
            places = {value: place for place, value in enumerate(distinct)}
            differing[key] = {
                "values": distinct,
                "of": [None if value is None else places[value] for value in values],
            }
    return {"common": common, "differing": differing}
