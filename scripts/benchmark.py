"""Speed, always as a ratio against a peer in the same run.

python scripts/benchmark.py harness     a training step of train_gpt.py against bare loops over the same model
python scripts/benchmark.py guards      a training step with its guards against one without
python scripts/benchmark.py telemetry   what a quick run spends on looking at its neurons
python scripts/benchmark.py optim       whole steps on the matrices of a track, and how good the updates are
"""

import argparse
import json
import math
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import aurora
import train_gpt
from aurora.polar import COMPUTE_DTYPES, SCHEDULES, PolarSchedule
from aurora.runtime.ranks import keep_freed_memory
from configs.schema import Exit, HarnessError, load_config
from results.record import describe_machine

UNTIMED_ROUNDS = 3

# ----------------------------------------------------------------------------------------------------------------------
# harness


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


def harness_step(hparams: dict[str, str], num_steps: int, is_guarded: bool = True) -> Callable[[], None]:
    """One call is one step of the trainer, everything that its clock sees included; the guards only if wanted."""
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
    steps, point = iter(range(config.train.steps)), train_gpt.point
    if not is_guarded:
        guard.check, point = (lambda step, loss, bad_update=None: None), (lambda name, step, tensors=(): None)

    def step() -> None:
        train_gpt.point = point
        train_gpt.train_step(run, model, next(steps), guard, log)

    return step


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
    "Muon written plainly (polar_express5, float32)": (
        {"polar_schedule": "polar_express5", "polar_dtype": "float32"},
        bare_plain,
    ),
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
    keep_freed_memory()
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


def guards(rounds: int) -> str:
    """One line: what the guards of a step cost. Of a process alone; with several, ranks also exchange four numbers."""
    keep_freed_memory()
    on, off = (harness_step({}, UNTIMED_ROUNDS + rounds, is_guarded) for is_guarded in (True, False))
    pairs = interleaved_ms(on, off, rounds)
    on_ms, off_ms = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    return (
        f"quick track, Muon, torch {torch.__version__}, {torch.get_num_threads()} threads, {rounds} rounds in turn: "
        f"{on_ms:.1f} ms/step with guards, {off_ms:.1f} without, median ratio {ratio:.4f}"
    )


def telemetry(rounds: int) -> str:
    """One line: the share of a quick run's steps and validations that its looks at neurons take, all off the clock."""
    keep_freed_memory()
    config = load_config(ROOT / "configs" / "quick.toml", "muon", [f"train.steps={UNTIMED_ROUNDS + rounds}"])
    data = train_gpt.open_data(config)
    model = train_gpt.GPT(config.model)
    model.init_weights(0)
    ranks = train_gpt.Ranks(0, 1, torch.device("cpu"))
    loader = train_gpt.make_loader(config, data, ranks)
    optimizers = train_gpt.build_optimizers(config, model)
    run = train_gpt.Training(config, train_gpt.plan_batch(config, 1), ranks, model, optimizers, loader)
    guard, log = train_gpt.Guard(model, ranks), train_gpt.StepLog(config.train.log_every, ranks)
    whole = load_config(ROOT / "configs" / "quick.toml", "muon")
    looks = train_gpt.validation_steps(whole)
    neurons = train_gpt.Neurons(whole, looks, model, optimizers[-1], ranks)
    window = train_gpt.stage(data.val_tokens[: neurons.num_tokens + 1], ranks.device)
    inputs, _ = train_gpt.to_device(window, config.model.seq_len, ranks.device)
    ms: dict[str, list[float]] = {"keep": [], "step": [], "validate": [], "measure": []}
    for step in range(UNTIMED_ROUNDS + rounds):
        for name, call in (
            ("keep", neurons.before_update),
            ("step", lambda step=step: train_gpt.train_step(run, model, step, guard, log)),
            ("validate", lambda: train_gpt.validate(model, data, run)),
            ("measure", lambda step=step: neurons.measure(step, inputs)),
        ):
            begin_ns = time.perf_counter_ns()
            call()
            ms[name].append((time.perf_counter_ns() - begin_ns) / 1e6)
    median = {name: statistics.median(times[UNTIMED_ROUNDS:]) for name, times in ms.items()}
    look_ms = median["keep"] + median["measure"]
    rest_ms = whole.train.steps * median["step"] + len(looks) * median["validate"]
    share = len(neurons.steps) * look_ms / (len(neurons.steps) * look_ms + rest_ms)
    return (
        f"quick track, Muon, torch {torch.__version__}, {torch.get_num_threads()} threads, {rounds} rounds in turn: "
        f"{look_ms:.0f} ms a look at the neurons, {len(neurons.steps)} of them in a run, {share:.2%} of steps of "
        f"{median['step']:.0f} ms and validations of {median['validate']:.0f} ms"
    )


