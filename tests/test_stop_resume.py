"""Signals, kills, checkpoints and going on from them."""

import contextlib
import hashlib
import json
import pickle
import signal

import pytest

import train_gpt
from configs.schema import Exit
from tests.conftest import OPTIMIZERS, events, losses, start_process, train_here


@contextlib.contextmanager
def running(*command):
    process = start_process(*command)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for_validation(process, step_):
    for line in process.stdout:
        if line.startswith(f"step:{step_}/") and "val_loss" in line:
            return
    raise AssertionError(f"the run ended before step {step_}: {process.stderr.read()}")


SLOW = ["--set", "train.micro_batch=1"]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_stops_with_a_checkpoint_and_resume_continues_bit_for_bit(tiny_track, tmp_path, signum):
    command = ["train_gpt.py", "--config", str(tiny_track), "--optimizer", "aurora", *SLOW]
    with running(*command, "--out", str(tmp_path / "cut")) as process:
        wait_for_validation(process, 10)
        process.send_signal(signum)
        _, err = process.communicate(timeout=60)
    assert process.returncode == Exit.PREEMPTED and "--resume" in err
    assert events(tmp_path / "cut")[-1]["status"] == "interrupted"
    with running(*command, "--out", str(tmp_path / "cut"), "--resume") as process:
        assert process.communicate(timeout=60)[1] == "" and process.returncode == 0
    with running(*command, "--out", str(tmp_path / "whole")) as process:
        assert process.communicate(timeout=60)[1] == "" and process.returncode == 0
    cut, whole = events(tmp_path / "cut"), events(tmp_path / "whole")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert cut[-1]["weights_sha256"] == whole[-1]["weights_sha256"]
    assert (cut[-1]["segments"], whole[-1]["segments"]) == (2, 1)


def test_stop_agreed_upon_while_reading_before_a_validation_still_saves(tiny_track, tmp_path, monkeypatch):
    """On CUDA the guard's answer arrives a step late, possibly between the validation's start and its end."""
    original = train_gpt.validate

    def stop_while_validating(model, data, run):
        for guard in guards:
            guard.must_stop = len(guards) > 0 and run.loader.step > 0
        return original(model, data, run)

    guards = []
    init = train_gpt.Guard.__init__
    monkeypatch.setattr(train_gpt.Guard, "__init__", lambda self, *args: guards.append(self) or init(self, *args))
    monkeypatch.setattr(train_gpt, "validate", stop_while_validating)
    assert train_here(tiny_track, tmp_path) == Exit.PREEMPTED
    assert [path.name for path in tmp_path.glob("*.checkpoints/*")] == ["step-000010"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resume_after_kill_is_bit_for_bit(tiny_track, tmp_path, trained, optimizer, monkeypatch, capsys):
    """The process dies at step 25 with checkpoints of 16 and 24; the newest is then damaged."""
    arguments = ["--optimizer", optimizer, "--set", "train.checkpoint_every=8"]
    original = train_gpt.lr_scale

    class Killed(BaseException):
        pass

    def die_at_25(step_, config):
        if step_ == 25:
            raise Killed
        return original(step_, config)

    monkeypatch.setattr(train_gpt, "lr_scale", die_at_25)
    with pytest.raises(Killed):
        train_here(tiny_track, tmp_path, *arguments)
    monkeypatch.setattr(train_gpt, "lr_scale", original)
    checkpoints = sorted(tmp_path.glob("*.checkpoints/*"))
    assert [path.name for path in checkpoints] == ["step-000016", "step-000024"]
    content = bytearray((checkpoints[1] / "state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoints[1] / "state.pt").write_bytes(bytes(content))
    assert train_here(tiny_track, tmp_path, *arguments, "--resume") == 0
    said = capsys.readouterr().out
    assert "step-000024 is damaged" in said and "resume: from step 16" in said
    end = events(tmp_path)[-1]
    assert end["weights_sha256"] == trained[optimizer][-1]["weights_sha256"] and end["segments"] == 2


def test_resume_without_checkpoint_starts_over_and_with_another_config_refuses(tiny_track, tmp_path, capsys):
    arguments = ["--optimizer", "muon", "--set", "train.checkpoint_every=10"]
    assert train_here(tiny_track, tmp_path, *arguments, "--resume") == 0
    assert "no unfinished run with a checkpoint" in capsys.readouterr().out
    record = next(tmp_path.glob("*.jsonl"))
    record.write_text("".join(record.read_text().splitlines(keepends=True)[:-1]))  # as if it had not finished
    other = [*arguments, "--set", "optimizer.muon.lr=0.03", "--resume"]
    assert train_here(tiny_track, tmp_path, *other) == Exit.CHECKPOINT
    assert "made with another config" in capsys.readouterr().err


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
    assert [event["event"] for event in events(tmp_path)][:2] == ["run", "resume"]


@pytest.mark.parametrize("payload", ["pickle", "text"])
def test_hostile_checkpoint_is_not_executed(tiny_track, tmp_path, payload, capsys):
    class Bomb:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'executed')!r}, 'w')",))

    folder = tmp_path / "x.checkpoints" / "step-000010"
    folder.mkdir(parents=True)
    content = pickle.dumps(Bomb()) if payload == "pickle" else b"hello"
    (folder / "state.pt").write_bytes(content)
    (folder / "manifest.json").write_text(json.dumps({"sha256": hashlib.sha256(content).hexdigest(), "step": 10}))
    assert train_here(tiny_track, tmp_path, "--resume", "--set", "train.steps=2") == Exit.CHECKPOINT
    captured = capsys.readouterr()
    assert "is damaged" in captured.out and "are damaged; restore it, or start over" in captured.err
    assert not (tmp_path / "executed").exists()
