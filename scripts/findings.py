"""The published claims against our own records: results/FINDINGS.md and its plots.

    python scripts/findings.py              write the page
    python scripts/findings.py --check      exit 1 if it is not what the records give

results/findings.toml names the evidence: the settings in which claims 1 to 4a are tested, one folder of records each,
and what claims 4b and 5 rest on. Every number on the page is computed here from records; a claim without sufficient
records is "not testable", never skipped. Tests are two-sided at 5 %, Holm-corrected within a claim.
"""

import argparse
import hashlib
import json
import math
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
from scipy import stats

from results.record import Run, by_optimizer, read_folder
from results.statistics import MIN_RUNS, Welch, holm, mean_interval, ratio_interval, welch
from results.text import cell
from results.verdict import ALPHA, Group, group_cells, group_runs, markdown_table, step_seconds, time_ratio

PAGE = "FINDINGS.md"
SUPPORTED, NOT_SUPPORTED, NOT_TESTABLE = "supported", "not supported", "not testable"
NAMES = {"adamw": "AdamW", "muon": "Muon", "unormuon": "U-NorMuon", "aurora": "Aurora"}
CLAIMS_SOURCE = (
    "[the paper](https://arxiv.org/abs/2606.27715) and [its blog](https://blog.tilderesearch.com/blog/aurora)"
)
STARVED_CLAIM, DEAD_STEP = 0.25, 500  # "more than a quarter of the neurons", "by about step 500"
COST_CLAIM = 1.06


class Finding(NamedTuple):
    """One line of the page. verdict: one of the three words; why: in one sentence."""

    claim: str
    verdict: str
    figure: str
    why: str
    evidence: str  # plot and command, in Markdown


def not_testable(claim: str, why: str, evidence: str) -> Finding:
    return Finding(claim, NOT_TESTABLE, "-", why, evidence)


def groups_in(results: Path, folder: str) -> dict[str, list[Group]]:
    """Groups by task of the records of a folder; empty without any."""
    runs, errors = read_folder(results / folder) if (results / folder).is_dir() else ([], [])
    if errors:
        raise ValueError(str(errors[0]))
    return group_runs(runs)


def flaw_of(groups: dict[str, Group], names: Sequence[str]) -> str | None:
    """What forbids a test between these optimizers, in words."""
    if lacking := [NAMES[name] for name in names if name not in groups]:
        return f"no single setting of {', '.join(lacking)} is recorded on one task"
    flaws = [f"{NAMES[name]}: {flaw}" for name in names for flaw in groups[name].flaws()]
    return "; ".join(flaws) or None


def steps_paid(group: Group) -> list[float]:
    """Steps of each run to the target; where it did not arrive, all that it took, which flatters it."""
    pairs = zip(group.runs, group.crossings(), strict=True)
    return [found.step if found else float(run.validations[-1].step) for run, found in pairs]


def interval(value: float, low: float, high: float, digits: int = 1, unit: str = "") -> str:
    return f"{value:+.{digits}f}{unit} [{low:+.{digits}f}, {high:+.{digits}f}]"


def order_findings(groups: dict[str, Group], evidence: str) -> list[Finding]:
    """Claims 1 and 3, in final loss where schedules are equally long, otherwise in steps to the target."""
    pairs = [
        ("1. Muon beats AdamW", "muon", "adamw"),
        ("3a. U-NorMuon beats Muon", "unormuon", "muon"),
        ("3b. Aurora beats U-NorMuon", "aurora", "unormuon"),
    ]
    tests: list[Welch | None] = []
    for _, first, second in pairs:
        is_open = flaw_of(groups, (first, second))
        tests.append(None if is_open else better(groups[first], groups[second]))
    p_values = [math.nan if test is None else test.p for test in tests]
    adjusted = [p_values[0], *holm(p_values[1:])]
    findings = []
    for (claim, first, second), test, p in zip(pairs, tests, adjusted, strict=True):
        if test is None or math.isnan(p):
            why = flaw_of(groups, (first, second)) or "neither arrives, or there is no spread between seeds"
            findings.append(not_testable(claim, why, evidence))
            continue
        if groups[first].planned_steps == groups[second].planned_steps:
            why = f"p = {p:.2g}; loss after {groups[first].planned_steps} steps"
            figure = interval(test.difference, test.low, test.high, 4, " nats")
        else:
            why = f"p = {p:.2g}; {arrivals(groups, (first, second))}"
            figure = interval(test.difference, test.low, test.high, unit=" steps")
        if p < ALPHA and test.difference > 0:
            why += "; the opposite is significant"
        is_supported = p < ALPHA and test.difference < 0
        findings.append(Finding(claim, SUPPORTED if is_supported else NOT_SUPPORTED, figure, why, evidence))
    return findings


