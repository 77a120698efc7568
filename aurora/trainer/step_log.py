"""What the steps since the last validation or checkpoint did: kept on the device, so that no step waits for it."""

import math
import statistics
from typing import Any

import torch
from torch import Tensor

from aurora.trainer.clock import elapsed_ms, time_mark
from aurora.trainer.ranks import Ranks

TIMED_PLACES = ("fetch", "sum", "updated")  # begin of a step, begin of the optimizer's part of it, end of both


class StepLog:
    """Loss, settings and durations of the steps since the last flush, left on the device until then."""

    def __init__(self, every: int, ranks: Ranks):
        self.every, self.ranks = every, ranks
        self.steps: list[tuple[int, Tensor, dict[str, Any], list[Any]]] = []
        self.marks: list[Any] = []

    def at(self, name: str, step: int) -> None:
        """Subscribes to the timeline."""
        if name in TIMED_PLACES:
            self.marks.append(time_mark(self.ranks.device))

    def add(self, step: int, loss: Tensor, settings: dict[str, Any]) -> None:
        """After a step (counted from 1) of that loss, on this rank, with these settings, which its event shall hold."""
        self.steps.append((step, loss, settings, self.marks))
        self.marks = []

    def flush(self) -> list[dict[str, Any]]:
        """A train event for every log_every steps, averaged over them; none where a loss is not finite. Collective."""
        if not self.steps:
            return []
        losses = self.ranks.all_reduce(torch.stack([loss for _, loss, _, _ in self.steps])).tolist()
        events = []
        for first in range(0, len(self.steps), self.every):
            window = slice(first, first + self.every)
            marks = [marks for _, _, _, marks in self.steps[window]]
            last_step, _, settings, _ = self.steps[window][-1]
            if not all(map(math.isfinite, losses[window])):
                continue
            events.append({
                "event": "train",
                "step": last_step,
                "train_loss": statistics.mean(losses[window]),
                **settings,
                "step_ms": statistics.mean(elapsed_ms(begin, end) for begin, _, end in marks),
                "optimizer_ms": statistics.mean(elapsed_ms(begin, end) for _, begin, end in marks),
            })  # fmt: skip
        self.steps.clear()
        return events
