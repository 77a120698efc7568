"""What passes before a run's first step, in whole processes that take turns."""

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from aurora.config import ROOT
from aurora.errors import Exit, HarnessError
from aurora.trainer.identity import describe_machine
from aurora.trainer.record import read_folder
from scripts.benchmarks.train import own_command, write

STEPS = ("--set", "train.steps=1", "--set", "eval.telemetry=false", "--set", "train.save_model=false")


def start(args: argparse.Namespace) -> str:
    """A Markdown table of seconds, medians of args.rounds turns; also written to OUT.md and OUT.json."""
    trainer = [sys.executable, str(ROOT / "train_gpt.py")]
    track = [*trainer, "--config", str(args.config.resolve()), "--optimizer", "muon"]
    commands = {
        "python -c 'import torch'": [sys.executable, "-c", "import torch"],
        "python -c 'import train_gpt'": [sys.executable, "-c", "import train_gpt"],
        "train_gpt.py --help": [*trainer, "--help"],
        "train_gpt.py --dry-run": [*track, "--dry-run"],
    }
    first_steps = {
        "to the first step, eager": ("off", "eager"),
        "to the first step, compiled with an empty cache": ("on", ""),
        "to the first step, compiled with a cache from another process": ("on", "shared"),
    }
    times: dict[str, list[float]] = {label: [] for label in (*commands, *first_steps)}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            for label, command in commands.items():
                times[label].append(seconds(command))
            for label, (mode, cache) in first_steps.items():
                out = Path(folder) / f"{number}{mode}{cache}"
                caches = {"TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / (cache or f"cache{number}"))}
                command = [*track, *STEPS, "--set", f"train.compile={mode}", "--out", str(out)]
                if cache == "shared" and not number:
                    seconds([*command[:-1], str(out) + "_before"], caches)  # fills it
                seconds(command, caches)
                times[label].append(before_first_step_s(out))
    result = {
        "command": own_command(),
        "machine": describe_machine() | {"torch": torch.__version__, "threads": torch.get_num_threads()},
        "config": args.config.name,
        "rounds_s": times,
    }
    text = start_table(result)
    write(args.out, result, text)
    return text


def seconds(command: list[str], env: dict[str, str] | None = None) -> float:
    begin_s = time.perf_counter()
    outcome = subprocess.run(command, cwd=ROOT, env=os.environ | (env or {}), capture_output=True, text=True)
    if outcome.returncode:
        raise HarnessError(
            Exit.CONFIG, f"{shlex.join(command)} ended with {outcome.returncode}: {outcome.stderr[-300:]}"
        )
    return time.perf_counter() - begin_s


def before_first_step_s(out: Path) -> float:
    """From the start of the process, by the record in out."""
    (run,), _ = read_folder(out)
    untimed = run.end_event["untimed"]
    return untimed["import_s"] + untimed["setup_s"] + untimed["warmup_s"]


def start_table(result: dict[str, Any]) -> str:
    machine, times = result["machine"], result["rounds_s"]
    rounds = len(next(iter(times.values())))
    lines = [
        f"{result['config']} on {machine['cpu']}, threads: {machine['threads']}, torch {machine['torch']}; "
        f"{rounds} rounds",
        "",
        f"    {result['command']}",
        "",
        "| what | seconds | of all rounds |",
        "|---|---|---|",
    ]
    for label, found in times.items():
        lines.append(f"| {label} | {statistics.median(found):.2f} | {min(found):.2f} to {max(found):.2f} |")
    return "\n".join(lines) + "\n"
