"""Polar schedules against exact singular value decompositions."""

import numpy as np
import pytest
import torch

from aurora.optim.polar import FINISH, FINISH_ERROR, SCHEDULES, polar
from tests.reference import polynomial_polar, svd_polar

POLYNOMIALS = [name for name, schedule in SCHEDULES.items() if schedule.coefficients]
SHAPES = {"tall": (48, 16), "wide": (16, 48), "square": (24, 24)}


def random_matrix(shape, seed=0):
    """Singular values spread over two decades, as momentum has them."""
    generator = torch.Generator().manual_seed(seed)
    U, _, Vh = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False)
    return (U @ torch.diag(torch.logspace(0, -2, min(shape), dtype=torch.float64)) @ Vh).float()


@pytest.mark.parametrize("name", POLYNOMIALS)
def test_schedule_max_error_is_what_its_coefficients_give(name):
    schedule = SCHEDULES[name]
    s = np.geomspace(schedule.min_singular_value, 1, 200_001) / schedule.norm_margin
    for a, b, c in schedule.coefficients:
        s = a * s + b * s**3 + c * s**5
    assert abs(s - 1).max() == pytest.approx(schedule.max_error, rel=0.02)
    assert abs(s - 1).max() <= schedule.max_error
    s = np.linspace(0, 1, 200_001) ** 4 / schedule.norm_margin
    for a, b, c in schedule.coefficients:
        s = a * s + b * s**3 + c * s**5
    assert schedule.max_singular_value - 1e-4 <= s.max() <= schedule.max_singular_value


def test_finish_has_the_error_that_it_states():
    s = np.linspace(0.35, 1.66, 100_001)
    error = abs(sum(coefficient * s ** (2 * k + 1) for k, coefficient in enumerate(FINISH)) - 1).max()
    assert 0.99 * FINISH_ERROR <= error <= FINISH_ERROR


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", POLYNOMIALS)
def test_polar_equals_polynomial_of_singular_values(name, shape):
    schedule, X = SCHEDULES[name], random_matrix(shape)
    expected = polynomial_polar(X, coefficients=schedule.coefficients, norm_margin=schedule.norm_margin)
    torch.testing.assert_close(polar(X[None], schedule)[0].double(), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", POLYNOMIALS)
def test_polar_is_within_stated_error_of_svd(name, shape, dtype, rounding):
    schedule, X = SCHEDULES[name], random_matrix(shape)
    difference = polar(X[None], schedule, dtype)[0].double() - svd_polar(X)
    assert torch.linalg.matrix_norm(difference, 2) <= schedule.max_error + rounding


@pytest.mark.parametrize("name", SCHEDULES)
def test_polar_of_transpose_is_transpose(name):
    X = random_matrix((40, 16))[None]
    torch.testing.assert_close(polar(X.mT, SCHEDULES[name]), polar(X, SCHEDULES[name]).mT, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_polar_of_stack_equals_each_alone(name):
    X = torch.stack([random_matrix((40, 16), seed) for seed in range(3)])
    alone = torch.cat([polar(x[None], SCHEDULES[name]) for x in X])
    torch.testing.assert_close(polar(X, SCHEDULES[name]), alone, atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_polar_of_zero_is_zero_and_does_not_disturb_its_stack(name):
    X = torch.stack([random_matrix((40, 16)), torch.zeros(40, 16)])
    result = polar(X, SCHEDULES[name])
    assert torch.equal(result[1], torch.zeros(40, 16))
    torch.testing.assert_close(result[0], polar(X[:1], SCHEDULES[name])[0], atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_polar_of_rank_one_is_the_outer_product_of_its_singular_vectors(name):
    generator = torch.Generator().manual_seed(0)
    u, v = torch.randn(40, generator=generator), torch.randn(16, generator=generator)
    expected = torch.outer(u / u.norm(), v / v.norm())
    error = torch.linalg.matrix_norm(polar(torch.outer(u, v)[None], SCHEDULES[name])[0] - expected, 2)
    assert error <= SCHEDULES[name].max_error + 2e-4


@pytest.mark.parametrize("scale", [1e-10, 1e10])
@pytest.mark.parametrize("name", SCHEDULES)
def test_polar_does_not_depend_on_scale(name, scale):
    X = random_matrix((40, 16))[None]
    torch.testing.assert_close(polar(X * scale, SCHEDULES[name]), polar(X, SCHEDULES[name]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", POLYNOMIALS)
def test_polar_of_non_finite_is_nan_never_a_number(name, bad):
    X = random_matrix((40, 16))[None].clone()
    X[0, 3, 3] = bad
    assert polar(X, SCHEDULES[name]).isnan().any()


def test_polar_leaves_its_input_alone():
    X = random_matrix((40, 16))[None]
    before = X.clone()
    polar(X, SCHEDULES["polar_express5"])
    assert torch.equal(X, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["polar_express5", "quintic12"])
def test_a_matrix_that_lies_turned_in_memory_is_worked_on_as_it_lies(name, dtype):
    X = torch.randn(2, 128, 384, generator=torch.Generator().manual_seed(0))
    scale = torch.rand(2, 1, 384) / 300
    keep = lambda V: V * 0.9  # noqa: E731
    for options in ({}, {"row_scale_KM1": scale.mT, "interlude": keep}):
        found = polar(X.mT, SCHEDULES[name], dtype, **options)
        assert found.mT.is_contiguous() and not found.is_contiguous()
        expected = polar(X.mT.contiguous(), SCHEDULES[name], dtype, **options)
        assert (found - expected).float().norm() <= 4 * torch.finfo(dtype).eps ** 0.75 * expected.float().norm()
