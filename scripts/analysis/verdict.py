"""Who won, and is it real: groups of runs, and the test of every pair of them with its verdict in words.

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
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from aurora.trainer.identity import shards_of
from aurora.trainer.record import Run, Validation
from scripts.analysis.statistics import (
    Crossing,
    Interval,
    Reached,
    Welch,
    crossing,
    flaws,
    holm,
    holm_levels,
    rank_test,
    ranks_needed,
    ratio_interval,
    reached,
    runs_needed,
    welch,
)

ALPHA = 0.05
# Settings that other optimizers have not, and that no name tells: always in the label where they are on.
TOLD = ("hyperball", "cautious_decay", "update_floor", "projection_init")
MOST_GROUPS = 12  # of which all pairs are tested: 66, which a reader can still take in


@dataclass
class Group:
    """Runs of one task, optimizer and setting.

    label: the optimizer, and what tells the group from others of this optimizer in the same table.
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
    def surroundings(self) -> set[tuple]:
        """Machine, software and folder; times compare within one only, since a machine is not as fast every day."""
        return {(*stack_of(run), run.path.parent) for run in self.runs}

    @property
    def planned_steps(self) -> int:
        return self.runs[0].setting["steps"]

    @property
    def last_step(self) -> int:
        """The last step at which every finished run was validated, 0 if there is none."""
        steps = [{validation.step for validation in run.validations} for run in self.runs if run.is_done]
        return max(set.intersection(*steps), default=0) if steps else 0

    def losses(self, step: int) -> list[float]:
        """The finite losses at a step, of finished runs, by seed."""
        found = [
            validation.val_loss
            for run in self.runs
            if run.is_done
            for validation in run.validations
            if validation.step == step
        ]
        return [loss for loss in found if math.isfinite(loss)]

    def crossings(self) -> list[Crossing | None]:
        return [crossing(run.validations, run.target) for run in self.runs]

    @property
    def is_coarse(self) -> bool:
        """Whether validations were too far apart to say when a run met the target."""
        return any(hit and hit.is_coarse for hit in self.crossings())

    def steps_to_target(self) -> Reached:
        return self._to_target(lambda hit: hit.step, lambda validation: validation.step)

    def seconds_to_target(self) -> Reached:
        return self._to_target(lambda hit: hit.time_s, lambda validation: validation.train_time_s)

    def _to_target(self, value_at_hit: Callable[[Crossing], float], value_at: Callable[[Validation], float]) -> Reached:
        hits = self.crossings()
        values = [{validation.step: value_at(validation) for validation in run.validations} for run in self.runs]
        caps = [max(by_step.values(), default=0) for by_step in values]
        found = reached([hit and value_at_hit(hit) for hit in hits], caps)
        if not self.is_coarse:
            return found
        ends = [
            [by_step.get(step, 0) for step in hit.bracket] for hit, by_step in zip(hits, values, strict=True) if hit
        ]
        bracket = min(low for low, _ in ends), max(high for _, high in ends)
        nothing = Interval(math.nan, math.nan, "validations too far apart")
        return Reached(found.count, found.runs, math.nan, math.nan, math.nan, nothing, bracket)

    def flaws(self) -> list[str]:
        """What forbids tests, in words."""
        # Untrained all are alike.
        losses = [[validation.val_loss for validation in run.validations if validation.step > 0] for run in self.runs]
        found = flaws(self.seeds, losses)
        found += twins(self.runs)
        lost = [f"seed {run.start['seed']} ({status_of(run)})" for run in self.runs if not run.is_done]
        if lost:
            found.append(f"without a final loss: {', '.join(lost)}")
        schedules = {tuple(validation.step for validation in run.validations) for run in self.runs if run.is_done}
        if len(schedules) > 1:
            found.append("not validated at the same steps")
        return found

    def edits(self) -> list[str]:
        """In what the runs' model is another than the track's, in words."""
        return sorted({edit for run in self.runs for edit in run.start.get("model_edits", [])})


class CurvePoint(NamedTuple):
    """The losses of all runs of a group at one step: mean and range; seconds: the mean time of the step."""

    step: int
    seconds: float
    low: float
    mean: float
    high: float


