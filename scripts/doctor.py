"""Is this machine ready for a run? One screen, before it costs money.

    python scripts/doctor.py --config configs/gpt2_small.toml --optimizer muon
    python scripts/doctor.py --json

A line for driver, CUDA, torch, cuDNN, NCCL, triton, each GPU, P2P, memory, open files, /dev/shm, disks, the data, which
is read and checked as a run does, attention and kernels, and the time of a run on all GPUs that torch sees. Each is ok,
a warning or an error, with what to do. Exit codes: 0 no error, 1 an error, 2 usage.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from aurora.command_line import track_path
from aurora.config import Config, load_config
from aurora.console import run_script
from scripts.diagnosis.checks import ERROR, OK, WARNING, Line, Task, examine

COLORS = {OK: "\033[32m", WARNING: "\033[33m", ERROR: "\033[31m"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=track_path, default=ROOT / "configs/quick.toml", help="track (quick.toml)")
    parser.add_argument("--optimizer", default="aurora", help="as in train_gpt.py (aurora)")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the records (runs)")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="A.B=V", help="as in train_gpt.py"
    )
    parser.add_argument("--price-per-gpu-hour", type=float, metavar="X", help="say what the run costs")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(argv)


def ask_trainer(args: argparse.Namespace, num_ranks: int) -> tuple[Task, Any, list[str]]:
    """The task, what verifies its data, and the time that it takes, all by the trainer. Raises HarnessError."""
    import train_gpt  # and with it torch, which may be missing
    from aurora.fast import hopper
    from aurora.fast.attention import blocked_pays, choose_attention
    from aurora.fast.float8 import check_float8
    from aurora.trainer.cost import time_lines
    from aurora.trainer.describe import device_name
    from aurora.trainer.memory import memory_estimate_gib, params_by_role
    from aurora.trainer.setup import check_config, open_data

    is_cuda = train_gpt.torch.cuda.is_available() and os.environ.get("SPEEDRUN_DEVICE") != "cpu"
    device = train_gpt.torch.device("cuda" if is_cuda else "cpu")
    config = load_config(args.config, args.optimizer, args.overrides)
    config, _, params, optimizers = check_config(config, num_ranks, train_gpt.GPT, train_gpt.scheduled)
    if config.model.head_dtype == "float8":
        check_float8(device)
    is_compiled = config.train.compile == "on" or (config.train.compile == "auto" and is_cuda)
    counts = params_by_role(params)
    is_plain = config.train.recompute or (config.train.shard == "fsdp2" and num_ranks > 1)
    is_blocked = device.type == "cpu" and not is_plain and blocked_pays(config.model)
    task = Task(
        config,
        counts,
        lambda size: sum(memory_estimate_gib(config, params, optimizers, num_ranks, size).values()),
        "blocked" if is_blocked else choose_attention(config.model, device),
        is_compiled,
        is_compiled and hopper.suits(config, device),
    )

    def verify(config: Config) -> str:
        shards = open_data(config).train_infos
        return (
            f"{len(shards)} train shards and validation read and checked, {sum(s.num_tokens for s in shards):,} tokens"
        )

    return task, verify, time_lines(config, counts, num_ranks, device_name(device), args.price_per_gpu_hour)


def screen(lines: list[Line], is_colored: bool) -> str:
    text = []
    for line in lines:
        status = f"{line.status:8}"
        shown = f"{COLORS[line.status]}{status}\033[0m" if is_colored else status
        text.append(f"{shown}{line.name:14}{line.found}")
        text += [f"{'':22}-> {line.fix}"] if line.fix else []
    counts = {status: sum(line.status == status for line in lines) for status in (ERROR, WARNING)}
    text.append(f"{counts[ERROR]} errors, {counts[WARNING]} warnings")
    return "\n".join(text)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    lines = examine(args, ask_trainer)
    if args.json:
        print(json.dumps([line._asdict() for line in lines], indent=1))
    else:
        print(screen(lines, sys.stdout.isatty() and "NO_COLOR" not in os.environ))
    return int(any(line.status == ERROR for line in lines))


if __name__ == "__main__":
    sys.exit(run_script(main))
