"""Runs of train_gpt.py as child processes: start one, find it again among the records."""

import contextlib
import os
import queue
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from results.record import ROOT, Run

PREEMPTED = 75


class Workers:
    """Places for `jobs` runs at a time: each has its own cores, and a folder below out, as one folder takes one run.

    With one job a run gets the whole machine and trains in out itself.
    """

    def __init__(self, jobs: int, out: Path):
        self.jobs, self.out = jobs, out
        can_pin = hasattr(os, "sched_setaffinity")  # Linux
        cores = sorted(os.sched_getaffinity(0)) if can_pin else list(range(os.cpu_count() or 1))
        threads = max(1, len(cores) // jobs)
        self.environment = os.environ | {"OMP_NUM_THREADS": str(threads), "SPEEDRUN_JOBS": str(jobs)}
        self.free: queue.SimpleQueue[tuple[int, list[int]]] = queue.SimpleQueue()
        for place in range(jobs):
            own = cores[place * threads : (place + 1) * threads]  # none where there are more jobs than cores
            self.free.put((place, own if can_pin else []))

    def train(self, argv: list[str], nproc: int, progress: TextIO, prefix: str = "    ") -> int:
        """Train in a child process as soon as a place is free; returns its exit code. The record ends up in out."""
        if self.jobs == 1:
            return run_one(argv, self.out, nproc, progress)
        with self._place() as (place, cores):
            folder = self.out / f".job{place}"
            folder.mkdir(parents=True, exist_ok=True)
            try:
                return run_one(argv, folder, nproc, progress, prefix, self.environment, cores)
            finally:
                for path in folder.iterdir():
                    if path.name != ".lock":
                        path.rename(self.out / path.name)

    @contextlib.contextmanager
    def _place(self) -> Iterator[tuple[int, list[int]]]:
        place = self.free.get()
        try:
            yield place
        finally:
            self.free.put(place)


def run_one(
    argv: list[str],
    out: Path,
    nproc: int,
    progress: TextIO,
    prefix: str = "    ",
    environment: dict[str, str] | None = None,
    cores: Sequence[int] = (),
) -> int:
    """Train in a child process, passing its lines on; returns its exit code.

    cores: to which the process is pinned, any if empty.
    """
    launcher = [sys.executable]
    if nproc > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    command = [*launcher, "train_gpt.py", *argv, "--out", os.path.relpath(out.absolute(), ROOT)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    child = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
    if cores:
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(child.pid, cores)  # before it has threads, which inherit this
    try:
        for line in child.stdout:
            progress.write(f"{prefix}{line}")  # in one piece: others write too
            progress.flush()
        return child.wait()
    except KeyboardInterrupt:  # the child got it too and is saving what it has
        child.wait()
        return PREEMPTED


def finished_run(runs: Sequence[Run], argv: list[str], nproc: int, sources: dict[str, str]) -> Run | None:
    """The newest finished run with these arguments that embeds these sources."""
    return next((run for run in reversed(runs) if run.is_done and is_same(run, argv, nproc, sources)), None)


def is_same(run: Run, argv: list[str], nproc: int, sources: dict[str, str]) -> bool:
    same_arguments = without_out(run.start["argv"][1:]) == argv and run.start["world_size"] == nproc
    return same_arguments and run.start["sources"] == sources


def was_interrupted(runs: Sequence[Run], argv: list[str]) -> bool:
    """Whether the newest run with these arguments was stopped on request; torchrun hides the exit code."""
    ends = [run.end for run in runs if without_out(run.start["argv"][1:]) == argv]
    return bool(ends) and ends[-1] is not None and ends[-1]["status"] == "interrupted"


def without_out(argv: list[str]) -> list[str]:
    index = argv.index("--out") if "--out" in argv else len(argv)
    return argv[:index] + argv[index + 2 :]
