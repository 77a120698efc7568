"""What optimizers' steps are made of: when kernels are used, how they are checked, what happens where they fail."""

import sys
from types import SimpleNamespace

import pytest
import torch

import aurora
from aurora.optim import passes
from aurora.optim.aurora import VARIANTS

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


def steps(rule, hparams, shape):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for _ in range(2)]
    optimizer = aurora.RULES[rule](params, lr=0.1, weight_decay=0.01, polar_dtype="bfloat16", **hparams)
    for _ in range(3):
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


def mirrored(product):
    """What a kernel makes of a product: computed in float32, rounded once, the upper half from the lower."""
    rounded = product.bfloat16()
    return rounded.tril() + rounded.tril(-1).mT


HALVES = SimpleNamespace(
    gram=lambda X: mirrored(X.float() @ X.float().mT),
    symmetric_product=lambda A, B, alpha=1.0, plus=None, beta=1.0, diagonal=0.0: mirrored(
        alpha * (A.float() @ B.float())
        + (0.0 if plus is None else beta * plus.float())
        + diagonal * torch.eye(A.size(-1))
    ),
)


@pytest.mark.parametrize("name", ["ns5_jordan", "polar_express5", "quintic12"])
@pytest.mark.parametrize("shape", [(256, 768), (768, 256), (256, 256)])
def test_halves_of_symmetric_products_keep_singular_values_in_bounds(name, shape, monkeypatch):
    """On heavy tails, where it shows whether rounded factors commute."""
    schedule = aurora.SCHEDULES[name]
    generator = torch.Generator().manual_seed(0)
    U, _, Vh = torch.linalg.svd(torch.randn(3, *shape, generator=generator), full_matrices=False)
    X_KMN = U @ torch.diag(torch.logspace(0, -3, 256)) @ Vh
    monkeypatch.setattr(passes, "kernels_for", lambda tensor: HALVES)
    for options in ({}, {"interlude": lambda V: V}):
        result = aurora.polar(X_KMN, schedule, torch.bfloat16, **options)
        assert torch.linalg.matrix_norm(result.float(), 2).max() <= 1 + schedule.max_error + 0.1


def steps_of_one(momentum=0.9, lr=0.1, weight_decay=0.1, dtype=torch.float32):
    p = torch.nn.Parameter(torch.ones(128, 128, dtype=dtype))
    p.grad = torch.ones_like(p)
    aurora.Muon([p], lr=lr, momentum=momentum, weight_decay=weight_decay, polar_dtype="float32").step()


@pytest.mark.parametrize(
    "hparams",
    [
        {"momentum": torch.tensor(0.9), "lr": torch.tensor(0.1)},
        {"momentum": 0, "lr": torch.tensor(0.1)},
        {"dtype": torch.float64},
    ],
)
def test_what_kernels_cannot_take_goes_to_torch(hparams, monkeypatch):
    kernels = SimpleNamespace()  # has none of them
    monkeypatch.setattr(passes, "kernels_for", lambda tensor: kernels)
    steps_of_one(**hparams)
    with pytest.raises(AttributeError, match="advance"):
        steps_of_one()


def test_products_of_odd_sizes_or_in_float32_go_to_torch(monkeypatch):
    monkeypatch.setattr(passes, "kernels_for", lambda tensor: pytest.fail("kernels were asked"))
    for X in (torch.ones(2, 128, 256), torch.ones(2, 96, 128).bfloat16(), torch.ones(2, 0, 0).bfloat16()):
        R = passes.gram(X)
        passes.symmetric_product(R, R)


def test_only_whole_tensors_of_one_dtype_are_read_by_address():
    X = torch.ones(8, 4)
    assert passes.are_whole([X, X], [X.bfloat16()])
    for stack in ([X.mT], [X.flatten()[1:]], [X.double()], [X, X.bfloat16()], [X, torch.ones(8, 4, device="meta")]):
        assert not passes.are_whole([X], stack)


def on_cuda(monkeypatch, capability=(9, 0), current=0, is_capturing=False, is_compiling=False):
    """A tensor for kernels_for(), which sees what a machine with such a device would tell."""
    passes.working_kernels.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_capturing)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: is_compiling)
    kernels = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "aurora.optim.kernels", kernels)
    monkeypatch.setattr(aurora, "kernels", kernels, raising=False)
    return SimpleNamespace(is_cuda=True, device=torch.device("cuda:0"))


@pytest.fixture
def forgotten():
    yield
    passes.working_kernels.cache_clear()


@pytest.mark.parametrize(
    "hindrance", [{"capability": (8, 0)}, {"current": 1}, {"is_capturing": True}, {"is_compiling": True}]
)
def test_where_kernels_cannot_run_there_are_none(hindrance, monkeypatch, forgotten):
    checked = []
    monkeypatch.setattr(passes, "check", lambda kernels, device: checked.append(device))
    assert passes.kernels_for(on_cuda(monkeypatch, **hindrance)) is None and not checked
    assert passes.kernels_for(on_cuda(monkeypatch)) is not None and checked == [torch.device("cuda:0")]
    with passes.turned_off():
        assert passes.kernels_for(on_cuda(monkeypatch)) is None
    assert passes.kernels_for(torch.ones(1)) is None and passes.kernels_of(CPU) == "torch"


def test_kernels_that_do_not_work_cost_one_warning(monkeypatch, forgotten):
    def broken(*_):
        raise ValueError("shared memory\nand more")

    tensor = on_cuda(monkeypatch)
    monkeypatch.setattr(passes, "check", broken)
    with pytest.warns(UserWarning, match="optimizer steps without Triton kernels, for shared memory$") as warned:
        assert passes.kernels_for(tensor) is None and passes.kernels_for(tensor) is None
    assert len(warned) == 1


def test_lack_of_memory_is_no_reason_to_do_without_kernels(monkeypatch, forgotten):
    def hungry(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    tensor = on_cuda(monkeypatch)
    monkeypatch.setattr(passes, "check", hungry)
    with pytest.raises(torch.OutOfMemoryError):
        passes.kernels_for(tensor)


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
