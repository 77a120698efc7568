"""Test the published claims on our own records: results/FINDINGS.md and its plots.

    python scripts/findings.py              write the page
    python scripts/findings.py --check      exit 1 if it is not what the records give

results/findings.toml names the evidence. For claims 1 to 4a that is one folder of records for each setting; claims 4b
and 5 have entries of their own. scripts/analysis/findings.py computes every number on the page from records. A claim
without sufficient records is "not testable"; none is skipped.
"""

import argparse
import hashlib
import json
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

from aurora.console import run_script
from aurora.trainer.record import read_folder
from scripts.analysis.findings import (
    NAMES,
    Finding,
    Widths,
    dead_last,
    expansion_finding,
    gains,
    has_telemetry,
    neuron_findings,
    optimizer_cost_finding,
    order_findings,
    signed,
    single_groups,
    starved_last,
    starved_mean,
    step_cost_finding,
    widths_of,
)
from scripts.analysis.report import group_cells
from scripts.analysis.statistics import mean_interval
from scripts.analysis.text import cell, markdown_table, plain
from scripts.analysis.verdict import Group, group_runs

PAGE = "FINDINGS.md"
INTRODUCTION = """\
The claims are those of [the paper](https://arxiv.org/abs/2606.27715) and
[its blog](https://blog.tilderesearch.com/blog/aurora). A verdict holds only for the conditions that stand above its
figures.

- *Supported*: the test or the 95 % interval shows what is claimed. *Contradicted*: it shows the opposite.
  *Undecided*: it leaves both possible. *Not testable*: the records do not suffice.
- *Beats* means a lower loss at the end of equally long schedules. Where each optimizer has a schedule of its own, it
  means fewer steps to the target.
- A row of `up` is *starved* if it gets under a tenth of an even share of the update's energy. A neuron is *dead* if
  its part in the output of its layer is under a hundredth of the mean neuron's.
- Differences are between means: the first-named minus the second. In claims 1 and 3 a negative difference means that
  the first-named is better. It is in steps to the target or, where lengths are equal, in nats of final loss. In claim 2
  a positive difference means that the first-named starves more. It is in percentage points of rows.
- Brackets hold the 95 % interval of one figure; there is none where all seeds gave the same.
- Each p is corrected (Holm) for the tests of its claim in one setting: two in 2a and 2b, two in 3a and 3b, one
  elsewhere. There is no correction over settings, so one verdict in twenty may be chance. The pages of the experiments
  ([README.md](README.md)) correct over all pairs of a folder, so their p may be larger."""
# Cells of report.group_cells() that the page shows, and three of its own.
CELLS = {
    0: "optimizer",
    1: "steps",
    2: "n",
    3: "val loss",
    4: "sd",
    7: "reached",
    8: "steps to target [95 %]",
}
OWN_CELLS = ("starved rows of up, mean", "at the end", "dead neurons at the end")
GAINS = [("muon", "aurora"), ("muon", "unormuon")]


def groups_in(results: Path, folder: str) -> dict[str, list[Group]]:
    """Groups by task of the records of a folder; empty without any."""
    runs, errors = read_folder(results / folder) if (results / folder).is_dir() else ([], [])
    for error in errors:
        print(f"warning: left out: {plain(error, 500)}", file=sys.stderr)
    return group_runs(runs)


