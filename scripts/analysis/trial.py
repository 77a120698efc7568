"""A trial whose arms share their seeds: paired differences, and rows of low leverage that stay so."""

import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from aurora.trainer.record import Run, read_folder
from scripts.analysis.statistics import CONFIDENCE, has_no_spread, holm
from scripts.analysis.verdict import status_of

FEWEST_PAIRS = 3
ALPHA = 0.05
MOST_DIVERGED = 2  # runs of an arm, beyond which its endpoints are not tested


class Trial:
    """Design and records of a trial.

    design: of the TOML file. arms: runs by arm, lr and seed. tuned: each arm's lr, at which it has most runs.
    tuning: runs of the tuning by arm.
    """

    def __init__(self, results: Path, design_file: str):
        self.design: dict[str, Any] = tomllib.loads((results / design_file).read_text(encoding="utf-8"))
        found = finished(results / self.design["folder"], self.design["arms"])
        self.arms = {arm: by_lr(runs) for arm, runs in found.items()}
        self.tuned = {arm: max(runs, key=lambda lr: len(runs[lr])) for arm, runs in self.arms.items() if runs}
        self.tuning = finished(results / self.design["tuning"], self.design["arms"])

    @property
    def runs(self) -> dict[str, dict[int, Run]]:
        """Those at the tuned values, by arm and seed."""
        return {arm: self.arms[arm][lr] for arm, lr in self.tuned.items()}

    def losses(self, arm: str, lr: float | None = None) -> dict[int, float]:
        """At the end, by seed; a run that diverged counts as the worst of its arm."""
        runs = self.runs.get(arm, {}) if lr is None else self.arms[arm][lr]
        return worst_where_diverged({s: r.end_event["val_loss"] if r.is_done else math.inf for s, r in runs.items()})

    def shares(self, arm: str) -> dict[int, float]:
        """Rows of low leverage that stays so, in per cent, by seed; a run that diverged counts as the worst."""
        runs, first = self.runs.get(arm, {}), self.design["first_look"]
        found = {s: 100 * persistent_share(r, first) if r.is_done else math.inf for s, r in runs.items()}
        return worst_where_diverged(found)

    def has_diverged(self, arm: str) -> bool:
        return sum(not run.is_done for run in self.runs.get(arm, {}).values()) > MOST_DIVERGED

    def loss_differences(self, pairs: Sequence[Sequence[str]]) -> list["Paired"]:
        """a - b of each pair; one with an arm that has diverged is empty."""
        return [self._paired(pair, self.losses) for pair in pairs]

    def share_differences(self, pairs: Sequence[Sequence[str]]) -> list["Paired"]:
        return [self._paired(pair, self.shares) for pair in pairs]

    def _paired(self, pair: Sequence[str], values: Any) -> "Paired":
        return paired({}, {}) if any(map(self.has_diverged, pair)) else paired(*map(values, pair))


def finished(folder: Path, arms: Sequence[str]) -> dict[str, list[Run]]:
    """The runs of a folder that are done or have diverged, by arm.

    Raises:
        ValueError: a record cannot be read, or the records are of several tasks.
    """
    runs, errors = read_folder(folder) if folder.is_dir() else ([], [])
    if errors:
        raise ValueError(str(errors[0]))
    if len(tasks := {run.start["task_hash"] for run in runs}) > 1:
        raise ValueError(f"{folder} holds runs of {len(tasks)} tasks")
    ended = [run for run in runs if status_of(run) in ("done", "diverged")]
    return {arm: [run for run in ended if run.start["optimizer"] == arm] for arm in arms}


def by_lr(runs: Sequence[Run]) -> dict[float, dict[int, Run]]:
    found: dict[float, dict[int, Run]] = {}
    for run in runs:
        found.setdefault(run.start["hparams"]["lr"], {})[run.start["seed"]] = run
    return found


def worst_where_diverged(values: dict[int, float]) -> dict[int, float]:
    """Infinite values become the largest of the others; if there are none, they stay."""
    worst = max((value for value in values.values() if math.isfinite(value)), default=math.inf)
    return {seed: value if math.isfinite(value) else worst for seed, value in values.items()}


class Paired(NamedTuple):
    """Mean of the differences a - b over seeds that both arms have.

    p: two-sided, of the paired t-test; NaN with fewer than FEWEST_PAIRS, or without spread. effect: the mean in units
    of sd, the standard deviation of the differences.
    """

    n: int
    mean: float
    low: float
    high: float
    sd: float
    p: float

    @property
    def effect(self) -> float:
        return self.mean / self.sd if self.sd > 0 else math.nan


def paired(a: Mapping[int, float], b: Mapping[int, float], confidence: float = CONFIDENCE) -> Paired:
    """The difference of two arms, by seed. Infinite values leave the pair out."""
    seeds = [seed for seed in sorted(a.keys() & b.keys()) if math.isfinite(a[seed]) and math.isfinite(b[seed])]
    differences = np.array([a[seed] - b[seed] for seed in seeds])
    n = len(seeds)
    mean = float(differences.mean()) if n else math.nan
    if n < FEWEST_PAIRS or has_no_spread(differences - differences[0] + 1):
        return Paired(n, mean, math.nan, math.nan, math.nan, math.nan)
    sd = float(differences.std(ddof=1))
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * sd / math.sqrt(n)
    return Paired(n, mean, mean - half, mean + half, sd, float(stats.ttest_1samp(differences, 0.0).pvalue))


def judged(found: Sequence[Paired], margin: float, alpha: float = ALPHA) -> list[tuple[float, str]]:
    """Of losses, a - b: Holm's p and better, worse, no difference that matters (within margin), or undecided."""
    words = []
    for difference, p in zip(found, holm([difference.p for difference in found]), strict=True):
        if p < alpha:
            words.append((p, "better" if difference.mean < 0 else "worse"))
        elif -margin < difference.low and difference.high < margin:
            words.append((p, "no difference that matters"))
        else:
            words.append((p, "undecided"))
    return words


def persistent_share(run: Run, first_step: int, layer: int | None = None) -> float:
    """Share of the rows of up and gate whose leverage was low at every look from first_step to the end; of all layers,
    or of one.

    Raises:
        ValueError: the run has not looked since then, or its record tells of no streaks.
    """
    looks = [event for event in run.neuron_events if event["step"] >= first_step]
    if not looks:
        raise ValueError(f"{run.path} has no telemetry of neurons from step {first_step} on")
    low, rows = 0, 0
    for name, matrix in looks[-1]["matrices"].items():
        if name.endswith("down") or (layer is not None and not name.startswith(f"blocks.{layer}.")):
            continue
        if matrix.get("low_streaks") is None or len(run.resumes):  # a resume begins streaks anew
            raise ValueError(f"{run.path} does not tell for how long {name}'s rows had low leverage")
        streaks = matrix["low_streaks"]
        low += streaks[len(looks) - 1] if len(streaks) >= len(looks) else 0
        rows += sum(matrix["leverage_histogram"])
    return low / rows
