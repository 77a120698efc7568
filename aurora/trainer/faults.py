"""Named points of a run, where its watch sees it pass and where tests make it fail.

SPEEDRUN_FAULT="KIND:POINT:STEP[:RANK]", set by a test, lets that rank (0 if not named) fail the first time it passes
that point at that step. Nothing else in the harness reads it, and the record shows it among the environment variables.

    kill, stop, term   SIGKILL, SIGSTOP or SIGTERM to this process
    hang, sleep        wait for ever, or half a second
    full               OSError: no space left on device
    nan, inf, ulp      put that value into the first element of the point's tensors, or move it to the next float
"""

import errno
import os
import signal
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}


class Passed(NamedTuple):
    """The point passed last: how many before it, its name and step."""

    count: int = 0
    name: str = "start"
    step: int = 0


class Points:
    """Where this process is, and which fault waits for it."""

    def __init__(self, rank: int):
        self.last = Passed()
        kind, *place = os.environ.get("SPEEDRUN_FAULT", "").split(":")
        is_first_attempt = os.environ.get("SPEEDRUN_ATTEMPT", "0") == "0"  # counted by scripts/launch.sh
        is_here = bool(place) and int(([*place, "0"])[2]) == rank and is_first_attempt
        self.kind, self.place = (kind, (place[0], int(place[1]))) if is_here else ("", None)

    def passed(self, name: str, step: int, tensors: Sequence[Tensor] = ()) -> None:
        """Note that the run is here; costs less than a microsecond."""
        self.last = Passed(self.last.count + 1, name, step)
        if self.place == (name, step):
            self.place = None
            fail(self.kind, tensors)


@torch.no_grad()
def fail(kind: str, tensors: Sequence[Tensor]) -> None:
    if kind in SIGNALS:
        os.kill(os.getpid(), SIGNALS[kind])
    elif kind in ("hang", "sleep"):
        time.sleep(1e6 if kind == "hang" else 0.5)
    elif kind == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    elif kind in ("nan", "inf", "ulp"):
        first = tensors[0].view(-1)[:1]
        first.copy_(torch.nextafter(first, first + 1) if kind == "ulp" else torch.full_like(first, float(kind)))
    else:
        raise ValueError(f"SPEEDRUN_FAULT: no kind {kind!r}")


points = Points(int(os.environ.get("RANK", 0)))


def last_point() -> Passed:
    return points.last


def point(name: str, step: int, tensors: Sequence[Tensor] = ()) -> None:
    """This process passes the point NAME of a step (from 0)."""
    points.passed(name, step, tensors)
