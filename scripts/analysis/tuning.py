"""Equal-budget search: coordinate descent over the hyper-parameters of one optimizer, with exactly so many trials.

Knobs are tuned in the order in which they are declared, each on its grid around the best value so far: first the value
and its two neighbours, then on while the edge is best. A rate's grid is geometric and has no end. What is left of the
budget goes to both neighbours of the first knob (lr) at the setting found, to the other knobs again, and to the same on
grids twice as fine. So the chosen lr lies inside what was tried, unless the last trials still found better ones.
"""

import json
import math
import re
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from aurora.errors import Exit, HarnessError
from aurora.typed import check_keys, coerce

# Kept for the last validation around lr: its neighbours, and two steps on where one of them is better.
RESERVED_TRIALS = 4
FINEST_GRID = 1 / 256  # of the declared grid, in logarithms


@dataclass
class Knob:
    """One hyper-parameter, or several that share a value, and its grid.

    keys: of the optimizer's table. factor: between neighbours on a geometric grid around start, or values: in order.
    """

    name: str
    keys: list[str]
    start: Any
    factor: float | None = None
    values: list[Any] = field(default_factory=list)
    grid: float = 1.0  # distance of neighbours; halved for midpoints

    def __str__(self) -> str:
        grid = f"by factors of {self.factor:g}" if self.factor else f"in {self.values}"
        return f"{self.name} from {self.start} {grid}"

    @property
    def first_position(self) -> float:
        return self.values.index(self.start) if self.values else 0.0

    def value(self, position: float) -> Any:
        if self.factor is None:
            return self.values[int(position)]
        return float(f"{self.start * self.factor**position:.4g}")

    def neighbours(self, position: float) -> list[float]:
        found = [position - self.grid, position + self.grid]
        return [p for p in found if 0 <= p < len(self.values)] if self.values else found


class Trial(NamedTuple):
    number: int  # from 1
    knob: str  # which was varied
    setting: dict[str, Any]  # value of every knob, by its name
    why: str
    val_loss: float  # infinite where training diverged


class _Spent(Exception):
    pass


class Search:
    """The search of one optimizer. `trials` grows while run() goes on."""

    def __init__(self, knobs: Sequence[Knob], budget: int, evaluate: Callable[[int, str, dict[str, Any], str], float]):
        """evaluate(number, knob, setting, why): the validation loss at the end of a run, infinite if it diverged."""
        self.knobs, self.budget, self.evaluate = knobs, budget, evaluate
        self.positions = {knob.name: knob.first_position for knob in knobs}
        self.trials: list[Trial] = []

    @property
    def best(self) -> Trial:
        return best_of(self.trials)

    def run(self) -> None:
        try:
            self._loss(self.positions, self.knobs[0], "start")
            for knob in self.knobs:
                self._settle(knob, "in order", RESERVED_TRIALS)
            why = "again at the setting found"
            while min(knob.grid for knob in self.knobs) >= FINEST_GRID:
                self._settle(self.knobs[0], why)
                if not any(self._settle(knob, why, RESERVED_TRIALS) for knob in self.knobs[1:]):
                    why = "midpoint"
                    for knob in self.knobs:
                        knob.grid = knob.grid if knob.values else knob.grid / 2
                    if all(knob.values for knob in self.knobs):
                        return
        except _Spent:
            pass

    def _settle(self, knob: Knob, why: str, reserved: int = 0) -> bool:
        """Move a knob until its neighbours are no better; returns whether it moved.

        reserved: trials to leave; then it may stop before.
        """
        begin = self.positions[knob.name]
        while True:
            here = self.positions[knob.name]
            losses = {here: self._loss(self.positions, knob, why)}
            for position in knob.neighbours(here):
                positions = self.positions | {knob.name: position}
                if self._find(self._setting(positions)) is None and self.budget - len(self.trials) <= reserved:
                    break
                losses[position] = self._loss(positions, knob, why)
            self.positions[knob.name] = min(losses, key=losses.__getitem__)  # the first, so here, of equals
            if self.positions[knob.name] == here:
                return here != begin

    def _setting(self, positions: dict[str, float]) -> dict[str, Any]:
        return {knob.name: knob.value(positions[knob.name]) for knob in self.knobs}

    def _find(self, setting: dict[str, Any]) -> Trial | None:
        return next((trial for trial in self.trials if trial.setting == setting), None)

    def _loss(self, positions: dict[str, float], knob: Knob, why: str) -> float:
        setting = self._setting(positions)
        if found := self._find(setting):
            return found.val_loss
        if len(self.trials) == self.budget:
            raise _Spent
        number = len(self.trials) + 1
        loss = self.evaluate(number, knob.name, setting, why)
        self.trials.append(Trial(number, knob.name, setting, why, loss))
        return loss


def best_of(trials: Sequence[Trial]) -> Trial:
    return min(trials, key=lambda trial: trial.val_loss)


