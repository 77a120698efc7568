"""A trial whose arms share their seeds: paired differences, and rows of low leverage that stay so."""

import math
import tomllib
from collections.abc import Callable, Mapping, Sequence
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
FACTORS = (0.5, 1.0, 2.0)  # of the tuned lr

Values = dict[int, float]  # by seed


class Paired(NamedTuple):
    """Mean of the differences a - b over seeds that both arms have.

    flaw: "diverged", or how far the runs are; empty where the endpoint may be judged. p: two-sided, of the paired
    t-test; NaN with a flaw, with fewer than FEWEST_PAIRS, or without spread. effect: the mean in units of sd, the
    standard deviation of the differences.
    """

    n: int
    mean: float
    low: float
    high: float
    sd: float
    p: float
    flaw: str = ""

    @property
    def effect(self) -> float:
        return self.mean / self.sd if self.sd > 0 else math.nan


NOTHING = Paired(0, math.nan, math.nan, math.nan, math.nan, math.nan)


class Trial:
    """Design and records of a trial.

    design: of the TOML file. runs: by arm, factor of the tuned lr and seed. tuning: runs of the tuning by arm.

    Raises:
        ValueError: a record cannot be read, or is none of those that the design asks for.
    """

    def __init__(self, results: Path, design_file: str):
        self.design: dict[str, Any] = tomllib.loads((results / design_file).read_text(encoding="utf-8"))
        self.plan: dict[str, dict[str, Any]] = self.design["arms"]
        self.tuning = ended(results / self.design["tuning"], self.plan)
        self.runs: dict[str, dict[float, dict[int, Run]]] = {arm: {} for arm in self.plan}
        for arm, runs in ended(results / self.design["folder"], self.plan).items():
            for run in runs:
                by_seed = self.runs[arm].setdefault(self._factor(arm, run), {})
                if run.start["seed"] in by_seed:
                    raise ValueError(f"{run.path} and {by_seed[run.start['seed']].path} are the same run of the trial")
                by_seed[run.start["seed"]] = run

    def _factor(self, arm: str, run: Run) -> float:
        plan, hparams = self.plan[arm], run.start["hparams"]
        factors = [f for f in FACTORS if math.isclose(hparams["lr"], f * plan["lr"], rel_tol=1e-6)]
        if not factors or hparams["momentum"] != plan["momentum"]:
            raise ValueError(
                f"{run.path} has lr {hparams['lr']:g} and momentum {hparams['momentum']:g}: not of the trial"
            )
        if run.start["seed"] not in self.planned(arm, factors[0]):
            raise ValueError(f"{run.path} has seed {run.start['seed']}, which the trial has not")
        return factors[0]

    def planned(self, arm: str, factor: float = 1.0) -> range:
        """The seeds that the design has."""
        first, last = self.plan[arm]["seeds"] if factor == 1 else self.design["robust_seeds"]
        return range(first, last + 1)

    def at(self, arm: str, factor: float = 1.0) -> dict[int, Run]:
        """Runs by seed."""
        return self.runs[arm].get(factor, {})

    @property
    def has_runs(self) -> bool:
        return any(self.at(arm) for arm in self.plan)

    def losses(self, arm: str, factor: float = 1.0) -> Values:
        """At the end; a run that diverged counts as the worst of its arm."""
        return worst_where_diverged(
            {s: r.end_event["val_loss"] if r.is_done else math.inf for s, r in self.at(arm, factor).items()}
        )

    def shares(self, arm: str) -> Values:
        """Rows of low leverage that stays so, in per cent; a run that diverged counts as the worst of its arm.

        Runs that went on from a checkpoint after the first look do not know, and are left out.
        """
        first = self.design["first_look"]
        found = {s: 100 * persistent_share(r, first) if r.is_done else math.inf for s, r in self.at(arm).items()}
        return worst_where_diverged({seed: share for seed, share in found.items() if not math.isnan(share)})

    def flaw(self, *settings: tuple[str, float]) -> str:
        """What forbids to compare these arms at these factors, in words; empty if nothing does."""
        for setting in settings:
            runs = self.at(*setting)
            if (diverged := sum(not run.is_done for run in runs.values())) > MOST_DIVERGED:
                return f"diverged ({diverged} of {len(runs)})"
        planned = set.intersection(*(set(self.planned(*setting)) for setting in settings))
        there = planned.intersection(*(self.at(*setting) for setting in settings))
        return "" if there == planned else f"under way ({len(there)} of {len(planned)})"

    def loss_differences(self, pairs: Sequence[Sequence[str]]) -> list[Paired]:
        """a - b of each pair of arms."""
        return [self._paired(a, b, self.losses) for a, b in pairs]

    def share_differences(self, pairs: Sequence[Sequence[str]]) -> list[Paired]:
        return [self._paired(a, b, self.shares) for a, b in pairs]

    def _paired(self, a: str, b: str, values: Callable[[str], Values]) -> Paired:
        return without_verdict(paired(values(a), values(b)), self.flaw((a, 1.0), (b, 1.0)))

    def change(self, arm: str, factor: float) -> Paired:
        """The loss at this multiple of the tuned lr minus that at the tuned one."""
        found = paired(self.losses(arm, factor), self.losses(arm))
        return without_verdict(found, self.flaw((arm, factor), (arm, 1.0)))


