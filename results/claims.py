"""What logs of other people show, beside what is claimed of them."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from results.foreign import Trial, read_logs
from results.statistics import GATE_SIGMA, GATE_THRESHOLD, MIN_RUNS, flaws, gate, sd_test, t_below, welch
from results.text import plain


class Claim(NamedTuple):
    """What is stated: the mean loss of so many runs at a step. mean is text, for its digits count; None: not stated."""

    name: str
    steps: int | None
    mean: str | None
    runs: int | None


def check_file(path: Path, target: float, metric: str | None) -> list[dict[str, Any]]:
    """Every row of a claims.json, with its logs in the folder rowNN beside it.

    Raises:
        ValueError: the file is not a list of claims.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"), parse_float=str)
        claims = [(int(row["row"]), int(row["steps"]), str(row["mean"]), int(row["n"])) for row in rows]
        assert all(math.isfinite(float(mean)) for _, _, mean, _ in claims)
    except (OSError, ValueError, KeyError, TypeError, AssertionError, RecursionError) as error:
        raise ValueError(f"{path} is not a list of claims with row, steps, mean, n: {error!r}") from error
    return [
        check([path.parent / f"row{row:02d}"], Claim(f"row {row}", steps, mean, n), target, metric)
        for row, steps, mean, n in claims
    ]


def check(paths: Sequence[Path], claim: Claim, target: float, metric: str | None = None) -> dict[str, Any]:
    """The statistics of the logs at the claimed step, or at the last common one, and what contradicts the claim.

    Returns:
        trials, complete, diverged, torn: counts. step, metric, losses, mean, sd, gate, p_below_target, p_sd. problems:
        sentences, each a reason why the claim does not follow. remarks: what a reader should know. follows: no problem.

    Raises:
        ValueError: no log could be read.
    """
    trials, errors = read_logs(list(paths))
    if not trials:
        raise ValueError("; ".join(map(str, errors)) or f"no .txt or .log file in {', '.join(map(str, paths))}")
    counts = Counter(trial.status for trial in trials)
    problems, remarks = [], [plain(error, 300) for error in errors]
    remarks += [f"{trial} {ending(trial)}" for trial in trials if trial.status in ("torn", "diverged")]
    remarks += [f"{trial} goes back to an earlier step: a restart" for trial in trials if trial.is_rewound]
    metric = metric or "val_loss"
    step = claim.steps if claim.steps is not None else last_common_step(trials, metric)
    if step is None:
        problems.append(f"the runs have no step with {metric} in common")
        step = max(trial.looks[-1].step for trial in trials)
    values = {trial: trial.values(metric).get(step) for trial in map(_Key, trials)}
    losses = [value for value in values.values() if value is not None and math.isfinite(value)]
    if claim.runs is not None and claim.runs != len(trials):
        problems.append(f"{claim.runs} runs are claimed, the logs hold {len(trials)}")
    if len(losses) < len(trials):
        problems.append(f"{len(trials) - len(losses)} of {len(trials)} runs have no {metric} at step {step}")
    if claim.mean is not None and losses and not agrees(np.mean(losses), claim.mean):
        finding = f"the mean {metric} at step {step} is {np.mean(losses):.5f}, not {claim.mean}"
        if agrees(np.mean(losses), claim.mean, tolerance=1.0):
            remarks.append(finding + ": the last digit")
        else:
            problems.append(finding + elsewhere(trials, claim, metric, step, target))
    stops = sorted({trial.looks[-1].step for trial in trials})
    if len(stops) > 1:
        remarks.append(f"the runs end at different steps: {', '.join(map(str, stops))}")
    schedules = {tuple(look.step for look in trial.looks if look.step > 0) for trial in trials}
    if len(schedules) > 1 and len(stops) == 1:
        remarks.append("the runs were not validated at the same steps")

    margin = gate(losses, target)
    p_below, p_sd = t_below(losses, target), sd_test(losses)
    if len(losses) < MIN_RUNS:
        finding = f"{len(losses)} run{'s' * (len(losses) != 1)}: no test of significance is possible"
        is_met = losses and margin.margin >= GATE_THRESHOLD
        finding += f"; the gate is {'met, taking' if is_met else 'missed, even taking'} the spread for {GATE_SIGMA}"
        problems.append(finding)
    elif not margin.passes:
        problems.append(f"the gate is missed: {margin.margin:.5f} < {GATE_THRESHOLD}")
    if p_below > 0.01:
        remarks.append(f"the t-test with the sample's own spread gives p = {p_below:.3g}, above 0.01")
    if p_sd < 0.01:
        remarks.append(f"seeds differ more than the {GATE_SIGMA} that the gate assumes (p = {p_sd:.2g})")
    sequences = [[look.metrics.get(metric, math.nan) for look in trial.looks if look.step > 0] for trial in trials]
    problems += [flaw for flaw in flaws([None] * len(trials), sequences) if "losses of another" in flaw]
    return {
        "name": claim.name,
        "claim": claim._asdict(),
        "trials": len(trials),
        **{status: counts[status] for status in ("complete", "torn", "diverged", "open")},
        "metric": metric,
        "step": step,
        "losses": losses,
        "mean": float(np.mean(losses)) if losses else None,
        "sd": float(np.std(losses, ddof=1)) if len(losses) > 1 else None,
        "gate": margin.margin if losses else None,
        "gate_passes": margin.passes,
        "p_below_target": None if math.isnan(p_below) else p_below,
        "p_sd": None if math.isnan(p_sd) else p_sd,
        "first_step_that_passes": first_pass(trials, metric, target),
        "problems": problems,
        "remarks": remarks,
        "follows": not problems,
    }


