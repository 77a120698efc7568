"""One optimizer for a whole model: AdamW groups, convolutions, experts, fused layers; resuming as torch does."""

import copy
import io
import itertools
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from torch.optim.swa_utils import SWALR

import aurora
from tests.test_rules import RULES, make

STEPS = 4


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def train(optimizer, params, start=0, stop=STEPS):
    for step in range(start, stop):
        for index, p in enumerate(params):
            p.grad = randn(*p.shape, seed=100 * step + index)
        optimizer.step()


def assert_same(params, others):
    for p, other in zip(params, others, strict=True):
        assert torch.equal(p, other)


def test_adamw_groups_are_torchs_adamw_and_change_no_matrix():
    ours, theirs = ([torch.nn.Parameter(randn(*shape)) for shape in ((8, 4), (4,), (3, 5))] for _ in range(2))
    settings = dict(lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    one = make("muon", [dict(params=ours[:1]), dict(params=ours[1:], algorithm="adamw", **settings)])
    muon, adamw = make("muon", theirs[:1]), torch.optim.AdamW(theirs[1:], **settings)
    train(one, ours)
    for step in range(STEPS):
        for index, p in enumerate(theirs):
            p.grad = randn(*p.shape, seed=100 * step + index)
        muon.step(), adamw.step()
    assert torch.equal(ours[0], theirs[0])
    for p, q in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        assert one.state[p].keys() == adamw.state[q].keys()
    assert "momentum" not in one.param_groups[1] and "betas" not in one.param_groups[0]


VIEWED = {
    "conv": ((6, 2, 3, 3), dict(view="conv"), lambda X: [X.flatten(1)]),
    "transposed conv": ((4, 2, 3), dict(view="conv", layout="in_out"), lambda X: [X.flatten(1).T]),
    "grouped conv": ((8, 2, 3), dict(view="conv", split=(4, 4)), lambda X: [X[:4].flatten(1), X[4:].flatten(1)]),
    "experts": ((3, 8, 4), dict(view="experts"), lambda X: list(X)),
    "in_out": ((4, 8), dict(layout="in_out"), lambda X: [X.T]),
    "fused": ((20, 4), dict(split=(8, 8, 4)), lambda X: [X[:8], X[8:16], X[16:]]),
    "fused (in, out)": ((4, 12), dict(layout="in_out", split=(8, 4)), lambda X: [X.T[:8], X.T[8:]]),
    "fused experts (in, out)": (
        (2, 4, 12),
        dict(view="experts", layout="in_out", split=(6, 6)),
        lambda X: [part for expert in X for part in (expert.T[:6], expert.T[6:])],
    ),
}


@pytest.mark.parametrize("kind", VIEWED)
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "riemannian_aurora"])
def test_viewed_parameters_are_updated_as_the_matrices_that_they_hold(rule, kind):
    shape, options, matrices = VIEWED[kind]
    p = torch.nn.Parameter(randn(*shape))
    own = [torch.nn.Parameter(part.clone()) for part in matrices(p.detach())]
    optimizer = make(rule, [dict(params=[p], **options)], weight_decay=0.1)
    separate = make(rule, own, weight_decay=0.1)
    for step in range(STEPS):
        p.grad = randn(*shape, seed=step)
        for q, grad in zip(own, matrices(p.grad), strict=True):
            q.grad = grad.clone()
        optimizer.step(), separate.step()
    for q, part in zip(own, matrices(p.detach()), strict=True):
        torch.testing.assert_close(part, q, rtol=1e-4, atol=1e-5)
    restored = make(rule, [dict(params=[torch.nn.Parameter(p.detach().clone())], **options)])
    restored.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (8, 8)])
def test_lr_conventions_are_those_of_torchs_muon(adjust, shape):
    p, q = (torch.nn.Parameter(randn(*shape)) for _ in range(2))
    ours = aurora.Muon([p], lr=0.01, polar_schedule="ns5_jordan", polar_dtype="bfloat16", adjust_lr_fn=adjust)
    theirs = torch.optim.Muon([q], lr=0.01, weight_decay=0.0, adjust_lr_fn=adjust)
    train(ours, [p]), train(theirs, [q])
    change = (q.detach() - randn(*shape)).norm()
    assert (p.detach() - q.detach()).norm() < 0.15 * change  # bfloat16, summed in another order


