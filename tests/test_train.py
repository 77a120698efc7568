"""The trainer on one process: losses, determinism, warm-up, validation, record, stops, exit codes."""

import contextlib
import copy
import hashlib
import json
import pickle
import re
import signal
import sys
import time
import types
from pathlib import Path

import pytest
import torch

import train_gpt
from configs.schema import Exit, load_config
from data.loader import TokenLoader
from data.shards import open_shard, write_shard
from tests.conftest import OPTIMIZERS, ROOT, events, losses, start_process, torchrun, train_here


@pytest.fixture(scope="module")
def trained(tiny_track, tmp_path_factory):
    """Events of one finished run of each optimizer."""
    torch.set_num_threads(1)
    records = {}
    for name in OPTIMIZERS:
        out = tmp_path_factory.mktemp(name)
        assert train_here(tiny_track, out, "--optimizer", name) == 0
        records[name] = events(out)
    return records


def make_run(tiny_track, optimizer, *overrides):
    config = load_config(tiny_track, optimizer, overrides)
    model = train_gpt.GPT(config.model)
    model.init_weights(0)
    data = train_gpt.open_data(config)
    ranks = train_gpt.Ranks(0, 1, torch.device("cpu"))
    loader = TokenLoader(data.train_shards, config.train.batch_tokens, 0, 1)
    optimizers = train_gpt.build_optimizers(config, model)
    return train_gpt.Training(config, train_gpt.plan_batch(config, 1), ranks, model, optimizers, loader), data


def step(run):
    batch = train_gpt.to_device(run.loader.next_window(), run.config.model.seq_len, run.ranks.device)
    loss = train_gpt.forward_backward(run.model, batch, run)
    for optimizer in run.optimizers:
        optimizer.step()
    run.model.zero_grad()
    return loss


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_learns(trained, optimizer):
    values = [event["val_loss"] for event in trained[optimizer] if event["event"] == "val"]
    assert values[0] == pytest.approx(torch.tensor(64.0).log().item(), rel=1e-6)
    assert values[-1] < values[0] - 0.1


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_same_seed_gives_the_same_bytes_and_another_seed_does_not(trained, tiny_track, tmp_path, optimizer):
    assert train_here(tiny_track, tmp_path / "again", "--optimizer", optimizer) == 0
    assert train_here(tiny_track, tmp_path / "other", "--optimizer", optimizer, "--seed", "1") == 0
    again, other = events(tmp_path / "again"), events(tmp_path / "other")

    def outcome(record):
        return [e["val_loss"] for e in record if e["event"] == "val"], record[-1]["weights_sha256"]

    assert outcome(again) == outcome(trained[optimizer])
    assert outcome(other)[0][1:] != outcome(again)[0][1:] and outcome(other)[1] != outcome(again)[1]


@pytest.mark.parametrize("micro_batch", [1, 2, 16])
def test_micro_batch_does_not_change_the_losses(trained, tiny_track, tmp_path, micro_batch):
    assert train_here(tiny_track, tmp_path, "--optimizer", "muon", "--set", f"train.micro_batch={micro_batch}") == 0
    expected = [(e["step"], e["val_loss"]) for e in trained["muon"] if e["event"] == "val"]
    for (step_, loss), (expected_step, expected_loss) in zip(losses(tmp_path), expected, strict=True):
        assert step_ == expected_step and loss == pytest.approx(expected_loss, rel=1e-5)


