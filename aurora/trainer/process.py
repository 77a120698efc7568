"""This process among others of the machine: signals, its launcher's death, its folder, console and exit code."""

import contextlib
import ctypes
import fcntl
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from aurora.errors import Exit, HarnessError

PR_SET_PDEATHSIG = 1


@contextlib.contextmanager
def stop_signals(request_stop: Callable[[], None]) -> Iterator[None]:
    """SIGTERM, SIGUSR1 and Ctrl-C ask the run to stop with a checkpoint; a second Ctrl-C means now."""
    interrupted = False

    def handle(signum: int, frame: Any) -> None:
        nonlocal interrupted
        if signum == signal.SIGINT and interrupted:
            raise KeyboardInterrupt
        interrupted |= signum == signal.SIGINT
        request_stop()

    names = [name for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)]
    previous = {name: signal.signal(getattr(signal, name), handle) for name in names}
    try:
        yield
    finally:
        for name, handler in previous.items():
            signal.signal(getattr(signal, name), handler)


def die_with_launcher() -> None:
    """Have the kernel (of Linux) kill this process when its torchrun dies: it would go on alone and keep its GPU.

    Elsewhere the watch looks at the parent. A run that was started by hand may outlive its shell.
    """
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def lock_folder(out: Path) -> TextIO:
    """Take the run folder until the file returned is closed, or this process ends in whatever way.

    Raises:
        HarnessError: CONFIG, when another process has it, naming that; DISK, when the disk is full or has no locks.
    """
    try:
        file = open(out / ".lock", "a+")  # noqa: SIM115
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        return file
    except BlockingIOError:
        file.seek(0)
        owner = file.read(200) or "another process"
        file.close()
        message = f"--out {out} is in use by {owner}: wait for it, or choose another folder"
        raise HarnessError(Exit.CONFIG, message) from None
    except OSError as error:
        message = f"--out {out}: its file .lock cannot be written and locked: {error.strerror}; choose another disk"
        raise HarnessError(Exit.DISK, message) from error


def check_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise HarnessError(Exit.DISK, f"--out {out} is not a folder that can be written: {error.strerror}") from error


def print_line(line: str, stream: str = "stderr") -> None:
    """Print a line to that stream of sys. A console that is full or gone is no reason to stop, or not to."""
    try:
        print(line, file=getattr(sys, stream), flush=True)
    except OSError:
        # At exit Python would try once more, and exit with 120.
        setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def report_exit(code: int) -> int:
    """Append this process's exit code to the file SPEEDRUN_STATUS, for scripts/launch.sh: torchrun's is always 1."""
    path = os.environ.get("SPEEDRUN_STATUS")
    if path:
        with contextlib.suppress(OSError), open(path, "a") as file:
            file.write(f"{code}\n")
    return code
