"""Honest runs of every odd kind: no check of a record takes them for invented."""

import json
import shutil

import numpy as np
import pytest

from aurora.tokens.shards import write_shard
from aurora.trainer.events import RecordError
from scripts.leaderboard import add
from scripts.verification.checks import verify_folder, verify_run
from tests.conftest import ROOT, events, often, start_process, train_here, write_tiny_track

SHORT = ["--set", "train.steps=6", "--set", "eval.every=3"]
ODD = {
    "telemetry off": ["--set", "eval.telemetry=false"],
    "epochs allowed": ["--set", "train.steps=40", "--set", "data.allow_epochs=true"],
    "warm-up and another schedule": [
        *("--set", "optimizer.muon.warmup_steps=3", "--set", "schedule.cooldown_frac=0.5", "--seed=7"),
        *("--set", "schedule.final_lr_frac=0.1"),
    ],
    "one float as a whole number": ["--set", "optimizer.muon.lr=1", "--set=model.rope_base=512"],
    "betas as whole numbers": ["--set", "optimizer.muon.aux_betas=[0, 0.9]", "--set", "eval.late_frac=0"],
    "no bias, gated, smaller": [
        *("--set", "model.bias=false", "--set", "model.mlp=swiglu", "--set", "model.num_layers=1"),
    ],
    "another micro-batch": ["--set", "train.micro_batch=3000", "--set", "train.batch_tokens=256"],
    "micro-batch found": ["--set", "train.micro_batch=auto", "--set", "train.compile=off"],
    "every event": ["--set", "train.log_every=1", "--set", "eval.every=1", "--set", "train.checkpoint_every=2"],
    "one step": ["--set", "train.steps=1"],
    "own steps": ["--set", "optimizer.muon.steps=5"],
    "lr of zero": ["--set", "optimizer.muon.lr=0", "--set", "optimizer.muon.embed_lr=0"],
    "Jordan's polar factor": ["--set", "optimizer.muon.polar_schedule=ns5_jordan"],
    "polar factor by SVD": ["--set", "optimizer.muon.polar_schedule=svd"],
    "no Nesterov": ["--set", "optimizer.muon.nesterov=false", "--set", "optimizer.muon.polar_dtype=auto"],
    "a note in the track": ["--set", "optimizer.adamw.lr=0.5", "--wandb", "off", "--timeout-s", "30"],
    "in bfloat16": ["--set", "model.activation_dtype=bfloat16"],
    "abbreviated options": ["--opt", "muon", "--see", "3"],
    "momentum dumped": ["--dump-momentum", "*mlp.up*", "1", "2"],
}
OFTEN = "telemetry off", "one float as a whole number", "every event"


@pytest.mark.parametrize("name", [often(name, name in OFTEN) for name in ODD])
def test_overrides_of_every_kind_are_consistent(tiny_track, tmp_path, name):
    arguments = ODD[name] if any("steps" in argument for argument in ODD[name]) else [*SHORT, *ODD[name]]
    assert train_here(tiny_track, tmp_path, "--optimizer", "muon", *arguments) == 0
    (verdict,) = verify_folder(tmp_path)
    assert (verdict.word, verdict.reasons) == ("consistent", [])


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "normuon", "unormuon", "aurora", "riemannian_aurora"])
def test_rules_are_consistent_whatever_their_settings(tiny_track, tmp_path, optimizer):
    own = {
        "adamw": ["betas=[0.8, 0.9]", "eps=1e-7"],
        "normuon": ["beta2=0.9", "aspect_scale=false"],
        "unormuon": ["aspect_scale=true"],
        "aurora": ["variant=iterated", "balance=tall", "balance_steps=3"],
        "riemannian_aurora": ["ascent_steps=2", "cg_steps=5"],
    }
    settings = [word for text in own[optimizer] for word in ("--set", f"optimizer.{optimizer}.{text}")]
    assert train_here(tiny_track, tmp_path, "--optimizer", optimizer, *SHORT, *settings) == 0
    (verdict,) = verify_folder(tmp_path)
    assert (verdict.word, verdict.reasons) == ("consistent", [])


RULE = """
import torch

class Signum(torch.optim.Optimizer):
    def __init__(self, params, lr: float, beta: float = 0.9, is_odd: bool = True):
        super().__init__(params, dict(lr=lr, beta=beta))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad.sign(), alpha=group["lr"])
"""


