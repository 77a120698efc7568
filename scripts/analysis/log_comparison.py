"""Whose logs of other people are better: scripts/logs.py --against."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scripts.analysis.foreign import Trial, read_logs, without_copies
from scripts.analysis.statistics import crossing, rank_test, welch
from scripts.analysis.text import plain


def compare(a: Sequence[Path], b: Sequence[Path], step: int | None, metric: str, target: float) -> dict[str, Any]:
    """Two sets of logs: Welch's test of their losses at a step, or of steps to the target where their schedules differ.

    Runs that never met the target are infinite; then ranks are compared.

    Raises:
        ValueError: no log, several schedules in one set, no loss at the step, no step, or validations too far apart.
    """
    sides = []
    for paths in (a, b):
        trials, _ = without_copies(read_logs(list(paths))[0])
        lengths = {trial.total_steps for trial in trials}
        if len(lengths) != 1:
            names = ", ".join(map(str, paths))
            raise ValueError(f"{names}: {len(trials)} runs, of {len(lengths)} schedules; compare runs of one")
        sides.append(trials)
    name = f"{', '.join(map(str, a))} against {', '.join(map(str, b))}"
    if sides[0][0].total_steps == sides[1][0].total_steps:
        if step is None:
            raise ValueError("name the step at which losses are compared: --steps")
        measure = f"{metric} at step {step}"
        values = [[trial.values(metric).get(step, math.nan) for trial in side] for side in sides]
        if missing := sum(not math.isfinite(value) for side in values for value in side):
            raise ValueError(f"{name}: {missing} runs have no {measure}")
    else:
        measure = f"steps to a {metric} of {target:g}, the schedules being unlike"
        values = [[steps_to_target(trial, metric, target) for trial in side] for side in sides]
    is_ranked = not np.isfinite(sum(values, [])).all()
    test = rank_test(*values) if is_ranked else welch(*values)
    return {
        "name": name,
        "measure": measure,
        "runs": [len(side) for side in values],
        "arrived": [sum(map(math.isfinite, side)) for side in values],
        "means": [float(np.mean(side)) if np.isfinite(side).all() else None for side in values],
        "difference": None,
        **{key: value if math.isfinite(value) else None for key, value in test._asdict().items()},
    }


def steps_to_target(trial: Trial, metric: str, target: float) -> float:
    validations = [
        (validation.step, validation.metrics[metric], validation.time_s)
        for validation in trial.validations
        if metric in validation.metrics
    ]
    hit = crossing(validations, target)
    if hit and hit.is_coarse:
        before, after = hit.bracket
        raise ValueError(
            f"{trial}: validations at steps {before} and {after} are too far apart to tell when it met {target:g}"
        )
    return hit.step if hit else math.inf


def as_text(finding: dict[str, Any]) -> str:
    sides = [
        f"{mean:.5f} (n = {n})" if mean is not None else f"{k} of {n} arrived"
        for mean, n, k in zip(finding["means"], finding["runs"], finding["arrived"], strict=True)
    ]
    p = "no p with so few runs" if finding["p"] is None else f"p = {finding['p']:.3g}"
    if finding["difference"] is None:
        test = f"the first is earlier in {finding['share']:.0%} of pairs of runs, rank-sum {p}"
    else:
        low, high = finding["low"], finding["high"]
        interval = "" if low is None else f" [{low:+.5f}, {high:+.5f}]"
        test = f"difference {finding['difference']:+.5f}{interval}, Welch {p}"
    return f"{plain(finding['name'], 300)}\n  {plain(finding['measure'])}: {' and '.join(sides)}, {test}"
