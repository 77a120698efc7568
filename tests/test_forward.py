"""The fast forward passes give the model's own numbers, and are not used where they do not."""

import importlib.util
import subprocess
import sys

import pytest
import torch

import train_gpt
from aurora.config import load_config
from aurora.fast import functions, hopper
from aurora.fast.forward import FastForward
from aurora.trainer import warmup
from aurora.trainer.attempt import Unusable, WrongNumbers, attempt
from aurora.trainer.ranks import Ranks
from tests.conftest import ROOT, events, make_run, often, train_here

ONE_CPU = Ranks(0, 1, torch.device("cpu"))


NARROW = ["--set", "model.activation_dtype=bfloat16"]
KINDS = ["relu2", "swiglu", "relu2 without bias"]


@pytest.fixture(params=KINDS)
def model(request):
    mlp, _, without = request.param.partition(" ")
    sizes = [
        "seq_len=128",
        "model_dim=64",
        "num_heads=2",
        "num_layers=2",
        f"mlp={mlp}",
        f"bias={str(not without).lower()}",
    ]
    config = load_config(ROOT / "configs/quick.toml", "muon", [f"model.{size}" for size in sizes]).model
    return random_weights(train_gpt.GPT(config))


def random_weights(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    return model


def tokens():
    drawn = torch.randint(256, (8 * 128 + 1,), generator=torch.Generator().manual_seed(1))
    return drawn[:-1].view(-1, 128), drawn[1:].view(-1, 128)


def gradients(model, called=None):
    """The loss and every gradient, by name."""
    model.zero_grad()
    loss = (model if called is None else called)(*tokens())
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


def blocked(model):
    return FastForward(model, "blocked")


FORWARDS = [FastForward, blocked, hopper.HopperForward]


@pytest.mark.parametrize("forward", FORWARDS)
def test_loss_and_gradients_are_the_models_own(model, forward, monkeypatch):
    """In float64, so that only a wrong formula makes a difference."""
    model.activation_dtype = torch.float64
    model = model.double()
    # Both sides have float32's epsilon in norms, and a loss in float32: both are tested in test_model.py.
    monkeypatch.setattr(torch, "finfo", lambda dtype, original=torch.finfo: original(torch.float32))
    monkeypatch.setattr(functions, "rms_norm", lambda x, gain: torch.nn.functional.rms_norm(x, x.shape[-1:], gain))
    plain = gradients(model)
    for name, value in gradients(model, forward(model)).items():
        assert (value - plain[name]).norm() < 1e-5 * plain[name].norm(), name


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 2e-5), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("forward", FORWARDS)
def test_in_the_dtype_of_a_run_they_differ_by_rounding(model, forward, dtype, limit):
    model.activation_dtype = dtype
    plain = gradients(model)
    for name, value in gradients(model, forward(model)).items():
        assert (value - plain[name]).norm() < limit * plain[name].norm(), name


def test_parts_of_the_models_own_are_read_anew_in_each_pass(model):
    forward = FastForward(model)
    before = forward(*tokens())
    with torch.no_grad():
        model.blocks[0].attention.v.weight.mul_(2)
    assert forward(*tokens()) != before


def test_inside_a_training_step_every_linear_is_linear(tiny_track, tmp_path):
    from tests.faults import telling

    seen, original, runs = [], train_gpt.prepare, []

    def validation(name, step):
        if name == "micro_step" and step == 1:
            for module in runs[0].model.modules():
                if isinstance(module, torch.nn.Linear):
                    x = torch.randn(3, module.in_features, generator=torch.Generator().manual_seed(0))
                    assert torch.equal(module(x), torch.nn.functional.linear(x, module.weight, module.bias))
                    assert module(x).shape == (3, module.out_features)
                    seen.append(module)

    def prepare(run, *rest):
        runs.append(run)
        return original(run, *rest)

    with pytest.MonkeyPatch.context() as patch, telling(validation):
        patch.setattr(train_gpt, "prepare", prepare)
        assert train_here(tiny_track, tmp_path, "--set", "train.steps=3") == 0
    assert events(tmp_path)[0]["forward"] == "fast"
    assert len(seen) == 2 * (2 * 6 + 1), "two micro-steps"


