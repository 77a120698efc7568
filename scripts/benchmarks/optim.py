"""Whole optimizer steps on a track's matrices, and the quality of the updates."""

import argparse
import functools
import importlib
import itertools
import json
import os
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import aurora
import train_gpt
from aurora.config import load_config
from aurora.errors import Exit, HarnessError
from aurora.trainer.clock import elapsed_ms, time_mark
from aurora.trainer.identity import describe_machine
from aurora.trainer.ranks import keep_freed_memory

VARIANTS = {f"aurora {variant}": ("aurora", {"variant": variant}) for variant in aurora.VARIANTS}
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("muon", "normuon", "unormuon")},
    **VARIANTS,
    "riemannian_aurora": ("riemannian_aurora", {}),
}


def track_shapes(path: Path) -> list[torch.Size]:
    """The shapes of the matrices of a track's model."""
    with torch.device("meta"):
        model = train_gpt.GPT(load_config(path, "muon").model)
    return [param.tensor.shape for param in model.roles() if param.role == "matrix"]


def new_rule(label: str, params: list[torch.nn.Parameter], **hparams: Any) -> aurora.MatrixOptimizer:
    """The optimizer of a contender."""
    rule, own = CONTENDERS[label]
    optimizer = aurora.find_rule(rule)(params, **own, **hparams)
    assert isinstance(optimizer, aurora.MatrixOptimizer)
    return optimizer


def make_contenders(args: argparse.Namespace, shapes: list[torch.Size]) -> dict[str, torch.optim.Optimizer]:
    """Every rule, and torch's own AdamW and Muon, over the same parameters and gradients, each with its own state."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(args.device) * 0.02) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(args.device) * 1e-4
    ours = dict(lr=1e-4, weight_decay=0.01, polar_dtype=args.polar_dtype)
    theirs: dict[str, Any] = dict(lr=1e-4, weight_decay=0.01)
    contenders: dict[str, torch.optim.Optimizer] = {
        label: new_rule(label, params, polar_schedule=args.schedule, **ours)
        for label in CONTENDERS
        if label in args.rules
    }
    # torch's Muon repeats one polynomial, in bfloat16.
    contenders["muon, ns5_jordan in bfloat16"] = aurora.Muon(
        params, polar_schedule="ns5_jordan", **ours | {"polar_dtype": "bfloat16"}
    )
    contenders["torch.optim.Muon, ns5_jordan in bfloat16"] = torch.optim.Muon(params, adjust_lr_fn="original", **theirs)
    contenders["torch.optim.AdamW, fused"] = torch.optim.AdamW(params, fused=True, **theirs)
    return contenders | {peer: new_peer(peer, params) for peer in args.peers}


def new_peer(path: str, params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """An optimizer of another package, module:Class, with its own defaults but for lr.

    Raises:
        HarnessError: CONFIG.
    """
    module, _, name = path.partition(":")
    group: dict[str, Any] = {"params": params, "lr": 1e-4, "use_muon": True}  # as some packages want it to be marked
    try:
        return getattr(importlib.import_module(module), name)([group])
    except Exception as error:  # another's code may raise anything
        raise HarnessError(Exit.CONFIG, f"--peers {path}: {type(error).__name__}: {error}") from error


def time_ms(step: Callable[[], object], device: str) -> float:
    """On CUDA the device's time, with the host ahead of it by some 30 ms, as it is behind a backward pass."""
    if device == "cuda":
        busy = torch.ones(8192, 8192, device=device, dtype=torch.bfloat16)
        for _ in range(20):
            busy @ busy
    begin = time_mark(torch.device(device))
    step()
    end = time_mark(torch.device(device))
    if device == "cuda":
        torch.cuda.synchronize()
    return elapsed_ms(begin, end)