def better(first: Group, second: Group) -> Welch:
    """Both cooled down after as many steps: their losses there mean the same. Otherwise only arrival does."""
    if first.planned_steps == second.planned_steps:
        return welch(first.losses(first.last_step), second.losses(second.last_step))
    return welch(steps_paid(first), steps_paid(second))


def arrivals(groups: dict[str, Group], names: Sequence[str]) -> str:
    counts = [groups[name].steps_to_target() for name in names]
    text = "arrived: " + ", ".join(f"{NAMES[n]} {c.count} of {c.runs}" for n, c in zip(names, counts, strict=True))
    if any(count.count < count.runs for count in counts):
        text += "; a run that did not arrive counts as arriving at its end, which favours it"
    return text


def starved(run: Run) -> float:
    """Mean over the looks of the share of up's rows that got under a tenth of an even update's energy."""
    return float(np.mean([event["starved"] for event in run.neuron_events]))


def starved_last(group: Group) -> float:
    """The same share at the runs' last looks, in per cent."""
    return float(100 * np.mean([run.neuron_events[-1]["starved"] for run in group.runs]))


def dead_last(group: Group) -> float:
    """Share of dead neurons at the runs' last looks, in per cent."""
    return float(100 * np.mean([run.neuron_events[-1]["dead"] for run in group.runs]))


def neuron_findings(groups: dict[str, Group], evidence: str) -> list[Finding]:
    """Claim 2: starved rows and dead neurons."""
    names = ("muon", "unormuon", "aurora")
    claims = [
        "2a. Muon starves more rows than U-NorMuon",
        "2b. Muon starves more rows than Aurora",
        "2c. Muon starves more than a quarter of the rows of up",
        f"2d. More than a quarter of Muon's neurons are dead by step {DEAD_STEP}",
        "2e. U-NorMuon's and Aurora's neurons do not die",
    ]
    flaw = flaw_of(groups, names)
    if not flaw and any(not run.neuron_events for name in names for run in groups[name].runs):
        flaw = "the records hold no telemetry of neurons (made before it was there, or with eval.telemetry = false)"
    if flaw:
        return [not_testable(claim, flaw, evidence) for claim in claims]
    shares = {name: [100 * starved(run) for run in groups[name].runs] for name in names}
    dead = {name: [100 * run.neuron_events[-1]["dead"] for run in groups[name].runs] for name in names}
    last = min(run.neuron_events[-1]["step"] for name in names for run in groups[name].runs)
    findings = []
    tests = [welch(shares["muon"], shares[name]) for name in names[1:]]
    for claim, test, p in zip(claims, tests, holm([test.p for test in tests]), strict=False):
        verdict = SUPPORTED if p < ALPHA and test.difference > 0 else NOT_SUPPORTED
        why = "no test without spread between seeds" if math.isnan(p) else f"p = {p:.2g}"
        figure = interval(test.difference, test.low, test.high, unit=" points")
        findings.append(Finding(claim, verdict, figure, why, evidence))

    def share(claim: str, values: list[float], is_more: bool, why: str, can_tell: bool = True) -> Finding:
        """Whether the mean is above (or below) a quarter, by its interval."""
        found, limit = mean_interval(values), 100 * STARVED_CLAIM
        is_supported = found.low > limit if is_more else found.high < limit
        verdict = NOT_TESTABLE if not can_tell else SUPPORTED if is_supported else NOT_SUPPORTED
        figure = f"{np.mean(values):.1f} % [{found.low:.1f}, {found.high:.1f}]"
        return Finding(claim, verdict, figure, why, evidence)

    why = f"mean over the looks of each run, interval over seeds; at the last look {starved_last(groups['muon']):.1f} %"
    findings.append(share(claims[2], shares["muon"], True, why))
    reaches = last >= DEAD_STEP
    why = f"dead at the last look, step {last}" + ("" if reaches else f": these runs do not get to step {DEAD_STEP}")
    findings.append(share(claims[3], dead["muon"], True, why, reaches))
    worst = max(("unormuon", "aurora"), key=lambda name: np.mean(dead[name]))
    why += f"; the higher of the two, {NAMES[worst]}, Muon {np.mean(dead['muon']):.1f} %"
    why += "; judged by whether it is below a quarter" * reaches
    findings.append(share(claims[4], dead[worst], False, why, reaches))
    return findings


