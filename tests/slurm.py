"""A cluster of one node with Slurm's own daemons. As root, with Debian's slurm-wlm and munge."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
CONFIG = """
ClusterName=speedrun
SlurmctldHost={host}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerParameters=sched_interval=1,batch_sched_delay=0
KillWait=20
NodeName={host} CPUs=4 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=60 State=UP OverSubscribe=YES
"""


def missing() -> str:
    """What of this machine a cluster would lack; empty where it has all."""
    found = [name for name in PROGRAMS if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")]
    if found:
        return f"no {', '.join(found)}: apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "Slurm's daemons are started as root"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def cluster(folder: Path):
    """The environment in which Slurm's commands find a cluster whose files are in the folder."""
    host = socket.gethostname().partition(".")[0]
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(host=host, folder=folder, ports=(free_port(), free_port())))
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    environment = os.environ | {"SLURM_CONF": str(config), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    places = [
        f"--{name}={folder}/munge.{end}"
        for name, end in {
            "socket": "socket",
            "key-file": "key",
            "log-file": "log",
            "pid-file": "pid",
            "seed-file": "seed",
        }.items()
    ]
    daemons = [
        ["munged", "--foreground", "--force", *places],
        ["slurmctld", "-D", "-i", "-f", str(config)],
        ["slurmd", "-D", "-N", host, "-f", str(config)],
    ]  # fmt: skip
    running = []
    try:
        for command in daemons:
            with (folder / f"{command[0]}.out").open("w") as out:
                running.append(subprocess.Popen(command, env=environment, stdout=out, stderr=out))
            time.sleep(0.5)
        wait_for(lambda: "idle" in output(environment, "sinfo", "-h", "-o", "%T"), 30, "an idle node")
        yield environment
    finally:
        subprocess.run(["scancel", "--full", "--user=root"], env=environment, capture_output=True)
        for process in reversed(running):
            process.terminate()
        for process in reversed(running):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=20)


def output(environment, *command: str, **options) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, **options).stdout


def wait_for(is_true, timeout_s: float, what: str) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline_s, f"waited {timeout_s} s for {what}"
        time.sleep(0.3)
