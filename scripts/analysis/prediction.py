"""How well one track orders optimizers as another does: Spearman's rho of two orders, and what is known of it."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from scripts.analysis.statistics import CONFIDENCE, Interval

RESAMPLES = 10_000
FEWEST_RULES = 4  # of which an order can say anything: 24 orders


class Agreement(NamedTuple):
    """Spearman's rho of two orders of the same rules.

    Attributes:
        rho: 1 for the same order, -1 for the opposite one.
        interval: of 95 %: rules drawn anew from these, with replacement, each with its seeds drawn anew.
        p: one-sided: the share of random orders that agree at least as much.
        repeat: mean rho between two measurements of the losses, seeds drawn anew for both: noise allows no more.
    """

    rho: float
    interval: Interval
    p: float
    repeat: float


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's rho of each row of a with the same row of b, ties at their mean rank; NaN where one has no order."""
    ranks = [stats.rankdata(values, axis=-1) for values in (a, b)]
    ranks = [rank - rank.mean(-1, keepdims=True) for rank in ranks]
    norms = np.sqrt(np.prod([np.sum(rank**2, -1) for rank in ranks], axis=0))
    return np.divide(np.sum(ranks[0] * ranks[1], -1), norms, out=np.full(norms.shape, np.nan), where=norms > 0)


def agreement(losses: Mapping[str, Sequence[float]], steps: Mapping[str, float]) -> Agreement:
    """How the order of mean final losses here agrees with the order of steps to the target there.

    Args:
        losses: of each rule, one for each seed; infinite where a run diverged.
        steps: of the same rules, on the other track.

    Raises:
        ValueError: fewer than four rules, a rule without losses, or other rules on the other side.
    """
    names = sorted(losses)
    if set(names) != set(steps) or len(names) < FEWEST_RULES or not all(len(losses[name]) for name in names):
        raise ValueError(
            f"an order needs {FEWEST_RULES} rules or more, with losses and steps; got {names}, {sorted(steps)}"
        )
    here, there = (np.array([[value(name) for name in names]]) for value in (lambda n: np.mean(losses[n]), steps.get))
    rho = float(spearman(here, there)[0])

    rng = np.random.default_rng(0)
    once, again = (
        np.stack([rng.choice(losses[name], (RESAMPLES, len(losses[name]))).mean(1) for name in names], 1)
        for _ in range(2)
    )
    drawn = rng.integers(len(names), size=once.shape)
    resampled = spearman(np.take_along_axis(once, drawn, 1), there[0][drawn])
    low, high = np.nanpercentile(resampled, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)])
    interval = Interval(float(low), float(high), "bootstrap over rules and seeds")
    chance = spearman(rng.permuted(np.repeat(here, RESAMPLES, 0), axis=1), np.repeat(there, RESAMPLES, 0))
    p = (1 + int(np.sum(chance >= rho - 1e-9))) / (1 + RESAMPLES) if math.isfinite(rho) else math.nan
    return Agreement(rho, interval, p, float(np.nanmean(spearman(once, again))))
