"""The public results of results/reference.toml, and what their logs show in a clone of the repository that holds them.

A result names its logs below the track's folder, as patterns. Its line `check` is written from them: how many runs the
logs hold, their mean loss at the stated step, the first step at which they pass the public rule, and whether the claim
follows. A result without logs in the repository is not checked; its line `unchecked` says why.
"""

import fnmatch
import json
import re
import subprocess
import tempfile
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

from scripts.analysis import claims
from scripts.analysis.text import cell, markdown_table

FOLLOWS, FOLLOWS_NOT, NOT_CHECKED = "follows", "does not follow", "not checked"
DIGITS = 5  # of a mean, as in the logs
BEST = 5  # rows of the short table, beside those of optimizers of ours
HEADER = ("optimizer", "steps", "mean loss", "runs", "source", "what its logs show")
FULL_HEADER = (*HEADER[:5], "runs found", "their mean", "passes from step", "the claim", "why")
BLOCK = "[[track.result]]\n"


def read_reference(path: Path) -> list[dict[str, Any]]:
    """The tracks of the file, numbers with a point as text, since their digits count.

    Raises:
        ValueError: the file is not of that form.
    """
    try:
        tracks: list[dict[str, Any]] = tomllib.loads(path.read_text(encoding="utf-8"), parse_float=str)["track"]
        for track in tracks:
            for key in ("name", "target", "batch_tokens", "vocab_size", "text", "result"):
                assert key in track, f"a track has no {key}"
            for result in track["result"]:
                assert {"rule", "steps"} <= result.keys(), f"a result lacks rule or steps: {result}"
                assert result.keys() & {"row", "pull"}, f"a result has neither row nor pull: {result['rule']}"
                assert "logs" in result or "unchecked" in result, f"no logs and no unchecked: {result['rule']}"
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"{path} is not a list of public results: {error}") from error
    return tracks


def files_of(repo: Path, commit: str, folder: str) -> list[str]:
    """Paths of a commit's files below a folder, relative to it."""
    names = git(repo, "ls-tree", "-r", "-z", "--name-only", f"{commit}:{folder}")
    return sorted(name for name in names.decode("utf-8", "replace").split("\0") if name)


def git(repo: Path, *arguments: str) -> bytes:
    command = ["git", "-C", str(repo), *arguments]
    try:
        process = subprocess.run(command, capture_output=True, check=False)
    except OSError as error:
        raise ValueError(f"git cannot be started: {error.strerror}") from error
    if process.returncode:
        reason = process.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or ["no reason given"]
        raise ValueError(f"git {arguments[0]} in {repo}: {reason[0]}; give a clone of the repository with --repo")
    return process.stdout


def check_track(track: dict[str, Any], repo: Path) -> list[dict[str, Any]]:
    """The value of `check` of each result of a track.

    Raises:
        ValueError: the clone has not the track's commit, or not its files.
    """
    commit, folder = track["commit"], track["folder"]
    names = files_of(repo, commit, folder)
    checks = []
    for result in track["result"]:
        if "logs" not in result:
            checks.append({"claim": NOT_CHECKED, "why": result["unchecked"]})
            continue
        found = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in result["logs"])]
        with tempfile.TemporaryDirectory() as temporary:
            for name in found:
                copy = Path(temporary) / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(git(repo, "cat-file", "blob", f"{commit}:{folder}/{name}"))
            claim = claims.Claim(result["rule"], result["steps"], result.get("mean"), result.get("n"))
            try:
                finding = claims.check([Path(temporary)], claim, float(track["target"]), result.get("metric"))
            except ValueError:
                checks.append({"claim": NOT_CHECKED, "why": "the repository holds none of its logs"})
                continue
        check = {"claim": FOLLOWS if finding["follows"] else FOLLOWS_NOT, "runs": finding["trials"]}
        if finding["mean"] is not None:
            check["mean"] = f"{finding['mean']:.{DIGITS}f}"
        if finding["first_step_that_passes"] is not None:
            check["first"] = finding["first_step_that_passes"]
        if finding["problems"]:
            check["why"] = "; ".join(finding["problems"])
        checks.append(check)
    return checks


