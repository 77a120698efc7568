"""Checks of what a run was: sources and their commit, hashes, and the run_id."""

import ast
import functools
import hashlib
import re
import subprocess
from collections.abc import Iterator
from typing import Any

from aurora.config import ROOT
from aurora.trainer.identity import EXTERNAL, code_hash, task_hash
from aurora.trainer.writer import SCHEMA
from scripts.verification.events import Events
from scripts.verification.export import LACKING, is_inside
from scripts.verification.groups import parsed


def check_identity(run: Events) -> Iterator[str]:
    start, config = run.start, run.config
    if start["schema"] != SCHEMA:
        yield f"schema {start['schema']} is not {SCHEMA}"
    if start["code_hash"] != code_hash(start["sources"]) and start["code_hash"] != first_code_hash(start["sources"]):
        yield "code_hash is not that of the embedded sources"
    if task_hash(config, start["data"]["stream_id"]) != start["task_hash"]:
        yield "task_hash is not that of the config and data"
    shards = [shard["sha256"] for shard in start["data"]["shards"]]
    fingerprint = hashlib.sha256("".join(shards).encode()).hexdigest()
    if fingerprint != start["data"]["fingerprint"]:
        yield "the data's fingerprint is not that of its shards"
    stream = fingerprint if start["data"].get("epochs", 0) > 1 else shards[0]
    if hashlib.sha256((stream + start["data"]["val_sha256"]).encode()).hexdigest() != start["data"]["stream_id"]:
        yield "the data's stream_id is not that of its shards and validation tokens"
    stamp = re.sub("[-:]", "", start["utc"][:19])
    name = f"-{re.escape(start['optimizer'])}-s{start['seed']}-"
    stated = re.search(name + r"(\d{8}T\d{6})-[0-9a-f]{4}$", start["run_id"])
    # A record that was begun anew has the run_id of before.
    if not stated or not (stated[1] <= stamp if run.lost_steps else stated[1] == stamp):
        yield f"run_id {start['run_id']} does not state optimizer, seed {start['seed']} and time {start['utc']}"
    bad = [name for name in start["sources"] if not is_inside(name)]
    if bad:
        yield f"names of sources lead out of their folder: {bad}"
    if bad := [name for name, text in start["sources"].items() if not isinstance(text, str)]:
        yield f"sources that are no text: {bad}"
        return
    yield from broken_sources(start["sources"])


def broken_sources(sources: dict[str, str]) -> Iterator[str]:
    """Sources that no run can have had: what was imported is whole, and so is what it imports first of all."""
    # Of other packages a record embeds the optimizer's file alone, which may be of another Python.
    modules = {
        name: text for name, text in sources.items() if name.endswith(".py") and not name.startswith(f"{EXTERNAL}/")
    }
    for name, text in modules.items():
        if flaw := flaw_of(text, may_be_empty=name.endswith("__init__.py")):
            yield f"the source {name} {flaw}"
        elif lacking := sorted(set(imports_of(name, text)) - modules.keys() - LACKING.keys()):
            options = [other for other in lacking if other.replace(".py", "/__init__.py") not in modules]
            if options:
                yield f"the source {name} imports {options[0]}, which the record does not embed"
    if "train_gpt.py" not in modules:
        yield "the sources lack train_gpt.py"


# Hundreds of records share their sources, each record has a hundred, and a syntax tree takes megabytes.
@functools.lru_cache(maxsize=10_000)
def flaw_of(text: str, may_be_empty: bool) -> str:
    tree = parsed(text)
    return "is no Python" if tree is None else "" if tree.body or may_be_empty else "is empty"


@functools.lru_cache(maxsize=10_000)
def imports_of(name: str, text: str) -> tuple[str, ...]:
    """Files of the project that a source surely imports: at its top, by their full name or relative to itself."""
    tree = parsed(text)
    found, package = [], name.split("/")[:-1]
    for node in tree.body if tree else ():
        if isinstance(node, ast.ImportFrom) and node.module:
            parents = package[: len(package) - node.level + 1] if node.level else []
            parts = [*parents, *node.module.split(".")]
            if node.level or parts[0] in ("aurora", "configs"):
                found.append("/".join(parts) + ".py")
    return tuple(found)


def first_code_hash(sources: dict[str, str]) -> str:
    """code_hash as the first committed records formed it."""
    text = "".join(f"{name}:{text!r}" for name, text in sources.items() if name.endswith(".py"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def changed_sources(start: dict[str, Any]) -> list[str]:
    """Sources that are not those of the commit that the record names; none where that commit is not known here."""
    git = start.get("git")
    tree = hashes_of(str(git.get("commit"))) if isinstance(git, dict) else {}
    if not tree:
        return []
    hashes = {name: text.encode("utf-8", "surrogatepass") for name, text in start["sources"].items()}
    hashes = {name: hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() for name, data in hashes.items()}
    # A track of one's own is in no commit.
    own = [name for name in hashes if name.endswith(".py") and not name.startswith(f"{EXTERNAL}/")]
    return [name for name in hashes if tree.get(name) != hashes[name] and (name in tree or name in own)]


def notes_on_commit(run: Events) -> Iterator[str]:
    """What the commit says of the sources, or why it says nothing."""
    start, git = run.start, run.start.get("git")
    if not isinstance(git, dict) or not {"commit", "dirty"} <= git.keys():
        yield "names no commit to compare its sources with"
    elif not hashes_of(git["commit"]):
        yield f"names commit {git['commit'][:12]}, which is not known here to compare its sources with"
    elif changed := changed_sources(start):
        stated = "" if git["dirty"] else ", which the record does not state"
        yield f"sources differ from commit {git['commit'][:12]} in: {', '.join(changed)}{stated}"


def notes_on_machine(run: Events) -> Iterator[str]:
    start, env = run.start, run.start["env"]
    if start["device"] == "cpu" and env["device_name"] != env["cpu"]:
        yield f"device_name is {env['device_name']}, the processor {env['cpu']}"
    if env.get("usable_cpus", 1) > env["cpu_count"]:
        yield f"{env['usable_cpus']} of {env['cpu_count']} processors were usable"


@functools.lru_cache
def hashes_of(commit: str) -> dict[str, str]:
    """Git's hash of each file of a commit, by name; empty without git or the commit."""
    if not re.fullmatch("[0-9a-f]{40}", commit):
        return {}
    command = ["git", "-C", str(ROOT), "ls-tree", "-r", "-z", commit]
    try:
        listing = subprocess.run(command, capture_output=True, check=True).stdout.decode()
    except (OSError, subprocess.CalledProcessError, UnicodeDecodeError):
        return {}
    entries = (entry.partition("\t") for entry in listing.split("\0") if entry)
    return {name: description.split()[2] for description, _, name in entries}