def test_gradients_are_those_of_the_mean_loss_over_the_batch(tiny_track):
    run, _ = make_run(tiny_track, "muon")
    plain, _ = make_run(tiny_track, "muon")
    for _ in range(3):  # past the zero-initialised projections, which stop most gradients
        step(run), step(plain)
    batch = train_gpt.to_device(run.loader.next_window(), 32, run.ranks.device)
    loss = train_gpt.forward_backward(run.model, batch, run)
    window = plain.loader.next_window().astype("int64")
    inputs, targets = (torch.from_numpy(part).view(16, 32) for part in (window[:-1], window[1:]))
    plain_loss = torch.nn.functional.cross_entropy(plain.model.logits(inputs).flatten(0, 1), targets.flatten())
    plain_loss.backward()
    assert loss.item() == pytest.approx(plain_loss.item(), rel=1e-6)
    for p, q in zip(run.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_warm_up_leaves_weights_state_rng_and_loader_bit_identical(tiny_track, optimizer):
    run, _ = make_run(tiny_track, optimizer)
    twin, _ = make_run(tiny_track, optimizer)
    step(run), step(twin)  # so that there is optimizer state to lose
    torch.manual_seed(11)
    before = train_gpt.digest(run.state_dict())
    train_gpt.warm_up(run.model, run)
    assert train_gpt.digest(run.state_dict()) == before
    assert all(p.grad is None for p in run.model.parameters())
    assert [step(run).item() for _ in range(3)] == [step(twin).item() for _ in range(3)]


def test_warm_up_notices_a_trace_it_leaves(tiny_track, monkeypatch):
    run, _ = make_run(tiny_track, "muon")
    monkeypatch.setattr(torch, "set_rng_state", lambda state: torch.manual_seed(3))
    with pytest.raises(RuntimeError, match="left a trace"):
        train_gpt.warm_up(run.model, run)


def test_validation_changes_nothing_and_sums_over_every_token(tiny_track):
    run, data = make_run(tiny_track, "aurora")
    step(run)
    before = train_gpt.digest(run.state_dict())
    loss = train_gpt.validate(run.model, data, run)
    assert train_gpt.digest(run.state_dict()) == before
    tokens = torch.from_numpy(data.val_tokens.astype("int64"))
    with torch.no_grad():
        whole = run.model(tokens[:-1].view(16, 32), tokens[1:].view(16, 32)).item() / 512
    assert loss == pytest.approx(whole, rel=1e-6)


def test_digest_sees_every_bit_and_every_name():
    state = {"a": torch.ones(3), "b": [1, {"c": torch.zeros((), dtype=torch.bfloat16)}]}
    original = train_gpt.digest(state)
    for change in (
        lambda s: s["a"].view(torch.int32).bitwise_xor_(1),
        lambda s: s["b"].__setitem__(0, 2),
        lambda s: s["b"][1].__setitem__("c", torch.zeros(())),
        lambda s: s.__setitem__("d", s.pop("a")),
    ):
        changed = copy.deepcopy(state)
        change(changed)
        assert train_gpt.digest(changed) != original
    assert train_gpt.digest(copy.deepcopy(state)) == original


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


def test_clock_charges_every_nanosecond_to_one_account(monkeypatch):
    now = iter([5, 12, 20, 50])
    monkeypatch.setattr(train_gpt.time, "perf_counter_ns", lambda: next(now) * 10**9)
    clock = train_gpt.Clock(train_gpt.Ranks(0, 1, torch.device("cpu")), begin_ns=0)
    for account in ("setup", "train", "val", "train"):
        clock.charge(account)
    spent_s = {account: clock.spent_s(account) for account in clock.spent_ns if clock.spent_ns[account]}
    assert spent_s == {"setup": 5, "train": 7 + 30, "val": 8}
    clock.add({"train": 10**9, "checkpoint": 2 * 10**9})
    assert clock.slowest_train_s() == 38 and clock.spent_s("checkpoint") == 2


def test_validation_time_does_not_leak_into_train_time(tiny_track, tmp_path, monkeypatch):
    original = train_gpt.validate

    def slow_validate(*args):
        time.sleep(0.5)
        return original(*args)

    monkeypatch.setattr(train_gpt, "validate", slow_validate)
    assert train_here(tiny_track, tmp_path, "--optimizer", "adamw", "--set", "train.steps=2") == 0
    end = events(tmp_path)[-1]
    assert end["untimed"]["val_s"] >= 1.0 and end["train_time_s"] < 0.5


def test_non_finite_loss_exits_5_naming_step_and_parameter(tiny_track, tmp_path, capsys):
    arguments = ["--optimizer", "muon", "--set", "optimizer.muon.lr=1e30"]
    assert train_here(tiny_track, tmp_path, *arguments) == Exit.NON_FINITE
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "step 2: loss is not finite, first bad gradient: embed.weight" in error
    end = events(tmp_path)[-1]
    assert (end["status"], end["reached_target"]) == ("diverged", False)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_gradient_is_named_before_it_is_applied(tiny_track, bad):
    run, _ = make_run(tiny_track, "aurora")
    guard = train_gpt.Guard(run.model, run.ranks)
    for p in run.model.parameters():
        p.grad = torch.zeros_like(p)
    guard.check(0, torch.tensor(1.0))
    run.model.blocks[1].mlp.up.weight.grad[3, 3] = bad
    with pytest.raises(train_gpt.HarnessError, match=r"step 8: loss is finite, .*blocks.1.mlp.up.weight"):
        guard.check(7, torch.tensor(1.0))


def plant_token(path, token):
    tokens = open_shard(path).copy()
    tokens[5000] = token
    write_shard(path, tokens)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


DATA_ERRORS = {
    "missing": (Path.unlink, "no shard matches.*python data/local.py"),
    "cut": (cut, "tiny_train_000001.bin claims 10340 tokens, so 21704 bytes, but has 21703"),
    "other format": (lambda path: path.write_bytes(b"x" * 4000), "tiny_train_000001.bin begins with magic number"),
    "token outside vocabulary": (lambda path: plant_token(path, 64), "holds token 64 at position 5000"),
}


@pytest.mark.parametrize("fault", DATA_ERRORS)
def test_bad_data_exits_3_with_one_line_and_no_record(tiny_track, tmp_path, capsys, fault):
    folder = tmp_path / "data"
    folder.mkdir()
    for path in tiny_track.parent.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = folder / "tiny.toml"
    config.write_text(config.read_text().replace(str(tiny_track.parent), str(folder)))
    (folder / "tiny_train_000002.bin").unlink()
    damage, message = DATA_ERRORS[fault]
    damage(folder / "tiny_train_000001.bin")
    assert train_here(config, tmp_path / "out", "--set", "train.steps=10") == Exit.DATA
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)
    assert not list((tmp_path / "out").glob("*"))