def mean_curve(group: Group) -> list[CurvePoint]:
    """A point for each step at which every run of the group was validated."""
    by_step = [{validation.step: validation for validation in run.validations} for run in group.runs]
    points = []
    for step in sorted(set.intersection(*map(set, by_step))):
        losses = [validations[step].val_loss for validations in by_step]
        seconds = statistics.mean(validations[step].train_time_s for validations in by_step)
        points.append(CurvePoint(step, seconds, min(losses), statistics.mean(losses), max(losses)))
    return points


def twins(runs: Iterable[Run]) -> list[str]:
    """Runs of other seeds with the weights or the training losses of another one, in words: no training gives them."""
    seeds: dict[tuple, set[int]] = {}
    for run in runs:
        weights = run.end.get("weights_sha256") if run.end else None
        losses = [event["train_loss"] for event in run.train_events[-3:] if event.get("train_loss", 0) > 0]
        for key in (("weights", weights), ("training losses", *losses)):
            if key[-1] and (key[0] == "weights" or len(losses) == 3):
                seeds.setdefault(key, set()).add(run.start["seed"])
    return [f"equal {key[0]} of seeds {', '.join(map(str, sorted(of)))}" for key, of in seeds.items() if len(of) > 1]


def has_mixed_code(groups: Iterable[Group]) -> bool:
    """Whether a file is not the same in all runs that had imported it. Each rule imports files of its own."""
    texts: dict[str, str] = {}
    for run in (run for group in groups for run in group.runs):
        for name, text in run.start["sources"].items():
            if name.endswith(".py") and texts.setdefault(name, text) != text:
                return True
    return False


STACK_KEYS = ("device_name", "cpu", "cpu_count", "usable_cpus", "torch", "torch_threads", "cuda", "cudnn")


def stack_of(run: Run) -> tuple:
    """What times depend on besides the code: kind and number of devices, cores and threads, versions, kernels.

    SPEEDRUN_JOBS: so many runs shared the machine.
    """
    start, env = run.start, run.start["env"]
    chosen = map(start.get, ("compiled", "forward", "attention", "micro_batch"))
    values = [start["world_size"], *chosen, start.get("kernels", "torch"), *map(env.get, STACK_KEYS)]
    if isinstance(variables := env.get("variables"), dict):
        values.append(variables.get("SPEEDRUN_JOBS"))
    return tuple(map(str, values))


def status_of(run: Run) -> str:
    return run.end["status"] if run.end else "cut short"


def group_runs(runs: Iterable[Run]) -> dict[str, list[Group]]:
    """Groups by task_hash, in their order of arrival at the target.

    An attempt that was interrupted or cut short is left out once the same seed has finished: it was no second try.
    """
    tasks: dict[str, list[Group]] = {}
    for task, runs_of_task in by_task(runs).items():
        by_setting: dict[tuple[str, str], list[Run]] = {}
        for run in runs_of_task:
            key = run.start["optimizer"], json.dumps(run.setting, sort_keys=True)
            by_setting.setdefault(key, []).append(run)
        tasks[task] = label_groups(by_setting.values())
    return tasks