def step_cost_finding(groups: dict[str, Group], evidence: str) -> Finding:
    """Claim 4a: seconds of whole training steps."""
    claim = f"4a. A training step with Aurora takes at most {COST_CLAIM - 1:.0%} longer than with Muon"
    flaw = flaw_of(groups, ("aurora", "muon"))
    ratio = None if flaw else time_ratio(groups["aurora"], groups["muon"], step_seconds)
    if ratio is None:
        return not_testable(claim, flaw or "the runs come from more than one machine or stack", evidence)
    return judged_ratio(claim, *ratio, "whole steps of the runs, paired by seed", evidence)


def optimizer_cost_finding(cost: dict[str, Any], results: Path) -> Finding:
    """Claim 4b: the optimizer's step alone."""
    claim = f"4b. Aurora's optimizer step alone takes at most {COST_CLAIM - 1:.0%} longer than Muon's"
    path = results / cost["file"]
    if not path.is_file():
        return not_testable(claim, f"there is no {cost['file']}", "-")
    table = json.loads(path.read_text(encoding="utf-8"))
    rounds = {name: table["speed"][name]["rounds_ms"] for name in ("aurora folded", "muon")}
    where = f"{len(rounds['muon'])} interleaved rounds on the matrices of {table['config']}, {table['device']}"
    evidence = f"[table]({cost['file'].replace('.json', '.md')})"
    return judged_ratio(claim, *ratio_interval(rounds["aurora folded"], rounds["muon"]), where, evidence)


def judged_ratio(claim: str, ratio: float, found: Any, why: str, evidence: str) -> Finding:
    is_supported = found.high <= COST_CLAIM
    if not is_supported:
        why += "; the interval lies above" if found.low > COST_CLAIM else "; the interval does not rule out more"
    figure = f"{ratio:.3f} [{found.low:.3f}, {found.high:.3f}]"
    return Finding(claim, SUPPORTED if is_supported else NOT_SUPPORTED, figure, why, evidence)


# Loss of the first optimizer of a pair minus that of the second, by pair, expansion factor and seed.
Gains = dict[tuple[str, str], dict[int, dict[int, float]]]


def by_expansion(tasks: dict[str, list[Group]]) -> dict[int, list[Group]]:
    """Groups by the expansion factor of their model, in its order."""
    found = {groups[0].runs[0].start["config"]["model"]["mlp_expansion"]: groups for groups in tasks.values()}
    return dict(sorted(found.items()))


def expansion_gains(tasks: dict[str, list[Group]], base: str, other: str) -> dict[int, dict[int, float]]:
    """base's final loss minus other's, by expansion factor and seed, where both finished at one width and task."""
    gains: dict[int, dict[int, float]] = {}
    for expansion, groups in by_expansion(tasks).items():
        runs = by_optimizer(run for group in groups for run in group.runs if run.is_done)
        losses = {name: {run.start["seed"]: run.end["val_loss"] for run in runs.get(name, [])} for name in NAMES}
        shared = losses[base].keys() & losses[other].keys()
        gains[expansion] = {seed: losses[base][seed] - losses[other][seed] for seed in sorted(shared)}
    return {expansion: by_seed for expansion, by_seed in gains.items() if by_seed}


