"""The public optimization benchmark's script and ours on the same tokens, in turns on one machine.

Both start and compile. Then one is stopped (SIGSTOP) while the other trains from one validation to the next, so that
each has the device for itself and both have it hot. Public script: train_gpt_simple.py of modded-nanogpt,
records/track_3_optimization; of a copy of it the validation alone is changed, its tokens and how often. Until the end
of these steps both have their peak lr.
"""

import argparse
import re
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from aurora.config import ROOT
from aurora.errors import Exit, HarnessError
from aurora.trainer.events import read_events
from scripts.benchmarks.program import POLL_S, Program, ended_programs, trainer_command
from scripts.benchmarks.train import write

WARMUP_STEPS = 5  # of a turn, that are not timed
# What is changed in the copy, by what; each must be there once.
CHANGES = {
    r"^val_tokens = .*$": "val_tokens = {tokens}",
    r"\bval_step_freq = \d+ if": "val_step_freq = {every} if",
}


def public_program(args: argparse.Namespace, folder: Path) -> Program:
    """A copy of the script, in a folder where it finds its tokens."""
    text = args.peer.read_text(encoding="utf-8")
    for pattern, replacement in CHANGES.items():
        changed = replacement.format(tokens=args.val_tokens, every=args.every)
        text, count = re.subn(pattern, changed, text, flags=re.MULTILINE)
        if count != 1:
            raise HarnessError(Exit.CONFIG, f"{args.peer} has {count} times {pattern!r}, 1 expected: another version?")
    (folder / "public.py").write_text(text, encoding="utf-8")
    shards = folder / "data" / "fineweb10B"
    shards.mkdir(parents=True)
    for split, path in (("train", args.train), ("val", args.val)):
        (shards / f"fineweb_{split}_000000.bin").symlink_to(path.resolve())
    return Program([sys.executable, "public.py"], folder, args.out.with_name(f"{args.out.name}_public.log"))


def our_program(args: argparse.Namespace, folder: Path) -> Program:
    settings = {
        "data.train": args.train, "data.val": args.val, "train.steps": args.steps, "train.micro_batch": 64,
        "eval.every": args.every, "eval.late_every": args.every, "eval.tokens": args.val_tokens,
    }  # fmt: skip
    command = trainer_command(ROOT, args.config, settings, args.overrides, folder)
    return Program(command, ROOT, args.out.with_name(f"{args.out.name}_ours.log"))


def public_steps_s(text: str) -> dict[int, float]:
    """Its clock after each step."""
    return {int(step): float(at_s) for step, at_s in re.findall(r"^step:(\d+)/\d+ train_time:([\d.]+)s", text, re.M)}


def losses(text: str) -> dict[int, float]:
    return {int(step): float(loss) for step, loss in re.findall(r"^step:(\d+)/\d+ val_loss:([\d.]+)", text, re.M)}


def turns(args: argparse.Namespace) -> str:
    """Both programs to args.steps, args.every at a time; writes OUT.json, OUT.md and both consoles."""
    if args.every <= WARMUP_STEPS or args.steps < args.every:
        raise HarnessError(Exit.CONFIG, f"--every must be above {WARMUP_STEPS} and at most --steps = {args.steps}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    our_folder = args.out.with_name(f"{args.out.name}_ours")
    before = set(our_folder.glob("*.jsonl"))
    deadline_s, turns_done = time.monotonic() + args.limit_s, 0
    with tempfile.TemporaryDirectory() as folder, ended_programs() as programs:
        try:
            programs.append(public_program(args, Path(folder)))
            programs.append(our_program(args, our_folder))
            public, ours = programs
            starting = {ours: "step:0/", public: "step:2/"}
            while starting:
                starting = {p: line for p, line in starting.items() if not p.has_said(line, deadline_s)}
                time.sleep(POLL_S)
            for step in range(args.every, args.steps + 1, args.every):
                ours.run_until(rf"step:{step}/\d+ val_loss", deadline_s)
                public.run_until(rf"step:{step}/\d+ val_loss", deadline_s)
                turns_done += 1
        except HarnessError as error:
            if not turns_done:
                raise
            print(f"after {turns_done} turns: {error}", file=sys.stderr)
    (record,) = set(our_folder.glob("*.jsonl")) - before
    events = [event for _, event in read_events(record)]
    return report(args, turns_done, public.text(), ours.text(), events)


def report(
    args: argparse.Namespace, turns_done: int, public_text: str, our_text: str, events: list[dict[str, Any]]
) -> str:
    begin = events[0]
    clock_s = public_steps_s(public_text)
    step_ms = {event["step"]: event["step_ms"] for event in events if event["event"] == "train"}
    rows = []
    for last in range(args.every, turns_done * args.every + 1, args.every):
        first = last - args.every + WARMUP_STEPS
        theirs_ms = 1000 * (clock_s[last] - clock_s[first]) / (last - first)
        ours_ms = statistics.mean(step_ms[step] for step in range(first + 1, last + 1))
        rows.append({"first": first + 1, "last": last, "ours_ms": ours_ms, "public_ms": theirs_ms})
    found = {"ours": losses(our_text), "public": losses(public_text)}
    result = {
        "command": "python scripts/benchmark.py " + shlex.join(sys.argv[1:]),
        "run": {key: value for key, value in begin.items() if key != "sources"},
        "turns": rows,
        "val_loss": found,
    }
    lines = [
        f"{args.config.name} with Muon and {args.peer.name} in turns on {begin['env']['device_name']}, the same tokens",
        "",
        f"torch {begin['env']['torch']}, cuDNN {begin['env']['cudnn']}; ours: attention {begin['attention']}, kernels "
        f"{begin['kernels']}, micro-batch {begin['micro_batch']}",
        "",
        f"    {result['command']}",
        "",
        "Means of these steps, the first of each turn left out: ours between marks on the device, the public script's "
        "by the clock that it prints.",
        "",
        "| steps | ours ms/step | public ms/step | ratio |",
        "|---|---|---|---|",
        *(
            f"| {row['first']} to {row['last']} | {row['ours_ms']:.2f} | {row['public_ms']:.2f} | "
            f"{row['ours_ms'] / row['public_ms']:.3f} |"
            for row in rows
        ),
        "",
        "| step | our validation loss | public | difference |",
        "|---|---|---|---|",
        *(
            f"| {step} | {loss:.4f} | {found['public'][step]:.4f} | {loss - found['public'][step]:+.4f} |"
            for step, loss in found["ours"].items()
            if step in found["public"]
        ),
    ]
    text = "\n".join(lines) + "\n"
    write(args.out, result, text)
    return text