@pytest.mark.slow
def test_a_custom_rule_and_an_edited_model_in_a_checkout_of_ones_own_are_consistent(tmp_path):
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "aurora", checkout / "aurora")
    shutil.copy(ROOT / "train_gpt.py", checkout)
    (checkout / "aurora" / "optim" / "signum.py").write_text(RULE)
    track = write_tiny_track(tmp_path)
    table = track.read_text().partition("[optimizer.muon]")[2].partition("[optimizer")[0]
    table = "".join(line for line in table.splitlines(True) if "polar" not in line and "weight_decay" not in line)
    own = "[optimizer.signum]\nbeta = 0.8\naux_weight_decay = 0.0\n"
    track.write_text(track.read_text() + own + table.replace("lr = 0.02", "lr = 0.002", 1))
    script = checkout / "train_gpt.py"
    edits = [
        ("class Signum", "class Signum"),
        ("up.relu().square() if", "up.relu().pow(3) if"),
        ("self.head_norm = RMSNorm(config.model_dim)", "self.head_norm = nn.Identity()"),
    ]
    for number, (old, new) in enumerate(edits):
        script.write_text(script.read_text().replace(old, new))
        out = tmp_path / f"out{number}"
        arguments = ["--config", str(track), "--out", str(out), "--optimizer", "signum", *SHORT]
        process = start_process(str(script), *arguments, cwd=checkout, env={"PYTHONPATH": str(checkout)})
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        (verdict,) = verify_folder(out)
        assert (verdict.word, verdict.reasons) == ("consistent", []), verdict.reasons
        assert bool(events(out)[0]["model_edits"]) == (number > 0) == any("model edited" in n for n in verdict.notes)


def test_what_a_crash_leaves_is_incomplete_wherever_it_came(trained, tmp_path):
    """A record that ends after any of its lines, or within one."""
    lines = [json.dumps(event) + "\n" for event in trained["muon"]]
    path = tmp_path / "a.jsonl"
    for count in range(len(lines)):
        for torn in ("", lines[count][: len(lines[count]) // 2]):
            path.write_text("".join(lines[:count]) + torn)
            verdict = verify_run(path)
            assert (verdict.word, verdict.reasons) == ("incomplete", []), (count, torn[:50])
    path.write_text("".join(lines))
    assert verify_run(path).word == "consistent"


@pytest.mark.parametrize("is_gone", [False, often(True, False)])
def test_a_record_that_was_emptied_before_its_run_went_on_is_incomplete(twelve_steps, launch, tmp_path, is_gone):
    out = tmp_path / "out"
    launch(*twelve_steps, "--out", out, fault="kill:update:5:0")
    (path,) = out.glob("*.jsonl")
    path.unlink() if is_gone else path.write_text("")
    assert not any(launch(*twelve_steps, "--out", out, "--resume").codes)
    verdict = verify_run(path)
    assert (verdict.word, verdict.reasons) == ("incomplete", [])
    assert any("begins at step 3, with a resume" in note for note in verdict.notes)
    with pytest.raises(RecordError, match="is incomplete: it does not tell how the run began"):
        add(out, tmp_path / "results")

    whole = events(out)
    for kind, step, change in (
        ("val", 8, None),
        ("train", 4, None),
        ("val", 8, {"val_loss": 3.01}),
        ("train", 6, {"step_ms": 1e6}),
        ("train", 6, {"lr": 0.1}),
        ("end", 12, {"val_loss": 3.0}),
        ("end", 12, {"segments": 3}),
    ):
        index = next(i for i, event in enumerate(whole) if (event["event"], event.get("step")) == (kind, step))
        changed = [whole[index] | change] if change else []
        path.write_text("".join(json.dumps(event) + "\n" for event in [*whole[:index], *changed, *whole[index + 1 :]]))
        assert verify_run(path).word == "refuted", (kind, step, change)


@pytest.mark.slow
def test_a_finished_run_that_is_resumed_again_is_consistent(twelve_steps, launch, tmp_path):
    """As it was, beside a run of its own; by the same and by other ranks; and where its end was lost."""
    for world_size in (1, 2):
        for is_lost in (False, True):
            out = tmp_path / f"{world_size}{is_lost}"
            assert not any(launch(*twelve_steps, "--out", out).codes)
            if is_lost:
                (path,) = out.glob("*.jsonl")
                path.write_text("".join(path.read_text().splitlines(True)[:-1]))
            outcome = launch(*twelve_steps, "--out", out, "--resume", world_size=world_size)
            assert not any(outcome.codes), outcome.err
            verdicts = [verify_run(path) for path in out.glob("*.jsonl")]
            assert [(verdict.word, verdict.reasons) for verdict in verdicts] == [("consistent", [])] * (2 - is_lost)


@pytest.mark.slow
def test_data_of_one_shard_and_a_shard_that_only_epochs_read_again(tmp_path):
    track = write_tiny_track(tmp_path)
    (tmp_path / "tiny_train_000002.bin").unlink()
    write_shard(tmp_path / "tiny_train_000002.bin", np.arange(600, dtype=np.uint16) % 64)
    settings = ["--set", "train.steps=50", "--set", "data.allow_epochs=true", "--set", "eval.every=25"]
    assert train_here(track, tmp_path / "out", "--optimizer", "adamw", *settings) == 0
    (verdict,) = verify_folder(tmp_path / "out")
    assert (verdict.word, verdict.reasons) == ("consistent", [])
    assert events(tmp_path / "out")[0]["data"]["epochs"] == 50 / 21
