"""The model against an independent plain implementation, and what it must never do."""

import dataclasses

import pytest
import torch

import train_gpt
from aurora.config import load_config
from aurora.fast import functions
from aurora.fast.forward import FastForward
from aurora.trainer.memory import host_bytes, memory_estimate_gib
from aurora.trainer.optimizers import build_optimizers
from scripts.verification.checks import verify_run
from tests import reference
from tests.conftest import ROOT, train_here


def model_with_random_weights(config):
    """Zero-initialised projections would hide most of the model: give every parameter some weight."""
    model = train_gpt.GPT(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    return model


TINY = {
    "tiny": [],
    "tiny with SwiGLU": ["model.mlp=swiglu", "model.mlp_expansion=3"],
    "tiny without biases": ["model.bias=false"],
}


@pytest.fixture(params=[*TINY, "gpt2_small, fewer and narrower layers"])
def config(request, tiny_track):
    if request.param in TINY:
        return load_config(tiny_track, "muon", TINY[request.param]).model
    config = load_config(ROOT / "configs/gpt2_small.toml", "muon").model
    return dataclasses.replace(config, num_layers=2, model_dim=256, num_heads=2, seq_len=96, activation_dtype="float32")


def tokens_for(config, batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, config.seq_len), generator=generator)


def test_logits_equal_plain_implementation(config):
    model, tokens = model_with_random_weights(config), tokens_for(config)
    ours = model.logits(tokens)
    plain = reference.gpt_logits(model.state_dict(), config, tokens)
    assert plain.std() > 0.1
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)


def test_loss_and_gradients_equal_plain_implementation_in_float64(config):
    model, tokens = model_with_random_weights(config), tokens_for(config)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    loss = model(inputs, targets)
    loss.backward()
    weights = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    plain = reference.gpt_loss(weights, config, inputs, targets)
    plain.backward()
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    for name, p in model.named_parameters():
        error = (p.grad.double() - weights[name].grad).abs().max() / weights[name].grad.abs().max()
        assert error < 2e-4, name


@pytest.mark.parametrize("part_elements", [1, 500, 2**25])
def test_loss_and_gradient_of_soft_capped_logits_equal_autograds_in_float64(monkeypatch, part_elements):
    monkeypatch.setattr(functions, "PART_ELEMENTS", part_elements)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(40, 97, generator=generator) * 20
    targets = torch.randint(97, (40,), generator=generator)
    exact = z.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(15 * exact / (exact**2 + 225).sqrt(), targets, reduction="sum")
    (expected / 7).backward()
    z.requires_grad_()
    logits = z * 1
    loss = functions.SoftCapCrossEntropy.apply(logits, targets, 15.0)
    (loss / 7).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(z.grad.double(), exact.grad, atol=1e-7, rtol=1e-5)
    assert torch.equal(logits, z.grad), "the gradient takes the logits' place"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e-3])  # the second where epsilon counts
def test_norm_and_its_gradients_equal_autograds_in_float64(dtype, scale):
    generator = torch.Generator().manual_seed(0)
    whole = (torch.randn(5, 3, 40, generator=generator) * scale).to(dtype)
    x, grad = whole[:, :2].requires_grad_(), torch.randn(5, 2, 40, generator=generator).to(dtype)
    gain = torch.randn(40, generator=generator).requires_grad_()
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, gain)]
    expected = plain_norm(exact[0]) * exact[1]
    ours = functions.rms_norm(x, gain)
    assert ours.dtype == dtype
    found = [ours, *torch.autograd.grad(ours, [x, gain], grad)]
    for value, exact_value in zip(found, [expected, *torch.autograd.grad(expected, exact, grad.double())], strict=True):
        error = (value.double() - exact_value).norm() / exact_value.norm()
        assert error < (1e-6 if value.dtype == torch.float32 else 2**-8)


