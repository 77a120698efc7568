"""Other people's text logs: modded-nanogpt (both tracks), parameter-golf, llm.c, nanoGPT. Needs nothing but Python.

Nothing in a log is executed, and no more than a line is held in memory beside the numbers that were found.
"""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

MAX_FILE_BYTES = 64 * 2**20
MAX_LINE_BYTES = 2**20
MAX_LOOKS = 200_000
MAX_STEP = 10**9

NUMBER = r"[-+]?(?:nan|inf(?:inity)?|\d+(?:\.\d*)?(?:e[-+]?\d+)?|\.\d+)"
# step:125/3250 val_loss:3.28 train_time:19.5s step_avg:156ms, and the same with a time stamp or a rank before it
STEP = re.compile(r"^(?:\[[^\]]{1,60}\]|[\d:., +-]{8,40}\|?)?\s*(?:s|step):\s*(\d{1,12})(?:\s*/\s*(\d{1,12}))?\b", re.I)
PAIR = re.compile(rf"\b([A-Za-z_][\w-]{{0,63}}):\s*({NUMBER})(ms|s)?(?![\w.^])", re.I)
NANOGPT = re.compile(rf"^step (\d{{1,12}}): train loss ({NUMBER}), val loss ({NUMBER})\s*$", re.I)
LLMC_STEP = re.compile(rf"^step\s+(\d{{1,12}})/(\d{{1,12}})\s*\|\s*(?:train )?loss\s+({NUMBER}).*?({NUMBER}) ms", re.I)
LLMC_VALIDATION = re.compile(rf"^val loss:?\s+({NUMBER})\s*$", re.I)
NAMES = {"tel": "val_loss"}  # llm.c's "test loss"
SEPARATOR = "=" * 100


class LogError(ValueError):
    """A file in which no run can be read; the message names the file and says why."""


@dataclass
class Trial:
    """One run as a log tells it: each metric by step, and timed seconds by step where they are told."""

    path: Path
    number: int  # in its file, from 1
    metrics: dict[str, dict[int, float]] = field(default_factory=dict)
    times_s: dict[int, float] = field(default_factory=dict)
    planned_steps: int | None = None

    @property
    def last_step(self) -> int:
        return max(max(looks) for looks in self.metrics.values())

    @property
    def status(self) -> str:
        """complete, torn (it ends before its planned last step) or diverged (a loss is not finite)."""
        if any(not math.isfinite(loss) for loss in self.metrics.get("val_loss", {}).values()):
            return "diverged"
        if self.planned_steps is not None and self.last_step < self.planned_steps:
            return "torn"
        return "complete"

    def losses(self, metric: str = "val_loss") -> dict[int, float]:
        return self.metrics.get(metric, {})


def read_log(path: Path) -> list[Trial]:
    """The trials of one log in order. A new one begins where the step goes back.

    Raises:
        LogError: the file cannot be read, is too large, or states no validation loss.
    """
    trials: list[Trial] = []
    previous_step, pending_step = math.inf, 0
    num_looks, has_source = 0, contains_separator(path)
    for number, line in enumerate(read_lines(path), start=1):
        if has_source:  # lines of the source, which stands first, are no results
            has_source = not line.startswith(SEPARATOR)
            continue
        found = read_line(line, pending_step)
        if found is None:
            continue
        step, planned, values, time_s = found
        pending_step = step
        if step > MAX_STEP:
            raise LogError(f"{path}, line {number}: step {step} cannot be")
        if not values:
            continue
        num_looks += 1
        if num_looks > MAX_LOOKS:
            raise LogError(f"{path} states more than {MAX_LOOKS} validations")
        if step < previous_step or (step == previous_step and repeats(trials[-1], step, values)):
            trials.append(Trial(path, len(trials) + 1))
        previous_step = step
        trial = trials[-1]
        trial.planned_steps = planned or trial.planned_steps
        for metric, value in values.items():
            trial.metrics.setdefault(metric, {})[step] = value
        if time_s is not None:
            trial.times_s[step] = time_s
    if not trials:
        raise LogError(f"{path} states no validation loss in a format that is known")
    return trials


def repeats(trial: Trial, step: int, values: dict[str, float]) -> bool:
    """Whether a second line on a step, at its start, is another trial rather than the same look told again."""
    return step == 0 and any(step in trial.losses(metric) for metric in values)


def read_line(line: str, pending_step: int) -> tuple[int, int | None, dict[str, float], float | None] | None:
    """Step, planned last step, validation metrics and seconds of one line, or None when it tells of no step."""
    if match := STEP.match(line):
        pairs = PAIR.findall(line)
        values = {NAMES.get(key, key): float(value) for key, value, _ in pairs if is_validation(key)}
        times = [
            float(value) / (1000 if unit.lower() == "ms" else 1)
            for key, value, unit in pairs
            if key == "train_time" and unit
        ]
        return int(match[1]), int(match[2]) if match[2] else None, values, times[0] if times else None
    if match := NANOGPT.match(line):
        return int(match[1]), None, {"val_loss": float(match[3])}, None
    if match := LLMC_STEP.match(line):
        return int(match[1]), int(match[2]), {}, None
    if match := LLMC_VALIDATION.match(line):
        return pending_step, None, {"val_loss": float(match[1])}, None
    return None


def is_validation(key: str) -> bool:
    return key == "tel" or (key.startswith("val") and ("loss" in key or "bpb" in key)) or key.endswith("val_loss")


def read_lines(path: Path) -> Iterator[str]:
    """Lines of a text file, one at a time; bytes that are no UTF-8 become replacement characters."""
    try:
        if path.is_symlink() or not path.is_file():
            raise LogError(f"{path} is no regular file (links are not followed)")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise LogError(f"{path} has {path.stat().st_size:,} bytes, more than {MAX_FILE_BYTES:,}")
        with open(path, "rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise LogError(f"{path}, line {number}: longer than {MAX_LINE_BYTES:,} bytes")
                yield line.decode("utf-8", "replace").lstrip("\ufeff").rstrip("\r\n")
    except OSError as error:
        raise LogError(f"{path} cannot be read: {error.strerror}") from error


def contains_separator(path: Path) -> bool:
    return any(line.startswith(SEPARATOR) for line in read_lines(path))


def read_logs(paths: Iterable[Path]) -> tuple[list[Trial], list[LogError]]:
    """All trials of files and folders, in order of names, and what could not be read."""
    trials, errors = [], []
    for path in paths:
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() and not path.is_symlink() else [path]
        for file in files:
            try:
                trials += read_log(file)
            except LogError as error:
                errors.append(error)
    return trials, errors
