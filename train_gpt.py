"""Train a GPT with the optimizer of your choice and time it to a target validation loss.

    python train_gpt.py --optimizer aurora                              laptop: configs/quick.toml, about a minute
    torchrun --standalone --nproc_per_node=8 train_gpt.py --config configs/gpt2_small.toml --optimizer muon
    python train_gpt.py --config configs/gpt2_small.toml --dry-run      what a run would train, read and need

One file, in the order in which the data flows: command line, config, data, model, ranks and clock, schedule, guard,
validation, warm-up, checkpoint, record, run. Shape legend: B batch, T time, D model, H heads, K head dim, V vocabulary.
Losses are nats per token. Exit codes: 0 done, 2 usage or config, 3 data, 4 checkpoint, 5 non-finite loss or gradient,
6 peer lost, 7 disk, 8 ranks disagree, 75 stopped on request with a checkpoint saved.
"""

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import datetime
import errno
import glob
import hashlib
import json
import math
import os
import platform
import secrets
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train_gpt.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "quick.toml", help="track (TOML)")
    parser.add_argument("--optimizer", default="aurora", help="one of the config's [optimizer.NAME] tables")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the record <run_id>.jsonl")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="A.B=V", help="override one config value"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of this run in --out")
    parser.add_argument("--wandb", choices=("online", "offline", "off"), default="off", help="mirror metrics to wandb")
    parser.add_argument("--dry-run", action="store_true", help="print parameters, data and memory needed, then stop")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_args()  # --help and usage errors answer before torch takes its seconds to import

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import aurora
from configs.schema import Config, Exit, HarnessError, ModelConfig, load_config, typed_table
from data.shards import ShardError, ShardInfo, fingerprint, open_shard, verify_shard


# ----------------------------------------------------------------------------------------------------------------------
# Batch and data


class BatchPlan(NamedTuple):
    """How one rank works off its share of a batch: micro_steps forward passes of micro_batch sequences."""

    micro_steps: int
    micro_batch: int
    val_sequences: int