@pytest.mark.parametrize(
    "group, message",
    [
        (dict(params=[torch.ones(4)]), r"shape \(4,\).*'matrix' takes plain 2-D"),
        (dict(params=[torch.ones(4, 2, 2)]), r"shape \(4, 2, 2\).*'conv' more dimensions, 'experts' three"),
        (dict(params=[torch.ones(4, 2)], view="convolution"), "view must be one of matrix, conv, experts"),
        (dict(params=[torch.ones(6, 2)], split=(2, 2)), r"split = \(2, 2\) must sum to its 6 outputs"),
        (dict(params=[torch.ones(4)], algorithm="adamw"), "needs an lr of its own"),
        (dict(params=[torch.ones(4)], algorithm="adamw", lr=-1.0), "at least 0"),
        (dict(params=[torch.ones(4)], algorithm="adamw", lr=0.1, betas=(0.9, 1.0)), r"in \[0, 1\)"),
        (dict(params=[torch.ones(4, 2)], algorithm="lion"), 'algorithm must be "adamw" or "Muon", got \'lion\''),
        (dict(params=[torch.ones(4, 2)], split=3), r"split = 3 must sum to its 4 outputs"),
        (dict(params=[torch.ones(4, 2)], maximize=True), "maximize = True, which is not supported; use the negative"),
        (
            dict(params=[torch.ones(4)], algorithm="adamw", lr=0.1, amsgrad=True),
            "amsgrad = True, which is not supported",
        ),
        (dict(params=[torch.ones(4, 2)], adjust_lr_fn="mine"), "adjust_lr_fn must be one of spectral, original"),
        (dict(params=[torch.ones(4, 2, dtype=torch.int32)]), "dtype torch.int32"),
    ],
)
def test_a_group_that_is_refused_says_why_and_changes_nothing(group, message):
    optimizer = aurora.Muon([torch.nn.Parameter(torch.ones(4, 2))], lr=0.1)
    before = copy.deepcopy(optimizer.state_dict())
    group = group | {"params": [torch.nn.Parameter(p, requires_grad=p.is_floating_point()) for p in group["params"]]}
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group(group)
    assert optimizer.state_dict() == before and len(optimizer.param_groups) == 1


def test_odd_parameters_are_taken_or_refused_with_words():
    empty, p = torch.nn.Parameter(torch.ones(0, 4)), torch.nn.Parameter(torch.ones(8, 4))
    optimizer = aurora.Aurora([dict(params=[]), dict(params=[empty, p])], lr=0.1)
    empty.grad, p.grad = torch.ones(0, 4), torch.ones(8, 4)
    optimizer.step()
    assert not torch.equal(p, torch.ones(8, 4)) and optimizer.state_dict()["param_groups"][0]["params"] == []
    p.grad = torch.ones(8, 4).to_sparse()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        optimizer.step()
    other = torch.nn.Parameter(torch.ones(8, 4))
    other.grad = torch.ones(8, 4)
    optimizer.param_groups[1]["params"] = [other]  # as wrappers do
    optimizer.step()
    assert not torch.equal(other, torch.ones(8, 4))
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.nn.Parameter(torch.ones(8, 4))
        fake.grad = torch.ones(8, 4)
        aurora.Muon([fake], lr=0.1, polar_dtype="float32").step()


SCHEDULERS = {
    "none": lambda optimizer: None,
    "one cycle": lambda optimizer: OneCycleLR(optimizer, 0.2, total_steps=10),
    "lambda": lambda optimizer: LambdaLR(optimizer, lambda step: 1.0),
    "swa": lambda optimizer: SWALR(optimizer, 0.01),
}


