"""The public benchmark's rules that have no name of their own in the package, against their formulas in float64."""

import copy
import math

import pytest
import torch

import aurora
from tests.conftest import BOARD_RULES
from tests.reference import svd_polar
from tests.test_bounds import random_stacks

STEPS = 20
SQUARE, ALL = [(10, 10)], [(16, 10), (10, 16), (10, 10)]
# Where one side's Gram matrix is singular, the basis of its null space is arbitrary, and so is what follows from it.
SHAPES = {rule: SQUARE if rule in ("soap", "pmuon") else ALL for rule in BOARD_RULES}
# The first gradient is diagonal in its own eigenbases: without eps what follows from the rest of it is rounding.
HPARAMS = {
    "soap": dict(eps=1e-2),
    "dynmuon": dict(turn_step=8.0, turn_width=2.0),
    "pmuon": dict(eps=1e-3),
    "shampoo": dict(every=3),
}
# With these no step hangs on the rounding of what is almost singular.
COARSE = {"soap": dict(eps=1e-2), "pmuon": dict(eps=1.0), "shampoo": dict(gram_eps=1e-2)}
POLAR = ("muon2", "pmuon", "dynmuon")


def randn(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(rule, params, **options):
    hparams = dict(lr=0.01, weight_decay=0.1, polar_dtype="float32") | HPARAMS.get(rule, {})
    return aurora.find_rule(rule)(params, **hparams | options)


def adam(grads, beta1=0.9, beta2=0.95, eps=1e-10):
    m = v = 0.0
    for t, G in enumerate(grads, start=1):
        m, v = beta1 * m + (1 - beta1) * G, beta2 * v + (1 - beta2) * G**2
        yield (m / (1 - beta1**t)) / ((v / (1 - beta2**t)) ** 0.5 + eps)


def soap(grads, beta1=0.95, beta2=0.9, eps=1e-2):
    m = v = L = R = 0.0
    P, Q = (torch.linalg.eigh(C).eigenvectors.flip(1) for C in (grads[0] @ grads[0].T, grads[0].T @ grads[0]))
    for G in grads:
        m, L, R = beta1 * m + (1 - beta1) * G, beta2 * L + (1 - beta2) * G @ G.T, beta2 * R + (1 - beta2) * G.T @ G
        v = beta2 * v + (1 - beta2) * (P.T @ G @ Q) ** 2
        yield P @ ((P.T @ m @ Q) / (v**0.5 + eps)) @ Q.T
        P, Q = torch.linalg.qr(L @ P).Q, torch.linalg.qr(R @ Q).Q


def nesterov(grads, beta=0.95):
    m = 0.0
    for G in grads:
        m = beta * m + (1 - beta) * G
        yield (1 - beta) * G + beta * m


def muon2(grads, beta2=0.95, eps=1e-15):
    v = 0.0
    for G, X in zip(grads, nesterov(grads), strict=True):
        v = beta2 * v + (1 - beta2) * G**2
        yield svd_polar(X / (v**0.5 + eps))


def pmuon(grads, beta=0.95, gamma=0.3, eps=1e-3):
    sums, bases = [0.0, 0.0], [torch.eye(size, dtype=torch.float64) for size in grads[0].shape]
    for X in nesterov(grads):
        powers = []
        for i, C in enumerate((X @ X.T, X.T @ X)):
            sums[i] = beta * sums[i] + C
            A = C + beta * sums[i] + eps * torch.eye(len(C))
            bases[i] = torch.linalg.qr(A @ bases[i]).Q
            eigenvalues = torch.diag(bases[i].T @ A @ bases[i])
            powers.append(bases[i] @ torch.diag(eigenvalues**-gamma) @ bases[i].T)
        yield svd_polar(powers[0] @ X @ powers[1])


def dynmuon(grads, turn_step=8.0, turn_width=2.0):
    for t, X in enumerate(nesterov(grads)):
        p = -0.25 + 0.5 / (1 + math.exp((t - turn_step) / turn_width))
        U, S, Vh = torch.linalg.svd(X, full_matrices=False)
        deficit = (S / S.norm()) ** 2 - 1
        series = 1 + p / 2 * deficit + p / 2 * (p / 2 - 1) / 2 * deficit**2
        yield (S.norm() / 0.05) ** p * U @ torch.diag(series) @ Vh


def psgd(grads, beta=0.95):
    m, (rows, columns) = 0.0, grads[0].shape
    size = (grads[0] ** 4).mean() ** (-1 / 32)
    P, Q = (size * torch.eye(side, dtype=torch.float64) for side in (rows, columns))

    def norm(C):
        x = C @ C[:, (C**2).sum(0).argmax()]
        return (C @ x / x.norm()).norm()

    for t, G in enumerate(grads):
        m = beta * m + (1 - beta) * G
        u = m / (1 - beta ** (t + 1))
        v, noise = torch.randn(2, rows, columns, generator=torch.Generator().manual_seed(t)).double()
        balance = (Q.abs().max() / P.abs().max()) ** 0.5
        P, Q = P * balance, Q / balance
        A = P @ (u + 2**-23 * u.abs() * noise) @ Q.T
        B = torch.linalg.inv(P).T @ v @ torch.linalg.inv(Q)
        P, Q = (T - torch.triu(C - D) @ T / norm(C + D) for T, C, D in ((P, A @ A.T, B @ B.T), (Q, A.T @ A, B.T @ B)))
        yield P.T @ P @ u @ Q.T @ Q


def shampoo(grads, beta1=0.9, beta2=0.95, every=3):
    m = L = R = 0.0

    def root(C):
        eigenvalues, Q = torch.linalg.eigh(C)
        return Q @ torch.diag((eigenvalues - min(0, eigenvalues[0]) + 1e-24) ** -0.25) @ Q.T

    for t, (G, A) in enumerate(zip(grads, adam(grads, beta1, beta2, 1e-15), strict=True), start=1):
        m, L, R = beta1 * m + (1 - beta1) * G, beta2 * L + (1 - beta2) * G @ G.T, beta2 * R + (1 - beta2) * G.T @ G
        if t % every == 0:
            left, right = root(L / (1 - beta2**t)), root(R / (1 - beta2**t))
        S = left @ m @ right if t >= every else A
        yield S * A.norm() / S.norm()


ORACLES = dict(adam=adam, soap=soap, muon2=muon2, pmuon=pmuon, dynmuon=dynmuon, psgd=psgd, shampoo=shampoo)


@pytest.mark.parametrize("rule, shape", [(rule, shape) for rule in BOARD_RULES for shape in SHAPES[rule]])
def test_rule_equals_its_oracle_over_twenty_steps(rule, shape):
    W, grads = randn(shape, 0), [randn(shape, 1 + t) for t in range(STEPS)]
    p = torch.nn.Parameter(W.clone())
    optimizer = make(rule, [p], polar_schedule="svd")
    for p.grad in grads:
        optimizer.step()
    assert not optimizer.found_non_finite
    scale = max(1, shape[0] / shape[1]) ** 0.5 if rule in POLAR else 1
    expected = W.double()
    for direction in ORACLES[rule]([G.double() for G in grads]):
        expected = expected - 0.01 * (scale * direction + 0.1 * expected)
    change = (expected - W).abs().max().item()
    torch.testing.assert_close(p.detach().double(), expected, atol=2e-3 * change, rtol=0)


def test_adam_is_torchs_adamw():
    p, q = (torch.nn.Parameter(randn((6, 4), 0)) for _ in range(2))
    ours = make("adam", [p], lr=0.01, eps=1e-8)
    theirs = torch.optim.AdamW([q], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for number in range(STEPS):
        for w, optimizer in ((p, ours), (q, theirs)):
            w.grad = randn((6, 4), number)
            optimizer.step()
    torch.testing.assert_close(p, q, atol=1e-6, rtol=0)


def test_muon_is_what_other_rules_are_without_what_they_add():
    for rule, options in (("pmuon", dict(power=0.0)), ("dynmuon", dict(start_power=0.0, end_power=0.0))):
        p, q = (torch.nn.Parameter(randn((12, 8), 0)) for _ in range(2))
        for w, optimizer in ((p, make(rule, [p], **options)), (q, make("muon", [q]))):
            for number in range(4):
                w.grad = randn((12, 8), 1 + number)
                optimizer.step()
        torch.testing.assert_close(p, q, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rule", BOARD_RULES)
def test_in_stacks_in_parts_and_resumed_it_takes_the_same_steps(rule):
    eps = COARSE.get(rule, {})
    whole = torch.nn.Parameter(randn((20, 8), 0))
    alone = [torch.nn.Parameter(part.clone()) for part in whole.detach().split([8, 8, 4])]
    stacked = [torch.nn.Parameter(part.clone()) for part in alone]
    one = make(rule, [dict(params=[whole], split=(8, 8, 4))], **eps)
    each, together = [make(rule, [p], **eps) for p in alone], make(rule, stacked, **eps)
    for number in range(6):
        if number == 3:
            restored = make(rule, [dict(params=[whole], split=(8, 8, 4))], **eps)
            restored.load_state_dict(copy.deepcopy(one.state_dict()))
            one = restored
        whole.grad = randn((20, 8), 1 + number)
        for p, q, grad in zip(alone, stacked, whole.grad.split([8, 8, 4]), strict=True):
            p.grad, q.grad = grad.clone(), grad.clone()
        for optimizer in (one, together, *each):
            optimizer.step()
    for p, q, part in zip(alone, stacked, whole.detach().split([8, 8, 4]), strict=True):
        torch.testing.assert_close(part, p, atol=1e-4, rtol=0)
        torch.testing.assert_close(q, p, atol=1e-4, rtol=0)


@pytest.mark.parametrize("rule", BOARD_RULES)
def test_non_finite_gradients_raise_the_flag(rule):
    p = torch.nn.Parameter(randn((12, 8), 0))
    optimizer = make(rule, [p])
    for bad in (1.0, math.nan, 1.0):
        p.grad = randn((12, 8), 1)
        p.grad[0, 0] *= bad
        optimizer.step()
    assert optimizer.found_non_finite


@pytest.mark.parametrize("rule", BOARD_RULES)
def test_zero_gradients_change_no_weight_but_by_decay(rule):
    p = torch.nn.Parameter(randn((12, 8), 0))
    optimizer = make(rule, [p], weight_decay=0.0)
    for _ in range(7):
        p.grad = torch.zeros(12, 8)
        optimizer.step()
    torch.testing.assert_close(p.detach(), randn((12, 8), 0), atol=1e-6, rtol=0)


BOUNDS = {
    "adam": lambda X: 1.2 * X[0].numel() ** 0.5,
    "shampoo": lambda X: 1.2 * X[0].numel() ** 0.5,
    "muon2": lambda X: 1.1 * min(X.shape[1:]) ** 0.5,
    "pmuon": lambda X: 1.1 * min(X.shape[1:]) ** 0.5,
    "dynmuon": lambda X: 1.1 * 1.2 * min(X.shape[1:]) ** 0.5 * dynmuon_size(X),
}


def dynmuon_size(X):
    sizes = torch.linalg.vector_norm(X, dim=(1, 2))
    return max((size * factor).item() ** p for size in (sizes.min(), sizes.max()) for factor in (0.2, 20) for p in
               (0.25, -0.25))  # fmt: skip


@pytest.mark.parametrize("rule", BOUNDS)
def test_rule_keeps_to_the_size_that_it_states(rule):
    for X_KMN in random_stacks(60):
        params = [torch.nn.Parameter(torch.zeros(X_KMN.shape[1:])) for _ in X_KMN]
        optimizer = make(rule, params, lr=1.0, weight_decay=0.0, aspect_scale=False, polar_schedule="quintic12")
        for seen in (X_KMN, X_KMN.roll(1, 0), X_KMN.roll(2, 0)):
            before = torch.stack([p.detach().clone() for p in params])
            for p, G in zip(params, seen, strict=True):
                p.grad = G
            optimizer.step()
            steps = torch.stack([p.detach() for p in params]) - before
            assert torch.linalg.vector_norm(steps, dim=(1, 2)).max() <= 1.01 * BOUNDS[rule](X_KMN), X_KMN.shape


@pytest.mark.parametrize(
    "rule, hparams, message",
    [
        *(
            (rule, dict(beta2=1.0), r"beta2 must be in \[0, 1\), got 1.0")
            for rule in ("adam", "soap", "muon2", "pmuon")
        ),
        *((rule, dict(eps=0.0), "eps must be positive, got 0.0") for rule in ("adam", "soap", "muon2", "shampoo")),
        ("pmuon", dict(power=-1.0), "power must be at least 0"),
        ("dynmuon", dict(start_power=2.0), r"start_power must be in \[-1, 1\]"),
        ("dynmuon", dict(turn_width=0.0), "turn_width must be positive"),
        ("psgd", dict(precond_lr=0.0), r"precond_lr must be in \(0, 1\]"),
        ("shampoo", dict(every=0), "every must be at least 1"),
        ("shampoo", dict(gram_eps=0.0), "gram_eps must be positive"),
        ("normuon", dict(axis="columns"), "axis must be one of rows, long, got 'columns'"),
    ],
)
def test_settings_out_of_range_are_named(rule, hparams, message):
    with pytest.raises(ValueError, match=message):
        make(rule, [torch.nn.Parameter(torch.ones(4, 2))], **hparams)


def test_normuon_along_the_long_axis_is_that_of_the_transpose():
    wide, tall = torch.nn.Parameter(randn((8, 16), 0)), torch.nn.Parameter(randn((8, 16), 0).T.contiguous())
    for p, axis in ((wide, "long"), (tall, "rows")):
        optimizer = make("normuon", [p], axis=axis, aspect_scale=False)
        for number in range(5):
            p.grad = randn((8, 16), 1 + number) if p is wide else randn((8, 16), 1 + number).T.contiguous()
            optimizer.step()
    torch.testing.assert_close(wide.detach(), tall.detach().T, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["adam", "shampoo"])
def test_a_scheduled_momentum_is_corrected_by_all_its_decays(name):
    """Of a constant gradient the corrected mean is that gradient, whatever the decays were."""
    p = torch.nn.Parameter(torch.zeros(4, 3))
    optimizer = aurora.find_rule(name)(
        [p], lr=1.0, momentum=0.5, beta2=0.5, **({"every": 100} if name == "shampoo" else {})
    )
    for step in range(20):
        optimizer.param_groups[0]["momentum"] = 0.5 + 0.49 * step / 19
        before, p.grad = p.detach().clone(), torch.full_like(p, 2.0)
        optimizer.step()
        torch.testing.assert_close(before - p.detach(), torch.ones(4, 3), rtol=1e-4, atol=0)
