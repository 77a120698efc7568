"""One class for any number of ranks: real processes under torchrun, on CPU with gloo."""

import pytest
import torch

from aurora.errors import HarnessError
from aurora.optim.sharding import assign_owners
from aurora.trainer.ranks import join_ranks
from tests.conftest import OPTIMIZERS, events, losses, often
from tests.optimizer_driver import CHOSEN, STEPS
from tests.test_rules import RULES

SAVE_WHAT_A_RANK_HOLDS = """
original = train_gpt.train_steps
def train_steps(run, *rest):
    original(run, *rest)
    if hasattr(run.rule, "consolidate_state_dict"):
        run.rule.consolidate_state_dict()
    held = {{"weights": run.model.state_dict(), "state": run.rule.state_dict()}}
    torch.save(held, "{folder}/rank" + str(run.ranks.rank) + ".pt")
train_gpt.train_steps = train_steps
"""


@pytest.fixture(scope="module")
def trained(tiny_track, launch, tmp_path_factory):
    """The folder of a run of an optimizer, by so many processes."""
    folders = {}

    def get(optimizer, world_size):
        if (optimizer, world_size) not in folders:
            out = folders[optimizer, world_size] = tmp_path_factory.mktemp(f"{optimizer}{world_size}")
            patch = SAVE_WHAT_A_RANK_HOLDS.format(folder=out)
            arguments = ["--config", tiny_track, "--optimizer", optimizer, "--out", out, "--set", "train.steps=15"]
            outcome = launch(*arguments, world_size=world_size, patch=patch)
            assert outcome.codes == [0] * world_size, outcome.err
        return folders[optimizer, world_size]

    return get


def held(folder):
    return [torch.load(path) for path in sorted(folder.glob("rank*.pt"))]


ALWAYS = [("aurora", 4)]
RANKS = [
    (name, size) if (name, size) in ALWAYS else pytest.param(name, size, marks=pytest.mark.slow)
    for name in OPTIMIZERS
    for size in (2, 4)
]


@pytest.mark.parametrize("optimizer, world_size", RANKS)
def test_losses_agree_with_one_process(trained, optimizer, world_size):
    one, many = losses(trained(optimizer, 1)), losses(trained(optimizer, world_size))
    assert many[-1][0] == 15 and events(trained(optimizer, world_size))[0]["world_size"] == world_size
    for (step, loss), (many_step, many_loss) in zip(one, many, strict=True):
        assert many_step == step and many_loss == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("optimizer, world_size", RANKS)
def test_all_ranks_hold_bit_identical_weights(trained, optimizer, world_size):
    first, *others = held(trained(optimizer, world_size))
    assert len(others) == world_size - 1
    for other in others:
        assert all(torch.equal(other["weights"][name], weight) for name, weight in first["weights"].items())


@pytest.mark.parametrize("optimizer, world_size", RANKS)
def test_state_dict_is_whole_on_every_rank_and_close_to_one_process(trained, optimizer, world_size):
    (one,) = held(trained(optimizer, 1))
    for rank in held(trained(optimizer, world_size)):
        assert set(rank["state"]["state"]) == set(one["state"]["state"]) and len(one["state"]["state"]) == 33
        for index, state in one["state"]["state"].items():
            assert set(rank["state"]["state"][index]) == set(state)
            for key, value in state.items():
                theirs = rank["state"]["state"][index][key]
                torch.testing.assert_close(theirs, value, atol=2e-3 * value.abs().max().item(), rtol=0)


@pytest.fixture(scope="module")
def optimized(launch, tmp_path_factory):
    """What each rank holds after optimizer_driver.py, by how many of them; others than 4 load the state of 4."""
    ranks, states = {}, {}

    def get(world_size):
        if world_size not in ranks:
            state_of_four = get(4) and states[4] if world_size != 4 else None
            out = tmp_path_factory.mktemp(f"optimized{world_size}")
            arguments = repr(str(out)), repr(state_of_four and str(state_of_four))
            patch = f"from tests import optimizer_driver\noptimizer_driver.main({', '.join(arguments)})\nos._exit(0)"
            outcome = launch(world_size=world_size, patch=patch, timeout_s=120)
            assert outcome.codes == [0] * world_size, outcome.err
            files = sorted(out.glob("rank*.pt"))
            ranks[world_size], states[world_size] = [torch.load(path) for path in files], files[-1]
        return ranks[world_size]

    return get


# In bfloat16 a gradient that is one rounding off may become an update that is one rounding of bfloat16 off.
BFLOAT16_LIMIT = 0.02 * 2**-8 * STEPS
THREE = pytest.param(3, marks=pytest.mark.slow)


