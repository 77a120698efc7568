"""What is timed, and how: wall time charged to accounts, and marks within a step."""

import time

import torch
import torch.distributed as dist

from aurora.trainer.ranks import Ranks


class Clock:
    """Charges all wall time from begin_ns to the last reading to one account or another: they add up to the whole.

    Only "train" is timed for the comparison. Ranks align before every reading, so the slowest one counts. After a
    resume the accounts hold the sums over all segments. A clock that is set, or jumps, changes nothing.
    """

    ACCOUNTS = ("import", "setup", "warmup", "train", "val", "checkpoint", "end")

    def __init__(self, ranks: Ranks, begin_ns: int, import_ns: int = 0):
        self.ranks, self.begin_ns, self.last_ns = ranks, begin_ns, begin_ns
        self.spent_ns = dict.fromkeys(self.ACCOUNTS, 0) | {"import": import_ns}
        self.before_begin_ns = import_ns

    def charge(self, account: str) -> None:
        """Charge the time since the last reading to account."""
        self.ranks.align()
        now_ns = time.perf_counter_ns()
        self.spent_ns[account] += now_ns - self.last_ns
        self.last_ns = now_ns

    def add(self, spent_ns: dict[str, int]) -> None:
        """Take over the accounts of the segments before."""
        for account, value_ns in spent_ns.items():
            self.spent_ns[account] += value_ns
            self.before_begin_ns += value_ns

    def spent_s(self, account: str) -> float:
        return self.spent_ns[account] / 1e9

    def running_train_s(self) -> float:
        """Train time up to now as this rank sees it, without waiting for the device: for progress lines only."""
        return self.spent_s("train") + (time.perf_counter_ns() - self.last_ns) / 1e9

    def of_slowest_rank(self) -> tuple[dict[str, int], int]:
        """Accounts and wall time in ns, of all segments up to the last reading, of the slowest rank. Collective."""
        wall_ns = self.before_begin_ns + self.last_ns - self.begin_ns
        return max(self.ranks.all_gather_object((self.spent_ns, wall_ns)), key=lambda rank: rank[0]["train"])

    def slowest_train_s(self) -> float:
        """Train time of the slowest rank. Collective."""
        spent = torch.tensor([self.spent_ns["train"]], dtype=torch.int64, device=self.ranks.device)
        return self.ranks.all_reduce(spent, dist.ReduceOp.MAX).item() / 1e9


def time_mark(device: torch.device) -> torch.cuda.Event | int:
    """A point in time that costs no sync, see elapsed_ms: the GPU's on CUDA, else the host's."""
    if device.type != "cuda":
        return time.perf_counter_ns()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed_ms(start: torch.cuda.Event | int, end: torch.cuda.Event | int) -> float:
    """Milliseconds between two marks; on CUDA, only once the device has passed both."""
    if isinstance(start, int) and isinstance(end, int):
        return (end - start) / 1e6
    assert not isinstance(start, int) and not isinstance(end, int)  # both are marks of one device
    return start.elapsed_time(end)
