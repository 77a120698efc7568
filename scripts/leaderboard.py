"""The pages of results, results/README.md and one for each folder, computed from the records beside them.

    python scripts/leaderboard.py                write the pages and their curves
    python scripts/leaderboard.py --check        exit 1 if they are not what the records give
    python scripts/leaderboard.py add DIR        check the records in DIR and copy them to results/<name of DIR>
    python scripts/leaderboard.py unpack PATH --out NEW       restore a record, or a folder, as the run wrote it

The main page has one section for each experiment; the page of a folder has all details. Records in a folder whose name
ends with _tuning have no rows; they count as tuning budget. The text comes from notes.md in results/ and its folders,
public results come from reference.toml.
"""

import argparse
import hashlib
import json
import os
import re
import sys
import tomllib
from collections.abc import Iterable
from dataclasses import astuple, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from aurora.console import run_script
from aurora.trainer.events import STORE, RecordError
from aurora.trainer.record import Run, read_folder, record_paths
from scripts.analysis.page import PAGE, Pages
from scripts.analysis.store import packed_files, unpack
from scripts.analysis.text import plain
from scripts.analysis.verdict import Group
from scripts.verification.checks import verify_folder
from scripts.verification.together import findings, trace_of


def read_runs(folder: Path) -> list[Run]:
    """All runs below a folder, condensed, in order of their names; what else is there is named and left out."""
    runs, errors = read_folder(folder, condensed=True)
    for error in errors:
        print(f"warning: left out: {plain(error, 500)}", file=sys.stderr)
    return runs


def digest(groups: Iterable[Group]) -> str:
    """Of all values that a picture shows. It is written into the file, whose bytes depend on matplotlib's version."""
    values = [
        (group.label, astuple(group.steps_to_target()), [(run.target, run.validations) for run in group.runs])
        for group in groups
    ]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def stale_files(pages: Pages) -> list[Path]:
    """The pages and their pictures, as far as they are not what the records give."""
    stale = [
        path for path, text in pages.texts.items() if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    for path, groups in pages.pictures.items():
        if not path.is_file() or digest(groups).encode() not in path.read_bytes():
            stale.append(path)
    return sorted(stale)


def write(pages: Pages) -> None:
    from scripts.plot import plot_groups

    for path in stale_files(pages):
        if path in pages.texts:
            path.write_text(pages.texts[path], encoding="utf-8")
        else:
            plot_groups(pages.pictures[path], path, description=digest(pages.pictures[path]))


def add(source: Path, results: Path) -> list[Path]:
    """Copy the records of a folder, packed, to results/<its name>, and show them; all of them or, with an error, none.

    Raises:
        RecordError: one is refuted by scripts/verification/checks.py, is not whole, is there already, or cannot be
            shown. Files that are no records, and further files of a run, are named and left out.
    """
    runs = read_runs(source)
    if not runs:
        raise RecordError(f"{source} holds no record")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", source.resolve().name):
        raise RecordError(f"{source}: the name of the folder is to be of letters, digits, '.', '_' and '-'")
    if source.resolve().name == STORE:
        raise RecordError(f"{source}: the name {STORE} is that of the store; rename the folder")
    there = read_runs(results)
    known = {tuple(run.validations): run.path for run in there}
    verdicts = {verdict.path: verdict for verdict in verify_folder(*(run.path for run in runs))}
    targets = {}
    for run in runs:
        if run.end is None:
            raise RecordError(f"{run.path} has no end event; end the run, or record why it was cut short")
        if tuple(run.validations) in known:
            raise RecordError(f"{run.path} has the losses and times of {known[tuple(run.validations)]}")
        if verdicts[run.path].reasons:
            raise RecordError(f"{run.path} is refuted: {verdicts[run.path].reasons[0]}")
        if not verdicts[run.path].is_whole:
            raise RecordError(f"{run.path} is incomplete: it does not tell how the run began; run it again")
        known[tuple(run.validations)] = run.path
        target = results / source.resolve().name / run.path.relative_to(source)
        if target.exists():
            raise RecordError(f"{target} exists; rename {run.path}")
        targets[target] = run.path
    own = {run.path for run in runs}
    for found in findings(trace_of(run) for run in (*there, *runs)):
        if found.is_refuted and not own.isdisjoint({found.later.path, found.earlier.path}):
            raise RecordError(f"{found.later.path} {found.text} {found.earlier.path}")
    moved = [replace(run, path=target) for run, target in zip(runs, targets, strict=True)]
    try:
        pages = Pages(results, [*there, *moved])
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, ArithmeticError) as error:
        raise RecordError(f"the page cannot be written with the records of {source} ({error!r})") from error
    before = {path: path.read_bytes() if path.is_file() else None for path in (*pages.texts, *pages.pictures)}
    write_all(packed_files(targets, results / STORE))
    try:
        write(pages)
    except BaseException:
        for path, content in (before | dict.fromkeys(targets)).items():
            if content is None:
                path.unlink(missing_ok=True)
            else:
                path.write_bytes(content)
        raise
    return list(targets)


def restore(source: Path, out: Path) -> list[Path]:
    """Write a record, or the records below a folder, as their runs wrote them; returns the new files.

    Raises:
        RecordError: one cannot be restored, or out exists.
    """
    if out.exists():
        raise RecordError(f"{out} exists; name a new file or folder with --out")
    paths = record_paths(source) if source.is_dir() else [source]
    if not paths:
        raise RecordError(f"{source} holds no record")
    contents = {out / path.relative_to(source) if source.is_dir() else out: unpack(path) for path in paths}
    write_all(contents)
    return list(contents)


def write_all(contents: dict[Path, bytes]) -> None:
    """Write new files, all of them or, with an error, none. One gets its name when all are whole and on the disk."""
    temporary = {target: target.with_name(f"{target.name}.tmp") for target in contents}
    renamed: list[Path] = []
    try:
        for target, content in contents.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary[target], "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for target, whole in temporary.items():
            whole.rename(target)
            renamed.append(target)
    except BaseException:
        texts = [target for target in renamed if target.parent.name == STORE]  # by now others may refer to them
        for path in {*temporary.values(), *renamed} - {*texts}:
            path.unlink(missing_ok=True)
        raise


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=("write", "add", "unpack"), default="write")
    parser.add_argument("path", nargs="?", type=Path, help="add: a folder of new records; unpack: a record or a folder")
    parser.add_argument("--out", type=Path, help="with unpack: the new file or folder")
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if a page is stale")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of the records and the page")
    args = parser.parse_args(argv)
    if (args.command == "write") != (args.path is None):
        parser.error("add and unpack need a path, nothing else takes one")
    if (args.command == "unpack") != (args.out is not None):
        parser.error("unpack needs --out, nothing else takes it")
    if not args.results.is_dir():
        print(f"error: there is no folder {args.results}", file=sys.stderr)
        return 2
    try:
        if args.command == "add":
            for path in add(args.path, args.results):
                print(path)
        if args.command == "unpack":
            for path in restore(args.path, args.out):
                print(path)
            return 0
        pages = Pages(args.results, read_runs(args.results))
        if args.check:
            stale = stale_files(pages)
            for path in stale:
                print(f"error: {path} is not what the records give: python scripts/leaderboard.py", file=sys.stderr)
            return 1 if stale else 0
        write(pages)
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
    sys.exit(run_script(main))
