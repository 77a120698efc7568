"""Does the laptop predict the board? Writes results/PREDICTION.md and its plots from records.

    python scripts/prediction.py              write the page
    python scripts/prediction.py --check      exit 1 if it is not what the records give

results/prediction.toml names the rules, each with its row of the public board (results/reference.toml) and its half,
and the tracks that were tried, each with its folder of records. scripts/analysis/prediction.py has the
statistics.
"""

import hashlib
import json
import math
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

from aurora.console import run_script
from aurora.trainer.record import Run, read_folder
from scripts.analysis.prediction import FEWEST_RULES, Agreement, agreement
from scripts.analysis.report import with_interval
from scripts.analysis.statistics import mean_of
from scripts.analysis.text import cell, markdown_table
from scripts.analysis.written import Picture, Written, page_command

PAGE, EVIDENCE = "PREDICTION.md", "prediction.toml"
HALVES = ("design", "confirmation")
INTRODUCTION = """\
Do optimizers come in the same order on a laptop as on eight GPUs? For each rule, the public board states after how many
steps it reaches its target. On each laptop track below every rule was tuned with the same number of trials, and then
run with seeds that tuning had not seen.

- *rho* is Spearman's: 1 if both orders are the same, 0 if they have nothing to do with each other.
- The order here is that of the mean *loss at the end* of equally long schedules. Beside it stands the order by *steps*
  to a loss that every run reaches: the highest that a run ends with. Steps between two validations are interpolated.
- Brackets hold 95 %: rules drawn anew, each with its seeds drawn anew. *p* is the share of random orders that agree as
  well.
- Where a table has one run of each rule, that is the best trial of its search.
- *Repeat* is the rho between two measurements of the same track with other seeds: noise allows no more.
- The rules of the *design* half alone decide which track is taken. Losses of the *confirmation* half in the first
  search, and their rho, were known by then; those of the runs that follow were not."""


