"""What else lies in folders of records, logs and shards, and what stands around the lines of logs: every reader."""

import json
import math
import os
import sys

import numpy as np
import pytest

from aurora.tokens.shards import write_shard
from aurora.trainer.record import read_folder
from data import fineweb
from scripts import compare, leaderboard, logs, plot, verify
from scripts.analysis.foreign import read_log, read_logs
from scripts.runs import Workers
from tests.synthetic import write_records

APPLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        \x00\x02\x00\x00\x00\x09" + bytes(100)  # a ._ file


def add_hidden(folder, copied, suffix):
    """What macOS, Jupyter and editors leave by themselves: nobody looks at it, nor do readers."""
    (folder / f"._{copied.name}").write_bytes(APPLE)
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / ".ipynb_checkpoints" / f"{copied.stem}-checkpoint{suffix}").write_bytes(copied.read_bytes())
    (folder / f".{copied.name}.swp{suffix}").write_bytes(copied.read_bytes())
    (folder / ".DS_Store").write_bytes(APPLE)
    (folder / "Thumbs.db").write_bytes(APPLE)


def add_foreign(folder, copied, suffix):
    """Files with the readers' suffix that are something else; the names."""
    content = copied.read_bytes()
    files = {
        "apple": APPLE,
        "array": b"[1, 2]\n",
        "bare": b"1\nnull\n",
        "dataset": b'{"text": "a document"}\n{"text": "another"}\n',
        "deep": b"[" * 100_000 + b"\n",
        "digits": b'{"event": "run", "seed": ' + b"9" * 5000 + b"}\n",
        "empty": b"",
        "html": b"<!DOCTYPE html><title>404</title>\n",
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "nul": bytes(1000) + b"\n",
        "utf16": content.decode().encode("utf-16"),
        "utf16le": content.decode().encode("utf-16-le"),
        "wandb": b'{"_step": 1, "loss": 3.2}\n',
        "zip": b"PK\x03\x04" + bytes(range(256)),
    }
    for name, text in files.items():
        (folder / f"{name}{suffix}").write_bytes(text)
    os.mkfifo(folder / f"pipe{suffix}")
    (folder / f"dangling{suffix}").symlink_to("nowhere")
    (folder / f"folder{suffix}").mkdir()
    return [*files, "pipe", "dangling"]


@pytest.fixture
def records(tmp_path):
    folder = tmp_path / "results" / "mine"
    paths = write_records(folder, 6, 2)
    add_hidden(folder, paths[0], ".jsonl")
    return folder, paths


def run(main, monkeypatch, capsys, *argv):
    """Exit code and what a program said, in this process."""
    monkeypatch.setattr(sys, "argv", ["program", *map(str, argv)])
    try:
        code = main()
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return code, said.out, said.err.splitlines()


def test_hidden_copies_of_records_are_no_runs(records, tmp_path, monkeypatch, capsys):
    folder, paths = records
    runs, errors = read_folder(folder)
    assert [run.path for run in runs] == sorted(paths) and not errors
    assert [run.path for run in Workers(1, folder).records()] == sorted(paths)
    code, out, err = run(compare.main, monkeypatch, capsys, "--report", folder)
    assert code == 0 and not err and out.count("| 3 ") == 2
    code, out, err = run(plot.main, monkeypatch, capsys, folder, "--out", tmp_path / "x.png")
    assert code == 0 and not err
    code, out, err = run(verify.main, monkeypatch, capsys, folder, "--json")
    assert sorted(entry["path"] for entry in json.loads(out)["records"]) == sorted(map(str, paths)) and not err
    code, out, err = run(leaderboard.main, monkeypatch, capsys, "--results", folder.parent)
    page = (folder / "README.md").read_text()
    assert code == 0 and not err and "[r6]: " in page and "[r7]: " not in page


def test_foreign_files_among_records_are_named_in_a_line_each(records, tmp_path, monkeypatch, capsys):
    folder, paths = records
    names = add_foreign(folder, paths[0], ".jsonl")
    runs, errors = read_folder(folder)
    assert [run.path for run in runs] == sorted(paths) and len(errors) == len(names)
    for program, argv in ((compare.main, ["--report", folder]), (plot.main, [folder, "--out", tmp_path / "x.png"])):
        code, out, err = run(program, monkeypatch, capsys, *argv)
        assert code == 0 and len(err) == len(names) and all(line.startswith("warning: ") for line in err)
        assert all(any(f"{name}.jsonl" in line for line in err) for name in names)
        assert sum("utf-16" in line and "UTF-8" in line for line in err) == 2
    code, out, err = run(verify.main, monkeypatch, capsys, folder, "--json")
    assert code == 1 and not err and len(json.loads(out)["records"]) == len(paths) + len(names)
    code, out, err = run(leaderboard.main, monkeypatch, capsys, "--results", folder.parent)
    assert code == 0 and len(err) == len(names)


# ----------------------------------------------------------------------------------------------------------------------
# Logs

