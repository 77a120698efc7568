"""What only several records show: copies, losses or weights under another name, and unlike data under one task."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from aurora.trainer.identity import json_hash, shards_of
from aurora.trainer.record import Run


class Trace(NamedTuple):
    """What is compared of a record: little, for there may be thousands."""

    path: Path
    utc: str
    run_id: str
    start: str  # hash of the run event
    seed: int
    task: str
    shards: tuple[str, ...]
    validations: tuple[tuple[int, float], ...]
    train_losses: str  # hash; empty without three of them
    weights: str  # hash; empty without an end
    is_ended: bool


def trace_of(run: Run) -> Trace:
    start, end = run.start, run.end or {}
    trains = [(event["step"], event["train_loss"]) for event in run.train_events if event.get("train_loss", 0) > 0]
    return Trace(
        *(run.path, str(start.get("utc", "")), str(start.get("run_id", run.path)), start_hash(start)),
        *(start["seed"], start["task_hash"], tuple(shards_of(start))),
        tuple((validation.step, validation.val_loss) for validation in run.validations),
        json_hash(trains) if len(trains) >= 3 else "",
        str(end.get("weights_sha256", "")),
        bool(end),
    )


def start_hash(start: dict[str, Any]) -> str:
    """Of a run event; the code hash stands for the sources."""
    return json_hash({key: value for key, value in start.items() if key != "sources"})


class Finding(NamedTuple):
    later: Trace
    earlier: Trace
    text: str  # of the later, with the name of the earlier
    is_refuted: bool


def findings(traces: Iterable[Trace]) -> Iterator[Finding]:
    """In time linear in the number of records. The earlier of two is taken for the original."""
    by_id: dict[str, Trace] = {}
    by_losses: dict[tuple, Trace] = {}
    by_training: dict[tuple[str, str], Trace] = {}
    by_shard: dict[tuple[str, int], tuple[str, Trace]] = {}
    for trace in sorted(traces, key=lambda trace: (trace.utc, trace.path)):
        original = by_id.setdefault(trace.run_id, trace)
        if original is not trace and not is_part(trace, original):
            yield Finding(trace, original, "has the run_id, but not the contents, of", True)
        repeated = by_losses.setdefault(trace.validations, trace) if len(trace.validations) > 1 else trace
        if repeated is not trace:
            # The same command gives the same losses again. In one folder they count as two runs, if both ended.
            both_count = trace.path.parent == repeated.path.parent and trace.is_ended and repeated.is_ended
            yield Finding(trace, repeated, "repeats the losses of", both_count)
        for kind, digest in (("training losses", trace.train_losses), ("weights", trace.weights)):
            twin = by_training.setdefault((kind, digest), trace) if digest else trace
            if twin is not trace and (words := in_what_twins_differ(trace, twin)):
                yield Finding(trace, twin, f"has under another {words} the {kind} of", True)
                break
        for index, digest in enumerate(trace.shards):
            known, first = by_shard.setdefault((trace.task, index), (digest, trace))
            if known != digest:
                yield Finding(trace, first, f"has the task_hash, but in place {index} not the train shard, of", True)
                break


def is_part(one: Trace, other: Trace) -> bool:
    """Whether two records are one run, of which one may have been copied before it had ended."""
    short, long = sorted((one.validations, other.validations), key=len)
    same_end = not (one.is_ended and other.is_ended) or one.weights == other.weights
    return one.start == other.start and long[: len(short)] == short and same_end


def in_what_twins_differ(one: Trace, other: Trace) -> str:
    """Seed or losses, in which two runs of one training cannot differ."""
    if one.seed != other.seed:
        return "seed"
    losses = dict(other.validations)
    differ = any(losses.get(step, loss) != loss for step, loss in one.validations)
    return "val_loss" if one.task == other.task and differ else ""
