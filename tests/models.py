"""Finished runs of small models of bytes and of GPT-2's tokens, for tests of what is done with them."""

import contextlib
import importlib.util
import io
import json
from pathlib import Path

import numpy as np

import train_gpt
from aurora.tokens.shards import DOCUMENT_START, write_shard
from aurora.trainer.checkpoint import save_weights
from tests.conftest import ROOT, train_here, write_tiny_track

TEXT = "def add(a, b):\n    return a + b\n\n\nfor name, value in table.items():\n    print(name, value)\n"
QUICK = ["model.vocab_size=256", "model.seq_len=64", "train.steps=20", "eval.every=10", "eval.tokens=2048"]
GPT2 = ["model.vocab_size=50304", "model.model_dim=16", "model.num_layers=1", "train.steps=2", "eval.tokens=256"]
GPT2 += ["train.batch_tokens=64", "eval.every=2", "eval.late_every=2", "eval.telemetry=false"]


def write_bytes_track(folder: Path) -> Path:
    """A track whose shards hold passages of bytes, each behind a zero byte, as data/local.py writes them."""
    track = write_tiny_track(folder)
    generator = np.random.default_rng(0)
    lines = [line.encode() for line in TEXT.splitlines(keepends=True)]
    for path, count in zip(sorted(folder.glob("*.bin")), (20, 15, 4), strict=True):
        parts = [b"\0" + b"".join(generator.permutation(lines).tolist()) for _ in range(count * 7)]
        write_shard(path, np.frombuffer(b"".join(parts), np.uint8))
    return track


def write_gpt2_track(folder: Path) -> Path:
    track = write_tiny_track(folder)
    generator = np.random.default_rng(0)
    for path in sorted(folder.glob("*.bin")):
        tokens = generator.integers(0, 1000, 4000).astype(np.uint16)
        tokens[::100] = DOCUMENT_START
        write_shard(path, tokens)
    return track


class Kept:
    """The model of a run that trains in this process, as its weights are saved."""

    model: train_gpt.GPT


def train_and_keep(track: Path, out: Path, *settings: str, optimizer: str = "muon", seed: int = 0):
    """The record of a run, and the trainer's own model at its end."""
    import aurora.trainer.journal as journal

    def keep(run):
        Kept.model = run.model
        return save_weights(run)

    words = [word for setting in settings for word in ("--set", setting)]
    journal.save_weights = keep
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            assert train_here(track, out, "--optimizer", optimizer, "--seed", str(seed), *words) == 0
    finally:
        journal.save_weights = save_weights
    return max(out.glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns), Kept.model.eval()


def edited_run(track: Path, folder: Path, edit: dict[str, str]):
    """As train_and_keep(), of a train_gpt.py with this edit, which the record embeds as it would where one edits it."""
    source = (ROOT / "train_gpt.py").read_text()
    for old, new in edit.items():
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    (folder / "edited_train_gpt.py").write_text(source)
    spec = importlib.util.spec_from_file_location("edited_train_gpt", folder / "edited_train_gpt.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    original, train_gpt.main = train_gpt.main, module.main
    try:
        record, model = train_and_keep(track, folder / "out", *QUICK, "train.steps=4")
    finally:
        train_gpt.main = original
    start, *events = map(json.loads, record.read_text().splitlines())
    start["sources"]["train_gpt.py"] = source
    record.write_text("".join(json.dumps(event) + "\n" for event in (start, *events)))
    return record, model


def hellaswag_items(path: Path, count: int) -> None:
    """Made-up items in HellaSwag's form, with labels that nothing predicts."""
    generator = np.random.default_rng(1)
    words = ["the", "man", "dog", "runs", "[title]", "jumps", "over", "[step]", "red", "ball", " and", "then", "water"]

    def words_of(number: int) -> str:
        return " ".join(generator.choice(words, number).tolist())

    with open(path, "w") as file:
        for index in range(count):
            item = {
                "ind": index,
                "activity_label": words_of(2),
                "ctx_a": f"{words_of(8)}.",
                "ctx_b": words_of(3),
                "endings": [f"{words_of(1)} {words_of(int(generator.integers(2, 9)))}x." for _ in range(4)],
                "label": str(generator.integers(4)),
            }
            file.write(json.dumps(item | {"ctx": f"{item['ctx_a']} {item['ctx_b']}"}) + "\n")
