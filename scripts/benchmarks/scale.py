"""What sharing a model out over ranks takes: bytes that ranks receive in a step, and memory, by count; nothing runs.

Muon with one micro-step. Bytes are those of the payload that a rank receives from others: W-1 parts of an all-gather,
an all-to-all or a reduce-scatter over W ranks, all of a broadcast. tests/test_scale.py counts them in running steps.
"""

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

import aurora
import train_gpt
from aurora.config import ROOT, Config, load_config
from aurora.optim.fsdp import rows_of_ranks
from aurora.optim.sharding import GATHER_BYTES, assign_owners, gather_plan, polar_cost
from aurora.trainer.gradients import BUCKET_ELEMENTS
from scripts.benchmarks.train import write

MODELS = {
    "124M": ("gpt2_small", ()),
    "350M": ("gpt2_350m", ()),
    "1.1B": ("gpt2_1b", ()),
    "7B": ("gpt2_1b", ("model.model_dim=4096", "model.num_layers=32", "model.num_heads=32")),
}
CARDS_GB = {"H100": 80, "H200": 141}
SPARE = 0.9  # the share of a card that weights, gradients, state and buffers may take, before activations
Shapes = Sequence[Sequence[int]]


class Groups(NamedTuple):
    """Shapes of parameters by how they are updated: matrices, and all others, for AdamW."""

    matrices: list[torch.Size]
    others: list[torch.Size]


def groups_of(params: Sequence[aurora.Param]) -> Groups:
    shapes = [[p.tensor.shape for p in params if (p.role == "matrix") == is_matrix] for is_matrix in (True, False)]
    return Groups(*shapes)


def numel(shapes: Shapes) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes)


