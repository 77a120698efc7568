"""What is edited in the model is what trains: no second body of a formula wins in silence."""

import contextlib
import functools
import importlib.util
import io
import sys
import types

import pytest
import torch

import train_gpt
from aurora.fast import mirror
from aurora.fast.float8 import Float8Linear
from tests.conftest import ROOT, events, train_here

SOURCE = (ROOT / "train_gpt.py").read_text()
# Heads of 128, where a GPU of the Hopper kind would use kernels.
SIZES = ["model.num_layers=1", "model.model_dim=128", "model.num_heads=1", "train.steps=6", "train.log_every=1"]
SIZES += ["train.batch_tokens=128", "train.micro_batch=2", "eval.tokens=128"]
LOSS = 'targets_BT.flatten(), reduction="sum")'
CAPPED = "self.softcap * z_BTV * (z_BTV.square() + self.softcap**2).rsqrt()"
SCALE = "config.model_dim // config.num_heads, config.attention_scale"
EDITS = {
    "activation": {"up.relu().square()": "F.leaky_relu(up, 0.1).square()"},
    "query and key scale": {"self.rotary(F.rms_norm(": "self.rotary(1.1 * F.rms_norm("},
    "soft cap": {CAPPED: "self.softcap * (z_BTV / self.softcap).tanh()"},
    "z-loss": {LOSS: f"{LOSS} + 1e-2 * self.capped_logits(x_BTD).logsumexp(-1).square().sum()"},
    "norm after the branch": {"self.mlp(self.mlp_norm(x_BTD))": "self.mlp_norm(self.mlp(x_BTD))"},
    "residual to the embedding": {"x_BTD = block(x_BTD)": "x_BTD = block(x_BTD) + 0.1 * self.embed(inputs_BT)"},
    "no bias in the MLP": {"Linear(C, D, bias=config.bias)": "Linear(C, D, bias=False)"},
    "rotary base": {"config.rope_base)": "10 * config.rope_base)"},
    "attention scale": {SCALE: SCALE.replace("config.attention", "0.5 * config.attention")},
    "init": {"math.sqrt(0.33 / layer": "math.sqrt(0.5 / layer"},
    "head tied to the embedding": {"    def trunk": "        self.head.weight = self.embed.weight\n\n    def trunk",
                                   '0.0 if name == "head" else math': "math"},
    "MLP width": {"config.mlp_expansion * config.model_dim": "3 * config.model_dim"},
    "gated by another function": {"F.silu(": "F.gelu("},
    "a helper that the model calls": {"up.relu().square()": "squared(up)",
                                      "class RMSNorm(": "def squared(x):\n    return x.square()\n\n\nclass RMSNorm("},
    "another module under a known name": {"import torch.nn.functional as F\n": "import tests.functional as F\n"},
}  # fmt: skip


def load(tmp_path, name, source):
    """A train_gpt.py of that text, as a module."""
    path = tmp_path / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(module, tiny_track, out, *overrides):
    """Training losses, run event and console of a run."""
    argv = ["--config", str(tiny_track), "--optimizer", "muon", "--out", str(out)]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert module.main([*argv, *(word for value in (*SIZES, *overrides) for word in ("--set", value))]) == 0
    record = events(out)
    return [event["train_loss"] for event in record if event["event"] == "train"], record[0], said.getvalue()


def train_plainly(module, *args):
    """By the model itself, whatever prepare() chooses."""
    prepare = module.prepare
    module.prepare = lambda run, forward_backward: (prepare(run, forward_backward), run.model)[1]
    try:
        return train(module, *args)[0]
    finally:
        module.prepare = prepare


def assert_is_edited(start, said):
    assert start["forward"] == "plain" and start["model_edits"] and not start["compiled"]
    assert f"model edited ({start['model_edits'][0]}" in said and "plain forward" in said