def expansion_finding(gains: dict[int, dict[int, float]], is_equal: bool, evidence: str) -> Finding:
    """Claim 5: slope of the gain against log2 of the expansion factor, over all pairs of runs."""
    claim = "5. Aurora's gain over Muon grows with the MLP's expansion factor"
    if len(gains) < 3 or min(map(len, gains.values())) < MIN_RUNS:
        counts = ", ".join(f"{len(by_seed)} pairs at {e}" for e, by_seed in gains.items()) or "none"
        return not_testable(
            claim, f"it takes three factors with {MIN_RUNS} pairs of runs each; there are {counts}", evidence
        )
    points = [(math.log2(e), gain) for e, by_seed in gains.items() for gain in by_seed.values()]
    fit = stats.linregress(*zip(*points, strict=True))
    half = stats.t.ppf(0.975, len(points) - 2) * fit.stderr
    is_supported = fit.slope - half > 0
    why = f"slope of the gain in final loss for each doubling, {len(points)} pairs of runs, p = {fit.pvalue:.2g}; "
    why += "one setting for all factors" if is_equal else "settings differ between factors"
    figure = interval(fit.slope, fit.slope - half, fit.slope + half, 4, " nats")
    return Finding(claim, SUPPORTED if is_supported else NOT_SUPPORTED, figure, why, evidence)


# ----------------------------------------------------------------------------------------------------------------------
# The page


def single_groups(tasks: dict[str, list[Group]]) -> dict[str, Group]:
    """By optimizer, those with one setting, of a folder of one task."""
    groups = next(iter(tasks.values())) if len(tasks) == 1 else []
    counted = [group.optimizer for group in groups]
    return {group.optimizer: group for group in groups if counted.count(group.optimizer) == 1}


class Page:
    """The text, and for each plot that it shows its digest and what draws it."""

    def __init__(self, results: Path):
        self.results = results
        self.plots: dict[Path, tuple[str, Callable[[Path, str], None]]] = {}
        evidence = tomllib.loads((results / "findings.toml").read_text(encoding="utf-8"))
        settings, expansion, cost = (evidence[key] for key in ("setting", "expansion", "cost"))
        lines = ["<!-- Written by scripts/findings.py from the records named in findings.toml; do not edit. -->", ""]
        lines += ["# The published claims, by our own runs", "", INTRODUCTION, ""]
        sections, columns = [], {}
        for setting in settings:
            columns[setting["title"]], section = self.setting(**setting)
            sections += section
        overall, section = self.other_claims(expansion, cost)
        lines += [summary(columns, overall), "", *sections, *section]
        self.text = "\n".join(lines)

    def plot(self, name: str, values: Any, draw: Callable[[Path, str], None]) -> str:
        self.plots[self.results / name] = (hashlib.sha256(json.dumps(values).encode()).hexdigest(), draw)
        return f"[plot]({name})"

    def setting(self, title: str, folder: str, command: str, note: str = "") -> tuple[list[Finding], list[str]]:
        """Claims 1 to 4a in one setting: what was found, and its section of the page."""
        groups = single_groups(groups_in(self.results, folder))
        loss, neurons = "-", "-"
        if groups:
            looks = [(g.label, g.runs[0].target, run.validations) for g in groups.values() for run in g.runs]
            loss = self.plot(f"{folder}/findings-loss.png", looks, lambda p, d: draw_loss(groups, p, d))
        if groups and all(run.neuron_events for group in groups.values() for run in group.runs):
            events = [(g.label, run.neuron_events) for g in groups.values() for run in g.runs]
            neurons = self.plot(f"{folder}/findings-neurons.png", events, lambda p, d: draw_neurons(groups, p, d))
        findings = [*order_findings(groups, loss), *neuron_findings(groups, neurons), step_cost_finding(groups, loss)]
        findings.sort(key=lambda finding: finding.claim)
        lines = [f"## {title}", "", conditions(groups), ""]
        lines += [note, ""] if note else []
        lines += [f"    {line}" for line in command.splitlines()] + ["", claims_table(findings), ""]
        if groups:
            lines += [markdown_table(GROUP_HEADER, [group_row(group) for group in groups.values()]), ""]
        return findings, lines

    def other_claims(self, expansion: dict[str, str], cost: dict[str, str]) -> tuple[list[Finding], list[str]]:
        """Claims 4b and 5, which rest on evidence of their own."""
        wide = groups_in(self.results, expansion["folder"])
        gains = {pair: expansion_gains(wide, *pair) for pair in (("muon", "aurora"), ("muon", "unormuon"))}
        has_gains = any(gains.values())
        settings = {
            json.dumps([run.start["optimizer"], run.setting]) for gs in wide.values() for g in gs for run in g.runs
        }
        is_equal = len(settings) == len({json.loads(setting)[0] for setting in settings})
        evidence = "-"
        if has_gains:
            name, values = f"{expansion['folder']}/findings-width.png", [list(gains.values()), widths_table(wide)]
            evidence = self.plot(name, values, lambda p, d: draw_widths(gains, wide, p, d))
        findings = [optimizer_cost_finding(cost, self.results)]
        findings.append(expansion_finding(gains["muon", "aurora"], is_equal, evidence))
        lines = ["## Cost of the optimizer, and width", "", "Claim 5 is held against", ""]
        lines += [f"    {line}" for line in expansion["command"].splitlines()]
        lines += ["", "claim 4b against a table, which names its command.", "", claims_table(findings), ""]
        if has_gains:
            lines += [gains_table(gains), "", widths_table(wide), ""]
        return findings, lines


