"""Shards from the hub, against a local server that speaks its protocol, in processes of their own."""

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from aurora.tokens.shards import ShardError, write_shard
from data import hub
from data.hub import DATASETS, HubDataset
from tests.conftest import ROOT
from tests.hub_server import COMMIT, HubServer

REPO = DATASETS["fineweb10B"].repo
NAMES = ["fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin", "fineweb_train_000003.bin"]


@pytest.fixture(scope="module")
def shard_files(tmp_path_factory):
    """Four shards of 1 MB by name."""
    folder, generator = tmp_path_factory.mktemp("hub"), np.random.default_rng(0)
    for name in NAMES:
        write_shard(folder / name, generator.integers(0, 50257, 500_000))
    return {name: (folder / name).read_bytes() for name in NAMES}


@pytest.fixture
def server(shard_files):
    with HubServer(REPO, dict(shard_files)) as running:
        yield running


def start_download(server, out, *args, **variables):
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment = clean | {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(out) + ".home"} | variables
    command = [sys.executable, "data/fineweb.py", "download", "--revision", "main", "--out", str(out), *args]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def download(server, out, *args, **variables):
    """(exit code, stdout, last line of stderr) of one download."""
    process = start_download(server, out, *args, **variables)
    stdout, stderr = process.communicate(timeout=120)
    assert "Traceback" not in stderr
    return process.returncode, stdout, (stderr.splitlines() or [""])[-1]


