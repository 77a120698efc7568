"""What scripts/analysis/verdict.py found, in words, tables and JSON."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from aurora.trainer.record import seed_gaps
from scripts.analysis.statistics import (
    GATE_SIGMA,
    MIN_RUNS,
    Interval,
    Reached,
    gate,
    mean_interval,
    sd_test,
    t_below,
    wilson,
)
from scripts.analysis.text import markdown_table, plain
from scripts.analysis.verdict import (
    ALPHA,
    MOST_GROUPS,
    Group,
    Pair,
    compare_pairs,
    has_mixed_code,
    mean_loss,
    order_of_arrival,
    status_of,
    was_resumed,
)

# Characters of a sentence that names many runs.
LONG = 1000


def with_interval(value: float, interval: Interval, digits: int) -> str:
    text = f"{value:.{digits}f}"
    return text if math.isnan(interval.low) else f"{text} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def to_target(found: Reached, digits: int) -> str:
    """Mean and interval, or what the runs have cost without getting there: a mean of those that did would flatter."""
    if found.bracket:
        low, high = (f"{round(value, digits):g}" for value in found.bracket)
        return f"{low} to {high}" if found.count == found.runs else f"> {low}"
    if found.count == found.runs:
        return with_interval(found.restricted_mean, found.interval, digits)
    return f"> {found.restricted_mean:.{digits}f}"


def as_p(p: float) -> str:
    return "-" if math.isnan(p) else "<.0001" if p < 1e-4 else f"{p:.4f}".lstrip("0") if p < 1 else "1"


HEADER = (
    *("optimizer", "steps", "n", "val loss at the end", "sd", "p below target", "gate", "reached"),
    *("steps to target [95 %]", "seconds to target [95 %]", "ms/step", "of it optimizer"),
)


def group_cells(group: Group) -> tuple[str, ...]:
    """One row under HEADER."""
    losses, target = group.losses(group.last_step), group.runs[0].target
    margin = gate(losses, target)
    steps = group.steps_to_target()
    is_whole = len(losses) == len(group.runs)
    return (
        group.label,
        str(group.planned_steps),
        str(len(group.runs)),
        f"{np.mean(losses):.4f}" if losses else "-",
        f"{np.std(losses, ddof=1):.4f}" if len(losses) > 1 else "-",
        as_p(t_below(losses, target)) if is_whole else "-",
        f"{margin.margin:+.4f} {'yes' if margin.passes else 'no'}" if is_whole and len(losses) > 2 else "-",
        f"{steps.count}/{steps.runs}",
        to_target(steps, 1),
        to_target(group.seconds_to_target(), 1),
        *(f"{value:.1f}" if math.isfinite(value) else "-" for value in mean_ms(group).values()),
    )


def mean_ms(group: Group) -> dict[str, float]:
    """Milliseconds of a step, and of the optimizer in it: means of the finished runs, NaN without one."""
    finished = [run for run in group.runs if run.is_done]
    keys = ("step_ms", "optimizer_ms")
    return {key: float(np.mean([run.mean_ms(key) for run in finished])) if finished else math.nan for key in keys}


def mean_seconds(group: Group) -> dict[str, float]:
    """Where a run's seconds went: timed ones, and each kind that is not timed. Means of the finished runs."""
    parts = [
        {"timed": run.end_event["train_time_s"]}
        | {kind: s for kind, s in run.end_event.get("untimed", {}).items() if isinstance(s, int | float)}
        for run in group.runs
        if run.is_done
    ]
    kinds = dict.fromkeys(kind for part in parts for kind in part)
    return {kind: float(np.mean([part.get(kind, 0.0) for part in parts])) for kind in kinds}


PAIR_HEADER = (
    *("pair", "compared by", "difference [95 %]", "p", "p (Holm)", "ms/step ratio [95 %]"),
    *("seconds to target, ratio [95 %]", "verdict"),
)


def pair_cells(pair: Pair) -> tuple[str, ...]:
    ratios = (pair.step_ratio, pair.target_ratio)
    digits = 4 if pair.measure.startswith("loss") else 1
    if math.isfinite(pair.share):
        difference = f"earlier in {pair.share:.0%} of pairs of runs"
    else:
        interval = Interval(*pair.interval, "Welch")
        difference = with_interval(pair.difference, interval, digits) if math.isfinite(pair.difference) else "-"
    return (
        f"{pair.first.label} - {pair.second.label}",
        pair.measure,
        difference,
        as_p(pair.p),
        as_p(pair.p_holm),
        *("-" if ratio is None else with_interval(*ratio, digits=3) for ratio in ratios),
        pair.verdict,
    )


def markdown_report(groups: Sequence[Group], escape: Callable[..., str] = plain) -> str:
    """Everything about the groups of one task, in Markdown: table, pairs, and what weakens them.

    escape: makes text of records harmless where the report goes: plain for a terminal, cell for a Markdown file.
    """
    rows = [(escape(label), *numbers) for label, *numbers in map(group_cells, groups)]
    text = markdown_table(HEADER, rows) + "\n\n"
    pairs = compare_pairs(groups)
    if any(len(group.runs) >= MIN_RUNS for group in groups) and pairs:
        rows = [(escape(name), *numbers, escape(words, LONG)) for name, *numbers, words in map(pair_cells, pairs)]
        text += markdown_table(PAIR_HEADER, rows) + "\n\n"
    return text + "\n".join(escape(line, LONG) for line in remarks(groups, pairs)) + "\n"


