"""What polar() and the rules promise of the size of their results, on random matrices of every kind and shape."""

import math

import pytest
import torch

from aurora.optim.polar import FINISH_ERROR, INTERLUDE_GROWTH, SCHEDULES, polar
from tests.test_rules import POLYNOMIALS, RULES, make

ROUNDING = {torch.float32: 2e-4, torch.bfloat16: 0.1}  # as polar() states it
COUNTS = [200, pytest.param(20_000, marks=pytest.mark.slow)]


def random_stacks(num_matrices):
    """Stacks of about num_matrices in all: short side and aspect ratio 1 to 64, condition 1 to 1e6, half of the
    matrices with heavy-tailed rows, half of the stacks wide. The same in every call."""
    generator = torch.Generator().manual_seed(num_matrices)

    def uniform(*shape):
        return torch.rand(shape, generator=generator)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    while num_matrices > 0:
        columns = round(64 ** uniform(1).item())
        rows = round(columns * 64 ** uniform(1).item())
        K = max(2, min(50, 40_000 // (rows * columns)))
        U_KMN, V_KNN = torch.linalg.qr(normal(K, rows, columns))[0], torch.linalg.qr(normal(K, columns, columns))[0]
        X_KMN = U_KMN * 10 ** (-6 * uniform(K, 1, 1) * uniform(K, 1, columns)) @ V_KNN
        tails_KM1 = torch.exp(3 * uniform(K, 1, 1) * normal(K, rows, 1))
        X_KMN = torch.where(uniform(K, 1, 1) < 0.5, tails_KM1 * X_KMN, X_KMN)
        yield X_KMN if uniform(1) < 0.5 else X_KMN.mT.contiguous()
        num_matrices -= K


def singular_values(X_KMN):
    """Largest first, float64; small ones to half the digits."""
    X_KMN = X_KMN.double() if X_KMN.size(-2) <= X_KMN.size(-1) else X_KMN.double().mT
    return torch.linalg.eigvalsh(X_KMN @ X_KMN.mT).clamp(min=0).sqrt().flip(-1)


def largest_norms(rule, shape, max_singular_value):
    """What the rules' docstrings grant the Frobenius norm of a direction, and its rows, of a wide Aurora's columns."""
    rows, columns = shape
    frobenius = max_singular_value * math.sqrt(min(shape))
    if rule in ("normuon", "unormuon"):
        return frobenius, frobenius
    if rule == "aurora refined" and rows != columns:
        frobenius *= 1.4
    is_even = rule in ("aurora folded", "aurora warm", "aurora refined") or (rule == "aurora tall" and rows > columns)
    if not is_even or rows == columns:
        return frobenius, max_singular_value
    return frobenius, frobenius / math.sqrt(max(shape))


@pytest.mark.parametrize("num_matrices", COUNTS)
@pytest.mark.parametrize("dtype", ROUNDING, ids=["fp32", "bf16"])
def test_polar_and_all_rules_keep_to_the_sizes_that_they_state(dtype, num_matrices):
    for index, X_KMN in enumerate(random_stacks(num_matrices)):
        shape, s = tuple(X_KMN.shape[1:]), singular_values(X_KMN)
        norm = s.square().sum(dim=-1).sqrt()
        for name, schedule in SCHEDULES.items():
            found = singular_values(polar(X_KMN, schedule, dtype))
            error = schedule.max_error + ROUNDING[dtype]
            assert found.max() <= schedule.max_singular_value + ROUNDING[dtype], (name, shape)
            grown = singular_values(polar(X_KMN, schedule, dtype, interlude=lambda V: V * INTERLUDE_GROWTH))
            largest = schedule.max_singular_value + ROUNDING[dtype]
            if schedule.max_error > FINISH_ERROR:
                largest = 1 + FINISH_ERROR + (2e-4 if dtype == torch.float32 else 0.2)
            assert grown.max() <= largest, (name, shape)
            # Below that, singular values are noise.
            smallest = torch.maximum(schedule.min_singular_value * norm, 8 * torch.finfo(dtype).eps * s[:, 0])
            is_good = s[:, -1] >= smallest
            assert (found[is_good] >= 1 - error).all(), (name, shape)

        schedule = POLYNOMIALS[index % len(POLYNOMIALS)]
        for rule in RULES:
            p = torch.nn.Parameter(torch.empty(shape))
            optimizer = make(rule, [p], polar_schedule=schedule, polar_dtype=str(dtype)[6:])
            (group,) = optimizer.param_groups
            states = [optimizer.new_state(p, group) for _ in X_KMN]
            max_singular_value = SCHEDULES[schedule].max_singular_value + ROUNDING[dtype]
            max_norm, max_row_norm = largest_norms(rule, shape, max_singular_value)
            for seen in (X_KMN, X_KMN.roll(1, 0)):  # the state remembers another matrix
                O_KMN = optimizer.direction(seen, states, group).double()
                assert O_KMN.isfinite().all(), (rule, schedule, shape)
                assert O_KMN.norm(dim=(1, 2)).max() <= max_norm, (rule, schedule, shape)
                is_turned = rule.startswith("aurora") and shape[0] < shape[1]
                assert O_KMN.norm(dim=1 if is_turned else 2).max() <= max_row_norm, (rule, schedule, shape)
