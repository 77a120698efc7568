"""Programs that take turns on one machine: one is stopped (SIGSTOP) while the other runs, and both stay started."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from aurora.errors import Exit, HarnessError

POLL_S = 0.02


class Program:
    """A running program whose console goes to a file; with several ranks, one process for each."""

    def __init__(self, command: list[str], folder: Path, log: Path, ranks: int = 1, env: dict[str, str] | None = None):
        """env: variables that it has beside those of this process."""
        self.log, self.file = log, log.open("w")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        env = ({"OMP_NUM_THREADS": "1"} if ranks > 1 else {}) | os.environ | (env or {})  # as torchrun does
        env |= {"PYTHONUNBUFFERED": "1", "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self.processes: list[subprocess.Popen] = []
        for rank in map(str, range(ranks)):
            process = subprocess.Popen(
                command, cwd=folder, stdout=self.file, stderr=subprocess.STDOUT,
                env=env | {"RANK": rank, "LOCAL_RANK": rank},
                process_group=self.processes[0].pid if self.processes else 0,
            )  # fmt: skip
            self.processes.append(process)

    def has_said(self, pattern: str, deadline_s: float) -> bool:
        """Whether a line of its console begins so; then it is stopped."""
        if re.search(f"^{pattern}", self.text(), re.MULTILINE):
            self.send(signal.SIGSTOP)
            return True
        codes = [code for process in self.processes if (code := process.poll()) is not None]
        if codes or time.monotonic() > deadline_s:
            why = f"ended with {codes[0]}" if codes else "is out of time"
            last = self.text().strip().splitlines()[-1:]
            raise HarnessError(Exit.CONFIG, f"{self.log}: no line {pattern!r}, and it {why}; its last: {last}")
        return False

    def run_until(self, pattern: str, deadline_s: float) -> None:
        """One turn: let it go on until a line of its console begins so."""
        self.send(signal.SIGCONT)
        while not self.has_said(pattern, deadline_s):
            time.sleep(POLL_S)

    def run_to_end(self, deadline_s: float) -> None:
        """The last turn."""
        self.send(signal.SIGCONT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            for process in self.processes:
                process.wait(timeout=max(0, deadline_s - time.monotonic()))

    def send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # once all of its group have ended
            os.killpg(self.processes[0].pid, number)

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def end(self) -> None:
        self.send(signal.SIGKILL)
        for process in self.processes:
            process.wait()
        self.file.close()


def trainer_command(
    checkout: Path, config: Path, settings: dict[str, Any], overrides: Iterable[str], out: Path
) -> list[str]:
    """The command line of a checkout's trainer: Muon at its peak lr, with each step's time in the record in out."""
    settings = {
        "schedule.cooldown_frac": 0, "train.log_every": 1, "train.checkpoint_every": 0, "eval.telemetry": "false",
    } | settings  # fmt: skip
    command = [sys.executable, str(checkout / "train_gpt.py"), "--config", str(config.resolve()), "--optimizer", "muon"]
    command += ["--timeout-s", "3600", "--out", str(out)]  # while it is stopped, it does not answer
    for override in (*(f"{key}={value}" for key, value in settings.items()), *overrides):
        command += ["--set", override]
    return command


@contextlib.contextmanager
def ended_programs() -> Iterator[list[Program]]:
    """A list. The programs in it end with the context, also where SIGTERM or Ctrl-C, which they do not get, end it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    programs: list[Program] = []
    try:
        yield programs
    finally:
        for program in programs:
            program.end()
