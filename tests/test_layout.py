"""Rules of the architecture that a reader relies on."""

import ast
import re
import sys

import pytest

from aurora import RULES
from results.record import SOURCE_MODULES
from tests.conftest import ROOT

FOLDERS = ("aurora", "aurora/runtime", "configs", "data", "results", "scripts", "scripts/benchmarks")
PYTHON_FILES = [path for folder in FOLDERS for path in (ROOT / folder).glob("*.py")]
ALLOWED = {
    "aurora": {"torch", "aurora"},
    "configs": set(),
    "data": {"numpy", "data"},
    "results": {"configs", "results"},
    "aurora/runtime": {"torch", "configs", "aurora"},
    "scripts": {"numpy", "results", "scripts"},
    # They time the trainer, so they need what the trainer needs.
    "scripts/benchmarks": {"torch", "numpy", "aurora", "configs", "data", "results", "scripts", "train_gpt"},
}
EXCEPTIONS = {
    # Imported on CUDA alone, where torch brings Triton with it.
    "aurora/kernels.py": {"torch", "triton", "aurora"},
    "aurora/runtime/kernels.py": {"torch", "triton", "aurora"},
    "results/checkpoint.py": {"torch", "aurora", "configs", "results"},
    "results/momentum.py": {"torch", "aurora", "configs"},
    "results/neurons.py": {"torch", "aurora", "configs"},
    "results/describe.py": {"torch", "numpy", "aurora", "configs", "data", "results"},
    "results/statistics.py": {"numpy", "scipy"},
    "results/findings.py": {"numpy", "scipy", "results"},
    "results/claims.py": {"numpy", "results"},
    "results/log_comparison.py": {"numpy", "results"},
    "results/verdict.py": {"numpy", "results"},
    "results/report.py": {"numpy", "results"},
    # Counts the shards of a run, so it reads the run's config.
    "data/fineweb.py": {"configs", "data"},
    "scripts/benchmark_data.py": {"numpy", "data"},
    # They check configs before runs start.
    "scripts/compare.py": {"configs", "results", "scripts"},
    "scripts/runs.py": {"configs", "results"},
    "scripts/tune.py": {"configs", "results", "scripts"},
    "scripts/benchmark.py": {"torch", "aurora", "configs", "scripts"},
}


def imported_packages(path, top_level_only=True):
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    packages = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            packages.add(node.module.split(".")[0])
    return packages - set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_go_one_way(path):
    name = path.relative_to(ROOT).as_posix()
    assert imported_packages(path) <= ALLOWED[path.parent.relative_to(ROOT).as_posix()] | EXCEPTIONS.get(name, set())


def test_trainer_needs_torch_and_numpy_alone():
    packages = imported_packages(ROOT / "train_gpt.py", top_level_only=False)
    assert packages == {"torch", "numpy", "aurora", "configs", "data", "results"}


def test_analysis_never_imports_torch():
    for path in (ROOT / "scripts").glob("*.py"):
        if path.name != "benchmark.py":
            assert "torch" not in imported_packages(path, top_level_only=False), path


def test_record_embeds_every_module_that_the_trainer_imports():
    own = {"configs", "data", "results"}
    seen, todo = set(), [ROOT / "train_gpt.py"]
    while todo:
        for node in ast.walk(ast.parse(todo.pop().read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in own:
                path = ROOT / (node.module.replace(".", "/") + ".py")
                if path not in seen:
                    seen.add(path)
                    todo.append(path)
    assert {path.relative_to(ROOT).as_posix() for path in seen} == set(SOURCE_MODULES)


DOCUMENTS = ["README.md", "aurora/README.md", "aurora/runtime/README.md", "data/README.md"]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_a_document_names_exist(document):
    text, folder = (ROOT / document).read_text(), (ROOT / document).parent
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (folder / link).exists(), link
    for path in re.findall(r"\b(?:scripts|data|configs|aurora|results|tests)/[\w./-]+\.(?:py|sh|toml)\b", text):
        assert (ROOT / path).is_file() or path == "aurora/signum.py", path


def test_every_module_is_in_the_readmes_tree():
    tree = (ROOT / "README.md").read_text().split("## Reading the code")[1]
    rules = {f"{name}.py" for name in RULES}
    for path in PYTHON_FILES:
        if path.parent.name != "benchmarks" and path.name not in rules | {"__init__.py"}:
            assert path.name in tree, path
