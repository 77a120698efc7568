"""Comparisons as job arrays, runs with a GPU each, launches on several nodes."""

import json
import shlex
import sys

import pytest

from aurora.errors import Exit, HarnessError
from scripts import compare, runs
from tests.conftest import ROOT, train_here
from tests.test_stop_resume import launch_script


def plan(monkeypatch, capsys, track, out, *arguments):
    command = ["compare.py", "--plan", "--config", track, "--optimizers", "muon", "adamw", "--out", out, *arguments]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    assert compare.main() == 0
    return capsys.readouterr().out.splitlines()


def test_a_plan_is_one_command_a_run_which_the_report_collects(tiny_track, tmp_path, monkeypatch, capsys):
    seeds = ["--set", "train.steps=2"]
    lines = plan(monkeypatch, capsys, tiny_track, tmp_path, *seeds)
    assert len(lines) == len({line.partition("--out ")[2] for line in lines}) == 2 and not list(tmp_path.iterdir())
    for line in lines:
        program, script, *arguments = shlex.split(line)
        assert (program, script) == ("python", "train_gpt.py") and arguments[-1] == "--resume"
        with monkeypatch.context() as patch:
            patch.chdir(ROOT)
            where = arguments.index("--out")
            others = arguments[2:where]
            assert train_here(arguments[1], arguments[where + 1], *others, "--resume") == 0
    capsys.readouterr()
    assert plan(monkeypatch, capsys, tiny_track, tmp_path, *seeds) == [], "finished runs are not planned again"
    monkeypatch.setattr(sys, "argv", ["compare.py", "--report", str(tmp_path), "--json"])
    assert compare.main() == 0
    (groups,) = json.loads(capsys.readouterr().out)["tasks"].values()
    assert sorted(len(row["seeds"]) for row in groups["groups"]) == [1, 1]


def test_a_plan_of_runs_on_several_gpus_takes_the_launch_script(tiny_track, tmp_path, monkeypatch, capsys):
    lines = plan(monkeypatch, capsys, tiny_track, tmp_path, "--nproc", "8")
    assert [line.startswith("env NPROC=8 bash scripts/launch.sh --config") for line in lines] == [True, True]


def test_runs_at_a_time_have_a_gpu_each(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "visible_gpus", lambda: ["4", "GPU-5f", "6"])
    workers = runs.Workers(2, tmp_path)
    assert [workers.free.get().gpu for _ in range(2)] == ["4", "GPU-5f"]
    assert runs.Workers(1, tmp_path).free.get() == runs.Place(), "a run alone sees all"
    runs.check_jobs(3)
    with pytest.raises(HarnessError, match="--jobs 4 needs as many GPUs, and torch sees 3: use --jobs 3") as error:
        runs.check_jobs(4)
    assert error.value.reason == Exit.CONFIG


@pytest.mark.parametrize("gpu", ["1", ""])
def test_the_process_of_a_run_sees_its_gpu_alone(tmp_path, monkeypatch, capsys, gpu):
    """Of a machine with more, which this process may be told with a variable, too."""
    (tmp_path / "train_gpt.py").write_text("import os\nprint('sees', os.environ['CUDA_VISIBLE_DEVICES'])")
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    workers = runs.Workers(1, tmp_path / "out")
    assert workers.run_one([], tmp_path, 1, sys.stdout, "", runs.Place(gpu=gpu)) == 0
    assert capsys.readouterr().out == f"sees {gpu or '0,1'}\n"


def test_gpus_are_named_as_the_environment_names_them(monkeypatch):
    import train_gpt

    monkeypatch.setattr(train_gpt.torch.cuda, "device_count", lambda: 2)
    assert runs.visible_gpus() == [], "SPEEDRUN_DEVICE=cpu"
    monkeypatch.delenv("SPEEDRUN_DEVICE")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert runs.visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,7")
    assert runs.visible_gpus() == ["6", "7"]


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"NNODES": "2"}, "launch: with NNODES = 2, RDZV must be HOST:PORT of NODE_RANK 0, got ''"),
        ({"NNODES": "two"}, "launch: NNODES must be a number from 1"),
        ({"NNODES": "2", "NODE_RANK": "2"}, "NODE_RANK one below it, got '2' and '2'"),
    ],
)
def test_launch_script_refuses_nodes_that_cannot_be(environment, message):
    process = launch_script(env=environment)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 2 and message in said and said.count("\n") == 1
