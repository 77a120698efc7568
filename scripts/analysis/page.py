"""The text of results/README.md: one section for each task, from the runs of its records."""

import json
import math
import re
import statistics
import tomllib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from aurora.trainer.record import LATER_SETTINGS, Run, model_of
from scripts.analysis.report import LONG, PAIR_HEADER, as_p, pair_cells, remarks, to_target
from scripts.analysis.statistics import MIN_RUNS, common_step, gate, t_below
from scripts.analysis.text import cell, markdown_table
from scripts.analysis.verdict import Group, Pair, compare_pairs, label_groups, mean_loss, stack_of

NOTES = "notes.md"


def folder_of(run: Run, results: Path) -> str:
    """The first folder below results: one experiment, whose runs were made to be compared."""
    return run.path.relative_to(results).parts[0]


def is_tuning(run: Run, results: Path) -> bool:
    return any(part.endswith("_tuning") for part in run.path.relative_to(results).parts[:-1])


def setting_family(run: Run) -> str:
    """What a tuning trial has in common with the runs that profit from it: model, data, batch, rule and its form."""
    config, data = run.start["config"], run.start["data"]["stream_id"]
    return json.dumps([model_of(config), config["train"]["batch_tokens"], data, run.start["optimizer"], variant(run)])


def variant(run: Run) -> str | None:
    """The form of a rule that has several. Aurora had one, before the setting existed."""
    return run.start["hparams"].get("variant", "iterated" if run.start["optimizer"] == "aurora" else None)


def make_groups(runs: Iterable[Run], results: Path) -> list[Group]:
    """Runs of one task by rule, setting, code, hardware and folder; those that arrive first come first."""
    by_row: dict[tuple, list[Run]] = {}
    for run in runs:
        setting = run.start["optimizer"], json.dumps(run.setting, sort_keys=True)
        key = setting, run.start["code_hash"], stack_of(run), folder_of(run, results)
        by_row.setdefault(key, []).append(run)
    return label_groups(by_row.values())


def hardware(run: Run) -> str:
    env = run.start["env"]
    cpus = env.get("usable_cpus", env.get("cpu_count", "?"))
    threads = f", {cpus} CPUs, {env['torch_threads']} threads" if run.start["device"] == "cpu" else ""
    versions = [f"torch {env['torch']}", *filter(None, [env.get("cuda") and f"CUDA {env['cuda']}"])]
    compiled = ["compiled" if run.start.get("compiled") else "not compiled"] if run.start["device"] != "cpu" else []
    return ", ".join([f"{run.start['world_size']} x {env['device_name']}{threads}", *versions, *compiled])


HEADER = (
    *("row", "rule", "steps", "n", "reached", "steps to target [95 %]", "seconds to target [95 %]"),
    *("machine", "tuning trials", "experiment"),
)
EVIDENCE_HEADER = (
    *("row", "val loss at the end", "sd", "margin", "p below target", "gate from step", "date", "commit", "code"),
    "records by seed",
)


