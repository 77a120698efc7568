"""Checks of what a run was: sources and their commit, task, data, config and command line."""

import functools
import hashlib
import re
import subprocess
import tomllib
from collections.abc import Iterator
from typing import Any

from aurora.config import apply_override, pop_steps
from aurora.errors import HarnessError
from aurora.trainer.record import ROOT, SCHEMA, code_hash, task_hash
from scripts.verification.events import Events
from scripts.verification.export import is_inside, overrides


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
    if f"-{start['optimizer']}-s{start['seed']}-{stamp}-" not in start["run_id"]:
        yield f"run_id {start['run_id']} does not state optimizer, seed {start['seed']} and time {start['utc']}"
    bad = [name for name in start["sources"] if not is_inside(name)]
    if bad:
        yield f"names of sources lead out of their folder: {bad}"
    if bad := [name for name, text in start["sources"].items() if not isinstance(text, str)]:
        yield f"sources that are no text: {bad}"


def first_code_hash(sources: dict[str, str]) -> str:
    """code_hash as the first committed records formed it."""
    text = "".join(f"{name}:{text!r}" for name, text in sources.items() if name.endswith(".py"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def check_config(run: Events) -> Iterator[str]:
    start, config = run.start, run.config
    if config["optimizer"] != start["optimizer"]:
        yield f"optimizer is {start['optimizer']}, that of the config {config['optimizer']}"
    if config["hparams"] | {"warmup_steps": config["warmup_steps"]} != start["hparams"]:
        yield "hparams are not those of the config"
    model, counts = config["model"], start["params_by_role"]
    embed = model["vocab_size"] * model["model_dim"]
    mlp = (3 if model.get("mlp") == "swiglu" else 2) * model["mlp_expansion"]
    matrix = model["num_layers"] * (4 + mlp) * model["model_dim"] ** 2
    expected = [embed, embed, matrix]
    if not run.is_edited and [counts.get(role) for role in ("embed", "head", "matrix")] != expected:
        yield f"parameter counts {counts} are not those of the model in the config"
    for group in start["param_groups"]:
        for key, value in group.items():
            name = hparam_name(key.removeprefix("peak_"), group["role"])
            if start["hparams"].get(name, value) not in (value, "auto"):
                yield f"the optimizer held {key} {value} for {group['role']}, {name} is {start['hparams'][name]}"
    argv, tracks = start["argv"], [text for name, text in start["sources"].items() if name.endswith(".toml")]
    if len(tracks) != 1:
        yield f"{len(tracks)} tracks are embedded"
    elif not argv or not argv[0].endswith("train_gpt.py"):
        yield f"argv {str(argv)[:100]} is no command line of train_gpt.py"
    else:
        tables, settings = tomllib.loads(tracks[0]), overrides(argv)[1::2]  # without the flags between
        try:
            for override in settings:
                apply_override(tables, override)
        except HarnessError as error:
            yield f"argv does not fit the embedded track: {error}"
            return
        table = dict(tables.pop("optimizer", {}).get(start["optimizer"], {}))
        if (steps := pop_steps(table, settings)) is not None:
            tables["train"]["steps"] = steps
        wanted = tables | {"hparams": {key: value for key, value in table.items() if key != "warmup_steps"}}
        for name, values in wanted.items():
            for key, value in values.items():
                if config[name].get(key) != value:
                    yield f"{name}.{key} is {config[name].get(key)}, by the embedded track and argv {value}"


def hparam_name(key: str, role: str) -> str:
    """Which hyper-parameter a setting of a parameter group comes from, where there is one."""
    return key if role == "matrix" else f"{role}_lr" if key == "lr" else f"aux_{key}"


def changed_sources(start: dict[str, Any]) -> list[str]:
    """Sources that are not those of the commit that the record names; none where that commit is not known here."""
    git = start.get("git")
    tree = hashes_of(str(git.get("commit"))) if isinstance(git, dict) else {}
    if not tree:
        return []
    hashes = {name: text.encode("utf-8", "surrogatepass") for name, text in start["sources"].items()}
    hashes = {name: hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() for name, data in hashes.items()}
    # A track of one's own is in no commit.
    return [name for name in hashes if tree.get(name) != hashes[name] and (name in tree or name.endswith(".py"))]


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
