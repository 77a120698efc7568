"""Telemetry of neurons: its numbers against float64 brute force, planted faults, and that it leaves no trace."""

import json
import time

import numpy as np
import pytest
import torch

import train_gpt
from aurora.optim.diagnostics import (
    dead_neurons,
    effective_rank,
    leverage_scores,
    norm_quantiles,
    row_energies,
    silent_neurons,
)
from aurora.trainer.batch import stage, to_device
from aurora.trainer.neurons import Neurons
from aurora.trainer.record import read_folder
from scripts import plot
from scripts.verification.checks import verify_run
from tests.conftest import events, losses, make_run, step, train_here

SHAPES = [(128, 32), (32, 32), (32, 128), (7, 1)]


def brute_leverage(X):
    U, s, _ = np.linalg.svd(X, full_matrices=False)
    return (U[:, s > 1e-6 * s.max()] ** 2).sum(axis=1)


def brute_effective_rank(W):
    s = np.linalg.svd(W, compute_uv=False)
    shares = s / s.sum()
    return np.exp(-sum(share * np.log(share) for share in shares if share > 0))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_leverage_norms_and_rank_equal_brute_force(shape):
    X = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, shape[0])[:, None]
    exact = X.double().numpy()
    np.testing.assert_allclose(leverage_scores(X), brute_leverage(exact), rtol=1e-7, atol=1e-12)
    assert leverage_scores(X).sum() == pytest.approx(min(shape))
    np.testing.assert_allclose(row_energies(X), (exact**2).sum(axis=1), rtol=1e-12)
    norms = np.linalg.norm(exact, axis=1)
    cv, quantiles = norm_quantiles(row_energies(X))
    assert cv == pytest.approx(norms.std() / norms.mean())
    np.testing.assert_allclose(quantiles, np.quantile(norms / norms.mean(), [0, 0.1, 0.5, 0.9, 1]), rtol=1e-12)
    assert effective_rank(X) == pytest.approx(brute_effective_rank(exact), rel=1e-6)


def test_zeros_and_low_rank_have_defined_values():
    X = torch.outer(torch.arange(6.0), torch.ones(3))
    np.testing.assert_allclose(leverage_scores(X), np.arange(6) ** 2 / 55, atol=1e-12)
    assert effective_rank(X) == pytest.approx(1, abs=1e-5)
    zeros = torch.zeros(6, 3)
    assert not leverage_scores(zeros).any() and effective_rank(zeros) == 0
    assert norm_quantiles(row_energies(zeros)) == (0.0, [0.0] * 5)


def test_dead_and_silent_neurons_equal_brute_force():
    generator = torch.Generator().manual_seed(0)
    activations = torch.randn(4, 500, 16, generator=generator).relu().square()
    down = torch.randn(8, 16, generator=generator)
    activations[..., 3] = 0
    activations[..., 4] = 0
    activations[0, :2, 4] = 1.0  # on 2 of 2,000 tokens, which is the most that counts as silent
    activations[..., 5] = 0
    activations[0, :3, 5] = 1.0
    down[:, 6] *= 1e-3
    parts = np.sqrt((activations.double().numpy() ** 2).mean(axis=(0, 1))) * np.linalg.norm(down.numpy(), axis=0)
    expected = parts <= 0.01 * parts.mean()
    assert dead_neurons(activations, down).tolist() == expected.tolist()
    assert np.flatnonzero(expected).tolist() == [3, 6]
    assert silent_neurons(activations, is_gated=False).nonzero().flatten().tolist() == [3, 4]
    gated = torch.randn(4, 500, 16, generator=generator)
    gated[..., 7] *= 1e-3
    assert silent_neurons(gated, is_gated=True).nonzero().flatten().tolist() == [7]


def of_matrices(run):
    return [(name, p) for name, p in run.model.named_parameters() if ".mlp." in name and p.ndim == 2]


def relative_leverage(run, optimizer, name, p, grads):
    """(M,) leverage in what the rule saw at the last step, in units of an even row's; by float64 and an SVD."""
    if optimizer == "adamw":
        seen = run.rule.state[p]["exp_avg"].double().numpy()
    else:
        momentum = run.rule.param_groups[0]["momentum"]
        seen = (1 - momentum) * grads[p] + momentum * run.rule.state[p]["momentum_buffer"].double().numpy()
    seen = seen.T if "down" in name else seen
    return brute_leverage(seen) / min(1, seen.shape[1] / seen.shape[0])


def telemetry_of(run, data):
    """The telemetry of a run, and the inputs and targets that it looks at."""
    neurons = Neurons(run.config, train_gpt.validation_steps(run.config), run.model, run.rule, run.ranks)
    window = stage(data.val_tokens[: neurons.num_tokens + 1], run.ranks.device)
    return neurons, to_device(window, run.config.model.seq_len, run.ranks.device)


