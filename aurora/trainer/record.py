"""Runs as their records tell of them, and folders of records. Needs nothing but Python: results are read anywhere.

writer.py writes a record, events.py reads its lines.
"""

import itertools
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from aurora.schedule import SHORT_FORM
from aurora.trainer.events import NUMBER, RecordError, read_events, without_undone
from aurora.trainer.identity import EXTERNAL, json_hash


class Validation(NamedTuple):
    step: int
    val_loss: float
    train_time_s: float


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    validations: list[Validation] = field(default_factory=list)
    segments: int = 1  # processes that the run took: one, and one more for each resume


def first_at_target(validations: Iterable[Validation], target: float) -> Validation | None:
    """The first validation, in the order given, at or below the target."""
    return next((validation for validation in validations if validation.val_loss <= target), None)


@dataclass
class Run:
    """A run as its record tells it; without an end event it is incomplete."""

    path: Path
    start: dict[str, Any]
    validations: list[Validation] = field(default_factory=list)
    train_events: list[dict[str, Any]] = field(default_factory=list)
    neuron_events: list[dict[str, Any]] = field(default_factory=list)
    resumes: list[dict[str, Any]] = field(default_factory=list)
    end: dict[str, Any] | None = None

    @property
    def is_done(self) -> bool:
        return self.end is not None and self.end["status"] == "done"

    @property
    def end_event(self) -> dict[str, Any]:
        """Of a run that is known to have one."""
        assert self.end is not None, f"{self.path} has no end event"
        return self.end

    @property
    def target(self) -> float:
        return self.start["config"]["eval"]["target"]

    @property
    def setting(self) -> dict[str, Any]:
        """Hyper-parameters and schedule, its length included: what tells runs of one optimizer apart."""
        config = self.start["config"]
        schedule = config.get("schedule") or {}  # whose lr is another than the hyper-parameter
        schedule = {key if key in SHORT_FORM else f"schedule.{key}": value for key, value in schedule.items()}
        rule, is_named = config.get("rule"), config.get("rule") in (None, self.start.get("optimizer"))
        others = {} if is_named else {"rule": rule, "parameters": config["parameters"]}
        if isinstance(found := self.start.get("rule"), dict):  # of another package: one code is one optimizer
            texts = {name: text for name, text in self.start["sources"].items() if name.startswith(f"{EXTERNAL}/")}
            others["code"] = json_hash([found.get("packages"), texts])[:8]
        return others | self.start.get("hparams", {}) | schedule | {"steps": config["train"]["steps"]}

    def condense(self) -> None:
        """Leave out most of the record, which tables do not show: neurons, and of the train events all but the last."""
        means = {key: self.mean_ms(key) for key in ("step_ms", "optimizer_ms")}
        self.train_events = [event | means for event in self.train_events[-3:]]  # which tell twins
        self.neuron_events = []

    def extent(self) -> tuple[bool, int, int]:
        """How far the record goes."""
        last = self.train_events[-1]["step"] if self.train_events else 0
        return self.end is not None, len(self.validations), last

    def first_at_target(self) -> Validation | None:
        """The first validation at or below the target."""
        return first_at_target(self.validations, self.target)

    def mean_ms(self, key: str) -> float:
        """Mean of "step_ms" or "optimizer_ms" over the run, or NaN when the record has no train events."""
        values = [event[key] for event in self.train_events if key in event]
        return sum(values) / len(values) if values else math.nan


# What every reader of runs relies on; nested names are joined by dots.
NEEDED_OF_RUN = {
    **dict.fromkeys(("optimizer", "task_hash", "env.device_name", "env.torch"), str),
    **dict.fromkeys(("seed", "world_size", "config.train.steps", "config.train.batch_tokens"), int),
    "config.eval.target": NUMBER,
    "config.schedule": (dict, type(None)),
    "sources": dict,
    "argv": list,
}
NEEDED_OF_DONE = {"step": int, "train_time_s": NUMBER, "val_loss": NUMBER}


