"""Checkpoints and final weights: written whole or not at all, and checked against a hash before they are used."""

import contextlib
import glob
import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

import aurora
from aurora.bounds import DTYPES
from aurora.config import AUX_KEYS
from aurora.errors import Exit, HarnessError
from aurora.schedule import PEAKS
from aurora.trainer.events import RecordError
from aurora.trainer.process import first_line
from aurora.trainer.ranks import digest, is_peer_failure
from aurora.trainer.record import Progress, Validation, read_record
from aurora.trainer.scheduled import is_scheduled, limit_of
from aurora.trainer.state import Run
from aurora.trainer.timeline import timeline
from aurora.trainer.weights import WeightsError, header_of, weights_of

KEPT_CHECKPOINTS = 2


def identity_of(start: dict[str, Any]) -> dict[str, Any]:
    """What a run and the checkpoint it goes on from have in common. start: its run event."""
    data = {"data": start["data"]["fingerprint"], "val": start["data"]["val_sha256"]}
    files = {name: text for name, text in start["sources"].items() if name.endswith(".py")}
    code = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items()}
    rule = {"rule": start["rule"]} if "rule" in start else {}  # of another package: its version
    train = {key: value for key, value in start["config"]["train"].items() if key != "shard"}  # it may go on otherwise
    return {"config": start["config"] | {"train": train}, "seed": start["seed"]} | data | rule | {"code": code}


def save_run(run: Run) -> None:
    """A checkpoint of the whole run beside its record, on all ranks or none; nothing of a run that could not go on from
    it. Collective."""
    if run.no_resume:
        return
    start, progress = run.start, run.progress
    timeline.mark("checkpoint_gather", progress.step)
    spent_ns, _ = run.clock.of_slowest_rank()
    state = {"training": run.state_dict(), "identity": identity_of(start), "run_id": start["run_id"]}
    state |= {"spent_ns": spent_ns, "world_size": run.ranks.world_size, "micro_batch": run.plan.micro_batch}
    state |= {"attention": start["attention"]}
    state |= vars(progress) | {"validations": [tuple(validation) for validation in progress.validations]}
    folder = run.out / f"{start['run_id']}.checkpoints"
    sealed = lambda: state | {"sha256": digest(state)}  # noqa: E731
    run.ranks.all_or_none(lambda: save_checkpoint(folder, progress.step, sealed()) if run.ranks.is_main else None)
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


def save_weights(run: Run) -> HarnessError | None:
    """The weights of a finished run beside its record, if the config asks for them. Collective.

    Returns what went wrong, on all ranks: the run is done all the same, and its record is still to say so.
    """
    if not run.config.train.save_model:
        return None
    timeline.mark("weights", run.progress.step)
    path = weights_of(run.out / f"{run.start['run_id']}.jsonl")
    metadata = {"format": "pt", "run_id": run.start["run_id"]}  # "pt" is what other readers of the format look for
    try:
        with run.judged_weights():
            weights = run.weights()
            run.ranks.all_or_none(lambda: write_weights(path, weights, metadata) if run.ranks.is_main else None)
    except HarnessError as error:
        return error
    return None


