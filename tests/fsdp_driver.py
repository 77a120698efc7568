"""What a rank of test_fsdp.py does: rules over a model that fully_shard has split, beside one that is whole.

With AdamW for vectors, clipping and a scheduler, as in other people's trainers.
"""

import functools
import os

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import aurora
from aurora.optim.fsdp import split_like
from aurora.trainer.ranks import join_ranks
from tests import test_board_rules, test_modifiers, test_rules

STEPS = 20
MAX_NORM = 10.0  # below the norm of all gradients
# They amplify what sums of squares are rounded by, so that other numbers of ranks clip otherwise: not clipped here.
AMPLIFYING = ("aurora warm", "soap")
RULES = [*test_rules.RULES, *test_board_rules.BOARD_RULES]


class Net(torch.nn.Module):
    """Matrices whose rows no number of ranks but 1 divides, or fewer rows than ranks; a convolution; a fused layer."""

    def __init__(self):
        super().__init__()
        self.up, self.mid, self.q, self.down = (
            torch.nn.Linear(*shape) for shape in ((16, 46), (46, 46), (46, 46), (46, 3))
        )
        self.conv, self.head = torch.nn.Conv1d(3, 22, 3, padding=1), torch.nn.Linear(22, 7)

    def forward(self, x):
        x = self.down(self.q(self.mid(self.up(x).tanh()).tanh()).tanh())
        return self.head(self.conv(x.mT).mT.tanh())


def new_net(is_split=True, mesh=None, seed=0):
    torch.manual_seed(seed)
    net = Net()
    for part in (net.up, net.mid, net.conv, net) if is_split else ():
        fully_shard(part, mesh=mesh)
        part.set_force_sum_reduction_for_comms(True)  # gloo has no other
        part.set_gradient_divide_factor(1.0)
    return net


def new_optimizer(rule, net, **options):
    groups = aurora.param_groups(net, adamw_lr=0.01, overrides={"q.weight": dict(split=(20, 26))})
    make = test_rules.make if rule in test_rules.RULES else test_board_rules.make
    optimizer = make(rule, groups, **dict(lr=0.02, weight_decay=0.1) | test_board_rules.COARSE.get(rule, {}) | options)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (2 * STEPS))


def train(net, optimizer, scheduler, steps, is_clipped=True):
    for step in steps:
        generator = torch.Generator().manual_seed(1000 + step)
        for p in net.parameters():
            G = torch.randint(-8, 9, p.shape, generator=generator).float()
            p.grad = split_like(p, G) if hasattr(p, "placements") else G
        if is_clipped:  # in turns by torch's function and by our own
            clip = (
                optimizer.clip_grad_norm_
                if step % 2
                else functools.partial(torch.nn.utils.clip_grad_norm_, net.parameters())
            )
            assert clip(max_norm=MAX_NORM) > MAX_NORM
        optimizer.step(), scheduler.step(), optimizer.zero_grad()


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def compare(what, net, optimizer, other, other_optimizer, limit, state_limit=1e-4):
    """The split model and its state with the whole ones. All ranks hold the limit, or none goes on."""
    for (name, p), q in zip(net.named_parameters(), other.parameters(), strict=True):
        error = (whole(p.detach()) - q.detach()).abs().max().item()
        assert error <= limit, (what, name, error)
        state, other_state = optimizer.state[p], other_optimizer.state[q]
        assert state.keys() == other_state.keys()
        for key, value in other_state.items():
            assert not value.ndim or state[key].placements == p.placements, "rows of state lie where the weights' do"
            scale = max(1.0, value.abs().max().item())
            assert (whole(state[key]) - value).abs().max().item() <= state_limit * scale, (what, name, key)


def check_rules(rules):
    for rule in rules:
        split, other = new_pair(rule)
        for each in (split, other):
            train(*each, range(STEPS), rule not in AMPLIFYING)
        compare(rule, *split[:2], *other[:2], 1e-5)
        assert not split[1].found_non_finite


def new_pair(rule, mesh=None, **options):
    """A split model and a whole one, each with optimizer and scheduler."""
    split, other = new_net(mesh=mesh), new_net(is_split=False)
    return (split, *new_optimizer(rule, split, **options)), (other, *new_optimizer(rule, other, **options))


def check_checkpoints(rules, folder, is_saved_here):
    """What ranks save through torch.distributed.checkpoint, as many others load, and go on from as one process does.

    Saved after six steps; and taken over from a state_dict() that is whole, and from one of as many ranks.
    """
    for rule in rules:
        split, other = new_pair(rule)
        train(*other, range(6))
        path = f"{folder}/{rule}"
        if is_saved_here:
            train(*split, range(6))
            model, state = get_state_dict(*split[:2])
            dcp.save({"model": model, "optimizer": state}, checkpoint_id=path)
            again = new_net(seed=1)
            again = (again, *new_optimizer(rule, again))
            again[1].load_state_dict(split[1].state_dict())
            assert all(
                torch.equal(a.to_local(), b.to_local())
                for a, b in zip(moments(again[1]), moments(split[1]), strict=True)
            )
        else:
            split = new_net(seed=1)
            split = (split, *new_optimizer(rule, split))
            model, state = get_state_dict(*split[:2])
            dcp.load({"model": model, "optimizer": state}, checkpoint_id=path)
            set_state_dict(*split[:2], model_state_dict=model, optim_state_dict=state)
        compare(f"{rule} from a checkpoint", *split[:2], *other[:2], 1e-5)
        from_whole = new_net()
        from_whole = (from_whole, *new_optimizer(rule, from_whole))
        with torch.no_grad():
            for p, q in zip(from_whole[0].parameters(), other[0].parameters(), strict=True):
                p.copy_(split_like(p, q.detach()))
        from_whole[1].load_state_dict(other[1].state_dict())
        for steps in (split, from_whole):
            steps[2].load_state_dict(other[2].state_dict())
            train(*steps, range(6, 9))
        train(*other, range(6, 9))
        compare(f"{rule} from a checkpoint, later", *split[:2], *other[:2], 1e-5)
        compare(f"{rule} from a whole state", *from_whole[:2], *other[:2], 1e-5)


