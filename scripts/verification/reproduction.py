"""Whether another's result comes out again with seeds of one's own."""

import json
import math
from collections.abc import Iterable, Sequence

from aurora.trainer.record import Run
from scripts.analysis.statistics import MIN_RUNS, repeated_seeds, welch
from scripts.analysis.verdict import by_task, twins, without_repeated_attempts

# A claim is contradicted when one's own losses are higher with a two-sided p below this.
ALPHA = 0.01
# Nats by which a claim may exaggerate and still be called reproduced: some 110 steps of the public benchmark's 3,250.
MARGIN = 0.005


def reproduce(claimed: Sequence[Run], own: Sequence[Run]) -> tuple[str, str]:
    """(word, reason), from losses at the end by Welch's test of own - claimed, by how much the claim exaggerates.

    The word is "reproduced" if its 95 % interval ends below MARGIN, "contradicted" if it is above 0 with p < ALPHA,
    "not contradicted" if the runs are too few to tell, and "not comparable" where there is no test: both sides must be
    finished runs of one task and setting, with other seeds, at least MIN_RUNS each.
    """
    claimed, own = without_repeated_attempts(claimed), without_repeated_attempts(own)
    settings = {json.dumps(run.setting, sort_keys=True) for run in (*claimed, *own)}
    if len(settings) != 1 or len(by_task([*claimed, *own])) != 1:
        return "not comparable", "the runs are not all of one task and setting"
    if shared := {*seeds_of(claimed)} & {*seeds_of(own)}:
        return "not comparable", f"seeds {', '.join(map(str, sorted(shared)))} are on both sides; use others"
    if twice := [words for side in (claimed, own) for words in (*repeated_seeds(seeds_of(side)), *twins(side))]:
        return "not comparable", "; ".join(twice)
    if not all(run.is_done for run in (*claimed, *own)) or min(len(claimed), len(own)) < MIN_RUNS:
        return "not comparable", f"it takes {MIN_RUNS} finished runs on each side, and none unfinished"
    test = welch([run.end_event["val_loss"] for run in own], [run.end_event["val_loss"] for run in claimed])
    if math.isnan(test.p):
        return "not comparable", "the losses of each side have no spread"
    reason = f"own - claimed = {test.difference:+.5f} [{test.low:+.5f}, {test.high:+.5f}], Welch p = {test.p:.3g}"
    if test.high < MARGIN:
        return "reproduced", f"{reason}, margin {MARGIN}"
    return ("contradicted" if test.p < ALPHA and test.difference > 0 else "not contradicted"), reason


def seeds_of(runs: Iterable[Run]) -> list[int]:
    return [run.start["seed"] for run in runs]