class Page:
    """The text, and for each plot that it shows its digest and what draws it."""

    def __init__(self, results: Path):
        self.results = results
        self.plots: dict[Path, tuple[str, Callable[[Path, str], None]]] = {}
        evidence = tomllib.loads((results / "findings.toml").read_text(encoding="utf-8"))
        columns, sections = {}, []
        for setting in evidence["setting"]:
            columns[setting["title"]], section = self.setting(**setting)
            sections += section
        overall, section = self.other_claims(evidence["expansion"], evidence["cost"])
        lines = ["<!-- Written by scripts/findings.py from the records named in findings.toml; do not edit. -->", ""]
        lines += ["# The published claims, by our own runs", "", INTRODUCTION, "", summary(columns, overall), ""]
        self.text = "\n".join([*lines, *sections, *section])

    def plot(self, name: str, values: Any, draw: Callable[[Path, str], None]) -> str:
        """A link to a plot that is drawn anew when these values change."""
        self.plots[self.results / name] = (hashlib.sha256(json.dumps(values).encode()).hexdigest(), draw)
        return f"[plot]({name})"

    def setting(self, title: str, folder: str, command: str, note: str) -> tuple[list[Finding], list[str]]:
        """Claims 1 to 4a in one setting: what was found, and its section of the page."""
        groups, flaw = single_groups(groups_in(self.results, folder))
        groups = {} if flaw else groups
        experiment, neurons = f"[details]({folder.partition('/')[0]}/README.md)" if groups else "", ""
        if groups and all(map(has_telemetry, groups.values())):
            events = [(g.label, run.neuron_events) for g in groups.values() for run in g.runs]
            neurons = self.plot(f"{folder}/findings-neurons.png", events, lambda p, d: draw_neurons(groups, p, d))
        findings = order_findings(groups) + neuron_findings(groups) + [step_cost_finding(groups)]
        findings.sort(key=lambda finding: finding.claim)
        links = {finding.claim: neurons if finding.claim.startswith("2") else experiment for finding in findings}
        lines = [f"## {title}", "", f"Not comparable: {flaw}." if flaw else conditions(groups), "", note, ""]
        lines += [*indented(command), "", claims_table(findings, links), ""]
        if groups:
            lines += [markdown_table((*CELLS.values(), *OWN_CELLS), map(group_row, groups.values())), ""]
        return findings, lines

    def other_claims(self, expansion: dict[str, str], cost: dict[str, str]) -> tuple[list[Finding], list[str]]:
        """Claims 4b and 5, which rest on evidence of their own."""
        path = self.results / cost["file"]
        table = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        widths, flaw = widths_of(groups_in(self.results, expansion["folder"]))
        findings = [optimizer_cost_finding(table), expansion_finding(widths, flaw)]
        links = {findings[0].claim: f"[table]({cost['file'].replace('.json', '.md')})" if table else ""}
        rows = [(str(e), *group_row(group)) for e, groups in widths.items() for group in groups.values()]
        rows_of_gain = gain_rows(widths)
        if widths:
            name = f"{expansion['folder']}/findings-width.png"
            link = self.plot(name, [rows_of_gain, rows], lambda p, d: draw_widths(widths, p, d))
            links[findings[1].claim] = link
        lines = [
            "## Cost of the optimizer, and width",
            "",
            "Claim 5 is held against",
            "",
            *indented(expansion["command"]),
            "",
            expansion["note"],
            "",
            "Claim 4b is held against a table, which names its command.",
            "",
            claims_table(findings, links),
            "",
        ]
        if widths:
            lines += [markdown_table(("gain", "expansion factor", "pairs", "nats [95 %]"), rows_of_gain), ""]
            lines += [markdown_table(("expansion factor", *CELLS.values(), *OWN_CELLS), rows), ""]
        return findings, lines


def indented(command: str) -> list[str]:
    return [f"    {line}" for line in command.strip().splitlines()]


def summary(columns: dict[str, list[Finding]], overall: list[Finding]) -> str:
    """Every claim with its verdicts; settings stand side by side, without intervals, which their sections have."""

    def short(finding: Finding) -> str:
        figure = re.sub(r" \[[^]]*\]", "", finding.figure)
        return f"**{finding.verdict}** {figure}".rstrip()

    rows = [(found[0].claim, *map(short, found)) for found in zip(*columns.values(), strict=True)]
    lines = [markdown_table(("claim", *columns), rows), ""]
    return "\n".join([*lines, *(f"- Claim {f.claim}: **{f.verdict}** {f.figure}".rstrip() for f in overall)])


def claims_table(findings: list[Finding], links: dict[str, str]) -> str:
    rows = [
        (f.claim, f"**{f.verdict}**", f.figure or "-", cell(f.why, 500), links.get(f.claim) or "-") for f in findings
    ]
    return markdown_table(("claim", "verdict", "figure [95 %]", "because", "evidence"), rows)


