"""Text to shards, against a plain loop over tiktoken, with real processes that are killed."""

import gzip
import hashlib
import itertools
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import sysconfig
import time
import types
from pathlib import Path

import numpy as np
import pytest

from aurora.tokens.shards import ShardError, open_shard, write_shard
from data import encode, fineweb
from tests.conftest import ROOT

tiktoken = pytest.importorskip("tiktoken")


@pytest.fixture(scope="module")
def documents():
    """Real text: some of Python's sources, and what else a document may be."""
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(library.glob("*.py"))[:60]
    texts = [path.read_text(encoding="utf-8") for path in paths]
    odd = [
        "",
        " ",
        "\n",
        "<|endoftext|> in the text",
        "naïve 中文 🙂\r\nçà",
        "a\n\n\nb",
        "x" * 3000,
        "12 345,678 'll 's",
    ]
    return [*texts[:30], *odd, *texts[30:]]


@pytest.fixture(scope="module")
def jsonl(documents, tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(documents)))
    return path


@pytest.fixture(scope="module")
def plain_tokens(documents, gpt2_files):
    """The loop that every implementation must equal."""
    encoding = tiktoken.get_encoding("gpt2")
    tokens = []
    for text in documents:
        tokens.append(50256)
        tokens.extend(encoding.encode_ordinary(text))
    return np.array(tokens, dtype=np.uint16)


def shard_names(folder):
    return sorted((path.name for path in folder.glob("*.bin")), key=lambda name: name[-10:])


def all_tokens(folder):
    return np.concatenate([open_shard(folder / name) for name in shard_names(folder)])


def hashes(folder):
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in shard_names(folder)}


def tokenize(out, *files, shard_tokens=50_000, workers=1, **options):
    arguments = ["tokenize", "--files", *map(str, files), "--out", str(out)]
    options |= {"shard-tokens": shard_tokens, "workers": workers}
    return [*arguments, *(f"--{key}={value}" for key, value in options.items())]


@pytest.fixture(scope="module")
def one_worker(jsonl, tmp_path_factory, gpt2_files):
    out = tmp_path_factory.mktemp("one")
    assert fineweb.main(tokenize(out, jsonl)) == 0
    return out


def test_tokens_are_those_of_a_plain_loop(one_worker, plain_tokens):
    assert np.array_equal(all_tokens(one_worker), plain_tokens)
    names = shard_names(one_worker)
    assert names[:2] == ["fineweb_val_000000.bin", "fineweb_train_000001.bin"]
    sizes = [len(open_shard(one_worker / name)) for name in names]
    assert set(sizes[:-1]) == {50_000} and 0 < sizes[-1] <= 50_000
    assert fineweb.main(["check", str(one_worker)]) == 0


@pytest.mark.parametrize("num_workers", [2, 4])
def test_any_number_of_workers_gives_the_same_bytes(jsonl, one_worker, tmp_path, monkeypatch, num_workers):
    monkeypatch.setattr(encode, "BATCH_CHARS", 30_000)
    assert fineweb.main(tokenize(tmp_path, jsonl, workers=num_workers)) == 0
    assert hashes(tmp_path) == hashes(one_worker)


def test_long_documents_are_cut_only_where_no_token_changes(gpt2_files, monkeypatch):
    monkeypatch.setattr(encode, "PIECE_CHARS", 20)
    encoding = tiktoken.get_encoding("gpt2")
    alphabet = [
        "a",
        "B",
        "7",
        " ",
        " ",
        "\n",
        "\n",
        "\n\n",
        "\t",
        "\r\n",
        "'s",
        "é",
        "中",
        ".",
        "--",
        "\u00a0",
        "\u2028",
    ]
    generator, num_cut = random.Random(0), 0
    for _ in range(2000):
        text = "".join(generator.choices(alphabet, k=80))
        parts = list(encode.pieces([encode.Document(text, "")]))
        num_cut += len(parts) > 1
        assert "".join(part.text for part in parts) == text
        assert [part.begins_document for part in parts] == [True] + [False] * (len(parts) - 1)
        tokens = list(itertools.chain.from_iterable(encoding.encode_ordinary(part.text) for part in parts))
        assert tokens == encoding.encode_ordinary(text)
    assert num_cut > 500


