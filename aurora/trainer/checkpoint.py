"""Checkpoints: written whole or not at all, and checked against a hash before anything in them is used."""

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from aurora.errors import Exit, HarnessError
from aurora.trainer.process import first_line
from aurora.trainer.ranks import digest
from aurora.trainer.record import Progress, RecordError, Validation, read_record
from aurora.trainer.state import Run
from aurora.trainer.timeline import timeline

KEPT_CHECKPOINTS = 2


def identity_of(start: dict[str, Any]) -> dict[str, Any]:
    """What a run and the checkpoint it goes on from have in common. start: its run event."""
    data = {"data": start["data"]["fingerprint"], "val": start["data"]["val_sha256"]}
    files = {name: text for name, text in start["sources"].items() if name.endswith(".py")}
    code = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items()}
    return {key: start[key] for key in ("config", "seed")} | data | {"code": code}


def save_run(run: Run) -> None:
    """A checkpoint of the whole run beside its record, on all ranks or none. Collective."""
    start, progress = run.start, run.progress
    timeline.mark("checkpoint_gather", progress.step)
    spent_ns, _ = run.clock.of_slowest_rank()
    state = {"training": run.state_dict(), "identity": identity_of(start), "run_id": start["run_id"]}
    state |= {"spent_ns": spent_ns, "world_size": run.ranks.world_size, "micro_batch": run.plan.micro_batch}
    state |= vars(progress) | {"validations": [tuple(validation) for validation in progress.validations]}
    folder = run.out / f"{start['run_id']}.checkpoints"
    run.ranks.all_or_none(lambda: save_checkpoint(folder, progress.step, state) if run.ranks.is_main else None)
    timeline.mark("checkpoint_saved", progress.step)


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write state under folder/step-N: hashed, synced, then renamed, so that the name means a whole checkpoint.

    It and the one before are kept. What a killed process left unfinished is removed, and so are checkpoints of later
    steps: --resume found them damaged, or this run would not be at an earlier step. One process a folder.

    Raises:
        HarnessError: DISK; the checkpoints before are then untouched.
    """
    final = folder / f"step-{step:06d}"
    temporary = folder / f".{final.name}-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent)
        for leftover in folder.glob(".step-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir()
        with synced(temporary / "state.pt") as file:
            torch.save(state, file)
            timeline.mark("checkpoint_state", step)
        content = {"sha256": sha256(temporary / "state.pt"), "bytes": (temporary / "state.pt").stat().st_size}
        with synced(temporary / "manifest.json") as file:
            file.write(json.dumps(content | {"step": step}).encode())
            timeline.mark("checkpoint_manifest", step)
        sync_folder(temporary)
        if final.exists():
            shutil.rmtree(final)
        timeline.mark("checkpoint_rename", step)
        os.rename(temporary, final)
        timeline.mark("checkpoint_renamed", step)
        sync_folder(folder)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        shutil.rmtree(temporary, ignore_errors=True)
        message = f"checkpoint {final} cannot be written: {first_line(error)}; the one before is kept"
        raise HarnessError(Exit.DISK, message) from error
    present = list_checkpoints(folder)
    kept = present[: present.index(final) + 1][-KEPT_CHECKPOINTS:]
    for other in [path for path in present if path not in kept]:
        timeline.mark("checkpoint_prune", step)
        shutil.rmtree(other, ignore_errors=True)


@contextlib.contextmanager
def synced(path: Path) -> Iterator[BinaryIO]:
    """A new file to write, on the disk when the block ends."""
    with open(path, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, by their names alone."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-[0-9]{6,}", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """One checkpoint, once its bytes match its manifest. Nothing in it is executed. Raises whatever is wrong."""
    manifest = json.loads((folder / "manifest.json").read_text())
    if sorted(manifest) != ["bytes", "sha256", "step"]:
        raise ValueError("its manifest is not one")
    file = folder / "state.pt"
    if file.stat().st_size != manifest["bytes"] or sha256(file) != manifest["sha256"]:
        raise ValueError("its bytes do not match its manifest")
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    progress = {"step", "validations", "segments", "spent_ns"}
    missing = {"training", "identity", "run_id", "world_size", "micro_batch", *progress} - set(state)
    if missing:
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    if not state["step"] == manifest["step"] == int(folder.name.removeprefix("step-")):
        raise ValueError("it is of another step than its name says")
    return state


def newest_checkpoint(out: Path, start: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any] | None:
    """The newest whole checkpoint below out of the newest unfinished run of this track, rule and seed, or None.

    start: the run event of the run that would go on.

    Raises:
        HarnessError: CHECKPOINT, when all there are were damaged or made by a run that differs.
    """
    obstacle, identity = None, identity_of(start)
    name = start["run_id"].rsplit("-", 2)[0]  # what follows is the time, and a random part
    for run_folder in sorted(out.glob(f"{name}-*.checkpoints"), reverse=True):
        if is_finished(run_folder):
            continue
        for folder in reversed(list_checkpoints(run_folder)):
            try:
                state = load_checkpoint(folder)
                differing = differences(state["identity"], identity)
            except Exception as error:  # a hostile file may raise anything
                obstacle = obstacle or f"all checkpoints in {run_folder} are damaged"
                say(f"resume: {folder} is damaged ({first_line(error)}), trying an older one")
                continue
            if not differing:
                return state
            obstacle = f"{folder} was made with another {', '.join(differing)}"
            break
    if obstacle:
        raise HarnessError(Exit.CHECKPOINT, f"--resume: {obstacle}; restore it, or start over in another --out")
    return None


def differences(identity: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What differs between two identities: keys, and files of code. Some files are imported on some devices alone."""
    if "code" not in identity:
        return ["version of the trainer"]
    code, other_code = identity["code"], other["code"]
    files = [name for name in code.keys() & other_code.keys() if code[name] != other_code[name]]
    return [key for key, value in other.items() if key != "code" and identity[key] != value] + sorted(files)


