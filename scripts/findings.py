"""The published claims, by our own runs: writes results/FINDINGS.md and its pictures.

    python scripts/findings.py              write the page
    python scripts/findings.py --check      exit 1 if it is not what the records give

results/findings.toml holds the words: each claim, what its source says, and what would change the verdict; and it names
the records. scripts/analysis/findings.py computes every figure and verdict from them. A claim without sufficient
records is "not tested"; none is left out.
"""

import hashlib
import json
import sys
import textwrap
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

from aurora.console import run_script
from aurora.trainer.record import Run
from scripts.analysis.evidence import Evidence
from scripts.analysis.findings import MEASURES, NAMES, NO_RUNS, Finding
from scripts.analysis.text import cell, markdown_table
from scripts.analysis.trial import Trial, persistent_share
from scripts.analysis.verdict import Group
from scripts.analysis.written import Picture, Written, page_command

PAGE, WORDS = "FINDINGS.md", "findings.toml"


class Page:
    """The text, and the pictures that it shows."""

    def __init__(self, results: Path):
        self.results = results
        self.pictures: dict[Path, Picture] = {}
        words = tomllib.loads((results / WORDS).read_text(encoding="utf-8"))
        evidence = Evidence(results, words["evidence"])
        findings = [MEASURES[claim["measure"]](evidence) for claim in words["claim"]]
        lines = ["<!-- Written by scripts/findings.py from the records named in findings.toml; do not edit. -->", ""]
        lines += [f"# {words['title']}", "", wrapped(words["introduction"]), "", summary(words["claim"], findings), ""]
        lines += [conditions(evidence.trial), "", words["terms"].strip(), ""]
        lines += self.pictures_of(evidence.trial, words["pictures"])
        for number, (claim, finding) in enumerate(zip(words["claim"], findings, strict=True), 1):
            lines += section(number, claim, finding)
        self.text = "\n".join([*lines, words["end"].strip(), ""])

    def pictures_of(self, trial: Trial, captions: dict[str, str]) -> list[str]:
        lines = []
        tuning = [run for runs in trial.tuning.values() for run in runs]
        if tuning:
            name = f"{trial.design['tuning']}/learning-rates.png"
            lines += self.picture(name, tuning, captions["learning_rates"], lambda p, d: draw_rates(trial, p, d))
        done = {arm: [run for run in trial.at(arm).values() if run.is_done] for arm in trial.plan}
        groups = [Group(NAMES[arm], runs) for arm, runs in done.items() if runs]
        if groups:
            name = f"{trial.design['folder']}/leverage.png"
            runs = [run for group in groups for run in group.runs]
            lines += self.picture(name, runs, captions["leverage"], lambda p, d: draw_leverage(groups, p, d))
        return lines

    def picture(self, name: str, runs: list[Run], caption: str, draw: Callable[[Path, str], None]) -> list[str]:
        """A picture that is drawn anew when the losses or the telemetry of these runs change."""
        values: Any = sorted((run.start["run_id"], run.end_event["val_loss"], run.neuron_events) for run in runs)
        digest = hashlib.sha256(json.dumps(values).encode()).hexdigest()
        self.pictures[self.results / name] = Picture(digest, draw)
        return [f"![{Path(name).stem.replace('-', ' ')}]({name})", "", wrapped(caption), ""]


def summary(claims: list[dict[str, str]], findings: list[Finding]) -> str:
    rows = [
        (f"{number}. {cell(claim['claim'], 300)}", f"**{finding.verdict}**", finding.figure)
        for number, (claim, finding) in enumerate(zip(claims, findings, strict=True), 1)
    ]
    return markdown_table(("claim", "verdict", "figure [95 %]"), rows)


