"""The trainer on one process: losses, determinism, warm-up, validation, clock, compilation."""

import copy
import time

import pytest
import torch

import train_gpt
from aurora.errors import Exit
from aurora.fast.forward import FastForward
from aurora.trainer import describe
from aurora.trainer.clock import Clock
from aurora.trainer.ranks import Ranks, digest
from aurora.trainer.warmup import warm_up
from tests.conftest import OPTIMIZERS, events, losses, make_run, step, train_here


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_learns(trained, optimizer):
    values = [event["val_loss"] for event in trained[optimizer] if event["event"] == "val"]
    assert values[0] == pytest.approx(torch.tensor(64.0).log().item(), rel=1e-6)
    assert values[-1] < values[0] - 0.1


@pytest.mark.parametrize("optimizer", ["adamw", "aurora"])
def test_same_seed_gives_the_same_bytes(trained, tiny_track, tmp_path, optimizer):
    assert train_here(tiny_track, tmp_path, "--optimizer", optimizer) == 0
    assert outcome(events(tmp_path)) == outcome(trained[optimizer])


def outcome(record):
    return [e["val_loss"] for e in record if e["event"] == "val"], record[-1]["weights_sha256"]


def test_another_seed_gives_other_bytes(trained, tiny_track, tmp_path):
    assert train_here(tiny_track, tmp_path, "--optimizer", "muon", "--seed", "1") == 0
    (losses_, weights), (other_losses, other_weights) = outcome(trained["muon"]), outcome(events(tmp_path))
    assert losses_[1:] != other_losses[1:] and weights != other_weights


@pytest.mark.parametrize("micro_batch", [pytest.param(1, marks=pytest.mark.slow), 2, 16])
def test_micro_batch_does_not_change_the_losses(trained, tiny_track, tmp_path, micro_batch):
    assert train_here(tiny_track, tmp_path, "--optimizer", "muon", "--set", f"train.micro_batch={micro_batch}") == 0
    expected = [(e["step"], e["val_loss"]) for e in trained["muon"] if e["event"] == "val"]
    for (step_, loss), (expected_step, expected_loss) in zip(losses(tmp_path), expected, strict=True):
        assert step_ == expected_step and loss == pytest.approx(expected_loss, rel=1e-5)


MEMORY_FOR_FOUR = """
from aurora.fast.forward import FastForward
original = FastForward.__call__
def forward(self, inputs, targets):
    if inputs.size(0) > 4 and {condition}:
        raise torch.OutOfMemoryError("out of memory")
    return original(self, inputs, targets)
FastForward.__call__ = forward
"""


def test_automatic_micro_batch_is_halved_until_it_fits_on_every_rank(trained, tiny_track, launch, tmp_path):
    """Validation takes twice as many sequences at once, so 2 fit where there is memory for 4."""
    expected = [(e["step"], e["val_loss"]) for e in trained["muon"] if e["event"] == "val"]
    for world_size, condition in ((1, "True"), (2, "rank == 1")):
        out = tmp_path / str(world_size)
        arguments = ["--config", tiny_track, "--optimizer", "muon", "--out", out, "--set", "train.micro_batch=auto"]
        patch = MEMORY_FOR_FOUR.format(condition=condition)
        outcome = launch(*arguments, world_size=world_size, patch=patch)
        assert outcome.codes == [0] * world_size, outcome.err
        assert events(out)[0]["micro_batch"] == 2 and f"micro-batch 2, {8 // world_size} a step" in outcome.out[0]
        for (_, loss), (_, expected_loss) in zip(losses(out), expected, strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-5)


def test_what_does_not_fit_at_all_is_told(tiny_track, launch, tmp_path):
    patch = MEMORY_FOR_FOUR.format(condition="True").replace("> 4", "> 0")
    arguments = ["--config", tiny_track, "--out", tmp_path, "--set", "train.micro_batch=auto"]
    outcome = launch(*arguments, patch=patch)
    assert outcome.codes == [Exit.CONFIG] and "out of memory even with a micro-batch of 1" in outcome.err[0]


