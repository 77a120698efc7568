"""Statistics of a trial whose arms share their seeds: paired differences, and rows of low leverage that stay so."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from aurora.trainer.record import Run
from scripts.analysis.statistics import CONFIDENCE, has_no_spread, holm

FEWEST_PAIRS = 3


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
    """The difference of two arms, by seed. An arm's infinite values, of diverged runs, leave the pair out."""
    seeds = [seed for seed in sorted(a.keys() & b.keys()) if math.isfinite(a[seed]) and math.isfinite(b[seed])]
    differences = np.array([a[seed] - b[seed] for seed in seeds])
    n = len(seeds)
    mean = float(differences.mean()) if n else math.nan
    if n < FEWEST_PAIRS or has_no_spread(differences - differences[0] + 1):
        return Paired(n, mean, math.nan, math.nan, math.nan, math.nan)
    sd = float(differences.std(ddof=1))
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * sd / math.sqrt(n)
    return Paired(n, mean, mean - half, mean + half, sd, float(stats.ttest_1samp(differences, 0.0).pvalue))


def judged(found: Sequence[Paired], margin: float, alpha: float = 0.05) -> list[tuple[float, str]]:
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


def persistent_share(run: Run, first_step: int) -> float:
    """Share of the rows of up and gate whose leverage was low at every look from first_step to the end.

    Raises:
        ValueError: the run has not looked since then, or its record tells of no streaks.
    """
    looks = [event for event in run.neuron_events if event["step"] >= first_step]
    if not looks:
        raise ValueError(f"{run.path} has no telemetry of neurons from step {first_step} on")
    low, rows = 0, 0
    for name, matrix in looks[-1]["matrices"].items():
        if name.endswith("down"):
            continue
        if matrix.get("low_streaks") is None or len(run.resumes):  # a resume begins streaks anew
            raise ValueError(f"{run.path} does not tell for how long {name}'s rows had low leverage")
        streaks = matrix["low_streaks"]
        low += streaks[len(looks) - 1] if len(streaks) >= len(looks) else 0
        rows += sum(matrix["leverage_histogram"])
    return low / rows
