"""Launches that cannot work: told as a whole, in one line, after seconds; and legitimate ones that are taken."""

import re
import socket
import time

import pytest

from aurora.errors import Exit
from aurora.trainer.launcher import Launch, read_launch
from aurora.trainer.ranks import shared_variables
from tests.conftest import start_process, train_here

WRONG = {
    "WORLD_SIZE is not set": ({"RANK": "0"}, "RANK is set in the environment, but not WORLD_SIZE: start it with torch"),
    "RANK is not set": ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set in the environment, but not RANK"),
    "no number": (
        {"RANK": "x", "WORLD_SIZE": "2"},
        "RANK must be a whole number from 0 to WORLD_SIZE - 1 = 1, got 'x'",
    ),
    "rank too high": ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK must be a whole number from 0 to WORLD_SIZE - 1 = 1"),
    "negative": ({"RANK": "0", "WORLD_SIZE": "-1"}, "WORLD_SIZE must be a whole number from 1"),
    "local rank": ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "a"}, "LOCAL_RANK must be a whole number"),
    "no address": ({"RANK": "1", "WORLD_SIZE": "2"}, "but not MASTER_ADDR and MASTER_PORT: start it with torchrun"),
    "port": (
        {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "99999"},
        "MASTER_PORT must be a whole number from 1 to 65535, got '99999'",
    ),
    "srun": ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, "SLURM_NTASKS = 8, but no RANK: each"),
    "srun, task 1": ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "torchrun --nproc_per_node=GPUS train_gpt.py"),
    "mpirun": ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE = 2, but no RANK"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_launch_that_cannot_be_meant_is_told_in_one_line(tiny_track, tmp_path, monkeypatch, capsys, case):
    environment, message = WRONG[case]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert train_here(tiny_track, tmp_path) == Exit.CONFIG
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_wrong_launch_answers_without_importing_torch(tmp_path):
    with socket.create_server(("", 0)) as server:
        port = str(server.getsockname()[1])
        in_use = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        cases = [WRONG[case] for case in ("WORLD_SIZE is not set", "no address", "srun")]
        for environment, message in [*cases, (in_use, f"MASTER_PORT = {port} of this machine is in use")]:
            command = ["-X", "importtime", "train_gpt.py", "--out", str(tmp_path)]
            process = start_process(*command, env=environment)
            _, err = process.communicate(timeout=60)
            said = [line for line in err.splitlines() if not line.startswith("import time:")]
            assert process.returncode == Exit.CONFIG and len(said) == 1 and message in said[0]
            assert not re.search(r"^import time:.* torch$", err, re.MULTILINE)


@pytest.mark.parametrize(
    "environment",
    [{}, {"WORLD_SIZE": "1"}, {"RANK": "0", "WORLD_SIZE": "1"}, {"MASTER_ADDR": "gpu7", "MASTER_PORT": "29500"},
     {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}],
)  # fmt: skip
def test_a_run_on_one_process_is_one_whatever_else_is_set(environment):
    assert read_launch(environment) == Launch(0, 1, None)


