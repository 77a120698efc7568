"""What a run writes of itself, to its record and to wandb."""

import contextlib
import json
import socket
import struct
import time

import pytest

import train_gpt
from aurora.trainer.tracking import Tracker
from tests.conftest import OPTIMIZERS, ROOT, events, losses, often, train_here


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
    for name in ("train_gpt.py", "aurora/optim/polar.py", "aurora/tokens/shards.py"):
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
    assert set(end["untimed"]) == {"import_s", "setup_s", "warmup_s", "val_s", "checkpoint_s", "end_s"}
    assert start["compiled"] is False and end["peak_mem_mib"] > 50
    matrix_group = next(group for group in start["param_groups"] if group["role"] == "matrix")
    if optimizer != "adamw":
        assert matrix_group["polar_dtype"] == "float32" and len(matrix_group["polar_coefficients"]) == 5
    assert end["train_time_s"] >= sum(event["step_ms"] for event in trains) * 5 / 1000 * 0.99


@pytest.mark.slow
def test_task_hash_tells_tasks_apart_but_not_optimizers_seeds_or_steps(tiny_track, trained, tmp_path):
    hashes = {trained[name][0]["task_hash"] for name in OPTIMIZERS}
    assert len(hashes) == 1
    same = [
        "train.steps=2",
        "optimizer.muon.steps=2",
        "model.mlp=relu2",
        "model.head_dtype=activation",
        "train.micro_batch=4",
        "optimizer.muon.lr=0.01",
    ]
    different = [
        "eval.target=3.5",
        "model.mlp=swiglu",
        "model.head_dtype=float8",
        "model.mlp_expansion=2",
        "eval.tokens=256",
        "train.batch_tokens=256",
    ]
    for index, override in enumerate(same + different):
        out = tmp_path / str(index)
        arguments = ["--optimizer", "muon", "--seed", "3", "--set", "train.steps=1", "--set", override]
        assert train_here(tiny_track, out, *arguments) == 0
        assert (events(out)[0]["task_hash"] in hashes) == (override in same)


BROKEN_WANDB = {
    "missing": "raise ImportError('No module named wandb')",
    "raises at its start": "Settings = dict\ndef init(**kwargs): raise RuntimeError('the server\\nsays no')",
    "raises later": "def log(metrics): raise ValueError('quota')",
    "exits": "import os; os._exit(3)",
    "hangs": "import signal, time; signal.alarm(1); time.sleep(100)",
    "closes its input": "def log(metrics): import sys; sys.stdin.buffer.raw.close()",
}
FAKE_WANDB = """
import json, os, sys, types
Settings = dict
def say(value): open(os.environ["FAKE_WANDB_LOG"], "a").write(json.dumps(value) + chr(10))
def log(metrics): say(metrics)
def init(**kwargs):
    say(kwargs)
    return types.SimpleNamespace(
        define_metric=lambda *args, **kwargs: None, log=log, finish=lambda: say("finished"), dir="d/files", url=None
    )
"""


@pytest.fixture
def fake_wandb(tmp_path, monkeypatch):
    """Makes the next runs import a wandb that notes its calls; call it with code to break it, and for its notes."""
    package = tmp_path / "site" / "wandb"
    package.mkdir(parents=True)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.setenv("FAKE_WANDB_LOG", str(tmp_path / "calls"))

    def use(breakage=""):
        (package / "__init__.py").write_text(FAKE_WANDB + breakage)
        return tmp_path / "calls"

    return use


@pytest.mark.parametrize("breakage", [often(name, name in ("raises later", "exits", "hangs")) for name in BROKEN_WANDB])
def test_wandb_that_cannot_be_used_costs_one_warning_not_the_run(
    tiny_track, trained, tmp_path, capfd, fake_wandb, breakage
):
    fake_wandb(BROKEN_WANDB[breakage])
    out = tmp_path / "out"
    assert train_here(tiny_track, out, "--optimizer", "muon", "--wandb", "online") == 0
    warning = capfd.readouterr().err.replace("wandb: None\n", "")  # the fake has no address
    assert warning.startswith("warning: wandb is off from here: ") and warning.count("\n") == 1
    assert events(out)[-1]["weights_sha256"] == trained["muon"][-1]["weights_sha256"]


