"""Train a GPT with the optimizer of your choice and time it to a target validation loss.

    python train_gpt.py --optimizer aurora                              laptop: configs/quick.toml, some minutes
    torchrun --standalone --nproc_per_node=8 train_gpt.py --config configs/gpt2_small.toml --optimizer muon
    python train_gpt.py --config configs/gpt2_small.toml --dry-run      what a run would train, read and need
    python train_gpt.py --set 'optimizer.aurora.schedule={lr=[{until=0.5}, {until=1.0, to=0.0, shape="sqrt"}]}'

A schedule of lr, weight decay or momentum, as in the last line, belongs into the track; configs/README.md explains it.
Top to bottom: the model, the schedule, one step, validation, the loop, the run. Ranks, clock, record, checkpoints and
fast forward passes are imported from aurora/. Shapes: B batch, T time, D model, C MLP width, H heads, K head dim,
V vocabulary. Losses are nats per token. Exit codes: 0 done, 2 usage or config, 3 data, 4 checkpoint, 5 non-finite
number, 6 a rank lost, 7 disk, 8 ranks disagree, 75 stopped on request (what was done is saved), 130 Ctrl-C twice.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -I and PYTHONSAFEPATH leave it out

import aurora
from aurora.command_line import parse_args
from aurora.config import Config, ModelConfig
from aurora.console import steady_streams
from aurora.trainer.launcher import check_launch
from aurora.trainer.stops import stops

if __name__ == "__main__":
    stops.catch()
    steady_streams()
    parse_args(__doc__)  # --help, usage errors and a wrong launch answer before torch takes its seconds to import
    check_launch()

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aurora.fast.float8 import Float8Linear
from aurora.schedule import settings_at
from aurora.trainer import (
    Clock,
    Journal,
    Model,
    Ranks,
    Run,
    check_run,
    main_as_rank,
    open_run,
    prepare,
    resume,
    save_run,
)  # fmt: skip

# ----------------------------------------------------------------------------------------------------------------------
# Model. aurora/fast/ computes the same in fewer passes, and is used only while this section is the one it was made for.


class RMSNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.gain.shape, self.gain.type_as(x))


class Linear(nn.Linear):
    """Weights are float32; the matmul runs in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.type_as(x), None if self.bias is None else self.bias.type_as(x))


