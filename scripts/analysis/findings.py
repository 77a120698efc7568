"""What our runs say of each published claim: supported, contradicted, undecided or not tested, with figures.

The trial's endpoints are judged as results/TRIAL.md says; other comparisons as in verdict.py: by losses at the end of
equally long schedules, otherwise by steps to the target. Two-sided tests at 5 %.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from aurora.trainer.record import Run
from scripts.analysis.evidence import Evidence, gains
from scripts.analysis.statistics import MIN_RUNS, Interval, mean_of, ratio_interval
from scripts.analysis.trial import ALPHA, Paired, judged, persistent_share
from scripts.analysis.verdict import Group, Pair, compare, step_seconds, time_ratio

NAMES = {
    "adamw": "AdamW",
    "muon": "Muon",
    "muon_scaled": "Muon with sqrt(M/N)",
    "unormuon": "U-NorMuon",
    "aurora": "Aurora",
    "aurora_tall": "Aurora, tall alone",
    "aurora_both": "Aurora, tall and wide",
}
EVEN = ("unormuon", "aurora_tall", "aurora_both")  # the arms that even rows out
COST_CLAIM, QUARTER, DEAD_STEP = 1.06, 25.0, 500


class Finding(NamedTuple):
    """verdict: a few words; figure: the one of the summary; lines: sentences with what was measured."""

    verdict: str
    figure: str
    lines: list[str]


def not_tested(why: str, lines: Sequence[str] = ()) -> Finding:
    return Finding(why if why.startswith(("under way", "diverged")) else "not tested", "-", list(lines) or [why])


NO_RUNS = "No run of the trial is recorded here yet."


def interval(mean: float, low: float, high: float, digits: int, unit: str = "", sign: str = "+") -> str:
    """A figure and its interval, where there is one."""
    text = f"{mean:{sign}.{digits}f}{unit}"
    return text if math.isnan(low) else f"{text} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def mean_in(unit: str, values: Sequence[float], digits: int, sign: str = "") -> str:
    mean, (low, high, _) = mean_of(values)
    return interval(mean, low, high, digits, unit, sign)


def agreed(words: Sequence[str]) -> str:
    """One verdict where all are alike, otherwise mixed."""
    return words[0] if len(set(words)) == 1 else "mixed"


# ----------------------------------------------------------------------------------------------------------------------
# Who is better


def muon_beats_adamw(found: Evidence) -> Finding:
    return on_tracks(found, "muon", "adamw")


def on_tracks(found: Evidence, name: str, other: str) -> Finding:
    """Steps to the target on every track that has both."""
    words, figures, lines = [], [], []
    for folder, groups in found.tracks.items():
        if not {name, other} <= groups.keys():
            continue
        pair = compare(groups[name], groups[other])
        if math.isnan(pair.p):
            lines.append(f"[{folder}]({page_of(folder)}): {pair.verdict}.")
            continue
        words.append("undecided" if pair.p >= ALPHA else "supported" if pair.front.label == name else "contradicted")
        figures.append(figure_of(pair, name))
        ratio = time_ratio(groups[name], groups[other], step_seconds)
        per_step = f"; a step takes {times(*ratio)} of its time" if ratio else ""
        lines.append(
            f"[{folder}]({page_of(folder)}), {len(groups[name].runs)} and {len(groups[other].runs)} seeds, loss "
            f"{groups[name].runs[0].target:g}: {NAMES[name]} minus {NAMES[other]} {figures[-1]} (p = {pair.p:.1g})"
            f"{per_step}."
        )
    return Finding(agreed(words), figures[0], lines) if words else not_tested("No track has runs of both.")


def page_of(folder: str) -> str:
    return f"{folder.partition('/')[0]}/README.md"


def figure_of(pair: Pair, name: str) -> str:
    """This optimizer's mean minus the other's; where runs did not arrive, how often it is earlier."""
    is_turned = pair.first.label != name
    if math.isfinite(pair.share):
        return f"earlier in {1 - pair.share if is_turned else pair.share:.0%} of pairs of runs"
    low, high = (-pair.interval[1], -pair.interval[0]) if is_turned else pair.interval
    difference = -pair.difference if is_turned else pair.difference
    digits, unit = (4, " nats") if pair.measure.startswith("loss") else (1, " steps")
    return interval(difference, low, high, digits, unit)


def unormuon_beats_muon(found: Evidence) -> Finding:
    """One of the trial's comparisons afterwards; older runs are told, and do not count."""
    return by_loss(found, "afterwards", [("unormuon", "muon")], ("unormuon", "muon"))


