"""The weights that a run leaves beside its record: equal to the model, written whole or not at all, checked by hash."""

import errno
import json
import os

import pytest
import torch

import train_gpt
from aurora.config import ModelConfig
from aurora.errors import Exit
from aurora.trainer.checkpoint import write_weights
from aurora.trainer.ranks import digest
from aurora.trainer.record import read_record
from aurora.trainer.timeline import timeline
from aurora.trainer.weights import WeightsError, digest_of, header_of, read_header, weights_of
from scripts.verification.checks import verify_run
from tests.conftest import events, train_here

SHORT = ["--set", "train.steps=4", "--optimizer", "muon"]


def test_a_finished_run_leaves_its_weights_off_the_clock_and_within_its_record(tiny_track, tmp_path):
    assert train_here(tiny_track, tmp_path, *SHORT) == 0
    (record,) = tmp_path.glob("*.jsonl")
    model = train_gpt.GPT(ModelConfig(**events(tmp_path)[0]["config"]["model"]))
    stored, state = read_header(weights_of(record)), model.state_dict()
    assert {name: entry.shape for name, entry in stored.items()} == {name: tuple(t.shape) for name, t in state.items()}
    assert digest_of(weights_of(record)) == read_record(record).end_event["weights_sha256"]
    assert read_record(record).end_event["untimed"]["checkpoint_s"] > 0 and verify_run(record).reasons == []
    assert sorted(path.suffix for path in tmp_path.iterdir() if path.name != ".lock") == [".jsonl", ".safetensors"]


def test_other_readers_of_the_format_read_the_file(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = tensors_of_all_kinds()
    write_weights(tmp_path / "a.safetensors", tensors, {"format": "pt"})
    read = safetensors.load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(read[name].double(), tensor.double()) for name, tensor in tensors.items())
    assert {name: t.dtype for name, t in read.items()} == {name: t.dtype for name, t in tensors.items()}


def tensors_of_all_kinds():
    kinds = torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.float8_e4m3fn
    tensors = {f"{kind}": torch.arange(6.0).reshape(2, 3).to(kind) for kind in kinds}
    return tensors | {"scalar": torch.tensor(1.5), "empty": torch.ones(0, 4), "turned": torch.arange(6.0).view(2, 3).T}


def test_the_hash_of_a_file_is_that_of_its_tensors(tmp_path):
    tensors = tensors_of_all_kinds()
    write_weights(tmp_path / "a.safetensors", tensors, {})
    assert digest_of(tmp_path / "a.safetensors") == digest(tensors)


def test_a_run_that_shall_not_save_leaves_none(tiny_track, tmp_path):
    assert train_here(tiny_track, tmp_path, *SHORT, "--set", "train.save_model=false") == 0
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_full_disk_costs_the_weights_and_not_the_run(tiny_track, tmp_path, capsys):
    def fill(name, step):
        if name == "weights_written":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    unsubscribe = timeline.subscribe(fill)
    try:
        assert train_here(tiny_track, tmp_path, *SHORT) == Exit.DISK
    finally:
        unsubscribe()
    said = capsys.readouterr().err
    assert "cannot be written: [Errno 28] No space left on device; the record is whole" in said
    assert said.count("\n") == 1
    (record,) = tmp_path.glob("*.jsonl")
    assert read_record(record).is_done and verify_run(record).reasons == []
    assert {path.name for path in tmp_path.iterdir()} == {".lock", record.name}


def test_a_state_that_is_no_tensor_costs_the_weights_and_not_the_run(tiny_track, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_gpt.GPT, "get_extra_state", lambda self: 1, raising=False)
    monkeypatch.setattr(train_gpt.GPT, "set_extra_state", lambda self, state: None, raising=False)
    assert train_here(tiny_track, tmp_path, *SHORT) == Exit.CHECKPOINT
    assert "_extra_state is no tensor; the record is whole" in capsys.readouterr().err
    assert events(tmp_path)[-1]["status"] == "done"


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / ".a[1].safetensors-0123").write_bytes(b"half")
    write_weights(tmp_path / "a[1].safetensors", {"w": torch.ones(2)}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["a[1].safetensors"]


def edited_header(change):
    """A file whose header a change of {name: entry} has gone over."""

    def edit(content):
        length = int.from_bytes(content[:8], "little")
        entries = json.loads(content[8 : 8 + length])
        text = json.dumps(change(entries) or entries).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + length :]

    return edit


HOSTILE = {
    "empty": lambda content: b"",
    "cut in the header": lambda content: content[:20],
    "cut in a tensor": lambda content: content[:-1],
    "longer": lambda content: content + b"\0",
    "a pickle": lambda content: b"\x80\x04\x95" + content,
    "a zip, as of torch.save": lambda content: b"PK\x03\x04" + content,
    "a header of 16 EiB": lambda content: b"\xff" * 8 + content[8:],
    "no JSON": lambda content: content[:8] + b"x" + content[9:],
    "a list": edited_header(lambda entries: [1]),
    "unknown dtype": edited_header(lambda entries: entries["w"].update(dtype="F31")),
    "list for a dtype": edited_header(lambda entries: entries["w"].update(dtype=[])),
    "negative shape": edited_header(lambda entries: entries["w"].update(shape=[-2, -3])),
    "shape of floats": edited_header(lambda entries: entries["w"].update(shape=[2.0, 3.0])),
    "huge shape": edited_header(lambda entries: entries["w"].update(shape=[2**40, 2**40])),
    "overlap": edited_header(lambda entries: entries["v"].update(data_offsets=[0, 8])),
    "gap": edited_header(lambda entries: entries.pop("w") and None),
    "deep": lambda content: (100_000).to_bytes(8, "little") + b"[" * 100_000,
    "a key twice": lambda content: (18).to_bytes(8, "little") + b'{"w": 1, "w": 123}',
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_file_that_is_none_is_an_error_of_one_line(tmp_path, case):
    path = tmp_path / "a.safetensors"
    write_weights(path, {"w": torch.ones(2, 3), "v": torch.ones(2)}, {"x": "<script>"})
    path.write_bytes(HOSTILE[case](path.read_bytes()))
    with pytest.raises(WeightsError, match="weights .*a.safetensors ") as error:
        read_header(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_pipe_and_a_folder_are_no_weights(tmp_path):
    os.mkfifo(tmp_path / "a.safetensors")
    for path in (tmp_path / "a.safetensors", tmp_path, tmp_path / "none"):
        with pytest.raises(WeightsError, match="there is no such file"):
            read_header(path)
    with pytest.raises(WeightsError, match="w is of torch.complex64"):
        header_of({"w": ("torch.complex64", (2,))}, {})


def test_weights_that_are_not_the_records_refute_it(tiny_track, tmp_path):
    assert train_here(tiny_track, tmp_path, *SHORT) == 0
    (record,) = tmp_path.glob("*.jsonl")
    path = weights_of(record)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    (reason,) = verify_run(record).reasons
    assert "are not those of the record, by its weights_sha256" in reason
    path.write_bytes(content[:-8])
    assert "are damaged" in verify_run(record).reasons[0]
    path.unlink()
    assert verify_run(record).reasons == []
