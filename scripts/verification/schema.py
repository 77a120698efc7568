"""The fields of a record's events: which there are, and types and bounds of those that nothing else decides.

A field belongs to a record if the code in it writes it: so records of other versions, and of edited trainers, are read
by their own rule.
"""

import datetime
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from aurora.trainer.identity import EXTERNAL
from scripts.verification.events import LEVERAGE_KEYS, Events

DEVICES = ("cuda", "mps", "cpu")
ATTENTIONS = ("flash", "flash (FA3)", "cudnn", "efficient", "math", "blocked")
STATUSES = ("done", "diverged", "interrupted")
FIRST_YEAR = 2025  # no version of torch that this project runs on is older


class Field(NamedTuple):
    wanted: str
    fits: Callable[[Any], bool]


def whole(low: int = 0, high: int = 2**53) -> Field:
    return Field(f"a whole number from {low} to {high}", lambda value: type(value) is int and low <= value <= high)


def number(low: float = 0.0, high: float = 1e9) -> Field:
    return Field(
        f"a number from {low:g} to {high:g}", lambda value: type(value) in (int, float) and low <= value <= high
    )


def text(pattern: str = r"[\x20-\x7e\u00a0-\ud7ff]+", wanted: str = "text of one line") -> Field:
    return Field(wanted, lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None)


def one_of(*values: Any) -> Field:
    return Field(
        " or ".join(map(repr, values)), lambda value: any(type(value) is type(v) and value == v for v in values)
    )


def optional(field: Field) -> Field:
    return Field(f"{field.wanted} or null", lambda value: value is None or field.fits(value))


def all_of(field: Field, container: type = list) -> Field:
    def fits(value: Any) -> bool:
        parts = value.values() if container is dict and isinstance(value, dict) else value
        return isinstance(value, container) and all(map(field.fits, parts))

    return Field(f"a {container.__name__} of {field.wanted}", fits)


def is_time(value: Any) -> bool:
    """A time in UTC that can have been: clocks differ, but not by a day."""
    try:
        time = datetime.datetime.fromisoformat(value)
        latest = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=1)
        return time.utcoffset() == datetime.timedelta() and time.year >= FIRST_YEAR and time <= latest
    except (TypeError, ValueError, OverflowError):
        return False


