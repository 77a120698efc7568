"""Who won, and is it real: groups of runs, their table, and a verdict in words for every pair.

Runs are grouped by task, optimizer and settings. Every started run counts: one that diverged or was cut short has no
loss, which forbids tests, and stands at its cap among the steps and seconds to the target.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from results.record import Run
from results.statistics import (
    GATE_SIGMA,
    Crossing,
    Interval,
    Reached,
    crossing,
    flaws,
    gate,
    holm,
    mean_interval,
    ratio_interval,
    reached,
    runs_needed,
    sd_test,
    seed_gaps,
    t_below,
    welch,
    wilson,
)
from results.text import plain

ALPHA = 0.05
# Characters of a sentence that names many runs.
LONG = 1000


@dataclass
class Group:
    """Runs of one task, optimizer and setting.

    label: the optimizer, and what of its setting other groups do not have.
    """

    label: str
    runs: list[Run]

    @property
    def optimizer(self) -> str:
        return self.runs[0].start["optimizer"]

    @property
    def seeds(self) -> list[int]:
        return [run.start["seed"] for run in self.runs]

    @property
    def stacks(self) -> set[tuple]:
        """Machines and software; times compare within one only."""
        return {(run.start["world_size"], *map(run.start["env"].get, STACK_KEYS)) for run in self.runs}

    @property
    def last_step(self) -> int:
        """The last step at which every finished run was validated, 0 if there is none."""
        steps = [{look.step for look in run.validations} for run in self.runs if run.is_done]
        return max(set.intersection(*steps), default=0) if steps else 0

    def losses(self, step: int) -> list[float]:
        """The finite losses at a step, of finished runs, by seed."""
        found = [look.val_loss for run in self.runs if run.is_done for look in run.validations if look.step == step]
        return [loss for loss in found if math.isfinite(loss)]

    def crossings(self) -> list[Crossing | None]:
        return [crossing(run.validations, run.target) for run in self.runs]

    def steps_to_target(self) -> Reached:
        steps = [found and found.step for found in self.crossings()]
        return reached(steps, [max((look.step for look in run.validations), default=0) for run in self.runs])

    def seconds_to_target(self) -> Reached:
        seconds = [found and found.time_s for found in self.crossings()]
        return reached(seconds, [max((look.train_time_s for look in run.validations), default=0) for run in self.runs])

    def flaws(self) -> list[str]:
        """What forbids tests, in words."""
        found = flaws(self.seeds, [[look.val_loss for look in run.validations] for run in self.runs])
        lost = [f"seed {run.start['seed']} ({status_of(run)})" for run in self.runs if not run.is_done]
        if lost:
            found.append(f"without a final loss: {', '.join(lost)}")
        schedules = {tuple(look.step for look in run.validations) for run in self.runs if run.is_done}
        if len(schedules) > 1:
            found.append("not validated at the same steps")
        return found

    def code(self) -> set[str | None]:
        return {run.start.get("code_hash") for run in self.runs}


STACK_KEYS = ("device_name", "cpu", "torch", "torch_threads")


def status_of(run: Run) -> str:
    return run.end["status"] if run.end else "cut short"


def group_runs(runs: Iterable[Run]) -> dict[str, list[Group]]:
    """Groups by task_hash, lowest mean loss first.

    An attempt that was interrupted or cut short is left out once the same seed has finished: it was no second look.
    """
    tasks: dict[str, dict[tuple[str, str], list[Run]]] = {}
    for run in runs:
        key = run.start["optimizer"], json.dumps(run.setting, sort_keys=True)
        tasks.setdefault(run.start["task_hash"], {}).setdefault(key, []).append(run)
    found: dict[str, list[Group]] = {}
    for task, by_setting in tasks.items():
        groups = [Group(label_of(key, by_setting), without_repeated_attempts(by_setting[key])) for key in by_setting]
        found[task] = sorted(groups, key=lambda g: (float(np.mean(g.losses(g.last_step) or [math.inf])), g.label))
    return found


def label_of(key: tuple[str, str], by_setting: Iterable[tuple[str, str]]) -> str:
    """The optimizer, and the settings in which groups of the same optimizer differ."""
    optimizer, own = key[0], json.loads(key[1])
    others = [json.loads(text) for name, text in by_setting if name == optimizer]
    differing = [k for k in sorted({k for other in others for k in other}) if len({repr(o.get(k)) for o in others}) > 1]
    return " ".join([optimizer, *(f"{k}={own[k]}" for k in differing if k in own)])


def without_repeated_attempts(runs: Sequence[Run]) -> list[Run]:
    finished = {run.start["seed"] for run in runs if run.is_done}
    settled = [run for run in runs if status_of(run) in ("done", "diverged")]
    # Of a seed that never finished the newest attempt stands for all.
    open_runs = {run.start["seed"]: run for run in runs if run not in settled and run.start["seed"] not in finished}
    return sorted([*settled, *open_runs.values()], key=lambda run: (run.start["seed"], run.path.name))


# ----------------------------------------------------------------------------------------------------------------------
# Pairs


@dataclass
class Pair:
    """Two groups, the one with the lower mean loss first, at the last step that both have."""

    first: Group
    second: Group
    step: int
    difference: float
    interval: tuple[float, float]
    p: float
    p_holm: float
    time_ratio: tuple[float, Interval] | None
    verdict: str


def compare_pairs(groups: Sequence[Group]) -> list[Pair]:
    """Every pair of groups of one task, with Holm's correction over all pairs that can be tested."""
    pairs = []
    for first, second in itertools.combinations(groups, 2):
        common = [{look.step for look in run.validations} for g in (first, second) for run in g.runs if run.is_done]
        step = max(set.intersection(*common), default=0) if common else 0
        a, b = first.losses(step), second.losses(step)
        test = welch(a, b) if a and b else None
        reasons = [f"{group.label}: {flaw}" for group in (first, second) for flaw in group.flaws()]
        lengths = [group.runs[0].setting["steps"] for group in (first, second)]
        if lengths[0] != lengths[1]:
            reasons.append(f"schedules of {lengths[0]} and {lengths[1]} steps; compare the steps to the target")
        is_sound = test is not None and not reasons and not math.isnan(test.p)
        pairs.append(
            Pair(
                first,
                second,
                step,
                test.difference if test else math.nan,
                (test.low, test.high) if is_sound else (math.nan, math.nan),
                test.p if is_sound else math.nan,
                math.nan,
                step_time_ratio(first, second),
                "not comparable: " + "; ".join(reasons or ["no loss at a common step"]),
            )
        )
    for pair, p_holm in zip(pairs, holm([pair.p for pair in pairs]), strict=True):
        pair.p_holm = p_holm
        if math.isnan(pair.p):
            continue
        if p_holm < ALPHA:
            lower = pair.first if pair.difference < 0 else pair.second
            pair.verdict = f"supported: {lower.label} is lower"
        else:
            sds = [np.std(group.losses(pair.step), ddof=1) for group in (pair.first, pair.second)]
            n = runs_needed(pair.difference, math.sqrt(np.mean(np.square(sds))))
            more = n - min(len(pair.first.runs), len(pair.second.runs))
            pair.verdict = "not supported" + (f": about {more} more run{'s' * (more > 1)} a side" if more > 0 else "")
    return pairs


