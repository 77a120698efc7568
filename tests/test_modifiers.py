"""hyperball, cautious_decay and update_floor with any rule, against their published forms in float64."""

import copy
import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import aurora
from tests import reference
from tests.conftest import often
from tests.test_param_group_options import VIEWED
from tests.test_rules import SHAPES, gradients, make

STEPS = 20
LR = 0.1
MODIFIERS = {
    "hyperball": dict(hyperball=True),
    "cautious": dict(cautious_decay=True, weight_decay=0.1),
    "floor": dict(update_floor=0.35),
    "hyperball, cautious": dict(hyperball=True, cautious_decay=True, weight_decay=0.1),
    "floor, cautious": dict(update_floor=0.35, cautious_decay=True, weight_decay=0.1),
    "floor, decay": dict(update_floor=0.35, weight_decay=0.1),
}
RULES = ("muon", "normuon", "aurora folded")


def moved(W, U, hyperball=False, cautious_decay=False, update_floor=0.0, weight_decay=0.0, lr=LR):
    """One matrix after a step, as the papers and the benchmark's records have it."""
    if U.norm() / W.norm() < update_floor:
        U = U * update_floor * W.norm() / U.norm()
    if hyperball:
        U = U * W.norm() / U.norm()
    mask = (U * W >= 0).double() if cautious_decay else 1.0
    new = W - lr * (U + weight_decay * mask * W)
    return new / new.norm() * W.norm() if hyperball else new


def oracle(rule, W, grads, options):
    W, B, state = W.double(), torch.zeros_like(W, dtype=torch.float64), {"max_error": 0.0}
    for G in grads:
        B = 0.95 * B + 0.05 * G.double()
        U = reference.RULES[rule](0.05 * G.double() + 0.95 * B, state, reference.svd_polar)
        W = moved(W, U * max(1, W.shape[0] / W.shape[1]) ** 0.5, **options)
    return W


def starts(shape, size):
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(3))


# Weights that are small beside an update are above the floor, large ones below it.
SIZES = [often(0.1, False), 1.0]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", MODIFIERS)
@pytest.mark.parametrize("rule", RULES)
def test_modified_steps_equal_the_published_ones(rule, kind, shape, size):
    W, grads = starts(shape, size), gradients(shape, "random", STEPS)
    p = torch.nn.Parameter(W.clone())
    optimizer = make(rule, [p], lr=LR, polar_schedule="svd", **MODIFIERS[kind])
    for p.grad in grads:
        optimizer.step()
    torch.testing.assert_close(p.detach().double(), oracle(rule, W, grads, MODIFIERS[kind]), atol=1e-4, rtol=0)
    plain = torch.nn.Parameter(W.clone())
    optimizer = make(rule, [plain], lr=LR, weight_decay=MODIFIERS[kind].get("weight_decay", 0.0), polar_schedule="svd")
    for plain.grad in grads:
        optimizer.step()
    is_above_floor = size < 1 and "floor" in kind and "cautious" not in kind
    assert ((plain - p).abs().max() > 1e-3) != is_above_floor, "the modifier does something, or has nothing to do"


@pytest.mark.parametrize("kind", MODIFIERS)
def test_parts_are_modified_one_by_one(kind):
    for shape, options, matrices in VIEWED.values():
        p = torch.nn.Parameter(starts(shape, 3.0))
        own = [torch.nn.Parameter(part.clone()) for part in matrices(p.detach())]
        groups = ([dict(params=[p], **options)], own)
        optimizers = [make("normuon", group, lr=LR, **MODIFIERS[kind]) for group in groups]
        for number in range(3):
            p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(number))
            for q, grad in zip(own, matrices(p.grad), strict=True):
                q.grad = grad.clone()
            for optimizer in optimizers:
                optimizer.step()
        for q, part in zip(own, matrices(p.detach()), strict=True):
            torch.testing.assert_close(part, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_on_the_ball_keeps_its_norm_over_many_steps(dtype):
    p = torch.nn.Parameter(starts((48, 16), 1.0).to(dtype))
    before = p.detach().double().norm()
    optimizer = make("muon", [p], lr=0.02, hyperball=True)
    for number in range(300):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(number)).to(dtype)
        optimizer.step()
    error = (p.detach().double().norm() / before - 1).abs()
    assert error < (1e-5 if dtype == torch.float32 else 1e-2)


def test_settings_out_of_range_are_refused_by_name():
    p = torch.nn.Parameter(torch.ones(4, 2))
    with pytest.raises(ValueError, match="update_floor must be at least 0, got -1"):
        aurora.Muon([p], lr=0.1, update_floor=-1)
    with pytest.raises(ValueError, match="update_floor must be 0 with hyperball, which makes that ratio 1, got 0.3"):
        aurora.Muon([p], lr=0.1, update_floor=0.3, hyperball=True)
    zero = dict(params=[("up", torch.nn.Parameter(torch.cat([torch.ones(4, 2), torch.zeros(4, 2)])))], split=(4, 4))
    with pytest.raises(ValueError, match=r"hyperball keeps norms, but up of shape \(8, 2\) has one of 0; start"):
        aurora.Muon([zero], lr=0.1, hyperball=True)
    aurora.Muon([zero], lr=0.1)


def test_zero_weights_and_zero_gradients_stay_finite():
    for options in MODIFIERS.values():
        p = torch.nn.Parameter(torch.ones(4, 2))
        optimizer = make("muon", [p], lr=0.1, **options)
        with torch.no_grad():
            p.zero_()
        for p.grad in (torch.zeros(4, 2), torch.ones(4, 2)):
            optimizer.step()
        assert p.isfinite().all() and not optimizer.found_non_finite


COMPILED = ("hyperball, cautious", True)


@pytest.mark.parametrize(
    "kind, as_tensor", [often(case, case == COMPILED) for case in itertools.product(MODIFIERS, (False, True))]
)
def test_compiled_steps_follow_schedules_of_lr_and_momentum(kind, as_tensor):
    """Whose new values may be floats, or be written into tensors: then nothing is compiled again."""
    torch._dynamo.reset()
    options = dict(MODIFIERS[kind], weight_decay=0.1, polar_schedule="ns5_jordan")
    params = [torch.nn.Parameter(starts((16, 8), size)) for size in (1.0, 2.0)]
    copies = copy.deepcopy(params)
    eager, compiled = (make("muon", each, **options) for each in (params, copies))
    if as_tensor:
        compiled.param_groups[0].update(lr=torch.tensor(0.1), momentum=torch.tensor(0.95))
    counter = CompileCounter()
    step, counts = torch.compile(compiled.step, backend=counter), []
    for number in range(6):
        values = dict(lr=0.1 * (1 - number / 10), momentum=0.85 + 0.02 * number)
        eager.param_groups[0].update(values)
        for key, value in values.items():
            if as_tensor:
                compiled.param_groups[0][key].fill_(value)
            else:
                compiled.param_groups[0][key] = value
        for p, q in zip(params, copies, strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
            q.grad = p.grad.clone()
        eager.step(), step()
        counts.append(counter.frame_count)
        for p, q in zip(params, copies, strict=True):
            torch.testing.assert_close(p, q, atol=1e-5, rtol=0)
    assert counts[-1] == counts[1 if as_tensor else 3], counts
