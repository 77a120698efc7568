"""scripts/slurm.sbatch under Slurm's own daemons, a cluster of one node in this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import slurm
from tests.conftest import ROOT, events
from tests.test_stop_resume import LONG_RUN

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(slurm.missing()), reason=slurm.missing())]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm.cluster(tmp_path_factory.mktemp("slurm")) as environment:
        python = Path(sys.executable).parent
        yield environment | {"SPEEDRUN_SETUP": f"export PATH={python}:$PATH", "SPEEDRUN_DEVICE": "cpu"}


def submit(cluster, tmp_path, *words, cwd=ROOT):
    """The number of the job. Its log is log-<array job>_<task>."""
    command = ["sbatch", "--parsable", f"--output={tmp_path}/log-%a", "--time=10", *map(str, words)]
    done = subprocess.run(command, env=cluster, cwd=cwd, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def log(tmp_path):
    return "".join(path.read_text(errors="replace") for path in sorted(tmp_path.glob("log-*")))


def wait_until_gone(cluster, job, tmp_path, timeout_s=400):
    try:
        slurm.wait_for(lambda: not slurm.output(cluster, "squeue", "-h", "-j", job).strip(), timeout_s, "the job")
    except AssertionError as error:
        raise AssertionError(f"{error}: {slurm.output(cluster, 'squeue')}{log(tmp_path)}") from None


def test_a_warning_saves_the_requeued_job_goes_on_and_a_cancelled_one_stays_away(cluster, twelve_steps, tmp_path):
    out = tmp_path / "out"
    words = [*twelve_steps[:2], "--timeout-s", "60", *LONG_RUN, "--out", out]
    job = submit(cluster | {"NPROC": "2"}, tmp_path, "scripts/slurm.sbatch", *words)
    trains = lambda: "step:0/" in log(tmp_path)  # noqa: E731
    slurm.wait_for(trains, 300, f"the first step: {log(tmp_path)}")
    subprocess.run(["scancel", "--signal=USR1", job], env=cluster, check=True)  # as --signal does: to the steps
    requeued = lambda: f"saved, job {job} is requeued" in log(tmp_path)  # noqa: E731
    slurm.wait_for(requeued, 60, "the requeue")
    assert events(out)[-1]["status"] == "interrupted" and list(out.glob("*.checkpoints/step-*"))
    goes_on = lambda: "segment 2" in log(tmp_path).rpartition("step:")[0]  # noqa: E731
    slurm.wait_for(goes_on, 300, "the second start")
    subprocess.run(["scancel", job], env=cluster, check=True)
    wait_until_gone(cluster, job, tmp_path)
    assert [event["event"] for event in events(out)].count("resume") == 1
    assert log(tmp_path).count("is requeued") == 1 and events(out)[-1]["status"] == "interrupted"


def test_an_array_runs_the_plan_which_the_report_collects(cluster, tiny_track, tmp_path):
    out, plan = tmp_path / "out", tmp_path / "plan.txt"
    command = [sys.executable, "scripts/compare.py", "--config", tiny_track, "--optimizers", "muon", "adamw"]
    command += ["--seeds", "0", "1", "--set", "train.steps=10", "--out", out]
    environment = os.environ | {"SPEEDRUN_DEVICE": "cpu"}
    plan.write_text(slurm.output(environment, *map(str, command), "--plan", cwd=ROOT))
    assert len(plan.read_text().splitlines()) == 4
    job = submit(cluster, tmp_path, "--array=1-5%2", "scripts/slurm.sbatch", plan)
    wait_until_gone(cluster, job, tmp_path)
    assert "has no line 5; give --array=1-4" in log(tmp_path)
    found = slurm.output(environment, sys.executable, "scripts/compare.py", "--report", str(out), "--json", cwd=ROOT)
    (task,) = json.loads(found)["tasks"].values()
    assert sorted(len(row["seeds"]) for row in task["groups"]) == [2, 2], log(tmp_path)


def test_a_job_from_another_folder_says_where_to_submit(cluster, tmp_path):
    job = submit(cluster, tmp_path, ROOT / "scripts/slurm.sbatch", cwd=tmp_path)
    wait_until_gone(cluster, job, tmp_path)
    assert f"submit from the folder of the checkout, not from {tmp_path}" in log(tmp_path)
