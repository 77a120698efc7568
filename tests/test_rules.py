"""Each update rule against its float64 oracle, and the optimizers as torch.optim.Optimizers."""

import copy
import functools
import itertools

import pytest
import torch

import aurora
from aurora.optim.polar import FINISH, FINISH_ERROR, INTERLUDE_GROWTH, SCHEDULES, polar, rounding
from tests import reference
from tests.conftest import often

RULES = {
    **{name: (aurora.find_rule(name), {}) for name in ("muon", "normuon", "unormuon")},
    **{f"aurora {variant}": (aurora.Aurora, {"variant": variant}) for variant in aurora.VARIANTS},
    "aurora tall": (aurora.Aurora, {"balance": "tall"}),
    # Enough conjugate gradient steps to solve for the multipliers.
    "riemannian_aurora": (aurora.RiemannianAurora, {"cg_steps": 60}),
}
SHAPES = {"tall": (48, 16), "wide": (16, 48), "square": (24, 24)}
OFTEN_SHAPES = [
    pytest.param(shape, id=name, marks=[pytest.mark.slow] if name == "square" else []) for name, shape in SHAPES.items()
]
STEPS = 20
POLYNOMIALS = [name for name in SCHEDULES if name != "svd"]


def gradients(shape, kind, count):
    generator = torch.Generator().manual_seed(7)
    rows = torch.logspace(0, -1, shape[0])[:, None]
    direction = torch.outer(*(torch.randn(size, generator=generator) for size in shape))
    orthogonal = torch.linalg.qr(torch.randn(max(shape), min(shape), generator=generator))[0]
    orthogonal = orthogonal * torch.logspace(0, -1, min(shape))
    orthogonal = orthogonal if shape[0] >= shape[1] else orthogonal.T
    grads = []
    for _ in range(count):
        G = torch.randn(shape, generator=generator) * rows
        if kind.startswith("well conditioned"):  # sums of different ones would not be
            G = orthogonal * torch.rand((), generator=generator)
        elif kind == "rank-1":  # sums of different ones would have a higher rank
            G = direction * torch.rand((), generator=generator)
        elif kind == "zero":
            G = torch.zeros(shape)
        if kind.endswith("zero rows"):
            G[::5] = 0
        if kind.endswith("tiny"):
            G = G * 1e-10
        grads.append(G)
    return grads


def make(rule, params, **hparams):
    """The optimizer, in float32 whatever the machine is faster in."""
    cls, rule_hparams = RULES[rule]
    return cls(params, **dict(lr=0.1, polar_dtype="float32") | rule_hparams | hparams)


def optimize(rule, W, grads, **hparams):
    p = torch.nn.Parameter(W.clone())
    optimizer = make(rule, [("w", p)], **hparams)
    for G in grads:
        p.grad = G.to(p.dtype)
        optimizer.step()
    assert not optimizer.found_non_finite
    return p.detach()


KINDS = ["random", "rank-1", "zero", "zero rows", "tiny"]
# The ascent takes as long as all other rules together.
SELDOM = ("riemannian_aurora", "aurora warm", "aurora refined", "aurora tall")
EXACT_CASES = [often((rule, kind), rule not in SELDOM or kind == "random") for rule in RULES for kind in KINDS]


