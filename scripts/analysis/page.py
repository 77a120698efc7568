"""The pages of results: results/README.md with a section for each experiment, and one page of details a folder.

Notes by hand, notes.md in results/ and its folders: a title, a first paragraph that says in a sentence what it is, and
the rest. The main page shows titles and first paragraphs, the page of a folder all of its notes.
"""

import html
import json
import math
import re
import statistics
import tomllib
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from aurora.trainer.events import RecordError
from aurora.trainer.identity import LATER_SETTINGS, model_of, shards_of
from aurora.trainer.record import Run
from scripts.analysis import board
from scripts.analysis.report import LONG, PAIR_HEADER, as_p, pair_cells, remarks, to_target
from scripts.analysis.statistics import MIN_RUNS, common_step, gate, repeated_seeds, t_below
from scripts.analysis.text import cell, markdown_table
from scripts.analysis.verdict import (
    Group,
    Pair,
    by_task,
    compare_pairs,
    label_groups,
    mean_loss,
    order_of_arrival,
    stack_of,
    twins,
)

PAGE, NOTES, REFERENCE_PAGE = "README.md", "notes.md", "REFERENCE.md"
MAIN = "quick"  # the folder of the main track
MOST_TABLES = 5  # on the main page: all or none of an experiment, the first experiments first
WRITTEN = "<!-- Written by scripts/leaderboard.py from the records and notes.md; edit those. -->"
WRITTEN_FROM_REFERENCE = "<!-- Written by scripts/leaderboard.py from reference.toml; edit that. -->"
HOW_CHECKED = (
    "The columns from *runs found* on are what `scripts/logs.py --reference` reads in the logs: how many runs, their "
    "mean loss at the stated step, and the first step with a loss of every run at which the public rule, "
    "(target - mean) sqrt(n) >= 0.004, is met by three runs or more."
)


def folder_of(run: Run, results: Path) -> str:
    """The first folder below results: one experiment, whose runs were made to be compared."""
    return run.path.relative_to(results).parts[0]


def is_tuning(run: Run, results: Path) -> bool:
    return any(part.endswith("_tuning") for part in run.path.relative_to(results).parts[:-1])


def setting_family(run: Run) -> str:
    """What a tuning trial has in common with the runs that profit from it: model, data, batch, rule and its form.

    Of the data its first shard: a trial may have fewer steps, or another number of validation tokens.
    """
    config, data = run.start["config"], shards_of(run.start)[:1] or run.start["data"]["stream_id"]
    return json.dumps([model_of(config), config["train"]["batch_tokens"], data, run.start["optimizer"], variant(run)])


def variant(run: Run) -> str | None:
    """The form of a rule that has several. Aurora had one, before the setting existed."""
    return run.start["hparams"].get("variant", "iterated" if run.start["optimizer"] == "aurora" else None)


class Notes(NamedTuple):
    """What is written by hand of a folder, in Markdown. summary: the first paragraph, on one line."""

    title: str
    summary: str
    rest: str


def read_notes(folder: Path) -> Notes:
    path = folder / NOTES
    text = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    title = cell(folder.name)
    if text.startswith("# "):
        title, _, text = text.removeprefix("# ").partition("\n")
    summary, _, rest = text.strip().partition("\n\n")
    return Notes(title, " ".join(summary.split()), rest.strip("\n"))


class Table(NamedTuple):
    """The groups of one task in one folder, and their tests."""

    task: str
    folder: str
    groups: list[Group]
    pairs: list[Pair]

    @property
    def first_run(self) -> Run:
        return self.groups[0].runs[0]

    @property
    def num_runs(self) -> int:
        return sum(len(group.runs) for group in self.groups)

    @property
    def begin(self) -> str:
        return min(run.start["utc"] for group in self.groups for run in group.runs)


def make_tables(runs: Iterable[Run], results: Path) -> list[Table]:
    """Runs by task and folder, there by optimizer, setting, code and hardware; without tuning trials."""
    found: dict[tuple[str, str], dict[tuple, list[Run]]] = {}
    tasks = by_task(run for run in runs if not is_tuning(run, results))
    for task, run in ((task, run) for task, runs_of_task in tasks.items() for run in runs_of_task):
        setting = run.start["optimizer"], json.dumps(run.setting, sort_keys=True)
        row = setting, run.start["code_hash"], stack_of(run)
        found.setdefault((task, folder_of(run, results)), {}).setdefault(row, []).append(run)
    tables = []
    for (task, folder), rows in found.items():
        groups = label_groups(rows.values())
        tell_apart(groups)
        tables.append(Table(task, folder, groups, compare_pairs(groups)))
    return tables


