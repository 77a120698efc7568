"""Recorded momentum and the benchmark that replays it. What it times is not judged here."""

import argparse
import json

import pytest
import torch

from configs.schema import Exit, HarnessError
from scripts.benchmarks import optim as benchmark
from tests.conftest import train_here


def test_dumped_momentum_is_replayed_and_reported(tiny_track, tmp_path):
    arguments = ["--dump-momentum", "blocks.1.mlp.*", "11", "30"]
    assert train_here(tiny_track, tmp_path / "runs", *arguments) == 0
    (folder,) = (tmp_path / "runs").glob("*.momentum")
    assert [path.name for path in sorted(folder.iterdir())] == [f"step{i:06d}.rank0.pt" for i in range(11, 31)]
    streams = benchmark.recorded_momentum(folder)
    assert {name: X.shape for name, (X, *_) in streams.items()} == {
        "blocks.1.mlp.up.weight": (128, 32),
        "blocks.1.mlp.down.weight": (32, 128),
    }
    args = argparse.Namespace(
        config=tiny_track, rules=["muon", "aurora folded"], schedule="polar_express5", polar_dtype="float32",
        device="cpu", rounds=2, momentum=folder, out=tmp_path / "table",
    )  # fmt: skip
    text = benchmark.optim(args)
    result = json.loads((tmp_path / "table.json").read_text())
    assert (tmp_path / "table.md").read_text() == text and "torch.optim.Muon" in text
    assert result["speed"]["muon"]["ratio_to_muon"] == 1 and len(result["speed"]["aurora folded"]["rounds_ms"]) == 2
    recorded = result["quality"]["recorded"]
    assert recorded["aurora folded"]["row_deviation_rms"] < 0.1 < recorded["muon"]["row_deviation_rms"]


def test_quality_of_an_orthogonal_matrix_with_even_rows_is_perfect():
    hadamard = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    found = benchmark.quality(hadamard[:, :2], hadamard[:, :2] * torch.tensor([3.0, 1.0]))
    assert found == pytest.approx(
        {"row_deviation_rms": 0, "row_deviation_max": 0, "orthogonality_error": 0, "alignment": 1}, abs=1e-6
    )


@pytest.mark.parametrize(
    "optimizer, arguments, message",
    [
        ("adamw", ["*", "1", "2"], "needs a matrix optimizer, not AdamW"),
        ("muon", ["mlp", "1", "2"], "no matrix matches 'mlp'; there are blocks.0.attention.q.weight"),
        ("muon", ["*", "0", "2"], "no steps from 0 to 2; they go from 1 to 30"),
        ("muon", ["*", "1", "31"], "no steps from 1 to 31"),
        ("muon", ["*", "one", "2"], "no steps from one to 2"),
    ],
)
def test_momentum_that_cannot_be_dumped_exits_2(tiny_track, tmp_path, capsys, optimizer, arguments, message):
    assert train_here(tiny_track, tmp_path, "--optimizer", optimizer, "--dump-momentum", *arguments) == Exit.CONFIG
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
    assert captured.out == "" and not list(tmp_path.iterdir())  # told before any work


def test_replay_of_a_folder_without_momentum_is_told(tmp_path):
    with pytest.raises(HarnessError, match="train with --dump-momentum first"):
        benchmark.recorded_momentum(tmp_path)