def neighbours_tried(trials: Sequence[Trial], knob: str) -> tuple[Trial | None, Trial | None]:
    """Of the best trial: the nearest ones below and above it in this knob, all else equal, as far as they were made."""
    best = best_of(trials)
    same = [t for t in trials if all(t.setting[k] == v for k, v in best.setting.items() if k != knob)]
    below = [t for t in same if t.setting[knob] < best.setting[knob]]
    above = [t for t in same if t.setting[knob] > best.setting[knob]]
    return (
        max(below, key=lambda trial: trial.setting[knob], default=None),
        min(above, key=lambda trial: trial.setting[knob], default=None),
    )


class Space(NamedTuple):
    seed: int
    overrides: list[str]  # "a.b=v" of every trial
    knobs: dict[str, list[Knob]]  # by optimizer, in tuning order


def read_space(path: Path) -> Space:
    """Read a search space; configs/tuning/quick.toml shows what one may say.

    Raises:
        HarnessError: CONFIG, naming file, key and what would be right.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise HarnessError(Exit.CONFIG, f"search space {path} cannot be read: {error}") from error
    seed = coerce(f"{path.name}: seed", tables.pop("seed", None), int)
    overrides = tables.pop("set", [])
    if not isinstance(overrides, list) or not all(isinstance(override, str) for override in overrides):
        raise HarnessError(Exit.CONFIG, f"{path.name}: set must be a list of strings, got {overrides!r}")
    knobs = {}
    for optimizer, entries in tables.items():
        if not isinstance(entries, dict) or not entries:
            raise HarnessError(Exit.CONFIG, f"{path.name}: {optimizer} must be a table of knobs, got {entries!r}")
        knobs[optimizer] = [read_knob(f"{path.name}: {optimizer}.{name}", name, entries[name]) for name in entries]
    return Space(seed, overrides, knobs)


def read_knob(label: str, name: str, entry: Any) -> Knob:
    check_keys(entry, ("keys", "start", "factor", "values"), label, optional=("keys", "factor", "values"))
    knob = Knob(name, **{"keys": [name]} | entry)
    if (knob.factor is None) == (not knob.values):
        raise HarnessError(Exit.CONFIG, f"{label} needs either factor or values")
    if knob.values and knob.start not in knob.values:
        raise HarnessError(Exit.CONFIG, f"{label}: start = {knob.start!r} is not among the values {knob.values!r}")
    if not knob.values:
        start, factor = coerce(f"{label}.start", knob.start, float), coerce(f"{label}.factor", knob.factor, float)
        if not (start > 0 and factor > 1):
            raise HarnessError(Exit.CONFIG, f"{label}: start must be above 0 and factor above 1, got {start}, {factor}")
    return knob


AUX_LRS = ("embed_lr", "head_lr", "vector_lr")


def default_knobs(hparams: dict[str, Any]) -> list[Knob]:
    """What is searched of an optimizer of which no space says anything: lr and, where AdamW updates a part of the
    parameters, its lrs; one knob for those that are equal.

    hparams: what the optimizer would have untuned.
    """
    lrs: dict[float, list[str]] = {}
    for key in AUX_LRS:
        if key in hparams:
            lrs.setdefault(hparams[key], []).append(key)
    names = {value: "aux_lr" if len(lrs) == 1 else keys[0] for value, keys in lrs.items()}
    knobs = [Knob("lr", ["lr"], hparams["lr"], 2.0)]
    return knobs + [Knob(names[value], keys, value, 2.0) for value, keys in lrs.items()]


def tuned_trials(track: str) -> dict[str, int]:
    """Of each optimizer whose table in a track's text is marked as tuned, with how many trials."""
    marks = re.findall(r"^# Tuned: (\d+) trials\b.*\n\[optimizer\.(.+)\]", track, re.MULTILINE)
    return {name: int(trials) for trials, name in marks}


def write_setting(text: str, optimizer: str, values: dict[str, Any], comment: str) -> str:
    """The text of a track with these values in its table [optimizer.NAME], and above it the comment "# Tuned: ...".

    All else stays as it is. Raises ValueError if there is no such table.
    """
    lines, header = text.splitlines(), f"[optimizer.{optimizer}]"
    try:
        first = next(i for i, line in enumerate(lines) if line.strip() == header)
    except StopIteration:
        raise ValueError(f"there is no line {header}") from None
    last = next((i for i in range(first + 1, len(lines)) if lines[i].startswith("[")), len(lines))
    for key, value in values.items():
        new = f"{key} = {json.dumps(value)}"
        for i in range(first + 1, last):
            old, _, remark = lines[i].partition("#")
            if old.partition("=")[0].strip() == key:
                lines[i] = new + (f"  #{remark}" if remark else "")
                break
        else:
            lines.insert(first + 2, new)  # below lr
            last += 1
    if first and lines[first - 1].startswith("# Tuned: "):
        lines.pop(first - 1)
        first -= 1
    lines.insert(first, f"# Tuned: {comment}")
    return "\n".join(lines) + "\n"


def is_finite(loss: float | None) -> bool:
    return loss is not None and math.isfinite(loss)
