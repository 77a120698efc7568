"""What scripts/doctor.py checks, one line each: what is there, how good that is for a run, and what to do about it."""

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from aurora.config import ROOT, Config
from aurora.errors import HarnessError
from scripts.diagnosis import probes

OK, WARNING, ERROR = "ok", "warning", "error"
GIB, MIB = 2**30, 2**20
LOWEST_TORCH = (2, 9)
FEW_FILES, TOO_FEW_FILES = 1024, 256
# Ranks of one machine meet in /dev/shm; containers often have 64 MiB.
SMALL_SHM, TOO_SMALL_SHM = GIB, 128 * MIB
BUSY_PERCENT, BUSY_MIB = 10, 1024
INSTALL = "pip install -e '.[train]', or bash scripts/quickstart.sh"


class Line(NamedTuple):
    name: str
    status: str
    found: str
    fix: str = ""


class Machine(NamedTuple):
    """What more than one check needs."""

    gpus: list[probes.Gpu]
    stack: probes.Stack

    @property
    def is_cuda(self) -> bool:
        return self.stack.num_gpus > 0

    @property
    def num_ranks(self) -> int:
        return max(1, self.stack.num_gpus)


class Task(NamedTuple):
    """The run that is asked about, as the trainer would check it."""

    config: Config
    counts: dict[str, int]  # parameters by role
    memory_gib: Callable[[int], float]  # of a rank, for a micro-batch
    attention: str
    is_compiled: bool
    has_kernels: bool


def numbers_of(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:2])


def software(machine: Machine) -> Iterator[Line]:
    gpus, stack = machine.gpus, machine.stack
    python = ".".join(map(str, sys.version_info[:3]))
    yield Line("python", OK, python)
    yield Line("driver", OK, f"{gpus[0].driver}, CUDA up to {probes.driver_cuda() or '?'}" if gpus else "no NVIDIA GPU")
    if stack.error:
        yield Line("torch", ERROR, f"cannot be imported: {stack.error}", INSTALL)
        return
    if numbers_of(stack.torch) < LOWEST_TORCH:
        yield Line("torch", ERROR, stack.torch, f"install {'.'.join(map(str, LOWEST_TORCH))} or newer: {INSTALL}")
    else:
        yield Line("torch", OK, stack.torch)
    if not probes.version_of("numpy"):
        yield Line("numpy", ERROR, "missing", INSTALL)
    yield cuda(machine)
    if not machine.is_cuda:
        return
    yield Line("cuDNN", *((OK, str(stack.cudnn)) if stack.cudnn else (WARNING, "missing", "attention takes others")))
    if stack.nccl:
        yield Line("NCCL", OK, stack.nccl)
    elif machine.num_ranks > 1:
        yield Line("NCCL", ERROR, "missing", "install torch for CUDA from pytorch.org, or run on one GPU")
    if triton := probes.version_of("triton"):
        yield Line("triton", OK, triton)
    else:
        fix = "pip install triton, or expect steps that are several times as long, as nothing is compiled"
        yield Line("triton", WARNING, "missing", fix)


def cuda(machine: Machine) -> Line:
    stack, newest = machine.stack, probes.driver_cuda()
    if not machine.gpus:
        return Line("CUDA", OK, "not used, the run is on the CPU" if not machine.is_cuda else str(stack.cuda))
    if not stack.cuda:
        return Line("CUDA", ERROR, "this torch is for CPUs alone", "install torch for CUDA from pytorch.org")
    if newest and numbers_of(stack.cuda)[0] > numbers_of(newest)[0]:
        fix = f"update the driver, or install torch for CUDA {newest.partition('.')[0]} from pytorch.org"
        return Line("CUDA", ERROR, f"torch is for {stack.cuda}, the driver for up to {newest}", fix)
    if not stack.num_gpus:
        fix = "check CUDA_VISIBLE_DEVICES, and nvidia-smi for a GPU that is lost"
        return Line("CUDA", ERROR, f"torch sees none of {len(machine.gpus)} GPUs", fix)
    return Line("CUDA", OK, f"{stack.cuda}, {stack.num_gpus} of {len(machine.gpus)} GPUs visible")


def graphics(machine: Machine) -> Iterator[Line]:
    for gpu in machine.gpus:
        found = f"{gpu.name}, {gpu.used_mib:,} of {gpu.total_mib:,} MiB used, {gpu.busy_percent} % busy, "
        found += f"{gpu.clock_mhz} of {gpu.max_clock_mhz} MHz"
        is_busy = gpu.busy_percent > BUSY_PERCENT or gpu.used_mib > BUSY_MIB
        fix = "end what runs there (nvidia-smi names it), or leave this GPU out of CUDA_VISIBLE_DEVICES"
        yield Line(f"GPU {gpu.number}", WARNING if is_busy else OK, found, fix if is_busy else "")
    if machine.num_ranks > 1:
        if lost := machine.stack.without_peers:
            found = f"{len(lost)} pairs of GPUs have none, as {lost[0][0]} and {lost[0][1]}"
            yield Line(
                "P2P", WARNING, found, "sums over ranks go by the host; use GPUs with NVLink (nvidia-smi topo -m)"
            )
        else:
            yield Line("P2P", OK, f"between all {machine.num_ranks} GPUs")


