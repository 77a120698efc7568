"""How the processes of a run find each other: the store where they meet."""

import contextlib
import datetime
import functools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch.distributed as dist

from aurora.errors import Exit, HarnessError
from aurora.trainer.launcher import Launch, check_port, keeps_store, store_address
from aurora.trainer.process import first_line, print_line, report_exit

WORD_AFTER_S = 5  # of waiting, who is missing is said
POLL_S = 0.1


class Limit(NamedTuple):
    """How long ranks may take to find each other: timeout_s, as it was asked for, which ends at until_s."""

    timeout_s: float
    until_s: float  # of time.monotonic()

    @property
    def left_s(self) -> float:
        return max(0.5, self.until_s - time.monotonic())


def limit_from(begin_s: float, timeout_s: float) -> Limit:
    """timeout_s from begin_s of time.monotonic(); a second from now where most has gone, as for torch's import."""
    return Limit(timeout_s, max(begin_s + timeout_s, time.monotonic() + 1))


def connect_store(rank: int, limit: Limit, is_first: bool = False) -> dist.Store:
    """A connection of one's own to the store of MASTER_ADDR and MASTER_PORT; rank 0 makes the store when is_first.

    Each attempt of torchrun --max-restarts has its own keys: it must not find the addresses of ranks that are dead.

    Raises:
        HarnessError: CONFIG or PEER, nobody is there.
    """
    address, port = store_address(rank)
    is_host, place = is_first and keeps_store(rank), f"{address}:{port}"
    if is_host:
        check_port(port)
    else:
        await_peer(lambda: reason_not_to_reach(address, port), limit, lambda why: (
            f"rank {rank} cannot reach rank 0 at {place} ({why}); start that, or correct MASTER_ADDR and MASTER_PORT"
        ))  # fmt: skip
    stranger = f"rank {rank} finds no store of a run at {place}, only another program"
    fix = "correct MASTER_ADDR, or choose a free MASTER_PORT"
    timeout = datetime.timedelta(seconds=max(1, limit.timeout_s))
    try:
        with without_stderr() as restore, at_most(limit.left_s, f"{stranger}; {fix}", restore):
            store = dist.TCPStore(address, port, is_master=is_host, wait_for_workers=False, timeout=timeout)
    except (RuntimeError, dist.DistError, ValueError) as error:
        message = f"rank {rank} finds no store of a run at {place}: {first_line(error)[:200]}"
        raise HarnessError(Exit.CONFIG, f"{message}; choose a free MASTER_PORT") from error
    return dist.PrefixStore(f"speedrun/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def reason_not_to_reach(address: str, port: int) -> str:
    try:
        socket.create_connection((address, port), timeout=1).close()
    except OSError as error:
        return error.strerror or str(error) or type(error).__name__
    return ""


def await_peer(find_obstacle: Callable[[], str], limit: Limit, describe: Callable[[str], str]) -> None:
    """Wait until there is no obstacle; says after seconds which there is. Raises HarnessError PEER after the limit."""
    begin_s, is_said = time.monotonic(), False
    while obstacle := find_obstacle():
        if time.monotonic() >= limit.until_s:
            raise HarnessError(Exit.PEER, f"{describe(obstacle)}, or raise --timeout-s = {limit.timeout_s:g}")
        if time.monotonic() - begin_s >= WORD_AFTER_S and not is_said:
            print_line(f"waiting, up to {limit.timeout_s:g} s: {describe(obstacle)}")
            is_said = True
        time.sleep(POLL_S)


def in_words(ranks: list[int]) -> str:
    """Some of them; nothing for none."""
    names = f"{', '.join(map(str, ranks[:8]))}{', ...' * (len(ranks) > 8)}"
    return f"rank{'s' * (len(ranks) > 1)} {names}" if ranks else ""


def meet(launch: Launch, limit: Limit) -> dist.Store:
    """The store, once all ranks are there.

    Raises:
        HarnessError: PEER, naming the ranks that did not come; CONFIG, for a rank that is there twice, or ranks that
            were told different numbers of ranks.
    """
    rank, world_size, _ = launch
    store, missing = connect_store(rank, limit, is_first=True), list(range(world_size))
    here = f"MASTER_ADDR = {os.environ['MASTER_ADDR']} and MASTER_PORT = {os.environ['MASTER_PORT']}"

    def who_is_missing() -> str:
        missing[:] = [other for other in missing if not store.check([f"here/{other}"])]
        return in_words(missing)

    try:
        # torchrun gives every rank to one process, and may give it again with the same keys when nodes come and go.
        if "TORCHELASTIC_RUN_ID" not in os.environ and store.add(f"claim/{rank}", 1) > 1:
            raise HarnessError(Exit.CONFIG, f"two processes have RANK = {rank}; give each rank a number of its own")
        store.set(f"here/{rank}", f"{world_size} {socket.gethostname()}")
        await_peer(who_is_missing, limit, lambda who: (
            f"rank {rank} of {world_size} waits for {who}; start what is missing with {here}, which must lead to rank 0"
        ))  # fmt: skip
        told = [store.get(f"here/{other}").decode().split(maxsplit=1) for other in range(world_size)]
    except (RuntimeError, dist.DistError) as error:
        message = f"rank {rank} of {world_size} waited for {in_words(missing)} when rank 0, or torchrun, gave up"
        raise HarnessError(Exit.PEER, f"{message}; start all with {here}") from error
    for other, (number, host) in enumerate(told):
        if number != str(world_size):
            message = f"rank {other} on {host} was started with WORLD_SIZE = {number}, rank {rank} with {world_size}"
            raise HarnessError(Exit.CONFIG, f"{message}; start all with the same")
    return store


def connect_group(launch: Launch, backend: str, timeout_s: float, connect: Callable[[], None]) -> None:
    """connect() ranks that have met. Raises HarnessError PEER where they cannot reach each other."""
    hint = f"set {backend.upper()}_SOCKET_IFNAME to the network interface through which the nodes reach each other"
    met = f"rank {launch.rank} met all others, but {backend}"
    try:
        with at_most(timeout_s, f"{met} did not connect in {timeout_s:.3g} s; {hint}"):
            connect()
    except (RuntimeError, dist.DistError, ValueError) as error:
        raise HarnessError(Exit.PEER, f"{met} cannot connect: {first_line(error)[:300]}; {hint}") from error


@contextlib.contextmanager
def without_stderr() -> Iterator[Callable[[], object]]:
    """torch's C++ would write a page there for each attempt. Gives what ends the silence early."""
    try:
        kept = os.dup(2)
    except OSError:  # it is closed
        yield lambda: None
        return
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
    try:
        yield functools.partial(os.dup2, kept, 2)
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextlib.contextmanager
def at_most(timeout_s: float, message: str, before_message: Callable[[], object] = lambda: None) -> Iterator[None]:
    """A block of torch's code that may wait for good: after timeout_s this process says so and ends."""

    def give_up() -> None:
        before_message()
        print_line(f"error: {message}")
        os._exit(report_exit(Exit.PEER))

    timer = threading.Timer(timeout_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