def plan_batch(config: Config, world_size: int) -> BatchPlan:
    """Split batch and validation set over ranks, so that the global batch never depends on their number."""
    sequences, val_sequences = config.train.batch_tokens // config.model.seq_len, config.eval.tokens // config.model.seq_len
    for key, count in (("train.batch_tokens", sequences), ("eval.tokens", val_sequences)):
        if count % world_size:
            raise HarnessError(
                Exit.CONFIG,
                f"{world_size} ranks do not divide the {count} sequences of {key}; "
                f"use a number of ranks that divides {math.gcd(sequences, val_sequences)}"
            )
    own_sequences = sequences // world_size
    micro_batch = min(config.train.micro_batch, own_sequences)
    if own_sequences % micro_batch:
        raise HarnessError(
            Exit.CONFIG,
            f"train.micro_batch = {micro_batch} does not divide the {own_sequences} sequences "
            f"of a rank; set it to a divisor of {own_sequences}"
        )
    return BatchPlan(own_sequences // micro_batch, micro_batch, val_sequences // world_size)


def steps_in_shard(num_tokens: int, batch_tokens: int) -> int:
    """Whole batches that the loader takes from a shard: it leaves one with fewer than batch_tokens + 2 tokens unread.

    This is the stream of the public benchmark, where a shard of 100M tokens gives 190 steps of 524,288.
    """
    return max(0, (num_tokens - 2) // batch_tokens)


class DataSet(NamedTuple):
    """What a run reads: its train shards in order, and the validation tokens (eval.tokens + 1,)."""

    train_shards: list[np.ndarray]
    val_tokens: np.ndarray
    train_infos: list[ShardInfo]
    val_sha256: str

    def describe(self) -> dict[str, Any]:
        """For the record. Tasks are told apart by stream_id, which does not depend on how many shards a run needs."""
        stream_id = hashlib.sha256((self.train_infos[0].sha256 + self.val_sha256).encode()).hexdigest()
        return {
            "shards": [info._asdict() for info in self.train_infos],
            "fingerprint": fingerprint(self.train_infos),
            "val_sha256": self.val_sha256,
            "stream_id": stream_id,
        }


def open_data(config: Config) -> DataSet:
    """Open, check and hash all that the run will read. Raises DataError before anything expensive."""
    try:
        shards = [open_shard(path) for path in find_shards("data.train", config.data.train)]
        available = np.cumsum([steps_in_shard(len(shard), config.train.batch_tokens) for shard in shards])
        if available[-1] < config.train.steps:
            raise HarnessError(
                Exit.DATA,
                f"train.steps = {config.train.steps} needs {config.train.steps * config.train.batch_tokens:,} tokens, "
                f"but data.train = {config.data.train!r} holds {len(shards)} shards, enough for {available[-1]} steps; "
                f"lower train.steps or add shards"
            )
        num_needed = int(np.searchsorted(available, config.train.steps)) + 1
        train_paths = find_shards("data.train", config.data.train)[:num_needed]
        val_path = find_shards("data.val", config.data.val)[0]
        val_shard = open_shard(val_path)
        if len(val_shard) < config.eval.tokens + 1:
            raise HarnessError(
                Exit.DATA,
                f"eval.tokens = {config.eval.tokens} needs {config.eval.tokens + 1} tokens, "
                f"but shard {val_path} holds {len(val_shard)}; lower eval.tokens"
            )
        verify_shard(val_path, config.model.vocab_size)
        train_infos = [verify_shard(path, config.model.vocab_size) for path in train_paths]
    except ShardError as error:
        raise HarnessError(Exit.DATA, str(error)) from error
    val_tokens = np.ascontiguousarray(val_shard[: config.eval.tokens + 1])
    return DataSet(shards[:num_needed], val_tokens, train_infos, hashlib.sha256(val_tokens.data).hexdigest())


def find_shards(key: str, pattern: str) -> list[Path]:
    paths = sorted(Path(name) for name in glob.glob(str(ROOT / pattern)))
    if not paths:
        raise HarnessError(
            Exit.DATA,
            f"no shard matches {key} = {pattern!r} in {ROOT}; the offline corpus comes from: python data/local.py, "
            f"other data: see README.md"
        )
    return paths


class TokenLoader:
    """This rank's part of each global batch; the token stream is the same for every world size."""

    def __init__(self, shards: list[np.ndarray], config: Config, rank: int, world_size: int, device: torch.device):
        self.shards, self.device, self.seq_len = shards, device, config.model.seq_len
        self.batch_tokens = config.train.batch_tokens
        self.own_tokens = self.batch_tokens // world_size
        self.own_start = rank * self.own_tokens
        self.shard_index, self.position = 0, 0

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets (B, T) int64 on the device; B is this rank's share. The caller checked that tokens last."""
        if len(self.shards[self.shard_index]) - self.position < self.batch_tokens + 2:
            self.shard_index, self.position = self.shard_index + 1, 0
        start = self.position + self.own_start
        window = self.shards[self.shard_index][start : start + self.own_tokens + 1]
        self.position += self.batch_tokens
        return to_device(window, self.seq_len, self.device)

    def state_dict(self) -> dict[str, int]:
        return {"shard_index": self.shard_index, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.shard_index, self.position = state["shard_index"], state["position"]


def to_device(window: np.ndarray, seq_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B*T + 1,) tokens to inputs and targets (B, T), copied without waiting where the device can."""
    tokens = torch.from_numpy(window.astype(np.int64))
    if device.type == "cuda":
        tokens = tokens.pin_memory().to(device, non_blocking=True)
    else:
        tokens = tokens.to(device)
    return tokens[:-1].view(-1, seq_len), tokens[1:].view(-1, seq_len)


# ----------------------------------------------------------------------------------------------------------------------
# Model


class RMSNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.gain.shape, self.gain.type_as(x))


class Linear(nn.Linear):
    """A linear layer with bias that computes in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.type_as(x), self.bias.type_as(x))


class Rotary(nn.Module):
    """Rotary positions on half of each head: pairs (i, i + K/2), the second half of the frequencies zero."""

    def __init__(self, head_dim: int, seq_len: int, base: float):
        super().__init__()
        frequencies = (1 / base) ** torch.linspace(0, 1, head_dim // 4)
        frequencies = torch.cat([frequencies, torch.zeros(head_dim // 4)])
        angles_T1K = torch.outer(torch.arange(seq_len, dtype=torch.float32), frequencies)[:, None, :]
        self.register_buffer("cos_T1K", angles_T1K.cos(), persistent=False)
        self.register_buffer("sin_T1K", angles_T1K.sin(), persistent=False)

    def forward(self, x_BTHK: Tensor) -> Tensor:
        cos, sin = self.cos_T1K[: x_BTHK.size(1)], self.sin_T1K[: x_BTHK.size(1)]
        x1, x2 = x_BTHK.float().chunk(2, dim=-1)
        return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1).type_as(x_BTHK)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.num_heads, self.scale = config.num_heads, config.attention_scale
        self.q = Linear(config.model_dim, config.model_dim)
        self.k = Linear(config.model_dim, config.model_dim)
        self.v = Linear(config.model_dim, config.model_dim)
        self.out = Linear(config.model_dim, config.model_dim)
        self.rotary = Rotary(config.model_dim // config.num_heads, config.seq_len, config.rope_base)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q, k, v = (layer(x_BTD).unflatten(-1, (self.num_heads, -1)) for layer in (self.q, self.k, self.v))
        q, k = (self.rotary(F.rms_norm(x_BTHK, x_BTHK.shape[-1:])) for x_BTHK in (q, k))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        y_BHTK = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return self.out(y_BHTK.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.up = Linear(config.model_dim, config.mlp_expansion * config.model_dim)
        self.down = Linear(config.mlp_expansion * config.model_dim, config.model_dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(self.up(x_BTD).relu().square())


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(config.model_dim), Attention(config)
        self.mlp_norm, self.mlp = RMSNorm(config.model_dim), MLP(config)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD))
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class GPT(nn.Module):
    """The public optimization benchmark's model: pre-norm blocks, QK norm, squared ReLU, soft-capped logits."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.activation_dtype, self.softcap = getattr(torch, config.activation_dtype), config.logit_softcap
        self.embed = nn.Embedding(config.vocab_size, config.model_dim)
        self.embed_norm = RMSNorm(config.model_dim)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        self.head_norm = RMSNorm(config.model_dim)
        self.head = Linear(config.model_dim, config.vocab_size)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Projections and head zero, embedding N(0, 1), other weights N(0, 0.33 / fan-in), biases 0, gains 1.

        Drawn on the CPU, so that a seed means the same weights on every device and rank.
        """
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.embed.weight, generator=generator)
        zero_init = {self.head, *(layer for block in self.blocks for layer in (block.attention.out, block.mlp.down))}
        for module in self.modules():
            if isinstance(module, Linear):
                std = 0.0 if module in zero_init else math.sqrt(0.33 / module.in_features)
                nn.init.normal_(module.weight, std=std, generator=generator)
                nn.init.zeros_(module.bias)

    def roles(self) -> list[aurora.Param]:
        """Every parameter with its role; the head's bias is a vector, as in the public benchmark."""
        matrices = {id(m.weight) for m in self.blocks.modules() if isinstance(m, Linear)}
        by_id = {id(self.embed.weight): "embed", id(self.head.weight): "head", **dict.fromkeys(matrices, "matrix")}
        return [aurora.Param(name, p, by_id.get(id(p), "vector")) for name, p in self.named_parameters()]

    def logits(self, inputs_BT: Tensor) -> Tensor:
        """(B, T) tokens to (B, T, V) float32 logits, soft-capped: 15 z / sqrt(z^2 + 15^2) with softcap 15."""
        x_BTD = self.embed_norm(self.embed(inputs_BT).to(self.activation_dtype))
        for block in self.blocks:
            x_BTD = block(x_BTD)
        z_BTV = self.head(self.head_norm(x_BTD)).float()
        return self.softcap * z_BTV * (z_BTV.square() + self.softcap**2).rsqrt()

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Cross-entropy summed over the targets."""
        return F.cross_entropy(self.logits(inputs_BT).flatten(0, 1), targets_BT.flatten(), reduction="sum")


# ----------------------------------------------------------------------------------------------------------------------
# Ranks and clock


@dataclass(frozen=True)
class Ranks:
    """This process among the processes of the run, and its device."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def say(self, line: str) -> None:
        if self.is_main:
            print(line, flush=True)

    def all_reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        if self.world_size > 1:
            dist.all_reduce(tensor, op=op)
        return tensor

    def all_gather_object(self, value: Any) -> list[Any]:
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value."""
        return self.all_gather_object(value)[0]

    def align(self) -> None:
        """Wait until every rank's device has done all its work: both the sync and the barrier are needed."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        elif self.device.type == "mps":
            torch.mps.synchronize()
        if self.world_size > 1:
            dist.barrier()


@contextlib.contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Join the process group that torchrun announces in the environment, if any."""
    world_size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise HarnessError(Exit.CONFIG, f"local rank {device.index} has no GPU of its own: this node has {torch.cuda.device_count()}")  # fmt: skip
        torch.cuda.set_device(device)
    elif torch.backends.mps.is_available() and world_size == 1:
        device = torch.device("mps")
    else:
        device = torch.device("cpu")
        keep_freed_memory()
    if world_size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        # Long enough for the slowest rank to compile.
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=10))
    try:
        yield Ranks(rank, world_size, device)
    finally:
        if world_size > 1:
            dist.destroy_process_group()


def keep_freed_memory() -> None:
    """Have glibc keep the memory of freed activations: giving it back costs a page fault a page in the next step."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


class Clock:
    """Charges all wall time since it was made to one account or another, so that the accounts add up to the whole.

    Only "train" is timed for the comparison. Ranks align before every reading, so the slowest one counts.
    """

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self.spent_ns: dict[str, int] = {}
        self.last_ns = time.perf_counter_ns()

    def charge(self, account: str) -> float:
        """Charge the time since the last reading to account; returns its total in seconds."""
        self.ranks.align()
        now_ns = time.perf_counter_ns()
        self.spent_ns[account] = self.spent_ns.get(account, 0) + now_ns - self.last_ns
        self.last_ns = now_ns
        return self.spent_s(account)

    def spent_s(self, account: str) -> float:
        return self.spent_ns.get(account, 0) / 1e9

    def running_train_s(self) -> float:
        """Train time up to now as this rank sees it, without waiting for the device: for progress lines only."""
        return self.spent_s("train") + (time.perf_counter_ns() - self.last_ns) / 1e9

    def slowest_train_s(self) -> float:
        """Train time of the slowest rank. Collective."""
        spent = torch.tensor([self.spent_ns.get("train", 0)], dtype=torch.int64, device=self.ranks.device)
        return self.ranks.all_reduce(spent, dist.ReduceOp.MAX).item() / 1e9


def time_mark(device: torch.device) -> torch.cuda.Event | int:
    """A point in the device's time that costs no sync; see elapsed_ms."""
    if device.type != "cuda":
        return time.perf_counter_ns()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed_ms(start: torch.cuda.Event | int, end: torch.cuda.Event | int) -> float:
    """Milliseconds between two marks; on CUDA, only once the device has passed both."""
    return (end - start) / 1e6 if isinstance(start, int) else start.elapsed_time(end)


class StepLog:
    """Loss, lr and durations of the steps since the last flush, left on the device until then."""

    def __init__(self, every: int, ranks: Ranks):
        self.every, self.ranks = every, ranks
        self.steps: list[tuple[int, Tensor, float, list[Any]]] = []

    def add(self, step: int, loss: Tensor, lr: float, marks: list[Any]) -> None:
        """marks: begin of the step, begin of the optimizer's part, end of both."""
        self.steps.append((step, loss, lr, marks))

    def flush(self) -> list[dict[str, Any]]:
        """A train event for every log_every steps, averaged over them. Collective; call it in untimed time."""
        if not self.steps:
            return []
        losses = self.ranks.all_reduce(torch.stack([loss for _, loss, _, _ in self.steps])).tolist()
        events = []
        for first in range(0, len(self.steps), self.every):
            window = slice(first, first + self.every)
            marks = [marks for _, _, _, marks in self.steps[window]]
            last_step, _, lr, _ = self.steps[window][-1]
            events.append({
                "event": "train",
                "step": last_step,
                "train_loss": statistics.mean(losses[window]),
                "lr": lr,
                "step_ms": statistics.mean(elapsed_ms(begin, end) for begin, _, end in marks),
                "optimizer_ms": statistics.mean(elapsed_ms(begin, end) for _, begin, end in marks),
            })  # fmt: skip
        self.steps.clear()
        return events


# ----------------------------------------------------------------------------------------------------------------------
# Training state, schedule, gradients


@dataclass
class Training:
    """All that a step reads and writes."""

    config: Config
    plan: BatchPlan
    ranks: Ranks
    model: GPT
    optimizers: list[torch.optim.Optimizer]
    loader: TokenLoader

    def state_dict(self) -> dict[str, Any]:
        """The whole state, the same on every rank. Collective: sharded optimizer state is gathered."""
        return {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "loader": self.loader.state_dict(),
            "rng": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of state_dict(). The state is copied, not kept."""
        self.model.load_state_dict(state["model"])
        for optimizer, optimizer_state in zip(self.optimizers, copy.deepcopy(state["optimizers"]), strict=True):
            optimizer.load_state_dict(optimizer_state)
        self.loader.load_state_dict(state["loader"])
        torch.set_rng_state(state["rng"])


def lr_scale(step: int, config: Config) -> float:
    """lr of this step (from 0) as a share of its peak: linear warm-up, flat, linear cooldown."""
    remaining, cooldown = 1 - step / config.train.steps, config.schedule.cooldown_frac
    floor = config.schedule.final_lr_frac
    scale = 1.0 if remaining >= cooldown else floor + (1 - floor) * remaining / cooldown
    return scale * min(1.0, (step + 1) / max(1, config.warmup_steps))


def validation_steps(config: Config) -> set[int]:
    """The steps (0 = before training) after which loss is measured; fixed before the run starts."""
    steps, evaluation = config.train.steps, config.eval
    late_from = (1 - evaluation.late_frac) * steps
    every = [evaluation.every if step < late_from else evaluation.late_every for step in range(steps)]
    return {step for step in range(steps) if step % every[step] == 0} | {steps}


def forward_backward(model: nn.Module, batch: tuple[Tensor, Tensor], run: Training) -> Tensor:
    """Accumulate this rank's gradients of the mean loss over the global batch; returns its share of that loss."""
    losses = []
    for inputs, targets in zip(*(part.split(run.plan.micro_batch) for part in batch), strict=True):
        loss = model(inputs, targets) / run.config.train.batch_tokens
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def reduce_gradients(optimizers: list[torch.optim.Optimizer], ranks: Ranks) -> None:
    """Sum gradients over ranks: a matrix's into its owner, all others into everyone."""
    if ranks.world_size == 1:
        return
    for optimizer in optimizers:
        if isinstance(optimizer, aurora.MatrixOptimizer):
            optimizer.reduce_gradients()
            continue
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        flat = torch.cat([grad.flatten() for grad in grads])  # one collective instead of a hundred
        ranks.all_reduce(flat)
        torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(flat.split([g.numel() for g in grads]), grads)])


class Guard:
    """Each step, on all ranks at once: are loss and gradients finite, and was the run asked to stop?

    The answer is found on the device and, on CUDA, read one step later, so that the host never waits for it; a
    non-finite step is reported before anything more is measured or saved.
    """

    def __init__(self, model: nn.Module, ranks: Ranks):
        self.names, self.params = zip(*model.named_parameters(), strict=True)
        self.ranks = ranks
        self.stop_requested = False  # set by a signal, on some rank
        self.must_stop = False  # agreed upon by all ranks
        self.indices = torch.arange(len(self.params), device=ranks.device)
        self.pending: list[tuple[int, Tensor, torch.cuda.Event | None]] = []

    def check(self, step: int, loss: Tensor) -> None:
        """Before the gradients are reduced and applied. Raises HarnessError naming step and parameter."""
        norms = torch.stack(torch._foreach_norm([p.grad for p in self.params]))
        first_bad = torch.where(norms.isfinite(), len(self.params), self.indices).min()
        go_on = torch.tensor(not self.stop_requested, device=self.ranks.device, dtype=torch.int64)
        status = self.ranks.all_reduce(torch.stack([first_bad, loss.isfinite().long(), go_on]), dist.ReduceOp.MIN)
        event = None
        if self.ranks.device.type == "cuda":
            status = status.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self.pending.append((step, status, event))
        self.read(keep=0 if event is None else 1)

    def read(self, keep: int = 0) -> None:
        """Act on all but the newest keep answers."""
        while len(self.pending) > keep:
            step, status, event = self.pending.pop(0)
            if event is not None:
                event.synchronize()
            first_bad, loss_is_finite, go_on = status.tolist()
            self.must_stop |= not go_on
            if first_bad < len(self.names) or not loss_is_finite:
                where = f"first bad gradient: {self.names[first_bad]}" if first_bad < len(self.names) else "all gradients are finite"  # fmt: skip
                raise HarnessError(
                    Exit.NON_FINITE,
                    f"step {step + 1}: loss is {'finite' if loss_is_finite else 'not finite'}, {where}; "
                    f"lower the learning rate",
                )


# ----------------------------------------------------------------------------------------------------------------------
# Validation and warm-up


@torch.no_grad()
def validate(model: nn.Module, val_tokens: np.ndarray, run: Training) -> float:
    """Mean loss over the fixed validation tokens, in sequences that do not overlap. Collective; changes nothing."""
    config, plan, ranks = run.config, run.plan, run.ranks
    own_tokens = plan.val_sequences * config.model.seq_len
    window = val_tokens[ranks.rank * own_tokens : (ranks.rank + 1) * own_tokens + 1]
    batch = to_device(window, config.model.seq_len, ranks.device)
    losses = [model(*micro) for micro in zip(*(part.split(plan.micro_batch) for part in batch), strict=True)]
    total = torch.stack(losses).cpu().double().sum().to(ranks.device if ranks.world_size > 1 else "cpu")
    return ranks.all_reduce(total).item() / config.eval.tokens


def digest(value: Any) -> str:
    """sha256 over all keys, numbers and tensor bytes of nested dicts and lists."""
    sha = hashlib.sha256()

    def add(item: Any) -> None:
        if isinstance(item, dict):
            for key, entry in item.items():
                sha.update(f"{key}:".encode())
                add(entry)
        elif isinstance(item, list | tuple):
            for entry in item:
                add(entry)
        elif isinstance(item, Tensor):
            sha.update(f"{item.dtype}{tuple(item.shape)}".encode())
            sha.update(item.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:
            sha.update(repr(item).encode())

    add(value)
    return sha.hexdigest()


WARMUP_STEPS = 2


def warm_up(model: nn.Module, run: Training) -> None:
    """Run every shape once on made-up tokens (compilers, allocators, first collectives), then undo it all."""
    before = copy.deepcopy(run.state_dict())
    generator = torch.Generator().manual_seed(0)
    seq_len, plan = run.config.model.seq_len, run.plan

    def made_up_batch(sequences: int) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(run.config.model.vocab_size, (sequences * seq_len + 1,), generator=generator)
        return to_device(tokens.numpy(), seq_len, run.ranks.device)

    for _ in range(WARMUP_STEPS):
        forward_backward(model, made_up_batch(plan.micro_steps * plan.micro_batch), run)
        reduce_gradients(run.optimizers, run.ranks)
        for optimizer in run.optimizers:
            optimizer.step()
        run.model.zero_grad()
    with torch.no_grad():
        for sequences in {min(plan.micro_batch, plan.val_sequences), plan.val_sequences % plan.micro_batch} - {0}:
            model(*made_up_batch(sequences))
    run.load_state_dict(before)
    if digest(run.state_dict()) != digest(before):
        raise RuntimeError("warm-up left a trace in weights, optimizer state, RNG or loader")


def compile_and_warm_up(run: Training) -> nn.Module:
    """The model to call in training: compiled where the config says so, warm, and otherwise untouched."""
    mode, ranks = run.config.train.compile, run.ranks
    if mode == "on" or (mode == "auto" and ranks.device.type == "cuda"):
        try:
            compiled = torch.compile(run.model, dynamic=False)
            warm_up(compiled, run)
            ranks.say("model: compiled")
            return compiled
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
            reason = f"torch.compile failed: {_first_line(error)}"
            if mode == "on":
                raise HarnessError(Exit.CONFIG, f"train.compile = 'on', but {reason}; set it to 'off'") from error
            ranks.say(f"model: eager, for {reason}")
            torch._dynamo.reset()
            run.model.zero_grad()
    else:
        ranks.say(f"model: eager (train.compile = {mode!r} on {ranks.device.type})")
    warm_up(run.model, run)
    return run.model


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoint


KEPT_CHECKPOINTS = 2


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write state under folder/step-N: hashed, synced, then renamed, so that the name means a whole checkpoint."""
    final = folder / f"step-{step:06d}"
    temporary = folder / f".{final.name}-{secrets.token_hex(4)}"
    try:
        temporary.mkdir(parents=True)
        with open(temporary / "state.pt", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        manifest = {"sha256": hashlib.sha256((temporary / "state.pt").read_bytes()).hexdigest(), "step": step}
        with open(temporary / "manifest.json", "w") as file:
            json.dump(manifest, file)
            file.flush()
            os.fsync(file.fileno())
        if final.exists():
            shutil.rmtree(final)
        os.rename(temporary, final)
        parent = os.open(folder, os.O_RDONLY)
        os.fsync(parent)
        os.close(parent)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        shutil.rmtree(temporary, ignore_errors=True)
        raise HarnessError(Exit.DISK, f"checkpoint {final} cannot be written: {_first_line(error)}; the last one is kept") from error  # fmt: skip
    for old in sorted(folder.glob("step-*"))[:-KEPT_CHECKPOINTS]:
        shutil.rmtree(old)


def newest_checkpoint(out: Path, identity: dict[str, str], say: Any) -> dict[str, Any] | None:
    """The newest whole checkpoint below out of a run with this identity. Nothing in the file is executed.

    Raises HarnessError when the only checkpoints there are of a run that differs.
    """
    differing = None
    for folder in sorted(out.glob("*.checkpoints/step-*"), key=lambda path: path.name, reverse=True):
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
            if hashlib.sha256((folder / "state.pt").read_bytes()).hexdigest() != manifest["sha256"]:
                raise ValueError("its bytes do not match its manifest")
            state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            say(f"resume: {folder} is damaged ({_first_line(error)}), trying an older one")
            continue
        differing = {key: folder for key, value in identity.items() if state["identity"][key] != value}
        if not differing:
            return state
    if differing:
        raise HarnessError(Exit.CHECKPOINT, f"--resume: the checkpoints in {out} were made with another {', '.join(differing)}; use another --out, or restore it")  # fmt: skip
    return None


# ----------------------------------------------------------------------------------------------------------------------
# Record


class Record:
    """The run's JSONL file, written by rank 0: one event a line, one write a line."""

    def __init__(self, path: Path, ranks: Ranks):
        self.path, self.ranks = path, ranks

    def write(self, *events: dict[str, Any]) -> None:
        """Append events and force them to disk; only call in untimed time."""
        if not self.ranks.is_main or not events:
            return
        try:
            handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                for event in events:
                    line = (json.dumps(event, allow_nan=False) + "\n").encode()
                    if os.write(handle, line) != len(line):
                        raise OSError(errno.ENOSPC, "the line was cut")
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            raise HarnessError(Exit.DISK, f"record {self.path} cannot be written: {error.strerror}") from error

    def drop_torn_line(self) -> None:
        """Cut off a last line that a crash left without its end."""
        if self.ranks.is_main and self.path.exists():
            content = self.path.read_bytes()
            if not content.endswith(b"\n"):
                os.truncate(self.path, content.rfind(b"\n") + 1)


class Tracker:
    """Mirrors metrics to wandb on rank 0. A wandb that is missing, broken or unreachable costs one warning."""

    def __init__(self, mode: str, event: dict[str, Any], ranks: Ranks):
        self.run = None
        if mode != "off" and ranks.is_main:
            with self._contained():
                import wandb

                self.run = wandb.init(
                    project="nanogpt-speedrun",
                    group=event["task_hash"][:12],
                    name=event["run_id"],
                    id=event["run_id"],
                    resume="allow",
                    mode=mode,
                    config={key: event[key] for key in ("config", "optimizer", "hparams", "seed", "world_size")},
                )

    def log(self, *events: dict[str, Any]) -> None:
        if self.run is not None:
            with self._contained():
                for event in events:
                    metrics = {f"{event['event']}/{k}": v for k, v in event.items() if k not in ("event", "step")}
                    self.run.log(metrics | {"step": event["step"]})

    def finish(self) -> None:
        if self.run is not None:
            with self._contained():
                self.run.finish()

    @contextlib.contextmanager
    def _contained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever wandb raises, the run is worth more
            self.run = None
            print(f"warning: wandb is off from here: {_first_line(error)}", file=sys.stderr)


def read_sources(config_path: Path) -> dict[str, str]:
    """The text of every file that decides what the run computes."""
    paths = [ROOT / "train_gpt.py", ROOT / "configs/schema.py", ROOT / "data/shards.py", *ROOT.glob("aurora/*.py")]
    sources = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted(paths)}
    return sources | {f"configs/{config_path.name}": config_path.read_text(encoding="utf-8")}


def code_hash(sources: dict[str, str]) -> str:
    return digest({name: text for name, text in sources.items() if name.endswith(".py")})


def task_hash(config: Config, data: DataSet) -> str:
    """Equal for two runs exactly when their losses may be compared: same model, data, batch, evaluation, target."""
    task = {"model": vars(config.model), "batch_tokens": config.train.batch_tokens, "eval": vars(config.eval)}
    return hashlib.sha256(json.dumps(task | {"data": data.describe()["stream_id"]}, sort_keys=True).encode()).hexdigest()


def describe_git() -> dict[str, Any] | None:
    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", ROOT, *args], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def describe_env(device: torch.device) -> dict[str, Any]:
    cpu_name = platform.processor()
    with contextlib.suppress(OSError):
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu_name = models[0].partition(": ")[2] if models else cpu_name
    is_cuda = device.type == "cuda"
    prefixes = ("OMP_", "MKL_", "TORCH", "NCCL_", "CUBLAS", "CUDA_")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name,
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device_name": torch.cuda.get_device_name(device) if is_cuda else cpu_name,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if is_cuda else None,
        "variables": {key: value for key, value in sorted(os.environ.items()) if key.startswith(prefixes)},
    }


def peak_memory_mib(device: torch.device) -> float | None:
    """Most memory that this process held: of the GPU where there is one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def params_by_role(params: list[aurora.Param]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for param in params:
        counts[param.role] = counts.get(param.role, 0) + param.tensor.numel()
    return counts


def describe_groups(optimizers: list[torch.optim.Optimizer]) -> list[dict[str, Any]]:
    """The settings of each parameter group, read back from the optimizers."""
    return [
        {"optimizer": type(optimizer).__name__}
        | {key: value for key, value in group.items() if key not in ("params", "param_names")}
        for optimizer in optimizers
        for group in optimizer.param_groups
    ]


# ----------------------------------------------------------------------------------------------------------------------
# Run


PROGRESS_EVERY_S = 5.0


def check_ranks_agree(ranks: Ranks, **fields: Any) -> None:
    """Raise HarnessError naming the first rank and field that differ from rank 0. Collective."""
    everyone = ranks.all_gather_object(fields)
    for rank, theirs in enumerate(everyone):
        for key, value in theirs.items():
            if value != everyone[0][key]:
                raise HarnessError(
                    Exit.RANKS_DISAGREE, f"rank {rank} has {key} = {value!r:.80}, rank 0 has {everyone[0][key]!r:.80}"
                )


@contextlib.contextmanager
def stop_signals(guard: Guard) -> Iterator[None]:
    """SIGTERM, SIGUSR1 and Ctrl-C ask the run to stop with a checkpoint; a second Ctrl-C means now."""

    def request_stop(signum: int, frame: Any) -> None:
        if signum == signal.SIGINT and guard.stop_requested:
            raise KeyboardInterrupt
        guard.stop_requested = True

    names = [name for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)]
    previous = {name: signal.signal(getattr(signal, name), request_stop) for name in names}
    try:
        yield
    finally:
        for name, handler in previous.items():
            signal.signal(getattr(signal, name), handler)


def train(args: argparse.Namespace, ranks: Ranks) -> None:
    """One run, from config to the record's end event. Raises HarnessError."""
    clock = Clock(ranks)
    config = load_config(args.config, args.optimizer, args.overrides)
    config = dataclasses.replace(config, hparams=checked_hparams(config))
    plan = plan_batch(config, ranks.world_size)
    if args.dry_run:
        ranks.say(dry_run_report(config, plan, ranks))
        return
    check_writable(args.out)
    data = open_data(config)
    sources = read_sources(args.config)

    model = GPT(config.model)
    model.init_weights(args.seed)
    model.to(ranks.device)
    optimizers = build_optimizers(config, model)
    loader = TokenLoader(data.train_shards, config, ranks.rank, ranks.world_size, ranks.device)
    run = Training(config, plan, ranks, model, optimizers, loader)
    identity = {
        "config": digest(dataclasses.asdict(config)),
        "code": code_hash(sources),
        "data": data.describe()["fingerprint"],
        "seed": str(args.seed),
    }
    check_ranks_agree(ranks, **identity, torch_version=torch.__version__, weights=digest(model.state_dict()))

    checkpoint = newest_checkpoint(args.out, identity, ranks.say) if args.resume else None
    if args.resume:
        ranks.say(f"resume: from step {checkpoint['step']}" if checkpoint else f"resume: no checkpoint in {args.out}, starting at step 0")  # fmt: skip
    utc = datetime.datetime.now(datetime.UTC)
    name = f"{args.config.stem}-{config.optimizer}-s{args.seed}-{utc:%Y%m%dT%H%M%S}-{secrets.token_hex(2)}"
    run_id = ranks.broadcast_object(checkpoint["run_id"] if checkpoint else name)
    record = Record(args.out / f"{run_id}.jsonl", ranks)
    event = {
        "event": "run",
        "schema": 1,
        "run_id": run_id,
        "utc": utc.isoformat(timespec="seconds"),
        "argv": sys.argv,
        "config": dataclasses.asdict(config),
        "task_hash": task_hash(config, data),
        "optimizer": config.optimizer,
        "hparams": config.hparams | {"warmup_steps": config.warmup_steps},
        "param_groups": describe_groups(optimizers),
        "seed": args.seed,
        "world_size": ranks.world_size,
        "device": ranks.device.type,
        "params_by_role": params_by_role(model.roles()),
        "git": describe_git(),
        "code_hash": identity["code"],
        "sources": sources,
        "data": data.describe(),
        "env": describe_env(ranks.device),
    }
    ranks.say(
        f"{run_id}: {config.optimizer} on {ranks.world_size} x {event['env']['device_name']}, "
        f"{sum(event['params_by_role'].values()):,} parameters, target {config.eval.target}"
    )
    clock.charge("setup")
    callable_model = compile_and_warm_up(run)
    if checkpoint:
        run.load_state_dict(checkpoint["training"])
        clock.spent_ns = dict(checkpoint["spent_ns"])
        record.drop_torn_line()
        record.write({"event": "resume", "step": checkpoint["step"], "utc": event["utc"]})
    else:
        record.write(event)
    tracker = Tracker(args.wandb, event, ranks)
    clock.charge("warmup")

    start_step = checkpoint["step"] if checkpoint else 0
    history = {step: (loss, train_s) for step, loss, train_s in checkpoint["history"]} if checkpoint else {}
    segments = checkpoint["segments"] + 1 if checkpoint else 1
    guard, log = Guard(model, ranks), StepLog(config.train.log_every, ranks)
    due, steps, target = validation_steps(config), config.train.steps, config.eval.target
    last_said_s = time.monotonic()

    def flush_log() -> None:
        events = log.flush()
        record.write(*events)
        tracker.log(*events)

    def save(step: int) -> None:
        state = {"training": run.state_dict(), "identity": identity, "run_id": run_id, "step": step}
        state |= {"history": [(s, *values) for s, values in history.items()], "segments": segments}
        state |= {"spent_ns": clock.spent_ns}
        if ranks.is_main:
            save_checkpoint(args.out / f"{run_id}.checkpoints", step, state)
        clock.charge("checkpoint")

    def end(status: str, step: int) -> None:
        reached = [s for s, (loss, _) in sorted(history.items()) if loss <= target]
        last_loss = history[max(history)][0] if history else None
        record.write({
            "event": "end",
            "status": status,
            "step": step,
            "train_time_s": clock.slowest_train_s(),
            "val_loss": last_loss,
            "reached_target": bool(reached),
            "steps_to_target": reached[0] if reached else None,
            "time_to_target_s": history[reached[0]][1] if reached else None,
            "untimed": {f"{key}_s": clock.spent_s(key) for key in clock.spent_ns if key != "train"},
            "segments": segments,
            "weights_sha256": digest(model.state_dict()),
            "peak_mem_mib": peak_memory_mib(ranks.device),
        })  # fmt: skip
        tracker.finish()

    step = start_step
    try:
        with stop_signals(guard):
            for step in range(start_step, steps + 1):
                if step in due and step not in history:
                    guard.read()
                    clock.charge("train")
                    train_s = clock.slowest_train_s()
                    loss = validate(callable_model, data.val_tokens, run)
                    if not math.isfinite(loss):
                        raise HarnessError(Exit.NON_FINITE, f"step {step}: validation loss is {loss}; lower the learning rate")  # fmt: skip
                    history[step] = loss, train_s
                    flush_log()
                    event = {"event": "val", "step": step, "tokens": step * config.train.batch_tokens, "train_time_s": train_s, "val_loss": loss}  # fmt: skip
                    record.write(event)
                    tracker.log(event)
                    average_ms = 1000 * train_s / step if step else math.nan
                    ranks.say(f"step:{step}/{steps} val_loss:{loss:.5f} train_time:{train_s:.3f}s step_avg:{average_ms:.2f}ms")  # fmt: skip
                    last_said_s = time.monotonic()
                    clock.charge("val")
                is_checkpoint_due = config.train.checkpoint_every and step > start_step and step % config.train.checkpoint_every == 0  # fmt: skip
                if is_checkpoint_due or guard.must_stop:
                    guard.read()
                    clock.charge("train")
                    flush_log()
                    save(step)
                if guard.must_stop:
                    raise HarnessError(Exit.PREEMPTED, f"stopped on request after step {step}; go on with --resume and the same arguments")  # fmt: skip
                if step == steps:
                    break

                begin = time_mark(ranks.device)
                batch = loader.next_batch()
                train_loss = forward_backward(callable_model, batch, run)
                guard.check(step, train_loss)
                optimizer_begin = time_mark(ranks.device)
                reduce_gradients(optimizers, ranks)
                for optimizer in optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = group["peak_lr"] * lr_scale(step, config)
                    optimizer.step()
                model.zero_grad()
                log.add(step + 1, train_loss, optimizers[-1].param_groups[0]["lr"], [begin, optimizer_begin, time_mark(ranks.device)])  # fmt: skip
                if time.monotonic() - last_said_s > PROGRESS_EVERY_S:
                    last_said_s = time.monotonic()
                    average_s = clock.running_train_s() / (step + 1)
                    eta_s = (steps - step - 1) * average_s + len(due - set(history)) * clock.spent_s("val") / max(1, len(history))  # fmt: skip
                    ranks.say(f"step:{step + 1}/{steps} train_time:{clock.running_train_s():.3f}s step_avg:{1000 * average_s:.2f}ms eta:{eta_s:.0f}s")  # fmt: skip
    except HarnessError as error:
        if error.reason in (Exit.NON_FINITE, Exit.PREEMPTED):
            end("diverged" if error.reason == Exit.NON_FINITE else "interrupted", step)
        raise
    check_ranks_agree(ranks, weights=digest(model.state_dict()))
    end("done", steps)
    reached = [s for s, (loss, _) in sorted(history.items()) if loss <= target]
    result = f"reached {target} at step {reached[0]} after {history[reached[0]][1]:.3f}s" if reached else f"did not reach {target}"  # fmt: skip
    ranks.say(f"{config.optimizer} seed {args.seed}: val_loss {history[steps][0]:.5f}, {result}; record {record.path}")


def checked_hparams(config: Config) -> dict[str, Any]:
    """The optimizer's table, with keys and types checked against its signature."""
    if config.optimizer not in aurora.RULES:
        raise HarnessError(Exit.CONFIG, f"[optimizer.{config.optimizer}]: no such rule; known: {', '.join(aurora.RULES)}")
    types = aurora.hparam_types(config.optimizer)
    optional = [key for key in types if key not in aurora.REQUIRED_HPARAMS]
    return typed_table(config.hparams, types, f"optimizer.{config.optimizer}", optional)


def build_optimizers(config: Config, model: GPT) -> list[torch.optim.Optimizer]:
    try:
        return aurora.build(config.optimizer, model.roles(), config.hparams)
    except ValueError as error:
        raise HarnessError(Exit.CONFIG, f"optimizer.{config.optimizer}: {error}") from error


def check_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise HarnessError(Exit.DISK, f"--out {out} is not a folder that can be written: {error.strerror}") from error


BENCHMARK_SHARD_TOKENS = 100_000_000


def dry_run_report(config: Config, plan: BatchPlan, ranks: Ranks) -> str:
    """What a run would train, read and need; builds no weights and opens no data."""
    with torch.device("meta"):
        model = GPT(config.model)
    params, train = model.roles(), config.train
    optimizers = build_optimizers(config, model)
    lines = [f"{config.optimizer}: {sum(p.tensor.numel() for p in params):,} parameters", ""]
    lines.append(f"{'role':8}{'tensors':>8}{'weights':>14}  {'optimizer':12}{'lr':>10}{'weight_decay':>14}")
    counts = params_by_role(params)
    for group in describe_groups(optimizers):
        role = group["role"]
        tensors = sum(p.role == role for p in params)
        lines.append(f"{role:8}{tensors:>8}{counts[role]:>14,}  {group['optimizer']:12}{group['lr']:>10g}{group['weight_decay']:>14g}")  # fmt: skip
    lines.append(f"vectors include the head's bias of {model.head.bias.numel():,}")

    per_shard = steps_in_shard(BENCHMARK_SHARD_TOKENS, train.batch_tokens)
    lines += [
        "",
        f"tokens: {train.steps:,} steps x {train.batch_tokens:,} = {train.steps * train.batch_tokens:,} for training "
        f"({-(-train.steps // per_shard)} shards of {BENCHMARK_SHARD_TOKENS:,}), {config.eval.tokens:,} for validation",
        f"step: {ranks.world_size} ranks x {plan.micro_steps} micro-steps x {plan.micro_batch} sequences "
        f"x {config.model.seq_len} tokens",
    ]
    gib = memory_estimate_gib(config, plan, params, optimizers, ranks.world_size)
    parts = ", ".join(f"{name} {value:.2f}" for name, value in gib.items())
    lines.append(f"memory of a rank, GiB: {sum(gib.values()):.2f} ({parts}; activations are an estimate for eager mode)")
    return "\n".join(lines)


def memory_estimate_gib(config: Config, plan: BatchPlan, params: list[aurora.Param], optimizers: list, world_size: int) -> dict[str, float]:  # fmt: skip
    """Weights, gradients and optimizer state by count; activations as what autograd keeps of one micro-step."""
    counts, model = params_by_role(params), config.model
    num_params, is_sharded_rule = sum(counts.values()), isinstance(optimizers[-1], aurora.MatrixOptimizer)
    state = 2 * (num_params - counts["matrix"])  # AdamW keeps two floats a weight, a matrix rule one, on its owner
    state += counts["matrix"] / world_size if is_sharded_rule else 2 * counts["matrix"]
    width = 4 if model.activation_dtype == "float32" else 2
    per_token = model.num_layers * (12 + 2 * model.mlp_expansion) * model.model_dim * width
    per_token += model.vocab_size * (width + 5 * 4)  # logits, and float32 copies on the way to the loss and back
    activations = plan.micro_batch * model.seq_len * per_token
    sizes = {"weights": 4 * num_params, "gradients": 4 * num_params, "optimizer state": 4 * state, "activations": activations}
    return {name: size / 2**30 for name, size in sizes.items()}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parse_args(argv)
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        with joined_ranks() as ranks:
            train(args, ranks)
        return 0
    except HarnessError as error:
        reason, message = error.reason, str(error)
    except torch.OutOfMemoryError as error:
        reason, message = Exit.CONFIG, f"out of memory: {_first_line(error)}; lower train.micro_batch"
    except (dist.DistError, RuntimeError) as error:
        if not is_peer_failure(error):
            raise
        reason, message, is_main = Exit.PEER, f"rank {os.environ['RANK']} lost a peer: {_first_line(error)}", True
    if is_main or reason == Exit.RANKS_DISAGREE:
        print(f"{'stopped' if reason == Exit.PREEMPTED else 'error'}: {message}", file=sys.stderr, flush=True)
    return int(reason)


def is_peer_failure(error: Exception) -> bool:
    """Whether a collective failed because another rank is gone; gloo reports that as a plain RuntimeError."""
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "Connection"))


if __name__ == "__main__":
    sys.exit(main())
