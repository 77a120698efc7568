"""The verdict in words for a reader who sees nothing else: who is in front, by how much, and how sure that is."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from scripts.analysis.report import as_p, to_target, with_interval
from scripts.analysis.statistics import MIN_RUNS, Interval
from scripts.analysis.verdict import ALPHA, Group, Pair, order_of_arrival

MOST_RIVALS = 5  # with a sentence of their own


class Headline(NamedTuple):
    title: str
    lines: list[str]


def headline(groups: Sequence[Group], pairs: Sequence[Pair]) -> Headline:
    """Of the groups of one task, in their order of arrival, and of their pairs."""
    leader = groups[0]
    own = [pair for pair in pairs if leader in (pair.first, pair.second)]
    if not own:
        return Headline(alone(leader), few_seeds(groups))
    supported = [pair for pair in own if pair.p_holm < ALPHA]
    beaten = [pair for pair in supported if pair.front is leader]
    lost = [pair for pair in supported if pair.back is leader]
    title = f"{leader.label} {front_words(leader)}"
    if lost:
        title += f", but {lost[0].front.label} has the lower loss at the end"
    elif len(beaten) == len(own):
        title = f"{leader.label} wins: it {front_words(leader)}"
    elif beaten:
        title += f"; its lead over {len(beaten)} of {len(own)} others is supported"
    else:
        title += ", but no test supports it"
    lines = [against(leader, pair) for pair in own[:MOST_RIVALS]]
    if len(own) > MOST_RIVALS:
        lines.append(f"{len(own) - MOST_RIVALS} more pairs are in the table of tests.")
    return Headline(title, [*few_seeds(groups), *lines])


def front_words(group: Group) -> str:
    """In what the first of several groups is in front."""
    if order_of_arrival(group)[0]:  # none is known to have met the target with all of its runs
        return "has the lowest loss at the end"
    return f"is first at the target, after {to_target(group.steps_to_target(), 1)} steps"


def alone(group: Group) -> str:
    found = group.steps_to_target()
    if not found.count:
        return f"{group.label} has not reached the target {group.runs[0].target:g}"
    runs = "" if found.count == found.runs == 1 else f" in {found.count} of {found.runs} runs"
    return f"{group.label} reaches the target {group.runs[0].target:g}{runs}, after {to_target(found, 1)} steps"


def few_seeds(groups: Sequence[Group]) -> list[str]:
    few = min(len(group.runs) for group in groups)
    return (
        [f"A lead, not evidence: a test needs {MIN_RUNS} seeds of each, and one has {few}."] if few < MIN_RUNS else []
    )


def against(leader: Group, pair: Pair) -> str:
    """One pair of the leader's in a sentence, with the numbers of its row in the table of tests."""
    other = pair.second if pair.first is leader else pair.first
    if math.isnan(pair.p):
        return f"Against {other.label}: no test ({pair.verdict.removeprefix('not comparable: ')})."
    if math.isfinite(pair.share):
        words = f"{pair.first.label} is earlier in {pair.share:.0%} of pairs of runs"
    else:
        is_loss = pair.measure.startswith("loss")
        is_ahead = pair.front is leader
        # What the one in front is ahead by, above 0.
        turn = -1 if pair.front is pair.first else 1
        low, high = sorted((turn * pair.interval[0], turn * pair.interval[1]))
        margin = with_interval(turn * pair.difference, Interval(low, high, "Welch"), 4 if is_loss else 1)
        words = f"{pair.measure} {'lower' if is_ahead else 'higher'} by {margin}"
        if not is_loss:
            words = f"{margin} steps {'earlier' if is_ahead else 'later'}"
    text = f"Against {other.label}: {words}, p (Holm) {as_p(pair.p_holm)}, {pair.verdict.partition(':')[0]}"
    if pair.target_ratio:
        ratio = with_interval(*pair.target_ratio, 3)
        text += f". In seconds {pair.first.label} takes {ratio} times as long as {pair.second.label}"
    return f"{text}."
