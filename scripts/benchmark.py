"""Speed, always as a ratio against a peer in the same run.

python scripts/benchmark.py harness     a training step against bare loops, on CPU; or against that of another checkout
python scripts/benchmark.py guards      a training step with its guards against one without, on CPU
python scripts/benchmark.py telemetry   what a quick run spends on looking at its neurons, on CPU
python scripts/benchmark.py train       tokens a second of whole training steps, split into their parts
python scripts/benchmark.py optim       whole optimizer steps on the matrices of a track, and how good the updates are
python scripts/benchmark.py memory      memory of a training step by micro-batch
python scripts/benchmark.py runs        whole runs, one after the other, with one compilation for all
python scripts/benchmark.py turns       the public script and ours on the same tokens, in turns
"""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from aurora.errors import HarnessError
from aurora.optim.polar import COMPUTE_DTYPES, SCHEDULES
from scripts.benchmarks.against import against
from scripts.benchmarks.harness import guards, harness, telemetry
from scripts.benchmarks.memory import memory
from scripts.benchmarks.optim import CONTENDERS, optim
from scripts.benchmarks.peer import against_peer
from scripts.benchmarks.runs import runs
from scripts.benchmarks.train import train
from scripts.benchmarks.turns import turns


def add_track(command: argparse.ArgumentParser, track: str) -> None:
    command.add_argument("--config", type=Path, default=ROOT / "configs" / track, help="track (TOML)")
    command.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="A.B=V", help="as train_gpt.py"
    )


def add_track_command(commands: argparse._SubParsersAction, name: str, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text)
    add_track(command, "quick.toml")
    command.add_argument("--optimizers", nargs="+", default=["muon", "aurora", "adamw"], metavar="NAME")
    command.add_argument("--out", type=Path, required=True, help="OUT.md and OUT.json are written")
    return command


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("harness", help="the trainer's step against bare loops, or another checkout's step")
    command.add_argument("--rounds", type=int, default=40)
    command.add_argument(
        "--nanogpt", type=Path, metavar="FOLDER", help="a checkout of karpathy/nanoGPT, as a third peer"
    )
    checkout = command.add_argument_group("against another checkout")
    checkout.add_argument("--against", type=Path, metavar="FOLDER", help="another checkout of this project")
    add_track(checkout, "quick.toml")
    checkout.add_argument("--nproc", type=int, default=1, help="ranks of each trainer")
    checkout.add_argument("--steps", type=int, default=5, help="steps of a turn; the first is not counted")
    checkout.add_argument("--limit-s", type=float, default=1800.0, help="both are ended after this time")
    checkout.add_argument("--out", type=Path, help="OUT.md and OUT.json are written, and both consoles")
    command.set_defaults(run=lambda args: against(args) if args.against else harness(args.rounds, args.nanogpt))
    command = commands.add_parser("guards", help="the trainer's step with and without its guards, on CPU")
    command.add_argument("--rounds", type=int, default=60)
    command.set_defaults(run=lambda args: guards(args.rounds))
    command = commands.add_parser("telemetry", help="looks at neurons beside steps and validations, on CPU")
    command.add_argument("--rounds", type=int, default=20)
    command.set_defaults(run=lambda args: telemetry(args.rounds))
    command = commands.add_parser("optim", help="optimizer steps on a track's shapes, and the quality of the updates")
    command.add_argument("--config", type=Path, default=ROOT / "configs" / "quick.toml", help="track (TOML)")
    command.add_argument("--rules", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="RULE")
    command.add_argument("--schedule", choices=SCHEDULES, default="polar_express5")
    command.add_argument("--polar-dtype", choices=COMPUTE_DTYPES, default="auto")
    command.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    command.add_argument("--rounds", type=int, default=9)
    command.add_argument("--momentum", type=Path, help="folder <run_id>.momentum of a run with --dump-momentum")
    command.add_argument("--out", type=Path, required=True, help="OUT.md and OUT.json are written")
    command.set_defaults(run=optim)

    command = add_track_command(commands, "train", "whole training steps, split into their parts; also under torchrun")
    command.add_argument("--steps", type=int, default=10, help="timed steps of each optimizer in a round")
    command.add_argument("--rounds", type=int, default=3)
    command.add_argument("--profile", action="store_true", help="also write OUT.trace.json, of two steps")
    command.add_argument("--peer", metavar="CMD", help="run this program in turn with ours and read its step times")
    command.add_argument("--peer-limit-s", type=float, default=180.0, help="a process is ended after this time")
    command.add_argument("--peer-samples", type=int, default=20, help="the peer is ended after this many step times")
    command.set_defaults(run=lambda args: against_peer(args) if args.peer else train(args))
    command = add_track_command(commands, "memory", "memory by micro-batch, of the first optimizer")
    command.add_argument("--sizes", type=int, nargs="+", default=[1, 4, 16, 64], help="micro-batches")
    command.set_defaults(run=memory)
    command = add_track_command(commands, "runs", "whole runs; OUT is the folder of their records")
    command.add_argument("--seeds", type=int, nargs="+", default=[0])
    command.set_defaults(run=runs)
    command = commands.add_parser("turns", help="the public script and ours on the same tokens, in turns")
    command.add_argument("--peer", type=Path, required=True, metavar="SCRIPT", help="train_gpt_simple.py")
    command.add_argument("--train", type=Path, required=True, help="shard of train tokens for both")
    command.add_argument("--val", type=Path, required=True, help="shard of validation tokens for both")
    command.add_argument("--val-tokens", type=int, default=2**20)
    command.add_argument("--steps", type=int, default=100, help="of each")
    command.add_argument("--every", type=int, default=50, help="steps of a turn, which ends with a validation")
    command.add_argument("--limit-s", type=float, default=500.0, help="both are ended after this time")
    add_track(command, "gpt2_small.toml")
    command.add_argument("--out", type=Path, required=True, help="OUT.md and OUT.json are written")
    command.set_defaults(run=turns)
    args = parser.parse_args()
    try:
        print(args.run(args), end="\n" if int(os.environ.get("RANK", 0)) == 0 else "")
    except HarnessError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.reason)
    return 0


if __name__ == "__main__":
    sys.exit(main())
