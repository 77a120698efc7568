"""Shard format, offline corpus and the loader's stream."""

import hashlib
import os
import threading
import time

import numpy as np
import pytest

from aurora.config import load_config
from aurora.tokens.loader import TokenLoader, find_shards, open_run_data, steps_in_shard
from aurora.tokens.overlap import ProbeIndex
from aurora.tokens.shards import ShardError, open_shard, verify_shard, write_shard
from aurora.trainer.record import read_record
from data import local
from tests.conftest import ROOT, shard_bytes


def test_write_then_open_gives_the_tokens_back(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 65536, 1000).astype(np.uint16)
    write_shard(tmp_path / "a.bin", tokens)
    assert (tmp_path / "a.bin").read_bytes() == shard_bytes(tokens)
    assert np.array_equal(open_shard(tmp_path / "a.bin"), tokens)
    info = verify_shard(tmp_path / "a.bin", vocab_size=65536)
    assert info == ("a.bin", 1000, int(tokens.max()), hashlib.sha256(tokens.astype("<u2").tobytes()).hexdigest())
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_verify_names_the_first_token_outside_the_vocabulary(tmp_path):
    write_shard(tmp_path / "a.bin", np.array([1, 2, 99, 98], dtype=np.uint16))
    expected = r"a.bin: token at position 2: expected at most 49 \(model.vocab_size = 50\), found 99;"
    with pytest.raises(ShardError, match=expected):
        verify_shard(tmp_path / "a.bin", vocab_size=50)
    assert verify_shard(tmp_path / "a.bin", vocab_size=100).max_token == 99


def test_write_refuses_what_does_not_fit_and_leaves_nothing(tmp_path):
    for tokens in (np.array([-1]), np.array([65536]), np.zeros((2, 2), dtype=np.uint16)):
        with pytest.raises(ShardError):
            write_shard(tmp_path / "a.bin", tokens)
    assert not list(tmp_path.iterdir())


def write_shards(folder, sizes):
    start = 0
    for number, size in enumerate(sizes):
        write_shard(folder / f"t_train_{number:06d}.bin", np.arange(start, start + size) % 60000)
        start += size
    write_shard(folder / "t_val_000000.bin", np.arange(200))


def run_data(folder, steps, batch_tokens=20, val_tokens=100, allow_epochs=False):
    patterns = f"{folder}/t_train_*.bin", f"{folder}/t_val_*.bin"
    return open_run_data(*patterns, steps, batch_tokens, val_tokens, 65536, allow_epochs)


def public_stream(sizes, batch_tokens):
    """The public benchmark's loader: move on when position + batch + 1 reaches the end of the shard."""
    starts, shard_start = [], 0
    for size in sizes:
        position = 0
        while position + batch_tokens + 1 < size:
            starts.append(shard_start + position)
            position += batch_tokens
        shard_start += size
    return starts


@pytest.mark.parametrize("sizes", [(101, 62, 61), (17, 18, 16, 40, 42), (100,), (161, 16, 19, 33)])
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_loader_gives_the_public_stream_to_any_number_of_ranks(tmp_path, sizes, world_size):
    write_shards(tmp_path, sizes)
    starts = public_stream(sizes, 16)
    assert sum(steps_in_shard(size, 16) for size in sizes) == len(starts)
    data = run_data(tmp_path, steps=len(starts), batch_tokens=16)
    loaders = [TokenLoader(data.train_shards, 16, rank, world_size) for rank in range(world_size)]
    for start in starts:
        batches = [loader.next_batch() for loader in loaders]
        inputs = np.concatenate([batch[:-1] for batch in batches])
        targets = np.concatenate([batch[1:] for batch in batches])
        assert np.array_equal(inputs, np.arange(start, start + 16))
        assert np.array_equal(targets, np.arange(start + 1, start + 17))
    with pytest.raises(IndexError, match=f"the shards last for {len(starts)} steps"):
        loaders[0].next_batch()


def test_epochs_begin_again_with_the_first_shard_when_the_config_allows_it(tmp_path):
    write_shards(tmp_path, (101, 62))
    data = run_data(tmp_path, steps=20, allow_epochs=True)
    assert data.epochs == data.describe()["epochs"] == 20 / 7
    loader = TokenLoader(data.train_shards, 20, 0, 1, allow_epochs=True)
    firsts = [int(loader.next_batch()[0]) for _ in range(20)]
    once = public_stream((101, 62), 20)
    assert firsts == (once * 3)[:20]
    # Where the stream begins again is part of the task.
    assert data.describe()["stream_id"] != run_data(tmp_path, steps=7).describe()["stream_id"]


def test_next_batch_is_prepared_while_the_caller_works(tmp_path):
    write_shards(tmp_path, (122,))
    prepared = threading.Semaphore(0)

    def prepare(window):
        assert threading.current_thread() is not threading.main_thread()
        prepared.release()
        return window.copy()

    loader = TokenLoader(run_data(tmp_path, steps=5).train_shards, 20, 0, 1, prepare)
    for step in range(4):
        loader.next_batch()
        for _ in range(2 if step == 0 else 1):  # the first batch, and from then on the next one
            assert prepared.acquire(timeout=5)
    waited_s = loader.wait_s
    time.sleep(0.05)
    loader.next_batch()
    assert 0 <= loader.wait_s - waited_s < 0.04


