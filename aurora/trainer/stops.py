"""Requests to stop: SIGTERM, SIGHUP, SIGUSR1 and Ctrl-C, heard from a process's first line to its last.

Before a run has begun there is nothing to save, and the process ends at once. From then on a request is noted; all
ranks agree on it in the next step and save. After the last step the run ends as it would have ended anyway.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from aurora.errors import Exit
from aurora.trainer.process import report_exit

# Slurm warns with SIGUSR1, a terminal that is gone with SIGHUP.
NAMES = [name for name in ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGINT") if hasattr(signal, name)]
NOTHING_SAVED = b"stopped: before the first step, so there is nothing to save; the same command starts again\n"


class Stops:
    def __init__(self) -> None:
        self.is_asked = False
        self.must_save = False  # what is asked for is noted, not done
        self.is_interrupted = False
        self.process, self.begin_s = 0, 0.0  # which called catch(), and when, of time.monotonic()
        self.before: dict[str, Any] = {}  # handlers, while ours are in their place

    def catch(self) -> None:
        """Hear requests from now on. What is ignored stays so: under nohup a terminal that is gone is no request."""
        if self.before:
            return
        self.is_asked = self.must_save = self.is_interrupted = False
        self.process, self.begin_s = os.getpid(), time.monotonic()
        for name in NAMES:
            before = signal.getsignal(getattr(signal, name))
            if before is not signal.SIG_IGN:
                self.before[name] = before
                signal.signal(getattr(signal, name), self.handle)

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """catch(), and after the block handlers as before; a program that called catch() itself is deaf from there."""
        is_program = bool(self.before) and self.process == os.getpid()
        self.catch()
        try:
            yield
        finally:
            for name, before in self.before.items():
                # Its outcome stands. Python's end takes out handlers, and a signal would turn it into another.
                signal.signal(getattr(signal, name), signal.SIG_IGN if is_program else before)
            self.before = {}

    def handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # a worker of torch's compiler, forked from this process
            os._exit(128 + number)
        if number == signal.SIGINT and self.is_interrupted:
            raise KeyboardInterrupt
        self.is_interrupted |= number == signal.SIGINT
        self.is_asked = True
        if not self.must_save:
            with contextlib.suppress(OSError):
                os.write(2, NOTHING_SAVED)  # print() may be what was interrupted
            os._exit(report_exit(Exit.PREEMPTED))


stops = Stops()  # of this process
