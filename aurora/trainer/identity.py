"""What tells one run from another: its code, its task, and the machine. Needs nothing but Python."""

import contextlib
import functools
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Container
from pathlib import Path
from typing import Any

from aurora.config import ROOT
from aurora.trainer.public import is_public, plain_line

# The folder of a record's sources for files that are not of the project: an optimizer's of another package.
EXTERNAL = "external"
# A run executes nothing below these; what is imported from there belongs to a test or a benchmark around it.
NOT_OF_A_RUN = ("data", "scripts", "tests")


def read_sources(config_path: Path, track: str, other_modules: Container[str] = ()) -> dict[str, str]:
    """The text of every module of the project that this process has imported, and the track's, as it was parsed.

    other_modules: names of those that this process has imported for something else than the run.
    """
    sources = {}
    for module_name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        # Most modules are of installed packages; torch.ops calls itself _ops.py.
        if module_name in other_modules or "site-packages" in file or not os.path.isabs(file):
            continue
        path = Path(os.path.realpath(file))
        if path.suffix == ".py" and path.is_relative_to(ROOT) and "site-packages" not in path.parts:
            name = path.relative_to(ROOT)
            if name.parts[0] not in NOT_OF_A_RUN:
                sources[name.as_posix()] = path.read_text(encoding="utf-8")
    is_ours = config_path.resolve().is_relative_to(ROOT)
    config_name = config_path.resolve().relative_to(ROOT).as_posix() if is_ours else config_path.name
    if not config_name.endswith(".toml"):  # by which readers know it; a pipe's name is a number
        config_name += ".toml"
    return dict(sorted(sources.items())) | {config_name: track}


def code_hash(sources: dict[str, str]) -> str:
    """One sha256 over the Python files among the sources."""
    return _code_hash(tuple((name, text) for name, text in sources.items() if name.endswith(".py")))


@functools.lru_cache(maxsize=100)  # thousands of records have the same sources
def _code_hash(sources: tuple[tuple[str, str], ...]) -> str:
    return json_hash(dict(sources))


def json_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def task_hash(config: dict[str, Any], stream_id: str) -> str:
    """Equal for two runs that may be compared: same model, batch, evaluation, target and data.

    config: the resolved config, as a record has it. stream_id: of the data.
    """
    evaluation = {key: value for key, value in config["eval"].items() if key != "telemetry"}
    task = {"model": model_of(config), "batch_tokens": config["train"]["batch_tokens"], "eval": evaluation}
    return json_hash(task | {"data": stream_id})


LATER_SETTINGS = {"bias": True, "mlp": "relu2", "head_dtype": "activation"}  # the values of records that have none


def model_of(config: dict[str, Any]) -> dict[str, Any]:
    """The model's settings, as the first records have them."""
    return {key: value for key, value in config["model"].items() if LATER_SETTINGS.get(key) != value}


def describe_git() -> dict[str, Any] | None:
    command = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT)]

    def git(*args: str) -> str:
        return subprocess.run([*command, *args], capture_output=True, text=True, check=True).stdout.strip()

    # git refuses a checkout of another user, lest its settings run programs; this process runs its code anyway.
    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def describe_machine() -> dict[str, Any]:
    """Python, processor, and the environment variables that can change speed or results."""
    first_cpu: dict[str, str] = {}
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
        first_cpu = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    first_cpu = {key: plain_line(value) for key, value in first_cpu.items()}
    prefixes = ("SPEEDRUN_", "OMP_", "MKL_", "TORCH", "PYTORCH", "NCCL_", "CUBLAS", "CUDA_")
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": first_cpu.get("model name", platform.processor()),
        # Processors of one name can round differently.
        "cpu_model": " ".join(first_cpu.get(key, "?") for key in ("vendor_id", "cpu family", "model", "stepping")),
        "cpu_count": os.cpu_count(),
        "usable_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "variables": {
            key: value
            for key, value in sorted(os.environ.items())
            if key.startswith(prefixes) and is_public(key, value)
        },
    }


def shards_of(start: dict[str, Any]) -> list[str]:
    """sha256 of each train shard that a run read, in order. Shards of one task agree in each place that both have."""
    data = start.get("data")
    shards = data.get("shards") if isinstance(data, dict) else None
    return [str(shard.get("sha256")) for shard in shards or () if isinstance(shard, dict)]
