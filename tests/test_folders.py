"""Paths from wherever one stands, and folders that are taken or none."""

import argparse
import os
import re
import shlex
import shutil
import sys

import pytest

import train_gpt
from aurora.command_line import track_path
from aurora.config import ROOT, load_config
from aurora.errors import Exit
from aurora.trainer.identity import describe_git
from data import fineweb, local
from scripts import compare, tune
from scripts.analysis.tuning import read_space
from scripts.benchmarks.runs import runs as benchmark_runs
from scripts.runs import take_folder, track_name
from tests.conftest import start_process, train_here


def run_compare(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, words)])
    return compare.main()


def test_tracks_are_found_from_ones_own_folder_and_from_the_checkout(tmp_path, monkeypatch):
    (tmp_path / "own.toml").write_text((ROOT / "configs" / "quick.toml").read_text())
    monkeypatch.chdir(tmp_path)
    assert track_name("own.toml") == str(tmp_path / "own.toml") and track_path("own.toml").exists()
    assert track_name("configs/quick.toml") == "configs/quick.toml" == track_name(str(ROOT / "configs/quick.toml"))
    assert load_config(track_path("configs/quick.toml"), "muon").optimizer == "muon"
    assert compare.plan_runs(compare.parse_args(["--config", "own.toml"]))[0].argv[1] == str(tmp_path / "own.toml")
    assert tune.parse_args(["--config", "own.toml"]).config == str(tmp_path / "own.toml")


@pytest.mark.slow
def test_compare_finds_again_the_runs_of_a_track_in_another_folder(tiny_track, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tiny_track.parent)
    words = ["--config", "tiny.toml", "--optimizers", "muon", "--set", "train.steps=2", "--out", tmp_path / "out"]
    assert run_compare(monkeypatch, *words) == 0
    assert "finished before" not in capsys.readouterr().out
    assert run_compare(monkeypatch, *words) == 0
    assert "finished before" in capsys.readouterr().out


def test_a_folder_that_is_a_file_or_taken_is_told_before_any_run(tiny_track, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("text")
    words = ["--config", tiny_track, "--optimizers", "muon", "--out"]
    assert run_compare(monkeypatch, *words, tmp_path / "file") == Exit.DISK
    assert f"--out {tmp_path / 'file'} is not a folder that can be written" in capsys.readouterr().err
    with take_folder(tmp_path / "taken"):
        assert run_compare(monkeypatch, *words, tmp_path / "taken") == Exit.CONFIG
    said = capsys.readouterr()
    assert f"is in use by process {os.getpid()} on" in said.err and "[1/1]" not in said.out
    assert train_here(tiny_track, tmp_path / "file") == Exit.DISK


def test_every_command_that_is_printed_can_be_pasted_whatever_the_folder_is_called(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "it's [a] * $b"
    folder.mkdir()
    (folder / "text.txt").write_text("some words of a text\n" * 5000)
    assert local.main(["--text", str(folder / "text.txt"), "--out", str(folder)]) == 0
    (by_local,) = re.findall("train on it:  (.*)", capsys.readouterr().out)
    monkeypatch.setattr(fineweb, "tokenize", lambda *arguments: (folder / "fineweb_train_000001.bin").touch())
    assert fineweb.main(["tokenize", "--files", str(folder / "text.txt"), "--out", str(folder)]) == 0
    (by_fineweb,) = re.findall("train on it:  (.*)", capsys.readouterr().out)
    shutil.copy(ROOT / "configs" / "quick.toml", folder)
    args = tune.parse_args(["--config", str(folder / "quick.toml")])
    page = tune.report(tune.Ledger(folder / "ledger.json", []), read_space(args.space), args)
    by_runs = benchmark_runs(
        argparse.Namespace(seeds=[], optimizers=[], overrides=[], pilot=None, out=folder)
    ).partition(": ")[2]
    for command, word in (
        (by_local, f"data.train={folder}/local_train_*.bin"),
        (by_fineweb, f"data.val={folder}/fineweb_val_*.bin"),
        (page.partition("`")[2].partition("`")[0], f"{folder}/quick.toml"),
        (by_runs, str(folder)),
    ):
        assert word in shlex.split(command), command
    assert train_gpt.main([*shlex.split(by_local)[2:], "--dry-run"]) == 0


@pytest.mark.parametrize("flags, env", [(("-I",), {}), ((), {"PYTHONSAFEPATH": "1"})])
def test_programs_find_the_project_without_their_folder_on_the_path(tmp_path, flags, env):
    for name in ("train_gpt.py", "scripts/verify.py"):
        process = start_process(*flags, str(ROOT / name), "--help", cwd=tmp_path, env={"PYTHONPATH": "", **env})
        out, said = process.communicate(timeout=60)
        assert process.returncode == 0 and "usage: " in out and not said


def test_a_checkout_of_another_user_has_a_commit_and_one_without_git_is_told(monkeypatch, tiny_track, tmp_path, capsys):
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    found = describe_git()
    assert found is None or len(found["commit"]) == 40
    if (ROOT / ".git").exists():
        assert found
        monkeypatch.setattr("aurora.trainer.describe.describe_git", lambda: None)
        assert train_here(tiny_track, tmp_path, "--set", "train.steps=2") == 0
        assert "warning: git does not tell the commit of this checkout" in capsys.readouterr().out
