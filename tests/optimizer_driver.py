"""What a rank of test_distributed.py does: twenty steps of every rule over a few matrices; saves what it then holds."""

import os

import torch
import torch.distributed as dist

from aurora.trainer.ranks import join_ranks
from tests.test_rules import RULES, make

SHAPES = {"up": (48, 16), "down": (16, 48), "q": (24, 24), "k": (24, 24), "gate": (48, 16)}
STEPS = 20
PARTS = 12  # divides by 1, 2, 3 and 4


def new_params():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def set_own_gradients(params, step):
    """Each rank's share of PARTS gradients of small whole numbers, whose sum is exact in any order."""
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params.values():
        parts = torch.randint(-8, 9, (PARTS, *p.shape), generator=generator).float()
        p.grad = parts[dist.get_rank() :: dist.get_world_size()].sum(dim=0)


def held(optimizer, params):
    own = {name: optimizer.state[p] for name, p in params.items() if p in optimizer.state}
    weights = {name: p.detach().clone() for name, p in params.items()}
    optimizer.consolidate_state_dict()
    return {"weights": weights, "own": own, "state": optimizer.state_dict()}


def main(out: str, state_file: str | None) -> None:
    """state_file: of an earlier call, loaded afterwards."""
    if "RANK" in os.environ:
        join_ranks(timeout_s=60)
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    found, loaded = {}, {}
    for rule in RULES:
        params = new_params()
        optimizer = make(rule, list(params.items()), lr=0.02, process_group=dist.group.WORLD)
        for step in range(STEPS):
            set_own_gradients(params, step)
            # In bfloat16 on odd steps: these sums of whole numbers are exact in it, but only if taken in float32.
            optimizer.reduce_gradients(torch.bfloat16 if step % 2 else None)
            optimizer.step()
        found[rule] = held(optimizer, params)
        if state_file:
            optimizer = make(rule, list(params.items()), lr=0.02, process_group=dist.group.WORLD)
            optimizer.load_state_dict(torch.load(state_file)["found"][rule]["state"])
            loaded[rule] = held(optimizer, params)
    torch.save({"found": found, "loaded": loaded}, f"{out}/rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()