def host(machine: Machine, task: Task | None, out: Path) -> Iterator[Line]:
    free, least = probes.free_memory_bytes() / GIB, 2.0 * machine.num_ranks
    if task and not machine.is_cuda:
        least = task.memory_gib(1)
    is_enough = free > least
    fix = "" if is_enough else "end other programs, take a larger machine or a smaller model"
    found = f"{free:.1f} GiB free, at least {least:.1f} needed"
    yield Line("host memory", OK if is_enough else ERROR, found, fix)

    soft, hard = probes.open_files_limit()
    status = ERROR if soft < TOO_FEW_FILES else WARNING if soft < FEW_FILES else OK
    fix = f"ulimit -n {min(hard, 65536)}" if hard >= FEW_FILES else "raise nofile in /etc/security/limits.conf"
    yield Line("open files", status, f"{soft:,} allowed", fix if status != OK else "")

    shm = probes.shared_memory_bytes()
    if machine.num_ranks > 1 and shm is not None:
        status = ERROR if shm < TOO_SMALL_SHM else WARNING if shm < SMALL_SHM else OK
        fix = "docker run --shm-size=8g, or mount -o remount,size=8g /dev/shm" if status != OK else ""
        yield Line("/dev/shm", status, f"{shm / MIB:,.0f} MiB", fix)
    yield from disk(task, out)


def disk(task: Task | None, out: Path) -> Iterator[Line]:
    if why := probes.why_not_writable(out):
        yield Line("disk of --out", ERROR, f"{out} cannot be written: {why}", "choose another --out")
        return
    free = probes.disk_free_bytes(out)
    # A checkpoint has at most weights and two numbers a weight; two are kept while a third is written.
    one = 12 * sum(task.counts.values()) if task else GIB
    status = ERROR if free < one + 64 * MIB else WARNING if free < 3 * one + 64 * MIB else OK
    found = f"{free / GIB:.1f} GiB free in {out}, three checkpoints take {3 * one / GIB:.1f}"
    yield Line("disk of --out", status, found, "make room, or choose another --out" if status != OK else "")


def data(task: Task, verify: Callable[[Config], str], track: str) -> Iterator[Line]:
    """verify: reads and checks all that the run will read; says what that is, or raises HarnessError."""
    try:
        yield Line("data", OK, verify(task.config))
    except HarnessError as error:
        found, _, fix = str(error).rpartition("; ")
        yield Line("data", ERROR, found or str(error), fix or "get the data again")
        folder = (ROOT / task.config.data.train).parent
        free = probes.disk_free_bytes(folder)
        need = 2 * task.config.train.steps * task.config.train.batch_tokens
        is_enough = free > need
        found = f"{free / GIB:.1f} GiB free for data, {track} reads up to {need / GIB:.1f}"
        fix = "" if is_enough else "make room, or let the data folder be a link to another disk"
        yield Line("disk of data", OK if is_enough else ERROR, found, fix)


def model(machine: Machine, task: Task, lines: list[str]) -> Iterator[Line]:
    """lines: of the time that a run takes."""
    how = "compiled" if task.is_compiled else "eager"
    kernels = "Triton kernels of ours" if task.has_kernels else "torch's kernels"
    yield Line("attention", OK, task.attention)
    yield Line("kernels", OK, f"{how}, {kernels}")
    for gpu in machine.gpus if machine.is_cuda else ():
        free, least = (gpu.total_mib - gpu.used_mib) / 1024, task.memory_gib(1)
        if free < least:
            fix = "take a smaller model, or a GPU with more memory"
            yield Line("GPU memory", ERROR, f"GPU {gpu.number} has {free:.1f} GiB, one sequence takes {least:.1f}", fix)
    for line in lines:
        name, _, found = line.partition(": ")
        yield Line(name.partition(",")[0], OK, found if not name.partition(",")[2] else line.partition(", ")[2])


def examine(args: argparse.Namespace, ask: Callable[..., Any]) -> list[Line]:
    """All lines. ask: gives the task, its data and its time, see scripts/doctor.py; it needs torch and numpy."""
    machine = Machine(probes.gpus(), probes.stack())
    lines, task = [*software(machine), *graphics(machine)], None
    if not any(line.status == ERROR for line in lines if line.name in ("torch", "numpy")):
        try:
            task, verify, times = ask(args, machine.num_ranks)
        except HarnessError as error:
            lines.append(Line("settings", ERROR, str(error), "correct --config, --optimizer or --set"))
    lines += host(machine, task, args.out)
    if task:
        lines += [*data(task, verify, args.config.name), *model(machine, task, times)]
    return lines
