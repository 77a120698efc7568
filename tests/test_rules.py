"""Each update rule against its float64 oracle, and the optimizers as torch.optim.Optimizers."""

import copy
import functools

import pytest
import torch

import aurora
from aurora.polar import SCHEDULES, polar
from tests import reference

RULES = {"Muon": aurora.Muon, "NorMuon": aurora.NorMuon, "UNorMuon": aurora.UNorMuon, "Aurora": aurora.Aurora}
SHAPES = {"tall": (48, 16), "wide": (16, 48), "square": (24, 24)}


def gradients(shape, kind, count):
    generator = torch.Generator().manual_seed(7)
    grads = []
    for _ in range(count):
        if kind == "well conditioned":
            Q, _ = torch.linalg.qr(torch.randn(max(shape), min(shape), generator=generator))
            G = Q * torch.logspace(0, -1, min(shape))
            grads.append(G if shape[0] >= shape[1] else G.T)
            continue
        G = torch.randn(shape, generator=generator) * torch.logspace(0, -1, shape[0])[:, None]
        if kind == "rank-1":
            G = torch.outer(G[:, 0], G[0])
        elif kind == "zero":
            G = torch.zeros(shape)
        elif kind == "zero rows":
            G[::5] = 0
        elif kind == "tiny":
            G = G * 1e-10
        grads.append(G)
    return grads


def optimize(rule, W, grads, **hparams):
    p = torch.nn.Parameter(W.clone())
    optimizer = RULES[rule]([("w", p)], **hparams)
    for G in grads:
        p.grad = G.to(p.dtype)
        optimizer.step()
    return p.detach()