@pytest.mark.parametrize("rule, kind", EXACT_CASES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_rule_with_exact_polar_equals_oracle_over_twenty_steps(rule, shape, kind):
    torch.manual_seed(0)
    W, grads = torch.randn(shape), gradients(shape, kind, STEPS)
    expected = reference.optimize(rule, W, grads, reference.svd_polar, lr=0.1, weight_decay=0.1)
    result = optimize(rule, W, grads, weight_decay=0.1, polar_schedule="svd")
    torch.testing.assert_close(result.double(), expected, atol=1e-4, rtol=0)
    if rule == "riemannian_aurora":
        return
    # bfloat16 weights are rounded twice a step, after decay and update, to 2^-9 of their size.
    rounding = 2 * STEPS * 2**-9 * expected.abs().max().clamp(min=W.abs().max()).item()
    result = optimize(rule, W.bfloat16(), [G.bfloat16() for G in grads], weight_decay=0.1, polar_schedule="svd")
    grads = [G.bfloat16().float() for G in grads]
    expected = reference.optimize(rule, W.bfloat16(), grads, reference.svd_polar, lr=0.1, weight_decay=0.1)
    torch.testing.assert_close(result.double(), expected, atol=rounding, rtol=0)


@pytest.mark.parametrize("schedule", [often(name, name != "ns5_jordan") for name in POLYNOMIALS])
@pytest.mark.parametrize("shape", OFTEN_SHAPES)
@pytest.mark.parametrize("rule", [often(rule, rule not in SELDOM) for rule in RULES])
def test_rule_with_polynomial_equals_oracle_with_the_same_polynomial(rule, shape, schedule):
    torch.manual_seed(0)
    W, grads = torch.randn(shape), gradients(shape, "random", STEPS)
    numbers = SCHEDULES[schedule]
    exact = functools.partial(
        reference.polynomial_polar, coefficients=numbers.coefficients, norm_margin=numbers.norm_margin
    )
    max_error = numbers.max_error + rounding(torch.float32)
    expected = reference.optimize(rule, W, grads, exact, lr=0.1, weight_decay=0.1, max_error=max_error)
    result = optimize(rule, W, grads, weight_decay=0.1, polar_schedule=schedule)
    torch.testing.assert_close(result.double(), expected, atol=1e-3, rtol=0)


GOOD_KINDS = ["well conditioned", "well conditioned, zero rows", "well conditioned, tiny", "zero"]
ERROR_CASES = [
    *(
        (rule, kind, dtype)
        for rule in RULES
        for kind in GOOD_KINDS
        for dtype in ("float32", "bfloat16")
        if rule != "riemannian_aurora"
    ),
    # Ten times as slow as all others together: the ascent scales its input, so one kind will do.
    *(("riemannian_aurora", "well conditioned", dtype) for dtype in ("float32", "bfloat16")),
    # Rounding to bfloat16, and Riemannian Aurora's ascent, give the zero singular values of a rank-1 matrix a size,
    # which only an exact polar factor takes for directions.
    *((rule, "rank-1", "float32") for rule in RULES if rule != "riemannian_aurora"),
]
ERROR_CASES = [often(case, "float32" in case or GOOD_KINDS[0] in case) for case in ERROR_CASES]


@pytest.mark.parametrize("rule, kind, dtype", ERROR_CASES)
@pytest.mark.parametrize("schedule", [often(name, name == "polar_express5") for name in POLYNOMIALS])
@pytest.mark.parametrize("shape", OFTEN_SHAPES)
def test_every_update_is_within_the_schedules_error_of_the_svd_update(shape, schedule, rule, kind, dtype):
    """In the mean over twenty steps. Rules that look at the rows of a polar factor are granted its error twice."""
    dtype = getattr(torch, dtype)
    grads = [G.to(dtype) for G in gradients(shape, kind, STEPS)]
    W = torch.zeros(shape, dtype=dtype)
    exact = reference.optimize(rule, W, [G.float() for G in grads], reference.svd_polar, lr=1.0, weight_decay=0.0)
    result = optimize(rule, W, grads, lr=1.0, weight_decay=0.0, polar_schedule=schedule)
    scale = max(1.0, shape[0] / shape[1]) ** 0.5
    error = torch.linalg.matrix_norm(result.double() - exact, 2) / scale / STEPS
    rounding = 1e-3 if dtype == torch.float32 else 0.02  # of the weights, which grow to the length of twenty updates
    assert error <= (1 if rule == "muon" else 2) * SCHEDULES[schedule].max_error + rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_unormuon_is_normuon_with_smaller_steps_on_tall_matrices(shape, dtype):
    W, grads = torch.zeros(shape, dtype=dtype), gradients(shape, "random", STEPS)
    factor = min(1.0, shape[1] / shape[0]) ** 0.5
    normuon, unormuon = (optimize(rule, W, grads) for rule in ("normuon", "unormuon"))
    if factor == 1:
        assert torch.equal(unormuon, normuon)
    else:
        atol = 1e-6 if dtype == torch.float32 else STEPS * 2**-9 * normuon.abs().max().item()
        torch.testing.assert_close(unormuon, factor * normuon, atol=atol, rtol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e25])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("rule", RULES)
def test_non_finite_gradients_raise_the_flag_and_it_stays_up(rule, shape, bad):
    p = torch.nn.Parameter(torch.zeros(shape))
    optimizer = make(rule, [p])
    good, poisoned = gradients(shape, "random", 2)
    p.grad = good
    optimizer.step()
    assert not optimizer.found_non_finite
    poisoned[3, 3] = bad
    for p.grad in (poisoned, good):
        optimizer.step()
        assert optimizer.found_non_finite and not p.isfinite().all()


