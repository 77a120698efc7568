"""What optimizers' steps are made of: when kernels are used, how they are checked, what happens where they fail."""

import sys
from types import SimpleNamespace

import pytest
import torch

import aurora
from aurora import passes
from aurora.aurora import VARIANTS

NAMES = ("gram", "symmetric_product", "evening_factors", "advance", "subtract")
CPU = torch.device("cpu")


def formulas(**others):
    """A module of kernels that are the formulas."""
    return SimpleNamespace(**{name: getattr(passes, name) for name in NAMES} | others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_passes_what_is_right(dtype):
    passes.check(formulas(), CPU, dtype)
    assert passes.is_on


def off_by_a_tenth(formula):
    def wrong(*inputs, **options):
        result = formula(*inputs, **options)
        (inputs[0][0] if result is None else result).mul_(1.1)
        return result

    return wrong


@pytest.mark.parametrize("name", NAMES)
def test_the_check_finds_what_is_wrong(name):
    with pytest.raises(ArithmeticError, match="the kernel of the .* is wrong"):
        passes.check(formulas(**{name: off_by_a_tenth(getattr(passes, name))}), CPU, torch.float32)


def steps(rule, hparams, shape, count=3):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for _ in range(2)]
    optimizer = aurora.RULES[rule](params, lr=0.1, weight_decay=0.01, polar_dtype="bfloat16", **hparams)
    for _ in range(count):
        for p in params:
            p.grad = torch.randn(shape, generator=generator)
        optimizer.step()
    return torch.stack([p.detach() for p in params])


@pytest.mark.parametrize("shape", [(128, 256), (256, 128), (128, 128)])
@pytest.mark.parametrize(
    "rule, hparams", [("muon", {}), ("unormuon", {}), *(("aurora", {"variant": variant}) for variant in VARIANTS)]
)
def test_steps_with_kernels_are_steps(rule, hparams, shape, monkeypatch):
    expected, used = steps(rule, hparams, shape), set()

    def counted(name):
        def call(*inputs, **options):
            used.add(name)
            with passes.turned_off():
                return getattr(passes, name)(*inputs, **options)

        return call

    kernels = SimpleNamespace(**{name: counted(name) for name in NAMES})
    monkeypatch.setattr(passes, "kernels_for", lambda tensor: kernels if passes.is_on else None)
    assert torch.equal(steps(rule, hparams, shape), expected)
    balances = rule == "aurora" and shape[0] != shape[1]
    assert used == set(NAMES) - (set() if balances else {"evening_factors"})


def test_what_kernels_cannot_take_goes_to_torch(monkeypatch):
    monkeypatch.setattr(passes, "kernels_for", lambda tensor: pytest.fail("kernels were asked"))
    X = torch.randn(2, 96, 128)
    passes.gram(X)
    passes.gram(X.bfloat16())
    passes.symmetric_product(X[:, :, :96], X[:, :, :96])
    assert (
        not passes.are_whole([X.mT]) and not passes.are_whole([X.flatten()[1:]]) and not passes.are_whole([X.double()])
    )
    steps("muon", {"momentum": 0}, (8, 8), count=0)


def test_kernels_that_do_not_work_cost_one_warning(monkeypatch):
    passes.working_kernels.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def broken(*_):
        raise ValueError("shared memory\nand more")

    monkeypatch.setattr(passes, "check", broken)
    monkeypatch.setitem(sys.modules, "aurora.kernels", SimpleNamespace())
    monkeypatch.setattr(aurora, "kernels", SimpleNamespace(), raising=False)
    with pytest.warns(UserWarning, match="optimizer steps without Triton kernels, for shared memory$") as warned:
        assert passes.working_kernels(torch.device("cuda:0")) is None
        assert passes.working_kernels(torch.device("cuda:0")) is None
    assert len(warned) == 1
    passes.working_kernels.cache_clear()


def test_there_are_none_for_other_devices():
    assert passes.working_kernels(CPU) is None and passes.kernels_for(torch.ones(1)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["polar_express5", "quintic12"])
def test_a_matrix_that_lies_turned_in_memory_is_worked_on_as_it_lies(name, dtype):
    X = torch.randn(2, 128, 384, generator=torch.Generator().manual_seed(0))
    scale = torch.rand(2, 1, 384) / 300
    keep = lambda V: V * 0.9  # noqa: E731
    for options in ({}, {"row_scale_KM1": scale.mT, "interlude": keep}):
        found = aurora.polar(X.mT, aurora.SCHEDULES[name], dtype, **options)
        assert found.mT.is_contiguous() and not found.is_contiguous()
        expected = aurora.polar(X.mT.contiguous(), aurora.SCHEDULES[name], dtype, **options)
        assert (found - expected).float().norm() <= 4 * torch.finfo(dtype).eps ** 0.75 * expected.float().norm()
