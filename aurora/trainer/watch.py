"""A thread that notices when the run stands still, says which rank is the cause, and ends this process.

Every rank publishes how far it is in the store through which the ranks met: places passed, and collectives begun. A
rank whose thread is silent was killed or stopped; where all threads answer but no rank moves, the one that has begun
the fewest collectives keeps the others waiting.
"""

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Self

import torch.distributed as dist

from aurora.errors import Exit
from aurora.trainer.process import print_line, report_exit
from aurora.trainer.ranks import SETUP_TIMEOUT_S, Ranks
from aurora.trainer.rendezvous import connect_store, limit_from
from aurora.trainer.timeline import timeline

# Places after which a rank may rightly stand still for long: it compiles, or writes a checkpoint.
SLOW_PLACES = (
    *("start", "warm_up", "checkpoint_gather", "checkpoint_state", "checkpoint_manifest", "checkpoint_rename"),
    *("weights", "weights_written"),
)


class State(NamedTuple):
    """What a rank publishes: beats of its thread, places passed, collectives begun, where it is, which process.

    A number names a process only with the machine (and its container) and the time when the process started.
    """

    beat: int
    passed: int
    collectives: int
    name: str
    step: int
    pid: int
    host: str
    machine: str
    started: str
    is_leaving: bool

    @property
    def place(self) -> str:
        return f"step {self.step + 1}, {self.name}"

    @property
    def is_here(self) -> bool:
        """Whether its process is one that this process can see. Of one in another container only silence tells."""
        return bool(self.pid and self.machine) and self.machine == this_machine()

    @property
    def is_gone(self) -> bool:
        return self.is_here and start_of(self.pid) != self.started


def this_machine() -> str:
    """This boot of this machine, and the container as far as processes are concerned; empty but on Linux."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def start_of(pid: int) -> str:
    """When the process with this number started, in ticks since the boot; empty if none runs."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return ""
    return "" if state in "ZX" else fields[18]  # a zombie waits for its parent alone