def as_line(check: dict[str, Any]) -> str:
    """A check as a line of TOML, numbers with a point as such."""
    values = (
        f"{key} = {value if key in ('runs', 'mean', 'first') else json.dumps(value, ensure_ascii=False)}"
        for key, value in check.items()
    )
    return f"check = {{ {', '.join(values)} }}"


def with_checks(text: str, checks: list[dict[str, Any]]) -> str:
    """The text of the file with these checks, one for each result, in the place of those it has."""
    head, *blocks = text.split(BLOCK)
    if len(blocks) != len(checks):
        raise ValueError(f"{len(checks)} results, but {len(blocks)} blocks that begin with {BLOCK.strip()}")
    written = [head]
    for block, check in zip(blocks, checks, strict=True):
        lines = [line for line in block.split("\n") if not re.match(r"check\s*=", line)]
        end = next((number for number, line in enumerate(lines) if not line.strip()), len(lines))
        written.append("\n".join([*lines[:end], as_line(check), *lines[end:]]))
    return BLOCK.join(written)


def check_reference(path: Path, repo: Path, write: bool = False) -> tuple[str, list[str]]:
    """A table of what the logs show, and what of it the file does not state; with write, the file states it.

    Raises:
        ValueError: the file or the clone cannot be read.
    """
    tracks = read_reference(path)
    checks = [check_track(track, repo) for track in tracks]
    lines, stale = [], []
    for track, found in zip(tracks, checks, strict=True):
        for result, check in zip(track["result"], found, strict=True):
            if result.get("check") != check:
                stale.append(f"{source_of(result)}: the logs give {as_line(check)}")
            result["check"] = check
        lines.append(full_table(track))
    if write and stale:
        text = path.read_text(encoding="utf-8")
        path.write_text(with_checks(text, [check for found in checks for check in found]), encoding="utf-8")
        stale = []
    return "\n\n".join(lines), stale


def source_of(result: dict[str, Any]) -> str:
    """Its row, or its pull request with the state of that."""
    return f"row {result['row']}" if "row" in result else f"pull {result['pull']}, {result['state']}"


def stated(result: dict[str, Any]) -> tuple[str, ...]:
    """What is claimed: the first cells of both tables."""
    mean, runs = result.get("mean", "-"), str(result.get("n", "-"))
    return cell(result["rule"]), str(result["steps"]), mean, runs, cell(source_of(result))


def shown(result: dict[str, Any]) -> str:
    """In a few words, for the short table."""
    check = result.get("check", {"claim": NOT_CHECKED})
    runs = f", {check['runs']} run{'s' * (check['runs'] != 1)}" if "runs" in check else ""
    return check["claim"] + runs + (f", mean {check['mean']}" if "mean" in check else "")


def short_rows(track: dict[str, Any]) -> list[tuple[str, ...]]:
    """Of the results with fewest steps among accepted ones, and of all whose optimizer we have."""
    best = sorted((result for result in track["result"] if "row" in result), key=lambda result: result["steps"])[:BEST]
    chosen = [result for result in track["result"] if result in best or "optimizer" in result]
    return [(*stated(result), shown(result)) for result in sorted(chosen, key=lambda result: result["steps"])]


def full_table(track: dict[str, Any]) -> str:
    rows = []
    for result in track["result"]:
        check = result.get("check", {"claim": NOT_CHECKED})
        numbers = (str(check.get(key, "-")) for key in ("runs", "mean", "first"))
        rows.append((*stated(result), *numbers, check["claim"], cell(check.get("why", ""), 600)))
    return markdown_table(FULL_HEADER, rows)


def in_words(track: dict[str, Any]) -> str:
    """How many claims follow from their logs, and how many do not."""
    counts = Counter(result.get("check", {"claim": NOT_CHECKED})["claim"] for result in track["result"])
    return (
        f"Of {len(track['result'])} claims {counts[FOLLOWS]} follow from the logs, {counts[FOLLOWS_NOT]} do not, "
        + (f"{counts[NOT_CHECKED]} could not be checked.")
    )
