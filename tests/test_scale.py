"""Bytes that ranks receive in a step: those that scripts/benchmarks/scale.py computes are those of running steps."""

import json

import pytest
import torch

import aurora
from scripts.benchmarks.scale import Groups, exchange_bytes, fully_shard_bytes, owners_bytes, owners_memory
from tests.conftest import often

SHAPES = [(24, 16)] * 5 + [(16, 24)] * 2 + [(16, 16)] * 3 + [(7, 5)]
VECTORS = [(11,), (30, 4)]

# Wraps torch.distributed, and takes steps of Muon in both ways.
COUNT = """
import json
import torch.distributed as dist
from aurora.optim import sharding
from aurora.trainer.ranks import join_ranks
join_ranks(timeout_s=60)
import aurora
from torch.distributed.fsdp import fully_shard
received = [0]
size = lambda tensor: tensor.numel() * tensor.element_size()
world_size, rank = dist.get_world_size(), dist.get_rank()

def counted(name, count):
    original = getattr(dist, name)
    def call(*args, **kwargs):
        received[0] += count(*args, **kwargs)
        return original(*args, **kwargs)
    setattr(dist, name, call)

def of_exchange(output, input, sizes, *args, **kwargs):
    return (output.numel() - sizes[rank]) * output.element_size()

counted("all_to_all_single", of_exchange)
counted("broadcast", lambda tensor, group_src=None, **kwargs: size(tensor) if group_src != rank else 0)
for name in ("all_gather_single", "all_gather_into_tensor"):
    if hasattr(dist, name):
        counted(name, lambda output, input=None, *args, **kwargs: size(output) * (world_size - 1) // world_size)
    sent = name.replace("all_gather_single", "reduce_scatter_single").replace("all_gather_into", "reduce_scatter")
    if hasattr(dist, sent):
        counted(sent, lambda output, input=None, *args, **kwargs: size(output) * (world_size - 1))
shapes, vectors = {shapes}, {vectors}
sharding.GATHER_BYTES = {gather_bytes}

def params():
    return [torch.nn.Parameter(torch.ones(shape)) for shape in shapes + vectors]

def new(params, **options):
    groups = [dict(params=params[: len(shapes)]), dict(params=params[len(shapes) :], algorithm="adamw", lr=0.1)]
    return aurora.Muon(groups, lr=0.1, **options)

own = params()
optimizer = new(own, process_group=dist.group.WORLD)
for p in own:
    p.grad = torch.ones_like(p)
optimizer.reduce_gradients(torch.bfloat16)
optimizer.step()
found = dict(owners=received[0])

class Net(torch.nn.Module):
    def __init__(self, params):
        super().__init__()
        self.weights = torch.nn.ParameterList(params)
    def forward(self, x):
        return sum(p.square().sum() for p in self.weights) * x

net = torch.nn.Sequential(Net(params()), Net(params()))
for part in (*net, net):
    fully_shard(part)
    part.set_force_sum_reduction_for_comms(True)
    part.set_gradient_divide_factor(1.0)
received[0] = 0
net(torch.ones(1, requires_grad=True)).backward()
found["passes"], received[0] = received[0], 0
new(list(net[0].weights)).step()
found["exchange"] = received[0]
print(json.dumps(found), flush=True)
dist.barrier()
os._exit(0)
"""


@pytest.mark.parametrize("gather_bytes", [often(2**28, True), often(10_000, False)])
@pytest.mark.parametrize("world_size", [often(size, size == 2) for size in (2, 3, 4, 8)])
def test_computed_bytes_are_those_of_running_steps(launch, monkeypatch, world_size, gather_bytes):
    code = COUNT
    for name, value in (("shapes", SHAPES), ("vectors", VECTORS), ("gather_bytes", gather_bytes)):
        code = code.replace("{" + name + "}", repr(value))
    outcome = launch(world_size=world_size, patch=code, timeout_s=100)
    found = [json.loads(text) for text in outcome.out]
    monkeypatch.setattr("aurora.optim.sharding.GATHER_BYTES", gather_bytes)
    matrices, others = ([torch.Size(shape) for shape in shapes] for shapes in (SHAPES, VECTORS))
    assert [rank["owners"] for rank in found] == owners_bytes(Groups(matrices, others), world_size, 2)
    assert [rank["exchange"] for rank in found] == exchange_bytes(matrices, world_size)
    passes = fully_shard_bytes([(matrices + others, 4, 2)] * 2, world_size)
    assert [rank["passes"] for rank in found] == [passes] * world_size


def test_one_rank_receives_nothing_and_what_is_gathered_is_never_more_than_the_weights():
    groups = Groups([torch.Size(shape) for shape in SHAPES], [torch.Size(shape) for shape in VECTORS])
    assert owners_bytes(groups, 1, 2) == [0] and exchange_bytes(groups.matrices, 1) == [0]
    weights = 4 * sum(shape.numel() for shape in groups.matrices)
    no_vectors = Groups(groups.matrices, [])
    for world_size in (2, 8, 64, 1024):
        received = owners_bytes(no_vectors, world_size, 0)
        assert max(received) <= weights and sum(received) == (world_size - 1) * weights
        assert owners_memory(groups, world_size, 2) > 0
    assert aurora.Muon.wire_dtype is None
