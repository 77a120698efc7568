"""One flag, one table, every parameter in exactly one group."""

import ast
import importlib
import re
import shutil
import sys
from typing import Any

import pytest
import torch

import aurora
from aurora import Param
from aurora.errors import Exit
from tests.conftest import OPTIMIZERS, ROOT, events, losses, run_code, start_process, tiny_table, train_here

HPARAMS = dict(
    lr=0.02, embed_lr=0.3, head_lr=0.004, vector_lr=0.01, aux_betas=(0.8, 0.95), aux_eps=1e-10, aux_weight_decay=0.1
)


def params():
    shapes = {"embed": (10, 4), "head": (10, 4), "matrix": (8, 4), "vector": (4,)}
    return [Param(f"{role}.weight", torch.nn.Parameter(torch.ones(shape)), role) for role, shape in shapes.items()]


def test_the_rules_of_the_tests_are_all_that_have_a_public_name():
    public = (getattr(aurora, name) for name in aurora.__all__)
    classes = {value for value in public if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)}
    assert {aurora.find_rule(name) for name in OPTIMIZERS} == classes - {aurora.MatrixOptimizer}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_build_gives_each_role_its_settings(name):
    optimizers = aurora.build(name, params(), HPARAMS)
    assert len(optimizers) == 1
    groups = {group["role"]: (type(o).__name__, group) for o in optimizers for group in o.param_groups}
    assert {role: group["lr"] for role, (_, group) in groups.items()} == {
        "embed": 0.3, "head": 0.004, "vector": 0.01, "matrix": 0.02,
    }  # fmt: skip
    assert groups["matrix"][0].lower() == name.replace("_", "")
    for role in ("embed", "head", "vector"):
        assert groups[role][1].get("algorithm", "adamw") == "adamw"
        assert groups[role][1]["betas"] == (0.8, 0.95) and groups[role][1]["weight_decay"] == 0.1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_hparam_types_name_what_the_constructor_takes(name):
    types = aurora.hparam_types(name)
    assert set(aurora.REQUIRED_HPARAMS) <= set(types)
    assert types["weight_decay"] is float
    if name != "adamw":
        assert types["momentum"] is float and types["nesterov"] is bool and types["polar_schedule"] is str
    assert ("balance_steps" in types) == (name == "aurora")


def test_an_argument_without_a_type_has_that_of_its_default(copied):
    package, folder = copied
    (folder / "untyped.py").write_text(
        "from .muon import Muon\nclass Untyped(Muon):\n    def __init__(self, params, lr, beta=0.9, k=(1,)): pass\n"
    )
    types = package.hparam_types("untyped")
    assert types["lr"] is Any and types["beta"] == int | float and types["k"] == tuple[Any, ...]


def test_a_rule_that_is_any_other_optimizer_gets_an_adamw_beside_it(copied):
    package, folder = copied
    (folder / "plain.py").write_text(
        "import torch\nclass Plain(torch.optim.SGD):\n    def __init__(self, params, lr: float):\n"
        "        super().__init__(params, lr=lr)\n"
    )
    rule, adamw = package.build(
        "plain", params(), {k: v for k, v in HPARAMS.items() if k in package.hparam_types("plain")}
    )
    assert [group["role"] for group in rule.param_groups] == ["matrix"]
    assert isinstance(adamw, torch.optim.AdamW) and [g["role"] for g in adamw.param_groups] == [
        "embed",
        "head",
        "vector",
    ]


def test_build_refuses_unknown_names_and_roles():
    with pytest.raises(ValueError, match="there is no aurora/optim/sgd.py"):
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


def rule_of(document):
    return re.search(r"```python\n(# aurora/optim/signum.py\n.*?)```", (ROOT / document).read_text(), re.DOTALL)[1]