@pytest.mark.parametrize("num_workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(jsonl, one_worker, tmp_path, gpt2_files, num_workers):
    """kill -9 as soon as the first, second, ... shard is there, and once before any."""
    final, num_kills = hashes(one_worker), 0
    command = [sys.executable, "data/fineweb.py", *tokenize(tmp_path, jsonl, workers=num_workers)]
    for num_shards in range(min(5, len(final))):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
        deadline_s = time.monotonic() + 60
        while len(shard_names(tmp_path)) < num_shards and process.poll() is None:
            assert time.monotonic() < deadline_s
            time.sleep(0.001)
        if num_shards == 0:
            time.sleep(0.3)
        num_kills += process.poll() is None
        process.kill()
        process.wait()
        assert hashes(tmp_path).items() <= final.items()
    assert num_kills == 5
    assert fineweb.main(tokenize(tmp_path, jsonl)) == 0
    assert hashes(tmp_path) == final
    assert {path.name for path in tmp_path.iterdir()} - {".lock"} == {*final, "manifest.json"}


def test_workers_do_not_outlive_a_killed_main_process(jsonl, tmp_path, tmp_path_factory, gpt2_files):
    without = tmp_path_factory.mktemp("without")
    (without / "gigatoken.py").write_text("raise ImportError")  # so that workers are processes
    command = [sys.executable, "data/fineweb.py", *tokenize(tmp_path, *[jsonl] * 40, workers=2)]
    env = os.environ | {"PYTHONPATH": str(without)}
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env=env)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("this system does not list child processes")
    while not shard_names(tmp_path):
        assert process.poll() is None
        time.sleep(0.01)
    workers = [int(pid) for pid in children.read_text().split()]
    process.kill()
    process.wait()
    assert len(workers) >= 2
    deadline_s = time.monotonic() + 10
    while any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in workers):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_stopping_after_some_shards_and_going_on(jsonl, one_worker, tmp_path, gpt2_files, capsys):
    assert fineweb.main(tokenize(tmp_path, jsonl, **{"train-shards": 1})) == 0
    assert shard_names(tmp_path) == ["fineweb_val_000000.bin", "fineweb_train_000001.bin"]
    assert fineweb.main(tokenize(tmp_path, jsonl, **{"train-shards": 1})) == 0
    assert "2 shards finished before" in capsys.readouterr().out
    assert fineweb.main(tokenize(tmp_path, jsonl)) == 0
    assert hashes(tmp_path) == hashes(one_worker)
    assert fineweb.main(tokenize(tmp_path, jsonl)) == 0
    assert "shards finished before" in capsys.readouterr().out


