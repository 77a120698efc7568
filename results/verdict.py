"""Who won, and is it real: groups of runs, their table, and a verdict in words for every pair.

Runs are grouped by task, optimizer and settings, the schedule's length among them. Every started run counts: one that
diverged or was cut short has no loss, which forbids tests, and stands at its cap among the steps and seconds to the
target.

Two groups of one schedule are compared by their loss at its end. Where schedules differ there is no step at which the
losses mean the same, since one has cooled down and the other has not: such groups are compared by their steps to the
target, by Welch's test, or by ranks when some runs never arrived.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from results.record import Run, seed_gaps
from results.statistics import (
    GATE_SIGMA,
    MIN_RUNS,
    Crossing,
    Interval,
    Reached,
    Welch,
    crossing,
    flaws,
    gate,
    holm,
    mean_interval,
    rank_test,
    ranks_needed,
    ratio_interval,
    reached,
    runs_needed,
    sd_test,
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
        return {stack_of(run) for run in self.runs}

    @property
    def planned_steps(self) -> int:
        return self.runs[0].setting["steps"]

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


STACK_KEYS = ("device_name", "cpu", "cpu_count", "usable_cpus", "torch", "torch_threads", "cuda", "cudnn")


def stack_of(run: Run) -> tuple:
    """What times depend on besides the code: kind and number of devices, cores and threads, versions, kernels.

    SPEEDRUN_JOBS: so many runs shared the machine.
    """
    start, env = run.start, run.start["env"]
    chosen = map(start.get, ("compiled", "attention", "micro_batch"))
    values = [start["world_size"], *chosen, *map(env.get, STACK_KEYS)]
    if isinstance(variables := env.get("variables"), dict):
        values.append(variables.get("SPEEDRUN_JOBS"))
    return tuple(map(str, values))


def status_of(run: Run) -> str:
    return run.end["status"] if run.end else "cut short"


def group_runs(runs: Iterable[Run]) -> dict[str, list[Group]]:
    """Groups by task_hash, in their order of arrival at the target.

    An attempt that was interrupted or cut short is left out once the same seed has finished: it was no second look.
    """
    tasks: dict[str, dict[tuple[str, str], list[Run]]] = {}
    for run in runs:
        key = run.start["optimizer"], json.dumps(run.setting, sort_keys=True)
        tasks.setdefault(run.start["task_hash"], {}).setdefault(key, []).append(run)
    found: dict[str, list[Group]] = {}
    for task, by_setting in tasks.items():
        groups = [Group(label_of(key, by_setting), without_repeated_attempts(by_setting[key])) for key in by_setting]
        found[task] = sorted(groups, key=order_of_arrival)
    return found


def mean_loss(group: Group) -> float:
    """At the last step that all finished runs have; infinite if none finished."""
    losses = group.losses(group.last_step)
    return float(np.mean(losses)) if losses else math.inf


def order_of_arrival(group: Group) -> tuple:
    """Sorts groups: first those whose runs all met the target, by their mean steps, then the others by mean loss."""
    found = group.steps_to_target()
    is_whole = found.count == found.runs
    return not is_whole, found.restricted_mean if is_whole else mean_loss(group), group.label


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
    """Two groups, the one that is in front first.

    measure: what is compared, "loss at step 200" or "steps to target". difference: of its means, first - second; where
    runs did not arrive there is none, but the share of pairs of runs in which that of the first arrives earlier.
    step_ratio, target_ratio: seconds a step, and seconds to the target, first / second, paired by seed; None on unlike
    machines.
    """

    first: Group
    second: Group
    measure: str
    difference: float
    interval: tuple[float, float]
    share: float
    p: float
    p_holm: float
    step_ratio: tuple[float, Interval] | None
    target_ratio: tuple[float, Interval] | None
    verdict: str


def compare_pairs(groups: Sequence[Group]) -> list[Pair]:
    """Every pair of groups of one task, with Holm's correction over all pairs that can be tested."""
    pairs, spreads = [], []
    for one, other in itertools.combinations(groups, 2):
        is_same_schedule = one.planned_steps == other.planned_steps
        first, second = sorted((one, other), key=mean_loss if is_same_schedule else order_of_arrival)
        measure, a, b = losses_at_end(first, second) if is_same_schedule else arrivals(first, second)
        reasons = [f"{group.label}: {flaw}" for group in (first, second) for flaw in group.flaws()]
        if not a or not b:
            reasons.append(f"no {measure}")
        elif not np.isfinite([*a, *b]).any():
            reasons.append("no run of either met the target")
        is_ranked = not np.isfinite([*a, *b]).all()
        test, share = Welch(*[math.nan] * 4), math.nan
        if is_ranked:
            share, p = rank_test(a, b)
            test = test._replace(p=p)
            if share < 0.5:
                first, second, share = second, first, 1 - share
        elif a and b:
            test = welch(a, b)
        if not reasons and math.isnan(test.p):
            reasons.append(f"no spread of {measure}")
        if reasons:
            test = Welch(test.difference, *[math.nan] * 3)
        ratios = time_ratio(first, second, step_seconds), time_ratio(first, second, target_seconds)
        words = "not comparable: " + "; ".join(reasons)
        interval = test.low, test.high
        pairs.append(Pair(first, second, measure, test.difference, interval, share, test.p, math.nan, *ratios, words))
        spreads.append(math.nan if reasons or is_ranked else math.sqrt((np.var(a, ddof=1) + np.var(b, ddof=1)) / 2))
    for pair, p_holm, spread in zip(pairs, holm([pair.p for pair in pairs]), spreads, strict=True):
        pair.p_holm = p_holm
        if not math.isnan(pair.p):
            pair.verdict = verdict_of(pair, spread)
    return pairs


