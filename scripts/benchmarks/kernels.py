"""Our step with and without each of our kernels, in turns in one process, on one model that has trained for a while.

All ways compute the same function of the same parameters, so the model trains on, whichever takes a step. Trained
weights matter: a GPU's clocks depend on the numbers that it multiplies.
"""

import argparse
import itertools
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import train_gpt
from aurora.config import load_config
from aurora.errors import Exit, HarnessError
from aurora.fast.forward import FastForward
from aurora.fast.hopper import HopperForward
from aurora.trainer import Model
from aurora.trainer.clock import elapsed_ms, time_mark
from aurora.trainer.identity import describe_git
from aurora.trainer.ranks import join_ranks, leave_ranks
from aurora.trainer.warmup import compiled_fast
from scripts.benchmarks.against import median_interval
from scripts.benchmarks.train import describe_device, ready_run, write

ALL = "all kernels"


class WithoutHeads(HopperForward):
    heads = FastForward.heads


class WithoutMLP(HopperForward):
    mlp = FastForward.mlp


WAYS: dict[str, Callable[[Any], FastForward]] = {
    ALL: HopperForward,
    "without that of the MLP": WithoutMLP,
    "without that of queries and keys": WithoutHeads,
    "without both": FastForward,
}


def kernels(args: argparse.Namespace) -> str:
    """Train for args.train_steps, then time the ways in turns; writes OUT.json and OUT.md."""
    if min(args.train_steps, args.rounds) < 1 or args.steps < 2:
        raise HarnessError(Exit.CONFIG, "--train-steps and --rounds must be above 0, --steps above 1")
    begin_s, ranks = time.monotonic(), join_ranks(timeout_s=60)
    config = load_config(args.config, "muon", [*args.overrides, "data.allow_epochs=true"])
    if config.model.mlp != "relu2":
        raise HarnessError(Exit.CONFIG, f"{args.config.name}: the MLPs' kernel is of relu2, not of {config.model.mlp}")
    needed = args.train_steps + len(WAYS) * (args.rounds * args.steps + 1)
    if needed > config.train.steps:
        raise HarnessError(Exit.CONFIG, f"these are {needed} steps, the schedule has {config.train.steps}")
    run, model = ready_run(config, ranks)
    steps = itertools.count()
    losses = [float(step_of(run, model, steps)[1]) for _ in range(args.train_steps)]
    is_compiled = bool(run.start["compiled"])
    ways: dict[str, Model] = {}
    prepare_s: dict[str, float] = {}
    for name, make in WAYS.items():
        if ways and time.monotonic() - begin_s > args.limit_s:
            print(f"after {args.limit_s:g} s left out: {name}", file=sys.stderr)
            continue
        before_s = time.monotonic()
        if name == ALL and run.start["kernels"] == "triton":
            ways[name] = model  # compiled already
        else:
            ways[name] = compiled_fast(make(run.model), run) if is_compiled else make(run.model)
        step_of(run, ways[name], steps)
        ranks.align()
        prepare_s[name] = time.monotonic() - before_s
    rounds_ms: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(args.rounds):
        for name in list(ways) if number % 2 == 0 else reversed(ways):
            turn = [step_of(run, ways[name], steps)[0] for _ in range(args.steps)]
            ranks.align()
            rounds_ms[name].append(statistics.median(elapsed_ms(*marks) for marks in turn[1:]))
    result = run.start | {
        "command": "python scripts/benchmark.py " + shlex.join(sys.argv[1:]),
        "git": describe_git(),
        "config": args.config.name,
        "batch_tokens": config.train.batch_tokens,
        "device": describe_device(ranks.device, getattr(torch, config.model.activation_dtype)),
        "trained_steps": args.train_steps,
        "losses": [losses[0], losses[-1]],
        "prepare_s": prepare_s,
        "rounds_ms": rounds_ms,
    }
    text = table(result)
    write(args.out, result, text)
    leave_ranks()
    return text


def step_of(run: Any, model: Model, steps: "itertools.count[int]") -> tuple[tuple[Any, Any], torch.Tensor]:
    """A training step by this model: marks at its begin and end, and its loss."""
    begin = time_mark(run.ranks.device)
    loss = train_gpt.train_step(run, model, next(steps))
    return (begin, time_mark(run.ranks.device)), loss


def table(result: dict[str, Any]) -> str:
    rounds, device = result["rounds_ms"], result["device"]
    first, last = result["losses"]
    lines = [
        f"{result['config']}: {result['batch_tokens']:,} tokens a step on {device['name']}, torch {device['torch']}, "
        f"{'compiled' if result['compiled'] else 'eager'}, attention {result['attention']}, micro-batch "
        f"{result['micro_batch']}; after {result['trained_steps']} steps with Muon, loss {first:.3f} to {last:.3f}",
        "",
        f"    {result['command']}",
        "",
        "| way | ms/step | of the step with all [95 %] | prepare s |",
        "|---|---|---|---|",
    ]
    for name, ms in rounds.items():
        ratios = [a / b for a, b in zip(ms, rounds[ALL], strict=True)]
        interval = median_interval(ratios) if name != ALL else None
        brackets = f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""
        cells = f"{statistics.median(ms):.2f} | {statistics.median(ratios):.4f}{brackets}"
        cells += f" | {result['prepare_s'][name]:.1f}"
        lines.append(f"| {name} | {cells} |")
    lines += ["", "Medians of rounds in turns; a turn's time is the median of its steps without the first."]
    return "\n".join(lines) + "\n"
