"""Train a GPT with the optimizer of your choice and time it to a target validation loss.

    python train_gpt.py --optimizer aurora                              laptop: configs/quick.toml, about a minute
    torchrun --standalone --nproc_per_node=8 train_gpt.py --config configs/gpt2_small.toml --optimizer muon
    python train_gpt.py --config configs/gpt2_small.toml --dry-run      what a run would train, read and need

One file, in the order in which the data flows: command line, config, data, model, schedule, gradients, validation,
warm-up, checkpoint, record, run. What surrounds it, ranks, clock, guard and watch, is in aurora/runtime/. Shape legend:
B batch, T time, D model, H heads, K head dim, V vocabulary. Losses are nats per token. Exit codes: 0 done,
2 usage or config, 3 data, 4 checkpoint, 5 non-finite number, 6 peer lost, 7 disk, 8 ranks disagree,
75 stopped on request with a checkpoint saved, 130 Ctrl-C twice.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import importlib.util
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
IMPORT_BEGIN_NS = time.perf_counter_ns()


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
    parser.add_argument(
        "--dump-momentum",
        nargs=3,
        metavar=("PATTERN", "FIRST", "LAST"),
        help="write the momentum of the matrices of that name at those steps to <run_id>.momentum/ beside the record",
    )
    parser.add_argument(
        "--timeout-s", type=float, default=60.0, help="seconds after which a rank that stands still ends the run"
    )
    parser.add_argument("--dry-run", action="store_true", help="print parameters, data and memory needed, then stop")
    args = parser.parse_args(argv)
    if not args.timeout_s > 0:
        parser.error(f"--timeout-s must be above 0, got {args.timeout_s:g}")
    return args


if __name__ == "__main__":
    parse_args()  # --help and usage errors answer before torch takes its seconds to import
    if importlib.util.find_spec("torch") is None:
        print(
            "error: this python has no torch; if scripts/quickstart.sh made .venv: source .venv/bin/activate",
            file=sys.stderr,
        )
        sys.exit(2)

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import aurora
from aurora.config import Config, ModelConfig, load_config
from aurora.errors import Exit, HarnessError
from aurora.fast import fused
from aurora.fast.attention import choose_attention
from aurora.fast.compiled import Model, agreed, check_compiled, compiled_where_possible
from aurora.fast.float8 import check_float8, float8_linear
from aurora.fast.functions import (
    Held,
    HeldWeights,
    ReluSquared,
    RotatedRMSNorm,
    SoftCapCrossEntropy,
    linear,
    rms_norm,
    soft_cap,
)
from aurora.tokens.loader import RunData, TokenLoader, open_run_data
from aurora.tokens.shards import ShardError
from aurora.trainer.batch import BatchPlan, plan_batch
from aurora.trainer.checkpoint import go_on_from, newest_checkpoint, save_run
from aurora.trainer.clock import Clock, time_mark
from aurora.trainer.console import Console
from aurora.trainer.describe import (
    check_same_start,
    dry_run_report,
    end_event,
    greeting,
    resume_event,
    run_event,
    summary,
)
from aurora.trainer.faults import point
from aurora.trainer.gradients import GradientSum
from aurora.trainer.guard import Guard, check_validation, check_weights
from aurora.trainer.launch import run_as_rank
from aurora.trainer.memory import fit_micro_batch
from aurora.trainer.momentum import Dump, checked_dump, record_momentum
from aurora.trainer.neurons import Neurons
from aurora.trainer.optimizers import build_optimizers, checked_hparams, fix_polar_dtype
from aurora.trainer.process import check_writable, lock_folder, stop_signals
from aurora.trainer.ranks import Ranks, digest
from aurora.trainer.record import Progress, RecordWriter, Validation
from aurora.trainer.step_log import StepLog
from aurora.trainer.tracking import Tracker

IMPORT_NS = time.perf_counter_ns() - IMPORT_BEGIN_NS

# ----------------------------------------------------------------------------------------------------------------------
# Data


def stage(window: np.ndarray, device: torch.device) -> Tensor:
    """(B*T + 1,) uint16 tokens as int64, in memory that the device can copy from while the host goes on."""
    tokens = torch.from_numpy(window.astype(np.int64))
    return tokens.pin_memory() if device.type == "cuda" else tokens


def to_device(staged: Tensor, seq_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Staged (B*T + 1,) tokens to inputs and targets (B, T), copied without waiting where the device can."""
    tokens = staged.to(device, non_blocking=device.type == "cuda")
    return tokens[:-1].view(-1, seq_len), tokens[1:].view(-1, seq_len)


