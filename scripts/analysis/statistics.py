"""Statistics of runs: gates, tests, intervals and what to do with runs that never arrive. Needs numpy and scipy."""

import itertools
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import stats

# The public benchmark's rule, (target - mean) sqrt(n) >= 0.004: with its standard deviation of 0.0013 between seeds
# that is 3.08 standard errors, p < 0.001. Where seeds differ more it promises too much: other tests stand beside it.
GATE_THRESHOLD = 0.004
GATE_SIGMA = 0.0013
MIN_RUNS = 3
CONFIDENCE = 0.95
# A crossing between two validations further apart than this share of the later one's step is known as a bracket only: a
# loss is no straight line. Quick runs thinned to a validation every 100 steps cross 5 to 9 steps later by the line, to
# one every 25 up to 5.
COARSE_FRAC = 0.05
# Additions up to which ranks are tested exactly, in a fifth of a second: 70 runs a side, or 3 against 3,000.
MAX_ADDITIONS = 10**8


def has_no_spread(values: Sequence[float]) -> bool:
    """Whether values are equal but for rounding, which is no spread to test or estimate anything with."""
    return bool(np.ptp(values) <= 1e-12 * np.max(np.abs(values)))


class Gate(NamedTuple):
    margin: float
    threshold: float
    passes: bool


def gate(losses: Sequence[float], target: float) -> Gate:
    """The public gate. A run without a finite loss, or fewer than MIN_RUNS runs, cannot pass it."""
    margin = (target - float(np.mean(losses))) * math.sqrt(len(losses)) if losses else math.nan
    return Gate(margin, GATE_THRESHOLD, len(losses) >= MIN_RUNS and margin >= GATE_THRESHOLD)


def t_below(losses: Sequence[float], target: float) -> float:
    """p of Student's one-sided test that the mean is below the target; NaN with fewer than MIN_RUNS or equal losses."""
    if len(losses) < MIN_RUNS or has_no_spread(losses):
        return math.nan
    return float(stats.ttest_1samp(losses, target, alternative="less").pvalue)


def sd_test(losses: Sequence[float], sigma: float = GATE_SIGMA) -> float:
    """p of the chi-square test that the standard deviation is at most sigma: small where the gate promises too much."""
    if len(losses) < 2:
        return math.nan
    return float(stats.chi2.sf((len(losses) - 1) * np.var(losses, ddof=1) / sigma**2, len(losses) - 1))


class Welch(NamedTuple):
    """Difference of means a - b with its 95 % interval and two-sided p, variances unequal."""

    difference: float
    low: float
    high: float
    p: float


def welch(a: Sequence[float], b: Sequence[float]) -> Welch:
    """Welch's t-test; NaN limits and p with fewer than MIN_RUNS on a side or no spread at all."""
    difference = float(np.mean(a) - np.mean(b))
    if min(len(a), len(b)) < MIN_RUNS or (has_no_spread(a) and has_no_spread(b)):
        return Welch(difference, math.nan, math.nan, math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # one side without spread is fine
        test = stats.ttest_ind(a, b, equal_var=False)
    interval = test.confidence_interval(CONFIDENCE)
    return Welch(difference, float(interval.low), float(interval.high), float(test.pvalue))


class Ranks(NamedTuple):
    """Rank-sum test: the share of pairs of one run of a and one of b in which a's is smaller, and the two-sided p."""

    share: float
    p: float


def rank_test(a: Sequence[float], b: Sequence[float]) -> Ranks:
    """Wilcoxon's rank-sum test, with ties: exact up to MAX_ADDITIONS, beyond by the normal distribution.

    NaN p with fewer than MIN_RUNS a side. For steps to a target that some runs never met: those are infinite, and equal
    to each other.
    """
    doubled = np.rint(2 * stats.rankdata([*a, *b])).astype(int)  # ranks of ties are halves
    sides = doubled[: len(a)], doubled[len(a) :]
    share = 1 - (sides[0].sum() / 2 - len(a) * (len(a) + 1) / 2) / (len(a) * len(b))
    if min(len(a), len(b)) < MIN_RUNS:
        return Ranks(share, math.nan)
    k, own = min((len(side), int(side.sum())) for side in sides)
    if (k * len(doubled)) ** 2 > MAX_ADDITIONS:
        p = 1.0 if np.ptp(doubled) == 0 else stats.mannwhitneyu(*sides, method="asymptotic").pvalue
        return Ranks(share, float(p))
    # ways[i, s]: choices of i of the ranks so far whose sum is s.
    ways = np.zeros((k + 1, np.sort(doubled)[-k:].sum() + 1))
    ways[0, 0] = 1
    for rank in doubled:
        ways[1:, rank:] += ways[:-1, :-rank]
    chances = ways[-1] / ways[-1].sum()
    return Ranks(share, float(min(1, 2 * chances[: own + 1].sum(), 2 * chances[own:].sum())))


def holm(p_values: Sequence[float], untold: int = 0) -> list[float]:
    """Holm's adjusted p, in the order given. NaN stays NaN and does not count as a test.

    untold: tests that these were chosen from, and that count though their p is not known.
    """
    order = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    adjusted, largest = [math.nan] * len(p_values), 0.0
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) + untold - rank) * p))
        adjusted[i] = largest
    return adjusted