def equal_state(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


def largest_difference(kind, rule, ranks, one):
    pairs = [(rank[kind][rule]["weights"][name], weight) for rank in ranks for name, weight in one["weights"].items()]
    return max((weight - other).abs().max().item() for weight, other in pairs)


@pytest.mark.parametrize("world_size", [2, THREE, 4])
@pytest.mark.parametrize("rule", RULES)
def test_weights_after_twenty_steps_do_not_depend_on_the_number_of_ranks(optimized, rule, world_size):
    """With clipping and a scheduler."""
    (one,) = optimized(1)
    assert largest_difference("found", rule, optimized(world_size), one["found"][rule]) <= 1e-5


@pytest.mark.parametrize("world_size", [1, 2, THREE, 4])
@pytest.mark.parametrize("rule", CHOSEN)
def test_sharded_and_replicated_ranks_take_the_steps_of_one_process(optimized, rule, world_size):
    (one,), ranks = optimized(1), optimized(world_size)
    for kind in ("found", "replicated"):
        assert largest_difference(kind, rule, ranks, one["replicated"][rule]) <= 1e-5
    assert largest_difference("bfloat16", rule, ranks, one["bfloat16"][rule]) <= BFLOAT16_LIMIT
    assert largest_difference("bfloat16", rule, ranks, one["replicated"][rule]) > 1e-5, "it is in bfloat16"


@pytest.mark.parametrize("world_size", [1, 2, THREE, 4])
@pytest.mark.parametrize("rule", RULES)
def test_momentum_and_row_state_exist_on_the_owner_only(optimized, rule, world_size):
    states = [dict(rank["found"][rule]["own"]) for rank in optimized(world_size)]
    assert all(set(state.pop("gain")) == {"step", "exp_avg", "exp_avg_sq"} for state in states), "AdamW's is everyone's"
    owned = [name for state in states for name in state]
    assert sorted(owned) == ["down", "gate", "k", "q", "up"] and all(states)
    keys = {name: set(state) for own in states for name, state in own.items()}
    assert all("momentum_buffer" in found for found in keys.values())
    balanced = {"aurora tall": {"up", "gate"}} | dict.fromkeys(
        ("aurora folded", "aurora warm", "aurora refined"), {"up", "gate", "down"}
    )
    assert {name for name in keys if "row_weight" in keys[name]} == balanced.get(rule, set())
    assert all(("row_second_moment" in found) == ("normuon" in rule) for found in keys.values())


@pytest.mark.parametrize("world_size", [1, 2, THREE])
@pytest.mark.parametrize("rule", RULES)
def test_state_saved_by_four_ranks_loads_into_fewer_bit_for_bit(optimized, rule, world_size):
    saved = optimized(4)[0]["found"][rule]["state"]
    names = [name for group in saved["param_groups"] for name in group["param_names"]]
    by_name = dict(zip(names, saved["state"].values(), strict=True))
    loaded = [rank["loaded"][rule] for rank in optimized(world_size)]
    for rank in loaded:
        assert all(equal_state(state, by_name[name]) for name, state in rank["own"].items())
        again = rank["state"]
        assert all(equal_state(again["state"][index], state) for index, state in saved["state"].items())
    assert {name for rank in loaded for name in rank["own"]} == set(by_name)


def test_owners_share_the_cost_evenly_and_do_not_depend_on_the_rank():
    costs = [30] * 24 + [10] * 48
    for world_size in (1, 2, 3, 4, 8, 100):
        loads = [0] * world_size
        owners = assign_owners(costs, loads)
        assert sorted(set(owners)) == list(range(min(world_size, 72)))
        assert max(loads) <= max(30, 1.1 * sum(costs) / world_size)
        again = [0] * world_size
        assert assign_owners(costs, again) == owners and again == loads


def test_more_ranks_than_matrices(launch):
    """Two ranks, one matrix: the rank that owns nothing takes part in the collectives."""
    code = (
        "import torch.distributed as dist, aurora\n"
        "from aurora.trainer.ranks import join_ranks\n"
        "join_ranks(timeout_s=60)\n"
        "p = torch.nn.Parameter(torch.ones(8, 4))\n"
        "p.grad = torch.full((8, 4), dist.get_rank() + 1.0)\n"
        "optimizer = aurora.Muon([p], lr=0.1, process_group=dist.group.WORLD)\n"
        "optimizer.reduce_gradients()\n"
        "assert dist.get_rank() == 1 or torch.equal(p.grad, torch.full((8, 4), 3.0))\n"
        "optimizer.step()\n"
        "optimizer.consolidate_state_dict()\n"
        "assert (p < 1).all() and len(optimizer.state_dict()['state']) == 1\n"
        "print('passed', flush=True)\n"
        "dist.barrier()\n"
        "os._exit(0)\n"
    )
    outcome = launch(world_size=2, patch=code)
    # Not the exit code: a gloo process may abort when its peer closes the connection first.
    assert outcome.out == ["passed\n"] * 2, outcome.err


SHARDED_WHOLE_MODEL = """
import torch.distributed as dist, aurora
from aurora.trainer.ranks import join_ranks
join_ranks(timeout_s=60)
rank = dist.get_rank()

def new(process_group):
    torch.manual_seed(0)
    convs = [torch.nn.Parameter(torch.randn(6, 2, 3, 3).to(memory_format=torch.channels_last)) for _ in range(2)]
    vector, frozen = torch.nn.Parameter(torch.randn(5)), torch.nn.Parameter(torch.randn(3), requires_grad=False)
    groups = [dict(params=convs, view="conv"), dict(params=[vector, frozen], algorithm="adamw", lr=0.1)]
    return [*convs, vector], aurora.Muon(groups, lr=0.1, polar_dtype="float32", process_group=process_group)

(params, sharded), (others, whole) = new(dist.group.WORLD), new(None)
for step in range(3):
    for index, (p, q) in enumerate(zip(params, others)):
        parts = torch.randn(2, *p.shape, generator=torch.Generator().manual_seed(10 * step + index))
        p.grad, q.grad = parts[rank].clone(), parts.sum(dim=0)
    sharded.reduce_gradients()
    norm = sharded.clip_grad_norm_(1.0)
    assert (norm - torch.nn.utils.clip_grad_norm_(others, 1.0)).abs() < 1e-4
    sharded.step(), whole.step()
for p, q in zip(params, others):
    torch.testing.assert_close(p, q, atol=1e-5, rtol=0)
sharded.consolidate_state_dict(to=0)
if rank == 0:
    new(None)[1].load_state_dict(sharded.state_dict())
    for index, state in whole.state_dict()["state"].items():
        for key, value in state.items():
            torch.testing.assert_close(sharded.state_dict()["state"][index][key], value, atol=1e-5, rtol=0)
else:
    try:
        sharded.state_dict()
    except RuntimeError as error:
        assert "where it was gathered" in str(error)
print("passed", flush=True)
dist.barrier()
os._exit(0)
"""


def test_a_sharded_optimizer_of_a_whole_model_is_that_of_one_process(launch):
    """Convolutions as channels_last, AdamW groups, frozen parameters, clipping, and the state on rank 0."""
    outcome = launch(world_size=2, patch=SHARDED_WHOLE_MODEL, timeout_s=40)
    assert outcome.out == ["passed\n"] * 2, outcome.err


DISTRIBUTED_CHECKPOINT = """
import time, torch.distributed as dist, aurora
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from aurora.trainer.ranks import join_ranks
if "RANK" in os.environ:
    join_ranks(timeout_s=60)
else:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
rank = dist.get_rank()

def new(seed, process_group=None):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 3))
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    rule = aurora.Aurora(aurora.param_groups(ddp), lr=0.1, polar_dtype="float32", process_group=process_group)
    return ddp, rule, torch.optim.lr_scheduler.LambdaLR(rule, lambda step: 1 - step / 20)

def train(model, rule, scheduler, steps):
    for step in steps:
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(10 * step + rank))
        model(x).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        rule.step(), scheduler.step(), rule.zero_grad()

model, rule, scheduler = new(0)
train(model, rule, scheduler, range(3))
begin_s = time.monotonic()
if rank == 0:
    assert len(rule.state_dict()["state"]) == 6
    assert time.monotonic() - begin_s < 1
weights, state = get_state_dict(model, rule)
dcp.save({{"model": weights, "optimizer": state}}, checkpoint_id="{folder}")
other_model, other, other_scheduler = new(1)
weights, state = get_state_dict(other_model, other)
dcp.load({{"model": weights, "optimizer": state}}, checkpoint_id="{folder}")
set_state_dict(other_model, other, model_state_dict=weights, optim_state_dict=state)
other_scheduler.load_state_dict(scheduler.state_dict())
for each in ((model, rule, scheduler), (other_model, other, other_scheduler)):
    train(*each, range(3, 6))
for p, q in zip(model.parameters(), other_model.parameters()):
    assert torch.equal(p, q)

sharded_model, sharded, sharded_scheduler = new(0, dist.group.WORLD)
train(sharded_model, sharded, sharded_scheduler, range(1))
begin_s = time.monotonic()
if rank == 0 and dist.get_world_size() > 1:
    try:
        sharded.state_dict()
        raise AssertionError("it must raise")
    except RuntimeError as error:
        assert "call consolidate_state_dict() on every rank" in str(error) and time.monotonic() - begin_s < 1
print("passed", flush=True)
dist.barrier()
os._exit(0)
"""


@pytest.mark.parametrize("world_size", [often(1, False), 2])
def test_distributed_checkpoints_resume_bit_for_bit_and_one_rank_may_save(launch, tmp_path, world_size):
    patch = DISTRIBUTED_CHECKPOINT.format(folder=tmp_path / "checkpoint")
    outcome = launch(world_size=world_size, patch=patch, timeout_s=60)
    assert outcome.out == ["passed\n"] * world_size, outcome.err


def test_an_error_on_one_rank_alone_is_told_and_stops_all(tiny_track, launch, tmp_path):
    patch = (
        "from aurora.trainer import setup\n"
        "def missing(config):\n"
        "    raise setup.HarnessError(setup.Exit.DATA, 'no shard on this node')\n"
        "if rank == 1: setup.open_data = missing"
    )
    outcome = launch("--config", tiny_track, "--out", tmp_path, world_size=2, patch=patch)
    assert outcome.codes == [3, 3] and outcome.err == ["error: on rank 1: no shard on this node\n", ""]


def test_ranks_with_other_initial_weights_are_named_and_stop(tiny_track, launch, tmp_path):
    patch = (
        "original = train_gpt.GPT.init_weights\n"
        "train_gpt.GPT.init_weights = lambda self, seed, *others: original(self, seed + rank, *others)"
    )
    outcome = launch("--config", tiny_track, "--out", tmp_path, world_size=2, patch=patch)
    assert outcome.codes == [8, 8] and "error: rank 1 has weights = " in outcome.err[0]


COMPILER_FAILS = """
from torch._dynamo.exc import TorchDynamoException
def refuse(*args):
    raise TorchDynamoException('no compiler on this node')
torch.compile = lambda part, dynamic: refuse if rank == 1 else part
"""


@pytest.mark.parametrize("micro_batch", ["4", "auto"])
def test_a_compiler_that_fails_on_one_rank_alone_is_told_and_stops_all(tiny_track, launch, tmp_path, micro_batch):
    arguments = ["--set", "train.compile=on", "--set", f"train.micro_batch={micro_batch}"]
    outcome = launch("--config", tiny_track, "--out", tmp_path, *arguments, world_size=2, patch=COMPILER_FAILS)
    assert outcome.codes == [2, 2] and outcome.err[1] == ""
    assert "but torch.compile failed: no compiler on this node (rank 1); set it to 'off'" in outcome.err[0]


SUMS_BOTH_WAYS = """
from aurora.errors import Exit, HarnessError
from aurora.trainer import gradients
gradients.BUCKET_ELEMENTS, gradients.SMALL_ELEMENTS = 3000, 100
def step(run, model, number, *rest):
    batch, found, sums = run.next_batch(), [], run.gradients
    overlap, begun = sums.overlap, []
    for sums.overlap in (overlap, lambda: None):
        train_gpt.forward_backward(run, model, *batch)
        begun.append(sums.next_bucket)
        sums.finish()
        found.append({{name: p.grad for name, p in run.model.named_parameters()}})
        run.model.zero_grad()
    torch.save([len(sums.buckets), begun, found], "{folder}/" + str(rank) + ".pt")
    raise HarnessError(Exit.PREEMPTED, "enough")
train_gpt.train_step = step
"""


@pytest.mark.parametrize("compile", ["off", pytest.param("on", marks=pytest.mark.slow)])
def test_sums_that_begin_during_the_backward_pass_are_the_plain_ones_bit_for_bit(tiny_track, launch, tmp_path, compile):
    arguments = ["--config", tiny_track, "--optimizer", "muon", "--out", tmp_path, "--set", f"train.compile={compile}"]
    patch = SUMS_BOTH_WAYS.format(folder=tmp_path)
    outcome = launch(*arguments, "--set", "train.micro_batch=2", world_size=2, patch=patch, timeout_s=120)
    if compile == "on" and "torch.compile failed" in outcome.err[0]:
        pytest.skip("no C++ compiler")
    assert outcome.codes == [75, 75], outcome.err
    owners = []
    for rank in range(2):
        num_buckets, (begun, begun_plain), (overlapped, plain) = torch.load(tmp_path / f"{rank}.pt")
        assert num_buckets > 5 and begun == num_buckets and begun_plain == 0
        assert overlapped.keys() == plain.keys()
        for name, grad in plain.items():
            assert (grad is None and overlapped[name] is None) or torch.equal(grad, overlapped[name]), name
        owners += [name for name, grad in plain.items() if grad is not None and "attention.q.weight" in name]
    assert sorted(owners) == ["blocks.0.attention.q.weight", "blocks.1.attention.q.weight"]


@pytest.mark.parametrize("kind, message", [("gpu", "is 'gpu', but this run can use cpu"), ("cpu", None), ("", None)])
def test_device_that_the_environment_names_is_there_or_told(monkeypatch, kind, message):
    monkeypatch.setenv("SPEEDRUN_DEVICE", kind)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    if message is None:
        assert join_ranks(60).device.type == "cpu"
    else:
        with pytest.raises(HarnessError, match=message):
            join_ranks(60)
