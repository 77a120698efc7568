"""Whether another's result comes out again with seeds of one's own."""

import json
from collections.abc import Sequence

from results.record import Run
from results.statistics import MIN_RUNS, welch

# A claim falls when one's own losses are higher with a two-sided p below this.
ALPHA = 0.01


def reproduce(claimed: Sequence[Run], own: Sequence[Run]) -> tuple[str, str]:
    """(word, reason) with word reproduced, refuted or "not comparable", from losses at the end by Welch's test.

    Both sides must be finished runs of one task and setting, with other seeds, at least MIN_RUNS each. With few runs a
    small exaggeration is reproduced too: the interval in the reason says how large it could be.
    """
    settings = {(run.start["task_hash"], json.dumps(run.setting, sort_keys=True)) for run in (*claimed, *own)}
    if len(settings) != 1:
        return "not comparable", "the runs are not all of one task and setting"
    if shared := {run.start["seed"] for run in claimed} & {run.start["seed"] for run in own}:
        return "not comparable", f"seeds {', '.join(map(str, sorted(shared)))} are on both sides; use others"
    if not all(run.is_done for run in (*claimed, *own)) or min(len(claimed), len(own)) < MIN_RUNS:
        return "not comparable", f"it takes {MIN_RUNS} finished runs on each side, and none unfinished"
    test = welch([run.end["val_loss"] for run in claimed], [run.end["val_loss"] for run in own])
    words = f"claimed - own = {test.difference:+.5f} [{test.low:+.5f}, {test.high:+.5f}], Welch p = {test.p:.3g}"
    return ("refuted" if test.p < ALPHA and test.difference < 0 else "reproduced"), words
