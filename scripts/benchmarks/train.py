"""Tokens a second of the trainer's own steps on made-up tokens, split into their parts, optimizers in turn.

The parts of a step lie between marks in the order of the device's work, so they add up to it:

- data wait: the loader, and the copy to the device
- forward
- backward: with what it hides of the gradients' sum over ranks
- check: the guard's look at this rank's loss and gradients
- communication: the rest of the gradients' sum, and what the guard exchanges
- optimizer: with the gathering of weights
"""

import argparse
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import train_gpt
from aurora.config import Config, load_config
from aurora.tokens.shards import write_shard
from aurora.trainer import Clock, Model, Ranks, Run, prepare
from aurora.trainer.batch import plan_batch
from aurora.trainer.clock import elapsed_ms, time_mark
from aurora.trainer.describe import peak_memory_mib
from aurora.trainer.identity import describe_git, describe_machine
from aurora.trainer.ranks import join_ranks, leave_ranks
from aurora.trainer.setup import Checked, new_run, open_data

# The part of a step that ends at a mark of the timeline. The forward part ends where the model returns.
PART_BEFORE = {
    "fetch": "",
    "forward_backward": "data wait",
    "micro_step": "backward",
    "sum": "check",
    "update": "communication",
    "updated": "optimizer",
}
PARTS = ("data wait", "forward", "backward", "check", "communication", "optimizer")
# Dense bfloat16 TFLOP/s by the vendors' datasheets, by a part of the device's name; the first that fits counts.
NOMINAL_TFLOPS = {
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H200": 989,
    "B200": 2250,
    "A100": 312,
    "L40S": 362,
    "RTX 4090": 165,
    "RTX 3090": 71,
}


def synthetic_data(config_path: Path, overrides: list[str], folder: Path, world_size: int) -> list[str]:
    """Write shards of random tokens that this track can train on; returns the overrides that say so."""
    config = load_config(config_path, "muon", overrides)
    generator, model = np.random.default_rng(0), config.model
    val_tokens = model.seq_len * world_size
    for split, count in (("train", 2 * config.train.batch_tokens + 2), ("val", val_tokens + 1)):
        tokens = generator.integers(0, min(model.vocab_size, 50257), count)
        write_shard(folder / f"synthetic_{split}_000000.bin", tokens.astype(np.uint16))
    globs = [f"data.{split}={folder.resolve()}/synthetic_{split}_*.bin" for split in ("train", "val")]
    return [*overrides, *globs, "data.allow_epochs=true", f"eval.tokens={val_tokens}", "train.steps=100000"]


def ready_run(config: Config, ranks: Ranks) -> tuple[Run, Model]:
    """A run that is warmed up and before its first step, and what it calls in the place of the model. Collective."""
    checked = Checked(config, plan_batch(config, ranks.world_size), None)
    args, clock = argparse.Namespace(seed=0, out=Path()), Clock(ranks, time.perf_counter_ns())
    run = new_run(args, checked, open_data(config), ranks, clock, train_gpt.GPT)
    return run, prepare(run, train_gpt.forward_backward)


@dataclass
class Contender:
    """One optimizer's run, ready to step, and the marks of its timed steps: (part that ends there, time)."""

    run: Run
    model: Model
    prepare_s: float
    peak_mib: float = 0.0
    steps: Iterator[int] = field(default_factory=itertools.count)
    marked: list[list[tuple[str, Any]]] = field(default_factory=list)

    def step(self, is_timed: bool = True) -> None:
        marks: list[tuple[str, Any]] = []

        def mark(part: str) -> None:
            marks.append((part, time_mark(self.run.ranks.device)))

        def called(*batch: torch.Tensor) -> torch.Tensor:
            loss = self.model(*batch)
            mark("forward")
            return loss

        def at(name: str, step: int) -> None:
            if name in PART_BEFORE:
                mark(PART_BEFORE[name])

        unsubscribe = self.run.timeline.subscribe(at)  # all runs of a process share a timeline
        try:
            train_gpt.train_step(self.run, called, next(self.steps))
        finally:
            unsubscribe()
        if is_timed:
            self.marked.append(marks)

    def timings(self) -> dict[str, Any]:
        """Milliseconds of the timed steps: each, and of each part the median. The device must have done them all."""
        step_ms: list[float] = []
        parts_ms: dict[str, list[float]] = {part: [] for part in PARTS}
        for marks in self.marked:
            times = dict.fromkeys(PARTS, 0.0)
            for (_, begin), (part, end) in itertools.pairwise(marks):
                times[part] += elapsed_ms(begin, end)
            step_ms.append(elapsed_ms(marks[0][1], marks[-1][1]))
            for part, ms in times.items():
                parts_ms[part].append(ms)
        return {"steps_ms": step_ms, "parts_ms": {part: statistics.median(ms) for part, ms in parts_ms.items()}}