def by(key: str, tables: Iterable[Table]) -> dict[str, list[Table]]:
    """Tables by task or by folder: the one with most runs first, of equal ones the oldest."""
    found: dict[str, list[Table]] = {}
    for table in sorted(tables, key=lambda table: (-table.num_runs, table.begin, table.folder)):
        found.setdefault(getattr(table, key), []).append(table)
    return found


def hardware(run: Run) -> str:
    env = run.start["env"]
    cpus = env.get("usable_cpus", env.get("cpu_count", "?"))
    is_cpu = run.start.get("device") == "cpu"
    threads = f", {cpus} CPUs, {env.get('torch_threads', '?')} threads" if is_cpu else ""
    versions = [f"torch {env['torch']}", *filter(None, [env.get("cuda") and f"CUDA {env['cuda']}"])]
    compiled = ["compiled" if run.start.get("compiled") else "not compiled"] if not is_cpu else []
    return ", ".join([f"{run.start['world_size']} x {env['device_name']}{threads}", *versions, *compiled])


MAIN_HEADER = (
    *("optimizer", "steps", "reached", "steps to target [95 %]", "seconds to target [95 %]", "loss at the end"),
    *("tuning trials", "experiment"),
)
HEADER = (
    *("row", "optimizer", "steps", "runs", "reached", "steps to target [95 %]", "seconds to target [95 %]"),
    *("machine", "tuning trials"),
)
EVIDENCE_HEADER = (
    *("row", "loss at the end", "sd", "margin", "p below target", "gate from step", "date", "commit", "code"),
    "records by seed",
)