def step_time_ratio(first: Group, second: Group) -> tuple[float, Interval] | None:
    """Seconds a step, paired by seed; None on unlike machines or where fewer than two pairs finished."""
    if len(first.stacks | second.stacks) > 1:
        return None
    seconds = [
        {run.start["seed"]: run.end["train_time_s"] / run.end["step"] for run in group.runs if run.is_done}
        for group in (first, second)
    ]
    shared = sorted(set(seconds[0]) & set(seconds[1]))
    if len(shared) < 2:
        return None
    return ratio_interval([seconds[0][seed] for seed in shared], [seconds[1][seed] for seed in shared])


# ----------------------------------------------------------------------------------------------------------------------
# Words and numbers


def with_interval(value: float, interval: Interval, digits: int) -> str:
    text = f"{value:.{digits}f}"
    return text if math.isnan(interval.low) else f"{text} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def to_target(found: Reached, digits: int) -> str:
    """Mean and interval, or what the runs have cost without getting there: a mean of those that did would flatter."""
    if found.count == found.runs:
        return with_interval(found.restricted_mean, found.interval, digits)
    return f"> {found.restricted_mean:.{digits}f}"


def as_p(p: float) -> str:
    return "-" if math.isnan(p) else "<.0001" if p < 1e-4 else f"{p:.4f}".lstrip("0") if p < 1 else "1"


HEADER = (
    *("optimizer", "n", "val loss", "sd", "p below target", "gate", "reached"),
    *("steps to target [95 %]", "seconds to target [95 %]", "ms/step", "of it optimizer"),
)