TIME = Field(f"a time in UTC, since {FIRST_YEAR} and not to come", is_time)
TABLE = Field("a table", lambda value: isinstance(value, dict))
LIST = Field("a list", lambda value: isinstance(value, list))
BOOL = one_of(True, False)
SHA256 = text("[0-9a-f]{64}", "a sha256")
VERSION = text(r"\d+\.\d+\S*", "a version")
ENV = {
    "python": VERSION,
    **dict.fromkeys(("platform", "cpu_model"), text()),
    "cpu": text(r"[^\n\r]*"),
    "cpu_count": whole(1, 2**14),  # more than any machine has
    "usable_cpus": whole(1, 2**14),
    "variables": all_of(Field("text", lambda value: isinstance(value, str)), dict),
    **dict.fromkeys(("torch", "numpy"), VERSION),
    "torch_threads": whole(1, 2**14),
    "device_name": text(r"[^\n\r]*"),
    "cuda": optional(VERSION),
    "cudnn": optional(whole(1)),
}
GIT = {
    "git": Field("anything, of which a note tells", lambda value: True),
    "git.commit": text("[0-9a-f]{40}|[0-9a-f]{64}", "a commit"),
    "git.dirty": BOOL,
}
# How a process computed, which a resume may change.
SEGMENT = {
    "utc": TIME,
    "world_size": whole(1, 2**16),
    "device": one_of(*DEVICES),
    "compiled": BOOL,
    "attention": one_of(*ATTENTIONS),
    "forward": one_of("fast", "plain"),
    "kernels": one_of("triton", "torch"),
    "model_edits": all_of(text()),
    "micro_batch": whole(1),
    "env": TABLE,
    **GIT,
    **{f"env.{name}": field for name, field in ENV.items()},
}
FIELDS: dict[str, dict[str, Field]] = {
    "run": {
        "schema": whole(),
        "run_id": text(r"[A-Za-z0-9._-]+", "a run_id of letters, digits, '.', '_' and '-'"),
        "argv": all_of(Field("text", lambda value: isinstance(value, str))),
        **dict.fromkeys(("config", "hparams", "params_by_role", "sources", "data"), TABLE),
        **dict.fromkeys(("task_hash", "code_hash"), SHA256),
        "optimizer": text(),
        **{"rule": TABLE, "resumable": BOOL},
        "rule.class": text(r"\w+(\.[\w<>]+)+", "a class"),
        "rule.packages": all_of(text(r"(\S+ \d\S*)?", "a name and version, or nothing"), dict),
        "param_groups": all_of(TABLE),
        "seed": whole(0, 2**63 - 1),
        **SEGMENT,
        "data.shards": all_of(TABLE),
        **dict.fromkeys(("data.fingerprint", "data.val_sha256", "data.stream_id"), SHA256),
        "data.epochs": number(),
    },
    "val": {"step": whole(), "tokens": whole(), "val_loss": number(0, 1e3), "train_time_s": number()},
    "train": {
        "step": whole(1),
        "train_loss": number(0, 1e6),
        "lr": number(),
        "scheduled": all_of(number(), dict),
        "step_ms": number(),
        "optimizer_ms": number(),
    },
    "neurons": {
        **{"step": whole(1), "tokens": whole(1), "width": whole(1), "layers": LIST, "matrices": TABLE},
        **dict.fromkeys(("dead", "silent", "starved", *LEVERAGE_KEYS), number(0, 1)),
    },
    "resume": {"step": whole(), "segment": whole(2), **SEGMENT},
    "end": {
        "status": one_of(*STATUSES),
        "step": whole(),
        "train_time_s": number(),
        "val_loss": optional(number(0, 1e3)),
        "reached_target": BOOL,
        "steps_to_target": optional(whole()),
        "time_to_target_s": optional(number()),
        "wall_s": number(),
        "untimed": TABLE,
        **{f"untimed.{name}_s": number() for name in ("import", "setup", "warmup", "val", "checkpoint", "end")},
        "segments": whole(1),
        "data_wait_s": number(),
        "weights_sha256": SHA256,
        "peak_mem_mib": number(0, 2**30),
        "tokens_per_s": optional(number(0, 1e12)),
        "mfu": optional(number(0, 1)),
    },
}
MATRIX = {
    **{"update_cv": number(), "update_quantiles": all_of(number()), "starved": whole()},
    **{
        "leverage_histogram": optional(all_of(whole())),
        "low_leverage": optional(whole()),
        "low_streaks": optional(all_of(whole())),
        "leverage_quantiles": optional(all_of(number())),  # this and the next in older records
        "starved_momentum": optional(whole()),
        "effective_rank": number(),
    },
}
LAYER = {"dead": whole(), "still_dead": optional(whole()), "silent": whole()}
SHARD = {"file": text(), "num_tokens": whole(1), "max_token": whole(0, 2**16 - 1), "sha256": SHA256}
OPEN = ("config", "hparams", "params_by_role", "sources", "env.variables")  # tables of which others decide the keys
# Fields that not every event of a kind has: of an edited model, a rule without momentum, schedules of pieces, an
# optimizer of others.
SELDOM = {"dead", "silent", "starved", *LEVERAGE_KEYS, "scheduled", "rule", "resumable"}