def moments(optimizer):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [
        optimizer.state[p][key] for p in params for key in sorted(optimizer.state[p]) if optimizer.state[p][key].ndim
    ]


def check_replicas(rules):
    """Two replicas of two shards each."""
    for rule in rules:
        split, other = new_pair(rule, init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
        assert len(split[0].mid.weight.placements) == 2
        for each in (split, other):
            train(*each, range(6))
        compare(f"{rule} with replicas", *split[:2], *other[:2], 1e-5)


def check_own_backward(rules):
    """Gradients of fully_shard itself, of each rank's part of a batch, whose sums are rounded otherwise."""
    for rule in rules:
        split, other = new_pair(rule)
        for step in range(STEPS):
            x = torch.randn(12, 5, 16, generator=torch.Generator().manual_seed(step))
            for (net, optimizer, scheduler), batch in (
                (split, x[dist.get_rank() :: dist.get_world_size()]),
                (other, x),
            ):
                net(batch).square().sum().backward()
                torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                optimizer.step(), scheduler.step(), optimizer.zero_grad()
        compare(f"{rule} on its own gradients", *split[:2], *other[:2], 1e-4, 1e-3)


def check_bfloat16(rules):
    """Polar factors in bfloat16 are the same; on the wire it rounds what is sent once."""
    for rule in rules:
        split, other = new_pair(rule, polar_dtype="bfloat16")
        rounded, _ = new_pair(rule)
        rounded[1].wire_dtype = torch.bfloat16
        exact, _ = new_pair(rule)
        for each in (split, other, rounded, exact):
            train(*each, range(STEPS))
        compare(f"{rule} in bfloat16", *split[:2], *other[:2], 0.02 * 2**-8 * STEPS, 1.0)
        errors = [
            (whole(p.detach()) - whole(q.detach())).abs().max()
            for p, q in zip(rounded[0].parameters(), exact[0].parameters(), strict=True)
        ]
        assert 1e-6 < max(errors) < 0.02 * 2**-6 * STEPS, max(errors)


def refused(make, text):
    try:
        make()
    except ValueError as error:
        assert text in str(error) and "\n" not in str(error), error
    else:
        raise AssertionError(f"it must raise: {text}")


def check_refusals():
    """Of what cannot be shared out by rows; and ranks that split nothing, or only a part."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    by_columns, replicated = (
        torch.nn.Parameter(distribute_tensor(torch.randn(8, 6), mesh, [placement]))
        for placement in (Shard(1), Replicate())
    )
    refused(lambda: aurora.Muon([("up", by_columns)], lr=0.1), "up of shape (8, 6) is a DTensor with placements (S(1))")
    refused(lambda: aurora.Muon([("up", replicated)], lr=0.1), "do without tensor parallelism")
    adamw = aurora.Muon([dict(params=[by_columns], algorithm="adamw", lr=0.1)], lr=0.1)
    by_columns.grad = torch.ones_like(by_columns)
    adamw.step()
    net = new_net()
    groups = aurora.param_groups(net, adamw_lr=0.01)
    refused(lambda: aurora.Muon(groups, lr=0.1, process_group=dist.group.WORLD), "needs no process_group")
    optimizer = aurora.Muon(groups, lr=0.1)
    state = {"state": {0: {"momentum_buffer": by_columns.data}}, "param_groups": optimizer.state_dict()["param_groups"]}
    refused(lambda: optimizer.load_state_dict(state), "momentum_buffer")
    zero = new_net()
    with torch.no_grad():
        zero.up.weight.zero_()
    refused(lambda: aurora.Muon(aurora.param_groups(zero, adamw_lr=0.01), lr=0.1, hyperball=True), "has one of 0")
    whole_matrix = torch.nn.Parameter(torch.ones(8, 4))
    mixed = aurora.Muon([net.mid.weight, whole_matrix, net.up.weight], lr=0.1)
    net.mid.weight.grad, whole_matrix.grad = torch.ones_like(net.mid.weight), torch.ones(8, 4)
    net.mid.weight.grad.to_local()[:1] = torch.nan  # rows of all ranks
    mixed.step()
    assert (whole_matrix < 1).all() and mixed.found_non_finite and net.up.weight not in mixed.state


def check_modifiers(rules):
    for rule in rules:
        for options in test_modifiers.MODIFIERS.values():
            split, other = new_pair(rule, **options)
            for each in (split, other):
                train(*each, range(4))
            compare(f"{rule} with {options}", *split[:2], *other[:2], 1e-5)


def check_all(checks):
    for check, *arguments in checks:
        globals()[check](*arguments)


def join():
    if "RANK" in os.environ:
        join_ranks(timeout_s=60)
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def main(check, *arguments):
    join()
    globals()[check](*arguments)
    print("passed", flush=True)
    dist.barrier()
    os._exit(0)