@pytest.mark.parametrize("saved, loaded", list(itertools.product(SCHEDULERS, repeat=2)))
def test_state_moves_between_runs_with_and_without_schedulers(saved, loaded):
    def new():
        params = [torch.nn.Parameter(randn(8, 4)), torch.nn.Parameter(randn(4))]
        return params, make(
            "aurora folded", [dict(params=params[:1]), dict(params=params[1:], algorithm="adamw", lr=0.1)]
        )

    params, optimizer = new()
    SCHEDULERS[saved](optimizer)
    train(optimizer, params, stop=2)
    others, other = new()
    SCHEDULERS[loaded](other)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with torch.no_grad():
        for p, q in zip(params, others, strict=True):
            q.copy_(p)
    for ours, theirs in zip(other.param_groups, optimizer.param_groups, strict=True):
        assert {key: value for key, value in theirs.items() if key != "params"}.items() <= ours.items()
    train(optimizer, params, start=2), train(other, others, start=2)
    assert_same(params, others)


def test_names_count_without_prefixes_and_positions_where_there_are_none():
    model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False))
    optimizer = make("muon", torch.compile(model).named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["_orig_mod.0.weight"]
    train(optimizer, list(model.parameters()))
    state = optimizer.state_dict()
    for params in (model.named_parameters(), model.parameters(), [("module.0.weight", model[0].weight)]):
        make("muon", params).load_state_dict(copy.deepcopy(state))
    with pytest.raises(ValueError, match=r"belongs to parameters \['0.weight'\], this optimizer has \['1.weight'\]"):
        make("muon", [("1.weight", model[0].weight)]).load_state_dict(state)


def test_hooks_run_before_the_checks_and_see_the_whole():
    p = torch.nn.Parameter(randn(8, 4))
    optimizer = make("muon", [("w", p)])
    train(optimizer, [p])
    seen = []
    optimizer.register_state_dict_post_hook(lambda optimizer, state: state | {"mine": 3})
    state = optimizer.state_dict()
    assert state["mine"] == 3

    def rename(optimizer, state):
        groups = [group | {"param_names": ["w"]} for group in state["param_groups"]]
        return {**state, "param_groups": groups}

    other = make("muon", [("w", torch.nn.Parameter(randn(8, 4)))])
    other.register_load_state_dict_pre_hook(rename)
    other.register_load_state_dict_post_hook(seen.append)
    state["param_groups"][0]["param_names"] = ["old"]
    other.load_state_dict(state)
    assert seen == [other]


def test_copies_pickles_and_files_go_on_bit_for_bit():
    params = [torch.nn.Parameter(randn(8, 4)), torch.nn.Parameter(randn(4))]
    optimizer = make("normuon", [dict(params=params[:1]), dict(params=params[1:], algorithm="adamw", lr=0.1)])
    train(optimizer, params, stop=2)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    copies = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    loaded = copy.deepcopy(optimizer)
    loaded.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    train(optimizer, params, start=2)
    for other in (*copies, loaded):
        others = [p for group in other.param_groups for p in group["params"]]
        train(other, others, start=2)
        assert_same(params, others)


@pytest.mark.parametrize("rule", ["muon", "normuon", "aurora folded", "aurora iterated"])
def test_distributed_checkpoints_of_torch_round_trip(rule):
    def new():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 8))
        matrices = [(name, p) for name, p in model.named_parameters() if p.ndim == 2]
        others = [(name, p) for name, p in model.named_parameters() if p.ndim == 1]
        return model, make(rule, [dict(params=matrices), dict(params=others, algorithm="adamw", lr=0.1)])

    model, optimizer = new()
    train(optimizer, list(model.parameters()))
    other_model, other = new()
    set_optimizer_state_dict(other_model, other, get_optimizer_state_dict(model, optimizer))
    assert other.param_groups[0]["algorithm"] == optimizer.param_groups[0]["algorithm"]
    for p, q in zip(model.parameters(), other_model.parameters(), strict=True):
        assert optimizer.state[p].keys() == other.state[q].keys()
        assert all(torch.equal(optimizer.state[p][key], other.state[q][key]) for key in other.state[q])


def test_scaler_and_closure_work():
    p = torch.nn.Parameter(randn(8, 4))
    optimizer = make("muon", [p])
    scaler = torch.amp.GradScaler("cpu")
    before = p.detach().clone()
    p.grad = torch.full((8, 4), float("inf"))
    scaler.scale(torch.ones(()))
    scaler.step(optimizer), scaler.update()
    assert torch.equal(p, before) and not optimizer.found_non_finite
    assert optimizer.step(lambda: torch.tensor(3.0)) == 3


