"""The page of all results, results/README.md, computed from the records beside it.

    python scripts/leaderboard.py                write the page and its curves
    python scripts/leaderboard.py --check        exit 1 if they are not what the records give
    python scripts/leaderboard.py add DIR        check the records in DIR and copy them to results/<name of DIR>

One section for each task_hash: a row for each rule, setting, code, hardware and folder. Records in a folder whose name
ends with _tuning are no rows, they count as tuning budget. Text by hand comes from notes.md in results/ and its
folders, public results from reference.toml.
"""

import argparse
import hashlib
import json
import math
import os
import re
import statistics
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from aurora.trainer.record import LATER_SETTINGS, RecordError, Run, model_of, read_record
from scripts.analysis.report import LONG, PAIR_HEADER, as_p, pair_cells, remarks, to_target
from scripts.analysis.statistics import MIN_RUNS, common_step, gate, t_below
from scripts.analysis.text import cell, markdown_table, plain
from scripts.analysis.verdict import Group, Pair, compare_pairs, label_groups, mean_loss, stack_of
from scripts.verification.checks import verify_folder

PAGE, NOTES = "README.md", "notes.md"


def read_results(results: Path) -> list[Run]:
    """All records below a folder, in order of their names.

    Raises:
        RecordError: one cannot be read, or lies outside the folder behind a link.
    """
    runs = []
    for path in sorted(results.rglob("*.jsonl")):
        if not path.resolve().is_relative_to(results.resolve()):
            raise RecordError(f"{path} leads out of {results}; copy the file itself")
        run = read_record(path)
        run.train_events = run.train_events[-1:]  # the page needs none, and there are thousands
        runs.append(run)
    return runs


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


# ----------------------------------------------------------------------------------------------------------------------
# The page

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
        tables = track.get(name), config.get(name)
        if all(isinstance(table, dict) for table in tables):
            theirs, own = tables
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
        ranked = sorted((run for run in trials if run.is_done), key=lambda run: run.end["val_loss"])
        keys = [k for k in trials[0].start["hparams"] if len({repr(r.start["hparams"].get(k)) for r in trials}) > 1]
        words = [", ".join(f"{key} {run.start['hparams'].get(key)}" for key in keys) for run in ranked[:2]]
        name = " ".join([trials[0].start["optimizer"], *filter(None, [trials[0].start["hparams"].get("variant")])])
        cells = [
            cell for run, text in zip(ranked, words, strict=False) for cell in (text, f"{run.end['val_loss']:.4f}")
        ]
        cells += ["-"] * (4 - len(cells))
        seeds = " ".join(str(seed) for seed in sorted({run.start["seed"] for run in trials}))
        rows.append([cell(text) for text in (name, len(trials), seeds, *cells)])
    return markdown_table(("rule", "trials", "seed", "best", "loss", "next best", "loss"), sorted(rows))


# ----------------------------------------------------------------------------------------------------------------------
# Files


def picture_of(groups: Sequence[Group], results: Path) -> Path:
    """Path of the curves of one task in one folder."""
    task = re.sub("[^0-9a-f]", "", groups[0].runs[0].start["task_hash"])[:8]
    return results / folder_of(groups[0].runs[0], results) / f"curves-{task}.png"


def digest(groups: Iterable[Group]) -> str:
    """Of all values that a picture shows. It is written into the file, whose bytes depend on matplotlib's version."""
    values = [
        (group.label, group.steps_to_target(), [(run.target, run.validations) for run in group.runs])
        for group in groups
    ]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def stale_files(results: Path, page: Page) -> list[Path]:
    """The page and its pictures, as far as they are not what the records give."""
    path = results / PAGE
    stale = [] if path.is_file() and path.read_text(encoding="utf-8") == page.text else [path]
    for path, groups in page.pictures.items():
        if not path.is_file() or digest(groups).encode() not in path.read_bytes():
            stale.append(path)
    return stale


def write(results: Path, page: Page) -> None:
    from scripts.plot import plot_groups

    for path in page.pictures.keys() & set(stale_files(results, page)):
        plot_groups(page.pictures[path], path, description=digest(page.pictures[path]))
    (results / PAGE).write_text(page.text, encoding="utf-8")


def add(source: Path, results: Path) -> list[Path]:
    """Copy the records of a folder to results/<its name>; all of them or, with an error, none.

    Raises:
        RecordError: one is refuted by scripts/verification/checks.py, is not whole, or is there already.
    """
    runs = [read_record(path) for path in sorted(source.rglob("*.jsonl")) if not path.is_symlink()]
    if not runs:
        raise RecordError(f"{source} holds no record")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", source.resolve().name):
        raise RecordError(f"{source}: the name of the folder is to be of letters, digits, '.', '_' and '-'")
    known = {tuple(run.validations): run.path for run in read_results(results)}
    refuted = {verdict.path: verdict.reasons[0] for verdict in verify_folder(source) if verdict.reasons}
    copies = {}
    for run in runs:
        if run.end is None:
            raise RecordError(f"{run.path} has no end event; end the run, or record why it was cut short")
        if tuple(run.validations) in known:
            raise RecordError(f"{run.path} has the losses and times of {known[tuple(run.validations)]}")
        if run.path in refuted:
            raise RecordError(f"{run.path} is refuted: {refuted[run.path]}")
        known[tuple(run.validations)] = run.path
        target = results / source.resolve().name / run.path.relative_to(source)
        if target.exists():
            raise RecordError(f"{target} exists; rename {run.path}")
        copies[run.path] = target
    copy_all(copies)
    return list(copies.values())


def copy_all(copies: dict[Path, Path]) -> None:
    """Copy files, all of them or, with an error, none. A target gets its name when all are whole and on the disk."""
    temporary = {target: target.with_name(f"{target.name}.tmp") for target in copies.values()}
    try:
        for path, target in copies.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary[target], "wb") as file:
                file.write(path.read_bytes())
                file.flush()
                os.fsync(file.fileno())
        for target, whole in temporary.items():
            whole.rename(target)
    except BaseException:
        for path in (*temporary, *temporary.values()):
            path.unlink(missing_ok=True)
        raise


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=("write", "add"), default="write")
    parser.add_argument("folder", nargs="?", type=Path, metavar="DIR", help="of add: the new records")
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if the page is stale")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of the records and the page")
    args = parser.parse_args(argv)
    if (args.command == "add") != (args.folder is not None):
        parser.error("add needs the folder of the new records, nothing else takes one")
    if not args.results.is_dir():
        print(f"error: there is no folder {args.results}", file=sys.stderr)
        return 2
    try:
        if args.command == "add":
            for path in add(args.folder, args.results):
                print(path)
        page = Page(args.results, read_results(args.results))
        if args.check:
            stale = stale_files(args.results, page)
            for path in stale:
                print(f"error: {path} is not what the records give: python scripts/leaderboard.py", file=sys.stderr)
            return 1 if stale else 0
        write(args.results, page)
    except (RecordError, OSError, tomllib.TOMLDecodeError) as error:
        print(f"error: {plain(error, 500)}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"error: {error}; pip install -e '.[report]'", file=sys.stderr)
        return 2
    except (KeyError, TypeError, AttributeError) as error:
        print(f"error: a record lacks what the page shows ({error!r}); see scripts/verify.py", file=sys.stderr)
        return 2
    print(args.results / PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