def test_public_benchmark_shard_gives_190_steps():
    assert steps_in_shard(100_000_000, 524_288) == 190


def test_loader_state_continues_in_mid_shard_and_at_its_edge(tmp_path):
    write_shards(tmp_path, (101, 101))
    data = run_data(tmp_path, steps=8)
    for cut in range(8):
        whole, resumed = (TokenLoader(data.train_shards, 20, 0, 1) for _ in range(2))
        for _ in range(cut):
            whole.next_batch()
        resumed.next_batch()
        resumed.load_state_dict(whole.state_dict())
        assert np.array_equal(whole.next_batch(), resumed.next_batch())


def test_a_project_in_a_folder_with_brackets_finds_its_shards(tmp_path, monkeypatch):
    folder = tmp_path / "runs [1]"
    folder.mkdir()
    write_shard(folder / "a_000001.bin", np.arange(10, dtype=np.uint16))
    monkeypatch.setattr("aurora.tokens.loader.ROOT", folder)
    assert find_shards("a_*.bin") == [folder / "a_000001.bin"]


def test_run_data_counts_steps_and_opens_only_what_it_needs(tmp_path):
    write_shards(tmp_path, (101, 101, 101))
    assert len(run_data(tmp_path, steps=4).train_shards) == 1
    assert len(run_data(tmp_path, steps=5).train_shards) == 2
    assert len(run_data(tmp_path, steps=12).train_shards) == 3
    message = "expected enough for 13 steps of 20 tokens, found 12 steps in 3 shards; get 4 shards of 101 tokens"
    with pytest.raises(ShardError, match=message):
        run_data(tmp_path, steps=13)
    with pytest.raises(ShardError, match="get 6 shards of 101 tokens"):
        run_data(tmp_path, steps=21)
    with pytest.raises(ShardError, match="needs shards of at least 122 tokens, the largest has 101"):
        run_data(tmp_path, steps=1, batch_tokens=120)
    with pytest.raises(ShardError, match=r"expected 201 \(eval.tokens and one more\), found 200; lower eval.tokens"):
        run_data(tmp_path, steps=1, val_tokens=200)


@pytest.mark.parametrize("num_tokens, is_found", [(1024, True), (5000, True), (1023, False)])
def test_copied_validation_tokens_are_found_wherever_they_begin(num_tokens, is_found):
    generator = np.random.default_rng(num_tokens)
    val, train = (generator.integers(0, 50000, size).astype(np.uint16) for size in (20_000, 600_000))
    for val_start, train_start in ((0, 77), (7_001, 262_100), (20_000 - num_tokens, 600_000 - num_tokens)):
        planted = train.copy()
        planted[train_start : train_start + num_tokens] = val[val_start : val_start + num_tokens]
        expected = [(val_start, train_start, num_tokens)] if is_found else []
        assert ProbeIndex(val).copies_in(planted) == expected
    assert ProbeIndex(val).copies_in(train) == []
    assert ProbeIndex(val[:100]).copies_in(train) == []


def test_copies_are_those_that_a_comparison_of_all_windows_finds():
    generator = np.random.default_rng(0)
    phrases = [generator.integers(0, 300, size).astype(np.uint16) for size in (40, 900, 1024, 1300, 2500)]
    val, train = (np.concatenate([phrases[i] for i in generator.integers(0, 5, 12)]) for _ in range(2))
    windows = {val[i : i + 1024].tobytes() for i in range(len(val) - 1023)}
    is_copied = np.zeros(len(train), dtype=bool)
    for start in range(len(train) - 1023):
        if train[start : start + 1024].tobytes() in windows:
            is_copied[start : start + 1024] = True
    found = np.zeros(len(train), dtype=bool)
    for copy in ProbeIndex(val).copies_in(train):
        part = slice(copy.train_start, copy.train_start + copy.num_tokens)
        assert np.array_equal(train[part], val[copy.val_start : copy.val_start + copy.num_tokens])
        found[part] = True
    assert is_copied.any() and (found & ~is_copied).sum() == 0
    assert (found & is_copied).sum() >= 0.9 * is_copied.sum()  # of a text that stands twice in val one place is tried


def test_stream_id_depends_on_content_not_on_how_many_shards_are_needed(tmp_path):
    write_shards(tmp_path, (101, 101))
    short, long = run_data(tmp_path, steps=4).describe(), run_data(tmp_path, steps=8).describe()
    assert short["stream_id"] == long["stream_id"] and short["fingerprint"] != long["fingerprint"]
    write_shard(tmp_path / "t_val_000000.bin", np.arange(1, 201))
    assert run_data(tmp_path, steps=4).describe()["stream_id"] != short["stream_id"]