def aurora_beats_unormuon(found: Evidence) -> Finding:
    """The trial's primary endpoint; older runs are told, and do not count."""
    return by_loss(found, "loss", found.trial.design["loss"], ("aurora", "unormuon"))


def by_loss(found: Evidence, table: str, chosen: Sequence[Sequence[str]], names: tuple[str, str]) -> Finding:
    """Some of the pairs of one of the trial's tables, all of which Holm's correction takes."""
    trial, pairs = found.trial, [tuple(pair) for pair in found.trial.design[table]]
    differences = trial.loss_differences(pairs)
    words = judged(differences, trial.design["margin"])
    places = [pairs.index(tuple(pair)) for pair in chosen]
    older = [line for folder, (groups, but) in found.older.items() for line in older_line(folder, groups, names, but)]
    if not any(differences[i].n for i in places):
        return not_tested(NO_RUNS, [NO_RUNS, *older])
    lines = [
        f"Trial, {differences[i].n} seeds: {NAMES[pairs[i][0]]} minus {NAMES[pairs[i][1]]} {nats(differences[i])}"
        + (
            f", effect {differences[i].effect:+.2f} (p = {words[i][0]:.2g}, Holm over {len(pairs)})"
            if words[i][0] <= 1
            else ""
        )
        + f": {words[i][1]}."
        for i in places
    ]
    verdicts = [word_of(words[i][1]) for i in places]
    if len(set(verdicts)) > 1:
        verdicts = ["; ".join(f"{NAMES[pairs[i][0]]}: {v}" for i, v in zip(places, verdicts, strict=True))]
    figures = [
        nats(differences[i]) if len(places) == 1 else f"{NAMES[pairs[i][0]]}: {nats(differences[i])}" for i in places
    ]
    return Finding(verdicts[0], "; ".join(figures), [*lines, *older])


def older_line(folder: str, groups: dict[str, Group], names: tuple[str, str], but: str) -> list[str]:
    """What runs older than the trial say, and what was unequal in them."""
    if not groups.keys() >= set(names):
        return []
    pair = compare(groups[names[0]], groups[names[1]])
    figure = pair.verdict if math.isnan(pair.p) else f"{figure_of(pair, names[0])} (p = {pair.p:.1g})"
    where = f"[{folder}]({page_of(folder)}), {len(groups[names[0]].runs)} seeds"
    return [f"Older, {where}: {NAMES[names[0]]} minus {NAMES[names[1]]} {figure}. {but}"]


def word_of(word: str) -> str:
    return {"better": "supported", "worse": "contradicted"}.get(word, word)


def nats(difference: Paired) -> str:
    return interval(difference.mean, difference.low, difference.high, 4, " nats")


def lr_range(found: Evidence) -> Finding:
    """Losses at half and twice the tuned lr: described, as TRIAL.md names no test for them."""
    trial, rows, shown = found.trial, [], []
    for arm in trial.design["robust"]:
        changes = {factor: trial.change(arm, factor) for factor in (0.5, 2.0)}
        figures = [f"{told(change)} at {factor:g} times the lr" for factor, change in changes.items()]
        rows.append(f"{NAMES[arm]}: " + ", ".join(figures) + ".")
        if changes[2.0].n:
            shown.append(f"{NAMES[arm]} {changes[2.0].mean:+.4f}")
    if not shown:
        return not_tested(NO_RUNS)
    return Finding("described", f"nats at twice the lr: {', '.join(shown)}", rows)