def holm_levels(p_values: Sequence[float], alpha: float, untold: int = 0) -> list[float]:
    """What Holm's procedure at alpha asks each p to be below: alpha over the tests that are left at its turn."""
    order = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    levels = [math.nan] * len(p_values)
    for rank, (_, i) in enumerate(order):
        levels[i] = alpha / (len(order) + untold - rank)
    return levels


class Interval(NamedTuple):
    low: float
    high: float
    method: str


def mean_interval(values: Sequence[float]) -> Interval:
    """95 % interval of the mean by Student's t. Bootstrap intervals of so few runs are too narrow.

    None (NaN) for equal values: one of no width would claim to know the mean of all seeds.
    """
    if len(values) < 2 or has_no_spread(values):
        return Interval(math.nan, math.nan, "one value" if len(values) < 2 else "equal values")
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * stats.sem(values)
    return Interval(float(np.mean(values) - half), float(np.mean(values) + half), "t")


def mean_of(values: Sequence[float]) -> tuple[float, Interval]:
    return float(np.mean(values)), mean_interval(values)


def wilson(k: int, n: int) -> Interval:
    """95 % interval of a proportion k/n."""
    found = stats.binomtest(k, n).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(float(found.low), float(found.high), "Wilson")


def ratio_interval(a: Sequence[float], b: Sequence[float]) -> tuple[float, Interval]:
    """Geometric mean of the paired ratios a/b, of interleaved runs, and the 95 % t-interval of it."""
    logs = np.log(np.asarray(a) / np.asarray(b))
    low, high, method = mean_interval(logs)
    return math.exp(logs.mean()), Interval(math.exp(low), math.exp(high), f"{method} of logarithms")


def runs_needed(difference: float, sd: float, alpha: float = 0.05, power: float = 0.8) -> int:
    """Runs a side with which Welch's test at alpha finds such a difference with such a power, by noncentral t."""
    if difference == 0 or sd == 0 or not math.isfinite(difference * sd):
        return 0
    effect = abs(difference) / sd

    def power_of(n: int) -> float:
        critical = stats.t.ppf(1 - alpha / 2, 2 * n - 2)
        return float(stats.nct.sf(critical, 2 * n - 2, effect * math.sqrt(n / 2)))

    # The normal approximation lies at most a few runs below.
    n = max(2, math.floor(2 * ((stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(power)) / effect) ** 2))
    return n if n > 10_000 else next(m for m in itertools.count(n) if power_of(m) >= power)


def ranks_needed(alpha: float) -> int:
    """Runs a side with which the rank-sum test can give p < alpha at all: when every run of a side comes first."""
    return next(n for n in itertools.count(MIN_RUNS) if 2 / math.comb(2 * n, n) < alpha)


# ----------------------------------------------------------------------------------------------------------------------
# Reaching a target


