"""This process among others of the machine: its launcher's death, its folder, console and exit code."""

import contextlib
import ctypes
import errno
import fcntl
import os
import signal
import socket
import stat
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TextIO

from aurora.errors import Exit, HarnessError
from aurora.trainer.timeline import timeline

PR_SET_PDEATHSIG = 1
STILL_S, SAVE_S = 3, 60  # without its launcher, a process that stands still for so long ends; one that saves, later


def die_with_launcher() -> None:
    """Let this process stop when its torchrun dies: it would go on alone and keep its GPU.

    torchrun dies of SIGUSR1, with which Slurm warns. So there is time to save, as long as the run moves on. Under
    scripts/launch.sh there is none: it starts the run again. A run that was started by hand may outlive its shell.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    if sys.platform == "linux":
        signal_of_death = signal.SIGKILL if "SPEEDRUN_STATUS" in os.environ else signal.SIGTERM
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal_of_death)
    threading.Thread(target=end_after, args=(os.getppid(),), name="launcher", daemon=True).start()


def end_after(launcher: int) -> None:
    """Wait for the launcher's death, then until this process stands still, and end it."""
    while os.getppid() == launcher:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)  # only Linux has sent it
    moved_s, passed = time.monotonic(), timeline.place.passed
    while time.monotonic() - moved_s < (SAVE_S if timeline.place.name.startswith("checkpoint") else STILL_S):
        time.sleep(0.1)
        if timeline.place.passed != passed:
            moved_s, passed = time.monotonic(), timeline.place.passed
    os._exit(report_exit(Exit.PEER))


NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


def lock_folder(out: Path, name: str = ".lock") -> TextIO:
    """Take the folder until the file returned is closed, or this process ends in whatever way.

    On a file system without locks this warns and goes on.

    Raises:
        HarnessError: CONFIG, when another process has it, naming that; DISK, when the file cannot be written, or leads
            to another.
    """
    try:
        # A link would have its target overwritten; a pipe would be waited for.
        handle = os.open(out / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        file = os.fdopen(handle, "w+")
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            raise OSError(errno.ELOOP, "it is a link, or no file")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            print_line(
                f"warning: --out {out} is on a disk without locks; take care that no other run uses it meanwhile"
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        return file
    except BlockingIOError:
        owner = file.read(200) or "another process"
        file.close()
        message = f"--out {out} is in use by {owner}: wait for it, or choose another folder"
        raise HarnessError(Exit.CONFIG, message) from None
    except OSError as error:
        why = "it is a link" if error.errno == errno.ELOOP else error.strerror
        message = f"--out {out}: its file {name} cannot be written and locked: {why}; remove it or choose another disk"
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
    except (OSError, UnicodeError):
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