def conditions(groups: dict[str, Group]) -> str:
    """What the runs were, in a sentence."""
    runs = [run for group in groups.values() for run in group.runs]
    config, counts = runs[0].start["config"], runs[0].start["params_by_role"]
    model = config["model"]
    steps = ", ".join(f"{NAMES.get(n, cell(n))} {g.planned_steps}" for n, g in groups.items())
    machines = ", ".join(sorted({cell(f"{r.start['world_size']} x {r.start['env']['device_name']}") for r in runs}))
    seeds = ", ".join(map(str, sorted({run.start["seed"] for run in runs})))
    return (
        f"{sum(counts.values()):,} parameters, {model['num_layers']} layers of width {model['model_dim']}, "
        f"{model.get('mlp', 'relu2')} MLP with expansion factor {model['mlp_expansion']}, activations in "
        f"{model.get('activation_dtype', 'float32')}, {config['train']['batch_tokens']:,} tokens a step, target "
        f"{runs[0].target:g} on {config['eval']['tokens']:,} validation tokens; steps: {steps}; seeds {seeds}; "
        f"{machines}."
    )


def group_row(group: Group) -> tuple[str, ...]:
    cells = group_cells(group)
    shares = ["-"] * 3
    if has_telemetry(group):
        mean = np.mean([starved_mean(run) for run in group.runs])
        shares = [f"{share:.1f} %" for share in (mean, starved_last(group), dead_last(group))]
    return (cell(group.label), *(cells[i] for i in CELLS if i), *shares)


def gain_rows(widths: Widths) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for base, other in GAINS:
        for expansion, by_seed in gains(widths, base, other).items():
            values = list(by_seed.values())
            figure = signed(float(np.mean(values)), *mean_interval(values)[:2], 4)
            rows.append((f"{NAMES[base]}'s loss - {NAMES[other]}'s", str(expansion), str(len(values)), figure))
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# Plots


def draw_neurons(groups: dict[str, Group], path: Path, description: str) -> None:
    from scripts.neurons import plot_neurons

    plot_neurons(list(groups.values()), path, description)


def draw_widths(widths: Widths, path: Path, description: str) -> None:
    """Gain over Muon, starved rows and dead neurons against the expansion factor."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from scripts.plot import STYLES, save_figure

    figure, (left, *axes) = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    for base, other in GAINS:
        color, line, marker = STYLES[other]
        by_width = gains(widths, base, other)
        for expansion, by_seed in by_width.items():
            left.plot([expansion] * len(by_seed), list(by_seed.values()), marker, color=color, alpha=0.5)
        if by_width:
            means = [np.mean(list(by_seed.values())) for by_seed in by_width.values()]
            left.plot(list(by_width), means, linestyle=line, color=color, label=NAMES[other])
    left.axhline(0, color="0.5", linewidth=1)
    left.set_ylabel("Muon's final loss - the other's (nats per token)")
    shares = {"starved rows of up": starved_last, "dead neurons": dead_last}
    for axis, (title, share) in zip(axes, shares.items(), strict=True):
        for name in NAMES:
            color, line, marker = STYLES[name]
            found = {e: groups[name] for e, groups in widths.items() if name in groups}
            points = {e: share(group) for e, group in found.items() if has_telemetry(group)}
            if points:
                axis.plot(
                    *zip(*points.items(), strict=True), linestyle=line, marker=marker, color=color, label=NAMES[name]
                )
        axis.set_ylabel(f"{title} at the end (%)")
        axis.set_ylim(bottom=0)
    for axis in (left, *axes):
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(widths), list(map(str, widths)))
        axis.set_xlabel("MLP expansion factor")
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    save_figure(figure, path, description)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if the page is stale")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of the records and the page")
    args = parser.parse_args(argv)
    page = args.results / PAGE
    if not args.results.is_dir():
        print(f"error: there is no folder {args.results}", file=sys.stderr)
        return 2
    try:
        made = Page(args.results)
        stale = [] if page.is_file() and page.read_text(encoding="utf-8") == made.text else [page]
        stale += [
            p for p, (digest, _) in made.plots.items() if not p.is_file() or digest.encode() not in p.read_bytes()
        ]
        if not args.check:
            for path in made.plots.keys() & set(stale):
                digest, draw = made.plots[path]
                draw(path, digest)
            page.write_text(made.text, encoding="utf-8")
    except ImportError as error:
        print(f"error: {error}; pip install -e '.[report]'", file=sys.stderr)
        return 2
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
    sys.exit(run_script(main))
