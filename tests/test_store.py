"""Records share a store of their sources, and every reader takes both forms."""

import hashlib
import json
import shutil

import pytest

from aurora.trainer.events import RecordError
from aurora.trainer.record import read_record, record_paths
from scripts import leaderboard, logs, verify
from scripts.analysis.store import pack, packed_files, unpack
from scripts.verification.export import LACKING
from tests.conftest import ROOT

STORE = ROOT / "results" / "sources"


@pytest.fixture
def plain(trained, tmp_path):
    """A record as its run wrote it."""
    path = tmp_path / "runs" / "a.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(event) + "\n" for event in trained["muon"]))
    return path


@pytest.fixture
def packed(plain, tmp_path):
    files = packed_files({tmp_path / "results" / "mine" / "a.jsonl": plain}, tmp_path / "results" / "sources")
    leaderboard.write_all(files)
    return tmp_path / "results" / "mine" / "a.jsonl"


def test_a_packed_record_is_small_and_comes_back_byte_for_byte(plain, packed, tmp_path):
    assert packed.stat().st_size < 0.2 * plain.stat().st_size
    assert read_record(packed).start == read_record(plain).start
    for source in (packed, packed.parent):
        out = tmp_path / f"out of {source.name}"
        assert leaderboard.main(["unpack", str(source), "--out", str(out)]) == 0
        assert (out / "a.jsonl" if source.is_dir() else out).read_bytes() == plain.read_bytes()
        assert leaderboard.main(["unpack", str(source), "--out", str(out)]) == 2, "nothing is overwritten"
    assert unpack(plain) == plain.read_bytes()


def test_what_can_not_come_back_byte_for_byte_is_left_as_it_is(plain):
    content = plain.read_bytes()
    for other in (content.replace(b'": ', b'":', 1), content.replace(b"{", b'{"event": "run", ', 1)):
        assert pack(other) == (other, {})
    odd = {"event": "run", "sources": {"a.py": "\ud800 \r\n é", "b.py": ""}, "x": 1e-7}
    content, texts = pack(json.dumps(odd).encode() + b"\ntorn")
    assert len(texts) == 2 and content.endswith(b"\ntorn") and b"source_hashes" in content


def test_readers_take_both_forms(plain, packed, tmp_path, capsys):
    words = []
    for path in (plain, packed):
        assert verify.main([str(path)]) == 0
        words.append(capsys.readouterr().out.splitlines()[-1])
        assert logs.main(["--export", str(path), "--out", str(tmp_path / f"{path.parent.name}.txt")]) == 0
        capsys.readouterr()
    assert words == ["1 consistent"] * 2
    assert (tmp_path / "runs.txt").read_bytes() == (tmp_path / "mine.txt").read_bytes()


def test_a_text_that_is_missing_or_changed_is_named(packed, tmp_path):
    start = json.loads(packed.read_text().splitlines()[0])
    track = next(name for name in start["source_hashes"] if name.endswith(".toml"))  # no other store holds its text
    text = packed.parent.parent / "sources" / start["source_hashes"][track]
    alone = tmp_path / "alone" / "a.jsonl"
    alone.parent.mkdir()
    shutil.copy(packed, alone)
    text.write_text(text.read_text() + "# changed")
    for path in (alone, packed):
        with pytest.raises(RecordError, match="no folder sources/ beside or above it holds"):
            read_record(path)
    with pytest.raises(RecordError, match="damaged: its sha256 is not its name"):
        packed_files({tmp_path / "b.jsonl": tmp_path / "runs" / "a.jsonl"}, text.parent)


@pytest.mark.parametrize("hashes", [None, [], {"train_gpt.py": "../../etc/passwd"}, {"a": 3}, {"a": "0" * 64}])
def test_hashes_that_lead_nowhere_are_refused(packed, hashes):
    start, *rest = packed.read_text().splitlines(True)
    packed.write_text(json.dumps(json.loads(start) | {"source_hashes": hashes}) + "\n" + "".join(rest))
    with pytest.raises(RecordError, match="source_hashes is no table|beside or above it"):
        read_record(packed)


def test_the_store_holds_what_the_records_refer_to_and_no_more():
    used = set(LACKING.values())
    for path in record_paths(ROOT / "results"):
        with open(path, encoding="utf-8") as file:
            used |= set(json.loads(file.readline())["source_hashes"].values())
    assert {path.name for path in STORE.iterdir()} == used
    assert all(hashlib.sha256(path.read_bytes()).hexdigest() == path.name for path in STORE.iterdir())
