"""What came out of the trial that results/TRIAL.md designs: writes results/TRIAL_OUTCOME.md from its records.

    python scripts/trial.py              write the page
    python scripts/trial.py --check      exit 1 if it is not what the records give

results/trial.toml names arms, endpoints and the folder of records; scripts/analysis/trial.py has the statistics. An
endpoint without sufficient records says so; none is left out.
"""

import argparse
import math
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

from aurora.console import run_script
from aurora.trainer.record import Run, read_folder
from scripts.analysis.statistics import holm, mean_interval
from scripts.analysis.text import cell, markdown_table
from scripts.analysis.trial import Paired, judged, paired, persistent_share

PAGE, DESIGN = "TRIAL_OUTCOME.md", "trial.toml"
INTRODUCTION = """\
[TRIAL.md](TRIAL.md) has its design. Brackets hold 95 % of a mean difference, paired by seed. *Effect* is that
difference in units of its standard deviation. p is Holm's over the tests of a table."""
ALPHA = 0.05
MOST_DIVERGED = 2  # runs of an arm, beyond which its endpoints are not tested

Arms = dict[str, dict[float, dict[int, Run]]]  # runs by arm, lr and seed


def page(results: Path) -> str:
    design = tomllib.loads((results / DESIGN).read_text(encoding="utf-8"))
    arms = read_arms(results / design["folder"], design["arms"])
    tuned = {arm: max(by_lr, key=lambda lr: len(by_lr[lr])) for arm, by_lr in arms.items() if by_lr}
    runs = {arm: arms[arm][lr] for arm, lr in tuned.items()}
    lines = [f"<!-- Written by scripts/trial.py from the records named in {DESIGN}; do not edit. -->", ""]
    lines += ["# What came out of the trial", ""]
    lines += [INTRODUCTION, ""]
    if not runs:
        return "\n".join([*lines, "No record yet.", ""])
    lines += [*arm_lines(runs, tuned, design["first_look"]), "", "## Loss at the end", ""]
    lines += [loss_table(runs, design["loss"], design["margin"]), "", "## Rows whose leverage stays low", ""]
    lines += [leverage_table(runs, design["leverage"], design["first_look"]), "", "## Half and twice the lr", ""]
    return "\n".join([*lines, robustness_table(arms, tuned, design["robust"]), ""])


def read_arms(folder: Path, names: Sequence[str]) -> Arms:
    runs, errors = read_folder(folder) if folder.is_dir() else ([], [])
    if errors:
        raise ValueError(str(errors[0]))
    arms: Arms = {name: {} for name in names}
    for run in runs:
        if run.start["optimizer"] in arms and run.end is not None:
            by_seed = arms[run.start["optimizer"]].setdefault(run.start["hparams"]["lr"], {})
            by_seed[run.start["seed"]] = run
    if len(tasks := {run.start["task_hash"] for run in runs}) > 1:
        raise ValueError(f"{folder} holds runs of {len(tasks)} tasks")
    return arms


def losses(runs: Mapping[int, Run]) -> dict[int, float]:
    return {seed: run.end_event["val_loss"] if run.is_done else math.inf for seed, run in runs.items()}


def has_diverged(runs: Mapping[int, Run]) -> bool:
    return sum(not run.is_done for run in runs.values()) > MOST_DIVERGED


def shares(runs: Mapping[int, Run], first_look: int) -> dict[int, float]:
    return {seed: 100 * persistent_share(run, first_look) for seed, run in runs.items() if run.is_done}


