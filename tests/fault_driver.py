"""Forks the ranks of run after run from one process that has imported torch once: real processes, cheap to start.

Reads jobs from stdin, answers on stdout, a line of JSON each; see tests/conftest.py, Launcher.
"""

import json
import os
import signal
import sys
import time

import torch
import torch.distributed as dist

import train_gpt
from tests import faults


def store_port() -> int:
    """The port of a store for all ranks, in a process of its own, as torchrun's agent has one."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(writing, str(store.port).encode())
        while os.getppid() == driver:
            time.sleep(0.5)
        os._exit(0)
    return int(os.read(reading, 20))


def be_rank(job: dict, rank: int) -> None:
    for name in ("out", "err"):
        handle = os.open(f"{job['logs']}/{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1 if name == "out" else 2)
    os.environ.update(job["env"])
    if job["world_size"] > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(job["world_size"]), TORCHELASTIC_RESTART_COUNT=str(job["id"]))
    faults.subscribe(rank)
    faults.corrupt_numbers(rank, train_gpt)
    code = 99
    try:
        exec(job["patch"], {"rank": rank, "train_gpt": train_gpt, "torch": torch, "os": os})
        sys.argv = ["train_gpt.py", *job["argv"]]  # which the record states
        code = train_gpt.main(job["argv"])
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def run(job: dict) -> dict:
    """Exit codes (negative: signals) and times of the end, by rank; those left after job["timeout_s"] are killed."""
    begin_s = time.monotonic()
    pids = []
    for rank in range(job["world_size"]):
        pid = os.fork()
        if pid == 0:
            be_rank(job, rank)
        pids.append(pid)
    codes, ended_s = {}, {}
    while len(codes) < len(pids):
        for rank, pid in enumerate(pids):
            if rank not in codes and (status := os.waitpid(pid, os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(status[1])
                ended_s[rank] = time.time()
        if time.monotonic() - begin_s > job["timeout_s"]:
            for rank in set(range(len(pids))) - set(codes):
                os.kill(pids[rank], signal.SIGKILL)
        time.sleep(0.005)
    ranks = sorted(codes)
    return {"codes": [codes[rank] for rank in ranks], "ended_s": [ended_s[rank] for rank in ranks]}


if __name__ == "__main__":
    driver = os.getpid()
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(store_port()),
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RUN_ID="tests",
    )
    for number, line in enumerate(sys.stdin):
        print(json.dumps(run(json.loads(line) | {"id": number})), flush=True)