def write_weights(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file, under its name once it is whole. One tensor after the other, so that memory holds one twice.

    Raises:
        HarnessError: DISK, a file that was there is then untouched; CHECKPOINT, for what the format does not have.
    """
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        if odd := [name for name, tensor in tensors.items() if not isinstance(tensor, torch.Tensor)]:
            raise WeightsError(f"{odd[0]} is no tensor")
        header = header_of({name: (str(t.dtype), tuple(t.shape)) for name, t in tensors.items()}, metadata)
        for leftover in path.parent.glob(f".{glob.escape(path.name)}-*"):  # of a process that was killed
            leftover.unlink()
        with synced(temporary) as file:
            file.write(header)
            for tensor in tensors.values():
                file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        timeline.mark("weights_written")
        os.replace(temporary, path)
        sync_folder(path.parent)
    except WeightsError as error:
        message = f"weights {path} cannot be saved: {error}; the record is whole; --set train.save_model=false"
        raise HarnessError(Exit.CHECKPOINT, message) from error
    except OSError as error:
        temporary.unlink(missing_ok=True)  # before the record's last line is written, which needs room
        message = (
            f"weights {path} cannot be written: {first_line(error)}; the record is whole; make room and train again"
        )
        raise HarnessError(Exit.DISK, message) from error


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
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


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
    if f"{state['run_id']}.checkpoints" != folder.parent.name:  # where the run would go on writing
        raise ValueError(f"it is of the run {ascii(state['run_id'])[:80]}, not of the one that its folder names")
    for key in ("step", "segments", "world_size", "micro_batch"):
        if type(state[key]) is not int or not 1 <= state[key] < 2**40:
            raise ValueError(f"its {key} is {ascii(state[key])[:80]}")
    if not state["step"] == manifest["step"] == step_of(folder):
        raise ValueError("it is of another step than its name says")
    return state


def newest_checkpoint(out: Path, start: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any] | None:
    """The whole checkpoint furthest on of all unfinished runs of this track, rule and seed in out, or None.

    start: the run event of the run that would go on.

    Raises:
        HarnessError: CHECKPOINT, when all there are were damaged or made by a run that differs.
    """
    obstacle, identity = None, identity_of(start)
    name = start["run_id"].rsplit("-", 2)[0]  # what follows is the time, and a random part
    run_folders = [folder for folder in out.glob(f"{name}-*.checkpoints") if not is_finished(folder)]
    found = [(step_of(folder), folder) for run_folder in run_folders for folder in list_checkpoints(run_folder)]
    others: set[Path] = set()  # runs that differ
    for _, folder in sorted(found, reverse=True):  # a clock that went back gives a later run an earlier name
        if folder.parent in others:
            continue
        try:
            state = load_checkpoint(folder)
            is_older = "sha256" not in state
            differing = ["version of the trainer"] if is_older else differences(state["identity"], identity)
        except Exception as error:  # a hostile file may raise anything
            obstacle = obstacle or f"all checkpoints in {folder.parent} are damaged"
            say(f"resume: {folder} is damaged ({first_line(error)}), trying an older one")
            continue
        if not differing:
            return state
        others.add(folder.parent)
        obstacle = f"{folder} was made with another {', '.join(differing)}"
    if obstacle:
        raise HarnessError(Exit.CHECKPOINT, f"--resume: {obstacle}; restore it, or start over in another --out")
    return None


def differences(identity: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What differs between two identities: keys, and files of code. Some files are imported on some devices alone."""
    if "code" not in identity:
        return ["version of the trainer"]
    code, other_code = identity["code"], other["code"]
    files = [name for name in code.keys() & other_code.keys() if code[name] != other_code[name]]
    return [key for key, value in other.items() if key != "code" and identity.get(key) != value] + sorted(files)


def check_may_begin(out: Path, start: dict[str, Any], no_resume: str) -> None:
    """Raise HarnessError where --resume must not begin a run: DONE, if out has the record of this very run from its
    start to its end; CONFIG, if it has one that was cut, of an optimizer that cannot go on, for the reason given.

    So a job that is queued again, or a list of commands that is given again, repeats no run. start: its run event.
    """
    name = start["run_id"].rsplit("-", 2)[0]
    identity = json.loads(json.dumps(identity_of(start)))  # as a record has it
    for path in sorted(out.glob(f"{glob.escape(name)}-*.jsonl")):
        try:
            run = read_record(path)
            is_this = not differences(identity_of(run.start), identity)
        except (RecordError, KeyError, TypeError, AttributeError):  # another's file may hold anything
            continue
        if run.is_done and is_this:
            raise HarnessError(Exit.DONE, f"--resume: {path} is this run from its start to its end")
        if no_resume and (run.end is None or run.end["status"] == "interrupted"):
            message = f"--resume: {path} was cut, and {start['optimizer']} is not resumable: {no_resume}"
            raise HarnessError(Exit.CONFIG, f"{message}; start anew in another --out")


def is_finished(run_folder: Path) -> bool:
    """Whether the record beside these checkpoints says that the run was done."""
    try:
        return read_record(run_folder.with_name(run_folder.name.removesuffix(".checkpoints") + ".jsonl")).is_done
    except RecordError:
        return False


def take_over(checkpoint: dict[str, Any], run: Run, validation_steps: Iterable[int]) -> Progress:
    """Take over training state and time spent, all of it or HarnessError; how far the run had come. Collective.

    validation_steps: of the whole run.
    """
    try:
        check_progress(checkpoint, run, validation_steps)
        check_training(checkpoint["training"], run, checkpoint["step"])
        run.load_state_dict(checkpoint["training"])
        if digest(run.state_dict()) != digest(checkpoint["training"]):
            raise ValueError("what was loaded is not what was saved")
        if digest({key: value for key, value in checkpoint.items() if key != "sha256"}) != checkpoint["sha256"]:
            raise ValueError("it was edited since it was saved")
    except Exception as error:  # a hostile file may raise anything
        if is_peer_failure(error):
            raise
        message = f"--resume: the checkpoint does not fit this run: {first_line(error)}; start over in another --out"
        raise HarnessError(Exit.CHECKPOINT, message) from error
    run.clock.add(checkpoint["spent_ns"])
    validations = [Validation(*validation) for validation in checkpoint["validations"]]
    return Progress(checkpoint["step"], validations, checkpoint["segments"] + 1)


def check_progress(checkpoint: dict[str, Any], run: Run, validation_steps: Iterable[int]) -> None:
    """Raise ValueError for steps, times and losses that this run cannot have had, or of which its record tells else."""
    step, spent_ns = checkpoint["step"], checkpoint["spent_ns"]
    if step > run.config.train.steps:
        raise ValueError(f"it is of step {step}, the run has {run.config.train.steps}")
    if spent_ns.keys() != set(run.clock.ACCOUNTS) or not all(
        type(ns) is int and 0 <= ns < 2**62 for ns in spent_ns.values()
    ):
        raise ValueError(f"its clock is {ascii(spent_ns)[:200]}")
    validations = [Validation(*validation) for validation in checkpoint["validations"]]
    due = sorted(due for due in validation_steps if due <= step)
    if [type(validation.step) for validation in validations] != [int] * len(due) or [
        v.step for v in validations
    ] != due:
        raise ValueError(f"it has validations at {ascii([v.step for v in validations])[:80]}, due were {str(due)[:80]}")
    times_s = [0.0, *(validation.train_time_s for validation in validations), spent_ns["train"] / 1e9]
    if times_s != sorted(times_s):
        raise ValueError(f"its seconds of training go back: {str(times_s)[:80]}")
    if not all(type(v.val_loss) is float and 0 <= v.val_loss < math.inf for v in validations):
        raise ValueError("it has a validation loss that is none")
    path = run.out / f"{checkpoint['run_id']}.jsonl"
    with contextlib.suppress(RecordError):  # without a record, the run begins it anew
        recorded = read_record(path).validations
        if other := [validation for validation in validations if validation not in recorded]:
            raise ValueError(f"its validation at step {other[0].step} is another in {path}")


def check_training(state: dict[str, Any], run: Run, step: int) -> None:
    """Raise ValueError for state that is no such run's: what torch itself takes over from a file without a look."""
    if state.keys() != {"model", "optimizers", "loader", "rng"} or state["loader"] != {"step": step}:
        raise ValueError(
            f"its parts are {', '.join(map(str, state))}, its loader is at {ascii(state.get('loader'))[:80]}"
        )
    for optimizer, saved in zip(run.optimizers, state["optimizers"], strict=True):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        name = type(optimizer).__name__
        if not aurora.is_ours(optimizer):  # what its state holds only its package knows, and the hash tells of edits
            check_external_settings(optimizer.param_groups, saved["param_groups"], run.config.hparams)
            continue
        if len(saved["state"]) != len(params):
            raise ValueError(f"it holds the state of {len(saved['state'])} of {len(params)} parameters of {name}")
        check_settings(optimizer.state_dict()["param_groups"], saved["param_groups"])
        for index, entry in saved["state"].items():
            if "step" in entry and float(entry["step"]) != step:
                raise ValueError(f"{name}'s state {index} is of step {float(entry['step']):g}, not {step}")
            if isinstance(optimizer, torch.optim.AdamW):  # whose loader takes any shape
                found = {key: (tuple(value.shape), value.dtype) for key, value in entry.items() if key != "step"}
                wanted = dict.fromkeys(("exp_avg", "exp_avg_sq"), (tuple(params[index].shape), params[index].dtype))
                if found != wanted or "step" not in entry:
                    raise ValueError(f"AdamW's state {index} is {found}, not {wanted}")
    for name, tensor in tensors_of(state if aurora.is_ours(run.rule) else state["model"]):
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{name} is not finite")


def check_settings(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Raise ValueError for hyper-parameters that are not those of the config."""
    for index, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        for key in our.keys() | their.keys():
            if is_scheduled(key, our) and type(their.get(key)) is float and 0 <= their[key] <= limit_of(key, our):
                continue  # set anew at each step
            if key == "polar_dtype" and their.get(key) in DTYPES:
                continue  # what "auto" meant where the run began
            if key not in our or key not in their or repr(our[key]) != repr(their[key]):
                raise ValueError(
                    f"{key} of group {index} is {ascii(their.get(key))[:80]}, not {str(our.get(key))[:80]}"
                )


def check_external_settings(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], hparams: dict[str, Any]) -> None:
    """check_settings() of those that the config gives. Other optimizers count steps in their groups, and more."""
    given = {key for key in hparams if key not in ("lr", *AUX_KEYS)} | {"role", *PEAKS.values()}
    kept = [[{key: group[key] for key in given & group.keys()} for group in groups] for groups in (ours, theirs)]
    check_settings(*kept)


def tensors_of(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict | list | tuple):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors_of(entry, f"{name}.{key}".lstrip("."))