def told(difference: Paired) -> str:
    """The figure, and its flaw."""
    figure = nats(difference) if difference.n else "-"
    return f"{figure} ({difference.flaw})" if difference.flaw else figure


# ----------------------------------------------------------------------------------------------------------------------
# Rows without leverage. Shares in per cent.


def rows_lose_leverage(found: Evidence) -> Finding:
    """The trial's endpoint of mechanism: the share must be lower for all three arms that even rows out."""
    trial, pairs = found.trial, found.trial.design["leverage"]
    differences = trial.share_differences(pairs)
    if not any(difference.n for difference in differences):
        return not_tested(NO_RUNS)
    shares = {arm: list(values.values()) for arm in trial.plan if (values := trial.shares(arm))}
    lines = [f"{NAMES[arm]}: {mean_in(' %', values, 2)} of rows." for arm, values in shares.items()]
    words = []
    for (a, b), difference, (p, word) in zip(pairs, differences, judged(differences, 0.0), strict=True):
        if b in EVEN:
            words.append({"better": "contradicted", "worse": "supported"}.get(word, word))
        figure = interval(difference.mean, difference.low, difference.high, 2, " points")
        test = f", effect {difference.effect:+.2f} (p = {p:.2g}, Holm over {len(pairs)})" if p <= 1 else f" ({word})"
        lines.append(f"{NAMES[a]} minus {NAMES[b]}, {difference.n} seeds: {figure}{test}.")
    verdict = "contradicted" if "contradicted" in words else agreed(words)
    figure = ", ".join(f"{NAMES[arm]} {np.mean(values):.2f} %" for arm, values in shares.items())
    return Finding(verdict, figure, lines)


