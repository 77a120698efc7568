"""Other people's logs: validation lines of the public text formats, as trials with the same statistics as our records.

Read are, wherever they stand in the text:

    step:125/3250 val_loss:4.61 train_time:19.5s step_avg:156.0ms    modded-nanogpt; time in s or ms, other key:number
    0/20000 val_loss: 9.0076 val_bpb: 4.1159                         parameter-golf, also behind a time stamp
    final_int8_roundtrip val_loss:1.99 val_bpb:1.18                  the same; belongs to the last step
    stopping_early: wallclock_cap train_time:600036ms step:8562/20000    the same; the run is complete
    s:250 tel:6.4567                                                  llm.c, main.log
    step 250/19560 | ... and then: val loss 6.4567                    llm.c, standard output
    step 250: train loss 6.40, val loss 6.45                          nanoGPT
    250 val 6.4567                                                    build-nanogpt, log.txt
    validation loss: 6.4567 | ... and then: step 250 | loss: ...      build-nanogpt, standard output
    Step 00250 | Validation bpb: 1.0123                               nanochat; steps of the run from its train lines
    val_bpb: 0.9979 | ... and then: num_steps: 953                    autoresearch, the summary at the end

In front of them may stand what torchrun --tee, srun -l, kubectl, docker compose and Python's logging write there.
Colours are left out. Source code in front of a log holds no such lines, for its numbers are names in braces.
"""

import bisect
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from aurora.text import encoding_of

LAST = -1  # stands for the last step before
MAX_LINE = 1 << 16  # characters; longer lines are no results
MAX_BYTES, MAX_LOOKS, MAX_TRIALS = (
    1 << 28,
    100_000,
    1000,
)  # of a log; public ones have up to 2 MB, 1,100 validations, 30 trials
SUFFIXES = (".txt", ".log", ".out", ".stdout")
NUMBER = r"[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+|nan|inf)"
_STAMP = r"^\s*(?:\d{9,}\.\d+\s+)?"
_STEP = re.compile(_STAMP + r"step:(\d{1,9})(?:/(\d{1,9}))?\s")
_GOLF = re.compile(_STAMP + r"(\d{1,9})/(\d{1,9}) val_loss:\s")
_GOLF_FINAL = re.compile(_STAMP + r"([a-z]\w{2,60}) (?:stride:\d+ )?val_loss:")
_GOLF_STOP = re.compile(_STAMP + r"stopping_early: ")
_LLMC = re.compile(rf"^s:(\d{{1,9}}) tel:({NUMBER})\s*$", re.I)
_LLMC_STEP = re.compile(r"^step\s+(\d{1,9})/(\d{1,9}) \|")
_LLMC_LOSS = re.compile(rf"^val loss ({NUMBER})\s*$", re.I)
_NANOGPT = re.compile(rf"^step (\d{{1,9}}): train loss {NUMBER}, val loss ({NUMBER})\s*$", re.I)
_BUILD = re.compile(rf"^(\d{{1,9}}) val ({NUMBER})\s*$", re.I)
_BUILD_LOSS = re.compile(rf"^validation loss: ({NUMBER})\s*$", re.I)
_BUILD_STEP = re.compile(r"^step\s+(\d{1,9}) \| loss: ")
_CHAT = re.compile(rf"^Step (\d{{1,9}}) \| Validation (bpb|loss): ({NUMBER})(?=\s|$)", re.I)
_CHAT_STEP = re.compile(r"^step (\d{1,9})/(\d{1,9}) \(")
_SUMMARY = re.compile(rf"^(val_\w{{1,40}}|training_seconds|num_steps):\s+({NUMBER})\s*$", re.I)
_COLOUR = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_TIME_OF_DAY = r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d{1,9})?(?:Z|[+-]\d\d:?\d\d)?"
_PREFIX = re.compile(
    r"\s*(?:"
    r"\[[A-Za-z_]*\d{1,5}\]:\s?"  # torchrun --tee 3
    r"|\d{1,5}: "  # srun -l
    r"|\[pod/[^\]\s]{1,200}\] "  # kubectl logs --prefix
    r"|[\w.-]{1,100}-\d{1,5}\s+\| "  # docker compose
    rf"|\[?{_TIME_OF_DAY}\]?\s*"
    r"|-?\s*\[?(?:DEBUG|INFO|WARNING)\]?\s*(?:[-:]\s*(?:(?:root|__main__)\s*[-:]\s*)?)?"  # Python's logging
    r"|(?:root|__main__)\s*[-:]\s*"
    r")"
)
_METRIC = re.compile(rf"(?<!\S)([A-Za-z_]\w{{0,40}}):\s?({NUMBER})(?=\s|$)", re.I)
_TIME = re.compile(rf"(?<!\S)train_time:\s?({NUMBER})(ms|s|m)(?=\s|$)", re.I)
_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0}


class LogError(ValueError):
    """A file without results; the message names the file and the finding."""


