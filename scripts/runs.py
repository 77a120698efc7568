"""Runs of train_gpt.py as child processes: check, start and resume them, and find their records."""

import contextlib
import functools
import hashlib
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from aurora.command_line import track_path
from aurora.config import FOLDER_VARIABLE, ROOT, is_path, load_config, name_of
from aurora.errors import Exit, HarnessError
from aurora.trainer.events import RecordError
from aurora.trainer.identity import EXTERNAL
from aurora.trainer.public import public_argv
from aurora.trainer.record import Run, read_record, record_paths

PREEMPTED = Exit.PREEMPTED
PRIVATE = ".run-"  # how names of the folders begin in which runs train


def check_settings(argvs: Iterable[Sequence[str]], nproc: int) -> None:
    """Raise HarnessError for runs that could not start, as far as that shows without data. argvs: of train_gpt.py."""
    settings = dict.fromkeys((argv[1], argv[3], *argv[7::2]) for argv in argvs)  # once for all seeds
    configs = [load_config(ROOT / name, optimizer, overrides) for name, optimizer, *overrides in settings]
    if not configs:
        return

    import train_gpt  # and with it torch, which takes seconds
    from aurora.trainer.optimizers import probe_rule
    from aurora.trainer.setup import check_config

    cpu = train_gpt.torch.device("cpu")
    for config in configs:
        config, _, params, _ = check_config(config, nproc, train_gpt.GPT, train_gpt.scheduled)
        if is_path(config.rule) and not train_gpt.torch.cuda.is_available():  # on a GPU the runs do this themselves
            probe_rule(config, params, cpu)


def overrides_of(optimizer: str, overrides: Iterable[str], optimizers: Iterable[str]) -> list[str]:
    """The overrides of one run among those of a command that names several optimizers: a module:Class has no table in
    the runs of others."""
    others = {f"optimizer.{name_of(other)}." for other in optimizers if is_path(other)}
    others -= {f"optimizer.{name_of(optimizer)}."}
    return [override for override in overrides if not override.strip().startswith(tuple(others))]


def check_jobs(jobs: int) -> None:
    """Raise HarnessError where there are GPUs, but not one for each of so many runs at a time."""
    if jobs > 1 and 0 < (count := len(visible_gpus())) < jobs:
        message = f"--jobs {jobs} needs as many GPUs, and torch sees {count}"
        raise HarnessError(Exit.CONFIG, f"{message}: use --jobs {count}, or SPEEDRUN_DEVICE=cpu")


def track_name(text: str) -> str:
    """The track as runs of train_gpt.py in the project's folder are told it."""
    path = track_path(text).absolute()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def take_folder(out: Path) -> TextIO:
    """Make the folder of many runs ours. HarnessError where that cannot be, or where others run theirs in it."""
    from aurora.trainer.process import check_writable, lock_folder

    check_writable(out)
    return lock_folder(out, ".runs.lock")


def command_of(argv: Sequence[str], out: Path, nproc: int) -> str:
    """A line of a shell in the checkout that makes a run, or goes on with it, in a folder of its own below out.

    For runs on several machines at a time: two of one folder would wait for each other's locks.
    """
    name = re.sub("[^A-Za-z0-9._=-]+", "-", "-".join([argv[3], f"s{argv[5]}", *argv[7::2]]))[:80]
    digest = hashlib.sha256(repr(argv).encode()).hexdigest()[:6]
    arguments = [*argv, "--out", str(out.absolute() / f"{name}-{digest}"), "--resume"]
    program = ["env", f"NPROC={nproc}", "bash", "scripts/launch.sh"] if nproc > 1 else ["python", "train_gpt.py"]
    return shlex.join([*program, *arguments])


def visible_gpus() -> list[str]:
    """The GPUs that runs may use, as CUDA_VISIBLE_DEVICES names them."""
    if os.environ.get("SPEEDRUN_DEVICE", "cuda") != "cuda":
        return []
    import train_gpt  # see check_settings()

    count, named = train_gpt.torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


class Place(NamedTuple):
    """What one of several runs at a time has for itself."""

    cores: Sequence[int] = ()  # to which its process is pinned, any if empty
    gpu: str = ""  # all if empty


class Outcome(NamedTuple):
    run: Run | None  # what the attempt recorded
    exit_code: int