@pytest.fixture
def small_library(tmp_path):
    root = tmp_path / "lib"
    for name in ("a.py", "b.py", "pkg/c.py", "pkg/test/d.py", "encodings/e.py", "_sysconfigdata_x.py", "f.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"# {name}\n" * 200)
    return root


def test_standard_library_files_leave_out_tests_and_generated_files(small_library):
    assert local.standard_library_files(small_library) == ["a.py", "b.py", "pkg/c.py"]


def test_standard_library_split_holds_every_byte_once_and_no_file_in_both(small_library, monkeypatch):
    monkeypatch.setattr(local, "is_validation", lambda path: path == "b.py")
    train, val = local.standard_library_split(small_library)
    passages = {split: set(text.split(b"\0")[1:]) for split, text in (("train", train), ("val", val))}
    expected = {"train": ["a.py", "pkg/c.py"], "val": ["b.py"]}
    for split, names in expected.items():
        texts = [(small_library / name).read_bytes() for name in names]
        whole = {text[i : i + local.PASSAGE_BYTES] for text in texts for i in range(0, len(text), local.PASSAGE_BYTES)}
        assert passages[split] == whole
    assert (train, val) == local.standard_library_split(small_library)


def test_local_corpus_of_this_python_is_written_deterministically(tmp_path, capsys):
    for name in ("one", "two"):
        assert local.main(["--out", str(tmp_path / name)]) == 0
    is_recorded = verify_shard(tmp_path / "one" / "local_train_000000.bin", 256).sha256 == local.RECORDED_TRAIN_SHA256
    assert ("not from these" in capsys.readouterr().out) == (not is_recorded)
    record = next((ROOT / "results" / "quick" / "comparison").glob("*.jsonl"))
    assert read_record(record).start["data"]["shards"][0]["sha256"] == local.RECORDED_TRAIN_SHA256
    for split in ("train", "val"):
        one, two = (tmp_path / name / f"local_{split}_000000.bin" for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
        assert len(open_shard(one)) > 100_000
        assert verify_shard(one, vocab_size=256).max_token < 256


def test_own_text_keeps_the_end_of_every_file_for_validation(tmp_path, capsys):
    (tmp_path / "mine.txt").write_bytes(b"x" * 90_000 + b"y" * 10_000)
    assert local.main(["--text", str(tmp_path / "mine.txt"), "--out", str(tmp_path / "out")]) == 0
    train = bytes(open_shard(tmp_path / "out" / "local_train_000000.bin").astype(np.uint8))
    val = bytes(open_shard(tmp_path / "out" / "local_val_000000.bin").astype(np.uint8))
    assert train.replace(b"\0", b"") == b"x" * 90_000 and val.replace(b"\0", b"") == b"y" * 10_000
    assert {len(passage) for passage in train.split(b"\0")[1:]} == {512, 90_000 % 512}
    command = capsys.readouterr().out.splitlines()[-1]
    assert f"--set 'data.train={tmp_path}/out/local_train_*.bin'" in command
    assert command.endswith("--set train.steps=22 --set eval.tokens=9216")


def test_own_text_long_enough_for_the_track_but_not_for_every_rule_gets_its_steps(tmp_path, capsys):
    (tmp_path / "mine.txt").write_bytes(b"x" * 1_200_000)
    assert local.main(["--text", str(tmp_path / "mine.txt"), "--out", str(tmp_path / "out")]) == 0
    steps = int(capsys.readouterr().out.split("train.steps=")[1].split()[0])
    assert 200 < steps < load_config(ROOT / "configs" / "quick.toml", "adamw").train.steps


@pytest.mark.parametrize("content", [b"", b"x" * 3000])
def test_own_text_that_is_too_short_is_an_error_in_one_line(tmp_path, capsys, content):
    (tmp_path / "mine.txt").write_bytes(content)
    assert local.main(["--text", str(tmp_path / "mine.txt"), "--out", str(tmp_path / "out")]) == 3
    assert "bytes of text are too few to train on" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_own_text_that_is_missing_is_an_error_in_one_line(tmp_path, capsys):
    assert local.main(["--text", str(tmp_path / "gone.txt"), "--out", str(tmp_path)]) == 3
    assert "gone.txt cannot be read" in capsys.readouterr().err


def test_shards_are_as_readable_as_the_umask_says(tmp_path):
    before = os.umask(0o002)
    try:
        write_shard(tmp_path / "a_000000.bin", np.arange(5, dtype=np.uint16))
        os.umask(0o077)
        write_shard(tmp_path / "b_000000.bin", np.arange(5, dtype=np.uint16))
    finally:
        os.umask(before)
    modes = [path.stat().st_mode & 0o777 for path in sorted(tmp_path.iterdir())]
    assert modes == [0o664, 0o600]


@pytest.mark.parametrize("name", ["[v1] it's", "a*b", "v[!x]"])
def test_folders_of_data_may_have_any_name(tmp_path, name):
    folder = tmp_path / name
    (tmp_path / "v").mkdir()
    for parent in (folder, tmp_path / "v"):  # what the brackets would choose as a glob
        write_shard(parent / "x_train_000000.bin", np.arange(5, dtype=np.uint16))
    assert find_shards(f"{folder}/x_train_*.bin") == [folder / "x_train_000000.bin"]
