"""Thousands of records, made from one that is committed: to see that what reads them takes no longer than it must."""

import json
from pathlib import Path

import numpy as np

from aurora.trainer.record import record_paths
from scripts.analysis.store import unpack
from tests.conftest import ROOT


def write_records(folder: Path, count: int, num_groups: int, whole: bool = False) -> list[Path]:
    """Finished runs of as many settings with other seeds and losses; whole: with their sources, as runs write them."""
    (template, *_) = (path for path in record_paths(ROOT / "results" / "quick") if "-muon-" in path.name)
    content = unpack(template) if whole else template.read_bytes()
    start, *events = map(json.loads, content.splitlines())
    generator, paths = np.random.default_rng(count), []
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        group, seed = number % num_groups, number // num_groups
        stamp = f"2026-11-28T{number // 3600:02}:{number // 60 % 60:02}:{number % 60:02}+00:00"
        run_id = f"quick-muon-s{seed}-{stamp[:19].replace('-', '').replace(':', '')}-{number:04x}"
        hparams = start["hparams"] | {"lr": 0.01 + group / 1e6}
        config = start["config"] | {"hparams": start["config"]["hparams"] | {"lr": hparams["lr"]}}
        own = start | {"run_id": run_id, "utc": stamp, "seed": seed, "hparams": hparams, "config": config}
        shift = 0.001 * group / num_groups + 0.001 * generator.normal()
        lines = [own]
        for event in events:
            if "val_loss" in event:
                event = event | {"val_loss": float(np.float32(event["val_loss"] + shift))}
            lines.append(event)
        paths.append(folder / f"{run_id}.jsonl")
        paths[-1].write_text("".join(json.dumps(line) + "\n" for line in lines))
    return paths
