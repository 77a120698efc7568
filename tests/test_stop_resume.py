"""Signals, and which run --resume takes. Kills and broken checkpoints are in test_faults.py."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train_gpt
from aurora.errors import Exit
from tests.conftest import ROOT, events, often, start_process, torchrun, train_here

SIGNAL_AT_6 = """
original = train_gpt.train_step
def step(run, model, number):
    if number == 6:
        for signum in {signals}:
            os.kill(os.getpid(), signum)
    return original(run, model, number)
train_gpt.train_step = step
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, often(signal.SIGINT, False), signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_stops_with_a_checkpoint(twelve_steps, launch, tmp_path, signum):
    outcome = launch(*twelve_steps, "--out", tmp_path, patch=SIGNAL_AT_6.format(signals=[int(signum)]))
    assert outcome.codes == [Exit.PREEMPTED] and "--resume" in outcome.err[0]
    assert events(tmp_path)[-1]["status"] == "interrupted" and events(tmp_path)[-1]["step"] == 7
    assert [path.name for path in sorted(tmp_path.glob("*.checkpoints/*"))] == ["step-000006", "step-000007"]


def test_ctrl_c_twice_means_now(twelve_steps, launch, tmp_path):
    outcome = launch(*twelve_steps, "--out", tmp_path, patch=SIGNAL_AT_6.format(signals=[2, 2]))
    assert outcome.codes == [128 + signal.SIGINT] and not outcome.err[0]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_before_torch_is_imported_ends_in_one_line(tmp_path, signum):
    code = "import os, runpy, sys; sys.argv = ['train_gpt.py']\n"
    code += f"import aurora.command_line as c; c.parse_args = lambda *args: os.kill(os.getpid(), {int(signum)})\n"
    process = start_process("-c", code + "runpy.run_path('train_gpt.py', run_name='__main__')")
    _, said = process.communicate(timeout=60)
    assert process.returncode == Exit.PREEMPTED, said
    assert said == "stopped: before the first step, so there is nothing to save; the same command starts again\n"


@pytest.mark.parametrize("place, code", [("warm_up:0", Exit.PREEMPTED), ("end:12", 0), ("validation:12", 0)])
def test_a_signal_before_the_first_step_or_after_the_last_costs_nothing(twelve_steps, launch, tmp_path, place, code):
    outcome = launch(*twelve_steps, "--out", tmp_path, fault=f"term:{place}")
    assert outcome.codes == [code], outcome.err
    assert outcome.err[0].count("\n") == (code != 0) and (not code or "nothing to save" in outcome.err[0])
    assert code or events(tmp_path)[-1]["status"] == "done"


def test_a_signal_in_the_warm_up_of_several_ranks_stops_all_after_the_first_step(twelve_steps, launch, tmp_path):
    outcome = launch(*twelve_steps, "--out", tmp_path, world_size=2, fault="term:warm_up:0:1")
    assert outcome.codes == [Exit.PREEMPTED] * 2
    assert [path.name for path in tmp_path.glob("*.checkpoints/*")] == ["step-000001"]


def test_what_the_caller_ignores_or_handles_stays_so(tiny_track, tmp_path):
    before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "train", lambda *args: os.kill(os.getpid(), signal.SIGHUP))  # as under nohup
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            assert train_here(tiny_track, tmp_path) == 0
        finally:
            signal.signal(signal.SIGHUP, before[signal.SIGHUP])
    assert before == {name: signal.getsignal(name) for name in before}


LONG = {"data.allow_epochs": "true", "train.steps": "100000", "eval.every": "50000", "eval.late_every": "50000"}
LONG_RUN = [word for key, value in LONG.items() for word in ("--set", f"{key}={value}")]


def signal_in_mid_run(process, signum):
    """Send the signal after step 0; what the process says then."""
    for line in process.stdout:
        if line.startswith("step:0/"):
            break
    time.sleep(0.3)
    process.send_signal(signum)
    return process.communicate(timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGUSR1])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_signal_to_torchrun_saves_a_checkpoint(twelve_steps, tmp_path, signum, num_processes):
    """torchrun hands SIGHUP on, and dies of SIGUSR1."""
    command = [*torchrun(num_processes), "train_gpt.py", *map(str, twelve_steps), *LONG_RUN, "--out", str(tmp_path)]
    signal_in_mid_run(start_process(*command), signum)
    deadline_s = time.monotonic() + 20
    while events(tmp_path)[-1]["event"] != "end" and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert events(tmp_path)[-1]["status"] == "interrupted"
    assert list(tmp_path.glob("*.checkpoints/step-*"))


def launch_script(*arguments, before=(), **options):
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | options.pop("env", {})
    command = [*before, "bash", str(ROOT / "scripts" / "launch.sh"), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, **pipes | options)


def test_launch_script_refuses_numbers_that_are_none(tmp_path):
    for env in ({"NPROC": "two"}, {"NPROC": "0"}, {"RETRIES": "-1"}):
        process = launch_script("--out", tmp_path, env=env)
        _, said = process.communicate(timeout=30)
        assert process.returncode == 2 and said.startswith("launch: NPROC must be") and said.count("\n") == 1