@dataclass(slots=True)
class LoggedValidation:
    """One validation: metrics by name, val_loss among them; time_s is NaN where the log has none."""

    step: int
    time_s: float
    metrics: dict[str, float]


@dataclass
class Trial:
    """One training run in a log, validations in order of steps.

    total_steps: as the log says, None where it does not. is_stopped: the log says that the run ends here as planned.
    """

    path: Path
    number: int
    total_steps: int | None
    validations: list[LoggedValidation] = field(default_factory=list)
    is_rewound: bool = False
    is_stopped: bool = False

    @property
    def status(self) -> str:
        """complete; diverged, with a loss that is no number; torn, when it ends before its last step; or open."""
        if any(not math.isfinite(validation.metrics.get("val_loss", 0.0)) for validation in self.validations):
            return "diverged"
        if self.is_stopped:
            return "complete"
        if self.total_steps is None:
            return "open"
        return "complete" if self.validations[-1].step >= self.total_steps else "torn"

    @property
    def last_step(self) -> int:
        return self.validations[-1].step

    def values(self, metric: str) -> dict[int, float]:
        """By step."""
        return {
            validation.step: validation.metrics[metric]
            for validation in self.validations
            if metric in validation.metrics
        }

    def __str__(self) -> str:
        return f"{self.path.name}, trial {self.number}"


def read_log(path: Path) -> list[Trial]:
    """All trials of a log, each with at least one validation.

    A trial begins where the step falls to the first step of the one before or below. Where it falls less far the run
    went back to a checkpoint: later lines count. Of several lines of one step in a row the first counts.

    Raises:
        LogError: the file cannot be read, or no line of it is a validation.
    """
    trials: list[Trial] = []
    try:
        if not path.is_file():
            raise LogError(f"{path} {'is no regular file' if path.exists() else 'cannot be read: no such file'}")
        if path.stat().st_size > MAX_BYTES:
            raise LogError(f"{path} is larger than {MAX_BYTES:,} bytes")
        for number, (total, validation) in enumerate(_validations(path)):
            if number >= MAX_LOOKS or len(trials) > MAX_TRIALS:
                raise LogError(f"{path} has more than {MAX_LOOKS:,} validation lines or {MAX_TRIALS:,} trials")
            if validation is not None and validation.step != LAST:
                _take(trials, path, total, validation)
            elif trials and validation is not None:
                trials[-1].validations[-1].metrics |= validation.metrics
            elif trials:
                trials[-1].is_stopped = True
    except OSError as error:
        raise LogError(f"{path} cannot be read: {error.strerror}") from error
    if not trials:
        raise LogError(f"{path} holds no validation line of a format that is known")
    return trials


def _take(trials: list[Trial], path: Path, total: int | None, validation: LoggedValidation) -> None:
    """Add a validation to the trial it belongs to, the last one or a new one."""
    trial = trials[-1] if trials else None
    is_again = trial is not None and validation.step <= trial.validations[0].step < trial.last_step
    if trial is None or is_again or (validation.step == 0 and trial.last_step > 0):
        trials.append(Trial(path, len(trials) + 1, total, [validation]))
        return
    place = bisect.bisect_left(trial.validations, validation.step, key=lambda earlier: earlier.step)
    later = trial.validations[place:]
    if validation.step == trial.last_step:
        trial.validations[-1].metrics = validation.metrics | trial.validations[-1].metrics
    elif later and (later[0].step, later[0].metrics) == (validation.step, validation.metrics):
        return  # a summary at the end
    else:
        if later:
            trial.is_rewound = True
            del trial.validations[place:]
        trial.validations.append(validation)
        trial.total_steps = total if total is not None else trial.total_steps


def _validations(path: Path) -> Iterator[tuple[int | None, LoggedValidation | None]]:
    """(steps of the whole run, validation) line by line; no validation where the run stops short on purpose."""
    llmc_step: tuple[int, int] | None = None
    next_step, chat_steps, summary = 0, None, dict[str, float]()
    for line in map(_without_prefix, _lines(path)):
        if match := _STEP.match(line) or _GOLF.match(line):
            metrics = {name: float(value) for name, value in _METRIC.findall(line[match.end(1) :])}
            for name in ("step_avg", "train_time"):
                metrics.pop(name, None)
            if any(name.startswith("val_") for name in metrics):
                time = _TIME.search(line)
                time_s = float(time[1]) * _SECONDS[time[2].lower()] if time else math.nan
                yield (int(match[2]) if match[2] else None), LoggedValidation(int(match[1]), time_s, metrics)
        elif match := _GOLF_FINAL.match(line):
            found = {name: float(value) for name, value in _METRIC.findall(line) if name.startswith("val_")}
            yield None, LoggedValidation(LAST, math.nan, {f"{match[1]} {name}": value for name, value in found.items()})
        elif _GOLF_STOP.match(line):
            yield None, None
        elif (match := _LLMC.match(line) or _NANOGPT.match(line)) or (match := _BUILD.match(line)):
            yield None, LoggedValidation(int(match[1]), math.nan, {"val_loss": float(match[2])})
        elif match := _BUILD_LOSS.match(line):
            yield None, LoggedValidation(next_step, math.nan, {"val_loss": float(match[1])})
        elif match := _BUILD_STEP.match(line):
            next_step = int(match[1]) + 1
        elif match := _CHAT.match(line):
            metrics = {f"val_{match[2].lower()}": float(match[3])}
            yield chat_steps, LoggedValidation(int(match[1]), math.nan, metrics)
        elif match := _CHAT_STEP.match(line):
            chat_steps = int(match[2])
        elif match := _SUMMARY.match(line):
            summary[match[1].lower()] = float(match[2])
            if match[1].lower() == "num_steps":
                yield from _of_summary(summary)
                summary = {}
        elif match := _LLMC_STEP.match(line):
            llmc_step = int(match[1]), int(match[2])
        elif match := _LLMC_LOSS.match(line):
            step, total = llmc_step or (0, None)
            yield total, LoggedValidation(step, math.nan, {"val_loss": float(match[1])})