class Rotary(nn.Module):
    """Rotary positions on half of each head: pairs (i, i + K/2) with i < K/4 turn, the others stay."""

    def __init__(self, head_dim: int, seq_len: int, base: float):
        super().__init__()
        frequencies = F.pad((1 / base) ** torch.linspace(0, 1, head_dim // 4), (0, head_dim // 4))
        angles_T1F = torch.outer(torch.arange(seq_len, dtype=torch.float32), frequencies)[:, None, :]
        self.cos_T1F = nn.Buffer(angles_T1F.cos(), persistent=False)
        self.sin_T1F = nn.Buffer(angles_T1F.sin(), persistent=False)

    def forward(self, x_BTHK: Tensor) -> Tensor:
        cos, sin = self.cos_T1F[: x_BTHK.size(1)], self.sin_T1F[: x_BTHK.size(1)]
        x1, x2 = x_BTHK.to(cos.dtype).chunk(2, dim=-1)
        return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1).type_as(x_BTHK)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        D, self.head_dim, self.scale = config.model_dim, config.model_dim // config.num_heads, config.attention_scale
        self.q, self.k, self.v, self.out = (Linear(D, D, bias=config.bias) for _ in range(4))
        self.rotary = Rotary(self.head_dim, config.seq_len, config.rope_base)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q, k, v = (layer(x_BTD).unflatten(-1, (-1, self.head_dim)) for layer in (self.q, self.k, self.v))
        q, k = (self.rotary(F.rms_norm(x_BTHK, (self.head_dim,))) for x_BTHK in (q, k))
        q, k, v = (x_BTHK.transpose(1, 2) for x_BTHK in (q, k, v))
        y_BHTK = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return self.out(y_BHTK.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        D, C = config.model_dim, config.mlp_expansion * config.model_dim
        self.gate = Linear(D, C, bias=config.bias) if config.mlp == "swiglu" else None
        self.up, self.down = Linear(D, C, bias=config.bias), Linear(C, D, bias=config.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        up = self.up(x_BTD)
        return self.down(up.relu().square() if self.gate is None else F.silu(self.gate(x_BTD)) * up)


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
        head = Float8Linear if config.head_dtype == "float8" else Linear
        self.head = head(config.model_dim, config.vocab_size, bias=config.bias)

    def trunk(self, inputs_BT: Tensor) -> Tensor:
        """(B, T) tokens to what the head takes, (B, T, D)."""
        x_BTD = self.embed_norm(self.embed(inputs_BT).to(self.activation_dtype))
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.head_norm(x_BTD)

    def capped_logits(self, x_BTD: Tensor) -> Tensor:
        """What trunk() returns to (B, T, V) float32 logits, soft-capped."""
        z_BTV = self.head(x_BTD).float()
        return self.softcap * z_BTV * (z_BTV.square() + self.softcap**2).rsqrt()

    def loss(self, x_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """Cross-entropy of what trunk() returns, summed over the targets."""
        return F.cross_entropy(self.capped_logits(x_BTD).flatten(0, 1), targets_BT.flatten(), reduction="sum")

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Cross-entropy summed over the targets."""
        return self.loss(self.trunk(inputs_BT), targets_BT)

    def logits(self, inputs_BT: Tensor) -> Tensor:
        """(B, T) tokens to (B, T, V) float32 logits, soft-capped."""
        return self.capped_logits(self.trunk(inputs_BT))

    @torch.no_grad()
    def init_weights(self, seed: int, projection_init: float = 0.0) -> None:
        """Head 0, projections N(0, projection_init^2 / fan-in), embedding N(0, 1), others N(0, 0.33 / fan-in).

        Drawn on the CPU, alike everywhere.
        """
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.embed.weight, generator=generator)
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear):
                std = 0.0 if name == "head" else math.sqrt(0.33 / layer.in_features)
                if name.endswith(("attention.out", "mlp.down")):
                    std = projection_init / math.sqrt(layer.in_features)
                nn.init.normal_(layer.weight, std=std, generator=generator)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def roles(self) -> list[aurora.Param]:
        """Every parameter with its role; the head's bias is a vector, as in the public benchmark."""
        matrices = [layer.weight for layer in self.blocks.modules() if isinstance(layer, nn.Linear)]
        roles: dict[int, aurora.Role] = dict.fromkeys(map(id, matrices), "matrix")
        roles |= {id(self.embed.weight): "embed", id(self.head.weight): "head"}
        return [aurora.Param(name, p, roles.get(id(p), "vector")) for name, p in self.named_parameters()]


# ----------------------------------------------------------------------------------------------------------------------
# Schedule


def scheduled(step: int, group: dict[str, Any], config: Config) -> dict[str, float]:
    """The lr of a parameter group in this step (from 0), and its weight decay and momentum if the track schedules them.

    aurora/schedule.py has the formulas: of linear warm-up, flat, linear cooldown, and of a track's own pieces.
    """
    return settings_at(step, group, vars(config.schedule), config.train.steps, config.warmup_steps)


def validation_steps(config: Config) -> set[int]:
    """The steps (0 = before training) after which the validation loss is measured; fixed before the run starts."""
    steps, evaluation = config.train.steps, config.eval
    late_from = (1 - evaluation.late_frac) * steps
    every = [evaluation.every if step < late_from else evaluation.late_every for step in range(steps)]
    return {step for step in range(steps) if step % every[step] == 0} | {steps}


# ----------------------------------------------------------------------------------------------------------------------
# Training and validation. `model` is what prepare() returns: it gives run.model's loss and its gradients.


def forward_backward(run: Run, model: Model, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
    """Accumulate this rank's gradients of the mean loss over the global batch; returns its share of that loss."""
    losses: list[Tensor] = []
    for inputs, targets in run.plan.micro_batches(inputs_BT, targets_BT):
        if len(losses) == run.plan.micro_steps - 1:
            run.gradients.overlap()  # the sum over ranks begins while the last backward pass runs
        loss = model(inputs, targets) / run.config.train.batch_tokens
        loss.backward()
        losses.append(loss.detach())
        run.timeline.mark("micro_step")
    return torch.stack(losses).sum()


def train_step(run: Run, model: Model, step: int) -> Tensor:
    """One update, from tokens to weights: all that the clock sees. Returns this rank's share of the loss."""
    run.timeline.mark("fetch", step)
    inputs_BT, targets_BT = run.next_batch()
    run.timeline.mark("forward_backward", step)
    loss = forward_backward(run, model, inputs_BT, targets_BT)
    run.guard.observe(loss)
    run.timeline.mark("sum", step)
    run.gradients.finish()
    run.guard.check(step, run.rule)
    run.timeline.mark("update", step)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            run.give(group, scheduled(step, group, run.config))
        optimizer.step()
    run.model.zero_grad()
    run.timeline.mark("updated", step)
    return loss


@torch.no_grad()
def validate(run: Run, model: Model) -> float:
    """Mean loss over the fixed validation tokens, in sequences that do not overlap. Collective; changes nothing."""
    run.model.eval()
    with run.judged_weights():
        losses = [model(inputs, targets) for inputs, targets in run.validation_batches()]
    run.model.train()
    return run.ranks.sum(torch.stack(losses).cpu().double().sum()) / run.config.eval.tokens


def train_steps(run: Run, model: Model, journal: Journal) -> None:
    """The timed loop from run.progress.step to the end; validation and checkpoints are off the clock, between steps."""
    config, clock, guard, first_step = run.config, run.clock, run.guard, run.progress.step
    due = validation_steps(config) - {validation.step for validation in run.progress.validations}
    for step in range(first_step, config.train.steps + 1):
        run.progress.step = step
        is_checkpoint_step = step > first_step and config.train.saves_at(step)
        if step in due or is_checkpoint_step or guard.must_stop:
            guard.read()
            clock.charge("train")
            journal.write_steps()
            run.timeline.mark("validation", step)
            guard.check_weights(step)
            if step in due:
                journal.write_validation(step, validate(run, model))
            run.timeline.mark("validated", step)
            clock.charge("val")
            if is_checkpoint_step or guard.must_stop:
                save_run(run)
                clock.charge("checkpoint")
        if step < config.train.steps:
            guard.stop_if_asked(step)
            journal.before_step(step)
            loss = train_step(run, model, step)
            journal.after_step(step, loss)


# ----------------------------------------------------------------------------------------------------------------------
# Run


def train(args: argparse.Namespace, ranks: Ranks, clock: Clock) -> None:
    """One run, from config to the record's end event. Raises HarnessError."""
    checked = check_run(args, ranks, GPT, scheduled)
    if args.dry_run:
        return
    with open_run(args, checked, ranks, clock, GPT) as run:  # data, weights, folder lock, checkpoint
        model = prepare(run, forward_backward)  # fast and compiled where that works; warmed up, then undone
        due = validation_steps(run.config)
        resume(run, due)
        journal = Journal(run, args, checked.dump, due)
        with journal:
            train_steps(run, model, journal)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return main_as_rank(train, parse_args(__doc__, argv))


if __name__ == "__main__":
    sys.exit(main())
