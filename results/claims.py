"""Does a stated result (steps, mean loss, n) follow from the logs it cites? The same statistics as for our own runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

import numpy as np

from results.foreign import Trial
from results.statistics import MIN_RUNS, gate, sd_test, t_below, welch


@dataclass(frozen=True)
class Claim:
    """mean as a decimal text, since its number of digits says how well it must agree."""

    steps: int
    mean: str
    runs: int


@dataclass
class Finding:
    """What the logs say of a claim; reasons, in words, why it does not follow (none: it does), and remarks."""

    trials: list[Trial]
    losses: list[float]
    mean: float
    sd: float
    margin: float
    p: float
    sd_p: float
    reasons: list[str]
    remarks: list[str]

    @property
    def counts(self) -> dict[str, int]:
        return {status: sum(t.status == status for t in self.trials) for status in ("complete", "torn", "diverged")}


def losses_at(trials: Sequence[Trial], step: int, metric: str) -> list[float]:
    return [trial.losses(metric)[step] for trial in trials if step in trial.losses(metric)]


def rounds_to(value: float, text: str) -> bool:
    """Whether value, rounded to the digits of text, is text; half a digit's tie counts as either."""
    digits = -Decimal(text).as_tuple().exponent
    return math.isfinite(value) and abs(value - float(text)) <= 0.5 * 10**-digits + 1e-9


def check_claim(trials: list[Trial], claim: Claim, target: float, metric: str = "val_loss") -> Finding:
    """Compare a claim with the trials. Runs that diverged or end early are named, never silently left out."""
    step, reasons, remarks = claim.steps, [], []
    at_step = losses_at(trials, step, metric)
    losses = [loss for loss in at_step if math.isfinite(loss)]
    mean = float(np.mean(losses)) if losses else math.nan
    if len(trials) != claim.runs:
        reasons.append(f"{claim.runs} runs are claimed, the logs hold {len(trials)}")
    if len(at_step) < len(trials):
        nearest = nearest_step(trials, step, metric)
        hint = f" (nearest that all state: {nearest})" if nearest is not None else ""
        reasons.append(f"{len(trials) - len(at_step)} of {len(trials)} runs state no {metric} at step {step}{hint}")
    if len(losses) < len(at_step):
        reasons.append(f"{len(at_step) - len(losses)} of {len(at_step)} runs have no finite {metric} at step {step}")
    if losses and not rounds_to(mean, claim.mean):
        digits = -Decimal(claim.mean).as_tuple().exponent
        reasons.append(
            f"the mean {metric} at step {step} is {mean:.{digits + 2}f}, not {claim.mean}"
            + matching_text(trials, claim, metric)
        )
    passed = gate(losses, target)
    if losses and passed.margin < passed.threshold:
        reasons.append(f"the gate is not passed: {passed.margin:.5f} < {passed.threshold}")
    if losses and len(losses) < MIN_RUNS:
        reasons.append(f"{len(losses)} run{'s' * (len(losses) > 1)} cannot support a claim, at least {MIN_RUNS} needed")
    p = t_below(losses, target)
    if p >= 0.01:
        remarks.append(f"the t-test with the runs' own sd gives p = {p:.2g}, not below 0.01")
    sd_p = sd_test(losses)
    if sd_p < 0.01:
        remarks.append(f"sd between runs is above the 0.0013 that the gate assumes (p = {sd_p:.2g})")
    sequences = [tuple(sorted(trial.losses(metric).items())) for trial in trials]
    duplicates = sum(looks in sequences[:i] for i, looks in enumerate(sequences) if len(looks) > 1)
    if duplicates:
        reasons.append(f"{duplicates} runs repeat the losses of another: copies, or one seed run twice")
    ends = sorted({trial.last_step for trial in trials})
    if len(ends) > 1:
        remarks.append(f"runs end at different steps: {', '.join(map(str, ends))}")
    for status in ("torn", "diverged"):
        names = [f"{trial.path.name} trial {trial.number}" for trial in trials if trial.status == status]
        if names:
            remarks.append(f"{status}: {', '.join(names)}")
    sd = float(np.std(losses, ddof=1)) if len(losses) > 1 else math.nan
    return Finding(trials, losses, mean, sd, passed.margin, p, sd_p, reasons, remarks)


def nearest_step(trials: Sequence[Trial], step: int, metric: str) -> int | None:
    common = set.intersection(*(set(trial.losses(metric)) for trial in trials)) if trials else set()
    return min(common, key=lambda other: (abs(other - step), other), default=None)


def matching_text(trials: Sequence[Trial], claim: Claim, metric: str) -> str:
    """Where else the claimed mean is found: another metric at the step, else another step."""
    for other in sorted({name for trial in trials for name in trial.metrics} - {metric}):
        losses = losses_at(trials, claim.steps, other)
        if losses and rounds_to(float(np.mean(losses)), claim.mean):
            return f"; the claim is {other}"
    for step in sorted(set.intersection(*(set(trial.losses(metric)) for trial in trials))):
        if rounds_to(float(np.mean(losses_at(trials, step, metric))), claim.mean):
            return f"; that is the mean at step {step}"
    return ""


def compare_logs(a: list[Trial], b: list[Trial], step: int | None, metric: str) -> str:
    """Welch's test on the loss at a step that all runs of both sides state: by default the last such."""
    steps = set.intersection(*(set(trial.losses(metric)) for trial in a + b))
    step = max(steps, default=None) if step is None else step
    if step is None or step not in steps:
        return f"not comparable: not every run states {metric} at {'a common step' if step is None else f'step {step}'}"
    sides = [losses_at(side, step, metric) for side in (a, b)]
    if not all(math.isfinite(loss) for side in sides for loss in side):
        return f"not comparable: a run's {metric} at step {step} is not finite"
    test = welch(*sides)
    means = ", ".join(f"{np.mean(side):.5f} (n={len(side)})" for side in sides)
    if math.isnan(test.p):
        return f"{metric} at step {step}: {means}; no test with fewer than {MIN_RUNS} runs a side"
    return (
        f"{metric} at step {step}: {means}; difference {test.difference:+.5f} "
        f"[{test.low:+.5f}, {test.high:+.5f}], Welch p = {test.p:.2g}"
    )