def _of_summary(summary: dict[str, float]) -> Iterator[tuple[int | None, LoggedValidation | None]]:
    """The validation at the end of a run, which says of itself that it is over."""
    metrics, step = {name: value for name, value in summary.items() if name.startswith("val_")}, summary["num_steps"]
    if metrics and 0 <= step < 10**9:
        yield None, LoggedValidation(int(step), summary.get("training_seconds", math.nan), metrics)
        yield None, None


def _without_prefix(line: str) -> str:
    """The line as the program wrote it, without what its launcher or logger put in front."""
    for _ in range(4):  # of a pod, a rank, a time and a level
        if not (match := _PREFIX.match(line)):
            break
        line = line[match.end() :]
    return line


def _lines(path: Path) -> Iterator[str]:
    """Lines without their ends, those of more than MAX_LINE characters left out; never more than one in memory."""
    is_rest = False
    with open(path, "rb") as file:
        encoding = encoding_of(file.read(4))
    with open(path, encoding=encoding, errors="replace", newline=None) as file:
        while chunk := file.readline(MAX_LINE):
            is_whole = chunk.endswith("\n") or len(chunk) < MAX_LINE
            if is_whole and not is_rest:
                yield (_COLOUR.sub("", chunk) if "\x1b" in chunk else chunk).rstrip()
            is_rest = not is_whole


def without_copies(trials: list[Trial]) -> tuple[list[Trial], list[tuple[Trial, Trial]]]:
    """Trials that are runs of their own, and pairs of a trial that shows nothing but what another one shows.

    One run is often logged twice, to a file and to a stream, in whole or in part. Nor are two of one seed two runs.
    """
    by_loss: dict[tuple[int, float], list[Trial]] = {}
    kept, copies = {}, []
    for place, trial in sorted(enumerate(trials), key=lambda entry: -len(entry[1].validations)):
        last = trial.last_step, loss_of(trial.validations[-1])
        original = next((other for other in by_loss.get(last, ()) if _is_copy(trial, other)), None)
        if original:
            copies.append((trial, original))
            continue
        kept[place] = trial
        for validation in trial.validations:
            by_loss.setdefault((validation.step, loss_of(validation)), []).append(trial)
    return [kept[place] for place in sorted(kept)], copies


def loss_of(validation: LoggedValidation) -> float:
    """Its val_loss, or where it has none, its first other loss by name."""
    names = ["val_loss", *sorted(name for name in validation.metrics if name.startswith("val_"))]
    return next((validation.metrics[name] for name in names if name in validation.metrics), math.nan)


def _is_copy(trial: Trial, other: Trial) -> bool:
    """Whether every validation of the trial is also one of the other: at least three, or at equal times."""
    known = {validation.step: validation for validation in other.validations}
    validations = [validation for validation in trial.validations if validation.step > 0]
    if not validations or any(validation.step not in known for validation in validations):
        return False
    pairs = [(validation, known[validation.step]) for validation in validations]
    if any(loss_of(a) != loss_of(b) for a, b in pairs):
        return False
    return len(validations) >= 3 or all(a.time_s == b.time_s for a, b in pairs)


def read_logs(paths: list[Path]) -> tuple[list[Trial], list[LogError]]:
    """Trials of files and of all files with a suffix of SUFFIXES below folders; links are not followed.

    Hidden files and folders are left out, as those that macOS (._x.txt) and Jupyter make by themselves.
    """
    files = []
    for path in paths:
        if path.is_dir():
            found = (p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file() and not p.is_symlink())
            files += sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(path).parts))
        else:
            files.append(path)
    trials, errors = [], []
    for file in files:
        try:
            trials += read_log(file)
        except LogError as error:
            errors.append(error)
    return trials, errors