def test_too_few_tokens_exits_3_with_the_numbers(tiny_track, tmp_path, capsys):
    assert train_here(tiny_track, tmp_path, "--set", "train.steps=36") == Exit.DATA
    assert "36 steps of 512 tokens need 18,432 tokens" in capsys.readouterr().err


def test_unwritable_out_exits_7_before_training(tiny_track, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    assert train_here(tiny_track, tmp_path / "file" / "out") == Exit.DISK
    assert "is not a folder that can be written" in capsys.readouterr().err


def test_full_disk_at_the_record_exits_7(tiny_track, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("results.record.os.write", lambda handle, line: len(line) // 2)
    assert train_here(tiny_track, tmp_path) == Exit.DISK
    assert "cannot be written: the line was cut" in capsys.readouterr().err


def test_help_and_usage_errors_answer_without_importing_torch():
    for arguments, code in ((["--help"], 0), (["--optimiser", "muon"], 2)):
        process = start_process("-X", "importtime", "train_gpt.py", *arguments)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code
        assert "--optimizer" in out + err
        assert not [line for line in err.splitlines() if line.startswith("import time:") and line.endswith(" torch")]


def test_importing_the_trainer_has_no_side_effects(tmp_path):
    code = "import os, sys, torch; before = set(os.listdir()), torch.get_rng_state().tolist(), torch.get_default_dtype(); import train_gpt; assert before == (set(os.listdir()), torch.get_rng_state().tolist(), torch.get_default_dtype())"  # noqa: E501
    process = start_process("-c", code)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "")


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


def test_non_finite_validation_names_step_and_parameter(tiny_track, tmp_path, capsys):
    """The last update breaks the weights, and no gradient after it tells."""
    arguments = ["--optimizer", "muon", "--set", "train.steps=1", "--set", "optimizer.muon.vector_lr=1e38"]
    assert train_here(tiny_track, tmp_path, *arguments) == Exit.NON_FINITE
    error = capsys.readouterr().err
    assert "step 1: validation loss is nan, " in error and error.count("\n") == 1
    assert [event["event"] for event in events(tmp_path)] == ["run", "val", "train", "end"]


@pytest.mark.parametrize("optimizer", ["adamw", "aurora"])
def test_a_warm_up_that_fails_leaves_no_trace_either(tiny_track, optimizer):
    run, _ = make_run(tiny_track, optimizer)
    before = train_gpt.digest(run.state_dict())

    def model_that_cannot_validate(inputs, targets):
        if not torch.is_grad_enabled():
            raise RuntimeError("no graph for this")
        return run.model(inputs, targets)

    with pytest.raises(RuntimeError, match="no graph"):
        train_gpt.warm_up(model_that_cannot_validate, run)
    assert train_gpt.digest(run.state_dict()) == before


def test_stop_agreed_upon_while_reading_before_a_validation_still_saves(tiny_track, tmp_path, monkeypatch):
    """On CUDA the guard's answer arrives a step late, possibly between the validation's start and its end."""
    original = train_gpt.validate

    def stop_while_validating(model, data, run):
        for guard in guards:
            guard.must_stop = len(guards) > 0 and run.loader.position > 0
        return original(model, data, run)

    guards = []
    init = train_gpt.Guard.__init__
    monkeypatch.setattr(train_gpt.Guard, "__init__", lambda self, *args: guards.append(self) or init(self, *args))
    monkeypatch.setattr(train_gpt, "validate", stop_while_validating)
    assert train_here(tiny_track, tmp_path) == Exit.PREEMPTED
    assert [path.name for path in tmp_path.glob("*.checkpoints/*")] == ["step-000010"]


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


def test_compiled_model_gives_the_same_losses_or_says_why_not(tiny_track, tmp_path, trained, capsys):
    """A machine without a C++ compiler cannot compile on CPU: then the run stops with the reason before training."""
    code = train_here(tiny_track, tmp_path, "--optimizer", "muon", "--set", "train.compile=on")
    captured = capsys.readouterr()
    if code == Exit.CONFIG:
        assert "torch.compile failed" in captured.err and "set it to 'off'" in captured.err
        return
    assert code == 0 and "model: compiled" in captured.out
    expected = [(e["step"], e["val_loss"]) for e in trained["muon"] if e["event"] == "val"]
    for (step_, loss), (expected_step, expected_loss) in zip(losses(tmp_path), expected, strict=True):
        assert step_ == expected_step and loss == pytest.approx(expected_loss, rel=1e-4)


def test_world_size_that_does_not_divide_the_batch_exits_2_on_one_line(tiny_track, tmp_path):
    process = start_process(*torchrun(3), "train_gpt.py", "--config", str(tiny_track), "--out", str(tmp_path))
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert err.count("error: 3 ranks do not divide the 16 sequences of train.batch_tokens") == 1
    assert not list(tmp_path.glob("*.jsonl"))
