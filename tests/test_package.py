"""The package aurora_optim that others install, and what its files say of it."""

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_string

import pytest

import aurora
from tests.conftest import ROOT, run_code

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def found(pattern, name):
    """The first match of a pattern in a file of the project."""
    return re.search(pattern, (ROOT / name).read_text(), re.MULTILINE)


def test_version_date_and_licence_are_the_same_everywhere():
    version, date = found(r"^## \[(\d.*)\] - (.*)$", "CHANGELOG.md").groups()
    assert version == aurora.__version__ == aurora.optim.__version__ == found("^version: (.*)$", "CITATION.cff")[1]
    assert "version" in PROJECT["dynamic"] and date == found("^date-released: (.*)$", "CITATION.cff")[1]
    assert PROJECT["license"] == found("^license: (.*)$", "CITATION.cff")[1] == "MIT"
    (author,) = PROJECT["authors"]
    assert found("^MIT License$", "LICENSE") and found(rf"^Copyright \(c\) \d+ {author['name']}$", "LICENSE")
    assert found("  - name: (.*)$", "CITATION.cff")[1] == author["name"]


def test_extras_that_scripts_and_documents_name_exist():
    files = [ROOT / "README.md", *ROOT.glob("*/README.md"), *(ROOT / "scripts").rglob("*.sh")]
    files += [path for folder in ("aurora", "scripts", "data") for path in (ROOT / folder).rglob("*.py")]
    named = [re.findall(r"(?:'\.\[|^setup )([\w,-]+)(?:\]'|$)", path.read_text(), re.MULTILINE) for path in files]
    extras = {extra for names in named for name in names for extra in name.split(",")}
    assert extras == set(PROJECT["optional-dependencies"])


TRAINS = """
import sys
import aurora_optim
assert "torch" not in sys.modules
import torch
from aurora_optim import Aurora, build, find_rule, hparam_types
from aurora_optim.polar import polar
layer = torch.nn.Linear(4, 8, bias=False)
x, y = torch.randn(64, 4), torch.randn(64, 8)
optimizer, losses = Aurora(layer.parameters(), lr=0.02), []
for _ in range(20):
    loss = (layer(x) - y).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < losses[0], losses
assert find_rule("aurora") is Aurora and hparam_types("aurora")["variant"] is str
assert callable(polar) and "aurora" not in sys.modules
"""


@pytest.mark.slow
def test_the_optimizers_train_as_aurora_optim(tmp_path):
    shutil.copytree(ROOT / "aurora" / "optim", tmp_path / "aurora_optim")
    run_code(TRAINS, tmp_path)


TYPED = """
from typing import assert_type

import torch

from aurora_optim import Aurora, Muom, Muon, build  # type: ignore[attr-defined]
from aurora_optim.polar import SCHEDULES, polar

layer = torch.nn.Linear(4, 8)
assert_type(Aurora([("w", layer.weight)], lr=0.02), Aurora)
assert_type(Muon(layer.parameters(), lr=0.02).step(), torch.Tensor | None)
assert_type(build("muon", [], {}), list[torch.optim.Optimizer])
assert_type(polar(torch.ones(1, 4, 2), SCHEDULES["svd"]), torch.Tensor)
Aurora(layer.parameters(), lr="0.02")  # type: ignore[arg-type]
"""


@pytest.mark.slow
def test_the_wheel_holds_the_typed_optimizers_and_needs_torch_alone(tmp_path):
    for name in ("pip", "setuptools", "mypy"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(ROOT / "aurora", source / "aurora", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests", source / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "MANIFEST.in", "LICENSE", "CHANGELOG.md", "CITATION.cff"):
        shutil.copy(ROOT / name, source)
    command = ["pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", tmp_path, source]
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"aurora_optim-{aurora.__version__}-py3-none-any.whl"
    zipfile.ZipFile(wheel).extractall(site)

    info = f"aurora_optim-{aurora.__version__}.dist-info"
    modules = {f"aurora_optim/{path.name}" for path in (ROOT / "aurora" / "optim").glob("*.py")}
    metadata = {f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "top_level.txt", "licenses/LICENSE")}
    files = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    assert files == modules | metadata | {"aurora_optim/py.typed"}

    message = message_from_string((site / info / "METADATA").read_text())
    assert (message["Name"], message["Version"]) == ("aurora-optim", aurora.__version__)
    assert message["License-Expression"] == "MIT" and message["Description-Content-Type"] == "text/markdown"
    assert message.get_payload().strip() == (ROOT / PROJECT["readme"]).read_text().strip()
    assert [name for name in message.get_all("Requires-Dist") if "extra ==" not in name] == ["torch>=2.9"]
    assert set(message.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])

    run_code(TRAINS, site)
    (site / "user.py").write_text(TYPED)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports", "silent", "user.py"],
        cwd=site, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
