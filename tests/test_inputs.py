"""Rules that ask for gradients, weights or the step beside the momentum: one class, one method, in every use."""

import copy

import pytest
import torch

import aurora
from tests.conftest import often
from tests.test_param_group_options import VIEWED

STEPS = 20
SHAPES = [(12, 8), (8, 12), (10, 10), (12, 8)]


class Lionish(aurora.MatrixOptimizer):
    """Lion (Chen et al. 2023) with momentum as its beta2, and decay where it and the update agree in sign."""

    def direction(self, X_KMN, states, group, *, G_KMN, W_KMN):
        before_KMN = (X_KMN - (1 - group["momentum"]) * G_KMN) / group["momentum"]
        update_KMN = torch.sign(0.9 * before_KMN + 0.1 * G_KMN)
        return update_KMN + 0.3 * torch.where(update_KMN * W_KMN >= 0, W_KMN, 0.0)


class Soapish(aurora.MatrixOptimizer):
    """SOAP (Vyas et al. 2024): Adam in the eigenbases of the mean G G^T and G^T G."""

    def new_state(self, p, group):
        shapes = {"left": (p.size(0), p.size(0)), "right": (p.size(1), p.size(1)), "squares": p.shape}
        return super().new_state(p, group) | {key: torch.zeros(shapes[key], device=p.device) for key in shapes}

    def direction(self, X_KMN, states, group, *, G_KMN, step):
        left, right, squares = (torch.stack([state[key] for state in states]) for key in ("left", "right", "squares"))
        left.lerp_(G_KMN @ G_KMN.mT, 0.1), right.lerp_(G_KMN.mT @ G_KMN, 0.1)
        L_KMM, R_KNN = (torch.linalg.eigh(gram)[1] for gram in (left, right))
        squares.lerp_((L_KMM.mT @ G_KMN @ R_KNN).square(), 0.1)
        for state, *values in zip(states, left, right, squares, strict=True):
            torch._foreach_copy_([state[key] for key in ("left", "right", "squares")], values)
        scale = (squares / (1 - 0.9 ** (step + 1))).sqrt() + 0.1
        return L_KMM @ ((L_KMM.mT @ X_KMN @ R_KNN) / (1 - group["momentum"] ** (step + 1)) / scale) @ R_KNN.mT


RULES = {Lionish: dict(nesterov=False, momentum=0.99), Soapish: dict(nesterov=False, momentum=0.9)}


def make(rule, params, **options):
    return rule(params, **dict(lr=0.05, weight_decay=0.1) | RULES[rule] | options)


def lion_oracle(W, grads, lr=0.05, decay=0.1, beta1=0.9, beta2=0.99):
    m = torch.zeros_like(W)
    for G in grads:
        u = torch.sign(beta1 * m + (1 - beta1) * G)
        m = beta2 * m + (1 - beta2) * G
        W = W - lr * (decay * W + (u + 0.3 * (u * W >= 0) * W) * max(1, W.shape[0] / W.shape[1]) ** 0.5)
    return W


def soap_oracle(W, grads, lr=0.05, decay=0.1, beta1=0.9, beta2=0.9):
    m, v, L, R = torch.zeros_like(W), torch.zeros_like(W), 0.0, 0.0
    for t, G in enumerate(grads, start=1):
        m, L, R = beta1 * m + (1 - beta1) * G, beta2 * L + (1 - beta2) * G @ G.T, beta2 * R + (1 - beta2) * G.T @ G
        P, Q = torch.linalg.eigh(L).eigenvectors, torch.linalg.eigh(R).eigenvectors
        v = beta2 * v + (1 - beta2) * (P.T @ G @ Q) ** 2
        u = P @ ((P.T @ m @ Q) / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + 0.1)) @ Q.T
        W = W - lr * (decay * W + u * max(1, W.shape[0] / W.shape[1]) ** 0.5)
    return W


ORACLES = {Lionish: lion_oracle, Soapish: soap_oracle}


