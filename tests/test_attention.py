"""Blocked attention: its numbers, when it is taken, and that ranks and resumed runs agree on it."""

import dataclasses
import shutil

import pytest
import torch

from aurora.config import load_config
from aurora.fast import attention, functions
from aurora.fast.forward import FastForward
from aurora.trainer import warmup
from aurora.trainer.attempt import Unusable
from aurora.trainer.checkpoint import list_checkpoints
from tests.conftest import events, losses, train_here


def attention_pass(attend, dtype, length, seed=0):
    """Result and gradients of normed queries and keys, and values, (2, 3, length, 16), all in float64."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v, grad = (torch.randn(2, length, 3, 16, generator=generator).bfloat16().double() for _ in range(4))
    q, k = (torch.nn.functional.rms_norm(x, (16,)).bfloat16().double() for x in (q, k))
    leaves = [x.to(dtype).transpose(1, 2).requires_grad_() for x in (q, k, v)]
    y = attend(*leaves)
    y.backward(grad.to(dtype).transpose(1, 2))
    return [x.double() for x in (y.detach(), *(leaf.grad for leaf in leaves))]


def plainly(q, k, v):
    """Causal attention as its formula says."""
    logits = 0.5 * q @ k.mT
    later = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    return logits.masked_fill(later, -torch.inf).softmax(-1) @ v


def by_torch(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5)


def in_blocks(q, k, v):
    return functions.BlockedAttention.apply(q, k, v, 0.5)


@pytest.mark.parametrize("length", [1, 3, 4, 7, 64, 130])
@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 0.006)])
def test_blocked_attention_and_its_gradients_are_the_formulas(length, dtype, limit):
    """Within this share of their norm; torch's own kernel has about 0.004 in bfloat16."""
    oracle = attention_pass(plainly, torch.float64, length)
    for value, expected in zip(attention_pass(in_blocks, dtype, length), oracle, strict=True):
        scale = max(expected.norm(), 1e-3)  # a lone query's gradient is zero
        assert (value - expected).norm() <= limit * scale


def test_blocked_attention_rounds_little_more_than_torchs():
    oracle = attention_pass(plainly, torch.float64, 256)
    errors = [
        [(value - expected).norm() / expected.norm() for value, expected in zip(found, oracle, strict=True)]
        for found in (attention_pass(in_blocks, torch.bfloat16, 256), attention_pass(by_torch, torch.bfloat16, 256))
    ]
    assert all(one < 2 * other for one, other in zip(*errors, strict=True))


def test_it_is_measured_for_short_sequences_in_bfloat16_alone(tiny_track, monkeypatch):
    config = load_config(tiny_track, "muon", ["model.activation_dtype=bfloat16"]).model
    seconds = {}  # of "blocked"; torch's takes one
    monkeypatch.setattr(attention, "time_s", lambda attend: seconds.get(attend.__name__, 1.0))
    for blocked_s, pays in ((0.5, True), (0.7, True), (0.72, False), (1.0, False), (2.0, False)):
        seconds["blocked"] = blocked_s
        assert attention.blocked_pays(config) == pays, blocked_s
    seconds["blocked"] = 0.1
    assert not attention.blocked_pays(dataclasses.replace(config, activation_dtype="float32"))
    assert not attention.blocked_pays(dataclasses.replace(config, seq_len=2048))


NARROW = ["--set", "model.activation_dtype=bfloat16"]


@pytest.mark.parametrize("pays", [True, False])
def test_the_record_names_it_and_a_resumed_run_keeps_it(tiny_track, tmp_path, monkeypatch, pays):
    """Its bits depend on it, so what another measurement would say does not count."""
    arguments = [*NARROW, "--set", "train.checkpoint_every=10", "--set", "train.steps=20"]
    monkeypatch.setattr(warmup, "blocked_pays", lambda model: pays)
    assert train_here(tiny_track, tmp_path, *arguments) == 0
    whole = losses(tmp_path)
    (record,) = tmp_path.glob("*.jsonl")
    lines = record.read_text().splitlines(keepends=True)
    record.write_text("".join(lines[:-1]))  # killed after step 10, as its folder says
    shutil.rmtree(list_checkpoints(next(tmp_path.glob("*.checkpoints")))[-1])
    monkeypatch.setattr(warmup, "blocked_pays", lambda model: not pays)
    assert train_here(tiny_track, tmp_path, *arguments, "--resume") == 0
    assert losses(tmp_path)[: len(whole)] == whole and set(losses(tmp_path)) == set(whole)
    assert {e["attention"] for e in events(tmp_path) if "attention" in e} == {"blocked" if pays else "flash"}


def test_where_blocks_do_not_work_the_fast_forward_goes_on_without_them(tiny_track, tmp_path, monkeypatch, capsys):
    def make(model, attention=""):
        if attention:
            raise Unusable("they fail")
        return FastForward(model)

    monkeypatch.setattr(warmup, "blocked_pays", lambda model: True)
    monkeypatch.setattr(warmup, "FastForward", make)
    assert train_here(tiny_track, tmp_path, *NARROW, "--set", "train.steps=2") == 0
    assert "no eager, fast forward, for they fail" in capsys.readouterr().out
    assert (events(tmp_path)[0]["forward"], events(tmp_path)[0]["attention"]) == ("fast", "flash")


def test_ranks_take_the_word_of_the_first(tiny_track, launch, tmp_path):
    patch = "from aurora.trainer import warmup\nwarmup.blocked_pays = lambda model: rank == 0\n"
    arguments = ["--config", tiny_track, "--optimizer", "muon", "--out", tmp_path, *NARROW, "--set", "train.steps=2"]
    outcome = launch(*arguments, world_size=2, patch=patch)
    assert outcome.codes == [0, 0], outcome.err
    assert events(tmp_path)[0]["attention"] == "blocked"