INTRODUCTION = (
    f"The claims are those of {CLAIMS_SOURCE}. A verdict holds for the conditions that stand above its figures and no "
    "others. Not supported does not mean refuted: the interval says what remains possible. *Beats* means a lower loss "
    "at the end of equally long schedules, or fewer steps to the target where each rule has a schedule of its own."
)
GROUP_HEADER = (
    "optimizer",
    "n",
    "val loss",
    "sd",
    "reached",
    "steps to target [95 %]",
    "starved rows, mean of looks",
    "last look",
    "dead neurons, last look",
)


def summary(columns: dict[str, list[Finding]], overall: list[Finding]) -> str:
    """Every claim with its verdicts, one column a setting."""
    rows = [
        (found[0].claim, *(f"**{f.verdict}** {f.figure}".removesuffix(" -") for f in found))
        for found in zip(*columns.values(), strict=True)
    ]
    table = markdown_table(("claim", *columns), rows)
    return table + "\n\n" + "\n".join(f"- {f.claim}: **{f.verdict}** {f.figure}".removesuffix(" -") for f in overall)


def claims_table(findings: list[Finding]) -> str:
    rows = [(f.claim, f"**{f.verdict}**", f.figure, cell(f.why, 500), f.evidence) for f in findings]
    return markdown_table(("claim", "verdict", "figure [95 %]", "because", "evidence"), rows)


def gains_table(gains: Gains) -> str:
    rows = []
    for (base, other), by_expansion in gains.items():
        for expansion, by_seed in by_expansion.items():
            found, mean = mean_interval(list(by_seed.values())), np.mean(list(by_seed.values()))
            title = f"{NAMES[base]}'s loss - {NAMES[other]}'s"
            rows.append((title, str(expansion), str(len(by_seed)), interval(mean, found.low, found.high, 4)))
    return markdown_table(("gain", "expansion factor", "pairs", "nats [95 %]"), rows)


def widths_table(tasks: dict[str, list[Group]]) -> str:
    rows = [(str(e), *group_row(group)) for e, groups in by_expansion(tasks).items() for group in groups]
    return markdown_table(("expansion factor", *GROUP_HEADER), rows)