# ---- compilers and kernels ----


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton for this platform")
def test_every_kernel_computes_its_formula():
    """Run by Triton's interpreter: the kernels as written, not as a compiler for some device makes them."""
    command = [sys.executable, "-m", "tests.check_kernels"]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    lines = outcome.stdout.splitlines()
    assert outcome.returncode == 0 and not any("WRONG" in line for line in lines), outcome.stdout + outcome.stderr
    assert {line.split()[0] for line in lines} == {operation._name for operation in hopper.OPERATIONS}


@pytest.fixture
def compiled(monkeypatch):
    """What is compiled, by a compiler that needs no C++."""
    parts, original = [], torch.compile

    def compile_part(part, **options):
        parts.append(part)
        return original(part, **{"backend": "aot_eager"} | options)

    monkeypatch.setattr(torch, "compile", compile_part)
    yield parts
    torch._dynamo.reset()


def run_of(tiny_track, world_size, *overrides):
    run, _ = make_run(tiny_track, "muon", *overrides)
    run.ranks = Ranks(0, world_size, torch.device("cpu"))
    return run


COMPILED_AS_ONE = [often((True, False), False), often((False, False), False)]


@pytest.mark.parametrize(
    "model", ["relu2", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])], indirect=True
)
@pytest.mark.parametrize("is_fast, by_blocks", [(True, True), (False, True), *COMPILED_AS_ONE])
def test_compilers_take_the_model_and_the_operations(model, is_fast, by_blocks, tiny_track, compiled):
    plain, run = gradients(model), run_of(tiny_track, 2 if by_blocks else 1)
    called = warmup.compiled_fast(hopper.HopperForward(model), run) if is_fast else warmup.compiled_plain(model, run)
    for name, value in gradients(model, called).items():
        assert (value - plain[name]).norm() < 2e-5 * plain[name].norm(), name
    assert len(compiled) == ((2 if is_fast else 3) if by_blocks else 1)
    assert not any(module._compiled_call_impl for module in model.modules()), "the model itself stays as it is"


@pytest.mark.parametrize("is_fast", [False, True])
def test_blocks_of_one_shape_share_their_compiled_code(is_fast, tiny_track, compiled):
    """A graph for each of many blocks would end in the compiler's limit."""
    run = run_of(tiny_track, 2, "model.num_layers=12")
    model = run.model
    called = warmup.compiled_fast(hopper.HopperForward(model), run) if is_fast else warmup.compiled_plain(model, run)
    torch._dynamo.utils.counters.clear()
    called(torch.zeros(4, 32, dtype=torch.int64), torch.zeros(4, 32, dtype=torch.int64)).backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2, "a block and the loss"


def test_blocked_attention_is_compiled_with_the_fast_forward(tiny_track, tmp_path, compiled, monkeypatch):
    monkeypatch.setattr(warmup, "blocked_pays", lambda model: True)
    settings = ["--set", "train.compile=on", "--set", "train.steps=2"]
    assert train_here(tiny_track, tmp_path, *NARROW, *settings) == 0
    start = events(tmp_path)[0]
    assert (start["compiled"], start["forward"], start["attention"]) == (True, "fast", "blocked")
    assert len(compiled) == 1


def check(called, model, tiny_track, batch=8):
    run, _ = make_run(tiny_track, "muon", "model.vocab_size=256", "model.seq_len=128")
    run.model = model
    warmup.check_numbers(called, run, batch, [batch])


@pytest.mark.parametrize("forward", [FastForward, hopper.HopperForward])
def test_what_is_called_for_the_model_passes_the_check_where_it_is_right(model, forward, tiny_track):
    check(forward(model), model, tiny_track)


class Scale(torch.autograd.Function):
    forward = staticmethod(lambda ctx, x, factor: (setattr(ctx, "factor", factor), x.clone())[1])
    backward = staticmethod(lambda ctx, grad: (grad * ctx.factor, None))


