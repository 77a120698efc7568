"""Run a record's own code again, in a process and a folder of its own, and compare the losses.

This executes what the record holds. Nothing else in the project does.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from aurora.config import MATRICES, ROOT, told_hparams
from aurora.schedule import SHORT_FORM
from aurora.trainer.events import RecordError
from aurora.trainer.identity import EXTERNAL
from aurora.trainer.record import read_folder, read_record
from scripts.verification.checks import Verification
from scripts.verification.events import OTHER_STACK_TOLERANCE
from scripts.verification.export import is_inside, optimizer_of, whole_sources

TIMEOUT_S = 3600
POLL_S = 0.1


def restore_sources(sources: dict[str, str], folder: Path) -> None:
    """Write sources below an empty folder. Raises RecordError, before writing, for a name that leads elsewhere."""
    for name, text in sources.items():
        if not isinstance(text, str) or not is_inside(name):
            raise RecordError(f"the source {name!r} cannot be restored below a folder")
    for name, text in sources.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def settings_of(start: dict) -> list[str]:
    """The resolved config as --set arguments, with data paths that hold from any folder."""
    config, name = start["config"], start["optimizer"]
    tables = {table: values for table, values in config.items() if isinstance(values, dict) and table != "hparams"}
    tables["data"] = {k: str(ROOT / v) if k in ("train", "val") else v for k, v in tables["data"].items()}
    tables[f"optimizer.{name}"] = told_hparams(config)
    # Pieces come from the optimizer's own table, which stands above what the track has for all.
    pieces = {key: value for key, value in tables["schedule"].items() if key not in SHORT_FORM}
    tables["schedule"] = {key: value for key, value in tables["schedule"].items() if key in SHORT_FORM}
    tables[f"optimizer.{name}"] |= {"schedule": pieces} if pieces else {}
    if config.get("parameters", MATRICES) != MATRICES:
        tables[f"optimizer.{name}"]["parameters"] = config["parameters"]
    pairs = [(table, key, value) for table, values in tables.items() for key, value in values.items()]
    return [word for table, key, value in pairs for word in ("--set", f"{table}.{key}={as_toml(value)}")]


def as_toml(value: Any) -> str:
    """A value of a config in one line of TOML."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key} = {as_toml(part)}' for key, part in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(as_toml, value))}]"
    return json.dumps(value)


def replay(verdict: Verification, num_validations: int) -> Verification:
    """Run the code in the record with its config and seed on this machine's data, up to its first validations; compare.

    The stack, on which the tolerance depends, is what the record says it was.
    """
    run = read_record(verdict.path)
    start, claimed = run.start, run.validations[:num_validations]
    if claimed and claimed[0].step > 0:
        verdict.notes.append("not replayed: the record does not tell how the run began")
        return verdict
    with tempfile.TemporaryDirectory() as folder:
        sources, out = Path(folder) / "sources", Path(folder) / "out"
        try:
            whole = whole_sources(run)
            restore_sources(whole, sources)
            found, here, message = run_until(
                command_of(start, sources, out), sources, out, len(claimed), int(start["env"]["torch_threads"])
            )
        except (RecordError, OSError) as error:
            verdict.reasons.append(f"replay: {error}")
            return verdict
    if not found or here["data"]["fingerprint"] != start["data"]["fingerprint"]:
        verdict.notes.append(f"not replayed: {message}" if not found else "not replayed: other training data is here")
        return verdict
    if here.get("rule") != start.get("rule"):
        verdict.notes.append(f"not replayed: its optimizer is of {start['rule']}, here of {here.get('rule')}")
        return verdict
    if len(found) < len(claimed):
        verdict.notes.append(f"not replayed: it ended after {len(found)} of {len(claimed)} validations: {message}")
        return verdict
    # Many processors share a name. Records from before the trainer stated the model do not tell which one it was.
    stack = ("torch", "torch_threads", "device_name", "cpu", "cpu_model")
    is_same_stack = start["device"] == "cpu" and all(here["env"].get(k) == start["env"].get(k) for k in stack)
    is_same_stack &= "cpu_model" in start["env"]
    # A run measures which dtype is fast for the polar factors; param_groups state what it chose.
    is_same_stack &= here.get("param_groups") == start.get("param_groups")
    tolerance = 0.0 if is_same_stack else OTHER_STACK_TOLERANCE
    worst = max(abs(ours.val_loss - theirs.val_loss) for ours, theirs in zip(found, claimed, strict=True))
    for ours, theirs in zip(found, claimed, strict=True):
        if abs(ours.val_loss - theirs.val_loss) > tolerance:
            verdict.reasons.append(
                f"replay: val_loss {ours.val_loss} at step {ours.step}, the record states {theirs.val_loss} "
                f"(tolerance {tolerance:g})"
            )
    if added := whole.keys() - start["sources"].keys():
        verdict.notes.append(f"the record does not embed, so the replay added: {', '.join(sorted(added))}")
    steps = start["config"]["train"]["steps"]
    extent = "" if len(found) == len(run.validations) else f" to step {found[-1].step} of {steps}"
    verdict.word_if_good = f"replayed{extent}" + (f" within {tolerance:g} on another stack" if worst else "")
    return verdict


def command_of(start: dict, sources: Path, out: Path) -> list[str]:
    (track,) = [name for name in start["sources"] if name.endswith(".toml")]
    fixed = ["--config", str(sources / track), "--optimizer", optimizer_of(start), "--seed", str(start["seed"])]
    return [sys.executable, str(sources / "train_gpt.py"), *fixed, "--out", str(out), *settings_of(start)]


def run_until(
    command: list[str], folder: Path, out: Path, num_validations: int, num_threads: int
) -> tuple[list, dict, str]:
    """Validations and run event of the first num_validations validations, and what the process said in the end.

    num_threads: of the CPU, on which the bits of a loss depend.
    """
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": str(num_threads), "SPEEDRUN_FOLDER": str(folder / EXTERNAL)}
    with open(folder.parent / "output.txt", "w+") as output:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            deadline_s = time.monotonic() + TIMEOUT_S
            while True:
                is_over = process.poll() is not None or time.monotonic() > deadline_s
                runs = read_folder(out)[0] if out.exists() else []
                if is_over or (runs and len(runs[0].validations) >= num_validations):
                    break
                time.sleep(POLL_S)
        finally:
            process.kill()
            process.wait()
        output.seek(0)
        message = (output.read(100_000).strip().splitlines() or ["no output"])[-1]
    return (runs[0].validations[:num_validations], runs[0].start, message) if runs else ([], {}, message)