@pytest.mark.parametrize("shape", [(256, 64), (64, 256)], ids=["tall", "wide"])
@pytest.mark.parametrize("variant", ["folded", "refined"])
def test_aurora_variants_keep_rows_even_and_nearly_orthogonal(variant, shape):
    """Momentum with rows over two decades: Muon's update has rows 50 % off."""
    grads = [G * torch.logspace(0, -1, max(shape)).view(-1, 1)[torch.randperm(max(shape))] for G in
             gradients((max(shape), min(shape)), "random", STEPS)]  # fmt: skip
    grads = grads if shape[0] > shape[1] else [G.T for G in grads]
    p = torch.nn.Parameter(torch.zeros(shape))
    optimizer = make(f"aurora {variant}", [p])
    for p.grad in grads:
        optimizer.step()
    (group,) = optimizer.param_groups
    X_KMN = optimizer.lookahead([p], group)
    U = optimizer.direction(X_KMN, [optimizer.state[p]], group)[0]
    plain = polar(X_KMN, SCHEDULES["polar_express5"])[0]
    U, plain = (V if shape[0] > shape[1] else V.T for V in (U, plain))

    def orthogonality_error(V):
        return (V.T @ V - torch.eye(64)).norm()

    assert (U.norm(dim=1) / (64 / 256) ** 0.5 - 1).abs().max() < 1e-4
    assert orthogonality_error(U) < 1.25 * orthogonality_error(plain)
    assert optimizer.state[p]["row_weight"].shape == (256, 1)


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "svd"])
def test_singular_values_survive_the_worst_that_the_folded_balance_can_do(schedule):
    """The largest that the head of a schedule lets out, grown as much as the balance may, must still come to rest."""
    numbers = SCHEDULES[schedule]
    is_coarse = numbers.max_error > FINISH_ERROR
    body = numbers.coefficients[: -1 if is_coarse else -2]
    largest = 1 / numbers.norm_margin
    for steps in (body[:-2], body[-2:]):
        s = torch.linspace(0, largest, 100_001, dtype=torch.float64)
        for a, b, c in steps:
            s = a * s + b * s**3 + c * s**5
        assert s.min() >= 0
        largest = INTERLUDE_GROWTH * s.max().item()
    s = torch.linspace(0, largest, 100_001, dtype=torch.float64)
    if is_coarse:
        s = sum(coefficient * s ** (2 * k + 1) for k, coefficient in enumerate(FINISH))
        assert s.min() >= 0 and s.max() <= 1 + FINISH_ERROR
        return
    for a, b, c in numbers.coefficients[-2:]:
        s = a * s + b * s**3 + c * s**5
        assert s.min() >= 0 and s.max() <= 1.01


def row_alone_in_its_direction():
    """Row 0 spans column 0 by itself: its leverage is 1 whatever its weight."""
    X = torch.randn(48, 16, generator=torch.Generator().manual_seed(1))
    X[1:, 0] = 0
    X[0] = 0
    X[0, 0] = 1
    return X


def collinear_rows():
    X = torch.randn(48, 16, generator=torch.Generator().manual_seed(2))
    X[8:] = X[8] * torch.linspace(1, 2, 40)[:, None]
    return X


@pytest.mark.parametrize("matrix", [row_alone_in_its_direction, collinear_rows])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_aurora_stays_bounded_where_rows_cannot_be_balanced(matrix, dtype):
    X = matrix()
    p = torch.nn.Parameter(torch.zeros(48, 16))
    optimizer = make("aurora folded", [p], polar_dtype=dtype)
    state = optimizer.new_state(p, optimizer.param_groups[0])
    for _ in range(50):
        U = optimizer.direction(X[None], [state], optimizer.param_groups[0])[0]
    # Scaling rows to equal norm can at worst put all of them into one direction: ||U||_F = sqrt(N) = 4.
    assert torch.linalg.matrix_norm(U, 2) < 4
    assert state["row_weight"].min() >= 1 / 64 and state["row_weight"].max() <= 64


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
    torch.testing.assert_close(optimize("muon", W, grads, **hparams), theirs.detach(), atol=atol, rtol=0)


