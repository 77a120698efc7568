"""Reading run records: one JSONL file a run, one event a line. Needs nothing but Python."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple


class RecordError(ValueError):
    """A file that is not a run record; the message names file, line and finding."""


class Validation(NamedTuple):
    step: int
    val_loss: float
    train_time_s: float


@dataclass
class Run:
    """A run as its record tells it; without an end event it is incomplete."""

    path: Path
    start: dict[str, Any]
    validations: list[Validation] = field(default_factory=list)
    train_events: list[dict[str, Any]] = field(default_factory=list)
    end: dict[str, Any] | None = None

    @property
    def is_done(self) -> bool:
        return self.end is not None and self.end["status"] == "done"

    @property
    def target(self) -> float:
        return self.start["config"]["eval"]["target"]

    def first_at_target(self) -> Validation | None:
        """The first validation at or below the target."""
        return next((look for look in self.validations if look.val_loss <= self.target), None)

    def mean_ms(self, key: str) -> float:
        """Mean of "step_ms" or "optimizer_ms" over the run, or NaN when the record has no train events."""
        values = [event[key] for event in self.train_events]
        return sum(values) / len(values) if values else math.nan


def read_record(path: Path) -> Run:
    """Read one record. A last line without its end, as a crash leaves it, is dropped.

    After a resume a step can stand in the file twice; the later line counts.

    Raises:
        RecordError: the file cannot be read, a line is not an event, or the first event is not "run".
    """
    try:
        *lines, _torn = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path} cannot be read: {error}") from error
    run: Run | None = None
    validations: dict[int, Validation] = {}
    train_events: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            event = json.loads(line)
            kind = event["event"]
            if run is None:
                if kind != "run":
                    raise RecordError(f"{path}, line 1: a record begins with a run event, not {kind!r}")
                run = Run(path, event)
            elif kind == "val":
                validations[event["step"]] = Validation(event["step"], event["val_loss"], event["train_time_s"])
            elif kind == "train":
                train_events[event["step"]] = event
            elif kind == "end":
                run.end = event
            elif kind == "resume":
                run.end = None
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise RecordError(f"{path}, line {number}: not an event of a run record ({error!r})") from error
    if run is None:
        raise RecordError(f"{path} holds no event")
    run.validations = [validations[step] for step in sorted(validations)]
    run.train_events = [train_events[step] for step in sorted(train_events)]
    return run


def read_folder(folder: Path) -> tuple[list[Run], list[RecordError]]:
    """All records below a folder in order of their names, and what could not be read."""
    runs, errors = [], []
    for path in sorted(folder.rglob("*.jsonl")):
        try:
            runs.append(read_record(path))
        except RecordError as error:
            errors.append(error)
    return runs, errors


def by_optimizer(runs: Iterable[Run]) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.start["optimizer"], []).append(run)
    return groups