def remarks(groups: Sequence[Group], pairs: Sequence[Pair]) -> list[str]:
    """The sentences below the tables."""
    lines = leaders(groups)
    lengths = sorted({group.planned_steps for group in groups})
    if len(lengths) > 1:
        lines.append(
            f"Schedules of {', '.join(map(str, lengths))} steps, each cooled down at its own end: compare losses "
            "between equal lengths only, and steps or seconds to the target between unequal ones. With another length "
            "a run may reach the target earlier or later."
        )
    few = min(len(group.runs) for group in groups)
    if few < MIN_RUNS:
        lines.append(f"n = {few} is a lead, not evidence: add seeds, as in --seeds 0 1 2 3 4.")
    lines += [f"{group.label}: {flaw}." for group in groups for flaw in group.flaws() if "no test with" not in flaw]
    gaps = {group.label: seed_gaps(group.seeds) for group in groups}
    lines += [f"{label}: no seed {', '.join(map(str, gap))}; was it left out?" for label, gap in gaps.items() if gap]
    lines += [f"{group.label}: model edited: {', '.join(edits)}." for group in groups if (edits := group.edits())]
    if has_mixed_code(groups):
        lines.append("Not all runs were made by the same code; the tests take it that this does not matter.")
    wide = [group.label for group in groups if sd_test(group.losses(group.last_step)) < ALPHA]
    if wide and few >= MIN_RUNS:
        lines.append(
            f"The seeds of {', '.join(wide)} differ by more than the {GATE_SIGMA} that the public rule assumes: "
            "trust the t-test instead."
        )
    if len(set.union(*(group.surroundings for group in groups))) > 1:
        lines.append("Times are not comparable: the runs come from more than one machine, stack or folder.")
    if coarse := [group.label for group in groups if group.is_coarse]:
        lines.append(
            f"Validations of {', '.join(coarse)} are too far apart around the target to say when it was met: the "
            "tables show the steps and seconds between which it was."
        )
    resumed = [f"{group.label} seed {run.start['seed']}" for group in groups for run in group.runs if was_resumed(run)]
    if resumed:
        lines.append(f"Stopped and resumed, so that their seconds are not comparable: {', '.join(resumed)}.")
    if len(groups) > MOST_GROUPS:
        lines.append(
            f"Tested is {groups[0].label}, which is in front, against each of the others; Holm's p is corrected for "
            f"all {math.comb(len(groups), 2):,} pairs, among which the runs chose these."
        )
    if any(pair.step_ratio or pair.target_ratio for pair in pairs):
        lines.append(
            "A ratio of times differs from 1 where its interval leaves out 1. The intervals are paired by seed and not "
            "corrected for the number of pairs."
        )
    return lines


def leaders(groups: Sequence[Group]) -> list[str]:
    """Who is in front: at the target, and of each schedule at its end. In words only; the tests are of pairs."""
    lines = []
    arrived = [group for group in groups if not order_of_arrival(group)[0]]
    if arrived:
        means = [f"{group.label} after {group.steps_to_target().restricted_mean:.1f}" for group in arrived[:2]]
        lines.append(f"First at the target: {' steps, then '.join(means)} steps.")
    for length in sorted({group.planned_steps for group in groups}):
        inside = [group for group in groups if group.planned_steps == length and math.isfinite(mean_loss(group))]
        if len(inside) > 1 or (inside and len(groups) == 1):
            best, *others = sorted(inside, key=mean_loss)
            rest = f", {mean_loss(others[0]) - mean_loss(best):.4f} below {others[0].label}" if others else ""
            lines.append(f"Lowest validation loss after {length} steps: {best.label}{rest}.")
    return lines


def as_json(groups: Sequence[Group]) -> dict[str, Any]:
    """The same numbers for programs; infinite and undefined ones as null."""

    def plain(value: Any) -> Any:
        if isinstance(value, float | np.floating):
            return float(value) if math.isfinite(value) else None
        if isinstance(value, Reached):
            return plain(vars(value))
        if isinstance(value, tuple) and hasattr(value, "_asdict"):
            return plain(value._asdict())
        if isinstance(value, dict):
            return {key: plain(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [plain(entry) for entry in value]
        return value

    rows = []
    for group in groups:
        losses, target = group.losses(group.last_step), group.runs[0].target
        rows.append(
            {
                "label": group.label,
                "optimizer": group.optimizer,
                "hparams": group.runs[0].start.get("hparams", {}),
                "seeds": group.seeds,
                "records": [str(run.path) for run in group.runs],
                "status": [status_of(run) for run in group.runs],
                "planned_steps": group.planned_steps,
                "step": group.last_step,
                "losses": losses,
                "mean": float(np.mean(losses)) if losses else None,
                "mean_interval": mean_interval(losses) if losses else None,
                "sd": float(np.std(losses, ddof=1)) if len(losses) > 1 else None,
                "gate": gate(losses, target),
                "p_below_target": t_below(losses, target),
                "p_sd": sd_test(losses),
                "reached_interval": wilson(group.steps_to_target().count, len(group.runs)),
                "steps_to_target": group.steps_to_target(),
                "seconds_to_target": group.seconds_to_target(),
                "crossings": group.crossings(),
                **mean_ms(group),
                "mean_seconds": mean_seconds(group),
                "flaws": group.flaws(),
            }
        )
    pairs = [
        {
            "first": pair.first.label,
            "second": pair.second.label,
            "measure": pair.measure,
            "difference": pair.difference,
            "interval": pair.interval,
            "share_earlier": pair.share,
            "p": pair.p,
            "p_holm": pair.p_holm,
            "step_time_ratio": pair.step_ratio,
            "target_time_ratio": pair.target_ratio,
            "verdict": pair.verdict,
        }
        for pair in compare_pairs(groups)
    ]
    return plain({"target": groups[0].runs[0].target, "groups": rows, "pairs": pairs})