def plain_norm(x):
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_rotated_norm_of_queries_and_keys_and_its_gradient_equal_autograds_in_float64(dtype, scale):
    head_dim, base = 16, 1024
    rotary, generator = train_gpt.Rotary(head_dim, seq_len=12, base=base), torch.Generator().manual_seed(0)
    whole = (torch.randn(2, 10, 3, 4, head_dim, generator=generator) * scale).to(dtype)
    x, grad = whole.unbind(2)[1].requires_grad_(), torch.randn(2, 10, 4, head_dim, generator=generator).to(dtype)
    exact = x.detach().double().requires_grad_()
    frequencies = [base ** (-i / (head_dim // 4 - 1)) for i in range(head_dim // 4)] + [0.0] * (head_dim // 4)
    angles = torch.arange(10).double()[:, None, None] * torch.tensor(frequencies).double()
    x1, x2 = plain_norm(exact).chunk(2, dim=-1)
    expected = torch.cat([x1 * angles.cos() + x2 * angles.sin(), x2 * angles.cos() - x1 * angles.sin()], dim=-1)
    (wanted,) = torch.autograd.grad(expected, exact, grad.double())
    cos, sin = rotary.cos_T1F[:10], rotary.sin_T1F[:10]
    tables = torch.cat([cos, cos], -1), torch.cat([sin, -sin], -1)
    for ours in (rotary(torch.nn.functional.rms_norm(x, (head_dim,))), functions.RotatedRMSNorm.apply(x, *tables)):
        assert ours.dtype == dtype
        (found,) = torch.autograd.grad(ours, x, grad)
        for value, exact_value in ((ours, expected), (found, wanted)):
            error = (value.double() - exact_value).norm() / exact_value.norm()
            assert error < (1e-6 if dtype == torch.float32 else 2**-6)


def test_later_tokens_do_not_change_earlier_logits(config):
    model, tokens = model_with_random_weights(config), tokens_for(config)
    changed = tokens.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % config.vocab_size
    before, after = model.logits(tokens), model.logits(changed)
    torch.testing.assert_close(before[:, :20], after[:, :20], atol=1e-5, rtol=0)
    assert not torch.allclose(before[:, 20:], after[:, 20:], atol=1e-3)


def test_logits_are_soft_capped(config):
    model = model_with_random_weights(config)
    with torch.no_grad():
        model.head.weight.mul_(1e4)
    assert model.logits(tokens_for(config)).max() <= config.logit_softcap * (1 + 2**-22)  # a rounding or two above


def test_init_is_the_benchmarks_and_depends_on_the_seed_alone(tiny_track):
    config = dataclasses.replace(load_config(tiny_track, "muon").model, vocab_size=4096, model_dim=256)
    model, same, other = (train_gpt.GPT(config) for _ in range(3))
    model.init_weights(5)
    torch.manual_seed(99)
    same.init_weights(5)
    other.init_weights(6)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    assert not torch.equal(model.embed.weight, other.embed.weight)
    for name, p in model.named_parameters():
        if name in ("head.weight",) or name.endswith(("attention.out.weight", "mlp.down.weight", "bias")):
            assert not p.any(), name
        elif name.endswith("gain"):
            assert torch.equal(p, torch.ones_like(p))
        else:
            expected = 1.0 if name == "embed.weight" else (0.33 / p.shape[1]) ** 0.5
            assert p.std().item() == pytest.approx(expected, rel=0.02), name
    tokens = tokens_for(config)
    assert model(tokens, tokens).item() / tokens.numel() == pytest.approx(torch.tensor(4096.0).log().item(), rel=1e-6)


def test_roles_cover_every_parameter_and_leave_no_matrix_out(config):
    model = train_gpt.GPT(config)
    roles = {param.name: param.role for param in model.roles()}
    assert set(roles) == {name for name, _ in model.named_parameters()}
    for name, p in model.named_parameters():
        expected = {"embed.weight": "embed", "head.weight": "head"}.get(name, "matrix" if p.ndim == 2 else "vector")
        assert roles[name] == expected


def test_bfloat16_activations_leave_weights_and_logits_in_float32(config):
    model = model_with_random_weights(dataclasses.replace(config, activation_dtype="bfloat16"))
    tokens = tokens_for(config)
    logits = model.logits(tokens)
    assert logits.dtype == torch.float32 and all(p.dtype == torch.float32 for p in model.parameters())
    torch.testing.assert_close(logits, reference.gpt_logits(model.state_dict(), config, tokens), atol=0.15, rtol=0.05)


@pytest.mark.parametrize("overrides", [[], ["model.mlp=swiglu", "model.mlp_expansion=16"]])
def test_memory_estimate_is_what_autograd_keeps(overrides):
    config = load_config(ROOT / "configs/quick.toml", "muon", overrides)
    model = train_gpt.GPT(config.model)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept_bytes = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept_bytes[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = tokens_for(config.model, batch=4)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = FastForward(model)(tokens, tokens)
    optimizers = build_optimizers(config, model.roles())
    gib = memory_estimate_gib(config, model.roles(), optimizers, world_size=1, micro_batch=4)
    assert loss.requires_grad and gib["activations"] * 2**30 == pytest.approx(sum(kept_bytes.values()), rel=0.1)
    assert gib["loss"] * 2**30 == 5 * 4 * tokens.numel() * 256
    assert gib["weights"] * 2**30 == 4 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name, text", [("memory.max", "4096"), ("memory/memory.limit_in_bytes", "4096\n")])
def test_memory_of_the_host_is_what_its_container_may_use(tmp_path, name, text):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("max")
    assert host_bytes(tmp_path) == host_bytes(tmp_path / "none") > 4096
    (tmp_path / name).write_text(text)
    assert host_bytes(tmp_path) == 4096


def test_projection_init_draws_what_is_zero_otherwise_and_changes_nothing_else(tiny_track):
    config = dataclasses.replace(load_config(tiny_track, "muon").model, model_dim=256)
    zero, drawn = train_gpt.GPT(config), train_gpt.GPT(config)
    zero.init_weights(5)
    drawn.init_weights(5, 2.0)
    for (name, weight), other in zip(zero.named_parameters(), drawn.parameters(), strict=True):
        if name.endswith(("attention.out.weight", "mlp.down.weight")):
            assert not weight.any(), name
            assert other.std().item() * other.shape[1] ** 0.5 == pytest.approx(2, rel=0.02), name
        else:
            assert torch.equal(weight, other), name


def test_a_rule_that_keeps_norms_needs_weights_to_begin_with(tiny_track, tmp_path, capsys):
    hyperball = ("--optimizer", "muon", "--set", "optimizer.muon.hyperball=true", "--set", "optimizer.muon.lr=0.02")
    assert train_here(tiny_track, tmp_path, *hyperball) == 2
    assert "attention.out and mlp.down start from 0; set optimizer.muon.projection_init" in capsys.readouterr().err
    assert train_here(tiny_track, tmp_path, *hyperball, "--set", "optimizer.muon.projection_init=1") == 0
    (record,) = tmp_path.glob("*.jsonl")
    assert verify_run(record).reasons == []
    for other in ('"projection_init": 0.5', '"projection_init": 0.0'):
        changed = tmp_path / "changed" / record.name
        changed.parent.mkdir(exist_ok=True)
        changed.write_text(record.read_text().replace('"projection_init": 1.0', other))
        assert "projection_init" in " ".join(verify_run(changed).reasons)