def section(number: int, claim: dict[str, str], finding: Finding) -> list[str]:
    lines = [f"## {number}. {claim['claim'].rstrip('.')}", "", wrapped(f"**What is said.** {claim['source']}"), ""]
    lines += [
        wrapped(f"**We measured.** {claim['measured']}"),
        "",
        *(wrapped(line, "- ") for line in finding.lines),
        "",
    ]
    lines += [wrapped(f"**Verdict: {finding.verdict}.** {claim.get('reading', '')}"), ""]
    return [*lines, wrapped(f"**What would change it.** {claim['change']}"), ""]


def wrapped(text: str, bullet: str = "") -> str:
    return textwrap.fill(
        " ".join(text.split()),
        width=120,
        initial_indent=bullet,
        subsequent_indent=" " * len(bullet),
        break_long_words=False,
        break_on_hyphens=False,
    )


def conditions(trial: Trial) -> str:
    """What the trial's runs were, in a sentence."""
    runs = [run for by_factor in trial.runs.values() for by_seed in by_factor.values() for run in by_seed.values()]
    if not runs:
        return NO_RUNS
    config, counts = runs[0].start["config"], runs[0].start["params_by_role"]
    model = config["model"]
    devices = ", ".join(sorted({cell(run.start["env"]["device_name"]) for run in runs}))
    return wrapped(
        f"The trial: {sum(counts.values()):,} parameters, {model['num_layers']} layers of width {model['model_dim']}, "
        f"{model['mlp']} with expansion factor {model['mlp_expansion']}, {model['activation_dtype']}, "
        f"{config['train']['steps']} steps of {config['train']['batch_tokens']:,} tokens, {len(runs)} runs, {devices}."
    )


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def draw_leverage(groups: list[Group], path: Path, description: str) -> None:
    from scripts.neurons import plot_leverage

    plot_leverage(groups, path, description)


def draw_rates(trial: Trial, path: Path, description: str) -> None:
    """Loss at the end, and rows of low leverage, against the lr, at the momentum that most runs of the tuning have."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from scripts.plot import save_figure, styles_by_name

    momenta = [run.start["hparams"]["momentum"] for runs in trial.tuning.values() for run in runs]
    momentum = max(set(momenta), key=momenta.count)
    with matplotlib.rc_context({"text.parse_math": False, "svg.hashsalt": "", "font.size": 9}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
        arms = [arm for arm, runs in trial.tuning.items() if runs]
        for arm, (color, line, marker) in zip(arms, styles_by_name(arms), strict=True):
            runs = [r for r in trial.tuning[arm] if r.is_done and r.start["hparams"]["momentum"] == momentum]
            for axis, values in (
                (left, [run.end_event["val_loss"] for run in runs]),
                (right, [100 * persistent_share(run, trial.design["first_look"]) for run in runs]),
            ):
                by_lr: dict[float, list[float]] = {}
                for run, value in zip(runs, values, strict=True):
                    by_lr.setdefault(run.start["hparams"]["lr"], []).append(value)
                lrs = sorted(by_lr)
                axis.plot([run.start["hparams"]["lr"] for run in runs], values, marker, color=color, alpha=0.4, ms=4)
                axis.plot(lrs, [np.mean(by_lr[lr]) for lr in lrs], linestyle=line, color=color, label=NAMES[arm])
        left.set_ylabel("loss at the end (nats per byte)")
        right.set_ylabel("rows of low leverage from step 100 on (%)")
        for axis in (left, right):
            axis.set_xscale("log")
            lrs = sorted({run.start["hparams"]["lr"] for runs in trial.tuning.values() for run in runs})
            axis.set_xticks(lrs, [f"{lr:g}" for lr in lrs])
            axis.minorticks_off()
            axis.set_xlabel("lr")
            axis.grid(alpha=0.3)
        left.legend()
        save_figure(figure, path, description)
        plt.close(figure)


def page(results: Path) -> Written:
    made = Page(results)
    return Written(made.text, made.pictures)


def main(argv: list[str] | None = None) -> int:
    return page_command("findings.py", __doc__, PAGE, WORDS, page, argv)


if __name__ == "__main__":
    sys.exit(run_script(main))