def randn(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def new_params():
    return [torch.nn.Parameter(randn(shape, seed)) for seed, shape in enumerate(SHAPES)]


def gradient(shape, index, step):
    return randn(shape, 100 * step + index)


def train(optimizer, params, steps=range(STEPS), step=None):
    for number in steps:
        for index, p in enumerate(params):
            p.grad = gradient(p.shape, index, number)
        (step or optimizer.step)()


def assert_oracle(rule, params):
    for index, (p, W) in enumerate(zip(params, new_params(), strict=True)):
        grads = [gradient(p.shape, index, number).double() for number in range(STEPS)]
        torch.testing.assert_close(p.detach().double(), ORACLES[rule](W.detach().double(), grads), atol=2e-4, rtol=0)


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_that_names_its_inputs_equals_its_oracle(rule):
    params = new_params()
    train(make(rule, params), params)
    assert_oracle(rule, params)


@pytest.mark.parametrize("rule", RULES)
def test_resumed_and_copied_it_goes_on_bit_for_bit(rule):
    params = new_params()
    whole = make(rule, params)
    train(whole, params, range(3))
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = make(rule, others)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    copied = copy.deepcopy(whole)
    train(whole, params, range(3, 6))
    train(resumed, others, range(3, 6))
    train(copied, copied.param_groups[0]["params"], range(3, 6))
    for p, q, r in zip(params, others, copied.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q) and torch.equal(p, r)
    assert all(("step" in whole.state[p]) == (rule is Soapish) for p in params)


def test_matrices_that_have_taken_other_numbers_of_steps_are_not_in_one_stack():
    params, alone = new_params(), new_params()
    optimizer, separate = make(Soapish, params), [make(Soapish, [p]) for p in alone]
    for number in range(4):
        for index, (p, q) in enumerate(zip(params, alone, strict=True)):
            p.grad = q.grad = None if index == 3 and number < 2 else gradient(p.shape, index, number)
        optimizer.step()
        for each in separate:
            each.step()
    assert [int(optimizer.state[p]["step"]) for p in params] == [4, 4, 4, 2]
    for p, q in zip(params, alone, strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", VIEWED)
def test_parts_are_updated_as_the_matrices_that_they_are(rule, kind):
    shape, options, matrices = VIEWED[kind]
    p = torch.nn.Parameter(randn(shape, 0))
    own = [torch.nn.Parameter(part.clone()) for part in matrices(p.detach())]
    optimizer, separate = make(rule, [dict(params=[p], **options)]), make(rule, own)
    for number in range(4):
        p.grad = randn(shape, 1 + number)
        for q, grad in zip(own, matrices(p.grad), strict=True):
            q.grad = grad.clone()
        optimizer.step(), separate.step()
    for q, part in zip(own, matrices(p.detach()), strict=True):
        torch.testing.assert_close(part, q, atol=1e-4, rtol=0)
    other = torch.nn.Parameter(p.detach().clone())
    restored = make(rule, [dict(params=[other], **options)])
    restored.load_state_dict(optimizer.state_dict())
    p.grad = other.grad = randn(shape, 9)
    optimizer.step(), restored.step()
    assert torch.equal(p, other)


@pytest.mark.parametrize("rule", [often(rule, rule is Soapish) for rule in RULES])
def test_a_compiled_step_takes_the_same_steps(rule):
    torch._dynamo.reset()
    eager, compiled = new_params()[:2], new_params()[:2]
    optimizers = [make(rule, params) for params in (eager, compiled)]
    train(optimizers[0], eager, range(4))
    train(optimizers[1], compiled, range(4), torch.compile(optimizers[1].step, backend="eager"))
    for p, q in zip(eager, compiled, strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=0)


def test_unknown_inputs_are_named_and_rules_without_pay_nothing():
    class Curious(aurora.MatrixOptimizer):
        def direction(self, X_KMN, states, group, *, G_KMN, H_KMN):
            return X_KMN

    message = r"Curious.direction\(\) asks for H_KMN; there are only G_KMN, W_KMN, step"
    with pytest.raises(TypeError, match=message):
        Curious(new_params(), lr=0.1)
    params = new_params()
    muon = aurora.Muon(params, lr=0.1)
    train(muon, params, range(1))
    assert all(set(muon.state[p]) == {"momentum_buffer"} for p in params)
