"""What the launcher says of this process, in environment variables. Needs no torch, which takes seconds to import."""

import errno
import os
import socket
import sys
from collections.abc import Mapping
from typing import NamedTuple

from aurora.errors import Exit, HarnessError
from aurora.trainer.process import print_line, report_exit

WITH_TORCHRUN = "start it with torchrun, which sets them all, or unset them for a run on one process"


def check_launch() -> None:
    """End this process with one line where its launch cannot work, as far as that can be told alone."""
    try:
        rank, world_size, _ = read_launch()
        if world_size > 1:
            _, port = store_address(rank)
            if keeps_store(rank):
                check_port(port)
    except HarnessError as error:
        print_line(f"error: {error}")
        sys.exit(report_exit(int(error.reason)))


class Launch(NamedTuple):
    """What the launcher says."""

    rank: int
    world_size: int
    local_rank: int | None


def read_launch(env: Mapping[str, str] = os.environ) -> Launch:
    """The launch as a whole. Raises HarnessError CONFIG for one that no launcher could mean."""
    present = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if env.get(name)]
    world_size = whole_number(env, "WORLD_SIZE", 1, 2**20) if "WORLD_SIZE" in present else 1
    if "RANK" not in present and world_size == 1:  # addresses alone say nothing
        check_one_task(env)
        return Launch(0, 1, whole_number(env, "LOCAL_RANK", 0, 2**20) if env.get("LOCAL_RANK") else None)
    if missing := [name for name in ("RANK", "WORLD_SIZE") if name not in present]:
        message = f"{', '.join(present)} {'are' if present[1:] else 'is'} set in the environment, but not {missing[0]}"
        raise HarnessError(Exit.CONFIG, f"{message}: {WITH_TORCHRUN}")
    rank = whole_number(env, "RANK", 0, world_size - 1, f"WORLD_SIZE - 1 = {world_size - 1}")
    local_rank = whole_number(env, "LOCAL_RANK", 0, 2**20) if env.get("LOCAL_RANK") else None
    return Launch(rank, world_size, local_rank)


def whole_number(env: Mapping[str, str], name: str, lowest: int, highest: int, limit: str = "") -> int:
    text = env[name].strip()
    if text.isascii() and text.isdigit() and len(text) < 20 and lowest <= int(text) <= highest:
        return int(text)
    message = f"{name} must be a whole number from {lowest} to {limit or highest}, got {env[name][:40]!r}"
    raise HarnessError(Exit.CONFIG, f"{message}: {WITH_TORCHRUN}")


def check_one_task(env: Mapping[str, str]) -> None:
    """Raise HarnessError where a launcher that sets no RANK has started several: each would train a run of its own."""
    # In a batch script Slurm sets some of these for the one process that it starts there.
    is_step = "SLURM_STEP_ID" in env or "SLURM_STEP_NUM_TASKS" in env or env.get("SLURM_PROCID", "0") != "0"
    counts = ["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"] if is_step else []
    name = next((name for name in (*counts, "OMPI_COMM_WORLD_SIZE", "PMI_SIZE") if env.get(name, "").isdigit()), None)
    if name and int(env[name]) > 1:
        message = f"{name} = {env[name]}, but no RANK: each of these tasks would train a run of its own"
        fix = "start one task a node, and in it torchrun --nproc_per_node=GPUS train_gpt.py"
        raise HarnessError(Exit.CONFIG, f"{message}; {fix}")


def store_address(rank: int) -> tuple[str, int]:
    """Where this rank finds the store. Raises HarnessError CONFIG."""
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        message = f"RANK and WORLD_SIZE are set in the environment, but not {' and '.join(missing)}"
        raise HarnessError(Exit.CONFIG, f"{message}: {WITH_TORCHRUN}")
    # Rank 0 has the store itself, where its name for the others may lead elsewhere.
    address = "localhost" if keeps_store(rank) else os.environ["MASTER_ADDR"]
    return address, whole_number(os.environ, "MASTER_PORT", 1, 65535)


def keeps_store(rank: int) -> bool:
    """Otherwise torchrun's agent does."""
    return rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def check_port(port: int) -> None:
    """Raise HarnessError CONFIG where rank 0 cannot have this port for the store."""
    try:
        with socket.socket() as probe:  # which does not listen: a rank that looks for the store must not find this
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            message = f"MASTER_PORT = {port} of this machine is in use by another process; choose a free one"
        else:
            message = f"MASTER_PORT = {port} of this machine cannot be used: {error.strerror}; choose another"
        raise HarnessError(Exit.CONFIG, message) from error