def check_needed(event: dict[str, Any], needed: dict[str, Any], path: Path) -> None:
    """Raises RecordError if a field that is needed is missing or of another type."""
    for name, expected in needed.items():
        value: Any = event
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if not isinstance(value, expected) or isinstance(value, bool):
            raise RecordError(f"{path}: {name} of the {event['event']} event is missing or of the wrong type")


def read_record(path: Path) -> Run:
    """Read one record. What a resume has undone is dropped, as is a last line without its end, which a crash leaves.

    Raises:
        RecordError: as read_events, or the file holds no event, or lacks what readers need.
    """
    return run_of(path, [event for _, event in read_events(path)])


def run_of(path: Path, events: list[dict[str, Any]]) -> Run:
    """What read_record() makes of a record's events. Raises RecordError."""
    if not events:
        raise RecordError(f"{path} holds no event")
    start, *rest = events
    check_needed(start, NEEDED_OF_RUN, path)
    run = Run(path, start)
    validations: dict[int, Validation] = {}
    train_events: dict[int, dict[str, Any]] = {}
    neuron_events: dict[int, dict[str, Any]] = {}
    for event in without_undone(rest):
        kind = event["event"]
        if kind == "val":
            validations[event["step"]] = Validation(event["step"], event["val_loss"], event["train_time_s"])
        elif kind == "train":
            train_events[event["step"]] = event
        elif kind == "neurons":
            neuron_events[event["step"]] = event
        elif kind == "end":
            if event["status"] == "done":
                check_needed(event, NEEDED_OF_DONE, path)
            run.end = event
        elif kind == "resume":
            run.resumes.append(event)
    run.validations = [validations[step] for step in sorted(validations)]
    run.train_events = [train_events[step] for step in sorted(train_events)]
    run.neuron_events = [neuron_events[step] for step in sorted(neuron_events)]
    return run


def record_paths(folder: Path) -> list[Path]:
    """The records below a folder in order of their names; a trainer may add and remove checkpoints meanwhile.

    Left out are the hidden files and copies that macOS (._x.jsonl) and Jupyter make by themselves.
    """
    paths = []
    for parent, folders, files in os.walk(folder):  # which leaves out what vanishes
        folders[:] = [name for name in folders if not name.endswith((".checkpoints", ".ipynb_checkpoints"))]
        paths += [Path(parent, name) for name in files if name.endswith(".jsonl") and not name.startswith(".")]
    return sorted(paths)


def read_folder(*folders: Path, condensed: bool = False) -> tuple[list[Run], list[RecordError]]:
    """All runs below folders, in order of their names in each, and what could not be read or is there twice.

    condensed: see Run.condense(); thousands of runs then fit into memory.
    """
    runs, errors = [], []
    # Folders may overlap, and one file is read once.
    for path in {path.resolve(): path for folder in folders for path in record_paths(folder)}.values():
        try:
            runs.append(read_record(path))
            if condensed:
                runs[-1].condense()
        except RecordError as error:
            errors.append(error)
    found, copies = distinct(runs)
    return found, errors + copies


def distinct(runs: Iterable[Run]) -> tuple[list[Run], list[RecordError]]:
    """Each run once, in the order given, and what is said of further files of it.

    A run is its run event, with the run_id in it, however many files hold it: copies are made of it, some before it has
    ended. The file that goes furthest counts.
    """
    kept: dict[str, Run] = {}
    copies = []
    for run in runs:
        start = {key: value for key, value in run.start.items() if key != "sources"}  # for which code_hash stands
        key = json_hash(start) if "run_id" in start else str(run.path)
        if key in kept:
            first, run = sorted((kept[key], run), key=Run.extent)
            copies.append(RecordError(f"{first.path} holds the run of {run.path}, which counts once"))
        kept[key] = run
    return list(kept.values()), copies


def seed_gaps(seeds: Iterable[int], most: int = 1000) -> list[int]:
    """Seeds missing between the first and the last, the lowest of them: were they run, and left out?"""
    missing = (seed for low, high in itertools.pairwise(sorted(set(seeds))) for seed in range(low + 1, high))
    return list(itertools.islice(missing, most))
