"""The telemetry hook for other people's models and trainers: what it finds, against brute force."""

import re

import numpy as np
import pytest
import torch
from torch import nn

import aurora
from aurora.optim.telemetry import find_mlps
from tests.test_neurons import brute_effective_rank, brute_leverage
from tests.test_param_groups import MODELS


class Conv1D(nn.Module):
    """As in transformers: the weight is (in, out)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.1)

    def forward(self, x):
        return x @ self.weight


class Plain(nn.Module):
    def __init__(self, D=16, M=64, linear=lambda i, o: nn.Linear(i, o, bias=False)):
        super().__init__()
        self.c_fc, self.c_proj = linear(D, M), linear(M, D)

    def forward(self, x):
        return self.c_proj(self.c_fc(x).relu())


class Gated(nn.Module):
    """w2 is the down-projection, and is not the last."""

    def __init__(self, D=16, M=24):
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Linear(i, o, bias=False) for i, o in ((D, M), (M, D), (D, M)))

    def forward(self, x):
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class FusedGated(nn.Module):
    def __init__(self, D=16, M=12):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(D, 2 * M, bias=False), nn.Linear(M, D, bias=False)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(nn.functional.silu(gate) * up)


class Attention(nn.Module):
    """Heads that together are wider than the model, fewer of keys and values; and a low-rank adapter."""

    def __init__(self, D=16):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(D, 32), nn.Linear(D, 8), nn.Linear(D, 8)
        self.o_proj = nn.Linear(32, D)
        self.adapter = nn.Sequential(nn.Linear(D, 4), nn.Linear(4, D))

    def forward(self, x):
        return self.o_proj(self.q_proj(x)) + self.adapter(x)


class Block(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.attention, self.mlp = Attention(), mlp

    def forward(self, x):
        return x + self.mlp(x + self.attention(x))


MLPS = {"plain": Plain, "gated": Gated, "fused": FusedGated, "conv1d": lambda: Plain(linear=lambda i, o: Conv1D(o, i))}
ROWS = {
    "plain": {"c_fc": ["W"], "c_proj": ["W.T"]},
    "gated": {"w1": ["W"], "w3": ["W"], "w2": ["W.T"]},
    "fused": {"gate_up_proj": ["W[:12]", "W[12:]"], "down_proj": ["W.T"]},
    "conv1d": {"c_fc": ["W.T"], "c_proj": ["W"]},
}  # fmt: skip


def new_model(kind, num_layers=2):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), *(Block(MLPS[kind]()) for _ in range(num_layers)), nn.Linear(16, 10))


def train_step(model, optimizer):
    model(torch.randn(8, 20, 16)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("kind", MLPS)
def test_mlps_are_found_by_shape_and_attention_and_adapters_are_not(kind):
    found = find_mlps(new_model(kind))
    assert list(found) == ["1.mlp", "2.mlp"]
    assert {name.split(".")[2] for name in found["1.mlp"].matrices} == set(ROWS[kind])
    assert found["1.mlp"].is_gated == (kind in ("gated", "fused"))


def test_mlps_whose_layers_lie_apart_are_found_where_both_are():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 64, batch_first=True), 2)
    assert list(find_mlps(encoder)) == ["layers.0", "layers.1"]


class Experts(nn.Module):
    is_transposed, is_concatenated = False, True

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 20, 16) * 0.1)
        self.down_proj = nn.Parameter(torch.randn(3, 16, 10) * 0.1)

    def forward(self, x):
        for up, down in zip(self.gate_up_proj, self.down_proj, strict=True):
            gate, y = (x @ up.T).chunk(2, dim=-1)
            x = x + (nn.functional.silu(gate) * y) @ down.T
        return x


def test_every_expert_is_measured_and_unseen_activations_are_none():
    model = nn.Sequential(nn.Linear(16, 16), Experts())
    telemetry = aurora.NeuronTelemetry(model, torch.optim.AdamW(model.parameters(), lr=0.01), every=1)
    train_step(model, telemetry.optimizer)
    (event,) = telemetry.events
    assert len(event["matrices"]) == 3 * 3 and event["matrices"]["1.gate_up_proj[5]"]["rows"] == 10
    assert event["dead"] is None and event["mlps"] == {} and 0 <= event["starved"] <= 1


@pytest.mark.parametrize("optimizer", ["adamw", "aurora", "sgd"])
@pytest.mark.parametrize("kind", MLPS)
def test_an_event_equals_brute_force(kind, optimizer):
    model = new_model(kind)
    if optimizer == "aurora":
        weights = [p for p in model.parameters() if p.ndim == 2]
        rule = aurora.Aurora(weights, lr=0.02, weight_decay=0.1, polar_dtype="float32")
    elif optimizer == "adamw":
        rule = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    else:
        rule = torch.optim.SGD(model.parameters(), lr=0.1)
    telemetry = aurora.NeuronTelemetry(model, rule, every=3)
    for _ in range(2):
        train_step(model, rule)
    assert telemetry.events == []
    grads = {}
    keep = lambda *_: grads.update(  # noqa: E731
        {p: p.grad.double().numpy().copy() for p in model.parameters() if p.grad is not None}
    )
    rule.register_step_post_hook(keep)
    before = {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}
    train_step(model, rule)
    (event,) = telemetry.events
    assert event["step"] == 3
    decay = 1 - rule.param_groups[0]["lr"] * rule.param_groups[0]["weight_decay"]
    momentum_key = {"adamw": "exp_avg", "aurora": "momentum_buffer", "sgd": None}[optimizer]
    for name, views in ROWS[kind].items():
        p = model.get_parameter(f"1.mlp.{name}.weight")
        after = p.detach().double().numpy()
        for i, view in enumerate(views):
            found = event["matrices"][f"1.mlp.{name}.weight" + (f"[{i}]" if len(views) > 1 else "")]
            update = eval(view, {"W": before[f"1.mlp.{name}.weight"] * decay - after})
            norms = np.linalg.norm(update, axis=1)
            assert found["rows"] == len(norms)
            assert found["update_cv"] == pytest.approx(norms.std() / norms.mean(), rel=2e-3, abs=1e-5)
            assert found["starved"] == (norms**2 < 0.1 * (norms**2).mean()).sum()
            assert found["effective_rank"] == pytest.approx(brute_effective_rank(eval(view, {"W": after})), rel=1e-3)
            if momentum_key is None:
                assert found["low_leverage"] is None and found["leverage_histogram"] is None
                continue
            average = rule.state[p][momentum_key].double().numpy()
            seen = eval(view, {"W": 0.05 * grads[p] + 0.95 * average if optimizer == "aurora" else average})
            leverage = brute_leverage(seen) / min(1.0, seen.shape[1] / seen.shape[0])
            assert found["low_leverage"] == (leverage < 0.1).sum()
            assert found["low_streaks"] == [found["low_leverage"]] * (found["low_leverage"] > 0)
            edges = [-np.inf, *(10 ** (k / 4) for k in range(-12, 5)), np.inf]
            assert found["leverage_histogram"] == np.histogram(leverage.round(9), edges)[0].tolist()


def test_planted_dead_neurons_are_reported_with_their_share():
    model = new_model("plain")
    with torch.no_grad():
        model[1].mlp.c_proj.weight[:, :5] = 0
        model[2].mlp.c_fc.weight[7] = 0
    seen = []
    for layer in (1, 2):
        model[layer].mlp.c_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    telemetry = aurora.NeuronTelemetry(model, torch.optim.AdamW(model.parameters(), lr=1e-3), every=1)
    weights = [model[layer].mlp.c_proj.weight.detach().double().numpy().copy() for layer in (1, 2)]
    train_step(model, telemetry.optimizer)
    (event,) = telemetry.events
    dead, silent = [], []
    for activations, weight in zip(seen, weights, strict=True):
        a = activations.detach().double().numpy().reshape(-1, 64)
        parts = np.linalg.norm(a, axis=0) * np.linalg.norm(weight, axis=0)
        dead.append((parts < 0.01 * parts.mean()).sum())
        silent.append(((a > 0).sum(axis=0) <= 0.001 * len(a)).sum())
    assert dead[0] >= 5 and dead[1] >= 1 and silent[1] >= 1
    for i, name in enumerate(("1.mlp", "2.mlp")):
        assert event["mlps"][name] == {"width": 64, "dead": dead[i], "silent": silent[i]}
    assert event["dead"] == sum(dead) / 128 and event["silent"] == sum(silent) / 128


def test_looking_changes_nothing_and_can_be_ended():
    models = [new_model("gated") for _ in range(2)]
    rules = [aurora.Muon([p for p in model.parameters() if p.ndim == 2], lr=0.02) for model in models]
    seen = []
    telemetry = aurora.NeuronTelemetry(models[0], rules[0], every=2, report=lambda event: seen.append(event["step"]))
    for model, rule in zip(models, rules, strict=True):
        torch.manual_seed(1)
        for _ in range(4):
            train_step(model, rule)
    for p, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(p, other)
    telemetry.remove()
    train_step(models[0], rules[0])
    train_step(models[0], rules[0])
    assert seen == [2, 4]


def test_what_cannot_be_found_is_said_and_can_be_named():
    model = nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 10))
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="no MLP that is known; name them: mlps="):
        aurora.NeuronTelemetry(model, optimizer)
    with pytest.raises(ValueError, match=r"mlps\['a'\]: 3 is no linear layer"):
        aurora.NeuronTelemetry(model, optimizer, mlps={"a": (("0",), "3")})
    with pytest.raises(ValueError, match="2 do not make the 30 inputs of 0"):
        aurora.NeuronTelemetry(model, optimizer, mlps={"a": (("2",), "0")})
    telemetry = aurora.NeuronTelemetry(model, optimizer, every=1, mlps={"a": (("0",), "2")})
    model(torch.randn(8, 30)).sum().backward()
    optimizer.step()
    assert telemetry.events[0]["mlps"]["a"]["width"] == 20
    with pytest.raises(ValueError, match="the optimizer updates none of 1.mlp"):
        aurora.NeuronTelemetry(new_model("plain"), optimizer)
    with pytest.raises(ValueError, match="every must be at least 1"):
        aurora.NeuronTelemetry(model, optimizer, every=0)


GATED = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
MLPS_OF = {
    "GPT2LMHeadModel": {"transformer.h.*.mlp": ("c_fc.weight", "c_proj.weight")},
    "LlamaForCausalLM": {"model.layers.*.mlp": GATED},
    "MixtralForCausalLM": {"model.layers.*.mlp.experts": ("gate_up_proj", "down_proj")},
    "Phi3ForCausalLM": {"model.layers.*.mlp": ("gate_up_proj.weight", "down_proj.weight")},
    "ViTForImageClassification": {"vit.layers.*.mlp": ("fc1.weight", "fc2.weight")},
    "WhisperForConditionalGeneration": dict.fromkeys(
        ("model.encoder.layers.*", "model.decoder.layers.*"), ("fc1.weight", "fc2.weight")
    ),
    "MambaForCausalLM": {},
    "ResNetForImageClassification": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MLPS_OF)
def test_mlps_of_models_of_transformers(name):
    transformers = pytest.importorskip("transformers")
    config, settings, _ = MODELS[name]
    model = getattr(transformers, name)(getattr(transformers, config)(**settings))
    found = find_mlps(model)
    names = {re.sub(r"\.\d+", ".*", mlp): tuple(key[len(mlp) + 1 :] for key in found[mlp].matrices) for mlp in found}
    assert names == MLPS_OF[name]
    assert all(mlp.is_gated == (len(mlp.matrices) == 3 or "gate_up" in "".join(mlp.matrices)) for mlp in found.values())
    assert len(found) == (2 if names else 0), "both layers, or one of each half"