def temporary_bytes(step: Callable[[], object], device: str) -> int:
    """The most memory that a step has beyond what it finds and leaves; call it once before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler prints lines of its own
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    events = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    return max(itertools.accumulate((event["args"]["Bytes"] for event in events), initial=0))


def time_contenders(
    contenders: dict[str, torch.optim.Optimizer], peers: Sequence[str], rounds: int, device: str
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Milliseconds of each whole step, round by round, in alternating order; and the FLOPs of its matmuls."""
    flops: dict[str, int] = {}
    times: dict[str, list[float]] = {label: [] for label in contenders}
    for label, optimizer in contenders.items():  # the untimed round
        optimizer.step()
        flops[label] = 0 if label in peers else counted_flops(optimizer)  # a compiled peer cannot be counted
        optimizer.step()
    for number in range(rounds):
        labels = list(contenders)
        for label in labels if number % 2 else reversed(labels):
            times[label].append(time_ms(contenders[label].step, device))
    return times, flops


def counted_flops(optimizer: torch.optim.Optimizer) -> int:
    """Of the matmuls in one step, which is made."""
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    return counter.get_total_flops()


def polar_rates(args: argparse.Namespace, shapes: list[torch.Size]) -> list[dict]:
    """Milliseconds and matmul TFLOP/s of one polar factor of all matrices of each shape, stacked."""
    dtype = aurora.compute_dtype(args.polar_dtype, torch.device(args.device))
    rows = []
    for shape in sorted(set(shapes)):
        X_KMN = torch.randn(shapes.count(shape), *shape, device=args.device)
        schedule = aurora.SCHEDULES[args.schedule]
        aurora.polar(X_KMN, schedule, dtype)
        with FlopCounterMode(display=False) as counter:
            aurora.polar(X_KMN, schedule, dtype)
        ms = statistics.median(
            time_ms(functools.partial(aurora.polar, X_KMN, schedule, dtype), args.device) for _ in range(args.rounds)
        )
        tflops = counter.get_total_flops() / ms / 1e9
        rows.append({"shape": tuple(shape), "count": shapes.count(shape), "ms": ms, "tflops": tflops})
    return rows


def synthetic_momentum(shape: torch.Size, steps: int) -> list[torch.Tensor]:
    """Nesterov momentum of a constant signal under fresh noise, with rows and singular values over two decades."""
    generator = torch.Generator().manual_seed(0)
    M, N = shape
    rank = min(M, N)
    signal = torch.randn(M, rank, generator=generator) * torch.logspace(0, -2, rank)
    signal = signal @ torch.randn(rank, N, generator=generator) / rank**0.5
    rows = torch.logspace(0, -2, M)[torch.randperm(M, generator=generator), None]
    optimizer = aurora.Muon([torch.nn.Parameter(torch.zeros(shape))], lr=0.0)
    (group,) = optimizer.param_groups
    momentum: list[torch.Tensor] = []
    (p,) = group["params"]
    optimizer.state[p] = optimizer.new_state(p, group)
    for _ in range(steps):
        p.grad = rows * (signal + 0.5 * torch.randn(shape, generator=generator))
        optimizer.state[p]["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
        momentum += optimizer.lookahead([p], group).unbind()
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
    found: list[dict[str, float]] = []
    for stream in streams.values():
        p = torch.nn.Parameter(torch.zeros(stream[0].shape))
        optimizer = new_rule(label, [p], lr=1.0, polar_schedule=args.schedule, polar_dtype=args.polar_dtype)
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
    contenders = make_contenders(args, shapes)
    times, flops = time_contenders(contenders, args.peers, args.rounds, args.device)
    oblong = sorted({shape for shape in shapes if shape[0] != shape[1]})
    momentum = {}
    if args.device == "cpu":  # the same numbers on every device, and slow to find
        momentum["synthetic"] = {str(shape): synthetic_momentum(shape, steps=20) for shape in oblong}
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
        "polar": polar_rates(args, shapes),
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
        "",
        "| polar factor of | ms | matmul TFLOP/s |",
        "|---|---|---|",
        *(f"| {row['count']} x {row['shape']} | {row['ms']:.2f} | {row['tflops']:.2f} |" for row in result["polar"]),
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