@pytest.fixture(scope="module", params=["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def dtype(request):
    return f"model.activation_dtype={request.param}"


@pytest.fixture(scope="module")
def unedited(dtype, tiny_track, tmp_path_factory):
    """Losses of the unedited model, with a plain and a gated MLP."""
    torch.set_num_threads(1)
    found = {}
    for mlp in ("relu2", "swiglu"):
        out = tmp_path_factory.mktemp(mlp)
        found[mlp], start, said = train(train_gpt, tiny_track, out, dtype, f"model.mlp={mlp}")
        assert start["forward"] == "fast" and start["model_edits"] == [] and "model edited" not in said
    return found


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_model_is_trained_as_edited(unedited, dtype, tiny_track, tmp_path, edit):
    source = SOURCE
    for old, new in EDITS[edit].items():
        assert source.count(old) == 1
        source = source.replace(old, new)
    module = load(tmp_path, "edited", source)
    mlp = "swiglu" if edit.startswith("gated") else "relu2"
    options = dtype, f"model.mlp={mlp}"
    losses, start, said = train(module, tiny_track, tmp_path / "run", *options)
    assert_is_edited(start, said)
    assert losses == train_plainly(module, tiny_track, tmp_path / "plain", *options)
    assert len(losses) == 6 and losses[-1] != unedited[mlp][-1]


def test_the_plain_model_is_what_the_unedited_run_trains_up_to_rounding(unedited, dtype, tiny_track, tmp_path):
    tolerance = 1e-4 if "float32" in dtype else 5e-3
    plain = train_plainly(train_gpt, tiny_track, tmp_path, dtype)
    assert plain == pytest.approx(unedited["relu2"], rel=tolerance)


def leaky(self, x):
    return self.down(torch.nn.functional.leaky_relu(self.up(x), 0.1).square())


class OtherLinear(torch.nn.Linear):
    pass


PATCHES = {
    "forward of one module": lambda model: setattr(model.blocks[0].mlp, "forward", leaky.__get__(model.blocks[0].mlp)),
    "another method of the model": lambda model: setattr(model, "loss", model.loss),
    "forward hook": lambda model: model.blocks[0].mlp.register_forward_hook(lambda module, args, out: 1.5 * out),
    "forward pre-hook": lambda model: model.head.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,)),
    "gradient hook": lambda model: model.blocks[0].register_full_backward_hook(lambda module, below, above: None),
    "submodule of another class": lambda model: setattr(model.blocks[0].mlp, "up", OtherLinear(128, 512)),
    "torch's own linear layer": lambda model: setattr(model.blocks[0].mlp, "down", torch.nn.Linear(512, 128)),
    "module that was not there": lambda model: setattr(model.blocks[0], "dropout", torch.nn.Dropout(0.1)),
    "layer in float8 where none belongs": lambda model: setattr(model.blocks[0].attention, "q", Float8Linear(128, 128)),
    "known layer in another's place": lambda model: setattr(model, "head_norm", train_gpt.Linear(128, 128)),
    "parametrized weight": lambda model: torch.nn.utils.parametrizations.weight_norm(model.blocks[0].mlp.up),
}


@pytest.mark.parametrize("patch", PATCHES)
def test_a_patched_or_hooked_model_is_edited(tiny_track, patch):
    model = train_gpt.GPT(train_gpt_config(tiny_track))
    assert mirror.edits(model) == []
    PATCHES[patch](model)
    assert all(any(word in finding for word in ("patched", "hook", " is a ")) for finding in mirror.edits(model))
    assert mirror.edits(model)


def train_gpt_config(tiny_track):
    from aurora.config import load_config

    return load_config(tiny_track, "muon", SIZES).model


def test_a_hook_on_all_modules_is_an_edit(tiny_track):
    model = train_gpt.GPT(train_gpt_config(tiny_track))
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
    assert mirror.edits(model) == ["a hook is on all modules"]
    hook.remove()
    assert mirror.edits(model) == []


def wrapped(original):
    return functools.wraps(original)(lambda *args: 1.1 * original(*args))


def with_default(original):
    code = original.__code__
    return types.FunctionType(code, original.__globals__, code.co_name, (torch.ones(2, 128),), original.__closure__)


@pytest.mark.parametrize("change", [lambda f: leaky, wrapped, with_default, torch.autocast("cpu", torch.bfloat16)])
@pytest.mark.parametrize("name", ["MLP.forward", "GPT.loss", "Rotary.__init__"])
def test_a_patched_class_is_edited(tiny_track, monkeypatch, name, change):
    cls, method = name.split(".")
    model = train_gpt.GPT(train_gpt_config(tiny_track))
    monkeypatch.setattr(getattr(train_gpt, cls), method, change(getattr(getattr(train_gpt, cls), method)))
    assert mirror.edits(model) == [f"{cls} is not what its file says"]


def test_a_method_that_was_not_there_is_an_edit(tiny_track, monkeypatch):
    model = train_gpt.GPT(train_gpt_config(tiny_track))
    monkeypatch.setattr(train_gpt.MLP, "__call__", leaky, raising=False)
    assert mirror.edits(model) == ["MLP is not what its file says"]


STATEMENTS = {
    "a class within a condition": "if True:\n    class MLP(MLP):\n        pass\n",
    "a class defined again": "class MLP(MLP):\n    pass\n",
    "a function of torch's replaced": "F.relu = F.leaky_relu\n",
    "a method replaced": "MLP.forward = lambda self, x: self.down(self.up(x).relu())\n",
    "a call": "setattr(MLP, 'forward', lambda self, x: self.down(self.up(x).relu()))\n",
    "a star import": "from math import *\n",
}