def is_finished(run_folder: Path) -> bool:
    """Whether the record beside these checkpoints says that the run was done."""
    try:
        return read_record(run_folder.with_name(run_folder.name.removesuffix(".checkpoints") + ".jsonl")).is_done
    except RecordError:
        return False


def take_over(checkpoint: dict[str, Any], run: Run) -> Progress:
    """Take over training state and time spent, all of it or HarnessError; how far the run had come. Collective."""
    state = checkpoint["training"]
    try:
        for optimizer, saved in zip(run.optimizers, state["optimizers"], strict=True):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            if state["loader"]["step"] > 0 and len(saved["state"]) != len(params):
                kept = f"{len(saved['state'])} of {len(params)} parameters"
                raise ValueError(f"it holds the state of {kept} of {type(optimizer).__name__}")
            if isinstance(optimizer, torch.optim.AdamW):  # whose loader takes any shape
                for index, entry in saved["state"].items():
                    found = {key: (tuple(value.shape), value.dtype) for key, value in entry.items() if key != "step"}
                    wanted = dict.fromkeys(("exp_avg", "exp_avg_sq"), (tuple(params[index].shape), params[index].dtype))
                    if found != wanted or "step" not in entry:
                        raise ValueError(f"AdamW's state {index} is {found}, not {wanted}")
        run.load_state_dict(state)
        if digest(run.state_dict()) != digest(state):
            raise ValueError("what was loaded is not what was saved")
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        message = f"--resume: the checkpoint does not fit this run: {first_line(error)}; start over in another --out"
        raise HarnessError(Exit.CHECKPOINT, message) from error
    run.clock.add(checkpoint["spent_ns"])
    validations = [Validation(*validation) for validation in checkpoint["validations"]]
    return Progress(checkpoint["step"], validations, checkpoint["segments"] + 1)