def owners_bytes(groups: Groups, world_size: int, wire_bytes: int, weight_bytes: int = 4) -> list[int]:
    """Of each rank in a step with owners: MatrixOptimizer.reduce_gradients(), and step()."""
    owners = assign_owners([polar_cost(shape) for shape in groups.matrices], [0] * world_size)
    share = -(-numel(groups.others) // world_size)
    received = [2 * (world_size - 1) * share * wire_bytes] * world_size  # all-to-all, then all-gather
    by_size: dict[int, list[int]] = {}
    for shape, owner in zip(groups.matrices, owners, strict=True):
        received[owner] += (world_size - 1) * shape.numel() * wire_bytes
        by_size.setdefault(shape.numel(), []).append(owner)
    for size, own in by_size.items():
        rounds, single = gather_plan(own, world_size, size * weight_bytes)
        for members in rounds:
            for rank in range(world_size):
                received[rank] += (world_size - 1) * len(members) // world_size * size * weight_bytes
        for i in single:
            for rank in range(world_size):
                received[rank] += size * weight_bytes if rank != own[i] else 0
    return received


def exchange_bytes(matrices: Sequence[torch.Size], world_size: int, wire_bytes: int = 4) -> list[int]:
    """Of each rank in MatrixOptimizer.step() under fully_shard: momentum to the owners, directions back."""
    owners = assign_owners([polar_cost(shape) for shape in matrices], [0] * world_size)
    received = [0] * world_size
    for shape, owner in zip(matrices, owners, strict=True):
        for rank, rows in enumerate(rows_of_ranks(shape[0], world_size)):
            if rank != owner:
                received[owner] += rows * shape[1:].numel() * wire_bytes
                received[rank] += rows * shape[1:].numel() * wire_bytes
    return received


def fully_shard_bytes(parts: Sequence[tuple[Shapes, int, int]], world_size: int) -> int:
    """Of every rank in a forward and a backward pass under fully_shard, which pads rows to those of the first rank.

    parts: for each module that was split, the shapes of its parameters, bytes of a weight on the wire, and how often it
    is gathered. Gradients are summed in float32.
    """
    received = 0
    for shapes, weight_bytes, times in parts:
        padded = sum(rows_of_ranks(shape[0], world_size)[0] * torch.Size(shape[1:]).numel() for shape in shapes)
        received += (world_size - 1) * padded * (times * weight_bytes + 4)
    return received


def parts_of(model: Any, config: Config) -> list[tuple[Shapes, int, int]]:
    """As aurora/trainer/fsdp.py splits a model: blocks, gathered twice, and the rest, gathered once."""
    width = getattr(torch, config.model.activation_dtype).itemsize
    in_blocks = [[p.shape for p in block.parameters()] for block in model.blocks]
    blocks = {id(p) for p in model.blocks.parameters()}
    rest = [p.shape for p in model.parameters() if id(p) not in blocks]
    return [*((shapes, width, 2) for shapes in in_blocks), (rest, 4, 1)]


def owners_memory(groups: Groups, world_size: int, wire_bytes: int) -> int:
    """Bytes on the rank that has most: float32 weights, gradients and state, copies for bfloat16, and buffers."""
    owners = assign_owners([polar_cost(shape) for shape in groups.matrices], [0] * world_size)
    own = [0] * world_size
    for shape, owner in zip(groups.matrices, owners, strict=True):
        own[owner] += shape.numel()
    matrices, others = numel(groups.matrices), numel(groups.others)
    copies = 2 * (matrices + others // 2) if wire_bytes == 2 else 0
    largest = max(shape.numel() for shape in groups.matrices)
    in_bucket = max(largest, min(max(own), BUCKET_ELEMENTS))  # which an owner gets from all ranks
    bucket = wire_bytes * (BUCKET_ELEMENTS + world_size * in_bucket) if world_size > 1 else 0
    gathers = min(GATHER_BYTES, 4 * matrices) if world_size > 1 else 0
    return 8 * (matrices + others) + 4 * max(own) + 8 * others + copies + max(bucket, gathers)


def fsdp_memory(groups: Groups, parts: Sequence[tuple[Shapes, int, int]], world_size: int) -> int:
    """Likewise under fully_shard: rows, two blocks and the rest whole with gradients, and matrices on their way."""
    padded = [
        sum(rows_of_ranks(s[0], world_size)[0] * torch.Size(s[1:]).numel() for s in shapes)
        for shapes in (groups.matrices, groups.others)
    ]
    *blocks, rest = parts
    whole = max(numel(shapes) * (2 * width + 4) for shapes, width, _ in blocks) + numel(rest[0]) * (rest[1] + 4)
    owners = assign_owners([polar_cost(shape) for shape in groups.matrices], [0] * world_size)
    own = [0] * world_size
    for shape, owner in zip(groups.matrices, owners, strict=True):
        own[owner] += shape.numel()
    # Three rounds at most are under way, of at most 256 MiB of own matrices or one; a stack takes 2.5 times as much.
    largest = max(shape.numel() for shape in groups.matrices)
    stack = 4 * max(largest, min(max(own), GATHER_BYTES // 4))
    return 12 * padded[0] + 16 * padded[1] + max(whole, 3 * stack + int(2.5 * stack))


def scale(args: argparse.Namespace) -> str:
    """A table of all models and numbers of ranks; writes OUT.json and OUT.md."""
    rows = []
    for name in args.models:
        track, overrides = MODELS[name]
        config = load_config(ROOT / "configs" / f"{track}.toml", "muon", overrides)
        with torch.device("meta"):
            model = train_gpt.GPT(config.model)
        groups, parts = groups_of(model.roles()), parts_of(model, config)
        wire_bytes = getattr(torch, config.model.activation_dtype).itemsize
        for world_size in args.ranks:
            exchange = exchange_bytes(groups.matrices, world_size, args.wire_bytes)
            passes = fully_shard_bytes(parts, world_size)
            ways = {
                "owners": (owners_bytes(groups, world_size, wire_bytes), owners_memory(groups, world_size, wire_bytes)),
                "fsdp2": ([passes + own for own in exchange], fsdp_memory(groups, parts, world_size)),
            }
            for way, (received, memory) in ways.items():
                fits = [card for card, size in CARDS_GB.items() if memory < SPARE * size * 1e9]
                rows.append({"model": name, "ranks": world_size, "shard": way, "memory_bytes": memory, "fits": fits}
                            | {"mean_bytes": sum(received) // world_size, "most_bytes": max(received)})  # fmt: skip
    lines = ["| model | ranks | train.shard | received a step, mean GB | busiest rank, GB | memory a rank, GB | fits |"]
    lines += ["|---|---|---|---|---|---|---|"]
    lines += [
        f"| {row['model']} | {row['ranks']} | {row['shard']} | {row['mean_bytes'] / 1e9:.2f} | "
        f"{row['most_bytes'] / 1e9:.2f} | {row['memory_bytes'] / 1e9:.1f} | {', '.join(row['fits']) or 'none'} |"
        for row in rows
    ]
    limits = ", ".join(f"{card} {size}" for card, size in CARDS_GB.items())
    lines += [
        "",
        f"By count: Muon, one micro-step. Memory is without activations; it fits below {SPARE:.0%} of {limits} GB.",
    ]
    text = "\n".join(lines) + "\n"
    write(args.out, {"rows": rows}, text)
    return text