def test_automatic_micro_batch_is_all_where_memory_is_plenty(tiny_track, tmp_path):
    assert train_here(tiny_track, tmp_path, "--set", "train.micro_batch=auto", "--set", "train.steps=2") == 0
    start = events(tmp_path)[0]
    assert start["micro_batch"] == 16 and start["config"]["train"]["micro_batch"] == "auto"
    assert start["attention"] == "flash"  # torch's for CPU


def test_gradients_are_those_of_the_mean_loss_over_the_batch(tiny_track):
    run, _ = make_run(tiny_track, "muon")
    plain, _ = make_run(tiny_track, "muon")
    for _ in range(3):  # past the zero-initialised projections, which stop most gradients
        step(run), step(plain)
    loss = train_gpt.forward_backward(run, FastForward(run.model), *run.next_batch())
    tokens = plain.loader.next_batch()
    inputs, targets = tokens[:-1].view(16, 32), tokens[1:].view(16, 32)
    plain_loss = torch.nn.functional.cross_entropy(plain.model.logits(inputs).flatten(0, 1), targets.flatten())
    plain_loss.backward()
    assert loss.item() == pytest.approx(plain_loss.item(), rel=1e-6)
    for p, q in zip(run.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_warm_up_leaves_weights_state_rng_and_loader_bit_identical(tiny_track, optimizer):
    run, _ = make_run(tiny_track, optimizer)
    twin, _ = make_run(tiny_track, optimizer)
    step(run), step(twin)  # so that there is optimizer state to lose
    torch.manual_seed(11)
    before = digest(run.state_dict())
    warm_up(FastForward(run.model), run, train_gpt.forward_backward)
    assert digest(run.state_dict()) == before
    assert all(p.grad is None for p in run.model.parameters())
    assert [step(run).item() for _ in range(3)] == [step(twin).item() for _ in range(3)]


def test_warm_up_notices_a_trace_it_leaves(tiny_track, monkeypatch):
    run, _ = make_run(tiny_track, "muon")
    monkeypatch.setattr(torch, "set_rng_state", lambda state: torch.manual_seed(3))
    with pytest.raises(RuntimeError, match="left a trace"):
        warm_up(FastForward(run.model), run, train_gpt.forward_backward)


def test_validation_changes_nothing_and_sums_over_every_token(tiny_track):
    run, data = make_run(tiny_track, "aurora")
    step(run)
    before = digest(run.state_dict())
    loss = train_gpt.validate(run, run.model)
    assert digest(run.state_dict()) == before
    tokens = torch.from_numpy(data.val_tokens.astype("int64"))
    with torch.no_grad():
        whole = run.model(tokens[:-1].view(16, 32), tokens[1:].view(16, 32)).item() / 512
    assert loss == pytest.approx(whole, rel=1e-6)


def test_digest_sees_every_bit_and_every_name():
    state = {"a": torch.ones(3), "b": [1, {"c": torch.zeros((), dtype=torch.bfloat16)}]}
    original = digest(state)
    for change in (
        lambda s: s["a"].view(torch.int32).bitwise_xor_(1),
        lambda s: s["b"].__setitem__(0, 2),
        lambda s: s["b"][1].__setitem__("c", torch.zeros(())),
        lambda s: s.__setitem__("d", s.pop("a")),
    ):
        changed = copy.deepcopy(state)
        change(changed)
        assert digest(changed) != original
    assert digest(copy.deepcopy(state)) == original


def test_clock_charges_every_nanosecond_to_one_account(monkeypatch):
    now = iter([5, 12, 20, 50])
    monkeypatch.setattr(time, "perf_counter_ns", lambda: next(now) * 10**9)
    clock = Clock(Ranks(0, 1, torch.device("cpu")), begin_ns=0)
    for account in ("setup", "train", "val", "train"):
        clock.charge(account)
    spent_s = {account: clock.spent_s(account) for account in clock.spent_ns if clock.spent_ns[account]}
    assert spent_s == {"setup": 5, "train": 7 + 30, "val": 8}
    clock.add({"train": 10**9, "checkpoint": 2 * 10**9})
    assert clock.slowest_train_s() == 38 and clock.spent_s("checkpoint") == 2


def test_only_steps_are_timed_and_the_wall_clock_may_jump(tiny_track, tmp_path, monkeypatch):
    """On a clock that only these functions move, so that a leak of a nanosecond shows."""
    now_ns, jumps = [0], iter(range(0, 10**9, 3600))

    def taking(seconds, original):
        def slow(*args, **kwargs):
            now_ns[0] += round(seconds * 1e9)
            return original(*args, **kwargs)

        return slow

    monkeypatch.setattr(time, "perf_counter_ns", lambda: now_ns[0])
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    durations_s = {
        "validate": 0.5,
        "save_run": 2.0,
        "prepare": 30.0,
        "train_step": 0.25,
    }
    for name, seconds in durations_s.items():
        monkeypatch.setattr(train_gpt, name, taking(seconds, getattr(train_gpt, name)))
    monkeypatch.setattr(describe, "digest", taking(1.0, digest))
    arguments = ["--optimizer", "adamw", "--set", "train.steps=8", "--set", "train.checkpoint_every=4"]
    assert train_here(tiny_track, tmp_path, *arguments, "--set", "eval.every=4") == 0
    *_, end = record = events(tmp_path)
    assert [e["train_time_s"] for e in record if e["event"] == "val"][-1] == end["train_time_s"] == 8 * 0.25
    untimed = end["untimed"]
    assert (untimed["checkpoint_s"], untimed["warmup_s"]) == (2 * 2.0, 30.0) and untimed["val_s"] >= 4 * 0.5
    assert untimed["end_s"] == 1.0  # the digest of the weights
    assert end["wall_s"] == pytest.approx(now_ns[0] / 1e9 + untimed["import_s"])  # all that the clock has ever moved
    assert sum(untimed.values()) + end["train_time_s"] == pytest.approx(end["wall_s"])


@pytest.mark.parametrize("optimizer", ["adamw", "aurora"])
def test_a_warm_up_that_fails_leaves_no_trace_either(tiny_track, optimizer):
    run, _ = make_run(tiny_track, optimizer)
    before = digest(run.state_dict())

    def model_that_cannot_validate(inputs, targets):
        if not torch.is_grad_enabled():
            raise RuntimeError("no graph for this")
        return run.model(inputs, targets)

    with pytest.raises(RuntimeError, match="no graph"):
        warm_up(model_that_cannot_validate, run, train_gpt.forward_backward)
    assert digest(run.state_dict()) == before


@pytest.mark.parametrize("micro_batch", [pytest.param(1, marks=pytest.mark.slow), 16])
def test_compiled_model_gives_the_same_losses_or_says_why_not(tiny_track, tmp_path, trained, capsys, micro_batch):
    """A machine without a C++ compiler cannot compile on CPU: then the run stops with the reason before training."""
    arguments = ["--set", "train.compile=on", "--set", f"train.micro_batch={micro_batch}"]
    code = train_here(tiny_track, tmp_path, "--optimizer", "muon", *arguments)
    captured = capsys.readouterr()
    if code == Exit.CONFIG:
        assert "torch.compile failed" in captured.err and "set it to 'off'" in captured.err
        return
    assert code == 0 and "model: compiled" in captured.out
    expected = [(e["step"], e["val_loss"]) for e in trained["muon"] if e["event"] == "val"]
    for (step_, loss), (expected_step, expected_loss) in zip(losses(tmp_path), expected, strict=True):
        assert step_ == expected_step and loss == pytest.approx(expected_loss, rel=3e-5)  # sums in another order


def test_shards_are_read_again_only_when_the_config_asks_for_it(tiny_track, tmp_path, capsys):
    arguments = ["--optimizer", "muon", "--set", "train.steps=42"]
    assert train_here(tiny_track, tmp_path, *arguments) == 3
    assert "found 35 steps in 2 shards; get 3 shards of 10,340 tokens" in capsys.readouterr().err
    assert train_here(tiny_track, tmp_path, *arguments, "--set", "data.allow_epochs=true") == 0
    record = events(tmp_path)
    assert record[0]["data"]["epochs"] == 1.2 and record[0]["config"]["data"]["allow_epochs"] is True
    assert 0 <= record[-1]["data_wait_s"] <= record[-1]["train_time_s"]
