"""What other people's code does with the optimizers: compiles steps, wraps states, brings groups of other Muons."""

import copy
import io
import json
import types

import pytest
import torch
from torch import nn

import aurora
from tests.conftest import often
from tests.test_rules import make

PARTS = {"split": (8, 8)}


def new_model():
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(inputs, 16) for inputs in (8, 16, 4))


def new_optimizer(model, rule="muon", **options):
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    return make(rule, [dict(params=matrices, **options), dict(params=vectors, algorithm="adamw", lr=0.1)])


def set_gradients(model, step):
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize(
    "rule, options",
    [
        ("muon", {}),
        *(often(case, False) for case in (("muon", PARTS), ("aurora folded", {}), ("aurora folded", PARTS))),
    ],
)
def test_a_compiled_step_of_a_whole_model_updates_all_of_it(rule, options):
    """AdamW's step breaks the graph; then torch compiles parts of step(), which must not remember the first stack."""
    torch._dynamo.reset()
    eager, compiled = new_model(), new_model()
    rules = [new_optimizer(model, rule, **options) for model in (eager, compiled)]
    steps = [rules[0].step, torch.compile(rules[1].step, backend="eager")]
    for number in range(3):
        before = [p.detach().clone() for p in compiled.parameters()]
        for model, step in zip((eager, compiled), steps, strict=True):
            set_gradients(model, number)
            step()
        for p, q, old in zip(eager.parameters(), compiled.parameters(), before, strict=True):
            torch.testing.assert_close(q, p)
            assert not torch.equal(q, old)


def test_a_step_within_autocast_computes_in_its_own_dtype():
    one, other = new_model(), new_model()
    rules = [new_optimizer(model) for model in (one, other)]
    for model, rule, is_enabled in zip((one, other), rules, (False, True), strict=True):
        set_gradients(model, 0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_enabled):
            rule.step()
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("rule", ["muon", "aurora folded", "normuon"])
@pytest.mark.parametrize("options", [{}, {"split": (2, 2)}], ids=["matrices", "parts"])
def test_what_others_keep_in_a_state_stays_there(rule, options):
    """As Lookahead and other wrappers do."""
    layer = nn.Linear(8, 4)
    optimizer = new_optimizer(layer, rule, **options)
    set_gradients(layer, 0)
    optimizer.step()
    for p in layer.parameters():
        optimizer.state[p]["slow_weights"], optimizer.state[p]["note"] = p.detach().clone(), "a word"
    set_gradients(layer, 1)
    optimizer.step()
    other = new_optimizer(copy.deepcopy(layer), rule, **options)
    other.load_state_dict(optimizer.state_dict())
    for each in (optimizer, other):
        assert all({"slow_weights", "note"} <= each.state[p].keys() for g in each.param_groups for p in g["params"])
    layer_of_other = types.SimpleNamespace(parameters=lambda: [p for g in other.param_groups for p in g["params"]])
    set_gradients(layer, 2), set_gradients(layer_of_other, 2)
    optimizer.step(), other.step()
    assert all(torch.equal(p, q) for p, q in zip(layer.parameters(), layer_of_other.parameters(), strict=True))


def test_row_weights_of_parts_begin_anew_when_they_are_wanted_again():
    p = nn.Parameter(torch.randn(16, 4))
    optimizer = make("aurora folded", [dict(params=[p], split=(8, 8))])
    for variant, has_rows in (("folded", True), ("iterated", False), ("folded", True)):
        optimizer.param_groups[0]["variant"] = variant
        p.grad = torch.randn(16, 4)
        optimizer.step()
        assert ("row_weight" in optimizer.state[p]) == has_rows


def test_groups_of_other_muons_are_not_taken_for_matrices():
    weight, embedding = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(9, 4))
    with pytest.raises(ValueError, match='use_muon = False or betas is AdamW\'s: it needs algorithm = "adamw"'):
        aurora.Muon([dict(params=[weight], use_muon=True), dict(params=[embedding], use_muon=False)], lr=0.02)
    with pytest.raises(ValueError, match='it needs algorithm = "adamw"'):
        aurora.Muon([dict(params=[embedding], betas=(0.9, 0.95))], lr=0.02)
    aurora.Muon([dict(params=[weight], use_muon=True)], lr=0.02)


def test_arguments_of_torchs_muon_mean_the_same_or_say_what_to_use():
    p = nn.Parameter(torch.randn(8, 4))
    assert aurora.Muon([p], lr=0.1, adjust_lr_fn=None).param_groups[0]["adjust_lr_fn"] == "original"
    assert aurora.Muon([dict(params=[p], adjust_lr_fn=None)], lr=0.1).param_groups[0]["adjust_lr_fn"] == "original"
    aurora.Muon([p], lr=0.1, maximize=False)
    for arguments, message in (
        (dict(maximize=True), "no argument 'maximize'; use the negative of the loss"),
        (dict(eps=1e-7), "no argument 'eps'; use none"),
        (dict(ns_steps=5), "no argument 'ns_steps'; use polar_schedule"),
    ):
        with pytest.raises(TypeError, match=message):
            aurora.Muon([p], lr=0.1, **arguments)