# ----------------------------------------------------------------------------------------------------------------------
# optim


VARIANTS = {f"aurora {variant}": ("aurora", {"variant": variant}) for variant in aurora.VARIANTS}
CONTENDERS = {
    **{name: (name, {}) for name in ("muon", "normuon", "unormuon")},
    **VARIANTS,
    "riemannian_aurora": ("riemannian_aurora", {}),
}


def track_shapes(path: Path) -> list[torch.Size]:
    """The shapes of the matrices of a track's model."""
    with torch.device("meta"):
        model = train_gpt.GPT(load_config(path, "muon").model)
    return [param.tensor.shape for param in model.roles() if param.role == "matrix"]


def make_contenders(args: argparse.Namespace, shapes: list[torch.Size]) -> dict[str, torch.optim.Optimizer]:
    """Every rule, and torch's own AdamW and Muon, over the same parameters and gradients, each with its own state."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(args.device) * 0.02) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(args.device) * 1e-4
    ours = dict(lr=1e-4, weight_decay=0.01, polar_dtype=args.polar_dtype)
    theirs = dict(lr=1e-4, weight_decay=0.01)
    contenders: dict[str, torch.optim.Optimizer] = {
        label: aurora.RULES[rule](params, polar_schedule=args.schedule, **hparams, **ours)
        for label, (rule, hparams) in CONTENDERS.items()
        if label in args.rules
    }
    # torch's Muon repeats one polynomial, in bfloat16.
    contenders["muon, ns5_jordan in bfloat16"] = aurora.Muon(
        params, polar_schedule="ns5_jordan", **ours | {"polar_dtype": "bfloat16"}
    )
    contenders["torch.optim.Muon, ns5_jordan in bfloat16"] = torch.optim.Muon(params, adjust_lr_fn="original", **theirs)
    contenders["torch.optim.AdamW, fused"] = torch.optim.AdamW(params, fused=True, **theirs)
    return contenders


def time_ms(step: Callable[[], object], device: str) -> float:
    begin_ns = time.perf_counter_ns()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter_ns() - begin_ns) / 1e6


def time_contenders(
    contenders: dict[str, torch.optim.Optimizer], rounds: int, device: str
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Milliseconds of each whole step, round by round, in alternating order; and its matmul FLOPs."""
    flops, times = {}, {label: [] for label in contenders}
    for label, optimizer in contenders.items():  # the untimed round
        with FlopCounterMode(display=False) as counter:
            optimizer.step()
        flops[label] = counter.get_total_flops()
    for number in range(rounds):
        labels = list(contenders)
        for label in labels if number % 2 else reversed(labels):
            times[label].append(time_ms(contenders[label].step, device))
    return times, flops


