"""What makes steps slow without showing in a result: recompiles, host syncs, bytes on the wire. Counted, not timed."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

import train_gpt
from aurora.config import load_config
from aurora.optim import stacks
from aurora.trainer.gradients import GradientSum
from aurora.trainer.optimizers import build_optimizers
from scripts.benchmarks.optim import temporary_bytes
from tests.conftest import ROOT, often
from tests.test_rules import RULES, make

SHAPES = [(48, 16), (16, 48), (24, 24), (48, 16)]


def new_params(device="cpu"):
    params = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in SHAPES]
    for p in params:
        p.grad = torch.randn(p.shape, device=device)
    return params


STACKED = [((64, 64), 48), ((256, 64), 12), ((64, 256), 12), ((512, 16), 32), ((128, 64), 24)]


MODIFIED = dict(hyperball=True, cautious_decay=True, weight_decay=0.1)
COSTS = [(rule, {}) for rule in RULES if rule != "riemannian_aurora"] + [("muon", MODIFIED)]


@pytest.mark.parametrize("dtype", ["float32", often("bfloat16", False)])
@pytest.mark.parametrize("rule, hparams", COSTS)
def test_a_step_takes_at_most_two_and_a_half_of_the_largest_stack(rule, hparams, dtype, monkeypatch):
    """Of many matrices of one shape, and of the parts of stacked experts and fused layers."""
    monkeypatch.setattr(stacks, "CPU_STACK_BYTES", 2**18)
    for shape, count in STACKED:
        params = [torch.nn.Parameter(torch.randn(shape)) for _ in range(count)]
        experts = torch.nn.Parameter(torch.randn(4, *shape))
        options = dict(view="experts", split=(shape[0] // 2,) * 2)
        for groups in ([dict(params=params)], [dict(params=[experts], **options)]):
            for group in groups:
                for p in group["params"]:
                    p.grad = torch.randn_like(p)
            optimizer = make(rule, groups, polar_dtype=dtype, **hparams)
            optimizer.step()
            assert 0.5 < temporary_bytes(optimizer.step, "cpu") / stacks.CPU_STACK_BYTES < 2.5, (shape, len(groups))


class SyncCounter(TorchDispatchMode):
    """Counts operations that would make the host wait for a CUDA device."""

    SYNCS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "_linalg_check_errors")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.SYNCS:
            self.found.append(name)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("rule", [often(rule, rule != "riemannian_aurora") for rule in RULES])
def test_fifty_steps_with_changing_lr_make_no_host_sync(rule):
    optimizer = make(rule, new_params(), **({"cg_steps": 3} if rule == "riemannian_aurora" else {}))
    with SyncCounter() as counter:
        for step in range(50):
            for group in optimizer.param_groups:
                group["lr"], group["momentum"] = 0.1 * (1 - step / 50), 0.85 + 0.002 * step
            optimizer.step()
    assert counter.found == []
    with SyncCounter() as counter:
        bool(optimizer.found_non_finite)
    assert counter.found == ["_local_scalar_dense"], "the counter counts"


COMPILED = [often(rule, rule == "aurora folded") for rule in RULES if rule != "riemannian_aurora"]


@pytest.mark.parametrize("rule", COMPILED)
def test_fifty_compiled_steps_with_changing_lr_do_not_recompile(rule):
    torch._dynamo.reset()
    compilations = CompileCounter()
    hparams = dict(lr=torch.tensor(0.1), momentum=torch.tensor(0.95), polar_dtype="auto")
    optimizer = make(rule, new_params(), **hparams)
    step = torch.compile(optimizer.step, backend=compilations)
    counts = []
    for number in range(50):
        optimizer.param_groups[0]["lr"].fill_(0.1 * (1 - number / 50))
        optimizer.param_groups[0]["momentum"].fill_(0.85 + 0.002 * number)
        step()
        counts.append(compilations.frame_count)
    assert counts[1] == counts[-1] and counts[-1] > 0, counts


@pytest.mark.parametrize("rule", ["muon", "unormuon", "aurora folded"])
def test_a_step_compiles_to_one_graph(rule):
    torch._dynamo.reset()
    params = new_params()
    copies = copy.deepcopy(params)
    for p, other in zip(params, copies, strict=True):
        other.grad = p.grad.clone()
    eager, compiled = (make(rule, each, polar_dtype="float32") for each in (params, copies))
    for optimizer in (eager, compiled):
        optimizer.step()  # makes the state, which compiled code finds there
    eager.step()
    torch.compile(compiled.step, backend="eager", fullgraph=True)()
    for p, other in zip(params, copies, strict=True):
        torch.testing.assert_close(p, other)


@pytest.fixture
def eight_ranks(monkeypatch):
    """This process as rank 0 of 8, with collectives that only count the bytes that a ring would have it send."""
    sent = {}

    def count(name, factor):
        def collective(*tensors, **kwargs):
            sent[name] = sent.get(name, 0) + factor * tensors[1].numel() * tensors[1].element_size()
            return SimpleNamespace(wait=lambda: None)

        return collective

    for name, value in (("is_initialized", True), ("get_rank", 0), ("get_world_size", 8)):
        monkeypatch.setattr(dist, name, lambda group=None, value=value: value)
    monkeypatch.setattr(dist, "group", SimpleNamespace(WORLD="world"))
    done = SimpleNamespace(wait=lambda: None)
    monkeypatch.setattr(dist, "all_reduce", lambda flag, group, async_op=False: done)  # four bytes
    # (received, send, ...): each rank's share of what it sends stays at home.
    monkeypatch.setattr(dist, "all_to_all_single", count("all_to_all", 7 / 8))
    monkeypatch.setattr("aurora.optim.sharding._all_gather", count("all_gather", 7))
    return sent


def bytes_of_a_step(activation_dtype, sent):
    config = load_config(ROOT / "configs" / "gpt2_small.toml", "aurora")
    with torch.device("meta"):
        model = train_gpt.GPT(config.model)
    model.activation_dtype = activation_dtype
    optimizers = build_optimizers(config, model.roles())
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    GradientSum(model.parameters(), optimizers, activation_dtype, world_size=8).finish()
    optimizers[0].step()
    return sum(sent.values())


def test_bytes_sent_by_each_of_eight_ranks_in_a_step_of_gpt2_small(eight_ranks):
    """An all-reduce of gradients and an all-gather of matrices in float32 would send 7/8 (162.45 x 8 + 84.93 x 4)."""
    matrices, others = 84.93, 77.52  # millions of weights
    expected_mb = 7 / 8 * (matrices * (2 + 4) + others * (2 + 2))
    total = bytes_of_a_step(torch.bfloat16, eight_ranks)
    assert total / 1e6 == pytest.approx(expected_mb, rel=0.001) and total / 1e6 < 800


def test_float32_activations_keep_gradients_in_float32_on_the_wire(eight_ranks):
    total = bytes_of_a_step(torch.float32, eight_ranks)
    assert total / 1e6 == pytest.approx(7 / 8 * (84.93 * (4 + 4) + 77.52 * (4 + 4)), rel=0.001)