def letter(index: int) -> str:
    """A, B, ... Z, A1, B1, ..."""
    return chr(ord("A") + index % 26) + (str(index // 26) if index > 25 else "")


def unlike_first(run: Run) -> dict[str, Any]:
    """The settings by which a track's model is not the one that the track was made for."""
    return {key: value for key, value in model_of(run.start["config"]).items() if key in LATER_SETTINGS}


def changes_of_track(run: Run) -> dict[str, Any]:
    """What the command changed of the track's model and evaluation: tasks of one track differ in it."""
    try:
        track = tomllib.loads(run.start["sources"][config_name(run)])
    except (KeyError, TypeError, tomllib.TOMLDecodeError):
        track = {}
    config, found = run.start["config"], unlike_first(run)
    for name, prefix in (("model", ""), ("eval", "eval.")):
        theirs, own = track.get(name), config.get(name)
        if isinstance(theirs, dict) and isinstance(own, dict):
            changed = {key: own[key] for key in theirs if own.get(key, theirs[key]) != theirs[key]}
            found |= {prefix + key: value for key, value in changed.items() if key != "target"}
    return found


class Pages:
    """The text of each page, and the groups of each picture that they show."""

    def __init__(self, results: Path, runs: Sequence[Run]):
        self.results = results
        self.texts: dict[Path, str] = {}
        self.pictures: dict[Path, list[Group]] = {}
        trials: dict[str, list[Run]] = {}
        self.trial_times: dict[str, list[str]] = {}  # by family
        for run in sorted(runs, key=lambda run: run.start["utc"]):
            if is_tuning(run, results):
                trials.setdefault(folder_of(run, results), []).append(run)
                self.trial_times.setdefault(setting_family(run), []).append(run.start["utc"])
        tables = make_tables(runs, results)
        self.by_task, by_folder = by("task", tables), by("folder", tables)
        self.notes = {folder: read_notes(results / folder) for folder in by_folder.keys() | trials.keys()}
        for folder in self.notes:
            page = self.folder_page(folder, by_folder.get(folder, []), trials.get(folder, []))
            self.texts[results / folder / PAGE] = as_text(page)
        self.tracks = public_tracks(results)
        if self.tracks:
            self.texts[results / REFERENCE_PAGE] = as_text(reference_page(self.tracks))
        self.texts[results / PAGE] = as_text(self.main_page(trials))

    def main_page(self, trials: dict[str, list[Run]]) -> list[str]:
        """Contents, and a section for each experiment: first the main track, then those with most runs."""
        notes = read_notes(self.results)
        sections: dict[str, list[list[Table]]] = {}
        for tables in self.by_task.values():
            sections.setdefault(tables[0].folder, []).append(tables)
        body: list[str] = []
        num_runs = {name: sum(t.num_runs for tables in found for t in tables) for name, found in sections.items()}
        room = MOST_TABLES
        for folder in sorted(sections, key=lambda name: (name != MAIN, -num_runs[name])):
            is_shown = len(sections[folder]) <= room
            body += self.section(folder, sections[folder], is_shown)
            room -= len(sections[folder]) * is_shown
        body += reference_section(self.by_task, self.tracks)
        if trials:
            body += ["## Tuning", ""]
        for folder in sorted(trials):
            body += [f"- {self.introduction(folder)} {len(trials[folder])} trials."]
        body += ["", notes.rest]
        headings = [line.removeprefix("## ") for line in "\n".join(body).splitlines() if line.startswith("## ")]
        contents = [f"- [{heading}](#{anchor(heading)})" for heading in headings]
        return [WRITTEN, "", f"# {notes.title}", "", notes.summary, "", *contents, "", *body]

    def introduction(self, folder: str) -> str:
        notes = self.notes[folder]
        return f"[{notes.title}]({quote(folder)}/{PAGE}){': ' * bool(notes.summary)}{notes.summary}"

    def section(self, folder: str, tasks: list[list[Table]], is_shown: bool) -> list[str]:
        """What the experiment is, the verdict of each folder on each of its tasks, and tables where they are shown."""
        notes, others = self.notes[folder], {table.folder for tables in tasks for table in tables} - {folder}
        lines = [f"## {notes.title}", "", f"{notes.summary} [Details]({quote(folder)}/{PAGE}).".lstrip(), ""]
        lines += [f"- {self.introduction(name)}" for name in sorted(others)]
        for tables in tasks:
            verdicts = [f"- **{cell(table.folder)}**: {in_a_line(table.pairs)}" for table in tables]
            if not is_shown:
                lines += ["", f"{describe(tables[0].first_run)}. The table is in the details.", "", *verdicts]
                continue
            rows = [(group, table.folder) for table in tables for group in table.groups]
            rows.sort(key=lambda row: order_of_arrival(row[0]))
            lines += ["", f"{describe(tables[0].first_run)}.", ""]
            lines += [markdown_table(MAIN_HEADER, [self.main_row(*row) for row in rows]), "", *verdicts]
        return [*lines, ""]

    def main_row(self, group: Group, folder: str) -> tuple[str, ...]:
        """Cells under MAIN_HEADER, as Markdown."""
        _, name, steps, _, *reached, _, trials = self.row(0, group, [stack_of(group.runs[0])])
        return name, steps, *reached, end_loss(group), trials, f"[{cell(folder)}]({quote(folder)}/{PAGE})"

    def folder_page(self, folder: str, tables: list[Table], trials: list[Run]) -> list[str]:
        notes = self.notes[folder]
        links: dict[str, str] = {}
        lines = [WRITTEN, "", f"# {notes.title}", "", notes.summary, "", notes.rest, ""]
        lines += [f"All results, and how to read the tables: [{PAGE}](../{PAGE}).", ""]
        for table in tables:
            lines += self.details(table, links)
        if trials:
            lines += ["## Trials", "", tuning_table(trials), ""]
        return [*lines, *(f"[{name}]: {target}" for name, target in links.items())]

    def details(self, table: Table, links: dict[str, str]) -> list[str]:
        """All that is known of one task in one folder."""
        groups, run = table.groups, table.first_run
        machines = list({stack_of(group.runs[0]): hardware(group.runs[0]) for group in groups}.items())
        stacks = [stack for stack, _ in machines]
        others = [t.folder for t in self.by_task[table.task] if t.folder != table.folder]
        picture = picture_of(table, self.results)
        self.pictures[picture] = groups
        numbered = list(enumerate(groups, start=1))
        lines = [f"## {describe(run)}", "", f"Task {cell(table.task[:12])}."]
        if others:
            lines += ["The same task: " + ", ".join(f"[{cell(f)}](../{quote(f)}/{PAGE})" for f in others) + "."]
        lines += ["", *(f"- machine {letter(i)}: {cell(name)}" for i, (_, name) in enumerate(machines)), ""]
        lines += [markdown_table(HEADER, [self.row(i, group, stacks) for i, group in numbered]), ""]
        lines += [f"![validation loss of {cell(table.folder)}]({quote(picture.name)})", ""]
        if table.pairs:
            lines += ["The tests of all pairs:", ""]
            lines += [markdown_table(PAIR_HEADER, [escaped_pair(pair) for pair in table.pairs]), ""]
        lines += [f"- {cell(remark, LONG)}" for remark in remarks(groups, table.pairs)]
        lines += ["", "The records behind the rows, and whether the loss at the end is below the target:", ""]
        rows = [self.evidence(i, group, links) for i, group in numbered]
        return [*lines, markdown_table(EVIDENCE_HEADER, rows), ""]

    def row(self, number: int, group: Group, machines: Sequence[tuple]) -> tuple[str, ...]:
        """Cells under HEADER, as Markdown."""
        found, run = group.steps_to_target(), group.runs[0]
        begin = min(run.start["utc"] for run in group.runs)  # later trials chose settings of other rows
        return (
            str(number),
            cell(group.label),
            str(group.planned_steps),
            str(len(group.runs)),
            f"{found.count}/{found.runs}",
            to_target(found, 1),
            to_target(group.seconds_to_target(), 1),
            letter(machines.index(stack_of(run))),
            str(bisect_right(self.trial_times.get(setting_family(run), []), begin)),
        )

    def evidence(self, number: int, group: Group, links: dict[str, str]) -> tuple[str, ...]:
        """Cells under EVIDENCE_HEADER. Links are by reference, or the table could not be read as text."""
        run, losses = group.runs[0], group.losses(group.last_step)
        by_step = [{found.step: found.val_loss for found in run.validations} for run in group.runs]
        is_sample = not (repeated_seeds(group.seeds) or twins(group.runs))
        is_whole, step = is_sample and len(losses) == len(group.runs), common_step(by_step, run.target)
        commits = {(run.start.get("git") or {}).get("commit", "")[:8] for run in group.runs}
        is_dirty = any((run.start.get("git") or {}).get("dirty") for run in group.runs)
        seeds = []
        for found in group.runs:
            name = f"r{len(links) + 1}"
            links[name] = quote(found.path.relative_to(self.results / folder_of(found, self.results)).as_posix())
            seeds.append(f"[{cell(found.start['seed'])}][{name}]")
        return (
            str(number),
            end_loss(group),
            "-" if len(losses) < 2 else f"{statistics.stdev(losses):.4f}",
            f"{gate(losses, run.target).margin:+.4f}" if is_whole and len(losses) >= MIN_RUNS else "-",
            cell(as_p(t_below(losses, run.target))) if is_whole else "-",
            "-" if step is None else str(step),
            cell(max(run.start["utc"] for run in group.runs)[:10]),
            cell(" ".join(sorted(commits))) + (", changed" if is_dirty else ""),
            cell(run.start["code_hash"][:8]),
            " ".join(seeds),
        )


def as_text(lines: Iterable[str]) -> str:
    """With one newline at the end, and one empty line at a time."""
    return re.sub("\n{3,}", "\n\n", "\n".join(lines)).rstrip("\n") + "\n"


def anchor(heading: str) -> str:
    """What GitHub makes of a heading for links to it."""
    text = html.unescape(heading.replace("\\", "")).lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def describe(run: Run) -> str:
    """The task of a run in words: its track, what was changed of that, and the target."""
    changes = ", ".join(f"{cell(key)} {cell(value)}" for key, value in changes_of_track(run).items())
    tokens = run.start["config"]["train"]["batch_tokens"]
    track = cell(Path(config_name(run)).stem) + " with " * bool(changes) + changes
    return f"Track {track}: target {run.target:g}, {tokens:,} tokens a step"


def end_loss(group: Group) -> str:
    return f"{mean_loss(group):.4f}" if math.isfinite(mean_loss(group)) else "-"


# The verbs of verdicts, of one optimizer and of several.
LOWER = "has a lower loss at the end than", "have a lower loss at the end than"
EARLIER = "reaches the target before", "reach the target before"


def in_a_line(pairs: Sequence[Pair]) -> str:
    """What the tests of one table support, and what they leave open."""
    behind: dict[tuple[str, tuple[str, str]], list[str]] = {}
    others: dict[str, list[str]] = {}
    for pair in pairs:
        front, back = cell(pair.front.label), cell(pair.back.label)
        if pair.verdict.startswith("supported"):
            verbs = LOWER if pair.measure.startswith("loss") else EARLIER
            behind.setdefault((front, verbs), []).append(back)
        else:
            word = "undecided" if pair.verdict.startswith("not supported") else "not comparable"
            others.setdefault(word, []).append(f"{front} - {back}")
    ahead: dict[tuple[tuple[str, str], str], list[str]] = {}
    for (front, verbs), backs in behind.items():
        ahead.setdefault((verbs, ", ".join(backs)), []).append(front)
    words = [f"{', '.join(fronts)} {verbs[len(fronts) > 1]} {backs}" for (verbs, backs), fronts in ahead.items()]
    for word, names in others.items():
        words.append(f"every pair {word}" if len(names) == len(pairs) else f"{word}: {', '.join(names)}")
    return "; ".join(words or ["nothing to compare"]) + "."


def escaped_pair(pair: Pair) -> list[str]:
    name, *numbers, words = pair_cells(pair)
    return [cell(name), *(text.replace("<", "&lt;") for text in numbers), cell(words, LONG)]


def tell_apart(groups: Sequence[Group]) -> None:
    """Groups that differ in code or machine alone get their folder or code into the label."""
    counts = Counter(group.label for group in groups)
    for group in groups:
        if counts[group.label] > 1:
            group.label += f" ({group.runs[0].path.parent.name}, code {group.runs[0].start['code_hash'][:8]})"


def config_name(run: Run) -> str:
    """The track's file, which is the one source that is no Python."""
    return next((name for name in run.start["sources"] if name.endswith(".toml")), "unknown track")


def public_tracks(results: Path) -> list[dict[str, Any]]:
    """Of reference.toml; none where there is no such file."""
    path = results / "reference.toml"
    try:
        return board.read_reference(path) if path.is_file() else []
    except ValueError as error:
        raise RecordError(str(error)) from error


def reference_page(tracks: Sequence[dict[str, Any]]) -> list[str]:
    """All public results, with what their logs show."""
    lines = [WRITTEN_FROM_REFERENCE, "", "# Public results", "", f"Beside ours: [{PAGE}]({PAGE}). {HOW_CHECKED}", ""]
    for track in tracks:
        lines += [f"## {track['name']}", "", track["text"].strip(), "", board.in_words(track), ""]
        lines += [board.full_table(track), ""]
    return lines


def reference_section(tasks: dict[str, list[Table]], tracks: Sequence[dict[str, Any]]) -> list[str]:
    """The best public results of the same tasks, and those of our optimizers, beside ours."""
    lines = []
    for track in tracks:
        rows = board.short_rows(track)
        same = ("batch_tokens", "vocab_size")
        for table in (table for tables in tasks.values() for table in tables):
            config = table.first_run.start["config"]
            own = table.first_run.target, config["train"]["batch_tokens"], config["model"]["vocab_size"]
            if own == (float(track["target"]), *(track[key] for key in same)) and not unlike_first(table.first_run):
                for group in table.groups:
                    steps = to_target(group.steps_to_target(), 0)
                    rows.append((cell(group.label), steps, end_loss(group), str(len(group.runs)), "ours", "-"))
        lines += [f"## Public results: {track['name']}", "", track["text"].strip(), ""]
        lines += [board.in_words(track), ""]
        lines += [f"Here are the {board.BEST} rows with fewest steps and those of our optimizers; all: "
                  f"[{REFERENCE_PAGE}]({REFERENCE_PAGE}).", ""]  # fmt: skip
        lines += [markdown_table(board.HEADER, rows), ""]
        if not any("ours" in cells for cells in rows):
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
    return markdown_table(("optimizer", "trials", "seed", "best", "loss", "next best", "loss"), sorted(rows))


def picture_of(table: Table, results: Path) -> Path:
    """Path of the curves of one task in one folder."""
    return results / table.folder / f"curves-{re.sub('[^0-9a-f]', '', table.task)[:8]}.png"