class _Key:
    """Trials are no dict keys by value."""

    def __init__(self, trial: Trial):
        self.values = trial.values


def ending(trial: Trial) -> str:
    if trial.status == "diverged":
        return "diverged: a loss is no number"
    return f"ends at step {trial.looks[-1].step} of {trial.total_steps}"


def agrees(value: float, stated: str, tolerance: float = 0.5) -> bool:
    """Whether the value is what is stated, to so many units of the last digit stated."""
    digits = len(stated.partition(".")[2])
    return abs(value - float(stated)) < (tolerance + 1e-7) * 10**-digits


def elsewhere(trials: Sequence[Trial], claim: Claim, metric: str, step: int, target: float) -> str:
    """Where the stated mean is found instead, as the end of a sentence."""
    for name in sorted({name for trial in trials for look in trial.looks for name in look.metrics}):
        values = [trial.values(name).get(step) for trial in trials]
        if name != metric and None not in values and agrees(np.mean(values), claim.mean):
            return f"; that is the mean of {plain(name)}, whose gate is {gate(values, target).margin:.5f}"
    common = sorted(set.intersection(*(set(trial.values(metric)) for trial in trials)))
    for other in sorted(common, key=lambda other: abs(other - step)):
        if agrees(np.mean([trial.values(metric)[other] for trial in trials]), claim.mean):
            return f"; that is the mean at step {other}"
    best = sorted(trial.values(metric).get(step, math.inf) for trial in trials)
    for n in range(1, len(best)):
        if agrees(np.mean(best[:n]), claim.mean):
            return f"; that is the mean of the best {n}"
    return ""


def last_common_step(trials: Sequence[Trial], metric: str) -> int | None:
    return max(set.intersection(*(set(trial.values(metric)) for trial in trials)), default=None)


def first_pass(trials: Sequence[Trial], metric: str, target: float) -> int | None:
    """The first step that all runs have in common at which the gate passes."""
    common = set.intersection(*(set(trial.values(metric)) for trial in trials))
    passing = (s for s in sorted(common) if gate([trial.values(metric)[s] for trial in trials], target).passes)
    return next(passing, None)


def compare(a: Sequence[Path], b: Sequence[Path], step: int, metric: str) -> dict[str, Any]:
    """Welch's test of the losses of two sets of logs at a step.

    Raises:
        ValueError: a run of either set has no loss there.
    """
    sides = []
    for paths in (a, b):
        trials, errors = read_logs(list(paths))
        values = [trial.values(metric).get(step) for trial in trials]
        if not trials or None in values or not all(map(math.isfinite, values)):
            names = ", ".join(map(str, paths))
            raise ValueError(f"{names}: {len(trials)} runs, {values.count(None)} without {metric} at step {step}")
        sides.append(values)
    test = welch(*sides)
    return {
        "name": f"{', '.join(map(str, a))} against {', '.join(map(str, b))}",
        "step": step,
        "metric": metric,
        "runs": [len(side) for side in sides],
        "means": [float(np.mean(side)) for side in sides],
        **test._asdict(),
    }


def as_text(finding: dict[str, Any]) -> str:
    """A few lines for a reader."""
    name = plain(finding["name"], 300)
    if "runs" in finding:
        (n, m), (a, b) = finding["runs"], finding["means"]
        return (
            f"{name}\n  {finding['metric']} at step {finding['step']}: {a:.5f} (n = {n}) and {b:.5f} (n = {m}), "
            f"difference {finding['difference']:+.5f} [{finding['low']:+.5f}, {finding['high']:+.5f}], "
            f"Welch p = {finding['p']:.3g}"
        )
    others = [f"{finding[status]} {status}" for status in ("torn", "diverged", "open") if finding[status]]
    lines = [f"{name}: {finding['trials']} runs" + (f" ({', '.join(others)})" if others else "")]
    if finding["mean"] is not None:
        sd = "" if finding["sd"] is None else f", sd {finding['sd']:.5f}"
        p = "" if finding["p_below_target"] is None else f", t-test p = {finding['p_below_target']:.2g}"
        lines.append(
            f"  {plain(finding['metric'])} at step {finding['step']}: mean {finding['mean']:.5f}{sd}; "
            f"gate {finding['gate']:.5f}{p}"
        )
    if finding["claim"]["mean"] is not None:
        lines.append("  the claim " + ("follows from the logs" if finding["follows"] else "does not follow:"))
    lines += [f"  - {problem}" for problem in finding["problems"]]
    lines += [f"    {remark}" for remark in finding["remarks"]]
    return "\n".join(lines)
