"""Runs of train_gpt.py as child processes: check, start and resume them, find them again among the records."""

import contextlib
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from configs.schema import Exit, load_config
from results.record import ROOT, Run, read_folder

PREEMPTED = Exit.PREEMPTED


def check_settings(argvs: Iterable[Sequence[str]], nproc: int) -> None:
    """Raise HarnessError for runs that could not start, as far as that shows without data. argvs: of train_gpt.py."""
    from aurora.runtime.batch import plan_batch  # which imports torch: seconds, that a mere report does without
    from aurora.runtime.optimizers import checked_hparams

    # A setting is checked once, for all of its seeds.
    for config_name, optimizer, *overrides in dict.fromkeys((argv[1], argv[3], *argv[7::2]) for argv in argvs):
        config = load_config(ROOT / config_name, optimizer, overrides)
        checked_hparams(config)
        plan_batch(config, nproc)


class Outcome(NamedTuple):
    run: Run | None  # what the attempt recorded
    exit_code: int


class Workers:
    """Places for `jobs` runs at a time: each has its own cores, and a folder below out, as one folder takes one run.

    With one job a run gets the whole machine and trains in out itself.
    """

    def __init__(self, jobs: int, out: Path):
        self.out, self.environment, self.lock = out, None, threading.Lock()
        self.children: set[subprocess.Popen] = set()
        self.is_ended = threading.Event()
        self.free: queue.SimpleQueue[tuple[Path, list[int]]] = queue.SimpleQueue()
        if jobs == 1:
            self.free.put((out, []))
            return
        can_pin = hasattr(os, "sched_setaffinity")  # Linux
        cores = sorted(os.sched_getaffinity(0)) if can_pin else list(range(os.cpu_count() or 1))
        threads = max(1, len(cores) // jobs)
        self.environment = os.environ | {"OMP_NUM_THREADS": str(threads), "SPEEDRUN_JOBS": str(jobs)}
        for place in range(jobs):
            own = cores[place * threads : (place + 1) * threads]  # none where there are more jobs than cores
            self.free.put((out / f".job{place}", own if can_pin else []))

    def end(self, *signal_and_frame: Any) -> None:
        """Stop all runs with a checkpoint, and start no more: to handle SIGTERM, which children of ours do not get."""
        self.is_ended.set()
        for child in list(self.children):
            child.terminate()

    def train(self, argv: list[str], nproc: int, sources: dict[str, str], progress: TextIO, prefix: str) -> Outcome:
        """Train in a child process as soon as a place is free. The record ends up in out.

        A run with these arguments and sources that was stopped with a checkpoint in out goes on from there.
        """
        with self._place() as (folder, cores):
            folder.mkdir(parents=True, exist_ok=True)
            unfinished = stopped_run(self.records(), argv, nproc, sources)
            with self.lock:
                if unfinished:
                    bring([unfinished.path, checkpoints_of(unfinished)], folder)
                before = {path.name: path.stat().st_size for path in self.out.rglob("*.jsonl")}
            command = [*argv, *(["--resume"] if unfinished else [])]
            try:
                code = self.run_one(command, folder, nproc, progress, prefix, cores)
            finally:
                with self.lock:
                    bring([path for path in folder.iterdir() if folder != self.out and path.name != ".lock"], self.out)
        found = [run for run in self.records() if arguments_of(run) == argv]
        new = [run for run in found if run.path.stat().st_size != before.get(run.path.name)]
        run = new[-1] if new else None
        # torchrun hides the exit code.
        is_stopped = run is not None and run.end is not None and run.end["status"] == "interrupted"
        return Outcome(run, PREEMPTED if is_stopped else code)

    def run_one(
        self, argv: list[str], out: Path, nproc: int, progress: TextIO, prefix: str, cores: Sequence[int]
    ) -> int:
        """Train in a child process, passing its lines on; returns its exit code.

        cores: to which the process is pinned, any if empty.
        """
        launcher = [sys.executable]
        if nproc > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
        command = [*launcher, "train_gpt.py", *argv, "--out", os.path.relpath(out.absolute(), ROOT)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        child = subprocess.Popen(command, cwd=ROOT, env=self.environment, **pipes)
        self.children.add(child)
        if self.is_ended.is_set():  # between the start and the line above
            child.terminate()
        if cores:
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(child.pid, cores)  # before it has threads, which inherit this
        for line in child.stdout:
            progress.write(f"{prefix}{line}")  # in one piece: others write too
            progress.flush()
        code = child.wait()
        self.children.discard(child)
        return PREEMPTED if code and self.is_ended.is_set() else code

    def records(self) -> list[Run]:
        """All that can be read in out. Meanwhile no file is moved."""
        with self.lock:
            return read_folder(self.out)[0]

    @contextlib.contextmanager
    def _place(self) -> Iterator[tuple[Path, list[int]]]:
        place = self.free.get()
        try:
            yield place
        finally:
            self.free.put(place)


def bring(paths: Iterable[Path], folder: Path) -> None:
    for path in paths:
        path.rename(folder / path.name)


def finished_run(runs: Sequence[Run], argv: list[str], nproc: int, sources: dict[str, str]) -> Run | None:
    """The newest finished run with these arguments that embeds these sources."""
    return next((run for run in reversed(runs) if run.is_done and is_same(run, argv, nproc, sources)), None)


def stopped_run(runs: Sequence[Run], argv: list[str], nproc: int, sources: dict[str, str]) -> Run | None:
    """The newest such run that neither finished nor diverged and has a checkpoint."""
    unfinished = [run for run in runs if run.end is None or run.end["status"] == "interrupted"]
    same = [run for run in reversed(unfinished) if is_same(run, argv, nproc, sources)]
    return next((run for run in same if any(checkpoints_of(run).glob("step-*"))), None)


def checkpoints_of(run: Run) -> Path:
    return run.path.with_suffix(".checkpoints")


def is_same(run: Run, argv: list[str], nproc: int, sources: dict[str, str]) -> bool:
    return arguments_of(run) == argv and run.start["world_size"] == nproc and run.start["sources"] == sources


def arguments_of(run: Run) -> list[str]:
    """Of train_gpt.py, without where and whether to go on."""
    argv = [argument for argument in run.start["argv"][1:] if argument != "--resume"]
    index = argv.index("--out") if "--out" in argv else len(argv)
    return argv[:index] + argv[index + 2 :]