def new_contender(config: Config, ranks: Ranks) -> Contender:
    is_cuda = ranks.device.type == "cuda"
    before_mib = torch.cuda.memory_allocated() / 2**20 if is_cuda else 0.0
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    begin_s = time.perf_counter()
    run, model = ready_run(config, ranks)
    ranks.align()
    contender = Contender(run, model, time.perf_counter() - begin_s)
    for _ in range(2):
        contender.step(is_timed=False)
    ranks.align()
    contender.peak_mib = peak_memory_mib(ranks.device) - before_mib
    return contender


def flop_per_step(config: Config, run: Run) -> dict[str, float]:
    """FLOPs of forward and backward, attention counted whole (as in PaLM) or its causal half; 2 a multiply and add."""
    model = config.model
    weights = sum(p.tensor.numel() for p in run.model.roles() if p.role in ("matrix", "head"))
    attention = 12 * model.num_layers * model.model_dim * model.seq_len
    tokens = config.train.batch_tokens
    return {"whole": tokens * (6 * weights + attention), "causal": tokens * (6 * weights + attention / 2)}


def measured_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """The rate of a large square matmul on random numbers, the median of ten."""
    size = 8192 if device.type == "cuda" else 1024
    x, times_ms = torch.randn(size, size, device=device).to(dtype), []
    for _ in range(13):
        begin = time_mark(device)
        x @ x
        marks = begin, time_mark(device)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times_ms.append(elapsed_ms(*marks))
    return 2 * size**3 / statistics.median(times_ms[3:]) / 1e9


