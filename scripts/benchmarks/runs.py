"""Whole runs of the trainer one after the other in this process, so that the model is compiled once for all of them."""

import argparse
import shlex
import sys

import train_gpt
from aurora.errors import Exit, HarnessError


def runs(args: argparse.Namespace) -> str:
    """Every optimizer with every seed; records in args.out, as from train_gpt.py itself."""
    failed = []
    for seed in args.seeds:
        for name in args.optimizers:
            argv = ["--config", str(args.config), "--optimizer", name, "--seed", str(seed), "--out", str(args.out)]
            argv += [word for override in args.overrides for word in ("--set", override)]
            own_argv, sys.argv = sys.argv, ["train_gpt.py", *argv]  # which the record states
            try:
                code = train_gpt.main(argv)
            finally:
                sys.argv = own_argv
            if code:
                failed.append(f"{name}, seed {seed}: exit code {code}")
    if failed:
        raise HarnessError(Exit.CONFIG, "; ".join(failed))
    command = shlex.join(["python", "scripts/compare.py", "--report", str(args.out)])
    return f"{len(args.seeds) * len(args.optimizers)} runs: {command}"
