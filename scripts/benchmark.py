"""Measure speed and memory, where possible against a peer in the same run.

python scripts/benchmark.py harness     our training step against bare loops on CPU, or against another checkout's
python scripts/benchmark.py start       what passes before a run's first step
python scripts/benchmark.py train       tokens per second of whole training steps, split into their parts
python scripts/benchmark.py optim       whole optimizer steps on the matrices of a track, and the quality of updates
python scripts/benchmark.py memory      memory of a training step by micro-batch
python scripts/benchmark.py runs        whole runs, one after the other, with one compilation for all
python scripts/benchmark.py kernels     our step with and without each of our kernels, in turns, at trained weights
python scripts/benchmark.py turns       the public script and ours on the same tokens, in turns
python scripts/benchmark.py scale       bytes and memory of a rank by model and number of ranks, by count
"""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from aurora.console import run_script
from aurora.errors import HarnessError

# Each function below adds the arguments of one benchmark and imports it, and with it torch, which takes seconds.


def add_output(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", type=Path, required=True, help="write OUT.md and OUT.json")


def add_config(command: argparse._ActionsContainer, name: str = "quick") -> None:
    command.add_argument("--config", type=Path, default=ROOT / "configs" / f"{name}.toml", help="track (TOML)")


def add_overrides(command: argparse._ActionsContainer, text: str = "as in train_gpt.py") -> None:
    command.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=V", help=text)


def add_track(command: argparse.ArgumentParser) -> None:
    add_config(command)
    command.add_argument("--optimizers", nargs="+", default=["muon", "aurora", "adamw"], metavar="NAME")
    add_overrides(command)
    add_output(command)


def add_harness(command: argparse.ArgumentParser) -> None:
    from scripts.benchmarks.against import against
    from scripts.benchmarks.harness import harness

    command.add_argument("--rounds", type=int, default=40, help="turns of each (40)")
    command.add_argument("--nanogpt", type=Path, metavar="FOLDER", help="checkout of karpathy/nanoGPT, as a peer")
    command.add_argument(
        "--program", nargs=2, action="append", default=[], metavar=("LABEL", "COMMAND"),
        help="another peer: a program that makes a step for each line it reads, and then writes a line",
    )  # fmt: skip
    command.add_argument("--out", type=Path, help="write OUT.md and OUT.json, and with --against both consoles")
    checkout = command.add_argument_group("against another checkout")
    checkout.add_argument("--against", type=Path, metavar="FOLDER", help="another checkout of this project")
    add_config(checkout)
    add_overrides(checkout)
    checkout.add_argument("--nproc", type=int, default=1, help="ranks of each trainer")
    checkout.add_argument("--steps", type=int, default=5, help="steps in a turn; the first is not counted")
    checkout.add_argument("--limit-s", type=float, default=1800.0, help="seconds after which both are ended")
    command.set_defaults(run=lambda args: against(args) if args.against else harness(args))


def add_start(command: argparse.ArgumentParser) -> None:
    from scripts.benchmarks.start import start

    add_config(command)
    command.add_argument("--rounds", type=int, default=5, help="turns of each (5)")
    add_output(command)
    command.set_defaults(run=start)


def add_optim(command: argparse.ArgumentParser) -> None:
    import torch

    from aurora.optim.polar import COMPUTE_DTYPES, SCHEDULES
    from scripts.benchmarks.optim import CONTENDERS, optim

    add_config(command)
    command.add_argument("--rules", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="RULE")
    command.add_argument("--schedule", choices=SCHEDULES, default="polar_express5")
    command.add_argument("--polar-dtype", choices=COMPUTE_DTYPES, default="auto")
    command.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    command.add_argument("--rounds", type=int, default=9, help="timings of each rule (9)")
    command.add_argument(
        "--peers",
        nargs="+",
        default=[],
        metavar="MODULE:CLASS",
        help="others' optimizers, with their own defaults but for lr",
    )
    command.add_argument("--momentum", type=Path, help="folder <run_id>.momentum that a run with --dump-momentum wrote")
    add_output(command)
    command.set_defaults(run=optim)


def add_train(command: argparse.ArgumentParser) -> None:
    from scripts.benchmarks.train import train

    add_track(command)
    command.add_argument("--steps", type=int, default=10, help="timed steps of each optimizer in a round (10)")
    command.add_argument("--rounds", type=int, default=3, help="turns of each optimizer (3)")
    command.add_argument("--profile", action="store_true", help="also write a trace of two steps, OUT.trace.json")
    command.set_defaults(run=train)


def add_memory(command: argparse.ArgumentParser) -> None:
    from scripts.benchmarks.memory import memory

    add_track(command)
    command.add_argument(
        "--sizes", type=int, nargs="+", default=[1, 4, 16, 64], help="micro-batches to measure (1 4 16 64)"
    )
    command.set_defaults(run=memory)


def add_runs(command: argparse.ArgumentParser) -> None:
    from scripts.benchmarks.runs import runs

    add_track(command)
    command.add_argument("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    command.add_argument(
        "--pilot", metavar="NAME", help="first set the target by a run of this optimizer with seed 100"
    )
    command.set_defaults(run=runs)


def add_kernels(command: argparse.ArgumentParser) -> None:
    from scripts.benchmarks.kernels import kernels

    add_config(command, "gpt2_small")
    add_overrides(command)
    command.add_argument("--train-steps", type=int, default=100, help="steps before the first timing (100)")
    command.add_argument("--steps", type=int, default=4, help="steps in a turn; the first is not counted (4)")
    command.add_argument("--rounds", type=int, default=6, help="turns of each way (6)")
    command.add_argument("--limit-s", type=float, default=90.0, help="seconds after which no further way is added (90)")
    add_output(command)
    command.set_defaults(run=kernels)


def add_turns(command: argparse.ArgumentParser) -> None:
    from scripts.benchmarks.turns import turns

    command.add_argument(
        "--peer", type=Path, required=True, metavar="SCRIPT", help="the public script, train_gpt_simple.py"
    )
    command.add_argument("--train", type=Path, required=True, help="shard of training tokens for both")
    command.add_argument("--val", type=Path, required=True, help="shard of validation tokens for both")
    command.add_argument("--val-tokens", type=int, default=2**20, help="tokens of a validation (2^20)")
    command.add_argument("--steps", type=int, default=100, help="steps of each (100)")
    command.add_argument("--every", type=int, default=50, help="steps in a turn, which ends with a validation (50)")
    command.add_argument("--limit-s", type=float, default=500.0, help="seconds after which both are ended (500)")
    add_config(command, "gpt2_small")
    add_overrides(command, "settings of ours, whose micro-batch is 64")
    add_output(command)
    command.set_defaults(run=turns)


def add_scale(command: argparse.ArgumentParser) -> None:
    from scripts.benchmarks.scale import MODELS, scale

    command.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    command.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 1024], help="numbers of ranks (8 64 1024)")
    command.add_argument(
        "--wire-bytes", type=int, choices=(2, 4), default=4, help="of optimizer.wire_dtype with fsdp2 (4)"
    )
    add_output(command)
    command.set_defaults(run=scale)


COMMANDS = {
    "harness": ("the trainer's step against bare loops, or against another checkout's", add_harness),
    "start": ("what passes before a run's first step, eager and compiled", add_start),
    "optim": ("optimizer steps on the matrices of a track, and the quality of the updates", add_optim),
    "train": ("whole training steps, split into their parts; also under torchrun", add_train),
    "memory": ("memory of the first optimizer's step by micro-batch", add_memory),
    "runs": ("whole runs; --out is the folder of their records", add_runs),
    "kernels": ("our step with and without each kernel, in turns on one trained model", add_kernels),
    "turns": ("the public script and ours on the same tokens, in turns", add_turns),
    "scale": ("bytes and memory of a rank by model and number of ranks, by count", add_scale),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, (text, add_arguments) in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        if name in sys.argv[1:2]:
            add_arguments(command)
    args = parser.parse_args()
    try:
        print(args.run(args), end="\n" if int(os.environ.get("RANK", 0)) == 0 else "")
    except HarnessError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.reason)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