def test_what_belongs_to_one_node_may_differ_between_ranks():
    shared = {"NCCL_ALGO": "Ring", "OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    own = dict.fromkeys(
        ("NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_TOPO_FILE", "NCCL_IB_GID_INDEX", "NCCL_HOSTID", "OMP_PLACES",
         "TORCHINDUCTOR_CACHE_DIR", "TORCH_HOME", "CUDA_VISIBLE_DEVICES", "TORCHELASTIC_RUN_ID"), "a")  # fmt: skip
    assert shared_variables({"variables": shared | own}) == shared


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def join(launch, out, environments, timeout_s=1.5):
    """Processes of one environment each that were to be ranks, without torchrun."""
    patch = f"os.environ.pop('TORCHELASTIC_RUN_ID'); os.environ.update({environments!r}[rank])"
    shared = {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    arguments = ["--out", out, "--timeout-s", timeout_s]
    return launch(*arguments, world_size=len(environments), patch=patch, env=shared, timeout_s=timeout_s + 6)


def test_a_rank_that_does_not_come_is_named_after_the_timeout(launch, tmp_path):
    outcome = join(launch, tmp_path, [{"RANK": "0", "WORLD_SIZE": "3"}, {"RANK": "2", "WORLD_SIZE": "3"}])
    assert outcome.codes == [Exit.PEER] * 2
    assert "error: rank 0 of 3 waits for rank 1; start what is missing with MASTER_ADDR = 127.0.0.1" in outcome.err[0]
    assert "or raise --timeout-s = 1.5" in outcome.err[0] and outcome.err[0].count("\n") == 1
    assert re.search("error: rank 2 of 3 wait(s|ed) for rank 1", outcome.err[1])


def test_who_is_missing_is_said_long_before_the_timeout(launch, tmp_path):
    early = "import aurora.trainer.rendezvous as r; r.WORD_AFTER_S = 0.2"
    shared = {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(free_port()), "RANK": "0", "WORLD_SIZE": "2"}
    outcome = launch("--out", tmp_path, "--timeout-s", "1", patch=early, env=shared, timeout_s=10)
    waiting, error = outcome.err[0].splitlines()
    assert waiting.startswith("waiting, up to 1 s: rank 0 of 2 waits for rank 1") and error.startswith("error: rank 0")


def test_the_timeout_counts_from_the_first_line_of_a_process(launch, tmp_path):
    """Importing torch takes seconds of it."""
    patch = "from aurora.trainer.stops import stops; stops.catch(); stops.begin_s -= 59"
    shared = {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    for rank in ("0", "1"):
        begin_s = time.time()
        outcome = launch("--out", tmp_path, "--timeout-s", "60", patch=patch, env=shared | {"RANK": rank}, timeout_s=10)
        assert outcome.codes == [Exit.PEER] and "or raise --timeout-s = 60" in outcome.err[0]
        assert outcome.ended_s[0] - begin_s < 5


def test_addresses_where_rank_0_is_not_are_told(launch, tmp_path):
    with socket.create_server(("", 0)) as silent:
        taken = str(silent.getsockname()[1])
        unreachable = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "no-such-host.invalid"}
        not_rank_0 = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": str(free_port())}
        in_use, another = ({"RANK": rank, "WORLD_SIZE": "2", "MASTER_PORT": taken} for rank in ("0", "1"))
        outcome = join(launch, tmp_path, [not_rank_0, unreachable, in_use, another])
    assert outcome.codes == [Exit.PEER, Exit.PEER, Exit.CONFIG, Exit.PEER], outcome.err
    address = f"127.0.0.1:{not_rank_0['MASTER_PORT']}"
    assert f"rank 1 cannot reach rank 0 at {address} (Connection refused); start that, or correct" in outcome.err[0]
    assert "no-such-host.invalid" in outcome.err[1] and "correct MASTER_ADDR and MASTER_PORT" in outcome.err[1]
    assert f"MASTER_PORT = {taken} of this machine is in use by another process; choose a free one" in outcome.err[2]
    assert f"rank 1 finds no store of a run at 127.0.0.1:{taken}" in outcome.err[3]
    assert all(text.count("error: ") == 1 and "Traceback" not in text for text in outcome.err)


def test_ranks_that_are_there_twice_or_were_told_other_numbers_are_named(launch, tmp_path):
    outcome = join(launch, tmp_path, [{"RANK": rank, "WORLD_SIZE": "3"} for rank in ("0", "1", "1")])
    assert sorted(outcome.codes) == [Exit.CONFIG, Exit.PEER, Exit.PEER]
    assert sum("two processes have RANK = 1; give each rank a number of its own" in text for text in outcome.err) == 1
    outcome = join(launch, tmp_path, [{"RANK": "0", "WORLD_SIZE": "2"}, {"RANK": "1", "WORLD_SIZE": "3"}])
    assert outcome.codes[0] == Exit.CONFIG
    assert "was started with WORLD_SIZE = 3, rank 0 with 2; start all with the same" in outcome.err[0]


def test_ranks_that_meet_and_cannot_talk_are_told_which_variable_to_set(launch, tmp_path):
    environments = [{"RANK": rank, "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "nosuch0"} for rank in ("0", "1")]
    outcome = join(launch, tmp_path, environments)
    assert outcome.codes == [Exit.PEER] * 2
    assert all("set GLOO_SOCKET_IFNAME to the network interface" in text for text in outcome.err)
