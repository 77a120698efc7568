"""One flag, one table, every parameter in exactly one group."""

import re

import pytest
import torch

import aurora
from aurora import Param
from tests.conftest import OPTIMIZERS, ROOT, losses, tiny_table, train_here

HPARAMS = dict(
    lr=0.02, embed_lr=0.3, head_lr=0.004, vector_lr=0.01, aux_betas=(0.8, 0.95), aux_eps=1e-10, aux_weight_decay=0.1
)


def params():
    shapes = {"embed": (10, 4), "head": (10, 4), "matrix": (8, 4), "vector": (4,)}
    return [Param(f"{role}.weight", torch.nn.Parameter(torch.ones(shape)), role) for role, shape in shapes.items()]


def test_the_test_optimizers_are_all_rules():
    assert list(aurora.RULES) == OPTIMIZERS


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_build_gives_each_role_its_settings(name):
    optimizers = aurora.build(name, params(), HPARAMS)
    groups = {group["role"]: (type(o).__name__, group) for o in optimizers for group in o.param_groups}
    assert {role: group["lr"] for role, (_, group) in groups.items()} == {
        "embed": 0.3, "head": 0.004, "vector": 0.01, "matrix": 0.02,
    }  # fmt: skip
    assert groups["matrix"][0].lower() == name.replace("_", "")
    for role in ("embed", "head", "vector"):
        assert groups[role][0] == "AdamW"
        assert groups[role][1]["betas"] == (0.8, 0.95) and groups[role][1]["weight_decay"] == 0.1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_hparam_types_name_what_the_constructor_takes(name):
    types = aurora.hparam_types(name)
    assert set(aurora.REQUIRED_HPARAMS) <= set(types)
    assert types["weight_decay"] is float
    if name != "adamw":
        assert types["momentum"] is float and types["nesterov"] is bool and types["polar_schedule"] is str
    assert ("balance_steps" in types) == (name == "aurora")


def test_build_refuses_unknown_names_and_roles():
    with pytest.raises(ValueError, match="unknown optimizer 'sgd'.*adamw, muon"):
        aurora.build("sgd", params(), HPARAMS)
    with pytest.raises(ValueError, match="gate.weight has role 'gate'"):
        aurora.build("muon", [*params(), Param("gate.weight", torch.nn.Parameter(torch.ones(2)), "gate")], HPARAMS)


def test_exact_cover_names_missing_and_doubled_parameters():
    everything = params()
    optimizers = aurora.build("muon", everything, HPARAMS)
    aurora.check_exact_cover(everything, optimizers)
    extra = Param("extra", torch.nn.Parameter(torch.ones(2)), "vector")
    with pytest.raises(ValueError, match="extra is in 0 optimizer groups"):
        aurora.check_exact_cover([*everything, extra], optimizers)
    doubled = [*optimizers, aurora.Muon([everything[2].tensor], lr=0.1)]
    with pytest.raises(ValueError, match="matrix.weight is in 2 optimizer groups"):
        aurora.check_exact_cover(everything, doubled)
    with pytest.raises(ValueError, match="1 parameters of the optimizers are not in the model"):
        aurora.check_exact_cover(everything[1:], optimizers)


def test_rule_of_the_readme_trains(tiny_track, tmp_path, monkeypatch):
    code = re.search(r"```python\n(# aurora/signum.py\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    names = {}
    exec(code, names)
    monkeypatch.setitem(aurora.RULES, "signum", names["Signum"])
    config = tmp_path / "mine.toml"
    config.write_text(tiny_track.read_text() + tiny_table("signum"))
    assert train_here(config, tmp_path, "--optimizer", "signum", "--set", "optimizer.signum.lr=0.001") == 0
    (_, first), *_, (_, last) = losses(tmp_path)
    assert last < first - 0.1
