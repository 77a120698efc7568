"""Several nodes, as network namespaces that reach each other by a switch alone, with torchrun between them."""

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
    """Namespaces with an interface eth0 each, on one switch; node N is 10.77.0.(N + 1)."""

    def __init__(self, count):
        self.names = [f"speedrun{os.getpid()}n{number}" for number in range(count)]
        self.switch = f"speedrun{os.getpid()}switch"

    def __enter__(self):
        for name in (self.switch, *self.names):
            ip("netns", "add", name, check=True)
        ip("-n", self.switch, "link", "add", "bridge", "type", "bridge", check=True)
        ip("-n", self.switch, "link", "set", "bridge", "up", check=True)
        for number, name in enumerate(self.names):
            port = f"port{number}"
            ip(
                "-n",
                name,
                "link",
                "add",
                "eth0",
                "type",
                "veth",
                "peer",
                "name",
                port,
                "netns",
                self.switch,
                check=True,
            )
            ip("-n", self.switch, "link", "set", port, "master", "bridge", "up", check=True)
            ip("-n", name, "address", "add", f"10.77.0.{number + 1}/24", "dev", "eth0", check=True)
            self.cable("up", number)
            ip("-n", name, "link", "set", "lo", "up", check=True)
        return self

    def __exit__(self, *error):
        for number in range(len(self.names)):
            self.signal(number, signal.SIGKILL)
        for name in (*self.names, self.switch):
            ip("netns", "del", name)

    def cable(self, state, number):
        ip("-n", self.names[number], "link", "set", "eth0", state, check=True)

    def signal(self, number, signum):
        """To all processes of a node."""
        for pid in ip("netns", "pids", self.names[number]).stdout.split():
            os.kill(int(pid), signum)

    def start(self, out, *arguments):
        """launch.sh on all, with what each says in a file."""
        started = []
        for number, name in enumerate(self.names):
            env = {
                "NNODES": str(len(self.names)),
                "NODE_RANK": str(number),
                "RDZV": f"10.77.0.1:{PORT}",
                "GLOO_SOCKET_IFNAME": "eth0",
            }
            env |= {"LOCAL_ADDR": f"10.77.0.{number + 1}", "RETRIES": "0"}
            with (out.parent / f"said{number}").open("w") as said:
                pipes = {"stdout": said, "stderr": subprocess.STDOUT}
                words = [*arguments, "--out", out]
                started.append(launch_script(*words, before=["ip", "netns", "exec", name], env=env, **pipes))
        return started

    def lose(self, percent, number):
        """Of the packets that reach a node, at random. There is no netem here, so nftables drops them."""
        nft = ["ip", "netns", "exec", self.names[number], "nft"]
        chain = "add chain inet lossy in { type filter hook input priority 0; }"
        for words in ("add table inet lossy", chain, f"add rule inet lossy in numgen random mod 100 < {percent} drop"):
            subprocess.run([*nft, words], check=True, timeout=30)


@pytest.fixture
def nodes(request):
    """As many as the test's parameter says, else two."""
    if os.geteuid() or not shutil.which("ip") or ip("netns", "add", "speedruntest").returncode:
        pytest.skip("network namespaces need root and ip of iproute2")
    ip("netns", "del", "speedruntest")
    with Nodes(getattr(request, "param", 2)) as found:
        yield found


def said(out, number):
    return (out.parent / f"said{number}").read_text(errors="replace")


def ended(processes, timeout_s=300):
    return [process.wait(timeout=timeout_s) for process in processes]


def losses_of_one_node(arguments, ranks, out):
    process = start_process(*torchrun(ranks), "train_gpt.py", *map(str, arguments), "--out", str(out))
    process.communicate(timeout=300)
    return losses(out)


def all_said(out, count):
    return "".join(said(out, number) for number in range(count))


@pytest.mark.parametrize("nodes", [2, 4], indirect=True)
def test_several_nodes_have_the_losses_of_one(nodes, twelve_steps, tmp_path):
    out, count = tmp_path / "several" / "out", len(nodes.names)
    out.parent.mkdir()
    assert ended(nodes.start(out, *twelve_steps, "--timeout-s", "60")) == [0] * count, all_said(out, count)
    assert losses(out) == losses_of_one_node(twelve_steps, count, tmp_path / "one")
    assert events(out)[0]["world_size"] == count


def test_lost_packets_and_a_node_that_stalls_change_nothing(nodes, twelve_steps, tmp_path):
    """Each node loses 2 % of what reaches it, and one is stopped for a while that is shorter than --timeout-s."""
    if not shutil.which("nft"):
        pytest.skip("losing packets needs nft of nftables")
    out = tmp_path / "several" / "out"
    out.parent.mkdir()
    for number in range(2):
        nodes.lose(2, number)
    words = [*twelve_steps[:2], *LONG_RUN, "--set", "train.steps=1000", "--set", "eval.every=250"]
    processes = nodes.start(out, *words, "--timeout-s", "60")
    wait_for(lambda: "step:250/" in said(out, 0), 300, f"a validation: {said(out, 0)}")
    nodes.signal(1, signal.SIGSTOP)
    time.sleep(5)
    nodes.signal(1, signal.SIGCONT)
    assert ended(processes) == [0, 0], all_said(out, 2)
    steps = [event["step_ms"] for event in events(out) if event["event"] == "train"]
    assert max(steps) * events(out)[0]["config"]["train"]["log_every"] > 4000, "it waited"
    assert losses(out) == losses_of_one_node(words, 2, tmp_path / "one")


@pytest.mark.parametrize(
    "nodes, fault", [(2, "killed"), (2, "cut off"), (2, "stopped"), (4, "killed")], indirect=["nodes"]
)
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
    count = len(nodes.names)
    for number in range(count):
        nodes.signal(number, signal.SIGKILL)
    processes = nodes.start(out, *words, "--resume")
    wait_for(lambda: "resume: from step" in said(out, 0), 300, f"the resume: {said(out, 0)}")
    wait_for(lambda: "eta:" in said(out, 0), 60, "its steps")
    processes[1].send_signal(signal.SIGTERM)
    assert ended(processes) == [Exit.PREEMPTED] * count, all_said(out, count)