@pytest.mark.parametrize("after_s", [0, 0.7])  # at the first line of Python, or before it; torch takes longer
def test_launch_script_hears_a_signal_while_it_checks_the_arguments(twelve_steps, tmp_path, after_s):
    process = launch_script(*twelve_steps, "--out", tmp_path)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    is_checking = False
    while not is_checking:
        time.sleep(0.001)
        with contextlib.suppress(FileNotFoundError):  # a child that has ended meanwhile
            commands = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children.read_text().split()]
            is_checking = any(b"--dry-run" in command for command in commands)
    time.sleep(after_s)
    process.send_signal(signal.SIGHUP)
    _, said = process.communicate(timeout=30)
    assert process.returncode == Exit.PREEMPTED and "nothing to save" in said and said.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGUSR1])
def test_launch_script_saves_on_every_signal_and_finds_files_from_another_folder(twelve_steps, tmp_path, signum):
    track = Path(os.path.relpath(twelve_steps[1], tmp_path))
    process = launch_script("--config", track, *LONG_RUN, "--out", "runs", cwd=tmp_path)
    _, said = signal_in_mid_run(process, signum)
    assert process.returncode == Exit.PREEMPTED, said
    assert list(tmp_path.glob("runs/*.checkpoints/step-*"))


def test_stop_agreed_upon_while_reading_before_a_validation_still_saves(tiny_track, tmp_path, monkeypatch):
    """On CUDA the guard's answer arrives a step late, possibly between the validation's start and its end."""
    original = train_gpt.validate

    def stop_while_validating(run, model):
        run.guard.must_stop = run.loader.step > 0
        return original(run, model)

    monkeypatch.setattr(train_gpt, "validate", stop_while_validating)
    assert train_here(tiny_track, tmp_path) == Exit.PREEMPTED
    assert [path.name for path in tmp_path.glob("*.checkpoints/*")] == ["step-000010"]


def test_resume_without_checkpoint_starts_over_and_with_another_config_refuses(tiny_track, tmp_path, capsys):
    arguments = ["--optimizer", "muon", "--set", "train.checkpoint_every=10"]
    assert train_here(tiny_track, tmp_path, *arguments, "--resume") == 0
    assert "no unfinished run with a checkpoint" in capsys.readouterr().out
    record = next(tmp_path.glob("*.jsonl"))
    record.write_text("".join(record.read_text().splitlines(keepends=True)[:-1]))  # as if it had not finished
    other = [*arguments, "--set", "optimizer.muon.lr=0.03", "--resume"]
    assert train_here(tiny_track, tmp_path, *other) == Exit.CHECKPOINT
    assert "made with another config" in capsys.readouterr().err


def test_resume_validations_at_checkpoints_of_its_own_seed_and_rule_alone(tiny_track, tmp_path):
    arguments = ["--set", "train.checkpoint_every=10", "--set", "train.steps=20"]
    assert train_here(tiny_track, tmp_path, *arguments, "--optimizer", "muon") == 0
    next(tmp_path.glob("*.jsonl")).unlink()  # so that this run is there to go on from
    for others in (["--optimizer", "muon", "--seed", "1"], ["--optimizer", "normuon"]):
        assert train_here(tiny_track, tmp_path, *arguments, *others, "--resume") == 0
        assert "resume" not in [event["event"] for event in events(tmp_path)]
        next(tmp_path.glob("*.jsonl")).unlink()


def test_resume_of_a_run_that_is_done_does_nothing(tiny_track, tmp_path, capsys):
    arguments = ["--set", "train.checkpoint_every=10", "--set", "train.steps=20"]
    assert train_here(tiny_track, tmp_path, *arguments) == 0
    (finished,) = tmp_path.glob("*.jsonl")
    before = finished.read_bytes()
    assert train_here(tiny_track, tmp_path, *arguments, "--resume") == 0
    assert f"done: --resume: {finished} is this run from its start to its end" in capsys.readouterr().err
    assert list(tmp_path.glob("*.jsonl")) == [finished] and finished.read_bytes() == before

    assert train_here(tiny_track, tmp_path, *arguments, "--resume", "--seed", "1") == 0, "another run"
    assert train_here(tiny_track, tmp_path, *arguments) == 0, "this one again, as --resume was not asked for"
    assert len(list(tmp_path.glob("*.jsonl"))) == 3 and finished.read_bytes() == before


def test_resume_without_its_record_writes_the_start_again(tiny_track, tmp_path):
    arguments = ["--set", "train.checkpoint_every=10", "--set", "train.steps=25"]
    assert train_here(tiny_track, tmp_path, *arguments) == 0
    next(tmp_path.glob("*.jsonl")).unlink()
    assert train_here(tiny_track, tmp_path, *arguments, "--resume") == 0
    run, resume = events(tmp_path)[:2]
    assert (run["event"], resume["event"]) == ("run", "resume")
    for key in ("device", "world_size", "micro_batch", "attention", "compiled", "kernels"):  # what bits depend on
        assert resume[key] == run[key], key