@pytest.mark.slow
def test_rule_of_the_readme_trains_once_it_is_in_its_place(tiny_track, tmp_path):
    shutil.copy(ROOT / "train_gpt.py", tmp_path)
    shutil.copytree(ROOT / "aurora", tmp_path / "aurora")
    (tmp_path / "aurora" / "optim" / "signum.py").write_text(rule_of("README.md"))
    config, out = tmp_path / "mine.toml", tmp_path / "out"
    config.write_text(tiny_track.read_text() + tiny_table("signum"))
    arguments = ["--config", config, "--optimizer", "signum", "--set", "optimizer.signum.lr=0.001", "--out", out]
    process = start_process("train_gpt.py", *arguments, cwd=tmp_path, env={"PYTHONPATH": ""})
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    (_, first), *_, (_, last) = losses(out)
    assert last < first - 0.1
    sources = events(out)[0]["sources"]
    assert sources["aurora/optim/signum.py"] == rule_of("README.md") == rule_of("aurora/optim/README.md")
    assert "aurora/optim/muon.py" not in sources


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """The package under another name, and its folder."""
    shutil.copytree(ROOT / "aurora" / "optim", tmp_path / "optim_copy")
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("optim_copy"), tmp_path / "optim_copy"
    for name in [name for name in sys.modules if name.split(".")[0] == "optim_copy"]:
        del sys.modules[name]


TWO_RULES = """
from .muon import Muon
from .base import MatrixOptimizer
class A(Muon): pass
class Unfinished(MatrixOptimizer): pass
class B(Muon): pass
"""


@pytest.mark.parametrize(
    "name, message",
    [
        ("nonsense", "there is no optim_copy/nonsense.py; a rule is a file there that defines one torch.optim"),
        ("mouon", "there is no optim_copy/mouon.py; did you mean muon?"),
        ("Muon", "there is no optim_copy/Muon.py; did you mean muon?"),
        ("../muon", "there is no optim_copy/../muon.py"),
        ("__init__", "there is no optim_copy/__init__.py"),
        ("base", "optim_copy/base.py must define one torch.optim.Optimizer, but defines none"),
        ("two", "optim_copy/two.py must define one torch.optim.Optimizer, but defines A, B"),
    ],
)
def test_what_is_no_rule_is_refused_by_name(name, message, copied):
    package, folder = copied
    (folder / "two.py").write_text(TWO_RULES)
    with pytest.raises(ValueError, match=re.escape(message)):
        package.find_rule(name)


def test_a_table_without_a_rule_ends_with_one_line(tiny_track, tmp_path, capsys):
    config = tmp_path / "mine.toml"
    config.write_text(tiny_track.read_text() + tiny_table("mouon"))
    assert train_here(config, tmp_path, "--optimizer", "mouon") == Exit.CONFIG
    message = "[optimizer.mouon]: there is no aurora/optim/mouon.py; did you mean muon?\n"
    assert capsys.readouterr().err.endswith(message)


LAZY = """
import importlib, sys

def forget():
    for name in [name for name in sys.modules if name.split(".")[0] == "aurora"]:
        del sys.modules[name]

import aurora, aurora.optim
assert "torch" not in sys.modules
assert {"Aurora", "polar", "find_rule"} <= set(dir(aurora))

finds = {"registry", "params"}
matrix = finds | {"base", "rule", "loading", "polar", "sharding", "shapes", "stacks", "inputs", "update"}
matrix |= {"adamw_group", "fsdp"}
needed = {"adamw": finds, "muon": matrix, "normuon": matrix | {"rows"}, "unormuon": matrix | {"rows", "normuon"},
          "aurora": matrix | {"rows"}, "riemannian_aurora": matrix | {"rows"}}
for rule, modules in needed.items():
    forget()
    import aurora
    aurora.find_rule(rule)
    loaded = {name.split(".")[2] for name in sys.modules if name.startswith("aurora.optim.")}
    assert loaded == modules | {rule}, (rule, loaded)

for first in ("optim", "optim.aurora", "optim.polar", "optim.riemannian_aurora", "optim.registry"):
    forget()
    importlib.import_module(f"aurora.{first}")
    import aurora
    for _ in range(2):
        from aurora import Aurora, polar
        from aurora.optim import Aurora as same
        assert Aurora is same is aurora.Aurora is aurora.optim.Aurora is sys.modules["aurora.optim.aurora"].Aurora
        assert polar is aurora.polar is sys.modules["aurora.optim.polar"].polar
        assert aurora.optim.polar is sys.modules["aurora.optim.polar"]
"""


def test_importing_aurora_imports_no_torch_and_naming_a_rule_no_other_rule():
    run_code(LAZY, ROOT)


def test_public_names_are_there_and_type_checkers_see_them():
    tree = ast.parse((ROOT / "aurora" / "optim" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == aurora.optim._MODULE_OF and aurora.optim.__all__ == sorted(seen)
    for package in (aurora, aurora.optim):
        assert all(hasattr(package, name) for name in package.__all__)
        with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'Muom'"):
            package.Muom  # noqa: B018