def test_download_brings_what_was_asked_for_and_nothing_twice(server, shard_files, tmp_path):
    assert download(server, tmp_path / "out", "--train-shards", "2", HF_TOKEN="hf_secret")[0] == 0
    for name in NAMES[:3]:
        assert (tmp_path / "out" / name).read_bytes() == shard_files[name]
    assert "Bearer hf_secret" in server.tokens
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["source"] == {"repo": REPO, "revision": COMMIT}
    assert {name: entry["sha256"] for name, entry in manifest["shards"].items()} == {
        name: hashlib.sha256(shard_files[name]).hexdigest() for name in NAMES[:3]
    }
    visible = {path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")}
    assert visible == {*NAMES[:3], "manifest.json"}

    assert download(server, tmp_path / "out", "--train-shards", "3")[0] == 0
    assert server.gets == dict.fromkeys(NAMES, 1)
    # What is here needs no hub.
    assert download(server, tmp_path / "out", "--train-shards", "3", HF_HUB_OFFLINE="1")[0] == 0
    code, _, error = download(server, tmp_path / "out", "--train-shards", "4", HF_HUB_OFFLINE="1")
    assert code == 3 and "1 more: fineweb_train_000004.bin" in error and "HF_HUB_OFFLINE" in error


def test_a_cut_connection_is_taken_up_where_it_broke(server, tmp_path):
    write_shard(tmp_path / NAMES[1], np.arange(13_000_000) % 50_000)
    content = server.files[NAMES[1]] = (tmp_path / NAMES[1]).read_bytes()  # huggingface_hub writes in parts of 10 MB
    server.cut[NAMES[1]] = [12_000_000, 11_000_000]
    assert download(server, tmp_path / "out", "--train-shards", "1")[0] == 0
    assert (tmp_path / "out" / NAMES[1]).read_bytes() == content
    assert server.gets[NAMES[1]] == 3
    assert server.ranges == [f"bytes={done}-" for done in (10 * 2**20, 20 * 2**20)]


def test_busy_and_broken_servers_are_asked_again(server, shard_files, tmp_path):
    server.statuses = {NAMES[0]: [429], NAMES[1]: [500], NAMES[2]: [503, 502]}
    assert download(server, tmp_path / "out", "--train-shards", "2")[0] == 0
    assert server.gets == {NAMES[0]: 2, NAMES[1]: 2, NAMES[2]: 3}
    assert (tmp_path / "out" / NAMES[2]).read_bytes() == shard_files[NAMES[2]]


def test_a_file_with_a_wrong_hash_never_gets_its_name(server, shard_files, tmp_path):
    wrong = bytearray(shard_files[NAMES[1]])
    wrong[777_777] ^= 1
    server.swapped[NAMES[1]] = bytes(wrong)
    code, _, error = download(server, tmp_path / "out", "--train-shards", "2")
    expected, found = (hashlib.sha256(content).hexdigest() for content in (shard_files[NAMES[1]], wrong))
    assert code == 3 and f"{NAMES[1]}: sha256: expected {expected}, found {found}" in error
    assert not (tmp_path / "out" / NAMES[1]).exists()
    server.swapped.clear()
    assert download(server, tmp_path / "out", "--train-shards", "2")[0] == 0
    assert (tmp_path / "out" / NAMES[1]).read_bytes() == shard_files[NAMES[1]]


def test_a_failure_that_stays_is_one_line_after_the_last_attempt(monkeypatch):
    monkeypatch.setattr(hub, "FIRST_WAIT_S", 0.0)
    attempts = []

    def fail():
        attempts.append(1)
        raise ConnectionError("no route\nto host")

    with pytest.raises(ShardError, match="expected the file, found no route to host; check name, token and network"):
        hub.with_retries(fail, "a/b")
    assert len(attempts) == hub.ATTEMPTS


def test_eight_processes_at_once_fetch_each_file_once(server, shard_files, tmp_path):
    processes = [start_download(server, tmp_path / "out", "--train-shards", "3") for _ in range(8)]
    for process in processes:
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
    assert server.gets == dict.fromkeys(NAMES, 1)
    assert all((tmp_path / "out" / name).read_bytes() == shard_files[name] for name in NAMES)


def test_a_killed_download_keeps_its_whole_files(server, shard_files, tmp_path):
    server.statuses[NAMES[3]] = [503] * 100
    process = start_download(server, tmp_path / "out", "--train-shards", "3")
    while not (tmp_path / "out" / NAMES[2]).exists() or len(server.statuses[NAMES[3]]) > 99:
        assert process.poll() is None
    process.kill()
    process.communicate()
    server.statuses.clear()
    server.gets.clear()
    assert download(server, tmp_path / "out", "--train-shards", "3")[0] == 0
    assert server.gets[NAMES[3]] == 1 and server.gets[NAMES[2]] == 0
    assert all((tmp_path / "out" / name).read_bytes() == shard_files[name] for name in NAMES)


def test_pinned_hashes_hold_whatever_the_server_says(server, tmp_path):
    arguments = ["--train-shards", "1", "--revision", DATASETS["fineweb10B"].revision]
    code, _, error = download(server, tmp_path / "out", *arguments)
    assert code == 3 and DATASETS["fineweb10B"].sha256[NAMES[0]] in error and "HF_ENDPOINT" in error
    assert not list((tmp_path / "out").glob("*.bin"))


def test_files_of_other_tools_are_adopted_when_they_are_the_same(server, shard_files, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / NAMES[0]).write_bytes(shard_files[NAMES[0]])
    assert download(server, out, "--train-shards", "1")[0] == 0
    assert server.gets[NAMES[0]] == 0
    (out / NAMES[2]).write_bytes(shard_files[NAMES[3]])
    code, _, error = download(server, out, "--train-shards", "2")
    assert code == 3 and NAMES[2] in error and "move this file away" in error
    assert (out / NAMES[2]).read_bytes() == shard_files[NAMES[3]]


def test_unknown_files_and_other_datasets_are_refused(server, tmp_path):
    code, _, error = download(server, tmp_path / "out", "--train-shards", "4")
    assert code == 3 and "expected fineweb_train_000004.bin, found no such file" in error
    assert download(server, tmp_path / "out", "--train-shards", "1")[0] == 0
    code, _, error = download(server, tmp_path / "out", "--train-shards", "1", "--dataset", "fineweb100B")
    assert code == 3 and "use another --out" in error
    code, _, error = download(server, tmp_path / "out", "--train-shards", "104")
    assert code == 3 and "103 in kjj0/fineweb10B-gpt2" in error


def test_a_small_disk_is_noticed_before_anything_is_fetched(server, tmp_path, monkeypatch, capsys):
    class SmallDisk:
        free = 1_500_000

    remote = {name: hub.RemoteFile(1_001_024, "0" * 64) for name in NAMES}
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: SmallDisk)
    with pytest.raises(OSError, match="0.00 GiB are needed for 4 files") as error:
        hub.fetch(REPO, COMMIT, remote, tmp_path, {"shards": {}}, 1)
    assert error.value.errno == 28 and not server.gets


def test_the_shards_of_a_run_are_counted(server, tmp_path):
    arguments = ["--for", "configs/gpt2_small.toml", "--set", "train.steps=400"]
    assert "need 3 train shards" in download(server, tmp_path / "out", *arguments)[1]
    assert set(server.gets) == set(NAMES)


def test_names_are_those_of_the_public_repositories():
    dataset = HubDataset("a/b", "finewebedu", 99, "main", {})
    assert dataset.files(2) == [
        "finewebedu_val_000000.bin",
        "finewebedu_train_000001.bin",
        "finewebedu_train_000002.bin",
    ]
