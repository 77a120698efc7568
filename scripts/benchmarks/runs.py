"""Whole runs of the trainer one after the other in this process, so that the model is compiled once for all of them."""

import argparse
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import train_gpt
from aurora.errors import Exit, HarnessError
from aurora.trainer.record import read_folder

PILOT_SEED, PILOT_MARGIN = 100, 0.02  # of configs/gpt2_small_short.toml's rule


def runs(args: argparse.Namespace) -> str:
    """Every optimizer with every seed; records in args.out, as from train_gpt.py itself."""
    overrides, told = args.overrides, ""
    if args.pilot:
        target = target_of(args.pilot, args)
        overrides, told = [*overrides, f"eval.target={target}"], f"target {target} by a pilot run of {args.pilot}; "
    failed = []
    for seed in args.seeds:
        for name in args.optimizers:
            if code := one_run(args.config, name, seed, args.out, overrides):
                failed.append(f"{name}, seed {seed}: exit code {code}")
    if failed:
        raise HarnessError(Exit.CONFIG, "; ".join(failed))
    command = shlex.join(["python", "scripts/compare.py", "--report", str(args.out)])
    return f"{told}{len(args.seeds) * len(args.optimizers)} runs: {command}"


def one_run(config: Path, name: str, seed: int, out: Path, overrides: Sequence[str]) -> int:
    argv = ["--config", str(config), "--optimizer", name, "--seed", str(seed), "--out", str(out)]
    argv += [word for override in overrides for word in ("--set", override)]
    own_argv, sys.argv = sys.argv, ["train_gpt.py", *argv]  # which the record states
    try:
        return train_gpt.main(argv)
    finally:
        sys.argv = own_argv


def target_of(pilot: str, args: argparse.Namespace) -> float:
    """The loss at the end of a run of this optimizer that is in no comparison, plus a margin, rounded up to hundredths.

    Raises:
        HarnessError: CONFIG, the run did not reach its end.
    """
    out = args.out.with_name(f"{args.out.name}_pilot")
    code = one_run(args.config, pilot, PILOT_SEED, out, args.overrides)
    done = [run for run in read_folder(out)[0] if run.is_done]
    if code or not done:
        raise HarnessError(Exit.CONFIG, f"the pilot run of {pilot} ended with exit code {code}; see {out}")
    newest = max(done, key=lambda run: run.start["utc"])
    return math.ceil(round(100 * (newest.end_event["val_loss"] + PILOT_MARGIN), 6)) / 100
