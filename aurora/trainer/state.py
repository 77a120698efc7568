"""The state of a run: all that its steps read and write."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

import aurora
from aurora.config import Config
from aurora.optim.base import MatrixOptimizer
from aurora.optim.external import give, has_eval_weights
from aurora.optim.fsdp import split_as
from aurora.tokens.loader import TokenLoader
from aurora.trainer.batch import BatchPlan, stage, to_device
from aurora.trainer.clock import Clock
from aurora.trainer.gradients import GradientSum
from aurora.trainer.guard import Guard
from aurora.trainer.ranks import Ranks
from aurora.trainer.record import Progress
from aurora.trainer.timeline import Timeline, timeline

if TYPE_CHECKING:
    from train_gpt import GPT


@dataclass
class Run:
    """One run on this rank."""

    config: Config
    plan: BatchPlan
    ranks: Ranks
    clock: Clock
    model: "GPT"
    optimizers: list[torch.optim.Optimizer]  # the rule, its first group with the matrices; AdamW where it is apart
    loader: TokenLoader
    val_tokens: np.ndarray
    out: Path  # the folder of its record and checkpoints
    start: dict[str, Any] = field(default_factory=dict)  # the record's run event
    checkpoint: dict[str, Any] | None = None  # from which it goes on
    progress: Progress = field(default_factory=Progress)
    timeline: Timeline = timeline
    model_edits: list[str] | None = None  # of a model that has been split, which tells of none any more
    no_resume: str = ""  # why the run cannot go on from a checkpoint, as its optimizer keeps more than it saves

    def __post_init__(self) -> None:
        self.guard = Guard(self.model, self.ranks, self.is_split)
        params = reversed(list(self.model.parameters()))  # as gradients arrive; with several ranks, they get hooks
        wire_dtype = getattr(torch, self.config.model.activation_dtype)  # to which a backward pass has rounded anyway
        num_summed = 1 if self.is_split else self.ranks.world_size  # fully_shard has its own sums
        self.gradients = GradientSum(params, self.optimizers, wire_dtype, num_summed)
        self.renew(self.optimizers)

    def renew(self, optimizers: list[torch.optim.Optimizer]) -> None:
        """Take new optimizers, ready to train."""
        self.optimizers = optimizers
        for optimizer in self.with_eval_weights:
            optimizer.train()

    @property
    def is_external(self) -> bool:
        """Whether the rule is not one that this project tests for all that a run relies on."""
        return not aurora.is_ours(self.rule)

    @property
    def is_split(self) -> bool:
        """Whether each rank holds rows of everything alone."""
        return self.config.train.shard == "fsdp2" and self.ranks.world_size > 1

    @property
    def may_compile(self) -> bool:
        mode = self.config.train.compile
        is_eager = self.is_split or self.config.train.recompute
        return not is_eager and (mode == "on" or (mode == "auto" and self.ranks.device.type == "cuda"))

    @property
    def rule(self) -> torch.optim.Optimizer:
        """The optimizer of the matrices, which --optimizer names."""
        return self.optimizers[0]

    @property
    def with_eval_weights(self) -> list[Any]:
        """The optimizers that train other weights than those by which the model is judged."""
        return [optimizer for optimizer in self.optimizers if has_eval_weights(optimizer)]

    @contextlib.contextmanager
    def judged_weights(self) -> Iterator[None]:
        """The model with the weights by which it is judged; afterwards with those that it trains, to the bit."""
        kept = [p.detach().clone() for p in self.model.parameters()] if self.with_eval_weights else []
        for optimizer in self.with_eval_weights:
            optimizer.eval()
        try:
            yield
        finally:
            for optimizer in self.with_eval_weights:
                optimizer.train()
            with torch.no_grad():
                for p, weights in zip(self.model.parameters(), kept, strict=False):
                    p.copy_(weights)

    def give(self, group: dict[str, Any], settings: dict[str, float]) -> None:
        """Give a parameter group these settings."""
        give(group, settings)

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets (B, T) of this rank's part of the next global batch."""
        return to_device(self.loader.next_batch(), self.config.model.seq_len, self.ranks.device)

    def validation_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets (B, T) of this rank's validation sequences, which do not overlap."""
        own_tokens = self.plan.val_sequences * self.config.model.seq_len
        window = self.val_tokens[self.ranks.rank * own_tokens : (self.ranks.rank + 1) * own_tokens + 1]
        batch = to_device(stage(window, self.ranks.device), self.config.model.seq_len, self.ranks.device)
        for inputs, targets in zip(*(side.split(self.plan.val_batch) for side in batch), strict=True):
            self.timeline.mark("validate_batch")
            yield inputs, targets

    def weights(self) -> dict[str, Tensor]:
        """The whole weights. Collective where they are split."""
        return self._whole(self.model.state_dict())

    def _whole(self, value: Any) -> Any:
        if not self.is_split:
            return value
        from aurora.trainer.fsdp import whole  # and with it torch's fully_shard, which takes a second

        return whole(value)

    def state_dict(self, is_whole: bool = True) -> dict[str, Any]:
        """The whole state, the same on every rank and for any number of them. Collective: sharded state is gathered.

        is_whole: False leaves what is split by rows as it is, to be loaded again by the same ranks.
        """
        for optimizer in self.optimizers:
            if isinstance(optimizer, MatrixOptimizer):
                optimizer.consolidate_state_dict()
        gathered = self._whole if is_whole else lambda value: value
        return {
            "model": gathered(self.model.state_dict()),
            "optimizers": gathered([optimizer.state_dict() for optimizer in self.optimizers]),
            "loader": self.loader.state_dict(),
            "rng": torch.get_rng_state(),
        }

    @staticmethod
    def _split(optimizer: torch.optim.Optimizer, states: dict[int, Any]) -> dict[int, Any]:
        """Saved states by the number of their parameter, split as that is."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        return {i: split_as(f"parameter {i}", params[i], state) for i, state in states.items()}

    def load_state_dict(
        self, state: dict[str, Any], new_optimizers: Callable[[], list[torch.optim.Optimizer]] | None = None
    ) -> None:
        """Inverse of state_dict(). The state is copied, not kept.

        new_optimizers: makes those that take the place of the old ones with what these were saved with; once the
            weights are there, which they may read.
        """
        if self.is_split:
            from aurora.trainer.fsdp import load_weights

            load_weights(self.model, state["model"])
        else:
            self.model.load_state_dict(state["model"])
        if new_optimizers:
            self.renew(new_optimizers())
        else:
            for optimizer, optimizer_state in zip(self.optimizers, copy.deepcopy(state["optimizers"]), strict=True):
                if self.is_split:
                    optimizer_state["state"] = self._split(optimizer, optimizer_state["state"])
                optimizer.load_state_dict(optimizer_state)
        self.loader.load_state_dict(state["loader"])
        torch.set_rng_state(state["rng"])
