"""What our runs say of each published claim: supported, contradicted, undecided or not tested, with figures.

The trial's endpoints are judged as results/TRIAL.md says; other comparisons as in verdict.py: by losses at the end of
equally long schedules, otherwise by steps to the target. Two-sided tests at 5 %.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from aurora.trainer.record import Run, read_folder
from scripts.analysis.statistics import CONFIDENCE, MIN_RUNS, Interval, holm, mean_of, ratio_interval
from scripts.analysis.text import cell
from scripts.analysis.trial import ALPHA, Paired, Trial, judged, paired, persistent_share
from scripts.analysis.verdict import Group, Pair, compare, group_runs, step_seconds, time_ratio

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


def not_tested(why: str) -> Finding:
    return Finding("not tested", "-", [why])


class Evidence:
    """The records that findings.toml names."""

    def __init__(self, results: Path, names: dict[str, Any]):
        self.trial = Trial(results, names["trial"])
        self.tracks = {folder: only_groups(results / folder) for folder in names["tracks"]}
        self.widths = widths_of(groups_in(results / names["expansion"]))
        self.long = groups_in(results / names["long"])
        self.costs = {name: json.loads((results / name).read_text(encoding="utf-8")) for name in names["costs"]}
        self.expansion_folder, self.long_folder = names["expansion"], names["long"]


def groups_in(folder: Path) -> dict[str, list[Group]]:
    """Groups by task of the records of a folder.

    Raises:
        ValueError: a file is not a record.
    """
    runs, errors = read_folder(folder) if folder.is_dir() else ([], [])
    if errors:
        raise ValueError(str(errors[0]))
    return group_runs(runs)


def only_groups(folder: Path) -> dict[str, Group]:
    """The group of each optimizer, of a folder that holds one task and one setting of each.

    Raises:
        ValueError: it holds more.
    """
    tasks = groups_in(folder)
    groups = [group for of_task in tasks.values() for group in of_task]
    found = {group.optimizer: group for group in groups}
    if len(tasks) > 1 or len(found) < len(groups):
        raise ValueError(f"{folder} holds {len(tasks)} tasks and {len(groups)} settings of {len(found)} optimizers")
    return found


def interval(mean: float, low: float, high: float, digits: int, unit: str = "", sign: str = "+") -> str:
    """A figure and its interval, where there is one."""
    text = f"{mean:{sign}.{digits}f}{unit}"
    return text if math.isnan(low) else f"{text} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def mean_in(unit: str, values: Sequence[float], digits: int, sign: str = "") -> str:
    mean, (low, high, _) = mean_of(values)
    return interval(mean, low, high, digits, unit, sign)


def agreed(words: Sequence[str]) -> str:
    """One verdict where all are alike, otherwise undecided."""
    return words[0] if len(set(words)) == 1 else "undecided"


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
    pairs = found.trial.design["afterwards"]
    place = [tuple(pair) for pair in pairs].index(("unormuon", "muon"))
    differences = found.trial.loss_differences(pairs)
    p, word = judged(differences, found.trial.design["margin"])[place]
    on_track = on_tracks(found, "unormuon", "muon")
    if not differences[place].n:
        return on_track._replace(lines=["The trial has no pair yet.", *on_track.lines])
    lines = [difference_line("U-NorMuon", "Muon", differences[place], p, word, len(pairs))]
    verdicts = [word_of(word), *([on_track.verdict] if on_track.verdict != "not tested" else [])]
    return Finding(agreed(verdicts), nats(differences[place]), [*lines, *on_track.lines])


def aurora_beats_unormuon(found: Evidence) -> Finding:
    """The trial's primary endpoint."""
    pairs = found.trial.design["loss"]
    differences = found.trial.loss_differences(pairs)
    if not all(difference.n for difference in differences):
        return not_tested("The trial has no pairs yet.")
    verdicts, lines = [], []
    for (a, b), difference, (p, word) in zip(
        pairs, differences, judged(differences, found.trial.design["margin"]), strict=True
    ):
        verdicts.append(word_of(word))
        lines.append(difference_line(NAMES[a], NAMES[b], difference, p, word, len(pairs)))
    same = len(set(verdicts)) == 1
    words = verdicts[0] if same else "; ".join(f"{a}: {v}" for (a, _), v in zip(pairs, verdicts, strict=True))
    figures = "; ".join(f"{cell(a)} {nats(d)}" for (a, _), d in zip(pairs, differences, strict=True))
    return Finding(words.replace("_", " "), figures, lines)


def word_of(word: str) -> str:
    return {"better": "supported", "worse": "contradicted"}.get(word, word)


def nats(difference: Paired) -> str:
    return interval(difference.mean, difference.low, difference.high, 4, " nats")


