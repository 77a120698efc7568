"""Recorded momentum and the benchmark that replays it. What it times is not judged here."""

import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import time

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException

from aurora.config import load_config
from aurora.errors import Exit, HarnessError
from aurora.trainer import Ranks
from aurora.trainer.record import read_folder
from aurora.trainer.timeline import timeline
from scripts.benchmarks import against, harness, kernels, runs, train, turns
from scripts.benchmarks import optim as benchmark
from tests.conftest import ROOT, make_run, train_here


def test_dumped_momentum_is_replayed_and_reported(tiny_track, tmp_path):
    arguments = ["--dump-momentum", "blocks.1.mlp.*", "11", "30"]
    assert train_here(tiny_track, tmp_path / "runs", *arguments) == 0
    (folder,) = (tmp_path / "runs").glob("*.momentum")
    assert [path.name for path in sorted(folder.iterdir())] == [f"step{i:06d}.rank0.pt" for i in range(11, 31)]
    streams = benchmark.recorded_momentum(folder)
    assert {name: X.shape for name, (X, *_) in streams.items()} == {
        "blocks.1.mlp.up.weight": (128, 32),
        "blocks.1.mlp.down.weight": (32, 128),
    }
    args = argparse.Namespace(
        config=tiny_track, rules=["muon", "aurora folded"], schedule="polar_express5", polar_dtype="float32",
        device="cpu", rounds=2, momentum=folder, out=tmp_path / "table", peers=["torch.optim:SGD"],
    )  # fmt: skip
    text = benchmark.optim(args)
    result = json.loads((tmp_path / "table.json").read_text())
    assert (tmp_path / "table.md").read_text() == text and "torch.optim.Muon" in text and "| torch.optim:SGD |" in text
    assert result["speed"]["muon"]["ratio_to_muon"] == 1 and len(result["speed"]["aurora folded"]["rounds_ms"]) == 2
    recorded = result["quality"]["recorded"]
    assert recorded["aurora folded"]["row_deviation_rms"] < 0.1 < recorded["muon"]["row_deviation_rms"]


ANSWERS = "for line in open(0): print('done', flush=True)"  # a step for each line


def harness_arguments(tiny_track, monkeypatch, program):
    """On a machine where nothing compiles."""

    def compiled(*batch):
        raise TorchDynamoException("no compiler")

    monkeypatch.setattr(harness, "QUICK", tiny_track)
    monkeypatch.setattr(torch, "compile", lambda *args, **options: compiled)
    return argparse.Namespace(rounds=2, nanogpt=None, program=[("another", program)], out=None)


def test_the_step_takes_turns_with_those_of_others(tiny_track, monkeypatch):
    command = shlex.join([sys.executable, "-c", ANSWERS])
    text = harness.harness(harness_arguments(tiny_track, monkeypatch, command))
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ") and "ms/step" not in line]
    assert [row[0][2:] for row in rows if row[0].startswith("| ours")][:2] == [
        "ours, bfloat16",
        "ours, bfloat16, torch's attention",
    ]
    assert rows[-1][0] == "| another" and float(rows[-1][2]) > 1  # it does nothing in its step
    assert "ours, bfloat16, compiled" not in text