def letter(index: int) -> str:
    """A, B, ... Z, A1, B1, ..."""
    return chr(ord("A") + index % 26) + (str(index // 26) if index > 25 else "")


def unlike_first(run: Run) -> dict[str, Any]:
    """The settings by which a track's model is not the one that the track was made for."""
    return {key: value for key, value in model_of(run.start["config"]).items() if key in LATER_SETTINGS}


def by_task(runs: Iterable[Run], results: Path) -> dict[str, list[Run]]:
    """Runs by task_hash, without tuning trials."""
    tasks: dict[str, list[Run]] = {}
    for run in runs:
        if not is_tuning(run, results):
            tasks.setdefault(run.start["task_hash"], []).append(run)
    return tasks


def changes_of_track(run: Run) -> dict[str, Any]:
    """What the command changed of the track's model and evaluation: tasks of one track differ in it."""
    try:
        track = tomllib.loads(run.start["sources"][config_name(run)])
    except (KeyError, TypeError, tomllib.TOMLDecodeError):
        track = {}
    config, found = run.start["config"], unlike_first(run)
    for name in ("model", "eval"):
        theirs, own = track.get(name), config.get(name)
        if isinstance(theirs, dict) and isinstance(own, dict):
            found |= {key: own[key] for key in theirs if key != "target" and own.get(key, theirs[key]) != theirs[key]}
    return found


class Page:
    """The text, and the groups of each picture that it shows."""

    def __init__(self, results: Path, runs: Sequence[Run]):
        self.results = results
        self.trials = [run for run in runs if is_tuning(run, results)]
        self.links: dict[str, str] = {}
        self.pictures: dict[Path, list[Group]] = {}
        self.noted: set[str] = set()
        tasks = by_task(runs, results)
        lines = ["<!-- Written by scripts/leaderboard.py from the records and notes.md; edit those. -->", ""]
        lines += ["# Results", "", *notes(results)]
        for task in sorted(tasks, key=lambda task: max(run.start["utc"] for run in tasks[task]), reverse=True):
            lines += [*self.task_section(task, tasks[task]), ""]
        lines += reference_section(tasks, results)
        for folder in sorted({folder_of(run, results) for run in self.trials}):
            inside = [run for run in runs if folder_of(run, results) == folder]
            lines += [f"## {cell(folder)}", "", *notes(results / folder), tuning_table(inside), ""]
        lines += [f"[{name}]: {target}" for name, target in self.links.items()]
        self.text = "\n".join(lines).rstrip("\n") + "\n"

    def task_section(self, task: str, runs: Sequence[Run]) -> list[str]:
        """Heading, leaderboard, and for each folder its notes, curves and tests."""
        groups, batch_tokens = make_groups(runs, self.results), runs[0].start["config"]["train"]["batch_tokens"]
        machines = list({stack_of(group.runs[0]): hardware(group.runs[0]) for group in groups}.items())
        stacks = [stack for stack, _ in machines]
        track = ", ".join(sorted({Path(config_name(run)).stem for run in runs}))
        variation = "".join(f", {cell(key)} {cell(value)}" for key, value in changes_of_track(runs[0]).items())
        numbered = list(enumerate(groups, start=1))
        lines = [
            f"## {cell(track)}{variation}: target {runs[0].target:g}, {batch_tokens:,} tokens a step",
            "",
            f"Task {cell(task[:12])}. Seconds compare within one folder only, of runs of one command.",
            "",
            *(f"- machine {letter(i)}: {cell(name)}" for i, (_, name) in enumerate(machines)),
            "",
            markdown_table(HEADER, [self.row(i, group, stacks) for i, group in numbered]),
            "",
            "The records behind these rows, and whether each rule is below the target at its last step:",
            "",
            markdown_table(EVIDENCE_HEADER, [self.evidence(i, group) for i, group in numbered]),
        ]
        sections = by_folder(groups, self.results)
        # The widest comparison comes first.
        for folder in sorted(sections, key=lambda name: (-len({group.optimizer for group in sections[name]}), name)):
            lines += self.folder_section(folder, sections[folder])
        return lines

    def folder_section(self, folder: str, groups: list[Group]) -> list[str]:
        picture = picture_of(groups, self.results)
        self.pictures[picture] = groups
        text = notes(self.results / folder)
        if text and folder in self.noted:
            text = ["Notes and command: above.", ""]
        self.noted.add(folder)
        link = quote(picture.relative_to(self.results).as_posix())
        lines = ["", f"### {cell(folder)}", "", *text, f"![validation loss of {cell(folder)}]({link})", ""]
        if pairs := compare_pairs(groups):
            lines += [markdown_table(PAIR_HEADER, [escaped_pair(pair) for pair in pairs]), ""]
        return lines + [f"- {cell(remark, LONG)}" for remark in remarks(groups, pairs)]

    def row(self, number: int, group: Group, machines: Sequence[tuple]) -> tuple[str, ...]:
        """Cells under HEADER, as Markdown."""
        found, run = group.steps_to_target(), group.runs[0]
        begin = min(run.start["utc"] for run in group.runs)  # later trials chose settings of other rows
        family = setting_family(run)
        num_trials = sum(setting_family(trial) == family and trial.start["utc"] <= begin for trial in self.trials)
        folder = folder_of(run, self.results)
        return (
            str(number),
            cell(group.label),
            str(group.planned_steps),
            str(len(group.runs)),
            f"{found.count}/{found.runs}",
            to_target(found, 1),
            to_target(group.seconds_to_target(), 1),
            letter(machines.index(stack_of(run))),
            str(num_trials),
            cell(folder),
        )

    def evidence(self, number: int, group: Group) -> tuple[str, ...]:
        """Cells under EVIDENCE_HEADER. Links are by reference, or the table could not be read as text."""
        run, losses = group.runs[0], group.losses(group.last_step)
        looks = [{look.step: look.val_loss for look in run.validations} for run in group.runs]
        is_whole, step = len(losses) == len(group.runs), common_step(looks, run.target)
        commits = {(run.start.get("git") or {}).get("commit", "")[:8] for run in group.runs}
        is_dirty = any((run.start.get("git") or {}).get("dirty") for run in group.runs)
        seeds = []
        for found in group.runs:
            name = f"r{len(self.links) + 1}"
            self.links[name] = quote(found.path.relative_to(self.results).as_posix())
            seeds.append(f"[{cell(found.start['seed'])}][{name}]")
        return (
            str(number),
            f"{mean_loss(group):.4f}" if math.isfinite(mean_loss(group)) else "-",
            "-" if len(losses) < 2 else f"{statistics.stdev(losses):.4f}",
            f"{gate(losses, run.target).margin:+.4f}" if is_whole and len(losses) >= MIN_RUNS else "-",
            cell(as_p(t_below(losses, run.target))) if is_whole else "-",
            "-" if step is None else str(step),
            cell(max(run.start["utc"] for run in group.runs)[:10]),
            cell(" ".join(sorted(commits))) + (", changed" if is_dirty else ""),
            cell(run.start["code_hash"][:8]),
            " ".join(seeds),
        )


def escaped_pair(pair: Pair) -> list[str]:
    name, *numbers, words = pair_cells(pair)
    return [cell(name), *(text.replace("<", "&lt;") for text in numbers), cell(words, LONG)]


def by_folder(groups: Iterable[Group], results: Path) -> dict[str, list[Group]]:
    """Groups of one task by the folder of their runs, with labels that tell them apart there."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        found.setdefault(folder_of(group.runs[0], results), []).append(group)
    tables = {folder: label_groups(group.runs for group in inside) for folder, inside in found.items()}
    for inside in tables.values():
        tell_apart(inside)
    return tables


def tell_apart(groups: Sequence[Group]) -> None:
    """Groups that differ in code or machine alone get their folder or code into the label."""
    counts = Counter(group.label for group in groups)
    for group in groups:
        if counts[group.label] > 1:
            group.label += f" ({group.runs[0].path.parent.name}, code {group.runs[0].start['code_hash'][:8]})"


def config_name(run: Run) -> str:
    """The track's file, which is the one source that is no Python."""
    return next((name for name in run.start["sources"] if name.endswith(".toml")), "unknown track")


def notes(folder: Path) -> list[str]:
    path = folder / NOTES
    return [path.read_text(encoding="utf-8").strip(), ""] if path.is_file() else []


def reference_section(tasks: dict[str, list[Run]], results: Path) -> list[str]:
    """Public results of the same tasks beside ours."""
    path = results / "reference.toml"
    if not path.is_file():
        return []
    lines = []
    for track in tomllib.loads(path.read_text(encoding="utf-8"))["track"]:
        rows = [
            (entry["rule"], str(entry["steps"]), f"{entry['mean']:.4f}", str(entry["n"]), f"row {entry['row']}")
            for entry in track["result"]
        ]
        same = ("target", "batch_tokens", "vocab_size")
        for runs in tasks.values():
            config = runs[0].start["config"]
            own = runs[0].target, config["train"]["batch_tokens"], config["model"]["vocab_size"]
            if own == tuple(track[key] for key in same) and not unlike_first(runs[0]):
                for group in make_groups(runs, results):
                    steps, mean = to_target(group.steps_to_target(), 0), f"{mean_loss(group):.4f}"
                    rows.append((cell(group.label), steps, mean, str(len(group.runs)), "ours"))
        lines += [f"## Public results: {track['name']}", "", track["text"].strip(), ""]
        lines += [markdown_table(("rule", "steps", "mean loss", "n", "source"), rows), ""]
        if not any(cells[-1] == "ours" for cells in rows):
            lines += ["No run of ours on this task is recorded yet.", ""]
    return lines


def tuning_table(runs: Sequence[Run]) -> str:
    """For each rule its number of trials and the best of them."""
    families: dict[str, list[Run]] = {}
    for run in runs:
        families.setdefault(setting_family(run), []).append(run)
    rows = []
    for trials in families.values():
        ranked = sorted((run for run in trials if run.is_done), key=lambda run: run.end_event["val_loss"])
        keys = [k for k in trials[0].start["hparams"] if len({repr(r.start["hparams"].get(k)) for r in trials}) > 1]
        words = [", ".join(f"{key} {run.start['hparams'].get(key)}" for key in keys) for run in ranked[:2]]
        name = " ".join([trials[0].start["optimizer"], *filter(None, [trials[0].start["hparams"].get("variant")])])
        cells = [
            cell
            for run, text in zip(ranked, words, strict=False)
            for cell in (text, f"{run.end_event['val_loss']:.4f}")
        ]
        cells += ["-"] * (4 - len(cells))
        seeds = " ".join(str(seed) for seed in sorted({run.start["seed"] for run in trials}))
        rows.append([cell(text) for text in (name, len(trials), seeds, *cells)])
    return markdown_table(("rule", "trials", "seed", "best", "loss", "next best", "loss"), sorted(rows))


def picture_of(groups: Sequence[Group], results: Path) -> Path:
    """Path of the curves of one task in one folder."""
    task = re.sub("[^0-9a-f]", "", groups[0].runs[0].start["task_hash"])[:8]
    return results / folder_of(groups[0].runs[0], results) / f"curves-{task}.png"