@pytest.mark.parametrize("model", ["relu2"], indirect=True)
@pytest.mark.parametrize("name", ["blocks.1.attention.q.weight", "head.bias", "embed_norm.gain"])
@pytest.mark.parametrize("factor", [0.0, 1.1, -1.0, float("inf"), None])
def test_a_lost_or_wrong_gradient_is_noticed_and_named(model, name, factor, tiny_track):
    p = model.get_parameter(name)

    def called(*batch):
        other = p.detach() if factor is None else p.detach() + Scale.apply(p - p.detach(), factor)
        return torch.func.functional_call(model, {name: other}, batch)

    with pytest.raises(WrongNumbers, match=f"another gradient of {name} "):
        check(called, model, tiny_track)


@pytest.mark.parametrize("model", ["relu2"], indirect=True)
@pytest.mark.parametrize("name, position", [("up_relu_squared", 2), ("rotated_norm", 1)])
def test_an_operation_that_forgets_its_bias_is_noticed(model, monkeypatch, name, position, tiny_track):
    operation = getattr(hopper, name)

    def without_bias(*inputs):
        return operation(*(x * 0 if number == position else x for number, x in enumerate(inputs)))

    monkeypatch.setattr(hopper, name, without_bias)
    model.activation_dtype = torch.bfloat16
    with pytest.raises(WrongNumbers):
        check(hopper.HopperForward(model), model, tiny_track)


@pytest.mark.parametrize("is_training", [True, False])
def test_a_wrong_loss_is_noticed(model, is_training, tiny_track):
    def called(*batch):
        return model(*batch) + (1000 if torch.is_grad_enabled() == is_training else 0)

    with pytest.raises(WrongNumbers, match="it has a loss of "):
        check(called, model, tiny_track)


class HalfGradient(torch.autograd.Function):
    forward = staticmethod(lambda ctx, loss: loss.clone())
    backward = staticmethod(lambda ctx, grad: grad / 2)


def test_a_compiled_model_with_a_wrong_gradient_is_not_trained(tiny_track, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda model, **_: lambda *batch: HalfGradient.apply(model(*batch)))
    assert train_here(tiny_track, tmp_path, "--optimizer", "muon", "--set", "train.compile=on") == 2
    error = capsys.readouterr().err
    assert "it gives another gradient of " in error and "set it to 'off'" in error


def test_a_wrong_fast_forward_is_left_out_with_a_word(tiny_track, tmp_path, monkeypatch, capsys):
    original = FastForward.__call__
    monkeypatch.setattr(FastForward, "__call__", lambda *args: HalfGradient.apply(original(*args)))
    assert train_here(tiny_track, tmp_path, "--optimizer", "muon", "--set", "train.steps=2") == 0
    said = capsys.readouterr().out
    assert "no eager, fast forward, for it gives another gradient of " in said
    assert "model: eager, plain forward; micro-batch 8" in said
    assert events(tmp_path)[0]["forward"] == "plain"


def test_a_kernel_that_fails_leaves_the_run_with_the_compiled_model(tiny_track, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise hopper.KernelFailed("the kernel of rotated_norm: no such device")

    monkeypatch.setattr(hopper, "suits", lambda config, device: True)
    monkeypatch.setattr(hopper, "rotated_norm", fail)
    monkeypatch.setattr(torch, "compile", lambda model, **_: lambda *batch: model(*batch))
    assert train_here(tiny_track, tmp_path, "--set", "train.compile=on", "--set", "train.steps=2") == 0
    said = capsys.readouterr().out
    assert "no compiled, fast forward with Triton kernels, for the kernel of rotated_norm: no such device" in said
    assert "model: compiled, plain forward; micro-batch 8" in said
    start = events(tmp_path)[0]
    assert (start["compiled"], start["forward"], start["kernels"]) == (True, "plain", "torch")


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
    with pytest.raises(hopper.KernelFailed, match="the kernel of broken: ValueError: shared memory"):
        hopper.on_cuda("broken")()
    with pytest.raises(torch.OutOfMemoryError):
        hopper.on_cuda("hungry")()


def test_an_attempt_that_fails_is_unusable_and_other_errors_are_passed_on():
    def fail(error):
        raise error

    assert attempt(ONE_CPU, lambda: 3) == 3
    with pytest.raises(Unusable, match="^wrong$"):
        attempt(ONE_CPU, lambda: fail(WrongNumbers("wrong\nin the second line")))
    with pytest.raises(ZeroDivisionError):
        attempt(ONE_CPU, lambda: fail(ZeroDivisionError()))
