"""Checkpoints: written whole or not at all, and checked against a hash before anything in them is used."""

import hashlib
import json
import os
import pickle
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from configs.schema import Exit, HarnessError
from results.record import RecordError, read_record

KEPT_CHECKPOINTS = 2


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write state under folder/step-N: hashed, synced, then renamed, so that the name means a whole checkpoint."""
    final = folder / f"step-{step:06d}"
    temporary = folder / f".{final.name}-{secrets.token_hex(4)}"
    try:
        temporary.mkdir(parents=True)
        with open(temporary / "state.pt", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        manifest = {"sha256": hashlib.sha256((temporary / "state.pt").read_bytes()).hexdigest(), "step": step}
        with open(temporary / "manifest.json", "w") as file:
            json.dump(manifest, file)
            file.flush()
            os.fsync(file.fileno())
        if final.exists():
            shutil.rmtree(final)
        os.rename(temporary, final)
        parent = os.open(folder, os.O_RDONLY)
        os.fsync(parent)
        os.close(parent)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        shutil.rmtree(temporary, ignore_errors=True)
        message = f"checkpoint {final} cannot be written: {first_line(error)}; the one before is kept"
        raise HarnessError(Exit.DISK, message) from error
    for old in sorted(folder.glob("step-*"), key=step_of)[:-KEPT_CHECKPOINTS]:
        shutil.rmtree(old, ignore_errors=True)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def newest_checkpoint(out: Path, identity: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any] | None:
    """The newest whole checkpoint of the newest unfinished run below out that has this identity; None if there is none.

    Nothing in a checkpoint is executed.

    Raises:
        HarnessError: CHECKPOINT, when all there are were damaged or made by a run that differs.
    """
    obstacle = None
    for run_folder in sorted(out.glob("*.checkpoints"), reverse=True):  # run ids of equal identity end in their time
        if is_finished(run_folder):
            continue
        for folder in sorted(run_folder.glob("step-*"), key=step_of, reverse=True):
            try:
                manifest = json.loads((folder / "manifest.json").read_text())
                if hashlib.sha256((folder / "state.pt").read_bytes()).hexdigest() != manifest["sha256"]:
                    raise ValueError("its bytes do not match its manifest")
                state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
                differing = [key for key, value in identity.items() if state["identity"][key] != value]
            except (OSError, ValueError, KeyError, TypeError, RuntimeError, pickle.UnpicklingError) as error:
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


def is_finished(run_folder: Path) -> bool:
    """Whether the record beside these checkpoints says that the run was done."""
    try:
        return read_record(run_folder.with_name(run_folder.name.removesuffix(".checkpoints") + ".jsonl")).is_done
    except RecordError:
        return False
