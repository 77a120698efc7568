"""Time, speed and money of a run: before it, in its first minute, at its end, and in its record."""

import json
import re

import pytest

from aurora.config import load_config
from aurora.trainer import cost
from aurora.trainer.clock import Clock
from aurora.trainer.console import Console
from aurora.trainer.ranks import Ranks
from scripts.verification.checks import verify_run
from tests.conftest import ROOT, events, train_here
from train_gpt import torch, validation_steps

GPT2_SMALL = {"matrix": 84_934_656, "head": 38_633_472, "embed": 38_633_472, "vector": 100_000}
# Milliseconds a step of public runs of gpt2_small's task, whose logs name their GPUs: records/track_3_optimization/
# results of https://github.com/KellerJordan/modded-nanogpt at f411b3d.
PUBLIC = {
    ("NVIDIA H100 80GB HBM3", 8): 147.0,  # 1bd8db7a
    ("NVIDIA H200", 1): 1068.2,  # 20260517_ortho/d5098d67
    ("NVIDIA H200", 4): 282.6,  # 20260519_dynmuon/50172610
    ("NVIDIA GH200 120GB", 4): 307.5,  # 20260508_muown/a26c8aa2
    ("NVIDIA H100 NVL", 2): 771.8,  # 20260505_newton_muon/1e2209a6
}


@pytest.fixture(scope="module")
def gpt2_small():
    return load_config(ROOT / "configs/gpt2_small.toml", "muon")


def test_flop_are_palms_6n_and_attention(gpt2_small):
    model = vars(gpt2_small.model)
    matmul, attention = 6 * (84_934_656 + 38_633_472), 12 * 12 * 6 * 128 * 1024
    assert cost.flop_per_token(GPT2_SMALL, model) == matmul + attention == 854_654_976


@pytest.mark.parametrize("gpus", PUBLIC)
def test_estimates_are_near_public_runs(gpt2_small, gpus):
    name, count = gpus
    peak = cost.peak_flops(name, "bfloat16") * count * cost.USUAL_MFU
    step_ms = 1000 * cost.estimate(gpt2_small, GPT2_SMALL, peak).train_s / gpt2_small.train.steps
    assert 0.75 < step_ms / PUBLIC[gpus] < 1.1


def test_cards_that_share_a_name_are_told_apart():
    peaks = [cost.peak_flops(f"NVIDIA {name}", "bfloat16") for name in ("H200", "H200 NVL", "H100 PCIe", "GTX 1080")]
    assert peaks == [989.4e12, 835.5e12, 756e12, None]
    assert cost.peak_flops("NVIDIA H200", "float32") is None, "the table is for bfloat16"


@pytest.mark.parametrize("override", ["train.steps=3250", "train.steps=7", "eval.late_frac=0", "eval.late_frac=1"])
def test_number_of_validations_is_that_of_the_run(override):
    config = load_config(ROOT / "configs/gpt2_small.toml", "muon", [override])
    assert cost.num_validations(config) == len(validation_steps(config))


def test_a_dry_run_says_time_and_money(tmp_path, capsys, monkeypatch):
    arguments = ["--optimizer", "muon", "--dry-run", "--price-per-gpu-hour", "2.5"]
    assert train_here(ROOT / "configs/gpt2_small.toml", tmp_path, *arguments) == 0
    report = capsys.readouterr().out
    assert "FLOP: 8.547e+08 a token" in report and "H100 1.1 (costs 2.75)" in report and "not known of" in report
    monkeypatch.setattr("aurora.trainer.setup.device_name", lambda device: "NVIDIA H200")
    assert train_here(ROOT / "configs/gpt2_small.toml", tmp_path, *arguments) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("time, at 40% of the peak of 1 x NVIDIA H200: 61 min of training, 1132 ms a step, 463,064")
    assert line.endswith("1.1 GPU hours (costs 2.75)")


def test_a_price_that_is_none_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        train_here(ROOT / "configs/quick.toml", tmp_path, "--price-per-gpu-hour", "-1")
    assert error.value.code == 2 and "--price-per-gpu-hour must be from 0" in capsys.readouterr().err


def test_the_console_says_once_what_the_first_steps_let_expect(gpt2_small, capsys, monkeypatch):
    ranks = Ranks(0, 1, torch.device("cpu"))
    said = []
    console = Console(gpt2_small, ranks, Clock(ranks, 0), lambda *seconds: said.append(seconds) or "an hour")
    monkeypatch.setattr(console, "EVERY_S", 0.0)
    console.clock.running_train_s = iter([1.0, 1.0, 3.0, 5.0, 7.0, 9.0]).__next__  # two seconds a step
    for step in range(1, 6):
        console.tick(step, validations_left=0)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("expected")] == ["expected: an hour"]
    assert said == [(2.0, 7.0 + (3250 - 4) * 2.0)]


def as_of_h200(record):
    """The record as one of an H200."""
    start, end = record[0], record[-1]
    start["device"], start["env"]["device_name"] = "cuda", "NVIDIA H200"
    start["config"]["model"]["activation_dtype"] = "bfloat16"
    return start, end


def test_speed_at_the_end_follows_from_steps_seconds_and_flop(trained):
    start, end = as_of_h200(json.loads(json.dumps(trained["muon"])))
    assert end["tokens_per_s"] == end["step"] * 512 / end["train_time_s"] and end["mfu"] is None
    speed = cost.speed_of(end["step"], end["train_time_s"], 1, start)
    flop = cost.flop_per_token(start["params_by_role"], start["config"]["model"])
    assert speed.mfu == pytest.approx(end["tokens_per_s"] * flop / 989.4e12)
    assert cost.speed_of(end["step"], end["train_time_s"], 2, start).mfu is None, "a resumed run's GPUs may differ"
    assert cost.speed_of(0, 0.0, 1, start) == (None, None)
    words = cost.speed_words(speed, 7200.0, start | {"world_size": 8}, 2.0)
    assert words.endswith("16 GPU hours (costs 32.00)")


@pytest.mark.parametrize("change", [{"tokens_per_s": 1e6}, {"mfu": 0.4}, {"tokens_per_s": None}])
def test_a_speed_that_does_not_follow_is_refuted(trained, tmp_path, change):
    path = tmp_path / "a.jsonl"
    *before, end = trained["muon"]
    path.write_text("".join(json.dumps(event) + "\n" for event in [*before, end | change]))
    (reason,) = verify_run(path).reasons
    assert f"{next(iter(change))} is" in reason and "by steps, seconds and FLOP" in reason


def test_the_last_line_says_speed_and_memory(tiny_track, tmp_path, capsys):
    assert train_here(tiny_track, tmp_path, "--optimizer", "muon", "--set", "train.steps=2") == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"speed: [\d,]+ tokens/s, memory of a rank \d+\.\d\d GiB", line)
    assert events(tmp_path)[-1]["tokens_per_s"] > 0