def group_cells(group: Group) -> tuple[str, ...]:
    """One row under HEADER."""
    losses, finished = group.losses(group.last_step), [run for run in group.runs if run.is_done]
    target = group.runs[0].target
    margin = gate(losses, target)
    steps = group.steps_to_target()
    is_whole = len(losses) == len(group.runs)
    ms = [float(np.mean([run.mean_ms(key) for run in finished])) if finished else math.nan for key in MS_KEYS]
    return (
        group.label,
        str(len(group.runs)),
        f"{np.mean(losses):.4f}" if losses else "-",
        f"{np.std(losses, ddof=1):.4f}" if len(losses) > 1 else "-",
        as_p(t_below(losses, target)) if is_whole else "-",
        f"{margin.margin:+.4f} {'yes' if margin.passes else 'no'}" if is_whole and len(losses) > 2 else "-",
        f"{steps.count}/{steps.runs}",
        to_target(steps, 1),
        to_target(group.seconds_to_target(), 1),
        *(f"{value:.1f}" if math.isfinite(value) else "-" for value in ms),
    )


MS_KEYS = ("step_ms", "optimizer_ms")
PAIR_HEADER = ("pair", "difference of loss [95 %]", "p", "p (Holm)", "ms/step ratio [95 %]", "verdict")


def pair_cells(pair: Pair) -> tuple[str, ...]:
    ratio = "-" if pair.time_ratio is None else with_interval(*pair.time_ratio, digits=3)
    return (
        f"{pair.first.label} - {pair.second.label}",
        with_interval(pair.difference, Interval(*pair.interval, "Welch"), 4) if pair.step else "-",
        as_p(pair.p),
        as_p(pair.p_holm),
        ratio,
        pair.verdict,
    )


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Aligned, so that it reads as text too."""
    rows = [header, *rows]
    widths = [max(len(cells[i]) for cells in rows) for i in range(len(header))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) for cells in rows]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def report(groups: Sequence[Group], write: Callable[..., str] = plain) -> str:
    """Everything about the groups of one task, in Markdown: table, pairs, and what weakens them.

    write: makes text of records harmless where the report goes: plain for a terminal, cell for a Markdown file.
    """
    rows = [(write(label), *numbers) for label, *numbers in map(group_cells, groups)]
    text = markdown_table(HEADER, rows) + "\n\n"
    pairs = compare_pairs(groups)
    if all(len(group.runs) > 2 for group in groups) and pairs:
        rows = [(write(name), *numbers, write(words, LONG)) for name, *numbers, words in map(pair_cells, pairs)]
        text += markdown_table(PAIR_HEADER, rows) + "\n\n"
    return text + "\n".join(write(line, LONG) for line in remarks(groups, pairs)) + "\n"


def remarks(groups: Sequence[Group], pairs: Sequence[Pair]) -> list[str]:
    """The sentences below the tables."""
    ranked = [group for group in groups if group.losses(group.last_step)]
    lines = []
    if ranked:
        best, *others = ranked
        lines.append(f"Lowest validation loss: {best.label}" + (f", {lead(best, others[0])}." if others else "."))
    few = min(len(group.runs) for group in groups)
    if few < 3:
        lines.append(f"n = {few} is a lead, not evidence: add seeds, as in --seeds 0 1 2 3 4.")
    lines += [f"{group.label}: {flaw}." for group in groups for flaw in group.flaws() if "no test with" not in flaw]
    gaps = {group.label: seed_gaps(group.seeds) for group in groups}
    lines += [f"{label}: no seed {', '.join(map(str, gap))}; was it left out?" for label, gap in gaps.items() if gap]
    if len(set.union(*(group.code() for group in groups))) > 1:
        lines.append("Not all runs were made by the same code; the tests take it that this does not matter.")
    wide = [group.label for group in groups if sd_test(group.losses(group.last_step)) < ALPHA]
    if wide and few >= 3:
        lines.append(
            f"Seeds of {', '.join(wide)} differ more than the {GATE_SIGMA} that the gate assumes: go by the t-test."
        )
    if len(set.union(*(group.stacks for group in groups))) > 1:
        lines.append("Times are not comparable: the runs come from more than one machine or stack.")
    return lines


def lead(best: Group, second: Group) -> str:
    step = min(best.last_step, second.last_step)
    return f"{np.mean(second.losses(step)) - np.mean(best.losses(step)):.4f} below {second.label}"


def as_json(groups: Sequence[Group]) -> dict[str, Any]:
    """The same numbers for programs; infinite and undefined ones as null."""

    def plain(value: Any) -> Any:
        if isinstance(value, float | np.floating):
            return float(value) if math.isfinite(value) else None
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
                "flaws": group.flaws(),
            }
        )
    pairs = [
        {
            "first": pair.first.label,
            "second": pair.second.label,
            "step": pair.step,
            "difference": pair.difference,
            "interval": pair.interval,
            "p": pair.p,
            "p_holm": pair.p_holm,
            "step_time_ratio": pair.time_ratio,
            "verdict": pair.verdict,
        }
        for pair in compare_pairs(groups)
    ]
    return plain({"target": groups[0].runs[0].target, "groups": rows, "pairs": pairs})