@pytest.mark.parametrize("statement", STATEMENTS)
def test_a_statement_at_the_top_that_may_change_the_model_is_an_edit(tiny_track, tmp_path, statement, monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "relu", torch.nn.functional.relu)  # put back afterwards
    text = SOURCE.replace("# Schedule\n", f"{STATEMENTS[statement]}\n# Schedule\n")
    model = load(tmp_path, "changed", text).GPT(train_gpt_config(tiny_track))
    assert mirror.edits(model)[0] in ("MLP is edited", "other statements is edited")


def test_a_model_without_a_file_is_edited():
    namespace = {"__name__": "notebook"}
    exec("import torch\nclass GPT(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n", namespace)
    assert mirror.edits(namespace["GPT"]()) == ["GPT has no source file (KeyError)"]


def test_validation_is_without_dropout_and_changes_nothing(tiny_track, tmp_path):
    dropped = SOURCE.replace("up.relu().square()", "F.dropout(up.relu().square(), 0.5, self.training)")
    found = []
    for name in ("a", "b"):
        module = load(tmp_path, "dropout", dropped)
        original = module.validate

        def validate_twice(run, model, original=original):
            state = torch.get_rng_state()
            losses = original(run, model), original(run, model)
            assert losses[0] == losses[1] and torch.equal(state, torch.get_rng_state()) and run.model.training
            return losses[0]

        module.validate = validate_twice
        found.append(train(module, tiny_track, tmp_path / name)[0])
    assert found[0] == found[1], "a seed means the same masks"


def test_a_monkeypatched_forward_trains(unedited, dtype, tiny_track, tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt.MLP, "forward", leaky)
    losses, start, said = train(train_gpt, tiny_track, tmp_path / "run", dtype)
    assert_is_edited(start, said)
    assert losses == train_plainly(train_gpt, tiny_track, tmp_path / "plain", dtype) != unedited["relu2"]


def test_a_subclass_of_the_model_is_edited(tiny_track):
    class Other(train_gpt.GPT):
        pass

    assert mirror.edits(Other(train_gpt_config(tiny_track)))


def reformatted(source):
    """The same code, with other comments, docstrings, line breaks within brackets and blank lines."""
    changes = {
        '"""Weights are float32; the matmul runs in the dtype of its input."""': '"""Other words.\n\n    And more."""',
        "z_BTV = self.head(x_BTD).float()\n": "z_BTV = self.head(\n            x_BTD\n        ).float()  # another\n\n",
        "forward(self, x: Tensor) -> Tensor:\n": "forward(\n        self,\n        x: Tensor,\n    ) -> Tensor:\n",
    }  # fmt: skip
    for old, new in changes.items():
        source = source.replace(old, new)
    return "# first line\n" + source


def test_a_reformatted_and_recommented_model_is_not_edited(unedited, dtype, tiny_track, tmp_path):
    text = reformatted(SOURCE)
    assert text != SOURCE and text.count("And more") == text.count("# another") == 1
    losses, start, said = train(load(tmp_path, "reformatted", text), tiny_track, tmp_path / "run", dtype)
    assert start["forward"] == "fast" and start["model_edits"] == [] and "model edited" not in said
    assert losses == unedited["relu2"]


def test_code_around_the_model_may_change(tiny_track, tmp_path):
    old = "vars(config.schedule), config.train.steps, config.warmup_steps)"
    assert SOURCE.count(old) == 1
    module = load(tmp_path, "other_schedule", SOURCE.replace(old, old.replace("config.warmup_steps", "0")))
    assert mirror.edits(module.GPT(train_gpt_config(tiny_track))) == []


def test_the_mirrored_model_is_the_one_in_train_gpt():
    """If this fails because the model was changed for everybody: see the top of aurora/fast/mirror.py."""
    assert mirror.hashes(mirror.definitions_of(SOURCE)) == mirror.MIRRORED


@pytest.mark.parametrize("name", ["F", "Float8Linear"])
def test_an_import_rebound_at_run_time_is_an_edit(tiny_track, monkeypatch, name):
    model = train_gpt.GPT(train_gpt_config(tiny_track))
    monkeypatch.setattr(train_gpt, name, object())
    assert mirror.edits(model)[0] == f"{name} is not what its file says"


def test_a_model_that_is_hooked_while_it_trains_stops_the_run(tiny_track, tmp_path, monkeypatch, capsys):
    prepare = train_gpt.prepare

    def prepare_and_hook(run, *rest):
        model = prepare(run, *rest)
        run.model.blocks[0].mlp.register_forward_hook(lambda module, args, out: 2 * out)
        return model

    monkeypatch.setattr(train_gpt, "prepare", prepare_and_hook)
    assert train_here(tiny_track, tmp_path) == 2
    assert "blocks.0.mlp has a hook since training began" in capsys.readouterr().err