# ----------------------------------------------------------------------------------------------------------------------
# Model


class RMSNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.gain)


def add_then_norm(x: Tensor, branch: Tensor, bias: Tensor | None, gain: Tensor) -> tuple[Tensor, Tensor]:
    """x + branch + bias, and its RMS norm with a gain (D,)."""
    if bias is not None:
        return fused.AddNorm.apply(x, branch, bias, gain)
    x = x + branch
    return x, rms_norm(x, gain)


class Linear(nn.Linear):
    """A linear layer with bias that computes in the dtype of its input."""

    held: tuple[Tensor, Tensor] | None = None  # see GPT.weights_at_rest()
    multiply = staticmethod(linear)

    def forward(self, x: Tensor) -> Tensor:
        return side_by_side(x, self)

    def for_sum(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The output for add_then_norm(), which can add the bias as well, and find its gradient on the way."""
        if not fused.takes(x):
            return self(x), None
        weight, bias = packed(x, self)
        return x @ weight.t(), bias


def packed(x: Tensor, first: Linear, *others: Linear) -> tuple[Tensor, Tensor]:
    """Weight and bias, in the dtype of their input x, of layers that share it, one below the other."""
    parts = zip(*((layer.weight, layer.bias) for layer in (first, *others)), strict=True)
    if first.held:
        weight, bias = (Held.apply(copy, *tensors) for copy, tensors in zip(first.held, parts, strict=True))
    else:
        weight, bias = ((torch.cat(tensors) if others else tensors[0]).type_as(x) for tensors in parts)
    return weight, bias


def side_by_side(x: Tensor, first: Linear, *others: Linear) -> Tensor:
    """The outputs of layers that share their input, one after the other along the last dimension: one matmul."""
    return first.multiply(x, *packed(x, first, *others))


class Rotary(nn.Module):
    """RMS norm, then rotary positions on half of each head: of pairs (i, i + K/2) those with i < K/4 turn."""

    def __init__(self, head_dim: int, seq_len: int, base: float):
        super().__init__()
        frequencies = F.pad((1 / base) ** torch.linspace(0, 1, head_dim // 4), (0, head_dim // 4))
        angles_T1F = torch.outer(torch.arange(seq_len, dtype=torch.float32), frequencies)[:, None, :]
        cos, sin = angles_T1F.cos(), angles_T1F.sin()
        self.register_buffer("cos_T1K", torch.cat([cos, cos], dim=-1), persistent=False)
        self.register_buffer("sin_T1K", torch.cat([sin, -sin], dim=-1), persistent=False)

    def tables(self, seq_len: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines (T, 1, K)."""
        return self.cos_T1K[:seq_len], self.sin_T1K[:seq_len]

    def forward(self, x_BTHK: Tensor) -> Tensor:
        return RotatedRMSNorm.apply(x_BTHK, *self.tables(x_BTHK.size(1)))


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.num_heads, self.scale = config.num_heads, config.attention_scale
        self.q = Linear(config.model_dim, config.model_dim)
        self.k = Linear(config.model_dim, config.model_dim)
        self.v = Linear(config.model_dim, config.model_dim)
        self.out = Linear(config.model_dim, config.model_dim)
        self.rotary = Rotary(config.model_dim // config.num_heads, config.seq_len, config.rope_base)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor | None]:
        """As Linear.for_sum()."""
        q, k, v = (x_BTHK.transpose(1, 2) for x_BTHK in self.heads(x_BTD))
        y_BHTK = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return self.out.for_sum(y_BHTK.transpose(1, 2).flatten(-2))

    def heads(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, T, H, K)."""
        layers = self.q, self.k, self.v
        if fused.takes(x_BTD):
            return fused.RotatedHeads.apply(x_BTD, *packed(x_BTD, *layers), *self.rotary.tables(x_BTD.size(1)))
        q_BTHK, k_BTHK, v_BTHK = side_by_side(x_BTD, *layers).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        return self.rotary(q_BTHK), self.rotary(k_BTHK), v_BTHK


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        width = config.mlp_expansion * config.model_dim
        self.gate = Linear(config.model_dim, width) if config.mlp == "swiglu" else None
        self.up = Linear(config.model_dim, width)
        self.down = Linear(width, config.model_dim)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor | None]:
        """As Linear.for_sum()."""
        if fused.takes(x_BTD) and self.gate is None:
            down_weight, down_bias = packed(x_BTD, self.down)
            return fused.SquaredReluMLP.apply(x_BTD, *packed(x_BTD, self.up), down_weight), down_bias
        return self.down.for_sum(self.activations(x_BTD))

    def activations(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) to (B, T, hidden width)."""
        if self.gate is None:
            return ReluSquared.apply(self.up(x_BTD))
        gate, up = side_by_side(x_BTD, self.gate, self.up).chunk(2, dim=-1)
        return F.silu(gate) * up


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(config.model_dim), Attention(config)
        self.mlp_norm, self.mlp = RMSNorm(config.model_dim), MLP(config)

    def forward(self, x_BTD: Tensor, normed_BTD: Tensor, next_gain_D: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream and its norm, here with this block's first gain, and afterwards with the next one's."""
        x_BTD, normed_BTD = add_then_norm(x_BTD, *self.attention(normed_BTD), self.mlp_norm.gain)
        return add_then_norm(x_BTD, *self.mlp(normed_BTD), next_gain_D)


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
        self.head.multiply = float8_linear if config.head_dtype == "float8" else F.linear
        self.held: HeldWeights | None = None

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

    def weights_at_rest(self) -> AbstractContextManager[None]:
        """While weights do not change, matmuls can use copies made once: in the activations' dtype, q, k, v as one."""
        if self.held is None:
            packs = [(module.q, module.k, module.v) for module in self.modules() if isinstance(module, Attention)]
            packs += [(block.mlp.gate, block.mlp.up) for block in self.blocks if block.mlp.gate]
            if self.activation_dtype != self.head.weight.dtype:
                in_packs = {layer for pack in packs for layer in pack}
                packs += [(m,) for m in self.modules() if isinstance(m, Linear) and m not in in_packs]
            self.held = HeldWeights(packs, self.activation_dtype)
        return self.held.at_rest()

    def embedded(self, inputs_BT: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T) tokens to the residual stream (B, T, D) and its norm before the first block."""
        x_BTD = self.embed_norm(self.embed(inputs_BT).to(self.activation_dtype))
        return x_BTD, self.blocks[0].attention_norm(x_BTD)

    def next_gains(self) -> list[Tensor]:
        """For each block the gain (D,) of the norm that follows it."""
        return [*(block.attention_norm.gain for block in self.blocks[1:]), self.head_norm.gain]

    def trunk(self, inputs_BT: Tensor) -> Tensor:
        """(B, T) tokens to what the head takes, (B, T, D)."""
        x_BTD, normed_BTD = self.embedded(inputs_BT)
        for block, gain_D in zip(self.blocks, self.next_gains(), strict=True):
            x_BTD, normed_BTD = block(x_BTD, normed_BTD, gain_D)
        return normed_BTD

    def loss(self, x_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """Cross-entropy of what trunk() returns, summed over the targets."""
        if fused.takes(x_BTD) and self.head.multiply is F.linear:
            return fused.HeadLoss.apply(x_BTD, *packed(x_BTD, self.head), targets_BT, self.softcap)
        z_NV = self.head(x_BTD).flatten(0, 1)
        return SoftCapCrossEntropy.apply(z_NV, targets_BT.flatten(), self.softcap)

    def activations(self, inputs_BT: Tensor) -> Iterator[Tensor]:
        """(B, T, hidden width) of each block's MLP, without a hook that compiled code would have to know of."""
        x_BTD, normed_BTD = self.embedded(inputs_BT)
        for block, gain_D in zip(self.blocks, self.next_gains(), strict=True):
            x_BTD, normed_BTD = add_then_norm(x_BTD, *block.attention(normed_BTD), block.mlp_norm.gain)
            hidden = block.mlp.activations(normed_BTD)
            yield hidden
            x_BTD, normed_BTD = add_then_norm(x_BTD, *block.mlp.down.for_sum(hidden), gain_D)

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Cross-entropy summed over the targets."""
        return self.loss(self.trunk(inputs_BT), targets_BT)

    def logits(self, inputs_BT: Tensor) -> Tensor:
        """(B, T) tokens to (B, T, V) float32 logits, soft-capped."""
        return soft_cap(self.head(self.trunk(inputs_BT)).float(), self.softcap)


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
    val_tokens: np.ndarray

    def __post_init__(self) -> None:
        self.guard, self.log = Guard(self.model, self.ranks), StepLog(self.config.train.log_every, self.ranks)
        params = reversed(list(self.model.parameters()))  # as gradients arrive; with several ranks, they get hooks
        wire_dtype = self.model.activation_dtype  # to which autograd has rounded the gradients of a pass anyway
        self.sum = GradientSum(params, self.optimizers, wire_dtype) if self.ranks.world_size > 1 else None

    def state_dict(self) -> dict[str, Any]:
        """The whole state, the same on every rank and for any number of them. Collective: sharded state is gathered."""
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


def new_training(config: Config, plan: BatchPlan, data: RunData, seed: int, ranks: Ranks) -> Training:
    """The state before the first step. Collective."""
    model = GPT(config.model)
    model.init_weights(seed)
    model.to(ranks.device)
    optimizers = build_optimizers(config, model.roles())
    fix_polar_dtype(optimizers, ranks)
    loader = TokenLoader(
        data.train_shards,
        config.train.batch_tokens,
        ranks.rank,
        ranks.world_size,
        prepare=lambda window: stage(window, ranks.device),  # by the loader's thread, while a step runs
        allow_epochs=config.data.allow_epochs,
    )
    return Training(config, plan, ranks, model, optimizers, loader, data.val_tokens)


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


def forward_backward(model: Model, batch: tuple[Tensor, Tensor], run: Training) -> Tensor:
    """Accumulate this rank's gradients of the mean loss over the global batch; returns its share of that loss.

    Their sum over ranks begins with the last pass and ends with run.sum.finish().
    """
    losses = []
    with run.model.weights_at_rest():
        for inputs, targets in zip(*(part.split(run.plan.micro_batch) for part in batch), strict=True):
            if run.sum and len(losses) == run.plan.micro_steps - 1:
                run.sum.overlap()
            loss = model(inputs, targets) / run.config.train.batch_tokens
            loss.backward()
            losses.append(loss.detach())
            point("backward", run.loader.step - 1, [losses[-1]])
    return torch.stack(losses).sum()


# ----------------------------------------------------------------------------------------------------------------------
# Validation and warm-up


@torch.no_grad()
def validate(model: Model, run: Training) -> float:
    """Mean loss over the fixed validation tokens, in sequences that do not overlap. Collective; changes nothing."""
    config, plan, ranks = run.config, run.plan, run.ranks
    own_tokens = plan.val_sequences * config.model.seq_len
    window = run.val_tokens[ranks.rank * own_tokens : (ranks.rank + 1) * own_tokens + 1]
    batch = to_device(stage(window, ranks.device), config.model.seq_len, ranks.device)
    losses = []
    with run.model.weights_at_rest():
        for micro in zip(*(part.split(plan.val_batch) for part in batch), strict=True):
            point("measure", run.loader.step)
            losses.append(model(*micro))
    total = torch.stack(losses).cpu().double().sum().to(ranks.device if ranks.world_size > 1 else "cpu")
    return ranks.all_reduce(total).item() / config.eval.tokens


WARMUP_STEPS = 2


def made_up_batch(sequences: int, run: Training) -> tuple[Tensor, Tensor]:
    """Inputs and targets of random tokens, always the same."""
    seq_len, generator = run.config.model.seq_len, torch.Generator().manual_seed(0)
    tokens = torch.randint(run.config.model.vocab_size, (sequences * seq_len + 1,), generator=generator)
    return to_device(stage(tokens.numpy(), run.ranks.device), seq_len, run.ranks.device)


def warm_up(model: Model, run: Training) -> None:
    """Run every shape once on made-up tokens (compilers, allocators, first collectives), then undo it all."""
    before, plan = copy.deepcopy(run.state_dict()), run.plan
    try:
        if model is not run.model:
            batch, *val_batches = (made_up_batch(size, run) for size in (plan.micro_batch, *plan.val_batches))
            agreed(run.ranks, lambda: check_compiled(model, run.model, batch, val_batches))
        for _ in range(WARMUP_STEPS):
            forward_backward(model, made_up_batch(plan.micro_steps * plan.micro_batch, run), run)
            if run.sum:
                run.sum.finish()
            for optimizer in run.optimizers:
                optimizer.step()
            run.model.zero_grad()
        point("warm_up", 0)  # compiling for validation may take as long again
        with torch.no_grad(), run.model.weights_at_rest():
            for sequences in plan.val_batches:
                model(*made_up_batch(sequences, run))
    finally:
        run.model.zero_grad()
        run.load_state_dict(before)
    if digest(run.state_dict()) != digest(before):
        raise RuntimeError("warm-up left a trace in weights, optimizer state, RNG or loader")


def try_passes(model: Model, plan: BatchPlan, run: Training) -> None:
    """Passes of every shape on made-up tokens, without a collective: a rank may fail here alone."""
    try:
        with run.model.weights_at_rest():
            for _ in range(min(2, plan.micro_steps)):  # the second meets the gradients of the first
                model(*made_up_batch(plan.micro_batch, run)).backward()
            with torch.no_grad():
                for sequences in plan.val_batches:
                    model(*made_up_batch(sequences, run))
    finally:
        run.model.zero_grad()


def prepare(model: Model, run: Training) -> str:
    """Find the micro-batch and warm up; says what it is."""
    if run.config.train.micro_batch == "auto":
        run.plan = fit_micro_batch(run, lambda plan: try_passes(model, plan, run))
    elif model is not run.model:
        agreed(run.ranks, lambda: try_passes(model, run.plan, run))
    warm_up(model, run)
    return f"micro-batch {run.plan.micro_batch}, {run.plan.micro_steps} a step"


# ----------------------------------------------------------------------------------------------------------------------
# Run


def train(args: argparse.Namespace, ranks: Ranks, begin_ns: int) -> None:
    """One run, from config to the record's end event. Raises HarnessError."""
    clock = Clock(ranks, begin_ns, IMPORT_NS)
    config, plan, dump = ranks.together(lambda: check_run(args, ranks))
    if args.dry_run:
        return
    ranks.together(lambda: check_writable(args.out))
    lock = ranks.together(lambda: lock_folder(args.out) if ranks.is_main else None)
    with lock or contextlib.nullcontext():
        train_in_folder(args, config, plan, dump, ranks, clock)


def check_run(args: argparse.Namespace, ranks: Ranks) -> tuple[Config, BatchPlan, Dump | None]:
    """What to run, checked before anything is read or written; a dry run's report. Raises HarnessError."""
    if not 0 <= args.seed < 2**63:
        raise HarnessError(Exit.CONFIG, f"--seed must be in [0, 2^63), got {args.seed}")
    config = load_config(args.config, args.optimizer, args.overrides)
    config, plan, params, optimizers = check_config(config, ranks.world_size)
    for override in args.overrides:
        if override.startswith("optimizer.") and not override.startswith(f"optimizer.{args.optimizer}."):
            ranks.say(f"--set {override} changes nothing for {args.optimizer}")
    if config.model.head_dtype == "float8":
        check_float8(ranks.device)
    dump = args.dump_momentum and checked_dump(optimizers[-1], *args.dump_momentum, config.train.steps)
    if args.dry_run:
        ranks.say(dry_run_report(config, params, optimizers, ranks.world_size, plan.micro_steps, plan.micro_batch))
    return config, plan, dump


def check_config(
    config: Config, world_size: int
) -> tuple[Config, BatchPlan, list[aurora.Param], list[torch.optim.Optimizer]]:
    """The config with all hyper-parameters, its batch, parameters and optimizers without memory. Or HarnessError."""
    config = dataclasses.replace(config, hparams=checked_hparams(config))
    check_schedule(config)
    plan = plan_batch(config, world_size)
    with torch.device("meta"):
        params = GPT(config.model).roles()
    return config, plan, params, build_optimizers(config, params)


def train_in_folder(
    args: argparse.Namespace, config: Config, plan: BatchPlan, dump: Dump | None, ranks: Ranks, clock: Clock
) -> None:
    """The run proper, in a folder that no other process uses."""
    data = ranks.together(lambda: open_data(config))
    torch.manual_seed(args.seed)  # nothing draws from it; if ever something does, all ranks and segments agree
    run = new_training(config, plan, data, args.seed, ranks)
    start = run_event(run, args.config, args.seed, data)
    check_same_start(start, run)
    checkpoint = ranks.together(lambda: newest_checkpoint(args.out, start, ranks.say)) if args.resume else None
    ranks.check_agree(checkpoint_step=checkpoint["step"] if checkpoint else None)
    start["run_id"] = ranks.all_gather_object((checkpoint or start)["run_id"])[0]
    record = RecordWriter(args.out / f"{start['run_id']}.jsonl", ranks)
    ranks.say(greeting(start))
    clock.charge("setup")

    if checkpoint and (config.train.micro_batch, ranks.world_size) == ("auto", checkpoint["world_size"]):
        run.plan = plan_batch(config, ranks.world_size, checkpoint["micro_batch"])  # which was found before
    point("warm_up", 0)
    start["attention"] = choose_attention(config.model, ranks.device)
    fused.choose_kernels(config, ranks.device)
    ranks.check_agree(attention=start["attention"], kernels=fused.kernels_of(ranks.device))
    model = compiled_where_possible(run.model, config.train.compile, ranks, lambda called: prepare(called, run))
    kernels = fused.kernels_of(ranks.device)
    start |= {"compiled": model is not run.model, "kernels": kernels, "micro_batch": run.plan.micro_batch}
    ranks.check_agree(**{key: start[key] for key in ("kernels", "compiled", "micro_batch")})
    progress = ranks.together(lambda: go_on_from(checkpoint, run, clock)) if checkpoint else Progress()
    if checkpoint:
        ranks.say(f"resume: from step {progress.step} of {start['run_id']}, segment {progress.segments}")
    elif args.resume:
        ranks.say(f"resume: no unfinished run with a checkpoint in {args.out}, starting at step 0")
    if dump:
        record_momentum(run.optimizers[-1], dump, progress.step, args.out / f"{start['run_id']}.momentum")
    if ranks.all_gather_object(record.is_new())[0]:
        record.write(start)
    if checkpoint:
        record.write(resume_event(start, progress))
    tracker = Tracker(args.wandb, start, ranks.is_main)
    if ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    clock.charge("warmup")

    try:
        save = functools.partial(save_run, args.out, start, run, progress, clock)
        train_steps(run, model, progress, clock, record, tracker, save)
        point("end", progress.step)
        record.write(end_event("done", run, progress, clock))
    except HarnessError as error:
        if error.reason == Exit.NON_FINITE:  # which all ranks notice at once; time and steps before it still count
            clock.charge("train")
            record.write(*run.log.flush())
        if error.reason in ENDINGS:
            record.write(end_event(ENDINGS[error.reason], run, progress, clock))
        raise
    finally:
        tracker.finish()
    ranks.say(f"{summary(config, args.seed, progress)}; record {record.path}")


ENDINGS = {Exit.NON_FINITE: "diverged", Exit.PREEMPTED: "interrupted"}  # of which the record tells; others are crashes


def train_steps(
    run: Training,
    model: Model,
    progress: Progress,
    clock: Clock,
    record: RecordWriter,
    tracker: Tracker,
    save: Callable[[], None],
) -> None:
    """The timed loop from progress.step to the end, with validation and checkpoints off the clock between steps."""
    config, ranks, guard = run.config, run.ranks, run.guard
    first_step, steps, every = progress.step, config.train.steps, config.train.checkpoint_every
    console = Console(config, ranks, clock)
    neurons = Neurons(config, validation_steps(config), run.model, run.optimizers[-1], ranks)
    shown = stage(run.val_tokens[: neurons.num_tokens + 1], ranks.device)
    shown, _ = to_device(shown, config.model.seq_len, ranks.device)
    due = validation_steps(config) - {look.step for look in progress.validations}

    def pause(step: int, is_checkpoint_step: bool) -> None:
        """Stop the clock; validate and save what is due. Collective."""
        guard.read()
        clock.charge("train")
        events = run.log.flush()
        record.write(*events)
        point("validation", step)
        check_weights(step, run.model, ranks)
        if step in due:
            look = Validation(step, validate(model, run), clock.slowest_train_s())
            check_validation(step, look.val_loss, config.model.vocab_size)
            progress.validations.append(look)
            console.show(*look)
            looked = [{"event": "val", "tokens": step * config.train.batch_tokens} | look._asdict()]
            if step in neurons.steps:
                looked.append(neurons.measure(step, shown))
                console.show_neurons(looked[-1])
            record.write(*looked)
            events += looked
            point("validated", step)
        tracker.log(*events)
        clock.charge("val")
        if is_checkpoint_step or guard.must_stop:
            save()
            clock.charge("checkpoint")

    with stop_signals(guard.request_stop):
        for step in range(first_step, steps + 1):
            progress.step = step
            is_checkpoint_step = every > 0 and step > first_step and (step % every == 0 or step == steps)
            if step in due or is_checkpoint_step or guard.must_stop:
                pause(step, is_checkpoint_step)
            if guard.must_stop:
                raise HarnessError(Exit.PREEMPTED, f"at step {step}; the same command with --resume goes on")
            if step == steps:
                return
            if step + 1 in neurons.steps:
                clock.charge("train")
                neurons.before_update()
                clock.charge("val")
            train_step(run, model, step)
            console.tick(step + 1, sum(later > step for later in due))


def train_step(run: Training, model: Model, step: int) -> None:
    """One update, from tokens to weights: all that the clock sees."""
    device = run.ranks.device
    begin = time_mark(device)
    point("forward", step)
    batch = to_device(run.loader.next_batch(), run.config.model.seq_len, device)
    loss = forward_backward(model, batch, run)
    point("check", step, [p.grad for p in run.model.parameters()])
    run.guard.look(loss)
    optimizer_begin = time_mark(device)
    point("gradient_sum", step)
    if run.sum:
        run.sum.finish()
    point("update", step, [p.grad for p in run.optimizers[-1].param_groups[0]["params"] if p.grad is not None])
    run.guard.check(step, getattr(run.optimizers[-1], "found_non_finite", None))
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_scale(step, run.config)
        optimizer.step()
    point("updated", step, list(run.model.parameters()))
    run.model.zero_grad()
    lr = run.optimizers[-1].param_groups[0]["lr"]
    run.log.add(step + 1, loss, lr, [begin, optimizer_begin, time_mark(device)])


def check_schedule(config: Config) -> None:
    """Raise HarnessError for a learning rate that never gets to its peak, or a run of which nothing is measured."""
    scales = [lr_scale(step, config) for step in range(config.train.steps)]
    if not all(0 <= scale <= 1 for scale in scales) or max(scales) < 1:
        raise HarnessError(
            Exit.CONFIG,
            f"the learning rate goes up to {max(scales):.3g} of its peak: optimizer.{config.optimizer}.warmup_steps = "
            f"{config.warmup_steps} and schedule.cooldown_frac = {config.schedule.cooldown_frac} leave no step for it "
            f"in train.steps = {config.train.steps}",
        )


def open_data(config: Config) -> RunData:
    data, train = config.data, config.train
    sizes = train.steps, train.batch_tokens, config.eval.tokens, config.model.vocab_size
    try:
        return open_run_data(data.train, data.val, *sizes, data.allow_epochs)
    except ShardError as error:
        raise HarnessError(Exit.DATA, str(error)) from error


# ----------------------------------------------------------------------------------------------------------------------
# Main


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    begin_ns = time.perf_counter_ns()
    args = parse_args(argv)
    return run_as_rank(lambda ranks: train(args, ranks, begin_ns), args.timeout_s)


if __name__ == "__main__":
    sys.exit(main())