def test_wandb_that_reads_nothing_is_left_behind(tmp_path, capfd, fake_wandb):
    fake_wandb("def log(metrics): import time; time.sleep(100)")
    tracker = Tracker("online", {"run_id": "r", "task_hash": "t", "optimizer": "muon"}, is_writer=True)
    for step in range(10_000):
        tracker.log({"event": "train", "step": step, "loss": 1.0})
    tracker.finish()
    assert capfd.readouterr().err.count("warning: wandb is off") == 1


def test_wandb_unreachable_costs_one_warning_not_the_run(tiny_track, tmp_path, capfd, monkeypatch):
    pytest.importorskip("wandb")
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections and never answers
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
        monkeypatch.setenv("WANDB_DIR", str(tmp_path))
        assert train_here(tiny_track, tmp_path / "out", "--wandb", "online", "--set", "train.steps=10") == 0
    assert capfd.readouterr().err.count("warning: wandb is off") == 1


def test_wandb_run_keeps_its_id_over_a_resume_and_gets_the_metrics_of_the_record(
    tiny_track, tmp_path, monkeypatch, fake_wandb
):
    calls, out = fake_wandb(), tmp_path / "out"
    arguments = ["--wandb", "offline", "--set", "train.steps=20", "--set", "train.checkpoint_every=10"]
    original = train_gpt.train_step

    def die_at_15(run, model, step, *rest):
        if step == 15:
            raise KeyboardInterrupt
        return original(run, model, step, *rest)

    monkeypatch.setattr(train_gpt, "train_step", die_at_15)
    with contextlib.suppress(KeyboardInterrupt):
        train_here(tiny_track, out, *arguments)
    monkeypatch.setattr(train_gpt, "train_step", original)
    assert train_here(tiny_track, out, *arguments, "--resume") == 0
    notes = [json.loads(line) for line in calls.read_text().splitlines()]
    starts = [note for note in notes if "project" in note]
    start = events(out)[0]
    assert [call["id"] for call in starts] == [start["run_id"]] * 2 and notes.count("finished") == 2
    assert starts[0]["project"] == "nanogpt-speedrun" and starts[0]["group"] == start["task_hash"][:12]
    assert starts[0]["mode"] == "offline" and "sources" not in starts[0]["config"]
    assert [(note["step"], note["val/val_loss"]) for note in notes if "val/val_loss" in note] == losses(out)


def test_wandb_offline_file_holds_the_values_of_the_record(tiny_track, tmp_path, monkeypatch):
    pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    assert train_here(tiny_track, tmp_path / "out", "--wandb", "offline") == 0
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    mirrored = [event for event in events(tmp_path / "out") if event["event"] in ("train", "val", "neurons", "end")]
    expected = [
        {"step": event["step"]}
        | {f"{event['event']}/{k}": v for k, v in event.items() if isinstance(v, int | float) and k != "step"}
        for event in mirrored
    ]
    rows, step_metrics, deadline_s = [], {}, time.monotonic() + 30
    while len(rows) < len(expected) and time.monotonic() < deadline_s:  # a process of wandb's own writes it
        time.sleep(0.1)
        rows, step_metrics = offline_rows(pb, path.read_bytes())
    assert rows == expected
    assert step_metrics["*"] == "step", "the x axis of every chart"


def offline_rows(pb, content):
    """The rows of an offline file, and which metric is the x axis of which."""
    rows, step_metrics = [], {}
    for one in leveldb_log(content):
        record = pb.Record.FromString(one)
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.append({key: value for key, value in items.items() if not key.startswith("_")})
        elif record.WhichOneof("record_type") == "metric":
            step_metrics[record.metric.glob_name or record.metric.name] = record.metric.step_metric
    return rows, step_metrics


def leveldb_log(content: bytes):
    """The records of a file in LevelDB's log format, as wandb writes it: 7 bytes, then blocks of 32 KiB."""
    position, record = 7, b""
    while position + 7 <= len(content):
        if 2**15 - position % 2**15 < 7:  # no chunk begins so late in a block
            position += 2**15 - position % 2**15
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)  # after 4 bytes of CRC
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last chunk
            yield record
            record = b""
