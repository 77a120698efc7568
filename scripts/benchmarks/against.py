"""The trainer of this checkout and that of another one: the same track, seed and tokens, in turns on one machine.

The other one may have any layout: only its command line, its console's validations and its record are used. Each
trainer starts, warms up alone and is stopped. In a round each runs one turn, which ends with a small validation: A B,
B A, A B, ... A turn's time is the median of its step times in the record, without the first one.
"""

import argparse
import itertools
import math
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from aurora.config import ROOT, load_config
from aurora.errors import Exit, HarnessError
from aurora.trainer.events import read_events
from scripts.benchmarks.program import Program, ended_programs, trainer_command
from scripts.benchmarks.train import write

UNTIMED_STEPS = 1  # at the start of a turn: the stop before it falls into this one
REPORT_S = 10.0  # between lines on progress
HOW = {True: "compiled", False: "eager", "fast": "fast forward", "plain": "plain forward", "triton": "Triton kernels"}


def against(args: argparse.Namespace) -> str:
    """A Markdown table of both trainers' steps after args.rounds rounds; with args.out, also OUT.md and OUT.json."""
    if args.steps <= UNTIMED_STEPS or args.rounds < 1 or args.nproc < 1:
        raise HarnessError(Exit.CONFIG, f"--steps must be above {UNTIMED_STEPS}, --rounds and --nproc above 0")
    checkouts = {"ours": ROOT, "theirs": args.against.resolve()}
    if not (checkouts["theirs"] / "train_gpt.py").is_file():
        raise HarnessError(Exit.CONFIG, f"{args.against} has no train_gpt.py; give a checkout of this project")
    config = load_config(args.config, "muon", args.overrides)
    settings = {
        "train.steps": args.rounds * args.steps, "data.allow_epochs": "true", "eval.every": args.steps,
        "eval.late_every": args.steps, "eval.tokens": config.model.seq_len * args.nproc,
    }  # fmt: skip
    shards = f"data.train={ROOT / config.data.train}", f"data.val={ROOT / config.data.val}"  # for both
    begin_s, rounds_done = time.monotonic(), 0
    deadline_s, reported_s = begin_s + args.limit_s, begin_s
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, ended_programs() as programs:
        outs = {name: Path(folder) / name for name in checkouts}
        try:
            for name, checkout in reversed(checkouts.items()):  # first the one that may not start
                say(f"starting the trainer of {checkout}")
                outs[name].mkdir()
                command = trainer_command(checkout, args.config, settings, [*args.overrides, *shards], outs[name])
                log = args.out.with_name(f"{args.out.name}_{name}.log") if args.out else outs[name] / "console.log"
                own_cache = {"TORCHINDUCTOR_CACHE_DIR": str(outs[name] / "inductor")}  # neither finds compiled code
                programs.append(Program(command, checkout, log, args.nproc, own_cache))
                programs[-1].run_until(r"step:0/\d+ val_loss", deadline_s)
            for number in range(args.rounds):
                for program in programs if number % 2 == 0 else reversed(programs):
                    program.run_until(rf"step:{(number + 1) * args.steps}/\d+ val_loss", deadline_s)
                rounds_done += 1
                if time.monotonic() - reported_s > REPORT_S or rounds_done in (1, args.rounds):
                    reported_s = time.monotonic()
                    say(f"round {rounds_done} of {args.rounds}, {reported_s - begin_s:.0f} s after the start")
            for program in programs:
                program.run_to_end(deadline_s)
        except HarnessError as error:
            if not rounds_done:
                raise
            say(f"after {rounds_done} rounds: {error}")
        records = {name: record_of(out) for name, out in outs.items()}
    result = compared(args, checkouts, records, rounds_done)
    text = table(result)
    if args.out:
        write(args.out, result, text)
    return text


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def record_of(folder: Path) -> list[dict[str, Any]]:
    (path,) = folder.glob("*.jsonl")
    return [event for _, event in read_events(path)]


