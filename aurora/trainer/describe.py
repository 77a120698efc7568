"""What a run says of itself: the first and the last line of its record, and the report of a dry run."""

import datetime
import math
import re
import secrets
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import aurora
from aurora.config import Config, recorded, told_hparams
from aurora.optim.registry import modules_of_other_rules
from aurora.tokens.loader import PUBLIC_SHARD_TOKENS, RunData, find_shards, steps_in_shard
from aurora.tokens.shards import ShardError, open_shard
from aurora.trainer.checkpoint import identity_of
from aurora.trainer.cost import Speed, speed_of, speed_words
from aurora.trainer.identity import code_hash, describe_git, describe_machine, read_sources, task_hash
from aurora.trainer.memory import memory_estimate_gib, params_by_role
from aurora.trainer.provenance import describe_rule, external_sources
from aurora.trainer.public import plain_line, public_argv
from aurora.trainer.ranks import digest, shared_variables
from aurora.trainer.record import first_at_target
from aurora.trainer.scheduled import schedule_lines
from aurora.trainer.state import Run
from aurora.trainer.writer import SCHEMA


def run_event(run: Run, config_path: Path, track: str, seed: int, data: RunData) -> dict[str, Any]:
    """The record's first line: everything needed to judge, group and repeat the run. track: the text of the config."""
    config, device = run.config, run.ranks.device
    utc, is_cuda = datetime.datetime.now(datetime.UTC), device.type == "cuda"
    sources = read_sources(config_path, track, modules_of_other_rules(run.optimizers))
    external = {}
    if run.is_external:
        external = {"rule": describe_rule(config.rule, run.rule), "resumable": not run.no_resume}
        sources = external_sources(config.rule, run.rule) | sources
    name = re.sub("[^A-Za-z0-9._-]", "-", config_path.stem)
    described_data = data.describe()
    stack = {
        "torch": torch.__version__,
        "numpy": np.__version__,
        "torch_threads": torch.get_num_threads(),
        "device_name": device_name(device),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if is_cuda else None,
    }
    return {
        "event": "run",
        "schema": SCHEMA,
        "run_id": f"{name}-{config.optimizer}-s{seed}-{utc:%Y%m%dT%H%M%S}-{secrets.token_hex(2)}",
        "utc": utc.isoformat(timespec="seconds"),
        "argv": public_argv(sys.argv),
        "config": recorded(config),
        "task_hash": task_hash(recorded(config), described_data["stream_id"]),
        "optimizer": config.optimizer,
        "hparams": told_hparams(vars(config)),
        **external,
        "param_groups": describe_groups(run.optimizers),
        "seed": seed,
        "world_size": run.ranks.world_size,
        "device": device.type,
        "params_by_role": params_by_role(run.model.roles()),
        "git": describe_git(),
        "code_hash": code_hash(sources),
        "sources": sources,
        "data": described_data,
        "env": describe_machine() | stack,
    }


def device_name(device: torch.device) -> str:
    return plain_line(torch.cuda.get_device_name(device)) if device.type == "cuda" else describe_machine()["cpu"]


def check_same_start(run: Run) -> None:
    """Raise HarnessError where ranks differ in task, code, data, software or initial weights. Collective."""
    start = run.start
    stack = {key: start["env"][key] for key in ("torch", "numpy", "python", "torch_threads")}
    variables, weights = shared_variables(start["env"]), digest(run.weights())  # split ones were compared before
    run.ranks.check_agree(code_hash=start["code_hash"], **identity_of(start), **stack, env=variables, weights=weights)


def greeting(start: dict[str, Any]) -> str:
    return (
        f"{start['run_id']}: {start['optimizer']} on {start['world_size']} x {start['env']['device_name']}, "
        f"{sum(start['params_by_role'].values()):,} parameters, target {start['config']['eval']['target']}"
    )


def resume_event(run: Run) -> dict[str, Any]:
    start, progress = run.start, run.progress
    how = "compiled", "attention", "forward", "kernels", "model_edits", "micro_batch"
    changed = ("utc", "world_size", "device", *how, "git", "env")
    here = {key: start[key] for key in changed}
    return {"event": "resume", "step": progress.step, "segment": progress.segments} | here


def summary(run: Run) -> str:
    config, validations = run.config, run.progress.validations
    hit = first_at_target(validations, config.eval.target)
    reached = f"reached at step {hit.step} after {hit.train_time_s:.3f}s" if hit else "not reached"
    found = f"val_loss {validations[-1].val_loss:.5f}, target {config.eval.target} {reached}"
    return f"{config.optimizer}, seed {run.start['seed']}: {found}"


def speed_summary(end: dict[str, Any], run: Run, price: float | None) -> str:
    """Of an end event: speed, memory and what the GPUs were taken for."""
    words = speed_words(Speed(end["tokens_per_s"], end["mfu"]), end["wall_s"], run.start, price)
    return f"speed: {words}{', ' * bool(words)}memory of a rank {end['peak_mem_mib'] / 1024:.2f} GiB"


