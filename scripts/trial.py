"""What came out of the trial that results/TRIAL.md designs: writes results/TRIAL_OUTCOME.md from its records.

    python scripts/trial.py              write the page
    python scripts/trial.py --check      exit 1 if it is not what the records give

results/trial.toml names arms, endpoints and the folder of records; scripts/analysis/trial.py has the statistics. An
endpoint without sufficient records says so; none is left out.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

from aurora.console import run_script
from scripts.analysis.report import with_interval
from scripts.analysis.statistics import mean_of
from scripts.analysis.text import cell, markdown_table
from scripts.analysis.trial import Paired, Trial, judged
from scripts.analysis.written import Written, page_command

PAGE, DESIGN = "TRIAL_OUTCOME.md", "trial.toml"
INTRODUCTION = """\
[TRIAL.md](TRIAL.md) has its design. Brackets hold 95 % of a mean difference, paired by seed. *Effect* is that
difference in units of its standard deviation. p is Holm's over the tests of a table."""


def page(results: Path) -> Written:
    trial = Trial(results, DESIGN)
    lines = [f"<!-- Written by scripts/trial.py from the records named in {DESIGN}; do not edit. -->", ""]
    lines += ["# What came out of the trial", "", INTRODUCTION, ""]
    if not trial.has_runs and not any(trial.tuning.values()):
        return Written("\n".join([*lines, "No record yet.", ""]))
    if trial.has_runs:
        lines += [arm_table(trial), "", "## Primary: loss at the end", "", loss_table(trial, trial.design["loss"]), ""]
        lines += ["## Mechanism: rows whose leverage stays low", "", leverage_table(trial), ""]
        lines += ["## Robustness: half and twice the lr", "", robustness_table(trial), ""]
        lines += ["## Afterwards: each arm against Muon", "", loss_table(trial, trial.design["afterwards"]), ""]
    if any(trial.tuning.values()):
        lines += ["## Tuning", "", TUNING, "", tuning_table(trial), ""]
    return Written("\n".join(lines))


TUNING = "Mean loss at the end, over the seeds of the tuning. Each arm's lowest is bold: its values are taken."


def arm_table(trial: Trial) -> str:
    rows = []
    for arm, plan in trial.plan.items():
        runs = trial.at(arm).values()
        count = f"{sum(run.is_done for run in runs)}/{len(trial.planned(arm))}"
        loss, share = (
            with_interval(*mean_of(list(values.values())), digits) if values else "-"
            for values, digits in ((trial.losses(arm), 4), (trial.shares(arm), 2))
        )
        rows.append((cell(arm), f"{plan['lr']:g}", f"{plan['momentum']:g}", count, loss, share))
    low_rows = f"rows of low leverage from step {trial.design['first_look']} on (%) [95 %]"
    return markdown_table(("arm", "lr", "momentum", "finished", "loss at the end [95 %]", low_rows), rows)


def difference_cells(found: Paired, digits: int) -> tuple[str, str, str]:
    """Number of pairs, mean with its interval, and effect."""
    if not found.n:
        return "0", "-", "-"
    mean = f"{found.mean:+.{digits}f}"
    if math.isnan(found.low):
        return str(found.n), mean, "-"
    return str(found.n), f"{mean} [{found.low:+.{digits}f}, {found.high:+.{digits}f}]", f"{found.effect:+.2f}"


def p_cell(p: float) -> str:
    return "-" if math.isnan(p) else f"{p:.2g}"


def loss_table(trial: Trial, pairs: Sequence[Sequence[str]]) -> str:
    found = trial.loss_differences(pairs)
    rows = [
        (f"{cell(a)} - {cell(b)}", *difference_cells(difference, 4), p_cell(p), word)
        for (a, b), difference, (p, word) in zip(pairs, found, judged(found, trial.design["margin"]), strict=True)
    ]
    return markdown_table(("losses", "pairs", "nats [95 %]", "effect", "p", "verdict"), rows)


def leverage_table(trial: Trial) -> str:
    pairs = trial.design["leverage"]
    found = trial.share_differences(pairs)
    rows = []
    for (a, b), difference, (p, word) in zip(pairs, found, judged(found, 0.0), strict=True):
        word = {"better": "fewer", "worse": "more"}.get(word, word)
        rows.append((f"{cell(a)} - {cell(b)}", *difference_cells(difference, 2), p_cell(p), word))
    return markdown_table(("shares of rows", "pairs", "points [95 %]", "effect", "p", "verdict"), rows)


def robustness_table(trial: Trial) -> str:
    rows = []
    for arm in trial.design["robust"]:
        for factor in (0.5, 2.0):
            runs, change = trial.at(arm, factor), trial.change(arm, factor)
            count = f"{sum(run.is_done for run in runs.values())}/{len(trial.planned(arm, factor))}"
            rows.append((cell(arm), f"{factor:g}", count, *difference_cells(change, 4), change.flaw or "-"))
    header = ("arm", "times the lr", "finished", "pairs", "loss above that at the tuned lr [95 %]", "effect", "flaw")
    return markdown_table(header, rows)


def tuning_table(trial: Trial) -> str:
    """A row for each momentum and lr, a column for each arm."""
    cells: dict[tuple[float, float], dict[str, list[float]]] = {}
    for arm, runs in trial.tuning.items():
        for run in runs:
            hparams, loss = run.start["hparams"], run.end_event["val_loss"] if run.is_done else math.inf
            cells.setdefault((hparams["momentum"], hparams["lr"]), {}).setdefault(arm, []).append(loss)
    arms = [arm for arm, runs in trial.tuning.items() if runs]
    best = {arm: min(np.mean(found[arm]) for found in cells.values() if arm in found) for arm in arms}
    rows = []
    for (momentum, lr), found in sorted(cells.items()):
        row = [f"{momentum:g}", f"{lr:g}"]
        for arm in arms:
            mean = np.mean(found[arm]) if arm in found else math.nan
            row.append("-" if math.isnan(mean) else f"**{mean:.4f}**" if mean == best[arm] else f"{mean:.4f}")
        rows.append(row)
    return markdown_table(("momentum", "lr", *map(cell, arms)), rows)


def main(argv: list[str] | None = None) -> int:
    return page_command("trial.py", __doc__, PAGE, DESIGN, page, argv)


if __name__ == "__main__":
    sys.exit(run_script(main))