def synthetic_momentum(shape: torch.Size, steps: int) -> list[torch.Tensor]:
    """Nesterov momentum of a constant signal under fresh noise, with rows and singular values over two decades."""
    generator = torch.Generator().manual_seed(0)
    M, N = shape
    rank = min(M, N)
    signal = torch.randn(M, rank, generator=generator) * torch.logspace(0, -2, rank)
    signal = signal @ torch.randn(rank, N, generator=generator) / rank**0.5
    rows = torch.logspace(0, -2, M)[torch.randperm(M, generator=generator), None]
    optimizer = aurora.Muon([torch.nn.Parameter(torch.zeros(shape))], lr=0.0)
    (group,), momentum = optimizer.param_groups, []
    (p,) = group["params"]
    optimizer.state[p] = optimizer.new_state(p, group)
    for _ in range(steps):
        p.grad = rows * (signal + 0.5 * torch.randn(shape, generator=generator))
        optimizer.state[p]["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
        momentum += optimizer.lookahead([p], group)
    return momentum


def recorded_momentum(folder: Path) -> dict[str, list[torch.Tensor]]:
    """What train_gpt.py --dump-momentum wrote, by matrix, in order of steps."""
    files = sorted(folder.glob("step*.pt"))
    if not files:
        raise HarnessError(Exit.DATA, f"no step*.pt in {folder}; train with --dump-momentum first")
    streams: dict[str, list[torch.Tensor]] = {}
    for path in files:
        for name, X_MN in torch.load(path)["momentum"].items():
            streams.setdefault(name, []).append(X_MN)
    return streams


def quality(U_MN: torch.Tensor, X_MN: torch.Tensor) -> dict[str, float]:
    """How far an update is from orthogonal with uniform rows (of the long side), and how well it follows the momentum.

    row_deviation: row norms against sqrt(N/M); orthogonality_error: ||U^T U - I||_F / sqrt(N); alignment: <U, X> over
    its maximum on orthogonal U, the nuclear norm of X.
    """
    if U_MN.size(0) < U_MN.size(1):
        U_MN, X_MN = U_MN.mT, X_MN.mT
    U_MN, X_MN = U_MN.double(), X_MN.double()
    M, N = U_MN.shape
    deviation = U_MN.norm(dim=1) / (N / M) ** 0.5 - 1
    return {
        "row_deviation_rms": deviation.square().mean().sqrt().item(),
        "row_deviation_max": deviation.abs().max().item(),
        "orthogonality_error": (U_MN.mT @ U_MN - torch.eye(N)).norm().item() / N**0.5,
        "alignment": ((U_MN * X_MN).sum() / torch.linalg.matrix_norm(X_MN, "nuc")).item(),
    }


def replay(label: str, streams: dict[str, list[torch.Tensor]], args: argparse.Namespace) -> dict[str, float]:
    """Quality of a rule over streams of momentum, from a fresh state on; all steps from the 20th on count.

    Earlier gradients have low rank, for some matrices begin at zero.
    """
    rule, hparams = CONTENDERS[label]
    found: list[dict[str, float]] = []
    for stream in streams.values():
        p = torch.nn.Parameter(torch.zeros(stream[0].shape))
        optimizer = aurora.RULES[rule](
            [p], lr=1.0, polar_schedule=args.schedule, polar_dtype=args.polar_dtype, **hparams
        )
        (group,) = optimizer.param_groups
        state = optimizer.new_state(p, group)
        for step, X_MN in enumerate(stream, start=1):
            U_MN = optimizer.direction(X_MN[None], [state], group)[0]
            if step >= 20:
                found.append(quality(U_MN, X_MN))
    columns = {key: [entry[key] for entry in found] for key in found[0]}
    return {
        "row_deviation_rms": statistics.mean(columns["row_deviation_rms"]),
        "row_deviation_max": max(columns["row_deviation_max"]),
        "orthogonality_error": statistics.mean(columns["orthogonality_error"]),
        "orthogonality_error_max": max(columns["orthogonality_error"]),
        "alignment": statistics.mean(columns["alignment"]),
    }


def optim(args: argparse.Namespace) -> str:
    """Whole optimizer steps on a track's shapes, and the quality of the updates; writes OUT.md and OUT.json."""
    keep_freed_memory()
    shapes = track_shapes(args.config)
    aurora.compute_dtype(args.polar_dtype, torch.device(args.device))  # its measurement is no part of a step
    times, flops = time_contenders(make_contenders(args, shapes), args.rounds, args.device)
    oblong = sorted({shape for shape in shapes if shape[0] != shape[1]})
    momentum = {"synthetic": {str(shape): synthetic_momentum(shape, steps=20) for shape in oblong}}
    if args.momentum:
        momentum["recorded"] = {
            name: s for name, s in recorded_momentum(args.momentum).items() if s[0].size(0) != s[0].size(1)
        }
    qualities = {
        kind: {label: replay(label, streams, args) for label in CONTENDERS if label in args.rules}
        for kind, streams in momentum.items()
    }
    base = times["muon"]
    speed = {
        label: {
            "ms": statistics.median(ms),
            "ratio_to_muon": statistics.median(ratios := [a / b for a, b in zip(ms, base, strict=True)]),
            "ratio_range": [min(ratios), max(ratios)],
            "gflop": flops[label] / 1e9,
            "gflop_per_s": flops[label] / 1e6 / statistics.median(ms),
            "rounds_ms": ms,
        }
        for label, ms in times.items()
    }
    ours, theirs = (times[f"{name}, ns5_jordan in bfloat16"] for name in ("muon", "torch.optim.Muon"))
    result = {
        "command": "python scripts/benchmark.py " + shlex.join(sys.argv[1:]),
        "machine": describe_machine() | {"torch": torch.__version__, "threads": torch.get_num_threads()},
        "device": torch.cuda.get_device_name() if args.device == "cuda" else describe_machine()["cpu"],
        "config": args.config.name,
        "matrices": {str(tuple(shape)): shapes.count(shape) for shape in sorted(set(shapes))},
        "schedule": args.schedule,
        "polar_dtype": str(aurora.compute_dtype(args.polar_dtype, torch.device(args.device))),
        "speed": speed,
        "muon_to_torch_muon": statistics.median(ratios := [a / b for a, b in zip(ours, theirs, strict=True)]),
        "muon_to_torch_muon_range": [min(ratios), max(ratios)],
        "quality": qualities,
    }
    text = optim_table(result)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    args.out.with_suffix(".md").write_text(text, encoding="utf-8")
    return text


def optim_table(result: dict) -> str:
    counts = ", ".join(f"{count} of {shape}" for shape, count in result["matrices"].items())
    rounds = len(result["speed"]["muon"]["rounds_ms"])
    lines = [
        f"{result['config']}: {counts}; {result['schedule']}, {result['polar_dtype'].removeprefix('torch.')}",
        "",
        f"{result['device']}, {result['machine']['threads']} threads, torch {result['machine']['torch']}; "
        f"medians of {rounds} interleaved rounds",
        "",
        f"    {result['command']}",
        "",
        "| optimizer | ms/step | ratio to muon | of single rounds | matmul GFLOP | GFLOP/s |",
        "|---|---|---|---|---|---|",
    ]
    for label, row in result["speed"].items():
        rate = f"{row['gflop']:.0f} | {row['gflop_per_s']:.0f}" if row["gflop"] else "- | -"
        low, high = row["ratio_range"]
        lines.append(f"| {label} | {row['ms']:.1f} | {row['ratio_to_muon']:.3f} | {low:.2f} to {high:.2f} | {rate} |")
    low, high = result["muon_to_torch_muon_range"]
    lines += [
        "",
        f"muon to torch.optim.Muon, both ns5_jordan in bfloat16: {result['muon_to_torch_muon']:.3f} "
        f"({low:.2f} to {high:.2f})",
    ]
    for kind, by_label in result["quality"].items():
        lines += [
            "",
            f"Quality of the updates of oblong matrices on {kind} momentum:",
            "",
            "| rule | row deviation rms | max | orthogonality error mean | max | alignment |",
            "|---|---|---|---|---|---|",
        ]
        for label, row in by_label.items():
            lines.append(
                f"| {label} | {row['row_deviation_rms']:.2%} | {row['row_deviation_max']:.2%} | "
                f"{row['orthogonality_error']:.4f} | {row['orthogonality_error_max']:.4f} | {row['alignment']:.3f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("harness", help="the trainer's step against bare loops, on CPU")
    command.add_argument("--rounds", type=int, default=60)
    command.set_defaults(run=lambda args: harness(args.rounds))
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
    args = parser.parse_args()
    try:
        print(args.run(args))
    except HarnessError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.reason)
    return 0


if __name__ == "__main__":
    sys.exit(main())
