"""Writing of a run's record: one JSONL file, one event a line."""

import errno
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from aurora.errors import Exit, HarnessError

SCHEMA = 1


class RecordWriter:
    """The run's JSONL file, one write a line. Rank 0 writes; where it cannot, all ranks raise."""

    def __init__(self, path: Path, ranks: Any):
        self.path, self.ranks = path, ranks

    def write(self, *events: dict[str, Any]) -> None:
        """Append events and force them to disk; only call in untimed time. Collective.

        Raises:
            HarnessError: DISK. Lines before are whole; what is left of this one is dropped by readers and by resume.
        """
        if events:
            self.ranks.all_or_none(lambda: self._append(events) if self.ranks.is_main else None)

    def _append(self, events: Iterable[dict[str, Any]]) -> None:
        try:
            handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                for event in events:
                    line = (json.dumps(event, allow_nan=False) + "\n").encode()
                    if os.write(handle, line) != len(line):
                        raise OSError(errno.ENOSPC, "the line was cut")
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            raise HarnessError(Exit.DISK, f"record {self.path} cannot be written: {error.strerror}") from error

    def is_new(self) -> bool:
        """Whether the record has no line yet; a last line that a crash left without its end is cut off."""
        if not self.ranks.is_main or not self.path.exists():
            return True
        content = self.path.read_bytes()
        if not content.endswith(b"\n"):
            os.truncate(self.path, content.rfind(b"\n") + 1)
        return b"\n" not in content