def check_fields(run: Events) -> Iterator[str]:
    code = Code(run.start["sources"])
    found: dict[str, None] = {}  # once for all events of a kind
    for event in (run.start, *run.rest):
        found |= dict.fromkeys(wrong_fields(event, code))
    yield from found
    for index, shard in enumerate(run.start["data"]["shards"]):
        yield from wrong_parts(shard, SHARD, f"data.shards[{index}]", code)
    for event in run.of("neurons"):
        for name, matrix in event["matrices"].items():
            yield from wrong_parts(matrix, MATRIX, f"neurons of step {event['step']}: {name}", code)
        for layer in event["layers"]:
            yield from wrong_parts(layer, LAYER, f"neurons of step {event['step']}: a layer", code)


class Code:
    """The Python among a record's sources, which says what it writes."""

    def __init__(self, sources: dict[str, Any]):
        own = {name: text for name, text in sources.items() if not name.startswith(f"{EXTERNAL}/")}
        self.text = "\n".join(text for name, text in own.items() if name.endswith(".py") and isinstance(text, str))
        self.known = known_of(self.text)

    def holds(self, words: str) -> bool:
        if words not in self.known:
            self.known[words] = words in self.text
        return self.known[words]

    def names(self, key: str) -> bool:
        """Whether the key may be of this code: an edited trainer may write fields of its own."""
        stem = key.removesuffix("_s")  # seconds by account are named after it
        return any(self.holds(f'"{word}"') or self.holds(f"    {word}: ") for word in (key, stem))

    def writes(self, key: str) -> bool:
        """Whether the key of an event is surely written by this code."""
        return self.holds(f'"{key}":')

    def declares(self, key: str) -> bool:
        """Whether a dataclass has this field."""
        return self.holds(f"    {key}: ")


@functools.lru_cache(maxsize=16)
def known_of(text: str) -> dict[str, bool]:
    """What has been looked up in a code; records share theirs."""
    return {}


def wrong_fields(event: dict[str, Any], code: Code) -> Iterator[str]:
    kind = event["event"]
    fields = FIELDS.get(kind)
    if fields is None:  # which another check says
        return
    for name, field in fields.items():
        *parents, key = name.split(".")
        table: Any = event
        for parent in parents:
            table = table.get(parent) if isinstance(table, dict) else None
        if not isinstance(table, dict):  # the error is that of the table, or it is null
            continue
        if key in table:
            if not field.fits(table[key]):
                yield f"{kind} event: {name} is {str(table[key])[:60]}, not {field.wanted}"
        elif key not in SELDOM and not is_noted(kind, name) and code.writes(key):
            yield f"{kind} event lacks {name}, which its code writes"
    tables = {"": event} | {
        name: event.get(name) for name in ("data", "env", "git", "rule", "untimed") if name in fields
    }
    for name, table in tables.items():
        known = {key.removeprefix(f"{name}.") if name else key.partition(".")[0] for key in fields}
        for key in table if isinstance(table, dict) else ():
            if key not in (*known, "event") and not code.names(key):
                yield f"{kind} event has {f'{name}.{key}' if name else key}, which its code does not write"


def is_noted(kind: str, name: str) -> bool:
    """Whether a record that lacks this field has what the checks need all the same."""
    return kind == "resume" or name == "env.cpu_model"


def notes_on_fields(run: Events) -> Iterator[str]:
    code = Code(run.start["sources"])
    for event in (run.start, *run.of("resume")):
        kind = event["event"]
        for name in FIELDS[kind]:
            *parents, key = name.split(".")
            table = event[parents[0]] if parents and isinstance(event.get(parents[0]), dict) else event
            if is_noted(kind, name) and key not in table and code.writes(key):
                yield f"{kind} event lacks {name}, which its code writes"


def wrong_parts(part: dict[str, Any], fields: dict[str, Field], label: str, code: Code) -> Iterator[str]:
    for key, field in fields.items():
        if key not in part:
            if code.writes(key):
                yield f"{label} lacks {key}"
        elif not field.fits(part[key]):
            yield f"{label}: {key} is {str(part[key])[:60]}, not {field.wanted}"
    for key in part.keys() - fields.keys():
        if not code.names(key):
            yield f"{label} has {key}, which its code does not write"