def losses_at_end(first: Group, second: Group) -> tuple[str, list[float], list[float]]:
    """What is compared within one schedule: name, and values of both groups, at the last step that all runs have."""
    common = [{look.step for look in run.validations} for g in (first, second) for run in g.runs if run.is_done]
    step = max(set.intersection(*common), default=None) if common else None
    if step is None:
        return "loss at a common step", [], []
    return f"loss at step {step}", first.losses(step), second.losses(step)


def arrivals(first: Group, second: Group) -> tuple[str, list[float], list[float]]:
    """The same across schedules: steps to the target, infinite for a run that did not meet it."""
    values = [[hit.step if hit else math.inf for hit in group.crossings()] for group in (first, second)]
    return "steps to target", *values


def verdict_of(pair: Pair, spread: float) -> str:
    """supported or not, for a pair with a p; spread: root of the mean variance, NaN where ranks were compared."""
    is_loss = pair.measure.startswith("loss")
    if pair.p_holm < ALPHA:
        is_second = pair.difference > 0
        front, back = (pair.second, pair.first) if is_second else (pair.first, pair.second)
        return f"supported: {front.label} " + ("is lower" if is_loss else f"arrives before {back.label}")
    runs = min(len(pair.first.runs), len(pair.second.runs))
    # Holm asks of this pair a p below its share of ALPHA.
    alpha = ALPHA * max(pair.p, 1e-300) / pair.p_holm
    n = ranks_needed(alpha) if math.isnan(spread) else runs_needed(pair.difference, spread, alpha)
    if math.isnan(spread):
        return "not supported" + (f": ranks need at least {n} runs a side" if n > runs else "")
    more = n - runs
    return "not supported" + (f": about {more} more run{'s' * (more > 1)} a side" if more > 0 else "")


def step_seconds(run: Run) -> float | None:
    """Timed seconds a step of a finished run."""
    return run.end["train_time_s"] / max(1, run.end["step"]) if run.is_done else None


def target_seconds(run: Run) -> float | None:
    """Timed seconds to the target, None for a run that did not meet it."""
    hit = crossing(run.validations, run.target)
    return hit.time_s if hit else None


def was_resumed(run: Run) -> bool:
    """Whether the run was stopped and went on later, perhaps on another machine: its seconds are no measurement."""
    return bool(run.resumes) or (run.end is not None and run.end.get("segments", 1) > 1)


def time_ratio(first: Group, second: Group, seconds_of: Callable[[Run], float | None]) -> tuple[float, Interval] | None:
    """Ratio of the seconds of two groups, paired by seed.

    None on unlike machines, where a run was resumed or has no such seconds, or with fewer than two pairs.
    """
    runs = [*first.runs, *second.runs]
    if len(first.stacks | second.stacks) > 1 or any(map(was_resumed, runs)) or None in map(seconds_of, runs):
        return None
    seconds = [{run.start["seed"]: seconds_of(run) for run in group.runs} for group in (first, second)]
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
    *("optimizer", "steps", "n", "val loss at the end", "sd", "p below target", "gate", "reached"),
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
        str(group.planned_steps),
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
    if any(len(group.runs) >= MIN_RUNS for group in groups) and pairs:
        rows = [(write(name), *numbers, write(words, LONG)) for name, *numbers, words in map(pair_cells, pairs)]
        text += markdown_table(PAIR_HEADER, rows) + "\n\n"
    return text + "\n".join(write(line, LONG) for line in remarks(groups, pairs)) + "\n"


def remarks(groups: Sequence[Group], pairs: Sequence[Pair]) -> list[str]:
    """The sentences below the tables."""
    lines = leaders(groups)
    lengths = sorted({group.planned_steps for group in groups})
    if len(lengths) > 1:
        lines.append(
            f"Schedules of {', '.join(map(str, lengths))} steps, each cooled down at its own end: losses compare "
            "within one alone, across them steps and seconds to the target. With another length a run may arrive "
            "earlier or later."
        )
    few = min(len(group.runs) for group in groups)
    if few < MIN_RUNS:
        lines.append(f"n = {few} is a lead, not evidence: add seeds, as in --seeds 0 1 2 3 4.")
    lines += [f"{group.label}: {flaw}." for group in groups for flaw in group.flaws() if "no test with" not in flaw]
    gaps = {group.label: seed_gaps(group.seeds) for group in groups}
    lines += [f"{label}: no seed {', '.join(map(str, gap))}; was it left out?" for label, gap in gaps.items() if gap]
    if len(set.union(*(group.code() for group in groups))) > 1:
        lines.append("Not all runs were made by the same code; the tests take it that this does not matter.")
    wide = [group.label for group in groups if sd_test(group.losses(group.last_step)) < ALPHA]
    if wide and few >= MIN_RUNS:
        lines.append(
            f"Seeds of {', '.join(wide)} differ more than the {GATE_SIGMA} that the gate assumes: go by the t-test."
        )
    if len(set.union(*(group.stacks for group in groups))) > 1:
        lines.append("Times are not comparable: the runs come from more than one machine or stack.")
    resumed = [f"{group.label} seed {run.start['seed']}" for group in groups for run in group.runs if was_resumed(run)]
    if resumed:
        lines.append(f"Stopped and resumed, so that their seconds are not comparable: {', '.join(resumed)}.")
    if any(pair.step_ratio or pair.target_ratio for pair in pairs):
        lines.append(
            "A ratio of times is real where its interval leaves out 1; the intervals are of each pair alone, paired "
            "by seed."
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
