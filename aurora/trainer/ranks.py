"""The processes of a run and their device: how they join, talk, agree and leave."""

import contextlib
import ctypes
import datetime
import functools
import hashlib
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from aurora.errors import Exit, HarnessError
from aurora.optim.fsdp import local
from aurora.trainer.launcher import read_launch
from aurora.trainer.process import print_line
from aurora.trainer.rendezvous import connect_group, limit_from, meet

# Of a single collective where the watch does not apply: long enough for the slowest rank to compile.
SETUP_TIMEOUT_S = 600
NCCL_START_S = 60


Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """This process among the processes of the run, and its device."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def say(self, line: str) -> None:
        if self.is_main:
            print_line(line, "stdout")

    def all_reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        if self.world_size > 1:
            dist.all_reduce(tensor, op=op)
        return tensor

    def sum(self, value: Tensor) -> float:
        """The sum of a 0-dim tensor over ranks. Collective."""
        return self.all_reduce(value.to(self.device if self.world_size > 1 else "cpu")).item()

    def all_gather_object(self, value: Any) -> list[Any]:
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def all_or_none(self, task: Callable[[], Result]) -> Result:
        """The result of a task that may fail on any rank; where one fails, all raise its error. Collective."""
        result: Any = None
        failure = None
        try:
            result = task()
        except HarnessError as error:
            failure = error.reason, str(error)
        failures = {rank: failure for rank, failure in enumerate(self.all_gather_object(failure)) if failure}
        if failures:
            rank, (reason, message) = next(iter(failures.items()))
            raise HarnessError(reason, message if rank == 0 else f"on rank {rank}: {message}")
        return result

    def check_agree(self, **fields: Any) -> None:
        """Raise HarnessError naming the first rank and field (or key of a table) unlike rank 0's. Collective."""
        everyone = self.all_gather_object(fields)
        for rank, theirs in enumerate(everyone):
            difference = first_difference(everyone[0], theirs)
            if difference:
                key, ours, other = difference
                raise HarnessError(Exit.RANKS_DISAGREE, f"rank {rank} has {key} = {other!r}, rank 0 has {ours!r}")

    def align(self) -> None:
        """Wait until every rank's device has done all its work: both the sync and the barrier are needed."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        elif self.device.type == "mps":
            torch.mps.synchronize()
        if self.world_size > 1:
            dist.barrier()


def first_difference(ours: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> tuple[str, Any, Any] | None:
    for key in ours:
        if ours[key] != theirs[key]:
            if isinstance(ours[key], dict) and ours[key].keys() == theirs[key].keys():
                return first_difference(ours[key], theirs[key], f"{prefix}{key}.")
            return prefix + key, ours[key], theirs[key]
    return None


# What launchers set for each rank, and what names a device, interface, address or file of one node.
OF_ONE_NODE = re.compile(
    "^TORCHELASTIC_|VISIBLE_DEVICES|IFNAME|HCA|ADAPTER|GID|HOST|ADDR|PORT|FILE|DIR|PATH|HOME|CACHE|TOPO|PLACES|AFFINITY"
)


def shared_variables(env: dict[str, Any]) -> dict[str, str]:
    """The environment variables that all ranks should have alike; launchers set some for each."""
    return {key: value for key, value in env["variables"].items() if not OF_ONE_NODE.search(key)}


def join_ranks(timeout_s: float, begin_s: float | None = None) -> Ranks:
    """Join the process group that torchrun announces in the environment, if any, and choose the device.

    The first there is of cuda, mps (alone) and cpu, or the one that the environment variable SPEEDRUN_DEVICE names.

    Raises:
        HarnessError: CONFIG, PEER, naming what of the launch is wrong, or who has not come timeout_s after
            begin_s (of time.monotonic(); now).
    """
    limit = limit_from(time.monotonic() if begin_s is None else begin_s, timeout_s)
    launch = read_launch()
    rank, world_size, local_rank = launch
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available() and world_size == 1, "cpu": True}
    present = [name for name, is_there in has.items() if is_there]
    kind = os.environ.get("SPEEDRUN_DEVICE") or present[0]
    if kind not in present:
        raise HarnessError(Exit.CONFIG, f"SPEEDRUN_DEVICE is {kind!r}, but this run can use {' or '.join(present)}")
    if kind == "cuda":
        if local_rank is None and world_size > 1:
            raise HarnessError(
                Exit.CONFIG, f"LOCAL_RANK is not set, so rank {rank} has no GPU of its own: use torchrun"
            )
        device = torch.device("cuda", local_rank or 0)
        if device.index >= torch.cuda.device_count():
            available = torch.cuda.device_count()
            message = f"rank {rank} wants GPU {device.index}, but this node has {available}: start at most {available}"
            raise HarnessError(Exit.CONFIG, message)
        torch.cuda.set_device(device)
    else:
        device = torch.device(kind)
    if kind == "cpu":
        keep_freed_memory()
    if world_size > 1:
        is_cuda = device.type == "cuda"
        backend = "nccl" if is_cuda else "gloo"
        store = meet(launch, limit)
        connect = functools.partial(
            dist.init_process_group,
            backend,
            timeout=datetime.timedelta(seconds=max(timeout_s, SETUP_TIMEOUT_S)),
            store=store,
            rank=rank,
            world_size=world_size,
            device_id=device if is_cuda else None,
        )
        connect_group(launch, backend, max(timeout_s, NCCL_START_S) if is_cuda else limit.left_s, connect)
    return Ranks(rank, world_size, device)


def leave_ranks() -> None:
    """Leave the process group, if any. Not after a peer was lost: this waits for the others."""
    if dist.is_initialized():
        dist.destroy_process_group()


def keep_freed_memory() -> None:
    """Have glibc keep the memory of freed activations: giving it back costs a page fault a page in the next step."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        if mallopt(-3, 1 << 30):  # M_MMAP_THRESHOLD, refused by old versions
            mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def is_peer_failure(error: Exception) -> bool:
    """Whether a collective failed because another rank is gone; gloo reports that as a plain RuntimeError."""
    words = ("gloo", "Gloo", "NCCL", "Connection")
    return isinstance(error, dist.DistError) or ("RANK" in os.environ and any(word in str(error) for word in words))


def digest(value: Any) -> str:
    """sha256 over all keys, numbers and tensor bytes of nested dicts and lists; of what is split, this rank's rows."""
    sha = hashlib.sha256()

    def add(item: Any) -> None:
        if isinstance(item, dict):
            for key, entry in item.items():
                sha.update(f"{key}:".encode())
                add(entry)
        elif isinstance(item, list | tuple):
            for entry in item:
                add(entry)
        elif isinstance(item, Tensor):
            item = local(item)
            sha.update(f"{item.dtype}{tuple(item.shape)}".encode())
            sha.update(item.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:
            sha.update(repr(item).encode())

    add(value)
    return sha.hexdigest()
