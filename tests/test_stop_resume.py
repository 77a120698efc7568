"""Signals, and which run --resume takes. Kills and broken checkpoints are in test_faults.py."""

import signal

import pytest

import train_gpt
from aurora.errors import Exit
from tests.conftest import events, often, train_here

SIGNAL_AT_6 = """
original = train_gpt.train_step
def step(run, model, number):
    if number == 6:
        for signum in {signals}:
            os.kill(os.getpid(), signum)
    return original(run, model, number)
train_gpt.train_step = step
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, often(signal.SIGINT, False), signal.SIGUSR1])
def test_a_signal_stops_with_a_checkpoint(twelve_steps, launch, tmp_path, signum):
    outcome = launch(*twelve_steps, "--out", tmp_path, patch=SIGNAL_AT_6.format(signals=[int(signum)]))
    assert outcome.codes == [Exit.PREEMPTED] and "--resume" in outcome.err[0]
    assert events(tmp_path)[-1]["status"] == "interrupted" and events(tmp_path)[-1]["step"] == 7
    assert [path.name for path in sorted(tmp_path.glob("*.checkpoints/*"))] == ["step-000006", "step-000007"]


def test_ctrl_c_twice_means_now(twelve_steps, launch, tmp_path):
    outcome = launch(*twelve_steps, "--out", tmp_path, patch=SIGNAL_AT_6.format(signals=[2, 2]))
    assert outcome.codes == [128 + signal.SIGINT] and not outcome.err[0]


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


def test_resume_leaves_finished_runs_alone(tiny_track, tmp_path):
    arguments = ["--set", "train.checkpoint_every=10", "--set", "train.steps=20"]
    assert train_here(tiny_track, tmp_path, *arguments) == 0
    (finished,) = tmp_path.glob("*.jsonl")
    before = finished.read_bytes()
    assert train_here(tiny_track, tmp_path, *arguments, "--resume") == 0
    assert finished.read_bytes() == before
    assert len(list(tmp_path.glob("*.jsonl"))) == 2


def test_resume_without_its_record_writes_the_start_again(tiny_track, tmp_path):
    arguments = ["--set", "train.checkpoint_every=10", "--set", "train.steps=25"]
    assert train_here(tiny_track, tmp_path, *arguments) == 0
    next(tmp_path.glob("*.jsonl")).unlink()
    assert train_here(tiny_track, tmp_path, *arguments, "--resume") == 0
    run, resume = events(tmp_path)[:2]
    assert (run["event"], resume["event"]) == ("run", "resume")
    for key in ("device", "world_size", "micro_batch", "attention", "compiled", "kernels"):  # what bits depend on
        assert resume[key] == run[key], key
