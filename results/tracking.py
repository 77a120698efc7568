"""Mirroring a run's metrics to Weights & Biases."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any


class Tracker:
    """Mirrors metrics to wandb on rank 0. A wandb that is missing, broken or unreachable costs one warning."""

    def __init__(self, mode: str, event: dict[str, Any], is_writer: bool):
        self.run = None
        if mode != "off" and is_writer:
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
            print(f"warning: wandb is off from here: {error}", file=sys.stderr)
