"""What logs of other people show, beside what is claimed of them."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scripts.analysis.foreign import SUFFIXES, Trial, read_logs, without_copies
from scripts.analysis.statistics import (
    GATE_SIGMA,
    GATE_THRESHOLD,
    MIN_RUNS,
    gate,
    mean_interval,
    sd_test,
    t_below,
)
from scripts.analysis.text import plain

ALPHA = 0.01


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
        trials, complete, diverged, torn, open: counts, copies left out. step (None where every run is taken at its own
        end), metric, losses, seconds, mean, sd, gate, p_below_target, p_sd. problems: sentences, each a reason why the
        claim does not follow. remarks: what a reader should know. follows: no problem.

    Raises:
        ValueError: no log could be read.
    """
    found, errors = read_logs(list(paths))
    if not found:
        nothing = f"no {', '.join(SUFFIXES)} file in {', '.join(map(str, paths))}"
        raise ValueError("; ".join(map(str, errors[:3])) or nothing)
    problems, remarks = [], [str(error) for error in errors[:3]]
    if len(errors) > 3:
        remarks.append(f"{len(errors) - 3} more files hold no validation line of a format that is known")
    trials, copies = without_copies(found)
    if copies:
        first, original = copies[0]
        more = f", and {len(copies) - 1} more such" if len(copies) > 1 else ""
        remarks.append(f"{first} has the losses of {original} and counts as the same run{more}")
    metric = metric or "val_loss"
    trials, left_out = of_one_schedule(trials, claim, metric)
    remarks += left_out
    schedules = {trial.total_steps for trial in trials}
    if len(schedules) > 1:
        lengths = ", ".join(str(steps) for steps in sorted(schedules, key=str))
        problems.append(f"the runs have schedules of {lengths} steps: they are not of one setting")
    remarks += endings(trials)

    step = claim.steps if claim.steps is not None else last_common_step(trials, metric)
    if step is None and not all(trial.values(metric) for trial in trials):
        problems.append(f"the runs have no step with {metric} in common")
    losses, seconds = values_at(trials, metric, step)
    where = "at the end" if step is None else f"at step {step}"
    if claim.runs is not None and claim.runs != len(trials):
        found_runs = f"{claim.runs} runs are claimed, the logs hold {len(trials)}"
        problems.append(found_runs + claimed_part(trials, claim, metric, step))
    if len(losses) < len(trials):
        names = sorted({name for trial in trials for found in trial.validations for name in found.metrics})
        hint = "" if metric in names else f"; they log {', '.join(names[:5])}, see --metric"
        problems.append(f"{len(trials) - len(losses)} of {len(trials)} runs have no {metric} {where}{hint}")
    other = None
    if claim.mean is not None and losses and not agrees(losses, claim.mean):
        finding = f"the mean {metric} {where} is {np.mean(losses):.5f}, not {claim.mean}"
        if agrees(losses, claim.mean, tolerance=1.0):
            remarks.append(finding + ": the last digit")
        else:
            other = other_metric(trials, claim.mean, metric, step)
            problems.append(finding + (f"; {other} has it" if other else elsewhere(trials, claim.mean, metric, step)))

    summary = summarize(losses, target)
    if len(losses) < MIN_RUNS:
        finding = f"{len(losses)} run{'s' * (len(losses) != 1)}: no test of significance is possible"
        is_met = losses and summary["gate"] >= GATE_THRESHOLD
        finding += f"; the gate is {'met, taking' if is_met else 'missed, even taking'} the spread for {GATE_SIGMA}"
        problems.append(finding)
    elif not summary["gate_passes"]:
        problems.append(f"the gate is missed: {summary['gate']:.5f} < {GATE_THRESHOLD}")
    if (summary["p_below_target"] or 0) > ALPHA:
        spread = f"p = {summary['p_below_target']:.3g}, above {ALPHA}"
        remarks.append(f"the t-test with the sample's own spread gives {spread}")
    if summary["p_sd"] is not None and summary["p_sd"] < ALPHA:
        remarks.append(f"seeds differ more than the {GATE_SIGMA} that the gate assumes (p = {summary['p_sd']:.2g})")
    if were_stopped_at_target(trials, metric, target):
        problems.append(
            "each run ends at its own first validation below the target: runs that were lucky early flatter"
        )
    counts = Counter(trial.status for trial in trials)
    return {
        "name": claim.name,
        "claim": claim._asdict(),
        "trials": len(trials),
        "copies": len(copies),
        **{status: counts[status] for status in ("complete", "torn", "diverged", "open")},
        "metric": metric,
        "step": step,
        "losses": losses,
        "seconds": seconds,
        **summary,
        "other_metric": other and {"metric": other, **summarize(values_at(trials, other, step)[0], target)},
        "first_step_that_passes": first_pass(trials, metric, target),
        "problems": problems,
        "remarks": remarks,
        "follows": not problems,
    }