def test_a_state_of_torchs_muon_that_was_json_meanwhile_is_taken_over():
    p, q = nn.Parameter(torch.ones(8, 4)), nn.Parameter(torch.ones(8, 4))
    theirs, ours = torch.optim.Muon([p], lr=0.1), aurora.Muon([q], lr=0.2)
    groups = json.loads(json.dumps(theirs.state_dict()["param_groups"]))
    ours.load_state_dict({"state": {}, "param_groups": groups})
    assert ours.param_groups[0]["lr"] == 0.1 and ours.param_groups[0]["adjust_lr_fn"] == "original"


def test_lr_may_be_a_tensor_of_one_element():
    params = [nn.Parameter(torch.ones(8, 4)) for _ in range(2)]
    for p, lr in zip(params, (0.1, torch.tensor([0.1])), strict=True):
        optimizer = make("muon", [p], lr=lr, weight_decay=0.5)
        p.grad = torch.arange(32.0).view(8, 4)
        optimizer.step()
    torch.testing.assert_close(*params)


def test_hooks_may_give_a_state_another_form():
    optimizer = aurora.Muon([nn.Parameter(torch.ones(8, 4))], lr=0.1)
    optimizer.register_state_dict_post_hook(lambda optimizer, state: {"wrapped": state})
    assert set(optimizer.state_dict()) == {"wrapped"}


def test_no_experts_are_no_error():
    p = nn.Parameter(torch.zeros(0, 4, 3))
    p.grad = torch.zeros(0, 4, 3)
    aurora.Muon([dict(params=[p], view="experts", split=(2, 2))], lr=0.1).step()


# ---- telemetry in other people's trainers ----


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 32, bias=False), nn.Linear(32, 8, bias=False)

    def forward(self, x):
        return self.down(input=self.up(x).relu())


def step_of(model, optimizer):
    model(torch.randn(5, 8)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_telemetry_follows_groups_that_a_loaded_state_has_exchanged():
    torch.manual_seed(0)
    model = Mlp()
    optimizer = make("muon", list(model.parameters()), lr=0.1, weight_decay=0.5)
    telemetry = aurora.NeuronTelemetry(model, optimizer, every=2)
    step_of(model, optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["lr"] = 0.001
    optimizer.load_state_dict(state)
    before = model.up.weight.detach().double().clone()
    step_of(model, optimizer)
    norms = (before * (1 - 0.001 * 0.5) - model.up.weight.detach().double()).norm(dim=1)
    found = telemetry.events[0]["matrices"]["up.weight"]["update_cv"]
    assert found == pytest.approx((norms.std(correction=0) / norms.mean()).item(), rel=1e-3)


def test_telemetry_leaves_out_what_a_step_leaves_alone():
    model = nn.ModuleList([Mlp(), Mlp()])
    optimizer = make("muon", list(model.parameters()), weight_decay=0.1)
    telemetry = aurora.NeuronTelemetry(model, optimizer, every=1)
    step_of(model[0], optimizer)
    (event,) = telemetry.events
    assert set(event["matrices"]) == {"0.up.weight", "0.down.weight"} and set(event["mlps"]) == {"0"}


def test_telemetry_sees_parameters_that_are_added_later():
    model = Mlp()
    optimizer = make("muon", [model.up.weight])
    telemetry = aurora.NeuronTelemetry(model, optimizer, every=1)
    optimizer.add_param_group(dict(params=[model.down.weight]))
    step_of(model, optimizer)
    assert set(telemetry.events[0]["matrices"]) == {"up.weight", "down.weight"}


def test_copies_of_a_watched_model_are_not_watched_and_it_can_be_saved():
    model = Mlp()
    optimizer = make("muon", list(model.parameters()))
    telemetry = aurora.NeuronTelemetry(model, optimizer, every=1)
    teacher = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    model(torch.randn(5, 8)).square().sum().backward()
    expected = dict(telemetry.layers["" if "" in telemetry.layers else next(iter(telemetry.layers))])
    for other in (teacher, loaded):
        other(torch.zeros(5, 8))
    optimizer.step()
    assert next(iter(telemetry.events[0]["mlps"].values())) == expected


def test_telemetry_never_ends_a_run():
    model = nn.Sequential(Mlp(), nn.utils.parametrizations.weight_norm(nn.Linear(8, 16)), nn.Linear(16, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    telemetry = aurora.NeuronTelemetry(model, optimizer, every=1)
    assert list(telemetry.mlps) == ["0"]
    model(torch.randn(8)).sum().backward()  # not in a batch
    optimizer.step()
    model[0](torch.zeros(0, 8)).sum().backward()  # an expert without tokens
    optimizer.step()
    assert telemetry.events[0]["mlps"] and not telemetry.events[1]["mlps"]
    with torch.no_grad():
        model[0].up.weight[0, 0] = float("nan")
    step_of(model[0], optimizer)
    event = telemetry.events[2]["matrices"]["0.up.weight"]
    assert event["update_cv"] is None and event["effective_rank"] is None
