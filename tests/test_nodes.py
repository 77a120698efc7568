"""Two nodes, as network namespaces that reach each other by a cable alone, with torchrun between them."""

import os
import shutil
import signal
import subprocess
import time

import pytest

from aurora.errors import Exit
from tests.conftest import events, losses, start_process, torchrun
from tests.slurm import wait_for
from tests.test_stop_resume import LONG_RUN, launch_script

pytestmark = pytest.mark.slow
PORT = 29611


def ip(*words, **options):
    return subprocess.run(["ip", *map(str, words)], capture_output=True, text=True, timeout=30, **options)


class Nodes:
    """Namespaces with an interface eth0 each; node 0 is 10.77.0.1, node 1 is 10.77.0.2."""

    def __init__(self):
        self.names = [f"speedrun{os.getpid()}n{number}" for number in range(2)]

    def __enter__(self):
        for name in self.names:
            ip("netns", "add", name, check=True)
        first, second = self.names
        ip("-n", first, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", second, check=True)
        for number, name in enumerate(self.names):
            ip("-n", name, "address", "add", f"10.77.0.{number + 1}/24", "dev", "eth0", check=True)
            self.cable("up", number)
            ip("-n", name, "link", "set", "lo", "up", check=True)
        return self

    def __exit__(self, *error):
        for number, name in enumerate(self.names):
            self.signal(number, signal.SIGKILL)
            ip("netns", "del", name)

    def cable(self, state, number):
        ip("-n", self.names[number], "link", "set", "eth0", state, check=True)

    def signal(self, number, signum):
        """To all processes of a node."""
        for pid in ip("netns", "pids", self.names[number]).stdout.split():
            os.kill(int(pid), signum)

    def start(self, out, *arguments):
        """launch.sh on both, with what each says in a file."""
        started = []
        for number, name in enumerate(self.names):
            env = {"NNODES": "2", "NODE_RANK": str(number), "RDZV": f"10.77.0.1:{PORT}", "GLOO_SOCKET_IFNAME": "eth0"}
            env |= {"LOCAL_ADDR": f"10.77.0.{number + 1}", "RETRIES": "0"}
            with (out.parent / f"said{number}").open("w") as said:
                pipes = {"stdout": said, "stderr": subprocess.STDOUT}
                words = [*arguments, "--out", out]
                started.append(launch_script(*words, before=["ip", "netns", "exec", name], env=env, **pipes))
        return started


@pytest.fixture
def nodes():
    if os.geteuid() or not shutil.which("ip") or ip("netns", "add", "speedruntest").returncode:
        pytest.skip("network namespaces need root and ip of iproute2")
    ip("netns", "del", "speedruntest")
    with Nodes() as found:
        yield found


def said(out, number):
    return (out.parent / f"said{number}").read_text(errors="replace")


def ended(processes, timeout_s=300):
    return [process.wait(timeout=timeout_s) for process in processes]


def test_two_nodes_have_the_losses_of_one(nodes, twelve_steps, tmp_path):
    out, one = tmp_path / "two" / "out", tmp_path / "one"
    out.parent.mkdir()
    assert ended(nodes.start(out, *twelve_steps, "--timeout-s", "60")) == [0, 0], said(out, 0) + said(out, 1)
    process = start_process(*torchrun(2), "train_gpt.py", *map(str, twelve_steps), "--out", str(one))
    process.communicate(timeout=300)
    assert losses(out) == losses(one) and events(out)[0]["world_size"] == 2


@pytest.mark.parametrize("fault", ["killed", "cut off", "stopped"])
def test_a_node_that_is_lost_is_named_in_time_and_the_requeued_run_goes_on(nodes, twelve_steps, tmp_path, fault):
    out = tmp_path / "out"
    words = [*twelve_steps[:2], "--timeout-s", "30", *LONG_RUN]
    processes = nodes.start(out, *words)
    wait_for(lambda: list(out.glob("*.checkpoints/step-*")), 300, f"a checkpoint: {said(out, 0)}")
    begin_s = time.monotonic()
    if fault == "cut off":
        nodes.cable("down", 1)
    else:
        nodes.signal(1, signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
    assert processes[0].wait(timeout=200) == Exit.PEER, said(out, 0)
    assert time.monotonic() - begin_s < 150, "--timeout-s, and the 30 s that torchrun gives processes to end"
    assert "lost a peer: rank 1" in said(out, 0) or "rank 1" in said(out, 0).partition("error: ")[2], said(out, 0)
    if fault == "cut off":
        nodes.cable("up", 1)
    for number in range(2):
        nodes.signal(number, signal.SIGKILL)
    processes = nodes.start(out, *words, "--resume")
    wait_for(lambda: "resume: from step" in said(out, 0), 300, f"the resume: {said(out, 0)}")
    wait_for(lambda: "eta:" in said(out, 0), 60, "its steps")
    processes[1].send_signal(signal.SIGTERM)
    assert ended(processes) == [Exit.PREEMPTED] * 2, said(out, 0) + said(out, 1)