@pytest.mark.parametrize("kind", ["random", "rank-1", "zero", "zero rows", "tiny"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("rule", RULES)
def test_rule_with_exact_polar_equals_oracle_over_five_steps(rule, shape, kind):
    torch.manual_seed(0)
    # Momentum of five rank-1 gradients has singular values at the edge of what float32 resolves.
    W, grads = torch.randn(shape), gradients(shape, kind, 1 if kind == "rank-1" else 5)
    expected = reference.optimize(rule, W, grads, reference.svd_polar, lr=0.1, weight_decay=0.1)
    result = optimize(rule, W, grads, lr=0.1, weight_decay=0.1, polar_schedule="svd")
    torch.testing.assert_close(result.double(), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "svd"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("rule", RULES)
def test_rule_with_polynomial_equals_oracle_with_the_same_polynomial(rule, shape, schedule):
    torch.manual_seed(0)
    W, grads = torch.randn(shape), gradients(shape, "random", 5)
    numbers = SCHEDULES[schedule]
    exact = functools.partial(
        reference.polynomial_polar, coefficients=numbers.coefficients, norm_margin=numbers.norm_margin
    )
    expected = reference.optimize(rule, W, grads, exact, lr=0.1, weight_decay=0.1)
    result = optimize(rule, W, grads, lr=0.1, weight_decay=0.1, polar_schedule=schedule)
    torch.testing.assert_close(result.double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["well conditioned", "rank-1", "zero"])
@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "svd"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("rule", ["Muon", "Aurora"])
def test_one_update_is_within_the_schedules_error_of_the_svd_update(rule, shape, schedule, kind):
    """Aurora's first pass shifts its row weights by up to the schedule's error, so it is granted twice that."""
    grads = gradients(shape, kind, 1)
    W = torch.zeros(shape)
    exact = reference.optimize(rule, W, grads, reference.svd_polar, lr=1.0, weight_decay=0.0)
    result = optimize(rule, W, grads, lr=1.0, weight_decay=0.0, polar_schedule=schedule)
    scale = max(1.0, shape[0] / shape[1]) ** 0.5
    passes = 1 if rule == "Muon" or shape[0] == shape[1] else 2
    error = torch.linalg.matrix_norm(result.double() - exact, 2) / scale
    assert error <= passes * SCHEDULES[schedule].max_error + 1e-3


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_muon_equals_torch_muon_at_equal_coefficients(shape):
    """torch's Muon runs its polynomials in bfloat16; so do we here."""
    torch.manual_seed(0)
    W, grads = torch.randn(shape), gradients(shape, "random", 3)
    theirs = torch.nn.Parameter(W.clone())
    # The defaults of torch.optim.Muon: the quintic of ns5_jordan, five steps; "original" is our aspect scale.
    peer = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, momentum=0.95, adjust_lr_fn="original")
    for G in grads:
        theirs.grad = G
        peer.step()
    hparams = dict(lr=0.1, weight_decay=0.1, polar_schedule="ns5_jordan", polar_dtype="bfloat16")
    # Three updates of 0.1 * sqrt(3), each to within a few units of bfloat16's 2^-8.
    atol = 3 * 0.1 * 3**0.5 * 2**-6
    torch.testing.assert_close(optimize("Muon", W, grads, **hparams), theirs.detach(), atol=atol, rtol=0)


def test_aurora_update_has_uniform_rows_where_muon_starves_some():
    X = gradients((64, 16), "random", 1)[0][None]
    group = dict(polar_schedule="svd", polar_dtype="auto", balance_steps=8, balance_power=0.5)
    uniform = (16 / 64) ** 0.5
    optimizer = aurora.Aurora([torch.nn.Parameter(torch.zeros(64, 16))], lr=0.1)
    balanced = optimizer.direction(X, [{}], group)[0].norm(dim=1) / uniform
    plain = polar(X, SCHEDULES["svd"])[0].norm(dim=1) / uniform
    assert (balanced - 1).abs().max() < 0.01 < 0.3 < (plain - 1).abs().max()


@pytest.mark.parametrize("rule", RULES)
def test_same_shape_matrices_in_one_stack_are_updated_as_if_alone(rule):
    torch.manual_seed(0)
    weights = [torch.randn(shape) for shape in [(48, 16), (16, 48), (48, 16), (24, 24)]]
    grads = [gradients(w.shape, "random", 2) for w in weights]
    together = [torch.nn.Parameter(w.clone()) for w in weights]
    optimizer = RULES[rule](together, lr=0.1)
    for step in range(2):
        for p, per_step in zip(together, grads, strict=True):
            p.grad = per_step[step]
        optimizer.step()
    for p, w, per_step in zip(together, weights, grads, strict=True):
        torch.testing.assert_close(p.detach(), optimize(rule, w, per_step, lr=0.1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("rule", RULES)
def test_bfloat16_weights_keep_float32_state(rule):
    torch.manual_seed(0)
    W, grads = torch.randn(48, 16), gradients((48, 16), "random", 3)
    p = torch.nn.Parameter(W.bfloat16())
    optimizer = RULES[rule]([p], lr=0.1)
    for G in grads:
        p.grad = G.bfloat16()
        optimizer.step()
    assert optimizer.state[p]["momentum_buffer"].dtype == torch.float32
    restored = RULES[rule]([p], lr=0.1)
    restored.load_state_dict(optimizer.state_dict())
    assert torch.equal(restored.state[p]["momentum_buffer"], optimizer.state[p]["momentum_buffer"])
    torch.testing.assert_close(p.detach().float(), optimize(rule, W, grads, lr=0.1), atol=0.05, rtol=0)


@pytest.mark.parametrize("rule", RULES)
def test_state_dict_continues_bit_for_bit_and_a_copy_does_too(rule):
    torch.manual_seed(0)
    W, grads = torch.randn(48, 16), gradients((48, 16), "random", 6)
    p = torch.nn.Parameter(W.clone())
    first = RULES[rule]([("w", p)], lr=0.1)
    for G in grads[:3]:
        p.grad = G
        first.step()
    q = torch.nn.Parameter(p.detach().clone())
    second = RULES[rule]([("w", q)], lr=0.5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for G in grads[3:]:
        q.grad = G
        second.step()
    assert torch.equal(q.detach(), optimize(rule, W, grads, lr=0.1))
    copied = copy.deepcopy(first)
    (r,) = copied.param_groups[0]["params"]
    for G in grads[3:]:
        r.grad = G
        copied.step()
    assert torch.equal(r.detach(), q.detach())


def test_load_state_dict_refuses_another_rule_names_or_shapes():
    def stepped(rule, name, shape):
        p = torch.nn.Parameter(torch.randn(shape))
        optimizer = rule([(name, p)], lr=0.1)
        p.grad = torch.randn(shape)
        optimizer.step()
        return optimizer

    state = stepped(aurora.Muon, "a", (8, 4)).state_dict()
    with pytest.raises(ValueError, match="rule 'Muon' cannot be loaded into Aurora"):
        stepped(aurora.Aurora, "a", (8, 4)).load_state_dict(state)
    with pytest.raises(ValueError, match=r"\['a'\].*\['b'\]"):
        stepped(aurora.Muon, "b", (8, 4)).load_state_dict(state)
    with pytest.raises(ValueError, match=r"\(8, 4\).*\(4, 8\)"):
        stepped(aurora.Muon, "a", (4, 8)).load_state_dict(state)


@pytest.mark.parametrize(
    "hparams, message",
    [
        (dict(lr=-1.0), "lr must be at least 0, got -1.0"),
        (dict(lr=0.1, momentum=1.0), r"momentum must be in \[0, 1\), got 1.0"),
        (dict(lr=0.1, polar_schedule="ns9"), "polar_schedule must be one of ns5_jordan"),
        (dict(lr=0.1, balance_steps=0), "balance_steps must be at least 1"),
        (dict(lr=0.1, balance_power=0.0), "balance_power must be in"),
    ],
)
def test_constructor_names_the_bad_value(hparams, message):
    with pytest.raises(ValueError, match=message):
        aurora.Aurora([torch.nn.Parameter(torch.zeros(4, 2))], **hparams)


def test_constructor_refuses_unknown_arguments_and_vectors():
    with pytest.raises(TypeError, match="momentun"):
        aurora.Muon([torch.nn.Parameter(torch.zeros(4, 2))], lr=0.1, momentun=0.9)
    with pytest.raises(ValueError, match=r"bias is a Tensor of shape \(4,\).*give it to AdamW"):
        aurora.Muon([("bias", torch.nn.Parameter(torch.zeros(4)))], lr=0.1)


@pytest.mark.parametrize("balance_steps, balance_power", [(2, 0.5), (8, 0.5), (5, 1.0)])
def test_aurora_keeps_zero_rows_zero_however_often_it_rebalances(balance_steps, balance_power):
    grads = gradients((48, 16), "zero rows", 2)
    hparams = dict(lr=1.0, balance_steps=balance_steps, balance_power=balance_power)
    change = optimize("Aurora", torch.zeros(48, 16), grads, **hparams)
    assert change.isfinite().all() and not change[::5].any() and change[1].norm() > 0.1


def test_parameters_without_gradient_are_left_alone_and_closures_work():
    p, q = torch.nn.Parameter(torch.ones(4, 2)), torch.nn.Parameter(torch.ones(4, 2))
    optimizer = aurora.Muon([p, q], lr=0.1, weight_decay=0.1)

    def closure():
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 8
    assert torch.equal(q, torch.ones(4, 2)) and not torch.equal(p, torch.ones(4, 2))
    assert q not in optimizer.state
