"""What bad input and bad numbers get: one line and the right exit code."""

import types

import pytest
import torch

import train_gpt
from aurora.errors import Exit, HarnessError
from tests.conftest import events, make_run, start_process, train_here


@pytest.fixture
def any_number(monkeypatch):
    """Rates that break weights in a step are refused before a run."""
    monkeypatch.setattr("aurora.bounds.LARGEST_HPARAM", 1e40)


def test_non_finite_loss_exits_5_naming_step_and_parameter(tiny_track, tmp_path, capsys, any_number):
    arguments = ["--optimizer", "muon", "--set", "optimizer.muon.lr=1e30"]
    assert train_here(tiny_track, tmp_path, *arguments) == Exit.NON_FINITE
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "step 2: loss is not finite, first bad gradient: embed.weight" in error
    end = events(tmp_path)[-1]
    assert (end["status"], end["reached_target"]) == ("diverged", False)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_gradient_is_named_before_it_is_applied(tiny_track, bad):
    run, _ = make_run(tiny_track, "aurora")
    for p in run.model.parameters():
        p.grad = torch.zeros_like(p)
    run.guard.observe(torch.tensor(1.0))
    run.guard.check(0, run.rule)
    with pytest.raises(HarnessError, match="the update of step 7 was not finite"):
        run.guard.check(7, types.SimpleNamespace(found_non_finite=torch.tensor(True)))
    run.model.blocks[1].mlp.up.weight.grad[3, 3] = bad
    with pytest.raises(HarnessError, match=r"step 8: loss is finite, .*blocks.1.mlp.up.weight"):
        run.guard.check(7, run.rule)


def test_non_finite_validation_names_step_and_parameter(tiny_track, tmp_path, capsys, any_number):
    """The last update breaks the weights, and no gradient after it tells."""
    arguments = ["--optimizer", "muon", "--set", "train.steps=1", "--set", "optimizer.muon.vector_lr=1e38"]
    assert train_here(tiny_track, tmp_path, *arguments) == Exit.NON_FINITE
    error = capsys.readouterr().err
    assert "step 1: after the update " in error and " is not finite" in error and error.count("\n") == 1
    assert [event["event"] for event in events(tmp_path)] == ["run", "val", "train", "end"]


def test_a_loss_before_training_that_cannot_be_exits_2(tiny_track, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_gpt, "validate", lambda *args: 4.2)
    assert train_here(tiny_track, tmp_path) == Exit.CONFIG
    assert "before training the loss is 4.2, but a head of zeros gives ln V = 4.158883" in capsys.readouterr().err


def test_a_schedule_that_never_gets_to_its_peak_exits_2(tiny_track, tmp_path, capsys):
    assert train_here(tiny_track, tmp_path, "--set", "optimizer.aurora.warmup_steps=31") == Exit.CONFIG
    assert "the learning rate goes up to 0.613 of its peak" in capsys.readouterr().err


def test_unwritable_out_exits_7_before_training(tiny_track, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    assert train_here(tiny_track, tmp_path / "file" / "out") == Exit.DISK
    assert "is not a folder that can be written" in capsys.readouterr().err


def test_full_disk_at_the_record_exits_7(tiny_track, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("aurora.trainer.writer.os.write", lambda handle, line: len(line) // 2)
    assert train_here(tiny_track, tmp_path) == Exit.DISK
    assert "cannot be written: the line was cut" in capsys.readouterr().err


def test_help_and_usage_errors_answer_without_importing_torch():
    for arguments, code in (
        (["--help"], 0),
        (["--optimiser", "muon"], 2),
        (["--timeout-s", "0"], 2),
        (["--timeout-s", "inf"], 2),
    ):
        process = start_process("-X", "importtime", "train_gpt.py", *arguments)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code
        assert "--optimizer" in out + err
        assert not [line for line in err.splitlines() if line.startswith("import time:") and line.endswith(" torch")]


@pytest.mark.slow
def test_importing_the_trainer_has_no_side_effects(tmp_path):
    code = "import os, sys, torch; before = set(os.listdir()), torch.get_rng_state().tolist(), torch.get_default_dtype(); import train_gpt; assert before == (set(os.listdir()), torch.get_rng_state().tolist(), torch.get_default_dtype())"  # noqa: E501
    process = start_process("-c", code)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "")


def test_world_size_that_does_not_divide_the_batch_exits_2_on_one_line(tiny_track, launch, tmp_path):
    outcome = launch("--config", tiny_track, "--out", tmp_path, world_size=3)
    assert outcome.codes == [Exit.CONFIG] * 3 and outcome.err[1:] == ["", ""]
    assert outcome.err[0].startswith("error: 3 ranks do not divide the 16 sequences of train.batch_tokens")
    assert outcome.err[0].count("\n") == 1
    assert not list(tmp_path.glob("*.jsonl"))