def difference_line(name: str, other: str, difference: Paired, p: float, word: str, tests: int) -> str:
    return (
        f"Trial, {difference.n} seeds: {name} minus {other} {nats(difference)}, effect {difference.effect:+.2f} "
        f"(p = {p:.2g}, Holm over {tests}): {word}."
    )


def lr_range(found: Evidence) -> Finding:
    """Losses at half and twice the tuned lr: described, as TRIAL.md names no test for them."""
    trial, rows, shown = found.trial, [], []
    for arm in (arm for arm in trial.design["robust"] if arm in trial.tuned):
        lrs = {factor: near(trial, arm, factor) for factor in (0.5, 2.0)}
        known = {f: paired(trial.losses(arm, lr), trial.losses(arm)) for f, lr in lrs.items() if lr is not None}
        if known:
            figures = [f"{nats(difference)} at {factor:g} times the lr" for factor, difference in known.items()]
            rows.append(f"{NAMES[arm]}: " + ", ".join(figures) + ".")
        if 2.0 in known:
            shown.append(f"{cell(arm)} {known[2.0].mean:+.4f}")
    return Finding("described", f"at twice the lr: {', '.join(shown)}", rows) if rows else not_tested("No runs yet.")


def near(trial: Trial, arm: str, factor: float) -> float | None:
    """The lr of the arm's runs that is this multiple of the tuned one."""
    return next((lr for lr in trial.arms[arm] if math.isclose(lr, factor * trial.tuned[arm], rel_tol=1e-3)), None)


# ----------------------------------------------------------------------------------------------------------------------
# Rows without leverage. Shares in per cent.


def rows_lose_leverage(found: Evidence) -> Finding:
    """The trial's endpoint of mechanism."""
    pairs = found.trial.design["leverage"]
    differences = found.trial.share_differences(pairs)
    if not all(difference.n for difference in differences):
        return not_tested("The trial has no pairs yet.")
    p_values = holm([difference.p for difference in differences])
    shares = {arm: list(found.trial.shares(arm).values()) for arm in found.trial.runs}
    lines = [f"{NAMES[arm]}: {mean_in(' %', values, 2)} of rows." for arm, values in shares.items()]
    words = []
    for (a, b), difference, p in zip(pairs, differences, p_values, strict=True):
        is_real = p < ALPHA
        if b in EVEN:
            more = difference.mean > 0
            words.append("undecided" if not is_real else "supported" if more else "contradicted")
        figure = interval(difference.mean, difference.low, difference.high, 2, " points")
        lines.append(
            f"{NAMES[a]} minus {NAMES[b]}: {figure}, effect {difference.effect:+.2f}, {difference.n} seeds "
            f"(p = {p:.2g}, Holm over {len(pairs)})."
        )
    figure = ", ".join(f"{cell(arm)} {np.mean(values):.1f} %" for arm, values in shares.items())
    return Finding(agreed(words), figure, lines)


