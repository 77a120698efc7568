"""How the processes of a run find each other: what their launcher says, and the store where they meet."""

import contextlib
import datetime
import functools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch.distributed as dist

from aurora.errors import Exit, HarnessError
from aurora.trainer.process import first_line, print_line, report_exit

WORD_AFTER_S = 5  # of waiting, who is missing is said
POLL_S = 0.1
WITH_TORCHRUN = "start it with torchrun, which sets them all, or unset them for a run on one process"


class Launch(NamedTuple):
    """What the launcher says."""

    rank: int
    world_size: int
    local_rank: int | None


def read_launch(env: Mapping[str, str] = os.environ) -> Launch:
    """The launch as a whole. Raises HarnessError CONFIG for one that no launcher could mean."""
    present = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if env.get(name)]
    world_size = whole_number(env, "WORLD_SIZE", 1, 2**20) if "WORLD_SIZE" in present else 1
    if "RANK" not in present and world_size == 1:  # addresses alone say nothing
        check_one_task(env)
        return Launch(0, 1, whole_number(env, "LOCAL_RANK", 0, 2**20) if env.get("LOCAL_RANK") else None)
    if missing := [name for name in ("RANK", "WORLD_SIZE") if name not in present]:
        message = f"{', '.join(present)} {'are' if present[1:] else 'is'} set in the environment, but not {missing[0]}"
        raise HarnessError(Exit.CONFIG, f"{message}: {WITH_TORCHRUN}")
    rank = whole_number(env, "RANK", 0, world_size - 1, f"WORLD_SIZE - 1 = {world_size - 1}")
    local_rank = whole_number(env, "LOCAL_RANK", 0, 2**20) if env.get("LOCAL_RANK") else None
    return Launch(rank, world_size, local_rank)


def whole_number(env: Mapping[str, str], name: str, lowest: int, highest: int, limit: str = "") -> int:
    text = env[name].strip()
    if text.isascii() and text.isdigit() and len(text) < 20 and lowest <= int(text) <= highest:
        return int(text)
    message = f"{name} must be a whole number from {lowest} to {limit or highest}, got {env[name][:40]!r}"
    raise HarnessError(Exit.CONFIG, f"{message}: {WITH_TORCHRUN}")


def check_one_task(env: Mapping[str, str]) -> None:
    """Raise HarnessError where a launcher that sets no RANK has started several: each would train a run of its own."""
    # In a batch script Slurm sets some of these for the one process that it starts there.
    is_step = "SLURM_STEP_ID" in env or "SLURM_STEP_NUM_TASKS" in env or env.get("SLURM_PROCID", "0") != "0"
    counts = ["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"] if is_step else []
    name = next((name for name in (*counts, "OMPI_COMM_WORLD_SIZE", "PMI_SIZE") if env.get(name, "").isdigit()), None)
    if name and int(env[name]) > 1:
        message = f"{name} = {env[name]}, but no RANK: each of these tasks would train a run of its own"
        fix = "start one task a node, and in it torchrun --nproc_per_node=GPUS train_gpt.py"
        raise HarnessError(Exit.CONFIG, f"{message}; {fix}")


def store_address(rank: int) -> tuple[str, int]:
    """Where this rank finds the store. Raises HarnessError CONFIG."""
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        message = f"RANK and WORLD_SIZE are set in the environment, but not {' and '.join(missing)}"
        raise HarnessError(Exit.CONFIG, f"{message}: {WITH_TORCHRUN}")
    # Rank 0 has the store itself, where its name for the others may lead elsewhere.
    address = "localhost" if keeps_store(rank) else os.environ["MASTER_ADDR"]
    return address, whole_number(os.environ, "MASTER_PORT", 1, 65535)


