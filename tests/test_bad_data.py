"""Forty ways in which data can be wrong, each refused by the trainer before its first step and by the checking tool."""

import resource
import shutil

import numpy as np
import pytest

from aurora.tokens.manifest import write_manifest
from aurora.tokens.shards import MAGIC, open_shard, verify_shard, write_shard
from data import fineweb
from data.check import Problem, check_folder
from tests.conftest import shard_bytes, train_here

VAL, FIRST, SECOND = "fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"
TOKENS = 40 * 512 + 100


@pytest.fixture(scope="module")
def good_folder(tmp_path_factory):
    """A validation shard and two train shards of GPT-2 tokens in documents, with a manifest."""
    folder, generator = tmp_path_factory.mktemp("good"), np.random.default_rng(0)
    shards = {}
    for name in (VAL, FIRST, SECOND):
        tokens = generator.integers(0, 50256, TOKENS)
        tokens[::700] = 50256
        write_shard(folder / name, tokens)
        shards[name] = {
            "num_tokens": TOKENS,
            "sha256": "0" * 64,
            "tokens_sha256": verify_shard(folder / name, 50257).sha256,
        }
    write_manifest(folder, {"source": {}, "shards": shards})
    return folder


def cut(name, num_bytes):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:num_bytes])


def replace(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def header(position, value, dtype="<i4"):
    def change(folder):
        content = bytearray((folder / FIRST).read_bytes())
        content[4 * position : 4 * position + 4] = np.array([value], dtype=dtype).tobytes()
        (folder / FIRST).write_bytes(content)

    return change


def token(name, position, value):
    def change(folder):
        (folder / "manifest.json").unlink()
        content = bytearray((folder / name).read_bytes())
        begin = 1024 + 2 * (position % TOKENS)
        content[begin : begin + 2] = np.array([value], dtype="<u2").tobytes()
        (folder / name).write_bytes(content)

    return change


def copy_into_train(num_tokens, val_start=300, train_start=5001, name=FIRST):
    def change(folder):
        (folder / "manifest.json").unlink()
        tokens, val = (np.fromfile(folder / file, dtype="<u2", offset=1024) for file in (name, VAL))
        tokens[train_start : train_start + num_tokens] = val[val_start : val_start + num_tokens]
        write_shard(folder / name, tokens)

    return change


def whole(name, other):
    def change(folder):
        (folder / "manifest.json").unlink()
        shutil.copy(folder / other, folder / name)

    return change


def flip_bit(name):
    def change(folder):
        content = bytearray((folder / name).read_bytes())
        content[20_001] ^= 1 << 3
        (folder / name).write_bytes(content)

    return change


def remove(*names):
    def change(folder):
        for name in ("manifest.json", *names):
            (folder / name).unlink()

    return change


def rename(name, other):
    def change(folder):
        (folder / "manifest.json").unlink()
        (folder / name).rename(folder / other)

    return change


GOOD_SIZE = 1024 + 2 * TOKENS
CASES = {
    "cut at 0 bytes": (cut(FIRST, 0), "size: expected at least the header's 1,024 bytes, found 0"),
    "cut at 1 byte": (cut(FIRST, 1), "found 1;"),
    "cut at 1023 bytes": (cut(FIRST, 1023), "found 1,023;"),
    "cut at 1024 bytes": (cut(FIRST, 1024), "found 1,024;"),
    "cut in the middle": (cut(FIRST, 20_000), "found 20,000;"),
    "odd byte missing": (cut(FIRST, GOOD_SIZE - 1), f"found {GOOD_SIZE - 1:,};"),
    "one token short": (cut(FIRST, GOOD_SIZE - 2), f"found {GOOD_SIZE - 2:,};"),
    "cut validation shard": (cut(VAL, GOOD_SIZE - 2), f"{VAL}: size"),
    "cut second shard": (cut(SECOND, 5000), f"{SECOND}: size"),
    "one byte long": (lambda folder: (folder / FIRST).open("ab").write(b"\0"), f"found {GOOD_SIZE + 1:,};"),
    "one token long": (lambda folder: (folder / FIRST).open("ab").write(b"\0\0"), f"found {GOOD_SIZE + 2:,};"),
    "zero magic": (header(0, 0), "magic number: expected 20240520, found 0"),
    "wrong magic": (header(0, MAGIC + 1), "magic number: expected 20240520, found 20240521"),
    "llama-3 magic": (header(0, 20240801), "it is a llama-3 shard of llm.c, with uint32 tokens"),
    "evaluation file": (header(0, 20240522), "it is an evaluation file of llm.c"),
    "big-endian": (header(0, MAGIC, ">i4"), "its bytes are big-endian"),
    "version 0": (header(1, 0), "format version: expected 1, found 0"),
    "version 7": (header(1, 7), "format version: expected 1, found 7"),
    "no tokens in the header": (header(2, 0), "number of tokens in the header: expected at least 1, found 0"),
    "negative count": (header(2, -1), "found -1;"),
    "most negative count": (header(2, -(2**31)), "found -2,147,483,648;"),
    "huge count": (header(2, 2**31 - 1), "for the 2,147,483,647 uint16 tokens of the header"),
    "count one short": (header(2, TOKENS - 1), f"for the {TOKENS - 1:,} uint16 tokens"),
    "count one long": (header(2, TOKENS + 1), f"for the {TOKENS + 1:,} uint16 tokens"),
    "big-endian count": (header(2, TOKENS, ">i4"), "uint16 tokens of the header"),
    "uint32 payload": (replace(FIRST, shard_bytes(np.arange(TOKENS), dtype="<u4")), "uint16 tokens of the header"),
    "headerless file": (replace(FIRST, np.arange(TOKENS).astype("<u2").tobytes()), "it has no header, like nanoGPT's"),
    "NumPy's file": (replace(FIRST, b"\x93NUMPY\x01\0v\0{'descr': '<u2'}"), "found a .npy file of NumPy; make shards"),
    "text file": (replace(FIRST, b"to be or not to be " * 1000), "magic number"),
    "empty shard": (replace(FIRST, shard_bytes(())), "number of tokens in the header"),
    "token 50257": (
        token(FIRST, 7, 50257),
        "token at position 7: expected at most 50256 (GPT-2's tokens), found 50257",
    ),
    "token 50303 at the end": (token(SECOND, -1, 50303), f"token at position {TOKENS - 1:,}: expected at most 50256"),
    "token 65535": (
        token(FIRST, 0, 65535),
        "token at position 0: expected at most 50256 (GPT-2's tokens), found 65535",
    ),
    "validation token 65535": (token(VAL, -1, 65535), f"{VAL}: token at position"),
    "flipped bit": (flip_bit(FIRST), "sha256 of the tokens: expected"),
    "flipped bit in validation": (flip_bit(VAL), f"{VAL}: sha256 of the tokens"),
    "broken manifest": (replace("manifest.json", b'{"shards": {'), "manifest.json: content"),
    "missing first shard": (remove(FIRST), "get"),
    "gap in the numbers": (rename(SECOND, "fineweb_train_000003.bin"), "fineweb_train_000002.bin"),
    "validation among train": (whole(SECOND, VAL), "expected none in the train shards"),
    "overlap within a document": (
        copy_into_train(1024),
        "1,024 from position 300 at 5,001 of fineweb_train_000001.bin",
    ),
    "overlap over many documents": (copy_into_train(7000, name=SECOND), "7,000 from position 300 at 5,001"),
    "no train shards": (remove(FIRST, SECOND), "found none; python data/local.py makes the quick track's"),
    "no validation shard": (remove(VAL), "fineweb_val_*.bin: files: expected at least one shard, found none"),
}
UNKNOWN_TO_CHECK = {"no train shards", "no validation shard"}  # the tool is not told what a run needs


@pytest.fixture
def broken_folder(good_folder, tmp_path, request):
    folder = tmp_path / "data"
    shutil.copytree(good_folder, folder)
    CASES[request.param][0](folder)
    return folder


def train(tiny_track, folder, *args):
    patterns = [f"--set=data.{split}={folder}/fineweb_{split}_*.bin" for split in ("train", "val")]
    sizes = ["--set=model.vocab_size=50304", "--set=train.steps=60", "--set=eval.tokens=8192"]
    return train_here(tiny_track, folder.parent / "runs", "--optimizer", "muon", *patterns, *sizes, *args)


def test_the_good_folder_would_train(tiny_track, good_folder, tmp_path):
    shutil.copytree(good_folder, tmp_path / "data")
    short = ["--set=train.steps=1", "--set=model.model_dim=8", "--set=model.num_heads=2", "--set=eval.tokens=512"]
    assert train(tiny_track, tmp_path / "data", *short) == 0
    lines = list(check_folder(good_folder, 50257))
    problems = [line for line in lines if isinstance(line, Problem)]
    assert len(problems) == 3 and all("sha256: expected 0000" in line for line in problems)  # as the fixture has it


@pytest.mark.parametrize("case, broken_folder", [(case, case) for case in CASES], indirect=["broken_folder"], ids=CASES)
def test_trainer_refuses_bad_data_in_one_line_before_the_first_step(tiny_track, broken_folder, case, capsys):
    assert train(tiny_track, broken_folder) == 3
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1 and captured.err.startswith("error: ")
    assert CASES[case][1] in captured.err
    assert "step:" not in captured.out and not list((broken_folder.parent / "runs").glob("*.jsonl"))


@pytest.mark.parametrize(
    "case, broken_folder",
    [(case, case) for case in CASES if case not in UNKNOWN_TO_CHECK],
    indirect=["broken_folder"],
    ids=[case for case in CASES if case not in UNKNOWN_TO_CHECK],
)
def test_check_reports_the_same(broken_folder, case):
    problems = [line for line in check_folder(broken_folder, 50257) if isinstance(line, Problem)]
    assert any(CASES[case][1] in line for line in problems) or case == "validation among train"
    assert problems and all(len(line.splitlines()) == 1 for line in problems)


@pytest.mark.parametrize("broken_folder", ["huge count"], indirect=True)
def test_no_memory_is_taken_for_tokens_that_a_header_only_claims(tiny_track, broken_folder):
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert train(tiny_track, broken_folder) == 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 200_000  # claimed are 4 GiB


def test_one_file_for_training_and_validation_is_refused(tiny_track, good_folder, capsys, tmp_path):
    shutil.copytree(good_folder, tmp_path / "data")
    assert train(tiny_track, tmp_path / "data", f"--set=data.train={tmp_path}/data/fineweb_*_*.bin") == 3
    assert "use: expected validation alone, found training too" in capsys.readouterr().err


def test_one_step_more_than_the_data_hold_is_refused_with_the_number_of_shards(
    tiny_track, good_folder, capsys, tmp_path
):
    shutil.copytree(good_folder, tmp_path / "data")
    assert train(tiny_track, tmp_path / "data", "--set=train.steps=81") == 3
    assert f"found 80 steps in 2 shards; get 3 shards of {TOKENS:,} tokens" in capsys.readouterr().err


def test_tokens_of_other_projects_become_the_same_shards(tmp_path, capsys):
    tokens = np.random.default_rng(0).integers(0, 50257, 1001).astype(np.uint16)
    np.save(tmp_path / "edufineweb_train_000001.npy", tokens)
    np.save(tmp_path / "wide.npy", tokens.astype(np.int64))
    tokens.astype("<u2").tofile(tmp_path / "val.bin")
    files = [str(tmp_path / name) for name in ("edufineweb_train_000001.npy", "wide.npy", "val.bin")]
    for _ in range(2):  # again, after a stop
        assert fineweb.main(["convert", *files, "--out", str(tmp_path / "out"), "--shard-tokens", "600"]) == 0
    names = [f"{name}_{i:06d}.bin" for name in ("edufineweb_train_000001", "val", "wide") for i in range(2)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)
    for name in ("edufineweb_train_000001", "val", "wide"):
        parts = [open_shard(tmp_path / "out" / f"{name}_{i:06d}.bin") for i in range(2)]
        assert np.array_equal(np.concatenate(parts), tokens)
    assert fineweb.main(["convert", files[0], "--out", str(tmp_path / "one")]) == 0
    assert np.array_equal(open_shard(tmp_path / "one" / "edufineweb_train_000001.bin"), tokens)

    np.save(tmp_path / "table.npy", np.zeros((3, 3)))
    np.save(tmp_path / "large.npy", np.array([70_000]))
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    tokens.astype("<u4").tofile(tmp_path / "uint32.bin")
    (tmp_path / "odd.bin").write_bytes(b"abc")
    (tmp_path / "empty.bin").write_bytes(b"")
    (tmp_path / "cut.npy").write_bytes((tmp_path / "wide.npy").read_bytes()[:500])
    bad = ["table.npy", "large.npy", "objects.npy", "uint32.bin", "odd.bin", "empty.bin", "cut.npy", "none.npy"]
    for name in [*bad, "out/val_000000.bin"]:
        capsys.readouterr()
        assert fineweb.main(["convert", str(tmp_path / name), "--out", str(tmp_path / "bad")]) == 3, name
        error = capsys.readouterr().err
        assert error.startswith("error: ") and len(error.splitlines()) == 1 and name[:5] in error, error
    np.save(tmp_path / "val.npy", tokens[::-1])
    assert fineweb.main(["convert", str(tmp_path / "val.npy"), "--out", str(tmp_path / "out")]) == 3


def test_check_counts_documents_that_the_web_repeats_without_refusing_them(tmp_path):
    generator = np.random.default_rng(0)
    val, train = (generator.integers(0, 50256, size) for size in (400_000, 300_000))
    train[1000:2500] = val[5000:6500]  # inside one document, and less than 1 % of the validation tokens
    write_shard(tmp_path / VAL, val)
    write_shard(tmp_path / FIRST, train)
    lines = list(check_folder(tmp_path, 50257))
    assert not any(isinstance(line, Problem) for line in lines)
    assert any("0.375% of them stand in train shards too" in line for line in lines)
