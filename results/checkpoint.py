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
    for old in sorted(folder.glob("step-*"))[:-KEPT_CHECKPOINTS]:
        shutil.rmtree(old)


def newest_checkpoint(out: Path, identity: dict[str, str], say: Callable[[str], None]) -> dict[str, Any] | None:
    """The newest whole checkpoint below out of a run with this identity. Nothing in the file is executed.

    Raises HarnessError when the only checkpoints there are of a run that differs.
    """
    differing = None
    for folder in sorted(out.glob("*.checkpoints/step-*"), key=lambda path: path.name, reverse=True):
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
            if hashlib.sha256((folder / "state.pt").read_bytes()).hexdigest() != manifest["sha256"]:
                raise ValueError("its bytes do not match its manifest")
            state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        except (OSError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
            say(f"resume: {folder} is damaged ({first_line(error)}), trying an older one")
            continue
        differing = {key: folder for key, value in identity.items() if state["identity"][key] != value}
        if not differing:
            return state
    if differing:
        message = f"the checkpoints in {out} were made with another {', '.join(differing)}; --resume wants the same"
        raise HarnessError(Exit.CHECKPOINT, f"{message}: restore it, or use another --out")
    return None