@pytest.mark.parametrize("mlp", ["relu2", "swiglu"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "unormuon", "aurora"])
def test_event_of_a_real_step_equals_brute_force(tiny_track, optimizer, mlp):
    run, data = make_run(tiny_track, optimizer, f"model.mlp={mlp}")
    neurons, shown = telemetry_of(run, data)
    for _ in range(4):
        step(run)
    grads, streaks = {}, {}
    keep = lambda *_: grads.update({p: p.grad.double().numpy().copy() for p in run.model.parameters()})  # noqa: E731
    run.rule.register_step_post_hook(keep)
    for look in range(3):
        before = {name: p.detach().double().numpy().copy() for name, p in run.model.named_parameters()}
        neurons.before_update()
        step(run)
        event = neurons.measure(look, *shown)
        for name, p in of_matrices(run):
            low = relative_leverage(run, optimizer, name, p, grads) < 0.1
            streaks[name] = (streaks.get(name, 0) + 1) * low
    group = run.rule.param_groups[0]
    assert group["weight_decay"] == 0.01 and group["lr"] > 0
    assert sorted(event["matrices"]) == sorted(
        f"blocks.{i}.mlp.{kind}" for i in (0, 1) for kind in ("gate", "up", "down")[mlp == "relu2" :]
    )
    for name, p in of_matrices(run):
        found = event["matrices"][name.removesuffix(".weight")]
        after = p.detach().double().numpy()
        update = before[name] * (1 - group["lr"] * 0.01) - after
        if "down" in name:
            update, after = update.T, after.T
        norms, leverage = np.linalg.norm(update, axis=1), relative_leverage(run, optimizer, name, p, grads)
        assert found["update_cv"] == pytest.approx(norms.std() / norms.mean(), rel=1e-3)
        assert found["update_quantiles"] == pytest.approx(
            np.quantile(norms / norms.mean(), [0, 0.1, 0.5, 0.9, 1]), rel=1e-3
        )
        assert found["starved"] == (norms**2 < 0.1 * (norms**2).mean()).sum()
        edges = [-np.inf, *(10 ** (k / 4) for k in range(-12, 5)), np.inf]
        assert found["leverage_histogram"] == np.histogram(leverage.round(9), edges)[0].tolist()
        assert found["low_leverage"] == (leverage < 0.1).sum()
        lengths = range(1, streaks[name].max() + 1)
        assert found["low_streaks"] == [(streaks[name] >= length).sum() for length in lengths]
        assert found["effective_rank"] == pytest.approx(brute_effective_rank(after), rel=1e-3)


@pytest.mark.parametrize("mlp", ["relu2", "swiglu"])
def test_a_planted_dead_neuron_and_a_planted_starved_row_are_reported_and_only_those(tiny_track, mlp):
    run, data = make_run(tiny_track, "muon", f"model.mlp={mlp}")
    neurons, shown = telemetry_of(run, data)
    step(run)
    generator = torch.Generator().manual_seed(0)
    mlps = [block.mlp for block in run.model.blocks]
    with torch.no_grad():
        for mlp_ in mlps:
            mlp_.down.weight.normal_(std=0.1, generator=generator)
        rows = [p[7] for p in mlps[1].parameters() if p.size(0) == 128]  # of up and gate, weights and biases
        for row in (*rows, mlps[1].down.weight[:, 7]):
            row.zero_()
        neurons.before_update()
        group = run.rule.param_groups[0]
        for p in neurons.matrices.values():
            update = torch.randn(p.shape, generator=generator) * 1e-3
            momentum = torch.randn(p.shape, generator=generator)
            if p is mlps[0].up.weight:
                update[9] *= 0.1
                momentum[9] *= 0.1
            run.rule.state[p]["momentum_buffer"].copy_(momentum)
            p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update)
        for row in (*rows, mlps[1].down.weight[:, 7]):
            row.zero_()
    event = neurons.measure(5, *shown)
    assert [layer["dead"] for layer in event["layers"]] == [0, 1]
    assert [layer["silent"] for layer in event["layers"]][1] >= 1
    assert (event["dead"] == 1 / 256) if mlp == "relu2" else not event.keys() & {"dead", "silent"}
    starved = {name: (m["starved"], m["low_leverage"]) for name, m in event["matrices"].items()}
    assert starved.pop("blocks.0.mlp.up") == (1, 1)
    # The dead neuron's rows got an update of zero: they are starved too, though their momentum is not.
    planted = {f"blocks.1.mlp.{kind}" for kind in ("gate", "up", "down")}
    assert all(found == ((1, 0) if name in planted else (0, 0)) for name, found in starved.items())
    assert event["layers"][1]["still_dead"] is None
    neurons.before_update()
    event = neurons.measure(6, *shown)
    assert event["layers"][1]["still_dead"] == 1
    streaks = {name: matrix["low_streaks"] for name, matrix in event["matrices"].items()}
    assert streaks.pop("blocks.0.mlp.up") == [1, 1] and not any(streaks.values())