def end_event(status: str, run: Run) -> dict[str, Any]:
    """The record's last line. Collective."""
    progress, clock = run.progress, run.clock
    hit = first_at_target(progress.validations, run.config.eval.target)
    largest = [peak_memory_mib(run.ranks.device), run.loader.wait_s]
    memory_mib, data_wait_s = run.ranks.all_reduce(
        torch.tensor(largest, device=run.ranks.device), dist.ReduceOp.MAX
    ).tolist()
    with run.judged_weights():
        weights_sha256 = digest(run.weights())
    clock.charge("end")
    spent_ns, wall_ns = clock.of_slowest_rank()
    train_s = spent_ns["train"] / 1e9
    speed = speed_of(progress.step, train_s, progress.segments, run.start)
    return {
        "event": "end",
        "status": status,
        "step": progress.step,
        "train_time_s": train_s,
        "val_loss": progress.validations[-1].val_loss if progress.validations else None,
        "reached_target": hit is not None,
        "steps_to_target": hit.step if hit else None,
        "time_to_target_s": hit.train_time_s if hit else None,
        "wall_s": wall_ns / 1e9,
        "untimed": {f"{account}_s": ns / 1e9 for account, ns in spent_ns.items() if account != "train"},
        "segments": progress.segments,
        "data_wait_s": data_wait_s,  # in this process, of the rank that waited longest
        "weights_sha256": weights_sha256,
        "peak_mem_mib": memory_mib,
        "tokens_per_s": speed.tokens_per_s,
        "mfu": speed.mfu,
    }


def peak_memory_mib(device: torch.device) -> float:
    """Most memory that this process held: of the GPU where there is one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows does not tell
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def describe_groups(optimizers: list[torch.optim.Optimizer]) -> list[dict[str, Any]]:
    """The settings of each parameter group, read back from the optimizers, with the numbers of its polar schedule."""
    descriptions = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            description = {key: plain(value) for key, value in group.items() if key not in ("params", "param_names")}
            if "polar_schedule" in group:
                schedule = aurora.SCHEDULES[group["polar_schedule"]]
                dtype = aurora.compute_dtype(group["polar_dtype"], group["params"][0].device)
                description |= {
                    "polar_coefficients": schedule.coefficients,
                    "polar_norm_margin": schedule.norm_margin,
                    "polar_dtype": str(dtype).removeprefix("torch."),
                }
            name = "AdamW" if group.get("algorithm") == "adamw" else type(optimizer).__name__
            descriptions.append({"optimizer": name} | description)
    return descriptions


def plain(value: Any) -> Any:
    """A setting as JSON has it: a tensor of one number as that number, and what JSON cannot hold by its type."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, list | tuple):
        return list(map(plain, value))
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    return str(value) if isinstance(value, float) else f"a {type(value).__name__}"


def dry_run_report(
    config: Config,
    params: list[aurora.Param],
    optimizers: list[torch.optim.Optimizer],
    world_size: int,
    micro_steps: int,
    micro_batch: int,
) -> str:
    """What a run would train, read and need."""
    train = config.train
    lines = [f"{config.optimizer}: {sum(p.tensor.numel() for p in params):,} parameters", ""]
    lines.append(f"{'role':8}{'tensors':>8}{'weights':>14}  {'optimizer':12}{'lr':>10}{'weight_decay':>14}")
    counts = params_by_role(params)
    counts["all"] = sum(counts.values())
    for group in describe_groups(optimizers):
        role = group["role"]
        tensors = sum(role in ("all", p.role) for p in params)
        lines.append(
            f"{role:8}{tensors:>8}{counts[role]:>14,}  {group['optimizer']:12}{group['lr']:>10g}"
            f"{group.get('weight_decay', 0):>14g}"
        )
    if config.model.bias:
        lines.append(f"vectors include the head's bias of {config.model.vocab_size:,}")

    lines += [
        "",
        f"tokens: {train.steps:,} steps x {train.batch_tokens:,} = {train.steps * train.batch_tokens:,} for training, "
        f"{config.eval.tokens:,} for validation",
        *schedule_lines(optimizers, config),
        f"shards: {describe_shards(config)}",
        f"step: {world_size} ranks x {micro_steps} micro-steps x {micro_batch} sequences "
        f"x {config.model.seq_len} tokens",
    ]
    gib = memory_estimate_gib(config, params, optimizers, world_size, micro_batch)
    parts = ", ".join(f"{name} {value:.2f}" for name, value in gib.items())
    lines.append(
        f"memory of a rank, GiB: {sum(gib.values()):.2f} ({parts}; activations are an estimate for eager mode)"
    )
    by_size = {
        size: sum(memory_estimate_gib(config, params, optimizers, world_size, size).values())
        for size in (2**power for power in range(micro_batch.bit_length()))
    }
    lines.append("by micro-batch: " + ", ".join(f"{size}: {value:.1f}" for size, value in by_size.items()))
    return "\n".join(lines)


def describe_shards(config: Config) -> str:
    """Whether the shards that are here last for the run; if not, how many of the public size do."""
    steps, batch_tokens = config.train.steps, config.train.batch_tokens
    steps_each = steps_in_shard(PUBLIC_SHARD_TOKENS, batch_tokens)
    need = f"{-(-steps // steps_each)} of {PUBLIC_SHARD_TOKENS:,} tokens" if steps_each else "larger ones"
    try:
        shards = [open_shard(path) for path in find_shards(config.data.train)]
    except ShardError as error:
        return f"MISSING, the run takes {need}: {error}"
    available_steps = sum(steps_in_shard(len(shard), batch_tokens) for shard in shards)
    present = f"{config.data.train} has {available_steps:,} steps in {len(shards)}"
    return f"{present}, enough" if available_steps >= steps else f"TOO FEW, {present}, the run takes {need}"