class Crossing(NamedTuple):
    """Where one run first met the target, interpolated between two validations; seconds alike.

    bracket: the steps of the two validations; of a run whose first validation is at the target, from 0.
    """

    step: float
    time_s: float
    bracket: tuple[int, int]

    @property
    def is_coarse(self) -> bool:
        """Whether the validations are too far apart for step and time_s to mean anything."""
        before, after = self.bracket
        return after - before > COARSE_FRAC * after


def crossing(validations: Sequence[tuple[int, float, float]], target: float) -> Crossing | None:
    """The first crossing of validations (step, loss, seconds), in order of steps; None where none is at the target.

    Between the validation before and the first at or below the target the loss is taken for a straight line.
    """
    before = None
    for step, loss, time_s in validations:
        if loss <= target:
            if before is None or not math.isfinite(before[1]):
                return Crossing(float(step), time_s, (before[0] if before else 0, step))
            part = (before[1] - target) / (before[1] - loss)
            return Crossing(
                before[0] + part * (step - before[0]), before[2] + part * (time_s - before[2]), (before[0], step)
            )
        before = (step, loss, time_s)
    return None


@dataclass(frozen=True)
class Reached:
    """Steps (or seconds) of all runs of a group to the target, censored ones included.

    expected: ERT, the cost of all runs over the number that arrived (Auger & Hansen 2005); infinite if none did.
    restricted_mean: mean with a run that did not arrive counted at its cap, so a lower bound.
    median: infinite where fewer than half arrived.
    bracket: the steps between which all runs arrived, where validations are too far apart for any of the figures above.
    """

    count: int
    runs: int
    expected: float
    restricted_mean: float
    median: float
    interval: Interval
    bracket: tuple[float, float] | None = None


def reached(values: Sequence[float | None], caps: Sequence[float]) -> Reached:
    """Args: values, None for a run that ended, diverged or was stopped short; caps, where each run ended."""
    arrived = [value for value in values if value is not None]
    paid = [cap if value is None else value for value, cap in zip(values, caps, strict=True)]
    with_inf = sorted(math.inf if value is None else value for value in values)
    return Reached(
        len(arrived),
        len(paid),
        sum(paid) / len(arrived) if arrived else math.inf,
        float(np.mean(paid)),
        with_inf[(len(with_inf) - 1) // 2] if len(with_inf) % 2 else float(np.mean(with_inf[len(paid) // 2 - 1 :][:2])),
        mean_interval(arrived) if len(arrived) == len(paid) else Interval(math.nan, math.nan, "censored runs"),
    )


def common_step(runs: Sequence[Mapping[int, float]], target: float) -> int | None:
    """The first step, validated in every run {step: loss}, at which the gate passes and the t-test gives p < 0.05.

    Choosing among steps makes passing by luck likelier than the 5 % of one test: little while losses fall, much on a
    plateau. A step found there is a lead: test it with new seeds.
    """
    if not runs:
        return None
    for step in sorted(set.intersection(*(set(run) for run in runs))):
        losses = [run[step] for run in runs]
        if all(map(math.isfinite, losses)) and gate(losses, target).passes and t_below(losses, target) < 0.05:
            return step
    return None


def repeated_seeds(seeds: Iterable[int | None]) -> list[str]:
    """What forbids a test on runs of these seeds, in words: two runs of one seed are no two samples."""
    counts = Counter(seed for seed in seeds if seed is not None)
    repeated = sorted(seed for seed, count in counts.items() if count > 1)
    return [f"seeds more than once: {', '.join(map(str, repeated))}"] if repeated else []


def flaws(seeds: Sequence[int | None], losses: Sequence[Sequence[float]]) -> list[str]:
    """What forbids a test on these runs, in words: too few, equal seeds, duplicates.

    Args:
        seeds: one a run; None where unknown.
        losses: each run's losses at its validations.
    """
    found = []
    if len(losses) < MIN_RUNS:
        found.append(f"{len(losses)} run{'s' * (len(losses) != 1)}, no test with fewer than {MIN_RUNS}")
    found += repeated_seeds(seeds)
    sequences = [tuple(run) for run in losses if run]
    duplicates = len(sequences) - len(set(sequences))
    if duplicates:
        found.append(f"{duplicates} run{'s' * (duplicates != 1)} with the losses of another")
    return found