@pytest.mark.parametrize("optimizer", ["adamw", "aurora"])
def test_telemetry_leaves_no_trace_and_can_be_switched_off(tiny_track, trained, tmp_path, optimizer):
    arguments = ["--optimizer", optimizer, "--set", "eval.telemetry=false"]
    assert train_here(tiny_track, tmp_path, *arguments) == 0
    off, on = events(tmp_path), trained[optimizer]
    assert [e["step"] for e in on if e["event"] == "neurons"] == [10, 20, 30]
    assert not [e for e in off if e["event"] == "neurons"]
    assert losses(tmp_path) == [(e["step"], e["val_loss"]) for e in on if e["event"] == "val"]
    assert off[-1]["weights_sha256"] == on[-1]["weights_sha256"] and off[0]["task_hash"] == on[0]["task_hash"]
    (path,) = tmp_path.glob("*.jsonl")
    assert verify_run(path).word == "consistent"


def test_telemetry_is_not_timed(tiny_track, tmp_path, monkeypatch):
    """On a clock that only telemetry moves."""
    now_ns = [0]

    def slow(original):
        def call(*args):
            now_ns[0] += 10**9
            return original(*args)

        return call

    monkeypatch.setattr(time, "perf_counter_ns", lambda: now_ns[0])
    for name in ("before_update", "measure"):
        monkeypatch.setattr(Neurons, name, slow(getattr(Neurons, name)))
    assert train_here(tiny_track, tmp_path, "--optimizer", "muon") == 0
    end = events(tmp_path)[-1]
    assert end["train_time_s"] == 0 and end["untimed"]["val_s"] == 6


def test_ranks_give_the_numbers_of_one_process(tiny_track, launch, tmp_path):
    found = {}
    for world_size in (1, 2):
        out = tmp_path / str(world_size)
        outcome = launch("--config", tiny_track, "--optimizer", "unormuon", "--out", out, world_size=world_size)
        assert outcome.codes == [0] * world_size, outcome.err
        found[world_size] = [event for event in events(out) if event["event"] == "neurons"]
    for one, two in zip(found[1], found[2], strict=True):
        assert list(one["matrices"]) == list(two["matrices"]) and len(one["matrices"]) == 4
        for name, matrix in one["matrices"].items():
            assert two["matrices"][name]["update_cv"] == pytest.approx(matrix["update_cv"], rel=0.05)
            assert two["matrices"][name]["effective_rank"] == pytest.approx(matrix["effective_rank"], rel=1e-3)


@pytest.mark.parametrize(
    "tamper",
    [
        lambda event: event["layers"][0].update(dead=129),
        lambda event: event["layers"][0].update(dead=event["layers"][0]["dead"] + 1),
        lambda event: event.update(starved=0.5),
        lambda event: event["matrices"]["blocks.0.mlp.up"].update(effective_rank=40),
        lambda event: event["matrices"]["blocks.0.mlp.up"].update(update_cv=float("nan")),
        lambda event: event["matrices"]["blocks.0.mlp.up"].update(low_streaks=[128, 1]),
        lambda event: event["matrices"]["blocks.0.mlp.down"]["leverage_histogram"].append(0),
        lambda event: event["matrices"]["blocks.1.mlp.down"].update(low_leverage=128),
        lambda event: event.update(low_leverage=1.0),
        lambda event: event["matrices"]["blocks.1.mlp.down"].pop("leverage_histogram"),
        lambda event: event["matrices"].pop("blocks.1.mlp.down"),
        lambda event: event.update(step=11),
        lambda event: event.update(matrices={"blocks.0.mlp.up": None}),
    ],
)
def test_numbers_that_cannot_be_are_refuted(trained, tmp_path, tamper):
    record = json.loads(json.dumps(trained["muon"]))
    tamper(next(event for event in record if event["event"] == "neurons"))
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(event) + "\n" for event in record))
    assert verify_run(path).word == "refuted"


def test_table_of_neurons_at_some_steps(tiny_track, tmp_path, monkeypatch, capsys):
    for seed in (0, 1):
        assert train_here(tiny_track, tmp_path, "--optimizer", "muon", "--seed", str(seed)) == 0
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["plot.py", "neurons", str(tmp_path), "--steps", "10", "30"])
    assert plot.main() == 0
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert "rows of low leverage (%)" in header and [row.split("|")[1:4] for row in rows]
    cells = [[word.strip() for word in row.strip("|").split("|")] for row in rows]
    assert [row[:3] for row in cells] == [["muon", "2", "10"], ["muon", "2", "30"]]
    events = [event for run in read_folder(tmp_path)[0] for event in run.neuron_events if event["step"] == 30]
    starved = [100 * event["starved"] for event in events]
    assert cells[1][3] == f"{sum(starved) / 2:.1f} [{min(starved):.1f}, {max(starved):.1f}]"

    picture = tmp_path / "leverage.png"
    monkeypatch.setattr("sys.argv", ["plot.py", "leverage", str(tmp_path), "--out", str(picture)])
    assert plot.main() == 0 and picture.read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr("sys.argv", ["plot.py", "neurons", str(tmp_path), "--steps", "11"])
    assert plot.main() == 2
    assert "no telemetry at step 11; see eval.every" in capsys.readouterr().err