class Page:
    """The text, and the plots that it shows."""

    def __init__(self, results: Path):
        evidence = tomllib.loads((results / EVIDENCE).read_text(encoding="utf-8"))
        board = board_steps(results)
        self.rules = {rule["optimizer"]: rule for rule in evidence["rule"]}
        for rule in self.rules.values():
            if rule["half"] not in HALVES:
                raise ValueError(f"half of {rule['optimizer']} must be {' or '.join(HALVES)}, got {rule['half']!r}")
        self.steps = {name: board[str(rule["row"])] for name, rule in self.rules.items()}
        self.pictures: dict[Path, Picture] = {}
        rows, sections = [], []
        for track in evidence["track"]:
            orders, section = self.track(results, **track)
            rows += [
                (track["title"], title, *(self.cells(values, half) for half in (*HALVES, None)))
                for title, values in orders.items()
            ]
            sections += section
        header = ("track", "order here by", *(f"{half} half" for half in HALVES), "all rules")
        lines = [f"<!-- Written by scripts/prediction.py from the records named in {EVIDENCE}; do not edit. -->", ""]
        lines += ["# Does the laptop predict the board?", "", INTRODUCTION, "", evidence["verdict"].strip(), ""]
        self.text = "\n".join([*lines, markdown_table(header, rows), "", *sections])

    def of_half(self, values: dict[str, list[float]], half: str | None) -> Agreement | None:
        chosen = {name: values[name] for name in values if half in (None, self.rules[name]["half"])}
        return agreement(chosen, {name: self.steps[name] for name in chosen}) if len(chosen) >= FEWEST_RULES else None

    def cells(self, values: dict[str, list[float]], half: str | None) -> str:
        found = self.of_half(values, half)
        if found is None:
            return "too few rules"
        low, high, _ = found.interval
        repeat = f", repeat {found.repeat:.2f}" * any(len(of_rule) > 1 for of_rule in values.values())
        return f"rho {found.rho:.2f} [{low:.2f}, {high:.2f}], p {found.p:.2g}{repeat}"

    def track(
        self, results: Path, title: str, folder: str, command: str, note: str
    ) -> tuple[dict[str, dict[str, list[float]]], list[str]]:
        """What orders the rules, by its name: values of each rule, one for each seed; and the section of one track."""
        runs, errors = read_folder(results / folder) if (results / folder).is_dir() else ([], [])
        if errors:
            raise ValueError(str(errors[0]))
        runs = [run for run in runs if run.start["optimizer"] in self.rules and run.end is not None]
        if is_search := folder.endswith("_tuning"):
            runs = best_of_each(runs)
        if len(tasks := {run.start["task_hash"] for run in runs}) > 1:
            raise ValueError(f"{folder} holds runs of {len(tasks)} tasks, which no order can compare")
        losses: dict[str, list[float]] = {}
        steps: dict[str, list[float]] = {}
        level = max((run.end_event["val_loss"] for run in runs if run.is_done), default=math.nan)
        for run in sorted(runs, key=lambda run: run.start["seed"]):
            losses.setdefault(run.start["optimizer"], []).append(final_loss(run))
            steps.setdefault(run.start["optimizer"], []).append(steps_to(level, run))
        lines = [f"## {title}", "", note.strip(), "", *(f"    {line}" for line in command.strip().splitlines()), ""]
        if not losses:
            return {}, [*lines, "No record yet.", ""]
        path = results / folder / "prediction.png"
        digest = hashlib.sha256(json.dumps([title, losses, self.steps], sort_keys=True).encode()).hexdigest()
        self.pictures[path] = Picture(digest, lambda path, digest: self.draw(path, digest, title, losses))
        by_steps = f"steps to {level:.4f}"
        orders = {"loss at the end": losses, by_steps: steps}
        columns: dict[str, Callable[[str], str]] = {
            "optimizer": cell,
            "runs": lambda name: str(len(losses[name])),
            "mean loss at the end [95 %]": lambda name: with_interval(*mean_of(losses[name]), 4),
            by_steps: lambda name: f"{np.mean(steps[name]):.0f}",
            "steps on the board": lambda name: f"{self.steps[name]:,}",
            "row": lambda name: str(self.rules[name]["row"]),
            "half": lambda name: self.rules[name]["half"],
        }
        if is_search:  # without validations on the way, and of one run each
            del columns[by_steps], orders[by_steps]
        names = sorted(losses, key=lambda name: float(np.mean(losses[name])))
        rows = [tuple(column(name) for column in columns.values()) for name in names]
        links = f"[plot]({folder}/prediction.png), [details]({folder}/README.md)"
        return orders, [*lines, markdown_table(tuple(columns), rows), "", links, ""]

    def draw(self, path: Path, digest: str, title: str, losses: dict[str, list[float]]) -> None:
        """Loss here against steps there, a dot for each rule."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        from scripts.plot import save_figure

        figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
        for half, marker in zip(HALVES, "os", strict=True):
            names = [name for name in losses if self.rules[name]["half"] == half]
            means = [np.mean(losses[name]) for name in names]
            axis.plot([self.steps[name] for name in names], means, marker, label=f"{half} half")
            for name, mean in zip(names, means, strict=True):
                axis.annotate(name, (self.steps[name], mean), xytext=(4, 4), textcoords="offset points", fontsize=8)
        axis.set(xlabel="steps to the target on the board", ylabel="mean loss at the end here (nats)", title=title)
        axis.set_xscale("log")
        axis.legend()
        save_figure(figure, path, digest)
        plt.close(figure)


def best_of_each(runs: list[Run]) -> list[Run]:
    """Of a search, the run of each optimizer with the lowest loss at its end."""
    best: dict[str, Run] = {}
    for run in runs:
        name = run.start["optimizer"]
        if name not in best or final_loss(run) < final_loss(best[name]):
            best[name] = run
    return list(best.values())


def final_loss(run: Run) -> float:
    """Infinite where training diverged."""
    return run.end_event["val_loss"] if run.is_done else float("inf")


def steps_to(level: float, run: Run) -> float:
    """The step at which the validation loss came down to level, interpolated; infinite where it never did."""
    before = None
    for now in run.validations:
        if now.val_loss <= level:
            share = (before.val_loss - level) / (before.val_loss - now.val_loss) if before else 1.0
            return now.step - (1 - share) * (now.step - before.step) if before else float(now.step)
        before = now
    return math.inf


def board_steps(results: Path) -> dict[str, int]:
    """Steps to the target that the board states, by row, or by pull request."""
    reference = tomllib.loads((results / "reference.toml").read_text(encoding="utf-8"))
    rows = [entry for track in reference["track"] for entry in track["result"]]
    return {str(entry.get("row", entry.get("pull"))): entry["steps"] for entry in rows}


def page(results: Path) -> Written:
    made = Page(results)
    return Written(made.text, made.pictures)


def main(argv: list[str] | None = None) -> int:
    return page_command("prediction.py", __doc__, PAGE, EVIDENCE, page, argv)


if __name__ == "__main__":
    sys.exit(run_script(main))
