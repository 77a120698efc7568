"""Losses of short runs that later versions of the code must give again.

python -m tests.goldens     trains them all and rewrites tests/goldens.json: only where numbers change by intent
"""

import itertools
import json
import tempfile
from pathlib import Path

import torch

from tests.conftest import OPTIMIZERS, events, train_here, write_tiny_track

PATH = Path(__file__).with_suffix(".json")
CASES = [" ".join(case) for case in itertools.product(OPTIMIZERS, ("relu2", "swiglu"), ("float32", "bfloat16"))]


def train(case: str, track: Path, out: Path) -> dict[str, list[float]]:
    """Losses of twenty steps, before training at the validations, and of the training batches."""
    optimizer, mlp, dtype = case.split()
    overrides = ["train.steps=20", "train.log_every=1", f"model.mlp={mlp}", f"model.activation_dtype={dtype}"]
    words = [word for override in overrides for word in ("--set", override)]
    assert train_here(track, out, "--optimizer", optimizer, *words) == 0
    record = events(out)
    validations = [event["val_loss"] for event in record if event["event"] == "val"]
    return {"val": validations, "train": [event["train_loss"] for event in record if event["event"] == "train"]}


def renew() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        track = write_tiny_track(Path(folder))
        found = {case: train(case, track, Path(folder) / case.replace(" ", "-")) for case in CASES}
    rounded = {case: {kind: [round(x, 6) for x in losses] for kind, losses in by.items()} for case, by in found.items()}
    lines = [f"{json.dumps(case)}: {json.dumps(losses)}" for case, losses in rounded.items()]
    PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    renew()