def describe_device(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Names, versions, matmul rates and, read while the device is still busy, its clocks."""
    is_cuda, machine = device.type == "cuda", describe_machine()
    name = torch.cuda.get_device_name(device) if is_cuda else machine["cpu"]
    rate = measured_tflops(device, dtype)
    found = {
        "name": name,
        "measured_tflops": rate,
        "nominal_tflops": next((rate for part, rate in NOMINAL_TFLOPS.items() if part in name), None),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if is_cuda else None,
        "threads": torch.get_num_threads(),
        "python": sys.version.split()[0],
    }
    if is_cuda:
        keys = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,temperature.gpu"
        command = ["nvidia-smi", f"--query-gpu={keys}", "--format=csv,noheader", f"--id={device.index or 0}"]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
            found |= dict(zip(keys.split(","), map(str.strip, answer.split(",")), strict=False))
        except (OSError, subprocess.SubprocessError) as error:
            found["clocks"] = f"not read: {error}"
    return found


def syncs_in_a_step(contender: Contender) -> list[str]:
    """What waited for the device in one step on CUDA, by torch's own sync debug mode."""
    import warnings

    if contender.run.ranks.device.type != "cuda":
        return []
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            contender.step(is_timed=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sorted({f"{Path(w.filename).name}:{w.lineno}: {w.message}" for w in caught if "sync" in str(w.message)})


def profile(contender: Contender, path: Path) -> list[dict[str, Any]]:
    """Write rank 0's trace of two steps; returns the fifteen operations that took longest. Collective."""
    device = contender.run.ranks.device
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(2):
            contender.step(is_timed=False)
        contender.run.ranks.align()
    if contender.run.ranks.is_main:
        profiler.export_chrome_trace(str(path))
    name = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    # On CUDA a kernel counts, not once more the operation that it belongs to.
    kind = torch.autograd.DeviceType.CUDA if device.type == "cuda" else torch.autograd.DeviceType.CPU
    events = [event for event in profiler.key_averages() if event.device_type == kind]
    events.sort(key=lambda event: -getattr(event, name))
    total = sum(getattr(event, name) for event in events) or 1
    return [
        {"operation": e.key[:100], "ms_per_step": getattr(e, name) / 2000, "calls_per_step": e.count / 2,
         "share": getattr(e, name) / total}
        for e in events[:15]
    ]  # fmt: skip


def train(args: argparse.Namespace) -> str:
    """Time args.optimizers in turn; writes OUT.json and OUT.md. Under torchrun all ranks call it and rank 0 writes."""
    ranks = join_ranks(timeout_s=60)
    with tempfile.TemporaryDirectory() as folder:
        own = Path(ranks.all_gather_object(folder)[0])
        found = ranks.all_or_none(
            lambda: synthetic_data(args.config, args.overrides, own, ranks.world_size) if ranks.is_main else None
        )
        overrides = ranks.all_gather_object(found)[0]
        configs = {name: load_config(args.config, name, overrides) for name in args.optimizers}
        contenders = {name: new_contender(config, ranks) for name, config in configs.items()}
        result = contenders[args.optimizers[0]].run.start | measure(args, configs, contenders, ranks)
        if ranks.is_main:
            write(args.out, result, train_table(result))  # before what may run out of time
        if args.profile:
            result["profile"] = profile(contenders[args.optimizers[0]], args.out.with_suffix(".trace.json"))
        ranks.align()
    text = train_table(result) if ranks.is_main else ""
    if ranks.is_main:
        write(args.out, result, text)
    leave_ranks()
    return text


def measure(
    args: argparse.Namespace, configs: dict[str, Config], contenders: dict[str, Contender], ranks: Ranks
) -> dict[str, Any]:
    first = configs[args.optimizers[0]]
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    waited_s = {name: contender.run.loader.wait_s for name, contender in contenders.items()}
    for number in range(args.rounds):
        for name in args.optimizers if number % 2 == 0 else reversed(args.optimizers):
            ranks.align()
            for _ in range(args.steps):
                contenders[name].step()
    ranks.align()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs
    device = describe_device(ranks.device, getattr(torch, first.model.activation_dtype))
    rows = {}
    for name, contender in contenders.items():
        timings, plan = contender.timings(), contender.run.plan
        steps_ms = sorted(timings["steps_ms"])
        median_ms = statistics.median(steps_ms)
        tflops = {
            kind: flop / median_ms / 1e9 / ranks.world_size
            for kind, flop in flop_per_step(configs[name], contender.run).items()
        }
        rows[name] = timings | {
            "ms_per_step": median_ms,
            "p95_ms": steps_ms[min(len(steps_ms) - 1, int(0.95 * len(steps_ms)))],
            "tokens_per_s": configs[name].train.batch_tokens / median_ms * 1000,
            "tflops": tflops,
            "mfu_measured": {kind: value / device["measured_tflops"] for kind, value in tflops.items()},
            "mfu_nominal": device["nominal_tflops"]
            and {kind: value / device["nominal_tflops"] for kind, value in tflops.items()},
            "data_wait_ms_on_host": 1000 * (contender.run.loader.wait_s - waited_s[name]) / len(steps_ms),
            "peak_mib": contender.peak_mib,
            "prepare_s": contender.prepare_s,
            "micro_batch": plan.micro_batch,
            "micro_steps": plan.micro_steps,
        }
    return {
        "command": "python scripts/benchmark.py " + shlex.join(sys.argv[1:]),
        "git": describe_git(),
        "config": args.config.name,
        "batch_tokens": first.train.batch_tokens,
        "world_size": ranks.world_size,
        "device": device,
        "optimizers": rows,
        "graphs_compiled_while_timed": graphs,
        "graph_breaks": sum(torch._dynamo.utils.counters["graph_break"].values()),
        "syncs_in_a_step": {name: syncs_in_a_step(contender) for name, contender in contenders.items()},
    }


def train_table(result: dict[str, Any]) -> str:
    device, rows = result["device"], result["optimizers"]
    first = next(iter(rows.values()))
    clocks = ", ".join(f"{key} {device[key]}" for key in ("clocks.sm", "clocks.max.sm", "power.draw") if key in device)
    nominal = f"{device['nominal_tflops']} by the datasheet" if device["nominal_tflops"] else "no datasheet rate known"
    lines = [
        f"{result['config']}: {result['batch_tokens']:,} tokens a step on {result['world_size']} x {device['name']}; "
        f"torch {device['torch']}, CUDA {device['cuda']}, cuDNN {device['cudnn']}, {device['threads']} threads",
        "",
        f"{'compiled' if result['compiled'] else 'eager'}, {result['forward']} forward, kernels: {result['kernels']}, "
        f"attention: {result['attention']}; graphs compiled while timed: {result['graphs_compiled_while_timed']}, "
        f"graph breaks: {result['graph_breaks']}; "
        f"{clocks or 'no GPU clocks'}; matmul {device['measured_tflops']:.1f} TFLOP/s measured, {nominal}",
        "",
        f"    {result['command']}",
        "",
        "| optimizer | tokens/s | ms/step | p95 | MFU whole | MFU causal | of measured: whole | causal | peak MiB "
        "| prepare s | micro-batch |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        shares = [*(row["mfu_nominal"] or {"whole": None, "causal": None}).values(), *row["mfu_measured"].values()]
        mfu = " | ".join("-" if share is None else f"{share:.1%}" for share in shares)
        lines.append(
            f"| {name} | {row['tokens_per_s']:,.0f} | {row['ms_per_step']:.2f} | {row['p95_ms']:.2f} | {mfu} | "
            f"{row['peak_mib']:,.0f} | {row['prepare_s']:.1f} | {row['micro_batch']} x {row['micro_steps']} |"
        )
    lines += [
        "",
        "MFU: 6 FLOPs a token and weight of matrices and head, and 12 layers D T a token for attention counted whole, "
        "half of it for its causal part alone; medians of "
        f"{len(first['steps_ms'])} steps each, optimizers in turn. prepare: compiling and warming up.",
        "",
        "| optimizer | " + " | ".join(f"{part} ms" for part in PARTS) + " | data wait on the host ms |",
        "|---|" + "---|" * (len(PARTS) + 1),
    ]
    for name, row in rows.items():
        parts = " | ".join(f"{row['parts_ms'][part]:.2f}" for part in PARTS)
        lines.append(f"| {name} | {parts} | {row['data_wait_ms_on_host']:.3f} |")
    if any(result["syncs_in_a_step"].values()):
        lines += ["", f"waits for the device within a step: {result['syncs_in_a_step']}"]
    if "profile" in result:
        lines += ["", "| operation | ms/step | calls/step | share |", "|---|---|---|---|"]
        for row in result["profile"]:
            operation = row["operation"].replace("|", "\\|")
            lines.append(f"| {operation} | {row['ms_per_step']:.3f} | {row['calls_per_step']:g} | {row['share']:.1%} |")
    return "\n".join(lines) + "\n"


def own_command() -> str:
    """What was typed, with the number of threads where that was set."""
    threads = os.environ.get("OMP_NUM_THREADS")
    return f"{f'OMP_NUM_THREADS={threads} ' if threads else ''}python scripts/benchmark.py {shlex.join(sys.argv[1:])}"


def write(out: Path, result: dict[str, Any], text: str) -> None:
    """OUT.json and OUT.md."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(text, encoding="utf-8")