def by_task(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs that may be compared, by task_hash. That knows the first train shard alone, for it must not depend on the
    number of shards that a run needs: runs that differ in a further one, which both have read, are of other tasks.
    """
    found: dict[str, dict[tuple[str, ...], list[Run]]] = {}
    for run in runs:
        found.setdefault(run.start["task_hash"], {}).setdefault(tuple(shards_of(run.start)), []).append(run)
    tasks: dict[str, list[Run]] = {}
    for task_hash, by_shards in found.items():
        streams: list[tuple[str, ...]] = []
        for shards in sorted(by_shards, key=len, reverse=True):
            place = next((i for i, stream in enumerate(streams) if stream[: len(shards)] == shards), len(streams))
            streams += [shards] * (place == len(streams))
            tasks.setdefault(f"{place + 1}-{task_hash}" if place else task_hash, []).extend(by_shards[shards])
    return tasks


def label_groups(runs_of_groups: Iterable[Sequence[Run]]) -> list[Group]:
    """The groups of one table in their order of arrival, each with a label that tells it from the others."""
    groups = [Group("", without_repeated_attempts(runs)) for runs in runs_of_groups]
    by_optimizer: dict[str, list[Group]] = {}
    for group in groups:
        by_optimizer.setdefault(group.optimizer, []).append(group)
    for optimizer, alike in by_optimizer.items():
        settings = [group.runs[0].setting for group in alike]
        differing = differing_keys(settings)
        for group, setting in zip(alike, settings, strict=True):
            told = [keys for keys in differing if keys[0] in setting]
            told += [[key] for key in TOLD if setting.get(key) and not any(key in keys for keys in differing)]
            group.label = " ".join([optimizer, *(f"{'='.join(keys)}={setting[keys[0]]}" for keys in told)])
    return sorted(groups, key=order_of_arrival)


def differing_keys(settings: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The keys in which settings differ; such as always have equal values together."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for key in sorted({key for setting in settings for key in setting}):
        alike.setdefault(tuple(repr(setting.get(key)) for setting in settings), []).append(key)
    return [keys for values, keys in alike.items() if len(set(values)) > 1]


def mean_loss(group: Group) -> float:
    """At the last step that all finished runs have; infinite if none finished."""
    losses = group.losses(group.last_step)
    return float(np.mean(losses)) if losses else math.inf


def order_of_arrival(group: Group) -> tuple:
    """Sorts groups: first those known to have met the target, by their mean steps, then the others by mean loss."""
    found = group.steps_to_target()
    is_whole = found.count == found.runs and not group.is_coarse
    return not is_whole, found.restricted_mean if is_whole else mean_loss(group), group.label


def without_repeated_attempts(runs: Sequence[Run]) -> list[Run]:
    """Each seed's runs, without those that tell nothing new: attempts that another one made good, and exact repeats."""
    finished = {run.start["seed"] for run in runs if run.is_done}
    ended = [run for run in runs if status_of(run) in ("done", "diverged")]
    others = [run for run in runs if status_of(run) not in ("done", "diverged")]
    # The same command gives the same losses again.
    losses = [tuple(validation.val_loss for validation in run.validations) for run in ended]
    settled = list({(run.start["seed"], key): run for run, key in zip(ended[::-1], losses[::-1], strict=True)}.values())
    # Of a seed that never finished the newest attempt stands for all.
    open_runs = {run.start["seed"]: run for run in others if run.start["seed"] not in finished}
    return sorted([*settled, *open_runs.values()], key=lambda run: (run.start["seed"], run.path.name))


# ----------------------------------------------------------------------------------------------------------------------
# Pairs


@dataclass
class Pair:
    """Two groups, the one that is in front first.

    measure: what is compared, "loss at step 200" or "steps to target". difference: of its means, first - second; where
    runs did not arrive there is none, but the share of pairs of runs in which that of the first arrives earlier.
    spread: root of the mean variance of the two, NaN where ranks were compared. p_holm: NaN until corrected.
    step_ratio, target_ratio: seconds a step, and seconds to the target, first / second, paired by seed; None where they
    do not compare.
    """

    first: Group
    second: Group
    measure: str
    difference: float
    interval: tuple[float, float]
    share: float
    spread: float
    p: float
    p_holm: float
    step_ratio: tuple[float, Interval] | None
    target_ratio: tuple[float, Interval] | None
    verdict: str

    @property
    def front(self) -> Group:
        """The one with the lower losses, or whose runs arrive earlier."""
        return self.second if self.difference > 0 else self.first

    @property
    def back(self) -> Group:
        return self.first if self.difference > 0 else self.second


def compare_pairs(groups: Sequence[Group]) -> list[Pair]:
    """Every pair of groups of one task, with Holm's correction over all pairs that can be tested.

    Of more than MOST_GROUPS, in their order of arrival, the first against each of the others alone. Since the runs
    chose which is first, p is then corrected as for all pairs.
    """
    are_all = len(groups) <= MOST_GROUPS
    chosen = itertools.combinations(groups, 2) if are_all else ((groups[0], other) for other in groups[1:])
    pairs = [compare(one, other) for one, other in chosen]
    p_values, untold = [pair.p for pair in pairs], math.comb(len(groups), 2) - len(pairs)
    for pair, p_holm, level in zip(pairs, holm(p_values, untold), holm_levels(p_values, ALPHA, untold), strict=True):
        pair.p_holm = p_holm
        if not math.isnan(pair.p):
            pair.verdict = verdict_of(pair, level)
    return pairs


def compare(one: Group, other: Group) -> Pair:
    """The test of two groups, or what forbids it."""
    is_same_schedule = one.planned_steps == other.planned_steps
    first, second = sorted((one, other), key=mean_loss if is_same_schedule else order_of_arrival)
    measure, a, b = losses_at_end(first, second) if is_same_schedule else arrivals(first, second)
    reasons = [f"{group.label}: {flaw}" for group in (first, second) for flaw in group.flaws()]
    if not a or not b:
        reasons.append(f"no {measure}")
    elif not np.isfinite([*a, *b]).any():
        reasons.append("no run of either met the target")
    elif not is_same_schedule and (coarse := [group.label for group in (first, second) if group.is_coarse]):
        reasons.append(f"validations of {', '.join(coarse)} too far apart around the target")
        a, b = [], []
    is_ranked = not np.isfinite([*a, *b]).all()
    test, share, spread = Welch(*[math.nan] * 4), math.nan, math.nan
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
    elif not is_ranked:
        spread = math.sqrt((np.var(a, ddof=1) + np.var(b, ddof=1)) / 2)
    ratios = time_ratio(first, second, step_seconds), time_ratio(first, second, target_seconds)
    words = "not comparable: " + "; ".join(reasons)
    interval = test.low, test.high
    return Pair(first, second, measure, test.difference, interval, share, spread, test.p, math.nan, *ratios, words)


def losses_at_end(first: Group, second: Group) -> tuple[str, list[float], list[float]]:
    """What is compared within one schedule: name, and values of both groups, at the last step that all runs have."""
    common = [
        {validation.step for validation in run.validations} for g in (first, second) for run in g.runs if run.is_done
    ]
    step = max(set.intersection(*common), default=None) if common else None
    if step is None:
        return "loss at a common step", [], []
    return f"loss at step {step}", first.losses(step), second.losses(step)


def arrivals(first: Group, second: Group) -> tuple[str, list[float], list[float]]:
    """The same across schedules: steps to the target, infinite for a run that did not meet it."""
    steps, others = ([hit.step if hit else math.inf for hit in group.crossings()] for group in (first, second))
    return "steps to target", steps, others


def verdict_of(pair: Pair, level: float) -> str:
    """supported or not, for a pair with a p; level: what Holm's procedure asks that p to be below."""
    is_loss = pair.measure.startswith("loss")
    if pair.p_holm < ALPHA:
        words = "is lower" if is_loss else f"arrives before {pair.back.label}"
        return f"supported: {pair.front.label} {words}"
    is_ranked = math.isfinite(pair.share)
    n = ranks_needed(level) if is_ranked else runs_needed(pair.difference, pair.spread, level)
    if n <= min(len(pair.first.runs), len(pair.second.runs)):
        return "not supported"
    # Not so many more: adding runs until a test succeeds makes it succeed.
    return f"not supported: a new comparison would need {'at least' if is_ranked else 'about'} {n} seeds a side"


def step_seconds(run: Run) -> float | None:
    """Timed seconds a step of a finished run."""
    return run.end_event["train_time_s"] / max(1, run.end_event["step"]) if run.is_done else None


def target_seconds(run: Run) -> float | None:
    """Timed seconds to the target, None for a run that did not meet it or has too few validations to tell."""
    hit = crossing(run.validations, run.target)
    return hit.time_s if hit and not hit.is_coarse else None


def was_resumed(run: Run) -> bool:
    """Whether the run was stopped and went on later, perhaps on another machine: its seconds are no measurement."""
    return bool(run.resumes) or (run.end is not None and run.end.get("segments", 1) > 1)


def time_ratio(first: Group, second: Group, seconds_of: Callable[[Run], float | None]) -> tuple[float, Interval] | None:
    """Ratio of the seconds of two groups, paired by seed.

    None on unlike machines or in unlike folders, where a run was resumed or has no such seconds, or with fewer than two
    pairs.
    """
    runs = [*first.runs, *second.runs]
    if (
        len(first.surroundings | second.surroundings) > 1
        or any(map(was_resumed, runs))
        or None in map(seconds_of, runs)
    ):
        return None
    seconds = [
        {run.start["seed"]: value for run in group.runs if (value := seconds_of(run)) is not None}
        for group in (first, second)
    ]
    shared = sorted(set(seconds[0]) & set(seconds[1]))
    if len(shared) < 2:
        return None
    return ratio_interval([seconds[0][seed] for seed in shared], [seconds[1][seed] for seed in shared])