def compared(
    args: argparse.Namespace, checkouts: dict[str, Path], records: dict[str, list[dict[str, Any]]], rounds: int
) -> dict[str, Any]:
    trainers = {}
    for name, events in records.items():
        begin, end = events[0], events[-1]
        steps = {event["step"]: event for event in events if event["event"] == "train"}
        firsts = range(1, rounds * args.steps + 1, args.steps)
        timed = [[steps[first + i]["step_ms"] for i in range(UNTIMED_STEPS, args.steps)] for first in firsts]
        trainers[name] = {
            "checkout": str(checkouts[name]),
            "commit": begin["git"],
            "code_hash": begin["code_hash"],
            "how": [how for key in ("compiled", "forward", "kernels") if (how := HOW.get(begin.get(key)))],
            "threads": begin["env"]["torch_threads"],
            "warmup_s": end["untimed"]["warmup_s"] if end["event"] == "end" else None,
            "rounds_ms": [statistics.median(turn) for turn in timed],
            "first_losses": [steps[step]["train_loss"] for step in range(1, args.steps + 1)],
        }
    begin, (ours, theirs) = records["ours"][0], trainers.values()
    ratios = [a / b for a, b in zip(ours["rounds_ms"], theirs["rounds_ms"], strict=True)]
    losses = zip(ours["first_losses"], theirs["first_losses"], strict=True)
    return {
        "command": "python scripts/benchmark.py " + shlex.join(sys.argv[1:]),
        "config": args.config.name,
        "world_size": begin["world_size"],
        "device": begin["env"]["device_name"],
        "torch": begin["env"]["torch"],
        "steps_of_a_turn": args.steps,
        "trainers": trainers,
        "ratios": ratios,
        "ratio": statistics.median(ratios),
        "interval": median_interval(ratios),
        "loss_difference": max(abs(a - b) / abs(b) for a, b in losses),
    }


def median_interval(values: list[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """An interval that holds the median of what the values are drawn from, by order statistics: each value lies below
    that median with probability 1/2. None where there are too few values for one."""
    values, n = sorted(values), len(values)
    # Of the sums of a binomial distribution's lower tail: those within what the interval may miss on one side.
    tails = itertools.accumulate(math.comb(n, k) / 2**n for k in range(n))
    left_out = sum(1 for _ in itertools.takewhile(lambda tail: tail <= (1 - confidence) / 2, tails))
    return (values[left_out - 1], values[n - left_out]) if left_out else None


def table(result: dict[str, Any]) -> str:
    rounds, trainers, interval = len(result["ratios"]), result["trainers"], result["interval"]
    lines = [
        f"{result['config']} with Muon on {result['world_size']} x {result['device']}, torch {result['torch']}, "
        f"{trainers['ours']['threads']} threads a rank; {rounds} rounds of a turn each, of {result['steps_of_a_turn']} "
        "steps",
        "",
        f"    {result['command']}",
        "",
        "| trainer | commit | code | mode | median ms/step | warm-up s |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in trainers.items():
        commit = f"{row['commit']['commit'][:8]}{' + edits' * row['commit']['dirty']}" if row["commit"] else "-"
        warmup = "-" if row["warmup_s"] is None else f"{row['warmup_s']:.1f}"
        lines.append(
            f"| {name}: {row['checkout']} | {commit} | {row['code_hash'][:8]} | "
            f"{', '.join(row['how'])} | {statistics.median(row['rounds_ms']):.1f} | {warmup} |"
        )
    width = f"95 % interval {interval[0]:.4f} to {interval[1]:.4f}" if interval else "too few rounds for an interval"
    lines += [
        "",
        f"Ours / theirs, the median of the rounds: {result['ratio']:.4f}; {width} (order statistics).",
        "",
        "A turn's time is the median of its steps without the first. Each trainer warmed up alone and found no "
        f"compiled code. Their training losses in the first turn differ relatively by at most "
        f"{result['loss_difference']:.1e}.",
    ]
    return "\n".join(lines) + "\n"
