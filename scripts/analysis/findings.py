"""What runs say of each published claim: supported, contradicted, undecided or not testable, with a figure and why.

Two-sided tests at 5 %, Holm-corrected within a claim. Two rules are compared as in verdict.py: by their losses at the
end of equally long schedules, otherwise by steps to the target, where a run that never arrives comes last.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from aurora.trainer.record import Run
from scripts.analysis.statistics import CONFIDENCE, MIN_RUNS, Interval, holm, mean_interval, ratio_interval, welch
from scripts.analysis.verdict import ALPHA, Group, Pair, compare, step_seconds, time_ratio

NAMES = {"adamw": "AdamW", "muon": "Muon", "unormuon": "U-NorMuon", "aurora": "Aurora"}
QUARTER, DEAD_STEP = 25.0, 500  # "more than a quarter of the neurons", "by about step 500"
COST_CLAIM = 1.06


class Finding(NamedTuple):
    """verdict: one of the four words; figure: with its 95 % interval, empty without one; why: in a sentence."""

    claim: str
    verdict: str
    figure: str
    why: str


def judged(claim: str, is_supported: bool, is_contradicted: bool, figure: str, why: str) -> Finding:
    verdict = "supported" if is_supported else "contradicted" if is_contradicted else "undecided"
    return Finding(claim, verdict, figure, why)


def not_testable(claim: str, why: str, figure: str = "") -> Finding:
    return Finding(claim, "not testable", figure, why)


def single_groups(tasks: dict[str, list[Group]]) -> tuple[dict[str, Group], str | None]:
    """The group of each optimizer, in order of arrival; and what forbids to compare them, None if nothing."""
    if len(tasks) != 1:
        return {}, f"{len(tasks)} tasks in one folder" if tasks else "no runs are recorded"
    (groups,) = tasks.values()
    found = {group.optimizer: group for group in groups}
    several = [name for name in found if sum(group.optimizer == name for group in groups) > 1]
    return found, f"several settings of {', '.join(several)} in one folder" if several else None


def flaw_of(groups: dict[str, Group], *names: str) -> str:
    """What forbids a test of these optimizers, in words; empty if nothing does."""
    if lacking := [NAMES[name] for name in names if name not in groups]:
        return f"no run of {', '.join(lacking)} is recorded here"
    return "; ".join(f"{NAMES[name]}: {flaw}" for name in names for flaw in groups[name].flaws())


def signed(value: float, low: float, high: float, digits: int = 1, unit: str = "") -> str:
    """A difference and its interval, where there is one."""
    text = f"{value:+.{digits}f}{unit}"
    return text if math.isnan(low) else f"{text} [{low:+.{digits}f}, {high:+.{digits}f}]"


# ----------------------------------------------------------------------------------------------------------------------
# Claims 1 and 3: who is better


def order_findings(groups: dict[str, Group]) -> list[Finding]:
    pairs = [
        ("1. Muon beats AdamW", "muon", "adamw"),
        ("3a. U-NorMuon beats Muon", "unormuon", "muon"),
        ("3b. Aurora beats U-NorMuon", "aurora", "unormuon"),
    ]
    found = [compare(groups[a], groups[b]) if {a, b} <= groups.keys() else None for _, a, b in pairs]
    p_values = [pair.p if pair else math.nan for pair in found]
    adjusted = [p_values[0], *holm(p_values[1:])]
    counts = [1, *[np.isfinite(p_values[1:]).sum()] * 2]
    findings = []
    for (claim, *names), pair, p, count in zip(pairs, found, adjusted, counts, strict=True):
        if pair is None:
            findings.append(not_testable(claim, flaw_of(groups, *names)))
        elif math.isnan(p):
            findings.append(
                not_testable(claim, pair.verdict.removeprefix("not comparable: "), figure_of(pair, names[0]))
            )
        else:
            is_ahead = pair.front.optimizer == names[0]
            why = f"{corrected(p, count)}; {pair.measure}"
            if pair.measure == "steps to target":
                why += ": " + ", ".join(arrivals(groups[name]) for name in names)
            is_real = p < ALPHA
            findings.append(judged(claim, is_real and is_ahead, is_real, figure_of(pair, names[0]), why))
    return findings


def corrected(p: float, count: int) -> str:
    """count: the tests over which p is Holm's."""
    return f"p = {p:.2g}" + (f", Holm over {count}" if count > 1 else "")


def figure_of(pair: Pair, name: str) -> str:
    """This optimizer's mean minus the other's; where runs did not arrive, how often it is earlier."""
    is_loss, is_turned = pair.measure.startswith("loss"), pair.first.optimizer != name
    if math.isfinite(pair.share):
        share = 1 - pair.share if is_turned else pair.share
        return f"earlier in {share:.0%} of pairs of runs"
    if math.isnan(pair.difference):
        return ""
    low, high = (-pair.interval[1], -pair.interval[0]) if is_turned else pair.interval
    difference = -pair.difference if is_turned else pair.difference
    return signed(difference, low, high, *((4, " nats") if is_loss else (1, " steps")))


