"""The record of a run: one JSONL file, one event a line. Written here and read here.

Events: run, train, val, neurons (of aurora/trainer/neurons.py), resume, end. A run writes its sources into the run
event. Records in results/ have source_hashes in their place and share a store of the texts. Readers see no difference.

Needs nothing but Python, so that results can be analysed on any machine.
"""

import collections
import contextlib
import errno
import functools
import hashlib
import itertools
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from aurora.config import ROOT
from aurora.errors import Exit, HarnessError
from aurora.schedule import SHORT_FORM
from aurora.text import encoding_of
from aurora.trainer.public import is_public, plain_line

SCHEMA = 1


class RecordWriter:
    """The run's JSONL file, one write a line. Rank 0 writes; where it cannot, all ranks raise."""

    def __init__(self, path: Path, ranks: Any):
        self.path, self.ranks = path, ranks

    def write(self, *events: dict[str, Any]) -> None:
        """Append events and force them to disk; only call in untimed time. Collective.

        Raises:
            HarnessError: DISK. Lines before are whole; what is left of this one is dropped by readers and by resume.
        """
        if events:
            self.ranks.all_or_none(lambda: self._append(events) if self.ranks.is_main else None)

    def _append(self, events: Iterable[dict[str, Any]]) -> None:
        try:
            handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                for event in events:
                    line = (json.dumps(event, allow_nan=False) + "\n").encode()
                    if os.write(handle, line) != len(line):
                        raise OSError(errno.ENOSPC, "the line was cut")
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            raise HarnessError(Exit.DISK, f"record {self.path} cannot be written: {error.strerror}") from error

    def is_new(self) -> bool:
        """Whether the record has no line yet; a last line that a crash left without its end is cut off."""
        if not self.ranks.is_main or not self.path.exists():
            return True
        content = self.path.read_bytes()
        if not content.endswith(b"\n"):
            os.truncate(self.path, content.rfind(b"\n") + 1)
        return b"\n" not in content


# The folder of a record's sources for files that are not of the project: an optimizer's of another package.
EXTERNAL = "external"
# A run executes nothing below these; what is imported from there belongs to a test or a benchmark around it.
NOT_OF_A_RUN = ("data", "scripts", "tests")


def read_sources(config_path: Path, track: str, other_modules: Container[str] = ()) -> dict[str, str]:
    """The text of every module of the project that this process has imported, and the track's, as it was parsed.

    other_modules: names of those that this process has imported for something else than the run.
    """
    sources = {}
    for module_name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        # Most modules are of installed packages; torch.ops calls itself _ops.py.
        if module_name in other_modules or "site-packages" in file or not os.path.isabs(file):
            continue
        path = Path(os.path.realpath(file))
        if path.suffix == ".py" and path.is_relative_to(ROOT) and "site-packages" not in path.parts:
            name = path.relative_to(ROOT)
            if name.parts[0] not in NOT_OF_A_RUN:
                sources[name.as_posix()] = path.read_text(encoding="utf-8")
    is_ours = config_path.resolve().is_relative_to(ROOT)
    config_name = config_path.resolve().relative_to(ROOT).as_posix() if is_ours else config_path.name
    if not config_name.endswith(".toml"):  # by which readers know it; a pipe's name is a number
        config_name += ".toml"
    return dict(sorted(sources.items())) | {config_name: track}


def code_hash(sources: dict[str, str]) -> str:
    """One sha256 over the Python files among the sources."""
    return _code_hash(tuple((name, text) for name, text in sources.items() if name.endswith(".py")))


@functools.lru_cache(maxsize=100)  # thousands of records have the same sources
def _code_hash(sources: tuple[tuple[str, str], ...]) -> str:
    return json_hash(dict(sources))


def json_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def task_hash(config: dict[str, Any], stream_id: str) -> str:
    """Equal for two runs that may be compared: same model, batch, evaluation, target and data.

    config: the resolved config, as a record has it. stream_id: of the data.
    """
    evaluation = {key: value for key, value in config["eval"].items() if key != "telemetry"}
    task = {"model": model_of(config), "batch_tokens": config["train"]["batch_tokens"], "eval": evaluation}
    return json_hash(task | {"data": stream_id})


LATER_SETTINGS = {"bias": True, "mlp": "relu2", "head_dtype": "activation"}  # the values of records that have none


def model_of(config: dict[str, Any]) -> dict[str, Any]:
    """The model's settings, as the first records have them."""
    return {key: value for key, value in config["model"].items() if LATER_SETTINGS.get(key) != value}


def describe_git() -> dict[str, Any] | None:
    command = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT)]

    def git(*args: str) -> str:
        return subprocess.run([*command, *args], capture_output=True, text=True, check=True).stdout.strip()

    # git refuses a checkout of another user, lest its settings run programs; this process runs its code anyway.
    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def describe_machine() -> dict[str, Any]:
    """Python, processor, and the environment variables that can change speed or results."""
    first_cpu: dict[str, str] = {}
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
        first_cpu = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    first_cpu = {key: plain_line(value) for key, value in first_cpu.items()}
    prefixes = ("SPEEDRUN_", "OMP_", "MKL_", "TORCH", "PYTORCH", "NCCL_", "CUBLAS", "CUDA_")
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": first_cpu.get("model name", platform.processor()),
        # Processors of one name can round differently.
        "cpu_model": " ".join(first_cpu.get(key, "?") for key in ("vendor_id", "cpu family", "model", "stepping")),
        "cpu_count": os.cpu_count(),
        "usable_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "variables": {
            key: value
            for key, value in sorted(os.environ.items())
            if key.startswith(prefixes) and is_public(key, value)
        },
    }


def shards_of(start: dict[str, Any]) -> list[str]:
    """sha256 of each train shard that a run read, in order. Shards of one task agree in each place that both have."""
    data = start.get("data")
    shards = data.get("shards") if isinstance(data, dict) else None
    return [str(shard.get("sha256")) for shard in shards or () if isinstance(shard, dict)]


class RecordError(ValueError):
    """A file that is not a run record; the message names file, line and finding."""


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