def test_a_program_that_ends_before_its_step_is_named(tiny_track, monkeypatch):
    command = shlex.join([sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(HarnessError, match="it ended with 3 before its step"):
        harness.harness(harness_arguments(tiny_track, monkeypatch, command))


def test_parts_of_a_training_step_add_up_and_are_reported(tiny_track, tmp_path):
    args = argparse.Namespace(
        config=tiny_track, overrides=[], optimizers=["muon", "adamw"], steps=2, rounds=3, profile=True,
        out=tmp_path / "train",
    )  # fmt: skip
    text = train.train(args)
    result = json.loads((tmp_path / "train.json").read_text())
    assert not timeline.subscribers, "the trainer is left as it was"
    assert (tmp_path / "train.md").read_text() == text and (tmp_path / "train.trace.json").exists()
    assert result["attention"] == "flash" and result["graphs_compiled_while_timed"] == 0 and result["profile"]
    assert "eager, fast forward, kernels: torch" in text
    for name in ("muon", "adamw"):
        row = result["optimizers"][name]
        assert len(row["steps_ms"]) == 6 and row["ms_per_step"] == statistics.median(row["steps_ms"])
        assert row["tokens_per_s"] == pytest.approx(512 / row["ms_per_step"] * 1000)
        assert row["parts_ms"].keys() == set(train.PARTS)
        assert all(ms > 0 for ms in row["parts_ms"].values())
        assert (row["micro_batch"], row["micro_steps"]) == (8, 2) and row["mfu_nominal"] is None
    weights, attention = 2 * (4 * 32 * 32 + 2 * 4 * 32 * 32) + 64 * 32, 12 * 2 * 32 * 32
    tflops = result["optimizers"]["muon"]["tflops"]
    ms = result["optimizers"]["muon"]["ms_per_step"]
    assert tflops["whole"] == pytest.approx(512 * (6 * weights + attention) / ms / 1e9)
    assert tflops["causal"] == pytest.approx(512 * (6 * weights + attention / 2) / ms / 1e9)


def test_marks_of_a_step_are_its_time_without_gaps(tiny_track):
    contender = train.new_contender(load_config(tiny_track, "muon"), Ranks(0, 1, torch.device("cpu")))
    contender.marked = [
        [("", 0), ("data wait", 10**6), ("forward", 4 * 10**6), ("backward", 9 * 10**6), ("optimizer", 10**7)],
        [("", 0), ("data wait", 10**6), ("forward", 6 * 10**6), ("backward", 9 * 10**6), ("optimizer", 10**7)],
    ]
    timings = contender.timings()
    assert timings["steps_ms"] == [10, 10]
    assert timings["parts_ms"] == {
        "data wait": 1, "forward": 4, "backward": 4, "check": 0, "communication": 0, "optimizer": 1
    }  # fmt: skip


def test_quality_of_an_orthogonal_matrix_with_even_rows_is_perfect():
    hadamard = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    found = benchmark.quality(hadamard[:, :2], hadamard[:, :2] * torch.tensor([3.0, 1.0]))
    assert found == pytest.approx(
        {"row_deviation_rms": 0, "row_deviation_max": 0, "orthogonality_error": 0, "alignment": 1}, abs=1e-6
    )


@pytest.mark.parametrize(
    "optimizer, arguments, message",
    [
        ("adamw", ["*", "1", "2"], "needs a matrix optimizer, not AdamW"),
        ("muon", ["mlp", "1", "2"], "no matrix matches 'mlp'; there are blocks.0.attention.q.weight"),
        ("muon", ["*", "0", "2"], "no steps from 0 to 2; they go from 1 to 30"),
        ("muon", ["*", "1", "31"], "no steps from 1 to 31"),
        ("muon", ["*", "one", "2"], "no steps from one to 2"),
    ],
)
def test_momentum_that_cannot_be_dumped_exits_2(tiny_track, tmp_path, capsys, optimizer, arguments, message):
    assert train_here(tiny_track, tmp_path, "--optimizer", optimizer, "--dump-momentum", *arguments) == Exit.CONFIG
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
    assert captured.out == "" and not list(tmp_path.iterdir())  # told before any work


def test_replay_of_a_folder_without_momentum_is_told(tmp_path):
    with pytest.raises(HarnessError, match="train with --dump-momentum first"):
        benchmark.recorded_momentum(tmp_path)


PUBLIC_SCRIPT = """
import os, pathlib, time
print("pid", os.getpid())
val_tokens = 20 * 524288
assert len(list(pathlib.Path("data/fineweb10B").glob("fineweb_*_000000.bin"))) == 2
for step in range(10000):
    val_step_freq = 125 if step < 9000 else 25
    if step % val_step_freq == 0:
        print(f"step:{step}/3250 val_loss:{5 - step / val_tokens:.5f} train_time:{step / 50:.3f}s step_avg:20.00ms")
    time.sleep(0.02)
    print(f"step:{step + 1}/3250 train_time:{(step + 1) / 50:.3f}s step_avg:20.00ms")
"""


@pytest.fixture
def turns_args(tiny_track, tmp_path):
    (tmp_path / "simple.py").write_text(PUBLIC_SCRIPT)
    shards = {
        "train": tiny_track.with_name("tiny_train_000001.bin"),
        "val": tiny_track.with_name("tiny_val_000000.bin"),
    }
    return argparse.Namespace(
        peer=tmp_path / "simple.py", **shards, val_tokens=64, steps=16, every=8, limit_s=60.0,
        config=tiny_track, overrides=["train.micro_batch=4"], out=tmp_path / "turns",
    )  # fmt: skip


def is_running(args) -> bool:
    """Whether the public script is, once it has said its process number."""
    log = args.out.with_name("turns_public.log")
    said = log.read_text().split() if log.exists() else []
    try:
        return len(said) > 1 and os.kill(int(said[1]), 0) is None
    except ProcessLookupError:
        return False


@pytest.mark.slow
def test_public_script_and_ours_take_turns_on_the_same_tokens(turns_args, capfd):
    """Three turns, of which the public script ends in the third: the two before it are reported."""
    turns_args.peer.write_text(PUBLIC_SCRIPT.replace("range(10000)", "range(20)"))
    turns_args.steps = 24
    turns_args.overrides.append("data.allow_epochs=true")
    text = turns.turns(turns_args)
    result = json.loads(turns_args.out.with_suffix(".json").read_text())
    assert turns_args.out.with_suffix(".md").read_text() == text and "| 14 to 16 |" in text
    assert "after 2 turns: " in capfd.readouterr().err and not is_running(turns_args)
    assert [row["public_ms"] for row in result["turns"]] == pytest.approx([20, 20])
    assert all(row["ours_ms"] > 0 for row in result["turns"])
    public = result["val_loss"]["public"]
    assert (public["0"], public["8"], public["16"]) == (5.0, 4.875, 4.75), "its validation alone is changed"
    assert result["val_loss"]["ours"].keys() >= {"0", "8", "16"}


@pytest.mark.slow
def test_turns_that_are_terminated_end_both_programs(turns_args, tmp_path):
    names = {"peer": turns_args.peer, "train": turns_args.train, "val": turns_args.val, "config": turns_args.config}
    arguments = [word for name, value in names.items() for word in (f"--{name}", str(value))]
    arguments += ["--val-tokens", "64", "--steps", "16", "--every", "8", "--out", str(turns_args.out)]
    command = [sys.executable, "scripts/benchmark.py", "turns", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    while process.poll() is None and not is_running(turns_args):
        time.sleep(0.02)
    process.terminate()
    assert process.wait(timeout=30) == 143
    assert not is_running(turns_args)


@pytest.mark.slow
def test_a_public_script_of_another_kind_or_that_ends_is_told(turns_args):
    turns_args.every = turns.WARMUP_STEPS
    with pytest.raises(HarnessError, match="--every must be above 5"):
        turns.turns(turns_args)
    turns_args.every = 8
    turns_args.peer.write_text(PUBLIC_SCRIPT.replace("val_step_freq", "every"))
    with pytest.raises(HarnessError, match=r"has 0 times .*val_step_freq.*another version"):
        turns.turns(turns_args)
    turns_args.peer.write_text(PUBLIC_SCRIPT.replace("range(10000)", "range(2)"))
    with pytest.raises(HarnessError, match=r"turns_public.log: no line .*ended with 0; its last: \['step:2/3250"):
        turns.turns(turns_args)


@pytest.fixture
def against_args(tiny_track, tmp_path):
    return argparse.Namespace(
        against=ROOT, config=tiny_track, overrides=["train.compile=off"], nproc=1, rounds=2, steps=8, limit_s=60.0,
        out=tmp_path / "against",
    )  # fmt: skip


@pytest.mark.slow
def test_two_checkouts_take_turns_and_one_against_itself_trains_alike(against_args, capfd):
    text = against.against(against_args)
    result = json.loads(against_args.out.with_suffix(".json").read_text())
    assert against_args.out.with_suffix(".md").read_text() == text
    assert "round 2 of 2" in capfd.readouterr().err
    ours, theirs = result["trainers"]["ours"], result["trainers"]["theirs"]
    assert ours["code_hash"] == theirs["code_hash"] and ours["first_losses"] == theirs["first_losses"]
    assert result["loss_difference"] == 0 and len(ours["first_losses"]) == 8 and result["world_size"] == 1
    assert ours["how"] == ["eager", "fast forward"] and ours["warmup_s"] > 0 and theirs["warmup_s"] > 0
    assert result["ratios"] == [a / b for a, b in zip(ours["rounds_ms"], theirs["rounds_ms"], strict=True)]
    assert all(ms > 0 for ms in ours["rounds_ms"] + theirs["rounds_ms"])
    assert result["interval"] is None and "too few rounds" in text


def test_a_checkout_that_is_none_or_fails_is_told(against_args, tmp_path):
    against_args.against = tmp_path
    with pytest.raises(HarnessError, match="has no train_gpt.py; give a checkout"):
        against.against(against_args)
    (tmp_path / "train_gpt.py").write_text("print('no such option'); raise SystemExit(2)")
    with pytest.raises(HarnessError, match=r"against_theirs.log: .*ended with 2; its last: \['no such option'\]"):
        against.against(against_args)


def test_the_interval_of_a_median_is_that_of_published_tables():
    """Ranks of a 95 % interval: none below six values, 1 and 6 of 6, 2 and 9 of 10, 14 and 27 of 40 (Conover, 1999)."""
    ranks = {n: against.median_interval(list(map(float, range(n, 0, -1)))) for n in (5, 6, 10, 40)}
    assert ranks == {5: None, 6: (1, 6), 10: (2, 9), 40: (14, 27)}


def test_our_step_with_and_without_each_kernel_is_timed_on_one_trained_model(tiny_track, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "describe_device", lambda *_: {"name": "CPU", "torch": "2"})
    wanted = {"overrides": ["model.seq_len=128", "train.steps=40"], "train_steps": 4, "steps": 3, "rounds": 2}
    args = argparse.Namespace(config=tiny_track, limit_s=100.0, out=tmp_path / "kernels", **wanted)
    text = kernels.kernels(args)
    result = json.loads((tmp_path / "kernels.json").read_text())
    assert list(result["rounds_ms"]) == list(kernels.WAYS) and (tmp_path / "kernels.md").read_text() == text
    assert all(len(ms) == 2 and min(ms) > 0 for ms in result["rounds_ms"].values())
    assert result["losses"][1] < result["losses"][0], "it trained"

    args.limit_s = 0.0
    kernels.kernels(args)
    assert list(json.loads((tmp_path / "kernels.json").read_text())["rounds_ms"]) == [kernels.ALL]
    for overrides, error in (
        (["model.mlp=swiglu"], "the MLPs' kernel is of relu2, not of swiglu"),
        (["train.steps=30"], "these are 32 steps, the schedule has 30"),
    ):
        args.overrides = overrides
        with pytest.raises(HarnessError, match=error):
            kernels.kernels(args)


def test_ways_without_kernels_compute_the_same_loss(tiny_track):
    run = make_run(tiny_track, "muon", "model.seq_len=128")[0]
    tokens = torch.randint(64, (2, 128)), torch.randint(64, (2, 128))
    ways = [make(run.model) for make in kernels.WAYS.values()]
    found = [way(*tokens).item() for way in ways]
    assert found == pytest.approx([found[0]] * 4, rel=1e-5) and len({type(way) for way in ways}) == 4


def test_runs_to_a_target_that_a_pilot_run_sets(tiny_track, tmp_path):
    args = argparse.Namespace(
        config=tiny_track, overrides=["train.steps=4"], optimizers=["muon"], seeds=[0, 1], pilot="adamw",
        out=tmp_path / "short",
    )  # fmt: skip
    text = runs.runs(args)
    ((pilot,), _), (found, _) = read_folder(tmp_path / "short_pilot"), read_folder(tmp_path / "short")
    target = pilot.end_event["val_loss"] + runs.PILOT_MARGIN
    assert pilot.start["seed"] == runs.PILOT_SEED and {run.start["seed"] for run in found} == {0, 1}
    assert {run.target for run in found} == {found[0].target} and 0 <= found[0].target - target < 0.01 + 1e-9
    assert text.startswith(f"target {found[0].target} by a pilot run of adamw; 2 runs: ")

    args.overrides = ["train.steps=0"]
    with pytest.raises(HarnessError, match="the pilot run of adamw ended with exit code 2"):
        runs.runs(args)


@pytest.mark.slow
def test_gpu_measurements_work_at_a_tiny_size(tmp_path):
    environment = os.environ | {"TINY": "1", "OUT": str(tmp_path), "PYTHON": sys.executable}
    process = subprocess.run(
        ["bash", "scripts/gpu_measurements.sh"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0 and "| without both |" in process.stdout and "seconds to target" in process.stdout
    parts = re.findall(r"^(\w+): exit (\d+)", process.stdout, re.MULTILINE)
    assert parts == [(name, "0") for name in ("text", "kernels", "short", "leverage", "short_report")], process.stdout