class Workers:
    """Places for `jobs` runs at a time, each with cores and a GPU of its own; with one job a run gets all.

    A run trains in a folder of its own below out, and what it leaves is moved to out when it has ended.
    """

    def __init__(self, jobs: int, out: Path):
        self.out, self.lock = out, threading.RLock()
        # Runs start in the folder of the project; an optimizer may be in this one.
        self.environment = {FOLDER_VARIABLE: os.getcwd()} | os.environ
        self.known: dict[Path, tuple[tuple[int, ...], Run | None]] = {}  # by their files' versions
        self.children: set[subprocess.Popen] = set()
        self.is_ended = threading.Event()
        self.free: queue.SimpleQueue[Place] = queue.SimpleQueue()
        if jobs == 1:
            self.free.put(Place())
            return
        gpus = visible_gpus()
        can_pin = hasattr(os, "sched_setaffinity")  # Linux
        cores = sorted(os.sched_getaffinity(0)) if can_pin else list(range(os.cpu_count() or 1))
        threads = max(1, len(cores) // jobs)
        self.environment |= {"OMP_NUM_THREADS": str(threads), "SPEEDRUN_JOBS": str(jobs)}
        for place in range(jobs):
            own = cores[place * threads : (place + 1) * threads]  # none where there are more jobs than cores
            self.free.put(Place(own if can_pin else [], gpus[place] if gpus else ""))

    def hear_signals(self) -> None:
        """Stop on requests that children do not get: Ctrl-C they do. What is ignored, as by nohup, stays so."""
        for name in ("SIGTERM", "SIGHUP", "SIGUSR1"):
            if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is not signal.SIG_IGN:
                signal.signal(getattr(signal, name), self.end)

    def end(self, *signal_and_frame: Any) -> None:
        """Stop all runs with a checkpoint, and start no more."""
        self.is_ended.set()
        for child in list(self.children):
            child.terminate()

    def train(self, argv: list[str], nproc: int, progress: TextIO, prefix: str) -> Outcome:
        """Train in a child process as soon as a place is free. The record ends up in out.

        A run with these arguments and the current code that was stopped with a checkpoint goes on from there, or starts
        anew where it cannot. Raises HarnessError where that run is not stopped but goes on in another process.
        """
        with self._place() as place:
            self.out.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=PRIVATE, dir=self.out))
            try:
                child = argv, folder, nproc, progress, prefix, place
                stopped, code = self._take_stopped(argv, nproc, folder), None
                if stopped:
                    size = stopped.stat().st_size
                    code = self.run_one(*child, go_on=True)
                    if code and stopped.stat().st_size == size and not self.is_ended.is_set():
                        progress.write(f"{prefix}cannot go on, starts anew\n")
                        self._move_to_out(folder)
                        code = None
                code = self.run_one(*child) if code is None else code
            finally:
                names = self._move_to_out(folder)
                remove_empty(folder)
        run = next((run for run in reversed(self.records()) if run.path.name in names), None)
        # torchrun hides the exit code.
        is_stopped = run is not None and run.end is not None and run.end["status"] == "interrupted"
        return Outcome(run, PREEMPTED if is_stopped else code)

    def _take_stopped(self, argv: list[str], nproc: int, folder: Path) -> Path | None:
        """Move a stopped run's record and checkpoints to the folder; the record there."""
        from aurora.trainer.process import lock_folder  # see check_settings()

        with self.lock:
            # Other folders below out are not ours to move from.
            places = {self.out, *self.out.glob(f"{PRIVATE}*")}
            run = stopped_run([run for run in self.records() if run.path.parent in places], argv, nproc)
            if run is None:
                return None
            with lock_folder(run.path.parent):  # which its process has as long as it trains
                move_all([run.path, checkpoints_of(run)], folder)
            if run.path.parent != self.out:
                remove_empty(run.path.parent)
            return folder / run.path.name

    def _move_to_out(self, folder: Path) -> set[str]:
        """Move what a run left to out; the names."""
        with self.lock:
            left = [path for path in folder.iterdir() if path.name != ".lock"]
            move_all(left, self.out)
        return {path.name for path in left}

    def run_one(
        self,
        argv: list[str],
        folder: Path,
        nproc: int,
        progress: TextIO,
        prefix: str,
        place: Place,
        go_on: bool = False,
    ) -> int:
        """Train in a child process, passing its lines on; returns its exit code."""
        launcher = [sys.executable]
        if nproc > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
        own, final = (os.path.relpath(path.absolute(), ROOT) for path in (folder, self.out))
        command = [*launcher, "train_gpt.py", *argv, "--out", own, *(["--resume"] if go_on else [])]
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=self.environment
            | {"PYTHONIOENCODING": "utf-8"}
            | ({"CUDA_VISIBLE_DEVICES": place.gpu} if place.gpu else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        )
        assert child.stdout is not None  # a pipe
        self.children.add(child)
        if self.is_ended.is_set():  # between the start and the line above
            child.terminate()
        if place.cores:
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(child.pid, place.cores)  # before it has threads, which inherit this
        for line in child.stdout:
            progress.write(f"{prefix}{line.replace(own, final)}")  # in one piece: others write too
            progress.flush()
        code = child.wait()
        self.children.discard(child)
        return PREEMPTED if code and self.is_ended.is_set() else code

    def records(self) -> list[Run]:
        """All that can be read in out, condensed; what is as before is not read again. Meanwhile no file is moved."""
        with self.lock:
            found = {}
            for path in record_paths(self.out):
                with contextlib.suppress(OSError):  # another process has moved it
                    status = path.stat()
                    version = status.st_mtime_ns, status.st_size, status.st_ino
                    known = self.known.get(path)
                    found[path] = known if known and known[0] == version else (version, read_condensed(path))
            self.known = found
            return [run for _, run in found.values() if run]

    @contextlib.contextmanager
    def _place(self) -> Iterator[Place]:
        place = self.free.get()
        try:
            yield place
        finally:
            self.free.put(place)