class Watch:
    """Runs from started() to the end of the process, on every rank of a run with several. Otherwise it does nothing."""

    def __init__(self, ranks: Ranks, timeout_s: float):
        self.ranks, self.timeout_s = ranks, timeout_s
        self.poll_s = min(0.5, timeout_s / 50)
        self.leaving = threading.Event()
        self.beat = 0
        self.states: dict[int, State] = {}
        self.answered_s: dict[int, float] = {}
        self.now_s, self.read_s = 0.0, time.monotonic()
        self.lock = threading.Lock()

    def tick(self) -> float:
        """The time of this watch, in which none passes while it does not run itself: a job that was suspended as a
        whole, or a machine that slept, lost no rank.
        """
        before_s, self.read_s = self.read_s, time.monotonic()
        self.now_s += min(self.read_s - before_s, max(1.0, 10 * self.poll_s))
        return self.now_s

    def started(self) -> Self:
        if self.ranks.world_size == 1:
            return self
        self.store = connect_store(self.ranks.rank, limit_from(time.monotonic(), SETUP_TIMEOUT_S))
        self.machine, self.start = this_machine(), start_of(os.getpid())
        unseen = State(0, 0, 0, "start", 0, 0, "unknown host", "", "", False)
        for rank in range(self.ranks.world_size):
            self.states[rank], self.answered_s[rank] = unseen, self.now_s
        self.publish()  # before anything can happen to this rank, so that the others know its process
        self.thread = threading.Thread(target=self.run, name="watch", daemon=True)
        self.thread.start()
        return self

    def stop(self) -> None:
        """This rank ends by itself: tell the others, and end the thread, which may not outlive the interpreter."""
        if self.leaving.is_set() or self.ranks.world_size == 1:
            return
        self.leaving.set()
        with contextlib.suppress(RuntimeError), self.lock:
            self.publish()
        self.thread.join(timeout=5)

    def publish(self) -> None:
        """Tell the others where this rank is."""
        self.beat += 1
        group = dist.group.WORLD  # read once: the main thread may be leaving it
        # torch's stubs leave this method out.
        collectives = group._get_sequence_number_for_group() if group else 0  # type: ignore[attr-defined]
        passed, name, step = timeline.place
        process = os.getpid(), socket.gethostname(), self.machine, self.start
        state = State(self.beat, passed, collectives, name, step, *process, self.leaving.is_set())
        self.store.set(f"watch/{self.ranks.rank}", json.dumps(state))

    def poll(self) -> bool:
        """Publish, read all ranks' states, note who answered; whether any rank has moved."""
        with self.lock:
            self.publish()
            present = [rank for rank in self.states if self.states[rank].beat or self.store.check([f"watch/{rank}"])]
            has_moved, now_s = False, self.tick()
            for rank, text in zip(present, self.store.multi_get([f"watch/{rank}" for rank in present]), strict=True):
                state, before = State(*json.loads(text)), self.states[rank]
                if state.beat != before.beat:
                    self.answered_s[rank] = now_s
                has_moved |= state[1:3] != before[1:3]
                self.states[rank] = state
            return has_moved

    def silent(self, than_s: float, counts: Callable[[State], bool] = lambda state: True) -> str | None:
        """The rank that has not answered for longest, if for as long as that and not because it leaves, in words.

        counts: whether a rank in this state is meant at all.
        """
        now_s = self.now_s
        candidates = [rank for rank, state in self.states.items() if not state.is_leaving and counts(state)]
        rank = min(candidates, key=lambda rank: self.answered_s[rank], default=None)
        if rank is None or rank == self.ranks.rank or now_s - self.answered_s[rank] < than_s:
            return None
        state, silent_s = self.states[rank], now_s - self.answered_s[rank]
        return (
            f"rank {rank} (process {state.pid} on {state.host}) has not answered for {silent_s:.1f} s; "
            f"last seen at {state.place}"
        )

    def behind(self) -> str:
        """The rank on which all others wait, in words."""
        fewest = min(state.collectives for state in self.states.values())
        late = [rank for rank, state in self.states.items() if state.collectives == fewest]
        places = "; ".join(f"rank {r} (process {self.states[r].pid}) at {self.states[r].place}" for r in late)
        return places if len(late) == len(self.states) else f"the others wait for {places}"

    def run(self) -> None:
        moved_s = self.tick()
        while not self.leaving.wait(self.poll_s):
            try:
                if self.poll():
                    moved_s = self.tick()
            except (RuntimeError, ValueError):  # the store went with the launcher or with rank 0: peers tell the rest
                return
            # NCCL does not tell of a peer that died: who waits for it may wait for good. gloo does, and at once.
            finding = self.silent(self.timeout_s) or self.silent(4 * self.poll_s, lambda state: state.is_gone)
            if finding is None:
                slow = any(state.name in SLOW_PLACES for state in self.states.values())
                limit_s = max(self.timeout_s, SETUP_TIMEOUT_S) if slow else self.timeout_s
                still_s = self.now_s - moved_s
                finding = f"no rank has moved for {still_s:.1f} s: {self.behind()}" if still_s > limit_s else None
            if finding and not self.leaving.is_set():
                self.end(finding)

    def end(self, message: str) -> None:
        """Say why, kill the rank that does not answer if it is on this machine, and end this process."""
        print_line(f"error: rank {self.ranks.rank} gives up: {message}")
        for rank, state in self.states.items():
            is_silent = rank != self.ranks.rank and self.now_s - self.answered_s[rank] > self.timeout_s
            if is_silent and state.is_here and not state.is_gone and not state.is_leaving:
                with contextlib.suppress(OSError):  # torchrun would ask a stopped process nicely for half a minute
                    os.kill(state.pid, signal.SIGKILL)
        report_exit(Exit.PEER)
        os._exit(Exit.PEER)

    def who_is_lost(self) -> str:
        """After a collective failed: which rank is gone, in words. Takes a few polls; tells the others we leave."""
        self.stop()
        if self.ranks.world_size == 1:
            return ""
        try:
            for _ in range(8):
                self.poll()
                finding = self.silent(3 * self.poll_s)
                if finding:
                    return finding
                time.sleep(self.poll_s)
        except (RuntimeError, ValueError):
            return "rank 0 or the launcher is gone, and with it the store"
        return "all ranks still answer"