def test_aurora_iterates_to_uniform_rows_where_muon_starves_some():
    X = gradients((64, 16), "random", 1)[0][None]
    uniform = (16 / 64) ** 0.5
    hparams = dict(polar_schedule="svd", balance_steps=8)
    optimizer = make("aurora iterated", [torch.nn.Parameter(torch.zeros(64, 16))], **hparams)
    balanced = optimizer.direction(X, [{}], optimizer.param_groups[0])[0].norm(dim=1) / uniform
    plain = polar(X, SCHEDULES["svd"])[0].norm(dim=1) / uniform
    assert (balanced - 1).abs().max() < 0.01 < 0.3 < (plain - 1).abs().max()


@pytest.mark.parametrize("rule", RULES)
def test_same_shape_matrices_in_one_stack_are_updated_as_if_alone(rule):
    torch.manual_seed(0)
    weights = [torch.randn(shape) for shape in [(48, 16), (16, 48), (48, 16), (24, 24)]]
    grads = [gradients(w.shape, "random", 2) for w in weights]
    together = [torch.nn.Parameter(w.clone()) for w in weights]
    optimizer = make(rule, together)
    for step in range(2):
        for p, per_step in zip(together, grads, strict=True):
            p.grad = per_step[step]
        optimizer.step()
    for p, w, per_step in zip(together, weights, grads, strict=True):
        torch.testing.assert_close(p.detach(), optimize(rule, w, per_step, lr=0.1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("rule", RULES)
def test_bfloat16_weights_keep_float32_state(rule):
    p = torch.nn.Parameter(torch.randn(48, 16).bfloat16())
    optimizer = make(rule, [p])
    p.grad = torch.randn(48, 16).bfloat16()
    optimizer.step()
    assert all(value.dtype == torch.float32 for value in optimizer.state[p].values())
    restored = make(rule, [p])
    restored.load_state_dict(optimizer.state_dict())
    for key, value in optimizer.state[p].items():
        assert torch.equal(restored.state[p][key], value)


@pytest.mark.parametrize("rule", RULES)
def test_state_dict_continues_bit_for_bit_and_a_copy_does_too(rule):
    torch.manual_seed(0)
    W, grads = torch.randn(48, 16), gradients((48, 16), "random", 6)
    p = torch.nn.Parameter(W.clone())
    first = make(rule, [("w", p)])
    for G in grads[:3]:
        p.grad = G
        first.step()
    q = torch.nn.Parameter(p.detach().clone())
    second = make(rule, [("w", q)], lr=0.5)
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


def test_load_state_dict_refuses_another_rule_names_shapes_or_dtypes_by_name():
    def stepped(rule, name, shape):
        p = torch.nn.Parameter(torch.randn(shape))
        optimizer = make(rule, [(name, p)])
        p.grad = torch.randn(shape)
        optimizer.step()
        return optimizer

    state = stepped("muon", "a", (8, 4)).state_dict()
    with pytest.raises(ValueError, match="state of Muon cannot be loaded into Aurora"):
        stepped("aurora folded", "a", (8, 4)).load_state_dict(state)
    with pytest.raises(ValueError, match=r"\['a'\].*\['b'\]"):
        stepped("muon", "b", (8, 4)).load_state_dict(state)
    with pytest.raises(ValueError, match=r"state of a is .*\(8, 4\).*\(4, 8\)"):
        stepped("muon", "a", (4, 8)).load_state_dict(state)
    state["state"][0]["momentum_buffer"] = state["state"][0]["momentum_buffer"].bfloat16()
    with pytest.raises(ValueError, match="state of a is .*bfloat16.*float32"):
        stepped("muon", "a", (8, 4)).load_state_dict(state)
    state = stepped("aurora iterated", "a", (8, 4)).state_dict()
    loaded = stepped("aurora warm", "a", (8, 4))
    loaded.load_state_dict(state)
    assert loaded.param_groups[0]["variant"] == "iterated", "saved settings win, as in torch"
    state["param_groups"][0]["variant"] = "warm"
    with pytest.raises(ValueError, match="state of a is .*Aurora keeps .*row_weight"):
        stepped("aurora iterated", "a", (8, 4)).load_state_dict(state)
    state["param_groups"][0]["polar_schedule"] = "ns9"
    with pytest.raises(ValueError, match="polar_schedule must be one of .*, got 'ns9'"):
        stepped("aurora iterated", "a", (8, 4)).load_state_dict(state)
    with pytest.raises(ValueError, match=r"groups of \[1\] parameters, this optimizer of \[2\]"):
        make("muon", [torch.nn.Parameter(torch.ones(8, 4)) for _ in range(2)]).load_state_dict(state)
    state = stepped("muon", "a", (8, 4)).state_dict()
    state["state"][7] = state["state"][0]
    with pytest.raises(ValueError, match="state of parameter number 7, but there are 1"):
        stepped("muon", "a", (8, 4)).load_state_dict(state)


@pytest.mark.parametrize(
    "hparams, message",
    [
        (dict(lr=-1.0), "lr must be at least 0, got -1.0"),
        (dict(lr=0.1, momentum=1.0), r"momentum must be in \[0, 1\), got 1.0"),
        (dict(lr=0.1, polar_schedule="ns9"), "polar_schedule must be one of ns5_jordan"),
        (dict(lr=0.1, variant="cold"), "variant must be one of folded, warm, refined, iterated, got 'cold'"),
        (dict(lr=0.1, balance_steps=0), "balance_steps must be at least 1"),
        (dict(lr=0.1, balance_power=0.0), "balance_power must be in"),
        (dict(lr=0.1, balance="wide"), "balance must be one of both, tall, got 'wide'"),
    ],
)
def test_constructor_names_the_bad_value(hparams, message):
    with pytest.raises(ValueError, match=message):
        aurora.Aurora([torch.nn.Parameter(torch.zeros(4, 2))], **hparams)


def test_constructor_refuses_unknown_arguments_and_vectors():
    with pytest.raises(TypeError, match="momentun"):
        aurora.Muon([torch.nn.Parameter(torch.zeros(4, 2))], lr=0.1, momentun=0.9)
    with pytest.raises(TypeError, match="Muon has no argument 'ns_steps'; use polar_schedule"):
        aurora.Muon([torch.nn.Parameter(torch.zeros(4, 2))], lr=0.1, ns_steps=5)
    with pytest.raises(ValueError, match=r"bias is a Tensor of shape \(4,\).*algorithm = \"adamw\""):
        aurora.Muon([("bias", torch.nn.Parameter(torch.zeros(4)))], lr=0.1)


@pytest.mark.parametrize("balance_steps, balance_power", [(2, 0.5), (8, 0.5), (5, 1.0)])
def test_aurora_keeps_zero_rows_zero_however_often_it_rebalances(balance_steps, balance_power):
    grads = gradients((48, 16), "zero rows", 2)
    hparams = dict(lr=1.0, balance_steps=balance_steps, balance_power=balance_power)
    change = optimize("aurora iterated", torch.zeros(48, 16), grads, **hparams)
    assert change.isfinite().all() and not change[::5].any() and change[1].norm() > 0.1


@pytest.mark.parametrize("variant", aurora.VARIANTS)
def test_aurora_that_balances_the_tall_alone_gives_wide_matrices_muons_steps(variant):
    for shape, is_muons in (((16, 48), True), ((48, 16), False)):
        W, grads = torch.zeros(shape), gradients(shape, "random", 2)
        found = optimize(f"aurora {variant}", W, grads, balance="tall")
        assert torch.equal(found, optimize("muon", W, grads)) == is_muons
        assert torch.equal(found, optimize(f"aurora {variant}", W, grads)) != is_muons


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_aurora_goes_on_with_another_variant_or_balance(shape):
    """As a new optimizer that takes over the momentum, and the row weights where both variants keep some."""
    grads = gradients(shape, "random", 2)
    settings = [dict(variant=variant, balance=balance) for variant in aurora.VARIANTS for balance in ("both", "tall")]
    for before, after in itertools.permutations(settings, 2):
        p, q = (torch.nn.Parameter(torch.zeros(shape)) for _ in range(2))
        changed = make("aurora folded", [p], **before)
        p.grad = grads[0]
        changed.step()
        new = make("aurora folded", [q], **after)
        wanted = new.new_state(q, new.param_groups[0])
        new.state[q] = wanted | {key: changed.state[p][key].clone() for key in wanted.keys() & changed.state[p].keys()}
        with torch.no_grad():
            q.copy_(p)
        changed.param_groups[0].update(after)
        for optimizer, w in ((changed, p), (new, q)):
            w.grad = grads[1]
            optimizer.step()
        assert torch.equal(p, q)
        new.load_state_dict(changed.state_dict())


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