def test_every_format_gives_the_same_tokens(documents, jsonl, one_worker, tmp_path, gpt2_files):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    half = len(documents) // 2
    parquet.write_table(pyarrow.table({"id": range(half), "text": documents[:half]}), tmp_path / "a.parquet")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in documents[half:-3])
    for number, text in enumerate(documents[-3:]):
        (tmp_path / f"c{number}.txt").write_text(text, encoding="utf-8", newline="")
    files = [tmp_path / name for name in ("a.parquet", "b.jsonl.gz", "c0.txt", "c1.txt", "c2.txt")]
    assert fineweb.main(tokenize(tmp_path / "out", *files)) == 0
    assert hashes(tmp_path / "out") == hashes(one_worker)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b'{"text": "fine"}\n{"text": broken\n', "a.jsonl: line 2: expected UTF-8 text"),
        ("a.jsonl", b'{"body": "no text"}\n', "a.jsonl: line 1"),
        ("a.jsonl", b'{"text": null}\n', "found text is None"),
        ("a.txt", b"caf\xe9 \xff", "a.txt: content: expected UTF-8 text"),
        ("a.parquet", b"PAR1 but no more", "a.parquet: content"),
        ("a.jsonl.gz", b"not gzip", "a.jsonl.gz"),
        ("a.csv", b"text\n", "file name: expected .txt, .jsonl"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000, "a.jsonl: line 1"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 2000)[:40] + b"garbage" * 9, "a.jsonl.gz: "),
        ("a.jsonl", b"", "text: expected at least one document, found none"),
    ],
)
def test_text_that_cannot_be_read_is_an_error_in_one_line(tmp_path, capsys, gpt2_files, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert fineweb.main(tokenize(tmp_path / "out", tmp_path / name)) == 3
    captured = capsys.readouterr()
    assert message in captured.err and len(captured.err.splitlines()) == 1


def test_shards_of_another_source_are_not_mixed_in(jsonl, tmp_path, gpt2_files, capsys):
    (tmp_path / "a.txt").write_text("one text " * 100)
    assert fineweb.main(tokenize(tmp_path / "out", tmp_path / "a.txt", shard_tokens=100)) == 0
    assert fineweb.main(tokenize(tmp_path / "out", tmp_path / "a.txt", shard_tokens=50)) == 3
    assert fineweb.main(tokenize(tmp_path / "out", jsonl, shard_tokens=100)) == 3
    assert "use another --out" in capsys.readouterr().err
    assert fineweb.main(tokenize(tmp_path / "small", tmp_path / "a.txt")) == 0
    assert "all of the text is in the validation shard" in capsys.readouterr().out


def test_a_lone_surrogate_becomes_what_tiktoken_makes_of_it(gpt2_files):
    text = "half \ud83d a pair"
    tokens = encode.encode([encode.Piece(text, True)]).tokens
    assert tokens.tolist() == [50256, *tiktoken.get_encoding("gpt2").encode_ordinary(text)]


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_shards_before_a_broken_line_stay_and_the_mended_file_goes_on(tmp_path, gpt2_files, capsys, workers):
    lines = [json.dumps({"text": f"document {i} " * 30}) for i in range(40)]
    path, whole, out = tmp_path / "a.jsonl", tmp_path / "whole.jsonl", tmp_path / "out"
    whole.write_text("\n".join(lines) + "\n")
    assert fineweb.main(tokenize(tmp_path / "wanted", whole, shard_tokens=200)) == 0
    path.write_text("\n".join([*lines[:30], '{"text": broken', *lines[31:]]))
    assert fineweb.main(tokenize(out, path, shard_tokens=200, workers=workers)) == 3
    assert "a.jsonl: line 31" in capsys.readouterr().err
    before = {name: (out / name).stat().st_mtime_ns for name in shard_names(out)}
    assert len(before) > 5
    good = "\n".join([*lines[:30], "", lines[30], "  ", *lines[31:]]) + "\n\n"
    path.write_text(good.replace("document 2 ", "document two ", 1))
    assert fineweb.main(tokenize(out, path, shard_tokens=200)) == 3, "what the shards were made of is another text"
    assert "use another --out" in capsys.readouterr().err
    path.write_text("\n".join(lines[:3]))
    assert fineweb.main(tokenize(out, path, shard_tokens=200)) == 3
    path.write_text(good)
    assert fineweb.main(tokenize(out, path, shard_tokens=200, workers=workers)) == 0
    assert f"going on after {len(before)} shards" in capsys.readouterr().out
    assert hashes(out) == hashes(tmp_path / "wanted")
    assert all((out / name).stat().st_mtime_ns == time_ns for name, time_ns in before.items())


def test_byte_order_marks_utf_16_and_separators(tmp_path, gpt2_files):
    texts = ["naïve one", "two\n\n", "three"]
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\r\n" for text in texts)
    joined = texts[0] + "\n<|endoftext|>\n" + texts[1] + "<|endoftext|>" + texts[2] + "\n<|endoftext|>\n"
    (tmp_path / "plain.jsonl").write_bytes(lines.encode())
    assert fineweb.main(tokenize(tmp_path / "plain", tmp_path / "plain.jsonl")) == 0
    for encoding in ("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"):
        (tmp_path / f"{encoding}.jsonl").write_bytes(lines.encode(encoding))
        (tmp_path / f"{encoding}.jsonl.gz").write_bytes(gzip.compress(lines.encode(encoding)))
        for suffix in (".jsonl", ".jsonl.gz"):
            assert fineweb.main(tokenize(tmp_path / f"{encoding}{suffix}.out", tmp_path / f"{encoding}{suffix}")) == 0
            assert hashes(tmp_path / f"{encoding}{suffix}.out") == hashes(tmp_path / "plain")
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path = tmp_path / f"{encoding}.txt"
        path.write_bytes(joined.encode(encoding))
        found = encode.LocalFiles([path]).documents({"document": 0})
        assert [document.text for document in found] == ["naïve one", "two", "three"]


def test_shards_that_it_did_not_make_stay(jsonl, tmp_path, gpt2_files, capsys):
    foreign = np.arange(1000, dtype=np.uint16)
    write_shard(tmp_path / "fineweb_train_000001.bin", foreign)
    assert fineweb.main(tokenize(tmp_path, jsonl)) == 3
    assert "fineweb_train_000001.bin: file: expected none yet" in capsys.readouterr().err
    assert np.array_equal(open_shard(tmp_path / "fineweb_train_000001.bin"), foreign)


@pytest.mark.slow
def test_ctrl_c_ends_in_one_line_and_the_same_command_goes_on(jsonl, plain_tokens, tmp_path, gpt2_files):
    arguments = tokenize(tmp_path, *[jsonl] * 25, workers=2)
    for _ in range(2):
        num_shards = len(shard_names(tmp_path)) + 1  # before main() a signal is for Python to answer
        options = {"cwd": ROOT, "text": True, "stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL}
        process = subprocess.Popen([sys.executable, "data/fineweb.py", *arguments], start_new_session=True, **options)
        while process.poll() is None and len(shard_names(tmp_path)) < num_shards:
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=60)
        assert process.returncode == 130 and len(error.splitlines()) == 1, error
    assert fineweb.main(arguments) == 0
    assert np.array_equal(all_tokens(tmp_path), np.tile(plain_tokens, 25))


def test_ctrl_c_while_workers_start_is_not_lost(monkeypatch):
    def submit(self, *task, real=encode.ProcessPoolExecutor.submit):
        os.kill(os.getpid(), signal.SIGINT)
        return real(self, *task)

    monkeypatch.setattr(encode.ProcessPoolExecutor, "submit", submit)
    monkeypatch.setattr(encode, "gigatoken_gpt2", lambda: None)
    with pytest.raises(KeyboardInterrupt), encode.worker_pool(2):
        pass


def test_errors_come_back_from_worker_processes():
    error = ShardError("a.bin", "size", 1, 2, "get it again")
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "a.bin: size: expected 1, found 2; get it again"


@pytest.mark.slow
def test_streamed_text_of_the_hub_equals_the_same_text_in_files(documents, one_worker, tmp_path, gpt2_files):
    """The datasets library against the local hub, at the commit that the branch stood for when it began."""
    pytest.importorskip("datasets")
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    from tests.hub_server import HubServer

    parquet.write_table(pyarrow.table({"text": documents}), tmp_path / "0.parquet")
    readme = (
        b"---\nconfigs:\n- config_name: sample-10BT\n  data_files:\n  - split: train\n    path: sample/10BT/*\n---\n"
    )
    files = {"README.md": readme, "sample/10BT/000_00000.parquet": (tmp_path / "0.parquet").read_bytes()}
    arguments = ["tokenize", "--sample", "sample-10BT", "--repo", "some/fineweb", "--shard-tokens", "50000"]
    arguments += ["--workers", "1", "--out", str(tmp_path / "out")]
    parts = [[*arguments, "--train-shards", "1"], arguments]
    code = f"from data import fineweb; raise SystemExit(any(fineweb.main(part) for part in {parts}))"
    with HubServer("some/fineweb", files) as server:
        environment = os.environ | {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home")}
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert hashes(tmp_path / "out") == hashes(one_worker)


def test_a_hub_that_fails_while_it_streams_is_an_error_in_one_line(monkeypatch):
    def load_dataset(*args, **options):
        raise ValueError("BuilderConfig 'sample-11BT' not found.\nAvailable: ...")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    source = object.__new__(encode.HubText)
    source.repo, source.sample, source.revision = "some/fineweb", "sample-11BT", "main"
    with pytest.raises(
        ShardError, match="some/fineweb sample-11BT: documents: expected text, found BuilderConfig"
    ) as error:
        next(source.documents({"document": 0}))
    assert len(str(error.value).splitlines()) == 1
