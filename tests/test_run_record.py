"""What a run writes of itself, to its record and to wandb."""

import sys
import types

import pytest

from tests.conftest import OPTIMIZERS, ROOT, events, losses, train_here


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_record_follows_the_contract(trained, tiny_track, optimizer):
    start, *middle, end = trained[optimizer]
    assert start["event"] == "run" and start["schema"] == 1 and end["event"] == "end"
    assert {
        "run_id", "utc", "argv", "config", "task_hash", "optimizer", "hparams", "seed", "world_size", "device",
        "params_by_role", "git", "code_hash", "sources", "data", "env",
    } <= set(start)  # fmt: skip
    assert (start["optimizer"], start["seed"], start["world_size"]) == (optimizer, 0, 1)
    assert start["config"]["train"]["steps"] == 30 and start["config"]["eval"]["target"] == 3.9
    assert start["hparams"]["lr"] == next(g["peak_lr"] for g in start["param_groups"] if g["role"] == "matrix")
    assert start["params_by_role"] == {"embed": 2048, "head": 2048, "vector": 832, "matrix": 24576}
    for name in ("train_gpt.py", "aurora/polar.py", "data/shards.py"):
        assert start["sources"][name] == (ROOT / name).read_text()
    assert start["sources"]["tiny.toml"] == tiny_track.read_text()
    assert [shard["file"] for shard in start["data"]["shards"]] == ["tiny_train_000001.bin", "tiny_train_000002.bin"]

    vals = [event for event in middle if event["event"] == "val"]
    assert [event["step"] for event in vals] == [0, 10, 20, 25, 30]
    assert all(event["tokens"] == event["step"] * 512 for event in vals)
    times = [event["train_time_s"] for event in vals]
    assert times == sorted(times) and len(set(times)) == len(times)
    trains = [event for event in middle if event["event"] == "train"]
    assert [event["step"] for event in trains] == [5, 10, 15, 20, 25, 30]
    assert all(0 < event["optimizer_ms"] < event["step_ms"] for event in trains)

    reached = [event for event in vals if event["val_loss"] <= 3.9]
    assert reached, "the tiny target is meant to be reached"
    assert end == end | {
        "status": "done", "step": 30, "val_loss": vals[-1]["val_loss"], "reached_target": True, "segments": 1,
        "steps_to_target": reached[0]["step"], "time_to_target_s": reached[0]["train_time_s"],
    }  # fmt: skip
    assert set(end["untimed"]) == {"import_s", "setup_s", "warmup_s", "val_s", "checkpoint_s"}
    assert start["compiled"] is False and end["peak_mem_mib"] > 50
    matrix_group = next(group for group in start["param_groups"] if group["role"] == "matrix")
    if optimizer != "adamw":
        assert matrix_group["polar_dtype"] == "float32" and len(matrix_group["polar_coefficients"]) == 5
    assert end["train_time_s"] >= sum(event["step_ms"] for event in trains) * 5 / 1000 * 0.99


def test_task_hash_tells_tasks_apart_but_not_optimizers_seeds_or_steps(tiny_track, trained, tmp_path):
    hashes = {record[0]["task_hash"] for record in trained.values()}
    assert len(hashes) == 1
    same = ["train.steps=5", "train.micro_batch=8", "optimizer.muon.lr=0.01"]
    different = ["eval.target=3.5", "model.mlp_expansion=2", "eval.tokens=256", "train.batch_tokens=256"]
    for index, override in enumerate(same + different):
        out = tmp_path / str(index)
        arguments = ["--optimizer", "muon", "--seed", "3", "--set", "train.steps=5", "--set", override]
        assert train_here(tiny_track, out, *arguments) == 0
        assert (events(out)[0]["task_hash"] in hashes) == (override in same)


def test_wandb_that_cannot_be_used_costs_one_warning_not_the_run(tiny_track, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert train_here(tiny_track, tmp_path, "--wandb", "offline", "--set", "train.steps=2") == 0
    assert capsys.readouterr().err.count("warning: wandb is off") == 1


def test_wandb_gets_the_metrics_of_the_record(tiny_track, tmp_path, monkeypatch):
    class FakeRun:
        logged, finished = [], False

        def log(self, metrics):
            self.logged.append(metrics)

        def finish(self):
            FakeRun.finished = True

    settings = {}
    fake = types.SimpleNamespace(init=lambda **kwargs: settings.update(kwargs) or FakeRun())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    assert train_here(tiny_track, tmp_path, "--wandb", "offline", "--set", "train.steps=10") == 0
    assert settings["project"] == "nanogpt-speedrun" and settings["mode"] == "offline"
    mirrored = [(m["step"], m["val/val_loss"]) for m in FakeRun.logged if "val/val_loss" in m]
    assert mirrored == losses(tmp_path) and FakeRun.finished