def without_verdict(found: Paired, flaw: str) -> Paired:
    """A difference that has a flaw keeps its figures, if runs are under way, but no p."""
    if flaw.startswith("diverged"):
        return NOTHING._replace(flaw=flaw)
    return found._replace(p=math.nan, flaw=flaw) if flaw else found


def ended(folder: Path, arms: Mapping[str, Any]) -> dict[str, list[Run]]:
    """The runs of a folder that are done or have diverged, by arm.

    Raises:
        ValueError: a record cannot be read, or the records are of several tasks.
    """
    runs, errors = read_folder(folder) if folder.is_dir() else ([], [])
    if errors:
        raise ValueError(str(errors[0]))
    if len(tasks := {run.start["task_hash"] for run in runs}) > 1:
        raise ValueError(f"{folder} holds runs of {len(tasks)} tasks")
    found = [run for run in runs if status_of(run) in ("done", "diverged")]
    return {arm: [run for run in found if run.start["optimizer"] == arm] for arm in arms}


def worst_where_diverged(values: Values) -> Values:
    """Infinite values become the largest of the others; if there are none, they stay."""
    worst = max((value for value in values.values() if math.isfinite(value)), default=math.inf)
    return {seed: value if math.isfinite(value) else worst for seed, value in values.items()}


def paired(a: Mapping[int, float], b: Mapping[int, float]) -> Paired:
    """The difference of two arms, by seed. Infinite values leave the pair out."""
    seeds = [seed for seed in sorted(a.keys() & b.keys()) if math.isfinite(a[seed]) and math.isfinite(b[seed])]
    differences = np.array([a[seed] - b[seed] for seed in seeds])
    n = len(seeds)
    mean = float(differences.mean()) if n else math.nan
    if n < FEWEST_PAIRS or has_no_spread(differences - differences[0] + 1):
        return Paired(n, mean, math.nan, math.nan, math.nan, math.nan)
    sd = float(differences.std(ddof=1))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * sd / math.sqrt(n)
    return Paired(n, mean, mean - half, mean + half, sd, float(stats.ttest_1samp(differences, 0.0).pvalue))


def judged(found: Sequence[Paired], margin: float) -> list[tuple[float, str]]:
    """Of losses, a - b: Holm's p and better, worse, no difference that matters (within margin), or undecided.

    Where not all pairs may be judged yet, none is: Holm's correction takes them all. The word is then the flaw.
    """
    open_flaw = next((difference.flaw for difference in found if difference.flaw.startswith("under way")), "")
    words = []
    for difference, p in zip(found, holm([difference.p for difference in found]), strict=True):
        if flaw := difference.flaw or open_flaw:
            words.append((math.nan, flaw))
        elif p < ALPHA:
            words.append((p, "better" if difference.mean < 0 else "worse"))
        elif -margin < difference.low and difference.high < margin:
            words.append((p, "no difference that matters"))
        else:
            words.append((p, "undecided"))
    return words


def persistent_share(run: Run, first_step: int, layer: int | None = None) -> float:
    """Share of the rows of up and gate whose leverage was low at every look from first_step to the end; of all layers,
    or of one. NaN for a run that went on from a checkpoint since, which begins to count anew.

    Raises:
        ValueError: the run has not looked since then, or its record tells of no streaks.
    """
    looks = [event for event in run.neuron_events if event["step"] >= first_step]
    if not looks:
        raise ValueError(f"{run.path} has no telemetry of neurons from step {first_step} on")
    if any(resume["step"] >= first_step for resume in run.resumes):
        return math.nan
    low, rows = 0, 0
    for name, matrix in looks[-1]["matrices"].items():
        if name.endswith("down") or (layer is not None and not name.startswith(f"blocks.{layer}.")):
            continue
        if matrix.get("low_streaks") is None:
            raise ValueError(f"{run.path} does not tell for how long {name}'s rows had low leverage")
        streaks = matrix["low_streaks"]
        low += streaks[len(looks) - 1] if len(streaks) >= len(looks) else 0
        rows += sum(matrix["leverage_histogram"])
    return low / rows