def quarter_dies(found: Evidence) -> Finding:
    """Rows of low leverage in the layer that has most of them, at the end of the trial and of longer runs."""
    lines = []
    runs = found.trial.runs.get("muon", {})
    if runs:
        values = worst_layer([run for run in runs.values() if run.is_done], found.trial.design["first_look"])
        step = max(run.end_event["step"] for run in runs.values())
        lines.append(f"Trial, {len(values)} seeds, at step {step}, Muon's worst layer: {mean_in(' %', values, 1)}.")
    long = {group.optimizer: group for groups in found.long.values() for group in groups}
    for name, group in long.items():
        done = [run for run in group.runs if run.is_done]
        values, step = worst_layer(done, DEAD_STEP // 2), min(run.end_event["step"] for run in done)
        lines.append(
            f"[{found.long_folder}]({page_of(found.long_folder)}), {len(values)} seeds, low at every look from step "
            f"{DEAD_STEP // 2} to {step}, {NAMES[name]}'s worst layer: {mean_in(' %', values, 1)}."
        )
    if "muon" not in long:
        return Finding("not tested", "-", [*lines, f"No runs of {DEAD_STEP} steps."])
    values = worst_layer([run for run in long["muon"].runs if run.is_done], DEAD_STEP // 2)
    _, (low, high, _) = mean_of(values)
    verdict = "supported" if low > QUARTER else "contradicted" if high < QUARTER else "undecided"
    return Finding(verdict, f"Muon's worst layer {mean_in(' %', values, 1)}", lines)


def worst_layer(runs: Sequence[Run], first_step: int) -> list[float]:
    """Of each run, the share of persistently low rows of the layer that has most of them."""
    return [
        100 * max(persistent_share(run, first_step, layer) for layer in range(len(run.neuron_events[-1]["layers"])))
        for run in runs
    ]


# ----------------------------------------------------------------------------------------------------------------------
# Cost and width


def cost(found: Evidence) -> Finding:
    """Seconds of whole steps of runs, and milliseconds of the optimizer's step alone, to Muon's."""
    lines: list[str] = []
    by_variant: dict[str, list[tuple[float, Interval]]] = {}
    for place, groups in (*found.tracks.items(), ("the trial", trial_groups(found.trial))):
        for name in ("aurora", "aurora_tall", "aurora_both"):
            ratio = time_ratio(groups[name], groups["muon"], step_seconds) if {name, "muon"} <= groups.keys() else None
            if ratio is None:
                continue
            variant = groups[name].runs[0].start["hparams"].get("variant", "folded")
            by_variant.setdefault(variant, []).append(ratio)
            where = place if place == "the trial" else f"[{place}]({page_of(place)})"
            lines.append(f"Whole steps, {NAMES[name]}, variant `{variant}`, {where}: {times(*ratio)}.")
    for name, table in found.costs.items():
        speed = table["speed"]
        for rule in (rule for rule in speed if rule.startswith("aurora ")):
            alone = ratio_interval(speed[rule]["rounds_ms"], speed["muon"]["rounds_ms"])
            lines.append(
                f"Optimizer's step alone, variant `{rule.removeprefix('aurora ')}`, matrices of {table['config']}, "
                f"{table['schedule']}, {table['device']} ([table]({name.replace('.json', '.md')})): {times(*alone)}."
            )
    if not by_variant:
        return Finding("not tested", "-", lines)
    verdicts = [f"`{variant}`: {agreed(list(map(cost_word, ratios)))}" for variant, ratios in by_variant.items()]
    figures = [f"`{variant}` {times(*ratios[0])}" for variant, ratios in by_variant.items()]
    return Finding("; ".join(verdicts), "whole step, " + ", ".join(figures), lines)


def trial_groups(trial: Trial) -> dict[str, Group]:
    return {arm: Group(arm, list(runs.values())) for arm, runs in trial.runs.items()}


def times(ratio: float, within: Interval) -> str:
    return interval(ratio, within.low, within.high, 3, sign="")


def cost_word(ratio: tuple[float, Interval]) -> str:
    low, high, _ = ratio[1]
    return "supported" if high <= COST_CLAIM else "contradicted" if low > COST_CLAIM else "undecided"


# Groups by expansion factor and optimizer.
Widths = dict[int, dict[str, Group]]


def widths_of(tasks: dict[str, list[Group]]) -> Widths:
    """Runs by the expansion factor of their model, in its order."""
    found: Widths = {}
    for groups in tasks.values():
        expansion = groups[0].runs[0].start["config"]["model"]["mlp_expansion"]
        found.setdefault(expansion, {}).update({group.optimizer: group for group in groups})
    return dict(sorted(found.items()))


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


def starved_last(run: Run) -> float:
    """Of up's rows, those that got under a tenth of an even update's energy at the last look, in per cent."""
    event = run.neuron_events[-1]
    ups = [matrix["starved"] for name, matrix in event["matrices"].items() if name.endswith("mlp.up")]
    return 100 * sum(ups) / (event["width"] * len(ups))


def gain_grows_with_width(found: Evidence) -> Finding:
    """Slope of the gain against log2 of the expansion factor, over all pairs of runs."""
    by_width = gains(found.widths, "muon", "aurora")
    if len(by_width) < 3 or min(map(len, by_width.values())) < MIN_RUNS:
        return not_tested(f"It takes three expansion factors with {MIN_RUNS} pairs of runs each.")
    points = [(math.log2(e), gain) for e, by_seed in by_width.items() for gain in by_seed.values()]
    fit = stats.linregress(*zip(*points, strict=True))
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(points) - 2) * fit.stderr
    figure = interval(fit.slope, fit.slope - half, fit.slope + half, 4, " nats")
    verdict = "supported" if fit.slope > half else "contradicted" if -fit.slope > half else "undecided"
    lines = []
    for e, by_seed in by_width.items():
        gain = list(by_seed.values())
        starved = mean_in(" %", [starved_last(run) for run in found.widths[e]["muon"].runs if run.neuron_events], 1)
        lines.append(
            f"Expansion factor {e}, {len(gain)} seeds: Muon minus Aurora "
            f"{mean_in(' nats', gain, 4, sign='+')}. At the end {starved} of Muon's "
            "rows of up get under a tenth of an even share of the update's energy."
        )
    folder = found.expansion_folder
    lines.append(
        f"Slope for each doubling, [{folder}]({page_of(folder)}), {len(points)} pairs: {figure} (p = {fit.pvalue:.2g})."
    )
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