def arrivals(group: Group) -> str:
    found = group.steps_to_target()
    return f"{NAMES[group.optimizer]} arrived {found.count} of {found.runs} times"


# ----------------------------------------------------------------------------------------------------------------------
# Claim 2: starved rows and dead neurons. Shares in per cent.


def starved_in(event: dict[str, Any]) -> float:
    """Of up's rows, those that got under a tenth of an even update's energy."""
    ups = [matrix["starved"] for name, matrix in event["matrices"].items() if name.endswith("mlp.up")]
    return 100 * sum(ups) / (event["width"] * len(ups))


def starved_mean(run: Run) -> float:
    """Over the validations of a run."""
    return float(np.mean([starved_in(event) for event in run.neuron_events]))


def starved_last(group: Group) -> float:
    return float(np.mean([starved_in(run.neuron_events[-1]) for run in group.runs]))


def dead_last(group: Group) -> float:
    return float(np.mean([100 * run.neuron_events[-1]["dead"] for run in group.runs]))


def has_telemetry(group: Group) -> bool:
    return all(run.neuron_events for run in group.runs)


def neuron_findings(groups: dict[str, Group]) -> list[Finding]:
    return [*starved_findings(groups), *dead_findings(groups)]


def neuron_flaw(groups: dict[str, Group], *names: str) -> str | None:
    if flaw := flaw_of(groups, *names):
        return flaw
    if blind := [NAMES[name] for name in names if not has_telemetry(groups[name])]:
        return f"the records of {', '.join(blind)} hold no telemetry of neurons (older, or eval.telemetry = false)"
    return None


def starved_findings(groups: dict[str, Group]) -> list[Finding]:
    claims = {
        "unormuon": "2a. Muon starves more rows than U-NorMuon",
        "aurora": "2b. Muon starves more rows than Aurora",
    }
    flaws = {name: neuron_flaw(groups, "muon", name) for name in claims}
    shares = {n: [starved_mean(run) for run in g.runs] for n, g in groups.items() if not neuron_flaw(groups, n)}
    tests = {name: welch(shares["muon"], shares[name]) for name, flaw in flaws.items() if not flaw}
    adjusted = dict(zip(tests, holm([test.p for test in tests.values()]), strict=True))
    findings = []
    for name, claim in claims.items():
        if flaws[name] or math.isnan(adjusted[name]):
            findings.append(not_testable(claim, flaws[name] or "no spread between seeds"))
            continue
        test, is_real = tests[name], adjusted[name] < ALPHA
        why = f"{corrected(adjusted[name], len(tests))}; mean over the validations of a run"
        figure = signed(*test[:3], unit=" points")
        findings.append(judged(claim, is_real and test.difference > 0, is_real, figure, why))
    claim = "2c. Muon starves more than a quarter of the rows of up"
    if flaw := neuron_flaw(groups, "muon"):
        return [*findings, not_testable(claim, flaw)]
    why = f"mean over the validations of a run; at the last one {starved_last(groups['muon']):.1f} %"
    return [*findings, above_quarter(claim, shares["muon"], why)]


def dead_findings(groups: dict[str, Group]) -> list[Finding]:
    claim = f"2d. More than a quarter of Muon's neurons are dead by step {DEAD_STEP}"
    if flaw := neuron_flaw(groups, "muon"):
        findings = [not_testable(claim, flaw)]
    else:
        values, step = dead_by(groups["muon"])
        if step < DEAD_STEP:
            findings = [not_testable(claim, f"these runs end at step {step}, where this is the share", percent(values))]
        else:
            findings = [above_quarter(claim, values, f"at step {step}")]
    claim = f"2e. Under a quarter of U-NorMuon's and of Aurora's neurons are dead by step {DEAD_STEP}"
    if flaw := neuron_flaw(groups, "unormuon", "aurora"):
        return [*findings, not_testable(claim, flaw)]
    found = {name: dead_by(groups[name]) for name in ("unormuon", "aurora")}
    figure = ", ".join(f"{NAMES[name]} {percent(values)}" for name, (values, _) in found.items())
    step = min(step for _, step in found.values())
    if step < DEAD_STEP:
        return [*findings, not_testable(claim, f"runs end at step {step}, where these are the shares", figure)]
    intervals = [mean_interval(values) for values, _ in found.values()]
    is_below, is_above = all(i.high < QUARTER for i in intervals), any(i.low > QUARTER for i in intervals)
    return [*findings, judged(claim, is_below, is_above, figure, f"at step {step}")]


def above_quarter(claim: str, shares: Sequence[float], why: str) -> Finding:
    low, high, _ = mean_interval(shares)
    return judged(claim, low > QUARTER, high < QUARTER, percent(shares), why)


def dead_by(group: Group) -> tuple[list[float], int]:
    """Share of dead neurons of each run at its first validation from DEAD_STEP on, or its last; the earliest step."""
    validations = [
        next((event for event in run.neuron_events if event["step"] >= DEAD_STEP), run.neuron_events[-1])
        for run in group.runs
    ]
    return [100 * validation["dead"] for validation in validations], min(
        validation["step"] for validation in validations
    )