def keeps_store(rank: int) -> bool:
    """Otherwise torchrun's agent does."""
    return rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def connect_store(rank: int, timeout_s: float, is_first: bool = False) -> dist.Store:
    """A connection of one's own to the store of MASTER_ADDR and MASTER_PORT; rank 0 makes the store when is_first.

    Each attempt of torchrun --max-restarts has its own keys: it must not find the addresses of ranks that are dead.

    Raises:
        HarnessError: CONFIG or PEER, nobody is there.
    """
    address, port = store_address(rank)
    is_host, place = is_first and keeps_store(rank), f"{address}:{port}"
    if not is_host:
        await_peer(lambda: reason_not_to_reach(address, port), timeout_s, lambda why: (
            f"rank {rank} cannot reach rank 0 at {place} ({why}); start that, or correct MASTER_ADDR and MASTER_PORT"
        ))  # fmt: skip
    stranger = f"rank {rank} finds no store of a run at {place}, only another program"
    fix = "correct MASTER_ADDR, or choose a free MASTER_PORT"
    timeout = datetime.timedelta(seconds=max(1, timeout_s))
    try:
        with without_stderr() as restore, at_most(timeout_s, f"{stranger}; {fix}", restore):
            store = dist.TCPStore(address, port, is_master=is_host, wait_for_workers=False, timeout=timeout)
    except (RuntimeError, dist.DistError, ValueError) as error:
        if is_host and ("EADDRINUSE" in str(error) or "in use" in str(error)):
            message = f"MASTER_PORT = {port} of this machine is in use by another process; choose a free one"
        else:
            message = (
                f"rank {rank} finds no store of a run at {place}: {first_line(error)[:200]}; choose a free MASTER_PORT"
            )
        raise HarnessError(Exit.CONFIG, message) from error
    return dist.PrefixStore(f"speedrun/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def reason_not_to_reach(address: str, port: int) -> str:
    try:
        socket.create_connection((address, port), timeout=1).close()
    except OSError as error:
        return error.strerror or str(error) or type(error).__name__
    return ""


def await_peer(find_obstacle: Callable[[], str], timeout_s: float, describe: Callable[[str], str]) -> None:
    """Wait until there is no obstacle; says after seconds which there is. Raises HarnessError PEER after timeout_s."""
    begin_s, is_said = time.monotonic(), False
    while obstacle := find_obstacle():
        waited_s = time.monotonic() - begin_s
        if waited_s >= timeout_s:
            raise HarnessError(Exit.PEER, f"{describe(obstacle)}, or raise --timeout-s = {timeout_s:g}")
        if waited_s >= WORD_AFTER_S and not is_said:
            print_line(f"waiting, up to {timeout_s:g} s: {describe(obstacle)}")
            is_said = True
        time.sleep(POLL_S)


def in_words(ranks: list[int]) -> str:
    """Some of them; nothing for none."""
    names = f"{', '.join(map(str, ranks[:8]))}{', ...' * (len(ranks) > 8)}"
    return f"rank{'s' * (len(ranks) > 1)} {names}" if ranks else ""


def meet(launch: Launch, timeout_s: float) -> dist.Store:
    """The store, once all ranks are there.

    Raises:
        HarnessError: PEER, naming the ranks that did not come; CONFIG, for a rank that is there twice, or ranks that
            were told different numbers of ranks.
    """
    rank, world_size, _ = launch
    store, missing = connect_store(rank, timeout_s, is_first=True), list(range(world_size))
    here = f"MASTER_ADDR = {os.environ['MASTER_ADDR']} and MASTER_PORT = {os.environ['MASTER_PORT']}"

    def who_is_missing() -> str:
        missing[:] = [other for other in missing if not store.check([f"here/{other}"])]
        return in_words(missing)

    try:
        # torchrun gives every rank to one process, and may give it again with the same keys when nodes come and go.
        if "TORCHELASTIC_RUN_ID" not in os.environ and store.add(f"claim/{rank}", 1) > 1:
            raise HarnessError(Exit.CONFIG, f"two processes have RANK = {rank}; give each rank a number of its own")
        store.set(f"here/{rank}", f"{world_size} {socket.gethostname()}")
        await_peer(who_is_missing, timeout_s, lambda who: (
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
        with at_most(timeout_s, f"{met} did not connect in {timeout_s:g} s; {hint}"):
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