def conditions(groups: dict[str, Group]) -> str:
    """What the runs were, in a sentence or two."""
    if not groups:
        return "No comparison on one task is recorded yet."
    runs = [run for group in groups.values() for run in group.runs]
    config, counts = runs[0].start["config"], runs[0].start["params_by_role"]
    steps = ", ".join(f"{NAMES.get(n, cell(n))} {g.runs[0].setting['steps']}" for n, g in groups.items())
    machines = ", ".join(sorted({cell(f"{r.start['world_size']} x {r.start['env']['device_name']}") for r in runs}))
    seeds = ", ".join(map(str, sorted({run.start["seed"] for run in runs})))
    return (
        f"{sum(counts.values()):,} parameters, {config['model']['num_layers']} layers of width "
        f"{config['model']['model_dim']}, {config['model'].get('mlp', 'relu2')} MLP with expansion factor "
        f"{config['model']['mlp_expansion']}, activations in {config['model'].get('activation_dtype', 'float32')}, "
        f"{config['train']['batch_tokens']:,} tokens a step, target {runs[0].target:g} on "
        f"{config['eval']['tokens']:,} validation tokens; steps: {steps}; seeds {seeds}; {machines}."
    )


def group_row(group: Group) -> tuple[str, ...]:
    label, _, n, loss, sd, _, _, reached, steps, *_ = group_cells(group)
    shares = ("-", "-", "-")
    if all(run.neuron_events for run in group.runs):
        mean = 100 * np.mean([starved(run) for run in group.runs])
        shares = f"{mean:.1f} %", f"{starved_last(group):.1f} %", f"{dead_last(group):.1f} %"
    return (cell(label), n, loss, sd, reached, steps, *shares)


def draw_loss(groups: dict[str, Group], path: Path, description: str) -> None:
    from scripts.plot import plot_groups

    plot_groups(list(groups.values()), path, description)


def draw_neurons(groups: dict[str, Group], path: Path, description: str) -> None:
    from scripts.neurons import plot_neurons

    plot_neurons(list(groups.values()), path, description)


def draw_widths(gains: Gains, tasks: dict[str, list[Group]], path: Path, description: str) -> None:
    """Gain over Muon, starved rows and dead neurons against the expansion factor."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from scripts.plot import STYLES, save_figure

    figure, (top, *axes) = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    for (_, other), by_width in gains.items():
        color, line, marker = STYLES[other]
        for expansion, by_seed in by_width.items():
            top.plot([expansion] * len(by_seed), list(by_seed.values()), marker, color=color, alpha=0.5)
        means = [np.mean(list(by_seed.values())) for by_seed in by_width.values()]
        top.plot(list(by_width), means, linestyle=line, color=color, label=NAMES[other])
    top.axhline(0, color="0.5", linewidth=1)
    top.set_ylabel("Muon's final loss - the other's (nats per token)")
    groups = by_expansion(tasks)
    for axis, share, title in zip(axes, (starved_last, dead_last), ("starved rows", "dead neurons"), strict=True):
        for name in ("muon", "unormuon", "aurora"):
            color, line, marker = STYLES[name]
            points = [(e, share(g)) for e, found in groups.items() for g in found
                      if g.optimizer == name and all(run.neuron_events for run in g.runs)]  # fmt: skip
            if points:
                axis.plot(*zip(*points, strict=True), linestyle=line, marker=marker, color=color, label=NAMES[name])
        axis.set_ylabel(f"{title} at the last look (%)")
        axis.set_ylim(bottom=0)
    for axis in (top, *axes):
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(groups), list(map(str, groups)))
        axis.set_xlabel("MLP expansion factor")
        axis.legend()
    save_figure(figure, path, description)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if the page is stale")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of the records and the page")
    args = parser.parse_args(argv)
    page = args.results / PAGE
    try:
        made = Page(args.results)
        text, plots = made.text, made.plots
        stale = [] if page.is_file() and page.read_text(encoding="utf-8") == text else [page]
        stale += [p for p, (digest, _) in plots.items() if not p.is_file() or digest.encode() not in p.read_bytes()]
        if not args.check:
            for path in stale:
                if path in plots:
                    digest, draw = plots[path]
                    draw(path, digest)
            page.write_text(text, encoding="utf-8")
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"error: {error!r}: is {args.results}/findings.toml right, and are its records whole?", file=sys.stderr)
        return 2
    if args.check:
        for path in stale:
            print(f"error: {path} is not what the records give: python scripts/findings.py", file=sys.stderr)
        return 1 if stale else 0
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
