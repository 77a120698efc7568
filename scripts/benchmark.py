"""Speed, always as a ratio against a peer in the same run.

python scripts/benchmark.py harness     a training step of train_gpt.py against bare loops over the same model
"""

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F

import train_gpt
from aurora.polar import SCHEDULES, PolarSchedule
from configs.schema import load_config

UNTIMED_ROUNDS = 3


class PlainMuon(torch.optim.Optimizer):
    """Muon one matrix at a time, in a few lines: what one would write without a library."""

    def __init__(self, params, lr: float, momentum: float, schedule: PolarSchedule):
        super().__init__(params, dict(lr=lr, momentum=momentum))
        self.schedule = schedule

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p not in self.state:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                buffer = self.state[p]["momentum_buffer"]
                buffer.lerp_(p.grad, 1 - group["momentum"])
                X = p.grad.lerp(buffer, group["momentum"])
                X = X.T if p.shape[0] > p.shape[1] else X
                X = X / (self.schedule.norm_margin * X.norm() + 1e-7)
                for a, b, c in self.schedule.coefficients:
                    A = X @ X.T
                    X = a * X + (b * A + c * A @ A) @ X
                X = X.T if p.shape[0] > p.shape[1] else X
                p.add_(X, alpha=-group["lr"] * math.sqrt(max(1, p.shape[0] / p.shape[1])))


def harness_step(hparams: dict[str, str], num_steps: int) -> Callable[[], None]:
    """One call is one step of the trainer, everything that its clock sees included."""
    overrides = [f"optimizer.muon.{key}={value}" for key, value in hparams.items()]
    overrides.append(f"train.steps={num_steps}")
    config = load_config(ROOT / "configs" / "quick.toml", "muon", overrides)
    data = train_gpt.open_data(config)
    model = train_gpt.GPT(config.model)
    model.init_weights(0)
    ranks = train_gpt.Ranks(0, 1, torch.device("cpu"))
    loader = train_gpt.make_loader(config, data, ranks)
    optimizers = train_gpt.build_optimizers(config, model)
    run = train_gpt.Training(config, train_gpt.plan_batch(config, 1), ranks, model, optimizers, loader)
    guard, log = train_gpt.Guard(model, ranks), train_gpt.StepLog(config.train.log_every, ranks)
    steps = iter(range(config.train.steps))
    return lambda: train_gpt.train_step(run, model, next(steps), guard, log)


def bare_step(make_muon: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]) -> Callable[[], None]:
    """One call is one step of the loop that one would write by hand around the same model."""
    config = load_config(ROOT / "configs" / "quick.toml", "muon")
    data = train_gpt.open_data(config)
    model = train_gpt.GPT(config.model)
    model.init_weights(0)
    tokens = torch.from_numpy(data.train_shards[0].astype("int64"))
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is q for q in matrices)]
    adamw = torch.optim.AdamW(others, lr=0.003, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, fused=True)
    optimizers = [adamw, make_muon(matrices)]
    starts = iter(range(0, len(tokens), config.train.batch_tokens))

    def step() -> None:
        start = next(starts)
        window = tokens[start : start + config.train.batch_tokens + 1]
        inputs, targets = window[:-1].view(-1, config.model.seq_len), window[1:]
        F.cross_entropy(model.logits(inputs).flatten(0, 1), targets).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step


def bare_plain() -> Callable[[], None]:
    return bare_step(lambda params: PlainMuon(params, lr=0.02, momentum=0.95, schedule=SCHEDULES["polar_express5"]))


def bare_torch() -> Callable[[], None]:
    return bare_step(lambda params: torch.optim.Muon(params, lr=0.02, weight_decay=0.0, adjust_lr_fn="original"))


HARNESS_PAIRS = {
    "Muon written plainly (polar_express5, float32)": ({"polar_schedule": "polar_express5"}, bare_plain),
    "torch.optim.Muon (ns5_jordan, bfloat16)": (
        {"polar_schedule": "ns5_jordan", "polar_dtype": "bfloat16"},
        bare_torch,
    ),
}


def interleaved_ms(first: Callable[[], None], second: Callable[[], None], rounds: int) -> list[tuple[float, float]]:
    """Milliseconds of both, in A B B A order, after the untimed rounds."""
    pairs = []
    for number in range(UNTIMED_ROUNDS + rounds):
        times = {}
        for step in (first, second) if number % 2 else (second, first):
            begin_ns = time.perf_counter_ns()
            step()
            times[step] = (time.perf_counter_ns() - begin_ns) / 1e6
        pairs.append((times[first], times[second]))
    return pairs[UNTIMED_ROUNDS:]


def harness(rounds: int) -> str:
    """A Markdown table of the trainer's step against bare loops."""
    train_gpt.keep_freed_memory()
    lines = [
        f"quick track, Muon, torch {torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, "
        f"{rounds} interleaved rounds",
        "",
        "| peer | train_gpt.py ms/step | bare loop ms/step | median ratio |",
        "|---|---|---|---|",
    ]
    for name, (hparams, make_peer) in HARNESS_PAIRS.items():
        pairs = interleaved_ms(harness_step(hparams, UNTIMED_ROUNDS + rounds), make_peer(), rounds)
        ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        lines.append(f"| {name} | {ours:.1f} | {theirs:.1f} | {ratio:.3f} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("harness", help="the trainer's step against bare loops, on CPU")
    command.add_argument("--rounds", type=int, default=60)
    command.set_defaults(run=lambda args: harness(args.rounds))
    args = parser.parse_args()
    try:
        print(args.run(args))
    except train_gpt.HarnessError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.reason)
    return 0


if __name__ == "__main__":
    sys.exit(main())