LOGS = {
    "modded-nanogpt": ("step:{step}/250 val_loss:{loss} train_time:19.5s step_avg:156.0ms\n", "val_loss"),
    "llm.c": ("s:{step} tel:{loss}\n", "val_loss"),
    "nanoGPT": ("step {step}: train loss 6.40, val loss {loss}\niter {step}: loss 6.4, time 3ms, mfu 1%\n", "val_loss"),
    "build-nanogpt log": ("{step} val {loss}\n{step} hella 0.2463\n{step} train 6.4\n", "val_loss"),
    "build-nanogpt": (
        "validation loss: {loss}\nHellaSwag accuracy: 2463/10042=0.2453\n"
        "step {step:5d} | loss: 6.400000 | lr 6.0e-04 | norm: 0.3 | dt: 90.0ms | tok/sec: 5000\n"
        "step {last:5d} | loss: 6.400000 | lr 6.0e-04 | norm: 0.3 | dt: 90.0ms | tok/sec: 5000\n",
        "val_loss",
    ),
    "nanochat": (
        "Step {step:05d} | Validation bpb: {loss}\n"
        "step {step:05d}/00250 (0.05%) | loss: 6.4 | lrm: 1.00 | dt: 90.0ms | tok/sec: 5,000\n",
        "val_bpb",
    ),
}
PREFIXES = {
    "none": "",
    "torchrun --tee 3": "[default0]:",
    "torchrun --tee 3, role": "[trainer12]: ",
    "srun -l": "0: ",
    "srun -l of many": " 12: ",
    "kubectl --prefix": "[pod/train-0-abcde/main] ",
    "kubectl --timestamps": "2026-11-28T23:11:04.123456789Z ",
    "docker compose": "trainer-1  | ",
    "logging": "2026-11-28 23:11:04,123 - INFO - ",
    "logging, short": "INFO:root:",
    "kubectl of torchrun of logging": "[pod/train-0/main] [default0]:[2026-11-28 23:11:04] INFO: ",
    "colours": "\x1b[1;32m\x1b[0m",
    "progress bar": "\x1b[2K 45%|####5     | 9/20\r",
}


def text_of(name, shift=0.0):
    line = LOGS[name][0]
    return "".join(line.format(step=step, last=step + 124, loss=loss + shift) for step, loss in LOSSES.items())


LOSSES = {0: 10.8, 125: 4.6, 250: 3.3}


@pytest.mark.parametrize("name", LOGS)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_logs_are_read_behind_what_launchers_put_in_front(tmp_path, name, prefix):
    lines = ["W1128 23:11:04 torch/distributed/run.py:793] ***", "", *text_of(name).splitlines()]
    path = tmp_path / "log.txt"
    path.write_bytes("".join(f"{PREFIXES[prefix]}{line}\n" for line in lines).encode())
    (trial,) = read_log(path)
    assert trial.values(LOGS[name][1]) == pytest.approx(LOSSES), trial


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", LOGS)
def test_logs_in_the_encodings_of_windows(tmp_path, name, encoding):
    (tmp_path / "log.txt").write_bytes(text_of(name).replace("\n", "\r\n").encode(encoding))
    (trial,) = read_log(tmp_path / "log.txt")
    assert trial.values(LOGS[name][1]) == pytest.approx(LOSSES)


def test_autoresearch_says_its_result_at_the_end(tmp_path, capsys):
    for i in range(3):
        steps = "".join(f"\rstep {step:05d} (1.0%) | loss: 4.2 | lrm: 1.00 | remaining: 9s    " for step in range(99))
        result = f"\n---\nval_bpb:          0.99790{i}\ntraining_seconds: 300.1\ntotal_seconds:    325.9\n"
        (tmp_path / f"{i}.log").write_text(f"{steps}{result}num_steps:        953\nnum_params_M:     50.3\n")
    trials, errors = read_logs([tmp_path])
    assert not errors and [trial.status for trial in trials] == ["complete"] * 3
    assert trials[1].values("val_bpb") == {953: 0.997901} and trials[1].validations[0].time_s == 300.1
    assert logs.main([str(tmp_path)]) == 1 and "they log val_bpb, see --metric" in capsys.readouterr().out
    assert logs.main([str(tmp_path), "--metric", "val_bpb", "--target", "1.01"]) == 0
    assert "3 runs" in capsys.readouterr().out, "other losses, so no copies of each other"


def test_hidden_and_foreign_files_among_logs(tmp_path, capsys):
    for number in range(3):
        (tmp_path / f"{number}.log").write_text(text_of("modded-nanogpt", shift=-0.03 + number / 1e4))
    add_hidden(tmp_path, tmp_path / "0.log", ".log")
    trials, errors = read_logs([tmp_path])
    assert [trial.path.name for trial in trials] == ["0.log", "1.log", "2.log"] and not errors
    names = add_foreign(tmp_path, tmp_path / "0.log", ".log")
    for name in ("utf16", "utf16le"):  # which are logs
        (tmp_path / f"{name}.log").unlink()
    trials, errors = read_logs([tmp_path])
    odd = {name for name in names if "utf" not in name} - {"pipe", "dangling"}
    assert len(trials) == 3 and len(errors) == len(odd) and all("\n" not in str(error) for error in errors)
    assert logs.main([str(tmp_path), "--json"]) == 0
    (finding,) = json.loads(capsys.readouterr().out)
    assert finding["trials"] == 3 and finding["mean"] == pytest.approx(3.2701)


# ----------------------------------------------------------------------------------------------------------------------
# Shards


def test_hidden_files_among_shards_are_no_shards(tmp_path, capsys):
    tokens = np.random.default_rng(0).integers(0, 50257, 3000)
    write_shard(tmp_path / "fineweb_val_000000.bin", tokens[:1000])
    write_shard(tmp_path / "fineweb_train_000001.bin", tokens[1000:])
    add_hidden(tmp_path, tmp_path / "fineweb_train_000001.bin", ".bin")
    assert fineweb.main(["check", str(tmp_path)]) == 0
    assert "no problems" in capsys.readouterr().out


def test_losses_that_are_no_number_stay_what_they_are(tmp_path):
    (tmp_path / "log.txt").write_text("[default0]:250 val nan\n")
    (trial,) = read_log(tmp_path / "log.txt")
    assert trial.status == "diverged" and math.isnan(trial.values("val_loss")[250])