def arm_lines(runs: Mapping[str, Mapping[int, Run]], tuned: Mapping[str, float], first_look: int) -> list[str]:
    rows = []
    for arm, of_arm in runs.items():
        known = [loss for loss in losses(of_arm).values() if math.isfinite(loss)]
        low, high, _ = mean_interval(known) if known else (math.nan, math.nan, "")
        momentum = next(iter(of_arm.values())).start["hparams"].get("momentum", "-")
        share = np.mean(list(shares(of_arm, first_look).values())) if known else math.nan
        loss = f"{np.mean(known):.4f} [{low:.4f}, {high:.4f}]" if known else "-"
        rows.append((cell(arm), f"{tuned[arm]:g}", cell(momentum), f"{len(known)}/{len(of_arm)}", loss, f"{share:.2f}"))
    low_rows = f"rows of low leverage from step {first_look} on (%)"
    return [markdown_table(("arm", "lr", "momentum", "finished", "loss at the end [95 %]", low_rows), rows)]


def difference_cells(found: Paired, digits: int) -> tuple[str, str, str]:
    interval = f"{found.mean:+.{digits}f} [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"
    return str(found.n), interval if found.n else "no pair yet", f"{found.effect:+.2f}"


def pairs_of(runs: Mapping[str, Mapping[int, Run]], pairs: Sequence[Sequence[str]], value: Any) -> list[Paired]:
    """Of each pair of arms; one of which an arm has diverged, or has no run, is empty."""
    return [
        paired({}, {}) if any(has_diverged(runs.get(arm, {})) for arm in (a, b)) else paired(value(a), value(b))
        for a, b in pairs
    ]


def loss_table(runs: Mapping[str, Mapping[int, Run]], pairs: Sequence[Sequence[str]], margin: float) -> str:
    found = pairs_of(runs, pairs, lambda arm: losses(runs.get(arm, {})))
    rows = []
    for (a, b), difference, (p, word) in zip(pairs, found, judged(found, margin, ALPHA), strict=True):
        word = "diverged" if any(has_diverged(runs.get(arm, {})) for arm in (a, b)) else word
        rows.append((f"{cell(a)} - {cell(b)}", *difference_cells(difference, 4), f"{p:.2g}", word))
    return markdown_table(("losses", "pairs", "nats [95 %]", "effect", "p", "verdict"), rows)


def leverage_table(runs: Mapping[str, Mapping[int, Run]], pairs: Sequence[Sequence[str]], first_look: int) -> str:
    found = pairs_of(runs, pairs, lambda arm: shares(runs.get(arm, {}), first_look))
    p_values = holm([difference.p for difference in found])
    rows = []
    for (a, b), difference, p in zip(pairs, found, p_values, strict=True):
        word = ("more" if difference.mean > 0 else "fewer") if p < ALPHA else "undecided"
        rows.append((f"{cell(a)} - {cell(b)}", *difference_cells(difference, 2), f"{p:.2g}", word))
    return markdown_table(("shares of rows", "pairs", "points [95 %]", "effect", "p", "verdict"), rows)


def robustness_table(arms: Arms, tuned: Mapping[str, float], robust: Sequence[str]) -> str:
    rows = []
    for arm in (arm for arm in robust if arm in tuned):
        at_best = losses(arms[arm][tuned[arm]])
        for factor in (0.5, 2.0):
            lr = next((lr for lr in arms[arm] if math.isclose(lr, factor * tuned[arm], rel_tol=1e-3)), None)
            difference = paired(losses(arms[arm][lr]), at_best) if lr is not None else paired({}, {})
            rows.append((cell(arm), f"{factor:g}", *difference_cells(difference, 4)))
    return markdown_table(("arm", "times the lr", "pairs", "loss above that at the tuned lr [95 %]", "effect"), rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if the page is stale")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of the design and the page")
    args = parser.parse_args(argv)
    path = args.results / PAGE
    try:
        text = page(args.results)
        if args.check:
            if path.is_file() and path.read_text(encoding="utf-8") == text:
                return 0
            print(f"error: {path} is not what the records give: python scripts/trial.py", file=sys.stderr)
            return 1
        path.write_text(text, encoding="utf-8")
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"error: {error!r}: is {args.results / DESIGN} right, and are its records whole?", file=sys.stderr)
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