def quarter_dies(found: Evidence) -> Finding:
    """Rows of low leverage in the layers at half of the depth, at the end of the trial and of longer runs."""
    trial, lines = found.trial, []
    if runs := [run for run in trial.at("muon").values() if run.is_done]:
        values, step = middle_layers(runs, trial.design["first_look"]), runs[0].end_event["step"]
        lines.append(f"Trial, {len(runs)} seeds, Muon, at step {step}: {mean_in(' %', values, 1)}.")
    long = {name: [run for run in group.runs if run.is_done] for name, group in found.long.items()}
    long = {name: runs for name, runs in long.items() if runs and runs[0].end_event["step"] >= DEAD_STEP}
    for name, runs in long.items():
        lines.append(
            f"[{found.long_folder}]({page_of(found.long_folder)}), {len(runs)} seeds, {NAMES[name]}, low at every look "
            f"from step {DEAD_STEP // 2} to {runs[0].end_event['step']}: "
            f"{mean_in(' %', middle_layers(runs, DEAD_STEP // 2), 1)}."
        )
    if "muon" not in long:
        return not_tested(
            "No runs of 500 steps.", [*lines, f"No runs of {DEAD_STEP} steps with such telemetry are recorded."]
        )
    values = middle_layers(long["muon"], DEAD_STEP // 2)
    _, (low, high, _) = mean_of(values)
    verdict = "supported" if low > QUARTER else "contradicted" if high < QUARTER else "undecided"
    return Finding(verdict, f"Muon {mean_in(' %', values, 1)}", lines)


def middle_layers(runs: Sequence[Run], first_step: int) -> list[float]:
    """Of each run, the share of persistently low rows in the two layers in the middle (of an odd number, one)."""
    depth = len(runs[0].neuron_events[-1]["layers"])
    middle = range((depth - 1) // 2, depth // 2 + 1)
    return [100 * float(np.mean([persistent_share(run, first_step, i) for i in middle])) for run in runs]


# ----------------------------------------------------------------------------------------------------------------------
# Cost and width


def cost(found: Evidence) -> Finding:
    """Seconds of whole steps of runs, and milliseconds of the optimizer's step alone, to Muon's."""
    lines: list[str] = []
    by_variant: dict[str, list[tuple[float, Interval]]] = {"folded": [], "iterated": []}
    for folder, groups in found.tracks.items():
        if {"aurora", "muon"} <= groups.keys() and (
            ratio := time_ratio(groups["aurora"], groups["muon"], step_seconds)
        ):
            variant = groups["aurora"].runs[0].start["hparams"].get("variant", "folded")
            by_variant[variant].append(ratio)
            where = f"[{folder}]({page_of(folder)}), {len(groups['muon'].runs)} seeds"
            lines.append(f"Whole steps, variant `{variant}`, {where}: {times(*ratio)}.")
    for name, table in found.costs.items():
        speed = table["speed"]
        for rule in (rule for rule in speed if rule.startswith("aurora ")):
            alone = ratio_interval(speed[rule]["rounds_ms"], speed["muon"]["rounds_ms"])
            lines.append(
                f"Optimizer's step alone, variant `{rule.removeprefix('aurora ')}`, matrices of {table['config']}, "
                f"{table['schedule']}, {table['device']} ([table]({name.replace('.json', '.md')})): {times(*alone)}."
            )
    verdicts = [f"`{v}`: {agreed([*map(cost_word, r)]) if r else 'not tested'}" for v, r in by_variant.items()]
    figures = [f"`{v}` {', '.join(times(*ratio) for ratio in r)}" for v, r in by_variant.items() if r]
    return Finding("; ".join(verdicts), f"whole steps: {'; '.join(figures)}" if figures else "-", lines)


def times(ratio: float, within: Interval) -> str:
    return interval(ratio, within.low, within.high, 3, sign="")


def cost_word(ratio: tuple[float, Interval]) -> str:
    low, high, _ = ratio[1]
    return "supported" if high <= COST_CLAIM else "contradicted" if low > COST_CLAIM else "undecided"


def starved_last(run: Run) -> float:
    """Of up's rows, those that got under a tenth of an even update's energy at the last look, in per cent."""
    event = run.neuron_events[-1]
    ups = [matrix["starved"] for name, matrix in event["matrices"].items() if name.endswith("mlp.up")]
    return 100 * sum(ups) / (event["width"] * len(ups))


def gain_grows_with_width(found: Evidence) -> Finding:
    """Slope of the gain against log2 of the expansion factor, one for each seed, since a seed recurs at each factor."""
    by_width = gains(found.widths, "muon", "aurora")
    seeds = sorted(set.intersection(*map(set, by_width.values()))) if by_width else []
    if len(by_width) < 3 or len(seeds) < MIN_RUNS:
        return not_tested(f"It takes three expansion factors with {MIN_RUNS} seeds at each.")
    factors = [math.log2(e) for e in by_width]
    slopes = [stats.linregress(factors, [by_seed[seed] for by_seed in by_width.values()]).slope for seed in seeds]
    _, (low, high, _) = mean_of(slopes)
    lines = []
    for e, by_seed in by_width.items():
        gain = list(by_seed.values())
        starved = mean_in(" %", [starved_last(run) for run in found.widths[e]["muon"].runs if run.neuron_events], 1)
        lines.append(
            f"Expansion factor {e}, {len(gain)} seeds: Muon minus Aurora {mean_in(' nats', gain, 4, sign='+')}. At the "
            f"end {starved} of Muon's rows of up get under a tenth of an even share of the update's energy."
        )
    figure = mean_in(" nats", slopes, 4, sign="+")
    folder = found.expansion_folder
    lines.append(f"Slope for each doubling, [{folder}]({page_of(folder)}), {len(seeds)} seeds: {figure}.")
    verdict = "supported" if low > 0 else "contradicted" if high < 0 else "undecided"
    return Finding(verdict, f"{figure} a doubling", lines)


MEASURES = {
    measure.__name__: measure
    for measure in (
        muon_beats_adamw,
        rows_lose_leverage,
        quarter_dies,
        unormuon_beats_muon,
        aurora_beats_unormuon,
        lr_range,
        cost,
        gain_grows_with_width,
    )
}