def summarize(losses: Sequence[float], target: float) -> dict[str, Any]:
    """Mean, sd and tests of losses; what cannot be computed is None."""
    margin, p_below, p_sd = gate(losses, target), t_below(losses, target), sd_test(losses)
    return {
        "mean": float(np.mean(losses)) if losses else None,
        "sd": float(np.std(losses, ddof=1)) if len(losses) > 1 else None,
        "gate": margin.margin if losses else None,
        "gate_passes": margin.passes,
        "p_below_target": None if math.isnan(p_below) else p_below,
        "p_sd": None if math.isnan(p_sd) else p_sd,
    }


def values_at(trials: Sequence[Trial], metric: str, step: int | None) -> tuple[list[float], list[float]]:
    """Finite values of a metric at a step, or at each run's last validation with it, and seconds where known."""
    validations = [
        next(
            (
                validation
                for validation in reversed(trial.validations)
                if step in (None, validation.step) and metric in validation.metrics
            ),
            None,
        )
        for trial in trials
    ]
    found = [
        validation for validation in validations if validation is not None and math.isfinite(validation.metrics[metric])
    ]
    return [validation.metrics[metric] for validation in found], [
        validation.time_s for validation in found if math.isfinite(validation.time_s)
    ]


def of_one_schedule(trials: list[Trial], claim: Claim, metric: str) -> tuple[list[Trial], list[str]]:
    """The trials of that length of schedule of which as many were run as are claimed, and what was left out, in words.

    All of them where the logs hold one length, or none that fits.
    """
    by_length: dict[int | None, list[Trial]] = {}
    for trial in trials:
        by_length.setdefault(trial.total_steps, []).append(trial)
    fitting = [
        inside
        for inside in by_length.values()
        if len(inside) == claim.runs and (claim.steps is None or len(values_at(inside, metric, claim.steps)[0]))
    ]
    if len(by_length) == 1 or len(fitting) != 1:
        return trials, []
    rest = [f"{len(inside)} of {steps} steps" for steps, inside in by_length.items() if inside is not fitting[0]]
    return fitting[0], [f"left out are runs of other schedules: {', '.join(rest)}"]


def claimed_part(trials: Sequence[Trial], claim: Claim, metric: str, step: int | None) -> str:
    """Which of the runs have the number and the mean that are claimed, as the end of a sentence."""
    if claim.mean is None:
        return ""
    for words, key in (
        ("in the folder {}", lambda trial: trial.path.parent.name),
        ("in the file {}", lambda trial: trial.path.name),
        ("whose last validation is at step {}", lambda trial: trial.last_step),
    ):
        for value in sorted({key(trial) for trial in trials}):
            inside = [trial for trial in trials if key(trial) == value]
            losses, _ = values_at(inside, metric, step)
            if len(inside) == len(losses) == claim.runs and agrees(losses, claim.mean, tolerance=1.0):
                return f"; the {claim.runs} {words.format(value)} have the mean that is claimed"
    return ""


def were_stopped_at_target(trials: Sequence[Trial], metric: str, target: float) -> bool:
    """Whether runs end before their plan at different steps, each at its first validation at or below the target."""
    for trial in trials:
        losses = list(trial.values(metric).values())
        is_first = len(losses) > 1 and losses[-1] <= target < min(losses[:-1])
        if not is_first or trial.status not in ("torn", "open"):
            return False
    return len({trial.last_step for trial in trials}) > 1


