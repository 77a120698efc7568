"""The head in float8 against matmuls in float64 of numbers rounded by hand, its runs, and where it is refused."""

import dataclasses
import json

import pytest
import torch

import train_gpt
from aurora.config import load_config
from aurora.errors import Exit, HarnessError
from aurora.fast import functions
from aurora.fast.float8 import check_float8, float8_linear
from aurora.fast.forward import FastForward
from aurora.trainer.identity import task_hash
from scripts.verification.checks import verify_folder
from tests.conftest import ROOT, events, losses, train_here

FLOAT8 = ["--set", "model.head_dtype=float8"]


def rounded(x, largest, digits, lowest_exponent):
    """x as float8 with one scale holds it, in float64: so many binary digits behind the point, ties to even."""
    scale = (x.abs().max().float() / largest).double()
    scaled = x.double() / scale
    step = 2.0 ** (scaled.abs().log2().floor().clamp(min=lowest_exponent) - digits)
    return (scaled / step).round() * step * scale


def e4m3(x):
    return rounded(x, 448, 3, -6)


def e5m2(x):
    return rounded(x, 57344, 2, -14)


@pytest.mark.parametrize("part_elements", [100, 2**25])
@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-5), (torch.bfloat16, 2**-8)])
def test_output_and_gradients_equal_matmuls_of_rounded_numbers_in_float64(monkeypatch, dtype, rtol, part_elements):
    monkeypatch.setattr(functions, "PART_ELEMENTS", part_elements)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    x, weight, bias = normal(3, 7, 48), normal(80, 48, scale=0.02), normal(80)
    grad = normal(3, 7, 80, scale=1e-6) * normal(3, 7, 80).exp()  # small and of many magnitudes, as a loss gives it
    for leaf in (x, weight, bias):
        leaf.requires_grad_()
    z = float8_linear(x, weight, bias)
    z.backward(grad)
    X, W, G = x.detach().flatten(0, 1), weight.detach(), grad.flatten(0, 1)
    expected = {
        "output": (z.flatten(0, 1), e4m3(X) @ e4m3(W).T + bias.detach().double()),
        "gradient of x": (x.grad.flatten(0, 1), e5m2(G) @ e4m3(W)),
        "gradient of W": (weight.grad, G.double().T @ X.double()),
        "gradient of b": (bias.grad, G.double().sum(0)),
    }
    for name, (ours, exact) in expected.items():
        assert ours.dtype == dtype
        error = (ours.double() - exact).abs()
        assert (error <= rtol * exact.abs() + 1e-6 * exact.abs().max()).all(), name
    plain = X.double() @ W.double().T + bias.detach().double()
    assert (z.flatten(0, 1).double() - plain).abs().max() > 0.01 * plain.std(), "float8 is coarser than that"


@pytest.mark.parametrize("zero", ["x", "weight", "grad"])
def test_zeros_give_zeros_and_finite_gradients(zero):
    tensors = {"x": torch.ones(5, 16), "weight": torch.ones(32, 16), "grad": torch.ones(5, 32)}
    tensors[zero].zero_()
    x, weight = tensors["x"].requires_grad_(), tensors["weight"].requires_grad_()
    z = float8_linear(x, weight, torch.zeros(32))
    z.backward(tensors["grad"])
    expected = tensors["x"] @ tensors["weight"].T, tensors["grad"] @ tensors["weight"], tensors["grad"].T @ tensors["x"]
    for ours, exact in zip((z, x.grad, weight.grad), expected, strict=True):
        torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_so_for_the_guard_to_see(bad):
    x = torch.ones(5, 16)
    x[2, 3] = bad
    assert not float8_linear(x, torch.ones(32, 16), torch.zeros(32))[2].isfinite().any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_models_head_is_the_tested_layer_and_the_fast_forward_uses_it(tiny_track, dtype):
    settings = ["model.head_dtype=float8", f"model.activation_dtype={dtype}", "model.bias=false"]
    config = load_config(tiny_track, "muon", settings).model
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (2, config.seq_len), generator=generator)
    model, standard = train_gpt.GPT(config), train_gpt.GPT(dataclasses.replace(config, head_dtype="activation"))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    standard.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, config.model_dim, generator=generator).to(model.activation_dtype)
    assert torch.equal(model.head(x), float8_linear(x, model.head.weight.type_as(x), None))
    loss = model(tokens, tokens)
    assert loss != standard(tokens, tokens)
    assert FastForward(model)(tokens, tokens).item() == pytest.approx(loss.item(), rel=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_runs_learn_as_with_the_standard_head_repeat_and_are_a_task_of_their_own(tiny_track, tmp_path, dtype):
    arguments = ["--optimizer", "muon", "--set", f"model.activation_dtype={dtype}"]
    for name, more in (("standard", []), ("float8", FLOAT8), ("again", FLOAT8)):
        assert train_here(tiny_track, tmp_path / name, *arguments, *more) == 0
    standard, float8, again = (losses(tmp_path / name) for name in ("standard", "float8", "again"))
    assert float8 == again != standard
    assert float8[-1][1] < float8[0][1] - 0.5
    for (_, ours), (_, theirs) in zip(float8, standard, strict=True):
        assert ours == pytest.approx(theirs, rel=0.02)
    starts = [events(tmp_path / name)[0] for name in ("standard", "float8")]
    assert [start["config"]["model"]["head_dtype"] for start in starts] == ["activation", "float8"]
    assert starts[0]["task_hash"] != starts[1]["task_hash"]
    assert verify_folder(tmp_path / "float8")[0].reasons == []


def test_records_from_before_a_setting_keep_their_task_hash():
    paths = sorted(ROOT.glob("results/**/*.jsonl"))
    assert paths
    for path in paths:
        with open(path) as lines:
            start = json.loads(next(lines))
        start["config"]["model"] = {"head_dtype": "activation", "bias": True} | start["config"]["model"]
        assert task_hash(start["config"], start["data"]["stream_id"]) == start["task_hash"], path


@pytest.mark.parametrize(
    "override, message",
    [
        ("model.vocab_size=72", "model.vocab_size must be a multiple of 16 for"),
        ("model.model_dim=40", "model.model_dim must be a multiple of 16 for"),
    ],
)
def test_sizes_that_float8_cannot_are_refused_for_it_alone(tiny_track, tmp_path, capsys, override, message):
    assert train_here(tiny_track, tmp_path, "--set", override, *FLOAT8) == Exit.CONFIG
    error = capsys.readouterr().err
    assert message in error and 'model.head_dtype = "float8" (or set that to "activation"), got' in error
    load_config(tiny_track, "aurora", [override])


def test_torch_that_cannot_is_refused_before_anything_is_written(tiny_track, tmp_path, capsys, monkeypatch):
    monkeypatch.delattr(torch, "_scaled_mm")
    assert train_here(tiny_track, tmp_path / "out", *FLOAT8) == Exit.CONFIG
    error = capsys.readouterr().err
    assert error.startswith('error: model.head_dtype = "float8" cannot be computed on cpu: torch ')
    assert error.endswith('; set it to "activation"\n') and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert train_here(tiny_track, tmp_path / "out", "--set", "train.steps=5") == 0, "other heads need no float8"


@pytest.mark.parametrize(
    "kind, reason", [("cuda", "it has CUDA capability 8.6, float8 takes 8.9"), ("mps", "no float8")]
)
def test_devices_that_cannot_are_refused(monkeypatch, kind, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an older GPU")
    with pytest.raises(HarnessError, match=reason) as caught:
        check_float8(torch.device(kind))
    assert caught.value.reason == Exit.CONFIG