def test_a_sharded_optimizer_says_what_it_cannot_do_alone(monkeypatch):
    group = SimpleNamespace()
    monkeypatch.setattr(dist, "get_rank", lambda group=None: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    p = torch.nn.Parameter(randn(8, 4))
    optimizer = aurora.Muon([p], lr=0.1, process_group=group)
    assert optimizer.state_dict()["state"] == {}, "there is none yet"
    optimizer._whole_state = None  # as after a step
    with pytest.raises(RuntimeError, match=r"call consolidate_state_dict\(\) on every rank"):
        optimizer.state_dict()
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        copy.deepcopy(optimizer)
    optimizer.param_groups[0]["params"] = [torch.nn.Parameter(randn(8, 4))]
    optimizer.param_groups[0]["params"][0].grad = randn(8, 4)
    with pytest.raises(RuntimeError, match="a parameter was exchanged"):
        optimizer.step()


def test_the_variant_of_a_fused_layer_may_change_in_mid_run():
    p = torch.nn.Parameter(randn(20, 4))
    optimizer = make("aurora iterated", [dict(params=[p], split=(8, 8, 4))])
    keys = []
    for variant in ("iterated", "folded", "iterated"):
        optimizer.param_groups[0]["variant"] = variant
        train(optimizer, [p])
        keys.append(set(optimizer.state[p]))
    assert keys == [{"momentum_buffer"}, {"momentum_buffer", "row_weight"}, {"momentum_buffer"}]
    assert p.isfinite().all()


def test_state_of_torchs_adamw_and_muon_is_taken_over_and_of_others_refused():
    p = torch.nn.Parameter(randn(8, 4))
    make_adamw = lambda: aurora.Muon([dict(params=[p], algorithm="adamw", lr=0.1)], lr=0.1)  # noqa: E731
    theirs = torch.optim.AdamW([p], lr=0.3)
    train(theirs, [p])
    ours = make_adamw()
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["lr"] == 0.3 and torch.equal(ours.state[p]["exp_avg"], theirs.state[p]["exp_avg"])
    state = theirs.state_dict()
    state["state"] = {0: state["state"][0] | {"step": 5}}
    make_adamw().load_state_dict(state)
    muon = torch.optim.Muon([p], lr=0.1)
    train(muon, [p])
    ours = aurora.Muon([p], lr=0.1)
    muon_state = muon.state_dict()
    with pytest.raises(ValueError, match="ns_steps = 7, which is not supported; use polar_schedule"):
        ours.load_state_dict({**muon_state, "param_groups": [muon_state["param_groups"][0] | {"ns_steps": 7}]})
    for optimizer in (torch.optim.SGD([p], lr=1.0, momentum=0.9), torch.optim.Adam([p], lr=0.1, weight_decay=0.1)):
        train(optimizer, [p])
        with pytest.raises(ValueError, match="dampening|decoupled_weight_decay"):
            (ours if isinstance(optimizer, torch.optim.SGD) else make_adamw()).load_state_dict(optimizer.state_dict())


def test_how_parameters_lie_is_not_taken_from_a_state():
    p = torch.nn.Parameter(randn(8, 4))
    split, whole = make("muon", [dict(params=[p], split=(4, 4))]), make("muon", [p])
    for ours, theirs in ((split, whole), (whole, split)):
        ours.load_state_dict(theirs.state_dict())
    assert split.param_groups[0]["split"] == (4, 4) and "split" not in whole.param_groups[0]


def test_clipping_is_torchs():
    params = [torch.nn.Parameter(randn(8, 4)), torch.nn.Parameter(randn(4))]
    optimizer = make("muon", [dict(params=params[:1]), dict(params=params[1:], algorithm="adamw", lr=0.1)])
    for p in params:
        p.grad = 10 * p.detach().clone()
    expected = [p.grad.clone() for p in params]
    norm = torch.nn.utils.get_total_norm(expected)
    torch.testing.assert_close(optimizer.clip_grad_norm_(0.5), norm)
    for p, grad in zip(params, expected, strict=True):
        torch.testing.assert_close(p.grad, grad * 0.5 / norm, rtol=1e-5, atol=1e-7)
    assert aurora.Muon([dict(params=[params[1]], algorithm="adamw", lr=0.1)], lr=0.1).found_non_finite == 0