def endings(trials: Sequence[Trial]) -> list[str]:
    """What a reader should know of how runs ended."""
    remarks = [f"{trial} diverged: a loss is no number" for trial in trials if trial.status == "diverged"]
    remarks += [f"{trial} goes back to an earlier step: a restart" for trial in trials if trial.is_rewound]
    short = Counter((trial.last_step, trial.total_steps) for trial in trials if trial.status == "torn")
    for (last, total), count in sorted(short.items()):
        remarks.append(f"{count} run{'s end' if count > 1 else ' ends'} at step {last} of {total}")
    stops = sorted({trial.last_step for trial in trials})
    if len(stops) > 1:
        steps = ", ".join(map(str, stops)) if len(stops) < 6 else f"from {stops[0]} to {stops[-1]}"
        remarks.append(f"the runs end at different steps: {steps}")
    schedules = {tuple(validation.step for validation in trial.validations if validation.step > 0) for trial in trials}
    if len(schedules) > 1 and len(stops) == 1:
        remarks.append("the runs were not validated at the same steps")
    return remarks


def agrees(values: Sequence[float], stated: str, tolerance: float = 0.5) -> bool:
    """Whether the mean of the values is what is stated, to so many units of the last digit stated."""
    digits = len(stated.partition(".")[2])
    return abs(float(np.mean(values)) - float(stated)) < (tolerance + 1e-7) * 10**-digits


def other_metric(trials: Sequence[Trial], mean: str, metric: str, step: int | None) -> str | None:
    """Another metric of all runs that has the claimed mean."""
    for name in sorted(
        {name for trial in trials for validation in trial.validations for name in validation.metrics} - {metric}
    ):
        values, _ = values_at(trials, name, step)
        if len(values) == len(trials) and agrees(values, mean):
            return name
    return None


def elsewhere(trials: Sequence[Trial], mean: str, metric: str, step: int | None) -> str:
    """Where the stated mean is found instead, as the end of a sentence."""
    common = sorted(set.intersection(*(set(trial.values(metric)) for trial in trials)))
    for other in sorted(common, key=lambda other: abs(other - (step or 0))):
        if agrees([trial.values(metric)[other] for trial in trials], mean):
            return f"; that is the mean at step {other}"
    best = sorted(values_at(trials, metric, step)[0])
    for n in range(1, len(best)):
        if agrees(best[:n], mean):
            return f"; the lowest {n} of {len(best)} have that mean"
    return ""


def last_common_step(trials: Sequence[Trial], metric: str) -> int | None:
    return max(set.intersection(*(set(trial.values(metric)) for trial in trials)), default=None)


def first_pass(trials: Sequence[Trial], metric: str, target: float) -> int | None:
    """The first step that all runs have in common at which the gate passes."""
    common = set.intersection(*(set(trial.values(metric)) for trial in trials))
    passing = (s for s in sorted(common) if gate([trial.values(metric)[s] for trial in trials], target).passes)
    return next(passing, None)


def as_text(finding: dict[str, Any]) -> str:
    """A few lines for a reader."""
    name = plain(finding["name"], 300)
    words = {"torn": "ending early", "diverged": "diverged", "open": "of unknown length"}
    others = [f"{finding[status]} {word}" for status, word in words.items() if finding[status]]
    runs = f"{finding['trials']} run{'s' * (finding['trials'] != 1)}"
    lines = [f"{name}: {runs}" + (f" ({', '.join(others)})" if others else "")]
    where = "at the end" if finding["step"] is None else f"at step {finding['step']}"
    for summary in (finding, finding["other_metric"]):
        if summary and summary["mean"] is not None:
            sd = "" if summary["sd"] is None else f", sd {summary['sd']:.5f}"
            p = "" if summary["p_below_target"] is None else f", t-test p = {summary['p_below_target']:.2g}"
            numbers = f"mean {summary['mean']:.5f}{sd}; gate {summary['gate']:.5f}{p}"
            lines.append(f"  {plain(summary['metric'])} {where}: {numbers}")
    if finding["seconds"]:
        seconds, method = finding["seconds"], mean_interval(finding["seconds"])
        interval = "" if math.isnan(method.low) else f" [{method.low:.1f}, {method.high:.1f}]"
        lines.append(f"  train_time {where}: mean {np.mean(seconds):.1f}{interval} s of {len(seconds)}")
    if finding["claim"]["mean"] is not None:
        is_by_gate_alone = (finding["p_below_target"] or 0) > ALPHA
        follows = (
            "follows from the logs" + ", but by the gate alone, which takes their spread as given" * is_by_gate_alone
        )
        lines.append("  the claim " + (follows if finding["follows"] else "does not follow:"))
    lines += [f"  - {plain(problem, 600)}" for problem in finding["problems"]]
    lines += [f"    {plain(remark, 600)}" for remark in finding["remarks"]]
    return "\n".join(lines)
