"""What a run says while it trains."""

import math
import time
from collections.abc import Callable
from typing import Any

from aurora.config import Config
from aurora.trainer.clock import Clock
from aurora.trainer.ranks import Ranks


class Console:
    """The community's console lines, and progress with an ETA in between. Nothing of ours reads them back."""

    EVERY_S = 5.0
    ENOUGH_STEPS = 3  # in this process, to go by their speed

    def __init__(self, config: Config, ranks: Ranks, clock: Clock, say_cost: Callable[[float, float], str]):
        """say_cost: words on a run of so many seconds a step and in all."""
        self.steps, self.ranks, self.clock, self.say_cost = config.train.steps, ranks, clock, say_cost
        self.first_step: int | None = None  # of this process
        self.begin_s = 0.0  # of its training
        self.is_cost_said = False
        self.num_validations = 0
        self.last_s = time.monotonic()

    def show(self, step: int, val_loss: float, train_time_s: float) -> None:
        step_avg_ms = 1000 * train_time_s / step if step else math.nan
        self.ranks.say(
            f"step:{step}/{self.steps} val_loss:{val_loss:.5f} train_time:{train_time_s:.3f}s "
            f"step_avg:{step_avg_ms:.2f}ms"
        )
        self.num_validations += 1
        self.last_s = time.monotonic()

    def show_neurons(self, event: dict[str, Any]) -> None:
        keys = ("dead", "silent", "starved", "low_leverage")
        shares = " ".join(f"{key}:{100 * event[key]:.1f}%" for key in keys if key in event)
        self.ranks.say(f"step:{event['step']}/{self.steps} neurons {shares}")

    def tick(self, step: int, validations_left: int) -> None:
        """After each step; says something only when nothing was said for a while."""
        if self.first_step is None:  # which may include what a first step does once
            self.first_step, self.begin_s = step, self.clock.running_train_s()
        if time.monotonic() - self.last_s < self.EVERY_S:
            return
        self.last_s = time.monotonic()
        train_s = self.clock.running_train_s()
        validation_s = self.clock.spent_s("val") / max(1, self.num_validations)
        eta_s = (self.steps - step) * train_s / step + validations_left * validation_s
        step_avg_ms = 1000 * train_s / step
        self.ranks.say(
            f"step:{step}/{self.steps} train_time:{train_s:.3f}s step_avg:{step_avg_ms:.2f}ms eta:{eta_s:.0f}s"
        )
        num_steps = step - self.first_step
        if num_steps >= self.ENOUGH_STEPS and not self.is_cost_said:
            self.is_cost_said = True
            step_s = (train_s - self.begin_s) / num_steps
            total_s = train_s + (self.steps - step) * step_s
            total_s += (validations_left + self.num_validations) * validation_s
            self.ranks.say(f"expected: {self.say_cost(step_s, total_s)}")