def percent(values: Sequence[float]) -> str:
    found = mean_interval(values)
    text = f"{np.mean(values):.1f} %"
    return text if math.isnan(found.low) else f"{text} [{found.low:.1f}, {found.high:.1f}]"


# ----------------------------------------------------------------------------------------------------------------------
# Claim 4: cost


def step_cost_finding(groups: dict[str, Group]) -> Finding:
    """Seconds of whole training steps."""
    claim = f"4a. A training step with Aurora takes at most {COST_CLAIM - 1:.0%} longer than with Muon"
    flaw = flaw_of(groups, "aurora", "muon")
    ratio = None if flaw else time_ratio(groups["aurora"], groups["muon"], step_seconds)
    if ratio is None:
        return not_testable(
            claim, flaw or "unlike machines, stacks or folders, a resumed run, or fewer than two common seeds"
        )
    return judged_ratio(claim, *ratio, "whole steps of the runs, paired by seed")


def optimizer_cost_finding(table: dict[str, Any] | None) -> Finding:
    """Milliseconds of the optimizer's step alone. table: of scripts/benchmark.py optim."""
    claim = f"4b. Aurora's optimizer step alone takes at most {COST_CLAIM - 1:.0%} longer than Muon's"
    if table is None:
        return not_testable(claim, "there is no table")
    rounds = {name: table["speed"][name]["rounds_ms"] for name in ("aurora folded", "muon")}
    where = f"{len(rounds['muon'])} interleaved rounds on the matrices of {table['config']}, {table['device']}"
    return judged_ratio(claim, *ratio_interval(rounds["aurora folded"], rounds["muon"]), where)


def judged_ratio(claim: str, ratio: float, found: Interval, why: str) -> Finding:
    figure = f"{ratio:.3f} [{found.low:.3f}, {found.high:.3f}]"
    return judged(claim, found.high <= COST_CLAIM, found.low > COST_CLAIM, figure, why)


# ----------------------------------------------------------------------------------------------------------------------
# Claim 5: width

# Groups by expansion factor and optimizer.
Widths = dict[int, dict[str, Group]]


def widths_of(tasks: dict[str, list[Group]]) -> tuple[Widths, str | None]:
    """Runs by the expansion factor of their model, in its order; and what forbids to compare them."""
    found: Widths = {}
    flaws = []
    for task, groups in tasks.items():
        expansion = groups[0].runs[0].start["config"]["model"]["mlp_expansion"]
        if expansion in found:
            flaws.append(f"several tasks with expansion factor {expansion}")
        found[expansion], flaw = single_groups({task: groups})
        flaws += [flaw] if flaw else []
        if len({group.planned_steps for group in groups}) > 1:
            flaws.append(f"schedules of unequal length at factor {expansion}")
    return dict(sorted(found.items())), "; ".join(flaws) or None


def gains(widths: Widths, base: str, other: str) -> dict[int, dict[int, float]]:
    """base's final loss minus other's, by expansion factor and seed, where both have runs that finished."""
    found = {}
    for expansion, groups in widths.items():
        losses = {
            name: {run.start["seed"]: run.end_event["val_loss"] for run in group.runs if run.is_done}
            for name, group in groups.items()
        }
        shared = sorted(losses.get(base, {}).keys() & losses.get(other, {}).keys())
        if shared:
            found[expansion] = {seed: losses[base][seed] - losses[other][seed] for seed in shared}
    return found


def expansion_finding(widths: Widths, flaw: str | None) -> Finding:
    """Slope of the gain against log2 of the expansion factor, over all pairs of runs."""
    claim = "5. Aurora's gain over Muon grows with the MLP's expansion factor"
    by_width = gains(widths, "muon", "aurora")
    if flaw:
        return not_testable(claim, flaw)
    if len(by_width) < 3 or min(map(len, by_width.values())) < MIN_RUNS:
        counts = ", ".join(f"{len(by_seed)} pairs at {e}" for e, by_seed in by_width.items()) or "none"
        return not_testable(claim, f"it takes three factors with {MIN_RUNS} pairs of runs each; there are {counts}")
    flaw = "; ".join(filter(None, (flaw_of(widths[e], "muon", "aurora") for e in by_width)))
    settings = {name: {str(widths[e][name].runs[0].setting) for e in by_width} for name in ("muon", "aurora")}
    if flaw or any(len(found) > 1 for found in settings.values()):
        return not_testable(claim, flaw or "settings differ between factors")
    points = [(math.log2(e), gain) for e, by_seed in by_width.items() for gain in by_seed.values()]
    fit = stats.linregress(*zip(*points, strict=True))
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(points) - 2) * fit.stderr
    figure = signed(fit.slope, fit.slope - half, fit.slope + half, 4, " nats")
    why = f"slope of the gain in final loss for each doubling, {len(points)} pairs of runs, p = {fit.pvalue:.2g}"
    return judged(claim, fit.slope - half > 0, fit.slope + half < 0, figure, why)
