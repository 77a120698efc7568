"""A finished run's model: its weights, in the model that the record's own sources define.

Files of strangers run nothing: weights are a safetensors file that is checked against the record, and the model's code
runs only where it is this checkout's, but for comments, or where the user trusts it.
"""

import os
import types
from pathlib import Path
from typing import Any, NamedTuple

import torch

from aurora.bounds import LARGEST, LARGEST_WHOLE
from aurora.errors import Exit, HarnessError
from aurora.fast.float8 import check_float8
from aurora.trainer.events import RecordError
from aurora.trainer.process import first_line
from aurora.trainer.record import Run, read_record, record_paths
from aurora.trainer.weights import DTYPES, Stored, WeightsError, check_weights, read_header
from scripts.models.source import CONFIG_CLASS, SourceError, is_same_code, model_source, source_here

RUNS = Path("runs")


class Trained(NamedTuple):
    """A run's model with its weights, in eval mode."""

    run: Run
    model: Any  # its logits() takes (B, T) tokens to (B, T, V) float32, T at most seq_len
    source: str  # the module that defines it
    weights: Path
    device: torch.device

    @property
    def config(self) -> dict[str, Any]:
        """The model's settings, as the record has them."""
        return self.run.start["config"]["model"]

    @property
    def name(self) -> str:
        return str(self.run.start.get("run_id", self.run.path.stem))


def find_record(text: str) -> Path:
    """The record that is meant: its path, a run id in runs/, or a folder with one record.

    Raises:
        HarnessError: CONFIG, there is none, or more than one.
    """
    path = Path(text)
    if path.is_file():
        if path.suffix != ".jsonl":
            raise HarnessError(Exit.CONFIG, f"{path} is no record, which is a .jsonl file; name the run's record")
        return path
    found = record_paths(path) if path.is_dir() else [p for p in record_paths(RUNS) if p.stem == text]
    if len(found) == 1:
        return found[0]
    if found:
        raise HarnessError(Exit.CONFIG, f"{path} holds {len(found)} records; name one, such as {found[0]}")
    where = "holds no record" if path.is_dir() else f"is no record, no folder, and no run in {RUNS}/"
    raise HarnessError(Exit.CONFIG, f"{text} {where}; name a run's record, <run_id>.jsonl")


def load(record: Path, is_trusted: bool = False) -> Trained:
    """The model of a finished run, on the device that is here.

    is_trusted: run the model's code also where it is not this checkout's.

    Raises:
        HarnessError: CHECKPOINT: no such run, code that is not trusted, or weights that are not the record's or do not
            fit its model.
    """
    try:
        run = read_record(record)
        if not run.is_done:
            status = run.end["status"] if run.end else "not ended"
            raise WeightsError(f"the run of {record} is {status}, so it has no final weights; let it finish")
        source = model_source(run.start["sources"])
        check_trusted(record, source, is_trusted)
        weights = check_weights(record, str(run.end_event.get("weights_sha256")))
        stored = read_header(weights)
        device = device_here()
        model = build(source, run.start["config"].get("model"), stored, weights)
        model.load_state_dict(dict(read_tensors(weights, stored)))
        if run.start["config"]["model"].get("head_dtype") == "float8":
            check_float8(device)
    except (RecordError, WeightsError) as error:
        raise HarnessError(Exit.CHECKPOINT, str(error)) from error
    except SourceError as error:
        raise HarnessError(
            Exit.CHECKPOINT, f"{record}: its model cannot be taken out of its sources: {error}"
        ) from error
    return Trained(run, model.to(device).eval(), source, weights, device)


def check_trusted(record: Path, source: str, is_trusted: bool) -> None:
    """Raise HarnessError for code that is not this checkout's, unless it is trusted."""
    try:
        is_ours = is_same_code(source, source_here())
    except (SourceError, OSError):
        is_ours = False
    if not (is_ours or is_trusted):
        message = f"the model's code in {record} is not that of this checkout, and nothing of it was run"
        raise HarnessError(Exit.CHECKPOINT, f"{message}; --trust runs it, with all that it may do")


def device_here() -> torch.device:
    """The GPU if there is one, or what SPEEDRUN_DEVICE names."""
    has_gpu = torch.cuda.is_available()
    return torch.device(os.environ.get("SPEEDRUN_DEVICE") or ("cuda" if has_gpu else "cpu"))


def build(source: str, settings: Any, stored: dict[str, Stored], weights: Path) -> Any:
    """The model that the source defines, once its parameters are those of the file. Raises WeightsError."""
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise WeightsError(f"the record of {weights} has no model settings")
    for key, value in settings.items():  # before a model of a billion layers is made
        if type(value) is int and not 1 <= value <= LARGEST.get(key, LARGEST_WHOLE):
            raise WeightsError(f"the record of {weights} has model.{key} = {value}, which no run can have")
    for key in ("vocab_size", "seq_len"):
        if type(settings.get(key)) is not int:
            raise WeightsError(f"the record of {weights} has no model.{key}")
    module = types.ModuleType("trained_model")
    try:
        exec(compile(source, "the model's code in the record", "exec", dont_inherit=True), vars(module))
        config = getattr(module, CONFIG_CLASS)(**settings)
        with torch.device("meta"):  # which takes no memory
            wanted = vars(module)["GPT"](config).state_dict()
        check_tensors({name: (str(t.dtype), tuple(t.shape)) for name, t in wanted.items()}, stored, weights)
        model = vars(module)["GPT"](config)
        model.logits  # noqa: B018
    except WeightsError:
        raise
    except Exception as error:  # the settings may be anything, and so may code that is trusted
        raise WeightsError(
            f"the model of {weights} cannot be made: {type(error).__name__}: {first_line(error)}"
        ) from error
    return model


def check_tensors(wanted: dict[str, tuple[str, tuple[int, ...]]], stored: dict[str, Stored], weights: Path) -> None:
    """Raise WeightsError where a file has other tensors than a model, {name: (dtype, shape)}."""
    found = {name: (DTYPES[entry.dtype][0], entry.shape) for name, entry in stored.items()}
    for names, what in (
        (wanted.keys() - found.keys(), "lack"),
        (found.keys() - wanted.keys(), "have, beyond the model,"),
    ):
        if names:
            raise WeightsError(f"weights {weights} {what} {ascii(min(names))[:80]}; they are of another model")
    for name, value in wanted.items():
        if found[name] != value:
            dtype, shape = found[name]
            raise WeightsError(f"weights {weights}: {name} is {dtype} {shape}, the model's is {value[0]} {value[1]}")


def read_tensors(path: Path, stored: dict[str, Stored]) -> Any:
    """Name and tensor of each, on the CPU; one at a time."""
    try:
        with open(path, "rb") as file:
            for name, entry in stored.items():
                file.seek(entry.begin)
                dtype = getattr(torch, DTYPES[entry.dtype][0].removeprefix("torch."))
                content = bytearray(file.read(entry.end - entry.begin))
                flat = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
                yield name, flat.reshape(entry.shape)
    except (OSError, ValueError, RuntimeError) as error:  # it was cut meanwhile
        raise WeightsError(f"weights {path} cannot be read: {first_line(error)}") from error
