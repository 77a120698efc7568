"""Memory of a training step by micro-batch, measured on CUDA, beside the estimate of --dry-run."""

import argparse
import gc
import tempfile
from pathlib import Path
from typing import Any

import torch

import train_gpt
from aurora.config import load_config
from aurora.errors import is_out_of_memory
from aurora.trainer.memory import memory_estimate_gib
from aurora.trainer.optimizers import build_optimizers
from aurora.trainer.ranks import join_ranks
from scripts.benchmarks.train import describe_device, new_contender, synthetic_data, write


def memory(args: argparse.Namespace) -> str:
    """Peak of two steps for each micro-batch, until one does not fit; writes OUT.json and OUT.md."""
    ranks = join_ranks(timeout_s=60)
    rows, name = [], args.optimizers[0]
    with tempfile.TemporaryDirectory() as folder:
        overrides = synthetic_data(args.config, args.overrides, Path(folder), ranks.world_size)
        for size in args.sizes:
            config = load_config(args.config, name, [*overrides, f"train.micro_batch={size}"])
            with torch.device("meta"):
                model = train_gpt.GPT(config.model)
            optimizers = build_optimizers(config, model.roles())
            gib = memory_estimate_gib(config, model.roles(), optimizers, ranks.world_size, size)
            row = {"micro_batch": size, "estimate_gib": sum(gib.values())}
            try:
                row["peak_gib"] = new_contender(config, ranks).peak_mib / 1024
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                row["peak_gib"] = None
            rows.append(row)
            text = written(args, rows, ranks.device)  # after each: the next may take longer than there is time
            torch._dynamo.reset()
            gc.collect()
            if ranks.device.type == "cuda":
                torch.cuda.empty_cache()
            if row["peak_gib"] is None:
                break
    return text


def written(args: argparse.Namespace, rows: list[dict[str, Any]], device: torch.device) -> str:
    """The table of the sizes so far, which OUT.md then holds."""
    found, name = describe_device(device, torch.float32), args.optimizers[0]
    kind = "allocated" if device.type == "cuda" else "resident since the process began"
    lines = [f"{args.config.name}, {name}, on {found['name']}; GiB {kind}, at most", ""]
    lines += ["| micro-batch | measured GiB | estimate of --dry-run (eager) |", "|---|---|---|"]
    for row in rows:
        measured = "does not fit" if row["peak_gib"] is None else f"{row['peak_gib']:.2f}"
        lines.append(f"| {row['micro_batch']} | {measured} | {row['estimate_gib']:.2f} |")
    text = "\n".join(lines) + "\n"
    write(args.out, {"config": args.config.name, "optimizer": name, "device": found, "rows": rows}, text)
    return text
