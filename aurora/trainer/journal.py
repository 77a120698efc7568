"""All that a run tells while it trains: its record, the console, wandb, the telemetry of neurons. Off the clock."""

import argparse
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self

import torch

from aurora.errors import Exit, HarnessError
from aurora.trainer.batch import stage, to_device
from aurora.trainer.checkpoint import save_weights
from aurora.trainer.console import Console
from aurora.trainer.cost import in_words, speed_of, speed_words
from aurora.trainer.describe import end_event, resume_event, speed_summary, summary
from aurora.trainer.guard import check_validation
from aurora.trainer.momentum import Dump, record_momentum
from aurora.trainer.neurons import Neurons
from aurora.trainer.record import Validation
from aurora.trainer.scheduled import scheduled_values
from aurora.trainer.state import Run
from aurora.trainer.step_log import StepLog
from aurora.trainer.stops import stops
from aurora.trainer.tracking import Tracker
from aurora.trainer.writer import RecordWriter

ENDINGS = {Exit.NON_FINITE: "diverged", Exit.PREEMPTED: "interrupted"}  # of which the record tells; others are crashes


class Journal:
    """Begins the record, or goes on with it, where its context begins; ends it where that ends, with the weights."""

    def __init__(self, run: Run, args: argparse.Namespace, dump: Dump | None, validation_steps: Iterable[int]):
        """dump: what --dump-momentum asks for. validation_steps: of the whole run."""
        self.run, self.args, self.dump = run, args, dump
        self.validation_steps = sorted(validation_steps)
        self.record = RecordWriter(run.out / f"{run.start['run_id']}.jsonl", run.ranks)
        self.step_log = StepLog(run.config.train.log_every, run.ranks)
        self.console = Console(run.config, run.ranks, run.clock, self.cost)
        self.neurons = Neurons(run.config, self.validation_steps, run.model, run.rule, run.ranks)

    def __enter__(self) -> Self:
        run = self.run
        stops.must_save = True
        if self.dump:
            record_momentum(run.rule, self.dump, run.progress.step, run.out / f"{run.start['run_id']}.momentum")
        if run.ranks.all_gather_object(self.record.is_new())[0]:
            self.record.write(run.start)
        if run.progress.segments > 1:
            self.record.write(resume_event(run))
        self.tracker = Tracker(self.args.wandb, run.start, run.ranks.is_main)
        window = stage(run.val_tokens[: self.neurons.num_tokens + 1], run.ranks.device)
        self.shown_tokens = to_device(window, run.config.model.seq_len, run.ranks.device)
        if run.ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.unsubscribe = run.timeline.subscribe(self.step_log.at)
        run.clock.charge("warmup")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        run = self.run
        self.unsubscribe()
        unsaved = None
        try:
            if error is None:
                unsaved = save_weights(run)
                run.clock.charge("checkpoint")
                run.timeline.mark("end", run.progress.step)
                self.end = end_event("done", run)
                self._write(self.end)
            elif isinstance(error, HarnessError) and error.reason in ENDINGS:
                if error.reason == Exit.NON_FINITE:  # all ranks notice at once; time and steps before it still count
                    run.clock.charge("train")
                    self.record.write(*self.step_log.flush())
                self.record.write(end_event(ENDINGS[error.reason], run))
        finally:
            self.tracker.finish()
        if error is None:
            run.ranks.say(f"{summary(run)}; record {self.record.path}")
            run.ranks.say(speed_summary(self.end, run, self.args.price_per_gpu_hour))
        if unsaved:
            raise unsaved

    def cost(self, step_s: float, total_s: float) -> str:
        """What steps of so many seconds, and a run of so many, are in tokens/s, MFU and money."""
        speed = speed_of(1, step_s, 1, self.run.start)
        words = speed_words(speed, total_s, self.run.start, self.args.price_per_gpu_hour)
        return f"{in_words(total_s)} of training and validation, {words}"

    def write_steps(self) -> None:
        """The train events of the steps since the last call. Collective."""
        self._write(*self.step_log.flush())

    def write_validation(self, step: int, val_loss: float) -> None:
        """A validation, and what the neurons did if they are looked at after this step. Collective.

        Raises:
            HarnessError: NON_FINITE or CONFIG, the loss cannot be.
        """
        run = self.run
        validation = Validation(step, val_loss, run.clock.slowest_train_s())
        check_validation(step, val_loss, run.config.model.vocab_size, is_edited=bool(run.start["model_edits"]))
        run.progress.validations.append(validation)
        self.console.show(*validation)
        events: list[dict[str, Any]] = [{"event": "val", "tokens": step * run.config.train.batch_tokens}]
        events[0] |= validation._asdict()
        if step in self.neurons.steps:
            events.append(self.neurons.measure(step, *self.shown_tokens))
            self.console.show_neurons(events[-1])
        self._write(*events)

    def _write(self, *events: dict[str, Any]) -> None:
        self.record.write(*events)
        self.tracker.log(*events)

    def before_step(self, step: int) -> None:
        """Keep what the telemetry needs of the weights before an update that it looks at."""
        if step + 1 in self.neurons.steps:
            self.run.clock.charge("train")
            self.neurons.before_update()
            self.run.clock.charge("val")

    def after_step(self, step: int, loss: torch.Tensor) -> None:
        """Note the step (from 0) and its loss on this rank. Waits for nothing."""
        settings: dict[str, Any] = {"lr": float(self.run.rule.param_groups[0]["lr"])}
        if values := scheduled_values(self.run.optimizers, self.run.config):
            settings["scheduled"] = values
        self.step_log.add(step + 1, loss, settings)
        self.console.tick(step + 1, sum(later > step for later in self.validation_steps))
