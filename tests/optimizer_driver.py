"""What a rank of test_distributed.py does: twenty steps of every rule over a few matrices; saves what it then holds.

With AdamW for a vector, clipping and a scheduler, as in other people's trainers: sharded, and replicated on all ranks.
"""

import os

import torch
import torch.distributed as dist

from aurora.trainer.ranks import join_ranks
from tests.test_rules import RULES, make

SHAPES = {"up": (48, 16), "down": (16, 48), "q": (24, 24), "k": (24, 24), "gate": (48, 16)}
VECTOR = {"gain": (24,)}
CHOSEN = ("muon", "aurora folded")  # also replicated, and in bfloat16
MAX_NORM = 100.0  # below the norm of most gradients
STEPS = 20
PARTS = 12  # divides by 1, 2, 3 and 4


def new_params():
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in (SHAPES | VECTOR).items()
    }


def set_own_gradients(params, step):
    """Each rank's share of PARTS gradients of small whole numbers, whose sum is exact in any order."""
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params.values():
        parts = torch.randint(-8, 9, (PARTS, *p.shape), generator=generator).float()
        p.grad = parts[dist.get_rank() :: dist.get_world_size()].sum(dim=0)


def new_optimizer(rule, params, **hparams):
    params = dict(params)
    vector = [(name, params.pop(name)) for name in VECTOR]
    groups = [dict(params=list(params.items())), dict(params=vector, algorithm="adamw", lr=0.01)]
    return make(rule, groups, lr=0.02, **hparams)


def train(optimizer, params, is_sharded):
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (2 * STEPS))
    for step in range(STEPS):
        set_own_gradients(params, step)
        if is_sharded:
            # In bfloat16 on odd steps: these sums of whole numbers are exact in it, but only if taken in float32.
            optimizer.reduce_gradients(torch.bfloat16 if step % 2 else None)
            norm = optimizer.clip_grad_norm_(MAX_NORM)
        else:
            for p in params.values():
                dist.all_reduce(p.grad)
            norm = torch.nn.utils.clip_grad_norm_(params.values(), MAX_NORM)
        assert norm > MAX_NORM
        optimizer.step()
        scheduler.step()


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
    found, replicated, bfloat16, loaded = {}, {}, {}, {}
    for rule in RULES:
        kinds = [(found, dist.group.WORLD, "float32")]
        if rule in CHOSEN:
            kinds += [(replicated, None, "float32"), (bfloat16, dist.group.WORLD, "bfloat16")]
        for results, group, dtype in kinds:
            params = new_params()
            optimizer = new_optimizer(rule, params, process_group=group, polar_dtype=dtype)
            train(optimizer, params, is_sharded=group is not None)
            results[rule] = held(optimizer, params)
        if state_file:
            params = new_params()
            optimizer = new_optimizer(rule, params, process_group=dist.group.WORLD)
            optimizer.load_state_dict(torch.load(state_file)["found"][rule]["state"])
            loaded[rule] = held(optimizer, params)
    results = {"found": found, "replicated": replicated, "bfloat16": bfloat16, "loaded": loaded}
    torch.save(results, f"{out}/rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()