def read_condensed(path: Path) -> Run | None:
    """A run without what only its plots show, or None for what is no record."""
    try:
        run = read_record(path)
    except RecordError:
        return None
    run.condense()
    return run


def move_all(paths: Iterable[Path], folder: Path) -> None:
    for path in paths:
        path.rename(folder / path.name)


def remove_empty(folder: Path) -> None:
    """A private folder that holds its lock alone; one that holds more is left."""
    if [path.name for path in folder.iterdir()] in ([], [".lock"]):
        shutil.rmtree(folder)


def by_arguments(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs by key_of() their arguments: looking through all for each would take the square of time."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(key_of(arguments_of(run)), []).append(run)
    return found


def finished_run(runs: Sequence[Run], argv: list[str], nproc: int) -> Run | None:
    """The newest finished run with these arguments and the current code."""
    return next((run for run in reversed(runs) if run.is_done and is_same(run, argv, nproc)), None)


def stopped_run(runs: Sequence[Run], argv: list[str], nproc: int) -> Run | None:
    """The newest such run that neither finished nor diverged and has a checkpoint."""
    unfinished = [run for run in runs if run.end is None or run.end["status"] == "interrupted"]
    same = [run for run in reversed(unfinished) if is_same(run, argv, nproc)]
    return next((run for run in same if any(checkpoints_of(run).glob("step-*"))), None)


def checkpoints_of(run: Run) -> Path:
    return run.path.with_suffix(".checkpoints")


def is_same(run: Run, argv: list[str], nproc: int) -> bool:
    return has_arguments(run, argv) and run.start["world_size"] == nproc and is_current(run, ROOT / argv[1])


def is_current(run: Run, config_path: Path | None = None) -> bool:
    """Whether the Python files that the record embeds are equal to those here, and its track to config_path if given.

    A record embeds what its run had imported. A file that is new here therefore changes nothing.
    """
    sources = run.start["sources"]
    paths = {name: source_path(name) if name.endswith(".py") else config_path for name in sources}
    try:
        same = (sources[name] == text_now(path) for name, path in paths.items() if path)
        return "train_gpt.py" in sources and all(same)
    except (OSError, ValueError):  # the file does not exist here, or is no text
        return False


def source_path(name: str) -> Path:
    """Where a source of a record is here: in the project, or on the path on which other packages are found."""
    if not name.startswith(f"{EXTERNAL}/"):
        return ROOT / name
    name = name.removeprefix(f"{EXTERNAL}/")
    folders = (*sys.path, os.environ.get(FOLDER_VARIABLE, "."), ".")
    return next((Path(folder, name) for folder in folders if Path(folder, name).is_file()), Path(name))


def has_arguments(run: Run, argv: list[str]) -> bool:
    return key_of(arguments_of(run)) == key_of(argv)


def key_of(argv: Iterable[str]) -> str:
    """Equal for arguments of train_gpt.py that a record cannot tell apart: it leaves out folders of this machine."""
    return repr(public_argv(["train_gpt.py", *argv])[1:])


def text_now(path: Path) -> str:
    status = path.stat()
    return _text(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=1000)  # hundreds of runs are compared with the same files
def _text(path: Path, *version: int) -> str:
    return path.read_text(encoding="utf-8")


def arguments_of(run: Run) -> list[str]:
    """Of train_gpt.py, without where and whether to go on."""
    argv = [argument for argument in run.start["argv"][1:] if argument != "--resume"]
    index = argv.index("--out") if "--out" in argv else len(argv)
    return argv[:index] + argv[index + 2 :]
