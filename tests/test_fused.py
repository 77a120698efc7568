"""Parts of a block as single operations: their gradients, their kernels, and what happens where these fail."""

import functools
import importlib.util
import subprocess
import sys

import pytest
import torch
from aurora.fast.compiled import (
    CompileFailed,
    WrongNumbers,
    check_compiled,
    compiled_parts,
    compiled_where_possible,
)

import train_gpt
from aurora.config import load_config
from aurora.fast import fused
from aurora.trainer.ranks import Ranks
from tests.conftest import ROOT

ONE_CPU = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture
def turned_on(monkeypatch):
    monkeypatch.setattr(fused, "is_on", True)


@pytest.fixture(params=["relu2", "swiglu"])
def model(request):
    sizes = ["seq_len=128", "model_dim=64", "num_heads=2", "num_layers=2", f"mlp={request.param}"]
    config = load_config(ROOT / "configs/quick.toml", "muon", [f"model.{size}" for size in sizes]).model
    model, generator = train_gpt.GPT(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    return model


def tokens():
    drawn = torch.randint(256, (8 * 128 + 1,), generator=torch.Generator().manual_seed(1))
    return drawn[:-1].view(-1, 128), drawn[1:].view(-1, 128)


def gradients(model, called=None):
    model.zero_grad()
    with model.weights_at_rest():
        loss = (model if called is None else called)(*tokens())
        loss.backward()
    return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


def test_loss_and_gradients_are_those_of_the_plain_modules(model, monkeypatch):
    model = model.double()
    model.activation_dtype = torch.float64
    plain = gradients(model)
    monkeypatch.setattr(fused, "is_on", True)
    for name, value in gradients(model).items():
        # The plain norms' epsilon is that of float64 here, float32's makes 1e-7.
        assert (value - plain[name]).norm() < 2e-6 * plain[name].norm(), name


def test_rows_that_are_no_whole_block_go_the_plain_way(model, turned_on, monkeypatch):
    monkeypatch.setattr(fused, "add_norm", None)
    assert model.logits(tokens()[0][:1, :100]).shape == (1, 100, 256)
    with pytest.raises(TypeError, match="NoneType"):
        model.logits(tokens()[0][:1])


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton for this platform")
def test_every_kernel_computes_its_formula():
    """Run by Triton's interpreter: the kernels as written, not as a compiler for some device makes them."""
    command = [sys.executable, "-m", "tests.check_kernels"]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    lines = outcome.stdout.splitlines()
    assert outcome.returncode == 0 and not any("WRONG" in line for line in lines), outcome.stdout + outcome.stderr
    assert {line.split()[0] for line in lines} == {operation._name for operation in fused.OPERATIONS}


@pytest.mark.parametrize("is_on", [True, False])
@pytest.mark.parametrize("by_parts", [False, True])
def test_compilers_take_the_operations(model, is_on, by_parts, monkeypatch):
    monkeypatch.setattr(fused, "is_on", is_on)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))  # needs no C++
    plain = gradients(model, lambda *batch: with_torch_alone(model, *batch))
    compiled = compiled_parts(model) if by_parts else torch.compile(model, dynamic=False)
    for name, value in gradients(model, compiled).items():
        assert (value - plain[name]).norm() < 1e-5 * plain[name].norm(), name


def with_torch_alone(model, *batch):
    with fused.turned_off():
        return model(*batch)


def test_what_compiled_code_is_checked_for_passes_where_it_is_right(model, turned_on):
    check_compiled(model, model, tokens(), [tokens(), tokens()])  # fused against plain
    assert fused.is_on


@pytest.mark.parametrize("name", ["blocks.1.attention.q.weight", "head.bias", "embed_norm.gain"])
@pytest.mark.parametrize("factor", [0.0, 1.1, -1.0, float("inf")])
def test_a_lost_or_wrong_gradient_is_noticed_and_named(model, name, factor):
    p = model.get_parameter(name)

    def called(*batch):
        p_of_other_gradient = p.detach() + Scale.apply(p - p.detach(), factor)
        return torch.func.functional_call(model, {name: p_of_other_gradient}, batch)

    class Scale(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x, factor: x.clone())
        backward = staticmethod(lambda ctx, grad: (grad * factor, None))

    with pytest.raises(WrongNumbers, match=f"another gradient of {name} "):
        check_compiled(called, model, tokens(), [])
    model.zero_grad()
    with pytest.raises(WrongNumbers, match=f"another gradient of {name} "):  # which has none at all
        check_compiled(lambda *b: torch.func.functional_call(model, {name: p.detach()}, b), model, tokens(), [])


@pytest.mark.parametrize("model", ["relu2"], indirect=True)
@pytest.mark.parametrize(
    "name, position", [("up_relu_squared", 2), ("rotated_norm", 1), ("add_norm", 2), ("log_sums", 1)]
)
def test_an_operation_that_forgets_its_bias_is_noticed(model, turned_on, monkeypatch, name, position):
    operation = getattr(fused, name)

    def without_bias(*inputs):
        return operation(*(x * 0 if number == position else x for number, x in enumerate(inputs)))

    monkeypatch.setattr(fused, name, without_bias)
    model.activation_dtype = torch.bfloat16
    with pytest.raises(WrongNumbers):
        check_compiled(model, model, tokens(), [])


@pytest.mark.parametrize("is_training", [True, False])
def test_a_wrong_loss_is_noticed(model, is_training):
    def called(*batch):
        return model(*batch) + (1000 if torch.is_grad_enabled() == is_training else 0)

    with pytest.raises(WrongNumbers, match="compiled code has a loss of "):
        check_compiled(called, model, tokens(), [tokens()])


def test_a_compiled_model_with_a_wrong_gradient_is_not_trained(tiny_track, tmp_path, monkeypatch, capsys):
    def half(model, **_):
        return lambda *batch: HalfGradient.apply(model(*batch))

    class HalfGradient(torch.autograd.Function):
        forward = staticmethod(lambda ctx, loss: loss.clone())
        backward = staticmethod(lambda ctx, grad: grad / 2)

    monkeypatch.setattr(torch, "compile", half)
    arguments = ["--config", str(tiny_track), "--optimizer", "muon", "--out", str(tmp_path)]
    assert train_gpt.main([*arguments, "--set", "train.compile=on"]) == 2
    error = capsys.readouterr().err
    assert "compiled code gives another gradient of " in error and "set it to 'off'" in error


def test_a_kernel_that_fails_leaves_the_run_with_those_of_torch(turned_on, capsys):
    attempts = []

    def prepare(model):
        attempts.append(fused.is_on)
        if fused.is_on:
            raise CompileFailed("the kernel of add_norm: no such device")
        return "micro-batch 1"

    model = torch.nn.Linear(2, 2)
    assert compiled_where_possible(model, "on", ONE_CPU, prepare) is not model
    assert attempts == [True, False] and not fused.is_on and fused.kernels_of(torch.device("cpu")) == "torch"
    assert "no Triton kernels, for the kernel of add_norm: no such device" in capsys.readouterr().out


def test_an_error_in_a_kernel_is_told_from_lack_of_memory(monkeypatch):
    class Kernels:
        @staticmethod
        def broken():
            raise ValueError("shared memory")

        @staticmethod
        def hungry():
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(sys.modules, "aurora.fast.kernels", Kernels)
    monkeypatch.setattr("aurora.fast.kernels", Kernels, raising=False)
    with pytest.raises(fused.KernelFailed, match="the kernel of broken: ValueError: shared memory"):
        fused.on_cuda("broken")()
    with pytest.raises(torch.OutOfMemoryError):
        fused.on_cuda("hungry")()
