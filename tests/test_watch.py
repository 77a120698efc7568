"""Which process the watch takes for a rank, and which time it counts."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from aurora.trainer import watch
from aurora.trainer.ranks import Ranks
from tests.conftest import events


class FakeStore(dict):
    def check(self, keys):
        return all(key in self for key in keys)

    def multi_get(self, keys):
        return [self[key] for key in keys]

    set = dict.__setitem__


@pytest.fixture
def watched(monkeypatch):
    """The watch of rank 0 of two, without its thread; function that publishes what rank 1 says of its process."""
    store, seen = FakeStore(), watch.Watch(Ranks(0, 2, torch.device("cpu")), timeout_s=60)
    monkeypatch.setattr(watch, "connect_store", lambda *args: store)
    monkeypatch.setattr(watch.threading.Thread, "start", lambda self: None)
    seen.started()

    def say(beat, pid, machine, started):
        text = watch.json.dumps(watch.State(beat, 1, 0, "fetch", 3, pid, os.uname().nodename, machine, started, False))
        store["watch/1"] = text
        seen.poll()

    return seen, say


def test_a_process_is_named_by_machine_container_number_and_start(watched):
    seen, say = watched
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    here, started = watch.this_machine(), watch.start_of(child.pid)
    try:
        assert here and started
        gone = []
        for machine, start in ((here, started), (here, "1"), ("another container", started), ("", "")):
            say(len(gone) + 1, child.pid, machine, start)
            gone.append(seen.states[1].is_gone)
        assert gone == [False, True, False, False]  # of a process whose number was given anew, the rank is gone
    finally:
        child.kill()
        child.wait()
    say(9, child.pid, here, started)
    assert seen.states[1].is_gone


def test_a_stranger_with_the_number_of_a_silent_rank_is_not_killed(watched, monkeypatch):
    seen, say = watched
    ended = []
    monkeypatch.setattr(watch.os, "_exit", ended.append)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as child:
        try:
            for number, (machine, start) in enumerate(
                (("another container", "1"), (watch.this_machine(), "1")), start=1
            ):
                say(number, child.pid, machine, start)
                seen.now_s += 100
                seen.end("test")
                assert child.poll() is None and len(ended) == number
            say(3, child.pid, watch.this_machine(), watch.start_of(child.pid))
            seen.now_s += 100
            seen.end("test")
            assert child.wait(timeout=10) == -signal.SIGKILL  # it is that rank
        finally:
            child.kill()


def test_time_in_which_the_watch_did_not_run_is_not_counted(watched, monkeypatch):
    seen, say = watched
    say(1, 0, "", "")
    seen.read_s -= 1000  # as if suspended
    seen.poll()
    assert seen.silent(seen.timeout_s) is None and seen.now_s < 10


@pytest.mark.slow
def test_a_job_that_was_suspended_as_a_whole_goes_on(twelve_steps, launch, tmp_path):
    patch = (
        "import signal, subprocess, time\n"
        "if rank == 0:\n"
        "    pause = f'sleep 0.5; kill -STOP -- {os.getpid()} $0; sleep 4; kill -CONT -- {os.getpid()} $0'\n"
        f"open({str(tmp_path)!r} + f'/pid{{rank}}', 'w').write(str(os.getpid()))\n"
        "original = train_gpt.train_step\n"
        "def step(run, model, number, *rest):\n"
        "    if number == 4 and rank == 0:\n"
        f"        peer = open({str(tmp_path)!r} + '/pid1').read()\n"
        "        subprocess.Popen(['sh', '-c', pause, peer], start_new_session=True)\n"
        "    time.sleep(0.15)\n"
        "    return original(run, model, number, *rest)\n"
        "train_gpt.train_step = step\n"
    )
    arguments = [*twelve_steps[:2], "--timeout-s", "2", "--out", tmp_path / "out"]
    outcome = launch(*arguments, world_size=2, patch=patch, timeout_s=40)
    assert outcome.codes == [0, 0], outcome.err
    assert events(tmp_path / "out")[-1]["status"] == "done"
