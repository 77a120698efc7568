"""Another program's step times beside ours: whole processes in turn on one machine."""

import argparse
import itertools
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from aurora.config import ROOT
from aurora.errors import Exit, HarnessError
from scripts.benchmarks.train import train_table, write

NUMBER = r"(\d+(?:\.\d+)?)"
STEP_LINE = re.compile(rf"\bstep:\s?(\d+)(?:/\d+)?\s.*?\btrain_time:\s?{NUMBER}(ms|s)\b")
ITERATION_LINE = re.compile(rf"\biter (\d+): .*?\btime {NUMBER}ms")  # nanoGPT


def peer_steps_ms(text: str) -> list[float]:
    """Milliseconds a step from a program's console lines: of each iteration of nanoGPT, whose first two are warm-up, or
    between lines with step and train_time, in the second half of them."""
    iterations = [float(ms) for _, ms in ITERATION_LINE.findall(text)]
    if iterations:
        return iterations[2:]
    points = [(int(step), float(t) * (1 if unit == "ms" else 1000)) for step, t, unit in STEP_LINE.findall(text)]
    late = points[(len(points) - 1) // 2 :]
    return [(t2 - t1) / (s2 - s1) for (s1, t1), (s2, t2) in itertools.pairwise(late) if s2 > s1 and t2 > t1]


def output_of(command: list[str], limit_s: float, has_enough: Callable[[str], bool] = lambda text: False) -> str:
    """What a program prints until it ends, has printed enough or is out of time; then its processes are ended."""
    with tempfile.TemporaryFile("w+") as log:
        unbuffered = os.environ | {"PYTHONUNBUFFERED": "1"}  # a line that waits for others would come too late
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True, env=unbuffered
        )
        deadline_s = time.monotonic() + limit_s
        text = ""
        while process.poll() is None and time.monotonic() < deadline_s and not has_enough(text):
            time.sleep(0.5)
            log.seek(0)
            text = log.read()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        log.seek(0)
        return log.read()


def against_peer(args: argparse.Namespace) -> str:
    """Ours and the peer's whole processes in turn, args.rounds times; writes OUT.json and OUT.md."""
    name, ours, theirs = args.optimizers[0], [], []
    for number in range(args.rounds):
        out = args.out.with_name(f"{args.out.stem}_round{number}")
        command = [sys.executable, str(ROOT / "scripts" / "benchmark.py"), "train", "--config", str(args.config)]
        command += ["--optimizers", name, "--steps", str(args.steps), "--rounds", "1", "--out", str(out)]
        command += [word for override in args.overrides for word in ("--set", override)]
        text = output_of(command, args.peer_limit_s)
        if not out.with_suffix(".json").exists():
            raise HarnessError(Exit.CONFIG, f"our own benchmark failed: {text.strip().splitlines()[-1:]}")
        result = json.loads(out.with_suffix(".json").read_text())
        ours.append(result["optimizers"][name]["ms_per_step"])
        text = output_of(
            shlex.split(args.peer), args.peer_limit_s, lambda text: len(peer_steps_ms(text)) >= args.peer_samples
        )
        steps_ms = peer_steps_ms(text)
        if not steps_ms:
            last = text.strip().splitlines()[-1:]
            message = f"no 'step:... train_time:...' and no 'iter ...: ... time ...ms' lines; its last: {last}"
            raise HarnessError(Exit.CONFIG, f"--peer {args.peer!r} printed {message}")
        theirs.append(statistics.median(steps_ms))
        for suffix in (".json", ".md"):
            out.with_suffix(suffix).unlink()
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    result["command"] = "python scripts/benchmark.py " + shlex.join(sys.argv[1:])
    result |= {"peer": args.peer, "ours_ms": ours, "peer_ms": theirs, "ratio": statistics.median(ratios)}
    lines = [
        f"`{args.peer}` in turn with ours:",
        "",
        "| round | ours ms/step | peer ms/step | ratio |",
        "|---|---|---|---|",
    ]
    for number, (a, b, ratio) in enumerate(zip(ours, theirs, ratios, strict=True), start=1):
        lines.append(f"| {number} | {a:.2f} | {b:.2f} | {ratio:.3f} |")
    text = "\n".join(
        [*lines, "", f"median ratio {result['ratio']:.3f}", "", "The last of our own:", "", train_table(result)]
    )
    write(args.out, result, text)
    return text
